"""One GPU: is it right, and how fast is it? The stages that gpu.sh runs one after the other.

    bash bench/gpu.sh                               # all of them, under nine minutes on one H200
    python bench/gpu.py learn --out bench/results   # one stage; "show": the tables of gpu.json
    bash bench/gpu.sh DIR --smoke                   # tiny shapes on any machine: does this file run?

    attention   our attention against the textbook, value and gradient, fp32 and bf16
    check       a small model, loaded as grpo.py loads it, against transformers alone; the sampler too
    learn       Qwen2.5-VL-3B's shape, random weights: forward, backward and AdamW, ours against the copied layout
    sample      the same shape: replies of a fixed length, against generate()
    step        grpo.py's own main, whole steps; and a profile of their two halves
    trl         TRL's GRPOTrainer on the same shape, where TRL is installed

Every row goes to OUT/gpu.json when it is known. A case that fails becomes a row with the end of its traceback, and the
next case goes on. What bf16 may cost is not a constant of ours but what plain bf16 attention costs, against fp32 both.
The copied layout gives every reply its own copy of prompt and picture, rows padded to the longest. Both layouts run the
same Hugging Face model, our kernel in its vision tower, inside the same FSDP wrapper, with the same optimizer and loss.
"""

import argparse
import gc
import importlib.util
import json
import math
import random
import shutil
import statistics
import sys
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from unittest import mock

import numpy as np
import peers
import torch
import torch.distributed as dist
import versus
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import attention  # noqa: E402
import grpo  # noqa: E402
import model  # noqa: E402
import rewards  # noqa: E402
import run_directory  # noqa: E402
import sampler  # noqa: E402
import training  # noqa: E402
from records import read_jsonl, read_records, write_jsonl, write_text  # noqa: E402
from toy.tiny_model import make_tiny  # noqa: E402

NOMINAL = 989e12  # FLOP/s of an H200 in dense bf16, by its data sheet
GROUP = 8  # replies per prompt


class Stage:
    """A stage's machine, folders and time, and its rows: printed, and merged into OUT/gpu.json, as they come."""

    def __init__(self, args):
        self.name, self.smoke, self.out, self.work = args.stage, args.smoke, Path(args.out), Path(args.work)
        self.begun, self.seconds, self.rows, self.failed = time.perf_counter(), args.seconds, [], 0
        self.world = training.setup()
        self.device, self.cuda = self.world.device, torch.cuda.is_available()
        self.machine = versus.machine() | versus.versions() | {"when": datetime.now(UTC).isoformat(timespec="seconds")}
        self.machine["gpu"] = torch.cuda.get_device_name() if self.cuda else None
        self.machine["commit"] = versus.commit() if shutil.which("git") else None
        self.out.mkdir(parents=True, exist_ok=True)
        self.save()

    def left(self):
        """Seconds until this stage should end by itself."""
        return math.inf if self.smoke else self.begun + self.seconds - time.perf_counter()

    def add(self, name, **values):
        values = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in values.items()}
        self.rows.append({"name": name, **values})
        print(f"[{time.perf_counter() - self.begun:5.1f} s] {name}: {values}", flush=True)
        self.save()

    def save(self):
        path = self.out / "gpu.json"
        whole = json.loads(path.read_text()) if path.exists() else {"stages": {}}
        spent = time.perf_counter() - self.begun
        whole["stages"][self.name] = {"seconds": spent, "smoke": self.smoke, "rows": self.rows}
        write_text(path, json.dumps(whole | {"machine": self.machine}, indent=1) + "\n")

    def attempt(self, name, function, *args):
        """Did function(…) end well? If not, a row says why. A broken device ends the stage: nothing works after it."""
        try:
            function(*args)
            return True
        except Exception as error:
            self.failed += not isinstance(error, torch.OutOfMemoryError)
            why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.add(name, error=why, where=traceback.format_exc().splitlines()[-9:-1])
            if "CUDA error" in str(error):
                raise


def now():
    """Seconds on a clock, once the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function, *args):
    begun = now()
    function(*args)
    return now() - begun


def forget():
    """Give memory back that nobody holds any more, and begin to look for its peak anew."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def errors(found, reference):
    """‖found − reference‖ / ‖reference‖ of each tensor; NaN stays NaN, which is within no bound."""
    return [(one - other).norm().item() / max(other.norm().item(), 1e-12)
            for one, other in zip(found, reference, strict=True)]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Models, records, the copied layout

PUBLISHED = {  # Qwen2.5-VL-3B's config, where make_tiny's differs
    "text_config": {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31], "initializer_range": 0.02,
    },
}  # fmt: skip


def model_folder(stage, small=False):
    """A folder with 3B's config (small, --smoke: a tiny one's), a tokenizer and image settings; without weights."""
    folder = stage.work / ("small" if small else "shape")
    make_tiny(folder, hidden=128, heads=4, vocab=2048)
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    sizes = {"text_config": {"num_key_value_heads": 2}} if small or stage.smoke else PUBLISHED
    for part in sizes:
        config[part] |= sizes[part]
        config[part].pop("layer_types", None)  # one a layer: it would be of another length
    write_text(folder / "config.json", json.dumps(config))
    return folder


def random_model(folder, device, dtype):
    """Made where it is needed: a checkpoint of this size takes longer to write than to use."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")


def load(stage, folder, train, dtype="auto"):
    """model.load itself, but for `Both`, random weights where the folder has none, and replies that no token ends."""

    def random_weights(policy, folder):
        """In place of reading them: weights of the size that a model begins with."""
        torch.manual_seed(0)
        for name, weight in policy.named_parameters():
            if weight.ndim > 1:
                weight.detach().normal_(std=policy.hf.config.get_text_config().initializer_range)
            else:
                weight.detach().fill_(0.0 if name.endswith("bias") else 1.0)

    reader = model.read_weights if (folder / "model.safetensors").exists() else random_weights
    with mock.patch.object(model, "Policy", Both), mock.patch.object(model, "read_weights", reader):
        policy, encoder = model.load(folder, stage.world, dtype=dtype, train=train)
    policy.end_ids = (-1,)
    if train and not stage.cuda:  # what CUDA does to a policy that learns, so that --smoke finds most of its faults
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        policy.hf.gradient_checkpointing_enable({"use_reentrant": False})
        policy.hf.train()
        training.shard(policy, stage.world, torch.bfloat16 if policy.half else None, policy.sharding)
    return policy, encoder


def checkpoint_blocks(policy, which):
    """Which blocks use gradient checkpointing: "all", "tower" (the decoder keeps its activations) or "none"."""
    for block in policy.family.decoder(policy.hf).layers:
        block.gradient_checkpointing = which == "all"
    for block in policy.family.vision(policy.hf)[0].blocks:
        block.gradient_checkpointing = which != "none"


def make_records(stage, about, count):
    """Write records of about 400 or 700 prompt tokens, 300 or 600 of them a picture: -> their file's path."""
    width, height, words = {400: (560, 420, 84), 700: (700, 672, 84)}[about]
    if stage.smoke:
        width, height, words = 84, 56 if about == 400 else 84, 10
    folder, rng, noise, rows = stage.work / f"{about}-{count}", random.Random(0), np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        picture = Image.fromarray(noise.integers(0, 256, (height // 28, width // 28, 3), dtype=np.uint8))
        picture.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{index}.png", compress_level=1)
        prompt = " ".join(rng.choices(versus.WORDS, k=rng.randint(words * 9 // 10, words * 11 // 10)))
        rows.append({"id": str(index), "images": [f"{index}.png"], "prompt": prompt, "answer": "A"})
        rows[-1] |= {"answer_type": "letter", "think": False, "source": "bench"}
    write_jsonl(folder / "records.jsonl", rows)
    return folder / "records.jsonl"


def make_prompts(stage, encoder, about, count):
    records = read_records(make_records(stage, about, count))
    encoder.prefetch(records)
    return [encoder.prompt(record) for record in records]


def random_replies(prompts, length):
    """Groups of GROUP replies of `length` tokens each to every prompt."""
    noise = torch.Generator().manual_seed(0)
    return [(p, [torch.randint(50, 400, (length,), generator=noise) for _ in range(GROUP)]) for p in prompts]


class Both(model.Policy):
    """The policy with a second forward, for what `copies` makes: here, so that FSDP's hooks run as for our own."""

    def forward(self, batch, temperature=1.0):
        if not isinstance(batch, dict):
            return super().forward(batch, temperature)
        read = batch.pop("read")
        hidden = self.hf.model(**batch, use_cache=False).last_hidden_state.flatten(0, 1)[read]
        return model.token_logits(hidden, self.hf.lm_head.weight, 1.0, self.forbidden)


def copies(policy, rows, left=False):
    """What transformers takes for rows of (prompt, reply): each with a prompt of its own, padded on one side."""
    longest = max(len(prompt.ids) + len(reply) for prompt, reply in rows)
    ids, mask = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(2))
    for row, (prompt, reply) in enumerate(rows):
        size = len(prompt.ids) + len(reply)
        place = slice(longest - size, None) if left else slice(size)
        ids[row, place], mask[row, place] = torch.cat([prompt.ids, reply]), 1
    kinds = (ids == policy.hf.config.image_token_id).long()
    pixels, grids = model.pictures_of([prompt for prompt, _ in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": kinds}
    batch |= {"pixel_values": pixels, "image_grid_thw": grids}
    return {key: value.to(policy.forbidden.device) for key, value in batch.items()}


def copied_log_probs(policy, groups):
    """model.log_probs in the copied layout."""
    rows, device = [(prompt, reply) for prompt, replies in groups for reply in replies], policy.forbidden.device
    batch, sizes = copies(policy, rows), [len(reply) for _, reply in rows]
    begin = [row * batch["input_ids"].shape[1] + len(prompt.ids) - 1 for row, (prompt, _) in enumerate(rows)]
    read = torch.cat([start + torch.arange(size) for start, size in zip(begin, sizes, strict=True)])
    targets = torch.cat([reply for _, reply in rows])[:, None]
    values = policy(batch | {"read": read.to(device)}).log_softmax(-1).gather(-1, targets.to(device))[:, 0]
    return pad_sequence(values.split(sizes), True), pad_sequence(torch.ones_like(values).bool().split(sizes), True)


def generate(policy, prompts, count, length, **options):
    """transformers' own sampler: -> (prompts · count, length) tokens."""
    inputs = copies(policy, [(prompt, prompt.ids[:0]) for prompt in prompts], left=True)
    policy.hf.generation_config.eos_token_id = None
    options |= {"num_return_sequences": count, "max_new_tokens": length, "min_new_tokens": length, "pad_token_id": 0}
    with torch.no_grad():
        out = policy.hf.generate(**inputs, **options, suppress_tokens=policy.forbidden.tolist())
    return out[:, inputs["input_ids"].shape[1] :]


# ---------------------------------------------------------------------------------------------------------------------
# Is it right: attention against the textbook, a small model against transformers alone

ROWS = {  # groups: the length of a prompt, the lengths of its replies
    "ragged": [(4, [70, 2, 1]), (90, [5]), (1, []), (33, [31, 64])],
    "a prompt without replies": [(40, [3]), (2, []), (60, [129])],
    "replies of nothing but their end": [(3, [0, 0]), (200, [40, 17])],
    "replies of one token or none": [(130, [1, 0]), (7, [1, 1])],
    "no reply at all": [(60, []), (3, [])],
    "as in training": [(412, [20] * 8), (398, [200, 11, 150, 64]), (405, [20, 19])],
}


def check_attention(stage):
    cases, kinds = [], ((False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16))
    for heads in ((16, 2, 128), (4, 4, 64)):  # of queries, of keys, width
        for name, row in ROWS.items():
            lengths = [size for size, _ in row], sum((sizes for _, sizes in row), []), [sum(sizes) for _, sizes in row]
            for flash, dtype in kinds[: 2 + stage.cuda]:
                layout = attention.Layout(*map(attention.Segments.of, lengths), flash=flash).to(stage.device)
                kernel = "flash" if flash else "rectangles"
                cases.append((f"{name}, {kernel}", attention.PromptOnce.apply, layout, seen(row), heads, dtype))

    def tower(q, k, v, bounds, scale):
        states = (x.transpose(0, 1)[None] for x in (q, k, v))
        further = {"scaling": scale, "cu_seq_lens_q": bounds, "max_length_q": max(sizes)}
        return attention.window_attention(None, *states, **further)[0][0]

    sizes = [64, 64, 16, 48, 64, 4, 1200, 64, 900]  # windows, and whole pictures
    bounds = torch.tensor([0, *sizes]).cumsum(0).int().to(stage.device)
    segment = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for heads in ((16, 16, 80), (4, 4, 64)):
        cases += [("windows", tower, bounds, segment[:, None] == segment, heads, dtype) for _, dtype in kinds[:2]]
    for name, *case in cases:
        stage.attempt(name, compare, stage, name, *case)


def seen(row):
    """(L, L) bool: who sees whom in a packed row, from the lengths alone."""
    tokens = [(p, 0) for p, (size, _) in enumerate(row) for _ in range(size)]  # group, and part of it
    tokens += [(p, 1 + b) for p, (_, sizes) in enumerate(row) for b, size in enumerate(sizes) for _ in range(size)]
    group, part = torch.tensor(tokens).T
    past = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()
    return past & (group[:, None] == group) & ((part[:, None] == part) | (part == 0))


def compare(stage, name, function, segments, allowed, heads, dtype):
    """A row: the errors of an attention's values and gradients against the textbook's in fp32."""
    (many, few, d), noise, allowed = heads, torch.Generator().manual_seed(5), allowed.to(stage.device)
    states = [torch.randn(len(allowed), n, d, generator=noise) for n in (many, few, few, many)]
    states = [x.bfloat16().float().to(stage.device) for x in states]  # the same numbers in both precisions

    def textbook(q, k, v, segments, scale):
        k, v = (x.repeat_interleave(many // few, 1) for x in (k, v))
        score = (torch.einsum("ihd,jhd->hij", q, k).float() * scale).masked_fill(~allowed, -math.inf)
        return torch.einsum("hij,jhd->ihd", score.softmax(-1).to(v.dtype), v)

    def run(function, dtype):
        *inputs, weight = (x.to(dtype).detach() for x in states)
        out = function(*(x.requires_grad_() for x in inputs), segments, d**-0.5)
        return [x.detach().float() for x in (out, *torch.autograd.grad(out, inputs, weight))]

    exact, bound = run(textbook, torch.float32), [1e-5] * 4
    if dtype == torch.bfloat16:  # gradients that cancel to nothing leave rounding alone: hence the 5e-3
        bound = [3 * x + 5e-3 for x in errors(run(textbook, dtype), exact)]
    found = errors(run(function, dtype), exact)
    ok = all(one <= other for one, other in zip(found, bound, strict=True))
    name = f"{name}, {str(dtype)[6:]}, {many}:{few} heads of {d}"
    stage.add(name, ok=ok, **dict(zip(("out", "dq", "dk", "dv"), found, strict=True)))


def check_model(stage):
    from transformers import AutoModelForImageTextToText

    torch.backends.cudnn.allow_tf32 = False  # transformers embeds patches by a convolution: in fp32 it must be fp32
    folder, noise = model_folder(stage, small=True), torch.Generator().manual_seed(5)
    hf = random_model(folder, "cpu", torch.float32)
    for weight in hf.parameters():  # as made, biases are 0 and norms 1, and faults in them would hide
        weight.data.add_(torch.randn(weight.shape, generator=noise), alpha=0.02)
    hf.save_pretrained(folder)
    policy, encoder = load(stage, folder, False, "fp32")
    records = read_records(make_records(stage, 400, 4))
    records.append({**records[0], "id": "words", "images": [], "prompt": "Which letter comes after A?"})
    prompts = [encoder.prompt(record) for record in records]
    sizes = [(9, 14, 1, 20), (2, 2), (30,), (7, 1, 1, 12, 40, 3, 8, 8), (5, 18)]
    replies = [[torch.randint(50, 400, (size,), generator=noise) for size in row] for row in sizes]
    groups = list(zip(prompts, replies, strict=True))
    weight = torch.randn(sum(map(sum, sizes)), generator=noise).to(stage.device)

    def judge(policy, log_probs):
        """Log-probs of all tokens, and the gradient of a weighted sum of them, each as one vector."""
        logp, mask = log_probs(policy, groups)
        (logp[mask] * weight).sum().backward()
        gradient = [training.whole_tensor(x.grad).float().flatten() for x in policy.parameters() if x.grad is not None]
        return logp[mask].detach(), torch.cat(gradient)

    alone = [AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
             for dtype in (torch.float32, torch.bfloat16)]  # fmt: skip
    theirs, halved = (Both(hf, policy.family, [], policy.forbidden.tolist()).to(stage.device) for hf in alone)
    exact, rough = judge(theirs, copied_log_probs), judge(halved, copied_log_probs)
    plain, rounding = errors(rough, exact), (rough[0] - exact[0]).abs().max().item()
    greedy = generate(theirs, prompts, 1, 24, do_sample=False).tolist()
    stage.add("the copied layout in bf16", logp=plain[0], gradient=plain[1], max_gap=rounding)

    def judge_loaded(name, train, dtype):
        policy = load(stage, folder, train, dtype)[0]
        logp, gradient = errors(judge(policy, model.log_probs), exact)
        sampled = sampler.sample(policy, prompts, 4, seeds=range(len(prompts)), max_new_tokens=24)
        rows = [(prompt, [reply.ids for reply in row]) for prompt, row in zip(prompts, sampled, strict=True)]
        with torch.no_grad():
            again, mask = model.log_probs(policy, rows)
        logps = torch.cat([reply.logps for row in sampled for reply in row])
        gap = (again[mask].cpu() - logps).abs().max().item()
        likeliest = sampler.sample(policy, prompts, 1, seeds=range(len(prompts)), temperature=0, max_new_tokens=24)
        same = sum(reply.ids.tolist() == other for (reply,), other in zip(likeliest, greedy, strict=True))
        bounds = (2 * plain[0], 2 * plain[1], 3 * rounding, 0) if dtype == "bf16" else (1e-4, 1e-4, 1e-3, len(greedy))
        ok = logp <= bounds[0] and gradient <= bounds[1] and gap <= bounds[2] and same >= bounds[3]
        stage.add(name, ok=ok, logp=logp, gradient=gradient, sampler_gap=gap, as_generate=f"{same} of {len(greedy)}")

    for dtype in ("fp32", "bf16"):
        for train in (False, True):
            name = f"prompt once and its sampler, {dtype}, {'train (FSDP)' if train else 'inference'}"
            stage.attempt(name, judge_loaded, name, train, dtype)


# ---------------------------------------------------------------------------------------------------------------------
# How fast: learn, sample, step, TRL


def learn_step(groups, log_probs, budget, policy, optimizer, world):
    """The learn phase of grpo.py with made-up advantages."""
    sizes = [len(reply) for _, replies in groups for reply in replies]
    micros = training.micro_batches(world, model.group_sizes(groups), budget)
    for number, micro in enumerate(micros):
        logp, mask = log_probs(policy, [groups[index] for index in micro])
        lengths = mask.sum(1).float()
        advantage = 1.0 - 2.0 * (torch.arange(len(lengths), device=logp.device) % 2)
        weight = grpo.token_weights(lengths, "token", len(sizes), float(sum(sizes)), 1)
        loss = grpo.grpo_loss(logp, logp.detach(), None, advantage, mask, weight)
        training.backward(policy, world, loss, last=number == len(micros) - 1)
    training.update(policy, optimizer, 1e-6, 1.0)


class Learner:
    """A policy that learns, and rows of how fast."""

    def __init__(self, stage):
        self.stage, self.folder = stage, model_folder(stage)
        self.build()
        self.peak = training.matmul_peak(stage.device, self.policy.compute_dtype)  # FLOP/s
        stage.add("largest matrix product", tflops=self.peak / 1e12)

    def build(self):
        self.policy = self.optimizer = None
        forget()
        self.policy, self.encoder = load(self.stage, self.folder, True)
        self.optimizer = training.adamw(self.policy, 1e-6)

    def measure(self, what, groups, which, budget, layout="prompt once"):
        """One row. Out of memory, or anything else that stops FSDP halfway, asks for a whole policy."""
        name = f"{layout}, {what}, micro {budget}, checkpointing {which}"
        if self.stage.left() > 15 and not self.stage.attempt(name, self.run, name, groups, which, budget, layout):
            self.build()

    def run(self, name, groups, which, budget, layout):
        """Seconds of a learn phase over groups, after one over about a micro-batch."""
        forget()
        checkpoint_blocks(self.policy, which)
        flops, replies = model.Cost(self.policy).learn(groups), GROUP * len(groups)
        log_probs = model.log_probs
        if layout == "copied":
            groups = [(prompt, [reply]) for prompt, group in groups for reply in group]
            log_probs = copied_log_probs
        fed = [len(prompt.ids) + sum(map(len, group)) for prompt, group in groups]
        rest = log_probs, budget, self.policy, self.optimizer, self.stage.world
        times = [timed(learn_step, groups[: max(1, budget // max(fed))], *rest)]
        while len(times) < 2 or len(times) < 4 and sum(times[1:]) < 2.5:
            times.append(timed(learn_step, groups, *rest))
        seconds = statistics.median(times[1:])
        self.stage.add(
            name, seconds=seconds, rollouts_per_s=replies / seconds, tokens_per_s=sum(fed) / seconds,
            tflops=flops / seconds / 1e12, mfu=flops / seconds / self.peak, mfu_nominal=flops / seconds / NOMINAL,
            peak_gib=training.peak_memory(self.stage.device) / 2**30,
        )  # fmt: skip


def time_learning(stage):
    learner, groups = Learner(stage), {}
    count, micro, short, long = (4, 256, 4, 12) if stage.smoke else (64, 16384, 20, 200)
    for about in (400, 700):
        prompts = make_prompts(stage, learner.encoder, about, count)
        groups[about, long] = random_replies(prompts[: count // 2], long)
        groups[about, short] = random_replies(prompts, short)

    def table(about, *cells, most=None, **options):
        for which, budget in cells:
            for length in (long, short):
                learner.measure(f"P {about}, R {length}", groups[about, length][:most], which, budget, **options)

    # What matters most comes first: a stage may run out of time
    table(400, ("all", micro), ("tower", micro // 2), ("none", micro // 4))
    table(400, ("all", micro), ("all", 2 * micro), most=max(1, count // 8), layout="copied")
    table(700, ("all", micro), ("tower", micro // 2), ("none", micro // 4))
    usual = learner.policy.chunk_bytes
    for power in (12, 16) if stage.smoke else (26, 28, 30, 31):  # small chunks: more passes over the head's weights
        learner.policy.chunk_bytes = 2**power
        learner.measure(f"P 400, R {long}, logits of 2^{power} bytes", groups[400, long][: count // 4], "all", micro)
    learner.policy.chunk_bytes = usual
    for about in (400, 700):
        table(about, ("all", micro // 2), ("all", 2 * micro), ("all", 4 * micro))


def time_sampling(stage):
    policy, encoder = load(stage, model_folder(stage), False)
    most, some, short, long = (4, 2, 3, 5) if stage.smoke else (128, 64, 20, 200)
    prompts = {400: make_prompts(stage, encoder, 400, most), 700: make_prompts(stage, encoder, 700, some)}

    def ours(prompts, length):
        sampler.sample(policy, prompts, GROUP, seeds=range(len(prompts)), max_new_tokens=length)

    def theirs(prompts, length):
        generate(policy, prompts, GROUP, length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0)

    def run(name, side, prompts, length):
        forget()
        first, seconds = timed(side, prompts, 1), timed(side, prompts, length)
        stage.add(
            name, seconds=seconds, rollouts_per_s=len(prompts) * GROUP / seconds, seconds_prefill=first,
            seconds_per_token=(seconds - first) / (length - 1), peak_gib=training.peak_memory(stage.device) / 2**30,
        )  # fmt: skip

    ours(prompts[400][:2], 3)  # the first calls load kernels
    theirs(prompts[400][:2], 3)
    for side, about, count, length in (
        (ours, 400, some, short), (ours, 400, some, long), (theirs, 400, most // 16 + 1, short),
        (ours, 400, most, short), (ours, 700, some, short), (ours, 700, some, long), (ours, 400, most, long),
    ):  # fmt: skip
        name = f"{'sampler.sample' if side is ours else 'generate'}, P {about}, R {length}, {count} prompts x {GROUP}"
        if stage.left() > 14:
            stage.attempt(name, run, name, side, prompts[about][:count], length)


def time_steps(stage):
    folder = model_folder(stage)
    policy, encoder = load(stage, folder, True)
    count, length = (4, 4) if stage.smoke else (64, 20)
    data, out = make_records(stage, 400, 4 * count), stage.work / "run"
    sizes = {"prompts": count, "group": GROUP, "max-new-tokens": length, "steps": 3, "save-every": 0}
    flags = ["--model", str(folder), "--data", str(data), "--out", str(out), "--overwrite", "--measure-peak"]
    zero = {"accuracy": 0.0, "format": 0.0, "answer": None}
    with (  # rewards look random, so that every group has a signal; no model of this size is read or written
        mock.patch.object(rewards, "score", lambda text, *rest, **options: dict(zero, reward=versus.reward(text))),
        mock.patch.object(model, "load", return_value=(policy, encoder)),
        mock.patch.multiple(run_directory.Run, export=mock.DEFAULT, save=mock.DEFAULT),
    ):
        grpo.main(flags + [f"--{key}={value}" for key, value in sizes.items()])
    for _, row in read_jsonl(out / "log.jsonl"):  # the first loads kernels and has no pictures encoded ahead
        kinds = "rollouts", "seconds", "mfu", "peak", "sampler"
        name = f"grpo.py, P 400, R {length}, {count} prompts x {GROUP}, step {row['step']}"
        stage.add(name, **{key: value for key, value in row.items() if key.startswith(kinds)})
    stage.attempt("profile", profile, stage, policy, make_prompts(stage, encoder, 400, count // 4 + 1), length)


def profile(stage, policy, prompts, length):
    """Where the device's time goes in the two halves of a step: the 25 dearest kernels each, to gpu-profile.txt."""
    optimizer, groups, texts = training.adamw(policy, 1e-6), random_replies(prompts, length), []

    def sampling():  # the profiler is slow, and one token is like the next
        sampler.sample(policy, prompts, GROUP, seeds=range(len(prompts)), max_new_tokens=min(6, length))

    def learning():
        learn_step(groups, model.log_probs, 0, policy, optimizer, stage.world)

    for half in (sampling, learning):
        half()
        with torch.profiler.profile() as found:
            seconds = timed(half)
        order = "self_device_time_total" if stage.cuda else "self_cpu_time_total"
        table = found.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=90)
        texts.append(f"{half.__name__}, {len(prompts)} prompts: {seconds:.2f} s under the profiler\n{table}\n")
        write_text(stage.out / "gpu-profile.txt", "\n".join(texts))


def time_trl(stage):
    """TRL's own step (peers.py) on the same shape: fp32 weights under bf16 autocast, SDPA, checkpointed, no KL."""
    if not all(importlib.util.find_spec(name) for name in ("trl", "datasets", "torchvision")):
        return stage.add("TRL", note="trl, datasets and torchvision are not all installed: skipped")
    from transformers import Qwen2_5_VLForConditionalGeneration

    processors, clock = stage.work / "processors", []
    count, length, micro = (2, 4, 8) if stage.smoke else (8, 20, 16)
    versus.make_model(processors, versus.SMALL)  # for its tokenizer and image settings: those of the shape
    spec = {"model": str(processors), "data": str(make_records(stage, 400, 3 * count)), "order": range(3 * count),
            "prompts": count, "group": GROUP, "reply": length, "micro": micro, "steps": 2, "checkpointing": True,
            "out": str(stage.work / "trl")}  # fmt: skip
    gate = mock.Mock(wait=lambda **numbers: clock.append(now()))  # before the first step and after each
    hf, common = random_model(model_folder(stage), stage.device, torch.float32), peers.common
    with (
        mock.patch.object(Qwen2_5_VLForConditionalGeneration, "from_pretrained", return_value=hf),
        mock.patch.object(
            peers, "common", lambda *args: common(*args) | {"use_cpu": not stage.cuda, "bf16": stage.cuda}
        ),
    ):
        peers.trl_grpo(gate, spec, versus.reward)
    seconds = clock[2] - clock[1]
    stage.add(
        f"TRL's step, P 400, R {length}, {count} prompts x {GROUP}, micro {micro} rows", seconds=seconds,
        rollouts_per_s=count * GROUP / seconds, peak_gib=training.peak_memory(stage.device) / 2**30,
    )  # fmt: skip


def show(out):
    """The tables of gpu.json."""
    whole = json.loads((Path(out) / "gpu.json").read_text())
    print(", ".join(f"{key} {value}" for key, value in whole["machine"].items()))
    for stage, found in whole["stages"].items():
        rows, checks = found["rows"], [row["ok"] for row in found["rows"] if "ok" in row]
        smoke = ", --smoke: its times mean nothing" * found["smoke"]
        print(f"\n{stage}: {found['seconds']:.0f} s, {sum(checks)} of {len(checks)} checks hold{smoke}")
        for row in rows:
            if not row.get("ok", True) or "error" in row or "note" in row:
                print("  " + json.dumps(row))
        shown = [row for row in rows if "rollouts_per_s" in row]
        if shown:
            columns = [key for key in shown[0] if key != "name"]
            width = max(len(row["name"]) for row in shown)
            print(" " * (2 + width) + "".join(f"{name.replace('seconds', 's'):>16}" for name in columns))
            for row in shown:
                print(f"  {row['name']:{width}}" + "".join(f"{row.get(name, math.nan):16.4g}" for name in columns))


STAGES = {
    "attention": check_attention,
    "check": check_model,
    "learn": time_learning,
    "sample": time_sampling,
    "step": time_steps,
    "trl": time_trl,
}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("stage", choices=[*STAGES, "show"], help="what to measure; show: the tables of a finished run")
    parser.add_argument("--out", default="bench/results", help="where gpu.json and gpu-profile.txt are")
    parser.add_argument("--work", default="runs/gpu", help="folder for models and pictures")
    parser.add_argument("--seconds", type=float, default=600.0, help="begin nothing new after so many seconds")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, a few seconds, on any machine")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.stage == "show":
        return show(args.out)
    stage = Stage(args)
    stage.attempt(args.stage, STAGES[args.stage], stage)
    if stage.failed:
        raise RuntimeError(f"{args.stage}: {stage.failed} cases failed; see the rows with an error")


if __name__ == "__main__":
    training.run(main)
