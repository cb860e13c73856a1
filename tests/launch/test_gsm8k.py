"""Real input: GSM8K's own rows through the shipped recipe, on the tiny base, under the real launcher."""

import json
from pathlib import Path

import pytest

from tests import warm
from tests.distributed.ranks import TINY, deepspeed, read_metrics
from tests.warm import ROOT

GSM8K = ROOT.parent / "shared" / "data" / "gsm8k"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's train.jsonl and test.jsonl in {GSM8K}"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory: Path = tmp_path_factory.mktemp("gsm8k") / "run"
    command = ["launch/train.py", "--recipe", "gsm8k.yaml", f"model.name_or_path={TINY}", f"output_dir={directory}"]
    fewer = ["train.max_steps=30", "train.global_batch_size=16"]
    result = deepspeed(*command, f"data.path={GSM8K / 'train.jsonl'}", *fewer)
    assert result.returncode == 0, result.stderr[-3000:]
    return directory, result.stdout


def test_every_row_is_read_and_the_loss_falls(run):
    directory, said = run
    assert "7,473 rows to train on, 0 held out" in said
    assert "data.name=main is for the Hub and means nothing for the file" in said
    losses = [record["loss"] for record in read_metrics(directory)]
    tenth = len(losses) // 10
    assert sum(losses[-tenth:]) <= 0.9 * sum(losses[:tenth])


def test_the_adapter_is_scored_on_the_real_test_set(run, tmp_path):
    directory, _ = run
    finished = warm.run(
        tmp_path / "program", "launch/evaluate.py", "--model", str(TINY), "--adapter", str(directory / "adapter"),
        "--task", "gsm8k", "--data", str(GSM8K / "test.jsonl"), "--limit", "32", "--max-new-tokens", "64",
        "--output", str(tmp_path / "scores"),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((tmp_path / "scores/scores.json").read_text())
    assert scores["n"] == 32 and 0 <= scores["exact_match"] <= 100
    generations = [json.loads(line) for line in (tmp_path / "scores/generations.jsonl").read_text().splitlines()]
    assert len(generations) == 32 and sum(g["correct"] for g in generations) * 100 / 32 == scores["exact_match"]
