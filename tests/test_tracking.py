"Watching a run leaves TensorBoard's and W&B's files, and neither its name nor its numbers change."
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from bnonly.experiment import Spec, run_dir
from bnonly.trackers import trackers
from bnonly.train import fit
from fastai.callback.core import Callback
from test_train import Stop

ROOT = Path(__file__).parents[1]
SPEC = Spec(arch="resnet8", epochs=2)


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BNONLY_RUNS", str(tmp_path_factory.mktemp("runs")))
        m.delenv("BNONLY_TRACK", raising=False)
        with trackers(SPEC, run_dir(SPEC)) as found: assert found == []
        record = fit(SPEC)
        assert sorted(f.name for f in run_dir(SPEC).iterdir()) == [
            "metrics.csv",
            "moved.safetensors",
            "record.json",
            "trajectory.safetensors",
        ]
        return record


def same(one, other):
    return (
        all(one[k] == other[k] for k in ("spec", "final", "callbacks"))
        and one["files"]["moved.safetensors"] == other["files"]["moved.safetensors"]
    )


def test_tensorboard(unwatched, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'bnonly[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("BNONLY_TRACK", "tensorboard")
    record = fit(SPEC)
    assert same(record, unwatched)
    seen = EventAccumulator(str(run_dir(SPEC) / "tensorboard")).Reload()
    assert {"train_loss", "valid_loss", "accuracy", "lr_0"} <= set(seen.Tags()["scalars"])
    logged = [100 * e.value for e in seen.Scalars("accuracy")]
    assert len(logged) == 2 and logged[-1] == pytest.approx(record["final"]["accuracy"], abs=1e-3)


def test_tensorboards_curves_go_on(monkeypatch):
    "Cut off in the middle of an epoch: no step is missing and none is there twice."
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'bnonly[tensorboard]'")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    monkeypatch.setenv("BNONLY_TRACK", "tensorboard")

    class Cut(Callback):
        def after_batch(self):
            if self.training and self.epoch == 1 and self.iter == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(SPEC, cbs=Cut)
    fit(SPEC)
    found = {}
    for file in run_dir(SPEC).glob("tensorboard/events*"):
        for e in EventFileLoader(str(file)).Load():
            for v in e.summary.value: found.setdefault(v.tag, []).append(e.step)
    assert sorted(found["train_loss"]) == [*range(1, 25)] and sorted(found["accuracy"]) == sorted(found["lr_0"]) == [
        12,
        24,
    ]


def test_a_run_of_wandb_goes_on_under_its_id_and_group(monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed: pip install 'bnonly[wandb]'")
    import wandb
    offline = dict(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false")
    for name, value in dict(BNONLY_TRACK="wandb", **offline).items():
        monkeypatch.setenv(name, value)
    asked = []
    monkeypatch.setattr(wandb, "init", lambda real=wandb.init, **how: asked.append(how) or real(**how))
    with pytest.raises(KeyboardInterrupt): fit(SPEC, "mine", cbs=Stop(1))
    fit(SPEC, "mine")
    assert asked[0]["id"] == asked[1]["id"] and {a["group"] for a in asked} == {"mine"} and wandb.run is None
    fit(SPEC, "other")
    assert asked[2]["id"] != asked[0]["id"] and asked[2]["group"] == "other"


def test_wandb_without_a_key_is_answered_before_anything_is_read(tmp_path):
    "In a process of its own: W&B remembers the mode of an earlier run."
    pytest.importorskip("wandb", reason="W&B is not installed: pip install 'bnonly[wandb]'")
    env = {n: v for n, v in os.environ.items() if n not in ("WANDB_API_KEY", "WANDB_MODE")}
    env |= dict(BNONLY_TRACK="wandb", HOME=str(tmp_path), WANDB_SILENT="true", WANDB_ERROR_REPORTING="false",
                PYTHONPATH=str(ROOT))
    code = f"import bnonly.train as t; from bnonly.experiment import Spec; t.load_data = None; t.fit({SPEC!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    answer = "cannot start a run .*; run wandb login or set WANDB_API_KEY, or set WANDB_MODE=offline"
    assert re.search(f"ValueError: .*{answer}", done.stderr)


def test_wandb_offline(unwatched, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed: pip install 'bnonly[wandb]'")
    for name, value in dict(
        BNONLY_TRACK="wandb", WANDB_MODE="offline", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false"
    ).items():
        monkeypatch.setenv(name, value)
    record = fit(SPEC)
    assert same(record, unwatched)
    import wandb
    assert wandb.run is None
    file, = run_dir(SPEC).glob("wandb/offline-run-*/*.wandb")
    content = file.read_bytes()
    assert all(word in content for word in (b"accuracy", b"train_loss", SPEC.key.encode()))


def test_a_tracker_that_is_none_or_not_installed_is_answered_by_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("BNONLY_TRACK", "tensorbord")
    with pytest.raises(ValueError, match="the nearest is 'tensorboard'"):
        trackers(SPEC, tmp_path).__enter__()
    monkeypatch.setenv("BNONLY_TRACK", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"needs wandb, which is not installed; pip install 'bnonly\[wandb\]'"):
        trackers(SPEC, tmp_path).__enter__()
