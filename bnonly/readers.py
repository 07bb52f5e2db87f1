"""The published files of CIFAR-10, CIFAR-10.1, CIFAR-10-C, MNIST and SVHN as arrays.

A reader gives each split as a `Part`. It raises `FileNotFoundError` where a file is missing, with where it is to be
had, and `BrokenData` where a file is cut off, damaged, or not the one that was published. No pickle is opened before
its checksum holds."""
import gzip
import hashlib
import warnings
import zlib
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from .archives import AGAIN, BrokenData, archive_files, left_behind, tree_files
from .photos import open_image

CIFAR10 = "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"
CIFAR10_MD5 = {
    "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
CORRUPTIONS = tuple("""gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost
                       fog brightness contrast elastic_transform pixelate jpeg_compression""".split())
SEVERITIES = 5
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SVHN_SIZE = dict(train=73_257, test=26_032)


class Part(NamedTuple):
    "One split: uint8 [N, H, W, C], integers [N], how many classes there are, and the file that the labels come from."
    x: np.ndarray
    y: np.ndarray
    classes: int
    where: object


# -------- CIFAR-10: each reader gives the label that a report uses, the training images and the test images

def read_tree(files: Iterable[tuple[str, bytes]], where: Path) -> tuple[str, Part, Part]:
    """fastai's tree, whose names end in {train,test}/<class>/<image>, from a folder or an archive.

    The number of a class is its place in the alphabet, which is CIFAR-10's own order. Images are ordered by class and
    name, so folder and archive are one data set."""
    found, suffixes = {(s, c): {} for s in ("train", "test") for c in CIFAR10}, set()
    for name, content in files:
        *_, part, label, file = ("", "", *PurePosixPath(name).parts)
        suffix = PurePosixPath(file).suffix.lower()
        if file == "labels.txt" and tuple(content.decode(errors="replace").split()) != CIFAR10:
            raise BrokenData(f"{where}: {name} does not list CIFAR-10's ten classes in their order; {AGAIN}.")
        if part not in ("train", "test") or suffix not in (".png", ".jpg", ".jpeg"): continue
        if left_behind(label) or left_behind(file): continue
        if label not in CIFAR10: raise BrokenData(f"{where}: {part}/{label} is not a class of CIFAR-10; remove it.")
        found[part, label][file] = np.asarray(open_image(BytesIO(content), f"{where}: {name}"))
        suffixes.add(suffix)
    label = "CIFAR-10" if suffixes == {".png"} else "CIFAR-10 (JPEG)"
    return label, stack(found, "train", where), stack(found, "test", where)


def stack(found: dict, part: str, where: Path) -> Part:
    "All images of a split, 'train' or 'test', by class and file name; `found` is (split, class) to file name to image."
    for c in CIFAR10:
        if not found[part, c]: raise BrokenData(f"{where} has no images in {part}/{c}; {AGAIN}.")
    rows = [(f"{part}/{c}/{f}", x, y) for y, c in enumerate(CIFAR10) for f, x in sorted(found[part, c].items())]
    for name, x, _ in rows:
        if x.shape != rows[0][1].shape: raise BrokenData(f"{where}: {name} differs in size from the others; {AGAIN}.")
    return Part(np.stack([x for _, x, _ in rows]), np.array([y for *_, y in rows]), 10, where)


def read_binary(files: Iterable[tuple[str, bytes]], where: Path) -> tuple[str, Part, Part]:
    """The binary version: the original pixels in the original order, and no pickle.

    A row is a label and three planes. Each of its six files must have its published checksum before it is read, so that
    "CIFAR-10" means these pixels."""
    found, rows = {PurePosixPath(name).name: content for name, content in files}, []
    for name, md5 in CIFAR10_MD5.items():
        if name not in found: raise BrokenData(f"{where} has no {name}; unpack or download the whole archive again.")
        if hashlib.md5(found[name]).hexdigest() != md5:
            raise BrokenData(f"{name} of {where} does not have its published checksum {md5}, "
                             f"so it was not read; {AGAIN}.")
        rows.append(np.frombuffer(found[name], np.uint8).reshape(-1, 1 + 3*32*32))
    def part(r): return Part(r[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), r[:, 0].copy(), 10, where)
    return "CIFAR-10", part(np.concatenate(rows[:-1])), part(rows[-1])


def read_batches(folder: Path) -> tuple[str, Part, Part]:
    "torchvision's pickles in cifar-10-batches-py, all checksums verified first: to open a pickle is to run it."
    from torchvision import datasets
    cifar = datasets.CIFAR10
    meta = cifar.meta["filename"], cifar.meta["md5"]
    for name, md5 in (*cifar.train_list, *cifar.test_list, meta): verify(folder/name, md5)
    train, test = (cifar(folder.parent, train=t) for t in (True, False))
    return "CIFAR-10", *(Part(o.data, np.asarray(o.targets), 10, folder) for o in (train, test))


def verify(file: Path, md5: str):
    "`BrokenData` unless a file has its published checksum."
    from torchvision.datasets.utils import check_integrity
    if not file.exists(): raise BrokenData(f"{file} is missing; unpack the archive it belongs to again.")
    if not check_integrity(file, md5):
        raise BrokenData(f"{file} does not have its published checksum {md5}, so it was not opened; {AGAIN}.")


def read_packed(archive: Path) -> tuple[str, Part, Part]:
    "cifar-10-python.tar.gz, verified, unpacked beside itself and read."
    from torchvision import datasets
    verify(archive, datasets.CIFAR10.tgz_md5)
    datasets.utils.extract_archive(str(archive), str(archive.parent))
    return read_batches(archive.parent/datasets.CIFAR10.base_folder)


# Where several sources lie side by side, the first counts: the original's bytes come before a copy.
SOURCES = {"cifar-10-batches-bin": lambda o: read_binary(tree_files(o), o),
           "cifar-10-binary.tar.gz": lambda o: read_binary(archive_files(o), o),
           "cifar-10-batches-py": read_batches, "cifar-10-python.tar.gz": read_packed,
           "cifar10": lambda o: read_tree(tree_files(o), o), "cifar10.tgz": lambda o: read_tree(archive_files(o), o)}


# -------- CIFAR-10.1 and CIFAR-10-C

def read_npy(file: Path, source: str) -> np.ndarray:
    "An array, without pickle; `source` is where a missing one is to be had."
    try: return np.load(file, allow_pickle=False)
    except FileNotFoundError: raise FileNotFoundError(f"{file} is missing; put it there from {source}.") from None
    except (OSError, ValueError, EOFError): raise BrokenData(f"{file} is cut off or no array; {AGAIN}.") from None


def read_newer(folder: Path, shape: tuple) -> Part:
    "CIFAR-10.1 (v6), images of a shape."
    images, labels = (folder/f"cifar10.1_v6_{o}.npy" for o in ("data", "labels"))
    x, y = (read_npy(f, "github.com/modestyachts/CIFAR-10.1 (folder datasets)") for f in (images, labels))
    if x.dtype != np.uint8 or x.shape[1:] != shape:
        raise BrokenData(f"{images} holds {x.dtype} of shape {x.shape} instead of images like CIFAR-10's; {AGAIN}.")
    return Part(x, y, 10, labels)


def read_corrupted(home: Path, shape: tuple) -> Part:
    "CIFAR-10-C, images of a shape, by corruption, severity and image."
    source = "zenodo.org/record/2535967 (CIFAR-10-C.tar)"
    y = read_npy(home/"labels.npy", source)
    x = np.empty((len(CORRUPTIONS), len(y), *shape), np.uint8)
    for i, name in enumerate(CORRUPTIONS):
        found = read_npy(home/f"{name}.npy", source)
        if found.dtype != np.uint8 or found.shape != x.shape[1:] or len(y) % SEVERITIES:
            raise BrokenData(f"{home/name}.npy holds {found.dtype} of shape {found.shape} for {len(y)} labels at "
                             f"{SEVERITIES} severities; {AGAIN}.")
        x[i] = found
    return Part(x.reshape(-1, *shape), np.tile(y, len(CORRUPTIONS)), 10, home/"labels.npy")


# -------- MNIST and SVHN

def read_idx(file: Path) -> np.ndarray:
    """One of MNIST's files, compressed or not, named without the .gz that may be added.

    A file says its own shape: two zero bytes, 8 for bytes, the number of axes, the axes as big-endian integers. So one
    that is cut off does not fit its own header."""
    file = file if file.exists() else file.with_name(file.name + ".gz")
    if not file.exists(): raise FileNotFoundError(f"{file} is missing; put MNIST's four files into {file.parent}, "
                                                  "for instance by torchvision.datasets.MNIST(..., download=True).")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        (*head, axes), body = content[:4], np.frombuffer(content, np.uint8)
        shape = np.frombuffer(content, ">u4", axes, offset=4)
        if head != [0, 0, 8] or len(shape) != axes: raise ValueError
        return checked(body[4 + 4*axes:].reshape(shape), content, file)
    except BrokenData: raise
    except (OSError, EOFError, ValueError, zlib.error):
        raise BrokenData(f"{file} is cut off or damaged; {AGAIN}.") from None


def checked(array: np.ndarray, content: bytes, file: Path) -> np.ndarray:
    """`array`, if `content` has MNIST's published checksum or is not of MNIST's size.

    A file of MNIST's size with another checksum is not MNIST: damaged, or Fashion-MNIST, whose files have the same
    names. A smaller file of the same form is fine for a trial and only warned of."""
    name = file.name.removesuffix(".gz")
    if hashlib.md5(content).hexdigest() != MNIST_MD5[name]:
        size = 60_000 if name.startswith("train") else 10_000
        if len(array) == size:
            raise BrokenData(f"{file} does not have its published checksum {MNIST_MD5[name]}; {AGAIN}.")
        warnings.warn(f"{file} holds {len(array):,} items where MNIST has {size:,}.")
    return array


def mnist_folder(folder: Path) -> Path:
    "Where MNIST's four files lie: in MNIST/raw as torchvision has them, or in a folder on the way there."
    homes = [folder/"MNIST"/"raw", folder/"raw", folder/"MNIST", folder]
    return next((h for h in homes if any(h.glob("train-images-idx3-ubyte*"))), homes[0])


def read_mnist(raw: Path, part: str) -> Part:
    "A split of MNIST, 'train' or 't10k'."
    images, labels = raw/f"{part}-images-idx3-ubyte", raw/f"{part}-labels-idx1-ubyte"
    return Part(read_idx(images)[..., None].copy(), read_idx(labels).copy(), 10, labels)


def read_mat(folder: Path, part: str) -> Part:
    "A split of SVHN, 'train' or 'test'. torchvision makes the class 10 a 0."
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity
    class Reader(datasets.SVHN): split_list = {k: [*entry[:2], None] for k, entry in datasets.SVHN.split_list.items()}
    _, name, md5 = datasets.SVHN.split_list[part]
    if not (folder/name).exists():
        raise FileNotFoundError(f"{folder/name} is missing; put it there by "
                                f"torchvision.datasets.SVHN({str(folder)!r}, {part!r}, download=True).")
    try: found = Reader(folder, part)
    except Exception as e: raise BrokenData(f"{folder/name} is cut off or damaged; {AGAIN}.") from e
    if len(found) != SVHN_SIZE[part]:
        warnings.warn(f"{folder/name} holds {len(found):,} images where SVHN has {SVHN_SIZE[part]:,}.")
    elif not check_integrity(folder/name, md5):
        raise BrokenData(f"{folder/name} does not have its published checksum {md5}; {AGAIN}.")
    return Part(found.data.transpose(0, 2, 3, 1), found.labels, 10, folder/name)

