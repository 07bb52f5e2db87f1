"""Train BatchNorm and only BatchNorm: a literate study of what affine parameters can do with random features

Modules:

- `bnonly.adapters`: Policies as adapters of peft, and back: `LNTuningConfig` copies normalizations, `modules_to_save` the output layer.
- `bnonly.cache`: Images that were decoded once, kept as one file of tensors which is mapped into memory at the next start.
- `bnonly.checkpoint`: What is kept of a run while it trains, and its record when it has ended.
- `bnonly.cli`: The command line: bnonly train | study NAME | figures NAME | claims NAME | report NAME | explore | bench | campaign.
- `bnonly.delta`: A small file for any model: what training moved of it, beside the name of the base it stands on.
- `bnonly.faults`: Convolutions around two faults of PyTorch 2.15.0 with oneDNN 3.13.3 on a CPU, which `tests/convolution_faults.py` found. Both are in the gradient of the weight.
- `bnonly.hub`: Deltas on the Hugging Face Hub, each with a card that says what it is and how to load it.
- `bnonly.layers`: The layers of the networks: PyTorch's modules, which call the operators of `bnonly.ops` once they are prepared.
- `bnonly.logs`: What training says: lines of the logger 'bnonly'.
- `bnonly.ops`: The operators that the networks are made of on a CPU: their definitions in PyTorch, and the compiled kernels that compute the same, registered with PyTorch.
- `bnonly.pages`: Pages that hold what others may have written: templates that escape, tables, and notebooks made harmless.
- `bnonly.readers`: The published files of CIFAR-10, CIFAR-10.1, CIFAR-10-C, MNIST and SVHN as arrays.
- `bnonly.runlock`: The run lock: one process at a time works in the folder of a run, and one that lost its lock writes nothing more there.
- `bnonly.tiny_imagenet`: Tiny ImageNet: 200 classes of ImageNet at 64x64 pixels, 500 images of each to train on and 50 to test on.
- `bnonly.trackers`: Watching a run in TensorBoard or Weights & Biases, as $BNONLY_TRACK asks for it."""

__version__ = "0.1.0"
