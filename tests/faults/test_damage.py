"""Every flipped bit, cut, swapped, missing or foreign file of a checkpoint is noticed, and the one before is used."""

import json
import shutil

import pytest

from abba.checkpoint.format import newest_valid, verify
from abba.checkpoint.source import find_checkpoint
from abba.errors import CheckpointError
from tests.faults.harness import chance

FLIPS = 2000


@pytest.fixture(scope="module")
def run(lab, reference):
    """A run with two checkpoints, the newer one to be damaged."""
    reference()
    return lab.output("reference-2")


@pytest.fixture
def hurt(run, tmp_path):
    target = tmp_path / "run"
    shutil.copytree(run, target)
    return target


def newest(run):
    return run / "checkpoints/step-000024"


def check_noticed(run, named=None):
    """It is refused, the file at fault is named, and a search uses the one before."""
    with pytest.raises(CheckpointError) as error:
        verify(newest(run))
    said = []
    assert newest_valid(run / "checkpoints", said.append).name == "step-000020"
    assert len(said) == 1 and (named is None or named in str(error.value)), str(error.value)


def test_single_bit_flips(hurt, trial):
    """All 8 bits of every kind of byte have their turn: header, tensor, JSON text, white space, the hashes."""
    random = chance("B3")
    files = {path: path.read_bytes() for path in sorted(newest(hurt).iterdir())}
    for number in range(FLIPS):
        # Half over all bytes alike, half over the files alike: the JSON files are small.
        path = random.choice(list(files))
        if number % 2:
            path = random.choices(list(files), [len(data) for data in files.values()])[0]
        damaged = bytearray(files[path])
        place = random.randrange(len(damaged))
        damaged[place] ^= 1 << random.randrange(8)
        path.write_bytes(damaged)
        with trial("B3 single-bit flips"):
            check_noticed(hurt, path.name)
        path.write_bytes(files[path])
    verify(newest(hurt))


def test_truncations(hurt, trial):
    for path in sorted(newest(hurt).iterdir()):
        data = path.read_bytes()
        header = 8 + int.from_bytes(data[:8], "little") if path.suffix == ".safetensors" else 40
        for size in (0, 1, header - 1, header, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:size])
            with trial("B4 truncations"):
                check_noticed(hurt, path.name)
        path.write_bytes(data)
    verify(newest(hurt))


def test_missing_extra_swapped_and_foreign_files(hurt, trial):
    files = sorted(path.name for path in newest(hurt).iterdir())
    whole = hurt / "whole"
    shutil.copytree(newest(hurt), whole)

    def restore():
        shutil.rmtree(newest(hurt))
        shutil.copytree(whole, newest(hurt))

    for name in files:
        with trial("B4 a file deleted"):
            (newest(hurt) / name).unlink()
            check_noticed(hurt, name)
        restore()
        with trial("B4 a file of another step"):
            shutil.copy(hurt / "checkpoints/step-000020" / name, newest(hurt) / name)
            check_noticed(hurt)
        restore()
    for one, other in ((a, b) for a in files for b in files if a < b):
        with trial("B4 two files swapped"):
            (newest(hurt) / one).rename(newest(hurt) / "third")
            (newest(hurt) / other).rename(newest(hurt) / one)
            (newest(hurt) / "third").rename(newest(hurt) / other)
            check_noticed(hurt)
        restore()
    with trial("B4 an extra file"):
        (newest(hurt) / "adapter.bin").touch()
        check_noticed(hurt, "adapter.bin")
    restore()
    with trial("B4 an empty directory"):
        shutil.rmtree(newest(hurt))
        newest(hurt).mkdir()
        check_noticed(hurt, "manifest.json")
    restore()
    with trial("B4 the manifest of another step"):
        manifest = newest(hurt) / "manifest.json"
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "step": 20}))
        check_noticed(hurt, "manifest.json")


def test_a_run_goes_on_from_the_one_before_and_says_so(lab, reference, trial):
    with trial("B3 a run resumes from the one before"):
        finished, _ = lab.run("damaged", 2, [{"rank": 0, "at": "step 14", "do": "kill"}])
        newest = lab.output("damaged") / "checkpoints/step-000012"
        shard = newest / "shard-00001-of-00002.safetensors"
        data = bytearray(shard.read_bytes())
        data[-5] ^= 4
        shard.write_bytes(data)
        strict, _ = lab.run("damaged", 1, None, "checkpoint.strict=true")
        assert strict[0].returncode == 66 and "checkpoint.strict is set" in strict[0].stderr
        finished, _ = lab.run("damaged", 2)
        assert [ended.returncode for ended in finished] == [0, 0], finished[0].stderr
        assert f"WARNING: passed over {newest}" in finished[0].stdout and shard.name in finished[0].stdout
        assert "continuing from" in finished[0].stdout and "step-000008" in finished[0].stdout
        assert f"did not verify, and set aside: {newest}.damaged" in finished[0].stdout
        assert (newest.with_suffix(".damaged") / shard.name).read_bytes() == data
        assert lab.outcome("damaged") == reference()


def test_when_none_is_valid_nothing_is_started_over(lab, trial):
    with trial("B3 no checkpoint is valid"):
        lab.run("ruined", 2, [{"rank": 0, "at": "step 10", "do": "kill"}])
        for checkpoint in (lab.output("ruined") / "checkpoints").iterdir():
            (checkpoint / "state.json").write_text("{}")
        finished, _ = lab.run("ruined", 2)
        assert [ended.returncode for ended in finished] == [66, 66]
        assert "none of its 2 checkpoints is valid" in finished[0].stderr and "resume=never" in finished[0].stderr
        with pytest.raises(CheckpointError, match="holds no valid checkpoint"):
            find_checkpoint(lab.output("ruined"), lambda line: None)
