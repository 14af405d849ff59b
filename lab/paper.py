"""The result tables of arXiv 2404.10237v3 as printed, and our columns beside them."""

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
