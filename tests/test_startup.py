"What a start costs: nothing is imported that is not needed, and importing the package changes nothing of a program."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code, *args, **env):
    "What a Python of its own prints as JSON."
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | env
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, text=True, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


def test_the_first_step_comes_without_pytorchs_compiler(tmp_path):
    "It takes a third of the time until then."
    code = """
import json, os, sys
from bnonly.experiment import Spec
from bnonly.train import Callback, fit

class First(Callback):
    order = 1000
    def after_batch(self):
        print(json.dumps(sorted({"torch._dynamo", "sympy", "torchvision", "torch.onnx"} & {*sys.modules})), flush=True)
        os._exit(0)
fit(Spec(arch="resnet8", epochs=1), cbs=First)
"""
    assert python(code, BNONLY_RUNS=str(tmp_path)) == []


@pytest.mark.parametrize("momentum", (.9, 0.))
def test_steps_are_those_of_pytorchs_class(momentum):
    "Bit for bit, with two groups of which one does not decay, and a parameter without a gradient."
    import torch
    from bnonly.optimizer import SGD
    drawn = torch.Generator().manual_seed(0)
    def copies():
        first, second = (torch.randn(n, generator=drawn.manual_seed(n)).requires_grad_() for n in (50, 7))
        return first, second, torch.ones(3, requires_grad=True)
    ours, theirs = copies(), copies()
    def groups(of): return [dict(params=[of[0], of[2]], rate=1.), dict(params=[of[1]], rate=.1, weight_decay=0.)]
    own = SGD(groups(ours), .1, momentum, .01)
    reference = torch.optim.SGD(groups(theirs), lr=.1, momentum=momentum, weight_decay=.01, fused=True)
    for i in range(5):
        own.set_hyper("lr", [.1 / (i+1), .01])
        for group, lr in zip(reference.param_groups, (.1 / (i+1), .01)): group["lr"] = lr
        for a, b in zip(ours[:2], theirs[:2]):
            a.grad = torch.randn(a.shape, generator=drawn)
            b.grad = a.grad.clone()
        own.step()
        reference.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))
    assert (ours[2] == 1).all() and not torch.equal(ours[0], copies()[0])
    own.zero_grad()
    assert all(p.grad is None for p in ours)


def test_help_and_names_come_without_torch_and_pandas():
    "In one process: help and version, then the names that the package offers, then one of them."
    code = """
import io, json, sys
from contextlib import redirect_stdout
import bnonly
from bnonly.cli import main
with redirect_stdout(io.StringIO()) as said:
    main(["--help"]); main(["--version"])
listed, near = set(dir(bnonly)), []
for wrong in ("freze", "Speck", "nothing"):
    try: getattr(bnonly, wrong)
    except AttributeError as e: near.append(str(e))
heavy = sorted({"torch", "pandas", "numpy", "matplotlib", "fastcore"} & {*sys.modules})
from bnonly import Spec, experiment, results
own = Spec is experiment.Spec and results is experiment.results and "torch" not in sys.modules
print(json.dumps(dict(heavy=heavy, said=said.getvalue(), listed=sorted(listed), near=near, own=own, version=bnonly.__version__)))
"""
    told = python(code)
    assert told["heavy"] == [] and told["own"] and told["said"].endswith(f"bnonly {told['version']}\n")
    names = {"Spec", "counts", "create_model", "fit", "freeze", "frozen", "restore", "results", "roles", "unfreeze"}
    assert names <= {*told["listed"]}
    assert [n.partition("the nearest is ")[2] for n in told["near"]] == ["'freeze'.", "'Spec'.", ""]


def test_importing_all_of_it_changes_nothing_of_a_program():
    """Not the style of figures, the handlers of the root logger, the random generators or the number of threads; and
    every name that the package offers is there. What fastai changes by itself counts too."""
    code = """
import json, logging, pkgutil, random, sys
import matplotlib, numpy, torch
def state():
    return dict(style={k: str(v) for k, v in dict.items(matplotlib.rcParams)}, root=[str(h) for h in logging.getLogger().handlers],
                level=logging.getLogger().level, threads=torch.get_num_threads(),
                type=str(torch.get_default_dtype()), grad=torch.is_grad_enabled(), python=hash(random.getstate()),
                numpy=str(numpy.random.get_state()), torch=torch.get_rng_state().tolist(), deterministic=torch.are_deterministic_algorithms_enabled(),
                hook=repr(sys.excepthook))
before = state()
import bnonly
for module in pkgutil.iter_modules(bnonly.__path__, "bnonly."):
    __import__(module.name)
for name in bnonly.__all__: getattr(bnonly, name)
after = state()
print(json.dumps({k: [str(before[k])[:300], str(after[k])[:300]] for k in before if before[k] != after[k]}))
"""
    assert python(code) == {}
