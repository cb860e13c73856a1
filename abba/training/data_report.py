"""What training on a dataset will look like, in numbers, before a GPU is booked."""

import math

import torch

from abba.training.batches import BatchPlan, lines_of
from abba.training.tokens import TokenizedRows

PERCENTILES = (50, 90, 99)


def data_report(data: TokenizedRows, plan: BatchPlan, steps: int, most: float | None) -> list[str]:
    """Lines for people: rows, lengths, what is cut or left out, what is learned from, what is padding.

    Args:
        plan: of the rows that are not held out.
        steps: of the whole run.
        most: tokens on a line that holds several rows; None where each has a line of its own.
    """
    total, learned = data.tokens(plan.rows), data.supervised_tokens(plan.rows)
    marks = "  ".join(f"p{p} {percentile(data.uncut, p):,}" for p in PERCENTILES)
    left_out = sum(data.left_out.values())
    epoch = max(1, min(steps, plan.steps_for(1.0)))
    share = padding_share(data, [rows for step in range(epoch) for rows in plan.micro_batches(step, 0, 1)], most)
    held_out = len(data) - len(plan.rows)
    return [
        f"rows: {len(plan.rows):,} to train on, {held_out:,} held out, {left_out:,} left out, {data.cut:,} cut",
        f"tokens a row, before cutting: {marks}  max {int(data.uncut.max()):,}",
        f"tokens: {total:,}; {100 * learned / total:.1f}% of them are learned from, the others are prompt",
        f"padding: {100 * share:.1f}% of what is computed, at {plan.rows_per_micro_batch} rows a micro-batch",
        f"steps: {steps:,} of {plan.rows_per_step} rows, {plan.epoch_at(steps):.2f} epochs",
    ]


def percentile(values: torch.Tensor, percent: int) -> int:
    """The smallest of `values` that at least `percent` % of them do not exceed."""
    return int(values.sort().values[math.ceil(len(values) * percent / 100) - 1])


def padding_share(data: TokenizedRows, micro_batches: list[list[int]], most: float | None) -> float:
    """Share of padding in what is computed, every micro-batch padded to its longest line."""
    computed = real = 0
    for rows in micro_batches:
        lines = [sum(map(data.length, line)) for line in lines_of(data, rows, most)]
        computed += len(lines) * max(lines)
        real += sum(lines)
    return 1 - real / computed
