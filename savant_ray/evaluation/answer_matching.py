"""Scoring of an answer: numbers are compared by value, text as in SQuAD's exact match (arXiv 1606.05250).

`3.140`, `1,000`, `1e3`, `3/4`, `-5`, `50%`, `$5.00` and `5 km` are numbers, with a unit where there is one; a percentage is
the number of hundredths that it stands for. Units have to be the same, they are not converted. Text is compared in lower
case, without articles, punctuation and surplus spaces.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

CONCLUSION = re.compile(r"The answer is:?\s+(?=[^\n]*[^\n.\s])(\S.*)", re.DOTALL)
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|(?<=\d)\.(?!\d)|(?<=[a-z])\.(?=[A-Z])")  # not the points of 3.14 and U.S.
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
SPACED = r"\d{1,3}(?P<separator>[\s_'’])\d{3}(?:(?P=separator)\d{3})*(?!\d)(?:\.\d+)?"
CURRENCIES = "$€£¥₹₩₽₺₪฿"
QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[{CURRENCIES}]?)\s*(?P<inner_sign>[-+]?)"
    rf"(?:(?P<whole>\d+)\s+(?P<part>\d+/\d+)|(?P<fraction>\d+\s*/\s*\d+)|(?P<spaced>{SPACED})|(?P<decimal>{DECIMAL}))"
    r"(?P<percent>\s*(?:%|per\s?cent\b))?"
    r"(?!\s*[-.,:/]?\s*\d)(?P<unit>.*)",  # no dates, times, versions and lists
    re.DOTALL | re.IGNORECASE,
)
LAST_NUMBER = re.compile(rf"-?(?:{DECIMAL})")
MOST_SENTENCES = 100  # of an answer that are compared: a model that repeats itself may write thousands
LONGEST_NUMBER = 400  # characters, and the largest exponent: longer ones are compared as text
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
DASHES = str.maketrans({"\u2212": "-", "\u2013": "-"})  # a minus sign and an en dash

Quantity = tuple[Fraction, str]  # value and unit


def is_right(said: str, expected: str) -> bool:
    """Whether a model's text gives the expected answer.

    What counts is what stands behind the first "The answer is", up to the end of a sentence, of the line or of the text.
    Without that phrase it is the whole text, its last line or last sentence, or the last number where a number is expected.
    """
    wanted = normalized(expected)
    if any(normalized(claim) == wanted for claim in _claims(said)):
        return True
    return not (CONCLUSION.search(said) or isinstance(wanted, str)) and _ends_in(said, wanted)


def normalized(text: str) -> Quantity | str:
    """The value and unit of a number, or else the text as it is compared."""
    text = unicodedata.normalize("NFC", text).translate(DASHES).strip(" \t\r\n\"'`*_“”‘’")
    return _quantity(text.rstrip(".,;:!?")) or _words(text) or " ".join(text.casefold().split())


def _claims(said: str) -> Iterator[str]:
    yield said
    conclusion = CONCLUSION.search(said)
    if conclusion is not None:
        yield conclusion[1]
        line = conclusion[1].splitlines()[0]
        yield line
        yield from (line[: end.start()] for end in islice(SENTENCE_END.finditer(line), MOST_SENTENCES))
        return
    lines = said.split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "").rstrip(" .!?")
    yield last
    yield last[max((end.end() for end in SENTENCE_END.finditer(last)), default=0) :]


def _ends_in(said: str, wanted: Quantity) -> bool:
    """Whether the last number of a text is the expected one, and the expected unit follows it."""
    found = list(LAST_NUMBER.finditer(said))
    if not found:
        return False
    start = found[-1].start()
    if said[:start].rstrip().endswith(tuple(CURRENCIES)):
        start = len(said[:start].rstrip()) - 1
    value, unit = wanted
    for text in (found[-1][0], said[start:]):
        quantity = normalized(text)
        if isinstance(quantity, tuple) and quantity[0] == value and f"{quantity[1]} ".startswith(unit and f"{unit} "):
            return True
    return False


def _quantity(text: str) -> Quantity | None:
    match = QUANTITY.fullmatch(text)
    if match is None:
        return None
    try:
        value = _value(match)
    except (ValueError, ZeroDivisionError):
        return None
    if "-" in match["sign"] + match["inner_sign"]:
        value = -value
    if match["percent"]:
        value /= 100
    return value, f"{match['currency']} {_words(match['unit'])}".strip()


def _value(match: re.Match[str]) -> Fraction:
    number = match["decimal"] or match["spaced"] or match["fraction"] or match["part"]
    exponent = re.search(r"[eE]([-+]?\d+)", number)
    if len(match[0]) - len(match["unit"]) > LONGEST_NUMBER or (exponent and abs(int(exponent[1])) > LONGEST_NUMBER):
        raise ValueError("too long to be compared by value")
    return Fraction(re.sub(r"[,\s_'’]", "", number)) + int(match["whole"] or 0)


def _words(text: str) -> str:
    """Lower case, without articles, punctuation and surplus spaces; empty if nothing else is there."""
    folded = text.casefold()
    kept = "".join(char for i, char in enumerate(folded) if not _is_punctuation(folded, i))
    return " ".join(ARTICLES.sub(" ", kept).split())


def _is_punctuation(text: str, i: int) -> bool:
    """Not what tells apart: signs as in `c#` and `km/h`, and what stands between the digits or in front of a number."""
    char = text[i]
    if not unicodedata.category(char).startswith("P") or char in "%#&@/":
        return False
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    return not (after.isdigit() and (before.isdigit() or (char == "-" and not before.isalnum())))
