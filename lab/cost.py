"""Does sparsity save time and memory? Med-MoE beside dense models, counted and timed.

    python -m lab.cost                       phi2, stablelm2 counted; tiny, mid counted and timed
    python -m lab.cost --measure tiny --rounds 9
    python -m lab.cost --checkpoint runs/tiny/phase3     and which experts its answers touch

lab/counts.py has the variants and counts what they cost. The variants are timed with random
weights, interleaved, after one round of warm-up; a ratio is of two times of one round. Routers are
initialised with large weights, so that every expert gets tokens. Memory is the growth of the peak
of resident bytes in a fresh process.
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from checkpoint import load_model
from config import UserError, flag, preset
from data import Batch, Dataset, Text
from engine.cli import at_least, parse, user_errors, write_json
from engine.inference import prepare
from lab.bench import mean_loss, prompts, stepper, summary
from lab.counts import ANSWER, VARIANTS, build, count, dimensions, show_counts
from model import MedMoE, autocast, choose_device, freeze_all_but, generate
from ops import place_experts
from sources.images import Images
from sources.load import load_samples


@dataclass(frozen=True)
class CostConfig:
    """Count and time Med-MoE and dense controls."""

    measure: tuple[str, ...] = flag((), "time this size: tiny, mid; repeatable (default: both)")
    count: tuple[str, ...] = flag((), "count this preset (default: phi2, stablelm2, and --measure)")
    checkpoint: str | None = flag(None, "DIR: also which experts its answers touch")
    rounds: int = flag(5, "repetitions, interleaved")
    memory: bool = flag(True, "measure memory as well")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to compute")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", "matmul precision")
    json: str | None = flag(None, "also write the results to this FILE")


def answer(model: MedMoE, batch: Batch, dtype: torch.dtype) -> tuple[float, float]:
    """-> seconds until the first token, and for each of the following ones."""
    wait = torch.cuda.synchronize if batch.ids.is_cuda else lambda: None
    with autocast(batch.ids.device, dtype):
        start = time.perf_counter()
        steps = generate(model, batch, eos_id=-1, max_new=ANSWER)
        next(steps)
        wait()
        first = time.perf_counter()
        n = sum(1 for _ in steps)
        wait()
    return first - start, (time.perf_counter() - first) / n


def ready(name: str, key: str, device: torch.device, dtype: torch.dtype) -> MedMoE:
    """As load_model returns one: without gradients, matmuls in dtype, q, k and v fused."""
    torch.manual_seed(0)
    model = build(dimensions(name), VARIANTS[key]).requires_grad_(False)
    prepare(model, device, dtype)
    return model


def trainable(name: str, key: str, device: torch.device) -> MedMoE:
    """What phase 3 trains: experts and meta; of dense models the FFNs in their place."""
    torch.manual_seed(0)
    model = build(dimensions(name), VARIANTS[key]).to(device).train()
    place_experts(model, device)
    moe = VARIANTS[key].moe
    patterns = ["decoder.*.mlp.experts.*"] if moe else [
        f"decoder.blocks.{i}.mlp.*" for i in range(0, len(model.decoder.blocks), 2)
    ]  # fmt: skip
    freeze_all_but(model, (*patterns, *(["decoder.*.mlp.meta.*"] if moe and moe.meta else [])))
    return model


def batches(name: str, device: torch.device) -> dict[str, Batch]:
    """Prompts for 1 and for 8 answers, and a batch to train on: 64 samples, of "mid" 8."""
    samples, text = load_samples(("phantoms:512",), "vqa", "train"), Text(preset("tiny").llm)
    config = dimensions(name)
    found = {str(n): prompts(samples[:n], text, config) for n in (1, 8)}
    data = Dataset(samples, text, config, False, Images(config.vision.image_size))
    found["train"] = data.batch(data.epoch(8 if name == "mid" else 64, 0, 0)[0])
    return {key: batch.to(device) for key, batch in found.items()}


def measure(name: str, flags: CostConfig) -> dict[str, dict]:
    """Variant -> milliseconds, and their ratio to the dense model's of the same round."""
    device, dtype = choose_device(flags.device, flags.dtype)
    inputs = batches(name, device)
    seconds: dict[str, dict[str, list[float]]] = {}
    models = {key: ready(name, key, device, dtype) for key in VARIANTS}
    for round_ in range(flags.rounds + 1):
        for key, model in models.items():
            for size in ("1", "8"):
                part = answer(model, inputs[size], dtype)
                for what, value in zip(("prefill", "token"), part, strict=True):
                    row = seconds.setdefault(key, {}).setdefault(f"{what}, batch {size}", [])
                    row += [value] if round_ else []
    models = {key: trainable(name, key, device) for key in VARIANTS}
    steps = {key: stepper(model, lambda b, m=model: mean_loss(m, b), dtype)
             for key, model in models.items()}  # fmt: skip
    for round_ in range(flags.rounds + 1):
        for key, step in steps.items():
            start = time.perf_counter()
            step(inputs["train"])
            if device.type == "cuda":
                torch.cuda.synchronize()
            row = seconds[key].setdefault("training step", [])
            row += [time.perf_counter() - start] if round_ else []
    return {key: {what: {"ms": summary([1000 * s for s in row]),
                         "ratio": summary([a / b for a, b in
                                           zip(row, seconds["dense"][what], strict=True)])}
                  for what, row in rows.items()} for key, rows in seconds.items()}  # fmt: skip


def grown(name: str, key: str, what: str, device: str, dtype: str) -> int:
    """In a fresh process: bytes by which its peak memory grows for weights and work."""
    chosen = choose_device(device, dtype)
    inputs = batches(name, chosen[0])
    build(preset("tiny").model, VARIANTS["dense"])  # what torch itself loads with its first use
    before = peak(chosen[0])
    if what == "answer":
        answer(ready(name, key, *chosen), inputs["8"], chosen[1])
    else:
        model = trainable(name, key, chosen[0])
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
    context, found = multiprocessing.get_context("spawn"), {}
    for key in VARIANTS:
        for what in ("answer", "training step"):
            with context.Pool(1) as pool:
                args = name, key, what, flags.device, flags.dtype
                found.setdefault(key, {})[what] = pool.apply(grown, args)
    return found


def touched(directory: Path, flags: CostConfig, n: int = 200) -> dict[str, dict[str, float]]:
    """Level -> experts used in a layer: by a prompt, a token of the answer, a whole question."""
    device, dtype = choose_device(flags.device, flags.dtype)
    samples, found = load_samples(("phantoms",), "vqa", "test")[:n], {}
    for level in ("token", "sequence"):
        model, text, _ = load_model(directory, device, dtype, level=level)
        if model.config.moe is None:
            raise UserError(f"--checkpoint {directory}: a dense model")
        seen = {"prompt": [], "answer": [], "token": []}
        for start in range(0, len(samples), 50):
            batch = prompts(samples[start : start + 50], text, model.config).to(device)
            with autocast(device, dtype):
                steps = [s.routings for s in generate(model, batch, -1, 4)]
            for i in range(len(steps[0])):  # sparse layers
                gates = [routings[i].gates != 0 for routings in steps]  # (B, T, E), then (B, 1, E)
                each = torch.stack([g.any(dim=1) for g in gates])  # (steps, B, E)
                seen["prompt"] += each[0].sum(dim=-1).tolist()
                seen["answer"] += each.any(dim=0).sum(dim=-1).tolist()
                seen["token"] += each[1:].sum(dim=-1).flatten().tolist()
        found[level] = {key: statistics.mean(values) for key, values in seen.items()}
    return found


def show_measured(name: str, times: dict, sizes: dict) -> str:
    columns = list(next(iter(times.values())))
    lines = [f"{name}: milliseconds, and their ratio to the dense model's"]
    lines.append(" " * 34 + "".join(f"{column:>22}" for column in columns))
    for key, rows in times.items():
        cells = "".join(f"{row['ms']['median']:>9.1f}  x {row['ratio']['median']:<9.2f}"
                        for row in rows.values())  # fmt: skip
        lines.append(f"  {VARIANTS[key].title:<32}{cells}")
    if sizes:
        lines.append("memory, MB: 8 answers; a training step")
        lines += [f"  {VARIANTS[key].title:<32}"
                  + "".join(f"{n / 1e6:>9,.0f}" for n in row.values())
                  for key, row in sizes.items()]  # fmt: skip
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
        print(show_measured(name, result["measured"][name], result["memory"][name]) + "\n",
              flush=True)  # fmt: skip
    if flags.checkpoint:
        result["touched"] = touched(Path(flags.checkpoint), flags)
        print(f"{flags.checkpoint}: experts used in a sparse layer {result['touched']}")
    if flags.json:
        write_json(Path(flags.json), result)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
