"""Puzzles from pictures: cut, mix, ask. Writes records.jsonl and the images (the task of Jigsaw-R1, arXiv 2505.23590).

A picture is trimmed at the right and the bottom to a multiple of the grid, cut into rows x cols pieces, and the
pieces are mixed. Positions are numbered row by row from 1. Two questions can be asked about the mixed picture:

    full    for every position: where was its piece before?                            -> a grid of rows*cols numbers
    pair    where was the piece now at position k, relative to the piece now at j?     -> a letter (2 options, or 8)

Pictures come from a folder, or from `scene`: procedural pictures, light at the top and dark at the bottom, warm at
the left and cool at the right, so that even a tiny model can find out where a piece belongs.

`--primer` writes something else: questions with replies, for the SFT that makes the demo's tiny base model. The
replies name truly what can be seen, take the asked form only now and then, and guess at puzzles: format and accuracy
are left to RL.

Legend: H, W picture height and width in pixels; n = rows*cols pieces, each h x w; `order[x]` is the original position
of the piece now at position x+1, and counts from 1. All prompts are our own words. Nothing else of the project is
imported.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

QUESTIONS = ("pair", "full")
LETTERS = "ABCDEFGH"
SPLITS = ("train", "test", "all")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm"}

# -------- the words

# How the reply must be written. {it} becomes "the letter" or "the numbers"; the names are those of rewards.py.
REPLY_FORMAT_SENTENCE = {
    "think": "Think inside <think> </think>, then give only {it} inside <answer> </answer>.",
    "bare": "Give only {it}, nothing else.",
    "tags": "Reason inside <reason> </reason>, then give only {it} inside <result> </result>.",
    "boxed": "Reason first, then end with {it} inside \\boxed{{ }}.",
    "json": 'Give one JSON object with the keys "reason" and "answer"; in "answer" give only {it}.',
    "line": 'Reason first, then end with a last line "Answer: " and {it}.',
}
ANSWER_WORDS = {"letter": "the letter", "grid": "the numbers"}

LINE_DIRECTIONS = {"column": ("above", "below"), "row": ("left", "right")}
GRID_DIRECTIONS = (
    "above",
    "below",
    "left",
    "right",
    "above and left",
    "above and right",
    "below and left",
    "below and right",
)

# cue -> (word for the piece that has more of it, word for the other), as "looks ..." and as the answer to a comparison
CUES = {
    "light": (("light", "dark"), ("lighter", "darker")),
    "warm": (("warm", "cool"), ("warmer", "cooler")),
}


def count_noun(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def task_sentences(rows: int, cols: int, framed: bool) -> str:
    """What was done to the picture, and how positions are counted."""
    return (
        f"The picture was cut into {rows * cols} pieces ({count_noun(rows, 'row')}, {count_noun(cols, 'column')}) "
        "and the pieces were mixed. Positions are numbered row by row from 1."
        + (" A black frame hides the edges of the pieces." if framed else "")
    )


def full_question(n: int) -> str:
    return (
        "For each position now, row by row: at which position was its piece before the mix? "
        f"The answer is {n} numbers, with spaces between them."
    )


def pair_question(k: int, j: int) -> str:
    return f"Before the mix, where was the piece now at position {k}, relative to the piece now at position {j}?"


def look_question(k: int, j: int) -> str:
    return f"How does the piece now at position {k} look, compared with the piece now at position {j}?"


def write_prompt(rows: int, cols: int, question: str, task: dict, form: str, framed: bool = False) -> str:
    """What was done and what is asked, then a line per option, then how to reply."""
    lines = [f"{task_sentences(rows, cols, framed)} {question}"]
    lines += [f"{letter}. {text}" for letter, text in zip(LETTERS, task.get("options", []), strict=False)]
    lines += [REPLY_FORMAT_SENTENCE[form].format(it=ANSWER_WORDS[task["answer_type"]])]
    return "\n".join(lines)


# -------- a puzzle


def make_puzzle(
    image: Image.Image,
    rows: int,
    cols: int,
    question: str,
    rng: random.Random,
    think: bool = True,
    *,
    reply_format: str | None = None,
    mask_ratio: float = 0.0,
    swap: float = 0.0,
    derange: bool = False,
) -> tuple[Image.Image, dict]:
    """One puzzle: (mixed picture, record without `id` and `images`). The same state of rng gives the same puzzle.

    question      "full" or "pair".
    think         True asks for <think> and <answer>, False for the bare answer. `reply_format`, if given, overrides it.
    mask_ratio    width of a black frame around picture and pieces, as a part of a piece's side; 0: none.
    swap          probability that rows and cols are exchanged if they differ (the paper: 0.5).
    derange       every piece moves. Otherwise any order, the original one included, is equally likely (paper).
    Raises ValueError for an unknown question or form, a grid of fewer than 2 pieces, an image too small for the grid.
    """
    check_choices(rows, cols, question, reply_format, mask_ratio, swap)
    puzzle, rows, cols, order = cut_and_mix(image, rows, cols, rng, swap=swap, derange=derange)
    puzzle = hide_edges(puzzle, rows, cols, mask_ratio)
    if question == "pair":
        text, task = ask_pair(rows, cols, order, *rng.sample(range(1, rows * cols + 1), 2), rng)
    else:
        text, task = ask_full(order)
    form = reply_format or ("think" if think else "bare")
    record = {
        "prompt": write_prompt(rows, cols, text, task, form, framed=mask_ratio > 0),
        **task,
        "think": form == "think",
        "source": f"jigsaw-{question}-{rows}x{cols}",
        "rows": rows,
        "cols": cols,
        "question": question,
        "order": order,
    }
    if reply_format is not None:
        record["reply_format"] = reply_format
    return puzzle, record


def check_choices(rows, cols, question, reply_format, mask_ratio, swap) -> None:
    """Raise ValueError, with one line that says which choice is wrong."""
    if question not in QUESTIONS:
        raise ValueError(f"question {question!r} is not one of {', '.join(QUESTIONS)}")
    if reply_format is not None and reply_format not in REPLY_FORMAT_SENTENCE:
        raise ValueError(f"reply format {reply_format!r} is not one of {', '.join(REPLY_FORMAT_SENTENCE)}")
    if rows < 1 or cols < 1 or rows * cols < 2:
        raise ValueError(f"a grid of {rows}x{cols} has fewer than 2 pieces")
    if not 0 <= mask_ratio < 0.5:  # half a side from both ends would hide the whole piece
        raise ValueError(f"mask ratio {mask_ratio} is not in [0, 0.5)")
    if not 0 <= swap <= 1:
        raise ValueError(f"swap {swap} is not a probability")


def cut_and_mix(image, rows, cols, rng, *, swap=0.0, derange=False) -> tuple[Image.Image, int, int, list[int]]:
    """Trim, cut, mix: (mixed picture, rows, cols, order). rows and cols come back because `swap` may exchange them."""
    if rows != cols and rng.random() < swap:
        rows, cols = cols, rows
    width, height = image.size
    if height < rows or width < cols:
        raise ValueError(
            f"an image {width} pixels wide and {height} high is too small for {rows} rows and {cols} columns"
        )
    h, w = height // rows, width // cols
    pieces = split_pieces(image.convert("RGB").crop((0, 0, w * cols, h * rows)), rows, cols)

    order = list(range(1, rows * cols + 1))
    rng.shuffle(order)
    while derange and any(original == position for position, original in enumerate(order, 1)):
        rng.shuffle(order)  # until nothing stays in place: about e tries, and uniform over all such orders

    mixed = pieces[np.array(order) - 1].reshape(rows, cols, h, w, 3)
    return Image.fromarray(mixed.swapaxes(1, 2).reshape(rows * h, cols * w, 3)), rows, cols, order


def hide_edges(puzzle: Image.Image, rows: int, cols: int, mask_ratio: float) -> Image.Image:
    """Black out a frame: mask_ratio of a piece's side along the picture's edge, and on every cut, half on each side.

    So the seams between neighbours no longer tell what fits (Jigsaw-R1's code does the same).
    """
    pixels = np.array(puzzle)
    for axis, parts in ((0, rows), (1, cols)):
        lines = np.moveaxis(pixels, axis, 0)  # a view: rows of pixels, or columns
        side = len(lines) // parts
        band = int(side * mask_ratio)
        lines[:band] = lines[len(lines) - band :] = 0
        for cut in range(side, len(lines), side):
            lines[cut - band // 2 : cut + band // 2] = 0
    return Image.fromarray(pixels)


def split_pieces(picture: Image.Image, rows: int, cols: int) -> np.ndarray:
    """The pieces of a picture as they lie, row by row: (n, h, w, 3) uint8. Its size is a multiple of the grid."""
    h, w = picture.height // rows, picture.width // cols
    return np.asarray(picture).reshape(rows, h, cols, w, 3).swapaxes(1, 2).reshape(rows * cols, h, w, 3)


def ask_full(order: list[int]) -> tuple[str, dict]:
    """(question, its part of the record)"""
    return full_question(len(order)), {"answer": list(order), "answer_type": "grid"}


def ask_pair(rows: int, cols: int, order: list[int], k: int, j: int, rng: random.Random) -> tuple[str, dict]:
    """(question about positions k and j, its part of the record)"""
    direction = relation(order[k - 1], order[j - 1], cols)
    options = shuffled(directions(rows, cols), rng)
    return pair_question(k, j), letter_task(options, direction, k, j)


def shuffled(texts: tuple[str, ...], rng: random.Random) -> list[str]:
    """The options in random order, all orders equally likely: the first is A, the second B, and so on."""
    return rng.sample(texts, len(texts))


def letter_task(options: list[str], truth: str, k: int, j: int) -> dict:
    return {
        "answer": LETTERS[options.index(truth)],
        "answer_type": "letter",
        "options": options,
        "direction": truth,
        "pair": [k, j],
    }


def directions(rows: int, cols: int) -> tuple[str, ...]:
    """The relations that two pieces of this grid can have: 2 in a single row or column, else 8."""
    if cols == 1:
        return LINE_DIRECTIONS["column"]
    return LINE_DIRECTIONS["row"] if rows == 1 else GRID_DIRECTIONS


def relation(first: int, second: int, cols: int) -> str:
    """Where position `first` lies, seen from position `second`; both count from 1, row by row."""
    (row, col), (other_row, other_col) = divmod(first - 1, cols), divmod(second - 1, cols)
    vertical = "above" if row < other_row else "below" if row > other_row else ""
    horizontal = "left" if col < other_col else "right" if col > other_col else ""
    return " and ".join(word for word in (vertical, horizontal) if word)


# -------- what can be seen, in words


def look(puzzle: Image.Image, rows: int, cols: int) -> dict[str, list[float]]:
    """Of each piece as it lies: "light", its mean luminance, and "warm", its mean red minus its mean blue (0..255)."""
    red, green, blue = split_pieces(puzzle, rows, cols).astype(np.float64).mean(axis=(1, 2)).T  # each (n,)
    return {"light": (0.299 * red + 0.587 * green + 0.114 * blue).tolist(), "warm": (red - blue).tolist()}


def reason_about(cue: str, more: bool, k: int, j: int, verdict: str, letter: str) -> str:
    """The one phrase of the primer: what both pieces look like, what is concluded, and at once the letter that says it.

    The letter stands right behind the verdict's last word on purpose: a model of a few layers looks a word up among the
    options from that very word within 100 updates, and from one token further on it does not in 1,000.
    """
    first, second = CUES[cue][0] if more else reversed(CUES[cue][0])
    return f"{k} looks {first}, {j} looks {second}. so {k} {verdict} {letter}."


# -------- replies


def render(reason: str, answer, reply_format: str) -> str:
    """A reply that is well-formed in one of the six forms. A list of numbers is written with spaces between."""
    answer = " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
    if reply_format == "think":
        return f"<think>{reason}</think><answer>{answer}</answer>"
    if reply_format == "bare":
        return answer
    if reply_format == "tags":
        return f"<reason>{reason}</reason><result>{answer}</result>"
    if reply_format == "boxed":
        return f"{reason} \\boxed{{{answer}}}"
    if reply_format == "json":
        return json.dumps({"reason": reason, "answer": answer})
    if reply_format == "line":
        return f"{reason}\nAnswer: {answer}"
    raise ValueError(f"reply format {reply_format!r} is not one of {', '.join(REPLY_FORMAT_SENTENCE)}")


# Near misses of the think form. None of them is well-formed in any of the six.
MALFORMED = {
    "no tags": "{reason} {answer}",
    "no think tags": "{reason}<answer>{answer}</answer>",
    "no answer tags": "<think>{reason}</think>{answer}",
    "no think end": "<think>{reason}<answer>{answer}</answer>",
    "no answer end": "<think>{reason}</think><answer>{answer}",
    "answer in words": "<think>{reason}</think>Answer: {answer}",
}


# -------- the primer


def primer_items(
    puzzle: Image.Image,
    rows: int,
    cols: int,
    order: list[int],
    count: int,
    rng: random.Random,
    follow: float = 0.4,
    reply_format: str | None = None,
) -> list[dict]:
    """`count` questions with replies about one mixed picture: objects of pairs.jsonl without `id` and `images`.

    A coin decides what is asked. A pair puzzle: the reason tells truly what both pieces look like, the verdict is
    drawn at random and the letter belongs to the verdict, so the reply is right by chance only. Or what can be seen
    (lighter or darker, warmer or cooler): the reply is right. `answer` is the true answer in both. Each question asks
    for `reply_format` or, without one, for any of the six, think twice as often. The reply has it with probability
    `follow`, else another one or a near miss of think, and `form` tells which. Raises ValueError if no two pieces
    differ in the cue that is needed.
    """
    measured = look(puzzle, rows, cols)
    formats = list(REPLY_FORMAT_SENTENCE)
    items = []
    for _ in range(count):
        # A column is told by its light, a row by its tint, a larger grid by either.
        cue = "light" if cols == 1 else "warm" if rows == 1 else rng.choice(list(CUES))
        k, j, more = draw_pair(measured[cue], cue, rng)
        question = rng.choice(("pair", "look"))
        if question == "pair":
            text, task = ask_pair(rows, cols, order, k, j, rng)
            verdict = rng.choice(task["options"])
            letter = LETTERS[task["options"].index(verdict)]
            reason = reason_about(cue, more, k, j, f"was {verdict}", letter)
        else:
            text, task = ask_look(cue, more, k, j, rng)
            letter = task["answer"]
            reason = reason_about(cue, more, k, j, f"is {task['direction']}", letter)

        asked = form = reply_format or rng.choice(["think", *formats])
        if rng.random() >= follow:
            form = rng.choice([name for name in (*formats, *MALFORMED) if name != asked])
        near_miss = MALFORMED.get(form)
        reply = near_miss.format(reason=reason, answer=letter) if near_miss else render(reason, letter, form)
        items.append(
            {
                "prompt": write_prompt(rows, cols, text, task, asked),
                **task,
                "think": asked == "think",
                "source": "primer",
                "rows": rows,
                "cols": cols,
                "question": question,
                "order": order,
                "reply_format": asked,
                "form": form,
                "chosen": reply,
                "chosen_from": "primer",
                "corruption": None,
            }
        )
    return items


def ask_look(cue: str, more: bool, k: int, j: int, rng: random.Random) -> tuple[str, dict]:
    """(plain question: is piece k lighter or darker, warmer or cooler, than piece j; its part of the record)"""
    words = CUES[cue][1]
    return look_question(k, j), letter_task(shuffled(words, rng), words[0] if more else words[1], k, j)


def draw_pair(values: list[float], cue: str, rng: random.Random) -> tuple[int, int, bool]:
    """Two positions, from 1, whose pieces differ in the cue, and whether the first has more of it."""
    n = len(values)
    pairs = [(k, j) for k in range(n) for j in range(n) if values[k] != values[j]]
    if not pairs:
        raise ValueError(f"all {n} pieces are equally {cue}: nothing true can be said")
    k, j = rng.choice(pairs)
    return k + 1, j + 1, values[k] > values[j]


# -------- scenes

# Sky, far land, near land (red, green, blue). Brightness and tint are set afterwards, so these give the hue.
PALETTES = (
    ((150, 195, 235), (120, 160, 120), (90, 150, 70)),  # summer
    ((240, 190, 150), (150, 120, 130), (140, 110, 70)),  # evening
    ((200, 215, 230), (150, 165, 185), (205, 210, 215)),  # winter
    ((170, 215, 215), (90, 140, 150), (60, 120, 140)),  # sea
    ((235, 215, 170), (200, 160, 110), (205, 165, 95)),  # desert
    ((190, 170, 225), (120, 100, 150), (90, 110, 90)),  # violet dusk
)


def scene(rng: random.Random, size: int = 112) -> Image.Image:
    """A procedural picture of size x size pixels: sky, sun, clouds, hills, trees, houses, grain.

    Whatever is drawn, mean luminance falls strip by strip from top to bottom, and red minus blue from left to right,
    for up to 4 strips. Base brightness, tint and the strength of both slopes differ from scene to scene: comparing two
    pieces always tells which was higher, one piece alone tells its place in a 2x1 puzzle, less so on finer grids.
    """
    pixels = np.asarray(draw_landscape(rng, size), dtype=np.float32)  # (H, W, 3)
    # RandomState, not default_rng: numpy promises that its stream never changes, so neither do the scenes.
    noise = np.random.RandomState(rng.getrandbits(32))
    pixels = pixels + texture(noise, size, strength=rng.uniform(4, 8))[:, :, None]

    slope = np.linspace(0.5, -0.5, size, dtype=np.float32)
    light = rng.uniform(122, 148) + rng.uniform(75, 115) * slope  # (H,), luminance
    warm = rng.uniform(-12, 12) + rng.uniform(55, 90) * slope  # (W,), red minus blue

    # Bring the mean of every row and column to these lines. The means are smoothed, so that objects leave no stripes,
    # and the contrast within a row is calmed, so that little is clipped at 0 and 255.
    luminance = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W)
    calm = 0.7 * (luminance - smooth(luminance.mean(axis=1), size // 4)[:, None])
    pixels += (light[:, None] + calm - luminance)[:, :, None]
    shift = (warm - smooth((pixels[:, :, 0] - pixels[:, :, 2]).mean(axis=0), size // 4)) / 2
    pixels[:, :, 0] += shift
    pixels[:, :, 2] -= shift
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Moving mean over `width` neighbours; the ends repeat. (S,) -> (S,)"""
    width |= 1  # odd, so that the window is centred
    return np.convolve(np.pad(values, width // 2, mode="edge"), np.ones(width, dtype=np.float32) / width, mode="valid")


def texture(noise: np.random.RandomState, size: int, strength: float) -> np.ndarray:
    """Grain at two scales, (H, W), about `strength` luminance levels either way."""
    fine = noise.standard_normal((size, size)).astype(np.float32)
    coarse = Image.fromarray(noise.standard_normal((9, 9)).astype(np.float32))
    return strength * (0.6 * fine + 0.7 * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)))


def draw_landscape(rng: random.Random, size: int) -> Image.Image:
    """The flat drawing, at twice the size and then halved: that is the antialiasing."""
    s = 2 * size
    sky, far, near = (vary(rng, colour) for colour in rng.choice(PALETTES))
    canvas = Image.new("RGB", (s, s), sky)
    draw = ImageDraw.Draw(canvas)
    horizon = rng.uniform(0.38, 0.6) * s

    draw_sun(rng, draw, s, horizon, sky)
    for _ in range(rng.randint(1, 3)):
        draw_cloud(rng, draw, s, horizon)
    draw_hills(rng, draw, s, horizon, far, height=0.13)
    draw_hills(rng, draw, s, horizon + 0.06 * s, blend(far, near, 0.5), height=0.07)
    draw_hills(rng, draw, s, horizon + 0.14 * s, near, height=0.03)
    if rng.random() < 0.5:
        draw_path(rng, draw, s, horizon + 0.17 * s, near)

    # Far things first and smaller, so that near things cover them.
    for depth in sorted(rng.uniform(0.1, 0.95) for _ in range(rng.randint(4, 8))):
        base = horizon + (0.16 + 0.8 * depth) * (s - horizon) * 0.95
        scale = s * (0.05 + 0.1 * depth)
        thing = rng.choice((draw_tree, draw_tree, draw_pine, draw_house, draw_bush))
        thing(rng, draw, rng.uniform(0.03, 0.97) * s, base, scale)
    return canvas.reduce(2)


def vary(rng: random.Random, colour, amount: int = 18) -> tuple[int, int, int]:
    return tuple(max(0, min(255, value + rng.randint(-amount, amount))) for value in colour)


def blend(first, second, part: float) -> tuple[int, int, int]:
    return tuple(round(a + (b - a) * part) for a, b in zip(first, second, strict=True))


def disc(draw, x, y, rx, ry, colour) -> None:
    draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def draw_sun(rng, draw, s, horizon, sky) -> None:
    x, y, radius = rng.uniform(0.1, 0.9) * s, rng.uniform(0.2, 0.8) * horizon, rng.uniform(0.05, 0.09) * s
    colour = vary(rng, rng.choice(((255, 240, 190), (255, 205, 130), (250, 250, 250))), 8)
    for ring in range(4, 0, -1):  # the glow, from the outside in
        disc(draw, x, y, radius * (1 + 0.3 * ring), radius * (1 + 0.3 * ring), blend(sky, colour, 0.42 / ring))
    disc(draw, x, y, radius, radius, colour)


def draw_cloud(rng, draw, s, horizon) -> None:
    x, y, width = rng.uniform(0.05, 0.95) * s, rng.uniform(0.12, 0.75) * horizon, rng.uniform(0.07, 0.13) * s
    colour = vary(rng, (243, 244, 247), 8)
    for step in (-1, -0.4, 0.3, 1):
        radius = width * rng.uniform(0.35, 0.6) * (1.2 - 0.4 * abs(step))
        disc(draw, x + step * width, y - radius * 0.3, radius * 1.3, radius * 0.8, colour)


def draw_hills(rng, draw, s, level, colour, height) -> None:
    x = np.linspace(0, s, 40)
    y = level + sum(
        s * height * part * np.sin(2 * math.pi * (waves * x / s + rng.random()))
        for waves, part in ((rng.uniform(0.6, 1.3), 0.6), (rng.uniform(1.8, 3.2), 0.3))
    )
    draw.polygon([*zip(x.tolist(), y.tolist(), strict=True), (s, s), (0, s)], fill=colour)


def draw_path(rng, draw, s, level, near) -> None:
    top, bottom = rng.uniform(0.3, 0.7) * s, rng.uniform(0.2, 0.8) * s
    corners = [(top - 0.015 * s, level), (top + 0.015 * s, level), (bottom + 0.13 * s, s), (bottom - 0.13 * s, s)]
    draw.polygon(corners, fill=blend(near, (225, 205, 170), 0.6))


def draw_tree(rng, draw, x, base, scale) -> None:
    leaf = vary(rng, rng.choice(((60, 110, 50), (90, 130, 50), (170, 110, 50), (50, 95, 75))))
    draw.rectangle((x - 0.09 * scale, base - scale, x + 0.09 * scale, base), fill=vary(rng, (95, 70, 50)))
    for dx, dy, radius in ((-0.3, 1.15, 0.38), (0.3, 1.2, 0.36), (0, 1.5, 0.42)):
        disc(draw, x + dx * scale, base - dy * scale, radius * scale, radius * scale, leaf)
    disc(draw, x - 0.12 * scale, base - 1.6 * scale, 0.2 * scale, 0.18 * scale, blend(leaf, (255, 255, 220), 0.25))


def draw_pine(rng, draw, x, base, scale) -> None:
    leaf = vary(rng, (40, 85, 65))
    draw.rectangle((x - 0.07 * scale, base - 0.4 * scale, x + 0.07 * scale, base), fill=vary(rng, (85, 62, 45)))
    for step in range(3):
        foot, width = base - (0.3 + 0.45 * step) * scale, (0.5 - 0.11 * step) * scale
        draw.polygon(
            [(x - width, foot), (x + width, foot), (x, foot - 0.8 * scale)],
            fill=blend(leaf, (255, 255, 255), 0.06 * step),
        )


def draw_house(rng, draw, x, base, scale) -> None:
    wall = vary(rng, rng.choice(((225, 205, 175), (205, 130, 110), (180, 195, 205), (235, 225, 215))))
    roof = vary(rng, rng.choice(((150, 65, 55), (90, 75, 80), (120, 85, 60))))
    half, height = 0.62 * scale, 0.85 * scale
    draw.rectangle((x - half, base - height, x + half, base), fill=wall)
    draw.polygon(
        [(x - 1.2 * half, base - height), (x + 1.2 * half, base - height), (x, base - 1.75 * height)], fill=roof
    )
    draw.rectangle((x - 0.14 * scale, base - 0.45 * scale, x + 0.14 * scale, base), fill=blend(roof, (40, 30, 30), 0.4))
    pane = vary(rng, (250, 225, 140), 10)
    for dx in (-0.4, 0.4):
        left, top = x + dx * scale - 0.1 * scale, base - 0.65 * scale
        draw.rectangle((left, top, left + 0.2 * scale, top + 0.22 * scale), fill=pane)


def draw_bush(rng, draw, x, base, scale) -> None:
    leaf = vary(rng, rng.choice(((80, 120, 60), (110, 120, 55), (70, 100, 80))))
    for dx, radius in ((-0.35, 0.26), (0.35, 0.24), (0, 0.36)):
        disc(draw, x + dx * scale, base - 0.6 * radius * scale, radius * scale, 0.8 * radius * scale, leaf)


# -------- pictures and their split


def scene_seed(seed: int, number: int, part: str) -> int:
    """Train scenes have even seeds, test scenes odd ones: no seed and no number makes a scene that is in both."""
    return 2 * (seed * 2**32 + number) + (part == "test")


def list_scenes(count: int, seed: int, split: str, test_fraction: float) -> list[int]:
    """Seeds of `count` distinct scenes. "all" is train scenes, and test scenes for `test_fraction` of the count."""
    tests = {"train": 0, "test": count, "all": round(count * test_fraction)}[split]
    train = [scene_seed(seed, number, "train") for number in range(count - tests)]
    return train + [scene_seed(seed, number, "test") for number in range(tests)]


def list_pictures(folder: Path, split: str, test_fraction: float) -> list[Path]:
    """Image files of a folder and its subfolders that belong to the split, sorted by path.

    A hash of the file's content decides: copies of one picture are on the same side, whatever their names and the seed.
    Files without an image suffix are not looked at. Raises ValueError naming the file that is no image, or the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not files:
        raise ValueError(f"no image in {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})")
    chosen = []
    for path in tqdm(files, desc="pictures", unit="file", disable=None):
        check_image(path)
        digest = hashlib.sha256(path.read_bytes()).digest()
        part = "test" if int.from_bytes(digest[:8], "big") < test_fraction * 2**64 else "train"
        if split in ("all", part):
            chosen.append(path)
    if not chosen:
        raise ValueError(f"no {split} image among the {len(files)} of {folder} (test fraction {test_fraction})")
    return chosen


def check_image(path: Path) -> None:
    """Cheap look at a file: its header, for some kinds its checksums. Pixels are read when the picture is used."""
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as cause:  # Pillow raises many kinds for broken files; all mean the same here
        raise ValueError(f"{path}: not a readable image ({one_line(cause)})") from cause


def load_picture(path: Path, max_side: int | None) -> Image.Image:
    """RGB, turned as the camera says, shrunk so that neither side is longer than max_side pixels."""
    try:
        with Image.open(path) as image:
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except Exception as cause:
        raise ValueError(f"not a readable image ({one_line(cause)})") from cause
    if max_side is not None and max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    return picture


def one_line(cause: Exception) -> str:
    return " ".join(str(cause).split()) or type(cause).__name__


def deal(n: int, count: int, rng: random.Random) -> list[int]:
    """`count` picture numbers: all pictures in random order, then all again in a new one. A larger count only adds."""
    dealt = []
    while len(dealt) < count:
        dealt += rng.sample(range(n), n)
    return dealt[:count]


# -------- writing


def write_puzzles(
    out,
    count: int,
    *,
    images=None,
    scenes: int | None = None,
    rows: int = 2,
    cols: int = 1,
    question: str = "pair",
    think: bool = True,
    reply_format: str | None = None,
    swap: float = 0.5,
    mask_ratio: float = 0.0,
    derange: bool = False,
    size: int = 112,
    max_side: int | None = None,
    split: str = "all",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write `count` puzzles to out/records.jsonl and their images to out/images; returns the path of records.jsonl.

    Give either `images` (a folder) or `scenes` (how many distinct scenes). Raises ValueError for bad input, and then
    records.jsonl is not touched. The other choices are those of `make_puzzle`, `scene` and `list_pictures`.
    """
    check_choices(rows, cols, question, reply_format, mask_ratio, swap)
    pictures, open_picture = open_source(out, images, scenes, size, max_side, split, test_fraction, seed)
    out = make_folder(out)
    records, saved = [], set()
    dealt = deal(len(pictures), count, random.Random(f"{split} {seed} deal"))
    for index, number in enumerate(tqdm(dealt, desc="puzzles", disable=None)):  # None: a bar on terminals only
        rng = random.Random(f"{split} {seed} puzzle {index}")
        with errors_name(pictures[number]):
            puzzle, record = make_puzzle(
                open_picture(pictures[number]),
                rows,
                cols,
                question,
                rng,
                think,
                reply_format=reply_format,
                mask_ratio=mask_ratio,
                swap=swap,
                derange=derange,
            )
        name = f"{record['source']}-{split}-{seed}-{index:06d}"
        records.append({"id": name, "images": [save_image(puzzle, out, saved)], **record})
    return write_lines(out / "records.jsonl", records)


def write_primer(
    out,
    count: int,
    *,
    images=None,
    scenes: int | None = None,
    rows: int = 2,
    cols: int = 1,
    follow: float = 0.4,
    reply_format: str | None = None,
    per_picture: int = 4,
    swap: float = 0.5,
    derange: bool = False,
    size: int = 112,
    max_side: int | None = None,
    split: str = "all",
    test_fraction: float = 0.1,
    seed: int = 0,
) -> Path:
    """Write `count` primer items (see `primer_items`) to out/primer.jsonl, `per_picture` on each mixed picture."""
    check_choices(rows, cols, "pair", reply_format, 0.0, swap)
    pictures, open_picture = open_source(out, images, scenes, size, max_side, split, test_fraction, seed)
    out = make_folder(out)
    records, saved = [], set()
    dealt = deal(len(pictures), math.ceil(count / per_picture), random.Random(f"{split} {seed} deal"))
    for index, number in enumerate(tqdm(dealt, desc="primer", disable=None)):
        rng = random.Random(f"{split} {seed} primer {index}")
        with errors_name(pictures[number]):
            picture = open_picture(pictures[number])
            puzzle, *grid, order = cut_and_mix(picture, rows, cols, rng, swap=swap, derange=derange)
            number = min(per_picture, count - len(records))
            items = primer_items(puzzle, *grid, order, number, rng, follow, reply_format)
        path = save_image(puzzle, out, saved)
        for item in items:
            records.append({"id": f"primer-{split}-{seed}-{len(records):06d}", "images": [path], **item})
    return write_lines(out / "primer.jsonl", records)


def open_source(out, images, scenes, size, max_side, split, test_fraction, seed):
    """(list of pictures: paths or scene seeds, function that turns one of them into an image)."""
    if (images is None) == (scenes is None):
        raise ValueError("give either a folder of images or a number of scenes")
    if scenes is not None and scenes < 1:
        raise ValueError(f"{scenes} scenes are too few")
    if images is not None:
        if Path(out).resolve().is_relative_to(Path(images).resolve()):
            raise ValueError(f"{out} lies inside {images}: the next run would take its puzzles for pictures")
        return list_pictures(Path(images), split, test_fraction), lambda path: load_picture(path, max_side)
    return list_scenes(scenes, seed, split, test_fraction), lambda number: scene(random.Random(number), size)


@contextmanager
def errors_name(picture: Path | int):
    """Put the picture in front of a ValueError raised inside: its path, or the seed of its scene."""
    try:
        yield
    except ValueError as cause:
        name = f"scene {picture}" if isinstance(picture, int) else str(picture)
        raise ValueError(f"{name}: {cause}") from cause


def make_folder(out) -> Path:
    out = Path(out)
    try:
        (out / "images").mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ValueError(f"cannot make the folder {out / 'images'}: {cause.strerror}") from cause
    if not os.access(out / "images", os.W_OK):
        raise ValueError(f"cannot write into {out / 'images'}")
    return out


def save_image(puzzle: Image.Image, out: Path, saved: set[str]) -> str:
    """Save once as PNG, named by its pixels: equal puzzle images share a file. Returns the path relative to `out`."""
    pixels = f"{puzzle.size}".encode() + puzzle.tobytes()
    path = f"images/{hashlib.sha256(pixels).hexdigest()[:20]}.png"
    if path not in saved:
        puzzle.save(out / path)
        saved.add(path)
    return path


def write_lines(path: Path, rows: list[dict]) -> Path:
    """One JSON object a line; written beside and then renamed, so that a file that exists is whole."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    beside.replace(path)
    return path


# -------- command line


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message}\n")  # without the usage text: one clear line


def parse_args(argv=None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="folder of pictures, subfolders included")
    source.add_argument("--scenes", metavar="N", type=int, help="no folder: make N distinct procedural scenes")
    add("--count", metavar="N", type=int, required=True, help="how many puzzles (or primer items) to write")
    add("--out", metavar="DIR", required=True, help="gets records.jsonl (or primer.jsonl) and images/")
    add("--rows", type=int, default=2, help="rows of the grid (default 2)")
    add("--cols", type=int, default=1, help="columns of the grid (default 1)")
    add(
        "--question",
        choices=QUESTIONS,
        default="pair",
        help="pair: two pieces' relation (default); full: all positions",
    )
    add(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="ask for <think> and <answer> (the default), or for the bare answer",
    )
    add("--reply-format", choices=list(REPLY_FORMAT_SENTENCE), help="ask for this form, in place of --think/--no-think")
    add(
        "--swap",
        type=float,
        default=0.5,
        help="probability that rows and cols are exchanged if they differ (default 0.5, the paper's; 0: never)",
    )
    add(
        "--mask-ratio",
        type=float,
        default=0.0,
        help="width of a black frame around picture and pieces, as a part of a piece's side (default 0: none)",
    )
    add("--derange", action="store_true", help="every piece moves (default: any order, the original one included)")
    add("--size", type=int, help="scenes only: side in pixels (default 112)")
    add("--max-side", type=int, help="images only: shrink to this longest side in pixels (default: keep the size)")
    add(
        "--split",
        choices=SPLITS,
        default="all",
        help="train and test share no picture, whatever the seed (default all)",
    )
    add("--test-fraction", type=float, default=0.1, help="part of the pictures that is test (default 0.1)")
    add("--primer", action="store_true", help="write primer.jsonl, questions with replies for SFT, not puzzles")
    add("--follow", type=float, help="primer only: probability that a reply has the asked form (default 0.4)")
    add("--per-picture", type=int, help="primer only: questions on each mixed picture (default 4)")
    add("--seed", type=int, default=0, help="the same seed writes the same bytes (default 0)")
    args = parser.parse_args(argv)

    least = {"scenes": 1, "count": 1, "rows": 1, "cols": 1, "size": 16, "max_side": 1, "per_picture": 1, "seed": 0}
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and value < bound:
            parser.error(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")
    for name in ("swap", "test_fraction", "follow"):
        value = getattr(args, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in 0..1, not {value}")
    if not 0 <= args.mask_ratio < 0.5:
        parser.error(f"--mask-ratio must be at least 0 and less than 0.5, not {args.mask_ratio}")
    if args.rows * args.cols < 2:
        parser.error("--rows 1 --cols 1 is one piece: nothing to ask")
    # A flag that would be read by nothing is a misunderstanding: say so.
    if args.images and args.size is not None:
        parser.error("--size is for --scenes; --max-side shrinks images")
    if args.scenes and args.max_side is not None:
        parser.error("--max-side is for --images; --size sets the size of scenes")
    if args.reply_format and args.think is not None:
        parser.error("give --reply-format or --think/--no-think, not both")
    if args.primer and (args.question != "pair" or args.think is not None or args.mask_ratio):
        parser.error(
            "--primer asks about pairs, unmasked: --question full, --think and --mask-ratio do not go with it "
            "(--reply-format asks for one form only)"
        )
    if not args.primer and (args.follow is not None or args.per_picture is not None):
        parser.error("--follow and --per-picture are for --primer")
    return args


def main(argv=None) -> None:
    args = parse_args(argv)
    shared = {
        "images": args.images,
        "scenes": args.scenes,
        "rows": args.rows,
        "cols": args.cols,
        "swap": args.swap,
        "derange": args.derange,
        "size": args.size or 112,
        "max_side": args.max_side,
        "split": args.split,
        "test_fraction": args.test_fraction,
        "seed": args.seed,
    }
    try:
        if args.primer:
            path = write_primer(
                args.out,
                args.count,
                follow=0.4 if args.follow is None else args.follow,
                reply_format=args.reply_format,
                per_picture=args.per_picture or 4,
                **shared,
            )
        else:
            path = write_puzzles(
                args.out,
                args.count,
                question=args.question,
                think=args.think is not False,
                reply_format=args.reply_format,
                mask_ratio=args.mask_ratio,
                **shared,
            )
    except ValueError as cause:
        print(f"error: {one_line(cause)}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{args.count} {'primer items' if args.primer else 'puzzles'} -> {path}")


if __name__ == "__main__":
    main()
