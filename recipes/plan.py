"""How much memory does a run need on each GPU? Asked before anybody rents one.

    python recipes/plan.py 7B --gpus 8
    python recipes/plan.py 72B --gpus 64 --accumulate shards --sampler vllm --vllm-tp 8
    python recipes/plan.py runs/model --gpus 2 --micro-tokens 8192 --kl

Nothing is loaded, no GPU and no second process is needed. The real classes are built on the meta device and cut by the
trainers' own `shard_policy` in a fake process group of that size: weights, gradients and optimizer state are counted,
not estimated. Activations are counted too: forward and backward of one micro-batch run on the meta device, and every
tensor is followed from its birth to its end. What FSDP holds for the units that run (gathered weights, gradients on
their way) is taken at its largest, so a plan is some 10 % above what a run needs (tests/test_plan.py measures one).

Not in the plan: CUDA itself and NCCL (1-2 GiB), fragmentation, and the sampler's cache, which takes what is left.
"""

import argparse
import copy
import json
import sys
import tempfile
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attention
import model
import training
from records import DataError

# Qwen2.5-VL as published: hidden, layers, heads, kv heads, MLP, vocabulary, tied head, MLP of the vision tower
SHAPES = {
    "3B": (2048, 36, 16, 2, 11008, 151936, True, 3420),
    "7B": (3584, 28, 28, 4, 18944, 152064, False, 3420),
    "32B": (5120, 64, 40, 8, 27648, 152064, False, 3456),
    "72B": (8192, 80, 64, 8, 29568, 152064, False, 3456),
}


def config_of(name):
    """The config of a published size or of a model directory. DataError for anything else."""
    from transformers import AutoConfig

    if name not in SHAPES:
        if not (Path(name) / "config.json").is_file():
            raise DataError(f"{name}: neither a model directory nor one of {', '.join(SHAPES)}")
        return AutoConfig.from_pretrained(name)
    hidden, layers, heads, kv_heads, mlp, vocabulary, tied, tower_mlp = SHAPES[name]
    text = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary}
    text |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp, "max_position_embeddings": 128000}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": tower_mlp}
    vision |= {"out_hidden_size": hidden, "fullatt_block_indexes": [7, 15, 23, 31]}
    with tempfile.TemporaryDirectory() as folder:  # through JSON, as from the hub
        whole = {"model_type": "qwen2_5_vl", "text_config": text, "vision_config": vision, "tie_word_embeddings": tied}
        (Path(folder) / "config.json").write_text(json.dumps(whole))
        return AutoConfig.from_pretrained(folder)


def bare_policy(config, dtype, *, bf16, freeze_vision=False, recompute=True):
    """A Policy on the meta device, as load makes it for training."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        hf = AutoModelForImageTextToText.from_config(copy.deepcopy(config), dtype=dtype, attn_implementation="sdpa")
        policy = model.Policy(hf, [], [0], flash=bf16, half=bf16)
    m.use_our_kernels(hf, tower=True)
    hf.model.visual.requires_grad_(not freeze_vision)
    if recompute:
        hf.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        hf.train()
    return policy


class Live(TorchDispatchMode):
    """Bytes of all meta tensors that are alive, now and at most, of those made while it is on; weights are not."""

    def __init__(self, weights):
        super().__init__()
        self.now = self.most = 0
        self.known = {weight.untyped_storage()._cdata for weight in weights}  # views of them are made all the time

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = args, kwargs or {}
        if any(map(self.is_meta, tree_leaves(given))):  # the tower mixes in indices that it computes
            given = tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf, given)
        out = function(*given[0], **given[1])
        for tensor in filter(self.is_meta, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.known:
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    @staticmethod
    def is_meta(thing):
        return isinstance(thing, torch.Tensor) and thing.device.type == "meta"

    def free(self, name, size):
        self.known.discard(name)
        self.now -= size


def activations(config, *, bf16, groups, prompt, image, replies, reply, chunk_bytes, freeze_vision, recompute):
    """Bytes that forward and backward of one micro-batch hold at most beside weights and gradients.

    groups of `replies` replies of `reply` tokens each to a prompt of `prompt` tokens, `image` of them a picture's.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    policy = bare_policy(config, dtype, bf16=bf16, freeze_vision=freeze_vision, recompute=recompute)
    hf, vision = policy.hf, config.vision_config
    for weight in policy.parameters():
        if weight.requires_grad:  # FSDP takes a gradient away as soon as it is there
            weight.register_post_accumulate_grad_hook(lambda weight: setattr(weight, "grad", None))
    merge = vision.spatial_merge_size
    sides = torch.tensor([[1, merge, merge * image]]).repeat(groups, 1)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    fed = reply - 1
    sizes = [prompt] * groups, [fed] * groups * replies, [fed * replies] * groups
    layout = attention.Layout(*map(attention.Segments.of, sizes), flash=bf16)
    length, read = groups * (prompt + replies * fed), groups * (1 + replies * fed)
    with Live(policy.parameters()) as live:
        words = torch.zeros(1, length - groups * image, dtype=torch.long, device="meta")
        text = hf.model.language_model.embed_tokens(words)
        parts = [text]
        if image:
            patches = torch.zeros(groups * image * merge**2, width, device="meta")
            out = hf.model.visual(patches, grid_thw=sides, return_dict=True)
            parts = [out.pooler_output[None], text]
        positions = torch.zeros(3, 1, length, dtype=torch.long, device="meta")
        hidden = hf.model.language_model(
            inputs_embeds=torch.cat(parts, 1), position_ids=positions, attention_mask=policy.no_mask, use_cache=False,
            layout=layout,
        ).last_hidden_state[0, :read]  # fmt: skip
        row = torch.zeros(groups * replies * reply, dtype=torch.long, device="meta")
        rows = max(1, chunk_bytes // (4 * len(hf.lm_head.weight)))
        logp = model.TokenLogProbs.apply(hidden, hf.lm_head.weight, row, row, 1.0, policy.forbidden, rows)
        logp.sum().backward()
    return live.most


def held(config, size, *, shard, replicas, bf16, freeze_vision):
    """What one of `size` processes holds of the weights, in bytes.

    "masters": its fp32 shards; "trained": those that learn. In compute type "gathered": the whole model, "root":
    the root unit, "units": the two largest others; in fp32 "whole gradient", and "largest": the largest weight.
    """
    policy = bare_policy(config, torch.float32, bf16=bf16, freeze_vision=freeze_vision)
    hf, width = policy.hf, 2 if bf16 else 4
    units = [*hf.model.language_model.layers, hf.model.visual]
    sizes = [sum(weight.numel() for weight in unit.parameters()) for unit in units]
    whole = sum(weight.numel() for weight in policy.parameters())
    largest = 4 * max(weight.numel() for weight in policy.parameters())
    root = whole - sum(sizes)  # embeddings, last norm, head: gathered all the way
    if size > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
        world = training.World(0, size, torch.device("cpu"))
        training.shard(policy, world, torch.bfloat16 if bf16 else None, shard, replicas)
        dist.destroy_process_group()

    def shards(weights):
        return 4 * sum(weight.to_local().numel() if size > 1 else weight.numel() for weight in weights)

    out = {"masters": shards(policy.parameters()), "trained": shards(w for w in policy.parameters() if w.requires_grad)}
    out |= {"gathered": width * whole, "root": width * root, "units": [width * x for x in sorted(sizes)[:-3:-1]]}
    out["largest"] = largest
    out["whole gradient"] = 4 * sum(weight.numel() for weight in policy.parameters() if weight.requires_grad)
    return out


def plan(
    config, size, *, shard="full", replicas=1, offload=False, accumulate="whole", bf16=True, kl=False,
    freeze_vision=False, recompute=True, sampler="builtin", vllm_tp=1, micro_tokens=16384, chunk_bytes=2**29,
    prompt=400, image=324, group=8, reply=512, micros=2,
):  # fmt: skip
    """Bytes on each GPU, as {"always": {…}, "learn": {…}, "sample": {…}}: the last two come on top of the first."""
    weights = held(config, size, shard=shard, replicas=replicas, bf16=bf16, freeze_vision=freeze_vision)
    one = prompt + config.vision_config.spatial_merge_size**2 * image + group * (reply - 1)
    groups = max(1, micro_tokens // one)
    always = {"fp32 master weights": weights["masters"], "AdamW's two moments": 2 * weights["trained"]}
    if kl:
        always["reference, fp32 shards"] = weights["masters"]
    if offload:  # to main memory; a unit's gradient still passes through the GPU
        always, weights["trained"] = dict.fromkeys(always, 0), 0
    cast = size > 1 or bf16  # else the masters themselves are used
    units = weights["root"] + (weights["gathered"] - weights["root"] if shard != "full" else sum(weights["units"]))
    learn = {"gathered weights of the units that run": units if cast else 0}
    if kl and cast:  # its root stays gathered between micro-batches, and with --shard none all of it
        learn["gathered weights of the reference"] = weights["gathered" if shard == "none" else "root"]
    width = 2 if bf16 else 4
    if (size > 1 or offload) and accumulate == "whole" and micros > 1:  # what leaves it becomes shards
        learn["whole gradient between micro-batches"] = weights["whole gradient"]
        learn["gradient of a unit on its way"] = weights["units"][0] * 4 // width
    else:
        learn["gradients"] = weights["trained"]
        if size > 1:
            learn["gradients of two units on their way"] = sum(weights["units"]) * (width + 4) // width
    learn[f"activations, {groups} group(s) of {prompt} + {group} x {reply} tokens at a time"] = activations(
        config, bf16=bf16, groups=groups, prompt=prompt, image=image, replies=group, reply=reply,
        chunk_bytes=chunk_bytes, freeze_vision=freeze_vision, recompute=recompute,
    )  # fmt: skip
    sample = {}
    if sampler == "builtin" and cast:
        sample["all weights gathered to decode"] = weights["gathered"]
    elif sampler == "vllm":
        sample["vLLM's own copy of the weights, asleep while learning"] = weights["gathered"] // vllm_tp
        sample["the largest weight, whole, on its way to vLLM"] = weights["largest"]
    return {"always": always, "learn": learn, "sample": sample}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("model", help=f"a model directory, or a published size of Qwen2.5-VL: {', '.join(SHAPES)}")
    add("--gpus", type=int, default=8, help="processes, one a GPU, over all nodes")
    add("--room", type=float, default=80.0, help="GiB of a GPU")
    add("--shard", default="full", choices=["full", "grad", "none"], help="as in grpo.py")
    add("--replicas", type=int, default=1, help="as in grpo.py")
    add("--offload", action="store_true", help="as in grpo.py")
    add("--accumulate", default="whole", choices=["whole", "shards"], help="as in grpo.py")
    add("--kl", action="store_true", help="with a reference model (grpo.py --kl above 0)")
    add("--freeze-vision", action="store_true", help="as in grpo.py")
    add("--recompute", default="on", choices=["on", "off"], help="as in grpo.py")
    add("--dtype", default="bf16", choices=["fp32", "bf16"], help="as in grpo.py")
    add("--sampler", default="builtin", choices=["builtin", "vllm", "none"], help="as in grpo.py; none: dpo.py")
    add("--vllm-tp", type=int, default=1, help="as in grpo.py: GPUs that share one vLLM")
    add("--micro-tokens", type=int, default=16384, help="tokens and patches per forward")
    add("--prompt", type=int, default=400, help="tokens of a prompt, image tokens included")
    add("--image", type=int, default=324, help="image tokens among them")
    add("--group", type=int, default=8, help="replies per prompt (2: a DPO pair)")
    add("--reply", type=int, default=512, help="tokens of a reply")
    args = parser.parse_args(argv)
    for name in ("gpus", "replicas", "vllm_tp", "micro_tokens", "prompt", "group", "reply"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if not 0 <= args.image <= args.prompt:
        parser.error("--image must be between 0 and --prompt")
    return args


def main(argv=None):
    args = parse_args(argv)
    names = "shard", "replicas", "offload", "accumulate", "kl", "freeze_vision", "sampler", "vllm_tp", "micro_tokens"
    settings = {name: getattr(args, name) for name in (*names, "prompt", "image", "group", "reply")}
    settings |= {"bf16": args.dtype == "bf16", "recompute": args.recompute == "on"}
    out = plan(config_of(args.model), args.gpus, **settings)
    print(f"{args.model} on {args.gpus} GPU(s), GiB on each:")
    for part, rows in out.items():
        for name, size in rows.items():
            print(f"  {part:7s} {size / 2**30:8.2f}  {name}")
    sums = {part: sum(rows.values()) / 2**30 for part, rows in out.items()}
    learn, sample = sums["always"] + sums["learn"], sums["always"] + sums["sample"]
    print(f"  peak    {learn:8.2f}  while learning")
    if out["sample"]:
        print(f"          {sample:8.2f}  while sampling, and the cache of the replies")
    verdict = "fits into" if max(learn, sample) < args.room - 2 else "does NOT fit into"
    print(f"  {verdict} {args.room:g} GiB less 2 for CUDA itself")


if __name__ == "__main__":
    training.run(main)
