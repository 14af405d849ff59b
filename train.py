"""Train a Med-MoE: python train.py --phase 3 runs all three phases on the embedded pictures.

    1 alignment           captions       the projector learns to speak the decoder's language
    2 instruction tuning  dialogues      decoder and projector; then the router, on modalities
    3 MoE tuning          questions      every second FFN becomes experts + meta; those learn

A phase starts from the checkpoint of the phase before; one that is missing is made first.
"""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import leaks
from checkpoint import load_checkpoint, read_meta, read_seen
from config import (
    PHASES,
    RELEASED_EXTRA,
    ModelConfig,
    MoEConfig,
    UserError,
    named_layers,
    preset,
    to_dict,
)
from data import Dataset, Text
from engine import lora
from engine.features import check_cache, open_features
from engine.generators import seed_all
from engine.optim import cast_weights
from engine.parallel import shard
from engine.processes import ALONE, Processes, start
from engine.run import Run, claim, refuse_changed_flags, unfinished
from engine.step import train
from flags import TrainConfig, at_least, check_sparse, check_writable, parse, reading, user_errors
from model import (
    MedMoE,
    choose_device,
    compile_blocks,
    describe,
    freeze_all_but,
    make_router,
    make_sparse,
    sparse_layers,
)  # fmt: skip
from router_training import learn_router
from routers import get_router
from sources import has_splits, load_samples
from tensorfiles import open_tensors, read_json
from weights import load_published


def trained_patterns(flags: TrainConfig, number: int, config: ModelConfig) -> tuple[str, ...]:
    """Which parameters phase `number` trains, as patterns over their names."""
    trains = lora.TRAINS[number] if flags.lora_rank else PHASES[number].trains
    if number < 3:
        return trains + (("vision.*",) if flags.tune_vision else ())
    if config.moe is None:
        layers = sparse_layers(config, sparse_config(flags, config))
        return tuple(f"decoder.blocks.{i}.mlp.*" for i in layers)
    if not config.moe.meta:
        trains = tuple(pattern for pattern in trains if ".meta." not in pattern)
    if flags.trains == "released":
        trains += RELEASED_EXTRA[config.decoder.family]
    if not get_router(config.moe.router).frozen:
        trains += ("decoder.*.mlp.router.*",)
    return trains


def start_model(number: int, flags: TrainConfig, source: Path | None) -> tuple[MedMoE, Path, dict]:
    """-> the model as the phase begins, its tokenizer's file, phase 2's router if there is one.

    source: the checkpoint to start from; None: the pretrained tower and decoder.
    """
    chosen = preset(flags.preset)
    model = MedMoE(chosen.model)
    if source is None:
        clip, llm = pretrained(flags)
        load_published(model, chosen.model, clip, llm)
        return model, llm / "tokenizer.json", {}
    config, meta = read_meta(source)
    if replace(config, moe=None) != chosen.model:
        theirs = meta.get("flags", {}).get("preset", "another preset")
        raise UserError(f"{source}: a checkpoint of {theirs}, not of --preset {flags.preset}")
    if config.moe is not None:
        make_sparse(model, config.moe)
    load_checkpoint(model, source)
    file = source / "router.safetensors"
    router = dict(open_tensors(file)) if file.is_file() else {}
    return model, source / "tokenizer.json", router


def sparse_config(flags: TrainConfig, config: ModelConfig) -> MoEConfig:
    return MoEConfig(
        flags.experts, flags.top_k, flags.router, flags.router_level, start=flags.start,
        layers=named_layers(flags.moe_layers, config.decoder.n_layers), meta=flags.meta,
    )  # fmt: skip


def go_sparse(model: MedMoE, flags: TrainConfig, router: dict[str, Tensor]) -> None:
    """The dense model of phase 2 -> experts and meta expert, phase 2's router in every layer."""
    learnt = flags.router == "modality"
    if learnt and not router:
        raise UserError("--router modality: the checkpoint has no router.safetensors of phase 2")
    if learnt and len(router["bias"]) != flags.experts:
        raise UserError(f"--experts {flags.experts}: phase 2's router knows {len(router['bias'])}")
    make_sparse(model, sparse_config(flags, model.config), router if learnt else None)


def prepare(number: int, flags: TrainConfig, source: Path | None) -> tuple[MedMoE, Path, list[str]]:
    """-> the model as this phase trains it, its tokenizer's file, and what there is to say."""
    model, tokenizer, router = start_model(number, flags, source)
    if flags.weights != "float32":
        cast_weights(model, torch.bfloat16)
    if number == 3 and model.config.moe is None and flags.experts:
        go_sparse(model, flags, router)
    if flags.lora_rank:
        lora.add_lora(model, flags.lora_rank, number)
    freeze_all_but(model, trained_patterns(flags, number, model.config))
    model.decoder.recompute = flags.activation_checkpointing
    return model, tokenizer, describe(model)


def run_phase(
    number: int, flags: TrainConfig, source: Path | None, processes: Processes = ALONE
) -> Path:
    """One phase from start to checkpoint; returns the checkpoint's directory."""
    phase, chosen = PHASES[number], preset(flags.preset)
    seed_all(flags.seed + number)  # all processes begin with the same model
    model, tokenizer, told = prepare(number, flags, source)
    text, run = Text(tokenizer), Run(number, flags, tokenizer, processes)
    run.refuse_leftovers()
    if flags.compile:
        compile_blocks(model)
    shard(model, processes, run.device, flags.expert_parallel)
    if processes.rank:  # else all would drop out the same
        seed_all(flags.seed + number + 1000 * processes.rank)
    recipe = (chosen.long if flags.tune_vision else chosen.recipes)[number]
    given = {k: getattr(flags, k) for k in ("lr", "epochs", "batch_size")}
    recipe = replace(recipe, **{k: v for k, v in given.items() if v is not None})
    samples = load_samples(flags.data, phase.data, "train", **reading(flags))
    data = Dataset(samples, text, model.config, phase.plain, flags.workers)
    data.features = open_features(model, flags, run)
    print(f"\nphase {number}, {phase.title}: {len(data.samples)} samples, {recipe}")
    print(f"  on {run.device}, matmuls in {run.dtype}; starts from {source or 'pretrained parts'}")
    print("\n".join(told))
    before = read_seen(source) if source else {}
    extra, meta = {}, {}
    if before is not None:  # else the checkpoint before does not say what it has seen
        extra["seen"] = {}  # the first process writes it
        if processes.is_first:
            extra["seen"] = leaks.merge(before, leaks.seen_by(samples, flags.workers or 1))
    train(model, data, flags, recipe, run)
    if number == 2:
        questions = load_samples(flags.data, "vqa", "train", **reading(flags))
        layers = sparse_layers(model.config, sparse_config(flags, model.config))
        where = run.device, run.dtype
        weights, report = learn_router(model, questions, text, flags, *where, layers)
        extra |= {"router": weights} if weights else {}
        meta = {"router": report}
    lora.merge_lora(model)
    path = run.folder / f"phase{number}"
    run.save(path, model, extra, **meta)
    run.remove(run.checkpoints())
    print(f"phase {number}: saved {path}")
    return path


def pretrained(flags: TrainConfig) -> tuple[Path, Path]:
    """Where the tower and the decoder to start from lie: as the user says, or the preset's."""
    chosen, found = preset(flags.preset), []
    for name in ("clip", "llm"):
        if (where := getattr(flags, name) or getattr(chosen, name)) is None:
            raise UserError(f"--preset {flags.preset} comes without weights: give --{name} DIR")
        found.append(Path(where))
    return found[0], found[1]


def resolve(flags: TrainConfig) -> TrainConfig:
    """Fill in the defaults that depend on other flags; find mistakes before training starts."""
    model = preset(flags.preset).model
    out = flags.out or f"runs/{flags.preset}"
    flags = replace(flags, data=flags.data or ("phantoms",), out=out)
    at_least(flags, accumulate=1, experts=0, save_every=1, keep=1, batch_size=1, steps=1,
             router_images=1, expert_parallel=1, workers=0,
             max_missing=0)  # fmt: skip
    if flags.json:
        check_writable(Path(flags.json))
    if flags.weights != "float32" and choose_device(flags.device, flags.dtype)[1] == torch.float32:
        raise UserError(f"--weights {flags.weights}: needs --dtype bfloat16, not float32")
    if flags.lora_rank:
        lora.check_rank(flags.lora_rank, model.decoder)
        if flags.trains == "released":
            raise UserError("--lora-rank: --trains released trains whole FFNs; give one of the two")
    if flags.tune_vision is None and flags.init:
        flags = replace(flags, tune_vision=read_meta(Path(flags.init))[1]["flags"]["tune_vision"])
    elif flags.tune_vision is None:
        # A tower that says what it was pretrained on has not seen anything else.
        known = read_json(pretrained(flags)[0] / "config.json").get("pretrained_on", ())
        seen = {spec.partition(":")[0] for spec in known}
        new = {spec.partition(":")[0] for spec in flags.data} - seen
        flags = replace(flags, tune_vision=bool(seen and new))
    if flags.jitter is None:
        flags = replace(flags, jitter=flags.tune_vision)
    check_cache(flags)
    check_sparse(flags)
    if flags.phase == 3 and flags.experts:
        make_router(model, sparse_config(flags, model))
        if flags.router == "modality" and flags.init is None:
            questions = load_samples(flags.data, "vqa", "train", **reading(flags))
            if len(known := {s.modality for s in questions} - {None}) < 2:
                found = f"only one modality, {known.pop()}" if known else "no modalities"
                sources = " ".join(flags.data)
                raise UserError(
                    f"--router modality: {sources} has {found}: use --router topk, or label the "
                    "images with --router-labels FILE"
                )
    return flags


# Of earlier phases that are reused.
SAME = (
    "preset", "data", "lang", "clip", "llm", "tune_vision", "image_folder", "router_labels",
)  # fmt: skip


def earlier_phase(number: int, flags: TrainConfig) -> Path | None:
    """The finished checkpoint of this phase in --out, if it was trained as this run would.

    None if there is none, or if --resume is to go on with a later run of the phase.
    """
    path = Path(flags.out) / f"phase{number}"
    if not path.is_dir() or (flags.resume and unfinished(path.parent, number)):
        return None
    before = read_meta(path)[1]["flags"]
    for name in SAME:
        was = before.get(name)
        if name == "router_labels" and isinstance(was, int):
            was = None  # an older checkpoint's --router-images
        if was != to_dict(flags)[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{path} was trained with {flag} {was}: choose another --out")
    print(f"phase {number}: done before, {path}")
    return path


def run_phases(flags: TrainConfig, processes: Processes) -> None:
    """All phases up to --phase that are missing, then the evaluation."""
    source = Path(flags.init) if flags.init else None
    first = flags.phase if flags.init else 1
    for number in range(first, flags.phase):
        source = earlier_phase(number, flags) or run_phase(number, flags, source, processes)
    path = earlier_phase(flags.phase, flags) if flags.resume else None
    if path:
        refuse_changed_flags(path, read_meta(path)[1]["flags"], flags)
    path = path or run_phase(flags.phase, flags, source, processes)
    processes.end()
    if not processes.is_first:
        return
    if flags.eval and not any(has_splits(spec) for spec in flags.data):
        print(f"{' '.join(flags.data)} has no held-out split: name one with eval.py {path} --data")
    elif flags.eval:
        command = [str(Path(__file__).with_name("eval.py")), str(path), "--blind"]
        command += ["--device", flags.device, "--dtype", flags.dtype]
        command += ["--json", flags.json] if flags.json else []
        print(f"\npython eval.py {' '.join(command[1:])}", flush=True)
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        if code := subprocess.run([sys.executable, *command], env=alone).returncode:
            raise SystemExit(code)
    print(f"\nask it something: python chat.py {path}")


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = resolve(parse(TrainConfig, argv, "train.py"))
    processes = start(flags.device)
    print(" ".join(f"{k}={v}" for k, v in asdict(flags).items()))
    try:
        Path(flags.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {flags.out}: {error.strerror}") from error
    with claim(Path(flags.out), processes):
        run_phases(flags, processes)


if __name__ == "__main__":
    main()
