"""What this processor computes when it is held to an instruction set.

`python tests/instructions.py` prints it as one JSON object.

Run in a process of its own, since oneDNN, PyTorch and the kernels read their limits when they start. In float32 the
results of two instruction sets differ by rounding alone; in bfloat16 rounding is larger than some faults, so there the
operators are compared with float64 as well."""
import json
import tempfile
from dataclasses import replace

import torch
import test_ops
from bnonly import ops
from bnonly.data import load_data
from bnonly.experiment import Spec
from bnonly.layers import Conv2d
from bnonly.models import create_model
from bnonly.native import kernels
from bnonly.train import fit
from fastai.callback.core import Callback

FAMILIES = "resnet8", "wrn8-0.125", "wrn8-0.25", "wrn10-2", "vgg11", "resnet18", "mlp2-20", "lenet5"
POLICIES = "all", "bn", "gamma", "output", "random2", "scattered2+output", "all-affine", "bn+shortcut+output", "none"
# In bfloat16: stages of Winograd's convolutions, and direct ones, with a stride, between them.
HALF = [("resnet8", p) for p in ("bn", "all", "random2")]


class Stop(Callback):
    order = 70   # after the checkpoint of the epoch
    def after_epoch(self): raise KeyboardInterrupt


def small(data, n=256):
    "The first n training images, the first 100 test images."
    from bnonly.data import Images, describe
    train, test = (Images(s.x[:k], s.y[:k]) for s, k in ((data.train, n), (data.test, 100)))
    return describe(data.name, data.label, train, test, data.classes, (data.mean, data.std), pad=data.pad)


def run(spec, data, dtype=torch.float32):
    "The losses of a run of two steps an epoch."
    with tempfile.TemporaryDirectory() as study:
        final = fit(spec, study, data, dtype=dtype)["final"]
        return [final["train_loss"], final["loss"]]


def resumed(spec, data):
    "Whether a run that was stopped after an epoch ends as one that was not."
    with tempfile.TemporaryDirectory() as study, tempfile.TemporaryDirectory() as whole:
        try: fit(spec, study, data, [Stop()], dtype=torch.float32)
        except KeyboardInterrupt: pass
        return (
            fit(spec, study, data, dtype=torch.float32)["final"] == fit(spec, whole, data, dtype=torch.float32)["final"]
        )


def algorithms(arch):
    "Which algorithms compute the frozen convolutions of a network in bfloat16."
    convs = [m for m in create_model(arch, in_channels=1).modules() if isinstance(m, Conv2d)]
    rival = ops.rival(torch.bfloat16)
    return sorted({ops.conv_algorithm(rival, c.weight.shape, False, c.stride, c.padding, c.dilation, c.groups)
                   for c in convs})


def operators():
    """Each operator beside its definition in float64, in both dtypes; how many comparisons.

    Of multiples of 16 channels: the gradient of others is PyTorch's, which sums in bfloat16 where oneDNN cannot."""
    calls = [
        (test_ops.follow_norm, [(s, d) for d in ops.DTYPES for s in test_ops.SHAPES[1:5:2]]),
        (test_ops.follow_entries, [(d, *test_ops.SPARSE[i]) for d in ops.DTYPES for i in (0, 2, 6, 7)]),
        (test_ops.follow_winograd, [(test_ops.WINOGRAD[i], d) for d in ops.DTYPES for i in (0, 1, 8)]),
        (test_ops.follow_direct, [(test_ops.DIRECT[i], "direct", d) for d in ops.DTYPES for i in (1, 3, 9)]),
        (test_ops.follow_blocks, [(test_ops.BLOCKS[0], d, t) for d in ops.DTYPES for t in (False, True)]),
    ]
    for follow, cases in calls:
        for case in cases: follow(*case)
    return sum(len(cases) for _, cases in calls)


if __name__ == "__main__":
    torch.set_num_threads(1)
    data = small(load_data("digits"))
    tiny = Spec(arch="resnet8", epochs=1)
    found = {
        f"{a} {p}": run(replace(tiny, arch=a, policy=p), data)
        for a in FAMILIES
        for p in ("all", "gamma" if a == "mlp2-20" else "bn")
    }
    found |= {f"resnet8 {p}": run(replace(tiny, policy=p), data) for p in POLICIES}
    half = {f"{a} {p}": run(replace(tiny, arch=a, policy=p), data, torch.bfloat16) for a, p in HALF}
    own = kernels()
    print(
        json.dumps(
            dict(
                kernels=own[torch.float32].instructions if own else "plain",
                pytorch=torch.backends.cpu.get_cpu_capability(),
                resumed=resumed(replace(tiny, policy="all", epochs=2), data),
                losses=found,
                bfloat16=half,
                algorithms={a: algorithms(a) for a, _ in HALF},
                operators=operators() if own else 0,
            )
        )
    )
