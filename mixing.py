"""What is done to a picture before something is asked about it: mix its pieces, swap rectangles, hide patches, turn it.

The tasks are those of Jigsaw-R1 (arXiv 2505.23590), and PatchFit of PuzzleCraft (arXiv 2512.14944). Imports nothing
else of this project.

    mix              the pieces of a grid change places
    swap_rectangles  one rectangle in each region of a grid; they change places, the rest stays
    hide_patches     one patch in each region is hidden; the patches lie below the picture, in random order
    turn             the picture is turned by one of n angles

Each returns a `Mixed`, and raises ValueError for a picture that is too small, or `Ambiguous` for one about which the
question would have two right answers: another picture may do.

Legend: n = rows*cols pieces or regions, each h x w pixels. Positions are numbered row by row from 1. A box is (x1, y1,
x2, y2) in pixels of the mixed picture; x2 and y2 are the first pixels outside.
"""

import random
from typing import NamedTuple

import numpy as np
from PIL import Image

# Sides of a rectangle as parts of its region's sides. Jigsaw-R1: 10 to 60 %. A hidden patch of 10 % would show nothing.
RECTANGLE_SIDES = (0.1, 0.6)
PATCH_SIDES = (0.3, 0.6)
GAP = 8  # pixels between the picture and the patches below it, and between these
GREY, BLACK, WHITE = (128, 128, 128), (0, 0, 0), (255, 255, 255)

Box = tuple[int, int, int, int]


class Ambiguous(ValueError):
    """This picture would make the question ambiguous. Another one may do."""


class Mixed(NamedTuple):
    """What a question is asked about."""

    picture: Image.Image  # RGB
    rows: int
    cols: int
    order: list[int]  # order[x]: original position of the piece, rectangle or patch that is at position x+1 now
    boxes: tuple[Box, ...] = ()  # rectangles and patches: the n places, row by row
    patches: tuple[Image.Image, ...] = ()  # the n hidden patches, in the order in which they are shown
    asked: int = 0  # patches: position of the hole that is asked about
    angle: int = 0  # turn: degrees, clockwise
    angles: tuple[int, ...] = ()  # turn: all angles that could have been
    deranged: bool = False  # pieces: only orders in which nothing stays in place were possible

    @property
    def size(self) -> str:
        """How hard it is, for names: "2x1", or the number of angles."""
        return str(len(self.angles)) if self.angles else f"{self.rows}x{self.cols}"


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


def sample_grid(rows: int, cols: int, rng: random.Random, swap: float) -> tuple[int, int]:
    """(rows, cols), exchanged with probability `swap` if they differ."""
    if rows != cols and rng.random() < swap:
        return cols, rows
    return rows, cols


def trim(image: Image.Image, rows: int, cols: int) -> Image.Image:
    """RGB, without what does not fill a piece at the right and the bottom; the image itself if all does.

    ValueError if a piece would be empty.
    """
    width, height = image.size
    if height < rows or width < cols:
        raise ValueError(
            f"an image {width} pixels wide and {height} high is too small for {rows} rows and {cols} columns"
        )
    # Whole pixels only: what does not fill a piece is lost, never resampled.
    h, w = height // rows, width // cols
    picture = image if image.mode == "RGB" else image.convert("RGB")
    if (w * cols, h * rows) == picture.size:
        return picture
    return picture.crop((0, 0, w * cols, h * rows))


def pieces_of(picture: Image.Image, rows: int, cols: int) -> np.ndarray:
    """The pieces of a picture as they lie, row by row: (n, h, w, 3) uint8. Its size is a multiple of the grid."""
    h, w = picture.height // rows, picture.width // cols
    grid = np.asarray(picture).reshape(rows, h, cols, w, 3).swapaxes(1, 2)  # (rows, cols, h, w, 3)
    return grid.reshape(rows * cols, h, w, 3)


def shuffled(n: int, rng: random.Random, derange: bool) -> list[int]:
    """1 … n in random order; with `derange`, nothing stays in place."""
    order = list(range(1, n + 1))
    rng.shuffle(order)
    # Shuffling until nothing stays in place takes about e tries, and all such orders stay equally likely.
    while derange and any(original == position for position, original in enumerate(order, 1)):
        rng.shuffle(order)
    return order


def mix(
    image: Image.Image,
    rows: int,
    cols: int,
    rng: random.Random,
    *,
    swap: float = 0.0,
    derange: bool = False,
) -> Mixed:
    """Trim, divide, mix. `swap` and `derange` as in `questions.Choices`. Identical pieces are let pass: see `twins`."""
    rows, cols = sample_grid(rows, cols, rng, swap)
    trimmed = trim(image, rows, cols)
    order = shuffled(rows * cols, rng, derange)

    return Mixed(arranged(trimmed, rows, cols, order), rows, cols, order, deranged=derange)


def arranged(trimmed: Image.Image, rows: int, cols: int, order: list[int]) -> Image.Image:
    """The pieces of a trimmed picture, each in its new place."""
    h, w = trimmed.height // rows, trimmed.width // cols
    picture = Image.new("RGB", trimmed.size)
    for position, original in enumerate(order):
        # Position x+1 gets piece order[x]: the answer to "where was it before" is the order itself, not its inverse.
        row, col = divmod(original - 1, cols)
        piece = trimmed.crop((col * w, row * h, col * w + w, row * h + h))
        row, col = divmod(position, cols)
        picture.paste(piece, (col * w, row * h))
    return picture


def twins(pieces: np.ndarray | list[np.ndarray]) -> tuple[int, int] | None:
    """Positions of two identical pieces, or None. pieces: n arrays (h, w, 3)"""
    like = {}  # a few rows of a piece -> positions of the pieces that have them
    for position, piece in enumerate(pieces, 1):
        # A few rows tell most pieces apart; the rest is compared only where they agree.
        rows = piece[:: max(1, len(piece) // 4)].tobytes()
        for other in like.setdefault(rows, []):
            if np.array_equal(piece, pieces[other - 1]):
                return other, position
        like[rows].append(position)
    return None


def check_pieces(mixed: Mixed, mask_ratio: float) -> None:
    """Raise Ambiguous if two pieces are identical where no frame hides them."""
    if middles_differ(mixed, mask_ratio):
        return
    pieces = pieces_of(mixed.picture, mixed.rows, mixed.cols)
    top = int(pieces.shape[1] * mask_ratio)
    left = int(pieces.shape[2] * mask_ratio)
    visible = pieces[:, top : pieces.shape[1] - top, left : pieces.shape[2] - left]
    found = twins(visible)
    if found:
        raise Ambiguous(f"the pieces at positions {found[0]} and {found[1]} of the mixed picture are identical")


def middles_differ(mixed: Mixed, mask_ratio: float) -> bool:
    """Whether one line of pixels tells all pieces apart: it nearly always does, and spares a copy of the picture."""
    h, w = mixed.picture.height // mixed.rows, mixed.picture.width // mixed.cols
    left = int(w * mask_ratio)
    lines = set()
    for number in range(mixed.rows * mixed.cols):
        row, col = divmod(number, mixed.cols)
        x, y = col * w, row * h + h // 2  # no frame reaches the middle
        lines.add(mixed.picture.crop((x + left, y, x + w - left, y + 1)).tobytes())
    return len(lines) == mixed.rows * mixed.cols


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
# Rectangles and patches: one in each region of the grid, all of one size


def sample_boxes(
    picture: Image.Image, rows: int, cols: int, sides: tuple[float, float], rng: random.Random
) -> tuple[Box, ...]:
    """One box in each region, row by row. Width and height are parts of the region's, sampled from `sides` once."""
    h, w = picture.height // rows, picture.width // cols
    height = max(1, round(h * rng.uniform(*sides)))
    width = max(1, round(w * rng.uniform(*sides)))
    boxes = []
    for region in range(rows * cols):
        row, col = divmod(region, cols)
        x = col * w + rng.randint(0, w - width)
        y = row * h + rng.randint(0, h - height)
        boxes.append((x, y, x + width, y + height))
    return tuple(boxes)


def swap_rectangles(
    image: Image.Image, rows: int, cols: int, rng: random.Random, *, swap: float = 0.0, derange: bool = False
) -> Mixed:
    """One rectangle in each region, and they change places: at least two of them, with `derange` all."""
    rows, cols = sample_grid(rows, cols, rng, swap)
    trimmed = trim(image, rows, cols)
    boxes = sample_boxes(trimmed, rows, cols, RECTANGLE_SIDES, rng)
    parts = [trimmed.crop(box) for box in boxes]
    found = twins([np.asarray(part) for part in parts])
    if found:
        raise Ambiguous(f"the rectangles {boxes[found[0] - 1]} and {boxes[found[1] - 1]} are identical")

    order = shuffled(len(boxes), rng, derange)
    while order == sorted(order):  # nothing moved: nothing to ask
        order = shuffled(len(boxes), rng, derange)
    return Mixed(with_rectangles(trimmed, boxes, order), rows, cols, order, boxes)


def with_rectangles(trimmed: Image.Image, boxes: tuple[Box, ...], order: list[int]) -> Image.Image:
    """The picture, its rectangles in their new places."""
    parts = [trimmed.crop(box) for box in boxes]
    picture = trimmed.copy()
    for box, original in zip(boxes, order, strict=True):
        picture.paste(parts[original - 1], box)
    return picture


def hide_patches(image: Image.Image, rows: int, cols: int, rng: random.Random, *, swap: float = 0.0) -> Mixed:
    """A patch of each region is hidden, one hole is black and asked about, the other holes are grey.

    The decoys are the other hidden patches: if they could be seen elsewhere in the picture, the right patch would be
    the one that cannot, and nobody would have to look at what fits.
    """
    rows, cols = sample_grid(rows, cols, rng, swap)
    trimmed = trim(image, rows, cols)
    boxes = sample_boxes(trimmed, rows, cols, PATCH_SIDES, rng)
    parts = [trimmed.crop(box) for box in boxes]
    found = twins([np.asarray(part) for part in parts])
    if found:
        raise Ambiguous(f"the patches {boxes[found[0] - 1]} and {boxes[found[1] - 1]} are identical")

    order = shuffled(len(boxes), rng, derange=False)
    asked = rng.randint(1, len(boxes))
    picture, patches = with_holes(trimmed, boxes, order, asked)
    return Mixed(picture, rows, cols, order, boxes, patches, asked)


def with_holes(
    trimmed: Image.Image, boxes: tuple[Box, ...], order: list[int], asked: int
) -> tuple[Image.Image, tuple[Image.Image, ...]]:
    """(the picture with its holes, the patches in the order in which they are shown)."""
    picture = trimmed.copy()
    for position, box in enumerate(boxes, 1):
        picture.paste(BLACK if position == asked else GREY, box)
    return picture, tuple(trimmed.crop(boxes[original - 1]) for original in order)


def with_patches_below(mixed: Mixed) -> Image.Image:
    """The picture and, below it on white, the patches row by row: as many in a row as there is room for."""
    width, height = mixed.picture.size
    w, h = mixed.patches[0].size
    in_row, sheet_height = sheet_of(width, height, w, h, len(mixed.patches))
    sheet = Image.new("RGB", (width, sheet_height), WHITE)
    sheet.paste(mixed.picture)
    for number, patch in enumerate(mixed.patches):
        line, place = divmod(number, in_row)
        sheet.paste(patch, (place * (w + GAP), height + GAP + line * (h + GAP)))
    return sheet


def sheet_of(width: int, height: int, w: int, h: int, patches: int) -> tuple[int, int]:
    """(patches in a row, height of the whole) of a picture with patches of w x h pixels below it."""
    in_row = min(patches, max(1, (width + GAP) // (w + GAP)))
    lines = -(-patches // in_row)  # rounded up
    return in_row, height + lines * (GAP + h)


def pictures_shown(mixed: Mixed, separate: bool) -> list[Image.Image]:
    """The pictures of a puzzle: one, or with `separate` the pieces one by one, or a picture and its patches."""
    if mixed.patches:
        return [mixed.picture, *mixed.patches] if separate else [with_patches_below(mixed)]
    if separate:
        return [Image.fromarray(piece) for piece in pieces_of(mixed.picture, mixed.rows, mixed.cols)]
    return [mixed.picture]


# ---------------------------------------------------------------------------------------------------------------------
# Turning


def turned(square: Image.Image, angle: int) -> Image.Image:
    """A square picture turned clockwise. Quarter turns move whole pixels, other angles are resampled."""
    quarter_turns = {
        90: Image.Transpose.ROTATE_270,  # Pillow counts anticlockwise
        180: Image.Transpose.ROTATE_180,
        270: Image.Transpose.ROTATE_90,
    }
    if angle == 0:
        return square
    if angle in quarter_turns:
        return square.transpose(quarter_turns[angle])
    return square.rotate(-angle, resample=Image.Resampling.BICUBIC)


def disc(square: Image.Image) -> Image.Image:
    """A square picture with all black outside the circle that touches its sides."""
    side = square.width
    distance = np.arange(side) - (side - 1) / 2
    inside = distance[:, None] ** 2 + distance[None, :] ** 2 <= (side / 2) ** 2
    return Image.fromarray(np.asarray(square) * inside[:, :, None].astype(np.uint8))


def central_square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    return image.convert("RGB").crop((left, top, left + side, top + side))


def angles_of(count: int) -> tuple[int, ...]:
    """So many evenly spaced angles in degrees, 0 first."""
    return tuple(360 * number // count for number in range(count))


def view(square: Image.Image, angle: int, possible: tuple[int, ...]) -> Image.Image:
    """What is shown of a square picture turned by `angle`, one of the possible ones."""
    whole = all(other % 90 == 0 for other in possible)
    return turned(square, angle) if whole else disc(turned(square, angle))


def turn(image: Image.Image, angles: int, rng: random.Random) -> Mixed:
    """The picture turned by one of `angles` evenly spaced angles, 0 among them.

    Only the central square is shown, and of other angles than quarter turns only its disc: the shape of a whole
    picture, and the corners, would tell the angle without a look at what is in it.
    """
    square = central_square(image)
    possible = angles_of(angles)
    views = [view(square, angle, possible) for angle in possible]
    found = twins([np.asarray(view) for view in views])
    if found:
        same = f"{possible[found[0] - 1]} and {possible[found[1] - 1]}"
        raise Ambiguous(f"turned by {same} degrees the picture is identical")
    chosen = rng.randrange(angles)
    return Mixed(views[chosen], 1, 1, [1], angle=possible[chosen], angles=possible)
