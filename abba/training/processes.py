"""Which processes of this machine are alive, as /proc says."""

import os
import time
from pathlib import Path

# Words of a launcher's command line, as programs or as modules.
LAUNCHERS = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}
LAUNCHERS |= {"slurmstepd:", "orted", "prted", "mpirun", "mpirun.openmpi", "orterun", "mpiexec"}


def machine() -> str:
    """The same for two processes exactly when a process id means the same process to both."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process_started(pid: int) -> int | None:
    """When process `pid` began, in clock ticks since boot; None when it is dead. Tells it from a later namesake."""
    fields = _stat(pid)
    return None if fields is None or fields[0] in "ZX" else int(fields[19])


def launchers_above() -> dict[int, int | None]:
    """(pid, start) of the launcher's processes that this one runs under, parent first; empty without a launcher."""
    found: dict[int, int | None] = {}
    pid = os.getppid()
    while pid > 1 and _words(pid) & LAUNCHERS:
        found[pid] = process_started(pid)
        fields = _stat(pid)
        pid = int(fields[1]) if fields else 0
    return found


def _stat(pid: int) -> list[str] | None:
    """State, parent, ... : the fields of /proc/PID/stat after the command's name, which may hold spaces."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _words(pid: int) -> set[str]:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return set()
    return {os.path.basename(word) for argument in command.split("\0")[:8] for word in argument.split(" ")[:1]}


def own_start_time() -> float:
    """When this process began, in seconds since the epoch."""
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + process_started(os.getpid()) / os.sysconf("SC_CLK_TCK")
