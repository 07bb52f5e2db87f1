"Watching a run leaves TensorBoard's and W&B's files, and neither its name nor its numbers change."
import sys

import pytest
from bnonly.experiment import Spec, run_dir
from bnonly.train import fit, trackers

SPEC = Spec(arch="resnet8", epochs=2)


@pytest.fixture(scope="module")
def unwatched(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("BNONLY_RUNS", str(tmp_path_factory.mktemp("runs")))
        m.delenv("BNONLY_TRACK", raising=False)
        assert trackers(SPEC, run_dir(SPEC)) == []
        record = fit(SPEC)
        assert sorted(f.name for f in run_dir(SPEC).iterdir()) == ["metrics.csv", "moved.safetensors", "record.json", "trajectory.safetensors"]
        return record


def same(one, other):
    return all(one[k] == other[k] for k in ("spec", "final", "callbacks")) and one["files"]["moved.safetensors"] == other["files"]["moved.safetensors"]


def test_tensorboard(unwatched, monkeypatch):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install 'bnonly[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    monkeypatch.setenv("BNONLY_TRACK", "tensorboard")
    record = fit(SPEC)
    assert same(record, unwatched)
    seen = EventAccumulator(str(run_dir(SPEC) / "tensorboard")).Reload()
    assert {"train_loss", "valid_loss", "accuracy", "lr_0"} <= set(seen.Tags()["scalars"])
    told = [100 * e.value for e in seen.Scalars("accuracy")]
    assert len(told) == 2 and told[-1] == pytest.approx(record["final"]["accuracy"], abs=1e-3)


def test_wandb_offline(unwatched, monkeypatch):
    pytest.importorskip("wandb", reason="W&B is not installed: pip install 'bnonly[wandb]'")
    for name, value in dict(BNONLY_TRACK="wandb", WANDB_MODE="offline", WANDB_SILENT="true", WANDB_ERROR_REPORTING="false").items():
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
        trackers(SPEC, tmp_path)
    monkeypatch.setenv("BNONLY_TRACK", "wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"needs wandb, which is not installed; pip install 'bnonly\[wandb\]'"):
        trackers(SPEC, tmp_path)
