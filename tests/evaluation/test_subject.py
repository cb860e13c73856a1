"""What can be scored: a bare base, an adapter directory, a checkpoint, a run; and what is refused."""

import hashlib
import json
import shutil

import pytest

from abba import save_adapter
from abba.adapter.config import AdapterConfig, BaselineConfig, FullConfig
from abba.adapter.directory import read_description
from abba.checkpoint.convert import Form, convert
from abba.errors import AbbaError, CheckpointError, RecipeError
from abba.evaluation.subject import opened
from abba.hub import HubRepository
from abba.storage import SafetensorsFile
from tests import warm
from tests.checkpoint.made import linears, write_checkpoint
from tests.distributed.ranks import STORIES, TINY
from tests.evaluation.made import adapted

MODULES = linears(hidden=128, mlp=352, kv=128, layers=4)
CONFIG = AdapterConfig(4, 3, 8.0)


def fingerprint(base=TINY):
    return {"model": {"config": hashlib.sha256((base / "config.json").read_bytes()).hexdigest()}}


def trained(run, step=4, prompt="alpaca", config=CONFIG, modules=MODULES, **state):
    state = {"base_model": str(TINY), "fingerprint": fingerprint(), "recipe": {"data": {"prompt": prompt}}, **state}
    return write_checkpoint(run / "checkpoints", config, modules, step, **state)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("subject") / "adapter"
    save_adapter(adapted()[0], directory)
    return directory


def subject(given, model=None, prompt=None, any_base=False, say=None):
    return opened(model, None, given, prompt, any_base, say or (lambda line: None))


def test_a_bare_base_and_an_adapter_directory(adapter):
    with subject(None, str(TINY)) as bare:
        assert (bare.base, bare.adapter, bare.prompt, bare.step) == (TINY, None, "alpaca", None)
        assert bare.contents()["adapter_content"] is None
    with subject(adapter, str(TINY)) as own:
        assert (own.base, own.adapter, own.given) == (TINY, adapter, adapter)
        assert own.contents()["adapter_content"] and own.contents()["base_content"] == bare.contents()["base_content"]


def test_a_run_is_its_newest_valid_checkpoint_on_its_own_base(tmp_path):
    trained(tmp_path / "run", 2)
    newest = trained(tmp_path / "run", 4)
    said = []
    with subject(tmp_path / "run", say=said.append) as run:
        assert (run.base, run.step, run.given) == (TINY, 4, tmp_path / "run")
        assert run.adapter.is_dir() and f"{newest}, converted" in said[0]
        kept, contents = run.adapter, run.contents()
    assert not kept.exists(), "what is made for the evaluation ends with it"
    with subject(newest) as checkpoint:
        assert checkpoint.step == 4 and checkpoint.contents() == contents, "the same again, wherever it lies"
    with subject(tmp_path / "run/checkpoints/step-000002") as earlier:
        assert earlier.step == 2


def test_the_prompt_is_that_of_the_training(tmp_path):
    trained(tmp_path / "run", prompt="plain")
    with subject(tmp_path / "run") as run:
        assert run.prompt == "plain"
    with subject(tmp_path / "run", prompt="plain") as run:
        assert run.prompt == "plain"
    refused(RecipeError, r"prompt alpaca: .*run was trained with the prompt plain", tmp_path / "run", prompt="alpaca")
    with subject(None, str(TINY), prompt="plain") as bare:
        assert bare.prompt == "plain"


def test_a_prompt_that_nothing_records_is_the_users(adapter):
    """Adapters of save_adapter, or of checkpoints that DeepSpeed itself wrote, remember no recipe."""
    for prompt, taken in (("plain", "plain"), ("chat", "chat"), ("alpaca", "alpaca"), (None, "alpaca")):
        said = []
        with subject(adapter, str(TINY), prompt, say=said.append) as own:
            assert own.prompt == taken
        assert [line.startswith("prompt: alpaca, because ") for line in said] == [True] * (prompt is None)


def refused(error, said, given, **how):
    with pytest.raises(error, match=said) as refusal, subject(given, **how):
        pass
    assert "\n" not in str(refusal.value)


def test_a_run_of_another_method_is_its_own_form(tmp_path):
    trained(tmp_path / "run", prompt="plain", config=BaselineConfig("dora", 8, 16.0))
    with subject(tmp_path / "run") as run:
        assert (run.step, run.prompt, read_description(run.adapter).format) == (4, "plain", "dora")
        assert run.contents()["adapter_content"]


def test_a_model_that_was_trained_whole_is_scored_as_a_model(tmp_path):
    with SafetensorsFile(TINY / "model.safetensors") as file:
        tensors = {name: stored.shape for name, stored in file.tensors.items()}
    run, model = tmp_path / "run", tmp_path / "run/model"
    checkpoint = trained(run, prompt="plain", config=FullConfig(), modules={}, tensors=tensors)
    refused(CheckpointError, "run: was trained whole and has no adapter; score the model .*--model RUN/model", run)
    convert(checkpoint, model, Form(base=TINY))
    refused(CheckpointError, "is a whole model and no adapter; score it with --model .*run/model", model)
    with subject(None, str(model)) as whole:
        assert (whole.base, whole.adapter, whole.prompt, whole.step) == (model, None, "plain", 4)
    refused(RecipeError, "prompt alpaca: .*model was trained with", None, model=str(model), prompt="alpaca")


def test_an_adapter_of_another_base_is_refused_unless_it_is_meant(tmp_path):
    shutil.copytree(TINY, tmp_path / "other")
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "other/config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    trained(tmp_path / "run")
    said = "was trained on .*tiny-llama, whose config.json is not that of .*other; give that base with --model"
    refused(CheckpointError, said, tmp_path / "run", model=str(tmp_path / "other"))
    with subject(tmp_path / "run", str(tmp_path / "other"), any_base=True) as run:
        assert run.base == tmp_path / "other"
    shutil.copytree(TINY, tmp_path / "moved")
    with subject(tmp_path / "run", str(tmp_path / "moved")) as run:
        assert run.base == tmp_path / "moved", "a base may move"


@pytest.mark.parametrize("model", [None, "o/m"])
def test_the_base_has_the_revision_of_the_training(tmp_path, monkeypatch, model):
    """The cache may hold another one as main, or none."""
    cached = {("o/m", "abc"): TINY}
    monkeypatch.setattr(HubRepository, "find", lambda self: cached.get((self.name, self.revision)))
    trained(tmp_path / "run", base_model="o/m", recipe={"model": {"name_or_path": "o/m", "revision": "abc"}})
    with subject(tmp_path / "run", model) as run:
        assert run.base == TINY
    cached["o/other", None] = TINY
    with subject(tmp_path / "run", "o/other") as run:
        assert run.base == TINY, "another repository has other revisions"
    cached.clear()
    refused(CheckpointError, r"o/m --revision abc", tmp_path / "run", model=model)


def test_what_is_none_of_them_is_one_line(tmp_path, adapter):
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    damaged = trained(tmp_path / "damaged")
    shard = next(damaged.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "file").write_text("x")
    for given in (tmp_path / "nowhere", tmp_path, tmp_path / "file"):
        refused(CheckpointError, "is not an ABBA adapter, a checkpoint or a run: it has no abba_config.json", given)
    refused(CheckpointError, "holds no valid checkpoint", tmp_path / "empty")
    refused(CheckpointError, "holds no valid checkpoint", tmp_path / "damaged")
    refused(AbbaError, "shard-", damaged)
    refused(RecipeError, "--model: is missing; give the base", None)
    refused(RecipeError, "--any-base: is of an --adapter, .* leave it out$", None, model=str(TINY), any_base=True)
    shutil.copytree(adapter, tmp_path / "unknown")
    description = json.loads((adapter / "abba_config.json").read_text())
    (tmp_path / "unknown/abba_config.json").write_text(json.dumps({**description, "base_model": None}))
    refused(RecipeError, "--model: is missing, and .*unknown does not say which base", tmp_path / "unknown")


def test_the_program_scores_a_run_and_refuses_one_that_cannot_be_read(tmp_path):
    trained(tmp_path / "run")
    score = ["launch/evaluate.py", "--task", "gsm8k", "--data", str(STORIES / "test.jsonl"), "--limit", "2",
             "--max-new-tokens", "4", "--adapter", str(tmp_path / "run"),
             "--output", str(tmp_path / "out")]  # fmt: skip
    finished = warm.run(tmp_path / "program", *score)
    assert finished.returncode == 0, finished.stderr
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert (scores["adapter"], scores["step"], scores["model"]) == (str(tmp_path / "run"), 4, str(TINY))
    (tmp_path / "run/checkpoints/step-000004/manifest.json").unlink()
    finished = warm.run(tmp_path / "unreadable", *score)
    assert finished.returncode == 66 and finished.stderr.count("\n") == 1, finished.stderr


@pytest.mark.parametrize(
    "command, said",
    [
        (["evaluate.py", "--task", "gsm8k", "--output", "out", "--any-base"], "--any-base: is of an --adapter"),
        (["generate.py", "--prompt", "Hello", "--any-base"], "--any-base: is of an --adapter"),
        (["evaluate.py", "--task", "lm-eval:x", "--output", "out", "--prompt", "plain"], "own prompts; leave --prompt"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(tmp_path, command, said):
    program, *options = command
    options = [str(tmp_path / "out") if option == "out" else option for option in options]
    finished = warm.run(tmp_path / "program", f"launch/{program}", *options, "--model", str(TINY))
    assert finished.returncode == 64 and said in finished.stderr, finished.stderr
    assert finished.stderr.count("\n") == 1 and not (tmp_path / "out").exists()
