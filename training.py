"""Training: what every stage needs around its algorithm, and nothing that knows a model, a loss or a reward.

    flags        one argparse idiom for all stages, and the flags that concern the machine
    sharding     FSDP2, whole: shard, gather, release, accumulate, export whole tensors
    optimiser    AdamW, learning-rate schedule, micro-batches, gradient clipping
    metrics      where a step's seconds, FLOPs and memory go

Processes and exit status are in processes.py, the run directory and its checkpoints in run_directory.py.

A `policy` here is any nn.Module that offers `units()`, the modules FSDP2 shards one by one (model.Policy does).
"""

import argparse
import math
import re
import resource
import sys
import time
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from pictures import MAX_IMAGE_PIXELS
from processes import World, child_environment, run, setup  # noqa: F401, stages say training.setup and training.run

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
    and an error is one line. jigsaw.py, which imports nothing of ours, has its own copy.

    commands: flags whose value is a whole command line, so no name of a file or a model.
    """

    def __init__(self, doc: str, epilog: str | None = None, commands: tuple[str, ...] = ()):
        super().__init__(
            usage="python %(prog)s [flags]",
            description=doc.strip(),
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=HelpFormatter,
        )
        self.commands = commands

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else list(args)
        flag = ""
        for word in words:
            if word.startswith("--"):
                flag, equals, word = word.partition("=")
                if not equals:
                    continue
            problem = problem_of_name(word)
            if problem and flag not in self.commands:
                self.error(f"argument {flag}: {problem}: {shown(word)}" if flag else f"{problem}: {shown(word)}")
        return super().parse_known_args(words, namespace)

    def error(self, message):
        one_line = " ".join(message.split())  # it may quote a flag's value
        self.exit(2, f"error: {printable(one_line)}\n")


def problem_of_name(text: str) -> str | None:
    """Why a word of a command line can be no number, and no name of a file or a model."""
    if not text:
        return "is empty"
    if text == "--":  # argparse would drop it
        return "is no value"
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):  # how Python reads bytes that are no UTF-8
        return "is not UTF-8"
    if any(unicodedata.category(letter) == "Cc" for letter in text):
        return "holds a control character"
    if any(len(part.encode()) > 255 for part in text.split("/")):  # more than file systems take
        return "has a part of more than 255 bytes"
    return None


def printable(text: str) -> str:
    """Text with escapes for what a terminal or a UTF-8 file cannot show."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def shown(text: str) -> str:
    """A flag's value as an error message quotes it: its beginning, if it is long."""
    return printable(text if len(text) <= 60 else f"{text[:60]}…")


def integer(interval: str) -> Callable[[str], int]:
    """A flag's type: a whole number in an interval such as "[1, inf)"."""
    return number_in(interval, int)


def real(interval: str) -> Callable[[str], float]:
    """A flag's type: a finite number in an interval such as "(0, 1]": round brackets exclude the end. "0 or [1e-4, 1]"
    takes 0 as well, where 0 means that something is off."""
    return number_in(interval, float)


# Plain digits: Python's int and float also read spaces, underscores and the digits of all alphabets.
WRITTEN = {
    int: re.compile(r"[+-]?[0-9]+"),
    float: re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(inf|infinity|nan)", re.I),
}


def number_in(interval, kind):
    bounds = interval.removeprefix("0 or ")
    low, high = (float(end) for end in bounds[1:-1].split(","))
    what = "a whole number" if kind is int else "a number"
    must = f"must be 0 or lie in {bounds}" if interval != bounds else f"must lie in {bounds}"

    def read(text):
        if not WRITTEN[kind].fullmatch(text):
            raise argparse.ArgumentTypeError(f"must be {what}, not {shown(text)}")
        try:
            value = kind(text)
        except ValueError:  # more digits than Python reads
            raise argparse.ArgumentTypeError(f"{must}, not {shown(text)}") from None
        # NaN is neither above nor below anything, and inf not below "inf)".
        above = value > low or (bounds[0] == "[" and value == low)
        below = value < high or (bounds[-1] == "]" and value == high)
        if not (above and below or interval != bounds and value == 0):
            raise argparse.ArgumentTypeError(f"{must}, not {shown(text)}")
        if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
            raise argparse.ArgumentTypeError(f"is too close to 0 for a float: {shown(text)}")
        return value

    return read


def add_model_flags(parser: Parser):
    """The flags of every stage that runs a model, in a group of their own. Returns the group."""
    group = parser.add_argument_group("model and machine")
    add = group.add_argument
    add("--max-pixels", type=integer("[1, 1e9]"), help="largest image area in pixels (default: the checkpoint's own)")
    add("--max-image-pixels", type=integer("[1, 1e9]"), default=MAX_IMAGE_PIXELS,
        help="an image file of more pixels is refused before it is decoded")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"],
        help="compute type; auto: bf16 on a GPU, fp32 on a CPU. Weights that learn stay fp32")  # fmt: skip
    add("--attn", default="auto", choices=["auto", "sdpa", "flash"],
        help="flash: FlashAttention kernels of torch (CUDA, bf16); sdpa: exact everywhere")  # fmt: skip
    add("--timeout", type=real("[0, 1e6]"), default=1800.0,
        help="seconds that processes wait for one that gives no sign of life or does not come, before all end; "
        "0: for ever")  # fmt: skip
    return group


def add_training_flags(parser: Parser):
    """The flags of every stage that trains: model flags, sharding, memory, and the run directory."""
    add = add_model_flags(parser).add_argument
    add("--freeze-vision", action="store_true", help="keep the vision tower as it is")
    add("--micro-tokens", type=integer("[0, 1e9]"), default=0,
        help="tokens and patches per forward, less if memory runs out; 0: 16384 on a GPU, 3072 on a CPU")  # fmt: skip
    add("--gradient-checkpointing", default="auto", choices=["auto", "on", "off"],
        help="keep no activations inside a block, compute them again in the backward pass: less memory, more time; "
        "auto: on GPUs")  # fmt: skip
    add("--shard", default="full", choices=["full", "grad", "none"],
        help="what FSDP2 shards over the processes: full: weights, gradients and optimizer state; grad: the last two "
        "(weights stay gathered during an update); none: nothing, each process holds the whole model")  # fmt: skip
    add("--replicas", type=integer("[1, 1e6]"), default=1,
        help="copies of the sharded model (HSDP): as many as nodes; 1: one over all processes")  # fmt: skip
    add("--offload", action="store_true",
        help="keep fp32 master weights, gradients and optimizer state in main memory")  # fmt: skip
    add("--accumulate", default="whole", choices=["whole", "shards"],
        help="gradients between micro-batches: whole: in every process, averaged once per update (fast); "
        "shards: averaged and sharded each time (a 72B model has no room for a whole one)")  # fmt: skip
    add("--measure-peak", action="store_true",
        help="time a matrix product first, and log FLOP/s as a share of it (mfu_…)")  # fmt: skip

    add = parser.add_argument_group("run directory").add_argument
    add("--save-every", type=integer("[0, 1e6]"), default=50,
        help="steps between checkpoints; 0: only at the end or when stopped")  # fmt: skip
    add("--keep", type=integer("[1, 1e6]"), default=2, help="checkpoints to keep")
    add("--max-skipped", type=integer("[0, 1e6]"), default=5,
        help="a step whose gradient is no finite number changes nothing and is counted; this many in a row end the "
        "run; 0: never")  # fmt: skip
    add("--resume", action="store_true", help="go on from the last checkpoint in --out (same settings)")
    add("--overwrite", action="store_true", help="start anew in a directory that holds a run")


# Flags of this file that may differ between a run and its resumption, like the number of processes.
MAY_CHANGE = ("resume", "overwrite", "steps", "save_every", "keep", "max_skipped", "timeout", "measure_peak")
MAY_CHANGE += ("shard", "replicas", "offload", "accumulate", "max_image_pixels", "strict_data")


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

    A norm that is no finite number changes nothing: one such update would be in every weight. The caller counts it
    (Run.count_skipped). The norm is the global one, so all ranks skip alike.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    # Over all shards: a DTensor's norm is the global one.
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if math.isfinite(norm):
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
        self.world.at(f"after {phase}")

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
