"""Word problems for benchmarks/compare.py, from a seed: the embedded stories, and a longer kind that needs two steps.

* *one step*: start or change unknown, as the quickstart learns it (recipes/assets/stories/make.py);
* *two steps*: "Ann had some apples. Then Ann bought 5 more. Then Ann lost 3. Now Ann has 17 apples. How many ... at
  first?", whose answer undoes the last change and then the one before it.

The facts (`x op y`) are divided into "train", "validation" and "test"; a problem of a part is made of that part's facts
alone, in both of its steps, and y + x goes where x + y goes. The base has met all of them in its pretraining.
"""

import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

ASSETS = Path(__file__).resolve().parents[1] / "recipes/assets"
sys.path.insert(0, str(ASSETS / "stories"))

import make as stories  # noqa: E402
from make import Fact  # noqa: E402

PARTS = ("train", "validation", "test")
Chain = tuple[Fact, ...]  # the facts of an answer in its order, each of which starts from the result before
Row = dict[str, str]


class Task(NamedTuple):
    steps: int
    tell: Callable[[random.Random, Chain], Row]
    answer_tokens: int  # at most


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


@cache
def chains_of(part: str, steps: int) -> list[Chain]:
    if steps == 1:
        return [(fact,) for fact in facts_of(part)]
    return [
        (*chain, fact)
        for chain in chains_of(part, steps - 1)
        for fact in facts_of(part)
        if fact[1] == stories.solve(chain[-1])
    ]


def problems(task: str, part: str, count: int, seed: int = 0) -> list[Row]:
    """`count` problems over shuffled passes of all chains of the part."""
    rng = random.Random(f"{task} {part} {seed}")
    steps, tell, _ = TASKS[task]
    chains: list[Chain] = []
    while len(chains) < count:
        chains += rng.sample(chains_of(part, steps), len(chains_of(part, steps)))
    return [tell(rng, chain) for chain in chains[:count]]


def _one_step(rng: random.Random, chain: Chain) -> Row:
    return stories.start_or_change_unknown(rng, *chain)


def _start_unknown(rng: random.Random, chain: Chain) -> Row:
    name, thing = rng.choice(stories.NAMES), rng.choice(stories.THINGS)
    changes = [f"Then {name} {_undone_by(rng, fact)}." for fact in reversed(chain)]
    story = f"{name} had some {thing}. {' '.join(changes)} Now {name} has {chain[0][1]} {thing}."
    lines = [stories.answer(fact, thing, stories.solve(fact)).split("\n") for fact in chain]
    said = " ".join(sentence for sentence, _ in lines)
    return {
        "question": f"{story} How many {thing} did {name} have at first?",
        "answer": f"{said}\n{lines[-1][1]}",
    }


def _undone_by(rng: random.Random, fact: Fact) -> str:
    operation, _, y = fact
    return f"{rng.choice(stories.LOSSES)[1]} {y}" if operation == "+" else f"{rng.choice(stories.GAINS)[1]} {y} more"


TASKS = {"one step": Task(1, _one_step, 40), "two steps": Task(2, _start_unknown, 64)}
