"""exploration.py: nucleus and entropy by hand, and both read off a model equal to the plain way, reply by reply."""

import math

import pytest
import torch

import exploration
import model
from sampler import filter_logits


def logits_of(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_the_nucleus_is_the_smallest_set_of_likeliest_tokens_that_reaches_the_mass():
    logits = logits_of([0.04, 0.5, 0.16, 0.3], [0.0, 0.02, 0.0, 0.98], [0.25, 0.25, 0.25, 0.25])
    assert exploration.nucleus_sizes(logits).tolist() == [3, 1, 4]  # 0.5 + 0.3 + 0.16 reaches 0.95, 0.5 + 0.3 does not
    assert exploration.nucleus_sizes(logits, 0.79).tolist() == [2, 1, 4]
    assert exploration.nucleus_sizes(logits, 0.49).tolist() == [1, 1, 2]


def test_the_entropy_of_what_is_impossible_is_nothing():
    found = exploration.entropies(logits_of([0.5, 0.25, 0.25, 0.0], [0.0, 0.0, 1.0, 0.0]))
    assert found.tolist() == pytest.approx([1.5 * math.log(2), 0])


@pytest.mark.parametrize("top_p", [0.3, 0.6, 0.95])
def test_the_nucleus_is_the_one_that_top_p_samples_from(top_p):
    logits = torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 2
    kept = filter_logits(logits, 0, top_p).isfinite().sum(-1)
    assert exploration.nucleus_sizes(logits, top_p).equal(kept) and kept.unique().numel() > 5


def replies_for(encoder, *lengths):
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(5, 90, (length,), generator=generator) for length in lengths]


def plain(policy, prompt, reply, temperature):
    """(entropies, nucleus sizes) of one reply's tokens: every logit of that reply alone, and a loop over tokens."""
    batch = model.pack([(prompt, [reply])])
    batch.targets = None  # so that the forward gives logits
    with torch.no_grad():
        probabilities = policy(batch, temperature)[batch.source].double().softmax(-1)
    sizes = []
    for row in probabilities.tolist():
        mass, size = 0.0, 0
        for probability in sorted(row, reverse=True):
            mass, size = mass + probability, size + 1
            if mass >= 0.95:
                break
        sizes.append(size)
    return [-sum(p * math.log(p) for p in row if p > 0) for row in probabilities.tolist()], sizes


def test_what_is_read_off_the_model_in_chunks_is_the_plain_computation(models, records, monkeypatch):
    policy, encoder = models["qwen2_5_vl"]
    monkeypatch.setattr(policy, "chunk_bytes", 3 * 4 * len(policy.hf.lm_head.weight))  # three rows of logits at a time
    prompts = encoder.prompts(records[:2])
    groups = [(prompts[0], replies_for(encoder, 5, 1, 3)), (prompts[1], replies_for(encoder, 2, 4))]
    entropy, size, mask = exploration.of_tokens(policy, groups, 0.7)
    assert mask.sum(1).tolist() == [5, 1, 3, 2, 4] and not entropy[~mask].any()
    number = 0
    for prompt, replies in groups:
        for reply in replies:
            entropies, sizes = plain(policy, prompt, reply, 0.7)
            assert entropy[number][mask[number]].tolist() == pytest.approx(entropies, abs=1e-4)
            assert size[number][mask[number]].tolist() == sizes
            number += 1
    assert len(size[mask].unique()) > 3


def test_a_reply_counts_by_its_own_tokens_however_the_replies_are_divided(models, records, monkeypatch):
    policy, encoder = models["qwen2_5_vl"]
    prompt, replies = encoder.prompt(records[0]), replies_for(encoder, 5, 1, 3)
    together = exploration.of_replies(policy, prompt, replies, 1.0)
    for number, reply in enumerate(replies):
        entropies, sizes = plain(policy, prompt, reply, 1.0)
        assert together["entropy"][number] == pytest.approx(sum(entropies) / len(reply), abs=1e-4)
        assert together["rbf"][number] == pytest.approx(sum(sizes) / len(reply))
    monkeypatch.setattr(exploration, "FORWARD_TOKENS", 10)  # two replies of five tokens at a time
    divided = exploration.of_replies(policy, prompt, replies, 1.0)
    assert divided["rbf"] == together["rbf"] and divided["entropy"] == pytest.approx(together["entropy"], abs=1e-5)
