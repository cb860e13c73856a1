"""The formula: exact against its definition, correct gradients, no (out, in) temporary, nothing extra saved."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from abba.adapter.functional import AbbaLinearFunction, delta_weight, khatri_rao

OUT, IN, R1, R2, SCALE = 48, 40, 3, 5, 0.7


def problem(dtype, tokens=(2, 9), out_features=OUT, in_features=IN, r1=R1, r2=R2):
    generator = torch.Generator().manual_seed(0)
    shapes = [(*tokens, in_features), (r1, in_features), (out_features, r1), (r2, in_features), (out_features, r2)]
    shapes += [(out_features, in_features), (out_features,)]
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5 for shape in shapes]
    x, a1, b1, a2, b2, weight, bias = (value.to(dtype) for value in values)
    return x, a1, b1, a2, b2, weight, bias


def apply(x, a1, b1, a2, b2, weight, bias):
    return AbbaLinearFunction.apply(x, a1, b1, a2, b2, SCALE, lambda: weight, bias)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def test_khatri_rao_factors_multiply_to_the_elementwise_product():
    _, a1, b1, a2, b2, _, _ = problem(torch.float64)
    expected = SCALE * (b1 @ a1) * (b2 @ a2)
    torch.testing.assert_close(SCALE * khatri_rao(b1.T, b2.T).T @ khatri_rao(a1, a2), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(delta_weight(a1, b1, a2, b2, SCALE), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("ranks", [(3, 5), (1, 1), (8, 2)])
def test_forward_and_backward_match_the_float64_definition(ranks):
    r1, r2 = ranks
    narrow = [t.requires_grad_(index < 5) for index, t in enumerate(problem(torch.float32, r1=r1, r2=r2))]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in narrow]
    actual = apply(*narrow)
    x, a1, b1, a2, b2, weight, bias = wide
    expected = x @ (weight + SCALE * (b1 @ a1) * (b2 @ a2)).T + bias
    assert relative(actual, expected) <= 1e-6
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    actual.backward(upstream)
    expected.backward(upstream.double())
    for got, want in zip(narrow[:5], wide[:5], strict=True):
        assert relative(got.grad, want.grad) <= 1e-6


def test_gradcheck_in_float64_with_all_factors_non_zero():
    x, a1, b1, a2, b2, weight, bias = problem(torch.float64, (3,), 7, 6, 2, 3)
    assert all(t.all() for t in (a1, b1, a2, b2))
    inputs = tuple(t.requires_grad_() for t in (x, a1, b1, a2, b2))
    assert torch.autograd.gradcheck(lambda *args: apply(*args, weight, bias), inputs)


def test_an_input_without_gradient_needs_no_weight_in_backward():
    x, *factors, weight, bias = problem(torch.float32)
    reads = []
    factors = [factor.requires_grad_() for factor in factors]

    def read_weight():
        reads.append(1)
        return weight

    AbbaLinearFunction.apply(x, *factors, SCALE, read_weight, bias).sum().backward()
    assert len(reads) == 1 and all(factor.grad is not None for factor in factors)


class LargestNewTensor(TorchDispatchMode):
    """Remembers the largest storage that any operation allocated."""

    def __init__(self, known):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


def test_no_new_tensor_has_out_times_in_elements():
    out_features, in_features = 320, 256
    tensors = problem(torch.float32, (2, 8), out_features, in_features, 4, 4)
    inputs = [t.requires_grad_(index < 5) for index, t in enumerate(tensors)]
    with LargestNewTensor(inputs) as seen:
        apply(*inputs).sum().backward()
    assert 0 < seen.largest < out_features * in_features
    with LargestNewTensor(inputs) as dense, torch.no_grad():
        delta_weight(*inputs[1:5], SCALE)
    assert dense.largest >= out_features * in_features, "the measurement itself must see a dense update"


def test_saved_for_backward_are_the_input_h_and_the_factors():
    x, *factors, weight, bias = problem(torch.float32)
    inputs = [x.requires_grad_(), *(f.requires_grad_() for f in factors)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        apply(*inputs, weight, bias)
    h_size = x.numel() // IN * R1 * R2
    assert sum(t.numel() for t in saved) == sum(t.numel() for t in inputs) + h_size


def test_bfloat16_gradients_stay_as_close_as_those_of_autograd():
    """Each rounds a product before it is summed; the shape is one at which sums are long."""
    shape = {"tokens": (2, 64), "out_features": 192, "in_features": 160, "r1": 16, "r2": 16}
    narrow = [t.requires_grad_(index < 5) for index, t in enumerate(problem(torch.bfloat16, **shape))]
    textbook = [t.detach().clone().requires_grad_(t.requires_grad) for t in narrow]
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in narrow]
    for x, a1, b1, a2, b2, weight, bias in (textbook, wide):
        hidden = x @ khatri_rao(a1, a2).T
        (x @ weight.T + bias + SCALE * (hidden @ khatri_rao(b1.T, b2.T))).sum().backward()
    apply(*narrow).sum().backward()
    for ours, theirs, exact in zip(narrow[:5], textbook[:5], wide[:5], strict=True):
        assert relative(ours.grad, exact.grad) <= max(8e-3, 1.2 * relative(theirs.grad, exact.grad))


def test_bfloat16_stays_close_to_the_definition():
    narrow = problem(torch.bfloat16)
    x, a1, b1, a2, b2, weight, bias = (t.double() for t in narrow)
    expected = x @ (weight + SCALE * (b1 @ a1) * (b2 @ a2)).T + bias
    assert apply(*narrow).dtype == torch.bfloat16
    assert relative(apply(*narrow), expected) <= 8e-3
