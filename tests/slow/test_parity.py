"""Tower and decoders equal those of transformers, on new random models, to 1e-5 in fp32.

    pip install transformers==5.23.0 && python -m pytest -m oracle

Skipped where transformers is not installed: the project itself does not need it.
"""

import json

import pytest
import torch

from config import ModelConfig
from data import Batch
from decoder import Cache
from engine.published import load_published, published_decoder, published_vision
from model import MedMoE, generate
from routers import Hints
from tests.golden.make import (
    padded,
    random_sizes,
    their_greedy,
    their_logits,
    their_model,
    write,
)

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.oracle
DECODERS = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
SEEDS = pytest.mark.parametrize("seed", range(20))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    directory = tmp_path_factory.mktemp("clip")
    write(their_model("clip", random_sizes("clip", 0)), directory)
    return directory


def load(clip, llm):
    config = ModelConfig(published_vision(clip), published_decoder(llm))
    model = MedMoE(config)
    load_published(model, config, clip, llm)
    return model.eval(), torch.zeros(0, 3, config.vision.image_size, config.vision.image_size)


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@SEEDS
@torch.no_grad()
def test_the_tower_gives_their_last_hidden_state_but_one(tmp_path, seed):
    theirs = their_model("clip", random_sizes("clip", seed), seed)
    write(theirs, tmp_path / "clip")
    write(their_model("phi", random_sizes("phi", 0)), tmp_path / "phi")
    ours, _ = load(tmp_path / "clip", tmp_path / "phi")
    side = ours.config.vision.image_size
    for n in (1, 4):
        images = torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(n))
        states = theirs(images, output_hidden_states=True).hidden_states
        close(ours.vision.hidden(images), states[-2])
        close(ours.vision(images), states[-2][:, 1:])  # without CLS
        assert (ours.vision(images) - states[-1][:, 1:]).abs().max() > 1e-3  # that layer, no other


@SEEDS
@DECODERS
@torch.no_grad()
def test_decoders_give_their_logits(clip, tmp_path, family, seed):
    theirs = their_model(family, random_sizes(family, seed), seed)
    write(theirs, tmp_path)
    ours, no_images = load(clip, tmp_path)
    n_theirs = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in ours.decoder.parameters()) == n_theirs
    vocab_size = ours.config.decoder.vocab_size
    for n in (1, 4):
        for side in ("left", "right"):
            ids, mask = padded(vocab_size, side, n)
            expected = their_logits(theirs, ids, mask)
            hidden, _ = ours(ids, mask, no_images, Hints())
            close(ours.decoder.lm_head(hidden)[mask], expected[mask])
            cache = Cache(ours.config.decoder.n_layers)
            parts = [ours(ids[:, t : t + 1], mask[:, t : t + 1], no_images, Hints(), cache)[0]
                     for t in range(ids.shape[1])]  # fmt: skip
            close(ours.decoder.lm_head(torch.cat(parts, dim=1))[mask], expected[mask])


@SEEDS
@DECODERS
@torch.no_grad()
def test_32_greedy_tokens_are_theirs(clip, tmp_path, family, seed):
    theirs = their_model(family, random_sizes(family, seed), seed)
    write(theirs, tmp_path)
    ours, no_images = load(clip, tmp_path)
    ids, mask = padded(ours.config.decoder.vocab_size, "left")
    batch = Batch(ids, mask, torch.full_like(ids, -100), no_images, torch.full((len(ids),), -1))
    steps = generate(ours, batch, eos_id=-1, max_new=32)
    tokens = torch.stack([step.tokens for step in steps], dim=1)
    assert torch.equal(tokens, their_greedy(theirs, ids, mask))


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [("phi", "qk_layernorm", True), ("phi", "hidden_act", "gelu"),
     ("stablelm", "use_parallel_residual", True), ("stablelm", "use_qkv_bias", False),
     ("llama", "attention_bias", True), ("llama", "hidden_act", "gelu"),
     ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0})],
)  # fmt: skip
def test_a_variant_that_we_do_not_compute_is_refused_by_name(clip, tmp_path, family, name, value):
    write(their_model(family, random_sizes(family, 0)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {name: value}))
    with pytest.raises(Exception, match=name):
        load(clip, tmp_path)
