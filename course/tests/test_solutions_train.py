"""Each reference solution trains, is loaded and generates.

On the preset of 30 000 parameters, two steps of phase 3 from one shared phase 2,
with the commands of the pages.
"""

from pathlib import Path

import pytest
import torch

import train
from checkpoint import load_model
from config import PRESETS, UserError
from course.tests.pages import commands, of_assignment
from course.tests.test_assignments import STUBS
from data import Batch
from model import generate
from tests.mini import losses, mini, weights

SOLUTIONS = Path(__file__).parent / "solutions"
NUMBERS = pytest.mark.parametrize("number", STUBS)
COMMON = ["--preset", "mini", "--data", "phantoms:16", "--dtype", "float32", "--no-eval",
          "--router-images", "16", "--steps", "2", "--batch-size", "4"]  # fmt: skip


def command_of_page(number: int, here: dict[str, object]) -> list[str]:
    """The flags of the page's training command, with the values of `here`."""
    (argv,) = [w[2:] for w in commands(of_assignment(number)) if "--init" in w]
    for flag, value in here.items():
        argv[argv.index(flag) + 1] = str(value)
    return argv


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """assignment number -> the folder of its run; each is trained once, at its first use."""
    if not SOLUTIONS.is_dir():
        pytest.skip("the solutions are withheld")
    runs: dict[int, Path] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "mini", mini(tmp_path_factory.mktemp("parts")))
        base = tmp_path_factory.mktemp("base")
        train.main(["--phase", "2", "--out", str(base), *COMMON])

        def run(number: int) -> Path:
            if number not in runs:
                spec = f"{SOLUTIONS / f'a{number}.py'}:{STUBS[number].rpartition(':')[2]}"
                runs[number] = tmp_path_factory.mktemp(f"a{number}")
                here = {"--init": base / "phase2", "--router": spec, "--out": runs[number]}
                train.main([*command_of_page(number, here), *COMMON])
            return runs[number]

        yield run


def prompts() -> Batch:
    """Two prompts without images, padded on the left."""
    ids = torch.tensor([[0, 0, 5, 6, 7], [9, 8, 7, 6, 5]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    labels = torch.full_like(ids, -100)
    return Batch(ids, mask, labels, torch.zeros(0, 3, 32, 32), torch.tensor([-1, -1]))


@NUMBERS
def test_a_solution_trains_two_steps(trained, number):
    records = losses(trained(number))
    assert [r["step"] for r in records] == [0, 1]
    tensors = weights(trained(number) / "phase3")
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


@NUMBERS
def test_a_solution_generates_or_is_refused(trained, number):
    model, text, _ = load_model(trained(number) / "phase3", torch.device("cpu"))
    steps = generate(model, prompts(), text.eos_id, max_new=3)
    if number == 4:
        with pytest.raises(UserError, match="ExpertChoice looks at later tokens"):
            next(steps)
        return
    routings = [routing for step in steps for routing in step.routings]
    assert routings and all(r.gates.isfinite().all() for r in routings)


@pytest.mark.parametrize(("number", "name"), [(5, "bias"), (8, "coefficient")])
def test_the_buffers_that_a_solution_updates_are_in_the_checkpoint(trained, number, name):
    found = [t for n, t in weights(trained(number) / "phase3").items()
             if n.endswith(f".router.{name}")]  # fmt: skip
    start = torch.tensor({"bias": 0.0, "coefficient": 1e-8}[name])
    assert found and all((t != start).any() for t in found)


def test_generation_keeps_the_route_of_the_prompt(trained):
    model, text, _ = load_model(trained(7) / "phase3", torch.device("cpu"))
    steps = list(generate(model, prompts(), text.eos_id, max_new=3))
    first = steps[0].routings
    assert len(steps) > 1
    for step in steps[1:]:
        for before, after in zip(first, step.routings, strict=True):
            assert torch.equal(before.gates[:, -1:], after.gates)
