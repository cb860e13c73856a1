"""The learning rate is a pure function of the step."""

import pytest

from abba.training.schedule import learning_rate


@pytest.mark.parametrize("kind, last", [("constant", 1.0), ("linear", 1 / 90), ("cosine", 0.000304)])
def test_warmup_peak_and_end(kind, last):
    rate = lambda step: learning_rate(step, steps=100, peak=1.0, kind=kind, warmup_ratio=0.1)  # noqa: E731
    assert rate(0) == pytest.approx(0.1) and rate(9) == pytest.approx(1.0) and rate(10) == 1.0
    assert rate(99) == pytest.approx(last, rel=1e-2)
    assert all(rate(step + 1) <= rate(step) for step in range(10, 99))


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(0, steps=5, peak=3.0, kind="cosine", warmup_ratio=0.0) == 3.0
