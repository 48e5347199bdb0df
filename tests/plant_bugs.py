"""Plants bugs, one at a time, and checks that the tests see each of them.

    python tests/plant_bugs.py [--only NAME …]
    python tests/plant_bugs.py --list             # only whether every bug can still be planted

A test suite goes soft without a sound: a tolerance is widened, an assertion dropped, and it still passes. Here every
entry of BUGS is a mistake somebody could make. For each one the sources are copied to a temporary folder, one text is
replaced by another in one file, and the fast tests named with it run there, two bugs at a time. A test must fail.

Ends with status 0 when every bug was caught; 1 when one survived, when its text is not in the file exactly once (the
code moved on, and the entry has to follow), or when the tests fail without any bug. A bug may also make the tests hang:
that is believed, and counts as caught, only if the same tests end in time without the bug right afterwards. Otherwise
the machine is merely busy, and the bug is tried again with more time; what stays unclear counts as not caught.
"""

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2
PATIENCE = 60  # seconds more than without a bug, before the tests are suspected to hang
UNCLEAR = -1  # in place of pytest's exit status


class Bug(NamedTuple):
    name: str
    file: str
    old: str  # must occur exactly once in the file
    new: str
    tests: str  # what to run: test files, or file::test, with spaces between


def some(file, *names):
    """Only these tests of a file."""
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


def families(*names):
    return some("test_families", *names)


LOSSES = "tests/test_losses.py"
PARITY = "tests/test_parity.py"
REWARDS = "tests/test_rewards.py"
ANSWERS = "tests/test_answers.py"
HEDGES = some("test_rewards", "a_hedge_is_not_even_readable_as_mathematics")
JUDGE = "tests/test_judge.py"
JIGSAW = "tests/test_jigsaw.py"
TOY = "tests/test_toy.py"
# The other files take longer: from them only the tests that must notice.
GROUPS = some(
    "test_groups",
    "a_group_has_the_log_probs_and_gradients_of_the_plain_layout",
    "so_it_has_at_temperature_0_7",
    "image_and_video_pads_have_no_probability_and_the_rest_sums_to_1",
)
HEAD = some("test_groups", "log_probs_of_tokens_and_their_gradients_are_those_of_log_softmax")
SAMPLER = some(
    "test_sampler",
    "greedy_replies_equal_generate",
    "sampled_log_probs_are_those_of_the_trainer",
    "the_same_seeds_give_the_same_replies_and_others_do_not",
    "replies_stop_one_by_one_and_those_that_are_left_go_on_as_if_nothing_had_ended",
    "image_and_video_pads_are_never_sampled_however_likely",
    "filters_do_not_change_the_log_probs_that_are_returned",
)
TOKENS = some(
    "test_sampler",
    "frequencies_of_samples_match_the_softmax",
    "sampling_inverts_the_cumulated_distribution",
    "top_k_keeps_the_k_likeliest_and_rescales_them",
    "top_p_keeps_the_smallest_set_that_reaches_p",
    "top_p_counts_after_top_k",
)
ATTENTION = some(
    "test_attention",
    "attention_in_parts_is_attention_over_the_whole",
    "windows_of_one_length_at_a_time_are_windows_one_by_one",
)
FLASH = " ".join([
    some("test_attention", "the_calls_of_the_flash_kernels_mean_the_same_attention"),
    some("test_sampler", "sampling_with_flash_kernels_samples_the_same_replies"),
])  # fmt: skip
STANDS_ALONE = some("test_attention", "the_hugging_face_model_inside_still_stands_on_its_own")
ENCODER = some("test_encoder", "a_reply_survives_encoding_and_decoding_with_every_special_token_visible")
OWN_HEAD = some("test_loading", "a_head_of_its_own_is_used_even_if_the_config_ties_it")
ORDER = some("test_records", "every_epoch_is_a_permutation_of_its_own", "another_seed_gives_another_order")
FLAGS = some("test_training", "a_number_in_its_interval_is_read", "a_number_out_of_its_interval_is_refused")
UPDATES = some(
    "test_training", "learning_rates_by_hand", "an_update_clips_the_norm_sets_the_rate_and_clears_the_gradient"
)
NUMBERS = some("test_run_directory", "a_gradient_that_is_no_number_changes_nothing")
COST = some(
    "test_training",
    "the_flops_of_the_formula_are_those_that_torch_counts",
    "flops_of_windows_by_hand",
    "a_frozen_tower_has_no_backward_pass_to_count",
)
CHECKPOINT = some("test_run_directory", "a_resumed_run_ends_with_the_weights_of_an_unbroken_one")
SETTINGS = some("test_resume", "a_resumed_run_keeps_its_settings")
BACKGROUND = some("test_resume", "a_checkpoint_holds_the_moment_it_was_asked_for_though_it_is_written_later")
EXPORT = some("test_parallel", "a_model_is_exported_in_files_that_the_processes_write_in_turns")
PLAN = some(
    "test_plan",
    "a_plan_is_a_little_above_what_a_run_of_two_processes_holds",
    "shards_halve_with_twice_the_processes_and_copies_hold_more",
)
EVAL = some(
    "test_eval",
    "gains_of_50_and_20_give_22_point_7",
    "pass_at_k_by_hand",
    "a_summary_is_the_mean_over_replies_per_source_and_over_all",
    "ood_weights_weigh_the_sources",
)
REPORT = some(
    "test_report",
    "nothing_a_model_wrote_becomes_markup",
    "a_step_that_was_logged_twice_counts_as_logged_last",
    "the_table_has_a_column_a_stage_a_row_a_source_and_gf_where_there_is_one",
)
PAIRS = some(
    "test_distill",
    "each_corruption_moves_its_tags_and_no_other_character",
    "every_corruption_breaks_the_format_and_leaves_the_answer_to_a_reader",
    "chosen_is_the_policys_and_rejected_the_bases_broken",
    "the_first_reply_that_passes_is_taken_on_both_sides",
    "the_five_corruptions_are_equally_likely",
    "a_question_without_a_pair_says_why",
)
DPO_LOG = some("test_stages", "every_loss_of_dpo_trains_and_logs_what_it_minimises")
DPO_NUMBERS = some(
    "test_stages", "dpo_measures_implicit_rewards_against_the_starting_model_and_not_against_itself"
)
GRPO_NUMBERS = some("test_stages", "the_reward_and_its_parts_are_means_over_all_replies")
GRPO_GRADIENT = some("test_stages", "skipping_groups_without_signal_does_not_change_the_gradient")
GRPO_SETTINGS = some("test_stages", "grpo_trains_with_the_settings_of")
GRPO_UPDATES = some("test_stages", "updates_above_1_take_that_many_optimizer_steps_on_the_same_replies")
MICRO_BATCHES = some("test_stages", "the_size_of_micro_batches_does_not_matter")
PARALLEL = some("test_parallel", "several_processes_equal_one")
RESUME = some("test_resume", "more_steps_can_be_asked_for_later_and_equal_a_longer_run")

# fmt: off
BUGS = [Bug(*entry) for entry in (
    # ---- grpo.py: advantages and loss
    ("advantages have the wrong sign", "grpo.py",
     "centred = rewards - rewards.mean(1, keepdim=True)", "centred = rewards.mean(1, keepdim=True) - rewards", LOSSES),
    ("advantages are taken against the whole batch's mean", "grpo.py",
     "centred = rewards - rewards.mean(1, keepdim=True)", "centred = rewards - rewards.mean()", LOSSES),
    ("the std is the biased one", "grpo.py",
     "std = rewards.std(1, keepdim=True)", "std = rewards.std(1, correction=0, keepdim=True)", LOSSES),
    ("the std is over the prompts", "grpo.py",
     "std = rewards.std(1, keepdim=True)", "std = rewards.std(0, keepdim=True)", LOSSES),
    ("the batch's std is that of the centred rewards", "grpo.py",
     "std = rewards.std() if", "std = centred.std() if", LOSSES),
    ("equal rewards keep a rounding error as their advantage", "grpo.py",
     "centred = centred.masked_fill(same, 0.0)", "centred = centred * 1.0", LOSSES),
    ("eps is missing", "grpo.py", "centred / (std + eps)", "centred / std", LOSSES),
    ("padding counts in the loss", "grpo.py", "gain.masked_fill(~mask, 0.0)", "gain", LOSSES),
    ("padding is masked after the exponential", "grpo.py",
     "log_ratio = (logp - old_logp).masked_fill(~mask, 0.0)", "log_ratio = logp - old_logp", LOSSES),
    ("clip low and high are swapped", "grpo.py",
     "r.clamp(1 - clip_low, 1 + clip_high)", "r.clamp(1 - clip_high, 1 + clip_low)", LOSSES),
    ("the larger of the two surrogates is taken", "grpo.py", "torch.minimum(", "torch.maximum(", LOSSES),
    ("the loss has the wrong sign", "grpo.py",
     "return -(weight[:, None] * gain", "return (weight[:, None] * gain", LOSSES),
    ("the KL is rewarded", "grpo.py", "gain - kl * k3(", "gain + kl * k3(", LOSSES),
    ("k3 is of the other direction", "grpo.py", "gap = (ref_logp - logp)", "gap = (logp - ref_logp)", LOSSES),
    ("the ratio is inverted", "grpo.py", "log_ratio = (logp - old_logp)", "log_ratio = (old_logp - logp)", LOSSES),
    ("the sequence ratio is a product, not a mean", "grpo.py",
     " / mask.sum(1, keepdim=True).clamp_min(1)", "", LOSSES),
    ("the sequence ratio's mean counts padding", "grpo.py",
     "mask.sum(1, keepdim=True).clamp_min(1)", "mask.shape[1]", LOSSES),
    ("the weight is ignored", "grpo.py", "weight[:, None] * gain", "gain", LOSSES),
    ("importance weights are the wrong way up", "grpo.py",
     "log_ratio = (old_logp - sampler_logp)", "log_ratio = (sampler_logp - old_logp)", LOSSES),
    ("importance weights are not capped", "grpo.py", "weights.clamp(floor, cap)", "weights", LOSSES),
    ("importance weights are clamped from below", "grpo.py",
     "weights.clamp(floor, cap)", "weights.clamp(1 / cap, cap)", LOSSES),
    ("importance weights of a reply are a mean, not a product", "grpo.py",
     "log_ratio = log_ratio.sum(1, keepdim=True)", "log_ratio = log_ratio.mean(1, keepdim=True)", LOSSES),
    ("importance weights carry a gradient", "grpo.py",
     "(old_logp - sampler_logp).detach()", "(old_logp - sampler_logp)", LOSSES),
    ("the correction weighs the KL too", "grpo.py",
     "        gain = gain - kl * k3(logp, ref_logp, mask)",
     "        gain = gain - (1.0 if correction is None else correction) * kl * k3(logp, ref_logp, mask)", LOSSES),
    ("the normaliser sequence forgets the length", "grpo.py",
     "return 1.0 / (replies * lengths)", "return 1.0 / (replies * torch.ones_like(lengths))", LOSSES),

    # ---- dpo.py
    ("chosen and rejected are swapped in the margin", "dpo.py",
     "((chosen - ref_chosen) - (rejected - ref_rejected))",
     "((rejected - ref_rejected) - (chosen - ref_chosen))", LOSSES),
    ("beta is missing", "dpo.py", "margin = beta * (", "margin = (", LOSSES),
    ("the reference of the rejected reply is missing", "dpo.py", "- (rejected - ref_rejected))", "- rejected)", LOSSES),
    ("the DPO loss is averaged inside", "dpo.py",
     "return -F.logsigmoid(margin), margin", "return -F.logsigmoid(margin).mean(), margin", LOSSES),
    ("SFT makes the chosen reply less likely", "dpo.py",
     "return -(weight[:, None] * logp", "return (weight[:, None] * logp", LOSSES),
    ("SFT counts padding", "dpo.py", "* logp.masked_fill(~mask, 0.0)", "* logp", LOSSES),
    ("chosen and rejected are swapped in the batch", "dpo.py",
     'else ["chosen", "rejected"]', 'else ["rejected", "chosen"]', DPO_NUMBERS),
    ("DPO averages the log-probs over the reply", "dpo.py",
     "summed = logp.masked_fill(~mask, 0.0).sum(1).view(-1, 2)",
     "summed = (logp.masked_fill(~mask, 0.0).sum(1) / mask.sum(1)).view(-1, 2)", DPO_NUMBERS),
    ("the SFT part learns the rejected replies too", "dpo.py",
     'chosen = slice(None, None, 1 if loss == "sft" else 2)', "chosen = slice(None, None, 1)", DPO_NUMBERS),
    ("the SFT part is the mean of the pairs' means", "dpo.py",
     "torch.ones_like(lengths) / tokens", "1.0 / (replies * lengths)", DPO_NUMBERS),
    ("the SFT weight is ignored", "dpo.py", "total + sft_weight * loss_sft", "total + loss_sft",
     DPO_LOG),
    ("DPO divides each micro-batch by its own size", "dpo.py",
     "loss_dpo = (losses * real_pairs).sum() / pairs", "loss_dpo = losses.mean()", MICRO_BATCHES),
    ("a resumed run takes the trained model as its reference", "dpo.py",
     "    known = {int(index): tuple(value) for index, value in run.extra.get(name, {}).items()}\n",
     "    known = {} if run.restore(policy, training.adamw(policy, 1.0)) else {}\n", RESUME),
    ("dpo.py forgets to restore", "dpo.py", "run.restore(policy, optimizer)", "{}", RESUME),

    # ---- grpo.py: the stage
    ("replies are scored against the next record", "grpo.py",
     "scorer.score_groups(records, texts, progress)",
     "scorer.score_groups(records[1:] + records[:1], texts, progress)", GRPO_NUMBERS),
    ("log-probs are taken at temperature 1, whatever the sampler's", "grpo.py",
     "policy_log_probs(policy, rows, *among,", "policy_log_probs(policy, rows, 1.0, among[1],", GRPO_SETTINGS),
    ("the reference is the policy itself", "grpo.py",
     "reference_log_probs(reference, rows, *among)",
     "reference_log_probs(policy if reference else None, rows, *among)", GRPO_SETTINGS),
    ("the reference's log-probs are at temperature 1", "grpo.py",
     "model.log_probs(reference, groups, temperature, token_filter)",
     "model.log_probs(reference, groups, 1.0, token_filter)", GRPO_SETTINGS),
    ("--format-weight is ignored", "grpo.py",
     "scoring.Scorer(format_weight=args.format_weight, chosen", "scoring.Scorer(chosen", GRPO_SETTINGS),
    ("after skipping groups the advantages of others are taken", "grpo.py",
     "torch.cat([advantages[p] for p in members])", "torch.cat([advantages[i] for i in micro])", GRPO_GRADIENT),
    ("skipped groups do not count in the normaliser", "grpo.py",
     "args.normalizer, P * G, max(", "args.normalizer, len(useful) * G, max(", GRPO_GRADIENT),
    ("--advantage-scale is ignored", "grpo.py",
     "gather_rewards(world, scores, P, G), args.advantage_scale,",
     "gather_rewards(world, scores, P, G),", GRPO_GRADIENT),
    ("--normalizer is ignored", "grpo.py", "token_weights(lengths, args.normalizer,",
     'token_weights(lengths, "sequence",', GRPO_GRADIENT),
    ("each micro-batch is normalised by itself", "grpo.py",
     "weight = torch.cat([weights[p] for p in members]).to(device)",
     "weight = torch.nn.functional.normalize(torch.cat([weights[p] for p in members]).to(device), p=1, dim=0)",
     MICRO_BATCHES),
    ("the old log-probs are those of now, so that nothing is ever clipped", "grpo.py",
     "old = old_logps.setdefault(number, logp.detach())", "old = logp.detach()", GRPO_UPDATES),
    ("a token counts as clipped where the clip took nothing away", "grpo.py",
     "bounded < plain\n", "r != r.clamp(1 - clip_low, 1 + clip_high)\n", LOSSES),
    ("grpo.py forgets to restore", "grpo.py", "run.restore(policy, optimizer)", "{}", RESUME),

    # ---- two processes
    ("the mean that FSDP takes over the ranks is not undone", "training.py",
     "(loss * world.size).backward()", "loss.backward()", PARALLEL),
    ("GRPO counts the tokens of its own rank only", "grpo.py",
     "world.sum(lengths.sum(), (lengths * counted).sum())", "[lengths.sum().item()] * 2", PARALLEL),
    ("SFT counts the tokens of its own rank only", "dpo.py",
     "world.sum(sum(len(replies[0]) for _, replies in groups))[0]", "sum(len(replies[0]) for _, replies in groups)",
     PARALLEL),

    # ---- distill.py
    ("the corruptions all_tags and think_tags are one", "distill.py",
     'remove(reply, "<think>", "</think>", "<answer>", "</answer>")', 'remove(reply, "<think>", "</think>")', PAIRS),
    ("the end of thinking is not moved", "distill.py",
     'remove(reply, "<answer>", "</answer>", "</think>") + "</think>"',
     'remove(reply, "<answer>", "</answer>")', PAIRS),
    ("the same corruption is taken every time", "distill.py",
     "kind = rng.choice(list(broken))", "kind = list(broken)[0]", PAIRS),
    ("a wrong reply can be rejected", "distill.py",
     "if not (coupled or found_right(", "if not (True or found_right(", PAIRS),
    ("a wrong reply can be chosen", "distill.py",
     "        if reply.right:", "        if reply.well_formed:", PAIRS),
    ("reasoning that contradicts its answer is chosen", "distill.py",
     "contradicts(reply.reason, reply.answer, record) else", "False else", PAIRS),

    # ---- attention.py
    ("a prompt's tokens see the future", "attention.py",
     "attend(*states, layout.prompts, layout.prompts, True,",
     "attend(*states, layout.prompts, layout.prompts, False,", GROUPS),
    ("a reply's tokens see the future", "attention.py",
     "attend(*states, layout.replies, layout.replies, True,",
     "attend(*states, layout.replies, layout.replies, False,", GROUPS),
    ("a reply sees its siblings", "attention.py",
     "attend(*states, layout.replies, layout.replies, True,",
     "attend(*states, layout.by_prompt, layout.by_prompt, True,", GROUPS),
    ("a reply does not see its prompt", "attention.py",
     "reply_out, reply_lse = merge(own, shared)", "reply_out, reply_lse = own", GROUPS),
    ("own and shared attention count the same", "attention.py",
     "weight = torch.sigmoid(lse - other_lse)[..., None]",
     "weight = torch.full_like(lse, 0.5)[..., None]", GROUPS),
    ("the merged log-sum-exp is that of the reply alone", "attention.py",
     "merged.to(out.dtype), torch.logaddexp(lse, other_lse)", "merged.to(out.dtype), lse", GROUPS),
    ("a prompt learns nothing from its replies", "attention.py",
     "torch.cat([dv + shared_dv, own_dv])", "torch.cat([dv, own_dv])", GROUPS),
    ("queries that are not there push on keys", "attention.py",
     "        lse = lse.masked_fill(query_segments.padding[..., None], math.inf)\n", "        pass\n", GROUPS),
    ("padded keys are seen", "attention.py",
     "    padding = None if causal else key_segments.padding\n"
     "    states = query_segments.pad(q), key_segments.pad(k), key_segments.pad(v)\n",
     "    padding = None\n"
     "    states = query_segments.pad(q), key_segments.pad(k), key_segments.pad(v)\n", GROUPS),
    ("the formula forgets its scale going backward", "attention.py",
     "(grad * out).sum(-1, keepdim=True)) * scale", "(grad * out).sum(-1, keepdim=True))", ATTENTION),
    ("the formula lets query heads share the wrong keys", "attention.py",
     "return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)",
     "return x.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(2, 3)", ATTENTION),
    ("the flash kernel is told of one query each where there may be none", "attention.py",
     "max(2, query_segments.longest)", "query_segments.longest", FLASH),
    ("windows are mixed up", "attention.py",
     "x.unflatten(1, (-1, size)).transpose(0, 1)", "x.unflatten(1, (size, -1)).permute(2, 0, 1, 3)", ATTENTION),

    # ---- model.py, encoder.py: packed rows, log-probs, prompts, loading
    ("replies start one position late", "model.py",
     "first_position.repeat_interleave(sizes) + number\n", "first_position.repeat_interleave(sizes) + number + 1\n",
     GROUPS),
    ("replies start at the prompt's length, not at the end of its M-RoPE", "model.py",
     "first_position = torch.tensor([prompt.next for", "first_position = torch.tensor([len(prompt.ids) for", GROUPS),
    ("positions continue from one reply to the next", "model.py",
     "first_position.repeat_interleave(sizes) + number\n",
     "first_position.repeat_interleave(sizes) + torch.arange(len(number))\n", GROUPS),
    ("logits are shifted by one token", "model.py",
     "torch.cat([owner, len(groups) + torch.arange(len(ids) - first)])",
     "torch.cat([owner, len(groups) - 1 + torch.arange(len(ids) - first)])", GROUPS),
    ("every reply's first token is predicted by the first prompt", "model.py",
     "batch.source = torch.cat([owner,", "batch.source = torch.cat([owner * 0,", GROUPS),
    ("the gradient of the logits is that of the last chunk", "head.py",
     "d_weight.addmm_(d_logits.T, hidden[chunk])\n        return d_hidden, d_weight, None, None, None, None, None",
     "d_weight = d_logits.T @ hidden[chunk]\n        return d_hidden, d_weight, None, None, None, None, None", HEAD),
    ("a state that predicts several tokens is pushed down once", "head.py",
     "torch.zeros_like(ctx.lse).index_add_(0, source, grad)",
     "torch.zeros_like(ctx.lse).index_copy_(0, source, grad)", HEAD),
    ("the gradient forgets the temperature", "head.py",
     "grad = grad / (ctx.temperature or 1.0)", "grad = grad * 1.0", HEAD),
    ("a frozen tower's backward pass is counted", "model.py",
     "(1 if self.frozen else 3) * vision", "3 * vision", COST),
    ("the end token is dropped from the mask", "model.py",
     "    mask = unpack(torch.ones_like(values, dtype=torch.bool), batch.cell, False)",
     "    mask = unpack(~torch.isin(batch.targets, torch.tensor(policy.end_ids)), batch.cell, False)", GROUPS),
    ("replies are encoded without their end token", "encoder.py",
     '["input_ids"] + [self.end_id]\n', '["input_ids"]\n', ENCODER),
    ("pictures of a batch are in the wrong order", "model.py",
     "torch.cat([prompt.pixels for prompt in seen])", "torch.cat([prompt.pixels for prompt in seen[::-1]])", GROUPS),
    ("the temperature is not applied in log-probs", "model.py",
     "batch.source, batch.targets, temperature, self.forbidden",
     "batch.source, batch.targets, 1.0, self.forbidden", GROUPS),
    ("logits are multiplied by the temperature", "head.py", "logits /= temperature", "logits *= temperature", GROUPS),
    ("image pads can be sampled", "head.py",
     "return logits.index_fill_(-1, forbidden, -math.inf)", "return logits", SAMPLER),
    ("rotary frequencies are what memory happens to hold", "model.py",
     "policy.hf._init_weights(module)  # rotary", "pass  # rotary", STANDS_ALONE),
    ("a head of its own is ignored where the config says it is tied", "model.py",
     "if config.tie_word_embeddings and has_own_head(folder):", "if False:", OWN_HEAD),

    # ---- families.py
    ("windows are counted as if they saw the whole picture", "families.py",
     "t * window_pairs(h, side) * window_pairs(w, side)", "t * (h * w) ** 2", COST),
    ("a picture of InternVL stands without its frame", "families.py",
     "return [begin, *super().expand(count), end]", "return super().expand(count)",
     families("ids_and_pixels_are_those_of_transformers_own_processor")),
    ("a base model sees a picture without its frame", "families.py",
     'picture_text = "<|vision_start|>{}<|vision_end|>"', 'picture_text = "{}"',
     families("a_base_model_is_shown_a_picture_as_the_chat_template_shows_it")),
    ("the frame of a tiled picture is turned round", "families.py",
     "begin, end = self.frame", "end, begin = self.frame",
     families("ids_and_pixels_are_those_of_transformers_own_processor")),
    ("width and height of a tiled picture are confused", "families.py",
     "number_of_image_patches(height, width, self.tiling)", "number_of_image_patches(width, height, self.tiling)",
     families("a_grid_that_is_known_before_pixels_are_read_says_how_many_tokens_there_will_be")),
    ("tiles are made only where the file says so", "families.py",
     '"crop_to_patches": True,', '"crop_to_patches": self.processor.crop_to_patches,',
     families("tiles_are_made_even_if_the_files_image_settings_say_otherwise")),
    ("--max-pixels does not bound the tiles", "families.py",
     "most = min(most, max_pixels // side**2)", "most = most",
     families("max_pixels_bounds_the_tiles_and_stays_out_of_the_exported_settings")),
    ("an exported model forgets how many tokens a tile has", "families.py",
     '{"processor_class": "InternVLProcessor", "image_seq_length": tokens}', '{"processor_class": "InternVLProcessor"}',
     families("max_pixels_bounds_the_tiles_and_stays_out_of_the_exported_settings")),
    ("the video token of InternVL may be sampled", "families.py",
     "return super().forbidden(tokenizer) + ([video] if known else [])", "return super().forbidden(tokenizer)",
     families("tokens_of_pictures_and_videos_are_never_sampled_however_likely")),
    ("--freeze-vision leaves a projector free", "families.py",
     "return [hf.model.vision_tower, hf.model.multi_modal_projector]", "return [hf.model.vision_tower]",
     families("every_stage_takes_internvl_and_each_takes_what_the_one_before_has_made")),
    ("FLOPs forget the class token of every tile", "families.py",
     "tokens = h * w + 1  #", "tokens = h * w  #",
     families("the_flops_of_the_vision_tower_are_those_that_torch_counts")),
    ("FLOPs of one tile stand for all", "families.py",
     "return t * (2 * linear + 4 * vision.hidden_size * pairs)", "return 2 * linear + 4 * vision.hidden_size * pairs",
     families("the_flops_of_the_vision_tower_are_those_that_torch_counts")),
    ("dropout in the tower is let through", "families.py",
     "        if drops:\n", "        if drops and False:\n", families("dropout_in_the_tower_is_refused")),
    ("a decoder that nobody has tried is let through", "families.py",
     "if text.model_type not in self.decoders:", "if False:",
     families("a_decoder_that_decoding_does_not_know_is_refused")),

    # ---- records.py
    ("every epoch has the same order", "records.py",
     'random.Random(f"{seed}/{epoch}")', 'random.Random(f"{seed}")', ORDER),

    # ---- training.py
    ("a flag's number may be nan", "training.py",
     '        above = value > low or (bounds[0] == "[" and value == low)\n'
     '        below = value < high or (bounds[-1] == "]" and value == high)\n'
     "        if not (above and below or interval != bounds and value == 0):",
     '        below = value < low or (bounds[0] == "(" and value == low)\n'
     '        above = value > high or (bounds[-1] == ")" and value == high)\n'
     "        if (above or below) and not (interval != bounds and value == 0):", FLAGS),
    ("a resumed run may be given another learning rate", "training.py",
     'MAY_CHANGE = ("resume",', 'MAY_CHANGE = ("lr", "resume",', SETTINGS),
    ("the learning rate warms up from zero", "training.py",
     "peak * (step + 1) / warmup", "peak * step / warmup", UPDATES),
    ("gradients are not clipped", "training.py", "max_norm or math.inf", "math.inf", UPDATES),
    ("a gradient of NaN goes into the weights", "training.py", "if math.isfinite(norm):", "if True:", NUMBERS),
    ("resume does not restore the optimizer", "run_directory.py",
     "        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())",
     "        some = {name: value for name, value in state.items() if '/' not in name}\n"
     "        dcp.load(some, storage_reader=reader, no_dist=not dist.is_initialized())", CHECKPOINT),
    ("AdamW's clock begins anew after a resume", "run_directory.py",
     'value.reshape(1) if key == "step"', 'value.reshape(1).clone() if key == "step"', CHECKPOINT),
    ("a checkpoint shares its memory with the weights", "run_directory.py",
     'value.to("cpu", copy=True)', 'value.to("cpu")', BACKGROUND),
    ("one process writes every file", "run_directory.py",
     "mine = number % world.size == world.rank", "mine = world.rank == 0", EXPORT),
    ("--shard none shards the weights all the same", "training.py",
     'replicas = world.size if sharding.mode == "none" else sharding.replicas',
     "replicas = sharding.replicas", PLAN),

    # ---- recipes/plan.py
    ("a plan forgets one of AdamW's moments", "recipes/plan.py", "2 * weights.trained}", "weights.trained}", PLAN),
    ("a plan forgets the whole gradient", "recipes/plan.py",
     'between micro-batches"] = weights.whole_gradient', 'between micro-batches"] = 0', PLAN),
    ("a plan counts no activations", "recipes/plan.py", "return live.most", "return 0", PLAN),

    # ---- sampler.py
    ("a sampled reply sees its prompt's padding", "sampler.py",
     "attend_padded(*states, self.padding, False, scale)", "attend_padded(*states, None, False, scale)  #", SAMPLER),
    ("a sampled reply sees what an ended one left in its cache", "sampler.py",
     "buffers[i][:, : self.length] = old[sequences, : self.length]",
     "buffers[i][:, : self.length] = old[: len(sequences), : self.length]", SAMPLER),
    ("a reply goes on with another prompt when some have ended", "sampler.py",
     "self.shared = {layer: [x[left] for x in states]", "self.shared = {layer: [x[: len(left)] for x in states]",
     SAMPLER),
    ("sampled positions are one late", "sampler.py", "start[active] + step)", "start[active] + step + 1)", SAMPLER),
    ("all replies of a group are sampled alike", "sampler.py",
     "np.random.default_rng([seed, g])", "np.random.default_rng([seed])", SAMPLER),
    ("the seed is ignored", "sampler.py", "np.random.default_rng([seed, g])", "np.random.default_rng([g])", SAMPLER),
    ("a sampled reply loses its end token", "sampler.py",
     "torch.where(ended, step + 1, length[active])", "torch.where(ended, step, length[active])", SAMPLER),
    ("a sampled reply goes on after its end", "sampler.py",
     "ended = torch.isin(token, end_ids) & ~finished[active]", "ended = torch.isin(token, end_ids)", SAMPLER),
    ("top-k keeps one token too many", "head.py", "logits.topk(top_k, -1)", "logits.topk(top_k + 1, -1)", TOKENS),
    ("top-p drops the token that reaches the mass", "head.py", "ordered.cumsum(-1) - ordered >= top_p",
     "ordered.cumsum(-1) >= top_p", TOKENS),
    ("log-probs are those after top-k and top-p", "sampler.py",
     "scored = filtered if filtered_logps else logits", "scored = filtered", SAMPLER),
    ("the block that is hit is summed up from its neighbour", "sampler.py",
     "share = (height - (block_end - block_mass).gather(-1, hit))", "share = (height - block_end.gather(-1, hit))",
     TOKENS),

    # ---- vllm_sampler.py
    ("a parity check takes NaN for a small difference", "vllm_sampler.py",
     "if not (gap.max() <= largest and gap.mean() <= mean):", "if gap.max() > largest or gap.mean() > mean:", PARITY),
    ("a parity check has no bound of the mean", "vllm_sampler.py",
     "if not (gap.max() <= largest and gap.mean() <= mean):", "if not gap.max() <= largest:", PARITY),
    ("a parity check forgets the temperature", "vllm_sampler.py",
     "_, mask = trainer_log_probs(policy, groups, temperature)", "_, mask = trainer_log_probs(policy, groups)",
     PARITY),
    ("any greedy token will do", "vllm_sampler.py", "gap, allowed = (best - logp).max()", "gap, allowed = 0.0",
     PARITY),
    ("weights that vLLM has and nobody sends are not missed", "vllm_sampler.py",
     "missing = sorted(wanted - set().union(*loaded.values()))", "missing = []", PARITY),
    ("wrong weights may go unnoticed", "vllm_sampler.py",
     'raise ParityError("parity check sync', 'ParityError("parity check sync', PARITY),
    ("any later version of vLLM will do", "vllm_sampler.py", " < parse_version(VERSIONS[1]):", ":", PARITY),
    ("one-step off-policy replies of a checkpoint are given to the wrong seeds", "vllm_sampler.py",
     "groups = [pending[str(seed)] for seed in self.seeds]", "groups = list(pending.values())", PARITY),
    ("one-step off-policy replies have the seeds of the step before", "vllm_sampler.py",
     "self.engine.begin(policy, prompts, n, seeds=self.seeds, **options)",
     "self.engine.begin(policy, prompts, n, seeds=seeds, **options)", PARITY),

    # ---- judge.py and claims.py
    ("a reason about the other piece is read the same way round", "claims.py",
     "return question.letter_of.get(opposite(question.text_of(letter)))", "return letter", JUDGE),
    ("what is taken back still counts", "claims.py", 'or words == ["no"]:', 'and words == ["no"]:', JUDGE),
    ("a denied option is a claimed one", "claims.py", "if claim.denied:", "if False:", JUDGE),
    ("any subject will do for an option", "claims.py",
     "return asked and len(rest) <= 1", "return len(rest) <= 1", JUDGE),
    ("a conclusion counts no more than a remark", "claims.py",
     "self.firm = self.firm or claim.firm", "self.firm = False", JUDGE),
    ("U+2212 is no minus", "claims.py", '"−": "-", ', "", JUDGE),
    ("a step of the sum is taken for its result", "judge.py",
     "said = concluded[-1].group(1)", "said = concluded[0].group(1)", JUDGE),
    ("two answers at one kind of place are the first", "judge.py",
     "return answers[0] if len(answers) == 1 else None", "return answers[0]", JUDGE),
    ("an echo of the options is an answer", "judge.py", "if len(echoed) < 2:", "if True:", JUDGE),
    ("an arrangement that was given up decides", "judge.py", "if not PASSED_OVER.search(sentence):", "if True:", JUDGE),

    # ---- rewards.py
    ("the format weight is ignored", "rewards.py", "format_weight * well_formed", "0.5 * well_formed", REWARDS),
    ("the accuracy weight is ignored", "rewards.py", "accuracy_weight * earned", "earned", REWARDS),
    ("without tags the whole reply is the answer", "replies.py",
     'read_blocks(reply, "think", "answer")', 'read_blocks(reply, "think", "answer") or ("-", reply)', REWARDS),
    ("a tag may stand twice", "replies.py", "reply.count(tag) != 1", "reply.count(tag) < 1", REWARDS),
    ("words may stand between the blocks", "replies.py",
     "if between.strip(SPACE):", "if False:", REWARDS),
    ("an empty block is well-formed", "replies.py",
     "if not reason and not wanted.reason_may_be_empty:", "if False:", REWARDS),
    ("a bare answer may be wrapped in words", "replies.py",
     "answer_may_be_wrapped=False", "answer_may_be_wrapped=True", REWARDS),
    ("a grid counts only as a whole", "rewards.py",
     "return right / len(gold)", "return float(right == len(gold))", REWARDS),
    ("a grid with a repeated index earns its share", "rewards.py",
     "if not is_arrangement(answer, len(gold)):\n        return 0.0  #",
     "if len(answer) != len(gold):\n        return 0.0  #", REWARDS),
    ("A or B is an A", "rewards.py", "ONE_LETTER.fullmatch(text)", "ONE_LETTER.match(text)", REWARDS),
    ("the union of two boxes counts their intersection twice", "rewards.py",
     "both / (area + gold_area - both)", "both / (area + gold_area)", REWARDS),
    ("a box must overlap wholly to be right", "rewards.py", "right_from=0.5", "right_from=1.0", REWARDS),
    ("JSON may hold further keys", "replies.py",
     'set(value) != {"reason", "answer"}', 'not set(value) >= {"reason", "answer"}', REWARDS),
    ("Answer: may stand twice", "replies.py", 'reply.count("Answer:") != 1', 'reply.count("Answer:") < 1', REWARDS),
    ("a box around the answer is not taken off", "replies.py", "boxed|fbox|text", "fbox|text", ANSWERS),
    ("full-width letters are not folded", "rewards.py",
     "    folded = fold(text)\n", "    folded = text\n", ANSWERS),
    ("bold marks around a word stay", "replies.py", 'BOLD.sub(r"\\1", ', "str(", ANSWERS),
    ("a doubt in a sentence is not heard", "replies.py",
     'if statement and not DOUBT.search(statement["subject"]):', "if statement:", ANSWERS),
    ("an option's text is compared letter by letter", "rewards.py",
     "for comparable in (plain, without_article):", "for comparable in (str,):", ANSWERS),
    ("a letter with another option's text counts", "rewards.py",
     "return letter if option_with_text(written_out, record) == letter else None", "return letter", ANSWERS),
    ("brackets need not nest", "rewards.py",
     "elif not expected or expected.pop() != character:", "elif False:", ANSWERS),
    ("a point is a corner of its box", "rewards.py",
     "return [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]", "return box[:2]", ANSWERS),
    ("a bare letter may be read as leniently as one with a place", "rewards.py",
     "read_bare=read_one_capital", "read_bare=read_letter", ANSWERS),
    ("a side of 10**400 is an overflow", "rewards.py", "except OverflowError:", "except ZeroDivisionError:", ANSWERS),
    ("bad golds are left out unasked", "records.py", "if not skip_bad:", "if False:", ANSWERS),
    ("bad golds are left out without a word", "records.py", "    if skipped and", "    if False and", ANSWERS),

    # ---- math_answers.py, expressions.py
    ("two sides without a value are equal", "expressions.py",
     "return finite >= min(points, MIN_FINITE)", "return True", ANSWERS),
    ("what has no finite value is an answer", "math_answers.py",
     "if len(values) < (MIN_FINITE if letters_in(tree) else 1):", "if False:", ANSWERS),
    ("infinity is a number", "expressions.py",
     'if name == "pi":\n            return ("pi",)', 'if name in ("pi", "infty"):\n            return ("pi",)',
     ANSWERS),
    ("0/0 is 0", "expressions.py", "    if b == 0:\n        raise Unreadable(\"division by zero\")\n",
     "    if b == 0:\n        return b\n", ANSWERS),
    ("rounding makes the tangent of 90 degrees a large number", "expressions.py",
     "if abs(result) <= SNAP * max(1, abs(value)) and abs(value) > ABSORBED:", "if False:", ANSWERS),
    ("ten digits are enough to be equal", "expressions.py",
     "EQUAL = MP.mpf(10) ** -60", "EQUAL = MP.mpf(10) ** -10", ANSWERS),
    ("10^-8 is 0", "expressions.py",
     "return abs(a - b) <= EQUAL * max(abs(a), abs(b))", "return abs(a - b) <= MP.mpf(10) ** -7", ANSWERS),
    ("a term too small to be seen is dropped", "expressions.py",
     "if 0 < smaller < ABSORBED * larger:", "if False:", ANSWERS),
    ("a letter is never negative", "expressions.py",
     "negative = point == 3 or", "negative = False and", ANSWERS),
    ("5 6 is 30", "expressions.py",
     "return bool(token) and (token in", "return bool(token) and (token[0].isdigit() or token in", ANSWERS),
    ("a raised digit is glued to its number", "expressions.py", 'lambda run: "^{"', 'lambda run: "{"', ANSWERS),
    ("2½ is one, a product", "expressions.py", 'return f"({whole}+', 'return f"({whole}\\\\cdot', ANSWERS),
    ("a power may be as large as it likes", "expressions.py",
     "if abs(exponent * MP.log(base)) > MAX_LOG:", "if False:", ANSWERS),
    ("any unit will do", "math_answers.py", "    if gold == answer:\n        return True\n    if not gold:\n",
     "    if gold != answer:\n        return True\n    if not gold:\n", ANSWERS),
    ("5 % is 5", "math_answers.py", 'return answer not in ("%", "\\\\permille")', "return True", ANSWERS),
    ("cm² is cm", "math_answers.py", "sign * factor * int(match[2] or 1)", "sign", ANSWERS),
    ("an interval is a set", "math_answers.py",
     "    if type(gold) is not type(answer):\n        return False\n",
     "    if type(gold) is not type(answer):\n        return isinstance(gold, Region) and isinstance(answer, Many)\n",
     ANSWERS),
    ("an end of an interval may belong to it or not", "math_answers.py",
     "return gold[2:] == answer[2:]", "return True", ANSWERS),
    ("one of two values is enough", "math_answers.py",
     "return len(gold.items) == len(answer.items) and all(", "return any(", ANSWERS),
    ("a list of guesses answers one number", "math_answers.py",
     "if isinstance(value, Many) and not value.braces and not isinstance(wanted, Many):", "if False:", HEDGES),
    ("plus-minus is plus", "math_answers.py", "for sign in (1, -1) if", "for sign in (1,) if", ANSWERS),
    ("an equation is any other", "math_answers.py",
     'return factor == 1 or (factor == -1 and gold.sign == "=")', "return True", ANSWERS),

    # ---- jigsaw.py, mixing.py, questions.py, picture_files.py
    ("the order is the inverse of the mix", "mixing.py",
     "divmod(original - 1, cols)", "divmod(order.index(position + 1), cols)", JIGSAW),
    ("rows and columns are swapped in the numbering", "questions.py",
     "relation(mixed.order[k - 1], mixed.order[j - 1], mixed.cols)",
     "relation(mixed.order[k - 1], mixed.order[j - 1], mixed.rows)", JIGSAW),
    ("the relation is asked from the other piece", "questions.py",
     "relation(mixed.order[k - 1], mixed.order[j - 1], mixed.cols)",
     "relation(mixed.order[j - 1], mixed.order[k - 1], mixed.cols)", JIGSAW),
    ("the relation is that after the mix", "questions.py",
     "relation(mixed.order[k - 1], mixed.order[j - 1], mixed.cols)",
     "relation(k, j, mixed.cols)", JIGSAW),
    ("the prompt names one of the two pieces twice", "questions.py",
     "where was the piece now at position {pair[0]}", "where was the piece now at position {pair[1]}", JIGSAW),
    ("options are not shuffled", "questions.py", "rng.sample(texts, len(texts))", "list(texts)", JIGSAW),
    ("the letter is one off", "questions.py",
     "LETTERS[options.index(truth)]", "LETTERS[options.index(truth) + 1]", JIGSAW),
    ("the original order is never sampled", "mixing.py",
     "while derange and any(", "while order == sorted(order) or derange and any(", JIGSAW),
    ("positions are numbered column by column", "mixing.py",
     "row, col = divmod(position, cols)", "col, row = divmod(position, rows)", JIGSAW),
    ("the seed does not reach the puzzles", "jigsaw.py",
     'random.Random(f"{job.split} {job.seed} puzzle {index}")', 'random.Random(f"{job.split} puzzle {index}")', JIGSAW),
    ("copies of a picture can be on both sides", "picture_files.py",
     'hashlib.file_digest(file, "sha256")', "hashlib.sha256(str(path).encode())", JIGSAW),

    # ---- toy/
    ("test scenes are train scenes", "toy/scenes.py", '+ (part == "test")', "", TOY),
    ("the warm-up data know the verdict", "toy/primer.py",
     'verdict = rng.choice(fields["options"])', 'verdict = fields["direction"]', TOY),
    ("a plain question names one piece twice", "toy/primer.py",
     "at position {pair[0]} look", "at position {pair[1]} look", TOY),
    ("the words of the warm-up data are false", "toy/primer.py", "values[k] > values[j]", "values[k] < values[j]", TOY),

    # ---- eval.py
    ("a 16-bit picture is clipped", "pictures.py", "limits = (255.0, 65535.0) if whole", "limits = (255.0,) if whole",
     some("test_pictures", "a_ramp_from_black_to_white_is_one_whatever_the_file_stores")),
    ("transparency is black", "pictures.py", 'image.size, "white")', 'image.size, "black")',
     some("test_pictures", "transparency_lies_on_white")),
    ("a picture's size is not turned with it", "pictures.py",
     "return (image.height, image.width) if turned else image.size", "return image.size",
     some("test_pictures", "a_picture_is_turned_as_its_camera_says_and_its_size_too")),
    ("a wish passed on by another rank counts as the first of two", "run_directory.py",
     "if self.asked is not None and now - self.asked > PATIENCE:", "if self.stop:",
     some("test_run_directory", "one_wish_to_stop_may_arrive_several_times_and_a_second_one_comes_seconds_later")),
    ("GF: beta is not squared in the denominator", "eval.py",
     "/ (beta**2 * gain_id + gain_ood)", "/ (beta * gain_id + gain_ood)", EVAL),
    ("GF: a negative gain gives a number", "eval.py",
     "if gain_id < 0 or gain_ood < 0:", "if gain_id < 0 and gain_ood < 0:",
     some("test_eval", "with_a_negative_gain_it_is_not_defined")),
    ("GF: ID and OOD are swapped", "eval.py",
     "/ (beta**2 * gain_id + gain_ood)", "/ (beta**2 * gain_ood + gain_id)", EVAL),
    ("pass@k is the biased estimate", "eval.py",
     "return (choices - math.comb(n - c, k)) / choices", "return 1 - (1 - c / n) ** k", EVAL),
    ("a partly right grid passes", "eval.py", "value >= 1 for value in", "value > 0 for value in", EVAL),
    ("the weights of the OOD sources are ignored", "eval.py", "weights = weights or dict", "weights = dict", EVAL),

    # ---- report.py
    ("text of the model reaches the page as markup", "html_page.py",
     'html.escape(visible(value, most), quote=True)', 'visible(value, most)', REPORT),
    ("a step logged twice counts as logged first", "report.py",
     "        if is_number(value):", '        if is_number(value) and entry["step"] not in found:', REPORT),
    ("the accuracy of readable answers is that of all", "report.py",
     'CELL = ("accuracy", "accuracy_read", "format")', 'CELL = ("accuracy", "accuracy", "format")', REPORT),
)]
# Those of a topic stand beside this file, in the same form: bugs_<topic>.py has a list BUGS of such tuples.
for path in sorted(Path(__file__).resolve().parent.glob("bugs_*.py")):
    BUGS += [Bug(*entry) for entry in runpy.run_path(str(path))["BUGS"]]
# fmt: on


# ---------------------------------------------------------------------------------------------------------------------


def problem_with(bug: Bug) -> str | None:
    """Why this entry cannot be planted, or None."""
    path = ROOT / bug.file
    if not path.exists():
        return f"there is no {bug.file}"
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        return f"its text occurs {text.count(bug.old)} times in {bug.file}, not once: {bug.old!r}"
    try:
        compile(text.replace(bug.old, bug.new), bug.file, "exec")
    except SyntaxError as error:
        return f"with it {bug.file} is not Python any more, so that every test fails, which shows nothing ({error})"
    for test in bug.tests.split():
        path, _, function = test.partition("::")
        if not (ROOT / path).exists() or f"def {function}" not in (ROOT / path).read_text(encoding="utf-8"):
            return f"there is no {test}"
    return None


def source_files() -> list[str]:
    """The repository's files, relative to its root: tracked ones and new ones, nothing that .gitignore names."""
    if not (ROOT / ".git").exists():  # an archive, or a copy: without git, leave out what running makes
        found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
        made = {"runs", "exercises", "__pycache__"}
        return sorted(str(path) for path in found if not any(p in made or p.startswith(".venv") for p in path.parts))
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    return sorted(name for name in listed if name and (ROOT / name).is_file())


def run_tests(tests: str, files: list[str], bug: Bug | None, patience: float) -> tuple[int | None, float, str]:
    """Run tests in a copy of the sources: (pytest's exit status, None when patience ran out; seconds; output)."""
    with tempfile.TemporaryDirectory(prefix="plant_bugs_") as folder:
        copy = Path(folder) / "copy"
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
        if bug:
            text = (copy / bug.file).read_text(encoding="utf-8")
            (copy / bug.file).write_text(text.replace(bug.old, bug.new), encoding="utf-8")
        # "-m pytest" puts the copy first on the import path; PYTHONPATH might put the unchanged sources before it.
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests.split()]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": folder}
        start = time.monotonic()
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=copy, env=env, **streams, start_new_session=True)
        try:
            output, _ = process.communicate(timeout=patience)
            status = process.returncode
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # its own group: with the training runs that the tests started
        if status is None:
            output, _ = process.communicate()
        return status, time.monotonic() - start, output


def first_failure(output: str) -> str:
    """The name of the test that failed, from pytest's summary."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return lines[0].split(" - ")[0].split(" ", 1)[1] if lines else output.strip()[-100:]


def commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="plant only these (default: all)")
    parser.add_argument("--list", action="store_true", help="name them and check that each can be planted; run nothing")
    parser.add_argument("--log", type=Path, help="JSON file to write: commit, and whether each was caught")
    args = parser.parse_args(argv)
    names = [bug.name for bug in BUGS]
    assert len(set(names)) == len(names), "two bugs share a name"
    for name in args.only or []:
        if name not in names:
            parser.error(f'no bug is called "{name}"; --list names them')
    bugs = [bug for bug in BUGS if not args.only or bug.name in args.only]

    # 1. Can all of them be planted?
    problems = {bug.name: problem for bug in bugs if (problem := problem_with(bug))}
    if args.list:
        print("\n".join(f"{bug.name:60} {bug.tests}" for bug in bugs))
    for name, problem in problems.items():
        print(f"CANNOT BE PLANTED  {name}: {problem}", flush=True)
    if args.list:
        return 1 if problems else 0
    bugs = [bug for bug in bugs if bug.name not in problems]

    with ThreadPoolExecutor(WORKERS) as pool:
        # 2. Without a bug the tests must pass, or their failing says nothing
        files = source_files()
        selections = sorted({bug.tests for bug in bugs})
        results = pool.map(lambda tests: run_tests(tests, files, None, 600), selections)
        clean = dict(zip(selections, results, strict=True))
        for tests, (status, seconds, output) in clean.items():
            print(f"{seconds:4.0f} s without a bug: {tests}", flush=True)
            if status != 0:
                print(f"{output}\nFAILS WITHOUT A BUG  {tests}")
        if any(status != 0 for status, _, _ in clean.values()):
            return 1

        # 3. With a bug they must fail
        def plant(bug):
            patience = PATIENCE + 2 * clean[bug.tests][1]
            for _ in range(3):
                result = run_tests(bug.tests, files, bug, patience)
                if result[0] is not None:
                    return result
                status, seconds, output = run_tests(bug.tests, files, None, 3 * patience)
                if status == 0 and seconds < patience / 2:
                    return result  # in time without the bug: with it, the tests do hang
                patience *= 3
            return UNCLEAR, patience, "The tests did not end in time, with the bug or without: the machine is too busy."

        survivors, log = [], []
        for bug, (status, seconds, output) in zip(bugs, pool.map(plant, bugs), strict=True):
            log.append({"name": bug.name, "caught": status in (None, 1), "seconds": round(seconds)})
            if status in (None, 1):  # 1: tests ran and failed
                print(f"caught {seconds:4.0f} s  {bug.name}", flush=True)
                print(f"               by {'hanging' if status is None else first_failure(output)}", flush=True)
            else:  # 0: all passed; anything else: pytest did not get as far as running a test
                survivors.append(bug)
                print(f"NOT CAUGHT     {bug.name}", flush=True)
                if status != 0:
                    print(f"{output}\npytest ended with status {status}", flush=True)
    if args.log:
        args.log.write_text(json.dumps({"commit": commit(), "bugs": log}, indent=1) + "\n")
    caught = len(bugs) - len(survivors)
    print(f"\n{caught} planted bugs caught, {len(survivors)} not, {len(problems)} could not be planted")
    for bug in survivors:
        print(f"NOT CAUGHT  {bug.name}  ({bug.tests})")
    return 1 if survivors or problems else 0


if __name__ == "__main__":
    sys.exit(main())
