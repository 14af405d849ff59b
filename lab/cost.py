"""Does sparsity save time and memory? Med-MoE beside dense models, counted and timed.

    python -m lab.cost                       phi2, stablelm2 counted; tiny, mid counted and timed
    python -m lab.cost --measure tiny --rounds 9

The variants differ in the FFNs of every second block: one FFN, experts with or without a meta
expert, or one FFN three or five times as wide, which has the parameters that top-2 and meta
activate, or has in all. Counted is the model as built, with tower and projector. Timed are random
weights, interleaved, after one round of warm-up; a ratio is of two times of one round. Routers are
initialised with large weights, so that every expert gets tokens. Memory is the growth of the peak
of resident bytes in a fresh process.
"""

import json
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import nn

from config import ModelConfig, MoEConfig, UserError, flag, preset
from data import Batch, Dataset, Text
from engine.cli import at_least, parse, user_errors
from engine.flops import model_flops
from engine.inference import prepare
from lab.bench import MID, interleave, mean_loss, prompts, ratios, stepper, summary
from model import (
    MedMoE,
    autocast,
    choose_device,
    count_parameters,
    freeze_all_but,
    generate,
    make_sparse,
)
from ops import place_experts
from sources.images import Images
from sources.load import load_samples

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
    return MID if name == "mid" else preset(name).model


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
    for name, param in model.named_parameters():
        if name.endswith("router.proj.weight"):
            nn.init.normal_(param)
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
        routed = sum(cost.routed) * (variant.moe.top_k if variant.moe else 0)
        prefill = cost.image + config.vision.n_patches * cost.patch + length**2 * cost.pair
        prefill += length * (cost.position + routed) + cost.answer
        token = cost.position + routed + (length + (ANSWER + 1) / 2) * cost.pair + cost.answer
        activated = size["activated"]
        base = found["dense"]["total"] if found else size["total"]
        found[key] = {
            "total": size["total"], "activated": activated,
            "prefill": prefill / 1e9, "token": token / 1e9, "of own total": activated / size["total"],
            "of dense": activated / base, "of 7 B": activated / SEVEN_B,
        }  # fmt: skip
    return found


def show_counts(name: str, found: dict) -> str:
    lines = [f"{name}: parameters in millions; GFLOP of an image with {PROMPT} tokens and of a "
             "token of the answer; the activated share",
             " " * 34 + "".join(f"{column:>14}" for column in found["dense"])]  # fmt: skip
    for key, row in found.items():
        sizes = "".join(f"{row[column] / 1e6:>14,.2f}" for column in ("total", "activated"))
        work = f"{row['prefill']:>14,.3f}{row['token']:>14,.4f}"
        shares = "".join(f"{row[c]:>14.1%}" for c in ("of own total", "of dense", "of 7 B"))
        lines.append(f"  {VARIANTS[key].title:<32}{sizes}{work}{shares}")
    return "\n".join(lines)


def ready(name: str, key: str, device: torch.device, dtype: torch.dtype | None) -> MedMoE:
    """To answer: as load_model returns one, matmuls in dtype. Without a dtype: to be trained.

    Phase 3 trains experts and meta; in dense models the FFNs in their place.
    """
    model = build(dimensions(name), VARIANTS[key]).requires_grad_(False)
    if dtype is not None:
        prepare(model, device, dtype)
        return model
    place_experts(model.to(device).train(), device)
    ffns = [f"decoder.blocks.{i}.mlp.*" for i in range(0, len(model.decoder.blocks), 2)]
    freeze_all_but(model, ffns)
    for block in model.decoder.blocks:
        if block.is_sparse:
            block.mlp.router.requires_grad_(False)
    return model


def batches(name: str, device: torch.device) -> dict[str, Batch]:
    """Prompts for 1 and for 8 answers, and a batch to train on: 64 samples, of "mid" 8."""
    samples, text = load_samples(("phantoms:512",), "vqa", "train"), Text(preset("tiny").llm)
    config = dimensions(name)
    found = {str(n): prompts(samples[:n], text, config) for n in (1, 8)}
    data = Dataset(samples, text, config, False, Images(config.vision.image_size))
    found["train"] = data.batch(data.epoch(8 if name == "mid" else 64, 0, 0)[0])
    return {key: batch.to(device) for key, batch in found.items()}


def answer(model: MedMoE, batch: Batch, dtype: torch.dtype, n: int) -> int:
    """Generate n tokens for each prompt."""
    with autocast(batch.ids.device, dtype):
        return len(list(generate(model, batch, eos_id=-1, max_new=n)))


def measure(name: str, flags: CostConfig) -> dict[str, dict]:
    """What -> variant -> milliseconds, and their ratio to the dense model's of the same round."""
    device, dtype = choose_device(flags.device, flags.dtype)
    inputs = batches(name, device)
    models = {key: ready(name, key, device, dtype) for key in VARIANTS}
    seconds = {}
    for size in ("1", "8"):
        ways = {(key, n): partial(answer, model, inputs[size], dtype, n)
                for key, model in models.items() for n in (1, ANSWER + 1)}  # fmt: skip
        times = interleave(ways, flags.rounds)
        first = {key: times[key, 1] for key in VARIANTS}
        seconds[f"prefill, batch {size}"] = first
        seconds[f"a token, batch {size}"] = {
            key: [(s - f) / ANSWER for s, f in zip(times[key, ANSWER + 1], first[key], strict=True)]
            for key in VARIANTS
        }
    steps = {}
    for key in VARIANTS:
        model = ready(name, key, device, None)
        step = stepper(model, lambda b, m=model: mean_loss(m, b), dtype)
        steps[key] = partial(step, inputs["train"])
    seconds["training step"] = interleave(steps, flags.rounds)
    return {
        what: {key: {"ms": summary([1000 * s for s in row]), "ratio": ratios(row, rows["dense"])}
               for key, row in rows.items()}
        for what, rows in seconds.items()
    }  # fmt: skip


def grown(name: str, key: str, what: str, device: str, dtype: str) -> int:
    """In a fresh process: bytes by which its peak memory grows for weights and work."""
    chosen = choose_device(device, dtype)
    inputs = batches(name, chosen[0])
    build(preset("tiny").model, VARIANTS["dense"])  # what torch itself loads with its first use
    before = peak(chosen[0])
    if what == "8 answers":
        answer(ready(name, key, *chosen), inputs["8"], chosen[1], ANSWER)
    else:
        model = ready(name, key, chosen[0], None)
        stepper(model, lambda b: mean_loss(model, b), chosen[1])(inputs["train"])
    return peak(chosen[0]) - before


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
    context, found = multiprocessing.get_context("spawn"), {}
    for what in ("8 answers", "training step"):
        for key in VARIANTS:
            with context.Pool(1) as pool:
                args = name, key, what, flags.device, flags.dtype
                found.setdefault(what, {})[key] = pool.apply(grown, args)
    return found


def show_measured(name: str, times: dict, sizes: dict) -> str:
    lines = [f"{name}: milliseconds, and their ratio to the dense model's; memory in MB"]
    lines.append(" " * 34 + "".join(f"{what:>22}" for what in (*times, *sizes)))
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
    device, dtype = choose_device(flags.device, flags.dtype)
    result = {"counted": {}, "measured": {}, "memory": {}, "device": str(device),
              "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads(),
              "rounds": flags.rounds, "torch": torch.__version__}  # fmt: skip
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
