"""What is asked about a mixed picture, and in which words. A new question is one function and one entry of QUESTIONS.

    pair      where was the piece now at position k, relative to the piece now at j?       -> a letter (2 options, or 8)
    full      for every position now: where was its piece before?                          -> a grid of n numbers
    inverse   for every position before: where is its piece now?                           -> a grid
    single    where was the piece now at position k?                                       -> a number
    multiple  which of these lists answers `full`?                                         -> a letter (4 options, or 2)
    box       rectangles changed places: where was this one?                               -> a box in pixels
    rotation  by which of n angles was the picture turned?                                 -> a letter (n options)
    patchfit  which of the patches below the picture fits the black hole?                  -> a letter (n options)

The questions are those of Jigsaw-R1 (arXiv 2505.23590) and its code, patchfit is that of PuzzleCraft (arXiv
2512.14944). All prompts are our own words. Other words can be read from a JSON file (`read_words`).

Legend: n = rows*cols pieces; k, j positions, row by row from 1; `order[x]` is the original position of what is now at
position x+1.
"""

import random
import string
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import files
from mixing import Mixed, shuffled
from replies import is_template, template_format

LETTERS = "ABCDEFGH"  # as many as the longest list of options
WHOLE_ORDERS = 4  # options of `multiple`, where there are as many orders

# ---------------------------------------------------------------------------------------------------------------------
# Directions

LINE_DIRECTIONS = {"column": ("above", "below"), "row": ("left", "right")}
GRID_DIRECTIONS = (
    "above",
    "below",
    "left",
    "right",
    "above and left",
    "above and right",
    "below and left",
    "below and right",
)


def directions(rows: int, cols: int) -> tuple[str, ...]:
    """The relations that two pieces of this grid can have: 2 in a single row or column, else 8."""
    if cols == 1:
        return LINE_DIRECTIONS["column"]
    if rows == 1:
        return LINE_DIRECTIONS["row"]
    return GRID_DIRECTIONS


def relation(first: int, second: int, cols: int) -> str:
    """Where position `first` lies, seen from position `second`; both count from 1, row by row."""
    # Only the sign counts: two rows higher is "above" as well, so 8 options are enough for every grid.
    row, col = divmod(first - 1, cols)
    other_row, other_col = divmod(second - 1, cols)
    vertical = "above" if row < other_row else "below" if row > other_row else ""
    horizontal = "left" if col < other_col else "right" if col > other_col else ""
    return " and ".join(word for word in (vertical, horizontal) if word)


# ---------------------------------------------------------------------------------------------------------------------
# Questions


class Question(NamedTuple):
    """One kind of question. What `ask` returns goes into the record, after the fields that all puzzles have."""

    summary: str  # for --help
    text: str  # for the prompt: {n}, {width}, {height}: pieces, pixels; every other {name} a field that `ask` returns
    answer_type: str  # how rewards.py reads the reply
    ask: Callable[[Mixed, random.Random], dict]  # -> "answer", "options" if there are some, whatever else is known
    about: str = "pieces"  # what is done to the picture: pieces, rectangles, patches or angles


def option_fields(texts: list[str] | tuple[str, ...], truth: str, rng: random.Random) -> dict:
    """Fields of a question with options in random order: the first is A, the second B, …"""
    options = rng.sample(texts, len(texts))  # all orders equally likely
    return {"answer": LETTERS[options.index(truth)], "options": options}


def letter_fields(texts: tuple[str, ...], truth: str, k: int, j: int, rng: random.Random) -> dict:
    """Fields of a question about positions k and j with options in random order."""
    fields = option_fields(texts, truth, rng)
    # Not needed for the reward: for whoever reads the record, and for {pair[0]} in the question's text.
    return {**fields, "direction": truth, "pair": [k, j]}


def pair_fields(mixed: Mixed, k: int, j: int, rng: random.Random) -> dict:
    """Fields of the pair question about positions k and j."""
    direction = relation(mixed.order[k - 1], mixed.order[j - 1], mixed.cols)
    return letter_fields(directions(mixed.rows, mixed.cols), direction, k, j, rng)


def ask_pair(mixed: Mixed, rng: random.Random) -> dict:
    # Ordered pairs, all equally likely: the answer for (k, j) is the opposite of that for (j, k).
    n = mixed.rows * mixed.cols
    k, j = rng.sample(range(1, n + 1), 2)
    return pair_fields(mixed, k, j, rng)


def ask_full(mixed: Mixed, rng: random.Random) -> dict:
    return {"answer": list(mixed.order)}


def ask_inverse(mixed: Mixed, rng: random.Random) -> dict:
    positions = range(1, len(mixed.order) + 1)
    return {"answer": [mixed.order.index(original) + 1 for original in positions]}


def ask_single(mixed: Mixed, rng: random.Random) -> dict:
    k = rng.randint(1, len(mixed.order))
    return {"answer": mixed.order[k - 1], "position": k}


def ask_multiple(mixed: Mixed, rng: random.Random) -> dict:
    # The wrong orders are sampled as the right one was; otherwise it could be told without a look at the picture.
    n = len(mixed.order)
    there_are = {2: 2, 3: 2 if mixed.deranged else 6}
    orders = [list(mixed.order)]
    while len(orders) < min(WHOLE_ORDERS, there_are.get(n, WHOLE_ORDERS)):
        other = shuffled(n, rng, mixed.deranged)
        if other not in orders:
            orders.append(other)
    texts = [" ".join(map(str, order)) for order in orders]
    return option_fields(texts, texts[0], rng)


def ask_box(mixed: Mixed, rng: random.Random) -> dict:
    # A rectangle that stayed has nothing to be found; the paper asks about one that moved, too.
    moved = [position for position, original in enumerate(mixed.order, 1) if position != original]
    k = rng.choice(moved)
    return {
        "answer": list(mixed.boxes[mixed.order[k - 1] - 1]),
        "box": list(mixed.boxes[k - 1]),
        "boxes": [list(box) for box in mixed.boxes],
    }


def ask_rotation(mixed: Mixed, rng: random.Random) -> dict:
    texts = [f"{angle} degrees" for angle in mixed.angles]
    return {**option_fields(texts, f"{mixed.angle} degrees", rng), "angle": mixed.angle}


def ask_patchfit(mixed: Mixed, rng: random.Random) -> dict:
    # The patches lie in random order already: the letters follow the places, so that the first one is A.
    return {
        "answer": LETTERS[mixed.order.index(mixed.asked)],
        "options": [f"patch {number}" for number in range(1, len(mixed.order) + 1)],
        "box": list(mixed.boxes[mixed.asked - 1]),
        "boxes": [list(box) for box in mixed.boxes],
    }


QUESTIONS = {
    "pair": Question(
        summary="two pieces' relation",
        text="Before the mix, where was the piece now at position {pair[0]}, "
        "relative to the piece now at position {pair[1]}?",
        answer_type="letter",
        ask=ask_pair,
    ),
    "full": Question(
        summary="all positions",
        text="For each position now, row by row: at which position was its piece before the mix? "
        "The answer is {n} numbers, with spaces between them.",
        answer_type="grid",
        ask=ask_full,
    ),
    "inverse": Question(
        summary="all positions, the other way round",
        text="For each position before the mix, row by row: at which position is its piece now? "
        "The answer is {n} numbers, with spaces between them.",
        answer_type="grid",
        ask=ask_inverse,
    ),
    "single": Question(
        summary="one piece's position",
        text="At which position was the piece now at position {position} before the mix?",
        answer_type="digit",
        ask=ask_single,
    ),
    "multiple": Question(
        summary="all positions, with lists to choose from",
        text="Which list says, for each position now, row by row, at which position its piece was before the mix?",
        answer_type="letter",
        ask=ask_multiple,
    ),
    "box": Question(
        summary="where a rectangle was",
        text="One of them is now at {box[0]}, {box[1]}, {box[2]}, {box[3]}. Where was it before? "
        "The answer is four numbers in the same order, with commas between them.",
        answer_type="box",
        ask=ask_box,
        about="rectangles",
    ),
    "rotation": Question(
        summary="the angle of a turned picture",
        text="By which angle?",
        answer_type="letter",
        ask=ask_rotation,
        about="angles",
    ),
    "patchfit": Question(
        summary="the patch that fits a hole",
        text="Which patch belongs into the black hole?",
        answer_type="letter",
        ask=ask_patchfit,
        about="patches",
    ),
}

# ---------------------------------------------------------------------------------------------------------------------
# What can be chosen


class Choices(NamedTuple):
    """What puzzle to make of a picture."""

    rows: int
    cols: int
    question: str  # a name in QUESTIONS
    think: bool = True  # True asks for <think> and <answer>, False for the bare answer
    reply_format: str | None = None  # a name in REPLY_FORMAT_SENTENCE, or a template (replies.py); overrides `think`
    mask_ratio: float = 0.0  # width of a black frame around picture and pieces, as a part of a piece's side; 0: none
    swap: float = 0.0  # probability that rows and cols are exchanged if they differ (the paper: 0.5)
    derange: bool = False  # everything moves; otherwise any order, the original one included, is equally likely (paper)
    angles: int = 4  # rotation: how many angles
    separate: bool = False  # every piece or patch is a picture of its own
    dialogue: bool = False  # the prompt is the beginning of a dialogue: for base models, which know no chat format
    words: dict | None = None  # other words than ours: what `read_words` returns


def check_choices(choices: Choices) -> None:
    """Raise ValueError, with one line that says which choice is wrong."""
    rows, cols, question = choices.rows, choices.cols, choices.question
    if question not in QUESTIONS:
        raise ValueError(f"question {question!r} is not one of {', '.join(QUESTIONS)}")
    if is_template(choices.reply_format):
        template_format(choices.reply_format)
    elif choices.reply_format is not None and choices.reply_format not in REPLY_FORMAT_SENTENCE:
        raise ValueError(f"reply format {choices.reply_format!r} is not one of {', '.join(REPLY_FORMAT_SENTENCE)}")
    if not 0 <= choices.mask_ratio < 0.5:  # half a side from both ends would hide the whole piece
        raise ValueError(f"mask ratio {choices.mask_ratio} is not in [0, 0.5)")
    if not 0 <= choices.swap <= 1:
        raise ValueError(f"swap {choices.swap} is not a probability")

    about = QUESTIONS[question].about
    if choices.mask_ratio and about != "pieces":
        raise ValueError(f"a mask hides the edges of pieces, and {question} has none")
    if choices.separate and about not in ("pieces", "patches"):
        raise ValueError(f"{question} shows one picture: nothing to separate")
    if choices.derange and about not in ("pieces", "rectangles"):
        raise ValueError(f"in {question} nothing changes places: nothing to derange")
    if about == "angles":
        check_angles(choices.angles)
        return
    if rows < 1 or cols < 1 or rows * cols < 2:
        raise ValueError(f"a grid of {rows}x{cols} has fewer than 2 pieces")
    if choices.derange and rows * cols == 2 and question == "multiple":
        raise ValueError("two pieces have one order in which both move: multiple needs a wrong one")
    if about == "patches" and rows * cols > len(LETTERS):
        raise ValueError(f"{rows}x{cols} patches are more than {len(LETTERS)} letters can name")


def check_angles(angles: int) -> None:
    if not 2 <= angles <= len(LETTERS) or 360 % angles:
        raise ValueError(f"{angles} angles: 360 degrees can be divided into 2, 3, 4, 5, 6 or 8")


# ---------------------------------------------------------------------------------------------------------------------
# The other words of a prompt

# How the reply must be written; the names are those of rewards.py. {it} is filled from ANSWER_WORDS.
REPLY_FORMAT_SENTENCE = {
    "think": "Think inside <think> </think>, then give only {it} inside <answer> </answer>.",
    "bare": "Give only {it}, nothing else.",
    "tags": "Reason inside <reason> </reason>, then give only {it} inside <result> </result>.",
    "boxed": "Reason first, then end with {it} inside \\boxed{{ }}.",
    "json": 'Give one JSON object with the keys "reason" and "answer"; in "answer" give only {it}.',
    "line": 'Reason first, then end with a last line "Answer: " and {it}.',
}
# How a template of replies.py is asked for: it is shown, with "reason" and "letter" in place of its fields.
TEMPLATE_SENTENCE = {"template": "Reply in this form: {form}"}
# answer type -> what the prompt calls the answer; of any other type: "the answer"
ANSWER_WORDS = {"letter": "the letter", "grid": "the numbers", "digit": "the number", "box": "the four numbers"}

# What was done to the picture. {rows} and {cols} come with their noun: "2 rows", "1 column".
TASK_SENTENCES = {
    "pieces": "The picture was cut into {n} pieces ({rows}, {cols}) and the pieces were mixed. "
    "Positions are numbered row by row from 1.",
    "separate pieces": "A picture was cut into {n} pieces ({rows}, {cols}) and the pieces were mixed. "
    "Positions are numbered row by row from 1. Each piece is shown with its position now.",
    "frame": "A black frame hides the edges of the pieces.",
    "rectangles": "The picture is {width} pixels wide and {height} high. In {n} parts of it ({rows}, {cols}) one "
    "rectangle each was cut out, and the rectangles changed places. A rectangle is written as x1, y1, x2, y2: its "
    "upper left and its lower right corner, in pixels from the left and from the top.",
    "angles": "The picture was turned clockwise.",
    "patches": "{n} patches were cut out of the picture. They lie below it, row by row, in any order.",
    "separate patches": "{n} patches were cut out of a picture. They are shown after it, in any order.",
    # Base models (Jigsaw-R1 frames prompts for those, too; the words are ours).
    "dialogue": "A user asks about pictures, and an assistant answers in the form that is asked for.\n"
    "User: {prompt}\nAssistant:",
}


def count_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def our_words() -> dict[str, dict[str, str]]:
    """All words of prompts, by kind and name: what a file for --prompts may replace."""
    return {
        "task": TASK_SENTENCES,
        "question": {name: question.text for name, question in QUESTIONS.items()},
        "reply": REPLY_FORMAT_SENTENCE | TEMPLATE_SENTENCE,
        "answer": ANSWER_WORDS,
    }


def ask_for(form: str, reply_words: dict[str, str], it: str) -> str:
    """The sentence that asks for a reply format. form: a name or a template; it: what the answer is called."""
    if not is_template(form):
        return reply_words[form].format(it=it)
    shown = form.replace("{reason}", "reason").replace("{answer}", it.removeprefix("the "))
    return reply_words["template"].format(form=shown)


def write_prompt(
    mixed: Mixed,
    text: str,
    answer_type: str,
    fields: dict,
    form: str,
    *,
    about: str = "pieces",
    framed: bool = False,
    separate: bool = False,
    dialogue: bool = False,
    words: dict | None = None,
) -> str:
    """What was done and what is asked, then a line per option, then how to reply.

    text, answer_type, fields, about: see `Question`. form: a reply format, by name or as a template. framed: a black
    frame hides the edges. separate, dialogue, words: see `Choices`.
    """
    words = words or {}
    task_words = TASK_SENTENCES | words.get("task", {})
    reply_words = REPLY_FORMAT_SENTENCE | TEMPLATE_SENTENCE | words.get("reply", {})
    answer_words = ANSWER_WORDS | words.get("answer", {})
    n = len(mixed.order)
    known = {"n": n, "width": mixed.picture.width, "height": mixed.picture.height}

    task = task_words[f"separate {about}" if separate else about]
    grid = {"rows": count_noun(mixed.rows, "row"), "cols": count_noun(mixed.cols, "column")}
    sentences = [task.format(**known, **grid)]
    if framed:
        sentences.append(task_words["frame"].format(**known, **grid))
    sentences.append(text.format(**known, **fields))

    lines = []
    if separate and about == "pieces":
        lines = [f"Position {position}: <image>" for position in range(1, n + 1)]
    elif separate:
        lines = ["<image>"]
    lines.append(" ".join(sentences))
    options = fields.get("options", [])
    for letter, option in zip(LETTERS, options, strict=False):
        lines.append(f"{letter}. <image>" if separate and about == "patches" else f"{letter}. {option}")
    lines.append(ask_for(form, reply_words, answer_words.get(answer_type, "the answer")))

    prompt = "\n".join(lines)
    if dialogue:
        # Pictures come first unless the prompt says where: here they belong to what the user says.
        shown = prompt if separate else f"<image>\n{prompt}"
        prompt = task_words["dialogue"].format(prompt=shown)
    return prompt


# ---------------------------------------------------------------------------------------------------------------------
# Other words, from a file

# What a text may name without having to: the size of grid and picture.
OPTIONAL = {
    "task": {"n", "rows", "cols", "width", "height"},
    "question": {"n", "width", "height"},
    "reply": set(),
    "answer": set(),
}


def placeholders(text: str) -> set[str]:
    """The names in braces. ValueError for a brace alone, and for a conversion or a format."""
    names = set()
    for _, name, form, conversion in string.Formatter().parse(text):
        if name is None:
            continue
        if form or conversion:
            raise ValueError(f"{{{name}}} must stand alone in its braces")
        names.add(name)
    return names


def check_words(words: object) -> None:
    """Raise ValueError unless `words` has the shape of `our_words`, and each text the placeholders of ours."""
    ours = our_words()
    if not isinstance(words, dict) or not words:
        raise ValueError(f"a JSON object with {', '.join(ours)} is needed")
    for kind, texts in words.items():
        if kind not in ours:
            raise ValueError(f"{kind!r:.60} is not one of {', '.join(ours)}")
        if not isinstance(texts, dict):
            raise ValueError(f"{kind} must be an object of texts")
        for name, text in texts.items():
            if name not in ours[kind]:
                raise ValueError(f"{kind}: {name!r:.60} is not one of {', '.join(ours[kind])}")
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{kind}, {name}: a text is needed, not {text!r:.60}")
            if "<image>" in text:
                raise ValueError(f"{kind}, {name}: <image> is put in where pictures belong, not by the words")
            optional = OPTIONAL[kind] if name != "dialogue" else set()
            check_placeholders(f"{kind}, {name}", text, ours[kind][name], optional)


def check_placeholders(where: str, text: str, ours: str, optional: set[str]) -> None:
    """Raise ValueError unless text names in braces what our text names; the `optional` ones may be there or not."""
    try:
        found = placeholders(text)
    except ValueError as cause:
        raise ValueError(f"{where}: {cause}") from None
    known = placeholders(ours) | optional
    for name in sorted(known - optional - found):
        raise ValueError(f"{where}: {{{name}}} is missing")
    for name in sorted(found - known):
        listed = ", ".join(f"{{{each}}}" for each in sorted(known)) or "none"
        raise ValueError(f"{where}: {{{name}}} is unknown (known: {listed})")


def read_words(path: str | Path) -> dict[str, dict[str, str]]:
    """Other words for prompts from a JSON file. ValueError names the file and what is wrong with it."""
    try:
        words = files.read_json(path)
    except files.DataError as cause:
        raise ValueError(str(cause)) from cause
    try:
        check_words(words)
    except ValueError as cause:
        raise ValueError(f"{path}: {cause}") from cause
    return words
