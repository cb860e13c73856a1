"""Programs started by forking a process that has the heavy libraries imported: a second instead of ten.

What runs is the real program file with real arguments, in a process of its own.
"""

import multiprocessing
import os
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI", "LOCAL_SIZE")
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["tests.warm_imports"])


@dataclass(frozen=True)
class Finished:
    """How a program ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


class Program:
    """A started program: `wait` for it, or `kill` it."""

    def __init__(self, directory: Path, command: list[str], variables: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._out, self._err = directory / "stdout", directory / "stderr"
        for stream in (self._out, self._err):  # here, so that they can be read however early the process ends
            stream.write_text("")
        self.process = _forks.Process(target=_child, args=(command, variables, str(self._out), str(self._err)))
        self.process.start()

    def wait(self, timeout: float = 240) -> Finished:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout} s\n{self._err.read_text()[-3000:]}")
        return Finished(self.process.exitcode, self._out.read_text(), self._err.read_text())

    def kill(self) -> None:
        self.process.kill()


def run(directory: Path, *command: str, **variables: str) -> Finished:
    """Run `command` (a program of the repository and its arguments) to its end."""
    return Program(directory, list(command), variables).wait()


def _child(command: list[str], variables: dict[str, str], out: str, err: str) -> None:
    for stream, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY)
        os.dup2(descriptor, stream)
        os.close(descriptor)
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith(LAUNCHERS)]:
        del os.environ[name]
    os.environ.update(variables)
    assert "tests.warm_imports" in sys.modules, "forkserver hides an import error: import tests.warm_imports to see it"
    torch = sys.modules["torch"]  # makes its thread pool anew after a fork, and fails if several threads ask at once
    torch.set_num_threads(torch.get_num_threads())
    script = ROOT / command[0]
    sys.argv, sys.path[0:0] = [str(script), *command[1:]], [str(script.parent)]
    code = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
