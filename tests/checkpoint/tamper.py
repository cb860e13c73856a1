"""Copies of DeepSpeed's checkpoints that are changed on the way."""

import shutil
from pathlib import Path

import pytest
import torch

from abba.checkpoint.deepspeed_files import DeepSpeedCheckpoint
from abba.errors import CheckpointError

OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_{}_mp_rank_00_model_states.pt"
TAG = "global_step2"


def copied(world, tmp_path, case="fp32"):
    return Path(shutil.copytree(world / case / "saved", tmp_path / "saved")) / TAG


def edit(path, change):
    """Rewrite a file as DeepSpeed would have, after `change(content)`, which may return another content."""
    content = torch.load(path, weights_only=False)
    torch.save(change(content) or content, path)


def read_all(directory):
    with DeepSpeedCheckpoint(directory) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.tensors}


def refused(directory):
    """The message of reading everything, which must fail."""
    with pytest.raises(CheckpointError) as raised:
        read_all(directory)
    message = str(raised.value)
    assert "\n" not in message and "weights_only" not in message
    return message


def set_in(*keys, to):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        content[keys[-1]] = to(content.get(keys[-1]) if isinstance(content, dict) else content[keys[-1]])

    return change
