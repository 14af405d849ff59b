"""How much memory a GPU needs in each phase, before anything is built.

    python -m lab.memory --preset phi2 --gpus 8 --batch-size 64 --accumulate 8

Worked out from the dimensions in config.py alone. The tower is frozen, and of what comes before
the first trained parameter nothing is kept: in phase 3 nothing before the first block's FFN. For
each GPU:

parameters   4 bytes each, or 2 with bf16 weights; 4 for routers
gradients    alike, of what is trained
optimizer    AdamW's two fp32 moments of what is trained; with --weights bf16 its fp32 copy too
activations  what autograd keeps for backward, where matmuls run in bf16 and attention is fused;
             and the loss's working memory. All text is taken to be supervised
copies       with fp32 weights, the bf16 copies of matrices: autograd keeps them for backward, and
             autocast those of trained ones until the whole forward is over
gathered     with several GPUs, each of which holds a part of the first three (FSDP2): two blocks
             at a time and all that is in no block, whole, and one of their gradients
total        the most at once. Gradients come while activations and copies go: with one micro-batch
             a step it is all but the gradients, or all but the activations and copies

Not counted: CUDA itself, workspaces and fragmentation, for which a tenth of a GPU stays free, and
small tables (routes, rotary angles). Routed tokens are taken to be spread evenly over the GPUs
that share the experts.

Letters are those of config.py; G heads of keys and values.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal, NamedTuple

from config import DecoderConfig, ModelConfig, MoEConfig, UserError, VisionConfig, flag, preset
from engine.cli import at_least, parse, user_errors

CLASSES = (16, 24, 40, 48, 80, 141, 192)  # GiB of the GPUs that are sold
USABLE = 0.9
COLUMNS = ("parameters", "gradients", "optimizer", "activations", "copies", "gathered", "total")
MOE = MoEConfig()


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory a GPU needs in each phase. Flags of train.py mean the same here."""

    preset: str = flag("tiny", "dimensions of the model")
    gpus: int = flag(1, "how many share the work")
    batch_size: int | None = flag(None, "samples a step, on all GPUs (default: the phase's)")
    accumulate: int = flag(1, "micro-batches a step")
    length: int | None = flag(None, "positions a sample (default: its patches and 128 of text)")
    weights: Literal["float32", "bf16", "bf16-stochastic"] = flag("float32", "how they are kept")
    lora_rank: int = flag(0, "of low-rank additions to the FFNs in phases 2 and 3; 0: none")
    activation_checkpointing: bool = flag(False, "keep no more of a block than its input")
    expert_parallel: int = flag(1, "GPUs that share the experts between them")


class Part(NamedTuple):
    """What a part of the model takes, in entries of its parameters unless stated."""

    stored: int = 0
    trained: int = 0
    copied: int = 0  # of matrices, that backward needs in bf16
    cached: int = 0  # of these, those that autocast keeps: trained ones, but for the experts
    kept: int = 0  # activations, in bytes a sample


class Block(NamedTuple):
    dense: Part  # all but experts and router
    experts: Part = Part()
    router: int = 0


def add(*parts: Part) -> Part:
    return Part(*map(sum, zip(*parts, strict=True)))


def norms(d: DecoderConfig, n: int, length: int, trained: bool, used: bool = True) -> Part:
    """n norms in a row. Kept: the input in fp32, its mean and deviation."""
    stored = n * d.d_model * (1 if d.family == "llama" else 2)
    return Part(stored, stored * trained, kept=used * n * length * (4 * d.d_model + 8))


def attention(d: DecoderConfig, length: int, trained: bool, used: bool) -> Part:
    """Kept: q, k, v, the result, its log-sums, the mask; trained, also each matrix's input."""
    width, narrow = d.d_model, d.d_model // d.n_heads * (d.n_kv_heads or d.n_heads)  # D, G*K
    matrices = 2 * width * width + 2 * width * narrow
    biases = {"phi": 2 * width + 2 * narrow, "stablelm": width + 2 * narrow, "llama": 0}[d.family]
    kept = length * (2 * (4 + 4 * trained) * width + 4 * d.n_heads + 2 * length)
    stored = matrices + biases
    return Part(stored, stored * trained, matrices * used, matrices * trained, kept * used)


def ffn(d: DecoderConfig, rows: int, trained: bool, rank: int, before: bool, n: int = 1) -> Part:
    """n FFNs through which `rows` rows go in all; with a rank only low-rank additions are trained.

    before: the input needs a gradient. Kept: what the activation reads (gated: and its result, and
    up's); trained, also each matrix's input.
    """
    reading = 1 if d.family == "phi" else 2  # matrices that read the input: fc1, or gate and up
    size = d.d_model * d.d_ff
    matrices = (reading + 1) * size
    stored = matrices + (d.d_model + d.d_ff if d.family == "phi" else 0)
    low = (reading + 1) * rank * (d.d_model + d.d_ff) * trained
    # Autocast copies what is trained even where nothing goes back to the input; but no experts.
    all_read = before or (trained and not rank and n == 1)
    kept = d.d_ff * (2 * reading - 1)
    if trained:
        kept += reading * d.d_model + d.d_ff + (reading + 1) * rank
    copied = low + (matrices if all_read else size)
    cached = (low or matrices) * (trained and n == 1)
    learnt = (low or stored) * trained
    return Part(n * (stored + low), n * learnt, n * copied, cached, 2 * rows * kept)


def decoder_block(d: DecoderConfig, length: int, phase: int, layer: int, rank: int) -> Block:
    """Every second block is sparse in phase 3; before the first one's FFN nothing is trained."""
    before = phase < 3 or layer > 0
    whole = phase == 2 and not rank
    parts = [
        norms(d, 1 if d.family == "phi" else 2, length, whole, before),
        attention(d, length, whole, before),
    ]
    if d.dropout:  # a mask of bytes for each branch
        parts.append(Part(kept=length * d.d_model * (1 + before)))
    if phase < 3 or layer % 2:
        return Block(add(*parts, ffn(d, length, phase == 2, rank, before)))
    routed = length * MOE.top_k
    # Of each routed token: the expert's output, for the gates' gradient, and it times its gate.
    outputs = Part(kept=2 * routed * d.d_model * (1 + before))
    return Block(
        add(*parts, outputs, ffn(d, length, True, rank, before)),
        ffn(d, routed, True, rank, before, MOE.n_experts),
        MOE.n_experts * (d.d_model + 1),
    )


def tower_block(v: VisionConfig) -> Block:
    width = v.width
    return Block(Part(4 * (width * width + width) + 2 * width * v.d_ff + v.d_ff + 5 * width))


def rest(config: ModelConfig, length: int, phase: int, rank: int) -> Part:
    """All that is in no block: the tower's entrance, projector, embedding, last norm and head."""
    v, d = config.vision, config.decoder
    n_patches, width, vocabulary = v.n_patches, v.width, d.vocab_size * d.d_model
    aligns, whole = phase < 3, phase == 2 and not rank
    entrance = Part(3 * v.patch_size**2 * width + (n_patches + 4) * width)
    matrices = (width + d.d_model) * d.d_model
    projector = matrices + 2 * d.d_model
    words = vocabulary * (1 if d.tied else 2) + (d.vocab_size if d.family == "phi" else 0)
    # fp32: the log-probabilities, kept; their gradient and the logits' while the loss goes back.
    loss = (length - n_patches) * (3 * 4 * d.vocab_size + 2 * d.d_model * whole)
    return add(
        entrance,
        Part(projector, projector * aligns, matrices * aligns,
             kept=n_patches * (2 * width + 4 * d.d_model) * aligns),
        Part(words, words * whole, vocabulary, kept=loss),
        norms(d, 1, length, whole),
    )  # fmt: skip


def phase_plan(flags: MemoryConfig, config: ModelConfig, phase: int, samples: int) -> dict:
    """Bytes a GPU in one phase, `samples` at a time."""
    v, d = config.vision, config.decoder
    length, rank = flags.length, flags.lora_rank
    tower = [tower_block(v)] * (v.n_layers - 1)
    blocks = [decoder_block(d, length, phase, i, rank) for i in range(d.n_layers)]
    others = rest(config, length, phase, rank)
    n = flags.expert_parallel  # a GPU copies its own experts only
    whole = [add(b.dense, b.experts._replace(copied=b.experts.copied // n)) for b in blocks]
    every = add(others, *(b.dense for b in tower), *whole)
    size, copy = (4, 2) if flags.weights == "float32" else (2, 0)  # bytes
    routers = 4 * sum(b.router for b in blocks)
    kept, copied = every.kept, every.copied
    if flags.activation_checkpointing:
        inputs = len(blocks) * length * size * d.d_model
        kept = others.kept + inputs + max(b.kept for b in whole)
        copied = others.copied + max(sum(b.cached for b in whole), *(b.copied for b in whole))
    found = {
        "parameters": math.ceil((every.stored * size + routers) / flags.gpus),
        "gradients": math.ceil(every.trained * size / flags.gpus),
        "optimizer": math.ceil(every.trained * (12 if flags.weights == "bf16" else 8) / flags.gpus),
        "activations": samples * kept,
        "copies": copy * copied,
        "gathered": gathered(flags, tower + blocks, others, size) if flags.gpus > 1 else 0,
    }
    forward, backward = found["activations"] + found["copies"], found["gradients"]
    if flags.accumulate > 1:  # a second micro-batch finds the first one's gradients
        most = forward + backward
    else:
        most = max(forward, backward + samples * max(b.kept for b in whole))
    found["total"] = found["parameters"] + found["optimizer"] + found["gathered"] + most
    fitting = [c for c in CLASSES if found["total"] <= USABLE * c * 2**30]
    return found | {"gpu": fitting[0] if fitting else None, "trained": every.trained}


def gathered(flags: MemoryConfig, blocks: list[Block], others: Part, size: int) -> int:
    """Bytes of what a GPU holds whole for a while; experts only if they are not its own."""
    share = 0 if flags.expert_parallel == flags.gpus else 1 / flags.expert_parallel
    stored = [size * (b.dense.stored + share * b.experts.stored) + 4 * b.router for b in blocks]
    trained = [others.trained, *(b.dense.trained + share * b.experts.trained for b in blocks)]
    return math.ceil(size * (others.stored + max(trained)) + 2 * max(stored))


def plan(flags: MemoryConfig) -> dict:
    """Bytes a GPU by phase, the smallest GPU that holds them, and what was assumed."""
    at_least(flags, gpus=1, batch_size=1, accumulate=1, lora_rank=0, expert_parallel=1)
    chosen, n = preset(flags.preset), flags.expert_parallel
    config = chosen.model
    n_patches, longest = config.vision.n_patches, config.decoder.max_len
    length = n_patches + 128 if flags.length is None else flags.length
    if not n_patches < length <= longest:
        raise UserError(f"--length {length}: must be from {n_patches + 1}, with text beside the "
                        f"{n_patches} patches, to {longest}")  # fmt: skip
    if flags.gpus % n or MOE.n_experts % n:
        raise UserError(f"--expert-parallel {n}: must divide --gpus, {flags.gpus}, and "
                        f"{MOE.n_experts} experts")  # fmt: skip
    flags, phases = replace(flags, length=length), {}
    for phase, recipe in chosen.recipes.items():
        batch = flags.batch_size or recipe.batch_size
        samples = math.ceil(batch / flags.accumulate / flags.gpus)
        phases[phase] = phase_plan(flags, config, phase, samples) | {"samples": samples}
    return asdict(flags) | {"phases": phases}


def show(found: dict) -> None:
    """The plan as a table, in GB of 1e9 bytes."""
    print(f"{found['preset']}: GB a GPU; {found['gpus']} of them, {found['length']} positions a "
          f"sample, weights in {found['weights']}")  # fmt: skip
    print(f"{'phase':<10}{'samples':>8}" + "".join(f"{name:>13}" for name in COLUMNS))
    for phase, values in found["phases"].items():
        numbers = "".join(f"{values[name] / 1e9:13.2f}" for name in COLUMNS)
        fits = f"fits {values['gpu']} GB" if values["gpu"] else "does not fit"
        print(f"{phase:<10}{values['samples']:8}{numbers}  {fits}")


@user_errors
def main(argv: list[str] | None = None) -> dict:
    found = plan(parse(MemoryConfig, argv, "python -m lab.memory"))
    show(found)
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
