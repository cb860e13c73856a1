"""See lm_eval."""

from lm_eval import _LM as HFLM

__all__ = ["HFLM"]
