"""What lab.ablate compares: a row is a difference from Med-MoE, in flags of train.py and eval.py.

For another comparison add a row here, and its name to a set.
"""

from dataclasses import dataclass

SKIP = "--lr 0 --steps 1"  # a phase that changes nothing; phase 2 still trains its router
DENSE = "--router lab/controls.py:Everyone --start fresh"


@dataclass(frozen=True)
class Row:
    """Flags are those that differ from the defaults; all other rows' phases are shared."""

    title: str
    phase1: str = ""
    phase2: str = ""
    phase3: str | None = ""  # None: phase 2's model is evaluated
    answers: str = ""  # flags of eval.py
    against: str = "medmoe"  # the row it is compared with, question by question; itself: none
    common: str = ""  # flags of all phases


ROWS = {
    "medmoe": Row("Med-MoE: modality router, top-2 and meta expert"),
    # phases
    "no-phase-1": Row("without phase 1", phase1=SKIP),
    "no-phase-2": Row("without phase 2, but for its router", phase2=SKIP),
    "no-phase-3": Row("without phase 3: phase 2's dense model", phase3=None),
    "no-router-training": Row("router randomly initialised, not trained", phase3="--router random"),
    # the meta expert, and how phase 3 begins
    "no-meta": Row("without meta expert", phase3="--no-meta"),
    "no-meta-top-1": Row("without meta expert, top-1", phase3="--no-meta --top-k 1"),
    "top-1": Row("top-1 and meta expert", phase3="--top-k 1"),
    "released-start": Row("phase 3 starts as released", phase3="--start released"),
    "fresh-start": Row("experts re-initialised, output 0", phase3="--start fresh"),
    # dense controls
    "dense": Row("dense FFNs, trained on", phase3="--experts 0"),
    "dense-flops": Row("dense, steps for equal FLOPs", phase3="--experts 0 --steps 192"),
    "dense-activated": Row(
        "dense, equal activated parameters", phase3=f"{DENSE} --experts 2 --top-k 2"
    ),
    "dense-total": Row("dense, equal total parameters", phase3=f"{DENSE} --experts 4 --top-k 4"),
    # routers
    "sequence": Row("Med-MoE, routed by sequence", phase3="--router-level sequence"),
    "learned": Row("learned with the experts", phase3="--router topk"),
    "learned-balanced": Row(
        "learned, balance loss 0.01", phase3="--router topk --balance 0.01"
    ),
    "moe-llava": Row(
        "learned, balance 0.01, no meta (MoE-LLaVA)",
        phase3="--router topk --balance 0.01 --no-meta",
    ),
    "hash": Row("by token, fixed (hash)", phase3="--router lab/controls.py:Hash"),
    "oracle": Row("oracle: the true modality's expert", phase3="--router oracle"),
    "asked-oracle": Row("Med-MoE, evaluated with the true expert", answers="--router oracle"),
    "asked-wrong": Row("Med-MoE, evaluated with a wrong expert",
                       answers="--router lab/controls.py:Wrong"),
    "oracle-asked-wrong": Row(
        "oracle, evaluated with a wrong expert", phase3="--router oracle",
        answers="--router lab/controls.py:Wrong", against="oracle",
    ),
}  # fmt: skip


def experts_grid() -> dict[str, Row]:
    """1 to 8 experts, k up to 4, on phantoms of 2, 4 and 8 domains; the router learns with them."""
    rows = {}
    for domains in (2, 4, 8):
        for experts in (1, 2, 4, 6, 8):
            for k in (1, 2, 4):
                if k <= experts:
                    rows[f"d{domains}-e{experts}-k{k}"] = Row(
                        f"{domains} domains, {experts} experts, top-{k}",
                        common=f"--data phantoms:4000/{domains}",
                        phase3=f"--router topk --balance 0.01 --experts {experts} --top-k {k}",
                        against=f"d{domains}-e4-k2",
                    )
    return rows


def hard(title: str, phase3: str) -> Row:
    """Phase 2 changes nothing: what differs between the domains is left to phase 3's FFNs."""
    return Row(f"no phase 2: {title}", phase2=SKIP, phase3=phase3, against="no-phase-2")


HARD = {
    "hard-oracle": hard("oracle", "--router oracle"),
    "hard-random": hard("router randomly initialised", "--router random"),
    "hard-fresh-start": hard("experts re-initialised, output 0", "--start fresh"),
    "hard-no-meta": hard("without meta expert", "--no-meta"),
    "hard-dense-activated": hard("dense, equal activated", f"{DENSE} --experts 2 --top-k 2"),
}
LABELS = {f"labels-{n}": Row(f"{n} labels for the router", phase2=f"--router-images {n}")
          for n in (50, 100, 200, 500, 1000)}  # fmt: skip
NOISE = {f"noise-{n}": Row(f"{n} % of the labels wrong", phase2=f"--router-noise {n / 100}")
         for n in (10, 30, 50)}  # fmt: skip
LAYERS = {
    "layers-second-half": Row("second half sparse", phase3="--moe-layers second-half"),
    "layers-all": Row("all blocks sparse", phase3="--moe-layers all"),
}
TRAINS = {
    "trains-released": Row("phase 3 also trains dense FFNs, projector", phase3="--trains released"),
    **{f"lora-{r}": Row(f"LoRA of rank {r}", phase3=f"--lora-rank {r}") for r in (4, 16, 64)},
}
BACKBONES = {
    "phi": Row("Phi-style decoder", against="phi"),
    "phi-dense": Row("Phi-style, dense", phase3="--experts 0", against="phi"),
    "stablelm": Row("StableLM-style decoder", common="--preset tiny-stablelm", against="stablelm"),
    "stablelm-dense": Row("StableLM-style, dense", common="--preset tiny-stablelm",
                          phase3="--experts 0", against="stablelm"),
}  # fmt: skip
GRID = experts_grid()
CORE = tuple(ROWS)
ROWS |= HARD | LABELS | NOISE | LAYERS | TRAINS | GRID | BACKBONES

SETS = {
    "core": CORE,
    "design": ("medmoe", "dense-activated", "dense", "no-meta", "fresh-start", "oracle"),
    "hard": ("no-phase-2", *HARD),
    "layers": ("medmoe", "dense", *LAYERS),
    "trains": ("medmoe", *TRAINS),
    "labels": (*LABELS, *NOISE),
    "backbones": tuple(BACKBONES),
    "experts": tuple(GRID),
}
