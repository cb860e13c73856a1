"""What python runs in. There is no container runtime here and no module system: programs of their names stand in, which
write down how they are called and then run the command, so what is tested is what the templates ask of them."""

import re

import pytest

from tests.slurm.jobs import SHAPE
from tests.slurm.test_jobs import refused

# Containers: everything up to the image is theirs, the rest is the command.
APPTAINER = """#!/bin/bash
printf "%s\\n" "$@" >> "$CALLS.$$"
while [ "$1" != /images/abba.sif ]; do shift; done
exec "${@:2}"
"""
SRUN = """#!/bin/bash
printf "%s\\n" "$@" >> "$CALLS.$$"
for word; do shift; case $word in --container-*) ;; *) set -- "$@" "$word" ;; esac; done
exec /usr/bin/srun "$@"
"""


@pytest.fixture
def stand_in(jobs, tmp_path):
    """stand_in(name, text) -> the variables of a job that finds it before the real one, and what reads its calls."""

    def install(name, text):
        program = tmp_path / "bin" / name
        program.parent.mkdir()
        program.write_text(text)
        program.chmod(0o755)
        python = jobs.environment["ABBA_ENV"].removeprefix("venv:")
        path = f"{program.parent}:{python}/bin:{jobs.environment['PATH']}"
        calls = {"PATH": path, "CALLS": str(tmp_path / "calls")}
        # Two nodes call at once: a file each.
        return calls, lambda: "".join(file.read_text() for file in tmp_path.glob("calls.*"))

    return install


def ends_at_the_recipe(jobs, run, **variables):
    """A job that comes as far as the recipe, so that it is python in its environment that refuses."""
    refused(jobs, jobs.train(run, "train.max_steps=0", **variables), 64, "preflight: node1: recipe: .*train.max_steps")


def test_what_sbatch_does_not_export_reaches_the_ranks(jobs, counter):
    """Not even PATH comes from the user's shell, and the next job gets what this one has."""
    exported = ("ABBA_ENV", "ABBA_RECIPE", "ABBA_SCRATCH", "ABBA_SCRATCH_GIB", "ABBA_CHAIN", "SBATCH_OUTPUT")
    options = [*SHAPE, f"--export={','.join(exported)},SBATCH_EXPORT=NONE"]
    job = jobs.train(jobs.root / "counted without exports", options=options, ABBA_CHAIN="yes", **counter)
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    assert "meeting at node1 without ~/.local" in jobs.log(job)
    following = jobs.log(job).split(" converts what")[0].split()[-1]
    assert jobs.wait(following) == "COMPLETED", jobs.log(following)


def test_apptainer(jobs, stand_in, tmp_path):
    variables, calls = stand_in("apptainer", APPTAINER)
    ends_at_the_recipe(
        jobs, tmp_path / "run", ABBA_ENV="apptainer:/images/abba.sif", ABBA_MOUNTS="/data,/models", **variables
    )
    top = jobs.command("pwd").stdout.strip()
    bound = f"{top},{jobs.root}/hub,{jobs.root}/scratch,/data,/models"
    words = calls().split("\n")
    start = words.index("exec")
    assert words[start : start + 7] == ["exec", "--nv", "--bind", bound, "--pwd", top, "/images/abba.sif"]


def test_pyxis(jobs, stand_in, tmp_path):
    variables, calls = stand_in("srun", SRUN)
    ends_at_the_recipe(jobs, tmp_path / "run", ABBA_ENV="pyxis:registry#abba:1", ABBA_MOUNTS="/data", **variables)
    top = jobs.command("pwd").stdout.strip()
    said = calls()
    assert "--container-image=registry#abba:1\n" in said and f"--container-workdir={top}\n" in said
    assert f"--container-mounts={top}:{top},{jobs.root}/hub:{jobs.root}/hub," in said and ",/data:/data\n" in said
    assert re.search(r"python\nslurm/preflight.py\n--recipe", said)


def test_modules_come_before_the_venv(jobs, tmp_path):
    """`module` is a function of the login shell, which sbatch passes on."""
    module = '() { echo "module $*" >> "$CALLS"; [ "$2" != cuda/0 ]; }'
    variables = {"BASH_FUNC_module%%": module, "CALLS": str(tmp_path / "calls")}
    venv = jobs.environment["ABBA_ENV"]
    ends_at_the_recipe(jobs, tmp_path / "run", ABBA_ENV=f"module:cuda/12.8 module:nccl {venv}", **variables)
    assert (tmp_path / "calls").read_text().splitlines() == ["module load cuda/12.8", "module load nccl"]
    job = jobs.train(tmp_path / "run", ABBA_ENV=f"module:cuda/0 {venv}", **variables)
    refused(jobs, job, 71, "module load cuda/0: failed on node1")
