"""Processes: one or many, how they find each other, how they notice that one is gone, and how a stage ends.

    World       rank, size, device; sums over ranks
    setup       join torchrun's process group, and start the watchdog
    Watchdog    names the rank that has stopped, ends the run when it does not come back
    run         a stage's main() with its exit status: 0 done, 2 bad input, 130 and 143 stopped, 1 anything else
"""

import errno
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from files import DataError, StageError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # the disk, the user's share of it, the largest file


class Terminated(BaseException):
    """SIGTERM came where there is no checkpoint to write. No Exception: nothing on the way may catch it."""


# ---------------------------------------------------------------------------------------------------------------------
# The world


@dataclass(frozen=True)
class World:
    """Where this process stands: rank of size, its device. One process without torchrun is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device
    watchdog: "Watchdog | None" = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    def at(self, phase: str) -> None:
        """Tell the other ranks' watchdogs where this one is."""
        if self.watchdog:
            self.watchdog.phase = phase

    @contextmanager
    def _waiting(self):
        """Around every collective: until it returns, this rank waits for the others."""
        if self.watchdog:
            self.watchdog.waiting_since = time.monotonic()
        try:
            yield
        finally:
            if self.watchdog:
                self.watchdog.waiting_since = None

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over all ranks: floats in, floats out."""
        if self.size == 1:
            return [float(value) for value in values]
        # fp64: counts of tokens must stay exact.
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        with self._waiting():
            dist.all_reduce(tensor)
            return tensor.tolist()

    def gather(self, thing) -> list:
        """A list with every rank's `thing` (picklable, between our own processes only), on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        with self._waiting():
            dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        if self.size > 1:
            with self._waiting():
                dist.barrier()


def setup(timeout: float = 0.0) -> World:
    """Join the process group torchrun started, if any, and choose the device: CUDA when there, else CPU.

    timeout: seconds that ranks wait for one that gives no sign of life or does not come; then all end. 0: for ever.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    watchdog = None
    if size > 1 and not dist.is_initialized():
        end_with_launcher()
        # gloo beside nccl: objects and checkpoints travel through main memory. Collectives wait at least as long as
        # the watchdog, which can say more about a lost rank than they can.
        patience = timedelta(seconds=max(2 * timeout, 1800))
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)
        watchdog = Watchdog(dist.get_rank(), size, timeout)
        watchdog.start()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank() if size > 1 else 0, size, device, watchdog)


def child_environment() -> dict:
    """The environment for a child process that must not join this process group."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    others = {key: value for key, value in os.environ.items() if key not in ours}
    return {key: value for key, value in others.items() if not key.startswith("TORCHELASTIC")}


GRACE = 60.0  # seconds that a rank whose launcher is gone may take to end its step and save a checkpoint


def end_with_launcher() -> None:
    """Ask this process to stop (SIGTERM to itself) when the process that started it has gone.

    Otherwise the ranks of a killed torchrun train on, and write beside the run that takes their place.
    """
    launcher = os.getppid()

    def watch():
        while os.getppid() == launcher:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


# ---------------------------------------------------------------------------------------------------------------------
# The watchdog


BEAT = 2.0  # seconds between two signs of life
SILENT = 15.0  # seconds without one, after which a rank is named


class Watchdog(threading.Thread):
    """A thread in every rank that tells the others it lives, and listens to them.

    Signs of life go through a store, not through the process group: that is where the others are stuck. A rank can be
    lost in two ways. Its process is stopped or its machine is gone: its signs of life end, and it is named after SILENT
    seconds. Or it lives and does not come to where the others wait. Both end the run after `timeout` seconds.

    phase (what the main thread is doing) and waiting_since (when it began to wait for the others) are set by World.
    """

    def __init__(self, rank: int, size: int, timeout: float):
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.size, self.timeout = rank, size, timeout
        # torchrun's store lives in the launcher, so it outlives a stopped rank. A connection of our own: the process
        # group may hold its connection for as long as it waits.
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.store.set_timeout(timedelta(seconds=30))
        self.phase, self.waiting_since = "start", None
        self.keys = [f"watchdog/{other}" for other in range(size)]
        self.signs = [None] * size  # what each rank said last
        self.heard = [time.monotonic()] * size  # when that was new
        self.named = set()  # ranks whose silence has been told

    def run(self):
        beat, reached = 0, time.monotonic()
        while True:
            beat += 1
            sign = {"beat": beat, "phase": self.phase, "waits": self.waiting_since is not None}
            try:
                self.store.set(self.keys[self.rank], json.dumps(sign))
                # Before all have come this far, asking for their signs would wait for them.
                if self.store.check(self.keys):
                    self.listen([json.loads(text) for text in self.store.multi_get(self.keys)])
                reached = time.monotonic()
            except RuntimeError:
                # The launcher is gone (end_with_launcher knows), or the network between it and this rank.
                if self.timeout and time.monotonic() - reached > self.timeout:
                    self.end(f"rank {self.rank} cannot reach the launcher since {self.timeout:g} s (--timeout)")
            time.sleep(BEAT)

    def listen(self, signs: list[dict]) -> None:
        """Compare every rank's sign with its last one: name who is silent, end when it has lasted too long."""
        now = time.monotonic()
        for other, sign in enumerate(signs):
            if sign != self.signs[other]:
                self.signs[other], self.heard[other] = sign, now
                self.named.discard(other)
        silence = [now - when for when in self.heard]
        alive = [other for other in range(self.size) if silence[other] <= SILENT]
        speaks = self.rank == min(alive, default=self.rank)  # one of them tells, not all

        for other in range(self.size):
            if silence[other] > SILENT and other not in self.named:
                self.named.add(other)
                if speaks:
                    say(f"{self.describe(other)} gives no sign of life: its process is stopped or its machine is "
                        f"gone. The others wait{self.until()}")  # fmt: skip
        if not self.timeout:
            return
        lost = [other for other in range(self.size) if silence[other] > self.timeout]
        if lost:
            names = " and ".join(self.describe(other) for other in lost)
            self.end(f"{names}: no sign of life for {self.timeout:g} s (--timeout)", speaks)
        since = self.waiting_since
        if since is not None and now - since > self.timeout:
            late = [other for other in range(self.size) if not signs[other]["waits"]]
            names = " and ".join(self.describe(other) for other in late) or "nobody, a collective hangs"
            self.end(f"rank {self.rank} has waited {self.timeout:g} s (--timeout) for {names}")

    def describe(self, other: int) -> str:
        sign = self.signs[other]
        silence = time.monotonic() - self.heard[other]
        silent = f", silent for {silence:.0f} s" if silence > SILENT else ""
        return f"rank {other} (phase {sign['phase'] if sign else 'start'}{silent})"

    def until(self) -> str:
        return f"; after --timeout {self.timeout:g} s the run ends" if self.timeout else ""

    def end(self, why: str, speaks: bool = True) -> None:
        if speaks:
            say(f"error: {why}; all ranks end, --resume goes on from the last checkpoint")
        os._exit(1)


def say(text: str) -> None:
    # The progress bar may stand on this line.
    print(f"\n{text}", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The end of a stage


def run(main: Callable[[], None]) -> None:
    """Run a stage's main() and turn its end into an exit status.

    0 done, 2 bad input (one line), 130 stopped by Ctrl-C or after the checkpoint a signal asked for, 143 stopped by
    SIGTERM where there was nothing to save, 1 anything else.
    """
    status, message = 0, None
    # From here on, and until a run directory takes over: SIGTERM ends the stage as Ctrl-C does, children and files too.
    signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except BaseException as error:
        # First of all: torchrun ends the other ranks when one fails, while they are still saying why they do.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if isinstance(error, SystemExit):
            raise
        status, message = last_words(error, int(os.environ.get("RANK", "0")) == 0)

    # Not above: there main's frame still lives, and with it a progress bar that has not ended its line.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end has begun
    if message:
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        # Wait neither for ranks in a collective nor for gloo's threads, which may abort at shutdown.
        os._exit(status)
    sys.exit(status)


def last_words(error: BaseException, first_rank: bool) -> tuple[int, str | None]:
    """(exit status, what to print) for whatever ended a stage. What all ranks know, the first one says."""
    if isinstance(error, DataError | StageError):
        status = 2 if isinstance(error, DataError) else 1
        if first_rank:
            return status, f"error: {one_line(error)}"
        # Mostly rank 0 says the same, and torchrun ends this process before it can repeat it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(3)
        return status, f"\nerror: {one_line(error)}"  # rank 0's progress bar may stand on this line
    if isinstance(error, OSError) and error.errno in FULL:
        # A log or a result could not be written, wherever that was.
        return 1, f"error: {one_line(error)}; make room, then go on with --resume"
    if isinstance(error, KeyboardInterrupt):
        return 130, (str(error) or "stopped") if first_rank else None
    if isinstance(error, Terminated):
        return 128 + signal.SIGTERM, (str(error) or "terminated") if first_rank else None
    # In one piece: print_exception writes line by line, and the processes of a run write to one screen.
    return 1, "".join(traceback.format_exception(error)).rstrip()


def terminate(number, frame):
    raise Terminated


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
