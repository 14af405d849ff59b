"""Make assets/tiny: a small CLIP tower, two small decoders and their tokenizer, from phantoms.

    python -m lab.pretrain_tiny                       the committed assets, from phantoms
    python -m lab.pretrain_tiny --data slake:DIR --out DIR2    a tower for other images

The tokenizer is a byte-level BPE; the tower learns with CLIP's contrastive loss beside a small
text tower that is then dropped; the decoders learn to continue captions and questions, without
seeing images. All of it is written in the Hugging Face layout of the real weights, in fp16.

Shapes: B batch, S image side, P patches, W tower width, L caption length, V vocabulary.
"""

import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import tqdm

from config import (
    ASSETS,
    CLIP_TINY,
    IGNORE,
    PHI_TINY,
    STABLELM_TINY,
    DecoderConfig,
    ModelConfig,
    VisionConfig,
    flag,
)
from data import EOS, Encoded, Sample, Text, encode_sample, epoch_batches
from decoder import Decoder
from engine.cli import parse, user_errors
from engine.published import CLIP, PHI, STABLELM
from lab.convert import publish
from routers import Hints
from sources.images import Images
from sources.load import load_samples
from vision import CLIP_MEAN, CLIP_STD, VisionBlock, VisionTower, normalise

# Words that the phantoms' texts lack, so that the tokenizer does not spell out real reports.
RADIOLOGY = """
which what where how many much does do are there is the image picture scan shown seen visible
taken plane axial coronal sagittal transverse contrast weighted T1 T2 flair modality technique
organ system part body region area tissue lung lungs heart liver spleen kidney kidneys stomach
bladder pancreas gallbladder colon rectum esophagus trachea aorta vein artery bone bones rib ribs
spine spinal cord skull brain stem cerebral hemisphere ventricle white gray matter neck chest
thorax abdomen abdominal pelvis pelvic cavity mandible temporal lobe frontal parietal occipital
eye eyes parotid larynx lobe pneumonia effusion pleural pneumothorax cardiomegaly nodule mass
cancer tumor edema hemorrhage infarct infarction stroke fracture atrophy lesion enhancing ring
glioma abnormal abnormality normal healthy disease function effect treat treatment cause symptom
prevent breathing digestion metabolism yes no not both none left right upper lower top bottom
center central side middle front back largest smallest bigger smaller than color black white gray
dark bright irregular circular oval shape density high low hyperdense hypodense opacity opacities
consolidation infiltrate silhouette diaphragm used use take to belong belongs contain contains
main most often main can be by with without from have has had was were been being it its that
these those their they he she his her not any some all more less least very when why who whom if
or and as at for into on out over under between near same different other about after before
during through along across patient located location position side present absent exist exists
appear appears show shows found based following likely kind type name given please describe choose
between options whether size diagnosis sign Which What Where How Does Do Are There Can Is In On
The This Was Were Please Who Why Name Describe one two three four five six seven eight nine ten
number several male female patient old surgery radiation chemotherapy
""".split()  # noqa: SIM905


LM_BATCH = 32  # texts a step of a decoder


@dataclass(frozen=True)
class PretrainConfig:
    data: tuple[str, ...] = flag((), "sources, as in train.py (default: phantoms:16000)")
    out: str = flag(str(ASSETS), "output DIR")
    part: Literal["all", "phi", "stablelm", "tower"] = flag("all", "what to make; tower comes last")
    clip_steps: int = flag(1000, "contrastive steps for the tower")
    lm_steps: int = flag(2000, "steps for each decoder")
    batch_size: int = flag(128, "images a contrastive step")
    seed: int = flag(0, "seeds weights and order")


class TinyCLIP(nn.Module):
    """Both towers and the temperature (Radford et al. 2021, figure 3); text is mean-pooled.

    A caption is matched twice: with CLS after the last layer, as in CLIP, and with the mean patch
    before it, which is what LLaVA reads. A large tower keeps both informed by itself; this small
    one, trained with CLS alone, locates findings in its last layer only.
    """

    def __init__(self, config: VisionConfig, vocab_size: int, max_len: int):
        super().__init__()
        width = config.width
        self.vision = VisionTower(config)
        self.last = VisionBlock(width, config.n_heads, config.d_ff)  # published, never used
        self.ln_post, self.ln_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, width, bias=False)
        self.project_patches = nn.Linear(width, width, bias=False)
        self.embed = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(max_len, width))
        self.text = nn.ModuleList(VisionBlock(width, config.n_heads, 2 * width) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, ids: Tensor) -> list[Tensor]:
        """images (B, 3, S, S), ids (B, L) padded with -1 -> logits by CLS, logits by patches.

        Both (B, B), images by captions.
        """
        x = self.vision.hidden(images)  # (B, P + 1, W)
        cls = self.project(self.ln_post(self.last(x)[:, 0]))  # (B, W)
        patches = self.project_patches(self.ln_patches(x[:, 1:].mean(dim=1)))  # (B, W)
        real = (ids >= 0)[..., None]  # (B, L, 1)
        x = self.embed(ids.clamp(min=0)) * real + self.positions[: ids.shape[1]]  # (B, L, W)
        for block in self.text:
            x = block(x)
        text = F.normalize(((x * real).sum(1) / real.sum(1)).float(), dim=-1)  # (B, W)
        scale = self.scale.exp().clamp(max=100)
        return [scale * F.normalize(image.float(), dim=-1) @ text.T for image in (cls, patches)]


def contrastive_loss(logits: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric loss; images with the same caption share the target."""
    number = {caption: i for i, caption in enumerate(captions)}
    which = torch.tensor([number[caption] for caption in captions])
    target = (which[:, None] == which).float()
    target = target / target.sum(dim=1, keepdim=True)  # (B, B)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's: any text can be written, the frequent words in one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def grid_positions(config: VisionConfig) -> Tensor:
    """(P + 1, W) sines and cosines of each patch's row and column; zeros for CLS.

    As large as the patches' contents from the start. With CLIP's 0.02 they are 30 times smaller,
    and after 1400 steps a linear probe of the mean patch had 56 % accuracy on left or right.
    """
    side, quarter = config.image_size // config.patch_size, config.width // 4
    at = torch.arange(side)[:, None] / 4 ** (torch.arange(quarter) / (quarter - 1) * 4 - 1)
    wave = torch.cat([at.sin(), at.cos()], dim=1)  # (side, W / 2)
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (P, W)
    return torch.cat([torch.zeros(1, config.width), grid]) * 0.5


def initialise(module: nn.Module) -> None:
    """GPT-2's normal(0, 0.02) for matrices and embeddings, zero biases."""
    for name, param in module.named_parameters():
        if param.dim() >= 2 or name.endswith(("cls", "positions")):
            nn.init.normal_(param, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(param)


class Log:
    """One JSON line every 50 steps, on the disk at once."""

    def __init__(self, path: Path, flags: PretrainConfig):
        self.path = path
        if flags.part == "all":
            path.unlink(missing_ok=True)
        values = {name: value for name, value in asdict(flags).items() if name != "out"}
        self.write(flags=values, torch=torch.__version__, threads=torch.get_num_threads())

    def write(self, **values) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")


def steps(params: Iterator[nn.Parameter], n: int, lr: float, title: str, log: Log) -> Iterator:
    """n optimizer steps: yields a function to call with each step's loss, and what else to log."""
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    bar = tqdm(range(n), desc=title, file=sys.stderr, mininterval=2)
    start = time.time()
    for step in bar:
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / n))

        def update(loss: Tensor, step: int = step, rate: float = rate, **also) -> None:
            loss.backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
            optimizer.param_groups[0]["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}")
            if step % 50 == 0 or step == n - 1:
                seconds = round(time.time() - start)
                log.write(what=title, step=step, loss=loss.item(), s=seconds, **also)

        yield update


def pretrain_tower(flags: PretrainConfig, samples: list[Sample], text: Text, log: Log) -> TinyCLIP:
    torch.manual_seed(flags.seed)
    images = Images(CLIP_TINY.image_size, pad=True)
    captions = [sample.turns[0][1] for sample in samples]
    encoded = [torch.tensor(text.encode(caption)) for caption in captions]
    model = TinyCLIP(CLIP_TINY, PHI_TINY.vocab_size, max_len=max(map(len, encoded)))
    initialise(model)
    # Captions that differ in one word must differ from the start: with embeddings as small as the
    # other weights, words and image features get next to no gradient from each other.
    nn.init.normal_(model.embed.weight)
    model.vision.positions.data.copy_(grid_positions(CLIP_TINY))
    order = random.Random(flags.seed)
    for update in steps(model.parameters(), flags.clip_steps, 1e-3, "tower", log):
        rows = order.choices(range(len(samples)), k=flags.batch_size)
        batch = normalise(torch.stack([images.get(samples[r]) for r in rows]))  # (B, 3, S, S)
        ids = nn.utils.rnn.pad_sequence([encoded[r] for r in rows], True, padding_value=-1)
        with torch.autocast("cpu", torch.bfloat16):
            both = model(batch, ids)
        texts = [captions[r] for r in rows]
        loss = sum(contrastive_loss(logits, texts) for logits in both) / 2
        right = [
            sum(texts[h] == s for h, s in zip(logits.argmax(1), texts, strict=True))
            for logits in both
        ]
        update(loss, right=right)
    return model


def endless_batches(lengths: list[int], batch_size: int, seed: int) -> Iterator[list[int]]:
    for epoch in itertools.count():
        yield from epoch_batches(lengths, batch_size, seed, epoch)


def pretrain_decoder(
    flags: PretrainConfig, config: DecoderConfig, texts: list[Encoded], log: Log
) -> Decoder:
    """Language modelling: every token is predicted from those before it, answers count twice."""
    torch.manual_seed(flags.seed)
    # torch's own initialisation. GPT-2's 0.02 is small for 128 channels: with it the StableLM block
    # still guessed yes-or-no questions about organ, side, height and number after 2000 steps.
    decoder = Decoder(config)
    rows = endless_batches([len(ids) for ids, _ in texts], LM_BATCH, flags.seed)
    for update in steps(decoder.parameters(), flags.lm_steps, 2e-3, config.family, log):
        chosen = [texts[r] for r in next(rows)]
        ids, labels = (
            nn.utils.rnn.pad_sequence(
                [torch.tensor(each[part][: config.max_len]) for each in chosen], True, IGNORE
            )
            for part in (0, 1)
        )  # both (B, T)
        mask = ids >= 0
        with torch.autocast("cpu", torch.bfloat16):
            hidden, _ = decoder(decoder.embed(ids.clamp(min=0)), mask, Hints())  # (B, T, D)
            logits = decoder.lm_head(hidden[:, :-1][mask[:, 1:]])  # (n, V), of real positions only
        losses = F.cross_entropy(logits.float(), ids[:, 1:][mask[:, 1:]], reduction="none")  # (n,)
        answers = losses[labels[:, 1:][mask[:, 1:]] != IGNORE].mean()
        update(losses.mean() + answers, answers=answers.item())
    return decoder


def write(directory: Path, config: dict, tensors: dict[str, Tensor]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_tower(directory: Path, model: TinyCLIP, sources: list[str]) -> None:
    c = CLIP_TINY
    config = {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
        "image_size": c.image_size, "patch_size": c.patch_size, "hidden_size": c.width,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "intermediate_size": c.d_ff, "projection_dim": c.width, "torch_dtype": "float16",
        "pretrained_on": sources,
    }  # fmt: skip
    last = f"vision.blocks.{c.n_layers - 1}"
    tower = {f"vision.{name}": p for name, p in model.vision.named_parameters()}
    tower |= {f"{last}.{name}": p for name, p in model.last.named_parameters()}
    tensors = publish(tower, CLIP)
    for name, param in model.ln_post.named_parameters():
        tensors[f"vision_model.post_layernorm.{name}"] = param.detach().half()
    write(directory, config, tensors)
    side = c.image_size
    (directory / "preprocessor_config.json").write_text(json.dumps({
        "image_processor_type": "CLIPImageProcessor", "do_resize": True, "do_center_crop": True,
        "do_normalize": True, "do_rescale": True, "do_convert_rgb": True, "resample": 3,
        "size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side},
        "rescale_factor": 1 / 255, "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }, indent=1) + "\n")  # fmt: skip


def write_decoder(directory: Path, decoder: Decoder, text: Text) -> None:
    c = decoder.config
    config = {
        "model_type": c.family, "vocab_size": c.vocab_size, "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_heads, "intermediate_size": c.d_ff,
        "partial_rotary_factor": c.rotary_dim / (c.d_model // c.n_heads),
        "rope_theta": c.rope_theta, "max_position_embeddings": c.max_len, "layer_norm_eps": 1e-5,
        "hidden_act": "gelu_new" if c.family == "phi" else "silu", "tie_word_embeddings": False,
        "bos_token_id": text.eos_id, "eos_token_id": text.eos_id, "torch_dtype": "float16",
    }  # fmt: skip
    config |= {"resid_pdrop": c.dropout} if c.family == "phi" else {"use_qkv_bias": True}
    tensors = {f"decoder.{name}": p for name, p in decoder.named_parameters()}
    write(directory, config, publish(tensors, PHI if c.family == "phi" else STABLELM))


def make_decoders(
    flags: PretrainConfig, out: Path, captions: list[Sample], dialogues: list[Sample], log: Log
) -> None:
    """The tokenizer, then both decoders, on each caption followed by questions about it.

    So they learn to answer questions about a text, as Phi-2 can; phases 1 and 2 then train them to
    answer from image patches.
    """
    raw = [f"{q} {a}" for sample in captions + dialogues for q, a in sample.turns]
    words = [f"{before}{word}" for word in RADIOLOGY for before in (" ", "")]
    tokenizer = train_tokenizer([*raw, *4 * words, "USER: \n ASSISTANT:"], PHI_TINY.vocab_size)
    configs = [c for c in (PHI_TINY, STABLELM_TINY) if flags.part in ("all", c.family)]
    for config in configs:
        (out / config.family).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / config.family / "tokenizer.json"))
    text = Text(out / configs[0].family)
    blind = ModelConfig(replace(CLIP_TINY, image_size=0), configs[0])
    before = {s.image: encode_sample(s, text, blind, plain=True)[0] for s in captions}
    texts = []
    for sample in dialogues:  # no patches: the place of the image is empty
        caption, (ids, labels) = before[sample.image], encode_sample(sample, text, blind)
        texts.append((caption + ids, [IGNORE] * len(caption) + labels))
    for config in configs:
        write_decoder(out / config.family, pretrain_decoder(flags, config, texts, log), text)


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(PretrainConfig, argv, "python -m lab.pretrain_tiny")
    out, specs = Path(flags.out), flags.data or ("phantoms:16000",)
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "pretrain.jsonl", flags)
    captions = load_samples(specs, "captions", "train")
    print(f"{len(captions)} captions, {asdict(flags)}")
    if flags.part != "tower":
        make_decoders(flags, out, captions, load_samples(specs, "instructions", "train"), log)
    if flags.part in ("all", "tower"):
        tower = pretrain_tower(flags, captions, Text(out / "phi"), log)
        write_tower(out / "clip", tower, list(specs))


if __name__ == "__main__":
    main()
