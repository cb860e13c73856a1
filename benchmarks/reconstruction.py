#!/usr/bin/env python
"""How closely LoRA and ABBA of equal parameters approximate a matrix, over kinds of matrices, ranks and seeds.

    python benchmarks/reconstruction.py
    python benchmarks/reconstruction.py --kinds gaussian parity --ranks 8 16 --seeds 1 --output runs/reconstruction

LoRA has rank r and ABBA r1 = r2 = r / 2. LoRA is the truncated SVD, which is optimal, so its error is exact; ABBA's
is the best of several starts of an optimiser that may be beaten: an upper bound. "sum" is B1 A1 + B2 A2 of the same
ranks, fitted by L-BFGS as ABBA is; it is LoRA, and shows what the optimiser is worth where the answer is known.
"halves" is one low-rank pair for each half of the outputs or inputs, concatenated, the better of both, for at most
the same parameters. Errors are relative, in the Frobenius norm. Writes reconstruction.json, .md and .png; the same
command continues what was interrupted.
"""

import argparse
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from cells import run_cells, write_whole
from factorise import best_halves, best_low_rank, fit_abba, fit_sum, relative_error, singular_tail
from matrices import KINDS, WEIGHTS, matrix
from measure import RESULTS, as_table, machine

CLOSED_FORM_TOLERANCE = 1e-6
STARTS = {1: 8, 2: 8, 4: 6, 8: 4, 16: 3, 32: 2}  # random ones, by r1 = r2: large ones take longer and differ less
LINES = {
    "lora": ("LoRA = sum", "#2a78d6", "-"),
    "abba": ("ABBA", "#eb6834", "-"),
    "halves": ("halves", "#7a7974", "--"),
}


def approximate(kind: str, size: int, rank: int, seed: int) -> dict[str, Any]:
    """One cell: every way's relative error at the parameters of LoRA `rank`."""
    began, began_cpu = time.perf_counter(), time.process_time()
    w_OI = matrix(kind, size, seed)
    b_OR, a_RI = best_low_rank(w_OI, rank)
    lora, tail = relative_error(w_OI, b_OR @ a_RI), singular_tail(w_OI, rank)
    assert abs(lora - tail) <= CLOSED_FORM_TOLERANCE, (
        f"{kind}: LoRA's error {lora} is not that of the SVD's tail {tail}"
    )
    abba, starts = fit_abba(w_OI, rank // 2, STARTS.get(rank // 2, 4), seed)
    halves, halves_parameters = best_halves(w_OI, rank * sum(w_OI.shape))
    return {
        "kind": kind,
        "shape": list(w_OI.shape),
        "rank": rank,
        "seed": seed,
        "parameters": rank * sum(w_OI.shape),
        "lora": lora,
        "lora closed form": tail,
        "abba": abba,
        "abba starts": starts,
        "sum": fit_sum(w_OI, rank // 2, seed),
        "halves": halves,
        "halves parameters": halves_parameters,
        "seconds": time.perf_counter() - began,
        "cpu seconds": time.process_time() - began_cpu,
    }


def holds(cell: dict[str, Any]) -> bool:
    """The paper's trend, E_ABBA(r / 2, r / 2) <= E_LoRA(r); what both represent exactly counts as equal."""
    return cell["abba"] <= cell["lora"] + CLOSED_FORM_TOLERANCE


def summary(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each kind and rank: means over seeds, and the spread of ABBA's error."""
    rows = []
    for kind, rank in dict.fromkeys((cell["kind"], cell["rank"]) for cell in cells):
        group = [cell for cell in cells if (cell["kind"], cell["rank"]) == (kind, rank)]
        mean = {way: statistics.mean(cell[way] for cell in group) for way in ("lora", "abba", "sum", "halves")}
        abba = [cell["abba"] for cell in group]
        rows.append(
            {
                "matrix": kind,
                "LoRA rank": rank,
                "parameters": f"{group[0]['parameters']:,}",
                "LoRA": f"{mean['lora']:.4f}",
                "ABBA": f"{mean['abba']:.4f}",
                "ABBA min-max": f"{min(abba):.4f}-{max(abba):.4f}",
                "sum": f"{mean['sum']:.4f}",
                "halves": f"{mean['halves']:.4f}",
                "ABBA <= LoRA": f"{sum(map(holds, group))} of {len(group)}",
            }
        )
    return rows


def verdict(cells: list[dict[str, Any]]) -> str:
    """Where the trend holds and where not, in words."""
    failing: dict[str, set[int]] = {}
    for cell in cells:
        if not holds(cell):
            failing.setdefault(cell["kind"], set()).add(cell["rank"])
    kept = sum(map(holds, cells))
    lines = [
        f"E_ABBA <= E_LoRA at equal parameters in {kept} of {len(cells)} cells. It fails, for a seed at least, at:"
    ]
    lines += [f"- {kind}: {', '.join(map(str, sorted(ranks)))}" for kind, ranks in failing.items()]
    return "\n".join(lines) if failing else lines[0].replace(" It fails, for a seed at least, at:", "")


def draw(cells: list[dict[str, Any]], path: Path) -> None:
    """A panel for each kind: error against LoRA's rank, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(cell["kind"] for cell in cells))
    ranks = sorted({cell["rank"] for cell in cells})
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.2 * columns, 2.6 * lines), squeeze=False, sharex=True, layout="constrained"
    )
    for axis, kind in zip(axes.flat, kinds, strict=False):
        for way, (label, color, style) in LINES.items():
            of = {rank: [c[way] for c in cells if (c["kind"], c["rank"]) == (kind, rank)] for rank in ranks}
            axis.plot(ranks, [statistics.mean(of[r]) for r in ranks], style, color=color, label=label, marker=".")
            axis.fill_between(ranks, [min(of[r]) for r in ranks], [max(of[r]) for r in ranks], color=color, alpha=0.25)
        axis.set_title(kind, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(kinds) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize=8)
    figure.supxlabel("rank of LoRA; ABBA has r1 = r2 = half of it, and as many parameters", fontsize=10)
    figure.supylabel("relative Frobenius error", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS, *WEIGHTS], default=[*KINDS, *WEIGHTS])
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4, 8, 16, 32, 64], help="of LoRA; even")
    parser.add_argument("--seeds", type=int, default=3, help="how many; of the matrix and the starts")
    parser.add_argument("--size", type=int, default=128, help="of the matrices that are made, a power of 2")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.size < 8 or arguments.size & (arguments.size - 1):
        parser.error(f"--size: {arguments.size} is not a power of 2 of at least 8")
    for rank in arguments.ranks:
        if rank % 2 or not 2 <= rank <= arguments.size:
            parser.error(f"--ranks: {rank} is not an even number from 2 to {arguments.size}")
    cells = {
        f"{kind}, rank {rank}, seed {seed}": (kind, arguments.size, rank, seed)
        for rank in sorted(
            set(arguments.ranks), reverse=True
        )  # the long ones first, so that the processes end together
        for kind in dict.fromkeys(arguments.kinds)
        for seed in range(arguments.seeds)
    }
    path = arguments.output / "reconstruction.json"
    found = list(run_cells(path, approximate, cells, {"size": arguments.size}, arguments.processes).values())
    order = {kind: at for at, kind in enumerate(arguments.kinds)}
    found.sort(key=lambda cell: (order[cell["kind"]], cell["rank"], cell["seed"]))
    command = shlex.join(["python", *sys.argv])
    text = f"`{command}`\n\n{machine()}\n\n{verdict(found)}\n\n{as_table(summary(found))}\n"
    write_whole(path.with_suffix(".md"), text)
    draw(found, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
