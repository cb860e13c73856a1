"""Every method through the same loop on two ranks of ZeRO-3 that keep nothing, against plain torch and stock PEFT."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from abba import inject
from abba.adapter.baseline import inject_baseline
from abba.adapter.config import METHODS, AdapterConfig, FullConfig
from abba.adapter.files import verify_adapter
from abba.adapter.model_files import verify_model
from abba.checkpoint.format import list_checkpoints
from abba.checkpoint.source import open_checkpoint
from abba.evaluation.parity import peft_difference
from abba.training.adapter_section import AdapterSection
from abba.training.batches import BatchPlan
from abba.training.tokens import TokenizedRows
from tests.distributed.ranks import NOTHING_STAYS, STORIES, TINY, read_metrics, run_ranks
from tests.faults.harness import TRIALS, beyond_make_test
from tests.models import tiny_model

STEPS, RATE, HALFWAY, ROWS = 3, 1e-2, 2, 2
OPTIONS = {method: {"r": 8} for method in METHODS} | {"abba": {"r1": 4, "r2": 4}, "loha": {"r": 4}, "full": {}}
CONTINUED, QUICK = ("dora", "full"), ("lora", "dora", "full")
RUN = METHODS if TRIALS >= 10 else QUICK  # four of the seven take what make test has no time for


def each(methods, quick=QUICK):
    return [pytest.param(method, marks=() if method in quick else beyond_make_test) for method in methods]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random Llama of two layers in bf16, tied, with tiny-llama's tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    tiny_model(vocab_size=640, bos_token_id=1, eos_token_id=2).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(directory)
    return directory


def overrides(method, base, output):
    yield from (f"adapter.{key}=null" for key in ("r1", "r2", "alpha"))
    yield from (f"adapter.{key}={value}" for key, value in {"method": method, **OPTIONS[method]}.items())
    yield from (f"output_dir={output}", f"data.prepared_path={output.parent / 'tokens'}")
    yield from (f"model.name_or_path={base}", "model.dtype=float32", f"data.path={STORIES / 'train.jsonl'}")
    yield from ("data.max_rows=16", "data.eval_rows=0", "train.eval_steps=null", f"train.global_batch_size={ROWS}")
    yield from ("train.per_device_train_batch_size=1", f"train.max_steps={STEPS}", f"train.learning_rate={RATE}")
    yield from ("train.lr_scheduler_type=constant", "train.warmup_ratio=0", f"checkpoint.save_steps={HALFWAY}")
    yield from NOTHING_STAYS


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """Where the run of each method, and the second half of some, lie."""
    root = tmp_path_factory.mktemp("methods")
    runs = {method: list(overrides(method, base, root / method)) for method in RUN}
    for method in CONTINUED if TRIALS >= 10 else ("full",):
        halfway = root / method / "checkpoints" / f"step-{HALFWAY:06d}"
        again = overrides(method, base, root / f"{method}-continued")
        runs[f"{method}-continued"] = [*again, f"checkpoint.resume={halfway}"]
    for first in range(0, len(runs), 5):
        commands = [["--recipe", "quickstart", *arguments] for arguments in list(runs.values())[first : first + 5]]
        (root / "runs.json").write_text(json.dumps(commands))
        several = ["tests/distributed/several.py", str(root / "runs.json")]
        for finished in run_ranks(root / f"ranks-{first}", [several] * 2):
            assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-5000:]
    return root


def plain_losses(method, base, tokens, rate=RATE):
    """The same training in one process of plain torch, with stock PEFT's layers."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="sdpa")
    config = AdapterSection(method=method, **OPTIONS[method]).config()
    if isinstance(config, AdapterConfig):
        inject(model, config, seed=0)
    elif not isinstance(config, FullConfig):
        inject_baseline(model, config, seed=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    data = TokenizedRows(tokens)
    plan, seen = BatchPlan(list(range(len(data))), ROWS, 1, seed=0), []
    for step in range(STEPS):
        rows = plan.global_rows(step)
        losses = []
        for row in rows:
            ids, prompt = data.input_ids(row).long()[None], int(data.supervised(row)[0])
            losses.append(F.cross_entropy(model(ids).logits[0, prompt - 1 : -1], ids[0, prompt:], reduction="sum"))
        loss = sum(losses) / data.supervised_tokens(rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss.detach()))
    return seen


@pytest.mark.parametrize("method", each(METHODS))
def test_losses_are_those_of_plain_torch(trained, base, method):
    tokens = next((trained / "tokens").glob("tokens-*"))
    expected, untrained = plain_losses(method, base, tokens), plain_losses(method, base, tokens, rate=0.0)
    found = [record["loss"] for record in read_metrics(trained / method)]
    assert found == pytest.approx(expected, rel=1e-5)
    moved = abs(expected[-1] - untrained[-1]) / untrained[-1]
    assert moved > 30 * 1e-5, f"{moved:.1e}: it must move far more than the tolerance for this to mean anything"


@pytest.mark.parametrize("method", each(METHODS))
def test_a_run_ends_in_what_stock_programs_load(trained, base, method):
    """The fp32 masters of the last checkpoint, through files and stock PEFT, give the logits of the layers trained."""
    if method == "full":
        verify_model(trained / method / "model")
        stored, before = load_file(trained / method / "model/model.safetensors"), load_file(base / "model.safetensors")
        with open_checkpoint(list_checkpoints(trained / method / "checkpoints")[-1]) as source:
            for name in before:
                assert torch.equal(stored[name], source.read(name).bfloat16()) and stored[name].dtype == torch.bfloat16
        assert any(not torch.equal(stored[name], before[name]) for name in before)
        AutoModelForCausalLM.from_pretrained(trained / method / "model")
        return
    adapter = trained / method / "adapter"
    assert not verify_adapter(adapter).changes_nothing
    with open_checkpoint(list_checkpoints(trained / method / "checkpoints")[-1]) as source:
        difference, largest = peft_difference(base, adapter, source.all_factors())
    assert difference < 1e-6 * max(1.0, largest)


@pytest.mark.parametrize("method", each(CONTINUED, ("full",)))
def test_a_run_that_is_continued_ends_in_the_same_bits(trained, method):
    whole, second_half = (
        list_checkpoints(trained / run / "checkpoints")[-1] for run in (method, f"{method}-continued")
    )
    assert whole.name == second_half.name == f"step-{STEPS:06d}"
    for shard in sorted(path.name for path in whole.glob("*.safetensors")):
        assert (whole / shard).read_bytes() == (second_half / shard).read_bytes()


@beyond_make_test
def test_equal_budgets_train_equally_many_parameters(trained):
    counts = {}
    for method in METHODS[:-1]:
        with open_checkpoint(list_checkpoints(trained / method / "checkpoints")[-1]) as source:
            counts[method] = sum(math.prod(shape) for shape in source.tensors.values())
            magnitudes = sum(shape[0] for shape in source.tensors.values() if len(shape) == 1)
        assert counts[method] - magnitudes == counts["abba"], method
        assert (magnitudes > 0) == (method == "dora")
