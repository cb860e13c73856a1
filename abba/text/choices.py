"""Multiple choice in the format of LLM-Adapters: `the correct answer is answer2`. Pure functions.

Source: https://github.com/AGI-Edgerunners/LLM-Adapters, commonsense_evaluate.py, which takes the first option that a
text names anywhere. Here a text that says which answer is correct is taken at its word first.
"""

import re
from functools import cache

# Task -> its options, in the order in which letters count them.
OPTIONS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4"),
}
_WORD = r"(?<![A-Za-z0-9])(?:{words})(?![A-Za-z0-9])"
# Colons are not given back: of blanks that two parts of a pattern might take, each split would be tried.
_LETTER = re.compile(
    r"(?i:answer|option|choice|solution|ending)(?:(?i:\s+is))?(?:\s*:)?+[\s*(\"'`]*([A-E1-5])(?=[)\"'*`.,:]|\s*$)"
)
_ALONE = re.compile(r"[\s*(\"'`]*([A-Ea-e1-5])[)\"'*`.,:\s]*")
_YES_NO = re.compile(r"[\s*\"'`]*(yes|no)\b", re.IGNORECASE)


def extract_choice(text: str, options: tuple[str, ...]) -> str | None:
    """The option that `the correct answer is ...` names, or None; of several such statements the last one counts."""
    found = [match[1].lower() for match in _stated(options).finditer(text)]
    return found[-1] if found else None


def extract_any_choice(text: str, options: tuple[str, ...]) -> str | None:
    """As stated, else the first option named, with or without a space; else its letter or number, yes or no."""
    stated = extract_choice(text, options)
    if stated is not None:
        return stated
    named = _named(options).search(text)
    if named is not None:
        return re.sub(r"[\s_-]", "", named[0]).lower()
    if options == OPTIONS["boolq"]:
        said = _YES_NO.match(text)
        return {"yes": "true", "no": "false"}[said[1].lower()] if said else None
    counted = _ALONE.fullmatch(text) or _LETTER.search(text)
    if counted is None:
        return None
    position = "ABCDE".find(counted[1].upper()) if counted[1].isalpha() else int(counted[1]) - 1
    return options[position] if position < len(options) else None


@cache
def _stated(options: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(map(re.escape, options))
    return re.compile(
        rf"(?<![A-Za-z])correct\s+answer\s+is(?:\s*:)?+[\s*(\"'`]*({words})(?![A-Za-z0-9])", re.IGNORECASE
    )


@cache
def _named(options: tuple[str, ...]) -> re.Pattern[str]:
    words = "|".join(re.sub(r"(?<=[a-z])(?=[0-9])", r"[\\s_-]?", option) for option in options)
    return re.compile(_WORD.format(words=words), re.IGNORECASE)
