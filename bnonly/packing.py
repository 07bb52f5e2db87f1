"""Which algorithm computes a convolution fastest, and how a weight is packed for it."""
import ctypes
from itertools import product
from typing import NamedTuple

import torch

from .native import Entry, kernels, pytorch_convolves_bfloat16

__all__ = ["DTYPES", "ALGORITHMS", "ONE", "PACK_HEADER", "rival", "conv_algorithm", "Phase", "phases",
           "pack_weight", "packed_scale"]

DTYPES = torch.float32, torch.bfloat16
ALGORITHMS = "winograd", "direct", "pytorch"
ONE = (1, 1)


def rival(dtype) -> str:
    """Which convolutions PyTorch computes faster than the kernels, which is measured (`bnonly bench --kernels`): in
    float32 none whose images have at least four pixels ('float32'), in bfloat16 'none', 'direct' or 'all'."""
    if kernels() is None or dtype not in DTYPES: return "all"
    return pytorch_convolves_bfloat16() if dtype == torch.bfloat16 else "float32"


def conv_algorithm(rival:str, shape, trains:bool, stride, padding, dilation, groups, images=None, size=None) -> str:
    """Which of `ALGORITHMS` computes a convolution of a weight of this shape fastest, as measured; images and size: how
    many, and rows and columns of the outputs (None: many and large)."""
    O, C, *kernel = shape
    square = len({*kernel}) == len({*stride}) == len({*padding}) == 1
    if rival == "all" or O % 16 or O == 0 or groups != 1 or tuple(dilation) != ONE or not square: return "pytorch"
    if size and min(size) == 1 < kernel[0]: return "pytorch"   # which leaves out the border
    direct = "direct" if rival == "none" else "pytorch"
    if C % 16 or (kernel[0], stride[0], padding[0]) != (3, 1, 1): return direct
    if not size: return "winograd"
    tiles = -(-size[0]//4) * -(-size[1]//4)
    empty = size[0]*size[1] <= 4*tiles   # mostly: as many products as without tiles
    least = 64 if rival == "none" else max(64, O//2)   # tiles that repay a transform of the weight at every step
    few = trains and (empty or images*tiles < least)
    return direct if few or empty and rival != "float32" else "winograd"


# Packed weights

class Phase(NamedTuple):
    """A direct convolution: A x E taps of a weight from `tap`; where it begins to read, before the first of what it
    reads; and the first row and column that it gives."""
    A: int
    E: int
    tap: tuple
    top: int
    left: int
    row: int
    column: int


def phases(K:int, stride:int, padding:int, back:bool=False) -> list[Phase]:
    "The direct convolutions that a convolution of KxK taps, or with `back` the gradient of its input, is made of."
    lines = [(K, 0, padding, 0)]   # taps, the first, what lies before, the first row
    if back:
        # input p = stride i + first is read by output i + (first + padding - k)/stride at tap k, if that is whole
        met = [[k for k in reversed(range(K)) if (first + padding - k) % stride == 0] for first in range(stride)]
        starts = [(ks[0], (ks[0] - first - padding)//stride) if ks else (0, 0) for first,ks in enumerate(met)]
        lines = [(len(ks), *start, first) for first,(ks, start) in enumerate(zip(met, starts))]
    return [Phase(A, E, (k, l), top, left, row, column)
            for (A, k, top, row),(E, l, left, column) in product(lines, lines)]


PACK_HEADER = 64   # bytes before a packed weight; the first four are the float32 by which to multiply its numbers


def pack_weight(weight, algorithm:str, back:bool=False, stride:int=1, padding:int=1) -> torch.Tensor:
    """A weight [O, C, K, K] in the order in which a kernel reads it, forward or for the gradient of the input: uint8,
    with a `PACK_HEADER`; for Winograd [36, O/16, C, 16], else [O/16, A, E*C, 16] for each phase."""
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        weight = weight.contiguous()
    (o, c, a, e), own, start = weight.stride(), kernels()[weight.dtype], weight.data_ptr()
    O, C, step = (weight.shape[1], weight.shape[0], -stride) if back else (*weight.shape[:2], 1)
    if O % 16:
        nearest = max(16, round(O/16)*16)
        raise ValueError(f"a kernel computes a multiple of 16 channels, not {O}; the nearest is {nearest}.")
    number, at = 2 if own.float16 else 4, Entry(*((c, o) if back else (o, c)), a*step, e*step)
    if algorithm == "winograd": parts = [(own.pack_winograd, (2, 2) if back else (0, 0), 36*O*C, ())]
    else:
        parts = [(own.pack_direct, p.tap, O*p.A*(p.E*C + 1), (p.A, p.E))
                 for p in phases(weight.shape[-1], stride, padding, back)]
    packed = torch.empty(PACK_HEADER + number*sum(n for _,_,n,_ in parts), dtype=torch.uint8)
    to = packed.data_ptr() + PACK_HEADER
    for call,(k, l),n,sizes in parts:
        first = start + (k*a + l*e)*weight.element_size()
        scale = call(start, weight.numel(), first, ctypes.byref(at), to, O, C, *sizes, torch.get_num_threads())
        to += number*n
    ctypes.c_float.from_address(packed.data_ptr()).value = scale
    return packed


def packed_scale(packed) -> float:
    "What the numbers of a packed weight are to be multiplied by."
    return ctypes.c_float.from_address(packed.data_ptr()).value
