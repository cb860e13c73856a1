"""How the answers to each task are extracted and compared. Strict: as it was trained to say it; flexible: anywhere."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from abba.text.answers import extract_answer, extract_any_number, parse_number, same_number, the_number
from abba.text.choices import OPTIONS, extract_any_choice, extract_choice
from abba.text.expressions import extract_any_expression, extract_expression, reference_expression, same_expression
from abba.text.prompt import response_of

COMMONSENSE = tuple(OPTIONS)
HARNESS = "lm-eval:"  # before the name of a task that lm-evaluation-harness grades


@dataclass(frozen=True)
class Grader:
    """Extraction from a text, None where it has no answer, and whether two extracted answers are the same.

    isolated: comparing may take forever, and belongs into a process that can be ended.
    """

    strict: Callable[[str], str | None]
    flexible: Callable[[str], str | None]
    same: Callable[[str, str], bool]
    isolated: bool = False

    def extract(self, generated: str) -> tuple[str | None, str | None]:
        """(strict, flexible) of a generated text; where there is a strict answer both are it."""
        text = response_of(generated)
        return self.strict(text), self.flexible(text)


def _of_choices(options: tuple[str, ...]) -> Grader:
    extractors = (partial(extract, options=options) for extract in (extract_choice, extract_any_choice))
    return Grader(*extractors, str.__eq__)


GRADERS = {
    "gsm8k": Grader(extract_answer, extract_any_number, same_number),
    "math": Grader(extract_expression, extract_any_expression, same_expression, isolated=True),
    **{name: _of_choices(options) for name, options in OPTIONS.items()},
}
SUITES = (*GRADERS, "commonsense")


def members(task: str) -> tuple[str, ...]:
    """The tasks that a name stands for: itself, the eight of commonsense, or some of them joined by commas; or none."""
    if task == "commonsense":
        return COMMONSENSE
    names = tuple(task.split(","))
    known = GRADERS if len(names) == 1 else COMMONSENSE
    return names if all(name in known for name in names) and len(set(names)) == len(names) else ()


def reference_answer(task: str, reference: str) -> str | None:
    """The answer of a reference solution; None when it has none that could be compared."""
    if task == "gsm8k":
        answer = extract_answer(reference) or the_number(reference)
        return answer if parse_number(answer) is not None else None
    if task == "math":
        return reference_expression(reference)
    return GRADERS[task].strict(reference)
