"""The borders between rooms, and what must not be written anywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import ROOT

SOURCES = sorted([*(ROOT / "abba").rglob("*.py"), *(ROOT / "launch").glob("*.py")])
# What runs code, or opens what can: forbidden under any name that an import can give it, called or only mentioned.
FORBIDDEN = {"eval", "exec", "compile", "__import__", "globals", "vars", "breakpoint"}
for _module, _names in {
    "os": "system popen posix_spawn posix_spawnp",
    "importlib": "import_module __import__ reload",
    "subprocess": "getoutput getstatusoutput",
    "torch": "load save serialization hub package jit.load export.load",
    "numpy": "load",
    "yaml": "load load_all unsafe_load unsafe_load_all full_load full_load_all dump",
    "yaml.": "Loader UnsafeLoader FullLoader CLoader CUnsafeLoader CFullLoader Dumper",
    "torch.distributed": "broadcast_object_list all_gather_object gather_object scatter_object_list",
    "torch.distributed.": "send_object_list recv_object_list",
}.items():
    FORBIDDEN |= {f"{_module.rstrip('.')}.{name}" for name in _names.split()}
FORBIDDEN_MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "pty"}
FORBIDDEN_PREFIXES = ("os.exec", "os.spawn")
FORBIDDEN_METHODS = {"load_checkpoint", "save_checkpoint", "read_pickle", "apply_chat_template", "import_module"}
FORBIDDEN_ARGUMENTS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}
# The reader of DeepSpeed's own checkpoints, which exist as pickles only: torch.load with weights_only=True, no other.
MAY_LOAD_WEIGHTS = {"abba/checkpoint/deepspeed_archive.py"}
# Runs a tokenizer's own template, in transformers' sandbox, where the recipe asks for it.
MAY_RENDER_CHATS = {"abba/text/chat.py"}
PROGRAMS = [*SOURCES, *sorted((ROOT / "recipes").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]


def modules_imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def users_of(library: str) -> set[str]:
    def uses(path: Path) -> bool:
        return any(name == library or name.startswith(f"{library}.") for name in modules_imported(path))

    return {str(path.relative_to(ROOT).parent) for path in SOURCES if uses(path)}


def test_imports_run_one_way():
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "1 kept, 0 broken" in result.stdout


def test_libraries_stay_in_their_rooms():
    assert users_of("deepspeed") == {"abba/sharded"}
    assert users_of("pickle") == set()
    assert users_of("transformers") <= {"abba", "abba/training", "abba/evaluation"}
    assert users_of("datasets") == {"abba/text"}
    assert users_of("peft") == {"abba/adapter"}
    assert users_of("torch.distributed") <= {"abba/sharded", "abba/training", "launch"}


def test_the_environment_is_read_in_the_launchers_room_only():
    readers = {p.relative_to(ROOT).as_posix() for p in SOURCES if re.search(r"os\.environ|os\.getenv", p.read_text())}
    assert readers <= {"abba/sharded/ranks.py", "abba/sharded/process_group.py", "launch/train.py"}


class Dangers(ast.NodeVisitor):
    """Whatever in a program could run code that comes from data, with its line."""

    def __init__(self, text: str, may_load_weights: bool = False) -> None:
        self.found: list[str] = []
        self._may_load_weights = may_load_weights
        self._known: dict[str, str] = {}  # a name in this file -> what it was imported as
        tree = ast.parse(text)
        for node in ast.walk(tree):  # before the visit: a name may be used above its import
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.split(".")[0]
                    self._known[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module:
                self._known.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._check_import(alias.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if alias.name == "*":
                self._add(node, f"{node.module}.*")
            self._check_import(f"{node.module}.{alias.name}", node)

    def visit_Name(self, node: ast.Name) -> None:
        self._check(self._full_name(node), node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if node.attr in FORBIDDEN_METHODS:
            self._add(node, f".{node.attr}")
        name = self._full_name(node)
        if name is None:
            self.generic_visit(node)
        else:
            self._check(name, node)

    def visit_Call(self, node: ast.Call) -> None:
        name = self._full_name(node.func) or ""
        given = {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
        for argument, value in given.items():
            if argument in FORBIDDEN_ARGUMENTS and value == str(FORBIDDEN_ARGUMENTS[argument]):
                self._add(node, f"{argument}={value}")
        if name.removeprefix("builtins.") == "getattr":
            owner = (self._full_name(node.args[0]) or "").split(".")[0]
            if owner in {full.split(".")[0] for full in self._known.values()} or owner == "__builtins__":
                self._add(node, f"getattr on the module {owner}")
        owner, _, method = name.rpartition(".")
        if owner.rpartition(".")[2].startswith("Auto") and method in ("from_pretrained", "from_config"):
            # Without the word, transformers asks on the terminal.
            if given.get("trust_remote_code") != "False":
                self._add(node, f"{name} without trust_remote_code=False")
            if name.endswith("ForCausalLM.from_pretrained") and given.get("use_safetensors") != "True":
                self._add(node, f"{name} without use_safetensors=True")
        if self._may_load_weights and (
            (name == "torch.load" and given.get("weights_only") == "True") or name == "torch.serialization.safe_globals"
        ):
            for child in (*node.args, *node.keywords):
                self.visit(child)
        else:
            self.generic_visit(node)

    def _full_name(self, node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return self._known.get(node.id, node.id)
        if isinstance(node, ast.Attribute) and (inner := self._full_name(node.value)):
            return f"{inner}.{node.attr}"
        return None

    def _check(self, name: str, node: ast.AST) -> None:
        parts = name.removeprefix("builtins.").split(".")
        heads = {".".join(parts[: end + 1]) for end in range(len(parts))}
        if heads & FORBIDDEN or name.startswith(FORBIDDEN_PREFIXES):
            self._add(node, name)

    def _check_import(self, name: str, node: ast.AST) -> None:
        self._check(name, node)
        if name.split(".")[0] in FORBIDDEN_MODULES:
            self._add(node, name)

    def _add(self, node: ast.AST, what: str) -> None:
        self.found.append(f"line {node.lineno}: {what}")


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_code_from_data(path):
    name = path.relative_to(ROOT).as_posix()
    found = Dangers(path.read_text(), name in MAY_LOAD_WEIGHTS).found
    assert [what for what in found if name not in MAY_RENDER_CHATS or "apply_chat_template" not in what] == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch; torch.load(x, weights_only=True)",
        "import torch as t; t.load(x)",
        "from torch import load",
        "from torch import load as read; read(x)",
        "import torch; read = torch.load",
        "import torch; getattr(torch, 'load')(x)",
        "import torch; torch.hub.load(x)",
        "import torch.serialization as s; s.load(x)",
        "from torch import serialization",
        "from torch import *",
        "import pickle",
        "import pickle as p",
        "from pickle import loads as read",
        "import importlib; importlib.import_module('pickle')",
        "__import__('pickle')",
        "import builtins; builtins.eval(x)",
        "from builtins import exec as run",
        "getattr(__builtins__, 'eval')",
        "eval(x)",
        "exec(x)",
        "run = eval",
        "import yaml; yaml.load(x, Loader=yaml.SafeLoader)",
        "from yaml import load",
        "from yaml import UnsafeLoader as Safe",
        "import yaml; L = yaml.FullLoader",
        "import os; os.system(x)",
        "import os as o; o.popen(x)",
        "from os import system as run",
        "import os; os.execvp(x, y)",
        "import subprocess; subprocess.run(x, shell=True)",
        "import numpy as np; np.load(x)",
        "from numpy import load",
        "read(x, allow_pickle=True)",
        "engine.load_checkpoint(x)",
        "self.engine.save_checkpoint(x)",
        "tokenizer.apply_chat_template(x)",
        "from transformers import AutoModelForCausalLM as A; A.from_pretrained(x, trust_remote_code=True)",
        "from transformers import AutoConfig; AutoConfig.from_pretrained(x)",
        "import transformers as t; t.AutoTokenizer.from_pretrained(x)",
        "from transformers import AutoModelForCausalLM as A; A.from_pretrained(x, trust_remote_code=False)",
        "import torch.distributed as dist; dist.broadcast_object_list(x)",
        "from torch import distributed as d; d.all_gather_object(x, y)",
    ],
)
def test_each_danger_is_seen(text):
    assert Dangers(text).found


def test_the_one_exemption_is_for_weights_alone():
    assert Dangers("import torch; torch.load(x, weights_only=True)", may_load_weights=True).found == []
    for text in ("torch.load(x)", "torch.load(x, weights_only=False)", "read = torch.load", "import pickle"):
        assert Dangers(f"import torch; {text}", may_load_weights=True).found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 90, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
