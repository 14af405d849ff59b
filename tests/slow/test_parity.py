"""Tower and decoders equal those of transformers, on new random models, to 1e-5 in fp32.

    pip install transformers==5.23.0 && python -m pytest -m oracle

Skipped where transformers is not installed: the project itself does not need it.
"""

import json
import random

import pytest
import torch

from data import Batch
from decoder import Cache
from model import generate
from routers import Hints
from tests.golden.make import ours, padded, their_greedy, their_logits, their_model, write

pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.oracle, pytest.mark.slow]
DECODERS = pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
SEEDS = pytest.mark.parametrize("seed", range(20))


def random_sizes(family, seed):
    rng = random.Random(f"{family} {seed}")
    heads, width = rng.choice([1, 2, 3, 4, 6]), rng.choice([8, 16, 24])
    sizes = {
        "hidden_size": heads * width, "num_attention_heads": heads,
        "num_hidden_layers": rng.randint(2, 4), "intermediate_size": 8 * rng.randint(2, 12),
    }  # fmt: skip
    if family == "clip":
        patch = rng.choice([4, 7, 14])
        return sizes | {"patch_size": patch, "image_size": patch * rng.randint(2, 5)}
    sizes |= {"vocab_size": rng.randint(40, 300), "max_position_embeddings": 256,
              "rope_theta": rng.choice([10000.0, 100000.0])}  # fmt: skip
    eps = rng.choice([1e-5, 1e-6])
    if family == "llama":
        shared = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
        return sizes | {"num_key_value_heads": shared, "tie_word_embeddings": rng.random() < 0.5,
                        "rms_norm_eps": eps}  # fmt: skip
    return sizes | {"partial_rotary_factor": rng.choice([0.25, 0.5, 1.0]), "layer_norm_eps": eps}


@pytest.fixture
def both(tmp_path):
    """(family, seed) -> their model and ours with the same weights."""

    def make(family, seed):
        theirs = their_model(family, random_sizes(family, seed), seed)
        other = "phi" if family == "clip" else "clip"
        write(theirs, tmp_path / family)
        write(their_model(other, random_sizes(other, 0)), tmp_path / other)
        llm = other if family == "clip" else family
        return theirs, ours(llm, tmp_path / llm, tmp_path / "clip")

    return make


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@SEEDS
@torch.no_grad()
def test_the_tower_gives_their_last_hidden_state_but_one(both, seed):
    theirs, model = both("clip", seed)
    images = torch.randn(4, 3, *[model.config.vision.image_size] * 2)
    states = theirs(images, output_hidden_states=True).hidden_states
    close(model.vision.hidden(images), states[-2])
    close(model.vision(images), states[-2][:, 1:])  # without CLS


@SEEDS
@DECODERS
@torch.no_grad()
def test_decoders_give_their_logits_and_32_greedy_tokens(both, family, seed):
    theirs, model = both(family, seed)
    n_theirs = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in model.decoder.parameters()) == n_theirs
    no_images = torch.zeros(0, 3, *[model.config.vision.image_size] * 2)
    for n, side in ((1, "left"), (4, "right"), (4, "left")):
        ids, mask = padded(model.config.decoder.vocab_size, side, n)
        expected = their_logits(theirs, ids, mask)
        hidden, _ = model(ids, mask, no_images, Hints())
        close(model.decoder.lm_head(hidden)[mask], expected[mask])
        cache = Cache(model.config.decoder.n_layers)
        parts = [model(ids[:, t : t + 1], mask[:, t : t + 1], no_images, Hints(), cache)[0]
                 for t in range(ids.shape[1])]  # fmt: skip
        close(model.decoder.lm_head(torch.cat(parts, dim=1))[mask], expected[mask])
    batch = Batch(ids, mask, torch.full_like(ids, -100), no_images, torch.full((len(ids),), -1))
    tokens = [step.tokens for step in generate(model, batch, eos_id=-1, max_new=32)]
    assert torch.equal(torch.stack(tokens, dim=1), their_greedy(theirs, ids, mask))


@pytest.mark.parametrize(("family", "name", "value"), [
    ("phi", "qk_layernorm", True), ("phi", "hidden_act", "gelu"),
    ("stablelm", "use_parallel_residual", True), ("stablelm", "use_qkv_bias", False),
    ("llama", "attention_bias", True), ("llama", "hidden_act", "gelu"),
    ("llama", "rope_scaling", {"rope_type": "linear", "factor": 2.0}),
])  # fmt: skip
def test_a_variant_that_we_do_not_compute_is_refused_by_name(tmp_path, family, name, value):
    write(their_model(family, random_sizes(family, 0)), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {name: value}))
    with pytest.raises(Exception, match=name):
        ours(family, tmp_path)
