"""launch/train.py several times in one process: what takes longest, the libraries, is imported once.

RANK=0 WORLD_SIZE=2 ... python tests/distributed/several.py RUNS.json      (a list of lists of arguments)
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import torch.distributed
import train as program

import abba.sharded.process_group
import abba.training.loop

step, start = abba.training.loop.optimizer_step, abba.sharded.process_group.start_process_group
devices = []


def started_once(*arguments):
    """DeepSpeed remembers the first group of a process."""
    devices[:] = devices or [start(*arguments)]
    return devices[0]


def watched(engine, *arguments):
    """After a step no rank holds a whole weight of what is sharded."""
    outcome = step(engine, *arguments)
    held = [parameter for parameter in engine.module.parameters() if not parameter.ds_persist]
    assert held and not any(parameter.data.numel() for parameter in held)
    return outcome


abba.training.loop.optimizer_step = watched
abba.sharded.process_group.start_process_group = started_once
torch.distributed.destroy_process_group = lambda: None

if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        sys.argv[1:] = arguments
        code = program.main()
        if code:
            sys.exit(code)
