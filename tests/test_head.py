"""head.py: the sampler's top-k and top-p replayed in the trainer, against plain dense arithmetic.

That log-probs and entropies over the whole vocabulary are right is in tests/test_groups.py and
tests/test_grpo_losses.py.
"""

import math

import pytest
import torch
from groups import EXACT

import head
import model
import sampler

FORBIDDEN = torch.tensor([2, 7])
SOURCE = torch.tensor([0, 0, 1, 2, 3, 4])  # which of five states predicts each target
FILTERS = [(3, 1.0), (0, 0.6), (4, 0.7)]


def made_up(seed=9):
    """hidden (5, 4), weight (11, 4), targets (6,) that any filter would keep or not, as it happens."""
    noise = torch.Generator().manual_seed(seed)
    hidden = torch.randn(5, 4, generator=noise).requires_grad_()
    weight = torch.randn(11, 4, generator=noise).requires_grad_()
    return hidden, weight, torch.tensor([0, 1, 3, 5, 8, 10])


def dense_mask(hidden, weight, targets, temperature, top_k, top_p):
    """(5, 11): what the two filters keep, token by token, and every target."""
    mask = torch.zeros(5, 11, dtype=torch.bool)
    for state, logits in enumerate((hidden @ weight.T / temperature).detach()):
        logits[FORBIDDEN] = -math.inf
        order = logits.argsort(descending=True).tolist()[: top_k or 9]
        chance = logits[order].softmax(0).tolist()
        for place, token in enumerate(order):
            if sum(chance[:place]) < top_p:  # it takes this token to reach the mass
                mask[state, token] = True
    mask[SOURCE, targets] = True
    return mask


def dense_log_probs(hidden, weight, targets, temperature, mask):
    logits = (hidden @ weight.T / temperature).masked_fill(~mask, -math.inf)
    return logits.log_softmax(-1)[SOURCE, targets]


def check_equal(found, expected, inputs):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    scale = torch.randn(6, generator=torch.Generator().manual_seed(1))
    gradients, wanted = (torch.autograd.grad((values * scale).sum(), inputs) for values in (found, expected))
    for one, other in zip(gradients, wanted, strict=True):
        assert other.abs().max() > 0.01
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("top_k, top_p", FILTERS)
def test_replayed_log_probs_and_their_gradients_are_those_of_a_dense_softmax_over_the_kept_tokens(
    top_k, top_p, temperature
):
    hidden, weight, targets = made_up()
    mask = dense_mask(hidden, weight, targets, temperature, top_k, top_p)
    assert 5 < mask.sum() < 45
    for rows in (1, 2, 100):
        expected = dense_log_probs(hidden, weight, targets, temperature, mask)
        states = hidden, weight, SOURCE, targets, temperature, FORBIDDEN, rows
        kept = head.TokenFilter(top_k, top_p).keep(*states)
        assert kept.bounds == [0, *mask.sum(1).cumsum(0).tolist()]
        check_equal(head.TokenLogProbs.apply(*states, kept), expected, (hidden, weight))


@pytest.mark.parametrize("top_k, top_p", FILTERS)
def test_later_weights_choose_among_the_tokens_that_the_first_ones_kept(top_k, top_p):
    hidden, weight, targets = made_up()
    mask = dense_mask(hidden, weight, targets, 0.6, top_k, top_p)
    token_filter = head.TokenFilter(top_k, top_p)
    token_filter.keep(hidden, weight, SOURCE, targets, 0.6, FORBIDDEN, 2)
    later, moved, _ = made_up(seed=10)
    assert not torch.equal(dense_mask(later, moved, targets, 0.6, top_k, top_p), mask)
    states = later, moved, SOURCE, targets, 0.6, FORBIDDEN, 2
    found = head.TokenLogProbs.apply(*states, token_filter.keep(*states))
    check_equal(found, dense_log_probs(later, moved, targets, 0.6, mask), (later, moved))


def test_a_token_that_was_sampled_was_kept_even_if_the_filter_would_now_drop_it():
    hidden, weight = torch.eye(2), torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 5.0]])
    states = hidden, weight, torch.tensor([0, 1]), torch.tensor([2, 2]), 1.0, torch.tensor([], dtype=torch.long), 1
    kept = head.TokenFilter(1, 1.0).keep(*states)
    assert kept.ids.tolist() == [0, 2, 2] and kept.bounds == [0, 2, 3]
    # among 3 and 1: e / (e^3 + e); the second state has kept one token, which is certain
    found = head.TokenLogProbs.apply(*states, kept)
    torch.testing.assert_close(found, torch.tensor([-math.log(1 + math.e**2), 0.0]))


@pytest.mark.parametrize("top_k", [0, 11, 1000])
def test_filters_that_keep_everything_list_nothing(top_k):
    hidden, weight, targets = made_up()
    assert head.TokenFilter(top_k, 1.0).keep(hidden, weight, SOURCE, targets, 1.0, FORBIDDEN, 2) is None
    assert head.TokenFilter(top_k or 10, 0.99).keep(hidden, weight, SOURCE, targets, 1.0, FORBIDDEN, 2)


def test_a_filter_of_another_batch_is_refused():
    hidden, weight, targets = made_up()
    token_filter = head.TokenFilter(3, 1.0)
    token_filter.keep(hidden, weight, SOURCE, targets, 1.0, FORBIDDEN, 2)
    with pytest.raises(AssertionError, match="one batch"):
        token_filter.keep(hidden[:4], weight, SOURCE[:5], targets[:5], 1.0, FORBIDDEN, 2)


@pytest.mark.parametrize("top_k, top_p", [(9, 1.0), (0, 0.8), (20, 0.9)])
def test_the_samplers_log_probs_after_its_filters_are_those_that_the_trainer_replays(models, records, top_k, top_p):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in records]
    asked = {"seeds": [5, 6, 7, 8], "temperature": 0.7, "top_k": top_k, "top_p": top_p, "max_new_tokens": 8}
    sampled = sampler.sample(policy, prompts, 3, filtered_logps=True, **asked)
    unfiltered = sampler.sample(policy, prompts, 3, **asked)
    groups = [(prompt, [reply.ids for reply in replies]) for prompt, replies in zip(prompts, sampled, strict=True)]
    with torch.no_grad():
        logp, mask = model.log_probs(policy, groups, 0.7, head.TokenFilter(top_k, top_p))
    flat, plain = sum(sampled, []), sum(unfiltered, [])
    for row, (reply, before) in enumerate(zip(flat, plain, strict=True)):
        torch.testing.assert_close(reply.logps, logp[row][mask[row]], **EXACT)
        assert reply.ids.tolist() == before.ids.tolist()  # what is returned changes nothing of what is sampled
        assert (reply.logps > before.logps - 1e-6).all()
    assert max((one.logps - other.logps).max() for one, other in zip(flat, plain, strict=True)) > 0.05


def test_a_replayed_filter_leaves_the_entropy_that_of_the_whole_distribution(models, records):
    policy, encoder = models["qwen2_5_vl"]
    groups = [(encoder.prompt(records[0]), [encoder.encode_reply(text) for text in ("A", "1 looks dark")])]
    with torch.no_grad():
        logp, _ = model.log_probs(policy, groups, 0.7, head.TokenFilter(9, 0.8))
        found, _, entropy = model.log_probs_and_entropies(policy, groups, 0.7, head.TokenFilter(9, 0.8))
        _, _, whole = model.log_probs_and_entropies(policy, groups, 0.7)
    assert torch.equal(found, logp) and torch.equal(entropy, whole)
