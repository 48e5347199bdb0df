"""Prints how the labelled answers are judged, class by class, as Markdown, and keeps the table in docs/answers.md.

    python bench/labelled.py            # print the tables
    python bench/labelled.py --write    # and put them between the markers of docs/answers.md
    python bench/labelled.py --check    # exit 1 if docs/answers.md does not say what the code does

The answers are tests/data/labelled_answers.jsonl and golds.jsonl; the counts of the search for an expression that is
right for two golds are bench/results/search_math.json (tests/search_math.py writes it).
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import rewards  # noqa: E402
from bench import pages  # noqa: E402

DATA = ROOT / "tests" / "data"
PAGE = ROOT / "docs" / "answers.md"


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers_table() -> list[str]:
    """Right answers that earn their share, wrong ones that earn nothing, per class. A partly right grid is right."""
    counts = defaultdict(lambda: [0, 0, 0, 0])  # class -> right, refused, wrong, accepted
    for row in rows_of(DATA / "labelled_answers.jsonl"):
        reply = f"<think>R</think><answer>{row['text']}</answer>"
        accuracy = rewards.score(reply, {**row, "think": True})["accuracy"]
        due = float(row["right"])
        for name in (row["class"], "all"):
            count = counts[name]
            count[0] += due > 0
            count[1] += due > 0 and accuracy < due - 1e-9
            count[2] += due == 0
            count[3] += accuracy > due + 1e-9

    lines = ["| answers | right | of them refused | wrong | accepted |", "|---|---|---|---|---|"]
    for name in (*sorted(set(counts) - {"all"}), "all"):
        right, refused, wrong, accepted = counts[name]
        lines.append(f"| {name} | {right:,} | {refused} | {wrong:,} | {accepted} |")
    return lines


def golds_table() -> list[str]:
    counts = defaultdict(lambda: [0, 0, 0, 0])  # type -> scorable, accepted, not scorable, refused
    for row in rows_of(DATA / "golds.jsonl"):
        try:
            rewards.check_gold(row)
            accepted = True
        except ValueError:
            accepted = False
        count = counts[row["answer_type"]]
        first = 0 if row["scorable"] else 2
        count[first] += 1
        count[first + 1] += accepted == row["scorable"]

    lines = ["| golds | can be scored | of them accepted | cannot be scored | refused |", "|---|---|---|---|---|"]
    for name, (scorable, accepted, other, refused) in counts.items():
        lines.append(f"| {name} | {scorable} | {accepted} | {other} | {refused} |")
    return lines


UNIT_GOLDS = ["5", "5 cm", r"5 \text{ cm}^2", r"5\%", r"\$5", r"5^\circ", "5 apples"]
UNIT_REPLIES = ["5", "5 cm", "5 m", "5 cm²", r"5\%", r"\$5", "5°", "5 apples"]


def units_table() -> list[str]:
    """Which reply is right for which gold, of the number 5 with and without units."""
    lines = ["| gold | " + " | ".join(f"`{reply}`" for reply in UNIT_REPLIES) + " |"]
    lines.append("|---" * (len(UNIT_REPLIES) + 1) + "|")
    for gold in UNIT_GOLDS:
        record = {"answer_type": "math", "answer": gold, "think": True}
        cells = []
        for reply in UNIT_REPLIES:
            score = rewards.score(f"<think>R</think><answer>{reply}</answer>", record)
            cells.append("right" if score["accuracy"] else "–")
        lines.append(f"| `{gold}` | " + " | ".join(cells) + " |")
    return lines


def search_table() -> list[str]:
    path = ROOT / "bench" / "results" / "search_math.json"
    if not path.exists():
        return ["The search has not been run: `python tests/search_math.py --out bench/results/search_math.json`."]
    found = json.loads(path.read_text(encoding="utf-8"))
    return [
        f"| search (seed {found['seed']}, at `{found['commit'][:7]}`) | count |",
        "|---|---|",
        f"| expressions, all different | {found['expressions']:,} |",
        f"| golds, pairwise unequal | {found['golds']} |",
        f"| expressions with a value | {found['readable']:,} |",
        f"| right for exactly one gold | {found['right for one gold']:,} |",
        f"| right for two golds or more | {len(found['right for two golds'])} |",
        f"| slowest, against all golds (ms) | {found['slowest expression, ms, against all golds']} |",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/answers.md")
    parser.add_argument("--check", action="store_true", help="exit 1 if docs/answers.md has other tables")
    args = parser.parse_args()

    tables = "\n\n".join("\n".join(lines) for lines in (answers_table(), golds_table(), units_table(), search_table()))
    print(tables)
    page = PAGE.read_text(encoding="utf-8")
    blocks = {"labelled": f"\n{tables}\n"}  # a blank line before the tables and one after them
    rebuilt = pages.rebuilt(page, blocks, "bench/labelled.py", PAGE.name, each_once=True)
    if args.write:
        PAGE.write_text(rebuilt, encoding="utf-8")
    if args.check and rebuilt != page:
        sys.exit("docs/answers.md is not what the code does: python bench/labelled.py --write")


if __name__ == "__main__":
    main()
