"""Layers of whose weight a few entries train (`random2`, 03_policies): how those of `bnonly.layers` compute them."""
import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from . import ops
from .register import cast, on_cpu

__all__ = ["has_sparse_weight", "values_and_weight", "pack_base", "sparse_convolution", "sparse_linear_layer"]


def has_sparse_weight(m) -> bool:
    "Whether a few entries of a layer's weight train (03_policies), and the operators know its geometry."
    if not parametrize.is_parametrized(m, "weight"): return False
    if not all(hasattr(m.parametrizations.weight[0], n) for n in ("base", "index")): return False
    if m.bias is not None and m.bias.requires_grad: return False
    if isinstance(m, nn.Linear): return True
    square = all(isinstance(o, tuple) and len({*o}) == 1 for o in (m.stride, m.padding, m.kernel_size))
    return isinstance(m, nn.Conv2d) and m.padding_mode == "zeros" and m.groups == 1 and m.dilation == (1, 1) and square


def values_and_weight(m) -> tuple:
    "Of a layer: the values that train [n], the whole weight in the dtype in which it computes, and their index [n]."
    chosen, values = m.parametrizations.weight[0], m.parametrizations.weight.original
    rest = m.packs["weight"] if m.packs and m.packs["of"] is chosen.base else chosen.base
    weight = rest.flatten().scatter(0, chosen.index, values.detach().to(rest.dtype))
    return values, weight.view(chosen.base.shape), chosen.index


def pack_base(m) -> dict:
    "The entries that rest, in the dtype in which the layer computes and contiguous: a step need not convert them."
    base = m.parametrizations.weight[0].base
    return dict(of=base, weight=base.to(m.compute_dtype, memory_format=torch.contiguous_format))


@fx.wrap
def sparse_convolution(x, values, weight, index, bias, stride, padding, dtype, rival):
    "A convolution of whose weight the values [n] at `index` train, and are in it already."
    if weight.dtype not in (torch.float32, dtype): dtype = None
    x, bias = cast(dtype, x, bias)
    if dtype != x.dtype or not on_cpu(x, weight, bias):
        return ops.sparse_conv2d_reference(x, values, *cast(dtype, weight), index, bias, stride, padding)
    size = ops.output_size(x.shape[2:], weight.shape[2:], stride, padding)
    # another weight at every step, as where all of it trains
    how = ops.conv_algorithm(rival, weight.shape, True, stride, padding, (1, 1), 1, x.shape[0], size)
    return ops.sparse_conv2d(x, values, weight, index, bias, stride, padding, how)


@fx.wrap
def sparse_linear_layer(x, values, weight, index, bias, dtype):
    "The same of a linear layer."
    if weight.dtype not in (torch.float32, dtype): dtype = None
    x, bias = cast(dtype, x, bias)
    fits = dtype == x.dtype and x.numel() > 0 and all(t is None or t.device.type == "cpu" for t in (x, weight, bias))
    if not fits: return ops.sparse_linear_reference(x, values, *cast(dtype, weight), index, bias)
    return ops.sparse_linear(x.reshape(-1, x.shape[-1]), values, weight, index, bias).view(*x.shape[:-1], -1)
