r"""Mathematical expressions as answers, in the style of MATH: \boxed{...}, compared by math-verify."""

import importlib.util
import re

from abba.errors import RecipeError
from abba.text.answers import extract_any_number

# Mathematics between its own brackets may take several lines, words one.
_STATED = re.compile(
    r"answer\s+is(\s*:)?+[\s*]*+(\$\$[\s\S]{1,1000}?\$\$|\\\[[\s\S]{1,1000}?\\\]|\S[^\n]*)", re.IGNORECASE
)
_ONLY_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s,'’-]+[^\W\d_]+)*!?")  # as in "the answer is correct"
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_MATH = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$(.+?)(?<!\\)\$|\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
_WORDS = re.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
_SPACING = re.compile(r"(?:\\(?:left|right|,|!|;|:|quad|qquad| )|\s)+")
_NEEDLESS = re.compile(r"(?<![0-9]) | (?![0-9])| (?=[0-9]{3}(?![0-9]))")  # 3 4 is not 34, but 1 000 is 1000
_DOLLAR = re.compile(r"(?<!\\)\$")
_LONGEST = 1000  # characters; a longer one is no final answer


# As in setup.cfg; by their own names, because a checkout that is mounted into a container is not installed.
_INSTALL = "pip install 'math-verify[antlr4-13-2]>=0.9,<0.10'"


def require_math_verify() -> None:
    """Raises RecipeError when math-verify is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise RecipeError(f"task math: answers are compared by math-verify; {_INSTALL}")


def extract_expression(text: str) -> str | None:
    r"""The content of `\boxed{...}` or what follows `The answer is:`, whichever comes last; None without either.

    Where there is a box, mere words that follow "the answer is" without a colon are no answer.
    """
    boxes = [(start, content) for start, content in _all_boxed(text) if content]
    found = list(boxes)
    for match in _STATED.finditer(text):
        answer = _sentence(match[2])
        if match[1] or not (boxes and _ONLY_WORDS.fullmatch(answer)):
            found.append((match.start(2), answer))
    return _short(max(found)[1]) if found else None


def reference_expression(solution: str) -> str | None:
    """The answer of a reference solution in the style of MATH, whose last box holds it."""
    boxes = [content for _, content in _all_boxed(solution) if content]
    return _short(boxes[-1]) if boxes else extract_expression(solution)


def extract_any_expression(text: str) -> str | None:
    """As stated, else the last expression between dollars, else the last number."""
    stated = extract_expression(text)
    if stated is not None:
        return stated
    inline = [next(filter(None, groups)) for groups in _MATH.findall(text)]
    return _short(_bare(inline[-1])) if inline else extract_any_number(text)


def same_expression(extracted: str, reference: str) -> bool:
    """Whether two extracted answers are equal as mathematics, or as text where the reference is words.

    May take very long and much memory; see abba.evaluation.grading. math-verify's own time limit is off, because its
    comparison swallows it and calls the answer wrong.
    """
    got, wanted = _canonical(extracted), _canonical(reference)
    if got == wanted:
        return bool(wanted)
    if _WORDS.fullmatch(reference.strip()):
        return got.strip("()").lower() == wanted.strip("()").lower()
    from math_verify import LatexExtractionConfig, parse, verify

    # LaTeX alone: its reader of plain expressions hands a model's text to Python's eval.
    limits = {"extraction_config": [LatexExtractionConfig()], "parsing_timeout": None, "raise_on_error": True}
    lines = (" ".join(re.sub(_DOLLAR, "", _bare(text)).split()) for text in (reference, extracted))
    gold, target = (parse(f"${line}$", **limits) for line in lines)  # its pattern for $ ends with the line
    return bool(verify(gold, target, timeout_seconds=None, raise_on_error=True))


def _all_boxed(text: str) -> list[tuple[int, str]]:
    """(position, content) of every box; braces balance, and a box without them holds one word."""
    boxes = []
    for match in _BOXED.finditer(text):
        start, depth = match.end(), 0
        if not text.startswith("{", start):
            word = re.match(r"[^\s$.,]+", text[start:])
            boxes.append((match.start(), word[0] if word else ""))
            continue
        for position in range(start, min(len(text), start + _LONGEST)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                boxes.append((match.start(), _bare(text[start + 1 : position])))
                break
    return boxes


def _sentence(text: str) -> str:
    """The answer at the start of a line: an expression between dollars, a box, or the words up to a full stop."""
    inline = _MATH.match(text)
    if inline is not None:
        text = next(filter(None, inline.groups()))
    boxes = _all_boxed(text)
    return boxes[-1][1] if boxes else _bare(re.split(r"\.(?=\s|$)", text)[0])


def _bare(text: str) -> str:
    inline = _MATH.fullmatch(text.strip())
    text = next(filter(None, inline.groups())) if inline else text
    return text.strip().strip("*").rstrip(".").strip()


def _short(text: str) -> str | None:
    return text if 0 < len(text) <= _LONGEST else None


def _canonical(text: str) -> str:
    r"""Without what only changes the look: \left, spaces, \dfrac, words in \text{...}, a full stop."""
    text = _WORDS.sub(r"\1", _bare(text)).replace(r"\dfrac", r"\frac").replace(r"\tfrac", r"\frac")
    return _NEEDLESS.sub("", _SPACING.sub(" ", text)).replace(r"\$", "").replace("$", "")
