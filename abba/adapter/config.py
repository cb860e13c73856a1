"""What an adapter is: ranks, scale and the modules it goes into."""

import math
from dataclasses import dataclass

from abba.errors import RecipeError

SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterConfig:
    """Ranks, scale and targets of an ABBA adapter.

    Args:
        r1, r2: ranks of the two pairs (B1 A1) and (B2 A2), each >= 1. The update has rank up to r1*r2.
        alpha: strength; the paper's best for a 7B model is 24.
        target_modules: as in PEFT: a list of module name suffixes, a regular expression that matches the whole name,
            or "all-linear" (every nn.Linear but the output head).
        layer_range: (first, stop): adapt only the decoder layers first <= i < stop; None adapts all of them.

    Raises:
        RecipeError: a rank below 1, an alpha that is not a positive number, an empty target or range.
    """

    r1: int = 16
    r2: int = 16
    alpha: float = 24.0
    target_modules: tuple[str, ...] | str = SEVEN_LINEARS
    layer_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name, rank in (("r1", self.r1), ("r2", self.r2)):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise RecipeError(f"adapter.{name}: {rank!r} is not a rank; write a whole number of at least 1")
        if not 1e-6 <= self.alpha <= 1e6:
            raise RecipeError(f"adapter.alpha: {self.alpha!r} is not between 1e-6 and 1e6; the paper uses 16 to 32")
        if not isinstance(self.target_modules, str):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not self.target_modules:
            raise RecipeError("adapter.target_modules: is empty; name modules such as q_proj, or write all-linear")
        if self.layer_range is not None:
            object.__setattr__(self, "layer_range", tuple(self.layer_range))
            first, stop = self.layer_range
            if not 0 <= first < stop:
                raise RecipeError(f"adapter.layer_range: [{first}, {stop}] holds no layer; write 0 <= first < stop")

    @property
    def scale(self) -> float:
        """s = alpha**2 / sqrt(r1 * r2), the paper's rank-stable scale (arXiv 2505.14238, section 3.3)."""
        return self.alpha**2 / math.sqrt(self.r1 * self.r2)
