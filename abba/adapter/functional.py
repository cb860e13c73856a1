"""The one formula of the project: delta W = s (B1 A1) * (B2 A2), trained without ever forming an (O, I) matrix.

Entry (o, i) of (B1 A1) * (B2 A2) is the sum over k and l of B1[o,k] A1[k,i] B2[o,l] A2[l,i], which is one product
B_kr A_kr of rank R*Q, with the Khatri-Rao products

    B_kr[o, k*Q + l] = B1[o, k] B2[o, l]        A_kr[k*Q + l, i] = A1[k, i] A2[l, i]

A name's suffix is its shape: O out features, I in features, N either, R = r1, Q = r2, K = R*Q, T tokens (all leading
dimensions of x).
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def khatri_rao(p_RN: Tensor, q_QN: Tensor) -> Tensor:
    """(R*Q, N): every product of a row of p with a row of q. A_kr of A1 and A2, B_kr^T of B1^T and B2^T.

    The long side is innermost for both, because a product over rows of r2 = 16 values costs several times as much.
    """
    return (p_RN.contiguous().unsqueeze(1) * q_QN.contiguous()).flatten(0, 1)


def khatri_rao_gradients(d_KN: Tensor, p_RN: Tensor, q_QN: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of p and q from that of their Khatri-Rao product, by the product rule."""
    d_RQN = d_KN.view(p_RN.shape[0], *q_QN.shape)
    return (d_RQN * q_QN).sum(1), (d_RQN * p_RN.unsqueeze(1)).sum(0)


def delta_weight(a1_RI: Tensor, b1_OR: Tensor, a2_QI: Tensor, b2_OQ: Tensor, scale: float) -> Tensor:
    """The update itself (O, I), for merging and inspection; training never forms it."""
    return (b1_OR @ a1_RI).mul_(b2_OQ @ a2_QI).mul_(scale)


def frozen_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """The product with the frozen weight, (T, O).

    Not F.linear: DeepSpeed puts an autograd function in its place, which costs the host more than a small product, and
    rounds a bias once more where x has three dimensions.
    """
    return x_TI @ weight_OI.T if bias_O is None else torch.addmm(bias_O, x_TI, weight_OI.T)


class AbbaLinearFunction(torch.autograd.Function):
    """y = x W^T + bias + s (x A_kr^T) B_kr^T with a frozen W.

    `weight` is a callable because under ZeRO-3 the tensor is only there while its module runs: it is read anew in
    backward instead of being saved. Saved are x, h = x A_kr^T and the four factors; the Khatri-Rao factors are
    recomputed, which costs nothing measurable next to holding 1.3 GB of them at 7B.
    s is folded into B2, the smallest place for it.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        a1_RI: Tensor,
        b1_OR: Tensor,
        a2_QI: Tensor,
        b2_OQ: Tensor,
        scale: float,
        weight: Callable[[], Tensor],
        bias: Tensor | None,
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        h_TK = x_TI @ khatri_rao(a1_RI, a2_QI).T
        y_TO = frozen_linear(x_TI, weight(), bias)
        y_TO.addmm_(h_TK, khatri_rao(b1_OR.T, b2_OQ.T * scale))
        ctx.save_for_backward(x, h_TK, a1_RI, b1_OR, a2_QI, b2_OQ)
        ctx.scale, ctx.weight = scale, weight
        return y_TO.view(*x.shape[:-1], y_TO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, h_TK, a1_RI, b1_OR, a2_QI, b2_OQ = ctx.saved_tensors
        b1_RO, b2_QO = b1_OR.T.contiguous(), b2_OQ.T.contiguous() * ctx.scale
        dy_TO, x_TI = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
        dh_TK = dy_TO @ khatri_rao(b1_RO, b2_QO).T

        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy_TO @ ctx.weight()
            dx.addmm_(dh_TK, khatri_rao(a1_RI, a2_QI))
            dx = dx.view_as(x)

        da1 = db1 = da2 = db2 = None
        if any(ctx.needs_input_grad[1:5]):
            da1, da2 = khatri_rao_gradients(dh_TK.T @ x_TI, a1_RI, a2_QI)
            db1, db2 = khatri_rao_gradients(h_TK.T @ dy_TO, b1_RO, b2_QO)
            db1, db2 = db1.T, db2.T * ctx.scale
        return dx, da1, db1, da2, db2, None, None, None
