#!/usr/bin/env python
"""A two-layer perceptron that knows the digits 0-7 learns 8 and 9: full, LoRA and ABBA at equal parameters.

    python benchmarks/digits.py
    python benchmarks/digits.py --ranks 4 --seeds 2 --rates 3e-3 1e-2 3e-2 --output runs/digits

On scikit-learn's 8x8 digits. LoRA has rank r, ABBA r1 = r2 = r / 2; full training has more parameters, whatever r.
Every method takes the rate at which its validation rows come out best, averaged over the seeds; the test rows
choose nothing. Goal "new" trains on 8 and 9 alone, which are soon known while 0-7 are forgotten; goal "all" on all
ten. Writes digits.json, .md and .png; the same command continues what was interrupted.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

from cells import Cell, chosen, rate_label, run_cells, write_whole
from measure import RESULTS, as_table, machine
from toy import adapt

GOALS = ("all", "new")
COLORS = {"full": "#7a7974", "lora": "#2a78d6", "abba": "#eb6834"}


def summary(groups: dict[tuple[str, int, str], list[Cell]], rates: list[float]) -> list[dict[str, Any]]:
    rows = []
    for (goal, rank, method), group in groups.items():
        test = [cell["test"]["accuracy"] for cell in group]
        rows.append(
            {
                "goal": goal,
                "method": method,
                "rank": rank or "",
                "parameters": f"{group[0]['parameters']:,}",
                "rate": rate_label(group[0]["rate"], rates),
                "test %": f"{statistics.mean(test):.1f}",
                "spread": f"{statistics.stdev(test) if len(test) > 1 else 0:.1f}",
                "min-max": f"{min(test):.1f}-{max(test):.1f}",
                "0-7 %": f"{statistics.mean(cell['test']['old'] for cell in group):.1f}",
                "seeds": len(group),
            }
        )
    return rows


def draw(groups: dict[tuple[str, int, str], list[Cell]], path: Path) -> None:
    """Test accuracy against steps at each method's rate, mean and range over seeds: a panel for each goal and rank."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    goals = list(dict.fromkeys(goal for goal, _, _ in groups))
    ranks = sorted({rank for _, rank, _ in groups} - {0})
    figure, axes = plt.subplots(
        len(goals),
        len(ranks),
        figsize=(3.6 * len(ranks), 2.8 * len(goals)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for line, goal in zip(axes, goals, strict=True):
        for axis, rank in zip(line, ranks, strict=True):
            for method, color in COLORS.items():
                group = groups[goal, 0 if method == "full" else rank, method]
                steps = [look["step"] for look in group[0]["curve"]]
                at = list(zip(*[[look["accuracy"] for look in cell["curve"]] for cell in group], strict=True))
                label = f"{method}, {group[0]['rate']:g}"
                axis.plot(steps, [statistics.mean(values) for values in at], color=color, label=label)
                axis.fill_between(steps, list(map(min, at)), list(map(max, at)), color=color, alpha=0.2)
            axis.set_title(f"{'8 and 9 alone' if goal == 'new' else 'all ten digits'}, rank {rank}", fontsize=10)
            axis.legend(fontsize=8, title="method, rate", title_fontsize=8, loc="lower right")
            axis.grid(alpha=0.3)
    figure.supxlabel("steps", fontsize=10)
    figure.supylabel("test accuracy, %", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8], help="of LoRA; even, at most 10")
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1])
    parser.add_argument("--seeds", type=int, default=5, help="how many")
    parser.add_argument("--steps", type=int, default=300, help="of adaptation")
    parser.add_argument("--every", type=int, default=10, help="steps between two points of a curve")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for rank in arguments.ranks:
        if rank % 2 or not 2 <= rank <= 10:
            parser.error(f"--ranks: {rank} is not an even number from 2 to 10, the classes")
    methods = [("full", 0), *((method, rank) for rank in dict.fromkeys(arguments.ranks) for method in ("lora", "abba"))]
    cells = {
        f"{goal}, {method} {rank}, rate {rate:g}, seed {seed}": (
            goal, method, rank, rate, seed, arguments.steps, arguments.every
        )
        for goal in GOALS
        for method, rank in methods
        for rate in dict.fromkeys(arguments.rates)
        for seed in range(arguments.seeds)
    }  # fmt: skip
    path = arguments.output / "digits.json"
    settings = {"steps": arguments.steps, "every": arguments.every}
    found = list(run_cells(path, adapt, cells, settings, arguments.processes).values())
    groups = chosen(found, ("goal", "rank", "method"))
    command = shlex.join(["python", *sys.argv])
    text = f"`{command}`\n\n{machine()}\n\n{as_table(summary(groups, arguments.rates))}\n"
    write_whole(path.with_suffix(".md"), text)
    draw(groups, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
