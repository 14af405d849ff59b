"""The paper's result tables with ours beside them, as markdown.

    python -m lab.tables [--results DIR]
    python -m lab.tables --record FILE [--record FILE ...] [--results DIR]

Ours are what `eval.py CHECKPOINT --json FILE` wrote; --record copies it to DIR. Files that differ
in their seed only are one row. The paper is arXiv 2404.10237v3, its numbers are as printed.
"""

import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import UserError, flag
from engine.cli import parse, user_errors, write_json
from sources.records import read_json, shown

BULKY = {"answers", "load", "by_kind", "by_modality"}
COMMANDS = ("trained_with", "command")
# Flags that change neither training nor the questions, or that follow from the rest of a row.
TRAIN_SKIPS = {"phase", "preset", "data", "out", "seed", "init", "device", "dtype", "resume",
               "save-every", "no-eval", "workers", "max-missing", "tune-vision", "no-tune-vision",
               "jitter", "no-jitter", "json"}  # fmt: skip
FLAG = r"(?<!\S)--([\w-]+)(?:[ =](?!--)(\S+))?"
EVAL_KEEPS = {"lang", "limit", "max-new", "router-level"}
SCORERS = ("strict", "med-moe", "llava-med")
PARTS = {"": "", "blind.": "blind control, ", "majority.": "majority baseline, "}
SCORERS_NOTE = """\
strict is ours; med-moe and llava-med are the released scorers, which search for a closed answer's
letters anywhere. Blind: each image replaced by their mean. Majority: the training split's commonest
answer. Router: accuracy on the image's modality."""

SIX = "RAD open | RAD closed | SLAKE open | SLAKE closed | PathVQA open | PathVQA closed"
VQA, SETS = ("vqa-rad", "slake", "pathvqa"), ("pneumoniamnist", "organcmnist")
OURS = [f"{d}/protocols.med-moe.{m}" for d in VQA for m in ("open_recall", "closed_accuracy")]
NOT = "^(?!.*(?:%s))"

READING = """# The paper's results and ours

Percent; open: recall, closed: accuracy. Ours: the score [its 95 % interval]; of several seeds their
mean (lowest-highest over the seeds) [the widest of their intervals]. A dash: nothing to score, or
not printed. Ours are scored as the paper's are (med-moe); the last table has the other scorers.
"""
# Title, header, the paper's rows, ours (label, pattern of a run's name, columns), a note.
# fmt: off
TABLES = [
    ("Table 1. Medical VQA", f"method | {SIX} | activated", """\
VL Encoder-Decoder | - | 82.47 | - | - | - | 85.61 | -
Q2ATransformer | - | 81.20 | - | - | 54.85 | 88.85 | -
Prefix T. Medical LM | - | - | - | 82.01 | - | 87.00 | -
PubMedCLIP | - | 80.00 | - | 82.50 | - | - | -
BiomedCLIP | - | 79.80 | - | 89.70 | - | - | -
M2I2 | - | 83.50 | - | 91.10 | - | 88.00 | -
BiomedGPT-S | 13.40 | 57.80 | 66.50 | 73.30 | 10.70 | 84.20 | -
BiomedGPT-M | 53.60 | 65.07 | 78.30 | 86.80 | 12.5 | 85.70 | -
CLIP-ViT w/ GPT2-XL | - | - | 84.30 | 82.10 | 40.0 | 87.00 | -
LLaVA | 50.00 | 65.07 | 78.18 | 63.22 | 7.74 | 63.20 | 7B
LLaVA-Med (LLaMA 7B) | 61.52 | 84.19 | 83.08 | 85.34 | 37.95 | 91.21 | 7B
LLaVA-Med (Vicuna 7B) | 64.39 | 81.98 | 84.71 | 83.17 | 38.87 | 91.65 | 7B
LLaVA-Med (Phi 2.7B) | 54.83 | 81.35 | 81.29 | 83.29 | 31.73 | 90.17 | 2.7B
Med-MoE (Phi2) | 58.55 | 82.72 | 85.06 | 85.58 | 34.74 | 91.98 | 3.6B
Med-MoE (StableLM) | 50.08 | 80.07 | 83.16 | 83.41 | 33.79 | 91.30 | 2.0B
zero-shot LLaVA-Med (LLaMA 7B) | 36.23 | 60.16 | 41.72 | 47.60 | 10.86 | 59.75 | -
zero-shot Med-MoE (Phi2) | 36.73 | 61.75 | 43.93 | 56.97 | 6.94 | 66.46 | -
zero-shot Med-MoE (StableLM) | 28.02 | 66.91 | 40.63 | 52.64 | 9.40 | 69.09 | -""",
    [("ours", "", [*OURS, "activated"])],
    "The LLaVA-Med rows are copied from its paper, except Phi 2.7B, the authors' own dense model. "
    "Zero-shot: after phase 2. 3.6B and 2.0B fit one expert and the meta expert, by the shapes."),
    ("Table 2. Open questions", "method | RAD EMS | RAD recall | RAD BLEU | SLAKE EMS | "
     "SLAKE recall | SLAKE BLEU | PathVQA EMS | PathVQA recall | PathVQA BLEU", """\
LLaVA-Med 7B | 58.33 | 61.52 | 54.13 | 82.83 | 83.08 | 81.69 | 37.95 | 36.86 | 32.89
Med-Flamingo 9B | 20.00 | - | - | - | - | - | 31.00 | - | -
PaLM-E 84B | - | - | 59.19 | - | - | 52.65 | - | - | 54.92
Med-MoE (Phi2) | 59.69 | 58.55 | 52.95 | 84.46 | 85.06 | 83.16 | 34.37 | 34.74 | 32.85
Med-MoE (StableLM) | 52.53 | 50.08 | 45.67 | 82.44 | 83.16 | 81.53 | 33.60 | 33.79 | 32.67""",
    [("ours", "", [f"{d}/protocols.med-moe.open_{m}" for d in VQA for m in
                  ("exact_match", "recall", "bleu1")])],
    "EMS is the released exact match, a precision of words. Table 1 calls 37.95 recall."),
    ("Table 3. Classification", "method | PneumoniaMNIST | OrganCMNIST", """\
Med-Mamba | 91.2 | 92.4
AutoKeras | 87.8 | 87.9
BiomedGPT | 90.8 | 88.9
Med-MoE (StableLM) | 89.3 | 88.6
Med-MoE (Phi2) | 91.4 | 89.9""",
    [(f"ours, {m}", "", [f"{d}/classification.{m}" for d in SETS])
     for m in ("likelihood_accuracy", "generation_accuracy", "auc")],
    "Accuracy; the paper does not describe how it reads a class from an answer. auc: times 100."),
    ("Tables 4, 5 and 6. What Med-MoE (Phi2) adds", f"method | {SIX}", """\
4: dense | 54.83 | 81.35 | 81.29 | 83.29 | 31.73 | 90.17
5: without meta expert | 54.37 | 81.42 | 81.54 | 82.45 | 32.12 | 90.19
6: router learnt with the rest | 56.33 | 82.19 | 82.75 | 84.59 | 33.40 | 91.19
4, 5, 6: Med-MoE | 58.55 | 82.72 | 85.06 | 85.58 | 34.74 | 91.98""",
    [("4: ours, dense", "dense", OURS), ("5: ours, without meta expert", "--no-meta", OURS),
     ("6: ours, router learnt with the rest", r"--router topk\b", OURS),
     ("4, 5, 6: ours, Med-MoE", NOT % "dense|--no-meta|--router ", OURS)],
    "The paper's dense model is fine-tuned on each data set; a phase 2 has not had phase 3."),
    ("Table 8. Cost", "method | size | GPU memory in training | time | GPU memory", """\
LLaVA-Med | 7B | >24GB | 5s | 20GB
Med-MoE (Phi2) | 3.6B | 23GB | 3s | 13.4GB
Med-MoE (StableLM) | 2.0B | 12.5GB | 3s | 10.5GB
Med-LoRAMoE (Phi2) | 3.6B | 13.5GB | 3s | 13.7GB
LoRAMoE (StableLM) | 2.0B | 8GB | 3s | 10.8GB""",
    [("ours", "", ["activated", "", "", ""])], "Size: activated parameters, see Table 1."),
    ("Tables 9 and 10. Experts", f"method | {SIX} | time", """\
9: 4 experts, top 1 | 46.7 | 83.4 | 82.1 | 83.2 | 33.9 | 90.9 | 7h
9: 4 experts, top 2 | 47.2 | 83.8 | 82.3 | 84.9 | 34.1 | 91.8 | 8h
10: 2 experts, top 2 | 47.03 | 77.54 | 81.52 | 81.45 | 32.78 | 90.60 | 6h
10: 4 experts, top 2 | 47.83 | 79.04 | 82.12 | 82.45 | 33.28 | 90.80 | 8h
10: 6 experts, top 2 | 48.03 | 78.84 | 82.42 | 82.65 | 33.58 | 91.10 | 11h""",
    [(f"ours, {label}", pattern, [*OURS, ""]) for label, pattern in
     (("top 1", r"--top-k 1\b"), ("2 experts", r"--experts 2\b"), ("6 experts", r"--experts 6\b"),
      ("4 experts, top 2", NOT % "dense|--top-k|--experts"))],
    "The backbone is not stated: 9 matches no other table, 10 a LoRA run of StableLM (rank 256)."),
]
# fmt: on


@dataclass(frozen=True)
class TablesConfig:
    """The paper's result tables with ours beside them."""

    results: str = flag(str(Path(__file__).parent.parent / "results"), "DIR of our results")
    record: tuple[str, ...] = flag((), "copy this eval.py --json FILE to --results; repeatable")
    force: bool = flag(False, "let --record overwrite another content")


def hide(word: str) -> str:
    """slake:/a/slake -> slake:DIR, medmnist:/a/x.npz -> medmnist:x.npz, /a/x.npz -> x.npz."""
    if not (match := re.fullmatch(r"((?:[\w-]{2,}[:=])*)([/~].*?)(@[\d.]+)?", word)):
        return word
    before, path, weight = match.groups("")
    is_folder = before.endswith(":") and "." not in Path(path).name
    return before + ("DIR" if is_folder else Path(path).name) + weight


def clean(file: Path, value: Any, path: str = "") -> Any:
    """What is kept of a file: nothing bulky, no path of this machine. Raises UserError on NaN."""
    if isinstance(value, dict):
        kept = {k: f"{path}.{k}".strip(".") for k in value if k not in BULKY}
        return {hide(k): clean(file, value[k], inner) for k, inner in kept.items()}
    if isinstance(value, list):
        return [clean(file, v, f"{path}.{i}") for i, v in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{file}: field "{path}" is {value}')
    if not isinstance(value, str):
        return value
    try:
        return shlex.join(map(hide, shlex.split(value))) if path in COMMANDS else hide(value)
    except ValueError as error:
        raise UserError(f'{file}: field "{path}" is no command: {error}') from error


def data_name(specs: list[str]) -> str:
    """slake:DIR -> slake; medmnist:DIR/pneumoniamnist_128.npz -> pneumoniamnist; several: a+b."""
    pattern = r"medmnist:(?:.*/)?(\w*?mnist).*|([\w-]*).*"
    return "+".join(filter(None, (n for s in specs for n in re.fullmatch(pattern, s).groups())))


class Result:
    """One file. Results of one name are rows of one model: they differ in data and seed only."""

    def __init__(self, file: Path):
        self.file, self.values = file, clean(file, read_json(file))
        self.seed, phase = self.get("seed", int), self.get("phase", int)
        self.preset, self.device, split = (self.get(k, str) for k in ("preset", "device", "split"))
        data = data_name([str(spec) for spec in self.get("data", list)])
        self.dataset = f"{data} ({split})" if split != "test" else data
        self.n, n = self.get("n", int), self.get("params.activated", int)
        is_dense = self.get("params.total", int) == self.get("params.dense_base", int)
        self.get("protocols.strict", dict)
        self.activated = f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M"
        trained, evaluated = (re.findall(FLAG, self.get(key, str)) for key in COMMANDS)
        learnt = [value for name, value in trained if name == "data"]
        changed = {f for f in trained if f[0] not in TRAIN_SKIPS}
        changed |= {f for f in evaluated if f[0] in EVAL_KEEPS}
        self.setup = ["dense"] * is_dense + [f"phase {phase}"] * (phase != 3)
        self.setup += [f"trained on {' '.join(learnt)}"] * (data_name(learnt) not in ("", data))
        self.setup += [f"--{' '.join(f)}".strip() for f in sorted(changed)]
        self.name = ", ".join([self.preset, *self.setup])

    def get(self, path: str, *kinds: type) -> Any:
        value = self.values
        for name in path.split("."):
            if not isinstance(value, dict) or name not in value:
                raise UserError(f'{self.file}: field "{path}" is missing')
            value = value[name]
        if type(value) not in kinds:
            problem = f"is {shown(value)}; must be of type {kinds[0].__name__}"
            raise UserError(f'{self.file}: field "{path}" {problem}')
        return value

    def share(self, path: str) -> list[float]:
        """-> percentage and the ends of its 95 % interval, if given; []: nothing to score."""
        holder, _, metric = path.rpartition(".")
        known = self.get(holder, dict)
        if self.dataset in known:  # classification, set by set
            return self.share(f"{holder}.{self.dataset}.{metric}")
        n = known.get("n_" + metric.split("_")[0], known.get("n"))
        if n == 0 or (metric == "auc" and known.get(metric, 0) is None):  # a class does not occur
            return []
        ci95 = known.get("ci95")
        ends = ci95.get(metric) if isinstance(ci95, dict) else ci95
        values = [self.get(path, float, int), *(ends if isinstance(ends, list) else [])]
        if len(values) == 2 or not all(type(x) in (float, int) and 0 <= x <= 1 for x in values):
            raise UserError(f'{self.file}: field "{path}" or its ci95 is no share: {values}')
        return [100 * x for x in values[:3]]


def cell(results: list[Result], column: str) -> str:
    """column: 'DATA/FIELD'; 'activated', parameters; or '', not measured by our runs."""
    if column == "activated":
        return results[0].activated
    data, _, path = column.partition("/")
    having = [r for r in results if r.dataset == data and r.values.get(path.split(".")[0])]
    shares = [share for r in having if (share := r.share(path))]
    if not shares:
        return "-" if having else "not run"
    values = [share[0] for share in shares]
    text = f"{sum(values) / len(values):.1f}"
    if len(values) > 1:
        text += f" ({min(values):.1f}-{max(values):.1f} over {len(values)} seeds)"
    ends = [share[1:] for share in shares if share[1:]]
    low, high = max(ends, key=lambda pair: pair[1] - pair[0], default=(0, 0))
    return f"{text} [{low:.1f}, {high:.1f}]" if ends else text


def origin(results: list[Result]) -> str:
    """What was run for one model and data set."""
    commands = [r.values[key] for key in COMMANDS for r in results]
    if len(results) > 1:
        commands = [re.sub(r" --seed[ =]\d+", "", command) for command in commands]
    seeds = ", ".join(str(r.seed) for r in results)
    where = f"{seeds}; {', '.join(sorted({r.device for r in results}))}"
    code = ", ".join(f"`{command}`" for command in dict.fromkeys(commands))
    return f"- {results[0].dataset}, n {results[0].n}, {results[0].name}; --seed {where}: {code}"


def render(models: dict[str, list[Result]], title, header, paper, ours, note) -> str:
    rows, origins = [header, "---" + " | ---" * header.count("|"), *paper.splitlines()], {}
    for label, pattern, wanted in ours:
        datasets = {column.partition("/")[0] for column in wanted if "/" in column}
        found = []
        for name, results in models.items():
            used = [r for r in results if not datasets or r.dataset in datasets]
            if used and re.search(pattern, name):
                found.append([f"{label}: {name}", *(cell(used, column) for column in wanted)])
                for data in sorted({r.dataset for r in used}):
                    origins[origin([r for r in used if r.dataset == data])] = None
        rows += map(" | ".join, found or [[label, *["not run"] * len(wanted)]])
    table = "\n".join(f"| {row} |" for row in rows)
    return "\n\n".join(filter(None, [f"## {title}", table, note, "\n".join(origins)])) + "\n"


def report(models: dict[str, list[Result]]) -> str:
    """All tables. What they print is read here: a mistake in a file is a UserError."""
    scores = [f"protocols.{s}.{m}" for m in ("closed_accuracy", "open_recall") for s in SCORERS]
    datasets = sorted({r.dataset for group in models.values() for r in group}) or ["ours"]
    ours = [
        (title + d, "", [*(f"{d}/{part}{s}" for s in scores), f"{d}/router.accuracy" * (not part)])
        for d in datasets
        for part, title in PARTS.items()
    ]
    header = " | ".join(["data", *(f"{kind} {s}" for kind in ("closed", "open") for s in SCORERS)])
    last = ("One set of answers, three scorers", f"{header} | router", "", ours, SCORERS_NOTE)
    return "\n".join([READING, *(render(models, *table) for table in [*TABLES, last])])


def load(files: list[Path]) -> dict[str, list[Result]]:
    """Name of a model -> its results, by seed. Raises UserError for two of one seed."""
    models = {}
    for result in sorted(map(Result, files), key=lambda r: (r.name, r.seed)):
        for other in models.setdefault(result.name, []):
            if (other.dataset, other.seed) == (result.dataset, result.seed):
                raise UserError(f"{other.file}, {result.file}: two of one model, data set and seed")
        models[result.name].append(result)
    return models


def record(result: Result, folder: Path, force: bool) -> None:
    words = [result.dataset, result.preset, *result.setup, f"seed{result.seed}"]
    file = folder / (re.sub(r"[^\w.]+", "-", "-".join(words)) + ".json")
    if not force and file.exists() and read_json(file) != result.values:
        raise UserError(f"{file} holds another content; --force overwrites it")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, result.values)
    print(f"{result.file} -> {file}")


@user_errors
def main(argv: list[str] | None = None) -> None:
    flags = parse(TablesConfig, argv, "python -m lab.tables")
    folder = Path(flags.results)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--results {folder}: is not a folder")
    models = load([Path(file) for file in flags.record] or sorted(folder.glob("*.json")))
    text = report(models)
    if not flags.record:
        print(text)
    for result in [r for results in models.values() for r in results if flags.record]:
        record(result, folder, flags.force)


if __name__ == "__main__":
    main()
