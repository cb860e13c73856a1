"""launch/convert.py as a user starts it: every form, what --verify says; a mistake leaves one line and nothing else."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial

import pytest
import torch

from abba.adapter.config import SEVEN_LINEARS, AdapterConfig
from abba.adapter.directory import read_description
from tests import warm
from tests.checkpoint.made import linears, write_checkpoint
from tests.distributed.ranks import STORIES, TINY
from tests.models import tiny_model
from tests.warm import ROOT

CONFIG, MODULES = AdapterConfig(4, 4, 1.0, SEVEN_LINEARS), linears(128, 352, 128, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run with two checkpoints of random factors for the embedded base."""
    run = tmp_path_factory.mktemp("made") / "run"
    for step in (2, 4):
        write_checkpoint(run / "checkpoints", CONFIG, MODULES, step, base_model=str(TINY))
    return run


@pytest.fixture
def convert(tmp_path):
    return partial(warm.run, tmp_path / "program", "launch/convert.py")


@pytest.mark.parametrize(
    "options, said",
    [
        ([], ["stock PEFT's logits differ from the native ones by at most"]),
        (["--format", "lora"], ["--max-lora-rank 16", "stock PEFT's logits differ"]),
        (["--format", "lora", "--rank", "5"], ["--max-lora-rank 8", "rank 5 keeps ", "not compared: at rank 5"]),
        (["--format", "merged"], ["0 of 28 targets came out as in the base", "the merged model's logits differ"]),
        (["--format", "merged", "--dtype", "float32"], ["what is stored: 0.0%", "the merged model's logits"]),
    ],
)  # fmt: skip
def test_every_form_is_verified_and_says_how(convert, made, tmp_path, options, said):
    finished = convert(str(made), str(tmp_path / "out"), *options, "--verify", "--base", str(TINY))
    assert finished.returncode == 0, finished.stderr
    for text in ("step-000004 ->", "verified: 28 targets, all tensors of their shapes and finite", *said):
        assert text in finished.stdout
    description = read_description(tmp_path / "out")
    assert description.provenance["step"] == 4 and description.base_model == str(TINY)


def test_verify_without_a_base_says_that_no_logits_were_compared(convert, made, tmp_path):
    finished = convert(str(made / "checkpoints/step-000002"), str(tmp_path / "out"), "--verify")
    assert finished.returncode == 0 and "logits are not compared without --base" in finished.stdout


@pytest.mark.parametrize("options", [[], ["--format", "lora"], ["--format", "merged", "--base", str(TINY)]])
def test_verify_refuses_what_changes_nothing(convert, tmp_path, monkeypatch, options):
    monkeypatch.setattr(torch, "randn", lambda *shape, generator: torch.zeros(*shape))
    write_checkpoint(tmp_path / "run/checkpoints", CONFIG, MODULES)
    (tmp_path / "good").mkdir()
    (tmp_path / "good/abba_config.json").write_text("an earlier result")
    for out, force in (("new", []), ("good", ["--force"])):
        finished = convert(str(tmp_path / "run"), str(tmp_path / out), "--verify", *options, *force)
        assert finished.returncode == 66 and "so it changes nothing; was the learning rate 0?" in finished.stderr
        assert finished.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"run", "program", "good"}
    assert (tmp_path / "good/abba_config.json").read_text() == "an earlier result"


def test_scores_of_the_run_reach_the_card_of_a_later_conversion(convert, made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made, run)
    assert convert(str(run), str(run.parent / "adapter")).returncode == 0
    command = ["launch/evaluate.py", "--model", str(TINY), "--adapter", str(tmp_path / "adapter"), "--task", "gsm8k",
               "--data", str(STORIES / "test.jsonl"), "--limit", "4", "--max-new-tokens", "4",
               "--output", str(run / "evaluation")]  # fmt: skip
    assert warm.run(tmp_path / "evaluate", *command).returncode == 0
    for step, shown in ((4, True), (2, False)):
        checkpoint = run / f"checkpoints/step-{step:06d}"
        assert convert(str(checkpoint), str(tmp_path / f"lora-{step}"), "--format", "lora").returncode == 0
        card = (tmp_path / f"lora-{step}/README.md").read_text()
        assert ('"exact_match"' in card and "Of the run's own adapter" in card) == shown


def test_an_adapter_alone_gives_every_form(convert, made, tmp_path):
    for source, name in ((made, "loha"), (tmp_path / "loha", "again"), (made, "direct"), (tmp_path / "loha", "lora")):
        form = ["--format", "lora"] if name in ("direct", "lora") else []
        assert convert(str(source), str(tmp_path / name), *form).returncode == 0
    for one, other in (("loha", "again"), ("direct", "lora")):
        files = [tmp_path / name / "adapter_model.safetensors" for name in (one, other)]
        assert files[0].read_bytes() == files[1].read_bytes()
    refused = convert(str(tmp_path / "lora"), str(tmp_path / "out"))
    assert refused.returncode == 66 and "is in lora form, which no longer holds the four factors" in refused.stderr
    assert refused.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_run_that_may_not_be_read(made):
    """root may read all, so another user asks."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    lines = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "launch")!r}]
import abba.base_model, abba.checkpoint.convert, convert
os.seteuid(65534)
sys.argv = ["convert.py", sys.argv[1], "/tmp/nowhere-at-all"]
sys.exit(convert.main())
"""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        shutil.copytree(made, f"{directory}/run")
        os.chmod(f"{directory}/run/checkpoints", 0o700)
        command = [sys.executable, "-c", lines, f"{directory}/run"]
        ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 66, ended.stderr
    assert "Permission denied; change its permissions" in ended.stderr
    assert "Traceback" not in ended.stderr


def damaged(made, tmp_path, change):
    shutil.copytree(made, tmp_path / "run")
    change(tmp_path / "run")
    return tmp_path / "run"


def other_base(tmp_path, **changes):
    tiny_model(**changes).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


SHARD = "checkpoints/step-000004/shard-00001-of-00002.safetensors"
MERGED = ["--format", "merged", "--base"]


@pytest.mark.parametrize(
    "arguments, code, expected",
    [
        (lambda m, t: [os.makedirs(t / "empty") or t / "empty", t / "out"], 66, "empty: holds no valid checkpoint"),
        (lambda m, t: [TINY, t / "out"], 66, "tiny-llama: holds no valid checkpoint"),
        (lambda m, t: [TINY / "config.json", t / "out"], 66, "config.json: is a file; give a checkpoint"),
        (
            lambda m, t: [damaged(m, t, lambda r: (r / SHARD).unlink()) / "checkpoints/step-000004", t / "out"],
            66,
            "shard-00001-of-00002.safetensors: is missing",
        ),
        (
            lambda m, t: [damaged(m, t, lambda r: os.truncate(r / SHARD, 99)), t / "out", "--strict"],
            66,
            "without --strict the checkpoint before it is used",
        ),
        (lambda m, t: ["x" * 300, t / "out"], 66, "x: does not exist; give a checkpoint"),
        (lambda m, t: [m, t / ("x" * 300)], 66, "cannot be written: File name too long"),
        (lambda m, t: [m, m / "out"], 66, "overlaps SRC"),
        (lambda m, t: [m / "checkpoints/step-000004", m / "checkpoints/step-000004/out"], 66, "overlaps SRC"),
        (lambda m, t: [m / "checkpoints/step-000004", m, "--force"], 66, "overlaps SRC"),
        (lambda m, t: [m / "checkpoints/step-000004", m / "checkpoints/out"], 66, "lies among the checkpoints"),
        (lambda m, t: [m, (t / "file").touch() or t / "file/out"], 66, "cannot be written"),
        (lambda m, t: [m, t / "out", *MERGED, other_base(t)], 66, "is (64, 64), the adapter was made for (128, 128)"),
        (
            lambda m, t: [m, t / "out", *MERGED, other_base(t, num_hidden_layers=1, hidden_size=128, head_dim=32,
                                                           num_key_value_heads=4, intermediate_size=352)],
            66,
            "has no model.layers.1.self_attn.q_proj.weight, which the adapter changes",
        ),
        (lambda m, t: [m, t / "out", *MERGED, "nowhere"], 66, "--base: 'nowhere' is neither a directory"),
        (lambda m, t: [m, t / "out", *MERGED[:2]], 64, "--base: is needed for a whole model, merged"),
        (lambda m, t: [m, t / "out", "--rank", "4"], 64, "--rank 4: has a meaning for --format lora alone"),
        (lambda m, t: [m, t / "out", "--format", "lora", "--rank", "17"], 64, "is not between 1 and r1*r2 = 16"),
        (lambda m, t: [m, t / "out", "--base", str(TINY)], 64, "is used by --verify alone"),
        (lambda m, t: [m, t / "out", "--alpha", "16"], 64, "--alpha 16: "),
        (lambda m, t: [m, t / "out", "--any-base"], 64, "--any-base: is of a --base that is read"),
        (lambda m, t: [m, t / "out", *MERGED, TINY, "--revision", "v1"], 64, "argument: --revision: 'v1' has no"),
        (lambda m, t: [m, t / "out", "--revision", "v1", "--base", "o/m"], 64, "--revision: is of a --base that is"),
    ],
)  # fmt: skip
def test_mistakes_end_in_one_line_and_leave_nothing(convert, made, tmp_path, arguments, code, expected):
    command = [str(argument) for argument in arguments(made, tmp_path)]
    before = listing(made) | listing(tmp_path)
    finished = convert(*command)
    assert finished.returncode == code, finished.stderr
    assert expected in finished.stderr
    assert finished.stderr.count("\n") == 1 and "Traceback" not in finished.stderr
    assert {path for path in listing(made) | listing(tmp_path) if "program" not in path} == before


def listing(directory):
    return {str(path) for path in directory.rglob("*")}


@pytest.mark.parametrize("form", ["merged", "lora"])
def test_another_base_is_refused_unless_it_is_meant(convert, tmp_path, form):
    """Of the same shapes, as an instruct model has beside its base: nothing else would notice."""
    config = hashlib.sha256((TINY / "config.json").read_bytes()).hexdigest()
    state = {"base_model": str(TINY), "fingerprint": {"model": {"config": config}}}
    write_checkpoint(tmp_path / "run/checkpoints", CONFIG, MODULES, **state)
    other = shutil.copytree(TINY, tmp_path / "other")
    (other / "config.json").write_text((TINY / "config.json").read_text() + " ")
    command = [str(tmp_path / "run"), str(tmp_path / "out"), "--format", form, "--verify", "--base", str(other)]
    refused = convert(*command)
    assert refused.returncode == 66 and refused.stderr.count("\n") == 1
    assert "run: was trained on" in refused.stderr and "whose config.json is not that of" in refused.stderr
    assert "give that base with --base, or --any-base" in refused.stderr and not (tmp_path / "out").exists()
    assert convert(*command, "--any-base").returncode == 0
    made_of = str(other if form == "merged" else TINY)
    assert read_description(tmp_path / "out").base_model == made_of
    assert f'base_model: "{made_of}"' in (tmp_path / "out/README.md").read_text()


def test_only_adapters_and_merged_models_are_replaced(convert, made, tmp_path):
    out = tmp_path / "out"
    merge = ["--format", "merged", "--base", str(TINY)]
    assert convert(str(made), str(out), *merge).returncode == 0
    refused = convert(str(made), str(out))
    assert refused.returncode == 66 and "is not empty; choose another or pass --force" in refused.stderr
    assert convert(str(made), str(out), "--force").returncode == 0
    assert json.loads((out / "abba_config.json").read_text())["format"] == "loha"
    assert not (out / "model.safetensors").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    refused = convert(str(made), str(tmp_path / "mine"), *merge, "--force")
    assert refused.returncode == 66 and "holds something that is no adapter" in refused.stderr
    assert (tmp_path / "mine/thesis.txt").exists()
    inside = convert(str(made), str(tmp_path / "base/out"), *MERGED, str(shutil.copytree(TINY, tmp_path / "base")))
    assert inside.returncode == 66 and "overlaps the base" in inside.stderr
