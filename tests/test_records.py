"""records.py: what is wrong with a file is named by file, line and cause; the rest goes through untouched, in order."""

import json

import numpy as np
import pytest
from PIL import Image

import rewards
from records import DataError, epoch_order, read_jsonl, read_records, write_jsonl

GOOD = {
    "id": "one",
    "images": ["pictures/a.png"],
    "prompt": "Which is lighter?",
    "answer": "A",
    "answer_type": "letter",
    "think": True,
    "source": "tests",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a sound picture and five broken ones."""
    (tmp_path / "pictures").mkdir()
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("a.png", "truncated.png", "truncated.jpg"):
        noise.save(tmp_path / "pictures" / name)
    for name in ("truncated.png", "truncated.jpg"):
        path = tmp_path / "pictures" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    flipped = bytearray((tmp_path / "pictures/a.png").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (tmp_path / "pictures/flipped.png").write_bytes(flipped)
    (tmp_path / "pictures/empty.png").write_bytes(b"")
    (tmp_path / "pictures/words.png").write_text("not a picture")
    return tmp_path


def write_lines(path, *lines):
    """Lines are bytes, text or objects. Returns the path."""
    with open(path, "wb") as file:
        for line in lines:
            text = line if isinstance(line, str | bytes) else json.dumps(line)
            file.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    return path


def without(name):
    return {key: value for key, value in other().items() if key != name}


def other(**changes):
    return GOOD | {"id": "two"} | changes


BAD_LINES = {
    "not JSON": ('{"id": "two", "images": [', "not JSON"),
    "JSON truncated in a word": (json.dumps(other())[:-9], "not JSON"),
    "deep nesting": ("[" * 100_000, "not JSON"),
    "not UTF-8": (json.dumps(other()).encode().replace(b"lighter", b"l\xefghter"), "utf-8"),
    "half a surrogate pair": (json.dumps(other(prompt="\ud83d")), "surrogates"),
    "an array": ([GOOD], "JSON object"),
    "a number": (17, "JSON object"),
    **{f"no {name}": (without(name), f'"{name}" is missing') for name in GOOD},
    "a number as id": (other(id=2), '"id" must be str'),
    "null as prompt": (other(prompt=None), '"prompt" must be str'),
    "text as images": (other(images="pictures/a.png"), '"images" must be list'),
    "a number as image": (other(images=[3]), '"images" must be a list of paths'),
    "a number as think": (other(think=1), '"think" must be bool'),
    "text as think": (other(think="true"), '"think" must be bool'),
    "a list as source": (other(source=["a"]), '"source" must be str'),
    "an answer_type nobody knows": (other(answer_type="essay"), "answer_type 'essay' is unknown"),
    "an answer_type of another type": (other(answer_type=None), '"answer_type" must be str'),
    "the id of line 1": (other(id="one"), 'id "one" stands already at'),
    "too few markers": (other(images=["pictures/a.png"] * 2, prompt="<image>?"), "1 <image> markers in the"),
    "too many markers": (other(prompt="<image> and <image>?"), "2 <image> markers in the prompt, 1 im"),
    "a marker without images": (other(images=[], prompt="<image>?"), "1 <image> markers in the prompt, 0 images"),
    "a missing image": (other(images=["pictures/none.png"]), 'none.png" is missing'),
    "a folder as image": (other(images=["pictures"]), 'pictures" is broken'),
    "a truncated PNG": (other(images=["pictures/truncated.png"]), 'truncated.png" is broken'),
    "a truncated JPEG": (other(images=["pictures/truncated.jpg"]), 'truncated.jpg" is broken'),
    "a flipped bit": (other(images=["pictures/flipped.png"]), 'flipped.png" is broken'),
    "an empty image": (other(images=["pictures/empty.png"]), 'empty.png" is broken'),
    "words as image": (other(images=["pictures/a.png", "pictures/words.png"]), 'words.png" is broken'),
}


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_cause(folder, name):
    line, cause = BAD_LINES[name]
    path = write_lines(folder / "bad.jsonl", GOOD, "", line, other(id="three"))  # the empty line counts: it is line 3
    with pytest.raises(DataError) as caught:
        read_records(path, check=rewards.check_gold)  # as every stage that learns or evaluates reads them
    assert str(caught.value).startswith(f"{path}:3: ")
    assert cause in str(caught.value)


def test_an_image_path_with_a_null_byte_is_named(folder):
    path = write_lines(folder / "null.jsonl", other(images=["a\0.png"]))
    with pytest.raises(DataError, match=r"null.jsonl:1: .*images"):
        read_records(path)


def test_an_id_may_not_return_in_a_second_file(folder):
    first = write_lines(folder / "first.jsonl", other(id="zero"), GOOD)
    second = write_lines(folder / "second.jsonl", other(), GOOD)
    with pytest.raises(DataError) as caught:
        read_records([first, str(second)])
    assert str(caught.value) == f'{second}:2: id "one" stands already at {first}:2'


def test_files_without_records_are_refused(folder):
    good, empty = write_lines(folder / "good.jsonl", GOOD), write_lines(folder / "empty.jsonl", "", "  ")
    for paths in (empty, [good, empty], [empty, good]):
        with pytest.raises(DataError, match=r"empty.jsonl: no records"):
            read_records(paths)


def test_a_file_that_cannot_be_read_is_named(folder):
    for path in (folder / "none.jsonl", folder / "pictures"):
        with pytest.raises(DataError) as caught:
            read_records([str(path)])
        assert str(caught.value).startswith(f"{path}: cannot be read")


def test_what_the_stages_check_finds_is_named_like_the_rest(folder):
    def check(record):
        if record["answer"] == "Z":
            raise ValueError("the answer Z is no option")

    path = write_lines(folder / "checked.jsonl", GOOD, other(answer="Z"))
    with pytest.raises(DataError) as caught:
        read_records(path, check=check)
    assert str(caught.value) == f"{path}:2: the answer Z is no option"
    assert len(read_records(path, check=lambda record: None)) == 2


@pytest.mark.parametrize("chosen", [None, "", " \n", 7])
def test_pairs_need_their_texts(folder, chosen):
    path = write_lines(folder / "pairs.jsonl", GOOD | {"chosen": "A"}, other(chosen=chosen))
    with pytest.raises(DataError, match=r'pairs.jsonl:2: the field "chosen" must be text'):
        read_records(path, text_fields=("chosen",))
    assert len(read_records(path)) == 2


def test_answers_of_every_kind_are_taken_as_they_are(folder):
    answers = [True, 3, 2.5, "A", [2, 1], [0.5, 1, 2, 3], None]
    path = write_lines(folder / "a.jsonl", *[other(id=str(i), answer=answer) for i, answer in enumerate(answers)])
    assert [record["answer"] for record in read_records(path)] == answers


def test_image_paths_are_relative_to_their_file_or_absolute(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    absolute = str((folder / "pictures/a.png").resolve())
    path = write_lines(folder / "pictures/in.jsonl", other(images=["a.png", absolute, "../pictures/a.png"]))
    (record,) = read_records(path)
    assert record["images"] == [absolute] * 3


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def test_unknown_fields_go_through_reading_and_writing_untouched_and_where_is_never_written(folder):
    more = {"order": [2, 1], "nested": {"ü": [None, True, 1e-7, {"<b>": "\u2028 \\ \" 🙂"}]}, "empty": {}}
    path = write_lines(folder / "rich.jsonl", GOOD | more, "", other(**more, category=0))
    records = read_records(path)
    assert [record["_where"] for record in records] == [f"{path}:1", f"{path}:3"]
    write_jsonl(folder / "new/deep/copy.jsonl", records)
    assert "_where" not in (folder / "new/deep/copy.jsonl").read_text()
    rows = [row for _, row in read_jsonl(folder / "new/deep/copy.jsonl")]
    picture = str((folder / "pictures/a.png").resolve())
    assert rows == [GOOD | more | {"images": [picture]}, other(**more, category=0) | {"images": [picture]}]
    again = read_records(folder / "new/deep/copy.jsonl")
    assert [without_ours(record) for record in again] == rows


def without_ours(record):
    return {key: value for key, value in record.items() if not key.startswith("_")}


def test_a_write_that_fails_leaves_the_old_file(folder):
    write_jsonl(folder / "old.jsonl", [{"n": 1}])
    with pytest.raises(TypeError):
        write_jsonl(folder / "old.jsonl", [{"n": 2}, {"n": object()}])
    assert (folder / "old.jsonl").read_text() == '{"n": 1}\n'


# ---------------------------------------------------------------------------------------------------------------------
# Order


def test_every_epoch_is_a_permutation_of_its_own():
    order = epoch_order(3, 17, 0, 17 * 4)
    epochs = [order[start : start + 17] for start in range(0, 68, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(17))}) == 5


def test_a_window_of_the_order_is_a_slice_of_the_whole():
    whole = epoch_order(3, 7, 0, 50)
    for start, count in ((0, 0), (0, 7), (5, 20), (14, 7), (49, 1), (13, 2)):
        assert epoch_order(3, 7, start, count) == whole[start : start + count]


def test_another_seed_gives_another_order():
    orders = {tuple(epoch_order(seed, 30, 0, 30)) for seed in (0, 1, 2, 11)}
    assert len(orders) == 4


def test_the_first_epochs_of_neighbouring_seeds_are_not_shifted_copies():
    assert epoch_order(0, 30, 30, 30) != epoch_order(1, 30, 0, 30)
