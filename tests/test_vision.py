"""The tower computes patch features as CLIP does before its last layer, which is not built.

python -m pytest tests/test_vision.py
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from config import VisionConfig
from vision import VisionTower, quick_gelu

CONFIG = VisionConfig(image_size=32, patch_size=16, width=32, n_layers=3, n_heads=4, d_ff=64)


@pytest.fixture
def tower(shake):
    return shake(VisionTower(CONFIG)).eval()


def random_images(n=2, seed=0):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def naive_hidden(tower, image, n_blocks):
    """One image (3, S, S) -> (P + 1, W), from the equations; attention head by head."""
    size, rows = CONFIG.patch_size, [tower.cls]
    kernel = tower.patch_embed.weight.flatten(1)  # (W, 3 * 16 * 16)
    for top in range(0, 32, size):
        for left in range(0, 32, size):
            patch = image[:, top : top + size, left : left + size]
            rows.append(kernel @ patch.flatten())
    x = tower.ln_pre(torch.stack(rows) + tower.positions)
    for block in tower.blocks[:n_blocks]:
        h = block.ln_1(x)
        heads = []
        for head in torch.arange(32).split(8):
            q, k, v = (f(h)[:, head] for f in (block.q, block.k, block.v))
            heads.append((q @ k.T / 8**0.5).softmax(dim=-1) @ v)
        x = x + block.o(torch.cat(heads, dim=1))
        h = block.fc1(block.ln_2(x))
        x = x + block.fc2(h / (1 + torch.exp(-1.702 * h)))
    return x


def test_the_tower_equals_its_equations(tower):
    images = random_images()
    hidden = tower.hidden(images)
    assert hidden.shape == (2, 5, 32)
    for image, x in zip(images, hidden, strict=True):
        torch.testing.assert_close(x, naive_hidden(tower, image, 2), atol=1e-5, rtol=0)


def test_patches_are_the_hidden_state_without_its_first_token(tower):
    images = random_images()
    assert tower(images).shape == (2, CONFIG.n_patches, 32)
    assert torch.equal(tower(images), tower.hidden(images)[:, 1:])


def test_the_last_published_layer_and_the_last_norm_are_not_built(tower):
    assert len(tower.blocks) == CONFIG.n_layers - 1
    names = {name.split(".")[0] for name, _ in tower.named_parameters()}
    assert names == {"patch_embed", "cls", "positions", "ln_pre", "blocks"}
    assert len(VisionTower(replace(CONFIG, n_layers=1)).blocks) == 0


def test_patches_are_read_row_by_row(tower):
    image = random_images(1)
    moved = image.clone()
    moved[..., :16, 16:] += 1  # the top right quarter: the second of four patches
    with torch.no_grad():
        tower.blocks = tower.blocks[:0]  # or attention would spread it
        changed = (tower(moved) - tower(image)).abs().amax(dim=-1)[0] > 1e-4
    assert changed.tolist() == [False, True, False, False]


def test_every_patch_attends_to_every_other(tower):
    image = random_images(1)
    for row in (0, 16):
        for column in (0, 16):
            moved = image.clone()
            moved[..., row : row + 16, column : column + 16] += 1
            assert ((tower(moved) - tower(image)).abs().amax(dim=-1) > 1e-4).all()


def test_quick_gelu_is_up_to_0_0203_away_from_gelu():
    x = torch.linspace(-10, 10, 100_001, dtype=torch.float64)
    away = (quick_gelu(x) - F.gelu(x)).abs().max().item()
    assert away == pytest.approx(0.0203, abs=5e-5)
    torch.testing.assert_close(quick_gelu(x), x / (1 + torch.exp(-1.702 * x)))


def test_images_do_not_change_each_other(tower):
    images = random_images(3)
    for i in range(3):
        torch.testing.assert_close(tower(images[i : i + 1])[0], tower(images)[i], atol=1e-5, rtol=0)


def test_no_images_give_no_patches(tower):
    assert tower(random_images(0)).shape == (0, 4, 32)
