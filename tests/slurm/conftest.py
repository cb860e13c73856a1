"""One SLURM cluster for all tests of this directory, run by `make test-slurm`; make test leaves out what needs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.jobs import CLUSTER, Jobs
from tests.warm import ROOT

DIRECTORY = Path("/tmp/abba-slurm-cluster")
PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")


def pytest_collection_modifyitems(items):
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.timeout(3600))  # jobs on a busy machine; each wait has its own limit


@pytest.fixture(scope="session")
def cluster():
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if shutil.which(program, path=path) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'SLURM'}: make test-slurm installs it where apt is there")
    started = subprocess.run([CLUSTER, "up", DIRECTORY], capture_output=True, text=True, timeout=120)
    assert started.returncode == 0, started.stderr
    yield DIRECTORY
    subprocess.run([CLUSTER, "down", DIRECTORY], check=True, timeout=120)


@pytest.fixture(scope="session")
def jobs(cluster, tmp_path_factory):
    """The templates, submitted as they are from the repository's top directory; what they leave lies in `jobs.root`."""
    return Jobs(cluster, ROOT, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="session")
def counter(tmp_path_factory):
    """The variables of a job whose python is counter.py."""
    python = tmp_path_factory.mktemp("counter") / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S {ROOT}/tests/slurm/counter.py "$@"\n')
    python.chmod(0o755)
    return {"ABBA_ENV": f"venv:{python.parent.parent}"}


@pytest.fixture(scope="session")
def reference(jobs):
    """The job that nobody disturbs: (job, run directory), and the job that it chains after itself."""
    # What a shell or a batch system could take apart has to arrive as it is.
    run = jobs.root / 'it\'s a "reference"; $HOME *'
    job = jobs.train(run, ABBA_CHAIN="yes")
    return jobs.wait(job), run
