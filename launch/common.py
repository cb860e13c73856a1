"""What the programs share."""

import argparse
import signal
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def argument_parser(text: str) -> argparse.ArgumentParser:
    """Shows `text`, a program's docstring, as it is; an option has to be written out."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=raw, allow_abbrev=False)


def end_with_reader() -> None:
    """Of a program that only prints: end quietly when its reader does, as in `| head`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def count(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
