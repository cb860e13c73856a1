"""Checkpoints and bases made for a test, without training anything."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from abba.adapter.config import MethodConfig, factors_of
from abba.adapter.initialize import Factors
from abba.base_files import INDEX
from abba.checkpoint import format
from abba.checkpoint.slices import slice_bounds
from abba.storage import Spec, write_safetensors


def factor_shapes(modules: Mapping[str, tuple[int, int]], r1: int, r2: int) -> dict[str, tuple[int, int]]:
    return {
        f"{name}.{factor}": shape
        for name, (out, into) in modules.items()
        for factor, shape in zip(Factors._fields, ((r1, into), (out, r1), (r2, into), (out, r2)), strict=True)
    }


def write_checkpoint(
    root: Path,
    config: MethodConfig,
    modules: Mapping[str, tuple[int, int]],
    step: int = 4,
    world: int = 2,
    base_model: str = "base",
    **state,
) -> Path:
    """`root/step-N` with random masters and moments of 0."""
    final = format.step_directory(root, step)
    temporary = format.temporary_directory(final)
    temporary.mkdir(parents=True)
    shapes = state.pop("tensors", None) or factors_of(config, modules)
    entries = []
    for rank in range(world):
        slices = []
        for seed, (name, shape) in enumerate(shapes.items()):
            start, stop = slice_bounds(torch.Size(shape).numel(), rank, world)
            generator = torch.Generator().manual_seed(seed * world + rank)
            slices.append((f"master/{name}", 0.3 * torch.randn(stop - start, generator=generator)))
            slices += [(f"{kind}/{name}", torch.zeros(1).expand(stop - start)) for kind in format.KINDS[1:]]
        entries.append(format.write_shard(temporary, rank, world, slices))
        del slices
    whole = {"step": step, "world_size": world, "seed": 0, "base_model": base_model, "modules": dict(modules)}
    whole |= {"adapter": config.__dict__, "tensors": shapes, "fingerprint": {}, "recipe": {}}
    format.commit(final, {**whole, **state}, entries)
    return final


def linears(hidden: int, mlp: int, kv: int, layers: int) -> dict[str, tuple[int, int]]:
    """(out, in) of the seven linears of every layer of a Llama."""
    shapes = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, hidden)}
    one = {f"self_attn.{name}_proj": shape for name, shape in shapes.items()}
    one |= {"mlp.gate_proj": (mlp, hidden), "mlp.up_proj": (mlp, hidden), "mlp.down_proj": (hidden, mlp)}
    return {f"model.layers.{i}.{name}": shape for i in range(layers) for name, shape in one.items()}


def write_base(directory: Path, modules: Mapping[str, tuple[int, int]], vocabulary: int, files: int) -> None:
    """A base in bf16 with random weights in several files, and a config.json that no test builds a model from."""
    directory.mkdir()
    hidden = next(iter(modules.values()))[1]
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "lm_head.weight": (vocabulary, hidden)}
    shapes |= {f"{name}.weight": shape for name, shape in modules.items()} | {"model.norm.weight": (hidden,)}
    names, weight_map = list(shapes), {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        layout = {name: Spec(shapes[name], torch.bfloat16) for name in names[index::files]}
        tensors = (torch.empty(spec.shape, dtype=torch.bfloat16).normal_(std=0.02) for spec in layout.values())
        write_safetensors(directory / file, layout, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(layout, file)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False}))
