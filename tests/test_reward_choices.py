"""The rewards that grpo.py's --reward chooses among: each by worked cases, and what must not change with them."""

import itertools
import json

import pytest

import grpo
import rewards
import scoring


def think(answer):
    return f"<think>it is so</think><answer>{answer}</answer>"


def grid(answer, rows=2, cols=2, **fields):
    return {"answer_type": "grid", "answer": list(answer), "rows": rows, "cols": cols, "think": True, **fields}


BOX = {"answer_type": "box", "answer": [0, 0, 10, 10], "think": True}


def earned(record, text, name, progress=0.0):
    score = rewards.score(
        think(text), record, format_weight=0.0, chosen={record["answer_type"]: name}, progress=progress
    )
    assert score["accuracy"] == rewards.score(think(text), record)["accuracy"]
    return score["reward"]


# ---------------------------------------------------------------------------------------------------------------------
# Grids

# Piece 1 stood at place 2, piece 2 at 1, …: the picture is 2 1 / 4 3.
SWAPPED = [2, 1, 4, 3]
GRIDS = [
    # (rows, cols, gold, answer, fraction, exact, neighbours, graded)
    (2, 2, SWAPPED, [2, 1, 4, 3], 1, 1, 1, 1),
    # 2 1 / 3 4: of 2|1, 4|3, 2 over 4, 1 over 3 only the first stays
    (2, 2, SWAPPED, [2, 1, 3, 4], 1 / 2, 0, 1 / 4, 0.1),
    # 4 3 / 2 1: no piece is right, but both rows are whole
    (2, 2, SWAPPED, [4, 3, 2, 1], 0, 0, 1 / 2, 0),
    # 1 2 / 3 4: 1 over 3 and 2 over 4 stay
    (2, 2, SWAPPED, [1, 2, 3, 4], 0, 0, 1 / 2, 0),
    (2, 2, SWAPPED, [2, 1, 4, 4], 0, 0, 0, 0),
    (2, 2, SWAPPED, [1, 1, 1, 1], 0, 0, 0, 0),
    # 3 1 2 in a row: 1|2 stays, 2|3 does not
    (1, 3, [1, 2, 3], [2, 3, 1], 0, 0, 1 / 2, 0),
    (1, 3, [1, 2, 3], [1, 3, 2], 1 / 3, 0, 0, 0.2 / 3),
    # 3 stands below 2 in the answer, but beside nothing: the end of a row is no neighbour of the next row
    (3, 1, [1, 2, 3], [2, 3, 1], 0, 0, 1 / 2, 0),
    (1, 2, [1, 2], [2, 1], 0, 0, 0, 0),
    # 1 2 3 / 4 5 6 against 4 5 6 / 1 2 3: four of seven
    (2, 3, [1, 2, 3, 4, 5, 6], [4, 5, 6, 1, 2, 3], 0, 0, 4 / 7, 0),
    (1, 1, [1], [1], 1, 1, 1, 1),
]


@pytest.mark.parametrize("rows, cols, gold, answer, fraction, exact, neighbours, graded", GRIDS)
def test_grids_by_hand(rows, cols, gold, answer, fraction, exact, neighbours, graded):
    record, text = grid(gold, rows, cols), " ".join(map(str, answer))
    assert earned(record, text, "fraction") == pytest.approx(fraction)
    assert earned(record, text, "exact") == exact
    assert earned(record, text, "neighbours") == pytest.approx(neighbours)
    assert earned(record, text, "graded") == pytest.approx(graded)


def test_neighbours_are_those_of_the_picture_in_both_directions_of_the_question():
    places = [1, 2, 4, 3]  # of piece 1, 2, 3, 4: the picture is 1 2 4 3
    pieces = [1, 2, 4, 3]
    for answer in itertools.permutations(range(1, 5)):
        inverse = [answer.index(place) + 1 for place in range(1, 5)]
        as_places = earned(grid(places, 1, 4, question="full"), " ".join(map(str, answer)), "neighbours")
        as_pieces = earned(grid(pieces, 1, 4, question="inverse"), " ".join(map(str, inverse)), "neighbours")
        assert as_places == as_pieces
    # As places 2 3 1 4 is the picture 3 1 2 4, which keeps 1|2 and 2|4; as pieces it is itself and keeps nothing.
    assert earned(grid(places, 1, 4), "2 3 1 4", "neighbours") == pytest.approx(2 / 3)
    assert earned(grid(pieces, 1, 4, question="inverse"), "2 3 1 4", "neighbours") == 0


def test_without_rows_and_cols_the_pieces_stand_in_one_row():
    record = {"answer_type": "grid", "answer": [1, 2, 3, 4], "think": True}
    assert earned(record, "1 2 4 3", "neighbours") == pytest.approx(1 / 3)


def test_a_right_neighbour_reward_is_one_for_the_gold_alone():
    gold = [3, 1, 4, 2]
    full = [order for order in itertools.permutations(gold) if earned(grid(gold), str(list(order)), "neighbours") == 1]
    assert full == [tuple(gold)]


# ---------------------------------------------------------------------------------------------------------------------
# Boxes

BOXES = [
    # (answer, IoU, found, centre)
    ("0, 0, 10, 10", 1, 1, 1),
    ("0, 0, 10, 5", 1 / 2, 1, 1),
    ("0, 0, 10, 4", 2 / 5, 0, 1),
    ("5, 5, 15, 15", 25 / 175, 0, 1),  # its centre is a corner, and borders count
    ("6, 6, 16, 16", 16 / 184, 0, 0),
    ("-100, -100, 110, 110", 100 / 210**2, 0, 1),
    ("10, 10, 0, 0", 0, 0, 0),
    ("5, 5, 5, 5", 0, 0, 0),
]


@pytest.mark.parametrize("text, overlap, found, centre", BOXES)
def test_boxes_by_hand(text, overlap, found, centre):
    assert earned(BOX, text, "iou") == pytest.approx(overlap)
    assert earned(BOX, text, "found") == found
    assert earned(BOX, text, "centre") == centre


def test_the_threshold_of_a_box_rises_with_the_run_and_depends_on_nothing_else():
    for text, counts_until in (
        ("0, 0, 10, 8", 0.0),
        ("0, 0, 10, 9", 0.1),
        ("0, 0, 10, 9.7", 0.25),
        ("0, 0, 10, 10", 1),
    ):
        overlap = rewards.score(think(text), BOX)["accuracy"]
        for step in range(100):
            progress = step / 100
            assert earned(BOX, text, "rising", progress) == (overlap if progress < counts_until else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing


@pytest.mark.parametrize("kind", rewards.REWARDS)
def test_the_first_reward_of_a_type_is_its_accuracy_and_every_one_lies_between_0_and_1_and_is_1_for_the_gold(kind):
    record = BOX if kind == "box" else grid([2, 1, 4, 3])
    gold = ", ".join(map(str, record["answer"]))
    for name, reward in rewards.REWARDS[kind].items():
        assert earned(record, gold, name, 0.9) == 1, name
        assert reward.__doc__, name
    assert next(iter(rewards.REWARDS[kind].values())) is rewards.plain_accuracy


def test_what_is_not_well_formed_earns_no_other_reward_either():
    for kind, names in rewards.REWARDS.items():
        record = BOX if kind == "box" else grid([2, 1, 4, 3])
        for name in names:
            for reply in ("2 1 4 3", think("2 1 4"), think(""), "0, 0, 10, 10", think("0 0 10")):
                assert rewards.score(reply, record, chosen={kind: name})["reward"] == 0, (name, reply)


def test_choices_are_read_from_the_flag_and_refused_in_one_line(capsys):
    assert rewards.chosen_rewards(["grid=graded", "box=iou"]) == {"grid": "graded", "box": "iou"}
    base = ["--model", "m", "--data", "d", "--out", "o"]
    assert grpo.parse_args([*base, "--reward", "grid=exact"]).reward == ["grid=exact"]
    for choice, cause in (
        ("math=exact", "grid and box only"),
        ("grid", "the rewards for grid are fraction, exact, neighbours, graded"),
        ("grid=iou", "the rewards for grid are"),
        ("=", "grid and box only"),
    ):
        with pytest.raises(SystemExit) as stop:
            grpo.parse_args([*base, "--reward", choice])
        errors = capsys.readouterr().err
        assert stop.value.code == 2 and errors.count("\n") == 1 and cause in errors
    with pytest.raises(SystemExit):
        grpo.parse_args([*base, "--reward", "grid=exact", "grid=graded"])
    assert "grid has a reward already" in capsys.readouterr().err


def test_a_scorer_hands_on_the_choice_and_how_far_the_run_is():
    scorer = scoring.Scorer(format_weight=0.0, chosen={"box": "rising"})
    near = think("0, 0, 10, 9")
    assert [scorer.score(near, BOX, progress)["reward"] for progress in (0.0, 0.05, 0.1)] == [0.9, 0.9, 0.0]
    math = {"answer_type": "math", "answer": "5", "think": True}
    assert scorer.score(think("5"), math, 0.5)["reward"] == 1.0
    scorer.close()
    assert json.loads(json.dumps(scorer.options)) == scorer.options
