"""DeepSpeed's own checkpoints: what the engine gathers comes back bit for bit, mapped and not copied."""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from abba.checkpoint.deepspeed_files import DeepSpeedCheckpoint, is_deepspeed_checkpoint
from tests.checkpoint.conftest import CASES, MORE_CASES
from tests.checkpoint.tamper import MODEL, OPTIM, TAG, copied, edit, read_all, refused, set_in
from tests.warm import ROOT


@pytest.mark.parametrize("world, case", [(w, c) for w in (1, 2, 4) for c in CASES] + [(2, "offload"), (2, "hpz")])
def test_masters_are_those_that_the_engine_gathers(saved, world, case):
    root, given = saved(world) / case, (CASES | MORE_CASES)[case]
    expected = {name.removeprefix("module."): value for name, value in load_file(root / "expected.safetensors").items()}
    frozen = {n.removeprefix("module."): tuple(s) for n, s in json.loads((root / "frozen.json").read_text()).items()}
    assert is_deepspeed_checkpoint(root / "saved") and is_deepspeed_checkpoint(root / "saved" / TAG)
    assert len(expected) == 7 and len(frozen) == 4
    with DeepSpeedCheckpoint(root / "saved") as checkpoint:
        assert checkpoint.directory == root / "saved" / TAG
        assert (checkpoint.step, checkpoint.world_size) == (2, world)
        assert checkpoint.tensors == {name: tuple(value.shape) for name, value in expected.items()}
        assert checkpoint.frozen == (frozen if given.get("exclude_frozen") is False else {})
        for name, value in expected.items():
            read = checkpoint.read(name)
            assert read.dtype == torch.float32 and torch.equal(read, value), name
        rounded = [torch.equal(value, value.bfloat16().float()) for value in expected.values()]
        assert not all(rounded), "the masters must differ from their 16-bit copies to prove anything"


def test_the_real_files_have_what_makes_them_hard(saved):
    groups = {case: len(DeepSpeedCheckpoint(saved(4) / case / "saved")._masters[0].groups) for case in CASES}
    assert groups["bf16"] == 1 and groups["fp32"] > 2 and groups["fp16"] == 7
    names = {path.name for path in (saved(4) / "bf16/saved" / TAG).iterdir()}
    assert f"bf16_{OPTIM.format(3)}" in names
    assert OPTIM.format(3) in {path.name for path in (saved(4) / "fp16/saved" / TAG).iterdir()}


def test_neither_deepspeed_nor_its_classes_are_imported(saved):
    program = (
        "import sys; from pathlib import Path; from abba.checkpoint.deepspeed_files import DeepSpeedCheckpoint as C\n"
        f"c = C(Path({str(saved(2) / 'fp16/saved')!r})); [c.read(name) for name in c.tensors]\n"
        "assert not [m for m in sys.modules if m.partition('.')[0] in ('deepspeed', 'transformers')]"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_masters_in_a_narrower_type_become_fp32(saved, tmp_path):
    with DeepSpeedCheckpoint(saved(2) / "fp32/saved") as checkpoint:
        expected = {name: checkpoint.read(name).bfloat16().float() for name in checkpoint.tensors}

    def narrow(content):
        state = content["optimizer_state_dict"]
        state["fp32_flat_groups"] = [group.detach().bfloat16() for group in state["fp32_flat_groups"]]

    directory = copied(saved(2), tmp_path)
    for rank in range(2):
        edit(directory / OPTIM.format(rank), narrow)
    with DeepSpeedCheckpoint(directory) as checkpoint:
        for name, value in expected.items():
            assert torch.equal(checkpoint.read(name), value) and checkpoint.read(name).dtype == torch.float32


def test_masters_saved_on_gpus_are_read_without_one(saved, tmp_path, monkeypatch):
    directory = copied(saved(2), tmp_path)
    expected = read_all(directory)
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    for path in directory.glob("*.pt"):
        edit(path, lambda content: None)
        assert b"cuda:1" in path.read_bytes()
    assert all(torch.equal(value, expected[name]) for name, value in read_all(directory).items())


def test_a_closed_checkpoint_reads_nothing(saved):
    with DeepSpeedCheckpoint(saved(2) / "bf16/saved") as checkpoint:
        pass
    with pytest.raises(IndexError):
        checkpoint.read("gain")


@pytest.mark.parametrize(
    "latest",
    ["../out", "/tmp", "", ".", "..", "a/../../out", "a/b", "a..b", "-rf", "a\nb", "a\0b", "é", "x" * 300, "gone"],
)
def test_latest_cannot_lead_out_of_the_directory(saved, tmp_path, latest):
    directory = copied(saved(2), tmp_path).parent
    for reachable in (tmp_path / "out", directory / "a/b", directory / "a..b", directory / "-rf", directory / "é"):
        shutil.copytree(directory / TAG, reachable)
    (directory / "latest").write_text(latest)
    assert str(directory / "latest") in refused(directory)
    assert not is_deepspeed_checkpoint(directory)


def test_latest_that_is_a_link_garbage_or_absent(saved, tmp_path):
    directory = copied(saved(2), tmp_path).parent
    shutil.copytree(directory / TAG, tmp_path / "out")
    (directory / "linked").symlink_to(tmp_path / "out")
    (directory / "latest").write_text("linked\n")
    assert "is a link out of" in refused(directory)
    (directory / "latest").write_bytes(b"\xff\xfe")
    assert str(directory / "latest") in refused(directory)
    (directory / "latest").write_text(TAG + "\n")
    assert DeepSpeedCheckpoint(directory).directory == directory / TAG
    (directory / "latest").unlink()
    assert str(directory) in refused(directory) and not is_deepspeed_checkpoint(directory)
    assert str(tmp_path / "gone") in refused(tmp_path / "gone") and not is_deepspeed_checkpoint(tmp_path / "gone")


def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


def test_masters_are_mapped_and_not_copied(saved, tmp_path):
    """403 MB of masters in tensors of 17 MB; the allocator may keep a few of those that were read."""
    directory, rows, count = copied(saved(2), tmp_path), 1 << 22, 24
    shapes = {f"layer.{i}.A1": torch.Size([rows]) for i in range(count)}
    half = rows * count // 2

    for rank in range(2):
        edit(
            directory / OPTIM.format(rank),
            set_in("optimizer_state_dict", "fp32_flat_groups", to=lambda _: [torch.arange(half, dtype=torch.float32)]),
        )
        edit(directory / MODEL.format(rank), set_in("param_shapes", to=lambda _: [shapes]))
    seen, stop = [], threading.Event()

    def watch():
        while not stop.is_set():
            seen.append(anonymous_bytes())
            time.sleep(0.001)

    before = anonymous_bytes()
    watcher = threading.Thread(target=watch)
    watcher.start()
    with DeepSpeedCheckpoint(directory) as checkpoint:
        for index, name in enumerate(checkpoint.tensors):
            value = checkpoint.read(name)
            assert value[1] == index * rows // 2 + 1 and value[rows // 2 + 1] == value[1]
    stop.set()
    watcher.join()
    peak = max(seen) - before
    print(
        f"peak RssAnon {peak / 1e6:.1f} MB above {before / 1e6:.0f} MB for {rows * count * 4 / 1e6:.0f} MB of masters"
    )
    assert len(seen) > 20 and peak < rows * count * 4 / 4
