"""How an operator is made known to PyTorch: `torch.library`, with a formula for its gradient."""
import math
from functools import partial

import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .packing import DTYPES

__all__ = ["OPERATORS", "operator", "formula", "count_flops"]

OPERATORS = {}   # name to the operator, as torch.ops.bnonly has it; some are parts of others

lib = torch.library.Library("bnonly", "DEF")


def operator(schema:str, compute, fake, autograd=None):
    """Define and register an operator: `compute` runs on CPU tensors, `fake` on tensors without numbers. With
    `autograd`, as `formula` makes it, both have a last argument `keep`: whether a backward pass follows.

    `torch.library.register_autograd` would do the same, but takes more time at each call.
    """
    def define(name, signature, compute, fake):
        lib.define(f"{name}({signature}")
        lib.impl(name, compute, "CPU")
        torch.library.register_fake(f"bnonly::{name}", fake, lib=lib)
        OPERATORS[name] = op = getattr(torch.ops.bnonly, name).default
        return op
    name, _, signature = schema.partition("(")
    if autograd is None: return define(name, signature, compute, fake)
    below = define(f"{name}_forward", signature.replace(") ->", ", bool keep) ->"), compute, fake)
    op = define(name, signature, partial(compute, keep=False), partial(fake, keep=False))
    lib.impl(name, autograd(below), "Autograd")
    return op


def formula(setup_context, backward):
    "For `operator`: what `setup_context(ctx, inputs, output)` keeps, `backward(ctx, *gradients)` uses."
    def autograd(op):
        class Operator(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                output = op(*inputs, True)
                setup_context(ctx, inputs, output)
                return output

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, *gradients): return backward(ctx, *gradients)
        def differentiated(inputs): return needs_grad(inputs) or has_tangent(inputs)
        return lambda *inputs: Operator.apply(*inputs) if differentiated(inputs) else op(*inputs, False)
    return autograd


def needs_grad(inputs) -> bool:
    "Whether autograd will ask for the gradient of one of these."
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in inputs)


def has_tangent(inputs) -> bool:
    "Whether one of these is differentiated forward, which the operators have no formula for: PyTorch then says so."
    return any(isinstance(t, torch.Tensor) and forward_ad.unpack_dual(t).tangent is not None for t in inputs)


def count_flops(*names):
    "What the FLOP counter counts for operators: a function of the shapes of their arguments."
    return register_flop_formula([getattr(torch.ops.bnonly, n) for n in names])


def products(dy, weight) -> int:
    "Products and sums of a convolution or linear layer, by the shapes of its outputs and its weight."
    return 2*math.prod(dy)*math.prod(weight[1:])


# What operators share

def ptr(t): return None if t is None else t.data_ptr()
def wanted(t, needed): return t if needed else None


def channels_last(t, dtype=None):
    "A tensor as the kernels read it, in `dtype` or its own."
    return t.to(dtype or t.dtype).contiguous(memory_format=torch.channels_last)


def empty_channels_last(like, *shape):
    "A tensor of this shape, channels last, with the dtype and device of another."
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def cast(dtype, *tensors):
    "Tensors of float32 or bfloat16 in the dtype in which a layer computes; others stay what they are."
    return [t if t is None or dtype is None or t.dtype not in DTYPES else t.to(dtype) for t in tensors]


def on_cpu(x, *parameters) -> bool:   # images and parameters of a layer
    return x.dim() == 4 and x.numel() > 0 and all(t is None or t.device.type == "cpu" for t in (x, *parameters))
