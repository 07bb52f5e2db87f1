"""The normalizations of a network: gamma and beta of every channel, and how often its ReLU is zero."""
import numpy as np
import torch

from .models import BasicBlock, Bottleneck
from .trace import BATCH_NORMS

__all__ = ["ROLES_AFTER", "norms", "affine_table", "ZeroCounter", "zero_rates"]

ROLES_AFTER = "relu", "added", "shortcut"   # what follows a normalization


def norms(model) -> dict:
    "Every BatchNorm of a network in its order, each with the number of its role in `ROLES_AFTER`."
    blocks = [b for b in model.modules() if isinstance(b, (BasicBlock, Bottleneck))]
    ends = {m for b in blocks for m in [c for c in b.children() if isinstance(c, BATCH_NORMS)][-1:]}
    return {m: 1 if m in ends else 0 if m.relu else 2 for m in model.modules() if isinstance(m, BATCH_NORMS)}


def affine_table(model) -> dict:
    "layer (int16), role (int8), gamma and beta (float32) of every channel, each [channels of the network]."
    found = norms(model)
    sizes = np.array([m.num_features for m in found], int)

    def flat(tensors):
        return np.concatenate([np.zeros(0, np.float32), *(t.detach().float().cpu().numpy() for t in tensors)])
    return dict(layer=np.repeat(np.arange(len(found), dtype=np.int16), sizes),
                role=np.repeat(np.array([*found.values()], np.int8), sizes),
                gamma=flat(m.weight for m in found), beta=flat(m.bias for m in found))


class ZeroCounter:
    "Counts the zeros that each ReLU of a network puts out, channel by channel, by hooks that `rates` takes off."
    def __init__(self, model):
        self.zeros, self.seen = {m: 0 for m in norms(model)}, {m: 0 for m in norms(model)}
        self.hooks = [m.register_forward_hook(self.count) for m in self.zeros if m.relu]

    def count(self, m, inputs, out):
        "Add the zeros of one output [N, channels, H, W]; called by the hooks."
        values = out.movedim(1, -1).flatten(0, -2)
        self.zeros[m] += len(values) - values.count_nonzero(0)
        self.seen[m] += len(values)

    def rates(self) -> np.ndarray:
        "Pr[activation = 0] of each channel: float32 [channels of the network], NaN where there is no ReLU."
        for h in self.hooks: h.remove()
        unknown = {m: np.full(m.num_features, np.nan) for m in self.zeros}
        found = [self.zeros[m].cpu().numpy()/self.seen[m] if self.seen[m] else unknown[m] for m in self.zeros]
        return np.concatenate([np.zeros(0), *found]).astype(np.float32)


def zero_rates(model, batches) -> np.ndarray:
    "Pr[activation = 0] of each channel over batches of images, in evaluation mode; the mode is put back."
    counter, training = ZeroCounter(model), model.training
    model.eval()
    try:
        with torch.no_grad():
            for x, *_ in batches: model(x)
    finally:
        model.train(training)
        rates = counter.rates()
    return rates
