"""Score a checkpoint on held-out questions: python eval.py runs/tiny/phase3

Closed questions get an accuracy, open ones the recall of the true answer's words, both with 95 %
intervals; then the same by modality and by kind of question; whether the router names the
modality; which experts each modality visits; how many parameters all of it takes. --blind asks
everything again with every image replaced by their mean: what is left is guessing.

Shapes: B batch, T positions, S image side, L sparse layers, E experts.
"""

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import load_model
from config import IGNORE, MODALITIES, UserError
from data import Images, Text, collate, encode_prompt
from flags import Common, argument, flag, parse, user_errors, write_json
from metrics import bootstrap, format_confusion, is_exact, is_right, recall, router_report, wilson
from model import MedMoE, Step, choose_device, count_parameters, generate, precision, sparse_layers
from sources import Sample, load_samples
from vision import normalise

SEVEN_B = 7_000_000_000  # the model whose cost the paper compares with, LLaVA-Med


@dataclass(frozen=True)
class EvalConfig(Common):
    """Score a checkpoint on held-out questions."""

    checkpoint: str = argument("DIR of a finished phase")
    split: Literal["test", "val", "train"] = flag("test", "which questions")
    blind: bool = flag(False, "ask again with every image replaced by the mean image")
    limit: int | None = flag(None, "only the first N questions")
    max_new: int = flag(48, "longest answer, in tokens")
    router_level: Literal["trained", "token", "sequence"] = flag(
        "trained", "decide as trained, or so"
    )


class Prediction(NamedTuple):
    answer: str
    votes: Tensor  # (E,) router logits, mean over prompt and sparse layers; (0,) if dense
    load: Tensor  # (L, E) visits of the prompt's and the answer's positions to each expert


def unpack(steps: list[Step], mask: Tensor, text: Text) -> list[Prediction]:
    """What generate() yielded for a batch, and its prompts' mask (B, T) -> one Prediction each."""
    tokens = torch.stack([step.tokens for step in steps], dim=1)  # (B, steps)
    alive = (tokens != text.eos_id).cumprod(dim=1).bool()  # (B, steps) part of the answer
    answers = [
        text.decode(row[keep].tolist()).strip() for row, keep in zip(tokens, alive, strict=True)
    ]
    if not steps[0].routings:
        return [Prediction(answer, torch.zeros(0), torch.zeros(0, 0)) for answer in answers]
    real = mask[:, None, :, None]  # (B, 1, T, 1)
    logits = torch.stack([r.logits for r in steps[0].routings], dim=1)  # (B, L, T, E)
    gates = torch.stack([r.gates for r in steps[0].routings], dim=1)
    votes = (logits * real).sum(dim=(1, 2)) / real.sum(dim=(1, 2))  # (B, E), times L: same argmax
    load = ((gates != 0) & real).sum(dim=2)  # (B, L, E)
    for i, step in enumerate(steps[1:]):  # its routings are of the token said in the step before
        gates = torch.stack([r.gates for r in step.routings], dim=1)[:, :, 0]  # (B, L, E)
        load += (gates != 0) & alive[:, i, None, None]
    return [Prediction(*row) for row in zip(answers, votes.cpu(), load.cpu(), strict=True)]


class Asker:
    """A loaded model, and what it takes to put questions to it."""

    def __init__(self, model: MedMoE, text: Text, flags: EvalConfig):
        self.model, self.text, self.flags = model, text, flags
        self.device, self.dtype = choose_device(flags.device, flags.dtype)
        self.images = Images(model.config.vision.image_size, pad=True)
        self.batch_size = flags.batch_size or 64

    def answer(self, samples: Sequence[Sample], picture: Tensor | None = None) -> list[Prediction]:
        """Greedy answers to the first questions. picture (3, S, S): shown to all of them."""
        config, text = self.model.config, self.text
        n_patches, system = config.vision.n_patches, config.system
        prompts = [
            encode_prompt(s.turns[0][0], s.image is not None, text, n_patches, system)
            for s in samples
        ]
        order = sorted(range(len(samples)), key=lambda i: len(prompts[i]))  # little padding
        found: dict[int, Prediction] = {}
        for start in tqdm(range(0, len(order), self.batch_size), desc="answering", file=sys.stderr):
            rows = order[start : start + self.batch_size]
            encoded = [(prompts[r], [IGNORE] * len(prompts[r])) for r in rows]
            chosen = [samples[r] for r in rows]
            batch = collate(chosen, encoded, self.images, text.eos_id, side="left")
            if picture is not None:
                batch = batch._replace(images=picture.expand_as(batch.images))
            batch = batch.to(self.device)
            with precision(self.device, self.dtype):
                steps = list(generate(self.model, batch, text.eos_id, self.flags.max_new))
            found |= dict(zip(rows, unpack(steps, batch.mask, text), strict=True))
        return [found[i] for i in range(len(samples))]

    def mean_picture(self, samples: Sequence[Sample]) -> Tensor:
        """(3, S, S) CLIP-normalised mean of the samples' different images."""
        unique = {s.image: s for s in samples if s.image is not None}
        total = sum(self.images.get(s).double() for s in unique.values())
        mean = (total / max(1, len(unique))).round().to(torch.uint8)
        return normalise(mean[None])[0]


def score(samples: Sequence[Sample], answers: Sequence[str]) -> dict:
    """Closed accuracy, open recall, both together, and exact answers, with intervals and counts."""
    closed = [(s, a) for s, a in zip(samples, answers, strict=True) if s.answer_type == "closed"]
    opened = [(s, a) for s, a in zip(samples, answers, strict=True) if s.answer_type != "closed"]
    right = [float(is_right(a, s.turns[0][1])) for s, a in closed]
    recalls = [recall(a, s.turns[0][1]) for s, a in opened]
    exact = [float(is_exact(a, s.turns[0][1])) for s, a in opened]
    images = [[str(s.image) for s, _ in part] for part in (closed, opened)]
    both, every = right + recalls, right + exact
    groups = images[0] + images[1]
    return {
        "n": len(samples),
        "overall": mean(both),
        "overall_ci95": bootstrap(both, groups),
        "accuracy": mean(every),  # open answers count only when exact: as classifiers report it
        "accuracy_ci95": bootstrap(every, groups),
        "closed": {
            "n": len(right),
            "accuracy": mean(right),
            "ci95": wilson(int(sum(right)), len(right)),
        },
        "open": {
            "n": len(recalls),
            "recall": mean(recalls),
            "ci95": bootstrap(recalls, images[1]),
            "exact": mean(exact),
        },
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def majority(samples: Sequence[Sample], train: Sequence[Sample]) -> list[str]:
    """A control that sees neither image nor question: the kind's commonest training answer."""
    counts: dict[tuple, Counter] = defaultdict(Counter)
    for s in train:
        for key in ((s.kind, s.answer_type), (s.answer_type,)):
            counts[key][s.turns[0][1]] += 1
    best = {key: found.most_common(1)[0][0] for key, found in counts.items()}
    return [best.get((s.kind, s.answer_type)) or best.get((s.answer_type,), "") for s in samples]


def split_by(samples: Sequence[Sample], answers: list[str], key: Callable[[Sample], str]) -> dict:
    groups: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        groups[key(s)].append(i)
    return {
        name: score([samples[i] for i in rows], [answers[i] for i in rows])
        for name, rows in sorted(groups.items())
    }


def judge_router(samples: Sequence[Sample], found: Sequence[Prediction]) -> dict:
    """Does the likeliest expert, over an image's prompts and layers, carry the image's modality?"""
    votes: dict = {}
    for s, p in zip(samples, found, strict=True):
        if s.modality and s.image is not None and len(p.votes):
            votes[s.image] = (s.modality, votes.get(s.image, (None, 0))[1] + p.votes)
    n_experts = len(found[0].votes)
    truth = [MODALITIES.index(name) % max(1, n_experts) for name, _ in votes.values()]
    said = [int(vote.argmax()) for _, vote in votes.values()]
    names = [*MODALITIES, *(f"expert {e}" for e in range(len(MODALITIES), n_experts))]
    return router_report(truth, said, names[:n_experts] if n_experts else names)


def expert_load(samples: Sequence[Sample], found: Sequence[Prediction]) -> dict[str, list]:
    """Modality -> (L, E) share of the layer's visits that go to each expert."""
    total: dict[str, Tensor] = {}
    for s, p in zip(samples, found, strict=True):
        name = s.modality or "unknown"
        total[name] = total.get(name, 0) + p.load.double()
    return {name: (t / t.sum(1, keepdim=True)).tolist() for name, t in sorted(total.items())}


def show(name: str, s: dict) -> str:
    """One line of the table of scores."""

    def part(value: float, low: float, high: float, n: int) -> str:
        cell = f"{value:6.1%} [{low:.1%}, {high:.1%}] {n:>5}" if n else "-"
        return f"{cell:<30}"

    closed, opened = s["closed"], s["open"]
    cells = part(closed["accuracy"], *closed["ci95"], closed["n"])
    cells += part(opened["recall"], *opened["ci95"], opened["n"])
    return (
        f"  {name:<22}{cells}{part(s['overall'], *s['overall_ci95'], s['n'])}{s['accuracy']:6.1%}"
    )


def show_load(load: dict[str, list], n_experts: int, blocks: Sequence[int]) -> str:
    """Expert load per sparse block and modality, in percent of the visits."""
    lines = [" " * 26 + "".join(f"expert {e}".rjust(10) for e in range(n_experts))]
    for layer, block in enumerate(blocks):
        for name, table in load.items():
            cells = "".join(f"{share:10.1%}" for share in table[layer])
            lines.append(f"  block {block:<4}{name:<14}{cells}")
    return "\n".join(lines)


def show_parameters(p: dict) -> str:
    share = p["activated"] / p["total"], p["activated"] / p["dense_base"], p["activated"] / SEVEN_B
    return (
        f"parameters: {p['total']:,} in all, {p['activated']:,} activated a token = "
        f"{share[0]:.1%} of its own total, {share[1]:.1%} of the dense model it was made from "
        f"({p['dense_base']:,}), {share[2]:.2%} of 7 B"
    )


def load_questions(flags: EvalConfig, meta: dict) -> tuple[EvalConfig, list[Sample], list[Sample]]:
    """The questions to ask and those of the training split; --data as in training by default."""
    trained = meta.get("flags", {})
    if not flags.data:
        flags = replace(flags, data=tuple(trained["data"]), lang=trained["lang"])
    samples = load_samples(flags.data, "vqa", flags.split, flags.lang)
    samples = samples[: flags.limit]
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: no questions in its {flags.split} split")
    return flags, samples, load_samples(flags.data, "vqa", "train", flags.lang)


def report(asker: Asker, samples: list[Sample], train: list[Sample], meta: dict) -> dict:
    """Ask everything once, or twice with --blind; print the tables, return what --json writes."""
    model, flags = asker.model, asker.flags
    found = asker.answer(samples)
    answers = [p.answer for p in found]
    result = score(samples, answers) | {
        "checkpoint": flags.checkpoint, "data": list(flags.data), "split": flags.split,
        "device": str(asker.device), "dtype": str(asker.dtype), "seed": meta["flags"]["seed"],
        "by_modality": split_by(samples, answers, lambda s: s.modality or "unknown"),
        "by_kind": split_by(samples, answers, lambda s: f"{s.kind} ({s.answer_type})"),
        "params": count_parameters(model),
    }  # fmt: skip
    print(f"{len(samples)} questions, {' '.join(flags.data)} {flags.split}, {flags.checkpoint}")
    print(" " * 24 + "closed accuracy, 95 %, n".ljust(30) + "open recall, 95 %, n".ljust(30)
          + "together, 95 %, n".ljust(30) + " exact")  # fmt: skip
    print(show("all", result))
    for name, part in (result["by_modality"] | result["by_kind"]).items():
        print(show(name, part))
    if flags.blind:
        blind = [p.answer for p in asker.answer(samples, asker.mean_picture(samples))]
        result["blind"] = score(samples, blind)
        print(show("blind control", result["blind"]))
    result["majority"] = score(samples, majority(samples, train))
    print(show("majority answer", result["majority"]))
    if model.config.moe is not None:
        result["router"] = judge_router(samples, found)
        result["load"] = expert_load(samples, found)
        print(f"router: names the modality of {result['router']['accuracy']:.1%} of "
              f"{result['router']['n']} images")  # fmt: skip
        print(format_confusion(result["router"]))
        blocks = sparse_layers(model.config, model.config.moe)
        print(show_load(result["load"], model.config.moe.n_experts, blocks))
    print(show_parameters(result["params"]))
    return result


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(EvalConfig, argv, "eval.py")
    device, dtype = choose_device(flags.device, flags.dtype)
    model, text, meta = load_model(Path(flags.checkpoint), device, dtype)
    if flags.router_level != "trained":
        for block in model.decoder.blocks:
            if block.is_sparse:
                block.mlp.router.level = flags.router_level
    flags, samples, train = load_questions(flags, meta)
    result = report(Asker(model, text, flags), samples, train, meta)
    if flags.json:
        write_json(Path(flags.json), result)
    return result


if __name__ == "__main__":
    main()
