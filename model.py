"""The whole system: CLIP tower -> projector -> spliced into the text -> decoder -> next token.

    patches = projector(vision(images))                   (n_images, P, D)
    x       = splice(embed(ids), patches)                 (B, T, D)
    h, routings = decoder(x)                              (B, T, D), one routing per sparse block
    loss    = cross_entropy(lm_head(h[t]), ids[t + 1])    where labels are not IGNORE

Shapes: B batch, T positions, P patches, W tower width, D d_model, V vocabulary, E experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, IMAGE_ID, ModelConfig, MoEConfig, UserError, warn_once
from data import Batch
from decoder import Cache, Decoder
from moe import upcycle
from routers import Hints, Router, Routing, get_router
from vision import Projector, VisionTower


class Loss(NamedTuple):
    total: Tensor  # () sum of the cross-entropies; divide by n_tokens for the mean
    n_tokens: int  # supervised tokens
    routings: list[Routing]


def splice(x: Tensor, patches: Tensor, is_patch: Tensor) -> Tensor:
    """Put patch features, in order, at their positions in the text.

    x (B, T, D) embeddings, patches (n_images, P, D), is_patch (B, T) bool -> (B, T, D).
    Raises ValueError if positions and patches differ in number, or a row holds half an image.
    Source: Med-MoE llava_arch.py:256-368 @148cbd6; there one placeholder stands for all P patches.
    """
    positions = is_patch.sum(dim=1)  # (B,)
    n_images, n_patches, _ = patches.shape
    if positions.sum() != n_images * n_patches or (positions % n_patches).any():
        raise ValueError(
            f"{positions.tolist()} places for {n_images} images of {n_patches} patches"
        )
    return x.masked_scatter(is_patch[..., None], patches.to(x.dtype))


class MedMoE(nn.Module):
    """Dense (phases 1 and 2) when config.moe is None, else sparse (phase 3)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.vision.width, config.decoder.d_model)
        self.decoder = Decoder(config.decoder)
        if config.moe is not None:
            make_sparse(self, config.moe)

    def forward(
        self, ids: Tensor, mask: Tensor, images: Tensor, hints: Hints = Hints(),
        cache: Cache | None = None,
    ) -> tuple[Tensor, list[Routing]]:  # fmt: skip
        """ids, mask and images as in Batch; what routers may know; a cache of positions, to extend.

        -> hidden states (B, T, D) after the final norm, which lm_head scores; routings.
        """
        is_patch = ids == IMAGE_ID  # (B, T)
        x = self.decoder.embed(ids.masked_fill(is_patch, 0))  # (B, T, D)
        # A cached step is one token, never a patch; asking any() would wait for the GPU.
        if len(images) or (ids.shape[1] > 1 and is_patch.any()):
            x = splice(x, self.projector(self.vision(images)), is_patch)
        return self.decoder(x, mask, hints._replace(ids=ids), cache)

    def loss(self, batch: Batch) -> Loss:
        """Next-token cross-entropy, summed over the supervised tokens (paper, equation 5)."""
        hints = Hints(prompt=batch.prompt(), modality=batch.modality)
        hidden, routings = self(batch.ids, batch.mask, batch.images, hints)
        target = batch.labels[:, 1:]  # (B, T - 1): position t is scored on token t + 1
        supervised = target != IGNORE
        logits = self.decoder.lm_head(hidden[:, :-1][supervised])  # (n_tokens, V)
        total = F.cross_entropy(logits.float(), target[supervised], reduction="sum")
        return Loss(total, logits.shape[0], routings)


def sparse_layers(config: ModelConfig, moe: MoEConfig) -> Sequence[int]:
    """The blocks whose FFN is sparse: every second one, unless moe.layers lists them."""
    return range(0, config.decoder.n_layers, 2) if moe.layers is None else moe.layers


def make_router(config: ModelConfig, moe: MoEConfig) -> Router:
    """Raises UserError for a router that cannot be found or built, or for too large a k."""
    if not 1 <= moe.top_k <= moe.n_experts:
        raise UserError(f"--top-k {moe.top_k}: must be from 1 to --experts, {moe.n_experts}")
    try:
        cls = get_router(moe.router)
        return cls(config.decoder.d_model, moe.n_experts, top_k=moe.top_k, level=moe.level)
    except (ValueError, TypeError, OSError, SyntaxError, ImportError) as error:
        raise UserError(f"--router {moe.router}: {error}") from error


def make_sparse(
    model: MedMoE, moe: MoEConfig, router_weights: dict[str, Tensor] | None = None
) -> None:
    """Upcycle the FFNs of the sparse layers in place; each gets its own copy of the router.

    router_weights: {"weight": (E, D), "bias": (E,)} as phase 2 trained them; None leaves each
    router as initialised.
    """
    for layer in sparse_layers(model.config, moe):
        block = model.decoder.blocks[layer]
        router = make_router(model.config, moe).to(block.attn.q.weight.device)
        if router_weights is not None:
            router.proj.load_state_dict(router_weights)
        block.mlp = upcycle(block.mlp, router, moe.n_experts, moe.start, moe.meta)
        block.is_sparse = True
    model.config = replace(model.config, moe=moe)


class Generated(NamedTuple):
    """One forward pass of generation."""

    tokens: Tensor  # (B,) int64, eos_id for samples that have ended
    routings: list[Routing]  # of the positions just computed: the prompt first, then one each


@torch.inference_mode()
def generate(
    model: MedMoE, batch: Batch, eos_id: int, max_new: int = 64, temperature: float = 0.0,
    top_p: float = 1.0, generator: torch.Generator | None = None,
) -> Iterator[Generated]:  # fmt: skip
    """Continue each prompt by one token a step, until all have ended with eos_id or max_new is hit.

    batch is padded on the left. temperature 0 is greedy; else tokens are sampled from the smallest
    set whose probability reaches top_p. Raises UserError for a router that looks ahead.
    """
    assert batch.mask[:, -1].all(), "prompts are padded on the left"
    for block in model.decoder.blocks:
        if block.is_sparse and not block.mlp.router.causal:
            raise UserError(f"router {type(block.mlp.router).__name__} looks at later tokens "
                            "(causal = False): cannot generate")  # fmt: skip
    hints = Hints(prompt=batch.mask, modality=batch.modality)
    cache = Cache(len(model.decoder.blocks))
    ids, mask, images = batch.ids, batch.mask, batch.images
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new):
        hidden, routings = model(ids, mask, images, hints, cache)
        logits = model.decoder.lm_head(hidden[:, -1]).float()  # (B, V)
        tokens = pick(logits, temperature, top_p, generator)  # (B,)
        tokens = tokens.masked_fill(ended, eos_id)
        ended = ended | (tokens == eos_id)
        yield Generated(tokens, routings)
        if ended.all():
            return
        ids, mask, images = tokens[:, None], torch.ones_like(mask[:, :1]), images[:0]
        hints = hints._replace(prompt=None)


def pick(logits: Tensor, temperature: float, top_p: float, generator=None) -> Tensor:
    """logits (B, V) -> the next token of each sample, (B,) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs  # probability of the likelier tokens
    probs = probs.masked_fill(before >= top_p, 0.0)
    chosen = torch.multinomial(probs, 1, generator=generator)  # (B, 1) rank
    return order.gather(-1, chosen).squeeze(-1)


def freeze_all_but(model: MedMoE, trains: tuple[str, ...]) -> None:
    """Set requires_grad by pattern. Raises ValueError for a pattern without a match."""
    names = [name for name, _ in model.named_parameters()]
    if dead := [p for p in trains if not any(fnmatchcase(n, p) for n in names)]:
        raise ValueError(f"no parameter matches {dead}")
    for name, param in model.named_parameters():
        param.requires_grad_(any(fnmatchcase(name, p) for p in trains))


def count_parameters(model: MedMoE) -> dict[str, int]:
    """Parameters: all of the model, those activated for one token, and the dense model's.

    Activated: everything but the experts, plus top_k experts of each sparse block.
    """
    total = sum(p.numel() for p in model.parameters())
    if (moe := model.config.moe) is None:
        return {"total": total, "activated": total, "dense_base": total}
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if ".mlp.router." in n)
    activated = total - experts + experts * moe.top_k // moe.n_experts
    ffns = 0 if moe.meta else experts // moe.n_experts  # the dense ones, if meta is not that
    return {"total": total, "activated": activated, "dense_base": total - experts - routers + ffns}


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """--device, --dtype -> where to compute, and in what precision matmuls run.

    "auto" takes bf16 where it is fast: on GPUs from compute capability 8.0 on (older ones, as T4
    and V100, only emulate it), and on CPUs that multiply it in hardware; else fp32.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    if device == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("--device mps: torch sees no Apple GPU here")
        warn_once("--device mps: torch's own ops; this has not been tried on a Mac")
    if dtype == "auto":
        able = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
        fast = able.get("avx512_bf16") or able.get("amx_bf16")
        if device == "cuda":
            fast = torch.cuda.get_device_capability() >= (8, 0)
        dtype = "bfloat16" if fast else "float32"
    return torch.device(device), getattr(torch, dtype)


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matmuls run in dtype; weights, norms and routers stay in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
