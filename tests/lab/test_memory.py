"""The plan of memory is what is alive in a step, counted on small models."""

import weakref
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import decoder
import vision
from config import IMAGE_ID, PHASES, DecoderConfig, ModelConfig, VisionConfig
from data import Batch
from lab import memory
from lab.memory import MemoryConfig, phase_plan
from model import MedMoE, freeze_all_but, make_sparse
from ops import use_sorted_experts

TINY = VisionConfig(image_size=56, patch_size=14, width=32, n_layers=3, n_heads=2, d_ff=64)
DECODERS = {
    "phi": DecoderConfig("phi", 512, 256, 4, 4, 1024, rotary_dim=8),
    "stablelm": DecoderConfig("stablelm", 512, 256, 4, 4, 704, rotary_dim=8, n_kv_heads=2),
}
TEXT = 64 - TINY.n_patches  # supervised positions of a sample


class Alive(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most there were."""

    def __init__(self, tensors):
        super().__init__()
        self.sizes, self.most = {}, 0
        self.add(tensors)

    def add(self, tensors):
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
        self.most = max(self.most, sum(self.sizes.values()))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.add(part for part in tree_leaves(out) if isinstance(part, torch.Tensor))
        return out


def step(config, phase, n_samples, flags):
    """Bytes kept by the last forward, bytes of trained biases in bf16, and the most of a step."""
    torch.manual_seed(0)
    model = MedMoE(config).train()
    if phase == 3:
        make_sparse(model, memory.MOE)
        use_sorted_experts(model)  # as on a GPU, which the plan is for
    freeze_all_but(model, PHASES[phase].trains)
    for block in model.decoder.blocks if flags.activation_checkpointing else ():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    ids = torch.tensor([[IMAGE_ID] * TINY.n_patches + [7] * TEXT] * n_samples)
    labels, images = ids.masked_fill(ids == IMAGE_ID, -100), torch.randn(n_samples, 3, 56, 56)
    batch = Batch(ids, ids == ids, labels, images, torch.full((n_samples,), -1))
    biases = [m.bias for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None]
    moments = [torch.empty_like(p) for p in model.parameters() if p.requires_grad for _ in "mv"]
    with Alive([*(p.data for p in model.parameters()), *moments]) as alive:
        for _ in range(flags.accumulate):
            before = sum(alive.sizes.values())
            with torch.autocast("cpu", torch.bfloat16):
                loss = model.loss(batch).total
                kept = sum(alive.sizes.values()) - before
            loss.backward()
    return kept, 2 * sum(b.numel() for b in biases if b.requires_grad), alive.most


@pytest.mark.parametrize("flags", [{"activation_checkpointing": True}, {"accumulate": 2}])
@pytest.mark.parametrize("phase", [1, 2, 3])
@pytest.mark.parametrize("family", DECODERS)
def test_the_plan_is_what_is_alive_in_a_step(family, phase, flags, monkeypatch):
    """Tables of the routes and rotary angles, up to 0.5 %, are left out of the plan."""
    for module in (decoder, vision):  # attention as on a GPU, which keeps no scores
        monkeypatch.setattr(module, "attention", lambda q, k, v, attn_mask=None: (
            F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)))  # fmt: skip
    monkeypatch.setattr(memory, "TEXT", TEXT)
    flags, config = MemoryConfig(**flags), ModelConfig(TINY, DECODERS[family])
    one, six = (phase_plan(flags, config, phase, n) for n in (1, 6))
    (kept_2, _, _), (kept_6, biases, most) = (step(config, phase, n, flags) for n in (2, 6))
    assert most / 1.005 <= six["total"] <= most * 1.15
    if not flags.activation_checkpointing:  # which counts one block as kept in backward
        activations = one["activations"] - TEXT * 8 * 512  # the loss's in backward
        assert activations <= (kept_6 - kept_2) / 4 <= 1.005 * activations
        assert (3 * kept_2 - kept_6) / 2 - biases == pytest.approx(one["copies"], rel=2e-4)
