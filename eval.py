"""Score a checkpoint on held-out questions: python eval.py runs/tiny/phase3

First whether the questions or their images were in training; then the scores, under the released
protocols too, by modality and by kind of question; whether the router names the modality; which
experts each modality visits; how many parameters all of it takes. --blind asks everything again
with every image replaced by their mean: what is left is guessing. Without a checkpoint:

    python eval.py --predictions FILE.jsonl --data SOURCE    scores anyone's answers
    python eval.py --compare A B --data SOURCE               two sets of answers, paired

"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import kernels
from asking import Asker, expert_load, judge_router, load_questions, show_load
from benchmarks import leaks
from checkpoint import load_model, read_seen
from classify import judge_classes, show_classes
from config import UserError
from engine.processes import Processes, start
from flags import (
    READING,
    Common,
    TrainConfig,
    argument,
    at_least,
    check_writable,
    command_line,
    flag,
    how_read,
    parse,
    reading,
    user_errors,
    write_json,
    write_lines,
)
from metrics import format_confusion
from model import choose_device, count_parameters, sparse_layers
from records import Sample, read_json_file, warn_once
from scoring import (
    HEADER,
    compare,
    majority,
    question_ids,
    read_predictions,
    show,
    show_comparison,
    show_protocols,
    split_by,
    under_all,
)
from sources import has_splits, load_samples

SEVEN_B = 7_000_000_000  # the model whose cost the paper compares with, LLaVA-Med


@dataclass(frozen=True)
class EvalConfig(Common):
    """Score a checkpoint, or a file of answers, on held-out questions."""

    checkpoint: str | None = argument("DIR of a finished phase", optional=True)
    predictions: str | None = flag(None, 'score this JSONL of {"question_id", "text"} instead')
    compare: tuple[str, str] | None = flag(None, "two files of answers: JSONL, or --json's")
    answers: str | None = flag(None, "write the answers to this FILE.jsonl")
    split: Literal["test", "val", "train"] = flag("test", "which questions")
    blind: bool = flag(False, "ask again with every image replaced by the mean image")
    limit: int | None = flag(None, "only the first N questions")
    max_new: int = flag(48, "longest answer, in tokens")
    router: str | None = flag(None, "decide by this one: a name or FILE.py:Class")
    router_level: Literal["trained", "token", "sequence"] = flag("trained", "or decide so")
    record_routes: str | None = flag(None, "write who visited whom to this FILE.safetensors")
    replay_routes: str | None = flag(None, "do not decide: take the routes of this FILE")


def show_parameters(p: dict) -> str:
    share = p["activated"] / p["total"], p["activated"] / p["dense_base"], p["activated"] / SEVEN_B
    return (
        f"parameters: {p['total']:,} in all, {p['activated']:,} activated a token = "
        f"{share[0]:.1%} of its own total, {share[1]:.1%} of the dense model it was made from "
        f"({p['dense_base']:,}), {share[2]:.2%} of 7 B"
    )


def training_questions(flags: EvalConfig, trained: Sequence[str]) -> list[Sample]:
    """For the majority control: the train split of --data, or what the checkpoint learnt from."""
    specs = flags.data if all(has_splits(spec) for spec in flags.data) else trained
    try:
        return load_samples(specs, "vqa", "train", **reading(replace(flags, router_labels=None)))
    except UserError as error:
        warn_once(f"no majority control: {error}")
        return []


def check_leaks(samples: list[Sample], checkpoint: Path | None, known: dict) -> dict:
    """Are these questions or their images in what the checkpoint says it was trained on?"""
    report: dict[str, Any] = {"fingerprint": leaks.fingerprint(samples)}
    print(f"split {report['fingerprint']}, {len(samples)} questions")
    if checkpoint is None:
        print("leaks: not checked, nothing says what these answers were trained on")
        return report
    seen = read_seen(checkpoint)
    if seen is None:  # an older or converted checkpoint: look at the files it names, if any
        specs = known.get("data", ())
        try:
            seen = leaks.seen_by(load_samples(specs, "vqa", "train", known.get("lang", "en")))
        except UserError:
            specs = ()
        if not specs:
            print(f"leaks: not checked, {checkpoint} does not say what it was trained on")
            return report
        print(f"leaks: compared with {' '.join(specs)}, {checkpoint} has no record of its own")
    report = leaks.check(samples, seen)
    print(leaks.show(report))
    return report


def report_scores(samples: list[Sample], answers: list[str], flags: EvalConfig) -> dict:
    """Print the tables of one set of answers; return what --json writes of them."""
    result = {
        **{name: getattr(flags, name) for name in READING}, "n": len(samples),
        "protocols": under_all(samples, answers),
        "by_modality": split_by(samples, answers, lambda s: s.modality or "unknown"),
        "by_kind": split_by(samples, answers, lambda s: f"{s.kind} ({s.answer_type})"),
        "answers": dict(zip(question_ids(samples), answers, strict=True)),
    }  # fmt: skip
    print(HEADER)
    print(show("all", result["protocols"]["strict"]))
    for name, part in (result["by_modality"] | result["by_kind"]).items():
        print(show(name, part))
    print(show_protocols(result["protocols"]))
    return result


def classification(asker: Asker, samples: list[Sample], answers: list[str]) -> dict[str, dict]:
    """Set -> accuracy and AUC, for the questions that have options."""
    found = {}
    for name in dict.fromkeys(s.source for s in samples if s.options):
        rows = [i for i, s in enumerate(samples) if s.source == name]
        part = [samples[i] for i in rows]
        likely = asker.choose(part).double().numpy()
        if judged := judge_classes(part, [answers[i] for i in rows], likely):
            found[name] = judged
            print(show_classes(name, judged))
    return found


def report(asker: Asker, samples: list[Sample], flags: EvalConfig, meta: dict) -> dict:
    """Ask everything once, or twice with --blind; print the tables, return what --json writes."""
    model, train = asker.model, training_questions(flags, meta["flags"]["data"])
    found = asker.on_routes(samples, flags.replay_routes, flags.record_routes)
    answers = [p.answer for p in found]
    result = report_scores(samples, answers, flags) | {
        "checkpoint": flags.checkpoint, "preset": meta["flags"]["preset"], "phase": meta["phase"],
        "seed": meta["flags"]["seed"], "device": str(asker.device), "dtype": str(asker.dtype),
        "trained_with": f"converted from {meta['from']}" if "from" in meta
                        else command_line(TrainConfig, meta["flags"], "train.py"),
        "params": count_parameters(model),
    }  # fmt: skip
    result["classification"] = classification(asker, samples, answers)
    if flags.blind:
        blind = [p.answer for p in asker.answer(samples, asker.mean_picture(samples))]
        result["blind"] = {"protocols": under_all(samples, blind)}
        print(show("blind control", result["blind"]["protocols"]["strict"]))
    if train:
        result["majority"] = {"protocols": under_all(samples, majority(samples, train))}
        print(show("majority answer", result["majority"]["protocols"]["strict"]))
    if model.config.moe is not None:
        result["router"] = judge_router(samples, found)
        result["load"] = expert_load(samples, found)
        print(f"router: names the modality of {result['router']['accuracy']:.1%} of "
              f"{result['router']['n']} images")  # fmt: skip
        if result["router"]["n"]:
            print(format_confusion(result["router"]))
        blocks = sparse_layers(model.config, model.config.moe)
        print(show_load(result["load"], model.config.moe.n_experts, blocks))
    print(show_parameters(result["params"]))
    return result


def evaluate_checkpoint(flags: EvalConfig, processes: Processes) -> dict:
    device, dtype = choose_device(flags.device, flags.dtype)
    kernels.choose(flags.kernels, device)
    asked = Path(flags.checkpoint), device, dtype, flags.router, flags.router_level
    model, text, meta = load_model(*asked)
    known = how_read(meta["flags"], Path(flags.checkpoint))
    flags, samples = load_questions(flags, known)
    print(f"{flags.checkpoint} on {' '.join(flags.data)} {flags.split}")
    leaked = check_leaks(samples, Path(flags.checkpoint), known)
    size = flags.batch_size or 64
    asker = Asker(model, text, device, dtype, size, flags.max_new, processes)
    return {"leaks": leaked} | report(asker, samples, flags, meta)


def read_answers(files: Sequence[str], samples: list[Sample]) -> list[list[str]]:
    """Raises UserError where a result of ours was of other questions, whatever its identifiers."""
    found = [read_predictions(Path(file), samples) for file in files]
    ours = leaks.fingerprint(samples)
    for file in files:
        result = read_json_file(Path(file)) if file.endswith(".json") else {}
        said = result["leaks"].get("fingerprint") if isinstance(result.get("leaks"), dict) else None
        if said not in (None, ours):
            raise UserError(f"{file}: answers to the split {said}, these questions are {ours}")
    return found


def evaluate_predictions(flags: EvalConfig) -> dict:
    flags, samples = load_questions(flags, {})
    (answers,) = read_answers([flags.predictions], samples)
    print(f"{flags.predictions} on {' '.join(flags.data)} {flags.split}")
    leaked = check_leaks(samples, None, {})
    return {"leaks": leaked} | report_scores(samples, answers, flags)


def compare_answers(flags: EvalConfig) -> dict:
    first, second = flags.compare
    is_result = first.endswith(".json") and not flags.data
    known = how_read(read_json_file(Path(first)), Path(first)) if is_result else {}
    flags, samples = load_questions(flags, known)
    found = compare(samples, *read_answers(flags.compare, samples))
    print(f"{first} and {second} on {' '.join(flags.data)} {flags.split}")
    print(show_comparison(found))
    return {"compared": list(flags.compare), "data": list(flags.data)} | found


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(EvalConfig, argv, "eval.py")
    given = {"DIR": flags.checkpoint, "--predictions": flags.predictions,
             "--compare": flags.compare}  # fmt: skip
    if sum(value is not None for value in given.values()) != 1:
        raise UserError("eval.py takes one of: a checkpoint DIR, --predictions FILE, --compare A B")
    at_least(flags, limit=1, max_new=1, batch_size=1, max_missing=0)
    if (flags.answers or flags.record_routes or flags.replay_routes) and not flags.checkpoint:
        raise UserError("--answers and routes: only a checkpoint gives new answers")
    written = [Path(f) for f in (flags.json, flags.answers, flags.record_routes) if f]
    inputs = flags.predictions, flags.replay_routes, *(flags.compare or ())
    read = [Path(file) for file in inputs if file]
    for file in written:
        check_writable(file)
    places = [file.absolute() for file in written + read]
    if any(places.count(file.absolute()) > 1 for file in written):
        raise UserError(f"{written[0]}: would be written over another file of this command")
    if flags.compare:
        result = compare_answers(flags)
    elif flags.predictions:
        result = evaluate_predictions(flags)
    else:
        processes = start(flags.device)
        result = evaluate_checkpoint(flags, processes)
        processes.end()
        if not processes.is_first:  # all know all answers; one is enough to write them
            return result
    argv = sys.argv[1:] if argv is None else argv
    result["command"] = shlex.join(["python", "eval.py", *argv])
    if flags.answers:
        lines = ({"question_id": q, "text": a} for q, a in result.get("answers", {}).items())
        write_lines(Path(flags.answers), lines)
    if flags.json:
        write_json(Path(flags.json), result)
    return result


if __name__ == "__main__":
    main()
