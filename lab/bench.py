"""How fast: ours beside the same model put together from transformers' modules, and the loader.

    python -m lab.bench train                       a step of phase 3: forward to optimizer
    python -m lab.bench generate                    greedy answers, batches of 1 and 8
    python -m lab.bench loader --data slake:DIR     reading images beside training on them
    python -m lab.bench memory --preset phi2        what training takes of a GPU: lab/memory.py
    python -m lab.bench kernels                     the sparse layer's matmuls: lab/bench_kernels.py

train, generate: same weights, same batches, same precision; the other model is lab/assembled.py
(pip install transformers). --preset mid --batch-size 8 --steps 2: 111 M random parameters.
In each round every way is timed once; medians over the rounds, without the first, which warms up.
Ratios are computed within a round. The last line is JSON.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import ops
from config import (
    EXPERTS_AND_META,
    IMAGE_ID,
    Common,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    UserError,
    VisionConfig,
    argument,
    flag,
    preset,
    to_dict,
)
from data import Batch, Dataset, Sample, Text, collate, encode_prompt
from engine.cli import at_least, parse, user_errors
from engine.flops import model_flops
from engine.inference import prepare
from engine.published import load_published
from lab import bench_kernels, memory
from model import MedMoE, autocast, choose_device, freeze_all_but, generate, make_sparse
from ops import place_experts
from sources.images import Images
from sources.load import load_samples, reading
from vision import normalise

MID = ModelConfig(
    VisionConfig(image_size=112, patch_size=16, width=512, n_layers=7, n_heads=8, d_ff=2048),
    DecoderConfig("phi", 1024, 512, 12, 8, 2048, rotary_dim=32, max_len=512),
)


@dataclass(frozen=True)
class BenchConfig(Common):
    """Measure speeds on this machine."""

    what: Literal["train", "generate", "loader"] = argument("what to measure")
    preset: str = flag("tiny", "dimensions of the model; train, generate: also mid")
    router: str = flag("random", "of the sparse blocks: a name or FILE.py:Class")
    rounds: int = flag(5, "repetitions, interleaved")
    steps: int = flag(10, "training steps in a round")
    new_tokens: int = flag(64, "generate: tokens an answer")


def interleave(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Call each way once a round -> its rate per second, one value a round.

    A way returns how much it did: tokens, images, floating-point operations.
    """
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            n = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:  # the first one warms up
                rates[name].append(n / (time.perf_counter() - start))
    return rates


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(rates: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """How many times as fast, round by round."""
    return summary([rate / other for rate, other in zip(rates, others, strict=True)])


def show(values: dict[str, float], digits: int = 2) -> str:
    return "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(**values, d=digits)


def start(flags: BenchConfig) -> tuple[MedMoE, Text]:
    """-> a sparse model that trains what phase 3 does, routers initialised wide; a tokenizer."""
    torch.manual_seed(flags.seed)
    chosen = preset("tiny" if flags.preset == "mid" else flags.preset)
    if chosen.llm is None:
        raise UserError(f"--preset {flags.preset}: comes without weights and tokenizer")
    config = MID if flags.preset == "mid" else chosen.model
    model = MedMoE(config)
    if flags.preset != "mid":
        load_published(model, config, chosen.clip, chosen.llm)
    make_sparse(model, MoEConfig(router=flags.router))
    for name, param in model.named_parameters():
        if name.endswith("router.proj.weight"):
            nn.init.normal_(param)  # wide enough that every expert gets tokens
    freeze_all_but(model, EXPERTS_AND_META)
    device, _ = choose_device(flags.device, flags.dtype)
    place_experts(model, device)
    return model.to(device), Text(chosen.llm)


def assembled(ours: MedMoE) -> nn.Module:
    from lab.assembled import Assembled  # transformers, which nothing else here needs

    return Assembled(ours).to(next(ours.parameters()).device)


def stepper(model: nn.Module, loss: Callable[[Batch], Tensor], dtype: torch.dtype) -> Callable:
    """-> a function that takes one training step on a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> None:
        with autocast(batch.ids.device, dtype):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mean_loss(model: MedMoE, batch: Batch) -> Tensor:
    out = model.loss(batch)
    return out.total / out.n_tokens


def flops_of(model: MedMoE, batch: Batch) -> int:
    """FLOPs of a training step on this batch, forward and backward."""
    *costs, routed = model_flops(model)
    with torch.no_grad():
        out = model.loss(batch)
    lengths = batch.mask.sum(dim=1)  # of real positions
    counts = [
        len(batch.images), (batch.ids == IMAGE_ID).sum(), len(lengths), lengths.sum(),
        lengths.square().sum(), out.n_tokens, *((r.gates != 0).sum() for r in out.routings),
    ]  # fmt: skip
    return sum(int(n) * cost for n, cost in zip(counts, (*costs, *routed), strict=True))


def matmul(device: torch.device, dtype: torch.dtype, n: int = 1024) -> Callable[[], float]:
    """-> a function that multiplies square matrices and returns how many operations that was."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))

    def run(times: int = 20) -> float:
        for _ in range(times):
            a @ b
        return times * 2 * n**3

    return run


def bench_train(flags: BenchConfig) -> dict:
    device, dtype = choose_device(flags.device, flags.dtype)
    ours, text = start(flags)
    theirs = assembled(ours)
    samples = load_samples(flags.data or ("phantoms:512",), "vqa", "train", **reading(flags))
    images = Images(ours.config.vision.image_size)
    data = Dataset(samples, text, ours.config, plain=False, images=images)
    order = data.epoch(flags.batch_size or 64, flags.seed, 0)[: flags.steps]
    batches = [data.batch(rows).to(device) for rows in order]
    n_tokens = sum(int(batch.mask.sum()) for batch in batches)
    our_step = stepper(ours.train(), lambda batch: mean_loss(ours, batch), dtype)
    their_step = stepper(theirs.train(), theirs.loss, dtype)

    def run(step: Callable[[Batch], None]) -> int:
        for batch in batches:
            step(batch)
        return n_tokens

    n_flops = sum(flops_of(ours, batch) for batch in batches)
    ways = {"ours": lambda: run(our_step), "transformers": lambda: run(their_step)}
    rates = interleave(ways | {"matmul": matmul(device, dtype)}, flags.rounds)
    work = [rate * n_flops / n_tokens for rate in rates["ours"]]  # operations a second
    shares = [w / peak for w, peak in zip(work, rates["matmul"], strict=True)]
    result = {
        "tokens_per_s": {name: summary(rates[name]) for name in ways},
        "ratio": ratios(rates["ours"], rates["transformers"]),
        "flops_per_step": n_flops // len(batches),
        "matmul_flops_per_s": summary(rates["matmul"]),
        "mfu": summary(shares),
    }
    for name in ways:
        print(f"{name:<13}{show(result['tokens_per_s'][name], 0)} tokens/s")
    print(f"ours is {show(result['ratio'])} times as fast")
    print(f"{n_flops / len(batches) / 1e9:.1f} GFLOP a step, "
          f"{show(summary([w / 1e9 for w in work]), 0)} GFLOP/s: {show(result['mfu'])} of what a "
          f"{dtype} product of 1024 x 1024 matrices reaches")  # fmt: skip
    sizes = {"batch_size": len(order[0]), "positions": batches[0].ids.shape[1]}
    return result | sizes


def prompts(samples: Sequence[Sample], text: Text, config: ModelConfig) -> Batch:
    encoded = [encode_prompt(s.turns[0][0], s.image is not None, text, config) for s in samples]
    return collate(samples, encoded, Images(config.vision.image_size), text.eos_id, side="left")


def bench_generate(flags: BenchConfig) -> dict:
    """Full answers, image and prompt included; neither side stops at an end of sentence."""
    device, dtype = choose_device(flags.device, flags.dtype)
    ours, text = start(flags)
    theirs = assembled(ours)
    for model in (ours, theirs):
        model.eval().requires_grad_()  # as loaded; autocast keeps no copies of frozen weights
    prepare(ours, device, dtype)  # as load_model does
    samples = load_samples(flags.data or ("phantoms:512",), "vqa", "train", **reading(flags))
    result = {}
    for size in (1, 8):
        batch = prompts(samples[:size], text, ours.config).to(device)

        def by_us(batch: Batch = batch) -> int:
            with autocast(device, dtype):
                steps = list(generate(ours, batch, eos_id=-1, max_new=flags.new_tokens))
            return len(steps) * len(batch.ids)

        def by_them(batch: Batch = batch) -> int:
            with autocast(device, dtype):
                return theirs.generate(batch, flags.new_tokens).numel()

        rates = interleave({"ours": by_us, "transformers": by_them}, flags.rounds)
        speeds = {name: summary(values) for name, values in rates.items()}
        ratio = ratios(rates["ours"], rates["transformers"])
        for name, values in speeds.items():
            print(f"batch {size}, {name:<13}{show(values, 0)} tokens/s")
        print(f"batch {size}: ours is {show(ratio)} times as fast")
        result[f"batch_{size}"] = {"tokens_per_s": speeds, "ratio": ratio}
    return result | {"new_tokens": flags.new_tokens}


def read_all(samples: Sequence[Sample], size: int, workers: int) -> int:
    """Every different image once, from its file to what the tower takes -> how many."""
    images = Images(size)
    different = list(dict.fromkeys(s.image for s in samples if s.image is not None))
    with ThreadPoolExecutor(workers) as pool:
        for pixels in pool.map(images.read, different):
            normalise(pixels[None])
    return len(different)


def training(flags: BenchConfig, samples: Sequence[Sample]) -> Callable[[], int]:
    """-> a function that trains for some steps, tower included -> how many images."""
    chosen = preset(flags.preset)
    device, dtype = choose_device(flags.device, flags.dtype)
    model = MedMoE(chosen.model)
    load_published(model, chosen.model, chosen.clip, chosen.llm)
    model.to(device).train()
    freeze_all_but(model, ("projector.*", "decoder.*", "vision.*"))
    step = stepper(model, lambda batch: mean_loss(model, batch), dtype)
    images = Images(chosen.model.vision.image_size)
    data = Dataset(samples, Text(chosen.llm), chosen.model, plain=False, images=images)
    order = data.epoch(flags.batch_size or 64, flags.seed, 0)[: flags.steps]
    for rows in order:
        data.batch(rows)  # into memory, as after the first epoch

    def run() -> int:
        for rows in order:
            step(data.batch(rows).to(device))
        return sum(map(len, order))

    return run


def bench_loader(flags: BenchConfig) -> dict:
    """Images that are decoded, padded, resized and normalised with 1 and 2 threads."""
    samples = load_samples(flags.data or ("phantoms:512",), "vqa", "train", **reading(flags))
    size = preset(flags.preset).model.vision.image_size
    ways = {
        "1 thread": lambda: read_all(samples, size, 1),
        "2 threads": lambda: read_all(samples, size, 2),
        "training": training(flags, samples),
    }
    rates = interleave(ways, flags.rounds)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        ratio = medians[name] / medians["training"]
        print(f"{name:<10}{show(summary(values), 0)} images/s, {ratio:.1f} x training")
    return {"size": size, "images_per_s": medians}


BENCHES = {"train": bench_train, "generate": bench_generate, "loader": bench_loader}


@user_errors
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["memory"], ["kernels"]):
        return {"memory": memory, "kernels": bench_kernels}[argv[0]].main(argv[1:])
    flags = parse(BenchConfig, argv, "lab.bench")
    at_least(flags, rounds=1, steps=1, new_tokens=1, batch_size=1)
    device, dtype = choose_device(flags.device, flags.dtype)
    ops.choose(flags.kernels, device)
    result = BENCHES[flags.what](flags) | {
        "flags": to_dict(flags), "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
