"""Breaks real runs at random moments, resumes them, and compares what they end as with runs that nobody disturbed.

    python tests/chaos.py --kills 200 --log bench/results/chaos.jsonl    # until 200 processes were killed
    python tests/chaos.py --seed 3 --only 17                             # the same fault again, alone
    python tests/chaos.py --short                                        # six faults of different kinds

A fault is a signal (to one rank, to the launcher, to all), a damaged file, a full disk, changed data, or a second
process in the same directory. After it the run is resumed, at times by another number of processes, until it ends. Then
its weights, log and samples must be those of the undisturbed run: to the bit if the number of processes never changed.
Where refusal is the right answer, it must be one line, and nothing in the directory may have changed. No process may be
left behind. The log has one JSON line a fault. Exit status 1 if one was not survived.

Starting Python and importing torch takes seconds, so this process imports everything once and forks: a stage of one
process is a fork, and so are torchrun (its own code, with its own handling of signals) and the ranks it starts. What is
killed are real processes with real files; only exec is left out. With --vllm-python the runs with vLLM are started as
commands of that Python.
"""

import argparse
import contextlib
import ctypes
import importlib
import itertools
import json
import multiprocessing.util
import os
import random
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.run
from commands import ROOT, Material, environment, flags, rows, timeless, weights, write
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

PATIENCE = 300  # seconds until a run counts as hanging
LINGER = 90  # seconds that ranks have to end after their launcher (processes.GRACE is 60)
STEPS = 12
DISK = 20 * 2**20  # bytes of the small disk
NEEDED = 12 * 2**20  # a little less than a run needs
LARGEST = 4 * 2**20  # a little less than its largest file
SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of prctl: orphans become children of this process, so that none is overlooked

SETTINGS = {
    "dpo": {"steps": STEPS, "save_every": 3, "schedule": "linear", "warmup": 4},
    "grpo": {"steps": STEPS, "save_every": 3, "schedule": "linear", "kl": 0.04, "updates": 2},
    "eval": {"samples": 4, "temperature": 1.0, "max_new_tokens": 24, "batch": 1},
    "distill": {"samples": 4, "max_new_tokens": 24, "batch": 1, "coupled": True, "judge": "none"},
    "jigsaw": {"scenes": 60, "count": 60, "seed": 1},
}
TRAINERS = ("dpo", "grpo")

# ---------------------------------------------------------------------------------------------------------------------
# Processes: forks that behave like commands


def become(stage: str, argv: list[str]) -> None:
    """Be `python STAGE.py ARGV…` (or torchrun) from here on, in a forked process. Never returns."""
    status = 1
    try:
        # What exec would have reset.
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.closerange(3, 4096)
        os.chdir(ROOT)
        sys.argv = [f"{stage}.py", *argv]
        if stage == "torchrun":
            subprocess_handler.Popen = ForkedRank
            torch.distributed.run.main(argv)
            status = 0
        else:
            runpy.run_path(str(ROOT / f"{stage}.py"), run_name="__main__")
            status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        multiprocessing.util._exit_function()
        threading._shutdown()
        os._exit(status)


class ForkedRank(subprocess.Popen):
    """What torchrun takes for `python -u STAGE.py ARGV…` in a session of its own: a fork of torchrun."""

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *others):
        # Python runs functions before and after a fork, and in them torchrun's handlers may not raise; around fork and
        # exec there are none.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.clear()
            os.environ.update(env)
            script = next(place for place, word in enumerate(args) if word.endswith(".py"))
            become(Path(args[script]).stem, list(args[script + 1 :]))
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
        self._child_created = True


STATUSES = {}  # process id -> wait status of every child that has ended


def reap() -> None:
    """Take note of all children that have ended, orphans of killed launchers among them."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            STATUSES[pid] = status


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def descendants(pid: int) -> list[int]:
    found = children(pid)
    return found + [further for child in found for further in descendants(child)]


def kill_descendants() -> None:
    for pid in descendants(os.getpid()):
        send(pid, signal.SIGKILL)


def send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Start:
    """One start of a stage: its first process (torchrun for more than one rank) and what it prints."""

    def __init__(self, command: "Command", folder: Path, world: int, limit: int = 0, **more):
        self.began = time.monotonic()
        self.world, self.printed = world, folder / f"printed-{len(list(folder.glob('printed-*')))}.txt"
        argv = command.flags(world, **more)
        stage = command.stage
        if world > 1:
            argv = ["--standalone", f"--nproc_per_node={world}", str(ROOT / f"{stage}.py"), *argv]
            stage = "torchrun"
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.clear()
            os.environ.update(environment())
            output = os.open(self.printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            for stream in (1, 2):
                os.dup2(output, stream)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            if limit:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            if command.python:
                script = ["-m", "torch.distributed.run"] if world > 1 else [str(ROOT / f"{stage}.py")]
                os.execv(command.python, [command.python, *script, *argv])
            become(stage, argv)

    def ended(self) -> bool:
        reap()
        return self.pid in STATUSES

    def status(self) -> int:
        """Exit status, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(STATUSES[self.pid])

    def ranks(self) -> list[int]:
        return [self.pid] if self.world == 1 else children(self.pid)

    def wait(self) -> None:
        """Until it has ended and nothing of it lives. TimeoutError if it hangs, or if it leaves processes behind."""
        deadline, ended = time.monotonic() + PATIENCE, None
        while not self.ended() or children(os.getpid()):
            if self.ended() and ended is None:
                ended = time.monotonic()
                deadline = ended + LINGER
            if time.monotonic() > deadline:
                left = descendants(os.getpid())
                for pid in left:
                    send(pid, signal.SIGKILL)
                time.sleep(1)
                reap()
                what = f"left behind for {LINGER} s" if ended else f"not ended in {PATIENCE} s"
                raise TimeoutError(f"{len(left)} processes {what}: {self.said()[-400:]}")
            time.sleep(0.01)

    def said(self) -> str:
        return self.printed.read_text(errors="replace")

    def error_lines(self) -> list[str]:
        return [line for line in self.said().replace("\r", "\n").split("\n") if line.startswith("error: ")]


# ---------------------------------------------------------------------------------------------------------------------
# Runs: commands, their undisturbed ends, and what makes two ends equal


@dataclass
class Command:
    """A stage with its flags. resumes: it knows --resume; without it, a killed job starts again from nothing."""

    stage: str
    out: Path
    settings: dict
    resumes: bool = True
    python: str = ""  # an interpreter of its own, for vLLM

    def flags(self, world: int, resume: bool = False) -> list[str]:
        return flags(out=self.out, resume=resume and self.resumes, **self.settings)

    def place(self) -> Path:
        """Where its progress is kept."""
        return self.out if self.stage in (*TRAINERS, "jigsaw") else self.out.with_name(self.out.name + ".partial")


class Laboratory:
    """Material, undisturbed runs (made when they are first needed), and the folder in which faults happen."""

    def __init__(self, folder: Path, material: Path, vllm_python: str = ""):
        self.folder, self.vllm_python = folder, vllm_python
        folder.mkdir(parents=True, exist_ok=True)
        # In a child: what trains has threads, and a process with threads must not be forked.
        if not (material / "done").exists():
            in_a_child(lambda: Material(material))
        self.material = Material(material)
        # Mathematics is scored by a process of its own, which must end with its rank.
        sums = [Material.question(f"m{n}", f"1 + {n}?", answer=str(n + 1), answer_type="math") for n in range(2)]
        self.mixed = write(material / f"mixed-{os.getpid()}.jsonl", self.material.records + sums)
        self.references = {}  # (stage, world) -> Reference

    def command(self, stage: str, folder: Path, data: Path | None = None) -> Command:
        material = self.material
        python = self.vllm_python if stage == "vllm" else ""
        real = "grpo" if stage == "vllm" else stage
        settings = dict(SETTINGS[real])
        if real in TRAINERS:
            settings = getattr(material, real)(**settings)
        elif real == "eval":
            settings |= {"model": material.speaker}
        elif real == "distill":
            settings |= {"policy": material.speaker, "base": material.tiny, "data": material.data}
        if stage == "vllm":
            settings |= {"sampler": "vllm", "steps": 4, "save_every": 1}
        if real in ("grpo", "eval"):
            settings["data"] = self.mixed
        if data:
            settings["data"] = data
        # Beside the data: results name pictures relative to their own folder.
        out = folder / {"eval": "result.json", "distill": "pairs.jsonl"}.get(real, "run")
        resumes = real != "jigsaw" and (real in TRAINERS or (ROOT / "journal.py").exists())
        return Command(real, out, settings, resumes, python)

    def reference(self, stage: str, world: int) -> "Reference":
        if (stage, world) not in self.references:
            self.references[stage, world] = self.undisturbed(stage, world)
        return self.references[stage, world]

    def undisturbed(self, stage: str, world: int) -> "Reference":
        folder = self.folder / f"whole-{stage}-{world}"
        folder.mkdir()
        command = self.command(stage, folder)
        start = Start(command, folder, world)
        times = []
        while not start.ended():
            while len(rows(command.out)) > len(times):
                times.append(time.monotonic() - start.began)
            time.sleep(0.005)
        seconds = time.monotonic() - start.began
        start.wait()
        if start.status() != 0:
            raise RuntimeError(f"{stage} on {world} ranks failed undisturbed:\n{start.said()[-3000:]}")
        return Reference(command.out, seconds, times)


@dataclass
class Reference:
    out: Path
    seconds: float  # from start to end
    times: list[float]  # of each row in its log, since the start


def in_a_child(work) -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        # Progress bars; a traceback is printed below.
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        try:
            work()
            status = 0
        except BaseException:
            sys.stderr = sys.__stderr__
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the material could not be made")


def import_what_a_run_imports(laboratory: Laboratory) -> None:
    """Import here what a stage imports while it runs: every fork has it then."""
    names = laboratory.folder / "modules.json"

    def work():
        from commands import call

        for stage in ("dpo", "grpo"):
            command = laboratory.command(stage, laboratory.folder / f"first-{stage}")
            call(stage, out=command.out, **command.settings | {"steps": 1})
        names.write_text(json.dumps(sorted(sys.modules)))

    in_a_child(work)
    for name in json.loads(names.read_text()):
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def difference(stage: str, out: Path, whole: Path, exact: bool, whole_log: bool = True) -> str:
    """In what a run's end differs from the undisturbed one, "" if in nothing.

    exact: to the bit; else within 1e-5, where another number of ranks adds in another order.
    whole_log: every step must be in the log; else those that are must be right.
    """
    if stage == "jigsaw":
        return different_files(out, whole)
    if stage == "eval":
        return "" if result_of(out) == result_of(whole) else "other results"
    if stage == "distill":
        return "" if out.read_bytes() == whole.read_bytes() else "other pairs"
    log, expected = timeless(out), timeless(whole)
    if not whole_log:
        present = {row["step"] for row in log}
        expected = [row for row in expected if row["step"] in present]
    if (out / "LATEST").read_text() != (whole / "LATEST").read_text():
        return f"LATEST is {(out / 'LATEST').read_text()}"
    leftovers = [path.name for path in out.rglob("*.partial")]
    if leftovers:
        return f"{leftovers[0]} is left"
    if whole_log and (out / "samples.jsonl").read_text() != (whole / "samples.jsonl").read_text():
        return "other samples"
    if not exact:
        return unequal_numbers(log, expected) or far_weights(out, whole)
    if log != expected:
        return "another log"
    if (out / "model.safetensors").read_bytes() != (whole / "model.safetensors").read_bytes():
        return "other weights"
    return ""


def different_files(out: Path, whole: Path) -> str:
    names = {path.relative_to(whole) for path in whole.rglob("*") if path.is_file()}
    found = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    for name in sorted(names ^ found):
        return f"{name} is {'missing' if name in names else 'left'}"
    for name in sorted(names):
        if (out / name).read_bytes() != (whole / name).read_bytes():
            return f"another {name}"
    return ""


def result_of(path: Path) -> dict:
    result = json.loads(path.read_text())
    result["args"] = {key: value for key, value in result["args"].items() if key not in ("out", "resume")}
    return result


def unequal_numbers(log: list[dict], expected: list[dict]) -> str:
    if [row["step"] for row in log] != [row["step"] for row in expected]:
        return "another log"
    for row, wanted in zip(log, expected, strict=True):
        for key, value in wanted.items():
            # Two ways to compute the same number; what counts is how far they are apart.
            if not isinstance(value, int | float) or key in ("sampler_gap", "preference_accuracy"):
                continue
            if abs(row[key] - value) > 1e-5 * max(abs(value), 1.0):
                return f"step {row['step']}: {key} is {row[key]}, not {value}"
    return ""


def far_weights(out: Path, whole: Path) -> str:
    # All weights together: where a gradient is nearly 0, AdamW turns the rounding of its sum into a step of a single
    # weight, which may be large beside that weight.
    found, wanted = weights(out), weights(whole)
    apart = sum((found[name] - wanted[name]).square().sum().item() for name in wanted)
    size = sum(weight.square().sum().item() for weight in wanted.values())
    far = (apart / size) ** 0.5
    return "" if far < 1e-5 else f"weights are {far:.1e} apart"


# ---------------------------------------------------------------------------------------------------------------------
# Faults


KILLS = ("SIGKILL launcher", "SIGKILL rank", "SIGKILL all")
WISHES = tuple(f"{name} {whom}" for name in ("SIGTERM", "SIGINT", "SIGUSR1") for whom in ("launcher", "rank", "all"))
TWICE = ("SIGTERM+SIGTERM all", "SIGTERM+SIGINT launcher", "SIGINT+SIGINT all", "SIGUSR1+SIGTERM rank")
PAUSES = ("SIGSTOP+SIGCONT rank", "SIGSTOP+SIGCONT all")
DAMAGE = ("bit flipped", "file truncated", "LATEST emptied", "args.json damaged", "log cut")
PLACES = ("disk full", "two processes", "data changed")
SHORT = (
    ("dpo", 1, "SIGKILL all"), ("grpo", 1, "SIGTERM+SIGTERM all"), ("dpo", 1, "bit flipped"), ("dpo", 1, "disk full"),
    ("dpo", 1, "two processes"), ("dpo", 2, "SIGKILL rank"),
)  # fmt: skip


def cases(vllm: bool) -> list[tuple[str, int, str]]:
    """Every (stage, number of processes, fault) that makes sense."""
    found = []
    for stage, world in itertools.product(("dpo", "grpo", "eval", "distill"), (1, 2, 4)):
        # Most of all kills, as a scheduler and a kernel without memory do it.
        kinds = 2 * KILLS + WISHES + TWICE + PAUSES
        if stage in TRAINERS:
            kinds += DAMAGE + PLACES
        elif (ROOT / "journal.py").exists():
            kinds += ("data changed",)
        # With one process, all and the launcher are the same.
        found += [(stage, world, kind) for kind in kinds if world > 1 or not kind.endswith(("rank", "launcher"))]
    found += [("jigsaw", 1, kind) for kind in ("SIGKILL all", "SIGTERM all", "SIGINT all", "SIGSTOP+SIGCONT all")]
    if vllm:
        found += [("vllm", world, kind) for world in (1, 2) for kind in (*KILLS, "SIGTERM all")]
    return found


@dataclass
class Fault:
    """One line of the log; the same seed and number give the same fault."""

    seed: int
    number: int
    stage: str
    world: int
    fault: str
    then: int  # processes that resume it
    moment: str  # the part of the run
    share: float  # where in that part
    step: int = 0  # of moment "step": after this row of the log
    kills: int = 0
    outcome: str = ""
    survived: bool = False
    seconds: float = 0.0


def plan(seed: int, number: int, table: list[tuple[str, int, str]]) -> Fault:
    """Fault `number` of a seed: table, in an order of its own for each round and seed."""
    number_in_round = (number - 1) % len(table)
    order = random.Random(f"{seed}/round/{(number - 1) // len(table)}").sample(table, len(table))
    rng = random.Random(f"{seed}/{number}")
    stage, world, kind = order[number_in_round]
    # Of those that may be resumed by another number of processes, three in ten.
    then = rng.choice((1, 2, 4)) if world > 1 and stage != "vllm" and rng.random() < 0.3 else world
    moment = rng.choices(("begin", "step", "end"), (2, 7, 1))[0]
    # A checkpoint must be there to be damaged, and a run must have begun to be disturbed.
    if kind in DAMAGE + PLACES:
        moment = "step"
    first = {"two processes": 1, "data changed": 1}.get(kind, 4 if kind in DAMAGE else 0)
    last = 2 if kind == "two processes" else STEPS - 1
    return Fault(seed, number, stage, world, kind, then, moment, rng.random(), rng.randint(first, last))


def wait_for_moment(fault: Fault, start: Start, command: Command, usual: Reference) -> bool:
    """Sleep until the fault's moment; False if the run ended before."""
    seconds, step = fault.share * usual.seconds, None
    if usual.times:
        first, last = usual.times[0], usual.times[-1]
        if fault.moment == "begin":
            seconds = fault.share * first
        elif fault.moment == "end":
            seconds, step = fault.share * (usual.seconds - last), len(usual.times)
        else:
            seconds, step = fault.share * 2 * (last - first) / (len(usual.times) - 1), fault.step
    deadline = time.monotonic() + PATIENCE
    while step is not None and len(rows_so_far(command.out)) < step:
        if start.ended():
            return False
        if time.monotonic() > deadline:
            raise TimeoutError(f"step {step} did not come in {PATIENCE} s")
        time.sleep(0.002)
    due = time.monotonic() + seconds if step is not None else start.began + seconds
    while time.monotonic() < due:
        if start.ended():
            return False
        time.sleep(0.002)
    return not start.ended()


def rows_so_far(out: Path) -> list[str]:
    try:
        return (out / "log.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []


def strike(fault: Fault, start: Start, rng: random.Random) -> None:
    """Send the signals of a fault."""
    names, whom = fault.fault.split()
    ranks = sorted(start.ranks())
    targets = {"launcher": [start.pid], "all": [start.pid, *ranks]}.get(whom)
    if targets is None:
        # torchrun may not have started a rank yet.
        targets = [rng.choice(ranks)] if ranks else [start.pid]
    if names == "SIGKILL" and whom == "all":
        targets += descendants(start.pid)
    for place, name in enumerate(names.split("+")):
        if place:
            time.sleep(2 * fault.share if name == "SIGCONT" else 0.9 * fault.share)
        for pid in dict.fromkeys(targets):
            send(pid, getattr(signal, name))
    fault.kills += len(set(targets)) if names == "SIGKILL" else 0


def kill_all(fault: Fault, start: Start) -> None:
    if not start.ended():
        targets = [start.pid, *descendants(start.pid)]
        for pid in targets:
            send(pid, signal.SIGKILL)
        fault.kills += len(targets)
    start.wait()


# ---------------------------------------------------------------------------------------------------------------------
# What a fault leaves, and what must come of it


class NotSurvived(Exception):
    """What was lost."""


def snapshot(folder: Path) -> dict[str, bytes]:
    """{name: bytes} of a directory; the lock file says who looked last."""
    names = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", "lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in names}


def resume(command: Command, folder: Path, world: int) -> Start:
    start = Start(command, folder, world, resume=True)
    start.wait()
    return start


def resume_to_the_end(fault: Fault, command: Command, folder: Path) -> None:
    start = resume(command, folder, fault.then)
    if start.status() != 0:
        raise NotSurvived(f"--resume ended with {start.status()}: {start.said()[-400:]}")


def must_refuse(start: Start, before: dict[str, bytes], place: Path) -> str:
    """The error line of a start that was right to refuse."""
    errors = start.error_lines()
    if start.status() != 2 and start.world == 1:
        raise NotSurvived(f"status {start.status()}, not 2: {start.said()[-400:]}")
    if len(set(errors)) != 1 or (start.world == 1 and len(errors) != 1):
        raise NotSurvived(f"{len(errors)} error lines: {start.said()[-400:]}")
    if snapshot(place) != before:
        raise NotSurvived(f"the directory was touched by a start that refused ({errors[0]})")
    return errors[0]


def last_whole_step(out: Path) -> int:
    try:
        return int((out / "LATEST").read_text().removeprefix("step_"))
    except (OSError, ValueError):
        return 0


def check_wish(fault: Fault, start: Start, out: Path, before: int) -> None:
    """A wish to stop must lose no step: the last checkpoint is the last step of the log. before: rows at the moment."""
    said = start.said()
    if start.world == 1 and "Traceback" in said:
        raise NotSurvived(f"a traceback: {said[-600:]}")
    if before and last_whole_step(out) != len(rows_so_far(out)):
        raise NotSurvived(f"{len(rows_so_far(out))} steps in the log, the checkpoint is of step {last_whole_step(out)}")


def damage(fault: Fault, out: Path, rng: random.Random) -> str:
    """Damage what a run has left: -> what was damaged, "" if there was nothing yet."""
    checkpoint = out / "checkpoints" / f"step_{last_whole_step(out):06d}"
    if fault.fault in ("bit flipped", "file truncated"):
        candidates = sorted(checkpoint.glob("*"))
        if not candidates:
            return ""
        path = rng.choice(candidates)
    else:
        path = out / {"LATEST emptied": "LATEST", "log cut": "log.jsonl"}.get(fault.fault, "args.json")
    if not path.exists() or not path.stat().st_size:
        return ""
    data = bytearray(path.read_bytes())
    if fault.fault == "bit flipped":
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    elif fault.fault == "LATEST emptied":
        data = b""
    elif fault.fault == "args.json damaged" and rng.random() < 0.5:
        data = rng.randbytes(len(data))
    else:
        data = data[: rng.randrange(len(data))]
    path.write_bytes(data)
    return str(path.relative_to(out))


@contextlib.contextmanager
def small_disk(folder: Path, free: int):
    """-> (a folder on a disk of DISK bytes, of which a file leaves `free`; a function that removes the file).

    Where this process may not mount a disk: (a folder, None), and no file may be larger than `free`.
    """
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", disk]
    if subprocess.run(command, capture_output=True).returncode != 0:
        yield disk, None
        return
    try:
        filler = disk / "filler"
        filler.write_bytes(bytes(DISK - free))
        yield disk, filler.unlink
    finally:
        subprocess.run(["umount", disk], check=True)


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of fault


def signals(fault: Fault, command: Command, folder: Path, usual: Reference, rng: random.Random) -> str:
    start = Start(command, folder, fault.world)
    if wait_for_moment(fault, start, command, usual):
        before = len(rows_so_far(command.out)) if command.stage in TRAINERS else 0
        strike(fault, start, rng)
        start.wait()
        if fault.fault in WISHES + TWICE and start.status() != 0:
            check_wish(fault, start, command.out, before)
        if fault.fault in PAUSES and start.status() != 0:
            raise NotSurvived(f"a pause ended it with status {start.status()}: {start.said()[-400:]}")
    else:
        start.wait()
    status = start.status()
    if status != 0 or not command.out.exists():
        resume_to_the_end(fault, command, folder)
    return f"status {status}"


def damaged(fault: Fault, command: Command, folder: Path, usual: Reference, rng: random.Random) -> str:
    start = Start(command, folder, fault.world)
    wait_for_moment(fault, start, command, usual)
    kill_all(fault, start)
    what = damage(fault, command.out, rng)
    before = snapshot(command.out)
    again = resume(command, folder, fault.then)
    if again.status() == 0:
        return what or "nothing there yet"
    error = must_refuse(again, before, command.out)
    if "no other checkpoint is whole" not in error:
        raise NotSurvived(f"refused without need: {error}")
    return f"{what}: refused"


def disk_full(fault: Fault, command: Command, folder: Path, usual: Reference, rng: random.Random) -> str:
    # Less than a checkpoint, less than two, or less than the three that a run has while it writes one.
    free = rng.randrange(NEEDED)
    with small_disk(folder, free) as (disk, make_room):
        command.out = disk / "run"
        start = Start(command, folder, fault.world, limit=0 if make_room else min(free, LARGEST))
        start.wait()
        step = last_whole_step(command.out)
        if start.status() == 0:
            raise NotSurvived(f"it ended well with {free} bytes")
        if start.world == 1 and "Traceback" in start.said():
            raise NotSurvived(f"a traceback: {start.said()[-600:]}")
        if make_room:
            make_room()
        resume_to_the_end(fault, command, folder)
        command.out = shutil.copytree(command.out, folder / "run")
    kind = "tmpfs" if make_room else "RLIMIT_FSIZE"
    return f"{kind} of {free} bytes, checkpoint {step} is good"


def two_processes(fault: Fault, command: Command, folder: Path, usual: Reference, rng: random.Random) -> str:
    start = Start(command, folder, fault.world)
    wait_for_moment(fault, start, command, usual)
    second = Start(command, folder, 1, resume=True)
    deadline = time.monotonic() + PATIENCE
    while not second.ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    if not second.ended():
        raise NotSurvived(f"the second process neither works nor refuses: {second.said()[-400:]}")
    late = start.ended()
    start.wait()
    if second.status() == 2:
        if "another process is at work here" not in "".join(second.error_lines()):
            raise NotSurvived(f"refused for another reason: {second.said()[-400:]}")
    elif not late:
        raise NotSurvived(f"both went on; the second ended with {second.status()}")
    if start.status() != 0:
        raise NotSurvived(f"the first ended with {start.status()}: {start.said()[-400:]}")
    return "the second came too late" if second.status() == 0 else "the second refused"


def data_changed(fault: Fault, command: Command, folder: Path, usual: Reference, rng: random.Random) -> str:
    data = Path(command.settings["data"])
    start = Start(command, folder, fault.world)
    wait_for_moment(fault, start, command, usual)
    kill_all(fault, start)
    text = data.read_text()
    data.write_text(text.replace("?", "!").replace("Give", "Name"))
    place = command.place()
    before = snapshot(place)
    again = resume(command, folder, fault.then)
    finished = again.status() == 0 and not any(name != "args.json" for name in before)
    if not finished:
        must_refuse(again, before, place)
    data.write_text(text)
    resume_to_the_end(fault, command, folder)
    return "nothing was there to be lost" if finished else "refused until it was put back"


def kind_of(fault: Fault):
    named = {"disk full": disk_full, "two processes": two_processes, "data changed": data_changed}
    return named.get(fault.fault, damaged if fault.fault in DAMAGE else signals)


def happen(fault: Fault, laboratory: Laboratory) -> Fault:
    """Let a fault happen, and note what came of it."""
    usual = laboratory.reference(fault.stage, fault.world)
    began = time.monotonic()
    folder = laboratory.folder / f"fault-{fault.number}"
    folder.mkdir()
    data = None
    if fault.fault == "data changed":
        source = Path(laboratory.command(fault.stage, folder).settings["data"])
        data = Path(shutil.copy(source, source.with_name(f"data-{os.getpid()}-{fault.number}.jsonl")))
    command = laboratory.command(fault.stage, folder, data)
    rng = random.Random(f"{fault.seed}/{fault.number}/strike")
    try:
        fault.outcome = kind_of(fault)(fault, command, folder, usual, rng)
        refused = fault.outcome.endswith(": refused")
        if not refused:
            # What eval and distill write follows from a record's place alone.
            exact = fault.then == fault.world or fault.stage not in TRAINERS
            apart = difference(command.stage, command.out, usual.out, exact, fault.fault != "log cut")
            if apart:
                raise NotSurvived(f"{fault.outcome}; then {apart}")
            fault.outcome += "; then the same" + (" bytes" if exact else " numbers")
        fault.survived = True
        shutil.rmtree(folder)
    except (NotSurvived, TimeoutError, OSError) as problem:
        fault.outcome = f"NOT SURVIVED: {problem}"
    finally:
        if data:
            data.unlink()
        kill_descendants()
    fault.seconds = round(time.monotonic() - began, 1)
    return fault


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=0, help="go on until so many were killed; 0: every fault once")
    parser.add_argument("--seconds", type=float, default=0, help="begin no fault after so many seconds; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="which faults, in which order, at which moments")
    parser.add_argument("--log", help="JSON lines to append to, one a fault")
    parser.add_argument("--only", type=int, nargs="+", metavar="NUMBER", help="these faults of the seed alone")
    parser.add_argument("--short", action="store_true", help="six faults of different kinds instead of all")
    parser.add_argument("--vllm-python", default="", help="a Python with vLLM; without it no run uses vLLM")
    parser.add_argument("--material", help="folder with (or for) models and data; default: a temporary one")
    parser.add_argument("--keep", help="folder to work in, which keeps what was not survived; default: a temporary one")
    return parser.parse_args(argv)


def commit() -> str:
    """The commit, with a + if a Python file has changed since (the log itself may have grown)."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True).stdout
    return name + "+" if changed.strip() else name


def main(argv=None) -> int:
    args = parse_args(argv)
    began = time.monotonic()
    warnings.filterwarnings("ignore", "This process .* is multi-threaded")
    ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)
    # SIGTERM, too, must not leave runs behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    torch.set_num_threads(1)
    table = list(SHORT) if args.short else cases(bool(args.vllm_python))
    numbers = args.only or itertools.count(1)
    here = commit()
    with tempfile.TemporaryDirectory(prefix="chaos_") as temporary, contextlib.ExitStack() as cleaner:
        folder = Path(args.keep or temporary).resolve()
        cleaner.callback(kill_descendants)
        laboratory = Laboratory(folder, Path(args.material or folder / "material").resolve(), args.vllm_python)
        cleaner.callback(laboratory.mixed.unlink)
        import_what_a_run_imports(laboratory)
        faults = []
        for number in numbers:
            killed = sum(fault.kills for fault in faults)
            late = args.seconds and time.monotonic() - began > args.seconds
            enough = killed >= args.kills if args.kills else len(faults) >= len(table)
            if late or (enough and not args.only):
                break
            fault = happen(plan(args.seed, number, table), laboratory)
            faults.append(fault)
            print(f"{fault.number:4} {fault.seconds:5.1f} s  {fault.stage} on {fault.world}, {fault.fault}"
                  f" ({fault.moment}): {fault.outcome}", flush=True)  # fmt: skip
            if args.log:
                with open(args.log, "a") as log:
                    log.write(json.dumps({"commit": here} | asdict(fault)) + "\n")
    lost = [fault for fault in faults if not fault.survived]
    print(f"{len(faults)} faults, {sum(fault.kills for fault in faults)} processes killed, {len(lost)} not survived")
    return 1 if lost or not faults else 0


if __name__ == "__main__":
    sys.exit(main())
