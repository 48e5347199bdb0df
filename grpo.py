"""GRPO: reinforcement learning with verifiable rewards for vision language models.

    python grpo.py                                        # learns on built-in puzzles with a tiny model, on any machine
    python grpo.py --model DIR --data records.jsonl --prompts 64 --group 8 --out runs/grpo
    torchrun --nproc_per_node=8 grpo.py …

Each step samples a group of replies to every prompt, scores them by rule, turns the scores into advantages inside each
group, and takes clipped policy-gradient updates. Both papers' recipes are settings of this one file:

    SPECS (arXiv 2510.25801)      --prompts 128 --clip-high 0.28 --normalizer token --kl 0       (DAPO-like clipping)
    Jigsaw-R1 (arXiv 2505.23590)  --prompts 64 --kl 0.04 --normalizer sequence --top-k 50 --schedule linear

Group and prompt share one row (model.py, section 4): a prompt and its pictures are fed once for all its replies.

Shapes: P prompts, G replies each, B = P·G replies, T tokens of the longest reply; log-probs in nats, fp32.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model as m
import rewards

# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of rewards and log-probs


def group_advantages(rewards, scale="group", eps=1e-4):
    """How much better each reply is than its group: (P, G) rewards -> (P, G) advantages.

    scale "group": A = (r − mean) / (std + eps), mean and unbiased std inside the group (GRPO, arXiv 2402.03300);
    "none": A = r − mean (Dr. GRPO, arXiv 2503.20783: the division favours prompts with small spread);
    "batch": the group's mean is taken off, the spread is the unbiased std of all P·G rewards.
    A group of one has nothing to compare with: its advantage is 0.
    """
    centred = rewards - rewards.mean(1, keepdim=True)
    same = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    centred = centred.masked_fill(same, 0.0)  # exactly: the mean of equal numbers may be off by a rounding
    if scale == "none":
        return centred
    if scale == "group":
        std = rewards.std(1, keepdim=True) if rewards.shape[1] > 1 else torch.zeros_like(rewards)
    elif scale == "batch":
        std = rewards.std() if rewards.numel() > 1 else torch.zeros_like(rewards)
    else:
        raise ValueError(f'scale must be "group", "none" or "batch", not {scale!r}')
    return centred / (std + eps)


def policy_ratio(logp, old_logp, mask, ratio="token"):
    """π/π_old per token (B, T): its own, or ("sequence", GSPO, arXiv 2507.18071) its reply's geometric mean."""
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)  # before exp: padding may hold anything, NaN included
    if ratio == "sequence":
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        log_ratio = mean.expand_as(log_ratio)
    elif ratio != "token":
        raise ValueError(f'ratio must be "token" or "sequence", not {ratio!r}')
    return log_ratio.exp()


def importance_weights(old_logp, sampler_logp, mask, kind="token", cap=2.0):
    """What a token counts that another distribution drew: (B, T) min(π_old / π_sampler, cap), without a gradient.

    The sampler computes in another order or type than the trainer, or cuts with top-k and top-p, so its replies are not
    quite the policy's. The ratio makes their mean right again, the cap keeps a rare token from outweighing a batch:
    truncated importance sampling (Ionides, J. Comput. Graph. Stat. 17, 2008). old_logp: the trainer's log-probs with
    the weights that drew, sampler_logp: the sampler's. kind "token": each token's own ratio; "sequence": its reply's,
    the product over its tokens; "none": 1 everywhere. Padding may hold NaN; what is returned there means nothing.
    """
    log_ratio = (old_logp - sampler_logp).detach().masked_fill(~mask, 0.0)
    if kind == "none":
        return torch.ones_like(log_ratio)
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    elif kind != "token":
        raise ValueError(f'kind must be "token", "sequence" or "none", not {kind!r}')
    return log_ratio.exp().clamp(max=cap)


def grpo_loss(
    logp, old_logp, ref_logp, advantage, mask, weight, *, clip_low=0.2, clip_high=0.2, kl=0.0, ratio="token",
    correction=None,
):  # fmt: skip
    """The clipped surrogate of GRPO (arXiv 2402.03300, equation 3; the two-sided clip of DAPO, arXiv 2503.14476).

        loss = −Σ_b weight_b Σ_t mask_bt [ c min(r A, clip(r, 1−low, 1+high) A) − kl · k3 ], r = π(token) / π_old(token)
        k3   = π_ref/π − log(π_ref/π) − 1

    logp, old_logp, ref_logp (B, T) log-probs of the sampled tokens; ref_logp may be None when kl == 0.
    advantage (B,). mask (B, T): True on sampled tokens, end token included; padding may hold NaN.
    weight (B,): what one token of each reply counts, counted by the caller over all micro-batches and ranks:
    1/(B·length) is the mean over replies of per-token means, 1/(all tokens) the token mean, 1/(B·constant) Dr. GRPO's.
    correction (B, T): c, as importance_weights gives it; None: 1. Returns a scalar.
    """
    r = policy_ratio(logp, old_logp, mask, ratio)
    gain = torch.minimum(r * advantage[:, None], r.clamp(1 - clip_low, 1 + clip_high) * advantage[:, None])
    if correction is not None:
        gain = gain * correction
    if kl:
        gain = gain - kl * k3(logp, ref_logp, mask)
    return -(weight[:, None] * gain.masked_fill(~mask, 0.0)).sum()


def k3(logp, ref_logp, mask):
    """Schulman's low-variance estimate of KL(π ‖ π_ref) per token (B, T), never negative; 0 off the mask."""
    gap = (ref_logp - logp).masked_fill(~mask, 0.0)
    return gap.exp() - gap - 1


def token_weights(lengths, normalizer, replies, tokens, constant):
    """(B,) weight of one token of each reply. lengths (B,) in tokens; replies, tokens: counts over all ranks.

    "sequence": 1/(replies·length), "token": 1/tokens, "constant": 1/(replies·constant).
    """
    if normalizer == "sequence":
        return 1.0 / (replies * lengths)
    return torch.full_like(lengths, 1.0 / tokens if normalizer == "token" else 1.0 / (replies * constant))


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default: `python grpo.py` alone

EMBEDDED = "runs/embedded"
EMBEDDED_FLAGS = f"""--model {EMBEDDED}/base --data {EMBEDDED}/puzzles/records.jsonl --out {EMBEDDED}/grpo
    --prompts 32 --group 8 --steps 200 --lr 2e-4 --kl 0.04 --clip-high 0.28 --normalizer token
    --max-new-tokens 40 --save-every 100""".split()


def make_embedded(world):
    """Make, once, what the embedded default trains on: built-in puzzles, and a tiny base model that can speak.

    A model with random weights writes noise that no rule can reward. So the base is first taught by dpo.py's SFT on
    toy/primer.py's loosely formatted replies, whose puzzle answers are sampled at random.
    """
    here, there = Path(__file__).resolve().parent, Path(EMBEDDED)
    if world.main and not (there / "base/model.safetensors").exists():
        print(f"first run: making a tiny base model and puzzles in {there} (about two minutes)", flush=True)
        env = m.alone()
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # its `python` is this one
        subprocess.run(["bash", here / "recipes/tiny_base.sh", there], check=True, env=env)
    world.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog=f"Without --model and --data: the embedded default, that is {' '.join(EMBEDDED_FLAGS)}",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint to start from (directory or hub id)")
    add("--data", required=True, nargs="+", help="records.jsonl files: prompts, images and gold answers")
    add("--out", required=True, help="run directory; ends as a model directory for the next stage")
    add("--steps", type=int, default=100, help="steps of sampling and learning")
    add("--prompts", type=int, default=64, help="P: prompts per step, over all processes")
    add("--group", type=int, default=8, help="G: replies per prompt")
    add("--lr", type=float, default=1e-6, help="peak learning rate of AdamW")
    add("--schedule", default="constant", choices=["linear", "constant"], help="linear falls to 0 at the last step")
    add("--warmup", type=int, default=0, help="steps over which the rate rises from 0; 0: none")
    add("--grad-clip", type=float, default=1.0, help="largest global gradient norm; 0: no clipping")
    add("--clip-low", type=float, default=0.2, help="ratio clipped below 1 - this")
    add("--clip-high", type=float, default=0.2, help="ratio clipped above 1 + this (DAPO: 0.28)")
    add("--kl", type=float, default=0.0, help="weight of the KL to the starting model; 0: no reference model at all")
    add("--ratio", default="token", choices=["token", "sequence"], help="ratio per token, or per reply (GSPO)")
    add("--normalizer", default="sequence", choices=["sequence", "token", "constant"],
        help="what a token counts: sequence: 1/its reply's length (GRPO); token: the same for all (DAPO); "
        "constant: 1/--max-new-tokens (Dr. GRPO)")  # fmt: skip
    add("--advantage-scale", default="group", choices=["group", "none", "batch"],
        help="advantages divided by the std of the group, nothing (Dr. GRPO), or the std of the batch")  # fmt: skip
    add("--updates", type=int, default=1, help="optimizer updates on each sampled batch; above 1 the clipping matters")
    add("--temperature", type=float, default=1.0, help="sampling temperature; log-probs are taken at the same")
    add("--top-k", type=int, default=0, help="sample among the k likeliest tokens; 0: all")
    add("--top-p", type=float, default=1.0, help="sample among the likeliest tokens of this mass; 1: all")
    add("--max-new-tokens", type=int, default=512, help="longest reply in tokens, end token included")
    add("--format-weight", type=float, default=0.5, help="reward = accuracy + this x format; 0: format is not rewarded")
    add("--sampler", default="builtin", choices=["builtin", "vllm"],
        help="who draws the replies: the trainer's own model, or vLLM beside it (README: With vLLM)")  # fmt: skip
    add("--cuda-graphs", action="store_true",
        help="builtin sampler on a GPU: replay each step of decoding as one CUDA graph (never run yet)")  # fmt: skip
    add("--vllm-tp", type=int, default=1, help="neighbouring processes that share one vLLM engine (tensor parallel)")
    add("--vllm-memory", type=float, default=0.4, help="share of the GPU that vLLM's weights and KV cache may take")
    add("--ahead", action="store_true",
        help="vLLM draws a step's replies while the step before is learned: faster where the GPU has room for both; "
        "they come from weights one step older, which --importance corrects")  # fmt: skip
    add("--canary-every", type=int, default=0,
        help="steps between comparisons of vLLM with the trainer after the first two; 0: no more")  # fmt: skip
    add("--importance", default="token", choices=["token", "sequence", "none"],
        help="weigh what the sampler drew by the trainer's probability over the sampler's: of each token, of its whole "
        "reply, or not. vLLM gives probabilities after --top-k and --top-p, so the weight undoes these cuts too; the "
        "builtin sampler gives those before")  # fmt: skip
    add("--importance-cap", type=float, default=2.0, help="largest such weight")
    add("--freeze-vision", action="store_true", help="keep the vision tower as it is")
    add("--max-pixels", type=int, default=None, help="largest image area in pixels; default: the checkpoint's own")
    add("--micro-tokens", type=int, default=0,
        help="tokens and patches per forward, less if memory runs out; 0: 16384 on a GPU, 3072 on a CPU")  # fmt: skip
    add("--recompute", default="auto", choices=["auto", "on", "off"],
        help="compute a block's activations again going backward: less memory, more time; auto: on GPUs")  # fmt: skip
    add("--shard", default="full", choices=["full", "grad", "none"],
        help="what processes share out: full: weights, gradients and optimizer state; grad: the last two "
        "(weights stay gathered during an update); none: nothing, each holds the whole model")  # fmt: skip
    add("--replicas", type=int, default=1, help="copies of the sharded model (HSDP): as many as nodes; 1: one over all")
    add("--offload", action="store_true", help="keep masters, gradients and optimizer state in main memory")
    add("--accumulate", default="whole", choices=["whole", "shards"],
        help="gradients between micro-batches: whole: in every process, averaged once per update (fast); "
        "shards: averaged and cut each time (a 72B model has no room for a whole one)")  # fmt: skip
    add("--compile", action="store_true",
        help="fuse norms and MLPs with torch.compile (a minute at the start): the same but for rounding")  # fmt: skip
    add("--dtype", default="auto", choices=["auto", "fp32", "bf16"], help="compute type; master weights stay fp32")
    add("--attn", default="auto", choices=["auto", "sdpa", "flash"],
        help="flash: FlashAttention kernels of torch (CUDA, bf16); sdpa: exact everywhere")  # fmt: skip
    add("--measure-peak", action="store_true",
        help="time a matrix product first, and log FLOP/s as a share of it (mfu_sample, mfu_learn)")  # fmt: skip
    add("--seed", type=int, default=0, help="fixes the order of the prompts and every draw")
    add("--save-every", type=int, default=50, help="steps between checkpoints; 0: only at the end or when stopped")
    add("--keep", type=int, default=2, help="checkpoints to keep")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out (same settings)")
    add("--overwrite", action="store_true", help="start anew in a directory that holds a run")
    argv = sys.argv[1:] if argv is None else argv
    embedded = not {"--model", "--data", "-h", "--help"} & {flag.split("=")[0] for flag in argv}
    args = parser.parse_args(EMBEDDED_FLAGS + argv if embedded else argv)
    for name in ("steps", "prompts", "group", "updates", "max_new_tokens", "replicas", "keep"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr <= 0 or args.temperature <= 0 or not 0 < args.top_p <= 1:
        parser.error("--lr and --temperature must be above 0, --top-p in (0, 1]")
    if args.group == 1:
        parser.error("--group 1 has nothing to compare a reply with: every advantage would be 0")
    if not 0 < args.clip_low <= 1:
        parser.error("--clip-low must be in (0, 1]: the ratio is clipped below 1 - clip-low")
    if args.vllm_tp < 1 or not 0 < args.vllm_memory < 1 or args.importance_cap < 1:
        parser.error("--vllm-tp and --importance-cap must be at least 1, --vllm-memory between 0 and 1")
    if args.ahead and (args.sampler != "vllm" or args.vllm_tp > 1):
        parser.error("--ahead needs --sampler vllm and --vllm-tp 1: a model cannot draw while it learns")
    if args.ahead and args.importance == "none":
        parser.error("--ahead draws from older weights: --importance token or sequence must correct that")
    counts = "warmup", "top_k", "micro_tokens", "save_every", "seed", "canary_every"
    for name in ("clip_high", "kl", "grad_clip", "format_weight", *counts):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    return args


def main(argv=None):
    args = parse_args(argv)
    world = m.setup()
    if args.model == f"{EMBEDDED}/base":
        make_embedded(world)
    if args.prompts % world.size:
        raise m.DataError(f"--prompts {args.prompts} cannot be dealt evenly to {world.size} processes")
    records = m.read_records(args.data, rewards.check_gold)
    run = m.Run.open(args, world)
    options = {"dtype": args.dtype, "attn": args.attn, "max_pixels": args.max_pixels}
    options |= {"train": True, "freeze_vision": args.freeze_vision, "recompute": args.recompute}
    options |= {name: getattr(args, name) for name in ("shard", "replicas", "offload", "accumulate", "compile")}
    policy, encoder = m.load(args.model, world, **options)
    encoder.check(world, records)
    options |= {"shard": "none" if args.shard == "none" else "full"}  # nobody goes backward through a reference
    reference = m.load(args.model, world, **options)[0].requires_grad_(False) if args.kl else None
    optimizer = m.adamw(policy, args.lr)
    drawn_ahead = run.restore(policy, optimizer)
    sampler = partial(m.sample, graphs=args.cuda_graphs)
    if args.sampler == "vllm":
        sampler = m.VLLM(
            args.model, policy, encoder, world, records[world.rank :: world.size], tp=args.vllm_tp,
            max_new_tokens=args.max_new_tokens, memory=args.vllm_memory, canary_every=args.canary_every, seed=args.seed,
        )  # fmt: skip
    P, G = args.prompts, args.group
    places = range(world.rank, P, world.size)  # of this rank in every batch
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    meter = m.Meter(policy, world, args.measure_peak)

    def questions(step):
        """This rank's records of a step, and a seed for each."""
        batch, seed = m.epoch_order(args.seed, len(records), step * P, P), (args.seed * 10**6 + step) * 10**6
        return [records[batch[place]] for place in places], [seed + place for place in places]

    ahead = None  # --ahead: a future of the next step's replies; a checkpoint holds them too
    if drawn_ahead:
        ahead = Future()
        ahead.set_result([[m.Reply.read(row) for row in drawn_ahead[str(place)]] for place in places])
    bar = tqdm(total=args.steps, initial=run.step, desc="grpo", disable=not world.main)
    for step in range(run.step, args.steps):
        # 1. Sample: G replies to each of this rank's prompts
        (mine, seeds), (later, later_seeds) = questions(step), questions(step + 1)
        prompts = encoder.prompts(mine)
        encoder.prefetch(later)
        meter.lap("rest")
        stale = ahead is not None
        replies = ahead.result() if stale else sampler(policy, prompts, G, seeds=seeds, **sampling)
        if args.ahead and step + 1 < args.steps:
            ahead = sampler.begin(policy, encoder.prompts(later), G, seeds=later_seeds, **sampling)
        drawn = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
        meter.lap("sample", sum(meter.cost.forward(drawn)))

        # 2. Score: rules give each reply a reward, the group gives it an advantage
        texts = [[encoder.decode(reply.ids) for reply in group] for group in replies]
        scores = [
            [rewards.score(text, record, format_weight=args.format_weight) for text in group]
            for record, group in zip(mine, texts, strict=True)
        ]
        gathered = world.gather([[score["reward"] for score in group] for group in scores])
        everyone = torch.zeros(P, G)
        for rank, rows in enumerate(gathered):
            everyone[rank :: world.size] = torch.tensor(rows)
        advantages = group_advantages(everyone, args.advantage_scale)[world.rank :: world.size]
        lengths = torch.tensor([[len(reply.ids) for reply in group] for group in replies]).float()
        tokens = world.sum(lengths.sum())[0]
        meter.lap("score")

        # 3. Learn: clipped updates on the groups that carry a signal
        useful = [p for p in range(len(prompts)) if args.kl or advantages[p].any()]
        groups = [drawn[p] for p in useful]
        spare = (prompts[0], [replies[0][0].ids[:1]])  # a filler: keeps ranks in step, at weight 0
        micros = m.micro_batches(world, groups, args.micro_tokens)
        learned, largest_gap, norm = dict.fromkeys(("loss", "kl", "clip_fraction"), 0.0), 0.0, 0.0
        watched = dict.fromkeys(("sampler_gap_mean", "importance_capped", "tokens"), 0.0)
        first = {}  # each micro-batch's log-probs in the first pass: those of the weights that drew it
        lr = m.learning_rate(step, args.steps, args.lr, args.schedule, args.warmup)
        for epoch in range(args.updates if any(world.gather(len(useful))) else 0):
            for number, micro in enumerate(micros):
                rows = [groups[i] for i in micro] or [spare]
                logp, mask = m.log_probs(policy, rows, args.temperature)
                ref = None
                if args.kl:  # for a filler too: the ranks gather the weights of a sharded reference together
                    with torch.no_grad():
                        ref, _ = m.log_probs(reference, rows, args.temperature)
                if not micro:
                    m.backward(policy, world, 0.0 * logp.sum(), last=number == len(micros) - 1)
                    continue
                device = logp.device
                old = first.setdefault(number, logp.detach())
                theirs = pad_sequence([reply.logps for i in micro for reply in replies[useful[i]]], True).to(device)
                correction = importance_weights(old, theirs, mask, args.importance, args.importance_cap)
                advantage = torch.cat([advantages[useful[i]] for i in micro]).to(device)
                size = torch.cat([lengths[useful[i]] for i in micro]).to(device)
                weight = token_weights(size, args.normalizer, P * G, tokens, args.max_new_tokens)
                if args.kl:
                    learned["kl"] += k3(logp.detach(), ref, mask).sum().item() / tokens / args.updates
                loss = grpo_loss(
                    logp, old, ref, advantage, mask, weight, clip_low=args.clip_low, clip_high=args.clip_high,
                    kl=args.kl, ratio=args.ratio, correction=correction,
                )  # fmt: skip
                m.backward(policy, world, loss, last=number == len(micros) - 1)
                learned["loss"] += loss.item() / args.updates
                ratio = policy_ratio(logp.detach(), old, mask, args.ratio)
                clipped = torch.where(advantage[:, None] > 0, ratio > 1 + args.clip_high, ratio < 1 - args.clip_low)
                learned["clip_fraction"] += (clipped & mask).sum().item() / tokens / args.updates
                if epoch == 0:  # the sampler's log-probs against the trainer's: 1e-5 in fp32, more in bf16
                    gap = ((old - theirs) * mask).abs()
                    largest_gap = max(largest_gap, gap.max().item())
                    watched["sampler_gap_mean"] += gap.sum().item()
                    watched["importance_capped"] += ((correction >= args.importance_cap) & mask).sum().item()
                    watched["tokens"] += mask.sum().item()
            norm = m.update(policy, optimizer, lr, args.grad_clip)
        meter.lap("learn", args.updates * meter.cost.learn(groups, reference=args.kl > 0))

        # 4. Record
        flat = [score for group in scores for score in group]
        sums = {name: sum(score[name] for score in flat) for name in ("reward", "accuracy", "format")}
        sums["length"] = lengths.sum()
        sums["finished"] = sum(reply.finished for group in replies for reply in group)
        means = {name: value / (P * G) for name, value in zip(sums, world.sum(*sums.values()), strict=True)}
        surprise = -sum(reply.logps.sum().item() for group in replies for reply in group)
        entropy, signal = world.sum(surprise / tokens, len(useful) / P)  # E[-log p] over sampled tokens is the entropy
        learned = dict(zip(learned, world.sum(*learned.values()), strict=True))
        *watched_sums, compared = world.sum(*watched.values())
        watched = {name: value / max(1, compared) for name, value in zip(watched, watched_sums, strict=False)}
        account = meter.row()
        seconds = sum(value for name, value in account.items() if name.startswith("seconds"))
        row = {"step": step + 1, **means, **learned, "entropy": entropy, "useful_groups": signal}
        row |= {"grad_norm": norm, "lr": lr, "sampler_gap": max(world.gather(largest_gap)), **watched}
        row |= {"staleness": args.updates * stale} if args.ahead else {}  # updates since the replies were drawn
        row |= {"rollouts_per_s": P * G / seconds, "tokens_per_s": tokens / seconds, **account}
        shown = [
            {"id": mine[0]["id"], "source": mine[0]["source"], "reply": text, **score}
            for text, score in list(zip(texts[0], scores[0], strict=True))[:2]
        ]
        run.log(row, shown)
        names = ("reward", "accuracy", "format", "length", "kl", "entropy", "clip_fraction", "rollouts_per_s")
        bar.set_postfix({name.replace("_fraction", "").replace("_per_s", "/s"): f"{row[name]:.3g}" for name in names})
        bar.update()
        if run.checkpoint_due(step + 1, args.steps, args.save_every):
            kept = zip(places, ahead.result(), strict=True) if args.ahead and step + 1 < args.steps else ()
            extra = {str(place): [reply.row() for reply in group] for place, group in kept}
            run.save(step + 1, policy, optimizer, args.keep, extra)
        run.leave_if_asked(step + 1, args.steps)
    bar.close()
    run.export(policy, encoder)
    if world.main:
        print(f"{args.out}: {args.steps} steps of GRPO done; the model is in the directory")


if __name__ == "__main__":
    m.run(main)
