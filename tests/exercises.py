"""Twenty exercises: find the bug. Each is one of plant_bugs.py, planted in a copy of the repository.

    make exercise                 # the list, easy ones first
    make exercise N=12            # plants bug 12 in exercises/12 and says what to look for
    make exercise N=12 SHOW=1     # tells the line, and why it hurts

Without make: python tests/exercises.py 12 [--show]. `--write-docs` writes docs/exercises.md from the list below.
"""

import argparse
import difflib
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from plant_bugs import BUGS, ROOT, Bug, source_files


class Exercise(NamedTuple):
    bug: str  # its name in plant_bugs.py, which has the file and the tests
    symptom: str  # what somebody who runs the code sees
    hint: str  # where to begin
    why: str  # why the mistake hurts; only told with --show


# fmt: off
EXERCISES = [Exercise(*entry) for entry in (
    ("the loss has the wrong sign",
     "The reward falls from the first step on, and what the model could say at the start it soon cannot any more.",
     "Write the loss of one token down: which way must its log-prob move when the advantage is positive?",
     "An optimiser makes the loss smaller. What is to grow, the expected advantage, needs a minus."),
    ("A or B is an A",
     "Accuracy is higher than it should be: samples.jsonl shows replies such as \"A or B\" that count as right.",
     "What may stand in an answer behind the letter?",
     "A reply that names every option is always right. The policy finds such a hole within some hundred steps."),
    ("a tag may stand twice",
     "samples.jsonl shows replies with two <answer> blocks whose format is 1.",
     "How does the reader find out that a reply has exactly the four tags?",
     "The format reward is the only thing that keeps replies readable; a hole in it is trained into the policy."),
    ("GF: beta is not squared in the denominator",
     "Gains of 50 in distribution and 20 out of it give a GF of 41.7. The paper's formula says 22.7.",
     "GF is an F-score. Look up what F-beta looks like.",
     "A summary that is wrong in the same way for every run ranks them wrongly, and no curve shows it."),
    ("all replies of a group are sampled alike",
     "useful_groups is 0 from the first step on, and both replies of a step in samples.jsonl are equal.",
     "Where do the random numbers of a reply come from, and what tells the replies of a prompt apart?",
     "GRPO learns from differences inside a group. Equal replies have equal rewards, and so no advantage."),
    ("every step has the same prompts",
     "The reward goes to 1 within few steps, accuracy on held-out records does not move, and samples.jsonl names the "
     "same id in every step.",
     "Who decides which records a step sees?",
     "The policy learns a handful of answers by heart."),
    ("the std is the biased one",
     "With --group 2, rewards of 1 and 0 give advantages of +1 and -1. The formula says +0.71 and -0.71.",
     "Divide by n or by n - 1?",
     "Small groups learn faster than they should, by the root of G / (G - 1), so --group changes two things at once."),
    ("advantages are taken against the whole batch's mean",
     "The advantages of a group with right and wrong replies do not sum to 0: the sum is positive for easy questions "
     "and negative for hard ones.",
     "What is a reply compared with?",
     "How hard a question is, is not the reply's merit. It becomes noise in the gradient, larger than the signal."),
    ("chosen and rejected are swapped in the batch",
     "Every curve of dpo.py looks as it should, preference_accuracy goes to 1, and the model that comes out writes "
     "malformed replies.",
     "The loss is right. Follow a pair from its file to the two arguments of the loss.",
     "Curves are computed from the same batch as the loss, so they share its mistake: only samples tell."),
    ("the order is the inverse of the mix",
     "Puzzles of two pieces are learned, but `--question full` with more pieces stays below a ceiling that no training "
     "breaks.",
     "Cut a picture into three by hand, move each piece one place on, and write down the answer.",
     "Some permutations are their own inverse, and all of two pieces are; for the others the gold answer is false."),
    ("the old log-probs are those of now, so that nothing is ever clipped",
     "clip_fraction is exactly 0 in every step, with --updates 4 and a large learning rate, too.",
     "What is the ratio of the second update made of?",
     "The ratio is always 1, so the clip never holds back an update: what keeps PPO and GRPO stable is gone."),
    ("k3 is of the other direction",
     "With --kl 0.04, kl looks as usual while the policy is near its reference, and explodes once some tokens have "
     "become much likelier than they were.",
     "Whose samples are averaged, and which ratio has a mean of 1 under them?",
     "The mean of k3 is the KL only with the ratio reference / policy. Turned round, its exponential is heavy-tailed."),
    ("skipped groups do not count in the normaliser",
     "The fewer groups of a batch carry a signal (useful_groups), the larger is what each of their replies adds to the "
     "gradient.",
     "A group without a signal adds nothing to the loss. Does it change anything else?",
     "Skipping is to save time and must not change the gradient; here late in a run few groups steer with full force."),
    ("each micro-batch is normalised by itself",
     "With half the --micro-tokens, grad_norm is about twice as large. On a machine with another memory size the same "
     "command is another run.",
     "Which batch do `replies` and `tokens` of the per-token loss weight count?",
     "A sum of means is no mean. Learning would depend on how a batch happens to fit into memory."),
    ("log-probs are those after top-k and top-p",
     "sampler_gap is rounding without --top-k, and some tenths of a nat with --top-k 50, although the weights are the "
     "same.",
     "Which distribution does a Reply say its log-probs are of?",
     "The filtered distribution gives each token more. entropy and importance weights are then of another policy."),
    ("replies start at the prompt's length, not at the end of its M-RoPE",
     "Records without pictures are right. With pictures, sampler_gap is far above rounding from the first step on.",
     "A picture of 8 x 8 tokens moves the position on by how much?",
     "The trainer's log-probs are those of replies somewhere else, and gradients follow."),
    ("a reply sees its siblings",
     "The first reply of every group has the sampler's log-probs; all others do not.",
     "Which tokens does a reply attend to, and which of three calls decides it?",
     "A log-prob given the sibling is not that of the policy; the gradient teaches the model to look at what it will "
     "not have when it samples."),
    ("the mean that FSDP takes over the ranks is not undone",
     "With two processes, grad_norm is half of what one process logs for the same command; the loss is the same.",
     "What does FSDP do with the gradients of its ranks, and what is the loss of a rank a part of?",
     "AdamW hardly cares about the scale of a gradient, so the run looks fine; --grad-clip, in fixed units, does."),
    ("a prompt learns nothing from its replies",
     "Loss and log-probs are those of the plain layout to the last digit, but the gradient is not.",
     "Which keys and values do replies read, and where is their gradient added up?",
     "The forward pass is right, so no log shows it. What the prompt's tokens should pass on to the replies, pictures "
     "above all, is learned with a wrong gradient."),
    ("AdamW's clock begins anew after a resume",
     "The first step after --resume has the loss of the unbroken run, and from its update on the weights are others.",
     "What, beside weights and moments, does AdamW's update depend on?",
     "Bias correction takes the moments for those of a first step: after each resume some updates have a wrong size."),
)]
# fmt: on

# What would spoil it, or fail in a copy.
LEFT_OUT = ("tests/plant_bugs.py", "tests/exercises.py", "tests/test_exercises.py", "docs/exercises.md")


def bug_of(exercise: Exercise) -> Bug:
    return next(bug for bug in BUGS if bug.name == exercise.bug)


def plant(exercise: Exercise, folder: Path) -> None:
    """Copy the repository to `folder`, which must not exist, with the bug in it."""
    bug = bug_of(exercise)
    for name in source_files():
        if name not in LEFT_OUT:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    path = folder / bug.file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def task(number: int, folder: Path) -> str:
    """What to look for, where, and how to check a fix."""
    exercise = EXERCISES[number - 1]
    bug = bug_of(exercise)
    tests = " \\\n    ".join(bug.tests.split())
    return f"""Exercise {number} of {len(EXERCISES)}: {folder} is a copy of the repository with a mistake in {bug.file}.

Symptom:  {exercise.symptom}
Hint:     {exercise.hint}

The tests below fail now. Find the line, mend it, and see them pass:
    cd {folder}
    {sys.executable} -m pytest -x {tests}
"""


def solution(number: int) -> str:
    """The line as it should be and as it was planted, and why it matters."""
    exercise = EXERCISES[number - 1]
    bug = bug_of(exercise)
    right = (ROOT / bug.file).read_text(encoding="utf-8")
    wrong = right.replace(bug.old, bug.new)
    changes = difflib.unified_diff(wrong.splitlines(), right.splitlines(), n=0, lineterm="")
    lines = [line for line in changes if not line.startswith(("---", "+++", "@@"))]
    line_number = right[: right.index(bug.old)].count("\n") + 1
    return "\n".join([
        f"Exercise {number}: {exercise.bug}",
        f"{bug.file}:{line_number} (-: planted, +: as it should be)",
        "",
        *lines,
        "",
        exercise.why,
    ])  # fmt: skip


def page() -> str:
    """docs/exercises.md."""
    lines = [
        "# Exercises: find the bug",
        "",
        "Every exercise is a mistake that somebody could make, and that the tests catch; easy ones come first.",
        "`make exercise N=12` plants bug 12 in a copy of the repository (`exercises/12`), names the file to read,",
        "gives a hint, and says which tests fail until it is mended. `make exercise N=12 SHOW=1` tells.",
        "",
        "This page is written by `python tests/exercises.py --write-docs`.",
        "",
        "| N | read | what somebody sees who runs it |",
        "|---|---|---|",
    ]
    for number, exercise in enumerate(EXERCISES, 1):
        file = bug_of(exercise).file
        symptom = exercise.symptom.replace("<", "&lt;")
        lines.append(f"| {number} | [{file}](../{file}) | {symptom} |")
    return "\n".join(lines) + "\n"


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    parser.add_argument("number", nargs="?", metavar="N", help=f"1 to {len(EXERCISES)}; without it: the list")
    parser.add_argument("--show", action="store_true", help="tell the mistake")
    parser.add_argument("--into", default="exercises", metavar="DIR", help="where the copy goes: DIR/N")
    parser.add_argument("--write-docs", action="store_true", help="write docs/exercises.md anew")
    args = parser.parse_args(argv)
    if args.number is not None:
        if args.number not in map(str, range(1, len(EXERCISES) + 1)):
            parser.error(f"there are exercises 1 to {len(EXERCISES)}, not {args.number}")
        args.number = int(args.number)
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    if args.write_docs:
        (ROOT / "docs/exercises.md").write_text(page(), encoding="utf-8")
    elif args.number is None:
        for number, exercise in enumerate(EXERCISES, 1):
            print(f"{number:2d}  {bug_of(exercise).file:15}  {exercise.symptom}")
    elif args.show:
        print(solution(args.number))
    else:
        folder = Path(args.into) / str(args.number)
        if folder.exists():
            print(f"error: {folder} is there already; remove it to start anew", file=sys.stderr)
            return 2
        plant(EXERCISES[args.number - 1], folder)
        print(task(args.number, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
