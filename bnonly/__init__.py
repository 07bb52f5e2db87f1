"""Train BatchNorm and only BatchNorm: a literate study of what affine parameters can do with random features

Modules:

- `bnonly.cache`: Images that were decoded once, kept as one file of tensors which is mapped into memory at the next start.
- `bnonly.checkpoint`: What is kept of a run while it trains, and its record when it has ended.
- `bnonly.faults`: Convolutions around two faults of PyTorch 2.15.0 with oneDNN 3.13.3 on a CPU, which `tests/convolution_faults.py` found. Both are in the gradient of the weight.
- `bnonly.logs`: What training says: lines of the logger 'bnonly'.
- `bnonly.readers`: The published files of CIFAR-10, CIFAR-10.1, CIFAR-10-C, MNIST and SVHN as arrays.
- `bnonly.runlock`: The run lock: one process at a time works in the folder of a run, and one that lost its lock writes nothing more there.
- `bnonly.tiny_imagenet`: Tiny ImageNet: 200 classes of ImageNet at 64x64 pixels, 500 images of each to train on and 50 to test on.
- `bnonly.trackers`: Watching a run in TensorBoard or Weights & Biases, as $BNONLY_TRACK asks for it."""

__version__ = "0.1.0"
