"""A grammar of the questions: patterns for each template and operation, and the rule for which wordings are held out.

In a pattern `[a|b]` stands for one of the alternatives and `<ask>` for one of `SYNONYMS["ask"]`; both may be nested.
`{x}`, `{y}` and `{z}` are operands in the order of the calculation, `{a}`, `{b}` and `{c}` letters with these values. A
*form* is a pattern of which all alternatives are chosen, for instance `What is {x} plus {y}?`. A form is held out from the
training text if it

- contains one of the forms in `UNSEEN`, or
- is selected by hash, as about one in ten are.

Both rules ignore which operand, letter or name is meant: `{y} times {x}` is held out if `{x} times {y}` is.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cache
from itertools import product
from random import Random
from typing import NamedTuple

NAMES = (
    *("Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Lena", "Tom"),
    *("Anna", "Bob", "Clara", "Eric", "Kate", "Leo", "Maria", "Noah", "Paul", "Sam"),
)
ITEMS = (
    *("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers"),
    *("balls", "cups", "flowers", "keys", "letters", "nuts", "pictures", "plates", "stones", "toys"),
)
UNITS = ("dollars", "grams", "hours", "liters", "meters", "miles", "minutes", "pages", "points", "steps")
LETTERS = ("XYZ", "YXZ", "ABC", "BAC", "PQR", "MNK", "STU", "UVW", "GHJ", "DEF")  # for {a}, {b} and {c}
HELD_OUT_FRACTION = 0.1

SYNONYMS = {
    "opening": "||||Please answer. |Here is a question. |Think carefully. |Now a short problem. |Do this without help. ",
    "scene": "||It is a sunny day. |{name} is at home. |{name} and {other} are friends. |{name} likes {items}. ",
    "ask": "What is|What is|How much is|Can you tell me|Do you know",
    "find": "Find|Compute|Calculate|Work out|Tell me|Determine|Please give",
    "result": "What do you get?|What is the result?|What is the answer?|How much is that?|What does that make?"
    "|Tell me the result.|Give the result.",
    "you get": "do you get|do we get|is the result|will you have|do I have",
    "you": "you|we|I",
    "if": "If|When|Given that|If we know that",
    "let": "Suppose|Suppose that|Say|Assume that",
    "numbers": "|the numbers |the two numbers ",
    "two numbers": "Two numbers are|The numbers are|Here are two numbers:|Take the numbers|Look at the two numbers",
    "values": "{a} = {x} and {b} = {y}|{a} is {x} and {b} is {y}|{a} = {x}, {b} = {y}|{a} equals {x} and {b} equals {y}"
    "|{a} is {x}, while {b} is {y}",
    "values in any order": "<values>|<values>|<values>|<values>|[{b} = {y} and {a} = {x}|{b} is {y} and {a} is {x}]",
    "let be": "Let {a} = {x} and {b} = {y}|Let {a} = {x}, {b} = {y}|Let {a} be {x} and {b} be {y}"
    "|Let {b} be {y} and {a} be {x}",
    "three values": "{a} = {x}, {b} = {y} and {c} = {z}|{a} is {x}, {b} is {y} and {c} is {z}"
    "|{a} equals {x}, {b} equals {y} and {c} equals {z}|{c} = {z}, {b} = {y} and {a} = {x}",
    "start": "Start with|Begin with|Take|Take the number|Think of",
    "then": ", then| and then|, and then|, after that",
    "together": "together|in all|in total|altogether|combined",
    "box": "box|bag|basket|drawer|room|shop",
    "boxes": "boxes|bags|baskets|drawers|rooms|shops",
    "packs": "packs|boxes|bags|baskets",
    "of them": "| of them| of these",
    "left": "[How many {items}|How many] [are left|remain|are still there]?",
    "in all": "How many {items} [is that|are there|are that|does that make] <together>?"
    "|What is the total number of {items}?|How many {items} are there?",
    "has": "has|has got|owns|starts with",
    "had": "had|owned|started with",
    "gets": "gets|finds|buys|wins|collects|receives|picks up|makes",
    "got": "got|found|bought|won|collected|was given|picked up|made",
    "loses": "loses|sells|gives away|breaks|uses|drops",
    "lost": "lost|sold|gave away|broke|used|dropped",
    "gives": "gives|lends|sells|hands",
    "gave": "gave|lent|sold|handed",
}


def _asked(*expressions: str) -> str:
    """Return a pattern that asks for the value of one of the expressions."""
    e = f"[{'|'.join(expressions)}]"
    return f"[<ask> {e}?|<find> {e}.|<ask> the value of {e}?|{e} [equals what|is how much|makes what]?]"


def _letters(*expressions: str) -> tuple[str, ...]:
    """Return patterns that give values to letters and ask for one of the expressions."""
    e, values = f"[{'|'.join(expressions)}]", "<values in any order>"
    in_default_prompt = (
        f"If {{a}} = {{x}} and {{b}} = {{y}}, what is {expressions[0]}?"  # the form of validation.prompt
    )
    return (
        *[in_default_prompt] * 3,
        f"If {values}, what is {e}?",
        f"[<if> {values}, [what is|how much is|then what is] {e}?|<if> {values}, find {e}.]",
        f"[<let> {values}|{values}|<let be>]. [<ask> {e}?|<find> {e}.]",
        f"[<ask> {e} if {values}?|<find> {e} [if|when|where] {values}.]",
    )


def _compared(adjective: str) -> tuple[str, ...]:
    """Return patterns that ask for the larger or the smaller of two numbers."""
    which = (
        f"[Which [|one |of them |of the two |number ]is [|the ]{adjective}?"
        f"|[<find>|Choose|Name] the {adjective} [one|number].]"
    )
    return (
        f"[Which is|Which number is|What is] {adjective}[,|:] {{x}} or {{y}}?",
        f"[What|Which] is the {adjective} [|one |number |value ]of <numbers>{{x}} and {{y}}?",
        f"[Of|Between|Out of] <numbers>{{x}} and {{y}}, [which|which one|which number] is [|the ]{adjective}?",
        f"[<find>|Choose|Name] the {adjective} [|one |number ]of <numbers>{{x}} and {{y}}.",
        f"Is {{x}} or {{y}} the {adjective} [one|number|value]?",
        f"<two numbers> {{x}} and {{y}}. {which}",
        f"<two numbers> {{x}} and {{y}}. What is the {adjective} [one|number|of them|of the two]?",
        f"{{name}} has {{x}} {{items}} and {{other}} has {{y}}. [What|Which] is the {adjective} number?",
        f"If <values>, what is the {adjective} of {{a}} and {{b}}?",
        f"<if> <values>, [what is|which is] the {adjective} [of {{a}} and {{b}}|one|of the two]?",
        f"[<let> <values>|<values>]. [What is the {adjective} [of {{a}} and {{b}}|one|number]?|{which}]",
    )


class _Tense(NamedTuple):
    """Verbs of a story in one tense; `{n}` is the number of items of an event."""

    has: str
    events: dict[str, str]  # by operation; the subject is {name}
    events_by_other: dict[str, str]  # by operation; the subject is {other}


_PRESENT = _Tense(
    has="<has>",
    events={
        "+": "[<gets> {n}[| more| new ones]|<gets> another {n}|gets {n} [|more ]from {other}]",
        "-": "[<loses> {n}<of them>|<gives> {n}<of them> to {other}]",
    },
    events_by_other={"+": "{other} [gives|sends|hands] {name} {n}[| more]", "-": "{other} takes {n}<of them>"},
)
_PAST = _Tense(
    has="<had>",
    events={
        "+": "[<got> {n}[| more| new ones]|<got> another {n}|got {n} [|more ]from {other}]",
        "-": "[<lost> {n}<of them>|<gave> {n}<of them> to {other}]",
    },
    events_by_other={"+": "{other} [gave|sent|handed] {name} {n}[| more]", "-": "{other} took {n}<of them>"},
)


def _story(operations: str) -> tuple[str, ...]:
    """Return patterns of a story with one or two events that add or remove items."""
    return tuple(pattern for tense in (_PRESENT, _PAST) for pattern in _in_tense(operations, tense))


def _in_tense(operations: str, tense: _Tense) -> tuple[str, ...]:
    ask = "How many {items} [does {name} have|does {name} own|has {name} got][| now| then| in the end| after that]?"
    if operations[-1] == "-":
        ask = f"[{ask}|<left>|How many {{items}} does {{name}} [still have|have left|keep]?]"
    begin = f"{{name}} {tense.has} {{x}} {{items}}"
    first = tense.events[operations[0]].replace("{n}", "{y}")
    by_other = tense.events_by_other[operations[0]].replace("{n}", "{y}")
    if len(operations) == 1:
        return (
            f"{begin}[ and|, but|, then| and then] {first}. {ask}",
            f"{begin}. [|Then |Now |Today |Later ]{{name}} {first}. {ask}",
            *((f"{begin}. {by_other}. {ask}",) if operations == "+" else ()),
        )
    second = tense.events[operations[1]].replace("{n}", "{z}")
    return (
        f"{begin}, {first}[<then>| and] {second}. {ask}",
        f"{begin}. [|First ]{{name}} {first}[<then>| and] {second}. {ask}",
        f"{begin} and {first}. [Then|Later|After that|On Monday] {{name}} {second}. {ask}",
        f"{begin}. {by_other}[ and {{name}}|. Then {{name}}] {second}. {ask}",
    )


def _chained(operations: str) -> tuple[str, ...]:
    """Return patterns of a calculation with two operations, without a story."""
    first, second = operations[0], operations[1]
    signs = f"{{}} {first} {{}} {second} {{}}"
    words = {"+": "plus", "-": "minus"}
    spoken = f"{{x}} {words[first]} {{y}} {words[second]} {{z}}"
    verbs = {"+": "[add|add|put on]", "-": "[subtract|subtract|take away]"}
    one, two = f"{verbs[first]} {{y}}", f"{verbs[second]} {{z}}"
    capital = {"+": "Add", "-": "[Subtract|Take away]"}
    begin = {
        "+": "[Add {x} and {y}|Add {x} to {y}|Take the sum of {x} and {y}|Put {x} and {y} together]",
        "-": "[Subtract {y} from {x}|Take {y} away from {x}|Take {y} from {x}|From {x} [subtract|take away] {y}]",
    }
    numbers, letters = signs.format("{x}", "{y}", "{z}"), signs.format("{a}", "{b}", "{c}")
    return (
        _asked(numbers, spoken),
        f"If <three values>, what is {letters}?",
        f"[<let> <three values>|<three values>]. [<ask> {letters}?|<find> {letters}.]",
        f"<start> {{x}}, {one}[<then>| and] {two}. <result>",
        f"<start> {{x}}. {capital[first]} {{y}}. [Then {two}|{capital[second]} {{z}}]. <result>",
        f"What <you get> [if|when] <you> [start with|take] {{x}}, {one}<then> {two}?",
        f"{begin[first]}[<then> {two}| and {two}|. {capital[second]} {{z}}|. Then {two}]. <result>",
    )


def _per(beginning: str, *units: str) -> str:
    """Return a pattern for a number of items in each of several units, such as days."""
    ask = "How many {{items}} [are there|are that|does that make] in {{y}} {}s?"
    return f"[{'|'.join(f'{beginning}{unit}. {ask.format(unit)}' for unit in units)}]"


_SUM = (
    *_letters("{a} + {b}", "{a} + {b}", "{a} plus {b}", "the sum of {a} and {b}"),
    _asked("{x} + {y}", "{x} + {y}", "{x} plus {y}", "{x} and {y} <together>"),
    _asked("the [sum|total] of <numbers>{x} and {y}", "{x} increased by {y}", "{x} added to {y}", "{x} more than {y}"),
    "[[Add|Add up] <numbers>{x} and {y}|Add {x} to {y}|Put {x} and {y} together]. <result>",
    "<start> {x}[ and|,|. Then] add {y}. <result>",
    "What <you get> [if|when] <you> [add <numbers>{x} and {y}|add {x} to {y}|put {x} and {y} together]?",
    "[If|When] <you> add {x} [to|and] {y}, what <you get>?",
    "How [much|many] [are|is|do you get from] {x} and {y}[| <together>]?",
    "[How much|What] do {x} and {y} [make|give|add up to][| <together>]?",
    "<two numbers> {x} and {y}. What is [their sum|the sum|their total|the sum of them]?",
    "<two numbers> {x} and {y}. Add [them|both|the two]. <result>",
)

_DIFFERENCE = (
    *_letters("{a} - {b}", "{a} - {b}", "{a} minus {b}", "the difference [between|of] {a} and {b}"),
    _asked("{x} - {y}", "{x} - {y}", "{x} minus {y}", "{x} less {y}"),
    _asked("the difference [between|of] <numbers>[{x} and {y}|{x} and {y}|{y} and {x}]", "{x} reduced by {y}"),
    "[[Subtract|Take|Take away] {y} from {x}|Take {y} away from {x}|From {x} [subtract|take|take away] {y}]. <result>",
    "<start> {x}[ and|,|. Then] [subtract|take away] {y}. <result>",
    "What <you get> [if|when] <you> [subtract|take|take away] {y} from {x}?",
    "[If|When] <you> [subtract|take] {y} from {x}, what [is left|remains|<you get>]?",
    "What [is left|remains] [if|when] <you> [subtract|take|take away] {y} from {x}?",
    "[By how much|How much] is {x} [larger|bigger|greater|higher|more] than {y}?",
    "[By how much|How much] is {y} [smaller|less|lower] than {x}?",
    "How much [more|larger|bigger|greater] is {x} than {y}?",
    "[By how much does {x} exceed {y}|How far is it from {y} to {x}|What must be added to {y} to get {x}]?",
    "<two numbers> {x} and {y}. What is [their difference|the difference|the difference of them]?",
    "<two numbers> {x} and {y}. How much [larger|bigger|more] is the first [one|number]?",
)

_PRODUCT = (
    *_letters("{a} * {b}", "{a} * {b}", "{a} times {b}", "the product of {a} and {b}"),
    _asked("{x} * {y}", "{x} * {y}", "{x} times {y}", "{y} times {x}"),
    _asked("the product of <numbers>{x} and {y}", "{x} multiplied [by|with] {y}", "{y} times the number {x}"),
    "Multiply <numbers>[{x} by {y}|{x} with {y}|{x} and {y}]. <result>",
    "<start> {x}[ and|,|. Then] multiply [|it ]by {y}. <result>",
    "What <you get> [if|when] <you> multiply {x} [by|with|and] {y}?",
    "[If|When] <you> multiply {x} [by|with] {y}, what <you get>?",
    "What <you get> [if|when] {x} is multiplied by {y}?",
    "Take {x} {y} times. <result>",
    "[How much|What] do {y} [groups|lots] of {x} make[| <together>]?",
    "<two numbers> {x} and {y}. What is [their product|the product|the product of them]?",
    "<two numbers> {x} and {y}. Multiply [them|both|the two]. <result>",
)

_WORD_SUM = (
    *_story("+"),
    "There are {x} {items} in [one|a|the first] <box> and {y} in [another|the other|the second][| one]. <in all>",
    "There are {x} {items} [on|under] the table and {y} [on|under] the [floor|chair]. <in all>",
    "{name} [finds|gets|sells|made] {x} {items} on [Monday|Friday] and {y} on [Tuesday|Sunday]. <in all>",
    "{name} [<has>|<had>|<gets>|<got>] {x} {items}[ and|, and|, while|.] {other} [has|had|gets|got] {y}. "
    "How many {items} do [they|both|both of them|{name} and {other}] have <together>?",
    "{other} has {x} {items} more than {name}[, who has|. {name} has] {y}. How many {items} does {other} have?",
    "{name} [walks|needs|uses|counts] {x} {unit} [at first|in the morning] and {y} [more|later]. "
    "How many {unit} [is that|are that|does that make] <together>?",
)

_WORD_DIFFERENCE = (
    *_story("-"),
    "A <box> [has|had] {x} {items}[ and|. It] [sells|loses|gives away] {y}<of them>. <left>",
    "There are {x} {items} in a <box>. {name} [takes|steals|takes out] {y}<of them>. <left>",
    "{name} [needs|wants] {x} {items} and has [only |]{y}. How many [more {items}|{items} more] does {name} need?",
    "{name} <has> {x} {items}[ and|.] {other} has {y}. "
    "How many [more {items}|{items} more] does {name} have[| than {other}]?",
    "Of {x} {items}[,|] {y} [are|were] [sold|lost|broken|gone]. <left>",
    "Of [the|{other}'s|these] {x} {items}[,|] {name} [<loses>|<lost>|takes] {y}. <left>",
    "{name} <has> {x} {unit} and [uses|spends|loses] {y}<of them>. How many {unit} [are left|remain]?",
)

_WORD_PRODUCT = (
    "There are {x} <boxes> [with {y} {items} in each[| of them]|that hold {y} {items} each]. <in all>",
    "[Each of {x} <boxes> [has|holds|contains]|In each of {x} <boxes> there are] {y} {items}. <in all>",
    "{x} <boxes> [have|hold|contain] {y} {items} each. <in all>",
    "{name} [buys|has|gets|sells] {y} <packs> [of|with] {x} {items}[| each]. <in all>",
    "{name} [buys|sells] {y} <packs> of {x} {items}. How many {items} does {name} [buy|sell|have]?",
    "{name} [has|fills] {y} <packs>. [Each|Every one] [has|holds|contains] {x} {items}. <in all>",
    _per("{name} [finds|makes|buys|sells] {x} {items} [a|every|each] ", "day", "week", "hour"),
    _per("There are {x} {items} in [a|each|every] ", "bag", "basket", "drawer"),
    "[One book|A ticket|One game] [costs|needs|takes] {x} {unit}. How many {unit} do {y} of them [cost|need|take]?",
)

_THREE_PLACES = (
    "{name} [finds|gets|makes] {x} {items} on Monday, {y} on Tuesday and {z} on Sunday. <in all>",
    "There are {x} {items} in [one|the first] <box>, {y} in [another|the second] and {z} in [the last|the third]. <in all>",
)

# The operations are applied from left to right: "+-" is x + y - z; ">" and "<" select the larger and the smaller number.
PATTERNS: dict[str, dict[str, tuple[str, ...]]] = {
    "sum": {"+": _SUM},
    "difference": {"-": _DIFFERENCE},
    "product": {"*": _PRODUCT},
    "comparison": {
        ">": _compared("[larger|larger|bigger|greater|higher]"),
        "<": _compared("[smaller|smaller|lower|lesser]"),
    },
    "word_problem": {"+": _WORD_SUM, "-": _WORD_DIFFERENCE, "*": _WORD_PRODUCT},
    "two_step": {
        operations: (*_chained(operations), *_story(operations), *(_THREE_PLACES if operations == "++" else ()))
        for operations in map("".join, product("+-", repeat=2))
    },
}

UNSEEN: dict[str, dict[str, tuple[str, ...]]] = {
    "sum": {"+": ("Let {a} = {x} and {b} = {y}. Find {a} + {b}.", "How much are {x} and {y} altogether?")},
    "difference": {"-": ("Let {a} = {x} and {b} = {y}. Find {a} - {b}.", "By how much is {x} more than {y}?")},
    "product": {"*": ("Let {a} = {x} and {b} = {y}. Find {a} * {b}.", "How much is {y} times {x}?")},
    "comparison": {
        ">": ("Two numbers are {x} and {y}. What is the larger one?",),
        "<": ("Two numbers are {x} and {y}. What is the smaller one?",),
    },
    "word_problem": {
        "+": ("{name} has {x} {items}. {other} has {y}. How many {items} do both have?",),
        "-": ("Of {x} {items} {name} loses {y}. How many {items} does {name} have now?",),
        "*": ("Each of {x} boxes has {y} {items}. How many {items} is that in all?",),
    },
    "two_step": {
        "+-": ("Add {x} and {y}, then subtract {z}. What do you get?",),
        "-+": ("Subtract {y} from {x}, then add {z}. What do you get?",),
    },
}

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SYNONYM = re.compile(r"<([a-z ]+)>")
_SAME_SLOT = str.maketrans("yzbc", "xxaa")


@dataclass(frozen=True)
class Wording:
    """A form of a question, the operations that it asks for, and a sentence before it that does not matter, or ""."""

    operations: str
    form: str
    opening: str

    @property
    def question(self) -> str:
        """Return the question with placeholders."""
        return self.opening + self.form


def draw_wording(rng: Random, template: str, unseen: bool) -> Wording:
    """Draw a wording of the training text; with `unseen` a held-out one, on average half of them from `UNSEEN`."""
    patterns = (UNSEEN if unseen and rng.random() < 0.5 else PATTERNS)[template]
    while True:
        operations = rng.choice(list(patterns))
        form = compose(rng, rng.choice(patterns[operations]))
        if is_held_out_form(form) == unseen:
            return Wording(operations, form, compose(rng, "<opening><scene>" if "{items}" in form else "<opening>"))


def compose(rng: Random, pattern: str) -> str:
    """Return a random form of the pattern, which begins with a capital letter."""
    while match := _SYNONYM.search(pattern):
        pattern = pattern.replace(match[0], f"[{SYNONYMS[match[1]]}]")
    while match := _CHOICE.search(pattern):
        pattern = pattern[: match.start()] + rng.choice(match[1].split("|")) + pattern[match.end() :]
    return pattern[:1].upper() + pattern[1:]


@cache
def is_held_out_form(form: str) -> bool:
    """Return whether a form is held out from the training text."""
    skeleton = _skeleton(form)
    if any(unseen in skeleton for unseen in _unseen_skeletons()):
        return True
    return is_chosen(skeleton, HELD_OUT_FRACTION)


def is_chosen(text: str, fraction: float) -> bool:
    """Return whether the hash of a text is among the first `fraction` of all hashes."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _skeleton(form: str) -> str:
    """Return the form with the same placeholder for all operands, for all letters and for all names."""
    return re.sub(r"\{([xyzabc])\}", lambda match: match[0].translate(_SAME_SLOT), form).replace("{other}", "{name}")


@cache
def _unseen_skeletons() -> tuple[str, ...]:
    return tuple(_skeleton(form) for forms in UNSEEN.values() for some in forms.values() for form in some)
