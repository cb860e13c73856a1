"""Answer extraction against hand-checked cases."""

from fractions import Fraction

import pytest

from abba.text.answers import extract_answer, parse_number, same_answer

EXTRACTED = [
    ("5 + 7 = <<5+7=12>>12\n#### 12", "12"),
    ("The answer is: 42", "42"),
    ("The answer is 42.", "42"),
    ("the answer is: $1,234.50", "$1,234.50"),
    ("#### -3", "-3"),
    ("#### 1,000", "1,000"),
    ("#### $5", "$5"),
    ("#### 1/2", "1/2"),
    ("####7", "7"),
    ("#### .5", ".5"),
    ("#### 3 apples", "3"),
    ("The answer is: **18**", "18"),
    ("The answer is: 3\nWait. The answer is: 4", "4"),
    ("#### 3 The answer is: 5", "5"),
    ("The answer is: 5 #### 3", "3"),
    ("#### 16 and then #### 17", "17"),
    ("the total is 12", None),
    ("#### twelve", None),
    ("", None),
    ("####", None),
]
NUMBERS = [
    ("12", 12), ("-12", -12), ("+12", 12), ("1,234", 1234), ("1,234,567", 1234567), ("$5.00", 5), ("-$5", -5),
    ("$-5", -5), ("12.", 12), ("12.50", Fraction(25, 2)), (".25", Fraction(1, 4)), ("0.1", Fraction(1, 10)),
    ("3/4", Fraction(3, 4)), ("-1/2", Fraction(-1, 2)), ("1 / 2", Fraction(1, 2)), ("12 apples", 12), ("12%", 12),
    ("€7", 7), ("−7", -7), ("007", 7), ("0", 0), ("- 4", -4), ("1/0", None), ("", None), (None, None),
    ("twelve", None), ("five 5", 5),
]  # fmt: skip


@pytest.mark.parametrize("text, expected", EXTRACTED)
def test_extraction(text, expected):
    assert extract_answer(text) == expected


@pytest.mark.parametrize("text, expected", NUMBERS)
def test_numbers(text, expected):
    assert parse_number(text) == expected


@pytest.mark.parametrize(
    "generated, reference, right",
    [
        ("so #### 1,000", "x\n#### 1000", True),
        ("The answer is: 12.0", "x\n#### 12", True),
        ("The answer is: 0.5", "#### 1/2", True),
        ("#### 13", "x\n#### 12", False),
        ("it is 12", "x\n#### 12", False),
        ("#### 12", "12", True),
        ("#### -12", "#### 12", False),
    ],
)
def test_same_answer(generated, reference, right):
    assert same_answer(generated, reference) is right
