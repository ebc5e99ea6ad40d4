"""Decides whether an answer is correct: numbers are compared by value, text as in SQuAD's exact match (arXiv 1606.05250).

`3.140`, `1,000`, `1e3`, `3/4`, `-5`, `50%`, `$5.00` and `5 km` are numbers, some with a unit; 50% equals 0.5. Units must be
equal; they are not converted. If the expected number has no unit or %, a text without "The answer is" is also correct if its
last number has one. Text is compared in lower case, without articles, punctuation and repeated spaces; articles count if
there is nothing else, as in the choice `(A)`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice

# The text after the phrase, if its first line has any character other than periods and spaces.
CONCLUSION = re.compile(r"The answer is:?\s+(?=[^\n]*[^\n.\s])(\S.*)", re.DOTALL)
# Not the periods in 3.14 and U.S.
SENTENCE_END = re.compile(r"[.!?](?=\s|$)|(?<=\d)\.(?!\d)|(?<=[a-z])\.(?=[A-Z])")
DECIMAL = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?"
SPACED = r"\d{1,3}(?P<separator>[\s_'’])\d{3}(?:(?P=separator)\d{3})*(?!\d)(?:\.\d+)?"
CURRENCIES = "$€£¥₹₩₽₺₪฿"
QUANTITY = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>[{CURRENCIES}]?)\s*(?P<inner_sign>[-+]?)"
    rf"(?:(?P<whole>\d+)\s+(?P<part>\d+/\d+)|(?P<fraction>\d+\s*/\s*\d+)|(?P<spaced>{SPACED})|(?P<decimal>{DECIMAL}))"
    r"(?P<percent>\s*(?:%|per\s?cent\b))?"
    r"(?!\s*[-.,:/]?\s*\d)(?P<unit>.*)",  # excludes dates, times, versions and lists
    re.DOTALL | re.IGNORECASE,
)
LAST_NUMBER = re.compile(rf"-?(?:(?:\d+ )?\d+/\d+|{DECIMAL})")
MAX_SENTENCES = 100  # compared per answer, because a model that repeats itself may generate thousands
MAX_DIGITS = 400  # also the largest exponent; larger numbers are compared as text
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
DASHES = str.maketrans({"\u2212": "-", "\u2013": "-"})  # a minus sign and an en dash

Quantity = tuple[Fraction, str]  # value and unit


def is_correct(text: str, expected: str) -> bool:
    """Return whether a model's text states the expected answer.

    The text is correct if any of these equals the expected answer: the complete text, or what follows the first "The answer
    is" up to the end of a sentence, of the line or of the text. In a text without that phrase, the last line, the last
    sentence and, if a number is expected, the last number count as well.
    """
    normalized_expected = normalized(expected)
    if any(normalized(candidate) == normalized_expected for candidate in _candidates(text)):
        return True
    if CONCLUSION.search(text) or isinstance(normalized_expected, str):
        return False
    return _ends_in(text, normalized_expected)


def normalized(text: str) -> Quantity | str:
    """Return value and unit of a number, or any other text in the form in which it is compared."""
    text = unicodedata.normalize("NFC", text).translate(DASHES).strip(" \t\r\n\"'`*_“”‘’")
    quantity = _quantity(text.rstrip(".,;:!?"))
    return quantity or _words(text) or _without_punctuation(text) or " ".join(text.casefold().split())


def _candidates(text: str) -> Iterator[str]:
    """Yield the parts of the text that may be the answer."""
    yield text
    conclusion = CONCLUSION.search(text)
    if conclusion is not None:
        yield conclusion[1]
        line = conclusion[1].splitlines()[0]
        yield line
        yield from (line[: end.start()] for end in islice(SENTENCE_END.finditer(line), MAX_SENTENCES))
        return
    lines = text.split("\n")
    last_line = next((line for line in reversed(lines) if line.strip()), "").rstrip(" .!?")
    yield last_line
    yield last_line[max((end.end() for end in SENTENCE_END.finditer(last_line)), default=0) :]


def _ends_in(text: str, expected: Quantity) -> bool:
    """Return whether the last number of the text has the expected value and is followed by the expected unit."""
    numbers = list(LAST_NUMBER.finditer(text))
    if not numbers:
        return False
    start = numbers[-1].start()
    if text[:start].rstrip().endswith(tuple(CURRENCIES)):
        start = len(text[:start].rstrip()) - 1
    value, unit = expected
    for candidate in (numbers[-1][0], text[start:]):
        quantity = normalized(candidate)
        if (
            isinstance(quantity, tuple)
            and quantity[0] == value
            and (not unit or f"{quantity[1]} ".startswith(f"{unit} "))
        ):
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
    if len(match[0]) - len(match["unit"]) > MAX_DIGITS or (exponent and abs(int(exponent[1])) > MAX_DIGITS):
        raise ValueError("too large to be compared by value")
    return Fraction(re.sub(r"[,\s_'’]", "", number)) + int(match["whole"] or 0)


def _words(text: str) -> str:
    """Return the text in lower case, without articles, punctuation and repeated spaces; "" if nothing is left."""
    return " ".join(ARTICLES.sub(" ", _without_punctuation(text)).split())


def _without_punctuation(text: str) -> str:
    """Return the text in lower case, without punctuation and repeated spaces."""
    folded = text.casefold()
    return " ".join("".join(char for i, char in enumerate(folded) if not _is_punctuation(folded, i)).split())


def _is_punctuation(text: str, i: int) -> bool:
    """Return whether the character is punctuation that does not change the meaning.

    Such punctuation does not include `%#&@/` (`c#`, `km/h`), characters between two digits, and minus signs of numbers.
    """
    char = text[i]
    if not unicodedata.category(char).startswith("P") or char in "%#&@/":
        return False
    before, after = text[i - 1 : i], text[i + 1 : i + 2]
    return not (after.isdigit() and (before.isdigit() or (char == "-" and not before.isalnum())))
