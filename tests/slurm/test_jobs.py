"""The templates on a cluster that nobody disturbs, and what they say of one that cannot work."""

import json
import re
import socket
import subprocess

import pytest

from tests.slurm.jobs import SHAPE, STEPS, outcome
from tests.warm import ROOT

TEMPLATES = ["llama8b_abba", "llama70b_abba", "convert_evaluate", "sweep"]


@pytest.mark.parametrize("template", TEMPLATES)
def test_slurm_accepts_the_header_as_it_stands(jobs, template):
    tested = jobs.command("sbatch", "--test-only", f"slurm/{template}.sh")
    assert tested.returncode == 0, tested.stderr
    nodes = "node[1-2]" if "70b" in template else "node1"  # all of each, and no fewer: SLURM may quietly take less
    assert f"on nodes {nodes} in partition gpu" in tested.stderr, tested.stderr
    words = (ROOT / f"slurm/{template}.sh").read_text()
    assert "\n#SBATCH --gpus-per-node=8\n" in words and "\n#SBATCH --exclusive\n" in words


def test_one_command_trains_converts_and_scores(jobs, reference):
    state, run = reference
    assert state == "COMPLETED"
    assert outcome(run)[0] == STEPS and (run / "adapter" / "adapter_model.safetensors").exists()
    trained = next(path for path in jobs.root.glob("llama70b_abba-*.out") if "it's a" in path.read_text())
    log = trained.read_text()
    assert "4 rank(s) x 1 micro-batch(es) a step" in log  # and not four runs of one rank
    following = re.search(r"== job (\d+) converts what", log)[1]
    assert jobs.wait(following) == "COMPLETED", jobs.log(following)
    assert json.loads((run / "score/scores.json").read_text())["n"] == 16
    lora = json.loads(run.with_name(f"{run.name}-lora").joinpath("adapter_config.json").read_text())
    assert lora["r"] == 12
    assert not list((jobs.root / "scratch").glob(f"abba-{following}-*"))


def test_rows_that_no_task_is_known_for_are_not_scored(jobs, reference):
    """Not on GSM8K, whatever it was trained on."""
    _, run = reference
    job = jobs.submit(
        "--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", "slurm/convert_evaluate.sh", str(run), ABBA_EVALUATE=""
    )
    assert jobs.wait(job) == "COMPLETED", jobs.log(job)
    log = jobs.log(job)
    assert "does not score it: no --task in ABBA_EVALUATE" in log and "score:" not in log and "-lora" in log


def test_a_failed_run_takes_the_next_job_with_it(jobs):
    job = jobs.train(jobs.root / "failed", "data.path=nowhere.jsonl", ABBA_CHAIN="yes")
    assert jobs.wait(job) == "FAILED"
    assert jobs.exit_code(job) == 65, jobs.log(job)
    log = jobs.log(job)
    assert "nowhere.jsonl" in log and "ends with code 65" in log
    following = re.search(r"== job (\d+) converts what", log)[1]
    assert jobs.wait(following, 30) == "CANCELLED"
    assert jobs.log(following) == ""


def test_array_elements_train_at_their_own_rate(jobs, counter):
    options = [*SHAPE, "--nodes=1", "--array=0-1"]
    variables = {"ABBA_RATES": "1e-3 2e-3", "ABBA_SWEEP": str(jobs.root / "a sweep"), "ABBA_CHAIN": "no", **counter}
    job = jobs.submit(*options, "slurm/sweep.sh", "train.seed=7", **variables)
    for element, rate in enumerate(["1e-3", "2e-3"]):
        assert jobs.wait(f"{job}_{element}") == "COMPLETED"
        logs = "".join(path.read_text() for path in jobs.root.glob("sweep-*.out"))
        given = f"'quickstart' 'train.learning_rate={rate}' 'output_dir={jobs.root}/a sweep/{rate}' 'train.seed=7'"
        assert f"launch/train.py --recipe {given}\n" in logs
    again = jobs.submit(*options, "--array=1-3", "slurm/sweep.sh", **variables)  # three, and the first one is not there
    assert jobs.wait(f"{again}_1") == "COMPLETED" and jobs.wait(f"{again}_2") == "FAILED"
    logs = "".join(path.read_text() for path in jobs.root.glob("sweep-*.out"))
    assert "ABBA_RATES has 2 rates, from 0, and none for element 2: sbatch --array=0-1 slurm/sweep.sh" in logs


def test_what_another_method_trained_is_no_lora_and_planned_for_no_gpu(jobs, counter):
    options = ["--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", "slurm/convert_evaluate.sh"]
    for method, what in {"hira": "adapter", "lora": "LoRA"}.items():
        run = jobs.root / f"counted by {method}"
        job = jobs.submit(*options, str(run), **counter)
        assert jobs.wait(job) == "COMPLETED", jobs.log(job)
        assert f"== the {what} is {run}-lora, the score {run}/score/scores.json" in jobs.log(job)
        assert "\nplanned" not in jobs.log(job)  # a score needs fewer GPUs, and smaller ones


@pytest.fixture
def bad_node(jobs, tmp_path):
    """A directory that holds python on node1 and something else on node2."""
    binaries = tmp_path / "env" / "bin"
    binaries.mkdir(parents=True)
    python = binaries / "python"
    good = jobs.environment["ABBA_ENV"].removeprefix("venv:") + "/bin/python"
    python.write_text(f'#!/bin/bash\n[ "$SLURMD_NODENAME" = node2 ] && exec /usr/bin/python3 "$@"\nexec {good} "$@"\n')
    python.chmod(0o755)
    return binaries.parent


def refused(jobs, job, code, *words):
    assert jobs.wait(job) == "FAILED", jobs.log(job)
    log = jobs.log(job)
    assert jobs.exit_code(job) == code, log
    for word in words:
        assert re.search(word, log), log
    assert "== python launch/train.py" not in log and "Traceback" not in log
    assert not list((jobs.root / "scratch").glob(f"abba-{job}-*"))


def test_a_bad_node_is_named(jobs, bad_node):
    job = jobs.train(jobs.root / "bad-node", ABBA_ENV=f"venv:{bad_node}")
    refused(jobs, job, 71, r"preflight: node2: .*python3: ModuleNotFoundError: No module named '\w+'; is ABBA_ENV")
    assert "preflight: node1" not in jobs.log(job)


def test_a_python_that_is_not_there(jobs, tmp_path):
    job = jobs.train(jobs.root / "no-python", ABBA_ENV=f"venv:{tmp_path}/nowhere", PATH="/usr/bin:/bin")
    assert jobs.wait(job) == "FAILED"
    assert re.search(r"ABBA_ENV: .*/nowhere/bin holds no python on node1", jobs.log(job)), jobs.log(job)
    assert jobs.exit_code(job) == 71


BAD = {
    "recipe": ({"ABBA_RECIPE": "lama70b"}, [], 64, r"preflight: node1: recipe: 'lama70b': no such recipe file"),
    "base": (
        {}, ["model.name_or_path=meta-llama/Llama-3.1-70B"], 66,
        r"preflight: node2: .*'meta-llama/Llama-3.1-70B' is neither a directory .* nor whole in the Hub cache",
    ),
    "space": ({"ABBA_SCRATCH_GIB": "1e9"}, [], 66, r"preflight: node2: no space on scratch: [\d.]+ GiB are free"),
    "scratch": ({"ABBA_SCRATCH": "/proc/nowhere"}, [], 66, r"preflight: node2: ABBA_SCRATCH: cannot make /proc/"),
    "address": (
        {"ABBA_MASTER_ADDR": "192.0.2.1", "ABBA_MEET_SECONDS": "15"}, [], 71,
        r"preflight: node2: cannot reach the first node at 192.0.2.1:\d+: .*; see ABBA_MASTER_ADDR",
    ),
    "chain": ({"ABBA_CHAIN": "maybe"}, [], 64, "ABBA_CHAIN=maybe is neither yes nor no"),
    "environment": ({"ABBA_ENV": "docker:image"}, [], 64, r"ABBA_ENV: 'docker:image' is none of venv:"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_cannot_work_ends_before_training(jobs, what):
    variables, overrides, code, message = BAD[what]
    refused(jobs, jobs.train(jobs.root / f"bad-{what}", *overrides, **variables), code, message)
    assert not (jobs.root / f"bad-{what}").exists()


def test_a_port_in_use(jobs, cluster):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        # In a node's own network the port would be free: what holds it has to run there.
        holder = ["python3", "-c", f"import socket, time; s = socket.create_server(('', {port})); time.sleep(60)"]
        netns = ["ip", "netns", "exec", "abba-node1"]
        held = subprocess.Popen([*netns, *holder]) if (cluster / "mode").read_text().strip() == "netns" else None
        try:
            job = jobs.train(jobs.root / "port", ABBA_MASTER_PORT=str(port), ABBA_MEET_SECONDS="15")
            refused(jobs, job, 71, rf"preflight: node1: port {port}, .*: Address already in use")
        finally:
            if held is not None:
                held.kill()
                held.wait()


def test_uneven_nodes(jobs):
    options = ["--nodes=2", "--ntasks=3", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
    job = jobs.train(jobs.root / "uneven", options=options)
    refused(jobs, job, 71, r"uneven nodes: 3 ranks on node\[1-2\];")


def test_what_sbatch_refuses_is_passed_through(jobs):
    done = jobs.command("sbatch", "--partition=nowhere", "slurm/llama70b_abba.sh")
    assert done.returncode != 0 and "invalid partition specified: nowhere" in done.stderr


def test_help_and_a_start_without_sbatch(jobs):
    done = jobs.command("bash", "slurm/llama70b_abba.sh", "--help")
    assert done.returncode == 0 and "sbatch slurm/llama70b_abba.sh" in done.stdout and "ABBA_MOUNTS" in done.stdout
    plain = jobs.command("bash", "slurm/llama70b_abba.sh")
    assert plain.returncode == 64 and plain.stderr.startswith("slurm: this is a batch job: sbatch slurm/")
