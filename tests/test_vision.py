"""Images become pixels as in LLaVA, pixels patch features as in CLIP before its last layer."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests import reference
from tests.conftest import VISION, close, randn, shake
from tests.golden.make import ours, outputs
from vision import VisionTower, attention, normalise, square


def test_the_tower_equals_its_equations_and_transformers():
    tower, images = shake(VisionTower(VISION)).eval(), randn(3, 3, 32, 32)
    expected = torch.stack([reference.tower(tower, image, VISION.n_heads) for image in images])
    close(tower.hidden(images), expected)
    close(tower(images), expected[:, 1:])  # without the CLS token
    golden = outputs("clip")  # the hidden state of transformers before the last layer
    assert golden["hidden"].shape == (2, 17, 32)
    close(ours("phi").vision.hidden(golden["images"]), golden["hidden"])


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_and_its_gradients_equal_its_equation(is_masked):
    q, k, v = (randn(2, 3, n, 8, seed=n).requires_grad_() for n in (5, 7, 7))
    allowed = randn(2, 1, 5, 7) > 0 if is_masked else torch.ones(2, 1, 5, 7).bool()
    allowed[..., 2] = True
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, float("-inf")) if is_masked else None
    heads = [reference.attention(q[b, h], k[b, h], v[b, h], allowed[b, 0])
             for b in range(2) for h in range(3)]  # fmt: skip
    expected = torch.stack(heads).unflatten(0, (2, 3))
    close(attention(q, k, v, mask), expected)
    close(attention(q.detach(), k, v, mask), expected)
    found = torch.autograd.grad(attention(q, k, v, mask).sin().sum(), (q, k, v))
    close(found, torch.autograd.grad(expected.sin().sum(), (q, k, v)))
    for needs_grad in (False, True):
        halves = [t.detach().bfloat16().requires_grad_(needs_grad) for t in (q, k, v)]
        close(attention(*halves, mask), expected.bfloat16(), 0.03)


def noise(width, height):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_an_image_is_padded_with_clips_mean_colour_or_cut_out_and_normalised_as_published():
    bicubic = Image.Resampling.BICUBIC
    for size, place in (((10, 7), (0, 1)), ((7, 10), (1, 0))):
        padded = Image.new("RGB", (10, 10), (122, 116, 104))
        padded.paste(noise(*size), place)
        for side in (10, 5):
            expected = pixels_of(padded.resize((side, side), bicubic))
            assert torch.equal(square(noise(*size), side, pad=True), expected)
    for size, resized, box in (((21, 8), (13, 5), (4, 0, 9, 5)), ((8, 21), (5, 13), (0, 4, 5, 9))):
        cut = noise(*size).resize(resized, bicubic).crop(box)  # its shortest edge becomes 5
        assert torch.equal(square(noise(*size), 5, pad=False), pixels_of(cut))
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(2, 3, 1, 3)
    mean = torch.tensor([[[0.48145466]], [[0.4578275]], [[0.40821073]]])
    deviation = torch.tensor([[[0.26862954]], [[0.26130258]], [[0.27577711]]])
    close(normalise(images), ((images / 255) - mean) / deviation)
