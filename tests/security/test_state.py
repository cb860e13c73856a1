"""state.json of a checkpoint whose hashes are right, because whoever changed it changed the manifest too."""

import json

import pytest

from abba.checkpoint.convert import convert
from abba.checkpoint.source import find_checkpoint
from abba.errors import CheckpointError
from tests.checkpoint.test_format import write_checkpoint
from tests.security.payloads import seal

CONFIG = {"r1": 3, "r2": 2, "alpha": 4.0, "target_modules": ["m"], "layer_range": None}


@pytest.mark.parametrize(
    "key, value",
    [
        ("world_size", True),
        ("world_size", 10**9),
        ("tensors", {"m.A1": [-3, 5]}),
        ("tensors", ["m"]),
        ("modules", ["m"]),
        ("adapter", {**CONFIG, "r1": -1}),
        ("format_version", 3),
        ("extra", 1),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_a_state_may_not_say(tmp_path, key, value):
    refused(tmp_path, key, value)


@pytest.mark.parametrize(
    "key, value",
    [
        ("world_size", 0),
        ("world_size", -1),
        ("world_size", "2"),
        ("tensors", {"m.A1": [10**30]}),
        ("tensors", {}),
        ("modules", {}),
        ("modules", {"m": [10**9, 10**9]}),
        ("modules", {"x": [7, 5]}),
        ("modules", {"../x": [7, 5]}),
        ("modules", {"m": [7, 5, 3]}),
        ("modules", {"m": [7.0, 5]}),
        ("adapter", {**CONFIG, "r1": 10**12}),
        ("step", "x"),
        ("base_model", ["x"]),
    ],
    ids=lambda value: str(value)[:30],
)
def test_fields_of_a_state_belong_together(tmp_path, key, value):
    refused(tmp_path, key, value)


def refused(tmp_path, key, value):
    checkpoint = write_checkpoint(tmp_path)
    path = checkpoint / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    seal(checkpoint)
    with pytest.raises(CheckpointError):
        convert(find_checkpoint(checkpoint, print), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
