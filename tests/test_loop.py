"The training loop as fastai's users use it: methods, callbacks, what is said, and what is refused."
import errno
import io
import logging
import os
import subprocess
import sys
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from bnonly import checkpoint
from bnonly.checkpoint import read_state
from bnonly.data import describe, load_data
from bnonly.distributed import check_batches
from bnonly.experiment import Spec, run_dir
from bnonly.loading import part
from bnonly.logs import logger, quiet
from bnonly.policies import trained_state
from bnonly.sealed import digest_tensors
from bnonly.train import fit, learner
from fastai.callback.core import Callback
from test_train import Stop

matplotlib.use("Agg")
TINY = Spec(arch="resnet8", epochs=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    import fastai.callback.hook  # noqa: F401 for summary
    learn = learner(TINY, device="cpu")
    learn.path = tmp_path_factory.mktemp("learner")
    learn.fit(1)
    return learn


# What a Learner answers.

def test_predictions_are_probabilities_and_classes_of_all_images(trained):
    p, y, classes, loss = trained.get_preds(with_decoded=True, with_loss=True)
    assert p.shape == (360, 10) and torch.allclose(p.sum(1), torch.ones(360), atol=1e-5)
    assert torch.equal(y, load_data("digits").test.y) and torch.equal(classes, p.argmax(1))
    assert torch.allclose(loss, -p.gather(1, y[:, None])[:, 0].log(), atol=1e-4)
    trains, y = trained.get_preds(ds_idx=0)   # in order, as they are
    assert torch.equal(y, load_data("digits").train.y) and len(trains) == 1437
    assert trained.validate()[1] == pytest.approx((classes == load_data("digits").test.y).float().mean().item())


def test_batches_and_results_are_drawn(trained):
    from matplotlib import pyplot as plt
    digits, before = load_data("digits"), trained.dls.train.epoch
    x, y = trained.dls.valid.one_batch()
    seen = (trained.dls.valid.pixels(x)*255).round().byte()
    assert torch.equal(seen, digits.test.x[:128])
    for draw in (trained.dls.show_batch, trained.dls.valid.show_batch, trained.show_results):
        draw(max_n=4)
        titles = [ax.get_title() for ax in plt.gcf().axes if ax.get_title()]
        assert len(titles) == 4 and all(set(t) <= set("0123456789\n") for t in titles)
        plt.close()
    assert trained.dls.train.epoch == before


def test_an_image_is_predicted_from_a_tensor_an_array_a_picture_or_a_file(trained, tmp_path):
    from fastai.learner import load_learner
    from PIL import Image
    digits, p = load_data("digits"), trained.get_preds()[0]
    trained.export("predicts.pkl")
    with warnings.catch_warnings(action="ignore"): other = load_learner(trained.path/"predicts.pkl")
    x = digits.test.x[7]
    picture = Image.fromarray(x[..., 0].numpy())
    picture.save(tmp_path/"7.png")
    for learn in (trained, other):
        for item in (x, x[..., 0].numpy(), picture, tmp_path/"7.png"):
            name, i, found = learn.predict(item)
            assert torch.allclose(found, p[7], atol=1e-2) and i == found.argmax() and name == digits.classes[int(i)]
    assert (trained.predict(x, with_input=True)[0]*255).round().byte().tolist() == x.permute(2, 0, 1).tolist()
    for bad in (torch.rand(8, 8), x[:7], x.expand(8, 8, 3)):
        with pytest.raises(ValueError, match=r"an image to predict is torch.uint8 of the shape \(8, 8, 1\)"):
            trained.predict(bad)
    assert torch.equal(trained.get_preds()[0], p)


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_images_of_the_largest_losses_are_drawn(trained, part):
    from fastai.interpret import ClassificationInterpretation
    from matplotlib import pyplot as plt

    found, images = (
        ClassificationInterpretation.from_learner(trained, ds_idx=int(part == "test")),
        getattr(load_data("digits"), part),
    )
    losses, at = found.top_losses(4)
    found.plot_top_losses(4)
    titles = [ax.get_title().split("/") for ax in plt.gcf().axes if ax.get_title()]
    plt.close()
    assert [t[1].strip() for t in titles] == [str(int(images.y[i])) for i in at]
    assert [float(t[2]) for t in titles] == pytest.approx(losses.tolist(), abs=.01)


def test_a_damaged_trajectory_is_named_as_it_is():
    spec = replace(TINY, epochs=3)
    with pytest.raises(KeyboardInterrupt): fit(spec, cbs=[Stop(2)])
    (file := run_dir(spec)/"trajectory.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match=f"^{file} is damaged; delete checkpoint.safetensors beside it"): fit(spec)


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["folder", "pipe"])
def test_what_is_no_checkpoint_is_named(make, tmp_path):
    make(file := tmp_path/"checkpoint.safetensors")
    with pytest.raises(ValueError, match="checkpoint.safetensors is damaged"): read_state(file)


def test_an_interpretation_counts_every_image(trained):
    from fastai.interpret import ClassificationInterpretation
    found = ClassificationInterpretation.from_learner(trained)
    matrix = found.confusion_matrix()
    assert matrix.sum() == 360 and matrix.sum(1).tolist() == load_data("digits").test.y.bincount().tolist()
    assert list(trained.dls.vocab) == list("0123456789")
    with redirect_stdout(io.StringIO()) as said: found.print_classification_report()
    assert "accuracy" in said.getvalue()


def test_a_learner_is_saved_exported_and_summarized(trained):
    from fastai.learner import load_learner
    before = {n: t.clone() for n, t in trained.model.state_dict().items()}
    trained.save("here")
    assert "Total params" in str(trained.summary())
    trained.export("x.pkl")
    with warnings.catch_warnings(action="ignore"): other = load_learner(trained.path/"x.pkl")
    assert all(torch.equal(t, before[n]) for n, t in other.model.state_dict().items())
    assert (
        len(other.dls.train_ds) == 0
        and (trained.path / "x.pkl").stat().st_size < 3e6
        and len(trained.dls.train_ds) == 1437
    )
    p = other.get_preds(dl=trained.dls.valid)[0]
    assert torch.allclose(p, trained.get_preds()[0], atol=1e-2)
    trained.load("here")
    assert all(torch.equal(t, before[n]) for n, t in trained.model.state_dict().items())


def test_epochs_and_rate_are_what_fit_was_asked(trained):
    rates = lambda: sorted({round(o, 9) for o in trained.recorder.lrs})
    trained.fit(1, 1e-4)
    assert rates() == [1e-6, 1e-5, 1e-4] and len(trained.recorder.values) == 1
    trained.fit(2)
    assert rates() == [1e-3, 1e-2, .1] and len(trained.recorder.values) == 2
    import fastai.callback.schedule  # noqa: F401
    trained.fit_one_cycle(1, .03)
    assert max(trained.recorder.lrs) == pytest.approx(.03, rel=.1)


# fastai's callbacks.

def callbacks():
    from fastai.callback.fp16 import MixedPrecision
    from fastai.callback.hook import ActivationStats
    from fastai.callback.mixup import CutMix, MixUp
    from fastai.callback.progress import CSVLogger, ProgressCallback, ShowGraphCallback
    from fastai.callback.tracker import (
        EarlyStoppingCallback,
        ReduceLROnPlateau,
        SaveModelCallback,
        TerminateOnNaNCallback,
    )
    from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback

    return [
        lambda: SaveModelCallback(monitor="accuracy"),
        lambda: EarlyStoppingCallback(patience=5),
        ReduceLROnPlateau,
        TerminateOnNaNCallback,
        MixUp,
        CutMix,
        lambda: GradientClip(1.0),
        lambda: GradientAccumulation(256),
        CSVLogger,
        ProgressCallback,
        ShowGraphCallback,
        ActivationStats,
        lambda: MixedPrecision(),
        BnFreeze,
        lambda: ShortEpochCallback(pct=0.5),
    ]


@pytest.mark.parametrize("i", range(15))
@pytest.mark.parametrize("how", ["learner", "fit"])
def test_a_callback_of_fastais_takes_part(i, how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, digits, spec = callbacks()[i](), load_data("digits"), replace(TINY, epochs=1)
    few = describe(
        "digits", "few", part(digits.train, torch.arange(300)), part(digits.test, torch.arange(130)), digits.classes
    )
    with redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if how == "learner": learner(spec, few, made).fit(1)
        else: assert fit(spec, data=few, cbs=made)["status"] == "complete"


def test_an_epoch_whose_test_is_cut_short_has_no_accuracy():
    from fastai.callback.training import ShortEpochCallback
    record = fit(TINY, cbs=ShortEpochCallback(pct=.5))
    assert record["final"]["accuracy"] is None and np.isfinite(record["final"]["train_loss"])


def test_a_record_holds_the_last_epoch_whatever_a_callback_loads():
    "fastai's SaveModelCallback ends with the best epoch's weights; the record's accuracy is the last one's."
    from fastai.callback.tracker import SaveModelCallback
    whole = fit(TINY, "plain")
    with redirect_stdout(io.StringIO()):
        best = fit(TINY, "best", cbs=SaveModelCallback(monitor="train_loss", comp=np.greater))
    assert best["files"]["moved.safetensors"] == whole["files"]["moved.safetensors"]
    assert (run_dir(TINY, "best")/"models/model.pth").exists()


def test_callbacks_are_told_the_epochs_that_are_done(tmp_path):
    "A history and an early stopping of the reader's go on as if nothing had happened."
    from fastai.callback.progress import CSVLogger
    spec = replace(TINY, epochs=4)

    class Watch(Callback):
        order = 62
        def before_fit(self): Watch.seen = []

        def after_epoch(self):
            Watch.seen.append((self.epoch, round(float(self.recorder.values[-1][2]), 4), self.train_iter))
    fit(spec, "whole", cbs=[Watch])
    whole = Watch.seen
    with pytest.raises(KeyboardInterrupt): fit(spec, "parts", cbs=[Watch, CSVLogger, Stop(2)])
    with redirect_stdout(io.StringIO()): fit(spec, "parts", cbs=[Watch, CSVLogger])
    assert [o[:2] for o in Watch.seen] == [o[:2] for o in whole] and Watch.seen[2:] == whole[2:]
    assert len(pd.read_csv(run_dir(spec, "parts")/"history.csv")) == 4


# What is asked and what is told.

def test_a_record_of_other_callbacks_or_another_dtype_is_refused(caplog):
    """The field's program 29 would have the run trained again; that would put a finished record aside for a slip, so
    it is refused."""
    from fastai.callback.mixup import MixUp
    record = fit(TINY, dtype=torch.float32)
    with pytest.raises(ValueError, match="was trained with no callbacks, not with MixUp; name another study"):
        fit(TINY, cbs=[MixUp(0.8)])
    with pytest.raises(ValueError, match="was trained in float32, not in bfloat16; name another study"):
        fit(TINY, dtype=torch.bfloat16)
    assert fit(TINY, dtype=torch.float32) == fit(TINY) == record
    mixed = fit(TINY, "mixed", cbs=[MixUp(.8)])
    assert mixed["callbacks"] == ["MixUp"] and fit(TINY, "mixed", cbs=MixUp) == mixed
    with caplog.at_level(logging.WARNING): assert fit(TINY, "mixed") == mixed
    assert "was trained with MixUp" in caplog.text


@pytest.mark.parametrize("arch", ["mlp2-10", "vgg11", "lenet5", "resnet8"])
def test_a_last_batch_of_one_image_is_trained_on(arch):
    "1,437 = 4*359 + 1. Where one image is one value a channel it joins the batch before it, else it stays alone."
    sizes = []

    class Sizes(Callback):
        def after_pred(self): self.training and sizes.append(len(self.y))
    fit(Spec(arch=arch, epochs=1, batch_size=359), cbs=Sizes, device="cpu")
    assert sizes == ([359]*4 + [1] if arch == "resnet8" else [359]*3 + [360])


def test_a_last_batch_of_one_is_found_where_a_part_is_held_out():
    assert fit(Spec(arch="mlp2-10", epochs=1, batch_size=383, patience=2))["status"] == "complete"   # 1,150 = 3*383 + 1


def test_a_single_image_cannot_be_trained_on():
    digits = load_data("digits")
    one = describe(
        "digits", "one", replace(digits.train, x=digits.train.x[:1], y=digits.train.y[:1]), digits.test, digits.classes
    )
    with pytest.raises(
        ValueError, match="batch_size 128 leaves a batch with fewer than 2 images; the nearest that does not is none"
    ):
        learner(Spec(arch="mlp2-10"), one)


@pytest.mark.parametrize(
    "images, size, processes, least, near",
    [(15, 2, 2, 1, "3"), (15, 7, 2, 1, "6"), (15, 6, 2, 2, "5"), (15, 6, 2, 1, None), (5, 4, 1, 2, "3")],
)
def test_the_nearest_batch_size_that_can_be_shared(images, size, processes, least, near):
    if near is None: return check_batches(images, size, processes, least)
    with pytest.raises(
        ValueError, match=f"batch_size {size} leaves a batch with fewer than .*; the nearest that does not is {near}"
    ):
        check_batches(images, size, processes, least)
    check_batches(images, int(near), processes, least)


@pytest.mark.parametrize("name", ["metrics.csv", "checkpoint.safetensors", "trajectory.safetensors"])
def test_an_error_while_writing_reaches_the_user_as_it_is(name, monkeypatch):
    "fastai would put 'Exception occured in ...' before it."
    def full(path, content, real=checkpoint.write):
        if Path(path).name == name: raise OSError(errno.ENOSPC, "the disk is full")
        return real(path, content)
    monkeypatch.setattr("bnonly.checkpoint.write", full)
    monkeypatch.setattr("bnonly.trajectory.write", full)
    with pytest.raises(OSError) as e: fit(TINY)
    assert e.value.args == (errno.ENOSPC, "the disk is full")


def test_a_damaged_checkpoint_is_named():
    with pytest.raises(KeyboardInterrupt): fit(TINY, cbs=Stop(1))
    file = run_dir(TINY)/"checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError) as e: fit(TINY)
    assert str(e.value) == f"{file} is damaged; delete it to start the run anew."


def test_a_checkpoint_has_the_form_it_always_had():
    with pytest.raises(KeyboardInterrupt): fit(replace(TINY, policy="all"), cbs=Stop(1))
    metadata, tensors = read_state(run_dir(replace(TINY, policy="all"))/"checkpoint.safetensors")
    assert metadata.keys() == {"rows", "random", "data_digest", "dtype", "callbacks", "machines"}
    names = set(trained_state(learner(replace(TINY, policy="all")).model))
    assert {n for n in tensors if n.startswith("moved/")} == {f"moved/{n}" for n in names}
    assert {n.partition("/")[0] for n in tensors} == {"moved", "momentum"}
    digest = digest_tensors({"a": torch.ones(2)}, {"b": "c"})
    assert digest == "2122669c5f1a353ef514471984074efa723f64bf3c748c0c9d549432caff3fb3"


def test_checkpoints_of_unfinished_runs_in_the_repository_can_be_read(monkeypatch):
    monkeypatch.delenv("BNONLY_RUNS")
    from bnonly.data import known_shape
    from bnonly.policies import load_trained_state
    from bnonly.train import network
    from bnonly.experiment import root
    for file in root().glob("runs/*/*/checkpoint.safetensors"):
        metadata, tensors = read_state(file)
        arch, policy, data, *rest = file.parent.name.split(",")
        spec = Spec(arch=arch, policy=policy, data=data, **dict(o.split("=") for o in rest))
        load_trained_state(
            network(spec, known_shape(data)), {n[6:]: t for n, t in tensors.items() if n.startswith("moved/")}
        )
        assert metadata["rows"][-1]["epoch"] == len(metadata["rows"])


# What is said.

def lines(code, **env):
    import os

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True, env=os.environ | env
    )
    return done.stderr.splitlines(), done.stdout


def test_a_run_says_what_it_trains_each_epoch_and_its_result():
    said, out = lines(
        """from bnonly.experiment import Spec; from bnonly.train import fit; fit(Spec(arch='resnet8', epochs=2),
        device='cpu')"""
    )
    assert out == "" and len(said) == 4
    assert said[0].startswith("resnet8, bn on digits: 672 parameters train for 2 epochs, in ")
    assert [": epoch 1/2, accuracy " in said[1], ": epoch 2/2, accuracy " in said[2]] == [True, True]
    assert said[3].startswith("resnet8,bn,digits,epochs=2,seed=0: complete, accuracy ") and said[3].endswith(
        "% after 2 epochs on digits"
    )


def test_a_learner_says_it_too_and_a_program_may_say_where():
    code = ("import logging, sys; from bnonly.experiment import Spec; from bnonly.train import learner\n"
            "{}\nlearner(Spec(arch='resnet8'), device='cpu').fit(1)")
    said, out = lines(code.format(""))
    assert out == "" and len(said) == 2
    said, out = lines(code.format("logging.basicConfig(stream=sys.stdout, format='mine %(message)s')"))
    assert said == [] and len(out.splitlines()) == 2 and out.startswith("mine resnet8, bn")
    assert lines(code.format("logging.getLogger('bnonly').setLevel('WARNING')")) == ([], "")


def test_a_sweeps_worker_says_nothing(capsys):
    from bnonly.sweep import train_one
    assert train_one(TINY, "scratch")[1:] == ("done", None)
    assert capsys.readouterr() == ("", "") and logger.isEnabledFor(logging.INFO)
    with quiet(): fit(TINY, "other")
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar():
    code = (
        "import pty, os, sys; from bnonly.experiment import Spec\n"
        "pid, fd = pty.fork()\n"
        "if not pid:\n    from bnonly.train import fit; fit(Spec(arch='resnet8', epochs=1), device='cpu')\n"
        "    os._exit(0)\n"
        "said = b''\n"
        "try:\n    while part := os.read(fd, 1 << 16): said += part\n"
        "except OSError: pass\n"
        "sys.stdout.buffer.write(said)"
    )
    said = lines(code)[1]
    assert "672 parameters train" in said and "%" in said and "valid_loss" in said and "complete, accuracy" in said
