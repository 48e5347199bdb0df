"""toy/downstream.py: the answers are those that an independent look at the pixels gives, and no constant earns more."""

import collections
import json

import numpy as np
import pytest
from PIL import Image

import rewards
from toy import downstream


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """100 test questions and their pictures: [(record, (H, W, 3) floats), …]."""
    out = tmp_path_factory.mktemp("downstream")
    downstream.main(["--count", "100", "--split", "test", "--seed", "5", "--out", str(out)])
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    return [(record, np.asarray(Image.open(out / record["images"][0]), dtype=float)) for record in records]


def place(pixels, colour):
    """(number of pixels of exactly this colour, mean x, mean y)."""
    y, x = np.nonzero((pixels == colour).all(axis=2))
    return len(x), x.mean(), y.mean()


def solve(record, pixels):
    """The right option by the pixels alone."""
    kind, words = record["category"], record["options"]
    if kind == "half" and "above" in words:
        return "above" if pixels[:56].mean() > pixels[56:].mean() else "below"
    if kind == "half":
        warm = pixels[:, :, 0] - pixels[:, :, 2]
        return "left" if warm[:, :56].mean() > warm[:, 56:].mean() else "right"
    white, x, y = place(pixels, 255)
    if kind == "count":  # a disc of radius 0.09 x 112 has some 330 pixels, and discs never overlap
        return str(round(white / 330))
    black, other_x, other_y = place(pixels, 0)
    if kind == "relation":
        return ("left" if x < other_x else "right") if "left" in words else "above" if y < other_y else "below"
    if kind == "nearer":  # lower feet and a larger size say the same
        assert (white > black) == (y + (white / np.pi) ** 0.5 > other_y + (black / np.pi) ** 0.5)
    return "white" if white > black else "black"


def test_the_answers_are_those_that_the_pixels_give(questions):
    for record, pixels in questions:
        assert record["options"]["ABCD".index(record["answer"])] == solve(record, pixels), record["id"]


def test_the_kinds_take_turns_and_no_letter_and_no_option_is_the_usual_answer(questions):
    kinds = collections.Counter(record["category"] for record, _ in questions)
    assert kinds == dict.fromkeys(downstream.KINDS, 20)
    letters = collections.Counter(record["answer"] for record, _ in questions if len(record["options"]) == 2)
    assert 25 <= letters["A"] <= 55 and letters["A"] + letters["B"] == 80
    said = collections.Counter(record["options"]["ABCD".index(record["answer"])] for record, _ in questions)
    for pair in (("white", "black"), ("above", "below"), ("left", "right")):
        assert min(said[word] for word in pair) >= 3, said


def test_the_reply_to_learn_from_earns_the_whole_reward(questions):
    for record, _ in questions:
        found = rewards.score(record["chosen"], record)
        assert found["accuracy"] == found["format"] == 1, record["chosen"]


def test_train_and_test_questions_share_no_picture(tmp_path):
    for split in ("train", "test"):
        downstream.main(["--count", "10", "--split", split, "--size", "56", "--out", str(tmp_path / split)])
    names = [{path.name for path in (tmp_path / split / "images").iterdir()} for split in ("train", "test")]
    assert len(names[0]) == len(names[1]) == 10 and not names[0] & names[1]
