"""The programs as a user starts them: dry run, torchrun, conversion and scoring of what a run left."""

import json
import subprocess
import sys

import pytest

from tests import warm
from tests.distributed.ranks import STORIES, TINY, environment, free_port
from tests.warm import ROOT

SHORT = [
    "launch/train.py",
    "--recipe",
    "quickstart",
    "train.max_steps=3",
    "data.max_rows=120",
    "checkpoint.save_steps=2",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run under torchrun on two ranks."""
    run = tmp_path_factory.mktemp("torchrun") / "run"
    command = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), *SHORT, f"output_dir={run}"]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    return run, result.stdout


def test_torchrun_trains_on_two_ranks_and_leaves_a_whole_run(trained):
    run, said = trained
    assert "engine: 2 rank(s) x 1 micro-batch(es) a step" in said
    assert {path.name for path in run.iterdir()} == {"recipe.yaml", "metrics.jsonl", "checkpoints", "adapter"}
    checkpoints = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step-000002", "step-000003"]
    assert len(list((run / "checkpoints/step-000003").glob("shard-*-of-00002.safetensors"))) == 2
    state = json.loads((run / "checkpoints/step-000003/state.json").read_text())
    assert state["fingerprint"]["model"]["weights"] and state["fingerprint"]["software"]["torch"]


def test_a_start_does_not_import_torchs_compiler(tmp_path):
    """DeepSpeed's Muon optimizer would, for nothing: seconds of each rank's start. A process of its own."""
    lines = (
        "import runpy, sys; sys.path[:0] = ['launch']; sys.argv[0] = 'launch/train.py'\n"
        "runpy.run_path('launch/train.py', run_name='train')['main']()\n"
        "assert 'deepspeed.runtime.zero.muon.original_muon' in sys.modules, 'ZeRO-3 no longer asks for it'\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules"
    )
    command = [sys.executable, "-c", lines, *SHORT[1:], "train.max_steps=1", f"output_dir={tmp_path / 'run'}"]
    ended = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (tmp_path / "run/adapter").is_dir()


def test_the_resolved_recipe_of_a_run_can_be_run_again(trained, tmp_path):
    run, _ = trained
    command = ["launch/train.py", "--recipe", str(run / "recipe.yaml"), "--dry-run"]
    finished = warm.run(tmp_path / "program", *command)
    assert finished.returncode == 0, finished.stderr


def test_a_dry_run_shows_what_would_run_and_writes_nothing(tmp_path):
    command = ["launch/train.py", "--recipe", "quickstart", "--dry-run", f"output_dir={tmp_path / 'run'}"]
    finished = warm.run(tmp_path / "program", *command, "data.max_rows=100", "adapter.r1=4")
    assert finished.returncode == 0, finished.stderr
    assert "r1: 4" in finished.stdout
    assert "global batch 16 = 1 rank x 8 rows x 2 times" in finished.stdout
    assert "28 modules, r1=4 r2=8" in finished.stdout and "885,888 are frozen" in finished.stdout
    masked, learned = finished.stdout.splitlines()[-2:]
    assert "### Instruction:" in masked and masked.endswith("### Response:'")
    assert "<<" in learned and learned.endswith("</s>'")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("format", ["loha", "lora"])
def test_convert_verifies_against_stock_peft(trained, tmp_path, format):
    run, _ = trained
    command = ["launch/convert.py", str(run), str(tmp_path / "adapter"), "--format", format]
    finished = warm.run(tmp_path / "program", *command, "--verify", "--base", str(TINY))
    assert finished.returncode == 0, finished.stderr
    assert "stock PEFT's logits differ from the native ones by at most" in finished.stdout
    assert ("--max-lora-rank 64" in finished.stdout) == (format == "lora")
    first = run / "checkpoints/step-000002"
    again = warm.run(tmp_path / "again", "launch/convert.py", str(first), str(tmp_path / "adapter"))
    assert again.returncode == 66 and "--force" in again.stderr


def test_convert_names_a_damaged_checkpoint_and_uses_the_one_before(trained, tmp_path):
    run, _ = trained
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    shard = copy / "checkpoints/step-000003/shard-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    finished = warm.run(tmp_path / "program", "launch/convert.py", str(copy), str(tmp_path / "adapter"))
    assert finished.returncode == 0, finished.stderr
    assert "skipped step-000003" in finished.stderr and shard.name in finished.stderr
    assert "step-000002 ->" in finished.stdout


def test_greedy_means_greedy_whatever_the_base_prefers(tmp_path):
    base = tmp_path / "base"
    subprocess.run(["cp", "-r", str(TINY), str(base)], check=True)
    preferences = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "num_beams": 3, "do_sample": True}
    (base / "generation_config.json").write_text(json.dumps(preferences))
    texts = []
    for model in (TINY, base):
        command = [
            "launch/evaluate.py",
            "--model",
            str(model),
            "--task",
            "gsm8k",
            "--data",
            str(STORIES / "test.jsonl"),
        ]
        command += ["--limit", "8", "--max-new-tokens", "40", "--output", str(tmp_path / f"out-{model.name}")]
        finished = warm.run(tmp_path / f"program-{model.name}", *command)
        assert finished.returncode == 0, finished.stderr
        lines = (tmp_path / f"out-{model.name}/generations.jsonl").read_text().splitlines()
        texts.append([json.loads(line)["generated"] for line in lines])
    assert texts[0] == texts[1]


def test_generate_answers_side_by_side(trained, tmp_path):
    run, _ = trained
    command = ["launch/generate.py", "--model", str(TINY), "--adapter", str(run / "adapter"), "--max-new-tokens", "20"]
    finished = warm.run(tmp_path / "program", *command, "--prompt", "Ann has 3 pens. Then Ann buys 4 more. How many?")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("--- base\n") and f"--- {run / 'adapter'}\n" in finished.stdout
