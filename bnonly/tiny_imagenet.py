"""Tiny ImageNet: 200 classes of ImageNet at 64x64 pixels, 500 images of each to train on and 50 to test on.

The official layout is read: train/<class>/images/*.JPEG, val/images/*.JPEG with val/val_annotations.txt, wnids.txt (the
classes) and words.txt (their names). The published test images have no labels, so those of val are tested on."""
from pathlib import Path

import numpy as np

from .archives import AGAIN, BrokenData, subfolders, walk
from .photos import SUFFIXES, open_image
from .readers import Part

SIDE = 64   # pixels, height and width
ARCHIVE = "tiny-imagenet-200.zip (cs231n.stanford.edu)"


def lines(file: Path) -> list[list[str]]:
    "The fields of each line of a table; `FileNotFoundError` or `BrokenData` where there is none."
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; unpack {ARCHIVE} so that {file.parent} holds what it holds.")
    try: return [line.split("\t") for line in file.read_text(encoding="utf8").splitlines() if line.strip()]
    except (OSError, ValueError): raise BrokenData(f"{file} cannot be read as text; {AGAIN}.") from None


def class_names(home: Path) -> dict[str, str]:
    "The classes of wnids.txt with their first names in words.txt. Sorted, as in ImageNet, they are numbered."
    wnids = sorted({row[0].strip() for row in lines(home/"wnids.txt")})
    words = {row[0]: row[-1].split(",")[0].strip() for row in lines(home/"words.txt")}
    if not wnids: raise BrokenData(f"{home}/wnids.txt is empty; {AGAIN}.")
    if unnamed := [w for w in wnids if w not in words]:
        raise BrokenData(f"{home}/words.txt has no line {unnamed[0]}; {AGAIN}.")
    return {w: words[w] for w in wnids}


def training_files(home: Path, wnids: list) -> tuple[list, list]:
    "The paths of the training images, by class and name, and their labels."
    if odd := sorted(set(subfolders(home/"train")) - set(wnids)):
        raise BrokenData(f"{home/'train'/odd[0]} is not a class of {home/'wnids.txt'}; remove it.")
    paths, labels = [], []
    for y, wnid in enumerate(wnids):
        folder = home/"train"/wnid/"images"
        own = [p for p in walk(folder) if p.lower().endswith(SUFFIXES)] if folder.is_dir() else []
        if not own: raise BrokenData(f"{folder} is missing or has no images; {AGAIN}.")
        paths, labels = paths + own, labels + [y]*len(own)
    return paths, labels


def labelled_files(home: Path, wnids: list) -> tuple[list, list]:
    "The paths of val's images in the order of their names, and their labels."
    table = home/"val"/"val_annotations.txt"
    number, labels = {w: y for y, w in enumerate(wnids)}, {}
    for name, *rest in lines(table):
        if not rest or rest[0] not in number: raise BrokenData(f"{table} gives {name} no class of wnids.txt; {AGAIN}.")
        labels[name] = number[rest[0]]
    folder = home/"val"/"images"
    found = {Path(p).name: p for p in walk(folder) if p.lower().endswith(SUFFIXES)} if folder.is_dir() else {}
    if odd := sorted(found.keys() ^ labels.keys()):
        raise BrokenData(f"{folder/odd[0]} is {'not in ' + table.name if odd[0] in found else 'missing'}; {AGAIN}.")
    if not found: raise BrokenData(f"{folder} has no images; {AGAIN}.")
    return [found[n] for n in sorted(found)], [labels[n] for n in sorted(found)]


def decode(paths: list) -> np.ndarray:
    "Images, uint8 [N, 64, 64, 3], three equal channels of a gray one; `BrokenData` for another size, or where damaged."
    x = np.empty((len(paths), SIDE, SIDE, 3), np.uint8)
    for i, path in enumerate(paths):
        image = open_image(path, path)
        if image.size != (SIDE, SIDE):
            raise BrokenData(f"{path} has {image.width}x{image.height} pixels instead of {SIDE}x{SIDE}; {AGAIN}.")
        x[i] = np.asarray(image)
    return x


def read_tiny(home: Path) -> tuple[tuple, Part, Part]:
    "The names of the classes, the training images and the test images."
    if not home.is_dir():
        raise FileNotFoundError(f"{home} is missing; unpack {ARCHIVE} there, or set BNONLY_DATA to what holds it.")
    names = class_names(home)
    splits = training_files(home, [*names]), labelled_files(home, [*names])   # all of them, before the first is decoded
    return tuple(names.values()), *(Part(decode(paths), np.array(y), len(names), home) for paths, y in splits)
