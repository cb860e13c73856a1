"""From text to token ids, the same for training and scoring."""

from typing import Any

from abba.errors import DataError
from abba.text.chat import ChatTemplate
from abba.text.prompt import CHAT, DEFAULT_PROMPT, render_prompt


def encode_prompt(tokenizer: Any, instructions: list[str], prompt: str = DEFAULT_PROMPT) -> list[list[int]]:
    """Token ids of rendered prompts, with BOS once where the tokenizer has it, never with EOS at the end.

    Raises:
        RecipeError: the prompt is `chat` and the tokenizer has no template for it.
    """
    if prompt == CHAT:
        return ChatTemplate(tokenizer).encode_questions(instructions)
    encoded = tokenizer([render_prompt(text, prompt) for text in instructions]).input_ids
    eos = tokenizer.eos_token_id
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in encoded]


def encode_response(tokenizer: Any, responses: list[str]) -> list[list[int]]:
    """Token ids of responses, ending in EOS.

    Encoded apart from the prompt, so that a prompt's ids are the same in training and in scoring.
    """
    eos = eos_id(tokenizer)
    encoded = tokenizer([text.strip() for text in responses], add_special_tokens=False).input_ids
    return [[*ids, eos] for ids in encoded]


def eos_id(tokenizer: Any) -> int:
    """Raises DataError where there is none."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token; a model trained without one never stops")
    return tokenizer.eos_token_id


def padding_id(tokenizer: Any) -> int:
    """The id to pad with: EOS, whatever the tokenizer says.

    Llama has no pad token, and a pad token added to a tokenizer often has no embedding. Labels and attention are masked
    by position and never by id, so a padding EOS cannot hide the one that ends a response.
    """
    return tokenizer.eos_token_id
