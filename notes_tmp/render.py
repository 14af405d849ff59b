import json,sys,re
R='/tmp/w19/results/'
J=[json.load(open(R+f'phantoms-tiny-seed{s}.json')) for s in range(3)]
def kinds(r,t):
    k=[x for n,x in r["by_kind"].items() if n.endswith(f"({t})") and not n.startswith("sign")]
    key={"closed":"closed_accuracy","open":"open_recall"}[t]; n="n_"+t
    return 100*sum(x[key]*x[n] for x in k)/sum(x[n] for x in k)
rows=["| | closed | open | facts | seen wordings | new wordings | false premises | blind control: all; facts | router: images |","|---|---|---|---|---|---|---|---|---|"]
for s,r in enumerate(J):
    f=r["facts"]; ci=r["by_kind"]["sign (open)"]["ci95"]["open_recall"]; w=r["by_wording"]
    rows.append(f"| seed {s} | {kinds(r,'closed'):.1f} % | {kinds(r,'open'):.1f} % | {100*f['own']:.1f} % [{100*ci[0]:.1f}, {100*ci[1]:.1f}] | {100*w['seen wordings']['overall']:.1f} % | {100*w['new wordings']['overall']:.1f} % | {100*r['by_kind']['false premise (open)']['open_recall']:.1f} % | {100*r['blind']['protocols']['strict']['overall']:.1f} %; {100*f['blind']:.1f} % | {round(r['router']['accuracy']*r['router']['n'])} of {r['router']['n']} |")
print("\n".join(rows))
print([ (100*r["facts"]["majority"],100*r["majority"]["protocols"]["strict"]["overall"],100*r["facts"]["true"],100*r["facts"]["wrong"]) for r in J])
print([(100*r["by_kind"]["count (open)"]["open_recall"],100*r["by_kind"]["count (closed)"]["closed_accuracy"]) for r in J])
