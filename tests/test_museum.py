"""The answers to course/museum: the check that finds each bug, its repair, and where it was seen.

python -m pytest tests/test_museum.py

A thread named here reports or fixes the same mistake; the code of the exhibits is our own.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pytest
from contract import Case, failures
from test_router import CHECKS, LEVELS

MUSEUM = Path(__file__).parent.parent / "course" / "museum"


class Answer(NamedTuple):
    """`check` finds the bug; `repair` are pairs of what to replace and by what."""

    name: str
    check: str
    repair: tuple[tuple[str, str], ...]
    seen: str


ANSWERS = {
    "switch.py": Answer(
        "Switch",
        "a_task_gradient_reaches_the_router",
        (
            ("    sums_to_one = True\n", ""),
            ("        top_p = top_p /", "        if self.top_k > 1:\n            top_p = top_p /"),
        ),
        "A top-1 gate divided by itself is 1 and has no gradient: jingyaogong/minimind#858 and "
        "#859, NVIDIA/Megatron-LM#894 (softmax after top-1).",
    ),
    "noisy.py": Answer(
        "NoisyTopK",
        "evaluation_is_deterministic",
        (("+ spread", "+ self.training * spread"),),
        "Noise outside training: deepspeedai/DeepSpeed#8620, eduardzamfir/MoCE-IR#19.",
    ),
    "mixture.py": Answer(
        "Mixture",
        "a_sure_router_says_so",
        (("top.softmax(dim=-1)", "top / top.sum(dim=-1, keepdim=True)"),),
        "A softmax of a softmax is nearly flat: huggingface/transformers#45120 (there the balance "
        "loss reads it, here the gates), ByteDance-Seed/VeOmni#715.",
    ),
    "balanced.py": Answer(
        "Balanced",
        "padding_is_not_looked_at",
        ((".mean(dim=(0, 1))", "[mask].mean(dim=0)"),),
        "Padding in the balance loss: huggingface/transformers#28505, NVIDIA/Megatron-LM#2121.",
    ),
    "even.py": Answer(
        "Even",
        "a_penalty_teaches",
        (("(gates > 0).float()[mask]", "gates[mask]"),),
        "A loss of counts has no gradient: CASIA-LMC-Lab/AnomalyMoE#1.",
    ),
    "loss_free.py": Answer(
        "LossFree",
        "an_update_moves_choices_and_not_weights",
        (
            ("logits.sigmoid() + self.bias", "logits.sigmoid()"),
            ("scores.topk", "(scores + self.bias).topk"),
        ),
        "The bias of the selection in the gates: huggingface/transformers#41647 and #41663, "
        "vllm-project/vllm#12002.",
    ),
    "loss_free_ema.py": Answer(
        "LossFreeEMA",
        "all_that_counts_is_in_the_state_dict",
        (("self.bias = torch.zeros(n_experts)", 'self.register_buffer("bias", 0 * self.load)'),),
        "A bias that is trained and not saved: pytorch/torchtitan#1222 and #1226 (there a buffer "
        "was replaced rather than changed in place).",
    ),
    "counted.py": Answer(
        "Counted",
        "activation_checkpointing_changes_nothing",
        (
            ("        if self.training:\n", ""),
            ("            self.visits += (gates != 0)[mask].sum(dim=0)\n", ""),
            ("self.visits.mean() - self.visits", "visits.mean() - visits"),
        ),
        "Visits counted twice under activation checkpointing: pytorch/torchtitan#1593, "
        "NVIDIA-NeMo/Automodel#3247.",
    ),
    "capacity.py": Answer(
        "Capacity",
        "a_sample_is_routed_alone_as_in_a_batch",
        (
            (
                "        wanted =",
                "        if not self.training:\n            return gates\n        wanted =",
            ),
        ),
        "First come, first served over the whole batch, so that answers of late samples go "
        "without, also in evaluation: no public thread found that reports this effect. Seen in our "
        "own reading of deepspeed/moe/sharded_moe.py at deepspeedai/DeepSpeed 27d3016 "
        "(top2gating, and topkgating with drop_policy 'position', where it is an option).",
    ),
    "expert_choice.py": Answer(
        "ExpertChoice",
        "padding_is_not_looked_at",
        (
            (
                "logits.softmax(dim=-1)  # (B, T, E)",
                "logits.softmax(dim=-1).masked_fill(~mask[..., None], -1.0)  # (B, T, E)",
            ),
            ("n_tokens, n_experts = logits.shape[1:]", "n_experts = logits.shape[-1]"),
            (
                "math.ceil(self.top_k * n_tokens / n_experts)",
                "(mask.sum(dim=1) * self.top_k / n_experts).ceil()[:, None, None]",
            ),
            ("import math\n\n", ""),
        ),
        "Padding takes seats: NVIDIA/Megatron-LM#5542, marin-community/marin#8953.",
    ),
    "context.py": Answer(
        "Context",
        "a_causal_router_does_not_look_ahead",
        (("class Context(Router):\n", "class Context(Router):\n    causal = False\n"),),
        "A mean over the sample shows the future to a language model: asked in Shwai-He/MEO#2; "
        "of expert choice in piotrpiekos/MoSA#3 and allenai/OLMoE#46.",
    ),
    "by_name.py": Answer(
        "ByName",
        "another_process_decides_the_same",
        (("enumerate(set(MODALITIES))", "enumerate(MODALITIES)"),),
        "Labels numbered in the order of a set: tkipf/pygcn#41, google-deepmind/dmvr#6 (neither "
        "is about experts).",
    ),
    "half.py": Answer(
        "Half",
        "close_calls_are_decided_in_fp32",
        ((".to(torch.bfloat16)", ""), (", self.top_k).float()", ", self.top_k)")),
        "Probabilities in bf16 before the choice: ViperEkura/AstrAI#57, databricks/megablocks#91, "
        "vllm-project/vllm#14027.",
    ),
    "sharp.py": Answer(
        "Sharp",
        "a_causal_router_does_not_look_ahead",
        (("softmax(dim=1)", "softmax(dim=-1)"),),
        "A softmax over the positions: deepspeedai/DeepSpeed#2110 (of the coefficients that mix "
        "the experts with a dense layer).",
    ),
    "tracked.py": Answer(
        "Tracked",
        "a_penalty_asked_twice_is_the_same",
        (
            ("self.calls.append(logits", "return (logits"),
            ("        return torch.stack(self.calls).sum()\n", ""),
        ),
        "Losses kept until somebody clears them: databricks/megablocks#119; counted twice under "
        "activation checkpointing: NVIDIA/Megatron-LM#1330 and #1514.",
    ),
}


@pytest.fixture(scope="module")
def repaired(tmp_path_factory):
    """The folder of the exhibits after their repair."""
    folder = tmp_path_factory.mktemp("repaired")
    for file, answer in ANSWERS.items():
        text = (MUSEUM / file).read_text()
        for old, new in answer.repair:
            assert old in text, f"{file} has no {old!r} to be repaired"
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


@lru_cache
def company(folder):
    """Every exhibit before and after the repair, so that two processes can judge them all."""
    return tuple(f"{d / f}:{a.name}" for d in (MUSEUM, folder) for f, a in ANSWERS.items())


def test_the_museum_has_an_answer_for_every_exhibit():
    readme = (MUSEUM / "README.md").read_text()
    assert {path.name for path in MUSEUM.glob("*.py")} == ANSWERS.keys()
    assert all(f"`{file}:{answer.name}`" in readme for file, answer in ANSWERS.items())


@pytest.mark.parametrize("file", ANSWERS)
def test_the_named_check_finds_the_bug(file, repaired):
    answer = ANSWERS[file]
    case = Case(f"{MUSEUM / file}:{answer.name}", "token", company(repaired))
    found = failures(case, [check for check in CHECKS if check.__name__ == answer.check])
    assert answer.check in found, f"{answer.check} passes on {file}"
    assert found[answer.check].startswith("AssertionError"), found[answer.check]


@pytest.mark.parametrize("file", ANSWERS)
def test_the_repaired_exhibit_keeps_the_whole_contract(file, repaired):
    for level in LEVELS:
        case = Case(f"{repaired / file}:{ANSWERS[file].name}", level, company(repaired))
        assert failures(case, CHECKS) == {}, "the repair does not do"
