"""Warm-up SFT data: questions about puzzle pictures, each with a reply. Writes primer.jsonl and the images.

    python toy/primer.py --scenes 2000 --count 8000 --out runs/formats

A model with random weights writes noise that no reward can tell apart. SFT on this teaches it to speak, and leaves the
rest to RL: the replies name truly what can be seen, take the asked form only now and then (--follow), and guess at
puzzles. The questions:

    pair    the puzzle of jigsaw.py; the reply's reason is true, its verdict is sampled at random
    look    is piece k lighter or darker, warmer or cooler, than piece j? The reply is right
    rank    (only with --ask) all pieces from the lightest to the darkest; the reply is right
    inverse (only with --ask) jigsaw.py's question about all positions; as `pair`

Each line is a whole pair record without `rejected`: what `dpo.py --loss sft` reads.

Legend: k, j positions in the mixed picture, from 1; a cue is something that can be seen of a piece (CUES); `more` says
whether the piece at k has more of it; `form` is how a reply is written: one of six reply formats, or a near miss.
"""

import json
import math
import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

if __name__ == "__main__":  # Python looks for modules beside a script: jigsaw.py lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jigsaw
import questions

# ---------------------------------------------------------------------------------------------------------------------
# What can be seen, in words

# cue -> (word for the piece that has more of it, word for the other), as "looks ..." and as the answer to a comparison
CUES = {
    "light": (("light", "dark"), ("lighter", "darker")),
    "warm": (("warm", "cool"), ("warmer", "cooler")),
}
LOOK_TEXT = "How does the piece now at position {pair[0]} look, compared with the piece now at position {pair[1]}?"

RECHECK = "recheck"  # one of the words by which Jigsaw-R1 counts backtracking


RANK_TEXT = "List the pieces from light to dark."


def look(picture: Image.Image, rows: int, cols: int) -> dict[str, list[float]]:
    """Of each piece as it lies: "light", its mean luminance, and "warm", its mean red minus its mean blue (0..255)."""
    means = jigsaw.pieces_of(picture, rows, cols).astype(np.float64).mean(axis=(1, 2))  # (n, 3)
    red, green, blue = means.T
    luminance = 0.299 * red + 0.587 * green + 0.114 * blue
    return {"light": luminance.tolist(), "warm": (red - blue).tolist()}


def sample_pair(values: list[float], cue: str, rng: random.Random) -> tuple[int, int, bool]:
    """(k, j, more): two positions whose pieces differ in the cue. ValueError if there are none."""
    n = len(values)
    pairs = [(k, j) for k in range(n) for j in range(n) if values[k] != values[j]]
    if not pairs:
        raise ValueError(f"all {n} pieces are equally {cue}: nothing true can be said")
    k, j = rng.choice(pairs)
    return k + 1, j + 1, values[k] > values[j]


def look_fields(cue: str, more: bool, k: int, j: int, rng: random.Random) -> dict:
    """Fields of the look question, as questions.py's `pair_fields` returns them."""
    words = CUES[cue][1]
    return questions.letter_fields(words, words[0] if more else words[1], k, j, rng)


def level(luminance: float) -> int:
    """A luminance as a digit: pieces of scenes lie between 65 and 205."""
    return min(9, max(0, int((luminance - 65) / 14)))


def list_levels(luminances: list[float]) -> str:
    """[140.0, 90.0] -> "1 5, 2 1.": every position, and the light of the piece there."""
    return ", ".join(f"{position} {level(value)}" for position, value in enumerate(luminances, 1)) + "."


def levels_of_pair(luminances: list[float], k: int, j: int) -> str:
    """[140.0, 90.0, 180.0], 3, 1 -> "1 5, 2 1, 3 8. 3 8, 1 5.": of all, and once more of the two asked about."""
    return f"{list_levels(luminances)} {k} {level(luminances[k - 1])}, {j} {level(luminances[j - 1])}."


def reason_of_list(luminances: list[float], answer: str, recheck: float, rng: random.Random) -> str:
    """The reason of an answer that lists all pieces: their light, and the list. recheck: see Manner."""
    said = list_levels(luminances)
    if recheck and rng.random() < recheck:
        first = rng.sample(luminances, len(luminances)) if rng.random() < 0.5 else luminances
        said = f"{list_levels(first)} {RECHECK}: {said}"
    return f"{said} so {answer}."


def sight(cue: str, more: bool, k: int, j: int) -> str:
    """What both pieces look like."""
    words = CUES[cue][0]
    first, second = words if more else reversed(words)
    return f"{k} looks {first}, {j} looks {second}."


def reason_about(cue: str, more: bool, k: int, j: int, verdict: str, letter: str, first: bool | None = None) -> str:
    """The one phrase of all replies: what both pieces look like, what is concluded, and at once the letter for it.

    first: `more` as it seemed at a first look, before "recheck:"; None: there is no second look.

    The letter stands right behind the verdict's last word on purpose: a model of a few layers looks a word up among the
    options from that very word within 100 updates, and from one token further on it does not in 1,000.
    """
    before = "" if first is None else f"{sight(cue, first, k, j)} {RECHECK}: "
    return f"{before}{sight(cue, more, k, j)} so {k} {verdict} {letter}."


# ---------------------------------------------------------------------------------------------------------------------
# Replies

# The reply formats of jigsaw.py's prompts.
WELL_FORMED = {
    "think": "<think>{reason}</think><answer>{answer}</answer>",
    "bare": "{answer}",
    "tags": "<reason>{reason}</reason><result>{answer}</result>",
    "boxed": "{reason} \\boxed{{{answer}}}",
    "json": '{{"reason": {reason}, "answer": {answer}}}',  # both are quoted by `render`
    "line": "{reason}\nAnswer: {answer}",
}
# Near misses of the think form. None of them is well-formed in any of the six.
MALFORMED = {
    "no tags": "{reason} {answer}",
    "no think tags": "{reason}<answer>{answer}</answer>",
    "no answer tags": "<think>{reason}</think>{answer}",
    "no think end": "<think>{reason}<answer>{answer}</answer>",
    "no answer end": "<think>{reason}</think><answer>{answer}",
    "answer in words": "<think>{reason}</think>Answer: {answer}",
}


def render(reason: str, answer: str | list[int], form: str) -> str:
    """A reply in one of the forms. A list of numbers is written with spaces between. ValueError for an unknown form."""
    forms = WELL_FORMED | MALFORMED
    if form not in forms:
        raise ValueError(f"form {form!r} is not one of {', '.join(forms)}")
    if isinstance(answer, list):
        answer = " ".join(map(str, answer))
    if form == "json":
        reason, answer = json.dumps(reason), json.dumps(answer)
    return forms[form].format(reason=reason, answer=answer)


# ---------------------------------------------------------------------------------------------------------------------
# Questions with replies


class Manner(NamedTuple):
    """How questions are asked, and how the replies answer them."""

    follow: float = 0.4  # probability that a reply has the asked form; else it has another one
    reply_format: str | None = None  # the form that is asked for; None: any of the six, think twice as often
    ask: tuple[str, ...] = ("pair", "look")  # names in QUESTIONS, equally likely
    recheck: float = 0.0  # probability of a second look; half of the first looks before it are wrong
    slip: float = 0.0  # probability that the answer is another letter than the reason's
    words: dict | None = None  # other words for prompts: what questions.read_words returns
    look_text: str = LOOK_TEXT
    separate: bool = False  # every piece is a picture of its own
    levels: bool = False  # a reason begins with the light of every piece, as a digit, and speaks of light only


PLAIN = Manner()


def primer_items(mixed: jigsaw.Mixed, count: int, rng: random.Random, manner: Manner = PLAIN) -> list[dict]:
    """`count` questions with replies about one mixed picture: records without `id` and `images`.

    `answer` is the true answer, whatever the reply says, and `form` the reply's form, whatever was asked. ValueError if
    no two pieces differ in the cue that is needed.
    """
    measured = look(mixed.picture, mixed.rows, mixed.cols)
    return [primer_item(mixed, measured, rng, manner) for _ in range(count)]


def ask_about(
    mixed: jigsaw.Mixed, measured: dict, question: str, cue: str, more: bool, k: int, j: int, rng: random.Random,
    manner: Manner,
) -> tuple[str, str, dict, str, str]:
    """(question's text, answer type, record's fields, verdict in words, what to write for it).

    The verdict is sampled at random for a puzzle, and the truth for what can be seen.
    """
    texts = (manner.words or {}).get("question", {})
    if question == "rank":
        light = measured["light"]
        answer = sorted(range(1, len(light) + 1), key=lambda position: -light[position - 1])
        return RANK_TEXT, "grid", {"answer": answer}, "is", " ".join(map(str, answer))
    if question == "inverse":
        fields = questions.ask_inverse(mixed, rng)
        verdict = " ".join(map(str, rng.sample(fields["answer"], len(fields["answer"]))))
        return texts.get("inverse", jigsaw.QUESTIONS["inverse"].text), "grid", fields, "was", verdict
    if question == "pair":
        fields = questions.pair_fields(mixed, k, j, rng)
        verdict = rng.choice(fields["options"])
        verb = "was"
        text = texts.get("pair", jigsaw.QUESTIONS["pair"].text)
    else:
        fields = look_fields(cue, more, k, j, rng)
        verdict, verb = fields["direction"], "is"
        text = manner.look_text
    return text, "letter", fields, f"{verb} {verdict}", jigsaw.LETTERS[fields["options"].index(verdict)]


def another_answer(answer: str, answer_type: str, fields: dict, rng: random.Random) -> str:
    """A letter among the options, or an order of the same numbers, that is not `answer`."""
    if answer_type == "letter":
        return rng.choice([letter for letter in jigsaw.LETTERS[: len(fields["options"])] if letter != answer])
    numbers, other = answer.split(), answer
    while other == answer:
        other = " ".join(rng.sample(numbers, len(numbers)))
    return other


def primer_item(
    mixed: jigsaw.Mixed, measured: dict[str, list[float]], rng: random.Random, manner: Manner
) -> dict:
    # 1. What the reply looks at. In a column the scenes' light tells the place, in a row their tint, in a grid both.
    if mixed.cols == 1 or manner.levels:
        cue = "light"
    elif mixed.rows == 1:
        cue = "warm"
    else:
        cue = rng.choice(list(CUES))
    k, j, more = sample_pair(measured[cue], cue, rng)

    # 2. What is asked, what the reply concludes, and how it gets there.
    question = rng.choice(manner.ask)
    text, answer_type, fields, verdict, answer = ask_about(mixed, measured, question, cue, more, k, j, rng, manner)
    if answer_type == "grid":
        reason = reason_of_list(measured["light"], answer, manner.recheck, rng)
    else:
        first = None
        if manner.recheck and rng.random() < manner.recheck:
            first = rng.random() < 0.5
        reason = reason_about(cue, more, k, j, verdict, answer, first)
        if manner.levels:
            reason = f"{levels_of_pair(measured['light'], k, j)} {reason}"
    if manner.slip and rng.random() < manner.slip:
        answer = another_answer(answer, answer_type, fields, rng)

    # 3. Which form is asked for, and which the reply has.
    asked = manner.reply_format or rng.choice(["think", *WELL_FORMED])
    form = asked
    if rng.random() >= manner.follow:
        form = rng.choice([name for name in (*WELL_FORMED, *MALFORMED) if name != asked])

    shown = {"separate": manner.separate, "words": manner.words}
    return {
        "prompt": jigsaw.write_prompt(mixed, text, answer_type, fields, asked, **shown),
        "answer": fields["answer"],
        "answer_type": answer_type,
        **fields,
        "think": asked == "think",
        "source": "primer",
        "rows": mixed.rows,
        "cols": mixed.cols,
        "question": question,
        "order": mixed.order,
        "reply_format": asked,
        "form": form,
        "chosen": render(reason, answer, form),
        "chosen_from": "primer",
        "corruption": None,
    }


def write_primer(
    out: str | Path,
    count: int,
    *,
    rows: int = 2,
    cols: int = 1,
    per_picture: int = 4,
    manner: Manner = PLAIN,
    swap: float = 0.5,
    derange: bool = False,
    split: str = "all",
    seed: int = 0,
    **source,
) -> Path:
    """Write `count` items (see `primer_items`) to out/primer.jsonl, `per_picture` on each mixed picture.

    `source` and the other choices are those of jigsaw.py's `write_puzzles`, and so are the errors.
    """
    choices = questions.Choices(rows, cols, "pair", reply_format=manner.reply_format, swap=swap, derange=derange)
    questions.check_choices(choices)
    pictures, open_picture = jigsaw.open_source(out, split=split, seed=seed, **source)
    folder = jigsaw.make_folder(out)
    records, saved = [], set()
    rounds = math.ceil(count / per_picture)
    numbers = jigsaw.epoch_order(len(pictures), rounds, random.Random(f"{split} {seed} deal"))
    for index, number in enumerate(tqdm(numbers, desc="primer", disable=None)):  # None: a bar on terminals only
        rng = random.Random(f"{split} {seed} primer {index}")
        missing = count - len(records)
        with jigsaw.errors_name(pictures[number]):
            mixed = jigsaw.mix(open_picture(pictures[number]), rows, cols, rng, swap=swap, derange=derange)
            items = primer_items(mixed, min(per_picture, missing), rng, manner)
        paths = [jigsaw.save_image(shown, folder, saved) for shown in jigsaw.pictures_shown(mixed, manner.separate)]
        for item in items:
            name = f"primer-{split}-{seed}-{len(records):06d}"
            records.append({"id": name, "images": paths, **item})
    return jigsaw.write_lines(folder / "primer.jsonl", records)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The arguments of `write_primer`, under the same names, but for those of its `manner`."""
    parser = jigsaw.Parser(__doc__)
    add = parser.add_argument
    add("--count", metavar="N", type=jigsaw.integer("[1, 1e8]"), required=True, help="how many questions to write")
    add("--out", metavar="DIR", required=True, help="gets primer.jsonl and images/")
    jigsaw.add_common_flags(parser)
    add("--reply-format", choices=list(WELL_FORMED), help="ask for this form only (default: any, think twice as often)")
    add(
        "--follow",
        type=jigsaw.real("[0, 1]"),
        default=0.4,
        help="probability that a reply has the asked form (default %(default)s)",
    )
    add(
        "--per-picture",
        metavar="N",
        type=jigsaw.integer("[1, 1e4]"),
        default=4,
        help="questions on each mixed picture (default %(default)s)",
    )
    add(
        "--ask",
        nargs="+",
        choices=["pair", "look", "rank", "inverse"],
        default=["pair", "look"],
        help="the questions, equally likely (default pair look)",
    )
    add(
        "--recheck",
        type=jigsaw.real("[0, 1]"),
        default=0.0,
        help="probability that a reason looks twice; half of these first looks are wrong (default 0: never)",
    )
    add(
        "--slip",
        type=jigsaw.real("[0, 1]"),
        default=0.0,
        help="probability that the answer is another letter than its reason's (default 0: never)",
    )
    add("--separate", action="store_true", help="pieces as pictures of their own (default: one picture)")
    add(
        "--levels",
        action="store_true",
        help="reasons begin with the light of every piece as a digit, and speak of light only (default: no)",
    )
    add("--prompts", metavar="FILE", help="a JSON file with other words for prompts (docs/formats.md; default: ours)")
    add("--look-text", metavar="TEXT", default=LOOK_TEXT, help="other words for the look question (default: ours)")
    args = parser.parse_args(argv)
    jigsaw.check_common_flags(parser, args)
    return args


def manner_of(args: Namespace) -> Manner:
    """The flags that say how to ask and to answer. Raises as questions.read_words and check_placeholders do."""
    words = questions.read_words(args.prompts) if args.prompts else None
    questions.check_placeholders("--look-text", args.look_text, LOOK_TEXT, set())
    flags = {name: getattr(args, name) for name in Manner._fields if name not in ("ask", "words")}
    return Manner(ask=tuple(args.ask), words=words, **flags)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        manner = manner_of(args)
        others = {name: value for name, value in vars(args).items() if name not in ("prompts", *Manner._fields)}
        path = write_primer(**others, manner=manner)
    except ValueError as cause:
        jigsaw.Parser().error(jigsaw.one_line(cause))
    print(f"{args.count} questions with replies -> {path}")


if __name__ == "__main__":
    main()
