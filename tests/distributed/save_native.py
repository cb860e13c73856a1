"""launch/train.py after which DeepSpeed saves the engine itself, into the directory of the first argument."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import train as program

import abba.training.loop

directory = sys.argv.pop(1)
train = abba.training.loop.train


def trained(engine, *arguments, **named):
    train(engine, *arguments, **named)
    engine.save_checkpoint(directory, exclude_frozen_parameters="without" in directory)


abba.training.loop.train = trained
if __name__ == "__main__":
    sys.exit(program.main())
