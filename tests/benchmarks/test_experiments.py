"""The experiments at toy size: what they compute is right, they continue, and they write what they promise."""

import json
import re

import numpy as np
import pytest
import torch

from tests import warm


@pytest.fixture(autouse=True)
def _as_the_programs_import(monkeypatch):
    monkeypatch.syspath_prepend(warm.ROOT / "benchmarks")


def planted(seed: int) -> torch.Tensor:
    """An ABBA matrix of r1 = r2 = 4 in 64 x 64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((64, 4), (4, 64), (64, 4), (4, 64))
    b1_OR, a1_RI, b2_OR, a2_RI = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return (b1_OR @ a1_RI) * (b2_OR @ a2_RI)


def run(tmp_path, program, *arguments):
    return warm.run(tmp_path / "log", f"benchmarks/{program}.py", *arguments, "--output", str(tmp_path))


RECONSTRUCTION = ["--kinds", "gaussian", "checkerboard", "--ranks", "2", "4", "--seeds", "1", "--size", "16"]


def test_reconstruction_continues_and_says_where_the_trend_fails(tmp_path):
    assert (finished := run(tmp_path, "reconstruction", *RECONSTRUCTION)).returncode == 0, finished.stderr[-3000:]
    path = tmp_path / "reconstruction.json"
    record = json.loads(path.read_text())
    board = record["cells"]["checkerboard, rank 2, seed 0"]
    assert board["lora"] < 1e-6 < 0.5 < board["abba"], "rank 2, which a pair of rank-one matrices cannot be"
    assert record["cells"]["gaussian, rank 4, seed 0"]["parameters"] == 4 * 32
    table = (tmp_path / "reconstruction.md").read_text()
    assert table.count("\n|") == 2 + 4 and "\n- checkerboard: 2\n" in table
    assert (tmp_path / "reconstruction.png").read_bytes().startswith(b"\x89PNG")

    lost = record["cells"].pop("gaussian, rank 2, seed 0")
    path.write_text(json.dumps(record))
    assert "3 of 4 cells are there" in run(tmp_path, "reconstruction", *RECONSTRUCTION).stdout
    again = json.loads(path.read_text())["cells"]
    assert again.pop("gaussian, rank 2, seed 0")["abba"] == lost["abba"] and again == record["cells"]
    assert not list(tmp_path.glob(".*")), "nothing half-written is left"

    before = path.read_text()
    refused = run(tmp_path, "reconstruction", *RECONSTRUCTION[:-1], "32")
    assert refused.returncode == 66 and refused.stderr.count("\n") == 1 and "'size': 16" in refused.stderr
    assert path.read_text() == before


def test_loras_error_is_the_closed_form():
    from factorise import best_low_rank, relative_error, singular_tail
    from matrices import KINDS, WEIGHTS, matrix

    for kind in [*KINDS, *WEIGHTS]:
        w_OI = matrix(kind, 32, seed=1)
        squares = np.linalg.eigvalsh((w_OI @ w_OI.T).numpy())[::-1].clip(0)
        for rank in (2, 8, 16):
            b_OR, a_RI = best_low_rank(w_OI, rank)
            expected = np.sqrt(squares[rank:].sum() / squares.sum())
            assert relative_error(w_OI, b_OR @ a_RI) == pytest.approx(expected, abs=1e-6), kind
            assert singular_tail(w_OI, rank) == pytest.approx(expected, abs=1e-6), kind


def test_the_kinds_are_what_they_are_called():
    from matrices import matrix

    parity = matrix("parity", 16, 0)
    torch.testing.assert_close(parity @ parity.T, 16 * torch.eye(16, dtype=torch.float64))
    assert matrix("xor grid", 16, 0)[5, 3] == 5 ^ 3
    assert torch.linalg.matrix_rank(matrix("checkerboard", 32, 0)) == 2
    spectrum = torch.linalg.svdvals(matrix("power law 1", 32, 0))
    torch.testing.assert_close(spectrum, 1 / torch.arange(1, 33, dtype=torch.float64))
    assert 0.02 < (matrix("sparse", 64, 0) != 0).double().mean() < 0.08
    assert not matrix("block", 32, 0)[:4, 4:].any() and matrix("block", 32, 0)[:4, :4].all()


@pytest.mark.parametrize("seed", [3, 9])
def test_a_planted_matrix_is_recovered(seed):
    from factorise import fit_abba

    error, starts = fit_abba(planted(seed), rank=4, starts=60, seed=100 + seed)
    assert error <= 1e-3 and starts[0] > 0.1, "by a random start, not by the one that knows the SVD"


@pytest.mark.slow
def test_planted_matrices_are_recovered_in_nine_of_ten_seeds():
    from factorise import fit_abba

    errors = [fit_abba(planted(seed), rank=4, starts=60, seed=100 + seed)[0] for seed in range(10)]
    assert sum(error <= 1e-3 for error in errors) >= 9, errors


def test_bounds_of_a_fit():
    """A sum is LoRA of both ranks; ABBA is at least LoRA of one; no more starts make it worse."""
    from factorise import fit_abba, fit_sum, singular_tail
    from matrices import matrix

    w_OI = matrix("power law 1", 32, seed=0)
    assert fit_sum(w_OI, 3, seed=0) == pytest.approx(singular_tail(w_OI, 6), abs=1e-4)
    few, many = fit_abba(w_OI, 3, starts=0, seed=0), fit_abba(w_OI, 3, starts=4, seed=0)
    assert few[0] < singular_tail(w_OI, 3) and len(few[1]) == 1
    assert many[1][0] == few[1][0] and len(many[1]) == 5
    assert many[0] <= min(many[1]), "the polish starts from the best start and never ends above it"
    assert fit_abba(10 * w_OI, 3, starts=0, seed=0)[0] == pytest.approx(few[0], abs=1e-4)


def test_halves():
    from factorise import best_halves

    generator = torch.Generator().manual_seed(0)
    rank_one = [torch.randn(8, 1, generator=generator) @ torch.randn(1, 16, generator=generator) for _ in range(2)]
    stacked = torch.cat(rank_one).double()
    price = 8 + 16
    for w_OI in (stacked, stacked.T):
        assert best_halves(w_OI, 2 * price) == (pytest.approx(0, abs=1e-6), 2 * price)
        error, used = best_halves(w_OI, 2 * price - 1)
        assert error > 0.1 and used == price, "a budget buys whole ranks"


def test_digits(tmp_path):
    small = ["--ranks", "4", "--rates", "1e-2", "3e-2", "--seeds", "2", "--steps", "60", "--every", "30"]
    assert (finished := run(tmp_path, "digits", *small)).returncode == 0, finished.stderr[-3000:]
    cells = json.loads((tmp_path / "digits.json").read_text())["cells"].values()
    assert len(cells) == 2 * 3 * 2 * 2 and all([look["step"] for look in c["curve"]] == [0, 30, 60] for c in cells)
    parameters = {cell["method"]: cell["parameters"] for cell in cells}
    assert parameters["abba"] == parameters["lora"] == 4 * (64 + 64 + 64 + 10) < parameters["full"]
    for cell in cells:
        start, end = cell["curve"][0], cell["curve"][-1]
        assert start["old"] > 90, "the base knows 0-7"
        assert start["accuracy"] == 0 if cell["goal"] == "new" else 70 < start["accuracy"] < 85, (
            "and no adapter acts yet"
        )
        assert end["accuracy"] > start["accuracy"]
    table = (tmp_path / "digits.md").read_text()
    assert table.count("\n|") == 2 + 6 and (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_rate_is_chosen_on_validation_rows():
    from cells import chosen

    def cell(rate, seed, validation, loss, test):
        look = {"accuracy": validation, "loss": loss}
        return {"goal": "all", "rank": 4, "method": "abba", "rate": rate, "seed": seed} | {
            "validation": look,
            "test": {"accuracy": test},
        }

    cells = [cell(0.1, 0, 99, 1.0, 10), cell(0.1, 1, 71, 1.0, 10), cell(0.2, 0, 90, 2.0, 99), cell(0.2, 1, 90, 2.0, 99)]
    assert {c["rate"] for c in chosen(cells, ("goal", "rank", "method"))["all", 4, "abba"]} == {0.2}, (
        "90 and 90 are more than 99 and 71"
    )
    cells += [cell(0.3, seed, 90, 1.5, 1) for seed in range(2)]
    assert {c["rate"] for c in chosen(cells, ("goal", "rank", "method"))["all", 4, "abba"]} == {0.3}, (
        "the same accuracy at a lower loss, not the test"
    )


COMPARE = ["--methods", "lora", "abba", "--rates", "5e-3", "--seeds", "1", "--steps", "3"]
COMPARE += ["--batch", "4", "--scored", "4", "--processes", "1"]


def test_compare_continues(tmp_path):
    assert (finished := run(tmp_path, "compare", *COMPARE)).returncode == 0, finished.stderr[-3000:]
    path = tmp_path / "compare.json"
    record = json.loads(path.read_text())
    assert len(record["cells"]) == 2 * 2 and record["settings"]["steps"] == dict.fromkeys(("stories", "bystander"), 3)
    for cell in record["cells"].values():
        assert cell["steps"] == 3 and len(cell["curve"]) == 1 and 0 < cell["curve"][0] < 10
    assert len({cell["parameters"] for cell in record["cells"].values()}) == 1
    table = (tmp_path / "compare.md").read_text()
    assert table.count("\n|") == 2 * (2 + 4) and (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")

    lost = record["cells"].pop("bystander, abba, rate 0.005, seed 0")
    record["machine"]["commit"] = "0000000"
    path.write_text(json.dumps(record))
    assert "3 of 4 cells are there" in run(tmp_path, "compare", *COMPARE).stdout
    written = json.loads(path.read_text())
    assert written["earlier"] == [record["machine"]] and written["machine"]["commit"] != "0000000"
    again = written["cells"]
    made = again.pop("bystander, abba, rate 0.005, seed 0")
    measured = ("validation", "test", "curve", "parameters")
    assert [made[key] for key in measured] == [lost[key] for key in measured] and again == record["cells"]


def test_a_cell_that_diverges_is_a_result():
    from tiny import HOPELESS, learn

    cell = learn("stories", "abba", 1e30, 0, steps=4, rank=4, batch=2, scored=2)
    assert 1 <= cell["steps"] < 4 and cell["validation"] == {"accuracy": 0, "loss": HOPELESS}


def test_budgets_are_equal_but_for_doras_magnitudes():
    from compare import RATES
    from tiny import adapted

    assert len({len(rates) for rates in RATES.values()}) == 1, "each method has as many rates"
    counts, magnitudes = {}, {}
    for method in RATES:
        trained = [p for p in adapted(method, 16, seed=0).parameters() if p.requires_grad]
        counts[method] = sum(p.numel() for p in trained)
        magnitudes[method] = sum(p.numel() for p in trained if p.dim() == 1)
    assert counts.pop("full") > 4 * counts["lora"] and counts["dora"] < 1.04 * counts["lora"]
    counts["dora"] -= magnitudes["dora"]
    assert all(count == pytest.approx(counts["lora"], rel=0.01) for count in counts.values()), counts


def test_parts_share_no_fact():
    from problems import PARTS, TASKS, operands, problems

    for task in TASKS:
        facts, questions = {}, {}
        for part in PARTS:
            rows = problems(task, part, 3200 if part == "train" else 128)
            answers = [re.match(r"There are .* = <<(\d+)([+-])(\d+)=(\d+)>>", row["answer"]).groups() for row in rows]
            facts[part] = {operands((op, int(x), int(y))) for x, op, y, _ in answers}
            questions[part] = {row["question"] for row in rows}
            for row, (x, op, y, result) in zip(rows, answers, strict=True):
                assert int(result) == int(x) + int(op + y) and row["answer"].endswith(f"#### {result}")
                assert {x, y} <= set(re.findall(r"\d+", row["question"]))
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            assert not facts[one] & facts[other] and not questions[one] & questions[other]


def test_a_bystander_is_somebody_else_anywhere():
    from problems import problems

    places = set()
    for row in problems("bystander", "test", 64):
        *told, asked = row["question"].split(". ")
        name = re.match(r"How many \w+ did (\w+) ", asked)[1]
        others = [place for place, sentence in enumerate(told) if name not in sentence]
        assert len(told) == 4 and len(others) == 1 and re.fullmatch(r"\w+ had \d+ \w+\.?", told[others[0]])
        places.add(others[0])
    assert places == {0, 1, 2, 3}


def test_compare_reports_the_test_at_the_rate_that_validation_chose():
    from cells import chosen
    from compare import summary, sweep

    def cell(rate, seed, validation, test):
        same = {"task": "stories", "method": "lora", "parameters": 10, "magnitudes": 0, "training cpu seconds": 1.0}
        found = {"validation": {"accuracy": validation, "loss": 1.0}, "test": {"accuracy": test + seed}}
        return {**same, "rate": rate, "seed": seed, **found}

    rates, looks = (0.1, 0.2, 0.3), ((50, 90), (80, 10), (70, 99))
    cells = [cell(rate, seed, *look) for rate, look in zip(rates, looks, strict=True) for seed in (0, 1)]
    (row,) = summary(chosen(cells, ("task", "method")), {"lora": rates})
    assert (row["rate"], row["test %"], row["min-max"], row["validation %"]) == ("0.2", "10.5", "10.0-11.0", "80.0")
    assert sweep(cells) == [{"task": "stories", "method": "lora", "0.1": "50.0", "0.2": "80.0", "0.3": "70.0"}]
