"""The loss through the head in chunks, and rows on one line, against plain logits and rows on their own."""

import copy
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface

import abba.training.loss
from abba.adapter.config import AdapterConfig
from abba.adapter.inject import inject
from abba.errors import RecipeError
from abba.training.attention import BY_ROW, keep_rows_apart, line_tokens, sdpa_by_row
from abba.training.batches import collate, lines_of
from abba.training.loss import FrozenHeadLoss, return_losses, token_loss_sum
from abba.training.model import enable_checkpointing
from abba.training.recipe import load_recipe
from abba.training.resume import fingerprint
from tests.distributed.ranks import TINY
from tests.models import FAMILIES, randomize_factors, tiny_model
from tests.warm import ROOT

# transformers' Gemma-2 has no sdpa: it would leave out the cap on attention logits.
ATTENTION = [(name, kind) for name in FAMILIES for kind in ("eager", "sdpa") if (name, kind) != ("gemma2", "sdpa")]
MORE = [(name, "sdpa") for name in ("gemma", "phi3", "qwen3")]  # whose rows may share a line too
LENGTHS = (19, 33, 7, 24, 12)


class Rows:
    """As TokenizedRows: random rows of LENGTHS tokens, a third of each is prompt."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = [torch.randint(1, 128, (length,), generator=generator) for length in LENGTHS]

    def input_ids(self, row):
        return self.ids[row]

    def length(self, row):
        return len(self.ids[row])

    def supervised(self, row):
        return torch.arange(max(1, len(self.ids[row]) // 3), len(self.ids[row]))


def adapted(family, **changes):
    model = tiny_model(family, **changes)
    inject(model, AdapterConfig(r1=3, r2=2, alpha=4.0))
    randomize_factors(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.ndim == 2)
    return model


def loss_and_gradients(model, batch):
    loss = model(*batch.inputs)
    loss.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found and all(gradient is not None for gradient in found.values())
    return loss.detach(), found


def batch_of(data, lines):
    return collate(data, lines, 0, torch.device("cpu"))


def changes_of(family):
    return {"final_logit_softcapping": 2.0} if family == "gemma2" else {}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_head_that_trains_has_its_gradient_too(family):
    plain = tiny_model(family, tie_word_embeddings=family == "gemma2", **changes_of(family))
    model, batch = copy.deepcopy(plain), batch_of(Rows(), [[0], [1], [2]])
    assert "the head trains too" in return_losses(model)
    loss, gradients = loss_and_gradients(model, batch)
    logits = plain(input_ids=batch.input_ids, use_cache=False).logits
    expected = token_loss_sum(logits, batch.predictors, batch.targets)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_equal_the_logits_of_transformers(family, monkeypatch):
    monkeypatch.setattr(abba.training.loss, "CHUNK", 10)  # neither divides the supervised tokens nor exceeds them
    plain = adapted(family, **changes_of(family))
    model, batch = copy.deepcopy(plain), batch_of(Rows(), [[0], [1], [2]])
    assert return_losses(model).startswith("logits of 10 supervised tokens at a time")
    loss, gradients = loss_and_gradients(model, batch)

    logits = plain(input_ids=batch.input_ids, use_cache=False).logits
    expected = token_loss_sum(logits, batch.predictors, batch.targets)
    expected.backward()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        assert float(model(*batch.inputs)) == float(loss)


def test_another_architecture_takes_its_own_head_and_says_so():
    model = tiny_model("granite", logits_scaling=4.0)
    plain, batch = copy.deepcopy(model), batch_of(Rows(), [[0], [1]])
    said = return_losses(model)
    assert said.startswith("logits of all tokens at once: granite's head")
    logits = plain(input_ids=batch.input_ids, use_cache=False).logits
    assert torch.equal(model(*batch.inputs), token_loss_sum(logits, batch.predictors, batch.targets))


class Largest(TorchDispatchMode):
    """The rows of the largest tensor with a vocabulary's columns."""

    rows = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        is_weight = function is torch.ops.aten.t.default
        if isinstance(result, torch.Tensor) and result.ndim > 1 and result.shape[-1] == 131 and not is_weight:
            self.rows = max(self.rows, result.numel() // 131)
        return result


def test_no_tensor_of_all_tokens_by_vocabulary(monkeypatch):
    monkeypatch.setattr(abba.training.loss, "CHUNK", 8)
    model, batch = adapted("llama", vocab_size=131, tie_word_embeddings=False), batch_of(Rows(), [[0], [1], [2], [3]])
    return_losses(model)
    with Largest() as largest:
        loss_and_gradients(model, batch)
    assert 0 < largest.rows <= 8 < len(batch.targets)


@pytest.mark.parametrize(("family", "attention"), ATTENTION)
def test_packed_rows_have_the_loss_and_gradients_of_rows_alone(family, attention):
    # A window below a row's length: it must not reach over a border either.
    changes = {"sliding_window": 8} if family in ("mistral", "gemma2") else {}
    model = adapted(family, **changes)
    model.set_attn_implementation(attention)
    return_losses(model)
    data = Rows()
    alone, apart = loss_and_gradients(model, batch_of(data, [[row] for row in range(5)]))
    apart = {name: gradient.clone() for name, gradient in apart.items()}
    keep_rows_apart(model)
    for most in (40, 1000) if attention == "eager" else (1000,):
        lines = lines_of(data, list(range(5)), most)
        assert len(lines) == {40: 3, 1000: 1}[most]
        model.zero_grad()
        loss, gradients = loss_and_gradients(model, batch_of(data, lines))
        assert float(loss) == pytest.approx(float(alone), rel=2e-6)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, apart[name], rtol=1e-4, atol=2e-5, msg=name)


def test_flash_attention_is_told_where_rows_end(monkeypatch):
    """The kernel needs a GPU; in its place each row is computed alone, between the borders that it is given."""

    def kernel(module, query_1HTK, key_1HTK, value_1HTK, attention_mask, **named):
        assert attention_mask is None and named["cu_seq_lens_q"].dtype == torch.int32
        assert named["cu_seq_lens_q"] is named["cu_seq_lens_k"]
        lengths = named.pop("cu_seq_lens_q").diff().tolist()
        assert named.pop("max_length_q") == named.pop("max_length_k") == max(lengths)
        del named["cu_seq_lens_k"]
        return sdpa_by_row(module, query_1HTK, key_1HTK, value_1HTK, None, row_lengths=tuple(lengths), **named)

    monkeypatch.setitem(AttentionInterface._global_mapping, "flash_attention_2", kernel)
    model, data = adapted("llama"), Rows()
    return_losses(model)
    alone, _ = loss_and_gradients(model, batch_of(data, [[row] for row in range(5)]))
    model.config._attn_implementation = "flash_attention_2"
    for rows in ([0, 1, 2, 3, 4], [3]):
        batch = batch_of(data, [rows])
        assert float(loss_and_gradients(model, batch)[0]) > 0
    one_line, _ = loss_and_gradients(model, batch_of(data, [[0, 1, 2, 3, 4]]))
    assert float(one_line) == pytest.approx(float(alone), rel=2e-6)


@pytest.mark.parametrize(("family", "attention"), ATTENTION + MORE)
def test_no_row_sees_another_on_its_line(family, attention):
    model = tiny_model(family)
    model.set_attn_implementation(attention)
    keep_rows_apart(model)
    first, second = Rows(), Rows()
    second.ids[2] = Rows(seed=1).ids[2]
    start, stop = LENGTHS[0], LENGTHS[0] + LENGTHS[2]

    def hidden(data):
        batch = batch_of(data, [[0, 2, 1]])
        with torch.no_grad():
            borders = {"row_lengths": batch.row_lengths} if attention == "sdpa" else {}
            ids, positions = batch.input_ids, batch.position_ids
            states = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **borders)
        return states.last_hidden_state[0]

    before, after = hidden(first), hidden(second)
    assert not torch.equal(before[start:stop], after[start:stop])
    assert torch.equal(before[:start], after[:start]) and torch.equal(before[stop:], after[stop:])


def test_architectures_that_mix_rows_elsewhere_are_refused():
    recurrent = types.SimpleNamespace(config=types.SimpleNamespace(model_type="mamba2", _attn_implementation="sdpa"))
    with pytest.raises(RecipeError, match="data.packing: .* not in mamba2; set data.packing=false"):
        keep_rows_apart(recurrent)


def test_lines_are_short_only_where_all_tokens_are_computed_with():
    assert line_tokens("eager", 512) == 512
    assert line_tokens("sdpa", 512) == line_tokens("flash_attention_2", 512) == float("inf")
    model = tiny_model("llama")
    keep_rows_apart(model)
    assert model.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    keep_rows_apart(model)
    assert model.config._attn_implementation == BY_ROW


@pytest.mark.parametrize(
    ("mode", "again"), [("selective", {0, 2}), ("non_reentrant", {0, 1, 2, 3}), ("reentrant", {0, 1, 2, 3})]
)
def test_checkpointing_runs_these_layers_twice_and_gives_the_same_gradients(mode, again):
    batch = batch_of(Rows(), [[0], [1]])
    model = adapted("llama", num_hidden_layers=4).train()
    plain, forwards = copy.deepcopy(model), []
    for index, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, index=index: forwards.append(index))
    enable_checkpointing(model, mode)
    for each in (model, plain):
        return_losses(each)
    loss, gradients = loss_and_gradients(model, batch)
    assert {index for index in range(4) if forwards.count(index) == 2} == again
    expected, others = loss_and_gradients(plain, batch)
    assert torch.equal(loss, expected)
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())


def test_in_bf16_the_gradient_is_scaled_before_it_is_rounded():
    torch.manual_seed(0)
    hidden_SD, weight_VD = torch.randn(7, 32).bfloat16(), torch.randn(50, 32).bfloat16()
    targets_S, scale = torch.randint(50, (7,)), 1.0 / 771  # which bf16 has not
    leaf = hidden_SD.clone().requires_grad_()
    (FrozenHeadLoss.apply(leaf, weight_VD, None, targets_S, None) * scale).backward()
    whole = hidden_SD.clone().requires_grad_()
    FrozenHeadLoss.apply(whole, weight_VD, None, targets_S, None).backward()
    assert torch.equal(leaf.grad, (whole.grad.float() * scale).bfloat16())


def test_a_run_remembers_how_its_rows_were_packed():
    """A checkpoint of another way, which rounds its sums otherwise, is refused by name."""
    recipe = load_recipe("gsm8k", [f"model.name_or_path={TINY}", "data.max_length=512"], ROOT / "recipes")

    def packing(attention, **changes):
        dumped = recipe.with_attention(attention).model_dump(mode="json")
        return fingerprint({**dumped, "data": {**dumped["data"], **changes}}, "", TINY)["data"]["packing"]

    assert [packing(kind) for kind in ("eager", "sdpa")] == [512, "one line"]
    assert packing("sdpa", packing=False) is None
