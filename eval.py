"""Evaluation: accuracy and format on any records file, generalization factor, pass@k, and the report page.

    python eval.py --model DIR --data test.jsonl --out test.json                        greedy, one reply a question
    python eval.py --model DIR --data test.jsonl --out k.json --samples 16 --temperature 1          pass@1, 2, 4, 8, 16
    python eval.py --model BASE  --id think.jsonl --ood boxed.jsonl json.jsonl --out base.json      step 0 of the GF ...
    python eval.py --model TUNED --id think.jsonl --ood boxed.jsonl json.jsonl --out tuned.json --baseline base.json
    python eval.py --report report.html --runs runs/grpo --results base=base.json grpo=tuned.json   one page to look at
    torchrun --nproc_per_node=2 eval.py ...                                             the same numbers, sooner

A result file is one JSON object: "model", "files", "args", "overall" and "sources" (see `summarise`), "gf" (see
`format_gains`; null without --baseline) and "rows", one a record in the order of the files:
    {"id", "source", "role", "file", and a list over the n replies for each of "accuracy", "format", "reward", "length",
     "parsed" (an answer could be read), "finished" (false: cut off at the length limit)}
The first --keep-replies rows of each source also hold "prompt", "images", "gold", "replies" and "answers" (as read).
Paths in it are relative to the result file's own folder. A "source" here is the record's source and the reply format it
asks for ("jigsaw-pair-2x1:boxed"; nothing is added for think), because the same questions in another format are another
test.

Legend: n replies a record, c of them right; accuracy, format and shares are fractions of 1; gains and GF are percentage
points; lengths are tokens, the end token included. How numbers are put together: a source's number is the mean over all
its replies, "overall" the mean over all replies of all sources (micro), the OOD gain the mean over sources (macro).
"""

import argparse
import base64
import html
import io
import json
import math
import os
import re
import unicodedata
from pathlib import Path
from statistics import fmean

from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import model
import rewards
from model import DataError

SCORES = ("accuracy", "format", "reward", "length", "parsed", "finished")  # of a row: one value a reply each


def generalization_factor(gain_id: float, gain_ood: float, beta: float = 2.0) -> float:
    """Weighted harmonic mean of two gains: (1 + β²)·G_ID·G_OOD / (β²·G_ID + G_OOD). SPECS, arXiv 2510.25801.

    High only when the trained (ID) format and the untrained (OOD) formats both gained; β = 2 makes OOD count more.
    Unit: that of the gains. Beyond the paper: 0 when both gains are 0; and where one model lost what the other gained,
    the formula has a pole (G_OOD = -β²·G_ID) with nonsense behind it, so there the smaller gain is returned instead.
    """
    if gain_id == 0 and gain_ood == 0:
        return 0.0
    denominator = beta**2 * gain_id + gain_ood
    if denominator > 0 or gain_id * gain_ood > 0:
        return (1 + beta**2) * gain_id * gain_ood / denominator
    return float(min(gain_id, gain_ood))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k replies drawn without replacement from n, of which c are right, hold a right one.

    Unbiased: 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1), counted in whole numbers and divided once,
    so nothing overflows or cancels. Raises ValueError when k > n, c > n or anything is negative.
    """
    if min(n, c, k) < 0 or c > n or k > n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 0 <= k <= n, got n={n}, c={c}, k={k}")
    draws = math.comb(n, k)
    return (draws - math.comb(n - c, k)) / draws


def summarise(rows: list[dict]) -> dict:
    """{"overall": numbers, "sources": {source: numbers}} of scored rows, sources in the order they first appear.

    Each row: "source", and lists over its n replies "accuracy", "format", "reward", "length", "parsed", "finished".
    Numbers: "n" records, "replies"; means over replies "accuracy", "format", "reward", "length"; "unparsed" replies
    whose answer could not be read, and "unparsed_share"; "accuracy_read": mean accuracy of the others (0 if none);
    "cut": replies that hit the length limit before they ended;
    "pass@1", "pass@2", "pass@4", ... up to the smallest n. A reply passes when its accuracy is 1: a grid that is
    partly right earns accuracy, but does not pass. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("there are no rows to summarise")

    def numbers(group):
        every = {key: [value for row in group for value in row[key]] for key in SCORES}
        unparsed = every["parsed"].count(False)
        result = {"n": len(group), "replies": len(every["reward"])}
        result |= {key: fmean(every[key]) for key in ("accuracy", "format", "reward", "length")}
        result |= {"unparsed": unparsed, "unparsed_share": unparsed / result["replies"]}
        read = [value for value, parsed in zip(every["accuracy"], every["parsed"], strict=True) if parsed]
        result["accuracy_read"] = fmean(read) if read else 0.0
        result["cut"] = every["finished"].count(False)
        drawn_and_right = [(len(row["accuracy"]), sum(value >= 1 for value in row["accuracy"])) for row in group]
        k = 1
        while k <= min(drawn_and_right)[0]:
            result[f"pass@{k}"] = fmean(pass_at_k(n, c, k) for n, c in drawn_and_right)
            k *= 2
        return result

    groups = {}
    for row in rows:
        groups.setdefault(row["source"], []).append(row)
    return {"overall": numbers(rows), "sources": {source: numbers(group) for source, group in groups.items()}}


def format_gains(rows: list[dict], before: dict, weights: dict | None = None, beta: float = 2.0) -> dict:
    """The generalization factor of format-following against step 0. As in SPECS it is format, not accuracy.

    rows: scored rows with "role" ("id" and "ood" count, others do not), "source", "file", "id", "format": [n].
    before: {(file, id): row of the step-0 model}. weights: {OOD source: weight}; None weighs every OOD source alike.
    Returns percentage points: "gain_id" (mean over ID replies), "gain_ood" (weighted mean over OOD sources), "gf",
    "ood_gains" per source, and "beta".
    """
    changes = {"id": {}, "ood": {}}  # role -> source -> one difference a record
    for row in rows:
        if row["role"] in changes:
            change = fmean(row["format"]) - fmean(before[row["file"], row["id"]]["format"])
            changes[row["role"]].setdefault(row["source"], []).append(100 * change)
    gain_id = fmean(change for group in changes["id"].values() for change in group)
    ood = {source: fmean(group) for source, group in changes["ood"].items()}
    share = weights or dict.fromkeys(ood, 1.0)
    gain_ood = sum(share[source] * ood[source] for source in ood) / sum(share[source] for source in ood)
    return {
        "gain_id": gain_id,
        "gain_ood": gain_ood,
        "gf": generalization_factor(gain_id, gain_ood, beta),
        "ood_gains": ood,
        "beta": beta,
    }


# ---- the evaluation -------------------------------------------------------------------------------------------------

ROLES = ("data", "id", "ood")
# What the numbers depend on besides the model and the files: stored with them.
SETTINGS = (
    "samples", "temperature", "top_k", "top_p", "max_new_tokens", "limit", "max_pixels", "seed", "dtype", "attn",
    "sampler",
)  # fmt: skip


def read_files(args) -> list[dict]:
    """All records of --data, --id and --ood, in that order, with "_file" (absolute), "_role" and "_source".

    A file named twice is read once; --id or --ood says its role. Raises DataError for bad records and empty files.
    """
    roles = {os.path.abspath(path): "data" for path in args.data}
    roles |= {os.path.abspath(path): "id" for path in args.id} | {os.path.abspath(path): "ood" for path in args.ood}
    records = []
    for path, role in roles.items():
        for record in model.read_records(path, check=rewards.check_gold)[: args.limit]:
            form = rewards.reply_format(record)
            name = record["source"] if form == "think" else f"{record['source']}:{form}"
            records.append(record | {"_file": path, "_role": role, "_source": name})
    return records


def read_baseline(path, records, weights, base) -> dict:
    """{(file relative to `base`, id): row} of a result. DataError if a record or a weight has no counterpart."""
    before = {(os.path.relpath(row["file"], base), row["id"]): row for row in read_result(path)["rows"]}
    for record in records:
        if record["_role"] != "data" and (os.path.relpath(record["_file"], base), record["id"]) not in before:
            raise DataError(
                f"{path}: has no row for {record['_where']} (id {record['id']!r}): a baseline is the step-0 "
                f"model's result on the same --id and --ood files"
            )
    ood = sorted({record["_source"] for record in records if record["_role"] == "ood"})
    if weights and sorted(weights) != ood:
        raise DataError(f"--ood-weights names {', '.join(sorted(weights))}; the sources of --ood are {', '.join(ood)}")
    return before


def score_row(record: dict, replies: list[str], lengths: list[int], finished: list[bool], keep: bool, base) -> dict:
    """One row of the result file: the scores of a record's n replies; with `keep` also what the report shows of it."""
    scores = [rewards.score(reply, record) for reply in replies]
    row = {
        "id": record["id"],
        "source": record["_source"],
        "role": record["_role"],
        "file": os.path.relpath(record["_file"], base),
    }
    row |= {key: [score[key] for score in scores] for key in ("accuracy", "format", "reward")}
    row |= {"length": lengths, "parsed": [score["answer"] is not None for score in scores], "finished": finished}
    if keep:
        row |= {
            "prompt": record["prompt"],
            "images": [os.path.relpath(image, base) for image in record["images"]],
            "gold": record["answer"],
            "replies": replies,
            "answers": [score["answer"] for score in scores],
        }
    return row


def first_of_each_source(records: list[dict], count: int) -> set[int]:
    """Indices of the first `count` records of every source: which replies are kept is no one's choice."""
    seen, kept = {}, set()
    for index, record in enumerate(records):
        seen[record["_source"]] = seen.get(record["_source"], 0) + 1
        if seen[record["_source"]] <= count:
            kept.add(index)
    return kept


def write_result(path: Path, result: dict) -> None:
    """Write the result as JSON, a row a line; under a temporary name first, so that a file that is there is whole."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    os.replace(unfinished, path)


def read_result(path) -> dict:
    """A result file with its rows' paths made absolute. Raises DataError if it is missing or something else."""
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a result of eval.py: {error}") from error
    if not isinstance(result, dict) or not {"model", "overall", "sources", "gf", "rows"} <= result.keys():
        raise DataError(f"{path}: is not a result of eval.py (model, overall, sources, gf and rows are expected)")
    if not all({"id", "source", "file", *SCORES} <= row.keys() for row in result["rows"]):
        raise DataError(f"{path}: is not a result of eval.py (some of its rows lack id, source, file or scores)")
    base = Path(path).absolute().parent
    for row in result["rows"]:
        row["file"] = os.path.abspath(base / row["file"])
        if "images" in row:
            row["images"] = [os.path.abspath(base / image) for image in row["images"]]
    return result


def result_table(result: dict) -> str:
    """The terminal's table: a line a source, then overall."""
    lines = dict(result["sources"]) | ({"overall": result["overall"]} if len(result["sources"]) > 1 else {})
    passes = [key for key in result["overall"] if key.startswith("pass@")]
    passes = passes if len(passes) > 1 else []  # one reply a question: pass@1 says what accuracy says
    width = max(len(name) for name in [*lines, "source"])
    titles = ("n", "accuracy", "format", "reward", "unparsed", "cut", "length")
    table = [f"{'source':{width}}" + "".join(f"{title:>10}" for title in [*titles, *passes])]
    for name, numbers in lines.items():
        table.append(
            f"{name:{width}}{numbers['n']:10d}{100 * numbers['accuracy']:9.1f}%{100 * numbers['format']:9.1f}%"
            f"{numbers['reward']:10.3f}{numbers['unparsed']:10d}{numbers['cut']:10d}{numbers['length']:10.1f}"
            + "".join(f"{100 * numbers[key]:9.1f}%" for key in passes)
        )
    return "\n".join(table)


# ---- the report page ------------------------------------------------------------------------------------------------

# fmt: off
CURVES = (  # name in the PNG's file name, title, log keys, what a reader should see in it
    ("reward", "Reward, accuracy, format", ("reward", "accuracy", "format"),
     "What RL maximises, and its two parts. Format usually rises first; accuracy follows once a rule is found."),
    ("loss", "Loss", ("loss", "loss_dpo", "loss_sft"),
     "What is minimised. In RL the loss hovers near zero by design and says little: look at the reward."),
    ("implicit", "Implicit rewards", ("chosen_reward", "rejected_reward", "margin"),
     "β × how many nats likelier than under the reference each reply became; margin: chosen minus rejected."),
    ("preference", "Preference accuracy", ("preference_accuracy",),
     "Share of pairs in which the chosen reply has the larger implicit reward; 0.5 is a coin."),
    ("length", "Reply length (tokens)", ("length",), "A jump to the limit means replies without an end."),
    ("groups", "Useful groups, finished replies", ("useful_groups", "finished"),
     "Share of groups whose replies differ in reward (others teach nothing), and of replies that ended by themselves."),
    ("entropy", "Entropy (nats a token)", ("entropy",), "How undecided the policy is; near zero it explores no more."),
    ("kl", "KL to the reference (nats a token)", ("kl",), "How far the policy has moved from where it started."),
    ("clip", "Clipped fraction", ("clip_fraction",), "Share of tokens whose ratio left the trusted range."),
    ("gap", "Sampler gap (nats)", ("sampler_gap",),
     "Largest difference between a token's log-prob when drawn and in training: rounding, or something is broken."),
    ("gradient", "Gradient norm (before clipping)", ("grad_norm",), "Spikes are unstable steps."),
    ("lr", "Learning rate", ("lr",), "The schedule: how large a step may be."),
    ("speed", "Throughput (a second)", ("rollouts_per_s", "samples_per_s"), "Of whole steps, scoring included."),
    ("time", "Seconds a step", ("seconds", "seconds_sample", "seconds_score", "seconds_learn"), "Where the time goes."),
)
# fmt: on
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
towards the untrained formats: a cold start that learns one format by heart has a low GF.""",
    "curves": """What each run logged, step by step. Where a curve has a pale copy behind it, the pale line is what was
logged and the strong line its moving mean.""",
    "puzzles": """The same question as each stage answered it, in the order of the table: the picture, then every reply
word for word, with the answer that was read from it and its score. Read the reasoning too: a right answer after
reasoning that does not lead to it is luck. These are the first questions of each set; nobody picked them.""",
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")  # safe for colour-blind eyes
FRACTIONS = {"accuracy", "format", "preference_accuracy", "useful_groups"}  # drawn on an axis up to 1
MOST_PUZZLES, MOST_IMAGES, IMAGE_SIDE, REPLY_CHARACTERS = 12, 4, 224, 1500  # keep the page small whatever comes in

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem; background: #fcfcfa; color: #1d2733;
  font: 16px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .3rem; border-bottom: 2px solid #d9dee5; padding-bottom: .2rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .4rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .4rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
a { color: #005a9c; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; background: #fff; }
th, td { padding: .35rem .7rem; border: 1px solid #d9dee5; text-align: right; white-space: nowrap; }
th { background: #eef2f6; font-weight: 600; }
tr > :first-child { text-align: left; position: sticky; left: 0; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .8rem; }
figure { margin: 0; padding: .5rem; background: #fff; border: 1px solid #d9dee5; border-radius: 6px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: .85rem; color: #4a5664; }
.puzzle { margin: 1rem 0; padding: .8rem; background: #fff; border: 1px solid #d9dee5; border-radius: 6px;
  display: grid; grid-template-columns: minmax(0, 1fr); gap: .8rem; }
.puzzle img { max-width: 100%; width: 224px; height: auto; image-rendering: auto; border: 1px solid #d9dee5; }
@media (min-width: 48rem) { .puzzle { grid-template-columns: 240px minmax(0, 1fr); } }
pre { margin: .2rem 0 .7rem; padding: .5rem .6rem; background: #f4f6f8; border-left: 4px solid #9aa7b5;
  border-radius: 3px; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  font: .85rem/1.45 ui-monospace, Consolas, monospace; }
pre.right { border-color: #009e73; } pre.wrong { border-color: #d55e00; }
.stage { font-size: .9rem; overflow-wrap: anywhere; }
.score { color: #4a5664; }
.right-word { color: #00694d; font-weight: 600; }
.wrong-word { color: #a34700; font-weight: 600; }
summary { cursor: pointer; color: #005a9c; font-size: .9rem; }
"""


def escape(value, most: int = REPLY_CHARACTERS) -> str:
    """Text for the page: markup made harmless, invisible characters spelled out, cut at `most` characters.

    Replies are whatever a model produced: tags, scripts, half a surrogate pair, marks that turn the line's direction.
    """
    text = value if isinstance(value, str) else json.dumps(value)
    more = f" … ({len(text) - most} more characters)" if len(text) > most else ""
    seen = (c if c in "\n\t" or unicodedata.category(c)[0] != "C" else f"⟨U+{ord(c):04X}⟩" for c in text[:most])
    return html.escape("".join(seen) + more, quote=True)


def picture(png: bytes) -> str:
    """A data URI: the picture travels inside the page."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def small_png(image: Image.Image, colours: int = 0) -> bytes:
    """PNG bytes; with `colours` > 0 reduced to that many: a line drawing loses nothing by it."""
    if colours:
        image = image.convert("RGB").quantize(colours)
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return stream.getvalue()


def smooth(values: list[float], window: int) -> list[float]:
    """Centred moving mean over `window` values (an odd number); shorter at both ends."""
    half = window // 2
    return [fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def points(log: list[dict], key: str) -> tuple[list, list[float]]:
    """(steps, values) of one key: finite numbers only, and the last entry of a step that was logged twice (resume)."""
    found = {
        row["step"]: row[key]
        for row in log
        if isinstance(row.get(key), (int, float)) and not isinstance(row[key], bool) and math.isfinite(row[key])
    }
    return sorted(found), [float(found[step]) for step in sorted(found)]


def panels(log: list[dict]) -> list[tuple]:
    """(name, title, keys, explanation) for the keys a log has: those of CURVES, then any other by itself."""
    logged = [key for key in dict.fromkeys(key for row in log for key in row) if key != "step" and points(log, key)[0]]
    known = {key for _, _, keys, _ in CURVES for key in keys}
    chosen = [(name, title, [key for key in keys if key in logged], words) for name, title, keys, words in CURVES]
    return [panel for panel in chosen if panel[2]] + [(key, key, [key], "") for key in logged if key not in known]


def draw(lines: list[tuple[str, list, list[float]]], title: str, fractions: bool) -> tuple[bytes, str]:
    """One panel from (label, steps, values) lines -> (PNG bytes, alt text with first and last values)."""
    from matplotlib.figure import Figure  # here, because only a report needs it; a Figure by itself draws with Agg

    figure = Figure(figsize=(4.6, 2.9), dpi=110, layout="constrained")
    axes = figure.subplots()
    told = []
    for i, (label, steps, values) in enumerate(lines):
        colour, window = COLOURS[i % len(COLOURS)], 2 * (len(values) // 60) + 1
        mean = smooth(values, window)
        if window > 1:
            axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(
            steps,
            mean,
            color=colour,
            linewidth=1.8,
            label=label,
            marker="o" if len(values) < 3 else None,
            linestyle=("-", "--", "-.", ":")[i // len(COLOURS) % 4],
        )
        told.append(f"{label} from {mean[0]:.3g} to {mean[-1]:.3g}")
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel("step", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.ticklabel_format(axis="y", scilimits=(-2, 4), useOffset=False)
    axes.grid(color="#e3e7ec", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0, low), max(high, 1.02 if fractions else 0))  # from 0: a wiggle should look like a wiggle
    if len(lines) > 1:
        figure.legend(loc="outside lower center", ncols=min(3, len(lines)), fontsize=9, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    last = max(steps[-1] for _, steps, _ in lines)
    return small_png(Image.open(stream), colours=64), f"{title}, to step {last}: {'; '.join(told)}."


def stage_table(results: dict[str, dict]) -> list[list[str]]:
    """The final table as rows of cells, titles first: a column a stage (result file), a row a source.

    Cells are "accuracy / accuracy of the replies that could be read / format" in percent; below, if any
    stage has them, the gains and the GF in percentage points.
    """
    table = [["set of questions", *results]]
    for source in dict.fromkeys(source for result in results.values() for source in result["sources"]):
        numbers = [result["sources"].get(source) for result in results.values()]
        names = ("accuracy", "accuracy_read", "format")
        cells = [" / ".join(f"{100 * each[name]:.1f}" for name in names) if each else "–" for each in numbers]
        table.append([source, *cells])
    if any(result["gf"] for result in results.values()):
        for title, key in (("gain ID", "gain_id"), ("gain OOD", "gain_ood"), ("GF", "gf")):
            gains = [result["gf"] for result in results.values()]
            table.append([title, *(f"{each[key]:.1f}" if each else "–" for each in gains)])
    return table


def markdown_table(table: list[list[str]]) -> str:
    """The same cells as a Markdown table with its columns aligned."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "| " + " | ".join(cell.replace("|", "/").ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in table
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def pick_puzzles(results: dict[str, dict]) -> list[list[tuple[str, dict]]]:
    """Which records to show: (stage, row) pairs for each, at most MOST_PUZZLES records, the sources in turn.

    Within a source those that most stages answered come first, then the order of the files: nobody picks them by hand.
    """
    records = {}
    for name, result in results.items():
        for row in result["rows"]:
            if "replies" in row:
                records.setdefault((row["file"], row["id"]), []).append((name, row))
    sources = {}
    for answers in sorted(records.values(), key=len, reverse=True):
        sources.setdefault(answers[0][1]["source"], []).append(answers)
    turns = [group[i] for i in range(MOST_PUZZLES) for group in sources.values() if i < len(group)]
    return turns[:MOST_PUZZLES]


def puzzle_html(answers: list[tuple[str, dict]]) -> str:
    """One card: the picture, the question, the gold answer, and what each stage replied."""
    first = answers[0][1]
    pictures = []
    for path in first["images"][:MOST_IMAGES]:
        if not Path(path).is_file():
            pictures.append(f"<p>The picture {escape(Path(path).name)} is no longer there.</p>")
            continue
        try:
            image = Image.open(path).convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path}: cannot be read as an image: {error}") from error
        image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        alt = f"Picture of question {first['id']}, {image.width} by {image.height} pixels as shown"
        pictures.append(f'<img src="{picture(small_png(image))}" alt="{escape(alt)}">')
    replies = []
    for name, row in answers:
        right, well = row["accuracy"][0] >= 1, row["format"][0] >= 1
        answer = "none could be read" if row["answers"][0] is None else f"“{escape(row['answers'][0])}”"
        count, share = len(row["replies"]), ""
        if count > 1:
            share = f"; the first of {count}, whose mean accuracy is {fmean(row['accuracy']):.2f}"
        replies.append(
            f'<div class="stage"><strong>{escape(name)}</strong>: answer read: {answer}, '
            f'<span class="{"right" if right else "wrong"}-word">{"right" if right else "not right"}</span> '
            f'<span class="score">(accuracy {row["accuracy"][0]:.2f}, format {"kept" if well else "not kept"}, '
            f"reward {row['reward'][0]:.2f}, {row['length'][0]} tokens{share})</span></div>"
            f'<pre class="{"right" if right else "wrong"}">{escape(row["replies"][0])}</pre>'
        )
    return (
        f'<article class="puzzle"><div>{"".join(pictures)}</div><div><div class="stage">'
        f"<strong>{escape(first['source'])}</strong> · {escape(first['id'])} · "
        f"gold answer “{escape(first['gold'])}”</div>"
        f"<details open><summary>The question</summary><pre>{escape(first['prompt'])}</pre></details>"
        f"{''.join(replies)}</div></article>"
    )


def run_html(name: str, log: list[dict], settings: dict | None, save) -> str:
    """One run's section: its curves (each also given to `save(file name part, PNG bytes)`) and its settings."""
    figures = []
    for slug, title, keys, words in panels(log):
        png, alt = draw([(key, *points(log, key)) for key in keys], title, fractions=bool(FRACTIONS & set(keys)))
        save(f"{name}-{slug}", png)
        figures.append(
            f'<figure><img src="{picture(png)}" alt="{escape(f"{name}: {alt}")}">'
            f"<figcaption>{escape(words)}</figcaption></figure>"
        )
    shown = ""
    if settings:
        lines = "\n".join(f"{key} = {value}" for key, value in settings.items())
        shown = f"<details><summary>Settings of this run</summary><pre>{escape(lines, 6000)}</pre></details>"
    return f'<h3>{escape(name)}</h3><div class="curves">{"".join(figures)}</div>{shown}'


def page_html(runs: dict[str, tuple], results: dict[str, dict], save) -> str:
    """The whole page. runs: {name: (log rows, settings or None)}; results: {name: as read_result gives it}."""
    parts, links = [], []

    def section(anchor, title):
        links.append(f'<a href="#{anchor}">{title}</a>')
        parts.append(f'<h2 id="{anchor}">{title}</h2><p>{WORDS[anchor]}</p>')

    if results:
        section("results", "Results")
        table = stage_table(results)
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table[0])
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>'
            + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
            + "</tr>"
            for row in table[1:]
        )
        parts.append(f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')
        if table[-1][0] == "GF":
            parts.append(f"<p>{WORDS['gf']}</p>")
    if runs:
        section("curves", "Training curves")
        side = []
        for key, title in (("accuracy", "Accuracy, all runs"), ("format", "Format, all runs")):
            lines = [(name, *points(log, key)) for name, (log, _) in runs.items() if points(log, key)[0]]
            if len(lines) > 1:
                png, alt = draw(lines, title, fractions=True)
                save(f"all-{key}", png)
                side.append(
                    f'<figure><img src="{picture(png)}" alt="{escape(alt)}"><figcaption>On the questions being trained '
                    f"on, while training.</figcaption></figure>"
                )
        if side:
            parts.append(f'<h3>Side by side</h3><div class="curves">{"".join(side)}</div>')
        parts += [run_html(name, log, settings, save) for name, (log, settings) in runs.items()]
    puzzles = pick_puzzles(results)
    if puzzles:
        section("puzzles", "Questions and replies")
        parts += [puzzle_html(answers) for answers in puzzles]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        # Even if some reply got past the escaping: the page may load nothing and run nothing.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>Training report</title>'
        f"<style>{STYLE}</style></head><body><h1>Training report</h1>"
        f"<p>{WORDS['top']}</p>"
        f"<nav>{''.join(links)}</nav>{''.join(parts)}</body></html>\n"
    )


def write_report(path: Path, runs: dict[str, Path], results: dict[str, Path]) -> str:
    """Write the page and, beside it, its curves as PNG files; returns the final table as Markdown, or ''."""
    logs = {}
    for name, folder in runs.items():
        if not (folder / "log.jsonl").is_file():
            raise DataError(f"{folder}: has no log.jsonl, so it is not a run directory")
        settings = folder / "args.json"
        try:
            logs[name] = (
                [row for _, row in model.read_jsonl(folder / "log.jsonl")],
                json.loads(settings.read_text()) if settings.is_file() else None,
            )
        except ValueError as error:
            raise DataError(f"{settings}: is not JSON: {error}") from error
        if not logs[name][0] or not all("step" in row for row in logs[name][0]):
            raise DataError(f'{folder / "log.jsonl"}: must hold at least one step, and every line its "step"')
    read = {name: read_result(file) for name, file in results.items()}
    path.parent.mkdir(parents=True, exist_ok=True)

    def save(name, png):
        path.with_name(f"{path.stem}-{file_part(name)}.png").write_bytes(png)

    page = page_html(logs, read, save)
    path.write_text(page, encoding="utf-8")
    print(f"{path}: {len(page.encode()) / 1e6:.2f} MB, {len(runs)} runs, {len(results)} result files")
    return markdown_table(stage_table(read)) if read else ""


def file_part(name: str) -> str:
    """A name with only characters that are plain in any file system."""
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", name)


# ---- command line ---------------------------------------------------------------------------------------------------


def named_path(text: str) -> tuple[str, Path]:
    """'NAME=PATH' or 'PATH' -> (name, path); without a name the last part of the path names it."""
    name, _, path = text.partition("=")
    if path and name and "/" not in name:
        return name, Path(path)
    return Path(os.path.abspath(text)).name.removesuffix(".json"), Path(text)


def named_weight(text: str) -> tuple[str, float]:
    """'SOURCE=WEIGHT' -> (source, weight); ValueError, which argparse reports, for anything else."""
    name, _, weight = text.rpartition("=")
    if not name or not 0 < float(weight) < math.inf:
        raise ValueError
    return name, float(weight)


def parse_args(argv=None):
    # fmt: off
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    p.error = lambda message: p.exit(2, f"error: {message}\n")  # one line, not the usage of all these flags
    p.add_argument("--model", metavar="DIR", help="model or run directory, or a hub id")
    p.add_argument("--data", nargs="+", default=[], metavar="FILE", help="records.jsonl files to evaluate")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="the result file to write")
    p.add_argument("--samples", type=int, default=1, metavar="N", help="replies a record; above 1: pass@k (default 1)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X",
                   help="0 is greedy (default); must be above 0 when --samples is above 1")
    p.add_argument("--top-k", type=int, default=0, metavar="N",
                   help="sample from the N likeliest tokens; 0 is off (default)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="X",
                   help="sample from the likeliest tokens that hold this share of the probability; 1 is off (default)")
    p.add_argument("--max-new-tokens", type=int, default=512, metavar="N", help="longest reply in tokens (default 512)")
    p.add_argument("--limit", type=int, metavar="N", help="only the first N records of each file (default: all)")
    p.add_argument("--batch", type=int, default=64, metavar="N",
                   help="records a call and process (default 64); a matter of memory and speed, not of results")
    p.add_argument("--max-pixels", type=int, metavar="N",
                   help="images are made no larger than this (default: the model's own limit)")
    p.add_argument("--seed", type=int, default=0, help="sampled replies follow from it, greedy ones do not (default 0)")
    p.add_argument("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
                   help="of weights and computation; auto (default) is bf16 on a GPU, fp32 on a CPU")
    p.add_argument("--attn", default="auto", choices=("auto", "sdpa", "flash"),
                   help="flash: FlashAttention kernels of torch (CUDA, bf16); sdpa: exact everywhere (default auto)")
    p.add_argument("--sampler", default="builtin", choices=("builtin", "vllm"),
                   help="who draws the replies: the model itself (default), or vLLM beside it")
    p.add_argument("--vllm-memory", type=float, default=0.4, metavar="X",
                   help="share of the GPU that vLLM's weights and KV cache may take (default 0.4)")
    p.add_argument("--id", nargs="+", default=[], metavar="FILE", help="records in the trained reply format (GF)")
    p.add_argument("--ood", nargs="+", default=[], metavar="FILE", help="records in formats never trained (GF)")
    p.add_argument("--ood-weights", nargs="+", type=named_weight, metavar="SOURCE=W",
                   help="weight of each OOD source in the OOD gain (default: all alike)")
    p.add_argument("--baseline", type=Path, metavar="FILE.json",
                   help="result of the step-0 model on the same --id and --ood files: prints and stores the GF")
    p.add_argument("--keep-replies", type=int, default=20, metavar="N",
                   help="records of each source whose replies are stored word for word (default 20; 0 is none)")
    p.add_argument("--report", type=Path, metavar="FILE.html", help="write a page of --runs and --results; no model")
    p.add_argument("--runs", nargs="+", type=named_path, default=[], metavar="[NAME=]DIR", help="runs for the curves")
    p.add_argument("--results", nargs="+", type=named_path, default=[], metavar="[NAME=]FILE.json",
                   help="result files in the order of the stages: the table and the replies")
    p.add_argument("--table", type=Path, metavar="FILE.md", help="with --report: also write the table as Markdown")
    # fmt: on
    args = p.parse_args(argv)
    if args.report:
        if not args.runs and not args.results:
            p.error("--report needs --runs or --results")
        if args.model or args.out:
            p.error("--report runs no model: leave --model and --out away")
        for flag, pairs in (("--runs", args.runs), ("--results", args.results)):
            if len({file_part(name) for name, _ in pairs}) < len(pairs):
                p.error(f"{flag}: two are called the same; give them names, as in first=DIR second=DIR")
        return args
    if not args.model or not args.out or not args.data + args.id + args.ood:
        p.error("--model, --out and at least one of --data, --id, --ood are needed (or --report)")
    if args.runs or args.results or args.table:
        p.error("--runs, --results and --table belong to --report")
    if set(map(os.path.abspath, args.id)) & set(map(os.path.abspath, args.ood)):
        p.error("a file cannot be both --id and --ood")
    if (args.baseline or args.ood_weights) and not (args.id and args.ood):
        p.error("--baseline and --ood-weights need --id and --ood")
    if args.ood_weights and not args.baseline:
        p.error("--ood-weights needs --baseline")
    for name in ("samples", "max_new_tokens", "batch", "max_pixels", "limit"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if min(args.keep_replies, args.top_k, args.seed) < 0 or not 0 <= args.temperature < math.inf:
        p.error("--keep-replies, --top-k, --seed and --temperature must be at least 0")
    if not 0 < args.top_p <= 1:
        p.error("--top-p must be above 0 and at most 1")
    if not 0 < args.vllm_memory < 1:
        p.error("--vllm-memory must be between 0 and 1")
    if args.samples > 1 and args.temperature == 0:
        p.error("--samples above 1 needs --temperature above 0: greedy replies are all the same")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.report:
        table = write_report(args.report, dict(args.runs), dict(args.results))
        print(table)
        if args.table:
            args.table.write_text(table + "\n", encoding="utf-8")
        return
    world = model.setup()

    # 1 read: what is wrong with the input is found here, before the model is loaded
    base = args.out.absolute().parent
    weights = dict(args.ood_weights) if args.ood_weights else None
    records = read_files(args)
    before = read_baseline(args.baseline, records, weights, base) if args.baseline else None
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--out {args.out}: its folder cannot be made ({error})") from error
    policy, encoder = model.load(args.model, world, dtype=args.dtype, attn=args.attn, max_pixels=args.max_pixels)
    sampler = model.sample
    if args.sampler == "vllm":
        sampler = model.VLLM(
            args.model, policy.requires_grad_(False), encoder, world, records[world.rank :: world.size],
            max_new_tokens=args.max_new_tokens, memory=args.vllm_memory, seed=args.seed,
        )  # fmt: skip

    # 2 sample: records are dealt like cards to the processes; a record's seed depends on its place in the files alone
    mine = range(world.rank, len(records), world.size)
    replies = {}  # index of a record -> its n replies
    for start in tqdm(range(0, len(mine), args.batch), desc="eval", disable=None if world.main else True):
        batch = mine[start : start + args.batch]
        drawn = sampler(
            policy, encoder.prompts([records[index] for index in batch]), args.samples,
            seeds=[args.seed * 1_000_003 + index for index in batch], temperature=args.temperature,
            top_k=args.top_k, top_p=args.top_p, max_new_tokens=args.max_new_tokens,
        )  # fmt: skip
        replies |= dict(zip(batch, drawn, strict=True))

    # 3 score
    kept = first_of_each_source(records, args.keep_replies)
    scored = {}
    for index, group in replies.items():
        texts = [encoder.decode(reply.ids) for reply in group]
        lengths, finished = [len(reply.ids) for reply in group], [bool(reply.finished) for reply in group]
        scored[index] = score_row(records[index], texts, lengths, finished, index in kept, base)
    everyone = {index: row for part in world.gather(scored) for index, row in part.items()}
    rows = [everyone[index] for index in range(len(records))]

    # 4 record
    if not world.main:
        return
    files = {role: {os.path.relpath(r["_file"], base): None for r in records if r["_role"] == role} for role in ROLES}
    result = {
        "model": args.model,
        "files": {role: list(names) for role, names in files.items()},
        "args": {name: getattr(args, name) for name in SETTINGS},
        **summarise(rows),
        "gf": None,
        "rows": rows,
    }
    print(result_table(result))
    if before is not None:
        result["gf"] = format_gains(rows, before, weights) | {"baseline": os.path.relpath(args.baseline, base)}
        print("format against the baseline, in percentage points: gain ID {gain_id:+.1f}, gain OOD {gain_ood:+.1f}, "
              "GF {gf:.1f} (beta {beta:g})".format(**result["gf"]))  # fmt: skip
    write_result(args.out, result)


if __name__ == "__main__":
    model.run(main)
