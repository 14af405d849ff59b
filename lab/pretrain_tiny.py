"""Make assets/tiny: a small CLIP tower, two small decoders and their tokenizer, from phantoms.

    python -m lab.pretrain_tiny                       the committed assets, from phantoms
    python -m lab.pretrain_tiny --data slake:DIR --out DIR2    a tower for other images

The tokenizer is a byte-level BPE; the decoders learn to continue captions and questions, without
seeing images; the tower learns with CLIP's contrastive loss beside a small text tower that is then
dropped. All is written in the Hugging Face layout, in fp16. L caption length, else as config.py.
"""

import itertools
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from tqdm import trange

from config import ASSETS, CLIP_TINY, IGNORE, PHI_TINY, STABLELM_TINY, ModelConfig, flag
from data import EOS, Sample, Text, encode_sample, epoch_batches
from decoder import Decoder
from engine.cli import parse, user_errors
from engine.published import CLIP, DECODERS
from lab.convert import publish
from routers import Hints
from sources import signs
from sources.images import Images
from sources.load import load_samples
from sources.questions import SIGN, word
from vision import VisionBlock, VisionTower, normalise

LM_BATCH = 32  # texts a step of a decoder
# Words that the phantoms' texts lack, so that the tokenizer does not spell out real reports.
WORDS = Path(__file__).with_name("radiology_words.txt")


@dataclass(frozen=True)
class PretrainConfig:
    """Make the small tower, decoders and tokenizer."""

    data: tuple[str, ...] = flag((), "sources, as in train.py (default: phantoms:16000)")
    out: str = flag(str(ASSETS), "output DIR")
    clip_steps: int = flag(1000, "contrastive steps for the tower", least=1)
    lm_steps: int = flag(4000, "steps for each decoder", least=1)
    batch_size: int = flag(128, "images a contrastive step", least=1)
    seed: int = flag(0, "seeds weights and order")


def train(model: nn.Module, losses: Iterator, n: int, lr: float, title: str, log: Path) -> None:
    """n optimizer steps, a JSON line every 50 steps."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    for step in trange(n, desc=title):
        loss = next(losses)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        rate = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / n))
        optimizer.param_groups[0]["lr"] = lr * rate
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == n - 1:
            line = json.dumps({"what": title, "step": step, "loss": loss.item()})
            with log.open("a") as file:
                file.write(line + "\n")


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's: any text can be written, the frequent words in one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))  # fmt: skip
    return tokenizer


def make_decoders(flags: PretrainConfig, captions: list[Sample], log: Path) -> None:
    """The tokenizer, then both decoders, on each caption followed by questions about it."""
    dialogues, out = load_samples(flags.data, "instructions", "train"), Path(flags.out)
    turns = [turn for sample in captions + dialogues for turn in sample.turns]
    raw = [f"USER: {q} ASSISTANT: {a}" for q, a in turns if " sign" not in q]
    words = [f"{before}{word}" for word in WORDS.read_text().split() for before in (" ", "")]
    # All signs alike, few times: their syllables become tokens, but no name a token of its own.
    named = [word(random.Random(i), SIGN["open"], i % 2, sign=name)[0]
             for i, name in enumerate([*signs.names(), *signs.names()])]  # fmt: skip
    meanings = [f"ASSISTANT: {name}" for name in 4 * signs.MEANINGS]
    texts = [*raw, *4 * words, *named, *meanings]
    tokenizer = train_tokenizer(texts, PHI_TINY.vocab_size)
    for config in (PHI_TINY, STABLELM_TINY):
        directory = out / config.family
        directory.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(directory / "tokenizer.json"))
        text, blind = Text(directory), ModelConfig(replace(CLIP_TINY, image_size=0), config)
        before = {s.image: encode_sample(s, text, blind, plain=True)[0] for s in captions}
        texts = []
        for sample in dialogues:  # no patches: the place of the image is empty
            caption, (ids, labels) = before[sample.image], encode_sample(sample, text, blind)
            texts.append((caption + ids, [IGNORE] * len(caption) + labels))
        torch.manual_seed(flags.seed)  # torch's own initialisation: 0.02 is small for 128 channels
        decoder = Decoder(config)
        losses = language(decoder, texts, flags.seed)
        train(decoder, losses, flags.lm_steps, 2e-3, config.family, log)
        tensors = {f"decoder.{name}": p for name, p in decoder.named_parameters()}
        write(out, config.family, publish(tensors, DECODERS[config.family]))


def language(decoder: Decoder, texts: Sequence, seed: int) -> Iterator[Tensor]:
    """Losses: every token is predicted from those before it, answers count twice."""
    lengths, longest = [len(ids) for ids, _ in texts], PHI_TINY.max_len
    for epoch in itertools.count():
        for chosen in epoch_batches(lengths, LM_BATCH, seed, epoch):
            rows = [[torch.tensor(part[:longest]) for part in texts[r]] for r in chosen]
            ids, labels = (nn.utils.rnn.pad_sequence(part, True, IGNORE)
                           for part in zip(*rows, strict=True))  # fmt: skip
            mask = ids >= 0  # (B, T)
            following = mask[:, 1:]
            with torch.autocast("cpu", torch.bfloat16):
                hidden, _ = decoder(decoder.embed(ids.clamp(min=0)), mask, Hints())  # (B, T, D)
                logits = decoder.lm_head(hidden[:, :-1][following])  # (n, V), of real positions
            losses = F.cross_entropy(logits.float(), ids[:, 1:][following], reduction="none")
            answers = losses[labels[:, 1:][following] != IGNORE].mean()
            yield losses.mean() + answers


def write(out: Path, name: str, tensors: dict[str, Tensor], **changed) -> None:
    """Weights beside the JSON files of assets/tiny, whose sizes they have."""
    (out / name).mkdir(parents=True, exist_ok=True)
    for file in (ASSETS / name).glob("*config.json"):
        text = json.loads(file.read_text()) | (changed if file.name == "config.json" else {})
        (out / name / file.name).write_text(json.dumps(text, indent=1) + "\n")
    save_file(tensors, out / name / "model.safetensors", metadata={"format": "pt"})


class TinyCLIP(nn.Module):
    """Both towers and the temperature (Radford et al. 2021, figure 3); text is mean-pooled.

    A caption is matched with CLS after the last layer and with the mean patch before it, which is
    what LLaVA reads: with CLS alone a small tower locates findings in its last layer only.
    """

    def __init__(self, max_len: int):
        super().__init__()
        width, n_heads = CLIP_TINY.width, CLIP_TINY.n_heads
        self.vision = VisionTower(CLIP_TINY)
        self.last = VisionBlock(width, n_heads, CLIP_TINY.d_ff)  # published, never used
        self.ln_post, self.ln_patches = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project = nn.Linear(width, width, bias=False)
        self.project_patches = nn.Linear(width, width, bias=False)
        self.embed = nn.Embedding(PHI_TINY.vocab_size, width)
        self.positions = nn.Parameter(torch.zeros(max_len, width))
        self.text = nn.ModuleList(VisionBlock(width, n_heads, 2 * width) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for name, param in self.named_parameters():  # GPT-2's normal(0, 0.02), zero biases
            if param.dim() >= 2 or name.endswith(("cls", "positions")):
                nn.init.normal_(param, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(param)
        nn.init.normal_(self.embed.weight)  # captions that differ in a word differ from the start
        self.vision.positions.data.copy_(grid_positions())

    def forward(self, images: Tensor, ids: Tensor) -> list[Tensor]:
        """images (B, 3, S, S), ids (B, L), padding -1 -> two logits (B, B), by CLS and patches."""
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


def grid_positions() -> Tensor:
    """(P + 1, W) sines and cosines of each patch's row and column, as large as its contents."""
    side, quarter = CLIP_TINY.image_size // CLIP_TINY.patch_size, CLIP_TINY.width // 4
    at = torch.arange(side)[:, None] / 4 ** (torch.arange(quarter) / (quarter - 1) * 4 - 1)
    wave = torch.cat([at.sin(), at.cos()], dim=1)  # (side, W / 2)
    rows, columns = wave[:, None].expand(-1, side, -1), wave[None].expand(side, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).flatten(0, 1)  # (P, W)
    return torch.cat([torch.zeros(1, CLIP_TINY.width), grid]) * 0.5


def contrastive_loss(logits: Tensor, captions: list[str]) -> Tensor:
    """CLIP's symmetric loss; images with the same caption share the target."""
    which = torch.tensor([captions.index(caption) for caption in captions])
    target = (which[:, None] == which).float()
    target = target / target.sum(dim=1, keepdim=True)  # (B, B)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def contrast(model: TinyCLIP, samples: list[Sample], text: Text, n: int, seed: int) -> Iterator:
    """Losses of n samples."""
    images, order = Images(CLIP_TINY.image_size, pad=True), random.Random(seed)
    while True:
        chosen = order.choices(samples, k=n)
        texts = [sample.turns[0][1] for sample in chosen]
        batch = normalise(torch.stack([images.get(sample) for sample in chosen]))  # (B, 3, S, S)
        ids = [torch.tensor(text.encode(caption)) for caption in texts]
        with torch.autocast("cpu", torch.bfloat16):
            both = model(batch, nn.utils.rnn.pad_sequence(ids, True, padding_value=-1))
        yield sum(contrastive_loss(logits, texts) for logits in both) / 2


def make_tower(flags: PretrainConfig, samples: list[Sample], log: Path) -> None:
    torch.manual_seed(flags.seed)
    text = Text(Path(flags.out) / "phi")
    model = TinyCLIP(max(len(text.encode(sample.turns[0][1])) for sample in samples))
    losses = contrast(model, samples, text, flags.batch_size, flags.seed)
    train(model, losses, flags.clip_steps, 1e-3, "tower", log)
    tower = {f"vision.{name}": p for name, p in model.vision.named_parameters()}
    for name, param in model.last.named_parameters():
        tower[f"vision.blocks.{CLIP_TINY.n_layers - 1}.{name}"] = param
    tensors = publish(tower, CLIP)
    for name, param in model.ln_post.named_parameters():
        tensors[f"vision_model.post_layernorm.{name}"] = param.detach().half()
    write(Path(flags.out), "clip", tensors, pretrained_on=list(flags.data))


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(PretrainConfig, argv, "python -m lab.pretrain_tiny")
    flags = replace(flags, data=flags.data or ("phantoms:16000",))
    log = Path(flags.out) / "pretrain.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    captions = load_samples(flags.data, "captions", "train")
    make_decoders(flags, captions, log)
    make_tower(flags, captions, log)


if __name__ == "__main__":
    main()
