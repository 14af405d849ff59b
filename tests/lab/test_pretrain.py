"""The maker of assets/tiny."""

from config import preset
from engine.published import load_published
from lab import pretrain_tiny
from model import MedMoE


def test_it_writes_what_the_loader_of_real_weights_reads(tmp_path):
    pretrain_tiny.main(["--data", "phantoms:24", "--clip-steps", "1", "--lm-steps", "1",
                        "--batch-size", "8", "--out", str(tmp_path)])  # fmt: skip
    for name, family in (("tiny", "phi"), ("tiny-stablelm", "stablelm")):
        model = MedMoE(preset(name).model)
        for param in model.parameters():
            param.data.fill_(float("nan"))
        load_published(model, model.config, tmp_path / "clip", tmp_path / family)
        for n, p in model.named_parameters():
            assert p.isnan().any() == n.startswith("projector.")
