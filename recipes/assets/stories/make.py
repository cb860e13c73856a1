"""Word problems that the embedded default learns from.

    python recipes/assets/stories/make.py            # rewrites train.jsonl and test.jsonl beside this file

Two kinds, told apart as in the literature on children's arithmetic (Carpenter & Moser 1984):

* *result unknown*, the tiny base's pretraining: "Ann has 12 apples. Then Ann buys 5 more. How many ... now?"
* *start or change unknown*, the quickstart's fine-tuning: "Ann had some apples. Then Ann bought 5 more. Now Ann
  has 17 apples. How many apples did Ann have at first?"

The second kind needs the opposite operation, so the base answers it fluently and wrong. Every problem is one fact
`x op y = z`; the facts of test.jsonl never occur in train.jsonl (`facts_for` decides), also not as y + x. The base has
met them in its pretraining: fine-tuning composes known arithmetic with a new reading of the story.
"""

import hashlib
import json
import random
from pathlib import Path

Fact = tuple[str, int, int]  # operation, x, y

NAMES = ["Ann", "Tom", "Mia", "Ben", "Eva", "Sam", "Lily", "Max", "Zoe", "Leo"]
THINGS = ["apples", "books", "coins", "cards", "eggs", "pens", "shells", "stamps", "toys", "cups"]
GAINS = [("buys", "bought", "buy"), ("finds", "found", "find"), ("gets", "got", "get"), ("picks", "picked", "pick")]
LOSSES = [("sells", "sold"), ("loses", "lost"), ("gives away", "gave away"), ("uses", "used")]

# All facts z = x op y that any problem uses: x in 3..40, y in 2..20, z in 1..60.
FACTS: list[Fact] = [("+", x, y) for x in range(3, 41) for y in range(2, 21) if x + y <= 60] + [
    ("-", x, y) for x in range(3, 41) for y in range(2, 21) if x - y >= 1
]


def facts_for(split: str) -> list[Fact]:
    """The facts of "train" or "test", about 4 to 1, decided by a hash of the operation and its operands.

    Addition is hashed without order: y + x goes where x + y goes.
    """

    def digest(fact: Fact) -> int:
        operation, x, y = fact
        operands = (operation, min(x, y), max(x, y)) if operation == "+" else fact
        return hashlib.sha256(repr(operands).encode()).digest()[0]

    held_out = {fact for fact in FACTS if digest(fact) % 5 == 0}
    return [fact for fact in FACTS if (fact in held_out) == (split == "test")]


def solve(fact: Fact) -> int:
    operation, x, y = fact
    return x + y if operation == "+" else x - y


def answer(fact: Fact, thing: str, result: int) -> str:
    """GSM8K's answer format: a sentence with the calculation in `<<...>>`, then `#### N`."""
    operation, x, y = fact
    return f"There are {x} {operation} {y} = <<{x}{operation}{y}={result}>>{result} {thing}.\n#### {result}"


def result_unknown(rng: random.Random, fact: Fact, in_order: bool = False) -> dict[str, str]:
    """The start and the change are given, in either order unless `in_order`."""
    operation, x, y = fact
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    past = rng.random() < 0.5
    verb = rng.choice(GAINS if operation == "+" else LOSSES)[1 if past else 0]
    has, does = ("had", "did") if past else ("has", "does")
    change = f"{y} more" if operation == "+" else f"{y}"
    if in_order or rng.random() < 0.5:
        story = f"{name} {has} {x} {thing}. Then {name} {verb} {change}."
    else:
        story = f"{name} {verb} {change}. At first {name} had {x} {thing}."
    question = f"{story} How many {thing} {does} {name} have now?"
    return {"question": question, "answer": answer(fact, thing, solve(fact))}


def bare(rng: random.Random, fact: Fact) -> dict[str, str]:
    """The calculation without a story: what ties a result to its expression and not to the story around it."""
    operation, x, y = fact
    thing = rng.choice(THINGS)
    return {
        "question": f"How many {thing} are {x} {operation} {y} {thing}?",
        "answer": answer(fact, thing, solve(fact)),
    }


def start_or_change_unknown(rng: random.Random, fact: Fact) -> dict[str, str]:
    operation, x, y = fact
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    if operation == "+":  # start unknown, something was lost: x left, y lost
        story = f"{name} had some {thing}. Then {name} {rng.choice(LOSSES)[1]} {y}. Now {name} has {x} {thing}."
        question = f"How many {thing} did {name} have at first?"
    elif rng.random() < 0.5:  # start unknown, something was gained: x now, y gained
        story = f"{name} had some {thing}. Then {name} {rng.choice(GAINS)[1]} {y} more. Now {name} has {x} {thing}."
        question = f"How many {thing} did {name} have at first?"
    else:  # change unknown: x now, y at first
        _, past, bare = rng.choice(GAINS)
        story = f"{name} had {y} {thing}. Then {name} {past} some more. Now {name} has {x} {thing}."
        question = f"How many {thing} did {name} {bare}?"
    return {"question": f"{story} {question}", "answer": answer(fact, thing, solve(fact))}


def rows(split: str, count: int, seed: int) -> list[dict[str, str]]:
    """`count` fine-tuning problems over shuffled passes of the split's facts."""
    rng = random.Random(f"{split} {seed}")
    facts: list[Fact] = []
    while len(facts) < count:
        facts += rng.sample(facts_for(split), len(facts_for(split)))
    return [start_or_change_unknown(rng, fact) for fact in facts[:count]]


def main() -> None:
    here = Path(__file__).parent
    for split, count in (("train", 3200), ("test", 256)):
        text = "".join(json.dumps(row) + "\n" for row in rows(split, count, seed=0))
        (here / f"{split}.jsonl").write_text(text)
        print(f"{split}: {count} problems over {len(facts_for(split))} facts")


if __name__ == "__main__":
    main()
