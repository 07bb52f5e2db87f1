"The fused kernels beside their definition in float64."
import copy
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bnonly.data import load_data, loaders
from bnonly.experiment import Spec
from bnonly.kernels import _own, _way, _way_of, LeanConv, LeanPool, accelerate, bn_act, bn_act_plain, convolve, few, input_gradient, kernels, transformed, way, weight_gradient
from bnonly import native
from bnonly.models import BasicBlock, BatchNormAct, create_model
from bnonly.policies import RandomEntries, freeze, trainable
from bnonly.train import fit, loss_func, prepare, sgd

needs_kernels = pytest.mark.skipif(kernels() is None, reason="no C++ compiler here, so there are no fused kernels to test")
SHAPES = [(32, 784, 1, 1), (2, 16, 5, 7), (1, 10, 3, 3), (3, 24, 9, 11), (128, 16, 1, 1), (4, 1, 6, 6), (128, 64, 8, 8), (2, 7, 1, 1), (2, 1000, 2, 2)]
BIG = dict(memory_format=torch.channels_last)


def case(shape, dtype, residual=True, shift=.3):
    "Random inputs, rounded to `dtype` so that float64 sees the same numbers, and a gradient."
    g = torch.Generator().manual_seed(0)
    big = lambda s=0: (torch.randn(*shape, generator=g) + s).to(dtype).contiguous(**BIG)
    small = lambda: torch.randn(shape[1], generator=g)
    return dict(x=big(shift), residual=big() if residual else None, weight=small(), bias=small(),
                running_mean=small(), running_var=small().abs() + .5), big()


def evaluate(f, inputs, grad, double=False, frozen=(), **kw):
    "Output, running statistics and gradients of f."
    t = {k: v if v is None else v.double() if double else v.clone(memory_format=torch.preserve_format) for k, v in inputs.items()}
    for k in ("x", "residual", "weight", "bias"):
        if t[k] is not None and k not in frozen: t[k].requires_grad_()
    y = f(**t, **kw)
    if y.requires_grad: y.backward(grad.to(y.dtype))
    return dict(y=y.detach(), running_mean=t["running_mean"], running_var=t["running_var"],
                **{f"d{k}": t[k].grad for k in ("x", "residual", "weight", "bias") if t[k] is not None})


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_combination_against_float64(shape, dtype):
    tolerance = 1e-2 if dtype == torch.bfloat16 else 2e-5
    frozens = [(), ("weight", "bias"), ("bias",), ("x",), ("x", "residual")]
    for residual, relu, training, frozen in itertools.product([False, True], [False, True], [False, True], frozens):
        inputs, grad = case(shape, dtype, residual)
        if relu:   # keep away from the corner of the ReLU, where rounding decides
            z = bn_act_plain(**{k: None if v is None else v.double() for k, v in inputs.items()}, training=training, relu=False)
            grad = grad.masked_fill(z.abs() < 1e-2, 0)
        kw = dict(training=training, relu=relu, frozen=frozen)
        got, want = evaluate(bn_act, inputs, grad, **kw), evaluate(bn_act_plain, inputs, grad, double=True, **kw)
        for k, w in want.items():
            assert (got[k] is None) == (w is None), k
            if w is not None: assert (got[k].double() - w).abs().max() <= tolerance * max(w.abs().max(), 1), (k, kw)


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_shows(bad, dtype):
    inputs, grad = case((2, 16, 5, 5), dtype)
    inputs["x"][1, 3, 2, 2] = bad
    got, want = evaluate(bn_act, inputs, grad), evaluate(bn_act_plain, inputs, grad)
    for k in ("y", "dx", "dweight", "running_mean", "running_var"):
        finite = lambda t: t.isfinite().movedim(1, 0).flatten(1).all(1) if t.dim() == 4 else t.isfinite()
        assert torch.equal(finite(got[k]), finite(want[k])), k


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_thread_and_two_give_the_same_bits(dtype):
    inputs, grad = case((64, 24, 16, 16), dtype)
    runs, n = [], torch.get_num_threads()
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(evaluate(bn_act, inputs, grad))
    torch.set_num_threads(n)
    assert all(torch.equal(r[k], runs[0][k]) for r in runs for k in r)


@needs_kernels
def test_a_large_mean_cancels_nothing():
    inputs, grad = case((8, 16, 8, 8), torch.float32, False, shift=1000.)
    got, want = evaluate(bn_act, inputs, grad, relu=False), evaluate(bn_act_plain, inputs, grad, double=True, relu=False)
    assert (got["y"].double() - want["y"]).abs().max() < 1e-3


def test_what_does_not_fit_goes_to_the_definition():
    for x in (torch.randn(8, 16), torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4).double()):
        assert torch.equal(bn_act(x), bn_act_plain(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        bn_act(torch.randn(1, 16, 1, 1))
    x = torch.randn(2, 16, 4, 4).contiguous(**BIG)
    for r in (torch.randn(1, 16, 1, 1), torch.randn(2, 16, 4, 1)): assert torch.equal(bn_act(x, r), bn_act_plain(x, r))   # broadcast
    for wrong in (dict(weight=torch.ones(3)), dict(bias=torch.ones(32)), dict(running_mean=torch.zeros(3), running_var=torch.ones(3)),
                  dict(running_mean=torch.zeros(16), training=False)):
        with pytest.raises(RuntimeError): bn_act(x, **wrong)


@pytest.mark.parametrize("bias", [None, torch.randn(32)])
@pytest.mark.parametrize("stride,size", [(1, 3), (2, 3), (2, 1)])
def test_a_frozen_convolution_keeps_only_its_weight(stride, size, bias):
    x, w, kept = torch.randn(4, 8, 8, 8).contiguous(**BIG).requires_grad_(), torch.randn(32, 8, size, size).contiguous(**BIG), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = LeanConv.apply(x, w, bias, (stride,)*2, (size//2,)*2, (1, 1), 1)
    want = torch.conv2d(x, w, bias, stride, size//2)
    g = torch.randn_like(y)
    assert [t.data_ptr() for t in kept] == [w.data_ptr()] and torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(want, x, g)[0])


needs_tiles = pytest.mark.skipif(not kernels() or native.pytorch_convolves_bfloat16() == "all", reason="no kernels here, or AMX, which needs no tiles for bfloat16")
SAME = (1, 1), (1, 1), (1, 1), 1   # stride, padding, dilation, groups

def tile_case(B, C, O, H, W):
    g = torch.Generator().manual_seed(0)
    x, w, dy = torch.randn(B, C, H, W, generator=g), torch.randn(O, C, 3, 3, generator=g)*(2/(9*C))**.5, torch.randn(B, O, H, W, generator=g)
    return [t.bfloat16().contiguous(**BIG) for t in (x, w, dy)] + [torch.randn(O, generator=g).bfloat16()]

WINOGRAD = (3, 32, 32, 2, 3), (2, 32, 64, 5, 7), (9, 64, 32, 8, 8), (3, 96, 160, 9, 4), (1, 64, 128, 33, 56), (70, 32, 32, 2, 2), (3, 160, 96, 3, 6), (5, 16, 16, 32, 32), (3, 16, 48, 9, 5)

@needs_kernels
@pytest.mark.parametrize("shape", (*WINOGRAD, (64, 32, 32, 32, 32)), ids=str)
def test_convolutions_of_float32_against_float64(shape):
    follow(shape)

def follow(shape):
    x, w, dy = given = [t.float() for t in tile_case(*shape) if t.dim() > 1]
    exact = [t.double().requires_grad_() for t in given]
    assert way(x.dtype, w, *SAME) == "tiles"
    got, want = (convolve(x, w, None, *SAME), input_gradient(dy, w, x.shape, *SAME), weight_gradient(dy, x, w, *SAME)), torch.conv2d(*exact[:2], None, 1, 1)
    want = want, *torch.autograd.grad(want, exact[:2], exact[2])
    for a, b in zip(got, want): assert (a.double() - b).norm() < 5e-6 * b.norm()

@needs_kernels
@pytest.mark.skipif(shutil.which("g++") is None or platform.machine() != "x86_64", reason="needs g++ on x86")
@pytest.mark.parametrize("march", ["x86-64-v2", "x86-64-v3", "x86-64-v4"])
def test_convolutions_on_a_lesser_processor(march):
    "The same with the registers of other instruction sets, as far as this processor has them, and without products of float16."
    if march == "x86-64-v4" and not torch.cpu.get_capabilities().get("avx512_f"): pytest.skip("this processor has no AVX-512")
    code = """import bnonly.kernels, test_kernels as t
bnonly.kernels.pytorch_convolves_bfloat16 = lambda: "none"
for s in t.WINOGRAD: t.follow(s)
for s in t.BLOCKS[:4]: t.follow_blocks(s, t.torch.float32)
assert not t.kernels()[t.torch.bfloat16].float16
for s in t.WINOGRAD: t.follow_bfloat16(s)
for s in t.DIRECT: t.follow_direct(s)
for s in t.BLOCKS[:4]: t.follow_blocks(s, t.torch.bfloat16)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True,
                          env=os.environ | {"CXX": "g++", "BNONLY_MARCH": march, "BNONLY_KERNELS": "fused", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr

def follow_bfloat16(shape, unit=1.):
    "Within two roundings to bfloat16 (0.0017 each), or with the products of halves within four; then a weight's gradient, which is not rounded, within three."
    x, w, dy, bias = tile_case(*shape)
    assert way(x.dtype, w, *SAME) == "tiles"
    x, dy = x*unit, dy/unit
    got = convolve(x, w, bias*unit, *SAME), input_gradient(dy, w, x.shape, *SAME), weight_gradient(dy, x, w, *SAME)
    exact = [t.double().requires_grad_() for t in (x, w, bias*unit)]
    want = torch.conv2d(*exact, 1, 1)
    want = want, *torch.autograd.grad(want, exact[:2], dy.double())
    far = (.0068, .0068, .005) if kernels()[torch.bfloat16].float16 else (.0034, .0034, 1e-5)
    for a, b, most in zip(got, want, far): assert (a.double() - b).norm() < most * b.norm()

@needs_tiles
@pytest.mark.parametrize("shape", WINOGRAD, ids=str)
def test_convolutions_of_bfloat16_against_float64(shape, monkeypatch):
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")   # else small images are PyTorch's
    follow_bfloat16(shape)

@needs_tiles
@pytest.mark.parametrize("unit", [1e-30, 1e-6, 1e6, 1e30])
def test_tiles_take_numbers_of_any_size(unit):
    "Halves go from 6e-8 to 65504, bfloat16 from 1e-38 to 3e38."
    follow_bfloat16((5, 16, 16, 32, 32), unit)
    follow_bfloat16((3, 160, 96, 3, 6), unit)

def plain_gradient(x, dy, padding): return torch.nn.grad.conv2d_weight(x, (dy.shape[1], x.shape[1], 3, 3), dy, padding=padding)

@needs_tiles
def test_no_sum_of_halves_is_infinite():
    "Where every product has the same sign, and where tile and weight have the signs that bring forth the largest."
    signs = torch.tensor([1, -1, -1, 1, 1, -1]*2).bfloat16()
    for C, picture in itertools.product((16, 64, 1024), (torch.ones(12, 12), signs[:, None]*signs)):
        x = picture.bfloat16().expand(2, C, 12, 12).contiguous(**BIG)
        for w in (torch.ones(16, C, 3, 3), (signs[:3, None]*signs[:3]).float().expand(16, C, 3, 3)):
            dy, w = x[:, :16].contiguous(**BIG), w.bfloat16()
            for got, f, *given in ((convolve(x, w, None, *SAME), torch.conv2d, x, w), (weight_gradient(dy, x, w, *SAME), plain_gradient, x, dy)):
                most = f(*(t.double().abs() for t in given), padding=1)
                assert (got.double() - f(*(t.double() for t in given), padding=1)).norm() < .0034*most.norm()

@needs_tiles
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_comes_through_tiles(bad):
    x, w, dy, _ = tile_case(3, 32, 32, 8, 8)
    x[1, 5, 3, 3] = dy[1, 5, 3, 3] = bad
    for y in (convolve(x, w, None, *SAME), input_gradient(dy, w, x.shape, *SAME)):
        assert not y[1, :, 2:5, 2:5].isfinite().any() and y[[0, 2]].isfinite().all()
    assert not weight_gradient(dy, x, w, *SAME)[5, 5].isfinite().any()

# images, input and output channels, height and width, places, stride, padding
DIRECT = ((5, 3, 16, 32, 32, 3, 1, 1), (5, 16, 32, 32, 32, 3, 2, 1), (3, 32, 64, 15, 9, 3, 2, 1), (3, 16, 32, 1, 10, 1, 2, 0), (2, 64, 256, 7, 5, 1, 1, 0),
          (2, 3, 64, 30, 33, 7, 2, 3), (3, 48, 16, 7, 13, 5, 3, 2), (2, 80, 112, 8, 14, 2, 2, 0), (3, 16, 16, 6, 4, 3, 1, 2), (9, 16, 16, 3, 11, 1, 3, 2),
          (41, 32, 48, 4, 4, 3, 2, 1), (37, 16, 32, 2, 2, 3, 1, 1), (5, 3, 16, 3, 9, 3, 2, 1), (40, 16, 32, 5, 2, 1, 2, 0))

def follow_direct(shape):
    "The kernels themselves: `way` asks for them only where they are the faster."
    B, C, O, H, W, K, stride, pad = shape
    g, how = torch.Generator().manual_seed(0), ((stride,)*2, (pad,)*2, (1, 1), 1)
    x, w, bias = torch.randn(B, C, H, W, generator=g), torch.randn(O, C, K, K, generator=g)/(C*K*K)**.5, torch.randn(O, generator=g)
    exact = [t.bfloat16().double().requires_grad_() for t in (x, w, bias)]
    want = torch.conv2d(*exact, stride, pad)
    dy = torch.randn(want.shape, generator=g).bfloat16().contiguous(**BIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")
        x, w, bias = wanted = [t.detach().bfloat16().contiguous(**BIG if t.dim() == 4 else {}).requires_grad_() for t in exact]
        assert _way(x, want.shape[2:], w, bias, *how) == _way(dy, want.shape[2:], w, None, *how) == "direct"
        got = LeanConv.apply(x, w, bias, *how)
        got = (got, *torch.autograd.grad(got, wanted, dy), weight_gradient(dy, x, w, *how))
    want = (want, *torch.autograd.grad(want, exact, dy.double()))
    for a, b in zip(got, want): assert a.shape == b.shape and (a.double() - b).norm() < .0034 * b.norm()
    assert (got[-1].double() - want[2]).norm() < (.001 if kernels()[torch.bfloat16].float16 else 1e-5)*want[2].norm()

@needs_tiles
@pytest.mark.parametrize("shape", DIRECT, ids=str)
def test_direct_convolutions_against_float64(shape):
    follow_direct(shape)

@needs_tiles
def test_an_image_of_one_pixel_gets_a_gradient():
    "With a stride of two, three of the four phases have no pixel."
    _, w, dy, _ = tile_case(4, 32, 32, 1, 1)
    got = _own("direct", dy, w, None, (1, 1), 2, 1, back=True)
    want = torch.nn.grad.conv2d_input((4, 32, 1, 1), w.double(), dy.double(), 2, 1)
    assert (got - want).norm() < .0025*want.norm()

# The sums of a weight's gradient are cut into chunks of 64 rows of tiles or pixels.
@pytest.mark.parametrize("dtype,shape,stride", [
    *(pytest.param(d, s, 1, marks=m) for d,m in ((torch.bfloat16, needs_tiles), (torch.float32, needs_kernels)) for s in ((37, 64, 96, 6, 10), (100, 16, 16, 5, 32))),
    pytest.param(torch.bfloat16, (100, 16, 32, 9, 20), 2, marks=needs_tiles)], ids=str)
def test_convolutions_depend_neither_on_threads_nor_on_other_images(dtype, shape, stride, monkeypatch):
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")
    (x, w, _, bias), how = (t.to(dtype) for t in tile_case(*shape)), ((stride,)*2, *SAME[1:])
    dy, n, results = torch.randn_like(convolve(x, w, bias, *how)), torch.get_num_threads(), []
    assert _way(x, dy.shape[2:], w, bias, *how) != "torch"
    for threads in (3, 2, 1):
        torch.set_num_threads(threads)
        results.append((convolve(x, w, bias, *how), weight_gradient(dy, x, w, *how), input_gradient(dy, w, x.shape, *how)))
    torch.set_num_threads(n)
    assert all(torch.equal(a, b) for other in results[1:] for a,b in zip(results[0], other))
    assert all(torch.equal(convolve(x[i:i+1], w, bias, *how), results[0][0][i:i+1]) for i in (0, 20, 36))

@needs_tiles
@pytest.mark.parametrize("stride", [1, 2])
def test_weights_are_transformed_once_and_again_when_they_change(stride, monkeypatch):
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")
    (x, w, _, _), how = tile_case(2, 32, 32, 6, 12), ((stride,)*2, *SAME[1:])
    with torch.inference_mode(): before = convolve(x, w, None, *how)
    assert torch.equal(convolve(x, w, None, *how), before)
    (key, (_, kept)), = w.transformed.items()
    convolve(x, w, None, *how)
    assert w.transformed[key][1] is kept
    with torch.inference_mode(): assert torch.equal(convolve(x, w.clone(), None, *how), before)
    w.put_(torch.tensor([5, 700]), torch.tensor([9., -9.]).bfloat16())
    after, want = convolve(x, w, None, *how).float(), torch.conv2d(x, w, None, *how).float()
    assert (after - want).norm() < .01*want.norm() < .1*(after - before).norm()

@needs_tiles
def test_what_the_kernels_cannot_take_is_left_to_pytorch(monkeypatch):
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "direct")
    x, w, _, bias = tile_case(1, 32, 32, 6, 6)
    for dtype, weight, *geometry in ((torch.float64, w, *SAME), (torch.float32, w[:24], *SAME), (x.dtype, w, (2, 2), *SAME[1:]), (x.dtype, w, (1, 1), (0, 0), (1, 1), 1),
                                     (x.dtype, w, *SAME[:2], (2, 2), 1), (x.dtype, w[:, :24], *SAME), (x.dtype, w[:24], *SAME),
                                     (x.dtype, w[..., :1, :1], *SAME), (x.dtype, w, *SAME[:3], 2)):
        assert way(dtype, weight, *geometry) == "torch"
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")
    for weight, *geometry in ((w, (2, 1), *SAME[1:]), (w, *SAME[:2], (2, 2), 1), (w[..., :2], *SAME), (w[:, :8], *SAME[:3], 4), (w[:24], *SAME)):
        assert way(x.dtype, weight, *geometry) == "torch"
    with pytest.raises(RuntimeError): convolve(x[..., :2], w, bias, (2, 2), (0, 0), (1, 1), 1)   # smaller than the weight
    for geometry in ((1, 1, 1, 1), ((1, 1), "same", (1, 1), 1)): assert torch.equal(convolve(x, w, None, *geometry), torch.conv2d(x, w, None, *geometry))
    assert torch.equal(convolve(x[0], w, bias, *SAME), torch.conv2d(x[0], w, bias, *SAME))   # no batch
    assert convolve(x[:0], w, bias, *SAME).shape == (0, 32, 6, 6)
    for wrong in ((x, w.repeat(1, 2, 1, 1), bias), (x.repeat(1, 2, 1, 1), w, bias), (x, w, bias.float())):
        with pytest.raises(RuntimeError): convolve(*wrong, *SAME)


@needs_tiles
def test_a_convolution_that_trains_goes_by_tiles_under_autocast_alone():
    net = accelerate(torch.nn.Sequential(torch.nn.Conv2d(16, 32, 3, padding=1, groups=2), torch.nn.Conv2d(32, 32, 3, padding=1)), torch.bfloat16)
    assert ["forward" in vars(m) for m in net] == [False, True]
    x = torch.randn(64, 16, 8, 8).contiguous(**BIG)
    plain = net(x)
    assert plain.dtype == torch.float32
    kept, keep = [], torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with torch.autocast("cpu", torch.bfloat16), keep: y = net(x)
    assert kept and not any(hasattr(t, "transformed") for t in kept)   # which is for frozen weights
    assert y.dtype == torch.bfloat16 and (y - plain).norm() < .01*plain.norm()
    y.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())
    layer = net[1]
    layer.weight.requires_grad_(False), layer.bias.requires_grad_(True)
    with torch.autocast("cpu", torch.bfloat16): assert layer(torch.randn(2, 32, 8, 8).contiguous(**BIG)).requires_grad


@needs_kernels
@pytest.mark.parametrize("images,tiles", [(15, False), (16, True)])
def test_a_weight_that_trains_is_transformed_for_enough_tiles(images, tiles, monkeypatch):
    layer, made = accelerate(torch.nn.Conv2d(32, 32, 3, padding=1, bias=False), torch.float32), []
    monkeypatch.setattr("bnonly.kernels.transformed", lambda *args: (made.append(1), transformed(*args))[1])
    y = layer(torch.randn(images, 32, 8, 8).contiguous(**BIG).requires_grad_())
    y.backward(torch.ones_like(y))
    assert len(made) == 2*tiles   # forward, and for the gradient of the input


@needs_tiles
def test_small_outputs_go_by_what_leaves_least_empty(monkeypatch):
    _, w, _, _ = tile_case(1, 32, 32, 6, 6)
    how = lambda trains, images, *size: way(w.dtype, w.detach().requires_grad_(trains), *SAME, images=images, size=size)
    for pytorch, small in ("none", "direct"), ("direct", "torch"):
        monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: pytorch)
        assert [how(t, 128, *size) for t in (False, True) for size in ((8, 8), (4, 4), (2, 10))] == ["tiles"]*6
        assert how(True, 15, 8, 8) == how(True, 128, 2, 2) == small
        assert how(False, 128, 2, 2) == small
        assert how(False, 128, 1, 9) == how(True, 128, 1, 1) == "torch"


@needs_kernels
def test_a_weight_that_trained_and_is_frozen_again_is_read_again():
    layer = torch.nn.Conv2d(32, 32, 3, padding=1, bias=False).requires_grad_(False)
    x, net = torch.randn(2, 32, 6, 6).contiguous(**BIG), accelerate(layer, torch.float32)
    net(x)
    layer.weight.requires_grad_()
    net(x).square().sum().backward()
    torch.optim.SGD([layer.weight], lr=1e-2, fused=True).step()
    layer.weight.requires_grad_(False)
    torch.testing.assert_close(net(x), torch.conv2d(x, layer.weight, padding=1), rtol=1e-4, atol=1e-5)


@needs_tiles
def test_a_bfloat16_weight_that_a_fused_optimizer_moves_is_transformed_anew():
    x, w, *_ = tile_case(2, 32, 32, 6, 6)
    w.requires_grad_()
    opt = torch.optim.SGD([w], lr=1e-2, fused=True)
    for _ in range(3):
        y = LeanConv.apply(x, w, None, *SAME)
        assert (y - torch.conv2d(x, w, None, 1, 1)).norm() < .01*y.norm()
        y.float().square().sum().backward()
        opt.step()


LAYERS = [(torch.nn.Conv2d(32, 64, 3, padding=1), (4, 32, 9, 8)), (torch.nn.Conv2d(16, 32, 3, padding=1, bias=False), (4, 16, 8, 8)), (torch.nn.Conv2d(3, 16, 3, padding=1, bias=False), (2, 3, 9, 7)),
          (torch.nn.Conv2d(16, 8, 3, stride=2, padding=1, bias=False), (3, 16, 9, 12)), (torch.nn.Conv2d(20, 40, 1, stride=2, bias=False), (3, 20, 7, 7)),
          (torch.nn.Conv2d(1, 6, 5, bias=False), (2, 1, 32, 32)), (torch.nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False), (1, 3, 40, 40)),
          (torch.nn.Conv2d(16, 32, 3, padding=1), (4, 16, 8, 8)), (torch.nn.Linear(30, 50), (128, 30)), (torch.nn.Linear(784, 100, bias=False), (7, 784))]

@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer,shape", LAYERS, ids=lambda o: str(o)[:24])
def test_the_gradient_of_a_few_entries_is_that_of_the_whole_weight(layer, shape, dtype):
    follow_entries(layer, shape, dtype)

def follow_entries(layer, shape, dtype):
    g = torch.Generator().manual_seed(0)
    layer = copy.deepcopy(layer)
    torch.nn.init.normal_(layer.weight, generator=g)
    if layer.bias is not None: layer.bias.requires_grad_(False)
    index = torch.randperm(layer.weight.numel(), generator=g)[:37].sort().values
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", RandomEntries(layer.weight, index))
    assert few(layer)
    whole = layer.weight.detach().to(dtype).double().requires_grad_()
    x = torch.randn(shape, generator=g).to(dtype)
    if len(shape) == 4: x = x.contiguous(memory_format=torch.channels_last)
    exact = x.double().requires_grad_()
    F, bias = torch.nn.functional, None if layer.bias is None else layer.bias.to(dtype).double()
    reference = F.linear(exact, whole, bias) if exact.dim() == 2 else F.conv2d(exact, whole, bias, layer.stride, layer.padding)
    dy = torch.randn(reference.shape, generator=g).to(dtype)
    dx, dw = torch.autograd.grad(reference, (exact, whole), dy.double())
    accelerate(layer, dtype)
    x.requires_grad_()
    before, seen = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y = layer(x)
        seen.append(torch.autograd.grad(y, layer.parametrizations.weight.original, dy, retain_graph=True)[0])
        own = torch.autograd.grad(y, (x, layer.parametrizations.weight.original), dy)
        near = dict(rtol=1e-4, atol=1e-5*dx.abs().max().item()) if dtype == torch.float32 else dict(rtol=.02, atol=.02*dx.abs().max().item())
        torch.testing.assert_close(y.double(), reference, **near)
        torch.testing.assert_close(own[0].double(), dx, **near)
        torch.testing.assert_close(own[1].double(), dw.flatten()[index], rtol=1e-4, atol=1e-5*dw.abs().max().item() + 1e-5)
    torch.set_num_threads(before)
    assert torch.equal(*seen)
    values = layer.parametrizations.weight.original
    values.grad = torch.ones_like(values)
    sgd([values], lr=1, momentum=0, weight_decay=0).step()
    now = copy.deepcopy(layer)
    del now.forward   # its definition
    torch.testing.assert_close(layer(x).double(), now.double()(x.double()), **near)
    assert not torch.allclose(layer(x).double(), y.double(), **near)


@pytest.mark.parametrize("layer", [torch.nn.Conv2d(4, 4, 3, groups=2, bias=False), torch.nn.Conv2d(4, 4, 3, dilation=2, bias=False),
                                   torch.nn.Conv2d(4, 4, (1, 3), bias=False), torch.nn.Conv2d(4, 4, 3, padding="same", bias=False), torch.nn.Linear(4, 4),
                                   torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False)])
def test_a_layer_whose_geometry_the_kernels_do_not_know_keeps_its_definition(layer):
    layer = copy.deepcopy(layer)
    torch.nn.utils.parametrize.register_parametrization(layer, "weight", RandomEntries(layer.weight, torch.arange(3)))
    assert not few(layer)


def test_a_number_the_kernels_do_not_know_keeps_the_definition_of_few_entries():
    net = accelerate(freeze(create_model("mlp2-100", size=8, in_channels=1), "scattered1").double(), torch.float64)
    net(torch.randn(4, 1, 8, 8, dtype=torch.float64)).sum().backward()
    assert all(p.grad is not None for p in trainable(net).values())


def test_a_frozen_convolution_is_the_one_it_replaces():
    "Whatever its padding, and whatever becomes of its weight."
    x = torch.randn(2, 4, 6, 6).contiguous(**BIG)
    round_ = torch.nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular", bias=False).requires_grad_(False)
    want = round_(x)
    assert torch.equal(accelerate(round_, torch.float32)(x), want)
    layer = accelerate(torch.nn.Conv2d(4, 4, 3, padding=1).to(**BIG).requires_grad_(False), torch.float32)
    with torch.inference_mode(): layer(x)
    layer(x.requires_grad_()).sum().backward()   # trains after it was used without
    for _ in range(3):
        layer.weight.data = torch.randn(4, 4, 3, 3)
        assert torch.allclose(layer(x), torch.conv2d(x, layer.weight, layer.bias, 1, 1), atol=1e-5)


@needs_kernels
def test_a_network_without_shortcuts_keeps_no_inputs_either():
    "VGG's convolutions have biases, frozen with them."
    def held(fused):
        model, seen = freeze(create_model("vgg11"), "bn").to(**BIG), {}
        if fused: accelerate(model, torch.float32)
        weights = {p.data_ptr() for p in model.parameters()}
        def pack(t):
            if t.data_ptr() not in weights: seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): model(torch.randn(8, 3, 32, 32).contiguous(**BIG))
        return sum(seen.values())
    assert held(True) < .55*held(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_frozen_linear_layer_rounds_its_weight(dtype):
    net = accelerate(freeze(create_model("mlp2-100", size=8, in_channels=1), "bn"), dtype)
    layer, x = net.linear[1], torch.randn(4, 100)
    def fast():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16): return layer(x)
    assert torch.equal(fast(), torch.nn.functional.linear(x.to(dtype), layer.weight.to(dtype)))
    layer.weight.data.mul_(2)   # which PyTorch does not count
    assert torch.equal(fast(), torch.nn.functional.linear(x.to(dtype), layer.weight.to(dtype)))
    moving = accelerate(freeze(create_model("mlp2-100", size=8, in_channels=1), "all"), dtype)
    assert not any("forward" in vars(m) for m in moving.modules() if isinstance(m, torch.nn.Linear))


def blocks(n, channels, dtype=torch.float32, policy="bn"):
    "Frozen but for what trains by the policy, and with BatchNorms that have seen other images."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        m = freeze(torch.nn.Sequential(*(BasicBlock(channels, channels, 1) for _ in range(n))), policy, output=()).to(dtype=dtype, **BIG)
        for t in (*m.parameters(), *m.buffers()):
            if t.dim() == 1: t.data.uniform_(.5, 1.5)
    return m


def through(m, x, dy, low=False):
    "What comes out, and what a backward pass finds."
    x = x.clone(**BIG).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=low): y = m(x)
    y.backward(dy)
    found = trainable(m).values()
    return dict(y=y, dx=x.grad, gradients=torch.cat([p.grad.flatten() for p in found if p.dim() == 1]), weights=torch.cat([p.grad.flatten() for p in found if p.dim() > 1] or [x.new_zeros(0)]),
                statistics=torch.cat([b.double().flatten() for b in m.buffers()]))


def in_one_step(found): return type(found["y"].grad_fn).__name__ == "BlocksBackward"

BLOCKS = (3, 4, 16, 16, 16), (2, 3, 16, 18, 30), (2, 3, 16, 5, 13), (3, 5, 48, 7, 4), (1, 1, 64, 8, 8), (2, 9, 32, 3, 2)   # how many, images, channels, rows, columns; in the second, bands end within an image

@needs_kernels
@pytest.mark.parametrize("policy", ["bn", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_tiles)], ids=str)
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_blocks_in_one_step_are_as_near_to_float64_as_one_by_one(shape, dtype, policy, monkeypatch):
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")
    monkeypatch.setattr("bnonly.kernels._way_of", lambda direct, shape, trains, *rest: _way_of(direct, shape, False, *rest))   # also for few tiles
    follow_blocks(shape, dtype, policy)

def follow_blocks(shape, dtype, policy="bn"):
    m, (x, dy) = blocks(shape[0], shape[2], torch.float64, policy), torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1)).to(dtype)
    single, fused = (accelerate(copy.deepcopy(m).float(), dtype) for _ in range(2))
    del single.forward
    exact, single, fused = through(m, x.double(), dy.double()), *(through(f, x, dy, dtype == torch.bfloat16) for f in (single, fused))
    assert in_one_step(fused) and not in_one_step(single)
    for k,want in exact.items():
        far = lambda got: ((got[k].double() - want).norm()/want.norm()).item()
        if len(want): assert far(fused) <= 1.5*far(single) + (1e-6 if k in ("y", "statistics") else 1e-2), k   # a ReLU on its corner


@needs_kernels
@pytest.mark.parametrize("policy", ["bn", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_tiles)], ids=str)
def test_blocks_do_not_depend_on_threads(dtype, policy, monkeypatch):
    monkeypatch.setattr("bnonly.kernels.pytorch_convolves_bfloat16", lambda: "none")
    (x, dy), found, n = torch.randn(2, 20, 16, 18, 30).to(dtype), [], torch.get_num_threads()
    for threads in (3, 2, 1):
        torch.set_num_threads(threads)
        found.append(through(accelerate(blocks(2, 16, policy=policy), dtype), x, dy, dtype == torch.bfloat16))
    torch.set_num_threads(n)
    assert all(in_one_step(r) and torch.equal(r[k], found[0][k]) for r in found for k in r)


@needs_kernels
def test_blocks_compute_what_trains_alone():
    (x, dy), names = torch.randn(2, 4, 16, 16, 16), ("0.bn2.bias", "1.bn1.weight", "0.conv1.weight", "1.conv1.weight", "2.conv2.weight")
    x, whole = x.contiguous(**BIG), through(accelerate(blocks(3, 16, policy="all"), torch.float32), x, dy)
    want = dict(zip([n for n,_ in blocks(3, 16).named_parameters() if "conv" in n], whole["weights"].view(6, 16, 16, 3, 3)))
    for some in (names, names[:2], names[3:4], names[2:3]):   # what a block gives is kept for the next one's weight, or not
        m = accelerate(blocks(3, 16, policy="all"), torch.float32)
        for n,p in m.named_parameters(): p.requires_grad_(n in some or n.startswith("0.bn1"))
        found = dict(y=m(x))
        found["y"].backward(dy)
        assert in_one_step(found) and torch.equal(found["y"], whole["y"])
        grads = {n: p.grad for n,p in m.named_parameters() if p.grad is not None and not n.startswith("0.bn1")}
        assert {*grads} == {*some} and all(g.norm() > 0 for g in grads.values())
        for n in want.keys() & grads.keys(): assert (grads[n] - want[n]).norm() < 1e-4*want[n].norm()
    none = accelerate(blocks(3, 16, policy="all"), torch.float32)
    with torch.no_grad(): assert torch.equal(none(x), whole["y"])
    assert none[0].conv1.weight.requires_grad
    assert torch.equal(torch.cat([b.double().flatten() for b in none.buffers()]), whole["statistics"])
    low, kept = accelerate(blocks(3, 16), torch.float32), []
    low[0].requires_grad_(False), low[1].requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t): y = low(x)
    assert torch.equal(y, whole["y"]) and sum(t.numel() for t in kept) < 4*x.numel()   # of one block


@needs_kernels
def test_what_is_kept_may_come_back_in_another_layout():
    x, dy = torch.randn(2, 4, 16, 16, 16)
    found = []
    for back in (lambda t: t, lambda t: t.clone(memory_format=torch.contiguous_format)):   # as `save_on_cpu` has it
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, back): found.append(through(accelerate(blocks(2, 16, policy="all"), torch.float32), x, dy))
    assert in_one_step(found[0]) and all(torch.equal(found[0][k], found[1][k]) for k in found[0])


@needs_kernels
def test_what_is_not_finite_comes_through_blocks_and_what_is_large_is_no_loss():
    x, dy = torch.randn(2, 4, 16, 8, 8)
    m = accelerate(blocks(1, 16), torch.float32)
    plain, usual = blocks(1, 16), through(m, x, dy)
    m[0].bn1.running_mean.fill_(float("nan"))   # which training does not read
    assert torch.equal(through(m, x, dy)["y"], usual["y"]) and m[0].bn1.running_mean.isnan().all()
    m, plain = (copy.deepcopy(plain) for _ in range(2))
    for o in (m, plain): o[0].conv1.weight.data.mul_(1e-3)[:, :, 1, 1] += 10.
    far = through(plain.double(), x.double() + 1e3, dy.double())
    got = through(accelerate(m, torch.float32), x + 1e3, dy)
    assert in_one_step(got) and (got["y"] - far["y"]).norm() < .02*far["y"].norm()
    x[1, 3, 2, 2] = float("nan")
    got = through(accelerate(blocks(1, 16), torch.float32), x, dy)
    assert in_one_step(got) and got["y"].isnan().all() and got["statistics"].isnan().any()


@needs_kernels
def test_the_default_dtype_is_of_no_account():
    (x, dy), found = torch.randn(2, 4, 16, 8, 8), []
    models = [[accelerate(freeze(blocks(1, 16), policy, output=()), torch.float32) for policy in ("bn", "bn+random2")] for _ in range(2)]
    for dtype,pair in zip((torch.float32, torch.float64), models):
        torch.set_default_dtype(dtype)
        try: found.append([through(m, x, dy) for m in pair])
        finally: torch.set_default_dtype(torch.float32)
    for a,b in zip(*found): assert all(torch.equal(a[k], b[k]) for k in a)


def twice(f): return lambda *given: 2*f(*given)

@needs_kernels
@pytest.mark.parametrize("change", [
    lambda m: m.bn1.eval(), lambda m: setattr(m.bn1, "momentum", None), lambda m: setattr(m.bn2, "relu", False),
    lambda m: setattr(m, "bn1", torch.nn.BatchNorm2d(16)), lambda m: setattr(m, "downsample", torch.nn.Sequential()),
    lambda m: setattr(m.conv2, "forward", twice(m.conv2.forward)), lambda m: setattr(m.downsample, "forward", lambda x: 2*x), lambda m: setattr(m, "forward", twice(m.forward)),
    lambda m: m.register_forward_hook(lambda m, i, y: 2*y), lambda m: m.bn1.register_forward_hook(lambda m, i, y: 2*y),
    lambda m: m.conv1.register_forward_pre_hook(lambda m, i: (2*i[0],)), lambda m: torch.nn.utils.parametrizations.weight_norm(m.conv1)])
def test_blocks_that_are_changed_go_through_their_modules(change):
    x, dy = torch.randn(2, 4, 16, 8, 8)
    plain, fast = blocks(1, 16), accelerate(blocks(1, 16), torch.float32)
    for m in (plain, fast): change(m[0])
    plain, fast = (through(m, x, dy) for m in (plain, fast))
    assert not in_one_step(fast)
    for k,want in plain.items(): torch.testing.assert_close(fast[k], want, atol=1e-3, rtol=1e-3)


@needs_kernels
def test_blocks_leave_to_their_modules_what_those_object_to_or_are_asked():
    fast, x = accelerate(blocks(1, 16), torch.float32), torch.randn(4, 16, 8, 8).contiguous(**BIG)
    for wrong in (x[0], torch.randn(4, 32, 8, 8).contiguous(**BIG)):
        with pytest.raises((RuntimeError, ValueError)): fast(wrong)
    fast[0].conv1.weight = torch.nn.Parameter(torch.randn(16, 8, 3, 3).contiguous(**BIG), False)
    with pytest.raises(RuntimeError): fast(x)
    fast = accelerate(blocks(1, 16), torch.float32)
    fast[0].conv2.double()
    with pytest.raises(RuntimeError): fast(x)
    seen, fast = [], accelerate(blocks(1, 16), torch.float32)
    with torch.nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(m)): fast(x)
    assert {fast[0].bn1, fast[0].conv2} < {*seen}


@pytest.mark.parametrize("geometry", [(3, 2, 1, False), (2, 2, 0, True)], ids=["resnet", "vgg"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pooling_keeps_only_where_the_maxima_were(geometry, dtype):
    (size, stride, padding, ceil), kept = geometry, []
    x = torch.randn(4, 16, 9, 9).to(dtype).contiguous(**BIG).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = LeanPool.apply(x, [size]*2, [stride]*2, [padding]*2, [1, 1], ceil)
    want = torch.nn.functional.max_pool2d(x, size, stride, padding, ceil_mode=ceil)
    g = torch.randn_like(y)
    assert [t.dtype for t in kept] == [torch.int32] and torch.equal(y, want)
    assert torch.equal(torch.autograd.grad(y, x, g)[0], torch.autograd.grad(want, x, g)[0])


@needs_kernels
def test_without_a_compiler_there_is_one_line_of_notice(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "CXX"} | {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    code = "from bnonly.kernels import kernels; assert kernels() is None"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stderr.splitlines()) == 1 and "no C++ compiler" in done.stderr


@needs_kernels
def test_what_the_compiler_objects_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "kernels.cpp").write_text("int x = ;")
    monkeypatch.setattr(native, "CSRC", tmp_path)
    with pytest.raises(RuntimeError, match="error: "): native.load()


@needs_kernels
def test_two_processes_may_build_at_once(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    code = "from bnonly.native import load; assert load(('-O0',))"   # a quick build is enough here
    both = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in "ab"]
    assert [p.wait() for p in both] == [0, 0]
    assert [f.suffix for f in tmp_path.rglob("*") if f.is_file()] == [".so"]


def one_step(arch, policy, fused=False, dtype=torch.float32, low=False):
    "The loss of one batch, the gradients, the running statistics, and the logits in evaluation mode, as float64."
    g = torch.Generator().manual_seed(0)
    model = freeze(create_model(arch), policy).to(dtype=dtype, **BIG)
    if fused: accelerate(model, torch.bfloat16 if low else dtype)
    x, y = torch.randn(16, 3, 32, 32, generator=g).to(dtype).contiguous(**BIG), torch.randint(10, (16,), generator=g)
    with torch.autocast("cpu", torch.bfloat16, enabled=low): loss = torch.nn.functional.cross_entropy(model(x).to(dtype), y)
    loss.backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low): logits = model.eval()(x)
    parts = dict(loss=[loss], gradients=[p.grad for p in trainable(model).values()], logits=[logits],
                 statistics=[b for n, b in model.named_buffers() if "running" in n])
    return {k: torch.cat([t.detach().double().flatten() for t in ts]) for k, ts in parts.items()}


@needs_kernels
@pytest.mark.parametrize("arch,policy", [*(("resnet14", p) for p in ("bn", "all", "all-affine", "random2", "output", "bn+output")),
                                         *itertools.product(("vgg11", "resnet18", "wrn8-2"), ("bn", "all", "random2"))])
def test_a_fused_network_is_as_near_to_float64_as_a_plain_one(arch, policy):
    "Losses after some steps cannot be compared: plain float32 and float64 part ways as soon as the fused ones do.\n\n    A single ReLU on its corner that flips, in either, moves the gradients by up to a third of a percent."
    exact, plain, fused = (one_step(arch, policy, *o) for o in ((False, torch.float64), (False,), (True,)))
    for k, want in exact.items():
        far = lambda got: ((got[k] - want).norm() / want.norm()).item()
        assert far(fused) <= 3*far(plain) + (1e-2 if k == "gradients" else 3e-6), k   # a loss of float32 has a dozen roundings of 1e-7


@needs_tiles
@pytest.mark.parametrize("policy", ["bn", "all", "random2"])
def test_a_step_in_bfloat16_is_as_near_to_float64_as_pytorchs(policy):
    "ResNet-14 at 32 pixels: tiles, the first convolution, and those with a stride."
    exact, plain, fused = (one_step("resnet14", policy, *o) for o in ((False, torch.float64), (False, torch.float32, True), (True, torch.float32, True)))
    for k, want in exact.items():
        far = lambda got: ((got[k] - want).norm() / want.norm()).item()
        assert far(fused) <= 2*far(plain), k


def fifty_steps(arch, policy, fast, lr):
    """Losses of fifty steps on digits, then the running statistics and the logits of 64 test images.

    For ResNet-18 they are twice as large: it brings 8 pixels down to one, of which its BatchNorm then knows 64.
    """
    larger = (lambda x: torch.nn.functional.interpolate(x, scale_factor=2)) if arch == "resnet18" else lambda x: x
    data = load_data("digits")
    model = freeze(create_model(arch, 10, 1), policy)
    if fast: model = prepare(model, torch.device("cpu"), torch.bfloat16)
    opt, losses = sgd(trainable(model).values(), lr=lr, momentum=.9, weight_decay=1e-4), []
    train, test = loaders(data, 64, 0)
    for x, y in itertools.islice(itertools.chain.from_iterable(itertools.repeat(train)), 50):
        losses.append(loss_func(model(larger(x if fast else x.contiguous())), y))
        if not lr: continue
        losses[-1].backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad(): logits = model.eval()(larger(next(iter(test))[0]))
    running = torch.cat([b.flatten() for n, b in model.named_buffers() if "running" in n])
    return torch.stack(losses).detach(), running, logits.float()


@needs_kernels
@pytest.mark.parametrize("arch,policy", [*(("resnet14", p) for p in ("bn", "all", "random2", "output")),
                                         ("wrn8-2", "all"), ("vgg11", "bn"), ("vgg11", "all"), ("resnet18", "random2")])
def test_fifty_steps_in_bfloat16_follow_plain_float32(arch, policy):
    """Within two percent of the loss at each step, half a percent on average, and two of the statistics.

    With steps of the paper's size training is chaotic: two plain float32 runs that differ by one rounding part ways too.
    The steps are so large that without them the losses would be at least twice as far off.
    """
    lr = dict(bn=1e-3, all=3e-5, random2=3e-3 if arch == "resnet18" else 1e-2, output=1e-3)[policy]
    (losses, running, logits), (far_losses, far_running, far_logits) = (fifty_steps(arch, policy, fast, lr) for fast in (False, True))
    apart = (far_losses - losses).abs() / losses
    still = (fifty_steps(arch, policy, True, 0.)[0] - losses).abs() / losses
    assert 2*apart.mean() < still.mean()
    assert apart.max() < .02 and apart.mean() < .005
    assert (far_running - running).norm() < .02 * running.norm()
    assert (far_logits - logits).norm() < .2 * logits.norm()


@needs_kernels
def test_the_final_accuracy_on_digits_does_not_depend_on_the_kernels(monkeypatch):
    "Over three seeds, within one standard error of the difference: fused in bfloat16 beside plain in float32."
    found = {}
    for how, dtype in (("fused", torch.bfloat16), ("plain", torch.float32)):
        monkeypatch.setenv("BNONLY_KERNELS", how)
        kernels.cache_clear()
        found[how] = [fit(Spec(arch="resnet8", seed=s, epochs=16), how, dtype=dtype)["final"]["accuracy"] for s in range(3)]
    monkeypatch.undo()
    kernels.cache_clear()
    mean, var = ([f(a) for a in found.values()] for f in (statistics.mean, statistics.variance))
    assert abs(mean[0] - mean[1]) <= (sum(var) / 3)**.5, found


def twins(policy="bn", arch="resnet8", dtype=torch.float32):
    "A network as it is, and the same with the kernels, which have computed already."
    plain, x = freeze(create_model(arch), policy).eval().to(**BIG), torch.randn(4, 3, 16, 16)
    fast = accelerate(copy.deepcopy(plain), dtype)
    fast(x)
    return plain, fast, x


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_weight_changed_behind_pytorchs_back_is_read_again(dtype):
    plain, fast, x = twins(dtype=dtype)
    for m in (*plain.modules(), *fast.modules()):
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)): m.weight.data.mul_(-1)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16): got, want = fast(x), plain(x)
    assert (got - want).norm() < (1e-5 if dtype == torch.float32 else .05)*want.norm()


@needs_kernels
def test_tensors_without_numbers_go_through_the_modules():
    plain, fast, x = twins()
    with torch.no_grad():
        want = plain(x)
        found = torch.export.export(fast, (x,)).module()(x), torch.func.vmap(lambda i: fast(i[None])[0])(x), torch.jit.trace(fast, x)(x)
    for got in found: torch.testing.assert_close(got, want)
    torch.testing.assert_close(copy.deepcopy(fast).double()(x.double()).float(), want, atol=1e-4, rtol=1e-4)
    assert copy.deepcopy(fast).to("meta")(x.to("meta")).shape == want.shape   # and on another device
    plain.train(), fast.train()
    with torch.autograd.forward_ad.dual_level():
        found = [torch.autograd.forward_ad.unpack_dual(m(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))).tangent for m in (fast, plain)]
    torch.testing.assert_close(*found)
    plain.eval(), fast.eval()
    dx, = torch.autograd.grad(plain(x.requires_grad_()).square().sum(), x)
    torch.testing.assert_close(torch.func.grad(lambda i: fast(i).square().sum())(x.detach()), dx)


@needs_kernels
def test_layers_take_what_pytorchs_take():
    "An image alone, a residual by its name, a batch of none, a bias that trains after all."
    x = torch.randn(4, 16, 8, 8).contiguous(**BIG)
    layers = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3, padding=1), torch.nn.MaxPool2d(2)).requires_grad_(False)
    both = [torch.autograd.grad(m(one).square().sum(), one)[0] for m in (layers, accelerate(copy.deepcopy(layers), torch.float32))
            for one in [x[0].clone().requires_grad_()]]
    torch.testing.assert_close(*both)
    bn = BatchNormAct(16)
    torch.testing.assert_close(accelerate(copy.deepcopy(bn), torch.float32)(x, residual=x), bn(x, residual=x))
    net = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10))
    fast = accelerate(freeze(net, "random2+output"), torch.float32)
    assert fast(torch.zeros(0, 32)).shape == (0, 10)
    fast[0].bias.requires_grad_()
    assert torch.autograd.grad(fast(torch.randn(5, 32)).square().sum(), fast[0].bias)[0].any()


@needs_kernels
def test_random_entries_of_a_linear_layer_take_inputs_of_any_shape():
    net, x, found = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.ReLU(), torch.nn.Linear(48, 10)), torch.randn(3, 5, 32), []
    plain = freeze(net, "random2+output")
    for model in (plain, accelerate(copy.deepcopy(plain), torch.float32)):
        y = model(x)
        found.append((y, model(x[0, 0]), *torch.autograd.grad(y.square().sum(), trainable(model).values())))
    for a, b in zip(*found): torch.testing.assert_close(a, b)


@needs_kernels
def test_an_accelerated_network_may_change_its_mind():
    "Its output layer trains after all, its statistics are averaged or none, it was made for inference alone."
    plain, fast, x = twins()
    freeze(fast, "bn+output")(x).square().sum().backward()
    assert fast.fc.weight.grad.norm() > 0
    for model in (plain, fast): torch.optim.swa_utils.update_bn([x], model)
    torch.testing.assert_close(fast.eval()(x), plain.eval()(x))
    for m in (*plain.modules(), *fast.modules()):
        if isinstance(m, torch.nn.BatchNorm2d): m.track_running_stats, m.running_mean, m.running_var = False, None, None
    torch.testing.assert_close(fast(x), plain(x))
    with torch.inference_mode(): assert twins()[1](x).isfinite().all()


def test_a_misspelt_choice_of_kernels_is_an_error(monkeypatch):
    monkeypatch.setenv("BNONLY_KERNELS", "plian")
    with pytest.raises(ValueError, match="nearest is 'plain'"): kernels.__wrapped__()
