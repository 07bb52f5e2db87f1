"""Convolutions around two faults of PyTorch 2.15.0 with oneDNN 3.13.3 on a CPU, which `tests/convolution_faults.py`
found. Both are in the gradient of the weight.

1. Of a 1x1 convolution with a stride, of channels-last images with fewer than 16 channels (with AVX2: fewer than 8):
   oneDNN writes past its scratch memory. The heap is damaged, the gradient is wrong, or the threads wait for ever.
   See https://github.com/uxlfoundation/oneDNN/issues/6035
2. In bfloat16, of images that are narrower than the stride and have one column of output: some places of the gradient
   hold whatever the memory held before. With padding these are places of the weight that meet padding alone; a 1x1
   convolution of fewer than 16 channels has them too.
"""
import torch.nn.functional as F


def pair(n) -> tuple:
    "An option of a convolution, for rows and columns."
    return tuple(n) if isinstance(n, (tuple, list)) else (n, n)


def around(x, kernel, stride, padding) -> tuple:
    """The same convolution away from both faults: the pixels of x [N, C, H, W] that are read, which rows and columns of
    the weight [O, C, *kernel] meet them (two slices), stride and padding."""
    strides, pads, places = [*stride], [*padding], [slice(None), slice(None)]
    if (*kernel,) == (1, 1) and pads == [0, 0]:   # it uses one pixel in `stride`
        return x if strides == [1, 1] else x[..., ::strides[0], ::strides[1]], places, [1, 1], pads
    for axis, s, p in zip((2, 3), stride, padding):
        n, k = x.shape[axis], kernel[axis - 2]
        if not (n < s and 0 <= n + 2*p - k < s and p < k): continue
        used = min(n, k - p)   # of the pixels, and of the places of the weight: the others meet padding
        x, places[axis - 2] = x.narrow(axis, 0, used), slice(p, p + used)
        strides[axis - 2], pads[axis - 2] = 1, 0
    return x, places, strides, pads


def part_of(weight, places):
    "Some rows and columns of a weight; itself where they are all."
    return weight if places == [slice(None)]*2 else weight[..., places[0], places[1]]


def safe_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    "`F.conv2d` of images [N, C, H, W], with gradients that are right on a CPU too."
    if x.device.type != "cpu" or x.dim() != 4 or isinstance(padding, str) or pair(dilation) != (1, 1):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    x, places, strides, pads = around(x, weight.shape[2:], pair(stride), pair(padding))
    return F.conv2d(x, part_of(weight, places), bias, strides, pads, 1, groups)
