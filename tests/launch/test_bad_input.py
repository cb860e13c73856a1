"""Every mistake a user can make ends in one line that names it, the exit code of its class, and no traceback."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import is_flash_attn_2_available

from tests import warm
from tests.distributed.ranks import STORIES, TINY, deepspeed
from tests.warm import ROOT

TRAIN = ["launch/train.py", "--recipe", "quickstart", "train.max_steps=1", "data.max_rows=100"]


SCORED = ["evaluate.task=gsm8k", f"evaluate.path={STORIES / 'test.jsonl'}"]


@pytest.fixture
def run(tmp_path):
    return partial(warm.run, tmp_path / "program")


def check(result, code, *expected):
    said = [line for line in result.stderr.splitlines() if "real_accelerator" not in line]
    assert result.returncode == code, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    for text in expected:
        assert text in result.stderr
    return said


@pytest.mark.parametrize(
    "overrides, code, expected",
    [
        (["train.learning_rat=1"], 64, "train.learning_rat: unknown key; did you mean learning_rate?"),
        (["train.learning_rate='1e-4'"], 64, "'1e-4' is text, not a number"),
        (["adapter.r1=0"], 64, "adapter.r1: 0"),
        (["train.global_batch_size=12", "train.per_device_train_batch_size=8"], 64, "12 is not a multiple of"),
        (["model.name_or_path=./nowhere"], 66, "'./nowhere' is no directory (seen from"),
        (["model.name_or_path=nobody/no-model"], 66, "hf download nobody/no-model"),
        (["adapter.layer_range=[2, 9]"], 64, "adapter.layer_range: (2, 9) goes beyond the model's 4 layers"),
        (["model.revision=abc"], 64, "model.revision: 'abc' has no meaning for the directory"),
        (["model.name_or_path=" + "x" * 300], 66, "is neither a directory"),
        (["data.path=nowhere.jsonl"], 65, "'nowhere.jsonl': no such file"),
        (["data.path=nobody/no-data"], 65, "hf download --repo-type dataset nobody/no-data"),
        (["data.instruction_field=q"], 65, "'q', only question, answer; set data.instruction_field and"),
        (["data.max_length=20"], 65, "all labels are masked"),
        ([*SCORED, "evaluate.engine=vllm", "model.dtype=float32"], 64, "choose the engine transformers or auto"),
        ([*SCORED, "evaluate.engine=tgi"], 64, "evaluate.engine: 'tgi' is not one of 'auto', 'vllm' or 'transformers'"),
        (["output_dir=/proc/nowhere"], 66, "output_dir /proc/nowhere: cannot be written"),
    ],
)
def test_mistakes_seen_before_the_ranks_start(run, tmp_path, overrides, code, expected):
    lines = check(run(*TRAIN, f"output_dir={tmp_path / 'run'}", *overrides), code, expected)
    assert len(lines) == 1, lines
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.skipif(is_flash_attn_2_available(), reason="flash-attn is installed")
def test_flash_attention_that_is_not_installed(run, tmp_path):
    wanted = [f"output_dir={tmp_path / 'run'}", "model.attn_implementation=flash_attention_2"]
    said = "model.attn_implementation: flash_attention_2 needs a GPU and flash-attn 2.3.3 or newer, which is not there"
    assert len(check(run(*TRAIN, *wanted), 64, said)) == 1
    dry = run(*TRAIN, *wanted, "--dry-run")
    assert dry.returncode == 0 and f"# on this machine: {said}" in dry.stdout


@pytest.mark.parametrize("program", ["train", "convert", "evaluate", "generate", "plan", "prepare", "report"])
def test_a_python_of_another_environment_is_a_line(program):
    command = [sys.executable, "-S", "-E", f"launch/{program}.py", "--help"]  # sees the standard library alone
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = "environment: No module named 'abba'; activate the one that was made for it: . .venv/bin/activate"
    assert (ended.returncode, ended.stdout, ended.stderr.strip()) == (64, "", said)


def test_a_missing_recipe_and_a_missing_argument(run):
    lines = check(run("launch/train.py", "--recipe", "quickstrat"), 64, "did you mean quickstart?")
    assert len(lines) == 1
    assert run("launch/train.py").returncode == 2


def test_a_port_that_is_taken(run, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ranks = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        check(run(*TRAIN, f"output_dir={tmp_path / 'run'}", **ranks), 71, f"127.0.0.1:{port}", "--master_port")


def test_ranks_that_do_not_divide_the_batch(run):
    lines = check(
        run(*TRAIN, RANK="0", WORLD_SIZE="3", LOCAL_RANK="0"),
        64, "16 cannot be shared by 3 ranks in micro-batches of 8", "the number of ranks can be 1, 2",
    )  # fmt: skip
    assert len(lines) == 1


def broken_base(tmp_path, change):
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    change(base)
    return base


def edit(base, change):
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


def only_a_pickle(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()


def reconfigure(base, **changes):
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda b: edit(b, lambda t: t.pop(NORM)), f"1 tensors of the model are missing, such as {NORM}"),
        (lambda b: edit(b, lambda t: t.update(extra=torch.ones(2))), "have no place in the model, such as extra"),
        (lambda b: edit(b, lambda t: t.update({NORM: torch.ones(7)})), f"{NORM} is (7,) in the file and (128,)"),
        (lambda b: os.truncate(b / "model.safetensors", 9000), "the file is truncated"),
        (lambda b: os.truncate(b / "model.safetensors", 100), "is truncated or no safetensors file"),
        (only_a_pickle, "has only pytorch_model.bin, a pickle"),
        (lambda b: (b / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda b: (b / "config.json").unlink(), "has no config.json"),
        (lambda b: (b / "config.json").write_text("{"), "is not JSON that can be used"),
        (lambda b: reconfigure(b, model_type="unheard"), "its config.json cannot be used"),
        (lambda b: reconfigure(b, hidden_size=64), "in the file and"),
        (lambda b: reconfigure(b, hidden_size="big"), "its config.json cannot be used"),
        (lambda b: reconfigure(b, num_attention_heads=0), "config.json"),
        (lambda b: reconfigure(b, hidden_act="evil"), "does not make a causal LM"),
        (lambda b: edit(b, lambda t: t.update({"lm_head.weight": torch.ones(640, 128)})), "ties weights that differ"),
        (lambda b: edit(b, lambda t: t.update({NORM: t[NORM] * float("nan")})), "base model's own loss is nan"),
        (lambda b: edit(b, lambda t: t.update({NORM: t[NORM].to(torch.float8_e4m3fn)})), "only bf16, fp16 and fp32"),
        (lambda b: reconfigure(b, vocab_size=500), "its model has 500 embeddings"),
        (lambda b: [(b / f"tokenizer.{kind}").unlink() for kind in ("json", "model")], "has no tokenizer: none of"),
    ],
)  # fmt: skip
def test_a_base_that_cannot_be_used(run, tmp_path, change, expected):
    base = broken_base(tmp_path, change)
    result = run(*TRAIN, f"model.name_or_path={base}", f"output_dir={tmp_path / 'run'}")
    check(result, 70 if "nan" in expected else 66, expected)
    assert not list((tmp_path / "run").rglob("step-*"))


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["adapter.target_modules=[q_prj]"], "'q_prj' matches no module of the model; did you mean q_proj?"),
        (["adapter.r1=200"], "200 is above the rank of model.layers.0.self_attn.q_proj, whose weight is (128, 128)"),
        (["deepspeed.zero_optimization.stage3_max_live_parameter=1"], "deepspeed.zero_optimization.stage3_max_live"),
        (["deepspeed.zero_optimization.stage3_max_live_paramters=1"], "did you mean stage3_max_live_parameters?"),
        (
            ["adapter.target_modules=q_proj,v_proj"],
            "is a regular expression for whole names; write a list: [q_proj, v_",
        ),
        (["adapter.init_from=nowhere"], "nowhere: is not an ABBA adapter"),
        (["checkpoint.resume=nowhere"], "nowhere is neither a checkpoint nor a run that has one"),
        (["checkpoint.resume=nowhere" + 300 * "x"], "File name too long; "),
    ],
)
def test_an_adapter_that_does_not_fit(run, tmp_path, overrides, expected):
    code = 66 if "nowhere" in overrides[0] else 64
    command = [*TRAIN, f"output_dir={tmp_path / 'run'}", *overrides]
    check(run(*command), code, expected)
    check(run(*command, "--dry-run"), code, expected)


def test_only_an_earlier_run_is_overwritten_and_only_when_asked(run, tmp_path):
    (tmp_path / "run/checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "run/checkpoints/other").mkdir(parents=True)
    never = ["checkpoint.resume=never", "overwrite_output_dir=true"]
    result = run(*TRAIN, f"output_dir={tmp_path / 'run'}", "checkpoint.resume=never")
    lines = check(result, 66, "holds checkpoints of an earlier run", "overwrite_output_dir=true")
    assert len(lines) == 1
    assert run(*TRAIN, f"output_dir={tmp_path / 'run'}", *never).returncode == 0
    assert not (tmp_path / "run/checkpoints/step-000001/shard").exists()
    assert (tmp_path / "run/checkpoints/other").is_dir()
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run/adapter").mkdir()
    (tmp_path / "run/adapter/thesis.txt").touch()
    result = run(*TRAIN, f"output_dir={tmp_path / 'run'}", *never)
    check(result, 66, "holds something that is no adapter")


def test_the_deepspeed_launcher_shows_it_once_and_keeps_the_code(tmp_path):
    result = deepspeed(*TRAIN, f"output_dir={tmp_path}", "adapter.target_modules=[q_prj]")
    assert result.returncode == 64
    assert (result.stdout + result.stderr).count("did you mean q_proj?") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "command, code, expected",
    [
        (["launch/convert.py", "nowhere", "out"], 66, "nowhere: does not exist"),
        (["launch/convert.py", "recipes", "out"], 66, "recipes: holds no valid checkpoint"),
        (["launch/evaluate.py", "--model", "nowhere/at/all", "--task", "gsm8k", "--output", "out"], 66, "no directory"),
        (["launch/evaluate.py", "--model", str(TINY), "--task", "gsm9k", "--output", "out"], 64, "gsm9k"),
        (
            ["launch/evaluate.py", "--model", str(TINY), "--task", "gsm8k", "--data", "none.jsonl", "--output", "out"],
            65,
            "'none.jsonl': no such file",
        ),
        (
            ["launch/evaluate.py", "--model", str(TINY), "--adapter", "recipes", "--task", "gsm8k",
             "--data", str(STORIES / "test.jsonl"), "--output", "/tmp/abba-unused"],
            66,
            "recipes: is not an ABBA adapter",
        ),
        (["launch/generate.py", "--model", str(TINY), "--adapter", "recipes", "--prompt", "x"], 66, "is not an ABBA"),
        (["launch/generate.py", "--prompt", "x"], 64, "--model: is missing"),
        (
            ["launch/plan.py", "--recipe", "llama70b_gsm8k", "deepspeed.zero_optimization.zero_hpz_partition_size=8"],
            64,
            "8: all 8 ranks are on one node, which needs no copy; set it to 1",
        ),
    ],
)  # fmt: skip
def test_the_other_programs(run, command, code, expected):
    lines = check(run(*command), code, expected)
    assert len(lines) == 1, lines
    assert not (ROOT / "out").exists()


@pytest.mark.parametrize("program", ["plan.py --recipe gsm8k", "train.py --recipe quickstart --dry-run"])
def test_a_reader_that_stops_reading_is_no_mistake(program):
    command = f"{sys.executable} launch/{program} | true"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert "Error" not in ended.stderr, ended.stderr


def test_a_method_of_pefts_without_peft(tmp_path):
    """In a process that starts cold: the warm one has peft."""
    (tmp_path / "sitecustomize.py").write_text('import sys\n\nsys.modules["peft"] = None\n')
    lora = ["adapter.method=lora", "adapter.r1=", "adapter.r2=", "adapter.alpha="]
    result = subprocess.run(
        [sys.executable, *TRAIN, *lora, f"output_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    check(result, 64, "recipe: adapter.method: lora: needs peft, which is not installed: pip install")
    assert "data:" not in result.stdout, "said before anything is read"


@pytest.mark.parametrize("program", ["train", "prepare", "convert", "evaluate", "generate"])
def test_help_shows_examples(run, program):
    result = run(f"launch/{program}.py", "--help")
    assert result.returncode == 0
    assert f"launch/{program}.py " in result.stdout.split("usage:")[1].split("\n", 3)[-1]
