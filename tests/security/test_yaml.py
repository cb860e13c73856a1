"""A recipe is text from somebody: it runs nothing, expands to nothing, and is refused with its line."""

import tracemalloc

import pytest

from abba.errors import RecipeError
from abba.training.recipe import load_recipe
from abba.training.yaml_file import parse_yaml
from tests import warm
from tests.quick import assert_quick
from tests.training.test_recipe import GOOD

TAGS = [
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_output [[touch, '{canary}']]",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/new:type {{args: [z, [], {{extend: !!python/name:exec }}], listitems: \"open('{canary}', 'w')\"}}",
    "!!python/object:pathlib.Path {{}}",
    "!!python/name:os.system",
    "!!python/name:os.system ''",
    "!!python/module:antigravity",
    "!!python/tuple [1, 2]",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "!!binary aGk=",
    "!!set {{a, b}}",
    "!!int '3'",
    "!!str 3",
    "! 3",
    "!custom 3",
]
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{name}: &{name} {{<<: [{', '.join([f'*{before}'] * 9)}], {name}: 1}}\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the payload ran"


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize(
    "place",
    [
        "{}",
        "train: {}",
        "train: {{seed: {}}}",
        "a:\n- - {}",
        "? {}\n: 1",
        "{}: 1",
        "[{}]",
        "%TAG ! tag:yaml.org,2002:\n---\na: {}",
    ],
)
def test_tags_are_refused_wherever_they_stand(canary, tag, place):
    text = place.format(tag.format(canary=canary))
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "mine.yaml")
    assert str(caught.value).isprintable() and "mine.yaml: line" in str(caught.value)


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_an_override_and_in_what_a_recipe_extends(tmp_path, canary, tag):
    (tmp_path / "mine.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match="tags are not supported"):
        load_recipe("mine", [f"train.seed={tag.format(canary=canary)}"], tmp_path)
    (tmp_path / "base.yaml").write_text(f"{GOOD}  seed: {tag.format(canary=canary)}\n")
    (tmp_path / "mine.yaml").write_text("extends: base\n")
    with pytest.raises(RecipeError, match="base.yaml: line 10: .*tags are not supported"):
        load_recipe("mine", [], tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MERGES,
        "a: &a [*a]",
        "a: &a {b: *a}",
        "a: *b",
        "<<: {a: 1}",
        "<<: [{a: 1}, {b: 2}]",
        "x: &x {a: 1}\ny:\n  <<: *x",
        "'<<': {a: 1}",
        "[" * 19_000,
        "{" * 19_000,
        "- " * 10_000,
        "? " * 10_000,
        "a:\n" + "".join(f"{' ' * depth}- \n" for depth in range(2, 200)),
        "[" * 9_900 + "]" * 9_900,
        "a: " + "9" * 19_000,
        "a: 1" + "_1" * 9_000,
        "--- 1\n--- 2\n",
        "a: 1\na: 2",
        "'a': 1\n\"a\": 2",
        "a: \x00",
        "a: \x07",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_bombs_are_refused_before_they_unfold(text):
    def attempt() -> str:
        with pytest.raises(RecipeError) as caught:
            parse_yaml(text, "mine.yaml")
        return str(caught.value)

    assert_quick(attempt)
    tracemalloc.start()  # tracing takes several times as long
    message = attempt()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6
    assert len(message) < 3000 and "\n" not in message


@pytest.mark.parametrize(
    "unit", ["k{0}: 1\n", "x,", "- x\n", "x ", "'x',", "{{}},", "[],", "|\n x\n", "#\n", "a{0}: {{b: [c]}}\n"]
)
def test_the_largest_recipe_is_read_within_a_second(tmp_path, unit):
    items, size = [], 0
    while size < 19_000:
        items.append(unit.format(len(items)))
        size += len(items[-1])
    text = "".join(items)
    text = f"a: [{text}]" if unit.endswith(",") else f"a:\n{text}" if unit.startswith("-") else text
    (tmp_path / "mine.yaml").write_text(text)

    def attempt() -> None:
        with pytest.raises(RecipeError):
            load_recipe("mine", [], tmp_path)

    assert_quick(attempt)


def test_through_the_program(tmp_path, canary):
    payload = f"!!python/object/apply:os.system ['touch {canary}']"
    (tmp_path / "tag.yaml").write_text(f"{GOOD}  seed: {payload}\n")
    (tmp_path / "bomb.yaml").write_text(BOMB)
    (tmp_path / "extends.yaml").write_text("extends: tag\n")
    for number, arguments in enumerate(
        [
            ["--recipe", str(tmp_path / "tag.yaml")],
            ["--recipe", str(tmp_path / "bomb.yaml")],
            ["--recipe", str(tmp_path / "extends.yaml")],
            ["--recipe", "quickstart", f"train.seed={payload}"],
            ["--recipe", "quickstart", f"deepspeed={payload}", "--dry-run"],
        ]
    ):
        finished = warm.run(tmp_path / f"program-{number}", "launch/train.py", *arguments)
        assert finished.returncode == 64 and len(finished.stderr.strip().splitlines()) == 1, finished.stderr
        assert "are not supported" in finished.stderr
