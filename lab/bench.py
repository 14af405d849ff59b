"""How fast: ours beside the same model in transformers' modules, the loader, and the kernels.

    python -m lab.bench train                       a step of phase 2: forward to optimizer
    python -m lab.bench generate                    greedy answers, batches of 1 and 8
    python -m lab.bench loader --data slake:DIR     reading images beside training on them
    python -m lab.bench kernels --gpu-check         the sparse layer and, on a GPU, its kernels

train, generate: same weights, batches and precision as Assembled (pip install transformers).
kernels: experts alone, as a default run has them (fp32 weights, matmuls in bf16), compared with
their definition before they are timed. --gpu-check prints JSON for each case, then a table for
cuda/README.md, in about eight minutes. Ends with JSON.
"""

import copy
import ctypes
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import config as configs
import model as models
import ops
from config import Common, ModelConfig, UserError, argument, flag, preset
from data import Batch, Dataset, Sample, Text, collate, encode_prompt
from engine import casts
from engine.cli import parse, user_errors
from engine.inference import prepare
from engine.published import clip_table, decoder_table, load_published, rename, slots
from model import MedMoE, autocast, choose_device
from moe import MLP, Experts, GatedMLP
from sources.images import Images
from sources.load import load_samples, reading
from vision import normalise

MID = ModelConfig(
    configs.VisionConfig(112, 16, width=512, n_layers=7, n_heads=8, d_ff=2048),
    configs.DecoderConfig("phi", 1024, 512, 12, 8, 2048, rotary_dim=32, max_len=512),
)
CPU = torch.device("cpu")
SIZES = (1024, 4096, 16384, 65536)  # tokens, on a GPU
LARGE = 4096  # tokens from which on the aims hold
LIMIT = 400  # seconds after which --gpu-check begins no further case
SMALL = "gpu and not many and not more and not 2_to_the_31 and not 4096 and not 2560"
N_EXPERTS, K = 4, 2
SIDE = 8192  # of the ladder's matrices
PHASE_2 = "projector.*", "decoder.*"  # what it trains


@dataclass(frozen=True)
class BenchConfig(Common):
    """Measure speeds on this machine."""

    lacks = ("json",)
    what: Literal["train", "generate", "loader", "kernels"] = argument("what to measure")
    preset: str | None = flag(None, "dimensions: tiny, kernels phi2; train, generate: also mid")
    rounds: int = flag(5, "repetitions, interleaved; of kernels on a GPU ten times", least=1)
    steps: int = flag(10, "training steps in a round", least=1)
    new_tokens: int = flag(64, "generate: tokens an answer", least=1)
    tokens: int | None = flag(None, f"kernels: tokens (default: 2048, on a GPU {SIZES})", least=1)
    gpu_check: bool = flag(False, "kernels: tests, sanitizers, presets and routings, on a GPU")


def interleave(ways: dict[Any, Callable], rounds: int, device=CPU) -> dict[Any, list[float]]:
    """Call each way once a round -> its seconds, one value a round. The first round warms up."""
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            if device.type != "cuda":
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
                continue
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.zeros(1 << 29, dtype=torch.uint8, device=device)  # L2 without the operands
            first.record()
            run()
            last.record()
            last.synchronize()
            seconds[name].append(first.elapsed_time(last) / 1e3)
    return {name: values[1:] for name, values in seconds.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    return summary([x / y for x, y in zip(a, b, strict=True)])


def show(values: dict[str, float], digits: int = 2) -> str:
    return "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(**values, d=digits)


def machine(device: torch.device, dtype: torch.dtype) -> dict:
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip


def stepper(model: nn.Module, dtype: torch.dtype) -> Callable[[Batch], None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> None:
        with autocast(batch.ids.device, dtype):
            loss = model.loss(batch)
        (loss.total / loss.n_tokens).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def answer(model: MedMoE, batch: Batch, dtype: torch.dtype, n: int) -> Tensor:
    """(B, n) greedy tokens after each prompt, without a test for the end."""
    with autocast(batch.ids.device, dtype):
        steps = models.generate(model, batch, eos_id=-1, max_new=n)
        return torch.stack([step.tokens for step in steps], dim=1)


def read(flags: Common) -> list[Sample]:
    return load_samples(flags.data or ("phantoms:512",), "vqa", "train", **reading(flags))


def prompts(samples: Sequence[Sample], text: Text, config: ModelConfig) -> Batch:
    encoded = [encode_prompt(s.turns[0][0], s.image is not None, text, config) for s in samples]
    return collate(samples, encoded, Images(config.vision.image_size), text.eos_id, side="left")


def batches(flags: BenchConfig, text: Text, config: ModelConfig) -> list[Batch]:
    data = Dataset(read(flags), text, config, False, Images(config.vision.image_size))
    order = data.epoch(flags.batch_size or 64, flags.seed, 0)[: flags.steps]
    return [data.batch(rows) for rows in order]


def their_parts(v: configs.VisionConfig, d: configs.DecoderConfig) -> tuple[nn.Module, nn.Module]:
    """A tower, in its favour without the last layer, which is not read, and a decoder."""
    try:
        import transformers as hf
    except ImportError as error:
        raise UserError("lab.bench compares with transformers: pip install transformers") from error
    names = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
    tower = dict(zip(names, (v.width, v.n_layers - 1, v.n_heads, v.d_ff), strict=True))
    sizes = dict(zip(names, (d.d_model, d.n_layers, d.n_heads, d.d_ff), strict=True))
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    if d.family == "llama":
        sizes["rms_norm_eps"] = d.norm_eps
    else:
        rope["partial_rotary_factor"] = d.rotary_dim * d.n_heads / d.d_model
        sizes |= {"layer_norm_eps": d.norm_eps, "use_qkv_bias": True,
                  "resid_pdrop": d.dropout, "hidden_dropout": d.dropout}  # fmt: skip
    decoder = hf.AutoConfig.for_model(
        d.family, **sizes, vocab_size=d.vocab_size, num_key_value_heads=d.n_kv_heads or d.n_heads,
        max_position_embeddings=d.max_len, tie_word_embeddings=d.tied, rope_parameters=rope,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    tower = hf.CLIPVisionConfig(**tower, image_size=v.image_size, patch_size=v.patch_size)
    return hf.CLIPVisionModel(tower), hf.AutoModelForCausalLM.from_config(decoder)


class Assembled(nn.Module):
    """A dense model of ours in transformers' modules, weights copied; phase 2 is trained."""

    def __init__(self, ours: MedMoE):
        super().__init__()
        config, projector = ours.config, copy.deepcopy(ours.projector)
        self.vision, self.decoder = their_parts(config.vision, config.decoder)
        self.projector = nn.Sequential(projector.fc1, nn.GELU(), projector.fc2)
        copy_weights(ours, self)
        self.vision.requires_grad_(False)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        is_patch = batch.ids == configs.IMAGE_ID  # (B, T)
        x = self.decoder.get_input_embeddings()(batch.ids.masked_fill(is_patch, 0))
        with torch.no_grad():  # the frozen tower keeps no graph
            states = self.vision(batch.images).last_hidden_state  # (n_images, P + 1, W)
        patches = self.projector(states[:, 1:])  # (n_images, P, D)
        x = x.masked_scatter(is_patch[..., None], patches.to(x.dtype))
        return {"inputs_embeds": x, "attention_mask": batch.mask.long()}

    def loss(self, batch: Batch) -> models.Loss:
        found = self.decoder(**self.inputs(batch), labels=batch.labels, use_cache=False)
        return models.Loss(found.loss, 1, [])

    @torch.no_grad()
    def answer(self, batch: Batch, dtype: torch.dtype, n: int) -> Tensor:
        with autocast(batch.ids.device, dtype):
            return self.decoder.generate(**self.inputs(batch), do_sample=False, max_new_tokens=n)


@torch.no_grad()
def copy_weights(ours: MedMoE, theirs: Assembled) -> None:
    """Every tensor by its published name."""
    table = clip_table(ours.config.vision) | decoder_table(ours.config.decoder)
    places = slots(ours, ("vision.", "decoder."))
    for prefix, part in (("vision_model.", theirs.vision), ("", theirs.decoder)):
        for name, param in part.named_parameters():
            if our_name := rename(prefix + name.removeprefix(prefix), table):
                param.copy_(places.pop(our_name))
    assert not places, f"weights that were not copied: {list(places)}"


def dense(flags: BenchConfig, device: torch.device, trained: Sequence[str]) -> tuple[MedMoE, Text]:
    """A dense model with what is trained of it, and its tokenizer."""
    torch.manual_seed(flags.seed)
    chosen = preset("tiny" if flags.preset == "mid" else flags.preset)
    if chosen.llm is None:
        raise UserError(f"--preset {flags.preset}: comes without weights and tokenizer")
    model = MedMoE(MID if flags.preset == "mid" else chosen.model)
    if flags.preset != "mid":
        load_published(model, chosen.model, chosen.clip, chosen.llm)
    models.freeze_all_but(model.to(device), trained)
    return model, Text(chosen.llm)


def compare(ours: Callable, theirs: Callable, n: int, rounds: int, title: str, device) -> dict:
    """n tokens each -> tokens a second, and how many times as fast ours is."""
    seconds = interleave({"ours": ours, "transformers": theirs}, rounds, device)
    speeds = {name: summary([n / s for s in row]) for name, row in seconds.items()}
    ratio = ratios(seconds["transformers"], seconds["ours"])
    rates = ", ".join(f"{name} {show(values, 0)}" for name, values in speeds.items())
    print(f"{title}: tokens/s: {rates}; ours is {show(ratio)} times as fast")
    return {"tokens_per_s": speeds, "ratio": ratio}


def bench_train(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    ours, text = dense(flags, device, PHASE_2)
    theirs = Assembled(ours).to(device)
    found = [batch.to(device) for batch in batches(flags, text, ours.config)]
    steps = stepper(ours.train(), dtype), stepper(theirs.train(), dtype)
    ways = [lambda step=step: [step(batch) for batch in found] for step in steps]
    n = sum(int(batch.mask.sum()) for batch in found)
    return compare(*ways, n, flags.rounds, "train", device)


def bench_generate(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    ours, text = dense(flags, device, PHASE_2)
    theirs = Assembled(ours).to(device)
    for model in (ours, theirs):
        model.eval().requires_grad_()  # as loaded; autocast keeps no copies of frozen weights
    prepare(ours, device, dtype)  # as load_model does
    samples, n, result = read(flags), flags.new_tokens, {}
    for size in (1, 8):
        batch = prompts(samples[:size], text, ours.config).to(device)
        ways = partial(answer, ours, batch, dtype, n), partial(theirs.answer, batch, dtype, n)
        name = f"batch_{size}"
        result[name] = compare(*ways, size * n, flags.rounds, name, device)
    return result


def bench_loader(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    model, text = dense(flags, device, (*PHASE_2, "vision.*"))
    step, images = stepper(model.train(), dtype), Images(model.config.vision.image_size)
    found = [batch.to(device) for batch in batches(flags, text, model.config)]
    different = list(dict.fromkeys(s.image for s in read(flags) if s.image is not None))

    def load(threads: int) -> None:
        with ThreadPoolExecutor(threads) as pool:
            for pixels in pool.map(images.read, different):
                normalise(pixels[None])

    ways = {"1 thread": lambda: load(1), "2 threads": lambda: load(2),
            "training": lambda: [step(batch) for batch in found]}  # fmt: skip
    rates, n_trained = {}, sum(len(batch.images) for batch in found)
    for name, seconds in interleave(ways, flags.rounds, device).items():
        n = n_trained if name == "training" else len(different)
        rates[name] = summary([n / s for s in seconds])
        print(f"{name:<10}{show(rates[name], 0)} images/s")
    return {"images_per_s": rates}


def gates_of(n: int, routing: str, device: torch.device) -> Tensor:
    """-> gates (N, E), fp32, two of them for each token."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(n, N_EXPERTS, generator=generator)
    if routing == "skewed":
        scores[:, 0] += 1  # the first choice of all tokens: half of all that are routed
    top = scores.topk(K).indices
    values = torch.rand(n, K, generator=generator) + 0.1
    return torch.zeros(n, N_EXPERTS).scatter(1, top, values).to(device)


def experts_of(name: str, device: torch.device) -> Experts:
    decoder = preset(name).model.decoder
    mlp = MLP if decoder.family == "phi" else GatedMLP
    with device:
        experts = Experts(mlp(decoder.d_model, decoder.d_ff), N_EXPERTS)
    for param in experts.parameters():
        nn.init.normal_(param, std=param.shape[-1] ** -0.5)
    return experts


# The definition; sorted, weights cast in every call; the same, cast once a step.
LAYERS = {"loop": Experts, "sorted": ops.SortedExperts, "cast once": casts.CastOnceSortedExperts}


def products(pairs: list[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    outs = [a.new_empty(len(a), b.shape[1]) for a, b in pairs]
    return lambda: [torch.mm(a, b, out=o) for (a, b), o in zip(pairs, outs, strict=True)]


def matmuls(experts: Experts, gates: Tensor, dtype: torch.dtype) -> Callable[[], None]:
    """-> a function that multiplies what the layer multiplies, forward and backward."""
    pairs, like = [], {"device": gates.device, "dtype": dtype}
    for part in experts.children():
        n_out, n_in = part.weight.shape[1:]
        weights = part.weight.detach().to(dtype)
        for weight, n in zip(weights, (gates != 0).sum(dim=0).tolist(), strict=True):
            rows, grad = torch.randn(n, n_in, **like), torch.randn(n, n_out, **like)
            pairs += [(rows, weight.T), (grad, weight), (grad.T, rows)]
    return products(pairs)


def one_way(cls: type[Experts], experts: Experts, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    ops.use_sorted_experts(experts, cls)
    with autocast(inputs[0].device, dtype):
        return experts(*inputs)


def both_ways(cls, experts: Experts, dtype, x: Tensor, gates: Tensor, dy: Tensor) -> list[Tensor]:
    """Forward and backward of the experts, computed by cls -> their output and all gradients."""
    inputs = [x.detach().requires_grad_(), gates.detach().requires_grad_()]
    y = one_way(cls, experts, dtype, *inputs)
    return [y, *torch.autograd.grad(y, [*inputs, *experts.parameters()], dy.to(y))]


def cast_again(experts: Experts, dtype: torch.dtype) -> None:
    """What the first forward after a step does more than others, where weights are cast once."""
    params = [param for param in experts.parameters() if param.dtype != dtype]
    torch.autograd.graph.increment_version(params)
    for param in params:
        casts.cast(param, dtype)


def check(name: str, ours: Tensor, expected: Tensor, most: float) -> float:
    """-> the relative error of a whole tensor. Raises UserError where it is not below `most`."""
    error = ((ours.float() - expected.float()).norm() / expected.float().norm()).item()
    if not error < most:
        raise UserError(f"{name} is wrong: relative error {error:.1e}")
    return error


def bench_layer(experts: Experts, routing: str, n: int, dtype, timer: Callable) -> dict:
    """Each implementation's time, and its ratios to the matmuls alone and to the loop."""
    weight = next(experts.parameters())
    x, dy = torch.randn(2, n, weight.shape[-1], device=weight.device)
    gates, few = gates_of(n, routing, weight.device), gates_of(64, routing, weight.device)
    small = torch.randn(2, 64, weight.shape[-1], device=weight.device)
    run = partial(both_ways, experts=experts, x=small[0], gates=few, dy=small[1])
    exact = run(Experts, dtype=torch.float32)
    error = max(check("the layer", *pair, 0.03) for cls in LAYERS.values()
                for pair in zip(run(cls, dtype=dtype), exact, strict=True))  # fmt: skip
    ways = {"matmuls": matmuls(experts, gates, dtype), "cast": lambda: cast_again(experts, dtype)}
    train = timer(ways | {name: partial(both_ways, cls, experts, dtype, x, gates, dy)
                          for name, cls in LAYERS.items()})  # fmt: skip
    with torch.no_grad():
        answer = timer({name: partial(one_way, cls, experts, dtype, x, gates)
                        for name, cls in LAYERS.items()})  # fmt: skip
    flops = 2 * K * n * sum(part.weight[0].numel() for part in experts.children())
    print(f"layer, {n} tokens, {routing}: {3 * flops / 1e12:.2f} TFLOP, relative error {error:.1e}")
    for what, times, work in (("train", train, 3 * flops), ("answer", answer, flops)):
        for name, seconds in times.items():
            limit = f"{seconds / times['matmuls']:6.2f} x the matmuls" if what == "train" else ""
            rate = "" if name == "cast" else f"{work / seconds / 1e12:9.3f} TFLOP/s"
            print(f"  {what:<8}{name:<10}{seconds * 1e3:10.1f} ms {rate:<17} {limit:<20}"
                  f"{seconds / times['loop']:6.2f} x the loop")  # fmt: skip
    return {"flops": 3 * flops, "seconds": train, "answer_seconds": answer}


def extension() -> ctypes.CDLL:
    """The compiled cuda/, for what is no op of torch: the ladder, and which matmul is chosen."""
    (path,) = (p for p in torch.ops.loaded_libraries if Path(p).name.startswith("medmoe_"))
    return ctypes.CDLL(path)


def on_major(library: ctypes.CDLL, major: int, product: Callable) -> Callable:
    """product, by the grouped matmul of this compute capability: 8 pipelined.cu, 9 gmm.cu."""
    chosen = ctypes.c_int.in_dll(library, "medmoe_major")

    def run() -> Any:
        chosen.value = major
        try:
            return product()
        finally:
            chosen.value = 0

    return run


def bench_ladder(library: ctypes.CDLL, side: int, device: torch.device, timer: Callable) -> dict:
    """The product of two square matrices by each rung of cuda/ladder, and by torch -> TFLOP/s."""
    a, b, c = torch.randn(3, side, side, device=device, dtype=torch.bfloat16)
    offs, is_gpu = torch.tensor([side], dtype=torch.int32, device=device), device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if is_gpu else None
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (a, b, c)]

    def rung(name: str) -> Tensor:
        getattr(library, name)(*pointers, side, side, side, ctypes.c_void_p(stream))
        return c

    def grouped() -> Tensor:
        return ops.forward(a, b[None], None, offs)[0]

    ways = {name: partial(rung, name) for name in ("naive", "tiles", "tensor_cores")}
    ways["pipelined"] = on_major(library, 8, grouped)
    if not is_gpu or torch.cuda.get_device_capability(device)[0] == 9:
        ways["gmm"] = on_major(library, 9, grouped)
    expected = a @ b.T
    for name, run in ways.items():
        check(name, run(), expected, 6e-3)
    rates = {}
    for name, seconds in timer(ways | {"cuBLAS": lambda: torch.mm(a, b.T, out=c)}).items():
        rates[name] = 2 * side**3 / seconds / 1e12
        print(f"  {name:<16}{seconds * 1e3:9.2f} ms {rates[name]:8.3f} TFLOP/s", flush=True)
    return rates


def bench_each(x: Tensor, part: nn.Module, gates: Tensor, timer: Callable) -> dict:
    """x (N, D), part.weight (E, F, D): every kernel checked, and timed beside torch's ways."""
    call, weight, plan = ops.CALL, part.weight.detach(), ops._listed(gates.t() != 0)
    slot, offs = call.route(gates)
    n, sizes = int(offs[-1]), torch.diff(offs, prepend=offs.new_zeros(1)).tolist()
    rows = call.permute(x, slot, n)
    dy = torch.randn(n, weight.shape[1], device=x.device, dtype=x.dtype)
    forward, back = list(zip(rows.split(sizes), weight.mT, strict=True)), dy.split(sizes)
    inputs = list(zip(back, weight, strict=True))
    weights = [(g.T, r) for g, r in zip(back, rows.split(sizes), strict=True)]
    size, flops = x[0].numel() * x.element_size(), 2 * n * weight[0].numel()
    cases = {  # ours, torch's, bytes or FLOPs, largest error, factors of the products
        "route": (lambda: call.route(gates), None, 0, 0, ()),
        "permute": (lambda: call.permute(x, slot, n), lambda: ops.permute(x, plan),
                    (len(x) + n) * size, 1e-6, ()),
        "unpermute": (lambda: call.unpermute(rows, slot, gates),
                      lambda: ops.unpermute(rows, gates, plan), (len(x) + n) * size, 0.01, ()),
        "unpermute_grad": (lambda: call.unpermute_grad(x, rows, slot, gates), None,
                           (len(x) + 2 * n) * size, 0, ()),
        "forward": (lambda: ops.forward(rows, weight, None, offs)[0],
                    lambda: F.grouped_mm(rows, weight.mT, offs=offs), flops, 6e-3, forward),
        "input grad": (lambda: ops.input_grad(dy, weight, offs)[0],
                       lambda: F.grouped_mm(dy, weight, offs=offs), flops, 6e-3, inputs),
        "weight grad": (lambda: ops.weight_grad(dy, rows, offs),
                        lambda: F.grouped_mm(dy.T, rows, offs=offs), flops, 6e-3, weights),
    }  # fmt: skip
    if hasattr(part, "bias"):  # apart: the same kernel, then torch's GELU
        bias = part.bias.detach()
        cases["gelu"] = (lambda: ops.forward(rows, weight, bias, offs, ops.GELU)[0],
                         lambda: F.gelu(ops.forward(rows, weight, bias, offs)[0],
                                        approximate="tanh"), flops, 6e-3, ())  # fmt: skip
    found = {}
    for name, (ours, torchs, work, most, pairs) in cases.items():
        ways = {"ours": ours} | ({"torch": torchs} if torchs else {})
        if pairs:
            ways["loop"] = products(pairs)
        if pairs and x.is_cuda:  # what GPUs from 8.0 to 8.9 have, here too
            ways["mma.sync"] = on_major(extension(), 8, ours)
        if torchs:
            expected = torch.cat([a @ b for a, b in pairs]) if pairs else torchs()
            check(name, ours().flatten(0, -2), expected, most)
        times = timer(ways)
        found[name] = {"work": work, "seconds": times}
        others = [f", {times[k] / times['ours']:.2f} x {k}" for k in ways if k != "ours"]
        rate = f"{work / times['ours'] / 1e12:8.3f} TFLOP/s or TB/s" if work else ""
        print(f"  {name:<16}{times['ours'] * 1e6:9.1f} us {rate}", *others, flush=True)
    return found


def aims(result: dict) -> str:
    """The table "On a GPU" of cuda/README.md, with what was measured."""
    cases = [case for case in result["sizes"] if case["tokens"] >= LARGE]

    def span(digits: int, unit: str, value: Callable, *names: str) -> str:
        """From the least to the most of value(seconds, work), over the cases and these kernels."""
        rows = [case["kernels"][name] for case in cases for name in names
                if name in case.get("kernels", {})]  # fmt: skip
        found = [value(row["seconds"], row["work"]) for row in rows]
        if not found:
            return "not run"
        return f"{min(found):.{digits}f} to {max(found):.{digits}f} {unit}"

    grouped, copied = ("forward", "input grad", "weight grad"), result.get("copy_bytes_per_s", 1)
    checks = result.get("checks", {})
    sanitizers = "; ".join(f"{k} {checks[k]}" for k in ("memcheck", "racecheck") if k in checks)
    ladder = ", ".join(f"{name} {rate:.0f}" for name, rate in result.get("ladder", {}).items())
    layers = [case["layer"]["seconds"] for case in cases]
    layers = [row["cast once"] / row["matmuls"] for row in layers]
    rows = (
        ("all tests of the kernels on the device, outputs poisoned", "pass", checks.get("tests")),
        ("compute-sanitizer memcheck, racecheck", "clean", sanitizers),
        (f"grouped matmul, T ≥ {LARGE:,}: a loop of cuBLAS calls", "≥ 0.95 x",
         span(2, "x", lambda s, _: s["loop"] / s["ours"], *grouped)),
        (f"grouped matmul, T ≥ {LARGE:,}: `F.grouped_mm`", "≥ 1 x",
         span(2, "x", lambda s, _: s["torch"] / s["ours"], *grouped)),
        ("grouped matmul on an H100", "700 TFLOP/s",
         span(0, "TFLOP/s", lambda s, work: work / s["ours"] / 1e12, *grouped)),
        (f"ladder/pipelined.cu, T ≥ {LARGE:,}: a loop of cuBLAS calls", "≥ 0.8 x",
         span(2, "x", lambda s, _: s["loop"] / s["mma.sync"], *grouped)),
        (f"each rung of the ladder, {SIDE} \u00d7 {SIDE}", "faster than the one before",
         ladder and f"{ladder} TFLOP/s"),
        ("permute, unpermute: of a copy's bandwidth", "≥ 85 %",
         span(0, "%", lambda s, work: 100 * work / s["ours"] / copied, "permute", "unpermute")),
        ("first matmul with bias and GELU: apart", "≥ 1.08 x",
         span(2, "x", lambda s, _: s["torch"] / s["ours"], "gelu")),
        (f"routing, T ≥ {LARGE:,}, 4 experts", "≤ 15 µs at 4,096",
         span(1, "µs", lambda s, _: s["ours"] * 1e6, "route")),
        ("the layer, forward and backward, of its matmuls", "≤ 1.10 x",
         f"{min(layers):.2f} to {max(layers):.2f} x" if layers else ""),
    )  # fmt: skip
    table = ["| what | aim | measured |", "|---|---|---|"]
    table += [f"| {what} | {aim} | {value or 'not run'} |" for what, aim, value in rows]
    return "\n".join(table).replace("4,096", "4 096").replace(" x |", " \u00d7 |")


def check_on_gpu() -> dict[str, str]:
    """Run the tests of cuda/ on the GPU, and a part of them under compute-sanitizer."""
    found, tests = {}, [sys.executable, "-m", "pytest", "-q", "tests/test_cuda.py", "-k"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "1", "--tool"]
    for name, seconds in {"tests": 120, "memcheck": 75, "racecheck": 75}.items():
        command = [*tests, "gpu"] if name == "tests" else [*sanitizer, name, *tests, SMALL]
        done = subprocess.run(["timeout", str(seconds), *command], capture_output=True, text=True,
                              cwd=Path(__file__).parent.parent)  # fmt: skip
        ends = {0: "passed", 124: f"not finished in {seconds} s", 127: "not run: not installed"}
        ended = ends.get(done.returncode, "FAILED")
        if ended == "passed" and " passed" not in " ".join(done.stdout.splitlines()[-1:]):
            ended = "FAILED, all was skipped"
        found[name] = f"{ended}: {' '.join(done.stdout.splitlines()[-1:])}"
        print(done.stdout[-3000:] if done.returncode else "", f"{name}: {found[name]}", flush=True)
    return found


def bench_kernels(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    is_gpu, start = device.type == "cuda", time.monotonic()
    result, cases = {"sizes": []}, [(flags.preset, "balanced")]

    def timer(ways: dict[str, Callable], rounds=flags.rounds * (10 if is_gpu else 1)) -> dict:
        timed = interleave(ways, rounds, device)
        return {name: statistics.median(row) for name, row in timed.items()}

    if flags.gpu_check:
        result["checks"] = check_on_gpu()
        cases = [("phi2", "balanced"), ("phi2", "skewed"), ("stablelm2", "balanced")]
    if is_gpu:
        a, b = torch.empty(2, 1 << 31, dtype=torch.uint8, device=device)
        result["copy_bytes_per_s"] = 2 * a.numel() / timer({"copy": lambda: b.copy_(a)})["copy"]
        print(f"copy: {result['copy_bytes_per_s'] / 1e12:.3f} TB/s, read and written")
        if ops.enabled(a):
            few = partial(timer, rounds=flags.rounds)  # the first rung is slow
            result["ladder"] = bench_ladder(extension(), SIDE, device, few)
    sizes = (flags.tokens,) if flags.tokens else SIZES if is_gpu else (2048,)
    for (name, routing), n in itertools.product(cases, sizes):
        print(f"{name}, {routing}, {n} tokens", flush=True)
        if flags.gpu_check and time.monotonic() - start > LIMIT:
            print(f"  not run: {LIMIT} s are over")
            continue
        torch.manual_seed(0)
        experts, found = experts_of(name, device), {"preset": name, "routing": routing, "tokens": n}
        part = copy.deepcopy(next(experts.children())).to(dtype)
        if ops.supports(part.weight):
            x = torch.randn(n, part.weight.shape[-1], device=device, dtype=dtype)
            found["kernels"] = bench_each(x, part, gates_of(n, routing, device), timer)
        found["layer"] = bench_layer(experts, routing, n, dtype, timer)
        result["sizes"].append(found)
        if flags.gpu_check:
            print(json.dumps(found), flush=True)
    if flags.gpu_check:
        print(aims(result))
    return result


@user_errors
def main(argv: list[str] | None = None) -> dict:
    flags = parse(BenchConfig, argv, "python -m lab.bench")
    flags = replace(flags, preset=flags.preset or ("phi2" if flags.what == "kernels" else "tiny"))
    if flags.what == "kernels" and flags.dtype == "auto":
        flags = replace(flags, dtype="bfloat16")
    if flags.gpu_check:
        flags = replace(flags, device="cuda", kernels="cuda")
    device, dtype = choose_device(flags.device, flags.dtype)
    ops.choose(flags.kernels, device)
    measure = {"train": bench_train, "generate": bench_generate, "loader": bench_loader,
               "kernels": bench_kernels}  # fmt: skip
    result = measure[flags.what](flags, device, dtype)
    result |= {"flags": configs.to_dict(flags)} | machine(device, dtype)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
