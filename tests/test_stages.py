"""dpo.py and grpo.py as a whole: short runs of a tiny model that can speak a little, with pictures and without.

What is checked is what a user relies on: what a run leaves behind, that its numbers are what they claim to be, that
what must not matter does not, that it learns, and that bad input is refused before anything is trained. Expected values
are worked out here a second time, one reply at a time, from the replies the run really sampled (`Watch` looks on while
the real functions run).
"""

import argparse
import importlib
import json
import math
import re
import shutil
import signal
import statistics

import pytest
import torch
from commands import (
    ROOT,
    Material,
    call,
    cause,
    checkpoint,
    distance,
    end,
    finish,
    flags,
    rows,
    start,
    timeless,
    weights,
    write,
)

import endpoint
import grpo
import model
import rewards
import run_directory
import sampler
import training
import vllm_sampler
from records import DataError, epoch_order, read_records

LN2 = 0.6931471805599453
DPO_KEYS = {"step", "loss", "loss_dpo", "loss_sft", "chosen_reward", "rejected_reward", "margin", "preference_accuracy",
            "grad_norm", "skipped", "broken_pictures", "lr", "seconds", "samples_per_s", "seconds_rest",
            "seconds_learn", "tflops_learn", "peak_memory_gib"}  # fmt: skip
SFT_KEYS = DPO_KEYS - {"loss_dpo", "chosen_reward", "rejected_reward", "margin", "preference_accuracy"}
GRPO_KEYS = {"step", "reward", "accuracy", "format", "length", "finished", "loss", "kl", "clip_fraction", "entropy",
             "useful_groups", "grad_norm", "skipped", "broken_pictures", "lr", "sampler_gap", "sampler_gap_mean",
             "importance_capped", "rollouts_per_s", "tokens_per_s", "seconds_sample", "seconds_score", "seconds_learn",
             "seconds_rest", "tflops_sample", "tflops_learn", "peak_memory_gib"}  # fmt: skip


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


class Watch:
    """Looks on while a run samples and updates: every step's replies and seeds, the gradient of every update."""

    def __init__(self, monkeypatch):
        self.replies, self.seeds, self.gradients = [], [], []
        sample, update = sampler.sample, training.update

        def watched_sample(*args, **kwargs):
            self.seeds += kwargs["seeds"]
            self.replies.append(sample(*args, **kwargs))
            return self.replies[-1]

        def watched_update(policy, *args):
            self.gradients.append(gradients(policy))
            return update(policy, *args)

        monkeypatch.setattr(sampler, "sample", watched_sample)
        monkeypatch.setattr(training, "update", watched_update)


def gradients(policy):
    return {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None}


def policy_of(path, *at):
    """(policy, encoder) of a model directory, with the weights of a checkpoint when (run, step) is named."""
    policy, encoder = model.load(path, training.setup(), train=True)
    if at:
        saved = checkpoint(*at)
        with torch.no_grad():
            for name, weight in policy.named_parameters():
                weight.copy_(saved[name])
    return policy, encoder


def token_log_probs(policy, prompt, ids):
    """(T,) log-probs of one reply, alone in its row."""
    return model.log_probs(policy, [(prompt, [ids])])[0][0]


def seen_at(step, records, size, seed=0):
    """The records of one step's batch, in their order."""
    return [records[index] for index in epoch_order(seed, len(records), step * size, size)]


def check_model_directory(out, last_step):
    """from_pretrained of plain transformers takes the directory, and finds the weights of the last checkpoint."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    hf, loading = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert type(hf).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert not any(loading.values()), loading
    assert AutoTokenizer.from_pretrained(out).eos_token == "<|im_end|>"
    assert Qwen2VLImageProcessorPil.from_pretrained(out).merge_size == 2
    assert (out / "LATEST").read_text() == f"step_{last_step:06d}"
    saved = {name: value for name, value in checkpoint(out, last_step).items() if "/" not in name}
    assert distance(saved, {f"hf.{name}": weight.detach() for name, weight in hf.named_parameters()}) == 0


def check_log(out, keys, steps):
    log = rows(out)
    assert [row["step"] for row in log] == list(range(1, steps + 1))
    for row in log:
        assert set(row) == keys
        assert all(math.isfinite(value) for value in row.values()), row
    return log


# ---------------------------------------------------------------------------------------------------------------------
# Commands and what they leave behind


def test_the_commands_end_with_0_and_leave_a_model_directory_that_the_next_stage_takes(material, tmp_path):
    cold, rl, after = tmp_path / "cold", tmp_path / "rl", tmp_path / "after"
    started = [
        start(ROOT / "dpo.py", **material.dpo(out=cold)),
        start(ROOT / "grpo.py", **material.grpo(out=rl, top_k=50, clip_high=0.28)),
    ]
    for process, out, words in zip(started, (cold, rl), ("3 steps of dpo+sft", "3 steps of GRPO"), strict=True):
        stdout, stderr = finish(process)
        assert stdout == f"{out}: {words} done; the model is in the directory\n"
        assert "Traceback" not in stderr and "3/3" in stderr  # the progress bar at its end
        check_model_directory(out, 3)
    check_log(cold, DPO_KEYS, 3)
    check_log(rl, GRPO_KEYS, 3)
    settings = json.loads((rl / "args.json").read_text())
    assert (settings["clip_high"], settings["top_k"], settings["group"], settings["kl"]) == (0.28, 50, 4, 0.0)
    assert json.loads((cold / "args.json").read_text())["beta"] == 0.1
    samples = [json.loads(line) for line in (rl / "samples.jsonl").read_text().splitlines()]
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    assert all({"id", "source", "reply", "reward", "accuracy", "format"} <= set(sample) for sample in samples)

    call("grpo", **material.grpo(model=cold, out=after, steps=1))
    call("dpo", **material.dpo(model=rl, out=tmp_path / "again", steps=1))
    assert 0 < distance(weights(cold), weights(after)) < 0.01  # it started from there: AdamW's first step is about lr


@pytest.mark.parametrize("loss, keys", [("dpo+sft", DPO_KEYS), ("dpo", DPO_KEYS), ("sft", SFT_KEYS)])
def test_every_loss_of_dpo_trains_and_logs_what_it_minimises(material, tmp_path, loss, keys):
    call("dpo", **material.dpo(out=tmp_path, loss=loss, sft_weight=0.7, schedule="constant"))
    log = check_log(tmp_path, keys, 3)
    check_model_directory(tmp_path, 3)
    for row in log:
        dpo_part, sft_weight = row.get("loss_dpo", 0.0), {"dpo+sft": 0.7, "dpo": 0.0, "sft": 1.0}[loss]
        assert row["loss"] == pytest.approx(dpo_part + sft_weight * row["loss_sft"], abs=1e-6)
        assert row["lr"] == 1e-3 and row["grad_norm"] > 0
    if loss != "sft":  # policy and reference are still the same model
        first = log[0]
        assert first["loss_dpo"] == pytest.approx(LN2, abs=1e-6)
        assert max(abs(first[name]) for name in ("chosen_reward", "rejected_reward", "margin")) < 1e-5
        assert max(abs(row["margin"] - row["chosen_reward"] + row["rejected_reward"]) for row in log) < 1e-5


GRPO_SETTINGS = {
    "defaults": {},
    "Jigsaw-R1": {"kl": 0.04, "normalizer": "sequence", "top_k": 50, "schedule": "linear"},
    "SPECS": {"clip_high": 0.28, "normalizer": "token"},
    "Dr. GRPO": {"normalizer": "constant", "advantage_scale": "none", "format_weight": 0},
    "GSPO": {"ratio": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "advantage_scale": "batch"},
    "cooler": {"temperature": 0.7, "top_p": 0.9, "grad_clip": 0, "warmup": 2, "kl": 0.5},
}


@pytest.mark.parametrize("name", GRPO_SETTINGS)
def test_grpo_trains_with_the_settings_of(material, tmp_path, name):
    settings = GRPO_SETTINGS[name]
    call("grpo", **material.grpo(out=tmp_path, **settings))
    log = check_log(tmp_path, GRPO_KEYS, 3)
    check_model_directory(tmp_path, 3)
    for row in log:
        assert row["clip_fraction"] == 0  # one update per batch: the ratio is 1
        assert row["sampler_gap"] < 1e-5  # the trainer finds the log-probs the tokens were sampled with
        assert row["sampler_gap_mean"] <= row["sampler_gap"] and row["importance_capped"] == 0
        assert row["reward"] == pytest.approx(row["accuracy"] + settings.get("format_weight", 0.5) * row["format"])
        assert row["finished"] <= 1 and 1 <= row["length"] <= 8 and row["entropy"] > 0
    assert [row["lr"] for row in log] == {
        "Jigsaw-R1": pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3]),
        "cooler": [5e-4, 1e-3, 1e-3],
    }.get(name, [1e-3, 1e-3, 1e-3])
    if settings.get("kl"):
        assert log[0]["kl"] < 1e-9 and log[1]["kl"] > 1e-6 and log[2]["kl"] > 1e-6
    else:
        assert [row["kl"] for row in log] == [0, 0, 0]
    assert distance(weights(material.speaker), weights(tmp_path)) > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# The numbers are what they claim to be


def test_dpo_measures_implicit_rewards_against_the_starting_model_and_not_against_itself(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path, steps=2, beta=0.3, batch=8, save_every=1))
    before, encoder = policy_of(material.speaker)
    now, _ = policy_of(material.speaker, tmp_path, 1)
    pairs = read_records(material.pair_data)
    chosen, rejected, nats, tokens = [], [], 0.0, 0
    with torch.no_grad():
        for pair in seen_at(1, pairs, 8):
            prompt = encoder.prompt(pair)
            for text, implicit in ((pair["chosen"], chosen), (pair["rejected"], rejected)):
                ids = encoder.encode_reply(text)
                after = token_log_probs(now, prompt, ids).sum().item()
                implicit.append(0.3 * (after - token_log_probs(before, prompt, ids).sum().item()))
                if implicit is chosen:
                    nats, tokens = nats - after, tokens + len(ids)
    assert len({len(encoder.encode_reply(pair["chosen"])) for pair in pairs}) > 1  # else a mean of means is the same
    margins = [won - lost for won, lost in zip(chosen, rejected, strict=True)]
    row = rows(tmp_path)[1]
    assert row["chosen_reward"] == pytest.approx(statistics.mean(chosen), abs=1e-5)
    assert row["rejected_reward"] == pytest.approx(statistics.mean(rejected), abs=1e-5)
    assert row["margin"] == pytest.approx(statistics.mean(margins), abs=1e-5)
    assert row["preference_accuracy"] == sum(margin > 0 for margin in margins) / 8
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert row["loss_dpo"] == pytest.approx(statistics.mean(losses), abs=1e-5)
    assert row["loss_sft"] == pytest.approx(nats / tokens, abs=1e-5)  # mean over the batch's tokens, not of pair means
    assert max(map(abs, margins)) > 0.01  # the first update did move the policy


def test_dpo_without_steps_passes_once_over_the_pairs_and_decays_to_the_last_one(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path, steps=None, batch=3, lr=9e-4))
    log = rows(tmp_path)
    assert [row["lr"] for row in log] == pytest.approx([9e-4, 6e-4, 3e-4])  # 3 + 3 + 2 pairs
    assert round(log[2]["samples_per_s"] * log[2]["seconds"]) == 2


def test_the_reward_and_its_parts_are_means_over_all_replies(material, tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    call("grpo", **material.grpo(out=tmp_path, steps=2, group=6, format_weight=0.25, save_every=1, kl=0.04))
    encoder = policy_of(material.speaker)[1]
    records = read_records(material.data)
    assert len(set(watch.seeds)) == 8  # 2 steps, 4 prompts: no two sample alike
    for step, row in enumerate(rows(tmp_path)):
        groups = list(zip(seen_at(step, records, 4), watch.replies[step], strict=True))
        pairs = [(record, reply) for record, group in groups for reply in group]
        scores = [rewards.score(encoder.decode(reply.ids), record, format_weight=0.25) for record, reply in pairs]
        replies = [reply for _, reply in pairs]
        assert len(replies) == 24
        for name in ("reward", "accuracy", "format"):
            assert row[name] == pytest.approx(statistics.mean(score[name] for score in scores), abs=1e-6)
        assert row["length"] == pytest.approx(statistics.mean(len(reply.ids) for reply in replies), abs=1e-6)
        assert row["finished"] == pytest.approx(statistics.mean(reply.finished for reply in replies), abs=1e-6)
        tokens = sum(len(reply.ids) for reply in replies)
        assert row["entropy"] == pytest.approx(-sum(reply.logps.sum().item() for reply in replies) / tokens, abs=1e-6)
        seconds = sum(row[f"seconds_{phase}"] for phase in ("sample", "score", "learn", "rest"))
        assert row["rollouts_per_s"] == pytest.approx(24 / seconds, rel=1e-6)
        assert row["tokens_per_s"] == pytest.approx(tokens / seconds, rel=1e-6)
    # the samples are those of the first prompt
    first = seen_at(1, records, 4)[0]
    shown = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()][2:]
    assert [sample["reply"] for sample in shown] == [encoder.decode(reply.ids) for reply in watch.replies[1][0][:2]]
    assert {sample["id"] for sample in shown} == {first["id"]}
    assert [sample["reward"] for sample in shown] == [
        rewards.score(sample["reply"], first, format_weight=0.25)["reward"] for sample in shown
    ]
    # the KL of step 2: between the weights after step 1 and the starting model, per token
    now, before = policy_of(material.speaker, tmp_path, 1)[0], policy_of(material.speaker)[0]
    total = 0.0
    with torch.no_grad():
        for record, group in groups:
            for reply in group:
                prompt = encoder.prompt(record)
                gap = token_log_probs(before, prompt, reply.ids) - token_log_probs(now, prompt, reply.ids)
                total += (gap.exp() - gap - 1).sum().item()
    assert total / tokens > 1e-4
    assert row["kl"] == pytest.approx(total / tokens, rel=1e-3)


# One record whose replies all earn 0, because the model cannot write JSON; the others earn different rewards.
def with_useless_records(material):
    useless = [material.question(f"u{number}", "Give one letter as JSON.", reply_format="json") for number in range(2)]
    return write(material.folder / "with_useless.jsonl", material.records[1:5] + useless)


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_useful_groups_are_those_whose_rewards_differ_with_a_kl_and_without(material, tmp_path, monkeypatch, kl):
    watch = Watch(monkeypatch)
    data = with_useless_records(material)
    call("grpo", **material.grpo(out=tmp_path, data=data, prompts=6, group=5, steps=1, kl=kl))
    encoder = policy_of(material.speaker)[1]
    differing = 0
    for record, group in zip(seen_at(0, read_records(data), 6), watch.replies[0], strict=True):
        differing += len({rewards.score(encoder.decode(reply.ids), record)["reward"] for reply in group}) > 1
    assert 2 <= differing <= 4
    assert rows(tmp_path)[0]["useful_groups"] == pytest.approx(differing / 6)


@pytest.mark.parametrize("normalizer, scale", [("sequence", "group"), ("token", "none"), ("constant", "batch")])
def test_skipping_groups_without_signal_does_not_change_the_gradient(
    material, tmp_path, monkeypatch, normalizer, scale
):
    watch = Watch(monkeypatch)
    data = with_useless_records(material)
    settings = {"prompts": 6, "group": 5, "steps": 1, "normalizer": normalizer, "advantage_scale": scale}
    call("grpo", **material.grpo(out=tmp_path, data=data, grad_clip=0, **settings))
    row = rows(tmp_path)[0]
    policy, encoder = policy_of(material.speaker)
    batch = seen_at(0, read_records(data), 6)
    groups = [
        [(reply.ids, rewards.score(encoder.decode(reply.ids), record)["reward"]) for reply in group]
        for record, group in zip(batch, watch.replies[0], strict=True)
    ]
    earned = [[reward for _, reward in group] for group in groups]
    varied = [len(set(group)) > 1 for group in earned]
    assert 2 <= sum(varied) <= 4  # the test needs both kinds
    assert row["useful_groups"] == pytest.approx(sum(varied) / 6)

    # The policy gradient, one reply at a time, no group left out. At the first update the ratio is 1 and unclipped.
    tokens = sum(len(ids) for group in groups for ids, _ in group)
    spread_of_all = statistics.stdev(reward for group in earned for reward in group)
    for record, group, mine in zip(batch, groups, earned, strict=True):
        spread = {"group": statistics.stdev(mine) + 1e-4, "none": 1.0, "batch": spread_of_all + 1e-4}[scale]
        for ids, reward in group:
            advantage = (reward - statistics.mean(mine)) / spread
            weight = {"sequence": 1 / (30 * len(ids)), "token": 1 / tokens, "constant": 1 / (30 * 8)}[normalizer]
            (-weight * advantage * token_log_probs(policy, encoder.prompt(record), ids).sum()).backward()
    expected, actual = gradients(policy), watch.gradients[0]
    assert len(watch.gradients) == 1 and actual.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    assert largest > 1e-3
    assert distance(actual, expected) < 1e-5 * largest
    norm = math.sqrt(sum(gradient.square().sum().item() for gradient in expected.values()))
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_step_in_which_no_group_carries_a_signal_changes_nothing_and_is_logged(material, tmp_path):
    useless = write(material.folder / "useless.jsonl", [material.question("u", "JSON, please.", reply_format="json")])
    call("grpo", **material.grpo(out=tmp_path, data=useless))
    log = check_log(tmp_path, GRPO_KEYS, 3)
    assert {(row["reward"], row["useful_groups"], row["grad_norm"], row["loss"]) for row in log} == {(0, 0, 0, 0)}
    assert distance(weights(tmp_path), weights(material.speaker)) == 0


# ---------------------------------------------------------------------------------------------------------------------
# What matters and what must not


def test_the_same_command_gives_the_same_bits_and_another_seed_does_not(material, tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        call("grpo", **material.grpo(out=tmp_path / name, seed=seed, kl=0.04))
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "two")) == 0
    assert distance(weights(tmp_path / "one"), weights(tmp_path / "other")) > 1e-4


@pytest.mark.parametrize("stage, settings", [("dpo", {}), ("grpo", {"kl": 0.04, "updates": 2}), ("grpo", {})])
def test_the_size_of_micro_batches_does_not_matter(material, tmp_path, monkeypatch, stage, settings):
    watch = Watch(monkeypatch)
    common = getattr(material, stage)(lr=1e-5, grad_clip=0.5, **settings)
    for tokens in (50, 100_000):  # less than one prompt; everything at once
        call(stage, **common, micro_tokens=tokens, out=tmp_path / str(tokens))
    small, large = timeless(tmp_path / "50"), timeless(tmp_path / "100000")
    half = len(watch.gradients) // 2
    assert half == 3 * settings.get("updates", 1)
    for one, other in zip(watch.gradients[:half], watch.gradients[half:], strict=True):
        largest = max(gradient.abs().max().item() for gradient in one.values())
        assert distance(one, other) < 1e-3 * largest
    for one, other in zip(small, large, strict=True):
        # at the first step policy and reference are the same, and every pair is a tie
        ties = {"preference_accuracy"} if one.get("margin") == pytest.approx(0, abs=1e-6) else set()
        for key in one.keys() - ties - {"sampler_gap"}:
            assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), key
    assert distance(weights(tmp_path / "50"), weights(tmp_path / "100000")) < 1e-6


def test_updates_above_1_take_that_many_optimizer_steps_on_the_same_replies(material, tmp_path):
    for updates in (1, 3):
        call("grpo", **material.grpo(out=tmp_path / str(updates), updates=updates, steps=2, lr=3e-3))
    one, three = tmp_path / "1", tmp_path / "3"
    for out, taken in ((one, 2), (three, 6)):
        counts = {float(value) for name, value in checkpoint(out, 2).items() if name.endswith("/step")}
        assert counts == {taken}
    assert rows(one)[0]["reward"] == rows(three)[0]["reward"]  # the first batch is sampled before any update
    assert rows(one)[0]["clip_fraction"] == 0 < rows(three)[0]["clip_fraction"] < 1
    assert rows(three)[0]["sampler_gap"] < 1e-5  # measured at the first update only
    assert distance(weights(one), weights(three)) > 1e-3


def test_a_frozen_vision_tower_stays_as_it_is_and_the_rest_learns(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path / "dpo", freeze_vision=True))
    call("grpo", **material.grpo(out=tmp_path / "grpo", freeze_vision=True, kl=0.04))
    before = weights(material.speaker)
    for out in (tmp_path / "dpo", tmp_path / "grpo"):
        after = weights(out)
        tower = [name for name in before if "visual" in name]
        rest = [name for name in before if "visual" not in name]
        assert len(tower) > 10 and all(torch.equal(before[name], after[name]) for name in tower)
        assert all(not torch.equal(before[name], after[name]) for name in rest)


def test_dpo_learns_to_prefer_what_was_chosen(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path, batch=8, steps=12, loss="dpo", schedule="constant"))
    last = rows(tmp_path)[-1]
    assert last["preference_accuracy"] == 1
    assert last["margin"] > 1 and last["loss_dpo"] < 0.35


def test_grpo_learns_to_give_the_answer_that_is_rewarded(material, tmp_path):
    data = write(material.folder / "words.jsonl", material.records[4:])  # A is always right
    call("grpo", **material.grpo(out=tmp_path, data=data, group=8, steps=30, lr=2e-3, normalizer="token"))
    reward = [row["reward"] for row in rows(tmp_path)]
    assert statistics.mean(reward[:3]) < 1.0  # of at most 1.5
    assert statistics.mean(reward[-5:]) > 1.35


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: status 2, one line, nothing trained


def refuse(capsys, stage, **settings):
    """Run a stage that must refuse: -> its stderr."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        training.run(lambda: call(stage, **settings))
    assert stop.value.code == 2
    return capsys.readouterr().err


def check_one_line(err, *words):
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


def third_line(material, tmp_path, **changes):
    """A data file whose third line is spoiled: fields changed, or dropped (None)."""
    pairs = [dict(pair) for pair in material.pairs]
    for pair in pairs:
        pair["images"] = [str(material.folder / name) for name in pair["images"]]
    spoiled = pairs[2] | changes
    pairs[2] = {key: value for key, value in spoiled.items() if value is not None}
    return write(tmp_path / "bad.jsonl", pairs)


BAD_LINES = {
    "a missing image": ({"images": ["nowhere.png"]}, "nowhere.png"),
    "a broken image": ({"images": ["broken.png"]}, "broken.png"),
    "an unreadable gold answer": ({"answer": "either A or B"}, "answer"),
    "an unknown answer type": ({"answer_type": "riddle"}, "riddle"),
    "a missing field": ({"prompt": None}, "prompt"),
    "a duplicate id": ({"id": "p1"}, "p1"),
    "an unknown reply format": ({"reply_format": "song"}, "song"),
}


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
@pytest.mark.parametrize("name", BAD_LINES)
def test_a_line_is_refused_by_file_and_number_for(material, tmp_path, capsys, stage, name):
    changes, word = BAD_LINES[name]
    (tmp_path / "broken.png").write_bytes((material.folder / material.records[0]["images"][0]).read_bytes()[8:])
    data, out = third_line(material, tmp_path, **changes), tmp_path / "out"
    check_one_line(refuse(capsys, stage, **getattr(material, stage)(data=data, out=out)), f"{data}:3", word)
    assert not out.exists()


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_data_or_models_that_cannot_be_read_are_refused(material, tmp_path, capsys, stage):
    settings = getattr(material, stage)

    def check(*words, **changes):
        out = tmp_path / "out"
        check_one_line(refuse(capsys, stage, **settings(out=out, **changes)), *words)
        assert rows(out) == [] and not (out / "checkpoints").exists()

    check("nothing.jsonl", data=tmp_path / "nothing.jsonl")
    empty = write(tmp_path / "empty.jsonl", [])
    check("empty.jsonl", "no records", data=empty)
    half = tmp_path / "half.jsonl"
    half.write_text(material.pair_data.read_text()[:-10])
    check("half.jsonl:8", "JSON", data=half)
    check("no/such/model", model=tmp_path / "no/such/model")
    (tmp_path / "hollow").mkdir()
    check("hollow", model=tmp_path / "hollow")
    torn = tmp_path / "torn"
    shutil.copytree(material.tiny, torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:5000])
    check("torn", model=torn)
    check("--max-pixels 100", max_pixels=100)
    (tmp_path / "file").write_text("")
    check_one_line(refuse(capsys, stage, **settings(out=tmp_path / "file")), "file")


def test_pairs_without_rejected_are_refused_by_dpo_and_enough_for_sft(material, tmp_path, capsys):
    data = third_line(material, tmp_path, rejected=None)
    for loss in ("dpo", "dpo+sft"):
        err = refuse(capsys, "dpo", **material.dpo(data=data, out=tmp_path / "out", loss=loss))
        check_one_line(err, f"{data}:3", "rejected")
    assert not (tmp_path / "out").exists()
    call("dpo", **material.dpo(data=data, out=tmp_path / "out", loss="sft", steps=1))
    assert len(rows(tmp_path / "out")) == 1
    data = third_line(material, tmp_path, chosen=" ")
    err = refuse(capsys, "dpo", **material.dpo(data=data, out=tmp_path / "other", loss="sft"))
    check_one_line(err, f"{data}:3", "chosen")


BAD_FLAGS = {
    "dpo": [["--bet", "0.2"], ["--los", "sft"], ["--loss", "ppo"], ["--batch", "0"], ["--lr", "0"], ["--beta", "0"],
            ["--steps", "-1"], ["--seed", "-1"], ["--sft-weight", "-1"], ["--group", "8"], ["--warm", "3"]],
    "grpo": [["--group", "1"], ["--prompt", "4"], ["--tempo", "1"], ["--lr", "-1e-6"], ["--temperature", "0"],
             ["--top-p", "0"], ["--clip-low", "2"], ["--kl", "-0.1"], ["--updates", "0"], ["--ratio", "word"],
             ["--steps", "0"], ["--seed", "-1"], ["--max-new-tokens", "x"], ["--keep", "0"]],
}  # fmt: skip


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_flags_that_are_unknown_abbreviated_or_senseless_are_refused(material, tmp_path, capsys, stage):
    main = importlib.import_module(stage).main
    for bad in BAD_FLAGS[stage]:
        with pytest.raises(SystemExit) as stop:
            main(flags(**getattr(material, stage)(out=tmp_path / "out")) + bad)
        assert stop.value.code == 2, bad
        err = capsys.readouterr().err
        assert "error:" in err.splitlines()[-1] and bad[0] in err.splitlines()[-1], err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
def test_a_directory_that_holds_a_run_is_left_alone_unless_told_otherwise(material, tmp_path, capsys, stage):
    settings = getattr(material, stage)
    call(stage, **settings(out=tmp_path, steps=2))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    check_one_line(refuse(capsys, stage, **settings(out=tmp_path, steps=2)), str(tmp_path), "--resume", "--overwrite")
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    call(stage, **settings(out=tmp_path, steps=1, overwrite=True))
    assert [row["step"] for row in rows(tmp_path)] == [1]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000001"]


def test_the_commands_print_one_line_on_stderr_and_end_with_2(material, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(material.pair_data.read_text().replace('"id": "p1"', '"id": p1'))
    lost = third_line(material, tmp_path, images=["lost.png"])
    started = [
        start(ROOT / "dpo.py", **material.dpo(data=broken, out=tmp_path / "out")),
        start(ROOT / "grpo.py", **material.grpo(data=lost, out=tmp_path / "out")),
    ]
    for process, words in zip(started, ([f"{broken}:2", "JSON"], [f"{lost}:3", "lost.png"]), strict=True):
        status, stdout, stderr = end(process)
        assert (status, stdout) == (2, "")
        check_one_line(stderr, *words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def stages():
    return sorted(path.stem for path in ROOT.glob("*.py") if "def parse_args" in path.read_text())


# The groups of each stage's --help, in their order. What is said of the machine is said in one place.
GROUPS = {
    "dpo": ["loss", "optimiser", "evaluation", "model and machine", "run directory"],
    "grpo": [
        "sampling", "reward and advantage", "loss", "optimiser", "judge", "sampler", "model and machine",
        "run directory",
    ],
    "distill": ["pairs", "sampling", "judge", "teacher, and servers", "sampler", "model and machine"],
    "eval": [
        "what to evaluate", "generalization factor (GF)", "replies", "judge", "sampler", "model and machine", "report",
    ],
    "importers": [],
    "jigsaw": [],
    "report": [],
}  # fmt: skip


def test_all_stages_are_known():
    assert stages() == sorted(GROUPS)


@pytest.fixture
def parser_of(monkeypatch):
    """A function: stage -> its parser, caught as it prints its --help."""

    def caught(stage):
        shown = []
        monkeypatch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: shown.append(parser))
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(stage).main(["--help"])
        assert stop.value.code == 0
        return shown[0]

    return caught


@pytest.mark.parametrize("stage", [*stages(), "toy.primer", "toy.tiny_model", "toy.downstream", "toy.formats"])
def test_help_ends_with_0_and_explains_every_flag_of(stage, parser_of):
    parser = parser_of(stage)
    assert parser.allow_abbrev is False
    page = " ".join(parser.format_help().split())  # the text is filled in here: a bad % would raise
    for action in parser._actions:
        assert action.help and action.help != argparse.SUPPRESS, f"{action.option_strings} has no help text"
        assert action.option_strings == [] or action.option_strings[-1] in page


@pytest.mark.parametrize("stage", GROUPS)
def test_help_shows_each_group_and_each_flag_once_of(stage, parser_of):
    parser = parser_of(stage)
    titles = [group.title for group in parser._action_groups if group._group_actions]
    assert titles == ["options", *GROUPS[stage]]
    lines = parser.format_help().splitlines()
    for title in titles:
        assert lines.count(f"{title}:") == 1, title
    names = [name for action in parser._actions for name in action.option_strings]
    assert len(names) == len(set(names))


# What add_training_flags gives both trainers: of args.json these are the machine's and the run directory's part.
MACHINE = {"max_pixels", "max_image_pixels", "dtype", "attn", "freeze_vision", "micro_tokens", "gradient_checkpointing",
           "shard", "replicas", "offload", "accumulate", "measure_peak", "save_every", "keep", "timeout",
           "max_skipped", "strict_data"}  # fmt: skip
COMMON = {"model", "data", "skip_bad", "out", "seed", "steps", "lr", "schedule", "warmup", "grad_clip"}
SETTINGS = {
    "dpo": COMMON | MACHINE | {
        "loss", "beta", "sft_weight", "sft_mean", "preference", "preference_weight", "label_smoothing",
        "quality_weight", "reward_shift", "batch", "eval_data", "eval_every",
    },
    "grpo": COMMON | MACHINE | {
        "prompts", "group", "max_refill", "prompt_weights", "temperature", "top_k", "top_p", "replay_filter",
        "max_new_tokens", "reward", "format_weight", "overlong_buffer", "accuracy_low", "accuracy_high",
        "advantage_scale", "advantage_baseline", "group_weights", "surrogate", "clip_low", "clip_high", "ratio", "kl",
        "entropy_bonus", "normalizer", "mask_truncated", "importance", "importance_cap", "importance_floor",
        "importance_outside", "updates", "sampler", "vllm_memory", "vllm_tp", "parity_every", "one_step_off_policy",
        "judge", "judge_model", "judge_tokens", "judge_url", "judge_key", "judge_cache", "judge_price_in",
        "judge_price_out", "judge_options", "concurrency", "retries", "endpoint_timeout",
    },
}  # fmt: skip


@pytest.mark.parametrize("stage", SETTINGS)
def test_args_json_holds_every_setting_of(stage, tmp_path):
    args = importlib.import_module(stage).parse_args(["--model", "m", "--data", "d", "--out", str(tmp_path)])
    open_run(args)
    recorded = json.loads((tmp_path / "args.json").read_text())
    assert recorded.keys() == SETTINGS[stage] | {"inputs"}
    assert recorded.keys() == vars(args).keys() - {"resume", "overwrite"} | {"inputs"}
    assert recorded["data"] == ["d"] and recorded["gradient_checkpointing"] == "auto"


def open_run(args, **changes):
    """Open args.out as grpo.py does, and put back what it does to signals."""
    handlers = {number: signal.getsignal(number) for number in run_directory.SIGNALS}
    try:
        may_change = vllm_sampler.MAY_CHANGE + endpoint.MAY_CHANGE
        return run_directory.Run.open(vars(args) | changes, training.setup(), may_change)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


# Flags that a resumed run may be given anew: they change neither data nor weights, but how far, how safe and how fast.
MAY_CHANGE = {"steps", "save_every", "keep", "timeout", "max_skipped", "measure_peak", "max_image_pixels",
              "shard", "replicas", "offload", "accumulate", "vllm_tp", "strict_data",
              "vllm_memory", "parity_every", "judge_url", "judge_key", "judge_cache", "judge_price_in",
              "judge_price_out", "concurrency", "retries", "endpoint_timeout"}  # fmt: skip


@pytest.mark.parametrize("name", sorted(SETTINGS["grpo"] - {"out"}))
def test_a_resumed_run_may_be_given_anew_only_what_changes_no_result(tmp_path, name):
    args = grpo.parse_args(["--model", "m", "--data", "d", "--out", str(tmp_path)])
    open_run(args).log({"step": 1})
    changes = {"resume": True, name: "another"}
    if name in MAY_CHANGE:
        open_run(args, **changes)
        assert json.loads((tmp_path / "args.json").read_text())[name] == "another"
    else:
        with pytest.raises(DataError, match=f"--{name.replace('_', '-')} was .*, now another; a resumed run keeps its"):
            open_run(args, **changes)


def test_grpo_without_model_and_data_takes_the_embedded_default():
    args = grpo.parse_args(["--steps", "7"])
    assert (args.model, args.out, args.steps) == ("runs/embedded/base", "runs/embedded/grpo", 7)
    with pytest.raises(SystemExit):
        grpo.parse_args(["--model", "somewhere"])  # but not a part of it: --data and --out are missing


def test_help_loads_nothing_that_takes_long():
    """--help of all stages in one process: about 1.5 s, most of it torch. CPU time: a busy machine takes no more."""
    lines = ["import importlib, sys, time", f"for stage in {stages()}:", "    try:"]
    lines += ["        importlib.import_module(stage).main(['--help'])", "    except SystemExit:", "        pass"]
    lines += ["heavy = {'transformers', 'vllm', 'matplotlib', 'datasets'} & set(sys.modules)"]
    lines += ["print(heavy or 'nothing heavy', time.process_time() < 10)"]
    stdout, _ = finish(start("-c", "\n".join(lines)))
    assert stdout.splitlines()[-1] == "nothing heavy True"


# ---------------------------------------------------------------------------------------------------------------------
# The tests themselves


FAILING = """
from pathlib import Path
import training
from commands import Material, call, finish, start, torchrun

material = Material(Path("{folder}"))


def fail(*args):
    raise ValueError("cause 1")


def test_1(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "update", fail)
    call("grpo", **material.grpo(out=tmp_path / "out"))


def test_2():
    finish(start("-c", "import training; training.run(lambda: [] + 'cause' + 2)"))


def test_3(tmp_path):
    torchrun([("checks", dict(check="fail"))], tmp_path)


def test_4(tmp_path):
    torchrun([("grpo", material.grpo(out=tmp_path / "out", data="nowhere"))], tmp_path)
"""


def test_the_cause_is_the_first_hand_error_without_bars_logs_and_torchruns_last_words():
    bars = [f"grpo:  {step}%|#  | {step}/100" for step in range(60)]
    lines = ["[W1121 12:00:00.1 socket.cpp:1] lost", "frame #0: c10::Error", "[rank0]:[E1121 12:00:00.2 x.cpp:3] more"]
    lines += ["Traceback (most recent call last):", '  File "a.py", line 1, in update', "ValueError: this one"]
    lines += ["Traceback (most recent call last):", "  dist.barrier()", "RuntimeError: [gloo/pair.cc] reset by peer"]
    lines += [
        "E1121 12:00:00 1 torch/distributed/elastic/api.py:1] failed (exitcode: 1) local_rank: 0",
        "Traceback",
        "=",
    ]
    shown = cause("\n".join(bars + lines)).splitlines()
    assert shown == [
        bars[-1],
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in update',
        "ValueError: this one",
    ]
    # where every process has lost another, that is all there is to say
    assert cause("\n".join(lines[6:])).endswith("reset by peer")
    assert cause("\n".join(map(str, range(100)))).splitlines() == [str(number) for number in range(70, 100)]


def test_a_stage_that_fails_says_why_in_under_40_lines_wherever_it_runs(material, tmp_path):
    (tmp_path / "test_failing.py").write_text(FAILING.format(folder=material.folder.resolve()))
    options = [
        "-c",
        ROOT / "pyproject.toml",
        "-o",
        f"pythonpath={ROOT} {ROOT / 'tests'}",
        "-p",
        "tests.conftest",
        "-p",
        "no:cacheprovider",
    ]
    status, stdout, _ = end(start("-m", "pytest", *options, tmp_path / "test_failing.py"))
    assert status == 1, stdout
    _, *parts = re.split(r"^_+ test_\d _+$", stdout.partition("= short test summary")[0], flags=re.M)
    causes = ["ValueError: cause 1", "TypeError: ", "ValueError: this is the cause", "error: nowhere: "]
    for part, words in zip(parts, causes, strict=True):
        assert words in part, part
        assert part.count("\n") < 40, part
        for noise in ("torch/distributed", "by peer", "c10d"):
            assert noise not in part, part


def test_skip_bad_leaves_out_what_cannot_be_scored_and_says_how_many(material, tmp_path, capsys):
    bad = material.question("unscorable", "What is it?", answer="perhaps", answer_type="digit")
    data = write(material.folder / "with_bad.jsonl", [*material.records[:4], bad])
    with pytest.raises(DataError, match=r"with_bad.jsonl:5: answer 'perhaps' is not a whole number"):
        call("grpo", **material.grpo(data=data, steps=1, out=tmp_path / "stops"))
    call("grpo", **material.grpo(data=data, steps=1, out=tmp_path / "goes on", skip_bad=True))
    assert f"skipped 1 records: first {data}:5: answer 'perhaps'" in capsys.readouterr().err
    assert len(rows(tmp_path / "goes on")) == 1
