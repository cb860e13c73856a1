"""Several sources: the order of one is as before, weights say how often rows occur, all by the seed."""

import hashlib
import json
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abba.errors import DataError
from abba.sharded.ranks import Ranks
from abba.training.batches import BatchPlan, split_rows
from abba.training.mixture import Mixture, epoch_rows
from abba.training.prepare import plan_batches, prepare
from tests.training.test_prepare import recipe  # noqa: F401

ROWS = [{"question": f"{n} and {n}?", "answer": str(2 * n)} for n in range(40)]


class Made(Mixture):
    """Sources of so many rows, without tokens."""

    def __init__(self, sizes, weights):
        self.parts, self.weights = [range(size) for size in sizes], weights
        self.names = [f"source {number}" for number in range(len(sizes))]
        self._firsts = [sum(sizes[:number]) for number in range(len(sizes))]


def plan_of(sizes, weights, seed=0, eval_rows=0, global_batch=4):
    rows, held_out = split_rows(sum(sizes), eval_rows, seed)
    return BatchPlan(rows, global_batch, 2, seed, None, epoch_rows(Made(sizes, weights), rows, seed)), held_out


def test_the_order_of_one_source_and_of_weights_of_1_is_that_of_golden_losses():
    """Pinned before sources could be mixed: what trained then trains on the same rows now."""
    for sizes, weights in (([20], [1.0]), ([7, 13], [1.0, 1.0])):
        plan, held_out = plan_of(sizes, weights, seed=3, eval_rows=4)
        assert held_out == [3, 6, 7, 12]
        assert [plan.global_rows(step) for step in range(5)] == [
            [16, 9, 5, 15], [10, 0, 11, 13], [17, 2, 8, 19], [1, 14, 18, 4], [19, 2, 15, 14]
        ]  # fmt: skip
    for sizes in ([1000], [1, 999], [300, 300, 400]):
        plan, held_out = plan_of(sizes, [1.0] * len(sizes), seed=0, eval_rows=64, global_batch=16)
        order = [row for step in range(200) for row in plan.global_rows(step)]
        digest = hashlib.sha256(str((order, held_out)).encode()).hexdigest()
        assert digest == "62d824f2a5a5240ae98fa9f603f6f73006842ebb63b6d360319e45e3d836de4b"


@given(
    sizes=st.lists(st.integers(4, 30), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.25]), min_size=4, max_size=4),
    seed=st.integers(0, 5),
    eval_rows=st.integers(0, 2),
)
@settings(max_examples=100, deadline=None)
def test_an_epoch_takes_each_source_as_often_as_its_weight_says(sizes, weights, seed, eval_rows):
    weights = weights[: len(sizes)]
    data, (rows, held_out) = Made(sizes, weights), split_rows(sum(sizes), eval_rows, seed)
    groups = data.by_source(rows)
    if any(round(weight * len(group)) == 0 for weight, group in zip(weights, groups, strict=True)):
        return
    taken = epoch_rows(data, rows, seed)
    for epoch in range(3):
        found = taken(epoch)
        assert found == epoch_rows(data, rows, seed)(epoch) and not set(found) & set(held_out)
        for group, weight, ours in zip(groups, weights, data.by_source(found), strict=True):
            assert len(ours) == round(weight * len(group))
            assert {ours.count(row) for row in group} <= {int(weight), int(weight) + 1}


def test_a_part_of_a_source_is_drawn_anew_in_each_epoch_and_for_each_source():
    taken = epoch_rows(Made([100, 100], [0.5, 1.5]), list(range(200)), 7)
    first, second = taken(0), taken(1)
    assert len(first) == len(second) == 200 and first != second
    halves = [{row for row in first[:50]}, {row - 100 for row in first if first.count(row) == 2}]
    assert len(halves[0]) == len(halves[1]) == 50 and halves[0] != halves[1]
    assert taken(0) == first and epoch_rows(Made([100, 100], [0.5, 1.5]), list(range(200)), 8)(0) != first


@given(lives=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 9)), max_size=8), seed=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_kills_and_other_world_sizes_change_no_row_of_a_mixture(lives, seed):
    def plan():
        return plan_of([9, 14], [0.5, 2.0], seed, eval_rows=3, global_batch=8)[0]

    whole, done = [plan().global_rows(step) for step in range(30)], 0
    for world, survived in [*lives, (1, 30)]:
        fresh = plan()  # nothing but the step outlives a process
        for step in range(done, min(30, done + survived)):
            ranks = [fresh.micro_batches(step, rank, world) for rank in range(world)]
            assert [row for turn in zip(*ranks, strict=True) for batch in turn for row in batch] == whole[step]
            done = step + 1


def test_epochs_and_steps_follow_the_weighted_length():
    plan, _ = plan_of([10, 20], [3.0, 0.5])
    assert plan.rows_per_epoch == 40 and plan.steps_for(1.0) == 10 and plan.epoch_at(15) == 1.5
    assert plan_of([2, 2], [3.0, 1.0], global_batch=8)[0].steps_for(1.0) == 1, "a few rows often fill a batch"
    with pytest.raises(DataError, match=r"2 training rows are left, fewer than train\.global_batch_size=4"):
        plan_of([2, 2], [0.5, 0.5])
    with pytest.raises(DataError, match=r"an epoch has 120,000,004 rows, more than 100,000,000; divide all weights"):
        plan_of([120_000, 4], [1000.0, 1.0])
    with pytest.raises(DataError, match=r"source 1: its 4 training rows at weight=0\.1 are less than a row an epoch"):
        plan_of([9, 4], [1.0, 0.1])
    with pytest.raises(DataError, match=r"0 training rows are left, fewer than train\.global_batch_size=4"):
        plan_of([2], [1.0], eval_rows=2)


@pytest.fixture
def two(tmp_path, recipe):  # noqa: F811
    """A recipe of two sources, of 25 and 15 rows."""
    for name, rows in (("a", ROWS[:25]), ("b", ROWS[25:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(weight=0.4, *overrides, second="b.jsonl"):
        sources = f"[{{path: {tmp_path}/a.jsonl}}, {{path: {tmp_path}/{second}, weight: {weight}}}]"
        small = ["data.path=", "data.max_rows=", "data.eval_rows=5", "train.global_batch_size=8"]
        return recipe(*small, f"data.sources={sources}", *overrides)

    return load


def test_a_weight_does_not_tokenise_again_and_rows_keep_their_names(two, tmp_path):
    said = []
    _, _, data = prepare(two(), Ranks(), said.append)
    assert sum("tokenised into" in line for line in said) == 2 and len(list((tmp_path / "prepared").iterdir())) == 2
    again = prepare(two(3.0), Ranks(), said.append)[2]
    assert again.sha256 == data.sha256 and sum("tokenised into" in line for line in said) == 2
    assert data.row_name(3) == f"{tmp_path}/a.jsonl:4" and data.row_name(25) == f"{tmp_path}/b.jsonl:1"
    assert data.input_ids(25).equal(data.parts[1].input_ids(0)) and data.length(25) == data.parts[1].length(0)
    assert data.tokens([3, 25]) == len(data.input_ids(3)) + len(data.input_ids(25))
    assert data.supervised_tokens([3, 25]) == len(data.supervised(3)) + len(data.supervised(25))
    plan, held_out, _ = plan_batches(two(), data)
    groups = data.by_source(plan.rows)
    assert len(held_out) == 5 and plan.rows_per_epoch == len(groups[0]) + round(0.4 * len(groups[1]))


def test_notes_and_bad_rows_name_their_source(two, tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"question": "a", "answer": " "}) + "\n")
    with pytest.raises(DataError, match=r"c\.jsonl: 1 rows cannot be trained on \(the first is row 2: answer is empty"):
        prepare(two(1.0, second="c.jsonl"), Ranks(), print)
    said = []
    prepare(two(1.0, "data.max_bad_rows=1", second="c.jsonl"), Ranks(), said.append)
    assert f"data: {tmp_path}/c.jsonl: left out 1 rows: answer is empty" in said


def test_rows_that_are_not_finite_are_named_with_their_source(two):
    from abba.training.loop import _numbers

    stream = types.SimpleNamespace(data=prepare(two(), Ranks(), print)[2])
    assert [name.rpartition("/")[2] for name in _numbers(stream, [0, 26]).split(", ")] == ["a.jsonl:1", "b.jsonl:2"]
