"""Tower and decoders say what transformers' say, on the same random weights, to 1e-5 in fp32.

    pip install transformers==5.23.0 && python -m pytest tests/test_parity.py

Skipped where transformers is not installed: the project itself does not need it.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from config import DecoderConfig, ModelConfig, VisionConfig
from model import MedMoE
from moe import Hints
from weights import load_published

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

VISION = VisionConfig(image_size=56, patch_size=14, width=64, n_layers=4, n_heads=4, d_ff=96)
DECODERS = {  # head widths 80 and 64, as in the published models
    "phi": DecoderConfig("phi", 200, 160, 3, 2, 256, rotary_dim=32, max_len=64, dropout=0.1),
    "stablelm": DecoderConfig("stablelm", 200, 128, 3, 2, 176, rotary_dim=16, max_len=64),
}
FAMILIES = pytest.mark.parametrize("family", DECODERS)


def theirs(family):
    """A published architecture at our size, every parameter drawn: no bias 0, no norm 1."""
    if family == "clip":
        config = transformers.CLIPVisionConfig(
            image_size=VISION.image_size,
            patch_size=VISION.patch_size,
            hidden_size=VISION.width,
            num_hidden_layers=VISION.n_layers,
            num_attention_heads=VISION.n_heads,
            intermediate_size=VISION.d_ff,
        )
        model = transformers.CLIPVisionModel(config)
    else:
        ours = DECODERS[family]
        sizes = {
            "vocab_size": ours.vocab_size,
            "hidden_size": ours.d_model,
            "intermediate_size": ours.d_ff,
            "num_hidden_layers": ours.n_layers,
            "num_attention_heads": ours.n_heads,
            "num_key_value_heads": ours.n_heads,
            "max_position_embeddings": ours.max_len,
            "partial_rotary_factor": ours.rotary_dim * ours.n_heads / ours.d_model,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "tie_word_embeddings": False,
        }
        if family == "phi":
            config = transformers.PhiConfig(**sizes, resid_pdrop=ours.dropout)
            model = transformers.PhiForCausalLM(config)
        else:
            config = transformers.StableLmConfig(**sizes, use_qkv_bias=True)
            model = transformers.StableLmForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                param.copy_(1 + 0.3 * noise)
            elif param.dim() == 1:
                param.copy_(0.3 * noise)
            else:
                param.copy_(noise * param[0].numel() ** -0.5)
    return model.eval()


def write(model, directory, family):
    """save_pretrained, with the names and fields of the published files, which are older."""
    model.save_pretrained(directory)
    path = directory / "config.json"
    values = json.loads(path.read_text())
    values |= values.pop("rope_parameters", None) or {}  # version 5 moved them there
    path.write_text(json.dumps(values))
    if family == "clip":
        path = directory / "model.safetensors"
        tensors = load_file(path)
        prefix = "vision_model."  # version 5 saves the tower without it
        save_file({prefix + n.removeprefix(prefix): t for n, t in tensors.items()}, path)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """family -> (our whole model, their tower, their decoder) with the same weights."""
    tower, made = theirs("clip"), {}
    clip = tmp_path_factory.mktemp("clip")
    write(tower, clip, "clip")
    for family, decoder_config in DECODERS.items():
        decoder, llm = theirs(family), tmp_path_factory.mktemp(family)
        write(decoder, llm, family)
        config = ModelConfig(VISION, decoder_config)
        ours = MedMoE(config)
        load_published(ours, config, clip, llm)
        made[family] = ours.eval(), tower, decoder
    return made


def far(ours, theirs):
    """The largest difference; pytest -s shows it."""
    largest = (ours - theirs).abs().max().item()
    print(f"largest difference {largest:.1e}, of values up to {theirs.abs().max().item():.1f}")
    return largest


@torch.no_grad()
def test_the_tower_gives_their_last_hidden_state_but_one(pairs):
    ours, tower, _ = pairs["phi"]
    images = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    states = tower(images, output_hidden_states=True).hidden_states
    assert len(states) == VISION.n_layers + 1
    assert far(ours.vision.hidden(images), states[-2]) <= 1e-5
    assert far(ours.vision(images), states[-2][:, 1:]) <= 1e-5
    assert far(ours.vision(images), states[-1][:, 1:]) > 1e-2  # it is that layer and no other


@FAMILIES
@torch.no_grad()
def test_decoders_give_their_logits(pairs, family):
    ours, _, decoder = pairs[family]
    ids = torch.randint(200, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids).bool()
    hidden, _ = ours(ids, mask, torch.zeros(0, 3, 56, 56), Hints())
    expected = decoder(ids).logits
    assert expected.std() > 0.5
    assert far(ours.decoder.lm_head(hidden), expected) <= 1e-5


@FAMILIES
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_decoders_give_their_logits_beside_padding(pairs, family, side):
    ours, _, decoder = pairs[family]
    ids = torch.randint(200, (3, 17), generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor([[17], [9], [4]])
    place = torch.arange(17)
    mask = place >= 17 - lengths if side == "left" else place < lengths
    hidden, _ = ours(ids, mask, torch.zeros(0, 3, 56, 56), Hints())
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    expected = decoder(ids, attention_mask=mask.long(), position_ids=positions).logits
    assert far(ours.decoder.lm_head(hidden)[mask], expected[mask]) <= 1e-5


@FAMILIES
@torch.no_grad()
def test_every_parameter_is_theirs(pairs, family):
    ours, tower, decoder = pairs[family]
    n_ours = sum(p.numel() for p in ours.decoder.parameters())
    assert n_ours == sum(p.numel() for p in decoder.parameters())
    last = tower.get_submodule(next(n for n, _ in tower.named_modules() if n.endswith("layers.3")))
    after = [p for n, p in tower.named_parameters() if "post_layernorm" in n]
    unused = sum(p.numel() for p in (*last.parameters(), *after))
    assert sum(p.numel() for p in ours.vision.parameters()) == (
        sum(p.numel() for p in tower.parameters()) - unused
    )
