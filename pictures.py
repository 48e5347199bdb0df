"""Pictures: an image file becomes what a person sees in a viewer, or an error of one line.

Trainer, samplers and jigsaw.py open pictures here, so that all of them see the same. Nothing here knows a model.
"""

import math
import os
import stat
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from files import DataError

# Pillow reads fifty formats, some of them with programs it starts (EPS). These are the ones people keep pictures in.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# How a picture is shrunk. box: the mean of the pixels that fall together, and JPEG files are decoded at a half, a
# quarter or an eighth where that is enough: several times faster.
RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

MAX_IMAGE_PIXELS = 2**26  # 64 megapixels: RGB of 200 MB, more than any camera's picture of today that people train on

ORIENTATION = 0x0112  # the EXIF tag of a camera that was held sideways
# How the stored picture has to be turned to stand upright, in the cases of the Exif standard (1: as it is).
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)  # width and height change places


class PictureError(DataError):
    """An image file cannot be used. The message is one line that names the file and says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def open_picture(
    path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS, max_side: int | None = None, resample: str = "lanczos"
) -> Image.Image:
    """An image file as RGB, turned as its camera says; of an animation the first frame.

    max_pixels: the largest width x height that is decoded at all. max_side: the picture is shrunk until neither side is
    longer (pixels); None: as it is. resample: a name in RESAMPLE. Raises PictureError.
    """
    with opened(path, max_pixels) as image:
        size = fitted(header_size(image), max_side) if max_side else None
        if size and resample == "box":
            part = max(size) / max(image.size)
            image.draft(None, (math.ceil(image.width * part), math.ceil(image.height * part)))
        image.load()
        # After loading: a TIFF is turned by Pillow itself then, and says so.
        turn = TURNS.get(orientation(image))
        upright = image if turn is None else image.transpose(turn)
        if size in (None, upright.size):
            return as_seen(upright)
        # What is RGB already is not copied first.
        plain = upright.mode == "RGB" and "transparency" not in upright.info
        return (upright if plain else as_seen(upright)).resize(size, RESAMPLE[resample], reducing_gap=2.0)


def fitted(size: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """(width, height) shrunk, if need be, until neither is longer than max_side pixels; the shape stays."""
    longest = max(size)
    if max_side is None or longest <= max_side:
        return size
    width, height = (max(1, round(side * max_side / longest)) for side in size)
    return width, height


def picture_size(path: str | Path, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """(width, height) of what open_picture will give, from the file's header: no pixel is decoded. PictureError."""
    with opened(path, max_pixels) as image:
        return header_size(image)


def header_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as it will be shown, of a file that was opened and whose pixels were not read."""
    # The header of a TIFF is turned by Pillow already.
    turned = image.format != "TIFF" and orientation(image) in SIDEWAYS
    return (image.height, image.width) if turned else image.size


@contextmanager
def opened(path, max_pixels):
    """An image file whose header was read and found sound; PictureError for whatever goes wrong with it inside."""
    # Pillow warns of sizes and of odd metadata, once for every file; what matters is an error here.
    warnings.filterwarnings("ignore", module="PIL")
    # Its own bound would refuse what ours allows. Ours as its own also holds for pictures inside of files (ICO).
    Image.MAX_IMAGE_PIXELS = max_pixels
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        # Before anything is opened: a FIFO would wait for a writer, and a device never ends.
        kind = Path(path).stat().st_mode
        if not stat.S_ISREG(kind):
            what = "a folder" if stat.S_ISDIR(kind) else "a pipe or a device"
            raise PictureError(f'image "{path}" is broken (it is {what}, no file)')
        with Image.open(path, formats=known) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise PictureError(
                    f'image "{path}" has {width} x {height} pixels, more than --max-image-pixels {max_pixels}'
                )
            yield image
    except PictureError:
        raise
    except FileNotFoundError as error:
        raise PictureError(f'image "{path}" is missing') from error
    except Image.DecompressionBombError as error:
        # Twice the bound: Pillow itself refuses, before it says the size.
        raise PictureError(f'image "{path}" has far more pixels than --max-image-pixels {max_pixels}') from error
    except Image.UnidentifiedImageError as error:
        raise PictureError(f'image "{path}" is broken, or no image ({", ".join(known)} are read)') from error
    except Exception as error:
        # Pillow's readers raise whatever their parsing meets: struct.error, KeyError, OverflowError, zlib.error …
        cause = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f'image "{path}" is broken ({cause})') from error


def orientation(image: Image.Image) -> int:
    """How a picture is stored, 1 to 8 as in the Exif standard; 1 where its EXIF is missing or damaged."""
    try:
        # Pillow decodes a PNG to see what stands behind its pixels. Hardly ever is there anything.
        header_only = image.format == "PNG" and not notes_behind_pixels(image.filename)
        exif = Image.Image.getexif(image) if header_only else image.getexif()
        value = exif.get(ORIENTATION, 1)
    except Exception:
        # Viewers show a picture whose metadata they cannot read.
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def notes_behind_pixels(path: str) -> bool:
    """Whether a PNG file has metadata behind its pixels: its chunks are listed, not read."""
    pixels = False
    with open(path, "rb") as file:
        file.seek(8)  # the signature
        while len(head := file.read(8)) == 8:
            kind = head[4:]
            if pixels and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                return True
            pixels = pixels or kind == b"IDAT"
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)  # and a checksum
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Colours


def as_seen(image: Image.Image) -> Image.Image:
    """RGB of any mode: wide value ranges are scaled to 0 … 255, transparency lies on white.

    Pillow's own convert clips 16-bit values at 255 (a white picture), rounds fractions to 0 (a black one) and drops
    the alpha channel, so that whatever colour hides under full transparency appears.
    """
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(eight_bits(np.asarray(image, dtype=np.float64))).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of some range -> uint8. The range is the smallest usual one that holds them: 1, 255, 65535, or the
    largest value itself; what is negative or no number is black."""
    values = np.clip(np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0), 0.0, None)
    largest = float(values.max(initial=0.0))
    whole = bool((values == np.round(values)).all())
    # Fractions up to 1 are shares of white; whole numbers up to 1 are levels of a very dark picture.
    limits = (255.0, 65535.0) if whole else (1.0, 255.0, 65535.0)
    white = next((limit for limit in limits if largest <= limit), largest)
    return np.round(values * (255.0 / white)).astype(np.uint8)
