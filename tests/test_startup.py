"What a start costs: nothing is imported that is not needed, and importing the package changes nothing of a program."
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(code, *args, **env):
    "What a Python of its own prints as JSON."
    env = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1") | env
    done = subprocess.run([sys.executable, "-c", code, *args], env=env, text=True, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


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
print(json.dumps(dict(heavy=heavy, said=said.getvalue(), listed=sorted(listed), near=near, own=own,
                      version=bnonly.__version__)))
"""
    answer = python(code)
    assert answer["heavy"] == [] and answer["own"] and answer["said"].endswith(f"bnonly {answer['version']}\n")
    names = {"Spec", "counts", "create_model", "fit", "freeze", "frozen", "restore", "results", "roles", "unfreeze"}
    assert names <= {*answer["listed"]}
    assert [n.partition("the nearest is ")[2] for n in answer["near"]] == ["'freeze'.", "'Spec'.", ""]


def test_importing_all_of_it_changes_nothing_of_a_program():
    """Not the style of figures, the handlers of the root logger, the random generators or the number of threads; and
    every name that the package offers is there. What fastai changes by itself counts too, but for a number that rich,
    which comes with it, draws with Python's generator."""
    code = """
import json, logging, pkgutil, random, sys
import matplotlib, numpy, torch
def state():
    root = logging.getLogger()
    return dict(style={k: str(v) for k, v in dict.items(matplotlib.rcParams)},
                root=[str(h) for h in root.handlers], level=root.level, hook=repr(sys.excepthook),
                python=hash(random.getstate()), numpy=str(numpy.random.get_state()),
                torch=torch.get_rng_state().tolist(), threads=torch.get_num_threads(),
                type=str(torch.get_default_dtype()), grad=torch.is_grad_enabled())
before = state()
import fastai.learner
before["python"] = state()["python"]
import bnonly
for module in pkgutil.iter_modules(bnonly.__path__, "bnonly."):
    __import__(module.name)
for name in bnonly.__all__: getattr(bnonly, name)
after = state()
print(json.dumps({k: [str(before[k])[:300], str(after[k])[:300]] for k in before if before[k] != after[k]}))
"""
    assert python(code) == {}
