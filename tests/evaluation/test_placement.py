"""Which engine, on how many GPUs: worked by hand for the 70B and the 8B, and every refusal."""

import pytest

from abba.errors import ArgumentError
from abba.evaluation.placement import Demand, Gpus, choose, kv_cache_bytes, tensor_parallel_size

GB = 10**9
# 32 sequences of 200 + 512 tokens: 80 layers x 2 x 8 heads x 128 x 2 bytes = 327,680 bytes a token.
KV_70B = 327_680 * 32 * 712
SIDES_70B = 414_187_520 // 32 * 2  # the sum of out + in over all modules, in bf16
LAYER_70B, EMBEDDING_70B = 1_711_308_800, 128_256 * 8192 * 2
SEVENTY = {
    "transformers": Demand(141_107_412_992, KV_70B, SIDES_70B * 32, EMBEDDING_70B),
    "vllm": Demand(141_107_412_992, KV_70B, replicated=SIDES_70B * 256),
}
EIGHT = {name: Demand(16_060_522_496, 131_072 * 32 * 712, 0, GB) for name in ("transformers", "vllm")}


def free(count, size, taken=GB // 2):
    return Gpus(count, size * GB, size * GB - taken)


def over(gpus, **limits):
    return {"transformers": gpus.count, "vllm": gpus.count, **limits}


def test_the_kv_cache_of_the_70b_by_hand():
    assert kv_cache_bytes(80, 8, 128, 32, 712, 2) == KV_70B == 7_465_861_120


@pytest.mark.parametrize(
    "wanted, refusal, engine, how",
    [
        ("auto", None, "vllm", "vllm over 8 GPUs (tensor parallel)"),
        ("vllm", None, "vllm", "vllm over 8 GPUs (tensor parallel)"),
        ("transformers", None, "transformers", "transformers over 8 GPUs (device_map)"),
        ("auto", "not installed", "transformers", "transformers over 8 GPUs (device_map); not installed"),
    ],
)  # fmt: skip
def test_the_70b_takes_all_of_a_node(wanted, refusal, engine, how):
    gpus = free(8, 80)
    placement = choose(wanted, gpus, over(gpus), SEVENTY, refusal)
    assert (placement.engine, placement.gpus) == (engine, 8)
    assert placement.line == f"model: 141.11 GB of weights, 8 GPUs of 80.00 GB: {how}"


def test_one_gpu_is_enough_where_the_model_fits():
    gpus = free(8, 80)
    placement = choose("auto", gpus, over(gpus), EIGHT, None)
    assert (placement.engine, placement.gpus) == ("vllm", 1)
    assert placement.line.endswith("8 GPUs of 80.00 GB: vllm on one")
    assert choose("auto", free(2, 16), over(free(2, 16)), EIGHT, "x").gpus == 2


def test_without_a_gpu_transformers_computes_on_the_cpu_unless_vllm_is_asked_for():
    nothing = Gpus(0, 0, 0)
    for wanted, engine in (("auto", "transformers"), ("transformers", "transformers"), ("vllm", "vllm")):
        placement = choose(wanted, nothing, over(nothing), EIGHT, None)
        assert (placement.engine, placement.gpus) == (engine, 0)
        assert placement.line == f"model: 16.06 GB of weights, no GPU: {engine} on the CPU"


def test_what_vllm_cannot_hold_transformers_may_and_the_line_says_so():
    # 141.1 + 7.5 GB over 8 are 18.6; of 24 GB 21.1 are usable; vLLM has its LoRA of 6.6 GB on each besides.
    gpus = free(8, 24)
    placement = choose("auto", gpus, over(gpus), SEVENTY, None)
    assert (placement.engine, placement.gpus) == ("transformers", 8)
    needs = "vllm needs 25.20 GB on each of 8, KV cache of 7.47 GB included, and can use 21.10 GB"
    assert placement.line.endswith(f"transformers over 8 GPUs (device_map); {needs}")


@pytest.mark.parametrize("wanted", ["auto", "vllm", "transformers"])
def test_what_fits_nowhere_is_one_line_with_the_way_out(wanted):
    gpus = free(2, 80)
    with pytest.raises(ArgumentError) as error:
        choose(wanted, gpus, over(gpus), SEVENTY, None)
    said = str(error.value)
    assert "141.11 GB of weights, there are 2 GPUs of 80.00 GB" in said and "smaller batch size" in said
    assert ("transformers needs" in said) == (wanted != "vllm") and ("vllm needs" in said) == (wanted != "transformers")
    assert "\n" not in said and error.value.exit_code == 64


def test_ranks_that_see_a_gpu_each_are_told_to_be_one_process():
    gpus, said = free(1, 80), {}
    for ranks in (1, 8):
        with pytest.raises(ArgumentError, match="there is 1 GPU of 80.00 GB") as error:
            choose("auto", gpus, over(gpus), SEVENTY, None, ranks)
        said[ranks] = str(error.value)
    assert "; each of 8 ranks has its own; start it as one process, which takes all GPUs of the node, or use" in said[8]
    assert "; use more or larger GPUs" in said[1] and "one process" not in said[1]


def test_memory_that_others_hold_counts_as_gone():
    gpus = free(8, 80, taken=55 * GB)
    with pytest.raises(ArgumentError, match=r"can use 17\.00 GB"):
        choose("transformers", gpus, over(gpus), SEVENTY, None)
    assert Gpus(1, 80 * GB, GB).usable == 0


def test_weights_leave_room_for_the_cache_of_their_layers():
    demand = Demand(weights=80, kv_cache=15, adapter=5)
    assert demand.for_weights(usable=50) == 40  # 80 / 100 of it


@pytest.mark.parametrize(
    "gpus, heads, kv_heads, width, size",
    [(8, 64, 8, 28672, 8), (6, 64, 8, 28672, 4), (16, 64, 8, 28672, 16), (8, 28, 4, 18944, 4), (3, 9, 3, 1536, 3),
     (4, 9, 3, 1535, 1), (0, 32, 8, 14336, 1)],
)  # fmt: skip
def test_tensor_parallelism_divides_heads_and_mlp(gpus, heads, kv_heads, width, size):
    assert tensor_parallel_size(gpus, heads, kv_heads, width) == size
