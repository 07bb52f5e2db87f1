"""Every instruction set that can be selected: the same losses up to rounding, and a run that goes on as if it had not
stopped."""
import json
import os
import platform
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
AVX2 = dict(
    ONEDNN_MAX_CPU_ISA="AVX2", ATEN_CPU_CAPABILITY="avx2", MKL_ENABLE_INSTRUCTIONS="AVX2", BNONLY_MARCH="x86-64-v3"
)
NONE = dict(
    ONEDNN_MAX_CPU_ISA="SSE41",
    ATEN_CPU_CAPABILITY="default",
    MKL_ENABLE_INSTRUCTIONS="SSE4_2",
    BNONLY_MARCH="x86-64-v2",
)
SETS = {
    "native": {},
    "AVX2": AVX2,
    "AVX2, no kernels": AVX2 | dict(BNONLY_KERNELS="plain"),
    "no kernels": dict(BNONLY_KERNELS="plain"),
    "no AVX": NONE,
    "no AVX, with kernels": NONE | dict(BNONLY_KERNELS="fused"),
}
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86"
)


@lru_cache(None)
def results(name):
    """What tests/instructions.py prints under the limits of a set. The checking malloc notices what is written outside
    of its place."""
    limits = {k: v for k, v in os.environ.items() if k not in NONE and k != "BNONLY_KERNELS"} | SETS[name]
    checking = dict(LD_PRELOAD="libc_malloc_debug.so.0", MALLOC_CHECK_="3") if platform.libc_ver()[0] == "glibc" else {}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "instructions.py"],
        env=limits | checking,
        capture_output=True,
        text=True,
        cwd=HERE,
    )
    assert done.returncode == 0, f"{name}: ended with {done.returncode}\n{done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


@needs_compiler
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_gives_the_same_losses(name):
    found, reference = results(name), results("no kernels")
    for run, losses in reference["losses"].items():
        assert found["losses"][run] == pytest.approx(losses, rel=2e-3), (name, run)
    assert found["resumed"]


# In bfloat16 each layer rounds by up to 2**-9 = 0.002, and kernels add in another order. That was seen to change the
# losses of two steps of ResNet-8 by up to 0.0001; FAR is ten times that.
FAR = .001


@needs_compiler
@pytest.mark.parametrize("name", SETS)
def test_every_instruction_set_gives_the_same_losses_in_bfloat16(name):
    found, reference = results(name), results("no kernels")
    for run, losses in reference["bfloat16"].items():
        assert found["bfloat16"][run] == pytest.approx(losses, rel=FAR), (name, run)


@needs_compiler
@pytest.mark.parametrize("name", SETS)
def test_every_operator_is_near_to_its_definition_on_every_instruction_set(name):
    "In its process, which fails where one is not; where there are no kernels there is nothing to compare."
    assert (results(name)["operators"] > 0) == (results(name)["kernels"] != "plain")


@needs_compiler
def test_bfloat16_goes_through_both_kinds_of_kernels():
    for name in ("AVX2", "no AVX, with kernels"):
        assert all({"winograd", "direct"} <= {*a} for a in results(name)["algorithms"].values()), name


@needs_compiler
def test_the_limits_are_kept():
    assert results("AVX2")["kernels"] == "avx2" and results("AVX2")["pytorch"] == "AVX2"
    assert [results(n)["kernels"] for n in ("no AVX", "no AVX, with kernels", "no kernels")] == [
        "plain",
        "baseline",
        "plain",
    ]
    assert results("no AVX")["pytorch"] == "DEFAULT"


@needs_compiler
@pytest.mark.parametrize("march", ["native", "x86-64-v3"])
def test_the_kernels_touch_no_memory_but_their_own(march):
    """Under AddressSanitizer and UndefinedBehaviorSanitizer: every kernel, odd channels, one pixel, one image, both
    dtypes, registers of either width."""
    if march != "native" and not torch.cpu.get_capabilities().get("avx2"): pytest.skip("this processor has no AVX2")
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(map(os.path.isabs, libraries)): pytest.skip("g++ has no libasan here")
    code = """import torch
import test_ops as t
torch.set_num_threads(2)
for dtype in t.ops.DTYPES:
    for s in t.SHAPES: t.follow_norm(s, dtype, ((),))
    for s in (*t.WINOGRAD, (1, 16, 16, 1, 1), (1, 16, 32, 2, 2)): t.follow_winograd(s, dtype)
    for case in t.SPARSE: t.follow_entries(dtype, *case)
    for s in t.BLOCKS:
        for trains in (False, True): t.follow_blocks(s, dtype, trains)
    for s in (*t.DIRECT, (1, 1, 16, 2, 2, 3, 1, 1), (1, 5, 16, 3, 3, 3, 2, 1)): t.follow_direct(s, dtype=dtype)
print("clean")"""
    env = os.environ | dict(
        CXX="g++ -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        LD_PRELOAD=" ".join(libraries),
        BNONLY_KERNELS="fused",
        BNONLY_MARCH=march,
        ASAN_OPTIONS="detect_leaks=0:alloc_dealloc_mismatch=0",
        OMP_NUM_THREADS="2",
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=HERE, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout.endswith("clean\n"), done.stderr[-3000:]
