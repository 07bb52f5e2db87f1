"""Train BatchNorm and only BatchNorm: a literate study of what affine parameters can do with random features

Modules:

- `bnonly.adapters`: Policies as adapters of peft, and back: `LNTuningConfig` copies normalizations, `modules_to_save` the output layer.
- `bnonly.bench`: How long a training step takes, beside what one would use instead: `bnonly bench`.
- `bnonly.bounds`: How fast a training step could be, by the rates at which a machine multiplies matrices and copies memory.
- `bnonly.cache`: Images that were decoded once, kept as one file of tensors which is mapped into memory at the next start.
- `bnonly.checkpoint`: What is kept of a run while it trains, and its record when it has ended.
- `bnonly.cli`: The command line: bnonly train | study NAME | figures NAME | claims NAME | report NAME | explore | bench.
- `bnonly.delta`: A small file for any model: what training changed of it, beside the name of the base it stands on.
- `bnonly.faults`: Convolutions around two faults of PyTorch 2.15.0 with oneDNN 3.13.3 on a CPU, which `tests/convolution_faults.py` found. Both are in the gradient of the weight.
- `bnonly.hub`: Deltas on the Hugging Face Hub, each with a card that says what it is and how to load it.
- `bnonly.layers`: The layers of the networks: PyTorch's modules, which call the operators of `bnonly.ops` once they are prepared.
- `bnonly.logs`: What training says: lines of the logger 'bnonly'.
- `bnonly.native`: The compiled kernels of `csrc/`: built at first use for this processor, cached, and loaded with ctypes.
- `bnonly.ops`: The operators of the networks on a CPU: their definitions in PyTorch, and the compiled kernels that compute the same.
- `bnonly.pages`: Pages that hold what others may have written: templates that escape, tables, and notebooks made harmless.
- `bnonly.peers`: What a step is timed beside: a plain fastai `Learner`, plain PyTorch loops, and open_lth, the authors' framework.
- `bnonly.penalties`: What may be added to the loss in BatchNorm's place, and what is measured at the last layer, as fastai callbacks.
- `bnonly.readers`: The published files of CIFAR-10, CIFAR-10.1, CIFAR-10-C, MNIST and SVHN as arrays.
- `bnonly.readme`: The parts of the README and the index that follow from other files: `python -m bnonly.readme` writes them.
- `bnonly.runlock`: The run lock: one process at a time works in the folder of a run; one that lost its lock writes nothing more there.
- `bnonly.shapes`: The shapes of the networks, said once: blocks and channels of each stage, and how many numbers that makes.
- `bnonly.sweep`: Many runs: what a study still lacks, and training it in spite of everything.
- `bnonly.tiny_imagenet`: Tiny ImageNet: 200 classes of ImageNet at 64x64 pixels, 500 images of each to train on and 50 to test on.
- `bnonly.trace`: What the forward pass of anybody's model tells of its layers, without running a hook or changing the model or a random state.
- `bnonly.trackers`: Watching a run in TensorBoard or Weights & Biases, as $BNONLY_TRACK asks for it."""

__version__ = "0.2.0"

_HOMES = dict(   # module to the names that can be imported from here; a module is read when one of its names is wanted
    experiment=["Spec", "results"], features=["restore"], models=["create_model", "roles"],
    policies=["counts", "freeze", "frozen", "unfreeze"], train=["fit"])
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name in _HOME:
        from importlib import import_module
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    from difflib import get_close_matches
    near = get_close_matches(name, _HOME, 1)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}"
                         + (f"; the nearest is {near[0]!r}." if near else "."), name=name)


def __dir__(): return sorted({*globals(), *__all__})
