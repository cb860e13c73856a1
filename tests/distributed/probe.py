"""launch/train.py as one rank, watched from outside: what was read, gathered, kept and rounded.

RANK=0 WORLD_SIZE=2 ... python tests/distributed/probe.py RESULT.json --recipe ... [key=value ...]
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
import train as program
from counting import count_communication, count_reads
from deepspeed.runtime.zero.partition_parameters import Init, ZeroParamStatus
from deepspeed.utils import safe_get_local_fp32_param

import abba.adapter.linear
import abba.sharded.engine
import abba.sharded.initialize
import abba.sharded.replicated
import abba.training.loop
import abba.training.start

FACTORS = ("A1", "B1", "A2", "B2")
result = {
    "gathered_factors": [],
    "gathered_base": [],
    "resident_2d": [],
    "stale_factors": [],
    "buffers": {},
    "svd": {},
    "svds": 0,
    "layer_forwards": [],
    "refresh_gathers": [],
    "factor_copies": 0,
    "gathered_bytes": [],
    "reduced_bytes": [],
    "allocated_bytes": {},
    "most_live_elements": 0,
}
gathers: Counter[str] = Counter()
forwards: Counter[str] = Counter()
read, moved = count_reads(), count_communication()


def watch_engine() -> None:
    start = abba.sharded.engine.start_engine

    def started(model, *arguments):
        result["base_elements"] = sum(p.ds_numel for p in model.parameters() if not p.requires_grad)
        result["held_elements"] = sum(p.ds_tensor.numel() for p in model.parameters() if not p.requires_grad)
        result["base_parameters"] = sum(not p.requires_grad for p in model.parameters())
        frozen = [p for p in model.parameters() if not p.requires_grad]
        result["copy_elements"] = sum(
            p.ds_secondary_tensor.numel() for p in frozen if p.ds_secondary_tensor is not None
        )
        engine = start(model, *arguments)
        watch_copies()
        result["offload_param"] = engine.optimizer.offload_param
        result["stale_factors"].append(stale_factors(engine))
        first = engine.optimizer.parameter_offload.persistent_parameters[0]
        first.all_gather()  # as DeepSpeed calls it for this one alone
        first.all_gather(param_list=[first])
        watch_gathers(engine)
        result["buffers"] = {name: str(buffer.dtype) for name, buffer in engine.module.named_buffers()}
        result["masters"] = {
            key.removeprefix("master/"): digest(value) for key, value in abba.sharded.engine.local_masters(engine)
        }
        rounded = [
            torch.equal(value, value.bfloat16().float())
            for key, value in abba.sharded.engine.local_masters(engine)
            if not key.endswith(".B2") and value.numel() > 8
        ]
        result["masters_equal_to_their_bf16"] = sum(rounded)
        return engine

    abba.sharded.engine.start_engine = started


def watch_refreshes() -> None:
    gather_whole = abba.sharded.replicated.gather_whole

    def counted(parameters):
        before = moved["gathers"]
        gather_whole(parameters)
        result["refresh_gathers"].append(moved["gathers"] - before)

    abba.sharded.replicated.gather_whole = counted


def watch_copies() -> None:
    """Further partitions that hierarchical partitioning makes of what trains."""
    copy = Init._partition_param_sec

    def counted(self, parameter, *arguments, **named):
        result["factor_copies"] += parameter.requires_grad
        copy(self, parameter, *arguments, **named)

    Init._partition_param_sec = counted


def watch_gathers(engine) -> None:
    names = {id(p): name for name, p in engine.module.named_parameters()}
    matrices = [p for p in engine.module.parameters() if not p.requires_grad and len(p.ds_shape) > 1]
    coordinator = type(engine.optimizer.parameter_offload.get_param_coordinator())
    gather = coordinator._PartitionedParameterCoordinator__all_gather_params

    def counting(self, params, forward):
        params = set(params)
        gathers.update(names[id(p)] for p in params if p.ds_status == ZeroParamStatus.NOT_AVAILABLE)
        done = gather(self, params, forward)
        live = sum(p.ds_numel for p in matrices if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        result["most_live_elements"] = max(result["most_live_elements"], live)
        return done

    coordinator._PartitionedParameterCoordinator__all_gather_params = counting

    step = abba.training.loop.optimizer_step

    def counted(engine, *arguments):
        gathers.clear()
        forwards.clear()
        moved.clear()
        outcome = step(engine, *arguments)
        result["layer_forwards"].append(forwards.total())
        result["gathered_factors"].append(sum(n for name, n in gathers.items() if name.endswith(FACTORS)))
        result["gathered_base"].append(sum(n for name, n in gathers.items() if not name.endswith(FACTORS)))
        result["resident_2d"].append(sum(p.data.numel() for p in matrices))
        result["stale_factors"].append(stale_factors(engine))
        result["gathered_bytes"].append(moved["gathered"])
        result["reduced_bytes"].append(moved["reduced"])
        result["allocated_bytes"] = allocated(engine)
        return outcome

    abba.training.loop.optimizer_step = counted


def stale_factors(engine) -> int:
    """Factors whose copy, of which a gather would be made or was made, is not their master in the model's dtype."""
    stale = 0
    for p in engine.module.parameters():
        if p.requires_grad:
            world, rank = p.ds_zero_partition_world_size, p.ds_zero_partition_rank
            start, stop = abba.sharded.engine.slice_bounds(p.ds_numel, rank, world)
            master = safe_get_local_fp32_param(p)[: stop - start].to(p.dtype)
            fresh = torch.equal(p.data.flatten()[start:stop], master) and p.ds_secondary_tensor is None
            stale += not fresh
    return stale


def allocated(engine) -> dict[str, int]:
    """Bytes of the storages that ZeRO-3 keeps, each counted once."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    state = [value for of_one in optimizer.optimizer.state.values() for name, value in of_one.items() if name != "step"]
    shared = [p for p in parameters if p.requires_grad or len(p.ds_shape) == 1]
    seen: set[int] = set()  # the partition of a rank alone is the parameter

    def size(tensors) -> int:
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
        new = storages.keys() - seen
        seen.update(new)
        return sum(storages[pointer] for pointer in new)

    return {
        "base shard": size(p.ds_tensor for p in parameters if not p.requires_grad),
        "hpz second copy": size(p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None),
        "factors and norms": size([p.ds_tensor for p in parameters if p.requires_grad] + [p.data for p in shared]),
        "gradients": size([optimizer.grad_partitions_flat_buffer]),
        "masters and moments": size([*optimizer.fp32_partitioned_groups_flat, *state]),
        "reduce bucket": size(bucket.buffer for bucket in optimizer.ipg_buckets.values()),
    }


def watch_layers() -> None:
    forward = abba.adapter.linear.AbbaLinear.forward

    def counting(self, input):
        forwards["all"] += 1
        return forward(self, input)

    abba.adapter.linear.AbbaLinear.forward = counting


def watch_svd() -> None:
    find = abba.training.start.starting_factors

    def found(*arguments):
        factors = find(*arguments)
        result["svd"] = {name: digest(torch.cat([f.flatten() for f in four])) for name, four in factors.items()}
        return factors

    abba.training.start.starting_factors = found
    decompose = abba.sharded.initialize.initial_factors

    def counted(*arguments):
        result["svds"] += 1
        return decompose(*arguments)

    abba.sharded.initialize.initial_factors = counted


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    output = Path(sys.argv.pop(1))
    watch_engine()
    watch_refreshes()
    watch_svd()
    watch_layers()
    code = program.main()
    result["bytes_read"] = sum(count for name, count in read.items() if name.startswith("model"))
    output.write_text(json.dumps(result))
    sys.exit(code)
