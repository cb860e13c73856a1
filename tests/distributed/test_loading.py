"""What a rank takes while it reads its slices: each element once, and little memory beyond them."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from abba.sharded import loading
from abba.storage import SafetensorsFile, Spec, write_safetensors
from tests import warm


@pytest.mark.parametrize("nodes, on_node", [(1, 1), (1, 3), (2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("numel", [1, 5, 24, 101])
def test_shares_are_filled_whole_in_blocks_that_overlap_nowhere(monkeypatch, nodes, on_node, numel):
    monkeypatch.setattr(loading, "BLOCK", 4)
    world, whole = nodes * on_node, torch.arange(1.0, numel + 1)
    part, copied = -(-numel // world), []
    for rank in range(world):
        own, copy = torch.full((part,), -1.0), torch.full((part * nodes,), -1.0)
        layout = {"ds_secondary_tensor_num_of_groups": nodes, "ds_secondary_tensor_group_size": on_node}
        second = copy if nodes > 1 else None
        parameter = SimpleNamespace(ds_numel=numel, ds_tensor=own, ds_secondary_tensor=second, **layout)
        blocks = []

        def read(start, stop, blocks=blocks):
            blocks.append((start, stop))
            return whole[start:stop].double()

        elements, checksum = loading._fill(loading._shares(parameter, rank, world), read)
        mine = whole[rank * part : (rank + 1) * part]
        assert elements == mine.numel() and checksum == int(mine.view(torch.int32).sum(dtype=torch.int64))
        assert own.tolist() == mine.tolist() + [0] * (part - mine.numel())
        read_elements = [element for start, stop in blocks for element in range(start, stop)]
        assert len(set(read_elements)) == len(read_elements) and all(stop - start <= 4 for start, stop in blocks)
        if nodes > 1:
            first = rank % on_node * part * nodes
            there = whole[first : first + part * nodes].tolist()
            assert copy.tolist() == there + [0] * (part * nodes - len(there))
        copied.append(own)
    assert torch.cat(copied)[:numel].equal(whole)


def test_a_large_tensor_takes_no_more_memory_than_a_block(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(warm.ROOT / "benchmarks")
    from measure import peak_bytes

    numel = 2**25
    write_safetensors(tmp_path / "x", {"x": Spec((numel,), torch.bfloat16)}, [torch.ones(numel).bfloat16()], {})
    place = torch.zeros(numel, dtype=torch.bfloat16)
    with SafetensorsFile(tmp_path / "x") as file:
        beyond = peak_bytes(lambda: loading._fill([(place, 0, numel)], partial(file.read, "x")))
    assert place.all() and beyond < 2**24, f"{beyond / 2**20:.0f} MiB for a tensor of 64 MiB"
