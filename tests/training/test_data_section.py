"""The recipe's data section: sources and what they take over, kinds of rows, and each mistake by its place."""

import pytest

from abba.errors import RecipeError
from abba.training.prepare import row_sources
from abba.training.recipe import Recipe, load_recipe
from abba.training.yaml_file import dump_yaml
from tests.training.test_recipe import GOOD, SHIPPED, message

MIXED = GOOD.replace(
    "  path: rows.jsonl\n",
    """  split: test
  instruction_field: query
  sources:
    - path: a.jsonl
    - {path: some/set, name: main, split: train, response_field: response, weight: 0.5, max_rows: 9}
    - {path: talks.jsonl, messages_field: messages, weight: 2}
""",
)


def load(tmp_path, text, *overrides):
    (tmp_path / "mine.yaml").write_text(text)
    return load_recipe("mine", list(overrides), tmp_path)


def test_a_source_has_the_values_of_the_data_section_where_it_has_none(tmp_path):
    data = load(tmp_path, MIXED).data
    first, second, third = data.sources
    assert (first.split, first.instruction_field, first.response_field, first.weight) == ("test", "query", "answer", 1)
    assert (second.split, second.name, second.instruction_field) == ("train", "main", "query")
    assert (second.response_field, second.weight, second.max_rows, first.max_rows) == ("response", 0.5, 9, None)
    assert (third.messages_field, third.instruction_field, third.response_field) == ("messages", None, None)
    assert data.weights == [1.0, 0.5, 2.0] and data.prompt == "chat", "conversations are a chat, and so is the score"
    assert list(row_sources(data)) == ["data.sources.0", "data.sources.1", "data.sources.2"]
    assert [source.path for source in row_sources(data).values()] == ["a.jsonl", "some/set", "talks.jsonl"]


def test_the_resolved_recipe_loads_to_itself(tmp_path):
    for text in (GOOD, MIXED, GOOD.replace("path: rows.jsonl", "path: talks.jsonl\n  messages_field: messages")):
        recipe = load(tmp_path, text)
        assert load(tmp_path, dump_yaml(recipe.model_dump(mode="json"))) == recipe
    assert isinstance(recipe, Recipe) and recipe.data.prompt == "chat" and recipe.data.response_field is None


def test_the_largest_recipe_and_texts_that_look_like_numbers_load_from_what_is_written(tmp_path):
    many = [f"{{path: data/of/somebody/part-{number:03}.jsonl}}" for number in range(100)]
    wanted = ["data.path=", f"data.sources=[{', '.join(many)}]", "model.revision='1e10'", "data.split='no'"]
    recipe = load(tmp_path, GOOD, *wanted)
    assert (recipe.model.revision, recipe.data.sources[99].split) == ("1e10", "no")
    assert load(tmp_path, dump_yaml(recipe.model_dump(mode="json"))) == recipe


def test_a_source_of_questions_takes_over_no_field_of_conversations(tmp_path):
    sources = "data.sources=[{path: a.jsonl}, {path: b.jsonl, instruction_field: q}, {path: c.jsonl, input_field: i}]"
    talks, asks, more = load(tmp_path, GOOD, "data.path=", "data.messages_field=messages", sources).data.sources
    assert (talks.messages_field, talks.instruction_field) == ("messages", None)
    assert (asks.messages_field, asks.instruction_field, asks.response_field) == (None, "q", "answer")
    assert (more.messages_field, more.instruction_field, more.input_field) == (None, "question", "i")


def test_sources_as_an_override(tmp_path):
    wanted = ["data.path=", "data.sources=[{path: a.jsonl}, {path: b.jsonl, weight: 0.5}]"]
    data = load(tmp_path, GOOD, *wanted).data
    assert data.weights == [1.0, 0.5] and data.prompt == "alpaca"
    assert load_recipe("quickstart", wanted, SHIPPED).data.path is None
    assert load(tmp_path, GOOD, *wanted, "data.sources.1.weight=3", "data.sources.0.name=x").data.weights == [1.0, 3.0]


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (["data.sources=[{path: a.jsonl}]"], "data: path=rows.jsonl is one source and sources are others; leave one"),
        (["data.path="], "data: path: is required, or sources: a list of such"),
        (["data.path=", "data.sources=[]"], "data.sources: []"),
        (["data.path=", "data.sources=3"], "data.sources: 3"),
        (["data.path=", "data.sources=[a.jsonl]"], "data.sources.0: 'a.jsonl' is a value, not a section"),
        (["data.path=", "data.sources=[{weight: 1}]"], "data.sources.0.path: is required"),
        (["data.path=", "data.sources=[{path: a}, {path: b, weight: half}]"], "data.sources.1.weight: 'half' is text"),
        (["data.path=", "data.sources=[{path: a}, {path: b, weight: 0}]"], "data.sources.1.weight: 0"),
        (["data.path=", "data.sources=[{path: a, weight: .inf}]"], "data.sources.0.weight"),
        (["data.path=", "data.sources=[{path: a, wieght: 2}]"], "data.sources.0.wieght: unknown key; did you mean wei"),
        (["data.path=", "data.sources=[{path: a, packing: true}]"], "data.sources.0.packing: unknown key"),
        (["data.weight=2"], "data.weight: unknown key"),
        (
            ["data.sources=[{path: a}]", "data.sources.1.weight=2"],
            "1 is none of the 1 items, which are numbered from 0",
        ),
        (
            ["data.sources=[{path: a}]", "data.sources.weight=2"],
            "sources is a list; name a key of one of its items, su",
        ),
        (["data.sources=[a]", "data.sources.0.weight=2"], "0 is a value, not a section"),
        (
            ["data.messages_field=m", "data.response_field=r"],
            "data: messages_field=m holds whole conversations, so",
        ),
        (["data.messages_field=m", "data.input_field=i"], "so input_field=i means nothing"),
        (
            ["data.messages_field=m", "data.prompt=plain"],
            "data: prompt=plain is not what conversations are writ",
        ),
        (
            ["data.path=", "data.sources=[{path: a, messages_field: m, instruction_field: q}]"],
            "data.sources.0: messages_field=m holds whole conversations, so instruction_field=q means nothing",
        ),
    ],
)
def test_each_mistake_is_named_by_its_place(tmp_path, overrides, expected):
    text = message(tmp_path, GOOD, *overrides)
    assert expected in text and "mistakes" not in text and "\n" not in text


def test_a_mistake_that_sources_take_over_is_named_once(tmp_path):
    overrides = ["data.path=", "data.split=3", "data.sources=[{path: a}, {path: b, max_rows: 0}]"]
    text = message(tmp_path, GOOD, *overrides)
    assert "2 mistakes" in text and "  data.split: 3" in text and "  data.sources.1.max_rows: 0" in text


def test_a_mistake_of_a_source_is_said_beside_another_of_the_section():
    own = "data.sources=[{path: a.jsonl, split: 7}, {path: b.jsonl}]"
    with pytest.raises(RecipeError) as caught:
        load_recipe("quickstart", ["data.path=", "data.split=5", own], SHIPPED)
    said = str(caught.value)
    assert "data.split: 5" in said and "data.sources.0.split: 7" in said and "data.sources.1" not in said
