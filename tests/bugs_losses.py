"""Planted bugs of the losses and objectives that are choices by flag: plant_bugs.py plants them, entry by entry.

(name, file, old text, new text, tests)
"""

GRPO = "tests/test_grpo_losses.py"
DPO = "tests/test_dpo_losses.py"
TRL = "tests/test_losses_trl.py"

# fmt: off
BUGS = [
    # ---- grpo.py
    ("leave-one-out is scaled the wrong way", "grpo.py",
     "(group_size / max(1, group_size - 1))", "((group_size - 1) / group_size)", GRPO),
    ("CISPO lets the gradient through its weight", "grpo.py",
     "r.detach().clamp(max=bound)", "r.clamp(max=bound)", GRPO),
    ("CISPO drops what its bound should only hold back", "grpo.py",
     "bounded_ratio = r.detach().clamp(max=bound)", "bounded_ratio = r.detach() * (r <= bound)", TRL),
    ("SAPO's gate has another slope", "grpo.py", "torch.sigmoid(tau * (r - 1)) * 4 / tau",
     "torch.sigmoid(tau * (r - 1)) * 4", GRPO),
    ("SAPO's temperatures are swapped", "grpo.py", "torch.where(advantage > 0, rising, falling)",
     "torch.where(advantage > 0, falling, rising)", GRPO),
    ("masked importance weights are capped", "grpo.py", "weights.masked_fill((weights < floor) | (weights > cap), 0.0)",
     "weights.clamp(max=cap).masked_fill(weights < floor, 0.0)", GRPO),
    ("a weight at its bound is masked", "grpo.py", "(weights < floor) | (weights > cap)",
     "(weights <= floor) | (weights >= cap)", GRPO),
    ("masked tokens are not counted", "grpo.py", "| (correction <= floor)", "", GRPO),
    ("--importance-outside is ignored", "grpo.py", "args.importance, outside=args.importance_outside, **bounds",
     "args.importance, **bounds", GRPO),
    ("--advantage-baseline is ignored", "grpo.py", ", baseline=args.advantage_baseline", "", GRPO),
    ("the overlong penalty begins at the buffer's length", "grpo.py",
     "max(0, length - (longest - buffer)) / buffer", "max(0, length - buffer) / buffer", GRPO),
    ("the overlong penalty is rewarded", "grpo.py", "return -max(0, length", "return max(0, length", GRPO),
    ("the overlong penalty does not reach the reward", "grpo.py",
     'score["reward"] += score["overlong"]', "pass", GRPO),
    ("the accuracy filter keeps the easy groups", "grpo.py", "& (mean <= high)", "", GRPO),
    ("the accuracy filter excludes its bounds", "grpo.py", "(mean >= low) &", "(mean > low) &", GRPO),
    ("truncated replies keep their loss", "grpo.py", "reply.finished or not args.mask_truncated", "True", GRPO),
    ("truncated replies are still held to the reference", "grpo.py",
     "weights = weights * counted", "pass", GRPO),
    ("truncated replies count in the token mean", "grpo.py", "(lengths * counted).sum()", "lengths.sum()", GRPO),
    ("a refill replaces groups that teach", "grpo.py", "if not teaches]", "if teaches]", GRPO),
    ("refilling looks at rewards only", "grpo.py", "& accuracy_filter(accuracy, low, high)", "", GRPO),
    ("each rank refills by itself", "grpo.py", "sorted(sum(world.gather(own), []))", "sorted(own)", GRPO),
    ("entropy is punished", "grpo.py", "gain + entropy_bonus * entropy", "gain - entropy_bonus * entropy", GRPO),
    ("groups of equal rewards get no entropy bonus", "grpo.py",
     "if args.kl or args.entropy_bonus else", "if args.kl else", GRPO),
    ("the gradient of the entropy lacks a term", "head.py",
     "(probability * (logp + entropy) *", "(probability * logp *", GRPO),
    ("the gradient of the entropy forgets the temperature", "head.py",
     "slope = -grad / (ctx.temperature or 1.0)", "slope = -grad", GRPO),

    # ---- dpo.py
    ("label smoothing does not flip the pair", "dpo.py", "label_smoothing * F.logsigmoid(-margin)",
     "label_smoothing * F.logsigmoid(margin)", DPO),
    ("IPO's goal is 1/beta", "dpo.py", "(h - 1 / (2 * beta))", "(h - 1 / beta)", DPO),
    ("IPO sums over the reply", "dpo.py", "h = chosen_gain / chosen_length", "h = chosen_gain", TRL),
    ("the quality loss rewards the rejected reply", "dpo.py", "F.logsigmoid(-(rejected_reward - shift))",
     "F.logsigmoid(rejected_reward - shift)", DPO),
    ("the shift is taken off the chosen reward only", "dpo.py", "-(rejected_reward - shift)", "-rejected_reward", DPO),
    ("--quality-weight is ignored", "dpo.py", "total + quality_weight * loss_quality", "total + loss_quality", DPO),
    ("--preference-weight is ignored", "dpo.py", "total = preference_weight * loss_dpo", "total = loss_dpo", DPO),
    ("a filler pair adds to the quality loss", "dpo.py", "(quality_loss(*sides, beta, shift) * real_pairs).sum()",
     "quality_loss(*sides, beta, shift).sum()", DPO),
    ("held-out pairs are measured against the references of training pairs", "dpo.py",
     "eval_pairs, eval_reference, args.micro_tokens", "eval_pairs, reference, args.micro_tokens", DPO),
    ("each window of held-out pairs is a mean of its own", "dpo.py",
     "refs, len(pairs), chosen_tokens, shift, objective", "refs, len(rows), chosen_tokens, shift, objective", DPO),
    ("the last update is not evaluated", "dpo.py", " or step + 1 == steps)", ")", DPO),
    ("evaluation trains", "dpo.py",
     "            add_metrics(sums, metrics)\n    training.release",
     "            add_metrics(sums, metrics)\n    policy.hf.lm_head.weight.data.mul_(0.9)\n    training.release", DPO),
    ("the reward shift is forgotten on resume", "dpo.py", '.get("reward_shift", 0.0)', '.get("shift", 0.0)', DPO),
    ("the reward shift is that of the last step", "dpo.py",
     "return mean + (value - mean) / (count + 1)", "return value", DPO),
]
# fmt: on
