"One run on several processes: what it ends with is what one process ends with."
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bnonly.experiment import Spec, load_record, run_dir
from bnonly.train import fit
from fastai.callback.core import Callback
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
SPEC = Spec(arch="resnet18", data="imagenet", policy="bn+output", epochs=2, batch_size=6, lr=.05)


class TwoParts(Callback):
    "In one process, normalize each half of a batch by its own statistics, and keep the running ones of the first."
    def before_fit(self):
        model, whole = self.learn.model, self.learn.model.forward

        def forward(x):
            if not model.training: return whole(x)
            first, second = x.tensor_split(2)
            before = {n: b.clone() for n, b in model.named_buffers()}
            second = whole(second)
            with torch.no_grad():
                for n, b in model.named_buffers(): b.copy_(before[n])
            return torch.cat([whole(first), second])
        model.forward = forward


@pytest.fixture
def photographs(tmp_path, monkeypatch):
    "15 to train on, which makes batches of 6, 6 and 3, so that the last parts differ in size; 8 to test on."
    rng = np.random.default_rng(0)
    for i in range(23):
        file = tmp_path / "imagenet" / ("train" if i < 15 else "val") / f"n{i % 2}" / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).resize((240, 240)).save(file)
    monkeypatch.setenv("BNONLY_DATA", str(tmp_path))


def launch(tmp_path, spec):
    code = tmp_path / "two.py"
    code.write_text(
        f"import torch\nfrom bnonly.experiment import Spec\nfrom bnonly.train import fit\ntorch.set_num_threads(1)\n"
        f"assert fit({spec}, 'two', dtype=torch.float32)['machine']['processes'] == 2\n"
    )
    return subprocess.run(
        [
            Path(sys.executable).parent / "accelerate",
            "launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            code,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_what_one_trains(tmp_path, photographs):
    pytest.importorskip("accelerate", reason="the extra parallel is not installed")
    done = launch(tmp_path, SPEC)
    assert done.returncode == 0, done.stderr
    one, two = fit(SPEC, "one", cbs=[TwoParts()], dtype=torch.float32), load_record(run_dir(SPEC, "two"), deep=True)
    rows = [pd.read_csv(run_dir(SPEC, o) / "metrics.csv").drop(columns="seconds") for o in ("one", "two")]
    pd.testing.assert_frame_equal(
        rows[0][rows[1].columns], rows[1], rtol=1e-4
    )  # one process also measures the embedding
    for numbers in ("counts", "final"):
        assert {k: one[numbers][k] for k in two[numbers]} == pytest.approx(two[numbers], rel=1e-4)
    weights = [load_file(run_dir(SPEC, o) / "moved.safetensors") for o in ("one", "two")]
    for n in weights[0]: torch.testing.assert_close(weights[1][n], weights[0][n], rtol=1e-3, atol=1e-4)
    assert sorted(f.name for f in run_dir(SPEC, "two").iterdir()) == [
        "metrics.csv",
        "moved.safetensors",
        "record.json",
        "trajectory.safetensors",
    ]
