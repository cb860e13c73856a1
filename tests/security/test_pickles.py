"""A pickle runs code when it is opened. Wherever one is put, it is refused in one line or never opened."""

import contextlib
import gzip
import json
import shutil
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

from abba import AdapterConfig, inject, load_adapter, save_adapter
from abba.base_model import find_base, load_config, load_tokenizer, load_whole
from abba.checkpoint import format
from abba.checkpoint.convert import convert
from abba.checkpoint.source import find_checkpoint
from abba.errors import AbbaError, CheckpointError, DataError
from abba.text.rows import BadRows, usable_rows
from abba.training.recipe import load_recipe
from abba.training.tokens import TokenizedRows, prepare_tokens, tokens_path, write_tokens
from tests import warm
from tests.checkpoint.test_format import write_checkpoint
from tests.distributed.ranks import STORIES, TINY
from tests.models import randomize_factors, tiny_model
from tests.security.payloads import PICKLES, open_carelessly, seal, torch_zip
from tests.training.test_data import source
from tests.warm import ROOT


@pytest.fixture
def canary(tmp_path):
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "the payload ran"


def refused(error, function, *arguments):
    with pytest.raises(error) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", PICKLES)
def test_the_payloads_are_live(tmp_path, kind):
    path = tmp_path / "executed"
    with contextlib.suppress(RuntimeError, TypeError, ValueError):  # what follows the payload makes no sense
        open_carelessly(PICKLES[kind](path))
    assert path.exists()


@pytest.fixture
def adapter(tmp_path):
    model = tiny_model()
    inject(model, AdapterConfig(2, 2))
    randomize_factors(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "abba_config.json"])
def test_in_place_of_a_file_of_an_adapter(adapter, canary, kind, name):
    (adapter / name).write_bytes(PICKLES[kind](canary))
    assert name in refused(CheckpointError, load_adapter, tiny_model(), adapter)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter.bin", "pytorch_model.bin", "adapter.pt"])
def test_instead_of_the_safetensors_of_an_adapter(adapter, canary, name):
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / name).write_bytes(torch_zip(canary))
    assert "adapter_model.safetensors: cannot be opened" in refused(
        CheckpointError, load_adapter, tiny_model(), adapter
    )


def test_beside_the_files_of_an_adapter(adapter, canary):
    for name in ("adapter_model.bin", "adapter.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "x.npy"):
        (adapter / name).write_bytes(torch_zip(canary))
    load_adapter(tiny_model(), adapter)


def take(checkpoint, destination):
    convert(find_checkpoint(checkpoint, print), destination)


FILES = ["shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "state.json"]


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_in_place_of_a_file_of_a_checkpoint(tmp_path, canary, kind, name, sealed):
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint / name).write_bytes(PICKLES[kind](canary))
    if sealed:
        seal(checkpoint)
        format.verify(checkpoint)
    assert name in refused(CheckpointError, take, checkpoint, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin", "scheduler.pt", "latest",
     "zero_pp_rank_0_mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"],
)  # fmt: skip
def test_beside_the_files_of_a_checkpoint(tmp_path, canary, name):
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint / name).write_bytes(torch_zip(canary))
    assert f"{name}: is not in the manifest" in refused(CheckpointError, take, checkpoint, tmp_path / "adapter")


@pytest.mark.parametrize("kind", PICKLES)
def test_in_place_of_the_manifest(tmp_path, canary, kind):
    checkpoint = write_checkpoint(tmp_path)
    (checkpoint / "manifest.json").write_bytes(PICKLES[kind](canary))
    assert "manifest.json" in refused(CheckpointError, take, checkpoint, tmp_path / "adapter")


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "pth", "bin", "npy", "npz", "arrow", "joblib", "py", "h5"])
def test_as_a_dataset(tmp_path, canary, kind, suffix):
    (tmp_path / f"rows.{suffix}").write_bytes(PICKLES[kind](canary))
    message = refused(DataError, list, usable_rows(source(tmp_path / f"rows.{suffix}"), BadRows()))
    assert "is no dataset file; give one that ends in .json, .jsonl, .parquet" in message


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("packed", [bytes, gzip.compress])
def test_under_the_name_of_a_dataset(tmp_path, canary, kind, suffix, packed):
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(packed(PICKLES[kind](canary)))
    assert "its content is not that of" in refused(DataError, list, usable_rows(source(path), BadRows()))


def test_an_archive_that_looks_like_json(tmp_path, canary):
    (tmp_path / "payload.pkl").write_bytes(torch_zip(canary))
    with tarfile.open(tmp_path / "rows.jsonl", "w", format=tarfile.USTAR_FORMAT) as archive:
        archive.add(tmp_path / "payload.pkl", "{../../escaped.pkl")
    assert (tmp_path / "rows.jsonl").read_bytes().startswith(b"{")
    assert "content is not" in refused(DataError, list, usable_rows(source(tmp_path / "rows.jsonl"), BadRows()))


@pytest.mark.parametrize("builder", ["pandas", "webdataset", "arrow", "text", "json", "csv", "eval", "../x", "a/b/c"])
def test_the_name_of_a_builder_is_no_dataset(tmp_path, canary, monkeypatch, builder):
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    for name in ("train.pkl", "train.jsonl", "train.txt"):
        (tmp_path / "cwd" / name).write_bytes(PICKLES["pickle"](canary))
    assert "whose names are OWNER/NAME" in refused(DataError, list, usable_rows(source(builder), BadRows()))


def test_in_the_schema_of_a_parquet_file(tmp_path, canary):
    column = pa.field(
        "question",
        pa.string(),
        metadata={
            "ARROW:extension:name": "arrow.py_extension_type",
            "ARROW:extension:metadata": PICKLES["pickle"](canary),
        },
    )
    table = pa.table([["a"], ["b"]], schema=pa.schema([column, pa.field("answer", pa.string())]))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert list(usable_rows(source(tmp_path / "rows.parquet"), BadRows())) == [([0], ["a"], ["b"])]


@pytest.fixture
def base(tmp_path):
    shutil.copytree(TINY, tmp_path / "base")
    return tmp_path / "base"


def use(base):
    load_config(find_base(str(base), None))
    load_tokenizer(base)
    load_whole(base, torch.float32, "eager")


@pytest.mark.parametrize("kind", PICKLES)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json", "tokenizer.json"])
def test_in_place_of_a_file_of_a_base(base, canary, kind, name):
    (base / name).write_bytes(PICKLES[kind](canary))
    refused(AbbaError, use, base)


@pytest.mark.parametrize("kind", PICKLES)
def test_a_tokenizer_model_that_is_a_pickle(base, canary, kind):
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(PICKLES[kind](canary))
    assert "its tokenizer cannot be loaded" in refused(CheckpointError, load_tokenizer, base)


@pytest.mark.parametrize("index", [None, "pytorch_model.bin", "pytorch_model.safetensors"])
def test_a_base_of_pickles(base, canary, index):
    (base / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "pytorch_model.safetensors"):
        (base / name).write_bytes(torch_zip(canary))
    expected = "has only pytorch_model.bin, a pickle, which can run code when opened"
    if index is not None:
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": index}}))
        expected = "only safetensors files are opened" if index.endswith(".bin") else "truncated or no safetensors"
    assert expected in refused(CheckpointError, use, base)


def test_beside_the_files_of_a_base(base, canary):
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "training_args.bin", "optimizer.pt", "tf.h5"):
        (base / name).write_bytes(torch_zip(canary))
    use(base)


def small(path, output):
    return [
        f"output_dir={output}",
        f"data.path={path}",
        "train.max_steps=1",
        "data.max_rows=40",
        "data.eval_rows=0",
        "train.eval_steps=",
    ]


@pytest.mark.parametrize("kind", ["pickle", "torch-zip"])
def test_in_place_of_the_tokens_of_a_run(tmp_path, canary, kind):
    prepared = tmp_path / "prepared"
    arguments = [*small(STORIES / "train.jsonl", tmp_path / "run"), f"data.prepared_path={prepared}"]
    recipe = load_recipe("quickstart", arguments, ROOT / "recipes")
    rows = source(recipe.data.path, max_rows=40)
    path = tokens_path(rows, recipe.data.max_length, 0, AutoTokenizer.from_pretrained(TINY), prepared)
    path.parent.mkdir(parents=True)
    path.write_bytes(PICKLES[kind](canary))
    finished = warm.run(tmp_path / "program", "launch/train.py", "--recipe", "quickstart", *arguments)
    assert finished.returncode == 0, finished.stderr
    said = [line for line in finished.stdout.splitlines() if line.startswith("data: WARNING")]
    assert len(said) == 1 and path.name in said[0] and said[0].endswith("it is made anew")
    assert len(TokenizedRows(path)) == 40


@pytest.mark.parametrize(
    "change",
    [
        {"supervised": torch.tensor([1, 1, 1]).byte()},
        {"supervised": torch.tensor([0, 0, 0]).byte()},
        {"supervised": torch.tensor([0, 2, 1]).byte()},
        {"supervised": torch.tensor([0, 1]).byte()},
        {"uncut": torch.tensor([2])},
        {"uncut": torch.tensor([3, 3])},
        {"stops": torch.tensor([2])},
        {"stops": torch.tensor([], dtype=torch.int64)},
        {"input_ids": torch.tensor([-1, 2, 3], dtype=torch.int32)},
        {"input_ids": torch.ones(3)},
        {"extra": torch.ones(3)},
        {"stops": torch.tensor([[3]])},
    ],
)
def test_tokens_that_do_not_belong_together(tmp_path, change):
    right = {"input_ids": torch.arange(3, dtype=torch.int32), "stops": torch.tensor([3])}
    right |= {"supervised": torch.tensor([0, 1, 1]).byte(), "sources": torch.tensor([0]), "uncut": torch.tensor([3])}
    write_tokens(tmp_path / "right.safetensors", right, {})
    assert len(TokenizedRows(tmp_path / "right.safetensors")) == 1
    write_tokens(tmp_path / "wrong.safetensors", {**right, **change}, {})
    assert "delete it" in refused(CheckpointError, TokenizedRows, tmp_path / "wrong.safetensors")


def test_pickles_given_to_the_programs(tmp_path, canary):
    path = tmp_path / "rows.pkl"
    path.write_bytes(PICKLES["pickle"](canary))
    (tmp_path / "bad").mkdir()
    shutil.copytree(TINY, tmp_path / "base")
    (tmp_path / "base/model.safetensors").write_bytes(torch_zip(canary))
    score = ["launch/evaluate.py", "--task", "gsm8k", "--output", str(tmp_path / "out")]
    stories = ["--data", str(STORIES / "test.jsonl")]
    for number, (command, code) in enumerate(
        [
            (["launch/train.py", "--recipe", "quickstart", *small(path, tmp_path / "run")], 65),
            (["launch/train.py", "--recipe", str(path)], 64),
            ([*score, "--model", str(TINY), "--data", str(path)], 65),
            ([*score, "--model", str(tmp_path / "base"), *stories], 66),
            ([*score, "--model", str(path), *stories], 66),
            ([*score, "--model", str(TINY), "--adapter", str(path), *stories], 66),
            (["launch/convert.py", str(path), str(tmp_path / "adapter")], 66),
        ]
    ):
        finished = warm.run(tmp_path / f"program-{number}", *command)
        assert finished.returncode == code and "Traceback" not in finished.stderr, (command, finished.stderr)
        assert len(finished.stderr.strip().splitlines()) == 1, finished.stderr


def test_preparing_tokens_writes_no_pickle(tmp_path):
    """What a run leaves in its tokens directory is one safetensors file."""
    rows = source(STORIES / "test.jsonl", max_rows=4)
    prepare_tokens(rows, 256, 0, AutoTokenizer.from_pretrained(TINY), tmp_path / "tokens-x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-x.safetensors"]
