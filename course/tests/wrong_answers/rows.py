"""Wrong answers: each is the reference solution with one edit, and fails with a sentence.

python -m course.tests.wrong_answers.rows scores two for each assignment, about four minutes each
on two cores; names on the command line choose others. Their rows are written beside this file.
Then the table of course/answers.md is printed, where they stand below the reference solutions.
"""

import sys
import tempfile
from pathlib import Path

from course import score
from course.tests.test_assignments import STUBS
from sources.records import read_json

HERE = Path(__file__).parent
EDITS = {  # name -> words of the check that fails, what the solution says, what this answer says
    "1-no-softplus": ("is softplus(x W_noise)", "F.softplus(self.noise(x))", "self.noise(x)"),
    "1-noise-detached": ("nothing is detached", "self.noise(x))", "self.noise(x)).detach()"),
    "1-not-rescaled": ("Softmax over the k kept logits", "if self.top_k > 1:", "if False:"),
    "1-importance-of-counts": ("not of token counts", "gates.sum(dim",
                               "(gates != 0).float().sum(dim"),
    "2-gate-of-1": ("raw probability, not 1", "expert, best)", "expert, 1.0)"),
    "2-nothing-dropped": ("8 tokens, factor 1.0", "if not self.training:", "if True:"),
    "2-padding-in-capacity": ("The capacity counts real tokens only", "mask.sum(dim=1)",
                              "mask.new_ones(mask.shape).sum(dim=1)"),
    "2-capacity-of-the-batch": ("The capacity is per sample", "mask.sum(dim=1)",
                                "mask.sum().expand(len(mask))"),
    "2-one-argsort": ("Is it one argsort?", "order.argsort(dim=1)", "order"),
    "2-rank-among-all-tokens": ("in its own expert's queue", "order = gates.",
                                "order = gates.amax(dim=2, keepdim=True)."),
    "2-first-come": ("The least probable tokens are dropped first", "order.argsort(dim=1)",
                     "(gates != 0).cumsum(dim=1) - 1"),
    "2-counted-after-dropping": ("before any is dropped", "share * probs.sum(dim=0)",
                                 "(gates != 0).sum(dim=(0, 1)) / n * probs.sum(dim=0)"),
    "3-not-rescaled": ("rescaled to sum to 1 if k > 1",
                       "top_k_gates(logits.softmax(dim=-1), self.top_k)",
                       "top_k_gates(p := logits.softmax(dim=-1), self.top_k).sign() * p"),
    "3-logsumexp-of-probabilities": ("logits them", "logits.logsumexp",
                                     "logits.softmax(dim=-1).logsumexp"),
    "3-padding-counted": ("The penalty counts padding",
                          "(z * mask).sum() / mask.sum().clamp(min=1)", "z.mean()"),
    "3-overflow": ("The penalty overflows", "logits.logsumexp(dim=-1)",
                   "logits.exp().sum(dim=-1).log()"),
    "3-weight-of-its-own": ("weight has to stay", "weight = 0.001",
                            "weight = property(lambda self: 0.0, lambda self, value: None)"),
    "4-tokens-choose": ("Tokens of each expert: Found [8.0",
                        "dim=1, descending=True, stable=True).argsort(dim=1)",
                        "dim=2, descending=True, stable=True).argsort(dim=2)"),
    "4-padding-selected": ("padding is selected", "probs.masked_fill(~mask[..., None], -1.0)",
                           "probs"),
    "4-softmax-over-tokens": ("over the tokens", "softmax(dim=-1)", "softmax(dim=1)"),
    "5-softmax": ("neither a softmax", "logits.sigmoid()", "logits.softmax(dim=-1)"),
    "5-bias-on-the-logits": ("to the scores, ", "(scores + self.bias)", "(logits + self.bias)"),
    "5-bias-in-the-gates": ("is in the gates", "scores.gather", "(scores + self.bias).gather"),
    "5-wrong-sign": ("The sign is wrong", "load.mean() - load", "load - load.mean()"),
    "5-difference": ("After 1 updates", "torch.sign(load.mean() - load)", "(load.mean() - load)"),
    "6-rescaled-at-1": ("At k = 1 every gate is 1", "if self.top_k > 1:", "if True:"),
    "6-softmax": ("a softmax gives other values", "logits.sigmoid()", "logits.softmax(dim=-1)"),
    "6-not-rescaled": ("At k = 2: Found", "if self.top_k > 1:", "if False:"),
    "6-not-declared": ("sums_to_one does not match", "return self.top_k > 1", "return False"),
    "7-previous-ignored": ("A generated", "if previous is not None:", "if False:"),
    "7-answer-pooled": ("Answer token", "mask & prompt", "mask"),
    "7-padding-pooled": ("Padding changes the route", "mask & prompt", "prompt"),
    "7-each-token": ("All positions are", "pooled.softmax", "logits.softmax"),
    "7-softmax-first": ("the softmax after the mean", "pool(logits,",
                        "pool(logits.softmax(dim=-1),"),
    "7-wrong-sign": ("+ log E - entropy of the mean", "- entropy(probs.sum", "+ entropy(probs.sum"),
    "8-top-k-after-relu": ("there is no top-k", "logits.relu()", "logits.relu() * (logits >= "
                           "logits.topk(self.top_k).values[..., -1:])"),
    "8-padding-counted": ("The penalty counts padding", "mask.sum().clamp(min=1)", "mask.numel()"),
    "8-wrong-sign": ("From 0.5, with 3.4 experts", "load.sum() - self.top_k",
                     "self.top_k - load.sum()"),
}  # fmt: skip
# Two for each assignment, of which there are rows.
SCORED = ("1-no-softplus", "1-importance-of-counts", "2-one-argsort", "2-rank-among-all-tokens",
          "3-logsumexp-of-probabilities", "3-padding-counted", "4-tokens-choose",
          "4-padding-selected", "5-wrong-sign", "5-bias-in-the-gates", "6-softmax",
          "6-not-rescaled", "7-previous-ignored", "7-each-token", "8-wrong-sign",
          "8-top-k-after-relu")  # fmt: skip


def wrong_answer(name: str) -> tuple[str, str]:
    """-> the name of its class, its text."""
    number, (_, old, new) = int(name[0]), EDITS[name]
    text = (HERE.parent / f"solutions/a{number}.py").read_text()
    assert text.count(old) == 1, f"{name}: {old!r} is not once in the solution"
    return STUBS[number].rpartition(":")[2], text.replace(old, new)


def table(*numbers: int) -> str:
    """Markdown. apart: from the solution by more than twice the larger of the two spreads."""
    lines = []
    for number in numbers:
        rows, missing = score.references(number, score.budget_of(number))
        assert not missing, missing
        right = rows[-1]
        rows += [
            read_json(HERE / f"{name}.json", dict) for name in SCORED if int(name[0]) == number
        ]
        _, (*_, column), _ = score.LEADS.get(number, ("", ("facts",), ""))
        for row in rows:
            spread = max(row[f"{column}_sd"], right[f"{column}_sd"])
            is_apart = abs(row[column] - right[column]) > 2 * spread
            cells = score.cells(row, number)
            lines.append({
                "": str(number), "answer": row["router"],
                "leading column": next(iter(score.lead(row, number).values()), "facts"),
                "apart": "" if row is right else "yes" if is_apart else "no",
                **{name: cells[name] for name in ("facts", "val loss")}, "hash": row["hash"][:8],
            })  # fmt: skip
    return score.markdown(lines)


def main(names: list[str]) -> None:
    for name in names or SCORED:
        cls, text = wrong_answer(name)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name}.py"
            file.write_text(text)
            score.main(["--assignment", name[0], "--router", f"{file}:{cls}",
                        "--json", str(HERE / f"{name}.json")])  # fmt: skip
    print(table(*STUBS))


if __name__ == "__main__":
    main(sys.argv[1:])
