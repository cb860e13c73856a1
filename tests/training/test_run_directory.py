"""A run's directory: starts that are counted, forgiven and cleaned up after; and what is refused before it is lost."""

import contextlib
import json
import re

import pytest

from abba.adapter.config import AdapterConfig
from abba.errors import CheckpointError, NoProgressError, RankLostError
from abba.training.finish import finish
from abba.training.resume import refuse_no_start
from abba.training.run_directory import STARTS, RunDirectory
from tests.checkpoint.made import write_checkpoint


def crash(directory, error=RuntimeError):
    with pytest.raises(error), directory.held("auto", False, None, lambda line: None):
        raise error("put in by the test")


def test_three_crashes_are_counted_and_what_a_user_mends_is_not(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    for _ in range(5):
        crash(directory, CheckpointError)
    for _ in range(3):
        crash(directory)
    with pytest.raises(NoProgressError, match="3 starts in a row"), directory.held("auto", False, None, print):
        pass
    (tmp_path / "run/failures").mkdir()
    (tmp_path / "run/failures/x-rank-00000.json").write_text("")
    with pytest.raises(NoProgressError, match="cannot be read"), directory.held("auto", False, None, print):
        pass
    (tmp_path / "run/checkpoints/step-000004").mkdir(parents=True)  # progress
    for _ in range(3):
        crash(directory, RankLostError)
    with pytest.raises(NoProgressError, match="after step-000004"), directory.held("auto", False, None, print):
        pass
    (tmp_path / "run/starts.json").write_text("")  # cut off by a kill
    with directory.held("auto", False, None, print):
        pass
    assert not (tmp_path / "run/starts.json").exists()


def test_starts_that_are_stopped_while_scoring_are_no_loop(tmp_path):
    """The steps are done, so that no new checkpoint comes; the score goes on with each start."""
    directory = RunDirectory(tmp_path / "run")
    last = write_checkpoint(directory.checkpoints, AdapterConfig(r1=2, r2=2), {"model.layers.0.mlp.up_proj": (8, 6)})
    for _ in range(2 * STARTS):
        with contextlib.suppress(SystemExit), directory.held("auto", False, None, print):
            finish(last, directory, tmp_path, print)
            directory.release(uncount=False)  # as the watch does
            raise SystemExit


def test_a_run_does_not_replace_what_it_starts_from(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    for name in ("adapter", "model", "checkpoints/step-000004"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run/adapter")
    said = "lies in .*/run/adapter, which this run replaces; choose another output_dir"
    for adapter in (tmp_path / "run/adapter", tmp_path / "link", tmp_path / "run/adapter/deeper"):
        with pytest.raises(CheckpointError, match=f"adapter.init_from: {adapter} {said}"):
            refuse_no_start("org/base", str(adapter), "never", directory)
    with pytest.raises(CheckpointError, match="model.name_or_path: .* lies in .*/run/model"):
        refuse_no_start(str(tmp_path / "run/model"), None, "never", directory)
    refuse_no_start(str(tmp_path / "run/base"), None, "never", directory)


@pytest.mark.parametrize(
    "first, steps, save_steps, keep, present, said",
    [
        (0, 100, None, 2, 0, "a checkpoint and the adapter need 1.60 GB, 0 kB are free; make room, or choose"),
        (0, 100, 50, 2, 0, "2 checkpoints and the adapter need 2.80 GB, 0 kB are free; make room, lower checkpoint."),
        (0, 100, 30, 2, 0, "3 checkpoints"),
        (0, 100, 50, 1, 0, "2 checkpoints and the adapter need 2.80 GB, 0 kB are free; make room, or choose"),
        (60, 100, 30, 2, 2, "a checkpoint"),
        (50, 100, 50, 2, 0, "a checkpoint"),
    ],
)
def test_a_disk_too_small_is_seen_before_the_first_step(
    tmp_path, monkeypatch, first, steps, save_steps, keep, present, said
):
    monkeypatch.setattr("abba.training.run_directory.free_bytes", lambda path: 0)
    for step in range(present):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=re.escape(f"no space: {said}")):
        RunDirectory(tmp_path).refuse_too_small(10**8, first, steps, save_steps, keep)


def test_what_killed_starts_left_is_removed_and_what_others_left_is_not(tmp_path):
    directory, said = RunDirectory(tmp_path / "run"), []
    for name in (
        ".adapter.tmp-12/x",
        ".lock.json.abc",
        ".write-test-3",
        "mine.txt",
    ):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).touch()
    with directory.held("auto", False, None, said.append):
        pass
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"mine.txt"}
    assert len(said) == 3


def test_damaged_lines_of_metrics_are_dropped_with_a_word(tmp_path):
    directory, said = RunDirectory(tmp_path / "run"), []
    (tmp_path / "run").mkdir()
    lines = [json.dumps({"step": step}) for step in (1, 2, 3, 4)]
    written = [line.encode() for line in [*lines[:2], '{"step": 2, "lo', "[1]", *lines[2:], '{"step": 5']]
    flipped = bytes([written[0][0] ^ 128]) + written[0][1:]
    directory.metrics.write_bytes(b"\n".join([flipped, *written]))
    directory.begin({}, 3, said.append)
    assert directory.metrics.read_text().splitlines() == lines[:3]
    assert said == ["metrics.jsonl: WARNING: dropped 3 damaged lines of an earlier start"]
    for name in ("evaluation", "score", "mine"):
        (tmp_path / "run" / name).mkdir()
    directory.begin({}, 0, said.append)
    assert directory.metrics.read_bytes() == b""
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"recipe.yaml", "metrics.jsonl", "mine"}, "no score of before"


@pytest.mark.parametrize("name", ["adapter", "evaluation", "score"])
def test_what_no_run_here_has_made_is_not_replaced(tmp_path, name):
    directory = RunDirectory(tmp_path)
    (tmp_path / name).mkdir()
    with (
        pytest.raises(CheckpointError, match=f"holds {name} and no checkpoint"),
        directory.held("auto", False, None, print),
    ):
        pass
    with directory.held("never", True, None, print):
        pass


def test_a_recipe_that_no_run_has_written_is_not_replaced(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.recipe.write_text("extends: gsm8k  # mine\n")
    refused = pytest.raises(CheckpointError, match=r"a recipe\.yaml that no run has written")
    with refused, directory.held("auto", False, None, print):
        pass
    directory.recipe.rename(tmp_path / "mine.yaml")
    for _ in range(2):  # its own is
        with directory.held("auto", False, None, print):
            directory.begin({}, 0, print)


def test_metrics_that_cannot_be_read_are_named(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.metrics.symlink_to("/proc/self/mem")  # reading its start fails, for root too
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: Input/output error; move it away"):
        directory.held_out_steps()


def test_a_requeued_job_does_not_discard_what_it_has_saved(tmp_path):
    """SLURM starts it with the same arguments; only the first start of a job may begin anew."""
    directory, never = RunDirectory(tmp_path / "run"), ("never", "7")
    (tmp_path / "run").mkdir()
    assert directory.resume_of(*never, 0) == "never"
    assert directory.resume_of(*never, 1) == "never"  # requeued before it began
    directory.begin({}, 0, print, "7", 1)
    assert directory.resume_of(*never, 1) == "never"  # a second command in the same allocation
    assert directory.resume_of(*never, 2) == directory.resume_of(*never, 3) == "auto"
    assert directory.resume_of("runs/other", "7", 2) == "runs/other"  # from which it may not have saved yet
    assert directory.resume_of("never", "8", 2) == directory.resume_of("never", None, 2) == "never"
    directory.begin({}, 0, print)
    assert directory.resume_of(*never, 2) == "never"


def test_starts_that_are_stopped_before_a_save_are_counted(tmp_path):
    """A job that loads longer than its time limit would requeue itself for ever."""
    directory = RunDirectory(tmp_path / "run")
    for _ in range(3):
        with directory.held("auto", False, None, lambda line: None):
            directory.release(uncount=False)  # as the watch does at a signal outside the steps
            (directory.path / "starts.json").rename(directory.path / "kept")  # what follows would be a good end
        (directory.path / "kept").rename(directory.path / "starts.json")
    with pytest.raises(NoProgressError), directory.held("auto", False, None, lambda line: None):
        pass
