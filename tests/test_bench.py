"The benchmark from the command line, and what stands between the shell and the first step."
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bnonly.bench import bench_goals, bench_kernels, bench_steps
from bnonly.bounds import work
from bnonly.experiment import runs_dir
from bnonly.cli import main
from bnonly.native import kernels
from bnonly.peers import candidates, processes, seconds_of, tick


def test_a_row_of_the_benchmark(capsys, monkeypatch):
    "Some candidates in processes of their own, two turns of the smallest network. (To compile takes minutes.)"
    monkeypatch.setattr("bnonly.bench.candidates", lambda *_: ["bnonly", "torch", "tuned torch"])
    main(["bench", "--archs", "resnet8", "--policies", "bn", "--rounds", "1", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert {"arch", "policy", "device", "dtype", "images_per_second", "low", "high", "ratio", "peers", "bound"} <= set(
        row
    )
    assert set(row["peers"]) == {"torch", "tuned torch"} and row["ratio"] == min(
        p["ratio"] for p in row["peers"].values()
    )
    assert 0 < row["low"] <= row["images_per_second"] <= row["high"] and row["multiply_ms"] > 0 and row["move_ms"] > 0
    written, = (runs_dir() / "bench").glob(f"{row['device']}*,resnet8,bn.json")
    record = json.loads(written.read_text())
    assert record["rows"] == [row] and record["gemm_flops"] > 0 and record["machine"]["torch"]


@pytest.mark.parametrize(
    "argv,answer",
    [
        (["--archs", "resnet57"], "the nearest is 'resnet56'"),
        (["--policies", "bm"], "the nearest is 'bn'"),
        (["--open-lth", "nowhere"], "name a checkout"),
        (["--before", "nowhere"], "name a checkout"),
    ],
)
def test_the_benchmark_refuses_a_mistake_before_it_starts(argv, answer):
    with pytest.raises(SystemExit, match=answer):
        main(["bench", *argv])


def test_a_step_beside_that_of_another_commit(capsys, tmp_path):
    "Here of this one, from a copy, whose kernels are those of this one."
    copy = shutil.copytree(Path(__file__).parents[1] / "bnonly", tmp_path / "bnonly").parent
    main(["bench", "--before", str(copy), "--archs", "resnet8", "--policies", "bn", "--rounds", "1", "--json"])
    row = json.loads(capsys.readouterr().out)
    assert row["ratio"] == round(row["images_per_second"] / row["before"]["images_per_second"], 3)
    written, = (runs_dir() / "bench").glob("*,before,resnet8,bn.json")
    assert json.loads(written.read_text())["rows"] == [row] and json.loads(written.read_text())["before"] is None
    with processes(["bnonly"], package=copy) as found:
        assert os.path.samefile(f"/proc/{found['bnonly'].pipe.pid}/cwd", copy)


def test_a_benchmark_that_is_cut_off_says_so(monkeypatch):
    "And its processes do not hear Ctrl-C: they end with their standard input."
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr("bnonly.bench.bench", stop)
    with pytest.raises(SystemExit, match="keeps no record"):
        main(["bench"])
    with processes(["torch"]) as found:
        assert os.getsid(found["torch"].pipe.pid) != os.getsid(0)
    assert found["torch"].pipe.returncode == 0


def test_goals_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(
        "bnonly.bench.bench_goals", lambda say: say(dict(what="160 epochs of resnet14", goal=30, measured=25.5))
    )
    main(["bench", "--goals"])
    assert capsys.readouterr().out == "160 epochs of resnet14: 25.5 (the goal, on one H200: 30)\n"


def test_goals_are_measured_on_whole_runs():
    "Two epochs of the smallest network on digits, one seed and five at once."
    found = bench_goals(
        "digits", ["160 epochs of resnet8", "five seeds of resnet8 beside one"], 2, say=lambda row: None
    )
    assert [r["what"].split()[0] for r in found["rows"]] == ["160", "five"] and all(
        r["measured"] > 0 for r in found["rows"]
    )
    assert json.loads(next((runs_dir() / "bench").glob("*,goals.json")).read_text()) == found


def test_steps_that_price_a_study(monkeypatch, capsys):
    monkeypatch.setattr(
        "bnonly.bench.bench_steps",
        lambda say, steps=bench_steps: steps(((32, 2, ("resnet8",), ("bn", "random2")),), say),
    )
    main(["bench", "--steps", "--json"])
    rows = [json.loads(l) for l in capsys.readouterr().out.splitlines()]
    assert [(r["arch"], r["policy"]) for r in rows] == [("resnet8", "bn"), ("resnet8", "random2")] and all(
        r["milliseconds_per_image"] > 0 for r in rows
    )
    written, = (runs_dir() / "bench").glob("cpu,*,steps.json")
    assert json.loads(written.read_text())["rows"] == rows


def test_only_steps_after_the_warm_up_are_timed():
    ends = []
    for n in range(8): tick(ends, 8)
    assert len(seconds_of(ends)) == 5 and sum(seconds_of(ends)) == pytest.approx(ends[-1] - ends[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_entries_cost_little_more_than_none(dtype):
    "Two for each output channel of ResNet-14 (channels, pixels of its side), two operations for each at each position."
    layers = [(16, 32)]*5 + [(32, 16)]*5 + [(64, 8)]*5  # the shortcuts' among them
    assert work("resnet14", "random2", 1, dtype)[0] - work("resnet14", "bn", 1, dtype)[0] == sum(
        2 * side**2 * 2 * channels for channels, side in layers
    )


START = """
import sys
from bnonly.experiment import Spec
from bnonly.train import learner
from fastai.callback.core import Callback, CancelFitException
class First(Callback):
    def after_batch(self): raise CancelFitException
learn = learner(Spec(), cbs=[First()])
learn.fit(1)
print(*(m for m in ("torchvision", "accelerate") if m in sys.modules))
"""


def test_neither_torchvision_nor_accelerate_is_imported_before_the_first_step_ends():
    "ResNet-14 on digits, which needs neither."
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", START], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_a_kernel_beside_pytorchs_operator(monkeypatch, capsys):
    "Every kernel for both dtypes; the record is named by the instruction set."
    if kernels() is None: pytest.skip("there are no kernels here")
    monkeypatch.setattr("bnonly.bench.bench_kernels", lambda say, real=bench_kernels: real([(16, 4)], 1, say))
    main(["bench", "--kernels", "--json"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 10 and all(r["ms"] > 0 and r["pytorch_ms"] > 0 for r in rows)
    written = runs_dir() / "bench" / f"cpu,{kernels()[torch.float32].instructions},kernels.json"
    assert json.loads(written.read_text())["rows"] == rows


def test_the_peers_that_can_run_here(monkeypatch):
    monkeypatch.setattr("bnonly.peers.multiplies_bfloat16", lambda device: False)
    assert candidates() == ["bnonly", "fastai", "torch", "tuned torch", "compiled torch"]
    monkeypatch.setattr("bnonly.peers.multiplies_bfloat16", lambda device: True)
    assert {"open_lth", "tuned torch, bfloat16", "compiled torch, bfloat16"} <= {*candidates("a checkout")}
