"""How well the router classifies modality, what it does with unknown images, and what that changes.

    python -m lab.router runs/tiny/phase3                    on its own held-out questions
    python -m lab.router runs/tiny/phase3 --break-router     the same report of a broken router

Modality: the router's mean logits over prompt and layers, as in eval.py; then block by block.
Unknown images: blank, noise, those of --others, and a modality that is left out in retraining.
Answers, for --limit images: with the router's own routing, with the true modality's expert or a
wrong one forced at the router's own gate values, and with each expert alone.

--break-router is the control: the router is retrained on the checkpoint's own hidden states with
the labels shuffled among the images. What then stays as good does not depend on the router.
Intervals are 95 %: Wilson's for shares, else a bootstrap over images.

Shapes: n questions, G images, L sparse layers, K kinds of token, E experts, M modalities.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model
from config import IMAGE_ID, MODALITIES, Common, UserError, argument, flag
from data import Batch, Dataset, Sample
from engine.cli import at_least, check_writable, parse, user_errors, write_json
from eval import Predictor, load_questions
from lab.controls import Alone, ByModality, forced
from lab.tables import clean
from metrics import bootstrap, expert_names, format_confusion, router_report, wilson
from model import autocast, choose_device, sparse_layers
from router_training import Features, collect, one_per_image, train_router
from routers import Hints, Router
from scoring.compare import value
from sources.images import Images
from sources.load import how_read, load_samples, reading
from sources.medmnist import auc
from vision import normalise

KINDS = ("text before the image", "image", "text after it", "answer")
N_BINS = 10  # of confidence
NO_LABELS = "  not done: no image has a known modality"


@dataclass(frozen=True)
class RouterConfig(Common):
    """Report on a checkpoint's router."""

    checkpoint: str = argument("DIR of a finished phase 3")
    split: Literal["test", "val"] = flag("test", "which questions")
    limit: int = flag(100, "images whose questions are answered, with 4 experts 7 times each")
    others: tuple[str, ...] = flag((), "a SOURCE of images that it was not trained on; repeatable")
    router_images: int = flag(400, "images for the routers that are retrained")
    break_router: bool = flag(False, "report on a router retrained on shuffled labels")


class Estimate(NamedTuple):
    value: float
    low: float  # 95 % interval
    high: float


def show(found: Estimate | None, spec: str = ".1%") -> str:
    """79.2% [70.0%, 86.1%]; a dash where there is nothing to estimate."""
    return "-" if found is None else "{} [{}, {}]".format(*(format(x, spec) for x in found))


def points(found: Estimate) -> str:
    return show(Estimate(*(100 * x for x in found)), "+.1f") + " points"


def bootstrapped(statistic: Callable, n: int, draws: int = 1000) -> Estimate | None:
    """statistic(rows) of all n rows, with the percentile interval over resampled rows.

    Always the same samples; one for which the statistic is None is left out. None if it is None
    for all rows.
    """
    if n == 0 or (value := statistic(np.arange(n))) is None:
        return None
    rng = np.random.default_rng(0)
    found = (statistic(rng.integers(n, size=n)) for _ in range(draws))
    return Estimate(value, *np.quantile([x for x in found if x is not None], [0.025, 0.975]))


def share(hits: np.ndarray) -> Estimate | None:
    """Share of hits with Wilson's interval; None of nothing."""
    n, right = len(hits), int(hits.sum())
    return Estimate(right / n, *wilson(right, n)) if n else None


def averaged(values: np.ndarray, samples: Sequence[Sample]) -> Estimate | None:
    """Mean with its interval by image; None of nothing."""
    images = [str(s.image) for s in samples]
    return Estimate(values.mean(), *bootstrap(values, images)) if len(values) else None


def reliability(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> list[dict]:
    """Bins of equal width over (0, 1] that are not empty: mean confidence and accuracy."""
    place = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    rows = []
    for b in sorted(set(place.tolist())):
        inside = place == b
        n, hits = int(inside.sum()), int(right[inside].sum())
        rows.append({"low": b / n_bins, "high": (b + 1) / n_bins, "n": n,
                     "confidence": float(confidence[inside].mean()), "accuracy": hits / n,
                     "ci95": wilson(hits, n)})  # fmt: skip
    return rows


def ece(confidence: np.ndarray, right: np.ndarray, n_bins: int) -> float:
    """Expected calibration error: sum over bins of n_b / n * |accuracy_b - confidence_b|.

    Guo et al. 2017, equation 3. Biased upwards, the more so the fewer images; so is its bootstrap.
    """
    rows = reliability(confidence, right, n_bins)
    return sum(r["n"] * abs(r["accuracy"] - r["confidence"]) for r in rows) / len(confidence)


def macro_f1(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean F1 over the classes that occur as truth or as prediction."""
    scores = router_report(truth, predicted, names)["f1"].values()
    return float(np.mean([score for score in scores if score is not None]))


def detects(known: np.ndarray, unknown: np.ndarray) -> Estimate | None:
    """AUROC of confidence: the probability that a known image has more than an unknown one.

    0.5 is chance; below it the unknown images get more confidence than the known.
    """
    score = np.concatenate([known, unknown])
    truth, both = np.arange(len(score)) < len(known), np.stack([-score, score], axis=1)
    area = lambda rows: auc(truth[rows].astype(int), both[rows], "binary-class")  # noqa: E731
    return bootstrapped(area, len(score), draws=300)


def entropy(counts: np.ndarray) -> np.ndarray:
    """Bits of a distribution over the last axis, given as counts; 0 log 0 is 0."""
    p = counts / counts.sum(axis=-1, keepdims=True)
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1)


def mutual_information(joint: np.ndarray) -> float:
    """I(row; column) in bits of a table of counts (M, E): H(row) + H(column) - H(both)."""
    bits = entropy(joint.sum(axis=0)) + entropy(joint.sum(axis=1)) - entropy(joint.ravel())
    return max(0.0, float(bits))


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


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
def probe(predictor: Predictor, samples: Sequence[Sample], change: Callable | None = None) -> Probe:
    """change: applied to the normalised images (n_images, 3, S, S)."""
    config = predictor.model.config
    images = Images(config.vision.image_size, workers=2)
    data = Dataset(samples, predictor.text, config, plain=False, images=images)
    order, parts = torch.tensor(data.lengths).argsort(stable=True), []
    for rows in tqdm(order.split(predictor.batch_size), desc="routing", mininterval=1):
        batch = data.batch(rows.tolist()).to(predictor.device)
        pixels = change(batch.images) if change else batch.images
        hints = Hints(prompt=batch.prompt(), modality=batch.modality)
        with autocast(predictor.device, predictor.dtype):
            _, routings = predictor.model(batch.ids, batch.mask, pixels, hints)
        logits = torch.stack([r.logits for r in routings], dim=1).float()  # (B, L, T, E)
        gates = torch.stack([r.gates for r in routings], dim=1)
        best, first = (F.one_hot(x.argmax(dim=-1), x.shape[-1]).float() for x in (logits, gates))
        best = torch.einsum("kbt,blte->blke", kinds(batch).float(), best)
        prompt = batch.prompt()[:, None, :, None].float()  # (B, 1, T, 1)
        first = first * prompt * (gates.amax(dim=-1, keepdim=True) > 0)  # to no expert: no choice
        mean = (logits * prompt).sum(dim=2) / prompt.sum(dim=2)
        parts.append([t.cpu() for t in (mean, best, first.sum(dim=2))])
    return Probe(*(torch.cat(part)[order.argsort()] for part in zip(*parts, strict=True)))


def image_numbers(samples: Sequence[Sample]) -> Tensor:
    """(n,) which image each question is about, counted from 0."""
    number = {image: g for g, image in enumerate(dict.fromkeys(s.image for s in samples))}
    return torch.tensor([number[s.image] for s in samples], dtype=torch.int64)


def by_image(samples: Sequence[Sample], found: Probe) -> tuple[np.ndarray, Probe]:
    """Of the G images of known modality: which (G,), and mean logits, summed counts, as numpy."""
    known = [i for i, s in enumerate(samples) if s.modality]
    of = image_numbers([samples[i] for i in known])
    n = of.bincount()  # (G,) questions
    truth = torch.zeros_like(n)
    truth[of] = torch.tensor([MODALITIES.index(samples[i].modality) for i in known], dtype=n.dtype)
    logits, best, first = (
        torch.zeros(len(n), *t.shape[1:]).double().index_add(0, of, t[known].double())
        for t in found
    )
    return truth.numpy(), Probe((logits / n[:, None, None]).numpy(), best.numpy(), first.numpy())


def classification(truth: np.ndarray, found: Probe, _: Sequence[int]) -> dict:
    """Mean logits over prompts and layers as a classifier: accuracy, F1, calibration."""
    logits = found.logits.mean(axis=1)  # (G, E)
    names, n = expert_names(logits.shape[1]), len(truth)
    truth, predicted = truth % len(names), logits.argmax(axis=1)
    confidence, right = softmax(logits).max(axis=1), predicted == truth
    result = router_report(truth, predicted, names) | {
        "macro_f1": bootstrapped(lambda i: macro_f1(truth[i], predicted[i], names), n),
        "confidence": float(confidence.mean()),
        "ece": bootstrapped(lambda i: ece(confidence[i], right[i], N_BINS), n),
        "bins": reliability(confidence, right, N_BINS),
    }
    print(f"  {show(share(right))} of {n} images, macro-F1 {show(result['macro_f1'], '.3f')}")
    print(format_confusion(result))
    print(f"  mean confidence {confidence.mean():.3f}, ECE {show(result['ece'], '.3f')}")
    for row in result["bins"]:
        accuracy = show(Estimate(row["accuracy"], *row["ci95"]))
        print(f"    {row['low']:.2f} to {row['high']:.2f}  n {row['n']:>4}  confidence "
              f"{row['confidence']:.3f}, accuracy {accuracy}")  # fmt: skip
    return result


def levels(truth: np.ndarray, found: Probe, blocks: Sequence[int]) -> list[dict]:
    """By sparse block: accuracy of its own mean logits, and of single positions by kind.

    A kind's accuracy is an image's share of right positions, averaged over the images.
    """
    truth, table = truth % found.logits.shape[-1], []
    hits, total = found.best[np.arange(len(truth)), :, :, truth], found.best.sum(axis=-1)
    for layer, block in enumerate(blocks):
        row = {"pooled over the prompt": share(found.logits[:, layer].argmax(axis=1) == truth)}
        for k, kind in enumerate(KINDS):
            some = total[:, layer, k] > 0  # (G,)
            shares = hits[some, layer, k] / total[some, layer, k]
            row[kind] = bootstrapped(lambda i, s=shares: s[i].mean(), len(shares))
        for name, estimate in row.items():
            title = f"block {block}" if name == "pooled over the prompt" else ""
            print(f"  {title:<10}{name:<24}{show(estimate)}")
        table.append({"block": block} | row)
    return table


def information(truth: np.ndarray, found: Probe, blocks: Sequence[int]) -> list[dict]:
    """By sparse block: I(expert; modality) of the prompt positions' first choices.

    As a share of H(modality) it is 1 if the expert determines the modality. With the images'
    modalities permuted it is above 0: an image's positions are routed alike.
    """
    classes, table = np.eye(len(MODALITIES))[truth], []  # (G, M) one-hot
    for layer, block in enumerate(blocks):
        load, rng = found.first[:, layer], np.random.default_rng(0)  # (G, E)
        bits = lambda i, load=load: mutual_information(classes[i].T @ load[i])  # noqa: E731
        estimate = bootstrapped(bits, len(truth), draws=500)
        null = np.mean([mutual_information(rng.permutation(classes).T @ load) for _ in range(200)])
        part = estimate.value / max(1e-12, entropy(classes.T @ load.sum(axis=1)))
        print(f"  {f'block {block}':<10}{show(estimate, '.3f')} bits, {part:.3f} of H(modality); "
              f"labels permuted: {null:.3f}")  # fmt: skip
        table.append({"block": block, "bits": estimate, "normalised": part, "permuted": null})
    return table


def describe(name: str, logits: np.ndarray, known: np.ndarray | None, more: str = "") -> dict:
    """Confidence, predictions, and the AUROC of confidence against that of `known` images (n,)."""
    p = softmax(logits)
    confidence, bits = p.max(axis=1), float(entropy(p).mean())
    goes = (np.bincount(logits.argmax(axis=1), minlength=len(p[0])) / len(p)).tolist()
    auroc = None if known is None else detects(known, confidence)
    cells = "".join(f"{x:>11.1%}" for x in goes) + f"   {show(auroc, '.3f')}{more}"
    print(f"  {name:<12}{len(p):>5}{confidence.mean():11.3f}{bits:9.3f}{cells}")
    return {"n": len(p), "confidence": float(confidence.mean()), "entropy_bits": bits,
            "goes_to": goes, "auroc": auroc}  # fmt: skip


def noise(images: Tensor) -> Tensor:
    """Random pixels, the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, images.shape, generator=generator, dtype=torch.uint8)
    return normalise(pixels).to(images)


def unknown(predictor: Predictor, samples: Sequence[Sample], others: Sequence[Sample]) -> dict:
    """One question per image, as it is, with the image replaced; and of other sources."""

    def logits(part: Sequence[Sample], change: Callable | None = None) -> np.ndarray:
        one = list({s.image: s for s in reversed(part)}.values())[::-1]  # each image's first
        return probe(predictor, one, change).logits.mean(dim=1).numpy()

    own = logits(samples)
    known = softmax(own).max(axis=1)
    found = {"known": describe("known", own, None)}
    for name, change in (("blank", torch.zeros_like), ("noise", noise)):  # 0: CLIP's mean colour
        found[name] = describe(name, logits(samples, change), known)
    for source in dict.fromkeys(s.source for s in others):
        part = [s for s in others if s.source == source]
        found[source] = describe(source, logits(part), known)
    return found


def leave_out(train: Features, test: Features, n_experts: int, seed: int) -> dict:
    """Routers retrained on all modalities and on all but one; judged on the test images.

    Of the modality that was left out: confidence and predictions. "known": accuracy on the others.
    """
    found, truth, labels = {}, test[2].numpy(), train[2].unique().tolist()
    for gone in (-1, *(labels if len(labels) > 2 else ())):  # -1: nothing
        part = tuple(t[train[2] != gone] for t in train)
        weights, _ = train_router(part, test, n_experts, seed)
        logits = (test[0] @ weights["weight"].T + weights["bias"]).mean(dim=1).numpy()  # (n, E)
        is_known, is_gone = np.isin(truth, labels) & (truth != gone), truth == gone
        confidence = softmax(logits[is_known]).max(axis=1)
        known = share(logits[is_known].argmax(axis=1) == truth[is_known] % n_experts)
        more = f"   {show(known)}, {confidence.mean():.3f}"
        name = MODALITIES[gone] if gone >= 0 else "nothing"
        found[name] = {"known": known, "known_confidence": float(confidence.mean())}
        if is_gone.any():
            found[name] |= describe(name, logits[is_gone], confidence, more)
        else:
            print(f"  {name:<12}    -{more}")
    return found


def by_route(samples: Sequence[Sample], scores: np.ndarray, right: np.ndarray) -> dict:
    """Scores of the questions whose modality the router predicts rightly, and of the others.

    Not the effect of the routing: images of which the modality is hard to predict may be harder to
    answer about. The difference's interval is by image; None where either group is empty.
    """
    of = image_numbers(samples).numpy()
    table = np.zeros((of.max() + 1, 2, 2))  # of an image, wrong or right: sum of scores, questions
    np.add.at(table, (of, right.astype(int)), np.stack([scores, np.ones_like(scores)], axis=1))

    def gap(rows: np.ndarray) -> float | None:
        sums, counts = table[rows].sum(axis=0).T
        return float(np.diff(sums / counts)[0]) if counts.all() else None

    found = {"difference": bootstrapped(gap, len(table))}
    for name, group in (("right", right), ("wrong", ~right)):
        part = [s for s, inside in zip(samples, group, strict=True) if inside]
        found[name] = averaged(scores[group], part)
        print(f"  {f'modality predicted {name}ly':<28}{show(found[name])} of {len(part)} questions")
    if found["difference"]:
        print(f"  difference {points(found['difference'])}; not the effect of the routing: some "
              "images are harder for both")  # fmt: skip
    return found


def answers(predictor: Predictor, samples: Sequence[Sample], seed: int) -> dict:
    """Scores with the checkpoint's own routing and with forced routing; of known modality.

    A closed answer is right or wrong, an open one scored by recall: eval.py's overall score.
    """
    n_experts, every = predictor.model.config.moe.n_experts, np.arange(len(samples))
    modality = np.array([MODALITIES.index(s.modality) for s in samples])
    truth, of = modality % n_experts, image_numbers(samples)

    def run(make: Callable[[Router], Router], rows: np.ndarray = every) -> tuple:
        part = [samples[i] for i in rows]
        with forced(predictor.model, make):
            found = predictor.answer(part)
        scores = [value(s, p.answer, None) for s, p in zip(part, found, strict=True)]
        return np.array(scores), np.array([int(p.votes.argmax()) for p in found])

    own, predicted = run(lambda router: router)
    alone = np.stack([run(partial(Alone, expert=e))[0] for e in range(n_experts)])  # (E, n)
    wrong, rng = np.zeros(len(samples)), Random(seed)
    shifts = np.array([rng.randrange(1, n_experts) for _ in range(of.max() + 1)])[of]  # by image
    for shift in set(shifts.tolist()):
        rows = np.flatnonzero(shifts == shift)
        wrong[rows] = run(partial(ByModality, shift=shift), rows)[0]
    found = {"own routing": averaged(own, samples)}
    print(f"  {'own routing':<28}{show(found['own routing'])} of {len(samples)} questions about "
          f"{of.max() + 1} images")  # fmt: skip
    found["by route"] = by_route(samples, own, predicted == truth)
    for name, scores in (("true expert first", run(ByModality)[0]), ("wrong expert first", wrong),
                         ("true expert alone", alone[truth, every])):  # fmt: skip
        both = averaged(scores, samples), averaged(scores - own, samples)
        found[name] = dict(zip(("mean", "minus own"), both, strict=True))
        print(f"  {name:<28}{show(both[0])}, {points(both[1])}")
    print("each expert alone, by modality")
    print(" " * 14 + "".join(f"{name:>24}" for name in expert_names(n_experts)))
    found["alone"] = {}
    for m in sorted(set(modality.tolist())):
        rows = np.flatnonzero(modality == m)
        cells = [averaged(scores[rows], [samples[i] for i in rows]) for scores in alone]
        found["alone"][MODALITIES[m]] = cells
        print(f"  {MODALITIES[m]:<12}" + "".join(f"{show(cell):>24}" for cell in cells))
    return found


def spread_images(samples: list[Sample], n: int) -> list[Sample]:
    """All questions of known modality about n images, spread evenly over those there are."""
    images = list(dict.fromkeys(s.image for s in samples if s.modality))
    wanted = {images[i] for i in np.linspace(0, len(images) - 1, min(n, len(images))).astype(int)}
    return [s for s in samples if s.image in wanted and s.modality]


def features(predictor: Predictor, flags: RouterConfig, samples: list[Sample]) -> list[Features]:
    """Of training and of test images, to retrain routers. Raises UserError without labels."""
    config, found = predictor.model.config, []
    for part in (load_samples(flags.data, "vqa", "train", **reading(flags)), samples):
        labelled = one_per_image(part, flags.router_images, flags.seed)
        if not labelled:
            raise UserError("no router is retrained: no image has a known modality")
        found.append(collect(predictor.model, labelled, predictor.text,
                             sparse_layers(config, config.moe), flags.seed, predictor.device,
                             predictor.dtype))  # fmt: skip
    return [tuple(t.cpu() for t in part) for part in found]


def report(predictor: Predictor, flags: RouterConfig, samples: list[Sample]) -> dict:
    """Print all parts and return their numbers; None for a part that needs modalities."""
    model, moe = predictor.model, predictor.model.config.moe
    blocks, n_images = sparse_layers(model.config, moe), len({s.image for s in samples})
    routers = [model.decoder.blocks[i].mlp.router for i in blocks]
    others = load_samples(flags.others, "vqa", flags.split, lang="en") if flags.others else []
    train, result = None, {"n_questions": len(samples), "n_images": n_images}
    try:
        train, test = features(predictor, flags, samples)
    except UserError as error:
        if flags.break_router:
            raise
        print(error)
    if flags.break_router:
        order = torch.randperm(len(train[2]), generator=torch.Generator().manual_seed(flags.seed))
        train = *train[:2], train[2][order]
        weights, _ = train_router(train, test, moe.n_experts, flags.seed)
        for router in routers:
            router.proj.load_state_dict(weights)
    kind = "a router retrained on shuffled labels in" if flags.break_router else "the router of"
    print(f"{kind} {flags.checkpoint} on {' '.join(flags.data)} {flags.split}: {len(samples)} "
          f"questions about {n_images} images")  # fmt: skip
    truth, found = by_image(samples, probe(predictor, samples))

    names = "".join(f"{name:>11}" for name in expert_names(moe.n_experts))
    heading = f"    n confidence  entropy{names}   AUROC of confidence"
    for title, part in (
        ("prediction of the modality: mean logits over prompt and blocks", classification),
        ("by block, and single positions by kind", levels),
        ("mutual information of a prompt position's first choice and the modality", information),
    ):
        print(title)
        result[part.__name__] = part(truth, found, blocks) if len(truth) else print(NO_LABELS)
    print(f"unknown images, with the same questions\n  {'image':<12}{heading}")
    result["unknown"] = unknown(predictor, samples, [s for s in others if s.image is not None])
    if train:
        print("routers retrained without one modality's labels: predictions for its images")
        print(f"  {'left out':<12}{heading}   accuracy on the others, confidence")
        result["left out"] = leave_out(train, test, moe.n_experts, flags.seed)
    print("answers: closed right or wrong, open by recall")
    part = spread_images(samples, flags.limit)
    if part and moe.n_experts > 1 and all(router.causal for router in routers):
        result["forced_routing"] = answers(predictor, part, flags.seed)
    else:
        reason = "  not done: a router that looks ahead cannot answer, one expert has no other"
        result["forced_routing"] = print(reason if part else NO_LABELS)
    return result


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(RouterConfig, argv, "python -m lab.router")
    at_least(flags, limit=1, router_images=20, batch_size=1, max_missing=0)
    if flags.json:
        check_writable(Path(flags.json))
    device, dtype = choose_device(flags.device, flags.dtype)
    model, text, meta = load_model(Path(flags.checkpoint), device, dtype)
    if model.config.moe is None:
        raise UserError(f"{flags.checkpoint}: is dense, it has no router")
    known, limit = how_read(meta["flags"], Path(flags.checkpoint)), flags.limit
    flags, samples = load_questions(replace(flags, limit=None), known)  # the limit is of images
    flags, samples = replace(flags, limit=limit), [s for s in samples if s.image is not None]
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: no images in its {flags.split} split")
    predictor = Predictor(model, text, device, dtype, flags.batch_size or 64)
    command = shlex.join(["python", "-m", "lab.router", *(sys.argv[1:] if argv is None else argv)])
    result = report(predictor, flags, samples) | {
        "checkpoint": flags.checkpoint, "data": list(flags.data), "split": flags.split,
        "seed": flags.seed, "broken": flags.break_router, "device": str(device),
        "dtype": str(dtype), "command": command,
    }  # fmt: skip
    if flags.json:
        write_json(Path(flags.json), clean(Path(flags.json), result))
    return result


if __name__ == "__main__":
    main()
