"""Puzzles from pictures: divide, mix, ask. Writes records.jsonl and the images.

The task is that of Jigsaw-R1 (arXiv 2505.23590); all prompts are our own words.

A picture is trimmed at the right and the bottom to a multiple of the grid, divided into rows x cols pieces, and the
pieces are mixed. Positions are numbered row by row from 1. QUESTIONS says what can be asked about the mixed picture:

    pair    where was the piece now at position k, relative to the piece now at j?     -> a letter (2 options, or 8)
    full    for every position: where was its piece before?                            -> a grid of rows*cols numbers

A new question is one function `ask_…` and one entry of that table.

Pictures come from a folder, opened as the trainer opens them (pictures.py). For the laptop demo they come from
toy/scenes.py (`--scenes`). Both are imported where they are needed, nothing else of this project is.

Legend: H, W height and width of a picture in pixels; n = rows*cols pieces, each h x w; k, j positions; `order[x]` is
the original position of the piece that is now at position x+1. Positions count from 1. `split` is "train", "test" or
"all", never what is done to a picture.
"""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

SPLITS = ("train", "test", "all")
SCENE_SIZE = 112  # pixels; the tiny model reads 28 x 28 of them as one token
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}

# ---------------------------------------------------------------------------------------------------------------------
# A mixed picture


class Mixed(NamedTuple):
    """What a question is asked about."""

    picture: Image.Image  # (rows*h) x (cols*w) pixels
    rows: int
    cols: int
    order: list[int]  # n original positions, see the legend


def pieces_of(picture: Image.Image, rows: int, cols: int) -> np.ndarray:
    """The pieces of a picture as they lie, row by row: (n, h, w, 3) uint8. Its size is a multiple of the grid."""
    h, w = picture.height // rows, picture.width // cols
    grid = np.asarray(picture).reshape(rows, h, cols, w, 3).swapaxes(1, 2)  # (rows, cols, h, w, 3)
    return grid.reshape(rows * cols, h, w, 3)


def mix(
    image: Image.Image,
    rows: int,
    cols: int,
    rng: random.Random,
    *,
    swap: float = 0.0,
    derange: bool = False,
) -> Mixed:
    """Trim, divide, mix. `swap` and `derange` as in `make_puzzle`; ValueError for an image too small for the grid."""
    if rows != cols and rng.random() < swap:
        rows, cols = cols, rows
    width, height = image.size
    if height < rows or width < cols:
        raise ValueError(
            f"an image {width} pixels wide and {height} high is too small for {rows} rows and {cols} columns"
        )
    # Whole pixels only: what does not fill a piece is lost at the right and the bottom, never resampled.
    h, w = height // rows, width // cols
    trimmed = image.convert("RGB").crop((0, 0, w * cols, h * rows))
    pieces = pieces_of(trimmed, rows, cols)

    order = list(range(1, rows * cols + 1))
    rng.shuffle(order)
    # Shuffling until nothing stays in place takes about e tries, and all such orders stay equally likely.
    while derange and any(original == position for position, original in enumerate(order, 1)):
        rng.shuffle(order)

    # Position x+1 gets piece order[x]: the answer to "where was it before" is the order itself, not its inverse.
    mixed = pieces[np.array(order) - 1].reshape(rows, cols, h, w, 3)
    pixels = mixed.swapaxes(1, 2).reshape(rows * h, cols * w, 3)
    return Mixed(Image.fromarray(pixels), rows, cols, order)


def hide_edges(mixed: Mixed, mask_ratio: float) -> Mixed:
    """Black out a frame: mask_ratio of a piece's side along the picture's edge and on every seam, half on each side.

    So the seams between neighbours no longer tell what fits (Jigsaw-R1's code does the same).
    """
    pixels = np.array(mixed.picture)
    for axis, parts in ((0, mixed.rows), (1, mixed.cols)):
        lines = np.moveaxis(pixels, axis, 0)  # a view: writing to it writes to rows, then to columns, of `pixels`
        side = len(lines) // parts
        band = int(side * mask_ratio)
        # The picture's own edges get the whole band; `[-band:]` would be everything when band is 0.
        lines[:band] = 0
        lines[len(lines) - band :] = 0
        for seam in range(side, len(lines), side):
            lines[seam - band // 2 : seam + band // 2] = 0
    return mixed._replace(picture=Image.fromarray(pixels))


# ---------------------------------------------------------------------------------------------------------------------
# Questions


LETTERS = "ABCDEFGH"  # as many as the longest list of options
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


class Question(NamedTuple):
    """One kind of question. What `ask` returns goes into the record, after the fields that all puzzles have."""

    summary: str  # for --help
    text: str  # for the prompt: {n} is the number of pieces, every other {name} a field that `ask` returns
    answer_type: str  # how rewards.py reads the reply
    ask: Callable[[Mixed, random.Random], dict]  # -> "answer", "options" if there are some, whatever else is known


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


def letter_fields(texts: tuple[str, ...], truth: str, k: int, j: int, rng: random.Random) -> dict:
    """Fields of a question about positions k and j with options in random order: the first is A, the second B, …"""
    options = rng.sample(texts, len(texts))  # all orders equally likely
    return {
        "answer": LETTERS[options.index(truth)],
        "options": options,
        # Not needed for the reward: for whoever reads the record, and for {pair[0]} in the question's text.
        "direction": truth,
        "pair": [k, j],
    }


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
}

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
# answer type -> what the prompt calls the answer; of any other type: "the answer"
ANSWER_WORDS = {"letter": "the letter", "grid": "the numbers"}


def count_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def task_sentences(rows: int, cols: int, framed: bool) -> str:
    """What was done to the picture, and how positions are counted."""
    text = (
        f"The picture was cut into {rows * cols} pieces ({count_noun(rows, 'row')}, {count_noun(cols, 'column')}) "
        "and the pieces were mixed. Positions are numbered row by row from 1."
    )
    if framed:
        text += " A black frame hides the edges of the pieces."
    return text


def write_prompt(mixed: Mixed, text: str, answer_type: str, fields: dict, form: str, framed: bool = False) -> str:
    """What was done and what is asked, then a line per option, then how to reply.

    text, answer_type, fields: see `Question`. form: a name in REPLY_FORMAT_SENTENCE.
    """
    task = task_sentences(mixed.rows, mixed.cols, framed)
    question = text.format(n=mixed.rows * mixed.cols, **fields)
    lines = [f"{task} {question}"]
    for letter, option in zip(LETTERS, fields.get("options", []), strict=False):
        lines.append(f"{letter}. {option}")
    lines.append(REPLY_FORMAT_SENTENCE[form].format(it=ANSWER_WORDS.get(answer_type, "the answer")))
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# One puzzle


# Also called by write_puzzles, before it looks at the first picture: a folder may hold 80,000.
def check_choices(
    rows: int,
    cols: int,
    question: str,
    reply_format: str | None,
    mask_ratio: float,
    swap: float,
) -> None:
    """Raise ValueError, with one line that says which choice is wrong."""
    if question not in QUESTIONS:
        raise ValueError(f"question {question!r} is not one of {', '.join(QUESTIONS)}")
    if reply_format is not None and reply_format not in REPLY_FORMAT_SENTENCE:
        raise ValueError(f"reply format {reply_format!r} is not one of {', '.join(REPLY_FORMAT_SENTENCE)}")
    if rows < 1 or cols < 1 or rows * cols < 2:
        raise ValueError(f"a grid of {rows}x{cols} has fewer than 2 pieces")
    if not 0 <= mask_ratio < 0.5:  # half a side from both ends would hide the whole piece
        raise ValueError(f"mask ratio {mask_ratio} is not in [0, 0.5)")
    if not 0 <= swap <= 1:
        raise ValueError(f"swap {swap} is not a probability")


def make_puzzle(
    image: Image.Image,
    rows: int,
    cols: int,
    question: str,
    rng: random.Random,
    think: bool = True,
    *,
    reply_format: str | None = None,
    mask_ratio: float = 0.0,
    swap: float = 0.0,
    derange: bool = False,
) -> tuple[Image.Image, dict]:
    """One puzzle: (mixed picture, record without `id` and `images`). The same state of rng gives the same puzzle.

    question      a name in QUESTIONS.
    think         True asks for <think> and <answer>, False for the bare answer. `reply_format`, if given, overrides it.
    mask_ratio    width of a black frame around picture and pieces, as a part of a piece's side; 0: none.
    swap          probability that rows and cols are exchanged if they differ (the paper: 0.5).
    derange       every piece moves. Otherwise any order, the original one included, is equally likely (paper).
    Raises ValueError for an unknown question or form, a grid of fewer than 2 pieces, an image too small for the grid.
    """
    check_choices(rows, cols, question, reply_format, mask_ratio, swap)
    mixed = mix(image, rows, cols, rng, swap=swap, derange=derange)
    mixed = hide_edges(mixed, mask_ratio)

    # The question is about the picture as the policy will see it, frame included.
    _, text, answer_type, ask = QUESTIONS[question]
    fields = ask(mixed, rng)

    # rewards.py reads `think` when there is no `reply_format`; a record says no more than it has to.
    form = reply_format or ("think" if think else "bare")
    record = {
        "prompt": write_prompt(mixed, text, answer_type, fields, form, framed=mask_ratio > 0),
        "answer": fields["answer"],
        "answer_type": answer_type,
        **fields,
        "think": form == "think",
        "source": f"jigsaw-{question}-{mixed.rows}x{mixed.cols}",
        "rows": mixed.rows,
        "cols": mixed.cols,
        "question": question,
        "order": mixed.order,
    }
    if reply_format is not None:
        record["reply_format"] = reply_format
    return mixed.picture, record


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def one_line(cause: Exception) -> str:
    return " ".join(str(cause).split()) or type(cause).__name__


def check_image(path: Path) -> None:
    """Cheap look at a file: its header, for some kinds its checksums. Pixels are read when the picture is used."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as cause:  # Pillow raises many kinds for broken files; all mean the same here
        raise ValueError(f"{path}: not a readable image ({one_line(cause)})") from cause


def list_pictures(folder: Path, split: str, test_fraction: float) -> list[Path]:
    """Image files of a folder and its subfolders that belong to the split, sorted by path.

    A hash of the file's content decides: copies of one picture are on the same side, whatever their names and the seed.
    Files without an image suffix are not looked at. Raises ValueError naming the file that is no image, or the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no image in {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    chosen = []
    for path in tqdm(files, desc="pictures", unit="file", disable=None):
        check_image(path)
        # The digest's first 8 bytes are a number in [0, 2**64), equally likely everywhere.
        digest = hashlib.sha256(path.read_bytes()).digest()
        number = int.from_bytes(digest[:8], "big")
        part = "test" if number < test_fraction * 2**64 else "train"
        if split in ("all", part):
            chosen.append(path)
    if not chosen:
        raise ValueError(f"no {split} image among the {len(files)} of {folder} (test fraction {test_fraction})")
    return chosen


def load_picture(path: Path, max_side: int | None) -> Image.Image:
    """RGB as the trainer will see it, shrunk so that neither side is longer than max_side pixels."""
    # Imported here, not above: puzzles from pictures somebody else opened need nothing of this project.
    from pictures import open_picture

    try:
        picture = open_picture(path)
    except Exception as cause:
        raise ValueError(f"not a readable image ({one_line(cause)})") from cause
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def open_source(
    out: str | Path,
    *,
    images: str | Path | None = None,
    scenes: int | None = None,
    size: int | None = None,
    max_side: int | None = None,
    split: str = "all",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[list[Path] | list[int], Callable[[Path | int], Image.Image]]:
    """(list of pictures, function that opens one of them). Pictures are paths, or seeds of scenes.

    images        folder of pictures, or
    scenes        how many distinct scenes to make.
    size          side of a scene in pixels; None: SCENE_SIZE.
    max_side      longest side of a picture from a folder in pixels; None: as it is.
    Raises ValueError for neither or both sources, and for an `out` whose puzzles the next run would take for pictures.
    """
    if (images is None) == (scenes is None):
        raise ValueError("give either a folder of images or a number of scenes")
    if images is not None:
        if Path(out).resolve().is_relative_to(Path(images).resolve()):
            raise ValueError(f"{out} lies inside {images}: the next run would take its puzzles for pictures")
        return list_pictures(Path(images), split, test_fraction), lambda path: load_picture(path, max_side)

    if scenes < 1:
        raise ValueError(f"{scenes} scenes are too few")
    # Imported here, not above: puzzles from a folder need nothing that the laptop demo invents.
    from toy.scenes import list_scenes, scene

    size = size or SCENE_SIZE
    return list_scenes(scenes, seed, split, test_fraction), lambda number: scene(random.Random(number), size)


def epoch_order(n: int, count: int, rng: random.Random) -> list[int]:
    """`count` picture numbers: all n in random order, then all again in a new one. A larger count only adds."""
    numbers = []
    while len(numbers) < count:
        numbers += rng.sample(range(n), n)
    return numbers[:count]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@contextmanager
def errors_name(picture: Path | int) -> Iterator[None]:
    """Put the picture in front of a ValueError raised inside: its path, or the seed of its scene."""
    try:
        yield
    except ValueError as cause:
        name = f"scene {picture}" if isinstance(picture, int) else str(picture)
        raise ValueError(f"{name}: {cause}") from cause


def make_folder(out: str | Path) -> Path:
    folder = Path(out)
    try:
        (folder / "images").mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ValueError(f"cannot make the folder {folder / 'images'}: {cause.strerror}") from cause
    if not os.access(folder / "images", os.W_OK):
        raise ValueError(f"cannot write into {folder / 'images'}")
    return folder


def save_image(picture: Image.Image, folder: Path, saved: set[str]) -> str:
    """Save once as PNG, named by its pixels: equal pictures share a file. Returns the path relative to the folder."""
    pixels = f"{picture.size}".encode() + picture.tobytes()
    # The size is part of the name's hash: the same bytes are other pictures at other sizes.
    path = f"images/{hashlib.sha256(pixels).hexdigest()[:20]}.png"
    if path not in saved:
        picture.save(folder / path)
        saved.add(path)
    return path


def write_lines(path: Path, records: list[dict]) -> Path:
    """One JSON object a line; written under another name and then renamed, so that a file that exists is whole."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
    return path


def write_puzzles(
    out: str | Path,
    count: int,
    *,
    rows: int = 2,
    cols: int = 1,
    question: str = "pair",
    think: bool = True,
    reply_format: str | None = None,
    swap: float = 0.5,
    mask_ratio: float = 0.0,
    derange: bool = False,
    split: str = "all",
    seed: int = 0,
    **source,
) -> Path:
    """Write `count` puzzles to out/records.jsonl and their images to out/images; returns the path of records.jsonl.

    `source` says where pictures come from: the further keywords of `open_source`, `images` or `scenes` among them. The
    other choices are those of `make_puzzle`. Raises ValueError for bad input, and then records.jsonl is not touched.
    """
    check_choices(rows, cols, question, reply_format, mask_ratio, swap)
    pictures, open_picture = open_source(out, split=split, seed=seed, **source)
    folder = make_folder(out)
    records, saved = [], set()
    # The order of pictures and each puzzle have generators of their own: a larger count leaves the first puzzles as
    # they are. The texts are seeds: another letter in them is another data set.
    numbers = epoch_order(len(pictures), count, random.Random(f"{split} {seed} deal"))
    for index, number in enumerate(tqdm(numbers, desc="puzzles", disable=None)):  # None: a bar on terminals only
        rng = random.Random(f"{split} {seed} puzzle {index}")
        with errors_name(pictures[number]):
            picture, record = make_puzzle(
                open_picture(pictures[number]),
                rows,
                cols,
                question,
                rng,
                think,
                reply_format=reply_format,
                mask_ratio=mask_ratio,
                swap=swap,
                derange=derange,
            )
        name = f"{record['source']}-{split}-{seed}-{index:06d}"
        path = save_image(picture, folder, saved)
        records.append({"id": name, "images": [path], **record})
    return write_lines(folder / "records.jsonl", records)


# ---------------------------------------------------------------------------------------------------------------------
# Command line (toy/primer.py writes other records about the same pictures and takes most flags from here)


class Parser(argparse.ArgumentParser):
    """training.Parser's twin: --help shows the file's docstring, no flag is abbreviated, an error is one line."""

    def __init__(self, doc: str = ""):
        super().__init__(
            usage="python %(prog)s [flags]",
            description=doc.strip(),
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        flag = ""
        for word in words:
            if word.startswith("--"):
                flag, equals, word = word.partition("=")
                if not equals:
                    continue
            problem = problem_of_name(word)
            if problem:
                self.error(f"argument {flag}: {problem}: {shown(word)}" if flag else f"{problem}: {shown(word)}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> None:
        one_line = " ".join(message.split())  # it may quote a flag's value
        self.exit(2, f"error: {printable(one_line)}\n")


def problem_of_name(text: str) -> str | None:
    """Why a word of a command line can be no number and no name of a file."""
    if not text:
        return "is empty"
    if text == "--":  # argparse would drop it
        return "is no value"
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # how Python reads bytes that are no UTF-8
        return "is not UTF-8"
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        return "holds a control character"
    if any(len(part.encode()) > 255 for part in text.split("/")):  # more than file systems take
        return "has a part of more than 255 bytes"
    return None


def printable(text: str) -> str:
    """Text with escapes for what a terminal cannot show."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shown(text: str) -> str:
    """A flag's value as an error message quotes it: its beginning, if it is long."""
    return printable(text if len(text) <= 60 else f"{text[:60]}…")


# Plain digits: Python's int and float also read spaces, underscores and the digits of all alphabets.
WRITTEN = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.I),
}


def number_in(interval: str, kind: type, what: str) -> Callable[[str], float]:
    """A flag's type: a number in an interval such as "[0, 0.5)"; a round bracket excludes the end."""
    low, high = (float(end) for end in interval[1:-1].split(","))

    def read(text: str) -> float:
        if not WRITTEN[kind].fullmatch(text):
            raise argparse.ArgumentTypeError(f"must be {what}, not {shown(text)}")
        try:
            value = kind(text)
        except ValueError:  # more digits than Python reads
            raise argparse.ArgumentTypeError(f"must lie in {interval}, not {shown(text)}") from None
        above = value >= low if interval[0] == "[" else value > low
        below = value <= high if interval[-1] == "]" else value < high
        if not (above and below):  # so is NaN
            raise argparse.ArgumentTypeError(f"must lie in {interval}, not {shown(text)}")
        if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            raise argparse.ArgumentTypeError(f"is too close to 0 for a float: {shown(text)}")
        return value

    return read


def integer(interval: str) -> Callable[[str], int]:
    return number_in(interval, int, "a whole number")


def real(interval: str) -> Callable[[str], float]:
    return number_in(interval, float, "a number")


def add_common_flags(parser: Parser) -> None:
    """Where pictures come from, how they are mixed, where the result goes."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="folder of pictures, subfolders included")
    source.add_argument(
        "--scenes", metavar="N", type=integer("[1, 1e7]"), help="no folder: make N distinct procedural scenes"
    )
    add = parser.add_argument
    add("--size", type=integer("[16, 4096]"), help=f"scenes only: side in pixels (default {SCENE_SIZE})")
    add("--max-side", type=integer("[1, 1e5]"), help="images only: shrink to this longest side in pixels (default: no)")
    add(
        "--split",
        choices=SPLITS,
        default="all",
        help="train and test share no picture, whatever the seed (default %(default)s)",
    )
    add(
        "--test-fraction",
        type=real("[0, 1]"),
        default=0.1,
        help="part of the pictures that is test (default %(default)s)",
    )
    add("--rows", type=integer("[1, 100]"), default=2, help="rows of the grid (default %(default)s)")
    add("--cols", type=integer("[1, 100]"), default=1, help="columns of the grid (default %(default)s)")
    add(
        "--swap",
        type=real("[0, 1]"),
        default=0.5,
        help="probability that rows and cols are exchanged if they differ (default %(default)s, the paper's; 0: never)",
    )
    add("--derange", action="store_true", help="every piece moves (default: any order, the original one included)")
    add(
        "--seed",
        type=integer("[0, 4294967295]"),
        default=0,
        help="the same seed writes the same bytes (default %(default)s)",
    )


def check_common_flags(parser: Parser, args: argparse.Namespace) -> None:
    """What no single flag can tell. A flag that nothing would read is a misunderstanding, so it is an error."""
    if args.rows * args.cols < 2:
        parser.error("--rows 1 --cols 1 is one piece: nothing to ask")
    if args.images and args.size is not None:
        parser.error("--size is for --scenes; --max-side shrinks images")
    if args.scenes and args.max_side is not None:
        parser.error("--max-side is for --images; --size sets the size of scenes")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `write_puzzles`, under the same names."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--count", metavar="N", type=integer("[1, 1e8]"), required=True, help="how many puzzles to write")
    add("--out", metavar="DIR", required=True, help="gets records.jsonl and images/")
    add_common_flags(parser)
    add(
        "--question",
        choices=list(QUESTIONS),
        default="pair",
        help="; ".join(f"{name}: {question.summary}" for name, question in QUESTIONS.items())
        + " (default %(default)s)",
    )
    add(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="ask for <think> and <answer> (the default), or for the bare answer",
    )
    add("--reply-format", choices=list(REPLY_FORMAT_SENTENCE), help="ask for this form, in place of --think/--no-think")
    add(
        "--mask-ratio",
        type=real("[0, 0.5)"),
        default=0.0,
        help="width of a black frame around picture and pieces, as a part of a piece's side (default 0: none)",
    )
    args = parser.parse_args(argv)
    check_common_flags(parser, args)
    if args.reply_format and args.think is not None:
        parser.error("give --reply-format or --think/--no-think, not both")
    args.think = args.think is not False
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        path = write_puzzles(**vars(args))
    except ValueError as cause:
        Parser().error(one_line(cause))
    print(f"{args.count} puzzles -> {path}")


if __name__ == "__main__":
    main()
