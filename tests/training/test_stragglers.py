"""Which rank is named, from what the ranks measured; and what a clock of waiting counts."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

from abba.sharded.waiting import WaitClock
from abba.training.stragglers import RankTimes, Stragglers

NODES = ["n0", "n0", "n1", "n1"]


def interval(*steps, nodes=NODES):
    stragglers = Stragglers(nodes)
    for number, ranks in enumerate(steps, start=11):
        stragglers.add(number, torch.tensor(ranks, dtype=torch.float64))
    return stragglers.interval()


def test_the_slow_rank_is_named_with_its_node_and_the_means_of_the_steps():
    good = RankTimes(own=1.0, data=0.1, waited=1.5, tokens=4000)
    steps = [[good, good, good, RankTimes(own, 0.2, 0.5, 4100)] for own in (1.5, 2.5)]
    found, line = interval(*steps)
    assert line == (
        "slow: rank 3 on node n1: 2 s a step of its own, the others' median 1 s "
        "(data 0.2 s, median 0.1 s; waiting 0.5 s, median 1.5 s; 4,100 tokens, median 4,000); steps 11-12"
    )
    assert found["slowest_rank"] == 3 and found["slowest_rank_node"] == "n1"
    assert found["slowest_rank_own_seconds"] == 2 and found["other_ranks_median_own_seconds"] == 1
    assert found["other_ranks_median_waited_seconds"] == 1.5


@pytest.mark.parametrize("own, waited, named", [(1.21, 0.0, True), (1.19, 0.0, False), (2.0, 30.0, False)])
def test_a_rank_is_named_above_a_fifth_and_where_it_matters(own, waited, named):
    """In the last case all ranks wait for the network for nearly the whole step."""
    good = RankTimes(1.0, 0.0, waited, 1)
    found, line = interval([good, good, RankTimes(own, 0.0, waited, 1), good])
    assert (line is not None) == named and found["slowest_rank"] == 2


def test_one_rank_has_nobody_to_be_compared_with_and_two_have_each_other():
    assert interval([RankTimes(1.0, 0, 0, 1)], nodes=["n0"]) == ({}, None)
    _, line = interval([RankTimes(1.0, 0, 1, 1), RankTimes(2.0, 0, 0, 1)], nodes=["n0", "n1"])
    assert "rank 1 on node n1: 2 s" in line and "the others' median 1 s" in line


def test_each_interval_is_counted_anew():
    stragglers = Stragglers(["a", "b"])
    for step, slow in ((1, 0), (2, 1)):
        times = [RankTimes(1.0 + (rank == slow), 0, 0, 1) for rank in range(2)]
        stragglers.add(step, torch.tensor(times))
        assert f"slow: rank {slow} " in (line := stragglers.interval()[1]) and line.endswith(f"steps {step}-{step}")


class Event:
    """In place of torch.cuda.Event, which needs a GPU: the stream's clock goes on by 250 ms at each record."""

    now = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 250
        self.at = Event.now

    def elapsed_time(self, other):
        return other.at - self.at


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_waiting_between_start_and_stop_counts(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ticks = iter(range(100))
    monkeypatch.setattr("abba.sharded.waiting.time.perf_counter", lambda: next(ticks) * 0.25)
    done = []
    coordinator = SimpleNamespace(reset_step=lambda: None)
    coordinator.fetch_sub_module = lambda module, forward: done.append((module, forward))
    offload = SimpleNamespace(get_param_coordinator=lambda: coordinator)
    optimizer = SimpleNamespace(
        parameter_offload=offload, independent_gradient_partition_epilogue=lambda: done.append(1)
    )
    clock = WaitClock(SimpleNamespace(optimizer=optimizer), torch.device(device))
    layer, norm = module(ZeroParamStatus.AVAILABLE, ZeroParamStatus.INFLIGHT), module(ZeroParamStatus.AVAILABLE)
    coordinator.fetch_sub_module(layer, forward=True)
    for waits in (3, 1):
        clock.start()
        for _ in range(waits):
            coordinator.fetch_sub_module(layer, forward=False)
            coordinator.fetch_sub_module(norm, forward=False)
        optimizer.independent_gradient_partition_epilogue()
        assert clock.stop() == 0.25 * (waits + 1)
    both = [(layer, False), (norm, False)]
    assert done == [(layer, True), *both * 3, 1, *both, 1]


def module(*statuses):
    """With a parameter of each status in ZeRO-3."""
    built = torch.nn.Module()
    built.ds_external_parameters = dict
    for index, status in enumerate(statuses):
        parameter = torch.nn.Parameter(torch.zeros(1))
        parameter.ds_status = status
        built.register_parameter(f"p{index}", parameter)
    return built
