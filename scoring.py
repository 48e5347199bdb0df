r"""Scores replies under a hard limit: what computes is done in a process of its own, which can be killed.

    scorer = Scorer(format_weight=0.5)
    scorer.score(reply, record)      what rewards.score returns
    scorer.score_groups(records, …)  the same for a whole batch; a judge may then be asked about short free answers
    scorer.stopped                   replies that took longer than the limit; each earns 0

rewards.py is bounded by construction, so the limit should never be met. It is the second line of defence: a mistake in
the arithmetic below costs one reply its reward and not a run its step. Only records whose answer type computes (see
AnswerType.computes) use the process; it is started when the first of them comes.

The process is `python scoring.py`, a program of its own: it imports no torch, sees nothing of the process group, and
opens no file. It ends when its parent does: at the end of its input, or as soon as it has another parent. Both talk in
lines of JSON, so nothing that is sent is ever executed.
"""

import json
import os
import re
import resource
import select
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import judge
import rewards

JUDGED = "text"  # the answer type of short free answers, which no rule compares well
MEMORY = 4 * 2**30  # bytes that the process may have
START = 120.0  # seconds in which it must have imported rewards.py, on a slow disk too
# What torchrun says to the members of its group, and how they find their GPU
GROUP = re.compile(r"(?:LOCAL_|GROUP_|ROLE_)?(?:RANK|WORLD_SIZE)|MASTER_(?:ADDR|PORT)|(?:TORCH|NCCL|CUDA).*")


# ---------------------------------------------------------------------------------------------------------------------
# What is done with a reply. The process and the caller run the same functions.


def score_reply(reply: str, record: dict, options: dict) -> dict[str, Any]:
    return rewards.score(reply, record, **options)


def read_in_every_way(reply: str, record: dict, options: dict) -> bool:
    """All that distill.py asks of a reply: its answer, read strictly and not, and what its reasoning ends in."""
    score = rewards.score(reply, record)
    judge.find_answer(reply, record)
    parts = rewards.read_reply(reply, rewards.reply_format(record))
    if parts is not None:
        judge.contradicts(parts[0], score["answer"], record)
    return True


TASKS = {"score": score_reply, "read": read_in_every_way}
# What is said of a reply that takes too long
STOPPED = {
    "score": {"reward": 0.0, "accuracy": 0.0, "format": 0.0, "answer": None},
    "read": False,
}


# ---------------------------------------------------------------------------------------------------------------------
# The caller


def child_environment() -> dict[str, str]:
    """The environment of a child that must not join this process group, nor touch its GPU."""
    kept = {}
    for name, value in os.environ.items():
        if not GROUP.fullmatch(name):
            kept[name] = value
    return kept


class Worker:
    """One process and the line to it. OSError (a TimeoutError, too) if it does not answer; it must then be closed."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.line, theirs = socket.socketpair()
        self.received = b""
        command = [sys.executable, str(Path(__file__).resolve()), str(os.getpid()), str(seconds)]
        # A session of its own: Ctrl-C in the terminal is for the stage, which then closes the line.
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, env=child_environment(), start_new_session=True
        )
        theirs.close()
        # Also when the scorer is forgotten and when the program ends.
        self.close = weakref.finalize(self, end_process, self.process, self.line, os.getpid())
        self.receive(time.monotonic() + START)

    def ask(self, request: list) -> Any:
        """The answer to a request, written and read within the limit."""
        until = time.monotonic() + self.seconds
        self.line.settimeout(self.seconds)
        self.line.sendall(json.dumps(request).encode() + b"\n")
        return self.receive(until)

    def receive(self, until: float) -> Any:
        while b"\n" not in self.received:
            self.line.settimeout(max(1e-3, until - time.monotonic()))
            part = self.line.recv(2**16)
            if not part:
                raise ConnectionError("the process has ended")
            self.received += part
        answer, _, self.received = self.received.partition(b"\n")
        return json.loads(answer)


def end_process(process: subprocess.Popen, line: socket.socket, owner: int) -> None:
    line.close()
    if os.getpid() == owner:  # a fork of the owner holds a copy of all this
        process.kill()
        process.wait()


class Scorer:
    """Scores replies; a reply that takes longer than `seconds` earns 0 and is counted.

    options: keyword arguments of rewards.score. judge: a judge.Judge that is asked where a rule cannot know; None:
    nobody. May be used from several threads: they take turns.
    """

    def __init__(self, seconds: float = 5.0, judge: judge.Judge | None = None, **options):
        self.seconds, self.judge, self.options = seconds, judge, options
        self.stopped = 0
        self.worker: Worker | None = None
        self.turn = threading.Lock()

    def score(self, reply: str, record: dict, progress: float = 0.0) -> dict[str, Any]:
        """What rewards.score returns. progress: step / steps of the run."""
        return self.do("score", reply, record, self.options | {"progress": progress})

    def score_groups(self, records: list[dict], groups: list[list[str]], progress: float = 0.0) -> list[list[dict]]:
        """What `score` returns for every reply, [record][reply], and where the judge was asked "judged": its verdict.

        Asked are short free answers that were read and that the rule finds different from the gold, all at once. A yes
        makes the answer right; no verdict (None) is a no. What the rule finds right is not asked about.
        """
        scores = []
        for record, group in zip(records, groups, strict=True):
            scores.append([self.score(text, record, progress) for text in group])
        if self.judge is not None:
            self.ask_judge(records, scores)
        return scores

    def ask_judge(self, records: list[dict], scores: list[list[dict]]) -> None:
        open_ones = []
        for record, group in zip(records, scores, strict=True):
            if record["answer_type"] == JUDGED:
                open_ones += [(record, score) for score in group if score["format"] and not score["accuracy"]]
        verdicts = judge.same_answers(self.judge, [(record, score["answer"]) for record, score in open_ones])
        for (_, score), verdict in zip(open_ones, verdicts, strict=True):
            score["judged"] = verdict
            if verdict:
                score["accuracy"] = 1.0
                score["reward"] += self.options.get("accuracy_weight", 1.0)

    def readable(self, replies: list[str], record: dict) -> list[str]:
        """Those replies that can be read in every way within the limit."""
        return [reply for reply in replies if self.do("read", reply, record, {})]

    def do(self, task: str, reply: str, record: dict, options: dict) -> Any:
        if not rewards.type_of(record).computes:
            return TASKS[task](reply, record, options)
        # Paths and notes of ours stay here; the rest of a record is JSON.
        sent = {name: value for name, value in record.items() if name != "images" and not name.startswith("_")}
        request = [task, reply, sent, options]
        with self.turn:
            # A process that somebody else ended is started again: its end says nothing of this reply.
            for _ in range(2):
                self.worker = self.worker or Worker(self.seconds)
                try:
                    return self.worker.ask(request)
                except TimeoutError:
                    self.close()
                    break
                except OSError:
                    self.close()
            self.stopped += 1
        message = f"scoring: a reply to record {record.get('id')!r} was stopped and earns 0; {self.stopped} so far"
        print(message, file=sys.stderr)
        return STOPPED[task]

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
            self.worker = None


def judge_metrics(world, scores: list[list[dict]]) -> dict[str, int]:
    """How often a judge was asked about a batch, said yes, and could not be read: counts over all processes."""
    said = [score["judged"] for group in scores for score in group if "judged" in score]
    counts = world.sum(len(said), said.count(True), said.count(None))
    return {name: int(count) for name, count in zip(("judge_asked", "judge_yes", "judge_unread"), counts, strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The process


def wait_for_input(parent: int) -> None:
    """Returns when something can be read; ends the process if its parent is gone."""
    while not select.select([0], [], [], 2.0)[0]:
        # Another child of the parent may hold the other end of the line, which then never closes.
        if os.getppid() != parent:
            sys.exit()


def limit_processor(seconds: float) -> None:
    """The system ends this process after so many seconds of computing from now, even if its parent is gone."""
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    soft = int(time.process_time() + seconds) + 2  # whole seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def serve(parent: int, seconds: float) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, answers = os.fdopen(0, "rb"), os.fdopen(1, "wb")

    def answer(value: Any) -> None:
        answers.write(json.dumps(value).encode() + b"\n")
        answers.flush()

    answer("ready")
    while True:
        # Requests come one at a time, so nothing of the next is in the buffer yet.
        wait_for_input(parent)
        line = requests.readline()
        if not line:
            return
        limit_processor(seconds)
        task, reply, record, options = json.loads(line)
        answer(TASKS[task](reply, record, options))


if __name__ == "__main__":
    try:
        serve(int(sys.argv[1]), float(sys.argv[2]))
    except ConnectionError:
        # The stage has ended. Its terminal is no place for a traceback, nor for that of the last flush.
        os._exit(0)
