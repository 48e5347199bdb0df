"""Files: how every stage opens what it is given, and writes what it leaves.

Reading takes ordinary files of a bounded size only: a pipe would hang a stage, and /dev/zero has no end. Writing goes
to a temporary name, onto the disk, and only then under the name that somebody reads: whoever opens a file finds all of
it or nothing, also after a power cut.
"""

import fcntl
import hashlib
import json
import os
import socket
import stat
from pathlib import Path


class DataError(Exception):
    """The user's input is wrong. `processes.run` prints the message as one line and exits with status 2."""


class StageError(RuntimeError):
    """The run cannot go on, and no input is to blame. `processes.run` prints one line and exits with status 1."""


LARGEST_TEXT = 2**32  # bytes of a JSONL file
LARGEST_JSON = 2**28  # bytes of any other file that is read at once

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def kind_of(path: str | Path) -> str:
    """What a path is, in words: "file", "directory", "nothing", or what else no stage can use."""
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    for name, test in KINDS.items():
        if test(mode):
            return name
    return "something unknown"


KINDS = {
    "file": stat.S_ISREG,
    "directory": stat.S_ISDIR,
    "pipe": stat.S_ISFIFO,
    "socket": stat.S_ISSOCK,
    "device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
}


def read_bytes(path: str | Path, largest: int = LARGEST_JSON) -> bytes:
    """The bytes of an ordinary file of at most `largest` bytes. DataError in every other case."""
    try:
        # Not to wait for a pipe's writer: opening one that nobody writes to would hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError(f"{path}: is a {kind_of(path)}, a file is needed")
            if status.st_size > largest:
                raise DataError(f"{path}: {status.st_size} bytes are too many, at most {largest} are read")
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_text(path: str | Path, largest: int = LARGEST_JSON) -> str:
    """The text of an ordinary UTF-8 file. DataError names it and the first byte that is none."""
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is no UTF-8 text ({error.reason} at byte {error.start})") from error


def read_json(path: str | Path) -> object:
    """What a JSON file says. DataError names the file and what is wrong with it."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error


def read_json_object(path: str | Path) -> dict:
    """A JSON file that holds an object. DataError otherwise."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: a JSON object is needed, this is {type(found).__name__}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def sync(path: str | Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, onto the disk, then rename it: whoever reads it finds all or nothing."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        # Without it a power cut may leave the new name on an empty file.
        os.fsync(file.fileno())
    partial.replace(path)
    sync(path.parent)


def check_output(path: str | Path, flag: str, inputs: dict[str, list] | None = None, directory: bool = False) -> None:
    """DataError unless a stage may write `path`: an ordinary file (or directory) or nothing yet, and no input of it.

    inputs: {flag: paths} of what the stage reads. A file that is replaced takes what lay under its name with it, so
    devices, pipes and links are refused too: /dev/stdout would become an ordinary file.
    """
    path, wanted = Path(path), "directory" if directory else "file"
    try:
        found = kind_of(path)
        if not directory and path.is_symlink():
            raise DataError(f"{flag} {path}: is a link; name the file it leads to")
        if found not in (wanted, "nothing"):
            raise DataError(f"{flag} {path}: is a {found}; a {wanted} is needed")
        # What is above it may be a file, too.
        above = next((folder for folder in path.absolute().parents if folder.exists()), None)
        if above is not None and not above.is_dir():
            raise DataError(f"{flag} {path}: {above} is no directory")
        for other, names in (inputs or {}).items():
            for name in names:
                if os.path.realpath(name) == os.path.realpath(path):
                    raise DataError(f"{flag} {path}: is what {other} reads; choose another place")
    except (OSError, ValueError) as error:
        raise DataError(f"{flag} {path}: cannot be written ({error})") from error


# ---------------------------------------------------------------------------------------------------------------------
# Digests


def digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. DataError if it cannot be read."""
    if kind_of(path) != "file":
        raise DataError(f"{path}: cannot be read (it is {kind_of(path)})")
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


SAMPLED = 2**20  # bytes of each piece that stands for a large file
PIECES = 64


def identity(path: str | Path) -> str:
    """A digest that tells two files apart without reading all of a large one.

    Above 64 MiB: the size and 64 pieces of 1 MiB, evenly spread. Training changes every weight, so every piece; a
    single flipped bit may hide between them (checkpoints, whose bits count, have whole digests).
    """
    size = os.path.getsize(path)
    if size <= SAMPLED * PIECES:
        return digest(path)
    total = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for piece in range(PIECES):
            file.seek((size - SAMPLED) * piece // (PIECES - 1))
            total.update(file.read(SAMPLED))
    return total.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Locks


def lock(path: str | Path, what: str) -> object:
    """Hold `path` as the sign that this process works on `what`, until it ends or the returned file is closed.

    DataError if another process holds it, with what that one wrote about itself. The operating system gives the lock
    back when the process ends, however it ends.
    """
    me = f"process {os.getpid()} on {socket.gethostname()}"
    file = open(path, "a+")  # noqa: SIM115, held for as long as the process works
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = " ".join(file.read(200).split()) or "unknown"
        if holder == me:  # it cannot disturb itself: it has one main thread
            return file
        file.close()
        raise DataError(f"{what}: another process is at work here ({holder}); wait for it, or end it") from None
    except OSError:
        # Some network disks have no locks. Better to work without one than not at all.
        return file
    file.truncate(0)
    file.write(me + "\n")
    file.flush()
    return file
