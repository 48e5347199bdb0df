r"""Expressions: reads a short LaTeX text into a tree, and compares two trees by their values.

    tree = Reader(tidy("\\frac{1}{2}x")).whole()     ("*", ("/", 1, 2), "x")
    same_value(tree, Reader("x/2").whole())         True

The whole text is read by one small grammar: nothing is searched for in it and nothing of it is ever executed. Nothing
is proved either: two expressions are equal if they have the same finite value, to 60 of 100 digits, at every sample
point of their letters. So an expression without a finite value is no answer, and no comparison succeeds because both
sides fail. There is no algebra that could explode: what a text may cost is counted before anything is computed (see
`effort`). Infinity is no number.

Legend
text      what is read, at most MAX_TEXT characters
tree      an expression: a Fraction, a letter's name, or (operation, tree, …)
point     the values of all letters, by its index: letter_value(name, point)

math_answers.py builds sets, intervals, units and the other things that an answer can be on top of this.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

import mpmath

MAX_TEXT = 200  # characters
MAX_DEPTH = 25  # brackets inside each other
MAX_LOG = 10_000  # no power beyond e^10000
MAX_FACTORIAL = 300
MAX_EFFORT = 3_000  # of one text, in units of about 10 µs: see `effort`
POINTS = 6  # where expressions with letters are compared
MIN_FINITE = 3  # at so many of them both must have a value

# A context of our own, so that nobody's global precision matters.
MP = mpmath.mp.clone()
MP.dps = 100
SNAP = MP.mpf(10) ** -80  # relative: a rounding error below this is taken as none, so sin(pi) is 0
ABSORBED = MP.mpf(10) ** -50  # relative: a term smaller than this would vanish in a sum, so such a sum is refused
EQUAL = MP.mpf(10) ** -60  # relative


class Unreadable(ValueError):
    """The text is not in the grammar, or its expression has no finite value."""


# ---------------------------------------------------------------------------------------------------------------------
# Characters: everything becomes ASCII LaTeX

SIGNS = {
    "−": "-",
    "×": r"\times ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "∙": r"\cdot ",
    "÷": "/",
    "⁄": "/",
    "∕": "/",
    "∶": ":",
    "∛": r"\sqrt[3]",
    "∜": r"\sqrt[4]",
    "∞": r"\infty ",
    "°": r"^\circ ",
    "º": r"^\circ ",
    "±": r"\pm ",
    "∓": r"\mp ",
    "≤": r"\le ",
    "⩽": r"\le ",
    "≥": r"\ge ",
    "⩾": r"\ge ",
    "≠": r"\ne ",
    "∈": r"\in ",
    "∪": r"\cup ",
    "∅": r"\emptyset ",
    "△": r"\triangle ",
    "∠": r"\angle ",
    "∴": r"\therefore ",
    "⇒": r"\Rightarrow ",
    "ℝ": r"\mathbb{R}",
    "‰": r"\permille ",
    "€": r"\euro ",
    "£": r"\pound ",
    "¥": r"\yen ",
    "，": ",",
    "。": ".",
    "、": ",",
}
GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi omicron pi rho - sigma tau upsilon phi "
    "chi psi omega"
).split()
SIGNS |= {chr(ord("α") + offset): f"\\{name} " for offset, name in enumerate(GREEK)}
SIGNS |= {"Ω": r"\Omega ", "Δ": r"\Delta ", "Σ": r"\Sigma ", "Φ": r"\Phi ", "Θ": r"\Theta "}
RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
INVISIBLE = re.compile("[\u200b-\u200d\u2060\ufeff]")


def to_ascii(text: str) -> str:
    """The text in ASCII LaTeX. A raised digit stays an exponent and ½ a fraction, which NFKC alone would glue."""
    text = INVISIBLE.sub("", text)
    text = re.sub(f"[{''.join(RAISED)}]+", lambda run: "^{" + "".join(RAISED[c] for c in run.group()) + "}", text)
    text = re.sub(f"[{''.join(LOWERED)}]+", lambda run: "_{" + "".join(LOWERED[c] for c in run.group()) + "}", text)

    pieces = []
    for character in text:
        if unicodedata.decomposition(character).startswith("<fraction>"):
            over, _, under = unicodedata.normalize("NFKC", character).partition("⁄")
            pieces.append(f"\\frac{{{over}}}{{{under}}}")
        elif character in SIGNS:
            pieces.append(SIGNS[character])
        else:
            pieces += [SIGNS.get(part, part) for part in unicodedata.normalize("NFKC", character)]
    text = "".join(pieces)

    # √12 is the root of twelve; \sqrt12 would be the root of one, times two.
    text = re.sub(r"√\s*([0-9.]+|[A-Za-z])", r"\\sqrt{\1}", text).replace("√", r"\sqrt ")
    if not text.isascii():
        raise Unreadable("a character of another alphabet")
    return text


# ---------------------------------------------------------------------------------------------------------------------
# LaTeX that only lays out, and several ways to write one thing

SPELLINGS = [
    (re.compile(r"\\(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?|limits|hspace\*?\{[^{}]*\})(?![A-Za-z])"), ""),
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![A-Za-z])"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![A-Za-z])"), r"\\ge "),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne "),
    (re.compile(r"\\lt(?![A-Za-z])|&lt;"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])|&gt;"), ">"),
    (re.compile(r"\\(?:varnothing|O)(?![A-Za-z])"), r"\\emptyset "),
    (re.compile(r"\\(?:[lr]vert|vert)(?![A-Za-z])"), "|"),
    (re.compile(r"\\langle(?![A-Za-z])"), "("),
    (re.compile(r"\\rangle(?![A-Za-z])"), ")"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:colon|ratio)(?![A-Za-z])"), ":"),
    (re.compile(r"\\(?:implies|Longrightarrow)(?![A-Za-z])"), r"\\Rightarrow "),
    (re.compile(r"\\div(?![A-Za-z])"), "/"),
    (re.compile(r"\\ast(?![A-Za-z])"), "*"),
    (re.compile(r"\\var(epsilon|theta|phi)(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\^\s*\\prime"), "'"),
    # 12\,345 and 12{,}345 are one number, before the spaces become spaces
    (re.compile(r"(?<=[0-9])(?:\\,|\{,\}|\\!,|,\\!)(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"\\[,;:!> ]|~|\\q?quad(?![A-Za-z])"), " "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\^\\circ\s*\{?([CF])\}?(?![A-Za-z])"), r" deg\1 "),
    (re.compile(r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*(?=[0-9A-Za-z{\\])"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])(?![0-9])"), r"\1{\2}"),
    (re.compile(r"\\%"), "%"),
    # \log_23 is the logarithm of 3 to the base 2, as LaTeX sets it; \log_10 3 is meant as it is written
    (re.compile(r"\\?log_([0-9])([0-9]+)(?=\s*(?:$|[-+=,)}]))"), r"\\log_{\1} \2"),
]
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{([^{}]*(?:\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}[^{}]*)*)\}|([0-9A-Za-z]))")
TEXT = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mathsf|boldsymbol|mbox|operatorname|underline|rm)"
    r"\s*\{((?:[^{}]|\{[^{}]*\})*)\}"
)
CASES = re.compile(r"\\begin\{cases\}(.*?)\\end\{cases\}")
REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar)\{([0-9]{1,9})\}")
MIXED = re.compile(
    r"(?<![0-9.A-Za-z^_})/])([0-9]{1,9})"
    r"(?:\s*\\frac\{([0-9]{1,9})\}\{([0-9]{1,9})\}|[ ]+([0-9]{1,9})/([0-9]{1,9})(?![0-9]))"
)


def tidy(text: str) -> str:
    """The text in one spelling. Frames become spaces, so nothing is glued together by taking one off."""
    if len(text) > MAX_TEXT:
        raise Unreadable("too long")
    text = to_ascii(text)
    # The end of a matrix row, before its second backslash is taken for the start of a command
    text = text.replace("\\\\", r" \newrow ")
    text = re.sub(r"\\\(|\\\)|\\\[|\\\]", " ", text)
    text = undollar(text)
    for _ in range(4):
        text, framed = BOX.subn(lambda box: f" {box[1] or box[2] or ''} ", text)
        if not framed:
            break
    text = CASES.sub(lambda match: match[1].replace(r"\newrow", ","), text)
    # \text{ cm}: what stands in it are words, and words are set apart.
    text = TEXT.sub(r" \1 ", text)
    for pattern, spelling in SPELLINGS:
        text = pattern.sub(spelling, text)
    text = REPEATING.sub(repeating_decimal, text)
    text = MIXED.sub(mixed_number, text)
    text = re.sub(r"^(?:\s*(?:=|\\therefore|\\Rightarrow))+", "", text)
    text = " ".join(text.split())
    if text.endswith(".."):
        raise Unreadable("it goes on")
    return text[:-1].rstrip() if text.endswith(".") else text


def undollar(text: str) -> str:
    r"""Without the dollar signs of LaTeX. One that has no partner, or is written \$, is money."""
    signs = re.findall(r"(?<!\\)\$", text)
    if len(signs) % 2 == 0:
        text = re.sub(r"(?<!\\)\$", " ", text)
    return re.sub(r"\\?\$", r"\\dollar ", text)


def repeating_decimal(match: re.Match) -> str:
    """0.1\\overline{6} = (16 - 1) / 90"""
    whole, fixed, repeated = match.groups()
    nines = int("9" * len(repeated) + "0" * len(fixed))
    over = int((whole or "0") + fixed + repeated) - int((whole or "0") + fixed)
    return f"\\frac{{{over}}}{{{nines}}}"


def mixed_number(match: re.Match) -> str:
    """2\\frac{1}{2} and "2 1/2" are 2 + 1/2, no product."""
    whole, over, under = match[1], match[2] or match[4], match[3] or match[5]
    if not 0 < int(over) < int(under):
        raise Unreadable("neither a mixed number nor a product")
    return f"({whole}+\\frac{{{over}}}{{{under}}})"


# ---------------------------------------------------------------------------------------------------------------------
# Expressions: text to tree

Tree = Fraction | str | tuple

TOKEN = re.compile(
    r"\s*(?:([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]{1,3}(?![0-9.]))?|\.[0-9]+(?:[eE][+-]?[0-9]{1,3}(?![0-9.]))?)"
    r"|(\\[A-Za-z]+)|([A-Za-z]+)|([-+*/^_()\[\]{}|!']))"
)
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp".split())
INVERSE = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
WORDS_OF_MATH = FUNCTIONS | {"sqrt", "pi"}
GREEK_LETTERS = set(GREEK) - {"pi"} | set("Omega Delta Sigma Phi Theta Gamma Lambda Pi Psi".split())
# What is a thing of its own and is compared by name: \overline{AB}, \triangle ABC
THINGS = set("overline bar vec hat overrightarrow widehat overparen triangle angle odot mathbb mathcal".split())
# Runs of letters that are no products of letters: short units and short words
SHORT_UNITS = set(
    "cm mm dm km nm um mi in ft yd kg mg lb lbs oz sec ms min hr hrs wk yr ml mL cl cL dl dL gal ha kN kJ cal eV kW MW "
    "kWh mV kV amp mA ohm Pa kPa atm bar Hz mol deg rad mph USD usd EUR GBP yen".split()
)
SHORT_WORDS = set(
    "or and not the is to an as at by of on if it be so yes no odd all any nan inf one two six ten dne vs ou "
    "und".split()
)
PARTNER = {"(": ")", "[": "]", "{": "}"}
PRODUCT_SIGNS = {"*", "\\cdot", "\\times"}


class Reader:
    r"""Recursive descent over the tokens of one expression. `sign`: what \pm stands for, 1 or -1."""

    def __init__(self, text: str, sign: int = 1):
        self.tokens, self.next, self.sign = tokens_of(text), 0, sign
        self.depth = self.bars = 0

    def peek(self, ahead: int = 0) -> str:
        where = self.next + ahead
        return self.tokens[where] if where < len(self.tokens) else ""

    def take(self) -> str:
        self.next += 1
        return self.tokens[self.next - 1] if self.next <= len(self.tokens) else ""

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unreadable(f"{token!r} is missing")

    def whole(self) -> Tree:
        tree = self.sum()
        if self.peek():
            raise Unreadable(f"{self.peek()!r} stands where nothing can")
        return tree

    def sum(self) -> Tree:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        tree = self.signed(self.product)
        while self.peek() in ("+", "-", "\\pm", "\\mp"):
            tree = ("+", tree, self.signed(self.product))
        self.depth -= 1
        return tree

    def signed(self, read: Callable[[], Tree]) -> Tree:
        """At most one sign, then what `read` reads."""
        token = self.peek()
        if token not in ("+", "-", "\\pm", "\\mp"):
            return read()
        self.take()
        if self.peek() in ("+", "-", "\\pm", "\\mp"):
            raise Unreadable("two signs")
        negative = {"+": False, "-": True, "\\pm": self.sign < 0, "\\mp": self.sign > 0}[token]
        return ("neg", read()) if negative else read()

    def product(self) -> Tree:
        tree = self.power()
        while True:
            token = self.peek()
            if token in PRODUCT_SIGNS or token == "/":
                self.take()
                operation = "/" if token == "/" else "*"
                tree = (operation, tree, self.signed(self.power))
            elif self.starts_factor(token):
                tree = ("*", tree, self.power())
            else:
                return tree

    def starts_factor(self, token: str) -> bool:
        """Whether a factor without a sign may begin here. A number may not: "5 6" is not 30."""
        if token == "|":
            return not self.bars
        return bool(token) and (token in "([{" or token[0].isalpha() or is_operand(token))

    def power(self) -> Tree:
        tree = self.atom()
        while self.peek() == "!":
            self.take()
            if self.peek() == "!":
                raise Unreadable("a double factorial")
            tree = ("!", tree)
        if self.peek() == "^":
            self.take()
            if self.peek() == "\\circ":
                self.take()
                return ("degree", tree)
            tree = ("^", tree, self.argument())
        if self.peek() in ("^", "!", "'"):
            raise Unreadable("a power of a power without brackets")
        return tree

    def argument(self) -> Tree:
        """What stands behind ^ or a command: {…} or one token, which may have a sign."""
        if self.peek() == "{":
            return self.bracket()
        return self.signed(self.atom)

    def bracket(self) -> Tree:
        closing = PARTNER[self.take()]
        bars, self.bars = self.bars, 0
        tree = self.sum()
        self.bars = bars
        self.expect(closing)
        return tree

    def atom(self) -> Tree:
        token = self.peek()
        if not token:
            raise Unreadable("it ends too early")
        if token in PARTNER:
            return self.bracket()
        self.take()
        if token == "|":
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.expect("|")
            return ("abs", tree)
        if token[0].isdigit() or token[0] == ".":
            if self.peek() == "_":
                raise Unreadable("a number with an index")
            return number(token)
        if token.isalpha():
            return self.letter(token) if token not in WORDS_OF_MATH else self.command(token)
        if token[0] == "\\":
            return self.command(token[1:])
        raise Unreadable(f"{token!r} stands where nothing can")

    def letter(self, name: str) -> Tree:
        if self.peek() == "_":
            self.take()
            return f"{name}_{self.index()}"
        return ("e",) if name == "e" else ("i",) if name == "i" else name

    def index(self) -> str:
        if self.peek() != "{":
            return self.take()
        self.take()
        index = ""
        while self.peek() not in ("}", ""):
            index += self.take()
        self.expect("}")
        return index

    def command(self, name: str) -> Tree:
        if name == "pi":
            return ("pi",)
        if name in FUNCTIONS:
            return self.function(name)
        if name in GREEK_LETTERS:
            return self.letter("\\" + name)
        if name in THINGS:
            return self.thing(name)
        if name == "frac":
            return ("/", self.argument(), self.argument())
        if name in ("binom", "dbinom", "tbinom"):
            return ("binom", self.argument(), self.argument())
        if name == "sqrt":
            return self.root()
        raise Unreadable(f"\\{name} is not known")

    def root(self) -> Tree:
        if self.peek() == "[":
            degree = self.bracket()
            return ("root", self.argument(), degree)
        if re.fullmatch("[0-9]{2,}", self.peek()):
            raise Unreadable("how far the root reaches is unclear")
        if self.peek() == "(":
            return ("sqrt", self.bracket())
        return ("sqrt", self.argument())

    def thing(self, name: str) -> str:
        r"""\overline{AB}, \triangle ABC: a name, not a product of letters."""
        letters = ""
        if self.peek() == "{":
            self.take()
            while self.peek().isalpha():
                letters += self.take()
            self.expect("}")
        else:
            while self.peek().isalpha() and len(letters) < 4:
                letters += self.take()
            if not letters and name == "angle" and self.peek().isdigit():
                letters = self.take()
        if not letters or self.peek().isalpha():
            raise Unreadable(f"what \\{name} stands on is unclear")
        return f"\\{name} {letters}"

    def function(self, name: str) -> Tree:
        r"""\sin^2 x, \log_2 8, \sin 2x, \tan^{-1} 2. Without brackets the argument ends at a sign or a function."""
        base = exponent = None
        if name == "log" and self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            exponent = self.argument()
        if exponent == ("neg", Fraction(1)) and name in INVERSE:
            name, exponent = INVERSE[name], None

        if self.peek() in ("(", "{", "["):
            inner = self.bracket()
            if self.peek() in ("^", "!"):
                raise Unreadable("what the exponent stands on is unclear")
        else:
            inner = self.power()
            while self.starts_factor(self.peek()) and self.peek().lstrip("\\") not in FUNCTIONS | {"("}:
                inner = ("*", inner, self.power())

        if name == "log":
            # Without a base it may be 10 or e: it is compared as a logarithm of a base that nobody knows.
            tree = ("/", ("ln", inner), ("ln", base if base is not None else "\\log base"))
        elif name == "lg":
            tree = ("/", ("ln", inner), ("ln", Fraction(10)))
        elif name == "exp":
            tree = ("^", ("e",), inner)
        else:
            tree = (name, inner)
        return ("^", tree, exponent) if exponent is not None else tree


def is_operand(token: str) -> bool:
    name = token.removeprefix("\\")
    known = WORDS_OF_MATH | GREEK_LETTERS | THINGS | {"frac", "binom", "dbinom", "tbinom"}
    return token[:1] == "\\" and name in known


def tokens_of(text: str) -> list[str]:
    tokens, position = [], 0
    text = text.rstrip()
    while position < len(text):
        match = TOKEN.match(text, position)
        if not match:
            raise Unreadable(f"{text[position]!r} is not known")
        word = match[3]
        if word and word not in WORDS_OF_MATH:
            # "2ab" is a product of letters; a longer word, or the name of a unit, is none.
            if len(word) > 3 or word in SHORT_UNITS or word.lower() in SHORT_WORDS:
                raise Unreadable(f"{word!r} is no product of letters")
            tokens += list(word)
        else:
            tokens.append(match.group().strip())
        position = match.end()
    return tokens


def number(token: str) -> Fraction:
    if len(token) > 60:
        raise Unreadable("a number of too many digits")
    exponent = re.search(r"[eE]([+-]?[0-9]+)$", token)
    if exponent and abs(int(exponent[1])) > 400:
        raise Unreadable("too large or too small")
    return Fraction(token.removesuffix("."))


# ---------------------------------------------------------------------------------------------------------------------
# Effort: what a text costs, counted before anything is computed
#
# A time limit would give a reply another reward on a busy machine. So operations are counted instead, from the text
# alone, and a text of too many is refused, on every machine and with a warm cache, too.

# One operation on complex numbers of 100 digits, the dearer case, in units of about 10 µs
TRIGONOMETRIC, HYPERBOLIC, INVERSE_EFFORT = 20, 30, 4
EFFORTS = {
    "^": 15, "exp": 15, "!": 6, "binom": 25, "sqrt": 6, "ln": 8, "lg": 16, "log": 18,
    "sin": TRIGONOMETRIC, "cos": TRIGONOMETRIC, "tan": TRIGONOMETRIC, "cot": TRIGONOMETRIC, "sec": TRIGONOMETRIC,
    "csc": TRIGONOMETRIC, "sinh": HYPERBOLIC, "cosh": HYPERBOLIC, "tanh": HYPERBOLIC, "arcsin": INVERSE_EFFORT,
    "arccos": INVERSE_EFFORT, "arctan": INVERSE_EFFORT, "+": 5, "-": 5, "\\pm": 5, "\\mp": 5,
}  # fmt: skip
SMALL_EFFORT = 3  # a number, a letter, a bracket, a product, a quotient
WORK = re.compile(r"\\?[A-Za-z]+|[0-9.]+|[^\sA-Za-z0-9.]")


def effort(text: str) -> int:
    """At most what comparing a tidied text costs: the sum over its operations, times the points where they are done."""
    total, has_letters = 0, False
    for part in WORK.findall(text):
        name = part if part in EFFORTS else part.removeprefix("\\")
        if name in EFFORTS:
            total += EFFORTS[name]
        elif name.isalpha() and part[0] != "\\":
            # a run of letters is their product
            total += len(name) * SMALL_EFFORT
            has_letters = has_letters or name not in ("e", "i", "pi")
        else:
            total += SMALL_EFFORT
            has_letters = has_letters or name in GREEK_LETTERS or name in THINGS
    signs = 2 if re.search(r"\\[pm]{2}(?![A-Za-z])", text) else 1
    return total * signs * (POINTS if has_letters else 1)


# ---------------------------------------------------------------------------------------------------------------------
# Expressions: tree to value. Each function takes finite values and returns one, or raises Unreadable.


def clean(value):
    """The value without rounding errors where they would decide: a part that is none, a number beside a whole one."""
    if isinstance(value, MP.mpc):
        if abs(value.imag) <= SNAP * abs(value.real):
            value = value.real
        elif abs(value.real) <= SNAP * abs(value.imag):
            return MP.mpc(0, value.imag)
        else:
            return value
    if not MP.isfinite(value):
        raise Unreadable("not finite")
    if abs(value) > 0.5 and abs(value) < 1e30:
        nearest = MP.nint(value)
        if abs(value - nearest) <= SNAP * abs(value):
            return nearest
    return value


def add(a, b):
    smaller, larger = sorted((abs(a), abs(b)))
    if 0 < smaller < ABSORBED * larger:
        raise Unreadable("a term that vanishes beside another")
    real, imag = a.real + b.real, a.imag + b.imag
    # What two equal terms leave of each other is rounding.
    if abs(real) <= SNAP * max(abs(a.real), abs(b.real)):
        real = MP.mpf(0)
    if abs(imag) <= SNAP * max(abs(a.imag), abs(b.imag)):
        imag = MP.mpf(0)
    return MP.mpc(real, imag) if imag else real


def divide(a, b):
    if b == 0:
        raise Unreadable("division by zero")
    return a / b


def power(base, exponent):
    if base == 0:
        if isinstance(exponent, MP.mpc) or exponent <= 0:
            raise Unreadable("a power of zero")
        return MP.mpf(0)
    if abs(exponent * MP.log(base)) > MAX_LOG:
        raise Unreadable("a power too large or too small")
    if isinstance(exponent, MP.mpf) and exponent == MP.nint(exponent):
        return base ** int(exponent)
    return MP.power(base, exponent)


def root(value, degree):
    """The real root of a negative number where there is one: the cube root of -8 is -2."""
    if isinstance(degree, MP.mpc) or degree != MP.nint(degree) or not 1 < degree < 1000:
        raise Unreadable("a root of an odd degree")
    if isinstance(value, MP.mpf) and value < 0 and int(degree) % 2:
        return -power(-value, 1 / degree)
    return power(value, 1 / degree)


def factorial(value):
    if isinstance(value, MP.mpc) or not 0 <= value <= MAX_FACTORIAL:
        raise Unreadable("a factorial of this")
    return MP.gamma(value + 1)


def binomial(above, below):
    for value in (above, below):
        if isinstance(value, MP.mpc) or not 0 <= value <= MAX_FACTORIAL:
            raise Unreadable("a binomial of this")
    if below > above:
        raise Unreadable("a binomial of this")
    return MP.binomial(above, below)


def logarithm(value):
    if value == 0 or isinstance(value, MP.mpf) and value < 0:
        raise Unreadable("a logarithm of nothing or less")
    return MP.log(value)


def trigonometric(name: str) -> Callable:
    def calculate(value):
        if abs(value) > 1e30 or abs(value.imag) > MAX_LOG:
            raise Unreadable("an angle too large")
        result = getattr(MP, name)(value)
        # Near a whole number of half turns only rounding is left; near 0 the value itself is small.
        if abs(result) <= SNAP * max(1, abs(value)) and abs(value) > ABSORBED:
            return MP.mpf(0)
        return clean(result)

    return calculate


def inverse(name: str, largest: float) -> Callable:
    def calculate(value):
        if isinstance(value, MP.mpc) or abs(value) > largest:
            raise Unreadable("outside the domain")
        return getattr(MP, name)(value)

    return calculate


SIN, COS = trigonometric("sin"), trigonometric("cos")
OPERATIONS = {
    "+": add,
    "neg": lambda a: -a,
    "*": lambda a, b: a * b,
    "/": divide,
    "^": power,
    "!": factorial,
    "abs": abs,
    "degree": lambda a: a * MP.pi / 180,
    "sqrt": lambda a: MP.sqrt(a),
    "root": root,
    "binom": binomial,
    "ln": logarithm,
    "sin": SIN,
    "cos": COS,
    "tan": lambda a: divide(SIN(a), COS(a)),
    "cot": lambda a: divide(COS(a), SIN(a)),
    "sec": lambda a: divide(MP.mpf(1), COS(a)),
    "csc": lambda a: divide(MP.mpf(1), SIN(a)),
    "arcsin": inverse("asin", 1),
    "arccos": inverse("acos", 1),
    "arctan": inverse("atan", 1e30),
    "sinh": lambda a: divide(power(MP.e, a) - power(MP.e, -a), MP.mpf(2)),
    "cosh": lambda a: divide(power(MP.e, a) + power(MP.e, -a), MP.mpf(2)),
    "tanh": lambda a: divide(power(MP.e, 2 * a) - 1, power(MP.e, 2 * a) + 1),
    "e": lambda: +MP.e,
    "i": lambda: MP.mpc(0, 1),
    "pi": lambda: +MP.pi,
}


@lru_cache(maxsize=4096)  # every x of a text has the same values
def letter_value(name: str, point: int):
    """Between 0.2 and 2.2 in size, the same in every process; points 0 to 2 are positive, 3 negative, 4 and 5 mixed."""
    bits = zlib.crc32(f"{name} {point}".encode())
    size = MP.mpf(bits) / 2**31 + MP.mpf(1) / 5
    negative = point == 3 or (point > 3 and zlib.crc32(f"{point} {name}".encode()) % 2)
    # The base of a logarithm is no negative number.
    return -size if negative and name != "\\log base" else size


def evaluate(tree: Tree, point: int = 0):
    """The value at a point: finite, or Unreadable is raised."""
    if isinstance(tree, Fraction):
        return MP.mpf(tree.numerator) / tree.denominator
    if isinstance(tree, str):
        return letter_value(tree, point)
    operation, *parts = tree
    return clean(OPERATIONS[operation](*(evaluate(part, point) for part in parts)))


def letters_in(tree: Tree) -> set[str]:
    if isinstance(tree, str):
        return {tree}
    return set().union(*(letters_in(part) for part in tree[1:])) if isinstance(tree, tuple) else set()


@lru_cache(maxsize=20_000)  # a gold meets many replies, and each of them is looked at in several ways
def value_at(tree: Tree, point: int):
    """As `evaluate`, but None where there is no finite value."""
    try:
        return evaluate(tree, point)
    except Unreadable:
        return None


def values_of(tree: Tree) -> list:
    """The values at all points, None where there is none; one value if there are no letters."""
    return [value_at(tree, point) for point in range(POINTS if letters_in(tree) else 1)]


def close(a, b) -> bool:
    return abs(a - b) <= EQUAL * max(abs(a), abs(b))


def same_value(a: Tree, b: Tree) -> bool:
    """Equal wherever there is a value, at MIN_FINITE points at least, and both without a value elsewhere."""
    points = POINTS if letters_in(a) | letters_in(b) else 1
    finite = 0
    for point in range(points):
        left, right = value_at(a, point), value_at(b, point)
        if left is None and right is None:
            continue
        if left is None or right is None or not close(left, right):
            return False
        finite += 1
    return finite >= min(points, MIN_FINITE)


def proportional(a: Tree, b: Tree) -> int:
    """The sign of the constant by which b is a multiple of a, or 0: x - 3 and 6 - 2x, -1."""
    ratios = []
    for left, right in zip(values_of(a), values_of(b), strict=False):
        if left is None or right is None:
            continue
        if left == 0 or right == 0:
            return 0
        ratios.append(clean(right / left))
    if len(ratios) < MIN_FINITE or isinstance(ratios[0], MP.mpc):
        return 0
    if not all(close(ratios[0], ratio) for ratio in ratios):
        return 0
    return 1 if ratios[0] > 0 else -1
