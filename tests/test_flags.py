"""A flag is refused in one line that names it, or it means exactly what was written.

The parsers are asked for their flags: a new numeric flag is tried here without being named. A numeric flag is one whose
`type=` gives a number.
"""

import argparse
import importlib
import math
import os
import sys

import pytest
from commands import ROOT, end, start

import jigsaw
import training

sys.path.append(str(ROOT / "recipes"))  # plan.py

STAGES = ("grpo", "dpo", "distill", "eval", "jigsaw", "importers", "report", "toy.primer", "toy.tiny_model")
STAGES += ("toy.downstream", "toy.formats", "plan")
# A command line that parses, to which a flag is added.
NEEDED = {
    "grpo": ["--model", "m", "--data", "d", "--out", "o"],
    "dpo": ["--model", "m", "--data", "d", "--out", "o"],
    "distill": ["--policy", "p", "--base", "b", "--data", "d", "--out", "o"],
    "eval": ["--model", "m", "--id", "d", "--ood", "e", "--baseline", "b", "--out", "o"],
    "jigsaw": ["--scenes", "4", "--count", "4", "--out", "o"],
    "importers": ["--set", "orsta", "--data", "d", "--out", "o"],
    "report": ["--runs", "r", "--out", "o"],
    "toy.primer": ["--scenes", "4", "--count", "4", "--out", "o"],
    "toy.tiny_model": ["o"],
    "toy.formats": ["words", "--count", "4", "--out", "o"],
    "toy.downstream": ["--count", "4", "--split", "test", "--out", "o"],
    "plan": ["7B"],
}
TWINS = (training, jigsaw)  # jigsaw.py imports nothing of ours, so it has the same functions again


def actions_of(stage):
    """The flags of a stage, as argparse keeps them."""
    caught = []
    parser_class = argparse.ArgumentParser
    before = parser_class.parse_known_args

    def catch(parser, *args, **kwargs):
        caught.append(parser)
        return before(parser, *args, **kwargs)

    parser_class.parse_known_args = catch
    try:
        importlib.import_module(stage).parse_args(NEEDED[stage])
    finally:
        parser_class.parse_known_args = before
    return [action for action in caught[0]._actions if action.option_strings]


def kind_of(action):
    """int, float, or None: what a flag's type makes of a number in its interval."""
    for text in ("16", "1", "0.25"):
        try:
            return {int: int, float: float}.get(type(action.type(text)))
        except (TypeError, argparse.ArgumentTypeError):
            continue
    return None


ACTIONS = {stage: actions_of(stage) for stage in STAGES}
NUMERIC = [(stage, action.option_strings[-1]) for stage in STAGES for action in ACTIONS[stage] if kind_of(action)]
NAMES = [
    (stage, action.option_strings[-1])
    for stage in STAGES
    for action in ACTIONS[stage]
    if action.nargs != 0 and not kind_of(action) and not action.choices and action.option_strings[-1] != "--command"
]


def parse(stage, capsys, *flags):
    """(parsed flags or None, what stands on stderr) of a stage's needed flags and these."""
    needed = NEEDED[stage]
    of_a_folder = ("--max-side", "--max-image-pixels")  # where pictures are made or read: of a folder only
    if stage in ("jigsaw", "toy.primer") and any(flag.startswith(of_a_folder) for flag in flags):
        needed = ["--images", *needed[1:]]
    try:
        return importlib.import_module(stage).parse_args([*needed, *flags]), ""
    except SystemExit as stop:
        assert stop.code == 2, flags
        return None, capsys.readouterr().err


def check_one_line(err, flag):
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert flag in err and len(err) < 300, err
    assert err[:-1].isprintable(), err


def bytes_of(raw):
    """What Python makes of these bytes on a command line."""
    return os.fsdecode(raw)


# Never a number of ours, whatever the interval.
NONSENSE = ["nan", "-nan", "inf", "-inf", "+Infinity", "1e400", "-1e400", "", " ", " 5", "5 ", "\t5", "1_000", "0x10",
            "0b1", "1e", "--", "five", "1,5", "1 5", "½", "０", "５", "٣", "1\n", "1\0", bytes_of(b"1\xff"), "\ud800",
            "1e-400", "-1e-400", "1" + "0" * 400, "9" * 5000, "1j", "True", "None", "1" * 10_000 + "x"]  # fmt: skip
LARGE = {int: [str(10**10), str(10**18), str(10**30)], float: ["1e300", "1e38", "1e10"]}


@pytest.mark.parametrize("stage, flag", NUMERIC)
def test_what_is_no_sensible_number_is_refused_in_one_line_that_names(stage, flag, capsys):
    (action,) = [action for action in ACTIONS[stage] if flag in action.option_strings]
    for text in NONSENSE + ["-1", "-0.5"] + LARGE[kind_of(action)]:
        args, err = parse(stage, capsys, f"{flag}={text}")
        assert args is None, f"{flag}={text[:20]!r} is taken"
        check_one_line(err, flag)


@pytest.mark.parametrize("stage, flag", NUMERIC)
def test_a_number_that_is_taken_is_the_one_written(stage, flag, capsys):
    (action,) = [action for action in ACTIONS[stage] if flag in action.option_strings]
    taken = 0
    for text in ("0", "1", "2", "64", "1000", "0.25", "1e-3", "1e-40", "0.9", "1e2", ".5", "5.", "007"):
        args, err = parse(stage, capsys, flag, text)
        if args is None:
            check_one_line(err, "-")  # a rule that joins two flags names both
            continue
        value = getattr(args, action.dest)
        assert value == float(text) and math.isfinite(value), (text, value)
        taken += 1
    assert taken


# What a fp32 computation, a machine or a person cannot bear, though each is a finite number.
SENSELESS = {
    "grpo": ["--temperature=1e-40", "--temperature=1e-5", "--temperature=1e5", "--lr=1e300", "--lr=2", "--lr=1e-300",
             "--clip-high=1e300", "--kl=1e300", "--grad-clip=1e-40", "--max-new-tokens=1000000000", "--temperature=0",
             "--group=1000000000", f"--seed={10**30}", f"--steps={10**18}", "--steps=0", "--top-p=0", "--top-p=1.5",
             "--max-pixels=0", "--vllm-memory=1", "--updates=100000", "--format-weight=1e300"],
    "dpo": ["--beta=1e300", "--beta=0", "--beta=1e-40", "--sft-weight=1e300", "--lr=0", f"--batch={10**9}"],
    "distill": ["--temperature=1e-40", f"--samples={10**9}"],
    "eval": ["--temperature=1e-40", f"--samples={10**9}", "--ood-weights=a=0", "--ood-weights=a=nan",
             "--ood-weights=a=1e300", "--ood-weights=a= 1", "--ood-weights=a=１"],
    "jigsaw": [f"--rows={10**9}", f"--cols={10**400}", f"--size={10**5}", f"--count={10**18}", "--mask-ratio=0.5"],
    "toy.tiny_model": [f"--hidden={2**40}", f"--layers={10**9}", f"--vocab={10**12}"],
    "plan": [f"--gpus={10**9}", "--gpu-gib=1e-40"],
}  # fmt: skip


@pytest.mark.parametrize("stage, flag", [(stage, flag) for stage, flags in SENSELESS.items() for flag in flags])
def test_a_number_that_nobody_can_mean_is_refused(stage, flag, capsys):
    args, err = parse(stage, capsys, flag)
    assert args is None
    check_one_line(err, flag.split("=")[0])


def test_0_is_taken_where_it_means_off_and_nothing_between_it_and_the_least(capsys):
    assert parse("eval", capsys, "--temperature", "0")[0].temperature == 0
    assert parse("grpo", capsys, "--grad-clip", "0")[0].grad_clip == 0
    assert parse("grpo", capsys, "--temperature", "1e-4")[0].temperature == 1e-4
    assert "must be 0 or lie in [1e-4, 1e4], not 1e-5" in parse("eval", capsys, "--temperature", "1e-5")[1]


# A word that no file and no model is called.
NO_NAMES = {
    "": "is empty",
    "a\0b": "control character",
    "a\nb": "control character",
    "a\x1b[31mb": "control character",
    bytes_of(b"a\xffb"): "not UTF-8",
    "a\udc80": "not UTF-8",
    "a" * 10_000: "more than 255 bytes",
    f"b/{'é' * 200}/c": "more than 255 bytes",
}


@pytest.mark.parametrize("stage, flag", NAMES)
def test_a_word_that_can_be_no_name_is_refused_in_one_line_that_names(stage, flag, capsys):
    for text, problem in NO_NAMES.items():
        for words in ([flag, text], [f"{flag}={text}"]):
            args, err = parse(stage, capsys, *words)
            assert args is None, words
            check_one_line(err, flag)
            assert problem in err, err


def test_a_name_of_other_alphabets_and_with_blanks_is_taken(capsys):
    args, _ = parse("dpo", capsys, "--out", "läufe/第一 🙂/a=b")
    assert args.out == "läufe/第一 🙂/a=b"


def test_unknown_flags_are_shown_without_what_a_terminal_would_obey(capsys):
    for stage in STAGES:
        args, err = parse(stage, capsys, "--tempo\x1b[31m\ud800")
        assert args is None
        check_one_line(err, "--tempo\\x1b[31m\\ud800")


@pytest.mark.parametrize("interval", ["[1, 10]", "(0, 1]", "[0, inf)", "[0, 0.5)", "[16, 4096]"])
def test_both_readers_of_numbers_give_the_same(interval):
    for kind in ("integer", "real"):
        found = []
        for module in TWINS:
            read = getattr(module, kind)(interval)
            found.append([])
            for text in [*NONSENSE, "-1", "0", "0.5", "1", "7", "4096", "1e2", "1e-9"]:
                try:
                    found[-1].append(read(text))
                except argparse.ArgumentTypeError as error:
                    found[-1].append(str(error))
        assert found[0] == found[1]


COMMANDS = {
    "grpo": "--temperature=1e-40",
    "dpo": "--beta=nan",
    "distill": "--samples=1_0",
    "eval": "--seed=-1",
    "jigsaw": "--rows=1000000000",
}


def test_as_a_command_a_stage_ends_with_2_and_one_line():
    for stage, flag in COMMANDS.items():
        status, out, err = end(start(ROOT / f"{stage}.py", *NEEDED[stage], flag))
        assert (status, out) == (2, ""), (stage, err)
        check_one_line(err, flag.split("=")[0])
