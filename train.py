"""Train a Med-MoE: python train.py --phase 3 runs all three phases on the embedded pictures.

    1 alignment           captions       the projector learns to speak the decoder's language
    2 instruction tuning  dialogues      decoder and projector; then the router, on modalities
    3 MoE tuning          questions      every second FFN becomes experts + meta; those learn

A phase starts from the checkpoint of the phase before; one that is missing is made first.
"""

import math
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import Run, load_checkpoint, read_meta
from config import (
    IGNORE,
    PHASES,
    RELEASED_EXTRA,
    ModelConfig,
    MoEConfig,
    Phase,
    Recipe,
    TrainConfig,
    UserError,
    parse,
    preset,
    to_dict,
    user_errors,
)
from data import (
    Images,
    Sample,
    Text,
    collate,
    encode_all,
    epoch_batches,
    hold_out,
    load_samples,
    one_per_image,
)
from metrics import format_confusion
from model import Batch, MedMoE, make_sparse, precision, sparse_layers
from moe import get_router, load_balancing_loss, router_z_loss
from router_training import collect, train_router
from weights import load_published, open_tensors, read_json


class Data:
    """The samples of one phase, as token ids and pictures."""

    def __init__(self, samples: list[Sample], phase: Phase, config: ModelConfig, text: Text):
        self.samples = samples
        self.encoded = encode_all(
            samples,
            text,
            config.vision.n_patches,
            config.system,
            phase.plain,
            config.decoder.max_len,
        )
        self.lengths = [len(ids) for ids, _ in self.encoded]
        # As released, captions are learnt on cropped pictures and everything else on padded ones.
        self.images = Images(config.vision.image_size, pad=not phase.plain)
        self.eos_id = text.eos_id

    def batch(self, rows: list[int]) -> Batch:
        samples = [self.samples[r] for r in rows]
        encoded = [self.encoded[r] for r in rows]
        return Batch(*collate(samples, encoded, self.images, self.eos_id))


def lr_scale(step: int, n_steps: int) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine down to 0 (paper, Table 11)."""
    warm = max(1, round(0.03 * n_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def trained_patterns(flags: TrainConfig, number: int, config: ModelConfig) -> tuple[str, ...]:
    """Which parameters phase `number` trains, as patterns over their names."""
    trains = PHASES[number].trains
    if number < 3:
        return trains + (("vision.*",) if flags.tune_vision else ())
    if flags.trains == "released":
        trains += RELEASED_EXTRA[config.decoder.family]
    if not get_router(config.moe.router).frozen:
        trains += ("decoder.*.mlp.router.*",)
    return trains


def freeze_all_but(model: MedMoE, trains: tuple[str, ...]) -> list[str]:
    """Set requires_grad by pattern; returns the trained names. A pattern without a match raises."""
    names = [name for name, _ in model.named_parameters()]
    if dead := [p for p in trains if not any(fnmatchcase(n, p) for n in names)]:
        raise ValueError(f"no parameter matches {dead}")
    for name, param in model.named_parameters():
        param.requires_grad_(any(fnmatchcase(name, p) for p in trains))
    return [name for name, param in model.named_parameters() if param.requires_grad]


def describe(model: MedMoE) -> list[str]:
    """One line for each family of parameters: trained or frozen, and how many."""
    families: dict[tuple[bool, str], int] = {}
    for name, param in model.named_parameters():
        family = re.sub(r"\.\d+\.", ".*.", name)
        family = re.sub(r"\.[^.]+\.(weight|bias)$|\.(weight|bias)$", "", family)
        if family.startswith("vision"):
            family = "vision"
        key = (param.requires_grad, family)
        families[key] = families.get(key, 0) + param.numel()
    rows = sorted(families.items(), key=lambda item: (not item[0][0], item[0][1]))
    return [f"  {'trains' if on else 'frozen'}  {name:<32}{n:>14,}" for (on, name), n in rows]


def train(model: MedMoE, data: Data, flags: TrainConfig, recipe: Recipe, run: Run) -> None:
    """The loop of every phase: batch, forward, backward, clip, step, log; checkpoints between."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=recipe.lr, weight_decay=0.0, fused=True)
    per_epoch = len(epoch_batches(data.lengths, recipe.batch_size, flags.seed, 0))
    n_steps = flags.steps or recipe.epochs * per_epoch
    first = run.resume(model, optimizer, named) if flags.resume else 0
    run.begin_log(first, n_steps, per_epoch, named)
    model.train()
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, desc=run.title, mininterval=1)
    for step in bar:
        if step % flags.save_every == 0 and step > first:
            run.save_step(model, optimizer, named, step)
        if step == first or step % per_epoch == 0:
            order = epoch_batches(data.lengths, recipe.batch_size, flags.seed, step // per_epoch)
        rows = order[step % per_epoch]
        start = time.perf_counter()
        loss, n_positions = forward_backward(model, data, rows, flags, run)
        norm = torch.nn.utils.clip_grad_norm_(named.values(), flags.clip_grad or math.inf)
        if not (math.isfinite(loss) and norm.isfinite()):
            ids = ", ".join(data.samples[r].id for r in rows)
            where = f"{run.title}, step {step}: loss {loss}, gradient norm {norm.item()}"
            raise UserError(f"{where}; nothing was updated. The batch: {ids}")
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_scale(step, n_steps)
        optimizer.step()
        optimizer.zero_grad()
        speed = n_positions / (time.perf_counter() - start)
        bar.set_postfix(loss=f"{loss:.3f}", tok_s=f"{speed:.0f}", refresh=False)
        if step % 10 == 0 or step == n_steps - 1:
            lr = optimizer.param_groups[0]["lr"]
            run.log(step=step, loss=loss, lr=lr, grad_norm=norm.item(), tokens_per_s=round(speed))
    model.eval()


def forward_backward(
    model: MedMoE, data: Data, rows: list[int], flags: TrainConfig, run: Run
) -> tuple[float, int]:
    """Gradients of one step, over flags.accumulate micro-batches -> mean loss, positions seen.

    The mean is over all supervised tokens of the step, so accumulation changes nothing.
    """
    size = math.ceil(len(rows) / flags.accumulate)
    batches = [data.batch(rows[i : i + size]) for i in range(0, len(rows), size)]
    n_tokens = sum(int((b.labels[:, 1:] != IGNORE).sum()) for b in batches)
    total = 0.0
    for batch in batches:
        batch = batch.to(run.device)
        with precision(run.device, run.dtype):
            out = model.loss(batch)
        loss = out.total / n_tokens
        share = out.n_tokens / n_tokens
        for routing in out.routings:
            extra = flags.balance * load_balancing_loss(routing, batch.mask)
            extra = extra + flags.z_loss * router_z_loss(routing, batch.mask)
            loss = loss + share * extra / len(out.routings)
        loss.backward()
        total += loss.item()
    return total, sum(int(b.mask.sum()) for b in batches)


def start_model(number: int, flags: TrainConfig, source: Path | None) -> tuple[MedMoE, Path, dict]:
    """-> the model as the phase begins, its tokenizer's file, phase 2's router if there is one.

    source: the checkpoint to start from; None: the pretrained tower and decoder.
    """
    chosen = preset(flags.preset)
    model = MedMoE(chosen.model)
    if source is None:
        load_published(model, chosen.model, Path(flags.clip), Path(flags.llm))
        return model, Path(flags.llm) / "tokenizer.json", {}
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


def go_sparse(model: MedMoE, flags: TrainConfig, router: dict[str, Tensor]) -> None:
    """The dense model of phase 2 -> experts and meta expert, phase 2's router in every layer."""
    moe = MoEConfig(flags.experts, flags.top_k, flags.router, flags.router_level, start=flags.start)
    if flags.router == "modality" and not router:
        raise UserError("--router modality needs phase 2's router, which learns from samples with a"
                        " modality; --data has none: choose --router topk")  # fmt: skip
    if flags.router == "modality" and len(router["bias"]) != flags.experts:
        raise UserError(f"--experts {flags.experts}: phase 2's router knows {len(router['bias'])}")
    make_sparse(model, moe, router if flags.router == "modality" else None)


def learn_router(model: MedMoE, flags: TrainConfig, text: Text, run: Run) -> tuple[dict, dict]:
    """Train the router on one question an image, a fifth held out -> its weights, a report."""
    samples = load_samples(flags.data, "vqa", "train", flags.lang)
    labelled = one_per_image(samples, flags.router_labels, flags.seed)
    train_samples, held_out = hold_out(labelled, 0.2, flags.seed)
    if not train_samples:
        print("phase 2: no sample has a modality, so there is no router to train")
        return {}, {}
    layers = sparse_layers(model.config, MoEConfig())
    parts = []
    for samples in (train_samples, held_out):
        data = Data(samples, PHASES[3], model.config, text)
        batches = (data.batch(list(rows)) for rows in torch.arange(len(samples)).split(64))
        parts.append(collect(model, batches, layers, flags.seed, run.device, run.dtype))
    weights, report = train_router(*parts, n_experts=flags.experts, seed=flags.seed)
    print(f"router: {len(train_samples)} labels; on {report['n']} held-out images "
          f"{report['accuracy']:.1%}, single positions {report['token_accuracy']:.1%}")  # fmt: skip
    print(format_confusion(report))
    return weights, report


def run_phase(number: int, flags: TrainConfig, source: Path | None) -> Path:
    """One phase from start to checkpoint; returns the checkpoint's directory."""
    phase, chosen = PHASES[number], preset(flags.preset)
    torch.manual_seed(flags.seed + number)
    model, tokenizer, router = start_model(number, flags, source)
    if number == 3 and model.config.moe is None:
        go_sparse(model, flags, router)
    text = Text(tokenizer)
    run = Run(number, flags, tokenizer)
    model.to(run.device)
    freeze_all_but(model, trained_patterns(flags, number, model.config))
    recipe = (chosen.long if flags.tune_vision else chosen.recipes)[number]
    given = {k: getattr(flags, k) for k in ("lr", "epochs", "batch_size")}
    recipe = replace(recipe, **{k: v for k, v in given.items() if v is not None})
    samples = load_samples(flags.data, phase.data, "train", flags.lang)
    data = Data(samples, phase, model.config, text)
    print(f"\nphase {number}, {phase.title}: {len(data.samples)} samples, {recipe}")
    print(f"  on {run.device}, matmuls in {run.dtype}; starts from {source or 'pretrained parts'}")
    print("\n".join(describe(model)))
    train(model, data, flags, recipe, run)
    extra, meta = {}, {}
    if number == 2:
        weights, report = learn_router(model, flags, text, run)
        extra, meta = ({"router": weights} if weights else {}), {"router": report}
    path = run.folder / f"phase{number}"
    run.save(path, model, extra, **meta)
    run.remove(run.checkpoints())
    print(f"phase {number}: saved {path}")
    return path


def resolve(flags: TrainConfig) -> TrainConfig:
    """Fill in every default that depends on another flag."""
    chosen = preset(flags.preset)
    parts = {"clip": flags.clip or chosen.clip, "llm": flags.llm or chosen.llm}
    if flags.init is None:
        for name, where in parts.items():
            if where is None:
                raise UserError(f"--preset {flags.preset} has no weights here: give --{name} DIR")
    flags = replace(flags, **{k: v and str(v) for k, v in parts.items()})
    flags = replace(flags, data=flags.data or ("phantoms",))
    flags = replace(flags, out=flags.out or f"runs/{flags.preset}")
    if flags.tune_vision is None:
        known = (
            read_json(Path(flags.clip) / "config.json").get("pretrained_on") if flags.clip else None
        )
        kinds = {spec.partition(":")[0] for spec in known or ()}
        new = {spec.partition(":")[0] for spec in flags.data} - kinds
        flags = replace(flags, tune_vision=bool(known and new))
    for name in ("accumulate", "experts", "save_every"):
        if getattr(flags, name) < 1:
            raise UserError(
                f"--{name.replace('_', '-')} {getattr(flags, name)}: must be at least 1"
            )
    return flags


SAME = ("preset", "data", "lang", "clip", "llm", "tune_vision")  # of earlier phases that are reused


def earlier_phase(number: int, flags: TrainConfig) -> Path | None:
    """The finished checkpoint of this phase in --out, if it was trained as this run would."""
    path = Path(flags.out) / f"phase{number}"
    if not path.is_dir():
        return None
    before = read_meta(path)[1]["flags"]
    for name in SAME:
        if before[name] != to_dict(flags)[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{path} was trained with {flag} {before[name]}: choose another --out")
    print(f"phase {number}: done before, {path}")
    return path


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = resolve(parse(TrainConfig, argv, "train.py"))
    print(" ".join(f"{k}={v}" for k, v in asdict(flags).items()))
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    source = Path(flags.init) if flags.init else None
    first = flags.phase if flags.init else 1
    for number in range(first, flags.phase):
        source = earlier_phase(number, flags) or run_phase(number, flags, source)
    done = earlier_phase(flags.phase, flags) if flags.resume else None
    path = done or run_phase(flags.phase, flags, source)
    if flags.eval:
        command = [str(Path(__file__).with_name("eval.py")), str(path), "--blind"]
        command += ["--device", flags.device, "--dtype", flags.dtype]
        command += ["--json", flags.json] if flags.json else []
        print(f"\npython eval.py {' '.join(command[1:])}", flush=True)
        if code := subprocess.run([sys.executable, *command]).returncode:
            raise SystemExit(code)
    print(f"\nask it something: python chat.py {path}")


if __name__ == "__main__":
    main()
