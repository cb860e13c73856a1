"""The templates as jobs of a real cluster: two nodes of two ranks, on CPUs; the tiny model by ABBA_RECIPE."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from abba.checkpoint.format import KINDS, ShardReader, list_checkpoints, read_state
from tests import warm

CLUSTER = Path(__file__).with_name("cluster.sh")
STEPS, SAVE_STEPS = 16, 4
SMALL = [f"train.max_steps={STEPS}", f"checkpoint.save_steps={SAVE_STEPS}", "train.learning_rate=1e-2"]
SMALL += ["adapter.layer_range=[0,1]", "adapter.r1=4", "adapter.r2=3", "train.gradient_checkpointing=none"]
SMALL += ["train.global_batch_size=8", "train.per_device_train_batch_size=2"]
SMALL += ["data.max_rows=60", "data.max_length=96", "data.eval_rows=4", "train.eval_steps=8"]
SHAPE = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"]
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "BOOT_FAIL", "OUT_OF_MEMORY"}


PATIENCE = 900  # seconds; a start takes 30 on two idle cores


class Jobs:
    """What is submitted, and what can be done to it."""

    def __init__(self, cluster: Path, repository: Path, root: Path) -> None:
        self.root, self._repository = root, repository
        foreign = (*warm.LAUNCHERS, "SLURM_", "SBATCH_", "ABBA_")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        self.environment = {
            **inherited,
            "SLURM_CONF": str(cluster / "etc/slurm.conf"),
            "SBATCH_OUTPUT": str(root / "%x-%j.out"),
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HOME": str(root / "hub"),
            "ABBA_RECIPE": "quickstart",
            "ABBA_ENV": f"venv:{sys.prefix}",
            "ABBA_SCRATCH": str(root / "scratch"),
            "ABBA_SCRATCH_GIB": "0.1",
            "ABBA_EVALUATE": "--task gsm8k --data recipes/assets/stories/test.jsonl --limit 16 --max-new-tokens 40",
        }

    def command(self, *command: str, **variables: str) -> subprocess.CompletedProcess:
        environment = {**self.environment, **variables}
        return subprocess.run(
            command, cwd=self._repository, env=environment, capture_output=True, text=True, timeout=60
        )

    def submit(self, *arguments: str, **variables: str) -> str:
        """The job id of `sbatch ARGUMENTS`."""
        done = self.command("sbatch", "--parsable", *arguments, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def train(self, run: Path, *overrides: str, options: list[str] = SHAPE, **variables: str) -> str:
        arguments = [*options, "slurm/llama70b_abba.sh", *SMALL, f"output_dir={run}", *overrides]
        return self.submit(*arguments, **{"ABBA_CHAIN": "no", **variables})

    def control(self, *arguments: str) -> None:
        done = self.command(*arguments)
        assert done.returncode == 0, done.stderr

    def show(self, job: str) -> dict[str, str]:
        """scontrol's fields of a job."""
        done = self.command("scontrol", "-o", "show", "job", job)
        return dict(word.partition("=")[::2] for word in done.stdout.split() if "=" in word)

    def log(self, job: str) -> str:
        return "".join(path.read_text() for path in self.root.glob(f"*-{job}.out"))

    def until(self, happened: Callable[[], bool], job: str, what: str, seconds: float = PATIENCE) -> None:
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline, f"{what} has not happened: {self.show(job)}\n{self.log(job)}"
            time.sleep(0.2)

    def wait(self, job: str, seconds: float = PATIENCE) -> str:
        """Wait for a job's end and that of its processes on every node; its state."""
        self.until(lambda: self.show(job).get("JobState") in ENDED, job, "the end", seconds)
        self.until(lambda: not self.processes(job), job, "the end of its processes", 30)
        return self.show(job)["JobState"]

    def processes(self, job: str, **variables: str) -> dict[int, str]:
        """Pid -> command line of a job's processes on any node, for all nodes are this machine."""
        conf = self.environment["SLURM_CONF"]
        wanted = {f"{name}={value}" for name, value in {"SLURM_JOB_ID": job, "SLURM_CONF": conf, **variables}.items()}
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if wanted <= set((process / "environ").read_bytes().decode(errors="replace").split("\0")):
                    found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
            except OSError:  # ended meanwhile
                continue
        return found

    def signal_rank(self, job: str, rank: int, number: int) -> None:
        processes = self.processes(job, SLURM_PROCID=str(rank)).items()
        os.kill(next(pid for pid, command in processes if "launch/train.py --recipe" in command), number)

    def exit_code(self, job: str) -> int:
        return int(self.show(job)["ExitCode"].partition(":")[0])

    def until_step(self, job: str, run: Path, step: int) -> None:
        def reached() -> bool:
            assert self.show(job)["JobState"] not in ENDED, self.log(job)
            return last_step(run) >= step

        self.until(reached, job, f"step {step}")

    def until_restarted(self, job: str, times: int) -> None:
        def restarted() -> bool:
            now = self.show(job)
            assert now["JobState"] != "FAILED", self.log(job)
            return int(now["Restarts"]) >= times and now["JobState"] == "RUNNING"

        self.until(restarted, job, f"restart {times}")


def outcome(run: Path) -> tuple[int, str, list[tuple[int, str]]]:
    """What is the same when a run is: its last step, SHA-256 of masters and moments, losses to the bit."""
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    state, digest = read_state(checkpoint), hashlib.sha256()
    with ShardReader(checkpoint, state) as reader:
        for kind in KINDS:
            for name in state.tensors:
                digest.update(reader.read(kind, name).numpy().tobytes())
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return state.step, digest.hexdigest(), [(line["step"], line["loss"].hex()) for line in records if "loss" in line]


def last_step(run: Path) -> int:
    """Of those in the metrics; 0 before the first. The last line may be only half written."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
