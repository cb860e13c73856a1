"""The errors a user can meet. Each class carries the exit code that a launcher or a batch script sees.

A message is one line: the value, the limit, the way out. Our own mistakes stay plain exceptions with a traceback.
"""

import sys

MAX_LINE = 2000  # of a message


class AbbaError(Exception):
    """Something the user, the cluster or the data did; shown as one line, without a traceback."""

    exit_code = 1
    subject = "abba"

    @property
    def reason(self) -> str:
        """The message without its subject."""
        return super().__str__()

    def __str__(self) -> str:
        return _printable(f"{self.subject}: {self.reason}")


class RecipeError(AbbaError):
    """The recipe or an override cannot be used as written."""

    exit_code = 64
    subject = "recipe"


class ArgumentError(RecipeError):
    """An argument of a program cannot be used as written; the user has no recipe at hand."""

    subject = "argument"


class DataError(AbbaError):
    """A dataset is missing, unreadable, or has rows that cannot be trained on."""

    exit_code = 65
    subject = "data"


class CheckpointError(AbbaError):
    """A base model, a training checkpoint or an adapter is missing, damaged or does not fit; or cannot be written."""

    exit_code = 66
    subject = "checkpoint"


class NotFiniteError(AbbaError):
    """A loss or a gradient was NaN or infinite; nothing was updated with it."""

    exit_code = 70
    subject = "not finite"


class RankLostError(AbbaError):
    """A rank died, hung, or the world is not the one the launcher promised."""

    exit_code = 71
    subject = "rank lost"


class PreemptedError(AbbaError):
    """The job was asked to stop and has saved; start it again to continue."""

    exit_code = 75
    subject = "preempted"


class NoProgressError(AbbaError):
    """Several starts in a row ended before a new checkpoint was written."""

    exit_code = 76
    subject = "no progress"


def _printable(text: str) -> str:
    """What a file said may be in a message: what would move a terminal's cursor is escaped, what is endless is cut."""
    lines = (line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]}..." for line in text.split("\n"))
    shown = "\n".join(lines)
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in shown)


def first_line(error: BaseException) -> str:
    """What an error of a library says, shortened to a line; its class where it says nothing."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def exit_with(error: AbbaError, prefix: str = "") -> int:
    """Print an error as one line on stderr and return its exit code."""
    print(f"{prefix}{error}", file=sys.stderr, flush=True)
    return error.exit_code
