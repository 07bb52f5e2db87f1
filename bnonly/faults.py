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


def safe_conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    "`F.conv2d` of images [N, C, H, W], with gradients that are right on a CPU too."
    if x.device.type != "cpu" or x.dim() != 4 or isinstance(padding, str) or pair(dilation) != (1, 1):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    strides, pads = pair(stride), pair(padding)
    if weight.shape[2:] == (1, 1) and pads == (0, 0):   # it uses one pixel in `stride`
        if strides != (1, 1): x = x[..., ::strides[0], ::strides[1]]
        return F.conv2d(x, weight, bias, groups=groups)
    for axis, s, p in zip((2, 3), strides, pads):
        n, k = x.shape[axis], weight.shape[axis]
        if not (n < s and 0 <= n + 2*p - k < s and p < k): continue
        used = min(n, k - p)   # of the pixels, and of the places of the weight: the others meet padding
        x, weight = x.narrow(axis, 0, used), weight.narrow(axis, p, used)
        strides, pads = [*strides], [*pads]
        strides[axis - 2], pads[axis - 2] = 1, 0
    return F.conv2d(x, weight, bias, strides, pads, 1, groups)
