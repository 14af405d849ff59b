"""Every check of the contract can fail, on a broken router, and none fails on a sound one.

python -m pytest tests/test_contract.py
"""

from pathlib import Path

import pytest
from contract import Case, failures
from test_router import CHECKS, LEVELS

import moe

test_museum = pytest.importorskip("test_museum", reason="the museum's answers are withheld")
BROKEN = {
    "Double": "gates_are_fp32_of_the_right_shape",
    "Raw": "gates_are_finite_and_not_negative",
    "Dense": "no_token_visits_more_than_k_experts",
    "Ties": "no_token_visits_more_than_k_experts",
    "Threshold": "every_real_token_visits_an_expert",
    "Claims": "gates_sum_to_one_where_declared",
    "Spread": "one_token_or_none_is_enough",
    "NextBest": "one_expert_and_all_experts_are_possible",
    "Overflow": "large_and_equal_logits_stay_finite",
    "OwnForward": "autocast_changes_nothing",
    "Positional": "padding_on_either_side_is_the_same",
    "Past": "position_by_position_is_as_all_at_once",
    "Favourite": "experts_are_alike",
    "PerToken": "a_penalty_is_one_finite_number",
    "Lopsided": "collapse_costs_no_less_than_balance",
    "Upside": "the_balance_loss_is_1_at_balance_and_e_at_collapse",
    "Trainer": "an_update_changes_buffers_only",
}
SOUND = ("ReLU", "Hash", "Sinkhorn", "TopP", "Cosine", "Balanced")
BY_HAND = {"the_layer_is_its_definition", "it_generates_or_is_refused"}  # below


def found(name: str, check: str) -> dict[str, str]:
    case = Case(f"{Path(__file__).parent / 'broken.py'}:{name}")
    return failures(case, [c for c in CHECKS if c.__name__ == check])


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_router_is_found(name):
    assert BROKEN[name] in found(name, BROKEN[name]), f"{BROKEN[name]} passes on {name}"


def test_no_check_is_without_a_router_that_fails_it():
    red = {answer.check for answer in test_museum.ANSWERS.values()} | {*BROKEN.values()} | BY_HAND
    assert red == {check.__name__ for check in CHECKS}


def test_a_wrong_layer_is_found(monkeypatch):
    right = moe.Experts.forward
    monkeypatch.setattr(moe.Experts, "forward", lambda *args: 1.01 * right(*args))
    case, check = Case("topk"), "the_layer_is_its_definition"
    assert check in failures(case, [c for c in CHECKS if c.__name__ == check])


def test_what_the_cache_forgets_is_found_in_generation():
    check = "it_generates_or_is_refused"
    assert found("Past", check)[check].startswith("AssertionError")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_router_is_not_accused(name, level):
    company = tuple(f"{Path(__file__).parent / 'sound.py'}:{name}" for name in SOUND)
    case = Case(company[SOUND.index(name)], level, company)
    assert failures(case, CHECKS) == {}
