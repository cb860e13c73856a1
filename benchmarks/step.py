#!/usr/bin/env python
"""A training step of decoder layers with the real shapes of a model: tokens/s and peak memory of each method.

    python benchmarks/step.py                                       # two layers of Llama-3.1-8B, as on two cores
    python benchmarks/step.py --name step_others --layers 1 --modes none --methods lora hira dora full abba
    python benchmarks/step.py --layers 32 --tokens 4096 --batch 2 --modes none selective       # the model, on a GPU

Random weights, no embedding and no head: what an adapter changes. The optimizer is the same AdamW for all.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import RESULTS, device, in_turns, interval, peak_bytes, write
from methods import adapt
from torch import nn
from transformers import LlamaConfig, LlamaModel
from transformers.initialization import no_init_weights

from abba.adapter.config import SEVEN_LINEARS
from abba.base_model import DTYPE_CHOICES, DTYPES, choose_dtype
from abba.training.model import enable_checkpointing

LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
STEP_METHODS = ("lora", "loha", "hira", "dora", "abba", "full")


def decoder(method: str, mode: str, layers: int, dtype: torch.dtype, shape: dict[str, int]) -> nn.Module:
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=8, rope_theta=500000.0, **shape)
    torch.manual_seed(0)
    with no_init_weights(), torch.device(device()):
        model = LlamaModel._from_config(config, dtype=dtype, attn_implementation="sdpa")
        for parameter in model.parameters():
            parameter.data = torch.ones_like(parameter) if parameter.ndim == 1 else torch.randn_like(parameter) * 0.02
    model.embed_tokens.requires_grad_(False)
    model = adapt(model, method, SEVEN_LINEARS) if method != "full" else model
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    enable_checkpointing(plain, mode)
    return model.train()


class Step:
    """A step: `compute`, which does forward and backward, and AdamW on what trains."""

    def __init__(self, model: nn.Module, compute: Callable[[], None]) -> None:
        self.compute = compute
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fused = {"fused": True} if self.trainable[0].is_cuda else {"foreach": True}
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-5, **fused)

    def __call__(self) -> None:
        self.compute()
        self.optimizer.step()
        self.optimizer.zero_grad()


def decoder_step(model: nn.Module, batch: int, tokens: int, hidden: int, dtype: torch.dtype) -> Step:
    """On one batch of hidden states and of their gradients."""
    generator = torch.Generator().manual_seed(0)
    x_BTI = torch.randn(batch, tokens, hidden, generator=generator).to(device(), dtype)
    x_BTI, dy_BTI = x_BTI.requires_grad_(), torch.randn_like(x_BTI) * 1e-3

    def compute() -> None:
        model(inputs_embeds=x_BTI, use_cache=False).last_hidden_state.backward(dy_BTI)
        x_BTI.grad = None

    return Step(model, compute)


def linears(shape: dict[str, int]) -> list[tuple[int, int]]:
    """(out, in) of the seven adapted linears of a layer."""
    hidden, mlp = shape["hidden_size"], shape["intermediate_size"]
    kv = hidden * shape["num_key_value_heads"] // shape["num_attention_heads"]
    return [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(mlp, hidden)] * 2 + [(hidden, mlp)]


def narrowed(shape: dict[str, int], width: int) -> dict[str, int]:
    """Sizes, but not numbers of heads, divided by `width`."""
    return shape | {key: value // width for key, value in shape.items() if "size" in key}


def counted_ratio(shape: dict[str, int], tokens: int, mode: str) -> float:
    """Tokens/s of ours over LoRA's of r = 32, by FLOP of the seven linears and attention alone."""
    again = {"none": 0.0, "selective": 0.5, "non_reentrant": 1.0, "reentrant": 1.0}[mode]  # forwards computed twice

    def flops(rank: int) -> float:
        base = sum((4 + 2 * again) * o * i for o, i in linears(shape))
        adapter = sum((6 + 2 * again) * rank * (o + i) for o, i in linears(shape))
        # Scores and values, half of them masked; both operands have a gradient.
        attention = (6 + 2 * again) * 2 * tokens * shape["hidden_size"] * 0.5
        return base + adapter + attention

    return flops(32) / flops(256)


def compare(
    methods: list[str],
    mode: str,
    layers: int,
    batch: int,
    tokens: int,
    dtype: str,
    shape: dict,
    repetitions: int,
    enough: float,
) -> list[dict[str, Any]]:
    build = partial(decoder, mode=mode, layers=layers, dtype=DTYPES[dtype], shape=shape)
    steps = {name: decoder_step(build(name), batch, tokens, shape["hidden_size"], DTYPES[dtype]) for name in methods}
    seconds = in_turns(steps, repetitions, enough=enough)
    rate = {name: batch * tokens / median(seconds[name]) for name in methods}
    rows = []
    for name in methods:
        row = {"checkpointing": mode, "dtype": dtype, "method": name, "tokens/s": rate[name]}
        if "lora" in rate:
            row |= {"over lora": rate[name] / rate["lora"], "95%": interval(seconds, "lora", name)}
        if name == "abba":
            row |= {"counted over lora": counted_ratio(shape, tokens, mode)}
        # Beyond weights, factors and moments, which a step finds.
        row |= {
            "peak MB of a step": peak_bytes(steps[name]) / 1e6,
            "trainable": sum(p.numel() for p in steps[name].trainable),
        }
        rows.append({**row, "seconds": seconds[name]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, help="1024, or 512 where bfloat16 is not fast")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto")
    modes = ("none", "selective", "non_reentrant", "reentrant")
    parser.add_argument("--modes", nargs="+", choices=modes, default=["none", "selective", "reentrant"])
    parser.add_argument("--methods", nargs="+", choices=STEP_METHODS, default=["lora", "loha", "abba"])
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=60, help="of a method in all: what is slow is repeated less")
    parser.add_argument("--width", type=int, default=1, help="divide the widths by this; for a quick look")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="step")
    arguments = parser.parse_args()
    shape = narrowed(LLAMA_8B, arguments.width)
    dtype, note = choose_dtype(arguments.dtype)
    arguments.tokens = arguments.tokens or (512 if note else 1024)
    if note:
        print(f"dtype: {note}; {arguments.tokens} tokens", flush=True)
    rows = []
    for mode in arguments.modes:
        rows += compare(
            arguments.methods,
            mode,
            arguments.layers,
            arguments.batch,
            arguments.tokens,
            dtype,
            shape,
            arguments.repetitions,
            arguments.seconds,
        )
    settings = {key: str(value) for key, value in arguments._get_kwargs()}
    write(arguments.name, " ".join(["python", *sys.argv]), settings, rows, arguments.output)


if __name__ == "__main__":
    main()
