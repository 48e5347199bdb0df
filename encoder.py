"""Encoder: a record becomes a prompt of token ids, pixels and positions; text becomes reply ids and back.

With the checkpoint's own tokenizer, chat template and image settings (families.py), so that nothing here knows a model
by its name. Pictures are encoded in worker threads, ahead of the step that needs them.

Legend: A position axes, Lp tokens of a prompt, T tokens of a reply.
"""

import json
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import model_directory
from families import Family
from files import DataError
from model_directory import is_integer
from pictures import MAX_IMAGE_PIXELS, PictureError, open_picture, picture_size
from processes import World

# ---------------------------------------------------------------------------------------------------------------------
# Questions and replies


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
