"""A tiny model directory from nothing: random weights, real architecture, a tokenizer, image settings. Takes seconds.

    python toy/tiny_model.py runs/random [--family qwen3_vl]

The classes are the real ones of transformers, so whatever runs on it runs on the published checkpoints. FAMILIES says
what a small config of each architecture is; a new architecture is one function and one entry there.

The tokenizer is a byte-level BPE that learns its merges from the prompts of jigsaw.py and the replies of toy/primer.py,
or from toy/formats.py: their words are single tokens, and any other text still encodes, byte by byte.
"""

import json
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
from toy import formats
from toy.primer import primer_items
from toy.scenes import scene

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # of every architecture; each adds its own for pictures
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'image' %}PICTURE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Prompts the tokenizer is trained on. Fixed: a new question must not change every tiny model.
CORPUS_QUESTIONS = ("pair", "full")
TOKENS = 1024  # at most; fewer if the corpus has no more pairs to merge


class Marks(NamedTuple):
    """How an architecture writes pictures in text."""

    special: list[str]  # its special tokens, after SPECIAL
    picture: str  # one picture in the chat template
    named: dict[str, str] = {}  # attributes of the tokenizer that transformers' processor and vLLM look for


QWEN_MARKS = Marks(
    special=["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"],
    picture="<|vision_start|><|image_pad|><|vision_end|>",
)
INTERNVL_MARKS = Marks(
    special=["<img>", "</img>", "<IMG_CONTEXT>", "<video>"],
    picture="<IMG_CONTEXT>\n",
    named={
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
)


def tiny_corpus(seed: int) -> list[str]:
    """Prompts and replies of puzzles of a few sizes: the words a small tokenizer should know whole."""
    rng = random.Random(seed)
    texts = []
    picture = scene(rng)
    for rows, cols in ((2, 1), (1, 2), (3, 1), (4, 1), (2, 2), (3, 3)):
        for form in jigsaw.REPLY_FORMAT_SENTENCE:
            for question in CORPUS_QUESTIONS:
                puzzle, record = jigsaw.make_puzzle(picture, rows, cols, question, rng, reply_format=form)
                texts.append(record["prompt"])
        mixed = jigsaw.Mixed(puzzle, rows, cols, record["order"])
        for item in primer_items(mixed, 100, rng):
            texts += [item["prompt"], item["chosen"]]
    return texts


# What the tokenizer of a tiny model learns, by the name of --corpus.
CORPORA: dict[str, Callable[[int], list[str]]] = {"primer": tiny_corpus, "formats": lambda seed: formats.corpus()}


def make_tokenizer(marks: Marks, corpus: str, seed: int) -> Any:
    from transformers import Qwen2Tokenizer

    untrained = Qwen2Tokenizer(eos_token="<|im_end|>", additional_special_tokens=SPECIAL + marks.special)
    tokenizer = untrained.train_new_from_iterator(CORPORA[corpus](seed), TOKENS, show_progress=False)
    tokenizer.chat_template = CHAT.replace("PICTURE", marks.picture)
    if marks.named:
        # Training a tokenizer forgets these; transformers has no public way to set them afterwards.
        tokenizer._set_model_specific_special_tokens(special_tokens=marks.named)
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
    decoder: str = ""  # model_type of the decoder where an architecture leaves the choice; "": its usual one


class Parts(NamedTuple):
    """What an architecture makes of them, for `AutoConfig` and `save_pretrained`."""

    text: dict
    vision: dict
    further: dict  # of the whole config: ids of special tokens …
    image_processor: Any
    processor: dict = {}  # processor_config.json; {}: none is needed


def text_config(sizes: Sizes, *, head_dim: bool, rope: dict) -> dict:
    """A decoder of the Qwen kind. head_dim: whether this config has the field. rope: what is not plain RoPE."""
    text = {
        "vocab_size": sizes.vocab,
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        # Small heads have few frequencies. With the usual base of 10,000 most of them hardly turn from one image token
        # to the next, and the model never learns where a piece lies.
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, **rope},
        "bos_token_id": None,
        "eos_token_id": sizes.ids["<|im_end|>"],
        "pad_token_id": sizes.ids["<|endoftext|>"],
    }
    if head_dim:
        text["head_dim"] = sizes.hidden // sizes.heads
    return text


def qwen_text(sizes: Sizes, *, head_dim: bool, interleaved: bool) -> dict:
    """head_dim: as above. interleaved: how M-RoPE lays out its three parts."""
    size = sizes.hidden // sizes.heads
    # A small temporal part leaves height and width some frequencies that turn visibly.
    side = 7 * size // 32  # frequencies for height, and as many for width
    rope = {"mrope_section": [size // 2 - 2 * side, side, side]}
    if interleaved:
        rope["mrope_interleaved"] = True
    return text_config(sizes, head_dim=head_dim, rope=rope)


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


def internvl(sizes: Sizes) -> Parts:
    """Tiles of 56 x 56 pixels: 4 x 4 patches, which become 2 x 2 tokens."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    side, patch, merge = 56, 14, 2
    tokens = (side // patch // merge) ** 2  # of a tile
    decoder = sizes.decoder or "qwen2"
    text = text_config(sizes, head_dim=decoder == "qwen3", rope={})
    text["model_type"] = decoder
    vision = {
        "hidden_size": sizes.hidden,
        "intermediate_size": 2 * sizes.hidden,
        "num_hidden_layers": sizes.vision_layers,
        "num_attention_heads": sizes.heads,
        "image_size": side,
        "patch_size": patch,
        "initializer_range": 0.1,
        # A bias of the keys moves all scores of a query alike, so its gradient is nothing but rounding.
        "attention_bias": False,
        # The usual 0.1 is for deep towers; here it would silence both blocks.
        "layer_scale_init_value": 1.0,
    }
    further = {
        "tie_word_embeddings": True,
        "image_token_id": sizes.ids["<IMG_CONTEXT>"],
        "image_seq_length": tokens,
        "downsample_ratio": 1 / merge,
    }
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        crop_to_patches=True,
        min_patches=1,
        max_patches=12,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    processor = {"processor_class": "InternVLProcessor", "image_seq_length": tokens}
    return Parts(text, vision, further, image_processor, processor)


def fill_zero_embeddings(model: Any) -> None:
    """Noise for embeddings that transformers leaves at zero: with those, no patch would know where it lies."""
    for name, weight in model.named_parameters():
        if name.endswith(("embeddings.cls_token", "embeddings.position_embeddings")):
            torch.nn.init.normal_(weight, std=0.1)


# transformers' model_type -> (how it writes pictures, its small config)
FAMILIES: dict[str, tuple[Marks, Callable[[Sizes], Parts]]] = {
    "qwen2_vl": (QWEN_MARKS, qwen2_vl),
    "qwen2_5_vl": (QWEN_MARKS, qwen2_5_vl),
    "qwen3_vl": (QWEN_MARKS, qwen3_vl),
    "internvl": (INTERNVL_MARKS, internvl),
}
DECODERS = {"internvl": ("qwen2", "qwen3")}  # where an architecture leaves the choice

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
    decoder: str = "",
    corpus: str = "primer",
    seed: int = 0,
) -> None:
    """Write a random small model, its tokenizer and its image settings to `folder`. Same seed, same bytes.

    family           a name in FAMILIES.
    hidden, heads    of both towers; a head has hidden / heads channels (32: vLLM's smallest).
    layers           decoder blocks.
    vision_layers    vision blocks; 0: half as many as layers, but 2 at least.
    vocab            rows of the embedding; 0: as many as the tokenizer has.
    decoder          of InternVL: qwen2 (as in InternVL3) or qwen3 (as in InternVL3.5); "": qwen2.
    corpus           a name in CORPORA: the texts whose words the tokenizer has whole.
    """
    # Imported here: transformers takes seconds, and --help should not.
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    if family not in FAMILIES:
        raise ValueError(f"family {family!r} is not one of {', '.join(FAMILIES)}")
    if decoder and decoder not in DECODERS.get(family, ()):
        raise ValueError(f"family {family!r} has no decoder {decoder!r} to choose")
    marks, parts_of = FAMILIES[family]
    tokenizer = make_tokenizer(marks, corpus, seed)
    special = SPECIAL + marks.special
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    blocks = vision_layers or max(2, layers // 2)
    parts = parts_of(Sizes(hidden, heads, layers, blocks, vocab or len(tokenizer), ids, decoder))
    config = AutoConfig.for_model(family, text_config=parts.text, vision_config=parts.vision, **parts.further)

    # The caller's random state stays what it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        fill_zero_embeddings(model)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )

    for part in (model, tokenizer, parts.image_processor):
        part.save_pretrained(folder)
    if parts.processor:
        text = json.dumps(parts.processor, indent=2) + "\n"
        (Path(folder) / "processor_config.json").write_text(text)


def parse_args(argv: list[str] | None = None) -> Namespace:
    """The arguments of `make_tiny`, under the same names."""
    parser = jigsaw.Parser(__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="gets the model directory")
    add("--family", default="qwen2_5_vl", choices=list(FAMILIES), help="architecture (default %(default)s)")
    add(
        "--hidden",
        type=jigsaw.integer("[16, 8192]"),
        default=64,
        help="hidden size of both towers, a multiple of 16 x --heads (default %(default)s)",
    )
    add("--layers", type=jigsaw.integer("[1, 200]"), default=4, help="decoder blocks (default %(default)s)")
    add(
        "--vision-layers",
        type=jigsaw.integer("[0, 200]"),
        default=0,
        help="vision blocks (default 0: half as many as --layers)",
    )
    add(
        "--heads",
        type=jigsaw.integer("[1, 512]"),
        default=2,
        help="attention heads; vLLM wants hidden/heads of 32 or 64 (default %(default)s)",
    )
    add(
        "--vocab",
        type=jigsaw.integer("[0, 1e6]"),
        default=0,
        help="rows of the embedding (default 0: as many as the tokenizer has)",
    )
    choices = sorted(set(sum(DECODERS.values(), ())))
    add("--decoder", default="", choices=["", *choices], help="decoder of --family internvl (default: qwen2)")
    add(
        "--corpus",
        default="primer",
        choices=list(CORPORA),
        help="whose words are single tokens: those of toy/primer.py or of toy/formats.py (default %(default)s)",
    )
    add(
        "--seed",
        type=jigsaw.integer("[0, 4294967295]"),
        default=0,
        help="seed of the random weights (default %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.decoder and args.decoder not in DECODERS.get(args.family, ()):
        parser.error(f"--decoder {args.decoder}: --family {args.family} has no choice of decoders")
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
