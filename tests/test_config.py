"""Presets, phases and flags as published, and configs that survive JSON."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest

import config
from config import PRESETS, DecoderConfig, MoEConfig, Recipe, TrainConfig, UserError, VisionConfig

CLIP_L = VisionConfig(336, 14, 1024, 24, 16, 4096)
CLIP_TINY = VisionConfig(112, 16, 128, 6, 4, 512)
DECODERS = {  # rotary_dim, rope_theta, max_len, dropout, n_kv_heads, norm_eps, tied
    "tiny": ("phi", 1024, 128, 4, 4, 128, 12, 1e4, 512, 0.0, None, 1e-5, False),
    "tiny-stablelm": ("stablelm", 1024, 128, 4, 4, 88, 8, 1e4, 512, 0.0, None, 1e-5, False),
    "phi2": ("phi", 51200, 2560, 32, 32, 10240, 32, 1e4, 2048, 0.1, None, 1e-5, False),
    "stablelm2": ("stablelm", 100352, 2048, 24, 32, 5632, 16, 1e4, 4096, 0.0, None, 1e-5, False),
    "smollm2": ("llama", 49152, 576, 30, 9, 1536, 64, 1e5, 8192, 0.0, 3, 1e-5, True)}  # fmt: skip
DECODERS["smollm2-tiny"] = DECODERS["smollm2"]
PAPER = [(1e-3, 1, 64), (2e-5, 3, 64), (2e-5, 9, 64)]  # Table 11


def test_presets_phases_and_special_ids_are_those_of_the_papers_and_llava():
    assert {TrainConfig().kernels, TrainConfig().device, TrainConfig().dtype} == {"auto"}
    assert PRESETS.keys() == DECODERS.keys()
    for name, preset in PRESETS.items():
        is_tiny, is_whole = "tiny" in name, name.startswith("tiny")  # tower; decoder too
        assert preset.model.vision == (CLIP_TINY if is_tiny else CLIP_L)
        assert preset.model.decoder == DecoderConfig(*DECODERS[name])
        assert preset.model.system == ("" if is_tiny else config.LLAVA_SYSTEM)
        assert (bool(preset.clip), bool(preset.llm)) == (is_tiny, is_whole)
        if not is_whole:
            wanted = {n: Recipe(*row) for n, row in enumerate(PAPER, 1)}
            assert preset.recipes == preset.long == wanted
    assert (CLIP_TINY.n_patches, CLIP_L.n_patches) == (49, 576)
    with pytest.raises(UserError, match=r"--preset huge.*phi2"):
        config.preset("huge")
    assert (config.IMAGE_ID, config.IGNORE) == (-200, -100)
    assert config.MODALITIES == ("CT", "MRI", "X-ray", "pathology")
    assert MoEConfig() == MoEConfig(4, 2, "modality", "token", "preserving", None, True)
    phases = {n: (p.task, p.plain) for n, p in config.PHASES.items()}
    assert phases == {1: ("captions", True), 2: ("instructions", False), 3: ("tuning", False)}


def test_configs_cannot_be_changed_and_every_flag_has_a_help_in_a_group():
    classes = [c for c in vars(config).values() if is_dataclass(c)]
    assert {VisionConfig, Recipe, TrainConfig} < set(classes)
    assert all(c.__dataclass_params__.frozen for c in classes)
    flags = fields(TrainConfig)
    assert len(flags) > 40
    assert all(f.metadata["help"] and f.metadata["group"] in config.GROUPS for f in flags)


def test_a_config_survives_its_way_through_json():
    dense = replace(PRESETS["phi2"].model, system="Hi.")
    for moe in (None, MoEConfig(), MoEConfig(top_k=1, level="sequence", layers=(1, 3))):
        values = json.loads(json.dumps(config.to_dict(replace(dense, moe=moe))))
        assert config.model_config(values) == replace(dense, moe=moe)
    assert config.model_config(values | {"moe": {"layers": 5}}).moe.layers == 5  # for check_config
    values["decoder"]["colour"] = 1
    with pytest.raises(TypeError, match="colour"):
        config.model_config(values)


def test_sparse_layers_are_named_or_numbered_and_all_must_be_there():
    wanted = {"every-second": None, "first-half": (0, 1), "second-half": (2, 3, 4), "3": (3,),
              "all": (0, 1, 2, 3, 4), "4,0,2,2": (0, 2, 4)}  # fmt: skip
    assert {name: config.named_layers(name, 5) for name in wanted} == wanted
    for wrong in ("5", "-1", "", "1,", "half"):
        with pytest.raises(UserError, match=f"--moe-layers {wrong}: every-second.* below 5 "):
            config.named_layers(wrong, 5)


def test_text_of_files_is_printed_as_one_short_line_and_a_warning_once(capsys):
    assert config.one_line("a\n\tb\x1b[1mc") == "a b [1mc"
    assert (config.one_line("abcd", 4), config.one_line("abcde", 4)) == ("abcd", "abcd ...")
    config.warn_once.cache_clear()
    for _ in range(2):
        config.warn_once("mind\nthe gap")
    assert capsys.readouterr() == ("", "warning: mind the gap\n")
