#!/usr/bin/env python
"""Getting a base model into ZeRO-3: every rank its own slices (ours), against transformers' from_pretrained.

    python benchmarks/load.py
    python benchmarks/load.py --ranks 2 --layers 4 --repetitions 1 --output runs/load

Makes a random Llama in several files, then starts ranks anew for each measurement, the two ways in turns. Timed is from
the moment when all ranks have met, to the moment when the last one has its part of the model.
"""

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import RESULTS, write
from ranks import run_ranks

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
    from counting import count_reads
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from abba.sharded.engine import engine_config
    from abba.sharded.process_group import start_process_group
    from abba.sharded.ranks import ranks_from_environment
    from abba.training.model import load_partitioned
    from abba.training.startup import Startup

    ranks = ranks_from_environment()
    start_process_group(ranks)
    config = engine_config(torch.bfloat16, 1, 1, 1.0, {}, ranks)
    read = count_reads()  # ours; what the library maps cannot be counted so
    dist.barrier()
    peak, started = AnonymousPeak(), time.perf_counter()
    peak.start()
    if way == "ours":
        model, _ = load_partitioned(directory, torch.bfloat16, "sdpa", config, ranks, Startup(), lambda _: None)
    else:
        keep = HfDeepSpeedConfig(config)  # alive, or ZeRO-3 is not noticed
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
        )
        del keep
    dist.barrier()
    seconds, partition = time.perf_counter() - started, sum(p.ds_tensor.nbytes for p in model.parameters())
    found = {"seconds": seconds, "peak": peak.end(), "partition": partition, "bytes_read": read.total()}
    found["checksum"] = sum(int(p.ds_tensor.view(torch.int16).sum(dtype=torch.int64)) for p in model.parameters())
    result.write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=16, help="16.8 million parameters each, and 66 million besides")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank-of", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        way, directory, result = arguments.rank_of
        return load_on_this_rank(way, Path(directory), Path(result))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        parameters = make_model(Path(scratch), arguments.layers)
        files = sorted(Path(scratch).glob("*.safetensors"))
        stored = sum(file.stat().st_size for file in files)
        for ranks in arguments.ranks:
            found: dict[str, list] = {way: [] for way in WAYS}
            for _ in range(arguments.repetitions):
                for way in WAYS:
                    found[way].append(run_ranks(__file__, [way, scratch], ranks))
            sums = {sum(rank["checksum"] for rank in run) for runs in found.values() for run in runs}
            assert len(sums) == 1, "the two ways loaded different weights"
            rows += [row(way, ranks, found[way], stored) for way in WAYS]
            rows[-2]["times from_pretrained"] = rows[-2]["s"] / rows[-1]["s"]
    settings = {"parameters": parameters, "files": len(files), "bytes": stored}
    write("load", " ".join(["python", *sys.argv]), settings, rows, arguments.output)
    return None


def row(way: str, ranks: int, runs: list[list[dict[str, Any]]], stored: int) -> dict[str, Any]:
    """`runs`: what every rank found, for each repetition; `stored`: bytes of the files."""
    every = [rank for run in runs for rank in run]
    seconds = [max(rank["seconds"] for rank in run) for run in runs]
    read = max(rank["bytes_read"] for rank in every)
    return {
        "way": way,
        "ranks": ranks,
        "s": median(seconds),
        "read MB, most": read / 1e6 if way == "ours" else "mapped",
        "read, of all": read / stored if way == "ours" else "",
        "partition MB": max(rank["partition"] for rank in every) / 1e6,
        "peak MB, most": max(rank["peak"] for rank in every) / 1e6,
        "peak beyond partition, MiB": max(rank["peak"] - rank["partition"] for rank in every) / 2**20,
        "seconds": seconds,
        "found": runs,
    }


if __name__ == "__main__":
    main()
