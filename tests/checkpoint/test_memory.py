"""What conversion needs beside its imports: the factors of one module, or one weight, whatever the model's size."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from abba.adapter.config import SEVEN_LINEARS, AdapterConfig
from tests.checkpoint.made import linears, write_base, write_checkpoint
from tests.checkpoint.peak import ROOT

MIB = 2**20
CONFIG = AdapterConfig(16, 16, 24.0, SEVEN_LINEARS)


def convert(tmp_path, *arguments):
    """Peak above the imports in bytes, of a fresh process."""
    result = tmp_path / "peak.json"
    command = [sys.executable, "tests/checkpoint/peak.py", str(result), *map(str, arguments)]
    finished = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(result.read_text())
    print(
        f"\n{' '.join(map(str, arguments[2:])) or 'loha'}: {found['seconds']:.1f} s, peak {found['peak'] / MIB:.0f} MiB"
    )
    return found["peak"]


@pytest.fixture
def place(tmp_path):
    """A directory whose big files are gone when the test ends, as pytest keeps its own for a while."""
    yield tmp_path
    shutil.rmtree(tmp_path)


# 560 modules of Llama-70B's shapes; scaled: every width a sixteenth, which leaves 26 million parameters.
@pytest.mark.parametrize(
    "scale, limit", [pytest.param(1, 1024, marks=pytest.mark.slow), (16, 64)], ids=["70B", "a sixteenth"]
)
def test_an_adapter_is_converted_one_module_at_a_time(place, scale, limit):
    modules = linears(8192 // scale, 28672 // scale, 1024 // scale, 80)
    checkpoint = write_checkpoint(place / "checkpoints", CONFIG, modules)  # moments of 0, written out in full
    masters = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")) / 3
    assert len(modules) == 560 and masters > 1.5 * limit * MIB, "it would fit as a whole"
    assert convert(place, checkpoint, place / "adapter") < limit * MIB


# 1 GB in bf16; scaled: 160 MB. Several files.
@pytest.mark.parametrize(
    "widths, vocabulary",
    [pytest.param((2048, 8192, 512, 8), 8192, marks=pytest.mark.slow), ((512, 2048, 128, 20), 2048)],
    ids=["1 GB", "160 MB"],
)
@pytest.mark.parametrize("dtype", [[], ["--dtype", "float32"]], ids=["as stored", "fp32"])
def test_merging_holds_one_weight_at_a_time(place, widths, vocabulary, dtype):
    modules = linears(*widths)
    write_base(place / "base", modules, vocabulary, files=3)
    checkpoint = write_checkpoint(place / "checkpoints", CONFIG, modules)
    limit = 4 * (widths[0] * widths[1] * 4) + 64 * MIB
    size = sum(path.stat().st_size for path in (place / "base").glob("*.safetensors"))
    assert size > 1.5 * limit, "it would fit as a whole"
    merged = ["--format", "merged", "--base", place / "base", *dtype]
    assert convert(place, checkpoint, place / "merged", *map(str, merged)) < limit
