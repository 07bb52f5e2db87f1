"""What is kept of a run while it trains, and its record when it has ended.

A checkpoint, `checkpoint.safetensors`, has the trained state and the momentum as tensors (`moved/NAME`,
`momentum/NAME`), and as metadata, each a JSON value: the metrics of the epochs that are done (`rows`), the states of
the shared random generators (`random`), and what the next part of the run must know of those before it
(`data_digest`, `dtype`, `callbacks`, `machines`, which older versions did not write). `digest` vouches for all of it.
"""
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from fastai.callback.core import Callback, CancelFitException
from fastai.torch_core import num_distrib, rank_distrib

from .distributed import all_gather, all_reduce, unwrap
from .experiment import seal, write
from .machine import machine
from .photos import named
from .policies import counts, load_trained_state, trained_state, trainable
from .runlock import LostLock
from .sealed import digest_tensors

__all__ = ["Checkpointer", "attempt", "callback_names", "finish", "load_state", "parts", "random_states",
           "read_state", "save_state", "set_random_states"]


def random_states() -> dict:   # JSON values
    "The states of all generators that libraries share."
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return dict(python=random.getstate(), numpy=[kind, keys.tolist(), *rest], torch=torch.get_rng_state().tolist(),
                cuda=[s.tolist() for s in cuda])


def set_random_states(states: dict):   # as `random_states` gave them
    "Put the generators back to where they were."
    def as_bytes(s): return torch.tensor(s, dtype=torch.uint8)
    random.setstate(tuple(tuple(o) if isinstance(o, list) else o for o in states["python"]))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(as_bytes(states["torch"]))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([as_bytes(s) for s in states["cuda"][:torch.cuda.device_count()]])


def save_state(learn, path: Path, rows: list, **about):
    "Write what training needs to go on; rows: metrics of the epochs that are done, about: JSON values."
    model, states = unwrap(learn.model), learn.opt.opt.state
    momenta = {n: states[p].get("momentum_buffer") for n, p in trainable(model).items()}
    tensors = {f"moved/{n}": t for n, t in trained_state(model).items()}
    tensors |= {f"momentum/{n}": t for n, t in momenta.items() if t is not None}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    metadata = {k: json.dumps(v) for k, v in dict(rows=rows, random=random_states(), **about).items()}
    write(path, safetensors.torch.save(tensors, metadata | dict(digest=digest_tensors(tensors, metadata))))


def read_state(path: Path) -> tuple:   # metadata and tensors, both by name
    "A checkpoint, nothing where there is none; `ValueError` where the file is not as it was written."
    if not path.exists(): return {}, {}
    try:
        if not path.is_file(): raise ValueError
        with safetensors.safe_open(path, "pt") as f:
            metadata, tensors = f.metadata(), {n: f.get_tensor(n) for n in f.keys()}
        if metadata.pop("digest") != digest_tensors(tensors, metadata): raise ValueError
    except Exception as e:
        raise ValueError(f"{path} is damaged; delete it to start the run anew.") from e
    return {k: json.loads(v) for k, v in metadata.items()}, tensors


def load_state(learn, tensors: dict):   # as `read_state` gives them
    "Put the trained state and the momentum back; `ValueError` where they do not fit the network."
    def those(kind): return {n.partition("/")[2]: t for n, t in tensors.items() if n.startswith(f"{kind}/")}
    load_trained_state(learn.model, those("moved"))
    learn.create_opt()
    for n, t in those("momentum").items():
        p = learn.model.get_parameter(n)
        learn.opt.opt.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(t)   # laid out as p, for fused SGD


def callback_names(cbs) -> list:
    "The names of a reader's callbacks, which may be classes."
    return [c.__name__ if isinstance(c, type) else type(c).__name__ for c in cbs]


def parts(folder: Path, before: dict, data, dtype: torch.dtype, asked: bool, cbs, device) -> dict:
    """What the record will say of all parts of a run, as the checkpoint keeps it (before: its metadata).

    `ValueError` where this part does not go with those before: other images, or another dtype that was asked for."""
    names, here, dtype = callback_names(cbs), machine(device), str(dtype).removeprefix("torch.")
    for what, now in dict(data_digest=data.digest, **dict(dtype=dtype) if asked else {}).items():
        if before.get(what, now) != now:
            raise ValueError(f"{folder} holds a run that began with {what} {before[what]!r}, not {now!r}; "
                             "go on with that, or delete the folder to start the run anew.")
    known = before.get("callbacks", [])
    return dict(data_digest=data.digest, dtype=dtype, callbacks=known + [n for n in names if n not in known],
                machines=[m for m in before.get("machines", []) if m != here] + [here])


def attempt(callback, action, *args):
    "Call what may fail in a callback: an error ends the fit and is kept, since fastai would put words in front of it."
    try: action(*args)
    except Exception as e:
        callback.learn.checkpointer.error = e
        raise CancelFitException from e


class Checkpointer(Callback):
    """Write each epoch's metrics and a checkpoint, and end a run that diverges.

    Where a run goes on, fastai's `start_epoch` passes over the epochs that are done; their metrics are told again to
    the callbacks that watch them. `error` is what went wrong while something was written."""
    order = 60   # after the Recorder
    def __init__(self, folder: Path,
                 before: dict,   # a checkpoint's metadata
                 about: dict):   # as `parts` gives it
        self.folder, self.before, self.about = Path(folder), before, about
        self.diverged, self.error = False, None
        self.rows = list(before.get("rows", []))
        self.done = len(self.rows)   # epochs of the parts before
        self.table, self.state = self.folder/"metrics.csv", self.folder/"checkpoint.safetensors"

    def before_epoch(self): self.began, self.total, self.seen = time.monotonic(), 0., 0

    def after_batch(self):
        learn, n = self.learn, len(self.learn.y)
        if learn.training: self.total, self.seen = self.total + learn.loss.detach()*n, self.seen + n

    def after_cancel_epoch(self):
        if self.epoch < self.done: self.recorder.log += self.told_again(self.rows[self.epoch])

    def told_again(self, row) -> list:
        "The Recorder's values of an epoch that is done."
        shares = [row[n]/100 for n in ("accuracy", "top5")]
        return [row["train_loss"], row["loss"], *shares, *(row[m.name] for m in self.learn.metrics[2:])]

    def after_epoch(self):
        if self.epoch < self.done: return self.go_on() if self.epoch == self.done-1 else None
        attempt(self, self.keep)
        if self.diverged: raise CancelFitException

    def go_on(self):
        "Begin where the last part of the run ended."
        self.learn.train_iter = self.done*len(self.dls.train)
        set_random_states(self.before["random"])

    def keep(self):
        "Write what an epoch gave."
        if not rank_distrib() and (self.folder/"record.json").exists():
            raise LostLock(f"{self.folder} was finished by another process while this one trained it; "
                           "its record stands.")
        self.rows.append({k: v if k == "epoch" else float(f"{v:.6g}") for k, v in self.row().items()})
        self.recorder.losses[:] = map(float, self.recorder.losses)   # tensors would lie between freed activations
        measured = ["train_loss"] if self.recorder.cancel_valid else ["train_loss", "loss"]
        self.diverged = not all(math.isfinite(self.rows[-1][n]) for n in measured)
        if rank_distrib(): return
        write(self.table, pd.DataFrame(self.rows).to_csv(index=False))
        if self.epoch+1 < self.n_epoch and not self.diverged:
            save_state(self.learn, self.state, self.rows, **self.about)

    def row(self) -> dict:
        "The metrics of an epoch; NaN where a callback cut the test short, as fastai's ShortEpochCallback does."
        total, seen = all_reduce(float(self.total), self.seen)
        own = {} if num_distrib() > 1 else self.embedding.row()
        whole = not self.recorder.cancel_valid
        test, acc, five, *held = self.recorder.values[-1][1:] if whole else [math.nan]*(1 + len(self.learn.metrics))
        return dict(epoch=self.epoch+1, lr=self.opt.hypers[0]["lr"], train_loss=total/seen if seen else math.nan,
                    loss=test, accuracy=100*acc, top5=100*five, **{k: v if whole else math.nan for k, v in own.items()},
                    **{m.name: h for m, h in zip(self.learn.metrics[2:], held)}, seconds=time.monotonic()-self.began)

    def after_fit(self):   # before a callback such as SaveModelCallback puts another epoch's state in its place
        state = trained_state(unwrap(self.learn.model))
        self.ended = {n: t.detach().cpu().clone().contiguous() for n, t in state.items()}


def finish(spec, learn, data, over: bool) -> dict | None:   # None but in the first process
    """Seal the record of a run that has ended, and drop its checkpoint.

    over: whether it may end before its last epoch. `RuntimeError` where a reader's callback ended it."""
    keeper = learn.checkpointer
    if len(keeper.rows) < spec.epochs and not over and not keeper.diverged:
        raise RuntimeError(f"{spec.key} ended after {len(keeper.rows)} of {spec.epochs} epochs, so it has no record; "
                           "fit it again to go on.")
    broken = all_gather(["/".join(Path(p).parts[-3:]) for dl in learn.dls for p in getattr(dl, "broken", ())])
    if rank_distrib(): return None
    finite = not keeper.diverged and all(t.isfinite().all() for t in keeper.ended.values())
    ended = safetensors.torch.save(keeper.ended, dict(spec=json.dumps(spec.__dict__)))
    write(keeper.folder/"moved.safetensors", ended)
    last, about = keeper.rows[-1], keeper.about
    earlier = about["machines"][:-1]
    record = dict(
        spec=spec.__dict__, status="complete" if finite else "diverged",
        final={k: v if math.isfinite(v) else None for k, v in last.items() if k not in ("lr", "seconds")},
        counts={k: int(v) for k, v in counts(learn.model).loc["all"].items()},
        images=data.label, data_digest=data.digest,
        **(dict(undecodable=dict(count=len(broken), names=named(broken, 20))) if broken else {}),
        shape=data.shape, dtype=about["dtype"], seconds=round(sum(r["seconds"] for r in keeper.rows), 1),
        callbacks=about["callbacks"], machine=about["machines"][-1],
        **(dict(earlier_machines=earlier) if earlier else {}))
    files = ["metrics.csv", "moved.safetensors", *(["trajectory.safetensors"] if hasattr(learn, "trajectory") else [])]
    record = seal(keeper.folder, record, files)
    keeper.state.unlink(missing_ok=True)
    return record
