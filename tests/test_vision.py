"""Images become pixels as in LLaVA, pixels patch features as in CLIP before its last layer.

python -m pytest tests/test_vision.py
"""

from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import vision
from tests import reference
from tests.conftest import VISION, randn, shake
from tests.golden.make import ours, outputs
from vision import Projector, VisionTower, attention, normalise, quick_gelu, square


@pytest.fixture
def tower():
    return shake(VisionTower(VISION)).eval()


def close(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("n_images", [1, 3])
def test_the_tower_equals_its_equations(tower, n_images):
    images = randn(n_images, 3, 32, 32)
    expected = torch.stack([reference.tower(tower, image, VISION.n_heads) for image in images])
    assert expected.shape == (n_images, 5, 32) and expected.std() > 0.5
    close(tower.hidden(images), expected)
    close(tower(images), expected[:, 1:])  # without the CLS token


def test_the_tower_gives_the_hidden_state_of_transformers_before_its_last_layer():
    golden, tower = outputs("clip"), ours("phi").vision
    assert golden["hidden"].shape == (2, 17, 32)
    close(tower.hidden(golden["images"]), golden["hidden"])


def test_the_last_published_layer_and_the_last_norm_are_not_built(tower):
    names = {name.split(".")[0] for name, _ in tower.named_parameters()}
    assert names == {"patch_embed", "cls", "positions", "ln_pre", "blocks"}
    assert len(tower.blocks) == 2 and VISION.n_layers == 3
    assert tower(randn(0, 3, 32, 32)).shape == (0, 4, 32)


def test_the_projector_is_two_layers_with_the_exact_gelu_between():
    projector, x = shake(Projector(16, 24)), 3 * randn(2, 5, 16)
    expected = projector.fc2(reference.gelu(projector.fc1(x)))
    assert expected.shape == (2, 5, 24)
    close(projector(x), expected)


def test_quick_gelu_is_up_to_0_0203_away_from_gelu():
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    close(quick_gelu(x), reference.quick_gelu(x), 1e-12)
    assert (quick_gelu(x) - F.gelu(x)).abs().max().item() == pytest.approx(0.0203, abs=5e-5)


@pytest.mark.parametrize("is_masked", [False, True])
def test_attention_and_its_gradients_equal_its_equation(is_masked):
    q, k, v = (randn(2, 3, n, 8, seed=n).requires_grad_() for n in (5, 7, 7))
    allowed = randn(2, 1, 5, 7) > 0 if is_masked else torch.ones(2, 1, 5, 7).bool()
    allowed[..., 2] = True
    mask = torch.zeros(2, 1, 5, 7).masked_fill(~allowed, float("-inf")) if is_masked else None
    expected = torch.stack([
        torch.stack([reference.attention(q[b, h], k[b, h], v[b, h], allowed[b, 0])
                     for h in range(3)]) for b in range(2)
    ])  # fmt: skip
    close(attention(q, k, v, mask), expected)
    close(attention(q.detach(), k, v, mask), expected)
    found = torch.autograd.grad(attention(q, k, v, mask).sin().sum(), (q, k, v))
    close(found, torch.autograd.grad(expected.sin().sum(), (q, k, v)))


def test_attention_in_bf16_stays_bf16_and_near():
    exact = [randn(1, 2, 4, 64, seed=s) for s in (1, 2, 3)]
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), float("-inf"))
    expected = attention(*exact, mask)
    for needs_grad in (False, True):
        rough = attention(*(t.bfloat16().requires_grad_(needs_grad) for t in exact), mask)
        assert rough.dtype == torch.bfloat16
        close(rough.float(), expected, 0.03)


def test_torchs_fused_attention_is_used_where_no_gradient_is_needed(monkeypatch):
    fused = Mock(wraps=F.scaled_dot_product_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused)
    attention(*(randn(1, 1, 2, 4).requires_grad_() for _ in range(3)))
    assert not fused.called
    attention(*(randn(1, 1, 2, 4) for _ in range(3)))
    assert fused.call_count == 1


MEAN_COLOUR = (122, 116, 104)


def noise(width, height):
    pixels = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.to(torch.uint8).numpy(), "RGB")


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(9, 4, 0, 2), (4, 9, 2, 0)])
def test_padding_centres_the_whole_image_on_a_square_of_clips_mean_colour(width, height, left, top):
    image = noise(width, height)
    canvas = torch.tensor(MEAN_COLOUR)[:, None, None].repeat(1, 9, 9)
    canvas[:, top : top + height, left : left + width] = pixels_of(image)
    found = square(image, 9, pad=True)
    assert found.dtype == torch.uint8 and found.is_contiguous()
    assert torch.equal(found, canvas.to(torch.uint8))


@pytest.mark.parametrize(("size", "box"), [((21, 8), (6, 0, 14, 8)), ((8, 21), (0, 6, 8, 14))])
def test_cropping_takes_the_central_square(size, box):
    image = noise(*size)
    assert torch.equal(square(image, 8, pad=False), pixels_of(image.crop(box)))


def test_images_are_resized_bicubically_the_shortest_edge_to_the_side():
    image, bicubic = noise(10, 7), Image.Resampling.BICUBIC
    expected = pixels_of(image.resize((7, 5), bicubic).crop((1, 0, 6, 5)))
    assert torch.equal(square(image, 5, pad=False), expected)
    canvas = Image.new("RGB", (10, 10), MEAN_COLOUR)
    canvas.paste(image, (0, 1))
    expected = pixels_of(canvas.resize((5, 5), bicubic))
    assert torch.equal(square(image, 5, pad=True), expected)


def test_a_longer_image_is_shrunk_before_it_is_padded(monkeypatch):
    assert vision.MAX_SIDE == 8192
    monkeypatch.setattr(vision, "MAX_SIDE", 16)
    found = square(Image.new("RGB", (64, 16), "white"), 16, pad=True)
    is_white = (found == 255).all(dim=0).all(dim=1)
    assert is_white.nonzero().flatten().tolist() == [6, 7, 8, 9]
    image, canvas, new = noise(64, 16), [], Image.new
    monkeypatch.setattr(Image, "new", lambda *args: canvas.append(args[1]) or new(*args))
    square(image, 4, pad=True)
    assert canvas[0] == (16, 16)


def test_pixels_are_normalised_by_clips_published_mean_and_deviation():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3).repeat(2, 3, 1, 1)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    deviation = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    expected = (torch.tensor([0, 0.2, 1]) - mean) / deviation
    close(normalise(images), expected.expand(2, 3, 1, 3))
