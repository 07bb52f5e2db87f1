"Several processes that train one network, as `accelerate launch` starts them. With one process there is nobody to ask."
import torch
from fastai.callback.core import Callback
from fastai.torch_core import num_distrib, rank_distrib

__all__ = ["Parallel", "all_gather", "all_reduce", "broadcast", "check_batches", "distributed_state", "own_share",
           "unwrap"]


def distributed_state():   # accelerate's state of this process, or None
    "Join the other processes, where there are several."
    if num_distrib() < 2: return None
    from accelerate import PartialState
    return PartialState(cpu=not torch.accelerator.is_available())


def own_share() -> tuple:
    "The number of this process, and how many there are."
    return rank_distrib(), max(1, num_distrib())


def all_reduce(*numbers: float) -> list:
    "The sum of each number over all processes."
    if not (state := distributed_state()): return list(numbers)
    from accelerate.utils import reduce
    return reduce(torch.tensor(numbers, dtype=torch.float64, device=state.device), "sum").tolist()


def all_gather(items: list) -> set:
    "What any process has."
    if not distributed_state(): return set(items)
    from accelerate.utils import gather_object
    return set(gather_object(items))


def broadcast(value):
    "What the first process says."
    if not distributed_state(): return value
    from accelerate.utils import broadcast_object_list
    return broadcast_object_list([value])[0]


def unwrap(model):
    "A model without DistributedDataParallel around it."
    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def check_batches(images: int, batch_size: int, processes: int, least: int = 1):
    "`ValueError` where some batch of an epoch has fewer than `least` images for one of the processes."
    def fits(size): return not any(0 < n < least*processes for n in (min(size, images), images % size))
    if fits(batch_size): return
    near = min(filter(fits, range(least*processes, images + 1)), key=lambda b: abs(b - batch_size), default="none")
    share = f"fewer than {least*processes} images" + (f" for {processes} processes" if processes > 1 else "")
    raise ValueError(f"batch_size {batch_size} leaves a batch with {share}; the nearest that does not is {near}.")


class Parallel(Callback):
    """Train one network with the other processes.

    DDP takes the plain mean of the processes' gradients, so each part's loss is weighted by its size: every image of a
    batch counts the same."""
    order = 11   # as fastai's DistributedTrainer: before the Recorder

    def before_fit(self): self.learn.model = torch.nn.parallel.DistributedDataParallel(self.model)

    def after_loss(self):
        if not self.training: return
        batch = min(self.dl.batch_size, len(self.dl.images) - self.iter*self.dl.batch_size)
        own = len(torch.arange(batch).tensor_split(self.dl.share[1])[self.dl.share[0]])
        self.learn.loss_grad = self.loss_grad * (num_distrib()*own/batch)

    def after_validate(self):
        for m in (self.recorder.loss, *self.learn.metrics):
            if hasattr(m, "total"): m.total, m.count = all_reduce(float(m.total), m.count)

    def after_fit(self): self.learn.model = unwrap(self.model)
