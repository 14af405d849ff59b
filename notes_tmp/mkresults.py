"""results/README.md: the new parts; keeps the parts about scoring, real data, the router, cost."""
old=open('/work/main/results/README.md').read()
def between(a,b): return old[old.index(a):old.index(b)]
head='''# Results

Every number stands beside the command, device and seeds that it came from; where nothing was run, it is listed as "not run". [Embedded images](#embedded-images) and the first section of [What we found](#what-we-found) are of the code of this commit or of the one that a table names. All else was measured earlier (up to commit d536343, or where a commit is named), with a `tiny` whose FFNs were four times as wide, on embedded data without signs.

This folder holds what `eval.py --json` and `lab.ablate` wrote; `python -m lab.tables` prints the former beside the paper's tables. `python -m lab.reproduce all --list` prints the commands that make it again, with their hours; without `--list` it runs them. A table of an ablation is computed again from its scores, question by question and seed by seed, by `python -m lab.ablate facts --scores results/ablations/facts.npz`.

'''
toc=between("- [How answers are scored]","## How answers are scored")
scored=between("## How answers are scored","## Embedded images")
open('/tmp/parts_scored.md','w').write(scored)
real=between("## Real data","## What we found")
router=between("### Is the router right?","### Does sparsity save")
cost=between("### Does sparsity save","### What are 30 to 50 %")
share=old[old.index("### What are 30 to 50 %"):]
import sys
emb=open('/tmp/new_embedded.md').read(); found=open('/tmp/new_found.md').read()
real=real.replace("## Real data\n","## Real data\n\nMeasured before the preset changed (commit d536343 or before); today's `tiny` has not been trained on real data.\n",1)
router=router.replace("### Is the router right?","### Is the router right, where memory is not needed?")
open('/tmp/w19/results/README.md','w').write(head+toc+scored+emb+real+found+router+cost+share)
