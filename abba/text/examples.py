"""Rows as tokens, with what is learned of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from abba.text.chat import ChatTemplate, Message
from abba.text.encode import encode_prompt, encode_response, eos_id
from abba.text.prompt import CHAT, DEFAULT_PROMPT, PROMPTS
from abba.text.rows import BadRows, RowSource, usable_conversations, usable_rows

AT_ONCE = 100  # conversations, of which each turn is a text


@dataclass(frozen=True)
class Example:
    """A row's number in its dataset, its token ids, and [start, stop) of each stretch that is learned, in order."""

    row: int
    ids: list[int]
    learned: list[tuple[int, int]]


def examples(source: RowSource, tokenizer: Any, prompt: str, bad: BadRows) -> Iterator[Example]:
    """Every usable row of `source`; the others are counted by reason.

    Args:
        prompt: what stands around an instruction. Conversations are always written by the tokenizer's chat template.

    Raises:
        DataError: the rows cannot be read, or the tokenizer has no EOS.
        RecipeError: a chat template is needed, and the tokenizer has none.
    """
    eos_id(tokenizer)
    if source.messages_field is not None:
        yield from _of_conversations(usable_conversations(source, bad), tokenizer, bad)
    elif prompt == CHAT:
        yield from _of_conversations(_as_conversations(source, bad), tokenizer, bad)
    else:
        for numbers, instructions, responses in usable_rows(source, bad):
            asked, said = encode_prompt(tokenizer, instructions, prompt), encode_response(tokenizer, responses)
            for row, before, after in zip(numbers, asked, said, strict=True):
                yield Example(row, [*before, *after], [(len(before), len(before) + len(after))])


def prompt_content(source: RowSource, tokenizer: Any, prompt: str = DEFAULT_PROMPT) -> Any:
    """What the text around the rows of `source` is made from."""
    if prompt == CHAT or source.messages_field is not None:
        return [ChatTemplate(tokenizer).text, tokenizer.special_tokens_map]
    return PROMPTS[prompt]


def _as_conversations(source: RowSource, bad: BadRows) -> Iterator[tuple[int, list[Message]]]:
    for numbers, instructions, responses in usable_rows(source, bad):
        for row, instruction, response in zip(numbers, instructions, responses, strict=True):
            asked = {"role": "user", "content": instruction.strip()}
            yield row, [asked, {"role": "assistant", "content": response.strip()}]


def _of_conversations(
    conversations: Iterator[tuple[int, list[Message]]], tokenizer: Any, bad: BadRows
) -> Iterator[Example]:
    template = ChatTemplate(tokenizer)
    while some := list(islice(conversations, AT_ONCE)):
        found = template.encode_conversations([messages for _, messages in some])
        for (row, _), encoded in zip(some, found, strict=True):
            if isinstance(encoded, ValueError):
                bad.add(row, str(encoded))
            else:
                yield Example(row, *encoded)
