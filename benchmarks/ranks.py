"""Ranks of a benchmark: its own program, started once per rank as a launcher does, each writing what it found."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_ranks(program: str, arguments: list[str], ranks: int) -> list[dict[str, Any]]:
    """Run `program --rank-of ARGUMENTS... RESULT` on every rank; returns each rank's result.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as probe, tempfile.TemporaryDirectory() as scratch:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        results = [Path(scratch) / f"{rank}.json" for rank in range(ranks)]
        common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
        started = [
            subprocess.Popen(
                [sys.executable, program, "--rank-of", *arguments, str(result)],
                env={**os.environ, **common, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank, result in enumerate(results)
        ]
        if any([process.wait() for process in started]):
            raise SystemExit(f"{program}: a rank of {' '.join(arguments)} failed; see above")
        return [json.loads(result.read_text()) for result in results]
