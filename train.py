"""Train a Med-MoE: python train.py --phase 3 runs all three phases on the embedded images.

    1 alignment           captions       projector
    2 instruction tuning  dialogues      projector and decoder; then the router, on modality labels
    3 MoE tuning          questions      every second FFN becomes experts + meta; those are trained

On data that the tower was not pretrained on, phases 1 and 2 train it too (--tune-vision). A phase
starts from the checkpoint of the phase before; a missing one is trained first.
"""

import math
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import load_checkpoint, read_config, read_seen
from config import (
    IGNORE,
    PHASES,
    RELEASED_EXTRA,
    ModelConfig,
    MoEConfig,
    Recipe,
    TrainConfig,
    UserError,
    named_layers,
    preset,
    warn_once,
)
from data import Batch, Dataset, Text
from engine import cli, familiar, lora
from engine.experts import information, show_information
from engine.features import check_cache
from engine.first_gate import unchanged
from engine.optim import cast_weights, make_optimizer
from engine.processes import ALONE, Processes, join_processes
from engine.published import load_published, with_router
from engine.run import Run, claim, refuse_changed_flags, refuse_other_experts, seed_all, unfinished
from model import Loss, MedMoE, autocast, freeze_all_but, make_router, make_sparse, sparse_layers
from router_training import learn_router
from routers import ROUTERS, Routing, get_router, load_balancing_loss, router_z_loss
from scoring import leaks
from sources.images import Images, jitter
from sources.load import has_splits, load_samples, reading
from sources.records import read_json
from sources.tensorfiles import open_tensors


def lr_scale(step: int, n_steps: int) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine down to 0 (paper, Table 11)."""
    warm = max(1, round(0.03 * n_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def router_losses(out: Loss, batch: Batch, flags: TrainConfig) -> Tensor | float:
    """What the routers add to the loss, a mean over the sparse layers. 0 by default."""
    total = 0.0
    for routing in out.routings:
        total = total + routing.penalty
        if flags.balance:
            total = total + flags.balance * load_balancing_loss(routing, batch.mask)
        if flags.z_loss:
            total = total + flags.z_loss * router_z_loss(routing, batch.mask)
        if flags.modality_loss:
            total = total + flags.modality_loss * modality_loss(routing, batch)
    return total / max(1, len(out.routings))


def modality_loss(routing: Routing, batch: Batch) -> Tensor | float:
    """Phase 2's loss of the router, on the positions from the image on; 0 where none is known."""
    seen = batch.prompt_from_image() & (batch.modality >= 0)[:, None]  # (B, T)
    truth = batch.modality[:, None].expand_as(seen)[seen] % routing.logits.shape[-1]
    return F.cross_entropy(routing.logits[seen], truth) if len(truth) else 0.0


def micro_batches(data: Dataset, rows: list[int], accumulate: int, run: Run) -> list[Batch]:
    """This process's part of each micro-batch of a step.

    A process that has no sample computes another's, without labels: all take part in exchanges.
    """
    size = math.ceil(len(rows) / accumulate)
    batches = []
    for first in range(0, len(rows), size):
        part = rows[first : first + size]
        mine = part[run.rank :: run.world]
        batch = data.batch(mine or part[:1])
        batches.append(batch if mine else batch._replace(labels=batch.labels.fill_(IGNORE)))
    return batches


def train(model: MedMoE, data: Dataset, flags: TrainConfig, recipe: Recipe, run: Run) -> None:
    """The loop of every phase. `run` is what surrounds it: log, progress, checkpoints, signals."""
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    routers = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
    optimizer = make_optimizer(params, recipe.lr, flags.weights)
    per_epoch = len(data.epoch(recipe.batch_size, flags.seed, 0))
    n_steps = flags.steps or max(1, round(recipe.epochs * per_epoch))
    # --resume: weights, optimizer and random generators become those of the last checkpoint.
    first_step = run.begin(model, optimizer, data.samples, n_steps, per_epoch,
                           lr=recipe.lr, batch_size=recipe.batch_size)  # fmt: skip
    model.train()
    for step in range(first_step, n_steps):
        if step == first_step or step % per_epoch == 0:
            order = data.epoch(recipe.batch_size, flags.seed, step // per_epoch)
        rows = order[step % per_epoch]
        data.prefetch(order[step % per_epoch + 1 :][:2])  # in threads
        batches = micro_batches(data, rows, flags.accumulate, run)
        # One mean over all supervised tokens of the step: micro-batches and processes change
        # nothing of the cross-entropy.
        (n_tokens,) = run.sum(sum(batch.n_supervised() for batch in batches))
        loss = 0.0
        for batch in batches:
            batch = batch.to(run.device)
            if flags.jitter and len(batch.images):
                batch = batch._replace(images=jitter(batch.images))
            with autocast(run.device, run.dtype):
                out = model.loss(batch)
            router_loss = router_losses(out, batch, flags)  # a mean; out.total is a sum
            part = (out.total + out.n_tokens * router_loss) / n_tokens
            if part.requires_grad:  # in phase 1 text alone reaches nothing that is trained
                part.backward()
            loss += part.item()
            run.count(batch, out)  # positions, and tokens routed to each expert
        # Sums over the processes, as FSDP has summed the gradients. load (L, E): tokens routed
        # to each expert, per real position.
        loss, load = run.sum_loss_and_load(loss)
        run.drop_idle_gradients()  # of what no image of this step has reached
        norm = run.clip_gradients(flags.clip_grad)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            ids = ", ".join(data.samples[r].id for r in rows)
            where = f"{run.title}, step {step}: loss {loss}, gradient norm {norm}"
            raise UserError(f"{where}; nothing was updated. The batch: {ids}")
        lr = recipe.lr * lr_scale(step, n_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for router, load_of_layer in zip(routers, load.to(run.device), strict=True):
                router.update(load_of_layer)  # does nothing in the built-in routers
        run.after_step(step, loss, lr, norm, load)
    model.eval()


# The model of a phase: what it starts from, and what is trained.


def sparse_config(flags: TrainConfig, config: ModelConfig) -> MoEConfig:
    layers = named_layers(flags.moe_layers, config.decoder.n_layers)
    level = "once" if flags.router == "modality" else "token"
    level = level if flags.router_level == "auto" else flags.router_level
    return MoEConfig(n_experts=flags.experts, top_k=flags.top_k, router=flags.router, layers=layers,
                     level=level, start=flags.start, meta=flags.meta)  # fmt: skip


def pretrained(flags: TrainConfig) -> tuple[Path, Path]:
    """The directories of the tower and decoder to start from: the user's, or the preset's."""
    chosen, found = preset(flags.preset), []
    for name in ("clip", "llm"):
        if (where := getattr(flags, name) or getattr(chosen, name)) is None:
            raise UserError(f"--preset {flags.preset} comes without weights: give --{name} DIR")
        found.append(Path(where))
    return found[0], found[1]


def initial_model(flags: TrainConfig, init: Path | None) -> tuple[MedMoE, Path, dict]:
    """-> the model as the phase begins, its tokenizer's file, phase 2's router if there is one.

    init: the checkpoint to start from; None: the pretrained tower and decoder.
    """
    chosen = preset(flags.preset)
    model = MedMoE(chosen.model)
    if init is None:
        clip, llm = pretrained(flags)
        load_published(model, chosen.model, clip, llm)
        return model, llm / "tokenizer.json", {}
    config, info = read_config(init)
    if replace(config, moe=None) != chosen.model:
        theirs = info.get("flags", {}).get("preset", "another preset")
        raise UserError(f"{init}: a checkpoint of {theirs}, not of --preset {flags.preset}")
    if config.moe is not None:
        own = None if {flags.router, config.moe.router} & ROUTERS.keys() else flags.router
        make_sparse(model, with_router(init, config, info, own).moe)
    load_checkpoint(model, init)
    file = init / "router.safetensors"
    router_weights = dict(open_tensors(file)) if file.is_file() else {}
    return model, init / "tokenizer.json", router_weights


def go_sparse(model: MedMoE, flags: TrainConfig, router_weights: dict[str, Tensor]) -> None:
    """The dense model of phase 2 -> experts and meta expert, phase 2's router in every layer."""
    if flags.router != "modality":
        router_weights = None  # routers stay as initialised
    elif not router_weights:
        raise UserError("--router modality: the checkpoint has no router.safetensors of phase 2")
    elif (n := len(router_weights["bias"])) != flags.experts:
        raise UserError(f"--experts {flags.experts}: phase 2's router has {n} outputs")
    make_sparse(model, sparse_config(flags, model.config), router_weights)


def trained_patterns(flags: TrainConfig, number: int, config: ModelConfig) -> tuple[str, ...]:
    """Which parameters phase `number` trains, by name: PHASES, and what flags add or take away."""
    trains = lora.TRAINS[number] if flags.lora_rank else PHASES[number].trains
    if number < 3:
        return trains + (("vision.*",) if flags.tune_vision else ())
    if config.moe is None:  # --experts 0: the FFNs that would be sparse
        layers = sparse_layers(config, sparse_config(flags, config))
        return tuple(f"decoder.blocks.{i}.mlp.*" for i in layers)
    if not config.moe.meta:
        trains = tuple(pattern for pattern in trains if ".meta." not in pattern)
    if flags.trains == "released":
        trains += RELEASED_EXTRA
    if flags.modality_loss or not get_router(config.moe.router).frozen:
        trains += ("decoder.*.mlp.router.*",)
    return trains


def prepare(number: int, flags: TrainConfig, init: Path | None) -> tuple[MedMoE, Path]:
    """-> the model with the parameters of this phase trainable, and its tokenizer's file."""
    model, tokenizer, router_weights = initial_model(flags, init)
    if flags.weights != "float32":
        cast_weights(model, torch.bfloat16)
    if model.config.moe is not None:
        refuse_other_experts(init, number, model.config, sparse_config(flags, model.config))
    elif number == 3 and flags.experts:
        go_sparse(model, flags, router_weights)
    if flags.lora_rank:
        lora.add_lora(model, flags.lora_rank, number)
    freeze_all_but(model, trained_patterns(flags, number, model.config))
    return model, tokenizer


def describe(model: MedMoE) -> str:
    """One line for each family of parameters: trained or frozen, and how many."""
    families: Counter[tuple[bool, str]] = Counter()
    for name, param in model.named_parameters():
        parts = re.sub(r"\.\d+\.", ".*.", name).split(".")[:-1]  # without weight, bias
        if len(parts) > 2 and not parts[-1].startswith("ln"):
            parts.pop()  # q, k, v, o in one line; fc1 and fc2 in one line
        family = "vision" if parts[0] == "vision" else ".".join(parts)
        families[param.requires_grad, family] += param.numel()
    rows = sorted((not trains, name, n) for (trains, name), n in families.items())
    return "\n".join(f"  {'frozen' if f else 'trains'}  {name:<32}{n:>14,}" for f, name, n in rows)


# One phase, and all phases.


def choose_recipe(flags: TrainConfig, number: int) -> Recipe:
    """The preset's recipe of this phase, with what the flags change."""
    chosen = preset(flags.preset)
    recipe = (chosen.long if flags.tune_vision else chosen.recipes)[number]
    given = {k: getattr(flags, k) for k in ("lr", "epochs", "batch_size")}
    return replace(recipe, **{k: v for k, v in given.items() if v is not None})


def run_phase(
    number: int, flags: TrainConfig, init: Path | None, processes: Processes = ALONE
) -> Path:
    """One phase from start to checkpoint; returns the checkpoint's directory."""
    phase, recipe = PHASES[number], choose_recipe(flags, number)
    seed_all(flags.seed + number)  # all processes begin with the same model
    model, tokenizer = prepare(number, flags, init)
    summary, text = describe(model), Text(tokenizer, model.config.decoder.vocab_size)
    run = Run(number, flags, tokenizer, processes)
    run.refuse_leftovers()
    samples = load_samples(flags.data, phase.task, "train", **reading(flags))
    # As released: training crops the images of captions, and pads all others.
    images = Images(model.config.vision.image_size, pad=not phase.plain, workers=flags.workers)
    data = Dataset(samples, text, model.config, phase.plain, images, flags.max_bad)
    samples = data.samples
    if not samples:
        raise UserError(f"--data {' '.join(flags.data)}: none of its samples can be learned from")
    if number == 1 and not any(sample.image for sample in samples):
        raise UserError(f"phase 1 trains on images, and {' '.join(flags.data)} has none: add a "
                        "source of images, or begin with --phase 2 --init DIR")  # fmt: skip
    print(f"\nphase {number}, {phase.title}: {len(samples)} samples, {recipe}")
    print(f"  on {run.device}, matmuls in {run.dtype}; starts from {init or 'pretrained parts'}")
    print(summary)
    run.place(model)
    before = read_seen(init) if init else leaks.seen_by([])  # None: init has no record of it
    asked = Counter(question for sample in samples for question, _ in sample.turns if question)
    examples = [question for question, n in asked.most_common(8) if n > 1]  # for chat.py's /help
    extra = {}
    if before is not None:
        extra["seen"] = {"rows": leaks.merge(before, leaks.seen_by(samples))}
    path, info = run.folder / f"phase{number}", {"questions": examples}
    bits = {"before": information(model, data, run.device, run.dtype)}
    with run.interruptible():  # Ctrl-C lets a step finish, and after the last one the phase
        train(model, data, flags, recipe, run)
        if bits["before"]:
            bits["after"] = information(model, data, run.device, run.dtype)
            info["information"] = bits
            print(show_information(bits))
        if number == 2:
            questions = load_samples(flags.data, "vqa", "train", **reading(flags))
            layers = sparse_layers(model.config, sparse_config(flags, model.config))
            weights, info["router"] = learn_router(
                model, questions, text, flags, layers, run.device, run.dtype
            )
            extra |= {"router": weights} if weights else {}
        lora.merge_lora(model)
        extra |= familiar.measure(model, samples, flags, run.device, run.dtype)
        run.save(path, model, extra, **info)
        run.remove(unfinished(run.folder, number))
        print(f"phase {number}: saved {path}")
    return path


def not_read_by(number: int, flags: TrainConfig) -> set[str]:
    """Flags that phase `number` does not read: a later phase may have others."""
    names = {"init", "router", "router_level", "top_k", "meta", "start", "trains", "balance",
             "z_loss", "modality_loss"}  # fmt: skip
    if number == 1 or flags.router != "modality":  # phase 2 ends with the router's training
        names |= {"experts", "moe_layers", "router_images", "router_noise"}
    return names | ({"lora_rank"} if number == 1 else set())


def finished_phase(number: int, flags: TrainConfig) -> Path | None:
    """The finished checkpoint of this phase in --out. Raises UserError if it is of another run.

    None if there is none, or if --resume is to continue a later run of the phase.
    """
    path = Path(flags.out) / f"phase{number}"
    if not path.is_dir() or (flags.resume and unfinished(path.parent, number)):
        return None
    info = read_config(path)[1]
    skipped = not_read_by(number, flags) if number < flags.phase else set()
    refuse_changed_flags(path, info["flags"], flags, skipped)
    if (made_by := info.get("torch")) != torch.__version__:
        warn_once(f"{path}: trained with torch {made_by}, this is {torch.__version__}")
    print(f"phase {number}: done before, {path}")
    return path


def run_phases(flags: TrainConfig, processes: Processes) -> None:
    """All phases up to --phase that are missing, then the evaluation."""
    init = Path(flags.init) if flags.init else None
    last = Path(flags.out, f"phase{flags.phase}")
    if last.is_dir() and not (flags.resume or flags.overwrite):
        raise UserError(f"{last} is finished: choose another --out, replace it with --overwrite, "
                        "or only score it again with --resume")  # fmt: skip
    print(" ".join(f"{k}={v}" for k, v in asdict(flags).items()))
    for number in range(flags.phase if flags.init else 1, flags.phase):
        init = finished_phase(number, flags) or run_phase(number, flags, init, processes)
    path = finished_phase(flags.phase, flags) if flags.resume else None
    path = path or run_phase(flags.phase, flags, init, processes)
    processes.end()
    if not processes.is_first:
        return
    own = flags.router not in ROUTERS and read_config(path)[0].moe is not None
    router = ["--router", flags.router] if own else []
    if flags.eval and not any(has_splits(spec) for spec in flags.data):
        print(f"{' '.join(flags.data)} has no held-out split: name one with eval.py {path} --data")
    elif flags.eval:
        command = [str(Path(__file__).with_name("eval.py")), str(path), "--blind", *router]
        command += ["--device", flags.device, "--dtype", flags.dtype]
        command += ["--json", flags.json] if flags.json else []
        print(f"\npython eval.py {shlex.join(command[1:])}", flush=True)
        alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        if code := subprocess.run([sys.executable, *command], env=alone).returncode:
            raise SystemExit(code)
        return
    print(f"\ntry it: python chat.py {shlex.join([str(path), *router])}")


# Flags: the defaults that depend on other flags. Skip on first reading.


def is_new_to_the_tower(flags: TrainConfig) -> bool:
    """The default of --tune-vision: is there data that the pretrained tower has not seen?"""
    if flags.init:
        return read_config(Path(flags.init))[1]["flags"]["tune_vision"]
    seen = read_json(pretrained(flags)[0] / "config.json", dict).get("pretrained_on", ())
    # A tower whose config.json lists its pretraining data has seen no other.
    kinds, seen_kinds = ({re.split("[:@]", s)[0] for s in specs} for specs in (flags.data, seen))
    return bool(seen_kinds and kinds - seen_kinds)


def resolve(flags: TrainConfig) -> TrainConfig:
    """Fill in the defaults that depend on other flags; find mistakes before training starts."""
    out = flags.out or f"runs/{flags.preset}"
    flags = replace(flags, data=flags.data or ("phantoms",), out=out)
    cli.check_training(flags)
    if flags.tune_vision is None:
        flags = replace(flags, tune_vision=is_new_to_the_tower(flags))
    if flags.jitter is None:
        flags = replace(flags, jitter=flags.tune_vision)
    check_cache(flags)
    if flags.phase == 3 and flags.experts:
        model = preset(flags.preset).model
        with unchanged(f"--router {flags.router}:"):
            make_router(model, sparse_config(flags, model))
        if flags.router == "modality" and flags.init is None:
            questions = load_samples(flags.data, "vqa", "train", **reading(flags))
            if len({s.modality for s in questions} - {None}) < 2:
                raise UserError(
                    f"--router modality: fewer than two in {' '.join(flags.data)}: use "
                    "--router topk, or label the images by --router-labels FILE"
                )
    return flags


@cli.user_errors
def main(argv: list[str] | None = None) -> None:
    flags = resolve(cli.parse(TrainConfig, argv, "train.py"))
    processes = join_processes(flags.device)
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    with claim(Path(flags.out), processes):
        run_phases(flags, processes)


if __name__ == "__main__":
    main()
