"""Prompt-once groups have the log-probs and gradients of transformers' own models, one reply at a time (groups.py)."""

import math

import pytest
import torch
from groups import (
    CASES,
    EXACT,
    REPLIES,
    assert_same_gradients,
    every_family,
    gradients,
    groups_of,
    plain_log_probs,
    vision_names,
    vocabulary_of,
)

import model


def assert_equals_plain(policy, encoder, groups, temperature=1.0):
    """Log-probs and gradients of every parameter of a group batch against one plain forward per reply."""
    logp, mask = model.log_probs(policy, groups, temperature)
    rows = [(prompt, reply) for prompt, replies in groups for reply in replies]
    assert logp.shape == mask.shape == (len(rows), max(len(reply) for _, reply in rows))
    # Another weight on every token: a sum would not notice tokens that are exchanged.
    coefficient = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for row, (prompt, reply) in enumerate(rows):
        size = len(reply)
        assert mask[row].tolist() == [True] * size + [False] * (logp.shape[1] - size)
        assert (logp[row, size:] == 0).all()
        plain = plain_log_probs(policy, encoder, prompt, reply, temperature)
        torch.testing.assert_close(logp[row, :size], plain, **EXACT)
        total = total + (coefficient[row, :size] * plain).sum()
    assert_same_gradients(gradients(policy, (coefficient * logp).sum()), gradients(policy, total))


@pytest.mark.parametrize("case", CASES)
@every_family
def test_a_group_has_the_log_probs_and_gradients_of_the_plain_layout(models, records, family, case):
    policy, encoder = models[family]
    assert_equals_plain(policy, encoder, groups_of(encoder, records, CASES[case]))


@every_family
def test_so_it_has_at_temperature_0_7(models, records, family):
    policy, encoder = models[family]
    assert_equals_plain(policy, encoder, groups_of(encoder, records, [(0, 2), (1, 3)]), temperature=0.7)


@every_family
def test_a_group_without_pictures_leaves_the_vision_tower_without_gradient(models, records, family):
    policy, encoder = models[family]
    logp, _ = model.log_probs(policy, groups_of(encoder, records, [(1, 2)]))
    found = gradients(policy, logp.sum())
    assert {name for name, grad in found.items() if grad is None} == vision_names(policy)


@every_family
def test_another_sibling_changes_nothing_in_a_reply(models, records, family):
    policy, encoder = models[family]
    prompt, replies = encoder.prompt(records[0]), [encoder.encode_reply(text) for text in REPLIES[:3]]
    with torch.no_grad():
        before, _ = model.log_probs(policy, [(prompt, replies)])
        for sibling in ("quite another reply", "", "a much longer one " * 9):
            after, _ = model.log_probs(policy, [(prompt, [replies[0], encoder.encode_reply(sibling), replies[2]])])
            for row in (0, 2):
                size = len(replies[row])
                torch.testing.assert_close(after[row, :size], before[row, :size], **EXACT)


def test_the_order_of_siblings_and_groups_does_not_matter(models, records):
    policy, encoder = models["qwen3_vl"]
    groups = groups_of(encoder, records, [(0, 2), (1, 1), (2, 2)])
    with torch.no_grad():
        forwards, _ = model.log_probs(policy, groups)
        backwards, _ = model.log_probs(policy, [(prompt, replies[::-1]) for prompt, replies in groups[::-1]])
    torch.testing.assert_close(backwards.flip(0), forwards, **EXACT)


@every_family
def test_a_group_has_the_same_log_probs_alone_and_beside_longer_ones(models, records, family):
    policy, encoder = models[family]
    groups = groups_of(encoder, records, [(1, 2), (2, 3), (0, 1)])
    with torch.no_grad():
        together, _ = model.log_probs(policy, groups)
        for rows, group in ((slice(0, 2), groups[0]), (slice(2, 5), groups[1]), (slice(5, 6), groups[2])):
            alone, _ = model.log_probs(policy, [group])
            torch.testing.assert_close(together[rows, : alone.shape[1]], alone, **EXACT)


def test_a_prompt_is_laid_out_once_whatever_the_number_of_replies(models, records):
    _, encoder = models["qwen2_5_vl"]
    prompt, replies = encoder.prompt(records[0]), [encoder.encode_reply(text) for text in REPLIES]
    batch = model.pack([(prompt, replies)])
    assert batch.ids.shape == (1, len(prompt.ids) + sum(len(reply) - 1 for reply in replies))
    assert torch.equal(batch.pixels, prompt.pixels)
    assert len(batch.targets) == len(batch.source) == sum(len(reply) for reply in replies)
    assert len(batch.read) == 1 + sum(len(reply) - 1 for reply in replies), "the prompt's last state is read once"


def test_a_packed_row_worked_by_hand():
    def prompt(ids, begin):
        return model.Prompt(torch.tensor(ids), torch.tensor([ids, ids, ids]) * 10, begin, None, None, [])

    end = 9
    groups = [
        (prompt([1, 2, 3], 31), [torch.tensor([4, 5, end]), torch.tensor([end])]),
        (prompt([6], 61), []),
        (prompt([7, 8], 81), [torch.tensor([5, end])]),
    ]
    batch = model.pack(groups)
    assert batch.ids.tolist() == [[1, 2, 3, 6, 7, 8, 4, 5, 5]], "prompts, then what is fed of the replies"
    assert batch.positions[1].tolist() == [[10, 20, 30, 60, 70, 80, 31, 32, 81]]
    assert batch.read.tolist() == [2, 3, 5, 6, 7, 8]
    assert batch.source.tolist() == [0, 0, 2, 3, 4, 5] and batch.targets.tolist() == [4, end, 5, 5, end, end]
    assert batch.cell.tolist() == [[0, 1, 2, 0, 0, 2], [0, 0, 0, 1, 2, 1]]
    layout = batch.layout
    assert layout.prompts.lengths == [3, 1, 2]
    assert layout.replies.lengths == [2, 0, 1], "one entry a reply"
    assert layout.by_prompt.lengths == [2, 0, 1], "one entry a prompt"


# ---------------------------------------------------------------------------------------------------------------------
# The head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_size_of_the_heads_chunks_does_not_matter(models, records, monkeypatch, temperature):
    policy, encoder = models["qwen2_5_vl"]
    groups = groups_of(encoder, records, [(0, 3), (1, 2)])
    whole, _ = model.log_probs(policy, groups, temperature)
    whole_gradients = gradients(policy, whole.exp().sum())
    monkeypatch.setattr(policy, "chunk_bytes", 3 * 4 * vocabulary_of(policy))  # three rows at a time
    parts, _ = model.log_probs(policy, groups, temperature)
    torch.testing.assert_close(parts, whole, **EXACT)
    assert_same_gradients(gradients(policy, parts.exp().sum()), whole_gradients)
    with torch.no_grad():
        torch.testing.assert_close(model.log_probs(policy, groups, temperature)[0], whole, **EXACT)


def test_log_probs_of_tokens_and_their_gradients_are_those_of_log_softmax():
    noise = torch.Generator().manual_seed(8)
    hidden = torch.randn(5, 4, generator=noise, dtype=torch.float32).requires_grad_()
    weight = torch.randn(11, 4, generator=noise).requires_grad_()
    source = torch.tensor([0, 0, 0, 1, 3, 3, 4])  # state 2 predicts nothing
    targets = torch.tensor([5, 5, 9, 0, 10, 1, 3])
    scale, forbidden = torch.randn(7, generator=noise), torch.tensor([2, 7])
    for temperature in (1.0, 0.6):
        logits = (hidden @ weight.T / temperature).index_fill(-1, forbidden, -math.inf)
        expected = logits.log_softmax(-1)[source, targets]
        wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
        for rows in (1, 2, 3, 100):
            found = model.TokenLogProbs.apply(hidden, weight, source, targets, temperature, forbidden, rows)
            torch.testing.assert_close(found, expected, **EXACT)
            grads = torch.autograd.grad((found * scale).sum(), (hidden, weight))
            for one, other in zip(grads, wanted, strict=True):
                torch.testing.assert_close(one, other, **EXACT)


def test_image_and_video_pads_have_no_probability_and_the_rest_sums_to_1(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompt = encoder.prompt(records[0])
    image, video = encoder.forbidden
    vocabulary = vocabulary_of(policy)
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [torch.tensor([token]) for token in range(vocabulary)])])
    assert logp[image, 0] == logp[video, 0] == -math.inf
    assert torch.isfinite(logp).sum() == vocabulary - 2
    assert float(logp.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_every_end_token_belongs_to_its_reply(models, records):
    policy, encoder = models["qwen2_5_vl"]
    ends = [encoder.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    assert sorted(ends) == sorted(policy.end_ids) and ends[0] == encoder.end_id
    replies = [torch.cat([encoder.encode_reply("above")[:-1], torch.tensor([end])]) for end in ends]
    logp, mask = model.log_probs(policy, [(encoder.prompt(records[1]), replies)])
    assert mask.all() and (logp < 0).all()


# ---------------------------------------------------------------------------------------------------------------------
# What a policy that trains does for a batch without pictures


@every_family
def test_a_blank_picture_changes_nothing_and_gives_the_tower_a_gradient_of_zero(models, records, monkeypatch, family):
    policy, encoder = models[family]
    groups = groups_of(encoder, records, [(1, 2)])
    without, _ = model.log_probs(policy, groups)
    expected = gradients(policy, without.sum())
    monkeypatch.setattr(policy, "trains", True)
    logp, _ = model.log_probs(policy, groups)
    assert torch.equal(logp, without)
    for name, gradient in gradients(policy, logp.sum()).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name])
        elif gradient is not None:  # a few of the tower's weights lead nowhere, and stay without
            assert not gradient.any(), name
