"""Answer extraction: from a generated text to a number that can be compared. Pure functions."""

import re
from fractions import Fraction

_NUMBER = r"[-+−]?\s*(?:\$|€|£)?\s*[-+−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d[\d,]*(?:\.\d+)?)?"
_MARKED = (
    re.compile(rf"####\s*({_NUMBER})"),  # GSM8K
    re.compile(rf"(?:the\s+)?answer\s+is:?\s*\**\s*({_NUMBER})", re.IGNORECASE),  # MetaMathQA
)
_ANY = re.compile(_NUMBER)


def extract_answer(text: str) -> str | None:
    """The final number of a GSM8K-style solution as written, or None.

    GSM8K's `#### N` and MetaMathQA's `The answer is: N` count; of several the last one in the text does.
    """
    found = [match for pattern in _MARKED for match in pattern.finditer(text)]
    return max(found, key=lambda match: match.start(1))[1].strip() if found else None


def parse_number(text: str | None) -> Fraction | None:
    """An exact number: "1,234" "$5.00" "-3" "1/2" "−7" "12 apples". None when there is none, or a division by zero."""
    match = _ANY.search(text or "")
    if match is None:
        return None
    plain = re.sub(r"[\s,$€£]", "", match[0]).replace("−", "-")
    plain = re.sub(r"^[-+]*?(-?)[+]?(?=[\d.])", r"\1", plain)
    numerator, _, denominator = plain.partition("/")
    if denominator and Fraction(denominator) == 0:
        return None
    return Fraction(numerator) / Fraction(denominator or 1)


def same_answer(generated: str, reference: str) -> bool:
    """Whether a generated solution ends in the reference solution's number."""
    wanted = parse_number(extract_answer(reference) or reference)
    got = parse_number(extract_answer(generated))
    return wanted is not None and got == wanted
