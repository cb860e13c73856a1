"""A truncated LoRA is the best of its rank, and says what it lost."""

import pytest
import torch
from safetensors.torch import load_file

from abba import AdapterConfig
from abba.adapter import files
from abba.adapter.directory import AdapterDescription, read_description
from abba.adapter.functional import delta_weight
from abba.adapter.initialize import Factors
from abba.adapter.truncate import truncate
from abba.errors import CheckpointError


def factors(out, into, r1, r2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((r1, into), (out, r1), (r2, into), (out, r2))
    return Factors(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("out, into", [(40, 30), (9, 30), (40, 7)])
@pytest.mark.parametrize("rank", [1, 5, 11, 12])
def test_it_is_the_svd_of_the_update_cut_off(out, into, rank):
    given = factors(out, into, 4, 3)
    exact = delta_weight(*(factor.double() for factor in given), 1.7)
    u, s, vh = torch.linalg.svd(exact, full_matrices=False)
    best = (u[:, :rank] * s[:rank]) @ vh[:rank]
    a, b, kept, total = truncate(given, 1.7, rank)
    assert a.shape == (rank, into) and b.shape == (out, rank)
    torch.testing.assert_close(b @ a, best)
    assert kept == pytest.approx(best.square().sum().item()) and total == pytest.approx(exact.square().sum().item())
    if rank == 12:
        assert kept == pytest.approx(total, rel=1e-12)
        torch.testing.assert_close(b @ a, exact)


def write(directory, rank, **modules):
    shapes = {name: (given.B1.shape[0], given.A1.shape[1]) for name, given in modules.items()}
    config = AdapterConfig(4, 3, 2.0, tuple(modules))
    return files.write_adapter(directory, AdapterDescription(config, "lora", shapes, None, rank), modules.__getitem__)


def test_an_adapter_says_what_it_keeps_overall_and_at_worst(tmp_path):
    flat, one = factors(20, 30, 4, 3), factors(20, 30, 4, 3)
    one.A1[1:], one.A2[1:] = 0, 0  # of rank 1: nothing is lost
    zero = factors(20, 30, 4, 3)._replace(B2=torch.zeros(20, 3))
    kept = write(tmp_path / "adapter", 2, flat=flat, one=one, zero=zero).kept_energy
    (_, _, *flat_energy), (_, _, *one_energy) = (
        truncate(given, AdapterConfig(4, 3, 2.0).scale, 2) for given in (flat, one)
    )
    assert kept.worst_module == "flat" and kept.worst == pytest.approx(flat_energy[0] / flat_energy[1])
    assert kept.overall == pytest.approx((flat_energy[0] + one_energy[0]) / (flat_energy[1] + one_energy[1]))
    assert 0 < kept.worst < kept.overall < 1
    description = read_description(tmp_path / "adapter")
    assert description.rank == 2 and description.kept_energy == kept
    card = (tmp_path / "adapter/README.md").read_text()
    assert f"closest LoRA of rank 2, which keeps {kept.overall:.2%}" in card and "--max-lora-rank 8" in card
    stored = load_file(tmp_path / "adapter" / files.WEIGHTS)
    assert stored["base_model.model.zero.lora_B.weight"].shape == (20, 2)
    assert not stored["base_model.model.zero.lora_B.weight"].any()


def test_its_rank_is_checked_when_it_is_opened(tmp_path):
    write(tmp_path / "adapter", 2, m=factors(20, 30, 4, 3))
    path = tmp_path / "adapter" / files.ABBA_CONFIG
    for rank, message in ((3, "lora_alpha is 2 where"), (13, "does not describe an adapter")):
        path.write_text(path.read_text().replace('"rank": 2', f'"rank": {rank}'))
        with pytest.raises(CheckpointError, match=message):
            files.verify_adapter(tmp_path / "adapter")
        path.write_text(path.read_text().replace(f'"rank": {rank}', '"rank": 2'))
