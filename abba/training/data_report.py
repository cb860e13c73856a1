"""What training on a dataset will look like, in numbers, before a GPU is booked."""

import math

import torch

from abba.training.batches import BatchPlan, lines_of
from abba.training.mixture import Mixture

PERCENTILES = (50, 90, 99)


def data_report(data: Mixture, plan: BatchPlan, steps: int, most: float | None) -> list[str]:
    """Lines for people: rows, lengths, what is cut or left out, what is learned from, what is padding.

    Args:
        plan: of the rows that are not held out.
        steps: of the whole run.
        most: tokens on a line that holds several rows; None where each has a line of its own.
    """
    first_epoch = plan.epoch_rows(0)
    total, learned = data.tokens(first_epoch), data.supervised_tokens(first_epoch)
    marks = "  ".join(f"p{p} {percentile(data.uncut, p):,}" for p in PERCENTILES)
    epoch = max(1, min(steps, plan.steps_for(1.0)))
    share = padding_share(data, [rows for step in range(epoch) for rows in plan.micro_batches(step, 0, 1)], most)
    held_out = len(data) - len(plan.rows)
    return [
        f"rows: {len(plan.rows):,} to train on, {held_out:,} held out, {data.left_out:,} left out, {data.cut:,} cut",
        *source_shares(data, plan),
        f"tokens a row, before cutting: {marks}  max {int(data.uncut.max()):,}",
        f"tokens: {total:,}; {100 * learned / total:.1f}% of them are learned from, the others are prompt",
        f"padding: {100 * share:.1f}% of what is computed, at {plan.rows_per_micro_batch} rows a micro-batch",
        f"steps: {steps:,} of {plan.rows_per_step} rows, {plan.epoch_at(steps):.2f} epochs",
    ]


def source_shares(data: Mixture, plan: BatchPlan) -> list[str]:
    """A line for each of several sources: what it has, and its share of an epoch."""
    if len(data.parts) == 1:
        return []
    groups, taken = data.by_source(plan.rows), data.by_source(plan.epoch_rows(0))
    return [
        f"{name}: {len(rows):,} rows to train on, weight {weight:g}: {len(in_epoch):,} of an epoch's "
        f"{plan.rows_per_epoch:,}, {100 * len(in_epoch) / plan.rows_per_epoch:.1f}%"
        for name, weight, rows, in_epoch in zip(data.names, data.weights, groups, taken, strict=True)
    ]


def percentile(values: torch.Tensor, percent: int) -> int:
    """The smallest of `values` that at least `percent` % of them do not exceed."""
    return int(values.sort().values[math.ceil(len(values) * percent / 100) - 1])


def padding_share(data: Mixture, micro_batches: list[list[int]], most: float | None) -> float:
    """Share of padding in what is computed, every micro-batch padded to its longest line."""
    computed = real = 0
    for rows in micro_batches:
        lines = [sum(map(data.length, line)) for line in lines_of(data, rows, most)]
        computed += len(lines) * max(lines)
        real += sum(lines)
    return 1 - real / computed
