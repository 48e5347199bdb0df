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
from itertools import repeat
from pathlib import Path

from files import LARGEST_TEXT, DataError, read_bytes, write_text
from pictures import MAX_IMAGE_PIXELS, PictureError, open_picture, picture_size

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
) -> list[dict]:
    """Read and validate records.jsonl files. Everything is checked, pictures included, before it returns.

    paths: one path or a list. check(record): raises ValueError with a cause when the stage cannot use the record
    (rewards.check_gold). text_fields: further fields that must be non-empty text ("chosen", "rejected" for pairs).
    skip_bad: leave out the records that `check` refuses, and say on stderr how many and why the first; every other
    mistake in a file still ends the run. max_image_pixels: the largest width x height of an image file.
    Returns a list of dicts; `images` holds absolute paths, `_where` is "file:line". Raises DataError.
    """
    records = []
    first_seen = {}  # id -> where
    pictures = {}  # absolute path -> where it is named first
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
            for name in record["images"]:
                pictures.setdefault(name, where)
            records.append({**record, "_where": where})
        if len(records) == before:
            raise DataError(f"{path}: no records" + (f" left; {skipped[-1]}" if skipped else ""))
    if skipped and os.environ.get("RANK", "0") == "0":  # every rank reads the same
        print(f"skipped {len(skipped)} records: first {skipped[0]}", file=sys.stderr)

    with ThreadPoolExecutor(8) as pool:
        for problem in pool.map(problem_with_picture, pictures, pictures.values(), repeat(max_image_pixels)):
            if problem:
                raise DataError(problem)
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


def problem_with_picture(path: str, where: str, max_pixels: int = MAX_IMAGE_PIXELS) -> str | None:
    """Why an image file cannot be used, or None. It is decoded wholly: a truncated file passes every shorter check."""
    try:
        size = open_picture(path, max_pixels).size
        # The size in the header decides how many tokens a picture takes, long before it is decoded.
        header = picture_size(path, max_pixels)
        if header != size:
            return f'{where}: image "{path}" is broken (its header says {header}, its content is {size})'
    except PictureError as error:
        return f"{where}: {error}"
    return None


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
