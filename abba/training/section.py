"""What the sections of a recipe have in common: their rules, the types of their values, and how a mistake is worded."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

OWN = "own"  # the type of an error whose words are ours

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Size = Annotated[float, Field(ge=0, allow_inf_nan=False)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Text = Annotated[str, Field(min_length=1, max_length=1000, pattern=r"^[^\x00\n]*$")]  # a path, a name, a field


class Section(BaseModel):
    # strict: a text is never taken for a number; an int still passes for a float.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def refuse(self, mistakes: dict[str, str]) -> None:
        """For a validator, which ends with what it raises: what is wrong with each of these keys, all at once.

        Raises:
            ValidationError: unless there are none.
        """
        if mistakes:
            errors = [(key, own_error("{why}", why=why)) for key, why in mistakes.items()]
            lines = [InitErrorDetails(type=error, loc=tuple(key.split(".")), input=None) for key, error in errors]
            raise ValidationError.from_exception_data(type(self).__name__, lines)


def own_error(message: str, **context: Any) -> PydanticCustomError:
    """For a validator to raise: `message` is what is wrong and the way out, with names of `context` in braces."""
    return PydanticCustomError(OWN, message, context)
