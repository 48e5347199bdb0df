r"""Importers: the published training sets of SPECS become records.jsonl. They are read from a local copy.

    python importers.py --set orsta --data Orsta-Data-47k/data/train-*.parquet --out data/orsta
    python importers.py --set virl39k --data ViRL39K/39Krelease.parquet --out data/virl39k
    python importers.py --set mm-eureka --data MM-Eureka/dataset.jsonl --out data/mm-eureka

    orsta      Orsta-47k (V-Triune, arXiv 2505.18129): parquet with the pictures inside
    virl39k    ViRL39K (VL-Rethinker, arXiv 2504.08837): parquet, and a folder of pictures beside it
    mm-eureka  MM-EUREKA (arXiv 2503.07365): JSON lines, and a folder of pictures

OUT gets images/ (each distinct picture once, named by its digest) and, at the end, records.jsonl and account.json: what
was left out, by cause. A copy that is not the published one is refused with what was expected and what was found. A
single question that cannot be scored by rule is left out and counted, never guessed at: several boxes, long free
answers, mathematics that cannot be read, a broken picture.

What is changed: a system prompt goes; the set's own words about the form of a reply go, ours take their place
(--reply-format); \boxed{} around a gold goes; a box on the scale 0 … 1000 becomes pixels. Nothing else.

Legend
row         a question as it is published; its number counts from 1 over all files
gold        its right answer; here a text, in the record what its answer type wants
described   a parquet type in Python: {"bytes": "binary"} is a struct, ["string"] a list
"""

import hashlib
import json
import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

import rewards
import training
from files import DataError, check_output, kind_of, read_bytes, write_text
from picture_files import encode, partial_of
from pictures import MAX_IMAGE_PIXELS, PictureError, open_picture, opened
from questions import ANSWER_WORDS, REPLY_FORMAT_SENTENCE
from records import jsonl_text, read_jsonl
from replies import closing_brace
from training import integer

MOST_CHARACTERS = 20_000  # of a question or a gold; published ones have a few hundred
MOST_WORDS = 10  # of a free answer that can be compared as text; the paper judges longer ones with a model
BATCH = 64  # rows in memory at a time


class LeftOut(Exception):
    """A row that gives no record. The message is the cause, the same text for all rows of one kind."""


class Row(NamedTuple):
    """A row of any set, with the names of all sets made equal."""

    id: str
    prompt: str  # the user's turn
    gold: str
    pictures: list[dict]  # {"bytes": …, "path": …}, one of them perhaps None
    source: str
    category: str
    boxes: str | None = None  # gold boxes: "pixels" or "thousandths" of the picture's sides; None: no box is asked for


# ---------------------------------------------------------------------------------------------------------------------
# The sets


def orsta_row(row: dict, number: int) -> Row:
    """Its puzzles stand there twice, so that rows have no name of their own but their number."""
    model = row["reward_model"] or {}
    located = model.get("verifier") == "detection"
    scale = (model.get("verifier_parm") or {}).get("det_verifier_normalized")
    return Row(
        id=f"orsta-{number:06d}",
        prompt=user_turn(row["prompt"]),
        gold=model.get("ground_truth") or "",
        pictures=[picture or {"bytes": None, "path": None} for picture in row["images"] or []],
        source=row["data_source"] or "orsta",
        category=row["ability"] or "",
        boxes=("thousandths" if scale else "pixels") if located else None,
    )


def virl_row(row: dict, number: int) -> Row:
    return Row(
        id=f"virl39k-{row['qid']}",
        prompt=row["question"] or "",
        gold=row["answer"] or "",
        pictures=[{"bytes": None, "path": path} for path in row["image"] or []],
        source=f"virl39k-{row['source'] or 'unknown'}",
        category=row["category"] or "",
    )


def eureka_row(row: dict, number: int) -> Row:
    return Row(
        id=f"mm-eureka-{number:06d}",
        prompt=user_turn(row["conversations"]),
        gold=row["answer"] or "",
        pictures=[{"bytes": None, "path": (url or "").removeprefix("file://")} for url in row["image_urls"] or []],
        source="mm-eureka",
        category="math",
    )


def user_turn(turns: list[dict] | None) -> str:
    """The one thing that the user says in a dialogue. LeftOut if there are more, or an assistant's turns."""
    spoken = [turn for turn in turns or [] if turn and turn["role"] != "system"]
    if len(spoken) != 1 or spoken[0]["role"] != "user":
        raise LeftOut("not one user's turn")
    return spoken[0]["content"] or ""


class Published(NamedTuple):
    """A set as its authors publish it. Columns that are not named here may be there too."""

    row: Callable[[dict, int], Row]
    columns: dict  # described
    rows: int | None  # in all files together; None: not stated
    stated: str = ""  # where


SETS = {
    "orsta": Published(
        orsta_row,
        columns={
            "data_source": "string",
            "images": [{"bytes": "binary", "path": "string"}],
            "prompt": [{"content": "string", "role": "string"}],
            "ability": "string",
            "reward_model": {
                "ground_truth": "string",
                "verifier": "string",
                "verifier_parm": {"det_verifier_normalized": "bool"},
            },
        },
        rows=47_766,
        stated="arXiv 2505.18129, table 5",
    ),
    "virl39k": Published(
        virl_row,
        columns={
            "qid": "string",
            "question": "string",
            "answer": "string",
            "image": ["string"],
            "source": "string",
            "category": "string",
        },
        rows=38_870,
        stated="the page of the set",
    ),
    "mm-eureka": Published(
        eureka_row,
        columns={
            "conversations": [{"role": "string", "content": "string"}],
            "answer": "string",
            "image_urls": ["string"],
        },
        rows=None,
    ),
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading a copy


def mismatch(expected, found, name: str) -> str | None:
    """Where a described type is not the expected one, in one line; None if it fits.

    Both are as in Published.columns; a list that was found may name several kinds. "null" fits all: no value is there.
    Fields that are not expected are not looked at.
    """
    if found == "null" or expected == found:
        return None
    if isinstance(expected, dict) and isinstance(found, dict):
        for field, kind in expected.items():
            if field not in found:
                there = ", ".join(found)[:200] or "none"
                return f"{name}.{field} is missing; there are {there}".removeprefix(".")
            problem = mismatch(kind, found[field], f"{name}.{field}".removeprefix("."))
            if problem:
                return problem
        return None
    if isinstance(expected, list) and isinstance(found, list):
        problems = (mismatch(expected[0], kind, name) for kind in found)
        return next(filter(None, problems), None)
    return f"{name} must be {in_words(expected)}, it is {in_words(found)}"


def in_words(described) -> str:
    if isinstance(described, list):
        return f"a list of {in_words(described[0])}" if described else "an empty list"
    return f"a struct of {', '.join(described)[:200]}" if isinstance(described, dict) else described


def described_type(kind) -> object:
    """A pyarrow type -> described."""
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return {field.name: described_type(field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return [described_type(kind.value_type)]
    return str(kind).removeprefix("large_")


def described_value(value) -> object:
    """A JSON value -> described."""
    if isinstance(value, dict):
        return {name: described_value(item) for name, item in value.items()}
    if isinstance(value, list):
        return [described_value(item) for item in value]
    return {str: "string", bool: "bool", type(None): "null"}.get(type(value), "a number")


def open_parquet(path: str):
    """A pyarrow ParquetFile of sound columns. DataError otherwise."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if kind_of(path) != "file":
        raise DataError(f"{path}: is a {kind_of(path)}, a parquet file is needed")
    try:
        with open(path, "rb") as file:
            if file.read(100).startswith(b"version https://git-lfs"):
                raise DataError(f"{path}: is the pointer that Git LFS puts in a file's place; fetch the file itself")
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: is no sound parquet file ({first_line(error)})") from error


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def check_copy(name: str, paths: list[str], part: bool) -> int:
    """The number of rows of all files. DataError unless their columns, types and rows are the published ones.

    part: the files are some of the set's, so that their rows are not counted against it.
    """
    published, total = SETS[name], 0
    for path in paths:
        if name == "mm-eureka":
            total += check_lines(path, published.columns)
            continue
        with open_parquet(path) as file:
            problem = mismatch(published.columns, described_type_of_schema(file.schema_arrow), "")
            if problem:
                raise DataError(f"{path}: is no file of {name}: {problem}")
            total += file.metadata.num_rows
    if published.rows is not None and total != published.rows and not part:
        raise DataError(
            f"{paths[0]}: {name} has {published.rows} rows ({published.stated}), these {len(paths)} file(s) have "
            f"{total}; --part takes a part of it"
        )
    return total


def described_type_of_schema(schema) -> dict:
    return {field.name: described_type(field.type) for field in schema}


def check_lines(path: str, columns: dict) -> int:
    """The number of lines of a JSONL file. DataError names the first whose fields are not those of `columns`."""
    count = 0
    for number, row in read_jsonl(path):
        try:
            problem = mismatch(columns, described_value(row), "")
        except RecursionError:
            problem = "it is nested too deeply"
        if problem:
            raise DataError(f"{path}:{number}: is no line of mm-eureka: {problem}")
        count += 1
    return count


def rows_of(name: str, path: str) -> Iterator[list[dict]]:
    """The rows of a file in batches, the columns that are needed. DataError if it turns out to be damaged."""
    if name == "mm-eureka":
        rows = [row for _, row in read_jsonl(path)]
        yield from (rows[start : start + BATCH] for start in range(0, len(rows), BATCH))
        return
    import pyarrow as pa

    with open_parquet(path) as file:
        try:
            for batch in file.iter_batches(BATCH, columns=list(SETS[name].columns)):
                yield batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: is damaged ({first_line(error)})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Questions


# What the sets' own words about the form of a reply name
MARK = re.compile(r"</?think>|</?answer>|\\boxed")
SENTENCE_END = re.compile(r"[.?!:]\s|\n")
HEADING = re.compile(r"\n[ \t]*Question:")


def question_of(prompt: str) -> str:
    r"""A prompt without words about the form of the reply. LeftOut if the question cannot be told from them.

    They are the sentence that names a tag or \boxed, and all behind it; or all in front of a heading "Question:".
    """
    first = MARK.search(prompt)
    if first is None:
        question = prompt
    elif (heading := last_match(HEADING, prompt)) and not MARK.search(prompt, heading.end()):
        question = prompt[heading.end() :]
    else:
        end = last_match(SENTENCE_END, prompt[: first.start()])
        question, removed = prompt[: end.end() if end else 0], prompt[end.end() if end else 0 :]
        if "?" in removed or "<image>" in removed:
            raise LeftOut("the question stands among words about the reply")
    if not question.replace("<image>", "").strip():
        raise LeftOut("no question")
    return question.strip()


def last_match(pattern: re.Pattern, text: str) -> re.Match | None:
    return next(iter(deque(pattern.finditer(text), maxlen=1)), None)


OPTION = re.compile(r"^[ \t]*[(\[]?([A-Z])[)\].:]+[ \t]*(\S[^\n]*)$", re.M)


def options_of(question: str) -> list[str]:
    """The options that a question lists, one a line, from A on; [] if it lists none in this plain way."""
    found = OPTION.findall(question)
    letters = "".join(letter for letter, _ in found)
    return [text.strip() for _, text in found] if len(found) > 1 and rewards.LETTERS.startswith(letters) else []


# ---------------------------------------------------------------------------------------------------------------------
# Golds


def unboxed(gold: str) -> str:
    r"""\boxed{4} -> 4. LeftOut if there are several, or one that is not closed."""
    start = gold.find("\\boxed{")
    if start < 0:
        return gold.strip()
    end = closing_brace(gold, start + len("\\boxed"))
    if end is None or gold.count("\\boxed") > 1:
        raise LeftOut("gold answer: several in boxes, or a box that is not closed")
    return gold[start + len("\\boxed{") : end].strip()


LETTER = re.compile(r"\(?([A-Z])\)?\.?")
SEVERAL_LETTERS = re.compile(r"[A-Z](?: ?(?:,|;|&|and) ?[A-Z])+")
# Without one of these a gold is a word or a name, to be compared letter by letter: "ABC" is no product.
MATHEMATICS = re.compile(r"[0-9\\+*/=<>^_{}√π°%]")


def typed(gold: str, question: str, category: str) -> dict:
    """answer_type, answer, and options where the question lists them. LeftOut if no rule can score the gold."""
    text = unboxed(gold)
    if not text:
        raise LeftOut("no gold answer")
    letter = LETTER.fullmatch(rewards.unwrap(text))
    if letter:
        options = options_of(question)
        return {"answer_type": "letter", "answer": letter[1]} | ({"options": options} if options else {})
    if SEVERAL_LETTERS.fullmatch(text):
        raise LeftOut("gold answer: several letters")
    if "count" in category and re.fullmatch("[0-9]{1,15}", text):
        return {"answer_type": "digit", "answer": int(text)}
    if MATHEMATICS.search(text) and is_scorable({"answer_type": "math", "answer": text}):
        return {"answer_type": "math", "answer": text}
    if "\\" in text:
        raise LeftOut("gold answer: mathematics that cannot be read")
    if "\n" in text or len(text.split()) > MOST_WORDS:
        raise LeftOut(f"gold answer: free text of more than {MOST_WORDS} words or one line")
    return {"answer_type": "text", "answer": text}


def is_scorable(record: dict) -> bool:
    try:
        rewards.check_gold(record)
    except ValueError:
        return False
    return True


BOX = re.compile(
    r"""\{\s*['"]bbox_2d['"]\s*:\s*\[([^\[\]]*)\]\s*,\s*['"]label['"]\s*:\s*(?:'[^']*'|"[^"]*")\s*\}""", re.S
)


def box_of(gold: str, scale: str, size: tuple[int, int]) -> list[float]:
    """[x1, y1, x2, y2] in pixels of a picture of this (width, height), of a gold that holds one box. LeftOut otherwise.

    The gold is written as Python or JSON: <answer>[{'bbox_2d': [1, 2, 3, 4], 'label': 'dog'}]</answer>. Its numbers are
    read by a grammar, nothing is evaluated.
    """
    text = gold.replace("<answer>", "").replace("</answer>", "").strip()
    boxes = BOX.findall(text)
    rest = BOX.sub("", text)
    if not boxes or re.sub(r"[\[\],\s]", "", rest):
        raise LeftOut("gold box: not as published")
    if len(boxes) > 1:
        raise LeftOut("gold box: several")
    numbers = rewards.read_numbers(boxes[0], 4)
    if numbers is None:
        raise LeftOut("gold box: not four numbers")
    limits = (1000, 1000) if scale == "thousandths" else size
    x1, y1, x2, y2 = numbers
    if not (0 <= x1 < x2 <= limits[0] and 0 <= y1 < y2 <= limits[1]):
        raise LeftOut("gold box: outside of the picture, or without area")
    return [round(number * side / limit, 1) for number, side, limit in zip(numbers, size * 2, limits * 2, strict=True)]


BOX_WORDS = (
    "The picture is {} pixels wide and {} high. Give the box as x1, y1, x2, y2: its upper left and its lower right "
    "corner, in pixels from the left and from the top, with commas between them."
)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

SUFFIXES = {"JPEG": ".jpg", "MPO": ".jpg", "JPEG2000": ".jp2", "TIFF": ".tif"}


class Saved(NamedTuple):
    """A picture in OUT/images, as a viewer shows it."""

    path: str  # relative to OUT; "" if it cannot be used
    size: tuple[int, int] = (0, 0)  # width, height


def read_picture(picture: dict, folder: Path, where: str) -> bytes:
    """The bytes of a row's picture. DataError if it names a file that is not there, or not in the folder."""
    if picture["bytes"] or not picture["path"]:
        return picture["bytes"] or b""  # what is empty is a broken picture
    given = picture["path"]
    shown = rewards.shown(given)
    name = os.path.normpath(os.path.relpath(given, folder) if os.path.isabs(given) else given)
    # By the names alone: where a link leads is up to whoever made it.
    if name == "." or name.split("/")[0] == ".." or "\0" in name:
        raise DataError(f"{where}: image {shown} is not a file in {folder} (see --images)")
    if kind_of(folder / name) != "file":
        raise DataError(f"{where}: image {shown} is missing (looked in {folder}, see --images)")
    return read_bytes(folder / name)


class Pictures:
    """The pictures of a set on their way into OUT/images. Each distinct file is looked at and saved once."""

    def __init__(self, out: Path, max_pixels: int | None, max_image_pixels: int):
        """max_pixels: larger ones are saved smaller, None: as they are. max_image_pixels: larger ones are broken."""
        self.out, self.max_pixels, self.max_image_pixels = out, max_pixels, max_image_pixels
        self.saved: dict[str, Saved] = {}  # digest of the file's bytes -> where it is
        self.pool = ThreadPoolExecutor(os.cpu_count() or 1)
        (out / "images").mkdir(parents=True, exist_ok=True)

    def save_all(self, contents: list[bytes]) -> list[Saved]:
        """Save what is not there yet, in parallel."""
        digests = [hashlib.sha256(content).hexdigest() for content in contents]
        new = {name: data for name, data in zip(digests, contents, strict=True) if name not in self.saved}
        self.saved |= zip(new, self.pool.map(self.save, new, new.values()), strict=True)
        return [self.saved[name] for name in digests]

    def save(self, name: str, content: bytes) -> Saved:
        """Save one file under the beginning of its digest, if it is a sound picture of at most max_image_pixels."""
        path = self.out / "images" / name[:20]
        unseen = partial_of(path)
        try:
            unseen.write_bytes(content)
            with opened(unseen, self.max_image_pixels) as image:
                suffix = SUFFIXES.get(image.format, f".{image.format.lower()}")
            picture = open_picture(unseen, self.max_image_pixels)  # decoded wholly: a truncated file is broken
            if self.max_pixels and picture.width * picture.height > self.max_pixels:
                picture = smaller(picture, self.max_pixels)
                suffix = ".jpg" if suffix == ".jpg" else ".png"
                unseen.write_bytes(encode(picture, {".jpg": "jpeg", ".png": "png"}[suffix]))
            unseen.replace(path.with_suffix(suffix))
            return Saved(f"images/{name[:20]}{suffix}", picture.size)
        except PictureError:
            return Saved("")
        finally:
            unseen.unlink(missing_ok=True)


def smaller(picture: Image.Image, max_pixels: int) -> Image.Image:
    """The same picture with at most max_pixels pixels."""
    scale = math.sqrt(max_pixels / (picture.width * picture.height))
    sides = [max(1, math.floor(side * scale)) for side in picture.size]
    return picture.resize(sides, Image.Resampling.LANCZOS)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def make_record(row: Row, saved: list[Saved], form: str) -> dict:
    """A record as in docs/formats.md. saved: its pictures; form: a name in REPLY_FORMAT_SENTENCE. LeftOut: why not."""
    if max(len(row.prompt), len(row.gold)) > MOST_CHARACTERS:
        raise LeftOut(f"question or gold answer of more than {MOST_CHARACTERS} characters")
    if not all(picture.path for picture in saved):
        raise LeftOut("image broken or too large")
    question = question_of(row.prompt)
    if question.count("<image>") not in (0, len(saved)):
        raise LeftOut("not one <image> marker for each image")
    if row.boxes is None:
        answer = typed(row.gold, question, row.category)
    elif len(saved) == 1:
        answer = {"answer_type": "box", "answer": box_of(row.gold, row.boxes, saved[0].size)}
        question += "\n" + BOX_WORDS.format(*saved[0].size)
    else:
        raise LeftOut("gold box: not one image")
    reply = REPLY_FORMAT_SENTENCE[form].format(it=ANSWER_WORDS.get(answer["answer_type"], "the answer"))
    record = {
        "id": row.id,
        "images": [picture.path for picture in saved],
        "prompt": f"{question}\n{reply}",
        **answer,
        "think": form == "think",
        "source": row.source,
        "category": row.category,
    }
    if form not in ("think", "bare"):
        record["reply_format"] = form
    if not is_scorable(record):
        raise LeftOut("gold answer: cannot be scored")
    return record


def read_row(name: str, published: dict, number: int) -> Row | LeftOut:
    try:
        return SETS[name].row(published, number)
    except LeftOut as cause:
        return cause


def batches_of(name: str, paths: list[str], limit: int) -> Iterator[tuple[Path, list[tuple[int, str, dict]]]]:
    """Yield (folder, [(row's number, "file: row 5", row)]) over all files; limit: rows in all, 0: every one."""
    number = 0
    for path in paths:
        in_file = 0
        for rows in rows_of(name, path):
            if limit:
                rows = rows[: limit - number]
            if not rows:
                return
            yield (
                Path(path).absolute().parent,
                [(number + place, f"{path}: row {in_file + place}", row) for place, row in enumerate(rows, 1)],
            )
            number, in_file = number + len(rows), in_file + len(rows)


def import_set(
    name: str, paths: list[str], out: Path, images: Path | None = None, *, form: str = "think", part: bool = False,
    limit: int = 0, max_pixels: int | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS,
) -> tuple[list[dict], dict[str, list[str]]]:  # fmt: skip
    """(records, {cause: ids of rows left out}) of a set's files; its pictures are written to `out`.

    images: the folder that pictures are named from; None: that of each file. DataError for a copy that is not the
    published one. The other arguments are the flags of the same names.
    """
    total = check_copy(name, paths, part)
    pictures = Pictures(out, max_pixels, max_image_pixels)
    records, left_out, where_of = [], {}, {}
    bar = tqdm(total=min(total, limit or total), desc=name, unit="row", disable=None)
    with pictures.pool, bar:
        for folder, batch in batches_of(name, paths, limit):
            rows = [read_row(name, published, number) for number, _, published in batch]
            contents = []  # of each row, the bytes of its pictures
            for row, (number, where, _) in zip(rows, batch, strict=True):
                if isinstance(row, LeftOut):
                    left_out.setdefault(str(row), []).append(f"{name}-{number:06d}")
                    continue
                if row.id in where_of:
                    raise DataError(f'{where}: id "{row.id}" stands already at {where_of[row.id]}')
                where_of[row.id] = where
                contents.append([read_picture(picture, images or folder, where) for picture in row.pictures])
            saved = iter(pictures.save_all([content for of_row in contents for content in of_row]))
            rows = [row for row in rows if isinstance(row, Row)]
            for row, of_row in zip(rows, contents, strict=True):
                try:
                    records.append(make_record(row, [next(saved) for _ in of_row], form))
                except LeftOut as cause:
                    left_out.setdefault(str(cause), []).append(row.id)
            bar.update(len(batch))
    return records, left_out


def account(records: list[dict], left_out: dict[str, list[str]]) -> dict:
    """What became of the rows: how many gave a record, of which type and source, and which were left out for what."""
    types = Counter(record["answer_type"] for record in records)
    sources = Counter(record["source"] for record in records)
    rows = len(records) + sum(map(len, left_out.values()))
    return {
        "rows": rows,
        "records": len(records),
        "answer_types": dict(types.most_common()),
        "sources": dict(sources.most_common()),
        "images": len({path for record in records for path in record["images"]}),
        "left_out": dict(sorted(left_out.items(), key=lambda item: -len(item[1]))),
    }


def summary(told: dict) -> str:
    """`account` in lines."""

    def line(count, what):
        return f"{count:7d}  {100 * count / told['rows']:5.1f} %  {what}"

    lines = [f"{told['rows']} rows, {told['images']} images", line(told["records"], "gave a record")]
    lines += [line(count, f"  of type {kind}") for kind, count in told["answer_types"].items()]
    lines += [line(len(ids), f"left out: {cause}") for cause, ids in told["left_out"].items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--set", dest="name", required=True, choices=list(SETS), help="which published set the files are")
    add("--data", required=True, nargs="+", metavar="FILE", help="its parquet files (mm-eureka: its JSON lines)")
    add("--images", metavar="DIR", help="the folder that its pictures are named from (default: that of each file)")
    add("--out", required=True, metavar="DIR", help="gets records.jsonl, images/ and account.json")
    add("--reply-format", default="think", choices=list(REPLY_FORMAT_SENTENCE),
        help="how the prompts ask for the reply, in our words")  # fmt: skip
    add("--part", action="store_true", help="the files are a part of the set: their rows are not counted against it")
    add("--limit", type=integer("[0, 1e9]"), default=0, help="read the first N rows only; 0: all")
    add("--max-pixels", type=integer("[784, 1e9]"), metavar="N",
        help="save larger pictures with at most N pixels: give the trainer's --max-pixels, so that a box in pixels "
        "means the picture it shows (default: all as they are)")  # fmt: skip
    add("--max-image-pixels", type=integer("[1, 1e9]"), default=MAX_IMAGE_PIXELS,
        help="width x height from which on a picture is not decoded: its questions are left out")  # fmt: skip
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    out = Path(args.out)
    for written in ("records.jsonl", "account.json"):
        check_output(out / written, "--out", {"--data": args.data})
    if args.images and kind_of(args.images) != "directory":
        raise DataError(f"--images {args.images}: is {kind_of(args.images)}, a directory is needed")

    records, left_out = import_set(
        args.name, args.data, out, Path(args.images) if args.images else None, form=args.reply_format, part=args.part,
        limit=args.limit, max_pixels=args.max_pixels, max_image_pixels=args.max_image_pixels,
    )  # fmt: skip
    told = account(records, left_out)
    print(summary(told) if told["rows"] else "no rows", flush=True)
    if not records:
        raise DataError(f"{args.data[0]}: no row gave a record, {out / 'records.jsonl'} is not written")
    write_text(out / "account.json", json.dumps({"set": args.name, **told}, indent=1) + "\n")
    write_text(out / "records.jsonl", jsonl_text(records))
    print(f"{out / 'records.jsonl'}: {len(records)} records written")


if __name__ == "__main__":
    training.run(main)
