"""launch/prepare.py: fetches what is needed and no more, from a Hub of the test's; the job then needs neither."""

import dataclasses
import os
import subprocess
import sys
from functools import partial

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import filter_repo_objects

from abba.adapter.model_files import COMPANIONS
from abba.errors import CheckpointError, DataError
from abba.hub import NEEDED, HubRepository
from abba.text.rows import BadRows, RowSource, content_of, find_dataset, hub_dataset, usable_rows
from abba.training.tokens import TokenizedRows
from tests import warm
from tests.distributed.ranks import STORIES, TINY, environment
from tests.launch.hub import COMMIT, Hub
from tests.warm import ROOT

JUNK = {
    "original/consolidated.00.pth",
    "original/params.json",
    "pytorch_model.bin",
    "consolidated.safetensors",
    "x.gguf",
}
CARD = b"""---
configs:
- config_name: main
  data_files: main/train-*
- config_name: other
  data_files: other/train-*
---
"""
LINES = (STORIES / "train.jsonl").read_bytes().splitlines(keepends=True)
HUBS = [
    "model.name_or_path=some/model",
    "data.path=some/stories",
    "data.name=main",
    "data.max_rows=",
    "data.eval_rows=0",
]
SHORT = ["train.max_steps=1", "train.eval_steps="]


@pytest.fixture
def hub():
    model = {
        path.name: path.read_bytes() for path in TINY.iterdir() if path.suffix in (".json", ".model", ".safetensors")
    }
    model |= {"chat_template.jinja": b"{{ messages[0].content }}", "LICENSE": b"Do as you like."}
    model |= dict.fromkeys(JUNK, b"x")
    stories = {
        "README.md": CARD,
        "main/train-0.jsonl": b"".join(LINES[:20]),
        "main/train-1.jsonl": b"".join(LINES[20:50]),
    }
    stories["other/train-0.jsonl"] = b"".join(LINES[:9])
    return Hub({"models/some/model": model, "datasets/some/stories": stories})


@pytest.fixture
def program(tmp_path):
    """A program in a fresh process: the Hub's client reads its settings when it is imported."""

    def run(*command, **variables):
        home = environment(HF_HOME=str(tmp_path / "hf"), **variables)
        where = [f"data.prepared_path={tmp_path / 'prepared'}", f"output_dir={tmp_path / 'run'}"]
        command = [sys.executable, command[0], "--recipe", "quickstart", *HUBS, *SHORT, *where, *command[1:]]
        return subprocess.run(command, cwd=ROOT, env=home, capture_output=True, text=True, timeout=240)

    return run


def said(result, start):
    return [line for line in result.stdout.splitlines() if line.startswith(start)]


def test_what_is_fetched_once_is_all_that_a_job_needs(hub, program, tmp_path):
    with hub.serving() as endpoint:
        first = program("launch/prepare.py", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
        assert first.returncode == 0, first.stderr
        assert hub.files_sent() == (set(hub.repositories["models/some/model"]) - JUNK) | set(
            hub.repositories["datasets/some/stories"]
        )
        assert said(first, "model: some/model at commit") == [
            f"model: some/model at commit {COMMIT}; model.revision can pin it"
        ]
        assert said(first, "data: some/stories at") == [
            f"data: some/stories at commit {COMMIT}; data.revision can pin it"
        ]
        assert said(first, "rows: ") == ["rows: 50 to train on, 0 held out, 0 left out, 0 cut"]
        hub.requests.clear()
        second = program("launch/prepare.py", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
        assert second.returncode == 0 and not hub.requests, "what the cache has whole is not asked for"
        assert "holds these rows as tokens already" in second.stdout
        job = program("launch/train.py", HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
        assert job.returncode == 0, job.stderr
        assert not hub.requests, "a training job asks the Hub for nothing, also where it could"
    assert "holds these rows as tokens already" in job.stdout and "tokenised into" not in job.stdout
    kept = sorted(path.name for path in (tmp_path / "prepared").iterdir())
    assert [name.partition("-")[0] for name in kept] == ["factors", "tokens"], "the second is the job's"


def test_all_that_goes_with_a_merged_model_is_fetched():
    companions = [name for name in COMPANIONS if "/" not in name]
    assert list(filter_repo_objects(companions, **NEEDED["model"])) == companions


def test_every_source_of_a_mixture_is_fetched(hub, program, tmp_path):
    hub.repositories["datasets/other/stories"] = {"a.jsonl": b"".join(LINES[:7])}
    sources = ["data.path=", "data.name=", "data.sources=[{path: some/stories, name: main}, {path: other/stories}]"]
    with hub.serving() as endpoint:
        fetched = program("launch/prepare.py", *sources, HF_HUB_OFFLINE="0", HF_ENDPOINT=endpoint)
        assert fetched.returncode == 0, fetched.stderr
    assert said(fetched, "data.sources.") == [
        f"data.sources.{number}: {line}"
        for number, name in enumerate(("some/stories", "other/stories"))
        for line in (
            f"fetching {name} from the Hub",
            f"{name} at commit {COMMIT}; data.sources.{number}.revision can pin it",
        )
    ]
    assert said(fetched, "other/stories: ") == [
        "other/stories: 7 rows to train on, weight 1: 7 of an epoch's 57, 12.3%"
    ]


@pytest.fixture
def reach(monkeypatch, tmp_path):
    """Point the Hub's client of this process somewhere else; its own settings come from variables at its import."""

    def point(endpoint, offline=False):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )

    return point


def test_a_snapshot_that_lacks_a_file_is_not_taken_for_the_dataset(hub, reach, tmp_path):
    stories = RowSource("some/stories", "main", None, "train", "question", None, "answer", None)
    with hub.serving() as endpoint:
        reach(endpoint)
        snapshot = hub_dataset(stories).fetch()
        assert snapshot.name == COMMIT and find_dataset(stories) == snapshot
        (snapshot / "main/train-1.jsonl").unlink()
        with pytest.raises(DataError, match="nor whole in the Hub cache; fetch it first: hf download --repo-type data"):
            find_dataset(stories)
        hub.requests.clear()
        assert hub_dataset(stories).fetch() == snapshot == find_dataset(stories)
        assert hub.files_sent() <= {"main/train-1.jsonl"}
    reach("http://127.0.0.1:9", offline=True)
    assert find_dataset(stories) == snapshot
    rows = [numbers for numbers, *_ in usable_rows(stories, BadRows())]
    assert [len(numbers) for numbers in rows] == [50], "the rows of the configuration that was named"
    other = content_of(dataclasses.replace(stories, name="other"))
    assert content_of(stories) != other and COMMIT in other


MODEL, STORY = HubRepository("model", "some/model", None), HubRepository("dataset", "some/stories", None)


def gate(hub):
    hub.gated.add("models/some/model")


def no_dataset(hub):
    del hub.repositories["datasets/some/stories"]


def endless(hub):
    hub.sizes["model.safetensors"] = 10**15


@pytest.mark.parametrize(
    "change, repository, error, expected",
    [
        (gate, MODEL, CheckpointError, "accepted at https://huggingface.co/some/model, followed by: hf auth login"),
        (no_dataset, STORY, DataError, "'some/stories' is not in the Hub cache, and the Hub has none of this name"),
        (endless, MODEL, CheckpointError, "no space: model some/model needs 1000000.00 GB"),
        (None, HubRepository("model", "some/model", "v9"), CheckpointError, "the Hub has no revision 'v9' of it"),
        ("offline", MODEL, CheckpointError, "the Hub cannot be reached"),
        ("nobody there", STORY, DataError, "the Hub cannot be reached"),
    ],
)
def test_what_the_hub_does_not_give_is_said_in_one_line(hub, reach, tmp_path, change, repository, error, expected):
    if callable(change):
        change(hub)
    with hub.serving() as endpoint:
        reach("http://127.0.0.1:9" if change == "nobody there" else endpoint, change == "offline")
        with pytest.raises(error) as refused:
            repository.fetch()
        assert not hub.files_sent()
    line = str(refused.value)
    assert expected in line and "\n" not in line
    assert repository.command in line or "no space" in line
    assert repository.find() is None


@pytest.fixture
def run(tmp_path):
    return partial(warm.run, tmp_path / "program", "launch/prepare.py", "--recipe")


@pytest.mark.parametrize(
    "command, code, expected",
    [
        (["quickstrat"], 64, "did you mean quickstart?"),
        (["quickstart", "data.max_lenght=9"], 64, "did you mean max_length?"),
        (["quickstart", "data.path=nowhere.jsonl"], 65, "'nowhere.jsonl': no such file"),
        (["quickstart", "data.path=nobody/no-data"], 65, "hf download --repo-type dataset nobody/no-data"),
        (["quickstart", "data.max_length=20"], 65, "all labels are masked"),
        (["quickstart", "train.global_batch_size=80000"], 65, "fewer than train.global_batch_size=80000"),
        (["quickstart", "model.name_or_path=nobody/no-model"], 66, "hf download nobody/no-model"),
        (["quickstart", "data.prepared_path=/proc/nowhere"], 66, "data.prepared_path /proc/nowhere: cannot be written"),
    ],
)
def test_mistakes(run, tmp_path, command, code, expected):
    result = run(command[0], f"data.prepared_path={tmp_path / 'prepared'}", *command[1:])
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert expected in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.glob("prepared/*")) or code == 65


def test_no_space_for_the_tokens(run, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    try:
        result = run("quickstart", f"data.prepared_path={disk}")
        assert result.returncode == 66 and "Traceback" not in result.stderr, result.stderr
        assert f"data.prepared_path {disk}: tokens-" in result.stderr and "No space left on device" in result.stderr
        assert os.listdir(disk) == []
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_two_at_once_leave_one_whole_file(tmp_path):
    command = ["launch/prepare.py", "--recipe", "quickstart", f"data.prepared_path={tmp_path / 'prepared'}"]
    programs = [warm.Program(tmp_path / str(number), command, {}) for number in range(2)]
    finished = [program.wait() for program in programs]
    assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    (tokens,) = (tmp_path / "prepared").iterdir()
    assert len(TokenizedRows(tokens)) == len(LINES)
    assert all("tokenised into" in ended.stdout for ended in finished), "both began before one was done"
