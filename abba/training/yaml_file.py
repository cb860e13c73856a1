"""YAML as people write it: `1e-4` is a number, `no` is text, a key stands once, nothing is executed or expanded."""

import difflib
import io
import os
import re
from pathlib import Path
from typing import Any

import yaml

from abba.errors import RecipeError, first_line
from abba.names import safe_name

MAX_BYTES, MAX_DEPTH, MAX_EXTENDS = 50_000, 20, 8  # 50 kB take up to a second to parse; 100 sources resolve to 22 kB


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars, no aliases, no duplicate keys, no tags.

    PyYAML follows YAML 1.1, where 1e-4 is text, no is false, 010 is 8 and 1:30:00 is 5400.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            raise _MistakeError(event.start_mark, f"*{event.anchor}: aliases are not supported; write the value out")
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _MistakeError(event.start_mark, f"{event.tag}: tags are not supported; write a plain value")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > MAX_DEPTH:
            raise _MistakeError(event.start_mark, f"is nested deeper than {MAX_DEPTH} levels")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _MistakeError(key_node.start_mark, "a key must be a plain word")
            if key_node.value in seen:
                raise _MistakeError(key_node.start_mark, f"{key_node.value}: stands twice; keep one")
            if key_node.value == "<<":
                raise _MistakeError(key_node.start_mark, "<<: merge keys are not supported; use extends:")
            seen.add(key_node.value)
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


class _MistakeError(Exception):
    def __init__(self, mark: yaml.Mark, message: str) -> None:
        super().__init__(f"line {mark.line + 1}: {message}")


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"true|True|false|False", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.(inf|Inf)|\.(nan|NaN)",
        "-+.0123456789",
    ),
    ("null", r"~|null|Null|", "~nN\0"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), [*_first, ""])
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_mapping)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would not read as text: no, and 1e10."""


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def dump_yaml(recipe: dict[str, Any]) -> str:
    """What `parse_yaml` reads again."""
    text = io.StringIO()
    dumper = _Dumper(text, sort_keys=False, allow_unicode=True)  # yaml.safe_dump takes no dumper of one's own
    dumper.open()
    dumper.represent(recipe)
    dumper.close()
    return text.getvalue()


def parse_yaml(text: str, source: str) -> Any:
    """Raises RecipeError naming `source` and the line."""
    try:
        return _Loader(text).get_single_data()
    except _MistakeError as error:
        raise RecipeError(f"{source}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RecipeError(f"{source}: line {line}: is not YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{source}: is not YAML: {first_line(error)}") from None


def read_recipe_file(path: Path, overrides: list[str], directory: Path) -> dict[str, Any]:
    """The recipe at `path` over those it extends, beside it or in `directory`, under `section.key=value` overrides.

    A value that starts with ~/ is a path below the home directory, as in a shell, which leaves it in section.key=~/x.
    """
    raw = _read_extended(path, directory, [])
    mistakes = []
    for override in overrides:
        try:
            _apply(raw, override)
        except RecipeError as error:
            mistakes.append(error.reason)
    if mistakes:
        raise RecipeError("; ".join(mistakes))
    return _with_home(raw)


def _with_home(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", key):
        raise RecipeError(f"{override!r}: is no override; write section.key=value, such as train.max_steps=60")
    section = raw
    *parents, last = key.split(".")
    for parent in parents:
        section = _inner(section, parent, override)
        if not isinstance(section, dict | list):
            raise RecipeError(f"{override!r}: {parent} is a value, not a section")
    if isinstance(section, list):
        raise RecipeError(f"{override!r}: {parents[-1]} is a list; name a key of one of its items, such as 0.{last}")
    section[last] = parse_yaml(text, override) if text.strip() else None


def _inner(section: dict[str, Any] | list[Any], key: str, override: str) -> Any:
    """What lies under `key`: of a section, which is made where there is none, or of a list by its number from 0."""
    if isinstance(section, list):
        places = [str(place) for place in range(len(section))]
        if key not in places:
            raise RecipeError(f"{override!r}: {key} is none of the {len(places)} items, which are numbered from 0")
        return section[places.index(key)]
    if section.get(key) is None:
        section[key] = {}
    return section[key]


def suggestion(word: str, known: list[str]) -> str:
    """A hint to the nearest of `known`, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _read_extended(path: Path, directory: Path, chain: list[Path]) -> dict[str, Any]:
    if path.resolve() in chain:
        raise RecipeError(f"{path}: extends itself, over {len(chain)} files")
    if len(chain) >= MAX_EXTENDS:
        said = f"with what it extends it is more than {MAX_EXTENDS} files; put some of them into one"
        raise RecipeError(f"{chain[0]}: {said}")
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise RecipeError(f"{path}: is longer than {MAX_BYTES} bytes, which no recipe needs")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 text: byte {error.start}") from None
    raw = parse_yaml(text, str(path))
    if not isinstance(raw, dict):
        raise RecipeError(f"{path}: holds no sections; a recipe starts with model:, data: and train:")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise RecipeError(f"{path}: extends: {parent!r} is not the name of a recipe")
    name = safe_name(parent, f"{path}: extends", RecipeError)
    places = [place / file for place in (path.parent, directory) for file in (name, f"{name}.yaml")]
    base = next((place for place in places if place.is_file()), None)  # a pipe would be waited for
    if base is None:
        near = suggestion(Path(name).stem, [found.stem for found in directory.glob("*.yaml")])
        raise RecipeError(f"{path}: extends: no recipe {parent!r} beside it or in {directory}{near}")
    return _merged(_read_extended(base, directory, [*chain, path.resolve()]), raw)


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        inner = merged.get(key)
        merged[key] = _merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
