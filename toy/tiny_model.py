"""A tiny model directory from nothing: random weights, real architecture, a tokenizer, image settings. Takes seconds.

    python toy/tiny_model.py runs/random [--family qwen3_vl]

The classes are the real ones of transformers, so whatever runs on it runs on the published checkpoints. FAMILIES says
what a small config of each architecture is; a new architecture is one function and one entry there.

The tokenizer is a byte-level BPE that learns its merges from the prompts of jigsaw.py and the replies of toy/primer.py:
their words are single tokens, and any other text still encodes, byte by byte.
"""

import random
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

if __name__ == "__main__":  # Python looks for modules beside a script: jigsaw.py and toy/ lie one folder up
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jigsaw
from toy.primer import primer_items
from toy.scenes import scene

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOKENS = 1024  # at most; fewer if the corpus has no more pairs to merge


def tiny_corpus(seed: int) -> list[str]:
    """Prompts and replies of puzzles of a few sizes: the words a small tokenizer should know whole."""
    rng = random.Random(seed)
    texts = []
    picture = scene(rng)
    for rows, cols in ((2, 1), (1, 2), (3, 1), (4, 1), (2, 2), (3, 3)):
        for form in jigsaw.REPLY_FORMAT_SENTENCE:
            for question in jigsaw.QUESTIONS:
                puzzle, record = jigsaw.make_puzzle(picture, rows, cols, question, rng, reply_format=form)
                texts.append(record["prompt"])
        mixed = jigsaw.Mixed(puzzle, rows, cols, record["order"])
        for item in primer_items(mixed, 100, rng):
            texts += [item["prompt"], item["chosen"]]
    return texts


def make_tokenizer(seed: int) -> Any:
    from transformers import Qwen2Tokenizer

    untrained = Qwen2Tokenizer(eos_token="<|im_end|>", additional_special_tokens=SPECIAL)
    tokenizer = untrained.train_new_from_iterator(tiny_corpus(seed), TOKENS, show_progress=False)
    tokenizer.chat_template = CHAT
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# Architectures


class Sizes(NamedTuple):
    """What every architecture has. Both towers have the same hidden size and number of heads."""

    hidden: int
    heads: int
    layers: int
    vision_layers: int
    vocab: int  # rows of the embedding
    ids: dict[str, int]  # special token -> its id


class Parts(NamedTuple):
    """What an architecture makes of them, for `AutoConfig` and `save_pretrained`."""

    text: dict
    vision: dict
    further: dict  # of the whole config: ids of special tokens …
    image_processor: Any


def qwen_text(sizes: Sizes, *, head_dim: bool, interleaved: bool) -> dict:
    """head_dim: whether this text config has the field. interleaved: how M-RoPE lays out its three parts."""
    size = sizes.hidden // sizes.heads
    # Small heads have few frequencies. Base 100 and a small temporal part leave height and width some that turn visibly
    # from one image token to the next; with the usual 10,000 the model never learns where a piece lies.
    side = 7 * size // 32  # frequencies for height, and as many for width
    rope = {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": [size // 2 - 2 * side, side, side],
    }
    if interleaved:
        rope["mrope_interleaved"] = True
    text = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "rope_parameters": rope,
        "bos_token_id": None,
        "eos_token_id": sizes.ids["<|im_end|>"],
        "pad_token_id": sizes.ids["<|endoftext|>"],
    }
    if head_dim:
        text["head_dim"] = size
    return text


def qwen_vision(sizes: Sizes, **further) -> dict:
    return {"depth": sizes.vision_layers, "num_heads": sizes.heads, "initializer_range": 0.1, **further}


def qwen_further(sizes: Sizes) -> dict:
    return {
        "tie_word_embeddings": True,
        "image_token_id": sizes.ids["<|image_pad|>"],
        "video_token_id": sizes.ids["<|video_pad|>"],
        "vision_start_token_id": sizes.ids["<|vision_start|>"],
        "vision_end_token_id": sizes.ids["<|vision_end|>"],
    }


def qwen_image_processor(patch: int) -> Any:
    """patch: side in pixels. 2 x 2 patches become one token; a picture has 1 to 1,280 of them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        min_pixels=(2 * patch) ** 2,
        max_pixels=1280 * (2 * patch) ** 2,
    )


def qwen2_vl(sizes: Sizes) -> Parts:
    text = qwen_text(sizes, head_dim=False, interleaved=False)
    vision = qwen_vision(sizes, embed_dim=sizes.hidden, hidden_size=sizes.hidden, mlp_ratio=2)
    return Parts(text, vision, qwen_further(sizes), qwen_image_processor(patch=14))


def qwen2_5_vl(sizes: Sizes) -> Parts:
    text = qwen_text(sizes, head_dim=False, interleaved=False)
    vision = qwen_vision(
        sizes,
        hidden_size=sizes.hidden,
        out_hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        fullatt_block_indexes=[sizes.vision_layers - 1],
    )
    return Parts(text, vision, qwen_further(sizes), qwen_image_processor(patch=14))


def qwen3_vl(sizes: Sizes) -> Parts:
    text = qwen_text(sizes, head_dim=True, interleaved=True)
    vision = qwen_vision(
        sizes,
        hidden_size=sizes.hidden,
        out_hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        deepstack_visual_indexes=[0, 1],
        num_position_embeddings=64,
    )
    return Parts(text, vision, qwen_further(sizes), qwen_image_processor(patch=16))


# transformers' model_type -> its small config
FAMILIES: dict[str, Callable[[Sizes], Parts]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
}

# ---------------------------------------------------------------------------------------------------------------------
# The model directory


def make_tiny(
    folder: str | Path,
    family: str = "qwen2_5_vl",
    *,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 2,
    vision_layers: int = 0,
    vocab: int = 0,
    seed: int = 0,
) -> None:
    """Write a random small model, its tokenizer and its image settings to `folder`. Same seed, same bytes.

    family           a name in FAMILIES.
    hidden, heads    of both towers; a head has hidden / heads channels (32: vLLM's smallest).
    layers           decoder blocks.
    vision_layers    vision blocks; 0: half as many as layers, but 2 at least.
    vocab            rows of the embedding; 0: as many as the tokenizer has.
    """
    # Imported here: transformers takes seconds, and --help should not.
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    tokenizer = make_tokenizer(seed)
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    sizes = Sizes(hidden, heads, layers, vision_layers or max(2, layers // 2), vocab or len(tokenizer), ids)
    text, vision, further, image_processor = FAMILIES[family](sizes)
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision, **further)

    # The caller's random state stays what it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )

    for part in (model, tokenizer, image_processor):
        part.save_pretrained(folder)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The arguments of `make_tiny`, under the same names."""
    parser = jigsaw.Parser(__doc__)
    positive, natural = jigsaw.integer("[1, inf)"), jigsaw.integer("[0, inf)")
    add = parser.add_argument
    add("folder", metavar="DIR", help="gets the model directory")
    add("--family", default="qwen2_5_vl", choices=list(FAMILIES), help="architecture (default %(default)s)")
    add(
        "--hidden",
        type=positive,
        default=64,
        help="hidden size of both towers, a multiple of 16 x --heads (default %(default)s)",
    )
    add("--layers", type=positive, default=4, help="decoder blocks (default %(default)s)")
    add("--vision-layers", type=natural, default=0, help="vision blocks (default 0: half as many as --layers)")
    add(
        "--heads",
        type=positive,
        default=2,
        help="attention heads; vLLM wants hidden/heads of 32 or 64 (default %(default)s)",
    )
    add("--vocab", type=natural, default=0, help="rows of the embedding (default 0: as many as the tokenizer has)")
    add("--seed", type=natural, default=0, help="seed of the random weights (default %(default)s)")
    args = parser.parse_args(argv)
    if args.hidden % (args.heads * 16):
        parser.error("--hidden must be a multiple of 16 x --heads")
    if Path(args.folder).is_file():
        parser.error(f"{args.folder} is a file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    make_tiny(**vars(args))
    print(f"{args.folder}: a tiny {args.family}, random weights")


if __name__ == "__main__":
    main()
