"""Whether a job fits, what would make it fit, and how traffic and time follow from the settings."""

from dataclasses import replace

import pytest

from abba import AdapterConfig
from abba.errors import RecipeError
from abba.planning.architecture import architecture_of
from abba.planning.explain import explain
from abba.planning.job import Cluster, Job, Sharding
from abba.planning.known_models import KNOWN
from abba.planning.memory import GIB
from abba.planning.plan import nearest, plan
from abba.planning.report import grid, table

NODE = Cluster()


def job(size="8B", **changes):
    name = f"meta-llama/Llama-3.1-{size}"
    planned = Job(architecture_of(KNOWN[name], name), AdapterConfig(), 8, 32, 4, 1024)
    return replace(planned, **changes)


def test_a_rank_alone_holds_the_base_and_gathers_nothing():
    alone = plan(job(), Cluster(gpus_per_node=1))
    assert alone.gpu["base shard"] == 8_030_261_248 * 2
    assert alone.gpu["gathered layers"] == alone.traffic.gathered == alone.traffic.within == 0
    assert alone.gpu["masters and moments"] == 83_886_080 * 12


def test_each_parameter_is_padded_on_its_own():
    three = job(gpus=3)
    assert (three.part(10), three.gathered(10), three.gathered(10, 10)) == (4, 12, 24)


@pytest.mark.parametrize("size, expected", [("8B", 0.128), ("70B", 0.065)])
def test_the_adapters_share_of_the_computing(size, expected):
    """8 R (O + I) over 6 O I of the linears, with recomputation, R = 256."""
    work = plan(job(size), NODE).flop
    assert work["adapter"] / work["base"] == pytest.approx(expected, abs=5e-4)
    plain = plan(job(size, checkpointing="none"), NODE).flop
    assert (work["base"], work["adapter"]) == (plain["base"] * 3 // 2, plain["adapter"] * 4 // 3)


def test_weights_are_gathered_as_often_as_checkpointing_asks():
    layers = 8_030_261_248 - 2 * 128256 * 4096 - 65 * 4096
    head, down, again = 128256 * 4096, 14336 * 4096 * 32, (83_886_080 + 65 * 4096) * 2
    gathered = {mode: plan(job(checkpointing=mode), NODE).traffic.gathered for mode in ("none", "reentrant")}
    # The head and the embedding, which is as large, in forward alone.
    assert gathered == dict.fromkeys(("none", "reentrant"), (2 * layers + 2 * head) * 2 + again)
    third = plan(job(checkpointing="non_reentrant"), NODE).traffic.gathered
    assert third - gathered["reentrant"] == (layers - down) * 2


def test_without_checkpointing_backward_ends_at_the_first_adapted_layer():
    half = AdapterConfig(layer_range=(16, 32))
    whole, upper = (plan(job(checkpointing="none", adapter=a), NODE).traffic for a in (AdapterConfig(), half))
    layer = job().architecture.layer_matrices
    factors = 83_886_080 // 2 * 2  # half of them, bf16, gathered after the update
    assert whole.gathered - upper.gathered == 16 * layer * 2 + factors


def test_selective_checkpointing_is_half_of_it():
    """Of memory, of what is computed again; 32 layers, the last one keeps all."""
    modes = {mode: plan(job(checkpointing=mode), NODE) for mode in ("none", "selective", "reentrant")}
    none, half, whole = (modes[mode].gpu["activations kept"] for mode in modes)
    assert half == (none + whole) // 2
    none, half, whole = (modes[mode].flop["base"] + modes[mode].flop["adapter"] for mode in modes)
    assert half == (none + whole) // 2
    assert modes["selective"].traffic.gathered == modes["reentrant"].traffic.gathered, "nothing a third time"
    upper = AdapterConfig(layer_range=(31, 32))  # a layer that is not computed again
    adapter = {mode: plan(job(checkpointing=mode, adapter=upper), NODE).flop["adapter"] for mode in modes}
    assert adapter["none"] == adapter["selective"] < adapter["reentrant"]


def test_of_checkpointing_the_least_that_fits_is_suggested():
    wanted = plan(job(checkpointing="none"), Cluster(gpu_memory_gib=24))
    assert "train.gradient_checkpointing=selective" in [text for text, _ in nearest(wanted)]
    tighter = plan(job(checkpointing="none"), Cluster(gpu_memory_gib=12))
    assert "train.gradient_checkpointing=reentrant" in [text for text, _ in nearest(tighter)]
    together = nearest(plan(job("70B", checkpointing="none"), Cluster(gpu_memory_gib=16)))
    keys = [change.partition("=")[0] for change in together[0][0].split()]
    assert len(keys) > 2 and len(set(keys)) == len(keys), together[0][0]


def test_packing_keeps_the_output_of_attention_twice_and_flash_attention_does_not():
    plain, packed = (plan(job(packing=p, checkpointing="none"), NODE).gpu["activations kept"] for p in (False, True))
    assert packed - plain == 4 * 1024 * 32 * 4096 * 2
    flash = [plan(job(packing=p, attention="flash_attention_2"), NODE).gpu for p in (False, True)]
    assert flash[0] == flash[1]


def test_a_second_copy_keeps_the_base_off_the_network():
    two = Cluster(nodes=2)
    plain = plan(job(micro_batch=2), two)
    second = plan(job(micro_batch=2, sharding=Sharding(hpz=8)), two)
    assert second.gpu["hpz second copy"] == 2 * plain.gpu["base shard"] == 2 * second.gpu["base shard"]
    assert second.traffic.gathered == plain.traffic.gathered
    factors_and_norms = (83_886_080 + 65 * 4096) * 2 + 83_886_080 * 4
    assert second.traffic.between == factors_and_norms / 2 < plain.traffic.between / 50
    assert second.times.likely < plain.times.likely and plain.limit == "network"


@pytest.mark.parametrize("per_node", [4, 8])
def test_the_table_takes_the_second_copy_of_each_size_of_node(per_node):
    wanted = job(micro_batch=1, sharding=Sharding(hpz=8))
    one, two = grid(wanted, Cluster(gpus_per_node=per_node), (per_node, 2 * per_node), (80,)).splitlines()[2:4]
    copied, plain = (
        plan(job(micro_batch=32 // (2 * per_node), sharding=Sharding(hpz=hpz)), Cluster(2, per_node))
        for hpz in (per_node, 1)
    )
    assert two == f"| {2 * per_node} | {copied.job.micro_batch} rows, {copied.gib:.1f} |" and copied.gib > plain.gib
    assert one.startswith(f"| {per_node} | {32 // per_node} rows, ")


def test_offload_moves_the_base_to_the_host_and_reads_it_from_there():
    there = plan(job(sharding=Sharding(offload=True)), NODE)
    here = plan(job(), NODE)
    assert there.gpu["base shard"] == 0 and here.host["base shards"] == 0
    assert there.host["base shards"] == 8 * here.gpu["base shard"]
    assert there.traffic.from_host > 0 == here.traffic.from_host


def test_one_gpu_reads_all_of_an_offloaded_base_twice_a_micro_batch():
    alone = plan(job("70B", sharding=Sharding(offload=True)), Cluster(gpus_per_node=1, gpu_memory_gib=1000))
    base = alone.job.base_parameters * 2 * alone.job.accumulation
    assert 1.9 * base < alone.traffic.from_host < 2 * base and alone.traffic.gathered == 0
    assert alone.limit == "host memory" and alone.times.likely > alone.times.host


def test_what_is_kept_for_a_second_use_is_a_layer_more_and_the_gathers_are_a_limit():
    jobs = [job(checkpointing="none", sharding=Sharding(reuse=reuse)) for reuse in (10**9, 0)]
    kept, not_kept = (plan(wanted, NODE) for wanted in jobs)
    more = kept.gpu["gathered layers"] - not_kept.gpu["gathered layers"]
    assert more == jobs[0].architecture.layer_matrices * 2 and kept.traffic == not_kept.traffic
    assert "; at most: stage3_max_reuse_distance" in explain(kept) and "at most:" not in explain(not_kept)


def test_the_table_names_the_gpus_that_it_counts_with():
    shown = grid(job(micro_batch=1, global_batch=48), Cluster(gpus_per_node=6), (4, 8, 16), (80,)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in shown] == ["| 4", "| 12", "| 18"]


def test_fp32_is_said_to_be_timed_as_bf16():
    shown = [table(plan(job(element_bytes=size), NODE), "x", None, 10) for size in (2, 4)]
    assert ["as if in bf16" in text for text in shown] == [False, True]


def test_the_least_time_is_a_bound():
    for cluster in (NODE, Cluster(nodes=4), Cluster(gpus_per_node=1), Cluster(nodes=2, inter_node_gbps=10)):
        for size in ("8B", "70B"):
            times = plan(job(size, micro_batch=1), cluster).times
            assert 0 < times.least < times.likely
            assert times.likely >= max(times.compute, times.network, times.host)


@pytest.mark.parametrize("size", ["8B", "70B"])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8])
@pytest.mark.parametrize("memory", [8, 24, 48, 80])
@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant"])
def test_what_is_suggested_fits_and_is_needed(size, gpus, memory, checkpointing):
    cluster = Cluster(nodes=2, gpus_per_node=gpus, gpu_memory_gib=memory)
    wanted = plan(job(size, checkpointing=checkpointing, micro_batch=2, sharding=Sharding(hpz=gpus)), cluster)
    suggestions = [] if wanted.fits else nearest(wanted)
    for text, other in suggestions:
        assert other.fits and other.gib <= other.cluster.gpu_memory_gib
        assert (other.job, other.cluster) != (wanted.job, wanted.cluster)
        smaller = other.job.micro_batch
        if text == f"train.per_device_train_batch_size={smaller}":
            assert not plan(replace(wanted.job, micro_batch=2 * smaller), cluster).fits, "a larger one would fit"
    assert wanted.fits or suggestions or memory == 8


def test_more_of_anything_needs_more():
    sizes = [plan(job(micro_batch=m, global_batch=64), NODE).gib for m in (1, 2, 4, 8)]
    assert sizes == sorted(set(sizes))
    assert plan(job(checkpointing="none"), NODE).gib > plan(job(), NODE).gib
    assert plan(job(tokens=2048), NODE).gib > plan(job(), NODE).gib
    eager, fused = (plan(job(attention=a, checkpointing="none"), NODE).gib for a in ("eager", "sdpa"))
    assert eager > fused
    halves = [plan(job(micro_batch=1), Cluster(gpus_per_node=n)).gpu["base shard"] for n in (1, 2, 4, 8)]
    assert [halves[0] // part for part in halves] == [1, 2, 4, 8]


def test_a_wide_evaluation_can_be_what_does_not_fit():
    wanted = plan(job(micro_batch=1, eval_batch=256), Cluster(gpu_memory_gib=30))
    assert not wanted.fits and max(wanted.gpu, key=wanted.gpu.get) == "evaluation, beyond a step"
    assert [text for text, _ in nearest(wanted)] == ["train.per_device_eval_batch_size=1"]
    assert plan(job(eval_batch=1), NODE).gpu == plan(job(), NODE).gpu


def test_a_batch_or_a_group_that_cannot_be_shared_is_refused():
    with pytest.raises(RecipeError, match="32 cannot be shared by 3 GPUs in micro-batches of 4"):
        plan(job(), Cluster(gpus_per_node=3))
    with pytest.raises(RecipeError, match="micro-batches of 4; set train.per_device_train_batch_size=2, or make it a"):
        plan(job(), Cluster(nodes=2))
    with pytest.raises(RecipeError, match="8: all 8 ranks are on one node, which needs no copy"):
        plan(job(sharding=Sharding(hpz=8)), NODE)
    with pytest.raises(RecipeError, match="4 is not the 8 ranks of this node"):
        plan(job(micro_batch=2, sharding=Sharding(hpz=4)), Cluster(nodes=2))


def test_the_explanation_has_a_line_with_the_result_for_every_part():
    other = job("70B", micro_batch=2, checkpointing="selective", sharding=Sharding(hpz=8))
    wide = job(checkpointing="none", eval_batch=256)
    for planned in (plan(job(), NODE), plan(other, Cluster(nodes=2)), plan(wide, NODE)):
        text = explain(planned)
        for part, size in planned.gpu.items():
            assert not size or any(
                line.startswith(f"{part} = ") and f"{size:,} B" in line for line in text.splitlines()
            )
        assert f"= {planned.traffic.gathered:,} B" in text and f"= {planned.times.likely:.3g} s" in text
    assert planned.gib == sum(planned.gpu.values()) / GIB
