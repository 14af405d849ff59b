"""Image files are read as a viewer shows them, and bad ones are refused in one line.

python -m pytest tests/sources/test_images.py
"""

import resource
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import vision
from config import UserError
from sources.images import open_image, to_rgb
from vision import normalise, square

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (120, 120, 120)


def read(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def pattern(width=32, height=16):
    """Left half red, right half blue, the top left eighth green: it has no symmetry."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = RED, BLUE
    pixels[: height // 2, : width // 4] = GREEN
    return pixels


def palette(path, **extra):
    image = Image.new("P", (2, 1))
    image.putpalette([*RED, *GREEN])
    image.putpixel((1, 0), 1)
    image.save(path, **extra)


def header(width, height):
    """The beginning of a PNG that claims a size, with hardly any data behind it."""

    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    claim = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + claim + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "webp", "gif"])
def test_lossless_formats_give_back_the_pixels(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    extra = {"lossless": True} if ending == "webp" else {}
    Image.fromarray(pattern()).save(path, **extra)
    np.testing.assert_array_equal(read(path), pattern())


def test_the_name_of_a_file_does_not_decide_its_format(tmp_path):
    Image.fromarray(pattern()).save(tmp_path / "a.jpg", format="PNG")
    np.testing.assert_array_equal(read(tmp_path / "a.jpg"), pattern())


def test_a_palette_is_applied(tmp_path):
    palette(tmp_path / "a.png")
    assert read(tmp_path / "a.png").tolist() == [[list(RED), list(GREEN)]]


def test_a_transparent_palette_colour_is_black(tmp_path):
    palette(tmp_path / "a.png", transparency=1)
    assert read(tmp_path / "a.png").tolist() == [[list(RED), [0, 0, 0]]]


def test_a_transparent_colour_without_palette_is_black(tmp_path):
    Image.fromarray(np.array([[RED, GREEN]], np.uint8)).save(tmp_path / "a.png", transparency=RED)
    assert read(tmp_path / "a.png").tolist() == [[[0, 0, 0], list(GREEN)]]


def test_half_transparent_colours_lie_on_black(tmp_path):
    Image.fromarray(np.array([[[200, 100, 50, 128]]], np.uint8)).save(tmp_path / "a.png")
    np.testing.assert_allclose(read(tmp_path / "a.png")[0, 0], [100, 50, 25], atol=1)


def test_grey_with_alpha_lies_on_black(tmp_path):
    image = Image.merge("LA", [Image.new("L", (1, 1), 200), Image.new("L", (1, 1), 0)])
    image.save(tmp_path / "hidden.png")
    assert read(tmp_path / "hidden.png").tolist() == [[[0, 0, 0]]]
    image.putalpha(255)
    image.save(tmp_path / "seen.png")
    assert read(tmp_path / "seen.png").tolist() == [[[200, 200, 200]]]


def test_one_bit_is_black_and_white(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png")[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize(
    "ink,colour", [((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 255), (0, 0, 0))]
)
def test_cmyk_jpeg_is_not_a_negative(tmp_path, ink, colour):
    Image.new("CMYK", (16, 16), ink).save(tmp_path / "a.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()  # which means: stored inverted
    np.testing.assert_allclose(read(tmp_path / "a.jpg")[8, 8], colour, atol=3)


@pytest.mark.parametrize("ending,mode", [("png", "I;16"), ("tiff", "I;16"), ("tiff", "I;16B")])
def test_16_bit_grey_is_stretched_not_clipped(tmp_path, ending, mode):
    values = np.array([[1000, 2000], [3000, 5000]], ">u2" if mode.endswith("B") else "<u2")
    path = tmp_path / f"a.{ending}"
    Image.frombytes(mode, (2, 2), values.tobytes()).save(path)
    with Image.open(path) as image:
        assert image.mode == mode
    assert read(path)[..., 0].tolist() == [[0, 64], [128, 255]]


@pytest.mark.parametrize("dtype,mode", [(np.int32, "I"), (np.float32, "F")])
def test_32_bit_and_float_grey_are_stretched(tmp_path, dtype, mode):
    Image.fromarray(np.array([[-1000, 0, 1000]], dtype)).save(tmp_path / "a.tiff")
    with Image.open(tmp_path / "a.tiff") as image:
        assert image.mode == mode
    assert read(tmp_path / "a.tiff")[0, :, 1].tolist() == [0, 128, 255]


def test_a_float_image_may_be_constant_or_hold_nan():
    flat = to_rgb(Image.fromarray(np.full((2, 2), 7, np.float32)))
    holed = to_rgb(Image.fromarray(np.array([[np.nan, 1, 2, np.inf]], np.float32)))
    assert np.asarray(flat).max() == 0
    assert np.asarray(holed)[0, :, 0].tolist() == [0, 0, 255, 0]


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "tiff"])
def test_the_first_of_several_frames_is_shown(tmp_path, ending):
    first, *others = (Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE))
    path = tmp_path / f"a.{ending}"
    extra = {"lossless": True} if ending == "webp" else {}
    first.save(path, save_all=True, append_images=others, **extra)
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert (read(path) == RED).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_exif_orientation_is_undone(tmp_path, orientation, ending):
    change = Image.Transpose
    stored_as = [  # the reverse of what a viewer does to orientations 2 .. 8
        *(None, change.FLIP_LEFT_RIGHT, change.ROTATE_180, change.FLIP_TOP_BOTTOM),
        *(change.TRANSPOSE, change.ROTATE_90, change.TRANSVERSE, change.ROTATE_270),
    ][orientation - 1]
    image = Image.fromarray(pattern())
    image = image if stored_as is None else image.transpose(stored_as)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    extra = {"quality": 100, "subsampling": 0} if ending == "jpg" else {}
    image.save(path, exif=exif, **extra)
    np.testing.assert_allclose(read(path), pattern(), atol=4)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_data_is_ignored(tmp_path):
    Image.fromarray(pattern()).save(
        tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00*\xff\xff\xff\xffxx"
    )
    np.testing.assert_array_equal(read(tmp_path / "a.png"), pattern())


def bad_files(folder):
    """Name -> a part of the reason. The files that need making are made."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    reasons = {
        "missing.png": "no such file",
        "folder.png": "is not a file",
        "empty.png": "is empty",
    }
    (folder / "folder.png").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("this is not an image")
    (folder / "vector.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.fromarray(noise).save(folder / "allowed_not.ppm")
    for name in ("text.png", "vector.svg", "page.eps", "allowed_not.ppm"):
        reasons[name] = "not a readable image (PNG, JPEG"
    for ending in ("png", "jpg", "webp", "bmp", "tiff", "gif"):
        path = folder / f"cut.{ending}"
        Image.fromarray(noise).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        reasons[path.name] = "read"  # "cannot be read" or "not a readable image", as it may be
    (folder / "thin.png").write_bytes(header(1, 101))
    reasons["thin.png"] = "1 x 101 pixels: a side is over 100 times the other"
    (folder / "none.png").write_bytes(header(0, 5))
    reasons["none.png"] = "read"
    return reasons


def test_what_is_not_a_complete_image_is_refused_with_file_and_reason(tmp_path):
    for name, reason in bad_files(tmp_path).items():
        with pytest.raises(UserError) as refused:
            open_image(tmp_path / name)
        message = str(refused.value)
        assert str(tmp_path / name) in message and reason in message and "\n" not in message, (
            message
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [7072, 10_000, 20_000])  # silence, a warning, an error in Pillow
def test_a_claim_of_too_many_pixels_is_refused_before_memory_is_allocated(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(header(side, side))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=r"bomb\.png: .*(pixels; at most|pixels\) exceeds)"):
        open_image(tmp_path / "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000  # KiB


@pytest.mark.parametrize("width,height", [(30, 20), (20, 30), (31, 20), (25, 25)])
def test_padding_centres_the_image_on_the_mean_colour(width, height):
    side = max(width, height)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = np.empty((side, side, 3), np.uint8)
    expected[:] = 122, 116, 104
    left, top = (side - width) // 2, (side - height) // 2
    expected[top : top + height, left : left + width] = pixels
    padded = square(Image.fromarray(pixels), side, pad=True)  # nothing to resize
    assert padded.shape == (3, side, side) and padded.dtype == torch.uint8
    np.testing.assert_array_equal(padded.permute(1, 2, 0), expected)
    small = Image.fromarray(expected).resize((16, 16), Image.Resampling.BICUBIC)
    got = square(Image.fromarray(pixels), 16, pad=True)
    np.testing.assert_array_equal(got.permute(1, 2, 0), np.asarray(small))


def test_cropping_takes_the_centre_and_rounds_its_corner_down():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 27, 3), dtype=np.uint8)
    wide = square(Image.fromarray(pixels), 20, pad=False).permute(1, 2, 0)
    tall = square(Image.fromarray(pixels.transpose(1, 0, 2)), 20, pad=False).permute(2, 1, 0)
    np.testing.assert_array_equal(wide, pixels[:, 3:23])
    np.testing.assert_array_equal(tall, pixels[:, 3:23])


@pytest.mark.parametrize("width,height", [(500, 333), (333, 500), (1000, 999), (7, 5), (336, 336)])
def test_cropping_follows_clip_image_processor(width, height):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    short, long = min(width, height), max(width, height)
    new_long = int(112 * long / short)  # its get_resize_output_image_size
    new = (112, new_long) if width <= height else (new_long, 112)
    resized = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    top, left = (new[1] - 112) // 2, (new[0] - 112) // 2  # its center_crop
    expected = resized[top : top + 112, left : left + 112]
    got = square(image, 112, pad=False).permute(1, 2, 0)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("pad", [True, False])
def test_a_very_long_image_is_shrunk_before_it_is_padded_to_a_square(monkeypatch, pad):
    pixels = np.random.default_rng(0).integers(0, 256, (150, 1200, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    shrunk = image.resize((400, 50), Image.Resampling.BICUBIC)
    at_once = square(image, 40, pad)
    monkeypatch.setattr(vision, "MAX_SIDE", 400)
    assert torch.equal(square(image, 40, pad), square(shrunk, 40, pad))
    assert not torch.equal(square(image, 40, pad), at_once)


def test_normalising_gives_clips_numbers():
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 4, 4)
    out = normalise(images)
    assert out.shape == (2, 3, 4, 4) and out.dtype == torch.float32
    np.testing.assert_allclose(out[0, :, 0, 0], [-1.79226, -1.75210, -1.48022], atol=1e-5)
    np.testing.assert_allclose(out[1, :, 3, 3], [1.93034, 2.07488, 2.14590], atol=1e-5)


def test_padding_is_next_to_nothing_after_normalising():
    band = square(Image.new("RGB", (40, 10)), 40, pad=True)[None, :, :5]
    assert normalise(band).abs().max() < 0.02
