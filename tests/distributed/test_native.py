"""The same trained engine saved by us and by DeepSpeed: both become the same adapter, to the byte."""

import pytest

from tests import warm
from tests.distributed.conftest import FAST
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize("world, frozen", [(1, "without"), (2, "with"), (4, "without")])
def test_deepspeeds_checkpoint_becomes_the_adapter_that_ours_becomes(tmp_path, arguments, base, world, frozen):
    native, run = tmp_path / f"{frozen}-frozen", tmp_path / "run"
    command = ["tests/distributed/save_native.py", str(native), *arguments(run, "train.max_steps=2", FAST)]
    for finished in run_ranks(tmp_path / "ranks", [[*command] for _ in range(world)]):
        assert finished.returncode == 0, finished.stderr
    adapters = []
    for name, source, more in (("ours", run, []), ("native", native, ["--alpha", "16", "--base", str(base)])):
        target = tmp_path / name
        finished = warm.run(tmp_path / f"convert-{name}", "launch/convert.py", str(source), str(target), *more)
        assert finished.returncode == 0, finished.stderr
        adapters.append((target / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]
    without = warm.run(tmp_path / "no-alpha", "launch/convert.py", str(native), str(tmp_path / "third"))
    assert without.returncode == 64 and "add --alpha" in without.stderr and not (tmp_path / "third").exists()
