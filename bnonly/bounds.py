"""How fast a training step could be, by the rates at which a machine multiplies matrices and copies memory.

Two things bound a step: the multiplications of the convolutions, and the bytes of the activations. BatchNorm with ReLU
reads its input twice and writes its output once; backward it reads input and gradient twice and writes a gradient. A
residual adds one read and one write. No step can be faster than both in turn, unless they overlap.
"""
import time

import torch

from . import ops
from .layers import BatchNormAct
from .machine import default_device
from .models import create_model
from .policies import freeze
from .sparse import has_sparse_weight


def peak_rates(dtype:torch.dtype) -> tuple:   # multiply-adds times two a second; bytes a second
    "What the machine does at best: matrix products, and copies."
    device = default_device()
    def best(f, work, n=7):
        times = []
        for _ in range(n):
            start = time.perf_counter()
            f()
            if device.type == "cuda": torch.cuda.synchronize()
            times.append(time.perf_counter()-start)
        return work/min(times)
    a, b = torch.randn(2048, 2048, dtype=dtype, device=device), torch.randn(2**24, device=device)
    c = torch.empty_like(b)
    return best(lambda: a@a, 2*2048**3), best(lambda: c.copy_(b), 2*b.nbytes)


class Count:
    "Hooks that count, while a network runs, the numbers that it moves and the operations that our kernels spare."
    def __init__(self, batch, dtype):
        self.moved, self.spared, self.batch, self.rival = 0, 0, batch, ops.rival(dtype)

    def move(self, m, args, out): self.moved += out.numel() * (8 + 2*(len(args) > 1))

    def sparse(self, m, args, out):
        "PyTorch's gradient of a whole weight, but for the few entries that train."
        whole, entries = m.parametrizations.weight[0].base, m.parametrizations.weight.original
        self.spared += 2 * out.numel()//out.shape[1] * (whole.numel() - entries.numel())

    def tile(self, m, args, out):
        "Winograd's tiles, forward and backward to the input and to a weight that trains: 36 products for 16 outputs."
        (H, W), whole = out.shape[2:], 2*out.numel()*m.weight[0].numel()
        weight = m.parametrizations.weight[0].base if has_sparse_weight(m) else m.weight
        algorithm = ops.conv_algorithm(self.rival, weight.shape, weight.requires_grad, m.stride, m.padding, m.dilation,
                                       m.groups, self.batch, (H, W))
        if algorithm != "winograd": return
        tiles = -(-H//4) * -(-W//4)
        self.spared += (1 + args[0].requires_grad + weight.requires_grad) * (whole - whole//(9*H*W) * 36 * tiles)


def work(arch, policy, batch=128, dtype=torch.float32) -> tuple:   # floating-point operations, numbers moved
    """What one step has to compute and to move.

    Products go by Winograd's tiles where numbers of this kind have any: in float32, or in float16 where the processor
    multiplies that faster.
    """
    from torch.utils.flop_counter import FlopCounterMode
    model, count = freeze(create_model(arch), policy), Count(batch, dtype)
    for m in model.modules():
        if isinstance(m, BatchNormAct): m.register_forward_hook(count.move)
        if has_sparse_weight(m): m.register_forward_hook(count.sparse)
        if default_device().type == "cpu" and isinstance(m, torch.nn.Conv2d): m.register_forward_hook(count.tile)
    with FlopCounterMode(display=False) as flops:
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    return (flops.get_total_flops() - count.spared) * batch/2, count.moved * batch/2
