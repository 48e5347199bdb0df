"""Cold start on preference pairs: DPO, SFT, or DPO + SFT (SPECS, arXiv 2510.25801, stage 2).

    python dpo.py --model BASE --data pairs.jsonl --loss dpo+sft --beta 0.1 --sft-weight 1.0 --out runs/cold
    torchrun --nproc_per_node=8 dpo.py …

The pairs differ in the *shape* of the reply only, so the preference teaches the format and leaves the content to the RL
that follows. Policy and frozen reference both start as --model; the reference's log-probs are computed once, before
training, by the policy itself, so there is never a second model in memory. A pair is a group of two replies to one
prompt (model.py, section 4): prompt and pictures are fed once, not twice, let alone four times.

Choices where the paper is silent: β = 0.1; linear decay to 0 without warm-up; gradient norm clipped at 1.

Shapes: B pairs, T tokens of the longest reply; log-probs in nats, fp32.
"""

import argparse
import json
import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import model as m
import rewards

# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of log-probs


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """Direct preference optimisation, equation 7 of arXiv 2305.18290.

        margin = β [(log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))]
        loss   = −log σ(margin)

    All inputs (B,): log-probs *summed* over the reply, in nats. Returns (loss (B,), margin (B,)), not averaged.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin


def sft_loss(logp, mask, weight):
    """Negative log-likelihood of the chosen replies: −Σ_b weight_b Σ_t mask_bt log π(y_bt).

    logp (B, T); mask (B, T) True on reply tokens, end token included; weight (B,): what one token of each reply counts,
    counted by the caller over the whole batch and all ranks (1 / all chosen tokens is the per-token mean of SPECS).
    """
    return -(weight[:, None] * logp.masked_fill(~mask, 0.0)).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Reading a batch


def as_group(encoder, pair, loss):
    """(Prompt, [chosen ids, rejected ids]): a group of two; of one for pure SFT."""
    names = ["chosen"] if loss == "sft" else ["chosen", "rejected"]
    return encoder.prompt(pair), [encoder.encode_reply(pair[name]) for name in names]


@torch.no_grad()
def reference_log_probs(policy, encoder, world, pairs, indices, budget):
    """{index: (log-prob of chosen, of rejected)}, summed over the reply, under the policy as it is now.

    indices are dealt over the ranks; every rank gets every result. budget: tokens and patches per forward.
    """
    mine, out = indices[world.rank :: world.size], {}
    window = 256  # encoded pairs held at a time
    for start in tqdm(range(0, math.ceil(len(indices) / world.size), window), desc="reference", disable=not world.main):
        part = mine[start : start + window]
        encoder.prefetch(pairs[index] for index in part)
        groups = [as_group(encoder, pairs[index], "dpo") for index in part]
        spare = as_group(encoder, pairs[indices[0]], "dpo")
        for batch in m.micro_batches(world, groups, budget):
            logp, _ = m.log_probs(policy, [groups[i] for i in batch] or [spare])
            for i, pair_logp in zip(batch, logp.sum(1).view(-1, 2).tolist(), strict=False):
                out[part[i]] = pair_logp
    m.release_weights(policy)  # FSDP leaves the root gathered; the optimizer must be given the shards
    return {index: value for part in world.gather(out) for index, value in part.items()}


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="checkpoint to start from (directory or hub id); also the frozen reference")
    add("--data", required=True, nargs="+", help="pairs.jsonl files (distill.py writes them); SFT needs only `chosen`")
    add("--out", required=True, help="run directory; ends as a model directory for the next stage")
    add("--loss", default="dpo+sft", choices=["dpo+sft", "dpo", "sft"], help="what to minimise")
    add("--beta", type=float, default=0.1, help="DPO's β: how dear it is to leave the reference (larger: stay closer)")
    add("--sft-weight", type=float, default=1.0, help="λ of DPO + λ·SFT; 0 is pure DPO")
    add("--batch", type=int, default=64, help="pairs per update, over all processes")
    add("--steps", type=int, default=0, help="updates; 0: one pass over the pairs")
    add("--lr", type=float, default=1e-6, help="peak learning rate of AdamW")
    add("--schedule", default="linear", choices=["linear", "constant"], help="linear falls to 0 at the last step")
    add("--warmup", type=int, default=0, help="updates over which the rate rises from 0; 0: none")
    add("--grad-clip", type=float, default=1.0, help="largest global gradient norm; 0: no clipping")
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
        help="time a matrix product first, and log FLOP/s as a share of it (mfu_learn)")  # fmt: skip
    add("--seed", type=int, default=0, help="fixes the order of the pairs")
    add("--save-every", type=int, default=50, help="steps between checkpoints; 0: only at the end or when stopped")
    add("--keep", type=int, default=2, help="checkpoints to keep")
    add("--resume", action="store_true", help="go on from the last checkpoint in --out (same settings)")
    add("--overwrite", action="store_true", help="start anew in a directory that holds a run")
    args = parser.parse_args(argv)
    for name in ("batch", "replicas", "keep"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.lr <= 0 or args.beta <= 0:
        parser.error("--lr and --beta must be above 0")
    for name in ("sft_weight", "micro_tokens", "grad_clip", "warmup", "steps", "save_every", "seed"):
        if getattr(args, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative")
    return args


def main(argv=None):
    args = parse_args(argv)
    world = m.setup()

    # 1. Read the pairs
    text_fields = ("chosen",) if args.loss == "sft" else ("chosen", "rejected")
    pairs = m.read_records(args.data, rewards.check_gold, text_fields)
    steps = args.steps or math.ceil(len(pairs) / args.batch)
    total = args.steps * args.batch or len(pairs)  # one pass ends with the last pair, in a smaller batch
    run = m.Run.open(args, world)
    policy, encoder = m.load(
        args.model, world, dtype=args.dtype, attn=args.attn, max_pixels=args.max_pixels, train=True,
        freeze_vision=args.freeze_vision, recompute=args.recompute, shard=args.shard, replicas=args.replicas,
        offload=args.offload, accumulate=args.accumulate, compile=args.compile,
    )  # fmt: skip
    encoder.check(world, pairs)

    # 2. Reference: log-probs of all pairs that will be seen, before the first update; a resumed run reads them
    order = m.epoch_order(args.seed, len(pairs), 0, total)
    reference, file = {}, run.out / "reference.json"
    if args.loss != "sft":
        known = json.loads(file.read_text()) if world.main and run.step and file.exists() else {}
        reference = {int(index): value for index, value in world.gather(known)[0].items()}
        needed = sorted(set(order) - set(reference))
        reference |= reference_log_probs(policy, encoder, world, pairs, needed, args.micro_tokens) if needed else {}
        if world.main:
            m.write_text(file, json.dumps(reference))
    optimizer = m.adamw(policy, args.lr)
    run.restore(policy, optimizer)
    meter = m.Meter(policy, world, args.measure_peak)

    bar = tqdm(total=steps, initial=run.step, desc=args.loss, disable=not world.main)
    for step in range(run.step, steps):
        # 3. Learn
        batch = order[step * args.batch : (step + 1) * args.batch]
        mine = batch[world.rank :: world.size]
        groups = [as_group(encoder, pairs[index], args.loss) for index in mine]
        spare = groups[0] if groups else as_group(encoder, pairs[batch[0]], args.loss)
        ahead = order[(step + 1) * args.batch : (step + 2) * args.batch][world.rank :: world.size]
        encoder.prefetch(pairs[index] for index in ahead)
        meter.lap("rest")
        chosen_tokens = world.sum(sum(len(replies[0]) for _, replies in groups))[0]
        names = ("loss", "loss_dpo", "loss_sft", "chosen_reward", "rejected_reward", "margin", "right")
        totals = dict.fromkeys(names, 0.0)
        micros = m.micro_batches(world, groups, args.micro_tokens)
        for number, micro in enumerate(micros):
            logp, mask = m.log_probs(policy, [groups[i] for i in micro] or [spare])
            real = torch.full((max(1, len(micro)),), bool(micro), device=logp.device).float()  # 0: a filler forward
            chosen = slice(None, None, 1 if args.loss == "sft" else 2)
            loss_sft = sft_loss(logp[chosen], mask[chosen], real / chosen_tokens)
            loss = loss_sft
            if args.loss != "sft":
                summed = logp.sum(1).view(-1, 2)
                ref = torch.tensor([reference[mine[i]] for i in micro] or [(0.0, 0.0)], device=logp.device)
                losses, margin = dpo_loss(summed[:, 0], summed[:, 1], ref[:, 0], ref[:, 1], args.beta)
                loss_dpo = (losses * real).sum() / len(batch)
                loss = loss_dpo + (args.sft_weight * loss_sft if args.loss == "dpo+sft" else 0.0)
                implicit = args.beta * (summed.detach() - ref) * real[:, None] / len(batch)
                totals["loss_dpo"] += loss_dpo.item()
                totals["chosen_reward"] += implicit[:, 0].sum().item()
                totals["rejected_reward"] += implicit[:, 1].sum().item()
                totals["margin"] += (margin.detach() * real).sum().item() / len(batch)
                totals["right"] += ((margin > 0) * real).sum().item() / len(batch)
            totals["loss"] += loss.item()
            totals["loss_sft"] += loss_sft.item()
            m.backward(policy, world, loss, last=number == len(micros) - 1)
        lr = m.learning_rate(step, steps, args.lr, args.schedule, args.warmup)
        norm = m.update(policy, optimizer, lr, args.grad_clip)
        meter.lap("learn", meter.cost.learn(groups))

        # 4. Record
        totals = dict(zip(totals, world.sum(*totals.values()), strict=True))
        totals["preference_accuracy"] = totals.pop("right")
        if args.loss == "sft":
            totals = {"loss": totals["loss"], "loss_sft": totals["loss_sft"]}
        account = meter.row()
        seconds = account["seconds_learn"] + account["seconds_rest"]
        row = {"step": step + 1, **totals, "grad_norm": norm, "lr": lr}
        row |= {"seconds": seconds, "samples_per_s": len(batch) / seconds, **account}
        run.log(row)
        shown = {"loss": row["loss"], "margin": row.get("margin"), "pref": row.get("preference_accuracy"), "norm": norm}
        bar.set_postfix({key: f"{value:.3f}" for key, value in shown.items() if value is not None})
        bar.update()
        if run.checkpoint_due(step + 1, steps, args.save_every):
            run.save(step + 1, policy, optimizer, args.keep)
        run.leave_if_asked(step + 1, steps)
    bar.close()
    run.export(policy, encoder)
    if world.main:
        print(f"{args.out}: {steps} steps of {args.loss} done; the model is in the directory")


if __name__ == "__main__":
    m.run(main)
