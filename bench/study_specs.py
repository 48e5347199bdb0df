"""The study of recipes/study_specs.sh: SPECS in miniature, from finished runs to the tables of docs/specs_study.md.

    python bench/study_specs.py --collect runs/study_specs     # runs -> bench/results, then the page
    python bench/study_specs.py                                # that file -> the page's tables, and the figures
    python bench/study_specs.py --check                        # exit 1 if the page says something else
    python bench/study_specs.py --table runs/study_specs/0     # print the tables of one seed, as far as it is

A number in a table is a mean over seeds, in brackets the 95 % interval of a bootstrap over seeds: how far the mean
would move with other seeds, and nothing about other models; differences seed by
seed have Student's instead. The committed file names the commit and the machine.

Legend: seeds: {"0": run}; a run is what `collect_seed` keeps of one seed; gains and GF are percentage points.
"""

import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import pages  # noqa: E402

RESULTS = HERE / "results/study_specs.json"
PAGE = HERE.parent / "docs/specs_study.md"
FIGURES = HERE.parent / "docs/figures"

COLD = {"sft": "SFT", "dpo": "DPO", "half": "DPO + 0.5 SFT", "specs": "DPO + SFT"}
LONGER = {"longer-sft": "SFT", "longer-dpo": "DPO", "longer-specs": "DPO + SFT"}
PAIRS = {
    "specs": "GRPO-zero, decoupled, judged (SPECS)",
    "unjudged": "the same without the judge",
    "coupled": "coupled: the rejected reply may be wrong",
    "chosen": "rejected: the chosen reply, corrupted",
    "base": "chosen: a reply of the base",
    "teacher": "chosen: a reply of a teacher",
}
SHORT = {
    "unjudged": "no judge",
    "coupled": "coupled",
    "chosen": "chosen, corrupted",
    "base": "base",
    "teacher": "teacher",
}
RL = {
    "none": "no cold start",
    "sft": "SFT",
    "specs": "DPO + SFT",
    "half": "DPO + 0.5 SFT",
    "dpo": "DPO",
    "coupled": "DPO + SFT on coupled pairs",
    "base": "DPO + SFT on the base's pairs",
    "teacher": "DPO + SFT on a teacher's pairs",
}
FORMATS = {
    "trained": "trained format",
    "tags": "tags, new words",
    "seen": "other shapes, new words",
    "unseen": "new shapes, new words",
    "tags-asked-anew": "tags, new words, asked for in a new way",
}
SEEING = ("follow", "base", "zero")
EXPLORED = {
    "base": "base",
    "zero": "GRPO-zero",
    "cold-sft": "cold start SFT",
    "cold-specs": "cold start DPO + SFT",
    "rl-none": "GRPO alone",
    "rl-sft": "SFT, then GRPO",
    "rl-specs": "DPO + SFT, then GRPO",
}
RL_KEYS = ("step", "reward", "accuracy", "format", "loss", "grad_norm", "entropy")
COLD_KEYS = ("step", "loss_sft", "chosen_reward", "rejected_reward", "preference_accuracy")


class Refused(pages.Refused):
    """The message says what is missing, and how to get it."""


# ---------------------------------------------------------------------------------------------------------------------
# Collecting


def read_log(path: Path, keys: tuple[str, ...]) -> list[dict]:
    """The fields of a run's log.jsonl that figures need, to five digits."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: float(f"{row[key]:.5g}") for key in keys if row.get(key) is not None} for row in rows]


def by_format(result: dict) -> dict[str, dict[str, float]]:
    """{format: {"format", "accuracy"}} of what eval.py wrote about the test sets, in percent."""
    return {
        name.removeprefix("formats-"): {key: round(100 * source[key], 3) for key in ("format", "accuracy")}
        for name, source in result["sources"].items()
    }


def curve_of(result: dict) -> list[dict]:
    """Along a cold start: step, the two gains, GF and the formats kept.

    Where a gain is below zero GF has no value, and counts as the 0 that it goes to as the gain does: were it left out,
    a loss would be measured on those seeds alone in which it forgets nothing.
    """
    curve = []
    for point in result["curve"]:
        gains = point["gf"] or {}
        row = {"gain_id": gains.get("gain_id"), "gain_ood": gains.get("gain_ood"), "gf": gains.get("gf") or 0.0}
        curve.append({"step": point["step"], **row, "formats": by_format(point)})
    return curve


def read_seed(folder: Path) -> dict:
    """What the tables and figures need of one seed's runs, as far as they have finished."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    pairs = {}
    for path in sorted(folder.glob("pairs*.jsonl")):
        pairs[path.stem.removeprefix("pairs").removeprefix("-") or "specs"] = len(path.read_text().splitlines())
    explored = {}
    for name in [name for name in EXPLORED if f"explore-{name}" in results]:
        overall = results[f"explore-{name}"]["overall"]
        explored[name] = {key: overall[key] for key in overall if key.startswith("pass@")}
        explored[name] |= {key: overall[key] for key in ("rbf", "entropy", "distinct")}
    logs = {"zero": read_log(folder / "zero/log.jsonl", RL_KEYS)} if "zero" in results else {}
    for part, names, keys in (("rl", RL, RL_KEYS), ("cold", COLD, COLD_KEYS)):
        for name in [name for name in names if f"{part}-{name}" in results]:
            logs[f"{part}-{name}"] = read_log(folder / part / name / "log.jsonl", keys)
    seen = {name: results[f"see-{name}"]["overall"]["accuracy_read"] for name in SEEING if f"see-{name}" in results}
    return {
        "follow": by_format(results["follow"]) if "follow" in results else {},
        "see": {name: round(100 * share, 3) for name, share in seen.items()},
        "zero": curve_of(results["zero"]) if "zero" in results else [],
        "cold": {name[5:]: curve_of(result) for name, result in results.items() if name.startswith("cold-")},
        "rl": {name[3:]: by_format(result) for name, result in results.items() if name.startswith("rl-")},
        "explore": explored,
        "pairs": pairs,
        "logs": logs,
    }


def collect_seed(folder: Path) -> dict:
    """read_seed of a chain that has finished. Refused if it has not."""
    needed = ["follow", "zero", "rl-none", "rl-sft", "rl-specs"]
    needed += [f"cold-{name}" for name in COLD] + [f"explore-{name}" for name in EXPLORED]
    needed += [f"see-{name}" for name in SEEING]
    missing = [name for name in needed if not (folder / f"results/{name}.json").exists()]
    if missing:
        raise Refused(f"{folder}: {missing[0]} is missing; bash recipes/study_specs.sh {folder.parent} {folder.name}")
    return read_seed(folder)


def check_lengths(seeds: dict) -> None:
    """Refused if seeds ran with different numbers of steps (PART), for then a row would be of no one recipe."""
    lengths: dict[str, tuple[str, int]] = {}
    for seed, run in seeds.items():
        for name, rows in run["logs"].items():
            first, length = lengths.setdefault(name, (seed, len(rows)))
            if length != len(rows):
                raise Refused(f"{name}: {length} steps of seed {first}, {len(rows)} of seed {seed}: one PART for all")


def collect(folder: Path) -> None:
    """Take over every finished seed of a study."""
    import torch
    import transformers

    seeds, left_out = {}, []
    for path in sorted((path for path in folder.iterdir() if path.name.isdigit()), key=lambda path: int(path.name)):
        try:
            seeds[path.name] = collect_seed(path)
        except Refused as cause:
            left_out.append(str(cause))
    for cause in left_out:
        print(f"left out: {cause}", file=sys.stderr)
    if not seeds:
        raise Refused(f"{folder}: no seed has finished")
    check_lengths(seeds)
    commit = " and ".join((folder / "commit").read_text().split()) if (folder / "commit").exists() else "unknown"
    found = {"commit": commit, "machine": f"{platform.machine()}, torch {torch.__version__}, transformers "
             f"{transformers.__version__}", "seeds": seeds}  # fmt: skip
    RESULTS.write_text(json.dumps(found, separators=(",", ":")) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Means and intervals


def interval(values: list[float], samples: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap of the mean over seeds; the generator's seed is fixed, so a page can be checked."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.array(values), (samples, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


# Student's t at 97.5 %, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def student(values: list[float]) -> tuple[float, float]:
    """95 % interval of a mean of two to ten values, as if they were normal."""
    half = STUDENT[len(values) - 1] * stdev(values) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


def cell(values: list[float | None], digits: int = 1, signed: bool = False, bounds: Callable = interval) -> str:
    """ "mean (low … high)" over seeds; a value that is not defined for a seed leaves it out, and says so."""
    defined = [value for value in values if value is not None]
    if not defined:
        return "–"
    sign = "+" if signed else ""
    text = f"{fmean(defined):{sign}.{digits}f}"
    if len(defined) > 1:
        low, high = bounds(defined)
        text += f" ({low:{sign}.{digits}f} … {high:{sign}.{digits}f})"
    if len(defined) < len(values):
        text += f", {len(defined)} of {len(values)} seeds"
    return text


def table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [" | ".join(titles), "|".join("---" for _ in titles), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" if index != 1 else f"|{line}|" for index, line in enumerate(lines))


def over(seeds: dict, get: Callable[[dict], float | None]) -> list[float | None]:
    return [get(run) for run in seeds.values()]


def with_part(seeds: dict, part: str, name: str) -> dict:
    """The seeds whose runs have an ablation."""
    return {seed: run for seed, run in seeds.items() if name in run[part]}


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def subject_table(found: dict) -> str:
    """Can the subject copy what the prompt shows, and see, and what does the base keep of it?"""
    seeds = found["seeds"]
    seen = [cell(over(seeds, lambda run, name=name: run["see"].get(name))) for name in SEEING]
    rows = [["names the right letter for how a piece looks, of the replies that can be read", *seen]]
    for key, title in FORMATS.items():
        rows.append([
            f"format kept: {title}",
            cell(over(seeds, lambda run, key=key: run["follow"].get(key, {}).get("format"))),
            cell(over(seeds, lambda run, key=key: run["zero"][0]["formats"][key]["format"])),
            cell(over(seeds, lambda run, key=key: run["zero"][-1]["formats"][key]["format"])),
        ])  # fmt: skip
    return table(["percent of replies", "taught to follow always", "base", "GRPO-zero"], rows)


def last(run: dict, name: str, key: str) -> float | None:
    return run["cold"][name][-1][key]


def best_step(seeds: dict, name: str) -> tuple[int, list[float | None]]:
    """The step with the highest mean GF, and the values there. A choice after the fact: the table says so."""
    steps = [point["step"] for point in next(iter(seeds.values()))["cold"][name]][1:]
    values = {
        step: [next(p["gf"] for p in run["cold"][name] if p["step"] == step) for run in seeds.values()]
        for step in steps
    }
    step = max(steps, key=lambda s: fmean([v for v in values[s] if v is not None] or [-1.0]))
    return step, values[step]


def cold_rows(seeds: dict, names: dict[str, str], part: str = "cold") -> list[list[str]]:
    rows = []
    for name, title in names.items():
        having = with_part(seeds, part, name)
        if not having:
            continue
        step, best = best_step(having, name)
        rows.append([
            title,
            cell(over(having, lambda run, name=name: last(run, name, "gain_id")), signed=True),
            cell(over(having, lambda run, name=name: last(run, name, "gain_ood")), signed=True),
            cell(over(having, lambda run, name=name: last(run, name, "gf"))),
            f"{cell(best)} at {step}",
        ])  # fmt: skip
    return rows


COLD_TITLES = ["", "gain, trained format", "gain, other formats", "GF at the end", "highest GF, at update"]


def cold_table(found: dict) -> str:
    return table(["cold start", *COLD_TITLES[1:]], cold_rows(found["seeds"], COLD))


def pairs_table(found: dict) -> str:
    having = with_part(found["seeds"], "cold", "teacher")
    if not having:
        return "The ablations have not run."
    rows = []
    for name, title in PAIRS.items():
        count = cell(over(with_part(having, "cold", name), lambda run, name=name: float(run["pairs"][name])), 0)
        rows += [[row[0], count, *row[1:]] for row in cold_rows(having, {name: title})]
    return table(["pairs", "how many", *COLD_TITLES[1:]], rows)


def grpo_rows(run: dict, name: str) -> list[dict]:
    """The last 100 steps: GRPO from the base has twelve more, which the cold starts had as GRPO-zero."""
    return run["logs"][f"rl-{name}"][-100:]


def early(run: dict, name: str, key: str, steps: int = 25) -> float:
    """Mean of the first steps, in percent."""
    return 100 * fmean(row[key] for row in grpo_rows(run, name)[:steps])


def whole(run: dict, name: str, key: str) -> float:
    return fmean(row[key] for row in grpo_rows(run, name))


def steps_to(run: dict, name: str, level: float = 0.75, window: int = 10) -> float | None:
    """Steps until the accuracy of sampled replies, on average over the last ten steps, reaches a level."""
    accuracies = [row["accuracy"] for row in grpo_rows(run, name)]
    steps = range(window, len(accuracies) + 1)
    return next((float(step) for step in steps if fmean(accuracies[step - window : step]) >= level), None)


def other_formats(formats: dict) -> float:
    """Mean share of formats kept over those that were not trained."""
    return fmean(values["format"] for key, values in formats.items() if key != "trained")


def rl_table(found: dict) -> str:
    rows = []
    for name, title in RL.items():
        having = with_part(found["seeds"], "rl", name)
        if not having:
            continue
        rows.append([
            title,
            f"{len(having)}",
            cell(over(having, lambda run, name=name: run["rl"][name]["trained"]["accuracy"])),
            cell(over(having, lambda run, name=name: run["rl"][name]["trained"]["format"])),
            cell(over(having, lambda run, name=name: other_formats(run["rl"][name]))),
            cell(over(having, lambda run, name=name: early(run, name, "format"))),
            cell(over(having, lambda run, name=name: whole(run, name, "reward")), 2),
            cell(over(having, lambda run, name=name: steps_to(run, name)), 0),
        ])  # fmt: skip
    titles = ["GRPO from", "seeds", "accuracy", "format", "other formats", "format, 25 steps", "reward, 100 steps"]
    titles.append("steps to 75 %")
    return table(titles, rows)


def explore_table(found: dict) -> str:
    seeds = found["seeds"]
    rows = []
    for name, title in EXPLORED.items():
        got = [run["explore"][name] for run in seeds.values()]
        rows.append([title, *(cell([100 * one[f"pass@{k}"] for one in got]) for k in (1, 8, 64)),
                     cell([one["distinct"] for one in got], 1), cell([one["rbf"] for one in got], 2),
                     cell([one["entropy"] for one in got], 3)])  # fmt: skip
    return table(["after", "pass@1", "pass@8", "pass@64", "distinct of 64", "RBF", "entropy, nats a token"], rows)


def after_cold(key: str) -> Callable:
    """A number at the end of a cold start: get(run, name), None if it has not run."""
    return lambda run, name: run["cold"][name][-1][key] if name in run["cold"] else None


def after_rl(get: Callable) -> Callable:
    """A number of GRPO, or of the model after it."""
    return lambda run, name: get(run, name) if name in run["rl"] else None


def explored(part: str, key: str) -> Callable:
    return lambda run, name: run["explore"].get(f"{part}-{name}", {}).get(key)


# Measure -> (digits, get(run, name)).
GAINED: dict[str, tuple[int, Callable]] = {
    "gain, trained format": (1, after_cold("gain_id")),
    "gain, other formats": (1, after_cold("gain_ood")),
    "GF": (1, after_cold("gf")),
}
GRPO: dict[str, tuple[int, Callable]] = {
    "after GRPO: accuracy": (1, after_rl(lambda run, name: run["rl"][name]["trained"]["accuracy"])),
    "after GRPO: format": (1, after_rl(lambda run, name: run["rl"][name]["trained"]["format"])),
    "after GRPO: other formats": (1, after_rl(lambda run, name: other_formats(run["rl"][name]))),
    "GRPO's reward, 100 steps": (2, after_rl(lambda run, name: whole(run, name, "reward"))),
    "GRPO's steps to 75 % accuracy": (0, after_rl(lambda run, name: steps_to(run, name))),
}
EXPLORING: dict[str, tuple[int, Callable]] = {
    "RBF after the cold start": (3, explored("cold", "rbf")),
    "RBF after GRPO": (3, explored("rl", "rbf")),
}


def differences(seeds: dict, reference: str, title: str, names: dict[str, str], measures: dict) -> str:
    """Means of what a start changes against another one, seed by seed: the base cancels out, and bases differ most.

    With Student's intervals: a bootstrap of five values is too narrow to tell a small difference from none.
    """
    rows = []
    for measure, (digits, get) in measures.items():
        row = [measure]
        for name in names:
            both = [(get(run, name), get(run, reference)) for run in seeds.values()]
            values = [mine - other for mine, other in both if mine is not None and other is not None]
            higher = f"; {sum(value > 0 for value in values)} of {len(values)}" if values else ""
            row.append(cell(values, digits, signed=True, bounds=student) + higher)
        rows.append(row)
    return table([f"minus {title}", *names.values()], rows)


def longer_table(found: dict) -> str:
    having = with_part(found["seeds"], "cold", "longer-specs")
    if not having:
        return "The longer cold starts have not run."
    rows = table(["120 updates of", *COLD_TITLES[1:]], cold_rows(having, LONGER))
    names = {name: title for name, title in LONGER.items() if name != "longer-sft"}
    return f"{rows}\n\n{differences(having, 'longer-sft', 'SFT, seed by seed', names, GAINED)}"


def seed_by_seed_table(found: dict) -> str:
    names = {name: RL[name] for name in ("none", "dpo", "half", "specs")}
    return differences(found["seeds"], "sft", "SFT", names, GAINED | GRPO | EXPLORING)


def pairs_by_seed_table(found: dict) -> str:
    having = with_part(found["seeds"], "cold", "teacher")
    if not having:
        return "The ablations have not run."
    return differences(having, "specs", "SPECS", SHORT, GAINED | GRPO)


def spread(values: list[float]) -> float:
    """Mean absolute change from one step to the next."""
    return fmean(abs(b - a) for a, b in zip(values, values[1:], strict=False))


def stability_table(found: dict) -> str:
    """Of the last 50 steps of GRPO: how high the format reward stands, and how much a step moves."""
    rows = []
    for name, title in RL.items():
        having = with_part(found["seeds"], "rl", name)
        if not having:
            continue

        def tail(run, key, name=name):
            return [row[key] for row in run["logs"][f"rl-{name}"][-50:]]

        rows.append([
            title,
            f"{len(having)}",
            cell(over(having, lambda run: 0.5 * fmean(tail(run, "format"))), 3),
            cell(over(having, lambda run: 0.5 * spread(tail(run, "format"))), 3),
            cell(over(having, lambda run: float(np.std(tail(run, "loss")))), 4),
            cell(over(having, lambda run: fmean(tail(run, "grad_norm"))), 2),
        ])  # fmt: skip
    titles = ["GRPO from", "seeds", "format reward (most: 0.5)", "its change a step", "spread of the loss"]
    return table([*titles, "gradient norm"], rows)


def provenance(found: dict) -> str:
    named = ", ".join(found["seeds"])
    parts = {"pairs": "teacher", "longer cold starts": "longer-specs"}
    having = {title: with_part(found["seeds"], "cold", name) for title, name in parts.items()}
    having["GRPO from more starts"] = with_part(found["seeds"], "rl", "teacher")
    further = [f"{title}: seeds {', '.join(seeds) or 'none'}" for title, seeds in having.items()]
    return (
        f"Seeds {named}; {'; '.join(further)}. Commit `{found['commit']}`; {found['machine']}. Means over seeds, "
        "in brackets 95 % bootstrap intervals over seeds."
    )


BLOCKS: dict[str, Callable[[dict], str]] = {
    "provenance": provenance,
    "subject": subject_table,
    "cold": cold_table,
    "longer": longer_table,
    "pairs": pairs_table,
    "rl": rl_table,
    "seeds": seed_by_seed_table,
    "pairs_seeds": pairs_by_seed_table,
    "explore": explore_table,
    "stability": stability_table,
}


def aligned(markdown: str) -> str:
    """A table with its cells padded, to be read on a terminal."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines()]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    rows[1] = ["-" * width for width in widths]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def print_tables(folder: Path) -> None:
    """The page's main tables, of one seed whose chain need not be finished or whole."""
    run = read_seed(folder)
    if not run["zero"]:
        raise Refused(f"{folder}: results/zero.json is missing: no seed of recipes/study_specs.sh or recipes/demo.sh")
    for name in ("subject", "cold", "rl"):
        text = BLOCKS[name]({"seeds": {folder.name: run}})
        if text.count("\n") > 1:  # some of its rows have run
            print("\n" + aligned(text))


# ---------------------------------------------------------------------------------------------------------------------
# Figures

GAINS = {"gain_id": "gain, trained format", "gain_ood": "gain, other formats", "gf": "GF"}


def mean_curve(seeds: dict, name: str, key: str) -> tuple[list[int], list[float], list[float], list[float]]:
    """(steps, mean, low, high) of a curve along a cold start; points that no seed defines are left out."""
    steps, means, lows, highs = [], [], [], []
    for index, point in enumerate(next(iter(seeds.values()))["cold"][name]):
        values = [run["cold"][name][index][key] for run in seeds.values()]
        values = [value for value in values if value is not None]
        if values:
            low, high = interval(values) if len(values) > 1 else (values[0], values[0])
            steps.append(point["step"])
            means.append(fmean(values))
            lows.append(low)
            highs.append(high)
    return steps, means, lows, highs


def draw_cold(panels, seeds: dict, names: dict[str, str]) -> None:
    """Gains and GF along cold starts, one a panel."""
    for panel, (key, title) in zip(panels, GAINS.items(), strict=False):
        for name, label in names.items():
            steps, means, lows, highs = mean_curve(seeds, name, key)
            (line,) = panel.plot(steps, means, marker="o", ms=3, label=label)
            panel.fill_between(steps, lows, highs, color=line.get_color(), alpha=0.15, lw=0)
        panel.set(title=f"{title} (points)", xlabel="update")
        panel.axhline(0, color="grey", lw=0.8, ls=":")
    panels[0].legend(fontsize=7)


def draw(found: dict) -> None:
    """specs_gf.png: gains and GF along the cold starts, specs_longer.png: along longer ones; specs_rl.png: GRPO."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = found["seeds"]
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), dpi=110)
    draw_cold(panels, seeds, COLD)
    for name, label in COLD.items():
        if name != "sft":
            rows = [run["logs"][f"cold-{name}"] for run in seeds.values()]
            steps = [row["step"] for row in rows[0]]
            chosen, rejected = (
                np.mean([[row[f"{side}_reward"] for row in log] for log in rows], 0) for side in ("chosen", "rejected")
            )
            (line,) = panels[3].plot(steps, chosen, label=label)
            panels[3].plot(steps, rejected, color=line.get_color(), ls="--")
    panels[3].set(title="implicit reward: chosen —, rejected - -", xlabel="update")
    panels[3].legend(fontsize=7)
    finish(figure, FIGURES / "specs_gf.png", found)

    having = with_part(seeds, "cold", "longer-specs")
    if having:
        figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.2), dpi=110)
        draw_cold(panels, having, LONGER)
        finish(figure, FIGURES / "specs_longer.png", {**found, "seeds": having})

    figure, panels = plt.subplots(1, 4, figsize=(14, 3.2), dpi=110)
    for panel, key in zip(panels, ("format", "accuracy", "loss", "grad_norm"), strict=True):
        for name, label in RL.items():
            having = with_part(seeds, "rl", name)
            if not having or name in PAIRS.keys() - COLD.keys():
                continue
            logs = [run["logs"][f"rl-{name}"] for run in having.values()]
            mean = np.mean([[row[key] for row in log] for log in logs], 0)
            smooth = [mean[max(0, i - 4) : i + 5].mean() for i in range(len(mean))]
            panel.plot([row["step"] for row in logs[0]], smooth, label=f"{label}, {len(having)} seeds")
        panel.set(title={"loss": "policy loss", "grad_norm": "gradient norm"}.get(key, key), xlabel="GRPO step")
    panels[0].legend(fontsize=7)
    finish(figure, FIGURES / "specs_rl.png", found)


def finish(figure, path: Path, found: dict) -> None:
    for panel in figure.axes:
        panel.grid(alpha=0.3)
    note = f"{len(found['seeds'])} seeds, commit {found['commit']}"
    figure.text(0.995, 0.01, note, ha="right", fontsize=6, color="grey")
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


# ---------------------------------------------------------------------------------------------------------------------
# The page


def rebuilt(text: str, found: dict) -> str:
    """The page with every block between its markers made anew."""
    blocks = {name: partial(build, found) for name, build in BLOCKS.items()}
    return pages.rebuilt(text, blocks, "bench/study_specs.py", PAGE.name, each_once=True)


def parse_args(argv=None):
    from training import Parser

    parser = Parser(__doc__)
    parser.add_argument("--collect", type=Path, metavar="DIR", help="the study's folder, to take over first")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not up to date")
    parser.add_argument("--table", type=Path, metavar="DIR", help="print the tables of one seed's folder, and no more")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if args.table:
            print_tables(args.table)
            return 0
        if args.collect:
            collect(args.collect)
        found = json.loads(RESULTS.read_text())
        text = rebuilt(PAGE.read_text(), found)
        if args.check:
            stale = text != PAGE.read_text()
            if stale:
                print(f"{PAGE.name} does not say what {RESULTS.name} says; run bench/study_specs.py", file=sys.stderr)
            return int(stale)
        PAGE.write_text(text)
        draw(found)
    except pages.Refused as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
