"""The best LoRA of a given rank: what to serve when r1*r2 is more than a server accepts.

Shapes: O out, I in, R = r1, Q = r2, F = r1*r2, K the rank that is left.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from abba.adapter.functional import khatri_rao
from abba.adapter.initialize import Factors


@torch.no_grad()
def truncate(factors: Factors, scale: float, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """(A (K, I), B (O, K), kept, total): B A is closest to delta W of all matrices of rank K, in the Frobenius norm.

    delta W = B_FO A_FI is never formed: QR of each Khatri-Rao factor leaves an SVD of at most (F, F)
    (Eckart and Young, 1936). `kept` and `total` are ||B A||_F^2 and ||delta W||_F^2. In float64.
    """
    a1, b1, a2, b2 = (factor.detach().double() for factor in factors)
    q_OF, r_FF = torch.linalg.qr(khatri_rao(b1.T, b2.T * scale).T)
    p_IF, l_FF = torch.linalg.qr(khatri_rao(a1, a2).T)
    u, s, vh = torch.linalg.svd(r_FF @ l_FF.T, full_matrices=False)
    root_K = s[:rank].sqrt()
    b_OK, a_KI = q_OF @ (u[:, :rank] * root_K), (vh[:rank] * root_K[:, None]) @ p_IF.T
    missing = rank - len(root_K)  # a layer narrower than K has no more directions
    energy = s.square()
    return F.pad(a_KI, (0, 0, 0, missing)), F.pad(b_OK, (0, missing)), energy[:rank].sum().item(), energy.sum().item()
