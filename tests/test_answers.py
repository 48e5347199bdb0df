r"""Answers as people write them: frames, units, sets, and mathematics that must not be fooled.

A case is (type, gold, right replies, wrong replies); everything is scored in the think format, as a trainer does it.
"""

import itertools
import json
import random
import time
from pathlib import Path

import pytest
import search_math

import expressions
import math_answers
import records
import rewards

OPTIONS = ["A square", "A circle", "A triangle"]
BOXED_FIVE = [r"$$\boxed{5}$$", r"\[5\]", r"\(5\)", r"Therefore, the answer is $\boxed{5}$.", "**5**", "**Answer:** 5"]


def accuracy(kind, gold, text, **fields):
    record = {"answer_type": kind, "answer": gold, "think": True, **fields}
    return rewards.score(f"<think>R</think><answer>{text}</answer>", record)["accuracy"]


def check(kind, gold, right=(), wrong=(), **fields):
    rewards.check_gold({"answer_type": kind, "answer": gold, **fields})
    refused = [text for text in right if accuracy(kind, gold, text, **fields) < 1]
    accepted = [text for text in wrong if accuracy(kind, gold, text, **fields) > 0]
    assert (refused, accepted) == ([], [])


# ---------------------------------------------------------------------------------------------------------------------
# Frames


def test_an_answer_may_stand_in_any_usual_frame():
    check(
        "math", "5", [*BOXED_FIVE, "```\n5\n```", "答案：5", "５", r"\text{5}", r"\boxed{\boxed{5}}", "### Answer\n5"]
    )
    letters = [
        r"\boxed{\text{B}}",
        "the answer is option B",
        "Option B is correct.",
        "**B**",
        "**Answer:** B",
        "答案：B",
        "Ｂ",
    ]
    check("letter", "B", [*letters, "b", "[B]", "Ⓑ", "La réponse est B.", "I choose B."], options=OPTIONS)
    check("text", "Yes", [r"\text{Yes}", "**Yes**", r"$\boxed{\text{Yes}}$", "```\nYes\n```", "“Yes”", "yes!"])
    check("digit", 12, ["**12**", r"\(12\)", "twelve", "12 cars", "There are 12 cars.", "１２", "7 + 5 = 12", "1２"])


def test_a_grid_may_stand_in_code_in_a_table_and_with_marks_between_its_rows():
    right = ["```\n4 1\n3 2\n```", "```json\n[[4, 1], [3, 2]]\n```", "4 1; 3 2", "4 1 | 3 2", "Row 1: 4 1\nRow 2: 3 2"]
    right += [
        r"\begin{bmatrix} 4 & 1 \\ 3 & 2 \end{bmatrix}",
        "| 4 | 1 |\n|---|---|\n| 3 | 2 |",
        "So the order is 4 1 3 2.",
    ]
    wrong = ["][4 1 3 2", "[4 1 3 2)", "[[4, 1], [3, 2]", "(4 1] [3 2)", "4 1 3 3", "4 1 3", "4 1 3 2 or 4 1 2 3"]
    check("grid", [4, 1, 3, 2], right, wrong, rows=2, cols=2)


def test_a_box_may_stand_in_json_and_in_detection_tags():
    right = ['```json\n[{"bbox_2d": [10, 20, 30, 40], "label": "x"}]\n```', "<|box_start|>(10,20),(30,40)<|box_end|>"]
    right += ["x1=10, y1=20, x2=30, y2=40", "[[10, 20], [30, 40]]", "The bounding box is [10, 20, 30, 40]."]
    wrong = [
        "][10, 20, 30, 40",
        "[10, 20, 30, 40)",
        "30, 40, 10, 20",
        "y1=20, x1=10, x2=30, y2=40",
        "x1=10, 20, 30, 40",
    ]
    check("box", [10, 20, 30, 40], right, [*wrong, "[10, 20, 30, 40] or [1, 2, 3, 4]"])


def test_a_point_may_be_answered_by_a_box_and_its_centre_counts():
    right = ["(120, 210), (280, 250)", '{"bbox_2d": [100, 200, 300, 260]}', "[0, 0, 400, 460]", "click(x=200, y=230)"]
    wrong = ["[100, 200, 800, 260]", "[300, 260, 100, 200]", "(100, 100) or (300, 360)", "[100, 200, 300]"]
    check("point", [100, 200, 300, 260], right, wrong)
    assert rewards.read_answer("[0, 0, 400, 460]", {"answer_type": "point", "think": True}) == [200.0, 230.0]


def test_letters_of_other_alphabets_stay_refused():
    homoglyphs = ["В", "Β", "ʙ", "Ƀ", "8", "答案：В"]
    check("letter", "B", [], homoglyphs, options=OPTIONS)
    check("text", "Paris", [], ["Pаris"])
    check("math", "5", [], ["Ƽ", "٥", "б"])


def test_option_text_is_compared_as_plain_compares():
    right = [
        "C. a triangle",
        "a triangle",
        "A triangle.",
        "Triangle",
        "(C) A TRIANGLE",
        "C: triangle",
        "a triangle (C)",
        "C",
    ]
    wrong = ["A triangle or a circle", "C. a square", "a rectangle", "A", "not a triangle", "C. a triangle or a square"]
    check("letter", "C", right, wrong, options=OPTIONS)
    check("letter", "A", ["A", "a square"], ["A circle", "A triangle"], options=OPTIONS)
    check("letter", "A", ["-3", "A. -3"], ["3", "-1/3"], options=["-3", "3", "-1/3"])


@pytest.mark.parametrize(
    "text",
    [
        "The answer is not 5",
        "It is false that x is 5",
        "x is less than 5",
        "The value of x is between 4 and 6.",
        "There are 5 ways or 6 ways.",
        "There are not 5 ways.",
        "If x = 2, the answer is 5",
        "No value is 5.",
        "Neither x nor y is 5.",
        "It takes 5 to 6 hours.",
        "The area of the triangle is 5 times the base.",
    ],
)
def test_a_sentence_that_doubts_or_denies_says_nothing(text):
    assert accuracy("math", "5", text) == 0


@pytest.mark.parametrize(
    "text", ["There are 5 ways.", "The value of $x$ is $5$.", "So x = 5.", "9 + 16 = 25, the answer is 5."]
)
def test_a_plain_sentence_says_its_value(text):
    assert accuracy("math", "5", text) == 1


# ---------------------------------------------------------------------------------------------------------------------
# How lenient a bare reply may be

LENIENT_ONLY = {
    "letter": ("B", ["(B)", "B.", "B. a circle", "b", "a circle", "The answer is B", r"\boxed{B}"], "B"),
    "digit": (12, ["12.", "twelve", "12 cars", "12.0", "$12$", "1２"], "12"),
    "math": ("5", ["The answer is 5", "There are 5 ways."], "5"),
    "text": ("red", ["The answer is blue"], "red"),
}


@pytest.mark.parametrize("kind", LENIENT_ONLY)
def test_a_bare_reply_is_the_answer_alone_unless_the_format_s_switch_says_otherwise(kind, monkeypatch):
    gold, lenient, strict = LENIENT_ONLY[kind]
    record = {"answer_type": kind, "answer": gold, "think": False, "options": OPTIONS}
    assert rewards.score(strict, record)["reward"] == 1.5
    if kind != "text":
        assert [rewards.score(text, record)["format"] for text in lenient] == [0.0] * len(lenient)

    bare = rewards.ReplyFormat(rewards.read_bare, reason_may_be_empty=True, answer_may_be_wrapped=True)
    monkeypatch.setitem(rewards.REPLY_FORMATS, "bare", bare)
    assert [rewards.score(text, record)["format"] for text in lenient] == [1.0] * len(lenient)
    assert [rewards.score(text, record)["accuracy"] for text in lenient] == [float(kind != "text")] * len(lenient)


def test_the_formats_with_a_place_for_the_answer_are_lenient_and_only_bare_is_not():
    strict = [name for name, form in rewards.REPLY_FORMATS.items() if not form.answer_may_be_wrapped]
    assert strict == ["bare"]


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics: notation, units, sets

CASES = [
    ("-3", ["−3", "$−3$", "x = −3", "－3"], ["3", "--3", r"\pm 3", "–3"]),
    ("60", ["60°", r"60^\circ", "60 degrees"], ["60%", "-60°"]),
    (r"60^\circ", ["60°", r"\angle ABC = 60°", "60"], ["60 cm", "60%", "60 rad", "60°C"]),
    (r"2\pi", ["2π", "2*pi", r"2\pi \text{ cm}"], ["2п", "6.28", r"2\pi^2"]),
    (r"4\sqrt{3}", ["4√3", r"\sqrt{48}", "4√3 cm"], ["√43", r"\sqrt[4]{3}", "6.93"]),
    (r"1 \pm \sqrt{2}", ["1±√2", r"1+\sqrt{2}, 1-\sqrt{2}", "1+√2 and 1−√2"], ["1+√2", r"\pm 1+\sqrt{2}", r"1 \pm 2"]),
    (r"\overline{AB}", [r"\overline{AB}", r"$\overline {AB}$"], [r"\overline{BC}", "A", r"\overline{A}"]),
    (
        "5",
        [r"\displaystyle 5", r"5\,", r"\;5", r"\$5", "$5$ cm", r"\boxed{5}\text{ cm}", "5 apples"],
        ["5 million", "5k"],
    ),
    ("12345", [r"\$12,345", "12{,}345", r"12\,345"], ["12 345 or 1", "123,45"]),
    (
        r"\{1, 2\}",
        ["1 and 2", r"1 \text{ or } 2", "2, 1", "x=1 or x=2", "x_1 = 1, x_2 = 2"],
        ["1", "(1, 2]", "1, 2, 3"],
    ),
    ("1 or 2", ["2 or 1", r"\{1,2\}", "1 and 2"], ["1", "1 or 3", "12"]),
    ("5 m", ["5 meters", "5m", r"5\text{ m}"], ["5 cm", "5", "5 m²", "5 s", "5 mi", "5%"]),
    (r"5 \text{ cm}^2", ["5 cm²", "5 square centimeters", r"5\,\mathrm{cm}^{2}"], ["5 cm", "5 cm³", r"5^2 \text{ cm}"]),
    ("20 km/h", ["20 kilometers per hour", r"20\,\mathrm{km/h}"], ["20 m/s", "20 km", "20 h/km"]),
    ("5%", [r"5\%", "5 percent", "5.0 %"], ["5", "0.05", "500%", "5‰"]),
    ("0.05", ["1/20", "5e-2"], ["5%", "0.05%"]),
    (r"\frac{5}{2}", ["2½", "2 1/2", r"2\frac{1}{2}", "2.5"], ["21/2", r"2\cdot\frac{1}{2}"]),
    ("25", ["5²", "5^2"], ["52", "5₂"]),
    ("52", [], ["5²"]),
    ("10^{-8}", ["1e-8", "10⁻⁸", r"1 \times 10^{-8}"], ["0.0", "0", "10^{-9}", "10-8"]),
    (r"x \in (0,1)", ["(0,1)", "0<x<1"], [r"\{0,1\}", "[0,1]", "0, 1", "(1,0)"]),
    ("0", ["0.0", "5 - 5", r"\sin\pi", r"e^{i\pi}+1"], ["1 000", r"\{0, 1\}", "10^{-8}", "10^{-70}", "0^0"]),
    ("6", ["x=6"], ["5 perhaps x=6", "5 x=6"]),
    ("5", [], ["500%", "5 a 6", "5%", "5, 6", "5 = 6", "x+1=5", "5ish", "5 or 6", "05:00"]),
    (r"\infty", ["∞", r"+\infty", "infinity"], [r"-\infty", r"\infty+1", "1/0", r"2\infty", r"\ln\infty", "10^{100}"]),
    (r"\emptyset", ["∅", r"\varnothing"], ["0", r"\{0\}", r"\frac{0}{0}", "none"]),
    (
        "(3, 4)",
        ["x=3, y=4", "y=4, x=3", "(x, y) = (3, 4)"],
        ["(4,3)", r"\{3, 4\}", "[3,4]", "(3, 4) or (4, 3)", "3, 4, 5"],
    ),
    ("y = 2x + 1", ["y - 2x = 1", "2x - y + 1 = 0"], ["y = 2x", "y > 2x+1", "0 = 0", "x = 2y + 1"]),
    ("|x|", [r"\sqrt{x^2}"], ["x", "-x"]),
    ("3:2", ["3 to 2", "３：２"], ["2:3", "3/2", "3:2:1"]),
    (r"\frac{2}{3}", [r"0.\overline{6}", "4/6"], ["0.67", "0.666666", "66.7%"]),
    ("262537412640768744", [], [r"e^{\pi\sqrt{163}}"]),
]


@pytest.mark.parametrize("gold, right, wrong", CASES, ids=[case[0] for case in CASES])
def test_mathematics_is_read_as_people_write_it(gold, right, wrong):
    check("math", gold, right, wrong)


UNITS = ["cm", "m", "kg", "s", "cm^2", "km/h", "%", "L", "Hz", r"\Omega"]


def test_a_number_alone_is_no_answer_to_a_gold_with_a_unit_for_it_would_be_one_to_every_unit():
    for unit in UNITS:
        check("math", f"5 {unit}", [f"5 {unit}"], ["5", *(f"5 {other}" for other in UNITS if other != unit)])
    # The gold without a unit, where the question fixes it: both are right.
    check("math", "5", ["5", *(f"5 {unit}" for unit in UNITS if unit != "%")], ["5%"])


def test_what_goes_without_saying_may_be_left_out():
    for gold, right in (("\\$5", "5"), ("5^\\circ", "5"), ("5 apples", "5"), ("5 euro", "5")):
        check("math", gold, [gold, right], ["5 cm", "5%"])


# ---------------------------------------------------------------------------------------------------------------------
# Mathematics: what has no finite value is no answer

NO_VALUE = r"""
    \ln(|\infty|) e^{|\infty|} \ln|\infty| e^{|-\infty|} \sqrt{|\infty|} \frac{0}{0} \frac{1}{0} \infty-\infty
    0\cdot\infty \frac{\infty}{\infty} 1^{\infty} 0^0 \log_1(5) \log_0(5) \ln(0) \ln(-1) \tan(90^\circ) \cot(0)
    \arcsin(2) \sin(\infty) \left|\frac{1}{0}\right| \infty! (-1)! \{\frac{0}{0}\} (1,\frac{0}{0})
    [\frac{1}{0},2] x=\frac{0}{0} \frac{x}{0} \log_1(x) \ln(x-x) \frac{1}{x-x} \emptyset+1 |\emptyset|
    \{\infty\} (1,\infty,2) 1\pm\infty \frac{0}{0}=\frac{0}{0}
""".split()


@pytest.mark.parametrize("text", NO_VALUE)
def test_what_has_no_finite_value_is_right_for_nothing_not_even_for_itself(text):
    assert math_answers.read(text) is None
    rng = random.Random(1)
    for gold in [text, *(str(rng.uniform(-99, 99)) for _ in range(20)), *search_math.GOLDS]:
        assert not math_answers.same_answer(gold, text), gold
    with pytest.raises(ValueError, match="finite value"):
        rewards.check_gold({"answer_type": "math", "answer": text})


def test_two_sides_without_a_value_are_not_equal():
    for text, other in itertools.product([r"\frac{x}{x-x}", r"\ln(x-x)", r"\frac{1}{0}"], repeat=2):
        trees = [expressions.Reader(expressions.tidy(side)).whole() for side in (text, other)]
        assert not expressions.same_value(*trees)
        assert not expressions.proportional(*trees)


def test_the_golds_of_the_search_are_pairwise_unequal_and_equal_to_themselves():
    assert len(search_math.GOLDS) >= 50
    for gold, other in itertools.product(search_math.GOLDS, repeat=2):
        assert math_answers.same_answer(gold, other) is (gold == other), (gold, other)


def test_no_expression_of_a_search_is_right_for_two_golds():
    found = search_math.search(search_math.expressions(seed=1, count=2_000))
    assert found["bad"] == []
    assert found["readable"] > 300 and found["right for one gold"] > 50  # the search does reach what can be right


def test_the_search_sees_a_comparison_that_succeeds_where_both_sides_fail(monkeypatch):
    monkeypatch.setattr(math_answers, "finite", lambda tree: tree)
    monkeypatch.setattr(
        math_answers, "same_value", lambda a, b: expressions.value_at(a, 0) is expressions.value_at(b, 0)
    )
    monkeypatch.setattr(search_math, "GOLDS", [r"\frac{1}{0}", r"\ln 0"])
    math_answers.read.cache_clear()
    try:
        assert search_math.search([r"\frac{0}{0}"])["bad"]
    finally:
        math_answers.read.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        r"\sin^{999}(x)",
        r"\sin^{999}(x)\cos^{999}(x)",
        "(a+b+c+d)^{99}",
        "9^{9^{9^9}}",
        "(9!)!",
        "x^{x^{x^x}}",
        "((((x^9)^9)^9)^9)^9",
    ]
    + [r"\sqrt{" * 24 + "x" + "}" * 24, r"\tan(" * 20 + "x" + ")" * 20, "x+" * 99 + "x", "300!", r"\binom{300}{150}"]
    + ["(" * 9 + r"\tanh(ix)" + r")^{\pi}" * 9, "-x^{-x}" * 28, "x!" * 60]
    + [",".join(map(str, range(60))), r"\{" + ",".join(map(str, range(60))) + r"\}", "10^{10^{9}}", "10^{10^{10^{10}}}"]
    + ["(" * 49 + "1" + ",1)" * 49, "x|" * 60, "1 1/2 " * 30, r"\sinh " * 24 + "x", r"(1+i)^{5000.5}" * 14],
)
def test_a_comparison_takes_milliseconds_whatever_the_text(text):
    for gold in ("5", "x", r"\sin x"):
        math_answers.read.cache_clear()
        expressions.value_at.cache_clear()
        math_answers.read(gold)
        start = time.process_time()
        assert not math_answers.same_answer(gold, text)
        # about 20 ms at most; the bound leaves room for a slow machine
        assert time.process_time() - start < 0.1


def test_what_a_text_may_cost_is_counted_from_the_text_alone_so_a_warm_cache_changes_nothing():
    tidied = expressions.tidy
    assert expressions.effort(tidied("x^2+1")) == 6 * (3 + 15 + 3 + 5 + 3)
    assert expressions.effort(tidied("2^3")) == 3 + 15 + 3  # no letter: one point
    assert expressions.effort(tidied(r"1\pm\sin x")) == 2 * 6 * (3 + 5 + 20 + 3)
    dear = r"\sinh(x)+" * 16 + "1"
    assert expressions.effort(tidied(dear)) > expressions.MAX_EFFORT
    assert math_answers.read(dear[: len(dear) // 2] + "1") is not None  # half of it may be computed
    assert math_answers.read(dear) is None and not math_answers.same_answer(dear, dear)
    assert math_answers.read(",".join(map(str, range(32)))) is not None
    assert math_answers.read(",".join(map(str, range(33)))) is None


def test_no_labelled_answer_comes_near_what_a_text_may_cost():
    path = Path(__file__).parent / "data" / "labelled_answers.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    efforts = []
    for row in rows:
        text = rewards.unwrap(rewards.fold(row["text"]))
        if row["answer_type"] == "math" and row["right"] and len(text) <= expressions.MAX_TEXT:
            efforts.append(expressions.effort(expressions.tidy(text)))
    assert max(efforts) < expressions.MAX_EFFORT / 4


PUMPED = {
    "the line below a table's head": ("grid", "|" * 660 + "-" * 1330 + "x"),
    "names of numbers": ("point", "a" * 1990),
    "spaces and an end": ("digit", r"\displaystyle" * 60 + "\n" * 600 + " " * 600 + "0" * 9),
    "a character that becomes eighteen": ("text", "\ufdfa" * 1990),
    "letters out of one character": ("math", "so " + "㎭" * 1990),
    "pixels": ("box", "px" * 900),
    "a name's underscores": ("math", "so " + "_" * 1900),
}


def test_an_answer_is_not_read_if_its_characters_become_too_many():
    record = {"answer_type": "text", "answer": "red", "think": True}
    assert rewards.read_answer("㎭" * 600, record) is not None
    assert rewards.read_answer("㎭" * 700, record) is None  # 2,100 letters


@pytest.mark.parametrize("name", PUMPED)
def test_an_answer_of_one_part_pumped_up_is_read_in_milliseconds(name):
    kind, text = PUMPED[name]
    gold = {"grid": [2, 1, 4, 3], "point": [1, 2, 3, 4], "box": [1, 2, 3, 4], "digit": 3}.get(kind, "5")
    record = {"answer_type": kind, "answer": gold, "think": True, "rows": 2, "cols": 2}
    start = time.process_time()
    assert rewards.score(f"<think>R</think><answer>{text}</answer>", record)["accuracy"] == 0
    assert time.process_time() - start < 0.1


def test_numbers_that_differ_in_the_thirtieth_digit_differ_and_rounding_errors_do_not_count():
    same = math_answers.same_answer
    assert not same(r"\frac{1}{3}", "0." + "3" * 40)
    assert not same("1", "1+10^{-40}") and not same("1", "1+10^{-90}")
    assert same("0", r"\sin\pi+\cos\frac{\pi}{2}") and same("0", r"\sqrt{2}\sqrt{2}-2")
    assert same("1", r"\arcsin(\sin 1)") and same(r"\frac{\pi}{2}", r"\arcsin(\sin\frac{\pi}{2})")


# ---------------------------------------------------------------------------------------------------------------------
# Golds

GOLDS = [
    "40°",
    "18π",
    "−3",
    r"1 \pm \sqrt{2}",
    r"\overline{AB}",
    "1 and 2",
    "5 cm",
    "5%",
    r"\$5",
    "x > 3",
    "Yes",
    "3:2",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_a_realistic_gold_can_be_scored_and_is_right_when_given_back(gold):
    check("math", gold, [gold])


@pytest.mark.parametrize(
    "kind, gold",
    [
        ("box", [0, 0, 10**400, 5]),
        ("point", [0, 0, 5, 10**400]),
        ("math", 10**400),
        ("math", "5 = 6"),
        ("math", r"\frac{0}{0}"),
    ]
    + [("math", float("nan")), ("math", "NaN"), ("text", "..."), ("digit", "3 or 4")],
)
def test_a_gold_that_cannot_be_scored_is_refused_with_a_cause_of_one_line(kind, gold):
    with pytest.raises(ValueError, match="answer") as error:
        rewards.check_gold({"answer_type": kind, "answer": gold})
    assert "\n" not in str(error.value)


def test_every_case_of_this_file_is_json_so_it_can_stand_in_a_record():
    assert json.loads(json.dumps(CASES)) == [list(case) for case in CASES]


def test_bad_golds_are_left_out_and_counted_only_where_that_is_asked_for(tmp_path, capsys):
    golds = ["5", "5 = 6", "40°", r"\frac{0}{0}"]
    rest = {"images": [], "prompt": "?", "answer_type": "math", "think": True, "source": "test"}
    path = tmp_path / "records.jsonl"
    records.write_jsonl(path, [{"id": str(number), "answer": gold, **rest} for number, gold in enumerate(golds)])

    with pytest.raises(records.DataError, match=r"records.jsonl:2: answer '5 = 6' cannot be read"):
        records.read_records(path, rewards.check_gold)
    read = records.read_records(path, rewards.check_gold, skip_bad=True)
    assert [record["answer"] for record in read] == ["5", "40°"]
    warning = capsys.readouterr().err
    assert warning.startswith(f"skipped 2 records: first {path}:2: answer '5 = 6'") and warning.count("\n") == 1

    records.write_jsonl(path, [{"id": "1", "answer": "5 = 6", **rest}])
    with pytest.raises(records.DataError, match="no records left"):
        records.read_records(path, rewards.check_gold, skip_bad=True)
