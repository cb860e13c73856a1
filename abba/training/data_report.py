"""What training on a dataset will look like, in numbers, before a GPU is booked."""

import math

import torch

from abba.training.batches import BatchPlan
from abba.training.tokens import TokenizedRows

PERCENTILES = (50, 90, 99)


def data_report(data: TokenizedRows, train_rows: list[int], plan: BatchPlan, steps: int, micro_batch: int) -> list[str]:
    """Lines for people: rows, lengths, what is cut or left out, what is learned from, what is padding.

    Args:
        train_rows: rows of `data` that are not held out.
        steps: of the whole run.
        micro_batch: rows that are padded to the longest of them.
    """
    total, learned = data.tokens(train_rows), data.supervised_tokens(train_rows)
    marks = "  ".join(f"p{p} {percentile(data.uncut, p):,}" for p in PERCENTILES)
    left_out = sum(data.left_out.values())
    epoch = max(1, min(steps, plan.steps_for(1.0)))
    share = padding_share(data, [row for step in range(epoch) for row in plan.global_rows(step)], micro_batch)
    held_out = len(data) - len(train_rows)
    return [
        f"rows: {len(train_rows):,} to train on, {held_out:,} held out, {left_out:,} left out, {data.cut:,} cut",
        f"tokens a row, before cutting: {marks}  max {int(data.uncut.max()):,}",
        f"tokens: {total:,}; {100 * learned / total:.1f}% of them are learned from, the others are prompt",
        f"padding: {100 * share:.1f}% of what is computed, at {micro_batch} rows a micro-batch",
        f"steps: {steps:,} of {plan.rows_per_step} rows, {plan.epoch_at(steps):.2f} epochs",
    ]


def percentile(values: torch.Tensor, percent: int) -> int:
    """The smallest of `values` that at least `percent` % of them do not exceed."""
    return int(values.sort().values[math.ceil(len(values) * percent / 100) - 1])


def padding_share(data: TokenizedRows, rows: list[int], micro_batch: int) -> float:
    """Share of padding in the micro-batches that consecutive `rows` form, each padded to its longest."""
    lengths = data.lengths[torch.tensor(rows)].view(-1, micro_batch)
    computed = int(lengths.amax(dim=1).sum()) * micro_batch
    return 1 - int(lengths.sum()) / computed
