"""Does sparsity save time and memory? Med-MoE beside dense models, counted and timed.

    python -m lab.cost                       phi2, stablelm2 counted; tiny, mid counted and timed
    python -m lab.cost --measure tiny --rounds 9

The variants differ in the FFNs of every second block: one FFN, experts with or without a meta
expert, or one FFN three or five times as wide, which has the parameters that top-2 and meta
activate, or has in all. Counted is the model as built, with tower and projector. Timed are random
weights, as lab/bench.py times; a ratio is of two times of one round. Memory is the growth of the
peak of resident bytes in a fresh process.
"""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from config import ModelConfig, MoEConfig, UserError, flag, preset
from data import Batch, Text
from engine.cli import at_least, parse, user_errors
from engine.flops import model_flops
from engine.inference import prepare
from lab import bench
from model import MedMoE, choose_device, count_parameters, freeze_all_but
from ops import place_experts

SEVEN_B = 7_000_000_000  # the model whose cost the paper compares with
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

    measure: tuple[str, ...] = flag((), "time this size: tiny, mid; repeatable (default: both)")
    count: tuple[str, ...] = flag((), "count this preset (default: phi2, stablelm2, and --measure)")
    rounds: int = flag(5, "repetitions, interleaved")
    memory: bool = flag(True, "measure memory as well")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "matmul precision")


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
            bench.upcycle(model, variant.moe)
    return model


def count(name: str) -> dict[str, dict]:
    """Every variant's parameters, GFLOP of a prompt and of a token, and shares of activated ones.

    The token's are the mean over the answer's length.
    """
    config, found = dimensions(name), {}
    length = config.vision.n_patches + PROMPT
    for key, variant in VARIANTS.items():
        model = build(config, variant, "meta").requires_grad_(False)
        size, cost = count_parameters(model), model_flops(model)
        total, activated = size["total"], size["activated"]
        each = cost.position + sum(cost.routed) * (variant.moe.top_k if variant.moe else 0)
        prefill = cost.image + config.vision.n_patches * cost.patch + length**2 * cost.pair
        prefill += length * each + cost.answer
        token = each + (length + (ANSWER + 1) / 2) * cost.pair + cost.answer
        base = found["dense"]["total"] if found else total
        found[key] = {
            "total": total, "activated": activated, "prefill": prefill / 1e9, "token": token / 1e9,
            "of own total": activated / total, "of dense": activated / base,
            "of 7 B": activated / SEVEN_B,
        }  # fmt: skip
    return found


def show_counts(name: str, found: dict) -> str:
    lines = [f"{name}: parameters in millions; GFLOP of an image with {PROMPT} tokens and of a "
             "token of the answer; the activated share",
             " " * 34 + "".join(f"{column:>14}" for column in found["dense"])]  # fmt: skip
    for key, row in found.items():
        total, activated, prefill, token, *shares = row.values()
        cells = f"{total / 1e6:>14,.2f}{activated / 1e6:>14,.2f}{prefill:>14,.3f}{token:>14,.4f}"
        cells += "".join(f"{share:>14.1%}" for share in shares)
        lines.append(f"  {VARIANTS[key].title:<32}{cells}")
    return "\n".join(lines)


def to_answer(name: str, key: str, device: torch.device, dtype: torch.dtype) -> MedMoE:
    """As load_model returns one, matmuls in dtype."""
    model = build(dimensions(name), VARIANTS[key]).requires_grad_(False)
    prepare(model, device, dtype)
    return model


def to_train(name: str, key: str, device: torch.device) -> MedMoE:
    """Phase 3 trains experts and meta; in dense models the FFNs in their place."""
    model = build(dimensions(name), VARIANTS[key])
    place_experts(model.to(device).train(), device)
    blocks = model.decoder.blocks
    freeze_all_but(model, [f"decoder.blocks.{i}.mlp.[!r]*" for i in range(0, len(blocks), 2)])
    return model


def inputs(name: str, device: torch.device) -> dict[str, Batch]:
    """Prompts for 1 and for 8 answers, and a batch to train on: 64 samples, of "mid" 8."""
    flags = bench.BenchConfig(what="train", steps=1, batch_size=8 if name == "mid" else 64)
    samples, text, config = bench.read(flags), Text(preset("tiny").llm), dimensions(name)
    found = {str(n): bench.prompts(samples[:n], text, config) for n in (1, 8)}
    (found["train"],) = bench.batches(flags, text, config)
    return {key: batch.to(device) for key, batch in found.items()}


def measure(name: str, flags: CostConfig) -> dict[str, dict]:
    """What -> variant -> milliseconds, and their ratio to the dense model's of the same round."""
    device, dtype = choose_device(flags.device, flags.dtype)
    batches, seconds = inputs(name, device), {}
    models = {key: to_answer(name, key, device, dtype) for key in VARIANTS}
    for size in ("1", "8"):
        ways = {(key, n): partial(bench.answer, model, batches[size], dtype, n)
                for key, model in models.items() for n in (1, ANSWER + 1)}  # fmt: skip
        times = bench.interleave(ways, flags.rounds, device)
        seconds[f"prefill, batch {size}"] = {key: times[key, 1] for key in VARIANTS}
        seconds[f"a token, batch {size}"] = {
            key: [(all_ - first) / ANSWER for all_, first in
                  zip(times[key, ANSWER + 1], times[key, 1], strict=True)] for key in VARIANTS
        }  # fmt: skip
    steps = {key: partial(bench.stepper(to_train(name, key, device), dtype), batches["train"])
             for key in VARIANTS}  # fmt: skip
    seconds["training step"] = bench.interleave(steps, flags.rounds, device)
    return {
        what: {key: {"ms": bench.summary([1000 * s for s in row]),
                     "ratio": bench.ratios(row, rows["dense"])} for key, row in rows.items()}
        for what, rows in seconds.items()
    }  # fmt: skip


def grown(name: str, key: str, what: str, flags: CostConfig) -> int:
    """In a fresh process: bytes by which its peak memory grows for weights and work."""
    device, dtype = choose_device(flags.device, flags.dtype)
    batches = inputs(name, device)
    build(preset("tiny").model, VARIANTS["dense"])  # what torch itself loads with its first use
    before = peak(device)
    if what == "8 answers":
        bench.answer(to_answer(name, key, device, dtype), batches["8"], dtype, ANSWER)
    else:
        bench.stepper(to_train(name, key, device), dtype)(batches["train"])
    return peak(device) - before


def peak(device: torch.device) -> int:
    """Peak memory so far in bytes: resident (VmHWM), on a GPU allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise UserError("memory: this system does not report it; --no-memory leaves it out")


def measure_memory(name: str, flags: CostConfig) -> dict[str, dict[str, int]]:
    """What -> variant -> bytes."""
    context, found = multiprocessing.get_context("spawn"), {"8 answers": {}, "training step": {}}
    for what, sizes in found.items():
        for key in VARIANTS:
            with context.Pool(1) as pool:
                sizes[key] = pool.apply(grown, (name, key, what, flags))
    return found


def show_measured(name: str, times: dict, sizes: dict) -> str:
    lines = [f"{name}: milliseconds, and their ratio to the dense model's; memory in MB",
             " " * 34 + "".join(f"{what:>22}" for what in (*times, *sizes))]  # fmt: skip
    for key, variant in VARIANTS.items():
        cells = "".join(f"{row[key]['ms']['median']:>12.1f}  x {row[key]['ratio']['median']:<6.2f}"
                        for row in times.values())  # fmt: skip
        cells += "".join(f"{row[key] / 1e6:>22,.0f}" for row in sizes.values())
        lines.append(f"  {variant.title:<32}{cells}")
    return "\n".join(lines)


@user_errors
def main(argv: Sequence[str] | None = None) -> dict:
    flags = parse(CostConfig, argv, "python -m lab.cost")
    at_least(flags, rounds=1)
    timed = flags.measure or ("tiny", "mid")
    if strange := set(timed) - {"tiny", "mid"}:
        raise UserError(f"--measure {strange.pop()}: tiny or mid")
    result = {"counted": {}, "measured": {}, "memory": {}, "rounds": flags.rounds}
    result |= bench.machine(*choose_device(flags.device, flags.dtype))
    for name in flags.count or ("phi2", "stablelm2", *timed):
        result["counted"][name] = count(name)
        print(show_counts(name, result["counted"][name]) + "\n", flush=True)
    for name in timed:
        result["measured"][name] = measure(name, flags)
        result["memory"][name] = measure_memory(name, flags) if flags.memory else {}
        print(show_measured(name, result["measured"][name], result["memory"][name]), flush=True)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
