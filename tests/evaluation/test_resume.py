"""An evaluation that is killed at any row, or shared by ranks, ends with the same bytes as one that is not."""

import json
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import abba.evaluation.kept
import abba.evaluation.subject
from abba import save_adapter
from abba.errors import CheckpointError, RankLostError
from abba.evaluation.kept import Kept, batches_by_length
from abba.evaluation.score import evaluate
from abba.evaluation.subject import Subject
from abba.sharded.ranks import Ranks
from tests import warm
from tests.distributed.ranks import STORIES, TINY, free_port
from tests.evaluation.made import adapted, answering
from tests.faults.harness import TRIALS, chance

ROWS, POINTS = 24, ("before", "half", "after", "half", "after", "grade", "between")
KILLS = 20 if TRIALS >= 100 else min(TRIALS, 5)
SETTINGS = {"task": "gsm8k", "max_new_tokens": 40}


def command(output):
    return ["--model", str(TINY), "--task", "gsm8k", "--data", str(STORIES / "test.jsonl"), "--limit", str(ROWS),
            "--max-new-tokens", "40", "--batch-size", "4", "--output", str(output)]  # fmt: skip


def start(directory, output, world=1, killed=None):
    """As many ranks as `world`, as a launcher starts them; rank, row and point of the one that is killed."""
    programs = []
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(free_port())}
    for rank in range(world):
        dies = killed is not None and killed[0] == rank
        program = ["tests/evaluation/killed.py", *map(str, killed[1:])] if dies else ["launch/evaluate.py"]
        variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        programs.append(warm.Program(directory / f"rank-{rank}", [*program, *command(output)], variables))
    return programs


def ended(programs):
    try:
        return [program.wait() for program in programs]
    finally:
        for program in programs:
            program.kill()


def result(output):
    return [(output / name).read_bytes() for name in ("scores.json", "generations.jsonl")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("uninterrupted")
    (finished,) = ended(start(root / "program", root / "out"))
    assert finished.returncode == 0, finished.stderr
    return result(root / "out")


@pytest.mark.timeout(3600)
def test_killed_at_a_random_row_it_ends_the_same(tmp_path, uninterrupted, trial):
    random = chance("evaluation")
    for number in range(KILLS):
        world = 1 + number % 2
        point, victim = random.choice(POINTS), random.randrange(world)
        if point in ("grade", "between"):
            victim = 0
        row = random.randint(1, ROWS // world)
        output = tmp_path / f"out-{number}"
        with trial("evaluation killed at a random row"):
            programs = start(tmp_path / f"killed-{number}", output, world, (victim, row, point))
            programs[victim].process.join(120)
            assert programs[victim].process.exitcode == -9, (number, point)
            for program in programs:  # as a launcher does
                program.kill()
                program.process.join()
            assert not (output / "scores.json").exists()
            finished = ended(start(tmp_path / f"again-{number}", output, world))
            assert [rank.returncode for rank in finished] == [0] * world, finished[0].stderr
            assert result(output) == uninterrupted, (number, world, victim, row, point)


def test_two_ranks_share_the_rows_and_score_as_one(tmp_path, uninterrupted):
    finished = ended(start(tmp_path / "two", tmp_path / "out", world=2))
    assert [rank.returncode for rank in finished] == [0, 0], finished[1].stderr
    assert "2 ranks take every 2th batch" in finished[0].stdout and not finished[1].stdout
    assert result(tmp_path / "out") == uninterrupted
    rows = [(tmp_path / f"out/generated/rank-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert len(rows[0]) == len(rows[1]) == ROWS / 2


def kept(output, ranks=None, replace=False, **changes):
    return Kept(output, {**SETTINGS, **changes}, ranks or Ranks(), replace)


def test_a_full_disk_is_a_line(tmp_path):
    begun = kept(tmp_path / "out")
    (tmp_path / "out/generated/rank-0.jsonl").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match="rank-0.jsonl: cannot be written: No space left on device; .*goes on"):
        begun.add(0, "text")
    assert not begun.texts


def test_what_is_kept_is_read_again_and_half_a_line_is_dropped(tmp_path):
    first = kept(tmp_path)
    first.add(3, "three\n♥")
    first.add(1, "one")
    with (tmp_path / "generated/rank-0.jsonl").open("ab") as file:
        file.write(b'{"row": 2, "gener')
    again = kept(tmp_path)
    assert again.texts == {3: "three\n♥", 1: "one"}
    again.add(2, "two")
    assert kept(tmp_path).texts == {3: "three\n♥", 1: "one", 2: "two"}


def test_a_batch_of_which_a_row_is_missing_is_generated_whole(tmp_path):
    batches = batches_by_length([[0] * length for length in (5, 1, 4, 2, 3)], 2)
    assert batches == [[2, 0], [3, 4], [1]]
    first = kept(tmp_path)
    for row in (1, 2, 0, 4):
        first.add(row, "")
    assert first.share_of(batches) == [[3, 4]]
    assert kept(tmp_path, Ranks(1, 2)).share_of(batches) == [[3, 4]], "of two ranks: every second batch of all"
    assert kept(tmp_path, Ranks(0, 2)).share_of(batches) == []


def test_unfinished_generations_of_other_settings_are_refused_by_name(tmp_path):
    kept(tmp_path).add(0, "x")
    with pytest.raises(CheckpointError, match="max_new_tokens was 40, is 50; set it back, choose another") as error:
        kept(tmp_path, max_new_tokens=50)
    assert "\n" not in str(error.value) and kept(tmp_path).texts == {0: "x"}
    replaced = kept(tmp_path, replace=True, max_new_tokens=50)
    assert replaced.texts == {} and "discarded: max_new_tokens was 40, is 50" in replaced.discarded


def test_finished_ones_of_other_settings_are_replaced_with_a_line(tmp_path):
    kept(tmp_path).add(0, "x")
    (tmp_path / "scores.json").write_text("{}")
    again = kept(tmp_path, task="math")
    assert again.texts == {} and "task was gsm8k, is math" in again.discarded
    assert not (tmp_path / "scores.json").exists()


def test_generations_of_unknown_settings_are_not_adopted(tmp_path):
    kept(tmp_path).add(0, "another model's")
    (tmp_path / "generated/mine").touch()
    (tmp_path / "generated/settings.json").unlink()  # what a kill while they were being discarded can leave
    again = kept(tmp_path)
    assert again.texts == {} and "nothing says how they were made" in again.discarded
    assert kept(tmp_path).discarded is None and (tmp_path / "generated/mine").exists()


def test_a_damaged_line_is_named(tmp_path):
    kept(tmp_path).add(0, "x")
    with (tmp_path / "generated/rank-0.jsonl").open("ab") as file:
        file.write(b"\0\0\0\n")
    with pytest.raises(CheckpointError, match=r"rank-0\.jsonl: line 2 is damaged: .*; delete the file"):
        kept(tmp_path)


def test_ranks_that_wait_in_vain_say_for_what(tmp_path, monkeypatch):
    monkeypatch.setattr(abba.evaluation.kept, "START_SECONDS", 0.2)
    monkeypatch.setattr(abba.evaluation.kept, "STALL_SECONDS", 0.2)
    with pytest.raises(RankLostError, match="rank 0 has not written the settings"):
        kept(tmp_path, Ranks(1, 2))
    main = kept(tmp_path, Ranks(0, 2))
    main.add(0, "x")
    started = time.monotonic()
    with pytest.raises(RankLostError, match="1 of 2 rows are missing"):
        main.gather(2)
    assert time.monotonic() - started < 60
    kept(tmp_path, Ranks(1, 2)).add(1, "y")
    assert main.gather(2) == ["x", "y"]


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_a_merge_of_few_modules_is_another_base(tmp_path, monkeypatch, place):
    """Of every tensor something is looked at, wherever in its file it lies."""
    monkeypatch.setattr(abba.evaluation.subject, "SAMPLE", 4)
    before = Subject(TINY, None).contents()
    for name, weight in load_file(TINY / "model.safetensors").items():
        flat = weight.flatten()
        flat[{"start": 0, "middle": len(flat) // 2, "end": -1}[place]] += 1
        shutil.copytree(TINY, tmp_path / name)
        save_file(
            load_file(TINY / "model.safetensors") | {name: flat.view_as(weight)}, tmp_path / name / "model.safetensors"
        )
        assert Subject(tmp_path / name, None).contents() != before, name


def test_the_settings_are_those_that_decide_the_generations(tmp_path, monkeypatch):
    """Another base, adapter, data, prompt or number of tokens is another evaluation; a moved base is the same."""
    shutil.copytree(TINY, tmp_path / "moved")
    shutil.copytree(TINY, tmp_path / "changed")
    with (tmp_path / "changed/model.safetensors").open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"\x11")
    save_adapter(adapted()[0], tmp_path / "adapter")
    answering(monkeypatch, ["#### 1"] * 3)

    def settings(base=TINY, adapter=None, prompt="alpaca", limit=2, max_new_tokens=2, batch_size=2):
        output = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        sizes = {"limit": limit, "batch_size": batch_size, "max_new_tokens": max_new_tokens}
        task = (Subject(base, adapter, prompt), "gsm8k", str(STORIES / "test.jsonl"))
        evaluate(*task, output, **sizes, dtype=torch.bfloat16, say=lambda _: None)
        return json.loads((output / "generated/settings.json").read_text())

    plain = settings()
    assert settings() == plain == settings(base=tmp_path / "moved")
    different = [{"base": tmp_path / "changed"}, {"adapter": tmp_path / "adapter"}, {"prompt": "plain"}, {"limit": 3}]
    for changes in (*different, {"max_new_tokens": 3}, {"batch_size": 1}):
        assert settings(**changes) != plain, changes
