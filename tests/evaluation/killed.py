"""launch/evaluate.py, killed at a row: tests/evaluation/killed.py ROW POINT --model ... as a program of its own.

POINT: before, half or after the ROW-th line that this process writes; grade: when it grades the ROW-th row; between:
when generations.jsonl is written and scores.json is not.
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

import evaluate as program

import abba.evaluation.grading
import abba.evaluation.result
from abba.evaluation.kept import Kept

row, point = int(sys.argv.pop(1)), sys.argv.pop(1)
add, grade, done = Kept.add, abba.evaluation.grading._grade, []


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dying_add(self, index, text):
    done.append(index)
    last = len(done) == row
    if last and point == "before":
        die()
    if last and point == "half":
        with self._own.open("ab") as file:
            file.write(json.dumps({"row": index, "generated": text}).encode()[:9])
        die()
    add(self, index, text)
    if last and point == "after":
        die()


def dying_grade(*arguments):
    done.append(arguments)
    if len(done) == row:
        die()
    return grade(*arguments)


if point == "grade":
    abba.evaluation.grading._grade = dying_grade
elif point == "between":
    abba.evaluation.result.write_json = lambda *_: die()
else:
    Kept.add = dying_add

if __name__ == "__main__":
    sys.exit(program.main())
