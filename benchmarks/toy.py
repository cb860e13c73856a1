"""The two-layer toy: a perceptron that has learned the digits 0-7 learns 8 and 9, in full or through an adapter.

The adapters are the product's own AbbaLinear, and PEFT's LoRA of as many parameters. Goal "new": rows of 8 and 9 alone;
goal "all": of all ten digits. A run follows from its seed, but for the split of the rows, which is the same for all.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from abba.adapter.config import AdapterConfig
from abba.adapter.inject import inject

LAYERS = ("hidden", "output")
FIRST_NEW = 8  # 0-7 are known, 8 and 9 are new
BATCH, BASE_STEPS, BASE_RATE = 32, 600, 3e-3
ALPHA = 4.0  # of ABBA; the rate is swept, LoRA's alpha is its rank


class Rows(NamedTuple):
    x: Tensor  # (rows, 64) in 0..1
    y: Tensor  # (rows,) 0..9


class Perceptron(nn.Module):
    """64 pixels, 64 hidden units, ten classes."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.hidden, self.output = nn.Linear(64, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(F.relu(self.hidden(x)))


@cache
def digits(part: str, which: str = "all") -> Rows:
    """scikit-learn's 1,797 digits: of "train" (60%), "validation" or "test" (20% each), the old, the new or all."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    fifth = len(y) // 5
    parts = {"validation": shuffled[:fifth], "test": shuffled[fifth : 2 * fifth], "train": shuffled[2 * fifth :]}
    rows = Rows(x[parts[part]], y[parts[part]])
    wanted = {"old": rows.y < FIRST_NEW, "new": rows.y >= FIRST_NEW, "all": rows.y >= 0}[which]
    return Rows(rows.x[wanted], rows.y[wanted])


def train(
    model: nn.Module, rows: Rows, rate: float, steps: int, seed: int, every: int = 0, look: Callable | None = None
) -> None:
    """AdamW without decay, the rate falling linearly to 0; `look(step)` at step 0 and after every `every` steps."""
    generator = torch.Generator().manual_seed(seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        if every and step % every == 0:
            look(step)
        batch = torch.randint(len(rows.y), (BATCH,), generator=generator)
        F.cross_entropy(model(rows.x[batch]), rows.y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    if every:
        look(steps)


def base(seed: int) -> Perceptron:
    """Trained on 0-7 alone, with a head for ten."""
    torch.manual_seed(seed)
    model = Perceptron()
    train(model, digits("train", "old"), BASE_RATE, BASE_STEPS, seed)
    return model


def adapted(model: Perceptron, method: str, rank: int, seed: int) -> nn.Module:
    """`model` with what `method` trains: everything, LoRA of `rank`, or ABBA of r1 = r2 = rank / 2; biases stay."""
    if method == "abba":
        inject(model, AdapterConfig(rank // 2, rank // 2, alpha=ALPHA, target_modules=LAYERS), seed)
    elif method == "lora":
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS)))
    return model


@torch.no_grad()
def look_at(model: nn.Module, part: str, goal: str) -> dict[str, float]:
    """Loss and accuracy on the digits of the goal, and accuracy on the old ones; accuracies in percent."""
    rows, old = digits(part, goal), digits(part, "old")
    logits = model(rows.x)
    return {
        "loss": float(F.cross_entropy(logits, rows.y)),
        "accuracy": 100 * float((logits.argmax(1) == rows.y).float().mean()),
        "old": 100 * float((model(old.x).argmax(1) == old.y).float().mean()),
    }


def adapt(goal: str, method: str, rank: int, rate: float, seed: int, steps: int, every: int) -> dict[str, Any]:
    """One cell: validation and test after `steps`, and the test's curve."""
    began, began_cpu = time.perf_counter(), time.process_time()
    model = adapted(base(seed), method, rank, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    curve: list[dict[str, float]] = []
    rows = digits("train", goal)
    train(
        model, rows, rate, steps, seed, every, lambda step: curve.append({"step": step, **look_at(model, "test", goal)})
    )
    return {
        "goal": goal,
        "method": method,
        "rank": rank,
        "rate": rate,
        "seed": seed,
        "parameters": parameters,
        "validation": look_at(model, "validation", goal),
        "test": curve[-1],
        "curve": curve,
        "seconds": time.perf_counter() - began,
        "cpu seconds": time.process_time() - began_cpu,
    }
