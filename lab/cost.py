"""Does sparsity save time and memory? Med-MoE beside dense models, counted and timed.

    python -m lab.cost                       phi2, stablelm2 counted; tiny, mid counted and timed
    python -m lab.cost --measure tiny --rounds 9

The variants differ in the FFNs of every second block: one FFN, experts with or without a meta
expert, or one FFN three or five times as wide, which has the parameters that top-2 and meta
activate, or has in all. Timed are random weights, as lab/bench.py times; a ratio is of two times
of one round. Memory follows from the total: all experts are kept (lab/memory.py).
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import nn

from config import ModelConfig, MoEConfig, flag, preset
from data import Batch, Text
from engine.casts import cast_once
from engine.cli import parse, user_errors
from engine.flops import model_flops
from engine.inference import prepare
from lab import bench
from model import MedMoE, choose_device, count_parameters, freeze_all_but, make_sparse
from ops import place_experts

PROMPT, ANSWER = 64, 16  # text positions of a question at full size, tokens of its answer


class Variant(NamedTuple):
    """What stands in every second block."""

    title: str
    moe: MoEConfig | None = None
    width: int = 1  # of a dense FFN, in FFNs


VARIANTS = {
    "dense": Variant("dense"),
    "medmoe": Variant("top-2 of 4 and meta", MoEConfig(router="topk")),
    "top-1": Variant("top-1 of 4 and meta", MoEConfig(router="topk", top_k=1)),
    "no-meta": Variant("top-2 of 4", MoEConfig(router="topk", meta=False)),
    "wide-3": Variant("dense, 3 wide: as many activated", width=3),
    "wide-5": Variant("dense, 5 wide: as many in all", width=5),
}


@dataclass(frozen=True)
class CostConfig:
    """Count and time Med-MoE and dense controls."""

    measure: Literal["both", "tiny", "mid"] = flag("both", "which sizes to time")
    rounds: int = flag(5, "repetitions, interleaved", least=1)


def dimensions(name: str) -> ModelConfig:
    return bench.MID if name == "mid" else preset(name).model


def build(config: ModelConfig, variant: Variant, device: str = "cpu") -> MedMoE:
    """Random weights. On "meta" nothing is initialised or allocated."""
    torch.manual_seed(0)
    with torch.device(device):
        model, d = MedMoE(config), config.decoder
        for block in model.decoder.blocks[::2]:
            if variant.width > 1:
                block.mlp = type(block.mlp)(d.d_model, variant.width * d.d_ff)
        if variant.moe:
            make_sparse(model, variant.moe)
            for block in model.decoder.blocks[::2]:  # wide enough that every expert gets tokens
                nn.init.normal_(block.mlp.router.proj.weight)
    return model


def count(name: str) -> dict[str, dict]:
    """Every variant's parameters, GFLOP of a prompt and of a token, and shares of activated ones.

    Tower and projector are included. A token's GFLOP are the mean over the answer's length.
    """
    config, found = dimensions(name), {}
    p, length = config.vision.n_patches, config.vision.n_patches + PROMPT
    for key, variant in VARIANTS.items():
        model = build(config, variant, "meta").requires_grad_(False)
        size, c = count_parameters(model), model_flops(model)
        total, activated = size["total"], size["activated"]
        each = c.position + sum(c.routed) * (variant.moe.top_k if variant.moe else 0)
        prefill = c.image + p * c.patch + length * each + length**2 * c.pair + c.answer
        token = each + (length + (ANSWER + 1) / 2) * c.pair + c.answer
        found[key] = {
            "total": total, "activated": activated, "prefill": prefill / 1e9, "token": token / 1e9,
            "of own total": activated / total,
            "of dense": activated / (found["dense"]["total"] if found else total),
            "of 7 B": activated / 7e9,
        }  # fmt: skip
    return found


def training(name: str, key: str, device: torch.device) -> MedMoE:
    """To train phase 3's experts and meta, or the dense FFNs in their place."""
    model = build(dimensions(name), VARIANTS[key])
    place_experts(model.to(device).train(), device)
    if device.type == "cpu":  # as engine/run.py does
        cast_once(model)
    blocks = range(0, len(model.decoder.blocks), 2)  # [!r]: all but the router
    freeze_all_but(model, [f"decoder.blocks.{i}.mlp.[!r]*" for i in blocks])
    return model


def inputs(name: str, device: torch.device) -> dict[str, Batch]:
    """Prompts for 1 and for 8 answers, and a batch to train on: 64 samples, of "mid" 8."""
    flags = bench.BenchConfig(what="train", steps=1, batch_size=8 if name == "mid" else 64)
    samples, text, config = bench.read(flags), Text(preset("tiny").llm), dimensions(name)
    found = {str(n): bench.prompts(samples[:n], text, config) for n in (1, 8)}
    (found["train"],) = bench.batches(flags, text, config)
    return {key: batch.to(device) for key, batch in found.items()}


def measure(name: str, rounds: int, device: torch.device, dtype: torch.dtype) -> dict[str, dict]:
    """What -> variant -> milliseconds, and their ratio to the dense model's of the same round."""
    batches, seconds, config = inputs(name, device), {}, dimensions(name)
    models = {key: build(config, variant).requires_grad_(False)
              for key, variant in VARIANTS.items()}  # fmt: skip
    for model in models.values():  # as load_model does
        prepare(model, device, dtype)
    for size in ("1", "8"):
        ways = {(key, n): partial(bench.answer, model, batches[size], dtype, n)
                for key, model in models.items() for n in (1, ANSWER + 1)}  # fmt: skip
        times = bench.interleave(ways, rounds, device)
        seconds[f"prefill, batch {size}"] = {key: times[key, 1] for key in VARIANTS}
        seconds[f"a token, batch {size}"] = {
            key: [(whole - first) / ANSWER for whole, first in
                  zip(times[key, ANSWER + 1], times[key, 1], strict=True)] for key in VARIANTS
        }  # fmt: skip
    steps = {key: partial(bench.stepper(training(name, key, device), dtype), batches["train"])
             for key in VARIANTS}  # fmt: skip
    seconds["training step"] = bench.interleave(steps, rounds, device)
    return {
        what: {key: {"ms": bench.summary([1000 * s for s in row]),
                     "ratio": bench.ratios(row, rows["dense"])} for key, row in rows.items()}
        for what, rows in seconds.items()
    }  # fmt: skip


def show(title: str, columns: Iterable[str], rows: dict[str, list[str]], width: int) -> None:
    print(title, " " * 34 + "".join(f"{column:>{width}}" for column in columns), sep="\n")
    for key, cells in rows.items():
        print(f"  {VARIANTS[key].title:<32}" + "".join(f"{cell:>{width}}" for cell in cells))


@user_errors
def main(argv: Sequence[str] | None = None) -> dict:
    flags = parse(CostConfig, argv, "python -m lab.cost")
    timed = ("tiny", "mid") if flags.measure == "both" else (flags.measure,)
    device, dtype = choose_device("auto", "auto")
    result = {"counted": {}, "measured": {}, "rounds": flags.rounds}
    result |= bench.machine(device, dtype)
    for name in ("phi2", "stablelm2", *timed):
        result["counted"][name] = found = count(name)
        rows = {key: [f"{total / 1e6:,.2f}", f"{activated / 1e6:,.2f}", f"{prefill:,.3f}",
                      f"{token:,.4f}", *(f"{share:.1%}" for share in shares)]
                for key, (total, activated, prefill, token, *shares) in
                ((key, row.values()) for key, row in found.items())}  # fmt: skip
        show(f"{name}: parameters in millions; GFLOP of an image with {PROMPT} tokens and of a "
             "token of the answer; the activated share", found["dense"], rows, 14)  # fmt: skip
    for name in timed:
        result["measured"][name] = times = measure(name, flags.rounds, device, dtype)
        rows = {key: [f"{row[key]['ms']['median']:.1f}  x {row[key]['ratio']['median']:<6.2f}"
                      for row in times.values()] for key in VARIANTS}  # fmt: skip
        show(f"{name}: milliseconds, and their ratio to the dense model's", times, rows, 22)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
