"""What a router must not do ends its first call, in one line; and what it may do does not."""

import random
import re

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint as checkpoint_calls

import train
from checkpoint import load_model
from config import PRESETS, UserError
from engine.first_gate import check_first_calls
from routers import Hints, Routing, TopKRouter
from tests.conftest import randn
from tests.mini import checkpoint, error_line, mini

X, MASK = randn(2, 4, 16), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
good = TopKRouter.gate
WRONG = [  # what becomes of good gates (B, T, E), and the message
    (lambda g: None, "gate returned NoneType"), (lambda g: g[:, :1], r"shape \(2, 1, 4\)"),
    (lambda g: g.double(), "float64"), (lambda g: g.to("meta"), "on meta"), (lambda g: -g, "-0"),
    (lambda g: g / 0, "NaN or inf"), (lambda g: g + 1, "4 experts"), (lambda g: 0 * g, "all 0"),
]  # fmt: skip
CHANGES = [  # what is done besides, by router r with its argument x, and the message
    (lambda r, x: torch.manual_seed(0), "seed of torch"), (lambda r, x: random.random(), "Python"),
    (lambda r, x: np.random.rand(), "numpy"), (lambda r, x: x.mul_(2), "argument x"),  # noqa: NPY002
    (lambda r, x: torch.set_default_dtype(torch.half), "default dtype"),
    (lambda r, x: torch.set_grad_enabled(False), "gradient"), (lambda r, x: r.b.add_(1), "self.b"),
    (lambda r, x: r.register_buffer("c", x), "self.c")]  # fmt: skip


def and_then(does, method=lambda *args: 0.0):
    """The method, which afterwards does something else; its last argument is x."""
    return lambda self, *args: (method(self, *args), does(self, args[-1]))[0]


ROUTERS = [  # the methods of a router, and the message; "": it is correct
    *(({"gate": lambda self, *args, f=f: f(good(self, *args))}, words) for f, words in WRONG),
    *(({"gate": and_then(does, good)}, f"gate changes .*{words}") for does, words in CHANGES),
    ({"update": and_then(CHANGES[0][0])}, "update changes the seed of torch"),
    ({"gate": lambda self, logits: logits}, "gate does not take .* too many"),
    ({"penalty": lambda self, gates, *_: gates.sum(-1)}, r"Tensor \(2, 4\), which must be one"),
    ({"penalty": lambda self, *_: torch.tensor(torch.nan)}, "penalty returned nan"),
    ({"forward": lambda self, x, mask: Routing(good(self, x[..., :4], mask, x), x)}, "on padding"),
    ({"gate": and_then(lambda r, x: torch.rand(1), good)}, ""),  # noise
    ({"gate": lambda self, logits, *_: logits.sigmoid(), "at_most_k": False}, ""),
    ({"gate": lambda self, logits, *_: 0 * logits, "may_drop": True}, ""),
    ({"x": X / 0}, ""),  # gates are NaN, and it is not the router that makes them so
    ({"update": lambda self, load: self.b.copy_(load.sum())}, "")]  # fmt: skip


@pytest.fixture(autouse=True)
def _torch_as_before():
    state = random.getstate()
    with torch.random.fork_rng(), torch.enable_grad():
        yield
    random.setstate(state)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("body", "words"), ROUTERS)
def test_the_first_calls_of_a_router_are_checked(body, words):
    torch.manual_seed(1)  # the seed of the run: setting it again changes nothing
    router = check_first_calls(type("Mine", (TopKRouter,), body)(16, 4))
    router.register_buffer("b", torch.zeros(()))
    try:
        x = getattr(router, "x", X).clone()
        routing = checkpoint_calls(router, x, MASK, use_reentrant=False)
        if routing.gates.requires_grad:
            routing.gates.sum().backward()  # calls gate again
        with torch.no_grad():
            router.update(torch.ones(4))
    except UserError as error:
        assert words and re.match(f"router Mine, {__file__}: .*{words}", str(error)), error
    else:
        assert not words


@pytest.mark.parametrize(("top", "gate", "words"), [
    ("1 / 0", "", "mine.py, line 2: ZeroDivisionError: division"),
    ("torch.ones(int('x'))", "", "mine.py, line 2: ValueError: invalid"),  # make_router's
    ("torch.manual_seed(0)", "", "--router .*mine.py:Mine: changes the seed of torch"),
    ("", "raise SystemExit(0)", "mine.py, line 4: SystemExit: 0"),
    ("", "torch.set_grad_enabled(False); return super().gate(logits, mask, x)", "gradient record"),
    ("", "return -logits", "router Mine, .*mine.py: gate returned negative")])  # fmt: skip
def test_one_line_names_a_router_file_and_its_line(top, gate, words, tmp_path, capsys, monkeypatch):
    text = f"import torch, routers\n{top}\nclass Mine(routers.TopKRouter):\n"
    (tmp_path / "mine.py").write_text(f"{text} def gate(self, logits, mask, x): {gate or 0}")
    spec, init = f"{tmp_path}/mine.py:Mine", checkpoint(tmp_path / "dense", moe=None)
    monkeypatch.setitem(PRESETS, "mini", mini(tmp_path / "mini"))
    argv = ["--preset", "mini", "--init", str(init), "--router", spec, "--out", str(tmp_path / "o")]
    argv += ["--data", "phantoms:8", "--no-eval", "--device", "cpu"]
    torch.manual_seed(1)
    assert re.search(words, error_line(capsys, train.main, *argv))
    if "negative" in words:
        model, *_ = load_model(checkpoint(tmp_path / "a"), torch.device("cpu"), router=spec)
        with pytest.raises(UserError, match=words), torch.inference_mode():
            model.decoder(X, MASK, Hints())
