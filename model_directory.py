"""Model directories: what must be true of their files before transformers, safetensors or vLLM get to see them.

    finding     a directory, or a hub id that is downloaded first; a run that has not ended is no model
    settings    config.json and the other JSON files: of the kind, the size and the range that they need
    tensors     the headers of the safetensors files: what they say is what they hold, and we can compute with it

transformers believes its files: a missing field becomes a default, scales of quantised weights are dropped, and an
unknown model type asks on the terminal whether to run code. Here a directory is refused in one line that names the
file, or it computes what its makers meant. model.check_folder asks all of this; nothing here reads a weight.
"""

import json
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from files import DataError, read_json_object, read_text

TEMPLATE_BYTES = 2**20  # of a chat template; they have 1 to 20 kB
HEADER_BYTES = 100 * 2**20  # of a safetensors file; the format's own bound

# ---------------------------------------------------------------------------------------------------------------------
# Finding


def find(path: str, flag: str = "--model") -> str:
    """The directory of a model, downloaded first if `path` is a hub id (owner/name). DataError when it is neither."""
    if Path(path).is_dir():
        return str(path)
    if Path(path).exists():
        raise DataError(f"{flag} {path}: a model is a directory, this is a file")
    if str(path).count("/") != 1 or str(path).startswith(("/", "./", "../")):
        raise DataError(f"{flag} {path}: no such directory (nor a hub id, which reads owner/name)")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
    except (OSError, ValueError) as error:
        cause = " ".join(str(error).split())
        raise DataError(f"{flag} {path}: no such directory, and no such model on the hub ({cause})") from error


def check_finished(folder: str | Path) -> None:
    """Raise DataError for a run directory whose run has not ended: its model is missing, or that of an earlier run."""
    folder = Path(folder)
    traces = [name for name in ("LATEST", "args.json", "log.jsonl", "checkpoints") if (folder / name).exists()]
    if not traces:
        return
    done, planned = steps_of(folder)
    complete = (folder / "config.json").exists() and any(folder.glob("*.safetensors"))
    if complete and (done is None or planned is None or done >= planned):
        return
    where = "before its first checkpoint" if done is None else f"at step {done}"
    of = f" of {planned}" if planned else ""
    raise DataError(f"{folder}: a run that stopped {where}{of}, so there is no finished model in it; --resume that run")


def steps_of(folder: Path) -> tuple[int | None, int | None]:
    """(steps that a run has finished, steps it was asked for) by its LATEST and args.json; None where they are mute."""
    done = planned = None
    if (folder / "LATEST").is_file():
        number = (folder / "LATEST").read_bytes()[:100].decode(errors="replace").strip().removeprefix("step_")
        done = int(number) if number.isdecimal() else None
    with suppress(DataError):  # a run's files are no part of its model
        asked = read_json_object(folder / "args.json").get("steps")
        planned = asked if is_integer(asked) and asked > 0 else None  # 0: as many as one pass over the data takes
    return done, planned


# ---------------------------------------------------------------------------------------------------------------------
# Values of JSON files


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))


def shown(value: Any) -> str:
    """A value of a file, short enough for one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------------------------------------------------------
# Settings: config.json

# Whole numbers of config.json and its parts, and the range in which a model could exist. Outside of it transformers
# would divide by zero, or build for hours.
RANGES = {
    **dict.fromkeys(["hidden_size", "intermediate_size", "out_hidden_size", "embed_dim", "head_dim"], (1, 2**20)),
    **dict.fromkeys(["num_attention_heads", "num_key_value_heads", "num_heads"], (1, 2**12)),
    **dict.fromkeys(["num_hidden_layers", "depth"], (1, 2**10)),
    **dict.fromkeys(["patch_size", "image_size", "temporal_patch_size", "window_size"], (1, 2**14)),
    **dict.fromkeys(["spatial_merge_size", "in_channels", "in_chans", "num_channels"], (1, 2**10)),
    **dict.fromkeys(["num_position_embeddings", "image_seq_length"], (1, 2**24)),
    **dict.fromkeys(["max_position_embeddings", "vocab_size"], (1, 2**28)),
}
# Fields whose default belongs to some other size of the same family, so that a config without them would load and
# compute something else. Every published checkpoint has them.
NEEDED = {
    "qwen2_vl": {"text": ["num_attention_heads"], "vision": ["num_heads", "spatial_merge_size"]},
    "qwen2_5_vl": {
        "text": ["num_attention_heads"],
        "vision": ["num_heads", "spatial_merge_size", "window_size", "fullatt_block_indexes"],
    },
    "qwen3_vl": {
        "text": ["num_attention_heads"],
        "vision": ["num_heads", "spatial_merge_size", "deepstack_visual_indexes"],
    },
    "internvl": {"text": ["num_attention_heads"], "vision": ["num_attention_heads"]},
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json")
TOKENIZER_FILES += ("special_tokens_map.json",)
TOKEN_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "eos_token_id")
QUANTISED = (
    "quantised weights are not supported: their scales would be ignored; take the checkpoint in bf16, or convert it "
    "(dequantize) first"
)


def read_settings(folder: str | Path) -> dict:
    """Check every JSON file of a model directory: -> its config.json. DataError."""
    folder = Path(folder)
    # Before a library opens one of them: a FIFO would wait for a writer.
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".jinja", ".txt", ".model", ".safetensors") and not path.is_file():
            raise DataError(f"{path}: is {'no regular file' if path.exists() else 'a link to nothing'}")
    config = read_config(folder / "config.json")
    for name in TOKENIZER_FILES:
        if exists(folder / name):
            check_no_code(read_json_object(folder / name), folder / name)
    if not exists(folder / "tokenizer.json") and not exists(folder / "vocab.json"):
        raise DataError(f"{folder}: its tokenizer files are missing (tokenizer.json, or vocab.json and merges.txt)")
    if exists(folder / "tokenizer.json"):
        check_vocabulary(folder / "tokenizer.json")
    # Without them transformers takes another class, and another end token.
    settings = read_json_object(folder / "tokenizer_config.json")
    for key in ("eos_token", "tokenizer_class"):
        if settings.get(key) is None:
            raise DataError(f"{folder / 'tokenizer_config.json'}: the field {key} is missing")
    if exists(folder / "generation_config.json"):
        end_tokens(folder)
    return config


def check_vocabulary(path: Path) -> None:
    """Raise DataError unless tokenizer.json holds a vocabulary and its merges: without these, words become letters."""
    vocabulary = read_json_object(path).get("model")
    for key in ("vocab", "merges"):
        if not isinstance(vocabulary, dict) or not isinstance(vocabulary.get(key), list | dict) or not vocabulary[key]:
            raise DataError(f"{path}: its model has no {key}; only byte-pair encoding is known here")


def exists(path: Path) -> bool:
    """Whether there is anything under this name, be it a dangling link."""
    return path.exists() or path.is_symlink()


def read_config(path: Path) -> dict:
    """config.json of a model that exists: of a sound size, with all that matters written down, not quantised."""
    config = read_json_object(path)
    check_no_code(config, path)
    parts = parts_of(config, path)
    for name, part in parts.items():
        for key in ("quantization_config", "compression_config"):
            if part.get(key) is not None:
                raise DataError(f"{path}: {name}{key}: {QUANTISED}")
    for name, part in parts.items():
        check_numbers(part, f"{path}: {name}")
    check_heads(config, path)
    check_rope(config, path)
    return config


def check_no_code(settings: dict, path: Path) -> None:
    if settings.get("auto_map") is not None:
        raise DataError(f"{path}: auto_map: this checkpoint brings code of its own, which is never run here")


def parts_of(config: dict, path: Path) -> dict[str, dict]:
    """{how to name it in a message: the config itself, or one of its parts}."""
    parts = {"": config}
    for name in ("text_config", "vision_config"):
        if name in config:
            if not isinstance(config[name], dict):
                raise DataError(f"{path}: {name} must be an object, it is {shown(config[name])}")
            parts[f"{name}."] = config[name]
            kind = config[name].get("model_type", "")
            if not isinstance(kind, str):
                raise DataError(f"{path}: {name}.model_type must be text, it is {shown(kind)}")
    if "vision_config." not in parts:
        raise DataError(f"{path}: the field vision_config is missing")
    return parts


def check_numbers(part: dict, where: str) -> None:
    """Raise DataError for numbers that no model can have."""
    for key, value in part.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{where}{key} must be a finite number, it is {shown(value)}")
        if key not in RANGES or value is None:
            continue
        low, high = RANGES[key]
        # InternVL writes sides as [height, width].
        for item in value if isinstance(value, list) and key in ("patch_size", "image_size") else [value]:
            if not is_integer(item) or not low <= item <= high:
                raise DataError(f"{where}{key} must be a whole number from {low} to {high}, it is {shown(value)}")


def text_of(config: dict) -> dict:
    """The decoder's part of a config; the first Qwen2-VL files have its fields among all others."""
    return config.get("text_config", config)


def check_heads(config: dict, path: Path) -> None:
    """Raise DataError for a missing field that NEEDED names, or heads that do not divide a width."""
    parts = {"text": text_of(config), "vision": config["vision_config"]}
    for name, fields in NEEDED.get(config.get("model_type"), {}).items():
        for key in fields:
            if parts[name].get(key) is None:
                raise DataError(f"{path}: the field {key} of its {name} part is missing; a default would be a guess")

    text, vision = parts["text"], parts["vision"]
    heads = text.get("num_attention_heads")
    if heads and text.get("head_dim") is None:
        check_divides(heads, text.get("hidden_size"), f"{path}: num_attention_heads", "hidden_size")
    if heads:
        check_divides(text.get("num_key_value_heads"), heads, f"{path}: num_key_value_heads", "num_attention_heads")
    width = vision.get("embed_dim", vision.get("hidden_size"))
    heads = vision.get("num_heads", vision.get("num_attention_heads"))
    check_divides(heads, width, f"{path}: heads of the vision tower, ", "its width")


def check_divides(part, whole, where, whole_name) -> None:
    if part and whole and whole % part:
        raise DataError(f"{where} {part} does not divide {whole_name} {whole}")


def check_rope(config: dict, path: Path) -> None:
    """Raise DataError when the rotary base is not written down (its default is that of another model)."""
    text = text_of(config)
    ropes = [text.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
    if not all(isinstance(rope, dict) for rope in ropes):
        raise DataError(f"{path}: rope_parameters must be an object, it is {shown(text.get('rope_parameters'))}")
    base = next((found for found in (text, *ropes) if "rope_theta" in found), {}).get("rope_theta")
    if not is_number(base) or base <= 0:
        raise DataError(f"{path}: rope_theta of its text part must be a positive number, it is {shown(base)}")
    tower = config["vision_config"].get("rope_parameters") or {}
    if not isinstance(tower, dict) or not is_number(tower.get("rope_theta", 1)) or tower.get("rope_theta", 1) <= 0:
        raise DataError(f"{path}: rope_theta of its vision part must be a positive number, it is {shown(tower)}")
    if str(config.get("model_type")).startswith("qwen"):
        section = next((rope["mrope_section"] for rope in ropes if "mrope_section" in rope), None)
        whole = isinstance(section, list) and len(section) == 3 and all(is_integer(size) for size in section)
        if not whole or min(section) < 0:
            raise DataError(f"{path}: mrope_section must be three whole numbers, it is {shown(section)}")
        check_sections(section, text, path)


def check_sections(section, text, path) -> None:
    """M-RoPE gives each frequency of a head to time, height or width: together they are half a head."""
    size = text.get("head_dim")
    if size is None and is_integer(text.get("hidden_size")):
        size = text["hidden_size"] // text["num_attention_heads"]
    if size is not None and 2 * sum(section) != size:
        raise DataError(f"{path}: mrope_section {section} has {sum(section)} frequencies, a head has {size // 2}")


def template_beside(folder: str | Path) -> str | None:
    """The chat template that a repository keeps in a file of its own, or None. DataError."""
    folder = Path(folder)
    if exists(folder / "chat_template.jinja"):
        return read_text(folder / "chat_template.jinja", TEMPLATE_BYTES)
    path = folder / "chat_template.json"
    if exists(path):
        template = read_json_object(path).get("chat_template")
        if not isinstance(template, str):
            raise DataError(f"{path}: the field chat_template must be text, it is {shown(template)}")
        return template
    return None


def end_tokens(folder: str | Path) -> list[int]:
    """The end tokens that generation_config.json lists, [] if there is no such file. DataError."""
    path = Path(folder) / "generation_config.json"
    if not exists(path):
        return []
    listed = read_json_object(path).get("eos_token_id")
    tokens = [] if listed is None else listed if isinstance(listed, list) else [listed]
    if not all(is_integer(token) and token >= 0 for token in tokens):
        raise DataError(f"{path}: eos_token_id must be a token id or a list of them, it is {shown(listed)}")
    return tokens


# ---------------------------------------------------------------------------------------------------------------------
# Tensors: the headers of the safetensors files

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number
# What quantised checkpoints keep beside their weights: FP8, compressed-tensors, GPTQ, AWQ, bitsandbytes.
SCALES = ("weight_scale", "weight_scale_inv", "input_scale", "scales", "qweight", "qzeros", "g_idx", "weight_packed")
SCALES += ("weight_shape", "weight_zero_point", "SCB", "weight_format", "absmax", "quant_map", "nested_absmax")
# Tables that old transformers saved with the weights and everybody computes anew.
TABLES = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "embeddings.position_ids")


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def read_headers(folder: str | Path) -> dict[str, Stored]:
    """{name: Stored} of all safetensors files in a directory. DataError if they are no whole, plain model."""
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = next(iter(sorted([*folder.glob("*.bin"), *folder.glob("*.pt*"), *folder.glob("*.gguf")])), None)
        hint = f" ({other.name} is there, but only safetensors are read: convert it)" if other else ""
        raise DataError(f"{folder}: no *.safetensors file{hint}")
    if exists(folder / "adapter_config.json"):
        raise DataError(f"{folder / 'adapter_config.json'}: this is an adapter (LoRA); merge it into its model first")

    stored = {}
    for file in files:
        for name, tensor in header_of(file):
            if name in stored:
                raise DataError(f"{file}: holds {name}, and so does {stored[name].file}; remove what is left over")
            stored[name] = tensor
    check_index(folder, stored)
    for name, tensor in stored.items():
        check_tensor(name, tensor, folder)
    return {name: tensor for name, tensor in stored.items() if not name.endswith(TABLES)}


def header_of(path: Path) -> Iterator[tuple[str, Stored]]:
    """(name, Stored) of each tensor of one file. The format: 8 bytes of header length, the header, the numbers."""
    size, header = read_header(path)
    end = 0
    entries = [(name, entry) for name, entry in header.items() if name != "__metadata__"]
    for name, entry in sorted(entries, key=lambda item: begin_of(item[1])):
        try:
            dtype, shape, (begin, after) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
            sound = isinstance(dtype, str) and all(is_integer(side) and side >= 0 for side in shape)
            sound = sound and begin == end and begin <= after <= size
            if dtype in FLOATS:
                sound = sound and after - begin == FLOATS[dtype] * math.prod(shape)
        except (KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            raise DataError(f"{path}: truncated or damaged: its header gives {name} as {shown(entry)}")
        end = after
        yield name, Stored(dtype, shape, path.name)
    if end != size:
        raise DataError(f"{path}: truncated or damaged: {size} bytes of numbers, its header speaks of {end}")


def read_header(path: Path) -> tuple[int, dict]:
    """(bytes of numbers that follow, the header) of a safetensors file. DataError."""
    if not path.is_file():
        raise DataError(f"{path}: {'is missing' if not path.exists() else 'is no regular file'}")
    try:
        with open(path, "rb") as file:
            whole = path.stat().st_size
            length = int.from_bytes(file.read(8), "little")
            if whole < 8 or length > min(HEADER_BYTES, whole - 8):
                raise DataError(f"{path}: truncated, or no safetensors file ({whole} bytes)")
            text = file.read(length)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise DataError(f"{path}: its header is no table of tensors")
    return whole - 8 - length, header


def begin_of(entry) -> int:
    """Where an entry's numbers begin; 0 if it does not say (it is refused right after)."""
    offsets = entry.get("data_offsets")
    sound = isinstance(offsets, list) and len(offsets) == 2 and all(is_integer(offset) for offset in offsets)
    return offsets[0] if sound else 0


def check_index(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise DataError unless model.safetensors.index.json, if there is one, says what the files hold."""
    path = folder / "model.safetensors.index.json"
    if not exists(path):
        return
    table = read_json_object(path).get("weight_map")
    if not isinstance(table, dict):
        raise DataError(f"{path}: the field weight_map must be an object, it is {shown(table)}")
    for name, file in table.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise DataError(f"{path}: {name} lies in {shown(file)}, which is no safetensors file of this directory")
        if not exists(folder / file):
            raise DataError(f"{path}: {name} lies in {file}, which is missing")
        if name not in stored or stored[name].file != file:
            raise DataError(f"{path}: {name} lies in {file}, but that file does not hold it")


def check_tensor(name: str, tensor: Stored, folder: Path) -> None:
    """Raise DataError for what is stored in other numbers than floats, or stands beside such weights."""
    path = folder / tensor.file
    if name.endswith(SCALES) or "quant_state" in name:
        raise DataError(f"{path}: holds {name}: {QUANTISED}")
    if tensor.dtype not in FLOATS and not name.endswith(TABLES):
        raise DataError(f"{path}: {name} is stored as {tensor.dtype}: {QUANTISED}")
