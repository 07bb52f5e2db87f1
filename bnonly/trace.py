"""The forward pass of anybody's model as a graph, without running a hook or changing the model or a random state."""
import copy
import random
import warnings
from collections import deque
from contextlib import contextmanager
from types import MethodType

import numpy as np
import torch
from torch import fx, nn

__all__ = ["shadow", "same_randomness", "Layers", "follow", "core", "refuse_hidden"]

HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def shadow(model: nn.Module, known: dict = None) -> nn.Module:
    """A model with the same classes and names, which may be changed freely.

    Its parameters are on the meta device, it has no hooks, and its other attributes are as `copied` gives them.
    """
    known = {} if known is None else known
    known[id(model)] = new = object.__new__(type(model))
    for name, value in vars(model).items(): new.__dict__[name] = copied(value, known)
    for name in HOOKS: new.__dict__[name].clear()
    return new


def copied(value, known: dict):   # id of what was copied already to its copy
    "A copy of a module, a tensor, a random generator, or a container and all that it holds; other objects are the same."
    if id(value) in known: return known[id(value)]
    if isinstance(value, nn.Module): return shadow(value, known)
    if isinstance(value, nn.Parameter): new = nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
    elif isinstance(value, torch.Tensor): new = value.detach().clone()
    elif isinstance(value, torch.Generator): new = value.clone_state()
    elif isinstance(value, (random.Random, np.random.RandomState, np.random.Generator)): new = copy.deepcopy(value)
    elif isinstance(value, MethodType): new = MethodType(value.__func__, copied(value.__self__, known))
    elif type(value) is tuple: new = tuple(copied(v, known) for v in value)
    elif isinstance(value, (dict, list, set, deque)): new = copy.copy(value)
    else: return value
    known[id(value)] = new
    if isinstance(new, (dict, list, deque)):
        for key, v in list(new.items() if isinstance(new, dict) else enumerate(new)): new[key] = copied(v, known)
    return new


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
        with warnings.catch_warnings(action="ignore"), same_randomness(): return list(Layers().trace(shadow(model)).nodes)
    except Exception as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise ValueError(f"its forward pass cannot be traced: {why}") from None


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


def refuse_hidden(model: nn.Module):
    "`ValueError` in one sentence for a model whose layers or numbers are not there to be seen."
    for name, m in model.named_modules():
        what = f"{name!r} of this {type(model).__name__}" if name else "this model"
        if isinstance(m, torch.jit.ScriptModule) and any(True for _ in m.parameters()):
            raise ValueError(f"{what} is a ScriptModule, which hides its layers; freeze the model before torch.jit.script.")
        lazy = nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer
        if any(isinstance(t, lazy) for t in (*m.parameters(False), *m.buffers(False))):
            raise ValueError(f"{what} is lazy and uninitialized: it has no numbers before its first batch; call the model on one, then freeze.")
