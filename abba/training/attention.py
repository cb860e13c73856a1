"""Rows that share a line, each attending to itself alone.

A mask of all tokens by all tokens would be computed with as if every row saw every other, and by kernels that know
masks. Row by row torch's causal kernels do it, and a line may be as long as it likes. Flash attention's own interface
takes the rows' borders instead.

Shapes: H heads, T tokens of the line, t of a row, K per head.
"""

import math
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from abba.errors import RecipeError

BY_ROW = "sdpa_by_row"

# Architectures that look a position up in a table, which ends.
POSITION_TABLES = ("biogpt", "codegen", "gpt2", "gpt_bigcode", "gpt_neo", "gptj", "opt")

# Architectures that are a decoder, lm_head, and a cap on the logits where config.final_logit_softcapping is set. Rows
# on one line of such a decoder see each other through nothing but attention, which knows their borders.
PLAIN_ARCHITECTURES = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3")


def line_tokens(attention: str, max_length: int) -> float:
    """The most tokens on a line that holds several rows, with this implementation of attention.

    Those that take the rows' borders have a micro-batch on one line, without padding; flash attention sees borders only
    in batches of one. `eager` computes with a mask of (tokens, tokens), so its lines stay short.
    """
    return max_length if attention == "eager" else math.inf


def refuse_packing(model_type: str) -> None:
    """Needs config.json's model_type alone, so that nobody loads weights first.

    Raises:
        RecipeError: an architecture whose rows could see each other.
    """
    if model_type not in PLAIN_ARCHITECTURES:
        raise RecipeError(
            f"data.packing: rows on one line are known to stay apart in {', '.join(PLAIN_ARCHITECTURES)} only, not in "
            f"{model_type}; set data.packing=false, and train.group_by_length=true to pad less"
        )


def refuse_shared_positions(config: PretrainedConfig, max_length: int) -> None:
    """Raises RecipeError for rotary embeddings whose frequencies follow the longest row of a batch.

    longrope in any case: the scales in its configuration are rounded too where parameters are born partitioned.
    """
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    if "longrope" in kinds:
        raise RecipeError(
            "model.name_or_path: this base's rope_type longrope is not supported: its frequencies follow the longest "
            "row of a batch; take a base without it, such as Phi-3's 4k one"
        )
    if "dynamic" in kinds and max_length > text.max_position_embeddings:
        raise RecipeError(
            f"data.max_length: beyond {text.max_position_embeddings} tokens the frequencies of this base's rope_type "
            f"dynamic follow the longest row of a batch; lower it from {max_length}"
        )


def beyond_positions(config: PretrainedConfig, longest: int) -> str | None:
    """What is wrong with rows of so many tokens, if that can be trained all the same.

    Raises:
        RecipeError: the table of positions ends before the longest row does.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is None or longest <= positions:
        return None
    if text.model_type in POSITION_TABLES:
        raise RecipeError(
            f"data.max_length: the longest row has {longest:,} tokens and this base has {positions:,} positions; "
            f"lower it to {positions}"
        )
    return f"the longest row has {longest:,} tokens; this base was made for {positions:,} (max_position_embeddings)"


def keep_rows_apart(model: PreTrainedModel) -> None:
    """From now on no row sees another one of its line.

    Raises:
        RecipeError: see `refuse_packing`.
    """
    refuse_packing(model.config.model_type)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(BY_ROW)


def borders_of(attention: str, input_ids_LT: Tensor, row_lengths: tuple[int, ...]) -> dict[str, Any]:
    """What this implementation of attention has to be told of the rows on a line, as arguments of the decoder.

    transformers would find the borders for flash attention in the positions, in each layer anew, and the host would
    wait for the GPU each time.
    """
    if attention == BY_ROW:
        return {"row_lengths": row_lengths}
    if not attention.startswith("flash") or len(input_ids_LT) > 1:
        return {}
    ends = torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32).to(input_ids_LT.device, non_blocking=True)
    longest = max(row_lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def sdpa_by_row(
    module: nn.Module,
    query_1HTK: Tensor,
    key_1HTK: Tensor,
    value_1HTK: Tensor,
    attention_mask: None,
    *,
    row_lengths: tuple[int, ...],
    sliding_window: int | None = None,
    **named: object,
) -> tuple[Tensor, None]:
    """transformers' sdpa on each row of one line; the result is (1, T, H, K).

    Args:
        attention_mask: transformers makes none for an attention that it does not know.
        row_lengths: t of each row; their sum is T.
        sliding_window: how many tokens, itself included, a token sees.
    """
    tensors = (query_1HTK, key_1HTK, value_1HTK)
    rows = zip(*(tensor.split(row_lengths, dim=2) for tensor in tensors), strict=True)
    outputs = []
    for query_1HtK, key_1HtK, value_1HtK in rows:
        mask_tt = _window(query_1HtK.shape[2], sliding_window, query_1HtK.device)
        row = (query_1HtK, key_1HtK, value_1HtK, mask_tt)
        outputs.append(sdpa_attention_forward(module, *row, is_causal=mask_tt is None, **named)[0])
    return torch.cat(outputs, dim=1), None


def _window(tokens: int, width: int | None, device: torch.device) -> Tensor | None:
    """Which tokens see which, where causality does not say it all."""
    if width is None or tokens <= width:
        return None
    distance_tt = torch.arange(tokens, device=device)[:, None] - torch.arange(tokens, device=device)
    return ((distance_tt >= 0) & (distance_tt < width))[None, None]


AttentionInterface.register(BY_ROW, sdpa_by_row)
