"""Images are read as a viewer shows them, bad files refused in one line, and pixels kept."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from config import UserError
from data import Packed, Sample
from sources import images as module
from sources import phantoms
from sources.images import Images, jitter, open_image, to_rgb
from tests.sources.written import npz

RED, GREEN, BLUE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0)
PATTERN = np.zeros((16, 32, 3), np.uint8)  # it has no symmetry
PATTERN[:, :16], PATTERN[:, 16:], PATTERN[:8, :8] = RED, BLUE, GREEN
EXACT = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}


def save(path, image, **more):
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(path, **EXACT.get(path.suffix[1:], {}), **more)
    return path


def read(path):
    image = open_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "webp", "gif", "jpg"])
def test_every_format_is_known_by_its_content_and_shows_its_first_frame(tmp_path, ending):
    frames = {"save_all": True, "append_images": [Image.new("RGB", (32, 16), GREEN)]}
    path = save(tmp_path / f"a.{ending}", PATTERN, **(frames if ending in ("gif", "tiff") else {}))
    path = path.rename(tmp_path / "a.image")
    np.testing.assert_allclose(read(path), PATTERN, atol=4 * (ending == "jpg"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    with pytest.raises(UserError, match=rf"^image {path}: (cannot be|not a) read[^\n]*$"):
        open_image(path)


def test_what_is_transparent_lies_on_black_and_a_cmyk_jpeg_is_not_a_negative(tmp_path):
    path = save(tmp_path / "a.png", np.uint8([[[200, 100, 50, 128]]]))
    np.testing.assert_array_equal(read(path), [[(100, 50, 25)]])
    image = Image.frombytes("P", (2, 1), bytes([0, 1]))
    image.putpalette([*RED, *GREEN])
    path = save(tmp_path / "b.png", image, transparency=1)
    np.testing.assert_array_equal(read(path), [[RED, BLACK]])
    path = save(tmp_path / "c.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)))
    np.testing.assert_allclose(read(path)[8, 8], (0, 255, 255), atol=3)


@pytest.mark.parametrize(
    ("ending", "mode", "dtype"),
    [("png", "I;16", "<u2"), ("tiff", "I", "<i4"), ("tiff", "F", "<f4")],
)
def test_deep_grey_is_stretched_not_clipped(tmp_path, ending, mode, dtype):
    values = np.array([[1000, 2000], [3000, 5000]], dtype)
    path = save(tmp_path / f"a.{ending}", Image.frombytes(mode, (2, 2), values.tobytes()))
    with Image.open(path) as image:
        assert image.mode == mode
    assert read(path)[..., 0].tolist() == [[0, 64], [128, 255]]


def test_a_float_image_may_be_constant_or_hold_nan():
    holes = [np.nan, 1, 2, np.inf]
    for values, expected in (([7, 7], [0, 0]), ([np.nan], [0]), (holes, [0, 0, 255, 0])):
        image = to_rgb(Image.fromarray(np.array([values], np.float32)))
        assert np.asarray(image)[0, :, 0].tolist() == expected


@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_exif_orientation_is_undone_and_broken_exif_data_ignored(tmp_path, ending):
    change, exif = Image.Transpose, Image.Exif()
    for i, stored_as in enumerate(  # the reverse of what a viewer does to orientations 2 .. 8
        [change.FLIP_LEFT_RIGHT, change.ROTATE_180, change.FLIP_TOP_BOTTOM, change.TRANSPOSE,
         change.ROTATE_90, change.TRANSVERSE, change.ROTATE_270]):  # fmt: skip
        exif[0x0112] = i + 2
        turned = Image.fromarray(PATTERN).transpose(stored_as)
        np.testing.assert_allclose(
            read(save(tmp_path / f"a.{ending}", turned, exif=exif)), PATTERN, atol=4
        )
    broken = b"Exif\x00\x00MM\x00*\xff\xff\xff\xffxx"
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", PATTERN, exif=broken)), PATTERN)


def png(width, height):
    """The beginning of a PNG that claims a size, with hardly any data behind it."""

    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    claim = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + claim + chunk(b"IDAT", zlib.compress(bytes(1000)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"this is not an image", "not a readable image"),
        (b"P6 1 1 255 abc", "not a readable image"),  # Pillow could, but is not asked to
        (png(0, 5), "read"),
        (png(1, 101), "1 x 101 pixels: a side is over 100 times"),
        (png(2, 200), "truncated"),  # not too thin
        (png(50_000_001, 1), "claims 50000001 x 1 pixels; at most 50000000"),
        (png(5_000_000, 10), "a side is over 100 times"),  # not too many
        (png(7072, 7072), "pixels; at most"),
        (png(20_000, 20_000), "pixels) exceeds"),  # an error in Pillow
    ],
)
def test_what_is_no_image_is_refused_with_file_and_reason(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    for file, found in (
        (tmp_path / "a.png", f"[^\n]*{re.escape(reason)}[^\n]*"),
        (tmp_path, "is not a file"),
        (tmp_path / "b.png", "no such file"),
    ):
        with pytest.raises(UserError, match=rf"^image {file}: {found}$"):
            open_image(file)


def sample(image):
    return Sample("", "", "", image, ())


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_every_kind_are_the_same_read_ahead_or_not(tmp_path, workers):
    npz(tmp_path, "pneumoniamnist", [0, 1])
    (tmp_path / "bad.png").write_bytes(b"no image")
    kinds = [Packed(tmp_path / "pneumoniamnist.npz", "test", 1), save(tmp_path / "x.png", PATTERN),
             5, tmp_path / "bad.png", None]  # fmt: skip
    images = Images(16, workers=workers)
    for _ in range(2):
        images.prefetch([sample(image) for image in kinds * 2])
        assert len(images.coming) == (4 if workers else 0)
    packed, file, drawn = (images.get(sample(image)) for image in kinds[:3])
    assert packed.shape == (3, 16, 16) and not packed.any()
    assert torch.equal(file, module.square(Image.fromarray(PATTERN), 16, pad=True))
    assert np.array_equal(drawn.permute(1, 2, 0), phantoms.draw(5, 16).image)
    assert drawn.is_contiguous() and images.get(sample(5)) is drawn
    with pytest.raises(UserError, match=r"bad\.png: not a readable image"):  # when it is used
        images.get(sample(kinds[3]))
    images.prefetch([sample(5)])
    assert not images.coming


def test_an_image_is_kept_while_there_is_room_and_cropped_without_padding(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CACHE_BYTES", 3 * 16 * 16 * 2 - 1)  # of two images less a byte
    images = Images(16, pad=False)
    a, b = (sample(save(tmp_path / f"{name}.png", PATTERN)) for name in "ab")
    assert torch.equal(images.get(a), torch.from_numpy(PATTERN[:, 8:24]).permute(2, 0, 1))
    assert images.get(b) is not images.get(b) and images.get(a) is images.get(a)
    monkeypatch.undo()
    assert Images(100).room == 50_000


def test_jitter_rotates_zooms_shifts_and_brightens_each_image_by_itself():
    """Bilinear sampling is exact on an image whose channels are x, y and 1."""
    centres = (torch.arange(32.0) + 0.5) / 16 - 1  # of pixels; the image runs from -1 to 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    images = torch.stack([x, y, torch.ones_like(x)]).expand(5, 3, 32, 32)
    torch.manual_seed(0)
    found = jitter(images)
    torch.manual_seed(0)
    drawn = (torch.rand(6, 5, 1) * 2 - 1)[..., 0].T.tolist()
    assert len(drawn) == len(found) == 5
    for image, (angle, zoom, dx, dy, gain, lift) in zip(found, drawn, strict=True):
        cos, sin, zoom = np.cos(0.15 * angle), np.sin(0.15 * angle), 1 + 0.12 * zoom
        moved = zoom * (cos * x - sin * y) + 0.12 * dx, zoom * (sin * x + cos * y) + 0.12 * dy
        edge = centres[-1]  # beyond it the border goes on
        expected = torch.stack([*(z.clamp(-edge, edge) for z in moved), images[0, 2]])
        assert torch.allclose(image, expected * (1 + 0.15 * gain) + 0.15 * lift, atol=1e-5)
