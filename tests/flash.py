"""A stand-in for FlashAttention's CUDA kernels on a CPU: the formula, with the checks that the real ones make.

It shows what our calls mean (which segments, which log-sum-exp, which layout). How the kernels round is shown by
bench/gpu.sh on a GPU.
"""

import math
from contextlib import contextmanager

import torch


@contextmanager
def stand_in():
    """Inside, torch's flash operations work on a CPU."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def scores(q, k, scale, causal):
    """q (Lq, heads, d), k (Lk, kv heads, d) of one segment -> (heads, Lq, Lk) fp32."""
    score = torch.einsum("ihd,jhd->hij", q.float(), for_each_head(k, q)) * scale
    later = torch.arange(len(k)) > torch.arange(len(q))[:, None] + len(k) - len(q)
    return score.masked_fill(later, -math.inf) if causal else score


def for_each_head(k, q):
    """(L, kv heads, d) -> (L, heads, d) fp32: every head of the queries with its own copy."""
    return k.float().repeat_interleave(q.shape[1] // k.shape[1], 1)


def segments(bounds_q, bounds_k, longest_q, longest_k):
    """The slices of each query segment and of its key segment."""
    assert bounds_q.dtype == bounds_k.dtype == torch.int32 and len(bounds_q) == len(bounds_k)
    assert longest_q >= bounds_q.diff().max() and longest_k >= bounds_k.diff().max()
    ends_q, ends_k = bounds_q.tolist(), bounds_k.tolist()
    numbers = range(len(ends_q) - 1)
    return [(slice(*ends_q[n : n + 2]), slice(*ends_k[n : n + 2])) for n in numbers]


def forward(
    q, k, v, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, debug, *, scale=None, **options
):  # fmt: skip
    if bounds_q is None:  # (B, L, heads, d) -> lse (B, heads, L)
        assert (longest_q, longest_k) == (q.shape[1], k.shape[1])
        bounds = [torch.tensor([0, x.shape[1]]).int() for x in (q, k)]
        rest = *bounds, longest_q, longest_k, 0.0, causal, False
        each = [forward(q[b], k[b], v[b], *rest, scale=scale) for b in range(len(q))]
        return torch.stack([one[0] for one in each]), torch.stack([one[1] for one in each]), q, q, q
    assert longest_q > 1 or len(q) == len(bounds_q) - 1, "told 1, the kernel reads one query of every segment"
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i, j in segments(bounds_q, bounds_k, longest_q, longest_k):
        score = scores(q[i], k[j], scale, causal)
        lse[:, i] = score.logsumexp(-1)
        out[i] = torch.einsum("hij,jhd->ihd", score.softmax(-1), for_each_head(v[j], q)).to(q.dtype)
    return out, lse, q, q, q


def backward(
    grad, q, k, v, out, lse, bounds_q, bounds_k, longest_q, longest_k, dropout, causal, seed, offset, *, scale=None,
    **options,
):  # fmt: skip
    assert grad.shape == q.shape == out.shape and lse.shape == (q.shape[1], len(q)) and lse.is_contiguous()
    # NaN: what no segment covers must not be read.
    dq, dk, dv = (torch.full_like(x, math.nan) for x in (q, k, v))
    shared = q.shape[1] // k.shape[1]
    for i, j in segments(bounds_q, bounds_k, longest_q, longest_k):
        p = (scores(q[i], k[j], scale, causal) - lse[:, i, None]).exp()
        keys, values = for_each_head(k[j], q), for_each_head(v[j], q)
        delta = (grad[i].float() * out[i].float()).sum(-1).T[..., None]
        ds = p * (torch.einsum("ihd,jhd->hij", grad[i].float(), values) - delta) * scale
        dq[i] = torch.einsum("hij,jhd->ihd", ds, keys).to(q.dtype)
        for into, left, right in ((dk, ds, q[i]), (dv, p, grad[i])):
            whole = torch.einsum("hij,ihd->jhd", left, right.float())
            into[j] = whole.unflatten(1, (-1, shared)).sum(2).to(q.dtype)
    return dq, dk, dv
