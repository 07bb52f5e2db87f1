"""The compiled kernels of `csrc/`: built at first use for this processor, cached, and loaded with ctypes.

A library is code that runs as its user, so it is kept in a folder of that user's own, and neither is used where
somebody else owns it or may write to it."""
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

from .experiment import cache_dir, choose
from .logs import logger

__all__ = ["CSRC", "MARCHES", "Direct", "Entry", "Kernels", "Layer", "Norm", "compile_library", "keep_memory",
           "kernels", "load", "march", "processor", "pytorch_convolves_bfloat16", "pytorch_features"]

CSRC = Path(__file__).parent/"csrc"
MARCHES = "native", "x86-64-v4", "x86-64-v3", "x86-64-v2"   # what $BNONLY_MARCH may hold the kernels to: gcc's -march
# -Wno-psabi: vectors longer than a register are passed only between functions of the library
FLAGS = "-std=c++17 -O3 -fopenmp -shared -fPIC -Wall -Wextra -Wno-psabi".split()


def processor() -> str:
    "What machine code depends on: this processor's model and features."
    try: lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError: return platform.machine() + platform.processor()
    said = "model name", "flags", "Features", "CPU implementer", "CPU part"   # the last three on ARM
    return "\n".join(l for l in lines if l.split(":")[0].strip() in said)


def march() -> str:
    """The instruction set to build for: $BNONLY_MARCH, by default all that this processor has.

    `ValueError` for one that does not exist, or that this processor does not have."""
    name = choose("BNONLY_MARCH", os.environ.get("BNONLY_MARCH") or "native", MARCHES)
    needed = dict(zip(MARCHES[1:], ("avx512vl", "avx2", "sse4_2"))).get(name)
    if needed and needed not in processor().split():
        raise ValueError(f"BNONLY_MARCH {name!r} needs {needed}, which is not here; the nearest is 'native'.")
    return name


def run_compiler(compiler:str, *arguments:str) -> subprocess.CompletedProcess:
    "Run the compiler, which may have arguments of its own, with messages in English."
    try: command = shlex.split(compiler)
    except ValueError as e: raise RuntimeError(f"the compiler {compiler!r} is no command: {e}") from None
    return subprocess.run([*command, *arguments], capture_output=True, text=True, errors="replace", timeout=300,
                          env=os.environ | {"LC_ALL": "C"})


def compiler_version(compiler:str) -> str:
    "The compiler's version in its own words: unlike its file's size and time, true behind a wrapper such as ccache."
    return run_compiler(compiler, "--version").stdout.partition("\n")[0]


def check_private(path:Path):
    "`RuntimeError` where another user than root owns a file or folder, or may write to it."
    if not hasattr(os, "geteuid"): return   # Windows, where a home belongs to its user alone
    status = path.stat()
    if status.st_uid not in (os.geteuid(), 0): fault = f"{path} belongs to another user (uid {status.st_uid})"
    elif status.st_mode & 0o022: fault = f"others may write to {path}"
    else: return
    raise RuntimeError(f"{fault}; remove it, or set BNONLY_CACHE to a folder where only you may write")


def library_folder() -> Path:
    """This user's folder of compiled libraries, made where it is missing; `RuntimeError` where it is not private.

    The folder above it may be shared, or be from a version that let the group write there."""
    folder = cache_dir()/f"kernels-{os.geteuid() if hasattr(os, 'geteuid') else 'own'}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)   # whatever the umask is
    check_private(folder)
    return folder


def library_name(compiler:str, flags:list) -> str:
    "A file name that is another one for other sources, another processor, compiler or version of it, or other flags."
    sources = [f.read_text("utf-8") for f in sorted([*CSRC.glob("*.h"), *CSRC.glob("*.cpp")])]
    key = "\n".join([*sources, processor(), compiler, compiler_version(compiler), *flags])
    return f"kernels-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"


def compile_library(compiler:str, flags:tuple=()) -> Path:
    """The compiled library, built where it is not in the cache yet; `RuntimeError` with the compiler's first error, or
    where another user could change the library."""
    flags = [*FLAGS, f"-march={march()}", *flags]
    folder = library_folder()
    library = folder/library_name(compiler, flags)
    if not library.exists():
        logger.info("compiling the kernels for this processor, once")
        with tempfile.TemporaryDirectory(dir=folder) as tmp:   # renamed when whole, so that two may build at once
            out = Path(tmp)/"kernels.so"
            done = run_compiler(compiler, *flags, str(CSRC/"kernels.cpp"), "-o", str(out))
            if done.returncode:
                ended = f"{compiler} ended with {done.returncode}"
                raise RuntimeError(next((line for line in done.stderr.splitlines() if "error" in line), ended))
            with open(out, "rb") as f: os.fsync(f)
            os.chmod(out, 0o700)
            os.replace(out, library)
    for path in (folder, library): check_private(path)
    return library


P, L, I, D = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_double
Entry, Direct = L*4, L*15   # the structs of the same names: strides of a weight, and the sizes of a direct convolution
ARGUMENTS = dict(   # as in kernels.cpp
    forward=[P]*5 + [L, L, I, I, I], backward=[P]*6 + [L, L, I, I, I], entries=[P]*4 + [L]*11 + [I],
    pack_winograd=[P, L, P, P, P, L, L, I], winograd=[P]*4 + [D] + [L]*5 + [I], winograd_gradient=[P]*4 + [L]*5 + [I],
    pack_direct=[P, L, P, P, P, L, L, L, L, I], direct=[P]*4 + [D, P, I], direct_gradient=[P]*4 + [L]*10 + [I],
    blocks_forward=[P]*4 + [L]*5 + [I], blocks_backward=[P]*4 + [L]*5 + [I])


class Norm(ctypes.Structure):
    "A BatchNorm: its parameters and statistics, where mean, 1 / sigma and the gradients go; None where there is none."
    _fields_ = [*((n, P) for n in "weight bias running_mean running_var mean inv_std dweight dbias".split()),
                ("momentum", D), ("eps", D)]


class Layer(ctypes.Structure):
    "A convolution and the BatchNorm behind it, as blocks.h has it."
    _fields_ = [("u", P), ("scale", D), ("z", P), ("x", P), ("dw", P), ("at", Entry), ("mask", P), ("bn", Norm)]


class Kernels:
    "The compiled functions for one dtype, by the names of `ARGUMENTS`."
    def __init__(self, library, dtype:torch.dtype):
        suffix = str(dtype).removeprefix("torch.")
        self.float16 = bool(getattr(library, f"multiplies_float16_{suffix}")())
        self.instructions = library.instruction_set().decode()
        for name, arguments in ARGUMENTS.items():
            function = getattr(library, f"{name}_{suffix}")
            function.argtypes, function.restype = arguments, ctypes.c_float if name.startswith("pack") else None
            setattr(self, name, function)


def load(flags:tuple=()) -> dict:
    "dtype to `Kernels`; raises where they cannot be built."
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None: raise RuntimeError("no C++ compiler")
    library = ctypes.CDLL(str(compile_library(compiler, flags)))
    library.instruction_set.restype = ctypes.c_char_p
    return {d: Kernels(library, d) for d in (torch.float32, torch.bfloat16)}


@lru_cache(None)
def kernels() -> dict|None:
    """The kernels of this process, None for plain PyTorch: on an instruction set older than AVX2, where they do not
    pay, or without a compiler, with a line of notice. $BNONLY_KERNELS insists on either, fused or plain;
    `RuntimeError` where there are none to insist on."""
    asked = os.environ.get("BNONLY_KERNELS") or None
    if asked and choose("BNONLY_KERNELS", asked, ("fused", "plain")) == "plain": return None
    try: found = load()
    except (RuntimeError, OSError, subprocess.SubprocessError) as e:
        why = str(e).splitlines()[0]
        if asked: raise RuntimeError(f"BNONLY_KERNELS 'fused' is not possible ({why}); leave it out, or say 'plain'.")
        logger.warning("no compiled kernels (%s), training is slower", why)
        return None
    return found if asked or found[torch.float32].instructions != "baseline" else None


ONEDNN = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
          "AVX10_1_512", "AVX512_CORE_FP16", "AVX10_1_512_AMX", "AVX512_CORE_AMX", "AVX10_1_512_AMX_FP16",
          "AVX512_CORE_AMX_FP16", "DEFAULT")   # the values of $ONEDNN_MAX_CPU_ISA, each with what those before it allow


def pytorch_features() -> set:
    "What of avx512_bf16, avx512_fp16 and amx_bf16 PyTorch's convolutions may use in this process."
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    cap = ONEDNN.index(cap if cap in ONEDNN else "DEFAULT")
    needs = dict(avx512_bf16="AVX512_CORE_BF16", avx512_fp16="AVX512_CORE_FP16", amx_bf16="AVX512_CORE_AMX")
    cpu = torch.cpu.get_capabilities()
    return {name for name, least in needs.items() if cpu.get(name) and cap >= ONEDNN.index(least)}


def pytorch_convolves_bfloat16() -> str:
    """Which convolutions of bfloat16 PyTorch computes faster than the kernels here: 'all' with AMX; 'direct', all but
    Winograd's, with AVX512-BF16 where there is no AVX512-FP16; else 'none' (runs/bench/cpu,*,kernels.json)."""
    found = pytorch_features()
    if "amx_bf16" in found: return "all"
    return "direct" if "avx512_bf16" in found and "avx512_fp16" not in found else "none"


def keep_memory():
    """Let glibc keep freed activations for the next step of this process. Otherwise it gives the memory of each back to
    the system, which zeroes every page anew at the next step."""
    try: mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError): return         # another C library
    mallopt(-3, 2**30) or mallopt(-3, 2**25)         # M_MMAP_THRESHOLD; older versions take no more than the second
    mallopt(-1, 2**31 - 1)                           # M_TRIM_THRESHOLD
