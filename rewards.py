"""Verifiable rewards: reads a reply strictly in the format its prompt asks for, and compares its answer with the gold.

    reward = accuracy_weight * accuracy + format_weight * format

format    1.0 if the reply has exactly the asked structure *and* an answer can be read from its place, else 0.0
accuracy  letter, digit, text, math: 0 or 1; grid: share of right indices of a permutation; box: IoU;
          point: 1 inside the gold box. It counts only where format is 1: an answer outside its place is no answer, and
          there is no second, more lenient look.

Legend
record    one question: a dict with "answer_type", "answer" and what the type needs (see `check_gold`)
gold      the right answer, record["answer"]
reply     the whole text a model wrote; a reply format splits it into a reason and an answer text
answer    the answer text, read by the grammar of its answer type: "B", 12, [2, 1, 4, 3], [10.0, 20.0]

Two tables hold what can be extended: REPLY_FORMATS and ANSWER_TYPES. A new answer type is one entry of the second,
with its functions above it; nothing else in this file knows any type by name.

Reading is a full match against a small grammar, never a search: "A or B" is not an A with something behind it, it is no
letter at all. Nothing here evaluates model output, and every reading takes time linear in the reply.

Sources: SPECS (arXiv 2510.25801) for the shape of a reply and the weights 1.0 and 0.5; Jigsaw-R1 (arXiv 2505.23590) for
letters, digits, grids and boxes. Where the public code of Jigsaw-R1 is looser than its paper (the whole reply counts as
the answer when a tag is missing, the last capital letter counts, repeated indices get partial credit) this file follows
the paper.

The lenient readers, which only help to build pairs and never earn a reward, are in judge.py.
"""

import json
import logging
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

MAX_REPLY = 100_000  # characters; a longer reply is not read at all
MAX_ANSWER = 2_000  # characters of an answer of any type
MAX_MATH = 200  # characters of a mathematical answer: what a computer algebra system is allowed to see
MATH_SECONDS = 3  # per comparison, where a timeout is possible (main thread)

# What .strip() takes off. Python's own default would take off dozens of Unicode spaces too.
SPACE = " \t\r\n"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---------------------------------------------------------------------------------------------------------------------
# The shape of a reply: where the reason ends and the answer begins
#
# A reader gets the stripped reply and returns (reason, answer text), or None if the shape is not exactly its own.

# The tags of all formats. A text answer must not hold any, so a format with tags of its own adds them here.
TAG = re.compile(r"</?(?:think|answer|reason|result)>")


def read_blocks(reply: str, first: str, second: str) -> tuple[str, str] | None:
    """<first>R</first><second>A</second>, each tag once, only white space around the blocks."""
    reason_opens, reason_closes = f"<{first}>", f"</{first}>"
    answer_opens, answer_closes = f"<{second}>", f"</{second}>"

    # Counting the tags rules out nested, repeated and unclosed ones.
    for tag in (reason_opens, reason_closes, answer_opens, answer_closes):
        if reply.count(tag) != 1:
            return None
    if not reply.startswith(reason_opens) or not reply.endswith(answer_closes):
        return None

    reason_end, answer_start = reply.find(reason_closes), reply.find(answer_opens)
    if reason_end > answer_start:
        return None
    between = reply[reason_end + len(reason_closes) : answer_start]
    if between.strip(SPACE):
        return None

    reason = reply[len(reason_opens) : reason_end]
    answer_text = reply[answer_start + len(answer_opens) : -len(answer_closes)]
    return reason, answer_text


def read_think(reply: str) -> tuple[str, str] | None:
    """<think>R</think><answer>A</answer>"""
    return read_blocks(reply, "think", "answer")


def read_tags(reply: str) -> tuple[str, str] | None:
    """<reason>R</reason><result>A</result>, as strict as think."""
    return read_blocks(reply, "reason", "result")


def read_bare(reply: str) -> tuple[str, str] | None:
    """A, and no reason."""
    return "", reply


def read_boxed(reply: str) -> tuple[str, str] | None:
    r"""R, then \boxed{A} as the very end, in $...$ and with a full stop or not; \boxed once."""
    start = reply.find("\\boxed{")
    if start < 0 or reply.count("\\boxed") != 1:
        return None
    end = closing_brace(reply, start + len("\\boxed"))
    if end is None:
        return None

    reason, after = reply[:start], reply[end + 1 :]
    if after not in ("", ".", "$", "$.", ".$"):
        return None
    if ("$" in after) != reason.endswith("$"):
        return None  # one dollar sign without its partner
    return reason.removesuffix("$"), reply[start + len("\\boxed{") : end]


def closing_brace(text: str, opening: int) -> int | None:
    """Index of the } that closes the { at `opening`, or None. One pass."""
    depth = 0
    for match in re.compile(r"[{}]").finditer(text, opening):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    return None


def read_json(reply: str) -> tuple[str, str] | None:
    """{"reason": R, "answer": A} and nothing else; R is text, A is text, a number, or a list of those."""
    if not (reply.startswith("{") and reply.endswith("}")):
        return None

    # Python's reader is looser than JSON: of a key that stands twice it takes the last, and it knows NaN and Infinity.
    def refuse_duplicates(pairs: list) -> dict:
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def refuse_constant(name: str):
        raise ValueError(name)

    try:
        value = json.loads(reply, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        # ValueError: not JSON, or an integer of thousands of digits; RecursionError: brackets nested without end
        return None

    if set(value) != {"reason", "answer"} or not isinstance(value["reason"], str):
        return None
    reason, answer = value["reason"], value["answer"]
    if answer is None or isinstance(answer, bool | dict):
        return None
    if isinstance(answer, str):
        return reason, answer
    try:
        return reason, json.dumps(answer, allow_nan=False)
    except (ValueError, RecursionError):  # 1e999 is JSON, and infinite
        return None


def read_line(reply: str) -> tuple[str, str] | None:
    """R, then the last line "Answer: A"; "Answer:" occurs once."""
    reason, _, last_line = reply.rpartition("\n")
    if reply.count("Answer:") != 1 or not last_line.startswith("Answer: "):
        return None
    return reason, last_line[len("Answer: ") :]


@dataclass(frozen=True)
class ReplyFormat:
    """One way to lay out a reply."""

    read: Callable[[str], tuple[str, str] | None]  # stripped reply -> (reason, answer text); its grammar: the docstring
    reason_may_be_empty: bool = False
    # Whether "The answer is B", \boxed{B} and $B$ are read as B. Not where the prompt asks for the answer alone.
    answer_may_be_wrapped: bool = True


REPLY_FORMATS = {
    "think": ReplyFormat(read_think),
    "bare": ReplyFormat(read_bare, reason_may_be_empty=True, answer_may_be_wrapped=False),
    "tags": ReplyFormat(read_tags),
    "boxed": ReplyFormat(read_boxed, reason_may_be_empty=True),
    "json": ReplyFormat(read_json),
    "line": ReplyFormat(read_line),
}


def reply_format(record: dict) -> str:
    """The format the prompt asks for: the record's `reply_format`, otherwise `think` or `bare` as its `think` says."""
    return record.get("reply_format") or ("think" if record.get("think") else "bare")


def format_called(name: str) -> ReplyFormat:
    """The entry of REPLY_FORMATS. ValueError for a name it does not have."""
    if not isinstance(name, str) or name not in REPLY_FORMATS:
        raise ValueError(f"unknown reply_format {name!r}")
    return REPLY_FORMATS[name]


def read_reply(reply: str, format_name: str) -> tuple[str, str] | None:
    """Splits a reply into (reason, answer text), or None if it does not have exactly the structure of the format.

    Neither part may be empty, unless the format allows it for the reason.
    """
    if len(reply) > MAX_REPLY:
        return None
    wanted = format_called(format_name)
    parts = wanted.read(reply.strip(SPACE))
    if parts is None:
        return None

    reason, answer_text = parts[0].strip(SPACE), parts[1].strip(SPACE)
    if not answer_text:
        return None
    if not reason and not wanted.reason_may_be_empty:
        return None
    return reason, answer_text


# ---------------------------------------------------------------------------------------------------------------------
# What may stand around an answer

# "The answer is", "Final answer:", "Option". re.ASCII: only letters that are ASCII themselves.
LEAD = re.compile(
    r"(?:(?:the|my)[ ])?(?:(?:final|correct)[ ])?(?:answer|option)(?:[ ]is)?:?[ ]", re.IGNORECASE | re.ASCII
)


def unwrap(text: str) -> str:
    r"""Takes off, in this order, each at most once: a lead, the full stop behind a frame, $...$, \boxed{...}, $...$."""
    lead = LEAD.match(text)
    if lead:
        text = text[lead.end() :].strip(SPACE)
    if text.endswith(("}.", "$.")):
        text = text[:-1]
    text = undollar(text)

    is_boxed = text.startswith("\\boxed{") and closing_brace(text, len("\\boxed")) == len(text) - 1
    if is_boxed:
        text = undollar(text[len("\\boxed{") : -1].strip(SPACE))
    return text


def undollar(text: str) -> str:
    """$...$ without its dollar signs, if they are the only ones."""
    if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2:
        return text[1:-1].strip(SPACE)
    return text


# ---------------------------------------------------------------------------------------------------------------------
# What an answer type is. The types follow, one a section, and then their table.

Answer = Any  # what a type reads: "B", 12, [2, 1, 4, 3]


@dataclass(frozen=True)
class AnswerType:
    """One kind of answer. A new one is an entry of ANSWER_TYPES, its functions, and a test."""

    # What is read, in one line, with examples in double quotes: the tests read each of them
    grammar: str
    # (stripped text, record) -> the answer, or None if the whole text does not match
    read: Callable[[str, dict], Answer | None]
    # (answer, record) -> how right it is, in [0, 1]
    accuracy: Callable[[Answer, dict], float]
    # (record): raises ValueError, with a one-line cause, for a gold that cannot be scored; the others rely on it
    check: Callable[[dict], None]
    # The accuracy from which an answer counts as right, where that is a yes or no
    right_from: float = 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Letters: which option

LETTER = re.compile(r"(?:\(([A-Z])\)\.?|([A-Z])[.):]?)(?:[ ]+(.+))?")


def letters_of(record: dict) -> str:
    """The letters that name an option: as many as there are options, all 26 where the record lists none."""
    options = record.get("options")
    return LETTERS[: len(options)] if options else LETTERS


def read_letter(text: str, record: dict) -> str | None:
    match = LETTER.fullmatch(text)
    if not match:
        return None
    letter, written_out = match.group(1) or match.group(2), match.group(3)
    if letter not in letters_of(record):
        return None
    if written_out is None:
        return letter

    # "B. above" is option B written out; "B above", "B. below" and "B or C" are not.
    options = record.get("options")
    marked = text[0] == "(" or text[1] in ".):"
    option = str(options[LETTERS.index(letter)]).strip(SPACE) if options else ""
    if not marked or not option or written_out not in (option, f"{option}."):
        return None
    return letter


def letter_accuracy(answer: str, record: dict) -> float:
    return float(answer == record["answer"])


def check_letter(record: dict) -> None:
    gold, options = record.get("answer"), record.get("options")
    if options is not None and not (isinstance(options, list) and 1 <= len(options) <= 26):
        raise ValueError(f"options must be a list of 1 to 26, not {options!r:.80}")
    letters = letters_of(record)
    if not (isinstance(gold, str) and len(gold) == 1 and gold in letters):
        raise ValueError(f"answer {gold!r:.80} is not one of the letters {letters[0]}-{letters[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# Digits: one whole number


def read_digit(text: str, record: dict) -> int | None:
    match = re.fullmatch(r"([0-9]{1,15})\.?", text)
    return int(match.group(1)) if match else None


def digit_accuracy(answer: int, record: dict) -> float:
    return float(answer == int(record["answer"]))


def check_digit(record: dict) -> None:
    gold = record.get("answer")
    written = str(gold) if isinstance(gold, int | str) and not isinstance(gold, bool) else ""
    if not re.fullmatch(r"[0-9]{1,15}", written):
        raise ValueError(f"answer {gold!r:.80} is not a whole number of at most 15 digits, 0 or above")


# ---------------------------------------------------------------------------------------------------------------------
# Grids: an arrangement of 1 to rows * cols, row by row


def grid_size(record: dict) -> int:
    if "rows" in record and "cols" in record:
        return record["rows"] * record["cols"]
    return len(record["answer"])


def read_indices(text: str, size: int) -> list[int] | None:
    """`size` indices from 1 to `size`, in any brackets or none. They may repeat: that is wrong, but readable."""
    if not re.fullmatch(r"[0-9 ,\t\r\n\[\]()]+", text):
        return None
    if text.count("[") != text.count("]") or text.count("(") != text.count(")"):
        return None
    numbers = re.findall(r"[0-9]+", text)
    if len(numbers) != size or any(len(number) > 6 for number in numbers):
        return None

    indices = [int(number) for number in numbers]
    in_range = all(1 <= index <= size for index in indices)
    return indices if in_range else None


def read_grid(text: str, record: dict) -> list[int] | None:
    return read_indices(text, grid_size(record))


def is_arrangement(indices: list[int], size: int) -> bool:
    return len(indices) == size and sorted(indices) == list(range(1, size + 1))


def grid_accuracy(answer: list[int], record: dict) -> float:
    gold = record["answer"]
    if not is_arrangement(answer, len(gold)):
        return 0.0  # a repeated index places one patch twice: that is no arrangement, so no part of it counts
    right = sum(index == gold_index for index, gold_index in zip(answer, gold, strict=True))
    return right / len(gold)


def check_grid(record: dict) -> None:
    gold = record.get("answer")
    sides = [record[side] for side in ("rows", "cols") if side in record]
    if not all(is_whole(side) and side >= 1 for side in sides):
        raise ValueError(f"rows and cols must be whole numbers from 1, not {sides!r:.80}")
    if not isinstance(gold, list) or not gold or not all(is_whole(index) for index in gold):
        raise ValueError(f"answer {gold!r:.80} is not a list of whole numbers")
    if not is_arrangement(gold, grid_size(record)):
        raise ValueError(f"answer {gold!r:.80} is not an arrangement of 1 to {grid_size(record)}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # to Python True is an int


# ---------------------------------------------------------------------------------------------------------------------
# Boxes (x1, y1, x2, y2) and points (x, y), in pixels. The gold of both is a box.

NUMBER = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?")


def read_numbers(text: str, count: int) -> list[float] | None:
    """`count` decimal numbers between commas or spaces, in one pair of brackets or none."""
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    numbers = re.split(r"[ \t\r\n]*,[ \t\r\n]*|[ \t\r\n]+", text.strip(SPACE))
    if len(numbers) != count or not all(NUMBER.fullmatch(number) for number in numbers):
        return None
    return [float(number) for number in numbers]


def read_box(text: str, record: dict) -> list[float] | None:
    return read_numbers(text, 4)


def read_point(text: str, record: dict) -> list[float] | None:
    return read_numbers(text, 2)


def iou(box: list[float], gold: list[float]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); a box without area gives 0."""
    width = min(box[2], gold[2]) - max(box[0], gold[0])
    height = min(box[3], gold[3]) - max(box[1], gold[1])
    if width <= 0 or height <= 0 or box[2] <= box[0] or box[3] <= box[1]:
        return 0.0
    both = width * height
    area = (box[2] - box[0]) * (box[3] - box[1])
    gold_area = (gold[2] - gold[0]) * (gold[3] - gold[1])
    return both / (area + gold_area - both)


def box_accuracy(answer: list[float], record: dict) -> float:
    return iou(answer, record["answer"])


def point_accuracy(answer: list[float], record: dict) -> float:
    x, y = answer
    x1, y1, x2, y2 = record["answer"]
    return float(x1 <= x <= x2 and y1 <= y <= y2)


def check_box(record: dict) -> None:
    gold = record.get("answer")
    if not (isinstance(gold, list) and len(gold) == 4 and all(is_finite(side) for side in gold)):
        raise ValueError(f"answer {gold!r:.80} is not a box of four finite numbers [x1, y1, x2, y2]")
    if gold[2] <= gold[0] or gold[3] <= gold[1]:
        raise ValueError(f"answer {gold!r:.80} is a box without area: x2 must be above x1 and y2 above y1")


def is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---------------------------------------------------------------------------------------------------------------------
# Texts: one line, equal to an accepted one. The gold is a text or a list of them.


def plain(text: object) -> str:
    """Text as it is compared: case, runs of white space and a closing full stop do not matter."""
    return " ".join(str(text).casefold().split()).removesuffix(".").rstrip()


def accepted_texts(gold: str | list[str]) -> list[str]:
    return gold if isinstance(gold, list) else [gold]


def read_text(text: str, record: dict) -> str | None:
    # Markup means that the reply's structure was not read off: a bare "<answer>yes</answer>" is no text "yes".
    if not text or "\n" in text or TAG.search(text) or "\\boxed" in text:
        return None
    return text


def text_accuracy(answer: str, record: dict) -> float:
    accepted = set()
    for text in accepted_texts(record["answer"]):
        # Reading may have taken a lead off ("option a" -> "a"), so the gold text counts with and without its own.
        accepted |= {plain(text), plain(unwrap(text))}
    return float(plain(answer) in accepted)


def check_text(record: dict) -> None:
    gold = record.get("answer")
    texts = accepted_texts(gold)
    if not texts or any(not isinstance(text, str) or not plain(text) for text in texts):
        raise ValueError(f"answer {gold!r:.80} is not a text, or a list of accepted texts, none empty")
    # The grammar must be able to read the gold itself, otherwise no reply could ever be right.
    for text in texts:
        stripped = text.strip(SPACE)
        if len(stripped) > MAX_ANSWER or read_text(stripped, record) is None:
            raise ValueError(
                f"answer {gold!r:.80} is not one line of at most {MAX_ANSWER} characters without reply tags"
            )


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics: an expression of the same value, by math-verify
#
# A computer algebra system is never safe from "9^9^9^9": big integers are computed in C, where no timeout reaches, and
# a timeout by signal exists in the main thread only. So the text is checked first: short, known commands, small
# exponents, no towers of them, small factorials.

MATH_TEXT = re.compile(r"[0-9A-Za-z+\-*/^_=<>()\[\]{}|,.!%&:'\\ ~]+")
MATH_COMMANDS = frozenset(
    "frac dfrac tfrac sqrt pi cdot times div left right text mathrm mathbf infty cup cap in le leq ge geq lt gt ne neq "
    "sin cos tan cot sec csc arcsin arccos arctan log ln circ degree angle alpha beta gamma delta theta lambda mu phi "
    "omega begin end quad emptyset varnothing mid".split()
)
MATH_HEDGE = re.compile(r"(?<![A-Za-z])(?:or|and|not|either|neither|maybe)(?![A-Za-z])", re.IGNORECASE)
# ^12, ^x, ^\circ, ^{anything short without another exponent}, ^{\frac{1}{2}}
EXPONENT = re.compile(
    r"\^(?:([0-9]{1,3})(?![0-9.])|([A-Za-z]|\\circ|\\degree)|\{([^{}^]{1,20})\}"
    r"|\{(-?\\[dt]?frac\{[0-9]{1,3}\}\{[0-9]{1,3}\})\})"
)
SMALL_FACTORIAL = re.compile(r"(?<![0-9])[0-9]{1,2}!(?!!)")


def harmless_math(text: str) -> bool:
    """True if the text is short, names one value, and cannot make a computer algebra system run for long."""
    if len(text) > MAX_MATH or not MATH_TEXT.fullmatch(text):
        return False
    if "**" in text or "--" in text or MATH_HEDGE.search(text):
        return False
    if any(command not in MATH_COMMANDS for command in re.findall(r"\\([A-Za-z]+)", text)):
        return False
    if any(len(number) > 30 for number in re.findall(r"[0-9]+", text)):
        return False
    if re.search(r"\{ *\}", text):
        return False  # math-verify drops an empty \text{}, which would join two numbers to a long one
    return one_value(text) and small_factorials(text) and small_powers(text)


def one_value(text: str) -> bool:
    """False for "4 = 5" and "4 = x = 5", of which math-verify would take the last value; "x = 5" is one value."""
    for part in text.split(","):
        left, equals, right = part.partition("=")
        if equals and ("=" in right or not re.search(r"[A-Za-z]", left)):
            return False
    return True


def small_factorials(text: str) -> bool:
    """Every ! stands behind a number of at most two digits, and nothing is raised to a power beside it."""
    if "!" not in text:
        return True
    return "^" not in text and text.count("!") == len(SMALL_FACTORIAL.findall(text))


def small_powers(text: str) -> bool:
    """Written out, the powers would be numbers of bounded length and sums of a bounded number of terms."""
    powers = list(EXPONENT.finditer(text))
    if len(powers) != text.count("^"):
        return False  # an exponent that is long, or has an exponent itself

    # Powers may stand on powers, so the exponents multiply: all of them, and those of a bracket, which is expanded.
    product, product_on_brackets = 1, 1
    for power in powers:
        numbers = re.findall(r"[0-9]+", power.group())
        exponent = math.prod(max(1, int(number)) for number in numbers)
        product *= exponent
        base = text[: power.start()].rstrip()
        if base.endswith((")", "]", "}", "|")):
            product_on_brackets *= exponent

    without_commands = re.sub(r"\\[A-Za-z]+", "", text)
    variables = len(set(re.findall(r"[A-Za-z]", without_commands)))
    if variables == 0:
        limit = 1000
    elif variables <= 2:
        limit = 60
    else:
        limit = 5
    return product <= 1000 and product_on_brackets <= limit


def math_seconds() -> int | None:
    """math-verify's timeout is a signal, which only the main thread can have. Elsewhere `harmless_math` must do."""
    return MATH_SECONDS if threading.current_thread() is threading.main_thread() else None


@lru_cache(maxsize=4096)  # the gold answer meets every reply of its group
def parse_math(text: str) -> list:
    """[one sympy expression] or []. The whole text is the expression: nothing is searched for inside it."""
    if not harmless_math(text):
        return []
    # Imported here: it brings sympy, which takes a second and which only this answer type needs.
    from math_verify import LatexExtractionConfig, parse

    # Only the LaTeX reader: the one for plain expressions ends in Python's eval.
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns at every timeout, and once about having none
    found = parse(
        f"${text}$",
        [LatexExtractionConfig()],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=math_seconds(),
    )
    return [value for value in found if not isinstance(value, str)]


def same_math(gold: str, answer: str) -> bool:
    """Whether two expressions are the same text but for spaces, or else equal in value (math-verify)."""
    if "".join(unwrap(gold).split()) == "".join(answer.split()):
        return True
    from math_verify import verify

    return bool(verify(parse_math(unwrap(gold)), parse_math(answer), timeout_seconds=math_seconds()))


def read_math(text: str, record: dict) -> str | None:
    """The expression as text if math-verify can parse it, else None."""
    text = text.removesuffix(".")
    return text if parse_math(text) else None


def math_accuracy(answer: str, record: dict) -> float:
    return float(same_math(str(record["answer"]), answer))


def check_math(record: dict) -> None:
    gold = record.get("answer")
    readable = isinstance(gold, str | int | float) and not isinstance(gold, bool)
    if not readable or not parse_math(unwrap(str(gold).strip(SPACE))):
        raise ValueError(f"answer {gold!r:.80} cannot be read as mathematics")


# ---------------------------------------------------------------------------------------------------------------------
# The table of answer types

ANSWER_TYPES = {
    "letter": AnswerType(
        grammar='one capital: "B", "(B)", "(B).", "B.", "B)", "B:", or marked and with its option, "B. below" -> "B"',
        read=read_letter,
        accuracy=letter_accuracy,
        check=check_letter,
    ),
    "digit": AnswerType(
        grammar='a whole number of at most 15 ASCII digits: "12", "12." -> 12',
        read=read_digit,
        accuracy=digit_accuracy,
        check=check_digit,
    ),
    "grid": AnswerType(
        grammar='rows * cols indices from 1: "2 1 4 3", "2,1,4,3", "[[2, 1], [4, 3]]", "(2 1) (4 3)" -> [2, 1, 4, 3]',
        read=read_grid,
        accuracy=grid_accuracy,
        check=check_grid,
    ),
    "box": AnswerType(
        grammar='x1, y1, x2, y2: "10, 20, 30.5, 40", "[10 20 30.5 40]", "(10,20,30.5,40)" -> [10.0, 20.0, 30.5, 40.0]',
        read=read_box,
        accuracy=box_accuracy,
        check=check_box,
        right_from=0.5,  # the usual threshold for a found object
    ),
    "point": AnswerType(
        grammar='x, y: "10, 20.5", "[10 20.5]", "(10, 20.5)" -> [10.0, 20.5]',
        read=read_point,
        accuracy=point_accuracy,
        check=check_box,
    ),
    "math": AnswerType(
        grammar=r'what math-verify can parse, as text: "0.5", "x = 5", "\frac{\sqrt{3}}{2}", "(1, 2)", "5."',
        read=read_math,
        accuracy=math_accuracy,
        check=check_math,
    ),
    "text": AnswerType(
        grammar='one line without reply tags, as it stands: "two dogs", "Two dogs."',
        read=read_text,
        accuracy=text_accuracy,
        check=check_text,
    ),
}


def type_of(record: dict) -> AnswerType:
    """The entry of ANSWER_TYPES for a record. ValueError for a type it does not have."""
    name = record["answer_type"]
    if not isinstance(name, str) or name not in ANSWER_TYPES:
        raise ValueError(f"unknown answer_type {name!r}")
    return ANSWER_TYPES[name]


# ---------------------------------------------------------------------------------------------------------------------
# The reward


def read_answer(text: str, record: dict, wrapped: bool | None = None) -> Answer | None:
    r"""Reads one answer by the strict grammar of the record's answer type. None if the whole text does not match.

    wrapped: whether a lead ("The answer is B") and a frame (\boxed{B}, $B$) may stand around it. Default: yes in every
    format but `bare`, where the prompt asks for the answer and nothing else.
    """
    if wrapped is None:
        wrapped = format_called(reply_format(record)).answer_may_be_wrapped
    text = text.strip(SPACE)
    if len(text) > MAX_ANSWER:
        return None
    if wrapped:
        text = unwrap(text)
    return type_of(record).read(text, record)


def accuracy(answer: Answer, record: dict) -> float:
    """How right a parsed answer is, in [0, 1]. `answer` comes from `read_answer` or `judge.find_answer`."""
    return type_of(record).accuracy(answer, record)


def is_right(answer: Answer, record: dict) -> bool:
    """Whether a parsed answer counts as right where that is a yes or no: for most types if nothing in it is wrong."""
    return accuracy(answer, record) >= type_of(record).right_from


def score(reply: str, record: dict, accuracy_weight: float = 1.0, format_weight: float = 0.5) -> dict[str, Any]:
    """Reward of one reply.

    Returns {"reward", "accuracy" in [0, 1], "format" 0.0 or 1.0, "answer": the parsed answer or None}. Never raises for
    any text; the record is one that `check_gold` let pass.
    """
    answer = None
    parts = read_reply(reply, reply_format(record))
    if parts is not None:
        _, answer_text = parts
        answer = read_answer(answer_text, record)

    well_formed = 0.0 if answer is None else 1.0
    right = 0.0 if answer is None else accuracy(answer, record)
    return {
        "reward": accuracy_weight * right + format_weight * well_formed,
        "accuracy": right,
        "format": well_formed,
        "answer": answer,
    }


def check_gold(record: dict) -> None:
    """Raises ValueError with a one-line cause if replies to this record cannot be scored. Call it before training."""
    # A record comes from a file, so its type may be anything, a list too, which no dict can be asked for.
    type_name, format_name = record.get("answer_type"), record.get("reply_format")
    if type_name not in list(ANSWER_TYPES):
        raise ValueError(f"answer_type {type_name!r} is unknown (known: {', '.join(ANSWER_TYPES)})")
    if format_name is not None and format_name not in list(REPLY_FORMATS):
        raise ValueError(f"reply_format {format_name!r} is unknown (known: {', '.join(REPLY_FORMATS)})")
    ANSWER_TYPES[type_name].check(record)
