"""Rollouts: a record with its group of replies, their texts and scores; what a batch of them amounts to.

Legend: P prompts of a step over all ranks, G replies each; prompt p belongs to rank p % world.size. Lists are
[record][reply].
"""

from typing import NamedTuple

import torch


class Rollout(NamedTuple):
    """A record with its G replies: group (its prompt and their ids, as model.pack takes them), the replies as the
    sampler gave them, their texts, and what scorer and score_replies made of each."""

    record: dict
    group: tuple
    replies: list
    texts: list
    scores: list


def gather_rewards(world, scores, P, G) -> torch.Tensor:
    """(P, G) rewards of the whole batch, on every rank: prompt p belongs to rank p % world.size."""
    everyone = torch.zeros(P, G)
    for rank, part in enumerate(world.gather([[score["reward"] for score in group] for group in scores])):
        everyone[rank :: world.size] = torch.tensor(part)
    return everyone


def batch_metrics(world, scores, replies, tokens, signal, P, G) -> dict:
    """Means over all replies of the batch, on every rank. tokens: of the whole batch; signal: groups that have one."""
    # Sums first, then one division: ranks may hold different numbers of tokens.
    flat_scores = [score for group in scores for score in group]
    flat_replies = [reply for group in replies for reply in group]
    names = [name for name in ("reward", "accuracy", "format", "overlong") if name in flat_scores[0]]
    sums = {name: sum(score[name] for score in flat_scores) for name in names}
    sums["length"] = sum(len(reply.ids) for reply in flat_replies)
    sums["finished"] = sum(reply.finished for reply in flat_replies)
    metrics = {name: total / (P * G) for name, total in zip(sums, world.sum(*sums.values()), strict=True)}
    # The mean of −log p over sampled tokens is an unbiased estimate of the entropy.
    surprise = -sum(reply.logps.sum().item() for reply in flat_replies)
    metrics["entropy"], metrics["useful_groups"] = world.sum(surprise / tokens, signal / P)
    return metrics


def shown_replies(record, texts, scores, count=2) -> list[dict]:
    """Some replies of a group, for samples.jsonl."""
    pairs = list(zip(texts, scores, strict=True))[:count]
    return [{"id": record["id"], "source": record["source"], "reply": text, **score} for text, score in pairs]


def asked_and_said(records, texts) -> list[dict]:
    """Every question of a step with all its replies, for skipped.jsonl."""
    pairs = zip(records, texts, strict=True)
    return [{"where": record["_where"], "id": record["id"], "replies": group} for record, group in pairs]
