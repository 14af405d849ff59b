"""The maker of assets/tiny, and what it made."""

import json
import math
from dataclasses import replace

import pytest
import torch

from config import ASSETS, IGNORE, preset
from data import Text, encode_sample
from engine.published import load_published
from lab import pretrain_tiny
from model import MedMoE
from routers import Hints
from sources.load import load_samples


def test_the_contrastive_loss_is_cross_entropy_and_the_same_captions_share_the_target():
    loss, logits = pretrain_tiny.contrastive_loss, torch.full((3, 3), -50.0).fill_diagonal_(50.0)
    assert loss(logits, ["a", "b", "c"]).item() < 1e-6
    assert loss(torch.zeros(3, 3), ["a", "b", "c"]).item() == pytest.approx(math.log(3))
    logits[0, 1] = logits[1, 0] = 50.0
    as_low_as_can_be = 2 / 3 * math.log(2)
    assert loss(logits, ["a", "a", "c"]).item() == pytest.approx(as_low_as_can_be)


def test_it_writes_what_the_loader_of_real_weights_reads(tmp_path):
    pretrain_tiny.main(["--data", "phantoms:24", "--clip-steps", "1", "--lm-steps", "1",
                        "--batch-size", "8", "--out", str(tmp_path)])  # fmt: skip
    for name, family in (("tiny", "phi"), ("tiny-stablelm", "stablelm")):
        config = preset(name).model
        model = MedMoE(config)
        for param in model.parameters():
            param.data.fill_(float("nan"))
        load_published(model, config, tmp_path / "clip", tmp_path / family)
        filled = [n for n, p in model.named_parameters() if not p.isnan().any()]
        assert filled == [n for n, _ in model.named_parameters() if not n.startswith("projector.")]
    log = map(json.loads, (tmp_path / "pretrain.jsonl").read_text().splitlines())
    assert {line["what"] for line in log} == {"phi", "stablelm", "tower"}


@pytest.mark.parametrize("name", ["tiny", "tiny-stablelm"])
def test_the_committed_decoders_answer_from_what_they_have_read(name):
    chosen = preset(name)
    model = MedMoE(chosen.model)
    load_published(model, chosen.model, chosen.clip, chosen.llm)
    text, right = Text(chosen.llm), []
    blind = replace(chosen.model, vision=replace(chosen.model.vision, image_size=0))
    captions = {s.image: s for s in load_samples(("phantoms:20",), "captions", "test")}
    for sample in load_samples(("phantoms:20",), "vqa", "test")[::8]:  # 499 of 3 991 questions
        before = encode_sample(captions[sample.image], text, blind, plain=True)[0]
        ids, labels = encode_sample(sample, text, blind)
        ids = torch.tensor([before + ids])  # (1, T)
        with torch.no_grad():
            hidden, _ = model.decoder(model.decoder.embed(ids), ids >= 0, Hints())
        predicted = model.decoder.lm_head(hidden[0]).argmax(dim=-1)  # (T,)
        answer = [i for i, label in enumerate(labels, len(before)) if label != IGNORE]
        right.append(all(predicted[i - 1] == ids[0, i] for i in answer))
    assert sum(right) / len(right) > 0.95  # guessing the yes-or-no questions alone gives 0.75


def test_the_tokenizer_writes_any_text():
    text = Text(ASSETS / "phi")
    for string in ("Is there a nodule?", "naïve 肺 🫁\n\ttab", "", " two  spaces"):
        assert text.decode(text.encode(string)) == string
    assert len(text.encode("Is there an abnormality?")) <= 6
    assert text.tokenizer.get_vocab_size() <= preset("tiny").model.decoder.vocab_size
