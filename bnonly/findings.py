"What a study says: its claims, the paper's comparisons, accuracies, and one sentence about them."
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from .accuracy import compare_means, shown
from .claims import once
from .experiment import Spec, parse_arch, summary
from .pages import as_table, verdict_kind
from .recipes import panels, single_recipe

HEADLINES = dict(   # first word of a study's name to its five claims
    mlp=("mlp-bn-over-random", "mlp784-over-90", "mlp-norm-helps", "mlp100-over-10", "lenet-bn"),
    regularization=("dc-gap-cifar", "dc-fl2-cifar", "dc-el2-cifar", "dc-not-all-cifar", "dc-grows-embedding-cifar10"))
MAIN_CLAIMS = "all-over-bn", "bn-over-random2", "bn-over-output", "deeper", "few-disabled"
RULE = ("Only what is measured on the paper's images, epochs and networks, with as many seeds, or counted, can be "
        "reproduced. A claim holds where the whole 95% interval of what was measured (Welch's t) agrees with it, does "
        "not hold where none of the interval does, and is undecided otherwise, as with a single seed. A claim about "
        "several networks holds when it does for each. A number in several sentences counts once.")
RULE_OF_COMPARISONS = ("The study's networks one by one, the same comparisons whatever is trained. One mean is above "
                       "another where Welch's t-test says so at 5%; a single seed tells nothing apart.")


def claims_table(found, every: bool = True):
    "The claims as a table, the measured ones first, each in the paper's order; without the others if not `every`."
    measured = found.verdict != "not measured"
    rows = found[measured]
    if every:
        rows = found.loc[[*found.index[measured], *found.index[~measured]]]
    columns = ["place", "claim", "paper", "measured", "n", "verdict", *(["needs"] if every else [])]
    return as_table(rows[columns], numbers=("paper", "measured", "n"), verdicts=("verdict",))


def headline(found, study: str):
    "The five claims that a report opens with, measured or not."
    ids = HEADLINES.get(study.partition("-")[0], MAIN_CLAIMS)
    rows = found.set_index("id").reindex([i for i in ids if i in set(found.id)]).reset_index()
    rows = rows.assign(verdict=rows.verdict.str.partition(" on ")[0])   # on which images the sentence above says
    return as_table(rows[["verdict", "claim", "paper", "measured", "n"]], ("paper", "measured", "n"), ("verdict",))


def comparisons(plan: list, table):
    "The four comparisons of the paper's Figure 2 for the networks of a plan; `table` as `results` gives it."
    rows = pd.DataFrame([dict(asdict(s), key=s.key) for s in plan], columns=[*Spec.__dataclass_fields__, "key"])
    wanted = single_recipe(rows)
    own = table[[Path(f).name in set(wanted.key) for f in table.folder]]
    measured = {(r["arch"], r["policy"]): r for r in summary(own).to_dict("records")} if len(own) else {}
    planned, pairs = set(zip(wanted.arch, wanted.policy)), {}
    for _, panel in panels(wanted).sort_values("at").groupby("panel", sort=False):
        archs = list(dict.fromkeys(panel.arch))
        for above, below in ("all", "bn"), ("bn", "random2"), ("bn", "output"):
            pairs |= {((a, above), (a, below)): None for a in archs}
        pairs |= {((b, "bn"), (a, "bn")): None for a, b in zip(archs, archs[1:])}
    found = []
    for one, two in pairs:
        if not {one, two} <= planned:
            continue
        first, second = (measured.get(o, dict(mean=0., sd=0., n=0)) for o in (one, two))
        here = compare_means(first, second) if first["n"] and second["n"] else "not measured"
        words = [shown(r["mean"], r["sd"], r["n"]) for r in (first, second)]
        found.append([f"{' '.join(one)} > {' '.join(two)}", *words, here])
    return pd.DataFrame(found, columns=["the paper finds", "first", "second", "here"])


def count_verdicts(verdicts, words: dict) -> str:
    "How many verdicts come to what: kind (`verdict_kind`) to its words for one and for several."
    kinds = [verdict_kind(v) for v in verdicts]
    return ", ".join(f"{n} {several if n > 1 else one}" for k, (one, several) in words.items() if (n := kinds.count(k)))


def one_sentence(table, compared, found) -> str:
    "What a study comes to; `compared` as `comparisons` gives it, `found` as `claims` does."
    images = " and ".join(sorted(set(table.images)))
    ages = "/".join(map(str, sorted(set(table.epochs))))
    words = dict(yes=("holds", "hold"), no=("does not", "do not"), open=("is undecided", "are undecided"),
                 none=("is not measured", "are not measured"))
    if len(compared):
        return (f"Of {len(compared)} comparisons of test accuracy that the paper makes between networks like these, "
                f"{count_verdicts(compared['here'], words)}, on {images} after {ages} epochs.")
    findings = once(found).query("kind == 'finding'")
    came = count_verdicts(findings.verdict, words)
    return f"Of the paper's {len(findings)} findings, {came}, on {images} after {ages} epochs."


def accuracies(table):
    "Mean ± standard deviation (n) of the test accuracy, networks by policies."
    stats = summary(table)
    others = [c for c in stats if c not in ("arch", "policy", "mean", "sd", "n") and stats[c].nunique() > 1]
    cells = list(map(shown, stats["mean"], stats.sd, stats.n))
    wide = stats.assign(cell=cells).pivot(index=["arch", *others], columns="policy", values="cell").reset_index()
    by_size = lambda c: c.map(parse_arch) if c.name == "arch" else c
    return wide.sort_values(["arch", *others], key=by_size).rename_axis(columns=None)
