"""distill.py: the five corruptions letter by letter, which replies make a pair, and a real run with tiny models."""

import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import distill
import jigsaw
import judge
import model
import rewards
import run_directory
import training
from records import DataError, read_records, write_jsonl
from toy.scenes import scene
from toy.tiny_model import make_tiny

REPLY = " <think>1 is dark.\nso below</think>\n<answer> (B) </answer>! "
RECORD = {
    "answer_type": "letter",
    "answer": "B",
    "options": ["above", "below"],
    "think": True,
    "reply_format": "think",
    "prompt": "where?",
}
GOOD = "<think>dark, so below</think><answer>B</answer>"
WRONG = "<think>dark, so above</think><answer>A</answer>"
TWISTED = "<think>dark, so above</think><answer>B</answer>"  # right, but the reasoning says the other option
LOOSE = "dark, so below.\nAnswer: B"  # right, and no corruption changes it


def pair_of(policy, base, record=RECORD, seed=0, **options):
    return distill.make_pair(record, policy, base, random.Random(seed), **options)


# ---------------------------------------------------------------- corruptions


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("all_tags", " 1 is dark.\nso below\n (B) ! "),
        ("answer_tags", " <think>1 is dark.\nso below</think>\n (B) ! "),
        ("think_tags", " 1 is dark.\nso below\n<answer> (B) </answer>! "),
        ("answer_tags_think_end", " <think>1 is dark.\nso below\n (B) ! </think>"),
        ("answer_text", " <think>1 is dark.\nso below</think>\nAnswer: (B) ! "),
    ],
)
def test_each_corruption_moves_its_tags_and_no_other_character(kind, expected):
    assert distill.corrupt(REPLY, kind) == expected


def test_the_corruptions_are_the_five_of_the_paper():
    assert distill.CORRUPTIONS == ("all_tags", "answer_tags", "think_tags", "answer_tags_think_end", "answer_text")


def test_every_corruption_breaks_the_format_and_leaves_the_answer_to_a_reader():
    for reply in (GOOD, "<think>R\nR</think>\n\n<answer>The answer is $\\boxed{B}$</answer>\n"):
        texts = {distill.corrupt(reply, kind) for kind in distill.CORRUPTIONS}
        assert len(texts) == 5
        for text in texts:
            assert rewards.score(text, RECORD)["reward"] == 0.0, text


def test_a_reply_without_the_tags_comes_back_unchanged():
    for kind in distill.CORRUPTIONS:
        assert distill.corrupt(LOOSE, kind) == LOOSE
        assert distill.corrupt("", kind) == ""
    assert distill.corrupt("<think>R</think>B", "answer_tags") == "<think>R</think>B"
    assert distill.corrupt("<think>R</think>B", "answer_text") == "<think>R</think>B"
    assert distill.corrupt("R<answer>B</answer>", "think_tags") == "R<answer>B</answer>"
    assert distill.corrupt("R<answer>B</answer>", "answer_tags_think_end") == "R<answer>B</answer>"


def test_an_unknown_corruption_is_an_error():
    with pytest.raises(ValueError, match="all_caps"):
        distill.corrupt(REPLY, "all_caps")


# ---------------------------------------------------------------- pairs


def test_chosen_is_the_policys_and_rejected_the_bases_broken():
    base = "<think>no light, so below</think><answer>(B)</answer>"
    pair, why = pair_of([GOOD], [base])
    assert why is None
    assert pair["chosen"] == GOOD
    assert pair["rejected"] == distill.corrupt(base, pair["corruption"]) != base
    assert pair["prompt"] == "where?" and pair["answer"] == "B"


def test_the_five_corruptions_are_equally_likely():
    counts = Counter(pair_of([GOOD], [GOOD], seed=seed)[0]["corruption"] for seed in range(2000))
    assert set(counts) == set(distill.CORRUPTIONS)
    assert all(330 < count < 470 for count in counts.values()), counts  # 400 each; 4 standard deviations are 72


def test_a_base_reply_that_no_corruption_changes_is_rejected_as_it_is():
    pair, _ = pair_of([GOOD], [LOOSE])
    assert (pair["rejected"], pair["corruption"]) == (LOOSE, None)


def test_only_corruptions_that_change_a_half_tagged_reply_are_drawn():
    half = "dark<answer>B</answer>"
    kinds = {pair_of([GOOD], [half], seed=seed)[0]["corruption"] for seed in range(60)}
    assert kinds == {"all_tags", "answer_tags", "answer_text"}


def test_a_corruption_that_repairs_the_format_is_never_drawn():
    bare = {**RECORD, "think": False, "reply_format": "bare"}
    for seed in range(30):
        pair, _ = pair_of(["B"], ["<answer>B</answer>"], bare, seed)
        assert pair["corruption"] == "answer_text" and pair["rejected"] == "Answer:B"


@pytest.mark.parametrize(
    "policy, base, reason",
    [
        ([], [GOOD], "policy never finished"),
        ([LOOSE, "B", ""], [GOOD], "policy never well-formed"),
        ([WRONG, LOOSE], [GOOD], "policy never right"),
        ([TWISTED, WRONG], [GOOD], "reasoning contradicts"),
        ([GOOD], [], "base never finished"),
        ([GOOD], [WRONG, "A", "no idea"], "base never right"),
    ],
)
def test_a_question_without_a_pair_says_why(policy, base, reason):
    assert pair_of(policy, base) == (None, reason)


def test_a_base_reply_that_cannot_be_broken_gives_no_pair():
    bare = {**RECORD, "think": False, "reply_format": "bare"}
    assert pair_of(["B"], ["B", " B\n"], bare) == (None, "rejected cannot be broken")


def test_the_first_reply_that_passes_is_taken_on_both_sides():
    better = "<think>first it is dark, so below</think><answer>B</answer>"
    pair, _ = pair_of([WRONG, TWISTED, better, GOOD], [WRONG, "A", LOOSE, GOOD])
    assert (pair["chosen"], pair["rejected"]) == (better, LOOSE)


def test_the_chosen_reply_is_the_first_a_random_the_shortest_or_the_most_typical_of_those_that_pass():
    def said(reason):
        return f"<think>{reason}</think><answer>B</answer>"

    reasons = (
        "well well so it is",
        "1 is so very dark",
        "1 is so very dark that 2",
        "1 is so very dark that 2 is",
        "x",
    )
    odd, few, usual, many, short = map(said, reasons)
    replies = [WRONG, odd, few, usual, many, short, LOOSE]
    picked = {pick: pair_of(replies, [LOOSE], pick=pick)[0]["chosen"] for pick in ("first", "shortest", "typical")}
    assert picked == {"first": odd, "shortest": short, "typical": usual}
    counts = Counter(pair_of(replies, [LOOSE], seed=seed, pick="random")[0]["chosen"] for seed in range(400))
    assert set(counts) == {odd, few, usual, many, short} and min(counts.values()) > 50
    for pick in distill.PICKS:
        assert pair_of([WRONG, GOOD], [LOOSE], pick=pick)[0]["chosen"] == GOOD
        assert pair_of([WRONG], [LOOSE], pick=pick) == (None, "policy never right")
        assert pair_of([TWISTED, WRONG], [LOOSE], pick=pick) == (None, "reasoning contradicts")


def test_the_account_says_who_was_dropped_why_and_how_the_pairs_look():
    outcomes = [pair_of([GOOD], [LOOSE]), pair_of([WRONG], [LOOSE]), pair_of([GOOD], ["A"]), pair_of([WRONG], [LOOSE])]
    told = distill.account([{"id": name} for name in "abcd"], outcomes)
    assert (told["questions"], told["pairs"], told["corruptions"]) == (4, 1, {"malformed already": 1})
    assert told["dropped"] == {"policy never right": ["b", "d"], "base never right": ["c"]}
    assert told["chosen_characters"] == {"least": len(GOOD), "mean": len(GOOD), "most": len(GOOD)}
    # 16 for <think> and </answer>, 10 for what becomes ".\nA" before "nswer", 2 for ": " behind it
    assert told["edit_distance"] == 28
    assert told["overlap"] == 0.0 and distill.overlap({1, 2, 3}, {2, 3, 4}) == 0.5


def test_without_the_judge_a_contradiction_passes():
    assert pair_of([TWISTED], [LOOSE], judge="none")[0]["chosen"] == TWISTED


def test_coupled_pairs_may_differ_in_correctness():
    pair, _ = pair_of([GOOD], [WRONG], coupled=True)
    assert pair["chosen"] == GOOD and judge.find_answer(pair["rejected"], RECORD) in ("A", None)
    assert pair["rejected"] == distill.corrupt(WRONG, pair["corruption"])


def test_the_chosen_reply_itself_can_be_corrupted():
    pair, _ = pair_of([GOOD], [], reject_from="chosen")
    assert pair["rejected"] == distill.corrupt(GOOD, pair["corruption"])


def test_without_a_rejected_reply_the_base_is_not_asked():
    pair, why = pair_of([WRONG, TWISTED, GOOD], [], reject_from="none")
    assert why is None and pair == {**RECORD, "chosen": GOOD}
    assert pair_of([WRONG, LOOSE], [], reject_from="none") == (None, "policy never right")
    told = distill.account([{"id": "a"}, {"id": "b"}], [(pair, None), (None, "policy never right")])
    assert told["chosen_characters"]["most"] == len(GOOD) and told["dropped"] == {"policy never right": ["b"]}
    assert (told["pairs"], told["corruptions"]) == (1, {}) and not {"overlap", "rejected_characters"} & set(told)
    assert distill.summary([(pair, None)]).split("\n") == ["1 questions", "      1  100.0 %  gave a pair"]


GOLDS = [  # answer type, gold, what its reply says
    ("letter", "B", "B"),
    ("digit", 12, "12"),
    ("grid", [2, 1, 4, 3], "2 1 4 3"),
    ("box", [10, 20.5, 30.123456789012, 44], "10, 20.5, 30.12, 44"),
    ("point", [10, 20, 21, 60], "15.5, 40.0"),
    ("math", r"\frac{1}{2}", r"\frac{1}{2}"),
    ("text", ["two dogs", "2 dogs"], "two dogs"),
]


@pytest.mark.parametrize("kind, gold, said", GOLDS)
@pytest.mark.parametrize("form", ["bare", "boxed"])
def test_a_gold_reply_is_the_gold_in_the_records_format_and_earns_the_whole_reward(kind, gold, said, form):
    record = {"answer_type": kind, "answer": gold, "think": False, "reply_format": form, "rows": 2, "cols": 2}
    reply = distill.gold_reply(record)
    assert reply == (said if form == "bare" else rf"\boxed{{{said}}}")
    assert rewards.score(reply, record)["reward"] > 1.49
    assert pair_of([reply], [], record, reject_from="none")[0]["chosen"] == reply


@pytest.mark.parametrize("form", ["think", "tags", "json", "line"])
def test_a_format_with_a_reason_has_no_gold_reply(form):
    with pytest.raises(ValueError, match=f"--gold: the reply format {form} asks for a reason"):
        distill.gold_reply({**RECORD, "reply_format": form})


def test_a_grid_must_be_wholly_right_and_a_box_half():
    grid = {"answer_type": "grid", "answer": [2, 1, 4, 3], "rows": 2, "cols": 2, "think": True}
    assert distill.is_right([2, 1, 4, 3], grid) and not distill.is_right([2, 1, 3, 4], grid)
    box = {"answer_type": "box", "answer": [0, 0, 10, 10], "think": True}
    assert distill.is_right([0, 0, 10, 5], box) and not distill.is_right([0, 0, 10, 4.9], box)
    assert not distill.is_right(None, grid)


def count_reads(monkeypatch):
    """A counter of how often each text is split into reason and answer."""
    reads, split = Counter(), rewards.read_reply

    def counting(reply, format_name):
        reads[reply] += 1
        return split(reply, format_name)

    monkeypatch.setattr(rewards, "read_reply", counting)
    monkeypatch.setattr(judge, "read_reply", counting)
    return reads


def test_an_easy_pair_reads_each_text_once(monkeypatch):
    reads = count_reads(monkeypatch)
    base = "<think>no light, so below</think><answer>(B)</answer>"
    assert pair_of([GOOD, GOOD + " "], [base, LOOSE])[1] is None
    broken = {distill.corrupt(base, kind) for kind in distill.CORRUPTIONS}
    assert reads == dict.fromkeys([GOOD, base, *broken], 1)


def test_a_corrupted_chosen_reply_is_read_once_itself(monkeypatch):
    reads = count_reads(monkeypatch)
    assert pair_of([GOOD], [], reject_from="chosen")[1] is None
    broken = {distill.corrupt(GOOD, kind) for kind in distill.CORRUPTIONS}
    assert reads == dict.fromkeys([GOOD, *broken], 1)


def test_a_scored_reply_is_what_the_reward_says(monkeypatch):
    for reply in (GOOD, WRONG, LOOSE, "", "<think>R</think><answer>C</answer>"):
        scored, parts = distill.read(reply, RECORD), rewards.score(reply, RECORD)
        assert (scored.answer, scored.well_formed) == (parts["answer"], parts["format"] == 1.0)
        assert scored.right == (parts["accuracy"] == 1.0)


def test_the_account_counts_every_question_once():
    outcomes = [pair_of([GOOD], [LOOSE])] * 3 + [pair_of([WRONG], [LOOSE])] * 4 + [pair_of([GOOD], ["A"])]
    assert distill.summary(outcomes).split("\n") == [
        "8 questions",
        "      3   37.5 %  gave a pair",
        "      4   50.0 %  none: policy never right",
        "      1   12.5 %  none: base never right",
        "rejected replies, broken by",
        "      3  100.0 %  malformed already",
    ]


REPLIES = (
    GOOD, WRONG, TWISTED, LOOSE, "B", "B.", "the answer is (B)", "A. above\nB. below\nAnswer: B", "", "1",
    "<think>so A, B, not C</think><answer>B</answer>", "<think>1 is above, not 2</think><answer>above</answer>",
    "<think>so 2</think><answer>1</answer>", "<think>None</think><answer>(B) None</answer>",
)  # fmt: skip


@pytest.mark.parametrize("options", [None, ..., ["above", "below"], ["1", "2"], ["", ""], ["B", "A"], ["a", "A", "a"]])
@pytest.mark.parametrize("kind", ["think", "bare", "boxed", "json", "tags", "line"])
def test_letters_with_any_options_or_none_are_paired_or_dropped_with_a_reason(options, kind):
    record = {key: value for key, value in RECORD.items() if key != "options"} | {"reply_format": kind}
    record["think"] = kind != "bare"
    if options is not ...:
        record["options"] = options
    rewards.check_gold(record)
    for chosen in REPLIES:
        for rejected in REPLIES:
            for coupled in (False, True):
                pair, why = pair_of([chosen], [rejected], record, coupled=coupled)
                assert (pair is None) == bool(why)


# ---------------------------------------------------------------- the stage

SAID = "<think>1 looks dark, 2 looks light.</think><answer>B</answer>"
COUNT = 7


def write_records(folder):
    """COUNT pair puzzles from built-in scenes, some with the answer A, some with B."""
    rng, rows = random.Random(3), []
    for number in range(COUNT):
        puzzle, record = jigsaw.make_puzzle(scene(rng), 2, 1, "pair", rng)
        puzzle.save(folder / f"{number}.png")
        rows.append({"id": f"p{number}", "images": [f"{number}.png"], **record})
    write_jsonl(folder / "records.jsonl", rows)
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with puzzles, "tiny", a model of random weights, and "parrot", one that says SAID to everything."""
    folder = tmp_path_factory.mktemp("distill")
    records = write_records(folder)
    assert 2 <= sum(record["answer"] == "B" for record in records) <= COUNT - 2
    make_tiny(folder / "tiny")
    policy, encoder = model.load(str(folder / "tiny"), training.setup(), train=True)
    optimizer = training.adamw(policy, 1e-2)
    read = read_records(folder / "records.jsonl")[:3]
    groups = [(encoder.prompt(record), [encoder.encode_reply(SAID)]) for record in read]
    for _ in range(200):
        logp, mask = model.log_probs(policy, groups)
        loss = -logp[mask].mean()
        if loss < 0.005:
            break
        loss.backward()
        training.update(policy, optimizer, 1e-2, 1.0)
    assert loss < 0.005
    run_directory.save_model(policy, encoder, folder / "parrot")
    return folder


def flags(folder, **more):
    """The command line of a small run in `folder`; more: flags to add or change."""
    given = {"policy": folder / "parrot", "base": folder / "parrot", "data": folder / "records.jsonl"}
    given |= {"out": folder / "pairs.jsonl", "samples": 2, "max-new-tokens": 40, "temperature": 0.3, **more}
    return [text for name, value in given.items() for text in (f"--{name}", str(value))]


def lines_of(path):
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_run_writes_a_pair_for_each_question_the_models_get_right(place, capsys):
    distill.main(flags(place, out=place / "out" / "pairs.jsonl"))
    pairs, records = lines_of(place / "out" / "pairs.jsonl"), lines_of(place / "records.jsonl")
    assert [pair["id"] for pair in pairs] == [record["id"] for record in records if record["answer"] == "B"]
    for pair in pairs:
        assert pair["chosen"] == SAID
        assert pair["rejected"] == distill.corrupt(SAID, pair["corruption"])
        assert pair["chosen_from"] == pair["rejected_from"] == str(place / "parrot")
        assert not any(key.startswith("_") for key in pair)
    printed = capsys.readouterr().out
    assert (
        f"{COUNT} questions" in printed
        and f"{COUNT - len(pairs):7d}" in printed
        and "none: policy never right" in printed
    )
    read = read_records(place / "out" / "pairs.jsonl", rewards.check_gold, ("chosen", "rejected"))
    assert [Path(record["images"][0]).parent for record in read] == [place] * len(pairs)


def test_batches_and_processes_do_not_matter_but_the_seed_does(place):
    distill.main(flags(place, out=place / "one.jsonl"))
    distill.main(flags(place, out=place / "other.jsonl", seed=1))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [sys.executable, distill.__file__, *flags(place, out=place / "ranks.jsonl", batch=2)]
    ranks = [  # what torchrun starts, without the seconds that torchrun itself takes
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **where, "RANK": str(rank)})
        for rank in range(2)
    ]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert f"{COUNT} questions" in printed[0] and "questions" not in printed[1]
    assert (place / "one.jsonl").read_text() == (place / "ranks.jsonl").read_text()
    one, other = lines_of(place / "one.jsonl"), lines_of(place / "other.jsonl")
    assert [pair["corruption"] for pair in one] != [pair["corruption"] for pair in other]


def test_rejected_can_come_from_chosen_without_a_base(place):
    given = flags(place, out=place / "self.jsonl", **{"reject-from": "chosen"})
    base = given.index("--base")
    distill.main(given[:base] + given[base + 2 :])
    for pair in lines_of(place / "self.jsonl"):
        assert pair["rejected"] == distill.corrupt(pair["chosen"], pair["corruption"])
        assert pair["rejected_from"] == str(place / "parrot")


def without(given, *names):
    """A command line without these flags and their values."""
    for name in names:
        place = given.index(name)
        given = given[:place] + given[place + 2 :]
    return given


def test_for_sft_the_models_own_right_replies_are_kept_and_nothing_is_rejected(place):
    given = flags(place, out=place / "own.jsonl", **{"reject-from": "none"})
    distill.main(without(given, "--base"))
    pairs = lines_of(place / "own.jsonl")
    right = [record["id"] for record in lines_of(place / "records.jsonl") if record["answer"] == "B"]
    assert [pair["id"] for pair in pairs] == right
    for pair in pairs:
        assert (pair["chosen"], pair["chosen_from"]) == (SAID, str(place / "parrot"))
        assert not {"rejected", "rejected_from", "corruption"} & set(pair)


def test_for_sft_the_gold_answers_are_written_without_a_model(place, monkeypatch):
    monkeypatch.setattr(model, "load", None)
    rows = [{**row, "think": False} for row in lines_of(place / "records.jsonl")]
    write_jsonl(place / "bare.jsonl", rows)
    given = without(flags(place, data=place / "bare.jsonl", out=place / "gold.jsonl"), "--policy", "--base")
    given += ["--gold", "--reject-from", "none"]
    distill.main(given)
    pairs = lines_of(place / "gold.jsonl")
    assert [(pair["id"], pair["chosen"]) for pair in pairs] == [(row["id"], row["answer"]) for row in rows]
    assert {pair["chosen_from"] for pair in pairs} == {"gold"} and "rejected" not in pairs[0]
    read_records(place / "gold.jsonl", rewards.check_gold, ("chosen",))  # as dpo.py --loss sft reads it
    assert not (place / "gold.jsonl.partial").exists()
    distill.main([*given, "--resume"])  # a finished file is known again
    with pytest.raises(DataError, match=r"records\.jsonl:1: --gold: the reply format think asks for a reason"):
        distill.main([*given, "--data", str(place / "records.jsonl")])


def test_an_untrained_model_gives_no_pairs_and_the_account_says_why(place, capsys):
    with pytest.raises(DataError, match="no pairs: none of the 3 questions"):
        distill.main(flags(place, policy=place / "tiny", out=place / "none.jsonl", limit=3))
    printed = capsys.readouterr().out
    assert "3 questions" in printed and "0.0 %  gave a pair" in printed and "none: policy never" in printed
    assert not (place / "none.jsonl").exists()


def test_a_reply_that_was_cut_is_not_used(place, capsys):
    length = len(model.load(str(place / "parrot"), training.setup())[1].encode_reply(SAID))
    cut = flags(place, out=place / "cut.jsonl", **{"max-new-tokens": length - 1})  # all but the end token
    with pytest.raises(DataError, match="no pairs"):
        distill.main(cut)
    assert f"{COUNT:7d}  100.0 %  none: policy never finished" in capsys.readouterr().out


def test_no_pairs_is_exit_status_two_and_one_line(place, capsys, monkeypatch):
    given = flags(place, policy=place / "tiny", out=place / "nothing.jsonl", limit=1)
    monkeypatch.setattr(sys, "argv", ["distill.py", *given])
    with pytest.raises(SystemExit) as stop:
        training.run(distill.main)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    errors = [line for line in printed.err.split("\n") if "error" in line]
    cause = f"error: no pairs: none of the 1 questions gave one, {place / 'nothing.jsonl'} is not written"
    kept = f"the replies are in {place / 'nothing.jsonl.partial'}, for --resume with another --judge or --coupled"
    assert errors == [f"{cause}; {kept}"]
    assert "Traceback" not in printed.err and "1 questions" in printed.out


@pytest.mark.parametrize(
    "more, cause",
    [
        ({"policy": "nowhere"}, "--policy nowhere"),
        ({"base": "nowhere"}, "--base nowhere"),
        ({"data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"out": "."}, "--out"),
    ],
)
def test_bad_input_is_found_before_a_model_is_loaded(place, more, cause, monkeypatch):
    monkeypatch.setattr(model, "load", None)
    with pytest.raises(DataError, match=cause):
        distill.main(flags(place, **more))


def test_a_record_that_cannot_be_scored_is_named_with_its_line(place):
    rows = lines_of(place / "records.jsonl")
    rows[1]["answer"] = "C"
    write_jsonl(place / "bad.jsonl", rows)
    with pytest.raises(DataError, match=r"bad\.jsonl:2: answer 'C'"):
        distill.main(flags(place, data=place / "bad.jsonl"))


@pytest.mark.parametrize(
    "more",
    [
        {"samples": 0},
        {"batch": 0},
        {"seed": -1},
        {"temperature": 0},
        {"temperature": -1},
        {"temperature": 1e-40},
        {"temperature": "nan"},
        {"samples": 10**9},
        {"max-new-tokens": 10**12},
        {"judge": "rules"},
        {"reject": "base"},
    ],
)
def test_a_flag_out_of_range_is_exit_status_two(more, capsys):
    with pytest.raises(SystemExit) as stop:
        distill.parse_args(flags(Path("x"), **more))
    assert stop.value.code == 2


def test_the_base_is_needed_unless_the_chosen_reply_is_corrupted():
    given = ["--policy", "p", "--data", "d", "--out", "o"]
    for rest in ([], ["--reject-from", "chosen", "--coupled"], ["--reject-from", "none", "--coupled"]):
        with pytest.raises(SystemExit):
            distill.parse_args(given + rest)
    assert distill.parse_args([*given, "--reject-from", "chosen"]).base is None
    assert distill.parse_args([*given, "--reject-from", "none"]).base is None


def test_the_chosen_replies_come_from_a_policy_or_from_the_gold_and_not_from_both(capsys):
    given = ["--data", "d", "--out", "o", "--reject-from", "none"]
    for rest in ([], ["--policy", "p", "--gold"]):
        with pytest.raises(SystemExit):
            distill.parse_args(given + rest)
        assert "one of --policy and --gold" in capsys.readouterr().err
    assert distill.parse_args([*given, "--gold"]).policy is None
