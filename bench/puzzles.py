"""How many puzzles a second jigsaw.py makes on one core, from JPEG photographs of COCO's size, and of 448 pixels.

    python bench/puzzles.py [--against DIR] [--out bench/results/puzzles.json]

Makes 200 photographs of 640 x 480 pixels out of those that come with scikit-image, and runs jigsaw.py on them as a
command. A rate is puzzles per second of processor time, of all processes together, so other work on the machine
disturbs it little; what one puzzle takes (start, listing of the folder) is taken off. --against DIR: the jigsaw.py of
another checkout is measured the same way, as "before", with the flags it has.

The yardstick is Pillow alone in the same minutes: decode a photograph, shrink it by the box filter, encode it as JPEG
at quality 95. No jigsaw.py that uses Pillow can be faster. On a machine that others use, too, a processor second is
worth less; the share of the yardstick stays what it is.
"""

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jigsaw  # noqa: E402

SUBJECTS = ("astronaut", "coffee", "cat", "rocket", "hubble_deep_field", "immunohistochemistry", "motorcycle")
PHOTOGRAPHS = 200
COMMON = ["--max-side", "448", "--question", "pair", "--no-think", "--seed", "0"]
FAST = ["--resample", "box", "--format", "jpeg"]
# name -> (flags, puzzles)
RUNS = {
    "lanczos, png": ([], 200),
    "lanczos, jpeg": (["--format", "jpeg"], 400),
    "box, jpeg": (FAST, 800),
    "box, jpeg, one process": ([*FAST, "--workers", "1"], 800),
    "box, lazy": (["--resample", "box", "--lazy"], 800),
}
# The same of photographs that are 448 pixels wide already.
SMALL_RUNS = {"448 wide, jpeg": (["--format", "jpeg"], 800), "448 wide, lazy": (["--lazy"], 800)}


def make_photographs(folder: Path, size: tuple[int, int] = (640, 480)) -> None:
    """Crops of the subjects, resized to COCO's usual size (or another), JPEG at quality 90."""
    import skimage.data
    from PIL import Image

    rng = random.Random(0)
    subjects = []
    for name in SUBJECTS:
        if name == "motorcycle":
            subjects.append(Image.fromarray(skimage.data.stereo_motorcycle()[0]))
        else:
            subjects.append(Image.fromarray(getattr(skimage.data, name)()))
    for number in range(PHOTOGRAPHS):
        picture = subjects[number % len(subjects)]
        part = rng.uniform(0.6, 1.0)
        w = int(min(picture.width, picture.height * 4 / 3) * part)
        h = int(w * 3 / 4)
        x, y = rng.randint(0, picture.width - w), rng.randint(0, picture.height - h)
        crop = picture.crop((x, y, x + w, y + h)).resize(size, Image.Resampling.LANCZOS)
        crop.save(folder / f"{number:03d}.jpg", quality=90)


def seconds(checkout: Path, photographs: Path, flags: list[str], count: int) -> tuple[float, float]:
    """(processor time of a run and its children, wall time), in seconds."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(checkout / "jigsaw.py"), "--images", str(photographs), "--count", str(count)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        start = time.perf_counter()
        subprocess.run([*command, *COMMON, *flags, "--out", out], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - start
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(checkout: Path, photographs: Path, flags: list[str], count: int) -> dict:
    """The better of two rates: what disturbs a measurement only makes it slower."""
    rates = []
    for _ in range(2):
        alone, alone_wall = seconds(checkout, photographs, flags, 1)
        busy, wall = seconds(checkout, photographs, flags, count)
        rates.append(((count - 1) / (busy - alone), (count - 1) / (wall - alone_wall)))
    core, clock = max(rates)
    return {"puzzles": count, "per_core_second": round(core, 1), "per_second": round(clock, 1)}


YARDSTICK = """
import io, sys, time
from pathlib import Path
from PIL import Image
paths = sorted(Path(sys.argv[1]).iterdir())
for path in paths * 5:
    with Image.open(path) as image:
        image.load()
        small = image if image.width == 448 else image.resize((448, 336), Image.Resampling.BOX)
    small.save(io.BytesIO(), "JPEG", quality=95)
    spent = time.process_time()
    first = locals().get("first", spent)
print((len(paths) * 5 - 1) / (spent - first))
"""


def yardstick(photographs: Path) -> float:
    """Photographs a second of processor time that Pillow alone decodes, shrinks and encodes; the best of three."""
    environment = os.environ | jigsaw.KEEP_MEMORY
    command = [sys.executable, "-c", YARDSTICK, str(photographs)]
    runs = [subprocess.run(command, check=True, env=environment, capture_output=True, text=True) for _ in range(3)]
    return round(max(float(run.stdout) for run in runs), 1)


def commit_of(checkout: Path) -> str:
    def git(*words):
        return subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="another checkout, measured as before")
    parser.add_argument("--out", type=Path, help="a JSON file that gets the numbers")
    args = parser.parse_args(argv)

    os.environ["OMP_NUM_THREADS"] = "1"
    results = {"commit": commit_of(ROOT), "machine": platform.processor() or platform.machine()}
    results |= {"cores": os.cpu_count(), "load_average": round(os.getloadavg()[0], 1), "runs": {}}
    with tempfile.TemporaryDirectory() as made:
        photographs = Path(made)
        make_photographs(photographs)
        size = sum(path.stat().st_size for path in photographs.iterdir()) / PHOTOGRAPHS
        results["photographs"] = {"count": PHOTOGRAPHS, "size": "640x480", "mean_kilobytes": round(size / 1000)}
        results["yardstick_per_core_second"] = yardstick(photographs)
        print(f"{'Pillow alone':34s} {results['yardstick_per_core_second']} a second of a core")
        if args.against:
            name = f"before (commit {commit_of(args.against)})"
            results["runs"][name] = measure(args.against, photographs, [], 100)
            print(f"{name:34s} {results['runs'][name]}")
        for name, (flags, count) in RUNS.items():
            results["runs"][name] = measure(ROOT, photographs, flags, count)
            print(f"{name:34s} {results['runs'][name]}")
    with tempfile.TemporaryDirectory() as made:
        small = Path(made)
        make_photographs(small, (448, 336))
        results["yardstick_448_per_core_second"] = yardstick(small)
        print(f"{'Pillow alone, 448 wide':34s} {results['yardstick_448_per_core_second']} a second of a core")
        for name, (flags, count) in SMALL_RUNS.items():
            results["runs"][name] = measure(ROOT, small, flags, count)
            print(f"{name:34s} {results['runs'][name]}")
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
