"""The border to vLLM: what it is told and given, and what comes back. With the real one where it is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from abba import save_adapter
from abba.base_model import load_tokenizer
from abba.errors import CheckpointError, RecipeError
from abba.evaluation import engine
from abba.evaluation.engine import require_engine, why_not_vllm
from abba.evaluation.placement import Gpus
from abba.evaluation.score import evaluate
from abba.evaluation.subject import Subject
from abba.text.encode import encode_prompt
from tests.adapter.test_files import write
from tests.distributed.ranks import STORIES, TINY
from tests.evaluation.made import adapted
from tests.warm import ROOT

REAL = importlib.util.find_spec("vllm") is not None
LIMIT = 20


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in as `vllm`; see there for what it is."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "stand_in"))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    import vllm

    assert vllm.__version__.endswith("stand.in")
    vllm.LLM.made.clear()
    vllm.LLM.asked.clear()
    yield vllm
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("vllm") / "adapter"
    save_adapter(adapted()[0], directory)
    return directory


def scored(output, adapter, wanted="vllm", **changes):
    settings = {"batch_size": 2, "max_new_tokens": 24, "dtype": torch.bfloat16, "say": print, **changes}
    scores = evaluate(
        Subject(TINY, adapter), "gsm8k", str(STORIES / "test.jsonl"), output, limit=LIMIT, engine=wanted, **settings
    )
    lines = (output / "generations.jsonl").read_text().splitlines()
    return scores, [json.loads(line)["generated"] for line in lines]


def test_what_vllm_is_told(vllm, adapter, tmp_path, capsys):
    scores, texts = scored(tmp_path / "out", adapter)
    assert capsys.readouterr().out.startswith("model: 1.8 MB of weights, no GPU: vllm on the CPU\n")
    assert (scores["engine"], scores["engine_version"], scores["gpus"]) == ("vllm", vllm.__version__, 0)
    (made,) = vllm.LLM.made
    rows = [json.loads(line)["question"] for line in (STORIES / "test.jsonl").read_text().splitlines()[:LIMIT]]
    longest = max(map(len, encode_prompt(load_tokenizer(TINY), rows)))
    assert made["model"] == str(TINY) and made["dtype"] == "bfloat16" and made["trust_remote_code"] is False
    assert made["max_model_len"] == longest + 24 and made["max_num_seqs"] == 2 and made["tensor_parallel_size"] == 1
    assert made["enable_lora"] and made["max_lora_rank"] == 16, "the smallest that holds 4 x 3"
    assert [asked["prompts"] for asked in vllm.LLM.asked] == [16, 4], "8 x batch_size at a time"
    lora = vllm.LLM.asked[0]["lora"]
    assert lora.lora_int_id == 1 and not Path(lora.lora_path).exists(), "the LoRA form is there as long as it is needed"
    assert all(texts) and not any("</s>" in text for text in texts)


def test_every_answer_is_to_its_own_question_and_the_adapters(vllm, adapter, tmp_path):
    """The same texts as transformers gives with the native layers, but for a rounding here and there in bf16."""
    _, from_vllm = scored(tmp_path / "vllm", adapter)
    _, native = scored(tmp_path / "native", adapter, "transformers")
    _, base = scored(tmp_path / "base", None, "transformers")
    same = sum(a == b for a, b in zip(from_vllm, native, strict=True))
    assert same >= 0.8 * LIMIT
    assert sum(a == b for a, b in zip(base, native, strict=True)) < 0.5 * LIMIT, "the adapter must matter"
    assert len(set(native)) > 0.5 * LIMIT, "the answers must differ"


def test_the_bare_base_is_asked_without_lora(vllm, tmp_path):
    _, from_vllm = scored(tmp_path / "vllm", None, dtype=torch.float32)
    assert vllm.LLM.made[0]["enable_lora"] is False and vllm.LLM.asked[0]["lora"] is None
    assert from_vllm == scored(tmp_path / "native", None, "transformers", dtype=torch.float32)[1]


def test_torchrun_does_not_keep_its_process_group_waiting(vllm, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert len(scored(tmp_path / "out", None)[1]) == LIMIT


def test_an_adapter_in_lora_form_is_served_from_where_it_lies(vllm, tmp_path):
    write(*adapted(), tmp_path / "lora", "lora")
    scored(tmp_path / "out", tmp_path / "lora")
    assert vllm.LLM.asked[0]["lora"].lora_path == str(tmp_path / "lora")
    assert (tmp_path / "lora/adapter_model.safetensors").is_file()


def test_the_gpus_are_split_over_and_no_more_of_them_is_taken_than_is_free(vllm, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "visible_gpus", lambda: Gpus(2, 2_000_000, 1_700_000))
    scored(tmp_path / "out", adapter)
    (made,) = vllm.LLM.made
    assert made["tensor_parallel_size"] == 2
    assert made["gpu_memory_utilization"] == pytest.approx(0.75)  # free 0.85 less the margin of 0.1


def test_what_vllm_raises_is_one_line_with_the_way_out(vllm, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "visible_gpus", lambda: Gpus(4, 1_500_000, 1_500_000))
    with pytest.raises(CheckpointError) as error:
        scored(tmp_path / "out", adapter)
    said = str(error.value)
    assert "vLLM cannot serve it: Engine core initialization failed. See root cause above.; choose" in said
    assert "\n" not in said and not (tmp_path / "out/scores.json").exists()


@pytest.mark.parametrize(
    "rank, dtype, refusal",
    [(256, torch.bfloat16, None), (None, torch.float32, None), (1024, torch.bfloat16, "1024 is above vLLM's 512"),
     (256, torch.float32, "in bfloat16, not float32")],
)  # fmt: skip
def test_what_vllm_does_not_serve(vllm, rank, dtype, refusal):
    reason = why_not_vllm(rank, dtype)
    assert (reason is None) == (refusal is None) and (refusal or "") in (reason or "")
    require_engine("auto", rank, dtype)
    if refusal:
        with pytest.raises(RecipeError, match="choose the engine transformers or auto"):
            require_engine("vllm", rank, dtype)


def test_a_vllm_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    with pytest.raises(RecipeError, match=r"cannot be imported: libcudart\.so\.13: cannot open; choose the engine"):
        scored(tmp_path / "out", None)


@pytest.mark.slow
@pytest.mark.skipif(not REAL, reason="vllm is not installed; its CPU build takes minutes to start")
def test_the_real_vllm_says_what_the_native_layers_say(adapter, tmp_path):
    command = ["launch/evaluate.py", "--model", str(TINY), "--adapter", str(adapter), "--task", "gsm8k"]
    command += ["--data", str(STORIES / "test.jsonl"), "--limit", str(LIMIT), "--max-new-tokens", "24"]
    command += ["--batch-size", "2", "--engine", "vllm", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "VLLM_CPU_KVCACHE_SPACE": "1"}
    finished = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "Traceback" not in finished.stdout + finished.stderr
    lines = (tmp_path / "out/generations.jsonl").read_text().splitlines()
    _, native = scored(tmp_path / "native", adapter, "transformers")
    assert sum(json.loads(line)["generated"] == text for line, text in zip(lines, native, strict=True)) >= 0.8 * LIMIT


def test_the_engine_auto_does_without_a_vllm_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm/__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    assert why_not_vllm(None, torch.float32) == "vllm cannot be imported: libcudart.so.13: cannot open"
