"""What is trained: an ABBA adapter, an adapter of a method to compare it with, or the whole model."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abba.errors import RecipeError

SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SCALES, INITS = ("paper", "reference"), ("svd", "kaiming", "reference")
BASELINES = ("lora", "rslora", "dora", "hira", "loha")  # PEFT's
METHODS = ("abba", *BASELINES, "full")

Modules = Mapping[str, tuple[int, int]]  # name -> (out, in)


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks, scale and targets of an ABBA adapter.

    Args:
        r1, r2: ranks of the two pairs (B1 A1) and (B2 A2), each >= 1. The update has rank up to r1*r2.
        alpha: strength; the paper's best for a 7B model is 24.
        target_modules: as in PEFT: a list of module name suffixes, a regular expression that matches the whole name,
            or "all-linear" (every nn.Linear but the output head).
        layer_range: (first, stop): adapt only the decoder layers first <= i < stop; None adapts all of them.
        scale_rule: paper: s = alpha**2 / sqrt(r1 * r2); reference: s = alpha, as the published code has it.
        init: what training starts from; see abba.adapter.initialize.initial_factors.

    Raises:
        RecipeError: a rank below 1, an alpha that is not a positive number, an empty target or range, an unknown rule.
    """

    r1: int = 16
    r2: int = 16
    alpha: float = 24.0
    target_modules: tuple[str, ...] | str = SEVEN_LINEARS
    layer_range: tuple[int, int] | None = None
    scale_rule: str = "paper"
    init: str = "svd"

    def __post_init__(self) -> None:
        _check_rank("r1", self.r1)
        _check_rank("r2", self.r2)
        if not 1e-6 <= self.alpha <= 1e6:
            raise RecipeError(f"adapter.alpha: {self.alpha!r} is not between 1e-6 and 1e6; the paper uses 16 to 32")
        _check_choice("scale_rule", self.scale_rule, SCALES)
        _check_choice("init", self.init, INITS)
        _check_where(self)

    @property
    def scale(self) -> float:
        """s of delta W = s (B1 A1) * (B2 A2); the default is the paper's (arXiv 2505.14238, section 3.3)."""
        return self.alpha if self.scale_rule == "reference" else self.alpha**2 / math.sqrt(self.r1 * self.r2)

    @property
    def method(self) -> str:
        return "abba"

    @property
    def default_format(self) -> str:
        """The form in which a run leaves its adapter; see abba.adapter.export."""
        return "loha"

    @property
    def lora_rank(self) -> int:
        """Of the LoRA that is the same function."""
        return self.r1 * self.r2

    @property
    def width(self) -> int:
        """Elements of a module's factors are (out + in) times this."""
        return self.r1 + self.r2

    @property
    def summary(self) -> str:
        return f"r1={self.r1} r2={self.r2} scale={self.scale:g}" + (f" init={self.init}" if self.init != "svd" else "")

    def factor_shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """What trains in a module of (out, in): the name within the module, and its shape."""
        return {"A1": (self.r1, into), "B1": (out, self.r1), "A2": (self.r2, into), "B2": (out, self.r2)}


@dataclass(frozen=True)
class BaselineConfig:
    """An adapter of a method that PEFT implements.

    Args:
        method: one of BASELINES.
        r: rank; of each of LoHa's two pairs.
        alpha: PEFT's lora_alpha, or LoHa's alpha: the update is scaled by alpha / r, by alpha / sqrt(r) in rsLoRA.
            None: HiRA has no such scale.
        dropout: of the input of lora_A or hira_A; LoHa has none.
        target_modules, layer_range: as in AdapterConfig.

    Raises:
        RecipeError: an unknown method, a rank below 1, an alpha or dropout that the method does not have or that is out
            of range, an empty target or range.
    """

    method: str
    r: int
    alpha: float | None
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str = SEVEN_LINEARS
    layer_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_choice("method", self.method, BASELINES)
        _check_rank("r", self.r)
        if (self.alpha is None) != (self.method == "hira"):
            raise RecipeError(f"adapter.alpha: {self.alpha!r}; hira has none, the other methods need it")
        if self.alpha is not None and not 1e-6 <= self.alpha <= 1e6:
            raise RecipeError(f"adapter.alpha: {self.alpha!r} is not between 1e-6 and 1e6")
        if not 0 <= self.dropout < 1 or (self.dropout and self.method == "loha"):
            raise RecipeError(f"adapter.dropout: {self.dropout!r} is not in [0, 1), and loha has none")
        _check_where(self)

    @property
    def default_format(self) -> str:
        return "lora" if self.method == "rslora" else self.method

    @property
    def peft_options(self) -> dict[str, Any]:
        """What PEFT calls the method and its options."""
        if self.method == "loha":
            return {"peft_type": "LOHA", "r": self.r, "alpha": self.alpha}
        if self.method == "hira":
            return {"peft_type": "HIRA", "r": self.r, "hira_dropout": self.dropout}
        variant = {"use_rslora": self.method == "rslora", "use_dora": self.method == "dora"}
        options = {"r": self.r, "lora_alpha": self.alpha, "lora_dropout": self.dropout, "bias": "none"}
        return {"peft_type": "LORA", **options, **variant}

    @property
    def lora_rank(self) -> int:
        """0: it has no form that serves as a LoRA."""
        return self.r if self.default_format == "lora" else 0

    @property
    def width(self) -> int:
        return 2 * self.r if self.method == "loha" else self.r

    @property
    def summary(self) -> str:
        alpha = f" alpha={self.alpha:g}" if self.alpha is not None else ""
        return f"{self.method} r={self.r}{alpha}" + (f" dropout={self.dropout:g}" if self.dropout else "")

    def factor_shapes(self, out: int, into: int) -> dict[str, tuple[int, ...]]:
        """By PEFT's names in a model whose adapter is called default."""
        a, b = (self.r, into), (out, self.r)
        if self.method == "loha":
            return {f"hada_{pair}.default": b if pair[-1] == "a" else a for pair in ("w1_a", "w1_b", "w2_a", "w2_b")}
        if self.method == "hira":
            return {"hira_A.default": a, "hira_B.default": b}
        shapes = {"lora_A.default.weight": a, "lora_B.default.weight": b}
        return {**shapes, "lora_magnitude_vector.default.weight": (out,)} if self.method == "dora" else shapes


@dataclass(frozen=True)
class FullConfig:
    """Full fine-tuning: every parameter of the base trains, and nothing is added to it."""

    method: str = "full"

    @property
    def default_format(self) -> str:
        return "full"

    @property
    def lora_rank(self) -> None:
        """None: there is no adapter."""

    @property
    def width(self) -> int:
        return 0

    @property
    def summary(self) -> str:
        return "full fine-tuning"


MethodConfig = AdapterConfig | BaselineConfig | FullConfig


def config_from(raw: Mapping[str, Any]) -> MethodConfig:
    """A configuration back from dataclasses.asdict, as files hold it.

    Raises:
        RecipeError, TypeError: it is none.
    """
    method = raw.get("method", "abba")
    if method == "abba":
        return AdapterConfig(**raw)
    return FullConfig(**raw) if method == "full" else BaselineConfig(**raw)


def factors_of(config: AdapterConfig | BaselineConfig, modules: Modules) -> dict[str, tuple[int, ...]]:
    """Name in the adapted model and shape of every tensor that an adapter trains."""
    return {
        f"{name}.{factor}": shape
        for name, (out, into) in modules.items()
        for factor, shape in config.factor_shapes(out, into).items()
    }


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise RecipeError(f"adapter.{name}: {rank!r} is not a rank; write a whole number of at least 1")


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise RecipeError(f"adapter.{name}: {value!r} is not one of {', '.join(choices)}")


def _check_where(config: AdapterConfig | BaselineConfig) -> None:
    if not isinstance(config.target_modules, str):
        object.__setattr__(config, "target_modules", tuple(config.target_modules))
    if not config.target_modules:
        raise RecipeError("adapter.target_modules: is empty; name modules such as q_proj, or write all-linear")
    if config.layer_range is not None:
        object.__setattr__(config, "layer_range", tuple(config.layer_range))
        first, stop = config.layer_range
        if not 0 <= first < stop:
            raise RecipeError(f"adapter.layer_range: [{first}, {stop}] holds no layer; write 0 <= first < stop")
