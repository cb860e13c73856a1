"""launch/train.py in which a rank, or each, is slow: python tests/distributed/slow.py WHERE RANK SECONDS ...

WHERE: data, or forward, where each linear layer takes so much longer. RANK: all, or its number.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import train as program

import abba.adapter.linear
import abba.training.loop

where, rank, seconds = (sys.argv.pop(1) for _ in range(3))


def delayed(owner, name):
    function = getattr(owner, name)

    def slow(*arguments, **named):
        time.sleep(float(seconds))
        return function(*arguments, **named)

    setattr(owner, name, slow)


if __name__ == "__main__":
    if rank in ("all", os.environ["RANK"]):
        if where == "data":
            delayed(abba.training.loop.Stream, "micro_batches")
        else:
            delayed(abba.adapter.linear.AbbaLinear, "forward")
    sys.exit(program.main())
