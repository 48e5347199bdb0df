"""What the tests of whole runs share: something to train on, and three ways to run a stage.

    call(stage, …)       here, in this process
    start(stage, …)      as a command of its own, to be killed or waited for
    torchrun(jobs, …)    several runs one after the other in the same processes (starting Python costs seconds)

Every process gets one thread: sums of floats then have one order, and equal runs give equal bits. None sees a GPU, so
that the tests are the same on every machine.
"""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

import model
import run_directory
import training
from toy.tiny_model import make_tiny

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks torch for one

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 300  # seconds until a command counts as hanging. All take less than 30, but not on a machine that is busy

# What the model of the tests is taught to say, for 40 updates. Most of it is well-formed, some is right, so that the
# replies of a group earn different rewards: with a model that speaks noise all would be 0, and nothing to learn from.
SAYINGS = ("A", "B", "A", "B", "A or B", "so A", "")


def flags(**settings):
    """{"max_new_tokens": 8, "resume": True, "kl": None} -> ["--max-new-tokens", "8", "--resume"]"""
    argv = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name.replace('_', '-')}")
        if value is not True:
            argv += [str(item) for item in value] if isinstance(value, list) else [str(value)]
    return argv


def call(stage, **settings):
    """Run a stage's main() in this process."""
    threads = torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    torch.set_num_threads(1)
    try:
        importlib.import_module(stage).main(flags(**settings))
    finally:
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def environment():
    quiet = {"TORCH_CPP_LOG_LEVEL": "ERROR", "TORCH_DISTRIBUTED_DEBUG": "OFF"}  # c10d's own log buries a stage's error
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return training.child_environment() | settings | quiet


def start(*command, **settings):
    """Start `python command… --flags`: -> a Popen that leads a process group of its own. Finish it with `end`."""
    return subprocess.Popen(
        [sys.executable, *map(str, command), *flags(**settings)],
        cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def end(process):
    """Wait for a started command: -> (exit status, stdout, stderr). A hang is a failure, and leaves nothing behind."""
    try:
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err
    except subprocess.TimeoutExpired:
        printed = kill(process)
    give_up(f"still running after {PATIENCE} s", process, *printed)


def finish(process):
    """`end` of a command that must succeed: -> (stdout, stderr). If it does not, the test fails with its error."""
    status, out, err = end(process)
    if status != 0:
        give_up(f"exit status {status}", process, out, err)
    return out, err


def give_up(problem, process, out, err):
    """Fail the test with what a command printed last, and without pytest's own pages about it."""
    import pytest  # not above: the processes of torchrun need none

    command = " ".join(map(str, process.args[1:]))
    pytest.fail("\n".join([f"{problem}: {command}", *out.splitlines()[-5:], cause(err)]), pytrace=False)


# What torch and torchrun print around the error of a stage: log lines of C++ and Python, with their stacks.
NOISE = re.compile(
    r"(\[rank\d+\]:)?(\[[A-Z]\d{3,4} |\[c10d\]|\[Gloo\]|[A-Z]\d{4} \d|frame #\d+:|Exception raised from )"
)
BAR = re.compile(r"\d%\|")
# torchrun's last words: a traceback of its own and a table, after the processes have ended.
SUMMARY = re.compile(r"^E\d{4} .*torch/distributed/elastic/.* failed \(exitcode.*", re.M | re.S)
# The last line of a traceback that says only that another process has died.
LOST = re.compile(r"^\S.*(gloo|by peer|by remote|Broken pipe)", re.I | re.M)


def cause(err, lines=30):
    """The end of a command's stderr, at most this many lines, that says what went wrong first of all."""
    kept = []
    for line in SUMMARY.sub("", err).splitlines():
        if kept and BAR.search(kept[-1]) and BAR.search(line):
            kept.pop()  # of a progress bar its last state is enough
        if not NOISE.match(line):
            kept.append(line)
    everything = "\n".join(kept)
    tracebacks = re.split(r"^(?=Traceback )", everything, flags=re.M)
    first_hand = "".join(text for text in tracebacks if not LOST.search(text))
    text = first_hand if "Traceback " in first_hand else everything
    return "\n".join(text.strip().splitlines()[-lines:])


def stop(process, out, step, number, delay=0.0):
    """Send a running command signal `number`, `delay` seconds after step `step` stands in its log."""
    log, deadline = Path(out) / "log.jsonl", time.monotonic() + PATIENCE
    while not log.exists() or log.read_text().count("\n") < step:
        if process.poll() is not None or time.monotonic() > deadline:
            give_up(f"did not reach step {step}", process, *kill(process))
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(number)


def kill(process):
    """End a command that hangs: -> (stdout, stderr). torchrun's processes are not in its group: it ends them itself."""
    process.terminate()
    try:
        return process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()


def processes(count):
    return "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"


TWO_PROCESSES = processes(2)


def torchrun(jobs, folder, count=2):
    """Run jobs, a list of (stage, settings), in `count` processes. Fails with their output when they fail or hang."""
    path = Path(folder) / f"jobs-{count}.json"
    path.write_text(json.dumps([[stage, flags(**settings)] for stage, settings in jobs]))
    finish(start(*processes(count), __file__, path))


def rows(out):
    """log.jsonl of a run directory."""
    path = Path(out) / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def timeless(out):
    """log.jsonl without what the clock and the machine decide."""
    clocks = ("seconds", "tflops_", "mfu_", "peak_memory")
    return [
        {key: value for key, value in row.items() if not key.startswith(clocks) and not key.endswith("_per_s")}
        for row in rows(out)
    ]


def weights(out, name="model.safetensors"):
    return load_file(Path(out) / name)


def checkpoint(out, step):
    """{name: whole tensor} of a run's checkpoint, weights and AdamW's state, however many processes wrote it."""
    dcp, storage, _ = run_directory.distributed_checkpoint()
    reader = storage(str(Path(out) / f"checkpoints/step_{step:06d}"))
    known = reader.read_metadata().state_dict_metadata
    state = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in known.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def distance(one, other):
    """Largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def parrot(folder, said, records, updates=8):
    """Make a tiny model directory that says `said` to records like these, and to most others."""
    world = training.World(rank=0, size=1, device=torch.device("cpu"))
    make_tiny(folder)
    policy, encoder = model.load(str(folder), world, train=True)
    optimizer = training.adamw(policy, 1e-2)
    groups = [(prompt, [encoder.encode_reply(said)]) for prompt in encoder.prompts(records)]
    for _ in range(updates):
        (-model.log_probs(policy, groups)[0].sum()).backward()
        training.update(policy, optimizer, 1e-2, 1.0)
    run_directory.save_model(policy, encoder, folder, world)


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


class Material:
    """A folder with things to train on, made once per test run (about 10 s).

    tiny       a model with random weights
    speaker    the same model after a little SFT on SAYINGS
    records    four puzzles with pictures (p0 … p3) and four questions without (t0 … t3), answered by a letter
    pairs      the same with chosen and rejected replies of different lengths
    """

    def __init__(self, folder):
        self.folder, self.tiny, self.speaker = folder, folder / "tiny", folder / "speaker"
        self.data, self.pair_data = folder / "records.jsonl", folder / "pairs.jsonl"
        if not (folder / "done").exists():
            self.make()
        self.records = [json.loads(line) for line in self.data.read_text().splitlines()]
        self.pairs = [json.loads(line) for line in self.pair_data.read_text().splitlines()]

    def make(self):
        import jigsaw
        from toy.tiny_model import make_tiny

        self.folder.mkdir(parents=True, exist_ok=True)
        make_tiny(self.tiny, layers=2)
        jigsaw.main(flags(scenes=4, count=4, no_think=True, swap=0, out=self.folder / "puzzles"))
        records = [json.loads(line) for line in (self.folder / "puzzles/records.jsonl").read_text().splitlines()]
        for number, record in enumerate(records):
            record |= {"id": f"p{number}", "images": [f"puzzles/{name}" for name in record["images"]]}
        records += [self.question(f"t{number}", f"Give one letter, {'again ' * number}please.") for number in range(4)]
        write(self.data, records)
        warm_up = [
            record | {"id": f"{record['id']}/{number}", "chosen": text or "1 looks dark"}
            for record in records
            for number, text in enumerate(SAYINGS)
        ]
        longer = ["A or B", "so it was A", "Answer: B", "1 looks dark, so A"]
        replies = [{"chosen": "BA"[number % 2], "rejected": longer[number % 4]} for number in range(8)]
        replies[2]["chosen"] = "B, because 2 looks light"
        write(self.pair_data, [record | reply for record, reply in zip(records, replies, strict=True)])
        call(
            "dpo", model=self.tiny, data=write(self.folder / "warm_up.jsonl", warm_up), out=self.speaker, loss="sft",
            batch=28, steps=40, lr=3e-3, save_every=0,
        )  # fmt: skip
        (self.folder / "done").touch()

    @staticmethod
    def question(name, prompt, **changes):
        record = {"id": name, "images": [], "prompt": prompt, "answer": "A", "answer_type": "letter", "think": False}
        return record | {"source": "words"} | changes

    def dpo(self, **settings):
        """Settings of a short dpo.py run: 8 pairs, 4 per update."""
        return {"model": self.speaker, "data": self.pair_data, "batch": 4, "steps": 3, "lr": 1e-3} | settings

    def grpo(self, **settings):
        """Settings of a short grpo.py run: 4 prompts with 4 replies each."""
        common = {"model": self.speaker, "data": self.data, "prompts": 4, "group": 4, "max_new_tokens": 8}
        return common | {"steps": 3, "lr": 1e-3} | settings


def run_jobs(path):
    """In one of the processes that `torchrun` starts."""
    for stage, argv in json.loads(Path(path).read_text()):
        try:
            importlib.import_module(stage).main(argv)
        except Exception as error:
            error.add_note(f"(in the job: {stage} {' '.join(argv)})")
            raise


if __name__ == "__main__":
    training.run(lambda: run_jobs(sys.argv[1]))
