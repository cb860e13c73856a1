"""Checkpoints of the real engine, one start of ranks per world size."""

import json

import pytest

from tests.distributed.ranks import run_ranks

CASES = {
    "bf16": {"dtype": "bf16"},
    "fp32": {"dtype": "fp32", "groups": 2, "zero": {"sub_group_size": 8}, "exclude_frozen": False, "wrapped": True},
    "fp16": {"dtype": "fp16", "groups": 2, "zero": {"sub_group_size": 1}, "exclude_frozen": False},
}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
SCHEDULER = {"type": "WarmupLR", "params": {"warmup_min_lr": 0.01, "warmup_max_lr": 0.02}}
MORE_CASES = {  # on two ranks only
    "offload": {
        "dtype": "bf16",
        "zero": OFFLOAD,
        "config": {"zero_force_ds_cpu_optimizer": False, "scheduler": SCHEDULER},
    },
    "hpz": {"dtype": "bf16", "groups": 2, "zero": {"zero_hpz_partition_size": 2}},
    "stage2": {"dtype": "bf16", "zero": {"stage": 2}},
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """saved(world_size) -> a directory with one subdirectory per case; each world is started once."""
    root, done = tmp_path_factory.mktemp("deepspeed"), {}

    def save(world_size):
        if world_size not in done:
            directory = root / f"world{world_size}"
            directory.mkdir()
            cases = CASES | (MORE_CASES if world_size == 2 else {})
            (directory / "cases.json").write_text(json.dumps(cases))
            command = ["tests/checkpoint/save_deepspeed.py", str(directory), str(directory / "cases.json")]
            for rank, finished in enumerate(run_ranks(directory / "ranks", [command] * world_size)):
                assert finished.returncode == 0, f"rank {rank}:\n{finished.stderr[-5000:]}"
            done[world_size] = directory
        return done[world_size]

    return save
