"""A loss or gradient that is not finite stops every rank before the update, and says where it came from."""

import pytest

from tests import warm
from tests.distributed.ranks import probe, read_metrics, run_ranks

ARGUMENTS = ["checkpoint.save_steps=1", "train.max_steps=4"]


@pytest.mark.parametrize(
    "kind, words", [("loss", "the loss of step 3 on rank 1"), ("gradient", "the gradient of step 3")]
)
def test_not_finite_stops_all_ranks_before_the_update(tmp_path, arguments, kind, words):
    program = ["tests/distributed/poison.py", kind, *arguments(tmp_path / "run", *ARGUMENTS)]
    finished = run_ranks(tmp_path / "ranks", [[*program], [*program]])
    assert [rank.returncode for rank in finished] == [70, 70], finished[0].stderr
    assert (
        words in finished[0].stderr and "dataset rows" in finished[0].stderr and "Traceback" not in finished[0].stderr
    )
    for rank in finished:
        before, after = (line for line in rank.stdout.splitlines() if line.startswith("masters"))
        assert before == after, "the update must not have happened"
    assert not (tmp_path / "run/checkpoints/step-000003").exists()
    assert (tmp_path / "run/checkpoints/step-000002/manifest.json").is_file()


def test_a_saved_adapter_can_be_started_from(tmp_path, arguments, runs):
    run, _ = runs("world2", 2)
    probe(2, tmp_path / "probe", arguments(tmp_path / "run", f"adapter.init_from={run / 'adapter'}"))
    assert read_metrics(tmp_path / "run")[0]["loss"] < read_metrics(run)[1]["loss"]


def test_ranks_that_wait_for_the_data_learn_that_rank_0_failed(tmp_path, arguments):
    """As under a bare srun, which leaves the others running when one rank exits."""
    command = ["launch/train.py", *arguments(tmp_path / "run", "data.response_field=nothing")]
    finished = run_ranks(tmp_path / "ranks", [command, command])
    assert [rank.returncode for rank in finished] == [65, 65]
    assert "rows have no field 'nothing'" in finished[0].stderr and "rank 0 failed" in finished[1].stderr


def test_ranks_whose_processors_choose_unlike_dtypes_are_refused(tmp_path, arguments):
    command = ["tests/distributed/unlike_ranks.py", *arguments(tmp_path / "run", "model.dtype=auto")]
    finished = run_ranks(tmp_path / "ranks", [command, command])
    assert [rank.returncode for rank in finished] == [64, 64]
    assert "auto is bfloat16 on rank 0 and float32 on rank 1" in finished[0].stderr
    assert "Traceback" not in finished[0].stderr + finished[1].stderr


def test_nothing_of_the_model_is_held_when_it_is_scored(arguments, tmp_path):
    ended = warm.run(
        tmp_path / "log", "tests/distributed/released.py", *arguments(tmp_path / "run", "train.max_steps=1")
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "\nheld 0\n" in ended.stdout
