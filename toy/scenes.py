"""Scenes: procedural pictures for puzzles, light at the top, dark at the bottom, warm at the left, cool at the right.

So even a tiny model can find out where a piece belongs. The same seed draws the same pixels. Imports nothing else of
this project.

Legend: H = W = `size`, the side of a scene in pixels; `s` = 2·size, the side of the canvas it is drawn on; x runs from
left to right and y from top to bottom. A colour is (red, green, blue), 0..255.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Pen = ImageDraw.ImageDraw

# ---------------------------------------------------------------------------------------------------------------------
# Which scenes


def scene_seed(seed: int, number: int, part: str) -> int:
    """Train scenes have even seeds, test scenes odd ones: no seed and no number makes a scene that is in both."""
    return 2 * (seed * 2**32 + number) + (part == "test")


def list_scenes(count: int, seed: int, split: str, test_fraction: float) -> list[int]:
    """Seeds of `count` distinct scenes. "all" is train scenes, and test scenes for `test_fraction` of the count."""
    tests = {"train": 0, "test": count, "all": round(count * test_fraction)}[split]
    train = [scene_seed(seed, number, "train") for number in range(count - tests)]
    test = [scene_seed(seed, number, "test") for number in range(tests)]
    return train + test


# ---------------------------------------------------------------------------------------------------------------------
# Things in a landscape. Each samples its own sizes and colours from `rng`, and x, base is where it stands.


def vary(rng: random.Random, colour: Colour, amount: int = 18) -> Colour:
    return tuple(max(0, min(255, value + rng.randint(-amount, amount))) for value in colour)


def blend(first: Colour, second: Colour, part: float) -> Colour:
    return tuple(round(a + (b - a) * part) for a, b in zip(first, second, strict=True))


def draw_disc(pen: Pen, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
    pen.ellipse((x - rx, y - ry, x + rx, y + ry), fill=colour)


def draw_sun(rng: random.Random, pen: Pen, s: int, horizon: float, sky: Colour) -> None:
    x = rng.uniform(0.1, 0.9) * s
    y = rng.uniform(0.2, 0.8) * horizon
    radius = rng.uniform(0.05, 0.09) * s
    colour = vary(rng, rng.choice(((255, 240, 190), (255, 205, 130), (250, 250, 250))), 8)

    # The glow, from the outside in.
    for ring in range(4, 0, -1):
        reach = radius * (1 + 0.3 * ring)
        draw_disc(pen, x, y, reach, reach, blend(sky, colour, 0.42 / ring))
    draw_disc(pen, x, y, radius, radius, colour)


def draw_cloud(rng: random.Random, pen: Pen, s: int, horizon: float) -> None:
    x = rng.uniform(0.05, 0.95) * s
    y = rng.uniform(0.12, 0.75) * horizon
    width = rng.uniform(0.07, 0.13) * s
    colour = vary(rng, (243, 244, 247), 8)
    for step in (-1, -0.4, 0.3, 1):
        radius = width * rng.uniform(0.35, 0.6) * (1.2 - 0.4 * abs(step))
        draw_disc(pen, x + step * width, y - radius * 0.3, radius * 1.3, radius * 0.8, colour)


def draw_hills(rng: random.Random, pen: Pen, s: int, level: float, colour: Colour, height: float) -> None:
    """A ridge of two sine waves about the height `level`, and all below it filled."""
    x = np.linspace(0, s, 40)
    slow = rng.uniform(0.6, 1.3)  # waves over the whole width
    fast = rng.uniform(1.8, 3.2)
    ridge = np.zeros(len(x))
    for waves, part in ((slow, 0.6), (fast, 0.3)):
        ridge += s * height * part * np.sin(2 * math.pi * (waves * x / s + rng.random()))
    y = level + ridge
    outline = zip(x.tolist(), y.tolist(), strict=True)
    pen.polygon([*outline, (s, s), (0, s)], fill=colour)


def draw_path(rng: random.Random, pen: Pen, s: int, level: float, near: Colour) -> None:
    """From the foot of the picture up to the height `level`, narrower the farther away."""
    top = rng.uniform(0.3, 0.7) * s
    bottom = rng.uniform(0.2, 0.8) * s
    far_edge = [(top - 0.015 * s, level), (top + 0.015 * s, level)]
    near_edge = [(bottom + 0.13 * s, s), (bottom - 0.13 * s, s)]
    pen.polygon(far_edge + near_edge, fill=blend(near, (225, 205, 170), 0.6))


def draw_tree(rng: random.Random, pen: Pen, x: float, base: float, scale: float) -> None:
    leaf = vary(rng, rng.choice(((60, 110, 50), (90, 130, 50), (170, 110, 50), (50, 95, 75))))
    trunk = vary(rng, (95, 70, 50))
    pen.rectangle((x - 0.09 * scale, base - scale, x + 0.09 * scale, base), fill=trunk)
    for dx, dy, radius in ((-0.3, 1.15, 0.38), (0.3, 1.2, 0.36), (0, 1.5, 0.42)):
        draw_disc(pen, x + dx * scale, base - dy * scale, radius * scale, radius * scale, leaf)
    lit = blend(leaf, (255, 255, 220), 0.25)
    draw_disc(pen, x - 0.12 * scale, base - 1.6 * scale, 0.2 * scale, 0.18 * scale, lit)


def draw_pine(rng: random.Random, pen: Pen, x: float, base: float, scale: float) -> None:
    leaf = vary(rng, (40, 85, 65))
    trunk = vary(rng, (85, 62, 45))
    pen.rectangle((x - 0.07 * scale, base - 0.4 * scale, x + 0.07 * scale, base), fill=trunk)
    for step in range(3):
        foot = base - (0.3 + 0.45 * step) * scale
        width = (0.5 - 0.11 * step) * scale
        corners = [(x - width, foot), (x + width, foot), (x, foot - 0.8 * scale)]
        pen.polygon(corners, fill=blend(leaf, (255, 255, 255), 0.06 * step))


def draw_house(rng: random.Random, pen: Pen, x: float, base: float, scale: float) -> None:
    wall = vary(rng, rng.choice(((225, 205, 175), (205, 130, 110), (180, 195, 205), (235, 225, 215))))
    roof = vary(rng, rng.choice(((150, 65, 55), (90, 75, 80), (120, 85, 60))))
    door = blend(roof, (40, 30, 30), 0.4)
    pane = vary(rng, (250, 225, 140), 10)

    half, height = 0.62 * scale, 0.85 * scale
    pen.rectangle((x - half, base - height, x + half, base), fill=wall)
    gable = [(x - 1.2 * half, base - height), (x + 1.2 * half, base - height), (x, base - 1.75 * height)]
    pen.polygon(gable, fill=roof)
    pen.rectangle((x - 0.14 * scale, base - 0.45 * scale, x + 0.14 * scale, base), fill=door)
    for dx in (-0.4, 0.4):
        left = x + dx * scale - 0.1 * scale
        top = base - 0.65 * scale
        pen.rectangle((left, top, left + 0.2 * scale, top + 0.22 * scale), fill=pane)


def draw_bush(rng: random.Random, pen: Pen, x: float, base: float, scale: float) -> None:
    leaf = vary(rng, rng.choice(((80, 120, 60), (110, 120, 55), (70, 100, 80))))
    for dx, radius in ((-0.35, 0.26), (0.35, 0.24), (0, 0.36)):
        draw_disc(pen, x + dx * scale, base - 0.6 * radius * scale, radius * scale, 0.8 * radius * scale, leaf)


# ---------------------------------------------------------------------------------------------------------------------
# A landscape, and the light that falls on it

# Sky, far land, near land. Brightness and tint are set afterwards, so these give the hue.
PALETTES = (
    ((150, 195, 235), (120, 160, 120), (90, 150, 70)),  # summer
    ((240, 190, 150), (150, 120, 130), (140, 110, 70)),  # evening
    ((200, 215, 230), (150, 165, 185), (205, 210, 215)),  # winter
    ((170, 215, 215), (90, 140, 150), (60, 120, 140)),  # sea
    ((235, 215, 170), (200, 160, 110), (205, 165, 95)),  # desert
    ((190, 170, 225), (120, 100, 150), (90, 110, 90)),  # violet dusk
)


def draw_landscape(rng: random.Random, size: int) -> Image.Image:
    """The flat drawing, at twice the size and then halved: that is the antialiasing."""
    s = 2 * size
    sky, far, near = (vary(rng, colour) for colour in rng.choice(PALETTES))
    canvas = Image.new("RGB", (s, s), sky)
    pen = ImageDraw.Draw(canvas)
    horizon = rng.uniform(0.38, 0.6) * s

    draw_sun(rng, pen, s, horizon, sky)
    for _ in range(rng.randint(1, 3)):
        draw_cloud(rng, pen, s, horizon)
    draw_hills(rng, pen, s, horizon, far, height=0.13)
    draw_hills(rng, pen, s, horizon + 0.06 * s, blend(far, near, 0.5), height=0.07)
    draw_hills(rng, pen, s, horizon + 0.14 * s, near, height=0.03)
    if rng.random() < 0.5:
        draw_path(rng, pen, s, horizon + 0.17 * s, near)

    # Far things first and smaller, so that near things cover them.
    depths = [rng.uniform(0.1, 0.95) for _ in range(rng.randint(4, 8))]
    for depth in sorted(depths):
        base = horizon + (0.16 + 0.8 * depth) * (s - horizon) * 0.95
        scale = s * (0.05 + 0.1 * depth)
        draw_thing = rng.choice((draw_tree, draw_tree, draw_pine, draw_house, draw_bush))
        draw_thing(rng, pen, rng.uniform(0.03, 0.97) * s, base, scale)
    return canvas.reduce(2)


def texture(noise: np.random.RandomState, size: int, strength: float) -> np.ndarray:
    """Grain at two scales, (H, W), about `strength` luminance levels either way."""
    fine = noise.standard_normal((size, size)).astype(np.float32)
    patches = Image.fromarray(noise.standard_normal((9, 9)).astype(np.float32))
    coarse = np.asarray(patches.resize((size, size), Image.Resampling.BICUBIC))
    return strength * (0.6 * fine + 0.7 * coarse)


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Moving mean over `width` neighbours; the ends repeat. (S,) -> (S,)"""
    width |= 1  # odd, so that the window is centred
    padded = np.pad(values, width // 2, mode="edge")
    window = np.ones(width, dtype=np.float32) / width
    return np.convolve(padded, window, mode="valid")


def scene(rng: random.Random, size: int = 112, contrary: bool = False) -> Image.Image:
    """A procedural picture of size x size pixels: sky, sun, clouds, hills, trees, houses, grain.

    Whatever is drawn, mean luminance falls strip by strip from top to bottom, and red minus blue from left to right,
    for up to 4 strips. Base brightness, tint and the strength of both slopes differ from scene to scene: comparing two
    pieces always tells which was higher, one piece alone tells its place in a 2x1 puzzle, less so on finer grids.

    contrary: the light falls the other way, from below, and all that is drawn stays upright: whoever goes by the light
    alone is wrong about such a picture, whoever goes by what is drawn is not.
    """
    pixels = np.asarray(draw_landscape(rng, size), dtype=np.float32)  # (H, W, 3)
    # RandomState, not default_rng: numpy promises that its stream never changes, so neither do the scenes.
    noise = np.random.RandomState(rng.getrandbits(32))
    pixels = pixels + texture(noise, size, strength=rng.uniform(4, 8))[:, :, None]

    # What the mean of every row and of every column shall be.
    slope = np.linspace(0.5, -0.5, size, dtype=np.float32)
    light = rng.uniform(122, 148) + rng.uniform(75, 115) * (-slope if contrary else slope)  # (H,), luminance
    warm = rng.uniform(-12, 12) + rng.uniform(55, 90) * slope  # (W,), red minus blue

    # The rows: their means are smoothed, so that objects leave no stripes, and the contrast within a row is calmed, so
    # that little is clipped at 0 and 255.
    luminance = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W)
    row_means = smooth(luminance.mean(axis=1), size // 4)
    calm = 0.7 * (luminance - row_means[:, None])
    pixels += (light[:, None] + calm - luminance)[:, :, None]

    # The columns: what red gains, blue loses.
    tint = (pixels[:, :, 0] - pixels[:, :, 2]).mean(axis=0)  # (W,)
    shift = (warm - smooth(tint, size // 4)) / 2
    pixels[:, :, 0] += shift
    pixels[:, :, 2] -= shift
    return Image.fromarray(np.clip(pixels + 0.5, 0, 255).astype(np.uint8))
