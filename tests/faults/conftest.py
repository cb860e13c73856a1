"""The reference run that every hurt run has to equal, once per world size."""

import pytest
from transformers import AutoTokenizer

from tests.distributed.ranks import TINY
from tests.faults.harness import LAYERS, Lab
from tests.models import tiny_model


def make_base(directory, **changes):
    """A toy of width 64 in bf16."""
    model = tiny_model(
        vocab_size=640,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        num_hidden_layers=LAYERS,
        **changes,
    )
    model.bfloat16().save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def toy_base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def lab(toy_base, tmp_path_factory):
    return Lab(toy_base, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def reference(lab):
    """reference(world) -> the uninterrupted run's outcome."""
    known = {}

    def outcome(world: int = 2):
        if world not in known:
            known[world] = lab.complete(f"reference-{world}", world)
        return known[world]

    return outcome
