"""Extractors and graders against answers that were read by hand: cases.tsv says how it is to be read."""

import time
from fractions import Fraction
from pathlib import Path

import pytest

from abba.evaluation.grading import grade_all
from abba.evaluation.tasks import Question
from abba.text.answers import parse_number
from abba.text.graders import GRADERS, reference_answer

LINES = (Path(__file__).parent / "cases.tsv").read_text(encoding="utf-8").split("\n")
CASES = [line.split("\t") for line in LINES if line and not line.startswith("#")]
RIGHT = {"both": (True, True), "flexible": (False, True), "neither": (False, False)}


def shown(text: str) -> str | None:
    return None if text == "∅" else text.replace("⏎", "\n")


def test_there_are_as_many_as_were_promised():
    assert len(CASES) >= 300 and len({tuple(case) for case in CASES}) == len(CASES)
    assert {case[0] for case in CASES} == set(GRADERS)


@pytest.mark.parametrize("task", GRADERS)
def test_what_is_extracted(task):
    wrong = []
    for _, _, _, strict, flexible, text in (case for case in CASES if case[0] == task):
        got = GRADERS[task].extract(shown(text))
        expected = (shown(strict), shown(flexible))
        if task == "gsm8k":  # as values: what counts is the number and not how it is written
            got = tuple(None if value is None else parse_number(value) for value in got)
            expected = tuple(None if value is None else Fraction(value.replace(",", "")) for value in expected)
        if got != expected:
            wrong.append((text, expected, got))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("task", GRADERS)
def test_which_answers_are_right(task):
    if task == "math":
        pytest.importorskip("math_verify", reason="math-verify is not installed; the extra eval brings it")
    cases = [case for case in CASES if case[0] == task]
    questions = [Question(task, row, "", "", gold) for row, (_, _, gold, *_) in enumerate(cases)]
    grades = grade_all(questions, [shown(case[5]) for case in cases], max_ungraded=0)
    wrong = [
        (case, grade)
        for case, grade in zip(cases, grades, strict=True)
        if (grade.strict_right, grade.flexible_right) != RIGHT[case[1]]
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("task", GRADERS)
@pytest.mark.parametrize("between", ["\n", " ", " \n", "\n* "])
def test_a_model_that_ends_in_blanks_is_read_at_once(task, between):
    """Patterns that try each split of the blanks took minutes for these."""
    text = f"The correct answer is{between * 20_000}"
    started = time.process_time()
    GRADERS[task].extract(text)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "task, reference, answer",
    [
        ("gsm8k", "She has 3 and buys 4.\n#### 7", "7"),
        ("gsm8k", "7", "7"),
        ("gsm8k", "$1,200", "$1,200"),
        ("gsm8k", "7 apples", "7"),
        ("gsm8k", "She has 3 apples and buys 4, so she has 7.", None),
        ("gsm8k", "x = - 5", "- 5"),
        ("gsm8k", "10 - 3", None),
        ("gsm8k", "seven", None),
        ("math", r"The answer is right, $\boxed{5}$. The answer is: 6", "5"),
        ("math", "The answer is: 6", "6"),
        ("math", "6", None),
    ],
)
def test_the_answer_of_a_reference_is_what_it_marks_or_all_that_it_can_be(task, reference, answer):
    assert reference_answer(task, reference) == answer
