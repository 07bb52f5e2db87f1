"""Images in files: which there are, what one becomes when it is decoded, and batches of them from worker processes."""
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .archives import AGAIN, BrokenData, subfolders, walk
from .experiment import derive_seed

SUFFIXES = ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"
MOST_PIXELS = 89_478_485   # of an image, a quarter of a gigabyte as RGB; PIL's own limit
SLIMMEST = 4               # longer to shorter side of what is enlarged for evaluation


@dataclass(frozen=True, eq=False, repr=False)
class Files:
    "One split of a data set, on disk."
    paths: tuple   # of str; of images to predict, also images of PIL's
    y: Tensor      # int64 [N], the number of the class

    def __len__(self): return len(self.y)
    def __repr__(self): return f"Files({len(self):,} images)"
    def to(self, device): return self
    def parts(self): return os.fsencode("\n".join("/".join(Path(p).parts[-3:]) for p in self.paths)), self.y.numpy()


def class_folders(folder: Path) -> tuple[Files, tuple]:
    "The images below folder/<class>/, and the names of the classes in their order; `BrokenData` for an empty one."
    classes, rows = subfolders(folder) if folder.is_dir() else [], []
    if not classes: raise FileNotFoundError(f"{folder} has no class folders; put images into {folder}/<class>/.")
    for y, name in enumerate(classes):
        own = [p for p in walk(folder/name, folder) if p.lower().endswith(SUFFIXES)]
        if not own: raise BrokenData(f"{folder/name} is empty; {AGAIN}.")
        rows += [(p, y) for p in own]
    return Files(tuple(p for p, _ in rows), torch.tensor([y for _, y in rows], dtype=torch.int64)), tuple(classes)


def photo(item):
    "What `Files` holds of a reader's own image: a path as text; PIL's image, uint8 [H, W, 3] or [H, W] as PIL's RGB."
    from PIL import Image
    if isinstance(item, (str, os.PathLike)): return os.fspath(item)
    if isinstance(item, Image.Image): return item.convert("RGB")
    x = np.asarray(item)
    if x.dtype != np.uint8 or x.ndim not in (2, 3) or x.ndim == 3 and x.shape[2] != 3:
        raise ValueError(f"an image to predict is a path, an image of PIL's, or uint8 [height, width, 3], "
                         f"not {x.dtype} of {x.shape}.")
    return Image.fromarray(x).convert("RGB")


def open_image(file: Path | BytesIO, name: str):
    """An RGB image of PIL's; `BrokenData` with its name where it cannot be decoded or has more than `MOST_PIXELS`.

    An image of 16 bits keeps the upper 8. One of floats is taken as 0..1, or as 0..255 where it has more than 1; one of
    32 bits as 0..255, or as 0..65535 where it has more than 255."""
    from PIL import Image
    try:
        with Image.open(file) as image:
            if (n := image.width*image.height) > MOST_PIXELS:
                raise ValueError(f"{n:,} pixels, more than {MOST_PIXELS:,}")
            if image.mode == "F" or image.mode.startswith("I"): image = Image.fromarray(as_bytes(np.asarray(image)))
            return image.convert("RGB")
    except Exception as e:   # decoders fail on damaged or made-up files in every way there is
        why = " ".join(str(getattr(e, "strerror", None) or e or type(e).__name__).split())[:200]
        raise BrokenData(f"{name} cannot be decoded as an image ({why}); {AGAIN}.") from None


def as_bytes(x: np.ndarray) -> np.ndarray:
    "Gray values of 16 or 32 bits, or floats, as uint8; `ValueError` where they are neither."
    low, high = x.min(), x.max()
    if x.dtype.kind == "f":
        if not (0 <= low and high <= 255): raise ValueError(f"floats from {low:g} to {high:g}, outside 0 to 255")
        return np.rint(x * (255 if high <= 1 else 1)).astype(np.uint8)
    if low < 0 or high > 65_535: raise ValueError(f"integers from {low} to {high}, outside 0 to 65,535")
    return (x.astype(np.uint16) >> (0 if x.dtype.itemsize == 4 and high <= 255 else 8)).astype(np.uint8)


def middle(image, most: float = SLIMMEST):
    "The middle of an image, at most `most` times as long as wide, so that a slim one is not enlarged to gigabytes."
    w, h = image.size
    keep = int(most*min(w, h))
    if max(w, h) <= keep: return image
    left, top = max(0, (w - keep)//2), max(0, (h - keep)//2)
    return image.crop((left, top, min(w, left + keep), min(h, top + keep)))


class Decoded:
    """The images of one split as one epoch sees them; what a worker process holds.

    An item is (uint8 [224, 224, 3], label), or the number of an image that cannot be decoded. Crops and flips are those
    of Frankle et al. (Appendix B.2): 10% to 100% of the area, aspect ratios 0.8 to 1.25. Each image has a stream of its
    own, so the number of workers changes nothing."""
    def __init__(self, files: Files, flip: bool, train: bool, seed: int, epoch: int):
        from torchvision import transforms as T
        self.files, self.seed, self.epoch = files, seed, epoch
        random = [T.RandomResizedCrop(224, scale=(.1, 1), ratio=(.8, 1.25)), T.RandomHorizontalFlip(.5 if flip else 0)]
        self.transform = T.Compose(random if train else [middle, T.Resize(256), T.CenterCrop(224)])

    def __len__(self): return len(self.files)

    def __getitem__(self, i):
        image = self.files.paths[i]
        try: image = open_image(image, image) if isinstance(image, str) else image
        except BrokenData: return i
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(self.seed, "crop", self.epoch, i))
            return torch.from_numpy(np.array(self.transform(image))), self.files.y[i]


def collate(items: list) -> tuple:
    "The images that could be decoded as (uint8 [B, 224, 224, 3], int64 [B]), and the numbers of those left out."
    good = [o for o in items if not isinstance(o, int)]
    return tuple(torch.stack(o) for o in zip(*good)), [o for o in items if isinstance(o, int)]


def decoded_batches(decoded: Decoded, batches: list, broken: set, workers: int, pin: bool) -> Iterator:
    """Batches of the images whose numbers are given, as (uint8 [B, 224, 224, 3], int64 [B]).

    Among a million files a few are broken, and a run of many days should not end for one of them: it goes on without,
    adds their paths to `broken`, and warns at the end of the epoch where there are new ones. `BrokenData` where no
    image of a batch can be decoded: then something else is wrong."""
    paths, known = decoded.files.paths, len(broken)
    for batch, left_out in torch.utils.data.DataLoader(decoded, batch_sampler=batches, collate_fn=collate,
                                                       num_workers=workers, pin_memory=pin):
        broken.update(paths[i] for i in left_out)
        if not batch:
            raise BrokenData(f"{paths[left_out[0]]} cannot be decoded as an image, "
                             f"nor can any other of its batch; {AGAIN}.")
        yield batch
    if len(broken) > known:
        warnings.warn(f"{len(broken)} of {len(paths):,} images cannot be decoded and are left out: {named(broken)}")


def named(paths: Iterable[str], most: int = 5) -> str:
    "Some names, and how many more there are."
    names = sorted(paths)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
