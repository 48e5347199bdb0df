"""attention.py against a softmax with a mask, written out; the CUDA kernels' calls with a stand-in (flash.py)."""

import math

import numpy as np
import pytest
import torch
from groups import EXACT, every_family, picture_inputs
from transformers import AutoModelForImageTextToText

import attention


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
    by_prompt = [0] * len(prompts)
    for size, owner in zip(replies, owners, strict=True):
        by_prompt[owner] += size
    return attention.Layout(*(attention.Segments.of(lengths) for lengths in (prompts, replies, by_prompt)))


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

    def forward(q, k, v, padding, causal, scale):
        states = [x.transpose(1, 2) for x in (q, k, v)]
        mask = attention.additive_mask(padding, q.dtype)
        return [x.transpose(1, 2) for x in attention.formula(*states, mask, causal, scale)]

    def backward(grad, q, k, v, out, lse, padding, causal, scale):
        states = [x.transpose(1, 2) for x in (grad, q, k, v, out, lse)]
        mask = attention.additive_mask(padding, q.dtype)
        grads = attention.formula_backward(*states, mask, causal, scale)
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
    found_grads = torch.autograd.grad((found * weight).sum(), (q, k, v))
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


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


# ---------------------------------------------------------------------------------------------------------------------
# FlashAttention's calls


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


# ---------------------------------------------------------------------------------------------------------------------
# The vision tower, and the Hugging Face model inside


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
    found_grads = torch.autograd.grad(found.exp().sum(), (q, k, v))
    expected_grads = torch.autograd.grad(expected.exp().sum(), (q, k, v))
    for one, other in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@every_family
def test_the_hugging_face_model_inside_still_stands_on_its_own(tiny_dirs, models, records, family):
    policy, encoder = models[family]
    own = AutoModelForImageTextToText.from_pretrained(tiny_dirs[family], attn_implementation="sdpa")
    own.load_state_dict(policy.hf.state_dict())
    prompts = [encoder.prompt(records[0]), encoder.prompt(records[1])]
    for prompt in prompts:
        ids = prompt.ids[None]
        pictures = picture_inputs(encoder, prompt, ids)
        with torch.no_grad():
            found, expected = (hf(input_ids=ids, **pictures).logits for hf in (policy.hf, own))
        torch.testing.assert_close(found, expected, **EXACT)
