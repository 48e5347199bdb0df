"""The study of recipes/study_jigsaw.sh: Jigsaw-R1's five findings in miniature, from runs to docs/jigsaw_study.md.

    python bench/study_jigsaw.py --contrary 150 7 runs/study/contrary     # pictures whose light falls the wrong way
    python bench/study_jigsaw.py --collect runs/study                     # finished runs -> bench/results/study_jigsaw.json
    python bench/study_jigsaw.py                                          # that file -> the page's tables, the figures
    python bench/study_jigsaw.py --check                                  # exit 1 if the page does not say what it says
"""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from toy.primer import RECHECK  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What a reply says

LOOK = re.compile(r"(\d) looks (light|dark|warm|cool), (\d) looks (light|dark|warm|cool)\.")
VERDICT = re.compile(r" ([A-H])\.")
ANSWER = re.compile(r"<answer>([A-H])</answer>")
OPPOSITE = {"light": "dark", "dark": "light", "warm": "cool", "cool": "warm"}


def read_thoughts(reply: str) -> dict:
    """What the tiny model's reasoning says, by the shapes that toy/primer.py has taught it.

    looks     [(k, word, j)] in order: "k looks word, j looks the opposite"
    verdict   the letter that the reason ends with; None: none
    answer    the letter in <answer>; None: none
    recheck   whether the reason looks twice
    """
    thought, _, rest = reply.partition("</think>")
    looks = [(int(k), one, int(j)) for k, one, j, two in LOOK.findall(thought) if OPPOSITE[one] == two]
    verdicts = VERDICT.findall(thought)
    answers = ANSWER.findall(rest)
    return {
        "looks": looks,
        "verdict": verdicts[-1] if verdicts else None,
        "answer": answers[-1] if answers else None,
        "recheck": RECHECK in thought,
    }


def look_is_true(look: tuple[int, str, int], record: dict) -> bool:
    """Whether "k looks light(er than j)" is true of the puzzle: by its order, as all scenes are lighter above and warmer
    at the left. A record of the puzzle is needed whose pieces k and j differ in that direction."""
    k, word, j = look
    if not 1 <= min(k, j) or max(k, j) > len(record["order"]):
        return False
    places = [divmod(record["order"][position - 1] - 1, record["cols"]) for position in (k, j)]
    axis = 0 if word in ("light", "dark") else 1
    first, second = (place[axis] for place in places)
    return first < second if word in ("light", "warm") else first > second


def thoughts_of(replies: list[tuple[str, dict]]) -> dict[str, float]:
    """Shares of replies, each with its record.

    consistent   the answer's letter is the one that the reason ends with (of those that have both)
    true         the last look is true of the picture (of those that have one)
    licensed     the verdict is the one that the last look calls for: light means above
    recheck      looks twice; verification: the second look confirms the first; backtracking: it takes it back
    """
    found = {name: [] for name in ("consistent", "true", "licensed", "recheck", "verification", "backtracking")}
    for reply, record in replies:
        said = read_thoughts(reply)
        looks = said["looks"]
        if said["verdict"] and said["answer"]:
            found["consistent"].append(said["verdict"] == said["answer"])
        if looks:
            found["true"].append(look_is_true(looks[-1], record))
        if looks and said["verdict"] and record["cols"] == 1:
            k, word, _ = looks[-1]
            wanted = "above" if (word == "light") == (k == record["pair"][0]) else "below"
            index = ord(said["verdict"]) - ord("A")
            found["licensed"].append(index < len(record["options"]) and record["options"][index] == wanted)
        twice = said["recheck"] and len(looks) >= 2
        found["recheck"].append(said["recheck"])
        found["verification"].append(twice and looks[-2] == looks[-1])
        found["backtracking"].append(twice and looks[-2] != looks[-1])
    return {name: float(np.mean(values)) if values else None for name, values in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Readers by rule: what a perfect reader of the scenes' light would score, and what one of the seams would


def pieces(record: dict, folder: Path) -> list[np.ndarray]:
    """The pictures of the pieces as they lie now, each (h, w, 3)."""
    return [np.asarray(Image.open(folder / name).convert("RGB"), dtype=np.float32) for name in record["images"]]


def light_and_warmth(piece: np.ndarray) -> tuple[float, float]:
    red, green, blue = piece.mean((0, 1)).tolist()
    return 0.299 * red + 0.587 * green + 0.114 * blue, red - blue


def by_light(shown: list[np.ndarray], record: dict, both: bool = True) -> str:
    """The relation of the asked pair by the rule: the lighter half of the pieces was above, the warmer at the left.

    In a column every piece has a row of its own. both: False reads light alone, and says "above" or "below" always.
    """
    light, warm = np.array([light_and_warmth(piece) for piece in shown]).T  # (n,), (n,)
    k, j = (position - 1 for position in record["pair"])
    if record["cols"] == 1 or not both:
        return "above" if light[k] > light[j] else "below"
    row = ((-light).argsort().argsort() // record["cols"]).tolist()  # the lightest are the first row
    col = ((-warm).argsort().argsort() // record["rows"]).tolist()
    parts = ["above"] * (row[k] < row[j]) + ["below"] * (row[k] > row[j])
    parts += ["left"] * (col[k] < col[j]) + ["right"] * (col[k] > col[j])
    return " and ".join(parts) or "above"


def seam(upper: np.ndarray, lower: np.ndarray) -> float:
    """How badly the last row of pixels of one piece goes with the first one of the next."""
    width = min(upper.shape[1], lower.shape[1])
    return float(np.abs(upper[-1, :width] - lower[0, :width]).mean())


def by_seams(shown: list[np.ndarray], record: dict) -> str:
    """The relation of the asked pair in the arrangement whose seams fit best, of all there are."""
    from questions import relation

    rows, cols = record["rows"], record["cols"]
    numbers = range(rows * cols)
    down = [[seam(shown[a], shown[b]) for b in numbers] for a in numbers]
    across = [[seam(shown[a].swapaxes(0, 1), shown[b].swapaxes(0, 1)) for b in numbers] for a in numbers]

    def cost(order):  # order[place] = the piece there
        vertical = sum(down[order[place - cols]][order[place]] for place in numbers if place >= cols)
        return vertical + sum(across[order[place - 1]][order[place]] for place in numbers if place % cols)

    best = min(itertools.permutations(numbers), key=cost)
    k, j = (best.index(position - 1) + 1 for position in record["pair"])
    return relation(k, j, cols)


READERS = {
    "light": by_light,
    "light, vertical only": lambda shown, record: by_light(shown, record, both=False),
    "seams": by_seams,
}


def score_readers(path: Path) -> dict[str, float]:
    """{reader: share of right answers} on a file of pair puzzles with separate pieces."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    right = {name: 0 for name in READERS}
    for record in records:
        shown = pieces(record, path.parent)
        truth = record["options"][ord(record["answer"]) - ord("A")]
        for name, reader in READERS.items():
            right[name] += reader(shown, record) == truth
    return {name: count / len(records) for name, count in right.items()}


def write_contrary(count: int, seed: int, size: int, out: Path) -> None:
    """`count` test scenes whose light falls the wrong way, as PNG files: a folder for jigsaw.py --images."""
    from toy.scenes import list_scenes, scene

    out.mkdir(parents=True, exist_ok=True)
    for number, scene_seed in enumerate(list_scenes(count, seed, "test", 0.1)):
        scene(random.Random(scene_seed), size, contrary=True).save(out / f"{number:04d}.png")


def parse_args(argv=None):
    from jigsaw import Parser, integer

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--contrary", type=integer("[1, 1e5]"), metavar="N", help="write N test scenes whose light falls the wrong way")
    add("--answers", type=Path, metavar="RECORDS", help="write SFT lines: these puzzles with their right answers, bare")
    add("--out", type=Path, metavar="PATH", help="folder of --contrary, file of --answers")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.contrary:
        write_contrary(args.contrary, 7, 112, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
