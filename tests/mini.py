"""A preset of 30 000 random parameters, its checkpoints, and readers of what a run leaves."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from checkpoint import save_checkpoint
from config import PRESETS, DecoderConfig, ModelConfig, MoEConfig, Recipe, TrainConfig, to_dict
from model import MedMoE
from scoring import leaks
from sources.load import load_samples
from sources.tensorfiles import open_tensors
from tests import conftest
from tests.published import write_published

VISION = replace(conftest.VISION, width=16, n_layers=2, n_heads=2, d_ff=32)
DECODER = DecoderConfig("phi", 1024, 16, 3, 2, 32, rotary_dim=4, max_len=512, dropout=0.2)
RECIPES = {n: Recipe(1e-2, 1, 4) for n in (1, 2, 3)}
MOE = MoEConfig()
TOKENIZER = PRESETS["tiny"].llm / "tokenizer.json"
SMALL_TOKENIZER = """{"model": {"type": "BPE", "vocab": {"<|endoftext|>": 0, "C": 1, "T": 2},
"merges": []}, "added_tokens": [{"id": 0, "content": "<|endoftext|>", "special": true,
"single_word": false, "lstrip": false, "rstrip": false, "normalized": false}]}"""


def mini(folder):
    """Write its published parts into the folder; `train.py --preset` finds it under PRESETS."""
    config = ModelConfig(VISION, DECODER)
    torch.manual_seed(5)
    write_published(MedMoE(config), folder)
    for part, more in (("clip", {"pretrained_on": ["phantoms"]}), ("llm", {"resid_pdrop": 0.2})):
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | more))
    shutil.copy(TOKENIZER, folder / "llm")
    return replace(PRESETS["tiny"], model=config, recipes=RECIPES, long=RECIPES,
                   clip=folder / "clip", llm=folder / "llm")  # fmt: skip


def checkpoint(folder, moe=MOE, seen=None):
    """A checkpoint of phase 3 that nothing was trained for; it has seen 8 images, or `seen`."""
    flags = TrainConfig(data=("phantoms:8",), device="cpu", dtype="float32")
    seen = leaks.seen_by(seen or load_samples(flags.data, "vqa", "train"))
    info = {"phase": 3, "flags": to_dict(flags)}
    model = conftest.shake(MedMoE(ModelConfig(VISION, DECODER, moe)))
    save_checkpoint(folder, model, model.config, info, TOKENIZER, {"seen": {"rows": seen}})
    return folder


def weights(path):
    return dict(open_tensors(path / "model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    """The log's entry of each step, without how long it took."""
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    timed = {"tokens_per_s", "mfu"}
    return [{k: r[k] for k in r if k not in timed} for r in records if "loss" in r]


def error_line(capsys, main, *argv):
    """The one line of an error with which main ends; its exit code is 2."""
    with pytest.raises(SystemExit, match=r"^2$"):
        main(list(map(str, argv)))
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def reads(n_patches, system="", max_len=10**6):
    """What data.py needs of a ModelConfig."""
    decoder, vision = SimpleNamespace(max_len=max_len), SimpleNamespace(n_patches=n_patches)
    return SimpleNamespace(vision=vision, decoder=decoder, system=system)
