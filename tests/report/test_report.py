"""launch/report.py: what the page shows, that nothing in it runs or is fetched, and what it refuses."""

import json
import os
import re
from html.parser import HTMLParser

import pytest

from abba.report.chart import HEIGHT, LEFT, TOP, WIDTH, Line, Scale, averaged, chart
from abba.report.page import page
from abba.report.run import read_run
from tests import warm

ATTACK = "</pre><script>alert(1)</script><img src=x onerror=alert(2)>"


class Page(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def made(directory, losses=(2.0, 1.0, 0.5), recipe="output_dir: somewhere\nseed: 0\n"):
    """A run's directory as training and evaluation leave it."""
    directory.mkdir(parents=True)
    steps = [
        {"step": step, "loss": loss, "learning_rate": 0.01 / step, "grad_norm": 1.5, "tokens_per_second": 2000.0,
         "step_seconds": 0.5, "peak_memory_bytes": 3_000_000_000}
        for step, loss in enumerate(losses, 1)
    ]  # fmt: skip
    lines = [*steps, {"step": 2, "eval_loss": 0.75}, {"step": 3, "save_seconds": 0.1, "save_bytes": 5}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "recipe.yaml").write_text(recipe)
    (directory / "score").mkdir()
    (directory / "score/scores.json").write_text(json.dumps({"task": "gsm8k", "n": 64, "exact_match": 92.1875}))
    generation = {"row": 0, "instruction": "1 + 1?", "reference": "2", "generated": "It is 2", "correct": True}
    text = "".join(json.dumps(generation | {"row": row}) + "\n" for row in range(20))
    (directory / "score/generations.jsonl").write_text(text)
    return directory


def report(tmp_path, *arguments):
    return warm.run(tmp_path / "log", "launch/report.py", *map(str, arguments))


def test_a_page_of_two_runs(tmp_path):
    first = made(tmp_path / "first")
    second = made(tmp_path / "second", losses=(3.0, 2.5), recipe="output_dir: somewhere\nseed: 1\n")
    finished = report(tmp_path, first, second, "--samples", "2")
    assert (finished.returncode, finished.stderr) == (0, "") and finished.stdout.strip() == f"{first}/report.html"
    text = (first / "report.html").read_text()
    shown = Page(text)
    lines = [attributes for tag, attributes in shown.elements if tag == "polyline"]
    assert len(lines) == 2 * 6, "two runs: loss, eval loss, rate, gradient, speed, memory"
    assert {attributes["class"] for attributes in lines} == {"line c0 d0", "line c1 d0"}
    assert text.count("<mark>") == 2 and "<mark>seed: 1</mark>" in text, "where the recipes differ"
    assert shown.text.count("It is 2") == 2 * 2 and "92.2" in shown.text and "prefers-color-scheme: dark" in text
    row = "<td>3</td><td>0.5</td><td>0.75</td><td>0.75</td><td>2,000</td><td>3</td><td>1.5</td>"
    assert row in text, "steps, losses, speed, memory, seconds of the first run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "log", "second"]
    assert not list(first.glob(".*")), "nothing half-written is left"


def test_text_from_files_stays_text(tmp_path):
    run = made(tmp_path / "<script>alert(0)<", recipe=f"output_dir: {ATTACK}\n")
    hostile = json.dumps({"row": ATTACK, "instruction": ATTACK, "generated": ATTACK, "correct": ATTACK})
    (run / "score/generations.jsonl").write_text(hostile + "\n")
    (run / "score/scores.json").write_text(json.dumps({ATTACK: ATTACK, "list": [ATTACK]}))
    text = page([read_run(run, samples=8)])
    shown = Page(text)
    assert shown.text.count(ATTACK) >= 7 and "<script" not in text and "<img" not in text
    assert not {tag for tag, _ in shown.elements} & {"script", "link", "img", "iframe", "object", "base", "form"}
    names = {name for _, attributes in shown.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href", "xlink:href", "style")}
    assert not re.search(r"url\(|@import|https?:", text), "nothing is fetched"
    assert ("meta", "default-src 'none'; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in shown.elements
    ]


def test_generations_of_the_harness_are_shown_and_of_unknown_lines_there_is_no_table(tmp_path):
    run = made(tmp_path / "run")
    line = {"task": "t", "doc_id": 7, "doc": {"q": "1 + 1?"}, "target": ATTACK, "resps": [["raw"]]}
    (run / "score/generations.jsonl").write_text(json.dumps({**line, "filtered_resps": [ATTACK]}) + "\n")
    text = page([read_run(run, samples=8)])
    assert "<th>doc_id</th><th>target</th><th>filtered_resps</th>" in text and "<th>row</th>" not in text
    assert "<td>7</td>" in text and Page(text).text.count(ATTACK) == 2 and "<script" not in text
    (run / "score/generations.jsonl").write_text(json.dumps({"other": "lines"}) + "\n")
    assert "Generations" not in page([read_run(run, samples=8)])


def test_a_half_written_last_line_is_left_out_and_said(tmp_path):
    run = made(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 77')
    finished = report(tmp_path, run)
    assert finished.returncode == 0 and finished.stderr.count("\n") == 1 and "half-written" in finished.stderr
    text = (run / "report.html").read_text()
    assert "half-written" in text and "<td>77</td>" not in text


def _without_directory(run):
    os.rename(run, run.with_name("elsewhere"))


@pytest.mark.parametrize(
    "damage, expected",
    [
        (_without_directory, "is no directory"),
        (lambda run: (run / "metrics.jsonl").unlink(), "has no metrics.jsonl"),
        (lambda run: (run / "metrics.jsonl").write_text(""), "holds no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "lo'), "holds no step yet"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 1}\n{"st\n'), "line 2 is not JSON"),
        (lambda run: (run / "metrics.jsonl").write_text("[1]\n"), "line 1 is no JSON object"),
        (lambda run: (run / "metrics.jsonl").write_text('{"step": "x"}\n'), "line 1 has no step"),
        (lambda run: (run / "recipe.yaml").unlink(), "recipe.yaml: cannot be opened"),
        (lambda run: (run / "score/scores.json").write_text("{"), "scores.json: is not JSON"),
        (lambda run: (run / "score/scores.json").write_text("[]"), "is no JSON object"),
        (lambda run: (run / "score/generations.jsonl").write_text("?\n"), "line 1 is not JSON"),
        (lambda run: (run / "report.html").mkdir(), "cannot be written"),
    ],
)
def test_bad_input_is_one_line(tmp_path, damage, expected):
    run = made(tmp_path / "run")
    damage(run)
    finished = report(tmp_path, run)
    assert finished.returncode == 66 and finished.stdout == ""
    said = [line for line in finished.stderr.splitlines() if not line.startswith("warning:")]
    assert len(said) == 1 and expected in said[0], finished.stderr
    assert not (run / "report.html").is_file() and not list(run.glob(".report*"))


def test_of_several_runs_those_that_have_not_begun_are_left_out_with_a_word(tmp_path):
    begun, empty = made(tmp_path / "begun"), tmp_path / "empty"
    empty.mkdir()
    finished = report(tmp_path, empty, begun, empty.with_name("begun"), "--output", tmp_path / "page.html")
    assert finished.returncode == 0 and (tmp_path / "page.html").is_file(), finished.stderr
    assert f"warning: left out: {empty}: has no metrics.jsonl" in finished.stderr
    finished = report(tmp_path, empty, "--output", tmp_path / "none.html")
    assert finished.returncode == 66 and not (tmp_path / "none.html").exists()


def test_numbers_that_no_axis_holds_are_left_out(tmp_path):
    run = made(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": 900 + n, "loss": 1.7e308 * (-1) ** n}) + "\n" for n in range(2))
    assert report(tmp_path, run).returncode == 0


@pytest.mark.parametrize("output", [".", "/"])
def test_a_directory_without_a_name_is_no_page(tmp_path, output):
    finished = report(tmp_path, made(tmp_path / "run"), "--output", output)
    assert (finished.returncode, finished.stdout) == (66, "")
    assert finished.stderr == f"checkpoint: {output}: cannot be written: Is a directory; choose another --output\n"


def test_lines_lie_where_their_values_are():
    svg = chart([Line(0, "a", [(0, 0.0), (10, 5.0), (20, 10.0)])], from_zero=True)
    left, middle, right = (tuple(map(float, at.split(","))) for at in re.search('points="(.*?)"', svg)[1].split())
    assert left[0] == LEFT and right == (WIDTH - 12, TOP) and left[1] == HEIGHT - 30
    assert middle == ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2)
    log = Scale(0.01, 1.0, 0, 100, log=True)
    assert [log(value) for value in (0.01, 0.1, 1.0)] == [0, 50, 100] and log.ticks() == [0.01, 0.1, 1.0]
    assert Scale(0, 9, 0, 1).ticks() == [0, 2, 4, 6, 8] and len(Scale(5, 5, 0, 1).ticks()) >= 2


def test_long_runs_and_values_that_are_none(tmp_path):
    assert averaged([(step, 2.0 * step) for step in range(1, 1001)])[0] == (2.5, 5.0)
    assert len(averaged([(step, 0.0) for step in range(1001)])) <= 300
    run = made(tmp_path / "run", losses=(1.0, float("nan"), float("inf"), 0.5))
    assert read_run(run, 0).points("loss") == [(1, 1.0), (4, 0.5)]
    assert "not measured in these runs" in chart([Line(0, "a", [])], from_zero=False)
