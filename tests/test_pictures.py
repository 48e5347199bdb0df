"""Pictures are opened as a person sees them, in one place for trainer, samplers and jigsaw.py: pictures.py."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

import jigsaw
import model
from pictures import as_seen, open_picture, picture_size
from records import write_jsonl

# Left to right from black to white, top to bottom the same: what each file below shows on a screen.
RAMP = np.linspace(0, 1, 64)[None].repeat(32, 0)  # (H, W), 1 is white
GREY = np.round(RAMP * 255).astype(np.uint8)


def saved(folder, name, image, **options):
    image.save(folder / name, **options)
    return folder / name


def levels(path):
    return np.asarray(open_picture(path)).astype(int)


FILES = {
    "8 bits": ("a.png", lambda: Image.fromarray(GREY)),
    "16 bits, PNG": ("a.png", lambda: Image.fromarray(np.round(RAMP * 65535).astype(np.uint16))),
    "16 bits, TIFF": ("a.tif", lambda: Image.fromarray(np.round(RAMP * 65535).astype(np.uint16))),
    "32 bits, TIFF, as large as 16": ("a.tif", lambda: Image.fromarray(np.round(RAMP * 65535).astype(np.int32))),
    "32 bits, TIFF, larger": ("a.tif", lambda: Image.fromarray(np.round(RAMP * 2**30).astype(np.int32))),
    "fractions, TIFF, up to 1": ("a.tif", lambda: Image.fromarray(RAMP.astype(np.float32))),
    "fractions, TIFF, up to 255": ("a.tif", lambda: Image.fromarray((RAMP * 254.5).astype(np.float32))),
    "palette": ("a.png", lambda: Image.fromarray(GREY).convert("P")),
    "colour": ("a.png", lambda: Image.fromarray(GREY).convert("RGB")),
    "print colours": ("a.tif", lambda: Image.fromarray(GREY).convert("RGB").convert("CMYK")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_ramp_from_black_to_white_is_one_whatever_the_file_stores(tmp_path, name):
    file, image = FILES[name]
    found = levels(saved(tmp_path, file, image()))
    assert found.shape == (32, 64, 3)
    assert np.abs(found - GREY[..., None].astype(int)).max() <= 2, name


def test_a_dark_picture_stays_dark():
    assert np.asarray(as_seen(Image.fromarray(np.full((4, 4), 200, np.int32)))).max() == 200
    assert np.asarray(as_seen(Image.fromarray(np.full((4, 4), 1, np.int32)))).max() == 1
    assert np.asarray(as_seen(Image.fromarray(np.full((4, 4), 0, np.float32)))).max() == 0


def test_what_is_negative_or_no_number_is_black():
    values = np.array([[np.nan, np.inf, -5.0, 0.5]], np.float32)
    assert np.asarray(as_seen(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 0, 128]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    picture = Image.new("RGBA", (8, 4), (0, 0, 0, 0))  # black under full transparency
    picture.paste((200, 0, 0, 255) if mode == "RGBA" else (90, 90, 90, 255), (0, 0, 4, 4))
    if mode == "P":
        picture = Image.new("P", (8, 4), 1)
        picture.putpalette([90, 90, 90, 0, 0, 0])
        picture.paste(0, (0, 0, 4, 4))
        path = saved(tmp_path, "a.png", picture, transparency=1)
        assert Image.open(path).mode == "P"
    else:
        path = saved(tmp_path, "a.png", picture.convert(mode))
    found = np.asarray(open_picture(path))
    assert found[0, 7].tolist() == [255, 255, 255]
    assert found[0, 0].tolist() == ([200, 0, 0] if mode == "RGBA" else [90, 90, 90])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_camera_says_and_its_size_too(tmp_path, orientation):
    corner = Image.new("RGB", (40, 20), "black")
    corner.paste("white", (0, 0, 10, 10))  # upper left, as stored
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, "a.png", corner, exif=exif)
    found = open_picture(path)
    assert found.size == picture_size(path) == ((40, 20) if orientation < 5 else (20, 40))
    # Where the stored upper left corner is shown, in the eight cases of the Exif standard.
    right, bottom = orientation in (2, 3, 6, 7), orientation in (3, 4, 7, 8)
    width, height = found.size
    assert found.getpixel((width - 3 if right else 2, height - 3 if bottom else 2)) == (255, 255, 255)


def test_encoder_sampler_and_jigsaw_see_the_same(tmp_path, models):
    wide = np.round(np.linspace(0, 1, 140)[None].repeat(56, 0) * 65535).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    deep = saved(tmp_path, "deep.png", Image.fromarray(wide))
    turned = saved(tmp_path, "turned.png", Image.fromarray(GREY).resize((112, 56)), exif=exif)
    for path in (deep, turned):
        _, encoder = models["qwen2_5_vl"]
        width, height = picture_size(path)
        shown = jigsaw.load_picture(path, None)
        assert np.asarray(shown).std() > 50, "a picture, not a white or black field"
        assert encoder.family.resize(shown).tobytes() == encoder.image(str(path)).tobytes()
        pixels, grid = encoder.picture(str(path))
        assert grid.tolist() == list(encoder.family.grid(width, height))
        assert torch.equal(pixels, torch.from_numpy(encoder.family.pixels(encoder.family.resize(shown))))


def test_a_turned_picture_takes_as_many_tokens_as_were_counted_from_its_header(tmp_path, models):
    exif = Image.Exif()
    exif[0x0112] = 8
    saved(tmp_path, "a.png", Image.new("RGB", (140, 56), "red"), exif=exif)
    record = {"id": "a", "images": ["a.png"], "prompt": "What?", "answer": "A", "answer_type": "letter"}
    write_jsonl(tmp_path / "r.jsonl", [record | {"think": False, "source": "s"}])
    for _, encoder in models.values():
        (read,) = model.read_records(tmp_path / "r.jsonl")
        assert len(encoder.prompt(read).ids) == encoder.length(read)


def test_a_puzzle_of_a_transparent_picture_is_that_of_what_is_seen():
    drawn = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    drawn.paste((10, 200, 30, 255), (0, 0, 40, 20))
    found, _ = jigsaw.make_puzzle(as_seen(drawn), 2, 1, "pair", random.Random(0))
    assert {tuple(pixel) for pixel in np.asarray(found).reshape(-1, 3).tolist()} == {(10, 200, 30), (255, 255, 255)}
