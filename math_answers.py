r"""Mathematical answers: what a short LaTeX text says, and whether it says the same as the gold.

    read("5 cm")               Number(5, unit "cm")          read("x \\in (0, 1]")    Region
    read("1 \\pm \\sqrt{2}")   Many, two numbers             read("(3, 4)")          Ordered
    same_answer("\\frac{1}{2}", "0.5")   True

The kind of the gold decides what a reply may be: only a gold of several values is answered by a list, only a word by a
word. A unit that the gold has must agree; one that it lacks may stand there. Numbers and formulas are compared by their
values (expressions.py), everything else by structure. What has no finite value is no answer; infinity is an answer of
its own, or the end of an interval.

Legend
text      what is read; `tidied` where it is in one spelling already
value     one of the dataclasses below: Number, Many, Ordered, Region, Relation, Name
unit      what stands behind a number: "cm", "m s^-1", "%", a noun; "" for none
units     how readily letters behind a number are a unit: "none", "loose" (not m in 5m), "attached" (there, too)
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from expressions import (
    FUNCTIONS,
    MAX_DEPTH,
    MAX_EFFORT,
    MIN_FINITE,
    MP,
    PARTNER,
    SHORT_WORDS,
    Reader,
    Tree,
    Unreadable,
    close,
    effort,
    evaluate,
    letters_in,
    proportional,
    same_value,
    tidy,
    values_of,
)

# ---------------------------------------------------------------------------------------------------------------------
# Units

# One unit an entry: its symbol, then its other spellings. A $ stands for a space.
UNIT_SPELLINGS = (
    "m meter metre,cm centimeter centimetre,mm millimeter millimetre,dm decimeter decimetre,km kilometer kilometre,"
    "nm nanometer nanometre,um \\mum \\mu$m micrometer micrometre,mi mile,in inch inches,ft foot feet,yd yard,"
    "g gram,kg kilogram,mg milligram,\\mug microgram,lb lbs pound,oz ounce,t ton tonne,"
    "s sec second,ms millisecond,min minute,h hr hour,d day,wk week,month,yr year,"
    "l L liter litre,ml mL milliliter millilitre,cl cL centiliter centilitre,dl dL,gal gallon,ha hectare,acre,"
    "N newton,kN kilonewton,J joule,kJ kilojoule,cal calorie,kcal,eV,W watt,kW kilowatt,MW,kWh,V volt,mV,kV,"
    "A amp ampere,mA,\\Omega ohm,k\\Omega,M\\Omega,C coulomb,F farad,\\muF,H henry,T tesla,Pa pascal,kPa,atm,bar,"
    "Hz hertz,kHz,MHz,GHz,mol mole,M,K kelvin,degC celsius,degF fahrenheit,deg degree,rad radian,mph,"
    "% percent,\\permille,\\dollar dollar USD usd,\\euro euro EUR,\\pound GBP,\\yen yen,\\cent cent"
).split(",")


def units_by_spelling() -> dict[str, str]:
    units = {}
    for spellings in UNIT_SPELLINGS:
        symbol, *others = spellings.split()
        for spelling in (symbol, *others):
            units[spelling.replace("$", " ")] = symbol
    return units


UNITS = units_by_spelling()
MONEY = ("\\dollar", "\\euro", "\\pound", "\\yen")
# A gold of these may be answered by the number alone; cm, % and the others must be repeated, or else one reply would be
# right for 5 cm, 5 m and 5 kg (docs/answers.md).
MAY_BE_LEFT_OUT = (*MONEY, "deg")
# Behind a number these make another number or another statement of it: they are the names of no things.
NO_NOUNS = set(
    "million billion trillion thousand hundred dozen score lakh crore half halves third thirds quarter quarters fourth "
    "fourths fifth fifths sixth sixths seventh eighth eighths ninth tenth tenths hundredth hundredths thousandth tens "
    "hundreds thousands millions billions squared cubed factorial times plus minus over divided per percent and not "
    "but the for nor or more less fewer than least most about only other otherwise perhaps maybe possibly probably if "
    "when modulo mod fold pair pairs double triple twice infinity pi root power degree degrees choose either neither "
    "of to yes no none nan inf wrong correct incorrect".split()
)
ALWAYS_UNITS = re.compile(r"%|\\(?:permille|dollar|euro|pound|yen)|\bpercent\b")
UNIT_PART = re.compile(r"(\\[A-Za-z]+ ?[A-Za-z]*|[A-Za-z]+|%)\s*(?:\^\s*\{?\s*(-?[1-4])\s*\}?)?")
NUMBER_ENDS = re.compile(r"(?:[0-9)}|.!]|\\(?:pi|infty))\s*$")
UNIT_STARTS = re.compile(
    r"(?<![A-Za-z\\])(?:\\(?:mu|Omega|permille|dollar|euro|pound|yen|cent|circ)(?![A-Za-z])|[A-Za-z]|%)"
)


def unit_called(text: str) -> str | None:
    """The unit in one spelling, "m s^-2", or None if it is none: "m/s^2", "meters per second squared", "square cm"."""
    words = text.replace("\\cdot", " ").replace("\\text", "").replace("(", " ").replace(")", " ")
    words = re.sub(r"\bper\b", "/", words).strip()
    powers, sign, factor = {}, 1, 1
    while words:
        if words[0] == "/":
            sign, words = -1, words[1:].lstrip()
            continue
        prefix = re.match(r"(square|sq\.?|cubic|cu\.?)\s+", words)
        if prefix:
            factor = 2 if prefix[1].startswith("sq") else 3
            words = words[prefix.end() :]
        match = UNIT_PART.match(words)
        unit = known_unit(match[1]) if match else None
        if unit is None:
            return None
        words = words[match.end() :].lstrip(" *.")
        behind = re.match(r"(squared|cubed)(?![a-z])\s*", words)
        if behind:
            factor = 2 if behind[1] == "squared" else 3
            words = words[behind.end() :]
        powers[unit] = powers.get(unit, 0) + sign * factor * int(match[2] or 1)
        factor = 1
    return " ".join(unit if count == 1 else f"{unit}^{count}" for unit, count in sorted(powers.items()) if count)


def known_unit(word: str) -> str | None:
    word = word.strip()
    for spelling in (word, word.lower() if len(word) > 3 else word):
        for candidate in (spelling, spelling.removesuffix("s")):
            if candidate in UNITS:
                return UNITS[candidate]
    # degree Celsius is two words
    return None


def noun_called(text: str) -> str | None:
    """One or two words that are things to count: "apples", "square units". The plural does not matter."""
    words = re.sub(r"^sq\.? ", "square ", text).split()
    plain = all(re.fullmatch(r"[A-Za-z]{3,}", word) and word.lower() not in NO_NOUNS for word in words)
    return " ".join(word.lower().removesuffix("s") for word in words) if plain and 1 <= len(words) <= 2 else None


def unit_fraction(match: re.Match) -> str:
    return f" {match[1]}/{match[2]}" if known_unit(match[1]) and known_unit(match[2]) else match.group()


def split_unit(text: str, attached: bool) -> tuple[str, str]:
    """(number, unit) of "5 cm". attached: whether a single letter may stand right behind its number, as in "5m"."""
    money = re.match(r"([-+]?)\s*(\\(?:dollar|euro|pound|yen))\s+(?=[0-9.\\(])", text)
    if money:
        return money[1] + text[money.end() :], money[2]
    text = re.sub(r"\\frac\{ *([A-Za-z]+) *\}\{ *([A-Za-z]+) *\}$", unit_fraction, text)
    text = re.sub(r"\b[Dd]egrees? (Celsius|Fahrenheit|C|F)$", lambda match: "deg" + match[1][0], text)
    for start in UNIT_STARTS.finditer(text):
        before, tail = text[: start.start()], text[start.start() :]
        apart = before.endswith((" ", ")", "}")) or len(re.match(r"[A-Za-z]*", tail)[0]) != 1
        if not NUMBER_ENDS.search(before) or not (apart or attached):
            continue
        unit = unit_called(tail)
        if unit is None and before.endswith((" ", ")", "}")):
            unit = noun_called(tail)
        if unit:
            return before.rstrip(), unit
    return text, ""


# ---------------------------------------------------------------------------------------------------------------------
# What an answer can be


@dataclass(frozen=True)
class Number:
    """An expression with its unit. name: "x" where it was written x = 5."""

    tree: Tree
    unit: str = ""
    name: str = ""


@dataclass(frozen=True)
class Many:
    """Several answers in no order: {1, 2}, 1 or 2, 1 ± 2, x = 1 and x = 2. braces: written as a set."""

    items: tuple
    braces: bool = False


@dataclass(frozen=True)
class Ordered:
    """(1, 2), 3:2, a matrix with its rows as items. kind: "(" "ratio" "matrix" "row"."""

    kind: str
    items: tuple
    name: str = ""


@dataclass(frozen=True)
class Region:
    """Intervals (low, high, low belongs to it, high belongs to it), from left to right; the ends may be infinite."""

    intervals: tuple
    name: str = ""


@dataclass(frozen=True)
class Relation:
    """left = right, left < right, left ≤ right between expressions with letters."""

    sign: str
    left: Tree
    right: Tree


@dataclass(frozen=True)
class Name:
    r"""Something without parts: a word, infinity, the empty set, 101_2, AB ∥ CD."""

    text: str
    is_word: bool = False


Value = Number | Many | Ordered | Region | Relation | Name

OPENING, CLOSING = "([{", ")]}"
INFINITE = {"\\infty": "inf", "+\\infty": "inf", "infinity": "inf", "-\\infty": "-inf"}
EMPTY = {"\\emptyset", "\\{\\}", "\\{ \\}"}
CONSTANTS = ("e", "i", "\\pi", "\\infty")
NAMED = re.compile(
    r"(?:m ?)?(?:\\[A-Za-z]+ ?)?\{?[A-Za-z]{0,3}\}?'*(?:_\{?[0-9A-Za-z]{1,5}\}?)?(?:\([^()]{1,20}\))?"
    r"|[A-Za-z]{4,}|\([a-z](?:, ?[a-z])+\)"
)


def split_outside(text: str, pattern: str) -> list[str]:
    """The pieces between a pattern's matches outside all brackets. Unreadable if the brackets do not nest."""
    pieces, start, depth = [], 0, 0
    separator = re.compile(pattern)
    position = 0
    while position < len(text):
        match = separator.match(text, position) if depth == 0 else None
        if match and match.end() > position:
            pieces.append(text[start:position].strip())
            start = position = match.end()
            continue
        depth += (text[position] in OPENING) - (text[position] in CLOSING)
        if depth < 0:
            raise Unreadable("a bracket that nothing opened")
        position += 1
    if depth:
        raise Unreadable("a bracket that nothing closes")
    return [*pieces, text[start:].strip()]


def read_value(text: str, units: str) -> Value:
    """The value of a tidied text."""
    if not text:
        raise Unreadable("nothing")
    conclusion = split_outside(text, r"\\Rightarrow")
    if len(conclusion) > 1:
        read_value(conclusion[-2], units)
        return read_value(conclusion[-1], units)

    # Behind "or" stand whole answers; a comma may also part numbers of one name.
    text = re.sub(r"(?<![0-9.,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])", ungroup(text), text)
    pieces = split_outside(text, r",?\s*\b(?:or|and)\b(?!\})|,")
    if len(pieces) > 1:
        has_or = len(split_outside(text, r"\bor\b")) > 1
        return several([read_value(piece, units) for piece in pieces], has_or)
    return read_statement(text, units)


def ungroup(text: str) -> Callable[[re.Match], str]:
    """12,345 is one number outside brackets, and in them two."""

    def replacement(match: re.Match) -> str:
        before = text[: match.start()]
        depth = sum(before.count(c) for c in OPENING) - sum(before.count(c) for c in CLOSING)
        return match.group() if depth else match.group().replace(",", "")

    return replacement


def several(values: list[Value], has_or: bool) -> Value:
    if all(isinstance(value, Region) for value in values) and has_or:
        names = {value.name for value in values}
        if len(names) > 1:
            raise Unreadable("intervals of two letters")
        return region([interval for value in values for interval in value.intervals], names.pop())

    items = []
    for value in values:
        items += value.items if isinstance(value, Many) and not value.braces else [value]
    if not all(isinstance(item, Number) or isinstance(item, Ordered) and item.kind == "(" for item in items):
        raise Unreadable("a list of other things than numbers or points")

    # x = 3, y = 4 is one point; x = 1, x = 2 and x_1 = 1, x_2 = 2 are two values of one letter.
    names = [item.name for item in items if item.name]
    if len(set(name.partition("_")[0] for name in names)) > 1:
        if len(set(names)) != len(items) or has_or:
            raise Unreadable("several letters")
        return Ordered("(", tuple(replace(item, name="") for item in sorted(items, key=lambda item: item.name)))
    return many([replace(item, name="") for item in items])


MAX_ITEMS = 32  # each is compared with each


def many(items: list, braces: bool = False) -> Many:
    if len(items) > MAX_ITEMS:
        raise Unreadable("too many values")
    for index, item in enumerate(items):
        if any(equal(item, other) for other in items[:index]):
            raise Unreadable("a value twice")
    return Many(tuple(items), braces)


def read_statement(text: str, units: str) -> Value:
    """A value, perhaps with what it is a value of: x = 5, x in (0, 1), 0 < x < 1, P(X = 2) = 3/8, Angle: 40°."""
    sides = split_outside(text, r"\\in(?![A-Za-z])")
    if len(sides) == 2 and NAMED.fullmatch(sides[0]):
        value = read_plain(sides[1], units)
        if isinstance(value, Many | Region):
            return value
        if isinstance(value, Ordered):
            return as_region(value)
        raise Unreadable("an element of no set")

    parts = split_outside(text, r"=|<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])")
    if len(parts) == 1:
        # "Angle: 40°", the point P(3, 4)
        label = re.fullmatch(r"[A-Za-z]{3,}: *(.+)|[A-Z] ?(\([^()]*,[^()]*\))", text)
        return read_plain(label[1] or label[2] if label else text, units)
    if not all(parts):
        raise Unreadable("a side is missing")
    signs = re.findall(r"=|<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\ne(?![A-Za-z])", outside_text(text))
    if set(signs) == {"="}:
        return read_equation(parts, units)
    return read_inequality(parts, signs)


def outside_text(text: str) -> str:
    """The text without what stands in brackets."""
    for _ in range(MAX_DEPTH):
        text, inner = re.subn(r"[(\[{][^()\[\]{}]*[)\]}]", " ", text)
        if not inner:
            break
    return text


def read_equation(parts: list[str], units: str) -> Value:
    """x = 5, f(2) = 5 and 1 + 4 = 5 have the value 5; y = x + 1 and x^2 = 4 are relations."""
    names = [part for part in parts if NAMED.fullmatch(part) and part not in CONSTANTS]
    others = [part for part in parts if part not in names]
    if not others:
        names, others = parts[:1], parts[1:]
    values = [read_plain(part, units) for part in others]
    name = names[0].replace(" ", "") if names else ""

    constants = [value for value in values if not (isinstance(value, Number) and letters_in(value.tree))]
    if any(not equal(constants[0], value) for value in constants[1:]):
        raise Unreadable("two values that differ")
    last = values[-1]
    if constants and (len(constants) == len(values) or names and len(parts) > 2 and last in constants):
        return named(constants[-1], name)
    if len(parts) != 2 or not all(isinstance(value, Number) and not value.unit for value in values):
        raise Unreadable("an equation of no two expressions")
    if names and name not in letters_in(last.tree):
        return named(last, name)
    left, right = (Reader(part).whole() for part in parts)
    return Relation("=", left, right)


def named(value: Value, name: str) -> Value:
    if isinstance(value, Many):
        return value
    if isinstance(value, Ordered) or isinstance(value, Number):
        # (x, y) = (3, 4) names no letter
        return replace(value, name="" if name.startswith("(") else name)
    if isinstance(value, Name) and value.text in ("inf", "-inf", "empty"):
        return value
    raise Unreadable("a name for no value")


def read_inequality(parts: list[str], signs: list[str]) -> Value:
    """x > 3, -1 < x < 3: a region of one letter. Others, y > 2 x: a relation."""
    if all(sign in (">", "\\ge") for sign in signs):
        parts, signs = parts[::-1], [{">": "<", "\\ge": "\\le"}[sign] for sign in signs[::-1]]
    if signs == ["\\ne"]:
        where = ends_of(parts[1])
        return region([(-MP.inf, where, False, False), (where, MP.inf, False, False)], letter_of(parts[0]))
    if any(sign not in ("<", "\\le") for sign in signs) or len(parts) > 3:
        raise Unreadable("signs of several directions")

    letters = [bool(re.fullmatch(r"\\?[A-Za-z]+", part)) and part not in CONSTANTS for part in parts]
    if len(parts) == 3 and letters[1]:
        return region([(ends_of(parts[0]), ends_of(parts[2]), signs[0] == "\\le", signs[1] == "\\le")], parts[1])
    if len(parts) == 2 and letters[0] and not letters_in(Reader(parts[1]).whole()):
        return region([(-MP.inf, ends_of(parts[1]), False, signs[0] == "\\le")], parts[0])
    if len(parts) == 2 and letters[1] and not letters_in(Reader(parts[0]).whole()):
        return region([(ends_of(parts[0]), MP.inf, signs[0] == "\\le", False)], parts[1])
    left, right = (Reader(part).whole() for part in parts)
    if len(parts) != 2 or not letters_in(left) | letters_in(right):
        raise Unreadable("an inequality without a letter")
    return Relation(signs[0], left, right)


def letter_of(text: str) -> str:
    if not re.fullmatch(r"\\?[A-Za-z]+", text):
        raise Unreadable("no single letter")
    return text


def ends_of(text: str):
    """The end of an interval: a real number or an infinity."""
    if text in INFINITE:
        return MP.inf if INFINITE[text] == "inf" else -MP.inf
    tree = Reader(text).whole()
    value = evaluate(tree)
    if letters_in(tree) or isinstance(value, MP.mpc):
        raise Unreadable("an interval that ends at no real number")
    return value


def region(intervals: list, name: str = "") -> Region:
    for low, high, low_in, high_in in intervals:
        if not low < high or (low_in and low == -MP.inf) or (high_in and high == MP.inf):
            raise Unreadable("an interval without anything in it")
    return Region(tuple(sorted(intervals, key=lambda interval: interval[0])), name)


def as_region(value: Value) -> Region:
    """A pair in round brackets as the open interval that it may also be."""
    if isinstance(value, Region):
        return value
    if isinstance(value, Ordered) and value.kind == "(" and len(value.items) == 2:
        ends = []
        for item in value.items:
            if not isinstance(item, Number) or letters_in(item.tree) or item.unit:
                raise Unreadable("a pair that is no interval")
            ends.append(evaluate(item.tree))
        if not any(isinstance(end, MP.mpc) for end in ends):
            return region([(ends[0], ends[1], False, False)])
    raise Unreadable("no interval")


def read_plain(text: str, units: str) -> Value:
    """A value without a name: a set, an interval, a union of them, a point, a ratio, a matrix, a number, a word."""
    compact = text.replace(" ", "")
    if compact in INFINITE:
        return Name(INFINITE[compact])
    if compact in EMPTY:
        return Name("empty")
    if compact in ("\\mathbb{R}", "\\R"):
        return Region(((-MP.inf, MP.inf, False, False),))
    if re.fullmatch(r"[0-9]+_\{?[0-9]{1,2}\}?", compact):
        return in_base(compact)
    if re.search(r"\\(?:parallel|perp|cong|sim)(?![A-Za-z])", text):
        return Name(compact)
    if "\\begin" in text:
        return read_matrix(compact if "\\hline" in compact else text, units)

    united = split_outside(text, r"\\cup(?![A-Za-z])")
    if len(united) > 1:
        regions = [as_region(read_plain(part, units)) for part in united]
        return region([interval for part in regions for interval in part.intervals])
    if re.fullmatch(r"\\?\{.*\}", text) or re.fullmatch(r"[(\[].*[)\]]", text):
        try:
            return read_brackets(text, units)
        except Unreadable:
            # (x + 1)(x - 1), [2(3 + 4)]: brackets of an expression
            if text.startswith("\\{") or "," in text:
                raise
    ratio = split_outside(text, r":|\bto\b")
    if len(ratio) > 1:
        return read_ratio(ratio)
    return read_number(text, units)


def in_base(text: str) -> Name:
    digits, _, base = text.replace("{", "").replace("}", "").partition("_")
    if not 2 <= int(base) <= 16 or any(int(digit) >= int(base) for digit in digits):
        raise Unreadable("digits that the base does not have")
    return Name(f"{digits.lstrip('0')}_{base}")


def read_brackets(text: str, units: str) -> Value:
    opening = re.match(r"\\\{|[(\[{]", text).group()
    closing = re.search(r"(?:\\\}|[)\]}])$", text).group()
    inner = text[len(opening) : len(text) - len(closing)].strip()

    pieces = split_outside(inner, ",")
    if opening in ("\\{", "{"):
        if closing != opening.replace("{", "}"):
            raise Unreadable("another bracket closes")
        condition = split_outside(inner, r"\\mid(?![A-Za-z])|\||:")
        if len(condition) == 2 and "|" not in condition[1]:
            value = read_statement(condition[1], "none")
            if isinstance(value, Region):
                return value
        if opening == "{" and len(pieces) == 1:
            raise Unreadable("a group, no set")
        items = []
        for piece in pieces:
            value = read_statement(piece, units)
            items += value.items if isinstance(value, Many) and not value.braces else [value]
        if not all(isinstance(item, Number | Ordered) for item in items):
            raise Unreadable("a set of other things than numbers or points")
        return many(items, braces=True)

    if len(pieces) == 1:
        raise Unreadable("a pair is missing")
    infinite = any(piece.replace(" ", "") in INFINITE for piece in pieces)
    square = opening == "[" or closing == "]"
    if (square or infinite) and len(pieces) == 2 and opening in "([" and closing in ")]":
        return region([(ends_of(pieces[0]), ends_of(pieces[1]), opening == "[", closing == "]")])
    if PARTNER[opening] != closing:
        raise Unreadable("another bracket closes")
    items = tuple(read_plain(piece, units) for piece in pieces)
    if not all(isinstance(item, Number | Ordered) for item in items):
        raise Unreadable("a point of other things than numbers")
    return Ordered("(", items)


def read_ratio(parts: list[str]) -> Ordered:
    """3:2, "3 to 2", 12:30. The parts are compared one by one: 2:5 is not the time 12:30."""
    items = []
    for part in parts:
        if re.fullmatch("0[0-9]+", part):
            items.append(Name(part))
        else:
            items.append(Number(finite(Reader(part).whole())))
    return Ordered("ratio", tuple(items))


def read_matrix(text: str, units: str) -> Ordered:
    match = re.fullmatch(
        r"[(\[]?\s*\\begin\{([bpvBV]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[)\]]?", text.strip()
    )
    if not match or match[1] in ("vmatrix", "Vmatrix"):
        raise Unreadable("no matrix")
    rows = []
    for row in match[2].strip().removesuffix("\\newrow").split("\\newrow"):
        rows.append(Ordered("row", tuple(read_number(cell.strip(), "none") for cell in row.split("&"))))
    if len({len(row.items) for row in rows}) != 1:
        raise Unreadable("rows of several lengths")
    return Ordered("matrix", tuple(rows))


def read_number(text: str, units: str) -> Value:
    """An expression with its unit, two of them for a plus-minus."""
    if units != "none" or ALWAYS_UNITS.search(text):
        number, unit = split_unit(text, units == "attached")
        try:
            return read_expression(number, unit)
        except Unreadable:
            if not unit:
                raise
    return read_expression(text, "")


def read_expression(text: str, unit: str) -> Value:
    written = text.strip()
    group = re.fullmatch(r"\\?\{([^{}]*)\}", written)
    if group and written[0] == "{":
        written = group[1]

    trees = []
    for sign in (1, -1) if re.search(r"\\[pm]{2}(?![A-Za-z])", written) else (1,):
        trees.append(finite(Reader(written, sign).whole()))
    degrees = [without_degree(tree) for tree in trees]
    if not unit and all(tree is not None for tree in degrees):
        trees, unit = degrees, "deg"
    numbers = [Number(tree, unit) for tree in trees]
    return numbers[0] if len(numbers) == 1 else many(numbers)


def without_degree(tree: Tree) -> Tree | None:
    """60 for 60°, else None."""
    if isinstance(tree, tuple) and tree[0] == "neg":
        inner = without_degree(tree[1])
        return None if inner is None else ("neg", inner)
    return tree[1] if isinstance(tree, tuple) and tree[0] == "degree" else None


def finite(tree: Tree) -> Tree:
    """The tree itself, if it has a finite value: with letters, at MIN_FINITE points."""
    values = [value for value in values_of(tree) if value is not None]
    if len(values) < (MIN_FINITE if letters_in(tree) else 1):
        raise Unreadable("no finite value")
    return tree


# ---------------------------------------------------------------------------------------------------------------------
# Comparing


def equal(gold: Value, answer: Value) -> bool:
    """Whether two values are equal. Not symmetric: a unit that only the answer has may stand there."""
    if isinstance(gold, Number) and gold.name and isinstance(answer, Relation):
        gold = Relation("=", gold.name, gold.tree)
    if isinstance(answer, Number) and answer.name and isinstance(gold, Relation):
        answer = Relation("=", answer.name, answer.tree)
    if {type(gold), type(answer)} == {Region, Ordered}:
        try:
            gold, answer = as_region(gold), as_region(answer)
        except Unreadable:
            return False
    if type(gold) is not type(answer):
        return False

    if isinstance(gold, Number):
        return same_name(gold, answer) and same_unit(gold.unit, answer.unit) and same_value(gold.tree, answer.tree)
    if isinstance(gold, Many):
        return len(gold.items) == len(answer.items) and all(
            any(equal(item, other) for other in answer.items) for item in gold.items
        )
    if isinstance(gold, Ordered):
        return (
            gold.kind == answer.kind
            and len(gold.items) == len(answer.items)
            and all(equal(item, other) for item, other in zip(gold.items, answer.items, strict=True))
        )
    if isinstance(gold, Region):
        return (
            len(gold.intervals) == len(answer.intervals)
            and same_name(gold, answer)
            and all(map(same_interval, gold.intervals, answer.intervals))
        )
    if isinstance(gold, Relation):
        return same_relation(gold, answer)
    return gold == answer


def same_name(gold: Number | Region, answer: Number | Region) -> bool:
    """A name may be left out, but not of a line: y = 2x + 1 is not the expression 2x + 1."""
    if gold.name and answer.name:
        return gold.name == answer.name
    is_line = isinstance(gold, Number) and gold.name and letters_in(gold.tree) and "(" not in gold.name
    return not is_line


def same_unit(gold: str, answer: str) -> bool:
    if gold == answer:
        return True
    if not gold:
        return answer not in ("%", "\\permille")
    is_noun = gold not in UNITS.values() and not re.search(r"[\^ ]", gold)
    return not answer and (gold in MAY_BE_LEFT_OUT or is_noun)


def same_interval(gold: tuple, answer: tuple) -> bool:
    for end, other in zip(gold[:2], answer[:2], strict=True):
        if end != other and not (MP.isfinite(end) and MP.isfinite(other) and close(end, other)):
            return False
    return gold[2:] == answer[2:]


def same_relation(gold: Relation, answer: Relation) -> bool:
    """Rearranged: their left minus right are multiples of each other, for inequalities by a positive number."""
    if gold.sign != answer.sign:
        return False
    differences = [("+", relation.left, ("neg", relation.right)) for relation in (gold, answer)]
    factor = proportional(*differences)
    return factor == 1 or (factor == -1 and gold.sign == "=")


# ---------------------------------------------------------------------------------------------------------------------
# The three functions for others


@lru_cache(maxsize=4096)  # the gold answer meets every reply of its group
def read(text: str, units: str = "loose") -> Value | None:
    """The value of a text, or None if it has none."""
    try:
        tidied = tidy(text)
        if effort(tidied) > MAX_EFFORT:
            raise Unreadable("too much to compute")
        word = plain_word(tidied)
        if word:
            return Name(word, is_word=True)
        return read_value(tidied, units)
    except (Unreadable, RecursionError, OverflowError):
        return None
    except (ValueError, ArithmeticError, TypeError):
        return None


def plain_word(text: str) -> str | None:
    """One to three words that are no expression: "Yes", "no solution". "NaN" is no answer."""
    words = text.casefold().split()
    if not 1 <= len(words) <= 3 or not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text):
        return None
    if any(word in ("nan", "or", "and", "infinity", "pi", "e", "not") for word in words):
        return None
    is_product = all(len(word) <= 3 and word not in SHORT_WORDS for word in words)
    if is_product or any(word in FUNCTIONS for word in words):
        return None
    return " ".join(words)


def read_reply(gold: str, text: str) -> list[Value]:
    """The ways in which a reply can be read beside this gold; [] if it is no answer to it.

    Only a gold of several values is answered by several, and only a word by a word.
    """
    wanted = read(gold)
    if wanted is None:
        return []
    has_unit = isinstance(wanted, Number) and wanted.unit != ""
    readings = []
    for units in ("attached",) if has_unit else ("none", "loose"):
        value = read(text, units)
        if value is None or value in readings:
            continue
        if isinstance(value, Many) and not value.braces and not isinstance(wanted, Many):
            continue
        if isinstance(value, Name) and value.is_word and not isinstance(wanted, Name):
            continue
        readings.append(value)
    return readings


def same_answer(gold: str, text: str) -> bool:
    """Whether a reply is right."""
    wanted = read(gold)
    return wanted is not None and any(equal(wanted, value) for value in read_reply(gold, text))
