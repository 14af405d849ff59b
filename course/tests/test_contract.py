"""Every check of the contract fails on some router with a bug, and none on a correct one.

python -m pytest course/tests/test_contract.py
"""

from pathlib import Path

import pytest

import moe
from course.tests.contract import Case, failures
from course.tests.test_router import CHECKS, LEVELS

test_museum = pytest.importorskip("test_museum", reason="the museum's answers are withheld")
BROKEN = {
    "Double": "gates_are_fp32_of_the_right_shape",
    "RawLogits": "gates_are_finite_and_not_negative",
    "Dense": "no_token_is_routed_to_more_than_k_experts",
    "Ties": "no_token_is_routed_to_more_than_k_experts",
    "Threshold": "every_real_token_is_routed_to_an_expert",
    "SumsToOne": "gates_sum_to_one_where_declared",
    "Spread": "a_single_token_or_none_works",
    "NextBest": "one_expert_and_all_experts_work",
    "Overflow": "large_and_equal_logits_give_finite_values",
    "OwnForward": "autocast_changes_nothing",
    "Positional": "padding_on_either_side_gives_the_same_gates",
    "Past": "decoding_token_by_token_gives_the_same_gates",
    "Bonus": "permuting_the_experts_permutes_the_gates",
    "PerToken": "the_penalty_is_a_finite_scalar",
    "WrongSign": "the_penalty_is_not_smaller_at_collapse_than_at_balance",
    "Smallest": "the_balance_loss_is_1_at_balance_and_e_at_collapse",
    "UpdatesParameter": "update_changes_buffers_only",
}
SOUND = ("ReLU", "Hash", "Sinkhorn", "TopP", "Cosine", "Balanced")
TESTED_BELOW = {"the_layer_matches_its_definition", "generation_works_or_is_refused"}


def found(name: str, check: str) -> dict[str, str]:
    case = Case(f"{Path(__file__).parent / 'broken.py'}:{name}")
    return failures(case, [c for c in CHECKS if c.__name__ == check])


@pytest.mark.parametrize("name", BROKEN)
def test_the_named_check_fails_on_a_broken_router(name):
    assert BROKEN[name] in found(name, BROKEN[name]), f"{BROKEN[name]} passes on {name}"


def test_every_check_fails_on_some_router():
    failing = (
        {answer.check for answer in test_museum.ANSWERS.values()}
        | {*BROKEN.values()}
        | TESTED_BELOW
    )
    assert failing == {check.__name__ for check in CHECKS}


def test_a_wrong_layer_fails_its_check(monkeypatch):
    forward = moe.Experts.forward
    monkeypatch.setattr(moe.Experts, "forward", lambda *args: 1.01 * forward(*args))
    case, check = Case("topk"), "the_layer_matches_its_definition"
    assert check in failures(case, [c for c in CHECKS if c.__name__ == check])


def test_state_that_is_missing_from_the_kv_cache_is_found_in_generation():
    check = "generation_works_or_is_refused"
    assert found("Past", check)[check].startswith("AssertionError")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SOUND)
def test_no_check_fails_on_a_sound_router(name, level):
    group = tuple(f"{Path(__file__).parent / 'sound.py'}:{name}" for name in SOUND)
    case = Case(group[SOUND.index(name)], level, group)
    assert failures(case, CHECKS) == {}
