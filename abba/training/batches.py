"""Tokens to micro-batches, as a pure function of seed and step."""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from abba.errors import DataError
from abba.training.loss import IGNORED
from abba.training.tokens import TokenizedRows


@dataclass(frozen=True)
class MicroBatch:
    """Shapes: B rows, T tokens of the longest. Padded on the right."""

    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T), 0 on padding
    labels: Tensor  # (B, T), IGNORED on prompt and padding
    rows: list[int]


def collate(data: TokenizedRows, rows: list[int], padding: int, device: torch.device) -> MicroBatch:
    """Labels are masked by position: prompt and padding are ignored, a response's EOS never is."""
    sequences = [data.input_ids(row) for row in rows]
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.full((len(rows), longest), padding, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for line, (row, sequence) in enumerate(zip(rows, sequences, strict=True)):
        ids[line, : len(sequence)] = sequence
        mask[line, : len(sequence)] = 1
        prompt = data.prompt_length(row)
        labels[line, prompt : len(sequence)] = sequence[prompt:]
    return MicroBatch(ids.to(device), mask.to(device), labels.to(device), rows)


def split_rows(count: int, eval_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows): a function of the seed alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[eval_rows:]), sorted(order[:eval_rows])


class BatchPlan:
    """Which rows each step, rank and micro-batch takes: a pure function of seed and step.

    The rows of all epochs, each shuffled by (seed, epoch), form one endless order. Step s takes rows [s*G, (s+1)*G) of
    it, G = global batch size; its micro-batch j holds the j-th M consecutive ones at any world size, and rank r of N
    computes the micro-batches r, r+N, r+2N, ...

    Raises:
        DataError: fewer rows than one global batch.
    """

    def __init__(self, rows: list[int], global_batch: int, micro_batch: int, seed: int) -> None:
        if len(rows) < global_batch:
            raise DataError(
                f"{len(rows)} training rows are left, fewer than train.global_batch_size={global_batch}; "
                "lower it or data.eval_rows, or add rows"
            )
        self._rows, self._global, self._micro, self._seed = rows, global_batch, micro_batch, seed
        self._orders: dict[int, list[int]] = {}

    @property
    def rows_per_step(self) -> int:
        return self._global

    def steps_for(self, epochs: float) -> int:
        """Steps until every row was seen `epochs` times; the last one may take rows of the next epoch."""
        return max(1, -(-round(len(self._rows) * epochs) // self._global))

    def epoch_at(self, step: int) -> float:
        """Passes over the data that are complete when `step` steps are done."""
        return step * self._global / len(self._rows)

    def global_rows(self, step: int) -> list[int]:
        places = range(step * self._global, (step + 1) * self._global)
        return [self._order(place // len(self._rows))[place % len(self._rows)] for place in places]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """The row lists that `rank` computes in `step`, in order."""
        rows = self.global_rows(step)
        groups = [rows[start : start + self._micro] for start in range(0, self._global, self._micro)]
        return groups[rank::world_size]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            seed = int.from_bytes(hashlib.sha256(f"{self._seed}:epoch {epoch}".encode()).digest()[:7], "big")
            order = torch.randperm(len(self._rows), generator=torch.Generator().manual_seed(seed)).tolist()
            self._orders[epoch] = [self._rows[place] for place in order]
        return self._orders[epoch]
