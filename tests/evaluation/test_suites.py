"""Tasks end to end: gold answers score 100, shuffled ones chance, the tiny base runs; on real rows where they are."""

import json
import random
from collections import Counter

import pytest

from abba.errors import CheckpointError, DataError, RecipeError
from abba.evaluation.grading import wilson
from abba.evaluation.tasks import load_questions
from abba.text.graders import COMMONSENSE
from abba.text.prompt import render_prompt
from tests import warm
from tests.distributed.ranks import STORIES, TINY
from tests.evaluation.made import answering, commonsense, scored
from tests.warm import ROOT

DATA = ROOT.parent / "shared" / "data"
real = pytest.mark.skipif(not (DATA / "gsm8k").is_dir(), reason=f"needs real rows of GSM8K and commonsense in {DATA}")
# Task, file, rows: the first half of GSM8K's test set, two of the eight whole, and one by its training rows.
REAL = [
    ("gsm8k", "gsm8k/test.jsonl", 660),
    ("boolq,ARC-Challenge", "commonsense", 3270 + 1172),
    ("openbookqa", "commonsense/openbookqa/train.json", 4957),
]


def gold(task, data):
    return [question.reference for question in load_questions(task, str(data), None)]


def test_gold_answers_score_100_in_every_task_and_on_average(tmp_path, monkeypatch):
    data = commonsense(tmp_path / "data")
    answering(monkeypatch, gold("commonsense", data))
    scores = scored("commonsense", data, tmp_path / "out")
    assert scores["exact_match"] == scores["flexible_match"] == 100.0 and scores["n"] == 32
    assert tuple(scores["tasks"]) == COMMONSENSE
    assert all(score["exact_match"] == 100.0 and score["n"] == 4 for score in scores["tasks"].values())


def test_the_average_is_of_tasks_and_not_of_rows(tmp_path, monkeypatch):
    data = commonsense(tmp_path / "data")
    answering(monkeypatch, [*gold("boolq", data), *["the correct answer is answer1"] * 4])
    scores = scored("boolq,ARC-Challenge", data, tmp_path / "out")
    assert [score["exact_match"] for score in scores["tasks"].values()] == [100.0, 25.0]
    assert scores["exact_match"] == 62.5
    low, high = scores["exact_match_95"]
    lows = [score["exact_match_95"][0] for score in scores["tasks"].values()]
    assert low == pytest.approx(62.5 - ((100 - lows[0]) ** 2 + (25 - lows[1]) ** 2) ** 0.5 / 2) and low < 62.5 < high


def test_strict_and_flexible_are_told_apart_and_rows_keep_their_order(tmp_path, monkeypatch):
    rows = [json.loads(line) for line in (STORIES / "test.jsonl").read_text().splitlines()[:3]]
    answers = [row["answer"].split("#### ")[1] for row in rows]
    answering(monkeypatch, [f"#### {answers[0]}", f"it is {answers[1]}", "I do not know"])
    scores = scored("gsm8k", STORIES / "test.jsonl", tmp_path / "out", limit=3, batch_size=1)
    assert scores["exact_match"] == pytest.approx(100 / 3) and scores["flexible_match"] == pytest.approx(200 / 3)
    lines = [json.loads(line) for line in (tmp_path / "out/generations.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines] == [0, 1, 2]
    assert [line["correct"] for line in lines] == [True, False, False]
    assert [line["flexible_correct"] for line in lines] == [True, True, False]
    assert [line["instruction"] for line in lines] == [row["question"] for row in rows]


def test_math_is_scored_with_equal_expressions(tmp_path, monkeypatch):
    pytest.importorskip("math_verify", reason="math-verify is not installed; the extra eval brings it")
    rows = [
        {"problem": "Half?", "solution": r"It is $\boxed{\frac{1}{2}}$."},
        {"problem": "2?", "solution": r"\boxed{2}"},
    ]
    (tmp_path / "math.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    answering(monkeypatch, ["The answer is: 0.5", "so 2"])
    scores = scored("math", tmp_path / "math.jsonl", tmp_path / "out")
    assert (scores["exact_match"], scores["flexible_match"], scores["ungraded"]) == (50.0, 100.0, 0)


@pytest.mark.parametrize("right, n, low, high", [(0, 10, 0.0, 27.75), (10, 10, 72.25, 100.0), (5, 10, 23.66, 76.34),
                                                 (81, 263, 25.53, 36.62), (1, 1, 20.65, 100.0)])  # fmt: skip
def test_wilson_by_published_values(right, n, low, high):
    """n = 10: Brown, Cai and DasGupta (2001); 81 of 263: Newcombe (1998), table I."""
    assert wilson(right, n) == pytest.approx([low, high], abs=0.01)


def test_what_cannot_be_scored_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    data = commonsense(tmp_path / "data")
    (data / "piqa/test.json").unlink()
    (data / "winogrande/test.json").unlink()
    rest = "boolq,social_i_qa,hellaswag,ARC-Easy,ARC-Challenge,openbookqa"
    refusals = [
        ("commonsense", data, DataError, f"missing are piqa, winogrande; .*or score {rest} alone"),
        (
            "commonsense",
            tmp_path,
            DataError,
            "has no boolq/test.json; missing are boolq, .*AGI-Edgerunners/LLM-Adapters$",
        ),
        ("piqa", data, DataError, "missing are piqa; .*AGI-Edgerunners/LLM-Adapters$"),
        ("gsm9k", data, RecipeError, "'gsm9k': is unknown; there are gsm8k, math, boolq"),
        ("boolq,boolq", data, RecipeError, "is unknown"),
        ("gsm8k,boolq", data, RecipeError, "commas may join tasks of commonsense"),
        ("", data, RecipeError, "is unknown"),
    ]
    for task, path, error, said in refusals:
        with pytest.raises(error, match=said) as refused:
            load_questions(task, str(path), None)
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="commonsense: has no place on the Hub; give --data"):
        load_questions("commonsense", None, None)


@pytest.mark.parametrize(
    "task, row",
    [("gsm8k", {"question": "How many?", "answer": "many"}), ("math", {"problem": "What?", "solution": "no box"}),
     ("boolq", {"instruction": "Is it?", "input": "", "output": "the correct answer is maybe", "answer": "maybe"})],
)  # fmt: skip
def test_a_reference_without_an_answer_is_named_and_not_scored_as_wrong(tmp_path, monkeypatch, task, row):
    monkeypatch.setattr("abba.evaluation.tasks.require_math_verify", lambda: None)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="1 of its rows cannot be scored; the first is row 1: .* gives no answer that"):
        load_questions(task, str(tmp_path / "rows.jsonl"), None)


@pytest.mark.parametrize("task, fields", [("gsm8k", "question, answer"), ("boolq", "instruction, output, input")])
def test_rows_without_a_tasks_fields_are_named_with_those_that_it_needs(tmp_path, task, fields):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"question": "1 + 1?", "solution": "2"}) + "\n")
    with pytest.raises(DataError, match=rf"only question, solution; rows of {task} need the fields {fields}$"):
        load_questions(task, str(tmp_path / "rows.jsonl"), None)


def test_generations_that_are_all_empty_are_no_score_of_0(tmp_path, monkeypatch):
    answering(monkeypatch, ["", " \n", ""])
    with pytest.raises(CheckpointError, match="all 3 generations are empty: the model ends at once; are base, adapter"):
        scored("gsm8k", STORIES / "test.jsonl", tmp_path / "out", limit=3)
    assert not (tmp_path / "out/scores.json").exists()
    answering(monkeypatch, ["", "#### 5", ""])
    assert scored("gsm8k", STORIES / "test.jsonl", tmp_path / "some", limit=3)["empty"] == 2


def test_the_prompt_of_training_is_that_of_scoring(tmp_path):
    row = {"instruction": " Is it?\n", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    (question,) = load_questions("boolq", str(tmp_path / "rows.json"), None)
    assert render_prompt(question.instruction).endswith("### Instruction:\nIs it?\n\n### Response:")
    assert render_prompt(question.instruction, "plain") == "Is it?\n"


@real
@pytest.mark.slow
@pytest.mark.parametrize("task, file, rows", REAL)
def test_real_gold_answers_score_100_and_shuffled_ones_chance(tmp_path, monkeypatch, task, file, rows):
    answers = gold(task, DATA / file)
    assert len(answers) == rows
    answering(monkeypatch, answers)
    scores = scored(task, DATA / file, tmp_path / "gold")
    assert scores["exact_match"] == scores["flexible_match"] == 100.0 and scores["n"] == rows
    questions = load_questions(task, str(DATA / file), None)
    shuffled, chances = list(answers), []
    random.Random(0).shuffle(shuffled)
    answering(monkeypatch, shuffled)
    scores = scored(task, DATA / file, tmp_path / "shuffled")
    for name, score in scores.get("tasks", {task: scores}).items():
        drawn = Counter(question.answer for question in questions)
        own = [question.answer for question in questions if question.task == name]
        chance = sum(drawn[answer] - 1 for answer in own) / (rows - 1) / len(own)  # of drawing an equal one
        chances.append(chance)
        sigma = (chance * (1 - chance) / len(own)) ** 0.5
        assert abs(score["exact_match"] / 100 - chance) <= 4 * sigma, (name, score["exact_match"], 100 * chance)
    assert max(chances) < 0.6


@real
@pytest.mark.slow
@pytest.mark.parametrize("task, file", [("gsm8k", "gsm8k/test.jsonl"), ("boolq,ARC-Challenge", "commonsense")])
def test_the_tiny_base_runs_end_to_end_on_real_rows(tmp_path, task, file):
    output = tmp_path / "out"
    finished = warm.run(
        tmp_path / "program", "launch/evaluate.py", "--model", str(TINY), "--task", task, "--data", str(DATA / file),
        "--limit", "24", "--max-new-tokens", "24", "--batch-size", "8", "--output", str(output),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((output / "scores.json").read_text())
    assert scores["n"] == 24 * len(task.split(",")) == len((output / "generations.jsonl").read_text().splitlines())
    assert 0 <= scores["exact_match"] <= scores["flexible_match"] <= 100


def test_the_tiny_base_runs_all_eight(tmp_path):
    data, output = commonsense(tmp_path / "data", rows=2), tmp_path / "out"
    finished = warm.run(
        tmp_path / "program", "launch/evaluate.py", "--model", str(TINY), "--task", "commonsense", "--data", str(data),
        "--max-new-tokens", "4", "--output", str(output),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((output / "scores.json").read_text())
    assert scores["n"] == 16 and tuple(scores["tasks"]) == COMMONSENSE
    assert "commonsense: exact match 0.0% of 16" in finished.stdout and "; openbookqa 0.0%" in finished.stdout
