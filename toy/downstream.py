"""Questions about scenes that are no puzzles: what may puzzles teach besides? Writes records.jsonl and the images.

    python toy/downstream.py --count 500 --split test --out runs/downstream

Jigsaw-R1 (arXiv 2505.23590) measures on CV-Bench and others whether puzzles help elsewhere. This is that in miniature:
five kinds of questions, asked in CV-Bench's shape (a letter for one of the options, `source` and `category` per kind),
about whole scenes on which a white and a black disc lie, or several white ones:

    half      which half of the picture is lighter, or warmer? (scenes are turned over at random)
    relation  where is the white disc, relative to the black one?
    larger    which disc is larger?
    nearer    which disc is nearer? The nearer one is larger and lower, as things on a plain are
    count     how many white discs are there, 1 to 4?

Every line has a right reply as `chosen` too: what SFT (`dpo.py --loss sft`) teaches a base model of such questions.

Legend: x, y in pixels from the left and from the top; s the side of the scene; r a radius.
"""

import random
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw

if __name__ == "__main__":  # Python looks for modules beside a script: jigsaw.py lies one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jigsaw
import questions
from toy.primer import render
from toy.scenes import list_scenes, scene

WHITE, BLACK = (255, 255, 255), (0, 0, 0)
NAMES = {WHITE: "white", BLACK: "black"}
THINK = "Think, then give the letter."  # as recipes/study_words.json has it

# ---------------------------------------------------------------------------------------------------------------------
# The five kinds. Each draws on the scene and returns (question, options, the right one).

Asked = tuple[str, tuple[str, ...], str]


def draw_disc(picture: Image.Image, x: float, y: float, r: float, colour: tuple[int, int, int]) -> None:
    ImageDraw.Draw(picture).ellipse((x - r, y - r, x + r, y + r), fill=colour)


def in_some_order(rng: random.Random) -> list[tuple[int, int, int]]:
    return rng.sample([WHITE, BLACK], 2)


def ask_half(picture: Image.Image, rng: random.Random) -> Asked:
    over, mirrored = rng.random() < 0.5, rng.random() < 0.5
    if over:
        picture.paste(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    if mirrored:
        picture.paste(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    if rng.random() < 0.5:
        return "Which half is lighter?", ("above", "below"), "below" if over else "above"
    return "Which half is warmer?", ("left", "right"), "right" if mirrored else "left"


def ask_relation(picture: Image.Image, rng: random.Random) -> Asked:
    s = picture.width
    across = rng.random() < 0.5
    low = rng.uniform(0.12, 0.55)
    high = rng.uniform(low + 0.3, 0.88)
    places = [(value * s, rng.uniform(0.2, 0.8) * s) for value in (low, high)]
    first, second = in_some_order(rng)
    for colour, (along, beside) in zip((first, second), places, strict=True):
        x, y = (along, beside) if across else (beside, along)
        draw_disc(picture, x, y, 0.09 * s, colour)
    words = ("left", "right") if across else ("above", "below")
    return "Where is white, relative to black?", words, words[first != WHITE]


def ask_larger(picture: Image.Image, rng: random.Random) -> Asked:
    s = picture.width
    larger, smaller = in_some_order(rng)
    left = rng.random() < 0.5
    for colour, r, here in ((larger, rng.uniform(0.14, 0.18), left), (smaller, rng.uniform(0.06, 0.09), not left)):
        x = rng.uniform(0.2, 0.3) if here else rng.uniform(0.7, 0.8)
        draw_disc(picture, x * s, rng.uniform(0.25, 0.75) * s, r * s, colour)
    return "Which is larger?", ("white", "black"), NAMES[larger]


def ask_nearer(picture: Image.Image, rng: random.Random) -> Asked:
    s = picture.width
    nearer, farther = in_some_order(rng)
    left = rng.random() < 0.5
    # A disc on a plain: its foot falls, and its size grows, with nearness (0 at the horizon, 1 at the viewer's feet).
    for colour, depth, here in ((farther, rng.uniform(0.1, 0.3), not left), (nearer, rng.uniform(0.6, 0.9), left)):
        r = (0.05 + 0.12 * depth) * s
        foot = (0.5 + 0.45 * depth) * s
        x = rng.uniform(0.2, 0.3) if here else rng.uniform(0.7, 0.8)
        draw_disc(picture, x * s, foot - r, r, colour)
    return "Which is nearer?", ("white", "black"), NAMES[nearer]


def ask_count(picture: Image.Image, rng: random.Random) -> Asked:
    s = picture.width
    count = rng.randint(1, 4)
    places = rng.sample([(x, y) for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)], count)
    for x, y in places:
        shift_x, shift_y = (rng.uniform(-0.05, 0.05) for _ in range(2))
        draw_disc(picture, (x + shift_x) * s, (y + shift_y) * s, 0.09 * s, WHITE)
    return "How many white?", ("1", "2", "3", "4"), str(count)


KINDS: dict[str, Callable[[Image.Image, random.Random], Asked]] = {
    "half": ask_half,
    "relation": ask_relation,
    "larger": ask_larger,
    "nearer": ask_nearer,
    "count": ask_count,
}

# ---------------------------------------------------------------------------------------------------------------------
# Records


def make_question(picture: Image.Image, kind: str, rng: random.Random) -> dict:
    """Draw on a scene and ask: a record without `id` and `images`."""
    text, texts, truth = KINDS[kind](picture, rng)
    fields = questions.option_fields(texts, truth, rng)
    options = [f"{letter}. {option}" for letter, option in zip(questions.LETTERS, fields["options"], strict=False)]
    return {
        "prompt": "\n".join([text, *options, THINK]),
        "answer": fields["answer"],
        "answer_type": "letter",
        "options": fields["options"],
        "think": True,
        "source": f"downstream-{kind}",
        "category": kind,
        "chosen": render(f"so {truth} {fields['answer']}.", fields["answer"], "think"),
    }


def write_questions(out: str | Path, count: int, size: int, split: str, seed: int) -> Path:
    """Write `count` questions, the kinds in turn, each on a scene of its own, to out/records.jsonl."""
    folder = jigsaw.make_folder(out)
    records, saved = [], set()
    for index, number in enumerate(list_scenes(count, seed, split, 0.1)):
        rng = random.Random(f"{split} {seed} downstream {index}")
        picture = scene(random.Random(number), size)
        record = make_question(picture, list(KINDS)[index % len(KINDS)], rng)
        path = jigsaw.save_image(picture, folder, saved)
        records.append({"id": f"downstream-{split}-{seed}-{index:06d}", "images": [path], **record})
    return jigsaw.write_lines(folder / "records.jsonl", records)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The arguments of `write_questions`, under the same names."""
    parser = jigsaw.Parser(__doc__)
    add = parser.add_argument
    add("--count", metavar="N", type=jigsaw.integer("[1, 1e7]"), required=True, help="how many questions to write")
    add("--out", metavar="DIR", required=True, help="gets records.jsonl and images/")
    add("--split", choices=("train", "test"), required=True, help="train and test share no scene, whatever the seed")
    add(
        "--size",
        type=jigsaw.integer("[16, 4096]"),
        default=jigsaw.SCENE_SIZE,
        help="side of a scene in pixels (default %(default)s)",
    )
    add(
        "--seed",
        type=jigsaw.integer("[0, 4294967295]"),
        default=0,
        help="the same seed writes the same bytes (default %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        path = write_questions(**vars(args))
    except ValueError as cause:
        jigsaw.Parser().error(jigsaw.one_line(cause))
    print(f"{args.count} questions -> {path}")


if __name__ == "__main__":
    main()
