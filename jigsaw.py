"""Puzzles from pictures: mix, ask, write. Writes records.jsonl and the images.

    python jigsaw.py --images photos --max-side 448 --count 64000 --question pair --no-think --out data

The tasks are those of Jigsaw-R1 (arXiv 2505.23590) and, for patchfit, of PuzzleCraft (arXiv 2512.14944). What is done
to a picture is in mixing.py, what is asked about it and in which words in questions.py. This file makes one puzzle of a
picture (`make_puzzle`), and data sets of many, in parallel.

Pictures come from a folder, opened as the trainer opens them (picture_files.py). For the laptop demo they come from
toy/scenes.py (`--scenes`), which is imported only then.

Legend: a puzzle's `index` counts from 0, and everything about it follows from split, seed and index: the same command
writes the same bytes, whatever the number of processes. Positions in a picture count from 1. `split` is "train", "test"
or "all", never what is done to a picture.
"""

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw
from tqdm import tqdm

from lazy_puzzles import describe, open_puzzle, pictures_of, rebuilt_sizes
from mixing import (
    Ambiguous,
    Mixed,
    check_pieces,
    hide_edges,
    hide_patches,
    mix,
    pictures_shown,
    pieces_of,  # noqa: F401, toy/ asks this file for everything about puzzles
    swap_rectangles,
    turn,
)
from picture_files import (
    JPEG_QUALITY,
    SUFFIXES,
    all_or_nothing,
    list_pictures,
    load_picture,
    one_line,
    save_image,
)
from pictures import MAX_IMAGE_PIXELS, RESAMPLE
from questions import LETTERS, QUESTIONS, REPLY_FORMAT_SENTENCE, Choices, check_choices, read_words, write_prompt

SPLITS = ("train", "test", "all")
SCENE_SIZE = 112  # pixels; the tiny model reads 28 x 28 of them as one token
Picture = Path | int  # a file, or the seed of a scene

# ---------------------------------------------------------------------------------------------------------------------
# One puzzle


def change(image: Image.Image, choices: Choices, rng: random.Random) -> Mixed:
    """Do to the picture what the question is about. Raises as the functions of mixing.py do."""
    about = QUESTIONS[choices.question].about
    grid = (choices.rows, choices.cols, rng)
    if about == "angles":
        return turn(image, choices.angles, rng)
    if about == "patches":
        return hide_patches(image, *grid, swap=choices.swap)
    if about == "rectangles":
        return swap_rectangles(image, *grid, swap=choices.swap, derange=choices.derange)

    mixed = mix(image, *grid, swap=choices.swap, derange=choices.derange)
    check_pieces(mixed, choices.mask_ratio)
    return hide_edges(mixed, choices.mask_ratio) if choices.mask_ratio else mixed


def make_mixed(image: Image.Image, choices: Choices, rng: random.Random) -> tuple[Mixed, dict]:
    """One puzzle: (the mixed picture, record without `id` and `images`). The same state of rng gives the same puzzle.

    Raises ValueError for choices that cannot be and for an image too small for the grid; Ambiguous, a ValueError too,
    for an image with which the question has two right answers, such as two identical pieces.
    """
    check_choices(choices)
    # The question is about the picture as the policy will see it, frame included.
    mixed = change(image, choices, rng)
    question = QUESTIONS[choices.question]
    fields = question.ask(mixed, rng)

    # rewards.py reads `think` when there is no `reply_format`; a record says no more than it has to.
    form = choices.reply_format or ("think" if choices.think else "bare")
    words = choices.words or {}
    text = words.get("question", {}).get(choices.question, question.text)
    prompt = write_prompt(
        mixed,
        text,
        question.answer_type,
        fields,
        form,
        about=question.about,
        framed=choices.mask_ratio > 0,
        separate=choices.separate,
        dialogue=choices.dialogue,
        words=words,
    )
    record = {
        "prompt": prompt,
        "answer": fields["answer"],
        "answer_type": question.answer_type,
        **fields,
        "think": form == "think",
        "source": f"jigsaw-{choices.question}-{mixed.size}",
        "rows": mixed.rows,
        "cols": mixed.cols,
        "question": choices.question,
        "order": mixed.order,
    }
    if choices.reply_format is not None:
        record["reply_format"] = choices.reply_format
    return mixed, record


def make_pictures(image: Image.Image, choices: Choices, rng: random.Random) -> tuple[list[Image.Image], dict]:
    """As `make_mixed`, with the pictures that are shown."""
    mixed, record = make_mixed(image, choices, rng)
    return pictures_shown(mixed, choices.separate), record


def make_puzzle(
    image: Image.Image,
    rows: int,
    cols: int,
    question: str,
    rng: random.Random,
    think: bool = True,
    **options,
) -> tuple[Image.Image, dict]:
    """As `make_pictures`, for puzzles that are one picture. `options`: the further fields of `questions.Choices`."""
    choices = Choices(rows, cols, question, think, **options)
    if choices.separate:
        raise ValueError("separate pieces are several pictures: call make_pictures")
    (picture,), record = make_pictures(image, choices, rng)
    return picture, record


# ---------------------------------------------------------------------------------------------------------------------
# Which puzzles: one kind, a mixture of kinds, or a curriculum

SIZE = re.compile(r"([1-9][0-9]?)x([1-9][0-9]?)")


def read_size(text: str, choices: Choices) -> Choices:
    """`choices` with the size of a text: "2x1", or for questions about angles how many there are, "4"."""
    if QUESTIONS[choices.question].about == "angles":
        if not re.fullmatch("[0-9]", text):
            raise ValueError(f"{text!r:.40} is not a number of angles such as 4")
        return choices._replace(angles=int(text))
    found = SIZE.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r:.40} is not a size such as 2x1")
    return choices._replace(rows=int(found[1]), cols=int(found[2]))


def read_mixture(text: str, common: Choices) -> list[tuple[float, Choices]]:
    """"pair:2x1=0.5,rotation:4=1" -> [(weight, choices), …]. ValueError names the part that is wrong."""
    mixture = []
    for part in text.split(","):
        found = re.fullmatch(r"(\w+):(\w+)=([0-9.]+)", part)
        if not found:
            raise ValueError(f"{part!r:.60} is not question:size=weight, such as pair:2x1=0.5")
        question, size, weight = found.groups()
        if question not in QUESTIONS:
            raise ValueError(f"{part!r:.60}: {question!r:.40} is not one of {', '.join(QUESTIONS)}")
        try:
            value = float(weight)
        except ValueError:
            raise ValueError(f"{part!r:.60}: the weight is not a number") from None
        if not 0 < value < math.inf:
            raise ValueError(f"{part!r:.60}: the weight must be above 0")
        mixture.append((value, read_size(size, common._replace(question=question))))
    return mixture


def read_curriculum(text: str, count: int, common: Choices) -> list[tuple[int, Choices]]:
    """"2x1:64000,3x1" -> [(index of the first puzzle, choices), …]. The last stage lasts until `count`."""
    stages, start = [], 0
    parts = text.split(",")
    for number, part in enumerate(parts, 1):
        size, colon, length = part.partition(":")
        last = number == len(parts)
        if start >= count:
            raise ValueError(f"{part!r:.60} begins after {start} puzzles, and there are {count}")
        if not last and not colon:
            raise ValueError(f"{part!r:.60}: how many puzzles? Only the last stage takes the rest")
        if colon and not re.fullmatch("[1-9][0-9]{0,14}", length):
            raise ValueError(f"{part!r:.60}: {length!r:.40} is not a number of puzzles")
        stages.append((start, read_size(size, common)))
        start = start + int(length) if colon else count
    if start != count:
        raise ValueError(f"the stages have {start} puzzles, and --count is {count}")
    return stages


class Kinds(NamedTuple):
    """The choices of every puzzle. Of mixture and curriculum at most one has entries."""

    common: Choices
    mixture: list[tuple[float, Choices]]
    curriculum: list[tuple[int, Choices]]

    def check(self) -> None:
        """Raise ValueError for the first choice that cannot be."""
        listed = [choices for _, choices in self.mixture + self.curriculum]
        for choices in listed or [self.common]:
            check_choices(choices)

    def of(self, index: int, rng: random.Random) -> tuple[Choices, dict]:
        """(choices of a puzzle, what its record says about the place in the curriculum)."""
        if self.mixture:
            weights = [weight for weight, _ in self.mixture]
            kinds = [choices for _, choices in self.mixture]
            return rng.choices(kinds, weights)[0], {}
        if self.curriculum:
            stage = sum(start <= index for start, _ in self.curriculum)
            return self.curriculum[stage - 1][1], {"stage": stage}
        return self.common, {}


# ---------------------------------------------------------------------------------------------------------------------
# Where pictures come from

MOST_SCENES = 10_000_000


def load_scene(number: int, size: int) -> Image.Image:
    # Imported here, not above: puzzles from a folder need nothing that the laptop demo invents.
    from toy.scenes import scene

    return scene(random.Random(number), size)


def open_source(
    out: str | Path,
    *,
    images: str | Path | None = None,
    scenes: int | None = None,
    size: int | None = None,
    max_side: int | None = None,
    resample: str = "lanczos",
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    split: str = "all",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> tuple[list[Picture], Callable[[Picture], Image.Image]]:
    """(list of pictures, function that opens one of them). Pictures are paths, or seeds of scenes.

    images        folder of pictures, or
    scenes        how many distinct scenes to make.
    size          side of a scene in pixels; None: SCENE_SIZE.
    max_side      longest side of a picture from a folder in pixels; None: as it is. `resample`: see `load_picture`.
    Raises ValueError for neither or both sources, and for an `out` whose puzzles the next run would take for pictures.
    """
    if (images is None) == (scenes is None):
        raise ValueError("give either a folder of images or a number of scenes")
    if images is not None:
        folder, written = Path(images).resolve(), Path(out).resolve()
        if written.is_relative_to(folder):
            raise ValueError(f"{out} lies inside {images}: the next run would take its puzzles for pictures")
        if folder.is_relative_to(written / "images"):
            raise ValueError(f"{images} is where {out} keeps its puzzles: they would lie among the pictures")
        pictures = list_pictures(Path(images), split, test_fraction, max_image_pixels)
        settings = {"max_side": max_side, "resample": resample, "max_image_pixels": max_image_pixels}
        return pictures, partial(load_picture, **settings)

    if not 1 <= scenes <= MOST_SCENES:
        raise ValueError(f"{scenes} scenes: from 1 to {MOST_SCENES} can be listed")
    from toy.scenes import list_scenes

    return list_scenes(scenes, seed, split, test_fraction), partial(load_scene, size=size or SCENE_SIZE)


def endless_order(n: int, rng: random.Random) -> Iterator[int]:
    """Picture numbers without end: all n in random order, then all again in a new one."""
    while True:
        yield from rng.sample(range(n), n)


def epoch_order(n: int, count: int, rng: random.Random) -> list[int]:
    """The first `count` of `endless_order`. A larger count only adds."""
    return list(itertools.islice(endless_order(n, rng), count))


# ---------------------------------------------------------------------------------------------------------------------
# Many puzzles

@contextmanager
def errors_name(picture: Picture) -> Iterator[None]:
    """Put the picture in front of a ValueError raised inside: its path, or the seed of its scene."""
    try:
        yield
    except ValueError as cause:
        name = f"scene {picture}" if isinstance(picture, int) else str(picture)
        raise type(cause)(f"{name}: {cause}") from cause


def make_folder(out: str | Path, lazy: bool = False) -> Path:
    folder = Path(out)
    last = folder if lazy else folder / "images"
    try:
        last.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ValueError(f"cannot make the folder {last}: {cause.strerror}") from cause
    if not os.access(last, os.W_OK):
        raise ValueError(f"cannot write into {last}")
    # What a run that was killed (SIGKILL, power) had begun; one that still lives may go on.
    for unfinished in [*folder.glob("*.jsonl.*.partial"), *(folder / "images").glob("*.partial")]:
        writer = unfinished.suffixes[-2][1:]
        if writer.isdigit() and not is_alive(int(writer)):
            unfinished.unlink(missing_ok=True)
    return folder


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # somebody else's
    return True


def json_line(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def write_lines(path: Path, records: list[dict]) -> Path:
    """One JSON object a line, all or nothing."""
    with all_or_nothing(path, on_disk=True) as file:
        for record in records:
            file.write(json_line(record).encode("utf-8"))
    return path


TRIES = 1000  # pictures for one puzzle, before a folder counts as one of ambiguous pictures only
PER_PROCESS = 100  # fewer puzzles than this are made sooner than a process starts


class WorkerEnded(Exception):
    """A worker process ended before its work did: somebody killed it, or the machine ran out of memory."""


class Job(NamedTuple):
    """What every process needs to make its share."""

    folder: Path
    count: int
    kinds: Kinds
    pictures: list[Picture]
    open_picture: Callable[[Picture], Image.Image]
    split: str
    seed: int
    image_format: str
    lazy: dict | None = None  # how pictures were opened; with it no picture is saved, and records say how to make them


def make_record(job: Job, index: int, number: int, saved: set[str]) -> tuple[dict, int]:
    """(record of a puzzle, how many pictures were left out). number: of its picture, if the question suits that."""
    choices, stage = job.kinds.of(index, random.Random(f"{job.split} {job.seed} mix {index}"))
    # The order of pictures and each puzzle have generators of their own: a larger count leaves the first puzzles as
    # they are. The texts are seeds: another letter in them is another data set.
    rng = random.Random(f"{job.split} {job.seed} puzzle {index}")
    for left_out in range(TRIES):
        picture = job.pictures[number]
        try:
            with errors_name(picture):
                mixed, record = make_mixed(job.open_picture(picture), choices, rng)
            break
        except Ambiguous as cause:
            if left_out == TRIES - 1:
                raise ValueError(f"{TRIES} pictures in a row make the question ambiguous: {cause}") from cause
            number = rng.randrange(len(job.pictures))

    name = f"{record['source']}-{job.split}-{job.seed}-{index:06d}"
    if job.lazy is not None:
        puzzle = describe(mixed, QUESTIONS[choices.question].about, choices.mask_ratio, choices.separate) | job.lazy
        # Relative, so that photographs and records can move together.
        path = os.path.relpath(os.path.realpath(picture), os.path.realpath(job.folder))
        shown = len(rebuilt_sizes(mixed.picture.size, puzzle))
        return {"id": name, "images": [path] * shown, **record, **stage, "puzzle": puzzle}, left_out
    images = pictures_shown(mixed, choices.separate)
    paths = [save_image(image, job.folder, saved, job.image_format) for image in images]
    return {"id": name, "images": paths, **record, **stage}, left_out


def make_share(job: Job, share: int, shares: int) -> Iterator[tuple[str, int]]:
    """Make every shares-th puzzle, from number `share` on: (its line of records.jsonl, pictures left out)."""
    saved = set()
    order = endless_order(len(job.pictures), random.Random(f"{job.split} {job.seed} deal"))
    for index, number in zip(range(job.count), order, strict=False):
        if index % shares == share:
            record, left_out = make_record(job, index, number, saved)
            yield json_line(record), left_out


def serve_share(job: Job, share: int, shares: int, connection) -> None:
    """In a process of its own: send what `make_share` makes, at last the message of a ValueError."""
    try:
        for made in make_share(job, share, shares):
            connection.send(made)
    except ValueError as cause:
        connection.send(str(cause))
    except BrokenPipeError:
        pass  # whom it was for has ended


# A process that opens one picture after the other asks for the same few megabytes again and again. Pillow and glibc
# give them back to the system each time, and to get them anew, page by page, can take as long as decoding.
KEEP_MEMORY = {
    "PILLOW_BLOCKS_MAX": "16",
    "MALLOC_MMAP_THRESHOLD_": str(2**26),
    "MALLOC_TRIM_THRESHOLD_": str(2**28),
}


@contextmanager
def environment(**further: str) -> Iterator[None]:
    """Further variables in the environment that processes started inside inherit."""
    before = {name: os.environ.get(name) for name in further}
    os.environ.update(further)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def start_process(job: Job, share: int, shares: int) -> tuple:
    """-> (process, connection to read its share from)"""
    # A fresh interpreter: a fork of a process with threads, torch's for one, may hang.
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve_share, args=(job, share, shares, sender), daemon=True)
    # Ctrl-C reaches every process of a terminal. The children inherit that it is blocked, and are ended by this one.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        with environment(**KEEP_MEMORY):
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    sender.close()  # so that reading ends when the child does
    return process, receiver


def make_parallel(job: Job, workers: int) -> Iterator[tuple[str, int]]:
    """As `make_share` with one share, in the same order, made by `workers` processes.

    A pipe holds some 64 kB: a process that is ahead of the others waits, and memory stays bounded.
    """
    started = []
    try:
        for share in range(workers):
            started.append(start_process(job, share, workers))
        for index in range(job.count):
            process, receiver = started[index % workers]
            try:
                made = receiver.recv()
            except EOFError:
                process.join()
                raise WorkerEnded(f"a worker process ended with status {process.exitcode}") from None
            if isinstance(made, str):
                raise ValueError(made)
            yield made
    finally:
        for process, _ in started:
            process.terminate()
        for process, _ in started:
            process.join()
        # What a child was writing when it was ended.
        for process, _ in started:
            for unfinished in (job.folder / "images").glob(f"*.{process.pid}.partial"):
                unfinished.unlink(missing_ok=True)


def check_files(folder: Path, preview: str | Path | None, images: str | Path | None) -> None:
    """Raise ValueError if a file that will be written at the end cannot be."""
    if (folder / "records.jsonl").is_dir():
        raise ValueError(f"{folder / 'records.jsonl'} is a folder")
    if preview is None:
        return
    path = Path(preview)
    if path.suffix.lower() != ".png" or (path.exists() and not path.is_file()):
        raise ValueError(f"--preview {preview}: the name of a PNG file is needed")
    if not path.parent.is_dir():
        raise ValueError(f"--preview {preview}: there is no folder {path.parent}")
    inside = [folder / "images", *([images] if images else [])]
    if any(path.resolve().is_relative_to(Path(place).resolve()) for place in inside):
        raise ValueError(f"--preview {preview}: it would lie among the pictures")


def write_puzzles(
    out: str | Path,
    count: int,
    *,
    rows: int = 2,
    cols: int = 1,
    question: str = "pair",
    swap: float = 0.5,
    mixture: str | None = None,
    curriculum: str | None = None,
    prompts: str | Path | None = None,
    image_format: str = "png",
    lazy: bool = False,
    preview: str | Path | None = None,
    workers: int = 1,
    split: str = "all",
    seed: int = 0,
    **further,
) -> Path:
    """Write `count` puzzles to out/records.jsonl and their images to out/images; returns the path of records.jsonl.

    mixture, curriculum    texts as for --mix and --curriculum.
    prompts                a JSON file with other words.
    lazy                   save no images: records say how each puzzle is made of its photograph (lazy_puzzles.py).
    preview                a PNG file that gets the first puzzles with their answers.
    `further`: fields of `questions.Choices`, and keywords of `open_source`, `images` or `scenes` among them.
    Raises ValueError for bad input. records.jsonl is written last: without it nothing of the run counts.
    """
    chosen = {name: further.pop(name) for name in Choices._fields if name in further}
    words = read_words(prompts) if prompts else None
    common = Choices(rows, cols, question, swap=swap, words=words, **chosen)
    if mixture and curriculum:
        raise ValueError("give a mixture or a curriculum, not both")
    kinds = Kinds(
        common,
        read_mixture(mixture, common) if mixture else [],
        read_curriculum(curriculum, count, common) if curriculum else [],
    )
    kinds.check()
    check_files(Path(out), preview, further.get("images"))
    pictures, open_picture = open_source(out, split=split, seed=seed, **further)
    if lazy and further.get("images") is None:
        raise ValueError("lazy puzzles are made of the pictures of a folder")
    opened_by = {} if lazy else None
    if lazy and further.get("max_side"):
        opened_by = {"max_side": further["max_side"], "resample": further.get("resample", "lanczos")}
    folder = make_folder(out, lazy)
    job = Job(folder, count, kinds, pictures, open_picture, split, seed, image_format, opened_by)

    workers = max(1, min(workers, count // PER_PROCESS))
    made = make_share(job, 0, 1) if workers == 1 else make_parallel(job, workers)
    first, all_left_out = [], 0
    path = job.folder / "records.jsonl"
    with all_or_nothing(path, on_disk=True) as file:
        for line, left_out in tqdm(made, total=count, desc="puzzles", disable=None):  # None: a bar on terminals only
            file.write(line.encode("utf-8"))
            all_left_out += left_out
            if len(first) < ON_SHEET:
                first.append(json.loads(line))
        if preview:
            with all_or_nothing(Path(preview)) as sheet:
                contact_sheet(first, job.folder).save(sheet, "PNG")
    if all_left_out:
        print(f"left out {all_left_out} times a picture that would make its question ambiguous", file=sys.stderr)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# A contact sheet: the first puzzles with their answers, for a look before a long run

ON_SHEET = 24  # puzzles
SHEET_COLS = 6
THUMB = 160  # pixels a side
CAPTION = 46  # pixels below a picture: three lines of text


def tile(record: dict, folder: Path) -> Image.Image:
    """One puzzle of the sheet, (THUMB + CAPTION) x THUMB pixels: its pictures side by side, and the answer."""
    square = Image.new("RGB", (THUMB, THUMB + CAPTION), "white")
    across = math.ceil(math.sqrt(len(record["images"])))
    paths = [str(folder / name) for name in record["images"]]
    for number, shown_one in enumerate(pictures_of(record | {"images": paths})):
        picture = open_puzzle(shown_one)[shown_one.number]
        pen = ImageDraw.Draw(picture)
        if record["answer_type"] == "box":
            line = max(1, picture.width // 80)
            pen.rectangle(record["answer"], outline="lime", width=line)
            pen.rectangle(record["box"], outline="red", width=line)
        picture.thumbnail((THUMB // across, THUMB // across))
        row, col = divmod(number, across)
        square.paste(picture, (col * (THUMB // across), row * (THUMB // across)))

    answer = record["answer"]
    if isinstance(answer, list):
        answer = " ".join(map(str, answer))
    elif "options" in record:
        answer = f"{answer}. {record['options'][LETTERS.index(answer)]}"
    asked = next((f"{name} {record[name]}" for name in ("pair", "position", "box") if name in record), "")
    pen = ImageDraw.Draw(square)
    pen.multiline_text((2, THUMB + 2), f"{record['source']}\n{asked}\n{answer}", fill="black")
    return square


def contact_sheet(records: list[dict], folder: Path) -> Image.Image:
    """The puzzles in rows of SHEET_COLS. In a box question red is the box asked about, green the answer."""
    lines = math.ceil(len(records) / SHEET_COLS)
    sheet = Image.new("RGB", (SHEET_COLS * (THUMB + 8), lines * (THUMB + CAPTION + 8)), "white")
    for number, record in enumerate(records):
        row, col = divmod(number, SHEET_COLS)
        sheet.paste(tile(record, folder), (col * (THUMB + 8), row * (THUMB + CAPTION + 8)))
    return sheet


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
        line = " ".join(message.split())  # it may quote a flag's value
        self.exit(2, f"error: {printable(line)}\n")


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
        "--scenes",
        metavar="N",
        type=integer(f"[1, {MOST_SCENES}]"),
        help="no folder: make N distinct procedural scenes",
    )
    add = parser.add_argument
    add("--size", type=integer("[16, 4096]"), help=f"scenes only: side in pixels (default {SCENE_SIZE})")
    add(
        "--max-side",
        type=integer("[1, 1e5]"),
        help="images only: shrink to this longest side in pixels (default: no)",
    )
    add(
        "--resample",
        choices=list(RESAMPLE),
        help="images only: how --max-side shrinks. lanczos: sharpest (the default); box: means of pixels, three times "
        "faster, and large JPEG files are not decoded in full",
    )
    add(
        "--max-image-pixels",
        type=integer("[1, 1e9]"),
        help=f"images only: a picture with more ends the run (default {MAX_IMAGE_PIXELS})",
    )
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
    add("--rows", type=integer("[1, 99]"), help="rows of the grid (default 2)")
    add("--cols", type=integer("[1, 99]"), help="columns of the grid (default 1)")
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
    args.rows = 2 if args.rows is None else args.rows
    args.cols = 1 if args.cols is None else args.cols
    if args.rows * args.cols < 2:
        parser.error("--rows 1 --cols 1 is one piece: nothing to ask")
    if args.images and args.size is not None:
        parser.error("--size is for --scenes; --max-side shrinks images")
    if args.scenes and args.max_side is not None:
        parser.error("--max-side is for --images; --size sets the size of scenes")
    if args.scenes and (args.resample or args.max_image_pixels):
        parser.error("--resample and --max-image-pixels are for --images")
    args.resample = args.resample or "lanczos"
    args.max_image_pixels = args.max_image_pixels or MAX_IMAGE_PIXELS


def check_kind_flags(parser: Parser, args: argparse.Namespace) -> None:
    """--mix and --curriculum say what other flags say, too, and of --rows and --angles a question reads one."""
    given = {
        "--question": args.question is not None,
        "--rows": args.rows is not None,
        "--cols": args.cols is not None,
        "--angles": args.angles is not None,
    }
    kind = QUESTIONS[args.question or "pair"]
    if args.mixture:
        refused, why = list(given), "--mix names questions and sizes"
    elif args.curriculum:
        refused, why = ["--rows", "--cols", "--angles"], "--curriculum names sizes"
    elif kind.about == "angles":
        refused, why = ["--rows", "--cols"], f"{args.question} has --angles"
    else:
        refused, why = ["--angles"], f"{args.question or 'pair'} has --rows and --cols"
    for flag in refused:
        if given[flag]:
            parser.error(f"{flag} would not be read: {why}")
    args.question = args.question or "pair"
    args.angles = args.angles or 4


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of `write_puzzles`, under the same names."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--count", metavar="N", type=integer("[1, 1e9]"), required=True, help="how many puzzles to write")
    add("--out", metavar="DIR", required=True, help="gets records.jsonl and images/")
    add_common_flags(parser)
    add(
        "--question",
        choices=list(QUESTIONS),
        help="; ".join(f"{name}: {question.summary}" for name, question in QUESTIONS.items()) + " (default pair)",
    )
    add("--angles", type=integer("[2, 8]"), help="rotation only: how many evenly spaced angles (default 4)")
    add(
        "--mix",
        dest="mixture",
        metavar="LIST",
        help="questions, sizes and weights, such as pair:2x1=0.5,full:2x2=0.3,rotation:4=0.2 (default: one question)",
    )
    add(
        "--curriculum",
        metavar="LIST",
        help="sizes one after the other, and how many puzzles of each, such as 2x1:64000,3x1 (default: one size)",
    )
    add("--separate", action="store_true", help="pieces and patches as pictures of their own (default: one picture)")
    add(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="ask for <think> and <answer> (the default), or for the bare answer",
    )
    add(
        "--reply-format",
        metavar="NAME",
        help=f"ask for this form, in place of --think/--no-think: {', '.join(REPLY_FORMAT_SENTENCE)}, or a template "
        "such as '<plan>{reason}</plan><final>{answer}</final>'",
    )
    add("--dialogue", action="store_true", help="prompts begin a dialogue, for base models (default: no)")
    add("--prompts", metavar="FILE", help="a JSON file with other words for prompts (docs/formats.md; default: ours)")
    add(
        "--mask-ratio",
        type=real("[0, 0.5)"),
        default=0.0,
        help="width of a black frame around picture and pieces, as a part of a piece's side (default 0: none)",
    )
    add(
        "--format",
        dest="image_format",
        choices=list(SUFFIXES),
        help=f"of the images; jpeg has quality {JPEG_QUALITY} and is 20 times faster (default png)",
    )
    add(
        "--lazy",
        action="store_true",
        help="images only: save no pictures; each record says how its puzzle is made of its photograph, and whoever "
        "reads it makes it when it is needed (default: no)",
    )
    add("--preview", metavar="FILE.png", help=f"gets the first {ON_SHEET} puzzles with their answers (default: no)")
    add(
        "--workers",
        metavar="N",
        type=integer("[1, 256]"),
        default=os.cpu_count() or 1,
        help="processes; the bytes do not depend on it (default: as many as cores)",
    )
    args = parser.parse_args(argv)
    check_kind_flags(parser, args)
    check_common_flags(parser, args)
    if args.reply_format and args.think is not None:
        parser.error("give --reply-format or --think/--no-think, not both")
    args.think = args.think is not False
    if args.lazy and args.scenes:
        parser.error("--lazy is for --images")
    if args.lazy and args.image_format:
        parser.error("--format would not be read: --lazy saves no images")
    args.image_format = args.image_format or "png"
    return args


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, Ctrl-C ends the program with status 130 and SIGTERM with 143, after everything has been tidied up."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        with ended_by_signals():
            path = write_puzzles(**vars(args))
    except ValueError as cause:
        Parser().error(one_line(cause))
    except WorkerEnded as cause:
        Parser().exit(1, f"error: {one_line(cause)}\n")
    print(f"{args.count} puzzles -> {path}")


if __name__ == "__main__":
    main()
