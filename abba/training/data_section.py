"""The recipe's section on what is trained on: one source of rows, or several that are mixed."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from abba.text.prompt import CHAT, DEFAULT_PROMPT, PROMPT_NAMES
from abba.training.section import Count, Positive, Section, Text, own_error

QUESTIONS = {"instruction_field": "question", "response_field": "answer"}  # of rows that hold no conversations
OF_QUESTIONS = (*QUESTIONS, "input_field")


class RowsSection(Section):
    """Keys of a source. Rows are either an instruction and its response, or a conversation in `messages_field`."""

    path: Text | None = None  # a JSON, JSONL or Parquet file, or a Hub dataset
    name: Text | None = None  # a Hub dataset's configuration
    revision: Text | None = None
    split: Text = "train"
    instruction_field: Text | None = None  # question; None with messages_field
    input_field: Text | None = None  # appended to the instruction, as in Alpaca's rows
    response_field: Text | None = None  # answer; None with messages_field
    messages_field: Text | None = None  # a list of {role, content}: every turn of the assistant is learned
    max_rows: Positive | None = None

    @model_validator(mode="before")
    @classmethod
    def _has_its_fields(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or raw.get("messages_field") is not None:
            return raw
        return {**raw, **{key: raw[key] if raw.get(key) is not None else field for key, field in QUESTIONS.items()}}

    @model_validator(mode="after")
    def _holds_one_kind_of_rows(self) -> "RowsSection":
        others = [key for key in OF_QUESTIONS if getattr(self, key) is not None]
        if self.messages_field is not None and others:
            message = (
                "messages_field={field} holds whole conversations, so {key}={value} means nothing; leave it out, or "
                "write {key}: null where it is set elsewhere"
            )
            raise own_error(message, field=self.messages_field, key=others[0], value=getattr(self, others[0]))
        return self


SHARED = tuple(key for key in RowsSection.model_fields if key != "path")  # with sources; each has its own path


class SourceSection(RowsSection):
    """One of several sources. A key that is left out has the value of the data section."""

    path: Text
    weight: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0  # times an epoch takes its rows


class DataSection(RowsSection):
    sources: Annotated[list[SourceSection], Field(min_length=1, max_length=100)] | None = None  # instead of path
    prompt: Literal[PROMPT_NAMES] = DEFAULT_PROMPT  # around an instruction, in training and in scoring
    max_length: Annotated[int, Field(ge=8)] = 512
    max_bad_rows: Count = 0  # rows of a source that cannot be trained on: more than this ends the run
    eval_rows: Count = 0  # held out for eval_loss, chosen by seed
    packing: bool = False  # the rows of a micro-batch on one line, not padded; none sees another
    prepared_path: Text = "runs/prepared"  # tokens, and the base's initial factors: shared by all runs

    @model_validator(mode="before")
    @classmethod
    def _gives_what_sources_leave_out(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        sources = raw.get("sources")
        if isinstance(sources, list):
            raw = {**raw, "sources": [_with_shared(raw, source) for source in sources]}
        parts = [raw, *(raw["sources"] if isinstance(sources, list) else [])]
        chats = any(isinstance(part, dict) and part.get("messages_field") is not None for part in parts)
        return {**raw, "prompt": CHAT} if chats and raw.get("prompt") is None else raw

    @model_validator(mode="after")
    def _has_rows(self) -> "DataSection":
        if (self.path is None) == (self.sources is None):
            message = "path: is required, or sources: a list of such"
            if self.path is not None:
                message = (
                    "path={path} is one source and sources are others; leave one out, or write data.path=null where a "
                    "recipe that is extended sets it"
                )
            raise own_error(message, path=self.path or "")
        if self.prompt != CHAT and any(source.messages_field is not None for source in self.all_sources):
            message = "prompt={prompt} is not what conversations are written with; leave it out, or write prompt: chat"
            raise own_error(message, prompt=self.prompt)
        return self

    @property
    def all_sources(self) -> "list[SourceSection | DataSection]":
        """The sources, of which the section itself may be the only one."""
        return self.sources or [self]

    @property
    def weights(self) -> list[float]:
        return [source.weight for source in self.sources or []] or [1.0]


def _with_shared(data: dict[str, Any], source: Any) -> Any:
    """The keys of a source over those of the data section; fields of another kind of rows are not taken over."""
    if not isinstance(source, dict):
        return source
    shared = {key: data[key] for key in SHARED if key in data}
    if source.get("messages_field") is not None:
        shared = {key: value for key, value in shared.items() if key not in OF_QUESTIONS}
    elif any(source.get(key) is not None for key in OF_QUESTIONS):
        shared.pop("messages_field", None)
    return {**shared, **source}
