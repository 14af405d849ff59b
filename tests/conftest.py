"""Tiny models and batches for all tests, with weights large enough that choices are not ties."""

from functools import wraps
from types import FunctionType

import pytest
import torch

from config import IGNORE, IMAGE_ID, DecoderConfig, ModelConfig, MoEConfig, VisionConfig
from data import Batch
from engine.older import add_residual
from model import MedMoE
from moe import MLP, GatedMLP

# A second thread would only wait; and sums come out the same bit for bit every time.
torch.set_num_threads(1)

VISION = VisionConfig(image_size=32, patch_size=16, width=32, n_layers=3, n_heads=4, d_ff=64)
DECODERS = {
    "phi": DecoderConfig("phi", 64, 32, 3, 4, 64, rotary_dim=4, max_len=128),
    "stablelm": DecoderConfig("stablelm", 64, 32, 3, 4, 48, rotary_dim=2, max_len=128),
    "llama": DecoderConfig("llama", 64, 32, 3, 4, 48, rotary_dim=8, max_len=128, n_kv_heads=2),
}
FAMILIES = pytest.mark.parametrize("family", DECODERS)
FFNS = pytest.mark.parametrize("ffn", [MLP, GatedMLP])
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])


def shake(module, seed=0):
    """Fill every parameter at random, biases and norms too: a 0 or 1 would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in module.named_parameters():
            noise = torch.randn(param.shape, generator=generator, dtype=param.dtype)
            if ".ln" in f".{name}":
                param.copy_(1 + 0.3 * noise if name.endswith("weight") else 0.3 * noise)
            elif param.dim() < 2 or name.endswith("bias"):
                param.copy_(0.3 * noise)
            elif name.endswith("embed.weight") and param.dim() == 2:
                param.copy_(3.0 * noise)  # so that the last token decides what comes next
            else:
                fan_in = param[0].numel() if param.dim() == 4 else param.shape[-1]
                param.copy_(1.5 * fan_in**-0.5 * noise)
    return module


def build(family="phi", moe=None, seed=0):
    """A tiny model with every parameter random; `moe`: MoEConfig's fields, None for a dense one."""
    fields = {name: value for name, value in (moe or {}).items() if name != "residual"}
    moe_config = None if moe is None else MoEConfig(**fields)
    model = MedMoE(ModelConfig(VISION, DECODERS[family], moe_config))
    if moe and moe.get("residual"):  # early TinyMed's layers
        add_residual(model)
    return shake(model, seed).eval()


def collate(rows, images=None, side="right", modality=None, seed=0):
    """Rows of (ids, labels) -> a Batch; images None: random ones for the placeholders."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = ids.bool(), torch.full_like(ids, IGNORE)
    for row, (row_ids, row_labels) in enumerate(rows):
        n = len(row_ids)
        place = slice(longest - n, None) if side == "left" else slice(n)
        ids[row, place], labels[row, place] = torch.tensor(row_ids), torch.tensor(row_labels)
        mask[row, place] = True
    if images is None:
        n_images = int((ids == IMAGE_ID).sum()) // VISION.n_patches
        images = randn(n_images, 3, VISION.image_size, VISION.image_size, seed=seed)
    modality = torch.full((len(rows),), -1) if modality is None else torch.tensor(modality)
    return Batch(ids, mask, labels, images, modality)


def close(a, b, atol=1e-5, rtol=1e-5):
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


PROMPTS = ([5, *[IMAGE_ID] * 4, 9, 11], [21, 22, 23], [7, 8, *[IMAGE_ID] * 4, 30, 31, 32])


def prompts(rows=(0, 1, 2), side="left"):
    """Some of PROMPTS as a batch, each with the image that it has in any other batch."""
    batch = collate([(PROMPTS[r], [IGNORE] * len(PROMPTS[r])) for r in rows], side=side)
    images = [randn(1, 3, 32, 32, seed=r) for r in rows if IMAGE_ID in PROMPTS[r]]
    modality = torch.tensor([2, -1, 0])[list(rows)]
    return batch._replace(images=torch.cat([*images, batch.images[:0]]), modality=modality)


@pytest.fixture(scope="session")
def phase3(tmp_path_factory):
    """A checkpoint of two sparse layers and four experts, top-2, which tests only read."""
    from tests.mini import checkpoint  # which imports this file

    return checkpoint(tmp_path_factory.mktemp("mini") / "phase3")


_build = pytest.fixture(name="build")(lambda: build)
_collate = pytest.fixture(name="collate")(lambda: collate)


@pytest.fixture
def monkeypatch():
    """pytest's, and a function that replaces another must be called, or nothing was tested."""
    uncalled = set()
    with pytest.MonkeyPatch.context() as patch:
        setattr_ = patch.setattr

        def watched(target, name, *value, **kwargs):
            *before, new = (name, *value)  # setattr("module.name", new) has no third argument
            if isinstance(plain := new, FunctionType):
                uncalled.add(place := f"{getattr(target, '__name__', target)}.{before}")

                @wraps(plain)
                def new(*args, **kwargs):
                    uncalled.discard(place)
                    return plain(*args, **kwargs)

            setattr_(target, *before, new, **kwargs)

        patch.setattr = watched
        yield patch
    assert not uncalled, f"replaced and never called: {uncalled}"
