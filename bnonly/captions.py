"What each figure of a report shows, and what stands in it for the paper's networks and images."
import warnings
from functools import lru_cache
from pathlib import Path

from .experiment import parse_arch

IMAGENETS = "the ResNets for ImageNet"
_NETWORKS = {"ResNet": "every ResNet", "WRN": "every WRN", "ImageNet": IMAGENETS, "VGG": "every VGG"}

CAPTIONS = {   # name to what it shows, and the families it has panels for; the figures of `LAYOUTS` say it themselves
    "fig03": ("Accuracy against the number of BatchNorm parameters, and its slope per doubling", "ResNet WRN"),
    "fig04": ("The distribution of gamma in one deep network, the paper's ResNet-110 and ResNet-101",
              "ResNet ImageNet"),
    "fig05": ("The share of gammas below three thresholds", "ResNet WRN ImageNet"),
    "fig06": ("The change in accuracy when small gammas are set to 0", "ResNet WRN ImageNet"),
    "fig07": ("The share of ReLUs that are zero in more than 99% of images and positions", "ResNet WRN ImageNet"),
    "fig10": ("Training only BatchNorm beside small networks that train in full", "ResNet WRN small"),
    **{f"fig{15 + 2*i + j}": (f"The distributions of {value} in {where}", family)
       for i, (family, where) in enumerate(_NETWORKS.items()) for j, value in enumerate(("gamma", "beta"))},
    **{f"fig{23 + i}": (f"How often each ReLU is at 0, in {_NETWORKS[family]}", family)
       for i, family in enumerate(("ResNet", "WRN", "ImageNet"))},
}

BESIDES = {   # figures that are not Frankle et al.'s
    "fig_decay": "Is the spike of gamma at zero learned, or is it weight decay? BatchNorm only, by the decay of gamma "
                 "and beta (not in the paper).",
    **{f"fig_mlp{i}": f"MLPs of {w} units a layer, by depth and by what trains (Henriksboe's Figure {i})."
       for i, w in enumerate((10, 100, 784), 1)},
    "fig_mlp_width": "MLPs by the width of their layers, BatchNorm only (not in Henriksboe's report).",
    **{f"fig_mlp_affine{w}": f"MLPs of {w} units a layer with gamma and beta but without normalization (Henriksboe's "
                             "open question)." for w in (100, 784)},
    "fig_start": "How a wide residual network begins, by depth: the mean square of its embedding, and how far the "
                 "first step moves its output (Dauphin and Cubuk, section 3.2).",
    "fig_norms": "Accuracy, embedding norm and output norm by epoch, without penalties (Dauphin and Cubuk's Figure 2).",
    "fig_strength": "Accuracy and norms against the coefficient of a penalty (Dauphin and Cubuk's Figure 3).",
}

TABLES = {
    "table1": "Table 1: numbers in each part of each network, counted",
    "tableC1": "The same for VGG (Appendix C.1), counted",
    "table_wide": "Accuracy of wide residual networks (Dauphin and Cubuk's Table 1)",
    "table_resnet50": "Accuracy of ResNet-50 (their Table 2)",
    "table_dropout": "The drop under 50% Dropout at test time (their Table 3)",
    "table_efficientnet": "Accuracy of EfficientNet-B8 (their Table 4)",
}

THE_PAPERS = {   # family to what the paper trained
    "ResNet": "ResNet-14 to 866 on CIFAR-10, 160 epochs",
    "WRN": "WRN-14-1 to 14-32 on CIFAR-10, 160 epochs",
    "ImageNet": "ResNet-18 to 200 on ImageNet, 90 epochs",
    "VGG": "VGG-11 to 19 on CIFAR-10, 160 epochs",
    "small": "small ResNets of widths 1/8 to 1/2 on CIFAR-10, 160 epochs",
}


@lru_cache
def captions() -> dict:
    "Name of each of the paper's figures to what it shows and its families."
    from .accuracy_figures import LAYOUTS
    families = {n: dict.fromkeys(f.split()[0] for f, _ in layout.panels) for n, layout in LAYOUTS.items()}
    return CAPTIONS | {n: (layout.title, " ".join(families[n])) for n, layout in LAYOUTS.items()}


def _families(arch: str) -> set:
    from .recipes import family
    found = {panel.split()[0] for panel, *_ in family(arch)}
    return found or ({"small"} if parse_arch(arch).width < 1 else set())


def stand_ins(table) -> dict:
    "What a study (`results`) has in place of each of the paper's families, in a phrase."
    from .figures import seeds
    from .recipes import single_recipe
    table, found = single_recipe(table, free=("bn_init",)), {}
    for name in THE_PAPERS:
        rows = table[(table.status == "complete") & table.arch.map(lambda a: name in _families(a)).astype(bool)]
        if not len(rows):
            continue
        archs = ", ".join(sorted(set(rows.arch), key=parse_arch))
        ages = "/".join(map(str, sorted(set(rows.epochs))))
        n = seeds(rows.groupby(["arch", "policy", "bn_init"]).agg(n=("seed", "nunique")))
        images = ", ".join(sorted(set(rows.images)))
        found[name] = f"{archs} on {images} ({ages} epochs, {n}) in place of {THE_PAPERS[name]}"
    return found


def caption(name: str, instead: dict) -> str:
    "The caption of a figure; `instead` as `stand_ins` gives it."
    if name not in captions():
        return BESIDES.get(name, name)
    what, families = captions()[name]
    here = [instead.get(f) or f"no run in place of {THE_PAPERS[f]}" for f in families.split()]
    return f"{what} (the paper's Figure {int(name[3:])}). Here: {'; '.join(here)}."


def described(file: Path, instead: dict) -> dict|None:
    "A figure (PNG) for the template of figures; None with a warning where it is no picture."
    from PIL import Image
    try:
        with Image.open(file) as image:
            (width, height), note = image.size, str(image.info.get("Description", ""))   # as `figures.save` keeps it
    except (OSError, ValueError, Image.DecompressionBombError) as e:
        return warnings.warn(f"{file} is left out: {e}")
    kinds = dict(csv="data (CSV)", svg="SVG", png="PNG")
    return dict(name=file.stem, number=int(file.stem[3:]) if file.stem in captions() else None,
                caption=caption(file.stem, instead), note=f"{note[:1].upper()}{note[1:]}.".removeprefix("."),
                width=width//2, height=height//2,
                files=[(k, words) for k, words in kinds.items() if file.with_suffix(f".{k}").is_file()])


def pictures(folder: Path) -> list[Path]:
    "The figures (PNG) of a folder, the paper's first."
    found = [f for f in folder.glob("*.png") if f.is_file() and not f.stem.startswith("table")]
    return sorted(found, key=lambda f: (f.stem not in captions(), f.stem))
