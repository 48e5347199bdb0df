"""prompt_stream.py: which prompts a step asks, in what order, and how that goes on after a kill."""

import json

import pytest
import torch

import prompt_stream
import training
from prompt_stream import PromptStream
from records import epoch_order

ALONE = training.World(0, 1, torch.device("cpu"))
RECORDS = [{"id": number} for number in range(8)]


class Ranks:
    """Stands in for a World of several ranks; gather gives what the test says they had."""

    def __init__(self, rank, size, everyone=None):
        self.rank, self.size, self.everyone = rank, size, everyone

    def gather(self, mine):
        return self.everyone


def stream(weighted=False, state=None, world=ALONE, seed=3, prompts=4):
    return PromptStream(RECORDS, seed, prompts, world, state or {}, weighted)


def ids(questions):
    return [record["id"] for record in questions[0]]


def read_steps(one, steps, weight_of=None, first=0, asked=4):
    """The ids of some steps, each prompt weighed by weight_of(id)."""
    found = []
    for step in range(first, first + steps):
        found.append(ids(one.questions(step)))
        if weight_of:
            one.weigh(step, 0, range(4), dict(enumerate(map(weight_of, found[-1]))))
        one.end_step(step, asked)
    return found


def test_without_weights_it_is_the_shuffled_epochs_in_turn():
    assert sum(read_steps(stream(), 6), []) == epoch_order(3, 8, 0, 24)


def test_a_question_of_a_later_step_is_what_that_step_will_ask():
    one = stream()
    early = one.questions(5)
    read_steps(one, 5)
    assert one.questions(5) == early


def test_prompts_of_a_refill_follow_and_the_next_step_goes_on_behind_them():
    one = stream()
    assert ids(one.questions(0)) == epoch_order(3, 8, 0, 4)
    assert ids(one.questions(0, 4, [1, 3])) == epoch_order(3, 8, 4, 2)
    one.end_step(0, 6)
    assert ids(one.questions(1)) == epoch_order(3, 8, 6, 4)
    assert one.to_json()["refilled"] == 2


def test_seeds_differ_between_prompts_steps_refills_and_runs():
    one, two = stream(), stream(seed=4)
    every = [one.questions(0)[1], one.questions(0, 4, [1, 3])[1], one.questions(1)[1], two.questions(0)[1]]
    assert len(set(sum(every, []))) == 14 and every[0][0] == 3 * 10**12


def test_each_rank_asks_for_its_own_slots_and_for_the_first_if_it_has_none():
    whole = stream().questions(2)
    halves = [stream(world=Ranks(rank, 2)).questions(2) for rank in range(2)]
    assert [ids(half) for half in halves] == [ids(whole)[0::2], ids(whole)[1::2]]
    assert [half[1] for half in halves] == [whole[1][0::2], whole[1][1::2]]
    refill = [stream(world=Ranks(rank, 2)).questions(0, 4, [1, 3]) for rank in range(2)]
    assert ids(refill[1]) == epoch_order(3, 8, 4, 2) and ids(refill[0]) == epoch_order(3, 8, 4, 1)


def test_a_prompt_of_weight_1_or_of_none_is_never_passed_over():
    assert sum(read_steps(stream(weighted=True), 6, lambda name: 1.0), []) == epoch_order(3, 8, 0, 24)
    assert sum(read_steps(stream(weighted=True), 2), []) == epoch_order(3, 8, 0, 8)


def test_prompts_come_as_often_as_their_weights_say_and_the_least_in_a_tenth_of_the_epochs():
    weights = [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]
    asked = sum(read_steps(stream(weighted=True), 1500, weights.__getitem__), [])
    share = torch.tensor(asked).bincount(minlength=8) / len(asked)
    # of (4 + 2 * 0.5 + 2 * 0.1) = 5.2
    expected = torch.tensor([1.0] * 4 + [0.5] * 2 + [0.1] * 2) / 5.2
    assert (share - expected).abs().max() < 0.012  # four standard deviations of 6,000 draws: less than 0.02


def test_weights_count_from_the_next_step_on():
    one = stream(weighted=True)
    before = one.questions(0, 4)
    one.weigh(0, 0, range(4), dict.fromkeys(range(4), 0.0))
    assert one.questions(0, 4) == before
    one.end_step(0, 4)
    assert sorted(one.weights.values()) == [0.0] * 4 and not one.new_weights


def test_what_was_passed_over_is_counted_and_not_asked_again():
    one = stream(weighted=True)
    epoch = epoch_order(3, 8, 0, 8)
    one.weigh(0, 0, range(4), dict.fromkeys(range(4), 0.0))
    one.weigh(0, 4, range(4), dict.fromkeys(range(4), 1.0))
    assert one.end_step(0, 8) == 0  # a whole epoch
    positions = [position for position, _ in one.take(1, 0, 6)]
    assert one.end_step(1, 6) == positions[-1] + 1 - 8 - 6 > 0
    assert one.take(2, 0, 1)[0][0] > positions[-1]
    asked = [index for _, index in stream(weighted=True, state={"prompt_weights": one.to_json()["prompt_weights"]})
             .take(0, 0, 40)]  # fmt: skip
    assert asked.count(epoch[7]) > 2 * asked.count(epoch[0])


def test_a_stream_that_was_killed_goes_on_as_if_it_had_not(tmp_path):
    weights = [0.1, 0.9, 0.2, 0.7, 0.0, 1.0, 0.4, 0.3]
    whole = read_steps(stream(weighted=True), 40, weights.__getitem__)
    one = stream(weighted=True)
    first = read_steps(one, 13, weights.__getitem__)
    state = json.loads(json.dumps(one.to_json()))  # as a checkpoint keeps it
    rest = read_steps(stream(weighted=True, state=state), 27, weights.__getitem__, first=13)
    assert first + rest == whole


def test_every_rank_learns_the_weights_of_all():
    everyone = [{0: 0.1, 2: 0.3}, {1: 0.2, 3: 0.4}]
    streams = [stream(weighted=True, world=Ranks(rank, 2, everyone)) for rank in range(2)]
    for one in streams:
        one.weigh(0, 0, range(4), {})
        one.end_step(0, 4)
    first = epoch_order(3, 8, 0, 4)
    assert streams[0].weights == streams[1].weights == dict(zip(first, [0.1, 0.2, 0.3, 0.4], strict=True))


def test_weights_of_nothing_only_still_end(monkeypatch):
    assert prompt_stream.LEAST_CHANCE == 0.1
    one = stream(weighted=True, state={"prompt_weights": {str(index): 0.0 for index in range(8)}})
    assert len(ids(one.questions(0))) == 4


@pytest.mark.parametrize("size", [1, 3])
def test_data_smaller_than_a_batch_is_asked_several_times(size):
    one = PromptStream(RECORDS[:size], 0, 4, ALONE, {}, weighted=True)
    assert [index for _, index in one.take(0, 0, 7)] == epoch_order(0, size, 0, 7)
