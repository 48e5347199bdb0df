"""The other objectives of dpo.py against numbers worked out by hand, and as runs of a tiny model.

As in tests/test_losses.py, which has the DPO and SFT losses. That they are TRL's too is in tests/test_losses_trl.py.
"""

import json
import math

import pytest
import torch
from commands import Material, call, distance, rows, timeless, weights, write
from test_losses import LN2, LN3, NAN, close, f64

import dpo
import model
import training
from records import DataError, read_records


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


# Two pairs: chosen gained 2 and lost 2 nats, rejected lost 2 and gained 3. Margins with beta 0.1: 0.4 and -0.5.
PAIRS = {
    "chosen": f64([-12.0, -7.0]),
    "rejected": f64([-15.0, -6.0]),
    "ref_chosen": f64([-14.0, -5.0]),
    "ref_rejected": f64([-13.0, -9.0]),
}

# ---------------------------------------------------------------------------------------------------------------------
# Label smoothing


def test_label_smoothing_mixes_in_the_loss_of_the_flipped_pair():
    loss, margin = dpo.dpo_loss(**PAIRS, beta=0.1, label_smoothing=0.1)
    close(margin, [0.4, -0.5])
    # ln(1 + e^-0.4) = 0.5130152524 and flipped ln(1 + e^0.4) = 0.9130152524: 0.9 of the first and 0.1 of the second;
    # ln(1 + e^0.5) = 0.9740769842 and flipped 0.4740769842
    close(loss, [0.5530152524, 0.9240769842], 1e-9)


def test_with_label_smoothing_the_margin_has_a_goal():
    # at the margin ln 9 the policy says that 90 % of such pairs are the right way round, and is content
    chosen = f64([2 * math.log(9) - 7.0]).requires_grad_()
    for smoothing, expected in ((0.1, 0.0), (0.0, -0.05)):  # 0: -0.5 * sigmoid(-ln 9) = -0.5 * 0.1
        loss, _ = dpo.dpo_loss(chosen, f64([-4.0]), f64([-7.0]), f64([-4.0]), 0.5, smoothing)
        (gradient,) = torch.autograd.grad(loss.sum(), chosen)
        close(gradient, [expected], 1e-9)


def test_without_label_smoothing_the_loss_is_that_of_dpo_to_the_bit():
    plain = dpo.dpo_loss(**PAIRS, beta=0.1)
    assert torch.equal(plain[0], dpo.dpo_loss(**PAIRS, beta=0.1, label_smoothing=0.0)[0])
    assert torch.equal(plain[0], -torch.nn.functional.logsigmoid(plain[1]))


# ---------------------------------------------------------------------------------------------------------------------
# IPO


def test_ipo_pulls_the_margin_per_token_to_its_goal():
    chosen, rejected = f64([-12.0]).requires_grad_(), f64([-15.0]).requires_grad_()
    # 2 nats over 4 tokens and -3 nats over 2 tokens: h = 0.5 + 1.5 = 2; the goal 1 / (2 * 0.5) is 1
    loss, margin = dpo.ipo_loss(chosen, rejected, f64([-14.0]), f64([-12.0]), 0.5, f64([4.0]), f64([2.0]))
    close(loss, [1.0])
    close(margin, [2.5])  # in sums, like DPO's: 0.5 * (2 + 3)
    loss.sum().backward()
    # 2 (h - goal) / length: past the goal the chosen reply is pushed down again
    close(chosen.grad, [0.5])
    close(rejected.grad, [-1.0])


def test_ipo_is_content_at_its_goal():
    loss, _ = dpo.ipo_loss(f64([-4.0]), f64([-6.0]), f64([-7.0]), f64([-6.0]), 0.5, f64([3.0]), f64([2.0]))
    close(loss, [0.0])


# ---------------------------------------------------------------------------------------------------------------------
# The quality term (BCO)


@pytest.mark.parametrize(
    ("shift", "expected", "up", "down"),
    [
        # implicit rewards ln 3 and -ln 4: ln(1 + 1/3) + ln(1 + 1/4); -0.5 * 1/4 and 0.5 * 1/5
        (0.0, 0.2876820725 + 0.2231435513, -0.125, 0.1),
        # minus ln 3: 0 and -ln 12: ln 2 + ln(1 + 1/12); -0.5 * 1/2 and 0.5 * 1/13
        (LN3, LN2 + 0.0800427077, -0.25, 0.5 / 13),
    ],
)
def test_the_quality_loss_judges_each_reply_against_the_shift(shift, expected, up, down):
    chosen, rejected = f64([-5.0 + 2 * LN3]).requires_grad_(), f64([-6.0 - 4 * LN2]).requires_grad_()
    loss = dpo.quality_loss(chosen, rejected, f64([-5.0]), f64([-6.0]), 0.5, shift)
    close(loss, [expected], 1e-9)
    loss.sum().backward()
    close(chosen.grad, [up], 1e-9)
    close(rejected.grad, [down], 1e-9)


def test_the_quality_loss_notices_that_both_replies_sink_where_the_margin_does_not():
    sunk = PAIRS | {"chosen": PAIRS["chosen"] - 30.0, "rejected": PAIRS["rejected"] - 30.0}
    before, after = (dpo.quality_loss(**pairs, beta=0.1)[0] for pairs in (PAIRS, sunk))
    close(dpo.dpo_loss(**sunk, beta=0.1)[1], [0.4, -0.5])
    assert after > before + 1.0


def test_a_running_mean_is_the_mean_of_all_steps():
    mean = 0.0
    for count, (value, expected) in enumerate([(3.0, 3.0), (-1.0, 1.0), (4.0, 2.0)]):
        mean = dpo.running_mean(mean, count, value)
        assert mean == pytest.approx(expected)


# ---------------------------------------------------------------------------------------------------------------------
# The SFT mean


def test_sft_weights_are_the_two_readings_of_the_papers_mean():
    lengths = f64([2.0, 5.0])  # of four chosen replies with 16 tokens in all, these are on this rank
    close(dpo.sft_weights(lengths, "tokens", replies=4, tokens=16), [1 / 16, 1 / 16])
    close(dpo.sft_weights(lengths, "replies", replies=4, tokens=16), [1 / 8, 1 / 20])
    with pytest.raises(ValueError, match="words"):
        dpo.sft_weights(lengths, "words", 4, 16)


# ---------------------------------------------------------------------------------------------------------------------
# All terms together


def batch(padding=0.0):
    """Two pairs: chosen of 2 and 1 tokens, rejected of 1 and 3. logp (4, 3), mask, ref (2, 2)."""
    rows_ = [[-1.0, -2.0, padding], [-4.0, padding, padding], [-0.5, padding, padding], [-1.0, -3.0, -2.0]]
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, False], [True, True, True]])
    return f64(rows_).requires_grad_(), mask, f64([[-5.0, -2.0], [-1.5, -5.0]])


def total(padding=0.0, real_pairs=(1.0, 1.0), rows_=slice(None), **options):
    logp, mask, ref = batch(padding)
    pairs = slice(None) if rows_ == slice(None) else slice(rows_.start // 2, rows_.stop // 2)
    settings = {"loss": "dpo+sft", "beta": 0.5} | options
    shift = settings.pop("shift", 0.0)
    loss, metrics = dpo.pair_losses(
        logp[rows_], mask[rows_], ref[pairs], f64(real_pairs)[pairs], 2, 3.0, shift, **settings
    )  # fmt: skip
    loss.backward()
    return loss.item(), logp.grad, metrics


MPO = {"preference_weight": 0.8, "quality_weight": 0.2, "sft_mean": "replies", "shift": 0.25}


def test_the_terms_are_weighed_and_summed_as_worked_out_by_hand():
    # gains: chosen 2 and 1, rejected -2 and -1; margins 0.5 * 4 = 2 and 0.5 * 2 = 1
    #   preference (ln(1 + e^-2) + ln(1 + e^-1)) / 2 = (0.1269280110 + 0.3132616875) / 2 = 0.2200948493
    #   rewards 1 and 0.5, -1 and -0.5; minus 0.25: 0.75, 0.25; -1.25, -0.75
    #   quality (ln(1 + e^-0.75) + ln(1 + e^-1.25) + ln(1 + e^-0.25) + ln(1 + e^-0.75)) / 2
    #           = (0.3868710061 + 0.2519290813 + 0.5759394199 + 0.3868710061) / 2 = 0.8008052567
    #   SFT as a mean of means ((1 + 2) / 2 + 0.5) / 2 = 1; over the three tokens 3.5 / 3
    loss, _, metrics = total(**MPO, sft_weight=2.0)
    assert metrics["loss_dpo"] == pytest.approx(0.2200948493, abs=1e-9)
    assert metrics["loss_quality"] == pytest.approx(0.8008052567, abs=1e-9)
    assert metrics["loss_sft"] == pytest.approx(1.0, abs=1e-6)
    assert loss == pytest.approx(0.8 * 0.2200948493 + 0.2 * 0.8008052567 + 2.0, abs=1e-6)
    assert metrics["loss"] == loss
    assert (metrics["chosen_reward"], metrics["rejected_reward"]) == (0.75, -0.75)
    assert total()[2]["loss_sft"] == pytest.approx(3.5 / 3, abs=1e-6)
    assert "loss_quality" not in total()[2]


@pytest.mark.parametrize("options", [{}, MPO, {"preference": "ipo"}, {"label_smoothing": 0.2}])
def test_padding_and_fillers_add_nothing_and_micro_batches_add_up(options):
    loss, gradient, _ = total(**options)
    dirty_loss, dirty_gradient, _ = total(padding=NAN, **options)
    assert dirty_loss == loss and torch.equal(dirty_gradient, gradient)
    parts = [total(rows_=slice(0, 2), **options), total(rows_=slice(2, 4), **options)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-9)
    close(parts[0][1] + parts[1][1], gradient.tolist())
    filled = total(real_pairs=(0.0, 1.0), **options)
    assert filled[0] == pytest.approx(parts[1][0], abs=1e-9) and (filled[1][:2] == 0).all()


def test_the_gradient_of_all_terms_equals_finite_differences():
    logp, mask, ref = batch()

    def loss(logp):
        return dpo.pair_losses(logp, mask, ref, f64([1.0, 1.0]), 2, 3.0, 0.25, loss="dpo+sft", beta=0.5,
                               preference_weight=0.8, quality_weight=0.2, label_smoothing=0.1)[0]  # fmt: skip

    assert torch.autograd.gradcheck(loss, (logp,))


# ---------------------------------------------------------------------------------------------------------------------
# Runs


def test_mpo_logs_what_it_minimises_and_shifts_by_the_mean_of_the_steps_before(material, tmp_path):
    weights_ = {"preference_weight": 0.8, "quality_weight": 0.2, "sft_weight": 1.0, "sft_mean": "replies"}
    call("dpo", **material.dpo(out=tmp_path, steps=4, reward_shift="mean", save_every=1, **weights_))
    log = rows(tmp_path)
    for row in log:
        parts = 0.8 * row["loss_dpo"] + 0.2 * row["loss_quality"] + row["loss_sft"]
        assert row["loss"] == pytest.approx(parts, abs=1e-6)
    # at the first step all implicit rewards are 0: ln 2 for each of the two replies
    assert log[0]["loss_quality"] == pytest.approx(2 * LN2, abs=1e-5)
    means = [(row["chosen_reward"] + row["rejected_reward"]) / 2 for row in log]
    saved = json.loads((tmp_path / "checkpoints/step_000004/extra.json").read_text())
    assert saved["reward_shift"] == pytest.approx(sum(means) / 4, abs=1e-6) and abs(sum(means)) > 1e-3


def test_a_resumed_run_keeps_its_reward_shift(material, tmp_path):
    settings = material.dpo(quality_weight=1.0, reward_shift="mean", schedule="constant")
    call("dpo", **settings | {"out": tmp_path / "whole", "steps": 4})
    call("dpo", **settings | {"out": tmp_path / "halves", "steps": 2})
    call("dpo", **settings | {"out": tmp_path / "halves", "steps": 4, "resume": True})
    assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")
    assert distance(weights(tmp_path / "halves"), weights(tmp_path / "whole")) == 0
    call("dpo", **settings | {"out": tmp_path / "unshifted", "steps": 4, "reward_shift": "none"})
    unshifted = timeless(tmp_path / "unshifted")
    assert unshifted[0] == timeless(tmp_path / "whole")[0] and unshifted[3] != timeless(tmp_path / "whole")[3]


def test_ipo_and_label_smoothing_train(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path / "ipo", loss="dpo", preference="ipo", batch=8, steps=6))
    log = rows(tmp_path / "ipo")
    assert log[0]["loss_dpo"] == pytest.approx(25, abs=1e-3)  # (0 - 1 / (2 * 0.1))^2
    assert log[-1]["loss_dpo"] < log[0]["loss_dpo"] - 1
    call("dpo", **material.dpo(out=tmp_path / "smooth", label_smoothing=0.2))
    assert rows(tmp_path / "smooth")[0]["loss_dpo"] == pytest.approx(LN2, abs=1e-6)
    call("dpo", **material.dpo(out=tmp_path / "plain"))
    assert rows(tmp_path / "plain")[-1]["loss_dpo"] != rows(tmp_path / "smooth")[-1]["loss_dpo"]


# ---------------------------------------------------------------------------------------------------------------------
# Held-out pairs


def held_out(material, folder):
    """Five of the pairs as a file of their own, in another order."""
    chosen = [material.pairs[number] for number in (6, 2, 1, 7, 4)]
    chosen = [pair | {"images": [str(material.folder / name) for name in pair["images"]]} for pair in chosen]
    return write(folder / "held_out.jsonl", chosen)


@pytest.mark.parametrize("loss", ["dpo+sft", "sft"])
def test_held_out_pairs_are_measured_with_the_weights_of_their_step_and_change_nothing(material, tmp_path, loss):
    data = held_out(material, tmp_path)
    settings = material.dpo(steps=5, loss=loss, schedule="constant", save_every=1, keep=9, beta=0.3)
    call("dpo", **settings | {"out": tmp_path / "plain"})
    call("dpo", **settings | {"out": tmp_path / "run", "eval_data": data, "eval_every": 2})
    assert distance(weights(tmp_path / "plain"), weights(tmp_path / "run")) == 0
    log = timeless(tmp_path / "run")
    assert [row["step"] for row in log if "eval_loss" in row] == [2, 4, 5]
    trained = [{key: value for key, value in row.items() if not key.startswith("eval_")} for row in log]
    assert trained == timeless(tmp_path / "plain")

    # A run that trains on these pairs measures its first loss before it learns. It has another reference, so of its
    # numbers only SFT's are the same; the margins are worked out here.
    call("dpo", model=tmp_path / "run", data=data, loss="sft", batch=5, steps=1, out=tmp_path / "again", lr=1e-9)
    assert log[-1]["eval_loss_sft"] == pytest.approx(rows(tmp_path / "again")[0]["loss_sft"], abs=1e-6)
    if loss == "sft":
        assert set(log[-1]) - set(trained[-1]) == {"eval_loss", "eval_loss_sft"}
        return
    world = training.World(0, 1, torch.device("cpu"))
    before, encoder = model.load(material.speaker, world)
    after, _ = model.load(tmp_path / "run", world)
    pairs = read_records(data)
    one, other = (dpo.reference_log_probs(m, encoder, world, pairs, range(5), 0) for m in (before, after))
    margins = [
        0.3 * ((other[index][0] - one[index][0]) - (other[index][1] - one[index][1])) for index in range(5)
    ]  # fmt: skip
    assert log[-1]["eval_margin"] == pytest.approx(sum(margins) / 5, abs=1e-5)
    assert log[-1]["eval_preference_accuracy"] == sum(margin > 0 for margin in margins) / 5
    losses = [math.log1p(math.exp(-margin)) for margin in margins]
    assert log[-1]["eval_loss_dpo"] == pytest.approx(sum(losses) / 5, abs=1e-5)
    assert log[-1]["eval_loss"] == pytest.approx(log[-1]["eval_loss_dpo"] + log[-1]["eval_loss_sft"], abs=1e-6)
    assert max(map(abs, margins)) > 0.01


def test_the_size_of_micro_batches_does_not_matter_to_held_out_pairs_and_a_resumed_run_has_the_same(material, tmp_path):
    settings = material.dpo(batch=8, steps=2, eval_data=held_out(material, tmp_path), eval_every=1, lr=1e-4)
    for name, tokens in (("small", 50), ("large", 100_000)):
        call("dpo", **settings | {"out": tmp_path / name, "micro_tokens": tokens})
    for small, large in zip(timeless(tmp_path / "small"), timeless(tmp_path / "large"), strict=True):
        for key in small:
            if key.startswith("eval_"):
                assert small[key] == pytest.approx(large[key], abs=1e-5), key
    call("dpo", **settings | {"out": tmp_path / "halves", "steps": 1, "schedule": "constant"})
    call("dpo", **settings | {"out": tmp_path / "halves", "schedule": "constant", "resume": True})
    call("dpo", **settings | {"out": tmp_path / "whole", "schedule": "constant"})
    assert timeless(tmp_path / "halves") == timeless(tmp_path / "whole")


def test_a_resumed_run_refuses_other_held_out_pairs(material, tmp_path):
    data = held_out(material, tmp_path)
    settings = material.dpo(batch=8, steps=1, eval_data=data, out=tmp_path / "out")
    call("dpo", **settings)
    write(data, [json.loads(line) for line in data.read_text().splitlines()][:4])
    with pytest.raises(DataError, match="held_out.jsonl"):
        call("dpo", **settings | {"steps": 2, "resume": True})


def test_held_out_pairs_are_read_before_anything_is_trained(material, tmp_path):
    data = write(tmp_path / "bad.jsonl", [material.pairs[4] | {"images": [], "rejected": None}])
    with pytest.raises(DataError, match="bad.jsonl:1.*rejected"):
        call("dpo", **material.dpo(out=tmp_path / "out", eval_data=data))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad",
    [
        ["--eval-every", "0"],
        ["--label-smoothing", "0.5"],
        ["--label-smoothing", "0.1", "--preference", "ipo"],
        ["--reward-shift", "mean"],
        ["--quality-weight", "1", "--loss", "sft"],
        ["--sft-mean", "words"],
    ],
)
def test_objectives_that_make_no_sense_are_refused(capsys, bad):
    with pytest.raises(SystemExit) as stop:
        dpo.parse_args(["--model", "m", "--data", "d", "--out", "o", *bad])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and bad[0] in err
