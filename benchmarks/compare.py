#!/usr/bin/env python
"""Every method on the embedded tiny base at equal parameters, on two kinds of word problems.

    python benchmarks/compare.py
    python benchmarks/compare.py --tasks stories --methods lora abba --seeds 1 --output runs/compare

Factors have as many elements as those of LoRA of `--rank`; DoRA has its magnitudes on top, and full fine-tuning trains
all of the base. For each seed every method sees the same rows in the same order under the same schedule. Each has five
learning rates of the series 1, 2, 5, 10 around where it belongs; the one with the best validation accuracy over the
seeds is taken, and the test problems choose nothing. Exact match: greedy generation, strict grading. Training and
generation (fp32) are in tiny.py, the problems in problems.py. Writes compare.json, .md and .png; the same command
continues what was interrupted.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from cells import Cell, chosen, rate_label, run_cells, write_whole
from measure import RESULTS, as_table, machine
from problems import TASKS
from tiny import INTERVAL, learn

# Around the best of a pilot with one seed, chosen on validation as here.
RATES = {
    "full": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    "lora": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    "rslora": (5e-4, 1e-3, 2e-3, 5e-3, 1e-2),
    "dora": (2e-3, 5e-3, 1e-2, 2e-2, 5e-2),
    "hira": (5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    "loha": (5e-3, 1e-2, 2e-2, 5e-2, 1e-1),
    "abba": (1e-3, 2e-3, 5e-3, 1e-2, 2e-2),
}
STEPS = {"stories": 60, "bystander": 140}
COLORS = {
    "full": "#7a7974",
    "lora": "#2a78d6",
    "rslora": "#1baf7a",
    "dora": "#4a3aa7",
    "hira": "#eda100",
    "loha": "#e87ba4",
    "abba": "#eb6834",
}


def summary(groups: dict[tuple, list[Cell]], rates: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for (task, method), group in groups.items():
        test = [cell["test"]["accuracy"] for cell in group]
        extra = group[0]["magnitudes"]
        rows.append(
            {
                "task": task,
                "method": method,
                "parameters": f"{group[0]['parameters']:,}" + (f" ({extra:,} of them magnitudes)" if extra else ""),
                "rate": rate_label(group[0]["rate"], rates[method]),
                "validation %": f"{statistics.mean(cell['validation']['accuracy'] for cell in group):.1f}",
                "test %": f"{statistics.mean(test):.1f}",
                "spread": f"{statistics.stdev(test) if len(test) > 1 else 0:.1f}",
                "min-max": f"{min(test):.1f}-{max(test):.1f}",
                "seeds": len(group),
                "training, s": f"{statistics.mean(cell['training cpu seconds'] for cell in group):.0f}",
            }
        )
    return rows


def sweep(cells: list[Cell]) -> list[dict[str, Any]]:
    """Validation accuracy at every rate, mean of the seeds."""
    rates = sorted({cell["rate"] for cell in cells})
    rows = []
    for task, method in dict.fromkeys((cell["task"], cell["method"]) for cell in cells):
        at: dict[float, list[float]] = {rate: [] for rate in rates}
        for cell in cells:
            if (cell["task"], cell["method"]) == (task, method):
                at[cell["rate"]].append(cell["validation"]["accuracy"])
        means = {f"{rate:g}": f"{statistics.mean(found):.1f}" if found else "" for rate, found in at.items()}
        rows.append({"task": task, "method": method, **means})
    return rows


def draw(groups: dict[tuple, list[Cell]], path: Path) -> None:
    """Training loss against steps at each method's rate, mean and range over seeds: a panel for each task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = list(dict.fromkeys(task for task, _ in groups))
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.2 * len(tasks), 4.0), squeeze=False, layout="constrained")
    for axis, task in zip(axes.flat, tasks, strict=True):
        for (of, method), group in groups.items():
            if of != task:
                continue
            at = list(zip(*(cell["curve"] for cell in group), strict=False))  # as far as all seeds came
            steps = [INTERVAL * (point + 0.5) for point in range(len(at))]
            label = f"{method}, {group[0]['rate']:g}"
            axis.plot(steps, list(map(statistics.mean, at)), color=COLORS[method], label=label)
            axis.fill_between(steps, list(map(min, at)), list(map(max, at)), color=COLORS[method], alpha=0.15)
        axis.set_title(task, fontsize=10)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="method, rate", title_fontsize=8)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel(f"training loss per token, mean of {INTERVAL} steps", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--rates", nargs="+", type=float, help="for every method, instead of its own five")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA; even; ABBA has r1 = r2 = half of it")
    parser.add_argument("--seeds", type=int, default=3, help="how many; of the rows' order and the initial factors")
    parser.add_argument("--steps", type=int, help=f"of every task, instead of {STEPS}")
    parser.add_argument("--batch", type=int, default=8, help="problems in a step")
    parser.add_argument("--scored", type=int, default=128, help="problems of validation, and of test")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.rank < 2 or arguments.rank % 2:
        parser.error(f"--rank: {arguments.rank} is not an even number of at least 2")
    rates = {method: arguments.rates or RATES[method] for method in dict.fromkeys(arguments.methods)}
    steps = {task: arguments.steps or STEPS[task] for task in TASKS}
    sizes = {name: getattr(arguments, name) for name in ("rank", "batch", "scored")}
    cells = {
        f"{task}, {method}, rate {rate:g}, seed {seed}": (task, method, rate, seed, steps[task], *sizes.values())
        for seed in range(arguments.seeds)
        for task in dict.fromkeys(arguments.tasks)
        for method in rates
        for rate in dict.fromkeys(rates[method])
    }
    path = arguments.output / "compare.json"
    found = list(run_cells(path, learn, cells, {"steps": steps, **sizes}, arguments.processes).values())
    groups = chosen(found, ("task", "method"))
    command = shlex.join(["python", *sys.argv])
    tables = f"{as_table(summary(groups, rates))}\n\nValidation, %, by rate:\n\n{as_table(sweep(found))}"
    text = f"`{command}`\n\n{machine()}\n\n{tables}\n"
    write_whole(path.with_suffix(".md"), text)
    draw(groups, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
