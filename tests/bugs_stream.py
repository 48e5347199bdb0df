"""Planted bugs of the order of prompts, the weights of groups, and the sampler's filter replayed in the trainer.

(name, file, old text, new text, tests)
"""

STREAM = "tests/test_prompt_stream.py"
HEAD = "tests/test_head.py"
GRPO = "tests/test_grpo_losses.py::test_"
WEIGHTS = f"{GRPO}a_group_counts_most_when_half_of_it_is_right_and_nothing_when_all_or_none_is"
SPREAD = f"{GRPO}the_dispersion_of_answers_is_their_entropy_or_how_many_differ"
WEIGHED = f"{GRPO}advantages_are_multiplied_by_the_weight_of_their_group"
CURRICULUM = f"{GRPO}prompts_that_teach_nothing_are_passed_over_in_most_epochs"
AHEAD = f"{GRPO}the_pictures_of_the_next_round_are_decoded_while_replies_are_sampled"
REPLAY = f"{GRPO}with_replayed_filters_ratio_and_importance_weights_are_1_at_the_first_update"

# fmt: off
BUGS = [
    # ---- prompt_stream.py
    ("every step has the same prompts", "prompt_stream.py",
     "start = step * self.prompts + self.beyond\n        if self.weighted",
     "start = self.beyond\n        if self.weighted", STREAM),
    ("seeds do not depend on the step", "prompt_stream.py",
     "(self.seed * 10**6 + step) * 10**6", "self.seed * 10**12", STREAM),
    ("refilled prompts come again in the next step", "prompt_stream.py", "self.beyond += read - self.prompts", "pass",
     STREAM),
    ("refilled prompts have the seeds of those they replace", "prompt_stream.py",
     "* 10**6 + asked\n", "* 10**6\n", STREAM),
    ("how far the stream was read is forgotten on resume", "prompt_stream.py",
     'state.get("refilled", 0)', 'state.get("asked", 0)', STREAM),
    ("weights are forgotten on resume", "prompt_stream.py", 'state.get("prompt_weights", {})', "{}", STREAM),
    ("weights change the order of the step they come from", "prompt_stream.py",
     "self.new_weights[index] = everyone[slot]", "self.weights[index] = everyone[slot]", STREAM),
    ("each rank knows the weights of its own prompts only", "prompt_stream.py",
     "for part in self.world.gather(weights) for", "for part in [dict.fromkeys(slots, 1.0) | weights] for", STREAM),
    ("a prompt of weight 0 never comes back", "prompt_stream.py", "max(LEAST_CHANCE, ", "max(0.0, ", STREAM),
    ("weights are ignored", "prompt_stream.py", "self.weights.get(index, 1.0))", "1.0)", STREAM),
    ("a prompt is passed over in all epochs or in none", "prompt_stream.py",
     'f"{self.seed}/{position}/passed over"', 'f"{self.seed}/{index}/passed over"', STREAM),

    # ---- grpo.py: weights
    ("easy groups count most", "grpo.py", "weights = 4 * d * (1 - d)", "weights = 4 * d * d", WEIGHTS),
    ("the dispersion is not rooted", "grpo.py", "weights * dispersion.sqrt()", "weights * dispersion", WEIGHTS),
    ("the entropy of answers is in nats", "grpo.py", "min(1.0, entropy / math.log(options))", "min(1.0, entropy)",
     SPREAD),
    ("one answer of all replies is spread a little", "grpo.py", "return (len(counts) - 1) /", "return len(counts) /",
     SPREAD),
    ("--group-weights is ignored", "grpo.py", "signal_of(batch, *teaching)", 'signal_of(batch, *teaching[:2], "none")',
     WEIGHED),
    ("--prompt-weights is ignored", "grpo.py", 'weighted=args.prompt_weights != "none"', "weighted=False",
     CURRICULUM),
    ("the prompts of the next step are decoded ahead, not those of the refill", "grpo.py",
     "stream.questions(step, asked + len(slots))[0]", "stream.questions(step + 1)[0]", AHEAD),

    # ---- head.py: the replayed filter
    ("the kept tokens are found anew at each update", "head.py", "if self.kept is None:", "if True:", HEAD),
    ("a sampled token may have been dropped", "head.py", "mask[row[inside], token[inside]] = True", "pass", HEAD),
    ("the gradient is that of the whole vocabulary", "head.py",
     "            if ctx.kept is not None:\n                logits = ctx.kept.only(logits, start)\n", "", HEAD),
    ("kept tokens are those of the first chunk", "head.py",
     "self.bounds[start : start + len(logits) + 1]", "self.bounds[: len(logits) + 1]", HEAD),
    ("the filter is found before the temperature", "head.py",
     "logits = token_logits(hidden[start : start + rows], weight, temperature, forbidden)\n            mask",
     "logits = token_logits(hidden[start : start + rows], weight, 1.0, forbidden)\n            mask", HEAD),
    ("the sampler's log-probs are before its filters", "sampler.py",
     "scored = filtered if filtered_logps else logits", "scored = logits", HEAD),
    ("the builtin sampler is not told to replay", "grpo.py", "filtered_logps=args.replay_filter",
     "filtered_logps=False", REPLAY),
    ("the reference chooses among the whole vocabulary", "grpo.py",
     "model.log_probs(reference, groups, temperature, token_filter)",
     "model.log_probs(reference, groups, temperature)", REPLAY),
]
# fmt: on
