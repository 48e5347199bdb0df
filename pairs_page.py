"""Preference pairs to look at: what they are in numbers, and a part of a page on which they can be read.

    python report.py --out pairs.html --pairs pairs.jsonl

Chosen and rejected stand side by side, and the characters that only one of them has are marked. Lengths and edit
distances are characters. The kind of a pair is the name of its corruption, or what it has instead of one.
"""

from itertools import groupby
from pathlib import Path
from statistics import fmean

from rapidfuzz.distance import Levenshtein

import html_page
from files import DataError
from html_page import escape, visible_name
from records import read_jsonl

MOST_KINDS = 12  # that have a button and cards of their own
TEXT_CHARACTERS = 3000  # of a reply that are shown
COMPARED_CHARACTERS = 2**16  # of a reply that are counted for the distance: its time grows with their square

WORDS = """Each pair is a question and two replies to it: the one that a model is taught to prefer, and the one that it
is taught to leave. What only one of the two has is marked; ⏎ is a line break among it. The table counts all pairs.
Below it are the first of each kind; nobody picked them."""
STYLE = """
.pairs > input { margin: .2rem .2rem .2rem .8rem; }
.pairs label { cursor: pointer; overflow-wrap: anywhere; }
.replies { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 .8rem; }
@media (min-width: 48rem) { .replies { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); } }
.right mark { background: #b9e5d6; } .wrong mark { background: #f6cfb0; }
""" + "".join(
    # A filter without a script: a button hides what is not of its kind.
    f".pairs > .show-{kind}:checked ~ .puzzle:not(.kind-{kind}) {{ display: none; }}\n"
    for kind in range(MOST_KINDS)
)

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_pairs(path: str | Path) -> list[dict]:
    """The pairs of a file, paths of pictures made absolute. DataError names file, line and cause.

    A picture that is gone stops nobody: the page says so.
    """
    pairs = []
    for number, pair in read_jsonl(path):
        problem = problem_with_pair(pair)
        if problem:
            raise DataError(f"{path}:{number}: {problem}")
        pair["images"] = [str(Path(path).absolute().parent / name) for name in pair["images"]]
        pairs.append(pair)
    if not pairs:
        raise DataError(f"{path}: no pairs")
    return pairs


def problem_with_pair(pair: dict) -> str | None:
    """What keeps an object from being a pair that can be shown, or None."""
    for name in ("id", "prompt", "chosen"):
        if not isinstance(pair.get(name), str):
            return f'the field "{name}" must be text'
    for name in ("rejected", "corruption"):
        if not isinstance(pair.get(name), str | None):
            return f'the field "{name}" must be text or null'
    images = pair.get("images")
    if not isinstance(images, list) or not all(isinstance(name, str) and "\0" not in name for name in images):
        return '"images" must be a list of paths'
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def edit_distance(one: str, other: str) -> int:
    """Levenshtein distance: how many characters must be put in, taken out or replaced to make one text the other.

    Of texts longer than COMPARED_CHARACTERS, which no reply of 10,000 tokens is, the distance of their beginnings.
    """
    return Levenshtein.distance(one[:COMPARED_CHARACTERS], other[:COMPARED_CHARACTERS])


def kind_of(pair: dict) -> str:
    """The name of a pair's corruption; pairs without one are malformed already, or have no rejected reply (SFT)."""
    if pair.get("rejected") is None:
        return "no rejected reply"
    return pair.get("corruption") or "malformed already"


def by_kind(pairs: list[dict]) -> dict[str, list[dict]]:
    """{kind: its pairs}, the most frequent first."""
    kinds = {}
    for pair in pairs:
        kinds.setdefault(kind_of(pair), []).append(pair)
    return dict(sorted(kinds.items(), key=lambda item: -len(item[1])))


def statistics_table(pairs: list[dict]) -> list[list[str]]:
    """A line a kind, and one for all: how many pairs, mean lengths of both replies, mean edit distance between them."""
    lines = [["corruption", "pairs", "share", "chosen characters", "rejected characters", "edit distance"]]
    measured = {}  # kind -> (chosen, rejected, distance) of each of its pairs; the last two None without a rejected one
    for name, group in by_kind(pairs).items():
        measured[name] = [measure(pair) for pair in group]
    measured["all"] = [lengths for group in measured.values() for lengths in group]
    for name, group in measured.items():
        line = [name, str(len(group)), f"{100 * len(group) / len(pairs):.1f} %"]
        for column in zip(*group, strict=True):
            there = [value for value in column if value is not None]
            line.append(f"{fmean(there):.1f}" if there else "–")
        lines.append(line)
    return lines


def measure(pair: dict) -> tuple[int, int | None, int | None]:
    """Characters of chosen and of rejected, and the distance between them."""
    chosen, rejected = pair["chosen"], pair.get("rejected")
    if rejected is None:
        return len(chosen), None, None
    return len(chosen), len(rejected), edit_distance(chosen, rejected)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def marked(one: str, other: str) -> tuple[str, str]:
    """Two texts as HTML, in each the characters marked that the other has not (by the shortest edit)."""
    left, right = "", ""
    # What is taken out, put in or replaced side by side is one mark.
    for equal, group in groupby(Levenshtein.opcodes(one, other), key=lambda step: step.tag == "equal"):
        steps = list(group)
        left += marked_part(one[steps[0].src_start : steps[-1].src_end], equal)
        right += marked_part(other[steps[0].dest_start : steps[-1].dest_end], equal)
    return left, right


def marked_part(text: str, equal: bool) -> str:
    """One stretch of `marked`. equal: both texts have it."""
    if equal or not text:
        return escape(text, len(text))
    # A line break alone would be a mark that nobody sees.
    shown = escape(text, len(text)).replace("\n", "⏎\n")
    return f"<mark>{shown}</mark>"


def pair_html(pair: dict, kind: int) -> str:
    """One card: pictures, question, and both replies side by side. kind: the number of the pair's kind."""
    texts = [pair["chosen"], pair.get("rejected") or ""]
    shown = marked(*(text[:TEXT_CHARACTERS] for text in texts))
    sides = ""
    for name, colour, text, html in zip(("chosen", "rejected"), ("right", "wrong"), texts, shown, strict=True):
        if pair.get(name) is None:
            continue
        more = len(text) - TEXT_CHARACTERS
        note = f" … ({more} more characters)" if more > 0 else ""
        origin = f", from {escape(pair[f'{name}_from'])}" if pair.get(f"{name}_from") else ""
        sides += f'<div><div class="stage"><strong>{name}</strong>{origin}: {len(text)} characters</div>'
        sides += f'<pre class="{colour}">{html}{note}</pre></div>'
    distance = ""
    if pair.get("rejected") is not None:
        distance = f" · edit distance {edit_distance(*texts)}"
    return (
        f'<article class="puzzle kind-{kind}"><div>{html_page.pictures_html(pair)}</div><div><div class="stage">'
        f"<strong>{escape(kind_of(pair))}</strong> · {escape(pair['id'])} · gold answer "
        f"“{escape(pair.get('answer'))}”{distance}</div>"
        f"<details><summary>The question</summary><pre>{escape(pair['prompt'])}</pre></details>"
        f'<div class="replies">{sides}</div></div></article>'
    )


def pairs_html(files: dict[str, list[dict]], keep: int) -> str:
    """A part of a page for each file of pairs: {name: pairs}. keep: pairs shown of each kind."""
    return "".join(
        f"<h3>{escape(visible_name(name))}</h3>{file_html(pairs, keep, number)}"
        for number, (name, pairs) in enumerate(files.items())
    )


def file_html(pairs: list[dict], keep: int, number: int) -> str:
    """The table of one file, a button a kind, and the cards of the first `keep` pairs of each."""
    kinds = by_kind(pairs)
    shown = dict(list(kinds.items())[:MOST_KINDS])
    buttons = button(number, "all", f"all ({len(pairs)})", " checked")
    cards = ""
    for kind, (name, group) in enumerate(shown.items()):
        buttons += button(number, kind, f"{visible_name(name)} ({len(group)})")
        cards += "".join(pair_html(pair, kind) for pair in group[:keep])
    note = f"<p>{len(kinds) - len(shown)} more kinds are left out.</p>" if len(kinds) > len(shown) else ""
    table = statistics_table(pairs)
    table = table[: MOST_KINDS + 1] + table[-1:] if note else table
    return f'{html_page.table_html(table)}{note}<div class="pairs">{buttons}{cards}</div>'


def button(number: int, kind: int | str, label: str, checked: str = "") -> str:
    """A radio button of file `number` that shows the cards of one kind only."""
    name = f"pairs-{number}"
    return (
        f'<input type="radio" name="{name}" id="{name}-{kind}" class="show-{kind}"{checked}>'
        f'<label for="{name}-{kind}"> {escape(label)}</label>'
    )
