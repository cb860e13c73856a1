"""README.md of an adapter or a merged model: what it is, what made it, how good it is, how to load it."""

import json
from collections.abc import Mapping
from typing import Any

from abba.adapter.config import AdapterConfig
from abba.adapter.directory import FULL, MERGED, AdapterDescription
from abba.adapter.export import PEFT_NAMES, vllm_advice


def model_card(description: AdapterDescription, scores: Mapping[str, Any] | None) -> str:
    """The card's text.

    Args:
        scores: scores.json of an evaluation of this adapter. Its paths are left out: they are of one machine.
    """
    base = description.base_model or "the base model"
    parts = [
        _header(description),
        f"# {_what(description)} for {base}",
        _method(description),
        "## Load it",
        _how_to_load(description),
    ]
    parts += _training(description.provenance or {}) + _scores(description, scores)
    return "\n\n".join(parts) + "\n"


def _header(description: AdapterDescription) -> str:
    lines = ["---"]
    if description.base_model:
        lines.append(f"base_model: {json.dumps(description.base_model)}")
    library = "transformers" if description.format in (MERGED, FULL) else "peft"
    lines += [f"library_name: {library}", f"tags: [{description.config.method}]", "---"]
    return "\n".join(lines)


def _what(description: AdapterDescription) -> str:
    if description.format == MERGED:
        return "Model with a merged ABBA adapter"
    if description.format == FULL:
        return "Fully fine-tuned model"
    if isinstance(description.config, AdapterConfig):
        return "ABBA adapter"
    return f"{'rsLoRA' if description.config.method == 'rslora' else PEFT_NAMES[description.format]} adapter"


def _method(description: AdapterDescription) -> str:
    config = description.config
    stored = description.dtype or "each tensor in the base's own dtype"
    if description.format == FULL:
        return f"Every parameter of the base was trained. Stored: {stored}."
    if not isinstance(config, AdapterConfig):
        return f"PEFT's {config.summary}, {len(description.modules)} modules. Stored in {description.dtype}."
    rank = description.lora_rank
    if description.format == MERGED:
        form = "Added to the base's weights in fp32, one tensor at a time"
    elif description.format == "loha":
        form = "Stored as PEFT LoHa; the two are the same function"
    elif description.rank is None:
        form = f"Stored as PEFT LoRA of rank {rank}; the two are the same function"
    else:
        kept = description.kept_energy
        form = (
            f"Stored as the closest LoRA of rank {rank}, which keeps {kept.overall:.2%} of ||delta W||_F^2 "
            f"(least in {kept.worst_module}: {kept.worst:.2%})"
        )
    return (
        f"delta W = s (B1 A1) * (B2 A2), r1 = {config.r1}, r2 = {config.r2}, alpha = {config.alpha:g}, "
        f"s = {config.scale:g}, {len(description.modules)} modules. {form}. {stored[0].upper()}{stored[1:]}."
    )


def _how_to_load(description: AdapterDescription) -> str:
    if description.format in (MERGED, FULL):
        return (
            "```python\nfrom transformers import AutoModelForCausalLM\n\n"
            'model = AutoModelForCausalLM.from_pretrained("THIS_DIRECTORY")\n```'
        )
    base = json.dumps(description.base_model or "THE_BASE_MODEL")
    if description.base_revision is not None:
        base += f", revision={json.dumps(description.base_revision)}"
    text = (
        "```python\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({base})\n"
        'model = PeftModel.from_pretrained(base, "THIS_DIRECTORY")\n```'
    )
    if description.format == "lora":
        text += f"\n\nNote: {vllm_advice(description)}."
    return text


def _training(provenance: Mapping[str, Any]) -> list[str]:
    if not provenance:
        return []
    parts = ["## Training"]
    if provenance.get("step") is not None:
        parts.append(f"After optimizer step {provenance['step']}, on {provenance.get('world_size')} rank(s).")
    fingerprint = provenance.get("fingerprint") or {}
    if provenance.get("recipe"):
        parts += ["Recipe:", _block(provenance["recipe"])]
    if fingerprint:
        known = {key: fingerprint.get(key, {}) for key in ("data", "model", "software")}
        parts += ["Data and base by content, and software:", _block(known)]
    return parts


def _scores(description: AdapterDescription, scores: Mapping[str, Any] | None) -> list[str]:
    if not scores:
        return []
    shown = ("task", "n", "exact_match", "exact_match_95", "flexible_match", "flexible_match_95", "tasks")
    shown += ("prompt", "dtype", "max_new_tokens", "engine")
    named = {key: scores[key] for key in shown if key in scores}
    config = description.config
    if description.format == FULL:
        own, result = description.dtype is None, "model, in the base's own dtype"
    else:
        own = (description.format, description.dtype) == (config.default_format, "float32")
        result = f"adapter, in {PEFT_NAMES[config.default_format]} form and fp32"
    note = "Greedy generation:" if own else f"Of the run's own {result}:"
    return ["## Scores", note, _block(named)]


def _block(value: Any) -> str:
    # JSON, which is YAML too: no string in it can end the block, for newlines are escaped.
    return f"```yaml\n{json.dumps(value, indent=2, ensure_ascii=False)}\n```"
