"""Rows of several sources as one dataset, and how often an epoch takes each."""

import hashlib
from bisect import bisect_right
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from abba.errors import DataError
from abba.training.tokens import Rows, TokenizedRows

MAX_EPOCH_ROWS = 100_000_000  # of which every rank holds the order


class Mixture(Rows):
    """The rows of all sources, numbered on from one source to the next.

    Args:
        parts: the rows of each source.
        names: what the user calls each.
        weights: how many times an epoch takes the rows of a source: 2.0 all of them twice, 0.5 half of them.
    """

    def __init__(self, parts: list[TokenizedRows], names: list[str], weights: list[float]) -> None:
        self.parts, self.names, self.weights = parts, names, weights
        self.lengths = torch.cat([part.lengths for part in parts])
        self.learned = torch.cat([part.learned for part in parts])
        self.uncut = torch.cat([part.uncut for part in parts])
        self._firsts = list(accumulate(map(len, parts), initial=0))[:-1]

    @property
    def sha256(self) -> str:
        """Of all tokens in their order."""
        hashes = [part.sha256 for part in self.parts]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    @property
    def largest_id(self) -> int:
        return max(part.largest_id for part in self.parts)

    @property
    def left_out(self) -> int:
        return sum(sum(part.left_out.values()) for part in self.parts)

    @property
    def notes(self) -> list[str]:
        """What was left out or cut, in words."""
        named = zip(self.names, self.parts, strict=True)
        return [f"{name}: {note}" if len(self.parts) > 1 else note for name, part in named for note in part.notes]

    def input_ids(self, row: int) -> Tensor:
        source, own = self._place(row)
        return self.parts[source].input_ids(own)

    def supervised(self, row: int) -> Tensor:
        """The places of what is learned of a row, ascending."""
        source, own = self._place(row)
        return self.parts[source].supervised(own)

    def row_name(self, row: int) -> str:
        """The number of a row in its dataset, counted from 1; with the name of its source where there are several."""
        source, own = self._place(row)
        number = self.parts[source].row_name(own)
        return f"{self.names[source]}:{number}" if len(self.parts) > 1 else number

    def by_source(self, rows: list[int]) -> list[list[int]]:
        """`rows` of each source, in their order."""
        groups: list[list[int]] = [[] for _ in self.parts]
        for row in rows:
            groups[self._place(row)[0]].append(row)
        return groups

    def _place(self, row: int) -> tuple[int, int]:
        """(source, number of the row in it)."""
        source = bisect_right(self._firsts, row) - 1
        return source, row - self._firsts[source]


def epoch_rows(data: Mixture, rows: list[int], seed: int) -> Callable[[int], list[int]]:
    """Epoch -> the rows that it takes of `rows`, unshuffled and always as many: a pure function of seed and epoch.

    A source of weight 2.5 gives all its rows twice and half of them once more. That half is drawn anew in each epoch.

    Raises:
        DataError: a weight is so small that an epoch takes no row of its source, or weights are so large that an epoch
            has more than MAX_EPOCH_ROWS.
    """
    groups = data.by_source(rows)
    counts: list[tuple[int, int]] = []  # times that all rows are taken, rows that are taken once more
    for name, weight, group in zip(data.names, data.weights, groups, strict=True):
        counts.append(divmod(round(weight * len(group)), max(1, len(group))))
        if not any(counts[-1]) and len(groups) > 1:  # of a single source the plan says what is missing
            raise DataError(
                f"{name}: its {len(group)} training rows at weight={weight:g} are less than a row an epoch; raise its "
                "weight, lower data.eval_rows, or leave this source out"
            )
    total = sum(times * len(group) + more for group, (times, more) in zip(groups, counts, strict=True))
    if total > MAX_EPOCH_ROWS and len(groups) > 1:
        raise DataError(
            f"data.sources: with these weights an epoch has {total:,} rows, more than {MAX_EPOCH_ROWS:,}; divide all "
            "weights by the same number, and multiply train.num_train_epochs by it"
        )

    def taken(epoch: int) -> list[int]:
        found: list[int] = []
        for source, (group, (times, more)) in enumerate(zip(groups, counts, strict=True)):
            found += group * times
            if more:
                draw = torch.randperm(len(group), generator=seeded(f"{seed}:epoch {epoch}:source {source}"))
                found += [group[place] for place in sorted(draw[:more].tolist())]
        return found

    return taken


def seeded(of: str) -> torch.Generator:
    """A source of random numbers that depends on this text alone."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(of.encode()).digest()[:7], "big"))
