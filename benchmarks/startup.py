#!/usr/bin/env python
"""From the launch of a job to the end of its first step, part by part; and the SVD alone: seconds and error.

    python benchmarks/startup.py
    python benchmarks/startup.py --models quickstart --ranks 1 --launcher torchrun --repetitions 1 --svd-size 512

A start is the real program under a real launcher, on the embedded model and on a random Llama. The *first* finds
nothing prepared; the *second* is the same command again, with the tokens and the factors that the first has left.
Parts are what rank 0 says in metrics.jsonl; `launcher` is what lies before its process. The model's files are in the
kernel's cache for both.

The SVD runs on one thread: weights with a slowly decaying spectrum, without any structure, and those of the embedded
model. Its error is the Frobenius norm of what it leaves, over that of the best approximation of this rank.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from load import make_model
from measure import RESULTS, in_turns, write
from safetensors.torch import load_file
from torch import Tensor

from abba.adapter.initialize import OVERSAMPLING, POWER_ITERATIONS, factors_from_svd

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "recipes" / "assets" / "tiny-llama"
LAUNCHERS = {"deepspeed": ["--num_gpus", "{}", "--log_level", "error"], "torchrun": ["--nproc_per_node", "{}"]}
SETTINGS = [(oversampling, iterations) for oversampling in (4, 8, 16) for iterations in (1, 2, 4)]
OURS = (OVERSAMPLING, POWER_ITERATIONS)


def start(launcher: str, ranks: int, overrides: list[str], scratch: Path) -> tuple[dict[str, float], str]:
    """(seconds of each part of one start, what it said of its factors)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    output = Path(tempfile.mkdtemp(dir=scratch)) / "run"
    arguments = [argument.format(ranks) for argument in LAUNCHERS[launcher]] + ["--master_port", port]
    program = ["launch/train.py", "--recipe", "quickstart", *overrides, "train.max_steps=1", f"output_dir={output}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    said, ready, began = [], 0.0, time.monotonic()
    with open(output.parent / "stderr", "w+") as errors:
        process = subprocess.Popen(
            [launcher, *arguments, *program], env={**os.environ, "PATH": path}, cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        for line in process.stdout:
            said.append(line)
            if line.startswith("start: "):
                ready = time.monotonic() - began
        if process.wait():
            errors.seek(0)
            raise SystemExit(f"{' '.join([launcher, *arguments, *program])} failed:\n{errors.read()[-3000:]}")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    parts = next(line["startup_seconds"] for line in lines if "startup_seconds" in line)
    shutil.rmtree(output.parent)
    return {"launcher": ready - sum(parts.values()), **parts}, next(line for line in said if "factors: " in line)


def both_starts(launcher: str, model: str, ranks: int, overrides: list[str], repetitions: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {"first": [], "second": []}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory() as scratch:
            for which, runs in found.items():
                prepared = f"data.prepared_path={scratch}/prepared"
                parts, factors = start(launcher, ranks, [*overrides, prepared], Path(scratch))
                assert ("read from" in factors) == (which == "second"), factors
                runs.append(parts)
    rows = []
    for which, runs in found.items():
        row = {"launcher": launcher, "model": model, "ranks": ranks, "start": which}
        row["all s"] = median(sum(parts.values()) for parts in runs)
        of_parts = {f"{part} s": median(parts[part] for parts in runs) for part in runs[0]}
        rows.append({**row, **of_parts, "seconds": runs})
    return rows


def starts(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shared = ["data.eval_rows=0", "train.eval_steps=", "adapter.r1=16", "adapter.r2=16"]
    shared += ["train.global_batch_size=2", "train.per_device_train_batch_size=1"]  # the step itself is step.py's
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.models:
            directory, name = TINY, model
            if model == "random":
                directory = Path(scratch) / "random"
                name = f"random, {make_model(directory, arguments.layers) / 1e6:.0f} million parameters"
                for path in TINY.glob("tokenizer*"):
                    shutil.copy(path, directory)
            overrides = [*shared, f"model.name_or_path={directory}"]
            for ranks in arguments.ranks:
                rows += both_starts(arguments.launcher, name, ranks, overrides, arguments.repetitions)
    return rows


def weights_to_decompose(size: int) -> dict[str, list[Tensor]]:
    """Weights (out, in) of each kind, in fp32."""
    generator = torch.Generator().manual_seed(0)

    def gaussian() -> Tensor:
        return torch.randn(size, size, generator=generator)

    left, right = torch.linalg.qr(gaussian()).Q, torch.linalg.qr(gaussian()).Q
    values = torch.arange(1, size + 1) ** -0.5
    stored = load_file(TINY / "model.safetensors")
    return {
        f"singular values k^-0.5, {size}x{size}": [(left * values) @ right.T],
        f"Gaussian, {size}x{size}": [gaussian()],
        "the embedded model's": [stored[name].float() for name in sorted(stored) if "_proj" in name],
    }


def best_squares(weight: Tensor, rank: int) -> tuple[float, float]:
    """(squared norm of the best approximation of this rank, of what it leaves), by the eigenvalues of W W^T in fp64."""
    wide = weight.double() if len(weight) <= weight.shape[1] else weight.double().T
    values = torch.linalg.eigvalsh(wide @ wide.T)
    return float(values[-rank:].sum()), float(values[:-rank].clamp(min=0).sum())


def decompositions(size: int, rank: int, repetitions: int) -> list[dict[str, Any]]:
    """A row for each kind of weight and setting: the worst error over weights and seeds, one seed a repetition."""
    rows = []
    for kind, weights in weights_to_decompose(size).items():
        best = [best_squares(weight, rank) for weight in weights]
        factors: dict[tuple[int, int], list] = {setting: [] for setting in SETTINGS}

        def decompose(setting: tuple[int, int], weights: list[Tensor] = weights, factors: dict = factors) -> None:
            seed = len(factors[setting])
            factors[setting].append([factors_from_svd(weight, rank, rank, seed, *setting) for weight in weights])

        cases = {setting: partial(decompose, setting) for setting in SETTINGS}
        seconds = in_turns(cases, repetitions)
        for setting in SETTINGS:
            worst, least = 0.0, 1.0
            for found in factors[setting]:
                for weight, (kept, left), of_weight in zip(weights, best, found, strict=True):
                    error = (weight.double() - of_weight.B1.double() @ of_weight.A1.double()).square().sum().item()
                    worst = max(worst, (error / left) ** 0.5)
                    least = min(least, (kept + left - error) / kept)
            row = {"weights": kind, "rank": rank, "oversampling": setting[0], "power iterations": setting[1]}
            row |= {"used": "yes" if setting == OURS else "", "s a weight": median(seconds[setting]) / len(weights)}
            row |= {"error over best": f"{worst:.6f}", "energy of best": f"{least:.4f}", "seconds": seconds[setting]}
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=["quickstart", "random"], default=["quickstart", "random"])
    parser.add_argument("--layers", type=int, default=8, help="of the random one: 16.8 million parameters each")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--launcher", choices=list(LAUNCHERS), default="deepspeed")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--svd-size", type=int, default=4096, help="rows and columns of the weights; 0: no SVD alone")
    parser.add_argument("--svd-rank", type=int, default=16)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    command = " ".join(["python", *sys.argv])
    settings = {key: str(value) for key, value in arguments._get_kwargs()}
    if arguments.models:
        write("startup", command, settings, starts(arguments), arguments.output)
    if arguments.svd_size:
        torch.set_num_threads(1)
        rows = decompositions(arguments.svd_size, arguments.svd_rank, arguments.repetitions)
        write("svd", command, settings, rows, arguments.output)


if __name__ == "__main__":
    main()
