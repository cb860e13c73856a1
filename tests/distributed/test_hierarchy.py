"""Hierarchical partitioning and offload on two nodes of two ranks each: where the base lies, never what is computed.

On CPUs a node is what the launcher's variables say, and host memory is the device's: what these tests cannot show is
traffic between real nodes, pinned memory, and copies from it to a GPU.
"""

import shutil
from types import SimpleNamespace

import pytest

from abba.checkpoint.format import KINDS, ShardReader, list_checkpoints, read_state
from abba.checkpoint.slices import slice_bounds
from abba.sharded.loading import _shares
from abba.storage import SafetensorsFile
from tests.distributed.ranks import probe, read_metrics, run_ranks
from tests.faults.harness import beyond_make_test

WORLD, NODES = 4, 2
HPZ = "deepspeed.zero_optimization.zero_hpz_partition_size=2"
OFFLOAD = "deepspeed.zero_optimization.offload_param={device: cpu, pin_memory: true}"
LAYOUTS = {"plain": [], "hpz": [HPZ], "offload": [OFFLOAD], "hpz-offload": [HPZ, OFFLOAD]}
STEPS = 4
SHORT = ["train.max_steps=4", "checkpoint.save_steps=2"]


@pytest.fixture
def layout(runs):
    """layout(name) -> (run directory, findings of each rank)"""
    return lambda name: runs(f"layout-{name}", WORLD, *SHORT, *LAYOUTS[name], nodes=NODES)


def state_of(run):
    """Masters, moments and losses of a run, each to the bit."""
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    state = read_state(checkpoint)
    with ShardReader(checkpoint, state) as reader:
        tensors = {(kind, name): reader.read(kind, name).tolist() for kind in KINDS for name in state.tensors}
    return state.step, [record["loss"] for record in read_metrics(run)], tensors


@pytest.mark.parametrize("name", ["hpz", pytest.param("offload", marks=beyond_make_test), "hpz-offload"])
def test_losses_and_state_are_those_without_to_the_bit(layout, name):
    assert state_of(layout(name)[0]) == state_of(layout("plain")[0])


@pytest.mark.parametrize("name", LAYOUTS)
def test_factors_are_their_masters_after_every_step(layout, name):
    for rank in layout(name)[1]:
        assert rank["stale_factors"] == [0] * (1 + STEPS)
        assert rank["gathered_factors"][1:] == [0] * (STEPS - 1)
        assert rank["offload_param"] == ("offload" in name)
        assert rank["resident_2d"] == [0] * STEPS
        assert rank["factor_copies"] == 0


def test_each_rank_reads_its_share_and_its_share_of_the_nodes_copy_once(layout, base):
    expected = [0] * WORLD
    copies = 0
    for path in base.glob("*.safetensors"):
        with SafetensorsFile(path) as file:
            for tensor in file.tensors.values():
                part = -(-tensor.numel // WORLD)
                copies += 2 * part
                for rank in range(WORLD):
                    own = set(range(*slice_bounds(tensor.numel, rank, WORLD)))
                    first = rank % 2 * 2 * part  # its node's two ranks hold two parts each
                    copy = set(range(min(first, tensor.numel), min(first + 2 * part, tensor.numel)))
                    expected[rank] += len(own | copy) * tensor.dtype.itemsize
    found = layout("hpz")[1]
    assert [rank["bytes_read"] for rank in found] == expected
    assert [rank["copy_elements"] for rank in found] == [copies] * WORLD
    assert [rank["copy_elements"] for rank in layout("plain")[1]] == [0] * WORLD


def test_a_nodes_copy_is_cut_as_deepspeed_cuts_it():
    for nodes, on_node in [(2, 1), (2, 2), (3, 2), (2, 3), (4, 8)]:
        world = nodes * on_node
        for numel in (1, 2, 7, 24, 100, 101):
            for rank in range(world):
                layout = {"ds_secondary_tensor_num_of_groups": nodes, "ds_secondary_tensor_group_size": on_node}
                parameter = SimpleNamespace(ds_numel=numel, ds_tensor="own", ds_secondary_tensor="copy", **layout)
                (_, start, stop), own = _shares(parameter, rank, world)
                size = (numel + -numel % world) // on_node  # partition_parameters.py, _partition_param_sec
                assert start == min(size * (rank % on_node), numel)
                assert stop - start == max(0, min(numel - size * (rank % on_node), size))
                assert own == ("own", *slice_bounds(numel, rank, world))


def test_a_copy_that_is_not_what_was_read_is_noticed(tmp_path, arguments):
    command = ["tests/distributed/faulty_memory.py", *arguments(tmp_path / "run", HPZ)]
    finished = run_ranks(tmp_path / "ranks", [command] * WORLD, NODES)
    assert [rank.returncode for rank in finished] == [66] * WORLD
    assert "in 2 further copies; the memory of a node is faulty" in finished[0].stderr


# A checkpoint of one layout continues in another: on as many ranks to the bit, on fewer within rounding.
@beyond_make_test
@pytest.mark.parametrize("before, after, world", [("plain", "hpz", 4), ("hpz-offload", "plain", 2)])
def test_a_checkpoint_continues_in_another_layout(tmp_path, layout, arguments, before, after, world):
    run, _ = layout(before)
    resumed = tmp_path / "run"
    (resumed / "checkpoints").mkdir(parents=True)
    shutil.copytree(run / "checkpoints/step-000002", resumed / "checkpoints/step-000002")
    probe(world, tmp_path / "probe", arguments(resumed, *SHORT, *LAYOUTS[after]), nodes=world // 2)
    step, losses, tensors = state_of(resumed)
    whole_step, whole_losses, whole_tensors = state_of(layout("plain")[0])
    if world == WORLD:
        assert (step, losses, tensors) == (whole_step, whole_losses[2:], whole_tensors)
    else:
        assert step == whole_step and losses == pytest.approx(whole_losses[2:], rel=1e-5)


@pytest.mark.parametrize(
    "size, ranks, nodes, said",
    [
        (2, 2, 1, "2: all 2 ranks are on one node, which needs no copy; set it to 1"),
        (3, 4, 2, "3 does not divide the 4 ranks; set it to 1 or 2"),
        (4, 4, 2, "4 is not the 2 ranks of this node; set it to 1 or 2"),
    ],
)
def test_a_size_that_is_not_the_nodes_is_refused_before_anything_is_read(tmp_path, arguments, size, ranks, nodes, said):
    more = f"deepspeed.zero_optimization.zero_hpz_partition_size={size}"
    command = ["launch/train.py", *arguments(tmp_path / "run", more)]
    finished = run_ranks(tmp_path / "ranks", [command] * ranks, nodes)
    assert [rank.returncode for rank in finished] == [64] * ranks
    assert f"recipe: deepspeed.zero_optimization.zero_hpz_partition_size: {said}" in finished[0].stderr
    assert len(finished[0].stderr.strip().splitlines()) == 1 and not list(tmp_path.glob("run/tokens/*"))
