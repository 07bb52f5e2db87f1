"""What a step is timed beside: a plain fastai `Learner`, plain PyTorch loops, and open_lth, the authors' framework.

A candidate is a function that takes a network, a policy and images, and returns a function `steps(n)` that trains n
steps and gives the moment at which each one ended. All train the same network on the same images, end to end. The
images are random bytes of CIFAR-10's shape: their content does not matter, and nothing needs to be downloaded. Each
candidate is a process of its own, since memory settings belong to a process, and they take turns.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, repeat
from statistics import median, quantiles

import numpy as np
import torch
from fastai.callback.core import Callback, CancelFitException, CancelValidException
from fastai.learner import Learner
from torch.nn import functional as F

from .data import describe, loaders, split
from .experiment import Spec, parse_arch
from .layers import BatchNormAct, Conv2d, Linear, MaxPool2d, Stage, prepare_layers
from .logs import quiet
from .machine import default_device
from .models import create_model
from .native import keep_memory, pytorch_features
from .policies import freeze, trainable
from .train import default_dtype, learner


# -------- images, and a clock


def noise(n:int=5_000) -> tuple:   # uint8 [n, 32, 32, 3], int64 [n]
    "Images and labels that look like CIFAR-10 to a clock."
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, n)


WARM_UP = 3   # steps of a turn that are not counted: they fill the caches, and loaders start and read ahead


def tick(ends:list, n:int):
    "Note that one of n steps has ended. A GPU runs behind: it is waited for where the count begins and at the end."
    if torch.cuda.is_initialized() and len(ends) in (WARM_UP-1, n-1): torch.cuda.synchronize()
    ends.append(time.perf_counter())


class Clock(Callback):
    "Note when each training step ends, and stop after some; nothing is validated in between."
    def start(self, n): self.left, self.ends = n, []
    def before_validate(self): raise CancelValidException
    def after_batch(self):
        tick(self.ends, self.left)
        if len(self.ends) == self.left: raise CancelFitException


# -------- the candidates


def ours(arch, policy, x, y):
    "`learner`, as `fit` uses it."
    clock = Clock()
    with quiet(): learn = learner(Spec(arch=arch, policy=policy, data="cifar10"), as_data(x, y), [clock])
    return _timed(learn, clock)


def as_data(x, y):
    "The images as `load_data` would give them."
    images = split(x, y, 10, "noise")
    return describe("cifar10", "noise", images, images, range(10), pad=4, flip=True)


def _timed(learn, clock):
    def steps(n):
        clock.start(n)
        with learn.no_logging(): learn.fit(10**6)
        return clock.ends
    return steps


def plain_loader(x, y):
    "A DataLoader with torchvision's crop, flip and normalization, and a worker for each core: what a user would write."
    from torchvision import transforms as T
    todo = T.Compose([T.ToPILImage(), T.RandomCrop(32, 4), T.RandomHorizontalFlip(), T.ToTensor(),
                      T.Normalize([.5]*3, [.25]*3)])
    pairs = [(i, int(l)) for i,l in zip(x, y)]
    make = lambda batch: (torch.stack([todo(i) for i,_ in batch]), torch.tensor([l for _,l in batch]))
    return torch.utils.data.DataLoader(pairs, 128, shuffle=True, num_workers=os.cpu_count(), collate_fn=make)


def plain_torch(arch, policy, x, y):
    "A loop over a DataLoader."
    device, loader = default_device(), plain_loader(x, y)
    model = freeze(create_model(arch), policy).to(device)
    opt = torch.optim.SGD(trainable(model).values(), lr=.1, momentum=.9, weight_decay=1e-4)
    def steps(n):
        ends = []
        while True:
            for a,b in loader:
                opt.zero_grad()
                F.cross_entropy(model(a.to(device)), b.to(device)).backward()
                opt.step()
                tick(ends, n)
                if len(ends) == n: return ends
    return steps


def plain_fastai(arch, policy, x, y):
    "A Learner with its defaults."
    from fastai.data.core import DataLoaders
    from fastai.optimizer import SGD
    loader, clock = plain_loader(x, y), Clock()
    model = freeze(create_model(arch), policy).to(default_device())
    return _timed(Learner(DataLoaders(loader, loader), model, F.cross_entropy, SGD, lr=.1, cbs=[clock]), clock)


def open_lth(arch, policy, x, y, folder):
    """The authors' training loop, from a checkout of open_lth. It has no random entries.

    On a CPU it needs two shims: its model class inherits from a distributed class that wants a process group, and it
    calls a NumPy function that is gone.
    """
    sys.path.insert(0, str(folder))
    torch.nn.parallel.DistributedDataParallel, np.product = torch.nn.DataParallel, np.prod
    import datasets.base, datasets.cifar10, models.registry, platforms.local, platforms.platform, training.train
    from foundations.step import Step
    from torchvision import transforms as T
    home = tempfile.mkdtemp()   # `worker` removes it
    class Here(platforms.local.Platform):
        root, torch_device, is_parallel = home, default_device(), False
    platforms.platform._PLATFORM = Here(num_workers=0)
    family, depth, width = parse_arch(arch)
    name = f"cifar_vgg_{depth}" if family == "vgg" else f"cifar_resnet_{depth}_{16*width:g}"
    h = models.registry.get_default_hparams(name)
    h.model_hparams.others_frozen = h.model_hparams.output_frozen = policy == "bn"
    h.training_hparams.data_order_seed = 0
    model = models.registry.get(h.model_hparams)
    images = datasets.cifar10.Dataset(x, y, [T.RandomHorizontalFlip(), T.RandomCrop(32, 4)])
    def steps(n):
        loader, ends = datasets.base.DataLoader(images, 128, 0), []
        tell = lambda *_: tick(ends, n)
        training.train.train(h.training_hparams, model, loader, tempfile.mkdtemp(dir=home), [tell],
                             end_step=Step.from_iteration(n, loader.iterations_per_epoch))
        return ends
    return steps


def tuned_torch(arch, policy, x, y, dtype=torch.float32, compiled=False):
    "What one writes who knows PyTorch well: a channels-last loop over batches made on the device."
    device = default_device()
    model = freeze(create_model(arch), policy).to(device, memory_format=torch.channels_last)
    forward = torch.compile(model) if compiled else model
    opt = torch.optim.SGD(trainable(model).values(), lr=.1, momentum=.9, weight_decay=1e-4, fused=True)
    batches, _ = loaders(as_data(x, y), 128, 0, device)
    def steps(n):
        ends = []
        for a,b in islice(chain.from_iterable(repeat(batches)), n):
            opt.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32): out = forward(a)
            F.cross_entropy(out.float(), b).backward()
            opt.step()
            tick(ends, n)
        return ends
    return steps


TUNED = {f"{kind} torch{name}": partial(tuned_torch, dtype=dtype, compiled=kind == "compiled")
         for name,dtype in {"": torch.float32, ", bfloat16": torch.bfloat16}.items() for kind in ("tuned", "compiled")}
PEERS = dict(bnonly=ours, fastai=plain_fastai, torch=plain_torch, open_lth=open_lth) | TUNED


def multiplies_bfloat16(device:torch.device) -> bool:
    "Whether PyTorch multiplies bfloat16 in hardware here."
    if device.type == "cuda": return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(pytorch_features() & {"avx512_bf16", "amx_bf16"})


def candidates(open_lth:str="") -> list[str]:   # names of PEERS
    "The peers that can run here."
    low = multiplies_bfloat16(default_device())
    return [n for n in PEERS if (n != "open_lth" or open_lth) and (low or "bfloat16" not in n)]


# -------- what each idea of our step gives by itself

IDEAS = ("a plain loop", "batches made on the device", "channels last", "freed memory kept",
         "BatchNorm, residual and ReLU in one", "convolutions in our kernels", "blocks in one operator", "bfloat16")
# what our operators compute from the fourth idea on, each beside those before
LAYERS = (), (BatchNormAct,), (Conv2d, Linear, MaxPool2d), (Stage,)


def loop(n, arch, policy, x, y):
    "A loop with the first n ideas."
    if n == 0: return plain_torch(arch, policy, x, y)
    device = default_device()
    dtype = default_dtype(device, arch) if n > 6 else torch.float32
    model = freeze(create_model(arch), policy).to(device)
    if n > 1: model = model.to(memory_format=torch.channels_last)
    if n > 2: keep_memory()
    if n > 3: prepare_layers(model, dtype, sum(LAYERS[:n-2], ()))
    opt = torch.optim.SGD(trainable(model).values(), lr=.1, momentum=.9, weight_decay=1e-4)
    batches, _ = loaders(as_data(x, y), 128, 0, device)
    def steps(total):
        ends = []
        for a,b in islice(chain.from_iterable(repeat(batches)), total):
            opt.zero_grad()
            F.cross_entropy(model(a if n > 1 else a.contiguous()).float(), b).backward()
            opt.step()
            tick(ends, total)
        return ends
    return steps


CANDIDATES = PEERS | {idea: partial(loop, n) for n,idea in enumerate(IDEAS)}


# -------- taking turns


def worker(candidate, *folder):
    "Read networks and numbers of steps from standard input; answer the latter with the seconds of each step."
    images, out, sys.stdout = noise(), sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as tempfile.tempdir:
        for line in sys.stdin:
            request = json.loads(line)
            if isinstance(request, list): steps = CANDIDATES[candidate](*request, *images, *folder)
            else: print(json.dumps(seconds_of(steps(request + WARM_UP))), file=out, flush=True)


def seconds_of(ends:list) -> list:
    "The seconds of each step after the warm-up; on a GPU their mean, since it was waited for only at both ends."
    each = np.diff(ends[WARM_UP-1:])
    return (np.full_like(each, each.mean()) if torch.cuda.is_initialized() else each).tolist()


class Process:
    "A candidate in a process of its own; package: a checkout of this package in whose code it is, by default this."
    def __init__(self, *args, package=None):
        code = f"from bnonly.peers import worker; worker(*{args!r})"
        self.name, pipe = args[0], subprocess.PIPE
        command = [sys.executable, "-W", "ignore::FutureWarning", "-c", code]   # fastai 2.8 decorates with jit.script
        env = os.environ | (dict(PYTHONPATH=str(package)) if package else {})
        self.pipe = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env, cwd=package,
                                     start_new_session=True)   # Ctrl-C reaches the parent alone, which ends it

    def tell(self, what): print(json.dumps(what), file=self.pipe.stdin, flush=True)

    def begin(self, *what):   # network and policy
        self.seconds, self.steps = [], 3
        self.tell(what)

    def turn(self, length):
        "Train for about `length` seconds, and three steps at least."
        self.tell(self.steps)
        answer = self.pipe.stdout.readline()
        if not answer: raise RuntimeError(f"the candidate {self.name!r} stopped; its error is above.")
        found = json.loads(answer)
        self.steps = max(3, round(length/median(found)))
        self.seconds += found


@contextmanager
def processes(names, open_lth=None, package=None):   # yields name to Process
    "A process for each candidate, ended at the end."
    found = {n: Process(n, *([str(open_lth)] if n == "open_lth" else []), package=package) for n in names}
    try: yield found
    finally:
        for p in found.values(): p.pipe.stdin.close()
        for p in found.values(): p.pipe.wait()


def take_turns(found:dict, arch:str, policy:str, rounds:int) -> dict:   # name to images a second: median, quartiles
    "Time some candidates on one network, one after the other, again and again."
    for p in found.values(): p.begin(arch, policy)
    for i in range(rounds+1):
        for p in found.values(): p.turn(1.5)
        if i == 0:
            for p in found.values(): p.seconds.clear()
    return {n: speed(p.seconds) for n,p in found.items()}


def speed(seconds:list) -> dict:
    "Images a second of steps of 128 images: the median and the quartiles."
    low, mid, high = (round(128/q, 1) for q in quantiles(seconds, n=4)[::-1])
    return dict(images_per_second=mid, low=low, high=high)
