"""The planner against the real engine: what ZeRO-3 allocates, gathers and reduces, to the byte."""

import json

import pytest
import torch
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import AutoTokenizer

from abba.base_model import DTYPES, choose_dtype
from abba.planning.job import Sharding
from abba.sharded.engine import engine_config
from abba.sharded.ranks import Ranks
from tests import warm
from tests.distributed.conftest import FAST, IN_BFLOAT16
from tests.distributed.ranks import TINY, probe
from tests.distributed.test_hierarchy import HPZ
from tests.distributed.test_hierarchy import SHORT as ON_NODES
from tests.faults.harness import beyond_ci, beyond_make_test
from tests.models import tiny_model

SETTLED = 2  # before that DeepSpeed records its trace of the model, and gathers more
# As sizes of a 70B are to its limits, those of tiny-llama are to these: something is fetched ahead, most is not.
SOME_AHEAD = [
    "deepspeed.zero_optimization.stage3_max_live_parameters=300000",
    "deepspeed.zero_optimization.stage3_max_reuse_distance=0",
    "deepspeed.zero_optimization.stage3_prefetch_bucket_size=50000",
]
SHORT = ["train.max_steps=4", "train.eval_steps=4", "data.max_rows=64", "data.eval_rows=4"]


def planned(directory, arguments, on_node, nodes=1):
    """What launch/plan.py --json says of the same recipe."""
    cluster = ["--nodes", str(nodes), "--gpus-per-node", str(on_node)]
    finished = warm.run(directory, "launch/plan.py", *arguments, *cluster, "--json")
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def assert_equal_to_plan(found, plan):
    for rank in found:
        assert rank["base_elements"] == plan["base_parameters"]
        for part, size in rank["allocated_bytes"].items():
            assert size == plan["gpu_memory_bytes"][part], part
        assert len(rank["gathered_bytes"]) > SETTLED
        assert set(rank["gathered_bytes"][SETTLED:]) == {plan["traffic_bytes_per_step"]["gathered_per_gpu"]}
        assert set(rank["reduced_bytes"][SETTLED:]) == {plan["traffic_bytes_per_step"]["reduced_per_gpu"]}


@pytest.mark.parametrize(
    "name, world, more",
    [
        ("world1", 1, []),
        ("world2", 2, []),
        ("world4", 4, []),
        ("bf16", 2, IN_BFLOAT16),
        ("selective", 2, [FAST, "train.gradient_checkpointing=selective"]),
        *(
            pytest.param(mode, 2, [FAST, f"train.gradient_checkpointing={mode}"], marks=beyond_make_test)
            for mode in ("none", "non_reentrant")
        ),
    ],
)
def test_a_plan_is_what_happens(tmp_path, runs, arguments, name, world, more):
    _, found = runs(name, world, *more)
    assert_equal_to_plan(found, planned(tmp_path, arguments("unused", *more), world))


def test_a_second_copy_on_two_nodes_of_two_ranks(tmp_path, runs, arguments):
    """The run of test_hierarchy.py."""
    _, found = runs("layout-hpz", 4, *ON_NODES, HPZ, nodes=2)
    assert_equal_to_plan(found, planned(tmp_path, arguments("unused", *ON_NODES, HPZ), 2, nodes=2))


@beyond_make_test
def test_what_is_gathered_at_once_stays_within_the_plan(tmp_path):
    """The embedded model on two ranks, with prefetching; its tied head is gathered like any other weight."""
    arguments = ["--recipe", "quickstart", f"output_dir={tmp_path / 'run'}", *SOME_AHEAD, *SHORT, FAST]
    arguments.append("train.per_device_train_batch_size=4")
    found = probe(2, tmp_path / "probe", arguments)
    plan = planned(tmp_path / "plan", arguments, 2)
    assert_equal_to_plan(found, plan)
    live = max(rank["most_live_elements"] for rank in found) * DTYPES[choose_dtype("auto")[0]].itemsize
    assert live <= plan["gpu_memory_bytes"]["gathered layers"] <= 1.5 * live


def test_gemmas_last_module_of_a_layer_is_a_norm(tmp_path, arguments):
    """So that all seven linears of a layer are gathered a third time. Two ranks share odd numbers of elements."""
    base = tmp_path / "base"
    shape = {"vocab_size": 640, "intermediate_size": 113, "bos_token_id": 1, "eos_token_id": 2}
    tiny_model("gemma2", **shape, tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(base)
    more = [f"model.name_or_path={base}", "model.attn_implementation=auto", *SHORT]
    found = probe(2, tmp_path / "probe", arguments(tmp_path / "run", *more))
    assert_equal_to_plan(found, planned(tmp_path / "plan", arguments("unused", *more), 2))


def test_defaults_are_those_of_the_engine():
    zero = DeepSpeedZeroConfig(**engine_config(torch.bfloat16, 1, 1, 1.0, {}, Ranks())["zero_optimization"])
    limits = (zero.prefetch_bucket_size, zero.max_live_parameters, zero.max_reuse_distance, zero.reduce_bucket_size)
    assert Sharding() == Sharding(zero.zero_hpz_partition_size, zero.offload_param is not None, *limits)


@pytest.fixture(scope="module")
def hundred_million(tmp_path_factory):
    """A random Llama of 103 million parameters, bf16 on disk."""
    directory = tmp_path_factory.mktemp("hundred-million")
    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    shape |= {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 16000, "bos_token_id": 1, "eos_token_id": 2}
    tiny_model(**shape, tie_word_embeddings=False).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("world", [pytest.param(1, marks=beyond_ci), 2, pytest.param(4, marks=beyond_ci)])
def test_a_plan_of_a_hundred_million_parameters_is_what_happens(tmp_path, arguments, hundred_million, world):
    more = [f"model.name_or_path={hundred_million}", "adapter.r1=16", "adapter.r2=16", "data.max_rows=16"]
    more += ["train.max_steps=3", "train.global_batch_size=4", "data.eval_rows=0", "train.eval_steps=null"]
    found = probe(world, tmp_path / "probe", arguments(tmp_path / "run", *more))
    plan = planned(tmp_path / "plan", arguments("unused", *more), world)
    assert plan["base_parameters"] > 100_000_000
    assert_equal_to_plan(found, plan)
