"""The embedded tokenizer.json against the sentencepiece model that it was converted from."""

import json

import sentencepiece
from transformers import AutoTokenizer

from tests.distributed.ranks import STORIES, TINY

ODD = [
    "",
    " ",
    "  two  spaces ",
    "new\n\nlines\n",
    "tabs\tand\r\n",
    "<<3+4=7>>7 #### 7",
    "1,234.5",
    "caféé 漢字 🙂",
    "a" * 300,
]


def test_both_forms_give_the_same_ids_and_the_text_comes_back():
    fast = AutoTokenizer.from_pretrained(TINY)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(TINY / "tokenizer.model"))
    rows = [json.loads(line) for line in (STORIES / "test.jsonl").read_text().splitlines()]
    texts = [row[key] for row in rows for key in ("question", "answer")] + ODD
    for text in texts:
        ids = fast(text, add_special_tokens=False).input_ids
        assert ids == pieces.encode(text)
        assert fast.decode(ids, skip_special_tokens=True) == text
    assert fast("x").input_ids[0] == fast.bos_token_id == 1 and fast.pad_token_id is None
