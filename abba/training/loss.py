"""The loss of a step: the sum of token losses over the supervised tokens of the global batch, divided by their number.

Shapes: L lines, T tokens of a line, S supervised tokens, C of them at a time, D hidden, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from abba.sharded.engine import needs_no_weight_in_backward
from abba.training.attention import PLAIN_ARCHITECTURES, borders_of

CHUNK = 512  # supervised tokens: with 128,256 words their fp32 logits take 263 MB


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden @ weight.T` in fp32, without holding more than CHUNK rows of logits.

    The head is frozen, so the gradient of the hidden states is all that backward needs: it is computed together with
    the loss, chunk by chunk, and the head is read once (the idea of Liger kernel's fused linear cross-entropy).
    """

    @staticmethod
    def forward(ctx, hidden_SD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, targets_S: Tensor, cap: float | None):
        total = torch.zeros((), dtype=torch.float32, device=hidden_SD.device)
        dhidden_SD = torch.empty_like(hidden_SD) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_SD), CHUNK):
            rows = slice(start, start + CHUNK)
            dhidden_CD = dhidden_SD[rows] if dhidden_SD is not None else None
            total += _chunk_loss(hidden_SD[rows], weight_VD, bias_V, targets_S[rows], cap, dhidden_CD)
        ctx.save_for_backward(*(() if dhidden_SD is None else (dhidden_SD,)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal: Tensor):
        (dhidden_SD,) = ctx.saved_tensors
        return (dhidden_SD * dtotal.float()).to(dhidden_SD.dtype), None, None, None, None


def _chunk_loss(
    hidden_CD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    targets_C: Tensor,
    cap: float | None,
    dhidden_CD: Tensor | None,
) -> Tensor:
    """Sum of the losses of a chunk; their gradient is written to `dhidden_CD`. Its logits end with this function."""
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V).float()
    slope_CV = None
    if cap is not None:
        logits_CV.div_(cap).tanh_()
        slope_CV = 1 - logits_CV.square() if dhidden_CD is not None else None
        logits_CV.mul_(cap)
    total = F.cross_entropy(logits_CV, targets_C, reduction="sum")
    if dhidden_CD is not None:
        dlogits_CV = torch.softmax(logits_CV, dim=-1, out=logits_CV)
        dlogits_CV[torch.arange(len(dlogits_CV), device=dlogits_CV.device), targets_C] -= 1
        if slope_CV is not None:
            dlogits_CV.mul_(slope_CV)
        torch.mm(dlogits_CV.to(weight_VD.dtype), weight_VD, out=dhidden_CD)
    return total


class LossHead(nn.Linear):
    """An lm_head that also gives the loss; a subclass, so that ZeRO-3's hooks gather its weight as ever."""

    def forward(self, hidden_SD: Tensor, targets_S: Tensor | None = None, cap: float | None = None) -> Tensor:
        if targets_S is None:
            return super().forward(hidden_SD)
        if self.weight.requires_grad:  # full fine-tuning
            logits_SV = super().forward(hidden_SD).float()
            logits_SV = logits_SV if cap is None else torch.tanh(logits_SV / cap) * cap
            return F.cross_entropy(logits_SV, targets_S, reduction="sum")
        return FrozenHeadLoss.apply(hidden_SD, self.weight, self.bias, targets_S, cap)


def token_loss_sum(logits_LTV: Tensor, predictors_S: Tensor, targets_S: Tensor) -> Tensor:
    """Sum of token losses in fp32 at the flattened positions `predictors`; the reference for the fused one."""
    logits_SV = logits_LTV.flatten(0, 1).index_select(0, predictors_S)
    return F.cross_entropy(logits_SV.float(), targets_S, reduction="sum")


def return_losses(model: PreTrainedModel) -> str:
    """From now on `model(*MicroBatch.inputs)` is the summed loss, a scalar; says how it is computed.

    Only the positions that predict a supervised token meet the head.
    """
    head = model.get_output_embeddings()
    if model.config.model_type in PLAIN_ARCHITECTURES:
        assert type(head) is nn.Linear, "a head is never adapted"
        head.__class__ = LossHead
        model.forward = _fused(model, head)
        if head.weight.requires_grad:
            return "logits of all supervised tokens at once, because the head trains too"
        needs_no_weight_in_backward(head)
        return f"logits of {CHUNK} supervised tokens at a time"
    model.forward = _through_logits(model.forward)
    known = ", ".join(PLAIN_ARCHITECTURES)
    return f"logits of all tokens at once: {model.config.model_type}'s head is not one of {known}"


def _fused(model: PreTrainedModel, head: LossHead) -> Callable[..., Tensor]:
    cap = getattr(model.config, "final_logit_softcapping", None)
    decoder = model.get_decoder()

    def forward(
        input_ids: Tensor, position_ids: Tensor, predictors: Tensor, targets: Tensor, row_lengths: tuple[int, ...]
    ) -> Tensor:
        borders = borders_of(model.config._attn_implementation, input_ids, row_lengths)
        hidden_LTD = decoder(input_ids, position_ids=position_ids, use_cache=False, **borders).last_hidden_state
        return head(hidden_LTD.flatten(0, 1).index_select(0, predictors), targets, cap)

    return forward


def _through_logits(model_forward: Callable[..., object]) -> Callable[..., Tensor]:
    def forward(
        input_ids: Tensor, position_ids: Tensor, predictors: Tensor, targets: Tensor, row_lengths: tuple[int, ...]
    ) -> Tensor:
        logits = model_forward(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        return token_loss_sum(logits, predictors, targets)

    return forward
