"""Real photographs for the puzzles: scikit-image's own, and seeded crops of them.

    python recipes/photos.py --out runs/photos/photos --crops 300 --seed 0

Five subjects come with scikit-image as colour photographs that have an up and a down (six files: the motorcycle is a
stereo pair). Nothing is downloaded. Two subjects, chosen by the seed, are held out as a whole: a crop of a photograph,
or the other eye's view of it, is never on both sides. Writes

    OUT/train/SUBJECT/*.png, OUT/test/SUBJECT/*.png    per subject as many pictures as asked: the whole photographs
                                                       first, then square crops, no side longer than --side pixels
    OUT/crops.jsonl                                    where each picture comes from
    OUT/light.json                                     how often each subject's upper half is the lighter one

and prints how far light alone goes. "The lighter half was above" is a rule of the scenes; of photographs it is a habit
at best. What is printed is a ceiling for a policy that goes by the words light and dark only.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

SUBJECTS = {
    "astronaut": ["astronaut.png"],
    "cat": ["chelsea.png"],
    "coffee": ["coffee.png"],
    "motorcycle": ["motorcycle_left.png", "motorcycle_right.png"],
    "rocket": ["rocket.jpg"],
}
HELD_OUT = 2  # subjects
LEAST_SPREAD = 4.0  # standard deviation of a picture's luminance, 0..255: below, a crop is plain sky and shows nothing
DATA = Path(skimage.__file__).parent / "data"  # the files themselves: skimage.data would go online for a missing one


def split_subjects(seed: int) -> dict[str, str]:
    """{subject: "train" or "test"}: HELD_OUT of them, all choices equally likely."""
    test = random.Random(f"{seed} held out").sample(sorted(SUBJECTS), HELD_OUT)
    return {subject: "test" if subject in test else "train" for subject in SUBJECTS}


def draw_box(width: int, height: int, rng: random.Random) -> tuple[int, int, int, int]:
    """A square inside the photograph, its side a third to all of the shorter one: (left, top, right, bottom)."""
    side = round(min(width, height) * rng.uniform(1 / 3, 1))
    left, top = rng.randint(0, width - side), rng.randint(0, height - side)
    return left, top, left + side, top + side


def luminance(picture: Image.Image) -> np.ndarray:
    """(H, W), 0..255; the weights are those of toy.primer.look."""
    return np.asarray(picture, dtype=np.float64) @ np.array([0.299, 0.587, 0.114])


def lighter_above(picture: Image.Image) -> bool:
    """Whether the upper half is lighter than the lower; an odd last row is trimmed, as puzzles do."""
    light = luminance(picture)
    half = len(light) // 2
    return bool(light[:half].mean() > light[half : 2 * half].mean())


def make_pictures(subject: str, count: int, side: int, seed: int):
    """`count` pictures of a subject, one at a time: (picture, file name of the photograph, box in its pixels)."""
    rng = random.Random(f"{seed} {subject}")
    photographs = [(name, Image.open(DATA / name).convert("RGB")) for name in SUBJECTS[subject]]
    made = 0
    while made < count:
        name, photograph = photographs[made % len(photographs)]
        whole = made < len(photographs)
        box = (0, 0, *photograph.size) if whole else draw_box(*photograph.size, rng)
        picture = photograph.crop(box)
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        if whole or luminance(picture).std() >= LEAST_SPREAD:
            yield picture, name, box
            made += 1


def light_rule(train: float, test: float) -> tuple[str, float, float]:
    """The better of the two rules about light on the train subjects: (its verdict, accuracy there, accuracy on test).

    train, test: shares of pictures whose upper half is the lighter one.
    """
    return ("above", train, test) if train >= 0.5 else ("below", 1 - train, 1 - test)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="gets train/, test/ and crops.jsonl")
    parser.add_argument("--crops", type=int, default=300, help="pictures per subject (default 300)")
    parser.add_argument("--side", type=int, default=112, help="longest side of a picture in pixels (default 112)")
    parser.add_argument("--seed", type=int, default=0, help="draws the held-out subjects and all crops (default 0)")
    args = parser.parse_args(argv)
    if args.crops < 2 or args.side < 28:
        parser.error("--crops must be at least 2 and --side at least 28")
    if not (args.out / "crops.jsonl").exists() and any((args.out / part).exists() for part in ("train", "test")):
        parser.error(f"{args.out} holds train or test, but not from this script: it has no crops.jsonl")
    return args


def main(argv=None):
    args = parse_args(argv)
    for part in ("train", "test"):  # of an earlier run: with another seed, its train subjects may be held out now
        shutil.rmtree(args.out / part, ignore_errors=True)
    rows, lighter = [], {"train": {}, "test": {}}
    for subject, part in split_subjects(args.seed).items():
        folder = args.out / part / subject
        folder.mkdir(parents=True)
        above = 0
        for number, (picture, name, box) in enumerate(make_pictures(subject, args.crops, args.side, args.seed)):
            path = folder / f"{number:04d}.png"
            picture.save(path)
            above += lighter_above(picture)
            rows.append({"file": str(path.relative_to(args.out)), "photograph": name, "box": box})
        lighter[part][subject] = above / args.crops
    (args.out / "crops.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (args.out / "light.json").write_text(json.dumps(lighter) + "\n")  # share of pictures, by part and subject

    print(f"{len(rows)} pictures of {len(SUBJECTS)} subjects. The lighter half is the upper one in")
    means = {}
    for part, shares in lighter.items():
        means[part] = sum(shares.values()) / len(shares)
        each = ", ".join(f"{subject} {100 * share:.1f} %" for subject, share in shares.items())
        print(f"  {part:5} {100 * means[part]:5.1f} % ({each})")
    verdict, on_train, on_test = light_rule(**means)
    print(
        f'by light alone, the rule that train teaches is "lighter was {verdict}": right on '
        f"{100 * on_train:.1f} % of train and {100 * on_test:.1f} % of the held-out pictures (chance 50 %)"
    )


if __name__ == "__main__":
    main()
