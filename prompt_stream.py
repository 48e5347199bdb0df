"""Which prompts a step asks: an endless stream of shuffled epochs, read in turn.

A step takes P prompts, and more where some are replaced (dynamic sampling). With weights, a prompt whose last group
taught little is passed over in most epochs: a curriculum that follows the policy. The order is arithmetic of (seed,
position, weights); what a checkpoint must keep is how far the stream was read, and the weights.

Legend: P prompts of a step; slots, the places of a step's batch: slot p belongs to rank p % world.size.
"""

import random
from itertools import islice

from records import epoch_order

# A prompt that teaches nothing today comes back in every tenth epoch: it may have been learned, or forgotten.
LEAST_CHANCE = 0.1


class PromptStream:
    """The prompts of a run, step by step; the same on every rank, of which each gets its share.

    records: all there are. state: `to_json` of an interrupted run, {} of a new one. weighted: pass prompts over by the
    weights that `weigh` was given; a prompt that has none yet is never passed over.
    """

    def __init__(self, records: list[dict], seed: int, prompts: int, world, state: dict, weighted: bool = False):
        self.records, self.seed, self.prompts, self.world = records, seed, prompts, world
        self.beyond = state.get("refilled", 0)  # positions that earlier steps have read beyond `prompts` each
        self.weights = {int(index): weight for index, weight in state.get("prompt_weights", {}).items()}
        self.weighted, self.new_weights = weighted, {}

    def questions(self, step: int, asked: int = 0, slots=None) -> tuple[list[dict], list[int]]:
        """This rank's records for some slots of a step's batch, and a seed for each; of the first slot if none is its.

        asked: prompts that this step has taken before. slots: ascending; None: all of them. A pure function of its
        arguments until `end_step`, also for steps that are still to come.
        """
        slots = range(self.prompts) if slots is None else slots
        taken = self.take(step, asked, len(slots))
        first_seed = (self.seed * 10**6 + step) * 10**6 + asked
        own = [place for place, slot in enumerate(slots) if slot % self.world.size == self.world.rank] or [0]
        return [self.records[taken[place][1]] for place in own], [first_seed + place for place in own]

    def take(self, step: int, asked: int, wanted: int) -> list[tuple[int, int]]:
        """(position in the stream, index of the record) of the prompts after the first `asked` of a step."""
        start = step * self.prompts + self.beyond
        if self.weighted:
            return list(islice(self.accepted(start), asked, asked + wanted))
        indices = epoch_order(self.seed, len(self.records), start + asked, wanted)
        return list(enumerate(indices, start + asked))

    def accepted(self, start: int):
        """Yield (position, index) from a position on, without the prompts that are passed over there."""
        size = len(self.records)
        while True:
            # The rest of an epoch at a time: shuffling it again for every position would take long.
            end = start + size - start % size
            for position, index in enumerate(epoch_order(self.seed, size, start, end - start), start):
                chance = max(LEAST_CHANCE, self.weights.get(index, 1.0))
                if random.Random(f"{self.seed}/{position}/passed over").random() < chance:
                    yield position, index
            start = end

    def weigh(self, step: int, asked: int, slots, weights: dict[int, float]) -> None:
        """Weights in [0, 1] of prompts that `questions` gave for some slots: {slot of this rank: weight}.

        They count from the next step on: the order of a step does not change while it is read.
        """
        if not self.weighted:
            return
        everyone = {slot: weight for part in self.world.gather(weights) for slot, weight in part.items()}
        for slot, (_, index) in zip(slots, self.take(step, asked, len(slots)), strict=True):
            self.new_weights[index] = everyone[slot]

    def end_step(self, step: int, asked: int) -> int:
        """The step has asked so many prompts, the next one goes on behind them. -> prompts that were passed over."""
        last_position, _ = self.take(step, asked - 1, 1)[0]
        read = last_position + 1 - (step * self.prompts + self.beyond)
        self.beyond += read - self.prompts
        self.weights |= self.new_weights
        self.new_weights = {}
        return read - asked

    def to_json(self) -> dict:
        """What a checkpoint must keep."""
        weights = {str(index): weight for index, weight in self.weights.items()}
        return {"refilled": self.beyond, "prompt_weights": weights}
