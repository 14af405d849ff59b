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
    for name, param in model.named_parameters():
        noise = torch.randn(param.shape, generator=generator)
        noise = noise * (0.3 if param.dim() == 1 else param[0].numel() ** -0.5)
        is_scale = "norm" in name and name.endswith("weight")
        param.data = (is_scale + noise).half().float()
    return model.eval()


def their_model(family: str, sizes: dict, seed: int = 0) -> nn.Module:
    import transformers as t

    if family == "clip":
        return randomise(t.CLIPVisionModel(t.CLIPVisionConfig(**sizes)), seed)
    fields = {"tie_word_embeddings": False, "num_key_value_heads": sizes["num_attention_heads"],
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | sizes  # fmt: skip
    if "rope_theta" in sizes:
        names = [n for n in ("rope_theta", "partial_rotary_factor") if n in sizes]
        fields["rope_parameters"] = {"rope_type": "default"} | {n: fields.pop(n) for n in names}
    if family == "phi":
        return randomise(t.PhiForCausalLM(t.PhiConfig(**fields)), seed)
    if family == "stablelm":
        config = t.StableLmConfig(**fields, use_qkv_bias=True)
        return randomise(t.StableLmForCausalLM(config), seed)
    return randomise(t.LlamaForCausalLM(t.LlamaConfig(**fields)), seed)


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


def their_greedy(model: nn.Module, ids: Tensor, mask: Tensor, n: int = 32) -> Tensor:
    """(B, n) the likeliest tokens, one after the other, without a cache and without an end."""
    for _ in range(n):
        new = their_logits(model, ids, mask)[:, -1].argmax(dim=-1, keepdim=True)
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new).bool()], 1)
    return ids[:, -n:].contiguous()


def main() -> None:
    for family, sizes in SIZES.items():
        shutil.rmtree(HERE / family, ignore_errors=True)
        model, golden = their_model(family, sizes), {}
        write(model, HERE / family)
        if family == "clip":
            images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
            golden["images"] = images.half().float()
            states = model(golden["images"], output_hidden_states=True).hidden_states
            golden["hidden"] = states[-2].detach().contiguous()
        else:
            for side in ("left", "right"):
                ids, mask = padded(sizes["vocab_size"], side)
                golden |= {f"{side}.ids": ids, f"{side}.mask": mask}
                golden[f"{side}.logits"] = their_logits(model, ids, mask)
            golden["greedy"] = their_greedy(model, *padded(sizes["vocab_size"], "left"))
        save_file(golden, HERE / family / "outputs.safetensors")


if __name__ == "__main__":
    main()
