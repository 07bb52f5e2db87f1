"One run, from every door a user can come through."
import copy
import gc
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from bnonly import checkpoint, native
from bnonly.checkpoint import read_state, save_state
from bnonly.data import describe, load_data, loaders
from bnonly.experiment import BrokenRecord, Spec, load_record, results, run_dir
from bnonly.features import restore
from bnonly.native import kernels
from bnonly.models import Conv2d, FixupConv
from bnonly.norms import affine_table, zero_rates
from bnonly.policies import RandomEntries
from bnonly.train import bf16_is_faster, fit, learner, prepare
from bnonly.trajectory import trajectory
from fastai.callback.core import Callback
from fastai.learner import Learner

ROOT = Path(__file__).parents[1]
TINY = Spec(arch="resnet8", epochs=2)


def papermill(out, *args, cwd=ROOT, notebook="nbs/04_train.ipynb"):
    return subprocess.run(
        [sys.executable, "-m", "papermill", notebook, str(out), *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize(
    "cwd,notebook", [(ROOT, "nbs/04_train.ipynb"), (ROOT / "nbs", "04_train.ipynb")], ids=["root", "nbs"]
)
def test_papermill_trains_what_fit_trains(tmp_path, cwd, notebook):
    done = papermill(tmp_path / "out.ipynb", "-p", "arch", "resnet8", "-p", "epochs", "1", cwd=cwd, notebook=notebook)
    assert done.returncode == 0, done.stderr
    record = load_record(run_dir(Spec(arch="resnet8", epochs=1)))
    assert record["spec"]["arch"] == "resnet8" and record["status"] == "complete"


@pytest.mark.parametrize(
    "name,value,answer",
    [("archh", "resnet56", "the nearest is 'arch'"), ("arch", "resnet57", "the nearest is 'resnet56'")],
)
def test_papermill_refuses_a_mistake_and_trains_nothing(tmp_path, name, value, answer):
    done = papermill(tmp_path / "out.ipynb", "-p", name, value)
    assert done.returncode != 0 and answer in done.stderr
    assert len(results()) == 0


@pytest.mark.parametrize("policy", ["all", "all-affine", "bn", "bn+output", "random2", "scattered2", "none"])
def test_restored_networks_give_the_same_logits(policy):
    kept = {}

    class Keep(Callback):
        def after_fit(self): kept["model"] = self.learn.model
    spec = replace(TINY, policy=policy, epochs=1)
    assert fit(spec, cbs=[Keep()])["status"] == "complete"
    x = load_data("digits").test.x.permute(0, 3, 1, 2).float()
    with torch.no_grad():
        assert torch.equal(restore(spec)(x), kept["model"].eval()(x))


def test_a_name_stands_for_one_data_set():
    "Images of another name are not filed under it, and a record of other images is not theirs."
    digits, spec = load_data("digits"), replace(TINY, epochs=1)
    with pytest.raises(ValueError, match="data 'mine' is not the 'digits' of resnet8.*give load_data"):
        fit(spec, data=replace(digits, name="mine"))
    with pytest.raises(
        ValueError, match=f"other images than those of its digest {digits.digest}; bnonly.data.describe"
    ):
        fit(spec, data=replace(digits, train=digits.test))
    assert len(results()) == 0
    record = fit(spec, data=digits)
    fewer = describe(
        "digits",
        "fewer",
        replace(digits.train, x=digits.train.x[:256], y=digits.train.y[:256]),
        digits.test,
        digits.classes,
    )
    with pytest.raises(
        ValueError,
        match=f"other images .digits, digest {digits.digest}. than data holds "
        f".fewer, digest {fewer.digest}.; name another study",
    ):
        fit(spec, data=fewer)
    assert fit(spec, data=digits) == record == fit(spec) and fit(spec, "fewer", data=fewer)["images"] == "fewer"


class Stop(Callback):
    "Stop as a user would, after some epochs."
    order = 70
    def __init__(self, epochs): self.left = epochs
    def after_epoch(self):
        self.left -= 1
        if not self.left: raise KeyboardInterrupt


@pytest.mark.parametrize("policy", ["bn", "all", "random2"])
def test_a_stopped_run_goes_on_bit_for_bit(policy):
    spec = replace(TINY, policy=policy, epochs=4)
    whole = fit(spec, "whole")
    for n in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            fit(spec, "parts", cbs=[Stop(n)])
    parts = fit(spec, "parts")
    drop = lambda r: pd.read_csv(run_dir(spec, r) / "metrics.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(drop("whole"), drop("parts"))
    assert whole["files"]["moved.safetensors"] == parts["files"]["moved.safetensors"]
    assert not (run_dir(spec, "parts") / "checkpoint.safetensors").exists()


def test_a_record_tells_of_all_parts_of_its_run(monkeypatch):
    "A run goes on in the dtype and on the images that it began with; what a killed process left half written goes."
    data = load_data("digits")
    monkeypatch.setattr("bnonly.train.default_dtype", lambda *_: torch.bfloat16)
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, cbs=[Stop(1)])
    monkeypatch.setattr("bnonly.train.default_dtype", lambda *_: torch.float32)
    with pytest.raises(
        ValueError,
        match=f"{run_dir(TINY)} holds a run that began with dtype 'bfloat16', not 'float32'; .*delete the folder",
    ):
        fit(TINY, dtype=torch.float32)
    other = describe("digits", "turned", data.test, data.train, data.classes)
    with pytest.raises(
        ValueError,
        match=f"{run_dir(TINY)} holds a run that began with data_digest '{data.digest}', "
        f"not '{other.digest}'; .*delete the folder",
    ):
        fit(TINY, data=other)
    (run_dir(TINY) / ".abc.tmp").write_text("half a checkpo")
    record = fit(TINY)
    assert (record["dtype"], record["callbacks"], record["final"]["epoch"]) == ("bfloat16", ["Stop"], 2)
    assert sorted(f.name for f in run_dir(TINY).iterdir()) == [
        "metrics.csv",
        "moved.safetensors",
        "record.json",
        "trajectory.safetensors",
    ]


def test_a_checkpoint_that_tells_less_is_gone_on_from(monkeypatch):
    "As older versions wrote it: no digest of the images, no dtype, no callbacks."
    with monkeypatch.context() as m:
        m.setattr(checkpoint, "save_state", lambda learn, path, rows, **part: save_state(learn, path, rows))
        with pytest.raises(KeyboardInterrupt):
            fit(TINY, "old", cbs=[Stop(1)])
    assert set(read_state(run_dir(TINY, "old") / "checkpoint.safetensors")[0]) == {"rows", "random"}
    assert fit(TINY, "old")["final"] == fit(TINY, "whole")["final"]


def test_a_record_that_was_cut_off_is_refused_and_kept():
    fit(TINY)
    file = run_dir(TINY) / "record.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(BrokenRecord, match="cut off or edited"):
        fit(TINY)
    assert len(file.read_text()) == 100


def test_what_is_kept_of_each_step_is_no_tensor():
    "Thousands of them, between freed activations, would make memory grow with every epoch."
    class Keep(Callback):
        def after_fit(self): Keep.losses = self.recorder.losses
    fit(Spec(arch="mlp2-10", norm="none", policy="all", epochs=2), cbs=Keep, device="cpu")
    assert len(Keep.losses) == 2*12 and all(type(l) is float for l in Keep.losses) and Keep.losses[-1] < Keep.losses[0]


def _one_pixel_layers():
    torch.manual_seed(0)
    plain, fixup = Conv2d(64, 64, 3, 2, 1), FixupConv(Conv2d(64, 64, 3, 2, 1), last=True)
    torch.nn.init.normal_(fixup.weight)
    with torch.no_grad(): fixup.reset()
    few = copy.deepcopy(plain)
    torch.nn.utils.parametrize.register_parametrization(
        few, "weight", RandomEntries(few.weight, torch.arange(0, few.weight.numel(), 7))
    )
    return dict(plain=plain, fixup=fixup, few=few)


@pytest.mark.parametrize("kernels_", ["fused", "plain"])
@pytest.mark.parametrize("layer", ["plain", "fixup", "few"])
def test_an_image_of_one_pixel_leaves_no_gradient_unwritten(layer, kernels_, monkeypatch):
    "PyTorch 2.15 writes nothing at some places of such a weight's gradient, in bfloat16 on a CPU."
    monkeypatch.setenv("BNONLY_KERNELS", kernels_)
    kernels.cache_clear()
    conv, x = _one_pixel_layers()[layer], torch.randn(32, 64, 1, 1)
    made, want = prepare(torch.nn.Sequential(copy.deepcopy(conv)), torch.device("cpu"), torch.bfloat16), conv(x)
    want.square().sum().backward()
    for _ in range(5):
        junk = [torch.full((64, 64, 3, 3), float("nan"), dtype=torch.bfloat16) for _ in range(8)]
        del junk   # what is not written holds it
        got = made(x)
        assert (got - want).norm() < .02*want.norm()
        grads = torch.autograd.grad(got.float().square().sum(), tuple(made.parameters()))
        found, true = (torch.cat([g.flatten() for g in o]) for o in (grads, [p.grad for p in conv.parameters()]))
        assert (found - true).norm() < .04*true.norm()
    kernels.cache_clear()


def test_a_run_that_ends_with_nan_in_its_weights_is_not_complete():
    class Spoil(Callback):
        def after_epoch(self): self.learn.model.get_parameter("fc.bias").data[0] = float("nan")
    assert fit(Spec(arch="resnet8", policy="all", epochs=1), cbs=[Spoil()], device="cpu")["status"] == "diverged"


def test_divergence_is_a_result():
    record = fit(replace(TINY, lr=1000., policy="all"))
    assert record["status"] == "diverged" and results().status.tolist() == ["diverged"]


def test_the_learning_rate_of_every_step_is_the_papers():
    "160 epochs: 0.1 until epoch 80, 0.01 until 120, then 0.001, changed at the first step of an epoch."
    seen = []

    class Watch(Callback):
        def after_batch(self):
            if self.training: seen.append(self.opt.hypers[-1]["lr"])
    spec = Spec(arch="resnet8", epochs=8, batch_size=512)
    learner(spec, cbs=[Watch()]).fit(spec.epochs)
    n = len(seen) // 8
    assert seen == pytest.approx([.1] * 4*n + [.01] * 2*n + [.001] * 2*n)


def test_what_the_recipe_moves_is_what_the_formula_moves():
    "A whole epoch of the Learner beside a plain loop with PyTorch's SGD, in float32: equal weights."
    from bnonly.data import loaders
    from bnonly.models import create_model
    from bnonly.policies import freeze, trainable
    from bnonly.train import loss_func
    data, spec = load_data("digits"), replace(TINY, epochs=1)
    learn = learner(spec, data, dtype=torch.float32)
    learn.fit(1)
    model = prepare(freeze(create_model("resnet8", 10, 1), "bn"), torch.device("cpu"), torch.float32)
    opt = torch.optim.SGD(trainable(model).values(), lr=.1, momentum=.9, weight_decay=1e-4)
    train, _ = loaders(data, 128, 0)
    steps = list(train)
    for i, (x, y) in enumerate(steps):
        for g in opt.param_groups: g["lr"] = .1 * .1**((i >= len(steps)/2) + (i >= 3*len(steps)/4))
        opt.zero_grad()
        loss_func(model(x), y).backward()
        opt.step()
    for name, p in trainable(model).items():
        torch.testing.assert_close(learn.model.get_parameter(name), p)


def test_an_imagenet_resnet_trains_from_files(tmp_path, monkeypatch):
    "B.2's recipe from an ImageFolder: six photographs of noise, two classes, one epoch."
    from PIL import Image
    import numpy as np
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for i, wnid in enumerate(["n01", "n02"] * 3):
            file = tmp_path / "imagenet" / split / wnid / f"{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (70, 60, 3), dtype=np.uint8)).save(file)
    (tmp_path / "imagenet/val/n01/broken.JPEG").write_bytes(b"no photograph")
    monkeypatch.setenv("BNONLY_DATA", str(tmp_path))
    with pytest.warns(UserWarning, match="1 of 7 images cannot be decoded and are left out: .*broken.JPEG"):
        record = fit(Spec(arch="resnet18", data="imagenet", schedule="imagenet", lr=.4, epochs=1, batch_size=3))
    assert record["status"] == "complete" and record["shape"] == dict(num_classes=2, in_channels=3, size=224)
    assert record["undecodable"] == dict(count=1, names="val/n01/broken.JPEG") and record["final"]["top5"] == 100


def test_the_readmes_examples_run(tmp_path):
    "One after the other, in an empty folder; the first fits in a glance."
    blocks = [block.split("```")[0] for block in (ROOT / "README.md").read_text().split("```python\n")[1:]]
    assert len(blocks) == 3 and len([line for line in blocks[0].splitlines() if line.strip()]) <= 12
    done = subprocess.run([sys.executable, "-c", "\n".join(blocks)], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stderr
    assert "8288" in done.stdout and "accuracy" in done.stdout and "807400" in done.stdout


def test_a_copy_of_a_network_computes_with_its_own_weights():
    import pickle
    fit(TINY)
    model, x = restore(TINY), load_data("digits").test.x.permute(0, 3, 1, 2).float()
    with torch.no_grad():
        before = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(x), before)
            for p in twin.parameters(): p.zero_()
            assert not twin(x).any() and torch.equal(model(x), before)


def test_a_trained_network_is_let_go():
    """A Learner and its callbacks hold each other; a sweep must not keep its networks until Python happens to look for
    such."""
    gc.collect()
    gc.disable()
    try:
        fit(TINY)
        assert not [o for o in gc.get_objects() if isinstance(o, Learner)]
    finally: gc.enable()


@pytest.mark.parametrize("pytorch, float16, arch, answer", [
    ("all", False, "resnet14", True), ("all", False, "mlp4-784", True),
    ("direct", False, "resnet50", True), ("direct", False, "mlp4-784", False), ("direct", False, "lenet5", False),
    ("none", False, "resnet14", True), ("none", False, "vgg16", True), ("none", False, "wrn8-0.125", False),
    ("none", False, "efficientnet-b0", False), ("none", False, "resnet50", False), ("none", True, "resnet50", True),
    ("none", None, "resnet14", False), ("direct", None, "resnet14", True)])
def test_where_bf16_is_faster(pytorch, float16, arch, answer, monkeypatch):
    "By who convolves bfloat16 faster, and whether the kernels multiply in float16 (None: there are no kernels)."
    monkeypatch.setattr("bnonly.train.pytorch_convolves_bfloat16", lambda: pytorch)
    monkeypatch.setattr(
        "bnonly.train.kernels", lambda: None if float16 is None else {torch.bfloat16: SimpleNamespace(float16=float16)}
    )
    assert bf16_is_faster(arch) is answer


def test_fixup_has_no_bfloat16_where_pytorch_is_slow_in_it(monkeypatch):
    "Its convolutions are PyTorch's, which without AVX-512 multiplies bfloat16 in a plain loop."
    for pytorch, answer in (("none", False), ("direct", True), ("all", True)):
        monkeypatch.setattr("bnonly.train.pytorch_convolves_bfloat16", lambda: pytorch)
        assert bf16_is_faster("wrn10-1", "fixup") is answer


@pytest.mark.parametrize(
    "cap, features",
    [("AVX2", set()), ("AVX512_CORE", set()), ("avx512_core_bf16", {"avx512_bf16"}), ("", {"avx512_bf16", "amx_bf16"})],
)
def test_pytorch_is_held_to_what_the_environment_allows(cap, features, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict(avx512_bf16=True, amx_bf16=True))
    assert native.pytorch_features() == features



def test_a_run_that_a_callback_ends_early_has_no_record():
    from fastai.callback.core import CancelFitException

    class Early(Callback):
        order = 70   # after the Checkpointer has written the epoch
        def after_epoch(self): raise CancelFitException
    with pytest.raises(RuntimeError, match="ended after 1 of 2 epochs"):
        fit(TINY, cbs=[Early()])
    assert len(results()) == 0 and fit(TINY)["final"]["epoch"] == 2


def test_a_record_that_appears_while_one_trains_is_left_alone():
    "Two processes on one run: the second to finish must not touch what the first has sealed."
    class Other(Callback):
        order = 70
        def after_epoch(self):
            if self.epoch == 0: (run_dir(TINY) / "record.json").write_text("sealed by another")

    with pytest.raises(
        BrokenRecord, match="not as it was sealed"
    ):  # what stands there is told, not what was trained beside it
        fit(TINY, cbs=[Other()])
    assert (run_dir(TINY) / "record.json").read_text() == "sealed by another"


def test_two_who_fit_one_run_train_it_once():
    "The second says whom it waits for and gets the same record; a reader of a finished run needs to write nothing."
    from threading import Event, Thread
    begun, noticed, trained, records = Event(), Event(), [], []

    class Count(Callback):
        order = 70
        def after_epoch(self):
            trained.append(self.epoch)
            begun.set()
            assert noticed.wait(600)
    class Waits(logging.Handler):
        def emit(self, record): "is being trained by process" in record.getMessage() and noticed.set()
    logging.getLogger("bnonly").addHandler(waits := Waits())
    first = Thread(target=lambda: records.append(fit(TINY, cbs=[Count()])))
    first.start()
    assert begun.wait(600)
    records.append(fit(TINY, cbs=[Count()]))
    first.join()
    logging.getLogger("bnonly").removeHandler(waits)
    assert noticed.is_set() and trained == [0, 1] and records[0] == records[1]
    assert not (run_dir(TINY) / "lock").exists()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder that nobody can write to")
def test_a_folder_that_cannot_be_written_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", "/proc/runs")
    with pytest.raises(OSError, match="/proc/runs/.* could not be written .*; free space or set BNONLY_RUNS"):
        fit(TINY)


@pytest.mark.parametrize("decay, decays", [("all", {"weight", "bias"}), ("gamma", {"weight"}), ("beta", {"bias"})])
def test_weight_decay_may_spare_gamma_or_beta(decay, decays):
    "With a learning rate and no gradient, one step shrinks exactly what decays."
    spec = Spec(arch="resnet8", policy="bn", decay=decay, weight_decay=.1, lr=1.)
    learn = learner(spec)
    learn.create_opt()
    learn.opt.set_hyper("lr", 1.)
    params = {n: p for n, p in learn.model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in params.values(): p.fill_(1.)
    for p in params.values(): p.grad = torch.zeros_like(p)
    learn.opt.step()
    assert {n.rpartition(".")[2] for n, p in params.items() if (p < 1).all()} == decays
    assert all((p == 1).all() or (p < 1).all() for p in params.values())


def test_decay_has_one_name_where_there_is_nothing_to_spare():
    assert (
        Spec(decay="beta", weight_decay=0.0).key == Spec(weight_decay=0.0).key
        and "decay=beta" in Spec(decay="beta").key
    )
    assert Spec(decay="beta", policy="all-affine").decay == "all"
    with pytest.raises(ValueError, match="decay 'gama' is not one of all, gamma, beta; the nearest is 'gamma'"):
        Spec(decay="gama")


def test_a_run_keeps_what_its_channels_became_and_goes_on_with_it():
    "Twenty looks or one an epoch, the last of them what was trained; the same when it was stopped in between."
    spec = Spec(arch="resnet8", epochs=3)
    whole = fit(spec, "whole")
    assert whole["files"].keys() == {"metrics.csv", "moved.safetensors", "trajectory.safetensors"}
    kept = safetensors.torch.load_file(run_dir(spec, "whole")/"trajectory.safetensors")
    assert kept["epoch"].tolist() == [0, 1, 2, 3] and kept["zero"].shape == kept["gamma"].shape == kept["beta"].shape
    model, digits = restore(spec, "whole"), load_data("digits")
    assert torch.equal(kept["gamma"][-1], torch.from_numpy(affine_table(model)["gamma"]).half())
    assert np.allclose(kept["zero"][-1], zero_rates(model, loaders(digits, 500)[1]), atol=2e-3, equal_nan=True)
    with pytest.raises(KeyboardInterrupt): fit(spec, "parts", cbs=[Stop(2)])
    parts = fit(spec, "parts")
    assert parts["files"]["trajectory.safetensors"] == whole["files"]["trajectory.safetensors"]
    assert "trajectory.safetensors" not in fit(replace(spec, policy="output", epochs=1))["files"]


def test_a_look_at_every_twentieth_of_a_long_run(tmp_path):
    looks, = trajectory(Spec(epochs=160), load_data("digits"), tmp_path, torch.device("cpu"))
    looks.learn, seen = SimpleNamespace(n_epoch=160), []
    looks.look = seen.append
    for looks.learn.epoch in range(160): looks.after_epoch()
    assert seen == [*range(8, 161, 8)]


def test_a_record_says_what_it_was_computed_with():
    record = fit(Spec(arch="resnet8", epochs=1))
    assert record["machine"]["instructions"] == torch.backends.cpu.get_cpu_capability()
    assert (
        record["machine"]["kernels"] == (kernels()[torch.float32].instructions if kernels() else "plain")
        and "earlier_machines" not in record
    )


def test_a_record_names_the_machines_of_all_its_parts(monkeypatch):
    spec = Spec(arch="resnet8", epochs=2)
    with monkeypatch.context() as m:
        m.setattr(
            checkpoint, "machine", lambda device, real=checkpoint.machine: dict(real(device), processor="another")
        )
        with pytest.raises(KeyboardInterrupt): fit(spec, cbs=[Stop(1)])
    record = fit(spec)
    assert [m["processor"] for m in record["earlier_machines"]] == ["another"] != [record["machine"]["processor"]]
