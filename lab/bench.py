"""How fast: ours beside the same model put together from transformers' modules, and the loader.

    python -m lab.bench train                       a step of phase 3: forward to optimizer
    python -m lab.bench generate                    greedy answers, batches of 1 and 8
    python -m lab.bench loader --data slake:DIR     reading images beside training on them
    python -m lab.bench memory --preset phi2        what training takes of a GPU: lab/memory.py
    python -m lab.bench kernels                     the sparse layer's matmuls: lab/bench_kernels.py

train, generate: same weights, same batches, same precision; the other model is Assembled below
(pip install transformers). --preset mid --batch-size 8 --steps 2: 111 M random parameters.
In each round every way is timed once; medians over the rounds, without the first, which warms up.
Ratios are computed within a round. The last line is JSON. Letters are those of config.py.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import config as configs
import model as models
import ops
from config import Common, ModelConfig, MoEConfig, UserError, argument, flag, preset
from data import Batch, Dataset, Sample, Text, collate, encode_prompt
from engine.cli import at_least, parse, user_errors
from engine.inference import prepare
from engine.published import clip_table, decoder_table, load_published, rename, slots
from model import MedMoE, autocast, choose_device
from sources.images import Images
from sources.load import load_samples, reading
from vision import normalise

MID = ModelConfig(
    configs.VisionConfig(112, 16, width=512, n_layers=7, n_heads=8, d_ff=2048),
    configs.DecoderConfig("phi", 1024, 512, 12, 8, 2048, rotary_dim=32, max_len=512),
)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class BenchConfig(Common):
    """Measure speeds on this machine."""

    what: Literal["train", "generate", "loader"] = argument("what to measure")
    preset: str = flag("tiny", "dimensions of the model; train, generate: also mid")
    router: str = flag("random", "of the sparse blocks: a name or FILE.py:Class")
    rounds: int = flag(5, "repetitions, interleaved")
    steps: int = flag(10, "training steps in a round")
    new_tokens: int = flag(64, "generate: tokens an answer")


# Timing, also for lab/bench_kernels.py and lab/cost.py


def interleave(ways: dict[Any, Callable], rounds: int, device=CPU) -> dict[Any, list[float]]:
    """Call each way once a round -> its seconds, one value a round. The first round warms up."""
    seconds: dict[Any, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            seconds[name].append(seconds_of(run, device))
    return {name: values[1:] for name, values in seconds.items()}


def seconds_of(run: Callable, device: torch.device) -> float:
    """On a GPU by its own clock, and with an L2 cache that holds none of the operands."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.zeros(1 << 29, dtype=torch.uint8, device=device)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """a / b, round by round."""
    return summary([x / y for x, y in zip(a, b, strict=True)])


def show(values: dict[str, float], digits: int = 2) -> str:
    return "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(**values, d=digits)


def machine(device: torch.device, dtype: torch.dtype) -> dict:
    """What speeds depend on beside the code."""
    return {"device": str(device), "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(), "torch": torch.__version__}  # fmt: skip


# Models and batches, also for lab/cost.py


def upcycle(model: MedMoE, moe: MoEConfig) -> None:
    """Make it sparse, its routers initialised wide enough that every expert gets tokens."""
    models.make_sparse(model, moe)
    for block in model.decoder.blocks:
        if block.is_sparse:
            nn.init.normal_(block.mlp.router.proj.weight)


def stepper(model: nn.Module, dtype: torch.dtype) -> Callable[[Batch], None]:
    """-> a function that takes one training step on a batch."""
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
    """--steps batches of --data, in the order of training."""
    images = Images(config.vision.image_size)
    data = Dataset(read(flags), text, config, plain=False, images=images)
    order = data.epoch(flags.batch_size or 64, flags.seed, 0)[: flags.steps]
    return [data.batch(rows) for rows in order]


# The same model from transformers' modules


class SparseMLP(nn.Module):
    """transformers' MixtralSparseMoeBlock over copies of the decoder's own MLP, and a meta expert.

    fp32 softmax, top-k, gates rescaled, a loop over the experts that get tokens, index_add.
    """

    def __init__(self, mlp: nn.Module, d_model: int, moe: MoEConfig):
        super().__init__()
        self.top_k = moe.top_k
        self.gate = nn.Linear(d_model, moe.n_experts)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(moe.n_experts))
        self.meta = mlp

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        rows = x.flatten(0, 1)  # (N, D)
        with torch.autocast(x.device.type, enabled=False):  # our routers use fp32 as well
            probs = self.gate(rows.float()).softmax(dim=-1)  # (N, E)
        top_p, top_e = probs.topk(self.top_k, dim=-1)  # both (N, k)
        if self.top_k > 1:
            top_p = top_p / top_p.sum(dim=-1, keepdim=True)
        with torch.no_grad():
            routed = nn.functional.one_hot(top_e, len(self.experts)).permute(2, 1, 0)  # (E, k, N)
            used = routed.sum(dim=(1, 2)).nonzero().flatten().tolist()
        y = self.meta(rows)
        for e in used:
            place, row = torch.where(routed[e])  # both (n,): of the tokens routed to expert e
            out = self.experts[e](rows[row]) * top_p[row, place, None]
            y.index_add_(0, row, out.to(y.dtype))
        return y.view_as(x)


def their_parts(v: configs.VisionConfig, d: configs.DecoderConfig) -> tuple[nn.Module, nn.Module]:
    """transformers' tower and decoder, as the library has them.

    In its favour the tower lacks its last layer: the last hidden state is the hidden_states[-2]
    that is read. Padding is routed too, as its blocks do not pass the mask to an FFN.
    """
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
    """A sparse model of ours, weights copied, in transformers' modules; experts and meta learn.

    CLIPVisionModel -> Linear, GELU, Linear -> masked_scatter into the token embeddings, as
    transformers' Llava does -> Phi, StableLM or Llama for causal language modelling.
    """

    def __init__(self, ours: MedMoE):
        super().__init__()
        config, projector = ours.config, copy.deepcopy(ours.projector)
        self.vision, self.decoder = their_parts(config.vision, config.decoder)
        self.projector = nn.Sequential(projector.fc1, nn.GELU(), projector.fc2)
        for layer in models.sparse_layers(config, config.moe):
            block = self.decoder.model.layers[layer]
            block.mlp = SparseMLP(block.mlp, config.decoder.d_model, config.moe)
        copy_weights(ours, self)
        for name, param in self.named_parameters():
            param.requires_grad_(".mlp.experts." in name or ".mlp.meta." in name)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Token embeddings (B, T, D), patches where they belong, and the mask."""
        is_patch = batch.ids == configs.IMAGE_ID  # (B, T)
        x = self.decoder.get_input_embeddings()(batch.ids.masked_fill(is_patch, 0))
        with torch.no_grad():  # the frozen tower and projector keep no graph
            states = self.vision(batch.images).last_hidden_state  # (n_images, P + 1, W)
            patches = self.projector(states[:, 1:])  # (n_images, P, D)
        x = x.masked_scatter(is_patch[..., None], patches.to(x.dtype))
        return {"inputs_embeds": x, "attention_mask": batch.mask.long()}

    def loss(self, batch: Batch) -> models.Loss:
        """Cross-entropy; transformers has it as a mean."""
        inputs = self.inputs(batch)
        mean = self.decoder(**inputs, labels=batch.labels, use_cache=False).loss
        return models.Loss(mean, 1, [])

    @torch.no_grad()
    def answer(self, batch: Batch, dtype: torch.dtype, n: int) -> Tensor:
        """(B, n) greedy tokens, without a test for the end; batch is padded on the left."""
        with autocast(batch.ids.device, dtype):
            inputs = self.inputs(batch)
            return self.decoder.generate(**inputs, do_sample=False, max_new_tokens=n)


@torch.no_grad()
def copy_weights(ours: MedMoE, theirs: Assembled) -> None:
    """Every tensor by its published name; what transformers has no name for, by SparseMLP's."""
    table = clip_table(ours.config.vision) | decoder_table(ours.config.decoder)
    for their_name, our_name in decoder_table(ours.config.decoder).items():
        for place, our_place in (("experts.{}", "experts[{}]"), ("meta", "meta")):
            if ".mlp." in their_name:  # a dense FFN's
                deeper = their_name.replace(".mlp.", f".mlp.{place}.")
                table[deeper] = our_name.replace(".mlp.", f".mlp.{our_place}.")
    table["model.layers.{}.mlp.gate.*"] = "decoder.blocks.{}.mlp.router.proj.*"
    places = slots(ours, ("vision.", "decoder."), by_expert=True)
    for prefix, part in (("vision_model.", theirs.vision), ("", theirs.decoder)):
        for name, param in part.named_parameters():
            if our_name := rename(prefix + name.removeprefix(prefix), table):
                param.copy_(places.pop(our_name))
    assert not places, f"weights that were not copied: {list(places)}"


# What is measured


def both(flags: BenchConfig, device: torch.device) -> tuple[MedMoE, Assembled, Text]:
    """A sparse model that trains what phase 3 does; theirs with its weights; a tokenizer."""
    torch.manual_seed(flags.seed)
    chosen = preset("tiny" if flags.preset == "mid" else flags.preset)
    if chosen.llm is None:
        raise UserError(f"--preset {flags.preset}: comes without weights and tokenizer")
    model = MedMoE(MID if flags.preset == "mid" else chosen.model)
    if flags.preset != "mid":
        load_published(model, chosen.model, chosen.clip, chosen.llm)
    upcycle(model, MoEConfig(router=flags.router))
    models.freeze_all_but(model, configs.EXPERTS_AND_META)
    ops.place_experts(model.to(device), device)
    return model, Assembled(model).to(device), Text(chosen.llm)


def compare(ours: Callable, theirs: Callable, n: int, rounds: int, title: str, device) -> dict:
    """n tokens each -> tokens a second, and how many times as fast ours is."""
    seconds = interleave({"ours": ours, "transformers": theirs}, rounds, device)
    speeds = {name: summary([n / s for s in row]) for name, row in seconds.items()}
    ratio = ratios(seconds["transformers"], seconds["ours"])
    for name, values in speeds.items():
        print(f"{title}, {name:<13}{show(values, 0)} tokens/s")
    print(f"{title}: ours is {show(ratio)} times as fast")
    return {"tokens_per_s": speeds, "ratio": ratio}


def bench_train(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    ours, theirs, text = both(flags, device)
    found = [batch.to(device) for batch in batches(flags, text, ours.config)]
    steps = stepper(ours.train(), dtype), stepper(theirs.train(), dtype)
    ways = [lambda step=step: [step(batch) for batch in found] for step in steps]
    n_tokens = sum(int(batch.mask.sum()) for batch in found)
    return compare(*ways, n_tokens, flags.rounds, "train", device)


def bench_generate(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """Full answers, image and prompt included; neither side stops at an end of sentence."""
    ours, theirs, text = both(flags, device)
    for model in (ours, theirs):
        model.eval().requires_grad_()  # as loaded; autocast keeps no copies of frozen weights
    prepare(ours, device, dtype)  # as load_model does
    samples, n, result = read(flags), flags.new_tokens, {}
    for size in (1, 8):
        batch = prompts(samples[:size], text, ours.config).to(device)
        ways = partial(answer, ours, batch, dtype, n), partial(theirs.answer, batch, dtype, n)
        title = f"batch {size}"
        result[f"batch_{size}"] = compare(*ways, size * n, flags.rounds, title, device)
    return result


def bench_loader(flags: BenchConfig, device: torch.device, dtype: torch.dtype) -> dict:
    """Images decoded, padded, resized and normalised with 1 and 2 threads, and trained on."""
    chosen = preset(flags.preset)
    model = MedMoE(chosen.model)
    load_published(model, chosen.model, chosen.clip, chosen.llm)
    models.freeze_all_but(model.to(device).train(), ("projector.*", "decoder.*", "vision.*"))
    step = stepper(model, dtype)
    found = [b.to(device) for b in batches(flags, Text(chosen.llm), chosen.model)]
    different = list(dict.fromkeys(s.image for s in read(flags) if s.image is not None))

    def load(threads: int) -> None:
        images = Images(chosen.model.vision.image_size)
        with ThreadPoolExecutor(threads) as pool:
            for pixels in pool.map(images.read, different):
                normalise(pixels[None])

    ways = {"1 thread": lambda: load(1), "2 threads": lambda: load(2),
            "training": lambda: [step(batch) for batch in found]}  # fmt: skip
    amounts = [len(different), len(different), sum(len(batch.images) for batch in found)]
    timed, rates = interleave(ways, flags.rounds, device), {}
    for (name, seconds), n in zip(timed.items(), amounts, strict=True):
        rates[name] = summary([n / s for s in seconds])
    for name, values in rates.items():
        ratio = values["median"] / rates["training"]["median"]
        print(f"{name:<10}{show(values, 0)} images/s, {ratio:.1f} x training")
    return {"images_per_s": rates}


@user_errors
def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["memory"], ["kernels"]):
        from lab import bench_kernels, memory  # which import this file

        return {"memory": memory, "kernels": bench_kernels}[argv[0]].main(argv[1:])
    flags = parse(BenchConfig, argv, "lab.bench")
    at_least(flags, rounds=1, steps=1, new_tokens=1, batch_size=1)
    device, dtype = choose_device(flags.device, flags.dtype)
    ops.choose(flags.kernels, device)
    measure = {"train": bench_train, "generate": bench_generate, "loader": bench_loader}
    result = measure[flags.what](flags, device, dtype)
    result |= {"flags": configs.to_dict(flags)} | machine(device, dtype)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
