"""Search convolutions on a CPU for wrong numbers and for writes outside of their memory.

python tests/convolution_faults.py --help

Numbers are small integers, so that float32 has to be exact. The memory of tensors and of oneDNN is surrounded by guard
bytes and filled with NaNs (`guarded_malloc.c`, preloaded), so that a write outside and a number that nobody wrote show.
The cases of one instruction set run in a process of their own; one that crashes or hangs names its case, and the search
goes on behind it.
"""
import argparse
import collections
import ctypes
import importlib
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from queue import Empty, Queue

import torch
import torch.nn.functional as F

# What oneDNN and PyTorch may use: ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY. `native` is all the processor has.
# The kernels of bnonly.layers are built for the x86-64 level of the second.
LEVELS = {"default": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4"}
SETS = {"sse41": ("SSE41", "default"), "avx": ("AVX", "default"), "avx2": ("AVX2", "avx2"),
        "avx2_vnni": ("AVX2_VNNI", "avx2"), "avx2_vnni_2": ("AVX2_VNNI_2", "avx2"), "avx512": ("AVX512_CORE", "avx512"),
        "avx512_vnni": ("AVX512_CORE_VNNI", "avx512"), "avx512_bf16": ("AVX512_CORE_BF16", "avx512"),
        "native": ("DEFAULT", ""), "native_avx2": ("DEFAULT", "avx2"), "native_default": ("DEFAULT", "default")}
CHANNELS = 1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 17, 24, 32, 48, 64
SIZES = 1, 2, 3, 4, 5, 7, 8, 13, 16, 32
BATCHES = 1, 2, 3, 7, 16, 80, 128
LAYOUTS = {"last": torch.channels_last, "first": torch.contiguous_format}
PASSES = "forward", "input", "weight", "bias"
# `layout` is that of the images, `weights` that of the weight, `grad` that of the gradient that comes in
Case = collections.namedtuple("Case", "n c o k stride pad h w groups dtype layout weights grad bias threads",
                              defaults=(1, "float32", "last", "last", "dense", False, 1))


def valid(case, most=2e7):
    "Whether a case has an output, and is small enough to be computed in float64."
    rows, cols = outputs(case)
    divides = case.c % case.groups == 0 and case.o % case.groups == 0
    return rows > 0 and cols > 0 and divides and case.n*case.c*case.o*rows*cols*case.k**2/case.groups <= most


def sample(count, seed):
    "Random cases; every value of one property meets every value of another after some thousands."
    draw, cases = random.Random(seed), []
    while len(cases) < count:
        one = draw.choice
        c, o, k, size, deep = one(CHANNELS), one(CHANNELS), one((1, 3, 5, 7)), one(SIZES), draw.random() < .15
        case = Case(one(BATCHES), c, c if deep else o, k, one((1, 2)), one((0, k//2)), size,
                    size if draw.random() < .85 else one(SIZES), c if deep else 1, one(("float32", "bfloat16")),
                    one(("last", "last", "first")), one(("last", "last", "first")), one(("dense", "first", "expanded")),
                    draw.random() < .3, one((1, 2, 3, 8)))
        if valid(case): cases.append(case)
    return cases


def outputs(case):
    "Rows and columns of the output."
    return [(n + 2*case.pad - case.k)//case.stride + 1 for n in (case.h, case.w)]


def tensors(case):
    "Image, weight, bias and the gradient that comes in: small integers, the same for the same case."
    g = torch.Generator().manual_seed(0)
    ints = lambda *shape: torch.randint(-3, 4, shape, generator=g).to(getattr(torch, case.dtype))
    laid = lambda t, how: t.contiguous(memory_format=LAYOUTS[how])
    x = laid(ints(case.n, case.c, case.h, case.w), case.layout)
    w = laid(ints(case.o, case.c//case.groups, case.k, case.k), case.weights)
    if case.grad == "expanded": dy = ints(case.n, case.o, 1, 1).expand(-1, -1, *outputs(case))
    else: dy = laid(ints(case.n, case.o, *outputs(case)), "first" if case.grad == "first" else case.layout)
    return x, w, ints(case.o) if case.bias else None, dy


def passes(convolution, case, x, w, b, dy, said=lambda name: None):
    "The output and the gradients, each computed alone; `said` is called behind each."
    x, w, b = (t if t is None else t.detach().requires_grad_() for t in (x, w, b))
    y = convolution(x, w, bias=b, stride=case.stride, padding=case.pad, groups=case.groups)
    results = {"forward": y.detach()}
    said("forward")
    for name, t in zip(PASSES[1:], (x, w, b)):
        if t is None or name in getattr(convolution, "frozen", ()): continue
        results[name] = torch.autograd.grad(y, t, dy, retain_graph=True)[0]
        said(name)
    return results


def exact(case, x, w, b, dy):
    "The same in float64, in contiguous memory, where PyTorch asks nothing of oneDNN; and the sums of absolute values."
    double = [t if t is None else t.double().contiguous() for t in (x, w, b, dy)]
    whole = passes(F.conv2d, case, *double)
    size = passes(F.conv2d, case, *(t if t is None else t.abs() for t in double))
    return {name: (whole[name], size[name]) for name in whole}


def judge(got, exact, size, tolerance):
    "What is wrong with a result: '', 'unwritten' (a NaN), 'wrong', or 'rounded': partial sums too were in bfloat16."
    if not got.isfinite().all(): return "unwritten"
    if got.shape != exact.shape: return "wrong"
    error = (got.double() - exact).abs()
    if got.dtype == torch.float32: return "wrong" if (error > tolerance*size).any() else ""
    if (error <= 2**-8*exact.abs()).all(): return ""
    return "rounded" if (error <= 2**-5*size).all() and error.norm() <= .02*size.norm() else "wrong"


def run(convolution, case, guard, repeats=2):
    "The faults of a case: [pass, kind, how many bytes outside]."
    far, faults, tolerance = ctypes.c_long(), [], getattr(convolution, "tolerance", 0)
    torch.set_num_threads(case.threads)
    guard.begin()
    inputs = tensors(case)
    before = [t if t is None else t.clone() for t in inputs]
    right = exact(case, *inputs)
    guard.overruns(ctypes.byref(far))

    def said(name):
        if guard.overruns(ctypes.byref(far)): faults.append((name, "outside", far.value))
    for _ in range(repeats):
        try: results = passes(convolution, case, *inputs, said)
        except RuntimeError as e: return [["?", f"error: {e}"[:120], 0]]
        for name, got in results.items():
            if kind := judge(got, *right[name], tolerance): faults.append((name, kind, 0))
    changed = any(t is not None and not torch.equal(t, b) for t, b in zip(inputs, before))
    if changed: faults.append(("?", "inputs changed", 0))
    return sorted({(p, kind): [p, kind, far] for p, kind, far in faults}.values())


def prepared(x, weight, bias, stride, padding, groups, trains):
    "A layer as a network has it, prepared in the dtype of x, and its parameters by name."
    from bnonly.layers import Conv2d, prepare_layers
    o, c, k, _ = weight.shape
    conv = Conv2d(c*groups, o, k, stride, padding, groups=groups, bias=bias is not None).requires_grad_(trains)
    given = {"0.weight": weight.float()} | ({} if bias is None else {"0.bias": bias.float()})
    model = torch.nn.Sequential(conv)
    model.load_state_dict(given)
    return prepare_layers(model.to(memory_format=torch.channels_last), x.dtype), given


def layer(x, weight, bias=None, stride=1, padding=0, groups=1):
    "A convolution as a layer of a network that trains computes it. It may add in another order."
    model, given = prepared(x, weight, bias, stride, padding, groups, trains=True)
    return torch.func.functional_call(model, given, x.float())


def frozen_layer(x, weight, bias=None, stride=1, padding=0, groups=1):
    "The same as a layer whose weight is frozen, and packed where a kernel computes it."
    return prepared(x, weight, bias, stride, padding, groups, trains=False)[0](x.float())


layer.tolerance = frozen_layer.tolerance = 1e-5   # in float32, as a share of the sum of absolute values
frozen_layer.frozen = "weight", "bias"            # which get no gradient


def work(through):
    "Run the cases that come in, one a line, and say what becomes of each."
    module, name = through.split(":")
    convolution, guard = getattr(importlib.import_module(module), name), ctypes.CDLL(None)
    if module == Path(__file__).stem:   # what takes its time, before a case is timed
        importlib.import_module("bnonly.layers").kernels()
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(convolution, Case(*json.loads(line)), guard)), flush=True)


def compiled(folder):
    "The guarding library, compiled."
    library = Path(folder)/"guarded_malloc.so"
    source = Path(__file__).with_name("guarded_malloc.c")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


def environment(isa, library):
    "What holds a process to an instruction set, and guards its memory."
    most, capability = SETS[isa]
    kept = {k: v for k, v in os.environ.items() if k not in ("ATEN_CPU_CAPABILITY", "LD_PRELOAD")}
    kept |= {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    kept |= dict(BNONLY_MARCH=LEVELS.get(capability, "native"), BNONLY_KERNELS="fused")
    return kept | dict(ONEDNN_MAX_CPU_ISA=most, LD_PRELOAD=str(library), OMP_WAIT_POLICY="passive")


def within(answers, seconds):
    "The next answer, or None; waited for in parts, since a pause of all processes stops no clock."
    for _ in range(4):
        try: return answers.get(timeout=seconds/4)
        except Empty: pass


def start(isa, library, through):
    "A process that runs cases, and the queue of its answers; an empty one says that it has ended."
    command = [sys.executable, __file__, "--worker", "--through", through]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              env=environment(isa, library))
    answers = Queue()
    threading.Thread(target=lambda: [*map(answers.put, worker.stdout), answers.put("")], daemon=True).start()
    if not within(answers, 1200): raise RuntimeError(f"The search did not start: {command} ended with {worker.poll()}.")
    return worker, answers


def search(cases, isa, through, library, patience=120):
    "The faults of all cases, as (case, [[pass, kind, bytes outside]]); a case hangs after `patience` seconds."
    found, left = [], list(cases)
    while left:
        (worker, answers), answer = start(isa, library, through), "ready"
        while left and answer:
            case = left.pop(0)
            try:
                print(json.dumps(case), file=worker.stdin, flush=True)
                answer = within(answers, patience)
            except BrokenPipeError: answer = ""
            if answer is None: faults = [["?", "hang", 0]]
            else: faults = json.loads(answer) if answer else [["?", f"crash {worker.wait()}", 0]]
            if faults: found.append((case, faults))
        worker.kill()
        worker.wait()
    return found


def described(faults):
    "How many faults of each kind a search found, in words; `rounded` is no fault, but what bfloat16 allows."
    kinds = collections.Counter((p, kind) for _, found in faults for p, kind, _ in found)
    return ", ".join(f"{name} {kind}: {n}" for (name, kind), n in sorted(kinds.items())) or "no fault"


def summary(found):
    "What a record tells of what a search found: each fault, and how many cases were rounded, which is none."
    faults = [(case, what) for case, what in found if {kind for _, kind, _ in what} != {"rounded"}]
    named = [dict(case=case._asdict(), faults=what) for case, what in faults]
    return dict(faults=named, rounded=len(found) - len(faults))


def record(searches, seed):
    "What a file says of searches: on what machine they ran, how many cases, and each fault."
    from bnonly.machine import machine
    version = torch.__config__.show().partition("MKL-DNN v")[2].split(" ")[0]
    return dict(seed=seed, onednn=version, machine=machine(torch.device("cpu")), searches=searches)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=300, help="of each instruction set and function")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", nargs="+", choices=SETS, default=[*SETS])
    parser.add_argument("--through", nargs="+", default=["torch.nn.functional:conv2d"],
                        help="module:function of (x, weight, bias=, stride=, padding=, groups=); "
                             "bnonly.faults:safe_conv2d is the way around, convolution_faults:layer and "
                             "convolution_faults:frozen_layer are the layers of the project's networks")
    parser.add_argument("--json", type=Path, help="where to write what was searched, and all faults")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker: return work(*args.through)
    searches, cases = [], sample(args.cases, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(folder)
        for isa, through in itertools.product(args.isa, args.through):
            found = search(cases, isa, through, library)
            print(f"{isa}, {through}: {args.cases} cases, {described(found)}", flush=True)
            searches.append(dict(through=through, isa=isa, cases=args.cases) | summary(found))
            if args.json: args.json.write_text(json.dumps(record(searches, args.seed), indent=1) + "\n")


if __name__ == "__main__": main()
