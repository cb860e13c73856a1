"""launch/train.py in which step 3 meets a NaN: in rank 1's loss, or in its gradient alone."""

import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import torch
import train as program

import abba.training.loop
from abba.sharded.engine import local_masters

step_function = abba.training.loop.optimizer_step
kind = sys.argv.pop(1)


class NanGradient(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * float("nan")


def poisoned(forward):
    def poisoned_forward(*batch):
        loss = forward(*batch)
        return loss * float("nan") if kind == "loss" else NanGradient.apply(loss)

    return poisoned_forward


def print_masters(engine):
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for _, value in local_masters(engine)))
    print("masters", digest.hexdigest(), flush=True)


def watched(engine, stream, step, *arguments):
    if step != 2:
        return step_function(engine, stream, step, *arguments)
    print_masters(engine)
    if stream.ranks.rank == 1:
        engine.module.forward = poisoned(engine.module.forward)
    try:
        return step_function(engine, stream, step, *arguments)
    finally:
        print_masters(engine)


abba.training.loop.optimizer_step = watched
if __name__ == "__main__":
    sys.exit(program.main())
