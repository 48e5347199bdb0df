"""Our losses, answers and puzzles beside those of TRL, math-verify and Jigsaw-R1: where they agree, and where not.

    python bench/outside.py --folder DIR     # DIR holds checkouts named trl, Math-Verify, Jigsaw-R1; nothing is fetched
    python bench/outside.py --table          # puts the table of the kept numbers into docs/answers.md
    python bench/outside.py --check          # exit 1 if docs/answers.md has another table

A checkout that is not there is left out, and the table says so; TRL may also be the installed package. The numbers are
kept in bench/results/outside.json with the commits that were compared.

The others' functions are taken out of their files and run as they stand, without the trainers around them: that needs
none of their dependencies. It runs their code, as importing it would: only with checkouts you trust.

    TRL          `_compute_loss` of both trainers and the lines that make advantages: values and gradients
    math-verify  the cases of its own tests that state gold, reply and verdict
    Jigsaw-R1    its scores and formats of random replies, and which way round its permutations are
"""

import ast
import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import dpo  # noqa: E402
import grpo  # noqa: E402
import jigsaw  # noqa: E402
import rewards  # noqa: E402
from bench import pages  # noqa: E402
from records import DataError, write_text  # noqa: E402
from training import Parser, integer, run  # noqa: E402

RESULT = ROOT / "bench/results/outside.json"
PAGE = ROOT / "docs/answers.md"
# Largest difference of two numbers that count as equal, relative to the larger one or to 1. All is computed in fp64,
# but TRL's std passes through fp32.
CLOSE = 1e-6
SHOWN = 5  # disagreements of each class that are kept


class Tally:
    """How often two sides agree, class by class, with the first disagreements of each."""

    def __init__(self):
        self.tried, self.agreed, self.disagreements = Counter(), Counter(), {}

    def add(self, name: str, agree: bool, case: object) -> None:
        self.tried[name] += 1
        self.agreed[name] += agree
        found = self.disagreements.setdefault(name, [])
        if not agree and len(found) < SHOWN:
            found.append(case)

    def rows(self) -> dict[str, dict]:
        return {
            name: {"tried": self.tried[name], "agreed": self.agreed[name], "disagreements": self.disagreements[name]}
            for name in sorted(self.tried)
        }


# ---------------------------------------------------------------------------------------------------------------------
# Code of others


def checkout(folder: Path | None, name: str, package: str = "") -> Path | None:
    """Where a checkout lies, or an installed package; None if neither is there."""
    if folder and (folder / name).is_dir():
        return folder / name
    found = importlib.util.find_spec(package) if package else None
    return Path(found.origin).parent.parent if found and found.origin else None


def version_of(folder: Path) -> str:
    """The commit of a checkout; for an installed package its version."""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode == 0 and (folder / ".git").exists():
        return done.stdout.strip()
    installed = sorted(folder.glob("trl-*.dist-info"))
    return installed[0].name.removesuffix(".dist-info") if installed else "unknown"


def definitions(path: Path) -> Iterator[ast.FunctionDef]:
    """The functions and methods of a file, outermost ones only."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as Python ({type(error).__name__})") from None
    for node in tree.body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        yield from (part for part in inside if isinstance(part, ast.FunctionDef))


def take(path: Path, names: tuple[str, ...], known: dict) -> dict:
    """`known`, and beside it the functions of these names from a file, which see `known` and each other."""
    found = {node.name: node for node in definitions(path) if node.name in names}
    missing = [name for name in names if name not in found]
    if missing:
        raise DataError(f"{path}: has no function {', '.join(missing)}")
    for node in found.values():
        node.decorator_list, node.returns = [], None
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            argument.annotation = None  # it may name a type that is not imported here
    space = dict(known)
    run_nodes(list(found.values()), path, space)
    return space


def run_nodes(nodes: list[ast.stmt], path: Path, space: dict) -> None:
    module = ast.fix_missing_locations(ast.Module(nodes, []))
    exec(compile(module, str(path), "exec"), space)


# ---------------------------------------------------------------------------------------------------------------------
# TRL

# --normalizer and --ratio of grpo.py beside TRL's loss_type and importance_sampling_level.
GRPO_CASES = [
    ("sequence mean", "grpo", "sequence", "token", 0.0),
    ("sequence mean with KL", "grpo", "sequence", "token", 0.04),
    ("token mean", "bnpo", "token", "token", 0.0),
    ("DAPO", "dapo", "token", "token", 0.04),
    ("Dr. GRPO", "dr_grpo", "constant", "token", 0.0),
    ("GSPO", "grpo", "sequence", "sequence", 0.0),
    ("GSPO with KL", "grpo", "sequence", "sequence", 0.1),
]


class Settings(SimpleNamespace):
    """A trainer with these attributes; every other is None, so that what it switches is off."""

    def __getattr__(self, name):
        return None


class Metrics(dict):
    """What a trainer logs to: {"train": {name: list}}, of which we read nothing."""

    def __missing__(self, name):
        self[name] = Metrics() if name in ("train", "eval") else []
        return self[name]


def alone() -> Settings:
    """accelerate's Accelerator, of one process."""

    def same(tensor, reduction=""):
        return tensor

    return Settings(num_processes=1, device=torch.device("cpu"), gather=same, gather_for_metrics=same, reduce=same)


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    one, other = one.detach(), other.detach()
    scale = max(1.0, float(one.abs().max()), float(other.abs().max()))
    return one.shape == other.shape and float((one - other).abs().max()) <= CLOSE * scale


def gradient(loss: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def compare_trl(folder: Path, count: int, tally: Tally) -> None:
    trainer = folder / "trl/trainer"
    helpers = ("nanstd", "nanmin", "nanmax", "selective_log_softmax", "entropy_from_logits")
    space = take(trainer / "utils.py", helpers, {"torch": torch, "F": F, "math": __import__("math")})
    generator = torch.Generator().manual_seed(0)
    for scale in ("group", "none", "batch"):
        theirs = trl_advantages(trainer / "grpo_trainer.py", scale, space)
        for trial in range(count):
            compare_advantages(theirs, scale, trial, generator, tally)
    compute = take(trainer / "grpo_trainer.py", ("_compute_loss",), space)["_compute_loss"]
    for case in GRPO_CASES:
        for trial in range(count):
            compare_grpo(compute, case, trial, generator, tally)
    compute = take(trainer / "dpo_trainer.py", ("_compute_loss",), space)["_compute_loss"]
    for sft_weight in (0.0, 1.0):
        for trial in range(count):
            compare_dpo(compute, sft_weight, trial, generator, tally)


def trl_advantages(path: Path, scale: str, space: dict):
    """A function (P, G) rewards -> (P, G) advantages: the `if` of TRL's trainer that tells how rewards are joined."""
    branches = [
        node
        for function in definitions(path)
        if function.name == "_generate_and_score_completions"
        for node in ast.walk(function)
        if isinstance(node, ast.If) and "sum_then_normalize" in ast.unparse(node.test)
    ]
    if not branches:
        raise DataError(f"{path}: makes its advantages in another way than this script knows")

    def advantages(rewards):
        trainer = Settings(
            multi_objective_aggregation="sum_then_normalize", scale_rewards=scale, reward_weights=torch.ones(1)
        )
        values = {
            "self": trainer,
            "device": rewards.device,
            "num_generations": rewards.shape[1],
            "rewards_per_func": rewards.reshape(-1, 1),
            "unscorable_mask": torch.zeros(rewards.numel(), dtype=torch.bool),
        }
        inside = space | values
        run_nodes([branches[0]], path, inside)
        return inside["advantages"].view(rewards.shape)

    return advantages


def compare_advantages(theirs, scale, trial, generator, tally) -> None:
    prompts, group = 1 + trial % 5, 2 + trial % 7
    rewards = torch.rand(prompts, group, generator=generator, dtype=torch.float64)
    if trial % 3 == 0:
        rewards = (rewards > 0.5).double() * 1.5  # right or wrong, so that some groups are all alike
    ours = grpo.group_advantages(rewards, scale)
    tally.add(f"TRL: advantages, scale {scale}", equal(ours, theirs(rewards)), rewards.tolist())


def compare_grpo(compute, case, trial, generator, tally) -> None:
    name, loss_type, normalizer, ratio, kl = case
    replies, length, longest = 2 + trial % 5, 1 + trial % 9, 16

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.randint(1, length + 1, (replies,), generator=generator)
    lengths[0] = length
    mask = torch.arange(length) < lengths[:, None]
    old, advantage = draw(replies, length) - 2, draw(replies)
    reference = old + 0.3 * draw(replies, length)
    logp = (old + 0.4 * draw(replies, length)).requires_grad_()

    weight = grpo.token_weights(lengths.double(), normalizer, replies, float(lengths.sum()), longest)
    ours = grpo.grpo_loss(
        logp, old, reference, advantage, mask, weight, clip_low=0.2, clip_high=0.28, kl=kl, ratio=ratio
    )
    trainer = Settings(
        accelerator=alone(), args=Settings(), model=Settings(training=True), _metrics=Metrics(), beta=kl,
        importance_sampling_level=ratio, loss_type=loss_type, epsilon_low=0.2, epsilon_high=0.28,
        top_entropy_quantile=1.0, current_gradient_accumulation_steps=1, max_completion_length=longest,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logp, torch.zeros_like(logp), None),
    )  # fmt: skip
    ids = torch.zeros(replies, length, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": ids[:, :1] + 1,
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantage,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": lengths.sum(),
    }
    theirs = compute(trainer, None, inputs)
    agree = equal(ours, theirs) and equal(gradient(ours, logp), gradient(theirs, logp))
    tally.add(f"TRL: GRPO, {name}", agree, {"trial": trial, "ours": ours.item(), "theirs": theirs.item()})


def compare_dpo(compute, sft_weight, trial, generator, tally) -> None:
    pairs, length, vocabulary, beta = 1 + trial % 4, 3 + trial % 6, 11, (0.1, 0.5, 2.0)[trial % 3]
    logits = torch.randn(2 * pairs, length, vocabulary, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, vocabulary, (2 * pairs, length), generator=generator)
    ends = torch.randint(2, length + 1, (2 * pairs, 1), generator=generator)
    mask = (torch.arange(length) >= 1) & (torch.arange(length) < ends)  # the first token is the prompt
    references = -5 * torch.rand(2, pairs, generator=generator, dtype=torch.float64)

    picked = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    inside = mask[:, 1:]
    summed = picked.masked_fill(~inside, 0.0).sum(1)
    loss, _ = dpo.dpo_loss(summed[:pairs], summed[pairs:], references[0], references[1], beta)
    weight = torch.full((pairs,), 1 / int(inside[:pairs].sum()), dtype=torch.float64)
    ours = loss.mean() + sft_weight * dpo.sft_loss(picked[:pairs], inside[:pairs], weight)

    trainer = Settings(
        accelerator=alone(), args=Settings(), model=Settings(training=True), _metrics=Metrics(), beta=beta,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", _total_train_tokens=0,
        loss_types=["sigmoid", "sft"] if sft_weight else ["sigmoid"], loss_weights=[1.0, sft_weight],
    )  # fmt: skip
    trainer.loss_weights = trainer.loss_weights[: len(trainer.loss_types)]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": mask.long(),
        "ref_chosen_logps": references[0],
        "ref_rejected_logps": references[1],
    }
    theirs = compute(trainer, lambda **_: Settings(logits=logits), inputs, False)
    agree = equal(ours, theirs) and equal(gradient(ours, logits), gradient(theirs, logits))
    name = "TRL: DPO+SFT" if sft_weight else "TRL: DPO"
    tally.add(name, agree, {"trial": trial, "ours": ours.item(), "theirs": theirs.item()})


# ---------------------------------------------------------------------------------------------------------------------
# math-verify


def math_cases(path: Path) -> Iterator[tuple[str, str, str, bool]]:
    """(test function, gold, reply, whether they are equal) of each parametrised case that is written out."""
    for function in definitions_with_cases(path):
        for decorator in function.decorator_list:
            names, cases = parametrised(decorator)
            if names != ["gold", "pred", "expected"]:
                continue
            for case in cases:
                try:
                    gold, reply, expected = ast.literal_eval(case)
                except ValueError:  # made by code
                    continue
                if isinstance(gold, str) and isinstance(reply, str):
                    yield function.name, gold, reply, bool(expected)


def definitions_with_cases(path: Path) -> list[ast.FunctionDef]:
    return [function for function in definitions(path) if function.name.startswith("test_")]


def parametrised(decorator: ast.expr) -> tuple[list[str], list[ast.expr]]:
    """(names, cases) of a @pytest.mark.parametrize; empty for other decorators."""
    if not isinstance(decorator, ast.Call) or not ast.unparse(decorator.func).endswith("parametrize"):
        return [], []
    names, cases = decorator.args[:2]
    words = re.split(r"\s*,\s*", str(ast.literal_eval(names)))
    return words, list(cases.elts) if isinstance(cases, ast.List | ast.Tuple) else []


def compare_math(folder: Path, tally: Tally) -> None:
    """Their texts are printed and not kept: a kept case names its test, and its number there counted from 0."""
    for path in sorted((folder / "tests").glob("test_*.py")):
        seen = Counter()
        for test, gold, reply, expected in math_cases(path):
            case = {"case": f"{path.name}::{test}, {seen[test]}", "theirs": expected}
            seen[test] += 1
            record = {"answer": gold, "answer_type": "math", "think": True}
            try:
                rewards.check_gold(record)
            except ValueError:
                tally.add("math-verify: golds that ours can score", False, case)
                print(f"gold cannot be scored: {gold!r}")
                continue
            tally.add("math-verify: golds that ours can score", True, case)
            ours = rewards.score(f"<think>so</think><answer>{reply}</answer>", record)["accuracy"] == 1
            name = f"math-verify: {'right' if expected else 'wrong'} answers, {test}"
            tally.add(name, ours == expected, case | {"ours": ours})
            if ours != expected:
                print(f"theirs {expected}, ours {ours}: gold {gold!r}, reply {reply!r}")


# ---------------------------------------------------------------------------------------------------------------------
# Jigsaw-R1

# How a reply is laid out: what stands for {} is an answer.
LAYOUTS = {
    "bare": ["{}"],
    "asked": ["<think>so</think><answer>{}</answer>", "<think>a\nb</think>\n<answer>{}</answer>"],
    "spaced": ["<think>so</think> <answer> {} </answer>"],
    "no end": ["<think>so</think><answer>{}"],
    "no think": ["<answer>{}</answer>"],
    "words around": ["<think>so</think><answer>It is {}</answer>", "The answer is {}."],
    "twice": ["<think>so</think><answer>{}</answer><answer>{}</answer>"],
    "words behind": ["<think>so</think><answer>{}</answer> Yes."],
}


def random_case(rng: random.Random) -> tuple[dict, str]:
    """(record, an answer as text that is right about half the time)."""
    kind = rng.choice(["letter", "digit", "grid", "box", "point"])
    right = rng.random() < 0.5
    record = {"answer_type": kind, "think": rng.random() < 0.5}
    if kind == "letter":
        gold = rng.choice("ABCD")
        return record | {"answer": gold}, gold if right else rng.choice("ABCDE")
    if kind == "digit":
        gold = rng.randrange(1, 30)
        return record | {"answer": gold}, str(gold if right else rng.randrange(30))
    if kind == "grid":
        rows, cols = rng.choice([(1, 2), (2, 1), (2, 2), (3, 2), (3, 3)])
        gold = rng.sample(range(1, rows * cols + 1), rows * cols)
        answer = gold if right else rng.sample(gold, len(gold))
        lines = [" ".join(map(str, answer[row * cols : (row + 1) * cols])) for row in range(rows)]
        return record | {"answer": gold, "rows": rows, "cols": cols}, rng.choice(["\n", " "]).join(lines)
    left, top = rng.randrange(200), rng.randrange(200)
    gold = [left, top, left + rng.randrange(20, 200), top + rng.randrange(20, 200)]
    if kind == "point":  # Jigsaw-R1 asks for a box there too, and takes its centre
        gold = [left, top, left + rng.randrange(20, 200), top + rng.randrange(20, 200)]
    moved = gold if right else [edge + rng.choice([-60, -15, 0, 15, 60]) for edge in gold]
    moved = [max(0, edge) for edge in moved]
    answer = ", ".join(map(str, moved))
    return record | {"answer": gold}, f"[{answer}]" if rng.random() < 0.5 else answer


def compare_jigsaw(folder: Path, count: int, tally: Tally) -> None:
    try:
        from math_verify import parse, verify  # what Jigsaw-R1 compares numbers with
    except ImportError:
        raise DataError("Jigsaw-R1 compares numbers with math-verify: pip install math-verify") from None
    names = ("process_jigsaw_string", "extract_answer", "score_boxes", "score_points", "verify_math",
             "score_jigsaw_patches", "accuracy_reward_helper", "format_reward")  # fmt: skip
    known = {"re": re, "os": __import__("os"), "datetime": __import__("datetime").datetime}
    theirs = take(folder / "utils/reward.py", names, known | {"parse": parse, "verify": verify})
    rng = random.Random(0)
    for _ in range(count):
        record, answer = random_case(rng)
        layout = rng.choice(list(LAYOUTS))
        reply = rng.choice(LAYOUTS[layout]).replace("{}", answer)
        compare_scores(theirs, record, layout, reply, tally)
    helper = take(folder / "utils/jigsaw_utils.py", ("create_grid_jigsaw_image",), {"random": random, "Image": Image})
    for seed in range(max(1, count // 50)):
        compare_puzzles(helper["create_grid_jigsaw_image"], seed, tally)


def compare_scores(theirs, record, layout, reply, tally) -> None:
    kind, think = record["answer_type"], record["think"]
    rows, cols = record.get("rows"), record.get("cols")
    read = theirs["extract_answer"](reply, rows, cols, kind, think)
    part, whole = theirs["accuracy_reward_helper"](read, record["answer"], kind)
    accuracy = part if kind in ("grid", "box") else whole  # a point is right inside its box, as in its evaluation
    (form,) = theirs["format_reward"](
        [[{"content": reply}]], think=[think], m=[rows], n=[cols], answer_type=[kind], image_id=[None]
    )
    ours = rewards.score(reply, record)
    case = {"reply": reply, "gold": record["answer"], "ours": [ours["accuracy"], ours["format"]]}
    case["theirs"] = [accuracy, form]
    asked = (layout in ("asked", "spaced")) if think else layout == "bare"
    title = f"Jigsaw-R1: {{}}, {kind}, {'as asked' if asked else 'otherwise laid out'}"
    tally.add(title.format("format"), ours["format"] == form, case)
    tally.add(title.format("accuracy"), abs(ours["accuracy"] - accuracy) < 1e-9, case)


def coloured(rows: int, cols: int) -> tuple[Image.Image, dict]:
    """(a picture whose pieces have each one colour, {colour: its position, counted from 1})."""
    picture, positions = Image.new("RGB", (8 * cols, 8 * rows)), {}
    for place in range(rows * cols):
        colour = (20 * place + 10, 255 - 20 * place, 77)
        corner = (place % cols * 8, place // cols * 8)
        picture.paste(colour, (*corner, corner[0] + 8, corner[1] + 8))
        positions[colour] = place + 1
    return picture, positions


def seen_order(picture: Image.Image, rows: int, cols: int, positions: dict) -> list[int]:
    """For each position of a mixed picture: where its piece was."""
    return [
        positions[picture.getpixel((place % cols * 8 + 4, place // cols * 8 + 4))] for place in range(rows * cols)
    ]


def compare_puzzles(create, seed, tally) -> None:
    rows, cols = random.Random(seed).choice([(2, 1), (1, 3), (2, 2), (3, 2), (3, 3)])
    picture, positions = coloured(rows, cols)
    random.seed(seed)
    theirs, forward, _ = create(picture, rows, cols)
    mixed, record = jigsaw.make_puzzle(picture, rows, cols, "full", random.Random(seed))
    # One way round: each side's list is what its own picture shows, read the same way.
    case = {"rows": rows, "cols": cols, "seed": seed, "theirs": forward, "ours": record["answer"]}
    same = seen_order(theirs, rows, cols, positions) == forward
    same = same and seen_order(mixed, rows, cols, positions) == record["answer"]
    tally.add("Jigsaw-R1: permutations the same way round", same, case)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def row_name(name: str) -> str:
    """The row of the table that a class belongs to: a row a test of math-verify would be too many."""
    if name.startswith("math-verify: "):
        return name.split(",")[0]
    return re.sub(r", \w+, otherwise laid out", ", otherwise laid out", name)


def table(result: dict) -> str:
    """The kept numbers as Markdown, with what was compared."""
    sources = ", ".join(f"{name} at `{version[:12]}`" for name, version in result["compared with"].items())
    tried, agreed = Counter(), Counter()
    for name, row in result["classes"].items():
        tried[row_name(name)] += row["tried"]
        agreed[row_name(name)] += row["agreed"]
    lines = [f"Compared with {sources}.", "", "| class | tried | agreed |", "|---|---|---|"]
    lines += [f"| {name} | {tried[name]:,} | {agreed[name]:,} |" for name in sorted(tried)]
    return "\n".join(lines)


def rebuilt(page: str, block: str) -> str:
    """A page's text with this block, blank lines around it, between our two markers. DataError for one without them."""
    try:
        return pages.rebuilt(page, {"outside": f"\n{block}\n"}, "bench/outside.py", str(PAGE), each_once=True)
    except pages.Refused as reason:
        raise DataError(reason) from None


def compare(folder: Path, count: int) -> dict:
    """Compare with all that is there: {"compared with": {name: commit}, "classes": {class: counts, disagreements}}."""
    places = {
        "TRL": checkout(folder, "trl", "trl"),
        "math-verify": checkout(folder, "Math-Verify"),
        "Jigsaw-R1": checkout(folder, "Jigsaw-R1"),
    }
    there = {name: place for name, place in places.items() if place}
    if not there:
        raise DataError(f"{folder}: holds none of trl, Math-Verify, Jigsaw-R1")
    tally = Tally()
    if "TRL" in there:
        compare_trl(there["TRL"], count, tally)
    if "math-verify" in there:
        compare_math(there["math-verify"], tally)
    if "Jigsaw-R1" in there:
        compare_jigsaw(there["Jigsaw-R1"], 50 * count, tally)
    return {"compared with": {name: version_of(place) for name, place in there.items()}, "classes": tally.rows()}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--folder", type=Path, metavar="DIR", help="compare with the checkouts in this folder, and keep the numbers")
    add("--count", type=integer("[1, 1e6]"), default=200, help="random inputs of each loss; 50 times as many replies")
    add("--out", type=Path, default=RESULT, metavar="FILE.json", help="where the numbers are kept")
    add("--table", action="store_true", help="put the table of the kept numbers into docs/answers.md")
    add("--check", action="store_true", help="exit 1 if docs/answers.md does not show the kept numbers")
    args = parser.parse_args(argv)
    if not (args.folder or args.table or args.check):
        parser.error("one of --folder, --table and --check is needed")
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.folder:
        result = compare(args.folder, args.count)
        write_text(args.out, json.dumps(result, ensure_ascii=False, indent=1) + "\n")
    if not args.out.is_file():
        raise DataError(f"{args.out}: no numbers are kept yet; --folder makes them")
    result = json.loads(args.out.read_text(encoding="utf-8"))
    print(table(result))
    page = PAGE.read_text(encoding="utf-8")
    wanted = rebuilt(page, table(result)) if args.table or args.check else page
    if args.table:
        write_text(PAGE, wanted)
    elif wanted != page:
        print("docs/answers.md does not show the kept numbers: python bench/outside.py --table", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(lambda: sys.exit(main()))
