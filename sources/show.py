"""What a model reads of a source: python -m sources.show --data table:FILE.csv

Prints the first samples as text, with what is learnt in [[ ]], and saves their images as they are
after preprocessing; then counts, the longest samples and whatever is odd. Nothing is trained.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import PIL.Image

from config import IGNORE, IMAGE_ID, PHASES, Common, ModelConfig, UserError, flag, preset
from data import Encoded, Sample, Text, encode_sample
from engine.cli import parse, user_errors
from sources.images import Images
from sources.load import ends, load_samples, reading

MANY = 10**9  # so many images and records may be bad: they are named, and the rest is shown
MAX_CHECKED = 2000  # images that are looked at for their grey values


@dataclass(frozen=True)
class ShowConfig(Common):
    """Show what a model reads of a source."""

    lacks = ("device", "batch_size", "dtype", "kernels", "seed", "json", "max_missing", "max_bad")
    max_missing: int = MANY
    max_bad: int = MANY
    phase: Literal[1, 2, 3] = flag(3, "captions, dialogues or questions, as phase 1, 2 or 3")
    preset: str = flag("tiny", "whose image size and length")
    llm: str | None = flag(None, "DIR of the tokenizer (default: the preset's)")
    samples: int = flag(3, "how many are printed")
    out: str = flag("runs/show", "DIR for their images")


def marked(encoded: Encoded, text: Text) -> str:
    """Token ids as text: [[what is learnt]], <image: 49 patches>."""
    parts = []
    pairs = zip(*encoded, strict=True)
    for (is_image, is_learnt), run in groupby(pairs, lambda p: (p[0] == IMAGE_ID, p[1] != IGNORE)):
        ids = [i for i, _ in run]
        if is_image:
            parts.append(f"<image: {len(ids)} patches>")
        else:
            words = text.tokenizer.decode(ids, skip_special_tokens=False)
            parts.append(f"[[{words}]]" if is_learnt else words)
    return "".join(parts)


def shares(samples: Sequence[Sample], field: str) -> str:
    """CT 12, MRI 3, none 1"""
    counts = Counter(getattr(s, field) or "none" for s in samples)
    return ", ".join(f"{name} {n}" for name, n in counts.most_common())


def oddities(splits: dict[str, list[Sample]], images: Images) -> list[str]:
    """What a user should look at, a line each."""
    found = []
    every = [s for samples in splits.values() for s in samples]
    places: dict = {}
    for s in every:
        if s.image is not None:
            places.setdefault(s.image, set()).add(s.split)
    shared = [image for image, names in places.items() if len(names) > 1]
    found.append((len(shared), "images are in more than one split"))
    answers: dict = {}
    for s in every:
        answers.setdefault((s.image, s.turns[0][0], s.split), []).append(s.turns[0][1])
    again = [a for a in answers.values() if len(a) > 1]
    found.append((len(again), "questions are asked again about the same image in a split; "
                  f"{sum(len(set(a)) > 1 for a in again)} with another answer"))  # fmt: skip
    found.append((sum(s.image is None for s in every), "samples have no image"))
    flat = 0
    for s in {s.image: s for s in every if s.image is not None}.values():
        if len(images.kept) == MAX_CHECKED:
            break
        pixels = images.get(s)
        flat += bool(pixels.max() == pixels.min())
    found.append((flat, f"images are of one grey value (of {len(images.kept)} looked at)"))
    return [f"{n} {what}" for n, what in found if n]


def show_samples(
    samples: Sequence[Sample], text: Text, config: ModelConfig, flags: ShowConfig, images: Images
) -> None:
    """The first ones, then the longest, and how many are cut."""
    encoded = []
    for s in samples:
        try:
            encoded.append(encode_sample(s, text, config, PHASES[flags.phase].plain))
        except UserError as error:
            print(f"nothing to learn: {error}")
            encoded.append(([], []))
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    own = {s.image.resolve() for s in samples if isinstance(s.image, Path)}
    for n, s in enumerate(samples[: flags.samples]):
        print(f"\n{s.source} {s.split} {s.id}: {s.modality or 'no modality'}, "
              f"{s.answer_type or 'no answer type'}, {len(encoded[n][0])} positions")  # fmt: skip
        print(marked(encoded[n], text))
        if s.image is not None:
            file = Path(flags.out) / f"{n}.png"
            if file.resolve() in own:
                raise UserError(f"--out {flags.out}: {file} is an image of the data")
            PIL.Image.fromarray(images.get(s).permute(1, 2, 0).numpy()).save(file)
            print(f"image: {ends(s.image)[0]} -> {file}")
    order = sorted(range(len(samples)), key=lambda n: -len(encoded[n][0]))[:3]
    longest = ", ".join(f"{samples[n].id} ({len(encoded[n][0])})" for n in order)
    print(f"\nlongest: {longest} positions; the model reads {config.decoder.max_len}")


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(ShowConfig, argv, "python -m sources.show")
    if not flags.data:
        raise UserError("--data: name a source (sources/README.md)")
    chosen = preset(flags.preset)
    if (folder := flags.llm or chosen.llm) is None:
        raise UserError(f"--llm: name the tokenizer's folder for --preset {flags.preset}")
    images = Images(chosen.model.vision.image_size, pad=flags.phase != 1)
    splits: dict[str, list[Sample]] = {}
    faults = []
    for split in ("train", "val", "test"):
        try:
            splits[split] = load_samples(flags.data, "vqa", split, **reading(flags))
        except UserError as error:
            faults.append(f"no {split} split: {error}")
    if not any(splits.values()):
        raise UserError(faults[0])
    if faults:
        print(*faults, sep="\n", file=sys.stderr)
    task = PHASES[flags.phase].task
    samples = load_samples(flags.data, task, next(s for s in splits if splits[s]), **reading(flags))
    show_samples(samples, Text(folder), chosen.model, flags, images)
    for split, part in splits.items():
        n_images = len({s.image for s in part} - {None})
        by_kind = "; ".join(shares(part, field) for field in ("modality", "answer_type") if part)
        print(f"{split}: {len(part)} questions, {n_images} images; {by_kind}")
    for line in oddities(splits, images):
        print(f"odd: {line}")


if __name__ == "__main__":
    main()
