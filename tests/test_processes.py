"""processes.py: a lost rank is named, ranks end with their launcher, and a stage says how it ended."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from commands import ROOT, end, environment, start

RANKS = """
import json, os, signal, sys, time
from pathlib import Path
import processes
processes.BEAT, processes.SILENT, processes.GRACE = 0.2, 1.5, 5.0
out, what, timeout = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def main():
    world = processes.setup(timeout)
    (out / f"pid{world.rank}").write_text(str(os.getpid()))
    world.barrier()
    world.at("after sample")
    if what == "wait":
        time.sleep(600)
    if world.rank == 1:
        if what == "stop":
            time.sleep(0.6)  # long enough to be heard in this phase
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "late":
            time.sleep(600)
    print(world.sum(1.0), flush=True)

processes.run(main)
"""


def torchrun(tmp_path, what, timeout):
    (tmp_path / "ranks.py").write_text(RANKS)
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "ranks.py", tmp_path,
                 what, timeout)  # fmt: skip


def pids(tmp_path):
    deadline = time.monotonic() + 120
    while len(found := list(tmp_path.glob("pid?"))) < 2 or not all(path.read_text() for path in found):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.05)
    return [int(path.read_text()) for path in sorted(found)]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stopped_rank_is_named_with_its_phase_and_ends_the_run(tmp_path):
    process = torchrun(tmp_path, "stop", 4)
    waiting, stopped = pids(tmp_path)
    deadline = time.monotonic() + 60
    while alive(waiting) and time.monotonic() < deadline:
        time.sleep(0.1)
    # torchrun would wait 30 seconds for a stopped process to heed its SIGTERM.
    os.kill(stopped, signal.SIGKILL)
    _, _, err = end(process)
    named = r"rank 1 \(phase after sample, silent for \d+ s\)"
    assert re.search(named + " gives no sign of life: its process is stopped or its machine is gone", err)
    assert "The others wait; after --timeout 4 s the run ends" in err
    # Whichever comes first: nothing heard of it for so long, or waited for so long.
    assert re.search(f"error: .*{named}.*; all ranks end, --resume goes on from the last checkpoint", err)
    assert "Traceback (most recent call last)" not in err.split("error: ")[0]


def test_a_rank_that_does_not_come_is_named_by_those_who_wait(tmp_path):
    process = torchrun(tmp_path, "late", 3)
    pids(tmp_path)
    _, _, err = end(process)
    assert "error: rank 0 has waited 3 s (--timeout) for rank 1 (phase after sample); all ranks end" in err


def test_ranks_that_all_come_are_let_alone(tmp_path):
    status, out, err = end(torchrun(tmp_path, "none", 3))
    assert (status, out.count("[2.0]")) == (0, 2) and "error" not in err


def test_ranks_end_when_their_launcher_is_gone(tmp_path):
    process = torchrun(tmp_path, "wait", 0)
    ranks = pids(tmp_path)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, ranks))


STAGE = """
import signal, sys, time
import processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run behind an & of a shell, which ignores it
def main():
    try:
        signal.raise_signal(getattr(signal, sys.argv[1]))
    finally:
        print("cleaned up", flush=True)
processes.run(main)
"""


@pytest.mark.parametrize("name, status, said", [("SIGTERM", 143, "terminated\n"), ("SIGINT", 130, "stopped\n")])
def test_a_signal_before_there_is_anything_to_save_ends_with_one_line_and_its_own_status(name, status, said):
    done = subprocess.run([sys.executable, "-c", STAGE, name], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "cleaned up\n", said)


def test_what_no_input_is_to_blame_for_is_one_line_too():
    code = "import processes\ndef main():\n    raise processes.StageError('no\\nmore')\nprocesses.run(main)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (1, "error: no more\n")


def test_a_full_disk_is_one_line():
    full = "OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), 'log.jsonl')"
    code = f"import errno, os, processes\ndef main():\n    raise {full}\n"
    done = subprocess.run([sys.executable, "-c", code + "processes.run(main)"], env=environment(), capture_output=True,
                          text=True)  # fmt: skip
    said = "error: [Errno 28] No space left on device: 'log.jsonl'; make room, then go on with --resume\n"
    assert (done.returncode, done.stderr) == (1, said)
