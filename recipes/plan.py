"""How much memory does a run need on each GPU, and how many hours? Asked before anybody rents one.

    python recipes/plan.py 7B --gpus 8
    python recipes/plan.py 72B --gpus 64 --accumulate shards --sampler vllm --vllm-tp 8
    python recipes/plan.py --command "torchrun --nproc_per_node=8 grpo.py --model Qwen/Qwen2.5-VL-7B-Instruct …"
    python recipes/plan.py --recipe recipes/one_node.sh 7B Qwen/Qwen2.5-VL-7B-Instruct data.jsonl runs/x

The last two end with status 1 if something does not fit, and say how long each stage takes.

Nothing is loaded, no GPU and no second process is needed. The real classes are built on the meta device and sharded by
the trainers' own `training.shard` in a fake process group of that size: weights, gradients and optimizer state are
counted, not estimated. Activations are counted too: forward and backward of one micro-batch run on the meta device, and
every tensor is followed from its birth to its end. What FSDP holds for the units that run (gathered weights, gradients
on their way) is taken at its largest, so a plan is some 10 % above what a run needs (tests/test_plan.py measures one).

Not in the plan: CUDA itself and NCCL (1-2 GiB) and fragmentation. Of the sampler's KV cache it holds the least that a
run must have, the replies to one prompt; the sampler takes more where there is more.

Hours are an estimate. Counted: the FLOPs of sampling and learning, by the formula that the trainers log (model.Cost:
each prompt once, nothing that is computed again). Assumed: the share of the GPUs' peak that they reach, the same in all
phases (--mfu), replies as long as --mean-reply, pictures as large as allowed. Not in them: loading, saving, scoring.

Legend: a "unit" is what FSDP shards at a time (Policy.units), the "root" all weights outside them. Bytes everywhere.
"""

import argparse
import dataclasses
import functools
import importlib
import math
import os
import shlex
import subprocess
import sys
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention
import model
import training
from records import DataError
from training import DEFAULT_SHARDING, Sharding, integer, real

GIB = 2**30
CUDA_GIB = 2  # CUDA itself and NCCL
PEAK = 989.0  # TFLOP/s of bf16 by the data sheet of an H100; of an A100: 312
MFU = (0.08, 0.23)  # what EasyR1 reports of its 3B and 7B runs on eight H100
STAGES = ("grpo", "dpo", "distill", "eval")  # those that run a model

# ---------------------------------------------------------------------------------------------------------------------
# Models


@dataclass(frozen=True)
class Shape:
    """A published model: its decoder, and what differs in its vision tower."""

    model_type: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    vocabulary: int
    tied: bool  # whether the head is the embedding
    vision_mlp: int


SHAPES = {
    "2B": Shape("qwen2_vl", 1536, 28, 12, 2, 8960, 151936, True, 5120),
    "3B": Shape("qwen2_5_vl", 2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": Shape("qwen2_5_vl", 3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": Shape("qwen2_5_vl", 5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": Shape("qwen2_5_vl", 8192, 80, 64, 8, 29568, 152064, False, 3456),
}
# Hub ids that a command may name; nothing is downloaded to plan for them.
HUB = {"Qwen/Qwen2-VL-2B": "2B", "Qwen/Qwen2-VL-2B-Instruct": "2B"}
HUB |= {f"Qwen/Qwen2.5-VL-{size}-Instruct": size for size in ("3B", "7B", "32B", "72B")}


def folder_of(name: str) -> str:
    """A model directory to build `name` from: a published size or hub id, or a directory. DataError for others."""
    size = HUB.get(name, name)
    if size in SHAPES:
        return published(size).name
    if not (Path(name) / "config.json").is_file():
        raise DataError(f"{name}: neither a model directory nor one of {', '.join([*SHAPES, *HUB])}")
    return name


@functools.cache
def published(size: str) -> tempfile.TemporaryDirectory:
    """A directory with the config of a published size. Its tokenizer is the tiny model's: no weight depends on it."""
    from transformers import AutoConfig

    from toy.tiny_model import QWEN_MARKS, make_tokenizer, qwen_image_processor

    shape = SHAPES[size]
    tokenizer = make_tokenizer(QWEN_MARKS, "primer", 0)
    picture, video = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])
    text = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    if shape.model_type == "qwen2_vl":
        vision = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "hidden_size": shape.hidden}
        vision["mlp_ratio"] = shape.vision_mlp // 1280
    else:
        vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": shape.vision_mlp}
        vision |= {"out_hidden_size": shape.hidden, "fullatt_block_indexes": [7, 15, 23, 31]}
    ids = {"image_token_id": picture, "video_token_id": video, "tie_word_embeddings": shape.tied}
    config = AutoConfig.for_model(shape.model_type, text_config=text, vision_config=vision, **ids)

    folder = tempfile.TemporaryDirectory(prefix="plan-")
    for part in (config, tokenizer, qwen_image_processor(patch=14)):
        part.save_pretrained(folder.name)
    return folder


def bare_policy(
    folder: str, dtype: torch.dtype, *, bf16: bool, freeze_vision: bool = False, checkpointing: bool = True
) -> model.Policy:
    """A policy on the meta device, as model.load makes it for training, but not sharded yet."""
    policy, _ = model.build(folder, dtype, flash=bf16, half=bf16, trains=True)
    hf, family = policy.hf, policy.family
    family.use_kernels(hf, windows=True)
    if freeze_vision:
        for part in family.vision(hf):
            part.requires_grad_(False)
    if checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        hf.train()
    return policy


# ---------------------------------------------------------------------------------------------------------------------
# What one micro-batch holds


class LiveBytes(TorchDispatchMode):
    """Bytes of all meta tensors that are alive, now and at most, of those made while it is on; weights are not."""

    def __init__(self, weights):
        super().__init__()
        self.now = self.most = 0
        self.known = {weight.untyped_storage()._cdata for weight in weights}  # views of them are made all the time
        self.outputs = {}  # what an operator gave before, for arguments of these shapes: [(size, stride, dtype)]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves, structure = tree_flatten((args, kwargs or {}))
        if any(map(self.is_meta, leaves)):  # the tower mixes in indices that it computes on the CPU
            leaves = [leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        out = self.run(function, leaves, structure)
        for tensor in filter(self.is_meta, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def run(self, function, leaves, structure):
        """What `function` gives. A model is the same layer many times, and operators on the meta device are slow: one
        that makes a new tensor is run once for arguments of the same shapes."""
        described = [self.describe(leaf) for leaf in leaves]
        key = function, structure, tuple(described)
        if key in self.outputs:
            return torch.empty_strided(*self.outputs[key][:2], dtype=self.outputs[key][2], device="meta")
        args, kwargs = tree_unflatten(leaves, structure)
        out = function(*args, **kwargs)
        aliases = [value.alias_info for value in (*function._schema.arguments, *function._schema.returns)]
        if self.is_meta(out) and not any(aliases):
            self.outputs[key] = out.shape, out.stride(), out.dtype
        return out

    @staticmethod
    def describe(leaf):
        if not isinstance(leaf, torch.Tensor):
            return type(leaf), leaf
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device

    @staticmethod
    def is_meta(thing):
        return isinstance(thing, torch.Tensor) and thing.device.type == "meta"

    def free(self, name, size):
        self.known.discard(name)
        self.now -= size


@functools.cache
def activations(
    folder: str, *, bf16: bool, groups: int, prompt: int, image: int, replies: int, reply: int, chunk_bytes: int,
    freeze_vision: bool, checkpointing: bool,
) -> int:  # fmt: skip
    """Bytes that forward and backward of one micro-batch hold at most beside weights and gradients.

    groups of `replies` replies of `reply` tokens each to a prompt of `prompt` tokens, `image` of them a picture's.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    policy = bare_policy(folder, dtype, bf16=bf16, freeze_vision=freeze_vision, checkpointing=checkpointing)
    hf, family = policy.hf, policy.family
    decoder = family.decoder(hf)
    for weight in policy.parameters():
        if weight.requires_grad:  # FSDP takes a gradient away as soon as it is there
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))

    fed = reply - 1
    sizes = [prompt] * groups, [fed] * groups * replies, [fed * replies] * groups
    layout = attention.Layout(*map(attention.Segments.of, sizes), flash=bf16)
    length, read = groups * (prompt + replies * fed), groups * (1 + replies * fed)
    axes = family.position_axes
    with LiveBytes(policy.parameters()) as live:
        words = torch.zeros(1, length - groups * image, dtype=torch.long, device="meta")
        parts = [decoder.embed_tokens(words)]
        if image:
            parts = [*picture_features(policy, groups, image), *parts]
        positions = torch.zeros(axes, 1, length, dtype=torch.long, device="meta")
        hidden = decoder(
            inputs_embeds=torch.cat(parts, 1),
            position_ids=family.position_ids(positions),
            attention_mask=policy.no_mask,
            use_cache=False,
            layout=layout,
        ).last_hidden_state[0, :read]
        row = torch.zeros(groups * replies * reply, dtype=torch.long, device="meta")
        rows = max(1, chunk_bytes // (4 * len(hf.lm_head.weight)))
        logp = model.TokenLogProbs.apply(hidden, hf.lm_head.weight, row, row, 1.0, policy.forbidden, rows)
        logp.sum().backward()
    return live.most


def picture_features(policy: model.Policy, pictures: int, image: int) -> list[torch.Tensor]:
    """What the decoder gets of `pictures` pictures of `image` tokens each: [(1, tokens, hidden)]."""
    # The smallest picture is one token. A wide one has as many patches as a square one of the same area.
    pixels, grids = policy.family.blank_picture("meta")
    pixels = pixels.repeat(pictures * image, *[1] * (pixels.ndim - 1))
    merge = policy.family.merge
    grids = torch.tensor([[1, merge, merge * image]]).repeat(pictures, 1)
    features, *_ = policy.family.picture_features(policy.hf, pixels, grids)
    return [features.reshape(1, -1, features.shape[-1])]


# ---------------------------------------------------------------------------------------------------------------------
# What a process holds


@dataclass(frozen=True)
class Weights:
    """What one process holds of the weights, in bytes."""

    master: int  # its fp32 shards
    trained: int  # those of them that learn
    whole_gradient: int  # fp32, of the whole model
    largest: int  # fp32, the largest weight
    gathered: int  # the whole model in compute type
    root: int  # the root in compute type
    units: tuple[int, int]  # the two largest units in compute type


@functools.cache
def held(folder: str, size: int, *, sharding: Sharding, bf16: bool, freeze_vision: bool) -> Weights:
    """What each of `size` processes holds. DataError if --replicas does not divide them."""
    if size % sharding.replicas:
        raise DataError(f"--replicas {sharding.replicas} does not divide the {size} process(es)")
    policy = bare_policy(folder, torch.float32, bf16=bf16, freeze_vision=freeze_vision)
    weights = list(policy.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    unit_sizes = [sum(weight.numel() for weight in unit.parameters()) for unit in policy.units()]
    whole = sum(weight.numel() for weight in weights)
    whole_trained = sum(weight.numel() for weight in trained)
    largest = max(weight.numel() for weight in weights)
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        world = training.World(0, size, torch.device("cpu"))
        training.shard(policy, world, torch.bfloat16 if bf16 else None, dataclasses.replace(sharding, offload=False))
        dist.destroy_process_group()
        weights = list(policy.parameters())  # sharding has put others in their place
        trained = [weight for weight in weights if weight.requires_grad]

    def shard_bytes(tensors):
        return 4 * sum(tensor.to_local().numel() if size > 1 else tensor.numel() for tensor in tensors)

    width = 2 if bf16 else 4
    return Weights(
        master=shard_bytes(weights),
        trained=shard_bytes(trained),
        whole_gradient=4 * whole_trained,
        largest=4 * largest,
        gathered=width * whole,
        root=width * (whole - sum(unit_sizes)),  # embeddings, last norm, head: gathered all the way
        units=tuple(width * unit for unit in sorted(unit_sizes)[:-3:-1]),
    )


@functools.cache
def cache_bytes(folder: str, bf16: bool) -> int:
    """Bytes of KV cache that one token takes."""
    policy = bare_policy(folder, torch.float32, bf16=bf16)
    layers = policy.family.decoder(policy.hf).layers
    return 2 * len(layers) * layers[0].self_attn.k_proj.out_features * (2 if bf16 else 4)


@functools.cache
def patches_per_token(folder: str) -> int:
    """Patches that make up an image token."""
    return bare_policy(folder, torch.float32, bf16=True).family.merge ** 2


def plan(
    folder: str, size: int, *, sharding: Sharding = DEFAULT_SHARDING, bf16=True, kl=False, freeze_vision=False,
    checkpointing=True, sampler="builtin", vllm_tp=1, vllm_memory=0.4, awake=False, micro_tokens=16384,
    chunk_bytes=2**29, prompt=400, image=324, group=8, reply=512, micros=2, gpu_gib=80.0,
) -> dict[str, dict[str, int]]:  # fmt: skip
    """Bytes on each of `size` GPUs, as {"always": {…}, "learn": {…}, "sample": {…}}: the last two come on top of the
    first.

    prompt, image, reply: tokens of a prompt, image tokens among them, tokens of a reply; group: replies per prompt.
    sampler: "builtin", "vllm" or "none". awake: vLLM samples while the policy learns. micros: micro-batches an update.
    """
    weights = held(folder, size, sharding=sharding, bf16=bf16, freeze_vision=freeze_vision)
    width = 2 if bf16 else 4
    cast = size > 1 or bf16  # otherwise the fp32 master weights themselves are used

    always = {"fp32 master weights": weights.master, "AdamW's two moments": 2 * weights.trained}
    if kl:
        always["reference, fp32 shards"] = weights.master
    trained = weights.trained
    if sharding.offload:  # to main memory; a unit's gradient still passes through the GPU
        always, trained = dict.fromkeys(always, 0), 0

    learn = {}
    if cast and sharding.mode == "full":
        learn["gathered weights of the units that run"] = weights.root + sum(weights.units)
    elif cast:
        learn["gathered weights"] = weights.gathered
    if kl and cast:  # its root stays gathered between micro-batches, and with --shard none all of it
        all_of_it = sharding.mode == "none"
        learn["gathered weights of the reference"] = weights.gathered if all_of_it else weights.root
    if (size > 1 or sharding.offload) and sharding.accumulate == "whole" and micros > 1:  # what leaves it is sharded
        learn["whole gradient between micro-batches"] = weights.whole_gradient
        learn["gradient of a unit on its way"] = weights.units[0] * 4 // width
    else:
        learn["gradients"] = trained
        if size > 1:
            learn["gradients of two units on their way"] = sum(weights.units) * (width + 4) // width

    one = prompt + patches_per_token(folder) * image + group * (reply - 1)
    groups = max(1, micro_tokens // one)  # a group is never divided
    learn[f"activations, {groups} group(s) of {prompt} + {group} x {reply} tokens at a time"] = activations(
        folder, bf16=bf16, groups=groups, prompt=prompt, image=image, replies=group, reply=reply,
        chunk_bytes=chunk_bytes, freeze_vision=freeze_vision, checkpointing=checkpointing,
    )  # fmt: skip

    sample = {}
    if sampler == "builtin":
        if cast:
            sample["all weights gathered to decode"] = weights.gathered
        sample["KV cache of one prompt's replies, at least"] = cache_bytes(folder, bf16) * (prompt + group * reply)
    elif sampler == "vllm":
        sample["vLLM's share of the GPU, or the least it needs"] = vllm_bytes(
            folder, weights.gathered, vllm_tp, vllm_memory * gpu_gib * GIB, bf16, prompt + reply
        )
        sample["the largest weight, whole, on its way to vLLM"] = weights.largest
        if awake:
            learn["vLLM, which samples meanwhile"] = next(iter(sample.values()))
    return {"always": always, "learn": learn, "sample": sample}


def vllm_bytes(folder, weights, tp, share, bf16, tokens) -> int:
    """Bytes of a vLLM engine: the share it is given, or, if that is too little, weights and one reply's KV cache."""
    least = (weights + cache_bytes(folder, bf16) * tokens) // tp
    return max(int(share), least + 2 * GIB)  # 2 GiB: its activations and graphs, as a rule


# ---------------------------------------------------------------------------------------------------------------------
# A stage's command line


def parse_command(command: str) -> tuple[str, argparse.Namespace, int]:
    """(stage, its parsed flags, processes) of `[torchrun …] grpo.py …` or `python grpo.py …`. DataError for others.

    The flags go through the stage's own parser: a flag that it does not have ends the program as it would there.
    """
    words = shlex.split(command.replace("\\\n", " "), comments=True)
    scripts = [number for number, word in enumerate(words) if word.endswith(".py")]
    if not scripts:
        raise DataError(f"no stage is named in: {command}")
    before, script, flags = words[: scripts[0]], words[scripts[0]], words[scripts[0] + 1 :]
    stage = Path(script).stem
    if stage not in STAGES:
        raise DataError(f"{script}: no stage that runs a model")
    args = importlib.import_module(stage).parse_args(flags)
    launcher = training.Parser("torchrun")
    launcher.add_argument("--nproc_per_node", "--nproc-per-node", type=integer("[1, 1e5]"), default=1)
    launcher.add_argument("--nnodes", type=integer("[1, 1e5]"), default=1)
    launched, _ = launcher.parse_known_args(before)
    return stage, args, launched.nproc_per_node * launched.nnodes


@functools.cache
def largest_picture(folder: str, max_pixels: int) -> int:
    """The most image tokens that a picture of max_pixels takes, of shapes between 1:1 and 2:1."""
    _, encoder = model.build(folder, torch.float32, max_pixels)
    family, most = encoder.family, 0
    for number in range(41):
        root = 2 ** (number / 80)  # of the ratio of its sides
        side = math.sqrt(max_pixels)
        grid = family.grid(round(side * root), round(side / root))
        most = max(most, family.tokens_per_picture(grid))
    return most


def judge(
    command: str, gpu_gib: float = 80.0, *, models: dict[str, str] | None = None,
    words: int = 76, image: int = 324, reply: int = 512,
) -> tuple[bool, float, str]:  # fmt: skip
    """Whether a stage's command line fits: -> (fits, GiB on each GPU, why).

    models: what stands for a --model that is not there yet, such as {"runs/zero": "7B"}. A prompt is taken to be
    `words` tokens of text and a picture of --max-pixels; without that flag, of `image` tokens. reply: tokens of a
    pair's replies, for dpo.py, which has no flag for it. Of distill.py the policy is planned, the base where the
    policy is behind a server. A --judge of this machine is not counted. A run fits if CUDA_GIB stay free. DataError as
    for parse_command, and for a model that nobody knows.
    """
    stage, args, gpus = parse_command(command)
    name, folder = model_of(stage, args, models)
    if args.max_pixels:
        image = largest_picture(folder, args.max_pixels)
    bf16 = args.dtype != "fp32"  # auto is bf16 on a GPU
    prompt = words + image
    if stage in ("distill", "eval"):
        parts = plan_inference(folder, args, bf16, prompt, gpu_gib)
        lengths = f"{args.samples} replies of {args.max_new_tokens} tokens"
    else:
        settings, lengths = training_settings(stage, args, gpus, reply)
        parts = plan(folder, gpus, bf16=bf16, prompt=prompt, image=image, gpu_gib=gpu_gib, **settings)

    sums = {part: sum(rows.values()) / GIB for part, rows in parts.items()}
    peaks = {part: sums["always"] + sums[part] for part in ("learn", "sample") if parts.get(part)}
    phase = max(peaks, key=peaks.get)
    fits = peaks[phase] <= gpu_gib - CUDA_GIB
    largest = sorted({**parts["always"], **parts[phase]}.items(), key=lambda row: -row[1])[:3]
    explanation = f"{stage}.py, {name}, {gpus} GPU(s), prompts of {prompt} tokens ({image} of a picture), {lengths}: "
    explanation += f"{peaks[phase]:.1f} GiB in phase {phase} of {gpu_gib:g} less {CUDA_GIB} for CUDA; most of it: "
    explanation += "; ".join(f"{size / GIB:.1f} {what}" for what, size in largest)
    return fits, peaks[phase], explanation


def model_of(stage: str, args: argparse.Namespace, models: dict[str, str] | None) -> tuple[str, str]:
    """(what a stage's flags call its model, a directory to build it from). models: as for `judge`."""
    if stage == "distill":  # a policy behind a server takes no memory here
        name = str(args.base if args.policy_url or not args.policy else args.policy)
    else:
        name = str(args.model)
    return name, folder_of((models or {}).get(name, name))


def training_settings(stage: str, args: argparse.Namespace, gpus: int, reply: int) -> tuple[dict, str]:
    """Arguments of `plan` that a training stage's flags give, and the lengths in words."""
    settings = {
        "sharding": Sharding(args.shard, args.replicas, args.offload, args.accumulate),
        "freeze_vision": args.freeze_vision,
        "checkpointing": args.gradient_checkpointing != "off",  # auto is on on a GPU
        "micro_tokens": args.micro_tokens or 16384,
    }
    if stage == "dpo":
        replies = 1 if args.loss == "sft" else 2
        return settings | {"sampler": "none", "group": replies, "reply": reply}, f"{replies} replies of {reply} tokens"
    if args.prompts % gpus:
        raise DataError(f"--prompts {args.prompts} cannot be dealt evenly to {gpus} processes")
    settings |= {
        "kl": args.kl > 0,
        "group": args.group,
        "reply": args.max_new_tokens,
        "sampler": args.sampler,
        "vllm_tp": args.vllm_tp,
        "vllm_memory": args.vllm_memory,
        "awake": args.one_step_off_policy,
    }
    return settings, f"{args.group} replies of {args.max_new_tokens} tokens"


@functools.cache
def number_of_weights(folder: str) -> int:
    return sum(weight.numel() for weight in bare_policy(folder, torch.float32, bf16=True).parameters())


def plan_inference(folder: str, args: argparse.Namespace, bf16: bool, prompt: int, gpu_gib: float) -> dict:
    """As `plan`, for a stage that only samples: every process holds the whole model."""
    width = 2 if bf16 else 4
    numbers = number_of_weights(folder)
    always = {"weights": width * numbers}
    if args.sampler == "vllm":
        share = args.vllm_memory * gpu_gib * GIB
        tokens = prompt + args.max_new_tokens
        return {"always": always, "sample": {"vLLM": vllm_bytes(folder, width * numbers, 1, share, bf16, tokens)}}
    replies = cache_bytes(folder, bf16) * (prompt + args.samples * args.max_new_tokens)
    return {"always": always, "sample": {"KV cache of one prompt's replies, at least": replies}}


# ---------------------------------------------------------------------------------------------------------------------
# Hours


class Lengths(NamedTuple):
    """A prompt as model.Cost looks at it."""

    ids: range
    grids: torch.Tensor | None


@functools.cache
def cost_of(folder: str, freeze_vision: bool) -> model.Cost:
    return model.Cost(bare_policy(folder, torch.float32, bf16=True, freeze_vision=freeze_vision))


def group_of(cost: model.Cost, prompt: int, image: int, replies: int, reply: int) -> tuple[Lengths, list[range]]:
    """A prompt of `prompt` tokens, `image` of them a nearly square picture's; its replies of `reply` tokens each."""
    grids = None
    if image:
        rows = math.isqrt(image)
        grids = cost.family.merge * torch.tensor([[0, rows, round(image / rows)]])
        grids[0, 0] = 1
    return Lengths(range(prompt), grids), [range(reply)] * replies


def work(
    command: str, *, models: dict[str, str] | None = None, words: int = 76, image: int = 324, reply: int = 512,
    mean_reply: int = 0, records: int = 0,
) -> float | None:  # fmt: skip
    """FLOPs of a stage's command line, on all its GPUs together; None if they depend on a number of records not given.

    models, words, image, reply: as for `judge`. mean_reply: tokens of a reply; 0: as many as are allowed. records: how
    many a stage reads that has no --steps and no --limit.
    """
    stage, args, _ = parse_command(command)
    folder = model_of(stage, args, models)[1]
    if args.max_pixels:
        image = largest_picture(folder, args.max_pixels)
    cost = cost_of(folder, getattr(args, "freeze_vision", False))
    longest = reply if stage == "dpo" else args.max_new_tokens
    length = min(mean_reply or longest, longest)

    def forward(replies):
        return sum(cost.forward([group_of(cost, words + image, image, replies, length)]))

    def learn(replies, reference=False):
        return cost.learn([group_of(cost, words + image, image, replies, length)], reference)

    if stage == "grpo":
        one = forward(args.group) + args.updates * learn(args.group, reference=args.kl > 0)
        return args.steps * args.prompts * one
    if stage == "dpo":
        pairs = args.steps * args.batch or records
        # The reference looks at each pair once.
        return pairs * (learn(1) if args.loss == "sft" else learn(2) + forward(2)) or None
    questions = args.limit or records
    runs = (args.policy is not None) + (args.reject_from == "base") if stage == "distill" else 1
    return runs * questions * forward(args.samples) or None


def hours_of(flops: float | None, gpus: int, peak: float, mfu: float | None) -> tuple[float, float] | None:
    """(least, most) hours; None if the work is not known. peak: TFLOP/s of a GPU. mfu: the share of it, None: MFU."""
    if flops is None:
        return None
    alone = flops / (gpus * peak * 1e12) / 3600
    return (alone / MFU[1], alone / MFU[0]) if mfu is None else (alone / mfu, alone / mfu)


def in_hours(hours: tuple[float, float] | None) -> str:
    if hours is None:
        return "hours depend on --records"
    least, most = (f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in hours)
    return f"{least} hours" if least == most else f"{least} to {most} hours"


# ---------------------------------------------------------------------------------------------------------------------
# Recipes


def commands_of(recipe: str, arguments: list[str]) -> list[str]:
    """The stages' command lines that a recipe would run: it runs with a python and a torchrun that only write theirs
    down, in an empty folder. DataError if it fails even so."""
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        noted = Path(folder) / "commands"
        for name in ("python", "torchrun"):
            stub = Path(folder) / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f'#!/usr/bin/env bash\nprintf "%q " {name} "$@" >> {noted}\necho >> {noted}\n')
            stub.chmod(0o755)
        environment = os.environ | {"PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", str(Path(recipe).resolve()), *arguments]
        done = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise DataError(f"{recipe}: ends with status {done.returncode} ({last})")
        lines = noted.read_text().splitlines() if noted.exists() else []
    found = []
    for line in lines:
        words = shlex.split(line)
        script = next((Path(word).stem for word in words if word.endswith(".py")), "")
        # a report runs no model, nor do gold answers without a rejected reply
        without_model = "--report" in words or {"--gold", "none"} <= set(words)
        if script in STAGES and not without_model:
            found.append(line)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The command


def parse_args(argv=None):
    parser = training.Parser(__doc__, commands=("--command",))
    add = parser.add_argument
    add("model", nargs="?", help=f"a model directory, or a published size: {', '.join(SHAPES)}")
    add("--command", help="judge this command line of a stage, in quotes, instead of the flags below")
    add("--recipe", nargs="+", metavar="FILE", help="judge every stage that this recipe, given these words, would run")
    add("--as", nargs=2, action="append", default=[], dest="models", metavar=("NAME", "MODEL"),
        help="with --command: what stands for a model that is not there yet")  # fmt: skip
    add("--gpus", type=integer("[1, 1e5]"), default=8, help="processes, one a GPU, over all nodes")
    add("--gpu-gib", type=real("[1, 1e6]"), default=80.0, help="GiB of a GPU")
    add("--shard", default="full", choices=["full", "grad", "none"], help="as in grpo.py")
    add("--replicas", type=integer("[1, 1e5]"), default=1, help="as in grpo.py")
    add("--offload", action="store_true", help="as in grpo.py")
    add("--accumulate", default="whole", choices=["whole", "shards"], help="as in grpo.py")
    add("--kl", action="store_true", help="with a reference model (grpo.py --kl above 0)")
    add("--freeze-vision", action="store_true", help="as in grpo.py")
    add("--gradient-checkpointing", default="on", choices=["on", "off"], help="as in grpo.py")
    add("--dtype", default="bf16", choices=["fp32", "bf16"], help="as in grpo.py")
    add("--sampler", default="builtin", choices=["builtin", "vllm", "none"], help="as in grpo.py; none: dpo.py")
    add("--vllm-tp", type=integer("[1, 1024]"), default=1, help="as in grpo.py: GPUs that share one vLLM")
    add("--vllm-memory", type=real("(0, 1)"), default=0.4, help="as in grpo.py")
    add("--micro-tokens", type=integer("[1, 1e9]"), default=16384, help="tokens and patches per forward")
    add("--prompt", type=integer("[1, 1e7]"), default=400, help="tokens of a prompt, image tokens included")
    add("--image", type=integer("[0, 1e7]"), default=324, help="image tokens among them")
    add("--group", type=integer("[1, 1e5]"), default=8, help="replies per prompt (2: a DPO pair)")
    add("--reply", type=integer("[1, 1e7]"), default=512, help="tokens of a reply; of a pair's longest, in a recipe")
    add("--mean-reply", type=integer("[0, 1e7]"), default=0,
        help="for hours: tokens of a reply on the mean; 0: as many as are allowed")  # fmt: skip
    add("--records", type=integer("[0, 1e9]"), default=0,
        help="for hours: how many a stage reads that has no --steps and no --limit; 0: unknown")  # fmt: skip
    add("--peak", type=real("[1, 1e6]"), default=PEAK, help="for hours: TFLOP/s of a GPU in bf16, by its data sheet")
    add("--mfu", type=real("(0, 1]"),
        help=f"for hours: the share of the peak that is reached (default: {MFU[0]} to {MFU[1]}, EasyR1's)")  # fmt: skip
    args = parser.parse_args(argv)
    if sum(thing is not None for thing in (args.model, args.command, args.recipe)) != 1:
        parser.error("one of a model, --command and --recipe must be given")
    if args.image > args.prompt:
        parser.error("--image must be at most --prompt")
    return args


def print_plan(args: argparse.Namespace) -> None:
    """The plan of a model and flags, line by line, and whether it fits."""
    names = "kl", "freeze_vision", "sampler", "vllm_tp", "vllm_memory", "micro_tokens"
    settings = {name: getattr(args, name) for name in (*names, "prompt", "image", "group", "reply", "gpu_gib")}
    settings |= {"bf16": args.dtype == "bf16", "checkpointing": args.gradient_checkpointing == "on"}
    settings["sharding"] = Sharding(args.shard, args.replicas, args.offload, args.accumulate)
    parts = plan(folder_of(args.model), args.gpus, **settings)
    print(f"{args.model} on {args.gpus} GPU(s), GiB on each:")
    for part, rows in parts.items():
        for name, size in rows.items():
            print(f"  {part:7s} {size / GIB:8.2f}  {name}")
    sums = {part: sum(rows.values()) / GIB for part, rows in parts.items()}
    learn, sample = sums["always"] + sums["learn"], sums["always"] + sums["sample"]
    print(f"  peak    {learn:8.2f}  while learning")
    if parts["sample"]:
        print(f"          {sample:8.2f}  while sampling")
    verdict = "fits into" if max(learn, sample) <= args.gpu_gib - CUDA_GIB else "does NOT fit into"
    print(f"  {verdict} {args.gpu_gib:g} GiB less {CUDA_GIB} for CUDA itself")


def judge_all(commands: list[str], args: argparse.Namespace, models: dict[str, str]) -> bool:
    """Print the verdict on each command: -> whether all fit. What is trained is as large as what it began from."""
    models, all_fit, known = dict(models), True, []
    for command in commands:
        fits, _, explanation = judge(command, args.gpu_gib, models=models, reply=args.reply)
        all_fit &= fits
        stage, flags, gpus = parse_command(command)
        lengths = {"reply": args.reply, "mean_reply": args.mean_reply, "records": args.records}
        hours = hours_of(work(command, models=models, **lengths), gpus, args.peak, args.mfu)
        known += [hours] if hours else []
        print(f"{'fits' if fits else 'does NOT fit'}: {explanation}; {in_hours(hours)}")
        if stage in ("grpo", "dpo"):
            models[flags.out] = models.get(flags.model, flags.model)
    if len(commands) > 1 and known:
        least, most = map(sum, zip(*known, strict=True))
        print(f"in all: {in_hours((least, most))}, of {len(known)} of {len(commands)} stages")
    return all_fit


def main(argv=None):
    args = parse_args(argv)
    if args.model:
        print_plan(args)
    else:
        commands = [args.command] if args.command else commands_of(args.recipe[0], args.recipe[1:])
        if not judge_all(commands, args, dict(args.models)):
            sys.exit(1)


if __name__ == "__main__":
    training.run(main)
