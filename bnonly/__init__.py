"""Train BatchNorm and only BatchNorm: a literate study of what affine parameters can do with random features

Modules:

- `bnonly.faults`: Convolutions around two faults of PyTorch 2.15.0 with oneDNN 3.13.3 on a CPU, which `tests/convolution_faults.py` found. Both are in the gradient of the weight.
- `bnonly.layers`: The layers of the networks: PyTorch's modules, which call the operators of `bnonly.ops` once they are prepared.
- `bnonly.ops`: The operators that the networks are made of on a CPU: their definitions in PyTorch, and the compiled kernels that compute the same, registered with PyTorch."""

__version__ = "0.1.0"
