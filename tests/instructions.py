"""What this processor computes when it is held to an instruction set.

`python tests/instructions.py` prints it as one JSON object.

Run in a process of its own, since oneDNN, PyTorch and the kernels read their limits when they start. Everything is
float32, so that the results of two instruction sets differ by rounding alone."""
import json
import tempfile
from dataclasses import replace

import torch
from bnonly.data import load_data
from bnonly.experiment import Spec
from bnonly.native import kernels
from bnonly.train import fit
from fastai.callback.core import Callback

FAMILIES = "resnet8", "wrn8-0.125", "wrn8-0.25", "wrn10-2", "vgg11", "resnet18", "mlp2-20", "lenet5"
POLICIES = "all", "bn", "gamma", "output", "random2", "scattered2+output", "all-affine", "bn+shortcut+output", "none"


class Stop(Callback):
    order = 70   # after the checkpoint of the epoch
    def after_epoch(self): raise KeyboardInterrupt


def small(data, n=256):
    "The first n training images, the first 100 test images."
    from bnonly.data import Images, describe
    train, test = (Images(s.x[:k], s.y[:k]) for s, k in ((data.train, n), (data.test, 100)))
    return describe(data.name, data.label, train, test, data.classes, (data.mean, data.std), pad=data.pad)


def run(spec, data, **how):
    "The losses of a run of two steps an epoch."
    with tempfile.TemporaryDirectory() as study:
        final = fit(spec, study, data, dtype=torch.float32, **how)["final"]
        return [final["train_loss"], final["loss"]]


def resumed(spec, data):
    "Whether a run that was stopped after an epoch ends as one that was not."
    with tempfile.TemporaryDirectory() as study, tempfile.TemporaryDirectory() as whole:
        try: fit(spec, study, data, [Stop()], dtype=torch.float32)
        except KeyboardInterrupt: pass
        return (
            fit(spec, study, data, dtype=torch.float32)["final"] == fit(spec, whole, data, dtype=torch.float32)["final"]
        )


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
    own = kernels()
    print(
        json.dumps(
            dict(
                kernels=own[torch.float32].instructions if own else "plain",
                pytorch=torch.backends.cpu.get_cpu_capability(),
                resumed=resumed(replace(tiny, policy="all", epochs=2), data),
                losses=found,
            )
        )
    )
