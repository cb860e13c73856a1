"""Conversations through the tokenizer's own chat template, the same for training and scoring.

A template is a program that comes with a base. It runs only where a recipe or a user asks for the prompt `chat`, and in
transformers' sandbox, which lets it write text and nothing else; it could still take long.
"""

import hashlib
from collections.abc import Callable
from itertools import islice
from typing import Any

from jinja2 import TemplateSyntaxError

from abba.errors import RecipeError, first_line
from abba.text.prompt import CHAT

Message = dict[str, str]
Encoded = tuple[list[int], list[tuple[int, int]]]  # token ids, [start, stop) of each stretch that is learned
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
SPELLINGS = (("role", "content"), ("from", "value"))  # OpenAI's and ShareGPT's
BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # and not learned
SWITCHES = ("weight", "train")  # OpenAI's and axolotl's: whether a turn is to be learned
# Some templates write the day into the system prompt; tokens must not depend on when they are made. Llama 3's own date.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"


def read_conversation(value: Any, field: str) -> list[Message]:
    """The messages of a row, up to the last of the assistant: nothing is learned from what follows.

    Raises:
        ValueError: why there is nothing to train on.
    """
    if value is None:
        raise ValueError(f"{field} is missing")
    if not isinstance(value, list):
        raise ValueError(f"{field} is {type(value).__name__}, not a list")
    if not value:
        raise ValueError(f"{field} is empty")
    messages = [_read_message(message, field) for message in value]
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise ValueError(f"{field} has no turn of the assistant")
    if answers[0] == 0:
        raise ValueError(f"{field} starts with the assistant, whom nobody has asked")
    return messages[: answers[-1] + 1]


def _read_message(message: Any, field: str) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{field} holds {type(message).__name__}, not objects of role and content")
    said, content = next(
        ((message[role], message.get(text)) for role, text in SPELLINGS if message.get(role) is not None), (None, None)
    )
    role = ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        raise ValueError(f"{field} has the role {str(said)[:40]!r}, which is none of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"{field} has content that is {type(content).__name__}, not text")
    lost = [key for key in BESIDE_CONTENT if message.get(key)]
    lost += [f"{key}={message[key]}" for key in SWITCHES if message.get(key) not in (None, True)]  # 1 is True
    if lost:
        raise ValueError(f"{field} has a turn with {lost[0]}, which is not supported")
    if not content.strip() and role != "system":
        raise ValueError(f"{field} has an empty turn of the {role}")
    return {"role": role, "content": content.strip()}


class ChatTemplate:
    """A tokenizer's chat template.

    Raises:
        RecipeError: it has none.
    """

    def __init__(self, tokenizer: Any) -> None:
        try:
            own = tokenizer.get_chat_template()
        except ValueError:
            raise RecipeError(
                f"the prompt {CHAT}: this base's tokenizer has no chat template; put a chat_template.jinja beside it, "
                "take the base's instruct version, or train on instruction and response with data.prompt=alpaca"
            ) from None
        self.text = f"{FIXED_DATE}{own}" if "strftime_now" in own else own
        self._tokenizer = tokenizer
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = special | set(tokenizer.all_special_ids)

    @property
    def digest(self) -> str:
        """What tells this template from others."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def encode_questions(self, instructions: list[str]) -> list[list[int]]:
        """Token ids of one turn of the user each, up to where the assistant's begins.

        Raises:
            RecipeError: the template refuses a turn of the user.
        """
        try:
            texts = [self._render([{"role": "user", "content": text.strip()}], True) for text in instructions]
        except ValueError as error:
            raise RecipeError(f"the prompt {CHAT}: {error}") from None
        return self._encode(texts)

    def turn_end(self) -> set[int]:
        """The token with which the template ends a turn of the assistant; empty where it writes none.

        Raises:
            RecipeError: the template refuses the shortest conversation.
        """
        said = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]
        try:
            (ids,) = self._encode([self._render(said, False)])
        except ValueError as error:
            raise RecipeError(f"the prompt {CHAT}: {error}") from None
        stop = self._end_of_turn(ids)
        if ids[stop - 1] == self._tokenizer.eos_token_id:
            stop = self._end_of_turn(ids[: stop - 1])  # an EOS that Phi's template writes where all ends
        return {ids[stop - 1]} & self._special

    def encode_conversations(self, conversations: list[list[Message]]) -> list[Encoded | ValueError]:
        """Of each, token ids and what is learned: every turn of the assistant with its end, and nothing else.

        The template writes BOS where a conversation has one. A turn ends with the token that the template puts there,
        the last one with EOS in any case, because that is where generation stops.

        Args:
            conversations: as `read_conversation` returns them; tokenised together, which takes all cores.

        Returns:
            A ValueError in place of one that the template refuses, or of which it writes a turn otherwise when more
            follows.
        """
        rendered = [_tried(self._render_turns, messages) for messages in conversations]
        texts = [text for found in rendered if isinstance(found, list) for text in found]
        encoded = iter(self._encode(texts) if texts else [])
        return [
            _tried(self._learned, list(islice(encoded, len(found)))) if isinstance(found, list) else found
            for found in rendered
        ]

    def _render_turns(self, messages: list[Message]) -> list[str]:
        """The text up to each turn of the assistant, and that with it, in pairs; the last is the whole."""
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        return [
            text
            for place in answers
            for text in (self._render(messages[:place], True), self._render(messages[: place + 1], False))
        ]

    def _learned(self, encoded: list[list[int]]) -> Encoded:
        """Of the tokens of what `_render_turns` gives."""
        whole, learned = encoded[-1], []
        for before, after in zip(encoded[::2], encoded[1::2], strict=True):
            start, stop = len(before), self._end_of_turn(after)
            if whole[:stop] != after[:stop] and after[stop - 1] == self._tokenizer.eos_token_id:
                stop = self._end_of_turn(after[: stop - 1])  # an EOS that Phi's template writes where all ends
            if after[:start] != before:
                raise ValueError(
                    "the chat template asks for an answer otherwise than it writes one, such as with <think>"
                )
            if whole[:stop] != after[:stop]:
                raise ValueError("the chat template writes a turn otherwise, or in other tokens, when more follows")
            if stop <= start:
                raise ValueError("the chat template leaves out a turn of the assistant")
            learned.append((start, stop))
        start, stop = learned[-1]
        if whole[stop - 1] == self._tokenizer.eos_token_id:
            return whole[:stop], learned
        return [*whole[:stop], self._tokenizer.eos_token_id], [*learned[:-1], (start, stop + 1)]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(texts, add_special_tokens=False).input_ids  # or BOS would stand twice

    def _render(self, messages: list[Message], generation: bool) -> str:
        """The text of `messages`; with `generation` up to where the assistant's turn begins.

        Raises:
            ValueError: the template refuses them.
            RecipeError: it is no template.
        """
        try:
            return self._tokenizer.apply_chat_template(
                messages, chat_template=self.text, tokenize=False, add_generation_prompt=generation
            )
        except TemplateSyntaxError as error:
            line = error.lineno - self.text.startswith(FIXED_DATE)  # which has a line of its own
            raise RecipeError(
                f"the prompt {CHAT}: the chat template of this base's tokenizer has a mistake in line {line}: "
                f"{first_line(error)}; mend it, or train on instruction and response with data.prompt=alpaca"
            ) from None
        except Exception as error:  # whatever a program can raise
            raise ValueError(f"the chat template refuses it: {first_line(error)}") from None

    def _end_of_turn(self, ids: list[int]) -> int:
        """Where the last turn of `ids` ends: after its special token, without the newline that templates add to it."""
        stop = len(ids)
        while stop and ids[stop - 1] not in self._special and not self._tokenizer.decode(ids[stop - 1 : stop]).strip():
            stop -= 1
        return stop if stop and ids[stop - 1] in self._special else len(ids)


def _tried(function: Callable[[Any], Any], value: Any) -> Any:
    """What it returns, or the ValueError that it raises."""
    try:
        return function(value)
    except ValueError as error:
        return error
