"""Compiled blocks train alike, and runs go on with and without them."""

import pytest

from tests.test_train import compiled_losses

pytestmark = pytest.mark.slow


def test_compiled_blocks_train_alike_and_runs_go_on_with_and_without(tmp_path):
    whole = compiled_losses(tmp_path / "plain", 10, False)
    same = compiled_losses(tmp_path / "compiled", 10, True)
    assert len(whole) == 10 and same == pytest.approx(whole, abs=1e-5)
    again = compiled_losses(tmp_path / "recomputed", 10, True, recompute=True)
    assert again == pytest.approx(whole, abs=1e-5)
    for folder, compiles in (("plain", True), ("compiled", False)):
        rest = compiled_losses(tmp_path / folder, 10, compiles, resume=True)
        assert rest == pytest.approx(whole[5:], abs=1e-5)
