"""The recipe: one YAML file describes one run. Strict types, every mistake reported at once."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from abba.errors import RecipeError
from abba.sharded.owned_keys import FREE_KEYS, OWNED_KEYS
from abba.storage import is_file
from abba.text.graders import SUITES, members
from abba.training.adapter_section import AdapterSection
from abba.training.data_section import DataSection
from abba.training.section import OWN, BelowOne, Count, Positive, Section, Seed, Share, Size, Text, own_error
from abba.training.yaml_file import read_recipe_file, suggestion


class ModelSection(Section):
    name_or_path: Text  # a directory, or a Hub name
    revision: Text | None = None  # a Hub commit, branch or tag
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: bfloat16, where the processor can
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"


class TrainSection(Section):
    global_batch_size: Positive
    per_device_train_batch_size: Positive
    learning_rate: Size
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Share = 0.0
    group_by_length: bool = False  # rows of like length in a micro-batch, without change to the global batch
    num_train_epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    max_steps: Positive | None = None  # instead of num_train_epochs
    weight_decay: Size = 0.0
    adam_beta1: BelowOne = 0.9
    adam_beta2: BelowOne = 0.999
    adam_epsilon: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    max_grad_norm: Size = 1.0
    gradient_checkpointing: Literal["reentrant", "non_reentrant", "selective", "none"] = "reentrant"
    seed: Seed = 42
    eval_steps: Positive | None = None  # None: at the end only
    per_device_eval_batch_size: Positive = 8
    logging_steps: Positive = 10
    ddp_timeout: Positive = 1800  # seconds until ranks that wait for one that hangs give up

    def schedule(self) -> dict[str, Any]:
        """Arguments of abba.training.schedule.learning_rate."""
        return {"peak": self.learning_rate, "kind": self.lr_scheduler_type, "warmup_ratio": self.warmup_ratio}

    def adam(self) -> dict[str, Any]:
        """Arguments of torch.optim.AdamW."""
        betas = (self.adam_beta1, self.adam_beta2)
        return {"lr": self.learning_rate, "betas": betas, "eps": self.adam_epsilon, "weight_decay": self.weight_decay}

    @field_validator("per_device_train_batch_size")
    @classmethod
    def _micro_batches_are_whole(cls, micro: int, info: ValidationInfo) -> int:
        whole = info.data.get("global_batch_size", micro)
        if whole % micro:
            message = "global_batch_size {whole} is not a multiple of per_device_train_batch_size {micro}"
            raise own_error(message, whole=whole, micro=micro)
        return micro


class CheckpointSection(Section):
    save_steps: Positive | None = None  # None: at the end only, and when the job is asked to stop
    save_total_limit: Positive = 2
    resume: Text = "auto"  # auto: from output_dir's newest valid one; never; or another run's checkpoint
    strict: bool = False  # refuse a damaged checkpoint instead of using the one before
    allow_changed: list[str] = []  # fields that may differ from the checkpoint's: train.learning_rate, software
    grace_seconds: Positive = 240  # from SIGTERM or SIGUSR1 to a step's end; the save comes after it


class EvaluateSection(Section):
    task: Text = "gsm8k"  # math, commonsense, or one of its eight; see abba/text/graders.py
    path: Text | None = None  # None: gsm8k and math from the Hub; of commonsense the directory of TASK/test.json
    limit: Positive | None = None
    batch_size: Positive = 32
    max_new_tokens: Positive | None = None  # None: the task's
    max_ungraded: Count = 0  # rows that no grader can decide and that count as wrong: more than this ends the score
    engine: Literal["auto", "vllm", "transformers"] = "auto"  # auto: vllm where it can, on GPUs

    @field_validator("task")
    @classmethod
    def _is_known(cls, task: str) -> str:
        if not members(task):
            known = {"near": suggestion(task, list(SUITES)), "all": ", ".join(SUITES)}
            raise own_error("{task} is no task{near}; there are {all}", task=repr(task), **known)
        return task


class Recipe(Section):
    """One run, resolved. Sections hold what their name says; `deepspeed` is passed on as it is."""

    output_dir: Text | None = None  # runs/NAME for a recipe NAME.yaml
    overwrite_output_dir: bool = False
    model: ModelSection
    adapter: AdapterSection = AdapterSection()
    data: DataSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    deepspeed: dict[str, Any] = {}
    evaluate: EvaluateSection | None = None

    def with_dtype(self, dtype: str) -> "Recipe":
        """The same with what `model.dtype` comes to on this machine."""
        return self.model_copy(update={"model": self.model.model_copy(update={"dtype": dtype})})

    def with_attention(self, attention: str) -> "Recipe":
        """The same with what `model.attn_implementation` comes to on this machine, for this architecture."""
        return self.model_copy(update={"model": self.model.model_copy(update={"attn_implementation": attention})})

    def with_resume(self, resume: str) -> "Recipe":
        """The same with what `checkpoint.resume` is meant to be at this start, which then discards nothing."""
        checkpoint = self.checkpoint.model_copy(update={"resume": resume})
        return self.model_copy(update={"checkpoint": checkpoint, "overwrite_output_dir": False})

    @property
    def factor_cache(self) -> Path | None:
        return Path(self.data.prepared_path) if self.adapter.cache_factors else None

    @field_validator("deepspeed")
    @classmethod
    def _leaves_our_keys_alone(cls, value: dict[str, Any]) -> dict[str, Any]:
        mistakes = []
        if not isinstance(value.get("zero_optimization", {}), dict):
            mistakes.append(f"zero_optimization: {value['zero_optimization']!r} is no section")
        for key, way_out in OWNED_KEYS.items():
            section, _, inner = key.partition(".")
            given = value.get(section)
            if not inner and section in value:
                mistakes.append(f"{key} cannot be set here: {way_out}")
            known = given if isinstance(given, dict) else {}
            for name in sorted({inner, inner.removeprefix("stage3_")} & known.keys()):
                mistakes.append(f"{section}.{name} cannot be set here: {way_out}")
        for key in value.keys() - FREE_KEYS - OWNED_KEYS.keys():
            mistakes.append(f"{key}: unknown key{suggestion(key, list(FREE_KEYS))}; known here: {', '.join(FREE_KEYS)}")
        if mistakes:
            raise own_error("{all}", all="; ".join(mistakes))
        return value

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        mistakes = {}
        if self.overwrite_output_dir and self.checkpoint.resume != "never":
            mistakes["overwrite_output_dir"] = (
                f"discards an earlier run, checkpoint.resume={self.checkpoint.resume} continues one; "
                "leave it out, or set checkpoint.resume=never"
            )
        if self.train.eval_steps and not self.data.eval_rows:
            mistakes["train.eval_steps"] = "has no meaning without held-out rows; set data.eval_rows too"
        self.refuse(mistakes)  # one validator: of two the second runs only where the first finds nothing
        return self


def load_recipe(name: str, overrides: list[str], directory: Path) -> Recipe:
    """Read a recipe by path, or by name from `directory`, and apply `section.key=value` overrides.

    Raises:
        RecipeError: one line per mistake; all of them.
    """
    path = find_recipe(name, directory)
    raw = read_recipe_file(path, overrides, directory)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(_explain(error, path)) from None
    if not recipe.output_dir:
        recipe = recipe.model_copy(update={"output_dir": f"runs/{path.stem}"})
    return recipe


def find_recipe(name: str, directory: Path) -> Path:
    """A path as given, or a name in `directory` with or without .yaml."""
    candidates = [Path(name), directory / name, directory / f"{name}.yaml"]
    for candidate in candidates:
        if is_file(candidate, RecipeError):
            return candidate
    known = sorted(path.stem for path in directory.glob("*.yaml"))
    raise RecipeError(
        f"{name!r}: no such recipe file, nor one of this name in {directory}{suggestion(Path(name).stem, known)}; "
        f"there are {', '.join(known)}"
    )


UNION_TAGS = ("str", "list[str]")
SOURCE = re.compile(r"^data\.sources\.\d+\.")


def _explain(error: ValidationError, path: Path) -> str:
    found: dict[str, str] = {}  # a union of types gives a mistake for each; the first will do
    for mistake in error.errors(include_url=False):
        where = ".".join(str(part) for part in mistake["loc"] if part not in UNION_TAGS)
        reason = _reason(mistake, where)
        if found.get(SOURCE.sub("data.", where, count=1)) != reason:  # not taken over from the data section
            found.setdefault(where, reason)
    unique = [f"{where}: {reason}" if where else reason for where, reason in found.items()]
    if len(unique) == 1:
        return f"{path}: {unique[0]}"
    return f"{path}: {len(unique)} mistakes:\n" + "\n".join(f"  {line}" for line in unique)


def _reason(mistake: dict[str, Any], where: str) -> str:
    kind, value, context = mistake["type"], mistake.get("input"), mistake.get("ctx", {})
    if kind == "extra_forbidden":
        parent, _, key = where.rpartition(".")
        section = _fields_of(parent)
        elsewhere = [name for name in _all_keys() if name.rpartition(".")[2] == key]
        near = f"; did you mean {elsewhere[0]}?" if elsewhere else suggestion(key, section)
        return f"unknown key{near}; known here: {', '.join(section)}"
    if kind == "missing":
        return "is required"
    if kind == "model_type":
        return f"{value!r} is a value, not a section of keys and values"
    if isinstance(value, str) and kind in ("int_type", "float_type", "bool_type"):
        wanted = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false"}[kind]
        return f"{value!r} is text, not {wanted}" + ("; write it without quotes" if _is_number(value) else "")
    if kind == OWN:
        return mistake["msg"]
    if kind == "literal_error":
        return f"{value!r} is not one of {context['expected']}"
    return f"{value!r}: {mistake['msg'][:1].lower()}{mistake['msg'][1:]}"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return not text.startswith("0") or "." in text  # 010 is text with or without quotes


def _fields_of(section: str) -> list[str]:
    model: type[BaseModel] | None = Recipe
    for part in section.split("."):
        if part and not part.isdecimal():  # of a list all items are alike
            field = model.model_fields.get(part) if model else None
            model = _section_in(field.annotation) if field else None
    return list(model.model_fields) if model else []


def _all_keys() -> list[str]:
    """section.key of every section."""
    return [f"{section}.{key}" for section in Recipe.model_fields for key in _fields_of(section)]


def _section_in(kind: Any) -> type[BaseModel] | None:
    """The section of an annotation such as `list[SourceSection] | None`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind
    return next(filter(None, map(_section_in, get_args(kind))), None)
