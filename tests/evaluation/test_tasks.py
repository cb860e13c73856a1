"""Which rows a task is scored on."""

import pytest

import abba.evaluation.tasks
from abba.evaluation.tasks import Question, load_questions
from tests.distributed.ranks import STORIES


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (None, ("openai/gsm8k", "main", "test")),
        ("openai/gsm8k", ("openai/gsm8k", "main", "test")),
        ("somebody/problems", ("somebody/problems", None, "test")),
        (str(STORIES / "test.jsonl"), (str(STORIES / "test.jsonl"), None, "train")),  # a file's only split
    ],
)
def test_a_hub_dataset_is_scored_on_its_test_split(monkeypatch, path, expected):
    asked = []

    def rows(source, bad):
        asked.append((source.path, source.name, source.split))
        yield [0], ["1 + 1?"], ["#### 2"]

    monkeypatch.setattr(abba.evaluation.tasks, "usable_rows", rows)
    assert load_questions("gsm8k", path, None) == [Question("gsm8k", 0, "1 + 1?", "#### 2", "2")]
    assert asked == [expected]
