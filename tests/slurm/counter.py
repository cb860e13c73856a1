"""Stands in for python where the subject is the batch script: starts in no time, and counts instead of training.

Its run is exact when RUN/metrics.jsonl holds each step once. Stopped by USR1 or TERM it leaves with 75,
as training does: rank 0 first, the others when the launcher tells them to.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

program, arguments = sys.argv[1], sys.argv[2:]
rank = int(os.environ["SLURM_PROCID"])
run = Path(next((word.partition("=")[2] for word in arguments if word.startswith("output_dir=")), "none"))
told = " ".join(arguments)

steps = 600 if "slowly" in run.name else 60  # of 0.1 s
asked_in = told.partition("asked in ")[2].split("/")[0].split()  # a program at each start
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
if Path(program).stem in asked_in[start : start + 1]:
    print(program, "does not listen yet", file=sys.stderr, flush=True)
    time.sleep(60)  # and is ended by the signal
if program == "slurm/preflight.py" and rank == 0:
    method = next((word for word in ("hira", "lora", "full") if f"counted by {word}" in told), "abba")
    print("planned" if "--gpu-memory-gib" in told else "any GPU", file=sys.stderr)
    values = {"RUN": run, "BASE": "base", "DTYPE": "bfloat16", "METHOD": method}
    print(*(f"abba-recipe {name}={value}" for name, value in values.items()), sep="\n", flush=True)
    if "early" in run.name and "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(60)  # long enough to be requeued meanwhile
if program == "launch/convert.py":
    print("threads:", os.environ["OMP_NUM_THREADS"])
if program != "launch/train.py":
    sys.exit(0)

asked = []
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda *_: asked.append(1))
run.mkdir(parents=True, exist_ok=True)
if rank == 0:
    print("meeting at", os.environ["MASTER_ADDR"], "without ~/.local" * sys.flags.no_user_site)
    print("continuing" if (run / "metrics.jsonl").exists() else "from the start", flush=True)
    with (run / "metrics.jsonl").open("a+") as metrics:
        metrics.seek(0)
        for step in range(len(metrics.readlines()), steps):
            if asked:
                sys.exit(75)
            metrics.write(json.dumps({"step": step + 1}) + "\n")
            metrics.flush()
            time.sleep(0.1)
    (run / "done").touch()
while not (run / "done").exists():
    if asked:
        time.sleep(1)
        sys.exit(75)
    time.sleep(0.1)
