"""Our losses against TRL 1.16: bench/losses_trl.py ran TRL's own code, its losses and gradients are kept in a file."""

import json
from pathlib import Path

import pytest
import torch

import dpo
import grpo

RESULT = Path(__file__).resolve().parent.parent / "bench/results/losses_trl.json"
CLOSE = 1e-6


def tensors(inputs):
    """The file's lists as fp64 tensors (the mask as bool)."""
    given = {name: torch.tensor(value, dtype=torch.float64) for name, value in inputs.items() if name != "mask"}
    return given | {"mask": torch.tensor(inputs["mask"])}


def grpo_case(inputs, settings):
    """(loss, gradient) of ours with the settings of a case."""
    given = tensors(inputs)
    settings = dict(settings)
    mask, lengths = given["mask"], given["mask"].sum(1).double()
    importance, correction = settings.pop("importance", None), None
    if importance:
        correction = grpo.importance_weights(given["old_logp"], given["sampler_logp"], mask, **importance)
    truncated = settings.pop("truncated", [])
    counted = torch.tensor([number not in truncated for number in range(len(lengths))])
    tokens = (lengths * counted).sum().item()
    weight = counted * grpo.token_weights(lengths, settings.pop("normalizer"), len(lengths), tokens, 8)
    logp = given["logp"].requires_grad_()
    loss = grpo.grpo_loss(
        logp, given["old_logp"], given["ref_logp"], given["advantage"], mask, weight,
        clip_low=0.2, clip_high=0.28, correction=correction, entropy=given["entropy"], **settings,
    )  # fmt: skip
    loss.backward()
    return loss.item(), logp.grad


def dpo_case(inputs, settings):
    """(loss, gradient) of ours with the settings of a case: replies 0 and 2 are chosen."""
    given = tensors(inputs)
    logp, mask = given["logp"].requires_grad_(), given["mask"]
    chosen_tokens = mask[::2].sum().item()
    loss, _ = dpo.pair_losses(
        logp, mask, given["ref"], torch.ones(2, dtype=torch.float64), 2, chosen_tokens, beta=0.1, **settings
    )
    loss.backward()
    return loss.item(), logp.grad


def difference(inputs, case):
    """The largest difference between TRL's loss or gradient and ours."""
    loss, gradient = {"grpo": grpo_case, "dpo": dpo_case}[case["kind"]](inputs, case["ours"])
    apart = (gradient - torch.tensor(case["gradient"], dtype=torch.float64)).abs().max().item()
    return max(apart, abs(loss - case["loss"]))


FILE = json.loads(RESULT.read_text()) if RESULT.exists() else {"cases": []}


@pytest.mark.parametrize("case", FILE["cases"], ids=lambda case: f"{case['kind']}: {case['name']}")
def test_loss_and_gradient_are_those_of_trl(case):
    assert difference(FILE["inputs"], case) < CLOSE


def test_every_case_of_the_file_tells_something():
    # a gradient of zeros everywhere, or two cases alike, would pass without looking
    gradients = [str(case["gradient"]) for case in FILE["cases"]]
    assert len(set(gradients)) >= len(gradients) - 1 >= 21  # the entropy is no function of logp here
    assert FILE["trl"].startswith("1.16.")


def test_the_overlong_penalty_is_that_of_trl():
    ours = [grpo.overlong_penalty(length, longest=10, buffer=4) for length in range(1, 11)]
    assert ours == pytest.approx(FILE["overlong"], abs=CLOSE)


def test_leave_one_out_advantages_are_those_of_trl():
    rewards = torch.tensor(FILE["inputs"]["rewards"], dtype=torch.float64)
    expected = torch.tensor(FILE["leave_one_out"], dtype=torch.float64)
    assert (grpo.group_advantages(rewards, "none", baseline="loo") - expected).abs().max() < CLOSE
