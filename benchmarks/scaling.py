#!/usr/bin/env python
"""What ranks and layers cost a training step under ZeRO-3: its time, and bytes gathered and reduced, against the plan.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --ranks 1 2 --layers 2 4 --repetitions 3

The global batch is the same at every number of ranks. Weights are random; as with a large model, none is kept or
fetched ahead. Bytes are those of the last step of a rank, counted in DeepSpeed's calls of torch; each step must move as
many. One process of several ranks uses the threads that its share of the cores allows.
"""

import argparse
import json
import math
import os
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import RESULTS, in_turns, write
from ranks import run_ranks
from torch import Tensor

from abba.adapter.config import AdapterConfig
from abba.base_model import DTYPE_CHOICES, DTYPES, choose_dtype
from abba.planning.architecture import architecture_of
from abba.planning.job import Cluster, Job, Sharding
from abba.planning.plan import plan

SHOWS = "{cores} cores are shared by all ranks: more ranks show what sharding costs (bytes, waiting), not what it gains"
SETTLED = 2  # steps in which DeepSpeed learns the order of the modules, and gathers more
GLOBAL_BATCH = 4
ADAPTER = AdapterConfig(r1=16, r2=16, alpha=24.0)
NOTHING_STAYS = {"stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}


def shape(layers: int, hidden: int) -> dict[str, Any]:
    """A Llama with the proportions of Llama-3.1-8B."""
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 7 // 2, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": hidden // 8}
    return {"model_type": "llama", **sizes, **heads, "vocab_size": 8 * hidden, "tie_word_embeddings": False}


def job(config: dict[str, Any], ranks: int, tokens: int, dtype: str) -> Job:
    """The same step as the planner takes it."""
    nothing_ahead = Sharding(prefetch=0, max_live=0)
    return Job(
        architecture_of(config, "benchmark"), ADAPTER, ranks, GLOBAL_BATCH, 1, tokens,
        "reentrant", element_bytes=DTYPES[dtype].itemsize, sharding=nothing_ahead,
    )  # fmt: skip


def engine_of(
    config: dict[str, Any], ranks: Any, dtype: torch.dtype, micro_batch: int, accumulation: int, checkpointing: str
) -> Any:
    """The engine as launch/train.py builds it, with random values where that reads files."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.integrations.deepspeed import prevent_arange_dtype_change

    from abba.adapter.initialize import Factors
    from abba.adapter.inject import factor_shapes, find_targets, inject
    from abba.sharded.engine import engine_config, start_engine
    from abba.sharded.loading import partitioned_from_birth
    from abba.training.loss import return_losses
    from abba.training.model import enable_checkpointing

    extra = {"zero_optimization": NOTHING_STAYS}
    zero = engine_config(dtype, micro_batch, accumulation, 1.0, extra, ranks)
    architecture = AutoConfig.for_model(**config)
    with prevent_arange_dtype_change(), no_init_weights(), partitioned_from_birth(zero):
        model = AutoModelForCausalLM.from_config(
            architecture, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    for parameter in model.parameters():
        parameter.ds_tensor.normal_(std=0.02) if len(parameter.ds_shape) > 1 else parameter.ds_tensor.fill_(1)
    torch.manual_seed(0)  # factors are the same on every rank
    random = {
        name: Factors(*(torch.randn(size) * 0.02 for size in factor_shapes(linear, ADAPTER)))
        for name, linear in find_targets(model, ADAPTER).items()
    }
    inject(model, ADAPTER, factors=random)
    return_losses(model)
    masters = {f"{name}.{key}": value for name, four in random.items() for key, value in four._asdict().items()}

    def read(kind: str, name: str, start: int, stop: int) -> Tensor:
        return masters[name].flatten()[start:stop]

    engine = start_engine(model, zero, {"lr": 1e-4}, read)
    enable_checkpointing(model, checkpointing)
    return engine


def inputs_of(ids_LT: Tensor) -> tuple[Tensor, ...]:
    """What our model takes: tokens, positions, the places that predict, and what: here all, the next token; lengths."""
    positions_LT = torch.arange(ids_LT.shape[1], device=ids_LT.device).expand_as(ids_LT)
    predictors_S = torch.arange(ids_LT.numel(), device=ids_LT.device)
    return ids_LT, positions_LT, predictors_S, ids_LT.roll(-1, dims=1).flatten(), (ids_LT.shape[1],) * len(ids_LT)


def train_on_this_rank(layers: list[int], hidden: int, tokens: int, dtype: str, repetitions: int, result: Path) -> None:
    import torch.distributed as dist
    from counting import count_communication

    from abba.sharded.process_group import start_process_group
    from abba.sharded.ranks import ranks_from_environment
    from abba.sharded.waiting import WaitClock

    ranks = ranks_from_environment()
    device, moved = start_process_group(ranks), count_communication()
    found: dict[int, dict[str, list]] = {count: {"gathered": [], "reduced": [], "waited": []} for count in layers}

    def step(engine: Any, clock: WaitClock, kept: dict[str, list], inputs: tuple[Tensor, ...]) -> None:
        moved.clear()
        clock.start()
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(*inputs) / tokens)
            engine.step()
        for name, value in (("gathered", moved["gathered"]), ("reduced", moved["reduced"]), ("waited", clock.stop())):
            kept[name].append(value)

    cases = {}
    for count in layers:
        config = shape(count, hidden)
        engine = engine_of(config, ranks, DTYPES[dtype], 1, GLOBAL_BATCH // ranks.world_size, "reentrant")
        engine.train()
        ids = torch.randint(config["vocab_size"], (1, tokens), device=device)
        cases[count] = partial(step, engine, WaitClock(engine, device), found[count], inputs_of(ids))
    dist.barrier()
    seconds = in_turns(cases, repetitions, warmup=SETTLED, enough=math.inf)  # steps are collective: no rank sits out
    for count, kept in found.items():
        found[count] = {name: values[SETTLED:] for name, values in kept.items()} | {"seconds": seconds[count]}
    result.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def row(
    count: int, ranks: int, hidden: int, tokens: int, dtype: str, runs: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    """`runs`: what every rank found, for each start."""
    every = [rank[str(count)] for run in runs for rank in run]
    seconds = [max(times) for run in runs for times in zip(*(rank[str(count)]["seconds"] for rank in run), strict=True)]
    moved = {name: {value for rank in every for value in rank[name]} for name in ("gathered", "reduced")}
    assert all(len(values) == 1 for values in moved.values()), f"steps or ranks differ in what they move: {moved}"
    (gathered,), (reduced,) = moved["gathered"], moved["reduced"]
    planned = plan(job(shape(count, hidden), ranks, tokens, dtype), Cluster(gpus_per_node=ranks)).traffic
    waited = median(seconds for rank in every for seconds in rank["waited"])
    return {
        "ranks": ranks,
        "layers": count,
        "s": median(seconds),
        "tokens/s": GLOBAL_BATCH * tokens / median(seconds),
        "waiting s": waited,
        "gathered MB": gathered / 1e6,
        "planned": planned.gathered / 1e6,
        "reduced MB": reduced / 1e6,
        "planned, reduced": planned.reduced / 1e6,
        "counted as planned": (gathered, reduced) == (planned.gathered, planned.reduced),
        "seconds": seconds,
        "found": every,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, choices=[1, 2, 4], default=[1, 2, 4])
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4, 8])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=256, help="of each of the 4 rows")
    parser.add_argument("--dtype", choices=DTYPE_CHOICES, default="auto")
    parser.add_argument("--repetitions", type=int, default=5, help="steps of each start")
    parser.add_argument("--starts", type=int, default=1, help="of every number of ranks, in turns")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--rank-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        settings, result = arguments.rank_of
        return train_on_this_rank(**json.loads(settings), result=Path(result))
    kept = {key: getattr(arguments, key) for key in ("layers", "hidden", "tokens", "repetitions")}
    kept["dtype"], _ = choose_dtype(arguments.dtype)
    runs: dict[int, list] = {ranks: [] for ranks in arguments.ranks}
    for _ in range(arguments.starts):
        for ranks in arguments.ranks:
            runs[ranks].append(run_ranks(__file__, [json.dumps(kept)], ranks))
    sizes = [kept[key] for key in ("hidden", "tokens", "dtype")]
    rows = [row(c, n, *sizes, runs[n]) for n in arguments.ranks for c in arguments.layers]
    for one in rows:
        least = next(r for r in rows if r["ranks"] == one["ranks"] and r["layers"] == min(kept["layers"]))
        more = one["layers"] - least["layers"]
        one["s a further layer"] = (one["s"] - least["s"]) / more if more else ""
    settings = {**kept, "starts": arguments.starts}
    note = SHOWS.format(cores=os.cpu_count())
    write("scaling", " ".join(["python", *sys.argv]), settings, rows, arguments.output, note)
    return None


if __name__ == "__main__":
    main()
