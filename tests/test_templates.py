"""Reply formats that a record brings along as a template: what is well-formed, and what is no template."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage import data as photographs

import jigsaw
import replies
import rewards
from toy import formats

PLAN = "<plan>{reason}</plan><final>{answer}</final>"
LINES = "plan: {reason}\nfinal: {answer}"
CALL = "{reason} final({answer})"
JSON = '{"plan": "{reason}", "final": "{answer}"}'
FIRST = "[final]{answer}[/final] since {reason}"


@pytest.mark.parametrize(
    "template, reply, parts",
    [
        (PLAN, "<plan>1 looks light. so B.</plan><final>B</final>", ("1 looks light. so B.", "B")),
        (PLAN, " <plan> why </plan><final>\nB </final>\n", ("why", "B")),
        (PLAN, "<plan>why</plan> <final>B</final>", None),  # not word for word
        (PLAN, "<plan>why</plan><final>B</final> so B", None),
        (PLAN, "so <plan>why</plan><final>B</final>", None),
        (PLAN, "<plan>why</plan>no</plan><final>B</final>", None),  # a mark twice
        (PLAN, "<plan>why <final> not</plan><final>B</final>", None),
        (PLAN, "<plan></plan><final>B</final>", None),  # an empty part
        (PLAN, "<plan>why</plan><final></final>", None),
        (PLAN, "<think>why</think><answer>B</answer>", None),  # other words
        (PLAN, "<plan>why</plan><final>B", None),
        (PLAN, "", None),
        (LINES, "plan: light above.\nfinal: B", ("light above.", "B")),
        (LINES, "plan: light above. final: B", None),  # the line's end belongs to it
        (LINES, "plan: a\nfinal: b\nfinal: B", None),
        (CALL, "1 is lighter. final(B)", ("1 is lighter.", "B")),
        (CALL, "(1 is lighter) final(B)", None),  # a sign of the template elsewhere
        (JSON, '{"plan": "so B.", "final": "B"}', ("so B.", "B")),
        (JSON, '{"plan": "so "B".", "final": "B"}', None),
        (FIRST, "[final]B[/final] since it is light, since ever", ("it is light, since ever", "B")),
        ("final={answer}", "final=B", ("", "B")),
        ("final={answer}", "so final=B", None),
        ("{answer}", "B", ("", "B")),
    ],
)
def test_a_template_is_matched_word_for_word_and_each_mark_stands_where_it_belongs(template, reply, parts):
    assert replies.read_reply(reply, template) == parts


def test_a_template_is_scored_as_a_format_is():
    record = {"answer": "B", "answer_type": "letter", "options": ["above", "below"], "reply_format": PLAN}
    rewards.check_gold(record)
    assert rewards.score("<plan>why</plan><final>B</final>", record)["reward"] == 1.5
    assert rewards.score("<plan>why</plan><final>The answer is A.</final>", record)["reward"] == 0.5
    assert rewards.score("<plan>why</plan><final>A or B</final>", record)["reward"] == 0
    assert rewards.score("why B", record)["reward"] == 0


@pytest.mark.parametrize(
    "template, cause",
    [
        ("{answer}{answer}", "once"),
        ("{reason}{reason}<final>{answer}", "at most once"),
        ("{reason} {answer}", "tells them apart"),
        ("{reason}{answer}", "tells them apart"),
        ("<a>" * 300 + "{answer}", "longer than"),
        ("<final>{Answer}</final>", "unknown"),  # no template, and no name
    ],
)
def test_what_is_no_template_is_refused_before_training(template, cause):
    record = {"answer": "B", "answer_type": "letter", "reply_format": template}
    with pytest.raises(ValueError, match=cause):
        rewards.check_gold(record)


@given(st.text(max_size=60), st.text(max_size=20), st.sampled_from([PLAN, LINES, CALL, JSON, FIRST]))
def test_whatever_stands_in_the_fields_is_read_back_or_refused(reason, answer, template):
    parts = replies.read_reply(template.replace("{reason}", reason).replace("{answer}", answer), template)
    assert parts in (None, (reason.strip(replies.SPACE), answer.strip(replies.SPACE)))


def test_a_prompt_shows_its_template_and_the_record_asks_for_it():
    picture = jigsaw.Image.fromarray(photographs.astronaut())
    _, record = jigsaw.make_puzzle(picture, 2, 1, "pair", random.Random(0), reply_format=PLAN)
    assert record["prompt"].endswith("\nReply in this form: <plan>reason</plan><final>letter</final>")
    assert record["reply_format"] == PLAN and record["think"] is False
    rewards.check_gold(record)
    with pytest.raises(ValueError, match="tells them apart"):
        jigsaw.make_puzzle(picture, 2, 1, "pair", random.Random(0), reply_format="{reason} {answer}")


# ---------------------------------------------------------------------------------------------------------------------
# toy/formats.py


def test_training_and_test_share_no_word_and_no_shape():
    assert not set(formats.words("train")) & set(formats.words("test"))
    assert not set(formats.shapes("train")) & set(formats.shapes("test"))
    assert len(formats.words("train")) == 1000 and len(formats.words("test")) == 300
    train, test = (
        {formats.template_of(shape, "x", "y") for shape in formats.shapes(part)} for part in ("train", "test")
    )
    assert not train & test  # two shapes may be one template
    assert len(train) == len(formats.shapes("train")) > 300 and len(test) == len(formats.shapes("test")) > 80
    assert formats.shapes("train")[0] == formats.TAGS


@pytest.mark.parametrize("part", ["train", "test"])
def test_every_shape_reads_its_own_replies_and_no_plain_one(part):
    reason, plain = "1 looks light, 2 looks dark. so 1 was above A.", "1 looks light. so 1 was above A. A"
    for shape in formats.shapes(part):
        template = formats.template_of(shape, "zabo", "miru")
        assert replies.read_reply(formats.fill(template, reason, "A"), template) == (reason, "A")
        assert replies.read_reply(plain, template) is None


def test_formats_are_sampled_from_what_their_name_says():
    rng = random.Random(0)
    held_out = {formats.template_of(shape, "x", "y") for shape in formats.shapes("test")}
    for name, shapes, part in (("any", False, "train"), ("seen", False, "test"), ("unseen", True, "test")):
        for _ in range(50):
            template = formats.sample_template(name, rng)
            if template == formats.TRAINED:
                assert name == "any"
                continue
            used = sorted({word for word in formats.words(part) if word in template}, key=template.index)
            assert len(used) == 2
            assert (template.replace(used[0], "x").replace(used[1], "y") in held_out) is shapes
    assert {formats.sample_template("trained", rng) for _ in range(9)} == {formats.TRAINED}
    for _ in range(20):
        assert formats.sample_template("tags", rng).count("<") == 4


def records(tmp_path, kind, **flags):
    argv = [kind, "--out", str(tmp_path / kind)]
    for name, value in flags.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    formats.main(argv)
    from records import read_records

    return read_records(tmp_path / kind / "records.jsonl", rewards.check_gold)


def test_half_of_the_replies_follow_and_all_say_what_is_seen(tmp_path):
    made = records(tmp_path, "replies", count=80, scenes=8, per_picture=10, follow=0.5, seed=3)
    kept = [rewards.score(record["chosen"], record)["format"] == 1 for record in made]
    assert kept == [record["form"] == record["reply_format"] for record in made]
    assert 25 <= sum(kept) <= 55
    for record in made:
        if record["question"] == "look":  # what is seen is told truly
            assert record["chosen"].count(f" {record['answer']}.") == 1
    guesses = [f" {record['answer']}." in record["chosen"] for record in made if record["question"] == "pair"]
    assert 0.2 < sum(guesses) / len(guesses) < 0.8  # what is asked of puzzles is guessed


def test_questions_have_no_reply_and_words_no_format(tmp_path):
    asked = records(tmp_path, "questions", count=6, scenes=6, format="unseen", ask="test", split="test")
    assert all("chosen" not in record and "\nReply as " in record["prompt"] for record in asked)
    assert {record["source"] for record in asked} == {"formats-unseen-asked-anew"}
    plain = records(tmp_path, "words", count=6, scenes=2, per_picture=3)
    assert all(record["prompt"].splitlines()[-1].startswith("B. ") for record in plain)
    looks = records(tmp_path, "questions", count=6, scenes=6, question="look", split="test")
    assert {(record["question"], record["source"]) for record in looks} == {("look", "formats-any-look")}


@pytest.mark.parametrize(
    "kind, flag", [("words", "--question"), ("replies", "--question"), ("drill", "--split"), ("questions", "--follow")]
)
def test_a_flag_that_a_kind_does_not_read_is_refused(kind, flag, capsys):
    value = {"--question": "look", "--split": "test", "--follow": "0.5"}[flag]
    with pytest.raises(SystemExit):
        formats.main([kind, "--count", "2", "--out", "nowhere", flag, value])
    assert f"{flag} would not be read: {kind} has no use for it" in capsys.readouterr().err


def test_the_drill_is_to_copy_what_the_prompt_shows(tmp_path):
    drilled = records(tmp_path, "drill", count=50)
    assert all(record["prompt"].endswith(record["chosen"]) and not record["images"] for record in drilled)
    assert len({record["chosen"] for record in drilled}) > 45


def test_a_verdict_always_has_the_same_letter_and_pieces_are_pictures_of_their_own(tmp_path):
    for record in records(tmp_path, "words", count=24, scenes=6, per_picture=4):
        options = ["above", "below"] if record["question"] == "pair" else ["darker", "lighter"]
        assert record["options"] == options and record["options"]["AB".index(record["answer"])] == record["direction"]
        assert len(record["images"]) == 2 and record["prompt"].startswith("Position 1: <image>\nPosition 2: <image>\n")


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    first = [record["prompt"] for record in records(tmp_path / "a", "questions", count=5, scenes=5, seed=1)]
    assert first == [record["prompt"] for record in records(tmp_path / "b", "questions", count=5, scenes=5, seed=1)]
    assert first != [record["prompt"] for record in records(tmp_path / "c", "questions", count=5, scenes=5, seed=2)]
