"""What ends an answer."""

import json
import shutil

import pytest
import torch

from abba.base_model import load_tokenizer
from abba.errors import CheckpointError
from abba.evaluation.generate import generate_greedy, load_for_generation, stop_ids
from abba.text.encode import encode_prompt
from abba.text.prompt import CHAT
from tests.distributed.ranks import STORIES, TINY
from tests.text.test_chat import TEMPLATES, with_template


@pytest.fixture
def base(tmp_path):
    return shutil.copytree(TINY, tmp_path / "base")


@pytest.mark.parametrize(
    "written, stops",
    [
        ({"eos_token_id": [7, 2]}, [2, 7]),
        ({"eos_token_id": 5}, [2, 5]),
        ({"eos_token_id": None}, [2]),
        ({}, [2]),
        (None, [2]),
    ],
)
def test_the_base_may_name_more_tokens_that_end_an_answer(base, written, stops):
    path = base / "generation_config.json"
    path.unlink(missing_ok=True) if written is None else path.write_text(json.dumps(written))
    assert stop_ids(base, load_tokenizer(base), None) == stops


@pytest.mark.parametrize(
    "written", [{"eos_token_id": "</s>"}, {"eos_token_id": [2, None]}, {"eos_token_id": [-1]}, [2]]
)
def test_damaged_stops_are_refused(base, written):
    (base / "generation_config.json").write_text(json.dumps(written))
    with pytest.raises(CheckpointError, match="generation_config.json: "):
        stop_ids(base, load_tokenizer(base), None)


def test_in_a_chat_the_end_of_a_turn_ends_an_answer():
    tokenizer = with_template(TEMPLATES["own token"])
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert stop_ids(TINY, tokenizer, CHAT) == sorted({2, end})
    assert stop_ids(TINY, tokenizer, "alpaca") == [2]


def test_an_answer_ends_at_any_stop():
    tokenizer, model = load_tokenizer(TINY), load_for_generation(TINY, None, torch.float32, {})
    question = json.loads((STORIES / "test.jsonl").read_text().splitlines()[0])["question"]
    prompts = encode_prompt(tokenizer, [question])
    ((_, whole),) = generate_greedy(model, tokenizer, prompts, [[0]], 60, [2])
    stop = tokenizer(" are", add_special_tokens=False).input_ids[-1]
    ((_, part),) = generate_greedy(model, tokenizer, prompts, [[0]], 60, [2, stop])
    assert "are" in whole and whole.startswith(part) and part.endswith("are") and len(part) < len(whole)
