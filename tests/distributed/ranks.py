"""Start real ranks over gloo, each a process of its own, as a launcher does."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests import warm
from tests.warm import ROOT

TINY = ROOT / "recipes" / "assets" / "tiny-llama"
STORIES = ROOT / "recipes" / "assets" / "stories"

# With DeepSpeed's default thresholds a tiny model is resident as a whole and nothing is sharded.
NOTHING_STAYS = [
    "deepspeed.zero_optimization.stage3_max_live_parameters=0",
    "deepspeed.zero_optimization.stage3_max_reuse_distance=0",
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size=0",
]


def environment(**changes: str) -> dict[str, str]:
    """For a launcher's own process: the parent's, without another launcher's variables."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(warm.LAUNCHERS)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**inherited, "PATH": path, **changes}


def deepspeed(*command: str) -> subprocess.CompletedProcess:
    """Run a program on two ranks under the real `deepspeed` launcher."""
    return subprocess.run(
        ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *command],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200,
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def probe(world_size: int, directory: Path, arguments: list[str], nodes: int = 1) -> list[dict]:
    """Run tests/distributed/probe.py on every rank; returns each rank's findings."""
    results = [directory / f"rank-{rank}.json" for rank in range(world_size)]
    commands = [["tests/distributed/probe.py", str(result), *arguments] for result in results]
    for rank, finished in enumerate(run_ranks(directory, commands, nodes)):
        assert finished.returncode == 0, f"rank {rank}:\n{finished.stderr[-5000:]}"
    return [json.loads(result.read_text()) for result in results]


def run_ranks(directory: Path, commands: list[list[str]], nodes: int = 1) -> list[warm.Finished]:
    """Run one command per rank, connected as a launcher connects them; on `nodes` nodes, as their variables say."""
    on_node = len(commands) // nodes
    common = {"WORLD_SIZE": str(len(commands)), "LOCAL_WORLD_SIZE": str(on_node)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    programs = [
        warm.Program(
            directory / f"rank-{rank}", command, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank % on_node)}
        )
        for rank, command in enumerate(commands)
    ]
    try:
        return [program.wait() for program in programs]
    finally:
        for program in programs:
            program.kill()


def read_metrics(run: Path) -> list[dict]:
    """One record per step: its own line, with what the lines of its evaluation and its save add."""
    records: dict[int, dict] = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        records.setdefault(line["step"], {}).update(line)
    return list(records.values())
