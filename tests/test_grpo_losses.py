"""The other choices of grpo.py's losses against numbers worked out by hand, and as runs of a tiny model.

The numbers were worked out with pen and paper, as in tests/test_losses.py, which has the plain GRPO loss. That loss and
gradient are TRL's too is in tests/test_losses_trl.py.
"""

import math

import pytest
import torch
from commands import Material, call, distance, rows, timeless, torchrun, weights, write
from test_losses import (
    EVERYTHING,
    LN3,
    NAN,
    OLD,
    REWARDS,
    SAMPLED,
    TIMES,
    close,
    f64,
    loss_and_gradient,
    sampler_of,
    token_metrics,
)

import grpo
import model
import rollouts
import sampler
import training
from records import epoch_order, read_records


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


# ---------------------------------------------------------------------------------------------------------------------
# Leave-one-out: a reply is compared with the others only


def test_leave_one_out_compares_a_reply_with_the_mean_of_the_others():
    # 1.5 − 0.5, 0.5 − 2.5 / 3; 0 − 4, 4 − 8 / 3
    advantages = grpo.group_advantages(f64(REWARDS), "none", baseline="loo")
    close(advantages, [[1.0, -1 / 3, -1 / 3, -1 / 3], [-4.0, 4 / 3, 4 / 3, 4 / 3]])


def test_leave_one_out_is_scaled_as_the_mean_is():
    # the stds of the groups are 0.5 and 2; with eps 0.5 the divisors are 1 and 2.5
    advantages = grpo.group_advantages(f64(REWARDS), "group", eps=0.5, baseline="loo")
    close(advantages, [[1.0, -1 / 3, -1 / 3, -1 / 3], [-1.6, 8 / 15, 8 / 15, 8 / 15]])


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_leave_one_out_gives_equal_rewards_and_groups_of_one_exactly_nothing(scale):
    equal = torch.tensor([[value] * 3 for value in (0.1, 1 / 3, 7 / 6)])
    assert grpo.group_advantages(equal, scale, baseline="loo").tolist() == [[0.0] * 3] * 3
    assert grpo.group_advantages(torch.tensor([[1.5], [0.25]]), scale, baseline="loo").tolist() == [[0.0], [0.0]]


def test_another_baseline_is_refused():
    with pytest.raises(ValueError, match="median"):
        grpo.group_advantages(f64(REWARDS), baseline="median")


# ---------------------------------------------------------------------------------------------------------------------
# Weights of groups: how much a group can teach


def test_a_group_counts_most_when_half_of_it_is_right_and_nothing_when_all_or_none_is():
    accuracy = f64([[1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0.75, 0.25, 0.5, 0.75]])
    # 4 * 1/2 * 1/2, 4 * 1/4 * 3/4, 0, 0, 4 * 9/16 * 7/16
    close(grpo.group_weights(accuracy), [1.0, 0.75, 0.0, 0.0, 0.984375])
    # times the roots of the dispersions: 1/2, 1, 1, 0, 4/5
    dispersion = f64([0.25, 1.0, 1.0, 0.0, 0.64])
    close(grpo.group_weights(accuracy, dispersion), [0.5, 0.75, 0.0, 0.0, 0.7875])


@pytest.mark.parametrize(
    ("answers", "options", "dispersion"),
    [
        ("AABB", 2, 1.0),
        ("AAAA", 2, 0.0),
        # -(3/4 ln 3/4 + 1/4 ln 1/4) / ln 2, and / ln 4
        ("ABBB", 2, 0.8112781245),
        ("ABBB", 4, 0.4056390622),
        # of the paper's example: one right answer, the others alike or spread over 6 options
        ("ABBBBBBB", 6, 0.2102794308),
        ("ABBCCDEF", 6, 0.9671320181),
        # an unreadable reply is one more answer, and nothing is above 1
        (["A", None, None, None], 2, 0.8112781245),
        (["A", "B", None, None], 2, 1.0),
        # open answers: (distinct - 1) / (G - 1)
        ([[1, 2], [2, 1], [1, 2], [1, 2]], 0, 1 / 3),
        ([[1, 2], [2, 1], None, [1]], 0, 1.0),
        (["4", "4", "5"], 0, 0.5),
        (["4"], 0, 0.0),
        ("AAB", 1, 0.5),  # a single option has no entropy to divide by
    ],
)
def test_the_dispersion_of_answers_is_their_entropy_or_how_many_differ(answers, options, dispersion):
    assert grpo.answer_dispersion(list(answers), options) == pytest.approx(dispersion, abs=1e-9)


def group_of(rewards, accuracies, answers, options):
    scores = [
        {"reward": reward, "accuracy": accuracy, "answer": answer}
        for reward, accuracy, answer in zip(rewards, accuracies, answers, strict=True)
    ]
    return rollouts.Rollout({"options": options} if options else {}, (), [], [], scores)


def test_the_signal_of_a_group_is_its_weight_where_rewards_differ_within_the_bounds():
    batch = [
        group_of([1.5, 0.5], [1, 0], "AB", ["x", "y"]),
        group_of([1.5, 1.5], [1, 1], "AA", ["x", "y"]),
        group_of([0.5, 0.0], [0, 0], ["B", None], ["x", "y"]),  # they differ in their format only
        group_of([0.9, 0.1], [0.9, 0.1], [[1, 2], [2, 1]], None),
    ]
    close(grpo.signal_of(batch, 0.0, 1.0, "none"), [1.0, 0.0, 1.0, 1.0])
    close(grpo.signal_of(batch, 0.5, 1.0, "none"), [1.0, 0.0, 0.0, 1.0])
    close(grpo.signal_of(batch, 0.0, 1.0, "difficulty"), [1.0, 0.0, 0.0, 1.0])
    collapsed = group_of([0.9, 0.8, 0.1, 0.1], [0.9, 0.8, 0.1, 0.1], "AABB", list("xyzw"))
    # d = 0.475; the entropy is ln 2 of ln 4
    close(grpo.signal_of([collapsed], 0.0, 1.0, "dispersion"), [4 * 0.475 * 0.525 * math.sqrt(0.5)])
    # a rank that has no slot to fill weighs no groups
    assert grpo.weights_of([], "dispersion").tolist() == []


def test_advantages_are_multiplied_by_the_weight_of_their_group(material, tmp_path, monkeypatch):
    scored, advantages, score_replies, loss = [], [], grpo.score_replies, grpo.grpo_loss

    def watched_score(encoder, records, *args):
        texts, scores = score_replies(encoder, records, *args)
        scored.extend(zip(records, scores, strict=True))
        return texts, scores

    def watched_loss(logp, old, ref, advantage, *args, **options):
        advantages.extend(advantage.view(-1, 6).tolist())
        return loss(logp, old, ref, advantage, *args, **options)

    monkeypatch.setattr(grpo, "score_replies", watched_score)
    monkeypatch.setattr(grpo, "grpo_loss", watched_loss)
    # the KL keeps every group in the loss
    call("grpo", **material.grpo(out=tmp_path, steps=1, group=6, kl=0.1, group_weights="dispersion"))
    accuracy = f64([[score["accuracy"] for score in scores] for _, scores in scored])
    spread = [
        grpo.answer_dispersion([score["answer"] for score in scores], len(record.get("options", [])))
        for record, scores in scored
    ]
    weights = grpo.group_weights(accuracy, f64(spread))
    rewards = torch.tensor([[score["reward"] for score in scores] for _, scores in scored])
    expected = grpo.group_advantages(rewards) * weights[:, None].float()
    # micro-batches have the groups in another order
    torch.testing.assert_close(torch.tensor(sorted(advantages)), torch.tensor(sorted(expected.tolist())))
    assert ((0 < weights) & (weights < 1)).any()
    assert rows(tmp_path)[0]["group_weight"] == pytest.approx(weights.mean().item())


# ---------------------------------------------------------------------------------------------------------------------
# Surrogates


def test_cispo_weighs_the_log_prob_by_the_ratio_up_to_its_bound():
    logp = f64([[-1.0, -2.0], [-0.5, -3.0]]).requires_grad_()
    r = f64([[1.5, 0.5], [2.0, 1.25]])
    gain, bounded = grpo.cispo_surrogate(logp, r, f64([2.0, -1.0]), 0.25)
    # 1.25 * 2 * -1, 0.5 * 2 * -2; 1.25 * -1 * -0.5, 1.25 * -1 * -3 (at the bound nothing is taken off)
    close(gain, [[-2.5, -2.0], [0.625, 3.75]])
    assert bounded.tolist() == [[True, False], [True, False]]
    gain.sum().backward()
    # the gradient is the weight itself: none is 0, also of the token that the clip of PPO would have dropped
    close(logp.grad, [[2.5, 1.0], [-1.25, -1.25]])


def test_cispo_lets_no_gradient_through_its_weight():
    # loss_and_gradient moves logp and with it r: with a gradient through r there would be a second summand
    loss, gradient = loss_and_gradient([[0.5]], [2.0], [0.1], surrogate="cispo")
    close(loss, -0.1 * 0.5 * 2 * (-1.7 + math.log(0.5)), 1e-9)
    close(gradient, [[-0.1 * 0.5 * 2]])


def test_cispo_counts_no_token_of_advantage_zero_as_bounded():
    assert not grpo.cispo_surrogate(f64([[-1.0]]), f64([[9.0]]), f64([0.0]), 0.2)[1].any()


def test_sapo_is_a_gate_of_slope_1_at_ratio_1_that_closes_on_both_sides():
    r = f64([[1.0, 1.0 + LN3], [1.0, 1.0 + LN3 / 1.05]]).requires_grad_()
    gain, clipped = grpo.sapo_surrogate(r, f64([2.0, -4.0]))
    # A > 0, tau 1: sigmoid(0) * 4 = 2, sigmoid(ln 3) * 4 = 3.  A < 0, tau 1.05: 2 / 1.05 and 3 / 1.05
    close(gain, [[4.0, 6.0], [-8 / 1.05, -12 / 1.05]])
    assert not clipped.any()
    gain.sum().backward()
    # slope 4 s (1 - s): 1 at s = 1/2, 3/4 at s = 3/4, whatever tau
    close(r.grad, [[2.0, 1.5], [-4.0, -3.0]])


def test_sapo_closes_earlier_for_bad_replies_than_for_good_ones():
    r = f64([[3.0], [3.0]]).requires_grad_()
    grpo.sapo_surrogate(r, f64([1.0, -1.0]))[0].sum().backward()
    assert 0 < -r.grad[1].item() < r.grad[0].item() < 0.5


@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
def test_a_surrogate_takes_the_place_of_the_clip_and_leaves_weights_mask_and_kl_as_they_are(surrogate):
    options = EVERYTHING | {"surrogate": surrogate}
    loss, gradient = loss_and_gradient(**options)
    without_kl, gradient_without = loss_and_gradient(**options | {"kl": 0.0})
    # the KL of the hand-worked case: 0.5 * (0.25 * 0.3068528194 + 0.1 * 1.0945348919)
    close(loss - without_kl, 0.0930833471, 1e-9)
    # and its gradients: weight * 0.5 * slope of k3
    close(gradient - gradient_without, [[-0.125, 0.0, 0.0], [0.025, -0.1, 0.0]], 1e-9)
    assert gradient[0, 2] == 0 and gradient_without[0, 2] == 0
    twice, twice_gradient = loss_and_gradient(**options | {"weight": [0.5, 0.2]})
    close(twice, 2 * loss.item(), 1e-9)
    close(twice_gradient, (2 * gradient).tolist(), 1e-9)


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
def test_all_surrogates_have_the_same_gradient_at_the_first_update(surrogate):
    _, gradient = loss_and_gradient([[1.0, 1.0], [1.0, 1.0]], [2.0, -1.0], [0.25, 0.1], surrogate=surrogate)
    close(gradient, [[-0.5, -0.5], [0.1, 0.1]])


@pytest.mark.parametrize("surrogate", ["cispo", "sapo"])
@pytest.mark.parametrize("junk", [NAN, math.inf, -math.inf, 1e30])
def test_junk_in_the_padding_reaches_no_surrogate(surrogate, junk):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    old, advantage, weight = torch.full((2, 3), -1.7), torch.tensor([2.0, -1.0]), torch.tensor([0.25, 0.1])
    results = []
    for padding in (junk, -1.0):
        logp = torch.tensor([[-1.0, -2.0, padding], [-1.5, padding, padding]]).requires_grad_()
        loss = grpo.grpo_loss(logp, old, None, advantage, mask, weight, surrogate=surrogate)
        loss.backward()
        results.append((loss.item(), logp.grad))
    assert math.isfinite(results[0][0]) and results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1]) and (results[0][1][~mask] == 0).all()


def test_another_surrogate_is_refused():
    with pytest.raises(ValueError, match="reinforce"):
        loss_and_gradient([[1.0]], [1.0], [1.0], surrogate="reinforce")


def test_clip_fraction_is_of_the_surrogate_in_use():
    # METRICS: 1.5 (A 2) and 2.0, 0.5 (A -1) of the bounds 0.8 and 1.4
    assert token_metrics()["clip_fraction"] == 2
    assert token_metrics(surrogate="sapo")["clip_fraction"] == 0
    # CISPO bounds ratios above 1.4, of either sign: 1.5 and 2.0, not 0.5, and nothing of advantage 0
    assert token_metrics(surrogate="cispo", ratios=[[1.5, 0.5, 9.0], [0.5, 2.0, 1.0], [3.0, 0.1, 1.0]])[
        "clip_fraction"] == 2  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Bounds of the importance weights. TIMES: 1.5, 0.5, 4; 0.25, 2. As products: 3 and 0.5


def bounded_weights(kind, **bounds):
    weights = grpo.importance_weights(f64(OLD), sampler_of(OLD, TIMES), torch.tensor(SAMPLED), kind, **bounds)
    return [weights[0].tolist(), weights[1, :2].tolist()]


@pytest.mark.parametrize(
    ("kind", "bounds", "expected"),
    [
        ("token", {"cap": 2.5, "floor": 0.4}, [[1.5, 0.5, 2.5], [0.4, 2.0]]),
        ("token", {"cap": 2.5, "floor": 0.4, "outside": "mask"}, [[1.5, 0.5, 0.0], [0.0, 2.0]]),
        ("token", {"cap": 2.5, "outside": "mask"}, [[1.5, 0.5, 0.0], [0.25, 2.0]]),
        ("sequence", {"cap": 2.5, "floor": 0.75}, [[2.5, 2.5, 2.5], [0.75, 0.75]]),
        ("sequence", {"cap": 2.5, "outside": "mask"}, [[0.0, 0.0, 0.0], [0.5, 0.5]]),
        ("sequence", {"cap": 5.0, "floor": 0.75, "outside": "mask"}, [[3.0, 3.0, 3.0], [0.0, 0.0]]),
        ("none", {"cap": 1.0, "floor": 1.0, "outside": "mask"}, [[1.0, 1.0, 1.0], [1.0, 1.0]]),
    ],
)
def test_a_weight_outside_its_bounds_becomes_the_bound_or_nothing(kind, bounds, expected):
    actual = bounded_weights(kind, **bounds)
    for row, wanted in zip(actual, expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-9)


def test_a_weight_at_its_bound_is_inside():
    old = f64([[0.0, 0.0]])
    weights = grpo.importance_weights(old, old, torch.ones(1, 2, dtype=torch.bool), "token", 1.0, 1.0, "mask")
    assert weights.tolist() == [[1.0, 1.0]]


def test_a_masked_token_has_no_gradient_and_is_still_held_to_the_reference():
    correction = f64([[0.0, 1.0]])
    _, gradient = loss_and_gradient(
        [[1.1, 0.9]], [2.0], [0.5], ref_gap=[[LN3, 0.0]], kl=0.1, correction=correction
    )  # fmt: skip
    # token 1: only the KL, 0.5 * 0.1 * -2; token 2: -0.5 * 0.9 * 2
    close(gradient, [[-0.1, -0.9]], 1e-9)


def test_weights_at_either_bound_and_masked_ones_are_counted():
    masked = [[2.0, 0.0, 2.0], [0.5, 2.0, 1.9], [1.0, 1.0, 1.0]]
    assert token_metrics()["importance_capped"] == 2
    assert token_metrics(floor=0.5)["importance_capped"] == 3
    assert token_metrics(floor=0.5, correction=masked)["importance_capped"] == 4
    assert token_metrics(correction=masked)["importance_capped"] == 3  # with a cap alone


def test_another_way_with_weights_outside_is_refused():
    with pytest.raises(ValueError, match="drop"):
        bounded_weights("token", outside="drop")


# ---------------------------------------------------------------------------------------------------------------------
# Entropy bonus


def test_the_entropy_of_a_state_and_its_gradient_are_exact():
    noise = torch.Generator().manual_seed(9)
    hidden = torch.randn(5, 4, generator=noise, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(11, 4, generator=noise).requires_grad_()
    scale, forbidden = torch.randn(5, generator=noise), torch.tensor([2, 7])
    allowed = [token for token in range(11) if token not in (2, 7)]
    for temperature in (1.0, 0.6):
        logp = (hidden @ weight[allowed].T / temperature).log_softmax(-1)
        expected = -(logp.exp() * logp).sum(-1)
        wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
        for chunk_rows in (1, 2, 100):
            found = model.StateEntropies.apply(hidden, weight, temperature, forbidden, chunk_rows)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
            gradients = torch.autograd.grad((found * scale).sum(), (hidden, weight))
            for one, other in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_each_token_has_the_entropy_of_the_distribution_it_comes_from(material):
    policy, encoder = model.load(material.speaker, training.World(0, 1, torch.device("cpu")))
    prompt = encoder.prompt(read_records(material.data)[4])
    replies = [encoder.encode_reply(text) for text in ("A or B", "B")]
    with torch.no_grad():
        logp, mask, entropy = model.log_probs_and_entropies(policy, [(prompt, replies)], 0.7)
        plain, plain_mask = model.log_probs(policy, [(prompt, replies)], 0.7)
        vocabulary = [torch.tensor([token]) for token in range(len(policy.hf.lm_head.weight))]
        first, _ = model.log_probs(policy, [(prompt, vocabulary)], 0.7)
    assert torch.equal(logp, plain) and torch.equal(mask, plain_mask)
    distribution = first[:, 0][first[:, 0].isfinite()]
    expected = -(distribution.exp() * distribution).sum()
    torch.testing.assert_close(entropy[:, 0], expected.expand(2))  # both begin at the prompt's end
    assert (entropy[mask] > 0).all() and (entropy[~mask] == 0).all() and entropy[0, 1] != entropy[1, 1]


def test_the_bonus_is_weighed_like_the_surrogate_and_padding_has_none():
    mask = torch.tensor([[True, True], [True, False]])
    logp, old = torch.full((2, 2), -1.0), torch.full((2, 2), -1.0)
    entropy = f64([[2.0, 1.0], [3.0, NAN]]).requires_grad_()
    settings = logp, old, None, f64([0.0, 0.0]), mask, f64([0.25, 0.1])
    loss = grpo.grpo_loss(*settings, entropy=entropy, entropy_bonus=0.5)
    close(loss, -0.5 * (0.25 * 3.0 + 0.1 * 3.0))
    loss.backward()
    close(entropy.grad, [[-0.125, -0.125], [-0.05, 0.0]])


def test_an_entropy_bonus_keeps_the_policy_undecided(material, tmp_path):
    useless = write(tmp_path / "useless.jsonl", [material.question("u", "JSON, please.", reply_format="json")])
    settings = material.grpo(data=useless, steps=4, entropy_bonus=1.0, normalizer="token")
    call("grpo", **settings | {"out": tmp_path / "run"})
    log = rows(tmp_path / "run")
    # no reward differs: what is learned is the bonus alone, and the loss is minus the mean entropy
    assert log[-1]["entropy"] > log[0]["entropy"] + 0.1 and log[-1]["loss"] < log[0]["loss"] < 0
    assert log[0]["loss"] == pytest.approx(-log[0]["entropy"], rel=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# What replies and groups are left out, and what long ones cost


@pytest.mark.parametrize(
    ("length", "penalty"), [(1, 0.0), (80, 0.0), (85, -0.25), (90, -0.5), (99, -0.95), (100, -1.0)]
)  # fmt: skip
def test_a_reply_loses_up_to_1_over_the_last_tokens_before_the_limit(length, penalty):
    assert grpo.overlong_penalty(length, longest=100, buffer=20) == pytest.approx(penalty)


def test_the_whole_length_may_be_the_buffer():
    assert grpo.overlong_penalty(3, longest=4, buffer=4) == -0.75


def test_the_accuracy_filter_keeps_groups_between_its_bounds_and_at_them():
    accuracy = f64([[1.0, 1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0], [1.0] * 5, [0.0] * 5, [0.25, 0.5, 0, 0, 0.2]])
    # means 0.8, 0.2, 1, 0, 0.19
    assert grpo.accuracy_filter(accuracy, 0.2, 0.8).tolist() == [True, True, False, False, False]
    assert grpo.accuracy_filter(accuracy, 0.0, 1.0).all()
    assert grpo.accuracy_filter(accuracy, 0.2, 1.0).tolist() == [True, True, True, False, False]


def test_the_overlong_penalty_is_part_of_the_reward(material, tmp_path):
    call("grpo", **material.grpo(out=tmp_path, overlong_buffer=6, group=6))
    log = rows(tmp_path)
    assert min(row["overlong"] for row in log) < 0
    for row in log:
        assert -1 <= row["overlong"] <= 0
        assert row["reward"] == pytest.approx(row["accuracy"] + 0.5 * row["format"] + row["overlong"])


def test_groups_outside_the_accuracy_interval_teach_nothing(material, tmp_path, monkeypatch):
    seen, score_replies = [], grpo.score_replies

    def watched(*args):
        texts, scores = score_replies(*args)
        seen.append([sum(score["accuracy"] for score in group) / 6 for group in scores])
        return texts, scores

    monkeypatch.setattr(grpo, "score_replies", watched)
    settings = material.grpo(group=6, prompts=8, steps=2, format_weight=0, accuracy_high=0.2)
    call("grpo", **settings | {"out": tmp_path / "filtered"})
    shares = [sum(0 < mean <= 0.2 for mean in step) / 8 for step in seen]
    assert [row["useful_groups"] for row in rows(tmp_path / "filtered")] == shares
    assert any(0.2 < mean < 1 for mean in seen[0])  # some had a signal and were left out
    call("grpo", **settings | {"out": tmp_path / "none", "accuracy_low": 0.9, "accuracy_high": 0.95, "steps": 1})
    assert rows(tmp_path / "none")[0]["grad_norm"] == 0


def test_truncated_replies_carry_neither_loss_nor_kl_nor_weight_in_the_token_mean(material, tmp_path, monkeypatch):
    replies, losses, sample, loss = [], [], sampler.sample, grpo.grpo_loss

    def watched_sample(*args, **options):
        replies.extend(sample(*args, **options)[0])
        return [replies]

    def watched_loss(logp, old, ref, advantage, mask, weight, **options):
        losses.append((advantage, weight))
        return loss(logp, old, ref, advantage, mask, weight, **options)

    monkeypatch.setattr(sampler, "sample", watched_sample)
    monkeypatch.setattr(grpo, "grpo_loss", watched_loss)
    settings = {"prompts": 1, "group": 8, "steps": 1, "max_new_tokens": 2, "kl": 0.1, "normalizer": "token"}
    call("grpo", **material.grpo(out=tmp_path, mask_truncated=True, **settings))
    finished = torch.tensor([reply.finished for reply in replies])
    assert 0 < finished.sum() < 8
    advantage, weight = losses[0]
    tokens = sum(len(reply.ids) for reply in replies if reply.finished)
    close(weight, (finished / tokens).tolist(), 1e-7)
    assert (advantage[~finished] == 0).all() and (advantage[finished] != 0).any()


def test_a_step_of_truncated_replies_only_changes_nothing(material, tmp_path):
    # one token, and it would have to be the end
    data = write(tmp_path / "data.jsonl", [material.question("t", "Give one letter, please.")])
    settings = {"data": data, "prompts": 1, "group": 2, "steps": 1, "max_new_tokens": 1, "kl": 0.1, "top_k": 1}
    for normalizer in ("sequence", "token", "constant"):
        out = tmp_path / normalizer
        call("grpo", **material.grpo(out=out, mask_truncated=True, normalizer=normalizer, **settings))
        assert rows(out)[0]["finished"] == 0 and rows(out)[0]["loss"] == 0


@pytest.mark.parametrize(
    "bad",
    [["--overlong-buffer", "9", "--max-new-tokens", "8"], ["--accuracy-low", "0.6", "--accuracy-high", "0.5"],
            ["--max-refill", "1", "--one-step-off-policy", "--sampler", "vllm"],
            ["--prompt-weights", "difficulty", "--one-step-off-policy", "--sampler", "vllm"],
            ["--replay-filter", "--top-k=5", "--one-step-off-policy", "--sampler", "vllm"]],
)  # fmt: skip
def test_bounds_that_contradict_each_other_are_refused(capsys, bad):
    with pytest.raises(SystemExit) as stop:
        grpo.parse_args(["--model", "m", "--data", "d", "--out", "o", *bad])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and bad[0] in err and bad[2] in err


# ---------------------------------------------------------------------------------------------------------------------
# Dynamic sampling: prompts whose replies teach nothing make room for others


def half_useless(material, folder):
    """Eight questions, every other one of a format that the model never speaks: all its replies earn 0."""
    records = []
    for number in range(8):
        changes = {"reply_format": "json"} if number % 2 else {}
        records.append(material.question(f"q{number}", f"Give one letter, {'again ' * number}please.", **changes))
    return write(folder / "half.jsonl", records)


class Asked:
    """Looks on while a run samples: the ids and seeds it asked for, call by call."""

    def __init__(self, monkeypatch):
        self.ids, self.seeds, score_replies, sample = [], [], grpo.score_replies, sampler.sample

        def watched_score(encoder, records, *args):
            self.ids.append([record["id"] for record in records])
            return score_replies(encoder, records, *args)

        def watched_sample(*args, seeds, **options):
            self.seeds += seeds
            return sample(*args, seeds=seeds, **options)

        monkeypatch.setattr(grpo, "score_replies", watched_score)
        monkeypatch.setattr(sampler, "sample", watched_sample)


def test_prompts_that_teach_nothing_make_room_for_the_next_ones_of_the_stream(material, tmp_path, monkeypatch):
    data, asked = half_useless(material, tmp_path), Asked(monkeypatch)
    settings = material.grpo(data=data, steps=3, group=6, lr=1e-5)
    call("grpo", **settings | {"out": tmp_path / "refilled", "max_refill": 8})
    log = rows(tmp_path / "refilled")
    assert [row["useful_groups"] for row in log] == [1.0] * 3
    assert all(4 < row["prompts_sampled"] <= 36 for row in log)
    # every prompt of the stream is asked once, in its order, also across steps
    ids = sum(asked.ids, [])
    assert len(ids) == sum(row["prompts_sampled"] for row in log)
    records = read_records(data)
    assert ids == [records[index]["id"] for index in epoch_order(0, 8, 0, len(ids))]
    assert len(set(asked.seeds)) == len(asked.seeds) == len(ids)

    call("grpo", **settings | {"out": tmp_path / "plain"})
    assert min(row["useful_groups"] for row in rows(tmp_path / "plain")) < 1
    assert "prompts_sampled" not in rows(tmp_path / "plain")[0]


def test_refilling_ends_when_it_was_tried_often_enough(material, tmp_path, monkeypatch):
    useless = write(tmp_path / "useless.jsonl", [material.question("u", "JSON, please.", reply_format="json")])
    asked = Asked(monkeypatch)
    call("grpo", **material.grpo(out=tmp_path / "run", data=useless, steps=2, max_refill=2))
    assert [len(ids) for ids in asked.ids] == [4] * 6
    assert [(row["prompts_sampled"], row["grad_norm"]) for row in rows(tmp_path / "run")] == [(12, 0), (12, 0)]


def test_a_resumed_run_goes_on_in_the_stream_where_refilling_and_weights_had_left_it(material, tmp_path):
    settings = material.grpo(data=half_useless(material, tmp_path), max_refill=3, group=6, prompt_weights="dispersion")
    call("grpo", **settings | {"out": tmp_path / "whole", "steps": 4})
    call("grpo", **settings | {"out": tmp_path / "halves", "steps": 2})
    call("grpo", **settings | {"out": tmp_path / "halves", "steps": 4, "resume": True})
    assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")
    assert distance(weights(tmp_path / "halves"), weights(tmp_path / "whole")) == 0
    log = rows(tmp_path / "whole")
    assert sum(row["prompts_sampled"] for row in log[:2]) > 8
    assert sum(row["prompts_passed_over"] for row in log[2:]) > 0  # by weights that stood in the checkpoint


def test_groups_outside_the_accuracy_interval_make_room_too(material, tmp_path, monkeypatch):
    asked = Asked(monkeypatch)
    call("grpo", **material.grpo(out=tmp_path, accuracy_low=0.9, accuracy_high=0.95, steps=1, max_refill=1))
    assert [len(ids) for ids in asked.ids] == [4, 4]  # no mean of four accuracies lies there


def test_the_pictures_of_the_next_round_are_decoded_while_replies_are_sampled(material, tmp_path, monkeypatch):
    asked, fetched, ahead, prefetch = Asked(monkeypatch), [], [], model.Encoder.prefetch
    sample = sampler.sample

    def watched_prefetch(encoder, records):
        fetched.append([record["id"] for record in records])
        return prefetch(encoder, records)

    def watched_sample(*args, **options):
        ahead.append(fetched[-1])  # what is under way by now
        return sample(*args, **options)

    monkeypatch.setattr(model.Encoder, "prefetch", watched_prefetch)
    monkeypatch.setattr(sampler, "sample", watched_sample)
    settings = material.grpo(data=half_useless(material, tmp_path), steps=3, group=6, lr=1e-5, max_refill=8)
    call("grpo", **settings | {"out": tmp_path / "run"})
    assert len(asked.ids) == len(ahead) > 4
    for early, late in zip(ahead, asked.ids[1:], strict=False):
        assert early[: len(late)] == late  # a further round of the step, or the first of the next


def test_two_processes_refill_and_evaluate_as_one_does(material, tmp_path):
    refill = material.grpo(
        data=half_useless(material, tmp_path), max_refill=3, group=6, lr=1e-5, mask_truncated=True, normalizer="token",
        max_new_tokens=4, prompt_weights="difficulty", group_weights="dispersion", top_k=20, replay_filter=True,
    )  # fmt: skip
    held_out = material.dpo(
        eval_data=material.pair_data, eval_every=2, lr=1e-5, quality_weight=0.5, reward_shift="mean", sft_mean="replies"
    )
    jobs = [("grpo", refill), ("dpo", held_out)]
    for stage, settings in jobs:
        call(stage, **settings | {"out": tmp_path / f"{stage}-1"})
    torchrun([(stage, settings | {"out": tmp_path / f"{stage}-2"}) for stage, settings in jobs], tmp_path)
    for stage, _ in jobs:
        one, two = timeless(tmp_path / f"{stage}-1"), timeless(tmp_path / f"{stage}-2")
        assert len(one) == len(two) == 3
        for row, other in zip(one, two, strict=True):
            assert row.keys() == other.keys()
            # with policy and reference alike, every pair is a tie
            ties = {"preference_accuracy"} if row.get("margin") == pytest.approx(0, abs=1e-6) else set()
            for key in row.keys() - {"sampler_gap"} - ties:
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=1e-5), (stage, key)
        assert distance(weights(tmp_path / f"{stage}-1"), weights(tmp_path / f"{stage}-2")) < 1e-5
    assert max(row["prompts_sampled"] for row in rows(tmp_path / "grpo-2")) > 4
    assert "eval_margin" in rows(tmp_path / "dpo-2")[-1]


# ---------------------------------------------------------------------------------------------------------------------
# Prompts that have taught little are asked less often


def test_prompts_that_teach_nothing_are_passed_over_in_most_epochs(material, tmp_path, monkeypatch):
    data, asked = half_useless(material, tmp_path), Asked(monkeypatch)
    settings = material.grpo(data=data, steps=10, group=6, lr=1e-6, max_new_tokens=4)
    call("grpo", **settings | {"out": tmp_path / "weighed", "prompt_weights": "difficulty"})
    log, ids = rows(tmp_path / "weighed"), sum(asked.ids, [])
    useless = [name in ("q1", "q3", "q5", "q7") for name in ids]
    # each of the four once in the first epoch, then in a tenth of the epochs
    assert sum(useless[:8]) == 4 and sum(useless[8:]) < 6 and len(ids) == 40
    assert sum(row["useful_groups"] for row in log[2:]) / 8 > 1.3 * sum(row["useful_groups"] for row in log[:2]) / 2
    assert log[0]["prompts_passed_over"] == 0 and sum(row["prompts_passed_over"] for row in log[2:]) > 20


# ---------------------------------------------------------------------------------------------------------------------
# The sampler's filters in the trainer's log-probs


def test_with_replayed_filters_ratio_and_importance_weights_are_1_at_the_first_update(material, tmp_path, monkeypatch):
    seen, loss = [], grpo.grpo_loss

    def watched(logp, old, ref, advantage, mask, weight, *, correction, **options):
        seen.append(((logp.detach() - old)[mask], correction[mask], (ref - logp.detach())[mask]))
        return loss(logp, old, ref, advantage, mask, weight, correction=correction, **options)

    monkeypatch.setattr(grpo, "grpo_loss", watched)
    settings = {"steps": 2, "updates": 2, "top_k": 6, "top_p": 0.9, "kl": 0.1, "temperature": 0.8}
    call("grpo", **material.grpo(out=tmp_path / "replayed", replay_filter=True, **settings))
    first, second = seen[:2]
    assert (first[0] == 0).all() and (first[1] - 1).abs().max() < 1e-4
    assert (first[2] == 0).all()  # the reference, which is the policy still, chooses among the same tokens
    assert second[0].abs().max() > 1e-3 and torch.equal(second[1], first[1])
    log = rows(tmp_path / "replayed")
    assert all(row["sampler_gap"] < 1e-4 and row["importance_capped"] == 0 for row in log)

    call("grpo", **material.grpo(out=tmp_path / "plain", **settings))
    plain = rows(tmp_path / "plain")
    assert plain[0]["reward"] == log[0]["reward"]  # the same replies; both log-probs are before the filters
    assert plain[0]["sampler_gap"] < 1e-4 and plain[0]["entropy"] > log[0]["entropy"]
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "replayed")) > 1e-4


def test_without_a_filter_there_is_nothing_to_replay(capsys):
    with pytest.raises(SystemExit):
        grpo.parse_args(["--model", "m", "--data", "d", "--out", "o", "--replay-filter"])
    assert "--replay-filter needs --top-k or --top-p" in capsys.readouterr().err
    for taken in (["--top-k", "5"], ["--top-p", "0.9"]):
        assert grpo.parse_args(["--model", "m", "--data", "d", "--out", "o", "--replay-filter", *taken]).replay_filter


# ---------------------------------------------------------------------------------------------------------------------
# Runs

SETTINGS = {
    "CISPO": {"surrogate": "cispo", "updates": 2},
    "SAPO": {"surrogate": "sapo", "updates": 2},
    "RLOO": {"advantage_baseline": "loo", "advantage_scale": "none"},
    "IcePop": {"importance_floor": 0.5, "importance_cap": 5, "importance_outside": "mask"},
    "sequence mask": {"importance": "sequence", "importance_cap": 3, "importance_outside": "mask"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_grpo_trains_with(material, tmp_path, name):
    call("grpo", **material.grpo(out=tmp_path, **SETTINGS[name]))
    log = rows(tmp_path)
    assert len(log) == 3 and all(math.isfinite(row["loss"]) for row in log) and log[0]["grad_norm"] > 0
    assert all(row["importance_capped"] == 0 for row in log)  # the builtin sampler is the policy
    assert name != "SAPO" or {row["clip_fraction"] for row in log} == {0}


def test_each_flag_changes_what_is_learned(material, tmp_path):
    changes = {
        "plain": {},
        "surrogate": {"surrogate": "cispo"},
        "baseline": {"advantage_baseline": "loo"},
        "truncate": {"importance_cap": 1.0, "importance_floor": 1.0},
        "mask": {"importance_cap": 1.0, "importance_floor": 1.0, "importance_outside": "mask"},
    }
    logs = {}
    for name, settings in changes.items():
        call("grpo", **material.grpo(out=tmp_path / name, updates=2, steps=2, lr=3e-3, **settings))
        logs[name] = timeless(tmp_path / name)
    assert all(logs[name] != logs["plain"] for name in changes if name != "plain")
    assert logs["mask"] != logs["truncate"]
    # bounds of 1 and 1 drop every token whose ratio is not 1 to the last bit
    assert logs["mask"][0]["importance_capped"] > 0.5
