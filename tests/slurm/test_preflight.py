"""Checks of slurm/preflight.py that need no cluster."""

import importlib.util
import io
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests import warm
from tests.warm import ROOT

_spec = importlib.util.spec_from_file_location("preflight", ROOT / "slurm" / "preflight.py")
preflight = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(preflight)


def test_gpus_are_counted_and_measured():
    preflight.refuse_gpus([79.1] * 8, 8, 80)
    with pytest.raises(preflight.RefusedError, match="7 GPUs are seen where 8 ranks need one each"):
        preflight.refuse_gpus([79.1] * 7, 8, 80)
    with pytest.raises(preflight.RefusedError, match="^GPU 1 has 39.4 GiB; planned for 80: set ABBA_GPU_MEMORY_GIB"):
        preflight.refuse_gpus([79.1, 39.4], 2, 80)
    with pytest.raises(preflight.RefusedError, match="planned for 24"):  # an L4: a plan of 23 GiB would not fit
        preflight.refuse_gpus([22.5], 1, 24)


def test_a_network_that_nccl_cannot_use_is_said(tmp_path, monkeypatch):
    def without(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr("ctypes.CDLL", without)
    said = preflight.network_warning(2, tmp_path)
    assert said.startswith(f"{tmp_path} is there and libibverbs.so.1: cannot open") and "NCCL falls back to TCP" in said
    assert "\n" not in said
    assert not preflight.network_warning(1, tmp_path), "on one node nothing is sent through it"
    assert not preflight.network_warning(2, tmp_path / "none")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not preflight.network_warning(2, tmp_path), "ranks on CPUs talk TCP anyway"
    monkeypatch.delenv("DS_ACCELERATOR")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not preflight.network_warning(2, tmp_path)


def test_a_warning_names_the_node_and_stops_nothing(monkeypatch, capsys):
    values = {"MASTER_ADDR": "first", "MASTER_PORT": "1", "SLURM_NNODES": "2", "SLURMD_NODENAME": "node7"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for check in ("meet", "check_scratch", "check_environment", "check_gpus", "check_recipe"):
        monkeypatch.setattr(preflight, check, lambda *_: {})
    monkeypatch.setattr(preflight, "network_warning", lambda nodes: f"slow on {nodes} nodes")
    monkeypatch.setattr("sys.argv", ["preflight.py", "--recipe", "x", "--gpus", "8"])
    said = io.StringIO()
    assert preflight.main(said) == 0
    assert capsys.readouterr().err == "preflight: node7: WARNING: slow on 2 nodes\n"
    assert not said.getvalue(), "the batch script reads it"


def test_only_the_recipe_s_values_go_to_stdout(tmp_path):
    """DeepSpeed's logger warns of an old name there."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    old = "deepspeed.zero_optimization.stage3_gather_fp16_weights_on_model_save=true"
    command = ("slurm/preflight.py", "--recipe", "quickstart", "--gpus", "1", old, "output_dir=runs/a b")
    done = warm.run(tmp_path, *command, DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert done.returncode == 0, done.stderr
    lines = dict(line.removeprefix("abba-recipe ").split("=", 1) for line in done.stdout.splitlines())
    assert list(lines) == ["RUN", "BASE", "REVISION", "DTYPE", "METHOD", "TASK"] and lines["RUN"] == "runs/a b"
    assert "gather_16bit_weights_on_model_save" in done.stderr


def test_shell_is_clean():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    scripts = [*sorted(Path("slurm").glob("*.sh")), Path("tests/slurm/cluster.sh")]
    found = subprocess.run(["shellcheck", "-x", "-P", ".", *scripts], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    "code, asked, starts, ends",
    [
        (75, "yes", 30, "scontrol requeue 7"),
        (138, "yes", 9, "scontrol requeue 7"),
        (138, "yes", 10, "== asked to stop before it could save, and not for the first time"),
        (138, "", 0, "== as it is"),
        (0, "yes", 0, "== as it is"),
    ],
)
def test_who_is_asked_to_stop_comes_back_but_not_without_end(code, asked, starts, ends):
    script = f"""
        . slurm/common.sh
        remove_scratch() {{ :; }}
        scontrol() {{ echo "scontrol $*"; }}
        ASKED={asked}
        requeue_or_leave {code} "as it is"
    """
    variables = {"PATH": os.environ["PATH"], "HOME": "/", "ABBA_ENV": "", "ABBA_SCRATCH": "/tmp", "SLURM_JOB_ID": "7"}
    variables["SLURM_RESTART_COUNT"] = str(starts)
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.splitlines()[-1].startswith(ends)


@pytest.mark.parametrize(
    "file, command",
    [
        ("README.md", ".venv/bin/pip install -c constraints.txt -e '.[export,eval]'"),
        ("slurm/abba.def", "pip install --no-cache-dir --constraint constraints.txt ninja '.[export,eval]'"),
        ("slurm/common.sh", "hf download --repo-type dataset HuggingFaceH4/MATH-500"),
    ],
)
def test_what_scoring_by_task_math_needs_is_installed_and_fetched(file, command):
    """It is the example of ABBA_EVALUATE."""
    assert command in (ROOT / file).read_text()


def test_every_variable_that_is_read_is_explained():
    lines = "\n".join(path.read_text() for path in (ROOT / "slurm").glob("*.sh")).splitlines()
    explained = {name for line in lines if line.startswith(("#", ": ")) for name in re.findall(r"ABBA_\w+", line)}
    read = {name for line in lines for name in re.findall(r"\$\{?(ABBA_\w+)", line)}
    assert read and read <= explained, read - explained
