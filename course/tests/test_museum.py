"""The answers to course/museum: the check that finds each bug, its repair, and public reports.

A thread named here reports or fixes the same mistake; the code of the routers is our own.
"""

from pathlib import Path

import pytest

from course.tests.test_router import CHECKS, LEVELS, Case, failures

MUSEUM = Path(__file__).parents[1] / "museum"
IN_A_PROCESS = "a_new_process_gives_the_same_gates"


ANSWERS = {  # file -> its class, the check that finds the bug, texts and what replaces them
    # A top-1 gate divided by itself is 1: jingyaogong/minimind#858, NVIDIA/Megatron-LM#894.
    "switch.py": ("Switch", "the_task_loss_has_a_gradient_in_the_router", {
        "    sums_to_one = True\n": "",
        "        top_p = top_p /": "        if self.top_k > 1:\n            top_p = top_p /"}),
    # Noise outside training: deepspeedai/DeepSpeed#8620, eduardzamfir/MoCE-IR#19.
    "noisy.py": ("NoisyTopK", "evaluation_is_deterministic", {
        "+ scale": "+ self.training * scale"}),
    # A softmax of a softmax: huggingface/transformers#45120, ByteDance-Seed/VeOmni#715.
    "mixture.py": ("Mixture", "a_dominant_logit_gets_most_of_the_gate", {
        "top.softmax(dim=-1)": "top / top.sum(dim=-1, keepdim=True)"}),
    # Padding in the balance loss: huggingface/transformers#28505, NVIDIA/Megatron-LM#2121.
    "balanced.py": ("Balanced", "padding_does_not_affect_the_routing", {
        ".mean(dim=(0, 1))": "[mask].mean(dim=0)"}),
    # A loss of counts has no gradient: CASIA-LMC-Lab/AnomalyMoE#1.
    "even.py": ("Even", "the_penalty_is_a_scalar_with_a_gradient", {
        "(gates > 0).float()[mask]": "gates[mask]"}),
    # The bias of the selection in the gates: huggingface/transformers#41647, vllm#12002.
    "loss_free.py": ("LossFree", "update_changes_the_choice_and_not_the_gate_values", {
        "logits.sigmoid() + self.bias": "logits.sigmoid()",
        "scores.topk": "(scores + self.bias).topk"}),
    # A bias that is trained and not saved: pytorch/torchtitan#1222 and #1226.
    "loss_free_ema.py": ("LossFreeEMA", "the_state_dict_holds_the_whole_state", {
        "self.bias = torch.zeros(n_experts)": 'self.register_buffer("bias", 0 * self.mean_load)'}),
    # Counted twice under activation checkpointing: pytorch/torchtitan#1593.
    "counted.py": ("Counted", "a_second_forward_pass_gives_the_same_result", {
        "        if self.training:\n": "",
        "            self.count += (gates != 0)[mask].sum(dim=0)\n": "",
        "self.count.mean() - self.count": "load.mean() - load"}),
    # A capacity over the whole batch, filled in order of position, also in evaluation: no public
    # thread found; the code is in deepspeed/moe/sharded_moe.py at deepspeedai/DeepSpeed 27d3016.
    "capacity.py": ("Capacity", "a_sample_is_routed_alike_alone_and_in_a_batch", {
        "        chosen =":
        "        if not self.training:\n            return gates\n        chosen ="}),
    # Padding uses up the capacity: NVIDIA/Megatron-LM#5542, marin-community/marin#8953.
    "expert_choice.py": ("ExpertChoice", "padding_does_not_affect_the_routing", {
        "logits.softmax(dim=-1)  #":
        "logits.softmax(dim=-1).masked_fill(~mask[..., None], -1.0)  #",
        "n_tokens, n_experts = logits.shape[1:]": "n_experts = logits.shape[-1]",
        "math.ceil(self.top_k * n_tokens / n_experts)":
        "(mask.sum(dim=1) * self.top_k / n_experts).ceil()[:, None, None]"}),
    # A mean over the sample shows later tokens: Shwai-He/MEO#2, piotrpiekos/MoSA#3.
    "context.py": ("Context", "a_causal_router_does_not_look_ahead", {
        "class Context(Router):\n": "class Context(Router):\n    causal = False\n"}),
    # Labels numbered in the order of a set: tkipf/pygcn#41, google-deepmind/dmvr#6 (not experts).
    "by_name.py": ("ByName", IN_A_PROCESS, {
        "enumerate(set(MODALITIES))": "enumerate(MODALITIES)"}),
    # Probabilities in bf16 before the choice: databricks/megablocks#91, vllm-project/vllm#14027.
    "half.py": ("Half", "close_logits_are_compared_in_fp32", {
        ".to(torch.bfloat16)": "", ", self.top_k).float()": ", self.top_k)"}),
    # A softmax over the positions: deepspeedai/DeepSpeed#2110 (for mixing experts and dense layer).
    "sharp.py": ("Sharp", "a_causal_router_does_not_look_ahead", {
        "softmax(dim=1)": "softmax(dim=-1)"}),
    # Losses kept until they are cleared: databricks/megablocks#119, NVIDIA/Megatron-LM#1330.
    "tracked.py": ("Tracked", "a_second_forward_pass_gives_the_same_result", {
        "self.calls.append(logits": "return (logits",
        "        return torch.stack(self.calls).sum()\n": ""}),
}  # fmt: skip


FILES = [pytest.param(p.name, marks=[pytest.mark.slow] * (p.name == "by_name.py"))
         for p in sorted(MUSEUM.glob("*.py"))]  # fmt: skip


def failed(case, *names):
    return failures(case, [check for check in CHECKS if check.__name__ in names])


def repaired(file, folder):
    name, _, repair = ANSWERS[file]
    text = (MUSEUM / file).read_text()
    for old, new in repair.items():
        assert old in text, f"{file} has no {old!r} to replace"
        text = text.replace(old, new)
    (folder / file).write_text(text)
    return f"{folder / file}:{name}"


@pytest.mark.parametrize("file", FILES)
def test_the_named_check_finds_the_bug_and_a_repair_fulfils_the_contract(file, tmp_path):
    name, check, _ = ANSWERS[file]
    found = failed(Case(f"{MUSEUM / file}:{name}"), check)
    assert found[check].startswith("AssertionError")
    checks = {check, *(c.__name__ for c in CHECKS if c.__name__ != IN_A_PROCESS)}  # it is slow
    for level in LEVELS:
        assert failed(Case(repaired(file, tmp_path), level), *checks) == {}
