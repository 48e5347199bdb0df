"""Evaluation: accuracy and format on any records file, the generalization factor, pass@k, and exploration.

    python eval.py --model DIR --data test.jsonl --out test.json                        greedy, one reply a question
    python eval.py --model DIR --data test.jsonl --out k.json --samples 64 --temperature 1          pass@1, 2, 4, … 64
    python eval.py --checkpoints RUN --id think.jsonl --ood boxed.jsonl json.jsonl --out gf.json    GF along a run
    python eval.py --model BASE  --id think.jsonl --ood boxed.jsonl json.jsonl --out base.json      step 0 of the GF ...
    python eval.py --model TUNED --id think.jsonl --ood boxed.jsonl json.jsonl --out tuned.json --baseline base.json
    python eval.py --report report.html --runs runs/grpo --results base=base.json grpo=tuned.json   page of report.py
    torchrun --nproc_per_node=2 eval.py ...                                             the same numbers, sooner

Replies are kept in FILE.json.partial batch by batch, and a killed job goes on from there with --resume (journal.py).

A result file is one JSON object: "model", "files", "args", "overall" and "sources" (see `summarise`), "gf" (see
`format_gains`; null without step 0), "curve" (null without --checkpoints), "fingerprint" (of flags, files and weights:
where it is the same, all the rest is) and "rows", one a record in the order of the files:
    {"id", "source", "role", "file", "distinct" (how many different replies there are), and a list over the n replies
     for each of "accuracy", "format", "reward", "length", "parsed" (an answer could be read), "finished" (false:
     truncated at the length limit); with --exploration also "entropy" and "rbf" (exploration.py)}
With --checkpoints all this is about the run's last model, and "curve" has one object for each of its models, step 0
first: {"step", "model", "overall", "sources", "gf"}. The first --keep-replies rows of each source also hold "prompt",
"images", "gold", "replies" and "answers" (as read). Paths in it are relative to the result file's own folder. A
"source" here is the record's source and the reply format it asks for ("jigsaw-pair-2x1:boxed"; nothing is added for
think, and for templates), because the same questions in another format are another test.

Legend: n replies a record, c of them right; accuracy, format and shares are fractions of 1; gains and GF are percentage
points; lengths are tokens, the end token included; ID, the reply format a model was trained in; OOD, formats it was not
trained in; step 0, the model that a run started from. How metrics are averaged: a source's metric is the mean over all
its replies, "overall" the mean over all replies of all sources (micro), the OOD gain the mean over sources (macro).
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import endpoint
import exploration
import judge
import model
import report
import rewards
import sampler
import scoring
import training
import vllm_sampler
from files import DataError, read_json, read_json_object
from journal import Journal, add_journal_flags
from pictures import MAX_IMAGE_PIXELS
from records import read_records
from run_directory import checkpoints_in, damage
from training import World, integer, real

# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def generalization_factor(gain_id: float, gain_ood: float, beta: float = 2.0) -> float | None:
    """Weighted harmonic mean of two gains: (1 + β²)·G_ID·G_OOD / (β²·G_ID + G_OOD). SPECS, arXiv 2510.25801.

    High only when the trained (ID) format and the untrained (OOD) formats both gained; β = 2 makes OOD count more.
    Unit: that of the gains. 0 when a gain is 0. None, not defined, when a gain is negative: a harmonic mean is one of
    positive numbers, and beyond them the formula has a pole (at G_OOD = -β²·G_ID) with nonsense on both sides.
    """
    if gain_id < 0 or gain_ood < 0:
        return None
    if gain_id == 0 or gain_ood == 0:
        return 0.0
    return (1 + beta**2) * gain_id * gain_ood / (beta**2 * gain_id + gain_ood)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k replies, chosen from n of which c are right, hold a right one.

    Unbiased: 1 - C(n-c, k) / C(n, k) (Chen et al., arXiv 2107.03374, eq. 1), counted in whole numbers and divided once,
    so nothing overflows or cancels. Raises ValueError when k > n, c > n or anything is negative.
    """
    if min(n, c, k) < 0 or c > n or k > n:
        raise ValueError(f"pass@k needs 0 <= c <= n and 0 <= k <= n, got n={n}, c={c}, k={k}")
    choices = math.comb(n, k)
    return (choices - math.comb(n - c, k)) / choices


def pass_rates(rows: list[dict]) -> dict[str, list[float]]:
    """{"pass@1", "pass@2", "pass@4", …} up to the smallest number of replies, a value for each record."""
    counts = []  # (n, c) of each record
    for row in rows:
        # Right means accuracy 1: a grid that is partly right earns accuracy, but does not pass.
        right = sum(value >= 1 for value in row["accuracy"])
        counts.append((len(row["accuracy"]), right))
    smallest = min(n for n, _ in counts)
    rates = {}
    k = 1
    while k <= smallest:
        rates[f"pass@{k}"] = [pass_at_k(n, c, k) for n, c in counts]
        k *= 2
    return rates


def bootstrap_intervals(values: np.ndarray, resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """95 % intervals of the means of K columns by the percentile bootstrap over Q questions: (Q, K) -> (K, 2).

    Questions are resampled with replacement, the same ones for all columns. What varies is which questions were asked:
    neither the replies that another seed would sample, nor another training run.
    """
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    for number in range(resamples):
        means[number] = values[rng.integers(len(values), size=len(values))].mean(0)
    return np.quantile(means, (0.025, 0.975), axis=0).T


def metrics(rows: list[dict]) -> dict:
    """The metrics of one group of rows: see `summarise`."""
    values = {key: [value for row in rows for value in row[key]] for key in report.SCORES}
    replies = len(values["reward"])
    unparsed = values["parsed"].count(False)
    # Format lost and answers wrong are two failures: accuracy_read leaves the first one out.
    scored = zip(values["accuracy"], values["parsed"], strict=True)
    read = [accuracy for accuracy, parsed in scored if parsed]
    passes = pass_rates(rows)
    questions = {key: [fmean(row[key]) for row in rows] for key in ("accuracy", "format")} | passes
    intervals = bootstrap_intervals(np.array(list(questions.values())).T)
    return {
        "n": len(rows),
        "replies": replies,
        "accuracy": fmean(values["accuracy"]),
        "format": fmean(values["format"]),
        "reward": fmean(values["reward"]),
        "length": fmean(values["length"]),
        "unparsed": unparsed,
        "unparsed_share": unparsed / replies,
        "accuracy_read": fmean(read) if read else 0.0,
        "truncated": values["finished"].count(False),
        "distinct": fmean(row["distinct"] for row in rows),
        **token_means(rows),
        **{key: fmean(values) for key, values in passes.items()},
        "intervals": dict(zip(questions, intervals.tolist(), strict=True)),
    }


def token_means(rows: list[dict]) -> dict[str, float]:
    """{"entropy", "rbf"}: means over all tokens of all replies, so a long reply counts more; {} if not measured."""
    if "entropy" not in rows[0]:
        return {}
    tokens = sum(sum(row["length"]) for row in rows)
    return {key: float(sum(np.dot(row[key], row["length"]) for row in rows)) / tokens for key in ("entropy", "rbf")}


def summarise(rows: list[dict]) -> dict:
    """{"overall": metrics, "sources": {source: metrics}} of scored rows, sources in the order they first appear.

    Each row: "source", "distinct", and lists over its n replies "accuracy", "format", "reward", "length", "parsed",
    "finished", perhaps "entropy" and "rbf". Metrics: "n" records, "replies"; means over replies "accuracy", "format",
    "reward", "length"; "unparsed" replies whose answer could not be read, and "unparsed_share"; "accuracy_read": mean
    accuracy of the others (0 if none); "truncated": replies that hit the length limit before they ended; "distinct":
    mean number of different replies to a question; those of `token_means`; means over questions of `pass_rates`; and
    "intervals": of accuracy, format and pass@k, see `bootstrap_intervals`. Raises ValueError for no rows.
    """
    if not rows:
        raise ValueError("there are no rows to summarise")
    groups = {}
    for row in rows:
        groups.setdefault(row["source"], []).append(row)
    return {
        "overall": metrics(rows),
        "sources": {source: metrics(group) for source, group in groups.items()},
    }


def format_gains(
    rows: list[dict], before: dict[tuple, dict], weights: dict[str, float] | None = None, beta: float = 2.0
) -> dict:
    """The generalization factor of format-following against step 0. As in SPECS it is format, not accuracy.

    rows: scored rows with "role" ("id" and "ood" count, others do not), "source", "file", "id", "format": [n].
    before: {(file, id): row of the step-0 model}. weights: {OOD source: weight}; None weighs every OOD source alike.
    Returns percentage points: "gain_id" (mean over ID replies), "gain_ood" (weighted mean over OOD sources), "gf" (None
    where it is not defined), "ood_gains" per source, and "beta".
    """
    gains = {"id": {}, "ood": {}}  # role -> source -> one gain a record
    for row in rows:
        if row["role"] not in gains:
            continue
        start = before[row["file"], row["id"]]
        gain = fmean(row["format"]) - fmean(start["format"])
        gains[row["role"]].setdefault(row["source"], []).append(100 * gain)

    gain_id = fmean(gain for group in gains["id"].values() for gain in group)
    ood_gains = {source: fmean(group) for source, group in gains["ood"].items()}
    # A source counts by its weight, not by its number of records: a long file must not decide.
    weights = weights or dict.fromkeys(ood_gains, 1.0)
    total = sum(weights[source] for source in ood_gains)
    gain_ood = sum(weights[source] * gain for source, gain in ood_gains.items()) / total
    return {
        "gain_id": gain_id,
        "gain_ood": gain_ood,
        "gf": generalization_factor(gain_id, gain_ood, beta),
        "ood_gains": ood_gains,
        "beta": beta,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading

ROLES = ("data", "id", "ood")


def read_files(
    files: dict[str, list[str]], limit: int | None, skip_bad: bool = False, max_image_pixels: int = MAX_IMAGE_PIXELS
) -> list[dict]:  # fmt: skip
    """All records of {role: files}, in that order, with "_file" (absolute), "_role" and "_source".

    limit: only so many of each file. A file named twice is read once, in its last role: a file of --data that is also
    one of --id counts for the GF. Raises DataError for bad records and empty files.
    """
    roles = {os.path.abspath(path): role for role in ROLES for path in files[role]}
    records = []
    for path, role in roles.items():
        whole = read_records(path, rewards.check_gold, skip_bad=skip_bad, max_image_pixels=max_image_pixels)
        for record in whole[:limit]:
            form = rewards.reply_format(record)
            named = form != "think" and not rewards.is_template(form)
            source = f"{record['source']}:{form}" if named else record["source"]
            records.append(record | {"_file": path, "_role": role, "_source": source})
    return records


def read_baseline(path: Path, records: list[dict], folder: Path) -> dict[tuple, dict]:
    """{(file relative to `folder`, id): row} of a result. DataError if an ID or OOD record has no row there."""
    # Keyed by path as well: two files may use the same ids.
    before = {}
    for row in report.read_result(path)["rows"]:
        before[os.path.relpath(row["file"], folder), row["id"]] = row
    for record in records:
        key = os.path.relpath(record["_file"], folder), record["id"]
        if record["_role"] != "data" and key not in before:
            raise DataError(
                f"{path}: has no row for {record['_where']} (id {record['id']!r}): a baseline is the step-0 "
                f"model's result on the same --id and --ood files"
            )
    return before


def check_weights(weights: dict[str, float], records: list[dict]) -> None:
    """DataError unless the weights name every OOD source and nothing else."""
    sources = sorted({record["_source"] for record in records if record["_role"] == "ood"})
    if sorted(weights) != sources:
        named = ", ".join(sorted(weights))
        raise DataError(f"--ood-weights names {named}; the sources of --ood are {', '.join(sources)}")


class Point(NamedTuple):
    """One model of a run: the steps it has been trained for, and the directory that holds its weights."""

    step: int
    path: str

    @property
    def digests(self) -> Path:
        """Where a checkpoint keeps the digests of its files; a model directory has no such file."""
        return Path(self.path, "SHA256SUMS")

    @property
    def is_checkpoint(self) -> bool:
        return self.digests.exists()


def read_points(run: Path, start: str | None) -> list[Point]:
    """The models of a run directory by step: what it started from, its checkpoints, its final model. DataError.

    start: the model of step 0; None: the one that the run's args.json names. A final model is its last checkpoint's,
    which is taken where it is still there.
    """
    settings = read_json_object(run / "args.json")
    start = start or settings.get("model")
    if not isinstance(start, str):
        raise DataError(f"{run / 'args.json'}: names no model that the run started from; add --model DIR")
    found = {int(path.name.removeprefix("step_")): str(path) for path in checkpoints_in(run)}
    if (run / "config.json").exists():
        log, _ = report.read_log(run / "log.jsonl")
        found.setdefault(max((entry["step"] for entry in log), default=0), str(run))
    if not found:
        raise DataError(f"{run}: holds neither a checkpoint nor a model")
    return [Point(0, start), *(Point(step, path) for step, path in sorted(found.items()))]


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def first_of_each_source(records: list[dict], count: int) -> set[int]:
    """Indices of the first `count` records of every source: which replies are stored is no one's choice."""
    seen = {}  # source -> records of it so far
    first = set()
    for index, record in enumerate(records):
        source = record["_source"]
        seen[source] = seen.get(source, 0) + 1
        if seen[source] <= count:
            first.add(index)
    return first


def score_row(
    record: dict,
    texts: list[str],
    lengths: list[int],
    finished: list[bool],
    store: bool,
    folder: Path,
    score: Callable[[str, dict], dict] = rewards.score,
    measured: dict[str, list[float]] | None = None,
) -> dict:
    """One row of the result file: the scores of a record's n replies; with `store` also what the report shows of it.

    texts, lengths, finished: one a reply. Paths in the row are relative to `folder`. score: rewards.score, or a
    Scorer's. measured: further fields of the row, lists over the replies.
    """
    scores = [score(text, record) for text in texts]
    row = {
        "id": record["id"],
        "source": record["_source"],
        "role": record["_role"],
        "file": os.path.relpath(record["_file"], folder),
        "accuracy": [score["accuracy"] for score in scores],
        "format": [score["format"] for score in scores],
        "reward": [score["reward"] for score in scores],
        "length": lengths,
        "parsed": [score["answer"] is not None for score in scores],
        "finished": finished,
        "distinct": len(set(texts)),
    } | (measured or {})
    if store:
        row |= {
            "prompt": record["prompt"],
            "images": [os.path.relpath(image, folder) for image in record["images"]],
            "gold": record["answer"],
            "replies": texts,
            "answers": [score["answer"] for score in scores],
        }
        if "puzzle" in record:  # a lazy record's pictures are made of it
            row["puzzle"] = record["puzzle"]
    return row


def files_by_role(rows: list[dict]) -> dict[str, list[str]]:
    """{role: its files, each once}, as the rows name them."""
    files = {role: {} for role in ROLES}  # dicts keep the order, sets do not
    for row in rows:
        files[row["role"]][row["file"]] = None
    return {role: list(names) for role, names in files.items()}


def result_text(result: dict) -> str:
    """The result as JSON, a row a line."""
    head = json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in result["rows"])
    # The head's own closing brace goes to the end of the file.
    return f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n'


def finished_result(path: Path, fingerprint: str) -> dict | None:
    """The result in a file, if it is one that this job would write again word for word."""
    if not path.exists():
        return None
    try:
        result = read_json(path)
    except DataError:
        return None  # whatever it is, it is written anew
    return result if isinstance(result, dict) and result.get("fingerprint") == fingerprint else None


def print_result(result: dict) -> None:
    print(result_table(result))
    if result["curve"]:
        print(curve_table(result["curve"]))
    elif result["gf"]:
        print(gains_line(result["gf"]))


def result_table(result: dict) -> str:
    """The terminal's table: a line a source, then overall."""
    groups = dict(result["sources"])
    if len(groups) > 1:
        groups["overall"] = result["overall"]
    passes = [key for key in result["overall"] if key.startswith("pass@")]
    several = len(passes) > 1
    if not several:  # one reply a question: pass@1 says what accuracy says
        passes = []

    more = (["distinct"] if several else []) + [key for key in ("entropy", "rbf") if key in result["overall"]]
    lines = [["source", "n", "accuracy", "format", "reward", "unparsed", "truncated", "length", *more, *passes]]
    for name, values in groups.items():
        line = [report.visible_name(name), str(values["n"]), percent(values, "accuracy"), percent(values, "format")]
        line += [f"{values['reward']:.3f}", str(values["unparsed"]), str(values["truncated"])]
        line += [f"{values['length']:.1f}"]
        line += [f"{values[key]:.2f}" for key in more] + [percent(values, key) for key in passes]
        lines.append(line)
    return f"{aligned(lines)}\npercent; in brackets 95 % intervals, over questions"


def percent(values: dict, key: str) -> str:
    """A metric and its interval."""
    low, high = values["intervals"][key]
    return f"{100 * values[key]:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def curve_table(curve: list[dict]) -> str:
    """The terminal's table of a run: a line a step; gains in percentage points of format against step 0."""
    lines = [["step", "accuracy", "format"]]
    gains = curve[-1]["gf"]
    if gains:
        sources = list(gains["ood_gains"])
        lines[0] += ["gain ID", "gain OOD", "GF", *map(report.visible_name, sources)]
    for point in curve:
        line = [str(point["step"]), *(f"{100 * point['overall'][key]:.1f}" for key in ("accuracy", "format"))]
        if gains:
            here = point["gf"]
            line += [f"{here['gain_id']:+.1f}", f"{here['gain_ood']:+.1f}", factor_text(here["gf"])]
            line += [f"{here['ood_gains'][source]:+.1f}" for source in sources]
        lines.append(line)
    return aligned(lines)


def aligned(lines: list[list[str]]) -> str:
    """Cells as columns: the first from the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = []
    for first, *cells in lines:
        columns = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        text.append("  ".join([first.ljust(widths[0]), *columns]))
    return "\n".join(text)


def gains_line(gains: dict) -> str:
    """The terminal's line about what `format_gains` returned."""
    factor = "not defined (a gain is negative)" if gains["gf"] is None else factor_text(gains["gf"])
    text = f"gain ID {gains['gain_id']:+.1f}, gain OOD {gains['gain_ood']:+.1f}, GF {factor}"
    return f"format against the baseline, in percentage points: {text} (beta {gains['beta']:g})"


def factor_text(factor: float | None) -> str:
    return "–" if factor is None else f"{factor:.1f}"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# What the numbers depend on besides the model and the files: stored with them.
SETTINGS = ("samples", "temperature", "top_k", "top_p", "max_new_tokens", "limit")
SETTINGS += ("max_pixels", "seed", "dtype", "attn", "sampler")
# What is made of the replies, not how they are sampled: a resumed job may change it.
LATER = ("baseline", "ood_weights", "keep_replies")
LATER += ("judge", "judge_model", "judge_tokens", "judge_options")


def named_weight(text: str) -> tuple[str, float]:
    """'SOURCE=WEIGHT' -> (source, weight)."""
    source, _, weight = text.rpartition("=")
    if not source:
        raise argparse.ArgumentTypeError(f"must be SOURCE=WEIGHT, not {text}")
    return source, real("[1e-6, 1e6]")(weight)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = training.Parser(__doc__)
    # fmt: off
    add = parser.add_argument_group("what to evaluate").add_argument
    add("--model", metavar="DIR", help="model or run directory, or a hub id")
    add("--checkpoints", type=Path, metavar="RUN",
        help="evaluate a run directory along its steps: the model it started from (--model, if that has moved) as step "
        "0, every checkpoint it has kept, its final model; train with --keep 1000 to keep them all")
    add("--data", nargs="+", default=[], metavar="FILE", help="records.jsonl files")
    add("--skip-bad", action="store_true",
        help="leave out records whose gold answer cannot be scored, and say how many, instead of stopping")
    add("--out", type=Path, metavar="FILE.json", help="the result file to write")
    add("--limit", type=integer("[1, 1e9]"), metavar="N", help="only the first N records of each file (default: all)")
    add("--batch", type=integer("[1, 1e6]"), default=64, metavar="N",
        help="records a call and process: a matter of memory and speed, not of results")
    add("--keep-replies", type=integer("[0, 1e9]"), default=20, metavar="N",
        help="records of each source whose replies are stored word for word")
    add_journal_flags(add)

    add = parser.add_argument_group("generalization factor (GF)").add_argument
    add("--id", nargs="+", default=[], metavar="FILE", help="records in the trained reply format")
    add("--ood", nargs="+", default=[], metavar="FILE", help="records in formats never trained")
    add("--baseline", type=Path, metavar="FILE.json",
        help="result of the step-0 model on the same --id and --ood files: prints and stores the GF")
    add("--ood-weights", nargs="+", type=named_weight, metavar="SOURCE=W",
        help="weight of each OOD source in the OOD gain (default: all alike)")

    add = parser.add_argument_group("replies").add_argument
    add("--exploration", action="store_true",
        help="measure the entropy and the branching factor (RBF) of the replies: one more forward over them")
    add("--samples", type=integer("[1, 1e5]"), default=1, metavar="N", help="replies a record; above 1: pass@k")
    add("--temperature", type=real("0 or [1e-4, 1e4]"), default=0.0, metavar="X",
        help="0: greedy; must be above 0 when --samples is above 1")
    add("--top-k", type=integer("[0, 1e6]"), default=0, metavar="N",
        help="sample from the N likeliest tokens; 0: from all")
    add("--top-p", type=real("(0, 1]"), default=1.0, metavar="X",
        help="sample from the likeliest tokens that hold this share of the probability; 1: from all")
    add("--max-new-tokens", type=integer("[1, 1e6]"), default=512, metavar="N", help="longest reply in tokens")
    add("--seed", type=integer("[0, 4294967295]"), default=0, metavar="N",
        help="sampled replies follow from it, greedy ones do not")

    add = judge.add_judge_flags(parser, ["none", "rule", "model", "endpoint"], "none",
        "also count the replies whose reasoning leads to their answer: by a rule that looks for contradictions, by a "
        "model of this machine, or by one behind a server; none: do not")
    endpoint.add_endpoint_flags(add)
    vllm_sampler.add_sampler_flags(parser)
    training.add_model_flags(parser)

    add = parser.add_argument_group("report").add_argument
    add("--report", type=Path, metavar="FILE.html", help="write a page; no model is run")
    report.add_report_flags(add)
    # fmt: on
    args = parser.parse_args(argv)
    judge.check_judge_flags(parser, args)
    if args.report:
        if args.model or args.checkpoints or args.out:
            parser.error("--report runs no model: leave --model, --checkpoints and --out away")
        report.check_report_flags(parser, args)
        return args
    if not (args.model or args.checkpoints) or not args.out or not args.data + args.id + args.ood:
        parser.error("--model or --checkpoints, --out and at least one of --data, --id, --ood are needed (or --report)")
    if args.runs or args.results or args.pairs or args.table:
        parser.error("--runs, --results, --pairs and --table belong to --report")
    if set(map(os.path.abspath, args.id)) & set(map(os.path.abspath, args.ood)):
        parser.error("a file cannot be both --id and --ood")
    if (args.baseline or args.ood_weights) and not (args.id and args.ood):
        parser.error("--baseline and --ood-weights need --id and --ood")
    if args.baseline and args.checkpoints:
        parser.error("--checkpoints evaluates step 0 itself: leave --baseline away")
    if args.ood_weights and not (args.baseline or args.checkpoints):
        parser.error("--ood-weights needs --baseline or --checkpoints")
    if args.samples > 1 and args.temperature == 0:
        parser.error("--samples above 1 needs --temperature above 0: greedy replies are all the same")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.report:
        shown = dict(args.runs), dict(args.results), args.table, dict(args.pairs), args.keep_pairs
        report.write_report(args.report, *shown)
        return
    world = training.setup(args.timeout)

    # 1 read: what is wrong with the input is found here, before the model is loaded
    points = read_points(args.checkpoints, args.model) if args.checkpoints else [Point(0, args.model)]
    args.model = points[0].path
    files = {"data": args.data, "id": args.id, "ood": args.ood}
    records = read_files(files, args.limit, args.skip_bad, args.max_image_pixels)
    folder = args.out.absolute().parent
    before = read_baseline(args.baseline, records, folder) if args.baseline else None
    weights = dict(args.ood_weights) if args.ood_weights else None
    if weights:
        check_weights(weights, records)
    inputs = files | {"baseline": [args.baseline] if before else []}
    inputs["checkpoints"] = [point.digests for point in points[1:] if point.is_checkpoint]
    final = points[-1].path if len(points) > 1 and not points[-1].is_checkpoint else None
    journal = Journal.open(
        vars(args),
        world,
        inputs=inputs,
        models={
            "model": args.model,
            "checkpoints": final,
            "judge_model": args.judge_model if args.judge == "model" else None,
        },
        pictures=[image for record in records for image in record["images"]],
        later=LATER,
    )
    result = finished_result(args.out, journal.fingerprint) if args.resume else None
    with journal:
        if result is None:
            # Before anything expensive: a server that cannot be used is found here.
            asked = judge.open_judge(args, world) if args.judge == "endpoint" else None
            # 2 sample: each process its share of what no earlier start has sampled
            sample_missing(args, world, records, points, journal)
            # 3 score: as in training, then every process gets every row of every model
            rows = score_all(args, world, records, points, journal)
            if args.judge == "model":
                asked = judge.open_judge(args, world)
            judged = {}
            if args.judge != "none":
                items, first = journal.items("replies"), (len(points) - 1) * len(records)
                of_last = {index: items[first + index] for index in range(len(records))}
                judged = judge_all(args.judge, asked, world, records, of_last)
            # 4 record: one process prints and writes
            if args.checkpoints and args.id and args.ood:
                before = {(row["file"], row["id"]): row for row in rows[0]}
            curve = []
            for point, scored in zip(points, rows, strict=True):
                gains = format_gains(scored, before, weights) if before else None
                curve.append({"step": point.step, "model": point.path, **summarise(scored), "gf": gains})
            result = {
                "model": points[-1].path,
                "files": files_by_role(rows[-1]),
                "args": {name: getattr(args, name) for name in SETTINGS},
                **{name: curve[-1][name] for name in ("overall", "sources", "gf")},
                "curve": curve if args.checkpoints else None,
                **judged,
                "fingerprint": journal.fingerprint,
                "rows": rows[-1],
            }
            if args.baseline:
                result["gf"]["baseline"] = os.path.relpath(args.baseline, folder)
            if world.main:
                journal.finish(result_text(result))
        elif world.main:
            print(f"{args.out}: is finished already")
            journal.drop()
    if world.main:
        print_result(result)


def sample_missing(
    args: argparse.Namespace, world: World, records: list[dict], points: list[Point], journal: Journal
) -> None:  # fmt: skip
    """Phase 2 of main: the replies that the journal lacks. No model is loaded when it lacks none.

    The reply of point p to record r is item p·len(records) + r.
    """
    count = len(records)
    missing = journal.missing("replies", count * len(points))
    if not missing:
        return
    for number in sorted({index // count for index in missing} - {0}):
        check_checkpoint(points[number], world)
    # A whole copy of the model in every process: nothing is trained, so nothing is sharded.
    policy, encoder = model.load(
        args.model, world, dtype=args.dtype, attn=args.attn, max_pixels=args.max_pixels,
        max_image_pixels=args.max_image_pixels,
    )  # fmt: skip
    # vLLM asks: weights that require no gradient are sent to it once, others before every call.
    policy.requires_grad_(len(points) > 1)
    mine = journal.mine("replies", count * len(points))
    sample = sampler.sample
    if args.sampler == "vllm":
        sample = vllm_sampler.VLLM(
            args.model,
            policy,
            encoder,
            world,
            [records[index % count] for index in mine],
            max_new_tokens=args.max_new_tokens,
            memory=args.vllm_memory,
            seed=args.seed,
        )
    bar = tqdm(total=len(mine), desc="eval", disable=None if world.main else True)
    for number, point in enumerate(points):
        first = number * count
        if number and any(first <= index < first + count for index in missing):  # a collective: for all or for none
            load_weights(policy, point, world)
        places = [index - first for index in mine if first <= index < first + count]
        for start in range(0, len(places), args.batch):
            batch = places[start : start + args.batch]
            items = sample_batch(args, policy, encoder, sample, records, batch)
            journal.add("replies", {first + place: item for place, item in items.items()})
            bar.update(len(batch))
    bar.close()


def sample_batch(
    args: argparse.Namespace, policy: model.Policy, encoder: model.Encoder, sample: Callable, records: list[dict],
    batch: list[int],
) -> dict[int, dict]:  # fmt: skip
    """{index of a record: what the journal keeps of its replies} for some records."""
    prompts = encoder.prompts([records[index] for index in batch])
    groups = sample(
        policy,
        prompts,
        args.samples,
        # A function of the record's index alone: batches, processes and restarts change no reply. And the models of a
        # run share their random numbers, so what differs along a curve is the model.
        seeds=[args.seed * 1_000_003 + index for index in batch],
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_new_tokens=args.max_new_tokens,
    )
    items = {}
    for index, prompt, group in zip(batch, prompts, groups, strict=True):
        items[index] = {
            "texts": [encoder.decode(reply.ids) for reply in group],
            "lengths": [len(reply.ids) for reply in group],
            "finished": [bool(reply.finished) for reply in group],
        }
        if args.exploration:
            ids = [reply.ids for reply in group]
            items[index]["measured"] = exploration.of_replies(policy, prompt, ids, args.temperature or 1.0)
    return items


def check_checkpoint(point: Point, world: World) -> None:
    """DataError, on all processes together, if a checkpoint is not what was written."""
    if point.is_checkpoint:
        for problem in filter(None, world.gather(damage(Path(point.path), world))):
            raise DataError(problem)


def load_weights(policy: model.Policy, point: Point, world: World) -> None:
    """Give a policy the weights of a checkpoint, or of a model directory. DataError, on all processes together."""
    with model.together(world):
        if point.is_checkpoint:
            # It names weights as the policy does.
            weights = [name for name, _ in policy.named_parameters()]
            names = {name.removeprefix("hf."): name for name in weights}
        else:
            names = model.stored_names(policy, point.path)
        model.read_weights(policy, point.path, names)
        model.check_finite(policy, point.path)


def score_all(
    args: argparse.Namespace, world: World, records: list[dict], points: list[Point], journal: Journal
) -> list[list[dict]]:  # fmt: skip
    """Phase 3 of main: the rows of all records, in their order, of each of the models, on every process."""
    world.barrier()  # until every process has added its last batch
    items = journal.items("replies")
    count, last = len(records), len(points) - 1
    stored = first_of_each_source(records, args.keep_replies)
    folder = args.out.absolute().parent
    scorer = scoring.Scorer()
    scored = {}  # number of an item -> its row
    for number in range(world.rank, count * len(points), world.size):
        point, index = divmod(number, count)
        item = items[number]
        replies = item["texts"], item["lengths"], item["finished"]
        store = point == last and index in stored
        row = score_row(records[index], *replies, store, folder, scorer.score, item.get("measured"))
        scored[number] = row
    everyone = {number: row for part in world.gather(scored) for number, row in part.items()}
    return [[everyone[point * count + index] for index in range(count)] for point in range(len(points))]


def judge_all(name: str, asked: judge.Judge | None, world: World, records: list[dict], items: dict) -> dict:
    """{"consistency": …}: how many of the replies that give a reasoning and an answer have one that leads to the other.

    name: --judge; asked: the judge, None for the rule. items: {index of a record: {"texts": its replies}}. "replies"
    that were judged, the "share" that the judge says yes to (null of none), the same by source, and the "account" of a
    judge that is a model.
    """
    mine = range(world.rank, len(records), world.size)
    groups = [items[index]["texts"] for index in mine]
    found = judge.consistency(asked, [records[index] for index in mine], groups)
    by_source = {}  # in the order of the records
    for place, index in enumerate(mine):
        verdicts = [verdict for verdict in found[place] if verdict is not None]
        by_source.setdefault(records[index]["_source"], []).extend(verdicts)
    parts, sources = world.gather((by_source, asked.account() if asked else {})), {}
    for record in records:
        sources.setdefault(record["_source"], [])
    for part, _ in parts:
        for source, verdicts in part.items():
            sources[source] += verdicts

    def share(verdicts):
        return {"replies": len(verdicts), "share": fmean(verdicts) if verdicts else None}

    told = {"judge": asked.name if asked else name, **share(sum(sources.values(), []))}
    told["sources"] = {source: share(verdicts) for source, verdicts in sources.items()}
    if asked:
        told["account"] = judge.summed([account for _, account in parts])
    return {"consistency": told}


if __name__ == "__main__":
    training.run(main)
