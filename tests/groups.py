"""What several test files need: groups of prompts and replies, and transformers' own numbers to compare them with.

The plain side of every comparison is the Hugging Face model itself on `[prompt + one reply]`, with its own positions
and masks. The weights are rough (conftest.py), so that a wrong position or mask shows far above rounding.
"""

import math

import pytest
import torch
from conftest import FAMILIES

EXACT = {"rtol": 0, "atol": 1e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)

REPLIES = (  # eight lengths; the fourth is the end token alone
    "A",
    "2 looks dark, 1 looks light, so 2 was below.",
    "<think>The first piece is lighter.</think><answer>B</answer>",
    "",
    "Answer: C",
    '{"reason": "1 is above 2", "answer": "D"}',
    "above",
    "I see that piece 1 is bright; so it was the upper one. \\boxed{A}",
)
# case: (record, number of replies) of every group; the records fixture says which is which
CASES = {
    "one reply on a picture": [(0, 1)],
    "two replies on three pictures between words": [(2, 2)],
    "eight replies on text only": [(1, 8)],
    "eight replies on a picture": [(3, 8)],
    "text and pictures in one batch": [(3, 3), (1, 2), (2, 1), (0, 8)],
}


def groups_of(encoder, records, case):
    """Groups of a case; every group takes its replies from another place of REPLIES."""
    texts = REPLIES * 2
    groups = []
    for row, (index, count) in enumerate(case):
        replies = [encoder.encode_reply(text) for text in texts[3 * row : 3 * row + count]]
        groups.append((encoder.prompt(records[index]), replies))
    return groups


def vocabulary_of(policy):
    return policy.hf.config.get_text_config().vocab_size


def ids_of(sampled):
    """Lists (P) of lists (n) of lists of token ids."""
    return [[reply.ids.tolist() for reply in replies] for replies in sampled]


def vision_names(policy):
    """Names of the parameters that only pictures run through."""
    vision = {weight for part in policy.family.vision(policy.hf) for weight in part.parameters()}
    return {name for name, weight in policy.named_parameters() if weight in vision}


# ---------------------------------------------------------------------------------------------------------------------
# transformers alone


def picture_inputs(encoder, prompt, ids):
    """Arguments of a Hugging Face model's own forward or generate on ids (1, L) that begin with the prompt's."""
    if prompt.pixels is None:
        return {}
    pictures = {"pixel_values": prompt.pixels}
    if encoder.family.position_axes == 3:  # it works out M-RoPE's positions from these
        kinds = torch.zeros_like(ids)
        kinds[0, : len(prompt.ids)] = prompt.ids == encoder.image_id
        pictures |= {"image_grid_thw": prompt.grids, "mm_token_type_ids": kinds}
    return pictures


def plain_log_probs(policy, encoder, prompt, reply, temperature=1.0):
    """(T,) log-probs of a reply from transformers alone: one row, one reply, its own positions, no row of ours."""
    ids = torch.cat([prompt.ids, reply])[None]
    outputs = policy.hf(input_ids=ids, **picture_inputs(encoder, prompt, ids))
    logits = outputs.logits[0, len(prompt.ids) - 1 : -1] / temperature
    logits = logits.index_fill(-1, torch.tensor(encoder.forbidden), -math.inf)
    return logits.log_softmax(-1).gather(-1, reply[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients


def gradients(policy, value):
    """{name: gradient or None} of a number."""
    policy.zero_grad(set_to_none=True)
    value.backward()
    found = {name: weight.grad for name, weight in policy.named_parameters()}
    policy.zero_grad(set_to_none=True)
    return found


def assert_same_gradients(found, expected):
    assert any(gradient is not None for gradient in expected.values())
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert gradient.abs().max() > 0, f"{name} has no gradient at all, so that comparing it shows nothing"
            error = (found[name] - gradient).abs().max() / gradient.abs().max()
            assert error < 1e-5, f"{name}: {error:.1e} of its largest gradient"
