"""Wordings of the problems: for each template those of the training text, and some that are held out."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

NAMES = ("Ada", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Lena", "Tom")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "marbles", "pencils", "shells", "stamps", "stickers")


@dataclass(frozen=True)
class Wording:
    """A question with placeholders for operands (x, y, z), names and items.

    `operations` are applied from left to right: "+-" is `x + y - z`; `>` and `<` select the larger and the smaller number.
    The answer begins with `lead`. `unseen` wordings are used for validation only.
    """

    name: str
    operations: str
    question: str
    lead: str = ""
    unseen: bool = False


_SUM = (
    Wording("letters", "+", "If X = {x} and Y = {y}, what is X + Y?", "X + Y = "),
    Wording("other letters", "+", "If A = {x} and B = {y}, what is A + B?", "A + B = "),
    Wording("bare", "+", "What is {x} + {y}?"),
    Wording("sum of", "+", "What is the sum of {x} and {y}?"),
    Wording("add", "+", "Add {x} and {y}. What do you get?"),
    Wording("add to", "+", "What do you get when you add {x} to {y}?"),
    Wording("let", "+", "Let P = {x} and Q = {y}. Find P + Q.", "P + Q = ", unseen=True),
    Wording("altogether", "+", "How much are {x} and {y} altogether?", unseen=True),
)

_DIFFERENCE = (
    Wording("letters", "-", "If X = {x} and Y = {y}, what is X - Y?", "X - Y = "),
    Wording("letters turned", "-", "If X = {y} and Y = {x}, what is Y - X?", "Y - X = "),
    Wording("other letters", "-", "If A = {x} and B = {y}, what is A - B?", "A - B = "),
    Wording("bare", "-", "What is {x} - {y}?"),
    Wording("difference", "-", "What is the difference between {x} and {y}?"),
    Wording("subtract", "-", "Subtract {y} from {x}. What do you get?"),
    Wording("let", "-", "Let P = {x} and Q = {y}. Find P - Q.", "P - Q = ", unseen=True),
    Wording("exceeds", "-", "By how much is {x} more than {y}?", unseen=True),
)

_PRODUCT = (
    Wording("letters", "*", "If X = {x} and Y = {y}, what is X * Y?", "X * Y = "),
    Wording("other letters", "*", "If A = {x} and B = {y}, what is A * B?", "A * B = "),
    Wording("bare", "*", "What is {x} * {y}?"),
    Wording("product of", "*", "What is the product of {x} and {y}?"),
    Wording("multiply", "*", "Multiply {x} by {y}. What do you get?"),
    Wording("let", "*", "Let P = {x} and Q = {y}. Find P * Q.", "P * Q = ", unseen=True),
    Wording("times", "*", "How much is {y} times {x}?", unseen=True),
)

_COMPARISON = (
    Wording("larger letters", ">", "If X = {x} and Y = {y}, what is the larger of X and Y?"),
    Wording("smaller letters", "<", "If X = {x} and Y = {y}, what is the smaller of X and Y?"),
    Wording("larger", ">", "Which is larger, {x} or {y}?"),
    Wording("smaller", "<", "Which is smaller, {x} or {y}?"),
    Wording("larger of two", ">", "What is the larger of the numbers {x} and {y}?"),
    Wording("smaller of two", "<", "What is the smaller of the numbers {x} and {y}?"),
    Wording("larger of a pair", ">", "Two numbers are {x} and {y}. What is the larger one?", unseen=True),
    Wording("smaller of a pair", "<", "Two numbers are {x} and {y}. What is the smaller one?", unseen=True),
)

_WORD_PROBLEM = (
    Wording("gets more", "+", "{name} has {x} {items} and gets {y} more. How many {items} does {name} have now?"),
    Wording(
        "two boxes", "+", "There are {x} {items} in one box and {y} in another. How many {items} are there in all?"
    ),
    Wording("two days", "+", "{name} finds {x} {items} on Monday and {y} on Tuesday. How many {items} is that in all?"),
    Wording("gives away", "-", "{name} has {x} {items} and gives {y} of them to {other}. How many {items} are left?"),
    Wording("sells", "-", "A shop has {x} {items} and sells {y} of them. How many {items} are left?"),
    Wording("needs", "-", "{name} needs {x} {items} and has {y}. How many more {items} does {name} need?"),
    Wording("boxes", "*", "There are {x} boxes with {y} {items} in each box. How many {items} are there in all?"),
    Wording("packs", "*", "{name} buys {y} packs of {x} {items}. How many {items} does {name} buy?"),
    Wording("both", "+", "{name} has {x} {items}. {other} has {y}. How many {items} do both have?", unseen=True),
    Wording("loses", "-", "Of {x} {items} {name} loses {y}. How many {items} does {name} have now?", unseen=True),
    Wording("each", "*", "Each of {x} boxes has {y} {items}. How many {items} is that in all?", unseen=True),
)

_CHAINS = tuple(product("+-", repeat=2))

_TWO_STEP = (
    *(
        Wording(f"letters {a}{b}", a + b, f"If X = {{x}}, Y = {{y}} and Z = {{z}}, what is X {a} Y {b} Z?")
        for a, b in _CHAINS
    ),
    *(Wording(f"bare {a}{b}", a + b, f"What is {{x}} {a} {{y}} {b} {{z}}?") for a, b in _CHAINS),
    Wording(
        "three days",
        "++",
        "{name} finds {x} {items} on Monday, {y} on Tuesday and {z} on Sunday. How many {items} is that in all?",
    ),
    Wording(
        "gets and gives",
        "+-",
        "{name} has {x} {items}, gets {y} more and then gives {z} to {other}. How many {items} are left?",
    ),
    Wording(
        "sells and gets",
        "-+",
        "A shop has {x} {items}, sells {y} of them and then gets {z} more. How many {items} does it have now?",
    ),
    Wording(
        "gives twice",
        "--",
        "{name} has {x} {items}, gives {y} to {other} and then sells {z}. How many {items} are left?",
    ),
    Wording("start with", "+-", "Add {x} and {y}, then subtract {z}. What do you get?", unseen=True),
    Wording("take away", "-+", "Subtract {y} from {x}, then add {z}. What do you get?", unseen=True),
)

WORDINGS: dict[str, tuple[Wording, ...]] = {
    "sum": _SUM,
    "difference": _DIFFERENCE,
    "product": _PRODUCT,
    "comparison": _COMPARISON,
    "word_problem": _WORD_PROBLEM,
    "two_step": _TWO_STEP,
}
