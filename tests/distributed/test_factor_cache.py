"""Initial factors kept by one start for the next: the same bits, read only where they belong, never trusted unread."""

import os
import random
import resource
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn

import abba.sharded.factor_cache
import abba.sharded.initialize
from abba.adapter.config import AdapterConfig
from abba.adapter.initialize import initial_factors, seed_for
from abba.checkpoint.slices import slice_bounds
from abba.errors import CheckpointError
from abba.prepared import KILLED_WHILE_WRITING_SECONDS
from abba.sharded.factor_cache import factor_file, place_sums
from abba.sharded.initialize import starting_factors
from abba.sharded.ranks import Ranks
from abba.training.recipe import load_recipe
from abba.training.resume import fingerprint
from tests.distributed.ranks import TINY, read_metrics
from tests.warm import ROOT


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def decomposed(monkeypatch):
    """The names of modules whose weights were decomposed."""
    names = []

    def dense(targets, config, seed, ranks):
        names.extend(targets)
        return {
            name: initial_factors(of.weight, config.r1, config.r2, seed_for(name, seed), config.init)
            for name, of in targets.items()
        }

    monkeypatch.setattr(abba.sharded.initialize, "factors_of_sharded", dense)
    return names


def linears(dtype=torch.bfloat16, names=("a", "b.c")):
    """As ZeRO-3 leaves them on one rank."""
    generator, targets = torch.Generator().manual_seed(1), {}
    for number, name in enumerate(names):
        linear = nn.Linear(24 + number, 40, bias=False)
        linear.weight.data = torch.randn(linear.weight.shape, generator=generator).to(dtype)
        linear.weight.ds_numel, linear.weight.ds_tensor = linear.weight.numel(), linear.weight.data.flatten()
        targets[name] = linear
    return targets


def start(cache, targets=None, r1=4, r2=3, seed=5, init="svd"):
    said, config = [], AdapterConfig(r1, r2, init=init)
    factors = starting_factors(targets or linears(), config, seed, None, cache, Ranks(), said.append)
    return factors, said


def same(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def test_a_second_start_reads_what_the_first_has_kept(alone, decomposed, tmp_path):
    first, computed = start(tmp_path / "prepared")
    assert decomposed == ["a", "b.c"]
    second, read = start(tmp_path / "prepared")
    assert decomposed == ["a", "b.c"] and same(first, second)
    (path,) = (tmp_path / "prepared").iterdir()
    assert computed[0].startswith("factors: computed by SVD in") and computed[0].endswith(f"kept in {path}")
    assert [line.rpartition(" in ")[0] for line in read] == [f"factors: read from {path}"]


def changed_weight():
    targets = linears()
    weight = targets["b.c"].weight
    weight.data = weight.data[torch.tensor([1, 0, *range(2, len(weight))])]  # rows in another order
    weight.ds_tensor = weight.data.flatten()
    return targets


@pytest.mark.parametrize(
    "change",
    [
        {"r1": 3},
        {"r2": 4},
        {"seed": 6},
        {"init": "reference"},
        {"init": "kaiming"},
        {"targets": changed_weight},
        {"targets": lambda: linears(torch.float32)},
        {"targets": lambda: linears(names=("a", "b.d"))},
        {"targets": lambda: linears(names=("a",))},
        {"OVERSAMPLING": 9},
        {"POWER_ITERATIONS": 3},
        {"FORMAT_VERSION": 0},
        {"_kind": lambda device: "another processor"},
    ],
)
def test_what_decides_the_bits_is_in_the_name(alone, decomposed, monkeypatch, tmp_path, change):
    start(tmp_path)
    decomposed.clear()
    for name in [name for name in change if hasattr(abba.sharded.factor_cache, name)]:
        monkeypatch.setattr(abba.sharded.factor_cache, name, change.pop(name))
    if "targets" in change:
        change = {"targets": change["targets"]()}
    start(tmp_path, **change)
    assert decomposed and len(list(tmp_path.iterdir())) == 2


def test_switched_off_nothing_is_kept(alone, decomposed):
    factors, said = start(None)
    assert len(decomposed) == 2 and list(factors) == ["a", "b.c"]
    assert len(said) == 1 and said[0].endswith("not kept, as adapter.cache_factors=false says")


def test_it_decides_no_number_of_a_run():
    recipes = [load_recipe("quickstart", [f"adapter.cache_factors={kept}"], ROOT / "recipes") for kept in (True, False)]
    prints = [fingerprint(recipe.with_attention("sdpa").model_dump(), "", TINY) for recipe in recipes]
    assert prints[0] == prints[1] and "r1" in prints[0]["adapter"]


def test_every_damage_is_seen_and_mended(alone, decomposed, tmp_path):
    right, _ = start(tmp_path)
    (path,) = tmp_path.iterdir()
    whole, draw = path.read_bytes(), random.Random(7)
    file = factor_file(tmp_path, linears(), AdapterConfig(4, 3), 5, Ranks())
    assert file.path == path
    for trial in range(200):
        wrong = bytearray(whole)
        if trial % 6 == 0:
            wrong = wrong[: draw.randrange(len(wrong))]
        else:
            wrong[draw.randrange(len(wrong))] ^= 1 << draw.randrange(8)
        path.write_bytes(wrong)
        with pytest.raises(CheckpointError) as error:
            file.read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)
    decomposed.clear()
    factors, said = start(tmp_path)
    assert said[0].startswith(f"factors: WARNING: {path}: ") and said[0].endswith("; they are computed anew")
    assert decomposed and same(factors, right) and path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_of_another_base_is_not_used_under_this_name(alone, decomposed, tmp_path):
    right, _ = start(tmp_path)
    (path,) = tmp_path.iterdir()
    start(tmp_path / "other", seed=6)
    (other,) = (tmp_path / "other").iterdir()
    other.replace(path)
    factors, said = start(tmp_path)
    assert said[0].startswith(f"factors: WARNING: {path}: was made from another base or with other settings")
    assert same(factors, right)


def test_a_run_goes_on_where_nothing_can_be_kept(alone, decomposed, tmp_path):
    occupied = tmp_path / "occupied"
    occupied.write_text("")
    _, said = start(occupied)
    assert len(said) == 1 and said[0].startswith("factors: WARNING: computed by SVD in")
    assert f"and not kept: {occupied}/factors-" in said[0] and "cannot be written: " in said[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        factors, said = start(tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(factors) == ["a", "b.c"] and "cannot be written: File too large" in said[0]
    assert list((tmp_path / "small").iterdir()) == []


def test_two_that_write_at_once_leave_one_whole_file(alone, decomposed, monkeypatch, tmp_path):
    factors, _ = start(None)
    file, both = factor_file(tmp_path, linears(), AdapterConfig(4, 3), 5, Ranks()), threading.Barrier(2)
    replace = os.replace

    def meeting(*arguments):
        both.wait(20)
        replace(*arguments)

    monkeypatch.setattr(os, "replace", meeting)
    killed, alive = (tmp_path / f".factors-x.safetensors.tmp-{name}" for name in ("old", "new"))
    for leftover, age in ((killed, KILLED_WHILE_WRITING_SECONDS + 60), (alive, 0)):
        leftover.write_text("")
        written = leftover.stat().st_mtime - age
        os.utime(leftover, (written, written))
    writers = [threading.Thread(target=file.write, args=(factors,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert same(file.read(), factors)
    assert sorted(tmp_path.iterdir()) == [alive, file.path], "a living writer's file stays, a killed one's goes"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("numel", [5, 64, 1001])
def test_the_sums_of_a_weight_are_the_same_at_any_world_size(monkeypatch, dtype, numel):
    monkeypatch.setattr(abba.sharded.factor_cache, "CHUNK", 7)
    weight = torch.randn(numel, generator=torch.Generator().manual_seed(2)).to(dtype)
    data = weight.view(torch.uint8).numpy().tobytes()
    numbers = [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]
    wanted = [sum(numbers) % 2**64, sum(n * (2 * place + 1) for place, n in enumerate(numbers)) % 2**64]
    for world in (1, 2, 3, 8):
        total = torch.zeros(2, dtype=torch.int64)
        for rank in range(world):
            first, stop = slice_bounds(numel, rank, world)
            padded = torch.full((-(-numel // world),), 7.0, dtype=dtype)  # what lies in the padding does not count
            padded[: stop - first] = weight[first:stop]
            total += place_sums(padded, numel, rank, world)
        assert [number % 2**64 for number in total.tolist()] == wanted


def test_real_ranks_read_what_another_number_of_them_has_kept(runs):
    alone, computed = runs("world1", 1)
    _, pair = runs("world2", 2)
    kept = f"data.prepared_path={alone}/tokens"
    run, found = runs("kept", 2, kept, "train.max_steps=1", "adapter.alpha=8")
    assert sum(rank["svds"] for rank in pair) == computed[0]["svds"] == 14
    for rank, counterpart in zip(found, pair, strict=True):
        assert rank["svds"] == 0 and rank["svd"] == computed[0]["svd"]
        assert rank["masters"] == counterpart["masters"]
    parts = read_metrics(run)[0]["startup_seconds"]
    expected = ["imports", "data", "ranks", "resume", "architecture", "weights", "factors", "engine", "check"]
    assert list(parts) == [*expected, "first step"] and all(seconds >= 0 for seconds in parts.values())
