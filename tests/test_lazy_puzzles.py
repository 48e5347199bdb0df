"""Lazy puzzles: the pixels that a saved puzzle would have had, made when they are needed, by whoever opens a record."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from PIL import Image
from test_jigsaw import read, run
from test_puzzle_sets import fails, scenes_as_files

import html_page
import lazy_puzzles
import rewards
from lazy_puzzles import Shown, check_puzzle, open_puzzle, pictures_of, rebuilt_sizes
from pictures import PictureError
from records import DataError, read_records, write_jsonl
from toy.scenes import scene

ALL = (
    "pair:2x1=1,full:2x3=1,inverse:3x2=1,single:1x3=1,multiple:2x2=1,box:2x2=1,"
    "patchfit:2x2=1,rotation:4=1,rotation:8=1"
)
# name -> flags of jigsaw.py
KINDS = {
    "every question": ["--mix", ALL, "--count", 40],
    "shrunk by means, JPEG decoded in part": ["--mix", ALL, "--count", 30, "--max-side", 60, "--resample", "box"],
    "shrunk sharply": ["--question", "box", "--count", 4, "--max-side", 77],
    "pieces one by one": ["--question", "full", "--rows", 3, "--cols", 2, "--separate", "--count", 3],
    "patches one by one": ["--question", "patchfit", "--rows", 2, "--cols", 3, "--separate", "--count", 3],
    "a frame": ["--question", "pair", "--rows", 2, "--cols", 2, "--mask-ratio", 0.13, "--count", 3],
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Five JPEG files of different shapes, one taken sideways, one large enough to be decoded in part."""
    folder = scenes_as_files(tmp_path_factory.mktemp("photographs"), 3, size=130)
    scene(random.Random(7), 131).crop((0, 0, 131, 90)).save(folder / "wide.jpg", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(random.Random(8), 260).crop((0, 0, 260, 173)).save(folder / "sideways.jpg", quality=90, exif=exif)
    return folder


@pytest.fixture(scope="module")
def lazy(photographs, tmp_path_factory):
    """Six lazy records, all questions of a 2x1 grid, and the same puzzles as PNG."""
    out = tmp_path_factory.mktemp("lazy")
    flags = ["--images", photographs, "--mix", "pair:2x1=1,full:2x1=1,patchfit:2x1=1", "--count", 6, "--no-think"]
    run(*flags, "--lazy", "--out", out / "lazy")
    run(*flags, "--out", out / "saved")
    return out / "lazy/records.jsonl", out / "saved/records.jsonl"


# ---------------------------------------------------------------------------------------------------------------------
# The same pixels


@pytest.mark.parametrize("name", KINDS)
def test_a_lazy_puzzle_shows_the_pixels_that_would_have_been_saved(photographs, tmp_path, name):
    flags = ["--images", photographs, *KINDS[name], "--workers", 1]
    run(*flags, "--out", tmp_path / "saved", "--preview", tmp_path / "saved.png")
    run(*flags, "--out", tmp_path / "lazy", "--preview", tmp_path / "lazy.png", "--lazy")
    assert not (tmp_path / "lazy/images").exists()
    assert (tmp_path / "lazy.png").read_bytes() == (tmp_path / "saved.png").read_bytes()

    saved = read_records(tmp_path / "saved/records.jsonl", rewards.check_gold)
    made = read_records(tmp_path / "lazy/records.jsonl", rewards.check_gold)
    for one, other in zip(saved, made, strict=True):
        differ = {key for key in one | other if one.get(key) != other.get(key)}
        assert differ == {"images", "puzzle", "_where"}, differ  # not the sizes, which come from headers
        for path, shown in zip(one["images"], pictures_of(other), strict=True):
            found = open_puzzle(shown)[shown.number]
            assert np.array_equal(np.asarray(found), np.asarray(Image.open(path)))


def test_photographs_and_lazy_records_can_move_together(photographs, tmp_path):
    run("--images", photographs, "--count", 2, "--lazy", "--out", tmp_path / "data/puzzles")
    (record, _) = read(tmp_path / "data/puzzles/records.jsonl")
    assert not record["images"][0].startswith("/")
    assert (tmp_path / "data/puzzles" / record["images"][0]).resolve().parent == photographs.resolve()


@pytest.mark.parametrize("flags", [["--scenes", 3], ["--format", "jpeg", "--images", "."]])
def test_lazy_is_refused_where_it_means_nothing(tmp_path, capsys, flags):
    assert "--lazy" in fails(capsys, *flags, "--count", 1, "--lazy", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Records that anybody may have written

PIECES = {"about": "pieces", "rows": 2, "cols": 1, "order": [2, 1]}
BOXES = PIECES | {"about": "rectangles", "boxes": [[0, 0, 5, 5], [0, 9, 5, 14]]}
PATCHES = BOXES | {"about": "patches", "asked": 2}
ANGLES = {"about": "angles", "angle": 90, "angles": 4}
SOUND = (PIECES, BOXES, PATCHES, ANGLES, PIECES | {"mask_ratio": 0.2, "separate": True, "max_side": 60})
BAD = {
    "nothing": ({}, "about"),
    "about something": (PIECES | {"about": "spirals"}, "about"),
    "about a list": (PIECES | {"about": ["pieces"]}, "about"),
    "no rows": ({key: value for key, value in PIECES.items() if key != "rows"}, '"rows" is missing'),
    "a field of another kind": (PIECES | {"angle": 90}, '"angle" is no field of pieces'),
    "a field nobody knows": (ANGLES | {"__class__": "x"}, "no field"),
    "rows as text": (PIECES | {"rows": "2"}, "rows"),
    "rows that are true": (PIECES | {"rows": True}, "rows"),
    "too many rows": (PIECES | {"rows": 10**9}, "rows"),
    "a piece twice": (PIECES | {"order": [1, 1]}, "order"),
    "a piece too many": (PIECES | {"order": [1, 2, 3]}, "order"),
    "piece 0": (PIECES | {"order": [0, 1]}, "order"),
    "an order of lists": (PIECES | {"order": [[1], [2]]}, "order"),
    "half a frame": (PIECES | {"mask_ratio": 0.5}, "mask_ratio"),
    "a frame of NaN": (PIECES | {"mask_ratio": float("nan")}, "mask_ratio"),
    "separate as a number": (PIECES | {"separate": 1}, "separate"),
    "a side of no pixels": (PIECES | {"max_side": 0}, "max_side"),
    "a side of many": (PIECES | {"max_side": 10**12}, "max_side"),
    "another filter": (PIECES | {"resample": "nearest"}, "resample"),
    "a filter in a list": (PIECES | {"resample": ["box"]}, "resample"),
    "one box": (BOXES | {"boxes": [[0, 0, 5, 5]]}, "boxes"),
    "a box of three numbers": (BOXES | {"boxes": [[0, 0, 5], [0, 9, 5]]}, "boxes"),
    "a box inside out": (BOXES | {"boxes": [[5, 5, 0, 0], [5, 14, 0, 9]]}, "boxes"),
    "boxes of two sizes": (BOXES | {"boxes": [[0, 0, 5, 5], [0, 9, 5, 15]]}, "boxes"),
    "a box of fractions": (BOXES | {"boxes": [[0, 0, 5.5, 5], [0, 9, 5.5, 14]]}, "boxes"),
    "boxes left of the picture": (BOXES | {"boxes": [[-5, 0, 0, 5], [-5, 9, 0, 14]]}, "boxes"),
    "a hole that is not there": (PATCHES | {"asked": 3}, "asked"),
    "an angle of another number": (ANGLES | {"angle": 45}, "angle"),
    "seven angles": (ANGLES | {"angles": 7}, "angles"),
    "angles as a list": (ANGLES | {"angles": [4]}, "angles"),
}


@pytest.mark.parametrize("puzzle", SOUND, ids=lambda puzzle: puzzle["about"])
def test_a_sound_puzzle_passes(puzzle):
    check_puzzle(puzzle)


@pytest.mark.parametrize("name", BAD)
def test_a_puzzle_that_cannot_be_made_is_named_with_file_line_and_cause(tmp_path, name):
    puzzle, cause = BAD[name]
    write_jsonl(tmp_path / "r.jsonl", [question(puzzle)])
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / "r.jsonl")
    message = str(caught.value)
    assert message.startswith(f'{tmp_path / "r.jsonl"}:1: "puzzle" cannot be made: ') and cause in message
    assert "\n" not in message and len(message) < 400


def question(puzzle, images=("a.png",), **more):
    record = {"id": "q", "images": list(images), "prompt": "?", "answer": "A", "answer_type": "letter", "think": False}
    return record | {"source": "s", "puzzle": puzzle, **more}


def test_a_picture_that_does_not_fit_its_puzzle_is_named_before_anything_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_puzzles, "open_picture", lambda *args: pytest.fail("decoded"))
    for size, puzzle in {(40, 13): BOXES, (4, 40): PATCHES, (40, 1): PIECES}.items():
        Image.new("RGB", size).save(tmp_path / "a.png")
        write_jsonl(tmp_path / "r.jsonl", [question(puzzle)])
        with pytest.raises(DataError, match=rf'r.jsonl:1: image ".*a.png" .*{size[0]} x {size[1]} pixels are too few'):
            read_records(tmp_path / "r.jsonl", decode=False)


def test_a_picture_that_shrank_since_it_was_measured_is_broken(tmp_path):
    Image.new("RGB", (40, 13)).save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="a.png"):
        open_puzzle(Shown(str(tmp_path / "a.png"), json.dumps(BOXES)))


@pytest.mark.parametrize("images", [[], ["a.png", "a.png"], ["a.png", "b.png"]])
def test_images_must_name_the_picture_as_often_as_it_is_shown(tmp_path, images):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    write_jsonl(tmp_path / "r.jsonl", [question(PIECES, images)])
    with pytest.raises(DataError, match='r.jsonl:1: "images" must name the picture of its puzzle once'):
        read_records(tmp_path / "r.jsonl")
    write_jsonl(tmp_path / "r.jsonl", [question(PIECES | {"separate": True}, images or ["a.png"])])
    if images == ["a.png", "a.png"]:
        assert len(read_records(tmp_path / "r.jsonl")) == 1
    else:
        with pytest.raises(DataError, match="2 times"):
            read_records(tmp_path / "r.jsonl")


def test_a_puzzle_that_is_no_object_is_a_field_like_any_other(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    write_jsonl(tmp_path / "r.jsonl", [question("sudoku")])
    (record,) = read_records(tmp_path / "r.jsonl")
    assert record["puzzle"] == "sudoku" and record["_sizes"] == [(40, 30)]
    assert pictures_of(record) == [Shown(record["images"][0])]


def test_sizes_worked_by_hand():
    assert rebuilt_sizes((41, 31), PIECES) == [(41, 30)]
    assert rebuilt_sizes((41, 31), PIECES | {"separate": True}) == [(41, 15), (41, 15)]
    assert rebuilt_sizes((41, 31), ANGLES) == [(31, 31)]
    assert rebuilt_sizes((41, 31), BOXES) == [(41, 30)]
    # 5 x 5 patches: 3 fit into 41 pixels with gaps of 8, so both lie in one row below the picture.
    assert rebuilt_sizes((41, 31), PATCHES) == [(41, 30 + 8 + 5)]
    assert rebuilt_sizes((17, 31), PATCHES) == [(17, 30 + 2 * (8 + 5))]
    assert rebuilt_sizes((41, 31), PATCHES | {"separate": True}) == [(41, 30), (5, 5), (5, 5)]


# ---------------------------------------------------------------------------------------------------------------------
# The encoder


def test_a_lazy_record_is_encoded_like_a_saved_one(models, lazy):
    made, saved = (read_records(path, decode=False) for path in lazy)
    for _, encoder in models.values():
        for one, other in zip(encoder.prompts(made), encoder.prompts(saved), strict=True):
            assert torch.equal(one.ids, other.ids) and torch.equal(one.pixels, other.pixels)
            assert torch.equal(one.grids, other.grids) and torch.equal(one.positions, other.positions)
            (image,), (same,) = encoder.images(one.images), encoder.images(other.images)
            assert image.tobytes() == same.tobytes(), "what vLLM is given"


def test_puzzles_of_one_photograph_are_told_apart_and_each_is_made_once_and_ahead(models, lazy, monkeypatch):
    _, encoder = models["qwen2_5_vl"]
    (record, *_) = read_records(lazy[0], decode=False)
    other = copy.deepcopy(record) | {"id": "other"}
    other["puzzle"]["order"] = record["puzzle"]["order"][::-1]
    opened, open_once = [], lazy_puzzles.open_picture
    monkeypatch.setattr(lazy_puzzles, "open_picture", lambda *args: opened.append(args[0]) or open_once(*args))
    encoder._pictures.clear()
    encoder.prefetch([record, other])
    for future in encoder._pictures.values():
        future.result()
    assert len(opened) == 2
    first, second = encoder.prompts([record, other])
    assert len(opened) == 2 and not torch.equal(first.pixels, second.pixels)


def test_the_report_shows_the_puzzle_and_not_its_photograph(lazy):
    made, saved = (read_records(path, decode=False) for path in lazy)
    for one, other in zip(made, saved, strict=True):
        (shown,), (file,) = pictures_of(one), pictures_of(other)
        assert html_page.picture_html(shown, "q") == html_page.picture_html(file, "q")
