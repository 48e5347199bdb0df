"""The pictures of a record: files, or a puzzle that is made of a file when it is needed (`jigsaw.py --lazy`).

A lazy record names the photograph in `images` and says in `puzzle` what was done to it. The pixels are those that
jigsaw.py would have saved as PNG, so that 64,000 puzzles need no 32 GB of pictures. Whoever opens pictures of records
opens them here: encoder, samplers, report.

    describe, rebuild     what was done to a picture as plain fields, and the same pixels again from them
    pictures_of, open_puzzle, sizes_of     the pictures of a record

Legend: n = rows*cols pieces or regions. Sizes are (width, height) in pixels.
"""

import json
from typing import NamedTuple

from PIL import Image

from mixing import (
    Mixed,
    angles_of,
    arranged,
    central_square,
    hide_edges,
    pictures_shown,
    sheet_of,
    trim,
    view,
    with_holes,
    with_rectangles,
)
from pictures import MAX_IMAGE_PIXELS, RESAMPLE, PictureError, fitted, open_picture, picture_size

# ---------------------------------------------------------------------------------------------------------------------
# A puzzle as plain fields


def describe(mixed: Mixed, about: str, mask_ratio: float = 0.0, separate: bool = False) -> dict:
    """All that `rebuild` must know besides the picture, ready for JSON. about: as in `questions.Question`."""
    if about == "angles":
        return {"about": about, "angle": mixed.angle, "angles": len(mixed.angles)}
    puzzle = {"about": about, "rows": mixed.rows, "cols": mixed.cols, "order": mixed.order}
    if about != "pieces":
        puzzle["boxes"] = [list(box) for box in mixed.boxes]
    if about == "patches":
        puzzle["asked"] = mixed.asked
    # A record says no more than it has to.
    if mask_ratio:
        puzzle["mask_ratio"] = mask_ratio
    if separate:
        puzzle["separate"] = True
    return puzzle


def rebuild(image: Image.Image, puzzle: dict) -> list[Image.Image]:
    """The pictures of the puzzle that `describe` told of, made anew of its picture: the same pixels."""
    about = puzzle["about"]
    if about == "angles":
        return [view(central_square(image), puzzle["angle"], angles_of(puzzle["angles"]))]
    rows, cols, order = puzzle["rows"], puzzle["cols"], puzzle["order"]
    trimmed = trim(image, rows, cols)
    boxes = tuple(tuple(box) for box in puzzle.get("boxes", ()))
    patches = ()
    if about == "patches":
        picture, patches = with_holes(trimmed, boxes, order, puzzle["asked"])
    elif about == "rectangles":
        picture = with_rectangles(trimmed, boxes, order)
    else:
        picture = arranged(trimmed, rows, cols, order)
    mixed = Mixed(picture, rows, cols, order, boxes, patches)
    if "mask_ratio" in puzzle:
        mixed = hide_edges(mixed, puzzle["mask_ratio"])
    return pictures_shown(mixed, puzzle.get("separate", False))


def rebuilt_sizes(size: tuple[int, int], puzzle: dict) -> list[tuple[int, int]]:
    """The size of each picture that `rebuild` makes of a picture of this size; ValueError if that is too small."""
    width, height = size
    if puzzle["about"] == "angles":
        return [(min(size), min(size))]
    rows, cols, boxes = puzzle["rows"], puzzle["cols"], puzzle.get("boxes", [])
    w, h = width // cols, height // rows
    trimmed = w * cols, h * rows
    if not w or not h or any(x2 > trimmed[0] or y2 > trimmed[1] for _, _, x2, y2 in boxes):
        raise ValueError(f"{width} x {height} pixels are too few for its puzzle")
    separate = puzzle.get("separate", False)
    if puzzle["about"] == "pieces":
        return [(w, h)] * (rows * cols) if separate else [trimmed]
    if puzzle["about"] == "rectangles":
        return [trimmed]
    x1, y1, x2, y2 = boxes[0]
    patch = x2 - x1, y2 - y1
    if separate:
        return [trimmed] + [patch] * len(boxes)
    return [(trimmed[0], sheet_of(*trimmed, *patch, len(boxes))[1])]


# ---------------------------------------------------------------------------------------------------------------------
# Checks: a record may have been written by anybody

# about -> fields that must be there, and fields that may
FIELDS = {
    "pieces": ({"rows", "cols", "order"}, {"mask_ratio", "separate"}),
    "rectangles": ({"rows", "cols", "order", "boxes"}, set()),
    "patches": ({"rows", "cols", "order", "boxes", "asked"}, {"separate"}),
    "angles": ({"angle", "angles"}, set()),
}
OF_ALL = {"about", "max_side", "resample"}


def is_whole(value, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def check_puzzle(puzzle: dict) -> None:
    """Raise ValueError unless `open_puzzle` can make something of it."""
    about = puzzle.get("about")
    if not isinstance(about, str) or about not in FIELDS:
        raise ValueError(f'"about" must be one of {", ".join(FIELDS)}')
    needed, optional = FIELDS[about]
    for name in sorted(needed - puzzle.keys()):
        raise ValueError(f'"{name}" is missing')
    for name in sorted(puzzle.keys() - needed - optional - OF_ALL):
        raise ValueError(f'"{name:.40}" is no field of {about}')
    if puzzle.get("resample", "box") not in list(RESAMPLE):  # a list may be asked for what has no hash
        raise ValueError(f'"resample" must be one of {", ".join(RESAMPLE)}')
    if puzzle.get("max_side") is not None and not is_whole(puzzle["max_side"], 1, 10**5):
        raise ValueError('"max_side" must be a whole number of pixels, or null')
    if about == "angles":
        check_angles(puzzle["angles"], puzzle["angle"])
    else:
        check_grid(puzzle)


def check_angles(angles, angle) -> None:
    if not is_whole(angles, 2, 8) or 360 % angles:
        raise ValueError('"angles" must be 2, 3, 4, 5, 6 or 8')
    if not is_whole(angle, 0, 359) or angle not in angles_of(angles):
        raise ValueError(f'"angle" must be one of {", ".join(map(str, angles_of(angles)))}')


def check_grid(puzzle: dict) -> None:
    if not is_whole(puzzle["rows"], 1, 99) or not is_whole(puzzle["cols"], 1, 99):
        raise ValueError('"rows" and "cols" must be whole numbers from 1 to 99')
    n, order = puzzle["rows"] * puzzle["cols"], puzzle["order"]
    sound = isinstance(order, list) and len(order) == n and all(is_whole(place, 1, n) for place in order)
    if not sound or len(set(order)) < n:
        raise ValueError(f'"order" must be the numbers from 1 to {n}, in any order')
    if not is_whole(puzzle.get("asked", 1), 1, n):
        raise ValueError(f'"asked" must be a whole number from 1 to {n}')
    if not isinstance(puzzle.get("separate", False), bool):
        raise ValueError('"separate" must be true or false')
    ratio = puzzle.get("mask_ratio", 0.0)
    if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 0.5:
        raise ValueError('"mask_ratio" must lie in [0, 0.5)')

    if "boxes" not in puzzle:
        return
    boxes, sizes = puzzle["boxes"], set()
    if not isinstance(boxes, list) or len(boxes) != n:
        raise ValueError(f'"boxes" must be a list of {n}')
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4 or not all(is_whole(end, 0, 10**6) for end in box):
            raise ValueError('"boxes" must hold lists of 4 whole numbers')
        sizes.add((box[2] - box[0], box[3] - box[1]))
    if len(sizes) > 1 or min(min(sizes)) < 1:
        raise ValueError('"boxes" must be of one size, and not empty')


# ---------------------------------------------------------------------------------------------------------------------
# The pictures of a record


class Shown(NamedTuple):
    """One picture of a record, as caches know it: a file, or a picture of the puzzle that is made of it."""

    path: str
    puzzle: str = ""  # JSON; "": the file itself
    number: int = 0  # of the puzzle's pictures

    @property
    def whole(self) -> "Shown":
        """The same for all pictures of a puzzle: they are made together."""
        return self._replace(number=0)


def is_lazy(record: dict) -> bool:
    """A `puzzle` that is no object is a field of somebody else's, like any other."""
    return isinstance(record.get("puzzle"), dict)


def pictures_of(record: dict) -> list[Shown]:
    """The pictures of a record, in order."""
    if not is_lazy(record):
        return [Shown(path) for path in record["images"]]
    puzzle = json.dumps(record["puzzle"], sort_keys=True)
    return [Shown(path, puzzle, number) for number, path in enumerate(record["images"])]


def check_lazy(record: dict) -> None:
    """Raise ValueError if `images` and `puzzle` of a lazy record cannot be made pictures of."""
    try:
        check_puzzle(record["puzzle"])
    except ValueError as error:
        raise ValueError(f'"puzzle" cannot be made: {error}') from error
    n = len(record["puzzle"].get("order", []))
    extra = 1 if record["puzzle"]["about"] == "patches" else 0
    shows = n + extra if record["puzzle"].get("separate") else 1
    if len(record["images"]) != shows or len(set(record["images"])) != 1:
        raise ValueError(f'"images" must name the picture of its puzzle {"once" if shows == 1 else f"{shows} times"}')


def open_puzzle(shown: Shown, max_pixels: int = MAX_IMAGE_PIXELS) -> list[Image.Image]:
    """All pictures of a puzzle, or the one of a file, as RGB. max_pixels: as in `open_picture`. PictureError."""
    if not shown.puzzle:
        return [open_picture(shown.path, max_pixels)]
    puzzle = json.loads(shown.puzzle)
    image = open_picture(shown.path, max_pixels, puzzle.get("max_side"), puzzle.get("resample", "lanczos"))
    puzzle_sizes(shown.path, image.size, puzzle)  # it may be another picture by now
    return rebuild(image, puzzle)


def sizes_of(shown: Shown, max_pixels: int = MAX_IMAGE_PIXELS) -> list[tuple[int, int]]:
    """The sizes of what `open_puzzle` will give, from the file's header. PictureError."""
    size = picture_size(shown.path, max_pixels)
    if not shown.puzzle:
        return [size]
    puzzle = json.loads(shown.puzzle)
    return puzzle_sizes(shown.path, fitted(size, puzzle.get("max_side")), puzzle)


def puzzle_sizes(path: str, size: tuple[int, int], puzzle: dict) -> list[tuple[int, int]]:
    """`rebuilt_sizes`, with an error that names the file."""
    try:
        return rebuilt_sizes(size, puzzle)
    except ValueError as error:
        raise PictureError(f'image "{path}" has changed: {error}') from error
