"""Exploration: how many ways a policy sees to go on while it replies.

    entropy     nats; of the whole distribution that a token of a reply was sampled from
    rbf         rollout branching factor: how many tokens that distribution's nucleus holds, the smallest set of
                likeliest tokens whose mass reaches 0.95 (arXiv 2508.07534)

Both are read off the model itself by one more forward over the sampled replies, the prompt once, whatever has sampled
them. The distribution is the one at the sampling temperature, before top-k and top-p filter it.

Legend: G replies of a prompt, T tokens of a reply (the end token included), N tokens of all replies, V vocabulary.
"""

from functools import partial

import torch

import model

NUCLEUS = 0.95  # mass of the nucleus whose tokens are counted
FORWARD_TOKENS = 16384  # of replies in one forward; a longer reply has one of its own


def nucleus_sizes(logits: torch.Tensor, top_p: float = NUCLEUS) -> torch.Tensor:
    """How many tokens the smallest set of likeliest tokens holds whose mass reaches top_p: logits (N, V) -> (N,)."""
    ordered = logits.softmax(-1).sort(-1, descending=True).values
    # A token belongs to it if what is likelier does not reach the mass yet; so the first always does.
    return (ordered.cumsum(-1) - ordered < top_p).sum(-1)


def entropies(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of each distribution, exact; impossible tokens (-inf) add nothing: logits (N, V) -> (N,)."""
    return torch.special.entr(logits.softmax(-1)).sum(-1)


def spread(logits: torch.Tensor, top_p: float = NUCLEUS) -> torch.Tensor:
    """Entropy and nucleus size side by side: (N, V) -> (N, 2)."""
    return torch.stack([entropies(logits), nucleus_sizes(logits, top_p).float()], 1)


@torch.no_grad()
def of_tokens(
    policy: model.Policy, groups: list, temperature: float = 1.0, top_p: float = NUCLEUS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Of every token of all replies: -> (entropy, nucleus size, mask), all (B, T); groups as for model.pack."""
    batch = model.pack(groups).to(policy.forbidden.device)
    values = policy(batch, temperature, statistics=partial(spread, top_p=top_p))
    mask = model.unpack(torch.ones(len(values), dtype=torch.bool, device=values.device), batch.cell, False)
    return model.unpack(values[:, 0], batch.cell), model.unpack(values[:, 1], batch.cell), mask


def of_replies(
    policy: model.Policy, prompt: model.Prompt, replies: list[torch.Tensor], temperature: float = 1.0
) -> dict[str, list[float]]:  # fmt: skip
    """{"entropy", "rbf"}: of each reply (T,) to one prompt the mean over its tokens.

    Prompts do not share a forward: what is measured of a record depends on nothing but the record.
    """
    at_once = max(1, FORWARD_TOKENS // max(len(reply) for reply in replies))
    found = {"entropy": [], "rbf": []}
    for start in range(0, len(replies), at_once):
        *values, mask = of_tokens(policy, [(prompt, replies[start : start + at_once])], temperature)
        for name, value in zip(found, values, strict=True):
            found[name] += (value.sum(1) / mask.sum(1)).tolist()  # outside the mask all is 0
    return found
