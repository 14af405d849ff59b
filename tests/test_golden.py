"""Tower and decoders equal those of transformers, stored in tests/golden, to 1e-5 in fp32.

python -m pytest tests/test_golden.py
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config import ModelConfig
from data import Batch
from decoder import Cache
from engine.published import load_published, published_decoder, published_vision
from model import MedMoE, generate
from routers import Hints

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
NO_IMAGES = torch.zeros(0, 3, 28, 28)


def load(family):
    clip, llm = GOLDEN / "clip", GOLDEN / family
    config = ModelConfig(published_vision(clip), published_decoder(llm))
    model = MedMoE(config)
    load_published(model, config, clip, llm)
    return model.eval(), load_file(llm / "outputs.safetensors")


def logits_of(model, ids, mask, cache=None):
    with torch.no_grad():
        hidden, _ = model(ids, mask, NO_IMAGES, Hints(), cache)
        return model.decoder.lm_head(hidden)


def test_the_tower_gives_their_last_hidden_state_but_one():
    model, _ = load("phi")
    golden = load_file(GOLDEN / "clip" / "outputs.safetensors")
    with torch.no_grad():
        hidden, patches = model.vision.hidden(golden["images"]), model.vision(golden["images"])
    torch.testing.assert_close(hidden, golden["hidden"], atol=1e-5, rtol=0)
    torch.testing.assert_close(patches, golden["hidden"][:, 1:], atol=1e-5, rtol=0)  # without CLS


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_theirs_beside_padding(family, side):
    model, golden = load(family)
    ids, mask = golden[f"{side}.ids"], golden[f"{side}.mask"]
    expected = golden[f"{side}.logits"]
    assert expected[mask].std() > 0.3
    ours = logits_of(model, ids, mask)
    torch.testing.assert_close(ours[mask], expected[mask], atol=1e-5, rtol=0)
    for row in range(len(ids)):  # one by one, without padding
        real = mask[row]
        alone = logits_of(model, ids[row, real][None], real[real][None])[0]
        torch.testing.assert_close(alone, expected[row, real], atol=1e-5, rtol=0)


@FAMILIES
def test_logits_with_a_cache_are_theirs(family):
    model, golden = load(family)
    ids, mask = golden["left.ids"], golden["left.mask"]
    cache = Cache(model.config.decoder.n_layers)
    ours = [logits_of(model, ids[:, :5], mask[:, :5], cache)]
    ours += [logits_of(model, ids[:, t : t + 1], mask[:, t : t + 1], cache) for t in range(5, 11)]
    ours = torch.cat(ours, dim=1)
    torch.testing.assert_close(ours[mask], golden["left.logits"][mask], atol=1e-5, rtol=0)


@FAMILIES
def test_32_greedy_tokens_are_theirs(family):
    model, golden = load(family)
    ids, mask = golden["left.ids"], golden["left.mask"]
    labels = torch.full_like(ids, -100)
    batch = Batch(ids, mask, labels, NO_IMAGES, torch.full((len(ids),), -1))
    steps = list(generate(model, batch, eos_id=-1, max_new=32))
    tokens = torch.stack([step.tokens for step in steps], dim=1)
    assert len(golden["greedy"].unique()) > 4
    assert torch.equal(tokens, golden["greedy"])


def test_the_golden_files_are_small():
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) <= 400_000
