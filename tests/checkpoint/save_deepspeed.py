"""One rank that trains tiny models on the real engine and has DeepSpeed save them in its own format.

RANK=0 WORLD_SIZE=2 ... python tests/checkpoint/save_deepspeed.py DIRECTORY CASES.json

Each case lands in DIRECTORY/NAME/saved. Beside it, expected.safetensors has what the engine itself gathers as its fp32
masters, and frozen.json the shapes of its frozen parameters.
"""

import json
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from torch import nn

from abba.adapter.config import AdapterConfig
from abba.adapter.linear import AbbaLinear
from abba.sharded.process_group import start_process_group
from abba.sharded.ranks import ranks_from_environment

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Tiny(nn.Module):
    """Odd sizes: no tensor divides by 2 or 4, some have fewer elements than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("offset", torch.full((11,), 0.5))
        self.embed = nn.Linear(5, 13).requires_grad_(False)
        self.abba = AbbaLinear(13, 11, config=AdapterConfig(3, 2, 8.0, ("abba",)))
        self.gain = nn.Parameter(torch.ones(11))
        self.cube = nn.Parameter(torch.randn(3, 1, 7))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.abba(torch.tanh(self.embed(x))) * self.gain + self.offset.to(x.dtype)
        return (hidden.square().mean() * self.one).sum() + self.cube.square().sum()


class Wrapped(nn.Module):
    """As torch's own wrappers do: every name starts with `module.`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Tiny()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)


def save(directory: Path, case: dict, rank: int) -> None:
    torch.manual_seed(7)
    model = Wrapped() if case.get("wrapped") else Tiny()
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [trainable]
    if case.get("groups") == 2:  # interleaved, so that the stored order is not the model's
        groups = [trainable[1::2], trainable[::2]]
    optimizer = torch.optim.AdamW([{"params": group, "lr": 1e-2 * (1 + i)} for i, group in enumerate(groups)])
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0}
    zero |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, "reduce_bucket_size": 1000}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {**zero, **case.get("zero", {})}}
    config |= {**case.get("config", {}), "steps_per_print": 1_000_000_000}
    dtype = DTYPES[case["dtype"]]
    if dtype != torch.float32:
        config[case["dtype"]] = {"enabled": True}
    if dtype == torch.float16:
        get_accelerator().is_fp16_supported = lambda: True  # it only knows the CPU's matrix units; torch computes it
        config["fp16"]["initial_scale_power"] = 4
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(2):
        generator = torch.Generator().manual_seed(100 * step + rank)
        engine.backward(engine(torch.randn(4, 5, generator=generator).to(dtype)))
        engine.step()
    engine.save_checkpoint(str(directory / "saved"), exclude_frozen_parameters=case.get("exclude_frozen", True))
    masters = {n: safe_get_full_fp32_param(p) for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in model.named_parameters() if not p.requires_grad}
    if rank == 0:
        save_file({name: value.detach().clone() for name, value in masters.items()}, directory / "expected.safetensors")
        (directory / "frozen.json").write_text(json.dumps(frozen))


if __name__ == "__main__":
    root, cases = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    ranks = ranks_from_environment()
    start_process_group(ranks)
    for name, case in cases.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        save(root / name, case, ranks.rank)
