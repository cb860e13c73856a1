"""Checks of slurm/preflight.py that need no cluster."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.warm import ROOT

_spec = importlib.util.spec_from_file_location("preflight", ROOT / "slurm" / "preflight.py")
preflight = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(preflight)


def test_gpus_are_counted_and_measured():
    preflight.refuse_gpus([79.1] * 8, 8, 80)
    with pytest.raises(preflight.RefusedError, match="7 GPUs are seen where 8 ranks need one each"):
        preflight.refuse_gpus([79.1] * 7, 8, 80)
    with pytest.raises(preflight.RefusedError, match="^GPU 1 has 39 GiB; planned for 80: set ABBA_GPU_MEMORY_GIB"):
        preflight.refuse_gpus([79.1, 39.4], 2, 80)


def test_shell_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted(Path("slurm").glob("*.sh")), Path("tests/slurm/cluster.sh")]
    found = subprocess.run(["shellcheck", "-x", "-P", ".", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_every_variable_that_is_read_is_explained():
    lines = "\n".join(path.read_text() for path in (ROOT / "slurm").glob("*.sh")).splitlines()
    explained = {name for line in lines if line.startswith(("#", ": ")) for name in re.findall(r"ABBA_\w+", line)}
    read = {name for line in lines for name in re.findall(r"\$\{?(ABBA_\w+)", line)}
    assert read and read <= explained, read - explained
