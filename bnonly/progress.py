"How far training is: fastai's progress bar where somebody can watch it, else a line an epoch."
import sys
import threading
import time

from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib
from fastcore.imports import in_notebook

from .logs import logger

__all__ = ["EpochLines", "announce", "progress", "result", "shows_bars"]


def shows_bars() -> bool:
    "Whether a progress bar can be watched: in a notebook or on a terminal, or where the program has imported fastai's."
    alone = threading.current_thread() is threading.main_thread() and not rank_distrib()   # bars of two threads mix
    wanted = in_notebook() or sys.stdout.isatty() or "fastai.callback.progress" in sys.modules
    return alone and wanted and logger.isEnabledFor(20)


def progress(name: str, others=()) -> list:   # name: of the run; others: names of callbacks that are there already
    "The callbacks that say how far training is."
    if not shows_bars() or "ProgressCallback" in others: return [EpochLines(name)]
    from fastai.callback.progress import ProgressCallback
    return [EpochLines(name), ProgressCallback()]


class EpochLines(Callback):
    "Log a line for each epoch, in place of fastai's print."
    def __init__(self, name: str): self.run_name = name
    def after_create(self): self.learn.logger = self.line
    def before_fit(self): self.begun = time.monotonic()

    def line(self, log):   # log: the Recorder's, epoch, losses, metrics and time
        keeper, epoch = getattr(self.learn, "checkpointer", None), log[0] + 1
        done = keeper.done if keeper else 0
        if epoch <= done or rank_distrib(): return
        values = dict(zip(self.recorder.metric_names[:-1], log))
        reached = f", accuracy {100*values['accuracy']:.1f}%" if len(values) > 3 else ""
        left = (time.monotonic() - self.begun) / (epoch - done) * (self.n_epoch - epoch)
        logger.info("%s: epoch %d/%d%s, %.1f min left", self.run_name, epoch, self.n_epoch, reached, left/60)


def announce(spec, model, dtype, device):
    "Say what will be trained."
    if rank_distrib(): return
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("%s, %s on %s: %s parameters train for %d epochs, in %s on %s", spec.arch, spec.policy, spec.data,
                f"{n:,}", spec.epochs, str(dtype).removeprefix("torch."), device)


def result(record: dict, name: str):
    "Say how a run ended."
    if rank_distrib(): return
    last = record["final"]
    reached = f", accuracy {last['accuracy']:.2f}%" if last["accuracy"] is not None else ""
    logger.info("%s: %s%s after %d epochs on %s", name, record["status"], reached, last["epoch"], record["images"])
