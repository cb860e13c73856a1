"""Generations on disk as they are made, a line each, so that a killed evaluation goes on and several ranks share one.

OUTPUT/generated/
    settings.json     what decides the generations; a start with others is refused
    rank-0.jsonl      {"row", "generated"} of what rank 0 has generated, and so on

Batches are cut from all rows before any is skipped: which rows share one decides how sums are rounded. So a row gets
the same generation whenever and by whichever rank it is made.
"""

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abba.errors import CheckpointError, RankLostError, first_line
from abba.layout import GENERATIONS, SCORES
from abba.prepared import replacing
from abba.sharded.ranks import Ranks
from abba.storage import make_directory, read_json, write_json

START_SECONDS, STALL_SECONDS = 120, 1800  # that ranks wait for rank 0's settings, and rank 0 for another's next row


class Kept:
    """The generations of one evaluation, by row."""

    def __init__(self, output: Path, settings: Mapping[str, Any], ranks: Ranks, replace: bool) -> None:
        """Begin, or continue what is there.

        Args:
            replace: discard an unfinished evaluation with other settings instead of refusing.

        Raises:
            CheckpointError: it cannot be written, is damaged, or is an unfinished one with other settings.
            RankLostError: rank 0 does not begin.
        """
        self.output, self.directory, self.ranks = output, output / "generated", ranks
        self._own = self.directory / f"rank-{ranks.rank}.jsonl"
        make_directory(output, "output directory")
        if ranks.is_main:
            self.discarded = self._begin(dict(settings), replace)
        else:
            self.discarded = None
            self._await(dict(settings))
        self._drop_half_a_line()
        self.texts = self._read()

    def share_of(self, batches: list[list[int]]) -> list[list[int]]:
        """This rank's batches, but for those of which all rows are there."""
        mine = batches[self.ranks.rank :: self.ranks.world_size]
        return [batch for batch in mine if not all(row in self.texts for row in batch)]

    def add(self, row: int, text: str) -> None:
        """Keep a generation. Closed each time: another node sees it then, and a kill takes half a line at most.

        Raises:
            CheckpointError: it cannot be written, as on a full disk.
        """
        if row in self.texts:
            return
        try:
            with self._own.open("ab") as file:
                file.write(json.dumps({"row": row, "generated": text}).encode() + b"\n")
        except OSError as error:
            raise CheckpointError(
                f"{self._own}: cannot be written: {error.strerror}; what is there is kept, and the same command goes on"
            ) from error
        self.texts[row] = text

    def gather(self, rows: int) -> list[str]:
        """All generations in order, once the other ranks have made theirs; for rank 0.

        Raises:
            RankLostError: no rank has added a row for STALL_SECONDS.
        """
        last = time.monotonic()
        while len(self.texts) < rows:
            time.sleep(0.5)
            before, self.texts = len(self.texts), self._read()
            last = time.monotonic() if len(self.texts) > before else last
            if time.monotonic() - last > STALL_SECONDS:
                raise RankLostError(
                    f"{self.directory}: {rows - len(self.texts)} of {rows} rows are missing and no rank has added one "
                    f"for {STALL_SECONDS} s; the same command generates what is missing"
                )
        return [self.texts[row] for row in range(rows)]

    def _begin(self, settings: dict[str, Any], replace: bool) -> str | None:
        """What was discarded, and why; or None."""
        discarded, path = None, self.directory / "settings.json"
        if path.is_file() and (changes := _changes(read_json(path), settings)):
            finished = (self.output / SCORES).is_file()
            if not (finished or replace):
                raise CheckpointError(
                    f"{self.output}: holds unfinished generations with other settings: {changes}; set it back, choose "
                    f"another output directory, or delete {self.directory}"
                )
            discarded = f"{self.output}: earlier generations are discarded: {changes}"
            shutil.rmtree(self.directory)
        try:
            self.directory.mkdir(exist_ok=True)
            if not path.is_file():  # a kill may have left some of those that were being discarded
                for left in self.directory.glob("rank-*.jsonl"):
                    left.unlink()
                    discarded = f"{self.output}: earlier generations are discarded: nothing says how they were made"
            for name in (SCORES, GENERATIONS):  # until they are written anew
                (self.output / name).unlink(missing_ok=True)
            if not path.is_file():
                with replacing(path) as temporary:
                    write_json(temporary, settings)
        except OSError as error:
            raise CheckpointError(f"{self.directory}: cannot be written: {error.strerror}") from error
        return discarded

    def _await(self, settings: dict[str, Any]) -> None:
        deadline, path = time.monotonic() + START_SECONDS, self.directory / "settings.json"
        while not (path.is_file() and read_json(path) == settings):
            if time.monotonic() > deadline:
                raise RankLostError(
                    f"{path}: rank 0 has not written the settings of this rank within {START_SECONDS} s; is the output "
                    "directory on storage that all nodes share, and the software the same?"
                )
            time.sleep(0.1)

    def _drop_half_a_line(self) -> None:
        """What a kill has left of this rank's last line."""
        if self._own.is_file():
            data = self._own.read_bytes()
            os.truncate(self._own, data.rfind(b"\n") + 1)

    def _read(self) -> dict[int, str]:
        texts: dict[int, str] = {}
        for path in sorted(self.directory.glob("rank-*.jsonl")):
            for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):  # the last may be half written
                try:
                    record = json.loads(line)
                    texts[int(record["row"])] = str(record["generated"])
                except (ValueError, KeyError, TypeError) as error:
                    raise CheckpointError(
                        f"{path}: line {number} is damaged: {first_line(error)}; delete the file, and its rows are "
                        "generated again"
                    ) from error
        return texts


def batches_by_length(prompts: list[list[int]], size: int) -> list[list[int]]:
    """Indices of `prompts` in batches of `size`, of similar length so that little is padded.

    The longest first: what is too much for the memory is so at once.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[max(0, stop - size) : stop] for stop in range(len(order), 0, -size)]


def _changes(earlier: Any, now: Mapping[str, Any]) -> str:
    if not isinstance(earlier, dict):
        return "settings.json is none of ours"
    different = [key for key in {**earlier, **now} if earlier.get(key) != now.get(key)]
    return ", ".join(f"{key} was {earlier.get(key)}, is {now.get(key)}" for key in different)
