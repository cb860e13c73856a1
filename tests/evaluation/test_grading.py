"""A grader that crashes, hangs or dies names the row; it never makes a wrong answer of it."""

import dataclasses
import multiprocessing
import time

import pytest

import abba.evaluation.grading as grading
from abba.errors import DataError, RecipeError
from abba.evaluation.grading import grade_all
from abba.evaluation.tasks import Question, load_questions
from abba.text.graders import GRADERS
from tests.test_requirements import requirements

FINE, BAD = r"\boxed{0.5}", r"\boxed{9^{9^{9^9}}}"


def questions(task, count):
    return [Question(task, row, "", "", r"\frac{1}{2}") for row in range(count)]


@pytest.fixture
def comparing(monkeypatch):
    """Put a function that is importable by the child in the place of math-verify's."""

    def put(name):
        monkeypatch.setattr(grading, "_compare", globals()[name])

    return put


def child_that_dies(pipe, seconds):
    pipe.recv()


def child_that_fails(pipe, seconds):
    while True:
        extracted, _ = pipe.recv()
        pipe.send((False, "TypeError: no order") if "9" in extracted else (True, None))


def test_a_bug_in_a_grader_ends_the_evaluation_with_the_row(monkeypatch):
    def fails(extracted, reference):
        raise ZeroDivisionError("a bug")

    monkeypatch.setitem(GRADERS, "gsm8k", dataclasses.replace(GRADERS["gsm8k"], same=fails))
    asked = [Question("gsm8k", row, "", "", "3") for row in range(2)]
    with pytest.raises(RuntimeError, match="gsm8k: the grader failed on row 2"):
        grade_all(asked, ["nothing to compare", "#### 3"], max_ungraded=9)


def test_what_fails_names_the_row_and_can_be_counted_as_wrong_by_name(comparing):
    comparing("child_that_fails")
    asked, texts = questions("math", 4), [FINE, BAD, FINE, BAD]
    with pytest.raises(
        DataError, match="math: 2 of 4 rows cannot be graded, row 2 first: math-verify: TypeError: no order"
    ) as error:
        grade_all(asked, texts, max_ungraded=0)
    assert "--max-ungraded 2" in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 65
    grades = grade_all(asked, texts, max_ungraded=2)
    assert [grade.strict_right for grade in grades] == [True, False, True, False]
    assert [bool(grade.undecided) for grade in grades] == [False, True, False, True]


def test_when_nothing_can_be_graded_not_all_rows_are_tried(comparing):
    comparing("child_that_fails")
    with pytest.raises(DataError, match="math: 21 of 21 rows cannot be graded"):
        grade_all(questions("math", 500), [BAD] * 500, max_ungraded=1)


def test_a_library_that_cannot_be_imported_is_a_line(monkeypatch, tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    spawn = multiprocessing.get_context("spawn")  # the server of forks has its own path
    monkeypatch.setattr(grading.multiprocessing, "get_context", lambda _: spawn)
    with pytest.raises(DataError, match="row 1 first: math-verify: ImportError: broken"):
        grade_all(questions("math", 1), [FINE], max_ungraded=0)


def test_a_process_that_dies_is_named(comparing):
    comparing("child_that_dies")
    with pytest.raises(DataError, match="1 of 1 rows cannot be graded, row 1 first: math-verify ended with 0"):
        grade_all(questions("math", 1), [FINE], max_ungraded=0)


def test_a_comparison_without_end_is_ended_and_the_next_row_is_graded(monkeypatch):
    """math-verify's own limit would call it wrong: its comparison catches the exception that the limit raises."""
    pytest.importorskip("math_verify", reason="math-verify is not installed; the extra eval brings it")
    monkeypatch.setattr(grading, "SECONDS", 8)
    started = time.monotonic()
    bad, fine = grade_all(questions("math", 2), [BAD, FINE], max_ungraded=1)
    assert bad.undecided.startswith("math-verify") and not bad.strict_right
    assert fine.strict_right and fine.undecided is None
    assert time.monotonic() - started < 200


def test_without_math_verify_a_line_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("abba.text.expressions.importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="answers are compared by math-verify; pip install '") as error:
        load_questions("math", str(tmp_path / "math.jsonl"), None)
    assert error.value.reason.split("'")[1] in requirements("eval")
