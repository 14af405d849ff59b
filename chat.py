"""Ask about an image: python chat.py runs/tiny/phase3 --image FILE --question TEXT

The answer appears as it is generated; then the experts that the image's patches, the question and
each token of the answer were routed to. Without --question it asks for questions until an empty
line. --image phantom:SEED is one of the embedded images. Not a medical device.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import ops
from checkpoint import load_model
from config import IMAGE_ID, MODALITIES, Common, UserError, argument, flag
from data import Batch, Sample, Text, collate, encode_prompt
from engine.cli import parse, user_errors
from model import Generated, MedMoE, autocast, choose_device, generate, sparse_layers
from sources.images import Images


@dataclass(frozen=True)
class ChatConfig(Common):
    """Ask a checkpoint about an image."""

    lacks = ("data", "batch_size", "max_missing", "image_folder", "router_labels", "lang", "json")
    checkpoint: str = argument("DIR of a finished phase")
    image: str | None = flag(None, "an image FILE, or phantom:SEED; none: text only")
    question: str | None = flag(None, "what to ask (default: read questions from the terminal)")
    max_new: int = flag(64, "longest answer, in tokens", least=1)
    temperature: float = flag(0.0, "0: always the likeliest token")
    top_p: float = flag(1.0, "sample from the likeliest tokens that make up this probability")


def as_sample(image: str | None, question: str) -> Sample:
    """Raises UserError for a phantom without a number; a file is opened later."""
    where: Path | int | None = None if image is None else Path(image)
    if image is not None and image.startswith("phantom:"):
        seed = image.removeprefix("phantom:")
        if not seed.isdecimal():
            raise UserError(f"--image {image}: must be phantom:SEED, a whole number")
        where = int(seed)
    return Sample("question", "you", "chat", where, ((question, ""),))


class Stream:
    """Prints tokens as text as soon as it is certain: a character may take several tokens."""

    def __init__(self, text: Text):
        self.text, self.ids, self.n_printed = text, [], 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        decoded = self.text.decode(self.ids)
        if not decoded.endswith("\ufffd"):
            new = decoded[self.n_printed :] if self.n_printed else decoded.lstrip()
            self.n_printed = len(decoded)
            print(new, end="", flush=True)


def shares(gates: Tensor, which: Tensor) -> str:
    """gates (T, E), which (T,) bool -> each expert's share of those tokens."""
    routed = (gates[which] != 0).float().sum(dim=0)  # (E,)
    return "  ".join(f"{v:7.1%}" for v in (routed / routed.sum().clamp(min=1)).tolist())


def show_routes(
    steps: list[Generated], batch: Batch, text: Text, names: list[str], blocks: Sequence[int]
) -> None:
    """The experts of the patches, the question and each answer token, block by block."""
    is_patch = batch.ids[0] == IMAGE_ID  # (T,)
    print("\nexperts             " + "  ".join(f"{name:>7.7}" for name in names))
    for block, routing in zip(blocks, steps[0].routings, strict=True):
        if is_patch.any():
            print(f"  block {block:<2} image    {shares(routing.gates[0], is_patch)}")
        print(f"  block {block:<2} question {shares(routing.gates[0], ~is_patch)}")
    for before, step in pairwise(steps):
        token = text.decode([int(before.tokens[0])])
        chosen = []
        for block, routing in zip(blocks, step.routings, strict=True):
            experts = routing.gates[0, 0].nonzero().flatten().tolist()
            chosen.append(f"block {block}: " + "+".join(names[e] for e in experts))
        print(f"  answer {token!r:<14} " + "  ".join(chosen))


def ask(model: MedMoE, text: Text, images: Images, flags: ChatConfig, question: str) -> None:
    config = model.config
    device, dtype = choose_device(flags.device, flags.dtype)
    sample = as_sample(flags.image, question)
    encoded = encode_prompt(question, sample.image is not None, text, config)
    batch = collate([sample], [encoded], images, text.eos_id, side="left").to(device)
    generator = torch.Generator(device).manual_seed(flags.seed)
    stream, steps = Stream(text), []
    with autocast(device, dtype):
        for step in generate(
            model, batch, text.eos_id, flags.max_new, flags.temperature, flags.top_p, generator
        ):
            steps.append(step)
            if (token := int(step.tokens[0])) != text.eos_id:
                stream.add(token)
    print()
    if config.moe is not None:
        n = config.moe.n_experts
        is_named = config.moe.router in ("modality", "oracle")
        names = [MODALITIES[e] if is_named and e < len(MODALITIES) else f"e{e}" for e in range(n)]
        show_routes(steps, batch, text, names, sparse_layers(config, config.moe))


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(ChatConfig, argv, "chat.py")
    if 0 < flags.temperature < 0.01:  # it overflows
        raise UserError(f"--temperature {flags.temperature}: must be 0 or from 0.01 up")
    if not 0 < flags.top_p <= 1:
        raise UserError(f"--top-p {flags.top_p}: must be above 0 and at most 1")
    device, dtype = choose_device(flags.device, flags.dtype)
    ops.choose(flags.kernels, device)
    model, text, _ = load_model(Path(flags.checkpoint), device, dtype)
    images = Images(model.config.vision.image_size, pad=True)
    if flags.question is not None:
        ask(model, text, images, flags, flags.question)
        return
    print("Ask about the image; an empty line ends. Not a medical device.", file=sys.stderr)
    with suppress(EOFError, KeyboardInterrupt):
        while question := input("> ").strip():
            ask(model, text, images, flags, question)


if __name__ == "__main__":
    main()
