"""Every benchmark runs, at toy size, and writes what it promises; times on a busy machine are not looked at."""

import itertools
import json
import math

import pytest
import torch
from torch import nn

from tests import warm
from tests.faults.harness import beyond_ci

PARTS = ("step", "profile", "memory", "layer", "targets")
LAYER = ["--shapes", "96x64", "--tokens", "16", "--ranks", "2", "4", "--repetitions", "2"]
DTYPES = ["--dtypes", "bfloat16", "float32"]
STEP = [
    "--width",
    "64",
    "--tokens",
    "16",
    "--repetitions",
    "1",
    "--methods",
    "lora",
    "loha",
    "hira",
    "dora",
    "abba",
    "full",
]
SVD = ["--svd-size", "64", "--svd-rank", "8", "--repetitions", "1"]
START = ["--models", "random", "--layers", "1", "--ranks", "2", "--launcher", "torchrun", "--repetitions", "1"]
SCALING = ["--ranks", "1", "2", "--layers", "1", "2", "--hidden", "64", "--tokens", "16", "--repetitions", "2"]
GPU = ["--width", "64", "--layers", "2", "--tokens", "16", "--repetitions", "1"]
LOAD = ["--ranks", "1", "2", "--layers", "1", "--repetitions", "1"]


def run(tmp_path, program, arguments):
    finished = warm.run(tmp_path / "log", f"benchmarks/{program}.py", *arguments, "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    record = json.loads((tmp_path / f"{program}.json").read_text())
    assert record["machine"]["torch"] == torch.__version__ and f"benchmarks/{program}.py" in record["command"]
    table = (tmp_path / f"{program}.md").read_text()
    assert table.count("\n|") == len(record["rows"]) + 2
    return record["rows"]


def test_what_is_slow_sits_out_rounds_over_the_whole_run(monkeypatch):
    """A machine that changes its speed does so for all: the fast may not be measured last and alone."""
    monkeypatch.syspath_prepend(warm.ROOT / "benchmarks")
    import measure

    now, order = [0.0], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def case(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    cases = {name: case(name, seconds) for name, seconds in {"fast": 0.1, "slow": 1.0, "very slow": 30.0}.items()}
    found = measure.in_turns(cases, repetitions=60, warmup=1, enough=12)
    assert {name: len(values) for name, values in found.items()} == {"fast": 60, "slow": 12, "very slow": 2}
    turns = [order[: index + 1].count("fast") for index, name in enumerate(order) if name == "slow"]
    gaps = [later - earlier for earlier, later in itertools.pairwise(turns[1:])]
    assert set(gaps) <= {5, 6}, "evenly"
    assert order[-1] == "very slow" and set(found["slow"]) == {1.0}
    together = measure.in_turns(cases, repetitions=5, enough=math.inf)  # as what ranks do together has to be
    assert {name: len(values) for name, values in together.items()} == dict.fromkeys(cases, 5)


def test_layer(tmp_path):
    rows = run(tmp_path, "layer", [*LAYER, *DTYPES])
    of = {(row["dtype"], row["method"]): row for row in rows}
    assert {dtype for dtype, _ in of} == {"bfloat16", "float32"}
    methods = ["frozen", "lora", "dora", "hira", "loha", "textbook", "abba 16x16", "abba 2x2", "abba 4x4"]
    assert [row["method"] for row in rows[: len(methods)]] == methods
    assert all(len(row["seconds"]) == 2 for row in rows)
    # x (16, 64) and h (16, 4) in fp32; textbook keeps its Khatri-Rao factors too.
    assert of["float32", "abba 2x2"]["saved MB"] == pytest.approx((16 * 64 + 16 * 4) * 4 / 1e6)
    assert of["float32", "textbook"]["saved MB"] > of["float32", "abba 16x16"]["saved MB"]
    assert of["float32", "frozen"]["saved MB"] == 0


def test_step(tmp_path):
    rows = run(tmp_path, "step", STEP)
    assert {row["checkpointing"] for row in rows} == {"none", "selective", "reentrant"}
    trainable = {row["method"]: row["trainable"] for row in rows}
    assert trainable["abba"] == trainable["lora"] == trainable["loha"] == trainable["hira"], "equal budgets"
    assert trainable["full"] > trainable["abba"] and all(row["tokens/s"] > 0 for row in rows)


def test_svd(tmp_path):
    """Without starts, which take a real launcher."""
    finished = warm.run(tmp_path / "log", "benchmarks/startup.py", "--models", *SVD, "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    rows = json.loads((tmp_path / "svd.json").read_text())["rows"]
    of = {(row["weights"].split(" ")[0], row["oversampling"], row["power iterations"]): row for row in rows}
    assert len(of) == len(rows) == 3 * 9 and sum(row["used"] == "yes" for row in rows) == 3
    # 8 of 64 singular values k^-0.5: the more is computed, the closer to the best and never below it.
    errors = [float(of["singular", k, n]["error over best"]) for k, n in ((4, 1), (8, 2), (16, 4))]
    assert errors[0] > errors[1] > errors[2] >= 1 - 1e-6 and errors[2] < 1.001
    energies = [float(row["energy of best"]) for row in rows]
    assert min(energies) > 0.5 and max(energies) <= 1


@pytest.mark.slow
@beyond_ci
def test_startup(tmp_path):
    first, second = run(tmp_path, "startup", [*START, "--svd-size", "0"])
    assert (first["start"], second["start"]) == ("first", "second") and first["ranks"] == second["ranks"] == 2
    assert list(first["seconds"][0]) == list(second["seconds"][0]) and first["launcher s"] > 0
    assert first["all s"] == pytest.approx(sum(first["seconds"][0].values()))


@pytest.mark.slow
@beyond_ci
def test_load(tmp_path):
    rows = run(tmp_path, "load", LOAD)
    ours = [row for row in rows if row["way"] == "ours"]
    assert [row["ranks"] for row in ours] == [1, 2]
    assert [row["read, of all"] for row in ours] == pytest.approx([1, 1 / 2], rel=0.01)
    assert max(row["peak beyond partition, MiB"] for row in ours) < 64


@pytest.mark.slow
@beyond_ci
def test_scaling(tmp_path):
    rows = run(tmp_path, "scaling", SCALING)
    assert [(row["ranks"], row["layers"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(row["counted as planned"] and len(row["seconds"]) == 2 for row in rows)
    alone, together = rows[1], rows[3]
    assert alone["gathered MB"] == 0 < together["gathered MB"] and len(together["found"]) == 2
    assert together["reduced MB"] == alone["reduced MB"] / 2  # each rank computes half of the micro-batches


def test_gpu(tmp_path):
    """On a CPU, where its times and peaks mean nothing."""
    finished = warm.run(tmp_path / "log", "benchmarks/gpu.py", *GPU, "--output", str(tmp_path))
    assert finished.returncode == 0, finished.stderr[-3000:]
    of = {part: json.loads((tmp_path / f"gpu_{part}.json").read_text())["rows"] for part in PARTS}
    assert [(row["checkpointing"], row["method"]) for row in of["step"]] == [
        (mode, method) for mode in ("none", "selective") for method in ("lora", "abba")
    ]
    assert of["step"][1]["counted over lora"] < of["step"][0]["counted over lora"] == 1
    assert sum(row["% of all"] for row in of["profile"]) == pytest.approx(100)
    assert len({row["layer"] for row in of["layer"]}) == 8 and len(of["targets"]) == 6
    kept = {row["method"]: row["saved MB"] for row in of["layer"]}
    assert kept["frozen"] == 0 < kept["lora"], "torch's own linear, not DeepSpeed's"
    assert "skipped" not in finished.stdout


def test_a_part_that_fails_on_a_gpu_leaves_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(warm.ROOT / "benchmarks")
    import gpu

    def out_of_memory():
        raise torch.OutOfMemoryError("CUDA out of memory")

    parts = gpu.Parts(1, {}, tmp_path)
    parts.run("step", "the first", 0, out_of_memory)
    parts.run("step", "the second", 0, lambda: [{"method": "abba"}])
    assert parts.failed == ["the first"] and "CUDA out of memory" in capsys.readouterr().err
    assert json.loads((tmp_path / "gpu_step.json").read_text())["rows"] == [{"method": "abba"}]


def test_gpu_says_what_the_time_does_not_suffice_for(tmp_path):
    arguments = [*GPU, "--minutes", "0.1", "--output", str(tmp_path)]
    finished = warm.run(tmp_path / "log", "benchmarks/gpu.py", *arguments)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert finished.stdout.count("skipped: ") == 7 and not list(tmp_path.glob("*.json"))


def test_the_textbook_layer_is_the_same_function(monkeypatch):
    monkeypatch.syspath_prepend(warm.ROOT / "benchmarks")
    from methods import adapt

    x_TI, results = torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), {}
    for method in ("abba", "textbook"):
        torch.manual_seed(0)
        module = adapt(nn.Sequential(nn.Linear(24, 32, bias=False)), method, ["0"], rank=2)
        y_TO = module(x_TI)
        y_TO.square().sum().backward()
        results[method] = [y_TO.detach(), *(p.grad for p in module.parameters() if p.requires_grad)]
    assert len(results["abba"]) == 5
    for ours, textbook in zip(results["abba"], results["textbook"], strict=True):
        torch.testing.assert_close(ours, textbook, rtol=1e-4, atol=1e-5)


def test_packing(tmp_path):
    rows = tmp_path / "rows.jsonl"
    stories = (warm.ROOT / "recipes/assets/stories/train.jsonl").read_text().splitlines()[:400]
    rows.write_text("\n".join(stories) + "\n")
    arguments = ["--rows", str(rows), "--count", "16", "--packed-rows", "4", "--hidden", "32", "--pieces", "400"]
    arguments += ["--length", "512", "--repetitions", "1"]
    found = {row["way"]: row for row in run(tmp_path, "packing", arguments)}
    assert found["fixed"]["padding %"] > found["longest"]["padding %"] >= found["grouped"]["padding %"]
    assert found["packed"]["most tokens"] <= 8 * 512
