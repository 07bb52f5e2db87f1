"""The operators of the networks on a CPU: their definitions in PyTorch, and the compiled kernels that compute the same.

An operator takes float32 and bfloat16 on the CPU. Autograd, `torch.compile`, `torch.export` and the FLOP counter see it
as they see PyTorch's own. The layers of `bnonly.layers` call it where it takes what they have, and else its definition,
which is named `reference` here.
"""
import ctypes

import torch
import torch.nn.functional as F

from .convolutions import (conv2d, output_size, sparse_conv2d, sparse_conv2d_reference, sparse_linear,
                           sparse_linear_reference)
from .native import Entry, Layer, Norm, kernels
from .packing import ALGORITHMS, DTYPES, PACK_HEADER, conv_algorithm, pack_weight, packed_scale, rival
from .register import (OPERATORS, channels_last, count_flops, empty_channels_last, formula, needs_grad, operator,
                       products, ptr, wanted)

__all__ = ["ALGORITHMS", "DTYPES", "OPERATORS", "batch_norm_act_reference", "batch_norm_act", "max_pool2d",
           "basic_blocks_reference", "basic_blocks", "conv2d", "conv_algorithm", "output_size", "pack_weight", "rival",
           "sparse_conv2d", "sparse_conv2d_reference", "sparse_linear", "sparse_linear_reference"]


# BatchNorm, residual and ReLU

def batch_norm_act_reference(x, residual=None, weight=None, bias=None, running_mean=None, running_var=None,
                             training=True, momentum=.1, eps=1e-5, relu=True):
    "relu(batch_norm(x) + residual); x and residual [N, C, H, W], the others [C]."
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None: y = y + residual
    return F.relu(y) if relu else y


def _norm(weight, bias, statistics, running, eps=0., grads=(None, None)):   # running: pointers; None: where to put them
    at, row = statistics.data_ptr(), 4*statistics.shape[-1]
    return Norm(ptr(weight), ptr(bias), *(running or (at, at + 2*row)), at, at + row, *map(ptr, grads), 1, eps)


def _mask(x, residual, relu, keep):   # a bit for each number
    return x.new_empty((x.numel() + 15)//16*2 if keep and relu and residual is not None else 0, dtype=torch.uint8)


def _norm_compute(x, residual, weight, bias, mean, var, eps, relu, keep):
    x, C = channels_last(x), x.shape[1]
    if residual is not None: residual = channels_last(residual)
    y, statistics, mask = torch.empty_like(x), x.new_zeros(3, C, dtype=torch.float32), _mask(x, residual, relu, keep)
    norm = _norm(weight, bias, statistics, None if mean is None else (mean.data_ptr(), var.data_ptr()), eps)
    kernels()[x.dtype].forward(x.data_ptr(), ptr(residual), y.data_ptr(), mask.data_ptr() or None, ctypes.byref(norm),
                               x.numel()//C, C, mean is None, relu, torch.get_num_threads())
    return y, statistics, mask


def _norm_fake(x, residual, weight, bias, mean, var, eps, relu, keep):
    statistics = x.new_empty(3, x.shape[1], dtype=torch.float32)
    return empty_channels_last(x, *x.shape), statistics, _mask(x, residual, relu, keep)


def _norm_context(ctx, inputs, output):
    x, _, weight, bias, mean, _, _, relu = inputs
    _, statistics, mask = output
    ctx.mark_non_differentiable(statistics, mask)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, statistics, mask)
    ctx.training, ctx.relu = mean is None, relu


def _norm_backward(ctx, dy, *_):
    if dy is None: return (None,)*8
    needs, relu = ctx.needs_input_grad, ctx.relu
    dx, dr, dw, db = _norm_gradients(dy, *ctx.saved_tensors, ctx.training, relu,
                                     [needs[0], needs[1] and relu, needs[2], needs[3]])
    dr = dr if relu else dy
    return *(wanted(t, need) for t,need in zip((dx, dr, dw, db), needs)), *(None,)*4


def _norm_gradients_outputs(x, statistics, needs):   # dx, the gradient of the residual, dweight, dbias
    C = x.shape[1]
    return (*(empty_channels_last(x, *x.shape) if n else x.new_empty(0) for n in needs[:2]),
            *(statistics.new_empty(C if n else 0) for n in needs[2:]))


def _norm_gradients_compute(dy, x, weight, bias, statistics, mask, training, relu, needs):
    x, C = channels_last(x), x.shape[1]
    dy, found = channels_last(dy, x.dtype), _norm_gradients_outputs(x, statistics, needs)
    dx, dr, *grads = map(wanted, found, needs)
    norm = _norm(weight, bias, statistics, (None, None), 0, grads)
    kernels()[x.dtype].backward(dy.data_ptr(), x.data_ptr(), mask.data_ptr() or None, ptr(dx), ptr(dr),
                                ctypes.byref(norm), x.numel()//C, C, training, relu, torch.get_num_threads())
    return found


def _norm_gradients_fake(dy, x, weight, bias, statistics, mask, training, relu, needs):
    return _norm_gradients_outputs(x, statistics, needs)


_norm_gradients = operator(
    "batch_norm_act_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, Tensor mask, "
    "bool training, bool relu, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _norm_gradients_compute, _norm_gradients_fake)
_norm_act = operator(
    "batch_norm_act(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, float eps, "
    "bool relu) -> (Tensor y, Tensor statistics, Tensor mask)",
    _norm_compute, _norm_fake, formula(_norm_context, _norm_backward))


def _of_channels(t, x):   # a parameter or statistic that the kernels read
    return t.dtype == torch.float32 and t.device == x.device and t.is_contiguous() and t.shape == x.shape[1:2]


def _takes_norm(x, residual, running, affine, training) -> bool:
    if x.device.type != "cpu" or x.dtype not in DTYPES or x.dim() != 4: return False
    if x.stride(1) != 1 or x.numel() <= x.shape[1]: return False   # not channels last, or one value a channel
    if residual is not None and (residual.shape != x.shape or residual.device != x.device): return False
    if (absent := sum(t is None for t in running)) == 1 or absent and not training: return False
    return all(t is None or _of_channels(t, x) for t in (*running, *affine))


def batch_norm_act(x, residual=None, weight=None, bias=None, running_mean=None, running_var=None,
                   training=True, momentum=.1, eps=1e-5, relu=True):
    "`batch_norm_act_reference` in one pass over x, keeping only x and, behind a residual, a bit for each number."
    running, affine = (running_mean, running_var), (weight, bias)
    if not _takes_norm(x, residual, running, affine, training):
        return batch_norm_act_reference(x, residual, *affine, *running, training, momentum, eps, relu)
    if residual is not None: residual = residual.to(x.dtype)
    y, statistics, _ = _norm_act(x, residual, *affine, *((None, None) if training else running), eps, relu)
    if training and running_mean is not None: update_statistics(*running, *statistics.unbind(), momentum)
    return y


def update_statistics(running_mean, running_var, mean, _, var, momentum):
    "Let the running statistics follow those of a batch: mean, 1 / sigma, unbiased variance, [C] each."
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var, momentum)


# Max-pooling

def _pool_compute(x, kernel, stride, padding, dilation, ceil_mode, keep):
    y, where = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
    return y, where.int()


def _pool_context(ctx, inputs, output):
    x, *ctx.how = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[1])
    ctx.shape = x.shape


def _pool_backward(ctx, dy, _):
    if dy is None: return (None,)*6
    dy, never_read, where = channels_last(dy), empty_channels_last(dy, *ctx.shape), ctx.saved_tensors[0].long()
    return torch.ops.aten.max_pool2d_with_indices_backward(dy, never_read, *ctx.how, where), *(None,)*5


_pool = operator(
    "max_pool2d(Tensor x, int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, bool ceil_mode) "
    "-> (Tensor, Tensor)", _pool_compute, _pool_compute, formula(_pool_context, _pool_backward))


def max_pool2d(x, kernel, stride, padding=(0, 0), dilation=(1, 1), ceil_mode=False):
    "`F.max_pool2d` on the CPU, which keeps where each maximum was, and not its input."
    return _pool(x, kernel, stride, padding, dilation, ceil_mode)[0]


# Basic blocks of a stage, in training

def basic_blocks_reference(x, affine, weights, running, momenta, eps):
    """relu(bn(conv(relu(bn(conv(x))))) + x), several times; of each layer gamma and beta, the weight [C, C, 3, 3], and
    running mean and variance, one after the other."""
    for i in range(0, len(weights), 2):
        y = x
        for k,residual in ((i, None), (i + 1, x)):
            z, own = F.conv2d(y, weights[k].to(x.dtype), padding=1), slice(2*k, 2*k + 2)
            y = batch_norm_act_reference(z, residual, *affine[own], *running[own], True, momenta[k], eps[k])
        x = y
    return x


def _layers(z, statistics, affine, eps, packed, masks, inputs, grads=None, dws=None):   # as blocks.h has them
    n, layer, forward = len(statistics), z.shape[1]*z.element_size(), grads is None
    layers, dws = (Layer*n)(), dws or {}
    for i in range(n):
        own, dw = slice(2*i, 2*i + 2), dws.get(i)
        mask = masks[i//2].data_ptr() if i % 2 and masks.numel() else None
        norm = (_norm(*affine[own], statistics[i], None, eps[i]) if forward else
                _norm(*affine[own], statistics[i], (None, None), 0, grads[own]))
        layers[i] = Layer(packed[i].data_ptr() + PACK_HEADER, packed_scale(packed[i]), z.data_ptr() + i % len(z)*layer,
                          inputs.get(i), ptr(dw), Entry(*(() if dw is None else dw.stride())), mask, norm)
    return layers


def _run(kernel, reads, writes, buffers, layers):
    workspace, (N, C, H, W) = reads.new_empty(buffers, reads.numel()), reads.shape
    kernel(reads.data_ptr(), ptr(writes), workspace.data_ptr(), layers, len(layers), N, H, W, C,
           torch.get_num_threads())


def _blocks_outputs(x, n, trains, keep):
    # y, what the convolutions gave, statistics, masks, what those that train read
    read, size, statistics = sum(keep and t for t in trains[1:]), x.numel(), (n, 3, x.shape[1])
    return (empty_channels_last(x, *x.shape), x.new_empty(n if keep else 2, size),
            x.new_zeros(statistics, dtype=torch.float32),
            x.new_zeros(n//2 if keep else 0, size//8, dtype=torch.uint8), x.new_empty(read, size))


def _blocks_compute(x, affine, weights, packed, eps, trains, keep):
    x, n = channels_last(x), len(weights)
    packed = packed[:n] or [pack_weight(w.to(x.dtype), "winograd") for w in weights]
    y, z, statistics, masks, read = found = _blocks_outputs(x, n, trains, keep)
    at = {i: t.data_ptr() for i,t in zip((i for i in range(1, n) if trains[i]), read)}
    _run(kernels()[x.dtype].blocks_forward, x, y, 2, _layers(z, statistics, affine, eps, packed, masks, at))
    return found


def _blocks_fake(x, affine, weights, packed, eps, trains, keep): return _blocks_outputs(x, len(weights), trains, keep)


def _blocks_autograd(op):
    class Blocks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, packed, eps, trains, *parameters):   # affine, then weights
            n = ctx.n = len(trains)
            affine, weights, ctx.trains, ctx.packed = parameters[:2*n], parameters[2*n:], trains, bool(packed)
            y, *rest = op(x, affine, weights, packed, eps, trains, True)
            ctx.mark_non_differentiable(*rest)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(wanted(x, trains[0]), *rest, *affine, *(packed[n:] or weights))
            return y, *rest

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy, *_):
            needs, (x, *kept), n = ctx.needs_input_grad, ctx.saved_tensors, ctx.n
            if dy is None: return (None,)*len(needs)
            affine, weights = kept[4:4 + 2*n], kept[4 + 2*n:]
            dx, grads, dws = _blocks_gradients(dy, x, *kept[:4], affine, weights, ctx.packed, ctx.trains, needs[0],
                                               [*needs[4:4 + 2*n]])
            dws = iter(dws.unbind())
            return (wanted(dx, needs[0]), *(None,)*3, *map(wanted, grads.unbind(), needs[4:]),
                    *(next(dws) if t else None for t in ctx.trains))

    def autograd(x, affine, weights, packed, eps, trains):
        if not needs_grad((x, *affine, *weights)): return op(x, affine, weights, packed, eps, trains, False)
        return Blocks.apply(x, packed, eps, trains, *affine, *weights)
    return autograd


def _blocks_gradients_outputs(dy, n, need_x, trains):
    k, C = sum(trains), dy.shape[1]
    dws = torch.empty(k*C, C, 3, 3, dtype=torch.float32, device=dy.device, memory_format=torch.channels_last)
    dx = empty_channels_last(dy, *dy.shape) if need_x else dy.new_empty(0)
    grads = dy.new_empty(2*n, C, dtype=torch.float32)
    return dx, grads, dws.view(k, C, C, 3, 3)


def _blocks_gradients_compute(dy, x, z, statistics, masks, read, affine, weights, packed, trains, need_x, needs):
    dy, training = channels_last(dy, z.dtype), [i for i,t in enumerate(trains) if t]
    if not packed: weights = [pack_weight(w.to(z.dtype), "winograd", back=True) for w in weights]
    dx, grads, dws = found = _blocks_gradients_outputs(dy, len(z), need_x, trains)
    if x is not None: x = channels_last(x, z.dtype)
    at = dict(zip([i for i in training if i], (t.data_ptr() for t in read))) | ({0: x.data_ptr()} if trains[0] else {})
    grads = [wanted(g, need) for g,need in zip(grads, needs)]
    layers = _layers(z, statistics, affine, None, weights, masks, at, grads, dict(zip(training, dws)))
    _run(kernels()[z.dtype].blocks_backward, dy, wanted(dx, need_x), 4 if training else 3, layers)
    return found


def _blocks_gradients_fake(dy, x, z, statistics, masks, read, affine, weights, packed, trains, need_x, needs):
    return _blocks_gradients_outputs(dy.to(z.dtype), len(trains), need_x, trains)


_blocks_gradients = operator(
    "basic_blocks_backward(Tensor dy, Tensor? x, Tensor z, Tensor statistics, Tensor masks, Tensor read, "
    "Tensor[] affine, Tensor[] weights, bool packed, bool[] trains, bool need_x, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
    _blocks_gradients_compute, _blocks_gradients_fake)
_blocks = operator(
    "basic_blocks(Tensor x, Tensor[] affine, Tensor[] weights, Tensor[] packed, float[] eps, bool[] trains) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)", _blocks_compute, _blocks_fake, _blocks_autograd)


def basic_blocks(x, affine, weights, running, momenta, eps, packed=()):
    """`basic_blocks_reference` on the CPU in one operator, by Winograd's tiles. packed: of frozen weights all that
    `pack_weight` gives forward, then all backward. Kept: outputs of convolutions, inputs of those that train, masks."""
    y, _, statistics, *_ = _blocks(x, affine, weights, packed, eps, [w.requires_grad for w in weights])
    rows = statistics.flatten(0, 1).unbind()
    for i,momentum in enumerate(momenta): update_statistics(*running[2*i:2*i + 2], *rows[3*i:3*i + 3], momentum)
    return y


@count_flops("basic_blocks", "basic_blocks_forward")
def _(x, affine, weights, *_, **__): return sum(products(x, w) for w in weights)


@count_flops("basic_blocks_backward")
def _(dy, x, z, statistics, masks, read, affine, weights, packed, trains, need_x, *_, **__):
    return products(dy, (0, dy[1], 3, 3)) * (len(trains) - (not need_x) + sum(trains))
