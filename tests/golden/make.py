"""Small random models of transformers, with inputs and outputs: the golden files.

    pip install transformers==5.23.0 && python -m tests.golden.make

Weights are random values that fp16 represents exactly, so a file is half as large and nothing is
lost. Tests of the tower, the decoder and generate compare with them; slow/test_parity makes more.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from config import ModelConfig
from engine.published import load_published, published_decoder, published_vision
from model import MedMoE

HERE = Path(__file__).parent
FAMILIES = ("clip", "phi", "stablelm", "llama")
SIZES = {
    "clip": {"image_size": 28, "patch_size": 7, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 3, "num_attention_heads": 2},
    "phi": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1},
    "stablelm": {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,
                 "num_hidden_layers": 2, "num_attention_heads": 2, "partial_rotary_factor": 0.25},
    "llama": {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 6, "num_key_value_heads": 2, "tie_word_embeddings": True},
}  # fmt: skip


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter at random, no bias 0 and no norm 1, in fp16's values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            noise = torch.randn(param.shape, generator=generator)
            if "norm" in name and name.endswith("weight"):
                param.copy_((1 + 0.3 * noise).half())
            elif param.dim() == 1:
                param.copy_((0.3 * noise).half())
            else:
                param.copy_((noise * param[0].numel() ** -0.5).half())
    return model.eval()


def their_model(family: str, sizes: dict, seed: int = 0) -> nn.Module:
    import transformers as t

    if family == "clip":
        return randomise(t.CLIPVisionModel(t.CLIPVisionConfig(**sizes)), seed)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    heads = sizes["num_attention_heads"]
    sizes = {"tie_word_embeddings": False, "num_key_value_heads": heads} | sizes
    if (theta := sizes.pop("rope_theta", None)) is not None:
        sizes["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
        if "partial_rotary_factor" in sizes:
            share = sizes.pop("partial_rotary_factor")
            sizes["rope_parameters"]["partial_rotary_factor"] = share
    if family == "phi":
        return randomise(t.PhiForCausalLM(t.PhiConfig(**sizes, **ids)), seed)
    if family == "stablelm":
        config = t.StableLmConfig(**sizes, **ids, use_qkv_bias=True)
        return randomise(t.StableLmForCausalLM(config), seed)
    return randomise(t.LlamaForCausalLM(t.LlamaConfig(**sizes, **ids)), seed)


def write(model: nn.Module, directory: Path) -> None:
    """What save_pretrained writes, with the weights in fp16."""
    model.save_pretrained(directory)
    (directory / "generation_config.json").unlink(missing_ok=True)
    path = directory / "model.safetensors"
    save_file({name: t.half() for name, t in load_file(path).items()}, path)


def padded(vocab_size: int, side: str, n: int = 4, longest: int = 11) -> tuple[Tensor, Tensor]:
    """ids and mask (n, longest) of different lengths, padded on one side."""
    generator = torch.Generator().manual_seed(n)
    ids = torch.randint(3, vocab_size, (n, longest), generator=generator)
    lengths = torch.tensor([[longest - 3 * i] for i in range(n)]).clamp(min=2)
    place = torch.arange(longest)
    return ids, place >= longest - lengths if side == "left" else place < lengths


def ours(family: str, llm: Path | None = None, clip: Path = HERE / "clip") -> MedMoE:
    """Our model with the weights of a folder that `write` wrote."""
    llm = llm or HERE / family
    config = ModelConfig(published_vision(clip), published_decoder(llm))
    model = MedMoE(config)
    load_published(model, config, clip, llm)
    return model.eval()


def outputs(family: str) -> dict[str, Tensor]:
    return load_file(HERE / family / "outputs.safetensors")


@torch.no_grad()
def their_logits(model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return model(ids, attention_mask=mask.long(), position_ids=positions).logits


@torch.no_grad()
def their_greedy(model: nn.Module, ids: Tensor, mask: Tensor, n: int = 32) -> Tensor:
    """(B, n) the likeliest tokens, one after the other, without a cache and without an end."""
    start = ids.shape[1]
    for _ in range(n):
        new = their_logits(model, ids, mask)[:, -1].argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new).bool()], 1)
    return ids[:, start:]


def main() -> None:
    for family in FAMILIES:
        directory = HERE / family
        shutil.rmtree(directory, ignore_errors=True)
        model = their_model(family, dict(SIZES[family]))
        write(model, directory)
        golden = {}
        if family == "clip":
            generator = torch.Generator().manual_seed(0)
            golden["images"] = torch.randn(2, 3, 28, 28, generator=generator).half().float()
            with torch.no_grad():
                states = model(golden["images"], output_hidden_states=True).hidden_states
            golden["hidden"] = states[-2]
        else:
            for side in ("left", "right"):
                ids, mask = padded(SIZES[family]["vocab_size"], side)
                golden |= {f"{side}.ids": ids, f"{side}.mask": mask}
                golden[f"{side}.logits"] = their_logits(model, ids, mask)
            golden["greedy"] = their_greedy(model, *padded(SIZES[family]["vocab_size"], "left"))
        save_file(
            {name: t.contiguous() for name, t in golden.items()}, directory / "outputs.safetensors"
        )


if __name__ == "__main__":
    main()
