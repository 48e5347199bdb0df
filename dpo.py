"""Cold start on preference pairs: DPO, SFT, or DPO + SFT (SPECS, arXiv 2510.25801, stage 2).

    python dpo.py --model BASE --data pairs.jsonl --loss dpo+sft --beta 0.1 --sft-weight 1.0 --out runs/cold
    torchrun --nproc_per_node=8 dpo.py …

The pairs differ in the *shape* of the reply only, so the preference teaches the format and leaves the content to the RL
that follows. Policy and frozen reference both start as --model; the reference's log-probs are computed once, before
training, by the policy itself, so there is never a second model in memory. A pair is a group of two replies to one
prompt (attention.py): prompt and pictures are fed once, not twice, let alone four times.

Choices where the paper is silent: β = 0.1; linear decay to 0 without warm-up; gradient norm clipped at 1.

Legend: B pairs, T tokens of the longest reply; log-probs in nats, fp32.
"""

import math

import torch
import torch.nn.functional as F
from tqdm import tqdm

import model
import rewards
import training
from records import epoch_order, read_records
from run_directory import Run
from training import integer, real

# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of log-probs


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Direct preference optimisation, equation 7 of arXiv 2305.18290.

        margin = β [(log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))]
        loss   = −log σ(margin)

    All inputs (B,): log-probs *summed* over the reply, in nats. Returns (loss (B,), margin (B,)), not averaged.
    """
    # The reference enters as a difference: a reply that was likely to begin with earns nothing for being likely.
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -F.logsigmoid(margin), margin


def sft_loss(logp, mask, weight) -> torch.Tensor:
    """Negative log-likelihood of the chosen replies: −Σ_b weight_b Σ_t mask_bt log π(y_bt).

    logp (B, T); mask (B, T) True on reply tokens, end token included; weight (B,): the per-token loss weight of
    each reply, counted by the caller over the whole batch and all ranks (SPECS' per-token mean: 1 / all chosen tokens).
    """
    return -(weight[:, None] * logp.masked_fill(~mask, 0.0)).sum()


# ---------------------------------------------------------------------------------------------------------------------
# Reading a batch


def as_group(encoder, pair, loss) -> tuple[model.Prompt, list[torch.Tensor]]:
    """(Prompt, [chosen ids, rejected ids]): a group of two; of one for pure SFT."""
    names = ["chosen"] if loss == "sft" else ["chosen", "rejected"]
    return encoder.prompt(pair), [encoder.encode_reply(pair[name]) for name in names]


@torch.no_grad()
def reference_log_probs(policy, encoder, world, pairs, indices, budget) -> dict[int, tuple[float, float]]:
    """{index: (log-prob of chosen, of rejected)}, summed over the reply, under the policy as it is now.

    indices are dealt over the ranks; every rank gets every result. budget: tokens and patches per forward.
    """
    # Each rank computes its share; the whole pass costs one forward over the data.
    mine, found = indices[world.rank :: world.size], {}
    window = 256  # encoded pairs held at a time
    for start in tqdm(range(0, math.ceil(len(indices) / world.size), window), desc="reference", disable=not world.main):
        part = mine[start : start + window]
        encoder.prefetch(pairs[index] for index in part)
        groups = [as_group(encoder, pairs[index], "dpo") for index in part]
        filler = as_group(encoder, pairs[indices[0]], "dpo")
        for micro in training.micro_batches(world, model.group_sizes(groups), budget):
            logp, _ = model.log_probs(policy, [groups[i] for i in micro] or [filler])
            summed = logp.sum(1).view(-1, 2).tolist()
            for i, pair_logp in zip(micro, summed, strict=False):  # a filler's are dropped
                found[part[i]] = pair_logp
    training.release_weights(policy)  # FSDP leaves the root gathered; the optimizer must be given the shards
    return {index: value for part in world.gather(found) for index, value in part.items()}


def complete_reference(run, policy, encoder, pairs, needed, budget) -> dict[int, tuple[float, float]]:
    """reference_log_probs of the pairs in `needed`, from a resumed run's checkpoint as far as it holds them."""
    # JSON has made texts of the indices.
    known = {int(index): tuple(value) for index, value in run.extra.get("reference", {}).items()}
    missing = sorted(set(needed) - set(known))
    if missing:
        known |= reference_log_probs(policy, encoder, run.world, pairs, missing, budget)
    return known


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv=None):
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint to start from (directory or hub id); also the frozen reference")
    add("--data", required=True, nargs="+", help="pairs.jsonl files (distill.py writes them); SFT needs only `chosen`")
    add("--skip-bad", action="store_true",
        help="leave out records whose gold answer cannot be scored, and say how many, instead of stopping")  # fmt: skip
    add("--out", required=True, help="run directory; ends as a model directory for the next stage")
    add("--seed", type=integer("[0, 4294967295]"), default=0, help="fixes the order of the pairs")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="dpo+sft", choices=["dpo+sft", "dpo", "sft"], help="what to minimise")
    add("--beta", type=real("[1e-6, 1e6]"), default=0.1,
        help="DPO's β: the price of leaving the reference (larger: stay closer)")  # fmt: skip
    add("--sft-weight", type=real("[0, 1e6]"), default=1.0, help="λ of DPO + λ·SFT; 0 is pure DPO")

    add = parser.add_argument_group("optimiser").add_argument
    add("--batch", type=integer("[1, 1e6]"), default=64, help="pairs per update, over all processes")
    add("--steps", type=integer("[0, 1e6]"), default=0, help="updates; 0: one pass over the pairs")
    add("--lr", type=real("[1e-12, 1]"), default=1e-6, help="peak learning rate of AdamW")
    add("--schedule", default="linear", choices=["linear", "constant"], help="linear falls to 0 at the last step")
    add("--warmup", type=integer("[0, 1e6]"), default=0, help="updates over which the rate rises from 0; 0: none")
    add("--grad-clip", type=real("0 or [1e-6, 1e6]"), default=1.0, help="largest global gradient norm; 0: no clipping")

    training.add_training_flags(parser)
    return parser.parse_args(argv)


# What a step logs of its loss; of pure SFT only the first two.
LOSS_METRICS = (
    "loss", "loss_sft", "loss_dpo", "chosen_reward", "rejected_reward", "margin", "preference_accuracy"
)  # fmt: skip


# What the progress bar shows: label and key of the log.
BAR = {"loss": "loss", "margin": "margin", "pref": "preference_accuracy", "norm": "grad_norm"}


def preference_metrics(margin, implicit, real_pairs, batch) -> dict[str, float]:
    """Shares of the batch's means. implicit (B, 2): β·(log π − log π_ref) of chosen and rejected; margin (B,)."""
    sums = {
        "chosen_reward": (implicit[:, 0] * real_pairs).sum(),
        "rejected_reward": (implicit[:, 1] * real_pairs).sum(),
        "margin": (margin * real_pairs).sum(),
        "preference_accuracy": ((margin > 0) * real_pairs).sum(),
    }
    return {name: total.item() / batch for name, total in sums.items()}


def name_of(pair) -> dict:
    """Which pair it was, for skipped.jsonl."""
    return {"where": pair["_where"], "id": pair["id"]}


def main(argv=None):
    args = parse_args(argv)
    world = training.setup(args.timeout)

    # 1. Read the pairs
    text_fields = ("chosen",) if args.loss == "sft" else ("chosen", "rejected")
    pairs = read_records(args.data, rewards.check_gold, text_fields, args.skip_bad, args.max_image_pixels)
    steps = args.steps or math.ceil(len(pairs) / args.batch)
    total = args.steps * args.batch or len(pairs)  # one pass ends with the last pair, in a smaller batch
    order = epoch_order(args.seed, len(pairs), 0, total)
    run = Run.open(vars(args), world)
    policy, encoder = model.load(args.model, world, train=True, **training.load_options(args))
    encoder.check(world, pairs)

    # 2. Reference: log-probs of all pairs that will be seen, before the first update
    reference = {}
    if args.loss != "sft":
        # The policy is still the reference here, so no second model is ever loaded.
        reference = complete_reference(run, policy, encoder, pairs, order, args.micro_tokens)
    kept = {"reference": reference} if world.main else {}  # in every checkpoint: the base's weights are gone then
    optimizer = training.adamw(policy, args.lr)
    run.restore(policy, optimizer)
    timer = training.PhaseTimer(world, policy.compute_dtype if args.measure_peak else None)
    cost = model.Cost(policy)

    bar = tqdm(total=steps, initial=run.step, desc=args.loss, disable=not world.main)
    for step in range(run.step, steps):
        # 3. Learn
        batch = order[step * args.batch : (step + 1) * args.batch]
        mine = batch[world.rank :: world.size]
        groups = [as_group(encoder, pairs[index], args.loss) for index in mine]
        filler = groups[0] if groups else as_group(encoder, pairs[batch[0]], args.loss)
        next_batch = order[(step + 1) * args.batch : (step + 2) * args.batch]
        encoder.prefetch(pairs[index] for index in next_batch[world.rank :: world.size])
        timer.end("rest")
        # Counted over all ranks before the first backward: SPECS' L_SFT is a mean over all tokens of the batch.
        chosen_tokens = world.sum(sum(len(replies[0]) for _, replies in groups))[0]
        micros = training.micro_batches(world, model.group_sizes(groups), args.micro_tokens)
        sums = dict.fromkeys(LOSS_METRICS[:2] if args.loss == "sft" else LOSS_METRICS, 0.0)
        for number, micro in enumerate(micros):
            logp, mask = model.log_probs(policy, [groups[i] for i in micro] or [filler])
            # A filler keeps ranks in step, at weight 0.
            real_pairs = torch.full((max(1, len(micro)),), float(bool(micro)), device=logp.device)
            chosen = slice(None, None, 1 if args.loss == "sft" else 2)
            loss_sft = sft_loss(logp[chosen], mask[chosen], real_pairs / chosen_tokens)
            loss, metrics = loss_sft, {}
            if args.loss != "sft":
                # (2B, T) -> (B, 2): chosen and rejected are neighbours, as as_group laid them out.
                summed = logp.sum(1).view(-1, 2)
                ref = torch.tensor([reference[mine[i]] for i in micro] or [(0.0, 0.0)], device=logp.device)
                losses, margin = dpo_loss(summed[:, 0], summed[:, 1], ref[:, 0], ref[:, 1], args.beta)
                loss = loss_dpo = (losses * real_pairs).sum() / len(batch)
                if args.loss == "dpo+sft":
                    loss = loss_dpo + args.sft_weight * loss_sft
                implicit = args.beta * (summed.detach() - ref)
                metrics = preference_metrics(margin.detach(), implicit, real_pairs, len(batch))
                metrics["loss_dpo"] = loss_dpo.item()
            metrics |= {"loss": loss.item(), "loss_sft": loss_sft.item()}
            for name, value in metrics.items():
                sums[name] += value
            training.backward(policy, world, loss, last=number == len(micros) - 1)
        lr = training.learning_rate(step, steps, args.lr, args.schedule, args.warmup)
        norm = training.update(policy, optimizer, lr, args.grad_clip)
        timer.end("learn", cost.learn(groups))

        # 4. Record
        row = {"step": step + 1} | dict(zip(sums, world.sum(*sums.values()), strict=True))
        skipped = not math.isfinite(norm)
        row |= {"grad_norm": norm, "skipped": int(skipped), "lr": lr} | timer.metrics(samples=len(batch))
        row["seconds"] = row["seconds_learn"] + row["seconds_rest"]
        run.log(row)
        bar.set_postfix({label: f"{row[name]:.3f}" for label, name in BAR.items() if name in row})
        bar.update()
        run.count_skipped(step + 1, skipped, [name_of(pairs[index]) for index in mine], args.max_skipped)
        run.end_step(
            step + 1, steps, policy, optimizer, save_every=args.save_every, keep=args.keep, extra=lambda: kept
        )  # fmt: skip
    bar.close()
    run.export(policy, encoder)
    if world.main:
        print(f"{args.out}: {steps} steps of {args.loss} done; the model is in the directory")


if __name__ == "__main__":
    training.run(main)
