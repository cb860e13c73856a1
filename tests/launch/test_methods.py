"""The programs on what other methods have trained: their own form, one line for what does not apply."""

from functools import partial

import pytest

from abba.adapter.config import BaselineConfig, FullConfig
from abba.adapter.directory import read_description
from abba.checkpoint.convert import Form, convert
from abba.errors import RecipeError
from abba.storage import SafetensorsFile
from tests import warm
from tests.checkpoint.made import linears, write_checkpoint
from tests.distributed.ranks import TINY

MODULES = linears(128, 352, 128, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run each of LoRA, DoRA and full fine-tuning on the embedded base, with random values."""
    root = tmp_path_factory.mktemp("made")
    for config in (BaselineConfig("lora", 8, 16.0), BaselineConfig("dora", 8, 16.0)):
        write_checkpoint(root / config.method / "checkpoints", config, MODULES, base_model=str(TINY))
    with SafetensorsFile(TINY / "model.safetensors") as file:
        tensors = {name: stored.shape for name, stored in file.tensors.items()}
    write_checkpoint(root / "full" / "checkpoints", FullConfig(), {}, base_model=str(TINY), tensors=tensors)
    return root


@pytest.fixture
def program(tmp_path):
    return partial(warm.run, tmp_path / "program")


def test_dora_becomes_pefts_own_and_is_answered_with(program, made, tmp_path):
    out = str(tmp_path / "out")
    finished = program("launch/convert.py", str(made / "dora"), out, "--verify", "--base", str(TINY))
    assert finished.returncode == 0, finished.stderr
    assert "84 tensors" in finished.stdout and "stock PEFT's logits differ from the native ones" in finished.stdout
    assert "vLLM" not in finished.stdout and read_description(tmp_path / "out").format == "dora"
    asked = ["--model", str(TINY), "--adapter", out, "--prompt", "How many?", "--max-new-tokens", "8"]
    answered = program("launch/generate.py", *asked)
    assert answered.returncode == 0, answered.stderr
    _, base, _, adapted, *_ = answered.stdout.replace(f"--- {out}", "--- base").split("--- base\n") + [""] * 2
    assert base != adapted


def test_full_needs_its_base_and_becomes_a_model(program, made, tmp_path):
    command = partial(program, "launch/convert.py", str(made / "full"), str(tmp_path / "out"))
    refused = command()
    assert refused.returncode == 64 and "--base: is needed for a whole model" in refused.stderr
    finished = command("--base", str(TINY), "--verify")
    assert finished.returncode == 0, finished.stderr
    assert "verified: 38 tensors" in finished.stdout and (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.parametrize(
    "run, form, said",
    [
        ("lora", Form("loha"), "--format loha: is no form of lora, which has lora; leave it out"),
        ("dora", Form("merged", base=TINY), "--format merged: is no form of dora, which has dora; leave it out"),
        ("lora", Form("lora", rank=4), "--rank 4: truncates ABBA alone, and this is lora; leave it out"),
        ("full", Form("loha", base=TINY), "--format loha: is no form of full, which has full; leave it out"),
        ("full", Form(), "--base: is needed for a whole model"),
    ],
)
def test_forms_that_do_not_apply_are_one_line(made, tmp_path, run, form, said):
    checkpoint = next((made / run / "checkpoints").iterdir())
    with pytest.raises(RecipeError) as error:
        convert(checkpoint, tmp_path / "out", form)
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_plans_and_dry_runs_know_the_method(program):
    planned = program("launch/plan.py", "--recipe", "gsm8k_lora", "--explain")
    assert planned.returncode == 0 and "83,886,080 train" in planned.stdout
    assert "trainable = r x sum of (out + in) over 224 linears = 32 x 2,621,440 = 83,886,080" in planned.stdout
    for overrides, said in (
        (["adapter.method=dora"], "dora trains 85,262,336 parameters and forms whole weights"),
        (["adapter.method=full", "adapter.r=null", "adapter.alpha=null"], "full trains all 8,030,261,248 parameters"),
    ):
        refused = program("launch/plan.py", "--recipe", "gsm8k_lora", *overrides)
        assert refused.returncode == 64 and said in refused.stderr and refused.stderr.count("\n") == 1
    nulls = [f"adapter.{key}=null" for key in ("r1", "r2", "alpha")]
    for method, said in (("loha", "28 modules, loha r=16 alpha=16"), ("full", "none: full fine-tuning, 885,888")):
        shown = program("launch/train.py", "--recipe", "quickstart", "--dry-run", f"adapter.method={method}", *nulls)
        assert shown.returncode == 0 and said in shown.stdout, shown.stderr
