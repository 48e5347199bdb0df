"""Warm-up SFT data and questions whose reply format is read off the prompt, not known by heart. Writes records.jsonl.

    python toy/formats.py drill     --count 16000 --out runs/base/drill         copying, and nothing else
    python toy/formats.py words     --count 8000  --scenes 1000 --out …         seeing and options, no format
    python toy/formats.py replies   --count 8000  --scenes 1000 --follow 0.4 --out …    format asked, 40 % follow it
    python toy/formats.py questions --count 2000  --scenes 2000 --format trained --out …        puzzles without replies

toy/primer.py asks for six formats that have names; a model that knows those by heart has nothing to share between them.
Here every prompt shows a template of its own (replies.py), put together from signs (WRAPS), separators and two made-up
words, so the one skill that helps is to copy what the prompt shows. Shapes and words that are held out from training
tell whether it was learned. What is asked is what toy/primer.py asks: how pieces look, which is answered truly, and
where one was, which is guessed; but every piece is a picture of its own, and options have one order.

`--follow` of the replies have the format that was asked for; all others the plain form, the reason and then the answer.
One form, not many: with other tags in its place at random, copying itself would be unlearned.

Legend: a word is two syllables, each of them one token; a shape is a template without its words; k, j are positions.
"""

import itertools
import math
import random
import re
import sys
from argparse import Namespace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

if __name__ == "__main__":  # Python looks for modules beside a script: jigsaw.py lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jigsaw
import questions
from toy.primer import CUES, look, look_fields, reason_about, sample_pair

# ---------------------------------------------------------------------------------------------------------------------
# The grammar of templates

SYLLABLES = [consonant + vowel for consonant in "bdfgklmn" for vowel in "aeiou"]
TRAIN_WORDS, TEST_WORDS = 1000, 300
# How a word is written where a part begins, and where it ends.
WRAPS = {
    "<>": ("<{}>", "</{}>"),
    "[]": ("[{}]", "[/{}]"),
    "||": ("|{}|", "|/{}|"),
    "**": ("*{}*", "*/{}*"),
    "##": ("#{}#", "#/{}#"),
    "()": ("{}(", ")"),
    "::": ("{}: ", ""),
}
SEPARATORS = ("", " ", "\n")
HELD_OUT = 0.2  # share of the shapes that no training shows

TRAINED = "<think>{reason}</think><answer>{answer}</answer>"  # the format that SPECS' chain trains
PLAIN = "{reason} {answer}"  # how a reply looks that does not follow


class Shape(NamedTuple):
    """A template without its words."""

    reason: str  # a name in WRAPS: how the reason's word is written
    reason_ends: bool  # whether it stands behind the reason as well
    separator: str
    answer: str  # a name in WRAPS
    answer_ends: bool


# `<zabo>…</zabo><miru>…</miru>`: what is trained, with other words
TAGS = Shape("<>", True, "", "<>", True)


@cache
def words(part: str) -> list[str]:
    """Made-up words: the 1,000 of training ("train"), or 300 others ("test")."""
    everything = ["".join(pair) for pair in itertools.product(SYLLABLES, repeat=2)]
    random.Random("words").shuffle(everything)
    return {"train": everything[:TRAIN_WORDS], "test": everything[TRAIN_WORDS : TRAIN_WORDS + TEST_WORDS]}[part]


@cache
def shapes(part: str) -> list[Shape]:
    """The shapes of training ("train"), or those held out ("test"). TAGS is one of training."""
    everything = [
        Shape(reason, reason_ends, separator, answer, answer_ends)
        for reason, answer in itertools.product(WRAPS, repeat=2)
        for separator in SEPARATORS
        for reason_ends, answer_ends in itertools.product((True, False), repeat=2)
    ]
    # "zabo: " has no end, so some of them are the same template: a shape held out must not be one of training as well.
    different = {template_of(shape, "x", "y"): shape for shape in everything}
    rest = [shape for shape in different.values() if shape != TAGS]
    random.Random("shapes").shuffle(rest)
    held_out = round(HELD_OUT * len(rest))
    return {"train": [TAGS, *rest[held_out:]], "test": rest[:held_out]}[part]


def template_of(shape: Shape, reason_word: str, answer_word: str) -> str:
    """A template of replies.py."""
    reason_begin, reason_end = (text.format(reason_word) for text in WRAPS[shape.reason])
    answer_begin, answer_end = (text.format(answer_word) for text in WRAPS[shape.answer])
    return (
        f"{reason_begin}{{reason}}{reason_end if shape.reason_ends else ' '}{shape.separator}"
        f"{answer_begin}{{answer}}{answer_end if shape.answer_ends else ''}"
    )


# What `--format` names -> (shapes to sample from, words to sample from); "trained" is TRAINED.
FORMATS = {
    "any": (shapes("train"), words("train")),
    "tags": ([TAGS], words("test")),
    "seen": ([shape for shape in shapes("train") if shape != TAGS], words("test")),
    "unseen": (shapes("test"), words("test")),
}
OFTEN = 0.1  # of "any": TRAINED itself, so that its two real words are known like others


def sample_template(name: str, rng: random.Random) -> str:
    if name == "trained" or (name == "any" and rng.random() < OFTEN):
        return TRAINED
    from_shapes, from_words = FORMATS[name]
    return template_of(rng.choice(from_shapes), *rng.sample(from_words, 2))


def fill(template: str, reason: str, answer: str) -> str:
    return template.replace("{reason}", reason).replace("{answer}", answer)


def drill_text(rng: random.Random) -> str:
    """One to four words in signs, one behind the other, with no sense at all."""
    parts = []
    for _ in range(rng.randint(1, 4)):
        word = rng.choice(words("train") if rng.random() > OFTEN else ["think", "answer"])
        parts.append(rng.choice(rng.choice(list(WRAPS.values()))).format(word) + rng.choice(SEPARATORS))
    return "".join(parts).strip() or "A"


# ---------------------------------------------------------------------------------------------------------------------
# Prompts, in few words: in training a token of the prompt costs as much as one of the reply

ASK = {  # ways to ask for a template; the last one is in no training
    "train": ("Write {form}", "Reply in this form: {form}", "The form of the reply is {form}"),
    "test": ("Reply as {form}",),
}
QUESTIONS = ("pair", "look")
TASK = "{n} pieces were mixed."
PAIR = "Where was {pair[0]}, seen from {pair[1]}?"
LOOK = "How does {pair[0]} look, seen from {pair[1]}?"


def corpus() -> list[str]:
    """What a tokenizer learns: the words of prompts and reasons whole (behind a blank), of made-up words the syllables.

    Signs are left out, lest one grow together with a word: copying "zami" must not depend on what stands before it.
    """
    said = [TASK, "Position", PAIR, LOOK, *sum(ASK.values(), ()), "think reason answer letter A. B. A B above below"]
    for cue in CUES:
        for verdict in CUES[cue][1]:
            said += [reason_about(cue, more, 1, 2, f"is {verdict}", "A") for more in (True, False)]
    said += [reason_about("light", True, 1, 2, f"was {verdict}", "B") for verdict in ("above", "below")]
    known = [word for text in said for word in re.findall(" ?[A-Za-z]+", f" {text}")]
    # A digit ends a word for the tokenizer, and grows together with nothing. Syllables first: the most frequent.
    whole = [*known, "think", "answer", "reason", "letter"]
    return ["1".join(SYLLABLES) for _ in range(400)] + ["1".join(whole) for _ in range(20)]


# ---------------------------------------------------------------------------------------------------------------------
# Questions and replies


def ordered(fields: dict) -> dict:
    """The same question with its options in the order of the alphabet: a verdict always has the same letter.

    Otherwise some tiny models never learn which letter stands before the verdict of their reason, or unlearn it with
    the next data, and nothing that GRPO finds in their reasons reaches their answers.
    """
    options = sorted(fields["options"])
    return {**fields, "options": options, "answer": jigsaw.LETTERS[options.index(fields["direction"])]}


def ask(mixed: jigsaw.Mixed, name: str, rng: random.Random) -> tuple[str, dict, str, str]:
    """(the question's text, its fields, a reason, the letter it ends in), of a question "pair" or "look".

    The reason says truly how the pieces look. Its verdict is true for look, and sampled at random for pair.
    """
    cue = "light" if mixed.cols == 1 else "warm"
    k, j, more = sample_pair(look(mixed.picture, mixed.rows, mixed.cols)[cue], cue, rng)
    if name == "pair":
        text, fields = PAIR, ordered(questions.pair_fields(mixed, k, j, rng))
        verdict, verb = rng.choice(fields["options"]), "was"
    else:
        text, fields = LOOK, ordered(look_fields(cue, more, k, j, rng))
        verdict, verb = fields["direction"], "is"
    letter = jigsaw.LETTERS[fields["options"].index(verdict)]
    return text, fields, reason_about(cue, more, k, j, f"{verb} {verdict}", letter), letter


def make_record(kind: str, mixed: jigsaw.Mixed, args: Namespace, rng: random.Random) -> dict:
    """One record about a mixed picture, without `id` and `images`. kind: as on the command line."""
    name = args.question if kind == "questions" else rng.choice(QUESTIONS)
    text, fields, reason, letter = ask(mixed, name, rng)
    template = sample_template(args.format, rng)
    way = rng.choice(ASK[args.ask])
    form = template if rng.random() < args.follow else PLAIN
    # Every piece is a picture of its own: within one, some tiny models never find the piece that they are asked about.
    spoken = {"task": {"separate pieces": TASK}, "reply": {"template": way}}
    prompt = questions.write_prompt(mixed, text, "letter", fields, template, separate=True, words=spoken)
    further = ["asked-anew"] * (args.ask == "test") + ["look"] * (kind == "questions" and name == "look")
    if kind == "words":
        prompt, form = prompt.removesuffix(questions.ask_for(template, {"template": way}, "the letter")), PLAIN
    record = {
        "prompt": prompt.rstrip("\n"),
        "answer": fields["answer"],
        "answer_type": "letter",
        **fields,
        "think": False,
        "source": "-".join(["formats", args.format, *further]),
        "rows": mixed.rows,
        "cols": mixed.cols,
        "question": name,
        "order": mixed.order,
        "reply_format": template,
    }
    if kind == "questions":
        return record
    reply = {"form": form, "chosen": fill(form, reason, letter), "chosen_from": "formats", "corruption": None}
    return record | reply


def drill_record(rng: random.Random) -> dict:
    """Copy what the prompt shows; no picture, and nothing to be right about."""
    text = drill_text(rng)
    return {
        "prompt": rng.choice(ASK["train"]).format(form=text),
        "answer": "A",
        "answer_type": "letter",
        "options": ["A"],
        "think": False,
        "source": "formats-drill",
        "chosen": text,
        "chosen_from": "formats",
        "corruption": None,
    }


def write_formats(args: Namespace) -> Path:
    """Write what the command line says to OUT/records.jsonl, and pictures to OUT/images. ValueError for bad input."""
    if args.kind == "drill":
        records = []
        for index in tqdm(range(args.count), desc="drill", disable=None):
            name = f"drill-{args.seed}-{index:06d}"
            rng = random.Random(f"{args.seed} drill {index}")
            records.append({"id": name, "images": [], **drill_record(rng)})
        return jigsaw.write_lines(jigsaw.make_folder(args.out) / "records.jsonl", records)

    pictures, open_picture = jigsaw.open_source(
        args.out, scenes=args.scenes, size=args.size, split=args.split, seed=args.seed
    )
    folder = jigsaw.make_folder(args.out)
    records, saved = [], set()
    deal = random.Random(f"{args.split} {args.seed} deal")
    numbers = jigsaw.epoch_order(len(pictures), math.ceil(args.count / args.per_picture), deal)
    for index, number in enumerate(tqdm(numbers, desc=args.kind, disable=None)):  # None: a bar on terminals only
        rng = random.Random(f"{args.split} {args.seed} {args.kind} {index}")
        with jigsaw.errors_name(pictures[number]):
            mixed = jigsaw.mix(open_picture(pictures[number]), 2, 1, rng)
            paths = [jigsaw.save_image(shown, folder, saved) for shown in jigsaw.pictures_shown(mixed, True)]
            for _ in range(min(args.per_picture, args.count - len(records))):
                name = f"{args.kind}-{args.format}-{args.split}-{args.seed}-{len(records):06d}"
                records.append({"id": name, "images": paths, **make_record(args.kind, mixed, args, rng)})
    return jigsaw.write_lines(folder / "records.jsonl", records)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


# Flags that a kind does not read. Given all the same they are an error, not silence.
UNREAD = {
    "drill": ("format", "ask", "question", "follow", "scenes", "size", "per_picture", "split"),
    "words": ("format", "ask", "question", "follow"),
    "replies": ("question",),
    "questions": ("follow",),
}


def parse_args(argv: list[str] | None = None) -> Namespace:
    parser = jigsaw.Parser(__doc__)
    add = parser.add_argument
    add("kind", choices=["drill", "words", "replies", "questions"], help="what to write: see above")
    add("--count", metavar="N", type=jigsaw.integer("[1, 1e8]"), required=True, help="how many records")
    add("--out", metavar="DIR", required=True, help="gets records.jsonl and images/")
    add("--scenes", metavar="N", type=jigsaw.integer("[1, 1e7]"), default=1000, help="pictures (default %(default)s)")
    add("--size", type=jigsaw.integer("[28, 448]"), default=56, help="their side in pixels (default %(default)s)")
    add("--per-picture", metavar="N", type=jigsaw.integer("[1, 1e4]"), default=1,
        help="records on each picture (default %(default)s)")  # fmt: skip
    add("--format", choices=["any", "trained", *list(FORMATS)[1:]], default="any",
        help="asked for: any: the shapes and words of training; trained: <think> and <answer>; tags: tags with words "
        "held out; seen: other shapes of training, words held out; unseen: shapes and words held out "
        "(default %(default)s)")  # fmt: skip
    add("--ask", choices=list(ASK), default="train",
        help="in the ways of training, or in one held out (default %(default)s)")  # fmt: skip
    add("--question", choices=QUESTIONS, default="pair",
        help="of questions: where a piece was, or how it looks (default %(default)s)")  # fmt: skip
    add("--follow", type=jigsaw.real("[0, 1]"), default=1.0,
        help="share of the replies that have the format asked for (default %(default)s)")  # fmt: skip
    add("--split", choices=jigsaw.SPLITS, default="train", help="which scenes (default %(default)s)")
    add("--seed", type=jigsaw.integer("[0, 4294967295]"), default=0, help="fixes all of it (default %(default)s)")
    args = parser.parse_args(argv)
    for name in UNREAD[args.kind]:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} would not be read: {args.kind} has no use for it")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        path = write_formats(args)
    except ValueError as cause:
        jigsaw.Parser().error(jigsaw.one_line(cause))
    print(f"{args.count} records -> {path}")


if __name__ == "__main__":
    main()
