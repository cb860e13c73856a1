"""A run on two sources, one of them of conversations: prepared, trained, resumed exactly, scored as it was trained."""

import json
import shutil

import pytest

from tests import warm
from tests.distributed.ranks import STORIES, TINY, read_metrics
from tests.training.test_data import TEMPLATE

STORY_ROWS = [json.loads(line) for line in (STORIES / "train.jsonl").read_text().splitlines()[:60]]


def turn(row):
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


@pytest.fixture
def mixed(tmp_path):
    """Arguments of a run: 40 stories, and 10 conversations of two twice an epoch, on a base with a chat template."""
    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STORY_ROWS[:40]))
    talks = [turn(first) + turn(second) for first, second in zip(STORY_ROWS[40::2], STORY_ROWS[41::2], strict=True)]
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    sources = (
        f"[{{path: {tmp_path}/stories.jsonl}}, {{path: {tmp_path}/talks.jsonl, messages_field: messages, weight: 2}}]"
    )
    where = [f"model.name_or_path={base}", f"data.prepared_path={tmp_path / 'prepared'}", f"data.sources={sources}"]
    return [
        *where,
        "data.path=",
        "data.eval_rows=4",
        "train.global_batch_size=8",
        "train.max_steps=4",
        "train.eval_steps=",
    ]


@pytest.fixture
def run(tmp_path, mixed):
    return lambda number, program, *more: warm.run(
        tmp_path / f"program-{number}", f"launch/{program}.py", "--recipe", "quickstart", *mixed, *more
    )


def test_prepared_trained_resumed_and_scored(run, tmp_path):
    prepared = run(0, "prepare")
    assert prepared.returncode == 0, prepared.stderr
    rows, first, second = [
        line for line in prepared.stdout.splitlines() if "rows to train on" in line or "rows:" in line
    ]
    assert rows == "rows: 46 to train on, 4 held out, 0 left out, 0 cut"
    assert first.startswith(f"{tmp_path}/stories.jsonl: ") and "weight 1: " in first
    assert second.startswith(f"{tmp_path}/talks.jsonl: ") and "weight 2: " in second
    score = [f"evaluate.path={STORIES / 'test.jsonl'}", "evaluate.limit=2", "evaluate.max_new_tokens=4"]
    saving = ["checkpoint.save_steps=2", f"output_dir={tmp_path / 'run'}"]
    log = "deepspeed.csv_monitor={{enabled: true, output_path: {}, job_name: {}}}"
    whole = run(1, "train", *saving, *score, log.format(tmp_path, "whole"))
    assert whole.returncode == 0, whole.stderr
    assert "tokenised into" not in whole.stdout and second in whole.stdout
    scores = json.loads((tmp_path / "run/evaluation/scores.json").read_text())
    assert scores["prompt"] == "chat" and scores["n"] == 2

    other = ["checkpoint.save_steps=2", f"output_dir={tmp_path / 'other'}"]
    begun = [*other, f"checkpoint.resume={tmp_path / 'run/checkpoints/step-000002'}"]
    reweighted = run(2, "train", *begun, "data.sources.1.weight=1")
    assert reweighted.returncode == 66 and "data.weights was [1.0, 2.0], is [1.0, 1.0]" in reweighted.stderr
    resumed = run(3, "train", *begun, log.format(tmp_path, "resumed"))
    assert resumed.returncode == 0, resumed.stderr
    ours, theirs = (read_metrics(tmp_path / name) for name in ("run", "other"))
    assert [record["loss"] for record in theirs] == [record["loss"] for record in ours[2:]]
    for name, records in (("whole", ours), ("resumed", theirs)):  # over the examples seen, which resuming goes on with
        logged = (tmp_path / name / "Train_Samples_loss.csv").read_text().splitlines()
        assert logged == ["step,loss", *(f"{8 * record['step']},{record['loss']}" for record in records)]
        assert len((tmp_path / name / "Train_Samples_lr.csv").read_text().splitlines()) == 1 + len(records)

    command = ["--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "run/adapter")]
    asked = warm.run(tmp_path / "ask", "launch/generate.py", *command, "--prompt", "How many?", "--max-new-tokens", "4")
    assert asked.returncode == 0, asked.stderr

    (tmp_path / "base/chat_template.jinja").write_text(TEMPLATE.replace("<<", "<"))
    scored = ["--task", "gsm8k", "--data", str(STORIES / "test.jsonl"), "--output", str(tmp_path / "scores"), *command]
    refused = warm.run(tmp_path / "refused", "launch/evaluate.py", *scored)
    assert refused.returncode == 66 and refused.stderr.count("\n") == 1, refused.stderr
    assert "was trained on" in refused.stderr and "whose chat template is not that of" in refused.stderr


def test_a_dry_run_shows_an_example_of_each_source(run, tmp_path):
    shown = run(0, "train", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    stories, talks = shown.stdout.split("# one example")[1:]
    assert stories.count("learned: ") == 1 and talks.count("learned: ") == 2
    assert "'<s><<user>>\\n" in talks and f"row {tmp_path}/talks.jsonl:" in talks
    assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
    "overrides, code, expected",
    [
        (["data.sources.1.path=nowhere.jsonl"], 65, "'nowhere.jsonl': no such file"),
        (["data.sources.1.messages_field=talk"], 65, "'talk', only messages; set data.sources.1.messages_field to one"),
        (["data.sources.1.messages_field="], 65, "only messages; set data.sources.1.instruction_field and"),
        (["data.sources.1.weight=0.01"], 65, "talks.jsonl: its "),
        (["data.sources.1.wieght=2"], 64, "data.sources.1.wieght: unknown key; did you mean weight?"),
        ([f"model.name_or_path={TINY}"], 64, "the prompt chat: this base's tokenizer has no chat template"),
        (["data.sources=[{path: recipes/assets/stories/test.jsonl}, {path: recipes/assets/stories/test.jsonl}]"], 64,
         "data.sources.1: has the same rows as data.sources.0; give that one a weight instead"),
        (["data.sources=[{path: recipes/assets/stories/test.jsonl}, "
          "{path: recipes/assets/stories/test.jsonl, max_rows: 50}]"], 64, "data.sources.1: has the same rows as"),
    ],
)  # fmt: skip
def test_mistakes(run, tmp_path, overrides, code, expected):
    for number, dry in enumerate(([], ["--dry-run"])):
        result = run(number, "train", f"output_dir={tmp_path / 'run'}", *overrides, *dry)
        assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
        said = [line for line in result.stderr.splitlines() if "real_accelerator" not in line]
        assert expected in result.stderr and len(said) == 1, result.stderr
