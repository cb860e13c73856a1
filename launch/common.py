"""What the programs share."""

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

try:
    from abba.errors import AbbaError, CheckpointError, exit_with
except ModuleNotFoundError as error:  # the commonest first mistake
    print(f"environment: {error}; activate the one that was made for it: . .venv/bin/activate", file=sys.stderr)
    sys.exit(64)

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def argument_parser(text: str) -> argparse.ArgumentParser:
    """Shows `text`, a program's docstring, as it is; an option has to be written out."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=text, formatter_class=raw, allow_abbrev=False)


def run_program(work: Callable[[], int | None], prefix: str = "", after_interrupt: str = "") -> int:
    """Do what a program is for; its exit code. What a user can cause ends in one line.

    Args:
        prefix: of that line, of a rank among several.
        after_interrupt: what the user can do then.
    """
    try:
        return work() or 0
    except AbbaError as error:
        return exit_with(error, prefix)
    except PermissionError as error:
        return exit_with(CheckpointError(f"{error.filename}: {error.strerror}; change its permissions"), prefix)
    except KeyboardInterrupt:
        advice = f"; {after_interrupt}" if after_interrupt else ""
        print(f"{prefix}interrupted{advice}", file=sys.stderr, flush=True)
        return 130


def end_with_reader() -> None:
    """Of a program that only prints: end quietly when its reader does, as in `| head`."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def local_path(text: str) -> Path:
    """An argument that is a path; a shell leaves the ~ in --output=~/x as it is."""
    return Path(os.path.expanduser(text))


def name_or_path(text: str) -> str:
    """An argument that is a Hub name or a path."""
    return os.path.expanduser(text) if text.startswith("~/") else text


def count(text: str) -> int:
    """An argument that is a whole number of at least 0."""
    return 0 if text == "0" else positive(text)


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)
