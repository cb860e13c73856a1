"""Checkpoints as files: slices join to the tensor, damage is named, the newest valid one is found."""

import errno
import json
import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from abba.adapter.config import AdapterConfig
from abba.adapter.files import read_factors
from abba.checkpoint import format
from abba.checkpoint.convert import convert
from abba.checkpoint.slices import overlapping, slice_bounds
from abba.checkpoint.source import find_checkpoint
from abba.errors import CheckpointError
from abba.storage import SafetensorsFile, Spec, hash_file, read_json, write_safetensors

SHAPES = {"m.A1": (3, 5), "m.B1": (7, 3), "m.A2": (2, 5), "m.B2": (7, 2)}


def values(kind):
    generator = torch.Generator().manual_seed(format.KINDS.index(kind))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def write_checkpoint(root, step=4, world=2):
    final = format.step_directory(root, step)
    temporary = format.temporary_directory(final)
    temporary.mkdir(parents=True)
    entries = []
    for rank in range(world):
        slices = []
        for kind in format.KINDS:
            for name, tensor in values(kind).items():
                start, stop = slice_bounds(tensor.numel(), rank, world)
                slices.append((f"{kind}/{name}", tensor.flatten()[start:stop]))
        entries.append(format.write_shard(temporary, rank, world, slices))
    state = {"step": step, "world_size": world, "seed": 0, "base_model": "base", "modules": {"m": (7, 5)}}
    state |= {"adapter": AdapterConfig(3, 2, 4.0, ("m",)).__dict__, "tensors": SHAPES}
    format.commit(final, {**state, "fingerprint": {}, "recipe": {}}, entries)
    return final


@given(numel=st.integers(0, 200), world=st.integers(1, 9), other=st.integers(1, 9))
def test_slices_partition_a_tensor_and_re_slice_at_any_world_size(numel, world, other):
    whole = list(range(numel))
    slices = [whole[slice(*slice_bounds(numel, rank, world))] for rank in range(world)]
    assert [x for part in slices for x in part] == whole
    assert all(len(part) <= -(-numel // world) for part in slices)
    for rank in range(other):
        start, stop = slice_bounds(numel, rank, other)
        pieces = [x for r, low, high in overlapping(numel, world, start, stop) for x in slices[r][low:high]]
        assert pieces == whole[start:stop]


@pytest.mark.parametrize("world", [1, 2, 3, 16])
def test_tensors_come_back_from_any_number_of_shards(tmp_path, world):
    checkpoint = write_checkpoint(tmp_path, world=world)
    format.verify(checkpoint)
    with format.ShardReader(checkpoint, format.read_state(checkpoint)) as reader:
        for kind in format.KINDS:
            for name, tensor in values(kind).items():
                assert torch.equal(reader.read(kind, name), tensor)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_rank_with_no_element_of_a_tensor_reads_none(tmp_path):
    """Ceiling division leaves the last of many ranks nothing of a tensor of few elements."""
    checkpoint = write_checkpoint(tmp_path, world=2)
    name, shape = next(iter(SHAPES.items()))
    bounds = slice_bounds(math.prod(shape), 99, 100)
    assert bounds[0] == bounds[1]
    with format.ShardReader(checkpoint, format.read_state(checkpoint)) as reader:
        assert reader.read_range(format.KINDS[0], name, *bounds).shape == (0,)


@pytest.mark.parametrize("source", ["step-000004", "."])
def test_conversion_yields_the_masters(tmp_path, source):
    write_checkpoint(tmp_path / "checkpoints")
    found = find_checkpoint(tmp_path / "checkpoints" / source, print)
    convert(found, tmp_path / "adapter")
    _, factors = read_factors(tmp_path / "adapter")
    for name, tensor in values("master").items():
        assert torch.equal(getattr(factors["m"], name.removeprefix("m.")), tensor)


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


SHARD = "shard-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda d: flip(d / SHARD, -1), SHARD),
        (lambda d: flip(d / SHARD, 9), SHARD),
        (lambda d: flip(d / "state.json", 20), "state.json"),
        (lambda d: flip(d / "manifest.json", 40), "manifest.json"),
        (lambda d: (d / SHARD).unlink(), SHARD),
        (lambda d: (d / SHARD).write_bytes((d / SHARD).read_bytes()[:-1]), SHARD),
        (lambda d: (d / "extra").touch(), "extra"),
        (lambda d: (d / "manifest.json").unlink(), "manifest.json"),
    ],
)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, damage, named):
    older, newer = write_checkpoint(tmp_path, 4), write_checkpoint(tmp_path, 8)
    damage(newer)
    with pytest.raises(CheckpointError) as error:
        format.verify(newer)
    assert named in str(error.value)
    said = []
    assert format.newest_valid(tmp_path, said.append) == older
    assert len(said) == 1 and named in said[0]


def test_rotation_keeps_the_newest(tmp_path):
    for step in (2, 4, 10, 8):
        write_checkpoint(tmp_path, step)
    format.rotate(tmp_path, 2, 10)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000008", "step-000010"}
    assert [path.name for path in format.list_checkpoints(tmp_path)] == ["step-000008", "step-000010"]


def test_one_that_did_not_verify_is_set_aside_when_its_step_is_saved_again(tmp_path):
    """Also one that comes after it; what lay there under this name from another time goes."""
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step)
    for step in (4, 6):
        (tmp_path / f"step-00000{step}/damage").touch()
        (tmp_path / f"step-00000{step}.damaged").mkdir()
    write_checkpoint(tmp_path, 4)
    assert [path.name for path in format.rotate(tmp_path, 2, 4)] == ["step-000006.damaged"]
    present = {path.name for path in tmp_path.iterdir()}
    assert present == {"step-000002", "step-000004", "step-000004.damaged", "step-000006.damaged"}
    assert all((tmp_path / f"step-00000{step}.damaged/damage").exists() for step in (4, 6))
    format.verify(tmp_path / "step-000004")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.touch()])
def test_a_source_that_is_no_checkpoint_is_refused(tmp_path, make):
    make(tmp_path / "source")
    with pytest.raises(CheckpointError, match="source"):
        find_checkpoint(tmp_path / "source", print)


def test_a_destination_that_would_destroy_something_is_refused(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="overlaps the checkpoint"):
        convert(checkpoint, checkpoint / "adapter")
    for above in (checkpoint, tmp_path, tmp_path.parent):
        with pytest.raises(CheckpointError, match="overlaps the checkpoint"):
            convert(checkpoint, above, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").touch()
    with pytest.raises(CheckpointError, match="holds something that is no adapter"):
        convert(checkpoint, tmp_path / "mine", overwrite=True)
    format.verify(checkpoint)


def test_our_writer_writes_what_the_library_reads(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.randn(2, 0), "d": torch.randn(7).bfloat16()}
    layout = {name: Spec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
    entry = write_safetensors(tmp_path / "x.safetensors", layout, tensors.values(), {"k": "v"})
    assert entry.size == (tmp_path / "x.safetensors").stat().st_size
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == tensors.keys() and all(torch.equal(read[name], tensors[name]) for name in tensors)
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert file.metadata == {"k": "v"}
        assert all(torch.equal(file.read_full(name), tensors[name]) for name in tensors)
        assert torch.equal(file.read("a", 5, 9), tensors["a"].flatten()[5:9])


def test_a_read_that_gives_less_than_asked_is_continued(tmp_path, monkeypatch):
    """As Linux does beyond 2 GiB, and network file systems at any size."""
    preadv, tensor = os.preadv, torch.randn(50)
    write_safetensors(tmp_path / "x.safetensors", {"a": Spec((50,), torch.float32)}, [tensor], {})
    monkeypatch.setattr(os, "preadv", lambda file, buffers, offset: preadv(file, [buffers[0][:7]], offset))
    with SafetensorsFile(tmp_path / "x.safetensors") as file:
        assert torch.equal(file.read("a", 3, 49), tensor[3:49])


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 20, -1])
def test_truncated_files_are_refused_before_anything_is_allocated(tmp_path, cut):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": Spec((4, 4), torch.float32)}, [torch.ones(4, 4)], {})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [4, 20]},
        {"dtype": "X", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [10**18], "data_offsets": [0, 4 * 10**18]},
        [],
    ],
)
def test_headers_that_do_not_describe_their_bytes_are_refused(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(CheckpointError):
        SafetensorsFile(tmp_path / "x.safetensors")


def test_a_disk_that_fails_while_it_is_read_names_the_file(tmp_path, monkeypatch):
    """The error of an open file's descriptor names none. Reading the start of this one fails, for root too."""
    failing = tmp_path / "failing"
    failing.symlink_to("/proc/self/mem")
    for read in (hash_file, read_json, SafetensorsFile):
        with pytest.raises(CheckpointError, match="failing: cannot be read: Input/output error"):
            read(failing)
    write_safetensors(tmp_path / "whole", {"a": Spec((3,), torch.float32)}, [torch.ones(3)], {})

    def fails(*_):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with SafetensorsFile(tmp_path / "whole") as file:
        monkeypatch.setattr(os, "preadv", fails)
        with pytest.raises(CheckpointError, match="whole: cannot be read: Stale file handle"):
            file.read_full("a")
