"""model.py: prompt-once groups and the sampler equal transformers' own models; records and runs keep their word.

The plain side of every comparison is the Hugging Face model itself on `[prompt + one reply]`, with its own positions
and masks. The weights are rough (conftest.py), so that a wrong position or mask shows far above rounding.
"""

import argparse
import json
import math
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import load_rough
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import attention
import model
import sampler
import training
from records import DataError, epoch_order, read_jsonl, read_records, write_jsonl
from toy import tiny_model
from toy.tiny_model import make_tiny

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
CPU = training.World(rank=0, size=1, device=torch.device("cpu"))
EXACT = {"rtol": 0, "atol": 1e-5}
every_family = pytest.mark.parametrize("family", FAMILIES)


# ---------------------------------------------------------------------------------------------------------------------
# 1. Prompt-once groups

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


def plain_log_probs(policy, encoder, prompt, reply, temperature=1.0):
    """(T,) log-probs of a reply from transformers alone: one row, one reply, its own positions, no row of ours."""
    ids = torch.cat([prompt.ids, reply])[None]
    pictures = {}
    if prompt.patches is not None:
        kinds = torch.zeros_like(ids)
        kinds[0, : len(prompt.ids)] = prompt.ids == encoder.image_id
        pictures = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
    logits = policy.hf(input_ids=ids, **pictures).logits[0, len(prompt.ids) - 1 : -1] / temperature
    logits = logits.index_fill(-1, torch.tensor([encoder.image_id, encoder.video_id]), -math.inf)
    return logits.log_softmax(-1).gather(-1, reply[:, None])[:, 0]


def groups_of(encoder, records, case):
    """Groups of a case; every group takes its replies from another place of REPLIES."""
    texts = REPLIES * 2
    return [
        (encoder.prompt(records[index]), [encoder.encode_reply(text) for text in texts[3 * row : 3 * row + count]])
        for row, (index, count) in enumerate(case)
    ]


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


def assert_equals_plain(policy, encoder, groups, temperature=1.0):
    """Log-probs and gradients of every parameter of a group batch against one plain forward per reply."""
    logp, mask = model.log_probs(policy, groups, temperature)
    rows = [(prompt, reply) for prompt, replies in groups for reply in replies]
    assert logp.shape == mask.shape == (len(rows), max(len(reply) for _, reply in rows))
    coefficient = torch.randn(logp.shape, generator=torch.Generator().manual_seed(1))  # another weight on every token
    total = 0.0
    for row, (prompt, reply) in enumerate(rows):
        size = len(reply)
        assert mask[row].tolist() == [True] * size + [False] * (logp.shape[1] - size)
        assert (logp[row, size:] == 0).all()
        plain = plain_log_probs(policy, encoder, prompt, reply, temperature)
        torch.testing.assert_close(logp[row, :size], plain, **EXACT)
        total = total + (coefficient[row, :size] * plain).sum()
    assert_same_gradients(gradients(policy, (coefficient * logp).sum()), gradients(policy, total))


@pytest.mark.parametrize("case", CASES)
@every_family
def test_a_group_has_the_log_probs_and_gradients_of_the_plain_layout(models, records, family, case):
    policy, encoder = models[family]
    assert_equals_plain(policy, encoder, groups_of(encoder, records, CASES[case]))


@every_family
def test_so_it_has_at_temperature_0_7(models, records, family):
    policy, encoder = models[family]
    assert_equals_plain(policy, encoder, groups_of(encoder, records, [(0, 2), (1, 3)]), temperature=0.7)


@every_family
def test_a_group_without_pictures_leaves_the_vision_tower_without_gradient(models, records, family):
    policy, encoder = models[family]
    logp, _ = model.log_probs(policy, groups_of(encoder, records, [(1, 2)]))
    found = gradients(policy, logp.sum())
    assert {name for name, grad in found.items() if grad is None} == {name for name in found if "visual" in name}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_size_of_the_heads_chunks_does_not_matter(models, records, monkeypatch, temperature):
    policy, encoder = models["qwen2_5_vl"]
    groups = groups_of(encoder, records, [(0, 3), (1, 2)])
    whole, _ = model.log_probs(policy, groups, temperature)
    whole_gradients = gradients(policy, whole.exp().sum())
    monkeypatch.setattr(policy, "chunk_bytes", 3 * 4 * vocabulary_of(policy))  # three rows at a time
    parts, _ = model.log_probs(policy, groups, temperature)
    torch.testing.assert_close(parts, whole, **EXACT)
    assert_same_gradients(gradients(policy, parts.exp().sum()), whole_gradients)
    with torch.no_grad():
        torch.testing.assert_close(model.log_probs(policy, groups, temperature)[0], whole, **EXACT)


@every_family
def test_another_sibling_changes_nothing_in_a_reply(models, records, family):
    policy, encoder = models[family]
    prompt, replies = encoder.prompt(records[0]), [encoder.encode_reply(text) for text in REPLIES[:3]]
    with torch.no_grad():
        before, _ = model.log_probs(policy, [(prompt, replies)])
        for sibling in ("quite another reply", "", "a much longer one " * 9):
            after, _ = model.log_probs(policy, [(prompt, [replies[0], encoder.encode_reply(sibling), replies[2]])])
            for row in (0, 2):
                size = len(replies[row])
                torch.testing.assert_close(after[row, :size], before[row, :size], **EXACT)


def test_the_order_of_siblings_and_groups_does_not_matter(models, records):
    policy, encoder = models["qwen3_vl"]
    groups = groups_of(encoder, records, [(0, 2), (1, 1), (2, 2)])
    with torch.no_grad():
        ahead, _ = model.log_probs(policy, groups)
        behind, _ = model.log_probs(policy, [(prompt, replies[::-1]) for prompt, replies in groups[::-1]])
    torch.testing.assert_close(behind.flip(0), ahead, **EXACT)


@every_family
def test_a_group_has_the_same_log_probs_alone_and_beside_longer_ones(models, records, family):
    policy, encoder = models[family]
    groups = groups_of(encoder, records, [(1, 2), (2, 3), (0, 1)])
    with torch.no_grad():
        together, _ = model.log_probs(policy, groups)
        for rows, group in ((slice(0, 2), groups[0]), (slice(2, 5), groups[1]), (slice(5, 6), groups[2])):
            alone, _ = model.log_probs(policy, [group])
            torch.testing.assert_close(together[rows, : alone.shape[1]], alone, **EXACT)


def test_a_prompt_is_laid_out_once_whatever_the_number_of_replies(models, records):
    _, encoder = models["qwen2_5_vl"]
    prompt, replies = encoder.prompt(records[0]), [encoder.encode_reply(text) for text in REPLIES]
    batch = model.pack([(prompt, replies)])
    assert batch.ids.shape == (1, len(prompt.ids) + sum(len(reply) - 1 for reply in replies))
    assert torch.equal(batch.patches, prompt.patches)
    assert len(batch.targets) == len(batch.row) == sum(len(reply) for reply in replies)
    assert len(batch.read) == 1 + sum(len(reply) - 1 for reply in replies), "the prompt's last state is read once"


def test_a_packed_row_worked_by_hand():
    def prompt(ids, begin):
        return model.Prompt(torch.tensor(ids), torch.tensor([ids, ids, ids]) * 10, begin, None, None, [])

    end = 9
    groups = [(prompt([1, 2, 3], 31), [torch.tensor([4, 5, end]), torch.tensor([end])]), (prompt([6], 61), [])]
    groups.append((prompt([7, 8], 81), [torch.tensor([5, end])]))
    batch = model.pack(groups)
    assert batch.ids.tolist() == [[1, 2, 3, 6, 7, 8, 4, 5, 5]], "prompts, then what is fed of the replies"
    assert batch.positions[1].tolist() == [[10, 20, 30, 60, 70, 80, 31, 32, 81]]
    assert batch.read.tolist() == [2, 3, 5, 6, 7, 8]
    assert batch.row.tolist() == [0, 0, 2, 3, 4, 5] and batch.targets.tolist() == [4, end, 5, 5, end, end]
    assert batch.place.tolist() == [[0, 1, 2, 0, 0, 2], [0, 0, 0, 1, 2, 1]]
    layout = batch.layout
    assert (layout.prompts.lengths, layout.replies.lengths, layout.shares.lengths) == ([3, 1, 2], [2, 0, 1], [2, 0, 1])


@every_family
def test_recomputed_activations_give_the_same_gradients(tiny_dirs, records, monkeypatch, family):
    found, calls, attend = [], [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: calls.append(1) or attend(*args))
    for recompute in ("off", "on"):
        policy, encoder = model.load(tiny_dirs[family], CPU, train=True, recompute=recompute)
        calls.clear()
        logp, _ = model.log_probs(policy, groups_of(encoder, records, CASES["text and pictures in one batch"]))
        once = len(calls)
        found.append((logp.detach(), gradients(policy, logp.exp().sum())))
        assert len(calls) == (2 * once if recompute == "on" else once)
    torch.testing.assert_close(found[1][0], found[0][0], **EXACT)
    assert_same_gradients(found[1][1], found[0][1])


# ---- the account


def compiled(hf):
    return [name for name, module in hf.named_modules() if module._compiled_call_impl is not None]


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@every_family
def test_compiled_norms_and_mlps_give_the_same_log_probs_and_gradients_and_keep_their_names(
    tiny_dirs, records, family
):
    plain, encoder = load_rough(tiny_dirs[family])
    other, _ = model.load(tiny_dirs[family], CPU, train=True, compile=True, recompute="on")
    assert list(other.state_dict()) == list(plain.state_dict())
    other.load_state_dict(plain.state_dict())
    assert not compiled(plain) and len(compiled(other)) == 3 * 3 + len(other.hf.model.visual.blocks)
    for case in ([(3, 2), (1, 1)], [(2, 1)], [(0, 3)]):  # the second and the third in other shapes
        groups = groups_of(encoder, records, case)
        (expected, mask), (found, _) = model.log_probs(plain, groups), model.log_probs(other, groups)
        torch.testing.assert_close(found, expected, **EXACT)
        weight = torch.randn(mask.shape, generator=torch.Generator().manual_seed(3))
        both = [gradients(policy, (logp * weight).sum()) for policy, logp in ((other, found), (plain, expected))]
        seen = {name for name, gradient in both[1].items() if gradient is not None}
        assert_same_gradients(*({name: one[name] for name in seen} for one in both))
    asked = {"seeds": [1, 2], "max_new_tokens": 6}
    prompts = [encoder.prompt(records[i]) for i in (0, 1)]
    drawn = [ids_of(sampler.sample(policy, prompts, 3, **asked)) for policy in (plain, other)]
    assert drawn[0] == drawn[1]


def test_a_machine_where_nothing_compiles_says_so_in_one_line_when_the_model_is_loaded(tiny_dirs, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("No working C++ compiler found\nSet TORCHDYNAMO_VERBOSE=1")

    monkeypatch.setattr(torch, "compile", lambda function, **options: fail)
    with pytest.raises(DataError) as error:
        model.load(tiny_dirs["qwen2_5_vl"], CPU, compile=True)
    assert str(error.value) == "--compile: torch.compile fails here (No working C++ compiler found)"


@pytest.mark.parametrize("case", CASES)
@every_family
def test_the_flops_of_the_formula_are_those_that_torch_counts(models, records, family, case):
    """Linear layers are counted by torch; what attention adds is worked out here, token by token."""
    policy, encoder = models[family]
    groups = groups_of(encoder, records, CASES[case])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.log_probs(policy, groups)
    kinds = counter.get_flop_counts()["Global"]
    linear = sum(count for kind, count in kinds.items() if "attention" not in str(kind) and "flash" not in str(kind))
    cost = model.Cost(policy)
    text, vision = policy.hf.config.text_config, policy.hf.config.vision_config
    pairs = 0
    for prompt, replies in groups:
        for reply in replies:
            pairs += sum(len(prompt.ids) + t + 1 for t in range(len(reply) - 1))
        pairs += sum(p + 1 for p in range(len(prompt.ids)))
    in_text = 4 * text.num_hidden_layers * text.hidden_size * pairs
    in_vision = 0
    width = vision.embed_dim if family == "qwen2_vl" else vision.hidden_size
    for prompt, _ in groups:
        for _, h, w in [] if prompt.grid is None else prompt.grid.tolist():
            whole = (h * w) ** 2
            windows = sum(min(8, h - i) ** 2 * min(8, w - j) ** 2 for i in range(0, h, 8) for j in range(0, w, 8))
            blocks = [whole] * vision.depth
            if family == "qwen2_5_vl":
                blocks = [whole if i in vision.fullatt_block_indexes else windows for i in range(vision.depth)]
            in_vision += 4 * width * sum(blocks)
    found = cost.forward(groups)
    # the rotary tables are matrix products too: a few parts in ten thousand
    assert sum(found) - in_text - in_vision == pytest.approx(linear, rel=2e-3)
    assert (found[1] == 0) == all(prompt.grid is None for prompt, _ in groups)
    assert cost.learn(groups) == pytest.approx(3 * sum(found))
    assert cost.learn(groups, reference=True) == pytest.approx(4 * sum(found))


def test_flops_of_windows_by_hand(models):
    policy, _ = models["qwen2_5_vl"]
    cost, vision = model.Cost(policy), policy.hf.config.vision_config
    # 20 patches a side: windows of 8, 8 and 4, so each side sees 64 + 64 + 16 pairs
    grid = torch.tensor([[1, 20, 20]])
    found = cost.forward([(model.Prompt(torch.zeros(100), torch.zeros(3, 100), 100, None, grid, []), [])])[1]
    whole = len(vision.fullatt_block_indexes)
    pairs = whole * 400**2 + (vision.depth - whole) * 144**2
    assert 0 < whole < vision.depth
    assert found == 2 * cost.tower * 400 + 2 * cost.merger * 100 + 4 * vision.hidden_size * pairs


def test_a_frozen_tower_has_no_backward_pass_to_count(tiny_dirs, records):
    policy, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, train=True, freeze_vision=True)
    groups = groups_of(encoder, records, CASES["eight replies on a picture"])
    cost = model.Cost(policy)
    text, vision = cost.forward(groups)
    assert vision > 0 and cost.learn(groups) == pytest.approx(3 * text + vision)


def test_a_lap_books_time_since_the_last_one_and_flops_become_a_rate(models, monkeypatch):
    policy, _ = models["qwen2_5_vl"]
    meter, now = training.PhaseTimer(policy, CPU), [100.0]
    monkeypatch.setattr(model.time, "perf_counter", lambda: now[0])
    meter.start()
    meter.peak = 8e12
    for phase, seconds, flops in (("rest", 1.0, None), ("learn", 3.0, 6e12), ("rest", 0.5, None), ("learn", 1.0, 2e12)):
        now[0] += seconds
        meter.lap(phase, flops)
    row = meter.row()
    assert 0.05 < row.pop("peak_memory_gib") < 100
    assert row == {"seconds_rest": 1.5, "seconds_learn": 4.0, "tflops_learn": 2.0, "mfu_learn": 0.25}
    now[0] += 0.25
    meter.lap("rest")
    assert meter.row()["seconds_rest"] == 0.25


def test_the_measured_peak_is_what_a_product_reaches():
    size, best = 1024, 0.0
    a, b = torch.randn(size, size), torch.randn(size, size)
    for _ in range(20):
        begun = time.perf_counter()
        a @ b
        best = max(best, 2 * size**3 / (time.perf_counter() - begun))
    assert 0.1 < training.matmul_peak(torch.device("cpu"), torch.float32, 0.2) / best < 3


# ---- attention: against a softmax with a mask, written out


def seen(prompts, replies, owners):
    """(L, L) bool of a packed row: which token sees which, from the lengths alone."""
    segment = [-1 - p for p, size in enumerate(prompts) for _ in range(size)]
    segment += [b for b, size in enumerate(replies) for _ in range(size)]
    own = [[j <= i and segment[j] == segment[i] for j in range(len(segment))] for i in range(len(segment))]
    prompt = [[s >= 0 and t == -1 - owners[s] for t in segment] for s in segment]
    return torch.tensor(own) | torch.tensor(prompt)


ROWS = {  # lengths of prompts, lengths of replies, the prompt of each reply
    "equal": ([5, 5], [3, 3, 3, 3], [0, 0, 1, 1]),
    "ragged": ([4, 9, 1], [7, 2, 1, 5, 3], [0, 0, 0, 1, 2]),
    "a prompt without replies": ([4, 2, 6], [3, 1], [0, 2]),
    "replies of nothing but their end": ([3, 2], [0, 0, 4], [0, 0, 1]),
    "no reply at all": ([6, 3], [], []),
    "one of each": ([2], [1], [0]),
}


def layout_of(prompts, replies, owners):
    shares = [sum(size for size, owner in zip(replies, owners, strict=True) if owner == p) for p in range(len(prompts))]
    return attention.Layout(*(attention.Segments.of(lengths) for lengths in (prompts, replies, shares)))


def written_out(q, k, v, allowed, scale):
    """(L, heads, d) attention by the textbook, every head of the queries with its own copy of the keys."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    score = torch.einsum("ihd,jhd->hij", q, k) * scale
    return torch.einsum("hij,jhd->ihd", score.masked_fill(~allowed, -math.inf).softmax(-1), v)


@pytest.fixture(params=["fused", "formula"])
def kernel(request, monkeypatch):
    """Both ways of attention in rectangles: the CPU's kernel, and the formula other devices take."""
    if request.param == "fused":
        return

    def forward(q, k, v, pad, causal, scale):
        states, mask = [x.transpose(1, 2) for x in (q, k, v)], attention.additive_mask(pad, q.dtype)
        return [x.transpose(1, 2) for x in attention.formula(*states, mask, causal, scale)]

    def backward(grad, q, k, v, out, lse, pad, causal, scale):
        states = [x.transpose(1, 2) for x in (grad, q, k, v, out, lse)]
        grads = attention.formula_backward(*states, attention.additive_mask(pad, q.dtype), causal, scale)
        return [x.transpose(1, 2) for x in grads]

    monkeypatch.setattr(attention, "attend_padded", forward)
    monkeypatch.setattr(attention, "attend_padded_backward", backward)


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("row", ROWS)
def test_attention_in_parts_is_attention_over_the_whole(kernel, row, heads, kv_heads):
    prompts, replies, owners = ROWS[row]
    total = sum(prompts) + sum(replies)
    noise = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(total, n, 32, generator=noise).requires_grad_() for n in (heads, kv_heads, kv_heads))
    weight = torch.randn(total, heads, 32, generator=noise)
    expected = written_out(q, k, v, seen(prompts, replies, owners), 0.3)
    found = attention.PromptOnce.apply(q, k, v, layout_of(prompts, replies, owners), 0.3)
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, **EXACT)


@pytest.fixture
def flash_kernels():
    """CUDA's kernels for stretches of various lengths, stood in for by the formula, with the checks the real ones make.

    They show what the calls mean (which stretches, which log-sum-exp, which layout); how the kernels round is shown by
    bench/gpu.sh on a GPU.
    """
    library = torch.library.Library("aten", "IMPL")

    def scores(q, k, scale, causal):
        keys = k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)
        score = torch.einsum("ihd,jhd->hij", q.float(), keys) * scale
        later = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
        return score.masked_fill(later, -math.inf) if causal else score

    def stretches(bounds_q, bounds_k, longest_q, longest_k):
        assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(bounds_q) == len(bounds_k)
        assert longest_q >= bounds_q.diff().max() and longest_k >= bounds_k.diff().max()
        return [(slice(a, b), slice(c, d)) for a, b, c, d in zip(
            *(bounds.tolist() for bounds in (bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:])), strict=True
        )]  # fmt: skip

    def forward(q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug, *, scale=None,
                seqused_k=None, **options):  # fmt: skip
        if bounds_q is None:  # (B, L, heads, d) -> lse (B, heads, L)
            assert (longest_q, longest_k) == (q.shape[1], k.shape[1])
            size = [torch.tensor([0, x.shape[1]]).int() for x in (q, k)]
            rest = *size, longest_q, longest_k, 0.0, causal, False
            each = [forward(q[b], k[b], v[b], *rest, scale=scale) for b in range(len(q))]
            return torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each]), q, q, q
        assert longest_q > 1 or len(q) == len(bounds_q) - 1, "told 1, the kernel reads one query of every stretch"
        out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
        places = stretches(bounds_q, bounds_k, longest_q, longest_k)
        if seqused_k is not None:  # only so many of each stretch's keys
            sizes = seqused_k.tolist()
            assert seqused_k.dtype == torch.int32 and seqused_k.is_contiguous()
            assert len(k) >= bounds_k[-1] and (seqused_k <= bounds_k.diff()).all()
            places = [(i, slice(j.start, j.start + used)) for (i, j), used in zip(places, sizes, strict=True)]
        for i, j in places:
            score = scores(q[i], k[j], scale, causal)
            lse[:, i] = score.logsumexp(-1)
            shared = v[j].float().repeat_interleave(q.shape[1] // k.shape[1], 1)
            out[i] = torch.einsum("hij,jhd->ihd", score.softmax(-1), shared).to(q.dtype)
        return out, lse, q, q, q

    def backward(grad, q, k, v, out, lse, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, seed, offset, *,
                 scale=None, **options):  # fmt: skip
        assert grad.shape == q.shape == out.shape and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
        dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
        many = q.shape[1] // k.shape[1]
        for i, j in stretches(bounds_q, bounds_k, longest_q, longest_k):
            p = (scores(q[i], k[j], scale, causal) - lse[:, i, None]).exp()
            keys, values = (x[j].float().repeat_interleave(many, 1) for x in (k, v))
            delta = (grad[i].float() * out[i].float()).sum(-1).T[..., None]
            ds = p * (torch.einsum("ihd,jhd->hij", grad[i].float(), values) - delta) * scale
            dq[i] = torch.einsum("hij,jhd->ihd", ds, keys).to(q.dtype)
            for into, left, right in ((dk, ds, q[i].float()), (dv, p, grad[i].float())):
                into[j] = torch.einsum("hij,ihd->jhd", left, right).unflatten(1, (-1, many)).sum(2).to(q.dtype)
        return dq, dk, dv

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield
    library._destroy()


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("row", ROWS)
def test_the_calls_of_the_flash_kernels_mean_the_same_attention(flash_kernels, row, heads, kv_heads):
    prompts, replies, owners = ROWS[row]
    noise = torch.Generator().manual_seed(9)
    states = [torch.randn(sum(prompts) + sum(replies), n, 32, generator=noise) for n in (heads, kv_heads, kv_heads)]
    results = []
    for flash in (False, True):
        q, k, v = (x.clone().requires_grad_() for x in states)
        layout = layout_of(prompts, replies, owners)
        layout.flash = flash
        out = attention.PromptOnce.apply(q, k, v, layout, 0.3)
        results.append([out, *torch.autograd.grad((out * torch.arange(32.0)).sum(), (q, k, v))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@every_family
def test_sampling_with_flash_kernels_draws_the_same_replies(flash_kernels, models, records, early_ends, family):
    policy, encoder = models[family]
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3, 1)]
    asked = {"seeds": [21, 22, 23, 24, 25], "temperature": 3.0, "max_new_tokens": 14}
    expected = sampler.sample(policy, prompts, 3, **asked)
    policy.flash = True
    try:
        found = sampler.sample(policy, prompts, 3, **asked)
        groups = [(prompts[i], [reply.ids for reply in group]) for i, group in enumerate(found)]
        gaps = model.log_probs(policy, groups, 3.0)[0]
    finally:
        policy.flash = False
    assert ids_of(found) == ids_of(expected) and len({len(reply.ids) for reply in sum(found, [])}) > 3
    for logp, reply in zip(gaps, sum(found, []), strict=True):
        torch.testing.assert_close(logp[: len(reply.ids)], reply.logps, **EXACT)


def test_scores_of_a_hundred_nats_neither_overflow_nor_leak_from_the_padding(kernel):
    prompts, replies, owners = ROWS["ragged"]
    noise = torch.Generator().manual_seed(6)
    q, k, v = ((40 * torch.randn(32, 2, 32, generator=noise)).requires_grad_() for _ in range(3))
    out = attention.PromptOnce.apply(q, k, v, layout_of(prompts, replies, owners), 0.3)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.isfinite(out).all() and all(torch.isfinite(grad).all() for grad in grads)
    torch.testing.assert_close(out, written_out(q, k, v, seen(prompts, replies, owners), 0.3), rtol=1e-3, atol=1e-2)


def test_two_attentions_merge_by_their_mass_by_hand():
    # exp(lse) is the mass: 3 against 1, so three quarters of the first
    one = torch.tensor([[[8.0, 0.0]]]), torch.tensor([[math.log(3.0)]])
    other = torch.tensor([[[0.0, 4.0]]]), torch.tensor([[0.0]])
    out, lse = attention.merge(one, other)
    torch.testing.assert_close(out, torch.tensor([[[6.0, 1.0]]]))
    torch.testing.assert_close(lse, torch.tensor([[math.log(4.0)]]))


@pytest.mark.parametrize("lengths", [[3, 3, 3], [4, 2, 4, 1, 2], [7]])
def test_windows_of_one_length_at_a_time_are_windows_one_by_one(lengths):
    noise = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, 2, sum(lengths), 32, generator=noise).requires_grad_() for _ in range(3))
    bounds = torch.tensor([0, *np.cumsum(lengths)])
    found, _ = attention.window_attention(None, q, k, v, scaling=0.2, cu_seq_lens_q=bounds, max_length_q=max(lengths))
    segment = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    flat = (x[0].transpose(0, 1) for x in (q, k, v))
    expected = written_out(*flat, segment[:, None] == segment, 0.2)[None]
    torch.testing.assert_close(found, expected, **EXACT)
    for one, other in zip(
        torch.autograd.grad(found.exp().sum(), (q, k, v)), torch.autograd.grad(expected.exp().sum(), (q, k, v)),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one, other, **EXACT)


@every_family
def test_the_hugging_face_model_inside_still_stands_on_its_own(tiny_dirs, models, records, family):
    policy, encoder = models[family]
    own = AutoModelForImageTextToText.from_pretrained(tiny_dirs[family], attn_implementation="sdpa")
    own.load_state_dict(policy.hf.state_dict())
    prompts = [encoder.prompt(records[0]), encoder.prompt(records[1])]
    for prompt in prompts:
        pictures = {}
        if prompt.patches is not None:
            kinds = (prompt.ids == encoder.image_id).long()[None]
            pictures = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
        with torch.no_grad():
            found, expected = (hf(input_ids=prompt.ids[None], **pictures).logits for hf in (policy.hf, own))
        torch.testing.assert_close(found, expected, **EXACT)


def test_log_probs_of_tokens_and_their_gradients_are_those_of_log_softmax():
    noise = torch.Generator().manual_seed(8)
    hidden = torch.randn(5, 4, generator=noise, dtype=torch.float32).requires_grad_()
    weight = torch.randn(11, 4, generator=noise).requires_grad_()
    row, targets = torch.tensor([0, 0, 0, 1, 3, 3, 4]), torch.tensor([5, 5, 9, 0, 10, 1, 3])  # state 2 predicts nothing
    scale, forbidden = torch.randn(7, generator=noise), torch.tensor([2, 7])
    for temperature in (1.0, 0.6):
        logits = (hidden @ weight.T / temperature).index_fill(-1, forbidden, -math.inf)
        expected = logits.log_softmax(-1)[row, targets]
        wanted = torch.autograd.grad((expected * scale).sum(), (hidden, weight))
        for rows in (1, 2, 3, 100):
            found = model.TokenLogProbs.apply(hidden, weight, row, targets, temperature, forbidden, rows)
            torch.testing.assert_close(found, expected, **EXACT)
            for one, other in zip(torch.autograd.grad((found * scale).sum(), (hidden, weight)), wanted, strict=True):
                torch.testing.assert_close(one, other, **EXACT)


def test_image_and_video_pads_have_no_probability_and_the_rest_sums_to_1(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompt = encoder.prompt(records[0])
    vocabulary = vocabulary_of(policy)
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [torch.tensor([token]) for token in range(vocabulary)])])
    assert logp[encoder.image_id, 0] == logp[encoder.video_id, 0] == -math.inf
    assert torch.isfinite(logp).sum() == vocabulary - 2
    assert float(logp.double().exp().sum()) == pytest.approx(1, abs=1e-5)


def test_every_end_token_belongs_to_its_reply(models, records):
    policy, encoder = models["qwen2_5_vl"]
    ends = [encoder.tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
    assert sorted(ends) == sorted(policy.end_ids) and ends[0] == encoder.end_id
    replies = [torch.cat([encoder.encode_reply("above")[:-1], torch.tensor([end])]) for end in ends]
    logp, mask = model.log_probs(policy, [(encoder.prompt(records[1]), replies)])
    assert mask.all() and (logp < 0).all()


@every_family
def test_a_blank_picture_changes_nothing_and_gives_the_tower_a_gradient_of_zero(models, records, monkeypatch, family):
    # what a sharded policy does for a batch without pictures
    policy, encoder = models[family]
    groups = groups_of(encoder, records, [(1, 2)])
    without, _ = model.log_probs(policy, groups)
    expected = gradients(policy, without.sum())
    monkeypatch.setattr(policy, "must_see", True)
    logp, _ = model.log_probs(policy, groups)
    assert torch.equal(logp, without)
    for name, gradient in gradients(policy, logp.sum()).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name])
        elif gradient is not None:  # a few of the tower's weights lead nowhere, and stay without
            assert not gradient.any(), name


# ---------------------------------------------------------------------------------------------------------------------
# 2. Sampler


def ids_of(drawn):
    return [[reply.ids.tolist() for reply in replies] for replies in drawn]


def generate(policy, encoder, prompt, count, **options):
    """Greedy ids from transformers' own generate()."""
    ids, pictures = prompt.ids[None], {}
    if prompt.patches is not None:
        kinds = (ids == encoder.image_id).long()
        pictures = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
    options = {"do_sample": False, "suppress_tokens": [encoder.image_id, encoder.video_id], **options}
    options |= {"max_new_tokens": count, "attention_mask": torch.ones_like(ids)}
    return policy.hf.generate(ids, **pictures, **options)[0, ids.shape[1] :]


@pytest.fixture
def early_ends(models, monkeypatch):
    """Let every fifth token end a reply, so that replies and prompts finish at different steps: -> the end ids."""
    ends = tuple(range(0, vocabulary_of(models["qwen2_5_vl"][0]), 5))
    for policy, _ in models.values():
        monkeypatch.setattr(policy, "end_ids", ends)
    return ends


def vocabulary_of(policy):
    return policy.hf.config.text_config.vocab_size


@every_family
def test_greedy_replies_equal_generate(models, records, family):
    policy, encoder = models[family]
    prompts = [encoder.prompt(record) for record in records]
    assert len({len(prompt.ids) for prompt in prompts}) == 4
    drawn = sampler.sample(policy, prompts, 1, seeds=[1, 2, 3, 4], temperature=0, max_new_tokens=14)
    expected = [generate(policy, encoder, prompt, 14).tolist() for prompt in prompts]
    assert [reply for (reply,) in ids_of(drawn)] == expected
    assert len({tuple(reply) for reply in expected}) == 4 and max(len(set(reply)) for reply in expected) > 5


def test_greedy_replies_end_where_generate_ends(models, records, monkeypatch):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in records]
    endless = ids_of(sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=14))
    ends = sorted({endless[0][0][5], endless[1][0][2]})
    monkeypatch.setattr(policy, "end_ids", tuple(ends))
    drawn = sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=14)
    expected = [generate(policy, encoder, prompt, 14, eos_token_id=ends).tolist() for prompt in prompts]
    assert [reply for (reply,) in ids_of(drawn)] == expected
    assert len({len(reply) for reply in expected}) > 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@every_family
def test_drawn_log_probs_are_those_of_the_trainer(models, records, family, temperature):
    policy, encoder = models[family]
    prompts = [encoder.prompt(record) for record in records]
    drawn = sampler.sample(policy, prompts, 3, seeds=[5, 6, 7, 8], temperature=temperature, max_new_tokens=10)
    groups = [(prompt, [reply.ids for reply in replies]) for prompt, replies in zip(prompts, drawn, strict=True)]
    with torch.no_grad():
        logp, _ = model.log_probs(policy, groups, temperature)
    for row, reply in enumerate(reply for replies in drawn for reply in replies):
        torch.testing.assert_close(reply.logps, logp[row, : len(reply.ids)], **EXACT)


def test_cuts_do_not_change_the_log_probs_that_are_returned(models, records):
    # GRPO's ratio compares with the uncut distribution
    policy, encoder = models["qwen2_5_vl"]
    prompt = encoder.prompt(records[0])
    (replies,) = sampler.sample(policy, [prompt], 2, seeds=[5], temperature=0.7, top_k=9, top_p=0.8, max_new_tokens=8)
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [reply.ids for reply in replies])], 0.7)
    for row, reply in enumerate(replies):
        torch.testing.assert_close(reply.logps, logp[row, : len(reply.ids)], **EXACT)


def test_the_same_seeds_give_the_same_replies_and_others_do_not(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in (records[0], records[0], records[1])]

    def draw(seeds):
        return ids_of(sampler.sample(policy, prompts, 3, seeds=seeds, max_new_tokens=8))

    first = draw([1, 2, 3])
    assert draw([1, 2, 3]) == first
    assert first[0] != first[1], "one prompt under two seeds"
    assert len({tuple(reply) for reply in first[0]}) == 3, "the replies of a group"
    other = draw([1, 9, 3])
    assert other[0] == first[0] and other[1] != first[1] and other[2] == first[2]


@every_family
def test_a_prompt_gives_the_same_replies_alone_and_in_any_batch(models, records, early_ends, family):
    policy, encoder = models[family]
    prompts, seeds = [encoder.prompt(record) for record in records], [11, 12, 13, 14]

    def draw(which, n=3, **options):
        return ids_of(
            sampler.sample(
                policy, [prompts[i] for i in which], n, seeds=[seeds[i] for i in which], max_new_tokens=9, **options
            )
        )

    together = draw([0, 1, 2, 3])
    assert [draw([i])[0] for i in range(4)] == together
    assert draw([3, 1, 2, 0]) == [together[i] for i in (3, 1, 2, 0)]
    assert draw([0, 1, 2, 3], batch_tokens=1) == together, "one prompt a round"
    assert draw([0, 1, 2, 3], batch_tokens=400) == together, "several rounds"
    assert draw([0, 2], n=2) == [together[0][:2], together[2][:2]], "fewer replies"


def test_replies_stop_one_by_one_and_those_that_are_left_go_on_as_if_nothing_had_ended(
    models, records, early_ends, monkeypatch
):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3, 1, 0)]
    asked = {"seeds": [21, 22, 23, 24, 25, 26], "temperature": 3.0, "max_new_tokens": 16}
    drops, keep = [], sampler.ReplyCache.keep

    def count_and_keep(decoding, replies):
        drops.append((len(decoding.owner) - len(replies), len(decoding.shares.lengths)))
        keep(decoding, replies)

    monkeypatch.setattr(sampler.ReplyCache, "keep", count_and_keep)
    drawn = sampler.sample(policy, prompts, 6, **asked)
    assert len(drops) >= 2 and drops[-1][1] < 6, f"(replies dropped, prompts left) {drops}: too few to show anything"
    monkeypatch.setattr(policy, "end_ids", ())
    endless = sampler.sample(policy, prompts, 6, **asked)
    lengths = set()
    for reply, whole in zip(sum(drawn, []), sum(endless, []), strict=True):
        assert len(whole.ids) == len(whole.logps) == 16 and not whole.finished
        stops = [step for step, token in enumerate(whole.ids.tolist()) if token in early_ends]
        size = stops[0] + 1 if stops else 16  # the end token belongs to the reply
        assert reply.ids.tolist() == whole.ids[:size].tolist()
        torch.testing.assert_close(reply.logps, whole.logps[:size], **EXACT)
        assert reply.finished == bool(stops)
        lengths.add(size)
    assert len(lengths) > 4


class Graph(TorchDispatchMode):
    """A CUDA graph's stand-in: notes every operation with the tensors it touches, and repeats those, not the Python.

    As on a GPU, what it recorded reads and writes the same memory at every replay, numbers of Python stay what they
    were, nothing may be read back while it records, and only a replay makes the output mean anything.
    """

    def __init__(self, function):
        super().__init__()
        self.calls, self.replays = [], 0
        with self:
            self.out = function()
        self.out.fill_(math.nan)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation is not torch.ops.aten._local_scalar_dense.default, "a graph cannot wait for the GPU"
        out = operation(*args, **kwargs or {})
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for operation, args, kwargs, old in self.calls:
            new = operation(*args, **kwargs)
            for one, other in zip(*([x] if torch.is_tensor(x) else x for x in (old, new)), strict=True):
                if one.data_ptr() != other.data_ptr():
                    one.copy_(other)


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that sampling captures, each a stand-in."""
    captured = []

    def capture(function, last=None):
        assert last is (captured[-1] if captured else None)
        captured.append(Graph(function))
        return captured[-1], captured[-1].out

    monkeypatch.setattr(model, "capture", capture)
    return captured


@pytest.mark.parametrize("flash", [False, True])
@every_family
def test_decoding_in_standing_shapes_gives_the_same_logits_as_in_growing_ones(
    flash_kernels, models, records, monkeypatch, family, flash
):
    policy, encoder = models[family]
    monkeypatch.setattr(policy, "flash", flash)
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3)]
    noise, ways = torch.Generator().manual_seed(4), []
    counts, room = [3, 1, 2, 3], 12
    position = torch.tensor([prompt.next for prompt in prompts]).repeat_interleave(torch.tensor(counts))
    with torch.no_grad():
        for kind in (sampler.ReplyCache, model.StaticDecoding):
            prefill = model.pack([(prompt, []) for prompt in prompts])
            prefill.layout.kept = {}
            policy(prefill)
            ways.append(kind(prefill.layout.kept, prefill.layout.prompts, counts, room, flash))
        for step in range(room):
            if step in (4, 5, 9):  # the second leaves the second prompt without replies
                stay = torch.tensor({4: [0, 2, 3, 4, 6, 8], 5: [0, 1, 3, 4, 5], 9: [1, 4]}[step])
                position = position[stay]
                for decoding in ways:
                    decoding.keep(stay)
            token = torch.randint(0, vocabulary_of(policy), position.shape, generator=noise)
            logits = [sampler.decode(policy, decoding, token, position + step, 0.9) for decoding in ways]
            for decoding in ways:
                decoding.advance()
            torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-6 * logits[0][logits[0].isfinite()].abs().max())


@pytest.mark.parametrize("flash", [False, True])
@every_family
def test_replayed_graphs_draw_the_same_replies(
    flash_kernels, models, records, early_ends, graphs, monkeypatch, family, flash
):
    policy, encoder = models[family]
    monkeypatch.setattr(policy, "flash", flash)
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3, 1, 0)]
    asked = {"seeds": [21, 22, 23, 24, 25, 26], "temperature": 3.0, "max_new_tokens": 40}
    expected = sampler.sample(policy, prompts, 4, **asked)
    assert not graphs, "nobody captures unasked"
    found = sampler.sample(policy, prompts, 4, graphs=True, **asked)
    assert ids_of(found) == ids_of(expected)
    for one, other in zip(sum(found, []), sum(expected, []), strict=True):
        torch.testing.assert_close(one.logps, other.logps, rtol=0, atol=1e-6)
    widths = [len(graph.out) for graph in graphs]
    assert widths[0] == 24 and len(widths) > 2, "too few graphs to show anything"
    assert all(2 * less <= more for more, less in zip(widths, widths[1:], strict=False)), widths
    longest = max(len(reply.ids) for reply in sum(found, []))
    assert sum(graph.replays for graph in graphs) == longest - 1, "every token after the first comes from a replay"


def test_a_graph_is_captured_only_where_enough_steps_are_left_to_pay_for_it(
    models, records, early_ends, graphs, monkeypatch
):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(records[i]) for i in (0, 1, 2, 3)]
    asked = {"seeds": [31, 32, 33, 34], "temperature": 3.0, "graphs": True}
    short = sampler.sample(policy, prompts, 4, max_new_tokens=model.GRAPH_PAYS, **asked)
    assert not graphs
    longer = sampler.sample(policy, prompts, 4, max_new_tokens=model.GRAPH_PAYS + 2, **asked)
    ended = {len(reply.ids) for reply in sum(longer, []) if reply.finished}
    assert [len(graph.out) for graph in graphs] == [16] and sum(size < 10 for size in ended) > 3
    assert ids_of(short) == [[reply[: model.GRAPH_PAYS] for reply in group] for group in ids_of(longer)]


def test_one_new_token_is_one_token(models, records, early_ends):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(records[0]), encoder.prompt(records[1])]
    short = sampler.sample(policy, prompts, 12, seeds=[1, 2], temperature=3.0, max_new_tokens=1)
    longer = sampler.sample(policy, prompts, 12, seeds=[1, 2], temperature=3.0, max_new_tokens=5)
    assert ids_of(short) == [[reply.ids[:1].tolist() for reply in replies] for replies in longer]
    ended = [reply.finished for reply in sum(short, [])]
    assert ended == [int(reply.ids[0]) in early_ends for reply in sum(short, [])]
    assert True in ended and False in ended


def test_top_k_1_is_greedy(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompts = [encoder.prompt(record) for record in records]
    greedy = ids_of(sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=8))
    assert ids_of(sampler.sample(policy, prompts, 1, seeds=[1, 2, 3, 4], top_k=1, max_new_tokens=8)) == greedy
    assert ids_of(sampler.sample(policy, prompts, 1, seeds=[1, 2, 3, 4], top_p=1e-9, max_new_tokens=8)) == greedy


def test_greedy_log_probs_are_those_of_temperature_1(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompt = encoder.prompt(records[3])
    ((reply,),) = sampler.sample(policy, [prompt], 1, seeds=[0], temperature=0, max_new_tokens=6)
    with torch.no_grad():
        torch.testing.assert_close(reply.logps, plain_log_probs(policy, encoder, prompt, reply.ids), **EXACT)


def test_several_greedy_replies_are_refused(models, records):
    policy, encoder = models["qwen2_5_vl"]
    with pytest.raises(ValueError, match="greedy"):
        sampler.sample(policy, [encoder.prompt(records[1])], 2, seeds=[0], temperature=0)


def test_image_and_video_pads_are_never_sampled_however_likely(scratch_model, records):
    policy, encoder = scratch_model
    embedding = policy.hf.get_input_embeddings().weight  # tied: also the rows of lm_head
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # wherever a hidden state points, one of the two is the likeliest token by far
        embedding[encoder.image_id], embedding[encoder.video_id] = 200 * direction, -200 * direction
    prompts = [encoder.prompt(record) for record in records]
    pads = {encoder.image_id, encoder.video_id}
    for temperature, n, cuts in ((0, 1, {}), (1.0, 4, {}), (1.0, 4, {"top_k": 1}), (0.7, 4, {"top_p": 0.5})):
        drawn = sampler.sample(policy, prompts, n, seeds=[1, 2, 3, 4], temperature=temperature, max_new_tokens=8, **cuts)
        assert not pads & {token for reply in sum(ids_of(drawn), []) for token in reply}
        assert all(torch.isfinite(reply.logps).all() for reply in sum(drawn, []))
    wanted = [int(generate(policy, encoder, prompt, 1, suppress_tokens=None)[0]) for prompt in prompts]
    assert set(wanted) <= pads, "without our ban they would be drawn"


def test_first_tokens_of_many_replies_follow_the_softmax(models, records):
    policy, encoder = models["qwen2_5_vl"]
    prompt, draws, size = encoder.prompt(records[0]), 3000, vocabulary_of(policy)
    (replies,) = sampler.sample(policy, [prompt], draws, seeds=[3], temperature=0.7, max_new_tokens=1)
    counts = np.bincount([int(reply.ids[0]) for reply in replies], minlength=size)
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [torch.tensor([token]) for token in range(size)])], 0.7)
    chance = logp[:, 0].double().exp().numpy()
    likely = np.flatnonzero(draws * chance > 20)
    assert len(likely) > 5
    deviation = (counts - draws * chance)[likely] / np.sqrt(draws * chance * (1 - chance))[likely]
    assert np.abs(deviation).max() < 4


# ---- draw: one token from a hand-made distribution

CHANCES = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.1, 0.15, 0.0])  # cumulated: 0, .25, .75, .75, .85, 1, 1
TOP = 1 - 2**-53  # the largest number a uniform generator can give


def drawn_at(uniform, temperature=1.0, top_k=0, top_p=1.0, chances=CHANCES, **options):
    number = torch.tensor([[uniform]], dtype=torch.float64)
    token, logp = sampler.sample_tokens(chances.log()[None], number, temperature, top_k, top_p, **options)
    assert float(logp) == pytest.approx(math.log(chances[token]), abs=1e-6), "the log-prob before the cuts"
    return int(token)


@pytest.mark.parametrize(
    "uniform, token", [(0.0, 1), (0.2499, 1), (0.2501, 2), (0.7499, 2), (0.7501, 4), (0.8501, 5), (TOP, 5)]
)
def test_a_draw_inverts_the_cumulated_distribution(uniform, token):
    for block in (1, 2, 3, 7, 512):
        assert drawn_at(uniform, block=block) == token


def test_a_greedy_draw_takes_the_likeliest_token_whatever_the_uniform_number():
    assert [drawn_at(uniform, temperature=0) for uniform in (0.0, 0.1, TOP)] == [2, 2, 2]


def test_top_k_keeps_the_k_likeliest_and_rescales_them():
    # k = 2: 0.25 and 0.5 become 1/3 and 2/3
    assert [drawn_at(uniform, top_k=2) for uniform in (0.0, 0.333, 0.334, TOP)] == [1, 1, 2, 2]
    # k = 3: 0.25, 0.5, 0.15 of 0.9
    assert [drawn_at(uniform, top_k=3) for uniform in (0.277, 0.278, 0.833, 0.834, TOP)] == [1, 2, 2, 5, 5]
    # tokens of no chance do not fill up a large k
    assert {drawn_at(uniform, top_k=6) for uniform in np.linspace(0, TOP, 200)} == {1, 2, 4, 5}


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    edges = np.linspace(0, TOP, 200)
    sets = {0.49: {2}, 0.51: {1, 2}, 0.74: {1, 2}, 0.76: {1, 2, 5}, 0.91: {1, 2, 4, 5}, 1.0: {1, 2, 4, 5}}
    for top_p, kept in sets.items():
        assert {drawn_at(uniform, top_p=top_p) for uniform in edges} == kept, top_p
    # p = 0.6: 0.25 and 0.5 become 1/3 and 2/3
    assert [drawn_at(uniform, top_p=0.6) for uniform in (0.333, 0.334)] == [1, 2]


def test_top_p_counts_after_top_k():
    # k = 3 makes it .278, .556, .167; then p = 0.6 needs the first two, where 0.55 needs one
    assert {drawn_at(uniform, top_k=3, top_p=0.6) for uniform in np.linspace(0, TOP, 50)} == {1, 2}
    assert {drawn_at(uniform, top_k=3, top_p=0.55) for uniform in np.linspace(0, TOP, 50)} == {2}


def test_frequencies_of_draws_match_the_softmax():
    uniform = torch.from_numpy(np.random.default_rng(4).random(40000))
    for block in (2, 512):
        token, _ = sampler.sample_tokens(CHANCES.log()[None], uniform[None], 1.0, 0, 1.0, block)
        observed, expected = np.bincount(token[0], minlength=7), 40000 * CHANCES.double().numpy()
        assert not observed[[0, 3, 6]].any()
        chi_square = sum((observed[k] - expected[k]) ** 2 / expected[k] for k in (1, 2, 4, 5))
        assert chi_square < 16.3, "3 degrees of freedom: 1 in 1000"


def test_no_uniform_number_draws_a_token_of_no_chance():
    generator = torch.Generator().manual_seed(6)
    logits = 8 * torch.randn(400, 50, generator=generator)
    logits[torch.rand(400, 50, generator=generator) < 0.3] = -math.inf
    logits[:100, -5:], logits[50:150, :5] = -math.inf, -math.inf
    for uniform in (0.0, 2.0**-53, 0.5, TOP):
        for top_k, top_p in ((0, 1.0), (4, 1.0), (0, 0.7), (7, 0.4), (0, 1e-9), (50, 0.999999)):
            number = torch.full((400, 1), uniform, dtype=torch.float64)
            token, logp = sampler.sample_tokens(logits, number, 1.0, top_k, top_p, block=8)
            assert torch.isfinite(logp).all(), (uniform, top_k, top_p)
            rank = (logits > logits.gather(-1, token)).sum(-1)
            assert top_k == 0 or (rank < top_k).all()


# ---------------------------------------------------------------------------------------------------------------------
# 3. Encoder


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """{name: path} of noise pictures in the modes and shapes that people have."""
    folder, noise = tmp_path_factory.mktemp("gallery"), np.random.default_rng(0)

    def pixels(width, height, *channels):
        return noise.integers(0, 256, (height, width, *channels), dtype=np.uint8)

    pictures = {
        "rgb": Image.fromarray(pixels(150, 90, 3)),
        "large": Image.fromarray(pixels(700, 400, 3)),
        "dot": Image.fromarray(pixels(5, 9, 3)),
        "exact": Image.fromarray(pixels(224, 448, 3)),
        "grey": Image.fromarray(pixels(61, 200)),
        "alpha": Image.fromarray(pixels(100, 80, 4)),
        "palette": Image.fromarray(pixels(90, 130, 3)).quantize(31),
        "bilevel": Image.fromarray(pixels(90, 130)).convert("1"),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    Image.fromarray(pixels(97, 120, 3)).save(folder / "photo.jpg")
    Image.fromarray(pixels(97, 120, 4)).convert("CMYK").save(folder / "print.jpg")
    return {path.stem: str(path) for path in folder.iterdir()}


def question(prompt, *images, **more):
    return {"id": "q", "prompt": prompt, "images": [str(image) for image in images], "_where": "exam.jsonl:7", **more}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def limited(tiny_dirs, request):
    """An encoder with --max-pixels 40,000 and patches of 14 or 16."""
    return model.load(tiny_dirs[request.param], CPU, max_pixels=40_000)[1]


def test_sides_become_multiples_of_patch_times_merge_within_max_pixels(limited):
    factor = {14: 28, 16: 32}[limited.image_processor.patch_size]
    sides = random.Random(0)
    shapes = [(sides.randint(1, 1500), sides.randint(1, 1500)) for _ in range(60)]
    shapes += [(1, 200), (200, 1), (50, 5000), (5000, 30), (factor, factor), (10_000, 50)]
    for width, height in shapes:
        if max(width, height) > 200 * min(width, height):
            continue
        resized = limited.resize(Image.new("L", (width, height)))
        assert resized.mode == "RGB"
        assert resized.width % factor == resized.height % factor == 0, (width, height)
        assert factor**2 <= resized.width * resized.height <= 40_000, (width, height, resized.size)
        assert limited.resize(resized).size == resized.size, "an engine that resizes again finds nothing to do"


def test_patches_are_those_that_the_processor_makes_when_it_resizes_itself(limited, gallery):
    limits = {"shortest_edge": limited.min_pixels, "longest_edge": 40_000}
    assert len(gallery) == 10
    for name, path in gallery.items():
        patches, grid = limited.picture(path)
        with Image.open(path) as image:
            expected = limited.image_processor(images=[image], do_resize=True, size=limits, return_tensors="pt")
        assert grid.tolist() == expected["image_grid_thw"][0].tolist(), name
        assert patches.dtype == torch.float32 and len(patches) == int(grid.prod()), name
        torch.testing.assert_close(patches, expected["pixel_values"], rtol=0, atol=1e-6, msg=name)


@every_family
def test_a_prompt_holds_one_token_for_every_merged_square_of_its_pictures(models, gallery, family):
    _, encoder = models[family]
    prompt = encoder.prompt(question("One <image> and <image>, two.", gallery["rgb"], gallery["exact"]))
    squares = [int(grid.prod()) // 4 for grid in prompt.grid]
    runs = "".join("#" if token == encoder.image_id else "." for token in prompt.ids.tolist()).strip(".")
    assert [len(run) for run in runs.split(".") if run] == squares
    assert len(prompt.patches) == 4 * sum(squares)
    assert prompt.plain_ids.count(encoder.image_id) == 2, "an engine of its own expands them itself"
    assert len(prompt.ids) == len(prompt.plain_ids) - 2 + sum(squares)
    first, _ = encoder.picture(gallery["rgb"])
    assert torch.equal(prompt.patches[: len(first)], first), "pictures in the order of the record"


def test_positions_worked_by_hand(models, tmp_path):
    _, encoder = models["qwen2_5_vl"]
    Image.new("RGB", (84, 56)).save(tmp_path / "a.png")  # 2 rows of 3 tokens
    prompt = encoder.prompt(question("<image>", tmp_path / "a.png"))
    begin = prompt.ids.tolist().index(encoder.image_id)
    assert prompt.positions[:, :begin].tolist() == [list(range(begin))] * 3
    time, height, width = (prompt.positions[:, begin : begin + 6] - begin).tolist()
    assert time == [0] * 6 and height == [0, 0, 0, 1, 1, 1] and width == [0, 1, 2, 0, 1, 2]
    rest = len(prompt.ids) - begin - 6  # the text goes on after the larger side
    assert (prompt.positions[:, begin + 6 :] - begin).tolist() == [list(range(3, 3 + rest))] * 3
    assert prompt.next == begin + 3 + rest


@every_family
def test_positions_are_those_of_get_rope_index(models, records, family):
    policy, encoder = models[family]
    for record in records:
        prompt = encoder.prompt(record)
        kinds = (prompt.ids == encoder.image_id).long()[None]
        ids = torch.cat([prompt.ids, torch.tensor([encoder.end_id] * 3)])[None]  # a reply of three tokens behind it
        kinds = torch.cat([kinds, torch.zeros(1, 3, dtype=torch.long)], 1)
        expected, _ = policy.hf.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=prompt.grid)
        assert torch.equal(prompt.positions, expected[:, 0, :-3])
        assert expected[:, 0, -3:].tolist() == [[prompt.next, prompt.next + 1, prompt.next + 2]] * 3


def test_pictures_come_first_unless_the_prompt_has_markers(models, gallery):
    _, encoder = models["qwen2_5_vl"]
    frame = "<|vision_start|><|image_pad|><|vision_end|>"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    two = gallery["rgb"], gallery["grey"]
    assert encoder.chat(question("Which?", *two)) == turn(f"{frame}{frame}Which?")
    assert encoder.chat(question("A <image>, B <image>", *two)) == turn(f"A {frame}, B {frame}")
    assert encoder.chat(question("No picture")) == turn("No picture")


def test_without_a_chat_template_a_prompt_is_a_plain_dialogue(tiny_dirs, gallery, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    _, encoder = model.load(tmp_path / "base", CPU)
    frame = "<|vision_start|><|image_pad|><|vision_end|>"
    assert encoder.chat(question("Why? <image> Why?", gallery["rgb"])) == f"User: Why? {frame} Why?\nAssistant:"
    assert encoder.chat(question("Why?", gallery["rgb"])) == f"User: {frame}Why?\nAssistant:"
    assert encoder.chat(question("Why?")) == "User: Why?\nAssistant:"
    assert int((encoder.prompt(question("Why?", gallery["exact"])).ids == encoder.image_id).sum()) == 8 * 16


def test_a_chat_template_in_a_json_file_beside_the_tokenizer_is_found(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "old")
    template = (tmp_path / "old/chat_template.jinja").read_text()
    (tmp_path / "old/chat_template.jinja").unlink()
    (tmp_path / "old/chat_template.json").write_text(json.dumps({"chat_template": template}))
    _, encoder = model.load(tmp_path / "old", CPU)
    assert encoder.chat(question("Why?")) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", ["a <|image_pad|> b", "a <|video_pad|> b", "<image> <|image_pad|>"])
def test_image_tokens_in_a_prompts_own_words_are_refused(models, gallery, text):
    _, encoder = models["qwen2_5_vl"]
    images = [gallery["rgb"]] if "<image>" in text else []
    with pytest.raises(DataError, match=r"^exam.jsonl:7: .*image or video tokens"):
        encoder.prompt(question(text, *images))


def test_a_prompt_longer_than_the_model_is_refused_not_cut(models, gallery):
    _, encoder = models["qwen2_5_vl"]
    with pytest.raises(DataError, match=r"^exam.jsonl:7: \d+ prompt tokens, the model takes 4096"):
        encoder.prompt(question("light " * 4096, gallery["rgb"]))


def test_a_strip_that_no_model_takes_is_refused(models, tmp_path):
    _, encoder = models["qwen2_5_vl"]
    Image.new("RGB", (2, 500)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match="^exam.jsonl:7: .*aspect ratio"):
        encoder.prompt(question("?", tmp_path / "strip.png"))


def test_a_picture_that_vanished_is_named(models, tmp_path):
    _, encoder = models["qwen2_5_vl"]
    with pytest.raises(DataError, match=r"^exam.jsonl:7: .*gone.png"):
        encoder.prompt(question("?", tmp_path / "gone.png"))


def test_max_pixels_below_one_image_token_is_refused(tiny_dirs):
    with pytest.raises(DataError, match="--max-pixels 783 is below one image token"):
        model.load(tiny_dirs["qwen2_5_vl"], CPU, max_pixels=783)
    _, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, max_pixels=784)
    assert encoder.resize(Image.new("RGB", (90, 300))).size == (28, 28)


@pytest.mark.parametrize(
    "text",
    [
        "<think>1 is lighter.</think><answer>A</answer>",
        "  two  spaces ,and . a !\n\n\ttab\r\n",
        "do n't  , it 's we 're",
        "naïve 中文 🙂 ½ \u200b \x00",
        "",
        "<|im_start|>user\nWhat?<|im_end|>\n<|endoftext|> more",
    ],
)
def test_a_reply_survives_encoding_and_decoding_with_every_special_token_visible(models, text):
    _, encoder = models["qwen2_5_vl"]
    ids = encoder.encode_reply(text)
    assert ids.dtype == torch.long and int(ids[-1]) == encoder.end_id == encoder.tokenizer.eos_token_id
    assert encoder.decode(ids) == text
    assert encoder.decode(ids.tolist()) == text
    assert encoder.decode(ids[:-1]) == text, "a reply that was cut before its end"


def test_only_the_end_token_itself_is_dropped_from_a_decoded_reply(models):
    _, encoder = models["qwen2_5_vl"]
    end, other = encoder.end_id, encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    letter = encoder.tokenizer.convert_tokens_to_ids("A")
    assert encoder.decode([letter, end]) == "A"
    assert encoder.decode([letter, end, end]) == "A<|im_end|>"
    assert encoder.decode([letter, other]) == "A<|endoftext|>"
    assert encoder.decode([end]) == encoder.decode([]) == ""


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_reply_that_holds_pads_is_refused_because_no_model_may_say_it(models, token):
    _, encoder = models["qwen2_5_vl"]
    with pytest.raises(DataError, match="image or video tokens"):
        encoder.encode_reply(f"I see {token}.")


def test_a_picture_is_encoded_once_and_then_kept(models, gallery):
    _, encoder = models["qwen2_5_vl"]
    first, again = encoder.picture(gallery["large"]), encoder.picture(gallery["large"])
    assert first[0] is again[0] and first[1] is again[1]


def test_a_full_cache_forgets_the_oldest_picture_and_encodes_it_again(models, tiny_dirs, gallery):
    policy, _ = models["qwen2_5_vl"]
    path, config = tiny_dirs["qwen2_5_vl"], policy.hf.config
    names = [gallery[name] for name in ("rgb", "grey", "photo")]
    sizes = [model.Encoder(path, config, None).picture(name)[0].nbytes for name in names]
    encoder = model.Encoder(path, config, None, cache_bytes=sum(sizes) - 1)
    first, second, third = (encoder.picture(name) for name in names)
    assert list(encoder._cache) == names[1:], "the third pushed the first out"
    assert encoder.picture(names[1])[0] is second[0]
    again = encoder.picture(names[0])
    assert again[0] is not first[0] and torch.equal(again[0], first[0])
    assert names[1] in encoder._cache and names[2] not in encoder._cache, "the one not used for longest goes"
    held = [future.result() for future in encoder._cache.values()]
    assert encoder._room == sum(sizes) - 1 - sum(entry[0].nbytes for entry in held)


def test_pictures_asked_for_ahead_are_encoded_once_and_are_the_same(models, tiny_dirs, gallery, monkeypatch):
    policy, _ = models["qwen2_5_vl"]
    names = [gallery[name] for name in ("rgb", "grey", "photo")]
    encoder, plain = (model.Encoder(tiny_dirs["qwen2_5_vl"], policy.hf.config, None) for _ in range(2))
    encoded, encode = [], encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda path: encoded.append(path) or encode(path))
    encoder.prefetch([{"images": names[:2]}, {"images": names}, {"images": []}])
    for name in names:
        for found, expected in zip(encoder.picture(name), plain.picture(name), strict=True):
            assert torch.equal(found, expected)
    assert sorted(encoded) == sorted(names)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Records

GOOD = {
    "id": "one",
    "images": ["pictures/a.png"],
    "prompt": "Which is lighter?",
    "answer": "A",
    "answer_type": "letter",
    "think": True,
    "source": "tests",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with a sound picture and five broken ones."""
    (tmp_path / "pictures").mkdir()
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    for name in ("a.png", "cut.png", "cut.jpg"):
        noise.save(tmp_path / "pictures" / name)
    for name in ("cut.png", "cut.jpg"):
        path = tmp_path / "pictures" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 5])
    flipped = bytearray((tmp_path / "pictures/a.png").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (tmp_path / "pictures/flipped.png").write_bytes(flipped)
    (tmp_path / "pictures/empty.png").write_bytes(b"")
    (tmp_path / "pictures/words.png").write_text("not a picture")
    return tmp_path


def write_lines(path, *lines):
    """Lines are bytes, text or objects. Returns the path."""
    with open(path, "wb") as file:
        for line in lines:
            text = line if isinstance(line, str | bytes) else json.dumps(line)
            file.write((text if isinstance(text, bytes) else text.encode()) + b"\n")
    return path


def without(name):
    return {key: value for key, value in GOOD.items() if key != name} | ({} if name == "id" else {"id": "two"})


def other(**changes):
    return GOOD | {"id": "two"} | changes


BAD_LINES = {
    "not JSON": ('{"id": "two", "images": [', "not JSON"),
    "JSON cut in a word": (json.dumps(other())[:-9], "not JSON"),
    "deep nesting": ("[" * 100_000, "not JSON"),
    "not UTF-8": (json.dumps(other()).encode().replace(b"lighter", b"l\xefghter"), "utf-8"),
    "half a surrogate pair": (json.dumps(other(prompt="\ud83d")), "surrogates"),
    "an array": ([GOOD], "JSON object"),
    "a number": (17, "JSON object"),
    **{f"no {name}": (without(name), f'"{name}" is missing') for name in GOOD},
    "a number as id": (other(id=2), '"id" must be str'),
    "null as prompt": (other(prompt=None), '"prompt" must be str'),
    "text as images": (other(images="pictures/a.png"), '"images" must be list'),
    "a number as image": (other(images=[3]), '"images" must be a list of paths'),
    "a number as think": (other(think=1), '"think" must be bool'),
    "text as think": (other(think="true"), '"think" must be bool'),
    "a list as source": (other(source=["a"]), '"source" must be str'),
    "an answer_type nobody knows": (other(answer_type="essay"), 'answer_type "essay"'),
    "an answer_type of another type": (other(answer_type=None), '"answer_type" must be str'),
    "the id of line 1": (other(id="one"), 'id "one" stands already at'),
    "too few markers": (other(images=["pictures/a.png"] * 2, prompt="<image>?"), "1 <image> markers in the"),
    "too many markers": (other(prompt="<image> and <image>?"), "2 <image> markers in the prompt, 1 im"),
    "a marker without images": (other(images=[], prompt="<image>?"), "1 <image> markers in the prompt, 0 images"),
    "a missing image": (other(images=["pictures/none.png"]), 'none.png" is missing'),
    "a folder as image": (other(images=["pictures"]), 'pictures" is broken'),
    "a truncated PNG": (other(images=["pictures/cut.png"]), 'cut.png" is broken'),
    "a truncated JPEG": (other(images=["pictures/cut.jpg"]), 'cut.jpg" is broken'),
    "a flipped bit": (other(images=["pictures/flipped.png"]), 'flipped.png" is broken'),
    "an empty image": (other(images=["pictures/empty.png"]), 'empty.png" is broken'),
    "words as image": (other(images=["pictures/a.png", "pictures/words.png"]), 'words.png" is broken'),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named_with_file_line_and_cause(folder, name):
    line, cause = BAD_LINES[name]
    path = write_lines(folder / "bad.jsonl", GOOD, "", line, other(id="three"))  # the empty line counts: it is line 3
    with pytest.raises(DataError) as caught:
        read_records(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert cause in str(caught.value)


def test_an_image_path_with_a_null_byte_is_named(folder):
    path = write_lines(folder / "null.jsonl", other(images=["a\0.png"]))
    with pytest.raises(DataError, match=r"null.jsonl:1: .*images"):
        read_records(path)


def test_an_id_may_not_return_in_a_second_file(folder):
    first = write_lines(folder / "first.jsonl", other(id="zero"), GOOD)
    second = write_lines(folder / "second.jsonl", other(), GOOD)
    with pytest.raises(DataError) as caught:
        read_records([first, str(second)])
    assert str(caught.value) == f'{second}:2: id "one" stands already at {first}:2'


def test_files_without_records_are_refused(folder):
    good, empty = write_lines(folder / "good.jsonl", GOOD), write_lines(folder / "empty.jsonl", "", "  ")
    for paths in (empty, [good, empty], [empty, good]):
        with pytest.raises(DataError, match=r"empty.jsonl: no records"):
            read_records(paths)


def test_a_file_that_cannot_be_read_is_named(folder):
    for path in (folder / "none.jsonl", folder / "pictures"):
        with pytest.raises(DataError) as caught:
            read_records([str(path)])
        assert str(caught.value).startswith(f"{path}: cannot be read")


def test_what_the_stages_check_finds_is_named_like_the_rest(folder):
    def check(record):
        if record["answer"] == "Z":
            raise ValueError("the answer Z is no option")

    path = write_lines(folder / "checked.jsonl", GOOD, other(answer="Z"))
    with pytest.raises(DataError) as caught:
        read_records(path, check=check)
    assert str(caught.value) == f"{path}:2: the answer Z is no option"
    assert len(read_records(path, check=lambda record: None)) == 2


@pytest.mark.parametrize("chosen", [None, "", " \n", 7])
def test_pairs_need_their_texts(folder, chosen):
    path = write_lines(folder / "pairs.jsonl", GOOD | {"chosen": "A"}, other(chosen=chosen))
    with pytest.raises(DataError, match=r'pairs.jsonl:2: the field "chosen" must be text'):
        read_records(path, text_fields=("chosen",))
    assert len(read_records(path)) == 2


def test_answers_of_every_kind_are_taken_as_they_are(folder):
    answers = [True, 3, 2.5, "A", [2, 1], [0.5, 1, 2, 3], None]
    path = write_lines(folder / "a.jsonl", *[other(id=str(i), answer=answer) for i, answer in enumerate(answers)])
    assert [record["answer"] for record in read_records(path)] == answers


def test_image_paths_are_relative_to_their_file_or_absolute(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    absolute = str((folder / "pictures/a.png").resolve())
    path = write_lines(folder / "pictures/in.jsonl", other(images=["a.png", absolute, "../pictures/a.png"]))
    (record,) = read_records(path)
    assert record["images"] == [absolute] * 3


def test_unknown_fields_go_through_reading_and_writing_untouched_and_where_is_never_written(folder):
    more = {"order": [2, 1], "nested": {"ü": [None, True, 1e-7, {"<b>": "\u2028 \\ \" 🙂"}]}, "empty": {}}
    path = write_lines(folder / "rich.jsonl", GOOD | more, "", other(**more, category=0))
    records = read_records(path)
    assert [record["_where"] for record in records] == [f"{path}:1", f"{path}:3"]
    write_jsonl(folder / "new/deep/copy.jsonl", records)
    assert "_where" not in (folder / "new/deep/copy.jsonl").read_text()
    rows = [row for _, row in read_jsonl(folder / "new/deep/copy.jsonl")]
    picture = str((folder / "pictures/a.png").resolve())
    assert rows == [GOOD | more | {"images": [picture]}, other(**more, category=0) | {"images": [picture]}]
    again = read_records(folder / "new/deep/copy.jsonl")
    assert [without_where(record) for record in again] == rows


def without_where(record):
    return {key: value for key, value in record.items() if key != "_where"}


def test_a_write_that_fails_leaves_the_old_file(folder):
    write_jsonl(folder / "old.jsonl", [{"n": 1}])
    with pytest.raises(TypeError):
        write_jsonl(folder / "old.jsonl", [{"n": 2}, {"n": object()}])
    assert (folder / "old.jsonl").read_text() == '{"n": 1}\n'


# ---------------------------------------------------------------------------------------------------------------------
# 5. Order, learning rate, micro-batches


def test_every_epoch_is_a_permutation_of_its_own():
    order = epoch_order(3, 17, 0, 17 * 4)
    epochs = [order[start : start + 17] for start in range(0, 68, 17)]
    assert all(sorted(epoch) == list(range(17)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs} | {tuple(range(17))}) == 5


def test_a_window_of_the_order_is_a_slice_of_the_whole():
    whole = epoch_order(3, 7, 0, 50)
    for start, count in ((0, 0), (0, 7), (5, 20), (14, 7), (49, 1), (13, 2)):
        assert epoch_order(3, 7, start, count) == whole[start : start + count]


def test_another_seed_gives_another_order():
    orders = {tuple(epoch_order(seed, 30, 0, 30)) for seed in (0, 1, 2, 11)}
    assert len(orders) == 4


def test_the_first_epochs_of_neighbouring_seeds_are_not_shifted_copies():
    assert epoch_order(0, 30, 30, 30) != epoch_order(1, 30, 0, 30)


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


def sized_groups(*sizes):
    """Groups of one reply (two tokens, of which one is fed) that take so many places each."""
    reply = torch.zeros(2, dtype=torch.long)
    ids = [torch.zeros(size - 1, dtype=torch.long) for size in sizes]
    return [(model.Prompt(each, torch.zeros(3, len(each)), len(each), None, None, []), [reply]) for each in ids]


def test_micro_batches_by_hand():
    # the longest first: 10 alone leaves no room for 7; 7 + 3 + 3 = 13
    assert training.micro_batches(CPU, sized_groups(3, 10, 7, 3), 14) == [[1], [2, 0, 3]]
    assert training.micro_batches(CPU, sized_groups(3, 10, 7, 3), 12) == [[1], [2, 0], [3]]


def test_micro_batches_count_what_pack_feeds():
    groups = sized_groups(3, 10, 7, 3)
    prompt = groups[0][0]
    groups[0] = prompt, [torch.zeros(5, dtype=torch.long), torch.zeros(4, dtype=torch.long)]  # 2 + 4 + 3 = 9
    assert training.micro_batches(CPU, groups, 16) == [[1], [0, 2], [3]]
    assert model.pack([groups[0], groups[2]]).ids.numel() == 16
    groups[2][0].patches = torch.zeros(5, 1)  # pictures pass through a tower's blocks: 7 + 5 = 12
    assert training.micro_batches(CPU, groups, 16) == [[2], [1], [0, 3]]
    assert training.micro_batches(CPU, groups, 22) == [[2, 1], [0, 3]]


@pytest.mark.parametrize("budget", [1, 40, 64, 100, 1000])
def test_micro_batches_hold_every_group_once_within_the_budget(budget):
    sizes = [random.Random(8).randint(2, 50) for _ in range(41)] + [64]
    batches = training.micro_batches(CPU, sized_groups(*sizes), budget)
    assert sorted(index for batch in batches for index in batch) == list(range(42))
    for batch in batches:
        fed = sum(sizes[index] for index in batch)
        assert fed <= budget or len(batch) == 1, "only a group that is too large by itself may exceed it, alone"
    if budget == 1000:
        assert len(batches) == math.ceil(sum(sizes) / 1000)


def test_a_rank_with_less_to_do_gets_empty_micro_batches():
    class OtherRankHasFive:
        def gather(self, count):
            return [count, 5]

    batches = training.micro_batches(OtherRankHasFive(), sized_groups(4, 4, 9), 8)
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
# 6. Models and runs on disk


@every_family
def test_a_saved_model_is_the_same_to_from_pretrained_and_to_load(models, records, tmp_path, family):
    policy, encoder = models[family]
    training.save_model(policy, encoder, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(plain) is type(policy.hf) and type(plain).__module__.startswith("transformers.models.")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight, "tied"
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name], "stored once"
    prompt = encoder.prompt(records[2])
    kinds = (prompt.ids == encoder.image_id).long()[None]
    pictures = {"pixel_values": prompt.patches, "image_grid_thw": prompt.grid, "mm_token_type_ids": kinds}
    with torch.no_grad():
        expected = policy.hf(input_ids=prompt.ids[None], **pictures).logits
        torch.testing.assert_close(plain(input_ids=prompt.ids[None], **pictures).logits, expected, **EXACT)
    loaded, reader = model.load(tmp_path, CPU)
    again = reader.prompt(records[2])
    assert torch.equal(again.ids, prompt.ids) and torch.equal(again.patches, prompt.patches)
    assert loaded.end_ids == policy.end_ids and len(policy.end_ids) == 2
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, dict(policy.named_parameters())[name]), name


@every_family
def test_a_tiny_model_has_heads_of_32(models, family):
    text = models[family][0].hf.model.language_model
    assert {layer.self_attn.head_dim for layer in text.layers} == {32}
    weight = text.layers[0].self_attn.q_proj.weight
    assert weight.shape == (2 * 32, 64)


@every_family
def test_the_same_seed_makes_the_same_bytes(tiny_dirs, tmp_path, family):
    state = torch.random.get_rng_state()
    make_tiny(tmp_path / "same", family, layers=3)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers are touched"
    make_tiny(tmp_path / "other", family, layers=3, seed=1)
    files = sorted(path.name for path in tiny_dirs[family].iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (tiny_dirs[family] / name).read_bytes(), name
    other_weights = (tmp_path / "other/model.safetensors").read_bytes()
    assert other_weights != (tiny_dirs[family] / "model.safetensors").read_bytes()


def test_a_tiny_model_of_another_size_has_it(tmp_path, capsys):
    tiny_model.main([str(tmp_path / "t"), "--hidden", "96", "--heads", "3", "--layers", "1", "--vocab", "2000"])
    assert "tiny qwen2_5_vl" in capsys.readouterr().out
    policy, encoder = model.load(tmp_path / "t", CPU)
    assert policy.hf.get_input_embeddings().weight.shape == (2000, 96)
    assert len(policy.hf.model.language_model.layers) == 1
    assert encoder.decode([1999]) == "", "a row that no token has"


def test_sizes_that_fit_no_head_are_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        tiny_model.main([str(tmp_path / "t"), "--hidden", "72"])
    assert caught.value.code == 2 and "--hidden" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()


def test_a_reply_ends_on_the_tokenizers_end_token_and_on_those_of_the_generation_config(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "m")
    path, ids = tmp_path / "m/generation_config.json", {}
    for listed in (17, [23, 17], None):
        path.write_text(json.dumps({} if listed is None else {"eos_token_id": listed}))
        policy, encoder = model.load(tmp_path / "m", CPU)
        ids[str(listed)] = set(policy.end_ids) - {encoder.end_id}
        assert encoder.end_id in policy.end_ids
    assert ids == {"17": {17}, "[23, 17]": {17, 23}, "None": set()}
    path.unlink()
    assert model.load(tmp_path / "m", CPU)[0].end_ids == (encoder.end_id,)


def spoil(folder, how):
    """Break a copy of a model directory in one way."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in tensors
    if how == "pickled weights only":
        torch.save(tensors, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:200_000])
    elif how == "a weight is missing":
        del tensors[name]
        save_file(tensors, weights, {"format": "pt"})
    elif how == "a weight of another shape":
        save_file(tensors | {name: tensors[name][:5].contiguous()}, weights, {"format": "pt"})
    elif how == "another model type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    elif how == "a config that is not JSON":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        file = {"no config": "config", "no tokenizer": "tokenizer", "no image settings": "preprocessor_config"}[how]
        (folder / f"{file}.json").unlink()


@pytest.mark.parametrize(
    "how",
    [
        "pickled weights only",
        "no weights",
        "truncated weights",
        "a weight is missing",
        "a weight of another shape",
        "another model type",
        "a config that is not JSON",
        "no config",
        "no tokenizer",
        "no image settings",
    ],
)
def test_a_directory_that_is_no_sound_model_is_refused_in_one_line(tiny_dirs, tmp_path, how):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    with pytest.raises(DataError) as caught:
        model.load(tmp_path / "bad", CPU)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'bad'}: ") and "\n" not in message
    if how == "another model type":
        assert "gpt2 is not supported (qwen2_vl, qwen2_5_vl, qwen3_vl)" in message
    if how == "a weight is missing":
        assert "layers.1.mlp.up_proj.weight" in message


def test_a_missing_model_directory_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="^--model .*nowhere: no such directory") as caught:
        model.load(tmp_path / "nowhere", CPU)
    assert "\n" not in str(caught.value)


def test_a_frozen_vision_tower_gets_no_gradient_and_no_update(tiny_dirs, records):
    policy, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, train=True, freeze_vision=True)
    assert next(policy.parameters()).dtype == torch.float32
    before = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}
    logp, _ = model.log_probs(policy, groups_of(encoder, records, [(0, 2)]))
    (-logp.sum()).backward()
    optimizer = training.adamw(policy, 1e-3)
    training.update(policy, optimizer, 1e-3, 1.0)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]) == ("visual" in name), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_changes_nothing_and_ends_the_run(scratch_model, records, value):
    policy, encoder = scratch_model
    before = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}
    optimizer = training.adamw(policy, 1e-3)
    logp, _ = model.log_probs(policy, groups_of(encoder, records, [(1, 1)]))
    (value * logp.sum()).backward()
    with pytest.raises(RuntimeError, match=f"gradient norm is (nan|{value}); no weight was changed"):
        training.update(policy, optimizer, 1e-3, 1.0)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]), name


@pytest.fixture
def signals_restored():
    """Run.open takes Ctrl-C and SIGTERM for itself: give them back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def settings(out, **changes):
    usual = {"out": str(out), "lr": 1e-2, "resume": False, "overwrite": False, "steps": 4}
    return argparse.Namespace(**usual | changes)


def learn(policy, optimizer, groups, steps):
    for _ in range(steps):
        logp, _ = model.log_probs(policy, groups)
        (-logp.mean()).backward()
        training.update(policy, optimizer, 1e-2, 1.0)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tiny_dirs, records, tmp_path, signals_restored):
    path = tiny_dirs["qwen2_5_vl"]
    policy, encoder = model.load(path, CPU, train=True)
    groups = groups_of(encoder, records, [(0, 2), (1, 1)])
    optimizer = training.adamw(policy, 1e-2)
    run = training.Run.open(settings(tmp_path / "run"), CPU)
    for step in range(1, 4):
        learn(policy, optimizer, groups, 1)
        run.log({"step": step}, [{"reply": "A"}])
        if step == 2:
            run.save(step, policy, optimizer)
    run.finish()
    unbroken = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}

    policy, _ = model.load(path, CPU, train=True)
    optimizer = training.adamw(policy, 1e-2)
    run = training.Run.open(settings(tmp_path / "run", resume=True, steps=9), CPU)
    assert run.step == 2
    for name in ("log.jsonl", "samples.jsonl"):  # step 3 will be done again
        assert [row["step"] for _, row in read_jsonl(tmp_path / "run" / name)] == [1, 2]
    run.restore(policy, optimizer)
    learn(policy, optimizer, groups, 1)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, unbroken[name]), name


def test_a_run_directory_refuses_a_second_run_and_changed_settings(tmp_path, signals_restored):
    training.Run.open(settings(tmp_path), CPU).log({"step": 1})
    with pytest.raises(DataError, match="add --resume to go on with it or --overwrite"):
        training.Run.open(settings(tmp_path), CPU)
    with pytest.raises(DataError, match="--lr was 0.01, now 0.5"):
        training.Run.open(settings(tmp_path, resume=True, lr=0.5), CPU)
    training.Run.open(settings(tmp_path, overwrite=True, lr=0.5), CPU)
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_checkpoints_are_few_whole_and_written_when_due(scratch_model, records, tmp_path, signals_restored):
    policy, encoder = scratch_model
    optimizer = training.adamw(policy, 1e-3)
    learn(policy, optimizer, groups_of(encoder, records, [(1, 1)]), 1)
    run = training.Run.open(settings(tmp_path), CPU)
    assert [step for step in range(1, 8) if run.checkpoint_due(step, 7, 3)] == [3, 6, 7]
    assert [step for step in range(1, 8) if run.checkpoint_due(step, 7, 0)] == [7]
    for step in (3, 6, 7):
        run.save(step, policy, optimizer, keep=2)
    run.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000006", "step_000007"]
    assert (tmp_path / "LATEST").read_text() == "step_000007"
    signal.raise_signal(signal.SIGTERM)  # asked to stop: a checkpoint is due, then the run leaves
    assert run.checkpoint_due(1, 7, 0)
    with pytest.raises(KeyboardInterrupt, match="after step 1 of 7; --resume"):
        run.leave_if_asked(1, 7)


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
