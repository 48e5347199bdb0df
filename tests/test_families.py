"""families.py: what a family answers is what transformers' own classes answer, for every architecture alike.

Other files compare what is computed with the answers (test_groups.py, test_sampler.py, test_loading.py); here are the
answers themselves, and what only one family has. A new family needs a line in PROCESSORS and PICTURE_TOKENS.
"""

import importlib
import json
import random
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from commands import call, rows, weights, write
from conftest import CPU, FAMILIES, load_rough
from groups import EXACT, assert_same_gradients, every_family, gradients, groups_of, ids_of, plain_log_probs
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoImageProcessor, AutoModelForImageTextToText

import families
import model
import run_directory
import sampler
from records import DataError, read_records
from toy.scenes import scene
from toy.tiny_model import make_tiny

QWEN_IMAGES = "qwen2_vl.image_processing_pil_qwen2_vl", "Qwen2VLImageProcessorPil"
# transformers' own classes for text with pictures: (module, class) of the processor, then of its image half
PROCESSORS = {
    "qwen2_vl": [("qwen2_vl.processing_qwen2_vl", "Qwen2VLProcessor"), QWEN_IMAGES],
    "qwen2_5_vl": [("qwen2_5_vl.processing_qwen2_5_vl", "Qwen2_5_VLProcessor"), QWEN_IMAGES],
    "qwen3_vl": [("qwen3_vl.processing_qwen3_vl", "Qwen3VLProcessor"), QWEN_IMAGES],
    "internvl": [
        ("internvl.processing_internvl", "InternVLProcessor"),
        ("got_ocr2.image_processing_pil_got_ocr2", "GotOcr2ImageProcessorPil"),
    ],
}
QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>"]
PICTURE_TOKENS = {
    "qwen2_vl": QWEN_TOKENS,
    "qwen2_5_vl": QWEN_TOKENS,
    "qwen3_vl": QWEN_TOKENS,
    "internvl": ["<IMG_CONTEXT>", "<video>"],
}
SIZES = [(112, 112), (56, 56), (140, 56), (60, 100), (32, 72), (57, 301), (30, 30), (500, 40)]  # width, height


def own_processor(folder, family):
    """transformers' processor of a model directory, without its video half: that would need torchvision."""
    (module, name), (image_module, image_name) = PROCESSORS[family]
    processor = getattr(importlib.import_module(f"transformers.models.{module}"), name)
    images = getattr(importlib.import_module(f"transformers.models.{image_module}"), image_name)
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    settings = {}
    if (folder / "processor_config.json").exists():
        settings = json.loads((folder / "processor_config.json").read_text())
        settings.pop("processor_class")
    with mock.patch.object(processor, "check_argument_for_proper_class"):
        return processor(images.from_pretrained(folder), tokenizer, None, **settings)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """A record for each of SIZES, and one with three of the pictures."""
    folder, rng = tmp_path_factory.mktemp("gallery"), random.Random(6)
    for width, height in SIZES:
        scene(rng, 160).resize((width, height)).save(folder / f"{width}x{height}.png")
    names = [str(folder / f"{width}x{height}.png") for width, height in SIZES]
    questions = [{"id": name, "images": [name], "prompt": "What is this?"} for name in names]
    words = "First <image> then <image> and last <image> which is the lightest?"
    return [*questions, {"id": "three", "images": names[2:5], "prompt": words}]


# ---------------------------------------------------------------------------------------------------------------------
# The same answers as transformers


@pytest.mark.parametrize("template", [True, False], ids=["chat template", "base model"])
@every_family
def test_ids_and_pixels_are_those_of_transformers_own_processor(tiny_dirs, gallery, family, template):
    _, encoder = model.load(tiny_dirs[family], CPU)
    if not template:
        encoder.tokenizer.chat_template = None
    own = own_processor(tiny_dirs[family], family)
    for record in gallery:
        prompt = encoder.prompt(record)
        # Qwen: in the size that every engine gets, which keeps long strips below the largest area.
        images = encoder.images(prompt.images)
        expected = own(images=images, text=[encoder.chat(record)], return_tensors="pt")
        assert torch.equal(prompt.ids, expected["input_ids"][0]), record["id"]
        torch.testing.assert_close(prompt.pixels, expected["pixel_values"], **EXACT)
        if "image_grid_thw" in expected:
            assert torch.equal(prompt.grids, expected["image_grid_thw"])


@every_family
def test_a_base_model_is_shown_a_picture_as_the_chat_template_shows_it(tiny_dirs, gallery, family):
    _, encoder = model.load(tiny_dirs[family], CPU)
    with_template = encoder.chat(gallery[0])
    encoder.tokenizer.chat_template = None
    picture = encoder.chat(gallery[0]).removeprefix("User: ").removesuffix("What is this?\nAssistant:")
    assert encoder.image_token in picture and f"{picture}What is this?" in with_template


@every_family
def test_a_grid_that_is_known_before_pixels_are_read_says_how_many_tokens_there_will_be(models, gallery, family):
    policy, encoder = models[family]
    for size, record in zip(SIZES, gallery, strict=False):
        prompt = encoder.prompt(record)
        grid = encoder.family.grid(*size)
        assert prompt.grids.tolist() == [list(grid)]
        tokens = int((prompt.ids == encoder.image_id).sum())
        assert tokens == encoder.family.tokens_per_picture(grid)
        with torch.no_grad():
            features = next(iter(encoder.family.picture_features(policy.hf, prompt.pixels, prompt.grids)))
        assert features.flatten(0, -2).shape[0] == tokens, "the tower makes one vector for each"


@every_family
def test_positions_are_those_that_transformers_own_forward_takes(models, gallery, family):
    policy, encoder = models[family]
    for record in (gallery[0], gallery[-1]):
        prompt = encoder.prompt(record)
        ids = prompt.ids[None]
        pictures = encoder.family.picture_arguments(prompt.pixels, prompt.grids)
        if encoder.family.position_axes == 3:
            pictures["mm_token_type_ids"] = (ids == encoder.image_id).long()
        taken = []

        def look(module, arguments, settings, taken=taken):
            taken.append(settings["position_ids"] if "position_ids" in settings else arguments[1])

        rotary = encoder.family.decoder(policy.hf).rotary_emb
        handle = rotary.register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            policy.hf(input_ids=ids, **pictures)
        handle.remove()
        assert torch.equal(taken[0], encoder.family.position_ids(prompt.positions[:, None]))
        assert prompt.next == int(taken[0].max()) + 1


@every_family
def test_a_blank_picture_reaches_every_weight_that_a_picture_reaches(models, gallery, family):
    policy, encoder = models[family]
    prompt = encoder.prompt(gallery[0])

    def reached(pixels, grids):
        features = encoder.family.picture_features(policy.hf, pixels, grids)
        found = gradients(policy, sum(part.float().sum() for part in features))
        return {name for name, gradient in found.items() if gradient is not None}

    pixels, grids = encoder.family.blank_picture("cpu")
    assert not pixels.any() and encoder.family.tokens_per_picture(grids[0].tolist()) == 1
    blank = reached(pixels, grids)
    assert blank and blank == reached(prompt.pixels, prompt.grids)


@every_family
def test_the_flops_of_the_vision_tower_are_those_that_torch_counts(models, gallery, family):
    policy, encoder = models[family]
    for record in gallery:
        prompt = encoder.prompt(record)
        # Written out, attention is products that torch counts like any other.
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            list(encoder.family.picture_features(policy.hf, prompt.pixels, prompt.grids))
        found = sum(encoder.family.vision_flops(policy.hf, grid) for grid in prompt.grids.tolist())
        # Qwen: the rotary tables are products too, a few parts in a thousand of so small a tower.
        rest = 0 if family == "internvl" else 5e-3
        assert found == pytest.approx(counter.get_total_flops(), rel=rest)


@every_family
def test_tokens_of_pictures_and_videos_are_never_sampled_however_likely(tiny_dirs, gallery, family):
    policy, encoder = load_rough(tiny_dirs[family])
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.forbidden) == PICTURE_TOKENS[family]
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # tied: also the rows of lm_head
        policy.hf.get_input_embeddings().weight[encoder.forbidden] = torch.stack([direction, -direction]) * 200
    prompts = encoder.prompts(gallery[:2])
    for n, temperature in ((1, 0), (4, 1.0)):
        replies = sampler.sample(policy, prompts, n, seeds=[1, 2], temperature=temperature, max_new_tokens=8)
        sampled = {token for group in ids_of(replies) for ids in group for token in ids}
        assert not sampled & set(encoder.forbidden)
        assert all(torch.isfinite(reply.logps).all() for group in replies for reply in group)


def test_an_unfinished_family_says_which_answers_it_lacks():
    class Unfinished(families.Family):
        pass

    with pytest.raises(TypeError, match="abstract methods blank_picture, grid, .*vision, vision_flops"):
        Unfinished(None, "")


def test_every_supported_architecture_is_among_those_that_the_tests_go_through():
    assert set(families.FAMILIES) == set(FAMILIES) == set(PROCESSORS) == set(PICTURE_TOKENS)


# ---------------------------------------------------------------------------------------------------------------------
# Image settings of Qwen

LEAST, MOST = 5000, 60_000
SPELLINGS = {
    "size": {"size": {"shortest_edge": LEAST, "longest_edge": MOST}},
    "min and max": {"min_pixels": LEAST, "max_pixels": MOST},
    "size and nulls": {"size": {"shortest_edge": LEAST, "longest_edge": MOST}, "min_pixels": None, "max_pixels": None},
    "min and max win over size": {
        "size": {"shortest_edge": 1, "longest_edge": 10**6}, "min_pixels": LEAST, "max_pixels": MOST},
    "half of each": {"size": {"shortest_edge": LEAST}, "max_pixels": MOST},
    "inside of size": {"size": {"min_pixels": LEAST, "max_pixels": MOST}},
    "both places": {"size": {"min_pixels": LEAST, "max_pixels": MOST}, "min_pixels": LEAST, "max_pixels": MOST},
}  # fmt: skip


def with_image_settings(source, folder, settings):
    """A copy of a model directory whose image settings say their limits in another way."""
    shutil.copytree(source, folder)
    path = folder / "preprocessor_config.json"
    others = json.loads(path.read_text())
    others.pop("size")
    path.write_text(json.dumps(others | settings))
    return folder


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", [name for name in FAMILIES if name.startswith("qwen")])
def test_limits_in_every_spelling_give_the_sizes_of_transformers_own_processor(tiny_dirs, tmp_path, family, spelling):
    folder = with_image_settings(tiny_dirs[family], tmp_path / "m", SPELLINGS[spelling])
    policy, encoder = model.load(folder, CPU)
    assert (encoder.family.min_pixels, encoder.family.max_pixels) == (LEAST, MOST)
    # The one spelling that transformers itself cannot read means what the others mean.
    other = with_image_settings(tiny_dirs[family], tmp_path / "n", SPELLINGS["size"])
    own = AutoImageProcessor.from_pretrained(other if spelling == "inside of size" else folder, backend="pil")
    for width, height in [*SIZES[:-1], (1, 1), (700, 500), (90, 1200), (333, 77)]:
        found = encoder.family.grid(width, height)
        image = Image.new("RGB", (width, height), (90, 120, 200))
        expected = own(images=[image], return_tensors="np")
        assert list(found) == expected["image_grid_thw"][0].tolist(), (width, height)
        pixels = encoder.family.pixels(encoder.family.resize(image))
        np.testing.assert_allclose(pixels, expected["pixel_values"], atol=1e-6)
    encoder.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/preprocessor_config.json").read_text())
    assert saved["size"] == SPELLINGS["size"]["size"], "written in the one spelling that everybody reads"


@pytest.mark.parametrize("settings", [{}, {"size": None}, {"max_pixels": MOST}, {"size": {"longest_edge": MOST}}])
def test_a_limit_that_is_missing_is_refused_for_its_default_is_another_models(tiny_dirs, tmp_path, settings):
    folder = with_image_settings(tiny_dirs["qwen2_5_vl"], tmp_path / "m", settings)
    with pytest.raises(DataError, match="preprocessor_config.json: min_pixels"):
        model.load(folder, CPU)


def test_image_settings_inside_of_the_processors_win_as_in_transformers(tiny_dirs, tmp_path):
    folder = with_image_settings(tiny_dirs["qwen2_5_vl"], tmp_path / "m", SPELLINGS["size"])
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    inner = settings | {"size": {"shortest_edge": 1000, "longest_edge": 40_000}}
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    _, encoder = model.load(folder, CPU)
    assert (encoder.family.min_pixels, encoder.family.max_pixels) == (1000, 40_000)
    assert encoder.family.processor.size["longest_edge"] == 40_000


# ---------------------------------------------------------------------------------------------------------------------
# InternVL


def changed(source, folder, **changes):
    """A copy of a model directory with other fields in config.json; part__field for a field of a part."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        (config[part] if part else config)[field] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tiles_are_those_of_the_shape_and_a_small_whole_picture_follows(models):
    family = models["internvl"][1].family
    assert family.grid(56, 56) == (1, 4, 4), "one tile is the picture"
    assert family.grid(112, 112) == (2 * 2 + 1, 4, 4)
    assert family.grid(224, 112) == (4 * 2 + 1, 4, 4)
    assert family.grid(4000, 40) == (12 * 1 + 1, 4, 4), "the longest row that 12 tiles make"
    assert family.expand(3) == [family.frame[0], *[family.config.image_token_id] * 3, family.frame[1]]


def test_max_pixels_bounds_the_tiles_and_stays_out_of_the_exported_settings(tiny_dirs, gallery, tmp_path):
    source = tiny_dirs["internvl"]
    for tiles in (1, 2, 5):
        policy, encoder = model.load(source, CPU, max_pixels=tiles * 56**2)
        for width, height in SIZES:
            assert encoder.family.grid(width, height)[0] <= tiles + (tiles > 1)
        assert encoder.prompt(gallery[0]).pixels.shape[0] == encoder.family.grid(112, 112)[0]
        assert encoder.family.vllm_settings()["mm_processor_kwargs"]["max_patches"] == tiles
    run_directory.save_model(policy, encoder, tmp_path)
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert json.loads((tmp_path / name).read_text()) == json.loads((source / name).read_text())
    with pytest.raises(DataError, match="--max-pixels 3000 is below one tile: at least 3136 pixels"):
        model.load(source, CPU, max_pixels=3000)


def test_tiles_are_made_even_if_the_files_image_settings_say_otherwise(tiny_dirs, gallery, tmp_path):
    shutil.copytree(tiny_dirs["internvl"], tmp_path / "m")
    path = tmp_path / "m/preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"crop_to_patches": False}))
    _, encoder = model.load(tmp_path / "m", CPU)
    assert encoder.prompt(gallery[0]).pixels.shape[0] == 5


@pytest.mark.parametrize("field", families.InternVL.dropouts)
def test_dropout_in_the_tower_is_refused(tiny_dirs, tmp_path, field):
    folder = changed(tiny_dirs["internvl"], tmp_path / "m", **{f"vision_config__{field}": 0.1})
    with pytest.raises(DataError, match=rf"dropout in the vision tower is not supported \({field} 0.1\)"):
        model.load(folder, CPU)


def test_a_decoder_that_decoding_does_not_know_is_refused(tiny_dirs, tmp_path):
    folder = changed(tiny_dirs["internvl"], tmp_path / "m", text_config__model_type="llama")
    with pytest.raises(DataError, match=r"InternVL with a decoder llama is not supported \(qwen2, qwen3\)"):
        model.load(folder, CPU)


def assert_computes_what_transformers_computes(policy, encoder, records):
    """Log-probs and gradients of a packed row, and log-probs of what decoding samples, against plain forwards."""
    groups = groups_of(encoder, records, [(0, 2), (1, 2), (2, 1)])
    logp, _ = model.log_probs(policy, groups)
    plain = [plain_log_probs(policy, encoder, prompt, reply) for prompt, replies in groups for reply in replies]
    for found, expected in zip(logp, plain, strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, **EXACT)
    assert_same_gradients(gradients(policy, logp.sum()), gradients(policy, torch.cat(plain).sum()))
    prompts = [prompt for prompt, _ in groups]
    sampled = sampler.sample(policy, prompts, 2, seeds=[1, 2, 3], max_new_tokens=12)
    for prompt, replies in zip(prompts, sampled, strict=True):
        for reply in replies:
            with torch.no_grad():
                torch.testing.assert_close(reply.logps, plain_log_probs(policy, encoder, prompt, reply.ids), **EXACT)


def test_a_decoder_of_qwen3_is_computed_like_one_of_qwen2(records, tmp_path):
    make_tiny(tmp_path, "internvl", layers=3, decoder="qwen3")
    policy, encoder = load_rough(tmp_path)
    assert type(policy.hf.model.language_model).__name__ == "Qwen3Model"
    assert_computes_what_transformers_computes(policy, encoder, records)


def test_dynamic_rope_is_transformers_own_up_to_the_models_length_and_stays_in_the_config(tiny_dirs, records, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    folder = changed(tiny_dirs["internvl"], tmp_path / "m", text_config__rope_parameters=rope)
    policy, encoder = load_rough(folder)
    assert_computes_what_transformers_computes(policy, encoder, records)
    run_directory.save_model(policy, encoder, tmp_path / "out")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert plain.model.language_model.rotary_emb.rope_type == "dynamic"
    prompt = encoder.prompt(records[0])
    with torch.no_grad():
        found, expected = (
            hf(input_ids=prompt.ids[None], pixel_values=prompt.pixels).logits for hf in (policy.hf, plain)
        )
    torch.testing.assert_close(found, expected, **EXACT)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

SAID = "<think>1 looks dark, 2 looks light.</think><answer>{}</answer>"


@pytest.fixture(scope="module")
def course(tiny_dirs, tmp_path_factory):
    """A folder with records.jsonl, four puzzles and two questions without a picture, and a model "parrot" of InternVL
    that says SAID with A or B to each of them."""
    folder = tmp_path_factory.mktemp("course")
    call("jigsaw", scenes=4, count=4, rows=2, cols=1, question="pair", swap=0, out=folder / "puzzles")
    records = [json.loads(line) for line in (folder / "puzzles/records.jsonl").read_text().splitlines()]
    for record in records:
        record["images"] = [f"puzzles/{name}" for name in record["images"]]
    for number in range(2):
        words = f"Which letter? {'Think. ' * number}"
        records.append({**records[number], "id": f"text{number}", "images": [], "prompt": words})
    write(folder / "records.jsonl", records)
    # Both letters are said, so that the replies of a group earn different rewards.
    said = [{**r, "id": f"{r['id']}/{x}", "chosen": SAID.format(x)} for r in records for x in "AB"]
    call(
        "dpo", model=tiny_dirs["internvl"], data=write(folder / "said.jsonl", said), out=folder / "parrot",
        loss="sft", batch=12, steps=40, lr=1e-2, save_every=0,
    )  # fmt: skip
    return folder


def test_every_stage_takes_internvl_and_each_takes_what_the_one_before_has_made(course, tmp_path):
    sources = {"policy": course / "parrot", "base": course / "parrot", "data": course / "records.jsonl"}
    call("distill", **sources, out=tmp_path / "pairs.jsonl", max_new_tokens=40, samples=4)
    assert any(pair["images"] for pair in read_records(tmp_path / "pairs.jsonl"))
    call("dpo", model=course / "parrot", data=tmp_path / "pairs.jsonl", out=tmp_path / "dpo", batch=2, steps=2)
    asked = {"data": course / "records.jsonl", "max_new_tokens": 40}
    learned = asked | {"model": tmp_path / "dpo", "prompts": 3, "group": 4, "steps": 2, "kl": 0.04}
    call("grpo", **learned, out=tmp_path / "grpo")
    call("grpo", **learned, out=tmp_path / "frozen", freeze_vision=True)
    call("eval", **asked, model=tmp_path / "grpo", out=tmp_path / "eval.json")
    assert json.loads((tmp_path / "eval.json").read_text())

    before = weights(tmp_path / "dpo")
    vision = {name for name in before if name.startswith(("vision_tower.", "multi_modal_projector."))}
    assert len(vision) > 10 and len(before) - len(vision) > 10
    for out, still in (("grpo", set()), ("frozen", vision)):
        assert max(row["useful_groups"] for row in rows(tmp_path / out)) > 0, "something was learned from"
        assert max(row["sampler_gap"] for row in rows(tmp_path / out)) < 1e-4
        after = weights(tmp_path / out)
        assert {name for name in before if torch.equal(before[name], after[name])} == still
