"""Published files in the form their owners gave them: Phi-2's names and tokenizer, two routers.

python -m pytest tests/engine/test_published.py

They are not shipped: what needs them skips where the folder of development data is absent.
"""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from config import LLAVA_SYSTEM, PRESETS, MoEConfig, UserError, preset
from data import EOS, Sample, Text, encode_prompt, encode_sample
from engine.published import CLIP, DECODERS, clip_table, decoder_table, published_decoder, rename
from lab import describe_router
from model import MedMoE, make_sparse
from sources.load import load_samples
from tests.mini import reads

DATA = Path(__file__).parents[3] / "shared" / "data"
PHI2 = DATA / "phi2"
needs_phi2 = pytest.mark.skipif(not PHI2.is_dir(), reason=f"{PHI2} is not there")
needs_data = pytest.mark.skipif(not (DATA / "slake").is_dir(), reason=f"{DATA} is not there")


def on_meta(name, moe=None):
    with torch.device("meta"):
        model = MedMoE(preset(name).model)
        if moe:
            make_sparse(model, moe)
    return model


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "n"), [("phi2", 2_779_683_840), ("stablelm2", 1_644_515_328), ("smollm2", 134_515_008)]
)
def test_the_full_sizes_have_exactly_the_published_number_of_parameters(name, n):
    model = on_meta(name)
    assert count(model.decoder) == n
    layer = count(model.vision.blocks[0])
    after = 2 * model.config.vision.width  # post_layernorm: published, not used
    assert count(model.vision) + layer + after == 303_507_456


@needs_phi2
def test_our_names_cover_phi_2s_453_tensors_one_to_one():
    index = json.loads((PHI2 / "model.safetensors.index.json").read_text())
    theirs = list(index["weight_map"])
    assert len(theirs) == 453
    ours = [rename(key, DECODERS["phi"]) for key in theirs]
    assert sorted(ours) == sorted(
        name for name, _ in on_meta("phi2").named_parameters() if name.startswith("decoder.")
    )
    size = sum(p.numel() for n, p in on_meta("phi2").named_parameters() if "decoder." in n)
    assert 2 * size == index["metadata"]["total_size"]


@needs_phi2
def test_phi_2s_config_is_the_preset():
    assert published_decoder(PHI2) == PRESETS["phi2"].model.decoder


def test_the_tables_know_every_name_of_the_full_sizes():
    for name in ("phi2", "stablelm2", "smollm2"):
        model = on_meta(name)
        for prefix, table in (("vision.", clip_table(model.config.vision)),
                              ("decoder.", decoder_table(model.config.decoder))):  # fmt: skip
            inverse = {ours: theirs for theirs, ours in table.items() if ours}
            names = [n for n, _ in model.named_parameters() if n.startswith(prefix)]
            assert len({rename(n, inverse) for n in names}) == len(names)
    assert "vision_model.pre_layrnorm.*" in CLIP  # sic


@pytest.fixture(scope="module")
def phi2_text():
    return Text(PHI2)


@pytest.fixture(scope="module")
def rebuilt():
    """Phi-2's tokenizer put together from vocab.json, merges.txt and its rule for white space."""
    vocab = json.loads((PHI2 / "vocab.json").read_text())
    lines = (PHI2 / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    spaces = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
    tokenizer.add_tokens([AddedToken(s, normalized=True) for s in spaces])
    assert tokenizer.token_to_id(spaces[0]) == 50257 and tokenizer.token_to_id(spaces[-1]) == 50294
    return tokenizer


def texts():
    """Questions and answers of people, and 10 000 strings of white space, emoji and specials."""
    for source in (f"slake:{DATA / 'slake'}", f"vqa-rad:{DATA / 'vqa_rad'}"):
        for split in ("train", "test"):
            for sample in load_samples((source,), "vqa", split, "all"):
                for question, answer in sample.turns:
                    yield question
                    yield f" {answer}"
    rng = random.Random(0)
    pieces = [*" \t\n\r.,?!'-0123456789abcXYZé肺🫁½", "  ", "    ", "\t\t\t", "\n\n", "<image>",
              EOS, "<|", "|>", "USER:", " ASSISTANT:", "n't", "'s", "\u200d", "\u00a0"]  # fmt: skip
    for _ in range(10_000):
        yield "".join(rng.choices(pieces, k=rng.randrange(1, 30)))


@needs_phi2
@needs_data
def test_phi_2s_tokenizer_has_no_mismatch_on_real_and_on_random_text(phi2_text, rebuilt):
    n = wrong = 0
    for text in texts():
        n += 1
        ours = phi2_text.encode(text)
        wrong += ours != rebuilt.encode(text).ids
        assert phi2_text.eos_id not in ours
        assert phi2_text.decode(ours) == text
    assert wrong == 0 and n > 30_000


@needs_phi2
def test_phi_2s_special_tokens_and_white_space(phi2_text):
    assert phi2_text.eos_id == 50256
    assert phi2_text.encode(" " * 31) == [50257] and phi2_text.encode("  ") == [50286]
    assert phi2_text.encode("\t" * 9) == [50287]
    assert len(phi2_text.encode(EOS)) > 1  # what a user types is text


@needs_phi2
def test_the_chat_template_token_for_token(phi2_text):
    """med-moe's conversation "phi": each piece by itself, as its code cuts at <image>."""

    def tokens(text):
        return phi2_text.tokenizer.encode(text).ids

    question, answer = "Is there a <image> fracture?<|endoftext|>", "no"
    config = reads(3, LLAVA_SYSTEM)
    prompt, _ = encode_prompt(question, True, phi2_text, config)
    before = tokens(f"{LLAVA_SYSTEM} USER: ")
    after = tokens(f"\n{question} ASSISTANT:")
    assert prompt == before + [-200] * 3 + after
    sample = Sample("1", "x", "train", 1, ((question, answer), ("Why?", "because")))
    ids, labels = encode_sample(sample, phi2_text, config)
    answer = [*tokens(" no"), 50256]
    rest = [*tokens("USER: Why? ASSISTANT:"), *tokens(" because"), 50256]
    assert ids == prompt + answer + rest
    n = len(prompt)
    assert labels[:n] == [-100] * n and labels[n : n + len(answer)] == answer
    assert ids.count(50256) == 2 and ids.count(-200) == 3


@needs_phi2
@pytest.mark.parametrize(("name", "d_model"), [("phi", 2560), ("stablelm", 2048)])
def test_both_published_routers_load_are_described_and_fit(capsys, tmp_path, name, d_model):
    path = DATA / "routers" / f"{name}_router.pth"
    found = describe_router.main([str(path), "--json", str(tmp_path / "router.json")])
    assert found["experts"] == 4 and found["d_model"] == d_model
    assert json.loads((tmp_path / "router.json").read_text()) == found
    assert "degrees" in capsys.readouterr().out
    norms = {"phi": (2.14, 1.86, 1.39, 1.25), "stablelm": (1.64, 1.53, 1.44, 1.42)}[name]
    assert found["norms"] == pytest.approx(norms, abs=0.01)
    assert max(map(abs, found["bias"])) < 0.03
    weights = describe_router.read_router(path)
    big = "phi2" if name == "phi" else "stablelm2"
    router = on_meta(big, MoEConfig()).decoder.blocks[0].mlp.router
    assert {n: p.shape for n, p in router.proj.named_parameters()} == {
        n: t.shape for n, t in weights.items()
    }


def test_angles_are_those_of_a_known_router(tmp_path, capsys):
    path = tmp_path / "router.pth"
    torch.save({"fc1.weight": torch.tensor([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
                "fc1.bias": torch.zeros(3)}, path)  # fmt: skip
    found = describe_router.describe(describe_router.read_router(path))
    assert found["norms"] == pytest.approx([2.0, 1.0, 2**0.5])
    assert found["angles"][0] == pytest.approx([0.0, 90.0, 45.0])
    torch.save({"fc1.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(UserError, match="not a router's weight and bias"):
        describe_router.read_router(path)
