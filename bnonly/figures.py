"""What all figures share: style, notes and legends, and how a figure or a table is kept with its numbers."""
import textwrap
from contextlib import contextmanager
from importlib.resources import files

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.category import StrCategoryLocator
from matplotlib.colors import to_hex
from matplotlib.ticker import FixedLocator

from .experiment import runs_dir, write

__all__ = ["STYLE", "WIDTH", "SPREAD", "STAR", "styled", "seeds", "corner", "footnote", "legend", "empty", "drawn",
           "save", "rounded", "draw_table", "plain_table", "save_table"]

STYLE = files("bnonly")/"bnonly.mplstyle"
WIDTH = 8.4   # inches across a page, so that the letters have one size in all figures
SPREAD = "mean ± one standard deviation over n seeds, no bar for a single seed"
STAR = "a star is the number in the paper's text (160 epochs on CIFAR-10, 90 on ImageNet)"


@contextmanager
def styled():
    "How every figure of the study looks, while it is drawn. As a decorator: `@styled()`."
    with plt.style.context(STYLE):
        yield
        shown = plt.isinteractive()   # a notebook's backend is loaded with the first figure, and turns this on
    matplotlib.interactive(shown)


# Around a figure

def seeds(stats: pd.DataFrame) -> str:   # stats: with a column n; e.g. 'n = 2 to 5'
    "How many seeds stand behind some points."
    low, high = stats.n.min(), stats.n.max()
    return f"n = {low}" if low == high else f"n = {low} to {high}"


def corner(ax, stats: pd.DataFrame):
    "How many seeds and epochs stand behind a panel, in its upper right corner."
    epochs = "/".join(str(e) for e in sorted(set(stats.epochs)))
    ax.set_title(f"{seeds(stats)}, {epochs} epochs", loc="right", fontsize=7, color="gray")


def footnote(fig: plt.Figure, *notes: str) -> plt.Figure:
    """Note with a figure what one must know to read it, and what it has to do without.

    `save` keeps the note as the picture's description, and a caption shows it.
    """
    def starred(line): return line.get_marker() == "*" and np.isfinite(np.asarray(line.get_ydata(), float)).any()
    stars = any(starred(line) for ax in fig.axes for line in ax.lines)
    fig.set_label("; ".join(note for note in (*notes[:1], STAR if stars else "", *notes[1:]) if note))
    for ax in fig.axes: ax.get_xticklabels(), ax.get_yticklabels()   # made here, in the style that is set
    return fig


def legend(fig: plt.Figure, columns: int = 3):
    "One legend above all panels: what is measured, then what only has the paper's stars, chance last."
    pairs, found = [p for ax in fig.axes for p in zip(*ax.get_legend_handles_labels())], {}
    for handle, label in sorted(pairs, key=lambda p: (p[1] == "Chance", isinstance(p[0], plt.Line2D))):
        found.setdefault(label, handle)
    fig.set_figheight(fig.get_figheight() + .17*-(-len(found)//columns))
    fig.legend(found.values(), found, loc="outside upper center", ncols=columns)


@styled()
def empty(what: str, *notes: str) -> plt.Figure:
    "A figure that says in words why nothing can be drawn."
    text = textwrap.wrap(f"{what}: {'; '.join(notes) or 'no run is complete'}", 110)
    fig, ax = plt.subplots(figsize=(WIDTH, .3 + .17*len(text)))
    ax.axis("off")
    ax.text(.5, .5, "\n".join(text), ha="center", va="center", fontsize=8, color="dimgray")
    return fig


# The numbers of a figure

def _lines(ax, of_container):
    caps = {line for c in ax.containers if hasattr(c, "has_yerr") for line in c.lines[1]}
    for line in ax.get_lines():
        if line in caps: continue
        c, half = of_container.get(line), None
        if c is not None and c.has_yerr and c.lines[2]: half = _half_lengths(c)
        if half is not None and len(half) != len(line.get_xdata()): half = None
        yield "line", (c or line).get_label(), line.get_color(), line.get_xdata(), line.get_ydata(), half


def _half_lengths(c): return [np.ptp(s[:, 1])/2 if len(s) else np.nan for s in c.lines[2][-1].get_segments()]


def _artists(ax):
    "What stands on an axis: (kind, label, color, x, y, half the length of an error bar or None)."
    def members(c): return [c.lines[0]] if hasattr(c, "has_yerr") else getattr(c, "patches", [])
    of_container = {artist: c for c in ax.containers for artist in members(c)}
    yield from _lines(ax, of_container)
    for c in ax.containers:
        if not hasattr(c, "patches"): continue
        error, color = getattr(c, "errorbar", None), c.patches[0].get_facecolor() if c.patches else None
        middles, heights = [p.get_x() + p.get_width()/2 for p in c.patches], [p.get_height() for p in c.patches]
        yield "bar", c.get_label(), color, middles, heights, _half_lengths(error) if error else None
    for p in ax.patches:
        if p not in of_container and hasattr(p, "get_xy") and np.ndim(p.get_xy()) == 2:
            yield "outline", p.get_label(), p.get_facecolor(), *np.transpose(p.get_xy()), None
    for c in ax.collections:
        offsets = np.ma.filled(np.ma.asarray(c.get_offsets(), float), np.nan)
        if len(offsets) > 1: yield "points", c.get_label(), None, *offsets.T, None


def _tick_labels(ax):   # x to the label there, of axes with labels of their own
    if not isinstance(ax.xaxis.get_major_locator(), (FixedLocator, StrCategoryLocator)): return {}
    return dict(zip(np.round(ax.get_xticks(), 6), [t.get_text() for t in ax.get_xticklabels()]))


def drawn(fig: plt.Figure) -> pd.DataFrame:
    """The numbers that a figure shows, a row each, read off the finished figure.

    Columns: panel, kind, label, color, x, tick (the label of x, where it has one), y and error.
    """
    def hexed(c): return to_hex(c) if c is not None and np.size(c) in (1, 3, 4) else ""
    rows = []
    for i, ax in enumerate(fig.axes):
        ticks = _tick_labels(ax)
        panel = ", ".join(filter(None, [ax.get_title() or ax.get_xlabel(), ax.get_ylabel()])) or f"panel {i+1}"
        for kind, label, color, x, y, error in _artists(ax):
            label = "" if not label or str(label).startswith("_") else label
            x, y = np.asarray(ax.convert_xunits(x), float) if len(x) else [], np.asarray(y, float)
            rows += [(panel, kind, label, hexed(color), a, ticks.get(round(a, 6), ""), b, e)
                     for a, b, e in zip(x, y, error or [np.nan]*len(x))]
    columns = ["panel", "kind", "label", "color", "x", "tick", "y", "error"]
    return pd.DataFrame(rows, columns=columns).dropna(subset=["x", "y"])


@styled()
def save(fig: plt.Figure, name: str, study: str) -> plt.Figure:   # name: e.g. 'fig02'
    "Keep a figure as PNG, SVG and CSV under runs/<study>/figures, with its note as their description."
    folder, note = runs_dir()/study/"figures", fig.get_label()
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"): fig.savefig(folder/f"{name}.{kind}", metadata=dict(Description=note))
    if note: print(f"{name}: {note}")
    write(folder/f"{name}.csv", drawn(fig).to_csv(index=False))
    return fig


# Tables

def rounded(value) -> str:
    "A number as the paper prints it: 650, 1.12K, 14.0M, and a share as 0.64%."
    if isinstance(value, float): return f"{value:.2f}%"
    if not isinstance(value, int) or value < 1000: return f"{value}"
    unit, letter = (1e6, "M") if value >= 1e6 else (1e3, "K")
    return f"{value/unit*(1 + 1e-9):#.3g}".rstrip(".") + letter   # halves are rounded up, as by hand


@styled()
def draw_table(table: pd.DataFrame) -> plt.Figure:   # as `bnonly.accuracy.specifications` gives it
    "A table of networks as the paper lays it out: a column for each network."
    rows, n = [c for c in table if c != "Family"], len(table)
    fig, ax = plt.subplots(figsize=(1.1 + .42*n, .2*len(rows) + .3))
    ax.set(xlim=(-2.6, n - .4), ylim=(len(rows) + .4, -1.5))
    ax.axis("off")
    for y, name in enumerate(rows):
        ax.text(-2.6, y, name, fontsize=7, va="center")
        for x, v in enumerate(table[name].astype(object)):
            ax.text(x, y, rounded(v), fontsize=6.5, ha="center", va="center")
    for i, (name, family) in enumerate(table.groupby("Family", sort=False)):
        ax.text(family.index.to_numpy().mean(), -1, name, fontsize=7, ha="center", va="center", weight="bold")
        if i: ax.axvline(family.index[0] - .5, color="lightgray", lw=.6)
    for y in (-.5, 1.5, [c.endswith("%)") for c in rows].index(True) - .5): ax.axhline(y, color="gray", lw=.6)
    return fig


@styled()
def plain_table(table: pd.DataFrame) -> plt.Figure:   # of numbers and short words
    "Any other table, one line a row."
    fig, ax = plt.subplots(figsize=(1.05*len(table.columns), .22*(len(table) + 1.5)))
    values, names = table.astype(str).values.tolist(), list(table.columns)
    cells = ax.table(values, colLabels=names, loc="center", cellLoc="right", edges="horizontal")
    cells.auto_set_font_size(False)
    cells.set_fontsize(7)
    cells.auto_set_column_width(range(len(table.columns)))
    ax.axis("off")
    return fig


def save_table(table: pd.DataFrame, name: str, study: str) -> plt.Figure:
    "Keep a table as CSV, exact, and as PNG and SVG, rounded."
    fig = save((draw_table if "Family" in table else plain_table)(table), name, study)
    write(runs_dir()/study/"figures"/f"{name}.csv", table.to_csv(index=False))
    return fig
