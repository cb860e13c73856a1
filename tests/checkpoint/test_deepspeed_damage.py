"""DeepSpeed's own checkpoints that are damaged, incomplete or mixed: refused in one line that names the file."""

import os
import random
import shutil
import zipfile
from collections import OrderedDict

import pytest
import torch

from abba.checkpoint.deepspeed_files import DeepSpeedCheckpoint
from abba.errors import CheckpointError
from tests.checkpoint.tamper import MODEL, OPTIM, TAG, copied, edit, read_all, refused, set_in


def reshaped(size):
    def change(content):
        group = content["param_shapes"][0]
        group[next(iter(group))] = size

    return change


def moments(step):
    def change(content):
        for state in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values():
            state["step"] = torch.tensor(step)

    return change


def first_flat(change):
    return set_in("optimizer_state_dict", "fp32_flat_groups", 0, to=lambda flat: change(flat.detach().clone()))


def with_nan(flat):
    flat[0] = float("nan")
    return flat


def with_infinity(flat):
    flat[1] = float("-inf")
    return flat


ALL = "both ranks"
EDITS = {
    "step of one model file": (MODEL, 1, set_in("global_steps", to=lambda _: 3), "of step 3"),
    "step as text": (MODEL, 1, set_in("global_steps", to=lambda _: "2"), "global_steps is '2'"),
    "step negative": (MODEL, 0, set_in("global_steps", to=lambda _: -1), "global_steps is -1"),
    "step of one optimizer": (OPTIM, 1, moments(1.0), "of optimizer step 1"),
    "optimizer ahead of the model": (OPTIM, ALL, moments(4.0), "of optimizer step 4"),
    "step of an optimizer NaN": (OPTIM, 1, moments(float("nan")), "of optimizer step nan"),
    "world of one model file": (MODEL, 1, set_in("dp_world_size", to=lambda _: 4), "was saved by 4 ranks"),
    "world of one optimizer": (
        OPTIM,
        1,
        set_in("optimizer_state_dict", "partition_count", to=lambda _: 4),
        "by 4 ranks",
    ),
    "world as truth": (OPTIM, 0, set_in("optimizer_state_dict", "partition_count", to=lambda _: True), "is True"),
    "world as list": (OPTIM, 0, set_in("optimizer_state_dict", "partition_count", to=lambda _: [2, 2]), "is [2, 2]"),
    "world of a billion": (MODEL, 0, set_in("dp_world_size", to=lambda _: 10**9), "by 1000000000 ranks"),
    "stage 1": (OPTIM, 0, set_in("optimizer_state_dict", "zero_stage", to=lambda _: 1), "stage 1"),
    "no optimizer state": (OPTIM, 0, set_in("optimizer_state_dict", to=lambda _: None), "NoneType, not dict"),
    "one shape": (MODEL, 1, reshaped(torch.Size([5, 5])), "other parameters or shapes"),
    "all shapes": (MODEL, ALL, reshaped(torch.Size([5, 5])), "in group 0"),
    "a shape of 10**30": (MODEL, ALL, reshaped((10**15, 10**15)), "in group 0"),
    "a shape of text": (MODEL, 0, reshaped(("5",)), "has the shape ('5',)"),
    "a negative shape": (MODEL, 0, reshaped((-5, -5)), "has the shape (-5, -5)"),
    "a shape of zero": (MODEL, 0, reshaped((0, 10**15)), "has the shape"),
    "a name that is none": (MODEL, 0, set_in("param_shapes", 0, to=lambda _: {7: (1,)}), "parameter 7"),
    "a name of two lines": (MODEL, 0, set_in("param_shapes", 0, to=lambda _: {"a\nb": (-1,)}), "'a\\nb'"),
    "shapes missing": (MODEL, 0, set_in("param_shapes", to=lambda _: None), "param_shapes is NoneType"),
    "a group of shapes fewer": (MODEL, ALL, set_in("param_shapes", to=lambda groups: groups[:-1]), "group 4"),
    "order of the parameters": (
        MODEL,
        1,
        set_in("param_shapes", 3, to=lambda group: OrderedDict(reversed(group.items()))),
        "other parameters",
    ),
    "frozen shapes": (MODEL, 1, set_in("frozen_param_shapes", to=lambda _: {}), "other frozen"),
    "masters shorter": (OPTIM, 1, first_flat(lambda flat: flat[:-1].clone()), "in group 0"),
    "a group of masters fewer": (
        OPTIM,
        1,
        set_in("optimizer_state_dict", "fp32_flat_groups", to=lambda groups: groups[:-1]),
        "group 4",
    ),
    "masters on NVMe": (OPTIM, 1, first_flat(lambda flat: flat[:0].clone()), "NVMe"),
    "masters of integers": (OPTIM, 1, first_flat(lambda flat: flat.long()), "torch.int64"),
    "masters not flat": (OPTIM, 1, first_flat(lambda flat: flat[None]), "not one flat row"),
    "masters sparse": (OPTIM, 1, first_flat(lambda flat: flat.to_sparse()), "no plain tensor"),
    "masters on meta": (OPTIM, 1, first_flat(lambda flat: flat.to("meta")), "no plain tensor"),
    "masters as numbers": (OPTIM, 1, first_flat(lambda flat: flat.tolist()), "is not what DeepSpeed"),
    "masters not listed": (OPTIM, 1, set_in("optimizer_state_dict", "fp32_flat_groups", to=tuple), "tuple, not list"),
    "NaN": (OPTIM, 1, first_flat(with_nan), "NaN or infinite"),
    "infinity": (OPTIM, 0, first_flat(with_infinity), "NaN or infinite"),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_does_not_fit_together_is_refused_by_name(saved, tmp_path, name):
    pattern, ranks, change, words = EDITS[name]
    directory = copied(saved(2), tmp_path)
    for rank in range(2) if ranks == ALL else [ranks]:
        edit(directory / pattern.format(rank), change)
    message = refused(directory)
    named = directory / pattern.format(0 if ranks == ALL else ranks)
    assert words in message and (named.name if ranks == ALL else str(named)) in message, message


def test_an_unedited_rewrite_is_read(saved, tmp_path):
    """Else every edit above would be refused for having been rewritten."""
    directory = copied(saved(2), tmp_path)
    for path in directory.glob("*.pt"):
        edit(path, lambda content: None)
    assert len(DeepSpeedCheckpoint(directory).tensors) == 7


def test_an_optimizer_may_lag_behind_the_model_and_count_calls(saved, tmp_path):
    def count_calls(content):
        content["optimizer_state_dict"]["optimizer_state_dict"]["param_groups"][0]["step"] = 10

    directory = copied(saved(2), tmp_path)
    edit(directory / OPTIM.format(0), count_calls)
    for rank in range(2):
        edit(directory / OPTIM.format(rank), moments(1.0))
    assert DeepSpeedCheckpoint(directory).step == 2


def test_stored_attributes_that_hide_methods_change_nothing(saved, tmp_path):
    def hide_get(content):
        content = OrderedDict(content)
        content.get = content.values = 5
        return content

    def hide_detach(flat):
        flat.detach = flat.numel = 5
        return flat

    directory = copied(saved(2), tmp_path)
    expected = read_all(directory)
    for rank in range(2):
        edit(directory / MODEL.format(rank), hide_get)
        edit(directory / OPTIM.format(rank), hide_get)
        edit(directory / OPTIM.format(rank), first_flat(hide_detach))
    assert all(torch.equal(value, expected[name]) for name, value in read_all(directory).items())


@pytest.mark.parametrize("pattern", [OPTIM, MODEL])
@pytest.mark.parametrize("rank", [0, 1])
def test_missing_extra_and_foreign_ranks_are_named(saved, tmp_path, pattern, rank):
    victim, other = pattern.format(rank), pattern.format(1 - rank)
    directory = copied(saved(2), tmp_path)
    whole = {name: (directory / name).read_bytes() for name in (victim, other)}

    (directory / victim).unlink()
    assert f"{directory / victim}: is missing" in refused(directory)
    (directory / victim).mkdir()
    assert f"{directory / victim}: is no file" in refused(directory)
    (directory / victim).rmdir()
    os.mkfifo(directory / victim)
    assert f"{directory / victim}: is no file" in refused(directory)
    (directory / victim).unlink()

    (directory / victim).write_bytes(whole[other])  # swapped or copied
    assert f"{directory / victim}: " in (message := refused(directory)) and "renamed" in message
    (directory / victim).write_bytes((saved(4) / "fp32/saved" / TAG / victim).read_bytes())
    assert "4 ranks" in (message := refused(directory)) and str(directory) in message
    (directory / victim).write_bytes(whole[victim])

    shutil.copy(saved(4) / "fp32/saved" / TAG / pattern.format(2), directory)
    assert f"{directory / pattern.format(2)}: is of no rank" in refused(directory)
    (directory / pattern.format(2)).rename(directory / f"bf16_{victim}")
    assert "second file of rank" in refused(directory)
    (directory / f"bf16_{victim}").rename(directory / victim.replace("mp_rank_00", "mp_rank_01"))
    assert "model-parallel" in refused(directory)
    (directory / victim.replace("mp_rank_00", "mp_rank_01")).unlink()
    assert DeepSpeedCheckpoint(directory).world_size == 2


@pytest.mark.parametrize("pattern", [OPTIM, MODEL])
def test_truncated_and_garbage_files_are_named(saved, tmp_path, pattern):
    directory = copied(saved(2), tmp_path)
    path = directory / pattern.format(1)
    data = path.read_bytes()
    empty = zipfile.ZipFile(tmp_path / "empty.zip", "w")
    empty.close()
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr(f"{path.stem}/data.pkl", b"\x80\x02}q\x00.")
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for record in source.infolist():
            archive.writestr(record.filename, source.read(record))
    damaged = [data[:n] for n in (0, 1, 64, len(data) // 2, len(data) - 1)]
    damaged += [b"PK\x03\x04" + b"\0" * 4000, random.Random(0).randbytes(5000)]
    damaged += [(tmp_path / name).read_bytes() for name in ("empty.zip", "other.zip", "packed.zip")]
    for content in damaged:
        path.write_bytes(content)
        assert str(path) in refused(directory)
    path.write_bytes(data)
    assert len(DeepSpeedCheckpoint(directory).tensors) == 7


def test_flipped_bits_of_the_masters_are_noticed(saved, tmp_path):
    directory = copied(saved(2), tmp_path)
    path = directory / OPTIM.format(1)
    data = path.read_bytes()
    for group in torch.load(path, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]:
        flipped = bytearray(data)
        flipped[data.index(group.detach().numpy().tobytes()) + group.nbytes // 2] ^= 4
        path.write_bytes(flipped)
        assert str(path) in (message := refused(directory)) and "CRC" in message


def flip(data, generator):
    data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)


def rewrite_pickle(path, generator):
    """A pickle with a few other bytes, in an archive whose checksums are right."""
    with zipfile.ZipFile(path) as archive:
        records = {name: bytearray(archive.read(name)) for name in archive.namelist()}
    pickled = next(data for name, data in records.items() if name.endswith("/data.pkl"))
    start = generator.randrange(len(pickled))
    pickled[start : start + generator.randrange(4)] = generator.randbytes(generator.randrange(4))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, bytes(data))


def test_random_damage_is_refused_or_harmless(saved, tmp_path):
    """No error of another kind, and no other value of a master without an error, wherever a bit flips."""
    directory = copied(saved(2), tmp_path)
    expected, generator = read_all(directory), random.Random(0)
    files = {path: path.read_bytes() for path in sorted(directory.glob("*.pt"))}
    refusals = []
    for trial in range(200):
        path = generator.choice(list(files))
        if by_pickle := trial % 2:
            rewrite_pickle(path, generator)
        else:
            data = bytearray(files[path])
            flip(data, generator)
            path.write_bytes(data)
        try:
            found = read_all(directory)
        except CheckpointError as error:
            refusals.append(str(error))
        else:
            # A forged pickle may well name or cut other tensors; a flipped bit must not.
            assert by_pickle or all(torch.equal(found[name], value) for name, value in expected.items())
        path.write_bytes(files[path])
    assert len(refusals) > 120
    assert all(str(directory) in refusal and "\n" not in refusal for refusal in refusals)


def test_stage_2_is_refused_for_being_stage_2(saved):
    assert "ZeRO stage 2" in refused(saved(2) / "stage2/saved")


def test_two_names_that_become_one_are_refused(saved, tmp_path):
    directory = copied(saved(2), tmp_path)

    def rename(content):
        for group in content["param_shapes"]:
            for name in ("module.abba.A1", "module.abba.A2"):
                if name in group:
                    group[{"module.abba.A1": "abba.A2"}.get(name, name)] = group.pop(name)

    for rank in range(2):
        edit(directory / MODEL.format(rank), rename)
    assert "lists 'abba.A2' twice" in refused(directory)
