"""Word problems for benchmarks/compare.py, from a seed: the embedded stories, and a harder kind.

* *stories*: start or change unknown, as the quickstart learns it (recipes/assets/stories/make.py);
* *bystander*: the same with a sentence about somebody else in it, at any place: "Ann had some apples. Tom had 8 apples.
  Then Ann bought 5 more. ..." One has to tell whose number is whose.

The facts (`x op y`) are divided into "train", "validation" and "test"; y + x goes where x + y goes. The base has met
all of them in its pretraining.
"""

import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[1] / "recipes/assets"
sys.path.insert(0, str(ASSETS / "stories"))

import make as stories  # noqa: E402
from make import Fact  # noqa: E402

PARTS = ("train", "validation", "test")
ANSWER_TOKENS = 40  # an answer has at most 31
Row = dict[str, str]


def operands(fact: Fact) -> Fact:
    """What makes two facts the same: addition has no order."""
    operation, x, y = fact
    return (operation, min(x, y), max(x, y)) if operation == "+" else fact


@cache
def facts_of(part: str) -> list[Fact]:
    """The embedded test facts, and those of the embedded training rows, of which a fifth is for validation."""
    if part == "test":
        return stories.facts_for("test")
    facts = stories.facts_for("train")
    different = sorted(set(map(operands, facts)))
    held_out = set(random.Random(0).sample(different, len(different) // 5))
    return [fact for fact in facts if (operands(fact) in held_out) == (part == "validation")]


def problems(task: str, part: str, count: int, seed: int = 0) -> list[Row]:
    """`count` problems over shuffled passes of the part's facts."""
    rng = random.Random(f"{task} {part} {seed}")
    facts: list[Fact] = []
    while len(facts) < count:
        facts += rng.sample(facts_of(part), len(facts_of(part)))
    return [TASKS[task](rng, fact) for fact in facts[:count]]


def with_bystander(rng: random.Random, fact: Fact) -> Row:
    row = stories.start_or_change_unknown(rng, fact)
    sentences = row["question"].split(". ")
    name, thing = sentences[0].split()[0], sentences[-1].removeprefix("How many ").split()[0]
    other = rng.choice([other for other in stories.NAMES if other != name])
    sentences.insert(rng.randrange(len(sentences)), f"{other} had {rng.randint(2, 40)} {thing}")
    return {**row, "question": ". ".join(sentences)}


TASKS: dict[str, Callable[[random.Random, Fact], Row]] = {
    "stories": stories.start_or_change_unknown,
    "bystander": with_bystander,
}
