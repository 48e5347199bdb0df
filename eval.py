"""Evaluation: accuracy and format on any records file, the generalization factor, and pass@k.

    python eval.py --model DIR --data test.jsonl --out test.json                        greedy, one reply a question
    python eval.py --model DIR --data test.jsonl --out k.json --samples 16 --temperature 1          pass@1, 2, 4, 8, 16
    python eval.py --model BASE  --id think.jsonl --ood boxed.jsonl json.jsonl --out base.json      step 0 of the GF ...
    python eval.py --model TUNED --id think.jsonl --ood boxed.jsonl json.jsonl --out tuned.json --baseline base.json
    python eval.py --report report.html --runs runs/grpo --results base=base.json grpo=tuned.json   page of report.py
    torchrun --nproc_per_node=2 eval.py ...                                             the same numbers, sooner

Replies are kept in FILE.json.partial batch by batch, and a killed job goes on from there with --resume (journal.py).

A result file is one JSON object: "model", "files", "args", "overall" and "sources" (see `summarise`), "gf" (see
`format_gains`; null without --baseline), "fingerprint" (of flags, files and weights: where it is the same, all the rest
is) and "rows", one a record in the order of the files:
    {"id", "source", "role", "file", and a list over the n replies for each of "accuracy", "format", "reward", "length",
     "parsed" (an answer could be read), "finished" (false: truncated at the length limit)}
The first --keep-replies rows of each source also hold "prompt", "images", "gold", "replies" and "answers" (as read).
Paths in it are relative to the result file's own folder. A "source" here is the record's source and the reply format it
asks for ("jigsaw-pair-2x1:boxed"; nothing is added for think), because the same questions in another format are another
test.

Legend: n replies a record, c of them right; accuracy, format and shares are fractions of 1; gains and GF are percentage
points; lengths are tokens, the end token included; ID, the reply format a model was trained in; OOD, formats it was not
trained in. How metrics are averaged: a source's metric is the mean over all its replies, "overall" the mean over all
replies of all sources (micro), the OOD gain the mean over sources (macro).
"""

import argparse
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

import model
import report
import rewards
import sampler
import scoring
import training
import vllm_sampler
from files import DataError, read_json
from journal import Journal, add_journal_flags
from pictures import MAX_IMAGE_PIXELS
from records import read_records
from training import integer, real

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


def pass_rates(rows: list[dict]) -> dict[str, float]:
    """{"pass@1", "pass@2", "pass@4", …} up to the smallest number of replies, means over records."""
    counts = []  # (n, c) of each record
    for row in rows:
        # Right means accuracy 1: a grid that is partly right earns accuracy, but does not pass.
        right = sum(value >= 1 for value in row["accuracy"])
        counts.append((len(row["accuracy"]), right))
    smallest = min(n for n, _ in counts)
    rates = {}
    k = 1
    while k <= smallest:
        rates[f"pass@{k}"] = fmean(pass_at_k(n, c, k) for n, c in counts)
        k *= 2
    return rates


def metrics(rows: list[dict]) -> dict[str, float]:
    """The metrics of one group of rows: see `summarise`."""
    values = {key: [value for row in rows for value in row[key]] for key in report.SCORES}
    replies = len(values["reward"])
    unparsed = values["parsed"].count(False)
    # Format lost and answers wrong are two failures: accuracy_read leaves the first one out.
    scored = zip(values["accuracy"], values["parsed"], strict=True)
    read = [accuracy for accuracy, parsed in scored if parsed]
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
        **pass_rates(rows),
    }


def summarise(rows: list[dict]) -> dict:
    """{"overall": metrics, "sources": {source: metrics}} of scored rows, sources in the order they first appear.

    Each row: "source", and lists over its n replies "accuracy", "format", "reward", "length", "parsed", "finished".
    Metrics: "n" records, "replies"; means over replies "accuracy", "format", "reward", "length"; "unparsed" replies
    whose answer could not be read, and "unparsed_share"; "accuracy_read": mean accuracy of the others (0 if none);
    "truncated": replies that hit the length limit before they ended; and those of `pass_rates`. Raises ValueError for
    no rows.
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
            source = record["source"] if form == "think" else f"{record['source']}:{form}"
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
) -> dict:
    """One row of the result file: the scores of a record's n replies; with `store` also what the report shows of it.

    texts, lengths, finished: one a reply. Paths in the row are relative to `folder`. score: rewards.score, or a
    Scorer's.
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
    }
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
    if result["gf"]:
        print(gains_line(result["gf"]))


def result_table(result: dict) -> str:
    """The terminal's table: a line a source, then overall."""
    groups = dict(result["sources"])
    if len(groups) > 1:
        groups["overall"] = result["overall"]
    passes = [key for key in result["overall"] if key.startswith("pass@")]
    if len(passes) == 1:  # one reply a question: pass@1 says what accuracy says
        passes = []

    groups = {report.visible_name(name): values for name, values in groups.items()}
    width = max(len(name) for name in [*groups, "source"])
    titles = ("n", "accuracy", "format", "reward", "unparsed", "truncated", "length", *passes)
    lines = [f"{'source':{width}}" + "".join(f"{title:>10}" for title in titles)]
    for name, values in groups.items():
        line = f"{name:{width}}{values['n']:10d}"
        line += f"{100 * values['accuracy']:9.1f}%{100 * values['format']:9.1f}%{values['reward']:10.3f}"
        line += f"{values['unparsed']:10d}{values['truncated']:10d}{values['length']:10.1f}"
        line += "".join(f"{100 * values[key]:9.1f}%" for key in passes)
        lines.append(line)
    return "\n".join(lines)


def gains_line(gains: dict) -> str:
    """The terminal's line about what `format_gains` returned."""
    factor = "not defined (a gain is negative)" if gains["gf"] is None else f"{gains['gf']:.1f}"
    text = f"gain ID {gains['gain_id']:+.1f}, gain OOD {gains['gain_ood']:+.1f}, GF {factor}"
    return f"format against the baseline, in percentage points: {text} (beta {gains['beta']:g})"


# ---------------------------------------------------------------------------------------------------------------------
# Command line

# What the numbers depend on besides the model and the files: stored with them.
SETTINGS = ("samples", "temperature", "top_k", "top_p", "max_new_tokens", "limit")
SETTINGS += ("max_pixels", "seed", "dtype", "attn", "sampler")
# What is made of the replies, not how they are sampled: a resumed job may change it.
LATER = ("baseline", "ood_weights", "keep_replies")


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

    vllm_sampler.add_sampler_flags(parser)
    training.add_model_flags(parser)

    add = parser.add_argument_group("report").add_argument
    add("--report", type=Path, metavar="FILE.html", help="write a page; no model is run")
    report.add_report_flags(add)
    # fmt: on
    args = parser.parse_args(argv)
    if args.report:
        if args.model or args.out:
            parser.error("--report runs no model: leave --model and --out away")
        report.check_report_flags(parser, args)
        return args
    if not args.model or not args.out or not args.data + args.id + args.ood:
        parser.error("--model, --out and at least one of --data, --id, --ood are needed (or --report)")
    if args.runs or args.results or args.table:
        parser.error("--runs, --results and --table belong to --report")
    if set(map(os.path.abspath, args.id)) & set(map(os.path.abspath, args.ood)):
        parser.error("a file cannot be both --id and --ood")
    if (args.baseline or args.ood_weights) and not (args.id and args.ood):
        parser.error("--baseline and --ood-weights need --id and --ood")
    if args.ood_weights and not args.baseline:
        parser.error("--ood-weights needs --baseline")
    if args.samples > 1 and args.temperature == 0:
        parser.error("--samples above 1 needs --temperature above 0: greedy replies are all the same")
    return args


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.report:
        report.write_report(args.report, dict(args.runs), dict(args.results), args.table)
        return
    world = training.setup(args.timeout)

    # 1 read: what is wrong with the input is found here, before the model is loaded
    files = {"data": args.data, "id": args.id, "ood": args.ood}
    records = read_files(files, args.limit, args.skip_bad, args.max_image_pixels)
    folder = args.out.absolute().parent
    before = read_baseline(args.baseline, records, folder) if args.baseline else None
    weights = dict(args.ood_weights) if args.ood_weights else None
    if weights:
        check_weights(weights, records)
    journal = Journal.open(
        vars(args),
        world,
        inputs={"data": args.data, "id": args.id, "ood": args.ood, "baseline": [args.baseline] if before else []},
        models={"model": args.model},
        pictures=[image for record in records for image in record["images"]],
        later=LATER,
    )
    result = finished_result(args.out, journal.fingerprint) if args.resume else None
    with journal:
        if result is None:
            # 2 sample: each process its share of what no earlier start has sampled
            sample_missing(args, world, records, journal)
            # 3 score: as in training, then every process gets every row
            rows = score_all(args, world, records, journal)
            # 4 record: one process prints and writes
            result = {
                "model": args.model,
                "files": files_by_role(rows),
                "args": {name: getattr(args, name) for name in SETTINGS},
                **summarise(rows),
                "gf": format_gains(rows, before, weights) if before else None,
                "fingerprint": journal.fingerprint,
                "rows": rows,
            }
            if result["gf"]:
                result["gf"]["baseline"] = os.path.relpath(args.baseline, folder)
            if world.main:
                journal.finish(result_text(result))
        elif world.main:
            print(f"{args.out}: is finished already")
            journal.drop()
    if world.main:
        print_result(result)


def sample_missing(args: argparse.Namespace, world: training.World, records: list[dict], journal: Journal) -> None:
    """Phase 2 of main: the replies that the journal lacks. No model is loaded when it lacks none."""
    if not journal.missing("replies", len(records)):
        return
    # A whole copy of the model in every process: nothing is trained, so nothing is sharded.
    policy, encoder = model.load(
        args.model, world, dtype=args.dtype, attn=args.attn, max_pixels=args.max_pixels,
        max_image_pixels=args.max_image_pixels,
    )  # fmt: skip
    mine = journal.mine("replies", len(records))
    sample = sampler.sample
    if args.sampler == "vllm":
        sample = vllm_sampler.VLLM(
            args.model,
            policy.requires_grad_(False),
            encoder,
            world,
            [records[index] for index in mine],
            max_new_tokens=args.max_new_tokens,
            memory=args.vllm_memory,
            seed=args.seed,
        )
    for start in tqdm(range(0, len(mine), args.batch), desc="eval", disable=None if world.main else True):
        batch = mine[start : start + args.batch]
        groups = sample(
            policy,
            encoder.prompts([records[index] for index in batch]),
            args.samples,
            # A function of the record's index alone: batches, processes and restarts change no reply.
            seeds=[args.seed * 1_000_003 + index for index in batch],
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            max_new_tokens=args.max_new_tokens,
        )
        items = {}
        for index, group in zip(batch, groups, strict=True):
            items[index] = {
                "texts": [encoder.decode(reply.ids) for reply in group],
                "lengths": [len(reply.ids) for reply in group],
                "finished": [bool(reply.finished) for reply in group],
            }
        journal.add("replies", items)


def score_all(args: argparse.Namespace, world: training.World, records: list[dict], journal: Journal) -> list[dict]:
    """Phase 3 of main: the rows of all records, in their order, on every process."""
    world.barrier()  # until every process has added its last batch
    items = journal.items("replies")
    stored = first_of_each_source(records, args.keep_replies)
    folder = args.out.absolute().parent
    scorer = scoring.Scorer()
    scored = {}  # index of a record -> its row
    for index in range(world.rank, len(records), world.size):
        item = items[index]
        replies = item["texts"], item["lengths"], item["finished"]
        scored[index] = score_row(records[index], *replies, index in stored, folder, scorer.score)
    everyone = {index: row for part in world.gather(scored) for index, row in part.items()}
    return [everyone[index] for index in range(len(records))]


if __name__ == "__main__":
    training.run(main)
