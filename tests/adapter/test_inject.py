"""Injection: which layers, unchanged names and outputs, refusals; the initial factors."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from abba import AbbaLinear, AdapterConfig, inject
from abba.adapter.config import INITS
from abba.adapter.initialize import factors_from_svd, initial_factors
from abba.adapter.linear import abba_modules, bypass
from abba.errors import CheckpointError, RecipeError
from tests.models import FAMILIES, randomize_factors, tiny_model

TOKENS = torch.arange(2 * 11).reshape(2, 11) * 5 % 128


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ("q_proj", "v_proj"), r".*\.mlp\.(up|down)_proj"])
def test_every_family_keeps_its_names_and_its_function(family, targets):
    model = tiny_model(family)
    names = set(model.state_dict())
    before = model(TOKENS).logits
    report = inject(model, AdapterConfig(4, 3, 8.0, targets))
    per_layer = {"all-linear": 7, ("q_proj", "v_proj"): 2}.get(targets, 2)
    assert len(report.replaced) == 2 * per_layer
    assert names <= set(model.state_dict())
    assert torch.equal(model(TOKENS).logits, before), "delta W is zero at the start"
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.{factor}" for name in report.replaced for factor in ("A1", "B1", "A2", "B2")}
    assert report.trainable_parameters == sum(model.get_parameter(name).numel() for name in trainable)
    assert not isinstance(model.get_output_embeddings(), AbbaLinear)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_injected_model_is_the_base_plus_delta(family):
    model, dense = tiny_model(family), tiny_model(family)
    inject(model, AdapterConfig(3, 2, 2.0))
    randomize_factors(model)
    for name, module in model.named_modules():
        if isinstance(module, AbbaLinear):
            dense.get_submodule(name).weight.data += module.delta_weight()
    changed = model(TOKENS).logits
    torch.testing.assert_close(changed, dense(TOKENS).logits, rtol=1e-5, atol=1e-5)
    with bypass(model):
        assert torch.equal(model(TOKENS).logits, tiny_model(family)(TOKENS).logits)
    assert torch.equal(model(TOKENS).logits, changed)


def test_biases_stay_frozen_and_tied_embeddings_untouched():
    model = tiny_model("qwen2", tie_word_embeddings=True)
    inject(model, AdapterConfig(2, 2, 4.0))
    assert model.model.layers[0].self_attn.q_proj.bias is not None
    assert not model.model.layers[0].self_attn.q_proj.bias.requires_grad
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_layer_range_is_half_open():
    report = inject(tiny_model(num_hidden_layers=4), AdapterConfig(2, 2, 4.0, ("q_proj",), (1, 3)))
    assert report.replaced == ("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"target_modules": ("q_prj",)}, "'q_prj' matches no module of the model; did you mean q_proj?"),
        ({"target_modules": ("q_proj", "c_attn")}, "'c_attn' matches no module"),
        ({"target_modules": r"nothing\..*"}, "matches no module"),
        ({"target_modules": r"(["}, "no regular expression"),
        ({"target_modules": ("lm_head",)}, "lm_head is the output head"),
        ({"target_modules": ("mlp",)}, "is a LlamaMLP, not a linear layer"),
        ({"r1": 65}, "65 is above the rank of model.layers.0.self_attn.q_proj, whose weight is (64, 64)"),
        ({"r2": 33, "target_modules": ("k_proj",)}, "choose at most 32"),
        ({"layer_range": (1, 9)}, "adapter.layer_range: (1, 9) goes beyond the model's 2 layers"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(arguments, message):
    with pytest.raises(RecipeError) as error:
        inject(tiny_model(), AdapterConfig(**{"r1": 2, "r2": 2, **arguments}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "bad", [{"r1": 0}, {"r2": -1}, {"r1": True}, {"alpha": 0.0}, {"alpha": float("nan")}, {"alpha": 1e200}]
)
def test_impossible_configurations_are_refused(bad):
    with pytest.raises(RecipeError):
        AdapterConfig(**bad)


def test_factors_that_could_never_train_are_refused():
    model = tiny_model()
    model.model.layers[0].mlp.up_proj.weight.data.zero_()
    with pytest.raises(CheckpointError, match=r"B1 and B2 of model\.layers\.0\.mlp\.up_proj are all zero"):
        inject(model, AdapterConfig(2, 2))


def test_a_second_injection_is_refused():
    model = tiny_model()
    inject(model, AdapterConfig(2, 2, target_modules=("q_proj",)))
    for again in ("q_proj", "v_proj"):  # of others: the first ones would be frozen and saved with its alpha
        with pytest.raises(RecipeError, match="already"):
            inject(model, AdapterConfig(2, 2, target_modules=(again,)))
    assert all(factor.requires_grad for module in abba_modules(model).values() for factor in module.factors)


def test_scale_is_the_papers():
    assert AdapterConfig(16, 16, 24.0).scale == 36.0
    assert AdapterConfig(4, 9, 6.0).scale == 6.0


def test_initial_factors_are_the_truncated_svd_and_zero():
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.9 ** torch.arange(64.0))
    factors = factors_from_svd(weight, 8, 5, seed=3)
    u, s, vt = torch.linalg.svd(weight.double())
    best = (u[:, :8] * s[:8]) @ vt[:8]
    residual = (factors.B1.double() @ factors.A1.double() - weight.double()).norm()
    assert residual <= (best - weight.double()).norm() * (1 + 1e-4)
    torch.testing.assert_close(factors.B1.norm(dim=0), factors.A1.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert not factors.B2.any()
    bound = (6 / 64) ** 0.5
    assert 0.9 * bound < factors.A2.abs().max() <= bound
    assert all(f.dtype == torch.float32 for f in factors)


def test_initial_factors_of_the_published_code():
    """No oversampling, ten power iterations; the rest is the same."""
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(0)) @ torch.diag(0.9 ** torch.arange(64.0))
    ours, theirs = (initial_factors(weight, 8, 5, 3, init) for init in ("svd", "reference"))
    torch.manual_seed(3)
    u, s, v = torch.svd_lowrank(weight, q=8, niter=10)
    torch.testing.assert_close(theirs.B1 @ theirs.A1, u @ torch.diag(s) @ v.T, rtol=1e-4, atol=1e-5)
    assert not theirs.B2.any() and theirs.A2.shape == (5, 64) and not torch.equal(ours.B1, theirs.B1)


@pytest.mark.parametrize("init", INITS)
def test_every_init_starts_at_the_base_and_trains(init):
    model, x = tiny_model(), torch.arange(20)[None]
    expected = model(x).logits
    inject(model, AdapterConfig(4, 3, 24.0, init=init), seed=2)
    assert torch.equal(model(x).logits, expected)
    model(x).logits.square().mean().backward()
    layer = model.model.layers[1].mlp.down_proj  # (64, 112)
    assert layer.B2.grad.any() and not layer.B2.any()
    if init == "kaiming":
        for factor, columns in ((layer.A1, 112), (layer.B1, 4), (layer.A2, 112)):
            bound = (6 / columns) ** 0.5
            assert 0.9 * bound < factor.abs().max() <= bound
        other = tiny_model()
        other.model.layers[1].mlp.down_proj.weight.data.zero_()
        inject(other, AdapterConfig(4, 3, 24.0, init=init), seed=2)
        assert torch.equal(other.model.layers[1].mlp.down_proj.A1, layer.A1), "whatever the weight"


def test_factors_depend_on_seed_and_name_alone():
    torch.manual_seed(1)
    first = tiny_model()
    inject(first, AdapterConfig(2, 2), seed=5)
    torch.manual_seed(2)
    stream = torch.get_rng_state()
    second = tiny_model()
    torch.set_rng_state(stream)
    inject(second, AdapterConfig(2, 2, target_modules=("down_proj", "q_proj")), seed=5)
    assert torch.equal(torch.get_rng_state(), stream), "the caller's random stream is not consumed"
    for name in ("A1", "B1", "A2"):
        a, b = (m.model.layers[1].mlp.down_proj.get_parameter(name) for m in (first, second))
        assert torch.equal(a, b)
    assert not torch.equal(first.model.layers[0].mlp.down_proj.A2, first.model.layers[1].mlp.down_proj.A2)


def test_svd_is_bit_equal_under_any_thread_count():
    program = (
        "import torch, hashlib; from abba.adapter.initialize import factors_from_svd;"
        "w = torch.randn(512, 1376, generator=torch.Generator().manual_seed(0));"
        "f = factors_from_svd(w, 16, 16, 7);"
        "print(hashlib.sha256(b''.join(t.numpy().tobytes() for t in f)).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True, text=True, check=True,
        ).stdout
        for threads in ("1", "2", "4")
    }  # fmt: skip
    assert len(digests) == 1


def test_an_abba_linear_can_be_built_alone():
    layer = AbbaLinear(12, 20, config=AdapterConfig(2, 3, 4.0))
    assert {n: tuple(p.shape) for n, p in layer.named_parameters()} == {
        "weight": (20, 12), "bias": (20,), "A1": (2, 12), "B1": (20, 2), "A2": (3, 12), "B2": (20, 3),
    }  # fmt: skip
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert layer.delta_weight().shape == (20, 12) and not layer.delta_weight().any()
