"""Damaged model directories: each is refused in one line that names it, or computes what the sound one computes.

A table of damages is applied to a tiny model's directory, one at a time. What loads must give the same log-probs to the
last bit: transformers fills in defaults for what is missing, and a default is another model.
"""

import json
import os
import random
import shutil
import struct

import pytest
import torch
from conftest import CPU
from safetensors.torch import load_file, save_file

import jigsaw
import model
from records import DataError
from toy.scenes import scene
from toy.tiny_model import make_tiny

FILES = ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"]


class Sound:
    """An undamaged model directory, a question with a picture and one without, and their log-probs."""

    def __init__(self, folder, family):
        self.folder = folder / family
        make_tiny(self.folder, family, layers=2)
        rng = random.Random(1)
        picture, puzzle = jigsaw.make_puzzle(scene(rng, 112), 2, 1, "pair", rng)
        picture.save(folder / "puzzle.png")
        common = {"answer": "B", "answer_type": "letter", "think": False, "source": "words"}
        self.records = [
            {"id": "picture", "images": [str(folder / "puzzle.png")], **common, "prompt": puzzle["prompt"]},
            {"id": "text", "images": [], **common, "prompt": "Which letter is 2 places behind A?\nÄ 中"},
        ]
        self.expected = self.log_probs(self.folder)

    def log_probs(self, folder):
        policy, encoder = model.load(folder, CPU)
        reply = encoder.encode_reply("<think>1 looks dark</think><answer>A</answer>")
        with torch.no_grad():
            return model.log_probs(policy, [(encoder.prompt(record), [reply]) for record in self.records])[0]

    def copy(self, folder):
        """A copy of it in which files may be replaced (not written into: they are links)."""
        shutil.copytree(self.folder, folder, copy_function=os.link)
        return folder

    def verdict(self, damage, folder):
        """What becomes of a copy after damage(copy): None, or what is wrong with that."""
        self.copy(folder)
        damage(folder)
        try:
            found = self.log_probs(folder)
        except DataError as error:
            message = str(error)
            one_line = "\n" not in message and len(message) < 600 + len(str(folder))
            return None if one_line and str(folder) in message else f"a poor message: {message!r}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(folder)
        return None if torch.equal(found, self.expected) else "loads, and computes something else"


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    made = {}

    def of(family):
        if family not in made:
            made[family] = Sound(folder, family)
        return made[family]

    return of


def replace(path, data):
    path.unlink(missing_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


# ---------------------------------------------------------------------------------------------------------------------
# Every JSON file, as a whole


def make_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_dangling(path):
    path.unlink()
    path.symlink_to("nowhere")


def make_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


WHOLE = {
    "deleted": lambda path: path.unlink(),
    "empty": lambda path: replace(path, b""),
    "a list": lambda path: replace(path, "[]"),
    "null": lambda path: replace(path, "null"),
    "text": lambda path: replace(path, '"config"'),
    "an empty object": lambda path: replace(path, "{}"),
    "truncated": lambda path: replace(path, path.read_bytes()[: path.stat().st_size // 2]),
    "not UTF-8": lambda path: replace(path, path.read_bytes().replace(b"a", b"\xff")),
    "UTF-16": lambda path: replace(path, path.read_text().encode("utf-16")),
    "10 MB of nonsense": lambda path: replace(path, b"\x00\x01garbage{" * 2**20),
    "nested 10^5 deep": lambda path: replace(path, "[" * 10**5),
    "HTML": lambda path: replace(path, "<html>404</html>"),
    "a Git LFS pointer": lambda path: replace(path, "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
    "a pipe": make_pipe,
    "a folder": make_folder,
    "a link to nothing": make_dangling,
    "an endless device": make_device,
}


@pytest.mark.parametrize("name", FILES)
def test_a_json_file_that_is_none_is_refused_or_not_needed(sound, tmp_path, name):
    found = {}
    for damage, apply in WHOLE.items():
        found[damage] = sound("qwen2_5_vl").verdict(lambda copy, apply=apply: apply(copy / name), tmp_path / "copy")
    assert {damage: problem for damage, problem in found.items() if problem} == {}


# ---------------------------------------------------------------------------------------------------------------------
# Every field of every JSON file


def fields_of(value, path=()):
    """Paths of all fields of a JSON object, and of the objects inside of it."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict) and len(inner) < 100:  # not each word of a vocabulary
            yield from fields_of(inner, (*path, key))


def changed(settings, path, change):
    """A deep copy of JSON in which change(parent, key) was applied to the field at `path`."""
    settings = json.loads(json.dumps(settings))
    parent = settings
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return settings


def wrong_type(parent, key):
    parent[key] = 7 if isinstance(parent[key], str) else "seven"


def negative(parent, key):
    parent[key] = -30 if isinstance(parent[key], int | float) else {"x": [1]}


CHANGES = {"deleted": dict.pop, "of a wrong type": wrong_type, "negative": negative}


def problems_with_fields(sound, name, folder, changes):
    """{(field, change): problem} over every field of a file, and how many were tried."""
    settings = json.loads((sound.folder / name).read_text())
    found = {}
    for path in fields_of(settings):
        for how in changes:
            text = json.dumps(changed(settings, path, CHANGES[how]))
            damage = lambda copy, text=text: replace(copy / name, text)  # noqa: E731
            found[".".join(path), how] = sound.verdict(damage, folder)
    return {case: problem for case, problem in found.items() if problem}, len(found)


@pytest.mark.parametrize(
    "family, name, least",
    [
        ("qwen2_5_vl", "config.json", 120),
        ("qwen2_5_vl", "generation_config.json", 6),
        ("qwen2_5_vl", "preprocessor_config.json", 30),
        ("qwen2_5_vl", "tokenizer_config.json", 20),
        ("qwen2_5_vl", "tokenizer.json", 20),
        ("qwen3_vl", "config.json", 45),
        ("qwen3_vl", "preprocessor_config.json", 28),
        ("internvl", "config.json", 55),
        ("internvl", "preprocessor_config.json", 28),
        ("internvl", "processor_config.json", 4),
    ],
)
def test_a_field_that_is_missing_or_wrong_is_refused_or_changes_nothing(sound, tmp_path, family, name, least):
    # Each costs a model that is loaded: those of the other families are the ones whose defaults could differ.
    full = family == "qwen2_5_vl" and name != "tokenizer.json"
    changes = CHANGES if full else ("deleted", "of a wrong type") if name != "config.json" else ("deleted",)
    problems, tried = problems_with_fields(sound(family), name, tmp_path / "copy", changes)
    assert problems == {} and tried >= least


# ---------------------------------------------------------------------------------------------------------------------
# Values that are of the right type and cannot be


def field(path, value):
    """Damage: another value for one field of a JSON file, "config.json/text_config/hidden_size"."""
    name, *keys = path.split("/")

    def damage(copy):
        settings = json.loads((copy / name).read_text())

        def put(parent, key):
            parent[key] = value

        replace(copy / name, json.dumps(changed(settings, keys, put)))

    return damage


CONFIG, TEXT, VISION = "config.json", "config.json/text_config", "config.json/vision_config"
IMAGES, WORDS = "preprocessor_config.json", "tokenizer_config.json"

VALUES = {
    "an unknown model type": (field(f"{CONFIG}/model_type", "llava_next"), "not supported (qwen2_vl,"),
    "code of its own": (field(f"{CONFIG}/auto_map", {"AutoModel": "evil.Model"}), "code of its own"),
    "a tokenizer of its own": (field(f"{WORDS}/auto_map", {"AutoTokenizer": "evil.T"}), "code of its own"),
    "an image processor of its own": (field(f"{IMAGES}/auto_map", {"AutoProcessor": "evil.P"}), "code of its own"),
    "another family's image processor": (
        field(f"{IMAGES}/image_processor_type", "CLIPImageProcessor"), "image_processor_type"),
    "FP8": (field(f"{CONFIG}/quantization_config", {"quant_method": "fp8"}), "quantised weights"),
    "4 bits": (field(f"{TEXT}/quantization_config", {"load_in_4bit": True}), "quantised weights"),
    "sliding windows": (field(f"{TEXT}/use_sliding_window", True), "sliding-window"),
    "sliding layers": (field(f"{TEXT}/layer_types", ["sliding_attention"] * 2), "sliding-window"),
    "a width of 0": (field(f"{TEXT}/hidden_size", 0), "hidden_size"),
    "a width of 10^12": (field(f"{TEXT}/hidden_size", 10**12), "hidden_size"),
    "a width of 10^400": (field(f"{TEXT}/hidden_size", 10**400), "hidden_size"),
    "a width of true": (field(f"{TEXT}/hidden_size", True), "hidden_size"),
    "a fractional width": (field(f"{TEXT}/hidden_size", 64.5), "hidden_size"),
    "a width of inf": (field(f"{TEXT}/hidden_size", float("inf")), "hidden_size"),
    "another width": (field(f"{TEXT}/hidden_size", 128), "mrope_section"),
    "another width within": (field(f"{TEXT}/intermediate_size", 256), "has the shape"),
    "10^9 layers": (field(f"{TEXT}/num_hidden_layers", 10**9), "num_hidden_layers"),
    "a layer too many": (field(f"{TEXT}/num_hidden_layers", 3), "num_hidden_layers"),
    "a layer too few": (field(f"{TEXT}/num_hidden_layers", 1), "num_hidden_layers"),
    "a block too many in the tower": (field(f"{VISION}/depth", 3), "lack model.visual.blocks.2"),
    "a block too few in the tower": (field(f"{VISION}/depth", 1), "hold what the model has not: model.visual.blocks.1"),
    "10^9 blocks of the tower": (field(f"{VISION}/depth", 10**9), "depth"),
    "heads that do not divide": (field(f"{TEXT}/num_attention_heads", 3), "num_attention_heads 3 does not divide"),
    "heads of keys that do not divide": (field(f"{TEXT}/num_key_value_heads", 3), "num_key_value_heads 3"),
    "heads of the tower that do not divide": (field(f"{VISION}/num_heads", 7), "does not divide"),
    "no vocabulary": (field(f"{TEXT}/vocab_size", 0), "vocab_size"),
    "a vocabulary of 10^12": (field(f"{TEXT}/vocab_size", 10**12), "vocab_size"),
    "a vocabulary below the tokenizer's": (field(f"{TEXT}/vocab_size", 100), "tokens up to id"),
    "a vocabulary above the weights": (field(f"{TEXT}/vocab_size", 5000), "has the shape"),
    "an image token beyond the vocabulary": (field(f"{CONFIG}/image_token_id", 10**6), "no special token 1000000"),
    "a word as image token": (field(f"{CONFIG}/image_token_id", 300), "no special token 300"),
    "end tokens beyond the vocabulary": (field("generation_config.json/eos_token_id", [1, 10**6]), "eos_token_id"),
    "an end token of -1": (field("generation_config.json/eos_token_id", -1), "eos_token_id"),
    "an unknown end token": (field(f"{WORDS}/eos_token", "<|nowhere|>"), "tokenizer"),
    "a rotary base of 0": (field(f"{TEXT}/rope_parameters/rope_theta", 0), "rope_theta"),
    "a rotary base of the tower below 0": (field(f"{VISION}/rope_parameters/rope_theta", -1), "rope_theta"),
    "a rotary base of NaN": (field(f"{TEXT}/rope_parameters/rope_theta", float("nan")), "rope_theta"),
    "sections of another head": (field(f"{TEXT}/rope_parameters/mrope_section", [1, 1, 1]), "mrope_section"),
    "an unknown activation": (field(f"{TEXT}/hidden_act", "magic"), "config.json"),
    "patches of 0": (field(f"{IMAGES}/patch_size", 0), "patch_size"),
    "patches of another size": (field(f"{IMAGES}/patch_size", 16), "patch_size is 16, config.json says 14"),
    "a merge of 0": (field(f"{IMAGES}/merge_size", 0), "merge_size"),
    "two sizes of patches": (field(f"{VISION}/patch_size", [14, 14]), "patch_size"),
    "a merge of 0 in the tower": (field(f"{VISION}/spatial_merge_size", 0), "spatial_merge_size"),
    "limits the wrong way round": (field(f"{IMAGES}/size", {"shortest_edge": 9000, "longest_edge": 8000}), "larger"),
    "limits below one token": (field(f"{IMAGES}/size", {"shortest_edge": 1, "longest_edge": 50}), "one image token"),
    "limits of another processor": (field(f"{IMAGES}/size", {"height": 224, "width": 224}), "min_pixels"),
    "a size of 10^400": (field(f"{IMAGES}/max_pixels", "1" + "0" * 400), "max_pixels"),
    "two means": (field(f"{IMAGES}/image_mean", [0.5, 0.5]), "image_mean"),
    "one mean": (field(f"{IMAGES}/image_mean", 0.5), "image_mean"),
    "words as means": (field(f"{IMAGES}/image_mean", ["a", "b", "c"]), "image_mean"),
    "a mean of NaN": (field(f"{IMAGES}/image_mean", [0.5, 0.5, float("nan")]), "image_mean"),
    "a deviation of 0": (field(f"{IMAGES}/image_std", [0.5, 0.0, 0.5]), "image_std"),
    "a scale of 0": (field(f"{IMAGES}/rescale_factor", 0), "rescale_factor"),
    "an unknown filter": (field(f"{IMAGES}/resample", 99), "resample"),
    "another filter": (field(f"{IMAGES}/resample", 2), "resample must be 3"),
    "a flag that is none": (field(f"{IMAGES}/do_normalize", "no"), "do_normalize"),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_cannot_be_is_refused_by_name(sound, tmp_path, monkeypatch, name):
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on the terminal"))
    damage, words = VALUES[name]
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError) as caught:
        model.load(folder, CPU)
    message = str(caught.value)
    assert message.startswith(str(folder)) and words in message and "\n" not in message


TILES = {
    "tiles of 0": (field(f"{IMAGES}/size", {"height": 0, "width": 0}), "size must be a square"),
    "tiles that are no squares": (field(f"{IMAGES}/size", {"height": 56, "width": 28}), "size must be a square"),
    "tiles that patches do not divide": (field(f"{IMAGES}/size", {"height": 60, "width": 60}), "multiple of 28"),
    "10^9 tiles": (field(f"{IMAGES}/max_patches", 10**9), "max_patches"),
    "least above most": (field(f"{IMAGES}/min_patches", 13), "min_patches"),
    "no tiles": (field(f"{IMAGES}/max_patches", 0), "max_patches"),
    "another layer": (field(f"{CONFIG}/vision_feature_layer", -2), "vision_feature_layer"),
    "a ratio of 0": (field(f"{CONFIG}/downsample_ratio", 0.0), "downsample_ratio"),
    "tokens that are not the tiles'": (field(f"{VISION}/patch_size", [28, 28]), "multiple of 56"),
}


@pytest.mark.parametrize("name", TILES)
def test_a_value_that_makes_no_tiles_is_refused_by_name(sound, tmp_path, name):
    damage, words = TILES[name]
    folder = sound("internvl").copy(tmp_path / "copy")
    damage(folder)
    if name == "tokens that are not the tiles'":
        field(f"{IMAGES}/size", {"height": 84, "width": 84})(folder)
    with pytest.raises(DataError) as caught:
        model.load(folder, CPU)
    assert str(caught.value).startswith(str(folder)) and words in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Chat templates

TEMPLATES = {
    "that does not compile": ("{% for m in messages %}", "chat template failed"),
    "that raises": ("{{ raise_exception('only text') }}", "only text"),
    "that asks for what is not there": ("{{ messages[0].content.image.size }}", "chat template failed"),
    "that divides by zero": ("{{ 1 / 0 }}", "chat template failed"),
    "that looks behind the sandbox": ("{{ ''.__class__.__mro__ }}", "chat template failed"),
    "that loops 10^9 times": ("{% for a in range(1000000000) %}a{% endfor %}", "chat template failed"),
    "that loops in loops": (
        "{% for a in range(2000) %}{% for b in range(2000) %}a{% endfor %}{% endfor %}", "more than 100000 steps"),
    "that calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "chat template failed"),
    "that says nothing": ("{{ '' }}", "does not show a question"),
    "that forgets pictures": ("{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}",
     "with 1 pictures"),
    "that shows pictures twice": ("{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}"
     "<|image_pad|><|image_pad|>{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}", "with 1 pictures"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template(sound, tmp_path, name):
    template, words = TEMPLATES[name]
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    replace(folder / "chat_template.jinja", template)
    with pytest.raises(DataError) as caught:
        model.load(folder, CPU)
    message = str(caught.value)
    assert message.startswith(str(folder)) and words in message and "\n" not in message


@pytest.mark.parametrize("damage", ["empty", "not UTF-8", "a pipe", "a folder", "a link to nothing", "HTML"])
def test_a_file_that_holds_no_chat_template_is_refused(sound, tmp_path, damage):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    WHOLE[damage](folder / "chat_template.jinja")
    text = damage in ("empty", "HTML")
    with pytest.raises(DataError, match="its chat template does not" if text else "chat_template.jinja"):
        model.load(folder, CPU)


def test_a_model_without_a_chat_template_is_used_and_that_is_said(sound, tmp_path, capsys):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    (folder / "chat_template.jinja").unlink()
    model.load(folder, CPU)
    assert capsys.readouterr().err == f"{folder}: no chat template, so prompts read User: … Assistant:\n"


def test_a_template_that_fails_for_one_question_names_its_line(sound, tmp_path):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    template = (folder / "chat_template.jinja").read_text()
    trap = "{% if 'zebra' in messages[0].content[0].text %}{{ raise_exception('no zebras') }}{% endif %}"
    replace(folder / "chat_template.jinja", trap + template)
    _, encoder = model.load(folder, CPU)
    with pytest.raises(DataError, match=r"^exam.jsonl:7: the model's chat template failed \(no zebras\)$"):
        encoder.prompt({"id": "z", "images": [], "prompt": "a zebra?", "_where": "exam.jsonl:7"})


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def header(change):
    """Damage: another header for model.safetensors. change(header): in place, or a new one."""

    def damage(copy):
        data = (copy / "model.safetensors").read_bytes()
        size = int.from_bytes(data[:8], "little")
        table = json.loads(data[8 : 8 + size])
        table = change(table) or table
        text = json.dumps(table).encode()
        replace(copy / "model.safetensors", struct.pack("<Q", len(text)) + text + data[8 + size :])

    return damage


NAME = "model.layers.1.mlp.up_proj.weight"


def put(**fields):
    return header(lambda table: table[NAME].update(fields))


def tensors(change):
    """Damage: other tensors in model.safetensors. change(tensors) in place."""

    def damage(copy):
        held = load_file(copy / "model.safetensors")
        assert NAME in held
        change(held)
        (copy / "model.safetensors").unlink()
        save_file(held, copy / "model.safetensors", {"format": "pt"})

    return damage


def stored_as(dtype):
    def change(held):
        held[NAME] = held[NAME].to(dtype)

    return tensors(change)


def beside(name):
    return tensors(lambda held: held.update({name: torch.ones(4)}))


def holding(value):
    def change(held):
        held[NAME][3, 5] = value

    return tensors(change)


def bytes_at_the_start(data):
    return lambda copy: replace(
        copy / "model.safetensors", data + (copy / "model.safetensors").read_bytes()[len(data) :]
    )


def whole(damage):
    return lambda copy: WHOLE[damage](copy / "model.safetensors")


def only_pickles(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")


def twice(copy):
    os.link(copy / "model.safetensors", copy / "model-00001-of-00002.safetensors")


def adapter(copy):
    (copy / "adapter_config.json").write_text("{}")


def index(file, **more):
    def damage(copy):
        names = load_file(copy / "model.safetensors")
        table = {name: "model.safetensors" for name in names} | {NAME: file} | more
        (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))

    return damage


WEIGHTS = {
    "8-bit floats": (stored_as(torch.float8_e4m3fn), "F8_E4M3: quantised weights"),
    "8-bit integers": (stored_as(torch.int8), "I8: quantised weights"),
    "packed bytes": (stored_as(torch.uint8), "U8: quantised weights"),
    "truth values": (stored_as(torch.bool), "BOOL: quantised weights"),
    "a scale of FP8": (beside(f"{NAME}_scale_inv"), "weight_scale_inv: quantised weights"),
    "a scale of FP8, compressed-tensors": (beside(f"{NAME}_scale"), "weight_scale: quantised weights"),
    "a scale of bitsandbytes": (beside(NAME.replace("weight", "SCB")), "SCB: quantised weights"),
    "a 4-bit state": (beside(f"{NAME}.quant_state.bitsandbytes__nf4"), "quantised weights"),
    "GPTQ": (beside(NAME.replace("weight", "qweight")), "qweight: quantised weights"),
    "NaN": (holding(float("nan")), "holds NaN or inf"),
    "inf": (holding(float("inf")), "holds NaN or inf"),
    "-inf": (holding(-float("inf")), "holds NaN or inf"),
    "a weight less": (tensors(lambda held: held.pop(NAME)), f"lack {NAME.replace('model.', 'model.language_model.')}"),
    "a weight more": (beside("model.layers.1.mlp.gate2.weight"), "hold what the model has not"),
    "a weight transposed": (tensors(lambda held: held.update({NAME: held[NAME].T.contiguous()})), "has the shape"),
    "an empty weight": (tensors(lambda held: held.update({NAME: torch.zeros(0, 64)})), "has the shape [0, 64]"),
    "pickles only": (only_pickles, "pytorch_model.bin is there, but only safetensors are read"),
    "no file": (whole("deleted"), "no *.safetensors file"),
    "an empty file": (whole("empty"), "truncated"),
    "half a file": (whole("truncated"), "truncated"),
    "nonsense": (whole("10 MB of nonsense"), "truncated, or no safetensors"),
    "a Git LFS pointer": (whole("a Git LFS pointer"), "truncated, or no safetensors"),
    "a pipe": (whole("a pipe"), "no regular file"),
    "a folder": (whole("a folder"), "no regular file"),
    "a link to nothing": (whole("a link to nothing"), "a link to nothing"),
    "an endless device": (whole("an endless device"), "no regular file"),
    "a header of 10^18 bytes": (bytes_at_the_start(struct.pack("<Q", 10**18)), "truncated, or no safetensors"),
    "a header of 2^64 - 1 bytes": (bytes_at_the_start(b"\xff" * 8), "truncated, or no safetensors"),
    "no header": (bytes_at_the_start(bytes(8)), "header is not JSON"),
    "a header that is a list": (header(lambda table: [1, 2]), "no table of tensors"),
    "a header of numbers": (header(lambda table: {"a": 1}), "no table of tensors"),
    "an empty header": (header(lambda table: {"__metadata__": {}}), "truncated or damaged"),
    "a tensor of 10^12 numbers": (put(shape=[10**6, 10**6]), "truncated or damaged"),
    "a negative side": (put(shape=[-128, -64]), "truncated or damaged"),
    "sides that are words": (put(shape=["a", "b"]), "truncated or damaged"),
    "numbers beyond the end": (put(data_offsets=[0, 10**15]), "truncated or damaged"),
    "numbers from before the start": (put(data_offsets=[-8, 100]), "truncated or damaged"),
    "numbers that overlap": (put(data_offsets=[0, 4 * 128 * 64]), "truncated or damaged"),
    "no offsets": (header(lambda table: table[NAME].pop("data_offsets") and None), "truncated or damaged"),
    "an unknown type": (put(dtype="X9"), "X9: quantised weights"),
    "a type that is a number": (put(dtype=32), "truncated or damaged"),
    "a type of half the size": (put(dtype="BF16"), "truncated or damaged"),
    "a second file with the same": (twice, "and so does"),
    "an adapter": (adapter, "merge it into its model first"),
    "an index that leads out": (index("../../etc/passwd"), "no safetensors file of this directory"),
    "an index that leads out, absolute": (index("/etc/model.safetensors"), "no safetensors file of this directory"),
    "an index that names a missing file": (index("model-00009.safetensors"), "which is missing"),
    "an index that names a number": (index(9), "no safetensors file of this directory"),
    "an index with a name too many": (index("model.safetensors", ghost="model.safetensors"), "does not hold it"),
    "an index that is a list": (lambda copy: replace(copy / "model.safetensors.index.json", "[]"), "index.json"),
    "an index without a map": (lambda copy: replace(copy / "model.safetensors.index.json", "{}"), "weight_map"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_not_the_models_are_refused_by_name(sound, tmp_path, name):
    damage, words = WEIGHTS[name]
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    damage(folder)
    with pytest.raises(DataError) as caught:
        model.load(folder, CPU)
    message = str(caught.value)
    assert message.startswith(str(folder)) and words in message and "\n" not in message


def test_what_is_harmless_beside_the_weights_is_no_reason_to_refuse(sound, tmp_path):
    def more(held):
        held["model.rotary_emb.inv_freq"] = torch.ones(16)
        held["model.vision_model.embeddings.position_ids"] = torch.arange(9)

    def others(copy):
        tensors(more)(copy)
        index("model.safetensors")(copy)
        for name in ("README.md", "training_args.bin", "optimizer.pt", "video_preprocessor_config.json", "notes.json"):
            (copy / name).write_text("whatever")

    assert sound("qwen2_5_vl").verdict(others, tmp_path / "copy") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_any_floats_are_read(sound, tmp_path, dtype):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    stored_as(dtype)(folder)
    policy, _ = model.load(folder, CPU)
    found = dict(policy.named_parameters())["hf." + NAME.replace("model.", "model.language_model.")]
    assert torch.equal(found, load_file(sound("qwen2_5_vl").folder / "model.safetensors")[NAME].to(dtype).float())


# ---------------------------------------------------------------------------------------------------------------------
# Directories of runs that have not ended


def run_files(folder, latest=None, steps=10):
    (folder / "args.json").write_text(json.dumps({"steps": steps}))
    (folder / "log.jsonl").write_text("")
    if latest is not None:
        (folder / "checkpoints" / f"step_{latest:06d}").mkdir(parents=True, exist_ok=True)
        (folder / "LATEST").write_text(f"step_{latest:06d}")


def refusal(folder):
    with pytest.raises(DataError) as caught:
        model.load(folder, CPU)
    return str(caught.value)


def test_a_run_that_has_not_finished_says_where_it_stopped(tmp_path):
    run_files(tmp_path, latest=4)
    advice = "so there is no finished model in it; --resume that run"
    assert refusal(tmp_path) == f"{tmp_path}: a run that stopped at step 4 of 10, {advice}"
    run_files(tmp_path, latest=4, steps=0)
    assert refusal(tmp_path) == f"{tmp_path}: a run that stopped at step 4, {advice}"
    (tmp_path / "LATEST").unlink()
    assert refusal(tmp_path) == f"{tmp_path}: a run that stopped before its first checkpoint, {advice}"


def test_the_model_of_a_run_that_went_on_and_stopped_is_not_that_of_its_last_step(sound, tmp_path):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    run_files(folder, latest=10)
    model.load(folder, CPU)
    run_files(folder, latest=12, steps=20)
    assert "stopped at step 12 of 20" in refusal(folder)


def test_an_export_that_was_killed_between_config_and_weights_is_no_model(sound, tmp_path):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    run_files(folder, latest=10)
    (folder / "model.safetensors").unlink()
    assert "a run that stopped at step 10 of 10" in refusal(folder)


@pytest.mark.parametrize("text", ["", "step_x", "\xff", "../../etc"])
def test_a_damaged_latest_of_a_finished_run_does_not_matter(sound, tmp_path, text):
    folder = sound("qwen2_5_vl").copy(tmp_path / "copy")
    run_files(folder, latest=10)
    (folder / "LATEST").write_bytes(text.encode("latin-1"))
    model.load(folder, CPU)
