"""The losses of dpo.py and grpo.py against numbers worked out by hand.

Every expected number below is typed in, and the comment above it shows how to get it with pen and paper. None is
computed with the formula under test, because a test that repeats a mistake cannot find it. The inputs are asymmetric on
purpose: no two tokens, replies, clip bounds or weights are alike, so that swapping any two of them changes the result.

B replies, T tokens, P prompts, G replies each. Everything runs in float64 unless the test is about float32.
"""

import math

import pytest
import torch

import dpo
import grpo
import training

NAN, INF = float("nan"), float("inf")
LN2, LN3 = 0.6931471805599453, 1.0986122886681098


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    actual = torch.as_tensor(actual, dtype=torch.float64)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    assert torch.allclose(actual, expected, rtol=0, atol=tolerance), f"{actual.tolist()} is not {expected.tolist()}"


# ---------------------------------------------------------------------------------------------------------------------
# dpo_loss: margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), loss = -log sigmoid(margin)


def test_dpo_at_margin_zero_costs_ln_2_and_pulls_with_half_of_beta():
    chosen, rejected = f64([-12.0]).requires_grad_(), f64([-40.0]).requires_grad_()
    # the policy is the reference, as at the first step of every run: both differences are 0
    loss, margin = dpo.dpo_loss(chosen, rejected, f64([-12.0]), f64([-40.0]), beta=0.3)
    close(margin, [0.0])
    close(loss, [0.6931471805599453])
    loss.sum().backward()
    # d loss / d chosen = -beta * sigmoid(-margin) = -0.3 * 0.5
    close(chosen.grad, [-0.15])
    close(rejected.grad, [0.15])


def test_dpo_gives_the_hand_worked_loss_and_margin_of_each_pair():
    loss, margin = dpo.dpo_loss(
        chosen=f64([-12.0, -7.0]),
        rejected=f64([-15.0, -6.0]),
        ref_chosen=f64([-14.0, -5.0]),
        ref_rejected=f64([-13.0, -9.0]),
        beta=0.1,
    )
    # pair 1: chosen gained -12 + 14 = 2, rejected lost -15 + 13 = -2, margin 0.1 * (2 + 2) = 0.4
    # pair 2: chosen lost -7 + 5 = -2, rejected gained -6 + 9 = 3, margin 0.1 * (-2 - 3) = -0.5
    close(margin, [0.4, -0.5])
    # ln(1 + e^-0.4) = ln 1.670320046, ln(1 + e^0.5) = ln 2.648721271; one loss per pair, neither summed nor averaged
    close(loss, [0.5130152523999526, 0.9740769841801067])


def test_dpo_gradients_raise_the_chosen_and_lower_the_rejected_reply():
    chosen, rejected = f64([-2.0, -3.0]).requires_grad_(), f64([-5.0, -1.0]).requires_grad_()
    # margins with beta 0.5: 0.5 * ((-2 + 2) - (-5 + 5 - 2 ln 3)) = ln 3, and 0.5 * ((-3 + 3 - 4 ln 2) - 0) = -ln 4
    ref_chosen = f64([-2.0, -3.0 + 4 * LN2])
    ref_rejected = f64([-5.0 + 2 * LN3, -1.0])
    loss, margin = dpo.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.5)
    close(margin, [1.0986122886681098, -1.3862943611198906])
    # 1 + e^-ln3 = 4/3, 1 + e^ln4 = 5
    close(loss, [0.28768207245178085, 1.6094379124341003])
    (loss * f64([1.0, 10.0])).sum().backward()
    # sigmoid(-ln 3) = 1/4, sigmoid(ln 4) = 4/5: -0.5 * 1/4 = -0.125, and ten times -0.5 * 4/5 = -4
    close(chosen.grad, [-0.125, -4.0])
    close(rejected.grad, [0.125, 4.0])


def test_dpo_takes_the_log_probs_as_sums_so_a_longer_reply_has_a_longer_lever():
    # 10 tokens that gained 0.2 each against 2 tokens that gained 0.2 each: 0.5 * (2.0 - 0.4) = 0.8.
    _, margin = dpo.dpo_loss(f64([-8.0]), f64([-1.6]), f64([-10.0]), f64([-2.0]), beta=0.5)
    close(margin, [0.8])


def test_dpo_beta_scales_the_margin():
    at = {beta: dpo.dpo_loss(f64([-3.0]), f64([-4.0]), f64([-5.0]), f64([-3.0]), beta) for beta in (0.1, 0.2, 1.0)}
    # (-3 + 5) - (-4 + 3) = 3
    close(torch.cat([at[beta][1] for beta in (0.1, 0.2, 1.0)]), [0.3, 0.6, 3.0])
    # ln(1 + e^-0.3), ln(1 + e^-0.6), ln(1 + e^-3)
    close(torch.cat([at[beta][0] for beta in (0.1, 0.2, 1.0)]), [0.5543552445, 0.4374879505, 0.0485873516], 1e-9)


def test_dpo_sees_only_the_change_against_the_reference():
    pair = [f64([-12.0, -7.0]), f64([-15.0, -6.0]), f64([-14.0, -5.0]), f64([-13.0, -9.0])]
    loss, margin = dpo.dpo_loss(*pair, beta=0.1)
    # a reply that is less likely under both models by the same amount (longer, say) has changed as much as before
    shifted = [pair[0] - 100.0, pair[1] - 30.0, pair[2] - 100.0, pair[3] - 30.0]
    for before, after in zip((loss, margin), dpo.dpo_loss(*shifted, beta=0.1), strict=True):
        close(after, before.tolist(), 1e-9)
    # but the reference itself counts: 10 nats on one side of it move the margin by 0.1 * 10
    close(dpo.dpo_loss(pair[0], pair[1], pair[2] - 10.0, pair[3], beta=0.1)[1], [1.4, 0.5])
    close(dpo.dpo_loss(pair[0], pair[1], pair[2], pair[3] - 10.0, beta=0.1)[1], [-0.6, -1.5])


def test_dpo_stays_finite_at_margins_where_the_sigmoid_is_zero():
    chosen = torch.tensor([-5000.0, 5000.0], requires_grad=True)
    zero = torch.zeros(2)
    loss, margin = dpo.dpo_loss(chosen, zero, zero, zero, beta=0.5)
    close(margin, [-2500.0, 2500.0])
    close(loss, [2500.0, 0.0])
    loss.sum().backward()
    close(chosen.grad, [-0.5, 0.0])


def test_dpo_pairs_do_not_touch_each_other():
    pair = [f64([-12.0, -7.0]), f64([-15.0, -6.0]), f64([-14.0, -5.0]), f64([-13.0, -9.0])]
    loss, margin = dpo.dpo_loss(*[side.flip(0) for side in pair], beta=0.1)
    close(margin, [-0.5, 0.4])
    close(loss, [0.9740769841801067, 0.5130152523999526])
    close(dpo.dpo_loss(*[side[1:] for side in pair], beta=0.1)[0], [0.9740769841801067])


def test_dpo_gradient_equals_finite_differences():
    inputs = [f64([-2.0, -7.5]), f64([-5.0, -6.0]), f64([-2.5, -5.0]), f64([-4.0, -9.0])]
    leaves = [side.requires_grad_() for side in inputs[:2]]
    assert torch.autograd.gradcheck(lambda c, r: dpo.dpo_loss(c, r, inputs[2], inputs[3], 0.7)[0], leaves)


# ---------------------------------------------------------------------------------------------------------------------
# sft_loss: -sum over replies of weight * (sum of the reply's log-probs)

# Reply 1 has two tokens, reply 2 three: the sums are -3 and -7.5, five tokens in all.
SFT_LOGP = [[-1.0, -2.0, -64.0], [-3.0, -0.5, -4.0]]
SFT_MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        ([1 / 5, 1 / 5], 2.1),  # token mean: 10.5 / 5
        ([1 / 4, 1 / 6], 2.0),  # mean of the replies' means: (1.5 + 2.5) / 2
        ([0.5, 0.1], 2.25),  # any weight: 0.5 * 3 + 0.1 * 7.5
        ([0.0, 1.0], 7.5),  # reply 1 switched off
    ],
)
def test_sft_is_the_weighted_negative_log_likelihood(weight, expected):
    loss = dpo.sft_loss(f64(SFT_LOGP), SFT_MASK, f64(weight))
    close(loss, expected)


def test_sft_pulls_every_token_of_a_reply_with_its_weight_and_no_other():
    logp = f64(SFT_LOGP).requires_grad_()
    dpo.sft_loss(logp, SFT_MASK, f64([0.5, 0.1])).backward()
    close(logp.grad, [[-0.5, -0.5, 0.0], [-0.1, -0.1, -0.1]])


@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30])
def test_sft_ignores_whatever_stands_in_the_padding(junk):
    logp = f64(SFT_LOGP)
    logp[0, 2] = junk
    logp.requires_grad_()
    loss = dpo.sft_loss(logp, SFT_MASK, f64([0.5, 0.1]))
    close(loss, 2.25)
    loss.backward()
    close(logp.grad, [[-0.5, -0.5, 0.0], [-0.1, -0.1, -0.1]])


def test_sft_micro_batches_add_up_to_the_batch():
    logp, weight = f64(SFT_LOGP), f64([1 / 5, 1 / 5])
    parts = [dpo.sft_loss(logp[i : i + 1], SFT_MASK[i : i + 1], weight[i : i + 1]) for i in range(2)]
    # 3 / 5 and 7.5 / 5: the normaliser is the whole batch's, so a part is not divided by its own count
    close(torch.stack(parts), [0.6, 1.5])


# ---------------------------------------------------------------------------------------------------------------------
# group_advantages: (P, G) -> (P, G)

# Group 1: mean 0.75, deviations 0.75, -0.25 (three times), squares 0.5625 + 3 * 0.0625 = 0.75, / 3 = 0.25, std 0.5.
# Group 2: mean 3, deviations -3, 1, 1, 1, squares 9 + 3 = 12, / 3 = 4, std 2.  (Divided by 4: 0.433 and 1.732.)
REWARDS = [[1.5, 0.5, 0.5, 0.5], [0.0, 4.0, 4.0, 4.0]]


def test_advantages_divide_by_the_unbiased_std_of_their_own_group():
    # 0.75 / 0.5001, -0.25 / 0.5001, -3 / 2.0001, 1 / 2.0001
    up, down = 1.4997000599880024, -0.4999000199960008
    bad, good = -1.4999250037498124, 0.49997500124993743
    close(grpo.group_advantages(f64(REWARDS)), [[up, down, down, down], [bad, good, good, good]], 1e-9)
    close(grpo.group_advantages(f64(REWARDS), scale="group"), [[up, down, down, down], [bad, good, good, good]], 1e-9)


def test_advantages_add_eps_to_the_std():
    # with eps 0.5 the divisors are 0.5 + 0.5 = 1 and 2 + 0.5 = 2.5
    advantages = grpo.group_advantages(f64(REWARDS), scale="group", eps=0.5)
    close(advantages, [[0.75, -0.25, -0.25, -0.25], [-1.2, 0.4, 0.4, 0.4]])


def test_advantages_without_scaling_are_the_distance_to_the_groups_mean():
    advantages = grpo.group_advantages(f64(REWARDS), scale="none")
    close(advantages, [[0.75, -0.25, -0.25, -0.25], [-3.0, 1.0, 1.0, 1.0]])


def test_advantages_by_batch_lose_their_groups_mean_but_share_one_std():
    # all four rewards: mean 3, deviations -3, 1, 1, 1, unbiased std 2; with eps 0.5 the divisor is 2.5 for both groups.
    # Group 1: mean 2, so -2 / 2.5 and 2 / 2.5.  Group 2: no spread of its own, so nothing.
    close(grpo.group_advantages(f64([[0.0, 4.0], [4.0, 4.0]]), scale="batch", eps=0.5), [[-0.8, 0.8], [0.0, 0.0]])
    # by group: deviations -2, 2, squares 8 / 1, std 2.8284271247, and with eps 0.5 -2 / 3.3284271247
    by_group = grpo.group_advantages(f64([[0.0, 4.0], [4.0, 4.0]]), scale="group", eps=0.5)
    close(by_group, [[-0.6008844, 0.6008844], [0.0, 0.0]], 1e-7)


def test_a_groups_advantages_do_not_depend_on_the_other_groups_unless_the_scale_is_the_batchs():
    one = f64([[0.0, 1.0, 0.5], [1.0, 0.0, 0.0]])
    other = f64([[0.0, 1.0, 0.5], [9.0, 2.0, 0.0]])
    for scale in ("group", "none"):
        close(grpo.group_advantages(other, scale)[0], grpo.group_advantages(one, scale)[0].tolist())
    assert grpo.group_advantages(other, "batch")[0, 1] < 0.5 * grpo.group_advantages(one, "batch")[0, 1]


def test_advantages_keep_the_shape_prompts_by_replies():
    # three prompts of two replies: mean over the replies (dim 1), not over the prompts.
    # Group std: 1 / sqrt(2) * difference = 0.7071067812, 1.4142135624, 2.1213203436; eps 0 divides to +-0.7071067812.
    rewards = f64([[0.0, 1.0], [5.0, 3.0], [10.0, 13.0]])
    close(grpo.group_advantages(rewards, "none"), [[-0.5, 0.5], [1.0, -1.0], [-1.5, 1.5]])
    half = 0.7071067811865476
    close(grpo.group_advantages(rewards, "group", eps=0.0), [[-half, half], [half, -half], [-half, half]])


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_a_group_of_one_has_advantage_zero_and_not_nan(scale):
    # one value has no unbiased std (0 / 0), and nothing to be compared with
    assert grpo.group_advantages(torch.tensor([[1.5], [0.25], [0.0]]), scale).tolist() == [[0.0], [0.0], [0.0]]
    assert grpo.group_advantages(torch.tensor([[1.5]]), scale).tolist() == [[0.0]]


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_equal_rewards_have_advantage_exactly_zero(scale, size):
    # 0.1, 1/3 and 7/6 have no exact float32, so their mean may differ from each of them by one rounding. Divided by
    # eps that would be a small advantage, and a group without signal would be trained on.
    rewards = torch.tensor([[value] * size for value in (0.0, 0.5, 1.5, 0.1, 1 / 3, 7 / 6, 0.7)])
    assert grpo.group_advantages(rewards, scale).tolist() == [[0.0] * size] * 7


def test_the_best_reply_of_a_group_has_the_largest_advantage_and_the_order_of_replies_does_not_matter():
    rewards = f64([[0.5, 1.5, 0.0, 0.7]])
    advantages = grpo.group_advantages(rewards)
    assert advantages.argmax() == 1 and advantages.argmin() == 2
    close(grpo.group_advantages(rewards[:, [2, 0, 3, 1]]), advantages[:, [2, 0, 3, 1]].tolist())


# ---------------------------------------------------------------------------------------------------------------------
# grpo_loss: -sum_b weight_b sum_t mask [min(r A, clip(r, 1 - low, 1 + high) A) - kl * k3]


def loss_and_gradient(ratios, advantage, weight, *, mask=None, ref_gap=None, old=-1.7, dtype=torch.float64, **options):
    """grpo_loss and d loss / d logp of replies whose tokens became `ratios` times as likely since they were sampled.

    ratios: list of B lists of T; ref_gap: the same of (ref_logp - logp), None for no reference.
    """
    ratios = torch.tensor(ratios, dtype=dtype)
    old_logp = torch.full_like(ratios, old)
    logp = (old_logp + ratios.log()).requires_grad_()
    ref_logp = None if ref_gap is None else logp.detach() + torch.tensor(ref_gap, dtype=dtype)
    mask = torch.ones_like(ratios, dtype=torch.bool) if mask is None else torch.tensor(mask)
    advantage, weight = torch.tensor(advantage, dtype=dtype), torch.tensor(weight, dtype=dtype)
    loss = grpo.grpo_loss(logp, old_logp, ref_logp, advantage, mask, weight, **options)
    loss.backward()
    return loss.detach(), logp.grad


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_at_the_first_update_the_gradient_is_minus_advantage_times_weight(ratio):
    # every ratio is 1. Reply 1: one token, -2 * 0.25. Reply 2: three tokens, -(-1) * 0.1 each.
    loss, gradient = loss_and_gradient(
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
        advantage=[2.0, -1.0],
        weight=[0.25, 0.1],
        mask=[[True, False, False], [True, True, True]],
        ratio=ratio,
    )
    close(loss, -(0.25 * 2 - 0.1 * 3))
    close(gradient, [[-0.5, 0.0, 0.0], [0.1, 0.1, 0.1]])


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective", "slope"),
    [
        # bounds 1 - 0.2 = 0.8 and 1 + 0.4 = 1.4; slope = d objective / d logp = ratio * advantage, 0 where clipped
        (1.5, 2.0, 2.8, 0.0),  # a good token above the upper bound: 1.4 * 2, no more push
        (1.5, -2.0, -3.0, -3.0),  # a bad token that became more likely: min(-3, -2.8), still pushed down
        (0.5, 2.0, 1.0, 1.0),  # a good token that became less likely: min(1, 1.6), still pushed up
        (0.5, -2.0, -1.6, 0.0),  # a bad token below the lower bound: 0.8 * -2, no more push
        (1.3, 2.0, 2.6, 2.6),  # between 1.2 and 1.4: inside, and outside if the bounds were swapped
        (1.3, -2.0, -2.6, -2.6),
        (0.7, -2.0, -1.6, 0.0),  # between 0.6 and 0.8: outside, and inside if the bounds were swapped
        (0.7, 2.0, 1.4, 1.4),
        (0.9, 3.0, 2.7, 2.7),
        (0.9, -3.0, -2.7, -2.7),
    ],
)
@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_clipping_stops_only_the_moves_that_went_far_enough(ratio, advantage, objective, slope, kind):
    # one reply of one token, where the token's and the sequence's ratio are the same thing
    options = {"clip_low": 0.2, "clip_high": 0.4, "ratio": kind}
    loss, gradient = loss_and_gradient([[ratio]], [advantage], [0.5], **options)
    close(loss, -0.5 * objective)
    close(gradient, [[-0.5 * slope]])
    if slope == 0.0:
        assert gradient.item() == 0.0  # exactly: a clipped token is out of the batch


# bounds 0.8 and 1.4; every row: ratio, advantage, gain by hand, whether the clip took the gradient away
CLIPPED = [
    (1.5, 2.0, 2.8, True),  # min(3, 1.4 * 2)
    (1.4, 2.0, 2.8, False),  # at the bound nothing is lost yet
    (0.8, 2.0, 1.6, False),
    (0.5, 2.0, 1.0, False),  # min(1, 0.8 * 2): too rare for its advantage, pushed up
    (1.5, -2.0, -3.0, False),  # min(-3, 1.4 * -2): too frequent, pushed down
    (1.4, -2.0, -2.8, False),
    (0.8, -2.0, -1.6, False),
    (0.5, -2.0, -1.6, True),  # min(-1, 0.8 * -2)
    (1.0, 2.0, 2.0, False),
    (1.5, 0.0, 0.0, False),  # nothing to take away
    (0.5, 0.0, 0.0, False),
]


@pytest.mark.parametrize(("ratio", "advantage", "gain", "clipped"), CLIPPED)
def test_the_surrogate_names_the_tokens_whose_gradient_the_clip_took_away(ratio, advantage, gain, clipped):
    r = f64([[ratio]]).requires_grad_()
    actual, taken = grpo.clipped_surrogate(r, f64([advantage]), 0.2, 0.4)
    close(actual, [[gain]])
    assert taken.tolist() == [[clipped]]
    actual.sum().backward()
    close(r.grad, [[0.0 if clipped else advantage]])


def test_the_surrogate_takes_one_advantage_for_all_tokens_of_a_reply():
    gain, taken = grpo.clipped_surrogate(f64([[1.5, 0.5, 1.0], [1.5, 0.5, 1.25]]), f64([2.0, -1.0]), 0.2, 0.4)
    close(gain, [[2.8, 1.0, 2.0], [-1.5, -0.8, -1.25]])
    assert taken.tolist() == [[True, False, False], [False, True, False]]


# Replies of 2, 3 and 3 tokens with advantages 2, -1 and 0; what stands in the padding of the first is junk.
#   clipped at 0.8 and 1.4 by token: 1.5 of the first reply, 0.5 of the second, nothing of the third
#   k3 of the gaps ln 2, 0; -ln 2, ln 3, 0: 0.3068528194 + 0.1931471806 + 0.9013877113
#   gaps to the sampler: 0.25 + 0.5 + 0.125 + 1
METRICS = {
    "ratios": [[1.5, 0.5, 9.0], [0.5, 2.0, 1.0], [3.0, 0.1, 1.0]],
    "advantage": [2.0, -1.0, 0.0],
    "mask": [[True, True, False], [True, True, True], [True, True, True]],
    "ref_gap": [[LN2, 0.0, 5.0], [-LN2, LN3, 0.0], [0.0, 0.0, 0.0]],
    "sampler_gap": [[0.25, -0.5, 7.0], [0.0, 0.125, 0.0], [-1.0, 0.0, 0.0]],
    "correction": [[2.0, 1.0, 2.0], [0.5, 2.0, 1.9], [1.0, 1.0, 1.0]],
}


def token_metrics(ratio="token", surrogate="clip", floor=0.0, **changes):
    """grpo.token_metrics of METRICS, cap 2, bounds 0.8 and 1.4."""
    given = METRICS | changes
    ratios, mask = f64(given["ratios"]), torch.tensor(given["mask"])
    old = torch.full_like(ratios, -1.7)
    logp = old + ratios.log()
    ref = None if given["ref_gap"] is None else logp + f64(given["ref_gap"])
    sampler = old - f64(given["sampler_gap"])
    advantage, correction = f64(given["advantage"]), f64(given["correction"])
    clipping = {"surrogate": surrogate, "clip_low": 0.2, "clip_high": 0.4, "ratio": ratio}
    return grpo.token_metrics(logp, old, ref, sampler, advantage, mask, correction, 2.0, floor, **clipping)


def test_the_metrics_are_sums_over_sampled_tokens_worked_out_by_hand():
    metrics = token_metrics()
    assert metrics.pop("kl") == pytest.approx(1.4013877113, abs=1e-9)
    assert metrics == {
        "tokens": 8,
        "clip_fraction": 2,
        "sampler_gap_mean": 1.875,
        "importance_capped": 2,
        "sampler_gap": 1.0,
    }
    assert token_metrics(ref_gap=None)["kl"] == 0.0


def test_the_clip_fraction_counts_no_token_of_advantage_zero_however_far_its_ratio():
    assert token_metrics(advantage=[0.0, 0.0, 0.0])["clip_fraction"] == 0
    # the third reply's: 3.0 is clipped for a positive advantage, 0.1 for a negative one
    assert token_metrics(advantage=[0.0, 0.0, 1.0])["clip_fraction"] == 1
    assert token_metrics(advantage=[0.0, 0.0, -1.0])["clip_fraction"] == 1


def test_a_sequence_ratio_that_is_clipped_counts_with_all_tokens_of_its_reply():
    # sqrt(1.5 * 0.5) = 0.87 and 1 lie inside; cube root of 3 * 0.1 = 0.67 lies below 0.8
    assert token_metrics("sequence", advantage=[2.0, -1.0, 1.0])["clip_fraction"] == 0
    assert token_metrics("sequence", advantage=[2.0, -1.0, -1.0])["clip_fraction"] == 3


def test_a_steps_metrics_are_means_over_tokens_and_updates():
    sums = dict.fromkeys(grpo.TOKEN_SUMS, 0.0)
    for part in ({"loss": 1.0} | token_metrics(), {"loss": 2.0} | token_metrics(sampler_gap=[[0.5, 0, 0]] * 3)):
        grpo.add_metrics(sums, part)
    # two updates on a batch of 10 tokens, of which 8 were learned from: 16 in both
    world = training.World(rank=0, size=1, device=torch.device("cpu"))
    metrics = grpo.learning_metrics(world, sums, tokens=10, updates=2)
    expected = {
        "loss": 1.5,
        "kl": 2 * 1.4013877113 / 20,
        "clip_fraction": 4 / 20,
        "sampler_gap": 1.0,  # the largest of both
        "sampler_gap_mean": (1.875 + 1.5) / 16,
        "importance_capped": 4 / 16,
    }
    assert metrics == pytest.approx(expected, abs=1e-9)


def test_without_being_told_the_clip_is_one_fifth_on_both_sides_with_token_ratios_and_no_kl():
    # token 1: min(1.25, 1.2) = 1.2, token 2: min(0.75, 0.8) = 0.75; a sequence ratio would be sqrt(1.25 * 0.75) = 0.968
    loss, gradient = loss_and_gradient([[1.25, 0.75]], [1.0], [1.0], ref_gap=[[LN2, LN3]])
    close(loss, -1.95)
    close(gradient, [[0.0, -0.75]])
    # with advantage -1: min(-1.25, -1.2) = -1.25, min(-0.75, -0.8) = -0.8
    loss, gradient = loss_and_gradient([[1.25, 0.75]], [-1.0], [1.0])
    close(loss, 2.05)
    close(gradient, [[1.25, 0.0]])


def test_k3_at_known_points():
    # d = ref_logp - logp; k3 = e^d - d - 1:  d = ln 2: 2 - 0.6931 - 1 = 0.3069, d = -ln 2: 0.5 + 0.6931 - 1 = 0.1931,
    # d = ln 3: 3 - 1.0986 - 1 = 0.9014, d = 0: 0.  Slope d k3 / d logp = 1 - e^d: -1, 0.5, -2, 0.
    # Advantage 0 leaves the KL alone; kl = 0.3, weight 0.5.
    loss, gradient = loss_and_gradient([[1.0, 1.0, 1.0, 1.0]], [0.0], [0.5], ref_gap=[[LN2, -LN2, LN3, 0.0]], kl=0.3)
    # 0.15 * (0.3068528194 + 0.1931471806 + 0.9013877113) = 0.15 * 1.4013877113
    close(loss, 0.2102081567, 1e-9)
    close(gradient, [[-0.15, 0.075, -0.3, 0.0]])


def test_kl_makes_the_loss_larger_on_either_side_of_the_reference():
    for gap in (0.8, -0.8):
        without, _ = loss_and_gradient([[1.1]], [1.0], [1.0], ref_gap=[[gap]], kl=0.0)
        with_kl, _ = loss_and_gradient([[1.1]], [1.0], [1.0], ref_gap=[[gap]], kl=0.04)
        assert with_kl > without


def test_a_clipped_token_is_still_held_to_the_reference():
    # ratio 1.5, advantage 1: clipped at 1.2. d = ln 3: k3 = 0.9013877113, slope -2; kl = 0.1, weight 1
    loss, gradient = loss_and_gradient([[1.5]], [1.0], [1.0], ref_gap=[[LN3]], kl=0.1)
    close(loss, -1.2 + 0.09013877113, 1e-9)
    close(gradient, [[-0.2]])


def test_no_reference_model_is_needed_without_kl():
    arguments = ([[1.1, 0.7], [0.9, 1.3]], [2.0, -1.0], [0.3, 0.2])
    loss, gradient = loss_and_gradient(*arguments, ref_gap=None, kl=0.0)
    # 0.3 * (2.2 + 1.4) = 1.08;  0.2 * (min(-0.9, -0.9) + min(-1.3, -1.2)) = 0.2 * -2.2 = -0.44
    close(loss, -0.64)
    close(gradient, [[-0.66, -0.42], [0.18, 0.26]])
    with_reference, same_gradient = loss_and_gradient(*arguments, ref_gap=[[5.0, -3.0], [1.0, 0.5]], kl=0.0)
    close(with_reference, -0.64)
    close(same_gradient, gradient.tolist())


# Two replies where everything happens at once: clipping, KL, padding, different weights.
#   reply 1, A = 2, weight 0.25, bounds 0.8 and 1.28
#     token 1  r = 1.5: min(3, 2.56) = 2.56, flat.   d = ln 2: k3 = 0.3068528194, slope -1
#     token 2  r = 0.5: min(1, 1.6) = 1, slope 1.    d = 0:    k3 = 0
#     0.25 * (3.56 - 0.5 * 0.3068528194) = 0.8516433976
#   reply 2, A = -1, weight 0.1
#     token 1  r = 2:   min(-2, -1.28) = -2, slope -2.    d = -ln 2: k3 = 0.1931471806, slope 0.5
#     token 2  r = 0.5: min(-0.5, -0.8) = -0.8, flat.     d = ln 3:  k3 = 0.9013877113, slope -2
#     token 3  r = 1:   -1, slope -1.                     d = 0
#     0.1 * (-3.8 - 0.5 * 1.0945348919) = -0.4347267446
#   loss = -(0.8516433976 - 0.4347267446)
#   d loss / d logp = weight * (-slope of the objective + 0.5 * slope of k3):
#     0.25 * (0 - 0.5), 0.25 * (-1 + 0);  0.1 * (2 + 0.25), 0.1 * (0 - 1), 0.1 * (1 + 0)
EVERYTHING = {
    "ratios": [[1.5, 0.5, 1.0], [2.0, 0.5, 1.0]],
    "advantage": [2.0, -1.0],
    "weight": [0.25, 0.1],
    "mask": [[True, True, False], [True, True, True]],
    "ref_gap": [[LN2, 0.0, 0.0], [-LN2, LN3, 0.0]],
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl": 0.5,
}
EVERYTHING_LOSS = -0.416916653
EVERYTHING_GRADIENT = [[-0.125, -0.25, 0.0], [0.225, -0.1, 0.1]]


def test_clip_kl_padding_and_weights_together_give_the_hand_worked_loss_and_gradient():
    loss, gradient = loss_and_gradient(**EVERYTHING)
    close(loss, EVERYTHING_LOSS, 1e-9)
    close(gradient, EVERYTHING_GRADIENT, 1e-9)


def test_float32_agrees_with_the_hand_worked_numbers():
    loss, gradient = loss_and_gradient(**EVERYTHING, dtype=torch.float32)
    close(loss, EVERYTHING_LOSS, 1e-5)
    close(gradient, EVERYTHING_GRADIENT, 1e-5)


def test_only_the_ratio_counts_and_not_how_likely_the_token_was():
    loss, gradient = loss_and_gradient(**EVERYTHING, old=-9.3)
    close(loss, EVERYTHING_LOSS, 1e-9)
    close(gradient, EVERYTHING_GRADIENT, 1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# importance_weights: min(pi_old / pi_sampler, cap), and the loss that they correct

# reply 1: the trainer finds its tokens 1.5, 0.5 and 4 times as likely as the sampler did; reply 2: 0.25 and 2 times
OLD = [[-1.0, -2.0, -0.5], [-3.0, -1.0, NAN]]
TIMES = [[1.5, 0.5, 4.0], [0.25, 2.0, 1.0]]
SAMPLED = [[True, True, True], [True, True, False]]


def sampler_of(old, times):
    return f64(old) - f64(times).log()


def test_a_token_weighs_the_trainers_probability_over_the_samplers_up_to_the_cap():
    weights = grpo.importance_weights(f64(OLD), sampler_of(OLD, TIMES), torch.tensor(SAMPLED), "token", 2.5)
    close(weights[0], [1.5, 0.5, 2.5])  # only the 4 is capped; a weight below 1 stays what it is
    close(weights[1, :2], [0.25, 2.0])


def test_a_reply_weighs_the_product_of_its_tokens_ratios_up_to_the_cap():
    # 1.5 * 0.5 * 4 = 3 and 0.25 * 2 = 0.5; the product is capped, not its factors (1.5 * 0.5 * 2.5 = 1.875)
    for cap, first in ((2.5, 2.5), (3.5, 3.0)):
        weights = grpo.importance_weights(f64(OLD), sampler_of(OLD, TIMES), torch.tensor(SAMPLED), "sequence", cap)
        close(weights[0], [first, first, first])
        close(weights[1, :2], [0.5, 0.5])


def test_without_correction_every_weight_is_1():
    weights = grpo.importance_weights(f64(OLD), sampler_of(OLD, TIMES), torch.tensor(SAMPLED), "none", 2.5)
    assert weights[torch.tensor(SAMPLED)].tolist() == [1.0] * 5
    with pytest.raises(ValueError, match="reply"):
        grpo.importance_weights(f64(OLD), f64(OLD), torch.tensor(SAMPLED), "reply")


@pytest.mark.parametrize("kind", ["token", "sequence", "none"])
def test_a_sampler_that_agrees_with_the_trainer_changes_nothing(kind):
    mask = torch.tensor(SAMPLED)
    weights = grpo.importance_weights(f64(OLD), f64(OLD), mask, kind)
    assert weights[mask].tolist() == [1.0] * 5
    options = {"ref_gap": [[0.1, -0.2, 0.3], [0.0, 0.2, 0.0]], "kl": 0.1, "mask": SAMPLED}
    ratios = [[1.5, 0.5, 1.1], [0.7, 1.0, 1.0]]
    plain = loss_and_gradient(ratios, [2.0, -1.0], [0.25, 0.1], **options)
    corrected = loss_and_gradient(ratios, [2.0, -1.0], [0.25, 0.1], **options, correction=weights)
    assert corrected[0] == plain[0] and torch.equal(corrected[1], plain[1])


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_importance_weights_carry_no_gradient(kind):
    old = f64(OLD).requires_grad_()
    assert not grpo.importance_weights(old, sampler_of(OLD, TIMES), torch.tensor(SAMPLED), kind).requires_grad


def test_the_correction_weighs_the_clipped_surrogate_and_not_the_kl():
    # The hand-worked case EVERYTHING above, its objectives without KL 2.56, 1; -2, -0.8, -1 weighed by
    #   0.5, 2; 1.5, 0.25, 3:   reply 1: 1.28 + 2 = 3.28,   reply 2: -3 - 0.2 - 3 = -6.2
    # KL as before:  0.25 * (3.28 - 0.1534264097) = 0.7816433976,  0.1 * (-6.2 - 0.54726744595) = -0.6747267446
    # gradients: 0.25 * (0 - 0.5), 0.25 * (-1 * 2);  0.1 * (2 * 1.5 + 0.25), 0.1 * (0 - 1), 0.1 * (1 * 3)
    correction = f64([[0.5, 2.0, NAN], [1.5, 0.25, 3.0]])
    loss, gradient = loss_and_gradient(**EVERYTHING, correction=correction)
    close(loss, -(0.7816433976 - 0.6747267446), 1e-9)
    close(gradient, [[-0.125, -0.5, 0.0], [0.325, -0.1, 0.3]], 1e-9)


@pytest.mark.parametrize("kind", ["token", "sequence", "none"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30, -1e30])
def test_junk_in_the_padding_of_the_samplers_log_probs_reaches_neither_weights_nor_loss(junk, kind):
    mask = torch.tensor([[True, True, False], [True, False, False]])
    sampler = f64([[-1.2, -0.7, junk], [-2.0, junk, junk]])
    clean = sampler.masked_fill(~mask, -1.7)
    old, ratios = torch.full_like(sampler, -1.7), [[1.1, 0.9, 1.0], [1.3, 1.0, 1.0]]
    results = []
    for logp in (sampler, clean):
        weights = grpo.importance_weights(old, logp, mask, kind)
        assert torch.isfinite(weights[mask]).all()
        results.append(loss_and_gradient(ratios, [2.0, -1.0], [0.3, 0.2], mask=mask.tolist(), correction=weights))
    assert math.isfinite(results[0][0]) and results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e30, -1e30, 88.0])
@pytest.mark.parametrize("where", ["logp", "old_logp", "ref_logp", "all"])
def test_whatever_stands_in_the_padding_changes_neither_loss_nor_gradient(junk, where, ratio):
    mask = torch.tensor([[True, True, False, False], [False, True, True, True]])  # padding at either end
    rows = {
        "logp": [[-1.0, -2.0, -1.0, -1.0], [-1.0, -0.5, -1.5, -3.0]],
        "old_logp": [[-1.1, -1.9, -1.0, -1.0], [-1.0, -0.6, -1.3, -3.0]],
        "ref_logp": [[-1.5, -2.0, -1.0, -1.0], [-1.0, -0.5, -1.0, -2.5]],
    }

    def run(rows):
        rows = {name: row.clone() for name, row in rows.items()}
        rows["logp"].requires_grad_()
        advantage, weight = torch.tensor([2.0, -1.0]), torch.tensor([0.25, 0.1])
        loss = grpo.grpo_loss(**rows, advantage=advantage, mask=mask, weight=weight, kl=0.3, ratio=ratio)
        loss.backward()
        return loss.detach(), rows["logp"].grad

    clean = {name: torch.tensor(row) for name, row in rows.items()}
    dirty = {n: row.masked_fill(~mask, junk) if where in (n, "all") else row for n, row in clean.items()}
    loss, gradient = run(clean)
    dirty_loss, dirty_gradient = run(dirty)
    assert math.isfinite(loss) and dirty_loss == loss
    assert torch.equal(dirty_gradient, gradient)  # NaN equals nothing, so this also says: finite
    assert (dirty_gradient[~mask] == 0).all() and (dirty_gradient[mask] != 0).all()


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_reply_without_a_single_sampled_token_adds_nothing(ratio):
    # the filler row of a rank that has fewer replies than the others
    options = {**EVERYTHING, "ratio": ratio}
    alone = {k: v[:1] if isinstance(v, list) else v for k, v in options.items()}
    with_filler = {**options, "mask": [[True, True, False], [False, False, False]]}
    loss, gradient = loss_and_gradient(**alone)
    filled_loss, filled_gradient = loss_and_gradient(**with_filler)
    close(filled_loss, loss.item())
    close(filled_gradient, [*gradient.tolist(), [0.0, 0.0, 0.0]])


@pytest.mark.parametrize(
    ("weight", "expected", "first", "others"),
    [
        # reply 1: one token, A = 2; reply 2: three tokens, A = -1; every ratio 1
        ([1 / 2, 1 / 6], -0.5, -1.0, 1 / 6),  # sequence mean, 1 / (B * length): -(2 / 1 - 3 / 3) / 2
        ([1 / 4, 1 / 4], 0.25, -0.5, 0.25),  # token mean, 1 / (all tokens): -(2 - 3) / 4
        ([1 / 20, 1 / 20], 0.05, -0.1, 0.05),  # Dr. GRPO's constant 10, 1 / (B * 10): -(2 - 3) / 20
    ],
)
def test_the_three_normalisers_are_only_weights(weight, expected, first, others):
    loss, gradient = loss_and_gradient(
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
        advantage=[2.0, -1.0],
        weight=weight,
        mask=[[True, False, False], [True, True, True]],
    )
    close(loss, expected)
    close(gradient, [[first, 0.0, 0.0], [others, others, others]])


@pytest.mark.parametrize(
    ("normalizer", "expected"),
    [
        # replies of 2, 5 and 3 tokens on this rank; the whole batch has 4 replies and 16 tokens
        ("sequence", [1 / 8, 1 / 20, 1 / 12]),  # 1 / (4 * length)
        ("token", [1 / 16, 1 / 16, 1 / 16]),
        ("constant", [1 / 40, 1 / 40, 1 / 40]),  # 1 / (4 * 10)
    ],
)
def test_token_weights_count_the_whole_batch_and_not_what_this_rank_holds(normalizer, expected):
    weights = grpo.token_weights(f64([2.0, 5.0, 3.0]), normalizer, replies=4, tokens=16, constant=10)
    close(weights, expected, 1e-7)


def test_the_sequence_ratio_is_the_geometric_mean_of_the_replys_own_tokens():
    wide = {"clip_low": 0.9, "clip_high": 9.0}
    # reply 1: tokens 4 and 1 (and padding): sqrt(4 * 1) = 2 for both.  Reply 2: 1, 1 and 27: cube root of 27 = 3
    ratios, mask = [[4.0, 1.0, 1.0], [1.0, 1.0, 27.0]], [[True, True, False], [True, True, True]]
    loss, gradient = loss_and_gradient(ratios, [1.0, -2.0], [0.5, 0.1], mask=mask, ratio="sequence", **wide)
    # 0.5 * (2 + 2) * 1 + 0.1 * (3 + 3 + 3) * -2 = 2 - 1.8
    close(loss, -0.2)
    # a step of one token moves the mean by 1 / length, and all of its length tokens: -weight * A * ratio
    close(gradient, [[-1.0, -1.0, 0.0], [0.6, 0.6, 0.6]])
    # by token; 27 is above the bound of 10, but A is negative: min(27 * -2, 10 * -2) = -54
    loss, gradient = loss_and_gradient(ratios, [1.0, -2.0], [0.5, 0.1], mask=mask, ratio="token", **wide)
    # 0.5 * 5 + 0.1 * (-2 - 2 - 54) = 2.5 - 5.8
    close(loss, 3.3)
    close(gradient, [[-2.0, -0.5, 0.0], [0.2, 0.2, 5.4]])


def test_a_clipped_sequence_is_clipped_in_all_of_its_tokens():
    # ratios 4 and 1, sequence ratio 2, bound 1.28, A = 1: 1.28 for both tokens, also for the one with ratio 1
    options = {"clip_low": 0.2, "clip_high": 0.28, "ratio": "sequence"}
    loss, gradient = loss_and_gradient([[4.0, 1.0]], [1.0], [0.5], **options)
    close(loss, -1.28)
    assert gradient.tolist() == [[0.0, 0.0]]
    # A = -1: min(-2, -1.28) = -2 for both, not clipped
    loss, gradient = loss_and_gradient([[4.0, 1.0]], [-1.0], [0.5], **options)
    close(loss, 2.0)
    close(gradient, [[1.0, 1.0]])
    # ratios 1/4 and 1, sequence ratio 1/2, A = -1: min(-0.5, -0.8) = -0.8 for both, clipped
    loss, gradient = loss_and_gradient([[0.25, 1.0]], [-1.0], [0.5], **options)
    close(loss, 0.8)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_the_kl_stays_per_token_with_a_sequence_ratio():
    # d = ln 2, 0, ln 3 with slopes -1, 0, -2; advantage 0, kl 0.2, weight 0.5
    loss, gradient = loss_and_gradient(
        [[1.0, 1.1, 0.9]], [0.0], [0.5], ref_gap=[[LN2, 0.0, LN3]], kl=0.2, ratio="sequence"
    )
    close(loss, 0.1 * (0.3068528194 + 0.9013877113), 1e-9)
    close(gradient, [[-0.1, 0.0, -0.2]])


def batch_of_four(ratio, rows=slice(None)):
    """Four replies of 4, 1, 3 and 2 tokens; loss and gradient of the chosen rows with the whole batch's weights."""
    logp = f64([[-1.0, -2.0, -0.3, -0.9], [-0.5, NAN, NAN, NAN], [-1.5, -0.2, -2.2, NAN], [-0.7, -1.9, NAN, NAN]])
    old = f64([[-1.2, -1.8, -0.3, -1.4], [-0.4, NAN, NAN, NAN], [-1.1, -0.6, -2.3, NAN], [-0.8, -1.2, NAN, NAN]])
    ref = f64([[-1.1, -2.5, -0.1, -0.9], [-0.9, NAN, NAN, NAN], [-1.4, -0.2, -2.9, NAN], [-0.3, -1.5, NAN, NAN]])
    mask = ~logp.isnan()
    advantage, weight = f64([1.5, -0.7, 0.4, -1.1]), 0.25 / mask.sum(1)
    logp, old, ref, mask = logp[rows].clone().requires_grad_(), old[rows], ref[rows], mask[rows]
    options = {"clip_low": 0.2, "clip_high": 0.28, "kl": 0.04, "ratio": ratio}
    loss = grpo.grpo_loss(logp, old, ref, advantage[rows], mask, weight[rows], **options)
    loss.backward()
    return loss.detach(), logp.grad


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_the_order_of_the_replies_does_not_matter(ratio):
    loss, gradient = batch_of_four(ratio)
    order = [2, 0, 3, 1]
    shuffled_loss, shuffled_gradient = batch_of_four(ratio, order)
    close(shuffled_loss, loss.item())
    close(shuffled_gradient, gradient[order].tolist())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("parts", [[[0, 1], [2, 3]], [[0], [1, 2, 3]], [[3], [2], [1], [0]]])
def test_micro_batches_add_up_to_the_batch(ratio, parts):
    loss, gradient = batch_of_four(ratio)
    results = [batch_of_four(ratio, rows) for rows in parts]
    close(sum(part_loss for part_loss, _ in results), loss.item())
    for rows, (_, part_gradient) in zip(parts, results, strict=True):
        close(part_gradient, gradient[rows].tolist())


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_grpo_gradient_equals_finite_differences(ratio, kl):
    # inside the clip, and clipped on both sides, always away from the corners at 0.8 and 1.28
    ratios = f64([[1.1, 0.9, 1.5, 1.0], [0.5, 1.2, 1.0, 1.0], [1.15, 0.7, 1.4, 1.0]])
    old = f64([[-1.0, -0.4, -2.0, -1.0], [-0.6, -1.3, -1.0, -1.0], [-0.2, -0.9, -2.5, -1.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False], [True, True, True, False]])
    ref = old + f64([[0.3, -0.2, 0.5, 0.0], [-0.7, 0.1, 0.0, 0.0], [0.4, 0.9, -0.6, 0.0]])
    advantage, weight = f64([2.0, -1.0, 0.5]), f64([0.2, 0.5, 0.1])
    logp = (old + ratios.log()).requires_grad_()

    def loss(logp):
        return grpo.grpo_loss(logp, old, ref, advantage, mask, weight, clip_low=0.2, clip_high=0.28, kl=kl, ratio=ratio)

    assert torch.autograd.gradcheck(loss, (logp,))


def test_the_losses_leave_their_inputs_as_they_were():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rows = [f64([[-1.0, -2.0, NAN], [-3.0, -0.5, -4.0]]), f64([[-1.5, -2.5, NAN], [-2.0, -0.5, -4.5]])]
    ref, advantage, weight = f64([[-1.2, -2.2, NAN], [-2.5, -0.9, -4.0]]), f64([1.0, -2.0]), f64([0.5, 0.1])
    rewards = f64(REWARDS)
    inputs = [*rows, ref, advantage, mask, weight, rewards]
    before = [tensor.clone() for tensor in inputs]
    grpo.grpo_loss(*rows, ref, advantage, mask, weight, kl=0.1)
    grpo.grpo_loss(*rows, ref, advantage, mask, weight, kl=0.1, ratio="sequence")
    grpo.group_advantages(rewards)
    dpo.sft_loss(rows[0], mask, weight)
    dpo.dpo_loss(rows[0][:, 0], rows[1][:, 0], rows[0][:, 1], rows[1][:, 1], 0.1)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor.nan_to_num(7.0), copy.nan_to_num(7.0))
