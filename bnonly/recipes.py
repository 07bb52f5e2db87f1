"""Which runs stand beside each other in a figure: networks of a family, runs of a recipe, and the paper's numbers."""
import pandas as pd

from .experiment import Spec, parse_arch

__all__ = ["family", "panels", "NO_RECIPE", "papers_recipe", "single_recipe", "other_recipes", "PAPER", "paper_value"]


# Families: ways of growing a network, each with a panel in the paper's figures

def family(arch: str) -> list[tuple]:   # of (panel, position on its axis, tick label)
    "The panels a network belongs to, and where it stands there; none for an MLP or LeNet."
    name, depth, width = parse_arch(arch)
    if name == "vgg":
        return [("VGG", depth, f"{depth}")]
    if name == "imagenet":
        return [("ImageNet ResNet", depth, f"{depth}")]
    if name != "cifar":
        return []
    deep, wide = ("ResNet", depth, f"{depth}"), ("WRN", width, f"{depth}-{width:g}")
    return ([deep] if width == 1 else []) + ([wide] if depth == 14 and width >= 1 else [])


def panels(table: pd.DataFrame) -> pd.DataFrame:
    """Put each row into the panels that its network, in the column arch, belongs to.

    The same rows, some of them twice, with columns panel, at and tick. A panel whose networks all stand in another
    is left out.
    """
    rows = [dict(r, panel=p, at=at, tick=tick) for r in table.to_dict("records") for p, at, tick in family(r["arch"])]
    wide = pd.DataFrame(rows, columns=[*table.columns, "panel", "at", "tick"])
    archs = {p: set(part.arch) for p, part in wide.groupby("panel", sort=False)}
    names = list(archs)

    def is_covered(p):   # by a larger panel, or by an earlier one of the same networks
        return any(archs[p] < archs[q] or archs[p] == archs[q] and names.index(q) < names.index(p) for q in names)
    return wide[~wide.panel.isin([p for p in names if is_covered(p)])]


# One recipe in each family

NO_RECIPE = "arch", "policy", "seed"   # the fields of a `Spec` that are not its recipe


def papers_recipe(arch: str) -> Spec:
    """A paper's recipe for a network.

    CIFAR-10 for 160 epochs, the ImageNet family on ImageNet for 90, MLPs and LeNet on MNIST for at most 100.
    """
    name = parse_arch(arch).family
    if name == "imagenet":
        return Spec(arch=arch, data="imagenet", epochs=90, batch_size=1024, lr=.4, schedule="imagenet")
    if name not in ("mlp", "lenet"):
        return Spec(arch=arch, data="cifar10", epochs=160)
    return Spec(arch=arch, data="mnist", epochs=100, patience=3, lr=.01, schedule="constant", weight_decay=0,
                bn_init="symmetric")


def _families(table: pd.DataFrame) -> pd.Series:
    return table.arch.map({arch: parse_arch(arch).family for arch in table.arch.unique()})


def single_recipe(table: pd.DataFrame, free: tuple = ()) -> pd.DataFrame:   # free: fields that may differ
    """The rows of one recipe in each family.

    Field by field the paper's value, if a run has it, and else the one that most networks and seeds have. `table`
    has the fields of a spec as columns.
    """
    table = table.reset_index(drop=True)
    spec = [n for n in Spec.__dataclass_fields__ if n in table]
    names, kept = _families(table), []
    for name in names.unique():
        rows = table.loc[names == name, spec]
        paper = papers_recipe(rows.arch.iloc[0])
        for field in [n for n in spec if n not in (*NO_RECIPE, *free)]:
            values = rows[field].unique()
            if len(values) == 1:
                continue
            value = getattr(paper, field)
            if value not in values:
                value = rows.drop_duplicates()[field].mode()[0]
            rows = rows[rows[field] == value]
        kept += rows.index.tolist()
    return table.loc[sorted(kept)].reset_index(drop=True)


def other_recipes(table: pd.DataFrame, free: tuple = ("bn_init",)) -> str:   # table: as `results` gives it
    "A sentence on the runs of other recipes than `single_recipe`'s, or nothing."
    def text(values): return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in sorted(values))
    fields = [n for n in Spec.__dataclass_fields__ if n in table and n not in (*NO_RECIPE, *free)]
    shown, odd = single_recipe(table, free), {}
    rest = table[~table.folder.isin(shown.folder)]
    for name, rows in rest.groupby(_families(rest), sort=False):
        usual = shown[_families(shown) == name]
        for field in fields:
            odd.setdefault(field, set()).update(set(rows[field]) - set(usual[field]))
    how = "; ".join(f"{field} {text(values)}" for field, values in odd.items() if values)
    return f"{rest.folder.nunique()} runs of another recipe are not in the paper's figures: {how}." if how else ""


# The paper's numbers: the accuracies that its text gives, and the section; on its data: CIFAR-10 after 160 epochs, five
# seeds, and ImageNet after 90 epochs, three seeds

_PAPER = """
resnet110 all                uniform  accuracy 93.3  4
resnet110 bn                 uniform  accuracy 69.5  4
resnet14  bn                 uniform  accuracy 48    4
resnet866 bn                 uniform  accuracy 82    4
wrn14-32  bn                 uniform  accuracy 73    4
resnet50  bn                 uniform  top5     17    4
resnet101 bn                 uniform  top5     25    G
resnet200 bn                 uniform  top5     32    4
resnet200 output             uniform  top5     2.7   4
resnet200 output             uniform  accuracy 0.8   4
vgg11     bn                 uniform  accuracy 57    C.2
vgg19     bn                 uniform  accuracy 61    C.2
vgg11     output             uniform  accuracy 41    C.2
vgg19     output             uniform  accuracy 27    C.2
resnet866 bn                 positive accuracy 84    E.2
wrn14-32  bn                 positive accuracy 75    E.2
resnet200 bn                 positive top5     37    E.2
resnet14  bn+shortcut+output uniform  accuracy 63    G
resnet110 bn+shortcut+output uniform  accuracy 74.6  G
wrn14-32  bn+shortcut+output uniform  accuracy 87    G
resnet101 bn+shortcut+output uniform  top5     72    G
resnet14  shortcut+output    uniform  accuracy 49    G
resnet101 shortcut+output    uniform  top5     35    G
"""
PAPER = {tuple(line.split()[:4]): float(line.split()[4]) for line in _PAPER.strip().splitlines()}


def paper_value(run: dict) -> float|None:   # run: with arch, data, policy and bn_init
    "The accuracy that the paper's text gives for a point, if the point is on the paper's data."
    if run["data"] != papers_recipe(run["arch"]).data:
        return None
    return PAPER.get((run["arch"], run["policy"], run["bn_init"], "accuracy"))
