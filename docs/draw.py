"""Draws the pictures of docs/learn.md into docs/figures/: `python docs/draw.py [FOLDER]`.

    attention.svg   the packed row and who attends to whom, asked of model.pack and attention.Layout themselves
    step.svg        one step of grpo.py on two ranks
    pair.svg        a DPO pair as a group of two

The same versions of Python and matplotlib draw the same bytes; tests/test_learn.py looks. Colours are from the palette
of Okabe and Ito, which colour-blind readers can tell apart.
"""

import sys
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure  # without pyplot: no window, no state
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import model  # noqa: E402

BLUE, SKY, ORANGE, GREY, INK = "#0072B2", "#9ED2F2", "#E69F00", "#EEEEEE", "#222222"

# No date and no random ids: equal pictures are equal files.
STYLE = {
    "svg.hashsalt": "vlm-rl",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 17,
    "text.color": INK,
}


# ---------------------------------------------------------------------------------------------------------------------
# Who attends to whom

PROMPTS = (4, 3)  # tokens of each prompt
REPLIES = ((4, 3), (3, 5))  # tokens of the replies to each, end tokens included


def example_groups() -> list[tuple[model.Prompt, list[torch.Tensor]]]:
    """The groups of the picture, as model.pack takes them. Their tokens are arbitrary."""
    groups = []
    for length, replies in zip(PROMPTS, REPLIES, strict=True):
        ids = torch.arange(length)
        prompt = model.Prompt(ids, ids[None], length, None, None, [])
        groups.append((prompt, [torch.arange(size) for size in replies]))
    return groups


def who_attends_to_whom() -> tuple[torch.Tensor, list[tuple[str, int]]]:
    """((L, L) bool: does token i of the packed row attend to token j, [(name, tokens) of each segment]).

    Found out, not assumed: all scores are 0 and token j's value is the j-th unit vector, so that what a token gets is
    the mean of those it attends to.
    """
    layout = model.pack(example_groups()).layout
    length = sum(layout.prompts.lengths) + sum(layout.replies.lengths)
    zeros = torch.zeros(length, 1, length)
    values = torch.eye(length)[:, None]
    received = layout.attend(0, zeros, zeros, values, 1.0)[:, 0]
    prompts = [(f"prompt {i}", size) for i, size in enumerate(layout.prompts.lengths, 1)]
    replies = [(f"reply {i}", size) for i, size in enumerate(layout.replies.lengths, 1)]
    return received > 0, prompts + replies


def draw_attention(path: Path) -> None:
    seen, segments = who_attends_to_whom()
    length, prompt_tokens = len(seen), sum(PROMPTS)
    # 0 nothing, 1 a prompt and itself, 2 a reply and its prompt, 3 a reply and itself
    kind = seen.int()
    kind[prompt_tokens:, :prompt_tokens] *= 2
    kind[prompt_tokens:, prompt_tokens:] *= 3

    figure = Figure(figsize=(11.5, 9.2))
    axes = figure.subplots()
    axes.imshow(kind, cmap=ListedColormap([GREY, BLUE, SKY, ORANGE]), vmin=0, vmax=3)
    for edge in range(length + 1):
        axes.axhline(edge - 0.5, color="white", linewidth=1.5)
        axes.axvline(edge - 0.5, color="white", linewidth=1.5)

    begin, middles = 0, []
    for _, size in segments:
        middles.append(begin + (size - 1) / 2)
        begin += size
        if begin < length:
            axes.axhline(begin - 0.5, color=INK, linewidth=1.5)
            axes.axvline(begin - 0.5, color=INK, linewidth=1.5)
    names = [name for name, _ in segments]
    axes.set_xticks(middles, names, rotation=35, ha="left", rotation_mode="anchor")
    axes.set_yticks(middles, names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("a token here …", fontsize=19)
    axes.set_xlabel("… attends to the tokens here", fontsize=19)

    meaning = {BLUE: "a prompt to itself", SKY: "a reply to its prompt", ORANGE: "a reply to itself", GREY: "never"}
    handles = [Patch(color=colour, label=text) for colour, text in meaning.items()]
    axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=17)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Boxes and arrows


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture, a unit an inch, y upwards."""
    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def box(axes: Axes, x, y, width, height, text: str, colour: str = GREY, size: float = 16) -> None:
    """A rounded box of width and height, its lower left corner at (x, y) inches, with text in the middle."""
    dark = colour == BLUE
    axes.add_patch(FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", facecolor=colour, edgecolor=INK, linewidth=1.2
    ))  # fmt: skip
    axes.text(
        x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color="white" if dark else INK
    )


def titled_box(axes: Axes, x, y, width, height, title: str, text: str, colour: str = GREY) -> None:
    """A box with a title in bold and some lines of text below it."""
    box(axes, x, y, width, height, "", colour)
    middle = x + width / 2, y + height / 2
    lines = text.count("\n") + 1
    above = 0.15 * lines + 0.12
    axes.text(middle[0], middle[1] + above, title, ha="center", va="center", fontsize=16.5, fontweight="bold")
    axes.text(middle[0], middle[1] - 0.2, text, ha="center", va="center", fontsize=16)


def arrow(axes: Axes, start: tuple, end: tuple) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=18, color=INK, linewidth=1.6))


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight", pad_inches=0.15, facecolor="white")


# ---------------------------------------------------------------------------------------------------------------------
# A step of GRPO on two ranks


def draw_step(path: Path) -> None:
    figure, axes = canvas(15.4, 6.2)
    width, height = 2.05, 2.3
    lanes = {"rank 0": 3.55, "rank 1": 0.85}
    columns = [0.7, 3.1, 5.5, 7.9, 10.3, 12.7]
    alone = {
        0: ("sample", "G replies to\nprompts\n{}"),
        1: ("score", "rules read\nthe replies"),
        3: ("micro-batches", "useful groups,\nsorted by size"),
        4: ("backward", "gradients of\nmicro-batches\nadd up"),
    }
    for name, bottom in lanes.items():
        middle = bottom + height / 2
        axes.text(0.25, middle, name, fontsize=20, fontweight="bold", ha="center", va="center", rotation=90)
        mine = "0, 2, 4, …" if name == "rank 0" else "1, 3, 5, …"
        for number, (title, text) in alone.items():
            titled_box(axes, columns[number], bottom, width, height, title, text.format(mine))
        for left, right in zip(columns, columns[1:], strict=False):
            arrow(axes, (left + width, middle), (right, middle))

    # What all ranks do together
    bottom, tall = lanes["rank 1"], lanes["rank 0"] + height - lanes["rank 1"]
    advantages = "all P · G\nrewards reach\nevery rank,\nwhich computes\nadvantages"
    titled_box(axes, columns[2], bottom, width, tall, "gather", advantages, ORANGE)
    update = "average the\ngradients after\nthe last\nmicro-batch;\nclip the norm;\nAdamW, each\nrank on its\nshards"
    titled_box(axes, columns[5], bottom, width, tall, "sync, update", update, ORANGE)

    meaning = "grey: each rank by itself        orange: all ranks together"
    axes.text(7.7, 0.3, meaning, ha="center", va="center", fontsize=18)
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# A DPO pair


def draw_pair(path: Path) -> None:
    figure, axes = canvas(14.6, 6.3)
    top = 4.9
    axes.text(0.1, top + 0.45, "one row", fontsize=19, fontweight="bold", va="center")
    parts = [(1.9, 4.4, "prompt and pictures, once", BLUE), (6.3, 3.4, "chosen", ORANGE), (9.7, 4.2, "rejected", SKY)]
    for x, width, text, colour in parts:
        axes.add_patch(Rectangle((x, top), width, 0.9, facecolor=colour, edgecolor=INK, linewidth=1.2))
        axes.text(
            x + width / 2, top + 0.45, text, ha="center", va="center", fontsize=18,
            color="white" if colour == BLUE else INK,
        )  # fmt: skip

    columns = [(6.1, "$y_w$", ORANGE), (10.1, "$y_l$", SKY)]
    for x, symbol, colour in columns:
        middle = x + 1.7
        box(axes, x, 3.1, 3.4, 0.95, rf"$\log\,\pi$({symbol}$\,|\,x$)", colour, 19)
        box(axes, x, 1.85, 3.4, 0.95, rf"$-\,\log\,\pi_{{\rm ref}}$({symbol}$\,|\,x$)", GREY, 19)
        arrow(axes, (middle, top), (middle, 4.05))
        arrow(axes, (middle, 1.85), (middle, 1.3))
    axes.text(5.8, 3.57, "policy: this forward", ha="right", va="center", fontsize=17)
    axes.text(5.8, 2.32, "reference: computed once,\nbefore training", ha="right", va="center", fontsize=17)
    box(axes, 6.1, 0.3, 7.4, 1.0, r"margin $=\beta\,$(left $-$ right)      loss $=-\log\,\sigma\,$(margin)", GREY, 19)
    axes.text(5.8, 0.8, "how much further the two\nhave moved apart", ha="right", va="center", fontsize=17)
    save(figure, path)


PICTURES = {"attention.svg": draw_attention, "step.svg": draw_step, "pair.svg": draw_pair}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        for name, draw in PICTURES.items():
            draw(folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs/figures")
