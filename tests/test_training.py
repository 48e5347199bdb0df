"""training.py and model.Cost: flags, schedules, micro-batches and updates by hand; matrix products."""

import argparse
import random
import time

import pytest
import torch
from conftest import CPU
from groups import CASES, every_family, groups_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model
import training
from records import DataError

# ---------------------------------------------------------------------------------------------------------------------
# Flags


ACCEPTED = [
    (training.integer("[1, inf)"), "1", 1),
    (training.integer("[0, inf)"), "0", 0),
    (training.integer("[-3, 4)"), "-3", -3),
    (training.integer("[1, inf)"), "9" * 400, 10**400 - 1),  # too large for a float
    (training.real("(0, 1]"), "1", 1.0),
    (training.real("(0, 1]"), "1e-9", 1e-9),
    (training.real("[0, 1)"), "0", 0.0),
    (training.real("(-inf, inf)"), "-2.5", -2.5),
]


@pytest.mark.parametrize("read, text, value", ACCEPTED)
def test_a_number_in_its_interval_is_read(read, text, value):
    found = read(text)
    assert found == value and type(found) is type(value)


REFUSED = [
    *[(training.real("[0, inf)"), text) for text in ("nan", "-nan", "inf", "-inf", "1e999", "-1")],
    *[(training.real("(-inf, inf)"), text) for text in ("inf", "-inf", "nan")],
    *[(training.real("(0, 1]"), text) for text in ("0", "1.0001", "-0.5", "2")],
    *[(training.real("[0, 1)"), text) for text in ("1", "-1e-9")],
    *[(training.integer("[1, inf)"), text) for text in ("0", "-7")],
    *[(training.integer("[-3, 4)"), text) for text in ("-4", "4", "9" * 40)],
]


@pytest.mark.parametrize("read, text", REFUSED)
def test_a_number_out_of_its_interval_is_refused(read, text):
    with pytest.raises(argparse.ArgumentTypeError, match=rf"^must lie in [\[(].*[\])], not {text}$"):
        read(text)


@pytest.mark.parametrize("text", ["", "many", "1.5", "nan", "1e3", "0x10", "1_000", " 5", "５"])
def test_what_is_no_whole_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be a whole number, not {text}$"):
        training.integer("[1, inf)")(text)


@pytest.mark.parametrize("text", ["", "many", "1,5", "--", "1_0.0", " 1", "１", "0x1p3"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"^must be a number, not {text}$"):
        training.real("(0, 1]")(text)


@pytest.fixture
def parser():
    parser = training.Parser("What it does.\n\nMore of it.")
    parser.add_argument("--steps", type=training.integer("[1, inf)"), default=17, help="updates")
    parser.add_argument("--top-p", type=training.real("(0, 1]"), default=1.0, help="nucleus")
    return parser


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--top-p", "2"], "argument --top-p: must lie in (0, 1], not 2"),
        (["--top-p", "nan"], "argument --top-p: must lie in (0, 1], not nan"),
        (["--steps", "0"], "argument --steps: must lie in [1, inf), not 0"),
        (["--steps", "ten"], "argument --steps: must be a whole number, not ten"),
        (["--steps", "a\nb"], "argument --steps: holds a control character: a\\nb"),
        (["--step", "3"], "unrecognized arguments: --step 3"),  # no abbreviations
        (["--steps"], "argument --steps: expected one argument"),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(parser, capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(argv)
    printed = capsys.readouterr()
    assert caught.value.code == 2
    assert printed.err == f"error: {message}\n" and not printed.out


def test_help_shows_every_default(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert "What it does." in printed and "17" in printed and "1.0" in printed


def test_the_training_flags_reach_model_load(parser):
    training.add_training_flags(parser)
    asked = "--dtype fp32 --attn sdpa --max-pixels 900 --freeze-vision --gradient-checkpointing on --shard grad"
    args = parser.parse_args([*asked.split(), "--replicas", "2", "--offload", "--accumulate", "shards"])
    assert training.load_options(args) == {
        "dtype": "fp32",
        "attn": "sdpa",
        "max_pixels": 900,
        "max_image_pixels": 2**26,
        "freeze_vision": True,
        "gradient_checkpointing": "on",
        "sharding": training.Sharding("grad", replicas=2, offload=True, accumulate="shards"),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Optimiser


@pytest.mark.parametrize(
    "step, schedule, warmup, rate",
    [
        (0, "linear", 4, 0.5e-3),  # 10 updates with a peak of 2e-3; a quarter, two quarters, …
        (1, "linear", 4, 1.0e-3),
        (3, "linear", 4, 2.0e-3),
        (4, "linear", 4, 2.0e-3),  # … then 6/6, 5/6, … of it
        (5, "linear", 4, 2.0e-3 * 5 / 6),
        (9, "linear", 4, 2.0e-3 / 6),
        (0, "linear", 0, 2.0e-3),
        (7, "linear", 0, 0.6e-3),
        (0, "constant", 0, 2.0e-3),
        (9, "constant", 0, 2.0e-3),
        (2, "constant", 5, 1.2e-3),
        (5, "constant", 5, 2.0e-3),
        (9, "linear", 10, 2.0e-3),
    ],
)
def test_learning_rates_by_hand(step, schedule, warmup, rate):
    assert training.learning_rate(step, 10, 2e-3, schedule, warmup) == pytest.approx(rate, rel=1e-12)


def test_micro_batches_by_hand():
    # the longest first: beside 10 there is no space for 7; 7 + 3 + 3 = 13
    assert training.micro_batches(CPU, [3, 10, 7, 3], 14) == [[1], [2, 0, 3]]
    assert training.micro_batches(CPU, [3, 10, 7, 3], 12) == [[1], [2, 0], [3]]


def test_micro_batches_count_what_pack_feeds_and_the_patches_of_pictures():
    def group(prompt_length, *reply_lengths, grids=None):
        positions = torch.zeros(3, prompt_length)
        prompt = model.Prompt(torch.zeros(prompt_length).long(), positions, prompt_length, None, grids, [])
        return prompt, [torch.zeros(length).long() for length in reply_lengths]

    groups = [group(2, 5, 4), group(9, 2), group(6, 2), group(2, 2)]
    assert model.group_sizes(groups) == [9, 10, 7, 3], "2 + 4 + 3 and so on: the last token of a reply is not fed"
    assert model.pack([groups[0], groups[2]]).ids.numel() == 16
    assert training.micro_batches(CPU, model.group_sizes(groups), 16) == [[1], [0, 2], [3]]

    # Pictures pass through a tower's blocks: 1 x 2 x 2 and 1 x 1 x 1 patches make 7 + 5 = 12.
    groups[2] = group(6, 2, grids=torch.tensor([[1, 2, 2], [1, 1, 1]]))
    assert model.group_sizes(groups) == [9, 10, 12, 3]
    assert training.micro_batches(CPU, model.group_sizes(groups), 16) == [[2], [1], [0, 3]]
    assert training.micro_batches(CPU, model.group_sizes(groups), 22) == [[2, 1], [0, 3]]


@pytest.mark.parametrize("budget", [1, 40, 64, 100, 1000])
def test_micro_batches_hold_every_group_once_within_the_budget(budget):
    random_sizes = random.Random(8)
    sizes = [random_sizes.randint(2, 50) for _ in range(41)] + [64]
    batches = training.micro_batches(CPU, sizes, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(42))
    for batch in batches:
        fed = sum(sizes[index] for index in batch)
        assert fed <= budget or len(batch) == 1, "only a group that is too large by itself may exceed it, alone"
    # The first group of a batch did not fit into the batch before it: otherwise there would be fewer.
    for one, other in zip(batches, batches[1:], strict=False):
        assert sum(sizes[index] for index in one) + sizes[other[0]] > budget


def test_a_rank_with_less_to_do_gets_empty_micro_batches():
    class OtherRankHasFive:
        def gather(self, count):
            return [count, 5]

    batches = training.micro_batches(OtherRankHasFive(), [4, 4, 9], 8)
    assert len(batches) == 5 and batches[2:] == [[], [], []] and batches[0] == [2]
    assert training.micro_batches(OtherRankHasFive(), [], 8) == [[]] * 5


def by_hand(gradient):
    """A layer of two weights, both 1, with a gradient set by hand."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    layer.weight.grad = torch.tensor([gradient])
    return layer, torch.optim.SGD(layer.parameters(), lr=99.0)


def test_an_update_clips_the_norm_sets_the_rate_and_clears_the_gradient():
    layer, optimizer = by_hand([3.0, -4.0])  # norm 5, clipped to 0.5: (0.3, -0.4); rate 2
    assert training.update(layer, optimizer, 2.0, 0.5) == pytest.approx(5.0)
    assert layer.weight[0].tolist() == pytest.approx([0.4, 1.8], abs=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("max_norm", [0.0, 5.5])
def test_an_update_leaves_small_gradients_and_those_nobody_wants_clipped(max_norm):
    layer, optimizer = by_hand([3.0, -4.0])
    assert training.update(layer, optimizer, 0.1, max_norm) == pytest.approx(5.0)
    assert layer.weight[0].tolist() == pytest.approx([0.7, 1.4], abs=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs and seconds


def attention_of_tower(vision, family, grid):
    """FLOPs of attention in a vision tower over one picture: 4 per query, key and width."""
    t, h, w = grid
    if family == "internvl":  # every tile has a class token
        return 4 * vision.hidden_size * vision.num_hidden_layers * t * (h * w + 1) ** 2
    whole = (h * w) ** 2
    windows = sum(min(8, h - i) ** 2 * min(8, w - j) ** 2 for i in range(0, h, 8) for j in range(0, w, 8))
    blocks = [whole] * vision.depth
    if family == "qwen2_5_vl":
        blocks = [whole if i in vision.fullatt_block_indexes else windows for i in range(vision.depth)]
    width = vision.embed_dim if family == "qwen2_vl" else vision.hidden_size
    return 4 * width * sum(blocks)


@pytest.mark.parametrize("case", CASES)
@every_family
def test_the_flops_of_the_formula_are_those_that_torch_counts(models, records, family, case):
    """Linear layers are counted by torch; what attention adds is worked out here, token by token."""
    policy, encoder = models[family]
    groups = groups_of(encoder, records, CASES[case])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.log_probs(policy, groups)
    linear = 0
    for operation, flops in counter.get_flop_counts()["Global"].items():
        if "attention" not in str(operation) and "flash" not in str(operation):
            linear += flops
    cost, text = model.Cost(policy), policy.hf.config.text_config
    pairs = 0  # of query and key
    for prompt, replies in groups:
        for reply in replies:
            pairs += sum(len(prompt.ids) + t + 1 for t in range(len(reply) - 1))
        pairs += sum(p + 1 for p in range(len(prompt.ids)))
    in_text = 4 * text.num_hidden_layers * text.hidden_size * pairs
    in_vision = 0
    for prompt, _ in groups:
        for grid in [] if prompt.grids is None else prompt.grids.tolist():
            in_vision += attention_of_tower(policy.hf.config.vision_config, family, grid)
    found = cost.forward(groups)
    # the rotary tables are matrix products too: a few parts in ten thousand
    assert sum(found) - in_text - in_vision == pytest.approx(linear, rel=2e-3)
    assert (found[1] == 0) == all(prompt.grids is None for prompt, _ in groups)
    assert cost.learn(groups) == pytest.approx(3 * sum(found))
    assert cost.learn(groups, reference=True) == pytest.approx(4 * sum(found))


def matrices(module):
    """Weights that multiply: neither biases nor norms."""
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)


def test_flops_of_windows_by_hand(models):
    policy, _ = models["qwen2_5_vl"]
    tower, vision = policy.hf.model.visual, policy.hf.config.vision_config
    # 20 patches a side: windows of 8, 8 and 4, so each side sees 64 + 64 + 16 pairs
    grid = torch.tensor([[1, 20, 20]])
    prompt = model.Prompt(torch.zeros(100), torch.zeros(3, 100), 100, None, grid, [])
    _, found = model.Cost(policy).forward([(prompt, [])])
    whole = len(vision.fullatt_block_indexes)
    pairs = whole * 400**2 + (vision.depth - whole) * 144**2
    assert 0 < whole < vision.depth
    # 400 patches run through the blocks, 100 squares of four through the merger.
    linear = 2 * 400 * (matrices(tower.blocks) + matrices(tower.patch_embed)) + 2 * 100 * matrices(tower.merger)
    assert found == linear + 4 * vision.hidden_size * pairs


def test_a_frozen_tower_has_no_backward_pass_to_count(tiny_dirs, records):
    policy, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, train=True, freeze_vision=True)
    groups = groups_of(encoder, records, CASES["eight replies on a picture"])
    cost = model.Cost(policy)
    text, vision = cost.forward(groups)
    assert vision > 0 and cost.learn(groups) == pytest.approx(3 * text + vision)


def test_a_phase_books_the_time_since_the_last_one_and_flops_become_a_rate(monkeypatch):
    timer, now = training.PhaseTimer(CPU), [100.0]
    assert timer.peak == 0, "no peak is measured unless somebody asks"
    monkeypatch.setattr(training.time, "perf_counter", lambda: now[0])
    timer.start()
    timer.peak = 8e12
    for phase, seconds, flops in (("rest", 1.0, None), ("learn", 3.0, 6e12), ("rest", 0.5, None), ("learn", 1.0, 2e12)):
        now[0] += seconds
        timer.end(phase, flops)
    row = timer.metrics(replies=11, tokens=220)
    assert 0.05 < row.pop("peak_memory_gib") < 100
    assert row == {
        "replies_per_s": 2.0,  # 11 in 5.5 seconds
        "tokens_per_s": 40.0,
        "seconds_rest": 1.5,
        "seconds_learn": 4.0,
        "tflops_learn": 2.0,
        "mfu_learn": 0.25,
    }
    now[0] += 0.25
    timer.end("rest")
    assert timer.metrics()["seconds_rest"] == 0.25, "metrics begins anew"


def test_the_measured_peak_is_what_a_product_reaches():
    size, best = 1024, 0.0
    a, b = torch.randn(size, size), torch.randn(size, size)
    for _ in range(20):
        begun = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    assert 0.1 < training.matmul_peak(torch.device("cpu"), torch.float32, 0.2) / best < 3


# ---------------------------------------------------------------------------------------------------------------------
# Exit status


@pytest.mark.parametrize(
    "error, status, said",
    [
        (None, 0, ""),
        (DataError("a.jsonl:3: broken\n  by  two lines"), 2, "error: a.jsonl:3: broken by two lines\n"),
        (ZeroDivisionError("ours"), 1, "ZeroDivisionError: ours\n"),
        (KeyboardInterrupt("stopped after step 3"), 130, "stopped after step 3\n"),
    ],
)
def test_the_exit_status_says_whose_fault_it_was(capsys, error, status, said):
    def main():
        if error:
            raise error

    with pytest.raises(SystemExit) as caught:
        training.run(main)
    printed = capsys.readouterr().err.lstrip("\n")
    assert (caught.value.code or 0) == status
    assert printed == said or (status == 1 and printed.endswith(said))
