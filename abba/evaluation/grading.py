"""Which answers are right. A grader that crashes or does not come to an end is never a wrong answer in silence."""

import logging
import math
import multiprocessing
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from abba.errors import DataError, first_line
from abba.evaluation.tasks import Question
from abba.text.graders import GRADERS

SECONDS, MEMORY = 30, 4 << 30  # for one comparison, in a process of its own
MOST_NAMED = 20  # undecided rows beyond those that may be, after which no more are looked for
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Grade:
    """What was extracted from a generation, and whether it is the reference's answer. undecided: why nobody knows."""

    strict: str | None
    flexible: str | None
    strict_right: bool
    flexible_right: bool
    undecided: str | None = None


class UndecidedError(Exception):
    """A comparison that ended without yes or no."""


def grade_all(questions: list[Question], generated: list[str], max_ungraded: int) -> list[Grade]:
    """The grade of each question.

    Args:
        max_ungraded: how many generations may stay undecided; they count as wrong and say so.

    Raises:
        DataError: more are undecided; says how many, at least, and names the first.
    """
    grades: list[Grade] = []
    undecided: list[int] = []
    with _isolated() as isolated:
        for question, text in zip(questions, generated, strict=True):
            grades.append(_grade(question, text, isolated))
            if grades[-1].undecided is not None:
                undecided.append(len(grades) - 1)
                if len(undecided) == max_ungraded + MOST_NAMED:  # each may have taken SECONDS
                    break
    if len(undecided) > max_ungraded:
        question, grade = questions[undecided[0]], grades[undecided[0]]
        raise DataError(
            f"{question.task}: {len(undecided)} of {len(grades)} rows cannot be graded, row {question.row + 1} first: "
            f"{grade.undecided}, comparing {str(grade.flexible)[:100]!r} with {question.answer[:100]!r}; all "
            f"generations are kept; --max-ungraded {len(undecided)} (evaluate.max_ungraded) counts such rows as wrong"
        )
    return grades


def wilson(right: int, n: int) -> list[float]:
    """The 95% score interval of a share, in percent. Source: Wilson (1927); never leaves 0..100."""
    share, z2 = right / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    # Exact at the ends, where rounding would leave 1e-15.
    low, high = (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)
    return [100 * low, 100 * high]


def _grade(question: Question, text: str, isolated: "_Process") -> Grade:
    grader = GRADERS[question.task]
    try:
        strict, flexible = grader.extract(text)
        rights: dict[str | None, bool] = {None: False}
        for extracted in (strict, flexible):
            if extracted not in rights:
                same = isolated.same if grader.isolated else grader.same
                rights[extracted] = same(extracted, question.answer)
    except UndecidedError as reason:
        return Grade(strict, flexible, False, False, str(reason))
    except Exception as error:  # a bug of ours
        raise RuntimeError(f"{question.task}: the grader failed on row {question.row + 1}") from error
    return Grade(strict, flexible, rights[strict], rights[flexible])


@contextmanager
def _isolated() -> Iterator["_Process"]:
    process = _Process(SECONDS)
    try:
        yield process
    finally:
        process.end()


class _Process:
    """Compares expressions in a child: sympy catches what a time limit inside its own process raises."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds
        self._child: Any = None
        self._pipe: Connection | None = None

    def same(self, extracted: str, reference: str) -> bool:
        """Raises UndecidedError when the comparison fails, or takes too long or too much memory."""
        if self._child is None:
            self._start()
        try:
            self._pipe.send((extracted, reference))
            right, failure = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise UndecidedError(self._how_it_ended()) from None
        if failure is not None:
            raise UndecidedError(f"math-verify: {failure}")
        return right

    def end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.join()
            self._pipe.close()
            self._child = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")  # a fork would take this process's GPU memory along
        self._pipe, theirs = context.Pipe()
        self._child = context.Process(target=_compare, args=(theirs, self.seconds), daemon=True)
        self._child.start()
        theirs.close()

    def _how_it_ended(self) -> str:
        self._child.join()
        code = self._child.exitcode
        self.end()
        late = f"takes more than {self.seconds} s"
        return f"math-verify {late if code == -signal.SIGALRM else f'ended with {code}'}"


def _compare(pipe: Connection, seconds: int) -> None:
    """The child: pairs come in, (right, what failed) goes out, until the other end is closed; `seconds` for each."""
    with suppress(Exception):  # which each comparison will say
        import math_verify  # noqa: F401  # its seconds are none of the first comparison's

    from abba.text.expressions import same_expression

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limit is off
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends the process whatever it is doing
    while True:
        try:
            pair = pipe.recv()
        except EOFError:
            return
        signal.alarm(seconds)
        try:
            answer = (same_expression(*pair), None)
        except Exception as error:
            answer = (False, f"{type(error).__name__}: {first_line(error)}"[:200])
        signal.alarm(0)
        pipe.send(answer)
