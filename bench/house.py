"""Measure how our files read, before and after the split of model.py, beside three small projects: docs/house.md.

    python bench/house.py             # measures the last commit and rewrites the tables of docs/house.md
    python bench/house.py --check     # exit 1 if the page does not say what the commits it names say

Both of our sides are commits, read with `git show`: the page names them, so a later edit makes no number false. The
others were measured once, by the same rules, and stand here as constants (OTHERS).

Legend: a line of code is a line that holds a token which is neither a comment nor part of a docstring; a token is one
of Python's own (names, numbers, strings, operators), docstrings not counted. Shares are of all lines of a file.
"""

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import pages  # noqa: E402

PAGE = ROOT / "docs" / "house.md"
BEFORE = "286ab61"
ORDER = (  # reading order; files that are not named here follow by name
    "grpo.py", "dpo.py", "rewards.py", "distill.py", "jigsaw.py", "eval.py", "report.py", "records.py", "training.py",
    "families.py", "attention.py", "encoder.py", "model.py", "sampler.py", "vllm_sampler.py",
)  # fmt: skip

# Measured in November 2026, on each project's main branch of that month.
# (name, lines, functions, longest function, flags, comments %, docstrings %, tokens a line of code)
OTHERS = (
    ("nanochat `chat_rl.py`", 326, 3, 61, "19", "25", "7", 8.9),
    ("nanochat `gpt.py`", 555, 25, 66, "7 fields", "20", "16", 11.6),
    ("CleanRL `ppo.py`", 312, 6, 16, "28 fields", "5.4", "0", 8.6),
    ("GRPO-Zero", 223, 4, 99, "24 keys", "3.1", "0.9", 7.3),
)

# ---------------------------------------------------------------------------------------------------------------------
# Measuring

LAYOUT = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER, tokenize.ENCODING}


@dataclass
class Measure:
    lines: int
    functions: int
    longest: int  # lines of the longest function
    flags: int
    comments: float  # share of all lines
    docstrings: float  # share of all lines
    tokens: float  # per line of code


def docstring_lines(tree: ast.AST) -> set[int]:
    """Line numbers that belong to a docstring."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            found.update(range(text.lineno, text.end_lineno + 1))
    return found


def measure(source: str) -> Measure:
    """How a file's text reads."""
    tree = ast.parse(source)
    total = len(source.splitlines())
    documented = docstring_lines(tree)

    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = [node.end_lineno - node.lineno + 1 for node in functions]

    comments, code, tokens = set(), set(), 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        line = token.start[0]
        if token.type == tokenize.COMMENT:
            comments.add(line)
        elif token.type not in LAYOUT and line not in documented:
            code.update(range(line, token.end[0] + 1))
            tokens += 1
    flags = re.findall(r"\badd(?:_argument)?\(\s*[\"']--[a-z]", source)
    return Measure(
        lines=total,
        functions=len(functions),
        longest=max(lengths, default=0),
        flags=len(flags),
        comments=len(comments) / total,
        docstrings=len(documented) / total,
        tokens=tokens / max(1, len(code)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Commits


def git(*words: str) -> str:
    """What git prints. subprocess.CalledProcessError when it fails, for a commit that is not here say."""
    command = ["git", "-C", str(ROOT), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure_commit(commit: str) -> dict[str, Measure]:
    """{file: its Measure} of the commit's Python files at the top level and in toy/, in reading order."""
    tracked = git("ls-tree", "--name-only", commit, ".", "toy/").split()
    names = [name for name in tracked if name.endswith(".py") and not name.endswith("__init__.py")]
    rank = {name: place for place, name in enumerate(ORDER)}
    names.sort(key=lambda name: (rank.get(name, len(rank)), name))
    return {name: measure(git("show", f"{commit}:{name}")) for name in names}


# ---------------------------------------------------------------------------------------------------------------------
# The page

HEADER = "| file | lines | functions | longest | flags | comments % | docstrings % | tokens a line |"


def row(name: str, *cells) -> str:
    return "| " + " | ".join([name, *map(str, cells)]) + " |"


def row_of(name: str, m: Measure) -> str:
    shares = f"{100 * m.comments:.1f}", f"{100 * m.docstrings:.1f}"
    return row(f"`{name}`", f"{m.lines:,}", m.functions, m.longest, m.flags or "–", *shares, f"{m.tokens:.1f}")


def summary(files: dict[str, Measure]) -> str:
    """The last row: sums of lines, functions and flags, the longest function, and means of the shares by lines."""
    measures = files.values()
    lines = sum(m.lines for m in measures)

    def mean(key):
        return sum(getattr(m, key) * m.lines for m in measures) / lines

    total = Measure(
        lines=lines,
        functions=sum(m.functions for m in measures),
        longest=max(m.longest for m in measures),
        flags=sum(m.flags for m in measures),
        comments=mean("comments"),
        docstrings=mean("docstrings"),
        tokens=mean("tokens"),
    )
    return row_of("x", total).replace("`x`", "all")


def tables(now: str) -> str:
    """The block of docs/house.md, as Markdown. now: a commit."""
    rule = "|---" * 8 + "|"
    lines = []
    for title, commit in (("Before", BEFORE), ("Now", now)):
        files = measure_commit(commit)
        lines += [f"{title}, commit {commit}:", "", HEADER, rule]
        lines += [row_of(name, m) for name, m in files.items()]
        lines += [summary(files), ""]
    lines += ["Others, measured by the same rules:", "", HEADER, rule]
    lines += [row(*other) for other in OTHERS]
    return "\n".join(lines)


def rebuilt(page: str, now: str) -> str:
    """The page with its block made anew for the commit `now`."""
    return pages.rebuilt(page, {"house": partial(tables, now)}, "bench/house.py", PAGE.name, each_once=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the page is not right")
    args = parser.parse_args(argv)
    page = PAGE.read_text()
    if args.check:
        now = re.search(r"^Now, commit (\w+):$", page, re.M)
        return int(now is None or rebuilt(page, now[1]) != page)
    if git("status", "--porcelain", "--", "*.py").strip():
        print("error: commit your Python files first: the table names the commit it measures", file=sys.stderr)
        return 2
    PAGE.write_text(rebuilt(page, git("rev-parse", "--short=7", "HEAD").strip()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
