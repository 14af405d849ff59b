"""Ask about a picture: python chat.py runs/tiny/phase3 --image FILE --question TEXT

The answer appears as it is made; then which experts the picture's patches, the question and each
token of the answer visited. Without --question it asks you for questions until an empty line.
--image phantom:SEED draws one of the embedded pictures. Not a medical device.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import kernels
from checkpoint import load_model
from config import IGNORE, IMAGE_ID, MODALITIES, UserError
from data import Batch, Text, collate, encode_prompt
from flags import Common, argument, flag, parse, user_errors
from model import MedMoE, Step, choose_device, generate, precision, sparse_layers
from pictures import Images
from records import Sample


@dataclass(frozen=True)
class ChatConfig(Common):
    """Ask a checkpoint about a picture."""

    checkpoint: str = argument("DIR of a finished phase")
    image: str | None = flag(None, "a picture FILE, or phantom:SEED; none: text only")
    question: str | None = flag(None, "what to ask (default: ask me)")
    max_new: int = flag(64, "longest answer, in tokens")
    temperature: float = flag(0.0, "0: always the likeliest token")
    top_p: float = flag(1.0, "draw from the likeliest tokens that make up this probability")


def as_sample(image: str | None, question: str) -> Sample:
    """Raises UserError for a phantom without a number; a file is opened later."""
    where: Path | int | None = None
    if image is not None and image.startswith("phantom:"):
        seed = image.removeprefix("phantom:")
        if not seed.isdecimal():
            raise UserError(f"--image {image}: must be phantom:SEED, a whole number")
        where = int(seed)
    elif image is not None:
        where = Path(image)
    return Sample("question", "you", "chat", where, ((question, ""),))


class Stream:
    """Tokens -> text, printed as soon as it is sure: a character may take several tokens."""

    def __init__(self, text: Text):
        self.text, self.ids, self.shown = text, [], 0

    def add(self, token: int) -> None:
        self.ids.append(token)
        whole = self.text.decode(self.ids)
        if not whole.endswith("\ufffd"):
            fresh = whole[self.shown :] if self.shown else whole.lstrip()
            self.shown = len(whole)
            print(fresh, end="", flush=True)


def shares(gates: Tensor, which: Tensor) -> str:
    """gates (T, E), which (T,) bool -> each expert's share of the visits of those positions."""
    visits = (gates[which] != 0).float().sum(dim=0)  # (E,)
    return "  ".join(f"{v:7.1%}" for v in (visits / visits.sum().clamp(min=1)).tolist())


def show_routes(
    steps: list[Step], batch: Batch, text: Text, names: list[str], blocks: Sequence[int]
) -> None:
    """Which experts the patches, the question and each answer token visited, block by block."""
    is_patch = batch.ids[0] == IMAGE_ID  # (T,)
    print("\nvisits              " + "  ".join(f"{name:>7.7}" for name in names))
    for block, routing in zip(blocks, steps[0].routings, strict=True):
        if is_patch.any():
            print(f"  block {block:<2} picture  {shares(routing.gates[0], is_patch)}")
        print(f"  block {block:<2} question {shares(routing.gates[0], ~is_patch)}")
    for before, step in pairwise(steps):
        token = text.decode([int(before.tokens[0])])
        visited = []
        for block, routing in zip(blocks, step.routings, strict=True):
            experts = routing.gates[0, 0].nonzero().flatten().tolist()
            visited.append(f"block {block}: " + "+".join(names[e] for e in experts))
        print(f"  answer {token!r:<14} " + "  ".join(visited))


def ask(model: MedMoE, text: Text, images: Images, flags: ChatConfig, question: str) -> None:
    config = model.config
    device, dtype = choose_device(flags.device, flags.dtype)
    sample = as_sample(flags.image, question)
    limits = config.vision.n_patches, config.system, config.decoder.max_len
    ids = encode_prompt(question, sample.image is not None, text, *limits)
    encoded = [(ids, [IGNORE] * len(ids))]
    batch = collate([sample], encoded, images, text.eos_id, side="left").to(device)
    dice = torch.Generator(device).manual_seed(flags.seed)
    stream, steps = Stream(text), []
    with precision(device, dtype):
        for step in generate(
            model, batch, text.eos_id, flags.max_new, flags.temperature, flags.top_p, dice
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
    if not (flags.temperature == 0 or flags.temperature >= 0.01):  # less overflows; nan is neither
        raise UserError(f"--temperature {flags.temperature}: must be 0 or from 0.01 up")
    if not 0 < flags.top_p <= 1:
        raise UserError(f"--top-p {flags.top_p}: must be above 0 and at most 1")
    device, dtype = choose_device(flags.device, flags.dtype)
    kernels.choose(flags.kernels, device)
    model, text, _ = load_model(Path(flags.checkpoint), device, dtype)
    images = Images(model.config.vision.image_size, pad=True)
    if flags.question is not None:
        ask(model, text, images, flags, flags.question)
        return
    print("Ask about the picture; an empty line ends. Not a medical device.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not question:
            return
        ask(model, text, images, flags, question)


if __name__ == "__main__":
    main()
