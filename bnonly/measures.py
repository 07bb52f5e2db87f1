"How the numbers of claims are measured: what is made of the means over seeds."
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from .accuracy import DEEP, budgets, growth, small_runs, welch
from .experiment import Spec, parse_arch, preset
from .regularization import methods
from .selections import PANELS, Point, parse_selection, points_of, runs_of, where

# -------- Dauphin and Cubuk's methods

ON = {"cifar10": ("wrn28-10", "CIFAR-10", 200, 10), "svhn": ("wrn28-10", "SVHN", 200, 10),
      "imagenet": ("resnet50", "ImageNet", 90, 2),
      "b8": ("efficientnet-b8", "ImageNet", 350, 2)}   # network, images, epochs, seeds
MISSING = {"imagenet": "without Goyal et al.'s further improvements",   # of the paper's recipe, in this project
           "b8": "by SGD on crops of 224 pixels, without RandAugment, StochasticDepth and early stopping"}


@lru_cache(None)
def recipe_of(arch:str, data:str) -> dict:   # field to its values
    "What the preset `regularization` says of a network on some images, apart from the method."
    planned = [s for s in preset("regularization") if (s.arch, s.data) == (arch, data)]
    free = "arch", "data", "epochs", "seed", "norm", "embedding_l2", "functional_l2", "standardize", "dropout"
    return {n: {getattr(s, n) for s in planned} for n in Spec.__dataclass_fields__ if n not in free}


def deviations(run:dict, on:str) -> str:
    "What else of a run is not the paper's, in words. Other images have another recipe anyway."
    if run["data"] == "digits": return ""
    words = [f"{n}={run[n]}" for n, values in recipe_of(ON[on][0], run["data"]).items() if run[n] not in values]
    return ", ".join(filter(None, [*words, MISSING.get(on)]))


def method_runs(table:pd.DataFrame, on:str, name:str, stand_in:bool=True, done:bool=True) -> pd.DataFrame:
    "The runs of a method; digits stand in for CIFAR-10 where they may."
    if not len(table): return table
    rows = methods(table[[parse_arch(a).family == parse_arch(ON[on][0]).family for a in table.arch]])
    if done: rows = rows[rows.status == "complete"]
    exact = rows[rows.data == ("imagenet" if on == "b8" else on)]
    rows = rows[rows.data == "digits"] if not len(exact) and stand_in and on == "cifar10" else exact
    rows = rows[rows.method == name]
    return rows.assign(odd=[deviations(r, on) for r in rows.to_dict("records")])


def cases_of(table:pd.DataFrame, on:str, name:str, column:str="accuracy", stand_in:bool=True, **only) -> dict:
    "Network to Point at the strength and learning rate with the best accuracy, of those with the most seeds."
    rows, found = method_runs(table, on, name, stand_in), {}
    if column not in rows or not len(rows): return {}
    rows = rows[rows[column].notna()]
    for field, value in only.items(): rows = rows[np.isclose(rows[field], value)]
    for arch, part in rows.groupby("arch"):
        part = part[part.odd == min(part.odd, key=len)]   # the paper's recipe, where a run has it
        groups = [g for _, g in part.groupby(["lr", "strength", "epochs", "images"])]
        best = max(groups, key=lambda g: (min(len(g), ON[on][3]), g.accuracy.mean()))
        made = set(zip(best.images, best.epochs, best.odd))
        found[arch] = Point(arch, best[column].mean(), best[column].std(), len(best), made)
    return found


# -------- what is made of means

class Item(NamedTuple):
    "One measured number of a claim."
    name: str          # of what
    value: float
    se: float          # NaN where a seed stands alone; 0 where it is exact
    df: float          # degrees of freedom of the error
    n: int             # seeds behind it, the fewest where means are compared
    used: tuple = ()   # the points it is made of
    ends: tuple = ()   # of its 95% interval, where that is not Student's


def weighted(name:str, *parts, value:float|None=None) -> Item:   # parts: (weight, Point)
    "A weighted sum of means, or another value with the error of one."
    se, df = welch([(w, p.sd, p.n) for w, p in parts])
    if value is None: value = sum(w*p.value for w, p in parts)
    return Item(name, value, se, df, min(p.n for _, p in parts), tuple(p for _, p in parts))


def difference(name:str, a:Point, b:Point, column:str) -> Item:
    "How far one mean is above another: in percent for norms, else in points."
    if not column.endswith("_norm"): return weighted(name, (1, a), (-1, b))
    return weighted(name, (100/b.value, a), (-100*a.value/b.value**2, b), value=100*(a.value/b.value - 1))


def means(table, claim, words, stand_in=True) -> dict:
    if claim.on: return cases_of(table, claim.on, words, claim.column, stand_in)
    return points_of(table, words, claim.column)


def level(table, claim):
    "A number of one network, or of each network of a family."
    return [weighted(a, (1, p)) for a, p in means(table, claim, claim.runs[0], False).items()]


def best(table, claim):
    "The largest number in a family."
    found = means(table, claim, claim.runs[0])
    if not found: return []
    top = max(found.values(), key=lambda p: p.value)
    return [weighted(top.name, (1, top))._replace(used=(top, *found.values()))]


def gap(table, claim):
    "One selection above another: network by network where they name the same, else the one above the other."
    (one, two), column = claim.runs, claim.column
    a, b = means(table, claim, one), means(table, claim, two)
    if claim.on or parse_selection(one).archs == parse_selection(two).archs:
        return [difference(k, a[k], b[k], column) for k in a if k in b]
    return [difference(f"{p.name} - {q.name}", p, q, column) for p in a.values() for q in b.values()]


def rising(table, claim):
    "Each network of a family above the one before it."
    found = list(means(table, claim, claim.runs[0]).values())
    return [weighted(f"{b.name} - {a.name}", (1, b), (-1, a)) for a, b in zip(found, found[1:])]


def pairs(table, claim):
    "One width above another at every depth."
    (one, two), (a, b) = claim.runs, (means(table, claim, words) for words in claim.runs)
    names = zip(parse_selection(one).archs, parse_selection(two).archs)
    return [weighted(f"{k} - {j}", (1, a[k]), (-1, b[j])) for k, j in names if k in a and j in b]


def larger(table, claim):
    "The first difference of two networks above the second."
    p = [next(iter(means(table, claim, words).values()), None) for words in claim.runs]
    return [] if None in p else [weighted(claim.text, *zip((1, -1, -1, 1), p))]


def shrinking(table, claim):
    "What one selection adds to another is less in each network than in the one before it."
    a, b = (means(table, claim, words) for words in claim.runs)
    names = [k for k in a if k in b]
    return [weighted(f"{i}, then {j}", (1, a[i]), (-1, b[i]), (-1, a[j]), (1, b[j])) for i, j in zip(names, names[1:])]


def share_of(name:str, rows:pd.DataFrame, failed, sign:tuple) -> list:
    "How many of some runs failed, in percent, with Clopper and Pearson's interval."
    if not len(rows): return []
    k, n = int(failed.sum()), len(rows)
    exact = binomtest(k, n).proportion_ci()
    used = tuple(Point(a, 100*k/n, 0., len(r), {sign[i] for i in r.index}) for a, r in rows.groupby("arch"))
    return [Item(name, 100*k/n, 0., np.inf, min(p.n for p in used), used, (100*exact.low, 100*exact.high))]


def failing(table, claim):
    "The share of runs that diverge or stay at chance."
    rows = runs_of(table, claim.runs[0]).reset_index(drop=True)
    if not len(rows): return []
    failed = (rows.status != "complete") | (rows.accuracy < 20)
    return share_of("runs", rows, failed, [where(r) for r in rows.to_dict("records")])


def diverging(table, claim):
    "The share of runs of a method that diverge above a coefficient."
    rows = method_runs(table, claim.on, claim.runs[0], False, False)
    if not len(rows): return []
    rows = rows[rows.strength > claim.above*1.001].reset_index(drop=True)
    return share_of("runs", rows, rows.status != "complete", list(zip(rows.images, rows.epochs, rows.odd)))


# -------- straight lines, and small networks beside them

def line_of(table, words):   # of the fit, the points
    "The line through a family's accuracies, if all of its networks and no others are there: others have another line."
    found = points_of(table, words)
    if set(parse_selection(words).archs) != set(found): return None, ()
    return growth(table).get(PANELS[parse_selection(words).which][0]), tuple(found.values())


def fitted(value):
    "A claim about a number of each line, whose error is that of the line."
    def measure(table, claim):
        lines = [line_of(table, words) for words in claim.runs]
        if any(f is None for f, _ in lines): return []
        points = tuple(p for _, ps in lines for p in ps)
        number, se = value(table, *(f for f, _ in lines))
        return [Item(claim.runs[0], number, se, min(len(ps) for _, ps in lines) - 2, min(p.n for p in points), points)]
    return measure


def steeper(_, f, g):
    "How much steeper one line is than another, in percent."
    ratio = f.slope/g.slope
    return 100*(ratio - 1), 100*abs(ratio)*((f.stderr/f.slope)**2 + (g.stderr/g.slope)**2)**.5


def last(table, f):
    "How far the deepest network is from its line. The line's own error is left out."
    deep = budgets(table).query("panel == 'ResNet'").iloc[-1]
    return deep["mean"] - f.intercept - f.slope*np.log2(deep.bn), deep.sd/deep.n**.5


def over(small:pd.DataFrame, curve:pd.DataFrame) -> list:   # of (name, value, se, df, n)
    "How far each small network lies above a curve, for those within its reach."
    if len(curve) < 2: return []
    curve = curve.sort_values("bn")
    small = small[(small.bn >= curve.bn.min()) & (small.bn <= curve.bn.max())]
    there, rows = np.log2(curve.bn.astype(float)), []
    for r in small.to_dict("records"):
        shares = [np.interp(np.log2(float(r["bn"])), there, one) for one in np.eye(len(curve))]
        parts = [(s, c["mean"], c["sd"], c["n"]) for s, c in zip(shares, curve.to_dict("records")) if s]
        se, df = welch([(1, r["sd"], r["n"]), *((s, sd, n) for s, _, sd, n in parts)])
        n = int(min(r["n"], *(p[3] for p in parts)))
        rows.append((r["arch"], r["mean"] - sum(s*m for s, m, *_ in parts), se, df, n))
    return rows


def small_items(table, rows, *others):
    words = *others, f"{','.join(small_runs(table).arch)} all"
    used = tuple(p for w in words for p in points_of(table, w).values()) if rows else ()
    return [Item(*r, used) for r in rows]


def small(table, claim):
    "How far fully trainable small networks are above BatchNorm alone at their budget, at best."
    if not len(table): return []
    rows = over(small_runs(table), budgets(table).query("panel == 'ResNet'"))
    return small_items(table, sorted(rows, key=lambda r: -r[1])[:1], "deep bn")


def strata(table, claim):
    "Small networks of widths 1/4 and 1/2 above those of 1/8 at their budget."
    if not len(table): return []
    rows = small_runs(table)
    return small_items(table, over(rows[rows.width > .125], rows[rows.width == .125]))


# -------- by the strength of a penalty

def by_strength(table, claim, name:str, column:str) -> list:   # of dicts of cases, no penalty first
    "The cases of each coefficient of a method, from Fixup alone on."
    steps = sorted(methods(table).query("method == @name").strength.unique()) if len(table) else []
    each = [cases_of(table, claim.on, name, column, strength=s) for s in steps]
    return [cases_of(table, claim.on, "Fixup", column), *each]


def stronger(table, claim, sign=1):
    "A column rises with the strength of a penalty."
    cases = by_strength(table, claim, claim.runs[0], claim.column)
    return [difference(f"{k}, step {i+1}", *((b[k], a[k])[::sign]), claim.column)
            for i, (a, b) in enumerate(zip(cases, cases[1:])) for k in a if k in b]


def weaker(table, claim):
    "A column falls with the strength of a penalty."
    return stronger(table, claim, -1)


def matched(table, claim):
    "A method's accuracy above another's at the strength, between two that were run, where a norm is the first's."
    base, name = claim.runs
    ends = [cases_of(table, claim.on, base, c) for c in (claim.column, "accuracy")]
    norms, reached = (by_strength(table, claim, name, c) for c in (claim.column, "accuracy"))
    found = []
    for k in ends[0]:
        goal = ends[0][k].value
        steps = [(m[k].value, r[k]) for m, r in zip(norms, reached) if k in m and k in r]
        between = [(a, b) for a, b in zip(steps, steps[1:]) if b[0] <= goal <= a[0]]
        for (high, a), (low, b) in between[:1]:
            w = np.log(goal/low)/np.log(high/low) if high > low else .5
            found.append(weighted(k, (1, ends[1][k]), (-w, a), (w-1, b)))
    return found


def rates(table, claim):
    "A method at one learning rate above itself at another."
    a, b = (cases_of(table, claim.on, claim.runs[0], lr=lr) for lr in claim.rates)
    return [weighted(k, (1, a[k]), (-1, b[k])) for k in a if k in b]


def recovered(table, claim):
    "Which share of the way from the second method to the third the first has gone, in percent."
    found = []
    a, b, c = (means(table, claim, m) for m in claim.runs)
    for k in a.keys() & b.keys() & c.keys():
        way = c[k].value - b[k].value
        share = (a[k].value - b[k].value)/way
        parts = zip(100/way*np.array([1, share - 1, -share]), (a[k], b[k], c[k]))
        found.append(weighted(k, *parts, value=100*share))
    return found


KINDS = dict(level=level, best=best, gap=gap, above=gap, rising=rising, pairs=pairs, larger=larger, shrinking=shrinking,
             failing=failing, diverging=diverging, small=small, strata=strata,
             steeper=fitted(steeper), last=fitted(last),
             slope=fitted(lambda t, f: (f.slope, f.stderr)), stronger=stronger, weaker=weaker, matched=matched,
             correlation=fitted(lambda t, f: (abs(f.rvalue), (1 - f.rvalue**2)/max(len(DEEP) - 2, 1)**.5)),
             rates=rates, recovered=recovered)
KINDS["p-value"] = fitted(lambda t, f: (np.log10(f.pvalue), 0.))
