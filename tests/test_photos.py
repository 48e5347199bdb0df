"""recipes/photos.sh: every stage, on real photographs, as one command. Run once, in its quick form (about a minute).

That a tiny model learns little from five subjects is no failure; that a stage is skipped, that a puzzle is no
photograph, or that a held-out subject was trained on would be. So where each picture comes from is worked out again
from the photographs as scikit-image gives them.
"""

import importlib.util
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from commands import ROOT, environment, rows, weights
from PIL import Image

import rewards
from toy import primer

# Stage: its updates in the quick form.
TRAINED = {"scenes/model": 60, "words/model": 15, "base": 15, "zero": 4, "cold": 3, "rl": 4}
CROPS, SIDE = 24, 112
PATIENCE = 900  # seconds for the whole recipe, which takes about 70 where two cores are free


@pytest.fixture(scope="module")
def photos():
    """The module recipes/photos.py."""
    spec = importlib.util.spec_from_file_location("photos", ROOT / "recipes/photos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(the recipe's output folder, what it printed)"""
    out = tmp_path_factory.mktemp("photos") / "run"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # `python` is the one that runs the tests
    process = subprocess.Popen(
        ["bash", str(ROOT / "recipes/photos.sh"), str(out)], env=environment() | {"QUICK": "1", "PATH": path},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        printed, err = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, f"{printed[-3000:]}\n{err[-3000:]}"
    return out, printed


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def pixels(image):
    """Hashable: size and pixels of an RGB picture whose odd last row is trimmed."""
    image = image.convert("RGB").crop((0, 0, image.width, image.height // 2 * 2))
    return image.size, image.tobytes()


def put_together(path, order):
    """A 2x1 puzzle image with its halves back where `order` says they were."""
    image = Image.open(path).convert("RGB")
    half = image.height // 2
    halves = [image.crop((0, 0, image.width, half)), image.crop((0, half, image.width, 2 * half))]
    whole = Image.new("RGB", image.size)
    for piece, original in zip(halves, order, strict=True):
        whole.paste(piece, (0, (original - 1) * half))
    return pixels(whole)


@pytest.fixture(scope="module")
def pictures(finished):
    """{"train" or "test": {pixels: path below it}} of the exported pictures."""
    found = {}
    for part in ("train", "test"):
        root = finished[0] / "photos" / part
        found[part] = {pixels(Image.open(path)): path.relative_to(root) for path in sorted(root.rglob("*.png"))}
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The photographs


def test_every_picture_is_a_piece_of_a_photograph_that_scikit_image_gives(finished):
    left, right, _ = skimage.data.stereo_motorcycle()
    photographs = {
        "astronaut.png": skimage.data.astronaut(),
        "chelsea.png": skimage.data.cat(),
        "coffee.png": skimage.data.coffee(),
        "motorcycle_left.png": left,
        "motorcycle_right.png": right,
        "rocket.jpg": skimage.data.rocket(),
    }
    listed = read(finished[0] / "photos/crops.jsonl")
    assert Counter(row["photograph"] for row in listed) == {
        name: CROPS // 2 if "motorcycle" in name else CROPS for name in photographs
    }
    boxes = Counter()
    for row in listed:
        photograph = photographs[row["photograph"]]
        x1, y1, x2, y2 = row["box"]
        height, width = photograph.shape[:2]
        assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
        whole = (x2 - x1, y2 - y1) == (width, height)
        assert whole or x2 - x1 == y2 - y1 >= min(width, height) // 3
        expected = Image.fromarray(photograph[y1:y2, x1:x2])
        expected.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        assert np.array_equal(np.asarray(Image.open(finished[0] / "photos" / row["file"])), np.asarray(expected))
        boxes[row["photograph"], tuple(row["box"])] += 1
    assert max(boxes.values()) == 1  # no picture twice
    assert len({Path(row["file"]) for row in listed}) == len(list((finished[0] / "photos").rglob("*.png"))) == 5 * CROPS


def test_no_photograph_is_on_both_sides_and_the_two_views_of_the_motorcycle_stay_together(finished, pictures):
    sides = {}
    for row in read(finished[0] / "photos/crops.jsonl"):
        sides.setdefault(row["photograph"], set()).add(row["file"].split("/")[0])
    assert all(len(side) == 1 for side in sides.values()), sides
    assert sides["motorcycle_left.png"] == sides["motorcycle_right.png"]
    assert not pictures["train"].keys() & pictures["test"].keys()
    assert {path.parts[0] for path in pictures["test"].values()} == {"cat", "coffee"}  # what seed 0 holds out


def test_each_subject_is_held_out_by_some_seed_and_always_two_of_them(photos):
    splits = [photos.split_subjects(seed) for seed in range(60)]
    assert all(list(split.values()).count("test") == 2 and set(split) == set(photos.SUBJECTS) for split in splits)
    held_out = {frozenset(name for name in split if split[name] == "test") for split in splits}
    assert held_out == {frozenset(pair) for pair in itertools.combinations(photos.SUBJECTS, 2)}
    assert splits[7] == photos.split_subjects(7)


def test_a_second_seed_leaves_nothing_of_the_first_and_strangers_files_are_not_touched(photos, tmp_path):
    photos.main(["--out", str(tmp_path), "--crops", "3", "--seed", "0"])
    photos.main(["--out", str(tmp_path), "--crops", "2", "--seed", "1"])
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png")}
    assert found == {row["file"] for row in read(tmp_path / "crops.jsonl")} and len(found) == 10
    mine = tmp_path / "else" / "train" / "mine.png"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(SystemExit) as stopped:
        photos.main(["--out", str(tmp_path / "else")])
    assert stopped.value.code == 2 and mine.exists()


def test_plain_crops_are_left_out(photos, tmp_path, monkeypatch):
    # A wall with a window: the lower left quarter has all there is to see.
    wall = np.full((90, 120, 3), 200, np.uint8)
    wall[60:80, 10:40] = 30
    Image.fromarray(wall).save(tmp_path / "wall.png")
    monkeypatch.setattr(photos, "DATA", tmp_path)
    monkeypatch.setattr(photos, "SUBJECTS", {"wall": ["wall.png"]})
    made = list(photos.make_pictures("wall", 20, 112, seed=0))
    assert made[0][2] == (0, 0, 120, 90) and made[0][0].size == (112, 84)
    for _, _, (x1, y1, x2, y2) in made:
        assert x1 < 40 and x2 > 10 and y1 < 80 and y2 > 60  # each sees some of the window
    rng = random.Random("0 wall")
    assert not all(y2 > 60 and x1 < 40 for x1, _, _, y2 in (photos.draw_box(120, 90, rng) for _ in range(40)))


def test_what_light_alone_can_reach_is_what_the_pictures_show(finished, pictures, photos):
    # Red 100 is luminance 29.9, green 60 is 35.2: the mean of the channels would say the opposite.
    redder = Image.new("RGB", (4, 5), (100, 0, 0))
    redder.paste((0, 60, 0), (0, 2, 4, 4))
    redder.paste((0, 0, 0), (0, 4, 4, 5))
    assert not photos.lighter_above(redder)
    assert photos.lighter_above(redder.transpose(Image.Transpose.FLIP_TOP_BOTTOM).crop((0, 1, 4, 5)))
    assert photos.light_rule(0.25, 0.6) == ("below", 0.75, 0.4)
    assert photos.light_rule(0.7, 0.1) == ("above", 0.7, 0.1)

    means = {}
    for part, found in pictures.items():
        shares = {}
        for (size, content), path in found.items():
            light = primer.look(Image.frombytes("RGB", size, content), 2, 1)["light"]
            shares.setdefault(path.parts[0], []).append(light[0] > light[1])
        assert all(len(each) == CROPS for each in shares.values())
        means[part] = np.mean([np.mean(each) for each in shares.values()])
        for subject, each in shares.items():
            assert f"{subject} {100 * np.mean(each):.1f} %" in finished[1]
    verdict, train, test = photos.light_rule(**means)
    assert f'"lighter was {verdict}": right on {100 * train:.1f} % of train and {100 * test:.1f} % of' in finished[1]


# ---------------------------------------------------------------------------------------------------------------------
# The puzzles


def test_every_image_is_a_photograph_of_its_side_split_and_mixed_as_the_record_says(finished, pictures):
    out = finished[0]
    files = {"train": [out / "puzzles/records.jsonl", out / "words/primer.jsonl", out / "formats/primer.jsonl"]}
    files["train"] += sorted(out.glob("test/seen-*/records.jsonl"))
    files["test"] = sorted(out.glob("test/held-out-*/records.jsonl"))
    assert len(files["train"]) == 6 and len(files["test"]) == 2
    moved = 0
    for part, paths in files.items():
        for path in paths:
            for record in read(path):
                image = path.parent / record["images"][0]
                original = pictures[part][put_together(image, record["order"])]
                assert (record["rows"], record["cols"]) == (2, 1)
                if path.parent.parent.name == "test":
                    side = {"train": "seen", "test": "held-out"}[part]
                    assert record["source"] == path.parent.name == f"{side}-{original.parts[0]}"
                if record["question"] == "pair":
                    k, j = record["pair"]
                    verdict = "above" if record["order"][k - 1] < record["order"][j - 1] else "below"
                    assert record["options"]["AB".index(record["answer"])] == verdict
                moved += pixels(Image.open(image)) not in pictures[part]
    assert moved > 300  # about half of them are mixed up


def test_the_warm_up_data_names_truly_which_half_of_a_photograph_is_lighter_and_guesses_at_the_rest(finished):
    records = read(finished[0] / "words/primer.jsonl")
    right = []
    for record in records:
        light = primer.look(Image.open(finished[0] / "words" / record["images"][0]), 2, 1)["light"]
        words = dict(re.findall(r"([12]) looks (light|dark)", record["chosen"]))
        assert words == ({"1": "light", "2": "dark"} if light[0] > light[1] else {"1": "dark", "2": "light"})
        score = rewards.score(record["chosen"], record)
        assert score["format"] == 1
        if record["question"] == "pair":
            right.append(score["accuracy"])
        else:
            assert score["accuracy"] == 1
    # At chance: 4 standard deviations. The answers of the look questions are right, every one of them.
    assert abs(np.mean(right) - 0.5) < 2 / math.sqrt(len(right)), np.mean(right)


# ---------------------------------------------------------------------------------------------------------------------
# The stages


@pytest.mark.parametrize("stage", TRAINED)
def test_every_trained_stage_leaves_finite_weights_that_moved_and_a_whole_log(finished, stage):
    out = finished[0]
    log = rows(out / stage)
    assert [row["step"] for row in log] == list(range(1, TRAINED[stage] + 1))
    assert all(math.isfinite(value) for row in log for value in row.values())
    start = Path(json.loads((out / stage / "args.json").read_text())["model"])
    before, after = weights(start), weights(out / stage)
    assert start.is_relative_to(out) and before.keys() == after.keys()
    assert all(np.isfinite(weight.float().numpy()).all() for weight in after.values())
    moved = {name for name in after if (before[name] != after[name]).any()}
    assert any("visual" in name for name in moved) and any("visual" not in name for name in moved)


def test_the_chain_of_models_is_that_of_the_paper(finished):
    out = finished[0]

    def came_from(stage):
        return str(Path(json.loads((out / stage / "args.json").read_text())["model"]).relative_to(out))

    chain = {stage: came_from(stage) for stage in TRAINED}
    warm_up = {"scenes/model": "random", "words/model": "scenes/model", "base": "words/model"}
    assert chain == warm_up | {"zero": "base", "cold": "base", "rl": "cold"}
    pairs = read(out / "pairs.jsonl")
    assert {pair["chosen_from"] for pair in pairs} == {str(out / "zero")}
    assert {pair["rejected_from"] for pair in pairs} == {str(out / "base")}


def test_the_warm_up_data_is_learned_and_the_numbers_of_both_grpo_runs_fit_together(finished):
    out = finished[0]
    words = [row["loss_sft"] for row in rows(out / "scenes/model")]
    assert words[0] > 3 and np.mean(words[-5:]) < 1  # nats a token; the vocabulary's logarithm is about 6
    for stage in ("zero", "rl"):
        for row in rows(out / stage):
            assert 0 <= row["accuracy"] <= row["format"] <= 1
            assert row["reward"] == pytest.approx(row["accuracy"] + 0.5 * row["format"], abs=1e-6)
            assert row["sampler_gap"] < 1e-4 and row["kl"] >= 0 and 2 <= row["length"] <= 40
    assert sum(row["format"] for row in rows(out / "rl")) > 0


def test_pairs_are_about_photographs_right_on_both_sides_and_differ_in_form(finished):
    out = finished[0]
    known = {record["id"]: record for record in read(out / "puzzles/records.jsonl")}
    pairs = read(out / "pairs.jsonl")
    assert 1 <= len(pairs) <= 40
    for pair in pairs:
        chosen = rewards.score(pair["chosen"], pair)
        assert (chosen["format"], chosen["accuracy"]) == (1, 1)
        assert rewards.score(pair["rejected"], pair)["format"] == 0
        record = known[pair["id"]]
        assert pair["answer"] == record["answer"] and pair["order"] == record["order"]
        assert (out / pair["images"][0]).samefile(out / "puzzles" / record["images"][0])
    assert f"{len(pairs):7d}  " in finished[1]


def test_results_are_counted_from_held_out_and_seen_subjects_and_stand_in_table_and_page(finished):
    out = finished[0]
    sources = ["seen-astronaut", "seen-motorcycle", "seen-rocket", "held-out-cat", "held-out-coffee"]
    table = (out / "table.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in table[2:]}
    assert set(cells) == set(sources)
    page = (out / "report.html").read_text()
    for column, name in enumerate(("base", "rl")):
        result = json.loads((out / f"results/{name}.json").read_text())
        assert set(result["sources"]) == set(sources) and result["overall"]["n"] == 5 * 16
        for source, numbers in result["sources"].items():
            mine = [row for row in result["rows"] if row["source"] == source]
            assert len(mine) == numbers["n"] == 16
            for key in ("accuracy", "format"):
                assert numbers[key] == pytest.approx(np.mean([row[key][0] for row in mine]))
            accuracy, _, form = cells[source][column].split(" / ")
            assert (float(accuracy), float(form)) == pytest.approx(
                (100 * numbers["accuracy"], 100 * numbers["format"]), abs=0.051
            )
            assert cells[source][column] in page
    assert all(f"<h3>{name}</h3>" in page for name in ("base", "zero", "cold", "rl"))
    assert page.count("data:image/png;base64,") > 40 and "<script" not in page.lower()
    assert page.rstrip().endswith("</html>")
