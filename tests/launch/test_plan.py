"""launch/plan.py as a person and as a batch script meet it."""

import json
import re

import pytest

from tests import warm


def plan(tmp_path, *arguments):
    return warm.run(tmp_path, "launch/plan.py", *arguments)


def test_a_table_for_people(tmp_path):
    finished = plan(tmp_path, "--recipe", "llama70b_gsm8k.yaml", "--nodes", "2", "--explain")
    assert finished.returncode == 0 and finished.stderr == ""
    assert "70,553,706,496 parameters, 414,187,520 train" in finished.stdout
    assert re.search(r"total +\d+\.\d\d +fits 80", finished.stdout)
    assert "an epoch of 7,473 rows" in finished.stdout and "base shard = 4,409,606,656 x 2 B" in finished.stdout
    assert max(map(len, finished.stdout.split("trainable =")[0].splitlines())) <= 120


def test_what_does_not_fit_is_one_line_and_its_way_out_works(tmp_path):
    arguments = ["--recipe", "gsm8k", "--gpus-per-node", "2", "--gpu-memory-gib", "15"]
    finished = plan(tmp_path, *arguments)
    assert finished.returncode == 64 and finished.stdout == "" and finished.stderr.count("\n") == 1
    assert "GiB of 15 on each of 2 GPUs" in finished.stderr
    way_out = re.search(r"fits with (\S+) \(", finished.stderr)[1]
    assert way_out.startswith("train.per_device_train_batch_size=")
    assert plan(tmp_path, *arguments, way_out).returncode == 0


def test_for_programs(tmp_path):
    finished = plan(tmp_path, "--recipe", "gsm8k", "--json", "--rows", "320", "model.name_or_path=Qwen/Qwen2.5-32B")
    found = json.loads(finished.stdout)
    assert found["fits"] and found["base_parameters"] == 32_763_876_352 and found["trainable_parameters"] == 268_435_456
    assert found["gpu_memory_total_bytes"] == sum(found["gpu_memory_bytes"].values())
    assert (found["rows"], found["steps"]) == (320, 10)
    too_large = plan(tmp_path, "--recipe", "llama70b_gsm8k", "--json", "--gpus-per-node", "1")
    assert too_large.returncode == 64 and not json.loads(too_large.stdout)["fits"]
    assert json.loads(too_large.stdout)["nearest_that_fit"]


def test_rows_that_are_not_known_are_said_to_be(tmp_path):
    finished = plan(tmp_path, "--recipe", "gsm8k", "data.path=someone/rows")
    assert finished.returncode == 0
    assert "rows are not counted; give --rows. 1,000 steps:" in finished.stdout
    counted = plan(tmp_path, "--recipe", "quickstart", "--gpus-per-node", "2")
    assert "an epoch of 3,136 rows" in counted.stdout and "100 steps" in counted.stdout, "3,200 without 64 held out"


def test_an_epoch_of_several_sources_is_as_long_as_their_weights_make_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n" * 100)
    (tmp_path / "b.jsonl").write_text("{}\n\n" * 300)
    sources = f"[{{path: {tmp_path}/a.jsonl}}, {{path: {tmp_path}/b.jsonl, weight: 0.5, max_rows: 200}}]"
    mixed = ["data.path=", f"data.sources={sources}", "data.name="]
    planned = plan(tmp_path / "out", "--recipe", "gsm8k", "--json", *mixed, "data.eval_rows=30")
    assert planned.returncode == 0, planned.stderr
    assert json.loads(planned.stdout)["rows"] == 180, "a tenth of each is held out"
    unknown = [*mixed[:1], "data.sources=[{path: openai/gsm8k, name: main}, {path: nobody/knows}]"]
    assert "rows are not counted" in plan(tmp_path / "other", "--recipe", "gsm8k", *unknown, "train.max_steps=").stdout


def test_the_table_of_gpus(tmp_path):
    lines = plan(tmp_path, "--recipe", "llama70b_gsm8k", "--table").stdout.splitlines()
    assert lines[0] == "| GPUs | 24 GB | 48 GB | 80 GB | 141 GB |"
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == ["1", "2", "4", "8", "16"]
    assert "host memory" in cells["1"][3], "141 GB of weights and nothing else"
    assert re.fullmatch(r"\d rows?, \d+\.\d", cells["8"][2])


@pytest.mark.parametrize(
    "code, arguments, words",
    [
        (64, ["--recipe", "nothing"], "no such recipe"),
        (
            64,
            ["--recipe", "gsm8k", "model.name_or_path=someone/else"],
            "hf download someone/else config.json; known are",
        ),
        (64, ["--recipe", "gsm8k", "model.name_or_path=/no/where"], "is neither a directory"),
        (64, ["--recipe", "gsm8k", "adapter.target_modules=[qproj]"], "did you mean q_proj"),
        (64, ["--recipe", "gsm8k", "train.learning_rat=1"], "did you mean learning_rate"),
        (
            64,
            ["--recipe", "gsm8k", "--gpus-per-node", "3"],
            "cannot be shared by 3 GPUs in micro-batches of 4; make it a multiple of 12; with these sizes",
        ),
        (
            64,
            ["--recipe", "llama70b_gsm8k", "--nodes", "4"],
            "32 GPUs in micro-batches of 2; set train.per_device_train_batch_size=1, or make it a multiple of 64",
        ),
        (
            64,
            ["--recipe", "gsm8k", "deepspeed.zero_optimization.offload_param.device=nvme"],
            "'nvme' cannot be planned",
        ),
        (64, ["--recipe", "gsm8k", "deepspeed.zero_optimization.stage3_max_live_parameters=many"], "'many' is not"),
        (65, ["--recipe", "gsm8k", "--rows", "31"], "fewer than train.global_batch_size=32"),
        (66, ["--recipe", "gsm8k", "model.name_or_path=recipes"], "config.json"),
        (
            64,
            ["--recipe", "gsm8k", "deepspeed.zero_optimization.stage3_max_live_parameters=.inf"],
            "stage3_max_live_parameters: inf is not a whole number",
        ),
        (2, ["--recipe", "gsm8k", "--nodes", "0"], "'0' is not a whole number of at least 1"),
        (2, ["--recipe", "gsm8k", "--gpu-memory-gib", "-8"], "'-8' is not a number above 0"),
        (2, ["--recipe", "gsm8k", "--gpu-tflops", "inf"], "'inf' is not a number above 0"),
        (2, ["--recipe", "gsm8k", "--gpu-memory-gib", "1e308"], "'1e308' is not a number above 0 and below 1e+09"),
    ],
)
def test_bad_input_is_one_line(tmp_path, code, arguments, words):
    finished = plan(tmp_path, *arguments)
    assert (finished.returncode, finished.stdout) == (code, "")
    assert words in finished.stderr and "Traceback" not in finished.stderr
    assert code == 2 or finished.stderr.count("\n") == 1


def test_an_architecture_that_is_not_known_names_what_it_would_need(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba2", "hidden_size": 64}')
    finished = plan(tmp_path / "out", "--recipe", "gsm8k", f"model.name_or_path={tmp_path}")
    assert finished.returncode == 64 and "'mamba2' cannot be planned" in finished.stderr
    assert "num_hidden_layers" in finished.stderr


@pytest.mark.parametrize("more", ["--json", "--explain", "--nodes=2", "--gpu-memory-gib=80", "--rows=9"])
def test_the_table_of_gpus_leaves_nothing_out_silently(tmp_path, more):
    refused = plan(tmp_path, "--recipe", "gsm8k", "--table", more)
    assert refused.returncode == 2 and refused.stdout == ""
    assert more.partition("=")[0] in refused.stderr.splitlines()[-1]


OFFLOADED = ["deepspeed.zero_optimization.offload_param.device=cpu"]


@pytest.mark.parametrize(
    "recipe, gpus, gib, more",
    [  # what the recipes' headers and comments say is enough; a GPU "of 24 GB" has 22.5 GiB
        ("commonsense_llama3.2_1b", 1, 14.6, []),
        ("commonsense_llama3.2_3b", 1, 22.5, []),
        ("gsm8k", 1, 22.5, []),
        ("gsm8k_qwen2.5_32b", 4, 39.4, []),
        ("gsm8k_qwen2.5_32b", 8, 22.5, []),
        ("gsm8k_qwen2.5_32b", 4, 22.5, OFFLOADED),
        ("gsm8k_qwen2.5_32b", 2, 22.5, OFFLOADED),
        ("llama70b_gsm8k", 8, 39.4, []),
        ("llama70b_gsm8k", 4, 79, []),
        ("llama70b_gsm8k", 8, 22.5, OFFLOADED),
        ("llama70b_gsm8k", 4, 39.4, OFFLOADED),
        ("metamath_gemma2_9b", 1, 39.4, []),
        ("metamath_gemma2_9b", 2, 22.5, []),
        ("metamath_llama70b", 8, 79, ["--nodes", "2"]),
        ("metamath_llama70b", 8, 79, ["deepspeed.zero_optimization.zero_hpz_partition_size=1"]),
        ("metamath_mistral7b", 1, 22.5, []),
    ],
)
def test_the_hardware_that_a_recipe_names_is_enough(tmp_path, recipe, gpus, gib, more):
    cluster = ["--gpus-per-node", str(gpus), "--gpu-memory-gib", str(gib)]
    assert plan(tmp_path, "--recipe", recipe, *cluster, *more).returncode == 0
    if more == OFFLOADED:
        assert plan(tmp_path, "--recipe", recipe, *cluster).returncode == 64, "it needs no offloading"
