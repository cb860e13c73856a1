#!/usr/bin/env python
"""One adapted linear layer, forward and backward: time, memory and saved bytes of each method, and cost against rank.

python benchmarks/layer.py
python benchmarks/layer.py --shapes 14336x4096 --tokens 512 2048 --dtypes bfloat16 --repetitions 9
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import RESULTS, device, in_turns, interval, peak_bytes, ratio, saved_bytes, write
from methods import METHODS, adapt
from torch import nn

from abba.base_model import DTYPES, choose_dtype


def layer(method: str, out_features: int, in_features: int, dtype: torch.dtype, rank: int) -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=False, dtype=dtype, device=device())
    linear.weight.data.normal_(std=0.02)
    return adapt(nn.Sequential(linear), method, ["0"], rank)


def forward_backward(module: nn.Module, x_TI: torch.Tensor, dy_TO: torch.Tensor, times: int = 1) -> None:
    for _ in range(times):
        module(x_TI).backward(dy_TO)
        x_TI.grad = None
        for parameter in module.parameters():
            parameter.grad = None


def flop_share(out_features: int, in_features: int, rank: int) -> float:
    """FLOP of forward and backward over those of the frozen layer, 4*O*I a token: h, y, dh, dx and two gradients."""
    adapter = 6 * rank * rank * (out_features + in_features)
    return 1 + adapter / (4 * out_features * in_features)


def compare(
    shape: tuple[int, int],
    tokens: int,
    dtype: str,
    ranks: list[int],
    methods: list[str],
    repetitions: int,
    enough: float,
) -> list[dict[str, Any]]:
    out_features, in_features = shape
    x_TI = torch.randn(tokens, in_features, dtype=DTYPES[dtype], device=device()).requires_grad_()
    dy_TO = torch.randn(tokens, out_features, dtype=DTYPES[dtype], device=device())
    build = partial(layer, out_features=out_features, in_features=in_features, dtype=DTYPES[dtype])
    modules = {(name, 16): build(name, rank=16) for name in methods}
    modules |= {("abba", rank): build("abba", rank=rank) for rank in ranks}
    # A GPU that is waited for has to be started again, which would count against small layers: ten times at once there.
    times = 10 if torch.cuda.is_available() else 1
    # Those that are close run one after the other: a shared machine may change its speed within a round.
    order = sorted(modules, key=lambda key: key[0] in ("dora", "hira", "loha"))
    cases = {key: partial(forward_backward, modules[key], x_TI, dy_TO, times) for key in order}
    seconds = in_turns(cases, repetitions, enough=enough)
    seconds = {key: [value / times for value in found] for key, found in seconds.items()}
    rows = []
    for (name, rank), module in modules.items():
        key, share = (name, rank), flop_share(out_features, in_features, rank)
        times_frozen = ratio(seconds, key, ("frozen", 16))
        rows.append(
            {
                "layer": f"{out_features}x{in_features}",
                "tokens": tokens,
                "dtype": dtype,
                "method": name if name != "abba" else f"abba {rank}x{rank}",
                "ms": 1000 * median(seconds[key]),
                "times frozen": times_frozen,
                "95%": interval(seconds, key, ("frozen", 16)),
                "over FLOP floor": times_frozen / share if name == "abba" else "",
                "saved MB": saved_bytes(partial(module, x_TI), module) / 1e6,
                "peak MB": peak_bytes(cases[key]) / 1e6,
                "seconds": seconds[key],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "14336x4096"], metavar="OUTxIN")
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="bfloat16, if it is fast here, and float32")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16, 32], help="r1 = r2 of ours")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--repetitions", type=int, default=40)
    parser.add_argument("--seconds", type=float, default=30, help="of a method in all: what is slow is repeated less")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--name", default="layer")
    arguments = parser.parse_args()
    rows, (fast, why) = [], choose_dtype("auto")
    if why and not arguments.dtypes:
        print(f"dtypes: {why}; --dtypes bfloat16 float32 measures both", flush=True)
    arguments.dtypes = arguments.dtypes or list(dict.fromkeys([fast, "float32"]))
    for text in arguments.shapes:
        out_features, in_features = map(int, text.split("x"))
        for dtype in arguments.dtypes:
            for tokens in arguments.tokens:
                shape, methods = (out_features, in_features), ["frozen", *dict.fromkeys(arguments.methods)]
                often = (arguments.repetitions, arguments.seconds)
                rows += compare(shape, tokens, dtype, arguments.ranks, methods, *often)
    settings = {key: str(value) for key, value in arguments._get_kwargs()}
    write(arguments.name, " ".join(["python", *sys.argv]), settings, rows, arguments.output)


if __name__ == "__main__":
    main()
