"""A picture whose header is sound and whose pixels are not is found during training: named, replaced, counted.

The plain way that runs are compared with: a data file in which somebody put the next record in the broken one's place.
"""

import json
import shutil
import threading

import pytest
import torch
from commands import Material, call, distance, rows, timeless, weights, write
from conftest import CPU
from PIL import Image
from test_run_directory import settings, signals_restored  # noqa: F401, a fixture
from test_stages import check_one_line, refuse

import lazy_puzzles
import records as records_file
import training
from pictures import PictureError, open_picture, picture_size
from records import DataError, read_records
from run_directory import Run

SEVEN = {"id": "p", "prompt": "?", "answer": "A", "answer_type": "letter", "think": False, "source": "s"}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


def truncate(path):
    """Cut a PNG file in the middle: the header stays."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert picture_size(path)
    with pytest.raises(PictureError, match="is broken"):
        open_picture(path)


@pytest.fixture
def seven(tmp_path):
    """A data file of seven records with a picture each; those of records 2, 3 and 6 are cut."""
    for number in range(7):
        Image.effect_noise((56 + 28 * (number % 2), 56), 60).save(tmp_path / f"{number}.png")
    for number in (2, 3, 6):
        truncate(tmp_path / f"{number}.png")
    return write(tmp_path / "r.jsonl", [SEVEN | {"id": f"r{n}", "images": [f"{n}.png"]} for n in range(7)])


# ---------------------------------------------------------------------------------------------------------------------
# At the start: headers


def test_headers_alone_are_read_where_pixels_can_wait(seven, monkeypatch):
    with pytest.raises(DataError, match=r'r.jsonl:3: image ".*2.png" is broken'):
        read_records(seven)
    monkeypatch.setattr(lazy_puzzles, "open_picture", lambda *args: pytest.fail("decoded"))
    read = read_records(seven, decode=False)
    assert [record["_sizes"] for record in read] == [[(56 + 28 * (number % 2), 56)] for number in range(7)]
    (seven.parent / "4.png").write_bytes(b"no header")
    with pytest.raises(DataError, match=r'r.jsonl:5: image ".*4.png" is broken'):
        read_records(seven, decode=False)
    (seven.parent / "4.png").unlink()
    with pytest.raises(DataError, match=r'r.jsonl:5: image ".*4.png" is missing'):
        read_records(seven, decode=False)


class Rank:
    """One of several threads that stand for processes: what `gather` is given, all of them get."""

    def __init__(self, rank, size, barrier, table):
        self.rank, self.size, self.barrier, self.table, self.main = rank, size, barrier, table, rank == 0

    def gather(self, thing):
        self.table[self.rank] = thing
        self.barrier.wait(30)
        everything = list(self.table)
        self.barrier.wait(30)
        return everything


def on_ranks(count, function):
    """[what function(rank) returns or raises] of `count` ranks."""
    barrier, table, results = threading.Barrier(count), [None] * count, [None] * count

    def work(rank):
        try:
            results[rank] = function(Rank(rank, count, barrier, table))
        except DataError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_each_picture_is_looked_at_by_one_rank_and_all_hear_what_it_found(seven, monkeypatch):
    looked, look = [], records_file.sizes_of
    monkeypatch.setattr(records_file, "sizes_of", lambda shown, most: looked.append(shown.path) or look(shown, most))
    one, two, three = on_ranks(3, lambda rank: read_records(seven, world=rank, decode=False))
    assert one == two == three == read_records(seven, decode=False)
    assert sorted(looked) == sorted(2 * [record["images"][0] for record in one])  # once by all ranks, once alone
    # The first in the file, whoever found it.
    (seven.parent / "4.png").write_bytes(b"no header")
    (seven.parent / "5.png").write_bytes(b"no header")
    (said,) = set(on_ranks(3, lambda rank: read_records(seven, world=rank, decode=False)))
    assert "r.jsonl:5" in said and "4.png" in said


# ---------------------------------------------------------------------------------------------------------------------
# When it is needed: the encoder


@pytest.fixture
def encoder(scratch_model):
    return scratch_model[1]


def test_a_record_whose_picture_is_broken_gives_place_to_the_next_whose_picture_is_not(encoder, seven):
    read, broken = read_records(seven, decode=False), {}
    encoder.replace_broken(read, broken)
    prompts = encoder.prompts(read)
    # 2 and 3 are broken, so is 6, behind which the list begins anew.
    assert [prompt.record["id"] for prompt in prompts] == ["r0", "r1", "r4", "r4", "r4", "r5", "r0"]
    assert [read[0], read[4]] == [prompts[6].record, prompts[3].record]
    assert torch.equal(prompts[2].pixels, prompts[4].pixels) and prompts[2].images == prompts[4].images
    assert list(broken) == [f"{seven}:{line}" for line in (3, 4, 7)]
    row = broken[f"{seven}:4"]
    assert row["id"] == "r3" and row["where"] == f"{seven}:4" and '3.png" is broken' in row["cause"]


def test_what_an_earlier_start_found_broken_stays_replaced(encoder, seven):
    read = read_records(seven, decode=False)
    encoder.replace_broken(read, {f"{seven}:1": {"cause": "it was"}})
    assert encoder.prompt(read[0]).record["id"] == "r1"


def test_a_record_that_nothing_may_stand_in_for_is_an_error(encoder, seven):
    read = read_records(seven, decode=False)
    with pytest.raises(DataError, match=r'^.*r.jsonl:3: image ".*2.png" is broken'):
        encoder.prompt(read[2])
    # Held-out records are none of the list, even with the same id.
    encoder.replace_broken(read, {})
    with pytest.raises(DataError, match=r"^elsewhere:9: image"):
        encoder.prompt(read[2] | {"_where": "elsewhere:9"})


def test_where_everything_is_broken_the_run_ends_with_one_line(encoder, seven):
    for number in (0, 1, 4, 5):
        truncate(seven.parent / f"{number}.png")
    read = read_records(seven, decode=False)
    encoder.replace_broken(read, {})
    with pytest.raises(DataError, match=r"^.*r.jsonl:6: image .* is broken .*; all 7 records from there on"):
        encoder.prompt(read[5])


def test_a_picture_that_changed_its_size_is_broken(encoder, seven):
    read = read_records(seven, decode=False)
    Image.new("RGB", (280, 280)).save(seven.parent / "0.png")
    with pytest.raises(DataError, match=r'^.*r.jsonl:1: image ".*0.png" is broken \(its size is not what'):
        encoder.prompt(read[0])


# ---------------------------------------------------------------------------------------------------------------------
# The run: all ranks know, and a resumed run too


def test_what_one_rank_found_all_ranks_know_and_it_is_named_once(tmp_path, capsys):
    row = {"id": "r1", "cause": "it is broken"}

    def steps(rank):
        run = Run(tmp_path, rank)
        if rank.rank == 1:
            run.broken["a:2"] = {"where": "a:2", **row}
        counts = [run.share_broken(7)]
        if rank.rank == 0:
            run.broken["a:1"] = {"where": "a:1", **row}
        run.broken["a:9"] = {"where": "a:9", **row}  # found by both at once
        return [*counts, run.share_broken(8), run.share_broken(9), sorted(run.broken)]

    assert on_ranks(2, steps) == [[1, 3, 3, ["a:1", "a:2", "a:9"]]] * 2
    lines = [json.loads(line) for line in (tmp_path / "broken.jsonl").read_text().splitlines()]
    assert [(line["step"], line["where"], line["id"]) for line in lines] == [(7, "a:2", "r1"), (8, "a:1", "r1"),
                                                                             (8, "a:9", "r1")]  # fmt: skip
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and said[0] == 'a:2: it is broken; the next record takes the place of "r1"'


def test_a_resumed_run_knows_what_was_broken_up_to_its_checkpoint(scratch_model, tmp_path, signals_restored):  # noqa: F811
    policy, _ = scratch_model
    optimizer = training.adamw(policy, 1e-3)
    run = Run.open(settings(tmp_path / "run"), CPU)
    for step in (1, 2, 3):
        run.broken[f"a:{step}"] = {"where": f"a:{step}", "id": str(step), "cause": "cut"}
        assert run.share_broken(step) == step
        run.log({"step": step})
        if step == 2:
            run.save(step, policy, optimizer)
    run.finish()
    run.lock.close()  # the process is gone
    again = Run.open(settings(tmp_path / "run", resume=True), CPU)
    assert again.step == 2 and sorted(again.broken) == ["a:1", "a:2"]
    assert again.share_broken(3) == 2
    again.lock.close()
    anew = Run.open(settings(tmp_path / "run", overwrite=True), CPU)
    assert anew.broken == {} and not (tmp_path / "run/broken.jsonl").exists()
    anew.lock.close()


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def spoiled(material, folder, name):
    """(a data file whose second line has a truncated picture, one with a copy of the third line in its place)."""
    lines = [dict(record) for record in getattr(material, name)]
    for record in lines:
        record["images"] = [str(material.folder / image) for image in record["images"]]
    shutil.copy(lines[1]["images"][0], folder / "cut.png")
    truncate(folder / "cut.png")
    broken, plain = list(lines), list(lines)
    broken[1] = lines[1] | {"images": [str(folder / "cut.png")]}
    plain[1] = lines[2] | {"id": "p1"}
    return write(folder / "broken.jsonl", broken), write(folder / "plain.jsonl", plain)


@pytest.mark.parametrize("stage", ["grpo", "dpo"])
def test_a_run_goes_on_with_the_next_record_in_the_broken_ones_place(material, tmp_path, capsys, stage):
    broken, plain = spoiled(material, tmp_path, "records" if stage == "grpo" else "pairs")

    def settings_of(data, out, **changes):
        return getattr(material, stage)(data=data, out=tmp_path / out, schedule="constant", **changes)

    call(stage, **settings_of(plain, "plain"))
    capsys.readouterr()
    call(stage, **settings_of(broken, "whole"))
    said = capsys.readouterr().err
    assert f'{broken}:2: image "{tmp_path / "cut.png"}" is broken' in said
    assert said.splitlines()[-1].startswith("1 record")
    expected, found = timeless(tmp_path / "plain"), timeless(tmp_path / "whole")
    counts = [row.pop("broken_pictures") for row in found]
    assert [row.pop("broken_pictures") for row in expected] == [0, 0, 0] and counts[-1] == 1
    assert found == expected
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "plain")) == 0

    # Stopped and resumed, and the file mended meanwhile: the same run.
    call(stage, **settings_of(broken, "parts", steps=2))
    Image.new("RGB", (112, 112)).save(tmp_path / "cut.png")
    call(stage, **settings_of(broken, "parts", resume=True))
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "parts")) == 0
    assert [row["broken_pictures"] for row in rows(tmp_path / "parts")] == counts


@pytest.mark.parametrize("stage", ["grpo", "dpo"])
def test_strict_data_ends_the_run_at_the_broken_picture_with_one_line(material, tmp_path, capsys, stage):
    broken, _ = spoiled(material, tmp_path, "records" if stage == "grpo" else "pairs")
    settings_ = getattr(material, stage)(data=broken, out=tmp_path / "out", strict_data=True)
    err = refuse(capsys, stage, **settings_)
    bar_and_error = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    check_one_line("\n".join(bar_and_error), f"{broken}:2", "cut.png", "is broken")
    assert not (tmp_path / "out/config.json").exists()


def test_held_out_pairs_are_decoded_before_anything_is_learned(material, tmp_path, capsys):
    broken, plain = spoiled(material, tmp_path, "pairs")
    err = refuse(capsys, "dpo", **material.dpo(data=plain, eval_data=broken, out=tmp_path / "out"))
    check_one_line(err, f"{broken}:2", "cut.png", "is broken")
    assert not (tmp_path / "out").exists()
