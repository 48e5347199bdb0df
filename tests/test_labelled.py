"""The labelled answers and golds in tests/data, written by hand by somebody who had not seen the code.

Goals: fewer than 2 % of the right answers refused, none of the wrong ones accepted; every gold that can be scored is
accepted, every other one is refused with a cause.
"""

import collections
import json
from pathlib import Path

import pytest

import rewards

DATA = Path(__file__).parent / "data"


def rows_of(name):
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


ANSWERS, GOLDS = rows_of("labelled_answers.jsonl"), rows_of("golds.jsonl")
TYPES = list(rewards.ANSWER_TYPES)


def accuracy_of(row):
    record = {**row, "think": True}
    return rewards.score(f"<think>R</think><answer>{row['text']}</answer>", record)["accuracy"]


def shown(row):
    return f"{row['id']}: {row['text']!r} for {row['answer']!r}"


def test_the_labelled_sets_are_large_enough_to_say_something():
    assert len(ANSWERS) >= 2_900 and len(GOLDS) >= 200
    assert {row["answer_type"] for row in ANSWERS} == {row["answer_type"] for row in GOLDS} == set(TYPES)
    assert len({row["id"] for row in ANSWERS}) == len(ANSWERS)


@pytest.mark.parametrize("kind", TYPES)
def test_no_wrong_answer_is_accepted_and_none_gets_more_than_its_share(kind):
    too_good = []
    for row in ANSWERS:
        if row["answer_type"] == kind and accuracy_of(row) > float(row["right"]) + 1e-9:
            too_good.append(shown(row))
    assert not too_good


@pytest.mark.parametrize("kind", TYPES)
def test_fewer_than_two_percent_of_the_right_answers_are_refused(kind):
    right = [row for row in ANSWERS if row["answer_type"] == kind and row["right"]]
    refused = [shown(row) for row in right if accuracy_of(row) < float(row["right"]) - 1e-9]
    assert len(refused) < 0.02 * len(right), refused


def test_no_class_of_right_answers_is_lost():
    right, refused = collections.Counter(), collections.Counter()
    for row in ANSWERS:
        if row["right"]:
            right[row["class"]] += 1
            refused[row["class"]] += accuracy_of(row) < float(row["right"]) - 1e-9
    assert [name for name in right if refused[name] > max(1, 0.1 * right[name])] == []


@pytest.mark.parametrize("gold", GOLDS, ids=lambda gold: gold["id"])
def test_a_gold_is_accepted_if_it_can_be_scored_and_else_refused_in_one_line(gold):
    if gold["scorable"]:
        rewards.check_gold(gold)
        return
    with pytest.raises(ValueError, match="answer") as error:
        rewards.check_gold(gold)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["math", "text", "letter", "digit"])
def test_every_gold_that_can_be_scored_is_right_when_it_is_given_back(kind):
    for gold in GOLDS:
        if gold["answer_type"] == kind and gold["scorable"]:
            assert accuracy_of({**gold, "text": str(gold["answer"])}) == 1.0, gold
