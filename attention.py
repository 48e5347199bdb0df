"""Attention with the prompt once: `[all prompts | all replies]` in one row without padding, and no mask.

A prompt attends to itself, a reply to its prompt and to itself. The softmax of a reply therefore runs over two sets of
keys, and attention over a union of sets is the mean of the attentions over each, weighted by the exponential of the
log-sum-exp of its scores. So nobody copies a prompt's keys for its replies, and no kernel needs a mask:

    out = Σ_part exp(lse_part − lse) out_part,    lse = log Σ_part exp(lse_part)

In the backward pass, the gradient through one part is what a kernel gives when it is told the whole out and lse, for
p = exp(score − lse) is then the true probability of each key (FlashAttention, arXiv 2205.14135, appendix B).

Legend: a row holds segments (prompts, or replies) one behind the other. L tokens of a row, N tokens of n segments, d
size of a head. Queries have `heads` heads, keys and values `kv heads`, which may be fewer. lse: log-sum-exp in fp32.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------------------------
# Who sees whom


@dataclass
class Segments:
    """How the tokens of a flat row fall into n consecutive segments.

    lengths (n) Python ints; bounds (n+1,) int32, where each begins; longest: tokens of the longest.
    The rest converts between the flat row and a padded rectangle (n, longest), and is None if the row is one already:
    gather_index (n, longest): the token in each cell, 0 where there is none; cells (N,): the cell of each token;
    padding (n, longest): True where no token is.
    """

    lengths: list
    bounds: torch.Tensor
    longest: int
    gather_index: torch.Tensor | None = None
    cells: torch.Tensor | None = None
    padding: torch.Tensor | None = None

    @classmethod
    def of(cls, lengths: list[int]) -> "Segments":
        sizes = torch.tensor(lengths, dtype=torch.long)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        longest = max(lengths, default=0)
        # Equal lengths need no index: the rectangle is a view, which costs nothing.
        if min(lengths, default=0) == longest:
            return cls(lengths, bounds.int(), longest)
        column = torch.arange(longest)
        padding = column >= sizes[:, None]
        gather_index = (bounds[:-1, None] + column).masked_fill(padding, 0)
        cells = (~padding).flatten().nonzero()[:, 0]
        return cls(lengths, bounds.int(), longest, gather_index, cells, padding)

    def to(self, device) -> "Segments":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})

    def pad(self, flat: torch.Tensor) -> torch.Tensor:
        """(N, …) -> (n, longest, …); what is in the padding means nothing."""
        if self.gather_index is None:
            return flat.view(len(self.lengths), self.longest, *flat.shape[1:])
        return flat[self.gather_index]

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """(n, longest, …) -> (N, …), the inverse."""
        flat = padded.flatten(0, 1)
        return flat if self.cells is None else flat[self.cells]


@dataclass
class Layout:
    """Who sees whom in a packed row `[all prompts | all replies]`: a prompt itself, a reply its prompt and itself.

    prompts (R segments), replies (B segments); by_prompt (R segments): the same reply tokens, those of one prompt
    together. kv_cache: {layer: (keys, values)} of the prompts, filled by a forward when it is a dict (the sampler's
    prefill). flash: whether to use FlashAttention's kernels, set by the policy.
    """

    prompts: Segments
    replies: Segments
    by_prompt: Segments
    kv_cache: dict | None = None
    flash: bool = False

    def to(self, device) -> "Layout":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (L, heads, d), k and v (L, kv heads, d) of one decoder layer -> (L, heads, d)."""
        if self.kv_cache is not None:
            self.kv_cache[layer] = k, v
        return PromptOnce.apply(q, k, v, self, scale)


# ---------------------------------------------------------------------------------------------------------------------
# Three calls of a kernel, merged


class PromptOnce(torch.autograd.Function):
    """Attention in a packed row: q (L, heads, d), k and v (L, kv heads, d), layout -> (L, heads, d)."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scale):
        split, flash = sum(layout.prompts.lengths), layout.flash
        prompt, reply = slice(None, split), slice(split, None)
        states = q[prompt], k[prompt], v[prompt]
        # Call 1: prompts to themselves.
        out, lse = attend(*states, layout.prompts, layout.prompts, True, scale, flash)
        if split < len(q):
            states = q[reply], k[reply], v[reply]
            # Call 2: replies to themselves, each alone.
            own = attend(*states, layout.replies, layout.replies, True, scale, flash)
            states = q[reply], k[prompt], v[prompt]
            # Call 3: all replies of a prompt, as one long query, to the prompt's keys.
            shared = attend(*states, layout.by_prompt, layout.prompts, False, scale, flash)
            reply_out, reply_lse = merge(own, shared)
            out, lse = torch.cat([out, reply_out]), torch.cat([lse, reply_lse])
        # No scores are kept: the backward pass computes them again from q, k and lse.
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.split = layout, scale, split
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        layout, scale, split = ctx.layout, ctx.scale, ctx.split
        prompt, reply = slice(None, split), slice(split, None)

        def part(queries, keys, query_segments, key_segments, causal):
            states = q[queries], k[keys], v[keys], out[queries], lse[queries]
            segments = query_segments, key_segments
            return attend_backward(grad[queries], *states, *segments, causal, scale, layout.flash)

        dq, dk, dv = part(prompt, prompt, layout.prompts, layout.prompts, True)
        if split < len(q):
            own_dq, own_dk, own_dv = part(reply, reply, layout.replies, layout.replies, True)
            shared_dq, shared_dk, shared_dv = part(reply, prompt, layout.by_prompt, layout.prompts, False)
            dq = torch.cat([dq, own_dq + shared_dq])
            # A prompt's keys and values learn from all its replies.
            dk = torch.cat([dk + shared_dk, own_dk])
            dv = torch.cat([dv + shared_dv, own_dv])
        return dq, dk, dv, None, None


def merge(one, other):
    """Attention over two disjoint sets of keys, (out (L, heads, d), lse (L, heads)) each -> the same over both."""
    (out, lse), (other_out, other_lse) = one, other
    # exp(lse) / (exp(lse) + exp(other_lse)), without overflow.
    weight = torch.sigmoid(lse - other_lse)[..., None]
    merged = torch.lerp(other_out.float(), out.float(), weight)
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse)


def attend(q, k, v, query_segments: Segments, key_segments: Segments, causal: bool, scale: float, flash: bool):
    """Query segment i attends to key segment i: -> out (Nq, heads, d), lse (Nq, heads) fp32. No dropout.

    flash: FlashAttention's kernel for segments of various lengths (CUDA, half precision, part of torch); otherwise in
    padded rectangles.
    """
    if flash:
        # At least 2: told 1, the kernel believes that every segment has exactly one query; ours may have none.
        sizes = max(2, query_segments.longest), key_segments.longest
        bounds = query_segments.bounds, key_segments.bounds
        kernel = torch.ops.aten._flash_attention_forward
        out, lse = kernel(q, k, v, *bounds, *sizes, 0.0, causal, False, scale=scale)[:2]
        return out, lse.T
    # A causal mask hides the padding of keys already: it is behind every query that is there.
    padding = None if causal else key_segments.padding
    states = query_segments.pad(q), key_segments.pad(k), key_segments.pad(v)
    out, lse = attend_padded(*states, padding, causal, scale)
    return query_segments.unpad(out), query_segments.unpad(lse)


def attend_backward(
    grad, q, k, v, out, lse, query_segments: Segments, key_segments: Segments, causal: bool, scale: float, flash: bool
):
    """Gradients (dq, dk, dv) of `attend`; out and lse may be those over more keys than this part's."""
    if flash:
        sizes = query_segments.longest, key_segments.longest
        bounds = query_segments.bounds, key_segments.bounds
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        kernel = torch.ops.aten._flash_attention_backward
        states = grad.contiguous(), q, k, v, out, lse.T.contiguous()
        return kernel(*states, *bounds, *sizes, 0.0, causal, *no_dropout, scale=scale)
    lse = query_segments.pad(lse)
    if query_segments.padding is not None:
        # Padded queries get p = exp(score − ∞) = 0, so that they push on no key.
        lse = lse.masked_fill(query_segments.padding[..., None], math.inf)
    padding = None if causal else key_segments.padding
    states = query_segments.pad(q), key_segments.pad(k), key_segments.pad(v), query_segments.pad(out), lse
    dq, dk, dv = attend_padded_backward(query_segments.pad(grad), *states, padding, causal, scale)
    return query_segments.unpad(dq), key_segments.unpad(dk), key_segments.unpad(dv)


# ---------------------------------------------------------------------------------------------------------------------
# The kernels, in padded rectangles


def attend_padded(q, k, v, padding, causal: bool, scale: float):
    """q (n, Lq, heads, d), k and v (n, Lk, kv heads, d), padding (n, Lk) True where no key is, or None.

    causal: query i sees keys 0 … i. Returns out (n, Lq, heads, d) and lse (n, Lq, heads) fp32.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = additive_mask(padding, q.dtype)
    if q.device.type in ("cpu", "meta"):  # meta: recipes/plan.py counts memory there
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        out, lse = formula(q, k, v, mask, causal, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def attend_padded_backward(grad, q, k, v, out, lse, padding, causal: bool, scale: float):
    """Gradients (dq, dk, dv) of `attend_padded`; an lse of +inf marks a query that is not there."""
    grad, q, k, v, out, lse = (x.transpose(1, 2) for x in (grad, q, k, v, out, lse))
    mask = additive_mask(padding, q.dtype)
    if q.device.type in ("cpu", "meta"):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = kernel(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        grads = formula_backward(grad, q, k, v, out, lse, mask, causal, scale)
    return [x.transpose(1, 2) for x in grads]


def additive_mask(padding, dtype):
    """(n, Lk) True where no key is -> (n, 1, 1, Lk): 0, and -inf there."""
    if padding is None:
        return None
    return torch.zeros_like(padding, dtype=dtype).masked_fill(padding, -math.inf)[:, None, None]


def formula(q, k, v, mask, causal: bool, scale: float):
    """For devices and types that have no kernel: q (n, heads, Lq, d) -> out, lse (n, heads, Lq)."""
    score = scores(q, k, mask, causal, scale)
    lse = score.logsumexp(-1)
    out = (score - lse[..., None]).exp().to(v.dtype) @ v
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def formula_backward(grad, q, k, v, out, lse, mask, causal: bool, scale: float):
    """With p = exp(score − lse): dv = pᵀ g, and the gradient of the scores is p (g·v − g·out)."""
    # True probabilities, because lse is that over all keys, not only over this part's.
    p = (scores(q, k, mask, causal, scale) - fold_heads(lse, k)[..., None]).exp()
    grad, out = fold_heads(grad, k).float(), fold_heads(out, k).float()
    d_score = p * (grad @ v.float().mT - (grad * out).sum(-1, keepdim=True)) * scale
    dq = (d_score @ k.float()).reshape(q.shape)
    dk = d_score.mT @ fold_heads(q, k).float()
    dv = p.mT @ grad
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def scores(q, k, mask, causal: bool, scale: float):
    """q (n, heads, Lq, d), k (n, kv heads, Lk, d) -> (n, kv heads, shared·Lq, Lk) fp32, -inf where no key is seen."""
    score = (fold_heads(q, k) @ k.mT).float() * scale
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        # Folded heads stand one behind the other, so the mask is repeated for each.
        score = score.masked_fill(later.repeat(q.shape[1] // k.shape[1], 1), -math.inf)
    return score if mask is None else score + mask


def fold_heads(x, k):
    """(n, heads, Lq, …) -> (n, kv heads, shared·Lq, …): query heads that share a key head become further queries."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# What transformers calls


def prompt_once_attention(module, query, key, value, attention_mask, *, scaling, layout=None, **options):
    """In every layer of a decoder: query (1, heads, L, d) -> ((1, L, heads, d), None).

    layout: a Layout (or a sampler's KV cache), handed through by the model's forward. Without one, when somebody calls
    the Hugging Face model itself, or its generate, it is transformers' own attention.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(module.layer_idx, q, k, v, scaling)[None], None


def window_attention(module, query, key, value, *, scaling, cu_seq_lens_q, max_length_q, **ignored):
    """In a Qwen vision tower: everything sees everything between two bounds (a window, or a whole picture).

    Neighbours of one length go in one call; transformers' own way on a CPU is a call for each.
    """
    bounds = cu_seq_lens_q
    if query.device.type in ("cuda", "meta") and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        bounds = bounds.int()
        return varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, scale=scaling)[None], None

    sizes, counts = bounds.diff().unique_consecutive(return_counts=True)
    widths = (sizes * counts).tolist()  # tokens of each run of windows of one length
    parts = []
    for size, *states in zip(sizes.tolist(), *(x[0].split(widths, 1) for x in (query, key, value)), strict=True):
        # Windows of one length are a batch: one call instead of one for each.
        # (heads, windows·size, d) -> (windows, heads, size, d)
        states = [x.unflatten(1, (-1, size)).transpose(0, 1) for x in states]
        out = F.scaled_dot_product_attention(*states, scale=scaling)
        parts.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


def register() -> None:
    """Make both known to transformers, as "prompt_once" and "windows_flash"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("prompt_once", prompt_once_attention)
    AttentionMaskInterface.register("prompt_once", sdpa_mask)  # for whoever calls the model itself
    # With "flash" in its name a Qwen tower hands over bounds instead of building masks.
    AttentionInterface.register("windows_flash", window_attention)
