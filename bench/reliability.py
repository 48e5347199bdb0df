"""Rebuild the tables of docs/reliability.md from the logs in bench/results/.

    python bench/reliability.py             # rewrite the page's block
    python bench/reliability.py --check     # exit 1 if the page does not say what the logs say
    python bench/reliability.py --count     # count the tests' damaged inputs and the planted bugs of this commit first

What is tried, and by whom: chaos.jsonl (make chaos), fuzz.json and exploits.json (the rewards), search_math.json
(tests/search_math.py), bugs.json (tests/plant_bugs.py --log), counts.json (--count). A log that is not there is a row
that says "not run".
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import pages  # noqa: E402

RESULTS = ROOT / "bench" / "results"
PAGE = ROOT / "docs" / "reliability.md"
NOT_RUN = "not run"

# Test files whose tables are of damaged or hostile inputs, and what each is called on the page.
INPUTS = {
    "test_files": "files: pipes, devices, links, bytes that are no text",
    "test_run_directory": "run directories and checkpoints",
    "test_journal": "half-finished results and pairs",
    "test_records": "records",
    "test_hostile_records": "records meant to do harm",
    "test_pictures": "pictures",
    "test_model_directories": "model directories",
    "test_flags": "flags",
    "test_report_inputs": "logs and results given to the report",
}
# The page's words for kinds of fault: the first whose beginning fits.
KINDS = {
    "SIGKILL": "killed (SIGKILL)",
    "SIGSTOP": "stopped for up to two seconds (SIGSTOP, SIGCONT)",
    "SIG": "asked to stop (SIGTERM, SIGINT, SIGUSR1; once or twice)",
    "disk full": "disk full",
    "two processes": "a second process in the same directory",
    "data changed": "data changed before `--resume`",
    "": "a file of the run damaged",
}

# ---------------------------------------------------------------------------------------------------------------------
# Logs


def read_log(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.exists() else None


def read_faults() -> list[dict]:
    """The lines of chaos.jsonl, of any number of runs, without faults that came too late to disturb anything."""
    path = RESULTS / "chaos.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [fault for fault in map(json.loads, lines) if not too_late(fault)]


def too_late(fault: dict) -> bool:
    """Whether the run went on to its end: it had ended before, or was asked to stop in its last step."""
    undisturbed = fault["outcome"].startswith(("too late", "status 0"))
    return undisturbed and not fault["fault"].startswith("SIGSTOP")


def commits_of(rows: list[dict]) -> str:
    return ", ".join(f"`{commit}`" for commit in dict.fromkeys(row["commit"] for row in rows))


def row(*cells) -> str:
    return "| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in cells) + " |"


def rule(columns: int) -> str:
    return "|---" * columns + "|"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def kind_of(fault: str) -> str:
    return next(words for beginning, words in KINDS.items() if fault.startswith(beginning))


def chaos_tables(faults: list[dict]) -> list[str]:
    """Two tables: faults by kind, and by stage and number of processes."""
    if not faults:
        return [f"Runs that were broken: {NOT_RUN} (`make chaos`)."]
    kills = sum(fault["kills"] for fault in faults)
    lost = [fault for fault in faults if not fault["survived"]]
    lines = [
        f"{len(faults)} faults in real runs, {kills} processes killed, {len(lost)} not survived; commit "
        f"{commits_of(faults)}.",
        "",
    ]
    lines += [row("fault", "tried", "processes killed", "not survived"), rule(4)]
    for words in KINDS.values():
        lines.append(row(words, *totals([fault for fault in faults if kind_of(fault["fault"]) == words])))
    lines += ["", row("run", "tried", "processes killed", "not survived"), rule(4)]
    for stage, world in sorted({(fault["stage"], fault["world"]) for fault in faults}):
        chosen = [fault for fault in faults if (fault["stage"], fault["world"]) == (stage, world)]
        lines.append(row(f"{stage}, {processes(world)}", *totals(chosen)))
    for fault in lost:
        name = f"{fault['stage']}, {processes(fault['world'])}, {fault['fault']}"
        what = " ".join(fault["outcome"].removeprefix("NOT SURVIVED: ").split()).replace("|", "/")[:160]
        lines += ["", f"Not survived: {name} (`--seed {fault['seed']} --only {fault['number']}`): {what}"]
    return lines


def processes(world: int) -> str:
    return "1 process" if world == 1 else f"{world} processes"


def totals(faults: list[dict]) -> tuple:
    """Cells: tried, processes killed, not survived."""
    if not faults:
        return NOT_RUN, "–", "–"
    lost = sum(not fault["survived"] for fault in faults)
    return len(faults), sum(fault["kills"] for fault in faults), lost


def input_rows() -> list[str]:
    """Cases of the tests' own tables, and what was made at random."""
    counts = read_log("counts.json")
    rows = []
    for name, words in INPUTS.items():
        tried = counts["cases"].get(name, NOT_RUN) if counts else NOT_RUN
        source = f"`tests/{name}.py`" if tried != NOT_RUN else "–"
        rows.append(row(words, tried, source, f"`{counts['commit']}`" if counts else "–"))

    fuzz = read_log("fuzz.json")
    if fuzz is None:
        rows.append(row("replies and answers made at random", NOT_RUN, "–", "–"))
    else:
        rows += fuzz_rows(fuzz)
    search = read_log("search_math.json")
    if search is None:
        rows.append(row("expressions compared with unequal golds", NOT_RUN, "–", "–"))
    else:
        right = len(search["right for two golds"])
        words = f"expressions compared with {search['golds']} unequal golds; right for two of them: {right}"
        rows.append(row(words, search["expressions"], "`tests/search_math.py`", f"`{search['commit'][:12]}`"))
    return rows


def fuzz_rows(fuzz: dict) -> list[str]:
    """What bench/fuzz.py made at random: how much, how slow the slowest was, and what went wrong."""
    tried = {
        "replies": sum(count for key, count in fuzz["replies"]["counts"].items() if key.endswith(": replies")),
        "mathematics": fuzz["mathematics"]["counts"]["expressions"],
    }
    words = {"replies": "random replies of all types and formats", "mathematics": "random mathematics"}
    rows = []
    for part, count in tried.items():
        slowest, flaws = fuzz[part]["slowest, ms"], len(fuzz[part]["flaws"])
        name = f"{words[part]}: flaws {flaws}, the slowest {slowest:.0f} ms"
        rows.append(row(name, count, "`bench/results/fuzz.json`", f"`{fuzz['commit'][:12]}`"))
    return rows


def exploit_rows() -> list[str]:
    log = read_log("exploits.json")
    if log is None:
        return [row("replies that know nothing of the gold", NOT_RUN, "–", "–")]
    paid = 0
    for entry in log["rows"]:
        paid += any(entry["best"][part] > entry["chance"][part] + 1e-9 for part in entry["chance"])
    words = f"replies that know nothing of the gold, in {len(log['rows'])} kinds of question and format"
    return [row(words, log["tried"], f"{paid} kinds pay more than the best constant guess", f"`{log['commit'][:12]}`")]


def bug_rows() -> list[str]:
    counts, log = read_log("counts.json"), read_log("bugs.json")
    rows = []
    if counts:
        rows.append(row("bugs that `tests/plant_bugs.py` can plant", counts["planted"], "–", f"`{counts['commit']}`"))
    if log is None:
        rows.append(row("all of them planted, one after the other", NOT_RUN, "–", "–"))
    else:
        caught = sum(bug["caught"] for bug in log["bugs"])
        missed = ", ".join(bug["name"] for bug in log["bugs"] if not bug["caught"]) or "none"
        rows.append(row("planted in one whole run", len(log["bugs"]), f"{caught} caught; missed: {missed}",
                        f"`{log['commit']}`"))  # fmt: skip
    return rows


def tables() -> str:
    lines = ["### Runs", "", *chaos_tables(read_faults())]
    lines += ["", "### Inputs", "", row("what", "cases", "from", "commit"), rule(4), *input_rows()]
    lines += ["", "### Exploits", "", row("what", "tried", "found", "commit"), rule(4), *exploit_rows()]
    lines += ["", "### Planted bugs", "", row("what", "bugs", "found", "commit"), rule(4), *bug_rows()]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# Counting


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def count() -> None:
    """Write counts.json: entries of plant_bugs.py, and cases of each test file of INPUTS that is there.

    A case is one entry of a table that a test is parametrised with; tests without a table are not counted.
    """
    present = [f"tests/{name}.py" for name in INPUTS if (ROOT / "tests" / f"{name}.py").exists()]
    # The project's own options would shorten the list to a number a file.
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--collect-only", "-q", *present]
    listed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    cases = dict.fromkeys((Path(name).stem for name in present), 0)
    for line in listed.splitlines():
        found = re.match(r"tests/(\w+)\.py::\w+\[", line)
        if found:
            cases[found[1]] += 1
    command = [sys.executable, "tests/plant_bugs.py", "--list"]
    listed = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout
    planted = len(listed.splitlines())
    text = json.dumps({"commit": commit(), "cases": cases, "planted": planted}, indent=1)
    (RESULTS / "counts.json").write_text(text + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def rebuilt(page: str) -> str:
    """The page with its block made anew."""
    return pages.rebuilt(page, {"reliability": tables}, "bench/reliability.py", PAGE.name, each_once=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not right")
    parser.add_argument("--count", action="store_true", help="count inputs and planted bugs again (half a minute)")
    args = parser.parse_args(argv)
    if args.count:
        count()
    page = PAGE.read_text()
    if args.check:
        return int(rebuilt(page) != page)
    PAGE.write_text(rebuilt(page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
