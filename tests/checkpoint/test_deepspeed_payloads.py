"""A checkpoint of DeepSpeed's whose pickle would run a command: refused by name, and the command does not run."""

import contextlib
import time

import pytest
import torch

from abba.checkpoint.deepspeed_files import DeepSpeedCheckpoint
from tests.checkpoint.payloads import PAYLOADS
from tests.checkpoint.tamper import MODEL, OPTIM, copied, refused


@pytest.mark.parametrize("name", PAYLOADS)
def test_no_payload_runs_from_any_file_of_any_rank(saved, tmp_path, name):
    canaries = []
    for pattern in (OPTIM, MODEL):
        for rank in range(2):
            place = tmp_path / f"{len(canaries)}"
            place.mkdir()
            directory, canary = copied(saved(2), place), place / "canary"
            PAYLOADS[name](directory / pattern.format(rank), canary)
            assert str(directory / pattern.format(rank)) in refused(directory)
            canaries.append(canary)

            fires = place / "control"
            control = copied(saved(2), fires) / pattern.format(rank)
            PAYLOADS[name](control, fires / "canary")
            assert fired_when_trusted(control, fires / "canary"), "it proves nothing that a dud does not run"
    # After the controls, whose commands had the same time to run and ran.
    assert not [canary for canary in canaries if canary.exists()]


def fired_when_trusted(path, canary):
    assert not canary.exists()
    with contextlib.suppress(Exception):  # what the payload leaves behind need not be an object
        torch.load(path, weights_only=False, map_location="cpu")
    deadline = time.monotonic() + 10
    while not canary.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return canary.exists()


def test_a_class_that_deepspeed_does_not_store_is_named_with_the_way_out(saved, tmp_path):
    directory = copied(saved(2), tmp_path)
    PAYLOADS["torch.save"](directory / MODEL.format(1), tmp_path / "canary")
    message = refused(directory)
    assert "'torch.serialization.save'" in message and "zero_to_fp32.py" in message


def test_what_others_of_the_process_trust_is_not_changed(saved):
    before = set(torch.serialization.get_safe_globals())
    DeepSpeedCheckpoint(saved(2) / "fp16/saved")
    assert set(torch.serialization.get_safe_globals()) == before
