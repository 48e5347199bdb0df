"""Replies from the model itself: prefill each prompt once, then one KV cache for all its replies.

`sample` is the whole interface; vllm_sampler.VLLM is called the same way. Its replies are a function of weights, prompt
and seed alone: neither the batch they are sampled in nor the number of processes matters.

Legend: R prompts of a round, n replies each, B active sequences (replies that have not ended), d size of a head, V
vocabulary. The KV cache of a prompt is held once, however many replies read it; replies have buffers of their own.
"""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from attention import Segments, attend, attend_padded, merge
from head import filter_logits, token_logits
from model import Policy, Prompt, pack
from training import gather_weights, release_weights


@dataclass
class Reply:
    """One sampled reply: ids (T,) with its end token if it reached one (finished), logps (T,) of its tokens under the
    sampling temperature over the whole vocabulary (forbidden tokens excluded), before top-k and top-p filter it; or
    after, if the sampler says so."""

    ids: torch.Tensor
    logps: torch.Tensor
    finished: bool

    def to_json(self) -> dict:
        """As JSON takes it; from_json gives the same reply, to the bit."""
        return {"ids": self.ids.tolist(), "logps": self.logps.tolist(), "finished": self.finished}

    @classmethod
    def from_json(cls, fields: dict) -> "Reply":
        return cls(torch.tensor(fields["ids"]), torch.tensor(fields["logps"]), fields["finished"])


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[Prompt],
    n: int,
    *,
    seeds: list[int],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    batch_tokens: int | None = None,
    filtered_logps: bool = False,
) -> list[list[Reply]]:
    """Sample n replies per prompt: -> list (P) of lists (n) of Reply, on the CPU.

    seeds: one int per prompt. Reply g of a prompt is a function of the weights, its prompt, its seed and g.
    temperature 0 is greedy (n must be 1). top_k 0 and top_p 1.0 switch those filters off. batch_tokens bounds the KV
    cache of one round (tokens); None: what fits in memory. filtered_logps: log-probs among the tokens that the filters
    kept, as a trainer with a head.TokenFilter has them.
    """
    if temperature == 0 and n != 1:
        raise ValueError("greedy decoding gives one reply: n must be 1")
    choose = partial(
        sample_tokens, temperature=temperature, top_k=top_k, top_p=top_p, filtered_logps=filtered_logps
    )  # fmt: skip
    replies = [None] * len(prompts)
    # Ranks sample different prompts and end at different times: they must not wait for each other's weights.
    gather_weights(policy)
    # Prompts of similar length share a round, as many as the KV cache takes.
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    capacity = batch_tokens or cache_capacity(policy)
    while waiting:
        round_, used = [], 0
        while waiting:
            needed = len(prompts[waiting[0]].ids) + n * max_new_tokens
            if round_ and used + needed > capacity:
                break
            used += needed
            round_.append(waiting.pop(0))
        asked = [prompts[i] for i in round_], n, [seeds[i] for i in round_]
        sampled = sample_round(policy, *asked, temperature, max_new_tokens, choose)
        for index, group in zip(round_, sampled, strict=True):
            replies[index] = group
    release_weights(policy)
    return replies


def sample_round(policy, prompts, n, seeds, temperature, max_new_tokens, choose):
    """One round of `sample`: prefill R prompts, then decode all R·n replies together, one token a step.

    choose(logits, uniform) is sample_tokens.
    """
    device, total = policy.forbidden.device, len(prompts) * n
    prefill = pack([(prompt, []) for prompt in prompts]).to(device)
    prefill.layout.kv_cache = {}
    # The packed row of the trainer, without replies: what is computed here is what training computes.
    logits = policy(prefill, temperature)  # (R, V): every reply starts from its prompt's last token
    cache = ReplyCache(prefill.layout, [n] * len(prompts), max_new_tokens - 1)
    next_logits = partial(decode, policy, cache, temperature=temperature)

    # One uniform number per token, from (seed, reply): a sample does not depend on who else is in the batch.
    streams = [np.random.default_rng([seed, g]).random(max_new_tokens) for seed in seeds for g in range(n)]
    uniform = torch.from_numpy(np.stack(streams)).to(device)  # (B, T) fp64
    start = torch.tensor([prompt.next for prompt in prompts], device=device).repeat_interleave(n)
    # Everything below stays on the device; Python looks at it only in pauses.
    end_ids = torch.tensor(policy.end_ids, device=device)

    tokens = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(total, max_new_tokens, device=device)
    length = torch.full((total,), max_new_tokens, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    active = torch.arange(total, device=device)  # replies that are carried along
    # Steps between looks at who has ended: on a GPU a look waits for it.
    pause = 16 if policy.forbidden.is_cuda else 1

    token, logp = choose(logits, uniform[:, 0].view(-1, n))
    for step in range(max_new_tokens):
        if step:
            token, logp = choose(logits, uniform[active, step, None])
        token = token.flatten()
        tokens[active, step] = token
        logps[active, step] = logp.flatten()
        ended = torch.isin(token, end_ids) & ~finished[active]
        length[active] = torch.where(ended, step + 1, length[active])
        finished[active] |= ended
        if step + 1 == max_new_tokens:
            break
        if step % pause == 0:
            going = ~finished[active]
            count = int(going.sum())
            if not count:
                break
            if count * 4 <= 3 * len(active):  # a quarter has ended: stop carrying it along
                active, token = active[going], token[going]
                cache.select(going.nonzero()[:, 0])
        logits = next_logits(token, start[active] + step)
        cache.length += 1

    tokens, logps, length, finished = tokens.cpu(), logps.cpu(), length.tolist(), finished.tolist()
    replies = [Reply(tokens[b, : length[b]], logps[b, : length[b]], finished[b]) for b in range(total)]
    return [replies[i : i + n] for i in range(0, total, n)]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding


class ReplyCache:
    """The KV cache of decoding: keys and values of prompts, held once for all their replies, and of each reply's own.

    layout: of a prefill, its kv_cache filled. counts (R): active sequences of each prompt, in order. capacity: tokens a
    reply may grow to. length: tokens the replies have.
    """

    def __init__(self, layout, counts: list[int], capacity: int):
        self.prompts, self.flash, self.length = layout.prompts, layout.flash, 0
        self.padding, device = layout.prompts.padding, layout.prompts.bounds.device
        self.shared, self.own = {}, {}
        for layer, states in layout.kv_cache.items():
            self.shared[layer] = states if self.flash else [self.prompts.pad(x) for x in states]
            # Allocated once for the longest reply: growing by concatenation would copy the cache every step.
            self.own[layer] = [x.new_empty(sum(counts), capacity, *x.shape[1:]) for x in states]
        self.by_prompt = Segments.of(counts).to(device)
        repeats = torch.tensor(counts, device=device)
        self.owner = torch.arange(len(counts), device=device).repeat_interleave(repeats)  # (B,) its prompt

    def attend(self, layer: int, q, k, v, scale: float) -> torch.Tensor:
        """q (B, heads, d), k and v (B, kv heads, d) of one new token per sequence -> (B, heads, d)."""
        own = self.attend_own(layer, q, k, v, scale)
        if self.flash:
            shared = attend(q, *self.shared[layer], self.by_prompt, self.prompts, False, scale, True)
        else:
            states = self.by_prompt.pad(q), *self.shared[layer]
            out, lse = attend_padded(*states, self.padding, False, scale)
            shared = self.by_prompt.unpad(out), self.by_prompt.unpad(lse)
        return merge(own, shared)[0]

    def attend_own(self, layer, q, k, v, scale):
        """Store the new keys and values; -> out (B, heads, d) and lse (B, heads) over each reply's own tokens."""
        states = [q[:, None]]
        for buffer, new in zip(self.own[layer], (k, v), strict=True):
            buffer[:, self.length] = new
            states.append(buffer[:, : self.length + 1])
        if self.flash:
            kernel = torch.ops.aten._flash_attention_forward
            sizes = 1, self.length + 1
            out, lse = kernel(*states, None, None, *sizes, 0.0, False, False, scale=scale)[:2]
            return out[:, 0], lse[..., 0]
        out, lse = attend_padded(*states, None, False, scale)
        return out[:, 0], lse[:, 0]

    def select(self, sequences: torch.Tensor) -> None:
        """Go on with these sequences only, (b,) ascending indices."""
        for buffers in self.own.values():
            for i, old in enumerate(buffers):
                buffers[i] = old.new_empty(len(sequences), *old.shape[1:])
                buffers[i][:, : self.length] = old[sequences, : self.length]
        self.owner = self.owner[sequences]
        if self.flash:
            # A prompt without replies costs nothing here.
            counts = self.owner.bincount(minlength=len(self.prompts.lengths))
        else:
            left, self.owner, counts = self.owner.unique_consecutive(return_inverse=True, return_counts=True)
            self.shared = {layer: [x[left] for x in states] for layer, states in self.shared.items()}
            self.padding = None if self.padding is None else self.padding[left]
        self.by_prompt = Segments.of(counts.tolist()).to(sequences.device)


def decode(policy: Policy, cache: ReplyCache, token, position, temperature: float) -> torch.Tensor:
    """One more token of every active sequence: token (B,), position (B,) -> logits (B, V).

    The decoder block of all families, written out, because a step of B tokens is so short that transformers' own way
    (general caches and masks, norms and rotations in many small calls) takes longer than its arithmetic. What the
    trainer computes is the reference: the tests compare the two, and every training step logs their gap.
    """
    family, text = policy.family, policy.family.decoder(policy.hf)
    hidden = text.embed_tokens(token)
    # Reply tokens are text: their M-RoPE positions are equal on all axes, so any of the tables is the table.
    positions = family.position_ids(position.expand(family.position_axes, 1, -1))
    tables = text.rotary_emb(hidden, positions)
    cos, sin = (table.reshape(-1, len(token), 1, table.shape[-1])[0] for table in tables)
    for number, block in enumerate(text.layers):
        layer = block.self_attn
        states = rms_norm(block.input_layernorm, hidden)
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        q, k, v = (project(states).unflatten(-1, (-1, layer.head_dim)) for project in projections)
        if hasattr(layer, "q_norm"):  # Qwen3's decoder
            q, k = rms_norm(layer.q_norm, q), rms_norm(layer.k_norm, k)
        q, k = rotate(torch.cat([q, k], 1), cos, sin).split([q.shape[1], k.shape[1]], 1)
        out = cache.attend(number, q, k, v, layer.scaling)
        hidden = hidden + layer.o_proj(out.flatten(1))
        hidden = hidden + block.mlp(rms_norm(block.post_attention_layernorm, hidden))
    # All B hidden states are read here: each predicts the next token of its sequence.
    hidden = rms_norm(text.norm, hidden)
    return token_logits(hidden, policy.hf.lm_head.weight, temperature, policy.forbidden)


def rotate(x, cos, sin):
    """Rotary position embedding of queries and keys together: one call instead of two. (B, heads, d) -> the same."""
    left, right = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([-right, left], -1), sin)


def rms_norm(norm, x):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


# ---------------------------------------------------------------------------------------------------------------------
# From logits to tokens


def sample_tokens(
    logits, uniform, temperature: float, top_k: int, top_p: float, block: int = 512, filtered_logps: bool = False
):
    """Sample n tokens from each row of logits (R, V) by inverting its cumulative distribution at `uniform` (R, n).

    Returns tokens (R, n) and their log-probs (R, n), before or after the filters. temperature 0: the largest logit, its
    log-prob before. The distribution is summed up in fp64, but only over blocks of tokens and then inside the block
    that is hit.
    """
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token, logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True)
    filtered = filter_logits(logits, top_k, top_p)
    mass = (filtered - filtered.amax(-1, keepdim=True)).exp()
    mass = F.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block))  # (R, blocks, block)
    block_mass = mass.sum(-1, dtype=torch.float64)
    block_end = block_mass.cumsum(-1)
    height = uniform * block_end[:, -1:]
    hit = torch.searchsorted(block_end, height, right=True)  # (R, n): the block
    # The share of the hit block's mass that lies below.
    share = (height - (block_end - block_mass).gather(-1, hit)) / block_mass.gather(-1, hit)
    row = torch.arange(len(mass), device=hit.device)[:, None]
    inside = mass[row, hit].double().cumsum(-1)  # (R, n, block)
    # Below the whole, so that never a token of no mass is hit.
    height = inside[..., -1:] * share[..., None].clamp(0.0, 1 - 2**-52)
    token = hit * block + torch.searchsorted(inside, height, right=True)[..., 0]
    # As the trainer takes them: before the filters, unless it replays them.
    scored = filtered if filtered_logps else logits
    return token, scored.gather(-1, token) - scored.logsumexp(-1, keepdim=True)


def cache_capacity(policy: Policy) -> int:
    """Tokens of KV cache that fit: into 1 GiB on a CPU, into a third of the free memory of a GPU (a power of two, so
    that small changes of what is free do not change how prompts are dealt to rounds)."""
    # Two tensors a layer, keys and values.
    layers = policy.family.decoder(policy.hf).layers
    token_bytes = 2 * len(layers) * layers[0].self_attn.k_proj.out_features * (2 if policy.half else 4)
    memory = 2**30
    if policy.forbidden.is_cuda:
        # What the driver has left, and what torch holds without need.
        memory = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        memory //= 3
    return 2 ** int(math.log2(memory / token_bytes))
