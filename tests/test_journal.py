"""journal.py: eval and distill killed anywhere end with the same bytes, and never write over what is not theirs."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import distill
import eval as evaluation
import files
import model
import training
from files import DataError
from journal import Journal
from records import write_jsonl
from toy.scenes import scene
from toy.tiny_model import make_tiny

CPU = training.World(0, 1, torch.device("cpu"))
COUNT = 6

# ---------------------------------------------------------------------------------------------------------------------
# The two stages on a tiny model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two models of random weights, and COUNT questions that any reply answers wrongly, one of them with a picture."""
    folder = tmp_path_factory.mktemp("journal")
    for seed, name in enumerate(("policy", "base")):
        make_tiny(folder / name, layers=2, seed=seed)
    scene(random.Random(0), 56).save(folder / "picture.png")
    rows = []
    for number in range(COUNT):
        record = {"id": f"q{number}", "images": [], "prompt": f"Question {number}?", "answer": "no", "source": "words"}
        rows.append(record | {"answer_type": "text", "think": False})
    rows[0]["images"] = ["picture.png"]
    write_jsonl(folder / "records.jsonl", rows)
    return folder


def eval_flags(place, out, *more):
    return ["--model", place / "policy", "--data", place / "records.jsonl", "--out", out, "--samples", 2,
            "--temperature", 1, "--max-new-tokens", 3, "--batch", 1, *more]  # fmt: skip


def distill_flags(place, out, *more):
    return ["--policy", place / "policy", "--base", place / "base", "--data", place / "records.jsonl", "--out", out,
            "--samples", 2, "--max-new-tokens", 3, "--batch", 1, "--coupled", "--judge", "none", *more]  # fmt: skip


def any_pair(record, policy_replies, base_replies, rng, **options):
    """A pair of whatever was said: the models of these tests are never right."""
    return {**record, "chosen": repr(policy_replies), "rejected": repr(base_replies), "corruption": None}, None


STAGES = {"eval": (evaluation, eval_flags, ".json"), "distill": (distill, distill_flags, ".jsonl")}


def texts(arguments):
    return [str(argument) for argument in arguments]


def in_a_fork(stage, arguments, wound):
    """Run a stage in a copy of this process, after wound(); -> its exit status, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            distill.make_pair = any_pair
            wound()
            stage.main(texts(arguments))
            status = 0
        except DataError:
            status = 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def after_adding(count):
    def wound():
        add, added = Journal.add, []

        def dying(self, name, items):
            add(self, name, items)
            added.append(name)
            if len(added) == count:
                die()

        Journal.add = dying

    return wound


def in_the_middle_of_a_line():
    def half(self, name, items):
        line = json.dumps({"index": min(items), "item": list(items.values())[0]})
        with open(self.folder / f"{name}.0.jsonl", "a") as file:
            file.write(line[: len(line) // 2])
        die()

    after_adding(0)
    Journal.add = half


def before_the_rename():
    def half(self, text):
        (self.folder / "result").write_text(text[: len(text) // 2])
        die()

    Journal.finish = half


def before_the_folder_goes():
    Journal.drop = die


def while_the_folder_goes():
    def some(self):
        sorted(self.folder.glob("*.jsonl"))[0].unlink()
        die()

    Journal.drop = some


def before_anything():
    model.load = die


def while_the_journal_opens():
    files.write_text = die


WOUNDS = {
    "while the journal opens": while_the_journal_opens,
    "before anything": before_anything,
    "after one reply": after_adding(1),
    "after four": after_adding(4),
    "after all of a phase": after_adding(COUNT),
    "in the middle of a line": in_the_middle_of_a_line,
    "before the rename": before_the_rename,
    "before the folder goes": before_the_folder_goes,
    "while the folder goes": while_the_folder_goes,
}


@pytest.fixture(scope="module")
def whole(place):
    """{stage: bytes of its file} of runs that nobody disturbed."""
    found = {}
    for name, (stage, flags, ending) in STAGES.items():
        out = place / f"whole{ending}"
        assert in_a_fork(stage, flags(place, out), lambda: None) == 0
        found[name] = out.read_bytes()
        assert not (place / f"whole{ending}.partial").exists()
    return found


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("wound", WOUNDS)
def test_a_job_killed_anywhere_is_resumed_and_ends_with_the_same_bytes(place, whole, name, wound):
    stage, flags, ending = STAGES[name]
    # Beside the records, because a result names files relative to its own folder.
    out = place / f"{name}-{wound.replace(' ', '-')}{ending}"
    assert in_a_fork(stage, flags(place, out), WOUNDS[wound]) == -signal.SIGKILL
    assert in_a_fork(stage, flags(place, out, "--resume"), lambda: None) == 0
    assert out.read_bytes() == whole[name]
    assert not [path.name for path in place.iterdir() if path.name.startswith(f"{out.name}.")]


@pytest.mark.parametrize("name", STAGES)
def test_a_job_may_be_killed_at_every_reply(place, whole, name):
    stage, flags, ending = STAGES[name]
    out = place / f"often-{name}{ending}"
    kills = 0
    while in_a_fork(stage, flags(place, out, "--resume"), after_adding(1)) == -signal.SIGKILL:
        kills += 1
    assert kills == (COUNT if name == "eval" else 2 * COUNT)
    assert out.read_bytes() == whole[name]


@pytest.mark.parametrize("name", STAGES)
def test_nothing_is_sampled_twice_and_no_model_is_loaded_when_all_is_there(place, whole, name):
    stage, flags, ending = STAGES[name]
    out = place / f"once-{name}{ending}"
    assert in_a_fork(stage, flags(place, out), before_the_rename) == -signal.SIGKILL
    assert not out.exists()
    assert in_a_fork(stage, flags(place, out, "--resume"), before_anything) == 0
    assert out.read_bytes() == whole[name]


@pytest.mark.parametrize("name", STAGES)
def test_a_finished_file_is_kept_by_resume_and_written_anew_without_it(place, whole, name):
    stage, flags, ending = STAGES[name]
    out = place / f"again-{name}{ending}"
    assert in_a_fork(stage, flags(place, out), lambda: None) == 0
    written = out.stat().st_mtime_ns
    assert in_a_fork(stage, flags(place, out, "--resume"), before_anything) == 0
    assert out.stat().st_mtime_ns == written
    assert in_a_fork(stage, flags(place, out, "--resume", "--seed", 5), lambda: None) == 0
    assert out.read_bytes() != whole[name]
    assert in_a_fork(stage, flags(place, out), lambda: None) == 0
    assert out.read_bytes() == whole[name]
    # A finished file that somebody has truncated is no finished file.
    out.write_bytes(whole[name][:-20])
    assert in_a_fork(stage, flags(place, out, "--resume"), lambda: None) == 0
    assert out.read_bytes() == whole[name]


# ---------------------------------------------------------------------------------------------------------------------
# Real processes


def start(stage, arguments, size):
    """The processes that torchrun would start, without the seconds that torchrun itself takes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(size)}
    if size == 1:
        where = {}
    environment = training.child_environment() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | where
    command = [sys.executable, stage.__file__, *texts(arguments)]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment | ({"RANK": str(rank)} if size > 1 else {}),
        )  # fmt: skip
        for rank in range(size)
    ]


def lines_of(folder):
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def wait_for_lines(folder, count, ranks):
    deadline = time.monotonic() + 120
    while lines_of(folder) < count:
        assert time.monotonic() < deadline
        assert all(rank.poll() is None for rank in ranks), [rank.communicate()[1][-2000:] for rank in ranks]
        time.sleep(0.005)


def end(ranks):
    printed = [rank.communicate(timeout=120) for rank in ranks]
    return [rank.returncode for rank in ranks], printed


@pytest.fixture(scope="module")
def slow(place):
    """eval's flags of a job that takes some seconds, and the bytes of its file."""
    more = ["--max-new-tokens", 80, "--samples", 4]
    assert in_a_fork(evaluation, eval_flags(place, place / "slow.json", *more), lambda: None) == 0
    return more, (place / "slow.json").read_bytes()


def test_a_job_killed_in_two_processes_is_resumed_by_one(place, slow):
    more, expected = slow
    out = place / "slow-2-1.json"
    ranks = start(evaluation, eval_flags(place, out, *more), 2)
    wait_for_lines(place / f"{out.name}.partial", 1, ranks)
    for rank in ranks:
        rank.kill()
    assert end(ranks)[0] == [-signal.SIGKILL] * 2
    assert lines_of(place / f"{out.name}.partial") < COUNT and not out.exists()
    assert in_a_fork(evaluation, eval_flags(place, out, *more, "--resume"), lambda: None) == 0
    assert out.read_bytes() == expected


def test_a_job_killed_in_one_process_is_resumed_by_two(place, slow):
    more, expected = slow
    out = place / "slow-1-2.json"
    assert in_a_fork(evaluation, eval_flags(place, out, *more), after_adding(3)) == -signal.SIGKILL
    status, printed = end(start(evaluation, eval_flags(place, out, *more, "--resume"), 2))
    assert status == [0, 0], printed
    assert out.read_bytes() == expected


@pytest.mark.parametrize(
    "name, number, status",
    [("eval", signal.SIGINT, 130), ("eval", signal.SIGTERM, 143), ("distill", signal.SIGTERM, 143)],
)
def test_a_signal_ends_a_job_with_one_line_that_says_how_to_go_on(place, name, number, status):
    stage, flags, ending = STAGES[name]
    out = place / f"signal-{number}{ending}"
    folder = place / f"{out.name}.partial"
    ranks = start(stage, flags(place, out, "--max-new-tokens", 150, "--samples", 8), 1)
    wait_for_lines(folder, 1, ranks)
    ranks[0].send_signal(number)
    statuses, [(printed, err)] = end(ranks)
    last = err.rstrip("\n").split("\n")[-1].split("\r")[-1]
    assert (statuses, printed) == ([status], ""), err
    assert last == f"stopped; the replies so far are in {folder}, --resume goes on from there"
    assert "Traceback" not in err and not out.exists() and 1 <= lines_of(folder) < 2 * COUNT


def test_a_signal_to_all_processes_ends_them_all_with_one_line(place):
    out = place / "signal-two.json"
    ranks = start(evaluation, eval_flags(place, out, "--max-new-tokens", 150, "--samples", 8), 2)
    wait_for_lines(place / f"{out.name}.partial", 1, ranks)
    for rank in ranks:
        rank.terminate()
    statuses, printed = end(ranks)
    assert statuses == [143, 143], printed
    assert "".join(err for _, err in printed).count("--resume goes on from there") == 1 and not out.exists()


def test_a_signal_before_the_first_reply_leaves_nothing(place):
    out = place / "signal-early.json"
    ranks = start(evaluation, eval_flags(place, out), 1)
    deadline = time.monotonic() + 120
    while not (place / f"{out.name}.partial").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    ranks[0].terminate()
    statuses, [(_, err)] = end(ranks)
    assert statuses == [143] and "Traceback" not in err, err
    assert lines_of(place / f"{out.name}.partial") == 0 and not out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def refuses(stage, arguments, words):
    with pytest.raises(DataError) as refused:
        stage.main(texts(arguments))
    message = str(refused.value)
    assert words in message and "\n" not in message
    return message


@pytest.fixture
def stopped(place):
    """A copy of `place` in which an eval and a distill were killed after four replies."""

    def make(name, folder):
        for part in ("policy", "base"):
            shutil.copytree(place / part, folder / part)
        for part in ("records.jsonl", "picture.png"):
            shutil.copy(place / part, folder / part)
        stage, flags, ending = STAGES[name]
        out = folder / f"out{ending}"
        assert in_a_fork(stage, flags(folder, out), after_adding(4)) == -signal.SIGKILL
        return out

    return make


@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_job_is_neither_dropped_nor_mixed_with_another(stopped, tmp_path, name):
    out = stopped(name, tmp_path)
    stage, flags, _ = STAGES[name]
    folder = tmp_path / f"{out.name}.partial"
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    message = refuses(stage, flags(tmp_path, out), "add --resume to go on with it or --overwrite to start anew")
    assert str(folder) in message
    refuses(stage, flags(tmp_path, out, "--resume", "--seed", 3), "--seed was 0, now 3")
    refuses(stage, flags(tmp_path, out, "--resume", "--max-new-tokens", 4), "--max-new-tokens was 3, now 4")
    model_flag = "--model" if name == "eval" else "--policy"
    refuses(stage, flags(tmp_path, out, "--resume", model_flag, tmp_path / "base"), f"{model_flag} was")
    assert {path.name: path.read_bytes() for path in folder.glob("*.json*")} == before
    with_fewer = flags(tmp_path, out, "--overwrite", "--limit", 1)
    assert in_a_fork(stage, with_fewer, after_adding(1)) == -signal.SIGKILL
    assert lines_of(folder) == 1


CHANGES = {
    "records.jsonl": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "picture.png": lambda path: scene_again(path),
    "policy/model.safetensors": lambda path: flip(path, -4),
    "policy/config.json": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "policy/tokenizer.json": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
}


def scene_again(path):
    scene(random.Random(1), 56).save(path)


def flip(path, place):
    """One bit of a file; its size and its time stay."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("changed", CHANGES)
def test_a_job_is_not_resumed_on_changed_inputs(stopped, tmp_path, changed):
    out = stopped("eval", tmp_path)
    CHANGES[changed](tmp_path / changed)
    refuses(evaluation, eval_flags(tmp_path, out, "--resume"), "has changed since")
    refuses(evaluation, eval_flags(tmp_path, out, "--resume"), Path(changed).parts[0])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data + b'{"index": 5, "it',
        lambda data: data.replace(b'"texts": ["', b'"texts": ["x', 1),
        lambda data: b"\0" * 20 + data,
        lambda data: b"null\n[1]\n7\n{}\n" + data,
        lambda data: b"",
    ],
    ids=["truncated", "half a line", "a flipped bit", "zero bytes", "other JSON", "empty"],
)
def test_damaged_replies_are_sampled_again(place, whole, stopped, tmp_path, damage):
    out = stopped("eval", tmp_path)
    path = tmp_path / f"{out.name}.partial" / "replies.0.jsonl"
    path.write_bytes(damage(path.read_bytes()))
    assert in_a_fork(evaluation, eval_flags(tmp_path, out, "--resume"), lambda: None) == 0
    ours, theirs = json.loads(out.read_text()), json.loads(whole["eval"])
    assert ours["rows"] == theirs["rows"]


def test_damaged_settings_of_a_journal_are_one_line(stopped, tmp_path):
    out = stopped("eval", tmp_path)
    args = tmp_path / f"{out.name}.partial" / "args.json"
    for data in (b"", b"{", b"[]", b"{}", b'"\xff"'):
        args.write_bytes(data)
        refuses(evaluation, eval_flags(tmp_path, out, "--resume"), "args.json")


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "kind", ["directory", "FIFO", "device", "link", "records", "config", "weights", "picture", "under a file"]
)
def test_an_output_that_is_no_file_or_an_input_is_refused_before_a_model_is_loaded(place, tmp_path, name, kind):
    stage, flags, _ = STAGES[name]
    inputs = {"records": "records.jsonl", "config": "policy/config.json", "weights": "policy/model.safetensors",
              "picture": "picture.png"}  # fmt: skip
    out = place / inputs[kind] if kind in inputs else tmp_path / "target"
    if kind == "directory":
        out.mkdir()
    elif kind == "FIFO":
        os.mkfifo(out)
    elif kind == "device":
        out = Path("/dev/null")
    elif kind == "link":
        (tmp_path / "precious").write_text("precious")
        out.symlink_to(tmp_path / "precious")
    elif kind == "under a file":
        out.write_text("precious")
        out = out / "out.json"
    before = out.read_bytes() if kind in inputs else None
    assert in_a_fork(stage, flags(place, out), before_anything) == 2
    if before is not None:
        assert out.read_bytes() == before
    assert kind != "link" or (tmp_path / "precious").read_text() == "precious"
    assert not [path for path in (*tmp_path.iterdir(), *place.iterdir()) if path.name == f"{out.name}.partial"]


def test_an_output_that_is_the_baseline_is_refused(place):
    step0 = place / "step0.json"
    files_ = ["--id", place / "records.jsonl", "--ood", place / "ood.jsonl"]
    shutil.copy(place / "records.jsonl", place / "ood.jsonl")
    shared = ["--model", place / "policy", *files_, "--max-new-tokens", 2]
    assert in_a_fork(evaluation, [*shared, "--out", step0], lambda: None) == 0
    before = step0.read_bytes()
    refuses(evaluation, [*shared, "--out", step0, "--baseline", step0], "step0.json")
    assert step0.read_bytes() == before
    better = [*shared, "--out", place / "better.json", "--baseline", step0]
    assert in_a_fork(evaluation, better, after_adding(1)) == -signal.SIGKILL
    # The baseline is used when all replies are there.
    assert in_a_fork(evaluation, [*shared, "--out", place / "better.json", "--resume"], lambda: None) == 0
    assert json.loads((place / "better.json").read_text())["gf"] is None


def test_the_account_beside_the_pairs_is_no_input_either(place):
    data = place / "data.account.json"
    shutil.copy(place / "records.jsonl", data)
    before = data.read_bytes()
    flags = ["--policy", place / "policy", "--base", place / "base", "--data", data, "--out", place / "data.jsonl"]
    refuses(distill, flags, "data.account.json: is what --data reads")
    assert data.read_bytes() == before


def test_the_folder_of_replies_may_hold_nothing_of_others(place, tmp_path):
    out = tmp_path / "out.json"
    folder = tmp_path / "out.json.partial"
    folder.write_text("precious")
    refuses(evaluation, eval_flags(place, out), "out.json.partial: is a file; a directory is needed")
    assert folder.read_text() == "precious"
    folder.unlink()
    folder.mkdir()
    (folder / "thesis.tex").write_text("precious")
    for more in ((), ("--resume",), ("--overwrite",)):
        refuses(evaluation, eval_flags(place, out, *more), "thesis.tex")
    assert (folder / "thesis.tex").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------------------
# The journal by itself


def opened(tmp_path, world=CPU, **settings):
    known = {"out": str(tmp_path / "out.json"), "resume": False, "overwrite": False} | settings
    return Journal.open(known, world, inputs={}, models={}, pictures=[])


def test_items_come_back_as_they_were_added(tmp_path):
    kept = opened(tmp_path)
    kept.add("replies", {3: {"texts": ["\ud83d\n", "ü"], "lengths": [1]}, 0: {}})
    kept.add("other", {1: {"a": True}})
    kept.unlock()
    again = opened(tmp_path, resume=True)
    assert again.items("replies") == {3: {"texts": ["\ud83d\n", "ü"], "lengths": [1]}, 0: {}}
    assert again.missing("replies", 5) == [1, 2, 4] and again.missing("other", 2) == [0]


def test_two_jobs_never_write_the_same_file(tmp_path):
    first = opened(tmp_path)
    stage = SimpleNamespace(main=lambda more: opened(tmp_path, **dict.fromkeys(more, True)))
    for more in ([], ["resume"], ["overwrite"]):
        assert in_a_fork(stage, more, lambda: None) == 2
    first.unlock()
    assert in_a_fork(stage, [], lambda: None) == 0


def test_what_is_missing_is_dealt_to_the_processes_like_cards(tmp_path):
    kept = Journal(tmp_path / "x", tmp_path, CPU, before={"a": {1, 4}})
    shares = []
    for rank in range(3):
        kept.world = training.World(rank, 3, CPU.device)
        shares.append(kept.mine("a", 8))
    assert shares == [[0, 5], [2, 6], [3, 7]]


def test_a_job_that_ended_before_its_first_reply_leaves_no_folder(place, tmp_path):
    refuses(evaluation, ["--model", tmp_path / "nowhere", *eval_flags(place, tmp_path / "out.json")[2:]], "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, monkeypatch):
    kept = opened(tmp_path)
    kept.add("replies", {0: {"a": 1}})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left"):
        kept.add("replies", {1: {"a": 1}})
    with pytest.raises(DataError, match="No space left"):
        kept.finish("text")
    assert kept.items("replies")[0] == {"a": 1} and not (tmp_path / "out.json").exists()
