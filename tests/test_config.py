"""Presets, phases and flags as published, and configs that survive JSON."""

import json
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest

import config
from config import (
    PRESETS,
    DecoderConfig,
    MoEConfig,
    Preset,
    Recipe,
    TrainConfig,
    UserError,
    VisionConfig,
    argument,
    model_config,
    named_layers,
    one_line,
    to_dict,
    warn_once,
)

CLIP_L = VisionConfig(336, 14, 1024, 24, 16, 4096)
CLIP_TINY = VisionConfig(112, 16, 128, 6, 4, 512)
DECODERS = {  # rotary_dim, rope_theta, max_len, dropout, n_kv_heads, norm_eps, tied
    "tiny": ("phi", 1024, 128, 4, 4, 512, 12, 1e4, 512, 0.0, None, 1e-5, False),
    "tiny-stablelm": ("stablelm", 1024, 128, 4, 4, 344, 8, 1e4, 512, 0.0, None, 1e-5, False),
    "phi2": ("phi", 51200, 2560, 32, 32, 10240, 32, 1e4, 2048, 0.1, None, 1e-5, False),
    "stablelm2": ("stablelm", 100352, 2048, 24, 32, 5632, 16, 1e4, 4096, 0.0, None, 1e-5, False),
    "smollm2": ("llama", 49152, 576, 30, 9, 1536, 64, 1e5, 8192, 0.0, 3, 1e-5, True),
}
PAPER = [(1e-3, 1, 64), (2e-5, 3, 64), (2e-5, 9, 64)]  # Table 11
SMALL = [(3e-3, 1, 64), (1e-3, 2, 64), (1e-3, 0.25, 64)]
LONG = [(1e-3, 10, 64), (1e-3, 24, 64), (5e-4, 4, 64)]


def test_presets_have_the_published_sizes_and_recipes():
    assert PRESETS.keys() == DECODERS.keys()
    for name, preset in PRESETS.items():
        is_tiny = name.startswith("tiny")
        assert preset.model.vision == (CLIP_TINY if is_tiny else CLIP_L)
        assert preset.model.decoder == DecoderConfig(*DECODERS[name])
        assert preset.model.system == ("" if is_tiny else config.LLAVA_SYSTEM)
        for found, wanted in ((preset.recipes, SMALL), (preset.long, LONG)):
            rows = wanted if is_tiny else PAPER
            assert found == {n: Recipe(*row) for n, row in enumerate(rows, 1)}
        assert bool(preset.clip) == bool(preset.llm) == is_tiny
    assert (CLIP_TINY.n_patches, CLIP_L.n_patches) == (49, 576)
    assert config.preset("phi2") is PRESETS["phi2"]
    with pytest.raises(UserError, match=r"--preset huge.*phi2"):
        config.preset("huge")


def test_phases_and_special_ids_are_those_of_the_paper_and_llava():
    assert (config.IMAGE_ID, config.IGNORE) == (-200, -100)
    assert config.MODALITIES == ("CT", "MRI", "X-ray", "pathology")
    assert MoEConfig() == MoEConfig(4, 2, "modality", "token", "preserving", None, True)
    phases = {n: (p.task, p.plain) for n, p in config.PHASES.items()}
    assert phases == {1: ("captions", True), 2: ("instructions", False), 3: ("vqa", False)}


def test_the_default_of_every_flag():
    assert to_dict(TrainConfig()) == {
        "data": [], "device": "auto", "batch_size": None, "max_missing": 0, "image_folder": None,
        "router_labels": None, "lang": "en", "dtype": "auto", "kernels": "auto", "seed": 0,
        "json": None, "phase": 3, "preset": "tiny", "out": None, "init": None, "resume": False,
        "router": "modality", "steps": None, "clip": None, "llm": None, "router_level": "token",
        "router_images": 1000, "router_noise": 0.0, "experts": 4, "top_k": 2, "meta": True,
        "moe_layers": "every-second", "start": "preserving", "trains": "paper", "balance": 0.0,
        "z_loss": 0.0, "tune_vision": None, "jitter": None, "lr": None, "epochs": None,
        "accumulate": 1, "clip_grad": 1.0, "workers": 2, "cache_features": False, "cache_gb": 20.0,
        "compile": False, "activation_checkpointing": False, "weights": "float32", "lora_rank": 0,
        "expert_parallel": 1, "save_every": 200, "keep": 2, "eval": True,
    }  # fmt: skip
    assert all(f.metadata["help"] and f.metadata["group"] in config.GROUPS
               for f in fields(TrainConfig))  # fmt: skip


def test_arguments_stand_without_a_flag_before_the_flags_of_their_parent():
    @dataclass(frozen=True)
    class Ask(config.Common):
        where: str = argument("a place")
        maybe: str | None = argument("another", optional=True)

    assert Ask(where="x").maybe is None and Ask("data", where="x").data == "data"
    assert [f.name for f in fields(Ask) if f.metadata.get("positional")] == ["where", "maybe"]
    with pytest.raises(TypeError, match="where"):
        Ask()


def test_configs_cannot_be_changed():
    classes = [c for c in vars(config).values() if is_dataclass(c)]
    assert {VisionConfig, Preset, Recipe, TrainConfig} < set(classes)
    assert all(c.__dataclass_params__.frozen for c in classes)


def test_a_config_survives_its_way_through_json():
    dense = replace(PRESETS["phi2"].model, system="Hi.")
    for moe in (None, MoEConfig(), MoEConfig(top_k=1, level="sequence", layers=(1, 3))):
        values = json.loads(json.dumps(to_dict(replace(dense, moe=moe))))
        assert model_config(values) == replace(dense, moe=moe)
    values["decoder"]["colour"] = 1
    with pytest.raises(TypeError, match="colour"):
        model_config(values)


@pytest.mark.parametrize(
    ("name", "layers"),
    [("every-second", None), ("first-half", (0, 1)), ("second-half", (2, 3, 4)), ("3", (3,)),
     ("all", (0, 1, 2, 3, 4)), ("4,0,2,2", (0, 2, 4))],
)  # fmt: skip
def test_sparse_layers_are_named_or_numbered_and_all_must_be_there(name, layers):
    assert named_layers(name, 5) == layers
    for wrong in ("5", "-1", "", "1,", "half", "1;2"):
        with pytest.raises(UserError, match=f"--moe-layers {wrong}: every-second.* below 5 "):
            named_layers(wrong, 5)


@pytest.mark.parametrize(
    ("text", "most", "line"),
    [("a\n\tb\x1b[1mc", (99,), "a b [1mc"), ("abcd", (4,), "abcd"), ("abcde", (4,), "abcd ..."),
     ("    x   y", (4,), "x"),  # of an endless text only the beginning is looked at
     ("x" * 2000, (), "x" * 2000), ("x" * 2001, (), "x" * 2000 + " ...")],
)  # fmt: skip
def test_text_of_files_is_printed_as_one_short_line(text, most, line):
    assert one_line(text, *most) == line


def test_a_warning_is_printed_once_and_to_stderr(capsys):
    warn_once.cache_clear()
    for _ in range(2):
        warn_once("mind\nthe gap")
    assert capsys.readouterr() == ("", "warning: mind the gap\n")
