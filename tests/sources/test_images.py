"""Images are read as a viewer shows them, bad files refused in one line, and pixels kept."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from data import Packed, Sample
from sources import phantoms
from sources.images import Images, jitter, open_image, square
from tests.sources.written import npz, refused

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
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


@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "gif", "jpg"])
def test_every_format_is_known_by_its_content_and_shows_its_first_frame(tmp_path, ending):
    frames = {"save_all": True, "append_images": [Image.new("RGB", (32, 16), GREEN)]}
    path = save(tmp_path / f"a.{ending}", PATTERN, **(frames if ending in ("gif", "tiff") else {}))
    path = path.rename(tmp_path / "a.image")
    np.testing.assert_allclose(read(path), PATTERN, atol=4 * (ending == "jpg"))


def test_a_transparent_cmyk_deep_grey_or_turned_image_is_shown_as_a_viewer_does(tmp_path):
    path = save(tmp_path / "a.png", np.uint8([[[200, 100, 50, 128]]]))
    np.testing.assert_array_equal(read(path), [[(100, 50, 25)]])  # on black
    path = save(tmp_path / "a.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)))
    np.testing.assert_allclose(read(path)[8, 8], (0, 255, 255), atol=3)  # no negative
    values = np.array([[1000, 2000], [3000, 5000]], "<u2").tobytes()
    path = save(tmp_path / "a.png", Image.frombytes("I;16", (2, 2), values))
    assert read(path)[..., 0].tolist() == [[0, 64], [128, 255]]  # stretched, not clipped
    deep = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    deep[5, 5] = 65535  # one bad pixel
    assert 250 < read(save(tmp_path / "a.png", deep))[99, 99].mean() <= 255
    mask = np.zeros((100, 100), np.uint16)
    mask[0, :2] = 3, 7  # fewer than are left out
    assert read(save(tmp_path / "a.png", mask))[0, :3, 0].tolist() == [109, 255, 0]
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = Image.fromarray(PATTERN).transpose(Image.Transpose.ROTATE_90)
    np.testing.assert_array_equal(read(save(tmp_path / "a.png", turned, exif=exif)), PATTERN)
    plain = save(tmp_path / "a.tiff", turned.convert("L"), exif=exif)
    np.testing.assert_array_equal(
        read(plain), np.asarray(Image.fromarray(PATTERN).convert("L").convert("RGB"))
    )


@pytest.mark.parametrize("kind", ["bool", "u1", "<u2", "<f4"])
def test_a_tiff_whose_white_is_zero_is_no_negative(tmp_path, kind):
    file = save(tmp_path / "a.tiff", (np.arange(16).reshape(4, 4) % 4).astype(kind))
    black_is_zero, tag = read(file), struct.pack("<HHI", 262, 3, 1)
    file.write_bytes(file.read_bytes().replace(tag + b"\1", tag + b"\0"))
    assert black_is_zero[0, 0].max() == 0 and black_is_zero[0, 1].min() > 0
    np.testing.assert_array_equal(read(file), 255 - black_is_zero)


def test_what_is_no_image_or_claims_too_much_is_refused_with_file_and_reason(tmp_path):
    file, contents = tmp_path / "a.png", [(b"", "is empty"), (b"P6 1 1 255 abc", "not a readable")]
    for size, reason in (
        ((1, 101), "1 x 101 pixels: a side is over 100 times"), ((2, 200), "truncated"),
        ((50_000_001, 1), "claims 50000001 x 1 pixels"), ((5_000_000, 10), "a side is over 100"),
    ):  # fmt: skip
        Image.new("1", size).save(file)
        contents.append((file.read_bytes()[:50], reason))  # hardly any data
    for content, reason in contents:
        file.write_bytes(content)
        refused(rf"^image {file}: [^\n]*{reason}", open_image, file)
    refused("image nowhere: no such file", open_image, "nowhere")


def sample(image):
    return Sample("", "", "", image, ())


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_every_kind_are_read_ahead_and_kept(tmp_path, workers):
    npz(tmp_path, "pneumoniamnist", [0, 1])
    (tmp_path / "bad.png").write_bytes(b"no image")
    kinds = [Packed(tmp_path / "pneumoniamnist.npz", "test", 1), save(tmp_path / "x.png", PATTERN),
             5, tmp_path / "bad.png", None]  # fmt: skip
    images = Images(16, workers=workers)
    assert images.room == 1_500_000_000 // (3 * 16 * 16)
    images.room = 3
    for _ in range(2):
        images.prefetch([sample(image) for image in kinds * 2])
        assert len(images.coming) == (4 if workers else 0)
    packed, file, drawn = (images.get(sample(image)) for image in kinds[:3])
    assert packed.shape == (3, 16, 16) and not packed.any()
    assert torch.equal(file, square(Image.fromarray(PATTERN), 16, pad=True))
    assert np.array_equal(drawn.permute(1, 2, 0), phantoms.draw(5, 16).image)
    assert images.get(sample(5)) is drawn
    other = sample(save(tmp_path / "y.png", PATTERN))
    assert images.get(other) is not images.get(other)  # there is no more room
    refused(r"bad\.png: not a readable image", images.get, sample(kinds[3]))  # when it is used
    images.prefetch([sample(5)])
    assert not images.coming


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
