"""The recipe's section on what is trained: a method and its own options, none of another's."""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from abba.adapter.config import (
    INITS,
    METHODS,
    SCALES,
    SEVEN_LINEARS,
    AdapterConfig,
    BaselineConfig,
    FullConfig,
    MethodConfig,
)
from abba.training.section import BelowOne, Count, Positive, Section, Text, own_error

WHERE = {"target_modules": list(SEVEN_LINEARS), "layer_range": None}  # of all methods but full
ABBA_OPTIONS = {field.name: field.default for field in fields(AdapterConfig) if field.name not in WHERE}
# Of each method: its options with their defaults. The parameters of r = 32 are those of r1 = r2 = 16 and of LoHa's 16.
METHOD_OPTIONS: dict[str, dict[str, Any]] = {
    "abba": {**ABBA_OPTIONS, "init_from": None, "cache_factors": True},
    **{method: {"r": 32, "alpha": 32.0, "dropout": 0.0} for method in ("lora", "rslora", "dora")},
    "hira": {"r": 32, "dropout": 0.0},
    "loha": {"r": 16, "alpha": 16.0},
    "full": {},
}


class AdapterSection(Section):
    """None: not an option of the method. `alpha` is ABBA's, or PEFT's of the method."""

    method: Literal[METHODS] = "abba"
    r1: Positive | None = None
    r2: Positive | None = None
    r: Positive | None = None
    alpha: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    scale_rule: Literal[SCALES] | None = None
    init: Literal[INITS] | None = None
    dropout: BelowOne | None = None
    target_modules: list[str] | str | None = None
    layer_range: tuple[Count, Count] | None = None  # [first, stop): adapt these decoder layers only
    init_from: Text | None = None  # a saved adapter to start from, with a fresh optimizer
    cache_factors: bool | None = None  # keep the SVD's in data.prepared_path: the next start on this base reads them

    @model_validator(mode="before")
    @classmethod
    def _has_its_defaults(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        given = {key: value for key, value in raw.items() if value is not None}
        return {**_options(given.get("method", "abba")), **given}

    @model_validator(mode="after")
    def _has_its_own_options(self) -> "AdapterSection":
        known = _options(self.method)
        mistakes = {
            key: f"{str(value)[:50]}: no option of the method {self.method}, whose options are: "
            f"{', '.join(known) or 'none'}; leave it out, or write adapter.{key}=null where a recipe that is extended "
            "sets it"
            for key, value in self
            if key not in ("method", *known) and value is not None
        }
        if self.method == "abba" and self.init_from is not None and self.init != ABBA_OPTIONS["init"]:
            mistakes["init"] = (
                f"{self.init} has no meaning with init_from, whose factors training starts from; leave one out"
            )
        self.refuse(mistakes)
        return self

    @field_validator("layer_range", mode="before")
    @classmethod
    def _list_is_a_range(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value  # YAML has no tuples

    @field_validator("target_modules")
    @classmethod
    def _names_something(cls, value: list[str] | str | None) -> list[str] | str | None:
        if value is not None and not value:
            raise own_error("is empty; name modules such as q_proj, or write all-linear")
        return value

    @field_validator("layer_range")
    @classmethod
    def _holds_a_layer(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] >= value[1]:
            raise own_error("holds no layer; write [first, stop] with first < stop")
        return value

    def config(self) -> MethodConfig:
        if self.method == "full":
            return FullConfig()
        where = (
            self.target_modules if isinstance(self.target_modules, str) else tuple(self.target_modules),
            self.layer_range,
        )
        if self.method == "abba":
            return AdapterConfig(self.r1, self.r2, self.alpha, *where, self.scale_rule, self.init)
        return BaselineConfig(self.method, self.r, self.alpha, self.dropout or 0.0, *where)


def _options(method: Any) -> dict[str, Any]:
    """The options of a method with their defaults; none of a method that is no such name, which is reported itself."""
    own = METHOD_OPTIONS.get(method, {}) if isinstance(method, str) else {}
    return own if method == "full" else {**own, **WHERE}
