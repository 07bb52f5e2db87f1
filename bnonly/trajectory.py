"Gamma, beta and the zeros of every channel along a run."
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch
from fastai.callback.core import Callback
from fastai.torch_core import rank_distrib

from .checkpoint import attempt
from .data import loaders
from .loading import part
from .distributed import unwrap
from .experiment import parse_policy, write
from .norms import affine_table, zero_rates

__all__ = ["Trajectory", "trajectory"]


class Trajectory(Callback):
    "Keep gamma, beta and the zero rate of every channel about twenty times along a run, in trajectory.safetensors."
    order = 55   # before the Checkpointer, whose checkpoint must not be ahead of this file

    def __init__(self, folder: Path,
                 batches,          # of the images on which zeros are counted
                 done: int = 0):   # epochs of the run's earlier parts
        self.file, self.batches, self.done, self.rows = Path(folder)/"trajectory.safetensors", batches, done, {}

    def before_fit(self): attempt(self, *((self.go_on,) if self.done else (self.look, 0)))

    def go_on(self):
        "Read the rows of the run's earlier parts; `ValueError` where the file is not as it was written."
        try:
            if not self.file.is_file(): raise ValueError
            kept = safetensors.torch.load_file(self.file)
            self.rows = {n: kept[n][kept["epoch"] <= self.done] for n in ("gamma", "beta", "zero", "epoch")}
        except Exception as e:
            raise ValueError(f"{self.file} is damaged; "
                             "delete checkpoint.safetensors beside it to start the run anew.") from e

    def after_epoch(self):
        epoch, n = self.epoch+1, self.n_epoch
        if epoch > self.done and epoch*20//n > (epoch-1)*20//n: attempt(self, self.look, epoch)

    def look(self, epoch: int):   # how many are done
        "Add a row: epoch (int32), gamma, beta and zero (float16), each [channels of the network]."
        model = unwrap(self.learn.model)
        seen = affine_table(model) | dict(zero=zero_rates(model, self.batches))
        row = {n: torch.from_numpy(seen[n]).half() for n in ("gamma", "beta", "zero")}
        row["epoch"] = torch.tensor(epoch, dtype=torch.int32)
        self.rows = {n: torch.cat([self.rows[n], t[None]]) if self.rows else t[None] for n, t in row.items()}
        if not rank_distrib(): write(self.file, safetensors.torch.save(self.rows))


def trajectory(spec, data, folder, device, done: int = 0) -> list:   # of callbacks
    "A `Trajectory` where gamma trains while the features rest."
    if spec.norm != "batch" or not {"bn", "gamma"} & dict(parse_policy(spec.policy)).keys(): return []
    first = part(data.test, torch.arange(min(1000, len(data.test))))
    return [Trajectory(folder, loaders(replace(data, train=first, test=first), 500, device=device)[1], done)]
