"""The paper's figures of accuracy: 1 and 2, 8 and 9, 11 to 14 from one description, and 3 and 10.

A figure is data: its lines, its panels, its limits. Colours and names are the paper's.
"""
from dataclasses import asdict
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from .accuracy import GROWING, budgets, doubling, growth, small_runs
from .experiment import Spec, incomplete, parse_arch, summary
from .figures import SPREAD, WIDTH, corner, empty, footnote, legend, styled
from .recipes import PAPER, family, panels, paper_value, papers_recipe, single_recipe

__all__ = ["Line", "Layout", "SERIES", "ALL", "BN", "LAYOUTS", "points", "missing_runs", "paper_values",
           "images", "accuracy_panel", "accuracy_figure", "fig03", "fig10"]


# What a figure shows

class Line(NamedTuple):
    "One line of a figure: the runs it stands for and how it looks."
    policy: str
    label: str
    color: str
    bn_init: str = "uniform"
    style: str = "o-"


class Layout(NamedTuple):
    "One figure of the paper."
    title: str      # what it shows
    lines: tuple    # of Line
    panels: tuple   # of (family, column of the table)
    limits: dict    # family to the limits of its y axis; else 0 to 100


SERIES = {"all": ("All Params Trainable", "tab:blue"), "bn": ("BatchNorm", "tab:red"),
          "random2": ("2 Random Params Per Channel", "tab:green"), "bn+output": ("BatchNorm + Output", "tab:purple"),
          "output": ("Output", "tab:orange")}
ALL, BN = Line("all", *SERIES["all"]), Line("bn", *SERIES["bn"])
FIGURE2 = tuple(Line(p, *names) for p, names in SERIES.items())
GROWN = ("ResNet", "accuracy"), ("WRN", "accuracy")
FOUR = *GROWN, ("ImageNet ResNet", "accuracy"), ("ImageNet ResNet", "top5")
DISABLED = (Line("all", "All Parameters Trainable", "tab:blue"),
            Line("all-affine", "All Parameters Trainable (gamma and beta Disabled)", "tab:purple"))
ALTERNATE = (ALL, Line("all", "All Params Trainable, Alternate Init", "tab:cyan", "positive"),
             BN, Line("bn", "BatchNorm, Alternate Init", "tab:pink", "positive"))
SHORTCUTS = (ALL, BN, Line("bn+shortcut+output", "BatchNorm + Shortcuts + Output", "tab:purple"),
             Line("shortcut+output", "Shortcuts + Output", "tab:orange"))
GREENS = (2, "tab:green", "o-"), (4, "#1e7a1e", "s-"), (8, "#125212", "^-"), (16, "#062906", "D-")
RANDOM = ALL, BN, *(Line(f"random{k}", f"Random Params per Channel: {k}", color, style=style)
                    for k, color, style in GREENS)
OUTPUTS = (ALL, BN, Line("bn+output", *SERIES["bn+output"]),
           Line("output+random2", "Two Random Params per Channel + Output", "tab:green"))
NARROW = {"ResNet": (89, 96), "WRN": (89, 96), "VGG": (89, 96), "ImageNet ResNet": (68, 80)}
VGG_PANEL = ("VGG", "accuracy"),

LAYOUTS = {
    "fig01": Layout("Accuracy with gamma and beta trainable and disabled", DISABLED, FOUR[:3], NARROW),
    "fig02": Layout("Accuracy when only some parameters train", FIGURE2, FOUR, {}),
    "fig08": Layout("Accuracy of VGG with gamma and beta trainable and disabled", DISABLED, VGG_PANEL, NARROW),
    "fig09": Layout("Accuracy of VGG when only some parameters train", FIGURE2, VGG_PANEL, {}),
    "fig11": Layout("Accuracy when gamma and beta begin at 1", ALTERNATE, FOUR, {}),
    "fig12": Layout("Accuracy when shortcuts and output train too", SHORTCUTS, FOUR, {}),
    "fig13": Layout("Accuracy by the number of random parameters per channel", RANDOM, GROWN, {}),
    "fig14": Layout("Accuracy of two random parameters per channel with the output layer", OUTPUTS, FOUR, {})}
ONLY_BN = Layout("Accuracy against the number of BatchNorm parameters", (BN,), GROWN, {})


def points(table: pd.DataFrame, layout: Layout, value: str = "accuracy") -> pd.DataFrame:
    """What a figure shows: mean, sample standard deviation and n over complete runs, one row a network and line.

    `table` as `results` gives it, `value` one of its columns. Columns: mean, sd, n, panel, at, tick, line.
    """
    table = table if value in table else table.assign(**{value: np.nan})
    number = {(l.policy, l.bn_init): i for i, l in enumerate(layout.lines)}
    table = single_recipe(table, free=("bn_init",))
    in_figure = np.array([key in number for key in zip(table.policy, table.bn_init)], bool)
    stats = panels(summary(table[in_figure], value))
    return stats.assign(line=[number[k] for k in zip(stats.policy, stats.bn_init)]).sort_values("at")


# What it does without

def _sentence(what: str, archs: dict) -> list:   # archs: line to names
    def of(line, names): return f"{line.policy}{'' if line.bn_init == 'uniform' else f' ({line.bn_init})'} of {names}"
    words = "; ".join(of(line, ", ".join(names)) for line, names in archs.items())
    return [f"{what}: {words}"] if words else []


def _wanted(plan: list) -> pd.DataFrame:
    columns = [*Spec.__dataclass_fields__, "key"]
    rows = pd.DataFrame([dict(asdict(s), key=s.key) for s in plan], columns=columns)
    return single_recipe(rows, free=("bn_init",))


def missing_runs(plan: list, table: pd.DataFrame, lines: tuple, families: tuple) -> list[str]:
    """The runs a figure lacks, in sentences: one for each kind of gap.

    For the networks that the plan (as `preset` gives it) has in the figure's families: runs that are planned and not
    complete in the table (as `results` gives it), lines that are not planned, and families without any network.
    """
    absent, wanted = {s.key for s in incomplete(plan, table)}, _wanted(plan)
    archs = sorted(set(wanted.arch), key=lambda arch: parse_arch(arch)[::-1])
    found = {arch: {p for p, *_ in family(arch)} & set(families) for arch in archs}
    unmeasured, unplanned = {}, {}   # line to networks
    for line in lines:
        planned = wanted[(wanted.policy == line.policy) & (wanted.bn_init == line.bn_init)]
        for arch in [arch for arch in archs if found[arch]]:
            keys = planned[planned.arch == arch].key
            left = sum(k in absent for k in keys)
            part = f" ({left} of {len(keys)} seeds)" if left < len(keys) else ""
            if not len(keys):
                unplanned.setdefault(line, []).append(arch)
            elif left:
                unmeasured.setdefault(line, []).append(arch + part)
    without = [f for f in dict.fromkeys(families) if not any(f in of for of in found.values())]
    return [*_sentence("planned and not measured yet", unmeasured), *_sentence("not in this study", unplanned),
            *([f"no network of the family: {', '.join(without)}"] if without else [])]


# The paper's numbers, as stars

STARS = dict(marker="*", ls="", ms=9, mfc="none", mew=1.2, zorder=5)


def paper_values(layout: Layout, panel: str, data: str, value: str = "accuracy") -> pd.DataFrame:
    "What the paper's text gives in a panel, if the panel is on the paper's data. Columns: at, tick, line, mean."
    rows = []
    for (arch, policy, bn_init, column), number in PAPER.items():
        if column != value or papers_recipe(arch).data != data:
            continue
        lines = [i for i, l in enumerate(layout.lines) if (l.policy, l.bn_init) == (policy, bn_init)]
        places = [(at, tick) for p, at, tick in family(arch) if p == panel]
        rows += [(at, tick, i, number) for i in lines for at, tick in places]
    return pd.DataFrame(rows, columns=["at", "tick", "line", "mean"])


# Figures 1, 2, 8, 9 and 11 to 14

def images(table: pd.DataFrame, stats: pd.DataFrame) -> str:
    "What the images of some points are called."
    rows = single_recipe(table, free=("bn_init",))
    return " and ".join(sorted(set(rows[rows.arch.isin(stats.arch)].images)))


def _limits(limits: tuple, stats: pd.DataFrame) -> tuple:
    "The paper's limits, further apart where a point with its spread lies outside."
    spread = stats.sd.fillna(0)
    low, high = (stats["mean"] - spread).min(), (stats["mean"] + spread).max()
    return min(limits[0], np.floor(low)), max(limits[1], min(100, np.ceil(high + .5)))


def accuracy_panel(ax, stats: pd.DataFrame, lines: tuple, limits: tuple, stars: pd.DataFrame):
    "One family: accuracy against depth or width (logarithmic), a line for each policy; `paper_values` as stars."
    ticks = pd.concat([stats[["at", "tick"]], stars[["at", "tick"]]]).drop_duplicates("at").sort_values("at")
    for i, line in enumerate(lines):
        rows, paper = stats[stats.line == i], stars[stars.line == i]
        if len(rows):
            ax.errorbar(rows["at"], rows["mean"], rows.sd, fmt=line.style, capsize=3, color=line.color,
                        label=line.label, clip_on=False)
        if len(paper):
            ax.plot(paper["at"], paper["mean"], color=line.color,
                    label=None if len(rows) else line.label, **STARS)
    ax.set_xscale("log")
    places = ticks["at"].astype(float)
    ax.set_xticks(places, ticks.tick)
    ax.minorticks_off()
    ax.set(xlim=(places.min()/1.15, places.max()*1.15), ylim=_limits(limits, stats))
    corner(ax, stats)


CLASSES = {"imagenet": 1000, "tiny-imagenet": 200}   # of the data sets that have not ten


def _panel(ax, table, layout, name, value):
    stats = points(table, layout, value)
    stats = stats[stats.panel == name]
    data, top5 = stats.data.iloc[0], value == "top5"
    stars = paper_values(layout, name, data, value)
    accuracy_panel(ax, stats, layout.lines, layout.limits.get(name, (0, 100)), stars)
    chance = 100/CLASSES.get(data, 10) * (5 if top5 else 1)   # a guess among the classes, or five guesses
    if ax.get_ylim()[0] < chance:
        ax.axhline(chance, color="gray", ls=":", label="Chance")
    first = "Top-1 Test Accuracy (%)" if name.startswith("ImageNet") else "Test Accuracy (%)"
    ax.set(xlabel=f"{name} on {images(table, stats)}", ylabel="Top-5 Test Accuracy (%)" if top5 else first)


@styled()
def accuracy_figure(name: str, table: pd.DataFrame, plan: list = ()) -> plt.Figure:
    """One of the paper's figures of accuracy against depth and width.

    name: e.g. 'fig02'; table: as `results` gives it; plan: the runs of the study, to say what is missing.
    """
    layout = LAYOUTS[name]
    missing = missing_runs(plan, table, layout.lines, [f for f, _ in layout.panels])
    stats = points(table, layout) if len(table) else pd.DataFrame(columns=["panel"])
    shown = [(f, value) for f, value in layout.panels if (stats.panel == f).any()]
    if not shown:
        return empty(layout.title, *missing)
    columns = 2 if len(shown) == 4 else len(shown)
    size = (WIDTH if columns > 1 else 5.4, 2.6 if len(shown) < 4 else 5.2)
    fig, axes = plt.subplots(len(shown)//columns, columns, figsize=size, squeeze=False)
    for ax, (f, value) in zip(axes.flat, shown): _panel(ax, table, layout, f, value)
    legend(fig, 2 if columns == 1 else 3)
    return footnote(fig, SPREAD, *missing)


# Figures 3 and 10: accuracy against the number of trainable parameters

def _budget_axes(ax, stats, unit):
    ax.set_xscale("log", base=2)
    low, high = np.floor(np.log2(stats.bn.min()/1000)), np.ceil(np.log2(stats.bn.max()/1000) - .05)
    ticks = 2.**np.arange(low, high + 1)
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.set(xlabel=f"Thousands of {unit} Parameters (log scale)", ylabel="Test Accuracy (%)",
           ylim=_limits((45, 85), stats))
    corner(ax, stats)


def _budget_lines(ax, table, fits):
    for panel, rows in budgets(table).groupby("panel", sort=False):
        label, color, size = GROWING[panel]
        fit = doubling(rows.bn, rows["mean"]) if fits else None
        if fit:
            quality = f", r2={fit.rvalue**2:.3f}, p={fit.pvalue:.2E}" if len(rows) > 3 else ""
            label += f": slope={fit.slope:.3f}{quality}"   # three points are nearly a line by themselves
        ax.errorbar(rows.bn/1000, rows["mean"], rows.sd, fmt="o" if fits else "o-", ms=size, capsize=3, color=color,
                    label=label, clip_on=False)
        ax.plot(rows.bn/1000, [paper_value(r) for r in rows.to_dict("records")], color=color, **STARS)
        ends = np.array([rows.bn.min(), rows.bn.max()])
        if fit:
            ax.plot(ends/1000, fit.intercept + fit.slope*np.log2(ends), "--", color=color, lw=1, clip_on=False)


@styled()
def fig03(table: pd.DataFrame, plan: list = ()) -> plt.Figure:
    "Accuracy against the number of BatchNorm parameters, with its slope per doubling (the paper's Figure 3)."
    missing, stats = missing_runs(plan, table, ONLY_BN.lines, GROWING), budgets(table)
    if not len(stats):
        return empty(ONLY_BN.title, *missing)
    fig, ax = plt.subplots(figsize=(6, 3.2))
    _budget_lines(ax, table, fits=True)
    _budget_axes(ax, stats, "BatchNorm")
    few = [GROWING[p][0].lower() for p, fit in growth(table).items() if fit is None]
    legend(fig, 1)
    return footnote(fig, f"{images(table, stats)}, {SPREAD}", "the paper: slope 5.897 (depth), 4.994 (width)",
                    *missing, f"no line through fewer than three networks: {', '.join(few)}" if few else "")


@styled()
def fig10(table: pd.DataFrame, plan: list = ()) -> plt.Figure:
    "Training only BatchNorm beside small networks that train in full (the paper's Figure 10)."
    stats, small = budgets(table), small_runs(table)
    missing = missing_runs(plan, table, ONLY_BN.lines, GROWING)
    left = [s.arch for s in incomplete(plan, table) if parse_arch(s.arch).width < 1]
    if left:
        missing.append(f"planned and not measured yet: {', '.join(dict.fromkeys(left))}")
    elif not len(small):
        missing.append("no small network in this study")
    if not len(stats) and not len(small):
        return empty("BatchNorm beside small networks", *missing)
    fig, ax = plt.subplots(figsize=(6, 3.2))
    _budget_lines(ax, table, fits=False)
    for (width, rows), mark in zip(small.groupby("width"), "vs^D"):
        ax.errorbar(rows.bn/1000, rows["mean"], rows.sd, fmt=mark, capsize=3, clip_on=False, color="tab:green",
                    label=f"Small, Trainable ResNets, width {width:g}")
    both = pd.concat([stats, small]) if len(small) else stats
    _budget_axes(ax, both, "Trainable")
    legend(fig, 2)
    return footnote(fig, f"{images(table, both)}, {SPREAD}", *missing)
