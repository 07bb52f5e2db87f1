"""A small file for any model: what training changed of it, beside the name of the base it stands on.

The file holds the numbers that trained and the running statistics, under the names that they have in the model, and
says of which base they are, under which policy they trained, and the digest of all that was frozen."""
import copy
import json
import re
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from . import __version__
from .experiment import choose, parse_policy, write
from .policies import freeze, frozen_as, frozen_tensors, load_trained_state, trained_state, trainable, unfreeze
from .sealed import check_fields, digest_tensors, read_metadata, read_sealed, serialize, whole_number
from .trace import core

__all__ = ["Shelf", "about", "check_base", "load_delta", "merge", "metadata_of", "read_delta", "save_delta",
           "unwrapped"]

_FORMAT = "bnonly-delta-1"
FIELDS = "format", "base", "frozen", "policy", "entries", "output", "statistics", "versions", "digest"
SHARED = "policy", "entries", "output", "statistics", "frozen"   # by all deltas of a shelf
_HEADER = 2**20   # bytes: a delta names each of its tensors


def unwrapped(model: nn.Module) -> nn.Module:
    "The model inside of DataParallel, `torch.compile` and the like."
    return core(model)[1]


def check_base(base: str) -> str:
    "The name of a base, if it is one that can be shown anywhere; `ValueError` otherwise."
    if not re.fullmatch(r"[A-Za-z0-9][\w./@:+ -]{0,199}", base, re.ASCII):
        raise ValueError(f"base {base[:80]!r} is not a name of up to 200 letters, digits and ./@:+-_, "
                         "e.g. 'timm/resnet18.a1_in1k'")
    return base


def about(metadata: dict) -> dict:   # arguments of `freeze` -> their values
    "How a delta's model was frozen, every value of its metadata checked."
    check_fields(metadata, FIELDS)
    choose("format", metadata["format"], [_FORMAT])
    check_base(metadata["base"])
    parse_policy(metadata["policy"])
    choose("statistics", metadata["statistics"], ["batch", "frozen"])
    if not re.fullmatch("[0-9a-f]{64}", metadata["frozen"]):
        raise ValueError(f"its digest of the frozen numbers is {metadata['frozen'][:70]!r}")
    return dict(policy=metadata["policy"], seed=whole_number(metadata, "entries", 2**63 - 1),
                output=_names(metadata["output"]), statistics=metadata["statistics"])


def _names(text):   # of the output's modules; None where they tell themselves
    try: names = json.loads(text)
    except ValueError: names = 0
    if names is None or isinstance(names, list) and all(isinstance(n, str) for n in names): return names
    raise ValueError(f"its output {text[:70]!r} is no list of names")


def save_delta(model: nn.Module,   # trained after `freeze`
               path: Path,         # of the file, e.g. 'birds.safetensors'
               base: str           # where the model came from, e.g. 'timm/resnet18.a1_in1k'
               ) -> Path:
    """Keep what training changed of a model, and what must be known of its base.

    `ValueError` for a model that was not frozen, that trains other numbers than its policy says, or that diverged."""
    how, inside = frozen_as(model), unwrapped(model)
    if how is None:
        raise ValueError(f"this {type(inside).__name__} was not frozen, so what trained of it cannot be told; "
                         "freeze(model, policy) before it trains.")
    if odd := sorted({*trainable(inside)} ^ {*trainable(_frozen_copy(inside, how))}):
        does = "trains" if odd[0] in trainable(inside) else "does not train"
        raise ValueError(f"{odd[0]!r} {does}, against policy {how['policy']!r}; "
                         "freeze the model again before it trains, or train within `with frozen(...)`.")
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in trained_state(inside).items()}
    if odd := [n for n, t in tensors.items() if not t.isfinite().all()]:
        raise ValueError(f"{odd[0]} holds numbers that are not finite; a diverged model is not kept.")
    tools = dict(bnonly=__version__, torch=version("torch"))
    metadata = dict(format=_FORMAT, base=check_base(base), frozen=digest_tensors(frozen_tensors(inside)),
                    policy=how["policy"], entries=str(how["seed"]), output=json.dumps(how["output"]),
                    statistics=how["statistics"], versions=json.dumps(tools))
    about(metadata | dict(digest=""))
    return write(path, serialize(metadata, tensors))


def _frozen_copy(inside, how):
    with warnings.catch_warnings(action="ignore"): return freeze(unfreeze(copy.deepcopy(inside)), **how)


def read_delta(path: Path, model: nn.Module) -> tuple:   # metadata and tensors, both by name
    """What a delta holds for a model, which stays as it is.

    `ValueError` in one sentence for a damaged file, for one of another architecture, and for another base."""
    inside, copies = unwrapped(model), []

    def plan(metadata):
        copies[:] = [_frozen_copy(inside, about(metadata))]
        return {n: (t.shape, t.dtype) for n, t in trained_state(copies[0]).items()}
    metadata, tensors = read_sealed(path, f"delta of this {type(inside).__name__}", plan, _HEADER)
    if digest_tensors(frozen_tensors(copies[0])) != metadata["frozen"]:
        raise ValueError(f"{path} stands on another base than this {type(inside).__name__}: what "
                         f"{metadata['policy']!r} freezes of the model is not what it was in {metadata['base']!r}, "
                         "where the delta was saved.")
    return metadata, tensors


def metadata_of(path: Path) -> dict:   # of strings
    "What a delta says of itself, every value checked; `ValueError` in one sentence for a file that is none."
    return read_metadata(path, "delta", about, _HEADER)


def load_delta(path: Path,        # as `save_delta` wrote it
               model: nn.Module   # the base, made and loaded as it was before training
               ) -> nn.Module:    # the same model, frozen by the delta's policy, in evaluation mode
    "Put a delta into its base; `ValueError` as `read_delta` has it, and then the model is as it was."
    metadata, tensors = read_delta(path, model)
    return _put(model, metadata, tensors)


def _put(model, metadata, tensors):
    inside = unwrapped(model)
    load_trained_state(freeze(inside, **about(metadata)), tensors)
    model.eval()
    return model


def merge(model: nn.Module) -> nn.Module:
    "A plain copy: nothing is frozen, random entries are in their weights, and its state dict is that of its class."
    return unfreeze(copy.deepcopy(unwrapped(model)))


class Shelf:
    """Many deltas of one base in memory, of which the model holds one at a time.

    `shelf[name] = path` reads a delta, `shelf[name]` puts its numbers and statistics into the model and gives it back.
    All share base and policy; the first one freezes the model, and `ValueError` tells of one that does not fit."""
    item = "delta"   # as messages call it

    def __init__(self, model: nn.Module, files: dict = {}):   # files: name of a delta to its path
        self.model, self.deltas, self.shared = model, {}, None
        for name, path in files.items(): self[name] = path

    def __setitem__(self, name: str, path: Path):
        if self.shared is None:
            metadata, tensors = read_delta(path, self.model)
            _put(self.model, metadata, tensors)
        else: metadata, tensors = read_sealed(path, "delta of this shelf", self._plan, _HEADER)
        self._keep(name, tensors, {k: metadata[k] for k in SHARED})

    def _plan(self, metadata):
        about(metadata)
        if odd := next((k for k, v in self.shared.items() if metadata[k] != v), None):
            raise ValueError(f"its {odd} {metadata[odd][:70]!r} is not {self.shared[odd][:70]!r}, which the first has; "
                             "deltas of a shelf share base and policy")
        return self.shapes

    def _keep(self, name, tensors, shared):   # into the model as it is frozen; shared: what all have in common
        if self.shared is None:
            self.shared, self.how, inside = shared, frozen_as(self.model), unwrapped(self.model)
            self.shapes = {n: (t.shape, t.dtype) for n, t in trained_state(inside).items()}
            self.places = [(inside.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2]) for n in self.shapes]
        device = next(self.model.parameters()).device
        self.deltas[name] = [tensors[n].to(device) for n in self.shapes]

    def use(self, name: str) -> nn.Module:   # the model
        "Put a delta into the model in place; `ValueError` with the nearest name for one that is not here."
        numbers = self.deltas[choose(self.item, name, self.deltas)]
        if frozen_as(self.model) != self.how:
            raise ValueError(f"the model was frozen otherwise after its first {self.item} was read; "
                             f"make another {type(self).__name__} of it.")
        with torch.no_grad():
            for (m, kind), t in zip(self.places, numbers): getattr(m, kind).copy_(t)
        return self.model

    __getitem__ = use
    def __len__(self): return len(self.deltas)
    def __iter__(self): return iter(self.deltas)
