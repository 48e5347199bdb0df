"""sampler.py: replies equal transformers' generate(), their log-probs the trainer's, their frequencies the softmax."""

import math

import numpy as np
import pytest
import torch
from groups import EXACT, every_family, ids_of, picture_inputs, plain_log_probs, vocabulary_of

import model
import sampler


def generate(policy, encoder, prompt, count, **options):
    """Greedy ids from transformers' own generate()."""
    ids = prompt.ids[None]
    options = {"do_sample": False, "suppress_tokens": encoder.forbidden, **options}
    options |= {"max_new_tokens": count, "attention_mask": torch.ones_like(ids)}
    return policy.hf.generate(ids, **picture_inputs(encoder, prompt, ids), **options)[0, ids.shape[1] :]


@pytest.fixture
def early_ends(models, monkeypatch):
    """Let every fifth token end a reply, so that replies and prompts finish at different steps: -> the end ids."""
    ends = tuple(range(0, vocabulary_of(models["qwen2_5_vl"][0]), 5))
    for policy, _ in models.values():
        monkeypatch.setattr(policy, "end_ids", ends)
    return ends


@every_family
def test_greedy_replies_equal_generate(models, records, family):
    policy, encoder = models[family]
    prompts = [encoder.prompt(record) for record in records]
    assert len({len(prompt.ids) for prompt in prompts}) == 4
    sampled = sampler.sample(policy, prompts, 1, seeds=[1, 2, 3, 4], temperature=0, max_new_tokens=14)
    expected = [generate(policy, encoder, prompt, 14).tolist() for prompt in prompts]
    assert [reply for (reply,) in ids_of(sampled)] == expected
    assert len({tuple(reply) for reply in expected}) == 4 and max(len(set(reply)) for reply in expected) > 5


def test_greedy_replies_end_where_generate_ends(models, records, monkeypatch):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in records]
    endless = ids_of(sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=14))
    ends = sorted({endless[0][0][5], endless[1][0][2]})
    monkeypatch.setattr(policy, "end_ids", tuple(ends))
    sampled = sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=14)
    expected = [generate(policy, encoder, prompt, 14, eos_token_id=ends).tolist() for prompt in prompts]
    assert [reply for (reply,) in ids_of(sampled)] == expected
    assert len({len(reply) for reply in expected}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@every_family
def test_sampled_log_probs_are_those_of_the_trainer(models, records, family, temperature):
    policy, encoder = models[family]
    prompts = [encoder.prompt(record) for record in records]
    sampled = sampler.sample(policy, prompts, 3, seeds=[5, 6, 7, 8], temperature=temperature, max_new_tokens=10)
    groups = [(prompt, [reply.ids for reply in replies]) for prompt, replies in zip(prompts, sampled, strict=True)]
    with torch.no_grad():
        logp, _ = model.log_probs(policy, groups, temperature)
    for row, reply in enumerate(reply for replies in sampled for reply in replies):
        torch.testing.assert_close(reply.logps, logp[row, : len(reply.ids)], **EXACT)


def test_filters_do_not_change_the_log_probs_that_are_returned(models, records):
    # GRPO's ratio compares with the unfiltered distribution
    policy, encoder = models["qwen2_5_vl"]
    prompt = encoder.prompt(records[0])
    (replies,) = sampler.sample(policy, [prompt], 2, seeds=[5], temperature=0.7, top_k=9, top_p=0.8, max_new_tokens=8)
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [reply.ids for reply in replies])], 0.7)
    for row, reply in enumerate(replies):
        torch.testing.assert_close(reply.logps, logp[row, : len(reply.ids)], **EXACT)


def test_the_same_seeds_give_the_same_replies_and_others_do_not(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in (records[0], records[0], records[1])]

    def replies(seeds):
        return ids_of(sampler.sample(policy, prompts, 3, seeds=seeds, max_new_tokens=8))

    first = replies([1, 2, 3])
    assert replies([1, 2, 3]) == first
    assert first[0] != first[1], "one prompt under two seeds"
    assert len({tuple(reply) for reply in first[0]}) == 3, "the replies of a group"
    other = replies([1, 9, 3])
    assert other[0] == first[0] and other[1] != first[1] and other[2] == first[2]


@every_family
def test_a_prompt_gives_the_same_replies_alone_and_in_any_batch(models, records, early_ends, family):
    policy, encoder = models[family]
    prompts, seeds = [encoder.prompt(record) for record in records], [11, 12, 13, 14]

    def replies(which, n=3, **options):
        options |= {"seeds": [seeds[i] for i in which], "max_new_tokens": 9}
        return ids_of(sampler.sample(policy, [prompts[i] for i in which], n, **options))

    together = replies([0, 1, 2, 3])
    assert [replies([i])[0] for i in range(4)] == together
    assert replies([3, 1, 2, 0]) == [together[i] for i in (3, 1, 2, 0)]
    assert replies([0, 1, 2, 3], batch_tokens=1) == together, "one prompt a round"
    assert replies([0, 1, 2, 3], batch_tokens=400) == together, "several rounds"
    assert replies([0, 2], n=2) == [together[0][:2], together[2][:2]], "fewer replies"


def test_replies_stop_one_by_one_and_those_that_are_left_go_on_as_if_nothing_had_ended(
    models, records, early_ends, monkeypatch
):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3, 1, 0)]
    asked = {"seeds": [21, 22, 23, 24, 25, 26], "temperature": 3.0, "max_new_tokens": 16}
    drops, select = [], sampler.ReplyCache.select

    def count_and_select(cache, sequences):
        drops.append((len(cache.owner) - len(sequences), len(cache.by_prompt.lengths)))
        select(cache, sequences)

    monkeypatch.setattr(sampler.ReplyCache, "select", count_and_select)
    sampled = sampler.sample(policy, prompts, 6, **asked)
    assert len(drops) >= 2 and drops[-1][1] < 6, f"(replies dropped, prompts left) {drops}: too few to show anything"
    monkeypatch.setattr(policy, "end_ids", ())
    endless = sampler.sample(policy, prompts, 6, **asked)
    lengths = set()
    for reply, whole in zip(sum(sampled, []), sum(endless, []), strict=True):
        assert len(whole.ids) == len(whole.logps) == 16 and not whole.finished
        stops = [step for step, token in enumerate(whole.ids.tolist()) if token in early_ends]
        size = stops[0] + 1 if stops else 16  # the end token belongs to the reply
        assert reply.ids.tolist() == whole.ids[:size].tolist()
        torch.testing.assert_close(reply.logps, whole.logps[:size], **EXACT)
        assert reply.finished == bool(stops)
        lengths.add(size)
    assert len(lengths) > 4


def test_one_new_token_is_one_token(models, records, early_ends):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(records[0]), encoder.prompt(records[1])]
    short = sampler.sample(policy, prompts, 12, seeds=[1, 2], temperature=3.0, max_new_tokens=1)
    longer = sampler.sample(policy, prompts, 12, seeds=[1, 2], temperature=3.0, max_new_tokens=5)
    assert ids_of(short) == [[reply.ids[:1].tolist() for reply in replies] for replies in longer]
    ended = [reply.finished for reply in sum(short, [])]
    assert ended == [int(reply.ids[0]) in early_ends for reply in sum(short, [])]
    assert True in ended and False in ended


def test_top_k_1_is_greedy(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in records]
    greedy = ids_of(sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=8))
    assert ids_of(sampler.sample(policy, prompts, 1, seeds=[1, 2, 3, 4], top_k=1, max_new_tokens=8)) == greedy
    assert ids_of(sampler.sample(policy, prompts, 1, seeds=[1, 2, 3, 4], top_p=1e-9, max_new_tokens=8)) == greedy


def test_greedy_log_probs_are_those_of_temperature_1(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompt = encoder.prompt(records[3])
    ((reply,),) = sampler.sample(policy, [prompt], 1, seeds=[0], temperature=0, max_new_tokens=6)
    with torch.no_grad():
        torch.testing.assert_close(reply.logps, plain_log_probs(policy, encoder, prompt, reply.ids), **EXACT)


def test_several_greedy_replies_are_refused(models, records):
    policy, encoder = models["qwen2_5_vl"]
    with pytest.raises(ValueError, match="greedy"):
        sampler.sample(policy, [encoder.prompt(records[1])], 2, seeds=[0], temperature=0)


def test_image_and_video_pads_are_never_sampled_however_likely(scratch_model, records):
    policy, encoder = scratch_model
    image, video = encoder.forbidden
    embedding = policy.hf.get_input_embeddings().weight  # tied: also the rows of lm_head
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # wherever a hidden state points, one of the two is the likeliest token by far
        embedding[image], embedding[video] = 200 * direction, -200 * direction
    prompts = [encoder.prompt(record) for record in records]
    pads = {image, video}
    for temperature, n, filters in ((0, 1, {}), (1.0, 4, {}), (1.0, 4, {"top_k": 1}), (0.7, 4, {"top_p": 0.5})):
        asked = {"seeds": [1, 2, 3, 4], "temperature": temperature, "max_new_tokens": 8}
        sampled = sampler.sample(policy, prompts, n, **asked, **filters)
        assert not pads & {token for reply in sum(ids_of(sampled), []) for token in reply}
        assert all(torch.isfinite(reply.logps).all() for reply in sum(sampled, []))
    wanted = [int(generate(policy, encoder, prompt, 1, suppress_tokens=None)[0]) for prompt in prompts]
    assert set(wanted) <= pads, "without our ban they would be sampled"


def test_first_tokens_of_many_replies_follow_the_softmax(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompt, count, size = encoder.prompt(records[0]), 3000, vocabulary_of(policy)
    (replies,) = sampler.sample(policy, [prompt], count, seeds=[3], temperature=0.7, max_new_tokens=1)
    observed = np.bincount([int(reply.ids[0]) for reply in replies], minlength=size)
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [torch.tensor([token]) for token in range(size)])], 0.7)
    chance = logp[:, 0].double().exp().numpy()
    likely = np.flatnonzero(count * chance > 20)
    assert len(likely) > 5
    sigma = np.sqrt(count * chance * (1 - chance))
    deviation = (observed - count * chance)[likely] / sigma[likely]
    assert np.abs(deviation).max() < 4


@every_family
def test_sampling_with_flash_kernels_samples_the_same_replies(flash_kernels, models, records, early_ends, family):
    policy, encoder = models[family]
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3, 1)]
    asked = {"seeds": [21, 22, 23, 24, 25], "temperature": 3.0, "max_new_tokens": 14}
    expected = sampler.sample(policy, prompts, 3, **asked)
    policy.flash = True
    try:
        found = sampler.sample(policy, prompts, 3, **asked)
        groups = [(prompts[i], [reply.ids for reply in group]) for i, group in enumerate(found)]
        trainers, _ = model.log_probs(policy, groups, 3.0)
    finally:
        policy.flash = False
    assert ids_of(found) == ids_of(expected)
    assert len({len(reply.ids) for reply in sum(found, [])}) > 3
    for logp, reply in zip(trainers, sum(found, []), strict=True):
        torch.testing.assert_close(logp[: len(reply.ids)], reply.logps, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# sample_tokens: one token from a hand-made distribution


CHANCES = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.1, 0.15, 0.0])  # cumulated: 0, .25, .75, .75, .85, 1, 1


TOP = 1 - 2**-53  # the largest number a uniform generator can give


def token_at(uniform, temperature=1.0, top_k=0, top_p=1.0, chances=CHANCES, **options):
    number = torch.tensor([[uniform]], dtype=torch.float64)
    token, logp = sampler.sample_tokens(chances.log()[None], number, temperature, top_k, top_p, **options)
    assert float(logp) == pytest.approx(math.log(chances[token]), abs=1e-6), "the log-prob before the filters"
    return int(token)


@pytest.mark.parametrize(
    "uniform, token", [(0.0, 1), (0.2499, 1), (0.2501, 2), (0.7499, 2), (0.7501, 4), (0.8501, 5), (TOP, 5)]
)
def test_sampling_inverts_the_cumulated_distribution(uniform, token):
    for block in (1, 2, 3, 7, 512):
        assert token_at(uniform, block=block) == token


def test_greedy_sampling_takes_the_likeliest_token_whatever_the_uniform_number():
    assert [token_at(uniform, temperature=0) for uniform in (0.0, 0.1, TOP)] == [2, 2, 2]


def test_top_k_keeps_the_k_likeliest_and_rescales_them():
    # k = 2: 0.25 and 0.5 become 1/3 and 2/3
    assert [token_at(uniform, top_k=2) for uniform in (0.0, 0.333, 0.334, TOP)] == [1, 1, 2, 2]
    # k = 3: 0.25, 0.5, 0.15 of 0.9
    assert [token_at(uniform, top_k=3) for uniform in (0.277, 0.278, 0.833, 0.834, TOP)] == [1, 2, 2, 5, 5]
    # tokens of no chance do not fill up a large k
    assert {token_at(uniform, top_k=6) for uniform in np.linspace(0, TOP, 200)} == {1, 2, 4, 5}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    edges = np.linspace(0, TOP, 200)
    nuclei = {0.49: {2}, 0.51: {1, 2}, 0.74: {1, 2}, 0.76: {1, 2, 5}, 0.91: {1, 2, 4, 5}, 1.0: {1, 2, 4, 5}}
    for top_p, nucleus in nuclei.items():
        assert {token_at(uniform, top_p=top_p) for uniform in edges} == nucleus, top_p
    # p = 0.6: 0.25 and 0.5 become 1/3 and 2/3
    assert [token_at(uniform, top_p=0.6) for uniform in (0.333, 0.334)] == [1, 2]


def test_top_p_counts_after_top_k():
    # k = 3 makes it .278, .556, .167; then p = 0.6 needs the first two, where 0.55 needs one
    assert {token_at(uniform, top_k=3, top_p=0.6) for uniform in np.linspace(0, TOP, 50)} == {1, 2}
    assert {token_at(uniform, top_k=3, top_p=0.55) for uniform in np.linspace(0, TOP, 50)} == {2}


def test_frequencies_of_samples_match_the_softmax():
    uniform = torch.from_numpy(np.random.default_rng(4).random(40000))
    for block in (2, 512):
        token, _ = sampler.sample_tokens(CHANCES.log()[None], uniform[None], 1.0, 0, 1.0, block)
        observed, expected = np.bincount(token[0], minlength=7), 40000 * CHANCES.double().numpy()
        assert not observed[[0, 3, 6]].any()
        chi_square = sum((observed[k] - expected[k]) ** 2 / expected[k] for k in (1, 2, 4, 5))
        assert chi_square < 16.3, "3 degrees of freedom: 1 in 1000"


def test_no_uniform_number_samples_a_token_of_no_chance():
    generator = torch.Generator().manual_seed(6)
    logits = 8 * torch.randn(400, 50, generator=generator)
    logits[torch.rand(400, 50, generator=generator) < 0.3] = -math.inf
    logits[:100, -5:], logits[50:150, :5] = -math.inf, -math.inf
    for uniform in (0.0, 2.0**-53, 0.5, TOP):
        for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.7), (7, 0.4), (0, 1e-9), (50, 0.999999)):
            number = torch.full((400, 1), uniform, dtype=torch.float64)
            token, logp = sampler.sample_tokens(logits, number, 1.0, top_k, top_p, block=8)
            assert torch.isfinite(logp).all(), (uniform, top_k, top_p)
            rank = (logits > logits.gather(-1, token)).sum(-1)
            assert top_k == 0 or (rank < top_k).all()
