"""Pictures are opened as a person sees them, in one place for trainer, samplers and jigsaw.py: pictures.py."""

import io
import os
import random
import socket
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo

import jigsaw
import model
from lazy_puzzles import Shown
from pictures import PictureError, as_seen, open_picture, picture_size
from records import DataError, read_records, write_jsonl

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
        assert encoder.family.resize(shown).tobytes() == encoder.images([Shown(str(path))])[0].tobytes()
        pixels, grid = encoder.picture(Shown(str(path)))
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

# ---------------------------------------------------------------------------------------------------------------------
# Files of all kinds: shown as a viewer shows them, or refused in one line


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_every_format_is_turned_once_and_its_header_says_the_same_size(tmp_path, suffix, orientation):
    corner = Image.new("RGB", (80, 40), "black")
    corner.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, f"a.{suffix}", corner, exif=exif)
    found = open_picture(path)
    assert found.size == picture_size(path) == ((80, 40) if orientation == 3 else (40, 80))
    width, height = found.size
    right, bottom = orientation in (3, 6), orientation in (3, 8)
    assert min(found.getpixel((width - 5 if right else 4, height - 5 if bottom else 4))) > 240


def png_header(width, height):
    """A PNG that says its size and has no pixels to speak of."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"\0" * 100)
    chunks = [header, data, b"IEND"]
    framed = [struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body)) for body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def bytes_of(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noisy_profile():
    """What old programs keep EXIF in: hexadecimal text, here of other letters."""
    profile = PngInfo()
    profile.add_text("Raw profile type exif", "\nexif\n  10\nzz")
    return profile


RED = Image.new("RGB", (60, 40), (200, 10, 30))
TWO_FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (60, 40), (10, 200, 30))]}
PALETTE = Image.new("P", (60, 40), 1)
PALETTE.putpalette([0, 0, 0, 200, 10, 30])

# What a viewer shows: all of them show RED.
SHOWN = {
    "an animated GIF, its first frame": ("a.gif", bytes_of(RED, "GIF", **TWO_FRAMES)),
    "an animated WebP, its first frame": ("a.webp", bytes_of(RED, "WEBP", lossless=True, **TWO_FRAMES)),
    "a JPEG named .png": ("a.png", bytes_of(RED, "JPEG", quality=95)),
    "a PNG without a suffix": ("a", bytes_of(RED, "PNG")),
    "print colours": ("a.jpg", bytes_of(RED.convert("CMYK"), "JPEG", quality=95)),
    "EXIF that is noise": ("a.jpg", bytes_of(RED, "JPEG", quality=95, exif=b"Exif\0\0" + bytes(range(200)))),
    "EXIF cut short": ("a.png", bytes_of(RED, "PNG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x09\x01")),
    "EXIF that ends in its header": ("a.png", bytes_of(RED, "PNG", exif=b"Exif\0\0MM\0*")),
    "EXIF of an unknown kind": ("a.webp", bytes_of(RED, "WEBP", lossless=True, exif=b"Exif\0\1ZZ\0*\0\0\0\x08\0\3")),
    "EXIF in letters that are none": ("a.png", bytes_of(RED, "PNG", pnginfo=noisy_profile())),
    "EXIF with an orientation of 99": ("a.jpg", bytes_of(RED, "JPEG", quality=95, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08"
     b"\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0\0\0\0\0")),
    "EXIF with text as orientation": ("a.jpg", bytes_of(RED, "JPEG", quality=95, exif=b"Exif\0\0MM\0\x2a\0\0\0\x08"
     b"\0\x01\x01\x12\0\x02\0\0\0\x04six\0\0\0\0\0")),
    "a palette with transparency of another length": ("a.png", bytes_of(PALETTE, "PNG", transparency=b"\xff\xff\xff")),
    "a palette whose transparent colour is not there": ("a.png", bytes_of(PALETTE, "PNG", transparency=77)),
    "text after the end": ("a.png", bytes_of(RED, "PNG") + b"<script>"),
}  # fmt: skip

# What is no picture, and what the message must say besides file and line.
REFUSED = {
    "SVG named .png": ("a.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "broken, or no image"),
    "HTML named .jpg": ("a.jpg", b"<html><body>not found</body></html>", "broken, or no image"),
    "PostScript, which needs a program": ("a.eps", bytes_of(RED, "EPS"), "broken, or no image"),
    "nothing": ("a.png", b"", "broken, or no image"),
    "a truncated PNG": ("a.png", bytes_of(RED, "PNG")[:-30], "broken"),
    "a truncated JPEG": ("a.jpg", bytes_of(Image.effect_noise((60, 40), 50), "JPEG")[:500], "broken"),
    "a truncated GIF": ("a.gif", bytes_of(Image.effect_noise((60, 40), 50), "GIF")[:900], "broken"),
    "a header without pixels": ("a.png", png_header(500, 500), "broken"),
    "a large picture": ("a.png", png_header(9_000, 13_000), "has 9000 x 13000 pixels, more than --max-image-pixels"),
    "a larger one": ("a.png", png_header(13_000, 13_000), "has far more pixels than --max-image-pixels 67108864"),
    "a bomb": ("a.png", png_header(2**31 - 1, 2**31 - 1), "has far more pixels than --max-image-pixels"),
    "no width": ("a.png", png_header(0, 10), "broken"),
}


def one_record(folder, name):
    record = {"id": "a", "images": [name], "prompt": "What?", "answer": "A", "answer_type": "letter"}
    write_jsonl(folder / "r.jsonl", [record | {"think": False, "source": "s"}])
    return folder / "r.jsonl"


@pytest.mark.parametrize("name", SHOWN)
def test_it_is_shown_as_a_viewer_shows_it(tmp_path, models, name, capfd):
    file, data = SHOWN[name]
    (tmp_path / file).write_bytes(data)
    with warnings.catch_warnings(record=True) as warned:
        (record,) = read_records(one_record(tmp_path, file))
        found = np.asarray(open_picture(tmp_path / file)).astype(int)
        prompt = models["qwen2_5_vl"][1].prompt(record)
    assert found.shape == (40, 60, 3) and torch.isfinite(prompt.pixels).all()
    # JPEG is not exact, and neither are print colours.
    assert np.abs(found - np.array([200, 10, 30])).max() <= 12
    assert warned == [] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line_that_names_file_and_line(tmp_path, name, capfd):
    file, data, words = REFUSED[name]
    (tmp_path / file).write_bytes(data)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(DataError) as caught:
        read_records(one_record(tmp_path, file))
    message = str(caught.value)
    assert message.startswith(f'{tmp_path / "r.jsonl"}:1: image "{tmp_path / file}" ') and words in message
    assert "\n" not in message and "\0" not in message
    assert warned == [] and capfd.readouterr() == ("", "")


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def make_loop(path):
    path.symlink_to(path)


ODD_FILES = {
    "a pipe": make_pipe,
    "a socket": make_socket,
    "a folder": Path.mkdir,
    "an endless device": lambda path: path.symlink_to("/dev/zero"),
    "an empty device": lambda path: path.symlink_to("/dev/null"),
    "a link to itself": make_loop,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", ODD_FILES)
def test_what_is_no_file_is_refused_without_being_opened(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)  # a socket's path must be short
    ODD_FILES[name](Path("a.png"))
    with pytest.raises(DataError, match=r"^.*r.jsonl:1: image .* is (broken|missing)") as caught:
        read_records(one_record(tmp_path, "a.png"))
    assert "\n" not in str(caught.value)
    with pytest.raises(PictureError, match="a.png"):
        picture_size("a.png")


def test_a_size_is_known_before_any_pixel_is_decoded(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.png", "a.jpg", "a.webp"):
        saved(tmp_path, name, Image.new("RGB", (60, 40), (1, 2, 3)), exif=exif)
    # As other programs write PNG: what says how it is turned stands behind the pixels.
    data = (tmp_path / "a.png").read_bytes()
    begin, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    length = 12 + int.from_bytes(data[begin : begin + 4], "big")
    behind = data[:begin] + data[begin + length : end] + data[begin : begin + length] + data[end:]
    (tmp_path / "behind.png").write_bytes(behind)
    assert picture_size(tmp_path / "behind.png") == open_picture(tmp_path / "behind.png").size == (40, 60)

    saved(tmp_path, "plain.png", Image.new("RGB", (60, 40)))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("pixels were decoded"))
    assert picture_size(tmp_path / "plain.png") == (60, 40)
    for name in ("a.png", "a.jpg", "a.webp"):
        assert picture_size(tmp_path / name) == (40, 60)


def test_a_link_to_a_picture_is_a_picture(tmp_path):
    saved(tmp_path, "a.png", RED)
    (tmp_path / "b.png").symlink_to("a.png")
    assert open_picture(tmp_path / "b.png").tobytes() == RED.tobytes()


def test_the_largest_picture_is_a_setting_of_reader_and_encoder(tmp_path, tiny_dirs, models):
    saved(tmp_path, "a.png", RED)
    path = one_record(tmp_path, "a.png")
    (record,) = read_records(path, max_image_pixels=60 * 40)
    with pytest.raises(DataError, match=r"60 x 40 pixels, more than --max-image-pixels 2399$"):
        read_records(path, max_image_pixels=60 * 40 - 1)
    with pytest.raises(PictureError, match="more than --max-image-pixels 2399"):
        jigsaw_sees = open_picture(tmp_path / "a.png", 60 * 40 - 1)
        assert not jigsaw_sees
    policy, encoder = models["qwen2_5_vl"]
    small = model.Encoder(tiny_dirs["qwen2_5_vl"], policy.family, policy.hf, max_image_pixels=60 * 40 - 1)
    unread = {name: value for name, value in record.items() if name != "_sizes"}
    for ask in (lambda: small.length(unread), lambda: small.prompt(record)):
        with pytest.raises(DataError, match="^.*r.jsonl:1: .*more than --max-image-pixels 2399$"):
            ask()
    with pytest.raises(PictureError):
        small.images([Shown(record["images"][0])])
    assert encoder.length(record) > 1


def test_a_large_picture_is_read_if_asked_for(tmp_path):
    # Above what Pillow itself would refuse; black and white, so that the test needs little memory.
    wide = saved(tmp_path, "a.png", Image.new("1", (200_000, 1000)))
    with warnings.catch_warnings(record=True) as warned:
        assert picture_size(wide, 2 * 10**8) == (200_000, 1000)
    assert warned == []
    with pytest.raises(PictureError, match="far more pixels than --max-image-pixels 67108864"):
        picture_size(wide)


@pytest.mark.parametrize("size", [(1, 1), (1, 190), (3, 2), (199, 1)])
def test_small_pictures_are_encoded(tmp_path, models, size):
    saved(tmp_path, "a.png", Image.new("RGB", size, "red"))
    (record,) = read_records(one_record(tmp_path, "a.png"))
    for _, encoder in models.values():
        prompt = encoder.prompt(record)
        assert len(prompt.ids) == encoder.length(record) and torch.isfinite(prompt.pixels).all()


def test_a_strip_is_refused_by_name_where_the_family_takes_none(tmp_path, models):
    saved(tmp_path, "a.png", Image.new("RGB", (1, 20_000), "red"))
    (record,) = read_records(one_record(tmp_path, "a.png"))
    for family, (_, encoder) in models.items():
        if family == "internvl":
            assert len(encoder.prompt(record).ids) == encoder.length(record)
            continue
        with pytest.raises(DataError) as caught:
            encoder.length(record)
        message = str(caught.value)
        assert message.startswith(f'{tmp_path / "r.jsonl"}:1: image "{tmp_path / "a.png"}" cannot be encoded')
        assert "aspect ratio must be smaller than 200" in message


def test_a_picture_that_vanishes_or_changes_during_training_is_one_line(tmp_path, models):
    _, encoder = models["qwen2_5_vl"]
    saved(tmp_path, "a.png", RED)
    (record,) = read_records(one_record(tmp_path, "a.png"))
    encoder.measure(record)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match='^.*r.jsonl:1: image ".*a.png" is missing$'):
        encoder.prompt(record)
