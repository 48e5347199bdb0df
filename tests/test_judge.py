"""judge.py and claims.py: what a lenient reader takes from a reply, and when a reason contradicts its answer."""

import json
import random
import time
from pathlib import Path

import pytest
from test_rewards import CLOCK, HOSTILE, KINDS, SHREDS, grid, letter, of, read_clock, think

import claims
import judge
import rewards

DATA = Path(__file__).parent / "data"
COLUMN = ["above", "below"]
GRID = ["below and right", "above and right", "above and left", "above", "below and left", "below", "left", "right"]


def labelled(name):
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def choice(options, prompt=""):
    return {"answer_type": "letter", "answer": "A", "options": options, "prompt": prompt}


def asks(piece, other):
    return f"Where was the piece now at position {piece}, relative to the piece now at position {other}?"


def same(found, wanted, record):
    """Equal, up to the case of texts and the writing of a number."""
    if found is None or wanted is None or found == wanted:
        return found == wanted
    return record["answer_type"] in ("math", "text") and rewards.is_right(found, {**record, "answer": wanted})


# ---------------------------------------------------------------------------------------------------------------------
# The labelled sets: written by hand by somebody who had not seen the code


def alarms_and_misses(name):
    """Ids of the rows that `contradicts` calls a contradiction wrongly, and of those where it sees none."""
    rows = labelled(name)
    wrong = [row for row in rows if judge.contradicts(row["reason"], row["given"], row) != row["contradicts"]]
    alarms = [row["id"] for row in wrong if not row["contradicts"]]
    return alarms, [row["id"] for row in wrong if row["contradicts"]]


def test_no_false_alarm_and_at_most_two_misses_on_the_labelled_reasons():
    alarms, misses = alarms_and_misses("labelled_reasons.jsonl")
    assert alarms == []
    assert len(misses) <= 2, misses


def test_the_answers_of_the_labelled_replies_are_found_and_none_where_there_is_none():
    rows = labelled("labelled_find.jsonl")
    found = {row["id"]: judge.find_answer(row["reply"], row) for row in rows}
    invented = [row["id"] for row in rows if row["found"] is None and found[row["id"]] is not None]
    missed = [row["id"] for row in rows if not same(found[row["id"]], row["found"], row)]
    assert invented == []
    assert len(missed) <= 0.05 * len(rows), missed


# ---------------------------------------------------------------------------------------------------------------------
# Lenient reading


@pytest.mark.parametrize(
    "reply",
    [
        think("B"),
        "<answer>B</answer>",
        "A it is. <answer>B</answer> so",
        "<think>R</think><answer>B",
        "<think>R</think>Answer:B",
        "<think>R\nB</think>",
        "<think>R</think>B",
        "R B <think>R</think>\nB",
        "R\nB",
        "R\nThe answer is B.",
        "It is dark. so it was below. B",
        "R \\boxed{B} and so on",
        "R\nAnswer: B\nI hope this helps",
        "<think>R Answer: B</think>",
        "B",
        '{"reason": "A", "answer": "B"}',
        "<reason>A</reason><result>B</result>",
        "<answer>B</answer><answer>(B)</answer>",
    ],
)
def test_a_reader_finds_b_in_a_malformed_reply(reply):
    assert judge.find_answer(reply, letter("B")) == "B"


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "R",
        "A or B",
        "<answer>A</answer><answer>B</answer>",
        "\\boxed{A} \\boxed{B}",
        "<answer>A or B</answer>",
        "A is above, B is below",
        "R B",
    ],
)
def test_a_reader_finds_nothing_where_nothing_or_two_things_are_said(reply):
    assert judge.find_answer(reply, letter("B")) is None


def test_the_asked_place_goes_before_every_other_place():
    assert judge.find_answer("<think>\\boxed{A}\nAnswer: A</think><answer>B</answer>", letter()) == "B"
    assert judge.find_answer("<answer>A</answer>\nAnswer: B", letter("B", "line")) == "B"
    assert judge.find_answer("Answer: A\n<answer>B</answer> so", letter("B", "line")) == "B"


# ---------------------------------------------------------------------------------------------------------------------
# Contradictions


@pytest.mark.parametrize(
    "reason, answer, expected",
    [
        ("it is darker so it is below", "B", False),
        ("it is darker so it is below", "A", True),
        ("it is darker so it is above", "B", True),
        ("it is darker so the answer is A", "B", True),
        ("it is darker so the answer is A", "A", False),
        ("The light is above. So it is below.", "B", False),
        ("The light is below. So it is above.", "B", True),
        ("It is above and left", "C", False),
        ("It is above and left", "A", True),
        ("It is above", "C", True),
        ("above or below", "A", False),
        ("either above or above and left", "B", False),
        ("It is not option A", "B", False),
        ("It is not above", "B", False),
        ("It is not above", "A", True),
        ("It is not above, so it is below", "A", True),
        ("It isn't quite above, so below", "B", False),
        ("A dark piece lies under a light one", "B", False),
        ("option A it is", "B", True),
        ("(A)", "B", True),
        ("so above, so B", "B", True),
        ("so below, so B", "B", False),
        ("it is aboveground", "B", False),
        ("it is darker", "B", False),
        ("", "B", False),
        ("below. It is darker. It is blue.", "A", False),
    ],
)
def test_reasoning_that_ends_in_another_option_contradicts_the_answer(reason, answer, expected):
    assert judge.contradicts(reason, answer, letter()) is expected


def test_without_options_only_letters_can_contradict():
    record = of("letter", "Q")
    assert judge.contradicts("it is round, so the answer is O", "Q", record) is True
    assert judge.contradicts("it is round, so the answer is Q", "Q", record) is False
    assert judge.contradicts("it is round", "Q", record) is False


def test_numbers_and_grids_after_a_conclusion_word_are_compared():
    digit = of("digit", 5)
    assert judge.contradicts("3 + 1 = 4", 5, digit) is True
    assert judge.contradicts("3 + 2 = 5", 5, digit) is False
    assert judge.contradicts("I see 3 and 2", 5, digit) is False
    assert judge.contradicts("so the answer is 4 because of 3", 5, digit) is False
    assert judge.contradicts("so the answer is 4", 5, digit) is True
    assert judge.contradicts("so it is 0.25", "0.5", of("math", "0.5")) is True
    assert judge.contradicts("so it is 0.50", "0.5", of("math", "0.5")) is False
    assert judge.contradicts("so it is 101.", "100", of("math", "100")) is True
    assert judge.contradicts("so it is 0.33.", "0.333", of("math", "0.333")) is False
    assert judge.contradicts("Therefore 1 2 4 3.", [2, 1, 4, 3], grid()) is True
    assert judge.contradicts("The answer is:\n2 1\n4 3", [2, 1, 4, 3], grid()) is False
    assert judge.contradicts("so the answer is 3 1", [2, 1, 4, 3], grid()) is False


# ---------------------------------------------------------------------------------------------------------------------
# More reasons and replies, written beside the code: most rules with a case that they must not catch


def test_a_reason_contradicts_only_what_it_plainly_does_not_conclude():
    alarms, misses = alarms_and_misses("judge_reasons.jsonl")
    assert alarms == []
    assert len(misses) <= 4, misses  # of 84; what they say is plain to a person only


@pytest.mark.parametrize("row", labelled("judge_find.jsonl"), ids=lambda row: row["id"])
def test_a_reader_takes_what_a_reply_says_and_nothing_else(row):
    found = judge.find_answer(row["reply"], row)
    assert same(found, row["found"], row), found


def test_the_pair_of_the_record_goes_before_that_of_its_prompt():
    record = {**choice(COLUMN), "pair": [2, 1]}
    assert judge.contradicts("Patch 1 is above patch 2.", "A", record) is True
    assert judge.contradicts("Patch 2 is above patch 1.", "A", record) is False
    assert judge.contradicts("Patch 1 is above patch 2.", "B", {**record, "prompt": asks(1, 2)}) is False


def test_without_a_pair_a_sentence_about_two_pieces_says_nothing():
    assert judge.contradicts("Patch 1 is above patch 2.", "B", choice(COLUMN)) is False
    assert judge.contradicts("So it was above.", "B", choice(COLUMN)) is True


def test_the_shorthand_names_pieces_letters_and_texts():
    question = claims.question_of(choice(COLUMN, asks(2, 1)))
    text = claims.shorthand("Therefore the piece at position 2 isn't beneath the first one (A)", question)
    assert text.split() == "therefore piece:2 is not text:b piece:1 letter:a".split()


# ---------------------------------------------------------------------------------------------------------------------
# New types and formats


def test_a_type_that_the_judge_does_not_know_is_read_by_its_grammar_and_never_contradicts(monkeypatch):
    monkeypatch.setitem(rewards.ANSWER_TYPES, "clock", CLOCK)
    record = of("clock", "7:45")
    assert judge.find_answer("<think>R\nAnswer: 7:45", record) == 465
    assert judge.find_answer("<answer>7:45</answer><answer>8:00</answer>", record) is None
    assert judge.contradicts("so it is 8:00", 465, record) is False


def test_one_entry_in_the_judges_table_lets_a_type_contradict(monkeypatch):
    def clock_contradicts(tail, answer, record):
        return read_clock(tail.split()[-1], record) not in (None, answer)

    monkeypatch.setitem(rewards.ANSWER_TYPES, "clock", CLOCK)
    monkeypatch.setitem(judge.CONTRADICTIONS, "clock", clock_contradicts)
    record = of("clock", "7:45")
    assert judge.contradicts("so it is 8:00", 465, record) is True
    assert judge.contradicts("so it is 7:45", 465, record) is False
    assert judge.contradicts("so it is late", 465, record) is False
    assert judge.contradicts(" \n", 465, record) is False
    assert judge.contradicts("so it is 8:00", None, record) is False


def test_a_new_reply_format_is_a_place_where_an_answer_may_stand(monkeypatch):
    def read_arrow(reply):
        reason, arrow, answer = reply.partition("=>")
        return (reason, answer) if arrow else None

    monkeypatch.setitem(rewards.REPLY_FORMATS, "arrow", rewards.ReplyFormat(read_arrow, answer_may_be_wrapped=False))
    assert judge.find_answer("R => B", letter("B", "think")) == "B"


# ---------------------------------------------------------------------------------------------------------------------
# Hostile replies

PROSE = {
    "asterisks": "*" * 99_000,
    "stars and words": "*a " * 33_000,
    "backticks": "`" * 99_000,
    "fences": "```\n" * 24_000,
    "headings": "# " * 49_000,
    "spaces before a line": " " * 99_000 + "A",
    "answers without end": "answer" * 16_000,
    "the answer is, and spaces": "answer is" + " " * 99_000 + "A",
    "colons": ":" * 99_000,
    "colons and lines": ": \n" * 33_000,
    "sentences": "So A. " * 16_000,
    "denials": "not " * 24_000,
    "brackets of numbers": "[1, " * 24_000,
    "numbers": "= 1 " * 24_000,
    "a long run": "1 2 " * 24_000,
    "pieces": "piece " * 16_000,
    "directions": "above and " * 9_000,
    "tables": "|" * 99_000,
    "signs of other keyboards": "−" * 99_000,
    "one long word": "a" * 99_000,
    "tokens of the shorthand": "letter:a text: piece:" * 4_000,
}


# One record of each kind, and a given answer of that kind
HOSTS = [
    (letter("A"), "B"),
    (choice(GRID, asks(1, 4)), "B"),
    (of("digit", 1), 1),
    (grid(), [2, 1, 4, 3]),
    (of("box", [0, 0, 1, 1]), [0, 0, 1, 1]),
    (of("text", "yes"), "yes"),
    (of("math", "1"), "1"),
]


@pytest.mark.parametrize("record, given", HOSTS)
def test_hostile_replies_and_reasons_are_read_in_linear_time_and_never_raise(record, given):
    for name, text in (HOSTILE | PROSE).items():
        start = time.perf_counter()
        judge.find_answer(text, record)
        judge.contradicts(text, given, record)
        assert time.perf_counter() - start < 2.0, name


def test_a_hostile_prompt_does_not_make_reading_slow():
    for name, text in PROSE.items():
        start = time.perf_counter()
        judge.contradicts("So piece 1 was above piece 2.", "B", choice(COLUMN, text))
        assert time.perf_counter() - start < 2.0, name


def test_random_shreds_of_replies_and_of_prose_never_raise():
    rng = random.Random(5)
    words = ["piece 1", " is ", "below", "position 2", "So ", ". ", "**", "the answer is ", "no", "Wait", "−3", "= 4"]
    shreds = SHREDS + words
    for _ in range(4000):
        reply = "".join(rng.choice(shreds) for _ in range(rng.randrange(1, 14)))
        record = rng.choice([*KINDS[:14], choice(GRID, asks(1, 4))])
        judge.contradicts(reply, judge.find_answer(reply, record), record)
