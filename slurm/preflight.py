#!/usr/bin/env python
"""One task on every node of a job, before training: what would end it later is a line that names the node.

    srun --ntasks-per-node=1 python slurm/preflight.py --recipe gsm8k --gpus 8

Checked are the Python environment, the recipe's base model, the scratch directory, the GPUs, and that every node
reaches the first one at MASTER_ADDR:MASTER_PORT. A network that the ranks could not use to the full is a warning. The
first node prints what a batch script needs to know of the recipe, a line "abba-recipe NAME=VALUE" for each: RUN, its
output_dir; BASE, REVISION and DTYPE; METHOD; and TASK, which its dataset has a test split of.
"""

import argparse
import ctypes
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ENVIRONMENT, STORAGE = 71, 66  # exit codes; those of recipe and base model are their own
INFINIBAND = Path("/dev/infiniband")  # RoCE's devices too
VERBS = "libibverbs.so.1"
MEET_SECONDS = float(os.environ.get("ABBA_MEET_SECONDS", "60"))
GIB = 2**30


class RefusedError(Exception):
    def __init__(self, exit_code: int, reason: str) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


def main(said: TextIO) -> int:
    """Checks this node; what a batch script reads goes to `said`, and nothing else does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--gpus", type=int, required=True, help="that each node must show")
    parser.add_argument("--gpu-memory-gib", type=float, default=0, help="that each of them must have, within 10%%")
    parser.add_argument("--free-gib", type=float, default=0, help="that must be free in TMPDIR")
    arguments = parser.parse_intermixed_args()
    node, number = os.environ.get("SLURMD_NODENAME", socket.gethostname()), int(os.environ.get("SLURM_NODEID", 0))
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    nodes, job = int(os.environ.get("SLURM_NNODES", 1)), os.environ.get("SLURM_JOB_ID", "")
    try:
        meet(address, number, nodes, job)
        check_scratch(tempfile.gettempdir(), arguments.free_gib)
        check_environment()
        check_gpus(arguments.gpus, arguments.gpu_memory_gib)
        warning = network_warning(nodes)
        if warning:
            print(f"preflight: {node}: WARNING: {warning}", file=sys.stderr, flush=True)
        values = check_recipe(arguments.recipe, arguments.overrides, number)
    except RefusedError as refused:
        print(f"preflight: {node}: {refused}", file=sys.stderr, flush=True)
        return refused.exit_code
    if number == 0:
        for name, value in values.items():
            print(f"abba-recipe {name}={value}", file=said, flush=True)
    return 0


def check_scratch(directory: str, wanted_gib: float) -> None:
    free_gib = shutil.disk_usage(directory).free / GIB
    if free_gib < wanted_gib:
        raise RefusedError(
            STORAGE,
            f"no space on scratch: {free_gib:.1f} GiB are free in {directory}, {wanted_gib:g} are wanted; "
            "clear it, choose another ABBA_SCRATCH, or lower ABBA_SCRATCH_GIB",
        )


def check_environment() -> None:
    try:
        import deepspeed  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401

        import abba  # noqa: F401
    except Exception as error:  # a library that does not fit the node raises anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise RefusedError(
            ENVIRONMENT, f"{sys.executable}: {type(error).__name__}: {reason}; is ABBA_ENV the right environment?"
        ) from None


def check_gpus(wanted: int, memory_gib: float) -> None:
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return  # ranks on CPUs, as asked
    import torch

    found = [torch.cuda.get_device_properties(index).total_memory / GIB for index in range(torch.cuda.device_count())]
    refuse_gpus(found, wanted, memory_gib)


def refuse_gpus(found_gib: list[float], wanted: int, memory_gib: float) -> None:
    """Raises RefusedError when there are fewer GPUs than ranks, or one is smaller than what was planned for."""
    if len(found_gib) < wanted:
        raise RefusedError(ENVIRONMENT, f"{len(found_gib)} GPUs are seen where {wanted} ranks need one each")
    small = [f"GPU {index} has {gib:.1f} GiB" for index, gib in enumerate(found_gib) if gib < 0.97 * memory_gib]
    if small:
        raise RefusedError(ENVIRONMENT, f"{', '.join(small)}; planned for {memory_gib:g}: set ABBA_GPU_MEMORY_GIB")


def network_warning(nodes: int, devices: Path = INFINIBAND) -> str:
    """What NCCL would not say of a fast network that it cannot use, or ""."""
    if nodes == 1 or not devices.exists() or os.environ.get("DS_ACCELERATOR") == "cpu":
        return ""
    try:
        ctypes.CDLL(VERBS)
    except OSError as error:
        return (
            f"{devices} is there and {error}; NCCL falls back to TCP between nodes, which is many times slower; "
            "install libibverbs1 and ibverbs-providers in ABBA_ENV, as slurm/abba.def does"
        )
    return ""


def check_recipe(name: str, overrides: list[str], number: int) -> dict[str, str]:
    """The recipe's values that a batch script needs."""
    from abba.base_model import find_base
    from abba.errors import AbbaError
    from abba.evaluation.tasks import TASKS
    from abba.sharded.engine import checked_section
    from abba.training.recipe import load_recipe
    from abba.training.resume import refuse_no_start
    from abba.training.run_directory import RunDirectory

    try:
        recipe = load_recipe(name, overrides, RECIPES)
        checked_section(recipe.deepspeed)
        start = (recipe.model.name_or_path, recipe.adapter.init_from, recipe.checkpoint.resume)
        refuse_no_start(*start, RunDirectory(recipe.output_dir))
    except AbbaError as error:  # the same on every node: the first one says it
        raise RefusedError(
            error.exit_code, str(error) if number == 0 else "the recipe, as the first node says"
        ) from None
    model, paths = recipe.model, {source.path for source in recipe.data.all_sources}
    try:
        base = find_base(model.name_or_path, model.revision)
        if not any(base.glob("*.safetensors")):
            raise RefusedError(STORAGE, f"base model: {base} holds no *.safetensors on this node")
    except AbbaError as error:
        raise RefusedError(error.exit_code, str(error)) from None
    return {
        "RUN": recipe.output_dir,
        "BASE": model.name_or_path,
        "REVISION": model.revision or "",
        "DTYPE": model.dtype,
        "METHOD": recipe.adapter.method,
        "TASK": "gsm8k" if TASKS["gsm8k"].hub_path in paths else "",
    }


def meet(address: tuple[str, int], number: int, nodes: int, job: str) -> None:
    """Every node shakes hands with the first one where the ranks will meet."""
    greeting = f"abba preflight of job {job}\n".encode()
    if number == 0:
        receive(address, nodes - 1, greeting)
    else:
        visit(address, greeting)


def receive(address: tuple[str, int], guests: int, greeting: bytes) -> None:
    host, port = address
    deadline = time.monotonic() + MEET_SECONDS
    with socket.socket() as door:
        try:
            door.bind(("", port))
        except OSError as error:
            what = f"port {port}, where the ranks would meet: {error.strerror}"
            raise RefusedError(ENVIRONMENT, f"{what}; set ABBA_MASTER_PORT to a free one") from None
        door.listen(guests)
        for came in range(guests):
            door.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                guest, _ = door.accept()
                with guest:
                    guest.sendall(greeting)
                    guest.recv(1)  # until the guest closes: who closes first keeps the port busy for a minute
            except OSError:
                what = f"{guests - came} other node(s) did not come to {host}:{port}"
                raise RefusedError(ENVIRONMENT, f"{what} within {MEET_SECONDS:g} s; see what they say") from None


def visit(address: tuple[str, int], greeting: bytes) -> None:
    host, port = address
    deadline = time.monotonic() + MEET_SECONDS
    while True:
        try:
            with socket.create_connection(address, timeout=5) as door:
                said = door.makefile("rb").readline()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                what = f"cannot reach the first node at {host}:{port}: {error}"
                raise RefusedError(ENVIRONMENT, f"{what}; see ABBA_MASTER_ADDR") from None
            time.sleep(0.5)
    if said != greeting:
        raise RefusedError(ENVIRONMENT, f"something else than this job answers at {host}:{port}: {said[:40]!r}")


if __name__ == "__main__":
    # Libraries and their loggers write to stdout too: to stderr with that, or the batch script would read it.
    kept = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.exit(main(kept))
