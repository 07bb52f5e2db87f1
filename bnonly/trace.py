"""What the forward pass of anybody's model tells of its layers, without running a hook or changing the model or a
random state.

Which of them normalize is told by their classes; which one is the output and which are on shortcuts, by the graph.
"""
import copy
import operator
import random
import re
import warnings
from collections import deque
from contextlib import contextmanager
from types import MethodType

import numpy as np
import torch
from torch import fx, nn

__all__ = ["BATCH_NORMS", "CONVOLUTIONS", "shadow", "same_randomness", "Layers", "follow", "normalization", "place",
           "trace", "last_layers", "on_shortcuts", "core", "check_model", "refuse_hidden"]

def shadow(model: nn.Module, known: dict = None) -> nn.Module:
    """A model with the same classes and names, which may be changed freely.

    Its parameters are on the meta device, and its other attributes are as `copied` gives them.
    """
    known = {} if known is None else known
    known[id(model)] = new = object.__new__(type(model))
    for name, value in vars(model).items(): new.__dict__[name] = copied(value, known)
    return new


def copied(value, known: dict):   # id of what was copied already to its copy
    """A copy of a module, a tensor, a random generator, or a container or plain Python object and all that it holds.

    Other objects are the same: what has no attributes may be known by its identity, and what makes or copies itself
    in a way of its own is left alone.
    """
    if id(value) in known: return known[id(value)]
    if isinstance(value, nn.Module): return shadow(value, known)
    if isinstance(value, nn.Parameter): new = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
    elif isinstance(value, torch.Tensor): new = value.detach().clone()
    elif isinstance(value, torch.Generator): new = value.clone_state()
    elif isinstance(value, (random.Random, np.random.RandomState, np.random.Generator)): new = copy.deepcopy(value)
    elif isinstance(value, MethodType): new = MethodType(value.__func__, copied(value.__self__, known))
    elif type(value) is tuple: new = tuple(copied(v, known) for v in value)
    elif isinstance(value, (dict, list, set, deque)): new = copy.copy(value)
    elif _is_plain(value): new = object.__new__(type(value))
    else: return value
    known[id(value)] = new
    if isinstance(new, (dict, list, deque)):
        for key, v in list(new.items() if isinstance(new, dict) else enumerate(new)): new[key] = copied(v, known)
    elif _is_plain(value):
        for name, v in vars(value).items(): new.__dict__[name] = copied(v, known)
    return new


def _is_plain(value) -> bool:   # such as a meter that counts batches
    "Whether an object is nothing but its attributes."
    kind = type(value)
    usual = kind.__new__ is object.__new__ and kind.__reduce_ex__ is object.__reduce_ex__
    return usual and kind.__reduce__ is object.__reduce__ and not hasattr(kind, "__deepcopy__") and \
        bool(getattr(value, "__dict__", None))


@contextmanager
def same_randomness():
    "Whatever is drawn inside, the global random states of Python, numpy and torch are afterwards as they were."
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices): yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class Layers(fx.Tracer):
    "Traces a forward pass; a module with parameters of its own is a layer, whatever it does inside."
    def is_leaf_module(self, m, name): return any(True for _ in m.parameters(False)) or super().is_leaf_module(m, name)
    def call_module(self, m, forward, args, kwargs): return super().call_module(m, m.forward, args, kwargs)   # no hooks


def follow(model: nn.Module) -> list:
    "The nodes of the forward pass, in their order; `ValueError` in one line where it cannot be traced."
    try:
        with warnings.catch_warnings(action="ignore"), same_randomness():
            return list(Layers().trace(shadow(model)).nodes)
    except Exception as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(f"its forward pass cannot be traced: {why}") from None


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm,
               nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
               nn.LazyInstanceNorm1d, nn.LazyInstanceNorm2d, nn.LazyInstanceNorm3d)
CALLED_NORM = re.compile(r"norm|^(Sync)?(BN|LN|GN|FRN|RMS|GRN)(\dd)?$", re.I)   # a class of the user's own
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
ACTIVATIONS = "relu relu_ relu6 leakyrelu leaky_relu prelu elu celu selu gelu silu mish hardswish".split()
SUMS = operator.add, operator.iadd, torch.add, "add", "add_"


def normalization(m: nn.Module) -> str:   # 'bn', 'norm', or '' for a module that is none
    """Which kind of normalization a module is.

    PyTorch's are told by their type; another is a class that calls itself a norm, or stands on one that does, and
    holds nothing but one number for each channel, or other normalizations.
    """
    if isinstance(m, BATCH_NORMS): return "bn"
    if isinstance(m, OTHER_NORMS): return "norm"
    names = [c.__name__ for c in type(m).__mro__]
    if not any(map(CALLED_NORM.search, names)): return ""
    at = {name: place(name)[0] for name, _ in m.named_parameters()}
    own = [m.get_parameter(name) for name, module in at.items() if not module]
    inner = {normalization(m.get_submodule(name)) for name in {*at.values()} - {""}}
    if not own or "" in inner or any(p.numel() != max(p.shape, default=1) for p in own): return ""
    return "bn" if any("batchnorm" in name.lower() for name in names) else "norm"


def place(name: str) -> tuple:   # name: of a parameter; two names
    "The module that holds a parameter, and the name of the weight it makes there."
    module, parametrized, rest = f".{name}".partition(".parametrizations.")
    return (module[1:], rest.partition(".")[0]) if parametrized else name.rpartition(".")[::2]


def trace(model: nn.Module) -> tuple:   # (nodes in their order, node to the module whose weights it applies)
    "The forward pass as a graph; `ValueError` where it cannot be traced."
    nodes = follow(model)
    called = {n: model.get_submodule(n.target) for n in nodes if n.op == "call_module"}
    return nodes, {n: m for n, m in called.items() if any(True for _ in m.parameters()) and not normalization(m)}


def _hides(model, n) -> str:   # 'norm', 'activation' or '': what a node behind a layer says of it
    m = model.get_submodule(n.target) if n.op == "call_module" else None
    if m is not None and normalization(m): return "norm"
    called = n.target if n.op == "call_method" else getattr(n.target, "__name__", "")
    name = called if m is None else type(m).__name__
    return "activation" if name.lower() in ACTIVATIONS else ""


def _pointwise(m) -> bool: return isinstance(m, CONVOLUTIONS) and set(m.kernel_size) == {1}


def last_layers(model: nn.Module, nodes: list, layers: dict) -> list:   # of modules
    """The layers that feed the output with no other between; `nodes` and `layers` are as `trace` gives them.

    None of them where a normalization or, but for a 1x1 convolution, an activation follows: they are hidden ones.
    """
    todo, found = [(n, frozenset()) for n in nodes if n.op == "output"], {}
    while todo:
        n, behind = todo.pop()
        if (n, behind) in found: continue
        found[n, behind] = layers.get(n)
        if n not in layers: todo += [(i, behind | {_hides(model, n)}) for i in n.all_input_nodes]
    last = {(m, behind) for (_, behind), m in found.items() if m is not None}
    if any("norm" in behind or "activation" in behind and not _pointwise(m) for m, behind in last): return []
    return list({m for m, _ in last})


def on_shortcuts(nodes: list, layers: dict) -> set:   # of modules
    "The convolutions that are alone on their way to a sum whose other way has more layers."
    before, found = {}, set()
    for n in nodes:
        before[n] = set().union(*(before[i] for i in n.all_input_nodes), {n} if n in layers else ())
        if n.target not in SUMS or len(n.all_input_nodes) != 2: continue
        a, b = (before[i] for i in n.all_input_nodes)
        for one, other in ((a - b, b - a), (b - a, a - b)):
            if len(one) == 1 and len(other) > 1:
                found |= {layers[i] for i in one if isinstance(layers[i], CONVOLUTIONS)}
    return found


def core(model: nn.Module, is_own=lambda m: False) -> tuple:
    """(prefix, module): the model inside of wrappers, and how the names of its parameters begin.

    Wrappers are DataParallel, DistributedDataParallel, `torch.compile` and averages of weights; around a network for
    which `is_own` holds, whatever adds no parameter to it, such as a Sequential with a normalizing layer in front.
    """
    prefix, at, inside = "", model, ("", model)
    while not is_own(at) and not any(True for _ in at.parameters(False)):
        children = [(n, c) for n, c in at.named_children() if any(True for _ in c.parameters())]
        if len(children) != 1: break
        name, child = children[0]
        wraps = inside[1] is at and name in ("module", "_orig_mod")
        prefix, at = f"{prefix}{name}.", child
        if wraps or is_own(at): inside = prefix, at
    return inside


def check_model(model: nn.Module) -> nn.Module:   # the same model
    "`ValueError` in one sentence for what is no model."
    if isinstance(model, nn.Module): return model
    what, near = f"a {type(model).__name__}", "create_model('resnet14') makes one"
    if model is None: what = "None"
    elif isinstance(model, type): what, near = f"the class {model.__name__}", f"the nearest is {model.__name__}()"
    elif isinstance(getattr(model, "model", None), nn.Module): near = f"the nearest is the {what[2:]}'s model"
    raise ValueError(f"the model is {what}, not a torch.nn.Module; {near}.")


def refuse_hidden(model: nn.Module):
    "`ValueError` in one sentence for what is no model, or one whose layers or numbers are not there to be seen."
    check_model(model)
    for name, m in model.named_modules():
        what = f"{name!r} of this {type(model).__name__}" if name else "this model"
        if isinstance(m, torch.jit.ScriptModule) and any(True for _ in m.parameters()):
            raise ValueError(f"{what} is a ScriptModule, which hides its layers; "
                             "freeze the model before torch.jit.script.")
        lazy = nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer
        if any(isinstance(t, lazy) for t in (*m.parameters(False), *m.buffers(False))):
            raise ValueError(f"{what} is lazy and uninitialized: it has no numbers before its first batch; "
                             "call the model on one, then freeze.")
