"""An adapter that changes most answers of the tiny base, and still lets it answer; tasks, and answers to them."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

import abba.evaluation.score
from abba import AdapterConfig, inject
from abba.adapter.linear import abba_modules
from abba.base_model import load_whole
from abba.evaluation.engine import Plan
from abba.evaluation.kept import batches_by_length
from abba.evaluation.subject import Subject
from abba.text.choices import OPTIONS
from tests.distributed.ranks import TINY


def adapted() -> tuple[PreTrainedModel, AdapterConfig]:
    """The tiny base in fp32 with an adapter of unequal ranks whose B2 is random."""
    model, config = load_whole(TINY, torch.float32, "sdpa"), AdapterConfig(4, 3, 8.0)
    inject(model, config)
    generator = torch.Generator().manual_seed(0)
    for module in abba_modules(model).values():
        module.B2.data.copy_(0.15 * torch.randn(module.B2.shape, generator=generator))
    return model, config


def answering(monkeypatch, texts: list[str]) -> None:
    """Put `texts` in the place of the model: everything before and after the generation is the real thing."""

    def plan_answers(base, adapter, tokenizer, prompts, **settings):
        batches = batches_by_length(prompts, settings["batch_size"])
        made_by = {"engine": "none", "engine_version": "0", "gpus": 0}
        return Plan(made_by, batches, lambda chosen: ((row, texts[row]) for batch in chosen for row in batch))

    monkeypatch.setattr(abba.evaluation.score, "plan_answers", plan_answers)


def scored(task: str, data: Path, output: Path, **settings) -> dict:
    settings = {"limit": None, "batch_size": 64, "max_new_tokens": None, "dtype": torch.bfloat16, **settings}
    return abba.evaluation.score.evaluate(Subject(TINY, None), task, str(data), output, say=lambda _: None, **settings)


def commonsense(directory: Path, rows: int = 4) -> Path:
    """The eight tasks in the format of LLM-Adapters, `rows` of each with every option in turn."""
    for task, options in OPTIONS.items():
        (directory / task).mkdir(parents=True)
        names = "/".join(options)
        made = [
            {"instruction": f"Which of them is it, number {row}?\n\nAnswer format: {names}", "input": "",
             "output": f"the correct answer is {options[row % len(options)]}", "answer": options[row % len(options)]}
            for row in range(rows)
        ]  # fmt: skip
        (directory / task / "test.json").write_text(json.dumps(made, indent=4))
    return directory
