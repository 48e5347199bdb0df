"""Records: what the stages read and write, one JSON object a line, with errors that name file and line.

A record is one question (id, images, prompt, gold answer, …), a pair is a record with two replies; docs/formats.md
has the fields. Everything that can be wrong with a file is found here, before a model is loaded.
"""

import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from files import LARGEST_TEXT, DataError, read_bytes, write_text
from lazy_puzzles import Shown, check_lazy, is_lazy, open_puzzle, pictures_of, sizes_of
from pictures import MAX_IMAGE_PIXELS, PictureError

FIELDS = {  # of every record, and what each must be
    "id": str,
    "images": list,
    "prompt": str,
    "answer": object,
    "answer_type": str,
    "think": bool,
    "source": str,
}

# ---------------------------------------------------------------------------------------------------------------------
# JSON lines


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number, object) for every non-empty line of a JSONL file. DataError names file and line."""
    lines = read_bytes(path, LARGEST_TEXT).split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            # Half a surrogate pair is legal JSON, but no tokenizer takes it.
            json.dumps(row, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a JSON object is needed, this is {type(row).__name__}")
        yield number, row


def write_jsonl(path: str | Path, rows: list[dict]) -> None:
    """Write one JSON object a line, all or nothing. Keys that start with "_" are ours and are dropped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, jsonl_text(rows))


def jsonl_text(rows: list[dict]) -> str:
    """What write_jsonl writes."""
    lines = []
    for row in rows:
        public = {key: value for key, value in row.items() if not key.startswith("_")}
        lines.append(json.dumps(public, ensure_ascii=False) + "\n")
    return "".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Records


def read_records(
    paths: str | Path | list,
    check: Callable[[dict], None] | None = None,
    text_fields: tuple = (),
    skip_bad: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    world=None,
    decode: bool = True,
) -> list[dict]:
    """Read and validate records.jsonl files. Everything is checked, pictures included, before it returns.

    paths: one path or a list. check(record): raises ValueError with a cause when the stage cannot use the record
    (rewards.check_gold). text_fields: further fields that must be non-empty text ("chosen", "rejected" for pairs).
    skip_bad: leave out the records that `check` refuses, and say on stderr how many and why the first; every other
    mistake in a file still ends the run. max_image_pixels: the largest width x height of an image file. world: the
    processes that read the same files together; each looks at a part of the pictures and tells the others. decode:
    pictures are decoded wholly; False: their headers are read, and Encoder.prompt finds what is broken behind them.
    Returns a list of dicts; `images` holds absolute paths, `_where` is "file:line", `_sizes` the (width, height) of
    each picture. Raises DataError.
    """
    records = []
    first_seen = {}  # id -> where
    pictures = {}  # each picture, those of one puzzle as one -> where it is named first
    skipped = []  # "file:line: cause" of each record left out
    for path in [paths] if isinstance(paths, str | Path) else paths:
        before = len(records)
        for number, record in read_jsonl(path):
            where = f"{path}:{number}"
            check_fields(record, where, text_fields)
            if record["id"] in first_seen:
                raise DataError(f'{where}: id "{record["id"]}" stands already at {first_seen[record["id"]]}')
            first_seen[record["id"]] = where

            if check is not None:
                try:
                    check(record)
                except ValueError as error:
                    if not skip_bad:
                        raise DataError(f"{where}: {error}") from error
                    skipped.append(f"{where}: {error}")
                    continue

            folder = Path(path).parent
            record["images"] = [os.path.realpath(folder / name) for name in record["images"]]
            for shown in pictures_of(record):
                pictures.setdefault(shown.whole, where)
            records.append({**record, "_where": where})
        if len(records) == before:
            raise DataError(f"{path}: no records" + (f" left; {skipped[-1]}" if skipped else ""))
    if skipped and os.environ.get("RANK", "0") == "0":  # every rank reads the same
        print(f"skipped {len(skipped)} records: first {skipped[0]}", file=sys.stderr)

    sizes = check_pictures(pictures, max_image_pixels, world, decode)
    for record in records:
        record["_sizes"] = [sizes[shown.whole][shown.number] for shown in pictures_of(record)]
    return records


def check_fields(record: dict, where: str, text_fields: tuple) -> None:
    """Raise DataError unless every field of FIELDS is there and of its type, and prompt and images fit each other."""
    for name, kind in FIELDS.items():
        if name not in record:
            raise DataError(f'{where}: the field "{name}" is missing')
        if not isinstance(record[name], kind):
            found = json.dumps(record[name])[:60]
            raise DataError(f'{where}: "{name}" must be {kind.__name__}, it is {found}')
    for name in text_fields:
        if not isinstance(record.get(name), str) or not record[name].strip():
            found = json.dumps(record.get(name))[:60]
            raise DataError(f'{where}: the field "{name}" must be text, it is {found}')

    marks = record["prompt"].count("<image>")
    if marks not in (0, len(record["images"])):
        raise DataError(f"{where}: {marks} <image> markers in the prompt, {len(record['images'])} images")
    if not all(isinstance(name, str) and "\0" not in name for name in record["images"]):
        raise DataError(f'{where}: "images" must be a list of paths')
    if is_lazy(record):
        try:
            check_lazy(record)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error


def check_pictures(
    pictures: dict[Shown, str], max_pixels: int, world, decode: bool
) -> dict[Shown, list[tuple[int, int]]]:
    """{picture: the sizes of what it shows}. pictures: {picture: where it is named}. DataError for the first bad."""
    rank, ranks = (world.rank, world.size) if world else (0, 1)
    names = list(pictures)
    # Threads: what takes time is a slow disk, or decoding, which lets other threads run.
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda shown: size_or_problem(shown, max_pixels, decode), names[rank::ranks]))
    sizes = {}
    for part, everyone in enumerate(world.gather(found) if world else [found]):
        sizes |= zip(names[part::ranks], everyone, strict=True)
    for shown, where in pictures.items():
        if isinstance(sizes[shown], str):
            raise DataError(f"{where}: {sizes[shown]}")
    return sizes


def size_or_problem(shown: Shown, max_pixels: int, decode: bool) -> list[tuple[int, int]] | str:
    """The sizes of what a picture shows, or why it cannot be used."""
    try:
        sizes = sizes_of(shown, max_pixels)
        # A truncated file passes every shorter check.
        decoded = [image.size for image in open_puzzle(shown, max_pixels)] if decode else sizes
    except PictureError as error:
        return str(error)
    # The size in the header decides how many tokens a picture takes, long before it is decoded.
    if decoded != sizes:
        return f'image "{shown.path}" is broken (its header says {sizes}, its content is {decoded})'
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Order


def epoch_order(seed: int, size: int, start: int, count: int) -> list[int]:
    """Indices of the `count` samples from position `start` of an endless stream that shuffles `size` items each epoch.

    A pure function of its arguments, so a resumed run sees exactly the data an unbroken one would have seen.
    """
    shuffled = {}  # epoch -> its order
    indices = []
    for position in range(start, start + count):
        epoch, offset = divmod(position, size)
        if epoch not in shuffled:
            shuffled[epoch] = list(range(size))
            random.Random(f"{seed}/{epoch}").shuffle(shuffled[epoch])
        indices.append(shuffled[epoch][offset])
    return indices
