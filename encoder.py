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
from lazy_puzzles import Shown, open_puzzle, pictures_of, sizes_of
from model_directory import is_integer
from pictures import MAX_IMAGE_PIXELS, PictureError
from processes import World

# ---------------------------------------------------------------------------------------------------------------------
# Questions and replies


@dataclass
class Prompt:
    """One encoded question.

    ids (Lp,) with image tokens expanded; positions (A, Lp); next: the position of the first reply token; pixels fp32
    and grids (images, 3) of its pictures, or None; plain_ids: one token per image, what an engine with its own image
    processor takes; images: its pictures; record: what was encoded (Encoder.prompt may take another than it was given).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    next: int
    pixels: torch.Tensor | None
    grids: torch.Tensor | None
    plain_ids: list
    images: list[Shown] = field(default_factory=list)
    record: dict = field(default_factory=dict)

    @property
    def patches(self) -> int:
        """Patches of all its pictures."""
        return 0 if self.grids is None else int(self.grids.prod(1).sum())


class Encoder:
    """Turns records into prompts and texts into replies with the checkpoint's own tokenizer and image settings.

    Encoded pictures are cached (up to cache_bytes) because epochs come back to them. max_image_pixels: the largest
    width x height of an image file that is opened.

    A picture that turns out to be broken when it is needed is an error, unless `replace_broken` allowed something else.
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
        self._pictures: OrderedDict[Shown, Future] = OrderedDict()  # the least recently used first
        self._bytes_left, self._lock = cache_bytes, threading.Lock()
        self._measured = {}
        self._workers = ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2)), "pictures")
        self._replaceable, self._places, self.broken = [], {}, {}

    def save(self, folder: Path) -> None:
        """Write tokenizer and image processor into a model directory."""
        self.tokenizer.save_pretrained(folder)
        self.family.save_image_processor(folder)

    # ---- pictures

    def images(self, pictures: list[Shown]) -> list[Image.Image]:
        """Pictures resized as every engine gets them."""
        self._begin_all(pictures)
        return [self._encoded(shown)[2] for shown in pictures]

    def picture(self, shown: Shown) -> tuple[torch.Tensor, torch.Tensor]:
        """(pixels, grid (3,)) of one picture, from the cache when it was seen before."""
        pixels, grid, _ = self._encoded(shown)
        return pixels, grid

    def prefetch(self, records: list[dict]) -> None:
        """Begin to encode the pictures of records that will soon be asked for, in worker threads."""
        for record in records:
            if where_of(record) not in self.broken:
                self._begin_all(pictures_of(record))

    def _begin_all(self, pictures):
        for shown in pictures:
            self._begin(shown)

    def _encoded(self, shown):
        encoded = self._begin(shown).result()
        if isinstance(encoded, str):
            raise PictureError(encoded)
        return encoded[shown.number]

    def _begin(self, shown):
        key = shown.whole
        with self._lock:
            if key not in self._pictures:
                self._pictures[key] = self._workers.submit(self._encode, key)
            self._pictures.move_to_end(key)
            return self._pictures[key]

    def _encode(self, key):
        """[(pixels, grid (3,), resized image)] of a file, or of all pictures of a puzzle; or why there are none."""
        # numpy: a torch operation in this thread would start a team of threads of its own, against the main one's.
        encoded = []
        try:
            for picture in open_puzzle(key, self.max_image_pixels):
                grid, image = self.family.grid(*picture.size), self.family.resize(picture)
                encoded.append((torch.from_numpy(self.family.pixels(image)), torch.tensor(grid), image))
        except PictureError as error:
            # As text: a future that holds an exception holds the frames it passed, and with them all that they hold.
            encoded = str(error)
        except ValueError as error:  # a strip, in place of what was measured
            encoded = f'image "{key.path}" cannot be encoded ({error})'
        with self._lock:
            self._bytes_left -= bytes_of(encoded)
            self._forget_oldest(keep=key)
        return encoded

    def _forget_oldest(self, keep):
        for key, future in list(self._pictures.items()):
            if self._bytes_left >= 0:
                return
            if key != keep and future.done():
                self._bytes_left += bytes_of(future.result())
                del self._pictures[key]

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
            with one_line(f"{where_of(record)}: the model's chat template failed"):
                return self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        # A base model without a template: a plain dialogue.
        picture = self.family.picture_text.format(self.image_token)
        words = "".join(part.get("text", picture) for part in content)
        return f"User: {words}\nAssistant:"

    def measure(self, record: dict) -> tuple[list[int], list[int]]:
        """(ids with one token per image, image tokens each image will take), without reading pixels. DataError."""
        # By content, not by id: the samples of one prompt, and epochs, ask again and again.
        pictures = pictures_of(record)
        key = record["prompt"], *pictures
        if key not in self._measured:
            if len(self._measured) == 2**16:  # some 100 MB
                self._measured.clear()
            self._measured[key] = self._measure(record, pictures)
        return self._measured[key]

    def _measure(self, record, pictures):
        where = where_of(record)
        plain = self.tokenizer(self.chat(record), add_special_tokens=False)["input_ids"]
        others = set(self.forbidden) - {self.image_id}
        if plain.count(self.image_id) != len(record["images"]) or others & set(plain):
            raise DataError(f"{where}: the prompt's text holds image or video tokens of its own")
        if max(plain, default=0) >= self.rows:
            raise DataError(f"{where}: the prompt holds a token that the model has no embedding for")
        counts = []
        for shown, size in zip(pictures, record.get("_sizes") or self._sizes(pictures, where), strict=True):
            try:
                grid = self.family.grid(*size)
            except ValueError as error:  # too thin a strip
                raise DataError(f'{where}: image "{shown.path}" cannot be encoded ({error})') from error
            counts.append(self.family.tokens_per_picture(grid))
        length = len(self._expand(plain, counts))
        if length >= self.max_length:
            raise DataError(f"{where}: {length} prompt tokens, the model takes {self.max_length}; lower --max-pixels")
        return plain, counts

    def _sizes(self, pictures, where):
        """Sizes of pictures whose headers nobody has read yet."""
        try:
            return [sizes_of(shown, self.max_image_pixels)[shown.number] for shown in pictures]
        except PictureError as error:
            raise DataError(f"{where}: {error}") from error

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

    def replace_broken(self, records: list[dict], broken: dict[str, dict]) -> None:
        """From now on, a record among these with a picture that cannot be decoded gives place to the next in the list.

        So that one bad file among many ends no run, and every rank keeps its number of groups. broken: {"file:line":
        what was wrong} of an earlier start; what is found is added to it (Run.share_broken tells the other ranks).
        """
        self._replaceable, self.broken = records, broken
        self._places = {where_of(record): place for place, record in enumerate(records)}

    def prompt(self, record: dict) -> Prompt:
        """Encode a record's question, or that of the record which takes its place: Prompt.record says which.

        Which one that is follows from the files alone. DataError when text and images do not fit each other, or when a
        picture is broken and nothing may take its place.
        """
        first = where_of(record)
        tries = max(1, min(MOST_REPLACED, len(self._replaceable)))
        for _ in range(tries):
            where = where_of(record)
            if where not in self.broken:
                try:
                    return self._prompt(record)
                except PictureError as error:
                    if where not in self._places:
                        raise DataError(f"{where}: {error}") from error
                    self.broken[where] = {"where": where, "id": record["id"], "cause": str(error)}
            record = self._replaceable[(self._places[where] + 1) % len(self._replaceable)]
        cause = self.broken[first]["cause"]
        raise DataError(f"{first}: {cause}; all {tries} records from there on have broken pictures")

    def _prompt(self, record):
        plain, counts = self.measure(record)
        ids = torch.tensor(self._expand(plain, counts))
        pixels = grids = None
        images = pictures_of(record)
        # Pixels only here: checks and lengths never read them.
        if images:
            pictures = [self.picture(shown) for shown in images]
            for shown, count, (_, grid) in zip(images, counts, pictures, strict=True):
                if self.family.tokens_per_picture(grid.tolist()) != count:
                    raise PictureError(f'image "{shown.path}" is broken (its size is not what its header said)')
            pixels = torch.cat([pixels for pixels, _ in pictures])
            grids = torch.stack([grid for _, grid in pictures])
        positions = self.family.positions(self.hf, ids, grids)
        return Prompt(ids, positions, int(positions.max()) + 1, pixels, grids, plain, images, record)

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


MOST_REPLACED = 100  # broken records in a row, before it is no single file that is at fault


def where_of(record: dict) -> str:
    """What errors call a record: the file and line it was read from."""
    return record.get("_where") or record["id"]


def bytes_of(encoded: list[tuple] | str) -> int:
    """Memory that encoded pictures take; none, where there is only a message."""
    if isinstance(encoded, str):
        return 0
    return sum(pixels.nbytes + 3 * image.width * image.height for pixels, _, image in encoded)


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
