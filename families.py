"""Model families: what differs between the architectures we train, one class each. Everything else asks these.

    FAMILIES = {model_type of config.json: class}

A family says how a picture becomes pixels and tokens, what positions a prompt's tokens have, where in the Hugging Face
model its parts are, which arguments carry the pictures, and what its vision tower costs. `docs/change.md` adds one.

Legend: L tokens of a prompt, A position axes (3 for M-RoPE, 1 otherwise). A picture's grid (t, h, w) is t tiles of
h x w patches, where a patch sees the patches of its own tile at most. Pixels are what the vision tower reads, fp32:
Qwen (t·h·w, D) flattened patches, InternVL (t, 3, side, side).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import attention
from records import DataError


class Family:
    """What the rest of the project asks about an architecture; made once per checkpoint.

    config: the Hugging Face config. folder: the checkpoint, for its image processor. max_pixels, min_pixels: bounds of
    a picture's area; None: the checkpoint's own. Raises DataError for bounds that leave no image token.
    """

    position_axes = 1
    # How a picture stands in a prompt if the checkpoint has no chat template; {} is the image token.
    picture_text = "{}"

    # ---- pictures

    def __init__(self, config, folder: str, max_pixels: int | None = None, min_pixels: int | None = None):
        self.config = config

    def grid(self, width: int, height: int) -> tuple[int, int, int]:
        """The grid of a picture of this size, without reading it. ValueError if it cannot be encoded."""
        raise TypeError(f"{type(self).__name__} must say")

    def tokens_per_picture(self, grid: tuple[int, int, int]) -> int:
        """Image tokens that a picture of this grid takes in the prompt."""
        t, h, w = grid
        return t * h * w // self.merge**2

    def resize(self, image: Image.Image) -> Image.Image:
        """The picture as every engine gets it: resized once, here, so that all see the same pixels."""
        return image.convert("RGB")

    def pixels(self, image: Image.Image) -> np.ndarray:
        """A picture that `resize` has made -> what the vision tower reads."""
        raise TypeError(f"{type(self).__name__} must say")

    def expand(self, count: int) -> list[int]:
        """The tokens that stand for one picture of `count` image tokens."""
        return [self.config.image_token_id] * count

    def vllm_settings(self) -> dict:
        """vLLM's mm_processor_kwargs."""
        return {}

    def save_image_processor(self, folder: Path) -> None:
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
        """The language model: embed_tokens, layers, norm, rotary_emb."""
        return hf.model.language_model

    def vision(self, hf: nn.Module) -> list[nn.Module]:
        """What only pictures run through: what --freeze-vision freezes, and FSDP units of their own."""
        raise TypeError(f"{type(self).__name__} must say")

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

    def blank_picture(self, device) -> tuple[Tensor, Tensor]:
        """(pixels, grids) of the smallest black picture the tower takes."""
        raise TypeError(f"{type(self).__name__} must say")

    def picture_features(self, hf: nn.Module, pixels: Tensor, grids: Tensor) -> Iterable[Tensor]:
        """Everything the vision tower hands to the decoder for some pictures."""
        raise TypeError(f"{type(self).__name__} must say")

    def vision_flops(self, hf: nn.Module, grid: tuple[int, int, int]) -> float:
        """FLOPs of the vision tower's forward over one picture: 2 per weight and token, 4 per query, key and width."""
        raise TypeError(f"{type(self).__name__} must say")


def matrix_weights(*modules: nn.Module) -> int:
    """Weights that multiply every token: all but norms and biases."""
    return sum(weight.numel() for module in modules for weight in module.parameters() if weight.ndim > 1)


# ---------------------------------------------------------------------------------------------------------------------
# Qwen2-VL, Qwen2.5-VL, Qwen3-VL


class QwenVL(Family):
    """A picture keeps its shape: its sides become multiples of patch x merge, its area lies between two limits."""

    position_axes = 3  # M-RoPE: time, height, width
    picture_text = "<|vision_start|>{}<|vision_end|>"

    def __init__(self, config, folder, max_pixels=None, min_pixels=None):
        # Not AutoProcessor: it needs torchvision for its video half, which no CPU-only installation has.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self.config = config
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.patch, self.merge = self.processor.patch_size, self.processor.merge_size
        self.factor = self.patch * self.merge  # pixels along the side of an image token
        self.max_pixels = max_pixels or self.processor.size["longest_edge"]
        self.min_pixels = min(min_pixels or self.processor.size["shortest_edge"], self.max_pixels)
        if self.max_pixels < self.factor**2:
            raise DataError(f"--max-pixels {self.max_pixels} is below one image token, {self.factor**2} pixels")

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

    def vllm_settings(self):
        # Every picture arrives in a size that vLLM's own image processor need not change.
        return {"size": {"shortest_edge": self.factor**2, "longest_edge": self.max_pixels}}

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

    max_pixels bounds the area of the tiles (not of the small one); the least is one tile, which then is the picture.
    """

    picture_text = "{}\n"

    def __init__(self, config, folder, max_pixels=None, min_pixels=None):
        from transformers import AutoTokenizer
        from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

        self.config = config
        self.processor = GotOcr2ImageProcessorPil.from_pretrained(folder)
        # Public checkpoints may say False here: transformers' InternVLProcessor turns it on by itself.
        self.processor.crop_to_patches = True
        self.side = self.processor.size["height"]
        if max_pixels is not None and max_pixels < self.side**2:
            raise DataError(f"--max-pixels {max_pixels} is below one tile, {self.side**2} pixels")
        if max_pixels is not None:
            tiles = max_pixels // self.side**2
            self.processor.max_patches = min(self.processor.max_patches, tiles)
            self.processor.min_patches = min(self.processor.min_patches, self.processor.max_patches)
        self.max_pixels = self.processor.max_patches * self.side**2
        self.patches = self.side // config.vision_config.patch_size[0]  # along a tile's side
        self.merge = round(1 / config.downsample_ratio)
        # The chat template writes one image token a picture; its frame comes from the processor.
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.frame = tokenizer.convert_tokens_to_ids(["<img>", "</img>"])

    def grid(self, width, height):
        return self.processor.get_number_of_image_patches(height, width), self.patches, self.patches

    def pixels(self, image):
        settings = {"return_tensors": "np", "input_data_format": "channels_last"}
        return self.processor(images=[image], **settings)["pixel_values"]

    def expand(self, count):
        begin, end = self.frame
        return [begin, *super().expand(count), end]

    def vllm_settings(self):
        names = "crop_to_patches", "min_patches", "max_patches"
        return {name: getattr(self.processor, name) for name in names}

    def forbidden(self, tokenizer):
        # The config names no video token, but transformers' processor and vLLM look for "<video>" in the text.
        video = tokenizer.convert_tokens_to_ids("<video>")
        known = video is not None and video != tokenizer.unk_token_id
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
        side = self.merge * self.config.vision_config.patch_size[0]
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
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in REFUSED:
        raise DataError(f"model_type {model_type}: {REFUSED[model_type]}")
    raise DataError(f"model_type {model_type} is not supported ({', '.join(FAMILIES)})")
