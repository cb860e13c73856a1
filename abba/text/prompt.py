"""The prompts. Training and scoring render them from here, so that they cannot differ."""

import re

# Names of `data.prompt` in a recipe. Source of alpaca: the Alpaca template, as the paper's code uses it.
PROMPTS = {
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction}\n\n### Response:"
    ),
    "plain": "{instruction}\n",
}
CHAT = "chat"  # the tokenizer's own template, see chat.py
PROMPT_NAMES = (*PROMPTS, CHAT)
DEFAULT_PROMPT = "alpaca"
_NEXT_PROMPT = re.compile(r"\n[ \t]*(?:###\s*(?:Instruction|Input|Response)\b|Below is an instruction that describes)")


def render_prompt(instruction: str, prompt: str = DEFAULT_PROMPT) -> str:
    """The text in front of a response. `prompt` is one of PROMPTS."""
    return PROMPTS[prompt].format(instruction=instruction.strip())


def response_of(generated: str) -> str:
    """A generated text up to where the model goes on with a prompt of its own, whose answer is not to ours."""
    found = _NEXT_PROMPT.search(generated)
    return generated[: found.start()] if found else generated
