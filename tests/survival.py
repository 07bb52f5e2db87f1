"""Kill a run at random instants and compare what it ends with: python tests/survival.py [KILLS] writes
runs/bench/survival.json."""
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"   # a forked process must not inherit threads
import torch
from bnonly.experiment import Spec, load_record, run_dir, write
from bnonly.execution import kept, papermill
from bnonly.sweep import train_one
from bnonly.machine import machine
from bnonly.train import learner

SPEC = Spec(arch="resnet8", epochs=6)


def warm(spec):
    """Import everything and compile the forward pass. (A backward pass would start threads, which a fork does not
    survive.)"""
    papermill()
    learn = learner(spec)
    learn.create_opt()
    with torch.no_grad(): learn.model(next(iter(learn.dls.train))[0])


def start(spec, study):
    "The run in a process of its own, as a sweep trains it."
    process = multiprocessing.get_context("fork").Process(target=train_one, args=(spec, study))
    process.start()
    return process


def outcome(spec, study):
    "What two runs have to agree on: all metrics but the time, and the digest of the weights."
    folder = run_dir(spec, study)
    rows = (folder / "metrics.csv").read_text().splitlines()
    return [r.rpartition(",")[0] for r in rows], load_record(folder, deep=True)["files"]["moved.safetensors"]


def reached(folder):
    "How far a run had come: 'begun', an epoch, 'record' or 'notebook'."
    if (folder / "train.ipynb").exists(): return "notebook"
    if (folder / "record.json").exists(): return "record"
    return (
        f"epoch {(folder / 'metrics.csv').read_text().count(chr(10)) - 1}"
        if (folder / "metrics.csv").exists()
        else "begun"
    )


def survive(kills, spec=SPEC, seed=0):
    "Kill a run at random instants between its start and its end, and let it go on; one row a kill."
    draw, whole, rows = random.Random(seed), tempfile.mkdtemp(), []
    warm(spec)
    start(spec, whole).join()
    begun = time.monotonic()
    start(spec, tempfile.mkdtemp()).join()
    seconds = time.monotonic() - begun
    while len(rows) < kills:
        study, at = tempfile.mkdtemp(), draw.uniform(0, seconds)
        process = start(spec, study)
        process.join(at)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL: continue   # it was faster than the first and had ended
        hit = reached(run_dir(spec, study))
        start(spec, study).join()
        ends_alike = kept(run_dir(spec, study)) and outcome(spec, study) == outcome(spec, whole)
        left = [f for n in ("lock", ".*", "checkpoint*") for f in run_dir(spec, study).glob(n)]
        rows.append(dict(share=round(at / seconds, 3), hit=hit, equal=ends_alike and not left))
    return rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    rows = survive(int((sys.argv + ["50"])[1]))
    hits = {h: sum(r["hit"] == h for r in rows) for h in sorted({r["hit"] for r in rows})}
    result = dict(
        run=SPEC.key,
        kills=len(rows),
        equal=sum(r["equal"] for r in rows),
        hits=hits,
        machine=machine(torch.device("cpu")),
        rows=rows,
    )
    file = write(Path(__file__).parents[1] / "runs/bench/survival.json", json.dumps(result, indent=1) + "\n")
    print(f"{result['equal']} of {result['kills']} killed runs ended as if they had not been killed: {file}")
