"""Verifiable rewards: reads a reply strictly in the format its prompt asks for, and compares its answer with the gold.

    reward = accuracy_weight * accuracy + format_weight * format          (or another reward, see REWARDS)

format    1.0 if the reply has exactly the asked structure *and* an answer can be read from its place, else 0.0
accuracy  letter, digit, text, math: 0 or 1; grid: share of right indices of a permutation; box: IoU;
          point: 1 inside the gold box. It counts only where format is 1: an answer outside its place is no answer, and
          there is no second, more lenient look.

Legend
record    one question: a dict with "answer_type", "answer" and what the type needs (see `check_gold`)
gold      the right answer, record["answer"]
reply     the whole text a model wrote; a reply format splits it into a reason and an answer text
answer    the answer text, read by the grammar of its answer type: "B", 12, [2, 1, 4, 3], [10.0, 20.0]

Two tables hold what can be extended: REPLY_FORMATS in replies.py and ANSWER_TYPES. A new answer type is one entry of
the second, with its functions above it; nothing else in this file knows any type by name.

Reading is a full match against a small grammar, never a search: "A or B" is not an A with something behind it, it is no
letter at all. What may stand around an answer (frames, leads, a plain sentence) is a fixed list, and only formats that
give the answer a place of its own allow it. Nothing here executes model output, and every reading takes bounded time.

Sources: SPECS (arXiv 2510.25801) for the shape of a reply and the weights 1.0 and 0.5; Jigsaw-R1 (arXiv 2505.23590) for
letters, digits, grids and boxes. Where the public code of Jigsaw-R1 is looser than its paper (the whole reply counts as
the answer when a tag is missing, the last capital letter counts, repeated indices get partial credit) this file follows
the paper.

How mathematics is read and compared is in math_answers.py and, below it, expressions.py. The lenient readers, which
only help to build pairs and never earn a reward, are in judge.py.
"""

import json
import math
import re
import reprlib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import math_answers
from replies import (  # noqa: F401  also for those who look for them here
    MAX_REPLY,
    REPLY_FORMATS,
    SPACE,
    TAG,
    ReplyFormat,
    closing_brace,
    fold,
    format_called,
    is_template,
    read_bare,
    read_reply,
    reply_format,
    stated,
    unwrap,
)

MAX_ANSWER = 2_000  # characters of an answer of any type
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
    # As `read`, where the format wants the answer alone (ReplyFormat.answer_may_be_wrapped); None: `read` itself
    read_bare: Callable[[str, dict], Answer | None] | None = None
    # Whether reading computes values: scoring.py then does it in a process of its own, under a limit
    computes: bool = False


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # to Python True is an int


SHORT = reprlib.Repr()
SHORT.maxlist = SHORT.maxdict = 6
SHORT.maxstring = SHORT.maxother = 70
SURROGATE = re.compile("[\ud800-\udfff]")


def shown(value: object) -> str:
    """A gold as an error names it: at most 80 characters on one line, without ever building a longer text."""
    try:
        return SHORT.repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"


def is_writable(text: object) -> bool:
    """Whether it is a text that a reply could hold: not too long, no half of a surrogate pair, which UTF-8 lacks."""
    return isinstance(text, str) and len(text) <= MAX_ANSWER and not SURROGATE.search(text)


def brackets_nest(text: str) -> bool:
    """Whether each bracket is closed by its own kind, in order."""
    expected = []
    for character in re.findall(r"[()\[\]{}]", text):
        if character in "([{":
            expected.append({"(": ")", "[": "]", "{": "}"}[character])
        elif not expected or expected.pop() != character:
            return False
    return not expected


# ---------------------------------------------------------------------------------------------------------------------
# Letters: which option

ONE_LETTER = re.compile(r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|\{([A-Za-z])\}|([A-Za-z])\)?)[.:]?")
LETTER_AND_TEXT = re.compile(r"(?:\(([A-Za-z])\)[.:]?|([A-Za-z])(?:[.):]|,|[ ]-|(?=\n)))(\s*)(\S.*)")
TEXT_AND_LETTER = re.compile(r"(.+)[ ]\(([A-Z])\)\.?")


def letters_of(record: dict) -> str:
    """The letters that name an option: as many as there are options, all 26 where the record lists none."""
    options = record.get("options")
    return LETTERS[: len(options)] if options else LETTERS


def read_one_capital(text: str, record: dict) -> str | None:
    return text if re.fullmatch("[A-Z]", text) and text in letters_of(record) else None


def read_letter(text: str, record: dict) -> str | None:
    """One letter, or the text of one option, or both if they belong together: "B above" names nothing."""
    text = without_layout(text)
    alone = ONE_LETTER.fullmatch(text)
    if alone:
        letter = "".join(filter(None, alone.groups())).upper()
        return letter if letter in letters_of(record) else None
    by_text = option_with_text(text, record)
    if by_text is not None:
        return by_text

    both = LETTER_AND_TEXT.fullmatch(text)
    if both:
        letter, written_out = (both[1] or both[2]).upper(), both[4]
        marked = both[3] and (both[1] or text[1] in ".):")
        if not record.get("options") and marked and letter in letters_of(record):
            # Nothing to compare with; a second letter would be a second answer.
            return None if re.search(r"(?<![A-Za-z])[A-Z](?![A-Za-z])", written_out) else letter
    else:
        both = TEXT_AND_LETTER.fullmatch(text)
        if not both:
            return None
        letter, written_out = both[2], both[1]
    return letter if option_with_text(written_out, record) == letter else None


def without_layout(text: str) -> str:
    r"""\textbf{(B)}\ \text{green} -> (B) green"""
    text = re.sub(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf)\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\[ ,;]", " ", text)
    if text.count("$") % 2 == 0:
        text = text.replace("$", "")
    return text.strip(SPACE)


def option_with_text(text: str, record: dict) -> str | None:
    """The letter of the one option with this text, as `plain` compares; without the article if none has it with."""
    options = record.get("options") or []
    for comparable in (plain, without_article):
        wanted, texts = comparable(text), [comparable(option) for option in options]
        same = [letter for letter, option in zip(LETTERS, texts, strict=False) if option == wanted]
        if same and wanted:
            return same[0] if len(same) == 1 else None
    return None


def letter_accuracy(answer: str, record: dict) -> float:
    return float(answer == record["answer"])


def check_letter(record: dict) -> None:
    gold = record.get("answer")
    letters = letters_of(record)
    if not (isinstance(gold, str) and len(gold) == 1 and gold in letters):
        raise ValueError(f"answer {shown(gold)} is not one of the letters {letters[0]}-{letters[-1]}")


# ---------------------------------------------------------------------------------------------------------------------
# Digits: one whole number


NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
COUNT = re.compile(
    r"(?:position |number |no\. |#|= ?)?(?P<number>[0-9]{1,15}|[0-9]{1,3}(?:,[0-9]{3}){1,4}|[a-z]+)(?:\.0{0,9})?"
    r"(?: \((?P<again>[a-z0-9]+)\))?"
    r"(?: (?P<noun>[a-z]+(?: [a-z]+)?)| ?[\u3040-\u30ff\u4e00-\u9fff]{1,2}(?<![十百千万億亿]))??"
    r"(?: in total)?\.?",
    re.IGNORECASE | re.ASCII,
)


def read_ascii_digits(text: str, record: dict) -> int | None:
    return int(text) if re.fullmatch("[0-9]{1,15}", text) else None


def read_digit(text: str, record: dict) -> int | None:
    """A whole number, perhaps as a word or with what is counted: "1,200", "3 cars", "three (3)", "2 + 1 = 3"."""
    if "=" in text[1:]:
        # A true equation, or one with a name on the left, has its right side as its value.
        has_value = isinstance(math_answers.read(text), math_answers.Number)
        return read_ascii_digits(text.rpartition("=")[2].strip(SPACE + ".$"), record) if has_value else None
    match = COUNT.fullmatch(re.sub(r"^\((.*)\)$|^\[(.*)\]$", r"\1\2", text))
    if not match or match["noun"] and not math_answers.noun_called(match["noun"]):
        return None
    number = whole_number(match["number"])
    if match["again"] and whole_number(match["again"]) != number:
        return None
    return number


def whole_number(written: str) -> int | None:
    digits = written.replace(",", "")
    if digits.isdigit():
        return int(digits)
    return NUMBER_WORDS.index(written.lower()) if written.lower() in NUMBER_WORDS else None


def digit_accuracy(answer: int, record: dict) -> float:
    return float(answer == int(record["answer"]))


def check_digit(record: dict) -> None:
    gold = record.get("answer")
    fits = is_whole(gold) and 0 <= gold < 10**15  # before it is written: a number may have 10^5 digits
    written = str(gold) if fits or isinstance(gold, str) else ""
    if not re.fullmatch(r"[0-9]{1,15}", written):
        raise ValueError(f"answer {shown(gold)} is not a whole number of at most 15 digits, 0 or above")


# ---------------------------------------------------------------------------------------------------------------------
# Grids: an arrangement of 1 to rows * cols, row by row


MAX_PIECES = 500  # their indices and the spaces between them are MAX_ANSWER characters


def grid_size(record: dict) -> int:
    if "rows" in record and "cols" in record:
        return record["rows"] * record["cols"]
    return len(record["answer"])


def read_indices(text: str, size: int) -> list[int] | None:
    """`size` indices from 1 to `size`, in any brackets that nest, or none. They may repeat: wrong, but readable."""
    if not re.fullmatch(r"[0-9 ,;|\t\r\n\[\](){}]+", text) or not brackets_nest(text):
        return None
    numbers = re.findall(r"[0-9]+", text)
    if len(numbers) != size or any(len(number) > 6 for number in numbers):
        return None

    indices = [int(number) for number in numbers]
    in_range = all(1 <= index <= size for index in indices)
    return indices if in_range else None


GRID_LAYOUT = re.compile(
    r"\\(?:begin|end)\{[a-z]*(?:matrix|array)\}(?:\{[lcr|]*\})?|\\\\|\\left|\\right|&"  # LaTeX
    r"|\|(?=[ :|]*-)[ :|-]*\|"  # the line below a table's head
    r"|\b(?:row [0-9]+|(?:first|second|third|fourth|fifth|sixth) row):"
    r"|(?<= )/(?= )",
    re.IGNORECASE,
)


def read_grid(text: str, record: dict) -> list[int] | None:
    """As `read_indices`, and out of a LaTeX matrix, a table, or rows with their names."""
    return read_indices(GRID_LAYOUT.sub(" ", text).strip(SPACE + "."), grid_size(record))


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
    if not all(is_whole(side) and 1 <= side <= MAX_PIECES for side in sides):
        raise ValueError(f"rows and cols must be whole numbers from 1 to {MAX_PIECES}, not {shown(sides)}")
    if not isinstance(gold, list) or not gold or not all(is_whole(index) for index in gold[: MAX_PIECES + 1]):
        raise ValueError(f"answer {shown(gold)} is not a list of whole numbers")
    if len(gold) > MAX_PIECES:
        raise ValueError(f"answer {shown(gold)} has {len(gold)} indices; no reply could name more than {MAX_PIECES}")
    if not is_arrangement(gold, grid_size(record)):
        raise ValueError(f"answer {shown(gold)} is not an arrangement of 1 to {grid_size(record)}")


# ---------------------------------------------------------------------------------------------------------------------
# Boxes (x1, y1, x2, y2) and points (x, y), in pixels. The gold of both is a box.

NUMBER = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?")


MAX_COORDINATE = 10**9  # as many digits as are read
COORDINATE = re.compile(r"-?(?:[0-9]{1,9}(?:\.[0-9]{1,9})?|\.[0-9]{1,9})")
# What detectors write around their numbers, and the names of the numbers, which then must all be there
BOX_TAGS = re.compile(
    r"<\|?/?(?:box|point|box_start|box_end|point_start|point_end)\|?>"
    r"|\\left|\\right|\b(?:pyautogui\.)?click(?=\()|(?<=[0-9])px"
)
BOX_KEYS = ("bbox_2d", "bbox", "box", "box_2d", "point_2d", "point")
COORDINATE_NAMES = (["x", "y"], ["x1", "y1", "x2", "y2"], ["xmin", "ymin", "xmax", "ymax"])
NAMES_BEFORE = re.compile(r"\((?:x, ?y|x1, ?y1, ?x2, ?y2)\) ?= ?")


def read_numbers(text: str, count: int) -> list[float] | None:
    """`count` decimal numbers between commas or spaces, in brackets that nest, or none."""
    if not brackets_nest(text) or re.search(r",\s*,", text):
        return None
    numbers = [number for number in re.split(r"[\s,;()\[\]{}]+", text) if number]
    if len(numbers) != count or not all(COORDINATE.fullmatch(number) for number in numbers):
        return None
    return [float(number) for number in numbers]


def read_coordinates(text: str, count: int) -> list[float] | None:
    """As `read_numbers`, and out of JSON ({"bbox_2d": [...]}), detection tags, or names: "x=1, y=2"."""
    text = coordinates_in_json(BOX_TAGS.sub(" ", text).strip(SPACE).removesuffix("."))
    text = NAMES_BEFORE.sub("", text, count=1)
    names = re.findall(r"(?<![a-z])([a-z]{1,4}[0-9]?) ?[=:]", text)
    if names:
        if names not in COORDINATE_NAMES:
            return None
        text = re.sub(r"(?<![a-z])[a-z]{1,4}[0-9]? ?[=:]", " ", text)
    return read_numbers(text, count)


def coordinates_in_json(text: str) -> str:
    """The numbers of a JSON object, or of a list of one object, as text; other texts as they are."""
    if '"' not in text:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        return text
    found = [value[key] for key in BOX_KEYS if key in value]
    if len(found) == 1 and isinstance(found[0], list):
        return json.dumps(found[0])
    return json.dumps({key: number for key, number in value.items() if key != "label"}).replace('"', "").strip("{}")


def read_box(text: str, record: dict) -> list[float] | None:
    return read_coordinates(text, 4)


def read_point(text: str, record: dict) -> list[float] | None:
    """A point, or the centre of a box, as ScreenSpot counts it."""
    point = read_coordinates(text, 2)
    if point is not None:
        return point
    box = read_coordinates(text, 4)
    if box is None or box[2] <= box[0] or box[3] <= box[1]:
        return None
    return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]


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
        raise ValueError(f"answer {shown(gold)} is not a box of four finite numbers [x1, y1, x2, y2]")
    if not all(abs(side) < MAX_COORDINATE for side in gold):
        raise ValueError(f"answer {shown(gold)} has a side of 10^9 or more, which no reply can name")
    if gold[2] <= gold[0] or gold[3] <= gold[1]:
        raise ValueError(f"answer {shown(gold)} is a box without area: x2 must be above x1 and y2 above y1")


def is_finite(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


# ---------------------------------------------------------------------------------------------------------------------
# Texts: one line, equal to an accepted one. The gold is a text or a list of them.


MAX_TEXTS = 100  # a reply is compared with each


def plain(text: object) -> str:
    """Text as it is compared: case, runs of white space, closing full stops, the form of quotes do not matter."""
    text = unicodedata.normalize("NFKC", str(text)).replace("’", "'").replace("−", "-")
    return " ".join(text.casefold().split()).rstrip(" .。")


def without_article(text: object) -> str:
    """As `plain`, without an article in front and an exclamation mark behind."""
    return re.sub(r"^(?:- )?(?:(?:the|an|a) )?(?=.)", "", plain(text).rstrip("!"))


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
        accepted |= {without_article(text), without_article(unwrap(fold(text)))}
    said = {without_article(answer), without_article(stated(answer) or answer)}
    return float(bool(said & accepted))


def check_text(record: dict) -> None:
    gold = record.get("answer")
    texts = accepted_texts(gold)
    if not 1 <= len(texts) <= MAX_TEXTS or not all(is_writable(text) and plain(text) for text in texts):
        raise ValueError(
            f"answer {shown(gold)} is not a text, or a list of 1 to {MAX_TEXTS} accepted texts, none empty and each "
            f"of at most {MAX_ANSWER} characters"
        )
    # The grammar must be able to read the gold itself, otherwise no reply could ever be right.
    for text in texts:
        stripped = text.strip(SPACE)
        if read_text(stripped, record) is None:
            raise ValueError(f"answer {shown(gold)} is not one line without reply tags")


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics: an expression, a set, an interval … of the same value. How it is read: math_answers.py


def read_math(text: str, record: dict) -> str | None:
    """The text itself if it can be read as an answer to this gold, else None."""
    return text if math_answers.read_reply(math_gold(record), text) else None


def math_gold(record: dict) -> str:
    return unwrap(fold(str(record["answer"])))


def math_accuracy(answer: str, record: dict) -> float:
    return float(math_answers.same_answer(math_gold(record), answer))


def check_math(record: dict) -> None:
    gold = record.get("answer")
    readable = is_writable(gold) or is_finite(gold)
    if not readable or math_answers.read(math_gold(record)) is None:
        raise ValueError(f"answer {shown(gold)} cannot be read as mathematics with a finite value")


# ---------------------------------------------------------------------------------------------------------------------
# The table of answer types

ANSWER_TYPES = {
    "letter": AnswerType(
        grammar='one letter: "B", "(B)", "B.", "b", or its option, or both: "below", "B. below", "below (B)" -> "B"',
        read=read_letter,
        read_bare=read_one_capital,
        accuracy=letter_accuracy,
        check=check_letter,
    ),
    "digit": AnswerType(
        grammar='a whole number of at most 15 digits: "12", "12.", "twelve", "12 cars", "7 + 5 = 12" -> 12',
        read=read_digit,
        read_bare=read_ascii_digits,
        accuracy=digit_accuracy,
        check=check_digit,
        computes=True,  # "7 + 5 = 12" must be true
    ),
    "grid": AnswerType(
        grammar='rows * cols indices from 1: "2 1 4 3", "2,1,4,3", "[[2, 1], [4, 3]]", "2 1; 4 3" -> [2, 1, 4, 3]',
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
        grammar='x, y, or a box with that centre: "10, 20.5", "(10, 20.5)", "[5, 20, 15, 21]" -> [10.0, 20.5]',
        read=read_point,
        accuracy=point_accuracy,
        check=check_box,
    ),
    "math": AnswerType(
        grammar=r'mathematics with a finite value, as text: "0.5", "x = 5", "\frac{\sqrt{3}}{2}", "(1, 2)", "5 cm"',
        read=read_math,
        accuracy=math_accuracy,
        check=check_math,
        computes=True,
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
# Other rewards for the same answer. They are what is learned from; accuracy stays what is reported.
#
# Each takes (answer, record, progress) and gives a number in [0, 1]. progress is step / steps of the run, in [0, 1): a
# reward that changes over training is a function of it alone, so a resumed run goes on as if unbroken.

GRADED_DISCOUNT = 0.2
IOU_FOUND = 0.5
# (from this progress on, smallest IoU that counts): the first 10 % of the steps, the next 15 %, and the rest (V-Triune,
# section 3.4). Its public code counts steps from 1 and changes after step / steps = 0.1: at the same step as here, or
# one earlier where a tenth of the steps is no whole number.
IOU_RISES = ((0.0, 0.85), (0.1, 0.95), (0.25, 0.99))


def plain_accuracy(answer: Answer, record: dict, progress: float = 0.0) -> float:
    """The accuracy of the answer type. Grids: the share of right indices; boxes: IoU (Jigsaw-R1, section 3)."""
    return type_of(record).accuracy(answer, record)


def grid_exact(answer: list[int], record: dict, progress: float = 0.0) -> float:
    """1 if every index is right, else 0."""
    return float(answer == record["answer"])


def grid_graded(answer: list[int], record: dict, progress: float = 0.0) -> float:
    """1 if every index is right, else 0.2 x the share of right ones, of a permutation (Visual Jigsaw, 2509.25190)."""
    share = grid_accuracy(answer, record)
    return share if share == 1 else GRADED_DISCOUNT * share


def grid_neighbours(answer: list[int], record: dict, progress: float = 0.0) -> float:
    """The share of neighbouring pieces that the answer puts beside each other in the same way.

    Two pieces are neighbours if one stands directly to the right of, or below, the other in the original picture: rows
    x (cols - 1) + (rows - 1) x cols pairs. A pair is right if the same piece stands on the same side of the same other
    one in the picture that the answer makes, wherever that is: a row that is right but one place off keeps its pairs.
    0 for what is no permutation. Without rows and cols the pieces stand in one row. (Jigsaw-R1, section 3: "full may
    also be scored by correct neighbour connections".)
    """
    gold = record["answer"]
    if not is_arrangement(answer, len(gold)):
        return 0.0
    cols = record["cols"] if "rows" in record and "cols" in record else len(gold)
    right_pairs = connections(gold, record, cols)
    if not right_pairs:
        return float(answer == gold)  # a single piece
    return len(right_pairs & connections(answer, record, cols)) / len(right_pairs)


def connections(indices: list[int], record: dict, cols: int) -> set[tuple[int, int, str]]:
    """{(piece, the piece beside it, "right" or "below")} of the picture that an answer makes."""
    # Index x of `full` is the place of piece x; of `inverse`, the piece at place x.
    pieces = list(indices)
    if record.get("question") != "inverse":
        for piece, place in enumerate(indices, 1):
            pieces[place - 1] = piece

    found = set()
    for place, piece in enumerate(pieces):
        if (place + 1) % cols:
            found.add((piece, pieces[place + 1], "right"))
        if place + cols < len(pieces):
            found.add((piece, pieces[place + cols], "below"))
    return found


def box_found(answer: list[float], record: dict, progress: float = 0.0) -> float:
    """1 from an IoU of 0.5 on, the usual threshold for a found object, else 0."""
    return float(iou(answer, record["answer"]) >= IOU_FOUND)


def box_rising(answer: list[float], record: dict, progress: float = 0.0) -> float:
    """The IoU if it is at or above a threshold that rises over training, else 0 (V-Triune, 2505.18129, equation 5)."""
    threshold = max(smallest for start, smallest in IOU_RISES if progress >= start)
    overlap = iou(answer, record["answer"])
    return overlap if overlap >= threshold else 0.0


def box_centre(answer: list[float], record: dict, progress: float = 0.0) -> float:
    """1 if the centre of the box lies in the gold box, borders included, else 0: point in box. 0 without area."""
    x1, y1, x2, y2 = answer
    if x2 <= x1 or y2 <= y1:
        return 0.0
    return point_accuracy([(x1 + x2) / 2, (y1 + y2) / 2], record)


# answer type -> name -> reward. The first is what is used unless another is chosen; a type without an entry has one.
REWARDS = {
    "grid": {
        "fraction": plain_accuracy,
        "exact": grid_exact,
        "neighbours": grid_neighbours,
        "graded": grid_graded,
    },
    "box": {
        "iou": plain_accuracy,
        "found": box_found,
        "rising": box_rising,
        "centre": box_centre,
    },
}


def chosen_rewards(choices: list[str]) -> dict[str, str]:
    """["grid=graded", "box=iou"] -> {"grid": "graded", "box": "iou"}. ValueError for anything else."""
    chosen = {}
    for choice in choices:
        kind, _, name = choice.partition("=")
        if kind not in REWARDS:
            raise ValueError(f"{choice}: there is a choice of rewards for {' and '.join(REWARDS)} only")
        if name not in REWARDS[kind]:
            raise ValueError(f"{choice}: the rewards for {kind} are {', '.join(REWARDS[kind])}")
        if kind in chosen:
            raise ValueError(f"{choice}: {kind} has a reward already")
        chosen[kind] = name
    return chosen


# ---------------------------------------------------------------------------------------------------------------------
# The reward


def read_answer(text: str, record: dict, wrapped: bool | None = None) -> Answer | None:
    r"""Reads one answer by the strict grammar of the record's answer type. None if the whole text does not match.

    wrapped: whether a frame (\boxed{B}, $B$), a lead ("The answer is B") or a plain sentence may stand around it, and
    the answer in any usual spelling. Default: as the format says (ReplyFormat.answer_may_be_wrapped).
    """
    if wrapped is None:
        wrapped = format_called(reply_format(record)).answer_may_be_wrapped
    kind = type_of(record)
    text = text.strip(SPACE)
    if len(text) > MAX_ANSWER:
        return None
    if not wrapped:
        return (kind.read_bare or kind.read)(text, record)

    folded = fold(text)
    if len(folded) > MAX_ANSWER:
        return None  # one character may become eighteen
    text = unwrap(folded)
    answer = kind.read(text, record)
    if answer is None:
        statement = stated(text)
        answer = kind.read(statement, record) if statement else None
    return answer


def accuracy(answer: Answer, record: dict) -> float:
    """How right a parsed answer is, in [0, 1]. `answer` comes from `read_answer` or `judge.find_answer`."""
    return type_of(record).accuracy(answer, record)


def is_right(answer: Answer, record: dict) -> bool:
    """Whether a parsed answer counts as right where that is a yes or no: for most types if nothing in it is wrong."""
    return accuracy(answer, record) >= type_of(record).right_from


def score(
    reply: str,
    record: dict,
    accuracy_weight: float = 1.0,
    format_weight: float = 0.5,
    chosen: dict[str, str] | None = None,
    progress: float = 0.0,
) -> dict[str, Any]:
    """Reward of one reply.

    chosen: {answer type: name in REWARDS} of what the reward takes in place of the accuracy, at this progress of the
    run. Returns {"reward", "accuracy" in [0, 1], "format" 0.0 or 1.0, "answer": the parsed answer or None}. Never
    raises for any text; the record is one that `check_gold` let pass.
    """
    answer = None
    parts = read_reply(reply, reply_format(record))
    if parts is not None:
        _, answer_text = parts
        answer = read_answer(answer_text, record)

    well_formed = 0.0 if answer is None else 1.0
    right = 0.0 if answer is None else accuracy(answer, record)
    earned = right
    name = (chosen or {}).get(record["answer_type"])
    if name is not None and answer is not None:
        earned = REWARDS[record["answer_type"]][name](answer, record, progress)
    return {
        "reward": accuracy_weight * earned + format_weight * well_formed,
        "accuracy": right,
        "format": well_formed,
        "answer": answer,
    }


def check_options(record: dict) -> None:
    """Of a record of any type: judge.py and claims.py look for the options in all of them."""
    options = record.get("options")
    if options is None:
        return
    listed = isinstance(options, list) and 1 <= len(options) <= 26
    if not listed or not all(is_writable(option) or is_finite(option) for option in options):
        raise ValueError(
            f"options must be a list of 1 to 26 texts of at most {MAX_ANSWER} characters, not {shown(options)}"
        )


def check_gold(record: dict) -> None:
    """Raises ValueError with a one-line cause if replies to this record cannot be scored. Call it before training."""
    # A record comes from a file, so its type may be anything, a list too, which no dict can be asked for.
    type_name, format_name = record.get("answer_type"), record.get("reply_format")
    if not isinstance(type_name, str) or type_name not in ANSWER_TYPES:
        raise ValueError(f"answer_type {shown(type_name)} is unknown (known: {', '.join(ANSWER_TYPES)})")
    if is_template(format_name):
        format_called(format_name)
    elif format_name is not None and not (isinstance(format_name, str) and format_name in REPLY_FORMATS):
        raise ValueError(f"reply_format {shown(format_name)} is unknown (known: {', '.join(REPLY_FORMATS)})")
    check_options(record)
    ANSWER_TYPES[type_name].check(record)
