"""How much memory a GPU needs in each phase, before anything is built.

    python -m lab.memory --preset phi2 --gpus 8 --batch-size 64 --accumulate 8

For each GPU, with a frozen tower, matmuls in bf16 and fused attention. The parameters, gradients
and moments are counted on the model, built without memory; the rest is by formula:

activations  what autograd keeps for backward, and the loss's working memory, all text supervised
copies       with fp32 weights, the bf16 copies of matrices, which autograd and autocast keep
gathered     with several GPUs (FSDP2): two blocks and all that is in no block, and one gradient
total        the most at once: gradients come while activations and copies go

Not counted: CUDA itself, workspaces, fragmentation (a tenth of a GPU stays free), small tables.
Experts are taken to be evenly loaded. Letters: config.py.
"""

import json
import math
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from config import DecoderConfig, ModelConfig, MoEConfig, TrainConfig, UserError, flag, preset
from engine.cli import parse, user_errors
from engine.lora import add_lora
from engine.optim import cast_weights
from model import MedMoE, freeze_all_but, make_sparse
from train import trained_patterns

TEXT = 128  # positions of a sample beside its patches
CLASSES = (16, 24, 40, 48, 80, 141, 192)  # GiB of the GPUs that are sold
USABLE = 0.9
COLUMNS = ("parameters", "gradients", "optimizer", "activations", "copies", "gathered", "total")
MOE = MoEConfig()


@dataclass(frozen=True)
class MemoryConfig:
    """How much memory a GPU needs in each phase. Flags of train.py mean the same here."""

    preset: str = flag("tiny", "dimensions of the model")
    gpus: int = flag(1, "how many share the work", least=1)
    batch_size: int | None = flag(None, "samples a step (default: the phase's)", least=1)
    accumulate: int = flag(1, "micro-batches a step", least=1)
    weights: Literal["float32", "bf16", "bf16-stochastic"] = flag("float32", "how they are kept")
    lora_rank: int = flag(0, "of low-rank additions to the FFNs in phases 2 and 3; 0: none")
    activation_checkpointing: bool = flag(False, "keep no more of a block than its input")
    expert_parallel: int = flag(1, "GPUs that share the experts between them", least=1)


class Work(NamedTuple):
    """What forward and backward need beside the weights."""

    kept: int  # activations, in bytes a sample
    copied: int  # entries of matrices that backward needs in bf16, but for the experts'
    cached: int = 0  # of these, those that autocast keeps: trained ones
    experts: int = 0  # entries of the experts' matrices


def block_work(d: DecoderConfig, length: int, phase: int, layer: int, rank: int) -> Work:
    """Every second block is sparse in phase 3; before the first one's FFN nothing is trained."""
    before, whole = phase < 3 or layer > 0, phase == 2 and not rank
    width, narrow = d.d_model, d.d_model // d.n_heads * (d.n_kv_heads or d.n_heads)  # D, G*K
    # A norm's input in fp32, its mean and deviation.
    kept = (1 if d.family == "phi" else 2) * length * (4 * width + 8)
    # q, k, v, the result, its log-sums, the mask; where trained, also each matrix's input.
    kept += length * (2 * (4 + 4 * whole) * width + 4 * d.n_heads + 2 * length)
    kept *= before
    if d.dropout:  # a mask of bytes for each branch
        kept += length * width * (1 + before)
    matrices, experts, is_sparse = 2 * width * (width + narrow), 0, phase == 3 and layer % 2 == 0
    ffn = ffn_work(d, length, phase == 2 or is_sparse, rank, before)  # the dense one, or meta
    if is_sparse:
        routed = length * MOE.top_k
        each = ffn_work(d, routed, True, rank, before, MOE.n_experts)
        # Of each routed token: the expert's output, for the gates' gradient, and it times its gate.
        kept, experts = kept + each.kept + 2 * routed * width * (1 + before), each.copied
    copied, cached = matrices * before + ffn.copied, matrices * whole + ffn.cached
    return Work(kept + ffn.kept, copied, cached, experts)


def ffn_work(d: DecoderConfig, rows: int, trained: bool, rank: int, before: bool, n=1) -> Work:
    """n FFNs through which `rows` rows go in all; before: the input needs a gradient."""
    reading = 1 if d.family == "phi" else 2  # matrices that read the input: fc1, or gate and up
    size = d.d_model * d.d_ff
    low = (reading + 1) * rank * (d.d_model + d.d_ff) * trained
    # Autocast copies what is trained even where nothing goes back to the input; but no experts.
    all_read = before or (trained and not rank and n == 1)
    kept = d.d_ff * (2 * reading - 1)
    if trained:
        kept += reading * d.d_model + d.d_ff + (reading + 1) * rank
    copied = low + size * (reading + 1 if all_read else 1)
    cached = (low or (reading + 1) * size) * (trained and n == 1)
    return Work(2 * rows * kept, n * copied, cached)


def rest_work(config: ModelConfig, length: int, phase: int, rank: int) -> Work:
    """Of all that is in no block: projector, last norm, head and loss."""
    d, n_patches, width = config.decoder, config.vision.n_patches, config.vision.width
    aligns, whole, size = phase < 3, phase == 2 and not rank, d.d_model
    # fp32: the log-probabilities, kept; their gradient and the logits' while the loss goes back.
    kept = (length - n_patches) * (3 * 4 * d.vocab_size + 2 * size * whole)
    kept += length * (4 * size + 8) + n_patches * (2 * width + 4 * size) * aligns
    return Work(kept, d.vocab_size * size + (width + size) * size * aligns)


def nbytes(module: nn.Module, trained: bool = False, share: float = 1) -> float:
    """Of its parameters, or of those that are trained; of experts a share."""
    found = [(n, p) for n, p in module.named_parameters() if p.requires_grad or not trained]
    return sum(p.nbytes * (share if ".experts." in f".{n}" else 1) for n, p in found)


def phase_plan(flags: MemoryConfig, config: ModelConfig, phase: int, samples: int) -> dict:
    """Bytes a GPU in one phase, `samples` at a time."""
    d, length, rank = config.decoder, config.vision.n_patches + TEXT, flags.lora_rank
    with torch.device("meta"):  # no memory is used
        model = MedMoE(config)
        if phase == 3:
            make_sparse(model, MOE)
    if flags.weights != "float32":
        cast_weights(model, torch.bfloat16)
    if rank:
        add_lora(model, rank, phase)
    freeze_all_but(model, trained_patterns(TrainConfig(lora_rank=rank), phase, model.config))
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = sum(p.numel() * (12 if flags.weights == "bf16" and p.element_size() == 2 else 8)
                  for p in trained)  # fmt: skip
    works = [block_work(d, length, phase, i, rank) for i in range(d.n_layers)]
    others = rest_work(config, length, phase, rank)
    largest = max(w.kept for w in works)
    copies = [w.copied + w.experts // flags.expert_parallel for w in works]  # of its own experts
    kept, copied = others.kept + sum(w.kept for w in works), others.copied + sum(copies)
    size, copy = (4, 2) if flags.weights == "float32" else (2, 0)  # bytes
    if flags.activation_checkpointing:
        kept = others.kept + d.n_layers * length * size * d.d_model + largest
        copied = others.copied + max(sum(w.cached for w in works), *copies)
    stored = {"parameters": nbytes(model), "gradients": nbytes(model, True), "optimizer": moments}
    found = {name: math.ceil(size / flags.gpus) for name, size in stored.items()}
    found |= {"activations": samples * kept, "copies": copy * copied}
    found["gathered"] = gathered(flags, model) if flags.gpus > 1 else 0
    forward, backward = found["activations"] + found["copies"], found["gradients"]
    most = max(forward, backward + samples * largest)
    if flags.accumulate > 1:  # a second micro-batch finds the first one's gradients
        most = forward + backward
    found["total"] = found["parameters"] + found["optimizer"] + found["gathered"] + most
    fitting = [c for c in CLASSES if found["total"] <= USABLE * c * 2**30]
    return found | {"gpu": fitting[0] if fitting else None}


def gathered(flags: MemoryConfig, model: MedMoE) -> int:
    """Bytes of what a GPU holds whole for a while; experts only if they are not its own."""
    share = 0 if flags.expert_parallel == flags.gpus else 1 / flags.expert_parallel
    blocks = [*model.vision.blocks, *model.decoder.blocks]
    stored, trained = ([nbytes(b, which, share) for b in blocks] for which in (False, True))
    rest, rest_trained = (nbytes(model, which) - sum(nbytes(b, which) for b in blocks)
                          for which in (False, True))  # fmt: skip
    return math.ceil(rest + max(rest_trained, *trained) + 2 * max(stored))


def plan(flags: MemoryConfig) -> dict:
    """Bytes a GPU by phase, the smallest GPU that holds them, and what was assumed."""
    chosen, n = preset(flags.preset), flags.expert_parallel
    if flags.gpus % n or MOE.n_experts % n:
        raise UserError(f"--expert-parallel {n}: must divide --gpus, {flags.gpus}, and "
                        f"{MOE.n_experts} experts")  # fmt: skip
    phases = {}
    for phase, recipe in chosen.recipes.items():
        batch = flags.batch_size or recipe.batch_size
        samples = math.ceil(batch / flags.accumulate / flags.gpus)
        phases[phase] = phase_plan(flags, chosen.model, phase, samples) | {"samples": samples}
    length = chosen.model.vision.n_patches + TEXT
    return asdict(flags) | {"length": length, "phases": phases}


@user_errors
def main(argv: list[str] | None = None) -> dict:
    """Print the plan as a table, in GB of 1e9 bytes, and as JSON."""
    found = plan(parse(MemoryConfig, argv, "python -m lab.memory"))
    print(f"{found['preset']}: GB a GPU; {found['gpus']} of them, {found['length']} positions a "
          f"sample, weights in {found['weights']}")  # fmt: skip
    print(f"{'phase':<10}{'samples':>8}" + "".join(f"{name:>13}" for name in COLUMNS))
    for phase, values in found["phases"].items():
        numbers = "".join(f"{values[name] / 1e9:13.2f}" for name in COLUMNS)
        fits = f"fits {values['gpu']} GB" if values["gpu"] else "does not fit"
        print(f"{phase:<10}{values['samples']:8}{numbers}  {fits}")
    print(json.dumps(found))
    return found


if __name__ == "__main__":
    main()
