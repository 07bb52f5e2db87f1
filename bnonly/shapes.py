"""The shapes of the networks, said once: blocks and channels of each stage, and how many numbers that makes.

Figures count parameters by it and need no PyTorch; `bnonly.models` builds networks from it; a test holds one against
the other. A convolution counts its weights, and gamma and beta of each output channel; VGG's have a bias besides.
"""
from .experiment import parse_arch

__all__ = ["BLOCKS", "CIFAR_CHANNELS", "IMAGENET_CHANNELS", "VGG_CHANNELS", "VGG_LAYERS", "scaled", "convolutions",
           "sizes"]

# ImageNet's, by depth
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 200: (3, 24, 36, 3)}
IMAGENET_CHANNELS = 64, 128, 256, 512
CIFAR_CHANNELS = 16, 32, 64
VGG_CHANNELS = 64, 128, 256, 512, 512
# between poolings, by depth
VGG_LAYERS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


def scaled(width: float) -> list:
    "The channels of the stages of a CIFAR network of some width."
    return [max(1, int(c*width)) for c in CIFAR_CHANNELS]


def _vgg(depth, channels):
    for n, c in zip(VGG_LAYERS[depth], VGG_CHANNELS):
        for _ in range(n):
            yield "conv", channels*c*9 + c, c
            channels = c


def _resnet(blocks, stages, stem, channels, bottleneck):
    yield "conv", channels*stages[0]*stem**2, stages[0]
    c_in = stages[0]
    for i, (n, c) in enumerate(zip(blocks, stages)):
        for j in range(n):
            kernels = [(c_in, c, 1), (c, c, 9), (c, 4*c, 1)] if bottleneck else [(c_in, c, 9), (c, c, 9)]
            for a, b, k in kernels: yield "conv", a*b*k, b
            if j == 0 and (i > 0 or c_in != b): yield "shortcut", c_in*b, b
            c_in = b


def convolutions(arch: str, channels: int = 3) -> list:   # of (role, weights, output channels)
    "The convolutions of a CIFAR or ImageNet ResNet or a VGG, for images of so many channels."
    family, depth, width = parse_arch(arch)
    if family == "vgg": return list(_vgg(depth, channels))
    if family == "imagenet": return list(_resnet(BLOCKS[depth], IMAGENET_CHANNELS, 7, channels, depth >= 50))
    return list(_resnet([(depth - 2)//6]*3, scaled(width), 3, channels, False))


def sizes(arch: str, classes: int = 10, channels: int = 3) -> dict:   # role to count, and the total
    "How many numbers each part of a network has, without building it."
    layers = convolutions(arch, channels)

    def part(role): return sum(weights for r, weights, _ in layers if r == role)
    counts = dict(bn=2*sum(out for *_, out in layers), output=(layers[-1][2] + 1)*classes,
                  shortcut=part("shortcut"), conv=part("conv"))
    return dict(total=sum(counts.values()), **counts)
