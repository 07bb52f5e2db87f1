"""Tables and figures of the Dauphin and Cubuk study: accuracy of every method, norms by epoch and by strength."""
import matplotlib.pyplot as plt
import pandas as pd

from .accuracy import shown
from .experiment import Spec, parse_arch
from .figures import empty, footnote, seeds, styled
from .regularization import ADDED, BASES, GROUP, method, methods, over_seeds

__all__ = ["START_STYLES", "IN_TEXT", "TABLE_FAMILIES", "MEASURED", "start_figure", "cases", "accuracy_table",
           "dropout_table", "missing_methods", "norms_figure", "strength_figure", "summary_table"]

IN_TEXT = {   # (data or network, method) to what the text says of its accuracy
    ("imagenet", "one BatchNorm"): "73.8 ± 0.1", ("imagenet", "Fixup and one BatchNorm"): "74.9 ± 0.0",
    ("imagenet", "Fixup + embedding L2"): "close to 3 above Fixup",
    ("imagenet", "Fixup + functional L2"): "close to 3 above Fixup",
    ("cifar10", "Fixup + embedding L2"): "0.6 above Fixup", ("cifar10", "Fixup + functional L2"): "0.6 above Fixup",
    ("cifar10", "open Fixup + standardization loss"): "1.1 below BatchNorm",
    ("svhn", "BatchNorm"): "96.9", ("svhn", "Fixup"): "95.5",
    ("svhn", "Fixup + embedding L2"): "96.5", ("svhn", "Fixup + functional L2"): "96.5",
    ("efficientnet", "BatchNorm + embedding L2"): "0.9 above BatchNorm",
    ("efficientnet", "BatchNorm + functional L2"): "0.9 above BatchNorm",
    ("efficientnet", "BatchNorm + Dropout"): "0.9 above BatchNorm"}

TABLE_FAMILIES = {   # name of a table to the family of its networks, and what it is about
    "table_wide": ("wide", "WRN-28-10 on CIFAR-10 and SVHN"),
    "table_resnet50": ("imagenet", "ResNet-50 on ImageNet"),
    "table_efficientnet": ("efficientnet", "EfficientNet-B8 on ImageNet")}

CASE = ["data", "arch", "epochs", "lr", "method", "strength"]   # what makes a line of a table
MEASURED = {"accuracy": "Test Accuracy (%)", "embedding_norm": "Feature Embedding Norm", "output_norm": "Output Norm"}
COLORS = dict(BASES.values())


# Tables

def _strength(value: float) -> str: return f"λ = {value:g}" if value else ""


def _cells(stats: pd.DataFrame) -> list: return [shown(*r) for r in stats[["mean", "sd", "n"]].itertuples(index=False)]


def cases(plan: list, table: pd.DataFrame, family: str) -> pd.DataFrame:   # one row a case, planned or run
    "What a table has lines for."
    fields = table[list(Spec.__dataclass_fields__)].to_dict("records")
    specs = pd.DataFrame([s.__dict__ for s in plan] + fields)
    rows = methods(specs[[parse_arch(arch).family == family for arch in specs.arch]])
    return rows.drop_duplicates(CASE)


def accuracy_table(plan: list, table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Test accuracy of every method beside what the text says, one line a case (the paper's Tables 1, 2 and 4).

    plan: as `preset` gives it; table: as `results` gives it; name: a key of `TABLE_FAMILIES`. A case that was planned
    and not measured says so.
    """
    family, lines = TABLE_FAMILIES[name][0], []
    named = methods(table.loc[[parse_arch(arch).family == family for arch in table.arch]])
    complete = named[named.status == "complete"]
    robust = family == "wide" and "robustness" in complete

    def cell(rows, column):
        if column not in rows: return "not measured"
        return shown(rows[column].mean(), rows[column].std(), rows[column].count())
    for c in cases(plan, table, family).to_dict("records"):
        rows = complete[(complete[CASE] == [c[k] for k in CASE]).all(axis=1)]
        line = {"Data": rows.images.iloc[0] if len(rows) else c["data"], "Network": c["arch"], "Epochs": c["epochs"],
                "lr": f"{c['lr']:g}", "Method": c["method"], "Strength": _strength(c["strength"]),
                "Accuracy (%)": cell(rows, "accuracy")}
        if robust: line["CIFAR-10-C (%)"] = cell(rows, "robustness")
        key = family if family == "efficientnet" else c["data"]
        lines.append(line | {"The text": IN_TEXT.get((key, c["method"]), "")})
    return pd.DataFrame(lines)


def dropout_table(table: pd.DataFrame) -> pd.DataFrame:   # as `results` gives it; one row a method
    "Accuracy without and with 50% Dropout at test time, and the drop (the paper's Table 3)."
    if "dropped" not in table:
        return pd.DataFrame()
    both = table.assign(drop=table.accuracy - table.dropped)
    columns = {"Accuracy (%)": "accuracy", "with Dropout (%)": "dropped", "Drop": "drop"}
    stats = {title: over_seeds(both, column) for title, column in columns.items()}
    names = dict(images="Data", arch="Network", epochs="Epochs", lr="lr", method="Method")
    first = next(iter(stats.values())).rename(columns=names)
    lines = first[[*names.values()]].assign(Strength=[_strength(s) for s in first.strength])
    return lines.assign(**{title: _cells(part) for title, part in stats.items()})


def summary_table(table: pd.DataFrame) -> pd.DataFrame:   # as `results` gives it; one row a method
    "Accuracy and norms of every method: mean, standard deviation and number of seeds."
    if "embedding_norm" not in table:
        return pd.DataFrame()
    index = [*GROUP, "method", "strength"]
    parts = {column: over_seeds(table, column).set_index(index) for column in MEASURED}
    cells = {column: _cells(stats) for column, stats in parts.items()}
    return pd.DataFrame(cells, parts["accuracy"].index).reset_index()


# Figures

START_STYLES = {"none": ("no BatchNorm", "tab:red"), "fixup": ("Fixup", "tab:blue"), "batch": ("BatchNorm", "black")}


@styled()
def start_figure(starts: dict) -> plt.Figure:   # norm to a table by number of blocks, with embedding and change
    "The embedding at the start, and how far the first step moves the output, by depth."
    fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
    fig.suptitle("wide residual networks of half the width with ReLU, on noise, one seed", fontsize=7, color="gray")
    labels = dict(embedding="E|Emb|²/H at the start", change="|change of a logit| / learning rate")
    for ax, (column, ylabel) in zip(axes, labels.items()):
        for norm, rows in starts.items():
            label, color = START_STYLES[norm]
            ax.plot(rows.index, rows[column], "o-", label=label, color=color)
        ax.set(yscale="log", xlabel="residual blocks", ylabel=ylabel)
    axes[0].legend()
    return fig


def missing_methods(plan: list, table: pd.DataFrame) -> list:   # of one sentence, or none
    "Which runs of the plan a figure lacks, and which methods altogether."
    rows = table[[*Spec.__dataclass_fields__]].drop_duplicates().to_dict("records")
    measured = {Spec(**fields) for fields in rows}
    absent = [s for s in plan if s not in measured]
    begun = {method(s.__dict__)[0] for s in plan if s in measured}
    names = [n for n in dict.fromkeys(method(s.__dict__)[0] for s in absent) if n not in begun]
    what = f"none of {', '.join(names)}" if names else "every method has at least one"
    return [f"{len(absent)} of {len(plan)} planned runs are not measured; {what}"] if absent else []


def _grid(groups: list, panel, *notes: str) -> plt.Figure:   # panel(ax, rows, column, label)
    "A row of three panels for each group of runs, and one legend."
    fig, axes = plt.subplots(len(groups), 3, figsize=(11, 2.7*len(groups)), squeeze=False)
    for row, ((images, arch, epochs, lr), part) in zip(axes, groups):
        for ax, (column, label) in zip(row, MEASURED.items()): panel(ax, part, column, label)
        row[0].set_title(f"{arch} on {images}, {epochs} epochs, lr {lr:g}", loc="left", fontsize=7)
    found = {label: handle for ax in axes.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    fig.legend(found.values(), found, loc="outside upper center", ncols=len(found))
    return footnote(fig, "; ".join(notes))


def _curves(ax, part, column, label):
    for name, rows in part.groupby("method", sort=False):
        stats = rows.groupby("epoch")[column].agg(mean="mean", sd="std", n="count")
        ax.plot(stats.index, stats["mean"], color=COLORS[name], label=f"{name} ({seeds(stats)})")
        low, high = stats["mean"] - stats.sd, stats["mean"] + stats.sd
        ax.fill_between(stats.index, low, high, color=COLORS[name], alpha=.15, lw=0)
    ax.set(xlabel="Epoch", ylabel=label)


@styled()
def norms_figure(epochs: pd.DataFrame, plan: list = ()) -> plt.Figure:
    """Accuracy, embedding norm and output norm by epoch, without penalties (the paper's Figure 2).

    epochs: as `history` gives it, with the images' name; plan: the runs of the study, to say what is missing.
    """
    rows = methods(epochs) if "embedding_norm" in epochs else epochs[:0]
    if len(rows):
        rows = rows[rows.method.isin(COLORS)]
    groups = list(rows.groupby(GROUP, sort=False)) if len(rows) else []
    if not groups:
        return empty("Figure 2 (norms by epoch)", "no run without a penalty is complete")
    return _grid(groups, _curves, "mean ± one standard deviation over seeds", *missing_methods(plan, epochs))


PENALIZED = {f"Fixup + {ADDED[k][0]}": ADDED[k] for k in ("embedding_l2", "functional_l2")}   # method to label, colour


def _strengths(ax, part, column, label):
    stats = over_seeds(part, column)
    for name, (short, color) in PENALIZED.items():
        rows = stats[stats.method == name].sort_values("strength")
        if len(rows):
            ax.errorbar(rows.strength, rows["mean"], rows.sd, fmt="o-", capsize=3, color=color, label=short)
    for name in ("BatchNorm", "Fixup"):
        for r in stats[stats.method == name].itertuples():
            ax.axhline(r.mean, color=COLORS[name], ls="--", label=name)
            if r.n > 1: ax.axhspan(r.mean - r.sd, r.mean + r.sd, color=COLORS[name], alpha=.1, lw=0)
    ax.set(xscale="log", xlabel="Coefficient", ylabel=label)


@styled()
def strength_figure(table: pd.DataFrame, plan: list = ()) -> plt.Figure:
    """Accuracy and norms against the coefficient of a penalty (the paper's Figure 3).

    table: as `results` gives it; plan: the runs of the study, to say what is missing.
    """
    rows = methods(table) if "embedding_norm" in table else table[:0]
    groups = list(rows.groupby(GROUP, sort=False)) if len(rows) else []
    groups = [(group, part) for group, part in groups if part.method.isin(PENALIZED).any()]
    if not groups:
        return empty("Figure 3 (strength of a penalty)", "no run with embedding or functional L2 is complete")
    spread = f"mean ± one standard deviation, {seeds(over_seeds(rows, 'accuracy'))}"
    return _grid(groups, _strengths, spread, *missing_methods(plan, table))
