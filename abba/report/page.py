"""The page: curves of all runs on common axes, then a table, scores, generations and recipes of each."""

from collections.abc import Sequence
from statistics import median

from abba.report.chart import Line, chart, line_class, short
from abba.report.html import Html, join, tag
from abba.report.run import Record, Run, Score
from abba.report.style import STYLE

# title, keys of metrics.jsonl, what a value is divided by, whether the axis starts at 0
CHARTS = (
    ("Loss: training, and held out (dots)", ("loss", "eval_loss"), 1, False),
    ("Learning rate", ("learning_rate",), 1, True),
    ("Gradient norm", ("grad_norm",), 1, False),
    ("Tokens/s", ("tokens_per_second",), 1, True),
    ("Peak memory of rank 0, GB", ("peak_memory_bytes",), 1e9, True),
)
# Of a generation: ours, and those of lm-evaluation-harness.
COLUMNS = ("row", "instruction", "reference", "generated", "correct", "doc_id", "target", "filtered_resps")
# Nothing is fetched and nothing runs, whatever the page should turn out to contain.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(runs: Sequence[Run]) -> str:
    """One self-contained HTML document."""
    title = "Runs: " + ", ".join(run.name for run in runs)
    head = tag(
        "head",
        Html('<meta charset="utf-8">'),
        Html(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
        Html('<meta name="viewport" content="width=device-width">'),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    charts = [_figure(runs, *row) for row in CHARTS]
    warnings = [tag("p", warning, class_="warning") for run in runs for warning in run.warnings]
    sections = [_summary(runs), *map(_scores, runs), *map(_samples, runs), *_recipes(runs)]
    body = tag("body", tag("h1", title), *warnings, _legend(runs), tag("div", *charts, class_="charts"), *sections)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _legend(runs: Sequence[Run]) -> Html:
    def swatch(run: int) -> Html:
        return tag("svg", tag("line", x1=0, x2=28, y1=6, y2=6, class_=line_class(run)), viewBox="0 0 28 12", width=28)

    return tag("p", *(tag("span", swatch(at), " ", run.name) for at, run in enumerate(runs)), class_="legend")


def _figure(runs: Sequence[Run], title: str, keys: tuple[str, ...], divisor: float, from_zero: bool) -> Html:
    lines = [
        Line(at, f"{run.name} {key}", [(step, value / divisor) for step, value in run.points(key)], key == "eval_loss")
        for at, run in enumerate(runs)
        for key in keys
    ]
    return tag("figure", tag("figcaption", title), chart(lines, from_zero))


def _summary(runs: Sequence[Run]) -> Html:
    rows = []
    for run in runs:
        evals = [value for _, value in run.points("eval_loss")]
        speeds = [value for _, value in run.points("tokens_per_second")]
        memory = [value / 1e9 for _, value in run.points("peak_memory_bytes")]
        seconds = [value for _, value in run.points("step_seconds")]
        cells = [run.last("loss"), *(f(evals) if evals else None for f in (lambda e: e[-1], min))]
        cells += [median(speeds) if speeds else None, max(memory, default=None), sum(seconds) if seconds else None]
        steps = max(record["step"] for record in run.records)
        rows.append([run.name, f"{steps:,}", *("" if cell is None else short(cell) for cell in cells)])
    names = ["run", "steps", "last loss", "last held-out loss", "best", "median tokens/s", "peak GB", "seconds"]
    return _section("Runs", _table(names, rows))


def _scores(run: Run) -> Html:
    tables = [
        tag(
            "div",
            tag("h3", score.name),
            _table(["", ""], [[key, _shown(value)] for key, value in score.values.items()]),
        )
        for score in run.scores
    ]
    return _section(f"Scores: {run.name}", *(tables or [tag("p", "none found below this run", class_="none")]))


def _samples(run: Run) -> Html:
    parts = [part for score in run.scores for part in _generations(score)]
    return _section(f"Generations: {run.name}", *parts) if parts else Html()


def _generations(score: Score) -> list[Html]:
    """A heading and a table; nothing of lines that have none of the columns."""
    names = [name for name in COLUMNS if any(name in sample for sample in score.samples)]
    rows = [[_shown(sample.get(name, "")) for name in names] for sample in score.samples]
    return [tag("h3", score.name), _table(names, rows)] if names else []


def _recipes(runs: Sequence[Run]) -> list[Html]:
    """Each recipe as it is; lines that are not in every other one are marked."""
    common = set.intersection(*(set(run.recipe.splitlines()) for run in runs))
    sections = []
    for run in runs:
        lines = [line if line in common else tag("mark", line) for line in run.recipe.splitlines()]
        text = tag("pre", join(part for line in lines for part in (line, "\n")))
        sections.append(tag("details", tag("summary", f"Recipe: {run.name}"), text))
    return sections


def _section(title: str, *content: Html) -> Html:
    return tag("section", tag("h2", title), *content)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    head = tag("tr", *(tag("th", name) for name in names)) if any(names) else Html()
    body = [tag("tr", *(tag("td", cell) for cell in row)) for row in rows]
    return tag("div", tag("table", head, *body), class_="wide")


def _shown(value: Record | str | float | None) -> str:
    return short(value) if type(value) is float else str(value)
