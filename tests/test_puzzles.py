"""Every kind of puzzle, on photographs: an independent solver undoes it with the gold answer and finds the original.

The solver below knows the picture before, the record and the pictures after, and none of the code under test. It works
on NumPy arrays, by arithmetic of its own; where a piece came from is looked up in the original's pixels.
"""

import itertools
import random
import re

import numpy as np
import pytest
import skimage.data
from PIL import Image
from test_jigsaw import chi_square

import jigsaw
import mixing
import questions
import rewards
from questions import Choices
from toy.primer import render

SIZES = [(rows, cols) for rows, cols in itertools.product(range(1, 6), repeat=2) if rows * cols > 1]
ABOUT_PIECES = ("pair", "full", "inverse", "single", "multiple")


@pytest.fixture(scope="session")
def photographs():
    """Four subjects, 300 pixels wide."""
    pictures = []
    for name in ("astronaut", "coffee", "cat", "rocket"):
        picture = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        pictures.append(picture.resize((300, 300 * picture.height // picture.width)))
    return pictures


def sample_picture(photographs, rng):
    """A crop of a photograph, 120 to 200 pixels a side."""
    picture = rng.choice(photographs)
    width, height = rng.randint(120, 200), rng.randint(120, min(200, picture.height))
    x, y = rng.randint(0, picture.width - width), rng.randint(0, picture.height - height)
    return picture.crop((x, y, x + width, y + height))


def make(picture, seed, rows, cols, question, **options):
    return jigsaw.make_pictures(picture, Choices(rows, cols, question, **options), random.Random(seed))


# ---------------------------------------------------------------------------------------------------------------------
# The solver


def cells(rows, cols, height, width):
    """(y, x) slices of the grid's cells, row by row."""
    h, w = height // rows, width // cols
    return [np.s_[row * h : row * h + h, col * w : col * w + w] for row in range(rows) for col in range(cols)]


def region(box):
    x1, y1, x2, y2 = box
    return np.s_[y1:y2, x1:x2]


def chosen_option(record):
    return record["options"]["ABCDEFGH".index(record["answer"])]


def original_place(piece, before, places):
    """Position of a piece in the original, looked up in its pixels."""
    found = [number for number, place in enumerate(places, 1) if np.array_equal(before[place], piece)]
    assert len(found) == 1
    return found[0]


def check_arrangement(answer, pieces, before, places):
    """answer[x]: where the piece now at position x+1 was. Put there, the pieces are the original."""
    rebuilt = np.zeros_like(before)
    for piece, original in zip(pieces, answer, strict=True):
        rebuilt[places[original - 1]] = piece
    assert np.array_equal(rebuilt, before)


def check_about_pieces(record, pieces, before, places):
    answer, cols = record["answer"], record["cols"]
    if record["question"] == "full":
        check_arrangement(answer, pieces, before, places)
    elif record["question"] == "inverse":
        check_arrangement(range(1, len(places) + 1), [pieces[now - 1] for now in answer], before, places)
    elif record["question"] == "multiple":
        check_arrangement(map(int, chosen_option(record).split()), pieces, before, places)
        assert len(set(record["options"])) == len(record["options"]) >= min(4, len(places))
    elif record["question"] == "single":
        assert np.array_equal(before[places[answer - 1]], pieces[record["position"] - 1])
    else:
        (y, x), (other_y, other_x) = (
            divmod(original_place(pieces[position - 1], before, places) - 1, cols) for position in record["pair"]
        )
        words = ["above"] * (y < other_y) + ["below"] * (y > other_y)
        words += ["left"] * (x < other_x) + ["right"] * (x > other_x)
        assert chosen_option(record) == " and ".join(words)


def check_box(record, before, after):
    boxes = record["boxes"]
    assert np.array_equal(after[region(record["box"])], before[region(record["answer"])])
    assert record["answer"] != record["box"] and record["answer"] in boxes and record["box"] in boxes
    # Swapped back, with what the pixels say of the other rectangles, the picture is the original.
    rebuilt = after.copy()
    for box in boxes:
        part = after[region(box)]
        (home,) = [other for other in boxes if np.array_equal(before[region(other)], part)]
        rebuilt[region(home)] = part
    assert np.array_equal(rebuilt, before)


def check_rotation(record, before, after):
    side = min(before.shape[:2])
    top, left = (before.shape[0] - side) // 2, (before.shape[1] - side) // 2
    square = before[top : top + side, left : left + side]
    angle = int(chosen_option(record).removesuffix(" degrees"))
    if len(record["options"]) in (2, 4):
        assert np.array_equal(np.rot90(after, angle // 90), square)
        return
    # Resampled: turned back by the answer the disc resembles the original more than by any other option.
    centre = np.arange(side) - (side - 1) / 2
    inside = centre[:, None] ** 2 + centre[None, :] ** 2 < (side / 2 - 3) ** 2
    differences = {}
    for option in record["options"]:
        degrees = int(option.removesuffix(" degrees"))
        back = np.asarray(Image.fromarray(after).rotate(degrees, resample=Image.Resampling.BICUBIC))
        differences[degrees] = np.abs(back.astype(float) - square)[inside].mean()
    assert min(differences, key=differences.get) == angle


def check_patchfit(record, before, pictures):
    hole = region(record["box"])
    after = np.array(pictures[0])[: before.shape[0]].copy()
    assert not after[hole].any(), "the hole that is asked about is black"
    h, w = (part.stop - part.start for part in hole)
    letter = "ABCDEFGH".index(record["answer"])
    if len(pictures) > 1:
        patches = [np.asarray(picture) for picture in pictures[1:]]
    else:
        sheet = np.asarray(pictures[0])
        in_row = max(1, (before.shape[1] + 8) // (w + 8))
        corners = [(before.shape[0] + 8 + n // in_row * (h + 8), n % in_row * (w + 8)) for n in range(8)]
        patches = [sheet[y : y + h, x : x + w] for y, x in corners[: len(record["options"])]]
    assert np.array_equal(before[hole], patches[letter])
    # No patch can be found anywhere in what is still seen: each belongs to a hole.
    for box in record["boxes"]:
        assert len(np.unique(after[region(box)].reshape(-1, 3), axis=0)) == 1
        assert any(np.array_equal(before[region(box)], patch) for patch in patches)
        after[region(box)] = before[region(box)]
    assert np.array_equal(after, before)


def check_solution(record, picture, pictures):
    """Assert that the gold answer of an unmasked puzzle is right, by the pixels before and after."""
    rows, cols = record["rows"], record["cols"]
    before = np.asarray(picture)[: picture.height // rows * rows, : picture.width // cols * cols]
    after = np.asarray(pictures[0])
    if record["question"] == "box":
        check_box(record, before, after)
    elif record["question"] == "rotation":
        check_rotation(record, before, after)
    elif record["question"] == "patchfit":
        check_patchfit(record, before, pictures)
    else:
        places = cells(rows, cols, *before.shape[:2])
        separate = len(pictures) > 1
        pieces = [np.asarray(piece) for piece in pictures] if separate else [after[place] for place in places]
        assert len(pieces) == rows * cols
        check_about_pieces(record, pieces, before, places)


def check_reply(record):
    """The gold answer, written as the prompt asks, earns full marks."""
    rewards.check_gold(record)
    answer = record["answer"]
    if record["answer_type"] == "box":
        answer = ", ".join(map(str, answer))
    form = record.get("reply_format") or ("think" if record["think"] else "bare")
    reply = render("I looked.", answer if isinstance(answer, list) else str(answer), form)
    assert rewards.score(reply, record)["reward"] == 1.5, reply


# ---------------------------------------------------------------------------------------------------------------------
# Answers are right


@pytest.mark.parametrize("question", ABOUT_PIECES)
@pytest.mark.parametrize("rows, cols", SIZES)
def test_the_answer_puts_the_pieces_back_for_every_grid_up_to_5x5(photographs, question, rows, cols):
    for seed in range(4):
        rng = random.Random(f"{rows} {cols} {seed}")
        picture = sample_picture(photographs, rng)
        options = {"swap": 0.5, "think": rng.random() < 0.5, "separate": seed == 3}
        options["derange"] = seed == 2 and rows * cols > 3
        pictures, record = make(picture, seed, rows, cols, question, **options)
        check_solution(record, picture, pictures)
        check_reply(record)


@pytest.mark.parametrize("rows, cols", SIZES)
def test_the_rectangle_was_where_the_box_says(photographs, rows, cols):
    for seed in range(4):
        rng = random.Random(f"{rows} {cols} {seed}")
        picture = sample_picture(photographs, rng)
        pictures, record = make(picture, seed, rows, cols, "box", swap=0.5, derange=seed == 2)
        check_solution(record, picture, pictures)
        check_reply(record)
        w, h = (record["box"][2] - record["box"][0], record["box"][3] - record["box"][1])
        region_w, region_h = pictures[0].width // record["cols"], pictures[0].height // record["rows"]
        assert 0.1 * region_w - 1 <= w <= 0.6 * region_w + 1 and 0.1 * region_h - 1 <= h <= 0.6 * region_h + 1
        assert "{}, {}, {}, {}. Where".format(*record["box"]) in record["prompt"]
        assert f"{pictures[0].width} pixels wide and {pictures[0].height} high" in record["prompt"]


@pytest.mark.parametrize("angles", [2, 3, 4, 5, 6, 8])
def test_turned_back_by_the_answer_the_picture_is_upright(photographs, angles):
    seen = set()
    for seed in range(12):
        picture = sample_picture(photographs, random.Random(seed))
        pictures, record = make(picture, seed, 2, 1, "rotation", angles=angles)
        check_solution(record, picture, pictures)
        check_reply(record)
        assert len(record["options"]) == angles and record["source"] == f"jigsaw-rotation-{angles}"
        seen.add(record["angle"])
    assert len(seen) > angles // 2


@pytest.mark.parametrize("rows, cols", [(2, 1), (1, 2), (3, 1), (2, 2), (2, 3), (4, 2), (1, 8)])
@pytest.mark.parametrize("separate", [False, True])
def test_the_right_patch_fits_the_hole_and_no_decoy_can_be_seen_elsewhere(photographs, rows, cols, separate):
    for seed in range(6):
        picture = sample_picture(photographs, random.Random(seed))
        pictures, record = make(picture, seed, rows, cols, "patchfit", swap=0.5, separate=separate)
        check_solution(record, picture, pictures)
        check_reply(record)


@pytest.mark.parametrize("form", list(questions.REPLY_FORMAT_SENTENCE))
@pytest.mark.parametrize("question", questions.QUESTIONS)
def test_every_question_is_asked_in_every_form_and_its_answer_earns_full_marks(photographs, question, form):
    _, record = make(photographs[0], 1, 2, 2, question, reply_format=form)
    check_reply(record)
    assert "{" not in record["prompt"].replace("\\boxed{ }", "")


# ---------------------------------------------------------------------------------------------------------------------
# Chance: what a reply earns that never looks at the picture

CHANCE = [  # question, grid, the mean reward that the best constant answer can expect
    ("pair", (2, 1), 1 / 2),
    ("pair", (2, 2), 1 / 8),
    ("full", (2, 1), 1 / 2),
    ("full", (2, 2), 1 / 4),
    ("inverse", (3, 1), 1 / 3),
    ("single", (2, 2), 1 / 4),
    ("multiple", (2, 1), 1 / 2),
    ("multiple", (2, 2), 1 / 4),
    ("rotation", (1, 1), 1 / 4),
    ("patchfit", (2, 2), 1 / 4),
]


def constant_answers(record):
    if record["answer_type"] == "letter":
        return "ABCDEFGH"[: len(record["options"])]
    n = record["rows"] * record["cols"]
    if record["answer_type"] == "digit":
        return [str(number) for number in range(1, n + 1)]
    return [" ".join(map(str, order)) for order in itertools.permutations(range(1, n + 1))]


def constant_replies(question, grid, **options):
    """{constant reply: its mean accuracy over 800 puzzles}"""
    count, total = 800, {}
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (24, 24, 3)).astype(np.uint8))
    for seed in range(count):
        _, record = make(picture, seed, *grid, question, think=False, **options)
        for reply in constant_answers(record):
            accuracy = rewards.score(reply, record, format_weight=0)["accuracy"]
            total[reply] = total.get(reply, 0) + accuracy / count
    return total


@pytest.mark.parametrize("question, grid, chance", CHANCE)
def test_no_constant_answer_earns_more_than_chance(question, grid, chance):
    earned = constant_replies(question, grid)
    assert max(earned.values()) < chance + 4 * 0.5 / 800**0.5, earned
    assert np.mean(list(earned.values())) == pytest.approx(chance, abs=1e-9)


@pytest.mark.parametrize("question", ["full", "inverse"])
def test_where_every_piece_moves_a_constant_answer_earns_one_in_one_less(question):
    earned = constant_replies(question, (2, 2), derange=True)
    assert max(earned.values()) < 1 / 3 + 4 * 0.5 / 800**0.5  # what stays in place is known to be wrong
    assert earned["1 2 3 4"] == 0


def test_no_constant_box_overlaps_much_with_where_the_rectangle_was(photographs):
    records = []
    for seed in range(300):
        picture = photographs[0].resize((200, 200))
        records.append(make(picture, seed, 2, 2, "box", think=False)[1])
    best = 0
    for x, y, w, h in itertools.product(range(0, 200, 20), range(0, 200, 20), (30, 60, 100, 200), (30, 60, 100, 200)):
        reply = f"{x}, {y}, {min(200, x + w)}, {min(200, y + h)}"
        best = max(best, np.mean([rewards.score(reply, record)["accuracy"] for record in records]))
    assert best < 0.1
    # To repeat the box of the prompt earns nothing: the rectangle comes from another region.
    assert all(rewards.score(", ".join(map(str, record["box"])), record)["accuracy"] == 0 for record in records)


def test_the_wrong_lists_of_multiple_are_derangements_where_the_right_one_must_be(photographs):
    for seed in range(50):
        _, record = make(photographs[0], seed, 2, 2, "multiple", derange=True)
        for option in record["options"]:
            assert all(int(word) != position for position, word in enumerate(option.split(), 1))


def test_the_asked_hole_and_the_moved_rectangle_are_equally_likely_everywhere(photographs):
    holes, boxes = {}, {}
    picture = photographs[0].resize((80, 80))
    for seed in range(1200):
        _, record = make(picture, seed, 2, 2, "patchfit")
        hole = record["boxes"].index(record["box"])
        holes[hole, record["answer"]] = holes.get((hole, record["answer"]), 0) + 1
        _, record = make(picture, seed, 2, 2, "box")
        move = record["boxes"].index(record["box"]), record["boxes"].index(record["answer"])
        boxes[move] = boxes.get(move, 0) + 1
    assert chi_square(holes, 16) < 45  # 15 degrees of freedom: above 45 once in 10,000
    assert chi_square(boxes, 12) < 40


# ---------------------------------------------------------------------------------------------------------------------
# Pictures that would make a question ambiguous


@pytest.mark.parametrize("question", questions.QUESTIONS)
def test_a_flat_picture_is_refused_by_name_of_what_is_identical(question):
    with pytest.raises(mixing.Ambiguous, match="identical"):
        make(Image.new("RGB", (64, 64), (9, 9, 9)), 0, 2, 2, question)


def test_two_identical_pieces_are_enough_and_they_are_named(photographs):
    pixels = np.array(photographs[0].resize((60, 60)))
    pixels[40:] = pixels[:20]
    with pytest.raises(ValueError, match=r"the pieces at positions \d and \d of the mixed picture are identical"):
        make(Image.fromarray(pixels), 0, 3, 1, "full")
    pixels[40, 0, 0] ^= 1  # one pixel by one: another picture
    make(Image.fromarray(pixels), 0, 3, 1, "full")
    with pytest.raises(mixing.Ambiguous):  # which the frame hides
        make(Image.fromarray(pixels), 0, 3, 1, "full", mask_ratio=0.1)


def test_a_picture_that_looks_the_same_upside_down_cannot_be_asked_about_by_180_degrees(photographs):
    upper = np.array(photographs[0].resize((60, 30)))
    symmetric = Image.fromarray(np.concatenate([upper, upper[::-1, ::-1]]))
    for angles in (2, 4):
        with pytest.raises(mixing.Ambiguous, match="0 and 180 degrees"):
            make(symmetric, 0, 1, 1, "rotation", angles=angles)


# ---------------------------------------------------------------------------------------------------------------------
# Several pictures, frames, words


@pytest.mark.parametrize("question", ABOUT_PIECES)
def test_separate_pieces_are_pictures_of_their_own_each_with_its_marker(photographs, question):
    pictures, record = make(photographs[1], 3, 2, 3, question, separate=True)
    assert len(pictures) == 6 == record["prompt"].count("<image>")
    assert all(f"Position {position}: <image>\n" in record["prompt"] for position in range(1, 7))
    assert len({picture.size for picture in pictures}) == 1
    with pytest.raises(ValueError, match="make_pictures"):
        jigsaw.make_puzzle(photographs[1], 2, 3, question, random.Random(3), separate=True)


def test_separate_patches_stand_behind_their_letters(photographs):
    pictures, record = make(photographs[1], 3, 2, 2, "patchfit", separate=True)
    assert len(pictures) == 5 == record["prompt"].count("<image>")
    assert re.findall(r"^([A-D])\. <image>$", record["prompt"], re.M) == list("ABCD")
    assert record["prompt"].startswith("<image>\n")


@pytest.mark.parametrize("separate", [False, True])
def test_a_dialogue_begins_with_a_user_and_ends_where_the_assistant_speaks(photographs, separate):
    _, record = make(photographs[1], 3, 2, 1, "pair", separate=separate, dialogue=True)
    _, plain = make(photographs[1], 3, 2, 1, "pair", separate=separate)
    assert "User: " in record["prompt"] and record["prompt"].endswith("\nAssistant:")
    assert plain["prompt"] in record["prompt"]
    assert record["prompt"].count("<image>") == (2 if separate else 1)


@pytest.mark.parametrize(
    "question, options, cause",
    [
        ("box", {"mask_ratio": 0.1}, "hides the edges of pieces"),
        ("rotation", {"separate": True}, "nothing to separate"),
        ("rotation", {"angles": 7}, "7 angles"),
        ("rotation", {"derange": True}, "nothing to derange"),
        ("patchfit", {"rows": 3, "cols": 3}, "more than 8 letters"),
        ("multiple", {"derange": True}, "needs a wrong one"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_in_one_line(photographs, question, options, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        make(photographs[0], 0, **{"rows": 2, "cols": 1, "question": question} | options)
    assert "\n" not in str(caught.value)
