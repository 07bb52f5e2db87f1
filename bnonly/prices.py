"""What the paper's studies would cost, from the measured steps of `bnonly bench --steps`."""
import json

import numpy as np
import pandas as pd

from .experiment import Spec, parse_arch, preset, root

__all__ = ["TRAINING", "alike", "measured_steps", "per_image", "core_hours", "price"]

# images an epoch
TRAINING = {"digits": 1_437, "cifar10": 50_000, "cifar10.1": 50_000, "mnist": 60_000, "imagenet": 1_281_167,
            "tiny-imagenet": 100_000}


# data to the families measured at the size of its images
_PRICED = dict(cifar10=("cifar", "vgg"), imagenet=("imagenet",))


_FAMILY_NAMES = dict(imagenet="ImageNet ResNets", vgg="VGG", cifar="CIFAR ResNets, by depth")


def alike(policy:str) -> str:   # all, random2, bn or output
    "The measured policy whose step does the same work."
    if policy.startswith("all"): return "all"
    if "shortcut" in policy: return "all"
    if any(t in policy for t in ("random", "scattered")): return "random2"
    return "bn" if any(t in policy for t in ("bn", "norm", "gamma")) else "output"


def measured_steps() -> pd.DataFrame:   # arch, policy, milliseconds_per_image, processor, and what `arch` says
    "The measured steps."
    benchmark = json.loads((root()/"runs/bench/cpu,avx512_fp16,steps.json").read_bytes())
    table = pd.DataFrame(benchmark["rows"]).assign(processor=benchmark["machine"]["processor"])
    return table.assign(**pd.DataFrame([parse_arch(a)._asdict() for a in table.arch]))


def per_image(spec:Spec, measured:pd.DataFrame) -> float:   # milliseconds of one thread
    "What an image of a training step costs."
    arch, policy = parse_arch(spec.arch), alike(spec.policy)
    if arch.family not in _PRICED.get(spec.data, ()) or (spec.norm, spec.act) != ("batch", "relu"):
        raise _unpriced(spec)
    ms = measured.set_index(["policy", "arch"]).milliseconds_per_image
    if (policy, spec.arch) in ms: return ms[policy, spec.arch]
    if arch.family == "imagenet":
        like = "resnet18" if arch.depth < 50 else "resnet50"
        return ms["bn", spec.arch] * ms[policy, like] / ms["bn", like]
    by, other, at = ("width", "depth", arch.depth) if arch.width > 1 else ("depth", "width", 1)
    known = measured[(measured.family == arch.family) & (measured.policy == policy) & (measured[other] == at)]
    if not len(known): raise _unpriced(spec)
    fit = np.polyfit(known[by], known.milliseconds_per_image, 1 if by == "depth" else 2)
    return np.polyval(fit, getattr(arch, by)) * min(1, arch.width)   # a width below 1: in proportion to the activations


def _unpriced(spec):
    return ValueError(f"{spec.key} has no measured step; those of the studies 'short', 'paper' and 'imagenet' have.")


def core_hours(spec:Spec, measured:pd.DataFrame) -> float:
    "What a run should take on one core like the measured one."
    return per_image(spec, measured) * TRAINING[spec.data] * spec.epochs / 3.6e6


def price(*studies:str) -> pd.DataFrame:   # one row a family and policy, and the sum
    "What studies should cost, by family and policy."
    measured = measured_steps()
    def family(arch): return "CIFAR ResNets, by width" if arch.width > 1 else _FAMILY_NAMES.get(arch.family)
    rows = [dict(family=family(parse_arch(s.arch)), policy=s.policy, runs=1, core_hours=core_hours(s, measured))
            for name in studies for s in preset(name)]
    table = pd.DataFrame(rows).groupby(["family", "policy"], as_index=False).sum()
    every = pd.DataFrame([dict(family="all", policy="", runs=table.runs.sum(), core_hours=table.core_hours.sum())])
    table = pd.concat([table, every], ignore_index=True)
    return table.assign(processor=measured.processor[0], gpu_hours="not measured")
