"""Names that come out of files stay beside them; nothing is read or written elsewhere."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from abba import AdapterConfig, inject, load_adapter, save_adapter
from abba.base_files import BaseFiles
from abba.base_model import load_whole
from abba.checkpoint import format
from abba.checkpoint.manifest import write_manifest
from abba.errors import CheckpointError, RecipeError
from abba.names import inside, safe_name
from abba.storage import hash_file
from abba.training.recipe import load_recipe
from tests import warm
from tests.checkpoint.test_format import write_checkpoint
from tests.distributed.ranks import TINY
from tests.models import tiny_model
from tests.security.payloads import seal, tree
from tests.training.test_recipe import GOOD

HOSTILE = [
    "../x", "..", ".", "", "/etc/passwd", "a/../../b", "a/b", "..\\x", "a\\b", "x\0", "x\n", "\nx", "-rf", "~", "~root",
    "%2e%2e", "%2e%2e%2fx", "x" * 300, "x" * 65, "x.", "x..y", "CON", "con.txt", "nul", "COM1", "lpt9.safetensors",
    ".hidden", "x y", "x;y", "$HOME", "x*", "\u2024\u2024/x", "\uff0e\uff0e", "\u202egpj.x", "x\x1b[2J", "file:x",
    "C:x", "x\ud800", 3, None, True, ["x"], {"x": 1},
]  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:30])
def test_hostile_names_are_refused_in_one_printable_line(name):
    for error in (CheckpointError, RecipeError):
        with pytest.raises(error) as caught:
            safe_name(name, "index.json", error)
        text = str(caught.value)
        assert text.isprintable() and len(text) < 300 and "index.json" in text


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "model-00001-of-00191.safetensors", "shard-00003-of-00016.safetensors", "a", "x" * 64,
     "model.safetensors-00001-of-00002.safetensors", "quickstart", "llama70b_gsm8k.yaml", "console", "0"],
)  # fmt: skip
def test_real_names_pass(name):
    assert safe_name(name, "index.json") == name


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root/sub").mkdir(parents=True)
    (tmp_path / "root/file").touch()
    (tmp_path / "outside").touch()
    (tmp_path / "root2").touch()
    return tmp_path / "root"


@pytest.mark.parametrize("path", ["../outside", "sub/../../outside", "/etc/passwd", "../root2", ".", "", "x\0"])
def test_paths_that_leave_their_root_are_refused(root, path):
    with pytest.raises(CheckpointError):
        inside(root, root / path)
    assert tree(root) == ["file", "sub"]


def test_links_are_followed_before_they_are_judged(root):
    (root / "out").symlink_to("../outside")
    (root / "far").symlink_to("/etc/passwd")
    (root / "chain").symlink_to("out")
    (root / "circle").symlink_to("circle")
    (root / "sub/up").symlink_to("../..")
    (root / "in").symlink_to("file")
    for name in ("out", "far", "chain", "circle", "sub/up/outside"):
        with pytest.raises(CheckpointError):
            inside(root, root / name)
    assert inside(root, root / "in") == (root / "file").resolve()
    root.with_name("link").symlink_to(root)
    assert inside(root.with_name("link"), root.with_name("link") / "sub") == (root / "sub").resolve()


def test_the_links_of_the_hub_cache_lead_to_its_blobs_and_no_further(tmp_path):
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/feed").touch()
    (tmp_path / "models--a--b/refs").touch()
    (snapshot / "config.json").symlink_to("../../blobs/feed")
    (snapshot / "refs").symlink_to("../../refs")
    assert inside(snapshot, snapshot / "config.json").name == "feed"
    with pytest.raises(CheckpointError, match="leads out of"):
        inside(snapshot, snapshot / "refs")


@pytest.fixture
def split_base(tmp_path):
    """A base whose weights are named by an index; and weights of the same form outside it."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "model.safetensors").rename(base / "part.safetensors")
    shutil.copy(base / "part.safetensors", tmp_path / "outside.safetensors")
    return base


@pytest.mark.parametrize("name", ["part.safetensors", "../outside.safetensors", "ABSOLUTE", "a/../../b.safetensors", 3])
def test_an_index_names_files_beside_it_only(split_base, name):
    name = str(split_base.parent / "outside.safetensors") if name == "ABSOLUTE" else name
    with BaseFiles(write_index(split_base, "part.safetensors")) as files:
        tensors = list(files.names)
    write_index(split_base, name, tensors)
    if name == "part.safetensors":
        load_whole(split_base, torch.float32, "eager")
        return
    for use in (BaseFiles, lambda base: load_whole(base, torch.float32, "eager")):
        with pytest.raises(CheckpointError, match="is not the plain name of a file beside it"):
            use(split_base)


def write_index(base: Path, name, tensors=("x",)) -> Path:
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return base


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", 3, ["model.safetensors"]])
def test_an_index_that_maps_nothing(split_base, weight_map):
    (split_base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match="does not map tensors"):
        BaseFiles(split_base)


SHARDS = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"]


@pytest.mark.parametrize(
    "names",
    [
        [*SHARDS, "state.json", "../../x"],
        ["../../x", "state.json", SHARDS[0]],
        ["/etc/passwd", "state.json", SHARDS[0]],
        [f"../step-000004/{SHARDS[0]}", SHARDS[1], "state.json"],
        [f"./{SHARDS[0]}", SHARDS[1], "state.json"],
        [SHARDS[0], "state.json"],
        [*SHARDS, "manifest.json"],
    ],
)
def test_a_manifest_lists_its_shards_and_nothing_else(tmp_path, names):
    checkpoint = write_checkpoint(tmp_path)
    (tmp_path / "x").touch()
    write_manifest(checkpoint, 4, 2, dict.fromkeys(names, hash_file(checkpoint / "state.json")))
    before = tree(tmp_path)
    with pytest.raises(CheckpointError, match="is not its manifest"):
        format.verify(checkpoint)
    assert tree(tmp_path) == before


def swap_for_link(path: Path, outside: Path) -> None:
    """Same content, other place."""
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


@pytest.mark.parametrize("name", [*SHARDS, "state.json", "manifest.json"])
def test_a_link_out_of_a_checkpoint_is_refused(tmp_path, name):
    checkpoint = write_checkpoint(tmp_path / "checkpoints")
    swap_for_link(checkpoint / name, tmp_path)
    with pytest.raises(CheckpointError, match="leads out of"):
        format.verify(checkpoint)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "abba_config.json"])
def test_a_link_out_of_an_adapter_is_refused(tmp_path, name):
    model = tiny_model()
    inject(model, AdapterConfig(2, 2))
    save_adapter(model, tmp_path / "adapter")
    swap_for_link(tmp_path / "adapter" / name, tmp_path)
    with pytest.raises(CheckpointError, match="leads out of"):
        load_adapter(tiny_model(), tmp_path / "adapter")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
@pytest.mark.parametrize("name", [SHARDS[0], "state.json", "manifest.json"])
def test_what_is_no_file_is_neither_read_nor_waited_for(tmp_path, name, make):
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint / name).unlink()
    make(checkpoint / name)
    with pytest.raises(CheckpointError, match="is no regular file|leads out of"):
        format.verify(checkpoint)


def test_a_file_name_cannot_write_on_the_terminal(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint / "x\x1b[2J\u202e").touch()
    with pytest.raises(CheckpointError, match=r"x\\x1b\[2J\\u202e: is not in the manifest") as caught:
        format.verify(checkpoint)
    assert str(caught.value).isprintable()


def test_a_sealed_checkpoint_verifies(tmp_path):
    checkpoint = write_checkpoint(tmp_path)
    seal(checkpoint)
    format.verify(checkpoint)


@pytest.mark.parametrize("name", [name for name in HOSTILE if isinstance(name, str) and "\ud800" not in name])
def test_a_recipe_extends_one_beside_it(tmp_path, name):
    (tmp_path / "x.yaml").write_text(GOOD)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/mine.yaml").write_text(f"extends: {json.dumps(name)}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("mine", [], tmp_path / "recipes")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("key", ["output_dir", "model.name_or_path", "data.path", "adapter.init_from"])
@pytest.mark.parametrize("value", ['"x\\0"', '"x\\n"', '"x\\ny"', '"\\n"', '""', f'"{"x" * 1001}"'])
def test_paths_that_no_file_has_are_refused_with_the_recipe(tmp_path, key, value):
    (tmp_path / "mine.yaml").write_text(GOOD)
    with pytest.raises(RecipeError, match=key):
        load_recipe("mine", [f"{key}={value}"], tmp_path)


def test_an_output_directory_too_long_to_exist(tmp_path):
    command = ["launch/train.py", "--recipe", "quickstart", f"output_dir={tmp_path}/{'x' * 300}", "data.max_rows=100"]
    finished = warm.run(tmp_path / "program", *command)
    assert finished.returncode == 66 and "cannot be written: File name too long" in finished.stderr
    assert len(finished.stderr.strip().splitlines()) == 1 and tree(tmp_path) == [
        "program",
        "program/stderr",
        "program/stdout",
    ]
