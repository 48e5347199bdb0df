r"""Searches for an expression that is right for two golds that are not equal.

    python tests/search_math.py --count 120000 --processes 2 --out bench/results/search_math.json

A policy that is trained against a reward finds every hole in it: \ln(|\infty|) was once right for any gold, because
the comparison "succeeded" where both sides had no value. So expressions are made from a grammar full of such things:
infinities, 0/0, logarithms of odd bases, angles without a tangent, absolute values, empty sets, free letters, powers of
powers. Each is compared with every gold of GOLDS, and none may be right for two. Ends with status 1 if one is.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import math_answers  # noqa: E402

# Pairwise unequal, of all kinds. No two may be equal as a number and the same number with a unit: 7 cm is right for 7.
GOLDS = [
    "0", "1", "-1", "2", "5", "10", "100", r"\frac{1}{2}", r"-\frac{3}{4}", "0.333", r"\frac{1}{3}", "10^{-8}",
    "3e8", r"\pi", r"2\pi", r"\frac{\pi}{6}", "e", r"\frac{1}{e}", r"\sqrt{2}", r"4\sqrt{3}", r"\ln 2", r"\log_2 3",
    "i", "-i", "3+4i", "x", "2x", "x^2", "x^2-1", r"\frac{1}{x}", "2^n", "|x|", r"\sin x", "a+b", "y=2x+3",
    "x^2+y^2=25", r"1 \pm \sqrt{2}", r"\pm 3", r"\{1, 2\}", r"\{0\}", r"\{-1, 0, 1\}", r"\emptyset", "(0,1]",
    "[0,1]", r"[2,\infty)", r"(-\infty,\infty)", r"(-\infty,0)\cup(1,\infty)", "x>7", r"x \le 2", "(3, 4)",
    "(4, 3)", "(1,2,3)", "3:2", "12:30", r"\infty", r"-\infty", "7 cm", "8 cm^2", "6\\%", "77^\\circ",
    r"\overline{AB}", r"\angle ABC", r"\text{Yes}", "101_2", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
]  # fmt: skip

ATOMS = r"""
    0 0 1 1 2 3 4 5 7 8 10 0.5 12 \frac{1}{2} x x y n a b i e \pi \infty \infty -\infty \emptyset \alpha 0.0 1e9
    100 A B
""".split()
ONE = r"""
    -%s (%s) |%s| \sqrt{%s} \sqrt[3]{%s} \ln(%s) \log(%s) \log_2(%s) \log_1(%s) \log_0(%s) \lg(%s) \sin(%s)
    \cos(%s) \tan(%s) \cot(%s) \arcsin(%s) \arccos(%s) \arctan(%s) \tan^{-1}(%s) \sin^2(%s) \sin^{999}(%s)
    e^{%s} 2^{%s} 1^{%s} 0^{%s} \infty^{%s} \left|%s\right| %s! (%s)! \exp(%s) \frac{0}{%s} \frac{%s}{0}
    \frac{1}{%s} \tan(90^\circ%s) \sinh(%s) %s^\circ %s\% \overline{%s} \text{%s} \boxed{%s} $%s$ x=%s f(x)=%s
    \{%s\} [%s] %s\text{cm} \$%s %s\infty \binom{%s}{2} \pm%s x>%s x\le%s x\ne%s x\in%s
""".split()
TWO = r"""
    %s+%s %s-%s %s\cdot%s %s/%s \frac{%s}{%s} %s^{%s} (%s)^{%s} (%s)(%s) \log_{%s}(%s) \sqrt[%s]{%s} %s\pm%s
    %s=%s (%s,%s) [%s,%s) (%s,%s] [%s,%s] \{%s,%s\} %s,%s %s<x<%s (%s,\infty)\cup(-\infty,%s) %s:%s %s\cup%s
    \binom{%s}{%s} |%s-%s| \{x|%s<x<%s\} \left(%s\right)^{%s} {%s\over%s} %s\times%s %s\mp%s
""".split() + ["%s or %s", "%s and %s", r"%s \text{ or } %s", "%s %s", "%s to %s"]


def expression(rng: random.Random, depth: int) -> str:
    """A text from the grammar, at most `depth` operations deep. It is made of texts: much of it is not well formed."""
    kind = rng.random()
    if depth == 0 or kind < 0.1:
        return rng.choice(ATOMS)
    if kind < 0.55:
        return rng.choice(ONE).replace("%s", expression(rng, depth - 1))
    left, right = rng.choice(TWO).split("%s", 1)
    inner, rest = right.split("%s", 1)
    return left + expression(rng, depth - 1) + inner + expression(rng, depth - 1) + rest


def expressions(seed: int, count: int) -> list[str]:
    """`count` different ones."""
    rng = random.Random(seed)
    found = {}
    while len(found) < count:
        text = expression(rng, rng.choice((1, 2, 2, 3, 3, 4)))
        found[text] = None
    return list(found)


def search(texts: list[str]) -> dict:
    """How many expressions can be read, how many are right for one gold, and those that are right for more."""
    readable, right, bad, slowest = 0, 0, [], 0.0
    for text in texts:
        start = time.perf_counter()
        readable += math_answers.read(text) is not None
        golds = [gold for gold in GOLDS if math_answers.same_answer(gold, text)]
        slowest = max(slowest, time.perf_counter() - start)
        right += len(golds) == 1
        if len(golds) > 1:
            bad.append({"expression": text, "right for": golds})
    return {
        "expressions": len(texts),
        "readable": readable,
        "right for one gold": right,
        "bad": bad,
        "slowest": slowest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=120_000, help="different expressions (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the grammar (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file for the counts; off by default")
    args = parser.parse_args()

    texts = expressions(args.seed, args.count)
    parts = [texts[start::64] for start in range(64)]
    with ProcessPoolExecutor(args.processes) as pool:
        found = list(pool.map(search, parts))
    result = {
        "commit": subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip(),
        "seed": args.seed,
        "golds": len(GOLDS),
        "expressions": sum(part["expressions"] for part in found),
        "readable": sum(part["readable"] for part in found),
        "right for one gold": sum(part["right for one gold"] for part in found),
        "right for two golds": [item for part in found for item in part["bad"]],
        "slowest expression, ms, against all golds": round(1000 * max(part["slowest"] for part in found)),
    }
    text = json.dumps(result, indent=2, ensure_ascii=False) + "\n"
    print(text, end="")
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    sys.exit(1 if result["right for two golds"] else 0)


if __name__ == "__main__":
    main()
