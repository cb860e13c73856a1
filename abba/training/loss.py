"""The loss of a step: the sum of token losses over the supervised tokens of the global batch, divided by their number.

Shapes: B rows, T tokens, V vocabulary, S supervised tokens.
"""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100


def token_loss_sum(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Sum of next-token losses in fp32 where the label is not IGNORED.

    Labels stand at their own token's position; the shift happens here. Only supervised positions are widened.
    """
    targets = labels_BT[:, 1:]
    supervised = targets != IGNORED
    logits_SV = logits_BTV[:, :-1][supervised]
    return F.cross_entropy(logits_SV.float(), targets[supervised], reduction="sum")
