"""The judges of the assignments tell right from wrong: python -m pytest tests/test_answers.py

The reference solutions and the wrong answers may be withheld; then nothing is left to do here.
"""

from pathlib import Path

import pytest
from contract import Case, failures
from test_assignments import CHECKS, ROOT, STUBS, judge
from test_router import CHECKS as CONTRACT

from routers import get_router

TESTS = Path(__file__).parent
# What a judge has to say of each wrong answer.
WRONG = {
    "a1_counts_visits": "not of the visits",
    "a1_no_softplus": "standard deviation softplus(x W_noise)",
    "a1_noise_in_evaluation": "There is noise in evaluation",
    "a1_one_at_k_1": "At k = 1 every gate is 1",
    "a1_softmax_before_top_k": "not a softmax over the kept logits",
    "a2_counts_after_the_drop": "before any is dropped",
    "a2_drops_in_evaluation": "In evaluation each real token visits its likeliest expert",
    "a2_first_come": "the least probable are dropped first",
    "a2_gate_of_one": "The gate is not the raw probability p",
    "a2_no_capacity": "see the capacity",
    "a2_one_capacity_a_batch": "the capacity is of each sample",
    "a2_padding_counts": "the capacity counts real tokens only",
    "a2_soft_share": "the share of top-1 choices",
    "a3_exp_overflows": "The penalty overflows",
    "a3_not_rescaled": "rescaled to sum to 1 if k > 1",
    "a3_of_probabilities": "of the logits themselves",
    "a3_padding_counts": "The penalty lets padding count",
    "a4_gates_of_one": "a gate of 1 or a detached one teaches nothing",
    "a4_over_the_batch": "experts pick, sample by sample",
    "a4_padding_is_picked": "padding takes places",
    "a4_says_causal": "has to declare causal = False",
    "a4_softmax_over_tokens": "not over the tokens",
    "a5_bias_in_the_weights": "The bias is in the gates",
    "a5_bias_on_the_logits": "added to the scores, not to the logits",
    "a5_in_proportion": "rate * sign(mean visits - visits)",
    "a5_plain_attribute": "`bias` is not a buffer",
    "a5_softmax": "neither a softmax nor rescaled",
    "a5_updates_in_gate": "The bias changed in `gate`",
    "a5_wrong_way": "the sign is the wrong way",
    "a6_one_at_k_1": "At k = 1 every gate is 1",
    "a6_over_all": "divide by the sum over the kept",
    "a6_softmax": "a softmax gives other ones",
    "a6_undeclared": "but the gates say otherwise",
    "a7_each_its_own": "take different routes",
    "a7_first_token_alone": "With prompt = None all real positions are pooled",
    "a7_forgets": "A generated token takes a route of its own",
    "a7_global_entropy_the_wrong_way": "one is wanted small, the other large",
    "a7_mean_of_probabilities": "the softmax after the mean",
    "a7_pools_padding": "Padding changes the route",
    "a7_pools_the_answer": "Answer tokens change the route",
    "a8_keeps_k": "nothing is chosen and nothing rescaled",
    "a8_padding_counts": "The penalty lets padding count",
    "a8_plain_number": "`coefficient` is not a buffer",
    "a8_undeclared": "declares at_most_k = False",
    "a8_wrong_way": "have to make the penalty stronger",
}
UPDATES = ("the_bias_goes_against_the_load", "the_coefficient_steers_towards_k_visits")
NUMBERS = pytest.mark.parametrize("number", CHECKS)


def outcomes(spec: str, number: int) -> dict[str, str]:
    """Check -> "passed", "skipped: ..." or what the failure says."""
    found = {}
    cls = get_router(spec)
    for check in CHECKS[number]:
        try:
            judge(check, cls)
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
def test_a_solution_keeps_the_contract(number):
    if not (TESTS / "solutions").is_dir():
        pytest.skip("the solutions are withheld")
    specs = tuple(f"{TESTS / 'solutions' / f'a{n}.py'}:{class_of(n)}" for n in STUBS)
    assert failures(Case(specs[number - 1], "token", specs), CONTRACT) == {}


@NUMBERS
def test_a_method_that_is_missing_skips_its_checks_only(number):
    path = TESTS / "solutions" / f"a{number}.py"
    if not path.is_file():
        pytest.skip("the solutions are withheld")
    right = get_router(f"{path}:{class_of(number)}")

    class Half(right):
        def penalty(self, gates, logits, mask, x):
            raise NotImplementedError("not implemented yet")

        def update(self, visits):
            raise NotImplementedError("not implemented yet")

    for check in CHECKS[number]:
        try:
            judge(check, Half)
        except pytest.skip.Exception as skipped:
            assert str(skipped) == "not implemented yet"
            needs_more = check.__name__.startswith("penalty_") or check.__name__ in UPDATES
            assert needs_more, f"{check.__name__} needs the gates alone"


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_fails_with_a_sentence_that_names_its_mistake(name):
    path, number = TESTS / "wrong_answers" / f"{name}.py", int(name[1])
    if not path.is_file():
        pytest.skip("the wrong answers are withheld")
    found = outcomes(f"{path}:{class_of(number)}", number)
    failed = [says for says in found.values() if says != "passed"]
    assert any(WRONG[name] in says for says in failed), found


def test_every_wrong_answer_is_judged_and_every_assignment_has_two():
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
        failed |= {(number, check) for check, says in found.items() if says != "passed"}
    assert failed == {(n, check.__name__) for n, checks in CHECKS.items() for check in checks}
