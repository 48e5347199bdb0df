"""Verifiable rewards: reads a reply strictly in the format its prompt asks for, and compares its answer with the gold.

    reward = accuracy_weight * accuracy + format_weight * format

format    1.0 if the reply has exactly the asked structure *and* an answer can be read from its place, else 0.0
accuracy  letter, digit, text, math: 0 or 1; grid: share of right indices of a permutation; box: IoU;
          point: 1 inside the gold box. It counts only where format is 1: an answer outside its place is no answer, and
          there is no second, more lenient look.

Reading is a full match against a small grammar, never a search: "A or B" is not an A with something behind it, it is no
letter at all. Nothing here evaluates model output, and every reading takes time linear in the reply.

Sources: SPECS (arXiv 2510.25801) for the shape of a reply and the weights 1.0 and 0.5; Jigsaw-R1 (arXiv 2505.23590) for
letters, digits, grids and boxes. Where the public code of Jigsaw-R1 is looser than its paper (the whole reply counts as
the answer when a tag is missing, the last capital letter counts, repeated indices get partial credit) this file follows
the paper.

`find_answer` and `contradicts` are the two lenient readers. They only help to build pairs and never earn a reward.
"""

import json
import logging
import math
import re
import threading
from functools import lru_cache

REPLY_FORMATS = ("think", "bare", "tags", "boxed", "json", "line")
ANSWER_TYPES = ("letter", "digit", "grid", "box", "point", "math", "text")

MAX_REPLY = 100_000  # characters; a longer reply is not read at all
MAX_ANSWER = 2_000  # characters of an answer of any type
MAX_MATH = 200  # characters of a mathematical answer: what a computer algebra system is allowed to see
MATH_SECONDS = 3  # per comparison, where a timeout is possible (main thread)

SPACE = " \t\r\n"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# "The answer is", "Final answer:", "Option" in front of an answer. re.ASCII: only letters that are ASCII themselves.
LEAD = re.compile(
    r"(?:(?:the|my)[ ])?(?:(?:final|correct)[ ])?(?:answer|option)(?:[ ]is)?:?[ ]", re.IGNORECASE | re.ASCII
)
LETTER = re.compile(r"(?:\(([A-Z])\)\.?|([A-Z])[.):]?)(?:[ ]+(.+))?")
NUMBER = re.compile(r"-?[0-9]{1,9}(?:\.[0-9]{1,9})?")
TAG = re.compile(r"</?(?:think|answer|reason|result)>")


# ---------------------------------------------------------------- the reward


def score(reply: str, record: dict, accuracy_weight: float = 1.0, format_weight: float = 0.5) -> dict:
    """Reward of one reply.

    Returns {"reward", "accuracy" in [0, 1], "format" 0.0 or 1.0, "answer": the parsed answer or None}. Never raises for
    any text; the record is one that `check_gold` let pass.
    """
    parts = read_reply(reply, reply_format(record))
    answer = None if parts is None else read_answer(parts[1], record)
    well_formed = 0.0 if answer is None else 1.0
    right = 0.0 if answer is None else accuracy(answer, record)
    return {
        "reward": accuracy_weight * right + format_weight * well_formed,
        "accuracy": right,
        "format": well_formed,
        "answer": answer,
    }


def accuracy(answer, record: dict) -> float:
    """How right a parsed answer is, in [0, 1]. `answer` comes from `read_answer` or `find_answer`."""
    kind, gold = record["answer_type"], record["answer"]
    if kind == "letter":
        return float(answer == gold)
    if kind == "digit":
        return float(answer == int(gold))
    if kind == "grid":
        if len(answer) != len(gold) or sorted(answer) != list(range(1, len(gold) + 1)):
            return 0.0  # a repeated index places one patch twice: that is no arrangement, so no part of it counts
        return sum(a == g for a, g in zip(answer, gold, strict=True)) / len(gold)
    if kind == "box":
        return iou(answer, gold)
    if kind == "point":
        return float(gold[0] <= answer[0] <= gold[2] and gold[1] <= answer[1] <= gold[3])
    if kind == "text":
        # Reading may have taken a lead off ("option a" -> "a"), so the gold text counts with and without its own.
        return float(plain(answer) in {plain(form) for text in accepted_texts(gold) for form in (text, unwrap(text))})
    if kind == "math":
        return float(same_math(str(gold), answer))
    raise ValueError(f"unknown answer_type {kind!r}")


def iou(box, gold) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); a box without area gives 0."""
    width = min(box[2], gold[2]) - max(box[0], gold[0])
    height = min(box[3], gold[3]) - max(box[1], gold[1])
    if width <= 0 or height <= 0 or box[2] <= box[0] or box[3] <= box[1]:
        return 0.0
    both = width * height
    area = (box[2] - box[0]) * (box[3] - box[1])
    gold_area = (gold[2] - gold[0]) * (gold[3] - gold[1])
    return both / (area + gold_area - both)


# ---------------------------------------------------------------- the structure of a reply


def reply_format(record: dict) -> str:
    """The format the prompt asks for: the record's `reply_format`, otherwise `think` or `bare` as its `think` says."""
    return record.get("reply_format") or ("think" if record.get("think") else "bare")


def read_reply(reply: str, fmt: str) -> tuple[str, str] | None:
    r"""Splits a reply into (reason, answer text), or None if it does not have exactly the structure of `fmt`.

    think   <think>R</think><answer>A</answer>, each tag once, only white space around the blocks, neither empty
    bare    A (reason is "")
    tags    <reason>R</reason><result>A</result>, as strict as think
    boxed   R, then \boxed{A} as the very end, in $...$ and with a full stop or not; \boxed once; R may be empty
    json    {"reason": R, "answer": A} and nothing else; R is text, A is text, a number, or a list of those
    line    R, then the last line "Answer: A"; "Answer:" occurs once
    """
    if len(reply) > MAX_REPLY:
        return None
    reply = reply.strip(SPACE)
    if fmt == "think":
        parts = read_blocks(reply, "think", "answer")
    elif fmt == "tags":
        parts = read_blocks(reply, "reason", "result")
    elif fmt == "boxed":
        parts = read_boxed(reply)
    elif fmt == "json":
        parts = read_json(reply)
    elif fmt == "line":
        parts = read_line(reply)
    elif fmt == "bare":
        parts = ("", reply)
    else:
        raise ValueError(f"unknown reply_format {fmt!r}")
    if parts is None:
        return None
    reason, answer = parts[0].strip(SPACE), parts[1].strip(SPACE)
    if not answer or (not reason and fmt not in ("bare", "boxed")):
        return None
    return reason, answer


def read_blocks(reply: str, first: str, second: str) -> tuple[str, str] | None:
    """Reads <first>R</first><second>A</second>. Counting the tags rules out nested, repeated and unclosed ones."""
    tags = [f"<{first}>", f"</{first}>", f"<{second}>", f"</{second}>"]
    if any(reply.count(tag) != 1 for tag in tags) or not reply.startswith(tags[0]) or not reply.endswith(tags[3]):
        return None
    reason_end, answer_start = reply.find(tags[1]), reply.find(tags[2])
    if reason_end > answer_start or reply[reason_end + len(tags[1]) : answer_start].strip(SPACE):
        return None
    return reply[len(tags[0]) : reason_end], reply[answer_start + len(tags[2]) : -len(tags[3])]


def read_boxed(reply: str) -> tuple[str, str] | None:
    start = reply.find("\\boxed{")
    if start < 0 or reply.count("\\boxed") != 1:
        return None
    end = closing_brace(reply, start + len("\\boxed"))
    if end is None or reply[end + 1 :] not in ("", ".", "$", "$.", ".$"):
        return None
    reason = reply[:start]
    if ("$" in reply[end + 1 :]) != reason.endswith("$"):
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
    if not (reply.startswith("{") and reply.endswith("}")):
        return None

    def refuse_duplicates(pairs):
        if len(dict(pairs)) != len(pairs):
            raise ValueError("a key twice")
        return dict(pairs)

    def refuse_constant(name):
        raise ValueError(name)  # NaN and Infinity are not JSON

    try:  # ValueError: not JSON, or an integer of thousands of digits; RecursionError: brackets nested without end
        value = json.loads(reply, object_pairs_hook=refuse_duplicates, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return None
    if set(value) != {"reason", "answer"} or not isinstance(value["reason"], str):
        return None
    answer = value["answer"]
    if answer is None or isinstance(answer, bool | dict):
        return None
    try:
        return value["reason"], answer if isinstance(answer, str) else json.dumps(answer, allow_nan=False)
    except (ValueError, RecursionError):  # 1e999 is JSON, and infinite
        return None


def read_line(reply: str) -> tuple[str, str] | None:
    reason, _, last = reply.rpartition("\n")
    if reply.count("Answer:") != 1 or not last.startswith("Answer: "):
        return None
    return reason, last[len("Answer: ") :]


# ---------------------------------------------------------------- the answer


def read_answer(text: str, record: dict, wrapped: bool | None = None):
    r"""Reads one answer by the strict grammar of the record's answer type. None if the whole text does not match.

    letter "B", "(B)", "B.", "B)", "B: above" where "above" is exactly option B -> "B"    digit "12" -> 12
    grid   "2 1\n4 3", "[[2, 1], [4, 3]]" -> [2, 1, 4, 3]     box, point "10, 20, 30.5, 40" -> [10.0, 20.0, 30.5, 40.0]
    text   one line, as it stands                             math what math-verify can parse, as text

    `wrapped`: whether a lead ("The answer is B") and a frame (\boxed{B}, $B$) may stand around it. Default: yes in
    every format but `bare`, where the prompt asks for the answer and nothing else.
    """
    if wrapped is None:
        wrapped = reply_format(record) != "bare"
    text = text.strip(SPACE)
    if len(text) > MAX_ANSWER:
        return None
    if wrapped:
        text = unwrap(text)
    kind = record["answer_type"]
    if kind == "letter":
        return read_letter(text, record.get("options"))
    if kind == "digit":
        match = re.fullmatch(r"([0-9]{1,15})\.?", text)
        return int(match.group(1)) if match else None
    if kind == "grid":
        return read_grid(text, grid_size(record))
    if kind in ("box", "point"):
        return read_numbers(text, 4 if kind == "box" else 2)
    if kind == "text":
        return text if text and "\n" not in text and not TAG.search(text) and "\\boxed" not in text else None
    if kind == "math":
        return read_math(text)
    raise ValueError(f"unknown answer_type {kind!r}")


def unwrap(text: str) -> str:
    r"""Takes off, in this order, each at most once: a lead, the full stop behind a frame, $...$, \boxed{...}, $...$."""
    lead = LEAD.match(text)
    if lead:
        text = text[lead.end() :].strip(SPACE)
    if text.endswith(("}.", "$.")):
        text = text[:-1]
    text = undollar(text)
    if text.startswith("\\boxed{") and closing_brace(text, len("\\boxed")) == len(text) - 1:
        text = undollar(text[len("\\boxed{") : -1].strip(SPACE))
    return text


def undollar(text: str) -> str:
    return text[1:-1].strip(SPACE) if len(text) > 2 and text[0] == text[-1] == "$" and text.count("$") == 2 else text


def read_letter(text: str, options: list | None) -> str | None:
    match = LETTER.fullmatch(text)
    if not match:
        return None
    letter, rest = match.group(1) or match.group(2), match.group(3)
    if letter not in LETTERS[: len(options) if options else 26]:
        return None
    if rest is not None:  # "B. above" is option B written out; "B above", "B. below" and "B or C" are not
        marked = text[0] == "(" or text[1] in ".):"
        option = str(options[LETTERS.index(letter)]).strip(SPACE) if options else ""
        if not marked or not option or rest not in (option, f"{option}."):
            return None
    return letter


def read_grid(text: str, size: int) -> list[int] | None:
    if (
        not re.fullmatch(r"[0-9 ,\t\r\n\[\]()]+", text)
        or text.count("[") != text.count("]")
        or text.count("(") != text.count(")")
    ):
        return None
    numbers = re.findall(r"[0-9]+", text)
    if len(numbers) != size or any(len(number) > 6 for number in numbers):
        return None
    grid = [int(number) for number in numbers]
    return grid if all(1 <= index <= size for index in grid) else None


def read_numbers(text: str, count: int) -> list[float] | None:
    """`count` decimal numbers between commas or spaces, in one pair of brackets or none."""
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    numbers = re.split(r"[ \t\r\n]*,[ \t\r\n]*|[ \t\r\n]+", text.strip(SPACE))
    if len(numbers) != count or not all(NUMBER.fullmatch(number) for number in numbers):
        return None
    return [float(number) for number in numbers]


def grid_size(record: dict) -> int:
    return record["rows"] * record["cols"] if "rows" in record and "cols" in record else len(record["answer"])


def plain(text: str) -> str:
    """Text as it is compared: case, runs of white space and a closing full stop do not matter."""
    return " ".join(str(text).casefold().split()).removesuffix(".").rstrip()


def accepted_texts(gold) -> list:
    return gold if isinstance(gold, list) else [gold]


# ---------------------------------------------------------------- mathematics

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
EXPONENT = re.compile(
    r"\^(?:([0-9]{1,3})(?![0-9.])|([A-Za-z]|\\circ|\\degree)|\{([^{}^]{1,20})\}"
    r"|\{(-?\\[dt]?frac\{[0-9]{1,3}\}\{[0-9]{1,3}\})\})"
)


def read_math(text: str) -> str | None:
    """The expression as text if math-verify can parse it, else None."""
    text = text.removesuffix(".")
    return text if parse_math(text) else None


def same_math(gold: str, answer: str) -> bool:
    """Whether two expressions are equal in value (math-verify), or, last, the same text but for spaces."""
    if "".join(unwrap(gold).split()) == "".join(answer.split()):
        return True
    from math_verify import verify

    return bool(verify(parse_math(unwrap(gold)), parse_math(answer), timeout_seconds=math_seconds()))


@lru_cache(maxsize=4096)  # the gold answer meets every reply of its group
def parse_math(text: str) -> list:
    """[one sympy expression] or []. The whole text is the expression: nothing is searched for inside it."""
    if not harmless_math(text):
        return []
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


def math_seconds() -> int | None:
    """math-verify's timeout is a signal, which only the main thread can have. Elsewhere `harmless_math` must do."""
    return MATH_SECONDS if threading.current_thread() is threading.main_thread() else None


def harmless_math(text: str) -> bool:
    """True if the text is short, names one value, and cannot make a computer algebra system run for long."""
    if len(text) > MAX_MATH or not MATH_TEXT.fullmatch(text) or "**" in text or "--" in text or MATH_HEDGE.search(text):
        return False
    for part in text.split(","):
        left, equals, right = part.partition("=")
        if equals and ("=" in right or not re.search(r"[A-Za-z]", left)):
            return False  # "x = 5" is one value; "4 = 5" and "4 = x = 5" are several, and math-verify takes the last
    if any(name not in MATH_COMMANDS for name in re.findall(r"\\([A-Za-z]+)", text)):
        return False
    if any(len(number) > 30 for number in re.findall(r"[0-9]+", text)):
        return False
    if re.search(r"\{ *\}", text):
        return False  # math-verify drops an empty \text{}, which would join two numbers to a long one
    if "!" in text and ("^" in text or text.count("!") != len(re.findall(r"(?<![0-9])[0-9]{1,2}!(?!!)", text))):
        return False
    powers = list(EXPONENT.finditer(text))
    if len(powers) != text.count("^"):
        return False  # an exponent that is long, or has an exponent itself
    size, expansion = 1, 1  # sizes of the largest number, and of the largest power of a sum, that could be written out
    for power in powers:
        exponent = math.prod(max(1, int(number)) for number in re.findall(r"[0-9]+", power.group()))
        size *= exponent
        expansion *= exponent if text[: power.start()].rstrip().endswith((")", "]", "}", "|")) else 1
    variables = len(set(re.findall(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text))))
    return size <= 1000 and expansion <= (1000 if variables == 0 else 60 if variables <= 2 else 5)


# ---------------------------------------------------------------- checking records


def check_gold(record: dict) -> None:
    """Raises ValueError with a one-line cause if replies to this record cannot be scored. Call it before training."""
    kind, gold, fmt = record.get("answer_type"), record.get("answer"), record.get("reply_format")
    if kind not in ANSWER_TYPES:
        raise ValueError(f"answer_type {kind!r} is unknown (known: {', '.join(ANSWER_TYPES)})")
    if fmt is not None and fmt not in REPLY_FORMATS:
        raise ValueError(f"reply_format {fmt!r} is unknown (known: {', '.join(REPLY_FORMATS)})")
    if kind == "letter":
        options = record.get("options")
        if options is not None and not (isinstance(options, list) and 1 <= len(options) <= 26):
            raise ValueError(f"options must be a list of 1 to 26, not {options!r:.80}")
        letters = LETTERS[: len(options) if options else 26]
        if not (isinstance(gold, str) and len(gold) == 1 and gold in letters):
            raise ValueError(f"answer {gold!r:.80} is not one of the letters {letters[0]}-{letters[-1]}")
    elif kind == "digit":
        if isinstance(gold, bool) or not re.fullmatch(r"[0-9]{1,15}", str(gold) if isinstance(gold, int | str) else ""):
            raise ValueError(f"answer {gold!r:.80} is not a whole number of at most 15 digits, 0 or above")
    elif kind == "grid":
        sides = [record[side] for side in ("rows", "cols") if side in record]
        if not all(isinstance(side, int) and not isinstance(side, bool) and side >= 1 for side in sides):
            raise ValueError(f"rows and cols must be whole numbers from 1, not {sides!r:.80}")
        if (
            not isinstance(gold, list)
            or not gold
            or any(isinstance(index, bool) or not isinstance(index, int) for index in gold)
        ):
            raise ValueError(f"answer {gold!r:.80} is not a list of whole numbers")
        if sorted(gold) != list(range(1, grid_size(record) + 1)):
            raise ValueError(f"answer {gold!r:.80} is not an arrangement of 1 to {grid_size(record)}")
    elif kind in ("box", "point"):
        numeric = isinstance(gold, list) and len(gold) == 4
        if not numeric or any(
            isinstance(side, bool) or not isinstance(side, int | float) or not math.isfinite(side) for side in gold
        ):
            raise ValueError(f"answer {gold!r:.80} is not a box of four finite numbers [x1, y1, x2, y2]")
        if gold[2] <= gold[0] or gold[3] <= gold[1]:
            raise ValueError(f"answer {gold!r:.80} is a box without area: x2 must be above x1 and y2 above y1")
    elif kind == "text":
        texts = accepted_texts(gold)
        if not texts or any(not isinstance(text, str) or not plain(text) for text in texts):
            raise ValueError(f"answer {gold!r:.80} is not a text, or a list of accepted texts, none empty")
        # The grammar must be able to read the gold itself, otherwise no reply could ever be right.
        if any(read_answer(text, record, wrapped=False) is None for text in texts):
            raise ValueError(
                f"answer {gold!r:.80} is not one line of at most {MAX_ANSWER} characters without reply tags"
            )
    elif kind == "math":
        if (
            isinstance(gold, bool)
            or not isinstance(gold, str | int | float)
            or not parse_math(unwrap(str(gold).strip(SPACE)))
        ):
            raise ValueError(f"answer {gold!r:.80} cannot be read as mathematics")


# ---------------------------------------------------------------- lenient readers, for building pairs only


def find_answer(reply: str, record: dict):
    r"""The answer a reader would take from a reply that may be malformed, or None. It filters pairs, it is no reward.

    Places, in this order: the asked format; <answer> blocks; what follows the last "Answer:" or "<answer>"; \boxed{};
    the other formats; what follows </think>; the last line; its last sentence. The first kind of place where anything
    can be read decides, and two different answers at places of one kind are None. Each piece is read by the grammar of
    `read_answer`.
    """
    if len(reply) > MAX_REPLY:
        return None
    asked = read_reply(reply, reply_format(record))
    others = [read_reply(reply, fmt) for fmt in REPLY_FORMATS]
    last_line = [TAG.sub("", line) for line in reply.split("\n") if line.strip(SPACE)][-1:]
    for places in (
        [asked[1]] if asked else [],
        [block.partition("</answer>")[0] for block in reply.split("<answer>")[1:][-10:] if "</answer>" in block],
        [before_tag(reply.rpartition(mark)[2]) for mark in ("Answer:", "<answer>") if mark in reply],
        boxes(reply),
        [parts[1] for parts in others if parts],
        [reply.rpartition("</think>")[2]] if "</think>" in reply else [],
        last_line,
        [re.split(r"[.!?] +", line)[-1] for line in last_line],
    ):
        answers = []
        for piece in places:
            # A model that goes on talking after its answer: the first line alone is the second try.
            answer = read_answer(piece, record, wrapped=True)
            if answer is None:
                answer = read_answer(piece.strip(SPACE).split("\n")[0], record, wrapped=True)
            if answer is not None and answer not in answers:
                answers.append(answer)
        if answers:
            return answers[0] if len(answers) == 1 else None
    return None


def before_tag(text: str) -> str:
    r"""Text up to the first reply tag: "B</think>" -> "B"."""
    return TAG.split(text, maxsplit=1)[0]


def boxes(reply: str) -> list[str]:
    r"""Contents of the \boxed{} of a reply, at most the last ten (so that time stays linear)."""
    starts = [match.end() - 1 for match in re.finditer(r"\\boxed\{", reply)][-10:]
    ends = [closing_brace(reply, start) for start in starts]
    return [reply[start + 1 : end] for start, end in zip(starts, ends, strict=True) if end is not None]


CONCLUSION = re.compile(r"\b(?:so|therefore|thus|hence|answer)\b|=", re.IGNORECASE | re.ASCII)
NEGATED = re.compile(r"(?:\bnot|n't)\s+(?:\w+\s+){0,2}$", re.IGNORECASE)


def contradicts(reason: str, answer, record: dict) -> bool:
    """Whether the reasoning ends in another answer than the one given. Rules, so it says True only in plain cases.

    It looks at what follows the last conclusion word of the last sentence (so, therefore, thus, hence, answer, =), then
    at the last sentence, then at the last two. The first of them that holds evidence decides, and evidence for more
    than one answer is no evidence.
    letter       an option's letter standing alone, and, separately, an option's text as whole words (the longest first:
                 "above and left" is not "above"); an option within three words after "not" does not count
    digit, math  (plain numbers) the number after a conclusion word
    grid         the arrangement after a conclusion word
    Other types never contradict.
    """
    kind = record["answer_type"]
    tail = reason[-1000:]  # the rules below may be quadratic
    sentences = [sentence for sentence in re.split(r"(?<=[.!?;])\s+|\n+", tail) if sentence.strip()]
    if not sentences or answer is None:
        return False
    last, last_two = sentences[-1], " ".join(sentences[-2:])
    if kind == "letter":
        conclusion = CONCLUSION.split(last)[-1]
        letters = LETTERS[: len(record["options"]) if record.get("options") else 26]
        for find in (letters_in, options_in):
            for text in (conclusion, last, last_two):
                found = find(text, letters, record.get("options") or [])
                if found:
                    if len(found) == 1 and found != {answer}:
                        return True
                    break
        return False
    text = tail if kind == "grid" else last_two  # a grid may be written in rows, one a line
    if not CONCLUSION.search(text):
        return False
    conclusion = CONCLUSION.split(text)[-1]
    if kind == "grid":
        grid = read_grid(conclusion.strip(SPACE + ".:").removeprefix("is").lstrip(SPACE + ":"), len(answer))
        return grid is not None and grid != answer
    if kind == "digit" or (kind == "math" and NUMBER.fullmatch(answer)):
        numbers = {float(number) for number in NUMBER.findall(conclusion)}
        return len(numbers) == 1 and numbers != {float(answer)}
    return False


def letters_in(text: str, letters: str, options: list) -> set[str]:
    """Option letters that stand alone. "A" before a lower-case word is the article, unless "option" announces it."""
    found = set()
    for match in re.finditer(r"(?<![A-Za-z0-9'])[A-Z](?![A-Za-z0-9'])", text):
        before, after = text[: match.start()], text[match.end() :]
        article = (
            match.group() in "AI"
            and re.match(r" +[a-z]", after)
            and not re.search(r"(?:option|choice|letter|answer|answer is) $", before)
        )
        if match.group() in letters and not article and not NEGATED.search(before):
            found.add(match.group())
    return found


def options_in(text: str, letters: str, options: list) -> set[str]:
    """Letters of the options whose text occurs as whole words; a longer option hides the shorter ones inside it."""
    texts = {plain(option): letter for option, letter in zip(options, letters, strict=True) if plain(option)}
    if not texts:
        return set()
    longest_first = "|".join(re.escape(option) for option in sorted(texts, key=len, reverse=True))
    folded = " ".join(text.casefold().split())
    matches = re.finditer(rf"(?<!\w)(?:{longest_first})(?!\w)", folded)
    return {texts[match.group()] for match in matches if not NEGATED.search(folded[: match.start()])}
