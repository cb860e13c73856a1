"""Extractors and graders against answers that were read by hand: cases.tsv says how it is to be read."""

from fractions import Fraction
from pathlib import Path

import pytest

from abba.evaluation.grading import grade_all
from abba.evaluation.tasks import Question
from abba.text.answers import parse_number
from abba.text.graders import GRADERS

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
