#!/usr/bin/env python
"""What one GPU makes of ABBA, in eight minutes, with random weights and without the Hub.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --minutes 4 --modes none
    python benchmarks/gpu.py --width 64 --layers 2 --tokens 16 --repetitions 1 --output runs/toy   # whether it runs

Five parts, each a table of its own, written as soon as it is done: a training step of an 8B-shaped Llama, ours against
PEFT's LoRA of the same budget; where its time goes; one adapted linear of 8B and 70B shapes against what the card can
do; the memory of the ZeRO-3 engine against the plan; and the targets. What the minutes do not suffice for is named, and
a part that fails leaves the others.
"""

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import layer
import torch
from measure import RESULTS, device, held_bytes, in_turns, peak_bytes, write
from methods import adapt
from scaling import ADAPTER, engine_of, inputs_of
from step import LLAMA_8B, Step, linears, narrowed
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from abba.adapter.config import SEVEN_LINEARS, AdapterConfig
from abba.planning.architecture import architecture_of
from abba.planning.job import Job
from abba.planning.memory import allocated_parts, backward_bytes, kept_bytes, loss_bytes
from abba.planning.speed import flop
from abba.sharded.engine import release
from abba.sharded.process_group import start_process_group
from abba.sharded.ranks import ranks_from_environment
from abba.training.loss import return_losses
from abba.training.model import enable_checkpointing

LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}
VOCABULARY = 128_256
LORA = AdapterConfig(r1=8, r2=4, alpha=24.0)  # R = 32: for the FLOP of a LoRA of r = 32, which are those of any R
# NVIDIA NeMo AutoModel's LoRA on Llama-3 8B, one H100, 4,096 tokens, micro-batch 2, nothing recomputed.
PUBLISHED_TOKENS = 12_473
SHOWN = 20  # operations of the profile


class Parts:
    """Runs one part after the other while there is time, and writes the table of each."""

    def __init__(self, minutes: float, settings: dict[str, str], output: Path) -> None:
        self._ends, self._settings, self._output = time.monotonic() + 60 * minutes, settings, output
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.failed: list[str] = []

    def run(self, table: str, part: str, seconds: float, compute: Callable[[], list[dict[str, Any]]]) -> None:
        """`compute`, which takes about so many seconds on an H100; its rows are added to `table`."""
        left = self._ends - time.monotonic()
        if seconds > left:
            print(f"skipped: {part}: takes about {seconds:.0f} s, and {max(left, 0):.0f} s are left", flush=True)
            return
        started = time.monotonic()
        try:
            self.rows[table] = self.rows.get(table, []) + compute()
            self.write(table)
        except Exception:  # what is short is the time on the card: the others are measured all the same
            traceback.print_exc()
            self.failed.append(part)
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{part}: {time.monotonic() - started:.0f} s\n", flush=True)

    def write(self, table: str) -> None:
        command = " ".join(["python", *sys.argv])
        write(f"gpu_{table}", command, self._settings, self.rows[table], self._output)


def llama_config(shape: dict[str, int], layers: int, vocabulary: int) -> dict[str, Any]:
    more = {"model_type": "llama", "tie_word_embeddings": False, "rope_theta": 500000.0}
    return {**more, **shape, "num_hidden_layers": layers, "vocab_size": vocabulary}


def training_step(method: str, mode: str, config: dict[str, Any], weights: dict[str, Tensor], rows_BT: Tensor) -> Step:
    """Forward with our loss in chunks, backward and AdamW. `weights`: the base, which models share; made if empty."""
    torch.manual_seed(0)
    with no_init_weights(), torch.device(device()):
        model = LlamaForCausalLM._from_config(LlamaConfig(**config), dtype=torch.bfloat16, attn_implementation="sdpa")
    for name, parameter in model.named_parameters():
        if name not in weights:
            weights[name] = parameter.data.normal_(std=0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
        parameter.data = weights[name]
    adapted = adapt(model, method, SEVEN_LINEARS)
    enable_checkpointing(model.train(), mode)
    return_losses(model)
    inputs = inputs_of(rows_BT)

    def compute() -> None:
        (model(*inputs) / rows_BT.numel()).backward()

    return Step(adapted, compute)


def held_by(step: Step, weights: dict[str, Tensor]) -> int:
    """Bytes of base, factors and moments."""
    moments = [value for of_one in step.optimizer.state.values() for value in of_one.values()]
    return sum(tensor.nbytes for tensor in (*weights.values(), *step.trainable, *moments))


def steps(job: Job, config: dict[str, Any], repetitions: int, weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Ours and LoRA of r = 32 in turns."""
    rows_BT = torch.randint(config["vocab_size"], (job.micro_batch, job.tokens), device=device())
    contenders = {name: training_step(name, job.checkpointing, config, weights, rows_BT) for name in ("lora", "abba")}
    seconds = in_turns(contenders, repetitions, warmup=2)
    jobs = {"abba": job, "lora": replace(job, adapter=LORA)}
    counted = {name: sum(flop(of_one).values()) / job.step_tokens for name, of_one in jobs.items()}
    peaks = {name: held_by(step, weights) + peak_bytes(step) for name, step in contenders.items()}
    rate = {name: job.step_tokens / median(seconds[name]) for name in contenders}
    return [
        {
            "checkpointing": job.checkpointing,
            "method": name,
            "tokens/s": rate[name],
            "GFLOP a token": counted[name] / 1e9,
            "TFLOP/s": rate[name] * counted[name] / 1e12,
            "over lora": rate[name] / rate["lora"],
            "counted over lora": counted["lora"] / counted[name],
            "peak GB": peaks[name] / 1e9,
            "peak over lora": peaks[name] / peaks["lora"],
            "seconds": seconds[name],
        }
        for name in contenders
    ]


def where_time_goes(job: Job, config: dict[str, Any], weights: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The operations of a step of ours that take longest, by shape of their inputs, all others together, and of a GPU
    the time in which it runs none.
    """
    rows_BT = torch.randint(config["vocab_size"], (job.micro_batch, job.tokens), device=device())
    step = training_step("abba", job.checkpointing, config, weights, rows_BT)
    on_gpu = torch.cuda.is_available()
    (wall,) = in_turns({"step": step}, 1)["step"]  # the profiler itself takes time
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiled:
        step()
        if on_gpu:
            torch.cuda.synchronize()
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = profiled.key_averages(group_by_input_shape=True)
    operations = sorted((o for o in found if o.key.startswith("aten::")), key=lambda o: -getattr(o, own))
    busy = sum(getattr(operation, own) for operation in operations)
    total = max(busy, wall * 1e6) if on_gpu else busy
    rows = [
        {
            "operation": operation.key.removeprefix("aten::"),
            "shapes": " ".join("x".join(map(str, shape)) for shape in operation.input_shapes if shape)[:100],
            "calls": operation.count,
            "ms": getattr(operation, own) / 1e3,
            "% of all": 100 * getattr(operation, own) / total,
        }
        for operation in operations[:SHOWN]
    ]
    rest = (busy - sum(getattr(operation, own) for operation in operations[:SHOWN])) / 1e3
    calls = sum(operation.count for operation in operations[SHOWN:])
    idle = (total - busy) / 1e3
    return [
        *rows,
        {"operation": "others", "calls": calls, "ms": rest, "% of all": 1e5 * rest / total},
        {"operation": "none", "calls": 0, "ms": idle, "% of all": 1e5 * idle / total},
    ]


def memory(job: Job, config: dict[str, Any]) -> list[dict[str, Any]]:
    """A step of the engine that launch/train.py builds, on one rank, against launch/plan.py's arithmetic.

    Context and fragments, which the plan assumes, are not what the allocator says.
    """
    before = held_bytes()
    mode, ranks = job.checkpointing, ranks_from_environment()
    engine = engine_of(config, ranks, torch.bfloat16, job.micro_batch, 1, mode)
    engine.train()
    rows_BT = torch.randint(config["vocab_size"], (job.micro_batch, job.tokens), device=device())
    inputs = inputs_of(rows_BT)

    def step() -> None:
        engine.backward(engine(*inputs) / rows_BT.numel())
        engine.step()

    step()
    measured = held_bytes() - before
    measured += peak_bytes(step)
    planned = sum(allocated_parts(job).values()) + kept_bytes(job) + max(loss_bytes(job), backward_bytes(job))
    release(engine)
    row = {"checkpointing": mode, "engine's peak GB": measured / 1e9, "planned GB": planned / 1e9}
    return [{**row, "planned over measured": planned / measured}]


def ceilings(width: int) -> dict[str, float]:
    """The most FLOP/s that a bf16 matrix product, and bytes/s that a copy, has reached here."""
    size = 8192 // width
    a, b = (torch.randn(size, size, device=device()).bfloat16() for _ in range(2))
    source = torch.ones(2**30 // width**2, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    seconds = in_turns({"matrix": lambda: a @ b, "copy": lambda: target.copy_(source)}, 20, warmup=3)
    return {"matrix": 2 * size**3 / min(seconds["matrix"]), "copy": 2 * source.nbytes / min(seconds["copy"])}


def layers(shape: dict[str, int], tokens: int, repetitions: int, most: dict[str, float]) -> list[dict[str, Any]]:
    """layer.py's rows with the share of both ceilings: of its FLOP, and of every activation and weight moved once."""
    rows = []
    for out, into in dict.fromkeys(linears(shape)):
        methods = ["frozen", "lora", "textbook"]
        of_shape = layer.compare((out, into), tokens, "bfloat16", [16], methods, repetitions, enough=40)
        for row in of_shape:
            rank = {"frozen": 0, "lora": 32}.get(row["method"], 256)
            flop_done, seconds = tokens * (4 * out * into + 6 * rank * (out + into)), row["ms"] / 1000
            reads = 2 + (rank > 0)  # of x: forward, gradient of the factors; its own gradient is written
            moved = 2 * (tokens * (reads * into + 2 * out) + 2 * out * into)
            row["of matrix ceiling"] = flop_done / seconds / most["matrix"]
            row["of copy ceiling"] = moved / seconds / most["copy"]
            row |= {"ceiling TFLOP/s": most["matrix"] / 1e12, "ceiling GB/s": most["copy"] / 1e9}
        rows += of_shape
    return rows


def targets(found: dict[str, list[dict[str, Any]]], whole: bool) -> list[dict[str, Any]]:
    """What is wanted and whether it was reached. `whole`: it is the 8B at 4,096 tokens and a micro-batch of 2."""
    wanted = []
    for row in found.get("step", []):
        if row["method"] == "abba":
            mode, ratio = row["checkpointing"], row["over lora"] / row["counted over lora"]
            if whole:
                wanted.append((f"{mode}: tokens/s, at least", PUBLISHED_TOKENS, row["tokens/s"], 1))
            wanted.append((f"{mode}: tokens/s over lora's, over the counted ratio, at least", 0.97, ratio, 1))
            wanted.append((f"{mode}: peak memory over lora's, at most", 1.02, row["peak over lora"], -1))
    for row in found.get("memory", []):
        off = abs(row["planned over measured"] - 1)
        wanted.append((f"{row['checkpointing']}: plan and measured peak apart, at most", 0.10, off, -1))
    return [
        {"target": name, "wanted": limit, "measured": value, "met": sign * value >= sign * limit}
        for name, limit, value, sign in wanted
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--modes", nargs="+", choices=("none", "selective"), default=["none", "selective"])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--width", type=int, default=1, help="divide the widths by this; for a quick look")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    parts = Parts(arguments.minutes, {key: str(value) for key, value in arguments._get_kwargs()}, arguments.output)

    small = narrowed(LLAMA_8B, arguments.width)
    config = llama_config(small, arguments.layers, VOCABULARY // arguments.width)
    job = Job(architecture_of(config, "8B"), ADAPTER, 1, arguments.batch, arguments.batch, arguments.tokens)
    jobs = {mode: replace(job, checkpointing=mode, attention="sdpa") for mode in arguments.modes}
    repetitions, weights = arguments.repetitions, {}
    for mode, one in jobs.items():
        parts.run("step", f"step, {mode}", 60, partial(steps, one, config, repetitions, weights))
    first = jobs[arguments.modes[0]]
    parts.run("profile", "profile", 30, partial(where_time_goes, first, config, weights))
    weights.clear()

    # Before the engine: DeepSpeed puts a function of its own in the place of F.linear, for good.
    most = ceilings(arguments.width)
    print(f"ceilings: {most['matrix'] / 1e12:.4g} TFLOP/s in a bf16 product, {most['copy'] / 1e9:.4g} GB/s in a copy\n")
    tokens = arguments.batch * arguments.tokens
    for name, shape in {"8B": small, "70B": narrowed(LLAMA_70B, arguments.width)}.items():
        parts.run("layer", f"layers of the {name}", 40, partial(layers, shape, tokens, repetitions, most))

    start_process_group(ranks_from_environment())
    for mode, one in jobs.items():
        parts.run("memory", f"memory, {mode}", 45, partial(memory, one, config))
    whole = (arguments.width, arguments.layers, arguments.batch, arguments.tokens) == (1, 32, 2, 4096)
    if found := targets(parts.rows, whole):
        parts.rows["targets"] = found
        parts.write("targets")
    torch.distributed.destroy_process_group()
    if parts.failed:
        sys.exit(f"failed: {', '.join(parts.failed)}")


if __name__ == "__main__":
    main()
