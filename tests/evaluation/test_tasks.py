"""Which rows a task is scored on, and by which ranks."""

import os

import pytest

import abba.evaluation.tasks
import abba.sharded.ranks
from abba.errors import RankLostError
from abba.evaluation.tasks import Question, load_questions
from abba.sharded.ranks import Ranks, go_alone
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


@pytest.mark.parametrize(
    "visible, local_rank, own",
    [(None, 1, "1"), ("4,5", 0, "4"), ("4,5", 1, "5"), ("7", 1, "7"), ("", 1, "")],
)
def test_each_of_several_ranks_sees_one_gpu_and_no_other_rank(monkeypatch, visible, local_rank, own):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    go_alone(Ranks())
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible and "RANK" in os.environ
    go_alone(Ranks(local_rank, 2, local_rank, 2))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == own
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & os.environ.keys()


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(RankLostError, match="4 ranks on a node with CUDA_VISIBLE_DEVICES=0,1; start one for each GPU"):
        go_alone(Ranks(3, 4, 3, 4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(abba.sharded.ranks, "_nvidia_gpus", lambda: 1)
    with pytest.raises(RankLostError, match="2 ranks on a node with 1 GPU; start one for each GPU"):
        go_alone(Ranks(1, 2, 1, 2))
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
