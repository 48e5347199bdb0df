"""GRPO: reinforcement learning with verifiable rewards for vision language models.

    python grpo.py                                        # learns on built-in puzzles with a tiny model, on any machine
    python grpo.py --model DIR --data records.jsonl --prompts 64 --group 8 --out runs/grpo
    torchrun --nproc_per_node=8 grpo.py …

Each step samples a group of replies to every prompt, scores them by rule, turns the scores into advantages inside each
group, and takes clipped policy-gradient updates. The papers' recipes are settings of this one file:

    SPECS (arXiv 2510.25801)      --prompts 128 --clip-high 0.28 --normalizer token --kl 0       (DAPO-like clipping)
    DAPO (arXiv 2503.14476)       the same, and --max-refill 3 --overlong-buffer 4096
    Jigsaw-R1 (arXiv 2505.23590)  --prompts 64 --kl 0.04 --normalizer sequence --top-k 50 --schedule linear
    PuzzleCraft (2512.14944)      --group-weights dispersion --advantage-scale none --temperature 0.9 --top-p 0.95

A prompt and its pictures are fed once for all replies of its group (attention.py).

Legend: P prompts, G replies each, B = P·G replies, T tokens of the longest reply; log-probs in nats, fp32.
"""

import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import endpoint
import judge
import model
import rewards
import sampler
import scoring
import training
import vllm_sampler
from head import TokenFilter
from prompt_stream import PromptStream
from records import DataError, read_records
from rollouts import Rollout, asked_and_said, batch_metrics, gather_rewards, shown_replies
from run_directory import Run
from training import integer, real

# ---------------------------------------------------------------------------------------------------------------------
# Losses: pure functions of rewards and log-probs


def group_advantages(
    rewards: torch.Tensor, scale: str = "group", eps: float = 1e-4, baseline: str = "mean"
) -> torch.Tensor:
    """How much better each reply is than its group: (P, G) rewards -> (P, G) advantages.

    baseline "mean": r − mean of the group; "loo": r − mean of the group's other replies (RLOO, arXiv 2402.14740).
    scale "group": A = (r − baseline) / (std + eps), unbiased std inside the group (GRPO, arXiv 2402.03300);
    "none": A = r − baseline (Dr. GRPO, arXiv 2503.20783: the division favours prompts with small spread);
    "batch": the spread is the unbiased std of all P·G rewards.
    A group of one has nothing to compare with: its advantage is 0.
    """
    group_size = rewards.shape[1]
    # The group's mean is the baseline: it needs no value network, and takes off what all replies have in common.
    centred = rewards - rewards.mean(1, keepdim=True)
    if baseline == "loo":
        # r − (sum − r) / (G − 1) = (r − mean) · G / (G − 1): a reply no longer counts in what it is compared with.
        centred = centred * (group_size / max(1, group_size - 1))
    elif baseline != "mean":
        raise ValueError(f'baseline must be "mean" or "loo", not {baseline!r}')
    # Exactly 0 for a group of equal rewards: the mean of equal numbers may be off by a rounding.
    same = rewards.amax(1, keepdim=True) == rewards.amin(1, keepdim=True)
    centred = centred.masked_fill(same, 0.0)
    if scale == "none":
        return centred
    if scale == "group":
        std = rewards.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(rewards)
    elif scale == "batch":
        std = rewards.std() if rewards.numel() > 1 else torch.zeros_like(rewards)
    else:
        raise ValueError(f'scale must be "group", "none" or "batch", not {scale!r}')
    return centred / (std + eps)


def accuracy_filter(accuracy: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """Groups that are neither too hard nor too easy: (P, G) accuracies -> (P,) bool, low ≤ mean ≤ high.

    The online filter of PRIME (arXiv 2502.01456), there 0.2 to 0.8.
    """
    mean = accuracy.mean(1)
    return (mean >= low) & (mean <= high)


def group_weights(accuracy: torch.Tensor, dispersion: torch.Tensor | None = None) -> torch.Tensor:
    """What a group counts, by how much it can teach: (P, G) accuracies in [0, 1] -> (P,) weights in [0, 1].

        w = 4 d (1 − d) √dispersion,  d: the mean accuracy of the group

    Equation 1 of PuzzleCraft (arXiv 2512.14944): 1 where half is right and the answers are spread as far as can be, 0
    where all are right or all are wrong. dispersion (P,): of answer_dispersion; None: difficulty alone, without √.
    """
    d = accuracy.mean(1)
    weights = 4 * d * (1 - d)
    return weights if dispersion is None else weights * dispersion.sqrt()


def answer_dispersion(answers: list, options: int = 0) -> float:
    """How far the answers of a group are spread, from 0, where all are the same, to 1 (PuzzleCraft, section 3.2).

    Of a question that names its options: the entropy of the answers, over its largest value log(options). Of any other
    (a grid, a number): (distinct answers − 1) / (G − 1). Replies that cannot be read, None, are one answer together.
    """
    counts = Counter(map(repr, answers)).values()
    if options > 1:
        entropy = -sum(count / len(answers) * math.log(count / len(answers)) for count in counts)
        return min(1.0, entropy / math.log(options))
    return (len(counts) - 1) / max(1, len(answers) - 1)


def overlong_penalty(length: int, longest: int, buffer: int) -> float:
    """What a long reply loses of its reward: the soft punishment of DAPO (arXiv 2503.14476, equation 13).

    0 up to longest − buffer tokens, from there falling evenly to −1 at `longest`, where replies are truncated.
    """
    return -max(0, length - (longest - buffer)) / buffer


def policy_ratio(logp, old_logp, mask, ratio: str = "token") -> torch.Tensor:
    """π/π_old per token (B, T): its own, or ("sequence", GSPO, arXiv 2507.18071) its reply's geometric mean."""
    # Masked before exp: padding may hold anything, NaN included.
    log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)
    if ratio == "sequence":
        # A mean, not a sum: the ratio of a long reply would be astronomically far from 1.
        mean = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)
        log_ratio = mean.expand_as(log_ratio)
    elif ratio != "token":
        raise ValueError(f'ratio must be "token" or "sequence", not {ratio!r}')
    return log_ratio.exp()


def clipped_surrogate(r, advantage, clip_low: float, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """min(r A, clip(r, 1−low, 1+high) A) per token (B, T), and where the clip took the gradient away (B, T) bool.

    The two-sided clip of DAPO (arXiv 2503.14476). r (B, T), advantage (B,). Where the advantage is 0, nothing is.
    """
    plain = r * advantage[:, None]
    # One-sided, by the minimum below: a token that has moved against its advantage keeps its gradient.
    bounded = r.clamp(1 - clip_low, 1 + clip_high) * advantage[:, None]
    return torch.minimum(plain, bounded), bounded < plain


def cispo_surrogate(logp, r, advantage, clip_high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """sg(min(r, 1+high)) A log π per token (B, T), and where the bound made the weight smaller (B, T) bool.

    CISPO (MiniMax-M1, arXiv 2506.13585; without a lower bound, as there): the bound holds back how much a token
    counts, and no token loses its gradient. sg: no gradient flows through it.
    """
    bound = 1 + clip_high
    bounded_ratio = r.detach().clamp(max=bound)
    gain = bounded_ratio * advantage[:, None] * logp
    return gain, (r > bound) & (advantage[:, None] != 0)


def sapo_surrogate(r, advantage, rising: float = 1.0, falling: float = 1.05) -> tuple[torch.Tensor, torch.Tensor]:
    """(4/τ) σ(τ (r − 1)) A per token (B, T), and where a clip took the gradient away: nowhere (B, T) bool.

    SAPO (arXiv 2511.20347): a smooth gate in place of the clip. Its slope is 1 at r = 1 and falls off on both sides,
    faster with a larger τ: `rising` where the advantage is positive, `falling` elsewhere (values of the paper).
    """
    rising, falling = (advantage.new_tensor(value) for value in (rising, falling))
    tau = torch.where(advantage > 0, rising, falling)[:, None]
    gate = torch.sigmoid(tau * (r - 1)) * 4 / tau
    return gate * advantage[:, None], torch.zeros_like(r, dtype=torch.bool)


def token_gain(
    logp, r, advantage, surrogate: str, clip_low: float, clip_high: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token gains by the surrogate of that name (B, T), and where it was clipped (B, T) bool."""
    if surrogate == "clip":
        return clipped_surrogate(r, advantage, clip_low, clip_high)
    if surrogate == "cispo":
        return cispo_surrogate(logp, r, advantage, clip_high)
    if surrogate == "sapo":
        return sapo_surrogate(r, advantage)
    raise ValueError(f'surrogate must be "clip", "cispo" or "sapo", not {surrogate!r}')


def k3(logp, ref_logp, mask) -> torch.Tensor:
    """Schulman's low-variance estimate of KL(π ‖ π_ref) per token (B, T), never negative; 0 off the mask."""
    # Masked before exp, as in policy_ratio.
    gap = (ref_logp - logp).masked_fill(~mask, 0.0)
    return gap.exp() - gap - 1


def grpo_loss(
    logp, old_logp, ref_logp, advantage, mask, weight, *,
    clip_low=0.2, clip_high=0.2, kl=0.0, ratio="token", surrogate="clip", correction=None, entropy=None,
    entropy_bonus=0.0,
) -> torch.Tensor:  # fmt: skip
    """The clipped surrogate of GRPO (arXiv 2402.03300, equation 3), or another one in its place.

        loss = −Σ_b weight_b Σ_t mask_bt [ c min(r A, clip(r, 1−low, 1+high) A) − kl · k3 + bonus · H ]
        r    = π(token) / π_old(token),  k3 = π_ref/π − log(π_ref/π) − 1

    logp, old_logp, ref_logp (B, T) log-probs of the sampled tokens; ref_logp may be None when kl == 0.
    advantage (B,). mask (B, T): True on sampled tokens, end token included; padding may hold NaN.
    weight (B,): the per-token loss weight of each reply, counted by the caller over all micro-batches and ranks:
    1/(B·length) is the mean over replies of per-token means, 1/(all tokens) the token mean, 1/(B·constant) Dr. GRPO's.
    surrogate: token_gain has what stands in place of the minimum. correction (B, T): c, as importance_weights gives
    it; None: 1. entropy (B, T): H of the policy's distribution at each token in nats, may be None when
    entropy_bonus == 0. Returns a scalar.
    """
    r = policy_ratio(logp, old_logp, mask, ratio)
    gain, _ = token_gain(logp, r, advantage, surrogate, clip_low, clip_high)
    if correction is not None:
        gain = gain * correction
    if kl:
        gain = gain - kl * k3(logp, ref_logp, mask)
    if entropy_bonus:
        gain = gain + entropy_bonus * entropy
    return -(weight[:, None] * gain.masked_fill(~mask, 0.0)).sum()


def importance_weights(
    old_logp, sampler_logp, mask, kind: str = "token", cap: float = 2.0, floor: float = 0.0, outside: str = "truncate"
) -> torch.Tensor:
    """Weights of tokens that another distribution sampled: (B, T) π_old / π_sampler in bounds, without a gradient.

    The sampler computes in another order or type than the trainer, or filters with top-k and top-p, so its replies are
    not quite the policy's. The ratio makes their mean right again, the cap keeps a rare token from outweighing a batch.
    old_logp: the trainer's log-probs with the weights that sampled, sampler_logp: the sampler's. kind "token": each
    token's own ratio; "sequence": its reply's, the product over its tokens; "none": 1 everywhere. A ratio outside
    [floor, cap] becomes the bound it passed ("truncate", truncated importance sampling, Ionides, J. Comput. Graph.
    Stat. 17, 2008) or 0 ("mask": the token, or the whole reply, teaches nothing; per token this is IcePop's, Ring-1T,
    arXiv 2510.18855). Padding may hold NaN; what is returned there means nothing.
    """
    log_ratio = (old_logp - sampler_logp).detach().masked_fill(~mask, 0.0)
    if kind == "none":
        return torch.ones_like(log_ratio)
    if kind == "sequence":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    elif kind != "token":
        raise ValueError(f'kind must be "token", "sequence" or "none", not {kind!r}')
    weights = log_ratio.exp()
    if outside == "mask":
        return weights.masked_fill((weights < floor) | (weights > cap), 0.0)
    if outside != "truncate":
        raise ValueError(f'outside must be "truncate" or "mask", not {outside!r}')
    return weights.clamp(floor, cap)


def token_weights(lengths, normalizer: str, replies: int, tokens: float, constant: int) -> torch.Tensor:
    """(B,) per-token loss weight of each reply. lengths (B,) in tokens; replies, tokens: counts over all ranks.

    "sequence": 1/(replies·length), "token": 1/tokens, "constant": 1/(replies·constant).
    """
    if normalizer == "sequence":
        return 1.0 / (replies * lengths)
    return torch.full_like(lengths, 1.0 / tokens if normalizer == "token" else 1.0 / (replies * constant))


def token_metrics(
    logp, old_logp, ref_logp, sampler_logp, advantage, mask, correction, cap, floor=0.0, *,
    clip_low, clip_high, ratio, surrogate="clip",
) -> dict[str, float]:  # fmt: skip
    """Sums over the tokens of a micro-batch of what a run watches (sampler_gap: the largest).

    Inputs as in grpo_loss and importance_weights, without gradients; padding must be finite here.
    """
    r = policy_ratio(logp, old_logp, mask, ratio)
    _, clipped = token_gain(logp, r, advantage, surrogate, clip_low, clip_high)
    # A masked weight is 0, so it lies at or below any floor.
    bounded = (correction >= cap) | (correction <= floor)
    gap = (old_logp - sampler_logp).abs() * mask
    return {
        "tokens": mask.sum().item(),
        "clip_fraction": (clipped & mask).sum().item(),
        "kl": 0.0 if ref_logp is None else k3(logp, ref_logp, mask).sum().item(),
        "sampler_gap_mean": gap.sum().item(),
        "importance_capped": (bounded & mask).sum().item(),
        "sampler_gap": gap.max().item(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The embedded default: `python grpo.py` alone

EMBEDDED = "runs/embedded"
EMBEDDED_FLAGS = f"""--model {EMBEDDED}/base --data {EMBEDDED}/puzzles/records.jsonl --out {EMBEDDED}/grpo
    --prompts 32 --group 8 --steps 200 --lr 2e-4 --kl 0.04 --clip-high 0.28 --normalizer token
    --max-new-tokens 40 --save-every 100""".split()


def make_embedded(world: training.World) -> None:
    """Make, once, what the embedded default trains on: built-in puzzles, and a tiny base model that can speak.

    A model with random weights writes noise that no rule can reward. So the base is first taught by dpo.py's SFT on
    warm-up data (toy/primer.py): loosely formatted replies whose puzzle answers are random.
    """
    here, there = Path(__file__).resolve().parent, Path(EMBEDDED)
    if world.main and not (there / "base/model.safetensors").exists():
        print(f"first run: making a tiny base model and puzzles in {there} (about two minutes)", flush=True)
        env = training.child_environment()
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # its `python` is this one
        subprocess.run(["bash", here / "recipes/tiny_base.sh", there], check=True, env=env)
    world.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv=None):
    embedded_flags = " ".join(EMBEDDED_FLAGS)
    parser = training.Parser(__doc__, f"Without --model and --data: the embedded default, that is {embedded_flags}")
    add = parser.add_argument
    add("--model", required=True, help="checkpoint to start from (directory or hub id)")
    add("--data", required=True, nargs="+", help="records.jsonl files: prompts, images and gold answers")
    add("--skip-bad", action="store_true",
        help="leave out records whose gold answer cannot be scored, and say how many, instead of stopping")  # fmt: skip
    add("--strict-data", action="store_true",
        help="end the run at a picture that turns out to be broken when it is needed, instead of taking the record "
        "behind it in its place and saying so")  # fmt: skip
    add("--out", required=True, help="run directory; ends as a model directory for the next stage")
    add("--seed", type=integer("[0, 4294967295]"), default=0, help="fixes the order of the prompts and every sample")

    add = parser.add_argument_group("sampling").add_argument
    add("--steps", type=integer("[1, 1e6]"), default=100, help="steps of sampling and learning")
    add("--prompts", type=integer("[1, 1e6]"), default=64, help="P: prompts per step, over all processes")
    add("--group", type=integer("[2, 1e5]"), default=8, help="G: replies per prompt; one has nothing to compare with")
    add("--max-refill", type=integer("[0, 1000]"), default=0,
        help="times a step may sample other prompts in place of those whose replies teach nothing (DAPO's dynamic "
        "sampling); 0: never")  # fmt: skip
    add("--prompt-weights", default="none", choices=["none", "difficulty", "dispersion"],
        help="how often a prompt is asked again, by its last group's weight (see --group-weights): one of weight 0.3 "
        "is passed over in 7 of 10 epochs, none in more than 9; none: every prompt once an epoch")  # fmt: skip
    add("--temperature", type=real("[1e-4, 1e4]"), default=1.0,
        help="sampling temperature; log-probs are taken at the same")  # fmt: skip
    add("--top-k", type=integer("[0, 1e6]"), default=0, help="sample among the k likeliest tokens; 0: all")
    add("--top-p", type=real("(0, 1]"), default=1.0, help="sample among the likeliest tokens of this mass; 1: all")
    add("--replay-filter", action="store_true",
        help="take the trainer's log-probs among the tokens that --top-k and --top-p left to the sampler: ratios are "
        "then those of the distribution that was sampled from; otherwise over the whole vocabulary")  # fmt: skip
    add("--max-new-tokens", type=integer("[1, 1e6]"), default=512, help="longest reply in tokens, end token included")

    add = parser.add_argument_group("reward and advantage").add_argument
    add("--reward", nargs="+", default=[], metavar="TYPE=NAME",
        help="what the reward takes in place of the accuracy (default: the first of each): "
        + "; ".join(f"{kind}={'|'.join(names)}" for kind, names in rewards.REWARDS.items()))  # fmt: skip
    add("--format-weight", type=real("[0, 1e6]"), default=0.5,
        help="reward = accuracy + this x format; 0: format is not rewarded")  # fmt: skip
    add("--overlong-buffer", type=integer("[0, 1e6]"), default=0,
        help="last tokens before --max-new-tokens, over which the reward falls by up to 1 (DAPO); 0: none")  # fmt: skip
    add("--accuracy-low", type=real("[0, 1]"), default=0.0, help="groups of a smaller mean accuracy teach nothing")
    add("--accuracy-high", type=real("[0, 1]"), default=1.0, help="groups of a larger mean accuracy teach nothing")
    add("--advantage-scale", default="group", choices=["group", "none", "batch"],
        help="advantages divided by the std of the group, nothing (Dr. GRPO), or the std of the batch")  # fmt: skip
    add("--advantage-baseline", default="mean", choices=["mean", "loo"],
        help="what a reward is compared with: the mean of its group, or of the other replies (RLOO)")  # fmt: skip
    add("--group-weights", default="none", choices=["none", "difficulty", "dispersion"],
        help="weigh a group's advantages by its mean accuracy d: difficulty: 4 d (1 - d); dispersion: that times the "
        "root of how far its answers are spread (PuzzleCraft); none: all groups alike")  # fmt: skip

    add = parser.add_argument_group("loss").add_argument
    add("--surrogate", default="clip", choices=["clip", "cispo", "sapo"],
        help="what a token gains by its ratio: clip: up to the bounds below (PPO, GRPO); cispo: its log-prob, weighed "
        "by the ratio up to 1 + --clip-high; sapo: a smooth gate without bounds")  # fmt: skip
    add("--clip-low", type=real("(0, 1]"), default=0.2, help="ratio clipped below 1 - this")
    add("--clip-high", type=real("[0, 1e6]"), default=0.2, help="ratio clipped above 1 + this (DAPO: 0.28)")
    add("--ratio", default="token", choices=["token", "sequence"], help="ratio per token, or per reply (GSPO)")
    add("--kl", type=real("[0, 1e6]"), default=0.0,
        help="weight of the KL to the starting model; 0: no reference model at all")  # fmt: skip
    add("--entropy-bonus", type=real("[0, 1e6]"), default=0.0,
        help="weight of the policy's exact entropy, which the loss rewards; 0: none")  # fmt: skip
    add("--normalizer", default="sequence", choices=["sequence", "token", "constant"],
        help="per-token loss weight: sequence: 1/its reply's length (GRPO); token: the same for all (DAPO); "
        "constant: 1/--max-new-tokens (Dr. GRPO)")  # fmt: skip
    add("--mask-truncated", action="store_true",
        help="replies that did not end within --max-new-tokens carry no loss; their group's mean has them")  # fmt: skip
    add("--importance", default="token", choices=["token", "sequence", "none"],
        help="weigh what was sampled by the trainer's probability over the sampler's: of each token, of its whole "
        "reply, or not. vLLM gives probabilities after --top-k and --top-p, so the weight undoes these filters too; "
        "the builtin sampler gives those before. With --replay-filter all are after them")  # fmt: skip
    add("--importance-cap", type=real("[1, 1e6]"), default=2.0, help="largest such weight")
    add("--importance-floor", type=real("[0, 1]"), default=0.0, help="smallest such weight; 0: none")
    add("--importance-outside", default="truncate", choices=["truncate", "mask"],
        help="a weight beyond floor or cap becomes that bound, or 0, so that the token or reply teaches nothing "
        "(per token with 0.5 and 5: IcePop)")  # fmt: skip

    add = parser.add_argument_group("optimiser").add_argument
    add("--lr", type=real("[1e-12, 1]"), default=1e-6, help="peak learning rate of AdamW")
    add("--schedule", default="constant", choices=["linear", "constant"], help="linear falls to 0 at the last step")
    add("--warmup", type=integer("[0, 1e6]"), default=0, help="steps over which the rate rises from 0; 0: none")
    add("--grad-clip", type=real("0 or [1e-6, 1e6]"), default=1.0, help="largest global gradient norm; 0: no clipping")
    add("--updates", type=integer("[1, 1000]"), default=1,
        help="optimizer updates on each sampled batch; above 1 the clipping matters")  # fmt: skip

    add = judge.add_judge_flags(parser, ["none", "model", "endpoint"], "none",
        "who decides whether a short free answer (answer_type text) that no rule finds right says what the gold says: "
        "a model of this machine, or one behind a server; none: nobody")  # fmt: skip
    endpoint.add_endpoint_flags(add)
    vllm_sampler.add_sampler_flags(parser, train=True)
    training.add_training_flags(parser)
    argv = sys.argv[1:] if argv is None else argv
    embedded = not {"--model", "--data", "-h", "--help"} & {flag.split("=")[0] for flag in argv}
    args = parser.parse_args(EMBEDDED_FLAGS + argv if embedded else argv)
    judge.check_judge_flags(parser, args)
    try:
        rewards.chosen_rewards(args.reward)
    except ValueError as error:
        parser.error(f"argument --reward: {error}")
    if args.one_step_off_policy and (args.sampler != "vllm" or args.vllm_tp > 1):
        parser.error("--one-step-off-policy needs --sampler vllm and --vllm-tp 1: no model can sample while it learns")
    if args.one_step_off_policy and args.importance == "none":
        parser.error("--one-step-off-policy: --importance token or sequence must correct for the older weights")
    if args.one_step_off_policy and args.max_refill:
        parser.error("--max-refill needs the scores of a step before it samples on: not with --one-step-off-policy")
    if args.one_step_off_policy and args.prompt_weights != "none":
        parser.error("--prompt-weights needs the scores of a step before the next: not with --one-step-off-policy")
    if args.one_step_off_policy and args.replay_filter:
        parser.error("--replay-filter needs the weights that sampled: not with --one-step-off-policy")
    if args.replay_filter and not args.top_k and args.top_p == 1:
        parser.error("--replay-filter needs --top-k or --top-p: without a filter there is nothing to replay")
    if args.overlong_buffer > args.max_new_tokens:
        parser.error(f"--overlong-buffer {args.overlong_buffer} is more than --max-new-tokens {args.max_new_tokens}")
    if args.accuracy_low > args.accuracy_high:
        parser.error(f"--accuracy-low {args.accuracy_low:g} is above --accuracy-high {args.accuracy_high:g}")
    return args


def score_replies(encoder, records, replies, scorer, progress, longest=0, overlong_buffer=0) -> tuple[list, list]:
    """(texts, scores) of the replies to some records, both [record][reply]; a score is what rewards.score returns.

    progress: share of the run that is over, for rewards that rise. With an overlong_buffer a score has "overlong" too,
    and "reward" is less by it. longest: tokens of a reply at most.
    """
    texts = [[encoder.decode(reply.ids) for reply in group] for group in replies]
    scores = scorer.score_groups(records, texts, progress)
    if overlong_buffer:
        for group, group_scores in zip(replies, scores, strict=True):
            for reply, score in zip(group, group_scores, strict=True):
                score["overlong"] = overlong_penalty(len(reply.ids), longest, overlong_buffer)
                score["reward"] += score["overlong"]
    return texts, scores


def weights_of(rollouts, kind: str) -> torch.Tensor:
    """(p,) group_weights of some rollouts, fp64; kind "none": 1, "difficulty" or "dispersion"."""
    if kind == "none" or not rollouts:
        return torch.ones(len(rollouts), dtype=torch.float64)
    accuracy = [[score["accuracy"] for score in rollout.scores] for rollout in rollouts]
    dispersion = None
    if kind == "dispersion":
        options = [len(rollout.record.get("options") or ()) for rollout in rollouts]
        answers = [[score["answer"] for score in rollout.scores] for rollout in rollouts]
        spread = [answer_dispersion(*group) for group in zip(answers, options, strict=True)]
        dispersion = torch.tensor(spread, dtype=torch.float64)
    return group_weights(torch.tensor(accuracy, dtype=torch.float64), dispersion)


def signal_of(rollouts, low: float, high: float, kind: str) -> torch.Tensor:
    """(p,) what each group counts, fp64: its weight of that kind; 0 where all rewards are equal, or where the mean
    accuracy is not within low … high."""
    # fp32, as advantages are computed from; fp64: a mean of 0.8 must not lie above a bound of 0.8.
    rewards = torch.tensor([[score["reward"] for score in rollout.scores] for rollout in rollouts])
    accuracy = torch.tensor([[s["accuracy"] for s in rollout.scores] for rollout in rollouts], dtype=torch.float64)
    mixed = (rewards.amax(1) != rewards.amin(1)) & accuracy_filter(accuracy, low, high)
    return weights_of(rollouts, kind) * mixed


def empty_slots(world, rollouts: dict, *teaching) -> list[int]:
    """The slots of the whole batch whose replies teach nothing, ascending, on every rank.

    Dynamic sampling (DAPO, arXiv 2503.14476) asks other prompts in their place. rollouts: {slot: Rollout} of this
    rank; slot p belongs to rank p % world.size. teaching: low, high and kind of signal_of.
    """
    signal = signal_of(rollouts.values(), *teaching).tolist()
    own = [slot for slot, teaches in zip(rollouts, signal, strict=True) if not teaches]
    return sorted(sum(world.gather(own), []))


def policy_log_probs(policy, groups, temperature, token_filter, entropy_bonus):
    """(logp, mask, entropy) of the policy, all (B, T); entropy is None where no bonus asks for it."""
    # All logits once more, forward and backward: only where somebody wants it.
    if entropy_bonus:
        return model.log_probs_and_entropies(policy, groups, temperature, token_filter)
    return *model.log_probs(policy, groups, temperature, token_filter), None


def reference_log_probs(reference, groups, temperature, token_filter):
    """(B, T) log-probs under the starting model, among the same tokens; None if there is no reference."""
    if reference is None:
        return None
    with torch.no_grad():
        return model.log_probs(reference, groups, temperature, token_filter)[0]


# What the progress bar shows: label and key of the log.
BAR = {
    "reward": "reward",
    "accuracy": "accuracy",
    "format": "format",
    "length": "length",
    "kl": "kl",
    "entropy": "entropy",
    "clip": "clip_fraction",
    "rollouts/s": "rollouts_per_s",
}

# What the learn phase sums up over tokens, micro-batches and updates; sampler_gap is the largest.
TOKEN_SUMS = ("loss", "clip_fraction", "kl", "sampler_gap_mean", "importance_capped", "tokens", "sampler_gap")


def add_metrics(sums: dict, metrics: dict) -> None:
    for name, value in metrics.items():
        sums[name] = max(sums[name], value) if name == "sampler_gap" else sums[name] + value


def learning_metrics(world, sums: dict, tokens: float, updates: int) -> dict:
    """TOKEN_SUMS of this rank -> means over the tokens of all ranks. tokens: of the whole batch.

    Groups without a signal are skipped, but their tokens count: nothing of them is clipped.
    """
    # A maximum cannot be summed, so it travels by itself.
    largest_gap = max(world.gather(sums["sampler_gap"]))
    total = dict(zip(TOKEN_SUMS, world.sum(*(sums[name] for name in TOKEN_SUMS)), strict=True))
    learned = max(1.0, total["tokens"])
    return {
        "loss": total["loss"] / updates,
        "kl": total["kl"] / tokens / updates,
        "clip_fraction": total["clip_fraction"] / tokens / updates,
        "sampler_gap": largest_gap,
        "sampler_gap_mean": total["sampler_gap_mean"] / learned,
        "importance_capped": total["importance_capped"] / learned,
    }


def main(argv=None):
    args = parse_args(argv)
    world = training.setup(args.timeout)
    if args.model == f"{EMBEDDED}/base":
        make_embedded(world)
    P, G = args.prompts, args.group
    if P % world.size:
        raise DataError(f"--prompts {P} cannot be dealt evenly to {world.size} processes")
    # Input and run directory are checked before anything expensive: a typo must not cost a model's loading time.
    records = read_records(
        args.data, rewards.check_gold, skip_bad=args.skip_bad, max_image_pixels=args.max_image_pixels, world=world,
        decode=False,
    )  # fmt: skip
    run = Run.open(vars(args), world, (*vllm_sampler.MAY_CHANGE, *endpoint.MAY_CHANGE))
    options = training.load_options(args)
    policy, encoder = model.load(args.model, world, train=True, **options)
    encoder.check(world, records)
    if not args.strict_data:
        encoder.replace_broken(records, run.broken)
    # The reference exists only where a KL asks for it; it costs the memory of a second model.
    reference = model.load_reference(args.model, world, **options) if args.kl else None
    optimizer = training.adamw(policy, args.lr)
    pending = run.restore(policy, optimizer)

    stream = PromptStream(records, args.seed, P, world, pending, weighted=args.prompt_weights != "none")
    sample, state = partial(sampler.sample, filtered_logps=args.replay_filter), stream.to_json
    if args.sampler == "vllm":
        sample = vllm_sampler.VLLM(
            args.model, policy, encoder, world, records[world.rank :: world.size], tp=args.vllm_tp, seed=args.seed,
            max_new_tokens=args.max_new_tokens, memory=args.vllm_memory, parity_every=args.parity_every,
        )  # fmt: skip
    if args.one_step_off_policy:
        sample = vllm_sampler.OneStepOffPolicy(sample, encoder, stream.questions, run.step, args.steps, pending)
        state = sample.to_json
    scorer = scoring.Scorer(format_weight=args.format_weight, chosen=rewards.chosen_rewards(args.reward))
    scorer.judge = judge.open_judge(args, world)
    # What the loop hands on unchanged.
    sampling = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "max_new_tokens")}
    clipping = {name: getattr(args, name) for name in ("surrogate", "clip_low", "clip_high", "ratio")}
    bounds = {"cap": args.importance_cap, "floor": args.importance_floor}
    teaching = args.accuracy_low, args.accuracy_high, args.group_weights
    timer = training.PhaseTimer(world, policy.compute_dtype if args.measure_peak else None)
    cost = model.Cost(policy)

    def ask(step, asked, slots) -> dict[int, Rollout]:
        """{slot: Rollout} of this rank's prompts for some slots of a step's batch, after the first `asked` prompts."""
        chosen, seeds = stream.questions(step, asked, slots)
        prompts = encoder.prompts(chosen)
        mine = [prompt.record for prompt in prompts]  # others, where a picture is broken
        # Whose pictures are decoded meanwhile: those that come next, in a further round of this step or the next step.
        encoder.prefetch(stream.questions(step, asked + len(slots))[0])
        timer.end("rest")
        replies = sample(policy, prompts, G, seeds=seeds, **sampling)
        groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
        timer.end("sample", sum(cost.forward(groups)))
        texts, scores = score_replies(
            encoder, mine, replies, scorer, step / args.steps, args.max_new_tokens, args.overlong_buffer
        )
        # A rank without a slot of its own has sampled along with the others, for nothing.
        own = [slot for slot in slots if slot % world.size == world.rank]
        rollouts = dict(zip(own, map(Rollout, mine, groups, replies, texts, scores), strict=False))
        weights = weights_of(rollouts.values(), args.prompt_weights).tolist()
        stream.weigh(step, asked, slots, dict(zip(own, weights, strict=True)))
        timer.end("score")
        return rollouts

    bar = tqdm(total=args.steps, initial=run.step, desc="grpo", disable=not world.main)
    for step in range(run.step, args.steps):
        # 1. Sample: G replies to each of this rank's prompts, and by rule a reward for each reply
        rollouts, asked = ask(step, 0, range(P)), P
        for _ in range(args.max_refill):
            empty = empty_slots(world, rollouts, *teaching)
            if not empty:
                break
            rollouts |= ask(step, asked, empty)
            asked += len(empty)
        passed_over = stream.end_step(step, asked)

        # 2. Score: the rewards of a group give each of its replies an advantage
        batch = [rollouts[slot] for slot in sorted(rollouts)]
        mine, groups, replies, texts, scores = zip(*batch, strict=True)
        # Every rank sees all rewards: --advantage-scale batch needs the spread of the whole batch.
        advantages = group_advantages(
            gather_rewards(world, scores, P, G), args.advantage_scale, baseline=args.advantage_baseline
        )
        signal = signal_of(batch, *teaching)
        counted = torch.tensor([[reply.finished or not args.mask_truncated for reply in group] for group in replies])
        advantages = advantages[world.rank :: world.size] * signal[:, None].float() * counted
        lengths = torch.tensor([[len(reply.ids) for reply in group] for group in replies]).float()
        # Counted before the first backward, over all ranks: the loss must not depend on how the batch is divided.
        tokens, loss_tokens = world.sum(lengths.sum(), (lengths * counted).sum())
        weights = token_weights(lengths, args.normalizer, P * G, max(1.0, loss_tokens), args.max_new_tokens)
        # The advantage of a reply that does not count is 0 already; the KL must let go of it too.
        weights = weights * counted
        timer.end("score")

        # 3. Learn: clipped updates on the groups that carry a signal
        taught = [p for p in range(len(groups)) if advantages[p].any()]
        # KL and entropy pull at every group.
        useful = list(range(len(groups))) if args.kl or args.entropy_bonus else taught
        learned_groups = [groups[p] for p in useful]
        filler = (groups[0][0], [replies[0][0].ids[:1]])  # keeps ranks in step, at weight 0
        micros = training.micro_batches(world, model.group_sizes(learned_groups), args.micro_tokens)
        # A function of the step alone, so that a resumed run has the same.
        lr = training.learning_rate(step, args.steps, args.lr, args.schedule, args.warmup)
        # The old policy is that of the weights that sampled: of the first update.
        old_logps, filters = {}, [TokenFilter(args.top_k, args.top_p) if args.replay_filter else None for _ in micros]
        norm, skipped, sums = 0.0, 0, dict.fromkeys(TOKEN_SUMS, 0.0)
        for _ in range(args.updates if any(world.gather(len(useful))) else 0):
            for number, micro in enumerate(micros):
                last = number == len(micros) - 1
                rows = [learned_groups[i] for i in micro] or [filler]
                among = args.temperature, filters[number]
                logp, mask, entropy = policy_log_probs(policy, rows, *among, args.entropy_bonus)
                # For a filler too: the ranks gather the weights of a sharded reference together.
                ref = reference_log_probs(reference, rows, *among)
                if not micro:
                    training.backward(policy, world, 0.0 * logp.sum(), last)
                    continue
                members, device = [useful[i] for i in micro], logp.device
                advantage = torch.cat([advantages[p] for p in members]).to(device)
                weight = torch.cat([weights[p] for p in members]).to(device)
                sampled = pad_sequence([reply.logps for p in members for reply in replies[p]], True).to(device)
                old = old_logps.setdefault(number, logp.detach())
                correction = importance_weights(
                    old, sampled, mask, args.importance, outside=args.importance_outside, **bounds
                )
                loss = grpo_loss(
                    logp, old, ref, advantage, mask, weight, kl=args.kl, correction=correction, entropy=entropy,
                    entropy_bonus=args.entropy_bonus, **clipping,
                )  # fmt: skip
                training.backward(policy, world, loss, last)
                add_metrics(sums, {"loss": loss.item()} | token_metrics(
                    logp.detach(), old, ref, sampled, advantage, mask, correction, **bounds, **clipping
                ))  # fmt: skip
            norm = training.update(policy, optimizer, lr, args.grad_clip)
            skipped += not math.isfinite(norm)
        timer.end("learn", args.updates * cost.learn(learned_groups, reference=args.kl > 0))

        # 4. Record
        row = {"step": step + 1} | batch_metrics(world, scores, replies, tokens, len(taught), P, G)
        row |= learning_metrics(world, sums, tokens, args.updates) | {"grad_norm": norm, "skipped": skipped, "lr": lr}
        if args.one_step_off_policy:
            row["staleness"] = args.updates * sample.off_policy  # updates since the replies were sampled
        if args.max_refill:
            row["prompts_sampled"] = asked
        if args.judge != "none":
            row |= scoring.judge_metrics(world, scores)
        if args.prompt_weights != "none":
            row["prompts_passed_over"] = passed_over
        if args.group_weights != "none":
            row["group_weight"] = world.sum(signal.sum() / P)[0]
        row["broken_pictures"] = run.share_broken(step + 1)
        row |= timer.metrics(rollouts=asked * G, tokens=tokens)
        run.log(row, shown_replies(mine[0], texts[0], scores[0]))
        bar.set_postfix({label: f"{row[name]:.3g}" for label, name in BAR.items()})
        bar.update()
        run.count_skipped(step + 1, skipped > 0, asked_and_said(mine, texts), args.max_skipped)
        run.end_step(step + 1, args.steps, policy, optimizer, save_every=args.save_every, keep=args.keep, extra=state)
    bar.close()
    run.export(policy, encoder)
    if world.main:
        print(f"{args.out}: {args.steps} steps of GRPO done; the model is in the directory")


if __name__ == "__main__":
    training.run(main)
