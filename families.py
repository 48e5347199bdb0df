"""Model families: what differs between the architectures we train, one class each. Everything else asks these.

    FAMILIES = {model_type of config.json: class}

A family says how a picture becomes pixels and tokens, what positions a prompt's tokens have, where in the Hugging Face
model its parts are, which arguments carry the pictures, and what its vision tower costs. What all architectures share
is written once, elsewhere: the packed row and its attention, log-probs, decoding, sharding, checkpoints.

To add one: a class below with the abstract methods of `Family`, a line in FAMILIES, a small config of it in
toy/tiny_model.py. tests/test_families.py then compares all of its answers with transformers' own (docs/change.md).

Legend: L tokens of a prompt, A position axes (3 for M-RoPE, 1 otherwise). A picture's grid (t, h, w) is t tiles of
h x w patches; a patch sees no further than its own tile. merge: side of the square of patches that becomes one image
token. Pixels are what the vision tower reads, fp32: Qwen (t·h·w, D) flattened patches, InternVL (t, 3, side, side).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import attention
from files import read_json_object
from model_directory import check_no_code, exists, is_integer, is_number, shown
from records import DataError


class Family(ABC):
    """What the rest of the project asks about an architecture; made once per checkpoint.

    config: the Hugging Face config. folder: the checkpoint, for its image processor. max_pixels, min_pixels: bounds of
    a picture's area; None: the checkpoint's own. Raises DataError for bounds that leave no image token, and for a
    config that we would compute wrongly.

    The abstract methods have no common answer. The others say what is usual, and a family overrides what is not.
    """

    position_axes = 1
    # How a picture stands in a prompt if the checkpoint has no chat template; {} is the image token.
    picture_text = "{}"
    # What __init__ of a family sets besides config: its image processor, and the side of an image token in patches.
    processor = None
    merge: int

    def __init__(self, config, folder: str, max_pixels: int | None = None, min_pixels: int | None = None):
        self.config = config

    # ---- pictures

    @abstractmethod
    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """The grid of a picture of this size, without reading it. ValueError if it cannot be encoded."""

    def tokens_per_picture(self, grid: tuple[int, int, int]) -> int:
        """Image tokens that a picture of this grid takes in the prompt."""
        t, h, w = grid
        return t * h * w // self.merge**2

    def resize(self, image: Image.Image) -> Image.Image:
        """The picture as every engine gets it: where possible resized here, so that all see the same pixels."""
        return image.convert("RGB")

    @abstractmethod
    def pixels(self, image: Image.Image) -> np.ndarray:
        """A picture that `resize` has made -> what the vision tower reads. Called in threads, so numpy only."""

    def expand(self, count: int) -> list[int]:
        """The tokens that stand for one picture of `count` image tokens."""
        return [self.config.image_token_id] * count

    def save_image_processor(self, folder: Path) -> None:
        """Write what tells others how to make the same pixels: transformers, vLLM, and `__init__` of this class."""
        self.processor.save_pretrained(folder)

    # ---- tokens

    def forbidden(self, tokenizer) -> list[int]:
        """Tokens that stand for pictures or videos. No reply may hold one: it would ask for pixels that are not there.
        The image token comes first."""
        return [self.config.image_token_id]

    def positions(self, hf: nn.Module, ids: Tensor, grids: Tensor | None) -> Tensor:
        """(A, L) positions of a prompt's tokens (L,), images expanded; grids (images, 3) or None."""
        return torch.arange(len(ids)).expand(self.position_axes, -1)

    # ---- the Hugging Face model

    def decoder(self, hf: nn.Module) -> nn.Module:
        """The language model: embed_tokens, layers, norm, rotary_emb. sampler.decode knows its blocks."""
        return hf.model.language_model

    @abstractmethod
    def vision(self, hf: nn.Module) -> list[nn.Module]:
        """What only pictures run through, the tower first. --freeze-vision freezes all of it; the first is an FSDP
        unit of its own."""

    def use_kernels(self, hf: nn.Module, windows: bool) -> None:
        """Put our attention, and what else is faster and exact, in place of transformers' own.

        windows: whether attention.window_attention is faster on this machine.
        """
        attention.register()
        hf.config.get_text_config()._attn_implementation = "prompt_once"

    def position_ids(self, positions: Tensor) -> Tensor:
        """(A, rows, L) positions as the decoder takes them: (3, rows, L) for M-RoPE, (rows, L) otherwise."""
        return positions if self.position_axes > 1 else positions[0]

    def picture_arguments(self, pixels: Tensor, grids: Tensor) -> dict:
        """Arguments of the model's forward that carry pictures."""
        return {"pixel_values": pixels}

    @abstractmethod
    def blank_picture(self, device) -> tuple[Tensor, Tensor]:
        """(pixels, grids) of the smallest black picture the tower takes."""

    @abstractmethod
    def picture_features(self, hf: nn.Module, pixels: Tensor, grids: Tensor) -> Iterable[Tensor]:
        """Everything that some pictures hand to the decoder: together it depends on every weight of `vision`."""

    @abstractmethod
    def vision_flops(self, hf: nn.Module, grid: tuple[int, int, int]) -> float:
        """FLOPs of the vision tower's forward over one picture: 2 per weight and token, 4 per query, key and width."""

    # ---- vLLM

    def vllm_settings(self) -> dict:
        """Arguments of vLLM's engine that make it see the same pixels."""
        return {}

    def prepare_vllm(self) -> None:
        """Called before the engine starts: what its arguments cannot say."""
        return


def matrix_weights(*modules: nn.Module) -> int:
    """Weights that multiply every token: all but norms and biases."""
    return sum(weight.numel() for module in modules for weight in module.parameters() if weight.ndim > 1)


# ---------------------------------------------------------------------------------------------------------------------
# Image settings: preprocessor_config.json


def image_settings(folder: str | Path, kind: str) -> tuple[dict, Path]:
    """(the image settings of a model directory, the file they stand in), checked. DataError.

    kind: how the name of transformers' class for them begins. Mean and deviation must be written down: there is a
    default, but it is that of other models.
    """
    path = Path(folder) / "processor_config.json"
    settings = read_json_object(path) if exists(path) else {}
    check_no_code(settings, path)
    # New files have the image settings inside of the processor's.
    if "image_processor" in settings:
        settings = settings["image_processor"]
        if not isinstance(settings, dict):
            raise DataError(f"{path}: image_processor must be an object, it is {shown(settings)}")
    else:
        path = Path(folder) / "preprocessor_config.json"
        settings = read_json_object(path)
    check_no_code(settings, path)

    # null and a missing field mean the same to transformers.
    settings = {name: value for name, value in settings.items() if value is not None}
    name = settings.get("image_processor_type", kind)
    if not isinstance(name, str) or not name.startswith(kind):
        raise DataError(f"{path}: image_processor_type must be {kind}, it is {shown(name)}")
    for name in ("image_mean", "image_std"):
        values = settings.get(name)
        sound = isinstance(values, list) and len(values) == 3 and all(is_number(value) for value in values)
        if not sound or (name == "image_std" and min(values) <= 0):
            what = "three positive numbers" if name == "image_std" else "three numbers"
            raise DataError(f"{path}: {name} must be {what}, it is {shown(values)}")
    for name, value in settings.items():
        if name.startswith("do_") and not isinstance(value, bool):
            raise DataError(f"{path}: {name} must be true or false, it is {shown(value)}")
    scale, resample = settings.get("rescale_factor", 1), settings.get("resample", 3)
    if not is_number(scale) or scale <= 0:
        raise DataError(f"{path}: rescale_factor must be a positive number, it is {shown(scale)}")
    if not is_integer(resample) or not 0 <= resample <= 5:
        raise DataError(f"{path}: resample must be a whole number from 0 to 5, it is {shown(resample)}")
    if not isinstance(settings.get("size", {}), dict):
        raise DataError(f"{path}: size must be an object, it is {shown(settings['size'])}")
    return settings, path


def area_limits(settings: dict, path: Path) -> tuple[int, int]:
    """(least, most) pixels of a picture by a Qwen image processor's settings, in any of their three spellings."""
    size = settings.get("size", {})
    spellings = {
        "min_pixels": (settings.get("min_pixels"), size.get("shortest_edge"), size.get("min_pixels")),
        "max_pixels": (settings.get("max_pixels"), size.get("longest_edge"), size.get("max_pixels")),
    }
    found = []
    for name, values in spellings.items():
        # In the order in which transformers prefers them.
        value = next((value for value in values if value is not None), None)
        if not is_integer(value) or value < 1:
            raise DataError(f"{path}: {name} (or its edge in size) must be a positive number, it is {shown(value)}")
        found.append(value)
    least, most = found
    if least > most:
        raise DataError(f"{path}: min_pixels {least} is larger than max_pixels {most}")
    return least, most


def check_tiles(settings: dict, path: Path, token: int) -> None:
    """Raise DataError for settings of a tiling image processor that make no tiles. token: side of an image token."""
    size = settings.get("size", {})
    height, width = size.get("height"), size.get("width")
    if not is_integer(height) or height != width or not 0 < height <= 2**14 or height % token:
        raise DataError(f"{path}: size must be a square of a multiple of {token} pixels, it is {shown(size)}")
    least, most = settings.get("min_patches", 1), settings.get("max_patches", 12)
    # All shapes of up to `most` tiles are tried for a picture.
    if not (is_integer(least) and is_integer(most) and 1 <= least <= most <= 1000):
        raise DataError(f"{path}: min_patches to max_patches must lie within 1 to 1000, they are {least} to {most}")
    if not isinstance(settings.get("crop_to_patches", True), bool):
        raise DataError(f"{path}: crop_to_patches must be true or false, it is {shown(settings['crop_to_patches'])}")


# ---------------------------------------------------------------------------------------------------------------------
# Qwen2-VL, Qwen2.5-VL, Qwen3-VL


class QwenVL(Family):
    """A picture keeps its shape: its sides become multiples of patch x merge, its area lies between two limits."""

    position_axes = 3  # M-RoPE: time, height, width
    picture_text = "<|vision_start|>{}<|vision_end|>"

    def __init__(self, config, folder, max_pixels=None, min_pixels=None):
        # Not AutoProcessor: it needs torchvision for its video half, which no CPU-only installation has.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        super().__init__(config, folder, max_pixels, min_pixels)
        settings, path = image_settings(folder, "Qwen2VLImageProcessor")
        vision = config.vision_config
        sides = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }
        for name, side in sides.items():
            if settings.get(name, side) != side:
                raise DataError(f"{path}: {name} is {shown(settings[name])}, config.json says {side}")
        if settings.get("resample", 3) != 3:
            raise DataError(f"{path}: resample must be 3 (bicubic), it is {shown(settings['resample'])}")
        self.patch, self.merge = vision.patch_size, vision.spatial_merge_size
        self.factor = self.patch * self.merge  # pixels along the side of an image token

        least, most = area_limits(settings, path)
        if most < self.factor**2:
            raise DataError(f"{path}: its largest area, {most} pixels, is below one image token, {self.factor**2}")
        # One spelling of the limits for all that read them later, and what is missing is not a default's.
        limits = {"size": {"shortest_edge": least, "longest_edge": most}, "min_pixels": None, "max_pixels": None}
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **limits, **sides)
        self.max_pixels = max_pixels or most
        self.min_pixels = min(min_pixels or least, self.max_pixels)
        if self.max_pixels < self.factor**2:
            raise DataError(
                f"--max-pixels {self.max_pixels} is below one image token: at least {self.factor**2} pixels"
            )

    def target_size(self, width: int, height: int) -> tuple[int, int]:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        height, width = smart_resize(height, width, self.factor, self.min_pixels, self.max_pixels)
        if height * width > self.max_pixels:
            # A strip: smart_resize keeps one side at a factor and lets the other be.
            longest = max(self.factor, self.max_pixels // min(height, width) // self.factor * self.factor)
            height, width = min(height, longest), min(width, longest)
        return width, height

    def grid(self, width, height):
        width, height = self.target_size(width, height)
        return 1, height // self.patch, width // self.patch

    def resize(self, image):
        size = self.target_size(*image.size)
        image = image.convert("RGB")
        return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)

    def pixels(self, image):
        return self.processor(images=[image], do_resize=False, return_tensors="np")["pixel_values"]

    def forbidden(self, tokenizer):
        return [self.config.image_token_id, self.config.video_token_id]

    def positions(self, hf, ids, grids):
        if grids is None:
            return super().positions(hf, ids, grids)
        kinds = (ids == self.config.image_token_id).long()[None]
        return hf.model.get_rope_index(ids[None], mm_token_type_ids=kinds, image_grid_thw=grids)[0][:, 0]

    def vision(self, hf):
        return [hf.model.visual]

    def use_kernels(self, hf, windows):
        super().use_kernels(hf, windows)
        hf.model.visual.patch_embed = LinearPatchEmbed(hf.model.visual.patch_embed.proj)
        if windows:
            hf.config.vision_config._attn_implementation = "windows_flash"

    def picture_arguments(self, pixels, grids):
        return {"pixel_values": pixels, "image_grid_thw": grids}

    def blank_picture(self, device):
        vision = self.config.vision_config
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        grids = torch.tensor([[1, self.merge, self.merge]], device=device)
        return torch.zeros(self.merge**2, size, device=device), grids

    def picture_features(self, hf, pixels, grids):
        out = hf.model.get_image_features(pixels, grids, return_dict=True)
        yield torch.cat(out.pooler_output)
        for features in getattr(out, "deepstack_features", ()):  # Qwen3-VL's, one per tapped block
            yield torch.cat(features)

    def vision_flops(self, hf, grid):
        t, h, w = grid
        tower, vision = hf.model.visual, self.config.vision_config
        per_patch = matrix_weights(tower.blocks, tower.patch_embed)
        per_token = matrix_weights(tower.merger, *getattr(tower, "deepstack_merger_list", ()))
        linear = 2 * (per_patch + per_token / self.merge**2) * t * h * w

        # Qwen2.5-VL: most blocks see windows only. The others see the whole picture.
        whole = getattr(vision, "fullatt_block_indexes", None)
        whole_blocks = len(tower.blocks) if whole is None else len(whole)
        pairs = whole_blocks * t * (h * w) ** 2
        if whole_blocks < len(tower.blocks):
            side = vision.window_size // vision.patch_size
            pairs += (len(tower.blocks) - whole_blocks) * t * window_pairs(h, side) * window_pairs(w, side)
        width = getattr(vision, "embed_dim", vision.hidden_size)
        return linear + 4 * width * pairs

    def vllm_settings(self):
        # Every picture arrives in a size that vLLM's own image processor need not change.
        return {"mm_processor_kwargs": {"size": {"shortest_edge": self.factor**2, "longest_edge": self.max_pixels}}}


def window_pairs(size: int, side: int) -> int:
    """Sum of the squared sides of the windows of `side` patches that `size` patches fall into."""
    return size // side * side**2 + (size % side) ** 2


class LinearPatchEmbed(nn.Module):
    """A patch embedding whose kernel is as large as its stride is a linear layer; a convolution runs slower."""

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self.proj = convolution  # under its old name: checkpoints know it by that

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)
        return F.linear(patches.to(weight.dtype), weight, self.proj.bias)


# ---------------------------------------------------------------------------------------------------------------------
# InternVL3, in transformers' own classes (checkpoints whose names end in -hf)


class InternVL(Family):
    """A picture becomes up to 12 square tiles of one fixed side, as fit its shape best, and the whole once more, small.

    max_pixels bounds the area of the tiles (not of the small one). min_pixels changes nothing: the least is one tile,
    and a smaller picture is enlarged to it.
    """

    picture_text = "{}\n"
    decoders = ("qwen2", "qwen3")  # of which the tests have shown that sampler.decode computes them
    dropouts = ("hidden_dropout_prob", "attention_dropout", "projection_dropout")

    def __init__(self, config, folder, max_pixels=None, min_pixels=None):
        from transformers import AutoTokenizer
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        super().__init__(config, folder, max_pixels, min_pixels)
        text, vision = config.get_text_config(), config.vision_config
        if text.model_type not in self.decoders:
            raise DataError(f"InternVL with a decoder {text.model_type} is not supported ({', '.join(self.decoders)})")
        if config.vision_feature_layer != -1:
            raise DataError(f"vision_feature_layer must be -1 (the last), it is {config.vision_feature_layer}")
        if not 0 < config.downsample_ratio <= 1:
            raise DataError(f"downsample_ratio of config.json must lie in (0, 1], it is {config.downsample_ratio}")
        drops = [name for name in self.dropouts if getattr(vision, name)]
        if drops:
            raise DataError(f"dropout in the vision tower is not supported ({drops[0]} {getattr(vision, drops[0])})")

        settings, path = image_settings(folder, "GotOcr2ImageProcessor")
        check_tiles(settings, path, vision.patch_size[0] * round(1 / config.downsample_ratio))
        self.processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
        side = self.processor.size["height"]
        most = self.processor.max_patches  # here and in transformers' settings a "patch" is a tile
        if max_pixels is not None:
            if max_pixels < side**2:
                raise DataError(f"--max-pixels {max_pixels} is below one tile: at least {side**2} pixels")
            most = min(most, max_pixels // side**2)
        self.tiling = {
            # Files may say False here: transformers' own processor turns it on by itself.
            "crop_to_patches": True,
            "min_patches": min(self.processor.min_patches, most),
            "max_patches": most,
        }
        self.patch = vision.patch_size[0]
        self.patches = side // self.patch  # along a tile's side
        self.merge = round(1 / config.downsample_ratio)
        # The chat template writes one image token a picture; transformers' processor puts these around it.
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.frame = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])
        if None in self.frame or tokenizer.unk_token_id in self.frame:
            raise DataError("its tokenizer has no special tokens <img> and </img>")

    def grid(self, width, height):
        tiles = self.processor.get_number_of_image_patches(height, width, self.tiling)
        return tiles, self.patches, self.patches

    def pixels(self, image):
        settings = {"return_tensors": "np", "input_data_format": "channels_last"}
        return self.processor(images=[image], **settings, **self.tiling)["pixel_values"]

    def expand(self, count):
        begin, end = self.frame
        return [begin, *super().expand(count), end]

    def save_image_processor(self, folder):
        super().save_image_processor(folder)
        # Without this file transformers and vLLM count 256 tokens a tile, whatever the config says.
        tokens = self.tokens_per_picture((1, self.patches, self.patches))
        processor = {"processor_class": "InternVLProcessor", "image_seq_length": tokens}
        (Path(folder) / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")

    def forbidden(self, tokenizer):
        # The config names no video token, but transformers' processor and vLLM look for "<video>" in the text.
        video = tokenizer.convert_tokens_to_ids("<video>")
        known = video is not None and video != tokenizer.unk_token_id
        # Some files name tokens that their model has no embedding for.
        known = known and video < self.config.get_text_config().vocab_size
        return super().forbidden(tokenizer) + ([video] if known else [])

    def vision(self, hf):
        return [hf.model.vision_tower, hf.model.multi_modal_projector]

    def use_kernels(self, hf, windows):
        # Tiles are alike, so transformers' own attention in the tower is one dense call without a mask already.
        super().use_kernels(hf, windows)
        # Up to max_position_embeddings "dynamic" is the same table, but it looks at the positions in every call, and on
        # a GPU that look waits for them.
        rotary = hf.model.language_model.rotary_emb
        if rotary.rope_type == "dynamic":
            rotary.rope_type = "default"

    def blank_picture(self, device):
        # One image token: the tower interpolates its position embeddings to any size.
        side = self.merge * self.patch
        pixels = torch.zeros(1, self.config.vision_config.num_channels, side, side, device=device)
        return pixels, torch.tensor([[1, self.merge, self.merge]], device=device)

    def picture_features(self, hf, pixels, grids):
        yield hf.model.get_image_features(pixels, return_dict=True).pooler_output

    def vision_flops(self, hf, grid):
        t, h, w = grid
        tower, vision = hf.model.vision_tower, self.config.vision_config
        tokens = h * w + 1  # every tile has a class token
        linear = matrix_weights(tower.encoder.layer) * tokens
        linear += matrix_weights(tower.embeddings.patch_embeddings) * h * w
        linear += matrix_weights(hf.model.multi_modal_projector) * h * w / self.merge**2
        pairs = len(tower.encoder.layer) * tokens**2
        return t * (2 * linear + 4 * vision.hidden_size * pairs)

    def vllm_settings(self):
        return {"mm_processor_kwargs": self.tiling}

    def prepare_vllm(self):
        # Tiles and small copy are both made from the picture as it is, so vLLM has to resize by itself. Its processor
        # rounds otherwise than ours, by one or two grey levels, and in fp32 the parity checks notice (0.006 nats).
        # It gets ours instead.
        from vllm.model_executor.models.interns1 import InternS1ProcessingInfo as Info

        original = Info.get_hf_processor

        def with_our_pixels(info, **settings):
            processor = original(info, **settings)
            processor.image_processor = self.processor
            return processor

        Info.get_hf_processor = with_our_pixels


# ---------------------------------------------------------------------------------------------------------------------
# By model_type

FAMILIES = {
    "qwen2_vl": QwenVL,
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": QwenVL,
    "internvl": InternVL,
}
# What a reader may expect to work, and why it does not.
REFUSED = {
    "qwen3_vl_moe": "the mixtures of experts of Qwen3-VL are not supported, only its dense models: decoding and FLOPs "
    "here know dense blocks",
    "internvl_chat": "this checkpoint needs code from the hub; take the one whose name ends in -hf",
}


def family_of(model_type: str) -> type[Family]:
    """The class of a model_type. DataError, with the reason if there is a known one."""
    known = isinstance(model_type, str)
    if known and model_type in FAMILIES:
        return FAMILIES[model_type]
    if known and model_type in REFUSED:
        raise DataError(f"model_type {model_type}: {REFUSED[model_type]}")
    raise DataError(f"model_type {model_type} is not supported ({', '.join(FAMILIES)})")
