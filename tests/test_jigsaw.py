"""jigsaw.py: the puzzles are what their records say.

Where it can be done, the truth is read from the pixels: `coordinates` is a picture whose red is x and whose green is y,
so a piece of the mixed picture tells by itself where it came from, without any of the bookkeeping under test.
"""

import collections
import json
import os
import random
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import files
import jigsaw
import lazy_puzzles
import mixing
import picture_files
import pictures
import questions
import replies
import rewards
from toy.primer import render
from toy.scenes import scene

GRIDS = [(2, 1), (1, 2), (3, 1), (1, 4), (2, 2), (2, 3), (3, 3)]


def coordinates(width, height):
    """Red is x, green is y, blue is 7; at most 256 pixels a side."""
    pixels = np.full((height, width, 3), 7, dtype=np.uint8)
    pixels[:, :, 0] = np.arange(width)[None, :]
    pixels[:, :, 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


def came_from(puzzle, rows, cols, position):
    """(x, y) in the original of the top left pixel of the piece now at `position`, read from its colour."""
    row, col = divmod(position - 1, cols)
    return puzzle.getpixel((col * (puzzle.width // cols), row * (puzzle.height // rows)))[:2]


def chi_square(counts, categories):
    expected = sum(counts.values()) / categories
    assert len(counts) <= categories
    return sum((n - expected) ** 2 for n in counts.values()) / expected + (categories - len(counts)) * expected


def run(*argv):
    jigsaw.main([str(part) for part in argv])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -------- dividing and mixing


@pytest.mark.parametrize("rows, cols", GRIDS)
@pytest.mark.parametrize("width, height", [(12, 12), (37, 50), (64, 41)])
def test_undoing_the_order_gives_back_the_trimmed_picture(rows, cols, width, height):
    picture = coordinates(width, height)
    puzzle, record = jigsaw.make_puzzle(picture, rows, cols, "full", random.Random(width + rows))
    h, w = height // rows, width // cols
    assert puzzle.size == (w * cols, h * rows)
    rebuilt = Image.new("RGB", puzzle.size)
    for position, original in enumerate(record["order"]):
        (row, col), (to_row, to_col) = divmod(position, cols), divmod(original - 1, cols)
        rebuilt.paste(puzzle.crop((col * w, row * h, col * w + w, row * h + h)), (to_col * w, to_row * h))
    assert rebuilt.tobytes() == picture.crop((0, 0, w * cols, h * rows)).tobytes()


def test_positions_are_numbered_row_by_row_from_1():
    # 2 rows of 3: the piece with its corner at x=20, y=10 of a 30x20 picture is the last one, number 6
    numbers = {(0, 0): 1, (10, 0): 2, (20, 0): 3, (0, 10): 4, (10, 10): 5, (20, 10): 6}
    for seed in range(20):
        puzzle, record = jigsaw.make_puzzle(coordinates(30, 20), 2, 3, "full", random.Random(seed))
        seen = [numbers[came_from(puzzle, 2, 3, position)] for position in range(1, 7)]
        assert record["answer"] == record["order"] == seen
        assert record["answer_type"] == "grid"


def test_all_orders_are_equally_likely_and_the_original_one_is_among_them():
    orders = collections.Counter()
    for seed in range(1800):
        orders[tuple(jigsaw.make_puzzle(coordinates(3, 3), 3, 1, "full", random.Random(seed))[1]["order"])] += 1
    assert (1, 2, 3) in orders
    assert chi_square(orders, 6) < 25  # 5 degrees of freedom: above 25 once in 7,000


def test_derange_moves_every_piece_and_reaches_every_such_order():
    orders = collections.Counter()
    for seed in range(1800):
        record = jigsaw.make_puzzle(coordinates(4, 4), 2, 2, "full", random.Random(seed), derange=True)[1]
        assert all(original != position for position, original in enumerate(record["order"], 1))
        orders[tuple(record["order"])] += 1
    assert chi_square(orders, 9) < 30  # 4 pieces have 9 derangements


def test_swap_exchanges_rows_and_columns_that_often_and_never_for_a_square():
    def rows_of(rows, cols, swap):
        picture = coordinates(12, 12)
        records = [jigsaw.make_puzzle(picture, rows, cols, "full", random.Random(s), swap=swap)[1] for s in range(400)]
        assert all(record["source"] == f"jigsaw-full-{record['rows']}x{record['cols']}" for record in records)
        return [record["rows"] for record in records]

    assert set(rows_of(3, 2, 0.0)) == {3}
    assert set(rows_of(3, 2, 1.0)) == {2}
    assert 60 <= rows_of(3, 2, 0.25).count(2) <= 140  # 100 expected, sigma 8.7
    assert set(rows_of(2, 2, 1.0)) == {2}


def test_a_mask_hides_a_frame_and_the_cuts_and_nothing_else():
    # pieces of 10x10, ratio 0.25: int(2.5) = 2 pixels at the picture's edge, 1 on each side of the cut at row 10
    picture = coordinates(10, 20)  # no pixel of it is black
    puzzle, record = jigsaw.make_puzzle(picture, 2, 1, "pair", random.Random(3), mask_ratio=0.25)
    visible = np.asarray(puzzle).any(axis=2)
    expected = np.zeros((20, 10), dtype=bool)
    expected[2:9, 2:8] = expected[11:18, 2:8] = True
    assert (visible == expected).all()
    assert "black frame" in record["prompt"]
    assert "black" not in jigsaw.make_puzzle(picture, 2, 1, "pair", random.Random(3))[1]["prompt"]


# -------- questions


def test_a_new_question_is_one_entry_of_the_table(monkeypatch, tmp_path):
    """Where is the piece now that was at the top left? The reader of the answer type is there already."""

    def ask_corner(mixed, rng):
        return {"answer": mixed.order.index(1) + 1, "corner": "top left", "options": ["it is there", "it is not"]}

    corner = questions.Question("a corner's piece", "One of {n}: where is {corner} now?", "digit", ask_corner)
    monkeypatch.setitem(jigsaw.QUESTIONS, "corner", corner)
    run("--scenes", 3, "--count", 5, "--rows", 2, "--cols", 2, "--question", "corner", "--out", tmp_path)
    for record in read(tmp_path / "records.jsonl"):
        assert "One of 4: where is top left now?\nA. it is there\nB. it is not\n" in record["prompt"]
        assert record["prompt"].endswith("then give only the number inside <answer> </answer>.")
        assert record["order"][record["answer"] - 1] == 1
        assert (record["answer_type"], record["source"]) == ("digit", "jigsaw-corner-2x2")
        rewards.check_gold(record)


def test_every_question_of_the_table_says_what_it_asks_and_can_be_asked():
    for name in jigsaw.QUESTIONS:
        _, record = jigsaw.make_puzzle(coordinates(12, 12), 2, 2, name, random.Random(0))
        assert record["question"] == name and record["answer_type"] == jigsaw.QUESTIONS[name].answer_type
        assert "{" not in record["prompt"]
        rewards.check_gold(record)


# -------- the pair question


@pytest.mark.parametrize("rows, cols", [(2, 1), (3, 1), (1, 3), (2, 2), (2, 3)])
def test_the_right_letter_names_where_the_pixels_came_from(rows, cols):
    asked = set()
    for seed in range(300):
        puzzle, record = jigsaw.make_puzzle(coordinates(60, 60), rows, cols, "pair", random.Random(seed))
        k, j = record["pair"]
        (x, y), (other_x, other_y) = came_from(puzzle, rows, cols, k), came_from(puzzle, rows, cols, j)
        words = [["above"], [], ["below"]][(y > other_y) - (y < other_y) + 1]
        words = words + [["left"], [], ["right"]][(x > other_x) - (x < other_x) + 1]
        assert record["direction"] == " and ".join(words)
        assert record["options"]["ABCDEFGH".index(record["answer"])] == record["direction"]
        assert f"position {k}, relative to the piece now at position {j}?" in record["prompt"]
        asked.add((k, j))
    n = rows * cols
    assert len(asked) == n * (n - 1), "some pair of positions is never asked"


def test_the_relation_of_two_places_is_named_from_the_first_ones_point_of_view():
    # 1 2 3
    # 4 5 6
    table = {
        (1, 2): "left",
        (2, 1): "right",
        (3, 1): "right",
        (1, 4): "above",
        (2, 5): "above",
        (4, 1): "below",
        (1, 5): "above and left",
        (3, 4): "above and right",
        (4, 3): "below and left",
        (6, 1): "below and right",
    }
    for (first, second), word in table.items():
        assert questions.relation(first, second, cols=3) == word


@pytest.mark.parametrize("rows, cols, options", [(2, 1, {"above", "below"}), (1, 3, {"left", "right"}), (2, 2, None)])
def test_a_line_of_pieces_has_2_options_and_a_grid_has_8_and_the_prompt_lists_them(rows, cols, options):
    record = jigsaw.make_puzzle(coordinates(30, 30), rows, cols, "pair", random.Random(5))[1]
    if options is None:
        lines = {"above", "below", "left", "right"}
        options = lines | {f"{v} and {h}" for v in ("above", "below") for h in ("left", "right")}
    assert set(record["options"]) == options and len(record["options"]) == len(options)
    listed = re.findall(r"^([A-H])\. (.+)$", record["prompt"], re.MULTILINE)
    assert listed == list(zip("ABCDEFGH", record["options"], strict=False))


@pytest.mark.parametrize("rows, cols, letters", [(2, 1, 2), (2, 2, 8)])
def test_the_right_letter_is_equally_likely_everywhere_and_so_is_the_first_option(rows, cols, letters):
    answers, firsts = collections.Counter(), collections.Counter()
    for seed in range(1600):
        record = jigsaw.make_puzzle(coordinates(4, 4), rows, cols, "pair", random.Random(seed))[1]
        answers[record["answer"]] += 1
        firsts[record["options"][0]] += 1
    assert chi_square(answers, letters) < 28  # 7 degrees of freedom: above 28 once in 4,000
    assert chi_square(firsts, letters) < 28


# -------- prompts and records


@pytest.mark.parametrize("question", ["pair", "full"])
@pytest.mark.parametrize("form", list(jigsaw.REPLY_FORMAT_SENTENCE))
def test_a_prompt_asks_for_its_form_and_a_reply_in_that_form_scores_full_marks(question, form):
    record = jigsaw.make_puzzle(coordinates(30, 30), 2, 2, question, random.Random(1), reply_format=form)[1]
    marks = {"think": "</think>", "bare": "nothing else", "tags": "</result>", "boxed": r"\boxed{ }", "json": "JSON"}
    for name, mark in {**marks, "line": '"Answer: "'}.items():
        assert (mark in record["prompt"]) == (name == form)
    wanted, other = ("the letter", "the numbers") if question == "pair" else ("the numbers", "the letter")
    assert wanted in record["prompt"] and other not in record["prompt"]
    assert ("4 numbers" in record["prompt"]) == (question == "full")
    assert record["think"] == (form == "think") and record["reply_format"] == form
    rewards.check_gold(record)
    reply = render("1 looks light.", record["answer"], form)
    assert rewards.score(reply, record)["reward"] == 1.5


def test_think_and_bare_prompts_need_no_reply_format_field():
    for think, mark in ((True, "<answer> </answer>"), (False, "Give only the letter, nothing else.")):
        record = jigsaw.make_puzzle(coordinates(9, 9), 2, 1, "pair", random.Random(0), think)[1]
        assert record["think"] is think and "reply_format" not in record
        assert mark in record["prompt"]


def test_a_pair_prompt_is_short():
    for rows, cols, most in ((2, 1, 60), (4, 1, 60), (2, 2, 80)):
        for form in jigsaw.REPLY_FORMAT_SENTENCE:
            record = jigsaw.make_puzzle(coordinates(9, 9), rows, cols, "pair", random.Random(0), reply_format=form)[1]
            words = re.findall(r"[A-Za-z]+", record["prompt"])
            assert len(words) <= most + 10, record["prompt"]


def test_the_same_rng_state_gives_the_same_puzzle():
    picture = scene(random.Random(8))
    first, again = (jigsaw.make_puzzle(picture, 3, 2, "pair", random.Random(4), swap=0.5) for _ in range(2))
    assert first[0].tobytes() == again[0].tobytes() and first[1] == again[1]


@pytest.mark.parametrize(
    "rows, cols, question, options, cause",
    [
        (1, 1, "pair", {}, "fewer than 2 pieces"),
        (2, 1, "spiral", {}, "spiral"),
        (2, 1, "pair", {"reply_format": "verse"}, "verse"),
        (9, 1, "full", {}, "too small"),
        (1, 9, "full", {}, "too small"),
        (2, 1, "pair", {"mask_ratio": 0.5}, "mask ratio"),
        (2, 1, "pair", {"swap": 1.5}, "swap"),
    ],
)
def test_an_impossible_puzzle_is_a_value_error_of_one_line(rows, cols, question, options, cause):
    with pytest.raises(ValueError, match=cause) as caught:
        jigsaw.make_puzzle(coordinates(8, 8), rows, cols, question, random.Random(0), **options)
    assert "\n" not in str(caught.value)


# -------- files


def photographs(folder, colours, flat=False):
    """One small picture per colour: red and green are the colour's everywhere, no two pixels have the same blue."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, colour in enumerate(colours):
        pixels = np.full((8, 9, 3), colour, dtype=np.uint8)
        if not flat:
            pixels[:, :, 2] = np.arange(72).reshape(8, 9)
        Image.fromarray(pixels).save(folder / f"photo{number:03d}.png")


def colours_used(out):
    return {Image.open(out / record["images"][0]).getpixel((0, 0))[:2] for record in read(out / "records.jsonl")}


@pytest.mark.parametrize("extra", [[], ["--question", "full", "--rows", 2, "--cols", 3, "--no-think"]])
def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path, extra):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run("--scenes", 6, "--count", 24, "--seed", seed, "--out", tmp_path / name, *extra)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert files_in(tmp_path / "a") != files_in(tmp_path / "c")


def test_another_seed_cuts_the_same_picture_into_other_puzzles(tmp_path):
    photographs(tmp_path / "in", [(1, 100, 0)])  # one picture: only the puzzles can differ
    orders = []
    for seed in (5, 6):
        run("--images", tmp_path / "in", "--count", 24, "--seed", seed, "--out", tmp_path / str(seed))
        orders.append([(r["order"], r["options"]) for r in read(tmp_path / str(seed) / "records.jsonl")])
    assert orders[0] != orders[1]


def test_records_have_the_common_fields_and_their_images_lie_beside_them(tmp_path):
    run("--scenes", 3, "--count", 10, "--rows", 3, "--out", tmp_path / "puzzles", "--size", 60)
    records = read(tmp_path / "puzzles" / "records.jsonl")
    assert len(records) == 10 and len({record["id"] for record in records}) == 10
    for record in records:
        assert {"id", "images", "prompt", "answer", "answer_type", "think", "source", "rows", "cols", "order"} <= set(
            record
        )
        image = Image.open(tmp_path / "puzzles" / record["images"][0])
        assert image.size == (60, 60) and image.format == "PNG"
        rewards.check_gold(record)
    assert {record["rows"] for record in records} == {1, 3}, "the paper swaps half of the grids"


def test_every_picture_is_used_before_any_is_used_again(tmp_path):
    photographs(tmp_path / "in", [(n, 100, 0) for n in range(12)])
    run("--images", tmp_path / "in", "--count", 12, "--out", tmp_path / "out")
    assert len(colours_used(tmp_path / "out")) == 12


def test_a_folder_is_split_by_content_so_copies_never_straddle_and_the_seed_does_not_matter(tmp_path):
    folder = tmp_path / "in"
    photographs(folder, [(n, 50, 200) for n in range(60)])
    for number in range(0, 60, 2):  # copies under other names and in a subfolder
        (folder / "more").mkdir(exist_ok=True)
        shutil.copy(folder / f"photo{number:03d}.png", folder / "more" / f"a{number}.png")
    used = {}
    for split in ("train", "test", "all"):
        for seed in (0, 1):
            out = tmp_path / f"{split}{seed}"
            chosen = ("--split", split, "--test-fraction", 0.3, "--seed", seed)
            run("--images", folder, "--count", 120, *chosen, "--out", out)
            used[split, seed] = colours_used(out)
        assert used[split, 0] == used[split, 1]
    assert used["train", 0] & used["test", 1] == set()
    assert used["train", 0] | used["test", 0] == used["all", 0]
    assert len(used["all", 0]) == 60 and used["train", 0] and used["test", 0]


def test_the_test_fraction_is_the_part_of_the_pictures_that_is_test(tmp_path):
    photographs(tmp_path, [(n % 256, n // 256, 77) for n in range(1000)])
    def listed(split, fraction):
        return len(picture_files.list_pictures(tmp_path, split, fraction))

    sizes = [listed(split, 0.3) for split in ("train", "test", "all")]
    assert sizes[0] + sizes[1] == sizes[2] == 1000
    assert abs(sizes[1] - 300) < 58  # 4 sigma: a few dozen pictures would be too few to tell
    assert listed("train", 0.0) == listed("test", 1.0) == 1000


def test_max_side_shrinks_pictures_and_keeps_their_shape(tmp_path):
    (tmp_path / "in").mkdir()
    scene(random.Random(3), 300).crop((0, 0, 300, 200)).save(tmp_path / "in" / "wide.jpg")
    run("--images", tmp_path / "in", "--count", 1, "--max-side", 150, "--out", tmp_path / "out")
    assert Image.open(tmp_path / "out" / read(tmp_path / "out" / "records.jsonl")[0]["images"][0]).size == (150, 100)


SCENES = ["--scenes", 2, "--count", 2]
BAD = {
    "neither source": (["--count", 3], "required"),
    "both sources": (["--scenes", 2, "--images", "in", "--count", 3], "not allowed"),
    "out inside images": (["--images", ".", "--count", 3], "inside"),
    "no folder": (["--images", "nowhere", "--count", 3], "nowhere"),
    "folder without images": (["--images", "empty", "--count", 3], "empty"),
    "file that is no image": (["--images", "broken", "--count", 1], "fake.png"),
    "image that ends early": (["--images", "short", "--count", 1], "half.jpg"),
    "image smaller than the grid": (["--images", "in", "--count", 1, "--rows", 20], "photo000.png"),
    "split without images": (
        ["--images", "in", "--count", 1, "--split", "test", "--test-fraction", 0],
        "no test image",
    ),
    "one piece": ([*SCENES, "--rows", 1], "one piece"),
    "no rows": ([*SCENES, "--rows", 0], "--rows"),
    "no puzzles": (["--scenes", 2, "--count", 0], "--count"),
    "negative seed": ([*SCENES, "--seed", -1], "--seed"),
    "not a probability": ([*SCENES, "--swap", 1.2], "--swap"),
    "all masked": ([*SCENES, "--mask-ratio", 0.5], "--mask-ratio"),
    "unknown question": ([*SCENES, "--question", "spiral"], "spiral"),
    "abbreviated flag": ([*SCENES, "--row", 2], "--row"),
    "two forms": ([*SCENES, "--reply-format", "json", "--think"], "--reply-format"),
    "warm-up data": ([*SCENES, "--follow", 0.5], "--follow"),
    "not a number": ([*SCENES, "--swap", "nan"], "--swap"),
    "not a whole number": ([*SCENES, "--rows", 1.5], "argument --rows: must be a whole number, not 1.5"),
    "size of photographs": (["--images", "in", "--count", 1, "--size", 50], "--size"),
    "max side of scenes": ([*SCENES, "--max-side", 50], "--max-side"),
}


@pytest.mark.parametrize("argv, cause", BAD.values(), ids=BAD)
def test_bad_input_ends_with_status_2_and_one_line_that_names_the_cause(tmp_path, monkeypatch, capsys, argv, cause):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "in", [(1, 2, 3)])
    photographs(tmp_path / "broken", [(1, 2, 3)])
    for name in ("empty", "short"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "fake.png").write_bytes(b"this is no image")
    scene(random.Random(0)).save(tmp_path / "whole.jpg")
    (tmp_path / "short" / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:1500])
    with pytest.raises(SystemExit) as stopped:
        run(*argv, "--out", "out")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and cause in error, error
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_puzzles_from_a_folder_need_nothing_of_the_project_but_how_it_opens_pictures(tmp_path):
    photographs(tmp_path / "in", [(1, 2, 3)])
    (tmp_path / "alone").mkdir()
    for file in (jigsaw, lazy_puzzles, mixing, questions, replies, picture_files, pictures, files):
        shutil.copy(file.__file__, tmp_path / "alone")
    command = [sys.executable, "alone/jigsaw.py", "--images", "in", "--count", "2", "--out", "out"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    assert len(read(tmp_path / "out" / "records.jsonl")) == 2


def test_an_out_that_is_a_file_ends_with_status_2_and_keeps_the_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        run(*SCENES, "--out", tmp_path / "out")
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "out").read_text() == "mine"


def test_failing_midway_leaves_the_earlier_records_alone(tmp_path):
    run(*SCENES, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "records.jsonl").read_bytes()
    photographs(tmp_path / "in", [(1, 2, 3)])
    with pytest.raises(SystemExit):
        run("--images", tmp_path / "in", "--count", 1, "--rows", 20, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "records.jsonl").read_bytes() == before


def test_two_pieces_can_be_deranged_they_change_places():
    for question in ("pair", "full"):
        _, record = jigsaw.make_puzzle(coordinates(4, 4), 2, 1, question, random.Random(0), derange=True)
        assert record["order"] == [2, 1]
