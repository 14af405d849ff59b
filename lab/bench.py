"""How fast: python -m lab.bench loader --data slake:DIR

loader  images/s that are decoded, padded, resized and normalised with 1 and 2 threads, beside the
        images/s that training takes (forward, backward, step; pictures already in memory). Rounds
        are interleaved and medians reported. The last line is JSON.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch

from config import preset
from data import Dataset, Text
from flags import Common, argument, flag, parse, reading, user_errors
from model import MedMoE, choose_device, freeze_all_but, precision
from pictures import Images
from records import Sample
from sources import load_samples
from vision import normalise
from weights import load_published


@dataclass(frozen=True)
class BenchConfig(Common):
    """Measure speeds on this machine."""

    what: Literal["loader"] = argument("what to measure: loader")
    preset: str = flag("tiny", "dimensions of the model")
    rounds: int = flag(5, "repetitions, interleaved")
    steps: int = flag(10, "training steps in a round")


def read_all(samples: Sequence[Sample], size: int, workers: int) -> int:
    """Every different picture once, from its file to what the tower takes -> how many."""
    images = Images(size)
    different = list(dict.fromkeys(s.image for s in samples if s.image is not None))
    with ThreadPoolExecutor(workers) as pool:
        for pixels in pool.map(images.read, different):
            normalise(pixels[None])
    return len(different)


def training(flags: BenchConfig, samples: Sequence[Sample]) -> Callable[[], int]:
    """-> a function that trains for some steps, tower included, and says how many pictures."""
    chosen = preset(flags.preset)
    device, dtype = choose_device(flags.device, flags.dtype)
    model = MedMoE(chosen.model)
    load_published(model, chosen.model, chosen.clip, chosen.llm)
    model.to(device).train()
    freeze_all_but(model, ("projector.*", "decoder.*", "vision.*"))
    named = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(named, lr=1e-4, weight_decay=0.0, fused=True)
    data = Dataset(samples, Text(chosen.llm), chosen.model, plain=False)
    order = data.epoch(flags.batch_size or 64, flags.seed, 0)[: flags.steps]
    for rows in order:
        data.batch(rows)  # into memory, as after the first epoch

    def run() -> int:
        n = 0
        for rows in order:
            batch = data.batch(rows).to(device)
            with precision(device, dtype):
                out = model.loss(batch)
            (out.total / out.n_tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
            n += len(rows)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return n

    return run


def bench_loader(flags: BenchConfig) -> dict:
    specs = flags.data or ("phantoms:512",)
    samples = load_samples(specs, "vqa", "train", **reading(flags))
    size = preset(flags.preset).model.vision.image_size
    ways = {
        "1 thread": lambda: read_all(samples, size, 1),
        "2 threads": lambda: read_all(samples, size, 2),
        "training": training(flags, samples),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(flags.rounds + 1):  # the first one warms up and does not count
        for name, run in ways.items():
            start = time.perf_counter()
            n = run()
            if round_:
                rates[name].append(n / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        ratio = medians[name] / medians["training"]
        spread = f"from {min(values):.0f} to {max(values):.0f}"
        print(f"{name:<10} {medians[name]:8.0f} images/s ({spread}), {ratio:.1f} x training")
    return {"data": list(specs), "preset": flags.preset, "size": size, "rounds": flags.rounds,
            "threads": torch.get_num_threads(), "images_per_s": medians}  # fmt: skip


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(BenchConfig, argv, "lab.bench")
    result = {"loader": bench_loader}[flags.what](flags)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
