"""Data sets of puzzles: mixtures, curricula, other words, formats of files, many processes, signals, strange inputs."""

import collections
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT
from PIL import Image
from test_jigsaw import files_in, photographs, read, run

import jigsaw
import picture_files
import questions
import rewards
from records import read_records
from toy.scenes import scene

SMALL = ["--scenes", 12, "--size", 48]


def fails(capsys, *argv):
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 500, error
    return error


def scenes_as_files(folder, count, size=64):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene(random.Random(number), size).save(folder / f"{number:03d}.jpg", quality=90)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Pictures left out


def test_a_picture_with_identical_pieces_is_replaced_by_another_and_that_is_said(tmp_path, capsys):
    photographs(tmp_path / "in", [(n, 100, 0) for n in range(3)])
    photographs(tmp_path / "in" / "flat", [(n, 200, 0) for n in range(5)], flat=True)
    run("--images", tmp_path / "in", "--count", 40, "--out", tmp_path / "out")
    records = read(tmp_path / "out" / "records.jsonl")
    assert len(records) == 40
    for record in records:
        image = Image.open(tmp_path / "out" / record["images"][0])
        assert image.getpixel((0, 0))[1] == 100
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("left out ") and int(said.split()[2]) >= 25  # 5 of 8 are flat
    run("--images", tmp_path / "in", "--count", 17, "--out", tmp_path / "fewer")
    assert read(tmp_path / "fewer" / "records.jsonl") == records[:17]


def test_a_folder_of_flat_pictures_ends_with_one_line_that_names_one(tmp_path, capsys):
    photographs(tmp_path / "in", [(1, 2, 3)], flat=True)
    error = fails(capsys, "--images", tmp_path / "in", "--count", 3, "--out", tmp_path / "out")
    assert "photo000.png" in error and "identical" in error
    assert not (tmp_path / "out" / "records.jsonl").exists()


def test_where_nothing_is_left_out_nothing_is_said(tmp_path, capsys):
    run(*SMALL, "--count", 5, "--out", tmp_path)
    assert "left out" not in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Mixtures and curricula


def test_a_mixture_has_its_weights_and_every_record_is_of_its_kind(tmp_path):
    run(*SMALL, "--count", 600, "--workers", 1, "--swap", 0, "--out", tmp_path,
        "--mix", "pair:2x1=0.5,full:2x2=0.25,rotation:4=0.125,box:1x2=0.125")  # fmt: skip
    sources = collections.Counter(record["source"] for record in read(tmp_path / "records.jsonl"))
    expected = {"pair-2x1": 300, "full-2x2": 150, "rotation-4": 75, "box-1x2": 75}
    assert set(sources) == {f"jigsaw-{name}" for name in expected}
    for name, count in expected.items():
        assert abs(sources[f"jigsaw-{name}"] - count) < 50  # 4 standard deviations of the most frequent
    for record in read_records(tmp_path / "records.jsonl", check=rewards.check_gold):
        assert record["source"].startswith(f"jigsaw-{record['question']}-")


def test_a_curriculum_is_written_in_order_and_each_record_names_its_stage(tmp_path):
    run(*SMALL, "--count", 30, "--curriculum", "2x1:12,3x1:10,2x2", "--out", tmp_path)
    records = read(tmp_path / "records.jsonl")
    assert [record["stage"] for record in records] == [1] * 12 + [2] * 10 + [3] * 8
    pieces = [record["rows"] * record["cols"] for record in records]
    assert pieces == [2] * 12 + [3] * 10 + [4] * 8


def test_without_a_curriculum_there_is_no_stage(tmp_path):
    run(*SMALL, "--count", 2, "--out", tmp_path)
    assert all("stage" not in record for record in read(tmp_path / "records.jsonl"))


@pytest.mark.parametrize(
    "flags, cause",
    [
        (["--mix", "pair:2x1"], "pair:2x1=0.5"),
        (["--mix", "spiral:2x1=1"], "spiral"),
        (["--mix", "pair:2x1=0"], "above 0"),
        (["--mix", "pair:2x1=nan"], "weight"),
        (["--mix", "pair:2x1=1..2"], "not a number"),
        (["--mix", "pair:1x1=1"], "fewer than 2"),
        (["--mix", "pair:999999999x1=1"], "not a size"),
        (["--mix", "rotation:2x1=1"], "number of angles"),
        (["--mix", "rotation:7=1"], "7 angles"),
        (["--mix", "pair:2x1=1", "--rows", 3], "--rows"),
        (["--mix", "pair:2x1=1", "--question", "full"], "--question"),
        (["--mix", "pair:2x1=1", "--curriculum", "2x1"], "not both"),
        (["--mix", "patchfit:3x3=1"], "more than 8"),
        (["--curriculum", "2x1:5"], "--count is 9"),
        (["--curriculum", "2x1,3x1"], "how many"),
        (["--curriculum", "2x1:20,3x1"], "begins after 20"),
        (["--curriculum", "2x1:x,3x1"], "number of puzzles"),
        (["--curriculum", "2x1:-4,3x1"], "number of puzzles"),
        (["--curriculum", f"{10**40}x1"], "not a size"),
        (["--curriculum", "2x1", "--cols", 2], "--cols"),
        (["--question", "rotation", "--rows", 2], "--rows"),
        (["--question", "pair", "--angles", 4], "--angles"),
        (["--question", "rotation", "--angles", 7], "7 angles"),
        (["--question", "box", "--mask-ratio", 0.1], "pieces"),
        (["--question", "box", "--separate"], "separate"),
        (["--question", "multiple", "--derange"], "two pieces"),
    ],
)
def test_kinds_that_make_no_sense_end_with_one_line(tmp_path, capsys, flags, cause):
    assert cause in fails(capsys, *SMALL, "--count", 9, *flags, "--out", tmp_path)
    assert not (tmp_path / "records.jsonl").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Other words


def write_words(path, **words):
    path.write_text(json.dumps(words))
    return path


def test_other_words_replace_ours_and_only_where_they_are_given(tmp_path):
    words = write_words(
        tmp_path / "words.json",
        question={"pair": "Seen from {pair[1]}, which way was {pair[0]}?"},
        task={"pieces": "{n} pieces, {rows} by {cols}, lie in a new order."},
        reply={"bare": "Write {it}."},
        answer={"letter": "one capital"},
    )
    run(*SMALL, "--count", 6, "--swap", 0, "--no-think", "--prompts", words, "--out", tmp_path / "a")
    run(*SMALL, "--count", 6, "--swap", 0, "--no-think", "--out", tmp_path / "b")
    for record, ours in zip(read(tmp_path / "a/records.jsonl"), read(tmp_path / "b/records.jsonl"), strict=True):
        k, j = record["pair"]
        options = "\n".join(f"{letter}. {option}" for letter, option in zip("AB", record["options"], strict=True))
        assert record["prompt"] == (
            f"2 pieces, 2 rows by 1 column, lie in a new order. Seen from {j}, which way was {k}?\n{options}\n"
            "Write one capital."
        )
        assert record | {"prompt": ""} == ours | {"prompt": ""}


def test_the_file_of_all_our_words_changes_nothing(tmp_path):
    words = write_words(tmp_path / "words.json", **questions.our_words())
    mixture = ["--mix", ",".join(f"{name}:{4 if name == 'rotation' else '2x2'}=1" for name in questions.QUESTIONS)]
    run(*SMALL, "--count", 40, *mixture, "--prompts", words, "--out", tmp_path / "a")
    run(*SMALL, "--count", 40, *mixture, "--out", tmp_path / "b")
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")


@pytest.mark.parametrize(
    "text, cause",
    [
        ("{", "words.json"),
        ("[]", "JSON object"),
        ("{}", "JSON object"),
        ("[" * 100_000, "words.json"),
        ('{"verse": {}}', "'verse' is not one of"),
        ('{"question": {"spiral": "?"}}', "'spiral' is not one of"),
        ('{"question": "?"}', "object of texts"),
        ('{"question": {"pair": 3}}', "a text is needed"),
        ('{"question": {"pair": " "}}', "a text is needed"),
        ('{"question": {"pair": "where was {pair[0]}?"}}', "{pair[1]} is missing"),
        ('{"question": {"pair": "{pair[0]} {pair[1]} {answer}"}}', "{answer} is unknown"),
        ('{"question": {"pair": "{pair[0]} {pair[1]} {pair.__class__}"}}', "is unknown"),
        ('{"question": {"pair": "{pair[0]!r} {pair[1]}"}}', "stand alone"),
        ('{"question": {"pair": "{pair[0]:>9999999999} {pair[1]}"}}', "stand alone"),
        ('{"question": {"pair": "{pair[0]} {pair[1]} {"}}', "'{'"),
        ('{"question": {"pair": "<image> {pair[0]} {pair[1]}"}}', "<image>"),
        ('{"reply": {"think": "think"}}', "{it} is missing"),
        ('{"task": {"dialogue": "User:"}}', "{prompt} is missing"),
        ('{"answer": {"letter": "{it}"}}', "{it} is unknown"),
    ],
)
def test_words_that_would_break_a_prompt_end_with_one_line_that_names_file_and_entry(tmp_path, capsys, text, cause):
    (tmp_path / "words.json").write_text(text)
    error = fails(capsys, *SMALL, "--count", 2, "--prompts", tmp_path / "words.json", "--out", tmp_path / "out")
    assert cause in error and "words.json" in error


@pytest.mark.parametrize("name", ["nothing", "folder", "fifo", "latin1", "/dev/zero"])
def test_a_file_of_words_that_cannot_be_read_ends_with_one_line(tmp_path, capsys, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "latin1").write_bytes(b'{"answer": {"letter": "\xe9"}}')
    error = fails(capsys, *SMALL, "--count", 2, "--prompts", tmp_path / name, "--out", tmp_path / "out")
    assert name in error


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_separate_pieces_are_files_of_their_own_in_the_order_of_their_positions(tmp_path):
    run(*SMALL, "--count", 4, "--rows", 2, "--cols", 2, "--question", "full", "--separate", "--out", tmp_path)
    run(*SMALL, "--count", 4, "--rows", 2, "--cols", 2, "--question", "full", "--out", tmp_path / "whole")
    whole = read(tmp_path / "whole" / "records.jsonl")
    for record, other in zip(read_records(tmp_path / "records.jsonl", rewards.check_gold), whole, strict=True):
        assert len(record["images"]) == 4 and record["order"] == other["order"]
        upper = [np.asarray(Image.open(path)) for path in record["images"][:2]]
        lower = [np.asarray(Image.open(path)) for path in record["images"][2:]]
        joined = np.concatenate([np.concatenate(upper, axis=1), np.concatenate(lower, axis=1)])
        assert np.array_equal(joined, np.asarray(Image.open(tmp_path / "whole" / other["images"][0])))


def test_jpeg_files_differ_from_the_puzzle_by_compression_only(tmp_path):
    for image_format in ("png", "jpeg"):
        run(*SMALL, "--count", 6, "--format", image_format, "--out", tmp_path / image_format)
    pairs = zip(read(tmp_path / "png/records.jsonl"), read(tmp_path / "jpeg/records.jsonl"), strict=True)
    for exact, lossy in pairs:
        assert exact | {"images": 0} == lossy | {"images": 0}
        with Image.open(tmp_path / "jpeg" / lossy["images"][0]) as image:
            assert image.format == "JPEG" and lossy["images"][0].endswith(".jpg")
            after = np.asarray(image, dtype=float)
        before = np.asarray(Image.open(tmp_path / "png" / exact["images"][0]), dtype=float)
        assert after.shape == before.shape and np.abs(after - before).mean() < 6


def test_the_box_filter_decodes_large_jpeg_files_in_part_and_shows_the_same(tmp_path, monkeypatch):
    scene(random.Random(1), 512).save(tmp_path / "large.jpg", quality=95)
    decoded, resize = [], Image.Image.resize
    watch = lambda image, *a, **b: decoded.append(image.size) or resize(image, *a, **b)  # noqa: E731
    monkeypatch.setattr(Image.Image, "resize", watch)
    sharp = picture_files.load_picture(tmp_path / "large.jpg", 100)
    fast = picture_files.load_picture(tmp_path / "large.jpg", 100, "box")
    assert decoded == [(512, 512), (128, 128)] and sharp.size == fast.size == (100, 100)
    difference = np.asarray(sharp, dtype=float) - np.asarray(fast, dtype=float)
    assert np.abs(difference).mean() < 5


def test_a_photograph_taken_sideways_is_shrunk_upright_by_either_filter(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    scene(random.Random(1), 400).crop((0, 0, 400, 200)).save(tmp_path / "sideways.jpg", exif=exif)
    for resample in ("lanczos", "box"):
        assert picture_files.load_picture(tmp_path / "sideways.jpg", 100, resample).size == (50, 100)


def test_the_preview_shows_the_first_puzzles_and_is_the_same_again(tmp_path):
    mixture = ["--count", 30, "--mix", "pair:2x1=1,box:2x2=1,patchfit:2x2=1"]
    for name in ("a", "b"):
        run(*SMALL, *mixture, "--preview", tmp_path / f"{name}.png", "--out", tmp_path / name)
    sheet = np.asarray(Image.open(tmp_path / "a.png"))
    assert sheet.shape[0] > 4 * 160 and sheet.shape[1] > 6 * 160
    for number in range(24):  # a picture in every tile
        row, col = divmod(number, 6)
        tile = sheet[row * 214 : row * 214 + 40, col * 168 : col * 168 + 40]
        assert tile.std() > 1
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert read(tmp_path / "a/records.jsonl") == read(tmp_path / "b/records.jsonl")


@pytest.mark.parametrize("preview", ["folder", "/dev/null", "sheet.jpg", "missing/sheet.png", "out/images/sheet.png"])
def test_a_preview_that_cannot_be_is_refused_before_anything_is_written(tmp_path, capsys, preview):
    (tmp_path / "folder").mkdir()
    error = fails(capsys, *SMALL, "--count", 2, "--preview", tmp_path / preview, "--out", tmp_path / "out")
    assert "--preview" in error and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Many processes

MIXTURE = ["--mix", "pair:2x1=1,rotation:4=1,patchfit:2x2=1", "--format", "jpeg"]


def test_the_bytes_do_not_depend_on_the_number_of_processes(tmp_path, capsys):
    scenes_as_files(tmp_path / "in", 7)
    photographs(tmp_path / "in", [(1, 2, 3), (4, 5, 6)], flat=True)  # to be left out, by whoever meets them
    said = []
    for workers in (1, 2, 3):
        run("--images", tmp_path / "in", "--count", 330, *MIXTURE, "--workers", workers, "--preview",
            tmp_path / f"{workers}.png", "--out", tmp_path / str(workers))  # fmt: skip
        said.append(capsys.readouterr().err.splitlines()[-1])
    assert files_in(tmp_path / "1") == files_in(tmp_path / "2") == files_in(tmp_path / "3")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "3.png").read_bytes()
    assert said[0].startswith("left out") and len(set(said)) == 1


def test_an_error_in_a_process_is_one_line_and_the_others_end(tmp_path, capsys):
    scenes_as_files(tmp_path / "in", 5)
    content = (tmp_path / "in" / "003.jpg").read_bytes()
    (tmp_path / "in" / "003.jpg").write_bytes(content[: len(content) // 2])  # its header is in order
    error = fails(capsys, "--images", tmp_path / "in", "--count", 300, "--workers", 2, "--out", tmp_path / "out")
    assert "003.jpg" in error
    assert not list((tmp_path / "out").glob("records*"))


def processes_of(session):
    """{process id: its status line} of what runs in a session: a child that lost its parent is found, too."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it has just ended
        state, _, _, its_session = text.rpartition(")")[2].split()[:4]
        if int(its_session) == session and state not in "ZX":
            found[int(path.parent.name)] = text
    return found


@pytest.fixture
def endless(tmp_path):
    """A function: start a run of 10**9 puzzles with two processes, wait until it writes -> the process."""
    started = []

    def start(workers):
        scenes_as_files(tmp_path / "in", 5)
        command = [sys.executable, str(ROOT / "jigsaw.py"), "--images", "in", "--count", str(10**9), "--out", "out"]
        process = subprocess.Popen(
            [*command, "--workers", str(workers), "--seed", "1"], cwd=tmp_path, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        started.append(process)
        deadline = time.monotonic() + 60
        while not list((tmp_path / "out" / "images").glob("*.png")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()
            time.sleep(0.1)
        time.sleep(1)
        return process

    yield start
    for process in started:
        for number in processes_of(process.pid):
            os.kill(number, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_all_processes_and_leaves_nothing_unfinished(tmp_path, endless, workers, number, status):
    process = endless(workers)
    assert len(processes_of(process.pid)) >= (1 if workers == 1 else 3)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
    else:
        process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in err and len(err.splitlines()) <= 2, err
    deadline = time.monotonic() + 10
    while processes_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)  # Python's own helper of processes notices a moment later
    assert not processes_of(process.pid)
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert names and all(name.endswith(".png") for name in names), names
    for path in (tmp_path / "out" / "images").iterdir():
        Image.open(path).load()


def test_a_thousand_million_puzzles_take_no_more_memory_than_a_few(endless):
    process = endless(2)
    time.sleep(2)
    for number in processes_of(process.pid):
        status = Path(f"/proc/{number}/status").read_text()
        resident = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:")]
        assert not resident or resident[0] < 300_000  # kB


def test_what_a_killed_run_had_begun_is_removed_by_the_next_and_what_a_living_one_writes_is_not(tmp_path):
    (tmp_path / "images").mkdir()
    dead = subprocess.Popen(["true"])
    dead.wait()
    names = ["records.jsonl.{}.partial", "images/abc.png.{}.partial"]
    for pid in (dead.pid, os.getppid()):
        for name in names:
            (tmp_path / name.format(pid)).touch()
    run(*SMALL, "--count", 2, "--out", tmp_path)
    left = {path for path in files_in(tmp_path) if path.endswith(".partial")}
    assert left == {name.format(os.getppid()) for name in names}


def test_a_process_that_is_killed_ends_the_run_with_one_line(tmp_path, endless):
    process = endless(2)
    children = [pid for pid, text in processes_of(process.pid).items() if pid != process.pid]
    command_lines = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    worker = next(pid for pid, line in command_lines.items() if b"spawn_main" in line)
    halfway = tmp_path / "out" / "images" / f"abc.png.{worker}.partial"
    halfway.touch()  # as if it had been writing
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1 and err.startswith("error: a worker process ended") and err.count("\n") == 1, err
    assert not list((tmp_path / "out").glob("records*")) and not halfway.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Strange inputs


def test_what_is_no_regular_file_is_no_picture(tmp_path):
    scenes_as_files(tmp_path / "in", 2)
    os.mkfifo(tmp_path / "in" / "pipe.jpg")
    (tmp_path / "in" / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "in" / "folder.png").mkdir()
    (tmp_path / "in" / "gone.png").symlink_to("nowhere")
    assert len(picture_files.list_pictures(tmp_path / "in", "train", 0.0)) == 2


@pytest.mark.parametrize("images", ["pipe", "/dev/zero", "photo.jpg"])
def test_images_that_are_no_folder_end_with_one_line(tmp_path, capsys, images):
    os.mkfifo(tmp_path / "pipe")
    scene(random.Random(0)).save(tmp_path / "photo.jpg")
    error = fails(capsys, "--images", tmp_path / images, "--count", 2, "--out", tmp_path / "out")
    assert "is not a folder" in error and images in error


def test_a_huge_picture_is_refused_by_its_header(tmp_path, capsys):
    scenes_as_files(tmp_path / "in", 1)
    common = ["--images", tmp_path / "in", "--count", 1, "--out", tmp_path / "out"]
    error = fails(capsys, *common, "--max-image-pixels", 4095)
    assert "000.jpg" in error and "64 x 64" in error and "--max-image-pixels" in error
    run(*common, "--max-image-pixels", 4096)
    # A PNG of 30,000 x 30,000 white pixels has some 100 kB; decoded it would be 2.7 GB. Only the header is there.
    header = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (30_000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    (tmp_path / "in" / "bomb.png").write_bytes(header + b"\x00\x00\x00\x00" + b"\x00" * 100)
    assert "bomb.png" in fails(capsys, *common)


@pytest.mark.parametrize(
    "flags",
    [
        ["--rows", 10**9],
        ["--cols", 10**400],
        ["--size", 10**400],
        ["--scenes", 10**12],
        ["--swap", "nan"],
        ["--mask-ratio", "nan"],
        ["--test-fraction", "inf"],
        ["--workers", 10**9],
        ["--workers", 0],
        ["--angles", "1e1"],
        ["--format", "gif"],
        ["--count", "9" * 5000],
        ["--count", 10**12],
    ],
    ids=lambda flags: flags[0] + str(flags[1])[:14],
)
def test_numbers_beyond_all_bounds_end_with_one_line(tmp_path, capsys, flags):
    common = {"--scenes": 2, "--count": 2, "--out": tmp_path / "out"} | {flags[0]: flags[1]}
    assert flags[0] in fails(capsys, *[word for pair in common.items() for word in pair])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", [["--max-side", 10**400], ["--max-image-pixels", 10**10], ["--resample", "nearest"]])
def test_bounds_of_pictures_are_bounded_too(tmp_path, capsys, flags):
    scenes_as_files(tmp_path / "in", 1)
    assert flags[0] in fails(capsys, "--images", tmp_path / "in", "--count", 2, *flags, "--out", tmp_path / "out")


@pytest.mark.parametrize("out", ["in", "in/below", "/dev/null", "/dev/null/below", "file", "taken"])
def test_an_out_that_cannot_be_ends_with_one_line_and_harms_nothing(tmp_path, capsys, out):
    scenes_as_files(tmp_path / "in", 2)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "taken" / "records.jsonl").mkdir(parents=True)
    before = files_in(tmp_path)
    fails(capsys, "--images", tmp_path / "in", "--count", 2, "--out", tmp_path / out)
    assert files_in(tmp_path) == before


def test_pictures_that_lie_where_the_puzzles_go_are_refused(tmp_path, capsys):
    scenes_as_files(tmp_path / "out" / "images", 2)
    error = fails(capsys, "--images", tmp_path / "out" / "images", "--count", 2, "--out", tmp_path / "out")
    assert "puzzles" in error


def test_a_full_disk_ends_with_one_line(tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    monkeypatch.setattr(Path, "replace", full)
    assert "No space left" in fails(capsys, *SMALL, "--count", 2, "--out", tmp_path)
    assert not files_in(tmp_path)


def test_flags_that_only_pictures_from_files_need_are_refused_for_scenes(tmp_path, capsys):
    for flags in (["--resample", "box"], ["--max-image-pixels", 100]):
        assert flags[0] in fails(capsys, *SMALL, "--count", 2, *flags, "--out", tmp_path)


def test_what_a_function_is_called_with_is_checked_as_flags_are(tmp_path):
    with pytest.raises(ValueError, match="scenes"):
        jigsaw.write_puzzles(tmp_path, 2, scenes=10**12)
    with pytest.raises(TypeError, match="colour"):
        jigsaw.write_puzzles(tmp_path, 2, scenes=2, colour="red")


# ---------------------------------------------------------------------------------------------------------------------
# docs/formats.md


def test_the_page_has_every_field_that_is_written_and_every_question_and_its_words_are_taken(tmp_path):
    page = (ROOT / "docs/formats.md").read_text()
    mixture = ",".join(f"{name}:{4 if name == 'rotation' else '2x2'}=1" for name in questions.QUESTIONS)
    run(*SMALL, "--count", 40, "--mix", mixture, "--out", tmp_path / "a")
    run(*SMALL, "--count", 4, "--curriculum", "2x1", "--reply-format", "json", "--out", tmp_path / "b")
    records = read(tmp_path / "a/records.jsonl") + read(tmp_path / "b/records.jsonl")
    written = {name for record in records for name in record}
    assert {name for name in written if f"`{name}`" not in page} == set()
    part = page.split("### Words of prompts")[1]
    text = part.split("```json\n")[1].split("```")[0]
    (tmp_path / "words.json").write_text(text)
    run(*SMALL, "--count", 4, "--no-think", "--prompts", tmp_path / "words.json", "--out", tmp_path / "c")
    assert read(tmp_path / "c/records.jsonl")[0]["prompt"].endswith("Write one letter and nothing else.")
    table = page.split("| `--question` |")[1].split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")] for line in table.splitlines()[2:]]
    listed = {row[1]: row[3] for row in rows}
    assert listed == {name: question.answer_type for name, question in questions.QUESTIONS.items()}
