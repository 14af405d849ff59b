"""A preset of 30 000 random parameters, its checkpoints, and readers of what a run leaves."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from checkpoint import save_checkpoint
from config import (
    PRESETS,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    Preset,
    Recipe,
    TrainConfig,
    VisionConfig,
    to_dict,
)
from engine.published import CLIP, PHI
from lab.convert import publish
from model import MedMoE
from scoring import leaks
from sources.load import load_samples
from sources.tensorfiles import open_tensors
from tests.conftest import shake

VISION = VisionConfig(image_size=32, patch_size=16, width=16, n_layers=2, n_heads=2, d_ff=32)
DECODER = DecoderConfig("phi", 1024, 16, 3, 2, 32, rotary_dim=4, max_len=512, dropout=0.2)
RECIPES = {n: Recipe(1e-2, 1, 4) for n in (1, 2, 3)}
MOE = MoEConfig()
TOKENIZER = PRESETS["tiny"].llm / "tokenizer.json"


def mini(folder: Path) -> Preset:
    """Write its published parts into the folder; `train.py --preset` finds it under PRESETS."""
    config = ModelConfig(VISION, DECODER)
    torch.manual_seed(5)
    tensors = {n: p.detach() for n, p in MedMoE(config).named_parameters()}
    for part, prefix, table in (("clip", "vision.", CLIP), ("llm", "decoder.", PHI)):
        (folder / part).mkdir(parents=True)
        mine = {n: t for n, t in tensors.items() if n.startswith(prefix)}
        save_file(publish(mine, table, torch.float32), folder / part / "model.safetensors")
    (folder / "clip" / "config.json").write_text(json.dumps({
        "image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 32, "pretrained_on": ["phantoms"],
    }))  # fmt: skip
    (folder / "llm" / "config.json").write_text(json.dumps({
        "model_type": "phi", "vocab_size": 1024, "hidden_size": 16, "num_hidden_layers": 3,
        "num_attention_heads": 2, "intermediate_size": 32, "partial_rotary_factor": 0.5,
        "max_position_embeddings": 512, "resid_pdrop": 0.2,
    }))  # fmt: skip
    shutil.copy(TOKENIZER, folder / "llm")
    return replace(PRESETS["tiny"], model=config, recipes=RECIPES, long=RECIPES,
                   clip=folder / "clip", llm=folder / "llm")  # fmt: skip


def checkpoint(folder: Path, moe: MoEConfig | None = MOE, seen=None) -> Path:
    """A checkpoint of phase 3 that nothing was trained for; it has seen 8 images, or `seen`."""
    flags = TrainConfig(data=("phantoms:8",), device="cpu", dtype="float32")
    seen = leaks.seen_by(seen or load_samples(flags.data, "vqa", "train"))
    info = {"phase": 3, "flags": to_dict(flags)}
    model = shake(MedMoE(ModelConfig(VISION, DECODER, moe)))
    save_checkpoint(folder, model, model.config, info, TOKENIZER, {"seen": {"rows": seen}})
    return folder


def weights(path):
    return dict(open_tensors(path / "model.safetensors"))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(out):
    """The log's entry of each step, without how long it took."""
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in r.items() if k not in ("tokens_per_s", "mfu")}
        for r in records
        if "loss" in r
    ]


def reads(n_patches, system="", max_len=10**6):
    """What data.py needs of a ModelConfig."""
    decoder, vision = SimpleNamespace(max_len=max_len), SimpleNamespace(n_patches=n_patches)
    return SimpleNamespace(vision=vision, decoder=decoder, system=system)
