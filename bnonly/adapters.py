"""Policies as adapters of peft, and back: `LNTuningConfig` copies normalizations, `modules_to_save` the output layer.

peft's own files hold the layers that it copied, and no running statistics of a BatchNorm that does not train; a delta
of `from_peft` holds all that changed."""
import copy
import re

from torch import nn

from .experiment import parse_policy
from .models import place, roles
from .policies import freeze, shared, unfreeze

__all__ = ["from_peft", "to_peft"]

PEFT_ROLES = {"bn": ("bn",), "norm": ("bn", "norm"), "output": ("output",)}   # what peft can train, as roles


def _peft():
    try: import peft
    except ImportError as e:
        raise ImportError(f"adapters need {e.name}, which is not installed; pip install 'bnonly[peft]'.") from None
    return peft


def _holders(model, wanted, output) -> list:   # of names of modules
    "The modules that hold the parameters of some roles, each with all of them."
    found = roles(model, output, norms_only="output" not in wanted)
    names, tied = [*dict.fromkeys(place(n)[0] for n, role in found.items() if role in wanted)], shared(model)
    for n in names:
        held = dict(model.get_submodule(n).named_parameters())
        if odd := [k for k in held if found.get(f"{n}.{k}") not in wanted]:
            raise ValueError(f"peft trains a module as a whole, and {n!r} holds {odd[0]!r} too, "
                             "which the policy freezes.")
        if any(id(p) in tied for p in held.values()):
            raise ValueError(f"peft copies what it trains, and {n!r} shares its parameters with another module.")
    return [n for n in names if not any(n.startswith(f"{o}.") for o in names)]


def _targets(model, names):
    "Names for `target_modules`: a list where endings mean these modules alone, else a regular expression."
    def hit(key): return key in names or any(key.endswith(f".{n}") for n in names)
    others = [n for n, _ in model.named_modules() if hit(n) and n not in names]
    return f"(?:{'|'.join(map(re.escape, names))})" if others else names


def to_peft(model: nn.Module,                # which stays as it is; `peft.get_peft_model` takes it with the config
            policy: str,                     # of the tokens 'norm', 'bn' and 'output', e.g. 'norm+output'
            output: str | tuple | None = None  # names of the output's modules, where they cannot be told
            ):
    """The `LNTuningConfig` that trains what `freeze(model, policy)` would.

    `ValueError` for a policy or a model of which peft cannot train exactly that, `ImportError` without peft."""
    peft, tokens = _peft(), [t for t, _ in parse_policy(policy)]
    if odd := [t for t in tokens if t not in PEFT_ROLES]:
        raise ValueError(f"policy {policy!r} trains {odd[0]!r}, which peft's LNTuningConfig cannot; "
                         "the nearest is 'norm'.")
    if tokens == ["output"]:
        raise ValueError("policy 'output' has no normalization, which peft's LNTuningConfig needs; "
                         "the nearest is 'norm+output'.")
    norms = _holders(model, {r for t in tokens if t != "output" for r in PEFT_ROLES[t]}, output)
    last = _holders(model, {"output"}, output) if "output" in tokens else []
    if not norms: raise ValueError(f"policy {policy!r} trains no normalization of {type(model).__name__}.")
    for n in last:
        if odd := [k for k, _ in model.named_modules() if k.endswith(n) and k not in last]:
            raise ValueError(f"peft finds modules by the endings of their names, and {odd[0]!r} ends as the output "
                             f"{n!r} does.")
    return peft.LNTuningConfig(target_modules=_targets(model, norms), modules_to_save=last or None)


def from_peft(peft_model):   # -> nn.Module
    """A plain copy of a model with one LN-tuning adapter: what the adapter trained is in it, statistics included.

    It is frozen by the policy that trains the same, so `save_delta` takes it. `ValueError` where no policy does."""
    peft, name = _peft(), getattr(peft_model, "active_adapter", None)
    config = getattr(peft_model, "peft_config", {}).get(name) if isinstance(name, str) else None
    if not isinstance(config, peft.LNTuningConfig):
        what = type(config or peft_model).__name__
        raise ValueError(f"{what} is not a model with one active adapter of an LNTuningConfig, "
                         "which alone a policy can stand for.")
    inside, norms, last = copy.deepcopy(peft_model.get_base_model()), [], []
    for n, m in [*inside.named_modules()]:
        if hasattr(m, "ln_tuning_layers"):
            norms.append(n)
            _replace(inside, n, m.base_layer if m.merged else m.ln_tuning_layers[name])
        elif isinstance(getattr(m, "modules_to_save", None), nn.ModuleDict):
            last.append(n)
            _replace(inside, n, m.modules_to_save[name])
    vars(inside).pop("peft_config", None)
    return _as_policy(unfreeze(inside).requires_grad_(True), norms, last)


def _replace(model, name, new):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _as_policy(model, norms, last):
    "Freeze a model by the policy that trains these modules."
    for token in ("norm", "bn"):
        odd = {*norms} ^ {*_holders(model, set(PEFT_ROLES[token]), ())}
        if not odd: return freeze(model, f"{token}+output" if last else token, output=tuple(last) or None)
    raise ValueError("no policy trains what this adapter does, some normalizations and not all, or something else, "
                     f"e.g. {sorted(odd)[0]!r}.")
