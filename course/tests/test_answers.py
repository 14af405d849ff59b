"""The checks of the assignments pass on solutions and fail on wrong answers.

python -m pytest course/tests/test_answers.py

Without the reference solutions and the wrong answers, which may be withheld, the tests skip.
"""

from pathlib import Path

import pytest

from course.tests.contract import Case, failures
from course.tests.test_assignments import CHECKS, ROOT, STUBS, run_check
from course.tests.test_router import CHECKS as CONTRACT
from routers import get_router

TESTS = Path(__file__).parent
# wrong_answers/NAME.py -> words of the message that it has to fail with
WRONG = {
    "a1_importance_from_counts": "not of token counts",
    "a1_no_softplus": "standard deviation softplus(x W_noise)",
    "a1_noise_in_evaluation": "There is noise in evaluation",
    "a1_one_at_k_1": "At k = 1 every gate is 1",
    "a1_softmax_before_top_k": "not a softmax over the k kept logits",
    "a2_counts_after_the_drop": "before any is dropped",
    "a2_drops_in_evaluation": "In evaluation each real token is routed to the expert with",
    "a2_drops_by_position": "the least probable tokens are dropped first",
    "a2_gate_of_one": "The gate is not the raw probability p",
    "a2_no_capacity": "see the capacity",
    "a2_one_capacity_per_batch": "the capacity is per sample",
    "a2_padding_counts": "the capacity counts real tokens only",
    "a2_soft_share": "the share of top-1 choices",
    "a3_exp_overflows": "The penalty overflows",
    "a3_not_rescaled": "rescaled to sum to 1 if k > 1",
    "a3_of_probabilities": "of the logits themselves",
    "a3_padding_counts": "The penalty counts padding",
    "a4_gates_of_one": "a gate of 1, or a detached one, has none",
    "a4_over_the_batch": "each expert selects, sample by sample",
    "a4_padding_is_selected": "padding is selected",
    "a4_declared_causal": "has to declare causal = False",
    "a4_softmax_over_tokens": "it is not over the tokens",
    "a5_bias_in_the_weights": "The bias is in the gates",
    "a5_bias_on_the_logits": "added to the scores, not to the logits",
    "a5_in_proportion": "rate * sign(mean load - load)",
    "a5_plain_attribute": "`bias` is not a buffer",
    "a5_softmax": "neither a softmax nor rescaled",
    "a5_updates_in_gate": "The bias changed in `gate`",
    "a5_wrong_sign": "the sign is wrong",
    "a6_one_at_k_1": "At k = 1 every gate is 1",
    "a6_over_all": "divide by the sum over the k kept",
    "a6_softmax": "a softmax gives other values",
    "a6_undeclared": "which does not match the gates",
    "a7_routes_each_token": "have different gates",
    "a7_first_token_alone": "With prompt = None the logits are not averaged over all real",
    "a7_ignores_previous": "A generated token gets gates of its own",
    "a7_global_entropy_wrong_sign": "minimises the first entropy and maximises the second",
    "a7_mean_of_probabilities": "the softmax after the mean",
    "a7_pools_padding": "Padding changes the route",
    "a7_pools_the_answer": "Answer tokens change the route",
    "a8_keeps_k": "there is no top-k and no rescaling",
    "a8_padding_counts": "The penalty counts padding",
    "a8_plain_number": "`coefficient` is not a buffer",
    "a8_undeclared": "declare at_most_k = False",
    "a8_wrong_sign": "the penalty must get stronger",
}
UPDATES = ("the_bias_counteracts_the_load", "the_coefficient_aims_at_k_experts_per_token")
NUMBERS = pytest.mark.parametrize("number", CHECKS)


def outcomes(spec: str, number: int) -> dict[str, str]:
    """Check -> "passed", "skipped: ..." or the message of its failure."""
    found = {}
    cls = get_router(spec)
    for check in CHECKS[number]:
        try:
            run_check(check, cls)
            found[check.__name__] = "passed"
        except pytest.skip.Exception as skipped:
            found[check.__name__] = f"skipped: {skipped}"
        except pytest.fail.Exception as failure:
            found[check.__name__] = str(failure)
    return found


def class_of(number: int) -> str:
    return STUBS[number].rpartition(":")[2]


@NUMBERS
def test_every_check_of_a_stub_is_skipped_as_not_implemented(number):
    found = outcomes(str(ROOT / "course" / STUBS[number]), number)
    assert set(found.values()) == {"skipped: not implemented yet"}, found


@NUMBERS
def test_a_solution_passes_all_checks(number):
    path = TESTS / "solutions" / f"a{number}.py"
    if not path.is_file():
        pytest.skip("the solutions are withheld")
    found = outcomes(f"{path}:{class_of(number)}", number)
    assert set(found.values()) == {"passed"}, found


@NUMBERS
def test_a_solution_fulfils_the_contract(number):
    if not (TESTS / "solutions").is_dir():
        pytest.skip("the solutions are withheld")
    specs = tuple(f"{TESTS / 'solutions' / f'a{n}.py'}:{class_of(n)}" for n in STUBS)
    assert failures(Case(specs[number - 1], "token", specs), CONTRACT) == {}


@NUMBERS
def test_a_method_that_is_missing_skips_its_checks_only(number):
    path = TESTS / "solutions" / f"a{number}.py"
    if not path.is_file():
        pytest.skip("the solutions are withheld")
    solution = get_router(f"{path}:{class_of(number)}")

    class GateOnly(solution):
        def penalty(self, gates, logits, mask, x):
            raise NotImplementedError("not implemented yet")

        def update(self, load):
            raise NotImplementedError("not implemented yet")

    for check in CHECKS[number]:
        try:
            run_check(check, GateOnly)
        except pytest.skip.Exception as skipped:
            assert str(skipped) == "not implemented yet"
            needs_more = check.__name__.startswith("penalty_") or check.__name__ in UPDATES
            assert needs_more, f"{check.__name__} should need `gate` alone"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_fails_with_a_sentence_that_names_its_mistake(name):
    path, number = TESTS / "wrong_answers" / f"{name}.py", int(name[1])
    if not path.is_file():
        pytest.skip("the wrong answers are withheld")
    found = outcomes(f"{path}:{class_of(number)}", number)
    failed = [message for message in found.values() if message != "passed"]
    assert any(WRONG[name] in message for message in failed), found


def test_every_wrong_answer_is_checked_and_every_assignment_has_two():
    if not (TESTS / "wrong_answers").is_dir():
        pytest.skip("the wrong answers are withheld")
    there = {path.stem for path in (TESTS / "wrong_answers").glob("*.py")}
    assert there == set(WRONG)
    for number in CHECKS:
        assert sum(name.startswith(f"a{number}_") for name in WRONG) >= 2, number


def test_every_check_fails_for_some_wrong_answer():
    if not (TESTS / "wrong_answers").is_dir():
        pytest.skip("the wrong answers are withheld")
    failed = set()
    for name in WRONG:
        number = int(name[1])
        found = outcomes(f"{TESTS / 'wrong_answers' / name}.py:{class_of(number)}", number)
        failed |= {(number, check) for check, message in found.items() if message != "passed"}
    assert failed == {(n, check.__name__) for n, checks in CHECKS.items() for check in checks}
