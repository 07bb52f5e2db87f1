"The package as others install it: a wheel that works without a checkout."
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from bnonly.experiment import preset

ROOT = Path(__file__).parents[1]
NOTEBOOKS = {f.name for f in (ROOT / "nbs").glob("*.ipynb")}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "A folder with nothing but the installed wheel, built from what a checkout holds, without a network."
    for needed in ("pip", "setuptools"):
        if not find_spec(needed): pytest.skip(f"{needed} is not installed, so no wheel can be built")
    source, bare = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("bare")
    for name in ("bnonly", "nbs", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    measured = [f"runs/bench/{f.name}" for f in (ROOT / "runs/bench").glob("*.json")]
    for name in ("pyproject.toml", "README.md", "LICENSE", "settings.ini", *measured):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    how = "--quiet --no-index --no-build-isolation --no-deps --no-compile --disable-pip-version-check".split()
    subprocess.run([sys.executable, "-m", "pip", "install", *how, "--target", bare, source], check=True)
    return bare


@pytest.fixture(scope="module")
def away(tmp_path_factory):
    return tmp_path_factory.mktemp("away")


def run(bare, cwd, *command):
    "What a command of the wheel says, run in another folder."
    env = {k: v for k, v in os.environ.items() if not k.startswith("BNONLY_")}
    env |= dict(PYTHONPATH=str(bare), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, *command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def files(folder):
    return {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}


def test_the_wheel_holds_settings_and_notebooks_and_no_tests(bare):
    held = files(bare)
    assert {f"bnonly/project/nbs/{n}" for n in NOTEBOOKS} | {"bnonly/project/settings.ini", "bin/bnonly"} <= held
    assert {f"bnonly/{f}" for f in files(ROOT / "bnonly") if "__pycache__" not in f} <= held
    known = ("bnonly/", "bnonly-", "bin/")
    assert not [f for f in held if not f.startswith(known) or "test_" in f or "pyproject" in f]


def test_a_run_and_its_report_without_a_checkout(bare, away):
    "Records go to ./runs, figures and pages come from the notebooks inside the wheel, which stays as it is."
    before, command = files(bare), str(bare / "bin/bnonly")
    said = run(bare, away, command, "train", "--arch", "resnet8", "--epochs", "1")
    record = json.loads((away / "runs/scratch/resnet8,bn,digits,epochs=1,seed=0/record.json").read_text())
    assert record["status"] == "complete" and record["machine"]["commit"] is None and "accuracy" in said
    run(bare, away, command, "report", "scratch")
    folder = away / "runs/scratch/report"
    pages = {Path(n).stem for n in NOTEBOOKS} | {"claims", "runs", "settings"}
    assert {f"{name}.html" for name in pages} <= files(folder)
    assert (folder / "figures/fig02.svg").exists() and "trained one by one" in (folder / "settings.html").read_text()
    assert [f.name for f in away.iterdir()] == ["runs"] and files(bare) == before


def test_the_settings_of_the_wheel_name_its_studies(bare, away):
    "In one process: the package is the wheel's, and its studies, claims and prices are found."
    code = ("import bnonly; from bnonly.cli import main; from bnonly.prices import price; print(bnonly.__file__);"
            "main(['study', 'demo', '--dry-run']); main(['claims', 'scratch']); print(len(price('short')))")
    said = run(bare, away, "-c", code)
    n = len(preset("demo"))
    assert said.startswith(str(bare)) and f"demo: {n} of {n} runs to train" in said and " on digits, 1 epoch" in said
