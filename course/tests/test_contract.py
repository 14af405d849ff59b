"""Every check of the contract fails on some router with a bug, and none on a correct one."""

import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F

from course import contain
from course.tests import conftest, test_router
from course.tests.test_assignments import stub
from course.tests.test_router import CHECKS, Case, failures
from routers import ROUTERS, Routing, TopKRouter, load_balancing_loss, top_k_gates

museum = pytest.importorskip("course.tests.test_museum", reason="its answers are withheld")


def top_k(router, logits):
    return top_k_gates(logits.softmax(dim=-1), router.top_k)


def gate(function):
    return {"gate": lambda self, logits, mask, x: function(self, logits)}


def penalty(function):
    return {"penalty": lambda self, gates, logits, mask, x: function(gates, logits, mask)}


# A check, and what makes a top-k router that it has to fail on; the museum has the others.
BROKEN = [
    ("the_first_calls_are_as_training_checks_them", gate(lambda r, z: top_k(r, z)[:, :1])),
    ("gates_are_finite_fp32_and_not_negative", gate(lambda r, z: top_k(r, z.double()))),
    ("gates_are_finite_fp32_and_not_negative", gate(lambda r, z: z)),
    ("gates_are_finite_fp32_and_not_negative",  # with k = E there is no next best
     gate(lambda r, z: F.relu(z - z.topk(r.top_k + 1).values[..., -1:]))),
    ("a_token_is_routed_to_one_to_k_experts",  # with equal logits, where all reach the k-th
     gate(lambda r, z: z.softmax(dim=-1) * (z >= z.topk(r.top_k).values[..., -1:]))),
    ("a_token_is_routed_to_one_to_k_experts", gate(lambda r, z: F.threshold(top_k(r, z), 0.7, 0))),
    ("gates_sum_to_one_where_declared", {"sums_to_one": True}),  # at k = 1 it is a probability
    ("unusual_inputs_give_finite_values",
     penalty(lambda g, z, mask: (z[mask] - z[mask].mean(dim=0)).square().sum() / (mask.sum() - 1))),
    ("unusual_inputs_give_finite_values",
     gate(lambda r, z: top_k_gates(z.exp() / z.exp().sum(dim=-1, keepdim=True), r.top_k))),
    ("evaluation_is_deterministic", {"forward": lambda r, x, mask, hints=None: Routing(
        top_k(r, z := r.proj(x).float()).masked_fill(~mask[..., None], 0.0), z)}),
    ("decoding_token_by_token_gives_the_same_gates", gate(lambda r, z: top_k(r, z.cumsum(dim=1)))),
    ("permuting_the_experts_permutes_the_gates",
     gate(lambda r, z: top_k(r, z - torch.arange(float(z.shape[-1]))))),
    ("the_penalty_is_not_smaller_at_collapse_than_at_balance",
     penalty(lambda g, z, mask: -load_balancing_loss(Routing(g, z), mask))),
    ("the_penalty_is_not_smaller_at_collapse_than_at_balance",  # of tokens of expert 0 alone
     penalty(lambda g, z, mask: z.softmax(dim=-1)[mask][:, 0].mean())),
    ("the_penalty_is_a_scalar_with_a_gradient", penalty(lambda g, z, mask: z.logsumexp(-1) * mask)),
    ("update_changes_the_choice_and_not_the_gate_values",
     {"update": lambda self, load: self.proj.bias.data.sub_(load)})]  # fmt: skip


@pytest.mark.parametrize(("check", "body"), BROKEN, ids=[check for check, _ in BROKEN])
def test_the_named_check_fails_on_a_broken_router(check, body, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine", type("Broken", (TopKRouter,), body))
    assert museum.failed(Case("mine"), check).keys() == {check}


def test_every_check_fails_on_some_router():
    named = {check for _, check, _ in museum.ANSWERS.values()}
    assert {c.__name__ for c in CHECKS} == named | {check for check, _ in BROKEN}


@pytest.mark.parametrize(("value", "words"), [
    (lambda r, z: z.topk(r.top_k).values, "shape (3, 6, 2), which must be that of the logits"),
    (lambda r, z: z.masked_fill(z < 0, -torch.inf), "gates that are NaN or infinite")])  # fmt: skip
def test_gates_of_a_wrong_form_are_one_sentence_in_every_check(value, words, monkeypatch):
    monkeypatch.setitem(ROUTERS, "mine", type("Broken", (TopKRouter,), gate(value)))
    (sentence,) = set(failures(Case("mine"), CHECKS).values())
    assert sentence.startswith(f"AssertionError: gate returned {words}")


def test_a_stub_is_one_line_for_a_student_and_every_check_when_graded(monkeypatch):
    found, case = Mock(), Case(stub(4))  # its declarations excuse it from several checks
    found.config.getoption.return_value = case.spec
    test_router.pytest_generate_tests(found)
    assert "not implemented yet" in str(found.parametrize.call_args)
    monkeypatch.setenv(contain.FOLDER, "of a judge")
    test_router.pytest_generate_tests(found)
    assert found.parametrize.call_args.args == ("check", CHECKS)
    for check in CHECKS:
        with pytest.raises(pytest.skip.Exception, match=r"^not implemented yet$"):
            test_router.test_a_router_fulfils_the_contract(check, case)


@pytest.mark.parametrize("spec", ["nofile.py:Top1", f"{__file__}:Top2"])
def test_a_mistyped_file_or_class_is_one_line_before_any_test(spec):
    with pytest.raises(pytest.UsageError, match=re.escape(f"--router: {spec!r}")):
        conftest.pytest_configure(SimpleNamespace(getoption=lambda name: spec))
