"The operators beside their definition in float64."
import itertools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from bnonly import native, ops
from bnonly.native import kernels

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no C++ compiler here, so there are no kernels to test")
BIG = dict(memory_format=torch.channels_last)
DTYPES = pytest.mark.parametrize("dtype", ops.DTYPES, ids=str)
pytestmark = needs_kernels


def distance(got, want): return ((got.double() - want).norm()/want.norm()).item()


def random(g, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=g).to(dtype).contiguous(**BIG if len(shape) == 4 else {})


def exact(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


# BatchNorm, residual and ReLU

SHAPES = [
    (32, 784, 1, 1),
    (2, 16, 5, 7),
    (1, 10, 3, 3),
    (3, 24, 9, 11),
    (128, 16, 1, 1),
    (4, 1, 6, 6),
    (128, 64, 8, 8),
    (2, 7, 1, 1),
    (2, 1000, 2, 2),
]


def norm_case(shape, dtype, residual=True, shift=.3):
    "Random inputs, rounded to `dtype` so that float64 sees the same numbers, and a gradient."
    g = torch.Generator().manual_seed(0)
    small = lambda: torch.randn(shape[1], generator=g)
    x = (random(g, *shape) + shift).to(dtype)
    return dict(x=x, residual=random(g, *shape, dtype=dtype) if residual else None, weight=small(), bias=small(),
                running_mean=small(), running_var=small().abs() + .5), random(g, *shape, dtype=dtype)


def evaluate(f, inputs, grad, double=False, frozen=(), **kw):
    "Output, running statistics and gradients of f."
    t = {
        k: v if v is None else v.double() if double else v.clone(memory_format=torch.preserve_format)
        for k, v in inputs.items()
    }
    for k in ("x", "residual", "weight", "bias"):
        if t[k] is not None and k not in frozen: t[k].requires_grad_()
    y = f(**t, **kw)
    if y.requires_grad: y.backward(grad.to(y.dtype))
    return dict(y=y.detach(), running_mean=t["running_mean"], running_var=t["running_var"],
                **{f"d{k}": t[k].grad for k in ("x", "residual", "weight", "bias") if t[k] is not None})


def follow_norm(shape, dtype, frozens=((), ("weight", "bias"), ("bias",), ("x",), ("x", "residual"))):
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    for residual, relu, training, frozen in itertools.product([False, True], [False, True], [False, True], frozens):
        inputs, grad = norm_case(shape, dtype, residual)
        if relu:  # keep away from the corner of the ReLU, where rounding decides
            z = ops.batch_norm_act_reference(
                **{k: None if v is None else v.double() for k, v in inputs.items()}, training=training, relu=False
            )
            grad = grad.masked_fill(z.abs() < 1e-2, 0)
        kw = dict(training=training, relu=relu, frozen=frozen)
        got = evaluate(ops.batch_norm_act, inputs, grad, **kw)
        want = evaluate(ops.batch_norm_act_reference, inputs, grad, double=True, **kw)
        for k, w in want.items():
            assert (got[k] is None) == (w is None), k
            if w is not None: assert (got[k].double() - w).abs().max() <= tolerance * max(w.abs().max(), 1), (k, kw)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@DTYPES
def test_batch_norm_against_float64(shape, dtype):
    follow_norm(shape, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@DTYPES
def test_divergence_shows(bad, dtype):
    inputs, grad = norm_case((2, 16, 5, 5), dtype)
    inputs["x"][1, 3, 2, 2] = bad
    got, want = evaluate(ops.batch_norm_act, inputs, grad), evaluate(ops.batch_norm_act_reference, inputs, grad)
    for k in ("y", "dx", "dweight", "running_mean", "running_var"):
        finite = lambda t: t.isfinite().movedim(1, 0).flatten(1).all(1) if t.dim() == 4 else t.isfinite()
        assert torch.equal(finite(got[k]), finite(want[k])), k


@DTYPES
def test_one_thread_and_two_give_the_same_bits(dtype):
    inputs, grad = norm_case((64, 24, 16, 16), dtype)
    runs, n = [], torch.get_num_threads()
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(evaluate(ops.batch_norm_act, inputs, grad))
    torch.set_num_threads(n)
    assert all(torch.equal(r[k], runs[0][k]) for r in runs for k in r)


def test_a_large_mean_cancels_nothing():
    inputs, grad = norm_case((8, 16, 8, 8), torch.float32, False, shift=1000.)
    got, want = (
        evaluate(ops.batch_norm_act, inputs, grad, relu=False),
        evaluate(ops.batch_norm_act_reference, inputs, grad, double=True, relu=False),
    )
    assert (got["y"].double() - want["y"]).abs().max() < 1e-3


def test_what_the_operator_does_not_take_goes_to_the_definition():
    plain = ops.batch_norm_act_reference
    for x in (torch.randn(8, 16), torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4).double()):
        assert torch.equal(ops.batch_norm_act(x), plain(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.batch_norm_act(torch.randn(1, 16, 1, 1))
    x = torch.randn(2, 16, 4, 4).contiguous(**BIG)
    for r in (torch.randn(1, 16, 1, 1), torch.randn(2, 16, 4, 1)):
        assert torch.equal(ops.batch_norm_act(x, r), plain(x, r))  # broadcast
    for wrong in (
        dict(weight=torch.ones(3)),
        dict(bias=torch.ones(32)),
        dict(running_mean=torch.zeros(3), running_var=torch.ones(3)),
        dict(running_mean=torch.zeros(16), training=False),
    ):
        with pytest.raises(RuntimeError): ops.batch_norm_act(x, **wrong)


def test_a_layout_that_only_looks_like_channels_last_is_copied():
    "Two of three channels: their numbers do not lie beside each other."
    x, w = torch.randn(4, 3, 5, 5).contiguous(**BIG)[:, :2].requires_grad_(), torch.rand(2)
    assert x.stride(1) == 1 and not x.is_contiguous(**BIG)
    got, want = (
        torch.autograd.grad(f(x, weight=w).square().sum(), x)[0]
        for f in (ops.batch_norm_act, ops.batch_norm_act_reference)
    )
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# Convolutions

def conv(how, x, w, bias=None, stride=1, padding=1):
    return ops.conv2d(x, w, bias, None, None, (stride,) * 2, (padding,) * 2, algorithm=how)


def input_gradient(how, dy, w, size, stride=1, padding=1):
    return torch.ops.bnonly.conv2d_input_gradient(dy, w, None, size, (stride,)*2, (padding,)*2, (1, 1), 1, how)


def weight_gradient(how, dy, x, w, stride=1, padding=1):
    return torch.ops.bnonly.conv2d_weight_gradient(dy, x, w, (stride,)*2, (padding,)*2, (1, 1), 1, how)


def conv_case(B, C, O, H, W, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    w = torch.randn(O, C, 3, 3, generator=g)*(2/(9*C))**.5
    return (
        random(g, B, C, H, W, dtype=dtype),
        w.to(dtype).contiguous(**BIG),
        random(g, B, O, H, W, dtype=dtype),
        random(g, O, dtype=dtype),
    )


WINOGRAD = (
    (3, 32, 32, 2, 3),
    (2, 32, 64, 5, 7),
    (9, 64, 32, 8, 8),
    (3, 96, 160, 9, 4),
    (1, 64, 128, 33, 56),
    (70, 32, 32, 2, 2),
    (3, 160, 96, 3, 6),
    (5, 16, 16, 32, 32),
    (3, 16, 48, 9, 5),
)
# Float16 products, of bfloat16 where the processor has them, round to 11 bits.
FAR = dict(float32=(5e-6,)*3, bfloat16=(.0034, .0034, 1e-5), float16=(.0068, .0068, .005))


def follow_winograd(shape, dtype, unit=1.):
    """Within two roundings to bfloat16 (0.0017 each), or with products of float16 within four; then a weight's
    gradient, which is not rounded."""
    x, w, dy, bias = conv_case(*shape, dtype)
    x, dy, bias = x*unit, dy/unit, bias*unit
    got = (
        conv("winograd", x, w, bias),
        input_gradient("winograd", dy, w, x.shape[2:]),
        weight_gradient("winograd", dy, x, w),
    )
    true = exact(*(t.requires_grad_() for t in (x, w, bias)))
    want = F.conv2d(*true, 1, 1)
    want = want, *torch.autograd.grad(want, true[:2], dy.double())
    far = FAR["float16" if kernels()[dtype].float16 else str(dtype)[6:]]
    for a, b, most in zip(got, want, far): assert distance(a, b) < most


@pytest.mark.parametrize("shape", (*WINOGRAD, (64, 32, 32, 32, 32)), ids=str)
@DTYPES
def test_winograd_against_float64(shape, dtype):
    follow_winograd(shape, dtype)


@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86")
@pytest.mark.parametrize("march", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_operators_on_a_lesser_processor(march):
    """The same with the registers of other instruction sets, as far as this processor has them, and without products
    of float16."""
    if march == "x86-64-v4" and not torch.cpu.get_capabilities().get("avx512_f"):
        pytest.skip("this processor has no AVX-512")
    code = """import test_ops as t
assert not t.kernels()[t.torch.bfloat16].float16
for dtype in t.ops.DTYPES:
    for s in t.WINOGRAD: t.follow_winograd(s, dtype)
    for s in t.BLOCKS[:4]: t.follow_blocks(s, dtype)
    for s in t.SHAPES: t.follow_norm(s, dtype, ((), ("x",)))
    for case in t.SPARSE: t.follow_entries(dtype, *case)
    for s in t.DIRECT: t.follow_direct(s, dtype=dtype)"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        env=os.environ | {"CXX": "g++", "BNONLY_MARCH": march, "BNONLY_KERNELS": "fused", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6, 1e30])
def test_winograd_takes_numbers_of_any_size(unit):
    "Float16 goes from 6e-8 to 65504, bfloat16 from 1e-38 to 3e38."
    follow_winograd((5, 16, 16, 32, 32), torch.bfloat16, unit)
    follow_winograd((3, 160, 96, 3, 6), torch.bfloat16, unit)


def plain_gradient(x, dy, padding):
    return torch.nn.grad.conv2d_weight(x, (dy.shape[1], x.shape[1], 3, 3), dy, padding=padding)


def test_no_sum_of_float16_is_infinite():
    "Where every product has the same sign, and where tile and weight have the signs that bring forth the largest."
    signs = torch.tensor([1, -1, -1, 1, 1, -1]*2).bfloat16()
    for C, picture in itertools.product((16, 64, 1024), (torch.ones(12, 12), signs[:, None]*signs)):
        x = picture.bfloat16().expand(2, C, 12, 12).contiguous(**BIG)
        for w in (torch.ones(16, C, 3, 3), (signs[:3, None]*signs[:3]).float().expand(16, C, 3, 3)):
            dy, w = x[:, :16].contiguous(**BIG), w.bfloat16()
            for got, f, *given in (
                (conv("winograd", x, w), F.conv2d, x, w),
                (weight_gradient("winograd", dy, x, w), plain_gradient, x, dy),
            ):
                most = f(*(t.double().abs() for t in given), padding=1)
                assert (got.double() - f(*(t.double() for t in given), padding=1)).norm() < .0034*most.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_through_winograd(bad):
    x, w, dy, _ = conv_case(3, 32, 32, 8, 8)
    x[1, 5, 3, 3] = dy[1, 5, 3, 3] = bad
    for y in (conv("winograd", x, w), input_gradient("winograd", dy, w, x.shape[2:])):
        assert not y[1, :, 2:5, 2:5].isfinite().any() and y[[0, 2]].isfinite().all()
    assert not weight_gradient("winograd", dy, x, w)[5, 5].isfinite().any()


# images, input and output channels, height and width, taps, stride, padding
DIRECT = (
    (5, 3, 16, 32, 32, 3, 1, 1),
    (5, 16, 32, 32, 32, 3, 2, 1),
    (3, 32, 64, 15, 9, 3, 2, 1),
    (3, 16, 32, 1, 10, 1, 2, 0),
    (2, 64, 256, 7, 5, 1, 1, 0),
    (2, 3, 64, 30, 33, 7, 2, 3),
    (3, 48, 16, 7, 13, 5, 3, 2),
    (2, 80, 112, 8, 14, 2, 2, 0),
    (3, 16, 16, 6, 4, 3, 1, 2),
    (9, 16, 16, 3, 11, 1, 3, 2),
    (41, 32, 48, 4, 4, 3, 2, 1),
    (37, 16, 32, 2, 2, 3, 1, 1),
    (5, 3, 16, 3, 9, 3, 2, 1),
    (40, 16, 32, 5, 2, 1, 2, 0),
)


def follow_direct(shape, how="direct", dtype=torch.bfloat16):
    "With a weight and a bias of float32, whose gradients are not rounded."
    B, C, O, H, W, K, stride, padding = shape
    g = torch.Generator().manual_seed(0)
    x, w, bias = random(g, B, C, H, W, dtype=dtype), random(g, O, C, K, K)/(C*K*K)**.5, random(g, O)
    w, bias = (t.bfloat16().float() for t in (w, bias))
    true = exact(*(t.requires_grad_() for t in (x, w, bias)))
    want, got = F.conv2d(*true, stride, padding), conv(how, x, w, bias, stride, padding)
    dy = random(g, *want.shape, dtype=dtype)
    want, got = (
        (y, *torch.autograd.grad(y, given, dy.to(y.dtype))) for y, given in ((want, true), (got, (x, w, bias)))
    )
    far = .0034 if dtype == torch.bfloat16 else 5e-6
    for a, b in zip(got, want): assert a.shape == b.shape and distance(a, b) < far
    if how == "direct": assert distance(got[2], want[2]) < (.001 if kernels()[dtype].float16 else 1e-5)


@pytest.mark.parametrize("shape", DIRECT, ids=str)
@DTYPES
def test_direct_convolutions_against_float64(shape, dtype):
    follow_direct(shape, dtype=dtype)


@pytest.mark.parametrize("shape", DIRECT[1:6], ids=str)
def test_convolutions_of_pytorch_against_float64(shape):
    follow_direct(shape, "pytorch")


def test_an_image_of_one_pixel_gets_a_gradient():
    "With a stride of two, three of the four phases have no pixel."
    _, w, dy, _ = conv_case(4, 32, 32, 1, 1)
    got = input_gradient("direct", dy, w, (1, 1), 2)
    assert distance(got, torch.nn.grad.conv2d_input((4, 32, 1, 1), w.double(), dy.double(), 2, 1)) < .0025


# The sums of a weight's gradient are cut into chunks of 64 rows of tiles or pixels.
@pytest.mark.parametrize(
    "dtype,shape,stride",
    [
        *((d, s, 1) for d in ops.DTYPES for s in ((37, 64, 96, 6, 10), (100, 16, 16, 5, 32))),
        (torch.bfloat16, (100, 16, 32, 9, 20), 2),
    ],
    ids=str,
)
def test_convolutions_depend_neither_on_threads_nor_on_other_images(dtype, shape, stride):
    (x, w, _, bias), how = conv_case(*shape, dtype), "winograd" if stride == 1 else "direct"
    dy, n, results = torch.randn_like(conv(how, x, w, bias, stride)), torch.get_num_threads(), []
    for threads in (3, 2, 1):
        torch.set_num_threads(threads)
        results.append(
            (
                conv(how, x, w, bias, stride),
                weight_gradient(how, dy, x, w, stride),
                input_gradient(how, dy, w, x.shape[2:], stride),
            )
        )
    torch.set_num_threads(n)
    assert all(torch.equal(a, b) for other in results[1:] for a,b in zip(results[0], other))
    assert all(torch.equal(conv(how, x[i:i+1], w, bias, stride), results[0][0][i:i+1]) for i in (0, 20, 36))


@pytest.mark.parametrize("how,stride", [("winograd", 1), ("direct", 2)])
@DTYPES
def test_a_packed_weight_gives_the_same_bits(how, stride, dtype):
    x, w, _, _ = conv_case(2, 32, 32, 6, 12, dtype)
    x.requires_grad_()
    packed = [ops.pack_weight(w, how, back, stride, 1) for back in (False, True)]
    both = [
        conv(how, x, w, None, stride),
        ops.conv2d(x, torch.zeros_like(w), None, *packed, (stride,) * 2, (1, 1), algorithm=how),
    ]
    dy = torch.randn_like(both[0])
    assert torch.equal(*both) and torch.equal(*(torch.autograd.grad(y, x, dy)[0] for y in both))


def test_a_weight_that_no_kernel_takes_is_not_packed():
    with pytest.raises(ValueError, match="multiple of 16 channels, not 24; the nearest is 32"):
        ops.pack_weight(torch.randn(24, 16, 3, 3), "winograd")


@pytest.mark.parametrize("bias", [None, torch.randn(32)])
@pytest.mark.parametrize("stride,size", [(1, 3), (2, 3), (2, 1)])
def test_a_frozen_convolution_keeps_only_its_weight(stride, size, bias):
    x, w, kept = (
        torch.randn(4, 8, 8, 8).contiguous(**BIG).requires_grad_(),
        torch.randn(32, 8, size, size).contiguous(**BIG),
        [],
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = conv("pytorch", x, w, bias, stride, size // 2)
    want = F.conv2d(x, w, bias, stride, size//2)
    g = torch.randn_like(y)
    assert [t.data_ptr() for t in kept] == [w.data_ptr()] and torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(want, x, g)[0])


# Which algorithm

def algorithm(rival, shape, trains=False, stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, **how):
    return ops.conv_algorithm(rival, shape, trains, stride, padding, dilation, groups, **how)


def test_the_algorithm_is_chosen_by_shape():
    w = (32, 32, 3, 3)
    assert [algorithm(r, w) for r in ("float32", "none", "direct", "all")] == [
        "winograd",
        "winograd",
        "winograd",
        "pytorch",
    ]
    for shape, *how in (
        ((24, 32, 3, 3),),
        ((32, 24, 3, 3),),
        ((32, 32, 1, 1), False, (1, 1), (0, 0)),
        (w, False, (2, 2)),
        (w, False, (1, 1), (1, 1), (2, 2)),
        (w, False, (1, 1), (1, 1), (1, 1), 2),
    ):
        assert algorithm("direct", shape, *how) == "pytorch"
    for shape, *how in (
        (w, False, (2, 1)),
        (w, False, (1, 1), (1, 1), (2, 2)),
        ((32, 32, 3, 2),),
        ((32, 8, 3, 3), False, (1, 1), (1, 1), (1, 1), 4),
        ((24, 32, 3, 3),),
        ((0, 32, 3, 3),),
    ):
        assert algorithm("none", shape, *how) == "pytorch"
    for shape, *how in ((w, False, (2, 2)), ((32, 3, 3, 3),), ((32, 32, 1, 1), False, (1, 1), (0, 0))):
        assert algorithm("none", shape, *how) == "direct"


def test_small_outputs_go_by_what_leaves_least_empty():
    how = lambda rival, trains, images, *size: algorithm(rival, (32, 32, 3, 3), trains, images=images, size=size)
    for rival, small in ("none", "direct"), ("direct", "pytorch"):
        assert [how(rival, t, 128, *size) for t in (False, True) for size in ((8, 8), (4, 4), (2, 10))] == [
            "winograd"
        ] * 6
        assert how(rival, True, 15, 8, 8) == how(rival, True, 128, 2, 2) == small
        assert how(rival, False, 128, 2, 2) == small
        assert how(rival, False, 128, 1, 9) == how(rival, True, 128, 1, 1) == "pytorch"
    assert how("float32", False, 128, 2, 2) == "winograd"


# A few entries, pooling

SPARSE = [
    ((4, 32, 9, 8), (64, 32, 3, 3), 1, 1, "winograd"),
    ((2, 3, 9, 7), (16, 3, 3, 3), 1, 1, "pytorch"),
    ((3, 16, 9, 12), (8, 16, 3, 3), 2, 1, "pytorch"),
    ((3, 20, 7, 7), (40, 20, 1, 1), 2, 0, "pytorch"),
    ((2, 1, 32, 32), (6, 1, 5, 5), 1, 0, "pytorch"),
    ((1, 3, 40, 40), (64, 3, 7, 7), 2, 3, "pytorch"),
    ((4, 16, 8, 8), (32, 16, 3, 3), 1, 1, "direct"),
    ((128, 30), (50, 30)),
    ((7, 784), (100, 784)),
]


def follow_entries(dtype, shape, weight, stride=1, padding=0, how=None):
    "The gradient of a few entries is that of the whole weight, with one thread and with two."
    g = torch.Generator().manual_seed(0)
    x, w = random(g, *shape, dtype=dtype).requires_grad_(), random(g, *weight).to(dtype).float()
    index = torch.randperm(w.numel(), generator=g)[:37].sort().values
    values = w.flatten()[index].clone().requires_grad_()
    true_x, true_w = exact(x, w.clone().requires_grad_())
    want = F.linear(true_x, true_w) if how is None else F.conv2d(true_x, true_w, None, stride, padding)
    dy = random(g, *want.shape, dtype=dtype)
    dx, dw = torch.autograd.grad(want, (true_x, true_w), dy.double())
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = (
            ops.sparse_linear(x, values, w, index)
            if how is None
            else ops.sparse_conv2d(x, values, w, index, None, (stride,) * 2, (padding,) * 2, how)
        )
        seen.append((y, *torch.autograd.grad(y, (x, values), dy)))
    torch.set_num_threads(before)
    assert torch.equal(seen[0][2], seen[1][2])
    for a, b in zip(seen[0], (want, dx)): assert distance(a, b) < (1e-5 if dtype == torch.float32 else .01)
    torch.testing.assert_close(
        seen[0][2].double(), dw.flatten()[index], rtol=1e-4, atol=1e-5 * dw.abs().max().item() + 1e-5
    )


@DTYPES
@pytest.mark.parametrize("case", SPARSE, ids=str)
def test_the_gradient_of_a_few_entries_is_that_of_the_whole_weight(case, dtype):
    follow_entries(dtype, *case)


@DTYPES
def test_a_few_entries_by_definition(dtype):
    "The reference puts the values in; the operator is given a weight that has them."
    g = torch.Generator().manual_seed(0)
    x, w, values, index = (
        random(g, 3, 16, 6, 6, dtype=dtype).requires_grad_(),
        random(g, 32, 16, 3, 3, dtype=dtype),
        random(g, 5).requires_grad_(),
        torch.tensor([0, 7, 700, 4000, 4607]),
    )
    full = w.flatten().scatter(0, index, values.detach().to(dtype)).view_as(w)
    pairs = (
        ops.sparse_conv2d(x, values, full, index, None, (1, 1), (1, 1), "winograd"),
        ops.sparse_conv2d_reference(x, values, w, index, None, (1, 1), (1, 1)),
    )
    grads = [(y, *torch.autograd.grad(y.float().square().sum(), (x, values))) for y in pairs]
    for a, b in zip(*grads): assert distance(a, b.double()) < (1e-5 if dtype == torch.float32 else .01)
    flat = x[:, :, 0, 0]
    pairs = [
        f(flat, values, v[..., 1, 1], torch.tensor([0, 7, 70, 400, 511]))
        for f, v in ((ops.sparse_linear_reference, w),)
    ]
    assert pairs[0].requires_grad and pairs[0].shape == (3, 32)


@pytest.mark.parametrize("geometry", [(3, 2, 1, False), (2, 2, 0, True)], ids=["resnet", "vgg"])
@DTYPES
def test_pooling_keeps_only_where_the_maxima_were(geometry, dtype):
    (size, stride, padding, ceil), kept = geometry, []
    x = torch.randn(4, 16, 9, 9).to(dtype).contiguous(**BIG).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = ops.max_pool2d(x, [size]*2, [stride]*2, [padding]*2, [1, 1], ceil)
    want = F.max_pool2d(x, size, stride, padding, ceil_mode=ceil)
    g = torch.randn_like(y)
    assert [t.dtype for t in kept] == [torch.int32] and torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(want, x, g)[0])


# Blocks

BLOCKS = (
    (3, 4, 16, 16, 16),
    (2, 3, 16, 18, 30),
    (2, 3, 16, 5, 13),
    (3, 5, 48, 7, 4),
    (1, 1, 64, 8, 8),
    (2, 9, 32, 3, 2),
)  # how many, images, channels, rows, columns; in the second, strips end within an image


def block_case(shape, dtype, trains=False):
    "Blocks of layers whose gammas, betas and images are random, and a gradient."
    (blocks, B, C, H, W), g = shape, torch.Generator().manual_seed(0)
    n = 2*blocks
    weights = [
        (random(g, C, C, 3, 3) * (2 / (9 * C)) ** 0.5).to(dtype).float().contiguous(**BIG).requires_grad_(trains)
        for _ in range(n)
    ]
    affine = [(.5 + torch.rand(C, generator=g)).requires_grad_() for _ in range(2*n)]
    return [
        random(g, B, C, H, W, dtype=dtype).requires_grad_(),
        affine,
        weights,
        [torch.ones(C) for _ in range(2 * n)],
        [0.1] * n,
        [1e-5] * n,
    ], random(g, B, C, H, W, dtype=dtype)


def through(f, given, dy, **how):
    "What comes out, what a backward pass finds, and the running statistics."
    x, affine, weights, running, *rest = given
    running, trains = [t.clone() for t in running], [w for w in weights if w.requires_grad]
    y = f(x, affine, weights, running, *rest, **how)
    dx, *grads = torch.autograd.grad(y, [x, *affine, *trains], dy.to(y.dtype))
    flat = lambda ts: torch.cat([t.detach().flatten().double() for t in ts] or [y.new_zeros(0).double()])
    return dict(
        y=y.detach().double(),
        dx=dx.double(),
        affine=flat(grads[: len(affine)]),
        weights=flat(grads[len(affine) :]),
        statistics=flat(running),
    )


def one_by_one(x, affine, weights, running, momenta, eps):
    "The same by the operators for one layer."
    for i in range(0, len(weights), 2):
        y = x
        for k, residual in ((i, None), (i + 1, x)):
            z = conv("winograd", y, weights[k])
            y = ops.batch_norm_act(z, residual, *affine[2*k:2*k+2], *running[2*k:2*k+2], True, momenta[k], eps[k])
        x = y
    return x


def packed(weights, dtype):
    return [ops.pack_weight(w.detach().to(dtype), "winograd", back) for back in (False, True) for w in weights]


def follow_blocks(shape, dtype, trains=False):
    given, dy = block_case(shape, dtype, trains)
    x, affine, weights, running, *rest = given
    true = [exact(x)[0], exact(*affine), exact(*weights), [t.double() for t in running], *rest]
    want, single, fused = (
        through(ops.basic_blocks_reference, true, dy),
        through(one_by_one, given, dy),
        through(ops.basic_blocks, given, dy),
    )
    for k, w in want.items():
        if len(w):
            assert distance(fused[k], w) <= 1.5 * distance(single[k], w) + (
                1e-6 if k in ("y", "statistics") else 1e-2
            ), k  # a ReLU on its corner
    if not trains:
        found = through(ops.basic_blocks, given, dy, packed=packed(weights, dtype))
        assert all(torch.equal(found[k], fused[k]) for k in found)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@DTYPES
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_blocks_in_one_operator_are_as_near_to_float64_as_one_by_one(shape, dtype, trains):
    follow_blocks(shape, dtype, trains)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
@DTYPES
def test_blocks_do_not_depend_on_threads(dtype, trains):
    (given, dy), found, n = block_case((2, 20, 16, 18, 30), dtype, trains), [], torch.get_num_threads()
    for threads in (3, 2, 1):
        torch.set_num_threads(threads)
        found.append(through(ops.basic_blocks, given, dy))
    torch.set_num_threads(n)
    assert all(torch.equal(r[k], found[0][k]) for r in found for k in r)


def test_blocks_compute_what_trains_alone():
    given, dy = block_case((3, 4, 16, 16, 16), torch.float32, True)
    x, affine, weights, running, *rest = given
    leaves = [x, *affine, *weights]
    run = lambda: ops.basic_blocks(x, affine, weights, [t.clone() for t in running], *rest)
    whole = dict(zip(map(id, leaves), torch.autograd.grad(run(), leaves, dy)))
    y = run()
    some = [
        affine[3],
        affine[4],
        weights[0],
        weights[2],
        weights[5],
    ]  # what a block gives is kept for the next one's weight, or not
    for wanted in (some, some[:2], some[3:4], some[2:3]):
        for t in leaves: t.requires_grad_(any(t is w for w in wanted))
        now = run()
        assert torch.equal(now, y)
        for t, g in zip(wanted, torch.autograd.grad(now, wanted, dy)): assert distance(g, whole[id(t)].double()) < 1e-4
    with torch.no_grad(): assert torch.equal(run(), y)


def test_what_is_kept_may_come_back_in_another_layout():
    (given, dy), found = block_case((2, 4, 16, 16, 16), torch.float32, True), []
    for back in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):  # as `save_on_cpu` has it
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back):
            found.append(through(ops.basic_blocks, given, dy))
    assert all(torch.equal(found[0][k], found[1][k]) for k in found[0])


def test_what_is_not_finite_comes_through_blocks_and_what_is_large_is_no_loss():
    given, dy = block_case((1, 4, 16, 8, 8), torch.float32)
    usual, x = through(ops.basic_blocks, given, dy), given[0]
    given[3][0].fill_(float("nan"))   # a running mean, which training does not read
    found = through(ops.basic_blocks, given, dy)
    assert torch.equal(found["y"], usual["y"]) and found["statistics"][:16].isnan().all()
    given, dy = block_case((1, 4, 16, 8, 8), torch.float32)
    given[2][0].mul_(1e-3)[:, :, 1, 1] += 10.
    given[0] = (given[0].detach() + 1e3).requires_grad_()
    true = [exact(given[0])[0], exact(*given[1]), exact(*given[2]), [t.double() for t in given[3]], *given[4:]]
    assert distance(through(ops.basic_blocks, given, dy)["y"], through(ops.basic_blocks_reference, true, dy)["y"]) < .02
    with torch.no_grad(): x[1, 3, 2, 2] = float("nan")
    given, dy = block_case((1, 4, 16, 8, 8), torch.float32)
    given[0] = x
    got = through(ops.basic_blocks, given, dy)
    assert got["y"].isnan().all() and got["statistics"].isnan().any()


def test_the_default_dtype_is_of_no_account():
    (given, dy), found = block_case((1, 4, 16, 8, 8), torch.float32, True), []
    x, w = given[0], given[2][0]
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            index = torch.arange(0, w.numel(), 50)
            y = ops.sparse_conv2d(
                x, w.detach().flatten()[index].requires_grad_(), w.detach(), index, None, (1, 1), (1, 1), "winograd"
            )
            found.append((*through(ops.basic_blocks, given, dy).values(), *torch.autograd.grad(y, x, dy)))
        finally: torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, *found))


# What PyTorch sees

def op_cases():
    "Operators and inputs, with and without what may be absent."
    g, n = torch.Generator().manual_seed(0), torch.ops.bnonly
    x, r, w = (
        random(g, 4, 16, 9, 7).requires_grad_(),
        random(g, 4, 16, 9, 7).requires_grad_(),
        random(g, 32, 16, 3, 3).requires_grad_(),
    )
    a, b, one = torch.rand(16, requires_grad=True), torch.randn(16, requires_grad=True), (1, 1)
    index, rows = torch.arange(0, w.numel(), 7), random(g, 5, 16).requires_grad_()
    values = w.detach().flatten()[index].requires_grad_()
    blocks = {t: block_case((2, 4, 16, 9, 7), torch.float32, t)[0] for t in (False, True)}
    yield n.batch_norm_act, x, r, a, b, None, None, 1e-5, True
    yield (
        n.batch_norm_act,
        x.detach().bfloat16().requires_grad_(),
        None,
        a,
        None,
        torch.zeros(16),
        torch.ones(16),
        1e-5,
        True,
    )
    for stride, how in ((1, "winograd"), (2, "direct")):
        yield n.conv2d, x, w, None, None, None, (stride,) * 2, one, one, 1, how
    yield n.conv2d, x, w.detach(), torch.randn(32, requires_grad=True), None, None, (2, 2), one, one, 1, "pytorch"
    yield n.sparse_conv2d, x, values, w.detach(), index, None, one, one, "winograd"
    yield n.sparse_linear, rows, values[:100], w.detach()[..., 1, 1], index[:100] // 9, None
    yield n.max_pool2d, x, (3, 3), (2, 2), one, one, False
    for trains, (x, affine, weights, _, _, eps) in blocks.items():
        yield (
            n.basic_blocks,
            x,
            affine,
            weights,
            [] if trains else packed(weights, torch.float32),
            eps,
            [trains] * len(weights),
        )


@pytest.mark.parametrize("i", range(10))
def test_an_operator_is_registered_as_pytorch_wants_it(i):
    "Schema, autograd, tensors without numbers, and a trace of forward and backward pass with sizes that may change."
    op, *given = [*op_cases()][i]
    with torch.random.fork_rng(): assert set(opcheck(op.default, given).values()) == {"SUCCESS"}


def test_every_operator_is_checked():
    "Those whose names end in _forward, _backward and _gradient are parts of others."
    checked = {op.__name__ for op, *_ in op_cases()}
    assert {n for n in ops.OPERATORS if not n.endswith(("_forward", "_backward", "_gradient"))} == checked


def test_the_counter_of_products_sees_what_pytorchs_own_operators_have():
    from torch.utils.flop_counter import FlopCounterMode

    def count(f):
        with FlopCounterMode(display=False) as flops: f()
        return flops.get_total_flops()
    x, w, dy, _ = conv_case(2, 16, 32, 8, 8, torch.float32)
    for t in (x, w): t.requires_grad_()
    gradients = lambda y: torch.autograd.grad(y, [t for t in (x, w) if t.requires_grad], dy)
    for trains in (True, False):
        w.requires_grad_(trains)
        assert count(lambda: gradients(conv("winograd", x, w))) == count(lambda: gradients(F.conv2d(x, w, None, 1, 1)))
    for trains in (True, False):
        given, dy = block_case((2, 4, 16, 9, 7), torch.float32, trains)
        assert count(lambda: through(ops.basic_blocks, given, dy)) == count(
            lambda: through(ops.basic_blocks_reference, given, dy)
        )


# Building

def test_without_a_compiler_there_is_one_line_of_notice(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    code = "from bnonly.native import kernels; assert kernels() is None"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and "no C++ compiler" in done.stderr


def test_what_the_compiler_objects_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "kernels.cpp").write_text("int x = ;")
    monkeypatch.setattr(native, "CSRC", tmp_path)
    with pytest.raises(RuntimeError, match="error: "): native.load()


def test_two_processes_may_build_at_once(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    code = "from bnonly.native import load; assert load(('-O0',))"   # a quick build is enough here
    both = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in "ab"]
    assert [p.wait() for p in both] == [0, 0]
    assert [f.suffix for f in tmp_path.rglob("*") if f.is_file()] == [".so"]


def test_a_misspelt_choice_of_kernels_is_an_error(monkeypatch):
    monkeypatch.setenv("BNONLY_KERNELS", "plian")
    with pytest.raises(ValueError, match="nearest is 'plain'"): kernels.__wrapped__()


@needs_kernels
@pytest.mark.parametrize("k,padding", [(3, 1), (1, 0)])
def test_the_gradient_of_a_weight_that_mostly_meets_padding_is_whole(k, padding):
    "Where PyTorch leaves some of it unwritten (bnonly.faults)."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 1, 1, generator=g).bfloat16()
    w = torch.randn(8, 16, k, k, generator=g, requires_grad=True)
    dirt = [torch.full((8, 16, k, k), torch.nan) for _ in range(50)]
    del dirt   # what the memory holds before
    y = ops.conv2d(x, w, None, None, None, (2, 2), (padding, padding))
    y.float().sum().backward()
    v = w.detach().double().requires_grad_()
    torch.nn.functional.conv2d(x.double(), v, None, 2, padding).sum().backward()
    torch.testing.assert_close(w.grad.double(), v.grad, rtol=2e-2, atol=2e-2)


@needs_kernels
def test_forward_derivatives_are_refused_and_not_zero():
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    mean, var = torch.zeros(16), torch.ones(16)
    with pytest.raises((NotImplementedError, RuntimeError)):
        torch.func.jvp(lambda t: ops.batch_norm_act(t, None, None, None, mean, var, False), (x,), (torch.ones_like(x),))
