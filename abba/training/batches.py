"""Tokens to micro-batches, as a pure function of seed and step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abba.errors import DataError
from abba.training.mixture import Mixture, seeded


@dataclass(frozen=True)
class MicroBatch:
    """Shapes: L lines, T tokens of the longest, S supervised tokens. Padded on the right, where no causal model looks.

    Where a line holds several rows the positions start again at each: transformers reads the borders from that, for
    its attention masks and for flash attention's lengths; abba.training.attention takes them as `row_lengths`.
    """

    input_ids: Tensor  # (L, T)
    position_ids: Tensor  # (L, T)
    predictors: Tensor  # (S,): the positions of (L, T), flattened, whose next token is supervised, ascending
    targets: Tensor  # (S,): that next token, of the same row
    rows: list[int]
    row_lengths: tuple[int, ...]  # in tokens

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[int, ...]]:
        """What the model takes to give the loss."""
        return self.input_ids, self.position_ids, self.predictors, self.targets, self.row_lengths


def collate(data: Mixture, lines: list[list[int]], padding: int, device: torch.device) -> MicroBatch:
    """`lines`: the rows of each. What is not learned is masked by position; a response's EOS never is."""
    longest = max(sum(data.length(row) for row in line) for line in lines)
    ids = torch.full((len(lines), longest), padding, dtype=torch.int64)
    positions = torch.arange(longest).repeat(len(lines), 1)
    predictors, targets = [], []
    for number, line in enumerate(lines):
        start = 0
        for row in line:
            sequence, learned = data.input_ids(row), data.supervised(row)
            stop = start + len(sequence)
            ids[number, start:stop] = sequence
            positions[number, start:] = torch.arange(longest - start)  # of the padding too, after the last row
            predictors.append(number * longest + start - 1 + learned)
            targets.append(sequence[learned].long())
            start = stop
    # Flat places, found here on the CPU: a mask on a GPU would make it wait twice for how many are supervised.
    tensors = (ids, positions, torch.cat(predictors), torch.cat(targets))
    rows = [row for line in lines for row in line]
    return MicroBatch(*(tensor.to(device) for tensor in tensors), rows, tuple(map(data.length, rows)))


def lines_of(data: Mixture, rows: list[int], most: float | None) -> list[list[int]]:
    """`rows` on as few lines of at most `most` tokens as first-fit finds; on a line each where `most` is None.

    Lines are padded to the longest: of the limits that give as few lines the lowest is searched by bisection (MULTIFIT,
    Coffman et al. 1978). A row that is longer than `most` has a line of its own.
    """
    if most is None:
        return [[row] for row in rows]
    longest_first = sorted(rows, key=data.length, reverse=True)
    lines = _first_fit(data, longest_first, most)
    low, high = sum(map(data.length, rows)) // len(lines), _longest(data, lines)
    while low < high:
        limit = (low + high) // 2
        tried = _first_fit(data, longest_first, limit)
        if len(tried) <= len(lines):
            lines, high = tried, limit
        else:
            low = limit + 1
    return lines


def _longest(data: Mixture, lines: list[list[int]]) -> int:
    return max(sum(map(data.length, line)) for line in lines)


def _first_fit(data: Mixture, rows: list[int], most: float) -> list[list[int]]:
    lines: list[list[int]] = []
    left: list[float] = []
    for row in rows:
        length = data.length(row)
        line = next((number for number, room in enumerate(left) if room >= length), len(lines))
        if line == len(lines):
            lines.append([])
            left.append(most)
        lines[line].append(row)
        left[line] -= length
    return lines


def split_rows(count: int, eval_rows: int, seed: int) -> tuple[list[int], list[int]]:
    """(training rows, held-out rows): a function of the seed alone."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[eval_rows:]), sorted(order[:eval_rows])


class BatchPlan:
    """Which rows each step, rank and micro-batch takes: a pure function of seed and step.

    The rows of all epochs, each shuffled by (seed, epoch), form one endless order. Step s takes places [s*G, (s+1)*G)
    of it, G = global batch size; its micro-batch j holds the j-th M consecutive ones at any world size, and rank r of N
    computes the micro-batches r, r+N, r+2N, ...  With `length` the G rows are sorted by it first, so that rows of a
    micro-batch are padded little; the step's loss is the same sum.

    Args:
        rows: all that is trained on.
        length: of a row.
        epoch_rows: which of `rows`, and how often, an epoch takes, always as many; None: each once.

    Raises:
        DataError: an epoch has fewer rows than one global batch.
    """

    def __init__(
        self,
        rows: Sequence[int],
        global_batch: int,
        micro_batch: int,
        seed: int,
        length: Callable[[int], int] | None = None,
        epoch_rows: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        self.epoch_rows = epoch_rows or (lambda epoch: rows)
        self.rows_per_epoch = len(self.epoch_rows(0))
        if self.rows_per_epoch < global_batch:
            raise DataError(
                f"{self.rows_per_epoch} training rows are left, fewer than train.global_batch_size={global_batch}; "
                "lower it or data.eval_rows, or add rows"
            )
        self.rows, self._global, self._micro, self._seed = rows, global_batch, micro_batch, seed
        self._length = length
        self._orders: dict[int, list[int]] = {}

    @property
    def rows_per_step(self) -> int:
        return self._global

    @property
    def rows_per_micro_batch(self) -> int:
        return self._micro

    def steps_for(self, epochs: float) -> int:
        """Steps until `epochs` are over; the last one may take rows of the next epoch."""
        return max(1, -(-round(self.rows_per_epoch * epochs) // self._global))

    def epoch_at(self, step: int) -> float:
        """Passes over the data that are complete when `step` steps are done."""
        return step * self._global / self.rows_per_epoch

    def global_rows(self, step: int) -> list[int]:
        places = range(step * self._global, (step + 1) * self._global)
        return [self._order(place // self.rows_per_epoch)[place % self.rows_per_epoch] for place in places]

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[list[int]]:
        """The row lists that `rank` computes in `step`, in order."""
        rows = self.global_rows(step)
        if self._length is not None:
            rows.sort(key=self._length)
        groups = [rows[start : start + self._micro] for start in range(0, self._global, self._micro)]
        # The last rank's rows would be the longest in every step: ranks take turns.
        first = (rank + step) % world_size if self._length is not None else rank
        return groups[first::world_size]

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            self._orders = {kept: order for kept, order in self._orders.items() if kept == epoch - 1}
            rows = self.epoch_rows(epoch)
            order = torch.randperm(len(rows), generator=seeded(f"{self._seed}:epoch {epoch}")).tolist()
            self._orders[epoch] = [rows[place] for place in order]
        return self._orders[epoch]
