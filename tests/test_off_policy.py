"""One-step off-policy: each step's replies are begun a step earlier, belong to their own seeds, and survive a stop.

vLLM is played by a stand-in whose replies say which seed they were asked for and which weights sampled them.
"""

from concurrent.futures import Future
from types import SimpleNamespace

import torch

from sampler import Reply
from vllm_sampler import OneStepOffPolicy

STEPS = 4


class Engine:
    """Replies [seed, version of the weights]; `begin` reads the weights at once, as VLLM.begin sends them at once."""

    def __call__(self, policy, prompts, n, *, seeds, **options):
        assert len(prompts) == len(seeds)
        ids = [torch.tensor([seed, policy.version]) for seed in seeds]
        return [[Reply(row, torch.tensor([-0.5, -0.25]), True) for _ in range(n)] for row in ids]

    def begin(self, policy, prompts, n, *, seeds, **options):
        future = Future()
        future.set_result(self(policy, prompts, n, seeds=seeds, **options))
        return future


ENCODER = SimpleNamespace(prompts=list)


def questions_of(rank):
    """questions(step) of one of two ranks: two records each, seeds 100·step + rank, and two more than that."""
    return lambda step: (["record", "record"], [100 * step + rank, 100 * step + rank + 2])


def train(sample, questions, first, last):
    """Steps first … last − 1: -> [(seeds, versions, off-policy?)]. Learning makes a new version of the weights."""
    seen = []
    for step in range(first, last):
        policy = SimpleNamespace(version=step)
        records, seeds = questions(step)
        replies = sample(policy, records, 2, seeds=seeds, temperature=1.0)
        assert [len(group) for group in replies] == [2, 2]
        ids = [group[0].ids.tolist() for group in replies]
        seen.append(([seed for seed, _ in ids], [version for _, version in ids], sample.off_policy))
    return seen


def expected(questions, step):
    """The first step has nobody to begin it earlier."""
    older = max(0, step - 1)
    return questions(step)[1], [older, older], step > 0


def test_replies_belong_to_the_seeds_of_their_own_step_and_to_weights_one_step_older():
    questions = questions_of(rank=0)
    sample = OneStepOffPolicy(Engine(), ENCODER, questions, 0, STEPS, {})
    assert train(sample, questions, 0, STEPS) == [expected(questions, step) for step in range(STEPS)]


def test_after_a_stop_every_rank_goes_on_with_the_replies_that_were_sampled_for_it():
    pending, ranks = {}, (1, 0)  # a checkpoint holds the replies of all ranks, in any order
    for rank in ranks:
        questions = questions_of(rank)
        sample = OneStepOffPolicy(Engine(), ENCODER, questions, 0, STEPS, {})
        train(sample, questions, 0, 2)
        pending |= dict(reversed(sample.to_json().items()))
    for rank in ranks:
        questions = questions_of(rank)
        sample = OneStepOffPolicy(Engine(), ENCODER, questions, 2, STEPS, pending)
        assert train(sample, questions, 2, STEPS) == [expected(questions, step) for step in (2, 3)]


def test_nothing_is_begun_after_the_last_step():
    questions = questions_of(rank=0)
    sample = OneStepOffPolicy(Engine(), ENCODER, questions, 0, 1, {})
    train(sample, questions, 0, 1)
    assert sample.to_json() == {}
