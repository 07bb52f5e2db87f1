"Selections of runs: a network or a family, what trains, and the mean over seeds."
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pandas as pd

from .accuracy import DEEP, IMAGENET, VGGS, WIDE
from .experiment import BN_INITS, INITS, NORMS, Spec, parse_arch
from .mlp import mlps
from .recipes import family, papers_recipe


MLPS = dict(mlp10=mlps(10), mlp100=mlps(100), mlp784=mlps(784), mlps=mlps(10, 100, 784), mlp784deep=mlps(784)[1:])
SMALL = ("wrn20-0.125 wrn32-0.125 wrn68-0.125 wrn128-0.125 wrn248-0.125 wrn20-0.25 wrn32-0.25 wrn68-0.25 "
         "wrn20-0.5").split()   # of Figure 10
CIFAR = [*DEEP, *WIDE[1:]]
FAMILIES = MLPS | dict(small=SMALL, deep=DEEP, wide=WIDE, cifar=CIFAR, imagenet=IMAGENET, vgg=VGGS,
                       resnets=[*CIFAR, *IMAGENET])
PANELS = dict(deep=("ResNet",), wide=("WRN",), cifar=("ResNet", "WRN"), imagenet=("ImageNet ResNet",), vgg=("VGG",),
              resnets=("ResNet", "WRN", "ImageNet ResNet"))   # what stands in for a family in a small study


class Select(NamedTuple):
    "Some runs of a study."
    archs: tuple
    policy: str
    bn_init: str
    init: str
    norm: str
    which: str   # the name of a family, or ''


@lru_cache(None)
def parse_selection(words:str   # e.g. 'deep bn', 'resnet866 bn positive', 'resnet18,resnet34 all'
                   ) -> Select:
    "Read a selection; `ValueError` with the nearest name where one does not exist."
    which, policy, *rest = words.split()
    field = {w: f for f, values in dict(init=INITS, bn_init=BN_INITS, norm=NORMS).items() for w in values}
    archs = [Spec(arch=a).arch for a in FAMILIES.get(which) or which.split(",")]
    spec = Spec(arch=archs[0], policy=policy, **{field.get(r, "bn_init"): r for r in rest})
    return Select(tuple(archs), spec.policy, spec.bn_init, spec.init, spec.norm, which if which in FAMILIES else "")


class Point(NamedTuple):
    "A mean over seeds."
    name: str      # of the network
    value: float
    sd: float      # NaN for one seed
    n: int
    where: set     # of images, epochs, and in words what else of the recipe is not the paper's


FREE = "init", "bn_init", "norm"   # what a selection may ask for
UNTOLD = dict(lenet="a LeNet of which the report gives neither activation nor BatchNorms",   # family to what is open
              mlp="unlike his notebook in rate drop, epoch kept, input scale and random weights")


def where(run:dict) -> tuple:   # images, epochs, and what of the recipe is not the paper's
    "On what a run was made. Other images have another recipe anyway."
    paper = papers_recipe(run["arch"])
    free = {"arch", "policy", "seed", "data", "epochs", *FREE}
    fields = [n for n in Spec.__dataclass_fields__ if n in run and n not in free]
    odd = [f"{n}={run[n]}" for n in fields if run[n] != getattr(paper, n)]
    words = filter(None, [*odd, UNTOLD.get(parse_arch(run["arch"]).family)])
    return run["images"], run["epochs"], ", ".join(words) if run["data"] == paper.data else ""


def foreign(arch:str, images:str) -> bool:
    "Whether a network of the ImageNet family was trained on other images, which says nothing about ImageNet."
    return parse_arch(arch).family == "imagenet" and not images.startswith("ImageNet")


def runs_of(table:pd.DataFrame, words:str) -> pd.DataFrame:
    "The runs that a selection names, whatever became of them."
    s = parse_selection(words)
    if not len(table): return table
    rows = table
    for field in ("policy", "bn_init", "init", "norm"): rows = rows[rows[field] == getattr(s, field)]
    panel = PANELS.get(s.which, ())
    named = [a in s.archs or any(p in panel for p, *_ in family(a)) for a in rows.arch]
    return rows[np.array(named, bool) & ~np.array([foreign(a, i) for a, i in zip(rows.arch, rows.images)], bool)]


def points_of(table:pd.DataFrame,      # of one recipe in each family
              words:str,               # a selection
              column:str="accuracy"    # of the table
              ) -> dict:               # network to Point
    "The mean of a column over seeds, for each selected network that has it."
    if column not in table or not len(table): return {}
    rows = runs_of(table, words)
    rows = rows[(rows.status == "complete") & rows[column].notna()]
    return {a: Point(a, r[column].mean(), r[column].std(), len(r), {where(o) for o in r.to_dict("records")})
            for a, r in sorted(rows.groupby("arch"), key=lambda g: parse_arch(g[0]))}
