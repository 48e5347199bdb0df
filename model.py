"""What the model computes: a record becomes a prompt, prompts and replies a packed row, the row log-probs.

    encoder     a record -> token ids, pixels and positions; text <-> reply ids
    groups      prompt once: `[all prompts | all replies]` in one row without padding (attention.py has who sees whom)
    policy      the wrapped Hugging Face model: a packed row -> log-probs or logits
    loading     a checkpoint directory -> policy and encoder, each process reading its own shards
    cost        FLOPs of all this by the formula

Nothing here knows a loss or a reward, and nothing branches on the size of the model; what differs between architectures
is in families.py. `model.sample`, `model.VLLM`, `model.Run` and others that live in files of their own now still answer
under these names (last lines).

Legend: P prompts, G replies each, B = P·G replies, T tokens of the longest reply, L tokens of a packed row, A position
axes, N reply tokens of a batch, M hidden states that predict them, H hidden size, V vocabulary. Log-probs are natural
logarithms (nats), fp32.
"""

import importlib
import json
import math
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import nn

import model_directory
import training
from attention import Layout, Segments
from families import Family, family_of, matrix_weights
from files import read_json_object
from model_directory import is_integer
from pictures import MAX_IMAGE_PIXELS, PictureError, open_picture, picture_size
from records import DataError
from run_directory import distributed_checkpoint
from training import DEFAULT_SHARDING, World

# ---------------------------------------------------------------------------------------------------------------------
# Encoder


@dataclass
class Prompt:
    """One encoded question.

    ids (Lp,) with image tokens expanded; positions (A, Lp); next: the position of the first reply token; pixels fp32
    and grids (images, 3) of its pictures, or None; plain_ids: one token per image, what an engine with its own image
    processor takes; images: the paths of its pictures.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    next: int
    pixels: torch.Tensor | None
    grids: torch.Tensor | None
    plain_ids: list
    images: list = field(default_factory=list)

    @property
    def patches(self) -> int:
        """Patches of all its pictures."""
        return 0 if self.grids is None else int(self.grids.prod(1).sum())


class Encoder:
    """Turns records into prompts and texts into replies with the checkpoint's own tokenizer and image settings.

    Encoded pictures are cached (up to cache_bytes) because epochs come back to them. max_image_pixels: the largest
    width x height of an image file that is opened.
    """

    def __init__(
        self, folder: str, family: Family, hf: nn.Module, cache_bytes: int = 512 * 2**20,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
    ):  # fmt: skip
        from transformers import AutoTokenizer

        self.family, self.hf, self.max_image_pixels = family, hf, max_image_pixels
        # A template in a file of its own wins over the tokenizer's, as in transformers' AutoProcessor.
        template = model_directory.template_beside(folder)
        with one_line(f"{folder}: its tokenizer cannot be loaded"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, config=family.config, trust_remote_code=False)
            self.tokenizer.chat_template = template or self.tokenizer.chat_template
        with one_line(f"{folder}: its tokenizer does not work"):
            self.forbidden = family.forbidden(self.tokenizer)
            self.image_id = self.forbidden[0]
            self.end_id = self.tokenizer.eos_token_id
            self.rows = family.config.get_text_config().vocab_size
            check_tokenizer(self, folder)
            self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.max_length = family.config.get_text_config().max_position_embeddings
        check_template(self, folder)
        # Futures, so that two questions about one picture wait for the same encoding.
        self._pictures: OrderedDict[str, Future] = OrderedDict()  # by path, the least recently used first
        self._bytes_left, self._lock = cache_bytes, threading.Lock()
        self._measured = {}
        self._workers = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "pictures")

    def save(self, folder: Path) -> None:
        """Write tokenizer and image processor into a model directory."""
        self.tokenizer.save_pretrained(folder)
        self.family.save_image_processor(folder)

    # ---- pictures

    def image(self, path: str) -> Image.Image:
        """The picture of an image file, resized as every engine gets it."""
        return self.family.resize(open_picture(path, self.max_image_pixels))

    def images(self, paths: list[str]) -> list[Image.Image]:
        """The pictures of several image files, side by side in worker threads."""
        return list(self._workers.map(self.image, paths))

    def picture(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels, grid (3,)) of one image file, from the cache when it was seen before."""
        return self._begin(path).result()

    def prefetch(self, records: list[dict]) -> None:
        """Begin to encode the pictures of records that will soon be asked for, in worker threads."""
        for record in records:
            for path in record["images"]:
                self._begin(path)

    def _begin(self, path):
        with self._lock:
            if path not in self._pictures:
                self._pictures[path] = self._workers.submit(self._encode, path)
            self._pictures.move_to_end(path)
            return self._pictures[path]

    def _encode(self, path):
        # numpy: a torch operation in this thread would start a team of threads of its own, against the main one's.
        picture = open_picture(path, self.max_image_pixels)
        grid = self.family.grid(*picture.size)
        pixels = self.family.pixels(self.family.resize(picture))
        encoded = torch.from_numpy(pixels), torch.tensor(grid)
        with self._lock:
            self._bytes_left -= encoded[0].nbytes
            self._forget_oldest(keep=path)
        return encoded

    def _forget_oldest(self, keep):
        for path, future in list(self._pictures.items()):
            if self._bytes_left >= 0:
                return
            if path != keep and future.done():
                self._bytes_left += 0 if future.exception() else future.result()[0].nbytes
                del self._pictures[path]

    # ---- questions

    def chat(self, record: dict) -> str:
        """The prompt as text, image tokens in place (one each), ready for the assistant's first token."""
        count, text = len(record["images"]), record["prompt"]
        # Without markers all pictures come first, as in every public data set we read.
        pieces = text.split("<image>") if "<image>" in text else [""] * count + [text]
        content = []
        for index, piece in enumerate(pieces):
            if piece:
                content.append({"type": "text", "text": piece})
            if index < count:
                content.append({"type": "image"})
        if self.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": content}]
            with one_line(f"{record.get('_where', record['id'])}: the model's chat template failed"):
                return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # A base model without a template: a plain dialogue.
        picture = self.family.picture_text.format(self.image_token)
        words = "".join(part.get("text", picture) for part in content)
        return f"User: {words}\nAssistant:"

    def measure(self, record: dict) -> tuple[list[int], list[int]]:
        """(ids with one token per image, image tokens each image will take), without reading pixels. DataError."""
        # By content, not by id: the samples of one prompt, and epochs, ask again and again.
        key = record["prompt"], *record["images"]
        if key not in self._measured:
            if len(self._measured) == 2**16:  # some 100 MB
                self._measured.clear()
            self._measured[key] = self._measure(record)
        return self._measured[key]

    def _measure(self, record):
        where = record.get("_where", record["id"])
        plain = self.tokenizer(self.chat(record), add_special_tokens=False)["input_ids"]
        others = set(self.forbidden) - {self.image_id}
        if plain.count(self.image_id) != len(record["images"]) or others & set(plain):
            raise DataError(f"{where}: the prompt's text holds image or video tokens of its own")
        if max(plain, default=0) >= self.rows:
            raise DataError(f"{where}: the prompt holds a token that the model has no embedding for")
        counts = []
        for path in record["images"]:
            try:
                grid = self.family.grid(*picture_size(path, self.max_image_pixels))
            except PictureError as error:  # gone, or changed, since the records were read
                raise DataError(f"{where}: {error}") from error
            except ValueError as error:  # too thin a strip
                raise DataError(f'{where}: image "{path}" cannot be encoded ({error})') from error
            counts.append(self.family.tokens_per_picture(grid))
        length = len(self._expand(plain, counts))
        if length >= self.max_length:
            raise DataError(f"{where}: {length} prompt tokens, the model takes {self.max_length}; lower --max-pixels")
        return plain, counts

    def _expand(self, plain, counts):
        """ids with one token per image -> ids with as many as its picture takes."""
        count = iter(counts)
        ids = []
        for token in plain:
            ids += self.family.expand(next(count)) if token == self.image_id else [token]
        return ids

    def length(self, record: dict) -> int:
        """Tokens of the encoded prompt, without reading pixels."""
        return len(self._expand(*self.measure(record)))

    def check(self, world: World, records: list[dict]) -> None:
        """Raise DataError before any training for the first record that could not be encoded during it."""
        problems = []
        try:
            for record in records[world.rank :: world.size]:
                self.measure(record)
                for name in ("chosen", "rejected"):
                    if record.get(name):
                        self.encode_reply(record[name], record["_where"])
        except DataError as error:
            problems.append(str(error))
        for problem in sum(world.gather(problems), []):
            raise DataError(problem)

    def prompt(self, record: dict) -> Prompt:
        """Encode a record's question. DataError when text and images do not fit each other, or a picture is gone."""
        plain, counts = self.measure(record)
        ids = torch.tensor(self._expand(plain, counts))
        pixels = grids = None
        # Pixels only here: checks and lengths never read them.
        if record["images"]:
            try:
                pictures = [self.picture(path) for path in record["images"]]
            except PictureError as error:
                raise DataError(f"{record.get('_where', record['id'])}: {error}") from error
            pixels = torch.cat([pixels for pixels, _ in pictures])
            grids = torch.stack([grid for _, grid in pictures])
        positions = self.family.positions(self.hf, ids, grids)
        return Prompt(ids, positions, int(positions.max()) + 1, pixels, grids, plain, record["images"])

    def prompts(self, records: list[dict]) -> list[Prompt]:
        """Encode several questions, their pictures side by side in worker threads."""
        self.prefetch(records)
        return [self.prompt(record) for record in records]

    # ---- replies

    def encode_reply(self, text: str, where: str = "a reply") -> torch.Tensor:
        """Token ids (T,) of a reply's text with the end token appended: what a model would have sampled."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end_id]
        if set(ids) & set(self.forbidden) or max(ids) >= self.rows:
            raise DataError(f"{where}: it holds image or video tokens: {json.dumps(text)[:60]}")
        return torch.tensor(ids)

    def decode(self, ids: torch.Tensor) -> str:
        """Text of reply ids. The end token is dropped; any other special token stays visible, so it can be punished."""
        ids = [int(token) for token in ids]
        if ids and ids[-1] == self.end_id:
            ids = ids[:-1]
        return self.tokenizer.decode(ids, skip_special_tokens=False)


@contextmanager
def one_line(where: str):
    """Turn whatever the libraries raise about a model's files into a DataError: they raise what their parsing meets."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        cause = " ".join(str(error).split()) or type(error).__name__
        cause = cause if len(cause) <= 300 else f"{cause[:297]}..."
        raise DataError(f"{where} ({cause})") from error


# Letters, digits, space, line break, and bytes beyond ASCII: what every reply may hold.
PROBE = "Is 1 + 23 = 24?\nÄ 中 😀"


def check_tokenizer(encoder: Encoder, folder: str) -> None:
    """Raise DataError for a tokenizer that loses text, or that does not belong to the model."""
    tokenizer, path = encoder.tokenizer, f"{folder}: its tokenizer"
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    if tokenizer.decode(ids) != PROBE:
        raise DataError(f"{path} files are missing or incomplete: it loses text when it encodes {json.dumps(PROBE)}")

    # Tokens that were added to it may lie beyond: a question that holds one is refused when it is asked.
    rows, last = encoder.rows, tokenizer.vocab_size - 1
    if last >= rows:
        raise DataError(f"{path} has tokens up to id {last}, the model has {rows} (vocab_size of config.json)")
    if encoder.end_id is None:
        raise DataError(f"{path} names no end token (eos_token of tokenizer_config.json)")
    for token in (*encoder.forbidden, encoder.end_id):
        known = is_integer(token) and 0 <= token < rows
        name = tokenizer.convert_ids_to_tokens(token) if known else None
        if name is None or tokenizer(name, add_special_tokens=False)["input_ids"] != [token]:
            raise DataError(f"{path} has no special token {token}, which stands for pictures or the end")


TEMPLATE_STEPS = 10**5  # lines of a chat template that one question may take; the longest in use take some hundred


def check_template(encoder: Encoder, folder: str) -> None:
    """Raise DataError for a chat template that fails, hardly ends, or does not show text and picture of a question."""
    words = "What is this?"
    for images in ([], ["a picture"]):
        record = {"id": f"{folder}: a question on trial", "prompt": words, "images": images}
        with one_line(f"{folder}: its chat template failed"):
            text = within_steps(lambda record=record: encoder.chat(record), TEMPLATE_STEPS)
        ids = encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        shown = [token for token in ids if token in encoder.forbidden]
        if words not in text or shown != [encoder.image_id] * len(images):
            raise DataError(f"{folder}: its chat template does not show a question with {len(images)} pictures")


def within_steps(function: Callable, steps: int):
    """function(), unless it takes more than so many lines of Jinja or calls of Python: then RuntimeError.

    A template is a program: two nested loops of 10^5 would run for hours.
    """
    left = steps

    def count(frame, event, argument):
        nonlocal left
        left -= 1
        if left < 0:
            raise RuntimeError(f"more than {steps} steps for one question")
        # Lines are counted in templates only; elsewhere, calls.
        return count if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(count)
    try:
        return function()
    finally:
        sys.settrace(before)


# ---------------------------------------------------------------------------------------------------------------------
# Groups: the prompt once
#
# A group is a prompt and its replies. A DPO pair is a group of two, an SFT example a group of one.


@dataclass
class Batch:
    """A packed row, ready for Policy.forward.

    ids (1, L); positions (A, 1, L); layout: who sees whom; pixels, grids: all pictures in order, or None; read (M,):
    the tokens whose hidden state somebody reads. targets (N,): the tokens to be predicted, or None when the caller
    wants logits; source (N,): which of the read states predicts each, ascending; cell (2, N): reply number and token
    number of each target, to lay the results out as (B, T).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    layout: Layout
    pixels: torch.Tensor | None
    grids: torch.Tensor | None
    read: torch.Tensor
    targets: torch.Tensor | None = None
    source: torch.Tensor | None = None
    cell: torch.Tensor | None = None

    def to(self, device) -> "Batch":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})


def pack(groups: list[tuple[Prompt, list[torch.Tensor]]]) -> Batch:
    """Lay groups out as one row without padding, `[prompt 1 | … | prompt R | reply 1 | … | reply B]`.

    groups: list of (Prompt, list of reply ids (T,), each with its end token). A reply sees its prompt and itself; its
    positions continue from the prompt's end, so to the model it looks as if it stood there alone. The last token of a
    reply is only ever predicted, never read from, so it is not fed; the last of a prompt predicts the first token of
    all its replies. Without any reply the Batch has no targets, and the forward gives logits.
    """
    prompts = [prompt for prompt, _ in groups]
    replies = [reply for _, group in groups for reply in group]
    # The last token of a reply is predicted but predicts nothing.
    fed = [len(reply) - 1 for reply in replies]
    ids = torch.cat([prompt.ids for prompt in prompts] + [reply[:-1] for reply in replies])

    # Position of a fed token: that of its reply's first token, plus its number in the reply.
    first_position = torch.tensor([prompt.next for prompt, group in groups for _ in group]).long()
    number = torch.cat([torch.arange(size) for size in fed] or [first_position])
    sizes = torch.tensor(fed, dtype=torch.long)
    reply_positions = first_position.repeat_interleave(sizes) + number
    # A reply is text: all its position axes are equal.
    axes = len(prompts[0].positions)
    positions = torch.cat([prompt.positions for prompt in prompts] + [reply_positions.expand(axes, -1)], 1)

    layout = Layout(
        prompts=Segments.of([len(prompt.ids) for prompt in prompts]),
        replies=Segments.of(fed),
        by_prompt=Segments.of([sum(len(reply) - 1 for reply in group) for _, group in groups]),
    )
    prompt_ends = layout.prompts.bounds[1:].long() - 1
    batch = Batch(ids[None], positions[:, None], layout, *pictures_of(prompts), read=prompt_ends)
    if not replies:
        return batch

    # Hidden states that predict something: the end of every prompt, then every fed reply token.
    first = int(prompt_ends[-1]) + 1
    batch.read = torch.cat([prompt_ends, torch.arange(first, len(ids))])
    group_sizes = torch.tensor([len(group) for _, group in groups])
    owner = torch.arange(len(groups)).repeat_interleave(group_sizes)
    batch.source = torch.cat([owner, len(groups) + torch.arange(len(ids) - first)])
    # In the same order: the first token of every reply, then all others.
    batch.targets = torch.cat([torch.stack([reply[0] for reply in replies])] + [reply[1:] for reply in replies])
    reply_number = torch.arange(len(replies))
    which_reply = torch.cat([reply_number, reply_number.repeat_interleave(sizes)])
    which_token = torch.cat([torch.zeros_like(reply_number), number + 1])
    batch.cell = torch.stack([which_reply, which_token])
    return batch


def pictures_of(prompts: list[Prompt]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(pixels, grids) of all prompts in order, (None, None) when none has a picture."""
    seen = [prompt for prompt in prompts if prompt.pixels is not None]
    if not seen:
        return None, None
    return torch.cat([prompt.pixels for prompt in seen]), torch.cat([prompt.grids for prompt in seen])


def unpack(values: torch.Tensor, cell: torch.Tensor, fill=0.0) -> torch.Tensor:
    """Per-token values (N,) at their (reply, token) cells: -> (B, T). Differentiable."""
    shape = int(cell[0].max()) + 1, int(cell[1].max()) + 1
    # index_put, not assignment: gradients flow through it.
    return values.new_full(shape, fill).index_put((cell[0], cell[1]), values)


def group_sizes(groups: list[tuple[Prompt, list[torch.Tensor]]]) -> list[int]:
    """Tokens and patches of each group: what training.micro_batches divides by."""
    sizes = []
    for prompt, replies in groups:
        fed = sum(len(reply) - 1 for reply in replies)
        sizes.append(prompt.patches + len(prompt.ids) + fed)
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Policy


class TokenLogProbs(torch.autograd.Function):
    """log softmax(W h / temperature)[target], never holding more than `rows` rows of logits, forward or backward.

    hidden (M, H), weight (V, H), source (N,) which hidden state predicts each target (N,), forbidden (F,) tokens that
    count as impossible -> (N,) fp32. Backward computes the logits anew: their gradient is (1[target] − softmax) · g.
    """

    @staticmethod
    def forward(ctx, hidden, weight, source, targets, temperature, forbidden, rows):
        ctx.save_for_backward(hidden, weight, source, targets, forbidden)
        ctx.temperature, ctx.rows = temperature, rows
        out = torch.zeros(len(targets), device=hidden.device)
        ctx.lse = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            chunk = slice(start, start + rows)
            logits = token_logits(hidden[chunk], weight, temperature, forbidden)
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
            probability = logits.sub_(ctx.lse[chunk, None]).exp_()
            d_logits = probability.mul_(-total[chunk, None])
            inside, cell = targets_in_chunk(source, targets, start, len(d_logits))
            d_logits.index_put_(cell, grad.masked_fill(~inside, 0.0), accumulate=True)
            d_logits = d_logits.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[chunk])
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, hidden[chunk])
        return d_hidden, d_weight, None, None, None, None, None


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


def token_logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: float, forbidden: torch.Tensor):
    """(n, H) -> (n, V) fp32 logits divided by temperature (0: not divided), forbidden tokens at -inf."""
    logits = (hidden @ weight.T).float()
    if temperature not in (0.0, 1.0):
        logits /= temperature
    return logits.index_fill_(-1, forbidden, -math.inf)


class Policy(nn.Module):
    """A Hugging Face vision language model behind one forward, so that FSDP's hooks see every use of its weights.

    hf: a …ForConditionalGeneration of one of the FAMILIES. end_ids: tokens that end a reply. forbidden: tokens that are
    never sampled (they stand for pictures: one of them in a reply would ask for pixels that do not exist). chunk_bytes:
    fp32 logits that may exist at a time. flash: use FlashAttention's kernels (CUDA only). half: whether it computes in
    bf16. trains: whether it is loaded to learn.
    """

    def __init__(
        self, hf, family: Family, end_ids: list, forbidden: list, *,
        chunk_bytes=2**26, flash=False, half=False, trains=False, sharding=DEFAULT_SHARDING,
    ):  # fmt: skip
        super().__init__()
        self.hf, self.family = hf, family
        self.end_ids, self.chunk_bytes, self.flash, self.half = tuple(end_ids), chunk_bytes, flash, half
        self.trains, self.sharding = trains, sharding
        self.register_buffer("forbidden", torch.tensor(forbidden), persistent=False)
        # 4-D, so that transformers builds no mask of its own.
        self.register_buffer("no_mask", torch.zeros(1, 1, 1, 1), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    def units(self) -> list[nn.Module]:
        """What FSDP shards one by one: the decoder's blocks and the vision tower. The root holds the rest."""
        return [*self.family.decoder(self.hf).layers, self.family.vision(self.hf)[0]]

    def forward(
        self, batch: Batch, temperature: float = 1.0, entropy: bool = False, statistics: Callable | None = None
    ):  # fmt: skip
        """Log-probs (N,) of batch.targets at `temperature`; without targets, logits (M, V) of the states read.

        entropy: -> (log-probs, entropies (N,) of the distributions that the targets come from). statistics, a function
        of some rows of logits (n, V) -> (n, K): -> instead what it says of those distributions, (N, K).
        """
        # In training the vision tower runs in every forward, on a blank picture where a batch has none: sharded ranks
        # must gather it together, and AdamW must move its weights alike however a batch is divided.
        blind = self.trains and batch.pixels is None and batch.targets is not None
        blank = 0.0 * self.blank_features() if blind else None  # first, where pictures are: FSDP keeps an order
        pictures = {} if batch.pixels is None else self.family.picture_arguments(batch.pixels, batch.grids)
        batch.layout.flash = self.flash
        outputs = self.hf.model(
            input_ids=batch.ids,
            position_ids=self.family.position_ids(batch.positions),
            attention_mask=self.no_mask,
            use_cache=False,
            layout=batch.layout,
            **pictures,
        )
        hidden = outputs.last_hidden_state[0].index_select(0, batch.read)  # (M, H)
        if blind:
            hidden = hidden + blank
        weight = self.hf.lm_head.weight
        if batch.targets is None:
            return token_logits(hidden, weight, temperature, self.forbidden)
        # As many rows of fp32 logits as the budget allows: with 151,936 tokens a row is 0.6 MB.
        rows = max(1, self.chunk_bytes // (4 * len(weight)))
        if statistics is not None:
            chunks = (token_logits(part, weight, temperature, self.forbidden) for part in hidden.split(rows))
            return torch.cat([statistics(logits) for logits in chunks])[batch.source]
        values = TokenLogProbs.apply(hidden, weight, batch.source, batch.targets, temperature, self.forbidden, rows)
        if not entropy:
            return values
        entropies = StateEntropies.apply(hidden, weight, temperature, self.forbidden, rows)
        return values, entropies[batch.source]

    def blank_features(self) -> torch.Tensor:
        """The sum of all features of the smallest black picture."""
        pixels, grids = self.family.blank_picture(self.forbidden.device)
        return sum(part.float().sum() for part in self.family.picture_features(self.hf, pixels, grids))


def log_probs(policy: Policy, groups: list, temperature: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all replies of some groups: -> (logp (B, T), mask (B, T) bool).

    groups as for `pack`. mask is True on every token of a reply, its end token included; logp is 0 elsewhere.
    """
    batch = pack(groups).to(policy.forbidden.device)
    values = policy(batch, temperature=temperature)
    mask = unpack(torch.ones_like(values, dtype=torch.bool), batch.cell, False)
    return unpack(values, batch.cell), mask


def log_probs_and_entropies(policy: Policy, groups: list, temperature: float = 1.0):
    """As log_probs: -> (logp, mask, entropy), all (B, T); entropy in nats, of the whole distribution at each token."""
    batch = pack(groups).to(policy.forbidden.device)
    values, entropies = policy(batch, temperature=temperature, entropy=True)
    mask = unpack(torch.ones_like(entropies, dtype=torch.bool), batch.cell, False)
    return unpack(values, batch.cell), mask, unpack(entropies, batch.cell)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(
    path: str, world: World, *, dtype="auto", attn="auto", max_pixels=None, max_image_pixels=MAX_IMAGE_PIXELS,
    train=False, freeze_vision=False, gradient_checkpointing="auto", sharding=DEFAULT_SHARDING,
) -> tuple[Policy, Encoder]:  # fmt: skip
    """Load a checkpoint directory or hub id: -> (Policy on world.device, Encoder). Only safetensors are read.

    dtype: "fp32", "bf16" or "auto" (bf16 on CUDA, fp32 on CPU). A model that is trained keeps fp32 master weights; with
    bf16 its compute is cast (FSDP mixed precision). attn: "flash", "sdpa" or "auto" (flash on CUDA in bf16). train:
    shard with FSDP2 when there is more than one process (or CUDA). gradient_checkpointing: "on", "off" or "auto" (on
    CUDA). The model is built without memory, sharded, and then filled: each process reads only its shards from the
    files. Raises DataError, on all processes together, when it cannot be loaded or holds NaN or inf.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cuda = world.device.type == "cuda"
    if dtype == "auto":
        dtype = "bf16" if cuda else "fp32"
    half = dtype == "bf16"
    if attn == "flash" and not (cuda and half):
        raise DataError("--attn flash needs a CUDA GPU and --dtype bf16; use --attn sdpa, which is exact everywhere")
    # Before anything is read: HSDP needs equal groups of processes.
    if world.size % sharding.replicas:
        raise DataError(f"--replicas {sharding.replicas} does not divide the {world.size} process(es)")
    weight_dtype = torch.float32 if train or not half else torch.bfloat16
    with together(world):
        folder = check_folder(path)
        policy, encoder = build(
            folder, weight_dtype, max_pixels, max_image_pixels, chunk_bytes=2**29 if cuda else 2**26,
            flash=attn != "sdpa" and cuda and half, half=half, trains=train, sharding=sharding,
        )  # fmt: skip
        names = stored_names(policy, folder)
    if world.main and encoder.tokenizer.chat_template is None:
        print(f"{path}: no chat template, so prompts read User: … Assistant:", file=sys.stderr)

    hf, family = policy.hf, policy.family
    family.use_kernels(hf, windows=policy.flash or not cuda)
    if freeze_vision:
        for part in family.vision(hf):
            part.requires_grad_(False)
    if train and (gradient_checkpointing == "on" or (gradient_checkpointing == "auto" and cuda)):
        hf.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        hf.train()  # transformers checkpoints in training mode only; nothing here drops out
    sharded = train and (world.size > 1 or cuda)
    if sharded:
        training.shard(policy, world, torch.bfloat16 if half else None, sharding)
    give_memory(policy, world.device, sharding.offload and sharded)
    with together(world):
        read_weights(policy, folder, names)
        check_finite(policy, folder)
    return policy, encoder


@contextmanager
def together(world: World):
    """A DataError of one process becomes one of all: nobody may wait in a collective for a process that has left."""
    problem = None
    try:
        yield
    except DataError as error:
        problem = str(error)
    for first in filter(None, world.gather(problem)):
        raise DataError(first)


def check_folder(path: str, flag: str = "--model") -> str:
    """Find a model and check all its files without loading it: -> its directory. Seconds even for a large one.

    path: a directory, or a hub id, which is downloaded. flag: what a message calls it. Raises DataError, one line that
    names the file: every stage asks this before anything expensive.
    """
    folder = model_directory.find(path, flag)
    model_directory.check_finished(folder)
    family_in(folder)
    model_directory.read_settings(folder)
    model_directory.read_headers(folder)
    return folder


def family_in(folder: str) -> type[Family]:
    """The class of a directory's model_type. DataError."""
    config = read_json_object(Path(folder) / "config.json")
    try:
        return family_of(config.get("model_type"))
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error


def load_reference(path: str, world: World, *, sharding=DEFAULT_SHARDING, **options) -> Policy:
    """The frozen starting model, for the KL; options as for `load`."""
    if sharding.mode == "grad":
        # Nobody goes backward through it, so nothing would ever release the weights that mode "grad" keeps gathered.
        sharding = replace(sharding, mode="full")
    policy, _ = load(path, world, train=True, sharding=sharding, **options)
    return policy.requires_grad_(False)


def build(
    folder: str, dtype: torch.dtype, max_pixels: int | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS, **options
) -> tuple[Policy, Encoder]:  # fmt: skip
    """A policy without memory (on the meta device) and its encoder. options: those of Policy. DataError, OSError."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    # Before AutoConfig, which asks on the terminal whether to run code of the checkpoint's own.
    kind = family_in(folder)
    model_directory.read_settings(folder)
    with one_line(f"{folder}: config.json describes no model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
    with one_line(f"{folder}: no image processor can be made of its settings"):
        family = family_for(kind, config, folder, max_pixels)
    windows = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if getattr(text, "use_sliding_window", False) or windows:
        raise DataError(f"{folder}: sliding-window attention is not supported (use_sliding_window)")
    with one_line(f"{folder}: config.json describes no model"):
        if config.tie_word_embeddings and has_own_head(folder):
            # Otherwise its lm_head would be ignored: transformers ties what the config says is tied.
            config.tie_word_embeddings = text.tie_word_embeddings = False
        with torch.device("meta"):
            hf = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    encoder = Encoder(folder, family, hf, max_image_pixels=max_image_pixels)
    # A model without generation_config.json ends on the tokenizer's end token alone.
    end_ids = {encoder.end_id, *model_directory.end_tokens(folder)}
    if max(end_ids) >= text.vocab_size:
        raise DataError(f"{folder}: generation_config.json: eos_token_id {max(end_ids)} is beyond the vocabulary")
    if (Path(folder) / "generation_config.json").exists():
        with one_line(f"{folder}: generation_config.json cannot be used"):
            hf.generation_config = GenerationConfig.from_pretrained(folder)
    return Policy(hf, family, sorted(end_ids), encoder.forbidden, **options), encoder


def family_for(kind: type[Family], config, folder: str, max_pixels: int | None) -> Family:
    """The answers of a family for one checkpoint; its own complaints begin with the directory."""
    try:
        return kind(config, folder, max_pixels)
    except DataError as error:
        named = str(error).startswith(str(folder))
        raise error if named else DataError(f"{folder}: {error}") from error


def has_own_head(folder: str) -> bool:
    """Whether the files hold an lm_head that differs from the embeddings."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, a safe_open has no other way
                for end in ("lm_head.weight", "embed_tokens.weight"):
                    if key.endswith(end):
                        found[end] = tensors.get_tensor(key)
    return len(found) == 2 and not torch.equal(*found.values())


def give_memory(policy: Policy, device: torch.device, offload: bool = False) -> None:
    """Give a policy built on the meta device its memory: weights that hold nothing yet, buffers as they are made."""
    forbidden = policy.forbidden
    policy.to_empty(device="cpu" if offload else device)
    if not training.fsdp_units(policy):
        policy.hf.tie_weights()  # FSDP keeps tied weights together by itself
    for module in policy.modules():
        if module is not policy and next(module.buffers(recurse=False), None) is not None:
            policy.hf._init_weights(module)  # rotary frequencies
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    policy.forbidden, policy.no_mask = forbidden.to(device), torch.zeros(1, 1, 1, 1, device=device)


def stored_names(policy: Policy, folder: str) -> dict[str, str]:
    """{name of a weight: its name in the files}. DataError unless the files hold exactly the weights of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    stored = model_directory.read_headers(folder)
    # Files carry the names of the year they were written in; transformers knows what they are called now.
    renamings = [rule for rule in get_model_conversion_mapping(policy.hf) if isinstance(rule, WeightRenaming)]
    names = {}
    for key, tensor in stored.items():
        name = rename_source_key(key, renamings, [])[0]
        if name in names:
            raise DataError(f"{folder}/{tensor.file}: {key} and {names[name]} are the same weight")
        names[name] = key

    weights = {name.removeprefix("hf."): weight for name, weight in policy.named_parameters()}
    missing = sorted(weights.keys() - names.keys())
    if missing:
        raise DataError(f"{folder}: its safetensors lack {', '.join(missing[:3])}")
    for name, weight in weights.items():
        tensor = stored[names[name]]
        if tensor.shape != tuple(weight.shape):
            says = f"has the shape {list(tensor.shape)}, config.json asks for {list(weight.shape)}"
            raise DataError(f"{folder}/{tensor.file}: {names[name]} {says}")
    # A tied head may be stored a second time.
    further = sorted(names.keys() - weights.keys() - {"lm_head.weight"})
    if further:
        raise DataError(f"{folder}: its safetensors hold what the model has not: {', '.join(further[:3])}")
    return {name: names[name] for name in weights}


def read_weights(policy: Policy, folder: str, names: dict[str, str]) -> None:
    """Fill a policy from a directory's safetensors, each process reading the slices that are its own. DataError.

    names: as from `stored_names`.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    dcp, storage, _ = distributed_checkpoint()
    weights = {name.removeprefix("hf."): weight.detach() for name, weight in policy.named_parameters()}
    # dcp reads only the slices that a process holds.
    wanted = {names[name]: weight for name, weight in weights.items()}
    try:
        dcp.load(wanted, storage_reader=storage(str(folder)), no_dist=not torch.distributed.is_initialized())
    except (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        # What checkpoint reading collects of all processes; the first cause is enough.
        causes = getattr(error, "failures", {})
        cause = next((str(failure[0]) for failure in causes.values()), str(error))
        cause = (cause.splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: no model could be loaded ({cause})") from error


def check_finite(policy: Policy, folder: str) -> None:
    """Raise DataError if a weight holds NaN or inf. Each process looks at the shards that it holds."""
    names, extremes = [], []
    for name, weight in policy.named_parameters():
        part = weight.detach()
        part = part.to_local() if hasattr(part, "to_local") else part
        if part.numel():
            names.append(name.removeprefix("hf."))
            # NaN passes through; a sum of many finite numbers might not be finite.
            extremes.append(torch.stack(torch.aminmax(part)).float())
    if not names:
        return
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(f"{folder}: {bad[0]}{more} holds NaN or inf: the run that wrote it has diverged")


# ---------------------------------------------------------------------------------------------------------------------
# Cost


class Cost:
    """FLOPs of a model by the formula: 2 per weight and token, and 4 per query, key and width in attention.

    What the algorithm needs is counted, not what a way of computing it may repeat (gradient checkpointing) or waste
    (padding), so that a share of the peak means the same everywhere.
    """

    def __init__(self, policy: Policy):
        self.hf, self.family = policy.hf, policy.family
        decoder = self.family.decoder(self.hf)
        self.decoder = matrix_weights(decoder.layers)
        self.head = matrix_weights(self.hf.lm_head)
        self.width = len(decoder.layers) * decoder.layers[0].self_attn.q_proj.out_features
        vision = (weight for part in self.family.vision(self.hf) for weight in part.parameters())
        self.frozen = not any(weight.requires_grad for weight in vision)

    def forward(self, groups: list) -> tuple[float, float]:
        """(FLOPs of decoder and head, FLOPs of the vision tower) of one forward over groups."""
        text = vision = 0
        for prompt, replies in groups:
            length = len(prompt.ids)
            sizes = [len(reply) - 1 for reply in replies]
            pairs = length * (length + 1) / 2  # of query and key
            pairs += sum(size * (size + 1) / 2 + size * length for size in sizes)
            # The prompt once, whatever the number of replies.
            text += 2 * self.decoder * (length + sum(sizes))
            text += 2 * self.head * (1 + sum(sizes))
            text += 4 * self.width * pairs
            for grid in [] if prompt.grids is None else prompt.grids.tolist():
                vision += self.family.vision_flops(self.hf, grid)
        return text, vision

    def learn(self, groups: list, reference: bool = False) -> float:
        """FLOPs of forward and backward (twice the forward), and of a reference's forward if there is one."""
        text, vision = self.forward(groups)
        total = 3 * text + (1 if self.frozen else 3) * vision
        return total + (text + vision if reference else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Names that this file had before it was divided; found on demand, for those files import this one.

MOVED = {
    "files": ("DataError", "write_text"),
    "records": ("read_jsonl", "read_records", "write_jsonl", "epoch_order"),
    "processes": ("setup", "run"),
    "run_directory": ("Run", "save_model"),
    "training": ("adamw", "backward", "update", "learning_rate"),
    "sampler": ("sample", "Reply"),
    "vllm_sampler": ("VLLM",),
    "toy.tiny_model": ("make_tiny",),
}


def __getattr__(name):
    for module, names in MOVED.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
