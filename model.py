"""The whole system: CLIP tower -> projector -> spliced into the text -> decoder -> next token.

    patches = projector(vision(image))                    (n_images, P, D)
    x       = splice(embed(ids), patches)                 (B, T, D)
    h, routings = decoder(x)                              (B, T, D), one routing a sparse block
    loss    = cross_entropy(lm_head(h[t]), ids[t + 1])    where labels say so

Shapes: B batch, T positions, P patches, W tower width, D d_model, V vocabulary, E experts.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import IGNORE, IMAGE_ID, ModelConfig, MoEConfig, UserError
from data import Batch
from decoder import Cache, Decoder
from moe import upcycle
from routers import Hints, Router, Routing, get_router
from vision import VisionTower


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """--device, --dtype -> where to compute, and in what precision matmuls run.

    "auto" takes bf16 where it is fast: on a GPU, and on CPUs that multiply it in hardware.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here")
    if dtype == "auto":
        able = getattr(torch.cpu, "get_capabilities", dict)()
        fast = device == "cuda" or able.get("avx512_bf16") or able.get("amx_bf16")
        dtype = "bfloat16" if fast else "float32"
    return torch.device(device), getattr(torch, dtype)


def precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """A context in which matmuls run in dtype; weights, norms and routers stay in fp32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


class Loss(NamedTuple):
    total: Tensor  # () sum of the cross-entropies; divide by n_tokens for the mean
    n_tokens: int  # supervised tokens
    routings: list[Routing]


class Projector(nn.Module):
    """Tower width -> decoder width: Linear, exact GELU, Linear (LLaVA's mlp2x_gelu)."""

    def __init__(self, width: int, d_model: int):
        super().__init__()
        self.fc1 = nn.Linear(width, d_model)
        self.fc2 = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # (n_images, P, D)


def splice(x: Tensor, patches: Tensor, is_patch: Tensor) -> Tensor:
    """Put patch features, in order, where their places are in the text.

    x (B, T, D) embeddings, patches (n_images, P, D), is_patch (B, T) bool -> (B, T, D).
    Raises ValueError if the places are not as many as the patches, or a row holds half an image.
    Source: Med-MoE llava_arch.py:256-368 @148cbd6; there one placeholder stands for all P places.
    """
    places = is_patch.sum(dim=1)  # (B,)
    n_images, n_patches, _ = patches.shape
    if places.sum() != n_images * n_patches or (places % n_patches).any():
        raise ValueError(f"{places.tolist()} places for {n_images} images of {n_patches} patches")
    return x.masked_scatter(is_patch[..., None], patches.to(x.dtype))


class MedMoE(nn.Module):
    """Dense (phases 1 and 2) when config.moe is None, else sparse (phase 3)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.together = False  # several processes: each runs every module, images or not
        self.vision = VisionTower(config.vision)
        self.projector = Projector(config.vision.width, config.decoder.d_model)
        self.decoder = Decoder(config.decoder)
        if config.moe is not None:
            make_sparse(self, config.moe)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor,
        images: Tensor,
        hints: Hints = Hints(),
        cache: Cache | None = None,
        features: Tensor | None = None,
        given: Sequence[Routing] = (),
    ) -> tuple[Tensor, list[Routing]]:
        """-> hidden states (B, T, D) after the final norm, routings. lm_head scores them.

        features: what the tower says of the images, (n_images, P, W), where it is known already.
        given: one routing a sparse block, to be taken in place of what its router would decide.
        """
        hints = hints._replace(ids=ids)
        is_patch = ids == IMAGE_ID  # (B, T)
        x = self.decoder.embed(ids.masked_fill(is_patch, 0))  # (B, T, D)
        # A cached step is one token, never a patch: no need to look, which would wait for a GPU.
        n_images = len(images if features is None else features)
        if ids.shape[1] > 1 and (n_images or self.together or is_patch.any()):
            x = splice(x, self.look(images, features), is_patch)
        return self.decoder(x, mask, hints, cache, given)

    def look(self, images: Tensor, features: Tensor | None) -> Tensor:
        """images (n, 3, S, S), or what the tower says of them, (n, P, W) -> patches (n, P, D)."""
        shown = images if features is None else features
        n = len(shown)
        if self.together and n == 0:  # the others wait for this process's shares: a blank one
            shown = shown.new_zeros(1, *shown.shape[1:])
        return self.projector(self.vision(shown) if features is None else shown)[:n]

    def loss(self, batch: Batch) -> Loss:
        """Next-token cross-entropy, summed over the supervised tokens (paper, equation 5)."""
        hints = Hints(prompt=batch.prompt(), modality=batch.modality)
        hidden, routings = self(batch.ids, batch.mask, batch.images, hints, None, batch.features)
        target = batch.labels[:, 1:]  # (B, T - 1): position t is scored on token t + 1
        supervised = target != IGNORE
        logits = self.decoder.lm_head(hidden[:, :-1][supervised])  # (n_tokens, V)
        total = F.cross_entropy(logits.float(), target[supervised], reduction="sum")
        return Loss(total, logits.shape[0], routings)


def sparse_layers(config: ModelConfig, moe: MoEConfig) -> Sequence[int]:
    every = range(0, config.decoder.n_layers, moe.every)
    return every if moe.layers is None else moe.layers


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
    """Upcycle every `moe.every`-th FFN in place; each gets its own copy of the router's weights.

    router_weights: {"weight": (E, D), "bias": (E,)} as phase 2 trained them, or None to leave a
    router as it was drawn.
    """
    for layer in sparse_layers(model.config, moe):
        block = model.decoder.blocks[layer]
        router = make_router(model.config, moe).to(block.attn.q.weight.device)
        if router_weights is not None:
            router.proj.load_state_dict(router_weights)
        block.mlp = upcycle(block.mlp, router, moe.n_experts, moe.start, moe.meta, moe.residual)
        block.is_sparse = True
    model.config = replace(model.config, moe=moe)


def empty_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> MedMoE:
    """A model to be filled from a file: nothing is drawn, no memory touched. Routers are fp32."""
    with torch.device("meta"):
        model = MedMoE(config)
    model = model.to(dtype)
    for block in model.decoder.blocks:
        if block.is_sparse:
            block.mlp.router.float()
    model = model.to_empty(device="cpu")
    model.decoder.tie()  # to_empty makes two of what was one
    return model


class Step(NamedTuple):
    """One round of generation."""

    tokens: Tensor  # (B,) int64, eos_id for samples that have ended
    routings: list[Routing]  # of the positions just computed: the prompt first, then one each


@torch.inference_mode()
def generate(
    model: MedMoE,
    batch: Batch,
    eos_id: int,
    max_new: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    routes: Iterator[Sequence[Routing]] | None = None,
) -> Iterator[Step]:
    """Continue each prompt, one token a Step, until all have said eos_id or max_new is reached.

    batch is padded on the left. temperature 0 is greedy; else tokens are drawn from the smallest
    set whose probability reaches top_p. routes: of each round, what the sparse blocks take in
    place of deciding (routes.py). Raises UserError for a router that looks ahead.
    """
    assert batch.mask[:, -1].all(), "prompts are padded on the left"
    for block in model.decoder.blocks:
        if block.is_sparse and not block.mlp.router.causal:
            name = type(block.mlp.router).__name__
            raise UserError(
                f"router {name} looks at later tokens (causal = False): cannot generate"
            )
    hints = Hints(prompt=batch.mask, modality=batch.modality)
    cache = Cache(len(model.decoder.blocks))
    ids, mask, images = batch.ids, batch.mask, batch.images
    ended = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_new):
        given = next(routes) if routes else ()
        hidden, routings = model(ids, mask, images, hints, cache, given=given)
        logits = model.decoder.lm_head(hidden[:, -1]).float()  # (B, V)
        tokens = pick(logits, temperature, top_p, generator)  # (B,)
        tokens = tokens.masked_fill(ended, eos_id)
        ended = ended | (tokens == eos_id)
        yield Step(tokens, routings)
        if ended.all():
            return
        ids, mask, images = tokens[:, None], torch.ones_like(mask[:, :1]), images[:0]
        hints = hints._replace(prompt=None)


def pick(logits: Tensor, temperature: float, top_p: float, generator=None) -> Tensor:
    """logits (B, V) -> the next token of each sample, (B,) int64."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs  # mass of the likelier tokens
    probs = probs.masked_fill(before >= top_p, 0.0)
    chosen = torch.multinomial(probs, 1, generator=generator)  # (B, 1) rank
    return order.gather(-1, chosen).squeeze(-1)


def freeze_all_but(model: MedMoE, trains: tuple[str, ...]) -> list[str]:
    """Set requires_grad by pattern; returns the trained names. A pattern without a match raises."""
    names = [name for name, _ in model.named_parameters()]
    if dead := [p for p in trains if not any(fnmatchcase(n, p) for n in names)]:
        raise ValueError(f"no parameter matches {dead}")
    for name, param in model.named_parameters():
        param.requires_grad_(any(fnmatchcase(name, p) for p in trains))
    return [name for name, param in model.named_parameters() if param.requires_grad]


def compile_blocks(model: MedMoE) -> None:
    """Compile every block in place, so that parameters keep their names.

    Of a sparse block only what all rows pass: how many visit an expert is known when they do. A
    graph that ended there would suit dense blocks too, and recomputing could pick another graph.
    Raises UserError where torch cannot compile, as without a C++ compiler.
    """
    torch.compiler.reset()  # the phase before compiled the same code for other tensors
    try:
        torch.compile(torch.sin)(torch.zeros(1))
    except Exception as error:  # each backend has its own
        raise UserError(f"--compile: torch cannot compile here: {error}") from error
    for block in (*model.vision.blocks, *model.decoder.blocks):
        parts = [block]
        if getattr(block, "is_sparse", False):
            parts = [block.attn, block.mlp.meta, block.mlp.dense]
        for part in filter(None, parts):
            part.compile(dynamic=True)


def describe(model: MedMoE) -> list[str]:
    """One line for each family of parameters: trained or frozen, and how many."""
    families: dict[tuple[bool, str], int] = {}
    for name, param in model.named_parameters():
        parts = re.sub(r"\.\d+\.", ".*.", name).split(".")[:-1]  # without weight, bias
        if len(parts) > 2 and not parts[-1].startswith("ln"):
            parts.pop()  # q, k, v, o together; fc1 and fc2 together
        key = (param.requires_grad, "vision" if parts[0] == "vision" else ".".join(parts))
        families[key] = families.get(key, 0) + param.numel()
    rows = sorted(families.items(), key=lambda item: (not item[0][0], item[0][1]))
    return [f"  {'trains' if on else 'frozen'}  {name:<32}{n:>14,}" for (on, name), n in rows]


def count_parameters(model: MedMoE) -> dict[str, int]:
    """Parameters: all of the model, those one token activates, and the dense model it came from.

    Activated: everything but the experts, plus top_k experts of each sparse block.
    """
    total = sum(p.numel() for p in model.parameters())
    moe = model.config.moe
    experts = sum(p.numel() for n, p in model.named_parameters() if ".mlp.experts." in n)
    routers = sum(p.numel() for n, p in model.named_parameters() if ".mlp.router." in n)
    if moe is None:
        return {"total": total, "activated": total, "dense_base": total}
    activated = total - experts + experts * moe.top_k // moe.n_experts
    return {"total": total, "activated": activated, "dense_base": total - experts - routers}
