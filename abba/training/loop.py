"""The loop and the step, nothing else."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from abba.adapter.linear import bypass
from abba.errors import CheckpointError, NotFiniteError, PreemptedError
from abba.sharded.ranks import Ranks
from abba.sharded.together import all_gather
from abba.training.batches import BatchPlan, MicroBatch, collate, lines_of
from abba.training.failures import World
from abba.training.metrics import Reporter, peak_memory_bytes
from abba.training.mixture import Mixture
from abba.training.stragglers import RankTimes, StepClock, Stragglers, host_names
from abba.training.watch import Watch, why

SAVE_ATTEMPTS = 3  # in a row: a full disk may be emptied before the next save
LAST_SAVE_PAUSE = 20  # seconds between the attempts at the last one


@dataclass(frozen=True)
class Stream:
    """The training rows as this rank sees them: tokens, plan, how to pad and how many tokens to pack on a line."""

    data: Mixture
    plan: BatchPlan
    padding: int
    ranks: Ranks
    device: torch.device
    line_tokens: float | None = None  # None: each row on a line of its own

    def micro_batches(self, step: int) -> list[MicroBatch]:
        return [self.batch(rows) for rows in self.plan.micro_batches(step, self.ranks.rank, self.ranks.world_size)]

    def batch(self, rows: list[int]) -> MicroBatch:
        return collate(self.data, lines_of(self.data, rows, self.line_tokens), self.padding, self.device)


def train(
    engine: Any,
    stream: Stream,
    *,
    first: int,
    steps: int,
    learning_rate: Callable[[int], float],
    reporter: Reporter,
    world: World,
    watch: Watch,
    save: Callable[[int], dict[str, float]],
    save_steps: int | None,
    evaluate: Callable[[], "HeldOut"] | None,
    eval_steps: int | None,
    owed: bool,
) -> None:
    """Run optimizer steps first .. steps-1. Collective.

    Args:
        learning_rate: rate of a step.
        world: learns which step is being computed.
        watch: knows whether somebody has asked for a stop.
        save: writes a checkpoint after so many steps; returns what it took.
        evaluate: the held-out loss, or None without held-out rows.
        owed: the one after `first` steps is missing, because the start before was stopped or killed meanwhile.

    Raises:
        NotFiniteError: a loss or gradient is NaN or infinite; on all ranks, before the update.
        PreemptedError: a rank was asked to stop; on all ranks, after a save.
        CheckpointError: SAVE_ATTEMPTS saves in a row failed, or one after which there is no other.
    """
    engine.train()
    failed_saves, clock, stragglers = 0, StepClock(engine, stream.device), Stragglers(host_names(stream.device))
    if owed and (stop := _held_out(evaluate, first, reporter)):
        raise _preempted(stop, first, steps)
    for step in range(first, steps):
        world.step = step + 1
        clock.start()
        batches = stream.micro_batches(step)
        clock.data_is_there()

        rate = learning_rate(step)
        outcome = optimizer_step(engine, stream, step, batches, rate, clock, watch)
        grad_norm = float(engine.get_global_grad_norm())  # waits for the device, so that the update is timed too
        step_seconds = clock.seconds()

        done, rows = step + 1, stream.plan.global_rows(step)
        stragglers.add(done, outcome.times)
        found, slow = stragglers.interval() if done % reporter.logging_steps == 0 or done == steps else ({}, None)
        tokens = stream.data.tokens(rows)
        record = {
            "step": done,
            "epoch": round(stream.plan.epoch_at(done), 6),
            "loss": outcome.loss,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": tokens,
            "supervised_tokens": stream.data.supervised_tokens(rows),
            "tokens_per_second": tokens / step_seconds,
            "step_seconds": step_seconds,
            "data_seconds": clock.data_seconds,
            "peak_memory_bytes": peak_memory_bytes(stream.device),
            **found,
        }
        reporter.step(record)
        if slow is not None:
            reporter.say(slow)
        evaluating, stop = evaluate is not None and is_due(done, eval_steps, steps), outcome.stop
        if evaluating and done < steps:
            stop = _held_out(evaluate, done, reporter, stop)
        if stop or is_due(done, save_steps, steps):
            with watch.at_boundary():
                failed_saves = _save(save, done, failed_saves, reporter, last=done == steps, stop=bool(stop))
        if evaluating and done == steps:  # after the save: it may be the only one
            stop = _held_out(evaluate, done, reporter, stop)
        if stop:
            raise _preempted(stop, done, steps)


def is_due(done: int, every: int | None, steps: int) -> bool:
    """Whether something that is done `every` so many steps, and after the last one, is done after step `done`."""
    return done == steps or bool(every and done % every == 0)


def _held_out(evaluate: Callable[[], "HeldOut"], done: int, reporter: Reporter, stop: str | None = None) -> str | None:
    """Report the held-out loss after `done` steps; gives who asks for a stop, before it or meanwhile."""
    if stop is None:
        loss, stop = evaluate()
    if stop is None:
        reporter.evaluated(done, loss)
    else:
        reporter.say(f"step {done}: held-out loss left to the next start, because the run is asked to stop")
    return stop


def _preempted(stop: str, done: int, steps: int) -> PreemptedError:
    return PreemptedError(
        f"{stop} after step {done} of {steps}, which is saved; "
        "start the same command again to continue (checkpoint.resume=never would start over)"
    )


def _save(
    save: Callable[[int], dict[str, Any]], done: int, failed: int, reporter: Reporter, last: bool, stop: bool
) -> int:
    """How many saves in a row have failed now. The last one of a run is tried again; when asked to stop none is."""
    while True:
        try:
            reporter.saved(done, save(done))
            return 0
        except CheckpointError as error:
            failed += 1
            if stop or failed >= SAVE_ATTEMPTS:
                raise
            goes_on = f"trying again in {LAST_SAVE_PAUSE} s" if last else "training goes on, the next save tries again"
            reporter.say(f"checkpoint: WARNING: {error.reason}; {goes_on}")
            if not last:
                return failed
            time.sleep(LAST_SAVE_PAUSE)


@dataclass(frozen=True)
class StepOutcome:
    """Of one optimizer step, the same on every rank."""

    loss: float  # of the global batch, per supervised token
    times: torch.Tensor  # (ranks, fields of RankTimes)
    stop: str | None  # who was asked to stop, and how


def optimizer_step(
    engine: Any,
    stream: Stream,
    step: int,
    batches: list[MicroBatch],
    rate: float,
    clock: StepClock,
    watch: Watch,
) -> StepOutcome:
    """Forward, backward, check, update; and what every rank has to know of the others. Collective.

    The update uses the gradient of (sum of token losses) / (supervised tokens of the global batch). DeepSpeed divides
    by the accumulation steps and averages over ranks; both are undone here, so that the loss is the same for every
    split of the global batch.
    """
    supervised = stream.data.supervised_tokens(stream.plan.global_rows(step))
    # DeepSpeed takes the mean over ranks of (sum of losses / micro-batches); this makes it loss per supervised token.
    undo = len(batches) * stream.ranks.world_size / supervised
    losses = []
    for index, batch in enumerate(batches):
        loss = engine(*batch.inputs)
        engine.backward(loss * undo)
        losses.append(loss.detach())  # read once per step: each read waits for the device
        if index + 1 < len(batches):
            engine.step()  # not at the boundary: only counts the micro-batch

    # Every rank learns of every other's loss before anything is updated.
    values = torch.stack(losses).tolist()
    bad_batch = next((index for index, value in enumerate(values) if not math.isfinite(value)), -1)
    times = clock.losses_are_known(sum(batch.input_ids.numel() for batch in batches))
    mine = [sum(values), bad_batch, watch.requested, *times]
    everyone = _gather(mine, stream.device)
    for rank, (_, bad, *_) in enumerate(everyone.tolist()):
        if bad >= 0:
            rows = stream.plan.micro_batches(step, rank, stream.ranks.world_size)[int(bad)]
            raise NotFiniteError(
                f"the loss of step {step + 1} on rank {rank}, dataset rows {_numbers(stream, rows)}, is not finite; "
                "nothing was updated; look at these rows, or lower train.learning_rate"
            )
    for group in engine.optimizer.param_groups:
        group["lr"] = rate
    engine.step()  # the boundary: reduces, clips and updates
    if engine.optimizer.overflow:
        rows = stream.plan.global_rows(step)
        raise NotFiniteError(
            f"the gradient of step {step + 1}, dataset rows {_numbers(stream, rows)}, is not finite; "
            "nothing was updated; look at these rows, or lower train.learning_rate"
        )
    return StepOutcome(
        float(everyone[:, 0].sum()) / supervised, everyone[:, -len(RankTimes._fields) :], _stop(everyone[:, 2])
    )


class HeldOut(NamedTuple):
    """Mean token loss over the held-out rows; without a meaning where somebody asked for a stop meanwhile."""

    loss: float
    stop: str | None


@torch.no_grad()
def held_out_loss(engine: Any, stream: Stream, rows: list[int], batch_size: int, watch: Watch) -> HeldOut:
    """The rows are shared among the ranks. Given up at the next batch when one of them is asked to stop. Collective."""
    groups = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    rounds = -(-len(groups) // stream.ranks.world_size)
    loss_sum = 0.0
    with _in_eval_mode(engine):
        for turn in range(rounds):  # ZeRO-3 gathers weights together, so every rank runs every round
            index = turn * stream.ranks.world_size + stream.ranks.rank
            batch = stream.batch(groups[min(index, len(groups) - 1)])
            loss = float(engine(*batch.inputs))
            loss_sum += loss if index < len(groups) else 0.0
            everyone = _gather([loss_sum, watch.requested], stream.device)
            if stop := _stop(everyone[:, 1]):
                return HeldOut(math.nan, stop)
    return HeldOut(float(everyone[:, 0].sum()) / stream.data.supervised_tokens(rows), None)


@torch.no_grad()
def assert_delta_is_zero(engine: Any, stream: Stream) -> None:
    """Before the first step the adapter must change nothing: the loss with and without it is the same to the bit."""
    batch = stream.micro_batches(0)[0]
    with _in_eval_mode(engine):
        adapted = float(engine(*batch.inputs))
        with bypass(engine.module):
            plain = float(engine(*batch.inputs))
    if not math.isfinite(plain):
        raise NotFiniteError(f"the base model's own loss is {plain} on the first rows; its weights are damaged")
    assert adapted == plain, f"delta W is not zero before the first step: loss {adapted!r}, without it {plain!r}"


@contextmanager
def _in_eval_mode(engine: Any) -> Iterator[None]:
    engine.eval()
    try:
        yield
    finally:
        engine.train()


def _gather(values: list[float], device: torch.device) -> torch.Tensor:
    """(world size, len(values)): every rank's values on every rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=device)
    return torch.stack(all_gather(mine)).cpu()


def _stop(requests: torch.Tensor) -> str | None:
    """Who was asked to stop, and how, of the numbers that each rank's watch knows."""
    asked = [(rank, int(number)) for rank, number in enumerate(requests) if number]
    return f"{why(asked[0][1])} (rank {asked[0][0]})" if asked else None


def _numbers(stream: Stream, rows: list[int]) -> str:
    numbers = [stream.data.row_name(row) for row in rows]
    return ", ".join(numbers[:8]) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
