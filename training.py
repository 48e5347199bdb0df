"""Training: what every stage needs around its algorithm, and nothing that knows a model, a loss or a reward.

    flags           one argparse idiom for all stages, and the flags that concern the machine
    processes       one process or many: rank, device, sums over ranks, exit status
    sharding        FSDP2, whole: shard, gather, release, accumulate, export whole tensors
    optimiser       AdamW, learning-rate schedule, micro-batches, gradient clipping
    metrics         where a step's seconds, FLOPs and memory go
    run directory   log, --resume, Ctrl-C, checkpoints, and the Hugging Face model at the end

A `policy` here is any nn.Module that offers `units()`, the modules FSDP2 shards one by one (model.Policy does).
"""

import argparse
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

from pictures import MAX_IMAGE_PIXELS
from records import DataError, write_jsonl, write_text

# ---------------------------------------------------------------------------------------------------------------------
# Flags


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that say something, and keeps the line breaks of an epilog: examples stay examples."""

    def _get_help_string(self, action):
        if action.required or action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse as every stage uses it: --help shows the file's docstring and all defaults, there are no abbreviations,
    and an error is one line."""

    def __init__(self, doc: str, epilog: str | None = None):
        super().__init__(
            usage="python %(prog)s [flags]",
            description=doc.strip(),
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )

    def error(self, message):
        one_line = " ".join(message.split())  # it may quote a flag's value
        self.exit(2, f"error: {one_line}\n")


def integer(interval: str) -> Callable[[str], int]:
    """A flag's type: a whole number in an interval such as "[1, inf)"."""
    return number_in(interval, int)


def real(interval: str) -> Callable[[str], float]:
    """A flag's type: a finite number in an interval such as "(0, 1]": round brackets exclude the end."""
    return number_in(interval, float)


def number_in(interval, kind):
    low, high = (float(end) for end in interval[1:-1].split(","))

    def read(text):
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, not {text}") from None
        # NaN is neither above nor below anything, and inf not below "inf)".
        above = value > low or (interval[0] == "[" and value == low)
        below = value < high or (interval[-1] == "]" and value == high)
        if not (above and below):
            raise argparse.ArgumentTypeError(f"must lie in {interval}, not {text}")
        return value

    return read


def add_model_flags(parser: Parser):
    """The flags of every stage that runs a model, in a group of their own. Returns the group."""
    group = parser.add_argument_group("model and machine")
    add = group.add_argument
    add("--max-pixels", type=integer("[1, inf)"), help="largest image area in pixels (default: the checkpoint's own)")
    add("--max-image-pixels", type=integer("[1, inf)"), default=MAX_IMAGE_PIXELS,
        help="an image file of more pixels is refused before it is decoded")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"],
        help="compute type; auto: bf16 on a GPU, fp32 on a CPU. Weights that learn stay fp32")  # fmt: skip
    add("--attn", default="auto", choices=["auto", "sdpa", "flash"],
        help="flash: FlashAttention kernels of torch (CUDA, bf16); sdpa: exact everywhere")  # fmt: skip
    return group


def add_training_flags(parser: Parser):
    """The flags of every stage that trains: model flags, sharding, memory, and the run directory."""
    add = add_model_flags(parser).add_argument
    add("--freeze-vision", action="store_true", help="keep the vision tower as it is")
    add("--micro-tokens", type=integer("[0, inf)"), default=0,
        help="tokens and patches per forward, less if memory runs out; 0: 16384 on a GPU, 3072 on a CPU")  # fmt: skip
    add("--gradient-checkpointing", default="auto", choices=["auto", "on", "off"],
        help="keep no activations inside a block, compute them again in the backward pass: less memory, more time; "
        "auto: on GPUs")  # fmt: skip
    add("--shard", default="full", choices=["full", "grad", "none"],
        help="what FSDP2 shards over the processes: full: weights, gradients and optimizer state; grad: the last two "
        "(weights stay gathered during an update); none: nothing, each process holds the whole model")  # fmt: skip
    add("--replicas", type=integer("[1, inf)"), default=1,
        help="copies of the sharded model (HSDP): as many as nodes; 1: one over all processes")  # fmt: skip
    add("--offload", action="store_true",
        help="keep fp32 master weights, gradients and optimizer state in main memory")  # fmt: skip
    add("--accumulate", default="whole", choices=["whole", "shards"],
        help="gradients between micro-batches: whole: in every process, averaged once per update (fast); "
        "shards: averaged and sharded each time (a 72B model has no room for a whole one)")  # fmt: skip
    add("--measure-peak", action="store_true",
        help="time a matrix product first, and log FLOP/s as a share of it (mfu_…)")  # fmt: skip

    add = parser.add_argument_group("run directory").add_argument
    add("--save-every", type=integer("[0, inf)"), default=50,
        help="steps between checkpoints; 0: only at the end or when stopped")  # fmt: skip
    add("--keep", type=integer("[1, inf)"), default=2, help="checkpoints to keep")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out (same settings)")
    add("--overwrite", action="store_true", help="start anew in a directory that holds a run")


# Flags of this file that may differ between a run and its resumption, like the number of processes.
MAY_CHANGE = ("resume", "overwrite", "steps", "save_every", "keep", "measure_peak", "max_image_pixels")
MAY_CHANGE += ("shard", "replicas", "offload", "accumulate")


def load_options(args) -> dict:
    """The flags of add_training_flags that model.load takes, as its keyword arguments."""
    return {
        "dtype": args.dtype,
        "attn": args.attn,
        "max_pixels": args.max_pixels,
        "max_image_pixels": args.max_image_pixels,
        "freeze_vision": args.freeze_vision,
        "gradient_checkpointing": args.gradient_checkpointing,
        "sharding": Sharding(args.shard, args.replicas, args.offload, args.accumulate),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass(frozen=True)
class World:
    """Where this process stands: rank of size, its device. One process without torchrun is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum numbers over all ranks: floats in, floats out."""
        if self.size == 1:
            return [float(value) for value in values]
        # fp64: counts of tokens must stay exact.
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, thing) -> list:
        """A list with every rank's `thing` (picklable, between our own processes only), on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def setup() -> World:
    """Join the process group torchrun started, if any, and choose the device: CUDA when there, else CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and not dist.is_initialized():
        # gloo beside nccl: objects and checkpoints travel through main memory.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank() if size > 1 else 0, size, device)


def child_environment() -> dict:
    """The environment for a child process that must not join this process group."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    others = {key: value for key, value in os.environ.items() if key not in ours}
    return {key: value for key, value in others.items() if not key.startswith("TORCHELASTIC")}


def run(main: Callable[[], None]) -> None:
    """Run a stage's main() and turn its end into an exit status: 0 done, 2 bad input (one line), 1 anything else."""
    status, message = 0, None
    try:
        main()
    except DataError as error:
        status, message = 2, f"error: {' '.join(str(error).split())}"
        if int(os.environ.get("RANK", "0")) > 0:
            # Mostly rank 0 says the same, and torchrun ends this process before it can repeat it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
            message = f"\n{message}"  # rank 0's progress bar may stand on this line
    except KeyboardInterrupt as stop:
        status = 130
        if int(os.environ.get("RANK", "0")) == 0:
            message = str(stop) or "stopped"
    except SystemExit:
        raise
    except Exception:
        # In one piece: print_exc writes line by line, and the processes of a run write to one screen.
        status, message = 1, traceback.format_exc().rstrip()

    # Not above: there main's frame still lives, and with it a progress bar that has not ended its line.
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


# ---------------------------------------------------------------------------------------------------------------------
# Sharding
#
# FSDP2 shards every weight over the processes and gathers a unit's weights when it runs. Its hooks run only in the
# forward of the module they were put on: everything that needs whole weights happens inside Policy.forward, or between
# gather_weights and release_weights.


@dataclass(frozen=True)
class Sharding:
    """How a model is spread over the processes.

    mode        "full": weights, gradients and optimizer state are sharded, and gathered unit by unit; "grad": the
                weights stay gathered from the first forward of an update to its last backward; "none": every process
                holds the whole model and only gradients are averaged
    replicas    copies of the model, each sharded over size / replicas neighbouring processes (HSDP: as many copies as
                nodes keeps the gathering inside a node)
    offload     fp32 master weights, gradients and optimizer state live in main memory, where AdamW runs then
    accumulate  gradients between micro-batches: "whole" in every process, or averaged into "shards" each time
    """

    mode: str = "full"
    replicas: int = 1
    offload: bool = False
    accumulate: str = "whole"


DEFAULT_SHARDING = Sharding()


def shard(policy: nn.Module, world: World, compute_dtype: torch.dtype | None, sharding: Sharding) -> None:
    """FSDP2: one FSDP unit for each of policy.units(), the root for everything else.

    compute_dtype: what weights are cast to when they are gathered (the shards stay as they are, fp32); None: no cast.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if not dist.is_initialized():  # one CUDA process without torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    replicas = world.size if sharding.mode == "none" else sharding.replicas
    if replicas > 1:
        shape, names = (replicas, world.size // replicas), ("replica", "shard")
    else:
        shape, names = (world.size,), ("shard",)
    options = {
        "mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=names),
        "reshard_after_forward": sharding.mode == "full",
    }
    if compute_dtype is not None:
        # Inputs are not cast: a cast gives every unit a copy of the Layout, and the KV cache it collects is lost.
        options["mp_policy"] = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    # Pinned, so that copies to the GPU overlap with computing.
    if sharding.offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for unit in policy.units():
        fully_shard(unit, **options)
    # The root's weights begin and end every forward.
    fully_shard(policy, **options | {"reshard_after_forward": False})


def fsdp_units(policy: nn.Module) -> list[nn.Module]:
    """The modules that FSDP2 manages; [] for a policy that is not sharded."""
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def gather_weights(policy: nn.Module) -> None:
    """Gather every unit's weights once, so that ranks can decode without waiting for each other."""
    for unit in fsdp_units(policy):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()


def release_weights(policy: nn.Module) -> None:
    """Back to shards, as training expects them."""
    for unit in fsdp_units(policy):
        unit.reshard()
        full = policy.sharding.mode == "full" and unit is not policy
        unit.set_reshard_after_forward(full, recurse=False)


def backward(policy: nn.Module, world: World, loss: torch.Tensor, last: bool) -> None:
    """Add a micro-batch's gradient. `loss` is this rank's share of a sum over all ranks; FSDP averages, so undo it.

    last: whether it is the update's last micro-batch. Until then gradients stay whole where they are (least traffic,
    but a process holds a whole fp32 gradient), or are averaged into shards at once (Sharding.accumulate).
    """
    if fsdp_units(policy):
        policy.set_requires_gradient_sync(last or policy.sharding.accumulate == "shards")
        policy.set_reshard_after_backward(last or policy.sharding.mode == "full")
    (loss * world.size).backward()


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor, gathered from its shards (a collective: call it on every rank)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_weights(policy: nn.Module) -> dict[str, torch.Tensor]:
    """{name: whole fp32 tensor on the CPU}; tied weights once. For models that fit into one process."""
    return {name: whole_tensor(weight).cpu().contiguous() for name, weight in policy.named_parameters()}


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser


def adamw(policy: nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW without weight decay over the weights that learn."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    sharded = all(hasattr(weight, "full_tensor") for weight in trained)
    assert sharded or not fsdp_units(policy), "the optimizer must be given shards, these weights are gathered"
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def learning_rate(step: int, steps: int, peak: float, schedule: str, warmup: int) -> float:
    """Learning rate of update `step` (from 0): linear warm-up over `warmup` updates, then constant or linear to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * (steps - step) / max(1, steps - warmup)


def micro_batches(world: World, sizes: list[int], budget: int) -> list[list[int]]:
    """Divide samples into micro-batches of at most `budget` tokens and image patches: -> lists of indices.

    sizes: tokens and patches of each sample. budget 0: 16,384 on a GPU; 3,072 on a CPU, where larger tensors cost page
    faults and memory and win nothing. Samples of similar size share a micro-batch. Every rank gets the same number
    (FSDP's collectives need that): a rank that runs out gets empty lists, and its caller runs any sample at weight 0.
    """
    budget = budget or (16384 if world.device.type == "cuda" else 3072)
    batches, left = [], 0
    # Largest first: what is too large for any budget gets a micro-batch of its own, early.
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        if not batches or sizes[index] > left:
            batches.append([])
            left = budget
        batches[-1].append(index)
        left -= sizes[index]
    # A rank with fewer forwards than the others would hang in their collectives.
    most = max(world.gather(len(batches)))
    return batches + [[] for _ in range(most - len(batches))]


def update(policy: nn.Module, optimizer: torch.optim.Optimizer, lr: float, max_norm: float) -> float:
    """Clip the global gradient norm to max_norm (0: no clipping), step, clear. Returns the norm before clipping.

    A norm that is no number ends the run here (RuntimeError, on every rank): one such update would be in every weight.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Over all shards: a DTensor's norm is the global one.
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise RuntimeError(f"the gradient norm is {norm}; no weight was changed, and the last checkpoint is good")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


class PhaseTimer:
    """Where a step's seconds, FLOPs and memory go.

    end(phase) books the time since the last call under a phase, so every second is booked somewhere: what a step does
    after its last phase (its log, a checkpoint) is found under "rest" of the next. peak_dtype: time matrix products of
    this type first, and give every phase's FLOP/s as a share of that peak too (MFU); None: do not.
    """

    def __init__(self, world: World, peak_dtype: torch.dtype | None = None):
        self.world = world
        self.peak = matmul_peak(world.device, peak_dtype) if peak_dtype else 0.0
        self.start()

    def start(self) -> None:
        self.seconds, self.flops = {}, {}
        self.last = time.perf_counter()

    def end(self, phase: str, flops: float | None = None) -> None:
        """Book the seconds since the last call, and the FLOPs done in them if they are counted, under `phase`."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.last
        if flops is not None:
            self.flops[phase] = self.flops.get(phase, 0.0) + flops
        self.last = now

    def metrics(self, **counts: float) -> dict[str, float]:
        """Everything booked since the last call, for log.jsonl: <name>_per_s of each count; seconds_<phase>;
        tflops_<phase> and mfu_<phase>, a process on the mean; peak_memory_gib, the largest of any process so far."""
        flops = dict(zip(self.flops, self.world.sum(*self.flops.values()), strict=True))
        total = sum(self.seconds.values())
        row = {f"{name}_per_s": count / total for name, count in counts.items()}
        row |= {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        for phase, count in flops.items():
            rate = count / self.world.size / max(self.seconds[phase], 1e-9)
            row[f"tflops_{phase}"] = rate / 1e12
            if self.peak:
                row[f"mfu_{phase}"] = rate / self.peak
        row["peak_memory_gib"] = max(self.world.gather(peak_memory(self.world.device))) / 2**30
        self.seconds, self.flops = {}, {}
        return row


def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.5) -> float:
    """FLOP/s of the best of three sizes of square matrix products: what this machine can do at most, as measured."""
    cuda = device.type == "cuda"
    best = 0.0
    for size in (2048, 4096, 8192) if cuda else (512, 1024, 2048):
        # Random numbers: products of zeros run faster on some machines.
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for budget in (seconds / 10, seconds / 3):  # first to warm up
            count, begun = 0, time.perf_counter()
            while count < 3 or time.perf_counter() - begun < budget:
                a @ b
                count += 1
                if cuda and count % 10 == 0:
                    torch.cuda.synchronize()
            if cuda:
                torch.cuda.synchronize()
            spent = time.perf_counter() - begun
        best = max(best, 2 * size**3 * count / spent)
    return best


def peak_memory(device: torch.device) -> int:
    """Bytes: the most this process has held, on the GPU if it has one, otherwise resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ---------------------------------------------------------------------------------------------------------------------
# Run directory


PATIENCE = 2.0  # seconds between two signals that are two wishes


@dataclass
class Run:
    """A training run's directory: args.json, log.jsonl, samples.jsonl, checkpoints/, LATEST, and at the end the model.

    Open it before anything expensive; it refuses to mix two runs. `step` is the number of finished steps.
    """

    out: Path
    world: World
    step: int = 0
    stop: bool = False  # somebody asked for it: a signal to this process, or to another rank
    asked: float | None = None  # when this process itself got its first signal, by time.monotonic
    group: object = None  # process group of the thread that writes checkpoints
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    writing: object = None  # future of that thread's present task

    @classmethod
    def open(cls, settings: dict, world: World, may_change: tuple = ()) -> "Run":
        """Create or reopen settings["out"]. settings: all flags of the stage, by name.

        may_change: flags of the stage's own that a resumed run may be given anew. DataError if the directory holds a
        run and neither "resume" nor "overwrite" is set, or if a resumed run is asked to change its settings.
        """
        run = cls(Path(settings["out"]), world)
        if world.size > 1:
            run.group = dist.new_group(backend="gloo")
        # How a run was continued is no setting of it.
        recorded = {key: settings[key] for key in sorted(settings) if key not in ("resume", "overwrite")}
        # Rank 0 looks, all ranks hear: otherwise one would go on where another has stopped.
        problem = run._prepare(settings, recorded, MAY_CHANGE + may_change) if world.main else None
        problem = world.gather(problem)[0]
        if problem:
            raise DataError(problem)
        if settings["resume"] and (run.out / "LATEST").exists():
            run.step = int((run.out / "LATEST").read_text().split("_")[-1])
        world.barrier()
        if world.main:
            write_text(run.out / "args.json", json.dumps(recorded, indent=1, default=str) + "\n")
            run._drop_unfinished()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run._ask_to_stop)
        return run

    def _prepare(self, settings, recorded, may_change):
        """On rank 0: make the directory, or say in one line why not."""
        log = self.out / "log.jsonl"
        used = (self.out / "LATEST").exists() or (log.exists() and log.stat().st_size > 0)
        if used and settings["overwrite"]:
            for name in ("args.json", "log.jsonl", "samples.jsonl", "reference.json", "LATEST", "checkpoints"):
                path = self.out / name
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        elif used and not settings["resume"]:
            return f"{self.out}: holds a run already; add --resume to go on with it or --overwrite to start anew"
        elif used and (self.out / "args.json").exists():
            before = json.loads((self.out / "args.json").read_text())
            for key, value in json.loads(json.dumps(recorded, default=str)).items():
                if key not in may_change and before.get(key, value) != value:
                    flag = f"--{key.replace('_', '-')}"
                    return f"{self.out}: {flag} was {before[key]}, now {value}; a resumed run keeps its settings"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{self.out}: cannot be made ({error})"
        return None

    def _drop_unfinished(self):
        """Remove what a killed run wrote after its last checkpoint: those steps are repeated."""
        for name in ("log.jsonl", "samples.jsonl"):
            path = self.out / name
            rows = whole_rows(path) if path.exists() else ()
            write_jsonl(path, [row for row in rows if row["step"] <= self.step])
        for unfinished in (self.out / "checkpoints").glob("*.partial"):
            shutil.rmtree(unfinished)

    def _ask_to_stop(self, number, frame):
        # Asked twice means by a person, seconds apart: then the step is not waited for. A launcher and a scheduler may
        # send the same wish together, and another rank may have passed it on before the signal arrives here.
        now = time.monotonic()
        if self.asked is not None and now - self.asked > PATIENCE:
            raise KeyboardInterrupt
        self.asked = now if self.asked is None else self.asked
        self.stop = True

    def log(self, row: dict, samples: list[dict] = ()) -> None:
        """Append one step's numbers (and some decoded replies) to the logs; rank 0 only writes."""
        if not self.world.main:
            return
        with open(self.out / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        with open(self.out / "samples.jsonl", "a") as file:
            for sample in samples:
                file.write(json.dumps({"step": row["step"], **sample}, ensure_ascii=False) + "\n")

    def end_step(self, step, steps, policy, optimizer, *, save_every, keep, extra=dict) -> None:
        """After `step` of `steps`: write a checkpoint if one is due; leave (KeyboardInterrupt) if asked to.

        extra(): {text: JSON} of this process, kept in the checkpoint.
        """
        if self.checkpoint_due(step, steps, save_every):
            self.save(step, policy, optimizer, keep, extra())
        if self.stop and step < steps:
            self.finish()
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}; --resume goes on from there")

    def checkpoint_due(self, step: int, steps: int, every: int) -> bool:
        """Is a checkpoint to be written after this step: the last one, every so many, or when asked to stop?

        The wish to stop (Ctrl-C or SIGTERM on any rank) is shared here, so that all ranks act on it together.
        """
        self.stop = self.world.sum(self.stop)[0] > 0
        return self.stop or step == steps or (every > 0 and step % every == 0)

    def save(self, step: int, policy: nn.Module, optimizer, keep: int = 2, extra: dict | None = None) -> None:
        """Write checkpoints/step_000123 (weights and AdamW's state as safetensors, each process its shards), then point
        LATEST at it. The shards are copied at once and written in the background, while the next steps go on.
        extra: {text: JSON} of each process, which restore gives back to all, put together."""
        self.finish()
        extra = {name: value for part in self.world.gather(extra or {}) for name, value in part.items()}
        folder = self.out / "checkpoints" / f"step_{step:06d}"
        if self.world.main:
            for leftover in (folder, partial_of(folder)):
                shutil.rmtree(leftover, ignore_errors=True)
        self.world.barrier()
        # The optimizer changes weights in place, so the writer gets copies.
        state = checkpoint_state(policy, optimizer)
        copied = {name: value.to("cpu", copy=True) for name, value in state.items()}
        self.writing = self.writer.submit(self._write, folder, copied, keep, extra)

    def _write(self, folder, state, keep, extra):
        dcp, _, storage = distributed_checkpoint()
        writer = storage(str(partial_of(folder)), save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=not dist.is_initialized())
        if not self.world.main:
            return
        # Every process has written by now: the first one hears last.
        write_text(partial_of(folder) / "extra.json", json.dumps(extra))
        partial_of(folder).replace(folder)
        write_text(self.out / "LATEST", folder.name)
        # A later checkpoint, of a run killed before it named it in LATEST, must not count.
        saved = sorted(path for path in folder.parent.glob("step_??????") if path.name <= folder.name)
        for old in saved[:-keep]:
            shutil.rmtree(old)

    def finish(self) -> None:
        """Wait until the last checkpoint is written. RuntimeError when it could not be (a full disk, say)."""
        # CheckpointException is no Exception: without this nobody would catch it.
        from torch.distributed.checkpoint.api import CheckpointException

        writing, self.writing = self.writing, None
        try:
            if writing is not None:
                writing.result()
        except CheckpointException as error:
            raise RuntimeError(f"{self.out}: a checkpoint could not be written, the last one is good") from error

    def restore(self, policy: nn.Module, optimizer) -> dict:
        """Load the checkpoint LATEST names into policy and optimizer, if this run has one (step > 0): -> its extra.

        It may have been written by another number of processes: each reads the slices that are its own now."""
        if not self.step:
            return {}
        dcp, storage, _ = distributed_checkpoint()
        folder = self.out / "checkpoints" / f"step_{self.step:06d}"
        reader = storage(str(folder))
        known = reader.read_metadata().state_dict_metadata
        for name, weight in policy.named_parameters():
            if f"{name}/step" in known:  # AdamW makes its state in a weight's first update
                moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                clock = torch.zeros((), device=weight.device)
                optimizer.state[weight] = {"step": clock, **moments}
        # It shares the memory of what it names, which is filled now.
        state = checkpoint_state(policy, optimizer)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        return json.loads((folder / "extra.json").read_text())

    def export(self, policy: nn.Module, encoder) -> None:
        """Make the run directory a Hugging Face model directory: config, safetensors, tokenizer, image settings."""
        self.finish()
        save_model(policy, encoder, self.out, self.world)


def whole_rows(path: Path):
    """The rows of a log up to the half line of a killed process, if it ends in one."""
    for line in path.read_text().split("\n"):
        try:
            yield json.loads(line)
        except ValueError:
            return


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder.with_name(folder.name + ".partial")


def distributed_checkpoint():
    """torch's distributed checkpoints, in safetensors (its own format holds pickles): (module, reader, writer)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: that is how it is meant
    return dcp, HuggingFaceStorageReader, HuggingFaceStorageWriter


def checkpoint_state(policy: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """{name: tensor or shards} of everything a run goes on from: weights, and AdamW's state as "name/exp_avg", …"""
    state = {}
    for name, weight in policy.named_parameters():
        state[name] = weight.detach()
        for key, value in optimizer.state.get(weight, {}).items():
            state[f"{name}/{key}"] = value.reshape(1) if key == "step" else value
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face model a run ends as


def save_model(policy, encoder, folder, world: World = World(0, 1, None), file_bytes: int = 2**32) -> None:
    """Write a directory that from_pretrained, vLLM and the next stage load; a large model in files of file_bytes.

    The processes gather one tensor at a time and write files in turns, so none ever holds more than a file.
    """
    folder = Path(folder)
    weights = {name.removeprefix("hf."): weight for name, weight in policy.named_parameters()}
    files = divide_into_files(policy.hf, weights, file_bytes)
    # The naming that from_pretrained and vLLM expect.
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    if len(files) == 1:
        names = ["model.safetensors"]
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
            old.unlink()
        policy.hf.config.save_pretrained(folder)
        policy.hf.generation_config.save_pretrained(folder)
        encoder.save(folder)
        if len(files) > 1:
            total = sum(weight.numel() * weight.element_size() for weight in weights.values())
            file_of = {key: name for name, file in zip(names, files, strict=True) for key, _ in file}
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    world.barrier()
    for number, (name, file) in enumerate(zip(names, files, strict=True)):
        tensors = {}
        mine = number % world.size == world.rank
        for key, weight in file:
            whole = whole_tensor(weights[weight])  # a collective, also for ranks that drop it
            if mine:
                tensors[key] = whole.cpu().contiguous()
        if mine:
            save_file(tensors, folder / f"{name}.partial", metadata={"format": "pt"})
            (folder / f"{name}.partial").replace(folder / name)
    world.barrier()


def divide_into_files(hf: nn.Module, weights: dict, file_bytes: int) -> list[list[tuple[str, str]]]:
    """Files of about file_bytes, each a list of (name in the file, name of the weight).

    The names in files are those that public checkpoints of this family carry, which transformers may have renamed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    order = list(weights)
    # transformers maps names through tensors; numbers in tensors come back with the new names.
    numbers = revert_weight_conversion(hf, {name: torch.tensor(number) for number, name in enumerate(order)})
    files, left = [], 0
    for key, number in numbers.items():
        weight = weights[order[number]]
        size = weight.numel() * weight.element_size()
        if not files or size > left:
            files.append([])
            left = file_bytes
        files[-1].append((key, order[number]))
        left -= size
    return files
