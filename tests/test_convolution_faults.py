"The way around the faults of PyTorch's convolutions, put through a small part of the search for them."
import copy
import ctypes
import os
import platform
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from convolution_faults import Case, compiled, sample, search, summary, valid

from bnonly.faults import safe_conv2d

able = platform.libc_ver()[0] == "glibc" and shutil.which("cc")
guarded = pytest.mark.skipif(not able, reason="the guard around memory needs glibc and a C compiler")
STRIDED = [Case(n, c, 8, 1, 2, 0, size, size, dtype=dtype, threads=threads) for dtype in ("float32", "bfloat16")
           for n, c, size, threads in ((128, 2, 8, 1), (7, 4, 16, 1), (7, 7, 32, 2), (7, 12, 32, 2), (1, 15, 64, 2))]
NARROW = [Case(2, 16, 8, k, stride, k//2, h, w, dtype="bfloat16", layout=layout, weights=layout)
          for k, stride in ((3, 2), (3, 3), (5, 2), (7, 2)) for h, w in ((1, 1), (4, 1), (3, 2))
          for layout in ("last", "first")]
ONE_PIXEL = [Case(7, 4, 64, 1, 2, 0, 1, 1, dtype="bfloat16", bias=bias) for bias in (False, True)]
SAMPLE = [case for case in sample(60, seed=2) if valid(case, most=2e6)]


@pytest.fixture(scope="module")
def library(tmp_path_factory): return compiled(tmp_path_factory.mktemp("guard"))


def outside(x, weight, **how):
    y = F.conv2d(x, weight, **how)
    ctypes.memset(y.data_ptr() + y.nbytes, 0, 1)
    return y


def unwritten(x, weight, **how): return F.conv2d(x, weight, **how) + torch.empty(1)
def wrong(x, weight, **how): return F.conv2d(x, weight, **how) + 1
def crash(*_, **__): os.abort()
def hang(*_, **__): time.sleep(1e6)


@guarded
@pytest.mark.parametrize("kind", ["outside", "unwritten", "wrong", "crash", "hang"])
def test_the_search_notices(kind, library):
    cases = [Case(2, 3, 4, 3, 1, 1, 5, 5), Case(1, 2, 2, 1, 1, 0, 2, 2)]
    found = search(cases, "native", f"test_convolution_faults:{kind}", library, patience=1 if kind == "hang" else 120)
    assert [case for case, _ in found] == cases
    assert all(faults[0][1].startswith(kind) and faults[0][0] in ("forward", "?") for _, faults in found)


@guarded
@pytest.mark.parametrize("isa", ["native", "avx2"])
def test_no_case_has_a_fault_on_the_way_around(isa, library):
    found = search(STRIDED + ONE_PIXEL + NARROW + SAMPLE, isa, "bnonly.faults:safe_conv2d", library)
    assert not summary(found)["faults"]


@guarded
@pytest.mark.parametrize("through", ["layer", "frozen_layer"])
def test_no_case_has_a_fault_in_a_layer(through, library):
    "Prepared: by the kernels where they compute a case, with the packed weight where it is frozen."
    found = search(STRIDED + ONE_PIXEL + NARROW + SAMPLE, "native", f"convolution_faults:{through}", library)
    assert not summary(found)["faults"]


def same(x, weight, bias, **how):
    "Whether output and gradients are those of `F.conv2d`."
    a, b = (f(x, weight, bias, **how) for f in (safe_conv2d, F.conv2d))
    assert a.shape == b.shape and a.dtype == b.dtype
    g = torch.randn_like(b)
    both = [(y, *torch.autograd.grad(y, (x, weight, bias), g)) for y in (a, b)]
    for mine, theirs in zip(*both):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def double(*shape): return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("stride", [1, 2, 3, (1, 2), (3, 1), [2, 2]])
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 1), (2, 0), "valid", "same"])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (1, 3), (5, 2), (7, 7)])
def test_the_way_around_computes_the_same(stride, padding, kernel):
    torch.manual_seed(0)
    for size in ((1, 1), (1, 4), (4, 1), (2, 2), (3, 2), (6, 7)):
        x, weight, bias = double(2, 4, *size), double(6, 2, *kernel), double(6)
        how = dict(stride=stride, padding=padding, groups=2)
        try: F.conv2d(x, weight, bias, **how)
        except RuntimeError as e:
            with pytest.raises(type(e)): safe_conv2d(x, weight, bias, **how)
        else: same(x, weight, bias, **how)


def test_other_options_go_to_pytorch():
    same(double(2, 4, 9, 9), double(6, 4, 3, 3), double(6), stride=2, padding=2, dilation=2)
    same(double(4, 5, 5), double(6, 4, 1, 1), double(6), stride=2)   # an image alone


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 1, 1)], ids=["strided", "narrow"])
def test_the_way_around_is_differentiable_twice_and_compiles(shape):
    torch.manual_seed(0)
    (k, *size), how = shape, dict(stride=2, padding=shape[0]//2)
    x, weight = double(2, 3, *size), double(4, 3, k, k)
    assert torch.autograd.gradgradcheck(lambda x, w: safe_conv2d(x, w, **how), (x, weight))
    traced = torch.fx.experimental.proxy_tensor.make_fx(lambda x, w: safe_conv2d(x, w, **how))(x, weight)
    compiled = torch.compile(lambda x, w: safe_conv2d(x, w, **how), backend="aot_eager", fullgraph=True)
    for f in (traced, compiled): torch.testing.assert_close(f(x, weight), F.conv2d(x, weight, **how))
    each = torch.vmap(lambda x: safe_conv2d(x[None], weight, **how)[0])(x)
    torch.testing.assert_close(each, F.conv2d(x, weight, **how))


@pytest.mark.parametrize("k,size", [(1, 8), (3, 1)], ids=["strided", "narrow"])
def test_autocast_holds_on_the_way_around(k, size):
    x, weight = torch.randn(2, 3, size, size), torch.randn(4, 3, k, k, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16): y = safe_conv2d(x, weight, stride=2, padding=k//2)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


def test_a_network_with_it_is_exported():
    class Layer(torch.nn.Conv2d):
        def forward(self, x): return safe_conv2d(x, self.weight, self.bias, self.stride, self.padding)
    net, x = torch.nn.Sequential(Layer(3, 4, 1, 2), Layer(4, 4, 3, 2, 1)), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(torch.export.export(copy.deepcopy(net), (x,)).module()(x), net(x))
