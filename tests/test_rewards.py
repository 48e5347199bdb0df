"""rewards.py: what is read, what is not, and what an answer is worth. Every number is worked by hand."""

import json
import random
import re
import threading
import time

import pytest

import rewards

OPTIONS = ["above", "below", "above and left"]


def letter(answer="B", fmt="think", **fields):
    return {"answer_type": "letter", "answer": answer, "options": OPTIONS, "think": True, "reply_format": fmt, **fields}


def grid(answer=(2, 1, 4, 3), rows=2, cols=2, fmt="think"):
    return {"answer_type": "grid", "answer": list(answer), "rows": rows, "cols": cols, "reply_format": fmt}


def of(kind, answer, fmt="think", **fields):
    return {"answer_type": kind, "answer": answer, "reply_format": fmt, **fields}


def think(answer, reason="it is darker"):
    return f"<think>{reason}</think><answer>{answer}</answer>"


# ---------------------------------------------------------------------------------------------------------------------
# The reward


def test_a_right_and_well_formed_reply_earns_both_parts():
    assert rewards.score(think("B"), letter("B")) == {"reward": 1.5, "accuracy": 1.0, "format": 1.0, "answer": "B"}


def test_a_wrong_and_well_formed_reply_earns_the_format_part_only():
    assert rewards.score(think("A"), letter("B")) == {"reward": 0.5, "accuracy": 0.0, "format": 1.0, "answer": "A"}


def test_each_weight_multiplies_its_own_part():
    half = think("2 1 3 4")  # two of the four indices are right
    assert rewards.score(half, grid(), accuracy_weight=4.0, format_weight=0.25)["reward"] == 4.0 * 0.5 + 0.25
    assert rewards.score(half, grid(), accuracy_weight=0.0, format_weight=0.25)["reward"] == 0.25
    assert rewards.score(half, grid(), accuracy_weight=4.0, format_weight=0.0)["reward"] == 2.0
    assert rewards.score("2 1 3 4", grid(), accuracy_weight=4.0, format_weight=0.25)["reward"] == 0.0


def test_the_format_follows_think_unless_the_record_names_one():
    assert rewards.reply_format({"think": True}) == "think"
    assert rewards.reply_format({"think": False}) == "bare"
    assert rewards.reply_format({"think": False, "reply_format": "json"}) == "json"


# ---------------------------------------------------------------------------------------------------------------------
# Structure

GOOD = {
    "think": ["<think>R</think><answer>B</answer>", " \n<think> R </think>\n\n<answer>\nB\n</answer>\t\n"],
    "bare": ["B", " B\n"],
    "tags": ["<reason>R</reason><result>B</result>", "<reason>R</reason> \n <result>B</result>\n"],
    "boxed": ["R \\boxed{B}", "R $\\boxed{B}$.", "\\boxed{B}", "R\n\\boxed{ B }.\n", "R $\\boxed{B}.$"],
    "json": ['{"reason": "R", "answer": "B"}', '\n{"answer": "B",\n "reason": "R"}\n'],
    "line": ["R\nAnswer: B", "R one\nR two\n\nAnswer: B\n"],
}
BAD = {
    "think": [
        "<think>R</think>",
        "<answer>B</answer>",
        "<think>R</think><answer>B",
        "<think>R<answer>B</answer>",
        "R</think><answer>B</answer>",
        "<think>R</think>B",
        "<think></think><answer>B</answer>",
        "<think> \n</think><answer>B</answer>",
        "<think>R</think><answer></answer>",
        "<think>R</think><answer> </answer>",
        "<answer>B</answer><think>R</think>",
        "<think>R<answer>B</answer></think>",
        "<think>R</think><answer>B</answer>.",
        "So: <think>R</think><answer>B</answer>",
        "<think>R</think> so <answer>B</answer>",
        "<think><think>R</think></think><answer>B</answer>",
        "<think>R</think><think>R</think><answer>B</answer>",
        "<think>R</think><answer>B</answer><answer>B</answer>",
        "<think>R</think><answer>A</answer><answer>B</answer>",
        "<think>R</think><answer><answer>B</answer></answer>",
        "<Think>R</Think><Answer>B</Answer>",
        "<THINK>R</THINK><ANSWER>B</ANSWER>",
        "<think>R</think></answer>B<answer>",
        "</think>R<think><answer>B</answer>",
        "< think>R</think><answer>B</answer>",
        "<think>R<think>R</think><answer>B</answer>",
        "<think>R<answer>R</think><answer>B</answer>",
        "<think>R<answer>B</think></answer>",
        "<think>R</think><answer>B</answer>\x00",
    ],
    "bare": [
        "(B)",
        "B.",
        "B)",
        "B. below",
        "below",
        "Ｂ",
        "The answer is B",
        "\\boxed{B}",
        "$B$",
        "<answer>B</answer>",
        "Answer: B",
        "B\n\nbecause",
        "b",
        "BB",
        "B A",
    ],
    "tags": [
        "<reason>R</reason><answer>B</answer>",
        "<reason>R</reason><result>B</result><result>B</result>",
        "<reason></reason><result>B</result>",
        "<reason>R</reason>: <result>B</result>",
        "<result>B</result><reason>R</reason>",
    ],
    "boxed": [
        "R \\boxed{B} indeed",
        "\\boxed{A} or \\boxed{B}",
        "\\boxed{B} \\boxed{B}",
        "R \\boxed{B",
        "R \\boxed{}",
        "R $\\boxed{B}",
        "R \\boxed{B}$",
        "R \\boxed{B}}",
        "R \\boxed B",
        "R boxed{B}",
        "\\boxed A \\boxed{B}",
    ],
    "json": [
        '{"reason": "R", "answer": "B"} ',
        '{"answer": "B"}',
        '{"reason": "", "answer": "B"}',
        '{"reason": "R", "answer": "A", "answer": "B"}',
        '{"reason": "R", "answer": "B", "more": 1}',
        '{"reason": 1, "answer": "B"}',
        '{"reason": "R", "answer": null}',
        '{"reason": "R", "answer": ["B"]}',
        '{"reason": "R", "answer": {"B": "B"}}',
        '[{"reason": "R", "answer": "B"}]',
        '```json\n{"reason": "R", "answer": "B"}\n```',
        "{'reason': 'R', 'answer': 'B'}",
        '{"reason": "R", "answer": "B",}',
        '{"reason": "R", "answer": NaN}',
    ][1:],
    "line": [
        "Answer: B",
        "R Answer: B",
        "R\nAnswer: A\nAnswer: B",
        "R\nAnswer: B\nR",
        "R\nanswer: B",
        "R\nAnswer:B",
        "R\nAnswer: ",
        "R\n Answer: B",
        "R\n**Answer: B**",
    ],
}


@pytest.mark.parametrize("fmt", rewards.REPLY_FORMATS)
def test_each_format_reads_its_own_shape(fmt):
    for reply in GOOD[fmt]:
        assert rewards.score(reply, letter("B", fmt))["reward"] == 1.5, reply


@pytest.mark.parametrize("fmt", rewards.REPLY_FORMATS)
def test_a_reply_that_is_off_by_one_detail_earns_nothing(fmt):
    for reply in BAD[fmt]:
        expected = {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "answer": None}
        assert rewards.score(reply, letter("B", fmt)) == expected, reply


@pytest.mark.parametrize("fmt", ["think", "boxed", "line"])
def test_a_reply_that_is_off_by_one_detail_is_not_even_split(fmt):
    for reply in BAD[fmt]:
        assert rewards.read_reply(reply, fmt) is None, reply


def test_a_reply_in_another_format_than_the_asked_one_earns_nothing():
    for asked in rewards.REPLY_FORMATS:
        for given in rewards.REPLY_FORMATS:
            if given != asked:
                assert rewards.score(GOOD[given][0], letter("B", asked))["reward"] == 0.0, (asked, given)


def test_the_reason_and_the_answer_text_come_apart_at_the_right_place():
    assert rewards.read_reply("<think> a b </think>\n<answer> c d </answer>", "think") == ("a b", "c d")
    assert rewards.read_reply("<reason>a</reason><result>b</result>", "tags") == ("a", "b")
    assert rewards.read_reply("a $\\boxed{\\frac{1}{2}}$.", "boxed") == ("a", "\\frac{1}{2}")
    assert rewards.read_reply("a\nb\nAnswer: c", "line") == ("a\nb", "c")
    assert rewards.read_reply('{"reason": "a\\nb", "answer": [[2, 1]]}', "json") == ("a\nb", "[[2, 1]]")
    assert rewards.read_reply(" c ", "bare") == ("", "c")


def test_a_format_nobody_knows_is_an_error_and_not_a_zero():
    with pytest.raises(ValueError, match="haiku"):
        rewards.read_reply("B", "haiku")


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "B.",
        "B)",
        "\\boxed{B}",
        "$\\boxed{B}$",
        "$\\boxed{B}$.",
        "The answer is B",
        "The answer is (B).",
        "answer: B",
    ]
    + [
        "Final answer: B",
        "The answer is $\\boxed{B}$",
        "Option B",
        "B. below",
        "B) below",
        "(B) below",
        "B: below.",
        " B\n",
    ],
)
def test_these_say_letter_b(text):
    assert rewards.read_answer(text, letter()) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "A or B",
        "A and B",
        "A, B",
        "A/B",
        "AB",
        "A B",
        "B or A",
        "not B",
        "not A",
        "The answer is not B",
        "",
        " ",
        "D",
    ]
    + [
        "B. above",
        "B above",
        "B below",
        "B. below it",
        "below or above",
        "not below",
        "\\boxed{A} \\boxed{B}",
        "$B",
        "((B))",
        "[B)",
    ]
    + [
        "The answer is A or B",
        "The answer is B or C",
        "The answer is",
        "B?",
        "B!",
        "Ƀ",
        "В",
        "B\x00",
        "B\nA",
        "B. None.",
        "Z",
    ],
)
def test_these_say_no_letter(text):
    assert rewards.read_answer(text, letter()) is None
    assert rewards.score(think(text), letter("B"))["reward"] == 0.0


def test_without_options_every_capital_is_a_letter_and_what_is_written_out_cannot_be_checked():
    record = of("letter", "Q")
    for text in ("Q", "Q. ", "Q. quiet", "(Q) none of these"):
        assert rewards.read_answer(text, record) == "Q", text
    for text in ("É", "Q. A or B", "Q quiet", "quiet", "Q, quiet"):
        assert rewards.read_answer(text, record) is None, text


def test_digits_are_whole_numbers():
    for text, value in [
        ("7", 7),
        ("0", 0),
        ("12", 12),
        ("12.", 12),
        ("\\boxed{12}", 12),
        ("The answer is 12", 12),
        ("$12$", 12),
        ("7.0", 7),
        ("seven", 7),
        ("７", 7),
        ("1,000", 1000),
    ]:
        assert rewards.read_answer(text, of("digit", 1)) == value
    for text in [
        "-7",
        "+7",
        "7.5",
        "1e999",
        "1e3",
        "0x1F",
        "7 8",
        "7 or 8",
        "seventh",
        "٣",
        "²",
        "1_000",
        "1,00",
        "9" * 16,
        "9" * 5000,
    ]:
        assert rewards.read_answer(text, of("digit", 1)) is None, text
    assert rewards.score(think("12"), of("digit", "12"))["accuracy"] == 1.0
    assert rewards.score(think("12"), of("digit", 12))["accuracy"] == 1.0
    assert rewards.score(think("21"), of("digit", 12))["accuracy"] == 0.0


def test_a_grid_is_read_in_any_of_its_usual_spellings():
    for text in [
        "2 1 4 3",
        "2,1,4,3",
        "2, 1\n4, 3",
        "[2, 1, 4, 3]",
        "[[2, 1], [4, 3]]",
        "(2 1) (4 3)",
        "\\boxed{2 1 4 3}",
    ]:
        assert rewards.read_answer(text, grid()) == [2, 1, 4, 3], text


@pytest.mark.parametrize(
    "text",
    ["2143", "2 1 4", "2 1 4 3 1", "2 1 4 5", "0 1 2 3", "2 1 4 -3", "2:1:4:3", "a 2 1 4 3", "2 1 4 ٣", "[2 1 4 3"],
)
def test_these_are_no_grid_of_four(text):
    assert rewards.score(think(text), grid()) == {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "answer": None}


def test_a_grid_earns_the_share_of_right_indices():
    gold = grid([3, 1, 2, 6, 4, 5], rows=2, cols=3)
    for text, share in [
        ("3 1 2 6 4 5", 1.0),
        ("3 1 2 6 5 4", 4 / 6),
        ("3 2 1 6 4 5", 4 / 6),
        ("1 3 2 6 4 5", 4 / 6),
        ("1 2 3 4 5 6", 0.0),
    ]:
        assert rewards.score(think(text), gold)["accuracy"] == share, text
    assert rewards.score(think("3 2 1 5 6 4"), gold)["accuracy"] == 1 / 6


def test_a_grid_with_a_repeated_index_is_readable_but_worth_nothing():
    parts = rewards.score(think("2 1 4 4"), grid())  # three of four indices agree
    assert parts == {"reward": 0.5, "accuracy": 0.0, "format": 1.0, "answer": [2, 1, 4, 4]}


def test_box_accuracy_is_intersection_over_union():
    gold = of("box", [10, 20, 50, 40])  # 40 x 20 = 800
    cases = {
        "10, 20, 50, 40": 1.0,
        "[30, 20, 50, 40]": 0.5,  # 400 of 800
        "(30, 30, 70, 50)": 200 / 1400,  # overlap 20 x 10, the two areas 800 + 800
        "10 20 50 30": 0.5,
        "0, 0, 60, 60": 800 / 3600,
        "20.5, 20, 50, 40": 590 / 800,
        "50, 20, 90, 40": 0.0,  # they only touch
        "50, 40, 10, 20": 0.0,  # corners the wrong way round
        "-50, -40, 0, 0": 0.0,
    }
    for text, value in cases.items():
        assert rewards.score(think(text), gold)["accuracy"] == pytest.approx(value, abs=1e-12), text
    for text in [
        "10 20 50",
        "10 20 50 40 1",
        "1e999 0 0 0",
        "inf 0 0 0",
        "nan 1 2 3",
        "10,,20,50,40",
        "x1=10, 20, 50, 40",
        "10 20 50 ٤",
    ]:
        assert rewards.score(think(text), gold)["format"] == 0.0, text


def test_a_point_is_right_inside_the_gold_box_borders_included():
    gold = of("point", [10, 20, 50, 40])
    for text, value in {
        "30, 30": 1.0,
        "(10, 20)": 1.0,
        "[50.0, 40.0]": 1.0,
        "50.1, 30": 0.0,
        "30, 41": 0.0,
        "30 9": 0.0,
    }.items():
        assert rewards.score(think(text), gold)["accuracy"] == value, text
    assert rewards.score(think("30"), gold)["format"] == 0.0


def test_text_is_compared_without_case_and_white_space():
    gold = of("text", ["Two dogs", "2 dogs"])
    for text, value in {
        "two  dogs.": 1.0,
        "TWO DOGS": 1.0,
        "2 dogs": 1.0,
        "dogs": 0.0,
        "two dogs and a cat": 0.0,
        "The answer is two dogs": 1.0,
    }.items():
        assert rewards.score(think(text), gold)["accuracy"] == value, text
    assert rewards.score(think("no"), of("text", "yes"))["reward"] == 0.5
    assert rewards.score(think("option a"), of("text", "option a"))["accuracy"] == 1.0


def test_markup_is_not_read_as_a_text_answer():
    for reply in (think("yes"), "<answer>yes</answer>", "\\boxed{yes}", "so\nyes"):
        assert rewards.score(reply, of("text", "yes", "bare"))["format"] == 0.0, reply
    assert rewards.score("yes", of("text", "yes", "bare"))["reward"] == 1.5


def test_mathematics_is_compared_by_value():
    for text, gold in [
        ("0.5", "\\frac{1}{2}"),
        ("1/2", "0.5"),
        ("$\\boxed{\\dfrac{3}{4}}$", "0.75"),
        ("The answer is $\\boxed{5}$", 5),
        ("5.", "5"),
        ("x = 5", "5"),
        ("12,345", "12345"),
        ("x^2+1", "1+x^2"),
        ("\\frac{\\sqrt{3}}{2}", "\\sqrt{3}/2"),
        ("2^{10}", "1024"),
        ("z^2+x^2+y^2=a^2", "x^2 + y^2 + z^2 = a^2"),
        ("-3", -3),
        ("2.50", 2.5),
        ("(1, 2)", "(1,2)"),
        ("30^\\circ", "30"),
    ]:
        assert rewards.score(think(text), of("math", gold))["reward"] == 1.5, text


@pytest.mark.parametrize(
    "text",
    [
        "4",
        "0.25",
        "5.0001",
        "4 or 5",
        "5 or 6",
        "5 and 6",
        "not 5",
        "5, 6",
        "5 6",
        "5;6",
        "5/6",
        "4 = 5",
        "1 = 2 = 5",
        "x=4=5",
        "x=5, x=6",
    ]
    + [
        "\\{5, 6\\}",
        "\\pm 5",
        "5?",
        "5.6.7",
        "٥",
        "\\text{5 or 6}",
        "\\boxed{4} \\boxed{5}",
        "\\boxed{4}, 5",
        "$5$ $6$",
        "5\n6",
        "\\frac{5}{",
    ],
)
def test_another_value_or_a_second_value_is_not_five(text):
    assert rewards.score(think(text), of("math", "5"))["accuracy"] == 0.0


@pytest.mark.parametrize("text", ["4 or 5", "5 or 6", "5 and 6", "not 5", "5 OR 6", "4 = 5", "x=4=5", "5; 6", "5?"])
def test_a_hedge_is_not_even_readable_as_mathematics(text):
    assert rewards.score(think(text), of("math", "5"))["format"] == 0.0


def test_a_mathematical_bomb_is_refused_before_any_algebra_is_done():
    start = time.perf_counter()
    for text in [
        "9^9^9^9",
        "9^{9^{9^9}}",
        "(9^{9^{9^9}}, 1)",
        "(9^9\\text{}99999999, 1)",
        "(9^9\\!99999999, 1)",
        "(9^99999999, 1)",
        "99^{99}!",
        "99^99!",
        "9**9**9**9",
        "((9^{99})^{99})^{99}",
        "99999999!",
        "9!!!!!!",
        "(9!)!",
        "10^{10000000000}",
        "\\binom{100000000}{50000000}",
        "\\sum_{n=1}^{1000000000} n^n",
        "\\int_0^1 x^x dx",
        "(a+b+c+d+e+f)^{60}",
        "((9^{99})^{99})^{99}",
        "\\sin^{999}(x)",
        "(" * 60 + "x" + ")^{99}" * 20,
        "\\tan(" * 20 + "x" + ")" * 20,
        "9^9\\text{}999",
        "9^9\\text{ }999",
        "(a+b)^{61}",
        "{" * 90 + "1" + "}" * 90 + "^" * 10,
        "(" * 199,
        "1+" * 5000 + "1",
        "9" * 199,
        "\\input{/etc/passwd}",
        "__import__('os').getcwd()",
        "1e999",
    ]:
        assert rewards.score(think(text), of("math", "5"))["accuracy"] == 0.0, text
    assert time.perf_counter() - start < 2.0


def test_mathematics_is_read_outside_the_main_thread_too():
    found = []
    record = of("math", "\\frac{7}{4}")
    thread = threading.Thread(target=lambda: found.append(rewards.score(think("1.75"), record)["reward"]))
    thread.start()
    thread.join()
    assert found == [1.5]


# ---------------------------------------------------------------------------------------------------------------------
# The tables

EXAMPLE_GOLD = {
    "letter": "B",
    "digit": 12,
    "grid": [2, 1, 4, 3],
    "box": [10, 20, 30.5, 40],
    "point": [10, 20, 30.5, 40],
    "math": "5",
    "text": "two dogs",
}


@pytest.mark.parametrize("kind", rewards.ANSWER_TYPES)
def test_every_example_in_a_type_s_grammar_is_read_as_the_grammar_says(kind):
    record = of(kind, EXAMPLE_GOLD[kind], options=OPTIONS)
    rewards.check_gold(record)
    grammar, _, value = rewards.ANSWER_TYPES[kind].grammar.partition(" -> ")
    examples = re.findall('"([^"]+)"', grammar)
    assert len(examples) >= 2
    for text in examples:
        answer = rewards.read_answer(text, record)
        assert answer is not None, text
        assert not value or answer == json.loads(value), text


def read_clock(text, record):
    match = re.fullmatch(r"([0-9]{1,2}):([0-9]{2})", text)
    return int(match[1]) * 60 + int(match[2]) if match else None


def clock_accuracy(answer, record):
    """1 at the right time, 0 an hour or more from it."""
    return max(0.0, 1.0 - abs(answer - read_clock(record["answer"], record)) / 60)


def check_clock(record):
    if read_clock(record["answer"], record) is None:
        raise ValueError(f"answer {record['answer']!r} is not a time like 7:45")


CLOCK = rewards.AnswerType('hours and minutes: "7:45" -> 465', read_clock, clock_accuracy, check_clock, right_from=0.75)


def test_one_entry_in_the_table_is_a_whole_new_answer_type(monkeypatch):
    record = of("clock", "7:45")
    with pytest.raises(ValueError, match="answer_type 'clock' is unknown"):
        rewards.check_gold(record)
    monkeypatch.setitem(rewards.ANSWER_TYPES, "clock", CLOCK)
    rewards.check_gold(record)
    with pytest.raises(ValueError, match="not a time"):
        rewards.check_gold(of("clock", "noon"))
    with pytest.raises(ValueError, match="known: letter, digit, grid, box, point, math, text, clock"):
        rewards.check_gold(of("watch", "7:45"))

    assert rewards.score(think("7:45"), record) == {"reward": 1.5, "accuracy": 1.0, "format": 1.0, "answer": 465}
    assert rewards.score(think("The answer is $8:00$"), record)["reward"] == 0.75 + 0.5
    assert rewards.score(think("7.45"), record) == {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "answer": None}
    assert rewards.score('{"reason": "R", "answer": "7:45"}', {**record, "reply_format": "json"})["reward"] == 1.5
    assert rewards.is_right(480, record) and not rewards.is_right(481, record)


def test_one_entry_in_the_table_is_a_whole_new_reply_format(monkeypatch):
    def read_arrow(reply):
        reason, arrow, answer = reply.partition("=>")
        return (reason, answer) if arrow else None

    record = letter("B", "arrow")
    with pytest.raises(ValueError, match="reply_format 'arrow' is unknown"):
        rewards.check_gold(record)
    monkeypatch.setitem(rewards.REPLY_FORMATS, "arrow", rewards.ReplyFormat(read_arrow, answer_may_be_wrapped=False))
    rewards.check_gold(record)
    assert rewards.score("R => B", record)["reward"] == 1.5
    for reply in ("=> B", "R =>", "R B", "R => The answer is B", think("B")):
        assert rewards.score(reply, record)["reward"] == 0.0, reply


def test_an_answer_counts_as_right_from_its_type_s_threshold_on():
    assert rewards.is_right("B", letter("B")) and not rewards.is_right("A", letter("B"))
    assert rewards.is_right([2, 1, 4, 3], grid()) and not rewards.is_right([2, 1, 3, 4], grid())
    box = of("box", [0, 0, 10, 10])
    assert rewards.is_right([0, 0, 10, 5], box) and not rewards.is_right([0, 0, 10, 4.9], box)


# ---------------------------------------------------------------------------------------------------------------------
# Hostile replies

MEGA = 1_000_000
KINDS = [
    letter("A", "bare"),
    letter("A"),
    letter("A", "tags"),
    letter("A", "boxed"),
    letter("A", "json"),
    letter("A", "line"),
    of("digit", 1),
    of("digit", 1, "json"),
    grid(),
    grid(fmt="json"),
    of("box", [0, 0, 1, 1]),
    of("point", [0, 0, 1, 1]),
    of("text", "yes"),
    of("text", "yes", "json"),
    of("math", "1"),
    of("math", "1", "boxed"),
]
HOSTILE = {
    "a megabyte of one tag": "<think>" * (MEGA // 7),
    "a megabyte of nothing": " " * MEGA,
    "a megabyte of NUL": "\x00" * MEGA,
    "a megabyte of capitals": "A" * MEGA,
    "a megabyte well formed": think("1", "x" * MEGA),
    "just short of the bound": "<answer>" * 12_400,
    "spaces just short of the bound": "A" + " " * 99_000 + "x",
    "never closed": "<think>" + "so " * 30_000,
    "boxes never closed": "\\boxed{" * 14_000,
    "deep braces": "\\boxed{" + "{" * 40_000 + "A" + "}" * 40_000 + "}",
    "deep JSON": "[" * 99_000,
    "deep JSON inside": '{"reason": "R", "answer": ' + "[" * 49_000 + "]" * 49_000 + "}",
    "deep JSON objects": '{"a":' * 19_000 + "1" + "}" * 19_000,
    "huge integer in JSON": '{"reason": "R", "answer": ' + "9" * 90_000 + "}",
    "infinite number in JSON": '{"reason": "R", "answer": 1e999}',
    "NaN in JSON": '{"reason": "R", "answer": NaN}',
    "a JSON key twice": '{"reason": "R", "answer": 1, "answer": 1}',
    "spaces between": think(" " * 50_000 + "A or" + " " * 40_000),
    "digits": think("1" * 90_000),
    "commas": think("," * 90_000),
    "grid of thousands": think("1 " * 45_000),
    "lines": "Answer: \n" * 11_000,
    "leads": think("the answer is " * 6_000),
    "dollars": think("$" * 90_000),
    "bangs": think("!" * 1_900),
    "letters": think("A." * 900),
    "lone surrogates": think("\ud800\udfff"),
    "right to left": think("\u202eA"),
    "other digits": think("١"),
    "superscript": think("¹"),
    "a null byte": think("A\x00"),
    "two answers": think("A or B"),
    "two blocks": think("A") + think("A"),
    "nested": think(think("A")),
    "unclosed": "<think>R</think><answer>A",
    "no tags": "R A",
    "code": think("__import__('os').system('true')"),
    "empty": "",
}


def test_hostile_replies_never_raise_never_score_and_are_read_fast():
    for name, reply in HOSTILE.items():
        for record in KINDS:
            start = time.perf_counter()
            parts = rewards.score(reply, record)
            assert parts["accuracy"] == 0.0, (name, record)
            # Format may only be earned where the text is one readable, wrong answer: any single line is a text answer.
            assert parts["format"] == 0.0 or record["answer_type"] in ("text", "math"), (name, record)
            assert time.perf_counter() - start < 2.0, (name, record)


def test_a_megabyte_is_not_read_even_if_it_is_well_formed():
    assert rewards.score(think("B", "x" * rewards.MAX_REPLY), letter("B"))["reward"] == 0.0
    assert rewards.score(think("B", "x" * (rewards.MAX_REPLY - 50)), letter("B"))["reward"] == 1.5


SHREDS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "A",
    "B",
    " ",
    "\n",
    "R",
    "\\boxed{",
    "}",
    "$",
    "Answer: ",
    '{"answer": ',
    '"',
    "2 1 4 3",
    "[",
    "]",
    ",",
    "٣",
    "\x00",
    "1/2",
    "^",
    "<reason>",
    "</reason>",
    "<result>",
    "</result>",
    "not ",
    " or ",
    "above",
]


def test_random_shreds_of_replies_never_raise_and_only_the_whole_shape_scores():
    rng = random.Random(5)
    for _ in range(4000):
        reply = "".join(rng.choice(SHREDS) for _ in range(rng.randrange(1, 14)))
        record = rng.choice(KINDS[:14])
        parts = rewards.score(reply, record)
        if parts["format"]:
            assert rewards.read_reply(reply, record["reply_format"]) is not None
            assert parts["answer"] is not None
        else:
            assert parts["accuracy"] == parts["reward"] == 0.0


# ---------------------------------------------------------------------------------------------------------------------
# Records


@pytest.mark.parametrize(
    "record", KINDS + [letter("C"), of("text", ["a", "b"]), of("digit", "07"), of("math", 2.5), of("letter", "Z")]
)
def test_a_record_that_can_be_scored_passes(record):
    rewards.check_gold(record)


@pytest.mark.parametrize(
    "record, cause",
    [
        (of("essay", "x"), "answer_type 'essay'"),
        ({"answer": "x"}, "answer_type None"),
        (of(["letter"], "A"), r"answer_type \['letter'\] is unknown"),
        (of("letter", "A", fmt=["think"]), r"reply_format \['think'\] is unknown"),
        (letter("B", fmt="haiku"), "reply_format 'haiku'"),
        (letter("D"), "A-C"),
        (letter("b"), "A-C"),
        (letter("AB"), "A-C"),
        (letter(2), "A-C"),
        (letter("A", options=[]), "options"),
        (letter("A", options={"A": "x"}), "options"),
        (of("digit", -1), "whole number"),
        (of("digit", 1.5), "whole number"),
        (of("digit", True), "whole number"),
        (of("digit", "٣"), "whole number"),
        (grid([1, 2, 3]), "arrangement of 1 to 4"),
        (grid([1, 2, 3, 3]), "arrangement of 1 to 4"),
        (grid([0, 1, 2, 3]), "arrangement of 1 to 4"),
        (grid([1, 2, 3, 4], rows=0), "rows and cols"),
        (of("grid", "1 2 3 4"), "list of whole numbers"),
        (of("grid", [1, "2"]), "list of whole numbers"),
        (of("grid", []), "list of whole numbers"),
        (of("box", [10, 0, 10, 5]), "without area"),
        (of("box", [0, 9, 10, 5]), "without area"),
        (of("box", [0, 0, float("inf"), 5]), "finite"),
        (of("box", [0, 0, float("nan"), 5]), "finite"),
        (of("box", [0, 0, "9", 5]), "finite"),
        (of("point", [3, 4]), "four finite"),
        (of("text", " "), "none empty"),
        (of("text", []), "none empty"),
        (of("text", 5), "is not a text"),
        (of("text", "<answer>x</answer>"), "one line"),
        (of("math", "\\frac{1}{"), "mathematics"),
        (of("math", ""), "mathematics"),
        (of("math", None), "mathematics"),
        (of("math", "9^{9^9}"), "mathematics"),
    ],
)
def test_a_record_that_cannot_be_scored_is_refused_in_one_line(record, cause):
    with pytest.raises(ValueError, match=cause) as error:
        rewards.check_gold(record)
    assert "\n" not in str(error.value)


def test_a_gold_answer_is_right_when_it_is_given_back():
    for record in KINDS:
        gold = record["answer"]
        if record["answer_type"] == "point":
            gold = gold[:2]
        text = json.dumps(gold) if isinstance(gold, list) else str(gold)
        reply = {
            "think": think(text),
            "bare": text,
            "tags": f"<reason>R</reason><result>{text}</result>",
            "boxed": f"\\boxed{{{text}}}",
            "json": json.dumps({"reason": "R", "answer": gold}),
            "line": f"R\nAnswer: {text}",
        }[record["reply_format"]]
        assert rewards.score(reply, record)["reward"] == 1.5, record
