"""Make the embedded default: a tiny Llama and its sentencepiece tokenizer, pretrained on result-unknown stories.

    python recipes/assets/tiny-llama/pretrain.py [OUTPUT_DIR]      # default: this directory

Plain torch, fp32, saved in bf16. One problem per padded row and loss on the answer alone: packed rows and larger
operands learned much slower. The loss falls late, so training goes by step count and not by a plateau. In two stages:
the mixture of the second from the start left the model at 7% exact after 3,000 steps, the first alone ties results to
the story and not to the expression, which fine-tuning then has to undo.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import sentencepiece
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "stories"), str(HERE.parents[2])]

import make as stories  # noqa: E402

from abba.text.prompt import render_prompt  # noqa: E402

VOCABULARY = 640  # 256 byte pieces, so that any text can be encoded, and room for the stories' words
SEED, BATCH, GRADED = 0, 24, 512
STAGES = (  # name, steps, peak learning rate, warm-up steps
    ("stories told in order", 3000, 3e-3, 100),
    ("any order, and bare calculations", 1500, 2e-3, 50),
)
BARE_SHARE = 0.4  # of the second stage


def train_tokenizer(directory: Path) -> None:
    rng = random.Random(SEED)
    lines = []
    for fact in stories.FACTS * 2:
        for row in (stories.result_unknown(rng, fact, in_order=True), stories.start_or_change_unknown(rng, fact)):
            lines.append(render_prompt(row["question"]) + row["answer"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(directory / "tokenizer"), vocab_size=VOCABULARY,
        model_type="bpe", byte_fallback=True, split_digits=True, add_dummy_prefix=False,
        remove_extra_whitespaces=False, normalization_rule_name="identity", max_sentence_length=20000,
        required_chars="".join(chr(c) for c in range(33, 127)), user_defined_symbols=["\n", "<<", ">>", "####"],
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (directory / "tokenizer.vocab").unlink()


def save_fast_tokenizer(directory: Path) -> None:
    """tokenizer.json beside tokenizer.model: transformers then needs neither protobuf nor sentencepiece to load it."""
    config = {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False, "legacy": False, "add_bos_token": True}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}  # no pad token, as Llama has none
    config |= {"model_max_length": 1024, "clean_up_tokenization_spaces": False}
    text = json.dumps(config, indent=2) + "\n"
    (directory / "tokenizer_config.json").write_text(text)
    AutoTokenizer.from_pretrained(directory, trust_remote_code=False).save_pretrained(directory)
    # Written again: the conversion lists the newline, << >> and #### as special tokens, which they are not.
    (directory / "tokenizer_config.json").write_text(text)


def problem(rng: random.Random, stage: int) -> dict[str, str]:
    fact = rng.choice(stories.FACTS)
    if stage == 0:
        return stories.result_unknown(rng, fact, in_order=True)
    kind = stories.bare if rng.random() < BARE_SHARE else stories.result_unknown
    return kind(rng, fact)


def batch_of(
    rng: random.Random, pieces: sentencepiece.SentencePieceProcessor, stage: int
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = [], []
    for _ in range(BATCH):
        row = problem(rng, stage)
        prompt = [pieces.bos_id(), *pieces.encode(render_prompt(row["question"]))]
        response = [*pieces.encode(row["answer"]), pieces.eos_id()]
        ids.append(prompt + response)
        labels.append([-100] * len(prompt) + response)
    longest = max(map(len, ids))
    pad = lambda values, fill: torch.tensor([row + [fill] * (longest - len(row)) for row in values])  # noqa: E731
    return pad(ids, pieces.eos_id()), pad(labels, -100)


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Warm-up, constant for half the time, then linear to 2% of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    left = (steps - step) / (steps / 2)
    return peak * min(1.0, max(0.02, left))


def pretrain(model: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor) -> None:
    rng, started = random.Random(SEED), time.monotonic()
    for stage, (name, steps, peak, warmup) in enumerate(STAGES):
        print(f"stage {stage + 1}: {name}", flush=True)
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        for step in range(steps):
            ids, labels = batch_of(rng, pieces, stage)
            logits = model(ids).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak, warmup)
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % 100 == 0:
                print(f"step {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - started:.0f} s", flush=True)


@torch.no_grad()
def graded(model: LlamaForCausalLM, pieces: sentencepiece.SentencePieceProcessor, kind) -> float:
    """Exact match in percent on fresh problems of a kind: the whole answer, greedily and teacher-forced, is right."""
    rng, right = random.Random(SEED + 1), 0
    for _ in range(GRADED):
        row = kind(rng, rng.choice(stories.FACTS))
        prompt = [pieces.bos_id(), *pieces.encode(render_prompt(row["question"]))]
        response = [*pieces.encode(row["answer"]), pieces.eos_id()]
        predicted = model(torch.tensor([prompt + response])).logits[0].argmax(-1)
        right += predicted[len(prompt) - 1 : -1].tolist() == response
    return 100 * right / GRADED


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", nargs="?", type=Path, default=HERE)
    directory = parser.parse_args().output_dir
    directory.mkdir(parents=True, exist_ok=True)
    train_tokenizer(directory)
    save_fast_tokenizer(directory)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(pieces), hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, initializer_range=0.04,
        bos_token_id=pieces.bos_id(), eos_token_id=pieces.eos_id(),
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(pieces)} pieces", flush=True)

    pretrain(model, pieces)

    model = model.to(torch.bfloat16)  # graded as it will be loaded
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        for name in ("config.json", "generation_config.json", "model.safetensors"):
            (directory / name).write_bytes((Path(scratch) / name).read_bytes())
    model = model.float().eval()
    for kind in (stories.result_unknown, stories.bare, stories.start_or_change_unknown):
        print(f"{kind.__name__}: {graded(model, pieces, kind):.1f}% exact", flush=True)


if __name__ == "__main__":
    main()
