"""model.Encoder and the families' pictures: records become prompts, texts become replies, nothing is truncated."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU, FAMILIES
from groups import every_family
from PIL import Image

import model
from lazy_puzzles import Shown
from pictures import open_picture
from records import DataError

QWEN = [family for family in FAMILIES if family.startswith("qwen")]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    """{name: path} of noise pictures in the modes and shapes that people have."""
    folder, noise = tmp_path_factory.mktemp("gallery"), np.random.default_rng(0)

    def pixels(width, height, *channels):
        return noise.integers(0, 256, (height, width, *channels), dtype=np.uint8)

    pictures = {
        "rgb": Image.fromarray(pixels(150, 90, 3)),
        "large": Image.fromarray(pixels(700, 400, 3)),
        "dot": Image.fromarray(pixels(5, 9, 3)),
        "exact": Image.fromarray(pixels(224, 448, 3)),
        "grey": Image.fromarray(pixels(61, 200)),
        "alpha": Image.fromarray(pixels(100, 80, 4)),
        "palette": Image.fromarray(pixels(90, 130, 3)).quantize(31),
        "bilevel": Image.fromarray(pixels(90, 130)).convert("1"),
    }
    for name, picture in pictures.items():
        picture.save(folder / f"{name}.png")
    Image.fromarray(pixels(97, 120, 3)).save(folder / "photo.jpg")
    Image.fromarray(pixels(97, 120, 4)).convert("CMYK").save(folder / "print.jpg")
    return {path.stem: str(path) for path in folder.iterdir()}


def question(prompt, *images, **more):
    images = [str(image) for image in images]
    return {"id": "q", "prompt": prompt, "images": images, "_where": "exam.jsonl:7", **more}


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen3_vl"])
def limited(tiny_dirs, request):
    """An encoder with --max-pixels 40,000 and patches of 14 or 16."""
    return model.load(tiny_dirs[request.param], CPU, max_pixels=40_000)[1]


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def test_sides_become_multiples_of_patch_times_merge_within_max_pixels(limited):
    factor = {14: 28, 16: 32}[limited.family.processor.patch_size]
    sides = random.Random(0)
    shapes = [(sides.randint(1, 1500), sides.randint(1, 1500)) for _ in range(60)]
    shapes += [(1, 200), (200, 1), (50, 5000), (5000, 30), (factor, factor), (10_000, 50)]
    for width, height in shapes:
        if max(width, height) > 200 * min(width, height):
            continue
        resized = limited.family.resize(Image.new("L", (width, height)))
        assert resized.mode == "RGB"
        assert resized.width % factor == resized.height % factor == 0, (width, height)
        assert factor**2 <= resized.width * resized.height <= 40_000, (width, height, resized.size)
        assert limited.family.resize(resized).size == resized.size, "an engine that resizes again finds nothing to do"


def test_pixels_are_those_that_the_processor_makes_when_it_resizes_itself(limited, gallery):
    limits = {"shortest_edge": limited.family.min_pixels, "longest_edge": 40_000}
    assert len(gallery) == 10
    for name, path in gallery.items():
        pixels, grid = limited.picture(Shown(path))
        # Of what a person sees: under transparency the processor alone would show the colour that nobody sees.
        images = [open_picture(path)]
        expected = limited.family.processor(images=images, do_resize=True, size=limits, return_tensors="pt")
        assert grid.tolist() == expected["image_grid_thw"][0].tolist(), name
        assert pixels.dtype == torch.float32 and len(pixels) == int(grid.prod()), name
        torch.testing.assert_close(pixels, expected["pixel_values"], rtol=0, atol=1e-6, msg=name)


def test_max_pixels_below_one_image_token_is_refused(tiny_dirs):
    with pytest.raises(DataError, match="--max-pixels 783 is below one image token: at least 784 pixels"):
        model.load(tiny_dirs["qwen2_5_vl"], CPU, max_pixels=783)
    _, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, max_pixels=784)
    assert encoder.family.resize(Image.new("RGB", (90, 300))).size == (28, 28)


def test_a_strip_that_no_model_takes_is_refused(models, tmp_path):
    _, encoder = models["qwen2_5_vl"]
    Image.new("RGB", (2, 500)).save(tmp_path / "strip.png")
    with pytest.raises(DataError, match="^exam.jsonl:7: .*aspect ratio"):
        encoder.prompt(question("?", tmp_path / "strip.png"))


def test_a_picture_that_vanished_is_named(models, tmp_path):
    _, encoder = models["qwen2_5_vl"]
    with pytest.raises(DataError, match=r"^exam.jsonl:7: .*gone.png"):
        encoder.prompt(question("?", tmp_path / "gone.png"))


def test_a_picture_is_encoded_once_and_then_kept(models, gallery):
    _, encoder = models["qwen2_5_vl"]
    first, again = encoder.picture(Shown(gallery["large"])), encoder.picture(Shown(gallery["large"]))
    assert first[0] is again[0] and first[1] is again[1]


def test_a_full_cache_forgets_the_oldest_picture_and_encodes_it_again(models, tiny_dirs, gallery):
    policy, _ = models["qwen2_5_vl"]
    parts = tiny_dirs["qwen2_5_vl"], policy.family, policy.hf
    names = [Shown(gallery[name]) for name in ("rgb", "grey", "photo")]
    sizes = []
    for name in names:
        fresh = model.Encoder(*parts)
        (image,) = fresh.images([name])
        sizes.append(fresh.picture(name)[0].nbytes + len(image.tobytes()))
    encoder = model.Encoder(*parts, cache_bytes=sum(sizes) - 1)
    first, second, third = (encoder.picture(name) for name in names)
    assert list(encoder._pictures) == names[1:], "the third pushed the first out"
    assert encoder.picture(names[1])[0] is second[0]
    again = encoder.picture(names[0])
    assert again[0] is not first[0] and torch.equal(again[0], first[0])
    assert names[1] in encoder._pictures and names[2] not in encoder._pictures, "the one not used for longest goes"
    held = sum(size for name, size in zip(names, sizes, strict=True) if name in encoder._pictures)
    assert encoder._bytes_left == sum(sizes) - 1 - held


def test_pictures_asked_for_ahead_are_encoded_once_and_are_the_same(models, tiny_dirs, gallery, monkeypatch):
    policy, _ = models["qwen2_5_vl"]
    paths = [gallery[name] for name in ("rgb", "grey", "photo")]
    names = [Shown(path) for path in paths]
    encoder, plain = (model.Encoder(tiny_dirs["qwen2_5_vl"], policy.family, policy.hf) for _ in range(2))
    encoded, encode = [], encoder._encode
    monkeypatch.setattr(encoder, "_encode", lambda key: encoded.append(key) or encode(key))
    encoder.prefetch([question("?", *paths[:2]), question("?", *paths), question("?")])
    for name in names:
        for found, expected in zip(encoder.picture(name), plain.picture(name), strict=True):
            assert torch.equal(found, expected)
    assert sorted(encoded) == sorted(names)


# ---------------------------------------------------------------------------------------------------------------------
# Prompts


@pytest.mark.parametrize("family", QWEN)
def test_a_prompt_holds_one_token_for_every_merged_square_of_its_pictures(models, gallery, family):
    _, encoder = models[family]
    prompt = encoder.prompt(question("One <image> and <image>, two.", gallery["rgb"], gallery["exact"]))
    squares = [int(grid.prod()) // 4 for grid in prompt.grids]
    runs = "".join("#" if token == encoder.image_id else "." for token in prompt.ids.tolist()).strip(".")
    assert [len(run) for run in runs.split(".") if run] == squares
    assert len(prompt.pixels) == prompt.patches == 4 * sum(squares)
    assert prompt.plain_ids.count(encoder.image_id) == 2, "an engine of its own expands them itself"
    assert len(prompt.ids) == len(prompt.plain_ids) - 2 + sum(squares)


@every_family
def test_pictures_lie_in_a_prompt_in_the_order_of_the_record(models, gallery, family):
    _, encoder = models[family]
    prompt = encoder.prompt(question("One <image> and <image>, two.", gallery["rgb"], gallery["exact"]))
    (first, first_grid), (second, second_grid) = (encoder.picture(Shown(gallery[name])) for name in ("rgb", "exact"))
    assert torch.equal(prompt.pixels, torch.cat([first, second]))
    assert prompt.grids.tolist() == [first_grid.tolist(), second_grid.tolist()]


@every_family
def test_the_length_of_a_prompt_is_known_without_reading_pixels(models, records, family):
    _, encoder = models[family]
    for record in records:
        assert encoder.length(record) == len(encoder.prompt(record).ids)


def test_positions_worked_by_hand(models, tmp_path):
    _, encoder = models["qwen2_5_vl"]
    Image.new("RGB", (84, 56)).save(tmp_path / "a.png")  # 2 rows of 3 tokens
    prompt = encoder.prompt(question("<image>", tmp_path / "a.png"))
    begin = prompt.ids.tolist().index(encoder.image_id)
    assert prompt.positions[:, :begin].tolist() == [list(range(begin))] * 3
    time, height, width = (prompt.positions[:, begin : begin + 6] - begin).tolist()
    assert time == [0] * 6 and height == [0, 0, 0, 1, 1, 1] and width == [0, 1, 2, 0, 1, 2]
    rest = len(prompt.ids) - begin - 6  # the text goes on after the larger side
    assert (prompt.positions[:, begin + 6 :] - begin).tolist() == [list(range(3, 3 + rest))] * 3
    assert prompt.next == begin + 3 + rest


@pytest.mark.parametrize("family", QWEN)
def test_positions_are_those_of_get_rope_index(models, records, family):
    policy, encoder = models[family]
    for record in records:
        prompt = encoder.prompt(record)
        ids = torch.cat([prompt.ids, torch.tensor([encoder.end_id] * 3)])[None]  # a reply of three tokens behind it
        kinds = (ids == encoder.image_id).long()
        expected, _ = policy.hf.model.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=prompt.grids)
        assert torch.equal(prompt.positions, expected[:, 0, :-3])
        assert expected[:, 0, -3:].tolist() == [[prompt.next, prompt.next + 1, prompt.next + 2]] * 3


def test_pictures_come_first_unless_the_prompt_has_markers(models, gallery):
    _, encoder = models["qwen2_5_vl"]
    frame = "<|vision_start|><|image_pad|><|vision_end|>"
    turn = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n".format
    two = gallery["rgb"], gallery["grey"]
    assert encoder.chat(question("Which?", *two)) == turn(f"{frame}{frame}Which?")
    assert encoder.chat(question("A <image>, B <image>", *two)) == turn(f"A {frame}, B {frame}")
    assert encoder.chat(question("No picture")) == turn("No picture")


def test_without_a_chat_template_a_prompt_is_a_plain_dialogue(tiny_dirs, gallery, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").unlink()
    _, encoder = model.load(tmp_path / "base", CPU)
    frame = "<|vision_start|><|image_pad|><|vision_end|>"
    assert encoder.chat(question("Why? <image> Why?", gallery["rgb"])) == f"User: Why? {frame} Why?\nAssistant:"
    assert encoder.chat(question("Why?", gallery["rgb"])) == f"User: {frame}Why?\nAssistant:"
    assert encoder.chat(question("Why?")) == "User: Why?\nAssistant:"
    assert int((encoder.prompt(question("Why?", gallery["exact"])).ids == encoder.image_id).sum()) == 8 * 16


def test_a_chat_template_in_a_json_file_beside_the_tokenizer_is_found(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "old")
    template = (tmp_path / "old/chat_template.jinja").read_text()
    (tmp_path / "old/chat_template.jinja").unlink()
    (tmp_path / "old/chat_template.json").write_text(json.dumps({"chat_template": template}))
    _, encoder = model.load(tmp_path / "old", CPU)
    assert encoder.chat(question("Why?")) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("text", ["a <|image_pad|> b", "a <|video_pad|> b", "<image> <|image_pad|>"])
def test_image_tokens_in_a_prompts_own_words_are_refused(models, gallery, text):
    _, encoder = models["qwen2_5_vl"]
    images = [gallery["rgb"]] if "<image>" in text else []
    with pytest.raises(DataError, match=r"^exam.jsonl:7: .*image or video tokens"):
        encoder.prompt(question(text, *images))


def test_a_prompt_longer_than_the_model_is_refused_not_truncated(models, gallery):
    _, encoder = models["qwen2_5_vl"]
    with pytest.raises(DataError, match=r"^exam.jsonl:7: \d+ prompt tokens, the model takes 4096"):
        encoder.prompt(question("light " * 4096, gallery["rgb"]))


# ---------------------------------------------------------------------------------------------------------------------
# Replies


@pytest.mark.parametrize(
    "text",
    [
        "<think>1 is lighter.</think><answer>A</answer>",
        "  two  spaces ,and . a !\n\n\ttab\r\n",
        "do n't  , it 's we 're",
        "naïve 中文 🙂 ½ \u200b \x00",
        "",
        "<|im_start|>user\nWhat?<|im_end|>\n<|endoftext|> more",
    ],
)
def test_a_reply_survives_encoding_and_decoding_with_every_special_token_visible(models, text):
    _, encoder = models["qwen2_5_vl"]
    ids = encoder.encode_reply(text)
    assert ids.dtype == torch.long and int(ids[-1]) == encoder.end_id == encoder.tokenizer.eos_token_id
    assert encoder.decode(ids) == text
    assert encoder.decode(ids.tolist()) == text
    assert encoder.decode(ids[:-1]) == text, "a truncated reply"


def test_only_the_end_token_itself_is_dropped_from_a_decoded_reply(models):
    _, encoder = models["qwen2_5_vl"]
    end, other = encoder.end_id, encoder.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    letter = encoder.tokenizer.convert_tokens_to_ids("A")
    assert encoder.decode([letter, end]) == "A"
    assert encoder.decode([letter, end, end]) == "A<|im_end|>"
    assert encoder.decode([letter, other]) == "A<|endoftext|>"
    assert encoder.decode([end]) == encoder.decode([]) == ""


@pytest.mark.parametrize("token", ["<|image_pad|>", "<|video_pad|>"])
def test_a_reply_that_holds_pads_is_refused_because_no_model_may_say_it(models, token):
    _, encoder = models["qwen2_5_vl"]
    with pytest.raises(DataError, match="image or video tokens"):
        encoder.encode_reply(f"I see {token}.")
