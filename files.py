"""Files: the one way in (regular, bounded, UTF-8) and the one way out (all or nothing)."""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from records import DataError, write_text  # noqa: F401

MOST_BYTES = 2**32  # of a file that is read whole


def read_bytes(path: str | Path) -> bytes:
    """A regular file's bytes. DataError for what is missing, no regular file (it may never end), or too large."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: is no regular file")
        if status.st_size > MOST_BYTES:
            raise DataError(f"{path}: has {status.st_size} bytes, more than {MOST_BYTES}")
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_text(path: str | Path) -> str:
    """A UTF-8 text file. DataError as in read_bytes."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 ({error})") from error


def read_json(path: str | Path) -> object:
    """The JSON value in a file. DataError as in read_bytes."""
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not JSON ({error})") from error


def digest(path: str | Path) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def check_output(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """DataError unless a file can be written at `path` without destroying something that is no output of ours."""
    path = Path(path)
    if path.is_symlink():
        raise DataError(f"{path}: is a link; name the file itself")
    if path.is_dir():
        raise DataError(f"{path}: is a directory; name the file to write")
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: is a device or a pipe, no file")
    for given in inputs:
        if os.path.realpath(given) == os.path.realpath(path):
            raise DataError(f"{path}: is read as an input; name another file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: its folder cannot be made ({error})") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise DataError(f"{path}: its folder cannot be written")
