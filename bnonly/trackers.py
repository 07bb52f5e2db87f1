"""Watching a run in TensorBoard or Weights & Biases, as $BNONLY_TRACK asks for it.

What an epoch gave is sent when it is over and its checkpoint is written. So a run that was cut off goes on where its
curves end, and no step of them is there twice."""
import os
import secrets
import warnings
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib

from .experiment import Spec, choose, write

__all__ = ["TRACKERS", "TensorBoard", "Tracker", "WandB", "trackers"]


class Tracker(Callback):
    "Sends the losses of an epoch's steps, its metrics and learning rates; steps are counted over the whole run."
    order = 65   # after the Checkpointer

    def before_fit(self): self.losses = []

    def after_batch(self):
        if self.training: self.losses.append((self.train_iter, self.smooth_loss))

    def after_epoch(self):
        if self.epoch < self.checkpointer.done: return   # it was sent before the run was cut off
        for step, loss in self.losses: self.send(step, dict(train_loss=float(loss)))
        values = zip(self.recorder.metric_names[2:-1], self.recorder.log[2:-1])
        rates = {f"lr_{i}": h["lr"] for i, h in enumerate(self.opt.hypers)}
        self.send(self.train_iter, dict(epoch=self.epoch + 1, **dict(values), **rates))
        self.losses = []


class TensorBoard(Tracker):
    "Writes to the folder `tensorboard` of a run."
    def __init__(self, spec: Spec, folder: Path):
        with warnings.catch_warnings(action="ignore"): from torch.utils.tensorboard import SummaryWriter
        self.writer = SummaryWriter(str(folder/"tensorboard"))

    def send(self, step, values):
        for name, value in values.items(): self.writer.add_scalar(name, value, step)

    def close(self): self.writer.close()


class WandB(Tracker):
    "A run of Weights & Biases, grouped by study; one that goes on is the same run there."
    def __init__(self, spec: Spec, folder: Path):
        with warnings.catch_warnings(action="ignore"): import wandb
        (folder/"wandb").mkdir(parents=True, exist_ok=True)
        id, offline = wandb_id(folder), os.environ.get("WANDB_MODE", "online") != "online"
        try:
            self.tracked = wandb.init(project="bnonly", group=folder.parent.name, name=spec.key, id=id, dir=folder,
                                      config=asdict(spec), resume=None if offline else "allow", reinit="create_new")
        except wandb.Error as e:
            why = str(e).splitlines()[0].rstrip(".")
            raise ValueError(f"BNONLY_TRACK 'wandb' cannot start a run ({why}); run wandb login or set WANDB_API_KEY, "
                             "or set WANDB_MODE=offline to keep it in the run's folder.") from None

    def send(self, step, values): self.tracked.log(values, step=step)

    def close(self): self.tracked.finish()


def wandb_id(folder: Path) -> str:
    "The id of a run, drawn when it begins and kept in its folder."
    file = folder/"wandb/id.txt"
    if not file.exists(): write(file, secrets.token_hex(4))
    return file.read_text()


TRACKERS = dict(tensorboard=TensorBoard, wandb=WandB)


@contextmanager
def trackers(spec: Spec, folder: Path):   # yields a list of callbacks
    "What $BNONLY_TRACK asks for, closed at the end; `ValueError` where it is not installed or cannot start."
    name, found = os.environ.get("BNONLY_TRACK", ""), []
    if name and not rank_distrib():
        try: found = [TRACKERS[choose("BNONLY_TRACK", name, TRACKERS)](spec, folder)]
        except ImportError as e:
            raise ValueError(f"BNONLY_TRACK {name!r} needs {e.name}, which is not installed; "
                             f"pip install 'bnonly[{name}]', or leave it out.") from None
    try: yield found
    finally:
        for t in found: t.close()
