"""What a run says: a bar on a terminal, plain lines elsewhere, every step in metrics.jsonl."""

import io
import json

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig

from abba.base_model import choose_attention
from abba.training import metrics

RECORD = {"loss": 1.25, "tokens_per_second": 1234.5, "learning_rate": 1e-3, "grad_norm": 0.5, "step_seconds": 0.1}
RECORD |= {"slowest_rank": 1, "slowest_rank_seconds": 0.1, "slowest_rank_data_seconds": 0.0}


def said(tmp_path, monkeypatch, terminal):
    screen = io.StringIO()
    monkeypatch.setattr(metrics, "Console", lambda **k: Console(file=screen, force_terminal=terminal, width=120, **k))
    with metrics.Reporter(tmp_path / "metrics.jsonl", steps=25, logging_steps=10) as reporter:
        for step in range(1, 26):
            reporter.step({"step": step, **RECORD, **({"eval_loss": 0.5} if step == 20 else {})})
    return screen.getvalue()


def test_plain_lines_without_a_terminal(tmp_path, monkeypatch):
    lines = said(tmp_path, monkeypatch, terminal=False).splitlines()
    assert [line.split()[1] for line in lines if "loss 1.25" in line] == ["1/25", "10/25", "20/25", "25/25"]
    assert "step 20/25  eval loss 0.5000" in lines
    assert "ETA 0:00:0" in lines[0] and "slowest rank 1" in lines[0] and "1,234 tokens/s" in lines[0]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 25
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[3])["step"] == 4


def test_a_bar_on_a_terminal(tmp_path, monkeypatch):
    screen = said(tmp_path, monkeypatch, terminal=True)
    assert "loss 1.2500" in screen and "25/25" in screen and "eval loss 0.5000" in screen
    assert "slowest" not in screen


@pytest.mark.parametrize(
    "family, wanted, device, dtype, flash, chosen",
    [
        ("llama", "auto", "cpu", torch.bfloat16, True, "sdpa"),
        ("llama", "auto", "cuda", torch.bfloat16, True, "flash_attention_2"),
        ("llama", "auto", "cuda", torch.float32, True, "sdpa"),
        ("llama", "auto", "cuda", torch.bfloat16, False, "sdpa"),
        ("gemma2", "auto", "cuda", torch.bfloat16, False, "eager"),
        ("gemma2", "sdpa", "cpu", torch.bfloat16, False, "sdpa"),
    ],
)
def test_attention_is_chosen_with_a_reason(monkeypatch, family, wanted, device, dtype, flash, chosen):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if flash else None)
    attention, why = choose_attention(AutoConfig.for_model(family), wanted, device, dtype)
    assert attention == chosen and why
