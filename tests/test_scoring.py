"""scoring.py: the same scores in every thread and process, and no reply that can stop a run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from commands import ROOT

import math_answers
import rewards
import scoring

DATA = Path(__file__).parent / "data"
MATH = {"id": "m", "answer_type": "math", "answer": "5", "think": True, "images": [object()], "_where": object()}


def think(answer):
    return f"<think>R</think><answer>{answer}</answer>"


@pytest.fixture
def scorer():
    made = scoring.Scorer()
    yield made
    made.close()


def labelled(kind, count):
    rows = [json.loads(line) for line in (DATA / "labelled_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"think": True} for row in rows if row["answer_type"] == kind]
    return rows[:: len(rows) // count]


# ---------------------------------------------------------------------------------------------------------------------
# The same scores


def test_scores_are_the_same_in_the_process_in_this_one_and_in_a_thread(scorer):
    rows = labelled("math", 60) + labelled("digit", 20) + labelled("letter", 20)
    here = [rewards.score(think(row["text"]), row) for row in rows]
    there = [scorer.score(think(row["text"]), row) for row in rows]
    in_thread = []
    thread = threading.Thread(target=lambda: in_thread.extend(scorer.score(think(row["text"]), row) for row in rows))
    thread.start()
    thread.join()
    assert there == here == in_thread
    assert sum(score["accuracy"] for score in here) > 20 and scorer.stopped == 0


def test_several_threads_take_turns(scorer):
    found = {}

    def work(number):
        record = MATH | {"answer": str(number)}
        found[number] = [scorer.score(think(n), record)["accuracy"] for n in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: [float(n == number) for n in range(20)] for number in range(8)}


def test_the_weights_of_a_scorer_are_those_of_its_scores():
    for record in (MATH, MATH | {"answer_type": "letter", "answer": "B"}):
        scorer = scoring.Scorer(format_weight=0.25, accuracy_weight=2.0)
        assert scorer.score(think(record["answer"]), record)["reward"] == 2.25
        scorer.close()


def test_only_what_computes_starts_a_process(scorer):
    letter = {"answer_type": "letter", "answer": "B", "think": True}
    assert scorer.score(think("B"), letter)["reward"] == 1.5
    assert scorer.worker is None
    assert {name for name, kind in rewards.ANSWER_TYPES.items() if kind.computes} == {"math", "digit"}
    scorer.score(think("5"), MATH)
    assert scorer.worker is not None


def test_every_answer_type_that_asks_math_answers_says_that_it_computes(monkeypatch):
    asked = set()
    examples = {"letter": "B", "digit": 12, "grid": [2, 1], "box": [1, 2, 3, 4], "point": [1, 2, 3, 4], "math": "5"}

    def watch(name, function):
        def watched(*args, **options):
            asked.add(kind)
            return function(*args, **options)

        monkeypatch.setattr(math_answers, name, watched)

    for name in ("read", "read_reply", "same_answer"):
        watch(name, getattr(math_answers, name))
    for kind in rewards.ANSWER_TYPES:
        for text in ("7 + 5 = 12", "x = 12", "B", "2 1", "(1, 2, 3, 4)", "5"):
            rewards.score(think(text), {"answer_type": kind, "answer": examples.get(kind, "red"), "think": True})
    assert asked <= {name for name, kind in rewards.ANSWER_TYPES.items() if kind.computes}


def test_hostile_replies_pass_through_the_line_unchanged(scorer):
    texts = ["\ud800", "\n\r\u2028", '"\\', "5\x00", "\U0001f600", "x" * 99_000, "5\n", ""]
    for text in texts:
        assert scorer.score(think(text), MATH) == rewards.score(think(text), MATH)
    assert scorer.score("x" * 2_000_000, MATH)["reward"] == 0.0
    assert scorer.stopped == 0


def test_replies_to_pair_are_kept_if_they_can_be_read(scorer):
    assert scorer.readable([think("5"), "5", "", "<think>so 6</think><answer>5</answer>"], MATH) != []
    assert scorer.readable([think("5"), "no"], MATH) == [think("5"), "no"]
    assert scorer.readable(["B"], {"answer_type": "letter", "answer": "B"}) == ["B"]


# ---------------------------------------------------------------------------------------------------------------------
# The process


def test_the_process_has_no_torch_and_is_in_no_process_group(monkeypatch, scorer):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    scorer.score(think("5"), MATH)
    folder = Path(f"/proc/{scorer.worker.process.pid}")
    names = {line.partition(b"=")[0].decode() for line in (folder / "environ").read_bytes().split(b"\0")}
    assert "PATH" in names
    assert not names & {"RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "CUDA_VISIBLE_DEVICES"}
    assert "libtorch" not in (folder / "maps").read_text()
    assert os.getsid(scorer.worker.process.pid) != os.getsid(0)


def test_a_process_that_somebody_killed_is_started_again_and_no_reply_loses_by_it(scorer):
    assert scorer.score(think("5"), MATH)["reward"] == 1.5
    first = scorer.worker.process
    first.kill()
    first.wait()
    assert scorer.score(think("5"), MATH)["reward"] == 1.5
    assert scorer.worker.process.pid != first.pid and scorer.stopped == 0


def test_a_forgotten_scorer_takes_its_process_with_it():
    scorer = scoring.Scorer()
    scorer.score(think("5"), MATH)
    process = scorer.worker.process
    del scorer
    assert process.wait(10) is not None


# ---------------------------------------------------------------------------------------------------------------------
# A mistake in the arithmetic, planted: "hang" never ends, "eat" takes all memory

PLANTED = """
def same_answer(gold: str, text: str) -> bool:
    while text == "x = 99":
        pass
    if text == "x = 98":
        bytes(5 * 2**30)
"""
SCRIPT = """
import os, sys, time
sys.path.insert(0, os.getcwd())
import scoring
record = {"id": "m", "answer_type": "math", "answer": "5", "think": True}
scorer = scoring.Scorer(1.0)
def score(text):
    return scorer.score(f"<think>R</think><answer>{text}</answer>", record)["reward"]
def stand():
    print(scorer.worker.process.pid if scorer.worker else None, scorer.stopped, flush=True)
"""


COUNTED = """
made = []
class Counted(scoring.Worker):
    def __init__(self, seconds):
        made.append(seconds)
        super().__init__(seconds)
scoring.Worker = Counted
"""


@pytest.fixture
def planted(tmp_path):
    """A folder with a copy of what scores, and mathematics that hangs on "x = 99"."""
    for name in ("scoring", "judge", "claims", "rewards", "math_answers", "expressions"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    for path in ROOT.glob("repl*.py"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / "math_answers.py").read_text()
    head = "def same_answer(gold: str, text: str) -> bool:\n"
    assert text.count(head) == 1
    (tmp_path / "math_answers.py").write_text(text.replace(head, PLANTED.lstrip()))
    return tmp_path


def start(folder, script):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + script], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_a_reply_that_hangs_or_eats_memory_earns_nothing_is_counted_and_the_next_one_is_scored(planted):
    script = COUNTED + 'print(score("x = 99"), len(made), score("5"), score("x = 98"), score("5"), scorer.stopped)'
    out, errors = start(planted, script).communicate(timeout=60)
    assert out == "0.0 1 1.5 0.0 1.5 2\n"  # what hangs is not asked again
    assert "a reply to record 'm' was stopped and earns 0; 1 so far" in errors
    assert errors.count("so far") == 2


def gone(pid, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state = Path(f"/proc/{pid}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "hanging"])
def test_the_process_ends_with_its_parent_even_if_that_is_killed(planted, busy):
    script = 'score("5"); stand(); scorer.worker.seconds = 1000; score("x = 99") if BUSY else time.sleep(1000)'
    parent = start(planted, script.replace("BUSY", str(busy)))
    pid = int(parent.stdout.readline().split()[0])
    time.sleep(0.5)
    assert not gone(pid, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    try:
        assert gone(pid, 20)
    finally:
        if not gone(pid, 0):
            os.kill(pid, signal.SIGKILL)


def test_the_process_ends_when_the_program_does(planted):
    parent = start(planted, 'score("5"); stand()')
    out, errors = parent.communicate(timeout=60)
    assert errors == ""
    assert gone(int(out.split()[0]), 5)


def test_a_process_whose_parent_ends_while_it_starts_says_nothing():
    ours, theirs = socket.socketpair()
    ours.close()
    script = Path(scoring.__file__)
    done = subprocess.run([sys.executable, script, str(os.getpid()), "5"], stdin=theirs, stdout=theirs,
                          stderr=subprocess.PIPE, text=True, timeout=120)  # fmt: skip
    theirs.close()
    assert (done.returncode, done.stderr) == (0, "")
