"""How the programs beside train.py end: an error and a key press are one line and an exit code each."""

import importlib.util
import sys

import pytest

from abba.errors import RecipeError
from tests.warm import ROOT

PROGRAMS = {
    "plan": ("run", ["--recipe", "gsm8k"]),
    "prepare": ("prepare_run", ["--recipe", "gsm8k"]),
    "convert": ("convert", ["source", "destination"]),
    "evaluate": ("score", ["--task", "gsm8k", "--output", "out"]),
    "generate": ("answer", []),
    "report": ("write_report", ["run"]),
}
ENDS = [
    (RecipeError("as it was told"), 64, "recipe: as it was told"),
    (PermissionError(13, "Permission denied", "/x"), 66, "checkpoint: /x: Permission denied; change"),
    (KeyboardInterrupt(), 130, "interrupted"),
]


@pytest.mark.parametrize("error, code, expected", ENDS, ids=[type(end[0]).__name__ for end in ENDS])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_ends_in_one_line(monkeypatch, capsys, program, error, code, expected):
    work, arguments = PROGRAMS[program]
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    spec = importlib.util.spec_from_file_location(f"launched_{program}", ROOT / f"launch/{program}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def failing(*_, **__):
        raise error

    monkeypatch.setattr(module, work, failing)
    monkeypatch.setattr(module, "end_with_reader", lambda: None, raising=False)  # the signals are pytest's
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    try:
        assert module.main() == code
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("a key press came through")
    said = capsys.readouterr().err
    assert said.startswith(expected) and said.count("\n") == 1


def test_another_mistake_keeps_its_traceback(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    from common import run_program

    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
    assert run_program(lambda: None) == 0 and run_program(lambda: 3) == 3
