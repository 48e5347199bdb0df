r"""Replies: the formats a prompt may ask for, and what may stand around an answer in its place.

    read_reply("<think>R</think><answer>B</answer>", "think")     ("R", "B")
    unwrap("The answer is \\boxed{B}.")                           "B"

A format that is extended is one entry of REPLY_FORMATS; one that only a data set needs is a template in its records.
Reading a shape is a full match, never a search, and takes linear time. What an answer means is rewards.py's business;
nothing here knows a type of answer.

Legend
reply     the whole text a model wrote; a reply format splits it into a reason and an answer text
template  a reply format as a text: "<plan>{reason}</plan><final>{answer}</final>"
mark      what a template is known by: a tag, or a piece of its text with a sign that is no full stop or comma
frame     what may stand around a whole answer: \\boxed{B}, $B$, **B**
lead      words in front of one: "The answer is"
"""

import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

MAX_REPLY = 100_000  # characters; a longer reply is not read at all

# What .strip() takes off. Python's own default would take off dozens of Unicode spaces too.
SPACE = " \t\r\n"


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
    # The switch of leniency. True: the answer may stand in a frame or a sentence and in any usual spelling: \boxed{B},
    # "The answer is B.", "(B)", "B. below", "3 cars". False: exactly what the type's `read_bare` takes, "B" or "3", as
    # Jigsaw-R1 wants it where the prompt asks for the answer alone.
    answer_may_be_wrapped: bool = True


REPLY_FORMATS = {
    "think": ReplyFormat(read_think),
    "bare": ReplyFormat(read_bare, reason_may_be_empty=True, answer_may_be_wrapped=False),
    "tags": ReplyFormat(read_tags),
    "boxed": ReplyFormat(read_boxed, reason_may_be_empty=True),
    "json": ReplyFormat(read_json),
    "line": ReplyFormat(read_line),
}


# ---------------------------------------------------------------------------------------------------------------------
# Templates: formats that a record brings along

MAX_TEMPLATE = 500  # characters
FIELD = re.compile(r"\{(reason|answer)\}")
PIECE = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|[^\s<>\[\]]+|[<>\[\]]")


def is_template(name: object) -> bool:
    """Whether a `reply_format` is a template and no name."""
    return isinstance(name, str) and "{answer}" in name


@lru_cache(maxsize=4096)
def template_format(template: str) -> ReplyFormat:
    """The format that a template says. {answer} stands in it once, {reason} once or not at all, in any order.

    A reply is well-formed if it is the template with something in place of the fields, and if no mark occurs more often
    than the template has it. ValueError for what is no template.
    """
    literals = FIELD.split(template)[::2]  # what stands before, between and behind the fields
    names = FIELD.findall(template)
    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"a template of {len(template)} characters is longer than {MAX_TEMPLATE}")
    if names.count("answer") != 1 or names.count("reason") > 1:
        raise ValueError("a template needs {answer} once, and {reason} at most once")
    if any(not literal.strip(SPACE) for literal in literals[1:-1]):
        raise ValueError("a template needs something between {reason} and {answer} that tells them apart")
    return ReplyFormat(partial(read_template, literals, names), reason_may_be_empty="reason" not in names)


def marks_of(literal: str) -> list[str]:
    """ "</plan> so <final>" -> ["</plan>", "<final>"]: plain words and stops may stand in a reason as well."""
    pieces = PIECE.findall(literal)
    return [piece for piece in pieces if piece.strip(".,;:!?") and not piece.strip(".,;!?").isalnum()]


def read_template(literals: list[str], names: list[str], reply: str) -> tuple[str, str] | None:
    """Literals and fields in turn, to the end of the reply; each mark as often as the literals have it."""
    for mark in {mark for literal in literals for mark in marks_of(literal)}:
        if reply.count(mark) != sum(literal.count(mark) for literal in literals):
            return None
    first, *between, last = literals
    first, last = first.lstrip(SPACE), last.rstrip(SPACE)  # the reply comes stripped
    if not reply.startswith(first) or not reply.endswith(last) or len(reply) < len(first) + len(last):
        return None
    rest = reply[len(first) : len(reply) - len(last)]
    values = []
    for literal in between:
        value, found, rest = rest.partition(literal)
        if not found:
            return None
        values.append(value)
    found = dict(zip(names, [*values, rest], strict=True))
    return found.get("reason", ""), found["answer"]


# ---------------------------------------------------------------------------------------------------------------------
# Any format


def reply_format(record: dict) -> str:
    """The format the prompt asks for: the record's `reply_format`, otherwise `think` or `bare` as its `think` says."""
    return record.get("reply_format") or ("think" if record.get("think") else "bare")


def format_called(name: str) -> ReplyFormat:
    """The entry of REPLY_FORMATS, or the format of a template. ValueError for a name it does not have."""
    if is_template(name):
        return template_format(name)
    if not isinstance(name, str) or name not in REPLY_FORMATS:
        raise ValueError(f"unknown reply_format {name!r:.80}")
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
# What may stand around an answer: characters, frames, leads, sentences

INVISIBLE = re.compile("[\u200b-\u200d\u2060\ufeff]")
# These compatibility forms mean more than the plain character: ² is an exponent, ½ a fraction.
MEANINGFUL = ("<super>", "<sub>", "<fraction>")


def fold(text: str) -> str:
    """Full-width, circled and bold characters as plain ones (NFKC). Letters of other alphabets stay what they are."""
    folded = []
    for character in unicodedata.normalize("NFC", INVISIBLE.sub("", text)):
        keeps = unicodedata.decomposition(character).startswith(MEANINGFUL)
        folded.append(character if keeps else unicodedata.normalize("NFKC", character))
    return "".join(folded).replace("、", ",")


# (opening, closing) marks that may stand around a whole answer, if neither stands inside
FRAMES = [
    ("**", "**"), ("__", "__"), ("*", "*"), ("`", "`"), ('"', '"'), ("“", "”"), ("'", "'"),
    ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("「", "」"), ("【", "】"), ("_", "_"),
]  # fmt: skip
COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|textit|textrm|mathrm|mathbf|mathit|boldsymbol|underline)(?=\{)")
FENCE = re.compile(r"```[A-Za-z]*[ ]*\n(.*?)\n?```", re.DOTALL)
BOLD = re.compile(r"(?<![\w*])\*\*(?=\S)([^*\n]+?)(?<=\S)\*\*(?![\w*])")
HEADING = re.compile(r"#{1,6}[ ]*(?=[A-Za-z])")
CLOSING_WORDS = re.compile(r"[.]?\s{1,9}I hope it is correct\.?$")

# "The answer is", "Final answer:", "Option", then the same in other languages. re.ASCII: an ASCII letter is meant.
LEADS = [
    re.compile(
        r"(?:(?:so|thus|hence|therefore|finally|i think|i believe)(?:,[ ]?|[ ]))?(?:(?:the|my|our)[ ])?"
        r"(?:(?:final|correct|right|best)[ ])?"
        r"(?:(?:answer|ans|option|choice)\.?(?:[ ](?:is|would be|must be))?"
        r"|(?:solution|result|letter|total|count)(?:[ ]is|(?=[ ]?:)))"
        r"(?:[ ]?[:=]\s*|\s+)(?:(?:option|choice)[ ])?",
        re.IGNORECASE | re.ASCII,
    ),
    re.compile(r"(?:i (?:would |will )?)?(?:choose|pick|select) (?:(?:option|choice) )?", re.IGNORECASE | re.ASCII),
    re.compile(
        r"(?:(?:所以|因此|故|综上)\s*,?\s*)?"
        r"(?:(?:最终|正确)?(?:答案|结果|选项)\s*(?:是|为|选)?|应?选择?)\s*:?\s*"
        r"|(?:答え|正解|解答)\s*は?\s*:?\s*"
    ),
    re.compile(r"(?:최종 )?(?:정답|답)\s*(?:은|는)?\s*:?\s*"),
    re.compile(
        r"(?:la réponse(?: finale| correcte)? est|réponse|(?:die )?(?:richtige )?antwort(?: ist| lautet)?"
        r"|la respuesta(?: final| correcta)? es|respuesta|a resposta(?: final| correta)? é|resposta"
        r"|la risposta(?: finale| corretta)? è|risposta|правильный ответ|ответ|đáp án(?: đúng)?(?: là)?)"
        r"(?:[ ]?:\s*|[ ])",
        re.IGNORECASE,
    ),
]
TAILS = re.compile(
    r"[ ]is(?: the)? (?:correct|right|best)(?: (?:answer|option|choice|one))?\.?$|[ ]is the answer\.?$"
    r"|です[.。]?$|입니다[.]?$",
    re.IGNORECASE | re.ASCII,
)


def unwrap(text: str) -> str:
    r"""The answer without what may stand around it.

    That is leads ("The answer is"), tails ("is correct"), frames (\boxed{}, $$, **, code fences, quotes) and the full
    stop behind a frame.
    """
    for _ in range(8):
        before = text
        text = CLOSING_WORDS.sub("", text.strip(SPACE))
        text = BOLD.sub(r"\1", HEADING.sub("", text, count=1) if text.startswith("#") else text)
        text = unframe(text.removesuffix("。"))
        for lead in LEADS:
            found = lead.match(text)
            if found and found.end() > 0:
                text = text[found.end() :].strip(SPACE)
                break
        text = TAILS.sub("", text)
        if text == before:
            break
    return text


def unframe(text: str) -> str:
    """Without the outermost frame, if there is one around the whole text."""
    if text[-2:-1] and text[-2:-1] in "}$)]*`\"”" and text.endswith("."):
        text = text[:-1]
    fence = FENCE.fullmatch(text)
    if fence and "```" not in fence[1]:
        return fence[1].strip(SPACE)
    if text.startswith("\\displaystyle"):
        return text.removeprefix("\\displaystyle").strip(SPACE)

    command = COMMAND.match(text)
    if command and closing_brace(text, command.end()) == len(text) - 1:
        return text[command.end() + 1 : -1].strip(SPACE)
    for opening, closing in FRAMES:
        inner = text[len(opening) : len(text) - len(closing)]
        framed = text.startswith(opening) and text.endswith(closing) and inner.strip(SPACE)
        if framed and opening not in inner and closing not in inner:
            return inner.strip(SPACE)
    return answer_in_json(text)


def answer_in_json(text: str) -> str:
    """{"answer": "B"} without its braces."""
    if text.startswith("{") and text.endswith("}") and '"answer"' in text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if list(value) == ["answer"] and isinstance(value["answer"], str | int | float | list):
            inner = value["answer"]
            return json.dumps(inner) if isinstance(inner, list) else str(inner).strip(SPACE)
    return text


# A plain statement: what stands before its verb must be words (or $x$), and none that doubts or denies.
STATEMENT = re.compile(
    r"(?P<subject>(?:[A-Za-z']+|\$[A-Za-z]{1,2}\$)(?:[ ](?:[A-Za-z']+|\$[A-Za-z]{1,2}\$)){0,14}?)"
    r"[ ](?:(?:is|are|was|equals|gets?|takes?|has|have|see|counts?|came from|comes from)"
    r"(?: equal to| located at| at)?:?|at|on)\s+(?P<rest>.+)",
    re.DOTALL,
)
CONNECTIVE = re.compile(r"(?:so|thus|hence|therefore|then|in total|a total of)\b,?[ ]+", re.IGNORECASE)
LAST_SENTENCE = re.compile(
    r"(?P<before>.+?)[,.;][ ]+(?:so |thus |hence |therefore |and )?(?=(?:the|my) (?:final )?answer is )", re.IGNORECASE
)
DOUBT = re.compile(
    r"n't\b|\b(?:not|no|nor|neither|never|nothing|nobody|none|hardly|if|unless|or|either|whether|that|which|who|when"
    r"|false|wrong|incorrect|unlikely|impossible|doubt\w*|maybe|perhaps|possibly|might|may|could|least|most|than|between|about|except|without)\b",
    re.IGNORECASE,
)


def stated(text: str) -> str | None:
    """What a plain sentence says its subject is: "There are 5 ways." -> "5 ways". None for anything less plain."""
    last = LAST_SENTENCE.fullmatch(text + "\n") or LAST_SENTENCE.match(text)
    if last and not DOUBT.search(last["before"]):
        return unwrap(text[last.end() :])
    connective = CONNECTIVE.match(text)
    if connective:
        text = text[connective.end() :]
    statement = STATEMENT.fullmatch(text)
    if statement and not DOUBT.search(statement["subject"]):
        return unwrap(statement["rest"])
    return unwrap(text) if connective else None
