"""Throws random replies and random mathematics at the rewards: no exception, no long time, no score out of range.

    python bench/fuzz.py                                        # a million replies, 100,000 expressions
    python bench/fuzz.py --replies 20000 --expressions 2000     # a short run
    python bench/fuzz.py --out bench/results/fuzz.json          # keep the counts

Replies are made of five kinds: shreds of tags and answers, well-formed replies with characters changed, random Unicode,
a few units pumped up to the longest answer, and mathematics from the grammar of tests/search_math.py. Seven of ten have
the shape that is asked for. Formats take turns, types are random; every tenth reply is scored again with cold caches
and must earn the same. Times are CPU times of this process. Ends with status 1 if anything is wrong.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(1, str(ROOT / "tests"))

import search_math  # noqa: E402

import expressions  # noqa: E402
import math_answers  # noqa: E402
import rewards  # noqa: E402

SLOW = 0.05  # seconds of CPU
PARTS = 64  # seeds; the counts do not depend on --processes
RECORDS = [
    {"answer_type": "letter", "answer": "B", "options": ["above", "below", "left"]},
    {"answer_type": "letter", "answer": "B"},
    {"answer_type": "digit", "answer": 3},
    {"answer_type": "grid", "answer": [2, 1, 4, 3], "rows": 2, "cols": 2},
    {"answer_type": "grid", "answer": [2, 1, 3]},
    {"answer_type": "box", "answer": [1, 2, 30.5, 40]},
    {"answer_type": "point", "answer": [1, 2, 30.5, 40]},
    {"answer_type": "math", "answer": "5"},
    {"answer_type": "math", "answer": r"\frac{\sqrt{3}}{2} \text{ cm}"},
    {"answer_type": "math", "answer": r"\{1, 2\}"},
    {"answer_type": "text", "answer": ["red", "dark red"]},
]
GOLDS = ["5", "x", "5 cm", r"\{1, 2\}", "(3, 4)", "y=2x+3", "x>7", r"\infty"]
SHAPES = [  # one a format, in the order of rewards.REPLY_FORMATS
    "<think>R</think><answer>{}</answer>",
    "{}",
    "<reason>R</reason><result>{}</result>",
    "R \\boxed{{{}}}",
    '{{"reason": "R", "answer": "{}"}}',
    "R\nAnswer: {}",
]
ANSWERS = """B b (B) below B.\tbelow 3 three 2+1=3 [[2,1],[4,3]] 2\t1\t4\t3 2,1,3 1,2,30.5,40 (4,5) 5 x=5 5cm 1,2
    \\frac{\\sqrt{3}}{2}\\text{cm} red Red. the\tred A\tor\tB""".split()
ANSWERS = [answer.replace("\t", " ") for answer in ANSWERS]
SHREDS = """
    <think> </think> <answer> </answer> <reason> </reason> <result> </result> \\boxed{ } $ ** ``` ` _ { } [ ] (
    ) < > {"reason": "answer": Answer: answer is the so not or and A B C below 5 7 12 2 1 4 3 , ; : | = + - ^ /
    ! \\frac{1}{2} \\\\ \\sqrt{ \\sin x cm % \\pm \\infty \\text{ \\left \\over \\begin{matrix} & row\t1: px
    \\displaystyle ∞ ½ ² 五 Ａ В NaN 1e999 答案 = 。 ㎭ ﷺ I\thope\tit\tis\tcorrect. There\tare click( bbox_2d x1= 0
    9999999999 . '
""".split()
SHREDS = [shred.replace("\t", " ") for shred in SHREDS] + [
    " ",
    "\n",
    "\t",
    "\x00",
    "\ud800",
    "\u202e",
    "\u200b",
    "\u0301",
]


# ---------------------------------------------------------------------------------------------------------------------
# Replies


def of_shreds(rng: random.Random, shape: str) -> str:
    joint = rng.choice(("", "", " "))
    text = joint.join(rng.choice(SHREDS) for _ in range(rng.randrange(1, 20)))
    return rng.choice((shape.format(text), text))


def changed(rng: random.Random, shape: str) -> str:
    """A well-formed reply in which a few characters were taken out, repeated, or put in."""
    reply = shape.format(rng.choice(ANSWERS))
    for _ in range(rng.randrange(3)):
        start = rng.randrange(len(reply) + 1)
        end = min(len(reply), start + rng.randrange(1, 6))
        middle = rng.choice(("", reply[start:end] * 2, rng.choice(SHREDS)))
        reply = reply[:start] + middle + reply[end:]
    return reply


def of_unicode(rng: random.Random, shape: str) -> str:
    highest = rng.choice((0x7F, 0x3000, 0x10FFFF))
    text = "".join(chr(rng.randrange(highest + 1)) for _ in range(rng.randrange(1, 30)))
    return shape.format(text)


def pumped(rng: random.Random, shape: str) -> str:
    longest = rng.choice((50, 200, 200, 1_990))
    parts = [rng.choice(SHREDS) for _ in range(rng.randrange(1, 4))]
    text = "".join((part * longest)[: longest // len(parts)] for part in parts)
    return shape.format(text + rng.choice(("", rng.choice(SHREDS))))


def of_mathematics(rng: random.Random, shape: str) -> str:
    return shape.format(search_math.expression(rng, rng.choice((1, 2, 3))))


MAKERS: list[Callable[[random.Random, str], str]] = [of_shreds, changed, changed, of_unicode, of_mathematics]
PUMPED_EVERY = 20  # they are long


def flaw(score: dict) -> str | None:
    """What is wrong with a score, or None."""
    if not 0.0 <= score["accuracy"] <= 1.0 or score["format"] not in (0.0, 1.0):
        return "out of range"
    if score["reward"] != score["accuracy"] + 0.5 * score["format"]:
        return "not the sum of its parts"
    if (score["answer"] is None) != (score["format"] == 0.0) or score["accuracy"] > score["format"]:
        return "an answer without its format"
    return None


def cold() -> None:
    math_answers.read.cache_clear()
    expressions.value_at.cache_clear()


def fuzz_replies(seed: int, count: int) -> dict:
    rng = random.Random(f"replies/{seed}")
    counts, flaws, slowest = Counter(), [], (0.0, "")
    formats = list(rewards.REPLY_FORMATS)
    for number in range(count):
        make = pumped if number % PUMPED_EVERY == 0 else rng.choice(MAKERS)
        asked = number % len(formats)
        shape = SHAPES[asked] if rng.random() < 0.7 else rng.choice(SHAPES)
        reply = make(rng, shape)
        record = rng.choice(RECORDS) | {"reply_format": formats[asked]}
        start = time.process_time()
        try:
            score = rewards.score(reply, record)
        except Exception as error:  # whatever it is, it is what is looked for
            flaws.append(f"{type(error).__name__}: {reply!r:.200} for {record}")
            continue
        seconds = time.process_time() - start
        slowest = max(slowest, (seconds, f"{reply!r:.200} for {record['answer']!r}"))

        name = record["answer_type"]
        counts[f"{name}: replies"] += 1
        counts[f"{name}: well-formed"] += score["format"] == 1.0
        counts[f"{name}: right"] += score["accuracy"] == 1.0
        counts["slow"] += seconds > SLOW
        problem = flaw(score)
        if number % 10 == 0 and problem is None:
            cold()
            problem = None if rewards.score(reply, record) == score else "another score the second time"
        if problem:
            flaws.append(f"{problem}: {reply!r:.200} for {record}")
    return {"counts": dict(counts), "flaws": flaws, "slowest": slowest}


def fuzz_mathematics(seed: int, count: int) -> dict:
    """Expressions against GOLDS; none may be right for two of them."""
    counts, flaws, slowest = Counter(), [], (0.0, "")
    for text in search_math.expressions(seed, count):
        cold()
        for gold in GOLDS:
            math_answers.read(gold)
        start = time.process_time()
        try:
            right = [gold for gold in GOLDS if math_answers.same_answer(gold, text)]
        except Exception as error:
            flaws.append(f"{type(error).__name__}: {text}")
            continue
        seconds = time.process_time() - start
        slowest = max(slowest, (seconds, text))
        counts["expressions"] += 1
        counts["readable"] += math_answers.read(text) is not None
        counts["right"] += len(right) == 1
        counts["slow"] += seconds > SLOW
        # 5 cm is right for 5, which lacks a unit, and for 5 cm.
        if len(right) > 1 and set(right) != {"5", "5 cm"}:
            flaws.append(f"right for {right}: {text}")
    return {"counts": dict(counts), "flaws": flaws, "slowest": slowest}


# ---------------------------------------------------------------------------------------------------------------------
# The run


def together(parts: list[dict]) -> dict:
    counts = sum((Counter(part["counts"]) for part in parts), Counter())
    seconds, text = max(part["slowest"] for part in parts)
    return {
        "counts": dict(sorted(counts.items())),
        "slower than 50 ms": counts["slow"],
        "slowest, ms": round(1000 * seconds, 1),
        "slowest": ascii(text),
        "flaws": [ascii(flaw) for part in parts for flaw in part["flaws"]],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replies", type=int, default=1_000_000, help="(default: %(default)s)")
    parser.add_argument("--expressions", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the counts; off by default")
    args = parser.parse_args(argv)

    seeds = [args.seed * PARTS + part for part in range(PARTS)]
    with ProcessPoolExecutor(args.processes) as pool:
        replies = pool.map(fuzz_replies, seeds, [-(-args.replies // PARTS)] * PARTS)
        mathematics = pool.map(fuzz_mathematics, seeds, [-(-args.expressions // PARTS)] * PARTS)
        result = {"replies": together(list(replies)), "mathematics": together(list(mathematics))}
    say_commit = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    commit = subprocess.check_output(say_commit, cwd=ROOT, text=True).strip()
    text = json.dumps({"commit": commit, "seed": args.seed} | result, indent=1) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    return 1 if any(part["flaws"] for part in result.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
