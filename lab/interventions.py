"""One question, answered with the routing changed: what would another expert have said?

For lab.demo. Nothing of the model is changed for longer than it takes to compute one token.

Shapes: S image side, E experts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

import ops
from checkpoint import load_model
from config import MODALITIES, MoEConfig, UserError, one_line
from data import Sample, collate, encode_prompt
from engine import familiar
from engine.overlay import Routes
from engine.routes import forced_routers, replaced_routers, routers_of
from lab.controls import ByModality, FirstOnly
from model import MedMoE, autocast, choose_device, generate
from routers import Router
from sources.images import Images

OWN, FIRST, NO_META, TRUE = "own", "first", "no-meta", "true"  # or an expert's number


def interventions(moe: MoEConfig | None) -> dict[str, str]:
    """The names of those that a model has, each in words."""
    if moe is None:
        return {OWN: "as it is"}
    names = MODALITIES if moe.router in ("modality", "oracle") else ()
    known = [f", {name}" for name in names[: moe.n_experts]] + [""] * moe.n_experts
    alone = {str(e): f"all tokens to expert {e}{known[e]}" for e in range(moe.n_experts)}
    meta = {NO_META: "without the meta expert"} if moe.meta else {}
    return {OWN: "as it is", **alone, FIRST: "top-1: each token's first expert alone", **meta,
            TRUE: "the true modality's expert first"}  # fmt: skip


class Checkpoint:
    """A loaded model, and whether an image is like those that it was trained on."""

    def __init__(self, folder: str, device: str, dtype: str, kernels: str, router: str | None):
        self.device, self.dtype = choose_device(device, dtype)
        ops.choose(kernels, self.device)
        self.model, self.text, info = load_model(Path(folder), self.device, self.dtype, router)
        self.config, self.questions = self.model.config, info.get("questions", [])
        self.name = one_line("/".join(Path(folder).absolute().parts[-2:]))
        self.known = familiar.read(Path(folder))
        self.images = Images(self.config.vision.image_size, pad=True)

    def unlike(self, pixels: Tensor) -> str:
        with autocast(self.device, self.dtype):
            return familiar.unlike(self.model, pixels.to(self.device), self.known)

    def routing(self, how: str, modality: str | None) -> tuple[list[Router], bool]:
        """-> the routers of an intervention, and whether meta experts stay. Raises UserError."""
        if how not in interventions(self.config.moe):
            raise UserError(f"{self.name} has no such routing: it has other experts, or none")
        if how == TRUE and modality is None:
            raise UserError("the true modality of a file is not known; choose an expert")
        if how.isdecimal():
            return forced_routers(self.model, int(how)), True
        make = {FIRST: FirstOnly, TRUE: ByModality}.get(how, lambda router: router)
        return [make(router) for router in routers_of(self.model)], how != NO_META


@contextmanager
def changed(model: MedMoE, routers: list[Router], meta: bool, logits: list) -> Iterator[None]:
    """These routers, and perhaps no meta expert; the head's logits are kept in the list."""
    layers = [block.mlp for block in model.decoder.blocks if block.is_sparse]
    before = [layer.meta for layer in layers]
    hook = model.decoder.lm_head.register_forward_hook(lambda *call: logits.append(call[-1]))
    try:
        for layer in layers if not meta else ():
            layer.meta = None
        with replaced_routers(model, routers):
            yield
    finally:
        hook.remove()
        for layer, own in zip(layers, before, strict=True):
            layer.meta = own


class Answer(NamedTuple):
    text: str  # so far
    likelihood: float  # the probability of all its tokens, with the one that ends it
    routes: Routes


def answers(
    c: Checkpoint, pixels: Tensor, modality: str | None, question: str, how: str, max_new: int
) -> Iterator[Answer]:
    """The likeliest answer, after each of its tokens. pixels (3, S, S) uint8. Raises UserError."""
    routers, meta = c.routing(how, modality)
    encoded = encode_prompt(question, True, c.text, c.config)
    sample = Sample("question", "you", "demo", 0, ((question, ""),), modality)
    images = SimpleNamespace(size=c.images.size, get=lambda sample: pixels)
    batch = collate([sample], [encoded], images, c.text.eos_id, "left").to(c.device)
    room = c.config.decoder.max_len - len(encoded[0])
    generating = generate(c.model, batch, c.text.eos_id, min(max_new, room))
    steps, ids, total = [], [], 0.0
    while True:
        # Anew for each token: a server may take another thread for the next, or not ask for it.
        logits: list[Tensor] = []
        with changed(c.model, routers, meta, logits), autocast(c.device, c.dtype):
            if (step := next(generating, None)) is None:
                return
        steps.append(step)
        token = int(step.tokens[0])
        total += float(torch.log_softmax(logits[0][0].float(), dim=-1)[token])
        ids += [token] * (token != c.text.eos_id)
        text = c.text.decode(ids).strip().rstrip("\ufffd")  # a character may take several tokens
        yield Answer(text, math.exp(total), Routes(c.config, batch, steps))
