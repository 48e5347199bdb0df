"""The study of recipes/study_jigsaw.sh: Jigsaw-R1's five findings in miniature, from runs to docs/jigsaw_study.md.

    python bench/study_jigsaw.py --collect runs/study_jigsaw    # finished runs -> bench/results/study_jigsaw.json, and:
    python bench/study_jigsaw.py                                # that file -> the page's tables, the figures
    python bench/study_jigsaw.py --check                        # exit 1 if the page does not say what the file says

--contrary and --answers write data for the recipe: test scenes whose light falls from below, and the right answers of
puzzles as SFT lines.
"""

import itertools
import json
import random
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results/study_jigsaw.json"
sys.path.insert(0, str(HERE.parent))

from bench import pages  # noqa: E402
from toy.primer import RECHECK  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What a reply says

LIST = re.compile(r"(\d \d(?:, \d \d)*)\.")  # "1 6, 2 2.": every position, and the light of the piece there
CONCLUSION = re.compile(r"so (\d(?: \d)*)\.")
ANSWER = re.compile(r"<answer>(\d(?: \d)*)</answer>")


def read_thoughts(reply: str) -> dict:
    """What the tiny model's reasoning says, by the shapes that toy/primer.py has taught it.

    lists        [[level, …], …]: the light of every piece as said, once or (before and after "recheck:") twice
    conclusion   the list after "so", e.g. [2, 1]; None: none
    answer       the list in <answer>; None: none
    """
    thought, _, rest = reply.partition("</think>")
    lists = []
    for text in LIST.findall(thought.partition("so ")[0]):
        pairs = [tuple(map(int, pair.split())) for pair in text.split(", ")]
        if [position for position, _ in pairs] == list(range(1, len(pairs) + 1)):
            lists.append([level for _, level in pairs])
    found = {"conclusion": CONCLUSION.findall(thought), "answer": ANSWER.findall(rest)}
    last = {name: [int(number) for number in texts[-1].split()] if texts else None for name, texts in found.items()}
    return {"lists": lists, **last}


def falls(levels: list[int], order: list[int]) -> bool:
    """Whether the levels of the pieces at the positions `order` never rise: lighter pieces come first."""
    if sorted(order) != list(range(1, len(levels) + 1)):
        return False
    said = [levels[position - 1] for position in order]
    return all(first >= second for first, second in zip(said, said[1:], strict=False))


SHARES = ("consistent", "true", "licensed", "recheck", "verification", "backtracking", "ends_twice", "ends_once")


def thoughts_of(replies: list[tuple[str, dict]]) -> dict[str, float | None]:
    """Shares of replies, each with its record; None: of no reply at all.

    consistent     the answer is what the reason concludes (of those that have both)
    true           the levels said last put no two pieces of the column in the wrong order (of those that say levels)
    licensed       the conclusion is what these levels call for: light to dark, from above (of those that have both)
    recheck        looks twice; verification: and says the same; backtracking: and says something else
    ends_twice     comes to an answer, of those that look twice; ends_once: of the others
    """
    found = {name: [] for name in SHARES}
    for reply, record in replies:
        said = read_thoughts(reply)
        lists, conclusion, answer = said["lists"], said["conclusion"], said["answer"]
        if conclusion and answer:
            found["consistent"].append(conclusion == answer)
        if lists:
            found["true"].append(falls(lists[-1], record["answer"]))
        if lists and conclusion:
            found["licensed"].append(falls(lists[-1], conclusion))
        again = RECHECK in reply and len(lists) >= 2
        found["recheck"].append(RECHECK in reply)
        found["ends_twice" if RECHECK in reply else "ends_once"].append(answer is not None)
        found["verification"].append(again and lists[-1] == lists[-2])
        found["backtracking"].append(again and lists[-1] != lists[-2])
    return {name: round(float(np.mean(values)), 4) if values else None for name, values in found.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Readers by rule: what a perfect reader of the scenes' light would score, and what one of the seams would


def by_light(shown: list[np.ndarray]) -> list[int]:
    """Positions from the lightest piece to the darkest: the rule of a column."""
    light = [piece.mean((0, 1)) @ np.array([0.299, 0.587, 0.114]) for piece in shown]
    return sorted(range(1, len(shown) + 1), key=lambda position: -light[position - 1])


def by_light_and_warmth(shown: list[np.ndarray], cols: int) -> list[int]:
    """The rule of a grid: the lightest pieces are the first row, in it the warmest is at the left, and so on."""
    warm = [float(piece[:, :, 0].mean() - piece[:, :, 2].mean()) for piece in shown]
    order = by_light(shown)
    rows = [order[start : start + cols] for start in range(0, len(order), cols)]
    return [position for row in rows for position in sorted(row, key=lambda position: -warm[position - 1])]


def seam(first: np.ndarray, second: np.ndarray) -> float:
    """How badly the last row of pixels of one piece goes with the first one of the next."""
    width = min(first.shape[1], second.shape[1])
    return float(np.abs(first[-1, :width] - second[0, :width]).mean())


def by_seams(shown: list[np.ndarray], cols: int) -> list[int]:
    """The arrangement whose seams fit best, of all there are."""
    places = range(len(shown))
    down = [[seam(one, other) for other in shown] for one in shown]
    turned = [piece.swapaxes(0, 1) for piece in shown]
    across = [[seam(one, other) for other in turned] for one in turned]

    def cost(order):  # order[place] = the piece there
        vertical = sum(down[order[place - cols]][order[place]] for place in places if place >= cols)
        return vertical + sum(across[order[place - 1]][order[place]] for place in places if place % cols)

    return [piece + 1 for piece in min(itertools.permutations(places), key=cost)]


READERS = {
    "light": lambda shown, cols: by_light(shown),
    "light and warmth": by_light_and_warmth,
    "seams": by_seams,
}


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def score_readers(path: Path) -> dict[str, float]:
    """{reader: share of puzzles put in order whole}, on a file of `inverse` puzzles with separate pieces."""
    records = read_lines(path)
    right = dict.fromkeys(READERS, 0)
    for record in records:
        images = [Image.open(path.parent / name).convert("RGB") for name in record["images"]]
        shown = [np.asarray(image, dtype=np.float32) for image in images]
        for name, reader in READERS.items():
            right[name] += reader(shown, record["cols"]) == record["answer"]
    return {name: count / len(records) for name, count in right.items()}


def write_contrary(count: int, seed: int, size: int, out: Path) -> None:
    """`count` test scenes whose light falls the wrong way, as PNG files: a folder for jigsaw.py --images."""
    from toy.scenes import list_scenes, scene

    out.mkdir(parents=True, exist_ok=True)
    for number, scene_seed in enumerate(list_scenes(count, seed, "test", 0.1)):
        scene(random.Random(scene_seed), size, contrary=True).save(out / f"{number:04d}.png")


def write_answers(records: Path, out: Path) -> None:
    """SFT lines of puzzles without reasoning: each record with its right answer as `chosen`."""
    lines = []
    for record in read_lines(records):
        images = [str((records.parent / name).resolve()) for name in record["images"]]
        lines.append(record | {"images": images, "chosen": " ".join(map(str, record["answer"]))})
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---------------------------------------------------------------------------------------------------------------------
# Collecting finished runs

KINDS = ("think", "no-think")
SIZES = ("2x1", "3x1", "4x1", "2x2")
SETS = (*SIZES, "contrary")
PARTS = 4  # of a run's steps, for what changes along training
NAME = re.compile(r"(?P<arm>.+?)-(?P<seed>\d+)$")


def read_result(path: Path, tests: Path, kind: str) -> dict:
    """One evaluation: {set: {"exact", "accuracy", "format", of reasoning "thoughts"}}, and "downstream" by category."""
    rows = json.loads(path.read_text())["rows"]
    found = {}
    for name in SETS:
        records = {record["id"]: record for record in read_lines(tests / f"{kind}-{name}" / "records.jsonl")}
        mine = [row for row in rows if Path(row["file"]).parent.name == f"{kind}-{name}"]
        found[name] = {
            "n": sum(len(row["accuracy"]) for row in mine),
            "exact": share(value == 1 for row in mine for value in row["accuracy"]),
            "accuracy": share(value for row in mine for value in row["accuracy"]),
            "format": share(value for row in mine for value in row["format"]),
        }
        if kind == "think":
            said = [(reply, records[row["id"]]) for row in mine for reply in row.get("replies", [])]
            found[name]["thoughts"] = thoughts_of(said)
    downstream = [row for row in rows if row["source"].startswith("downstream-")]
    kinds = sorted({row["source"].removeprefix("downstream-").split(":")[0] for row in downstream})
    found["downstream"] = {
        kind: share(v for row in downstream if f"-{kind}" in row["source"] for v in row["accuracy"]) for kind in kinds
    }
    return found


def share(values) -> float:
    return round(float(np.mean(list(values))), 4)


def read_run(folder: Path, puzzles: Path) -> list[dict]:
    """A GRPO run of PARTS steps or more, in PARTS parts: means of the log, shares of what samples.jsonl kept."""
    rows, samples = read_lines(folder / "log.jsonl"), read_lines(folder / "samples.jsonl")
    records = {record["id"]: record for record in read_lines(puzzles / "records.jsonl")}
    parts = []
    for number in range(PARTS):
        begin, end = (len(rows) * edge // PARTS for edge in (number, number + 1))
        part = rows[begin:end]
        said = [(row["reply"], records[row["id"]]) for row in samples if begin < row["step"] <= end]
        parts.append({"until": end, "replies": len(said)} | {
            key: round(float(np.mean([row[key] for row in part])), 4)
            for key in ("accuracy", "format", "length", "kl", "seconds_sample", "seconds_learn")
        })  # fmt: skip
        if "no-think" not in folder.name:
            parts[-1]["thoughts"] = thoughts_of(said)
    return parts


def collect(folder: Path) -> dict:
    """A finished study as one small object. DataError-like ValueError if a part is missing."""
    import versus  # bench/versus.py

    study = {
        "commit": (folder / "commit").read_text().strip(),
        "machine": versus.machine(),
        "versions": {name: versus.versions()[name] for name in ("python", "torch", "transformers", "numpy")},
        "readers": {name: score_readers(folder / f"test/think-{name}/records.jsonl") for name in SETS},
        "results": {},
        "curves": {},
    }
    for path in sorted((folder / "results").glob("*.json")):
        kind = "no-think" if "no-think" in path.stem else "think"
        study["results"][path.stem] = read_result(path, folder / "test", kind)
    for path in sorted(folder.glob("*/args.json")):
        data = json.loads(path.read_text())["data"]
        if (path.parent / "samples.jsonl").exists() and Path(data[0]).parent.parent.name == "puzzles":
            study["curves"][path.parent.name] = read_run(path.parent, Path(data[0]).parent)
    return study


# ---------------------------------------------------------------------------------------------------------------------
# Numbers over seeds


def interval(values: list[float], draws: int = 10_000) -> tuple[float, float, float]:
    """(mean, low, high): the 95 % percentile interval of the mean over seeds, by bootstrap with a fixed seed.

    NaN for no values.
    """
    if not values:
        return np.nan, np.nan, np.nan
    values = np.array(values, dtype=float)
    chosen = np.random.RandomState(0).randint(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[chosen].mean(1), [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def shown(values: list[float | None], scale: float = 100, sign: str = "") -> str:
    """"97.5 (96.5–98.5)", in percent; one value alone has no interval, and of no value there is "–"."""
    values = [scale * value for value in values if value is not None]
    if not values:
        return "–"
    mean, low, high = interval(values)
    return f"{mean:{sign}.1f} ({low:.1f}–{high:.1f})" if len(values) > 1 else f"{mean:{sign}.1f}"


def of_arm(named: dict, arm: str) -> dict[int, dict]:
    """{seed: what stands under "ARM-SEED"}."""
    found = {}
    for name, value in named.items():
        match = NAME.fullmatch(name)
        if match and match["arm"] == arm:
            found[int(match["seed"])] = value
    return found


def downstream_mean(result: dict) -> float:
    return float(np.mean(list(result["downstream"].values())))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# The tables: study -> Markdown

CHANCE = {"2x1": 1 / 2, "3x1": 1 / 6, "4x1": 1 / 24, "2x2": 1 / 24, "contrary": 1 / 2}
METHODS = {"base": "base", "sft": "SFT", "sft-rl": "SFT, then RL", "rl": "RL"}


def results_of(study: dict, kind: str, method: str) -> list[dict]:
    """Results of one method on 2x1: one a seed, of the base one."""
    if method == "base":
        return [study["results"][f"base-{kind}"]]
    arm = f"{kind}-2x1" if method == "rl" else f"{method}-{kind}"
    return list(of_arm(study["results"], arm).values())


def subject_table(study: dict) -> str:
    rows = [["chance", *(f"{100 * CHANCE[name]:.1f}" for name in SETS)]]
    for reader in READERS:
        rows.append([f"reader of {reader}", *(f"{100 * study['readers'][name][reader]:.1f}" for name in SETS)])
    return table(["whole puzzles right, percent", *SIZES, "2x1, light from below"], rows)


def size_cells(found: list[dict]) -> list[str]:
    whole = [shown([result[name]["exact"] for result in found]) for name in SETS]
    return whole + [shown([result[name]["accuracy"] for result in found]) for name in SIZES[1:3]]


def main_table(study: dict) -> str:
    rows = []
    for kind in KINDS:
        rows.append([f"{kind}: base", *size_cells(results_of(study, kind, "base"))])
        for size in SIZES:
            found = list(of_arm(study["results"], f"{kind}-{size}").values())
            if found:
                rows.append([f"{kind}: RL on {size}, {seeds(found)}", *size_cells(found)])
    return table(["after", *SIZES, "2x1, light from below", "pieces right, 3x1", "4x1"], rows)


def seeds(found: list) -> str:
    return "1 seed" if len(found) == 1 else f"{len(found)} seeds"


def transfer_table(study: dict) -> str:
    bases = {kind: study["results"][f"base-{kind}"]["downstream"] for kind in KINDS}
    categories = list(bases["think"])
    rows = [["base", *(f"{100 * bases['think'][name]:.1f}" for name in categories),
             f"{100 * np.mean(list(bases['think'].values())):.1f}"]]  # fmt: skip
    for arm in ("think-2x1", "think-3x1", "no-think-2x1", "no-think-3x1", "no-think-2x2"):
        found = list(of_arm(study["results"], arm).values())
        if found:
            cells = [shown([result["downstream"][name] for result in found]) for name in categories]
            mean = shown([downstream_mean(result) for result in found])
            rows.append([f"RL on {arm.replace('think-', 'think, ')}, {seeds(found)}", *cells, mean])
    return table(["after", *categories, "mean"], rows)


def along_table(study: dict) -> str:
    """Reasoning: the base's test replies, parts of the run, test replies at the end; then unseen columns."""
    names = ("consistent", "true", "licensed")
    runs = list(of_arm(study["curves"], "think-2x1").values())

    def tested(size: str, method: str) -> list[str]:
        ends = [result[size] for result in results_of(study, "think", method)]
        cells = [shown([end["thoughts"][name] for end in ends]) for name in names]
        title = f"test on {size}: {'base' if method == 'base' else 'after RL on 2x1'}"
        return [title, shown([end["exact"] for end in ends]), *cells]

    rows = [tested("2x1", "base")]
    for number in range(PARTS):
        parts = [run[number] for run in runs]
        cells = [shown([part["thoughts"][name] for part in parts]) for name in names]
        rows.append([f"until step {parts[0]['until']}, sampled", shown([part["accuracy"] for part in parts]), *cells])
    rows.append(tested("2x1", "rl"))
    rows += [tested(size, method) for size in ("3x1", "4x1") for method in ("base", "rl")]
    head = ["think", "accuracy", "answer is the reason's", "reason is true of the picture", "conclusion follows"]
    return table(head, rows)


def patterns_table(study: dict) -> str:
    names = ("recheck", "verification", "backtracking", "ends_twice", "ends_once")
    base = study["results"]["base-think"]
    rows = []
    for arm in ("2x1", "3x1"):
        runs = list(of_arm(study["curves"], f"think-{arm}").values())
        for number in range(PARTS if runs else 0):
            parts = [run[number] for run in runs]
            cells = [shown([part["thoughts"][name] for part in parts]) for name in names]
            rows.append([f"training on {arm}, until step {parts[0]['until']}", *cells])
    for size in SIZES[:3]:
        ends = results_of(study, "think", "rl")
        rows.append([f"test on {size}: base", *(shown([base[size]["thoughts"][name]]) for name in names)])
        cells = [shown([end[size]["thoughts"][name] for end in ends]) for name in names]
        rows.append([f"test on {size}: after RL on 2x1", *cells])
    head = ["replies", "recheck", "says the same", "says something else", "has an answer, with a recheck",
            "without"]  # fmt: skip
    return table(head, rows)


def methods_table(study: dict) -> str:
    rows = []
    for kind in KINDS:
        for method, title in METHODS.items():
            found = results_of(study, kind, method)
            if method == "rl":  # the same seeds as the others
                found = found[: len(results_of(study, kind, "sft"))]
            if not found:
                continue
            cells = [shown([result[name]["exact"] for result in found]) for name in SIZES]
            title = title if method == "base" else f"{title}, {seeds(found)}"
            rows.append([f"{kind}: {title}", *cells, shown([downstream_mean(result) for result in found])])
    return table(["after", *SIZES, "downstream"], rows)


def machine_table(study: dict) -> str:
    """What depends on the machine, and what follows from files alone."""
    machine, versions = study["machine"], study["versions"]
    times = []
    for kind in KINDS:
        parts = [part for run in of_arm(study["curves"], f"{kind}-2x1").values() for part in run]
        per_step = np.mean([part["seconds_sample"] + part["seconds_learn"] for part in parts])
        times.append(f"{per_step:.2f} s ({kind})")
    rows = [
        ["puzzles, questions, readers of light and seams", "no: the same bytes everywhere"],
        ["every number of a trained model", "in its last digits, and then in its course: sums of floats have another "
         "order on another CPU; the intervals over seeds are what to compare"],
        ["seconds a GRPO step: " + ", ".join(times), f"yes: one thread of {machine['cores']} cores of "
         f"{machine['cpu']}, shared with other work; torch {versions['torch']}"],
    ]  # fmt: skip
    return table(["numbers", "depend on the machine"], rows)


TABLES = {
    "subject": subject_table,
    "sizes": main_table,
    "transfer": transfer_table,
    "reasoning": along_table,
    "patterns": patterns_table,
    "methods": methods_table,
    "machine": machine_table,
}


def rebuilt(text: str, study: dict) -> str:
    """The page with the table between every pair of markers made anew. pages.Refused for a marker that nobody fills."""

    def block(make) -> str:
        return f"Commit `{study['commit']}`.\n\n{make(study)}"

    blocks = {name: partial(block, make) for name, make in TABLES.items()}
    return pages.rebuilt(text, blocks, "bench/study_jigsaw.py", "the study's page")


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def bars(panel, groups: dict[str, list[list[float]]], labels: list[str]) -> None:
    """Grouped bars: group -> for every label the values of its seeds; the interval over seeds as a line."""
    width = 0.8 / len(groups)
    for number, (title, cells) in enumerate(groups.items()):
        numbers = [interval([100 * value for value in values if value is not None]) for values in cells]
        places = np.arange(len(cells)) + (number - (len(groups) - 1) / 2) * width
        means, lows, highs = np.array(numbers).T
        panel.bar(places, means, width, label=title, yerr=[means - lows, highs - means], error_kw={"lw": 0.8})
    panel.set_xticks(range(len(labels)), labels)
    panel.grid(axis="y", alpha=0.3)


def draw_sizes(panels, study: dict) -> None:
    for panel, kind in zip(panels, KINDS, strict=True):
        groups = {METHODS[method]: [[result[name]["exact"] for result in results_of(study, kind, method)]
                                    for name in SIZES] for method in ("base", "rl")}  # fmt: skip
        bars(panel, groups, list(SIZES))
        panel.plot(range(len(SIZES)), [100 * CHANCE[name] for name in SIZES], "k_", ms=22, label="chance")
        panel.set(title=f"{kind}: whole puzzles right, %", ylim=(0, 102))
    panels[1].legend(fontsize=8)


def draw_transfer(panels, study: dict) -> None:
    for panel, kind in zip(panels, KINDS, strict=True):
        base = study["results"][f"base-{kind}"]["downstream"]
        groups = {"base": [[value] for value in base.values()]}
        for size in SIZES:
            found = of_arm(study["results"], f"{kind}-{size}").values()
            if found:
                groups[f"RL on {size}"] = [[result["downstream"][name] for result in found] for name in base]
        bars(panel, groups, list(base))
        panel.set(title=f"{kind}: downstream, %", ylim=(0, 102))
        panel.legend(fontsize=7)


def draw_parts(panel, study: dict, arm: str, names: dict[str, str]) -> None:
    """Lines along a run's parts: mean over seeds, the interval shaded."""
    runs = list(of_arm(study["curves"], arm).values())
    steps = [part["until"] for part in runs[0]]
    for name, title in names.items():
        values = [[run[number].get(name, run[number]["thoughts"].get(name)) for run in runs] for number in range(PARTS)]
        percent = [[100 * each for each in part if each is not None] for part in values]
        means, lows, highs = np.array([interval(part) for part in percent]).T
        (line,) = panel.plot(steps, means, marker=".", label=title)
        panel.fill_between(steps, lows, highs, alpha=0.2, color=line.get_color())
    panel.set(xlabel="until GRPO step")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7)


def said_by_size(study: dict, name: str) -> dict[str, list[list[float]]]:
    """For `bars`: a share of the replies on the columns, before and after RL on 2x1."""
    return {
        METHODS[method]: [
            [result[size]["thoughts"][name] for result in results_of(study, "think", method)] for size in SIZES[:3]
        ]
        for method in ("base", "rl")
    }


def draw_reasoning(panels, study: dict) -> None:
    names = {"accuracy": "accuracy", "consistent": "answer is the reason's", "true": "reason is true",
             "licensed": "conclusion follows"}  # fmt: skip
    draw_parts(panels[0], study, "think-2x1", names)
    panels[0].set(title="think, trained on 2x1: replies sampled in training, %", ylim=(0, 102))
    bars(panels[1], said_by_size(study, "consistent"), list(SIZES[:3]))
    panels[1].set(title="answer is the reason's, test, %", ylim=(0, 102))
    panels[1].legend(fontsize=8)


def draw_patterns(panels, study: dict) -> None:
    names = {name: name for name in ("recheck", "verification", "backtracking")}
    draw_parts(panels[0], study, "think-2x1", names)
    panels[0].set(title="think, trained on 2x1: share of sampled replies, %")
    bars(panels[1], said_by_size(study, "recheck"), list(SIZES[:3]))
    panels[1].set(title="recheck by size, test, %")
    panels[1].legend(fontsize=8)


def draw_methods(panels, study: dict) -> None:
    for panel, kind in zip(panels, KINDS, strict=True):
        groups = {title: [[result[name]["exact"] for result in results_of(study, kind, method)] for name in SIZES]
                  for method, title in METHODS.items() if results_of(study, kind, method)}  # fmt: skip
        bars(panel, groups, list(SIZES))
        panel.set(title=f"{kind}: whole puzzles right, %", ylim=(0, 102))
    panels[1].legend(fontsize=7)


FIGURES = {
    "sizes": draw_sizes,
    "transfer": draw_transfer,
    "reasoning": draw_reasoning,
    "patterns": draw_patterns,
    "methods": draw_methods,
}


def draw(study: dict, folder: Path) -> None:
    """One PNG for every finding: folder/study_jigsaw_NAME.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, fill in FIGURES.items():
        figure, panels = plt.subplots(1, 2, figsize=(10, 3.2), dpi=100)
        fill(panels, study)
        figure.text(0.995, 0.01, f"commit {study['commit']}", ha="right", fontsize=6, color="grey")
        figure.tight_layout()
        figure.savefig(folder / f"study_jigsaw_{name}.png", metadata={"Software": None})
        plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv=None):
    from jigsaw import Parser, integer

    parser = Parser(__doc__)
    add = parser.add_argument
    add("--collect", type=Path, metavar="DIR", help="first take over a finished study: what its recipe's OUT was")
    add("--results", type=Path, default=RESULTS, metavar="FILE", help="the study's numbers")
    add("--page", type=Path, default=HERE.parent / "docs/jigsaw_study.md", metavar="FILE", help="its page")
    add("--figures", type=Path, default=HERE.parent / "docs/figures", metavar="DIR", help="gets the figures")
    add("--check", action="store_true", help="change nothing; exit 1 if the page does not say what the numbers say")
    add("--contrary", type=integer("[1, 1e5]"), metavar="N", help="only write N scenes lit from below")
    add("--answers", type=Path, metavar="RECORDS", help="only write SFT lines of these puzzles")
    add("--out", type=Path, metavar="PATH", help="folder of --contrary, file of --answers")
    args = parser.parse_args(argv)
    if (args.contrary or args.answers) and not args.out:
        parser.error("--contrary and --answers need --out")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.contrary:
        write_contrary(args.contrary, 7, 112, args.out)
        return 0
    if args.answers:
        write_answers(args.answers, args.out)
        return 0
    if args.collect:
        args.results.write_text(json.dumps(collect(args.collect), indent=1) + "\n")
    study = json.loads(args.results.read_text())
    text = args.page.read_text()
    page = rebuilt(text, study)
    if args.check:
        if page != text:
            print(f"{args.page} does not say what {args.results} says; run bench/study_jigsaw.py", file=sys.stderr)
        return int(page != text)
    args.page.write_text(page)
    draw(study, args.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
