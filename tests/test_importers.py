"""importers.py: fixtures in the published schemas become records, and what is not the published set is refused."""

import io
import json
import random
import time

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from commands import ROOT, end, start
from PIL import Image

import importers
import rewards
from importers import LeftOut
from records import DataError, read_records

# ---------------------------------------------------------------------------------------------------------------------
# Fixtures in the published schemas


def picture_bytes(color="red", size=(100, 50), kind="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, kind)
    return buffer.getvalue()


PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})
RATIOS = {name: pa.float32() for name in ("iou_max_label_first", "iou_max_iou_first", "iou_completeness", "map")}
ORSTA = {
    "data_source": pa.string(),
    "images": pa.list_(PICTURE),
    "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
    "ability": pa.string(),
    "reward_model": pa.struct(
        {
            "answer": pa.string(),
            "ground_truth": pa.string(),
            "accuracy_ratio": pa.float32(),
            "format_ratio": pa.float32(),
            "verifier": pa.string(),
            "verifier_parm": pa.struct({"det_verifier_normalized": pa.bool_(), "det_reward_ratio": pa.struct(RATIOS)}),
        }
    ),
    "extra_info": pa.struct({"id": pa.string(), "image_path": pa.string()}),
}
VIRL = {
    "question": pa.string(),
    "answer": pa.string(),
    "PassRate_32BTrained": pa.float64(),
    "PassRate_7BBase": pa.float64(),
    "category": pa.string(),
    "source": pa.string(),
    "qid": pa.string(),
    "image": pa.list_(pa.string()),
}


def orsta(prompt="<image>How long is AB?", gold=r"\boxed{4}", *, images=None, ability="math", scale=None, system=None):
    """A row of Orsta-47k. scale: of a box, whether its sides count 1000."""
    located = gold.startswith("<answer>")
    turns = [{"content": system, "role": "system"}] if system else []
    return {
        "data_source": "mm_math",
        "images": [{"bytes": picture_bytes(), "path": None}] if images is None else images,
        "prompt": [*turns, {"content": prompt, "role": "user"}],
        "ability": ability,
        "reward_model": {
            "answer": gold,
            "ground_truth": gold,
            "accuracy_ratio": 1.0,
            "format_ratio": 0.1,
            "verifier": "detection" if located else "mathverify",
            "verifier_parm": {"det_verifier_normalized": scale, "det_reward_ratio": None},
        },
        "extra_info": {"id": None, "image_path": "images/1.png"},
    }


def virl(number=0, question="<image>How many?", answer=r"\boxed{3}", image=("images/a.png",)):
    return {
        "question": question,
        "answer": answer,
        "PassRate_32BTrained": 0.5,
        "PassRate_7BBase": 0.25,
        "category": "Broader STEM Topics",
        "source": "Processed",
        "qid": f"q{number}",
        "image": list(image),
    }


def write(path, rows, schema):
    parquet.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), path)
    return str(path)


def boxes_of(*boxes):
    return "<answer>\n" + str([{"bbox_2d": box, "label": "shiba dog"} for box in boxes]) + "\n</answer>"


@pytest.fixture
def virl_copy(tmp_path):
    """A folder as ViRL39K comes: a parquet file, and images/ beside it."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(picture_bytes("green"))
    (tmp_path / "images/b.jpg").write_bytes(picture_bytes("blue", kind="JPEG"))
    return tmp_path


def imported(rows, tmp_path, schema=ORSTA, name="orsta", **options):
    """(records, {cause: ids}) of these rows."""
    path = write(tmp_path / "rows.parquet", rows, schema)
    return importers.import_set(name, [path], tmp_path / "out", part=True, **options)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# Whole sets


def test_orsta_becomes_records_that_a_trainer_reads(tmp_path):
    rows = [
        orsta(system="You are helpful."),
        orsta("<image>\nWhich is longer?\nA. AB\nB. CD", r"\boxed{B}", ability="science"),
        orsta("<image>How many cubes?", r"\boxed{7}", ability="counting"),
        orsta("<image>What does the sign say?", r"\boxed{Grand Hotel}", ability="ocr"),
        orsta("<image>\nLocate all objects:\n- dog\n\nFirst think. Put the boxes in <answer> and </answer> tags. "
              "For example: <answer>[{'bbox_2d': [x1,y1,x2,y2],'label': label_name}]</answer>",
              boxes_of([100, 200, 505, 998]), ability="cv_detection", scale=True),
    ]  # fmt: skip
    path = write(tmp_path / "train-00000.parquet", rows, ORSTA)
    importers.main(["--set", "orsta", "--data", path, "--out", str(tmp_path / "out"), "--part"])
    found = lines_of(tmp_path / "out/records.jsonl")
    assert [(row["answer_type"], row["answer"]) for row in found] == [
        ("math", "4"), ("letter", "B"), ("digit", 7), ("text", "Grand Hotel"),
        ("box", [10.0, 10.0, 50.5, 49.9]),  # the picture is 100 x 50
    ]  # fmt: skip
    assert [row["id"] for row in found] == [f"orsta-{number:06d}" for number in range(1, 6)]
    assert found[0]["prompt"] == (
        "<image>How long is AB?\nThink inside <think> </think>, then give only the answer inside <answer> </answer>."
    )
    assert found[1]["options"] == ["AB", "CD"] and "options" not in found[0]
    assert found[4]["prompt"].startswith("<image>\nLocate all objects:\n- dog\n\nFirst think.\nThe picture is 100 pix")
    assert "label_name" not in found[4]["prompt"]
    assert [(row["source"], row["think"]) for row in found] == [("mm_math", True)] * 5
    assert found[2]["category"] == "counting"
    assert len({row["images"][0] for row in found}) == 1 and len(list((tmp_path / "out/images").iterdir())) == 1

    read = read_records(tmp_path / "out/records.jsonl", rewards.check_gold)
    for record, answer in zip(read, ["4", "B", "seven", "grand hotel", "10, 10, 50.5, 49.9"], strict=True):
        assert rewards.score(f"<think>so</think><answer>{answer}</answer>", record)["reward"] == 1.5
    told = json.loads((tmp_path / "out/account.json").read_text())
    assert (told["set"], told["rows"], told["records"], told["images"], told["left_out"]) == ("orsta", 5, 5, 1, {})


def test_virl39k_takes_its_pictures_from_the_folder_and_its_ids_from_the_rows(virl_copy):
    rows = [
        virl(0),
        virl(1, "Compare <image> and <image>.", r"\boxed{\frac{1}{2}}", ["images/a.png", "images/b.jpg"]),
        virl(2, "What is 1+1?", r"\boxed{2}", []),
        virl(3, "What is shown?", r"\boxed{a red fox}"),  # no marker, as 851 of the published questions
    ]
    records, left_out = imported(rows, virl_copy, VIRL, "virl39k")
    assert [record["id"] for record in records] == [f"virl39k-q{number}" for number in range(4)] and not left_out
    assert [len(record["images"]) for record in records] == [1, 2, 0, 1]
    assert [record["images"][0][-4:] for record in records if record["images"]] == [".png"] * 3
    assert records[1]["images"][1].endswith(".jpg") and records[0]["images"] == records[3]["images"]
    assert records[0]["source"] == "virl39k-Processed" and records[0]["category"] == "Broader STEM Topics"


def test_mm_eureka_lines_become_records(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/1.png").write_bytes(picture_bytes())
    instruction = "First think in <think> </think>, then answer in <answer> </answer>.\nQuestion:\n"
    turns = [{"role": "system", "content": "Solve."}, {"role": "user", "content": instruction + "<image>Find x."}]
    line = {"id": "0", "conversations": turns, "answer": "$x=3$", "image_urls": ["file://" + str(tmp_path / "1.png")]}
    data = tmp_path / "dataset.jsonl"
    data.write_text(json.dumps(line | {"image_urls": ["file:///elsewhere/1.png"]}) + "\n")
    with pytest.raises(DataError, match="row 1: image '/elsewhere/1.png' is not a file in"):
        importers.import_set("mm-eureka", [str(data)], tmp_path / "out")
    relative = {"image_urls": ["pictures/1.png"]}
    inside = {"image_urls": [f"file://{tmp_path}/pictures/1.png"]}
    data.write_text("".join(json.dumps(line | urls) + "\n" for urls in (relative, inside)))
    records, left_out = importers.import_set("mm-eureka", [str(data)], tmp_path / "out", form="boxed")
    assert not left_out and records[0]["images"] == records[1]["images"]
    assert records[0]["prompt"].split("\n")[0] == "<image>Find x."
    assert (records[0]["answer"], records[0]["think"], records[0]["reply_format"]) == ("$x=3$", False, "boxed")
    for depth, cause in ((3, "answer must be string, it is a list"), (900, "it is nested too deeply")):
        data.write_text(json.dumps(line | {"answer": 0}).replace(": 0", ": " + "[" * depth + "]" * depth) + "\n")
        with pytest.raises(DataError, match=f"dataset.jsonl:1: is no line of mm-eureka: {cause}"):
            importers.import_set("mm-eureka", [str(data)], tmp_path / "out")
    data.write_text(json.dumps(line | {"conversations": str(turns)}) + "\n")
    with pytest.raises(DataError, match="dataset.jsonl:1: is no line of mm-eureka: conversations must be a list"):
        importers.import_set("mm-eureka", [str(data)], tmp_path / "out")


def test_the_same_command_writes_the_same_bytes_and_limit_reads_the_first_rows(virl_copy):
    path = write(virl_copy / "v.parquet", [virl(number, f"<image>Is it {number}?") for number in range(150)], VIRL)
    files = []
    for out in ("one", "other"):
        importers.main(["--set", "virl39k", "--data", path, "--out", str(virl_copy / out), "--part"])
        files.append((virl_copy / out / "records.jsonl").read_bytes())
    assert files[0] == files[1] and len(files[0].splitlines()) == 150
    paths = [
        write(virl_copy / f"{start}.parquet", [virl(number) for number in range(start, start + 50)], VIRL)
        for start in (0, 50, 100)
    ]
    records, _ = importers.import_set("virl39k", paths, virl_copy / "few", part=True, limit=70)
    assert [record["id"] for record in records] == [f"virl39k-q{number}" for number in range(70)]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong and damaged copies


def refused(rows, tmp_path, schema=ORSTA, name="orsta", **options):
    with pytest.raises(DataError) as error:
        imported(rows, tmp_path, schema, name, **options)
    assert not (tmp_path / "out/records.jsonl").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_column_and_a_missing_field_are_named_with_those_that_are_there(tmp_path):
    schema = {name: kind for name, kind in ORSTA.items() if name != "ability"}
    assert "ability is missing; there are data_source, images, prompt" in refused([orsta()], tmp_path, schema)
    schema = ORSTA | {"images": pa.list_(pa.struct({"path": pa.string()}))}
    assert "images.bytes is missing; there are path" in refused([orsta()], tmp_path, schema)
    assert "rows.parquet: is no file of virl39k: qid is missing" in refused([orsta()], tmp_path, name="virl39k")


def test_a_wrong_type_is_named_with_the_right_one(tmp_path):
    cases = [
        ({"qid": pa.int64()}, {"qid": 1}, "qid must be string, it is int64"),
        ({"image": pa.string()}, {"image": "a.png"}, "image must be a list of string, it is string"),
        ({"image": pa.list_(pa.int8())}, {"image": [1]}, "image must be string, it is int8"),
    ]
    for kind, value, cause in cases:
        assert cause in refused([virl() | value], tmp_path, VIRL | kind, "virl39k")
    model = pa.struct({"ground_truth": pa.float64(), "verifier": pa.string(), "verifier_parm": PICTURE})
    row = orsta() | {"reward_model": {"ground_truth": 4.0, "verifier": "mathverify"}}
    cause = refused([row], tmp_path, ORSTA | {"reward_model": model})
    assert "reward_model.ground_truth must be string, it is double" in cause


def test_other_widths_of_the_same_type_are_the_same_type(virl_copy):
    schema = VIRL | {"question": pa.large_string(), "image": pa.large_list(pa.large_string())}
    assert len(imported([virl()], virl_copy, schema, "virl39k")[0]) == 1


def test_another_number_of_rows_than_the_published_one_is_refused_unless_it_is_said_to_be_a_part(virl_copy):
    path = write(virl_copy / "v.parquet", [virl(0), virl(1)], VIRL)
    given = ["--set", "virl39k", "--data", path, "--out", str(virl_copy / "out")]
    with pytest.raises(DataError, match="virl39k has 38870 rows .* have 2; --part takes a part of it"):
        importers.main(given)
    assert not (virl_copy / "out").exists()
    importers.main([*given, "--part"])
    assert len(lines_of(virl_copy / "out/records.jsonl")) == 2
    assert importers.SETS["orsta"].rows == 27_133 + 20_633  # reasoning and perception, table 5


def test_what_is_no_parquet_file_is_refused_in_a_line(tmp_path, virl_copy):
    whole = write(virl_copy / "whole.parquet", [virl(number) for number in range(500)], VIRL)
    data = bytearray((virl_copy / "whole.parquet").read_bytes())
    damaged = bytearray(data)
    damaged[8 : len(data) // 2] = b"\x07" * (len(data) // 2 - 8)
    files = {
        "pointer.parquet": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
        "words.parquet": (b"not a parquet file at all", "is no sound parquet file"),
        "empty.parquet": (b"", "is no sound parquet file"),
        "half.parquet": (bytes(data[: len(data) // 2]), "is no sound parquet file"),
        "damaged.parquet": (bytes(damaged), "is damaged"),
    }
    for name, (content, cause) in files.items():
        (virl_copy / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: .*{cause}"):
            importers.import_set("virl39k", [str(virl_copy / name)], virl_copy / "out", part=True)
    for path in (tmp_path, tmp_path / "nothing.parquet"):
        with pytest.raises(DataError, match="a parquet file is needed"):
            importers.import_set("virl39k", [str(path)], virl_copy / "out", part=True)
    assert importers.check_copy("virl39k", [whole], part=True) == 500


def test_an_id_that_stands_twice_is_refused_with_both_places(virl_copy):
    cause = refused([virl(0), virl(1), virl(0)], virl_copy, VIRL, "virl39k")
    assert f'row 3: id "virl39k-q0" stands already at {virl_copy}/rows.parquet: row 1' in cause


@pytest.mark.parametrize("name", ["../a.png", "/etc/passwd", "images/../../a.png", "..", ".", "a\0b", "images/.."])
def test_a_picture_outside_of_the_folder_is_refused(virl_copy, name):
    (virl_copy.parent / "a.png").write_bytes(picture_bytes())
    cause = refused([virl(image=[name])], virl_copy, VIRL, "virl39k")
    assert "row 1: image" in cause and f"is not a file in {virl_copy}" in cause


def test_a_missing_picture_is_named_with_where_it_was_looked_for(virl_copy):
    assert f"row 2: image 'images/c.png' is missing (looked in {virl_copy}" in refused(
        [virl(0), virl(1, image=["images/c.png"])], virl_copy, VIRL, "virl39k"
    )
    (virl_copy / "images/c.png").mkdir()
    assert "is missing" in refused([virl(image=["images/c.png"])], virl_copy, VIRL, "virl39k")


# ---------------------------------------------------------------------------------------------------------------------
# What is left out, by cause


def causes(rows, tmp_path, **options):
    records, left_out = imported(rows, tmp_path, **options)
    assert len(records) + sum(map(len, left_out.values())) == len(rows)
    return {cause: len(ids) for cause, ids in left_out.items()}


def test_what_no_rule_can_score_is_counted_by_cause(tmp_path):
    rows = [
        orsta(gold=boxes_of([1, 2, 3, 4], [5, 6, 7, 8]), scale=True),
        orsta(gold=boxes_of([1, 2, 1001, 4]), scale=True),
        orsta(gold=boxes_of([3, 2, 3, 4]), scale=True),
        orsta(gold="<answer>[{'bbox_2d': [1, 2, 3], 'label': 'a'}]</answer>", scale=True),
        orsta(gold="<answer>__import__('os').system('true')</answer>", scale=True),
        orsta(gold=r"\boxed{B, C}"),
        orsta(gold=r"\boxed{1} and \boxed{2}"),
        orsta(gold=r"\boxed{\left\{\eqalign{x+y=1}\right.}"),  # of row 34,209 of ViRL39K: a brace too many
        orsta(gold=r"\boxed{4 \heartsuit 5}"),
        orsta(gold=r"\boxed{4"),
        orsta(gold=""),
        orsta(gold=r"\boxed{one two three four five six seven eight nine ten eleven}"),
        orsta("<image>\nA. left\nB. right", r"\boxed{E}"),
        orsta("<image><image>Which?", r"\boxed{4}"),
        orsta("<image>"),
        orsta("Put it in <answer> </answer>. <image>Which one?"),
        orsta(images=[{"bytes": b"no picture", "path": "a.png"}]),
        orsta(images=[{"bytes": picture_bytes()[:-30], "path": None}]),
        orsta(images=[{"bytes": b"", "path": ""}]),
        orsta(images=[None]),
        orsta() | {"prompt": []},
        orsta() | {"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ]
    assert causes(rows, tmp_path) == {
        "gold box: several": 1,
        "gold box: outside of the picture, or without area": 2,
        "gold box: not four numbers": 1,
        "gold box: not as published": 1,
        "gold answer: several letters": 1,
        "gold answer: several in boxes, or a box that is not closed": 3,
        "gold answer: mathematics that cannot be read": 1,
        "no gold answer": 1,
        "gold answer: free text of more than 10 words or one line": 1,
        "gold answer: cannot be scored": 1,
        "not one <image> marker for each image": 1,
        "no question": 1,
        "the question stands among words about the reply": 1,
        "image broken or too large": 4,
        "not one user's turn": 2,
    }


def test_rows_of_nothing_are_left_out_and_a_set_of_them_writes_no_records(tmp_path):
    rows = [dict.fromkeys(ORSTA), orsta() | {"images": None, "reward_model": None}]
    assert sum(causes(rows, tmp_path).values()) == 2
    path = write(tmp_path / "rows.parquet", rows, ORSTA)
    with pytest.raises(DataError, match="no row gave a record"):
        importers.main(["--set", "orsta", "--data", path, "--out", str(tmp_path / "out"), "--part"])
    assert not (tmp_path / "out/records.jsonl").exists()


def test_ten_megabytes_of_text_and_a_huge_picture_are_left_out_in_no_time(tmp_path):
    long = "x" * 10**7
    rows = [orsta(long), orsta(gold=long), orsta(gold=r"\boxed{" + "(" * 10**7), orsta(gold="<answer>" + "[" * 10**7)]
    rows += [orsta("\n" * 19_000 + "<think>"), orsta(gold="{'bbox_2d': [" * 1500), orsta("A. " * 6_000 + "?")]
    rows += [orsta(images=[{"bytes": picture_bytes(size=(4000, 3000)), "path": None}])]
    began = time.monotonic()
    found = causes(rows, tmp_path, max_image_pixels=10**7)
    assert time.monotonic() - began < 5
    assert found["question or gold answer of more than 20000 characters"] == 4
    assert found["image broken or too large"] == 1


def test_whatever_a_row_says_it_gives_a_record_or_a_cause(tmp_path):
    rng = random.Random(0)
    pieces = [*"AB()[]{}$\\?.:, \n-/9", "\\boxed{", "<image>", "<think>", "</answer>", "Question:", "A. "]
    pieces.append("{'bbox_2d': [")
    rows = []
    for _ in range(300):
        prompt, gold = ("".join(rng.choices(pieces, k=rng.randrange(30))) for _ in range(2))
        gold = rng.choice(["", r"\boxed{", "<answer>"]) + gold
        rows.append(orsta(prompt, gold, scale=rng.choice([None, True, False])))
    records, left_out = imported(rows, tmp_path)
    assert len(records) + sum(map(len, left_out.values())) == 300 and records
    for record in records:
        rewards.check_gold(record)


# ---------------------------------------------------------------------------------------------------------------------
# Questions, golds, pictures


@pytest.mark.parametrize(
    "prompt, question",
    [
        ("<image>What is x?", "<image>What is x?"),
        (r"Find AB. Put your final answer in \boxed{}.", "Find AB."),
        ("What is it? Answer with <think> and </think>. So be it.", "What is it?"),
        ("Find the dog.\n\nLet us think, output it in <answer> and </answer>.", "Find the dog."),
        ("Think in <think> </think>. Answer in <answer> </answer>.\nQuestion:\n<image>Is 1 < 2?", "<image>Is 1 < 2?"),
    ],
)
def test_words_about_the_reply_are_taken_off_a_question(prompt, question):
    assert importers.question_of(prompt) == question


@pytest.mark.parametrize("prompt", ["", " \n", "<image>\n", r"In \boxed{} please. <image> Why", r"Use \boxed{}: why?"])
def test_a_question_that_cannot_be_told_from_them_is_left_out(prompt):
    with pytest.raises(LeftOut):
        importers.question_of(prompt)


@pytest.mark.parametrize(
    "gold, kind, answer",
    [
        (r"\boxed{4}", "math", "4"),
        ("4", "math", "4"),
        (r"$\boxed{\frac{3}{4}}$", "math", r"\frac{3}{4}"),
        ("60°", "math", "60°"),
        ("x+1", "math", "x+1"),
        ("C", "letter", "C"),
        (r"\boxed{(D)}", "letter", "D"),
        (r"\boxed{\text{B}}", "letter", "B"),
        ("Yes", "text", "Yes"),
        ("ABC", "text", "ABC"),  # as mathematics the product, in any order
        ("July 4", "text", "July 4"),
        ("blue, red", "text", "blue, red"),
    ],
)
def test_a_gold_answer_has_the_type_that_scores_it_as_it_is_meant(gold, kind, answer):
    assert importers.typed(gold, "What?", "math") == {"answer_type": kind, "answer": answer}


def test_only_a_count_of_a_counting_question_is_a_digit():
    assert importers.typed("4", "What?", "counting") == {"answer_type": "digit", "answer": 4}
    assert importers.typed("4.5", "What?", "counting")["answer_type"] == "math"


@pytest.mark.parametrize(
    "question, options",
    [
        ("Which?\nA. up\nB. down", ["up", "down"]),
        ("Which?\n(A) up\n(B) down\n(C) 3.5 m", ["up", "down", "3.5 m"]),
        ("Which?\nA: up\nB: down\n", ["up", "down"]),
        ("Which?\nB. up\nC. down", []),
        ("Which?\nA. up", []),
        ("A or B?", []),
    ],
)
def test_options_are_read_where_they_stand_one_a_line_from_a_on(question, options):
    assert importers.options_of(question) == options


def test_a_box_becomes_pixels_by_its_scale():
    gold = boxes_of([100, 200, 500, 1000])
    assert importers.box_of(gold, "thousandths", (640, 480)) == [64.0, 96.0, 320.0, 480.0]
    assert importers.box_of(boxes_of([10, 20, 300, 480]), "pixels", (640, 480)) == [10.0, 20.0, 300.0, 480.0]
    with pytest.raises(LeftOut, match="outside"):
        importers.box_of(boxes_of([10, 20, 300, 481]), "pixels", (640, 480))
    named = '[{"bbox_2d": [1, 2, 3, 4], "label": "a dog\'s [left] ear"}]'
    assert importers.box_of(named, "pixels", (9, 9)) == [1.0, 2.0, 3.0, 4.0]
    with pytest.raises(LeftOut, match="not as published"):
        importers.box_of(named + " or so", "pixels", (9, 9))


def test_a_picture_larger_than_the_trainers_is_saved_smaller_and_its_box_with_it(tmp_path):
    rows = [
        orsta(gold=boxes_of([0, 0, 500, 1000]), scale=True, images=[{"bytes": picture_bytes(size=size), "path": None}])
        for size in [(400, 200), (100, 100)]
    ]
    records, _ = imported(rows, tmp_path, max_pixels=20_000)
    sizes = [Image.open(tmp_path / "out" / record["images"][0]).size for record in records]
    assert sizes == [(200, 100), (100, 100)]
    assert [record["answer"] for record in records] == [[0, 0, 100, 100], [0, 0, 50, 100]]
    assert "200 pixels wide and 100 high" in records[0]["prompt"]


def test_a_picture_is_kept_byte_for_byte_and_nothing_unfinished_stays(tmp_path):
    content = picture_bytes("navy", kind="JPEG")
    rows = [orsta(images=[{"bytes": content, "path": "x"}]), orsta(images=[{"bytes": b"\0", "path": "x"}])]
    records, _ = imported(rows, tmp_path)
    (path,) = (tmp_path / "out/images").iterdir()
    assert path.read_bytes() == content and records[0]["images"] == [f"images/{path.name}"] and path.suffix == ".jpg"


# ---------------------------------------------------------------------------------------------------------------------
# The command


def test_what_was_made_is_told_and_a_wrong_copy_is_status_2_and_one_line(virl_copy, capsys):
    path = write(virl_copy / "v.parquet", [virl(0), virl(1, answer="")], VIRL)
    given = ["--set", "virl39k", "--data", path, "--out", str(virl_copy / "out")]
    importers.main([*given, "--part"])
    told = capsys.readouterr().out.splitlines()
    assert told == [
        "2 rows, 1 images",
        "      1   50.0 %  gave a record",
        "      1   50.0 %    of type math",
        "      1   50.0 %  left out: no gold answer",
        f"{virl_copy}/out/records.jsonl: 1 records written",
    ]
    status, out, err = end(start(ROOT / "importers.py", *given))
    assert (status, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_flags_that_cannot_be_used_are_refused(virl_copy):
    given = ["--set", "virl39k", "--data", "v.parquet", "--out", "out"]
    for more in (["--set", "mnist"], ["--limit", "-1"], ["--reply-format", "yaml"], ["--max-pixels", "1"]):
        with pytest.raises(SystemExit) as stop:
            importers.parse_args([*given, *more])
        assert stop.value.code == 2
    with pytest.raises(DataError, match="--images nowhere: is nothing, a directory is needed"):
        importers.main([*given, "--images", "nowhere"])
    (virl_copy / "records.jsonl").mkdir()
    with pytest.raises(DataError, match="--out .*records.jsonl: is a directory"):
        importers.main([*given[:-1], str(virl_copy)])
