"""Our losses beside TRL's: the code of TRL 1.16 itself, on the same log-probs, loss and gradient.

    python -m venv .venv-trl && .venv-trl/bin/pip install -r requirements.txt 'trl>=1.16,<1.17'
    .venv-trl/bin/python bench/losses_trl.py

TRL's losses are methods of its trainers and ask a model for log-probs. Here a trainer's method is called on a stand-in
that has the settings it reads, and whose model answers with log-probs made up in this file. Two of TRL's formulas stand
in the middle of a long method (importance weights, advantages): those lines are cut out of it and run.

Writes bench/results/losses_trl.json: inputs, TRL's loss and TRL's gradient of every case, and the largest difference to
ours. tests/test_losses_trl.py compares with the file, so a change of ours is seen on machines without TRL.
"""

import inspect
import json
import math
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import torch
import trl
from trl import DPOTrainer, GRPOTrainer, RLOOTrainer  # before tests/ is on the path: it has a folder vllm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_losses_trl as ours  # noqa: E402

RESULT = ROOT / "bench/results/losses_trl.json"

# ---------------------------------------------------------------------------------------------------------------------
# Inputs: made up once, uneven on purpose


def made_up() -> dict:
    """Log-probs of 4 replies (two pairs) of up to 6 tokens, fp64; padding is 0, as TRL's masks expect numbers."""
    generator = torch.Generator().manual_seed(16)
    lengths = torch.tensor([6, 3, 5, 1])
    mask = torch.arange(6) < lengths[:, None]

    def noise(spread):
        return torch.randn(4, 6, generator=generator, dtype=torch.float64) * spread * mask

    logp = -noise(2.0).abs() - 0.1 * mask
    old = logp + noise(0.5)  # ratios from about 0.3 to 3: inside and outside of every bound
    return {
        "logp": logp,
        "old_logp": old,
        "ref_logp": logp + noise(0.4),
        "sampler_logp": old + noise(0.8),
        "advantage": torch.tensor([1.5, -0.5, -1.25, 0.75], dtype=torch.float64),
        "mask": mask,
        "ref": torch.tensor([[-9.5, -3.5], [-6.0, -2.5]], dtype=torch.float64),
        "entropy": noise(1.0).abs(),
        "rewards": torch.tensor([[1.5, 0.5, 0.0, 0.5], [0.5, 0.25, 1.5, 1.5]], dtype=torch.float64),
    }


# ---------------------------------------------------------------------------------------------------------------------
# TRL's side


def machine() -> SimpleNamespace:
    """In place of accelerate: one process."""
    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )  # fmt: skip


def trl_grpo(given: dict, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPOTrainer._compute_loss: -> (loss, d loss / d logp)."""
    logp = given["logp"].clone().requires_grad_()
    # mask_truncated_completions: TRL takes them out of the completion mask.
    whole = torch.tensor([number not in settings.get("truncated", []) for number in range(4)])
    mask, entropy = given["mask"].long() * whole[:, None], given["entropy"]
    bounds = settings.get("bounds")
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **options: (logp, entropy, None),
        loss_type=settings["loss_type"],
        importance_sampling_level=settings.get("level", "token"),
        epsilon_low=0.2,
        epsilon_high=settings.get("epsilon_high", 0.28),
        beta=settings.get("beta", 0.0),
        args=SimpleNamespace(
            delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
            steps_per_generation=1,
        ),
        max_completion_length=8,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=bounds is not None,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled="entropy_coef" in settings,
        use_adaptive_entropy=False,
        entropy_coef=settings.get("entropy_coef", 0.0),
        accelerator=machine(),
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    trainer.accelerator.sync_gradients = True
    nothing = torch.zeros(len(logp), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask, "completion_mask": mask,
        "advantages": given["advantage"], "old_per_token_logps": given["old_logp"],
        "ref_per_token_logps": given["ref_logp"], "num_items_in_batch": mask.sum().double(),
    }  # fmt: skip
    if bounds:
        inputs["importance_sampling_ratio"] = trl_importance(given, **bounds)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return loss.detach(), logp.grad


def run_lines(method, first: str, end: str, names: dict) -> dict:
    """Run the lines of a method from the one that holds `first` up to, not including, the one that holds `end`."""
    source = inspect.getsource(method)
    begin = source.index(first)
    begin = source.rindex("\n", 0, begin) + 1
    stop = source.rindex("\n", 0, source.index(end, begin)) + 1
    exec(textwrap.dedent(source[begin:stop]), names)
    return names


def trl_importance(given: dict, mode: str, low: float | None, high: float) -> torch.Tensor:
    """The lines of GRPOTrainer that compute the importance sampling ratio."""
    settings = SimpleNamespace(
        vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    names = {
        "torch": torch, "math": math, "self": settings, "mask": given["mask"].long(),
        "old_per_token_logps": given["old_logp"], "sampling_per_token_logps": given["sampler_logp"],
    }  # fmt: skip
    method = GRPOTrainer._generate_and_score_completions
    first, end = "per_token_logps_diff = (old_per_token_logps", "# Compute the per-token log probabilities for the ref"
    return run_lines(method, first, end, names)["vllm_importance_sampling_ratio"]


def trl_leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """The lines of RLOOTrainer that compute advantages: (P, G) -> (P, G)."""
    grouped = {"grouped_rewards": rewards, "rewards": rewards.flatten(), "num_generations": rewards.shape[1]}
    method = RLOOTrainer._generate_and_score_completions
    names = run_lines(method, "scorable_counts =", "# Normalize advantages over", {"torch": torch} | grouped)
    return names["advantages"].view(rewards.shape)


def trl_overlong() -> list[float]:
    """TRL's reward of replies of 1 to 10 tokens, where 10 is the longest and 4 the buffer."""
    from trl.rewards import get_soft_overlong_punishment

    return get_soft_overlong_punishment(10, 4)([[0] * length for length in range(1, 11)])


def trl_dpo(given: dict, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """DPOTrainer._compute_loss of the two pairs: -> (loss, d loss / d logp). TRL has all chosen replies first."""
    logp = given["logp"].clone().requires_grad_()
    order = [0, 2, 1, 3]
    mask = given["mask"][order].long()
    after_prompt = torch.cat([torch.zeros(4, 1, dtype=torch.long), mask], 1)  # one prompt token
    outputs = SimpleNamespace(
        log_probs=logp[order] * mask, entropy=torch.zeros(4, 6), mean_logits=torch.zeros(4, 6),
        is_top1=torch.zeros(4, 6, dtype=torch.bool),
    )  # fmt: skip
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=machine(), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", use_weighting=False, beta=0.1,
        label_smoothing=settings.get("label_smoothing", 0.0), loss_types=settings["loss_types"],
        loss_weights=settings["loss_weights"], _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    inputs = {
        "input_ids": after_prompt, "attention_mask": after_prompt, "completion_mask": after_prompt,
        "ref_chosen_logps": given["ref"][:, 0], "ref_rejected_logps": given["ref"][:, 1],
    }  # fmt: skip
    loss = DPOTrainer._compute_loss(trainer, lambda **arguments: outputs, inputs, return_outputs=False)
    loss.backward()
    return loss.detach(), logp.grad


# ---------------------------------------------------------------------------------------------------------------------
# Cases: our settings, and TRL's for the same thing

ICEPOP = {"mode": "token_mask", "low": 0.5, "high": 1.6}
GRPO_CASES = {
    "clip, sequence mean": ({"normalizer": "sequence"}, {"loss_type": "grpo"}),
    "clip, token mean, KL": ({"normalizer": "token", "kl": 0.04}, {"loss_type": "dapo", "beta": 0.04}),
    "clip, token mean, entropy bonus": (
        {"normalizer": "token", "entropy_bonus": 0.02}, {"loss_type": "dapo", "entropy_coef": 0.02},
    ),
    "clip, constant": ({"normalizer": "constant"}, {"loss_type": "dr_grpo"}),
    "clip, truncated replies masked, sequence mean": (
        {"normalizer": "sequence", "kl": 0.04, "truncated": [0, 3]},
        {"loss_type": "grpo", "beta": 0.04, "truncated": [0, 3]},
    ),
    "clip, truncated replies masked, token mean": (
        {"normalizer": "token", "kl": 0.04, "truncated": [0, 3]},
        {"loss_type": "dapo", "beta": 0.04, "truncated": [0, 3]},
    ),
    "clip, ratio of the sequence": (
        {"normalizer": "sequence", "ratio": "sequence"}, {"loss_type": "grpo", "level": "sequence"},
    ),
    "cispo": ({"normalizer": "token", "surrogate": "cispo"}, {"loss_type": "cispo", "epsilon_high": 1.28}),
    "cispo, KL": (
        {"normalizer": "token", "surrogate": "cispo", "kl": 0.04},
        {"loss_type": "cispo", "epsilon_high": 1.28, "beta": 0.04},
    ),
    "sapo": ({"normalizer": "sequence", "surrogate": "sapo"}, {"loss_type": "sapo"}),
    "sapo, ratio of the sequence": (
        {"normalizer": "sequence", "surrogate": "sapo", "ratio": "sequence"},
        {"loss_type": "sapo", "level": "sequence"},
    ),
    "token weights, truncated": (
        {"normalizer": "sequence", "importance": {"kind": "token", "cap": 1.6}},
        {"loss_type": "grpo", "bounds": {"mode": "token_truncate", "low": None, "high": 1.6}},
    ),
    "token weights, truncated at both ends": (
        {"normalizer": "sequence", "importance": {"kind": "token", "cap": 1.6, "floor": 0.5}},
        {"loss_type": "grpo", "bounds": {"mode": "token_truncate", "low": 0.5, "high": 1.6}},
    ),
    "token weights, masked (IcePop)": (
        {"normalizer": "token", "importance": {"kind": "token", "cap": 1.6, "floor": 0.5, "outside": "mask"}},
        {"loss_type": "dapo", "bounds": ICEPOP},
    ),
    "sequence weights, truncated": (
        {"normalizer": "sequence", "importance": {"kind": "sequence", "cap": 1.6}},
        {"loss_type": "grpo", "bounds": {"mode": "sequence_truncate", "low": None, "high": 1.6}},
    ),
    "sequence weights, masked": (
        {"normalizer": "sequence", "importance": {"kind": "sequence", "cap": 1.6, "outside": "mask"}},
        {"loss_type": "grpo", "bounds": {"mode": "sequence_mask", "low": None, "high": 1.6}},
    ),
    "cispo with IcePop": (
        {"normalizer": "token", "surrogate": "cispo",
         "importance": {"kind": "token", "cap": 1.6, "floor": 0.5, "outside": "mask"}},
        {"loss_type": "cispo", "epsilon_high": 1.28, "bounds": ICEPOP},
    ),
}  # fmt: skip
MPO = {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
DPO_CASES = {
    "DPO": ({"loss": "dpo"}, {"loss_types": ["sigmoid"], "loss_weights": [1.0]}),
    "DPO + SFT (SPECS)": ({"loss": "dpo+sft"}, {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
    "IPO": ({"loss": "dpo", "preference": "ipo"}, {"loss_types": ["ipo"], "loss_weights": [1.0]}),
    "BCO alone": (
        {"loss": "dpo", "preference_weight": 0.0, "quality_weight": 1.0},
        {"loss_types": ["bco_pair"], "loss_weights": [1.0]},
    ),
    "MPO": ({"loss": "dpo+sft", "preference_weight": 0.8, "quality_weight": 0.2, "sft_weight": 1.0}, MPO),
}


def main():
    assert trl.__version__.startswith("1.16."), f"compare with TRL 1.16, not {trl.__version__}"
    given = made_up()
    cases = []
    for kind, table, theirs in (("grpo", GRPO_CASES, trl_grpo), ("dpo", DPO_CASES, trl_dpo)):
        for name, (our_settings, trl_settings) in table.items():
            loss, gradient = theirs(given, trl_settings)
            case = {"kind": kind, "name": name, "ours": our_settings, "trl": trl_settings}
            cases.append(case | {"loss": loss.item(), "gradient": gradient.tolist()})
    result = {
        "trl": trl.__version__,
        "torch": torch.__version__,
        "inputs": {name: value.tolist() for name, value in given.items()},
        "leave_one_out": trl_leave_one_out(given["rewards"]).tolist(),
        "overlong": trl_overlong(),
        "cases": cases,
    }
    for case in cases:
        case["largest_difference"] = ours.difference(result["inputs"], case)
        print(f"{case['kind']:5} {case['name']:40} {case['largest_difference']:.1e}")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
