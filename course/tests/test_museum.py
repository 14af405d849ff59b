"""The answers to course/museum: the check that finds each bug, its repair, and public reports.

python -m pytest course/tests/test_museum.py

A thread named here reports or fixes the same mistake; the code of the routers is our own.
"""

from pathlib import Path
from typing import NamedTuple

import pytest

from course.tests.test_router import CHECKS, Case, failures

MUSEUM = Path(__file__).parents[1] / "museum"
IN_A_PROCESS = "a_new_process_gives_the_same_gates"


class Answer(NamedTuple):
    """`check` finds the bug; `repair` maps text of the file to what replaces it."""

    name: str
    check: str
    repair: dict[str, str]


ANSWERS = {
    # A top-1 gate divided by itself is 1 and has no gradient: jingyaogong/minimind#858 and #859,
    # NVIDIA/Megatron-LM#894 (softmax after top-1).
    "switch.py": Answer("Switch", "the_task_loss_has_a_gradient_in_the_router", {
        "    sums_to_one = True\n": "",
        "        top_p = top_p /": "        if self.top_k > 1:\n            top_p = top_p /"}),
    # Noise outside training: deepspeedai/DeepSpeed#8620, eduardzamfir/MoCE-IR#19.
    "noisy.py": Answer("NoisyTopK", "evaluation_is_deterministic", {
        "+ scale": "+ self.training * scale"}),
    # A softmax of a softmax is nearly uniform: huggingface/transformers#45120 (there in the balance
    # loss, here in the gates), ByteDance-Seed/VeOmni#715.
    "mixture.py": Answer("Mixture", "a_dominant_logit_gets_most_of_the_gate", {
        "top.softmax(dim=-1)": "top / top.sum(dim=-1, keepdim=True)"}),
    # Padding in the balance loss: huggingface/transformers#28505, NVIDIA/Megatron-LM#2121.
    "balanced.py": Answer("Balanced", "padding_does_not_affect_the_routing", {
        ".mean(dim=(0, 1))": "[mask].mean(dim=0)"}),
    # A loss of counts has no gradient: CASIA-LMC-Lab/AnomalyMoE#1.
    "even.py": Answer("Even", "the_penalty_has_a_gradient", {
        "(gates > 0).float()[mask]": "gates[mask]"}),
    # The bias of the selection in the gates: huggingface/transformers#41647 and #41663,
    # vllm-project/vllm#12002.
    "loss_free.py": Answer("LossFree", "update_changes_the_choice_and_not_the_gate_values", {
        "logits.sigmoid() + self.bias": "logits.sigmoid()",
        "scores.topk": "(scores + self.bias).topk"}),
    # A bias that is trained and not saved: pytorch/torchtitan#1222 and #1226 (there a buffer was
    # replaced rather than changed in place).
    "loss_free_ema.py": Answer("LossFreeEMA", "the_state_dict_holds_the_whole_state", {
        "self.bias = torch.zeros(n_experts)":
        'self.register_buffer("bias", 0 * self.mean_load)'}),
    # Tokens counted twice under activation checkpointing: pytorch/torchtitan#1593,
    # NVIDIA-NeMo/Automodel#3247.
    "counted.py": Answer("Counted", "activation_checkpointing_changes_nothing", {
        "        if self.training:\n": "",
        "            self.count += (gates != 0)[mask].sum(dim=0)\n": "",
        "self.count.mean() - self.count": "load.mean() - load"}),
    # A capacity over the whole batch, filled in order of position, so that tokens of the last
    # samples are dropped, also in evaluation: we found no public thread that reports it. The code
    # is in deepspeed/moe/sharded_moe.py at deepspeedai/DeepSpeed 27d3016 (top2gating, and
    # topkgating with drop_policy "position", where it is an option).
    "capacity.py": Answer("Capacity", "a_sample_is_routed_alike_alone_and_in_a_batch", {
        "        chosen =":
        "        if not self.training:\n            return gates\n        chosen ="}),
    # Padding uses up the capacity: NVIDIA/Megatron-LM#5542, marin-community/marin#8953.
    "expert_choice.py": Answer("ExpertChoice", "padding_does_not_affect_the_routing", {
        "logits.softmax(dim=-1)  #":
        "logits.softmax(dim=-1).masked_fill(~mask[..., None], -1.0)  #",
        "n_tokens, n_experts = logits.shape[1:]": "n_experts = logits.shape[-1]",
        "math.ceil(self.top_k * n_tokens / n_experts)":
        "(mask.sum(dim=1) * self.top_k / n_experts).ceil()[:, None, None]"}),
    # A mean over the sample gives a language model later tokens: a question in Shwai-He/MEO#2;
    # about expert choice in piotrpiekos/MoSA#3 and allenai/OLMoE#46.
    "context.py": Answer("Context", "a_causal_router_does_not_look_ahead", {
        "class Context(Router):\n": "class Context(Router):\n    causal = False\n"}),
    # Labels numbered in the order of a set: tkipf/pygcn#41, google-deepmind/dmvr#6 (neither is
    # about experts).
    "by_name.py": Answer("ByName", IN_A_PROCESS, {
        "enumerate(set(MODALITIES))": "enumerate(MODALITIES)"}),
    # Probabilities in bf16 before the choice: ViperEkura/AstrAI#57, databricks/megablocks#91,
    # vllm-project/vllm#14027.
    "half.py": Answer("Half", "close_logits_are_compared_in_fp32", {
        ".to(torch.bfloat16)": "", ", self.top_k).float()": ", self.top_k)"}),
    # A softmax over the positions: deepspeedai/DeepSpeed#2110 (for the coefficients that mix the
    # experts with a dense layer).
    "sharp.py": Answer("Sharp", "a_causal_router_does_not_look_ahead", {
        "softmax(dim=1)": "softmax(dim=-1)"}),
    # Losses kept until they are cleared: databricks/megablocks#119; counted twice under activation
    # checkpointing: NVIDIA/Megatron-LM#1330 and #1514.
    "tracked.py": Answer("Tracked", "a_second_forward_pass_gives_the_same_result", {
        "self.calls.append(logits": "return (logits",
        "        return torch.stack(self.calls).sum()\n": ""}),
}  # fmt: skip
FILES = pytest.mark.parametrize("file", ANSWERS)
SLOW = [pytest.param(f, marks=pytest.mark.slow) if ANSWERS[f].check == IN_A_PROCESS else f
        for f in ANSWERS]  # fmt: skip


def spec_of(file, folder=MUSEUM):
    return f"{folder / file}:{ANSWERS[file].name}"


def failed(case, *names):
    return failures(case, [check for check in CHECKS if check.__name__ in names])


@pytest.fixture(scope="module")
def repaired(tmp_path_factory):
    """A folder with the repaired routers."""
    folder = tmp_path_factory.mktemp("repaired")
    for file, answer in ANSWERS.items():
        text = (MUSEUM / file).read_text()
        for old, new in answer.repair.items():
            assert old in text, f"{file} has no {old!r} to replace"
            text = text.replace(old, new)
        (folder / file).write_text(text)
    return folder


def test_every_router_of_the_museum_has_an_answer():
    readme = (MUSEUM / "README.md").read_text()
    assert {path.name for path in MUSEUM.glob("*.py")} == ANSWERS.keys() != set()
    assert all(f"`{file}:{answer.name}`" in readme for file, answer in ANSWERS.items())


@pytest.mark.parametrize("file", SLOW)
def test_the_named_check_finds_the_bug(file):
    check = ANSWERS[file].check
    assert failed(Case(spec_of(file)), check)[check].startswith("AssertionError")


@FILES
@pytest.mark.parametrize("level", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_the_repaired_router_fulfils_the_whole_contract(file, level, repaired):
    checks = {check.__name__ for check in CHECKS} - {IN_A_PROCESS}
    assert len(checks) == 30 and failed(Case(spec_of(file, repaired), level), *checks) == {}


@pytest.mark.slow
@FILES
def test_the_repaired_router_gives_the_same_gates_in_a_new_process(file, repaired):
    group = tuple(spec_of(f, repaired) for f in ANSWERS)
    assert failed(Case(spec_of(file, repaired), "token", group), IN_A_PROCESS) == {}
