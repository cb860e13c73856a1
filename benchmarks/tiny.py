"""The embedded tiny base learns a task by one method: one process of plain torch, everything in fp32.

Options of a method, its layers and initial values, tokens, order of rows, masks, loss, schedule, generation and grading
are those of launch/train.py and launch/evaluate.py. Only the engine is not: `tests/distributed/test_methods.py` shows
that under ZeRO-3 every method has the same losses as in plain torch.
"""

import json
import math
import statistics
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from problems import ANSWER_TOKENS, ASSETS, Row, problems
from torch import nn
from transformers import PreTrainedModel

from abba.adapter.baseline import inject_baseline
from abba.adapter.config import AdapterConfig, FullConfig, MethodConfig
from abba.adapter.inject import inject
from abba.base_model import load_tokenizer
from abba.evaluation.generate import generate_greedy, load_for_generation
from abba.evaluation.grading import grade_all
from abba.evaluation.tasks import Question
from abba.text.encode import encode_prompt, padding_id
from abba.text.graders import reference_answer
from abba.training.adapter_section import AdapterSection
from abba.training.batches import BatchPlan, MicroBatch, collate
from abba.training.loss import return_losses
from abba.training.mixture import Mixture
from abba.training.prepare import row_sources
from abba.training.recipe import DataSection, TrainSection
from abba.training.schedule import learning_rate
from abba.training.tokens import TokenizedRows, prepare_tokens

BASE = ASSETS / "tiny-llama"
ROWS, MAX_LENGTH = 3200, 512  # of training, as in the embedded train.jsonl
INTERVAL = 10  # steps between two points of a curve
HOPELESS = 1e6  # the validation loss of what cannot be computed any more; JSON has no infinity


def config_of(method: str, rank: int) -> MethodConfig:
    """`rank` is LoRA's; the others have as many factors, and the alphas by which a recipe scales them at this rank.

    That is 1 for PEFT's (rsLoRA's alpha is LoRA's), and for ABBA what quickstart.yaml has.
    """
    options: dict[str, Any] = {
        "abba": {"r1": rank // 2, "r2": rank // 2, "alpha": 16.0},
        "loha": {"r": rank // 2, "alpha": rank / 2},
        "hira": {"r": rank},
        "full": {},
    }.get(method, {"r": rank, "alpha": float(rank)})
    return AdapterSection(method=method, **options).config()


def adapted(method: str, rank: int, seed: int) -> PreTrainedModel:
    """The tiny base with what `method` trains."""
    model, config = load_for_generation(BASE, None, torch.float32, {}), config_of(method, rank)
    if isinstance(config, AdapterConfig):
        inject(model, config, seed)
    elif not isinstance(config, FullConfig):
        inject_baseline(model, config, seed)
    return model


@cache
def tokenizer() -> Any:
    return load_tokenizer(BASE)


@cache
def tokens_of(task: str, part: str, count: int) -> Mixture:
    """The problems of a part as a job would hold them, its prompt around each."""
    with TemporaryDirectory(prefix="abba-compare-") as scratch:
        path = Path(scratch) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in problems(task, part, count)))
        source, tokens = row_sources(DataSection(path=str(path)))["data"], Path(scratch) / "tokens.safetensors"
        prepare_tokens(source, MAX_LENGTH, 0, tokenizer(), tokens)
        return Mixture([TokenizedRows(tokens)], [part], [1.0])


def batch_of(data: Mixture, rows: list[int]) -> MicroBatch:
    return collate(data, [[row] for row in rows], padding_id(tokenizer()), torch.device("cpu"))


def train(model: nn.Module, data: Mixture, settings: TrainSection) -> list[float]:
    """The loss of every step, per supervised token; it ends before an update that is not finite, as a job would."""
    batch_size = settings.global_batch_size
    plan = BatchPlan(list(range(len(data))), batch_size, settings.per_device_train_batch_size, settings.seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, **settings.adam())
    losses: list[float] = []
    for step in range(settings.max_steps):
        batch = batch_of(data, plan.global_rows(step))
        loss = model(*batch.inputs) / len(batch.targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trainable, settings.max_grad_norm)
        if not math.isfinite(float(loss.detach()) + float(norm)):
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=settings.max_steps, **settings.schedule())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, data: Mixture) -> float:
    """Per supervised token."""
    batch = batch_of(data, list(range(len(data))))
    loss = float(model(*batch.inputs)) / len(batch.targets)
    return min(loss, HOPELESS) if math.isfinite(loss) else HOPELESS


def exact_match(model: PreTrainedModel, rows: list[Row]) -> float:
    """Percent of problems whose greedy generation has the right answer after ####, all in one batch."""
    questions = [
        Question("gsm8k", number, row["question"], row["answer"], reference_answer("gsm8k", row["answer"]))
        for number, row in enumerate(rows)
    ]
    prompts = encode_prompt(tokenizer(), [question.instruction for question in questions])
    everything = [list(range(len(prompts)))]
    found = generate_greedy(model, tokenizer(), prompts, everything, ANSWER_TOKENS, [tokenizer().eos_token_id])
    texts = [text for _, text in sorted(found)]
    return 100 * statistics.mean(grade.strict_right for grade in grade_all(questions, texts, max_ungraded=0))


def learn(
    task: str, method: str, rate: float, seed: int, steps: int, rank: int, batch: int, scored: int
) -> dict[str, Any]:
    """One cell: what `method` has learned after `steps`, on `scored` problems of validation and of test."""
    began, began_cpu = time.perf_counter(), time.process_time()
    model = adapted(method, rank, seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = TrainSection(
        global_batch_size=batch,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_ratio=0.05,
        max_steps=steps,
        seed=seed,
    )
    return_losses(model)
    data, started = tokens_of(task, "train", ROWS), time.process_time()
    losses = train(model, data, settings)
    training = time.process_time() - started
    loss = mean_loss(model, tokens_of(task, "validation", scored))
    del model.forward  # the class's own again, which gives logits
    accuracy = {part: exact_match(model, problems(task, part, scored)) for part in ("validation", "test")}
    return {
        "task": task,
        "method": method,
        "rate": rate,
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in trained),
        "magnitudes": sum(parameter.numel() for parameter in trained if parameter.dim() == 1 and method == "dora"),
        "steps": len(losses),
        "validation": {"accuracy": accuracy["validation"], "loss": loss},
        "test": {"accuracy": accuracy["test"]},
        "curve": [statistics.mean(losses[at : at + INTERVAL]) for at in range(0, len(losses), INTERVAL)],
        "training cpu seconds": training,
        "seconds": time.perf_counter() - began,
        "cpu seconds": time.process_time() - began_cpu,
    }
