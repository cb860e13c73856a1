"""Numbers as answers: from a generated text to an exact number that can be compared. Pure functions."""

import re
from fractions import Fraction

# What repeats in front of a number is bounded: a text of nothing but $ would otherwise take the square of its length.
_SIGN, _CURRENCY = r"[-+−–]", r"[$€£¥]{0,3}"
_DIGITS = (
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,2}(?![0-9A-Za-z]))?|\.[0-9]+)"
)
_SPACE = r"[^\S\r\n]"  # a fraction does not go on in the next line
_MIXED = rf"[0-9]+{_SPACE}+[0-9]+{_SPACE}*/{_SPACE}*[0-9]+"  # 1 1/2
_FRACTION = rf"(?:{_MIXED}|{_DIGITS}(?:{_SPACE}*/{_SPACE}*{_DIGITS})?)"
_NUMBER = rf"{_SIGN}?\s{{0,3}}{_CURRENCY}\s{{0,3}}{_SIGN}?{_FRACTION}"
_DECORATION = r"(?:[\s*_`(]|\\boxed\{|\\[(\[]|\$(?=\\))*"
_MARKED = (
    re.compile(rf"####{_DECORATION}({_NUMBER})"),  # GSM8K
    # MetaMathQA. The colon is not given back: of blanks that both might take, each split would be tried.
    re.compile(rf"answer\s+is(?:\s*:)?+{_DECORATION}({_NUMBER})", re.IGNORECASE),
)
_ANY = re.compile(_NUMBER)
# In running text a sign belongs to a number only if it touches it and follows no other term: not in 5-3, 7 - 2, x-1.
_IN_TEXT = re.compile(rf"(?:(?<![\w.)\]%]){_SIGN}(?={_CURRENCY}\.?[0-9]))?{_CURRENCY}{_FRACTION}")
_LONGEST = 1000  # characters; Python refuses to convert much longer ones


def extract_answer(text: str) -> str | None:
    """The final number of a GSM8K-style solution as written, or None.

    GSM8K's `#### N` and MetaMathQA's `The answer is: N` count; of several the last one in the text does.
    """
    text = _without_latex(text)
    found = [match for pattern in _MARKED for match in pattern.finditer(text)]
    return max(found, key=lambda match: match.start(1))[1].strip() if found else None


def extract_any_number(text: str) -> str | None:
    """The marked number, else the last one in the text, or None."""
    marked = extract_answer(text)
    if marked is not None:
        return marked
    numbers = _IN_TEXT.findall(_without_latex(text))
    return numbers[-1].strip() if numbers else None


def the_number(text: str) -> str | None:
    """The only number in a text that marks none; None where there are several, of which any might be the answer."""
    numbers = _ANY.findall(_without_latex(text))
    return numbers[0].strip() if len(numbers) == 1 else None


def parse_number(text: str | None) -> Fraction | None:
    """An exact number: "1,234" "$5.00" "-3" "1/2" "1 1/2" "−7" "12 apples". None: no number, x/0, or one too long."""
    match = _ANY.search(_without_latex(text or ""))
    if match is None or len(match[0]) > _LONGEST:
        return None
    plain = re.sub(r"[,$€£¥]", "", match[0]).replace("−", "-").replace("–", "-")
    negative = "-" in plain.partition("/")[0].lower().partition("e")[0]
    whole, rest = _split_mixed(re.sub(r"^[-+\s]+", "", plain).strip())
    numerator, _, denominator = re.sub(r"\s", "", rest).partition("/")
    if denominator and Fraction(denominator) == 0:
        return None
    size = whole + Fraction(numerator) / Fraction(denominator or 1)
    return -size if negative else size


def same_number(extracted: str, reference: str) -> bool:
    """Whether two extracted answers are the same number."""
    wanted = parse_number(reference)
    return wanted is not None and parse_number(extracted) == wanted


def _split_mixed(plain: str) -> tuple[int, str]:
    if not re.fullmatch(_MIXED, plain):
        return 0, plain
    whole, rest = plain.split(maxsplit=1)
    return int(whole), rest


def _without_latex(text: str) -> str:
    r"""What LaTeX puts around and into a number: \$5, 1{,}000, 1\,000, \frac{1}{2}, \text{ cm}."""
    if "\\" not in text and "{,}" not in text:
        return text
    text = text.replace(r"\$", "$").replace("{,}", ",").replace(r"\%", "%")
    text = re.sub(r"(?<=[0-9])\\[,!](?=[0-9]{3}(?![0-9]))", ",", text)
    return re.sub(r"\\[dt]?frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}", r" \1/\2", text)
