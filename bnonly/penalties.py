"""What may be added to the loss in BatchNorm's place, and what is measured at the last layer, as fastai callbacks.

Dauphin and Cubuk (2021) ask which of BatchNorm's effects is the one that regularizes, and answer with penalties so
simple that each isolates one effect: on the norm of the features that enter the output layer (Emb(x) in their text), on
the norm of the logits, on the statistics of every intermediate layer. Each is switched on by a field of `Spec`.
"""
import warnings

import torch
from torch import nn
from torch.nn import functional as F

from .experiment import Spec, derive_seed
from .models import BiasAct, output_layer
from .trace import BATCH_NORMS

with warnings.catch_warnings():   # fastai 2.8 still decorates with torch.jit.script, which torch 2.15 deprecates
    warnings.simplefilter("ignore", FutureWarning)
    from fastai.callback.core import Callback


def mask(shape, share:float,   # of entries that are dropped
         *key                  # a seed and what is drawn, as `derive_seed` takes them
        ) -> torch.Tensor:     # 0 or 1/(1-share)
    "Which features stay, scaled so that their sum keeps its expectation."
    rng = torch.Generator().manual_seed(derive_seed(*key))
    return (torch.rand(shape, generator=rng) >= share).float() / (1-share)


class Hooked(Callback):
    "A callback that looks at what enters some layers while the model is fitted."
    handles = ()
    def layers(self) -> list: return [output_layer(self.model)]
    def before_fit(self):
        self.after_fit()   # those of a fit that was interrupted
        self.handles = [m.register_forward_pre_hook(lambda m, inputs: self.enters(inputs[0])) for m in self.layers()]
    def after_fit(self):
        for h in self.handles: h.remove()


class Embedding(Hooked):
    """Keeps what enters the output layer, with its graph, and measures it over the test images.

    It costs one small product a batch, so every run has it: an epoch a line, in its metrics.csv.
    """
    def __init__(self, seed:int): self.seed = seed
    def enters(self, x): self.features = x
    def before_validate(self): self.sums, self.images = 0., 0

    @torch.no_grad()
    def after_pred(self):
        if self.training or not self.yb: return
        e, layer = self.features.float(), output_layer(self.model)
        half = e * mask(e.shape, .5, self.seed, "test dropout", self.iter).to(e.device)
        hits = F.linear(half, layer.weight, layer.bias).argmax(1) == self.y
        sums = e.norm(dim=1).sum(), self.pred.float().norm(dim=1).sum(), 100.*hits.sum()
        self.sums, self.images = self.sums + torch.stack(sums).double(), self.images + len(e)

    def row(self) -> dict:   # of metrics.csv
        "Mean norms of embedding and logits, and the accuracy (%) under 50% Dropout."
        return dict(zip(("embedding_norm", "output_norm", "dropped"), (self.sums/self.images).tolist()))


def wide(x:torch.Tensor) -> torch.Tensor:
    "In float32 at least, because bfloat16 is too coarse for sums."
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_square(x:torch.Tensor   # [N, features]
               ) -> torch.Tensor:  # a scalar
    "The mean of the squared entries."
    return wide(x).pow(2).mean()


class Penalty(Callback):
    "Adds a multiple of `value` to the loss that is differentiated, not to the one that is written down."
    def __init__(self, coefficient:float): self.coefficient = coefficient
    def after_loss(self):
        if self.training: self.learn.loss_grad = self.loss_grad + self.coefficient*self.value()


class EmbeddingL2(Penalty):
    "Embedding L2, E|Emb(x)|²/H (section 2.1)."
    def value(self): return mean_square(self.embedding.features)


class FunctionalL2(Penalty):
    "Functional L2, E|NN(x)|²/K (section 2.1)."
    def value(self): return mean_square(self.pred)


def divergence(x,          # [N, channels, ...]
               eps=1e-5    # added to the variance in the logarithm
              ):           # summed over channels
    "KL divergence of each channel's normal distribution from the standard one (section 2.2)."
    var, mean = torch.var_mean(wide(x), [0, *range(2, x.dim())], correction=0)
    return .5*(mean**2 + var - (var + eps).log() - 1).sum()


class Standardize(Hooked, Penalty):
    "The standardization loss over every intermediate layer (Collins et al., 2019)."
    KINDS = BiasAct, nn.ReLU, *BATCH_NORMS   # a ReLU of its own: MLPs without normalization
    def layers(self): return [m for m in self.model.modules() if isinstance(m, self.KINDS)]
    def before_batch(self): self.inputs = []
    def enters(self, x): self.inputs.append(x)
    def value(self): return sum(map(divergence, self.inputs))


class Dropout(Hooked):
    "Drops a share of the features that enter the output layer, in training, by masks from a stream of the run's seed."
    def __init__(self, share:float, seed:int): self.share, self.seed = share, seed
    def enters(self, x):
        if self.training: return x * mask(x.shape, self.share, self.seed, "dropout", self.epoch, self.iter).to(x)


# field of Spec to callback
PENALTIES = dict(embedding_l2=EmbeddingL2, functional_l2=FunctionalL2, standardize=Standardize)


def regularizers(spec:Spec) -> list:   # of callbacks
    "What measures the embedding of a run, and what its spec adds to the loss."
    asked = [kind(getattr(spec, name)) for name,kind in PENALTIES.items() if getattr(spec, name)]
    return [Embedding(spec.seed), *asked, *([Dropout(spec.dropout, spec.seed)] if spec.dropout else [])]
