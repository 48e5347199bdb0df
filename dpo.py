"""Cold start on preference pairs: DPO, SFT, or DPO + SFT (SPECS, arXiv 2510.25801, stage 2).

    python dpo.py --model BASE --data pairs.jsonl --loss dpo+sft --beta 0.1 --sft-weight 1.0 --out runs/cold
    torchrun --nproc_per_node=8 dpo.py …

The pairs differ in the *shape* of the reply only, so the preference teaches the format and leaves the content to the RL
that follows. Policy and frozen reference both start as --model; the reference's log-probs are computed once, before
training, by the policy itself, so there is never a second model in memory. A pair is a group of two replies to one
prompt (attention.py): prompt and pictures are fed once, not twice, let alone four times.

Choices where the paper is silent: β = 0.1; linear decay to 0 without warm-up; gradient norm clipped at 1.

Other objectives are settings of the same sum, --preference-weight · preference + --quality-weight · quality
+ --sft-weight · SFT:

    cDPO (Mitchell, 2023)                    --label-smoothing 0.1
    IPO (arXiv 2310.12036)                   --loss dpo --preference ipo
    MPO of InternVL (arXiv 2411.10442)       --preference-weight 0.8 --quality-weight 0.2 --sft-mean replies

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


def dpo_loss(
    chosen, rejected, ref_chosen, ref_rejected, beta: float, label_smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Direct preference optimisation, equation 7 of arXiv 2305.18290.

        margin = β [(log π(y_w|x) − log π_ref(y_w|x)) − (log π(y_l|x) − log π_ref(y_l|x))]
        loss   = −log σ(margin), or with label_smoothing ε > 0:  −(1 − ε) log σ(margin) − ε log σ(−margin)

    The second is cDPO (Mitchell, A note on DPO with noisy preferences, 2023): a share ε of the pairs is taken to be
    the wrong way round, so the margin settles at log((1 − ε)/ε) and does not grow for ever.

    All inputs (B,): log-probs *summed* over the reply, in nats. Returns (loss (B,), margin (B,)), not averaged.
    """
    # The reference enters as a difference: a reply that was likely to begin with earns nothing for being likely.
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    if not label_smoothing:
        return -F.logsigmoid(margin), margin
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin), margin


def ipo_loss(
    chosen, rejected, ref_chosen, ref_rejected, beta: float, chosen_length, rejected_length
) -> tuple[torch.Tensor, torch.Tensor]:
    """Identity preference optimisation, equation 17 of arXiv 2310.12036: a goal for the margin in place of a pull.

        h    = (log π(y_w|x) − log π_ref(y_w|x)) / |y_w| − (log π(y_l|x) − log π_ref(y_l|x)) / |y_l|
        loss = (h − 1/(2β))²

    Inputs as in dpo_loss, and the lengths of the replies in tokens (B,): per token, as TRL has it from the authors;
    the paper's formula has no lengths. Returns (loss (B,), margin (B,) as dpo_loss has it), not averaged.
    """
    chosen_gain, rejected_gain = chosen - ref_chosen, rejected - ref_rejected
    h = chosen_gain / chosen_length - rejected_gain / rejected_length
    return (h - 1 / (2 * beta)) ** 2, beta * (chosen_gain - rejected_gain)


def quality_loss(chosen, rejected, ref_chosen, ref_rejected, beta: float, shift: float = 0.0) -> torch.Tensor:
    """Is each reply good by itself? BCO (arXiv 2404.04656), the quality term of InternVL's MPO (arXiv 2411.10442).

        r    = β (log π(y|x) − log π_ref(y|x))                the implicit reward of a reply
        loss = −log σ(r(y_w) − δ) − log σ(−(r(y_l) − δ))

    Inputs as in dpo_loss; shift: δ, what an average reply earns. Returns (B,), not averaged.
    """
    # The margin alone lets both replies sink together; here the chosen one must rise above the shift.
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - shift) - F.logsigmoid(-(rejected_reward - shift))


def running_mean(mean: float, count: int, value: float) -> float:
    """The mean of `count` values, and one more."""
    return mean + (value - mean) / (count + 1)


def sft_loss(logp, mask, weight) -> torch.Tensor:
    """Negative log-likelihood of the chosen replies: −Σ_b weight_b Σ_t mask_bt log π(y_bt).

    logp (B, T); mask (B, T) True on reply tokens, end token included; weight (B,): the per-token loss weight of
    each reply, counted by the caller over the whole batch and all ranks (sft_weights).
    """
    return -(weight[:, None] * logp.masked_fill(~mask, 0.0)).sum()


def sft_weights(lengths, kind: str, replies: int, tokens: float) -> torch.Tensor:
    """(B,) per-token loss weight of each chosen reply. lengths (B,) in tokens; replies, tokens: of the whole batch.

    The two readings of SPECS' L_SFT: "tokens": 1/tokens, the mean over all tokens; "replies": 1/(replies·length), the
    mean over replies of per-token means (MPO's generation loss).
    """
    if kind == "replies":
        return 1.0 / (replies * lengths)
    if kind != "tokens":
        raise ValueError(f'kind must be "tokens" or "replies", not {kind!r}')
    return torch.ones_like(lengths) / tokens


def pair_losses(
    logp, mask, ref, real_pairs, pairs: int, chosen_tokens: float, shift: float = 0.0, *,
    loss, beta, preference="sigmoid", label_smoothing=0.0, preference_weight=1.0, quality_weight=0.0,
    sft_weight=1.0, sft_mean="tokens",
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """A micro-batch's share of the whole batch's loss: -> (loss, shares of the metrics).

        loss = λ_p · preference + λ_q · quality + λ_g · SFT    of "dpo+sft"; "dpo" is without the last, "sft" only it

    logp, mask (2B, T): chosen and rejected are neighbours, as as_group laid them out; of "sft" (B, T), chosen only.
    ref (B, 2): the reference's summed log-probs, not read for "sft". real_pairs (B,): 1, or 0 for a filler. pairs,
    chosen_tokens: counts of the whole batch over all ranks. The other arguments are flags.
    """
    chosen = slice(None, None, 1 if loss == "sft" else 2)
    lengths = mask.sum(1).float()
    weight = real_pairs * sft_weights(lengths[chosen], sft_mean, pairs, chosen_tokens)
    loss_sft = sft_loss(logp[chosen], mask[chosen], weight)
    if loss == "sft":
        return loss_sft, {"loss": loss_sft.item(), "loss_sft": loss_sft.item()}

    summed = logp.masked_fill(~mask, 0.0).sum(1).view(-1, 2)  # (B, 2): chosen, rejected
    sides = summed[:, 0], summed[:, 1], ref[:, 0], ref[:, 1]
    if preference == "ipo":
        losses, margin = ipo_loss(*sides, beta, lengths[::2], lengths[1::2])
    else:
        losses, margin = dpo_loss(*sides, beta, label_smoothing)
    loss_dpo = (losses * real_pairs).sum() / pairs
    total = preference_weight * loss_dpo
    metrics = {"loss_sft": loss_sft.item(), "loss_dpo": loss_dpo.item()}
    metrics |= preference_metrics(margin.detach(), beta * (summed.detach() - ref), real_pairs, pairs)
    if quality_weight:
        loss_quality = (quality_loss(*sides, beta, shift) * real_pairs).sum() / pairs
        total = total + quality_weight * loss_quality
        metrics["loss_quality"] = loss_quality.item()
    if loss == "dpo+sft":
        total = total + sft_weight * loss_sft
    return total, {"loss": total.item()} | metrics


def preference_metrics(margin, implicit, real_pairs, pairs: int) -> dict[str, float]:
    """Shares of the batch's means. implicit (B, 2): β·(log π − log π_ref) of chosen and rejected; margin (B,)."""
    sums = {
        "chosen_reward": (implicit[:, 0] * real_pairs).sum(),
        "rejected_reward": (implicit[:, 1] * real_pairs).sum(),
        "margin": (margin * real_pairs).sum(),
        "preference_accuracy": ((margin > 0) * real_pairs).sum(),
    }
    return {name: total.item() / pairs for name, total in sums.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Reading a batch


def as_group(encoder, pair, loss) -> tuple[model.Prompt, list[torch.Tensor]]:
    """(Prompt, [chosen ids, rejected ids]): a group of two; of one for pure SFT."""
    names = ["chosen"] if loss == "sft" else ["chosen", "rejected"]
    prompt = encoder.prompt(pair)  # of another pair, where a picture is broken
    return prompt, [encoder.encode_reply(prompt.record[name]) for name in names]


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


def complete_reference(
    run, policy, encoder, pairs, needed, budget, name="reference"
) -> dict[int, tuple[float, float]]:
    """reference_log_probs of the pairs in `needed`; from a resumed run's checkpoint what stands there under `name`."""
    # JSON has made texts of the indices.
    known = {int(index): tuple(value) for index, value in run.extra.get(name, {}).items()}
    missing = sorted(set(needed) - set(known))
    if missing:
        known |= reference_log_probs(policy, encoder, run.world, pairs, missing, budget)
    return known


# ---------------------------------------------------------------------------------------------------------------------
# Forward passes


def micro_loss(policy, groups, filler, refs, pairs, chosen_tokens, shift, objective):
    """pair_losses of one micro-batch. refs: the reference's log-probs of its groups; without groups: the filler's."""
    logp, mask = model.log_probs(policy, groups or [filler])
    # A filler keeps ranks in step, at weight 0.
    real_pairs = torch.full((max(1, len(groups)),), float(bool(groups)), device=logp.device)
    ref = torch.tensor(refs or [(0.0, 0.0)], device=logp.device)
    return pair_losses(logp, mask, ref, real_pairs, pairs, chosen_tokens, shift, **objective)


def add_metrics(sums: dict, metrics: dict) -> None:
    for name, value in metrics.items():
        sums[name] = sums.get(name, 0.0) + value


@torch.no_grad()
def evaluate(policy, encoder, world, pairs, reference, budget, shift, objective) -> dict[str, float]:
    """The means over held-out pairs of all that training logs of its loss, as {"eval_loss": …}, on every rank.

    reference: {index: log-probs}, empty for "sft". budget: tokens and patches per forward.
    """
    loss = objective["loss"]
    mine = range(world.rank, len(pairs), world.size)
    # Counted over the whole set first, as in training: the loss must not depend on how it is divided.
    chosen_tokens = world.sum(sum(len(encoder.encode_reply(pairs[index]["chosen"])) for index in mine))[0]
    filler = as_group(encoder, pairs[0], loss)
    window = 256  # encoded pairs held at a time
    sums = {}
    for start in range(0, math.ceil(len(pairs) / world.size), window):
        part = mine[start : start + window]
        encoder.prefetch(pairs[index] for index in part)
        groups = [as_group(encoder, pairs[index], loss) for index in part]
        for micro in training.micro_batches(world, model.group_sizes(groups), budget):
            refs = [reference[part[i]] for i in micro] if reference else []
            rows = [groups[i] for i in micro]
            _, metrics = micro_loss(policy, rows, filler, refs, len(pairs), chosen_tokens, shift, objective)
            add_metrics(sums, metrics)
    training.release_weights(policy)  # as after the reference's pass
    return {f"eval_{name}": total for name, total in zip(sums, world.sum(*sums.values()), strict=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv=None):
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="checkpoint to start from (directory or hub id); also the frozen reference")
    add("--data", required=True, nargs="+", help="pairs.jsonl files (distill.py writes them); SFT needs only `chosen`")
    add("--skip-bad", action="store_true",
        help="leave out records whose gold answer cannot be scored, and say how many, instead of stopping")  # fmt: skip
    add("--strict-data", action="store_true",
        help="end the run at a picture that turns out to be broken when it is needed, instead of taking the record "
        "behind it in its place and saying so")  # fmt: skip
    add("--out", required=True, help="run directory; ends as a model directory for the next stage")
    add("--seed", type=integer("[0, 4294967295]"), default=0, help="fixes the order of the pairs")

    add = parser.add_argument_group("loss").add_argument
    add("--loss", default="dpo+sft", choices=["dpo+sft", "dpo", "sft"], help="what to minimise")
    add("--beta", type=real("[1e-6, 1e6]"), default=0.1,
        help="DPO's β: the price of leaving the reference (larger: stay closer)")  # fmt: skip
    add("--sft-weight", type=real("[0, 1e6]"), default=1.0, help="λ of DPO + λ·SFT; 0 is pure DPO")
    add("--sft-mean", default="tokens", choices=["tokens", "replies"],
        help="SFT is the mean over all chosen tokens of the batch, or over its replies of their own means")  # fmt: skip
    add("--preference", default="sigmoid", choices=["sigmoid", "ipo"],
        help="what is asked of a pair: sigmoid: a margin as large as can be (DPO); ipo: 1/2 per token")  # fmt: skip
    add("--preference-weight", type=real("[0, 1e6]"), default=1.0, help="weight of the preference loss (MPO: 0.8)")
    add("--label-smoothing", type=real("[0, 0.5)"), default=0.0,
        help="share of pairs taken to be the wrong way round (cDPO); 0: none")  # fmt: skip
    add("--quality-weight", type=real("[0, 1e6]"), default=0.0,
        help="weight of the quality loss, which judges each reply by itself (BCO; MPO: 0.2); 0: none")  # fmt: skip
    add("--reward-shift", default="none", choices=["none", "mean"],
        help="what the quality loss takes off implicit rewards: nothing, or their mean so far")  # fmt: skip

    add = parser.add_argument_group("optimiser").add_argument
    add("--batch", type=integer("[1, 1e6]"), default=64, help="pairs per update, over all processes")
    add("--steps", type=integer("[0, 1e6]"), default=0, help="updates; 0: one pass over the pairs")
    add("--lr", type=real("[1e-12, 1]"), default=1e-6, help="peak learning rate of AdamW")
    add("--schedule", default="linear", choices=["linear", "constant"], help="linear falls to 0 at the last step")
    add("--warmup", type=integer("[0, 1e6]"), default=0, help="updates over which the rate rises from 0; 0: none")
    add("--grad-clip", type=real("0 or [1e-6, 1e6]"), default=1.0, help="largest global gradient norm; 0: no clipping")

    add = parser.add_argument_group("evaluation").add_argument
    add("--eval-data", nargs="+", help="pairs.jsonl files that are never trained on: their loss is logged as eval_…")
    add("--eval-every", type=integer("[1, 1e6]"), default=50,
        help="updates between evaluations of --eval-data; the last update is always evaluated")  # fmt: skip

    training.add_training_flags(parser)
    args = parser.parse_args(argv)
    if args.preference == "ipo" and args.label_smoothing:
        parser.error("--label-smoothing is of --preference sigmoid: ipo has a goal for the margin already")
    if args.reward_shift == "mean" and not args.quality_weight:
        parser.error("--reward-shift mean shifts the quality loss: give it a --quality-weight")
    if args.loss == "sft" and args.quality_weight:
        parser.error("--quality-weight needs rejected replies: --loss dpo or dpo+sft")
    return args


# What the progress bar shows: label and key of the log.
BAR = {"loss": "loss", "margin": "margin", "pref": "preference_accuracy", "norm": "grad_norm"}


def name_of(pair) -> dict:
    """Which pair it was, for skipped.jsonl."""
    return {"where": pair["_where"], "id": pair["id"]}


def main(argv=None):
    args = parse_args(argv)
    world = training.setup(args.timeout)

    # 1. Read the pairs
    text_fields = ("chosen",) if args.loss == "sft" else ("chosen", "rejected")
    reading = rewards.check_gold, text_fields, args.skip_bad, args.max_image_pixels, world
    pairs = read_records(args.data, *reading, decode=False)
    # Decoded now: a held-out loss of other pairs than those that were given would be no loss of theirs.
    eval_pairs = read_records(args.eval_data, *reading) if args.eval_data else []
    steps = args.steps or math.ceil(len(pairs) / args.batch)
    total = args.steps * args.batch or len(pairs)  # one pass ends with the last pair, in a smaller batch
    order = epoch_order(args.seed, len(pairs), 0, total)
    run = Run.open(vars(args), world)
    policy, encoder = model.load(args.model, world, train=True, **training.load_options(args))
    encoder.check(world, pairs)
    encoder.check(world, eval_pairs)
    if not args.strict_data:
        encoder.replace_broken(pairs, run.broken)

    # 2. Reference: log-probs of all pairs that will be seen, before the first update
    reference, eval_reference = {}, {}
    if args.loss != "sft":
        # The policy is still the reference here, so no second model is ever loaded.
        reference = complete_reference(run, policy, encoder, pairs, order, args.micro_tokens)
    if args.loss != "sft" and eval_pairs:
        everything = range(len(eval_pairs))
        eval_reference = complete_reference(
            run, policy, encoder, eval_pairs, everything, args.micro_tokens, "eval_reference"
        )
    # Before the first step: a reference belongs to the pair that was read, and all ranks must read the same.
    run.share_broken(run.step + 1)
    # In every checkpoint: the base's weights are gone then.
    kept = {"reference": reference, "eval_reference": eval_reference} if world.main else {}
    optimizer = training.adamw(policy, args.lr)
    # δ of the quality loss: the mean implicit reward of the steps before, which a resumed run cannot compute anew.
    shift = run.restore(policy, optimizer).get("reward_shift", 0.0)
    names = "loss", "beta", "preference", "label_smoothing", "preference_weight", "quality_weight", "sft_weight"
    objective = {name: getattr(args, name) for name in (*names, "sft_mean")}

    def state():  # of a checkpoint, beside the weights
        return kept | ({"reward_shift": shift} if args.reward_shift == "mean" else {})

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
        sums = {}
        for number, micro in enumerate(micros):
            refs = [reference[mine[i]] for i in micro] if reference else []
            rows = [groups[i] for i in micro]
            loss, metrics = micro_loss(policy, rows, filler, refs, len(batch), chosen_tokens, shift, objective)
            add_metrics(sums, metrics)
            training.backward(policy, world, loss, last=number == len(micros) - 1)
        lr = training.learning_rate(step, steps, args.lr, args.schedule, args.warmup)
        norm = training.update(policy, optimizer, lr, args.grad_clip)
        timer.end("learn", cost.learn(groups))
        held_out = {}
        if eval_pairs and ((step + 1) % args.eval_every == 0 or step + 1 == steps):
            held_out = evaluate(
                policy, encoder, world, eval_pairs, eval_reference, args.micro_tokens, shift, objective
            )  # fmt: skip
            timer.end("eval")

        # 4. Record
        row = {"step": step + 1} | dict(zip(sums, world.sum(*sums.values()), strict=True)) | held_out
        skipped = not math.isfinite(norm)
        row |= {"grad_norm": norm, "skipped": int(skipped), "lr": lr} | timer.metrics(samples=len(batch))
        row["seconds"] = row["seconds_learn"] + row["seconds_rest"]
        row["broken_pictures"] = run.share_broken(step + 1)
        run.log(row)
        bar.set_postfix({label: f"{row[name]:.3f}" for label, name in BAR.items() if name in row})
        bar.update()
        if args.reward_shift == "mean" and not skipped:
            shift = running_mean(shift, step, (row["chosen_reward"] + row["rejected_reward"]) / 2)
        run.count_skipped(step + 1, skipped, [name_of(prompt.record) for prompt, _ in groups], args.max_skipped)
        run.end_step(step + 1, steps, policy, optimizer, save_every=args.save_every, keep=args.keep, extra=state)
    bar.close()
    run.export(policy, encoder)
    if world.main:
        print(f"{args.out}: {steps} steps of {args.loss} done; the model is in the directory")


if __name__ == "__main__":
    training.run(main)
