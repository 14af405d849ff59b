"""Does the router classify modality, and does it matter?

    python -m lab.router runs/tiny/phase3 --break-router

--break-router is the control: what is as good with a router retrained on shuffled labels does not
depend on it. Intervals are 95 %: Wilson's for shares, else a bootstrap over images.

Shapes: n questions, G images, L sparse layers, K kinds of token, E experts, M modalities.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_model
from config import IMAGE_ID, MODALITIES, Common, UserError, argument, flag
from data import Batch, Dataset, Sample
from engine.cli import check_outputs, parse, user_errors, write_json
from engine.experts import mutual_information
from engine.routes import Alone, forced
from eval import Predictor, load_questions
from lab.controls import ByModality
from metrics import bootstrap, expert_names, router_report, wilson
from model import autocast, choose_device, sparse_layers
from router_training import collect, one_per_image, train_router
from routers import Hints, Router
from scoring.compare import value
from sources.images import Images
from sources.load import how_read, load_samples, reading

KINDS = ("text before the image", "image", "text after it", "answer")
N_BINS, N_TRAIN = 10, 400  # of confidence; images for the routers that are retrained


@dataclass(frozen=True)
class RouterConfig(Common):
    """Report on a checkpoint's router."""

    lacks = ("kernels",)
    checkpoint: str = argument("DIR of a finished phase 3")
    split: Literal["test", "val"] = flag("test", "which questions")
    limit: int = flag(100, "images whose questions are answered, 7 times each", least=1)
    break_router: bool = flag(False, "report on a router retrained on shuffled labels")
    router: str | None = flag(None, "replace the router: a name or FILE.py:Class")


class Estimate(NamedTuple):
    value: float
    low: float  # 95 % interval
    high: float


def show(name: str, found: Any, depth: int = 0) -> None:
    """Print nested results, one a line."""
    if isinstance(found, Estimate):
        found = "{:.3f} [{:.3f}, {:.3f}]".format(*found)
    text = "" if isinstance(found, dict) else f"{found:.3f}" if isinstance(found, float) else found
    print(f"{'  ' * depth}{name:<24} {text}")
    for inner, part in found.items() if isinstance(found, dict) else ():
        show(inner, part, depth + 1)


def bootstrapped(statistic: Callable, n: int, draws: int = 1000) -> Estimate | None:
    """statistic(all n rows), its interval over resampled rows; None of a sample is left out."""
    if n == 0:
        return None
    rng = np.random.default_rng(0)
    found = [statistic(rng.integers(n, size=n)) for _ in range(draws)]
    ends = np.quantile([x for x in found if x is not None], [0.025, 0.975])
    return Estimate(statistic(np.arange(n)), *ends)


def reliability(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> list[dict]:
    """Bins of equal width over (0, 1] that are not empty: mean confidence and accuracy."""
    place = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    rows = []
    for b in sorted(set(place.tolist())):
        part, hits = confidence[place == b], int(right[place == b].sum())
        rows.append({"low": b / n_bins, "high": (b + 1) / n_bins, "n": len(part),
                     "confidence": float(part.mean()), "accuracy": hits / len(part)})  # fmt: skip
    return rows


def ece(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> float:
    """Sum over bins of n_b / n * |accuracy_b - confidence_b| (Guo et al. 2017, equation 3)."""
    rows = reliability(confidence, right, n_bins)
    return sum(r["n"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / len(confidence)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean F1 over the classes that occur as truth or as prediction."""
    scores = router_report(truth, predicted, names)["f1"].values()
    return float(np.mean([score for score in scores if score is not None]))


class Probe(NamedTuple):
    """Of each question, followed by its true answer."""

    logits: Tensor  # (n, L, E) mean over the prompt
    best: Tensor  # (n, L, K, E) positions of a kind whose largest logit is this expert's
    first: Tensor  # (n, L, E) prompt positions whose largest gate is this expert's


def kinds(batch: Batch) -> Tensor:
    """(K, B, T) bool: which positions are of which of KINDS; padding is of none."""
    prompt, is_patch = batch.prompt(), batch.ids == IMAGE_ID
    is_later = is_patch.cumsum(dim=1) > 0
    text = prompt & ~is_patch
    return torch.stack([text & ~is_later, prompt & is_patch, text & is_later, batch.mask & ~prompt])


@torch.no_grad()
def probe(predictor: Predictor, samples: Sequence[Sample]) -> Probe:
    config = predictor.model.config
    images = Images(config.vision.image_size, workers=2)
    data = Dataset(samples, predictor.text, config, plain=False, images=images)
    order, parts = torch.tensor(data.lengths).argsort(stable=True), []
    for rows in order.split(predictor.batch_size):
        batch = data.batch(rows.tolist()).to(predictor.device)
        hints = Hints(prompt=batch.prompt(), modality=batch.modality)
        with autocast(predictor.device, predictor.dtype):
            _, routings = predictor.model(batch.ids, batch.mask, batch.images, hints)
        logits = torch.stack([r.logits for r in routings], dim=1).float()  # (B, L, T, E)
        gates = torch.stack([r.gates for r in routings], dim=1)
        best, first = (F.one_hot(x.argmax(dim=-1), x.shape[-1]).float() for x in (logits, gates))
        best = torch.einsum("kbt,blte->blke", kinds(batch).float(), best)
        prompt = batch.prompt()[:, None, :, None].float()  # (B, 1, T, 1)
        first = first * prompt * (gates.amax(dim=-1, keepdim=True) > 0)  # to no expert: no choice
        mean = (logits * prompt).sum(dim=2) / prompt.sum(dim=2)
        parts.append([t.cpu() for t in (mean, best, first.sum(dim=2))])
    return Probe(*(torch.cat(part)[order.argsort()] for part in zip(*parts, strict=True)))


def by_image(samples: Sequence[Sample], found: Probe) -> tuple[np.ndarray, Probe]:
    """Of the G images of known modality: which (G,), and mean logits, summed counts, as numpy."""
    known = [i for i, s in enumerate(samples) if s.modality]
    truth = {samples[i].image: MODALITIES.index(samples[i].modality) for i in known}
    place = {image: n for n, image in enumerate(truth)}
    of = torch.tensor([place[samples[i].image] for i in known])
    logits, best, first = (
        torch.zeros(len(truth), *t.shape[1:]).double().index_add(0, of, t[known].double()).numpy()
        for t in found
    )
    n = of.bincount().numpy()[:, None, None]  # (G, 1, 1) questions
    return np.array(list(truth.values())), Probe(logits / n, best, first)


def classification(truth: np.ndarray, found: Probe) -> dict:
    """Mean logits over prompts and layers as a classifier: accuracy, F1, calibration."""
    logits = found.logits.mean(axis=1)  # (G, E)
    names, n = expert_names(logits.shape[1]), len(truth)
    truth, predicted = truth % len(names), logits.argmax(axis=1)
    confidence = torch.tensor(logits).softmax(dim=-1).amax(dim=-1).numpy()  # (G,)
    right = predicted == truth
    return router_report(truth, predicted, names) | {
        "macro_f1": bootstrapped(lambda i: macro_f1(truth[i], predicted[i], names), n),
        "confidence": float(confidence.mean()),
        "ece": bootstrapped(lambda i: ece(confidence[i], right[i], N_BINS), n),
    }


def levels(truth: np.ndarray, found: Probe, blocks: Sequence[int]) -> dict[str, dict]:
    """By block: accuracy of mean logits and of single positions; bits of I(expert; modality)."""
    table, classes = {}, np.eye(len(MODALITIES))[truth]  # (G, M) one-hot
    truth = truth % found.logits.shape[-1]
    hits, total = found.best[np.arange(len(truth)), :, :, truth], found.best.sum(axis=-1)
    for layer, block in enumerate(blocks):
        right = found.logits[:, layer].argmax(axis=1) == truth  # (G,)
        pooled = Estimate(float(right.mean()), *wilson(int(right.sum()), len(right)))
        row = {"pooled over the prompt": pooled}
        for k, kind in enumerate(KINDS):
            some = total[:, layer, k] > 0  # (G,)
            shares = hits[some, layer, k] / total[some, layer, k]
            row[kind] = bootstrapped(lambda i, s=shares: s[i].mean(), len(shares))
        bits = partial(lambda n, i: mutual_information(classes[i].T @ n[i]), found.first[:, layer])
        table[f"block {block}"] = row | {"bits": bootstrapped(bits, len(truth))}
    return table


def answers(predictor: Predictor, samples: Sequence[Sample], flags: RouterConfig) -> dict:
    """Scores (closed right or wrong, open by recall) with own and forced routes."""
    images = list(dict.fromkeys(s.image for s in samples if s.modality))
    wanted = np.linspace(0, len(images) - 1, min(flags.limit, len(images)))
    wanted = {images[int(i)] for i in wanted}
    samples = [s for s in samples if s.image in wanted and s.modality]
    n_experts, every = predictor.model.config.moe.n_experts, np.arange(len(samples))
    modality = np.array([MODALITIES.index(s.modality) for s in samples])

    def run(make: Callable[[Router], Router]) -> np.ndarray:
        with forced(predictor.model, make):
            found = predictor.answer(samples)
        return np.array([value(s, p.answer, None) for s, p in zip(samples, found, strict=True)])

    def mean(scores: np.ndarray, rows: np.ndarray = every, least: float = 0.0) -> Estimate:
        of = [str(samples[i].image) for i in rows]
        return Estimate(scores[rows].mean(), *bootstrap(scores[rows], of, least))

    own = run(lambda router: router)
    alone = np.stack([run(partial(Alone, expert=e)) for e in range(n_experts)])  # (E, n)
    found = {"questions": len(samples), "images": len(wanted), "own routing": mean(own)}
    for name, scores in (("true expert first", run(ByModality)),
                         ("wrong expert first", run(partial(ByModality, shift=1))),
                         ("true expert alone", alone[modality % n_experts, every])):  # fmt: skip
        found[name] = {"mean": mean(scores), "minus own": mean(scores - own, least=-1.0)}
    for m in sorted(set(modality.tolist())):
        rows = np.flatnonzero(modality == m)
        alone_m = {f"expert {e}": mean(scores, rows) for e, scores in enumerate(alone)}
        found.setdefault("alone", {})[MODALITIES[m]] = alone_m
    return found


def report(predictor: Predictor, flags: RouterConfig, samples: list[Sample]) -> dict:
    """Print all parts and return their numbers."""
    model, moe = predictor.model, predictor.model.config.moe
    blocks = sparse_layers(model.config, moe)
    routers = [model.decoder.blocks[i].mlp.router for i in blocks]
    parts = []  # to retrain routers
    for part in (load_samples(flags.data, "vqa", "train", **reading(flags)), samples):
        if not (labelled := one_per_image(part, N_TRAIN, flags.seed)):
            raise UserError(f"--data {' '.join(flags.data)}: no image has a known modality")
        parts.append([t.cpu() for t in collect(model, labelled, predictor.text, blocks, flags.seed,
                                               predictor.device, predictor.dtype)])  # fmt: skip
    train, test = parts
    if flags.break_router:
        order = torch.randperm(len(train[2]), generator=torch.Generator().manual_seed(flags.seed))
        train = *train[:2], train[2][order]
        weights, _ = train_router(train, test, moe.n_experts, flags.seed)
        for router in routers:
            router.proj.load_state_dict(weights)
    truth, found = by_image(samples, probe(predictor, samples))
    result = {"n_questions": len(samples), "n_images": len({s.image for s in samples}),
              "classification": classification(truth, found),
              "levels": levels(truth, found, blocks)}  # fmt: skip
    # A router that looks ahead cannot answer; a single expert has no other.
    is_able = moe.n_experts > 1 and all(router.causal for router in routers)
    result["forced_routing"] = answers(predictor, samples, flags) if is_able else None
    show("report", result)
    return result


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(RouterConfig, argv, "python -m lab.router")
    check_outputs((flags.json,), ())
    device, dtype = choose_device(flags.device, flags.dtype)
    model, text, meta = load_model(Path(flags.checkpoint), device, dtype, flags.router)
    if model.config.moe is None:
        raise UserError(f"{flags.checkpoint}: is dense, it has no router")
    known, limit = how_read(meta["flags"], Path(flags.checkpoint)), flags.limit
    flags, samples = load_questions(replace(flags, limit=None), known)  # the limit is of images
    flags, samples = replace(flags, limit=limit), [s for s in samples if s.image is not None]
    predictor = Predictor(model, text, device, dtype, flags.batch_size or 64)
    command = shlex.join(["python", "-m", "lab.router", *(sys.argv[1:] if argv is None else argv)])
    result = report(predictor, flags, samples) | {"command": command, "device": str(device)}
    if flags.json:
        write_json(Path(flags.json), result)
    return result


if __name__ == "__main__":
    main()
