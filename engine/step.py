"""The loop of every phase, and one step of it."""

import math
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from config import IGNORE, Recipe, UserError
from data import Batch, Dataset
from engine.flops import matmul_rate, model_flops
from engine.optim import make_optimizer
from engine.parallel import clip_gradients
from engine.processes import Processes
from engine.run import Run
from engine.signals import Signals
from flags import TrainConfig
from model import MedMoE, precision
from routers import load_balancing_loss, router_z_loss
from vision import jitter


def lr_scale(step: int, n_steps: int) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine down to 0 (paper, Table 11)."""
    warm = max(1, round(0.03 * n_steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, n_steps - warm)))


def train(model: MedMoE, data: Dataset, flags: TrainConfig, recipe: Recipe, run: Run) -> None:
    """The loop of every phase: batch, forward, backward, clip, step, log; checkpoints between."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    routers = [block.mlp.router for block in model.decoder.blocks if block.is_sparse]
    optimizer = make_optimizer(named, recipe.lr, flags.weights)
    per_epoch = len(data.epoch(recipe.batch_size, flags.seed, 0))
    n_steps = flags.steps or max(1, round(recipe.epochs * per_epoch))
    run.settle(data.samples, steps=n_steps, lr=recipe.lr, batch_size=recipe.batch_size)
    first = run.resume(model, optimizer, named) if flags.resume else 0
    run.begin_log(first, n_steps, per_epoch, named)
    model.train()
    rate = matmul_rate(run.device, run.dtype) * run.processes.world  # FLOP/s
    shares = []
    bar = tqdm(range(first, n_steps), initial=first, total=n_steps, desc=run.title,
               mininterval=1, disable=not run.processes.is_first)  # fmt: skip
    with Signals(run.processes) as signals:
        for step in bar:
            if step == first or step % per_epoch == 0:
                order = data.epoch(recipe.batch_size, flags.seed, step // per_epoch)
            rows = order[step % per_epoch]
            data.prefetch(order[step % per_epoch + 1 :][:2])
            start = time.perf_counter()
            loss, n_positions, flops, visits = forward_backward(model, data, rows, flags, run)
            norm = clip_gradients(named.values(), flags.clip_grad, run.processes)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                ids = ", ".join(data.samples[r].id for r in rows)
                where = f"{run.title}, step {step}: loss {loss}, gradient norm {norm}"
                raise UserError(f"{where}; nothing was updated. The batch: {ids}")
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_scale(step, n_steps)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for router, counted in zip(routers, visits.to(run.device), strict=True):
                    router.update(counted)
            seconds = time.perf_counter() - start
            speed, mfu = round(n_positions / seconds), flops / seconds / rate
            shares.append(mfu)
            bar.set_postfix(loss=f"{loss:.3f}", tok_s=speed, mfu=f"{mfu:.0%}", refresh=False)
            lr = optimizer.param_groups[0]["lr"]
            load = {"visits": visits.double().round(decimals=4).tolist()} if routers else {}
            run.log(step=step, loss=loss, lr=lr, grad_norm=norm, tokens_per_s=speed, mfu=mfu,
                    **load)  # fmt: skip
            done, stop = step + 1, signals.asked()
            if stop or (done % flags.save_every == 0 and done < n_steps):
                run.save_step(model, optimizer, named, done)
            if stop:
                bar.close()
                run.leave(done, stop)
    if shares:
        print(f"{run.title}: MFU {statistics.median(shares):.0%} of {rate / 1e9:,.0f} GFLOP/s, "
              f"what matmuls in {run.dtype} reach here")  # fmt: skip
    model.eval()


def micro_batches(
    data: Dataset, rows: list[int], accumulate: int, processes: Processes
) -> list[Batch]:
    """This process's part of each micro-batch of a step.

    Where there are fewer samples than processes, one without a sample computes another's, with
    nothing to learn, so that it takes part in every exchange.
    """
    size = math.ceil(len(rows) / accumulate)
    batches = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        mine = processes.share(part)
        batch = data.batch(mine or part[:1])
        batches.append(batch if mine else batch._replace(labels=batch.labels.fill_(IGNORE)))
    return batches


class Done(NamedTuple):
    """What the processes have done together in one step."""

    loss: float  # mean over its supervised tokens
    n_positions: int  # real ones
    flops: int  # useful ones: engine/flops.py
    visits: Tensor  # (L, E) fp32, of a sparse block's experts per real position


def forward_backward(
    model: MedMoE, data: Dataset, rows: list[int], flags: TrainConfig, run: Run
) -> Done:
    """Gradients of one step, over flags.accumulate micro-batches.

    The mean is over all supervised tokens of the step, so neither accumulation nor the number of
    processes changes anything.
    """
    batches = micro_batches(data, rows, flags.accumulate, run.processes)
    supervised = [int((b.labels[:, 1:] != IGNORE).sum()) for b in batches]
    positions = [int(b.mask.sum()) for b, n in zip(batches, supervised, strict=True) if n]
    n_tokens, n_positions = run.processes.sum(sum(supervised), sum(positions))
    total, flops, cost = 0.0, 0, model_flops(model)
    sparse = [block for block in model.decoder.blocks if block.is_sparse]
    visits = torch.zeros(len(sparse), model.config.moe.n_experts if sparse else 0)  # (L, E)
    for batch in batches:
        batch = batch.to(run.device)
        if flags.jitter:
            batch = batch._replace(images=jitter(batch.images))
        with precision(run.device, run.dtype):
            out = model.loss(batch)
        loss = out.total / n_tokens
        share = out.n_tokens / n_tokens
        for routing in out.routings:
            extra = flags.balance * load_balancing_loss(routing, batch.mask)
            extra = extra + flags.z_loss * router_z_loss(routing, batch.mask) + routing.penalty
            loss = loss + share * extra / len(out.routings)
        loss.backward()
        total += loss.item()
        if out.n_tokens:
            flops += cost.of(batch, out)
            for counted, routing in zip(visits, out.routings, strict=True):
                counted += (routing.gates != 0).sum(dim=(0, 1)).cpu()
    total, flops, *counted = run.processes.sum(total, flops, *visits.flatten().tolist())
    visits = torch.tensor(counted).view_as(visits) / n_positions
    return Done(total, int(n_positions), int(flops), visits)
