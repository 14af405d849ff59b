"""Score a checkpoint on held-out questions: python eval.py runs/tiny/phase3

Question -> prompt -> generated answer -> right or wrong -> counts, with 95 % intervals. It also
reports leaks from training, the scores by modality and kind of question and under the released
protocols, the router's accuracy, the load of the experts, and the parameters. --blind answers all
again with every image replaced by the mean image: what is left is guessing. --predictions and
--compare score existing answers (scoring/compare.py).

Shapes: B batch, T positions, S image side, L sparse layers, E experts, C options.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import ops
from checkpoint import load_model, read_seen
from config import Common, TrainConfig, UserError, argument, flag, warn_once
from data import Batch, Encoded, Packed, Sample, Text, collate, encode_all, encode_prompt
from engine import cli
from engine.experts import facts_by_expert, show_facts, show_information
from engine.inference import option_likelihoods
from engine.processes import ALONE, Processes, join_processes
from engine.routes import RouteRecorder
from metrics import HEADER, expert_names, format_confusion, majority, question_ids, show, split_by
from model import (
    Generated,
    MedMoE,
    autocast,
    choose_device,
    count_parameters,
    generate,
    sparse_layers,
)
from scoring import leaks
from scoring.classify import judge_classes, show_classes
from scoring.compare import compare, read_answers, show_comparison, show_protocols, under_all
from scoring.router import expert_load, judge_router, show_load
from sources.images import Images
from sources.load import READING, has_splits, how_read, load_samples, reading
from sources.records import read_json
from vision import normalise

SEVEN_B = 7_000_000_000  # parameters of LLaVA-Med, which the paper compares with


@dataclass(frozen=True)
class EvalConfig(Common):
    """Score a checkpoint, or a file of answers, on held-out questions."""

    lacks = ("seed",)
    checkpoint: str | None = argument("DIR of a finished phase", optional=True)
    predictions: str | None = flag(None, 'score this JSONL of {"question_id", "text"} instead')
    compare: tuple[str, str] | None = flag(None, "two files of answers: JSONL, or --json's")
    answers: str | None = flag(None, "write the answers to this FILE.jsonl")
    split: Literal["test", "val", "train"] = flag("test", "which questions")
    blind: bool = flag(False, "controls: the mean image for every image; wrong experts")
    limit: int | None = flag(None, "only the first N questions", least=1)
    max_new: int = flag(48, "longest answer, in tokens", least=1)
    router: str | None = flag(None, "replace the router: a name or FILE.py:Class")
    router_level: Literal["trained", "token", "sequence", "once"] = flag("trained", "replaces it")
    record_routes: str | None = flag(None, "write every routing to this FILE.safetensors")
    replay_routes: str | None = flag(None, "use the routings of this FILE instead of the router")


class Prediction(NamedTuple):
    answer: str
    votes: Tensor  # (E,) router logits, mean over the prompt, sum over sparse layers; (0,) if dense
    load: Tensor  # (L, E) tokens of the prompt and the answer routed to each expert


def unpack(steps: list[Generated], mask: Tensor, text: Text) -> list[Prediction]:
    """What generate() gave for a batch, and its prompts' mask (B, T) -> a Prediction each."""
    tokens = torch.stack([step.tokens for step in steps], dim=1)  # (B, steps)
    alive = (tokens != text.eos_id).cumprod(dim=1).bool()  # (B, steps) part of the answer
    rows = zip(tokens, alive, strict=True)
    answers = [text.decode(row[keep].tolist()).strip() for row, keep in rows]
    if not steps[0].routings:
        return [Prediction(answer, torch.zeros(0), torch.zeros(0, 0)) for answer in answers]
    real = mask[:, None, :, None]  # (B, 1, T, 1)
    logits = torch.stack([r.logits for r in steps[0].routings], dim=1)  # (B, L, T, E)
    gates = torch.stack([r.gates for r in steps[0].routings], dim=1)
    votes = (logits * real).sum(dim=(1, 2)) / real.sum(dim=(1, 2))  # (B, E), times L: same argmax
    load = ((gates != 0) & real).sum(dim=2)  # (B, L, E)
    for i, step in enumerate(steps[1:]):  # its routings are of the token of the step before
        gates = torch.stack([r.gates for r in step.routings], dim=1)[:, :, 0]  # (B, L, E)
        load += (gates != 0) & alive[:, i, None, None]
    return [Prediction(*row) for row in zip(answers, votes.cpu(), load.cpu(), strict=True)]


class Predictor:
    """A loaded model that answers questions in batches."""

    def __init__(
        self, model: MedMoE, text: Text, device: torch.device, dtype: torch.dtype,
        batch_size: int = 64, max_new: int = 48, processes: Processes = ALONE,
    ):  # fmt: skip
        self.model, self.text, self.device, self.dtype = model, text, device, dtype
        self.batch_size, self.max_new, self.processes = batch_size, max_new, processes
        self.images = Images(model.config.vision.image_size, pad=True, workers=2)

    def encode(self, sample: Sample) -> Encoded:
        question = "" if sample.fault else sample.turns[0][0]
        return encode_prompt(question, sample.image is not None, self.text, self.model.config)

    def batches(
        self, samples: Sequence[Sample], title: str, image: Tensor | None = None
    ) -> Iterator[tuple[list[int], Batch]]:
        """Prompts of similar lengths, with their rows. image (3, S, S) replaces every sample's.

        Of several processes, each gets its share of the batches.
        """
        encoded = [self.encode(s) for s in samples]
        order = sorted(range(len(samples)), key=lambda i: len(encoded[i][0]))
        groups = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
        groups = self.processes.share(groups)
        bar = tqdm(groups, desc=title, mininterval=1, disable=not self.processes.is_first)
        for rows, later in zip(bar, [*groups, []][1:], strict=True):  # there may be no batch
            self.images.prefetch(samples[i] for i in later)
            batch = collate([samples[i] for i in rows], [encoded[i] for i in rows], self.images,
                            self.text.eos_id, side="left")  # fmt: skip
            if image is not None:
                batch = batch._replace(images=image.expand_as(batch.images))
            yield rows, batch.to(self.device)

    def answer(
        self, samples: Sequence[Sample], image: Tensor | None = None,
        recorder: RouteRecorder | None = None,
    ) -> list[Prediction]:  # fmt: skip
        """Greedy answers to each sample's first question. recorder: records or replays routes."""
        found: dict[int, Prediction] = {}
        for rows, batch in self.batches(samples, "answers", image):
            replayed = recorder.replay(self.model, rows, batch) if recorder else nullcontext()
            with replayed, autocast(self.device, self.dtype):
                steps = list(generate(self.model, batch, self.text.eos_id, self.max_new))
            if recorder:
                recorder.record(steps, rows, batch, self.text.eos_id)
            found |= dict(zip(rows, unpack(steps, batch.mask, self.text), strict=True))
        found = self.processes.join(found)
        return [found[i]._replace(answer="") if s.fault else found[i]
                for i, s in enumerate(samples)]  # fmt: skip

    def choose(self, samples: Sequence[Sample]) -> Tensor:
        """Probability of each of the options, which are the same for all samples, (n, C)."""
        text = self.text
        options = [[*text.encode(f" {name}"), text.eos_id] for name in samples[0].options]
        found: dict[int, Tensor] = {}
        for rows, batch in self.batches(samples, "options"):
            with autocast(self.device, self.dtype):
                scores = option_likelihoods(self.model, batch, options)
            found |= dict(zip(rows, scores.softmax(dim=-1).cpu(), strict=True))
        found = self.processes.join(found)
        return torch.stack([found[i] for i in range(len(samples))])

    def mean_image(self, samples: Sequence[Sample]) -> Tensor:
        """(3, S, S) CLIP-normalised mean of the samples' different images."""
        unique = {s.image: s for s in samples if s.image is not None}
        total = torch.zeros(3, self.images.size, self.images.size, dtype=torch.float64)
        for s in unique.values():
            total += self.images.get(s)
        mean = (total / max(1, len(unique))).round().to(torch.uint8)
        return normalise(mean[None])[0]


def load_questions(flags: Any, known: dict) -> tuple[Any, list[Sample]]:
    """The questions to answer. Without --data they are those of `known`, read with its flags.

    flags: a Common with `split` and `limit`, returned with the values taken from `known`
    known: the flags about data of a checkpoint or a result (sources.load.how_read), or {}
    """
    if flags.data:  # other data, with DICOM shown as in training
        known = {name: known[name] for name in ("window", "frame") if name in known}
    else:
        data = tuple(spec for spec in known.get("data", ()) if has_splits(spec))
        if not data:
            raise UserError("--data SOURCE is needed: no checkpoint or result names the questions")
        known = known | {"data": data}
    default = type(flags)  # a dataclass: its attributes are the defaults
    stored = {n: v for n, v in known.items() if getattr(flags, n) == getattr(default, n)}
    flags = replace(flags, **stored)  # flags that were given win
    samples = load_samples(flags.data, "vqa", flags.split, **reading(flags))[: flags.limit]
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: no questions in its {flags.split} split")
    question_ids(samples)  # raises for doubles before any work
    return flags, samples


def show_parameters(p: dict) -> str:
    total, activated, base = p["total"], p["activated"], p["dense_base"]
    return (
        f"parameters: {total:,} in all, {activated:,} activated per token (--top-k experts) = "
        f"{activated / total:.1%} of its own total, {activated / base:.1%} of the dense model it "
        f"was made from ({base:,}), {activated / SEVEN_B:.2%} of 7 B"
    )


def training_questions(flags: EvalConfig, trained: Sequence[str]) -> list[Sample]:
    """For the majority baseline: the train split of --data, or the checkpoint's training data."""
    specs = flags.data if all(has_splits(spec) for spec in flags.data) else trained
    try:
        how = reading(replace(flags, router_labels=None))
        return load_samples(specs, "vqa", "train", **how, open_images=False)
    except UserError as error:
        warn_once(f"no majority baseline: {error}")
        return []


def check_leaks(samples: list[Sample], checkpoint: Path | None) -> dict:
    """Were these questions or their images in the checkpoint's training data? Prints a report."""
    report: dict[str, Any] = {"fingerprint": leaks.fingerprint(samples)}
    print(f"split {report['fingerprint']}, {len(samples)} questions")
    if checkpoint is None:
        print("leaks: not checked, the training data of these answers are unknown")
        return report
    seen = read_seen(checkpoint)
    if seen is None:  # as of a converted checkpoint
        print(f"leaks: not checked, {checkpoint} has no record of its training data")
        return report
    report = leaks.check(samples, seen)
    print(leaks.show(report))
    return report


def report_scores(samples: list[Sample], answers: list[str], flags: EvalConfig) -> dict:
    """Print the tables of one set of answers; return their part of --json."""
    result = {
        **{name: getattr(flags, name) for name in READING}, "n": len(samples),
        "protocols": under_all(samples, answers),
        "by_modality": split_by(samples, answers, lambda s: s.modality or "unknown"),
        "by_kind": split_by(samples, answers, lambda s: f"{s.kind} ({s.answer_type})"),
        "by_wording": split_by(samples, answers, lambda s: f"{s.wording or 'all'} wordings"),
        "answers": dict(zip(question_ids(samples), answers, strict=True)),
    }  # fmt: skip
    print(HEADER)
    print(show("all", result["protocols"]["strict"]))
    wordings = result["by_wording"] if len(result["by_wording"]) > 1 else {}
    for name, part in (result["by_modality"] | result["by_kind"] | wordings).items():
        print(show(name, part))
    print(show_protocols(result["protocols"]))
    return result


def show_examples(samples: Sequence[Sample], answers: Sequence[str], flags: EvalConfig) -> None:
    """Three questions about different images, and the command that asks the last one again."""
    pairs = sorted(zip(samples, answers, strict=True), key=lambda pair: len(pair[0].turns[0][1]))
    longest = {s.image: (s, answer) for s, answer in pairs}  # each image's longest truth
    for s, answer in reversed([*longest.values()][:: max(1, len(longest) // 3)][:3]):
        image = f"phantom:{s.image}" if isinstance(s.image, int) else s.image or "none"
        (question, truth), *_ = s.turns
        name = leaks.name_of(image) if isinstance(image, Packed) else image
        print(f"{name}: {question}\n  answer: {answer}\n  truth:  {truth}")
    command = ["python", "chat.py", str(flags.checkpoint), "--image", str(image)]
    command += ["--router", flags.router] if flags.router else []
    if not isinstance(image, Packed):  # chat.py opens files
        print(f"try it: {shlex.join([*command, '--question', question])}")


def classification(predictor: Predictor, samples: list[Sample], answers: list[str]) -> dict:
    """Set -> accuracy and AUC, for the questions that have options."""
    found = {}
    for name in dict.fromkeys(s.source for s in samples if s.options):
        rows = [i for i, s in enumerate(samples) if s.source == name]
        part = [samples[i] for i in rows]
        likely = predictor.choose(part).double().numpy()
        if judged := judge_classes(part, [answers[i] for i in rows], likely):
            found[name] = judged
            print(show_classes(name, judged))
    return found


def report(predictor: Predictor, samples: list[Sample], flags: EvalConfig, info: dict) -> dict:
    """Answer everything, with --blind twice; print the tables, return the values for --json."""
    model, train = predictor.model, training_questions(flags, info["flags"]["data"])
    recorder = None
    if flags.replay_routes or flags.record_routes:
        ids = question_ids(samples)
        recorder = RouteRecorder(model, ids, flags.replay_routes, flags.record_routes)
    found = predictor.answer(samples, recorder=recorder)
    if recorder:
        recorder.save()
    answers = [p.answer for p in found]
    result = report_scores(samples, answers, flags) | {
        "checkpoint": flags.checkpoint, "preset": info["flags"]["preset"], "phase": info["phase"],
        "seed": info["flags"]["seed"],
        "device": str(predictor.device), "dtype": str(predictor.dtype),
        "trained_with": f"converted from {info['from']}" if "from" in info
                        else cli.command_line(TrainConfig, info["flags"], "train.py"),
        "params": count_parameters(model),
    }  # fmt: skip
    result["classification"] = classification(predictor, samples, answers)
    blind = []
    if flags.blind:
        blind = [p.answer for p in predictor.answer(samples, predictor.mean_image(samples))]
        result["blind"] = {"protocols": under_all(samples, blind)}
        print(show("blind control", result["blind"]["protocols"]["strict"]))
    if train:
        result["majority"] = {"protocols": under_all(samples, majority(samples, train))}
        print(show("majority baseline", result["majority"]["protocols"]["strict"]))
    if model.config.moe is not None:
        result["router"] = judge_router(samples, found)
        result["load"] = expert_load(samples, found)
        moe = model.config.moe
        if result["router"]["n"] and moe.router in ("modality", "oracle"):  # trained to find it
            print(f"router: finds the modality of {result['router']['accuracy']:.1%} of "
                  f"{result['router']['n']} images")  # fmt: skip
            print(format_confusion(result["router"]))
        names = expert_names(moe.n_experts, moe.router)
        print(show_load(result["load"], names, sparse_layers(model.config, moe)))
        if bits := info.get("information"):
            print(show_information(bits))
            result["information"] = bits
    result["facts"] = facts_by_expert(predictor, samples, answers, blind)
    if facts := result["facts"]:
        print(show_facts(facts, info["flags"]))
    print(show_parameters(result["params"]))
    show_examples(samples, answers, flags)
    return result


def evaluate_checkpoint(flags: EvalConfig, processes: Processes) -> dict:
    device, dtype = choose_device(flags.device, flags.dtype)
    ops.choose(flags.kernels, device)
    path = Path(flags.checkpoint)
    model, text, info = load_model(path, device, dtype, flags.router, flags.router_level)
    known = how_read(info["flags"], path)
    flags, samples = load_questions(flags, known)
    print(f"{path} on {' '.join(flags.data)} {flags.split}")
    leaked = check_leaks(samples, path)
    predictor = Predictor(
        model, text, device, dtype, flags.batch_size or 64, flags.max_new, processes
    )
    fits = encode_all(samples, predictor.encode, flags.max_bad, "counts them as wrong")
    samples = [s if row in fits else replace(s, image=None, fault="too long")
               for row, s in enumerate(samples)]  # fmt: skip
    return {"leaks": leaked} | report(predictor, samples, flags, info)


def evaluate_predictions(flags: EvalConfig) -> dict:
    flags, samples = load_questions(flags, {})
    (answers,) = read_answers([flags.predictions], samples)
    print(f"{flags.predictions} on {' '.join(flags.data)} {flags.split}")
    leaked = check_leaks(samples, None)
    return {"leaks": leaked} | report_scores(samples, answers, flags)


def compare_answers(flags: EvalConfig) -> dict:
    first, second = flags.compare
    is_result = first.endswith(".json") and not flags.data
    known = how_read(read_json(Path(first)), Path(first)) if is_result else {}
    flags, samples = load_questions(flags, known)
    found = compare(samples, *read_answers(flags.compare, samples))
    print(f"{first} and {second} on {' '.join(flags.data)} {flags.split}")
    print(show_comparison(found))
    return {"compared": list(flags.compare), "data": list(flags.data)} | found


@cli.user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = cli.parse(EvalConfig, argv, "eval.py")
    if [flags.checkpoint, flags.predictions, flags.compare].count(None) != 2:
        raise UserError("eval.py takes one of: a checkpoint DIR, --predictions FILE, --compare A B")
    if not flags.checkpoint:
        for name in ("answers", "blind", "max_new", "router", "router_level", "record_routes",
                     "replay_routes"):  # fmt: skip
            if getattr(flags, name) != getattr(EvalConfig, name):
                raise UserError(f"--{name.replace('_', '-')}: only for a checkpoint")
    read = flags.predictions, flags.replay_routes, *(flags.compare or ())
    cli.check_outputs((flags.json, flags.answers, flags.record_routes), read)
    if flags.compare:
        result = compare_answers(flags)
    elif flags.predictions:
        result = evaluate_predictions(flags)
    else:
        processes = join_processes(flags.device)
        result = evaluate_checkpoint(flags, processes)
        processes.end()
        if not processes.is_first:  # each has all answers; the first writes them
            return result
    argv = sys.argv[1:] if argv is None else argv
    result["command"] = shlex.join(["python", "eval.py", *argv])
    if flags.answers:
        rows = ({"question_id": q, "text": a} for q, a in result.get("answers", {}).items())
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        cli.write_text(Path(flags.answers), lines, "--answers")
    if flags.json:
        cli.write_json(Path(flags.json), result)
    return result


if __name__ == "__main__":
    main()
