"""The operators of convolutions by the compiled kernels, for weights that rest, that train, and of which a few entries
train."""
import ctypes

import torch
import torch.nn.functional as F

from .faults import around, part_of
from .native import Direct, Entry, kernels
from .packing import ONE, PACK_HEADER, pack_weight, packed_scale, phases
from .register import channels_last, count_flops, empty_channels_last, formula, operator, products, ptr, wanted

__all__ = ["output_size", "conv2d", "sparse_conv2d_reference", "sparse_conv2d", "sparse_linear_reference",
           "sparse_linear"]


# The convolution

def _convolve(x, weight, bias, packed, size, stride, padding, algorithm, back=False):   # size: of what comes out
    x, own, channels, threads = channels_last(x), kernels()[x.dtype], weight.shape[int(back)], torch.get_num_threads()
    if packed is None: packed = pack_weight(weight.to(x.dtype), algorithm, back, stride, padding)
    if bias is not None: bias = bias.to(x.dtype).contiguous()
    scale, u, C = packed_scale(packed), packed.data_ptr() + PACK_HEADER, x.shape[1]
    y, where = empty_channels_last(x, x.shape[0], channels, *size), (x.shape[0], *x.shape[2:], C)
    if algorithm == "winograd":
        own.winograd(x.data_ptr(), u, ptr(bias), y.data_ptr(), scale, *where, channels, threads)
        return y
    step, number = stride if back else 1, 2 if own.float16 else 4
    for p in phases(weight.shape[-1], stride, padding, back):
        h, w = ((n - first + step - 1)//step for n,first in zip(size, (p.row, p.column)))
        shape = Direct(*where, h, w, channels, p.A, p.E, 1 if back else stride, p.top, p.left, *size, step)
        to = y.data_ptr() + (p.row*size[1] + p.column)*channels*y.element_size()
        if h > 0 and w > 0: own.direct(x.data_ptr(), u, ptr(bias), to, scale, ctypes.byref(shape), threads)
        u += number*channels*p.A*(p.E*C + 1)
    return y


def output_size(size, kernel, stride, padding, dilation=ONE) -> list:
    "Rows and columns that a convolution gives."
    return [(n + 2*p - d*(k - 1) - 1)//s + 1 for n,k,s,p,d in zip(size, kernel, stride, padding, dilation)]


def _conv_compute(x, weight, bias, packed, packed_back, stride, padding, dilation, groups, algorithm, keep):
    if algorithm != "pytorch":
        size = output_size(x.shape[2:], weight.shape[2:], stride, padding)
        return _convolve(x, weight, bias, packed, size, stride[0], padding[0], algorithm)
    if bias is not None: bias = bias.to(x.dtype)
    return channels_last(F.conv2d(x, weight.to(x.dtype), bias, stride, padding, dilation, groups))


def _conv_fake(x, weight, bias, packed, packed_back, stride, padding, dilation, groups, algorithm, keep):
    size = output_size(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    return empty_channels_last(x, x.shape[0], weight.shape[0], *size)


def _conv_context(ctx, inputs, output):
    x, weight, bias, packed, packed_back, *ctx.how = inputs
    ctx.save_for_backward(wanted(x, ctx.needs_input_grad[1]), weight, packed_back)
    ctx.size = x.shape[2:]


def _conv_backward(ctx, dy):
    (x, weight, packed), needs = ctx.saved_tensors, ctx.needs_input_grad
    dx = _conv_input_gradient(dy, weight, packed, ctx.size, *ctx.how) if needs[0] else None
    dw = _conv_weight_gradient(dy, x, weight, *ctx.how) if needs[1] else None
    db = dy.sum((0, 2, 3)) if needs[2] else None
    return dx, dw, db, *(None,)*7


def _pytorch_gradients(dy, x, weight, stride, padding, dilation, groups, of):   # 0: of the input; 1: of the weight
    return torch.ops.aten.convolution_backward(dy, x, weight, None, stride, padding, dilation, False, [0, 0], groups,
                                               [i == of for i in range(3)])[of]


def _conv_input_compute(dy, weight, packed, size, stride, padding, dilation, groups, algorithm):
    if algorithm != "pytorch" and weight.shape[1] % 16 == 0:
        return _convolve(dy, weight, None, packed, size, stride[0], padding[0], algorithm, back=True)
    never_read = empty_channels_last(dy, dy.shape[0], weight.shape[1]*groups, *size)
    how = stride, padding, dilation, groups
    return channels_last(_pytorch_gradients(dy, never_read, weight.to(dy.dtype), *how, of=0))


def _conv_input_fake(dy, weight, packed, size, stride, padding, dilation, groups, algorithm):
    return empty_channels_last(dy, dy.shape[0], weight.shape[1]*groups, *size)


def _conv_weight_compute(dy, x, weight, stride, padding, dilation, groups, algorithm):
    dw = torch.empty_like(weight, dtype=torch.float32)
    if algorithm == "pytorch":
        places = [slice(None)]*2
        if (*dilation,) == ONE: x, places, stride, padding = around(x, weight.shape[2:], stride, padding)
        part, found = part_of(weight, places).to(x.dtype), part_of(dw, places)
        if found is not dw: dw.zero_()
        found.copy_(_pytorch_gradients(dy, x, part, stride, padding, dilation, groups, of=1))
        return dw
    x, dy, own, (O, C, K, _) = channels_last(x), channels_last(dy, x.dtype), kernels()[x.dtype], weight.shape
    at, where, threads = Entry(*dw.stride()), (x.shape[0], *x.shape[2:], C), torch.get_num_threads()
    given = x.data_ptr(), dy.data_ptr(), dw.data_ptr(), ctypes.byref(at)
    if algorithm == "winograd": own.winograd_gradient(*given, *where, O, threads)
    else: own.direct_gradient(*given, *where, *dy.shape[2:], O, K, stride[0], padding[0], threads)
    return dw


def _conv_weight_fake(dy, x, weight, stride, padding, dilation, groups, algorithm):
    return torch.empty_like(weight, dtype=torch.float32)


_HOW = "int[2] stride, int[2] padding, int[2] dilation, int groups, str algorithm"
_conv_input_gradient = operator(
    f"conv2d_input_gradient(Tensor dy, Tensor weight, Tensor? packed, SymInt[2] size, {_HOW}) -> Tensor",
    _conv_input_compute, _conv_input_fake)
_conv_weight_gradient = operator(
    f"conv2d_weight_gradient(Tensor dy, Tensor x, Tensor weight, {_HOW}) -> Tensor",
    _conv_weight_compute, _conv_weight_fake)
_conv = operator(
    f"conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? packed, Tensor? packed_back, {_HOW}) -> Tensor",
    _conv_compute, _conv_fake, formula(_conv_context, _conv_backward))


def conv2d(x, weight, bias=None, packed=None, packed_back=None, stride=ONE, padding=(0, 0), dilation=ONE, groups=1,
           algorithm="pytorch"):
    """`F.conv2d` of x [N, C, H, W] on the CPU by one of `ALGORITHMS`, in the dtype of x, keeping x only where the
    weight trains, whose gradient is float32. packed, packed_back: a frozen weight as `pack_weight` gives it."""
    return _conv(x, weight, bias, packed, packed_back, stride, padding, dilation, groups, algorithm)


# A few trainable entries of a weight

def _put(values, weight, index):
    return weight.detach().flatten().scatter(0, index, values.to(weight.dtype)).view_as(weight)


def sparse_conv2d_reference(x, values, weight, index, bias=None, stride=ONE, padding=(0, 0)):
    """A convolution whose weight [O, C, K, K] has values [n] at index [n] of its flattened entries: these alone get a
    gradient."""
    return F.conv2d(x, _put(values, weight, index), bias, stride, padding)


def sparse_linear_reference(x, values, weight, index, bias=None):
    "The same of a linear layer: x [N, C], weight [O, C]."
    return F.linear(x, _put(values, weight, index), bias)


def _entries_compute(dy, x, index, kernel, stride, padding):
    x, dy = channels_last(x), channels_last(dy, x.dtype)
    out = x.new_empty(len(index), dtype=torch.float32)
    sizes = x.shape[0], *x.shape[2:], x.shape[1], *dy.shape[2:], dy.shape[1]
    kernels()[x.dtype].entries(x.data_ptr(), dy.data_ptr(), index.data_ptr(), out.data_ptr(), len(index), *sizes,
                               kernel, stride, padding, torch.get_num_threads())
    return out


def _entries_fake(dy, x, index, kernel, stride, padding): return x.new_empty(index.shape[0], dtype=torch.float32)


_entries = operator(
    "sparse_weight_gradient(Tensor dy, Tensor x, Tensor index, int kernel, int stride, int padding) -> Tensor",
    _entries_compute, _entries_fake)


def _sparse_conv_compute(x, values, weight, index, bias, stride, padding, algorithm, keep):
    return _conv_compute(x, weight, bias, None, None, stride, padding, ONE, 1, algorithm, keep)


def _sparse_conv_fake(x, values, weight, index, bias, stride, padding, algorithm, keep):
    return _conv_fake(x, weight, bias, None, None, stride, padding, ONE, 1, algorithm, keep)


def _sparse_context(ctx, inputs, output):
    x, _, weight, index, _, *ctx.how = inputs
    ctx.save_for_backward(x, weight, index)


def _sparse_conv_backward(ctx, dy):
    (x, weight, index), (stride, padding, algorithm), need_x = ctx.saved_tensors, ctx.how, ctx.needs_input_grad[0]
    how = stride, padding, ONE, 1, algorithm
    dx = _conv_input_gradient(dy, weight, None, x.shape[2:], *how) if need_x else None
    return dx, _entries(dy, x, index, weight.shape[-1], stride[0], padding[0]), *(None,)*6


_sparse_conv = operator(
    "sparse_conv2d(Tensor x, Tensor values, Tensor weight, Tensor index, Tensor? bias, int[2] stride, int[2] padding, "
    "str algorithm) -> Tensor", _sparse_conv_compute, _sparse_conv_fake,
    formula(_sparse_context, _sparse_conv_backward))


def sparse_conv2d(x, values, weight, index, bias=None, stride=ONE, padding=(0, 0), algorithm="pytorch"):
    "`sparse_conv2d_reference` on the CPU, of a weight that holds the values already, and a bias that does not train."
    return _sparse_conv(x, values, weight, index, bias, stride, padding, algorithm)


def _sparse_linear_compute(x, values, weight, index, bias, keep):
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _sparse_linear_fake(x, values, weight, index, bias, keep): return x.new_empty(x.shape[0], weight.shape[0])


def _sparse_linear_backward(ctx, dy):
    x, weight, index = ctx.saved_tensors
    def image(t): return t.t()[None, :, None]   # of one row, a pixel for each input
    dx = dy @ weight.to(dy.dtype) if ctx.needs_input_grad[0] else None
    return dx, _entries(image(dy), image(x), index, 1, 1, 0), None, None, None


_sparse_linear = operator(
    "sparse_linear(Tensor x, Tensor values, Tensor weight, Tensor index, Tensor? bias) -> Tensor",
    _sparse_linear_compute, _sparse_linear_fake, formula(_sparse_context, _sparse_linear_backward))


def sparse_linear(x, values, weight, index, bias=None):
    "`sparse_linear_reference` on the CPU, of a weight that holds the values already, and a bias that does not train."
    return _sparse_linear(x, values, weight, index, bias)


# What the FLOP counter counts: as for PyTorch's own operators

@count_flops("conv2d", "conv2d_forward")
def _(x, weight, *_, out_shape=None, **__): return products(out_shape, weight)


@count_flops("sparse_conv2d", "sparse_conv2d_forward", "sparse_linear", "sparse_linear_forward")
def _(x, values, weight, *_, out_shape=None, **__): return products(out_shape, weight)


@count_flops("conv2d_input_gradient")
def _(dy, weight, *_, **__): return products(dy, weight)


@count_flops("conv2d_weight_gradient")
def _(dy, x, weight, *_, **__): return products(dy, weight)


@count_flops("sparse_weight_gradient")
def _(dy, x, index, *_, **__): return products(dy, (0, *index))//dy[1]
