"""Phi-2 at full size with random weights: write shards, load, answer, make it sparse.

    python -m tests.fullsize write DIR      CLIP-L and Phi-2 in bf16, 6.1 GB
    python -m tests.fullsize dense DIR      loads them and generates 8 tokens for a 336 px image
    python -m tests.fullsize sparse DIR     the same after upcycling to 4 experts and meta

Each prints one JSON line: seconds, bytes of the weights, peak resident memory.
"""

import itertools
import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from checkpoint import empty_model
from config import IMAGE_ID, ModelConfig, MoEConfig, preset
from data import Batch
from engine.published import clip_table, decoder_table, load_published, rename
from model import MedMoE, generate, make_sparse

SHARD = 5_000_000_000  # bytes, as published
CONFIG = preset("phi2").model


def published_names(prefix: str, table: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        model = MedMoE(CONFIG)
    inverse = {ours: theirs for theirs, ours in table.items() if ours}
    named = [(n, p.shape) for n, p in model.named_parameters() if n.startswith(prefix)]
    return {rename(name, inverse): shape for name, shape in named}


def write_shards(directory: Path, shapes: dict[str, torch.Size]) -> None:
    """Random bf16 tensors in files of at most SHARD bytes, with an index."""
    directory.mkdir(parents=True)
    noise = torch.randn(max(s.numel() for s in shapes.values())).mul_(0.02).bfloat16()
    shards: list[dict] = [{}]
    for name, shape in shapes.items():
        if sum(2 * t.numel() for t in shards[-1].values()) + 2 * shape.numel() > SHARD:
            shards.append({})
        is_norm = "norm" in name and name.endswith("weight")
        tensor = noise[: shape.numel()].view(shape) + is_norm
        shards[-1][name] = tensor.clone()
    where = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        save_file(shard, directory / file)
        where |= dict.fromkeys(shard, file)
    index = {"weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write(directory: Path) -> dict:
    v, d = CONFIG.vision, CONFIG.decoder
    write_shards(directory / "clip", published_names("vision.", clip_table(v)))
    (directory / "clip" / "config.json").write_text(json.dumps({
        "image_size": v.image_size, "patch_size": v.patch_size, "hidden_size": v.width,
        "num_hidden_layers": v.n_layers, "num_attention_heads": v.n_heads,
        "intermediate_size": v.d_ff,
    }))  # fmt: skip
    write_shards(directory / "phi", published_names("decoder.", decoder_table(d)))
    (directory / "phi" / "config.json").write_text(json.dumps({
        "model_type": "phi", "vocab_size": d.vocab_size, "hidden_size": d.d_model,
        "num_hidden_layers": d.n_layers, "num_attention_heads": d.n_heads,
        "intermediate_size": d.d_ff, "partial_rotary_factor": 0.4, "resid_pdrop": 0.1,
        "max_position_embeddings": d.max_len,
    }))  # fmt: skip
    files = directory.rglob("*.safetensors")
    return {"bytes": sum(p.stat().st_size for p in files)}


def peak() -> int:
    """Most resident bytes so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def load(directory: Path) -> tuple[MedMoE, dict]:
    before, start = peak(), time.perf_counter()
    model = empty_model(CONFIG, torch.bfloat16)
    load_published(model, CONFIG, directory / "clip", directory / "phi")
    seconds = time.perf_counter() - start
    for param in model.projector.parameters():
        torch.nn.init.normal_(param, std=0.02)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {"load_s": seconds, "bytes": size, "peak_bytes": peak(), "before_bytes": before}
    return model.eval(), found


def answer(model: MedMoE, config: ModelConfig) -> dict:
    """8 tokens about a random 336 px image, batch 1."""
    n = config.vision.n_patches
    ids = torch.tensor([[100, 200, 300, *[IMAGE_ID] * n, *range(400, 420)]])
    images = torch.randn(1, 3, config.vision.image_size, config.vision.image_size)
    mask = torch.ones_like(ids).bool()
    batch = Batch(ids, mask, ids, images.bfloat16(), torch.tensor([-1]))
    times, tokens = [time.perf_counter()], []
    for step in generate(model, batch, eos_id=-1, max_new=8):
        times.append(time.perf_counter())
        tokens.append(int(step.tokens))
    spent = [b - a for a, b in itertools.pairwise(times)]
    return {"positions": ids.shape[1], "prefill_s": spent[0],
            "token_s": sorted(spent[1:])[len(spent[1:]) // 2], "tokens": tokens}  # fmt: skip


def main(what: str, directory: str) -> None:
    torch.manual_seed(0)
    path = Path(directory)
    if what == "write":
        found = write(path)
    else:
        model, found = load(path)
        if what == "sparse":
            make_sparse(model, MoEConfig())
            found["parameters"] = sum(p.numel() for p in model.decoder.parameters())
        found |= answer(model, model.config)
        found["final_peak_bytes"] = peak()
    print(json.dumps(found | {"what": what, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
