"""How long a training step takes, beside what one would use instead: `bnonly bench`.

Machines differ and are shared, so only ratios measured in one run count: the candidates of `bnonly.peers` take turns.
The records lie in runs/bench.
"""
import json
import os
import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median

import pandas as pd
import torch
from torch.nn import functional as F

from . import ops
from .bounds import peak_rates, work
from .data import load_data
from .experiment import Spec, parse_arch, parse_policy, root, run_dir, runs_dir, write
from .machine import commit, default_device, machine
from .models import create_model
from .native import keep_memory, kernels
from .peers import IDEAS, candidates, multiplies_bfloat16, processes, take_turns
from .policies import freeze, trainable
from .train import default_dtype, fit, fit_many, prepare


# -------- the table

_ARCHS, _POLICIES = ("resnet14", "resnet56", "wrn14-4", "vgg11"), ("bn", "all", "random2")


def row(arch:str, policy:str,
        found:dict,     # name to Process
        rounds:int      # turns of each
       ) -> dict:
    "One network, timed."
    able = {n: p for n,p in found.items() if n != "open_lth" or policy in ("bn", "all")}
    peers = take_turns(able, arch, policy, rounds)
    own, device = peers.pop("bnonly"), default_device()
    for p in peers.values(): p["ratio"] = round(own["images_per_second"]/p["images_per_second"], 2)
    dtype = str(default_dtype(device, arch)).split(".")[1]
    return dict(arch=arch, policy=policy, device=device.type, dtype=dtype, **own,
                ratio=min(p["ratio"] for p in peers.values()), peers=peers)


def explain(r:dict,       # as `row` gives it
            best:tuple    # as `peak_rates` gives it
           ) -> dict:
    "A row, with the milliseconds of its step and what of them the machine's best rates explain."
    dtype, step = getattr(torch, r["dtype"]), 128/r["images_per_second"]
    flops, numbers = work(r["arch"], r["policy"], dtype=dtype)
    multiply, move = flops/best[0], numbers*dtype.itemsize/best[1]
    times = dict(step_ms=step, multiply_ms=multiply, move_ms=move)
    return {**r, **{k: round(1000*t, 1) for k,t in times.items()}, "bound": round((multiply+move)/step, 2)}


def row_in_words(r:dict) -> str:   # r: a row of `bench`, `bench_ideas`, `bench_goals` or `bench_steps`
    "A row as a line."
    if "kernel" in r:
        return (f"{r['kernel']}, {r['dtype']}, {r['channels']} channels of {r['size']}x{r['size']}: "
                f"{r['ms']} ms, {r['ratio']} times PyTorch ({r['pytorch_ms']} ms)")
    if "milliseconds_per_image" in r:
        return f"{r['arch']} {r['policy']}, {r['pixels']} pixels: {r['milliseconds_per_image']} ms an image"
    if "goal" in r: return f"{r['what']}: {r['measured']:,} (the goal, on one H200: {r['goal']:,})"
    own = f"{r['images_per_second']:,.0f} images/s ({r['low']:,.0f} to {r['high']:,.0f}"
    if "before" in r: return f"{r['arch']} {r['policy']}: {own}), {r['ratio']:.3f} times as many as before"
    if "idea" in r: return f"{r['arch']} {r['policy']}, {r['idea']}: {own})"
    times = ", ".join(f"{p['ratio']:.2f} times {n}" for n,p in r["peers"].items())
    return (f"{r['arch']} {r['policy']}: {own}, {r['dtype']}), {times}; {r['step_ms']} ms a step where the machine's "
            f"best rates allow {r['multiply_ms']} for products and {r['move_ms']} for moving ({r['bound']:.0%})")


def bench(archs=_ARCHS, policies=_POLICIES,
          open_lth:str="",     # a checkout of open_lth
          rounds:int=3,        # turns of each candidate
          say=print            # called with each row, whose `bound` knows the best rates so far
         ) -> dict:            # the record
    "Time every candidate on every network and policy, and keep the record; `ValueError` for an unknown name."
    for a,p in product(archs, policies): parse_arch(a), parse_policy(p)
    if open_lth and not (Path(open_lth)/"models/registry.py").exists():
        raise ValueError(f"--open-lth {open_lth!r} has no models/registry.py; "
                         "name a checkout of github.com/facebookresearch/open_lth.")
    best, rows = (0, 0), []   # the best rates of all that are measured, one time for each row
    own = kernels() if default_device().type == "cpu" else None
    multiplied = {torch.float32, *[torch.bfloat16]*multiplies_bfloat16(default_device()),
                  *[torch.float16]*bool(own and own[torch.bfloat16].float16)}
    with processes(candidates(open_lth), open_lth) as found:
        for a,p in product(archs, policies):
            r = row(a, p, found, rounds)   # first, since the candidates are busy while they start
            for dtype in multiplied: best = tuple(map(max, best, peak_rates(dtype)))
            rows.append(explain(r, best))
            say(rows[-1])
    return keep_benchmark(_part(archs, policies), [explain(r, best) for r in rows], gemm_flops=round(best[0]),
                          copy_bytes=round(best[1]))


def _part(archs, policies) -> str:   # of a record's name: nothing where the table is whole
    whole = (tuple(archs), tuple(policies)) == (_ARCHS, _POLICIES)
    return "" if whole else ",".join(("", *archs, *policies))


def keep_benchmark(what, rows, device=None, **rest) -> dict:
    "Write a record under runs/bench, named by the device, on a CPU the instruction set, and what was timed."
    found = machine(device := device or default_device())
    record = dict(machine=found, limits={k: os.environ[k] for k in LIMITS if k in os.environ}, **rest, rows=rows)
    write(runs_dir()/"bench"/f"{processor_name(device, found)}{what}.json", json.dumps(record, indent=1)+"\n")
    return record


LIMITS = "BNONLY_MARCH", "BNONLY_KERNELS", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "OMP_NUM_THREADS"


def processor_name(device, found): return f"cpu,{found['kernels']}" if device.type == "cpu" else device.type


# -------- the step before a change

def bench_before(before:str,     # a checkout of another commit of this package
                 archs=_ARCHS, policies=_POLICIES, rounds:int=3, say=print) -> dict:   # the record
    "Time our step beside that of another commit, and keep the record; `ValueError` for what is no such checkout."
    for a,p in product(archs, policies): parse_arch(a), parse_policy(p)
    if not (Path(before)/"bnonly/peers.py").exists():
        raise ValueError(f"--before {before!r} has no bnonly/peers.py; name a checkout of this package.")
    rows = []
    with processes(["bnonly"]) as now, processes(["bnonly"], package=before) as then:
        for a,p in product(archs, policies):
            own, other = take_turns(dict(now=now["bnonly"], before=then["bnonly"]), a, p, rounds).values()
            ratio = round(own["images_per_second"]/other["images_per_second"], 3)
            rows.append(dict(arch=a, policy=p, **own, before=other, ratio=ratio))
            say(rows[-1])
    return keep_benchmark(f",before{_part(archs, policies)}", rows, before=commit(Path(before)))


# -------- the ideas of a step, one after the other


def bench_ideas(rounds:int=4, say=print) -> dict:   # the record
    "Time what each idea gives, and keep the record."
    rows = []
    with processes([*IDEAS, "bnonly"]) as found:
        for p in ("bn", "all"):
            for n,timed in take_turns(found, "resnet14", p, rounds).items():
                idea = "the Learner" if n == "bnonly" else n
                rows.append(dict(arch="resnet14", policy=p, idea=idea, **timed))
                say(rows[-1])
    return keep_benchmark(",ideas", rows)


# -------- each kernel beside PyTorch's operator; `bnonly.native` decides by it what computes a convolution of bfloat16

_SHAPES = (16, 32), (32, 16), (64, 8), (256, 8), (512, 4)   # channels; rows and columns: stages of ResNets and VGG


def kernel_pairs(dtype, channels:int, size:int) -> dict:   # name to two functions: the kernel's, PyTorch's
    "Each kernel beside PyTorch's operator, on 128 images."
    last = dict(memory_format=torch.channels_last)
    x, dy = (torch.randn(128, channels, size, size).to(dtype).contiguous(**last) for _ in range(2))
    w = (.1*torch.randn(channels, channels, 3, 3)).to(dtype).contiguous(**last)
    gamma, beta, leaf, residual = torch.rand(channels), torch.rand(channels), x.clone(), dy.clone()
    for t in (gamma, beta, leaf, residual): t.requires_grad_()
    def step(f): return lambda: torch.autograd.grad(f(leaf, residual, gamma, beta), (leaf, residual, gamma, beta), dy)
    half = dy[..., ::2, ::2].contiguous(**last)
    def forward(algorithm, stride):
        packed, how = ops.pack_weight(w, algorithm, stride=stride), ((stride, stride), (1, 1))
        own = lambda: ops.conv2d(x, w, None, packed, None, *how, algorithm=algorithm)
        return own, lambda: F.conv2d(x, w, None, *how)
    def grad(algorithm, g, stride):
        how = (stride, stride), (1, 1), (1, 1)
        own = lambda: torch.ops.bnonly.conv2d_weight_gradient(g, x, w, *how, 1, algorithm)
        theirs, wanted = torch.ops.aten.convolution_backward, [False, True, False]
        return own, lambda: theirs(g, x, w, None, *how, False, [0, 0], 1, wanted)
    return {"BatchNorm, residual, ReLU": (step(ops.batch_norm_act), step(ops.batch_norm_act_reference)),
            "3x3 (Winograd)": forward("winograd", 1), "3x3, weight gradient": grad("winograd", dy, 1),
            "3x3, stride 2 (direct)": forward("direct", 2), "3x3, stride 2, weight gradient": grad("direct", half, 2)}


def bench_kernels(shapes=_SHAPES, rounds:int=20, say=print) -> dict:   # the record
    "Time each kernel beside PyTorch's operator, in turns, and keep the record: the shortest of all rounds counts."
    rows = []
    keep_memory()   # as training does
    for dtype,(c,s) in product((torch.float32, torch.bfloat16), shapes):
        for name,pair in kernel_pairs(dtype, c, s).items():
            own, theirs = shortest(pair, rounds)
            rows.append(dict(kernel=name, dtype=str(dtype)[6:], channels=c, size=s, ms=round(own, 3),
                             pytorch_ms=round(theirs, 3), ratio=round(theirs/own, 2)))
            say(rows[-1])
    return keep_benchmark(",kernels", rows)


def shortest(pair, rounds:int) -> list:   # milliseconds of each
    "The shortest time of some functions, called in turns: each as often before the others as behind them."
    turns = [(f, []) for f in pair]
    for i in range(rounds + 1):
        for f,found in turns[::(-1)**i]:
            start = time.perf_counter()
            f()
            found.append(1000*(time.perf_counter() - start))
    return [min(found[1:]) for _,found in turns]


# -------- what a study costs

_STEP_POLICIES = "bn", "all", "random2", "output"
_STEP_NETWORKS = "resnet14", "resnet56", "resnet110", "wrn14-2", "wrn14-4", "wrn14-8", "vgg11", "vgg16", "vgg19"
_STEPS = ((32, 128, _STEP_NETWORKS, _STEP_POLICIES), (224, 16, ("resnet18", "resnet50"), _STEP_POLICIES),
          (224, 16, ("resnet34", "resnet101", "resnet200"), ("bn",)))   # pixels, images in a step, networks, policies


def step_seconds(arch:str, policy:str, pixels:int, batch_size:int) -> float:   # of processor time
    """The shortest of three training steps (forward, backward, update) after a warm-up.

    Processor time of one thread: other processes change it less than the time on the clock.
    """
    cpu = torch.device("cpu")
    model = prepare(freeze(create_model(arch, 1000 if pixels > 32 else 10), policy), cpu, default_dtype(cpu, arch))
    opt, times = torch.optim.SGD(trainable(model).values(), lr=.1, momentum=.9, weight_decay=1e-4), []
    x = torch.randn(batch_size, 3, pixels, pixels).contiguous(memory_format=torch.channels_last)
    for _ in range(4):
        start = time.process_time()
        F.cross_entropy(model(x).float(), torch.zeros(batch_size, dtype=torch.long)).backward()
        opt.step(); opt.zero_grad()
        times.append(time.process_time()-start)
    return min(times[1:])


def bench_steps(priced=_STEPS, say=print) -> dict:   # the record
    "Time one thread's steps, and keep the record."
    before, rows, cpu = torch.get_num_threads(), [], torch.device("cpu")
    torch.set_num_threads(1)
    try:
        for pixels,batch_size,archs,policies in priced:
            for p,a in product(policies, archs):
                ms = 1000*step_seconds(a, p, pixels, batch_size)/batch_size
                rows.append(dict(arch=a, policy=p, pixels=pixels, batch_size=batch_size,
                                 milliseconds_per_image=round(ms, 4)))
                say(rows[-1])
        return keep_benchmark(",steps", rows, cpu, dtype=str(default_dtype(cpu, a)).split(".")[1])
    finally: torch.set_num_threads(before)


# -------- whole runs, on a GPU

# Seconds on one H200, and times as long as one seed. What is measured are four epochs, test images included: after the
# first, in which libraries are loaded and algorithms chosen, an epoch takes as long as the next.
GOALS = {"160 epochs of resnet14": 30, "160 epochs of resnet56": 90, "160 epochs of resnet110": 180,
         "160 epochs of resnet866": 1200, "five seeds of resnet56 beside one": 1.5}


def epochs_of(arch:str, data, epochs:int) -> list:   # seconds
    "How long each epoch of a run takes, BatchNorm only."
    with tempfile.TemporaryDirectory() as study:
        fit(spec := Spec(arch=arch, data=data.name, epochs=epochs), study, data)
        return pd.read_csv(run_dir(spec, study)/"metrics.csv").seconds.tolist()


def at_once(arch:str, data, epochs:int, seeds:int) -> float:   # seconds
    "How long some seeds take together."
    with tempfile.TemporaryDirectory() as study:
        start = time.perf_counter()
        fit_many([Spec(arch=arch, data=data.name, epochs=epochs, seed=s) for s in range(seeds)], study, seeds)
        return time.perf_counter() - start


def bench_goals(data:str="cifar10", wanted=GOALS, epochs:int=4, say=print) -> dict:   # the record
    "Measure the goals, or some of them, and keep the record."
    images, rows = load_data(data), []
    for what in wanted:
        arch = next(w for w in what.split() if w.startswith("resnet"))
        if what.startswith("five"): measured = at_once(arch, images, epochs, 5)/at_once(arch, images, epochs, 1)
        else:
            first, *rest = epochs_of(arch, images, epochs)
            measured = first + 159*median(rest)
        rows.append(dict(what=what, goal=GOALS.get(what), measured=round(measured, 2), arch=arch, policy="bn",
                         data=images.label, epochs=epochs))
        say(rows[-1])
    return keep_benchmark(",goals", rows)


# -------- what is committed


def load_benchmark(name:str   # of a file in runs/bench, e.g. 'cpu'
                  ) -> dict|None:
    "A committed benchmark, if there is one."
    file = root()/"runs/bench"/f"{name}.json"
    return json.loads(file.read_bytes()) if file.exists() else None


def goals() -> pd.DataFrame:
    "The goals beside what a GPU took, as committed."
    measured = {r["what"]: r["measured"] for r in (load_benchmark("cuda,goals") or dict(rows=[]))["rows"]}
    return pd.DataFrame([dict(what=k, goal=v, measured=measured.get(k, "not measured")) for k,v in GOALS.items()])
