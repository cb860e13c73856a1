"""launch/train.py on ranks of which rank 3 finds another number in its node's copy than it has written there."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import train as program

import abba.sharded.loading
import abba.training.model

load = abba.sharded.loading.load_base
leave = abba.sharded.loading.BaseFiles.__exit__


def load_into_faulty_memory(model, *arguments):
    def leave_and_flip(self, *error):
        leave(self, *error)
        if os.environ["RANK"] == "3":
            next(model.parameters()).ds_secondary_tensor[5] += 1

    abba.sharded.loading.BaseFiles.__exit__ = leave_and_flip
    return load(model, *arguments)


abba.training.model.load_base = load_into_faulty_memory
sys.exit(program.main())
