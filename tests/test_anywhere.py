"Other machines than the one it was written on."
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bnonly.cache import save_cache, stamp
from bnonly.experiment import Spec, load_record, run_dir
from bnonly.train import fit

ROOT = Path(__file__).parents[1]
ASCII = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


def python(code, *args, env={}, **kw):
    "What a Python of its own prints; the code is imported from this checkout."
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run([*args, sys.executable, "-c", code], env=environment, check=True, text=True,
                          stdout=subprocess.PIPE, **kw).stdout


def test_a_file_system_without_permissions_keeps_records(monkeypatch):
    def refuse(*_, **__): raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    spec = Spec(arch="resnet8", epochs=1)
    assert fit(spec) == load_record(run_dir(spec))


def test_a_file_system_without_permissions_keeps_a_cache(tmp_path, monkeypatch):
    def refuse(*_, **__): raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "chmod", refuse)
    (source := tmp_path / "source").write_bytes(b"1")
    assert (
        save_cache(dict(x=torch.zeros(2)), dict(label="x"), source, stamp(source), "x")
        == tmp_path / "cache/x.safetensors"
    )


def test_records_survive_a_checkout_that_rewrites_line_ends(tmp_path):
    subprocess.run(["git", "-c", "core.autocrlf=true", "clone", "-q", ROOT, tmp_path / "clone"], check=True)
    env = dict(BNONLY_RUNS=str(tmp_path / "clone/runs"))
    found = python("from bnonly.experiment import results; print(len(results('decay')))", "env", env=env)
    env = dict(BNONLY_RUNS=str(ROOT / "runs"))
    assert int(found) == int(python("from bnonly.experiment import results; print(len(results('decay')))", env=env)) > 0


@pytest.mark.parametrize("command", ["study short --dry-run", "claims short"])
def test_a_locale_without_utf8_reads_and_prints(command):
    code = f"from bnonly.cli import main; main({command.split()})"
    assert python(code, env=ASCII | dict(BNONLY_RUNS=str(ROOT / "runs")))


def test_no_more_processes_decode_than_this_one_may_use():
    code = ("import torch; from bnonly.data import Data, FileBatches, Files; f = Files(('a',), torch.tensor([0]));"
            "print(FileBatches(f, Data('imagenet', '', f, f, ('a',), (0,0,0), (1,1,1)), 1).workers)")
    assert python(code, "taskset", "-c", str(min(os.sched_getaffinity(0)))).strip() == "1"


def test_a_checkout_on_the_path_trains_without_being_installed(tmp_path):
    code = ("import importlib.metadata as m; found = m.version; "
            "m.version = lambda name: found('no-such-package' if name == 'bnonly' else name);"
            "from bnonly.experiment import Spec; from bnonly.train import fit;"
            "print(fit(Spec(arch='resnet8', epochs=1))['status'])")
    assert python(code, env=dict(BNONLY_RUNS=str(tmp_path))).strip() == "complete"
