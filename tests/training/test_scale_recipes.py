"""Recipes of models that nothing here can hold: their batches and ZeRO-3 settings suit the GPUs that they name."""

import importlib
import re

import pytest

from abba.base_model import DTYPES
from abba.errors import RecipeError
from abba.sharded.engine import engine_config
from abba.sharded.ranks import Ranks, accumulation_steps
from abba.training.recipe import load_recipe
from tests.training.test_recipe import SHIPPED
from tests.warm import ROOT

ROWS = 7_473  # of GSM8K
HPZ = "deepspeed.zero_optimization.zero_hpz_partition_size={}"
OFFLOAD = "deepspeed.zero_optimization.offload_param={device: cpu, pin_memory: true}"
LLAMA_70B, QWEN_32B = (8192, 28672, 8 * 128), (5120, 27648, 8 * 128)  # hidden, mlp, keys or values of all heads


def configured(name, world, on_node, *overrides):
    """(micro-batches a step, DeepSpeed's configuration)"""
    recipe = load_recipe(name, list(overrides), SHIPPED)
    settings = recipe.train
    micro = settings.per_device_train_batch_size
    accumulation = accumulation_steps(settings.global_batch_size, micro, world)
    ranks = Ranks(0, world, 0, on_node)
    assert recipe.model.dtype == "auto"
    dtype = DTYPES["bfloat16"]  # as on every GPU
    return accumulation, engine_config(dtype, micro, accumulation, 1.0, recipe.deepspeed, ranks)["zero_optimization"]


@pytest.mark.parametrize(
    "name, shape, world, overrides, micro_batches",
    [
        ("llama70b_gsm8k", LLAMA_70B, 8, [], 2),
        ("llama70b_gsm8k", LLAMA_70B, 16, [HPZ.format(8)], 1),
        ("llama70b_gsm8k", LLAMA_70B, 8, [OFFLOAD], 2),
        ("metamath_llama70b", LLAMA_70B, 16, [], 1),
        ("metamath_llama70b", LLAMA_70B, 8, [HPZ.format(1)], 2),
        ("gsm8k_qwen2.5_32b", QWEN_32B, 8, [], 2),
        ("gsm8k_qwen2.5_32b", QWEN_32B, 16, [HPZ.format(8)], 1),
    ],
)
def test_batches_and_limits_suit_the_hardware_that_is_named(name, shape, world, overrides, micro_batches):
    accumulation, zero = configured(name, world, 8, *overrides)
    assert accumulation == micro_batches
    hidden, mlp, kv = shape
    layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * mlp
    assert layer < zero["stage3_prefetch_bucket_size"] < 1.1 * layer, "the whole next layer, and no more"
    assert 2 * layer < zero["stage3_max_live_parameters"] < 3 * layer
    assert zero["stage3_max_reuse_distance"] == 0


def test_checkpoints_that_examples_name_are_there_when_the_run_has_ended():
    recipe = load_recipe("gsm8k", [], SHIPPED)
    every, last = recipe.checkpoint.save_steps, -(-ROWS // recipe.train.global_batch_size)
    kept = [*range(every, last, every), last][-recipe.checkpoint.save_total_limit :]
    texts = [path.read_text() for path in (ROOT / "README.md", *(ROOT / "launch").glob("*.py"))]
    named = {int(step) for text in texts for step in re.findall(r"runs/gsm8k/checkpoints/step-(\d+)", text)}
    assert named and named <= set(kept)


def test_the_largest_micro_batch_that_the_ranks_can_share_is_named_first():
    for micro, largest in ((8, 4), (3, 2), (5, 4)):
        said = f"micro-batches of {micro}; set train.per_device_train_batch_size={largest}, or make it a multiple of"
        with pytest.raises(RecipeError, match=said):
            accumulation_steps(32, micro, 8)
    with pytest.raises(RecipeError, match="micro-batches of 8; make it a multiple of 24; .* can be 1, 2, 4$"):
        accumulation_steps(32, 8, 3)


@pytest.mark.parametrize("name, world, overrides", [("metamath_llama70b", 8, []), ("llama70b_gsm8k", 12, [])])
def test_other_numbers_of_gpus_are_refused(name, world, overrides):
    with pytest.raises(RecipeError, match="set it to 1|the number of ranks can be 1, 2, 4, 8, 16"):
        configured(name, world, 8, *overrides)


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "deepspeed.zero_optimization.leaf_module={classes: [LlamaDecoderLayer]}",
            "leaf_module cannot be set here: whole layers gathered",
        ),
        (
            "deepspeed.zero_optimization.stage3_module_granularity_threshold=10000",
            "stage3_module_granularity_threshold cannot be set here: it gathers whole layers",
        ),
        (HPZ.format("eight"), "zero_hpz_partition_size: 'eight': Input should be a valid integer"),
        (HPZ.format(-8), "zero_hpz_partition_size: -8: Input should be greater than or equal to 0"),
        (HPZ.format(5), "zero_hpz_partition_size: 5 does not divide the 16 ranks; set it to 1 or 8"),
        (HPZ.format(4), "zero_hpz_partition_size: 4 is not the 8 ranks of this node; set it to 1 or 8"),
        (HPZ.format(16), "zero_hpz_partition_size: 16 is not the 8 ranks of this node; set it to 1 or 8"),
        (
            "deepspeed.zero_optimization.offload_param.device=nvme",
            "offload_param.device: nvme is not supported; write cpu",
        ),
        ("deepspeed.zero_optimization.offload_param.device=disk", "offload_param.device: 'disk'"),
        (
            "deepspeed.zero_optimization.module_granularity_threshold=10000",
            "zero_optimization.module_granularity_threshold cannot be set here: it gathers whole layers",
        ),
        (
            "deepspeed.zero_optimization.param_persistence_threshold=100000",
            "zero_optimization.param_persistence_threshold cannot be set here: replicated are the factors",
        ),
        (
            "deepspeed.zero_optimization.cpu_offload_param=true",
            "zero_optimization.cpu_offload_param cannot be set here: an old name for offload_param",
        ),
        ("deepspeed.zero_optimization.zenflow={}", "zenflow cannot be set here"),
        ("deepspeed.tensorboard=true", "deepspeed.tensorboard: True is no section; write {enabled: true}"),
        ("deepspeed.tensorboard.paths=runs/tb", "deepspeed.tensorboard.paths: DeepSpeed knows no such key"),
        ("deepspeed.comms_logger.enabled=perhaps", "comms_logger.enabled: 'perhaps': Input should be a valid"),
        ("deepspeed.timers={throughput: true}", "deepspeed.timers: "),
        ("deepspeed.steps_per_print=often", "deepspeed.steps_per_print: 'often' is no whole number"),
    ],
)
def test_a_layout_that_does_not_suit_is_one_line(override, said):
    with pytest.raises(RecipeError) as error:
        configured("llama70b_gsm8k", 16, 8, override)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_tracker_that_is_not_installed_is_named_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    for _ in range(2):
        with pytest.raises(RecipeError, match="deepspeed.wandb: wandb is not installed; pip install wandb"):
            configured("llama70b_gsm8k", 8, 8, "deepspeed.wandb={enabled: true, project: p}")
        (tmp_path / "wandb").mkdir(exist_ok=True)  # as a run leaves it, beside which Python takes it for a package
        importlib.invalidate_caches()
    configured("llama70b_gsm8k", 8, 8, "deepspeed.wandb={enabled: false}")
