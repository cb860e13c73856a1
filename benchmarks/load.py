#!/usr/bin/env python
"""Getting a base model into ZeRO-3: every rank its own slices (ours), against transformers' from_pretrained.

    python benchmarks/load.py
    python benchmarks/load.py --ranks 2 --layers 4 --repetitions 1

Makes a random Llama in several files, then starts ranks anew for each measurement, the two ways in turns. Timed is from
the moment when all ranks have met, to the moment when the last one has its part of the model.
"""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import RESULTS, write

WAYS = ("ours", "from_pretrained")


class AnonymousPeak(threading.Thread):
    """The most anonymous memory of this process, polled: pages of mapped files belong to the kernel's cache."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.highest, self.stopped = self._now(), 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.002):
            self.highest = max(self.highest, self._now())

    def end(self) -> int:
        self.stopped.set()
        self.join()
        return max(self.highest, self._now()) - self.before

    @staticmethod
    def _now() -> int:
        return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def make_model(directory: Path, layers: int) -> int:
    """A random Llama in bf16 in several files; returns its parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers, num_attention_heads=16, vocab_size=32000
    )
    model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="100MB")
    return sum(parameter.numel() for parameter in model.parameters())


def load_on_this_rank(way: str, directory: Path, result: Path) -> None:
    import torch.distributed as dist
    import transformers.models.llama.modeling_llama  # noqa: F401  its own memory is not the model's
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from abba.sharded.engine import engine_config
    from abba.sharded.process_group import start_process_group
    from abba.sharded.ranks import ranks_from_environment
    from abba.training.model import load_partitioned
    from abba.training.startup import Startup

    ranks = ranks_from_environment()
    device = start_process_group(ranks)
    config = engine_config(torch.bfloat16, 1, 1, 1.0, {}, ranks)
    bytes_read, pread = 0, os.pread

    def counting(descriptor: int, size: int, offset: int) -> bytes:
        nonlocal bytes_read
        data = pread(descriptor, size, offset)
        bytes_read += len(data)
        return data

    os.pread = counting  # ours reads by it alone; what the library maps cannot be counted so
    dist.barrier()
    peak, started = AnonymousPeak(), time.perf_counter()
    peak.start()
    if way == "ours":
        model, _ = load_partitioned(directory, torch.bfloat16, "sdpa", config, device, ranks, Startup(), lambda _: None)
    else:
        keep = HfDeepSpeedConfig(config)  # alive, or ZeRO-3 is not noticed
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
        )
        del keep
    dist.barrier()
    seconds, partition = time.perf_counter() - started, sum(p.ds_tensor.nbytes for p in model.parameters())
    found = {"seconds": seconds, "peak": peak.end(), "partition": partition, "bytes_read": bytes_read}
    found["checksum"] = sum(int(p.ds_tensor.view(torch.int16).sum(dtype=torch.int64)) for p in model.parameters())
    result.write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(way: str, directory: Path, ranks: int) -> list[dict[str, Any]]:
    """What each rank found."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as scratch:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        results = [Path(scratch) / f"{rank}.json" for rank in range(ranks)]
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank-of", way, str(directory), str(result)],
                env={**os.environ, **common, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank, result in enumerate(results)
        ]
        if any([process.wait() for process in started]):
            raise SystemExit(f"a rank of {way} failed; see above")
        return [json.loads(result.read_text()) for result in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=16, help="16.8 million parameters each, and 66 million besides")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        way, directory, result = arguments.rank_of
        return load_on_this_rank(way, Path(directory), Path(result))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        parameters = make_model(Path(scratch), arguments.layers)
        for ranks in arguments.ranks:
            found: dict[str, list] = {way: [] for way in WAYS}
            for _ in range(arguments.repetitions):
                for way in WAYS:
                    found[way].append(measure(way, Path(scratch), ranks))
            sums = {sum(rank["checksum"] for rank in run) for runs in found.values() for run in runs}
            assert len(sums) == 1, "the two ways loaded different weights"
            rows += [row(way, ranks, found[way]) for way in WAYS]
            rows[-2]["times from_pretrained"] = rows[-2]["s"] / rows[-1]["s"]
    write("load", " ".join(["python", *sys.argv]), {"parameters": parameters}, rows, arguments.output)
    return None


def row(way: str, ranks: int, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    every = [rank for run in runs for rank in run]
    seconds = [max(rank["seconds"] for rank in run) for run in runs]
    read = max(rank["bytes_read"] for rank in every) / 1e6 if way == "ours" else "mapped"
    return {
        "way": way,
        "ranks": ranks,
        "s": median(seconds),
        "read MB, most": read,
        "partition MB": max(rank["partition"] for rank in every) / 1e6,
        "peak MB, most": max(rank["peak"] for rank in every) / 1e6,
        "seconds": seconds,
    }


if __name__ == "__main__":
    main()
