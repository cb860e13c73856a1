"""The prompt. Training and scoring render it from here, so that they cannot differ."""

INSTRUCTION_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)


def render_prompt(instruction: str) -> str:
    """The text in front of a response. Source: the Alpaca template, as the paper's code uses it."""
    return INSTRUCTION_PROMPT.format(instruction=instruction.strip())
