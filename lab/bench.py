"""How fast: ours beside the same model put together from transformers' modules, and the loader.

    python -m lab.bench train                       a step of phase 3: forward to optimizer
    python -m lab.bench generate                    greedy answers, batches of 1 and 8
    python -m lab.bench loader --data slake:DIR     reading images beside training on them
    python -m lab.bench memory --preset phi2        what training takes of a GPU: lab/memory.py
    python -m lab.bench kernels                     the sparse layer's matmuls: lab/bench_kernels.py

train, generate: same weights, same batches, same precision; the other model is Assembled below
(pip install transformers). --preset mid --batch-size 8 --steps 2: 111 M random parameters.
In each round every way is timed once; medians over the rounds, without the first, which warms up.
Ratios are computed within a round. The last line is JSON.

Shapes: B batch, T positions, P patches, W tower width, D d_model, N = B*T, E experts, k experts per
token, R tokens routed to one expert.
"""

import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import ops
from config import (
    EXPERTS_AND_META,
    IMAGE_ID,
    Common,
    DecoderConfig,
    ModelConfig,
    MoEConfig,
    UserError,
    VisionConfig,
    argument,
    flag,
    preset,
    to_dict,
)
from data import Batch, Dataset, Sample, Text, collate, encode_prompt
from engine.cli import at_least, parse, user_errors
from engine.inference import prepare
from engine.published import clip_table, decoder_table, load_published, slots
from lab.convert import publish
from model import (
    MedMoE,
    autocast,
    choose_device,
    freeze_all_but,
    generate,
    make_sparse,
    sparse_layers,
)
from sources.images import Images
from sources.load import load_samples, reading
from vision import normalise

MID = ModelConfig(
    VisionConfig(image_size=112, patch_size=16, width=512, n_layers=7, n_heads=8, d_ff=2048),
    DecoderConfig("phi", 1024, 512, 12, 8, 2048, rotary_dim=32, max_len=512),
)


@dataclass(frozen=True)
class BenchConfig(Common):
    """Measure speeds on this machine."""

    what: Literal["train", "generate", "loader"] = argument("what to measure")
    preset: str = flag("tiny", "dimensions of the model; train, generate: also mid")
    router: str = flag("random", "of the sparse blocks: a name or FILE.py:Class")
    rounds: int = flag(5, "repetitions, interleaved")
    steps: int = flag(10, "training steps in a round")
    new_tokens: int = flag(64, "generate: tokens an answer")


# Timing


def interleave(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Call each way once a round -> its seconds, one value a round. The first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(rounds + 1):
        for name, run in ways.items():
            start = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """a / b, round by round."""
    return summary([x / y for x, y in zip(a, b, strict=True)])


def show(values: dict[str, float], digits: int = 2) -> str:
    return "{median:.{d}f} ({min:.{d}f} to {max:.{d}f})".format(**values, d=digits)


def compare(ours: Callable, theirs: Callable, n: int, rounds: int, title: str) -> dict:
    """n tokens each -> tokens a second, and how many times as fast ours is."""
    seconds = interleave({"ours": ours, "transformers": theirs}, rounds)
    speeds = {name: summary([n / s for s in row]) for name, row in seconds.items()}
    ratio = ratios(seconds["transformers"], seconds["ours"])
    for name, values in speeds.items():
        print(f"{title}, {name:<13}{show(values, 0)} tokens/s")
    print(f"{title}: ours is {show(ratio)} times as fast")
    return {"tokens_per_s": speeds, "ratio": ratio}


# Models


def start(flags: BenchConfig) -> tuple[MedMoE, Text]:
    """-> a sparse model that trains what phase 3 does, routers initialised wide; a tokenizer."""
    torch.manual_seed(flags.seed)
    chosen = preset("tiny" if flags.preset == "mid" else flags.preset)
    if chosen.llm is None:
        raise UserError(f"--preset {flags.preset}: comes without weights and tokenizer")
    config = MID if flags.preset == "mid" else chosen.model
    model = MedMoE(config)
    if flags.preset != "mid":
        load_published(model, config, chosen.clip, chosen.llm)
    make_sparse(model, MoEConfig(router=flags.router))
    for name, param in model.named_parameters():
        if name.endswith("router.proj.weight"):
            nn.init.normal_(param)  # wide enough that every expert gets tokens
    freeze_all_but(model, EXPERTS_AND_META)
    device, _ = choose_device(flags.device, flags.dtype)
    ops.place_experts(model, device)
    return model.to(device), Text(chosen.llm)


class SparseMLP(nn.Module):
    """transformers' MixtralSparseMoeBlock over copies of the decoder's own MLP, and a meta expert.

    fp32 softmax, top-k, gates rescaled, a loop over the experts that get tokens, index_add.
    """

    def __init__(self, mlp: nn.Module, d_model: int, n_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(d_model, n_experts)
        self.experts = nn.ModuleList(copy.deepcopy(mlp) for _ in range(n_experts))
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
            place, row = torch.where(routed[e])  # both (R,)
            out = self.experts[e](rows[row]) * top_p[row, place, None]
            y.index_add_(0, row, out.to(y.dtype))
        return y.view_as(x)


def their_parts(v: VisionConfig, d: DecoderConfig) -> tuple[nn.Module, nn.Module]:
    """transformers' tower and decoder, as the library has them.

    In its favour the tower lacks its last layer: the last hidden state is the hidden_states[-2]
    that is read. Padding is routed too, as its blocks do not pass the mask to an FFN.
    """
    try:
        import transformers as hf
    except ImportError as error:
        raise UserError("lab.bench compares with transformers: pip install transformers") from error
    tower = hf.CLIPVisionConfig(
        image_size=v.image_size, patch_size=v.patch_size, hidden_size=v.width,
        num_hidden_layers=v.n_layers - 1, num_attention_heads=v.n_heads, intermediate_size=v.d_ff,
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": d.rope_theta}
    sizes = {
        "vocab_size": d.vocab_size, "hidden_size": d.d_model, "intermediate_size": d.d_ff,
        "num_hidden_layers": d.n_layers, "num_attention_heads": d.n_heads,
        "num_key_value_heads": d.n_kv_heads or d.n_heads, "max_position_embeddings": d.max_len,
        "tie_word_embeddings": d.tied, "rope_parameters": rope,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    if d.family == "llama":
        sizes |= {"rms_norm_eps": d.norm_eps}
    else:
        rope["partial_rotary_factor"] = d.rotary_dim * d.n_heads / d.d_model
        sizes |= {"layer_norm_eps": d.norm_eps, "use_qkv_bias": True,
                  "resid_pdrop": d.dropout, "hidden_dropout": d.dropout}  # fmt: skip
    config = hf.AutoConfig.for_model(d.family, **sizes)
    return hf.CLIPVisionModel(tower), hf.AutoModelForCausalLM.from_config(config)


class Assembled(nn.Module):
    """A sparse model of ours, weights copied, in transformers' modules; experts and meta learn.

    CLIPVisionModel -> Linear, GELU, Linear -> masked_scatter into the token embeddings, as
    transformers' Llava does -> Phi, StableLM or Llama for causal language modelling.
    """

    def __init__(self, ours: MedMoE):
        super().__init__()
        config, moe = ours.config, ours.config.moe
        self.vision, self.decoder = their_parts(config.vision, config.decoder)
        width, d_model = config.vision.width, config.decoder.d_model
        fc1, fc2 = nn.Linear(width, d_model), nn.Linear(d_model, d_model)
        self.projector = nn.Sequential(fc1, nn.GELU(), fc2)
        for layer in sparse_layers(config, moe):
            block = self.decoder.model.layers[layer]
            block.mlp = SparseMLP(block.mlp, d_model, moe.n_experts, moe.top_k)
        copy_weights(ours, self)
        for name, param in self.named_parameters():
            param.requires_grad_(".mlp.experts." in name or ".mlp.meta." in name)

    def embed(self, batch: Batch) -> Tensor:
        """(B, T, D): token embeddings, patches where they belong."""
        is_patch = batch.ids == IMAGE_ID  # (B, T)
        x = self.decoder.get_input_embeddings()(batch.ids.masked_fill(is_patch, 0))
        with torch.no_grad():  # the frozen tower and projector keep no graph
            states = self.vision(batch.images).last_hidden_state  # (n_images, P + 1, W)
            patches = self.projector(states[:, 1:])  # (n_images, P, D)
        return x.masked_scatter(is_patch[..., None], patches.to(x.dtype))

    def loss(self, batch: Batch) -> Tensor:
        """() mean cross-entropy of the supervised tokens."""
        inputs = {"inputs_embeds": self.embed(batch), "attention_mask": batch.mask.long()}
        return self.decoder(**inputs, labels=batch.labels, use_cache=False).loss

    @torch.no_grad()
    def generate(self, batch: Batch, max_new: int) -> Tensor:
        """(B, max_new) greedy tokens, without a test for the end; batch is padded on the left."""
        inputs = {"inputs_embeds": self.embed(batch), "attention_mask": batch.mask.long()}
        return self.decoder.generate(**inputs, do_sample=False, max_new_tokens=max_new)


def copy_weights(ours: MedMoE, theirs: Assembled) -> None:
    """Every tensor by its published name; what transformers has no name for, by SparseMLP's."""
    config = ours.config
    tower = publish(slots(ours, "vision."), clip_table(config.vision), torch.float32)
    tower = {name.removeprefix("vision_model."): t for name, t in tower.items()}
    theirs.vision.load_state_dict(theirs.vision.state_dict() | tower)  # its last norm is not used
    theirs.projector[0].load_state_dict(ours.projector.fc1.state_dict())
    theirs.projector[2].load_state_dict(ours.projector.fc2.state_dict())
    table = {"model.layers.{}.mlp.gate.*": "decoder.blocks.{}.mlp.router.proj.*"}
    for name, our_name in decoder_table(config.decoder).items():
        table[name] = our_name
        if ".mlp." in name:  # a dense FFN's name; of experts and meta expert it is longer
            for place, our_place in (("experts.{}", "experts[{}]"), ("meta", "meta")):
                deeper = name.replace(".mlp.", f".mlp.{place}.")
                table[deeper] = our_name.replace(".mlp.", f".mlp.{our_place}.")
    decoder = publish(slots(ours, "decoder.", by_expert=True), table, torch.float32)
    if config.decoder.tied:
        decoder["lm_head.weight"] = decoder["model.embed_tokens.weight"]
    theirs.decoder.load_state_dict(decoder)


def stepper(model: nn.Module, loss: Callable[[Batch], Tensor], dtype: torch.dtype) -> Callable:
    """-> a function that takes one training step on a batch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)

    def step(batch: Batch) -> None:
        with autocast(batch.ids.device, dtype):
            value = loss(batch)
        value.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def mean_loss(model: MedMoE, batch: Batch) -> Tensor:
    out = model.loss(batch)
    return out.total / out.n_tokens


def prompts(samples: Sequence[Sample], text: Text, config: ModelConfig) -> Batch:
    encoded = [encode_prompt(s.turns[0][0], s.image is not None, text, config) for s in samples]
    return collate(samples, encoded, Images(config.vision.image_size), text.eos_id, side="left")


def batches_of(flags: BenchConfig, text: Text, config: ModelConfig) -> list[Batch]:
    """--steps batches of --data, in the order of training."""
    samples = load_samples(flags.data or ("phantoms:512",), "vqa", "train", **reading(flags))
    images = Images(config.vision.image_size)
    data = Dataset(samples, text, config, plain=False, images=images)
    order = data.epoch(flags.batch_size or 64, flags.seed, 0)[: flags.steps]
    return [data.batch(rows) for rows in order]


# What is measured


def bench_train(flags: BenchConfig) -> dict:
    device, dtype = choose_device(flags.device, flags.dtype)
    ours, text = start(flags)
    theirs = Assembled(ours).to(device)
    batches = [batch.to(device) for batch in batches_of(flags, text, ours.config)]
    steps = [stepper(ours.train(), lambda batch: mean_loss(ours, batch), dtype),
             stepper(theirs.train(), theirs.loss, dtype)]  # fmt: skip
    n_tokens = sum(int(batch.mask.sum()) for batch in batches)
    ways = [lambda step=step: [step(batch) for batch in batches] for step in steps]
    return compare(*ways, n_tokens, flags.rounds, "train")


def bench_generate(flags: BenchConfig) -> dict:
    """Full answers, image and prompt included; neither side stops at an end of sentence."""
    device, dtype = choose_device(flags.device, flags.dtype)
    ours, text = start(flags)
    theirs = Assembled(ours).to(device)
    for model in (ours, theirs):
        model.eval().requires_grad_()  # as loaded; autocast keeps no copies of frozen weights
    prepare(ours, device, dtype)  # as load_model does
    samples, result = load_samples(flags.data or ("phantoms:512",), "vqa", "train"), {}
    for size in (1, 8):
        batch = prompts(samples[:size], text, ours.config).to(device)

        def by_us(batch: Batch = batch) -> None:
            with autocast(device, dtype):
                list(generate(ours, batch, eos_id=-1, max_new=flags.new_tokens))

        def by_them(batch: Batch = batch) -> None:
            with autocast(device, dtype):
                theirs.generate(batch, flags.new_tokens)

        n, title = size * flags.new_tokens, f"batch {size}"
        result[f"batch_{size}"] = compare(by_us, by_them, n, flags.rounds, title)
    return result


def bench_loader(flags: BenchConfig) -> dict:
    """Images decoded, padded, resized and normalised with 1 and 2 threads, and trained on."""
    chosen = preset(flags.preset)
    device, dtype = choose_device(flags.device, flags.dtype)
    model = MedMoE(chosen.model)
    load_published(model, chosen.model, chosen.clip, chosen.llm)
    freeze_all_but(model.to(device).train(), ("projector.*", "decoder.*", "vision.*"))
    step = stepper(model, lambda batch: mean_loss(model, batch), dtype)
    batches = [b.to(device) for b in batches_of(flags, Text(chosen.llm), chosen.model)]
    samples = load_samples(flags.data or ("phantoms:512",), "vqa", "train", **reading(flags))
    different = list(dict.fromkeys(s.image for s in samples if s.image is not None))

    def read(threads: int) -> None:
        images = Images(chosen.model.vision.image_size)
        with ThreadPoolExecutor(threads) as pool:
            for pixels in pool.map(images.read, different):
                normalise(pixels[None])

    ways = {"1 thread": lambda: read(1), "2 threads": lambda: read(2),
            "training": lambda: [step(batch) for batch in batches]}  # fmt: skip
    amounts = [len(different), len(different), sum(len(batch.images) for batch in batches)]
    seconds = interleave(ways, flags.rounds)
    rates = {name: summary([n / s for s in seconds[name]])
             for name, n in zip(ways, amounts, strict=True)}  # fmt: skip
    for name, values in rates.items():
        ratio = values["median"] / rates["training"]["median"]
        print(f"{name:<10}{show(values, 0)} images/s, {ratio:.1f} x training")
    return {"images_per_s": rates}


BENCHES = {"train": bench_train, "generate": bench_generate, "loader": bench_loader}


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
    result = BENCHES[flags.what](flags) | {
        "flags": to_dict(flags), "device": str(device), "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
