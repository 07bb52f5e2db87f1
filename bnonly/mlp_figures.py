"""The figures of the MLP study: accuracy by depth and by width, for each set of parameters that trains."""
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection

from .accuracy import shown
from .experiment import incomplete, parse_arch, summary
from .figures import empty, footnote, legend, seeds, styled
from .mlp import MLP_DEPTHS, MLP_LINES, MLP_WIDTHS, mlps

__all__ = ["REPORTED", "mlp_points", "missing_mlp_runs", "draw_lines", "depth_figure", "width_figure", "mlp_table"]

REPORTED = {10: [("all-beta", 90, "Section 1")], 100: [("all-beta", 90, "Section 1")],
            784: [("all-beta", 99, "Section 1, of others"), ("gamma", 95, "Section 4")]}   # numbers in the text
CLOSE = 88   # above it the lines of all parameters lie upon each other, and are drawn once more


def mlp_points(table: pd.DataFrame, lines=MLP_LINES) -> pd.DataFrame:
    """Mean, sample standard deviation and n of MLPs and LeNet, one row a network and line.

    `table` as `results` gives it. Columns: those of `summary`, depth, width, and line, a number in `lines`.
    """
    number = {(l.policy, l.norm, l.bn_init): i for i, l in enumerate(lines)}
    stats = summary(table)
    stats = stats.assign(line=[number.get(k) for k in zip(stats.policy, stats.norm, stats.bn_init)])
    rows = stats[stats.line.notna() & stats.arch.str.match("mlp|lenet")]
    shapes = [parse_arch(arch) for arch in rows.arch]
    rows = rows.assign(depth=[s.depth for s in shapes], width=[int(s.width) for s in shapes])
    return rows.sort_values(["width", "depth"])


def missing_mlp_runs(plan: list, table: pd.DataFrame, archs: list, lines) -> str:
    "The runs that a figure of some networks and lines lacks: how many, and which points have none."
    label = {l[:3]: l.label for l in lines}

    def point(s): return label.get((s.policy, s.norm, s.bn_init)), s.arch
    planned = [s for s in plan if s.arch in archs and point(s)[0]]
    if not plan:
        return ""
    if not planned:
        return "this study plans none of these runs."
    absent = incomplete(planned, table)
    if not absent:
        return "Every planned run of this figure is complete."
    begun, named = {point(s) for s in planned if s not in absent}, []
    for name in label.values():
        of_line = list(dict.fromkeys(s.arch for s in planned if point(s)[0] == name))
        blank = [arch for arch in of_line if (name, arch) not in begun]
        if blank:
            named.append(f"“{name}”" + (f" ({', '.join(blank)})" if blank != of_line else ""))
    what = f"none for {'; '.join(named)}" if named else "every point has at least one"
    return f"{len(absent)} of {len(planned)} planned runs of this figure are not measured; {what}."


def _line(ax, rows, line, by, places) -> bool:   # whether a part of it is dotted
    "One line with its error bars, dotted across the places that are not measured."
    between = [p for p in places if rows[by].min() < p < rows[by].max()]
    whole = rows.merge(pd.DataFrame({by: between}, dtype=int), how="outer")   # an empty row breaks the line
    ax.errorbar(whole[by], whole["mean"], whole.sd, fmt="o-", capsize=3, color=line.color, label=line.label)
    if len(whole) == len(rows):
        return False
    dotted = LineCollection([rows[[by, "mean"]]], colors=line.color, linestyles=":", linewidths=1)
    ax.add_collection(dotted, autolim=False)
    return True


def draw_lines(ax, stats: pd.DataFrame, lines, by: str = "depth") -> str:   # what a dotted line means, if there is one
    "Accuracy against depth or width, a line for each policy; dotted across what is not measured."
    places = dict(depth=MLP_DEPTHS, width=MLP_WIDTHS)[by]
    parts = [(line, stats[stats.line == i]) for i, line in enumerate(lines)]
    dotted = [_line(ax, rows, line, by, places) for line, rows in parts if len(rows)]
    ax.axhline(10, color="gray", ls=":", label="Chance")
    ax.set(ylim=(0, 101), ylabel="Test Accuracy (%)")
    spread = "mean ± one standard deviation" if stats.n.max() > 1 else "a run each"
    ax.set_title(f"{spread}, {seeds(stats)}", loc="right", fontsize=6.5, color="gray")
    return "dotted: across what is not measured" if any(dotted) else ""


@styled()
def depth_figure(table: pd.DataFrame, width: int, plan: list = (), lines=MLP_LINES) -> plt.Figure:
    """Accuracy against the number of hidden layers (Henriksboe's Figures 1 to 3).

    table: as `results` gives it; width: units in a hidden layer; plan: the runs of the study, to say what is missing.
    """
    stats = mlp_points(table, lines)
    stats = stats[stats.arch.isin(mlps(width))]
    missing = missing_mlp_runs(plan, table, mlps(width), lines)
    if not len(stats):
        return empty(f"Accuracy of MLPs of {width} units a layer, by depth", missing)
    top = stats[[lines[int(i)].policy.startswith("all") for i in stats.line]]   # all parameters
    spread = top.sd.fillna(0)
    low, high = (top["mean"] - spread).min(), (top["mean"] + spread).max()
    close = int(low > CLOSE)
    fig, axes = plt.subplots(1 + close, 1, figsize=(5, 2.9 + 1.3*close), sharex=True, squeeze=False,
                             height_ratios=(1, 2)[1 - close:])
    ax = axes[-1, 0]
    dotted = draw_lines(ax, stats, lines)
    if close:
        draw_lines(axes[0, 0], top, lines)
        axes[0, 0].set(ylim=(np.floor(low), np.ceil(high)), ylabel="Close-up (%)")
    color = {l.policy: l.color for l in lines if l in MLP_LINES}
    for policy, value, place in REPORTED.get(width, ()):
        if policy in color:
            ax.axhline(value, color=color[policy], ls="--", lw=1, alpha=.6, label=f"{value}% ({place})")
    ax.set(xlabel=f"Hidden Layers of {width} Units, {table.images.iloc[0]}", xticks=MLP_DEPTHS, xlim=(1.5, 14.5))
    legend(fig, 2)
    return footnote(fig, dotted, missing)


@styled()
def width_figure(table: pd.DataFrame, plan: list = ()) -> plt.Figure:
    "Accuracy of training only gamma against the width of the layers, a line for each depth."
    only_bn, depths = MLP_LINES[2], (2, 4, 8, 14)
    stats = mlp_points(table, [only_bn])
    stats = stats[stats.depth.isin(depths) & (stats.arch != "lenet5")]
    archs = [arch for arch in mlps(*MLP_WIDTHS) if parse_arch(arch).depth in depths]
    missing = missing_mlp_runs(plan, table, archs, [only_bn])
    if stats.width.nunique() < 2:
        return empty("BatchNorm only, by width", missing)
    fig, ax = plt.subplots(figsize=(5, 3))
    shades = plt.colormaps["Reds"](.35 + .6*np.arange(len(depths))/len(depths))
    lines = [only_bn._replace(label=f"{d} hidden layers", color=tuple(c)) for d, c in zip(depths, shades)]
    dotted = draw_lines(ax, stats.assign(line=stats.depth.map(depths.index)), lines, "width")
    ax.set(xscale="log", xlabel=f"Units in a Hidden Layer, {table.images.iloc[0]}")
    ax.set_xticks(MLP_WIDTHS, MLP_WIDTHS)
    ax.minorticks_off()
    legend(fig)
    return footnote(fig, dotted, missing)


def mlp_table(stats: pd.DataFrame, lines=MLP_LINES) -> pd.DataFrame:   # stats: as `mlp_points` gives it
    "What the figures show, in numbers: networks by lines."
    cells = [shown(*r) for r in stats[["mean", "sd", "n"]].itertuples(index=False)]
    labels = [lines[int(i)].label for i in stats.line]
    wide = stats.assign(cell=cells, label=labels)
    wide = wide.pivot(index=["width", "depth", "arch"], columns="label", values="cell")
    wide = wide.reindex(columns=[l.label for l in lines]).droplevel(["width", "depth"])
    return wide.rename_axis(columns=None).astype(object).fillna("")
