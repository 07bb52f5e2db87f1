"What fastai asks of the batches of a split, beside iterating over them."
import copy
import math
import os
from dataclasses import replace

import numpy as np
import torch

__all__ = ["Loader", "Pairs", "part"]


class Pairs:
    "The images of a loader as fastai counts them; what it takes for an empty data set, without images."
    def __init__(self, images): self.images = images
    def __len__(self): return len(self.images) if self.images else 0
    def new_empty(self): return Pairs(None)

    @property
    def iloc(self): return self   # by which fastai takes several at once

    def __getitem__(self, i):   # a number, or several
        return Pairs(part(self.images, torch.as_tensor(i).reshape(-1)))


def part(images, i: torch.Tensor):   # i: int64 [n], which of them
    "Some images of a split, in memory or on disk, as a split of their own."
    of = dict(paths=tuple(images.paths[j] for j in i)) if hasattr(images, "paths") else dict(x=images.x[i])
    return replace(images, y=images.y[i], **of)


def as_image(item, shape: tuple) -> torch.Tensor:
    "An image [H, W, C] in bytes from a path, PIL's image, an array or a tensor; `ValueError` for another shape."
    from PIL import Image
    from .photos import open_image
    if isinstance(item, (str, os.PathLike)): item = open_image(item, item)
    if isinstance(item, Image.Image): item = item.convert("L" if shape[-1] == 1 else "RGB")
    x = item if isinstance(item, torch.Tensor) else torch.as_tensor(np.array(item))
    if x.shape == shape[:2] and shape[2] == 1: x = x[..., None]
    if x.dtype != torch.uint8 or x.shape != shape:
        raise ValueError(f"an image to predict is torch.uint8 of the shape {shape}, as those it was trained on, "
                         f"not {x.dtype} of {tuple(x.shape)}.")
    return x


class Loader:
    """Base of loaders of images in batches.

    A subclass has `in_memory` (the class of a split in memory), `images`, `data` (None once it was emptied for
    `export`), `batch_size`, `train`, `share`, `affine`, `device` and `epoch`, and yields (x float32 [B, C, H, W], y
    int64 [B])."""
    drop_last = False
    join = False   # whether a last batch of a single image joins the one before it
    n_inp = 1      # of what a batch holds, the images are what goes in
    shape = None   # of an image in memory, [H, W, C], where the images themselves were left out

    def __len__(self):
        n = len(self.images)
        return math.ceil(n / self.batch_size) - (self.join and n > self.batch_size and n % self.batch_size == 1)

    def cut(self, order) -> list:   # of tensors [B]
        "The numbers of an epoch's images [N], in batches."
        parts = list(order.split(self.batch_size))
        if self.join and len(parts) > 1 and len(parts[-1]) == 1: parts[-2:] = [torch.cat(parts[-2:])]
        return parts

    def new(self, dataset=None, shuffle=None, drop_last=False, **_):
        "A loader like this one: in order and without augmentation where `shuffle` is False."
        made = copy.copy(self)
        if shuffle is False: made.train = False
        if dataset is None: return made
        if self.images is not None and hasattr(self.images, "x"): made.shape = tuple(self.images.x.shape[1:])
        if not isinstance(dataset, Pairs): made.images = made.unlabelled(dataset)
        elif dataset.images is None: made.images = made.data = None
        else: made.images = dataset.images
        return made

    def unlabelled(self, items):
        "Images of a reader's own: paths, images of PIL's, arrays or tensors."
        from .photos import Files, photo
        y = torch.zeros(len(items), dtype=torch.int64)
        if not self.shape: return Files(tuple(map(photo, items)), y)
        return self.in_memory(torch.stack([as_image(o, self.shape) for o in items]), y).to(self.device)

    def to(self, device):
        "Move what makes the batches."
        self.device, self.affine = torch.device(device), tuple(o.to(device) for o in self.affine)
        if self.images is not None: self.images = self.images.to(device)
        return self

    def to_detach(self, b, cpu=True, gather=False):
        "A batch on the CPU; of this process alone, where fastai would gather from all."
        from fastai.torch_core import to_detach
        return to_detach(b, cpu, False)

    def one_batch(self): return next(iter(copy.copy(self)))

    @property
    def dataset(self): return Pairs(self.images)

    @property
    def items(self): return Pairs(self.images)

    @property
    def vocab(self):
        from fastai.data.transforms import CategoryMap
        return CategoryMap(list(self.classes), sort=False)

    def pixels(self, x):   # float32 [B, C, H, W] to float32 [B, H, W, C] between 0 and 1
        "Images as one sees them."
        scale, shift = (o[:x.shape[1]].to(x).view(-1, 1, 1) for o in self.affine)
        return ((x - shift) / scale / 255).clamp(0, 1).permute(0, 2, 3, 1).cpu()

    def decode_batch(self, b, max_n=9, full=True):
        "Images as one sees them, [C, H, W], each with the name of its class."
        from fastai.torch_core import TensorImage
        from fastcore.foundation import L
        seen = TensorImage(self.pixels(b[0][:max_n]).permute(0, 3, 1, 2))
        return L((image, self.classes[int(i)]) for image, i in zip(seen, b[1]))

    def _pre_show_batch(self, b, max_n=9):   # the name by which fastai's Interpretation asks for it
        import fastai.vision.learner   # noqa: F401 which knows how the top losses of images are drawn
        from fastai.torch_core import TensorCategory, TensorImage
        return TensorImage(b[0]), TensorCategory(b[1]), self.decode_batch(b, max_n)

    def show_batch(self, b=None, max_n=9, **how):
        "Draw images with their classes."
        x, y = b or self.one_batch()
        return self._draw(x, [self.classes[i] for i in y[:max_n]], **how)

    def show_results(self, b, out, max_n=9, **how):
        "Draw images with their classes, each above the one it was taken for."
        x, y = b
        found = out[0] if isinstance(out, tuple) else out
        names = [f"{self.classes[i]}\n{self.classes[int(o)]}" for i, o in zip(y[:max_n], found)]
        return self._draw(x, names, **how)

    def _draw(self, x, titles, show=True, figsize=None, **_):
        import matplotlib.pyplot as plt
        n = max(1, math.ceil(len(titles)**.5))
        fig, axes = plt.subplots(math.ceil(len(titles)/n), n, figsize=figsize or (1.6*n, 1.9*math.ceil(len(titles)/n)),
                                 squeeze=False, layout="constrained")
        for ax in axes.flat: ax.axis("off")
        for ax, image, title in zip(axes.flat, self.pixels(x[:len(titles)]), titles):
            ax.imshow(image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=1)
            ax.set_title(title, fontsize="small")
