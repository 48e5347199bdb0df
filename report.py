"""Report: one HTML page with tables, training curves, replies and pairs to read. No model is run.

    python report.py --out report.html --runs runs/grpo --results base=base.json grpo=tuned.json
    python report.py --out report.html --runs first=runs/a second=runs/b --table table.md
    python report.py --out gf.html --results sft=sft.json dpo=dpo.json     results of eval.py --checkpoints: GF by step
    python report.py --out pairs.html --pairs pairs.jsonl                  pairs, what differs marked (pairs_page.py)

The page needs no network and no scripts: pictures travel inside it, and a content policy forbids the rest. The curves
are also written beside it as PNG files. `python eval.py --report report.html …` does the same.

Legend: run, a run directory, whose log.jsonl has one entry a step; result, a result file of eval.py, with one row a
record; stage, the name a result is given, a column of the table; source, a set of questions, a line of the table; gold,
the right answer. Accuracy and format are fractions of 1, lengths are tokens.
"""

import argparse
import hashlib
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from PIL import Image

import files
import pairs_page
import training
from files import DataError
from html_page import (
    NAME_CHARACTERS,
    document,
    escape,
    figure_html,
    pictures_html,
    png_bytes,
    table_html,
    visible,
    visible_name,
)
from training import integer

# ---------------------------------------------------------------------------------------------------------------------
# Reading

# What a row of a result holds for each of its replies.
SCORES = ("accuracy", "format", "reward", "length", "parsed", "finished")

# The metrics of a source in a cell of the table.
CELL = ("accuracy", "accuracy_read", "format")

# Beyond it the axes of a figure overflow, and nothing here is measured in such numbers.
LARGEST = 1e30
LAST_STEP = 2**53


class RunLog(NamedTuple):
    """A run directory: the entries of its log.jsonl, its args.json (None if there is none), and what is not shown."""

    log: list[dict]
    settings: dict | None
    left_out: str = ""  # a sentence about damaged lines, "" if there are none


def is_number(value: object) -> bool:
    """Whether a JSON value can be drawn and averaged: no text, no NaN, no 10^400."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -LARGEST <= value <= LARGEST  # false for NaN


def is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LAST_STEP


def read_run(folder: Path) -> RunLog:
    """Read a run directory. DataError if it is none, or if not one step of its log can be read."""
    log_file, args_file = folder / "log.jsonl", folder / "args.json"
    if not os.path.isfile(log_file):
        raise DataError(f"{folder}: has no log.jsonl, so it is not a run directory")
    log, left_out = read_log(log_file)
    if not log:
        raise DataError(f"{log_file}: must hold at least one step. {left_out}")
    if not os.path.lexists(args_file):
        return RunLog(log, None, left_out)
    return RunLog(log, files.read_json_object(args_file), left_out)


def read_log(path: Path) -> tuple[list[dict], str]:
    """(the entries of a log.jsonl, a sentence about the lines that are none). A killed run ends in half a line."""
    log, problems = [], []
    for number, line in enumerate(files.read_bytes(path, files.LARGEST_TEXT).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            problems.append(f"line {number} is not JSON")
            continue
        if isinstance(entry, dict) and is_step(entry.get("step")):
            log.append(entry)
        else:
            problems.append(f'line {number} has no "step" that is a whole number')
    if not problems:
        return log, ""
    return log, f"{len(problems)} lines of log.jsonl are left out: first, {problems[0]}."


def read_result(path: str | Path) -> dict:
    """A result of eval.py, with its rows' paths made absolute. DataError if it is missing or something else."""
    result = files.read_json(path)
    problem = problem_with_result(result)
    if problem:
        raise DataError(f"{path}: is not a result of eval.py ({problem})")

    # The result may have been moved together with its pictures: its paths count from where it lies now.
    folder = Path(path).absolute().parent
    for row in result["rows"]:
        row["file"] = os.path.abspath(folder / row["file"])
        if "images" in row:
            row["images"] = [os.path.abspath(folder / image) for image in row["images"]]
    return result


def problem_with_result(result: object) -> str | None:
    """What keeps a JSON value from being a result of eval.py, or None."""
    if not isinstance(result, dict) or not {"model", "overall", "sources", "gf", "rows"} <= result.keys():
        return "model, overall, sources, gf and rows are expected"
    for name, kind in (("model", str), ("overall", dict), ("sources", dict), ("rows", list)):
        if not isinstance(result[name], kind):
            return f'"{name}" must be {kind.__name__}'
    points = result.get("curve") or []
    if not is_list(points, lambda point: isinstance(point, dict) and is_step(point.get("step"))):
        return '"curve" must be null or a list of objects with a step'
    for point in [result, *points]:
        problem = problem_with_metrics(point)
        if problem:
            return problem

    seen = set()
    for number, row in enumerate(result["rows"], 1):
        problem = problem_with_row(row)
        if problem is None and (row["file"], row["id"]) in seen:
            problem = "has the file and the id of a row before it"
        if problem:
            return f"row {number} {problem}"
        seen.add((row["file"], row["id"]))
    return None


def problem_with_metrics(point: dict) -> str | None:
    """What keeps an object from telling the sources and the GF of a model, or None."""
    if not isinstance(point.get("sources"), dict):
        return '"sources" must be dict'
    for source, metrics in point["sources"].items():
        if not has_numbers(metrics, CELL):
            return f"source {visible(source, 60)!r} must have the numbers {', '.join(CELL)}"
    gains = point.get("gf")
    if gains is not None:
        # The factor itself is null where it is not defined.
        defined = isinstance(gains, dict) and (gains.get("gf", "") is None or has_numbers(gains, ("gf",)))
        if not (defined and has_numbers(gains, ("gain_id", "gain_ood"))):
            return '"gf" must be null or have the numbers gain_id, gain_ood and gf'
    return None


def has_numbers(metrics: object, keys: tuple[str, ...]) -> bool:
    return isinstance(metrics, dict) and all(is_number(metrics.get(key)) for key in keys)


def problem_with_row(row: object) -> str | None:
    """What keeps a JSON value from being a row of a result, or None."""
    if not isinstance(row, dict) or not {"id", "source", "file", *SCORES} <= row.keys():
        return "lacks id, source, file or scores"
    for name in ("id", "source", "file"):
        if not isinstance(row[name], str):
            return f'must have text as its "{name}"'
    n = len(row["accuracy"]) if isinstance(row["accuracy"], list) else 0
    for name in SCORES:
        good = is_flag if name in ("parsed", "finished") else is_number
        if not is_list(row[name], good, n):
            return f'must have one value for each reply in "{name}"'
    if "replies" not in row:
        return None

    # What the page shows of a reply was stored for the first rows of a source only, all of it or nothing.
    if not {"prompt", "images", "gold", "answers"} <= row.keys():
        return "has replies, but lacks prompt, images, gold or answers"
    if not isinstance(row["prompt"], str) or not is_list(row["images"], is_text):
        return "must have text as its prompt and paths as its images"
    if not is_list(row["replies"], is_text, n) or not is_list(row["answers"], lambda answer: True, n):
        return "must have a text in replies and an answer in answers for each reply"
    return None


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_flag(value: object) -> bool:
    return isinstance(value, bool)


def is_list(value: object, good: Callable[[object], bool], length: int | None = None) -> bool:
    """Whether a JSON value is a list of good items, and of that length; a list over replies is never empty."""
    if not isinstance(value, list) or not all(map(good, value)):
        return False
    return length is None or len(value) == length > 0


# ---------------------------------------------------------------------------------------------------------------------
# What the page says


class Panel(NamedTuple):
    """A figure of a run's curves."""

    slug: str  # its part of the PNG's file name
    title: str
    keys: tuple[str, ...]  # of log.jsonl, one curve each
    words: str  # what a reader should see in it


# fmt: off
PANELS = [Panel(*fields) for fields in (
    ("reward", "Reward, accuracy, format", ("reward", "accuracy", "format"),
     "What RL maximises, and its two parts. Format usually rises first; accuracy follows once a rule is found."),
    ("loss", "Loss", ("loss", "loss_dpo", "loss_sft", "loss_quality", "eval_loss"),
     "What is minimised (eval_: on held-out pairs). In RL the loss hovers near zero by design: look at the reward."),
    ("implicit", "Implicit rewards", ("chosen_reward", "rejected_reward", "margin", "eval_margin"),
     "β × how many nats likelier than under the reference each reply became; margin: chosen minus rejected."),
    ("preference", "Preference accuracy", ("preference_accuracy", "eval_preference_accuracy"),
     "Share of pairs in which the chosen reply has the larger implicit reward; 0.5 is a coin."),
    ("length", "Reply length (tokens)", ("length",), "A jump to the limit means replies without an end."),
    ("groups", "Useful groups, finished replies", ("useful_groups", "finished"),
     "Share of groups whose replies differ in reward (others teach nothing), and of replies that ended by themselves."),
    ("entropy", "Entropy (nats a token)", ("entropy",), "How undecided the policy is; near zero it explores no more."),
    ("kl", "KL to the reference (nats a token)", ("kl",), "How far the policy has moved from where it started."),
    ("clip", "Clipped fraction", ("clip_fraction",), "Share of tokens whose ratio left the trusted range."),
    ("gap", "Sampler gap (nats)", ("sampler_gap",),
     "Largest difference between a token's log-prob when sampled and in training: rounding, or something is broken."),
    ("gradient", "Gradient norm (before clipping)", ("grad_norm",), "Spikes are unstable steps."),
    ("lr", "Learning rate", ("lr",), "The schedule: how large a step may be."),
    ("speed", "Throughput (a second)", ("rollouts_per_s", "samples_per_s"), "Of whole steps, scoring included."),
    ("time", "Seconds a step", ("seconds", "seconds_sample", "seconds_score", "seconds_learn"), "Where the time goes."),
)]
# fmt: on
# Curves of these keys get an axis up to 1.
FRACTIONS = {"accuracy", "format", "preference_accuracy", "useful_groups"}
# Told apart by colour-blind eyes too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")

WORDS = {  # what the page says about its sections
    "top": "What was trained, how it went, and what the models say now. This one file holds everything it shows.",
    "results": """Each column is the model at the end of a stage, each row a set of questions. A cell reads
<strong>accuracy / accuracy of what could be read / format</strong> in percent: how often the answer was right, the same
among the replies whose answer could be read at all, and how often the reply had the form the question asked for. An
answer counts only when it stands where the form puts it, so accuracy can be low for want of form: a model that guesses
between two options is at 50 in the second number, whatever its form.
Sets whose name ends in a colon and a word ask for another reply format.""",
    "gf": """The last rows are percentage points of format, gained over the model before training:
<strong>gain ID</strong> in the trained reply format, <strong>gain OOD</strong> in reply formats never trained, and
<strong>GF</strong>, the generalization factor 5·ID·OOD / (4·ID + OOD). It is high only when both gained, and leans
towards the untrained formats: a cold start that learns one format by heart has a low GF. A dash: not defined, because a
gain is negative.""",
    "steps": """The same questions, asked of a run's models step by step (eval.py --checkpoints). Gains are percentage
points of format over step 0; where one is negative GF is not defined, and its curve has no point.""",
    "curves": """What each run logged, step by step. Where a curve has a pale copy behind it, the pale line is what was
logged and the strong line its moving mean.""",
    "puzzles": """The same question as each stage answered it, in the order of the table: the picture, then every reply
word for word, with the answer that was read from it and its score. Read the reasoning too: a right answer after
reasoning that does not lead to it is luck. These are the first questions of each set; nobody picked them.""",
    "pairs": pairs_page.WORDS,
}


class SideBySide(NamedTuple):
    """A figure of a key of several runs' logs."""

    key: str
    marker: str  # a key that only runs of the kind have that is meant
    title: str
    words: str


WHILE_TRAINING = "On the questions being trained on, while training."
SIDE_BY_SIDE = [SideBySide(*fields) for fields in (
    ("accuracy", "accuracy", "Accuracy, all runs", WHILE_TRAINING),
    ("format", "format", "Format, all runs", WHILE_TRAINING + " A cold start that holds keeps it near 1."),
    ("loss", "reward", "Policy loss, GRPO runs", "Near zero by design: look for drift and for spikes."),
    ("grad_norm", "reward", "Gradient norm, GRPO runs", "Before clipping. Spikes are unstable steps."),
    ("chosen_reward", "chosen_reward", "Reward of chosen replies, DPO runs",
     "β × how many nats likelier than under the reference. Below zero the chosen replies sink too."),
    ("rejected_reward", "rejected_reward", "Reward of rejected replies, DPO runs",
     "β × how many nats likelier than under the reference; it falls. How deep says how much is unlearned."),
)]  # fmt: skip

# These keep the page small whatever comes in, and the time it takes short. What they leave out is named on the page.
MOST_RUNS = 40
MOST_RESULTS = 40
MOST_PAIR_FILES = 10
MOST_FIGURES = 40  # of a run
MOST_POINTS = 2000  # of a curve: a figure is about 500 pixels wide
MOST_PUZZLES = 12
MOST_SOURCES = 14  # of a figure of a run's evaluations
SETTINGS_CHARACTERS = 6000
TITLE_CHARACTERS = 40  # of a figure's title, of a curve's name


# ---------------------------------------------------------------------------------------------------------------------
# Table


def stage_table(results: dict[str, dict]) -> list[list[str]]:
    """The table as lines of cells, titles first: a column a stage, a line a source.

    Cells are "accuracy / accuracy of the replies that could be read / format" in percent; below, if any stage has
    them, the gains and the GF in percentage points.
    """
    table = [["set of questions", *results]]
    sources = dict.fromkeys(source for result in results.values() for source in result["sources"])
    for source in sources:
        cells = [source]
        for result in results.values():
            metrics = result["sources"].get(source)
            cells.append(percentages(metrics) if metrics else "–")
        table.append(cells)

    # A stage evaluated without --baseline has no GF.
    if any(result["gf"] for result in results.values()):
        for title, key in (("gain ID", "gain_id"), ("gain OOD", "gain_ood"), ("GF", "gf")):
            cells = [title]
            for result in results.values():
                value = result["gf"][key] if result["gf"] else None
                cells.append("–" if value is None else f"{value:.1f}")
            table.append(cells)
    return table


def percentages(metrics: dict) -> str:
    """A cell of the table from a source's metrics."""
    return " / ".join(f"{100 * metrics[key]:.1f}" for key in CELL)


def markdown_table(table: list[list[str]]) -> str:
    """The same cells as a Markdown table with its columns aligned."""
    # Markdown passes tags on to the page it becomes.
    table = [[visible_name(cell).replace("|", "/").replace("<", "&lt;") for cell in cells] for cells in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for cells in table:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    rule = "|".join("-" * (width + 2) for width in widths)
    return "\n".join([lines[0], f"|{rule}|", *lines[1:]])


# ---------------------------------------------------------------------------------------------------------------------
# Curves


class Curve(NamedTuple):
    """A key of a log over its steps."""

    label: str
    steps: list[int]
    values: list[float]


def curve(log: list[dict], key: str, label: str | None = None) -> Curve:
    """One key of a log: finite numbers only, and the last entry of a step that was logged twice (by --resume)."""
    found = {}
    for entry in log:
        value = entry.get(key)
        if is_number(value):
            found[entry["step"]] = float(value)
    steps = sorted(found)
    return Curve(label or key, steps, [found[step] for step in steps])


def thin(points: Curve) -> Curve:
    """A long curve as means over stretches of equally many steps, each at its last step; a short one as it is."""
    stretch = -(-len(points.steps) // MOST_POINTS)
    if stretch <= 1:
        return points
    starts = range(0, len(points.steps), stretch)
    steps = [points.steps[min(start + stretch, len(points.steps)) - 1] for start in starts]
    means = [fmean(points.values[start : start + stretch]) for start in starts]
    return Curve(points.label, steps, means)


def not_drawn(log: list[dict]) -> str:
    """A sentence about values of a log that no figure can show; "" if there are none. null means: not measured."""
    counts = Counter()
    for entry in log:
        bad = [key for key, value in entry.items() if not is_number(value) and not isinstance(value, bool | None)]
        counts.update(bad)
    if not counts:
        return ""
    named = [f"{count} of {visible_name(key)}" for key, count in counts.most_common(8)]
    more = f" and of {len(counts) - 8} more" if len(counts) > 8 else ""
    return f"Values that are no finite number are not drawn: {', '.join(named)}{more}."


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving mean over `window` values (an odd number); shorter at both ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def panels(log: list[dict]) -> list[Panel]:
    """The figures for the keys a log has: those of PANELS, then every other key by itself."""
    # The order in which the log names them.
    numbers = (key for entry in log for key, value in entry.items() if key != "step" and is_number(value))
    logged = dict.fromkeys(numbers)
    found = []
    for panel in PANELS:
        present = tuple(key for key in panel.keys if key in logged)
        if present:
            found.append(panel._replace(keys=present))
    # A metric that a student adds to the log gets a figure without a line of code here.
    known = {key for panel in PANELS for key in panel.keys}
    return found + [Panel(key, key, (key,), "") for key in logged if key not in known]


def draw(curves: list[Curve], title: str, fractions: bool) -> tuple[bytes, str]:
    """Draw one figure: -> (PNG bytes, alt text with first and last values). fractions: the axis goes up to 1."""
    # Imported here, because only a report needs it.
    import matplotlib

    # A name may hold what matplotlib takes for mathematics ($), and characters that its font lacks.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph |constrained_layout")
        return draw_plain([thin(each) for each in curves], visible_name(title, TITLE_CHARACTERS), fractions)


def draw_plain(curves: list[Curve], title: str, fractions: bool) -> tuple[bytes, str]:
    """`draw`, with names taken as they are."""
    # A Figure by itself draws with Agg: no window, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 2.9), dpi=110, layout="constrained")
    axes = figure.subplots()
    told = []
    for i, (name, steps, values) in enumerate(curves):
        # matplotlib leaves labels that begin with _ out of a legend.
        label = visible_name(name, TITLE_CHARACTERS)
        if label.startswith("_"):
            label = f" {label}"
        colour = COLOURS[i % len(COLOURS)]
        # About 30 independent means: long noisy logs become readable, short ones stay as they are.
        window = 2 * (len(values) // 60) + 1
        mean = smooth(values, window)
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            mean,
            color=colour,
            linewidth=1.8,
            label=label,
            marker="o" if len(values) < 15 else None,
            linestyle=("-", "--", "-.", ":")[i // len(COLOURS) % 4],
        )
        told.append(f"{label} from {mean[0]:.3g} to {mean[-1]:.3g}")

    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
    axes.grid(color="#e3e7ec", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # The axis begins at 0: a wiggle should look like a wiggle.
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), max(high, 1.02 if fractions else 0))
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(curves)), fontsize=9, frameon=False)

    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    last = max(steps[-1] for _, steps, _ in curves)
    return png_bytes(Image.open(stream), colours=64), f"{title}, to step {last}: {'; '.join(told)}."


# `save` in what follows: save(part of a file name, PNG bytes) keeps a curve beside the page.
Save = Callable[[str, bytes], None]


def curves_html(runs: dict[str, RunLog], save: Save) -> str:
    """All curves: what several runs have in common side by side, then run by run."""
    # One run beside itself says nothing: from two runs on.
    shared = ""
    for key, marker, title, words in SIDE_BY_SIDE:
        logs = {name: run.log for name, run in runs.items() if any(is_number(entry.get(marker)) for entry in run.log)}
        curves = [curve(log, key, label=name) for name, log in logs.items()]
        if sum(bool(each.steps) for each in curves) > 1:
            shared += figure_of(curves, title, words, f"all-{key}", save, fractions=key in FRACTIONS)
    parts = [f'<h3>Side by side</h3><div class="curves">{shared}</div>'] if shared else []
    parts += [run_html(name, run, save) for name, run in runs.items()]
    return "".join(parts)


def figure_of(curves: list[Curve], title: str, words: str, part: str, save: Save, fractions: bool = False) -> str:
    """A figure for the page, kept beside it too; "" if no curve has a point."""
    curves = [each for each in curves if each.steps]
    if not curves:
        return ""
    png, alt = draw(curves, title, fractions)
    save(part, png)
    return figure_html(png, alt, words)


# Of a result's "gf", and what a figure of it is called.
GAINS = {"gf": "Generalization factor (GF)", "gain_id": "Gain ID", "gain_ood": "Gain OOD"}


def steps_html(results: dict[str, dict], save: Save) -> str:
    """The models of a run step by step, of each result that has a curve; several results side by side."""
    followed = {name: result["curve"] for name, result in results.items() if result.get("curve")}
    shared = ""
    for key, title in GAINS.items():
        curves = [step_curve(name, points, gains_of(points, key)) for name, points in followed.items()]
        if sum(bool(each.steps) for each in curves) > 1:
            words = "Percentage points of format over step 0."
            shared += figure_of(curves, title, words, f"steps-{key}", save)
    parts = [f'<h3>Side by side</h3><div class="curves">{shared}</div>'] if shared else []
    for name, points in followed.items():
        figures = step_figures(name, points, save)
        parts.append(f'<h3>{escape(visible_name(name))}</h3><div class="curves">{figures}</div>')
    return "".join(parts)


def step_figures(name: str, points: list[dict], save: Save) -> str:
    """The figures of one result's curve: gains and GF, the gain of each OOD source, and the metrics of each source."""
    every = dict.fromkeys(source for point in points for source in point["sources"])  # in the order they are named
    sources, left = list(every)[:MOST_SOURCES], len(every) - MOST_SOURCES
    words = f"{left} more sources are left out." if left > 0 else ""
    gains = [step_curve(key, points, gains_of(points, key)) for key in GAINS]
    figures = figure_of(gains, "Gains and GF", "", f"{name}-steps-gains", save)
    ood = gains_of(points, "ood_gains")
    by_source = [step_curve(source, points, [field(gain, source) for gain in ood]) for source in sources]
    figures += figure_of(by_source, "Gain OOD by source", words, f"{name}-steps-ood", save)
    for key in ("format", "accuracy"):
        curves = []
        for source in sources:
            metrics = [field(point["sources"].get(source), key) for point in points]
            curves.append(step_curve(source, points, metrics))
        title = f"{key.capitalize()} by source"
        figures += figure_of(curves, title, words, f"{name}-steps-{key}", save, fractions=True)
    return figures


def gains_of(points: list[dict], key: str) -> list[object]:
    """What the "gf" of each point says under a key; None where it has none."""
    return [field(point.get("gf"), key) for point in points]


def field(found: object, key: str) -> object:
    """found[key], or None if that is nothing."""
    return found.get(key) if isinstance(found, dict) else None


def step_curve(label: str, points: list[dict], values: list[object]) -> Curve:
    """The values that are numbers by the steps of their points."""
    found = {point["step"]: value for point, value in zip(points, values, strict=True) if is_number(value)}
    return Curve(label, sorted(found), [float(found[step]) for step in sorted(found)])


def notes_html(notes: list[str]) -> str:
    """A paragraph of what is not shown, if there is something."""
    told = " ".join(note for note in notes if note)
    return f'<p class="score">{escape(told)}</p>' if told else ""


def run_html(name: str, run: RunLog, save: Save) -> str:
    """One run's curves and settings."""
    figures = ""
    found = panels(run.log)
    for panel in found[:MOST_FIGURES]:
        curves = [curve(run.log, key) for key in panel.keys]
        png, alt = draw(curves, panel.title, fractions=not FRACTIONS.isdisjoint(panel.keys))
        save(f"{name}-{panel.slug}", png)
        figures += figure_html(png, f"{visible_name(name)}: {alt}", panel.words)
    settings = ""
    if run.settings:
        lines = "\n".join(f"{key} = {value}" for key, value in run.settings.items())
        lines = escape(lines, SETTINGS_CHARACTERS)
        settings = f"<details><summary>Settings of this run</summary><pre>{lines}</pre></details>"
    notes = [run.left_out, not_drawn(run.log)]
    if len(found) > MOST_FIGURES:
        notes.append(f"{len(found) - MOST_FIGURES} more figures are left out.")
    return f'<h3>{escape(visible_name(name))}</h3>{notes_html(notes)}<div class="curves">{figures}</div>{settings}'


# ---------------------------------------------------------------------------------------------------------------------
# Questions and replies


def pick_puzzles(results: dict[str, dict]) -> list[list[tuple[str, dict]]]:
    """Which records to show: (stage, row) pairs for each, at most MOST_PUZZLES records, the sources in turn.

    Within a source those that most stages answered come first, then the order of the files: nobody picks them by hand.
    """
    records = {}  # (file, id) -> (stage, row) pairs
    for stage, result in results.items():
        for row in result["rows"]:
            if "replies" in row:
                records.setdefault((row["file"], row["id"]), []).append((stage, row))
    sources = {}  # source -> its records
    for pairs in sorted(records.values(), key=len, reverse=True):
        _, row = pairs[0]
        sources.setdefault(row["source"], []).append(pairs)
    # In turns, so that a source with many records leaves room for the others.
    picked = []
    for turn in range(MOST_PUZZLES):
        picked += [group[turn] for group in sources.values() if turn < len(group)]
    return picked[:MOST_PUZZLES]


def puzzle_html(pairs: list[tuple[str, dict]]) -> str:
    """One card from a record's (stage, row) pairs: the pictures, the question, the gold answer, every stage's reply."""
    _, row = pairs[0]
    replies = "".join(reply_html(*pair) for pair in pairs)
    return (
        f'<article class="puzzle"><div>{pictures_html(row)}</div><div><div class="stage">'
        f"<strong>{escape(row['source'])}</strong> · {escape(row['id'])} · gold answer “{escape(row['gold'])}”</div>"
        f"<details open><summary>The question</summary><pre>{escape(row['prompt'])}</pre></details>"
        f"{replies}</div></article>"
    )


def reply_html(stage: str, row: dict) -> str:
    """What one stage replied: the first of its replies word for word, the answer read from it, and its scores."""
    accuracy, form = row["accuracy"][0], row["format"][0]
    colour, verdict = ("right", "right") if accuracy >= 1 else ("wrong", "not right")
    read = row["answers"][0]
    answer = "none could be read" if read is None else f"“{escape(read)}”"

    scores = f"accuracy {accuracy:.2f}, format {'kept' if form >= 1 else 'not kept'}, "
    scores += f"reward {row['reward'][0]:.2f}, {row['length'][0]} tokens"
    if len(row["replies"]) > 1:
        scores += f"; the first of {len(row['replies'])}, whose mean accuracy is {fmean(row['accuracy']):.2f}"
    return (
        f'<div class="stage"><strong>{escape(visible_name(stage))}</strong>: answer read: {answer}, '
        f'<span class="{colour}-word">{verdict}</span> <span class="score">({scores})</span></div>'
        f'<pre class="{colour}">{escape(row["replies"][0])}</pre>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page_html(
    runs: dict[str, RunLog], results: dict[str, dict], save: Save, notes: list[str] = (),
    pairs: dict[str, list[dict]] | None = None, keep_pairs: int = 5,
) -> str:  # fmt: skip
    """The whole page. results, pairs: as read_result and read_pairs give them. notes: what is not on it."""
    sections = []  # (anchor, title, HTML)
    if results:
        table = stage_table(results)
        note = f"<p>{WORDS['gf']}</p>" if any(line[0] == "GF" for line in table) else ""
        sections.append(("results", "Results", table_html(table) + note))
        steps = steps_html(results, save)
        if steps:
            sections.append(("steps", "Along a run", steps))
    if runs:
        sections.append(("curves", "Training curves", curves_html(runs, save)))
    cards = "".join(puzzle_html(group) for group in pick_puzzles(results))
    if cards:
        sections.append(("puzzles", "Questions and replies", cards))
    if pairs:
        sections.append(("pairs", "Preference pairs", pairs_page.pairs_html(pairs, keep_pairs)))
    top = f"<p>{WORDS['top']}</p>{notes_html(notes)}"
    told = [(anchor, title, WORDS[anchor], content) for anchor, title, content in sections]
    return document("Training report", top, told, pairs_page.STYLE if pairs else "")


def write_report(
    path: Path, runs: dict[str, Path], results: dict[str, Path], table_file: Path | None = None,
    pairs: dict[str, Path] | None = None, keep_pairs: int = 5,
) -> None:  # fmt: skip
    """Write the page, its curves as PNG files beside it, and with `table_file` the table as Markdown. Prints the table.

    runs, results and pairs: {name: path}. keep_pairs: pairs shown of each kind and file. Raises DataError, before
    anything is written, for what cannot be read.
    """
    pairs = pairs or {}
    inputs = {
        "--runs": [folder / name for folder in runs.values() for name in RUN_FILES],
        "--results": list(results.values()),
        "--pairs": list(pairs.values()),
    }
    for flag, output in (("the page", path), ("--table", table_file)):
        if output:
            files.check_output(output, flag, inputs)
    if table_file and os.path.abspath(table_file) == os.path.abspath(path):
        raise DataError(f"--table {table_file}: is the page itself; name another file")
    shown_runs, run_note = first_of(runs, MOST_RUNS, "runs")
    shown_results, result_note = first_of(results, MOST_RESULTS, "result files")
    logs = {name: read_run(folder) for name, folder in shown_runs.items()}
    read = {name: read_result(file) for name, file in shown_results.items()}
    shown_pairs, pairs_note = first_of(pairs, MOST_PAIR_FILES, "files of pairs")
    read_pairs = {name: pairs_page.read_pairs(file) for name, file in shown_pairs.items()}

    taken = Counter()

    def save(part: str, png: bytes) -> None:
        name = f"{path.stem}-{file_part(part)}"
        taken[name] += 1
        # Two keys may differ only in characters that a file name cannot hold.
        if taken[name] > 1:
            name += f"-{taken[name]}"
        write(path.with_name(f"{name}.png"), png)

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: its folder cannot be made ({error})") from error
    page = page_html(logs, read, save, [run_note, result_note, pairs_note], read_pairs, keep_pairs)
    write(path, page.encode())
    told = f"{len(logs)} runs, {len(read)} result files" + (f", {len(read_pairs)} files of pairs" if read_pairs else "")
    print(f"{visible(str(path))}: {len(page.encode()) / 1e6:.2f} MB, {told}")
    table = markdown_table(stage_table(read)) if read else ""
    print(table)
    for name, rows in read_pairs.items():
        print(f"{visible_name(name)}:\n{markdown_table(pairs_page.statistics_table(rows))}")
    if table_file:
        write(table_file, f"{table}\n".encode())


# What a report reads of a run directory.
RUN_FILES = ("log.jsonl", "args.json")


def first_of(paths: dict[str, Path], most: int, what: str) -> tuple[dict[str, Path], str]:
    """(the first `most` of {name: path}, a sentence about the others)."""
    if len(paths) <= most:
        return paths, ""
    return dict(list(paths.items())[:most]), f"Only the first {most} of {len(paths)} {what} are shown."


def write(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it. DataError if that fails."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error})") from error


def file_part(name: str) -> str:
    """A name with only characters that are plain in any file system, short enough for all of them."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", name)
    if len(plain) <= NAME_CHARACTERS:
        return plain
    # Long names that begin alike must stay apart.
    return f"{plain[:NAME_CHARACTERS]}-{hashlib.sha256(name.encode(errors='replace')).hexdigest()[:8]}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def named_path(text: str) -> tuple[str, Path]:
    """'NAME=PATH' or 'PATH' -> (name, path); without a name the last part of the path names it."""
    name, _, path = text.partition("=")
    if path and name and "/" not in name:
        return name, Path(path)
    return re.sub(r"\.jsonl?$", "", Path(os.path.abspath(text)).name), Path(text)


def add_report_flags(add: Callable) -> None:
    """What a report is made of, the same flags for report.py and for eval.py --report. add: a parser's add_argument."""
    add("--runs", nargs="+", type=named_path, default=[], metavar="[NAME=]DIR", help="run directories, for the curves")
    add("--results", nargs="+", type=named_path, default=[], metavar="[NAME=]FILE.json",
        help="result files in the order of the stages, for the table and the replies")  # fmt: skip
    add("--pairs", nargs="+", type=named_path, default=[], metavar="[NAME=]FILE.jsonl",
        help="pairs of distill.py: their statistics, and the first of each kind to read")  # fmt: skip
    add("--keep-pairs", type=integer("[1, 1000]"), default=5, metavar="N", help="pairs shown of each kind and file")
    add("--table", type=Path, metavar="FILE.md", help="also write the table as Markdown")


def check_report_flags(parser: training.Parser, args: argparse.Namespace) -> None:
    """End with an error unless there is something to show and every name is used once."""
    if not (args.runs or args.results or args.pairs):
        parser.error("a report needs --runs or --results or --pairs")
    for flag, pairs in (("--runs", args.runs), ("--results", args.results), ("--pairs", args.pairs)):
        names = {name for name, _ in pairs}
        if len(names) < len(pairs):
            parser.error(f"{flag}: two are called the same; give them names, as in first=DIR second=DIR")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training.Parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="the page to write")
    add_report_flags(parser.add_argument)
    args = parser.parse_args(argv)
    check_report_flags(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    write_report(args.out, dict(args.runs), dict(args.results), args.table, dict(args.pairs), args.keep_pairs)


if __name__ == "__main__":
    training.run(main)
