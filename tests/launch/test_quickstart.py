"""The quickstart learns the task and not the format: three seeds, and two controls that must stay behind."""

import json
import random
import subprocess

import pytest

from tests import warm
from tests.distributed.ranks import STORIES, TINY, environment
from tests.faults.harness import beyond_make_test
from tests.warm import ROOT

SCORED = [f"evaluate.path={STORIES / 'test.jsonl'}", "evaluate.limit=16", "evaluate.max_new_tokens=40"]


def rows(name):
    return [json.loads(line) for line in (STORIES / f"{name}.jsonl").read_text().splitlines()]


def evaluate(directory, adapter=None):
    command = ["launch/evaluate.py", "--model", str(TINY), "--task", "gsm8k", "--data", str(STORIES / "test.jsonl")]
    command += ["--batch-size", "128", "--max-new-tokens", "40", "--output", str(directory / "scores")]
    finished = warm.run(directory / "evaluate", *command, *(["--adapter", str(adapter)] if adapter else []))
    assert finished.returncode == 0, finished.stderr
    return json.loads((directory / "scores/scores.json").read_text())


@pytest.fixture(scope="module")
def base_score(tmp_path_factory):
    scores = evaluate(tmp_path_factory.mktemp("base"))
    assert scores["n"] >= 128 and scores["adapter"] is None
    return scores["exact_match"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Exact match after one-rank runs of the quickstart recipe, two at a time, by name."""
    root = tmp_path_factory.mktemp("trained")
    shuffled = root / "shuffled.jsonl"
    shuffled.write_text("".join(json.dumps(row) + "\n" for row in shuffle_results(rows("train"))))
    runs = {
        "seed 1": ["train.seed=1"],
        "seed 2": ["train.seed=2"],
        "shuffled": [f"data.path={shuffled}"],
        "rate 0": ["train.learning_rate=0", "train.max_steps=20", *SCORED],
    }
    pending, programs = list(runs), {}
    while pending:
        pair, pending = pending[:2], pending[2:]
        for name in pair:
            where = [f"output_dir={root / name.replace(' ', '-')}", "data.eval_rows=0", "train.eval_steps="]
            command = ["launch/train.py", "--recipe", "quickstart", *where, *runs[name]]
            programs[name] = warm.Program(root / f"{name} program", command, {})
        for name in pair:
            finished = programs[name].wait(500)
            assert finished.returncode == 0, finished.stderr
    asked = json.loads((root / "rate-0/evaluation/scores.json").read_text())
    assert asked["n"] == 16 and asked["adapter"] == str(root / "rate-0/adapter")
    return {name: evaluate(root / name, root / name.replace(" ", "-") / "adapter")["exact_match"] for name in runs}


def shuffle_results(originals):
    """The right format with another problem's result: nothing to learn but the format."""
    results = [row["answer"].split("#### ")[1] for row in originals]
    random.Random(0).shuffle(results)
    changed = []
    for row, result in zip(originals, results, strict=True):
        own = row["answer"].split("#### ")[1]
        text = (
            row["answer"].replace(f"={own}>>{own} ", f"={result}>>{result} ").replace(f"#### {own}", f"#### {result}")
        )
        changed.append({**row, "answer": text})
    assert sum(a != b for a, b in zip(changed, originals, strict=True)) > 0.9 * len(changed)
    return changed


@beyond_make_test  # make quickstart is it
def test_the_script_runs_end_to_end_on_the_real_launcher(tmp_path, base_score):
    """Seed 0: two ranks under `deepspeed`, ZeRO-3, bf16, checkpointing, conversion, PEFT check, scores."""
    result = subprocess.run(
        ["sh", "launch/quickstart.sh", str(tmp_path / "run")],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    scores = {n: json.loads((tmp_path / f"run/scores-{n}/scores.json").read_text()) for n in ("base", "adapter")}
    assert scores["base"]["exact_match"] == base_score
    assert scores["adapter"]["exact_match"] >= base_score + 30
    assert scores["adapter"]["n"] >= 128
    assert len((tmp_path / "run/scores-adapter/generations.jsonl").read_text().splitlines()) == scores["adapter"]["n"]
    assert (tmp_path / "run/checkpoints/step-000100/shard-00001-of-00002.safetensors").is_file()
    assert "15 - 6 = <<15-6=9>>9 pens." in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["seed 1", "seed 2"])
def test_other_seeds_learn_as_well(base_score, trained, seed):
    assert trained[seed] >= base_score + 30


@pytest.mark.slow
def test_learning_rate_zero_gains_nothing(base_score, trained):
    assert trained["rate 0"] <= base_score + 2


@pytest.mark.slow
def test_shuffled_results_stay_far_behind(trained):
    assert trained["shuffled"] <= min(trained["seed 1"], trained["seed 2"]) - 25


def test_no_held_out_fact_is_in_training():
    def operands(row):
        calculation = row["answer"].split("<<")[1].split("=")[0]
        operation = "+" if "+" in calculation else "-"
        x, y = map(int, calculation.split(operation))
        return (operation, min(x, y), max(x, y)) if operation == "+" else (operation, x, y)

    facts = {name: {operands(row) for row in rows(name)} for name in ("train", "test")}
    assert len(facts["test"]) >= 128 and not facts["test"] & facts["train"]


def test_the_stories_are_what_their_script_makes(tmp_path):
    script = (STORIES / "make.py").read_text()
    (tmp_path / "make.py").write_text(script)
    finished = subprocess.run(["python3", str(tmp_path / "make.py")], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (STORIES / name).read_bytes()
