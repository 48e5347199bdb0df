"""The vocabulary head: from hidden states to log-probs, never holding more than some rows of logits.

A row of logits is as wide as the vocabulary (151,936 tokens are 0.6 MB in fp32), and a batch has a row for each of its
tokens: it would fill a GPU by itself. So logits are computed some rows at a time, and once more for the gradient.

    token_logits       some hidden states -> their logits, as everybody here computes them
    TokenLogProbs      log-probs of the tokens that were sampled
    StateEntropies     the exact entropy of each distribution
    filter_logits      top-k and top-p
    TokenFilter        the same two, replayed: log-probs over the tokens that the sampler could have taken

Legend: M hidden states of H numbers, N tokens that they predict, V vocabulary. Natural logarithms (nats), fp32.
"""

import math
from dataclasses import dataclass, field

import torch


def token_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, forbidden: torch.Tensor):
    """(n, H) -> (n, V) fp32 logits divided by temperature (0: not divided), forbidden tokens at -inf."""
    logits = (hidden @ weight.T).float()
    if temperature not in (0.0, 1.0):
        logits /= temperature
    return logits.index_fill_(-1, forbidden, -math.inf)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs and entropies


class TokenLogProbs(torch.autograd.Function):
    """log softmax(W h / temperature)[target], never holding more than `rows` rows of logits, forward or backward.

    hidden (M, H), weight (V, H), source (N,) which hidden state predicts each target (N,), forbidden (F,) tokens that
    count as impossible, kept: a KeptTokens, all others being impossible too, or None -> (N,) fp32. Backward computes
    the logits anew: their gradient is (1[target] − softmax) · g.
    """

    @staticmethod
    def forward(ctx, hidden, weight, source, targets, temperature, forbidden, rows, kept=None):
        ctx.save_for_backward(hidden, weight, source, targets, forbidden)
        ctx.temperature, ctx.rows, ctx.kept = temperature, rows, kept
        out = torch.zeros(len(targets), device=hidden.device)
        ctx.lse = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = token_logits(hidden[chunk], weight, temperature, forbidden)
            if kept is not None:
                logits = kept.only(logits, start)
            ctx.lse[chunk] = logits.logsumexp(-1)
            # Targets are looked up in the chunk that holds their state, by index, without a loop over tokens.
            inside, cell = targets_in_chunk(source, targets, start, len(logits))
            out = torch.where(inside, logits[cell] - ctx.lse[source], out)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, source, targets, forbidden = ctx.saved_tensors
        grad = grad / (ctx.temperature or 1.0)
        # One hidden state may predict several targets: a prompt's last one, the first token of every reply.
        total = torch.zeros_like(ctx.lse).index_add_(0, source, grad)
        # Nothing is computed for what is frozen.
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logits = token_logits(hidden[chunk], weight, ctx.temperature, forbidden)
            if ctx.kept is not None:
                logits = ctx.kept.only(logits, start)
            probability = logits.sub_(ctx.lse[chunk, None]).exp_()
            d_logits = probability.mul_(-total[chunk, None])
            inside, cell = targets_in_chunk(source, targets, start, len(d_logits))
            d_logits.index_put_(cell, grad.masked_fill(~inside, 0.0), accumulate=True)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[chunk])
        return d_hidden, d_weight, None, None, None, None, None, None


class StateEntropies(torch.autograd.Function):
    """Entropy of softmax(W h / temperature) of every hidden state in nats, exact, in chunks like TokenLogProbs.

    hidden (M, H), weight (V, H), forbidden (F,) -> (M,) fp32. Backward computes the logits anew: the gradient of H with
    respect to them is −p (log p + H).
    """

    @staticmethod
    def forward(ctx, hidden, weight, temperature, forbidden, rows):
        ctx.save_for_backward(hidden, weight, forbidden)
        ctx.temperature, ctx.rows = temperature, rows
        chunks = []
        for start in range(0, len(hidden), rows):
            logits = token_logits(hidden[start : start + rows], weight, temperature, forbidden)
            logp = finite_log_softmax(logits)
            chunks.append(-(logp.exp() * logp).sum(-1))
        return torch.cat(chunks)

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, forbidden = ctx.saved_tensors
        slope = -grad / (ctx.temperature or 1.0)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            chunk = slice(start, start + ctx.rows)
            logp = finite_log_softmax(token_logits(hidden[chunk], weight, ctx.temperature, forbidden))
            probability = logp.exp()
            entropy = -(probability * logp).sum(-1, keepdim=True)
            d_logits = (probability * (logp + entropy) * slope[chunk, None]).to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[chunk])
        return d_hidden, d_weight, None, None, None


def finite_log_softmax(logits):
    """log_softmax (n, V), at least −1e4 nats: so what is impossible adds 0 to a sum of p log p, and not NaN."""
    return logits.log_softmax(-1).clamp_min_(-1e4)


def targets_in_chunk(source, targets, start, rows):
    """Which targets (N,) the hidden states start … start + rows predict, and their cells in that chunk of logits."""
    inside = (source >= start) & (source < start + rows)
    # Clamped, so that indexing needs no selection; what is outside is not used.
    return inside, ((source - start).clamp(0, rows - 1), targets)


# ---------------------------------------------------------------------------------------------------------------------
# Top-k and top-p


def filter_logits(logits, top_k: int, top_p: float):
    """Logits (R, V) with all but the top_k likeliest tokens, and all outside the nucleus of mass top_p, at -inf."""
    if top_k and top_k < logits.shape[-1]:
        least = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        # The nucleus: the smallest set of likeliest tokens whose mass reaches top_p.
        ordered, index = logits.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        outside = torch.zeros_like(beyond).scatter(-1, index, beyond)
        logits = logits.masked_fill(outside, -math.inf)
    return logits


@dataclass
class KeptTokens:
    """The tokens that a filter kept after each of M hidden states.

    ids (K,) int32: those of the first state, then those of the second, …; bounds: M + 1 Python ints, where each
    state's begin. A list of ids and no mask: after most states a filter keeps a handful of 151,936.
    """

    ids: torch.Tensor
    bounds: list[int]

    @classmethod
    @torch.no_grad()
    def of(cls, hidden, weight, source, targets, temperature, forbidden, rows, top_k, top_p) -> "KeptTokens":
        """What top_k and top_p keep; arguments as of TokenLogProbs.

        Targets are always kept: they have been sampled, so the sampler has kept them, even where a near-tie falls out
        differently here.
        """
        ids, counts = [], []
        for start in range(0, len(hidden), rows):
            logits = token_logits(hidden[start : start + rows], weight, temperature, forbidden)
            mask = filter_logits(logits, top_k, top_p) > -math.inf
            inside, (row, token) = targets_in_chunk(source, targets, start, len(logits))
            mask[row[inside], token[inside]] = True
            ids.append(mask.nonzero()[:, 1].int())
            counts.append(mask.sum(-1))
        ends = torch.cat(counts).cumsum(0).tolist()
        return cls(torch.cat(ids), [0, *ends])

    def only(self, logits: torch.Tensor, start: int) -> torch.Tensor:
        """The logits (n, V) of the states start … start + n, all but the kept tokens at -inf."""
        bounds = torch.tensor(self.bounds[start : start + len(logits) + 1])
        token = self.ids[bounds[0] : bounds[-1]].long()
        row = torch.arange(len(logits)).repeat_interleave(bounds.diff()).to(token.device)
        kept = torch.full_like(logits, -math.inf)
        kept[row, token] = logits[row, token]
        return kept


@dataclass
class TokenFilter:
    """The sampler's top_k and top_p in the trainer: log-probs renormalised over the tokens that could be sampled.

    Policies that are compared must choose among the same tokens, or their ratio is none of probabilities (DeepSeek-V3.2
    keeps the sampler's mask, arXiv 2512.02556, section 3.1). Here it is found again: the first forward that is given
    this object, which must be one with the weights that sampled, fills `kept`; every later one, of the same groups,
    uses it.
    """

    top_k: int
    top_p: float
    kept: KeptTokens | None = field(default=None, repr=False)

    def keep(self, hidden, weight, source, targets, temperature, forbidden, rows) -> KeptTokens | None:
        """`kept`, which the first call makes; None if the filters keep everything. Arguments as of TokenLogProbs."""
        if self.top_p == 1.0 and not 0 < self.top_k < len(weight):
            return None  # a list of all tokens after every state would fill the memory
        if self.kept is None:
            states = hidden, weight, source, targets, temperature, forbidden, rows
            self.kept = KeptTokens.of(*states, self.top_k, self.top_p)
        assert len(self.kept.bounds) == len(hidden) + 1, "a TokenFilter is that of one batch"
        return self.kept
