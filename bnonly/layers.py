"""The layers of the networks: PyTorch's modules, which call the operators of `bnonly.ops` once they are prepared.

As they are built they compute what their base classes compute. `prepare_layers` tells them in which dtype to compute,
lets them call the operators where they are on a CPU and there are compiled kernels, and packs each frozen weight, which
must then not change in place: whoever changes one prepares the network again (`load_state_dict` does). What an operator
does not take is left to its definition. `torch.func.grad` takes no operator of `torch.library` with a gradient of its
own, and needs a network that is not prepared. The functions in front of the classes are one step of a trace each.
"""
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrize

from . import ops, sparse
from .faults import pair, safe_conv2d
from .native import kernels
from .register import cast, on_cpu

__all__ = ["BatchNormAct", "Chain", "Conv2d", "Linear", "MaxPool2d", "Stage", "norm_act", "prepare_layers"]


def _current(packs, weight) -> dict:
    "The packs of a weight; none any more once it trains, and none where another stands in its place."
    if packs and weight.requires_grad: packs.clear()
    return packs if packs and packs["of"] is weight else {}


@fx.wrap
def convolution(x, weight, bias, stride, padding, dilation, groups, dtype=None, rival=None, packs=None):
    "A convolution; rival: as `ops.rival` gives it, None for the definition; packs: as `Conv2d.pack` gives them."
    if weight.dtype != torch.float32: dtype = None   # the module was moved to another
    packs = _current(packs, weight)
    (x,) = cast(dtype, x)
    if rival and dtype == x.dtype and on_cpu(x, weight, bias) and x.shape[1] == weight.shape[1]*groups:
        size = ops.output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
        shape, trains, geometry = weight.shape, weight.requires_grad, (stride, padding, dilation, groups)
        how = ops.conv_algorithm(rival, shape, trains, *geometry, x.shape[0], size)
        if min(size) > 0 and (how != "pytorch" or not trains):
            packed = packs.get(how, (None, None))
            return ops.conv2d(x, packs["weight"] if packs else weight, bias, *packed, *geometry, how)
    return safe_conv2d(x, *cast(dtype, weight, bias), stride, padding, dilation, groups)


@fx.wrap
def linear(x, weight, bias, dtype=None):
    "A linear layer."
    if weight.dtype != torch.float32: dtype = None
    return F.linear(*cast(dtype, x, weight, bias))


@fx.wrap
def batch_normalization(x, residual, weight, bias, running_mean, running_var, count, training, tracks, momentum, eps,
                        relu, fused=False):
    """relu(batch_norm(x) + residual) as `nn.BatchNorm2d` does it: in training with the statistics of the batch, which
    the running ones follow."""
    if x.dim() != 4: raise ValueError(f"expected 4D input (got {x.dim()}D input)")
    follow = training and tracks and count is not None
    if follow: count.add_(1)
    factor = momentum if momentum is not None else 1/float(count) if follow else 0.
    running = (running_mean, running_var) if tracks or not training else (None, None)
    compute = ops.batch_norm_act if fused and momentum is not None else ops.batch_norm_act_reference
    return compute(x, residual, weight, bias, *running, training or running_mean is None, factor, eps, relu)


@fx.wrap
def max_pool(x, kernel, stride, padding, dilation, ceil_mode):
    "Max-pooling that keeps the places of the maxima."
    if not on_cpu(x) or x.dtype not in ops.DTYPES: return F.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    return ops.max_pool2d(x, *map(pair, (kernel, stride, padding, dilation)), ceil_mode)


@fx.wrap
def residual_blocks(x, affine, weights, running, counts, momenta, eps, packs, dtype, rival):
    "Residual blocks of two convolutions [C, C, 3, 3], each with BatchNorm and ReLU, in training: at best one operator."
    same, images = ((1, 1),)*3, (x.shape[0], x.shape[2:])
    def fast(w): return ops.conv_algorithm(rival, w.shape, w.requires_grad, *same, 1, *images) == "winograd"
    def ours(t): return t.device.type == "cpu" and t.dtype == torch.float32
    if (x.dtype == dtype and on_cpu(x) and x.stride(1) == 1 and x.numel() > x.shape[1]
            and all(ours(t) and t.is_contiguous() and t.shape == x.shape[1:2] for t in (*affine, *running))
            and all(ours(w) and w.shape[:2] == (x.shape[1],)*2 and fast(w) for w in weights)):
        for count in counts: count.add_(1)
        packed = [*map(_current, packs, weights)]
        packed = [p["winograd"][back] for back in (0, 1) for p in packed] if all(packed) else ()
        return ops.basic_blocks(x, affine, weights, running, momenta, eps, packed)
    for i in range(0, len(weights), 2):
        y = x
        for k,residual in ((i, None), (i + 1, x)):
            z, own = convolution(y, weights[k], None, *same, 1, dtype, rival, packs[k]), slice(2*k, 2*k + 2)
            how = True, True, momenta[k], eps[k], True, True
            y = batch_normalization(z, residual, *affine[own], *running[own], counts[k], *how)
        x = y
    return x


class Prepared:
    "What `prepare_layers` tells a layer."
    compute_dtype = None   # in which it computes; None: in that of its input
    rival = None           # as `ops.rival` gives it; None: the operators are not used

    def prepare(self, dtype):
        on_cpu = all(p.device.type == "cpu" for p in self.parameters())
        fused = kernels() is not None and dtype in ops.DTYPES and on_cpu
        self.compute_dtype, self.rival = dtype, ops.rival(dtype) if fused else None

    def __getstate__(self): return {name: value for name, value in super().__getstate__().items() if name != "packs"}

    def __setstate__(self, state):   # a copy is prepared anew: another processor has other kernels, or none
        super().__setstate__(state)
        if self.rival is not None: self.prepare(self.compute_dtype)


class BatchNormAct(Prepared, nn.BatchNorm2d):
    "BatchNorm, plus a residual where there is one, then ReLU."
    activates = True

    def __init__(self,
                 channels:int,      # features to normalize
                 relu:bool=True     # False on shortcuts, whose sum with the branch is activated later
                ):
        super().__init__(channels)
        self.relu = relu

    def forward(self,
                x,              # [N, channels, H, W]
                residual=None   # of the same shape
               ):               # [N, channels, H, W]
        return batch_normalization(x, residual, self.weight, self.bias, self.running_mean, self.running_var,
                                   self.num_batches_tracked, self.training, self.track_running_stats, self.momentum,
                                   self.eps, self.relu, self.rival is not None)


def norm_act(norm, x, residual=None):
    """relu(norm(x) + residual). `BatchNormAct` and the other layers with `activates` do it themselves; another
    normalization that was put in their place (SyncBatchNorm, GroupNorm) does not, and loses nothing by it."""
    if getattr(norm, "activates", isinstance(norm, nn.ReLU)): return norm(x) if residual is None else norm(x, residual)
    y = norm(x)
    return F.relu(y if residual is None else y + residual)


class Chain(nn.Sequential):
    """Convolutions, poolings, stages and normalizations one after the other, each normalization with its ReLU.

    The ReLU belongs to the place: it stays, whatever is put there instead of a `BatchNormAct`."""
    def __init__(self, *layers):
        super().__init__(*layers)
        self.activated = {i for i, m in enumerate(self) if getattr(m, "activates", False)}

    def forward(self, x):
        for i, m in enumerate(self): x = norm_act(m, x) if i in self.activated else m(x)
        return x


class Conv2d(Prepared, nn.Conv2d):
    "PyTorch's convolution, computed around the faults of its gradients on a CPU (`bnonly.faults`)."
    packs = None   # of a frozen weight, by `ops.pack_weight`

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_load_state_dict_post_hook(_pack_again)

    def prepare(self, dtype):
        super().prepare(dtype)
        self.packs = self.pack() if self.rival else None

    def pack(self) -> dict|None:
        "The frozen weight in the dtype in which it computes, and for each kernel that may be chosen, both ways."
        if sparse.has_sparse_weight(self): return sparse.pack_base(self)
        if parametrize.is_parametrized(self) or self.weight.requires_grad or isinstance(self.padding, str): return None
        weight = self.weight.detach().to(self.compute_dtype)
        geometry = self.stride, self.padding, self.dilation, self.groups
        best, both = ops.conv_algorithm(self.rival, weight.shape, False, *geometry), weight.shape[1] % 16 == 0
        algorithms = [] if best == "pytorch" else [best]
        if best == "winograd" and self.rival == "none": algorithms.append("direct")   # of small images
        def pack(name, back): return ops.pack_weight(weight, name, back, self.stride[0], self.padding[0])
        packs = {name: (pack(name, False), pack(name, True) if both else None) for name in algorithms}
        return packs | dict(of=self.weight, weight=weight)

    def forward(self,
                x   # [N, in_channels, H, W]
               ):   # [N, out_channels, H', W']
        if self.rival and sparse.has_sparse_weight(self):
            how = self.stride, self.padding, self.compute_dtype, self.rival
            return sparse.sparse_convolution(x, *sparse.values_and_weight(self), self.bias, *how)
        if self.padding_mode != "zeros" or isinstance(self.padding, str): return super().forward(x)
        return convolution(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups,
                           self.compute_dtype, self.rival, self.packs)


def _pack_again(conv, _):   # after other weights were loaded
    if conv.packs: conv.packs = conv.pack()


class Linear(Prepared, nn.Linear):
    "PyTorch's linear layer."
    packs = None

    def prepare(self, dtype):
        super().prepare(dtype)
        self.packs = sparse.pack_base(self) if self.rival and sparse.has_sparse_weight(self) else None

    def forward(self, x):
        if self.rival and sparse.has_sparse_weight(self):
            return sparse.sparse_linear_layer(x, *sparse.values_and_weight(self), self.bias, self.compute_dtype)
        return linear(x, self.weight, self.bias, self.compute_dtype)


class MaxPool2d(Prepared, nn.MaxPool2d):
    "PyTorch's max-pooling."
    def forward(self, x):
        if self.rival is None or self.return_indices: return super().forward(x)
        return max_pool(x, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)


def _plain(m, kind) -> bool:
    "Whether a module is what its class says: nobody asks for what goes in or out of it, or computes something else."
    hooks = m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks   # there is no public way
    return type(m) is kind and "forward" not in vars(m) and not any(hooks)


class Stage(Prepared, nn.Sequential):
    """Residual blocks in a row. In training, neighbours that have `pairs` of a convolution and a BatchNorm are one
    step, unless hooks ask for what is in between; hooks for all modules do not see into it."""
    def forward(self, x):
        if self.rival is None or not self.training: return super().forward(x)
        row, row_trains = [], None   # pairs that go in one step, and whether any trains: those that do not keep nothing
        for block in self:
            fusible, trains = self.fusible(block), any(p.requires_grad for p in block.parameters())
            if row and not (fusible and trains == row_trains): x, row = self.in_one_step(x, row), []
            if fusible: row, row_trains = [*row, *block.pairs()], trains
            else: x = block(x)
        return self.in_one_step(x, row) if row else x

    @staticmethod
    def fusible(block) -> bool:
        "Whether a block may be computed without its modules."
        def same(c): return (_plain(c, Conv2d) and c.kernel_size == (3, 3)
                             and c.stride == c.padding == c.dilation == (1, 1)
                             and c.groups == 1 and c.bias is None and c.padding_mode == "zeros")
        def usual(n): return (_plain(n, BatchNormAct) and n.training and n.relu and n.affine and n.track_running_stats
                              and n.momentum is not None)
        pairs = block.pairs() if hasattr(block, "pairs") else ()
        plain = bool(pairs) and _plain(block, type(block)) and _plain(block.downsample, nn.Identity)
        return plain and all(same(c) and usual(n) for c,n in pairs)

    def in_one_step(self, x, pairs):
        convs, norms = zip(*pairs)
        affine = [p for n in norms for p in (n.weight, n.bias)]
        running = [b for n in norms for b in (n.running_mean, n.running_var)]
        return residual_blocks(x, affine, [c.weight for c in convs], running, [n.num_batches_tracked for n in norms],
                               [n.momentum for n in norms], [n.eps for n in norms], [c.packs for c in convs],
                               self.compute_dtype, self.rival)


def prepare_layers(model:nn.Module,      # frozen by its policy, on its device
                   dtype:torch.dtype,    # of the convolutions and of what is between the layers
                   kinds:tuple=(Prepared,)   # of layers
                  ) -> nn.Module:        # the same model
    "Let the layers compute in `dtype`, by the operators where there are kernels. Frozen weights then rest."
    for m in model.modules():
        if isinstance(m, kinds): m.prepare(dtype)
    return model
