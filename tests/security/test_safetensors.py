"""Hostile safetensors: refused within a second and 100 MB, before anything of the size they speak of is allocated."""

import json
import math
import random
import time
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from abba.base_model import load_whole
from abba.errors import CheckpointError
from abba.parsing import parse_json
from abba.prepared import content_digest
from abba.storage import SafetensorsFile, Spec, read_json, write_safetensors
from abba.training.tokens import TokenizedRows
from tests.distributed.ranks import TINY
from tests.quick import assert_quick


def refused(path, use=SafetensorsFile):
    """The message; timed first and traced in another attempt, because tracing slows it down several times."""

    def attempt() -> str:
        with pytest.raises(CheckpointError) as caught:
            use(path)
        return str(caught.value)

    assert_quick(attempt)
    tracemalloc.start()
    message = attempt()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6, f"{peak / 1e6:.0f} MB"
    assert message.isprintable() and len(message) < 3000
    return message


def write(path, header, data=bytes(16), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype="F32", shape=(4,), offsets=(0, 16), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**63 - 1, 10**8, 4_000_001, 0, 1, 7, 2**32])
def test_header_lengths(tmp_path, length):
    refused(write(tmp_path / "x.safetensors", {"a": entry()}, length=length))


def filled(unit: bytes, size: int) -> bytes:
    return b"[" + unit * (size // len(unit)) + b"0]"


HUGE = {
    "spaces": lambda size: b" " * size,
    "brackets": lambda size: b"[" * size,
    "braces": lambda size: b'{"a":' * (size // 5),
    "lists": lambda size: filled(b"[],", size),
    "nested": lambda size: filled(b"[[]],", size),
    "objects": lambda size: filled(b"{},", size),
    "numbers": lambda size: filled(b"1.5,", size),
    "text": lambda size: b'{"' + b"x" * size + b'": 1}',
    "names": lambda size: b"{" + b",".join(b'"%x":9999' % i for i in range(size // 14)) + b"}",
    "digits": lambda size: b'{"a":' + b"9" * size + b"}",
    # as many as the limit on lists and objects admits, with names that fill the rest
    "tensors": lambda size: json.dumps({f"{i:060}": entry("F32", (0,), (0, 0)) for i in range(size // 124)}).encode(),
}


@pytest.mark.parametrize("kind", HUGE)
def test_the_largest_headers_that_are_read_at_all(tmp_path, kind):
    header = HUGE[kind](3_900_000)
    refused(write(tmp_path / "x.safetensors", header))
    if kind not in ("text", "numbers", "names", "tensors"):  # these are valid JSON
        (tmp_path / "x.json").write_bytes(header)
        refused(tmp_path / "x.json", read_json)


@pytest.mark.parametrize("kind", ["spaces", "brackets", "lists", "text"])
def test_headers_of_100_megabytes(tmp_path, kind):
    path = write(tmp_path / "x.safetensors", HUGE[kind](100_000_000))
    assert "truncated or no safetensors file" in refused(path)
    assert "at most 4000000 are read" in refused(path, read_json)


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry(offsets=(0, 8))},
        {"a": entry(offsets=(16, 0))},
        {"a": entry(offsets=(-16, 0))},
        {"a": entry(offsets=(0, -16))},
        {"a": entry(offsets=(4, 20))},
        {"a": entry(offsets=(0,))},
        {"a": entry(offsets=(0, 16, 32))},
        {"a": entry(offsets=(0.0, 16.0))},
        {"a": entry(offsets=(False, 16))},
        {"a": entry(offsets=("0", "16"))},
        {"a": entry(offsets=(0, None))},
        {"a": entry(offsets=(0, 10**30))},
        {"a": entry("F32", (2,), (0, 8)), "b": entry("F32", (2,), (4, 12)), "c": entry("F32", (1,), (12, 16))},
        {"a": entry(), "b": entry()},
        {"a": entry("F32", (3,), (0, 12))},
        {"a": entry("F32", (2,), (0, 8)), "b": entry("F32", (1,), (12, 16))},
        {"a": entry(shape=(-4,))},
        {"a": entry(shape=(-2, -2))},
        {"a": entry(shape=(4.0,))},
        {"a": entry(shape=("4",))},
        {"a": entry(shape=(True, 4))},
        {"a": entry(shape=(2**62, 2**62))},
        {"a": entry(shape=(10**39,) * 16)},
        {"a": entry(shape=(1,) * 10_000)},
        {"a": entry(shape=([4],))},
        {"a": entry("F64")},
        {"a": entry("f32")},
        {"a": entry("F128")},
        {"a": entry(["F32"])},
        {"a": entry(None)},
        {"a": entry(extra=1)},
        {"a": {"dtype": "F32", "shape": [4]}},
        {"a": []},
        {"a": None},
        {"a": "x"},
        {"x\x1b[2J\n\u202e" * 1000: entry("F64")},
        {"__metadata__": [], "a": entry()},
        {"__metadata__": {"notes": 3}, "a": entry()},
        {"__metadata__": {"notes": ["x"]}, "a": entry()},
        {},
        [],
        3,
        None,
        b"",
        b"{",
        b'{"a":}',
        b"\xff\xfe{}",
        json.dumps({"a": entry()}).encode("utf-16"),
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, "a": {"dtype": "I32", "shape": [4], '
        b'"data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [Infinity], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4e0], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 16]}}',
    ],
    ids=lambda header: ascii(header)[:50],
)
def test_headers_that_lie(tmp_path, header):
    refused(write(tmp_path / "x.safetensors", header))


def test_numbers_have_an_end():
    assert parse_json(b"9" * 40) == 10**40 - 1
    with pytest.raises(ValueError, match="a number of 41 digits"):
        parse_json(b"9" * 41)


def test_the_smallest_files(tmp_path):
    for size in range(9):
        (tmp_path / "x.safetensors").write_bytes(bytes(size))
        refused(tmp_path / "x.safetensors")


def random_file(path):
    tensors = {
        "layer.0.A1": torch.randn(3, 4),
        "layer.0.B1": torch.arange(5),
        "c": torch.randn(0, 2),
        "d": torch.ones(7),
    }
    layout = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(path, layout, tensors.values(), {"format": "pt"})
    return path.read_bytes()


INSERTED = [b"-", b"9", b"0", b"[", b"{", b'"', b",", b"1e9", b"null"]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """One to four changes, nearly all of them in the header."""
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(len(data), 8 + int.from_bytes(data[:8], "little")))
        before, after = data[:place], data[place:]
        changes = [
            lambda before, after: before + bytes([draw.randrange(256)]) + after[1:],
            lambda before, after: before + bytes([after[0] ^ (1 << draw.randrange(8))]) + after[1:],
            lambda before, after: before + after[draw.randint(1, 9) :],
            lambda before, after: before + draw.choice(INSERTED) + after,
            lambda before, after: before + before[:20] + after[20:],
            lambda before, after: before + after[: draw.randrange(len(after)) + 1],
        ]
        data = draw.choice(changes)(before, after) or data
    return data


def test_mutated_headers_are_refused_or_read_within_their_bytes(tmp_path):
    """600 random changes: what is still accepted describes exactly the bytes that are there."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    draw, path, outcome = random.Random(seed), tmp_path / "x.safetensors", {"refused": 0, "accepted": 0}
    whole = random_file(path)
    for _ in range(600):
        data = mutated(whole, draw)
        path.write_bytes(data)
        started = time.process_time()
        try:
            with SafetensorsFile(path) as file:
                tensors = {name: file.read_full(name) for name in file.tensors}
            header = 8 + int.from_bytes(data[:8], "little")
            assert sum(tensor.nbytes for tensor in tensors.values()) == len(data) - header
            assert all(math.prod(stored.shape) == tensors[name].numel() for name, stored in file.tensors.items())
            outcome["accepted"] += 1
        except CheckpointError:
            outcome["refused"] += 1
        assert time.process_time() - started < 1
    print(outcome)
    assert outcome["refused"] > 300


@pytest.mark.parametrize(
    "header, named",
    [
        ({"a": entry(offsets=(0, 8))}, "does not lie where"),
        (b"[" * 3_000_000, "lists and objects"),
        ({"a": entry()}, "tensors of the model are missing"),
        ({"model.norm.weight": entry()}, "cannot be loaded"),
    ],
)
def test_hostile_weights_of_a_base_that_is_loaded_whole(tmp_path, header, named):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    write(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError) as caught:
        load_whole(tmp_path, torch.float32, "eager")
    assert "\n" not in str(caught.value) and named in str(caught.value)


@pytest.mark.parametrize("said", ["[", "[" * 50_000, "{}", '{"x\\u001b[2J": 3}', "9" * 5000, '{"x": "y"}', "[3]"])
def test_what_a_tokens_file_says_of_rows_left_out(tmp_path, said):
    tensors = {"input_ids": torch.arange(3, dtype=torch.int32), "stops": torch.tensor([3])}
    tensors |= {"supervised": torch.tensor([0, 1, 1]).byte(), "sources": torch.tensor([0]), "uncut": torch.tensor([3])}
    save_file(
        tensors, tmp_path / "x.safetensors", {"left_out": said, "sha256": content_digest(tensors, {"left_out": said})}
    )
    if said in ("{}", '{"x\\u001b[2J": 3}'):
        assert TokenizedRows(tmp_path / "x.safetensors").left_out in ({}, {"x\x1b[2J": 3})
    else:
        assert "what it says of rows left out is damaged" in refused(tmp_path / "x.safetensors", TokenizedRows)
