"""Convolutions around two faults of PyTorch 2.15.0 with oneDNN 3.13.3 on a CPU, found by `tests/convolution_faults.py`.

1. The gradient of the weight of a strided 1x1 convolution of channels-last images with fewer than 16 channels (8 with AVX2):
   oneDNN writes past its scratch memory. The heap is corrupted, the gradient is wrong, or the threads wait for ever.
   https://github.com/uxlfoundation/oneDNN/issues/6035
2. The gradient of a weight in bfloat16: oneDNN writes nothing at places of the weight that meet padding alone.
"""
import torch.nn.functional as F


def pair(n) -> tuple:
    "An option of a convolution, for rows and columns."
    return tuple(n) if isinstance(n, (tuple, list)) else (n, n)


def conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    "`F.conv2d` with the same result, and with gradients that are right."
    strides = pair(stride)
    if weight.shape[2:] == (1, 1) and strides != (1, 1) and padding in (0, (0, 0), [0, 0], "valid"):
        return F.conv2d(x[..., ::strides[0], ::strides[1]], weight, bias, groups=groups)   # it uses no other pixels
    return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
