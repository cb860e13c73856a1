"""launch/train.py on ranks of which only the first has a processor with instructions for bfloat16."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import train as program

import abba.base_model

if __name__ == "__main__":
    abba.base_model._has_fast_bfloat16 = lambda: os.environ["RANK"] == "0"
    sys.exit(program.main())
