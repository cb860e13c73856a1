"""Learning rate as a pure function of the step."""

import math


def learning_rate(step: int, *, steps: int, peak: float, kind: str, warmup_ratio: float) -> float:
    """Rate of step 0 <= step < steps: linear warm-up, then constant, or falling to zero at `steps`.

    The first of w warm-up steps has rate peak/w, where Hugging Face's schedulers spend it at rate 0.
    """
    warmup = math.ceil(warmup_ratio * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[kind]
