#!/usr/bin/env python
"""Supervised tokens/s of one model on the same rows: padded to a fixed length, to the longest row, grouped, packed.

    python benchmarks/packing.py --rows gsm8k/train.jsonl

Rows are real questions and answers in our prompt; their tokens are those of a BPE of 8,000 pieces trained on them, as
long as a large model's tokenizer makes them. The model is random, with adapters, gradient checkpointing and the loss in
chunks; a packed micro-batch has more rows, but no more tokens than one that is padded to the fixed length.
"""

import argparse
import io
import json
import math
import random
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

import sentencepiece
import torch
from measure import RESULTS, device, in_turns, write
from transformers import LlamaConfig, LlamaForCausalLM

from abba.adapter.config import AdapterConfig
from abba.adapter.inject import inject
from abba.base_model import DTYPE_CHOICES, DTYPES, choose_dtype
from abba.text.prompt import render_prompt
from abba.training.attention import keep_rows_apart, line_tokens
from abba.training.batches import MicroBatch, collate, lines_of
from abba.training.loss import return_losses
from abba.training.model import enable_checkpointing

PADDED_ROWS = 8  # of a micro-batch that is padded


class Rows:
    """Tokenised rows as abba.training.batches takes them."""

    def __init__(self, path: Path, count: int, longest: int, pieces: int) -> None:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        pairs = [(render_prompt(row["question"]), " " + row["answer"]) for row in rows]
        trained = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([prompt + answer for prompt, answer in pairs[:2000]]),
            model_writer=trained, vocab_size=pieces, model_type="bpe", split_digits=True, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
        encoder = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
        encoded = [(encoder.encode(prompt), encoder.encode(answer)) for prompt, answer in pairs[:count]]
        self.prompts = [len(prompt) for prompt, answer in encoded if len(prompt) + len(answer) <= longest]
        self.ids = [torch.tensor(prompt + answer) for prompt, answer in encoded if len(prompt) + len(answer) <= longest]

    def __len__(self) -> int:
        return len(self.ids)

    def input_ids(self, row: int) -> torch.Tensor:
        return self.ids[row]

    def length(self, row: int) -> int:
        return len(self.ids[row])

    def supervised(self, row: int) -> torch.Tensor:
        return torch.arange(self.prompts[row], len(self.ids[row]))


def global_batches(count: int, size: int) -> list[list[int]]:
    order = list(range(count))
    random.Random(0).shuffle(order)
    return [order[first : first + size] for first in range(0, count - size + 1, size)]


def micro_batches(data: Rows, rows: list[int], way: str, longest: int, packed_rows: int) -> Iterator[MicroBatch]:
    """Those of the global batch of `rows`."""
    size = packed_rows if way == "packed" else PADDED_ROWS
    if way == "grouped":
        rows = sorted(rows, key=data.length)
    for start in range(0, len(rows), size):
        lines = lines_of(data, rows[start : start + size], line_tokens("sdpa", longest) if way == "packed" else None)
        batch = collate(data, lines, 0, device())
        if way == "fixed":
            width = batch.input_ids.shape[1]
            batch = MicroBatch(
                torch.nn.functional.pad(batch.input_ids, (0, longest - width)),
                torch.arange(longest, device=device()).expand(len(lines), -1),
                batch.predictors // width * longest + batch.predictors % width,
                batch.targets,
                batch.rows,
                batch.row_lengths,
            )
        yield batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, required=True, help="JSONL with question and answer, such as GSM8K's")
    parser.add_argument("--count", type=int, default=128, help="rows that a repetition computes")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--packed-rows", type=int, default=16, help="rows of a packed micro-batch")
    parser.add_argument("--pieces", type=int, default=8000, help="of the tokenizer")
    parser.add_argument(
        "--hidden", type=int, default=1024, help="narrower, attention would weigh more than in a large model"
    )
    parser.add_argument("--layers", type=int, default=2, help="with fewer, the head would weigh more")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    data = Rows(arguments.rows, arguments.count, arguments.length, arguments.pieces)
    dtype, _ = choose_dtype(arguments.dtype)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=4 * arguments.hidden,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        vocab_size=arguments.pieces,
    )
    model = LlamaForCausalLM._from_config(config, dtype=DTYPES[dtype], attn_implementation="sdpa").to(device())
    inject(model, AdapterConfig(r1=16, r2=16, alpha=24.0))
    enable_checkpointing(model.train(), "reentrant")
    return_losses(model)

    ways = ("fixed", "longest", "grouped", "packed")
    groups = global_batches(len(data), 4 * arguments.packed_rows)
    sizes = (arguments.length, arguments.packed_rows)
    batches = {way: [list(micro_batches(data, rows, way, *sizes)) for rows in groups] for way in ways}

    def compute(way: str, some: list[MicroBatch]) -> None:
        model.set_attn_implementation("sdpa")
        if way == "packed":
            keep_rows_apart(model)
        for batch in some:
            model(*batch.inputs).backward()
        model.zero_grad()

    for way in ways:
        compute(way, batches[way][0][:1])
    cases = [{way: partial(compute, way, batches[way][number]) for way in ways} for number in range(len(groups))]
    turns = [in_turns(case, arguments.repetitions, warmup=0, enough=math.inf) for case in cases]
    seconds = {way: [turn[way] for turn in turns] for way in ways}  # of each global batch, every repetition
    batches = {way: [batch for group in batches[way] for batch in group] for way in ways}
    learned = {way: sum(len(b.targets) for b in batches[way]) for way in ways}
    assert len(set(learned.values())) == 1, "all ways compute the same rows"
    rate = {way: learned[way] / sum(map(median, seconds[way])) for way in ways}
    rows = [
        {
            "way": way,
            "supervised tokens/s": rate[way],
            "over longest": rate[way] / rate["longest"],
            "over fixed": rate[way] / rate["fixed"],
            "padding %": 100 * (1 - _real(data, batches[way]) / sum(b.input_ids.numel() for b in batches[way])),
            "most tokens": max(batch.input_ids.numel() for batch in batches[way]),
            "seconds": seconds[way],
        }
        for way in ways
    ]
    lengths = sorted(map(data.length, range(len(data))))
    settings = {
        **dict(arguments._get_kwargs()),
        "rows": len(data),
        "dtype": dtype,
        "median length": lengths[len(lengths) // 2],
    }
    settings = {key: str(value) for key, value in settings.items()}
    write("packing", " ".join(["python", *sys.argv]), settings, rows, arguments.output)


def _real(data: Rows, batches: list[MicroBatch]) -> int:
    return sum(data.length(row) for batch in batches for row in batch.rows)


if __name__ == "__main__":
    main()
