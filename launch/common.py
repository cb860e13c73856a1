"""What the programs share."""

import argparse
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def count(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
