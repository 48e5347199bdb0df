"""The pictures of puzzles: a folder is listed and divided into train and test, files are opened, shrunk and saved.

Legend: `max_side` is the longest side of a picture in pixels; `split` is "train", "test" or "all".
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from PIL import Image
from tqdm import tqdm

from files import sync
from pictures import MAX_IMAGE_PIXELS, PictureError, open_picture, opened

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def one_line(cause: Exception) -> str:
    return " ".join(str(cause).split()) or type(cause).__name__


def check_image(path: Path, max_image_pixels: int = MAX_IMAGE_PIXELS) -> None:
    """Cheap look at a file: its header, for some kinds its checksums. Pixels are read when the picture is used."""
    try:
        with opened(path, max_image_pixels) as image:
            image.verify()
    except PictureError as cause:
        raise ValueError(str(cause)) from cause


def in_split(path: Path, split: str, test_fraction: float) -> bool:
    """Whether a picture belongs to the split: a hash of the file's content decides."""
    if split == "all":
        return True
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").digest()
    # The digest's first 8 bytes are a number in [0, 2**64), equally likely everywhere.
    number = int.from_bytes(digest[:8], "big")
    return split == ("test" if number < test_fraction * 2**64 else "train")


def list_pictures(
    folder: Path, split: str, test_fraction: float, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> list[Path]:
    """Image files of a folder and its subfolders that belong to the split, sorted by path.

    Copies of one picture are on the same side, whatever their names and the seed. Files without an image suffix are not
    looked at, nor is what is no regular file. Raises ValueError naming the file that is no image, or the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no image in {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    chosen = []
    for path in tqdm(files, desc="pictures", unit="file", disable=None):
        check_image(path, max_image_pixels)
        if in_split(path, split, test_fraction):
            chosen.append(path)
    if not chosen:
        raise ValueError(f"no {split} image among the {len(files)} of {folder} (test fraction {test_fraction})")
    return chosen


def load_picture(
    path: Path, max_side: int | None, resample: str = "lanczos", max_image_pixels: int = MAX_IMAGE_PIXELS
) -> Image.Image:
    """`pictures.open_picture`, with the errors of this file."""
    try:
        return open_picture(path, max_image_pixels, max_side, resample)
    except PictureError as cause:
        raise ValueError(str(cause)) from cause


# ---------------------------------------------------------------------------------------------------------------------
# Writing

JPEG_QUALITY = 95
PNG_LEVEL = 1  # of zlib's 9: three times faster than the usual 6, files 6 % larger
MOST_REMEMBERED = 100_000  # names of image files, so that memory does not grow with the number of puzzles
SUFFIXES = {"png": ".png", "jpeg": ".jpg"}


def partial_of(path: Path) -> Path:
    """Where a file is written before it is renamed. Each process has its own: two may write the same picture."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


@contextmanager
def all_or_nothing(path: Path, on_disk: bool = False) -> Iterator[IO[bytes]]:
    """A file that appears under its name when the block ends well, and not at all otherwise. OSError -> ValueError.

    on_disk: wait until a power cut cannot harm it. Not for every image: that would take longer than to make it.
    """
    unfinished = partial_of(path)
    try:
        with open(unfinished, "wb") as file:
            yield file
            if on_disk:
                file.flush()
                os.fsync(file.fileno())
        unfinished.replace(path)
        if on_disk:
            sync(path.parent)
    except OSError as cause:
        raise ValueError(f"cannot write {path}: {cause.strerror or cause}") from cause
    finally:
        unfinished.unlink(missing_ok=True)


def save_image(picture: Image.Image, folder: Path, saved: set[str], image_format: str = "png") -> str:
    """Save a picture once. Returns its path relative to the folder; `saved` holds those of this run.

    The name follows from what can be seen: equal pictures share a file.
    """
    content = None
    if image_format == "jpeg":
        content = named_by = encode(picture, image_format)
    else:
        # Pixels, not the file: zlib's next version may pack them otherwise. Sizes differ with the same pixels.
        named_by = f"{picture.size}".encode() + picture.tobytes()
    path = f"images/{hashlib.sha256(named_by).hexdigest()[:20]}{SUFFIXES[image_format]}"
    if path not in saved:
        with all_or_nothing(folder / path) as file:
            file.write(content or encode(picture, image_format))
        if len(saved) >= MOST_REMEMBERED:
            saved.clear()
        saved.add(path)
    return path


def encode(picture: Image.Image, image_format: str) -> bytes:
    buffer = io.BytesIO()
    if image_format == "jpeg":
        picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        picture.save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
