"""The borders between rooms, and what must not be written anywhere."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import ROOT

SOURCES = sorted([*(ROOT / "abba").rglob("*.py"), *(ROOT / "launch").glob("*.py")])
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
}
FORBIDDEN_CALLS |= {
    "dist.broadcast_object_list",
    "dist.all_gather_object",
    "np.load",
    "numpy.load",
    "subprocess.getoutput",
}
# The reader of DeepSpeed's own files has no other way; tests/checkpoint/test_deepspeed_payloads.py attacks it.
READER_OF_PICKLES = ROOT / "abba/checkpoint/deepspeed_archive.py"
FORBIDDEN_ARGUMENTS = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


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
    assert users_of("torch.distributed") <= {"abba/sharded", "abba/training", "launch"}


def test_the_environment_is_read_in_the_launchers_room_only():
    readers = {p.relative_to(ROOT).as_posix() for p in SOURCES if re.search(r"os\.environ|os\.getenv", p.read_text())}
    assert readers <= {"abba/sharded/ranks.py", "abba/sharded/process_group.py", "launch/train.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_code_from_data(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if path == READER_OF_PICKLES and called == "torch.load":
                given = {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
                assert given.get("weights_only") == "True", f"line {node.lineno}"
            else:
                assert called not in FORBIDDEN_CALLS, f"line {node.lineno}: {called}"
            for argument in node.keywords:
                value = argument.value.value if isinstance(argument.value, ast.Constant) else None
                assert FORBIDDEN_ARGUMENTS.get(argument.arg, ...) != value, f"line {node.lineno}: {argument.arg}"
            if called.startswith("Auto") and called.endswith(
                ("from_pretrained", "from_config")
            ):  # without the word, transformers asks on the terminal
                given = {argument.arg: ast.unparse(argument.value) for argument in node.keywords}
                assert given.get("trust_remote_code") == "False", f"line {node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_readable(path):
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 90, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
