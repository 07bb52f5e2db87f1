"""The explorer: choose a run, move a threshold, and see what the network would do without its small gammas.

Widgets over the features kept beside the records (`bnonly.analysis`); no network is evaluated.
"""
import io
import warnings
from functools import lru_cache
from pathlib import Path

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .accuracy_figures import SERIES
from .affine import bins
from .analysis import saved_features
from .checked import read_metrics
from .experiment import Spec, parse_arch, presets, records, runs_dir
from .features import SILENT
from .figures import styled
from .pages import render

__all__ = ["features_of", "choices", "explorable", "at_threshold", "sentences", "affine_picture", "clamping_picture",
           "silence_picture", "learning_picture", "Explorer"]


# What there is to choose from

@lru_cache(None)
def features_of(folder: str) -> dict:   # name to array
    "The features of a run, read once."
    return saved_features(Path(folder))


@lru_cache(32)
def choices(study: str) -> pd.DataFrame:
    """The runs of a study that can be explored: complete, analysed, and with a BatchNorm; one row a run.

    Columns: arch, policy, rest (of the run's name), accuracy (%), images and folder.
    """
    def by_size(column): return column.map(parse_arch) if column.name == "arch" else column
    columns, rows = ["arch", "policy", "rest", "accuracy", "images", "folder"], []
    for r in records(study):
        affine = [features_of(r["folder"]).get(name, ()) for name in ("gamma", "beta")]
        if r["status"] != "complete" or not len(affine[0]) or not np.isfinite(affine).all():
            continue
        spec = Spec(**r["spec"])
        rest = spec.key.split(",", 3)[3]
        rows.append((spec.arch, spec.policy, rest, r["final"]["accuracy"], r["images"], r["folder"]))
    return pd.DataFrame(rows, columns=columns).sort_values(columns[:3], key=by_size)


def explorable() -> list[str]:
    "The studies that have such runs: those of settings.ini first, then every other folder of runs."
    analysed = dict.fromkeys(f.parent.parent.name for f in sorted(runs_dir().glob("*/*/features.safetensors")))
    return [s for s in dict.fromkeys((*presets(), *analysed)) if s in analysed and len(choices(s))]


# The numbers at a threshold

def at_threshold(features: dict, threshold: float) -> dict:   # features: of a run; threshold: of |gamma|
    """What a run comes to at a threshold.

    below and channels: how many gammas are below it, and how many there are. measured: pairs of (gammas at 0,
    accuracy in percent), the one measured with exactly as many at 0, else the nearest with fewer and with more.
    silent and relus: how many ReLUs are silent, and how many there are. Without images only the first two.
    """
    size = np.abs(features["gamma"])
    below = int((size < np.float32(threshold)).sum())
    found = dict(below=below, channels=len(size))
    if "correct" in features:
        clamped, accuracy = features["clamped"], 100*features["correct"]/features["tested"]
        last = int(np.searchsorted(clamped, below, "right")) - 1   # the last with at most as many at 0
        end = last + (1 if clamped[last] == below else 2)
        found["measured"] = [(int(n), float(a)) for n, a in zip(clamped[last:end], accuracy[last:end])]
    if "zero" in features:
        zero = features["zero"]
        found |= dict(silent=int((zero > SILENT).sum()), relus=int(np.isfinite(zero).sum()))
    return found


def _accuracy_sentence(measured: list, below: int, trained: float) -> tuple:
    exact = measured[0][0] == below
    which = "them" if exact else f"{' and '.join(f'{n:,}' for n, _ in measured)} of them"
    beyond = "" if exact or len(measured) > 1 else ", and not measured beyond"
    words = f"test accuracy with {which} set to 0{beyond}; {trained:.1f}% as trained"
    return "accuracy", " and ".join(f"{a:.1f}%" for _, a in measured), words


def sentences(found: dict, accuracy: float) -> list[tuple]:   # (a name, a number, what it is the number of)
    "The numbers in words. found: as `at_threshold` gives it; accuracy: as trained, in percent."
    below, channels = found["below"], found["channels"]
    words = f"of the gammas are below the threshold ({below:,} of {channels:,})"
    rows = [("share", f"{100*below/channels:.1f}%", words)]
    if "measured" not in found:
        return [*rows, ("accuracy", "?", "accuracy and silent ReLUs were not measured: the images were not there")]
    rows.append(_accuracy_sentence(found["measured"], below, accuracy))
    if not found["relus"]:
        return [*rows, ("silent", "No", "ReLU is in this network")]
    return [*rows, ("silent", f"{found['silent']:,} of {found['relus']:,}", "ReLUs are zero more than 99% of the time")]


# Four pictures of one size, as PNG, drawn without pyplot: some ten milliseconds each

SIZE, DPI = (5.6, 3.3), 200   # inches, and twice the dots of an ordinary screen


def _canvas(columns: int = 1) -> tuple:   # (figure, axes)
    fig = Figure(figsize=SIZE, dpi=DPI, layout="none")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1, columns, squeeze=False)[0]
    fig.subplots_adjust(.6/SIZE[0], .15, 1 - .2/SIZE[0], .91, wspace=.25)
    for ax in axes: ax.locator_params(nbins=5)   # drawing ticks is half of what a picture costs
    return fig, axes


def _png(fig: Figure) -> bytes:
    fig.canvas.print_png(out := io.BytesIO())
    return out.getvalue()


@styled()
def affine_picture(features: dict, threshold: float, color: str) -> bytes:
    "The histograms of gamma and beta; what is below the threshold is shaded."
    fig, axes = _canvas(2)
    for ax, name in zip(axes, ("gamma", "beta")):
        ax.stairs(*np.histogram(features[name], bins(features[name])), fill=True, color=color, alpha=.7)
        ax.set(title=f"Distribution of {name}", xlabel=name, ylabel="channels" if ax is axes[0] else "")
    axes[0].axvspan(-threshold, threshold, color="black", alpha=.15, lw=0)
    return _png(fig)


@styled()
def clamping_picture(features: dict, threshold: float, color: str) -> bytes:
    """Accuracy against the share of gammas set to 0, as measured.

    A line stands where the threshold is, a square at the measurements nearest to it.
    """
    fig, (ax,) = _canvas()
    ax.set(title="Accuracy without the small gammas", xlabel="gammas set to 0 (%)", ylabel="test accuracy (%)",
           xlim=(-3, 100))
    if "correct" in features:
        percent = 100/len(features["gamma"])
        ax.plot(percent*features["clamped"], 100*features["correct"]/features["tested"], "o-", color=color)
        found = at_threshold(features, threshold)
        near = np.array(found["measured"])
        ax.axvline(percent*found["below"], color="black", lw=1)
        ax.plot(percent*near[:, 0], near[:, 1], "s", color="black", ms=6, mfc="white")
    return _png(fig)


@styled()
def silence_picture(features: dict) -> bytes:
    "Pr[activation = 0] of every ReLU: a row for each layer, its channels sorted."
    fig, (ax,) = _canvas()
    zero = features.get("zero", np.full(len(features["layer"]), np.nan))
    layers = np.split(zero, np.flatnonzero(np.diff(features["layer"])) + 1)
    layers = [np.sort(z[np.isfinite(z)]) for z in layers]
    even = np.linspace(0, 1, 64)
    rows = [np.interp(even, np.linspace(0, 1, len(z)), z) for z in layers if len(z)]
    if rows:
        ax.imshow(rows, aspect="auto", cmap="magma_r", vmin=0, vmax=1, interpolation="nearest",
                  extent=(0, 100, len(rows) + .5, .5))
    ax.set(title="How often each ReLU is 0 (pale: never, black: always)", xlabel="channels of the layer, sorted (%)",
           ylabel="layer")
    ax.grid(False)
    return _png(fig)


@styled()
def learning_picture(folders: dict) -> bytes:   # folders: label to folder of a run
    "Test accuracy by epoch. A run whose metrics cannot be read is named in a warning."
    fig, (ax,) = _canvas()
    for label, folder in folders.items():
        try:
            rows = read_metrics(folder)
        except ValueError as e:
            warnings.warn(str(e))
            continue
        ax.plot(rows.epoch, rows.accuracy, label=label)
    ax.set(title="Learning curves", xlabel="epoch", ylabel="test accuracy (%)")
    if folders: ax.legend(fontsize=6, loc="lower right")
    return _png(fig)


# The widgets

LABELS = dict(study="study", arch="network", policy="policy", rest="run")
GRID = dict(grid_template_columns="repeat(auto-fit, minmax(min(100%, 30rem), 1fr))", grid_gap="1rem",
            max_width="80rem")   # two pictures side by side where there is room
PICTURES = affine_picture, clamping_picture, silence_picture, learning_picture


class Explorer:
    "Widgets over the records: choose a run, move the threshold. `show` puts them on a page."

    def __init__(self):
        part = widgets.Layout(flex="1 1 14rem", width="auto", max_width="24rem")
        self.choices = {n: widgets.Dropdown(description=label, layout=part) for n, label in LABELS.items()}
        self.threshold = widgets.FloatSlider(
            .01, min=0, max=1, step=.005, readout_format=".3f", description="threshold", continuous_update=False,
            layout=widgets.Layout(width="auto", max_width="48rem"))
        self.others = widgets.SelectMultiple(description="compare", rows=4, layout=widgets.Layout(width="auto"))
        self.message = widgets.HTML()
        size = widgets.Layout(width="100%", height="auto")
        self.pictures = {f.__name__: widgets.Image(layout=size) for f in PICTURES}
        self.busy = True   # while the widgets change each other
        self.choices["study"].options = studies = explorable()
        if studies: self.choices["study"].value = studies[0]   # a new list of options chooses nothing
        for w in self.choices.values(): w.observe(self.choose, "value")
        self.threshold.observe(self.clamp, "value")
        self.others.observe(self.compare, "value")
        self.busy = False
        if studies: self.choose()

    def _narrow(self) -> tuple:   # the runs chosen, and all runs of their network
        "Narrow each list by those above it; a choice is kept where it is still there."
        rows = choices(self.choices["study"].value)
        for name in ("arch", "policy", "rest"):
            w, options = self.choices[name], tuple(dict.fromkeys(rows[name]))
            if w.options != options:
                before, w.options = w.value, options
                first = "bn" if "bn" in options else options[0]   # what the study is about
                w.value = before if before in options else first
            rows = rows[rows[name] == w.value]
            if name == "arch": siblings = rows
        return rows, siblings

    def choose(self, _=None):
        "Another run: narrow the lists, then draw everything once."
        if self.busy: return
        self.busy = True
        chosen, siblings = self._narrow()
        self.run = chosen.iloc[0]
        self.features = features_of(self.run.folder)
        self.color = SERIES.get(self.run.policy, ("", "tab:gray"))[1]
        options = dict(zip(siblings.policy + ", " + siblings.rest, siblings.folder)).items()
        if self.others.options != tuple(options): self.others.options = options
        self.others.value = (self.run.folder,)
        self.pictures["silence_picture"].value = silence_picture(self.features)
        self.busy = False
        self.compare()
        self.clamp()

    def compare(self, _=None):
        "Other learning curves: one picture."
        if self.busy: return
        names = {folder: label for label, folder in self.others.options}
        self.pictures["learning_picture"].value = learning_picture({names[f]: f for f in self.others.value})

    def clamp(self, _=None):
        "Another threshold: the two pictures that depend on it, and the numbers."
        t = self.threshold.value
        for f in (affine_picture, clamping_picture):
            self.pictures[f.__name__].value = f(self.features, t, self.color)
        words = sentences(at_threshold(self.features, t), self.run.accuracy)
        self.message.value = render("explorer.html", sentences=words, images=self.run.images)

    def show(self) -> widgets.Widget:
        "The controls, the numbers and the pictures, one above the other where the page is narrow."
        if not self.choices["study"].options:
            return widgets.HTML("No run was analysed yet; <code>make study</code> trains and analyses some.")
        lists = widgets.Layout(flex_flow="row wrap", max_width="80rem")
        *pictures, curves = self.pictures.values()
        grid = widgets.GridBox([*pictures, widgets.VBox([curves, self.others])], layout=widgets.Layout(**GRID))
        return widgets.VBox([widgets.Box([*self.choices.values()], layout=lists), self.threshold, self.message, grid])
