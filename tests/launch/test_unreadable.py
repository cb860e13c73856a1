"""Paths that may not be looked at, or that no file can have: one line with the reason, wherever one is named."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from abba import base_config, base_model
from abba.adapter.directory import read_description, refuse_occupied
from abba.errors import CheckpointError, DataError, RecipeError
from abba.storage import is_file, is_there
from abba.text.rows import RowSource, hub_dataset
from abba.training.recipe import load_recipe
from abba.training.resume import refuse_no_start
from abba.training.run_directory import RunDirectory
from tests.warm import ROOT

LONG = "x" * 300  # letters; a name may have 255


@pytest.fixture
def locked():
    """A directory of somebody else's with mode 700, in a readable one; root may read all, so root becomes nobody."""
    parent = Path(tempfile.mkdtemp())  # not tmp_path, which is closed to others
    parent.chmod(0o755)
    directory = parent / "locked"
    (directory / "checkpoints/step-000001").mkdir(parents=True)
    for name in ("config.json", "abba_config.json", "rows.jsonl"):
        (directory / name).write_text("{}")
    is_root = os.geteuid() == 0
    directory.chmod(0o700 if is_root else 0)
    if is_root:
        os.seteuid(65534)
    try:
        yield directory
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(0o700)
        shutil.rmtree(parent)


LOOKERS = {
    "model": lambda path: base_model.find_base(str(path), None),
    "below": lambda path: base_model.find_base(str(path / "llama"), None),
    "tokenizer": base_model.load_tokenizer,
    "config": base_config.check_config,
    "tokenizer_config": base_config.check_tokenizer_config,
    "adapter": read_description,
    "destination": lambda path: refuse_occupied(path, overwrite=True),
    "below_destination": lambda path: refuse_occupied(path / "adapter", overwrite=True),
    "resume": lambda path: refuse_no_start("base", None, str(path), RunDirectory(path.parent / "run")),
    "resume_checkpoint": lambda path: refuse_no_start(
        "base", None, str(path / "checkpoints/step-000001"), RunDirectory(path.parent / "run")
    ),
    "output_dir": lambda path: refuse_no_start("base", None, "auto", RunDirectory(path)),
}


@pytest.mark.parametrize("look", LOOKERS.values(), ids=LOOKERS)
def test_what_may_not_be_looked_at_is_told_with_the_reason(locked, look):
    with pytest.raises(CheckpointError) as error:
        look(locked)
    assert str(locked) in str(error.value) and "Permission denied; " in str(error.value), error.value
    assert "\n" not in str(error.value)


def test_whether_a_path_is_there_is_not_answered_with_no_for_want_of_permission(locked):
    for ask in (is_there, is_file):
        with pytest.raises(DataError, match="rows.jsonl: cannot be looked at: Permission denied; change"):
            ask(locked / "rows.jsonl", DataError)
    assert is_there(locked) and not is_file(locked)


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    spec = importlib.util.spec_from_file_location("launched_plan", ROOT / "launch/plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_that_a_plan_may_not_count(plan, locked):
    source = SimpleNamespace(path=str(locked / "rows.jsonl"), name=None, split="train", max_rows=None)
    with pytest.raises(DataError, match="rows.jsonl: cannot be looked at: Permission denied"):
        plan.rows_of(SimpleNamespace(data=SimpleNamespace(all_sources=[source])))


@pytest.mark.parametrize("name", [LONG, "a\0b", "loop", "file/below", "nowhere"])
def test_what_no_file_can_be_called_is_not_there(tmp_path, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    assert not is_there(tmp_path / name) and not is_file(tmp_path / name)
    assert is_there(tmp_path / "file") and is_file(tmp_path / "file")
    refuse_occupied(tmp_path / name, overwrite=False)
    with pytest.raises(CheckpointError, match="is no directory"):
        base_model.find_base(str(tmp_path / name), None)
    with pytest.raises(CheckpointError, match="is not an ABBA adapter"):
        read_description(tmp_path / name)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        base_model.load_tokenizer(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"^checkpoint: checkpoint.resume: ") as error:
        refuse_no_start("base", None, str(tmp_path / name), RunDirectory(tmp_path / "run"))
    assert "\n" not in str(error.value)


def test_each_is_a_mistake_of_what_names_it(locked):
    source = RowSource(str(locked / "rows.jsonl"), None, None, "train", "question", None, "answer", None)
    with pytest.raises(DataError, match="rows.jsonl: cannot be looked at: Permission denied"):
        hub_dataset(source)
    with pytest.raises(RecipeError, match="mine.yaml: cannot be looked at: Permission denied"):
        load_recipe(str(locked / "mine.yaml"), [], ROOT / "recipes")
