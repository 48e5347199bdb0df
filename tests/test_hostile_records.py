"""Records and replies of every kind, good, bad and absurd: one line of refusal, or a score, and never an exception."""

import random
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import distill
import judge
import rewards

# The same examples in every run, so that a red test is a change of the code; the long search is bench/fuzz.py.
FIXED = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck), max_examples=300
)


def think(answer, reason="it is so"):
    return f"<think>{reason}</think><answer>{answer}</answer>"


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Golds

BIG = 10**100_000
ABSURD = [
    ("grid", [1, 2], {"rows": 10**9, "cols": 10**9}),
    ("grid", [1, 2], {"rows": 10**400, "cols": 2}),
    ("grid", [1, 2], {"rows": BIG, "cols": BIG}),
    ("grid", [1, 2], {"rows": True, "cols": 2}),
    ("grid", [1, 2], {"rows": None, "cols": 2}),
    ("grid", [1, 2], {"rows": [], "cols": {}}),
    ("grid", [1, 2], {"rows": float("nan"), "cols": 2}),
    ("grid", [True, 2], {}),
    ("grid", [BIG, 1], {}),
    ("grid", list(range(1, 10**6)), {}),
    ("grid", deep(50_000), {}),
    ("box", [0, 0, 10**400, 5], {}),
    ("box", [0, 0, 10**200, 10**200], {}),
    ("box", [0, 0, BIG, 5], {}),
    ("box", [0, 0, float("nan"), 5], {}),
    ("box", [0, 0, float("inf"), 5], {}),
    ("box", [False, 0, True, 5], {}),
    ("box", [-1e308, 0, 1e308, 5], {}),
    ("point", [0, 0, 1e300, 1e300], {}),
    ("point", deep(50_000), {}),
    ("digit", BIG, {}),
    ("digit", -BIG, {}),
    ("digit", True, {}),
    ("digit", "9" * 100_000, {}),
    ("math", BIG, {}),
    ("math", float("nan"), {}),
    ("math", True, {}),
    ("math", "1+" * 500_000 + "1", {}),
    ("math", r"\sin x" * 40, {}),
    ("math", "\ud800", {}),
    ("text", "\ud800", {}),
    ("text", ["yes", "\udfff"], {}),
    ("text", "x" * 10**6, {}),
    ("text", ["x"] * 10**6, {}),
    ("text", deep(50_000), {}),
    ("letter", "B", {"options": 7}),
    ("letter", "B", {"options": True}),
    ("letter", "B", {"options": "AB"}),
    ("letter", "B", {"options": [deep(50_000), "b"]}),
    ("letter", "B", {"options": [BIG, 1]}),
    ("letter", "B", {"options": ["a", "\ud800"]}),
    ("letter", "B", {"options": ["a", "x" * 10**6]}),
    ("letter", "B", {"options": ["a", None]}),
    ("letter", "B", {"options": ["a", True]}),
    ("digit", 3, {"options": 7}),
    (deep(50_000), "B", {}),
    ("letter", "B", {"reply_format": deep(50_000)}),
    ("letter", "B", {"reply_format": 10**5000}),
]


@pytest.mark.parametrize("number", range(len(ABSURD)))
def test_an_absurd_record_is_refused_in_one_line_at_once(number):
    kind, gold, fields = ABSURD[number]
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        rewards.check_gold({"answer_type": kind, "answer": gold, "think": True, **fields})
    assert time.process_time() - start < 0.1
    cause = str(error.value)
    assert cause.isprintable() and 10 < len(cause) < 400
    assert any(word in cause for word in ("answer", "rows", "options", "reply_format"))


# ---------------------------------------------------------------------------------------------------------------------
# Any record, any reply

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.characters(categories=["Cs"]),
    st.sampled_from(
        [10**400, 10**4000, float("nan"), float("inf"), -0.0, 1e-300, 1e300, "A", "B", "5", "5 cm", "", " "]
    ),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=5), st.dictionaries(st.sampled_from("AB5"), inner, max_size=3), st.just(deep(99))
    ),
    max_leaves=8,
)
BOXES = st.lists(st.one_of(st.integers(-5, 50), st.floats(-5, 50)), min_size=4, max_size=4)
GOLDS = st.one_of(VALUES, BOXES, st.permutations([1, 2, 3, 4]), st.lists(st.text(min_size=1), min_size=1, max_size=3))
RECORDS = st.fixed_dictionaries(
    {"answer_type": st.one_of(st.sampled_from(list(rewards.ANSWER_TYPES)), VALUES), "answer": GOLDS},
    optional={
        "rows": st.one_of(st.sampled_from([1, 2, 4]), VALUES),
        "cols": st.one_of(st.sampled_from([1, 2, 4]), VALUES),
        "options": st.one_of(st.lists(st.text(max_size=9), min_size=1, max_size=5), VALUES),
        "reply_format": st.one_of(st.sampled_from(list(rewards.REPLY_FORMATS)), VALUES),
        "pair": VALUES,
        "prompt": st.text(max_size=20),
        "think": st.booleans(),
    },
)
# What replies are made of: tags, frames, and answers of every type
SHREDS = """<think> </think> <answer> </answer> <reason> </reason> <result> </result> \\boxed{ } $ ** ``` { } [ ] ( )
    {"reason":"R","answer": Answer: answer is so the not or and A B C (B) below 5 7 12 2 1 4 3 , ; | = + - ^ /
    \\frac{1}{2} \\sqrt{ \\sin x x cm % \\pm \\infty ∞ ½ ² 五 Ａ В NaN 1e999 -0 [[2, 1], [4, 3]] 1, 2, 30, 40""".split()
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from([*SHREDS, " ", "\n", "\x00", "\ud800", "\u202e"]), max_size=14).map("".join),
    st.lists(st.sampled_from(SHREDS), max_size=10).map(" ".join),
)
SHAPES = [
    "{}",
    "<think>R</think><answer>{}</answer>",
    "<reason>R</reason><result>{}</result>",
    "R \\boxed{{{}}}",
    '{{"reason": "R", "answer": "{}"}}',
    "R\nAnswer: {}",
    "<think>{0}</think><answer>{0}</answer>",
]
REPLIES = st.builds(lambda shape, text: shape.format(text), st.sampled_from(SHAPES), TEXTS)


def accepted(record):
    """Whether check_gold lets a record pass; its refusal must be one line that UTF-8 can hold."""
    try:
        rewards.check_gold(record)
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 600
        return False
    return True


@FIXED
@given(RECORDS, st.lists(REPLIES, min_size=1, max_size=3))
@example({"answer_type": "letter", "answer": "B"}, ["the second option"])
@example({"answer_type": "box", "answer": [0, 0, 1e-300, 1e-300]}, ["0 0 1 1"])
def test_a_record_is_refused_with_a_cause_or_every_reply_to_it_has_a_score(record, replies):
    if not accepted(record):
        return
    for reply in replies:
        score = rewards.score(reply, record)
        assert 0 <= score["accuracy"] <= 1 and score["format"] in (0, 1)
        assert score["reward"] == score["accuracy"] + 0.5 * score["format"]
        assert score["format"] or score["accuracy"] == 0
        assert rewards.score(reply, record) == score
        judge.find_answer(reply, record)
        judge.contradicts(reply, score["answer"], record)
    distill.make_pair(record, replies, replies, random.Random(0))


RIGHT = {
    "letter": ("B", "B"),
    "digit": (3, "3"),
    "grid": ([2, 1, 4, 3], "2 1 4 3"),
    "box": ([1, 2, 30, 40], "1, 2, 30, 40"),
    "point": ([1, 2, 30, 40], "4, 5"),
    "math": ("5", "5"),
    "text": ("red", "red"),
}


@pytest.mark.parametrize("options", [None, ["above", "below"]], ids=["no options", "options"])
@pytest.mark.parametrize("kind", rewards.ANSWER_TYPES)
def test_pairs_are_made_of_records_with_and_without_options(kind, options):
    gold, text = RIGHT[kind]
    record = {"answer_type": kind, "answer": gold, "think": True, "prompt": "Where?"}
    record |= {"options": options} if options else {}
    base = [f"It is {text}.", f"so {text}", f"<answer>{text}</answer>", "(B) below", "what?"]
    pair, why = distill.make_pair(record, [think("?"), think(text)], base, random.Random(0), coupled=True)
    assert why is None and pair["chosen"] == think(text)


@FIXED
@given(st.sampled_from(list(RIGHT)), TEXTS)
def test_an_answer_alone_is_read_by_the_same_grammar_in_every_format_that_gives_it_a_place(kind, text):
    record = {"answer_type": kind, "answer": RIGHT[kind][0]}
    text = text.strip(rewards.SPACE)
    hurts = ("<", ">", "\\boxed", "Answer:", "\n", "{", "}", "$")
    if not text or any(mark in text for mark in hurts):
        return
    answers = []
    for fmt, shape in (("think", SHAPES[1]), ("tags", SHAPES[2]), ("boxed", SHAPES[3]), ("line", SHAPES[5])):
        answers.append(rewards.score(shape.format(text), record | {"reply_format": fmt}))
    assert all(answer == answers[0] for answer in answers)


@FIXED
@given(TEXTS)
def test_what_reads_a_text_strictly_never_raises_and_unwrapping_ends(text):
    folded = rewards.fold(text)
    once = rewards.unwrap(folded)
    assert len(once) <= len(folded)
    rewards.stated(folded)
    for fmt in rewards.REPLY_FORMATS:
        parts = rewards.read_reply(text, fmt)
        assert parts is None or parts[1] in text or fmt == "json"
