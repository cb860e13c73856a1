"""Stopped and continued at any step, at any world size: the same run."""

import json
import shutil

import pytest

from abba.base_model import choose_dtype
from abba.checkpoint.format import ShardReader, list_checkpoints, read_state
from tests.faults.conftest import make_base
from tests.faults.harness import STEPS, TRIALS, Lab, beyond_make_test, some

pytestmark = pytest.mark.timeout(7200)
EVERY_STEP = ["checkpoint.save_steps=1", f"checkpoint.save_total_limit={STEPS}"]
PAIRS = [(1, 2), (2, 1), (1, 4), (4, 1), (2, 4), (4, 2)]


def copy_at(lab, source, step, target):
    """A run directory as it was right after `step`, when only that checkpoint is left."""
    old, new = lab.output(source), lab.output(target)
    (new / "checkpoints").mkdir(parents=True)
    shutil.copytree(old / f"checkpoints/step-{step:06d}", new / f"checkpoints/step-{step:06d}")
    shutil.copy(old / "metrics.jsonl", new)
    shutil.copy(lab.root / source / "starts", lab.root / target)


@pytest.fixture(scope="module")
def every_step(lab, reference):
    lab.complete("every-step", 2, *EVERY_STEP)
    assert lab.outcome("every-step") == reference()
    return "every-step"


@pytest.mark.parametrize("world", [2, 4] if TRIALS >= 10 else [2])
def test_the_same_recipe_twice_is_the_same(lab, reference, trial, world):
    for number in range(max(1, min(TRIALS, 100) // 10)):
        with trial(f"C1 the same recipe twice on {world} ranks"):
            assert lab.complete(f"twice-{world}-{number}", world) == reference(world)


# 7 is the border of an epoch of 56 rows, 23 leaves one step.
@pytest.mark.parametrize("step", some(list(range(1, STEPS)), [7, 23]))
def test_continued_after_any_step(lab, reference, trial, every_step, step):
    with trial("C2 saved and continued at every step"):
        copy_at(lab, every_step, step, f"from-{step}")
        assert lab.complete(f"from-{step}") == reference()


def masters(lab, run):
    checkpoint = list_checkpoints(lab.output(run) / "checkpoints")[-1]
    state = read_state(checkpoint)
    with ShardReader(checkpoint, state) as reader:
        return state, {name: reader.read("master", name) for name in state.tensors}


@pytest.fixture(scope="module")
def gentle(toy_base, tmp_path_factory):
    """The reference run at learning rate 1e-3, whose rounding does not grow."""
    return Lab(toy_base, tmp_path_factory.mktemp("gentle"), "train.learning_rate=1e-3")


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 1e-4), ("float32", 1e-6)])
@pytest.mark.parametrize("before, after", some(PAIRS, PAIRS[:1]))
def test_another_world_size(gentle, trial, dtype, limit, before, after):
    with trial(f"C3 another world size, {dtype}"):
        whole, moved, precision = f"{dtype}-{before}", f"{dtype}-{before}-{after}", f"model.dtype={dtype}"
        if not (gentle.root / whole).exists():
            gentle.complete(whole, before, precision, "checkpoint.save_steps=12")
        expected = gentle.outcome(whole)
        copy_at(gentle, whole, 12, moved)
        got = gentle.complete(moved, after, precision)
        assert got.rows == expected.rows and got.step == STEPS
        for (_, ours), (_, theirs) in zip(got.losses, expected.losses, strict=True):
            assert float.fromhex(ours) == pytest.approx(float.fromhex(theirs), rel=1e-3)
        _, there = masters(gentle, whole)
        _, here = masters(gentle, moved)
        difference = max(float((here[name] - there[name]).abs().max()) for name in there)
        print(f"{dtype} {before} -> {after}: masters differ by at most {difference:.1e} after 12 steps")
        assert difference <= limit
        start = sorted((gentle.root / moved / "starts").read_text().splitlines())[-1]
        said = (gentle.root / start / "rank-0/stdout").read_text()
        assert f"{before} rank(s) then, {after} now: the same rows in the same order" in said


def test_a_world_size_that_does_not_divide_the_batch_is_refused(lab, trial, every_step):
    with trial("C3 a world size that does not divide the global batch"):
        finished, _ = lab.run("every-step", 3)
        assert {ended.returncode for ended in finished} == {64}
        assert "cannot be shared by 3 ranks" in finished[0].stderr


@beyond_make_test
def test_dropout_continues_too(tmp_path, trial):
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    lab = Lab(base, tmp_path, "train.gradient_checkpointing=non_reentrant", "train.max_steps=10")
    with trial("C2 with attention_dropout 0.1"):
        expected = lab.complete("whole")
        finished, _ = lab.run("hurt", 2, [{"rank": 1, "at": "step 6", "do": "kill"}])
        assert finished[0].returncode == 71
        assert lab.complete("hurt") == expected
        (base / "config.json").write_text(json.dumps(config))
        assert lab.complete("without").losses != expected.losses, "or there was no dropout"


DTYPE, OTHER = ("bfloat16", "float32") if choose_dtype("auto")[0] == "bfloat16" else ("float32", "bfloat16")
CHANGES = [
    (["train.learning_rate=5e-3"], "train.learning_rate was 0.01, is 0.005"),
    (["train.global_batch_size=4"], "train.global_batch_size was 8, is 4"),
    (["train.seed=1"], "train.seed was 0, is 1"),
    (["data.max_rows=59"], "data.tokens, the hash of the rows and how they are tokenised, was"),
    (["adapter.r1=3"], "adapter.r1 was 4, is 3"),
    ([f"model.dtype={OTHER}"], f"model.dtype was '{DTYPE}', is '{OTHER}'"),
]


@pytest.mark.parametrize("changes, said", some(CHANGES, CHANGES[::3]))
def test_a_changed_field_is_refused_by_name(lab, trial, every_step, changes, said):
    with trial("C5 a changed recipe or dataset"):
        copy_at(lab, every_step, 12, f"changed-{changes[0]}")
        finished, _ = lab.run(f"changed-{changes[0]}", 1, None, *changes)
        assert finished[0].returncode == 66 and finished[0].stderr.count("\n") == 1
        assert said in finished[0].stderr and "checkpoint.allow_changed" in finished[0].stderr


def test_another_base_is_refused_and_allowed_when_the_recipe_says_so(lab, trial, every_step, tmp_path):
    with trial("C5 another base"):
        base = make_base(tmp_path / "base", seed=1)
        copy_at(lab, every_step, 20, "other-base")
        changed = [f"model.name_or_path={base}"]
        finished, _ = lab.run("other-base", 1, None, *changed)
        said = "model.weights, the checksum of the base's weights, was"
        assert finished[0].returncode == 66 and said in finished[0].stderr
        wrong, _ = lab.run("other-base", 1, None, *changed, "checkpoint.allow_changed=[model.wights]")
        assert wrong[0].returncode == 64 and "no field 'model.wights'" in wrong[0].stderr
        allowed = [*changed, "checkpoint.allow_changed=[model.weights]", "train.logging_steps=1"]
        finished, _ = lab.run("other-base", 1, None, *allowed)
        assert finished[0].returncode == 0, finished[0].stderr
        said = [line for line in finished[0].stdout.splitlines() if "as checkpoint.allow_changed allows" in line]
        assert len(said) == 1 and said[0].startswith("checkpoint: model.weights, the checksum")


def test_it_goes_on_from_another_runs_checkpoint(lab, reference, trial, every_step):
    with trial("C2 checkpoint.resume=PATH"):
        where = lab.output(every_step) / "checkpoints/step-000016"
        finished, _ = lab.run("branch", 2, [{"rank": 1, "at": "step 22", "do": "kill"}], f"checkpoint.resume={where}")
        assert finished[0].returncode == 71 and lab.checkpoints("branch") == ["step-000020"]
        finished, _ = lab.run("branch", 2, None, f"checkpoint.resume={where}")
        assert [ended.returncode for ended in finished] == [0, 0]
        assert "was for the first start" in finished[0].stdout and "step-000020, step 20" in finished[0].stdout
        assert lab.outcome("branch").state == reference().state
        inside, _ = lab.run("branch", 1, None, f"checkpoint.resume={lab.output('branch') / 'checkpoints/step-000020'}")
        assert inside[0].returncode == 66 and "to go back to an older one" in inside[0].stderr


def test_a_finished_run_is_only_finished_again(lab, trial, every_step):
    with trial("C2 a finished run"):
        adapter = lab.output(every_step) / "adapter/adapter_model.safetensors"
        before = adapter.read_bytes()
        shutil.rmtree(adapter.parent)
        finished, _ = lab.run(every_step, 1)
        assert finished[0].returncode == 0, finished[0].stderr
        assert "nothing is left to train" in finished[0].stdout and "parameters in" not in finished[0].stdout
        assert adapter.read_bytes() == before
