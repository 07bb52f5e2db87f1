"Contracts of the networks that a notebook cannot show in seconds."
import os, subprocess, sys

import pytest
import torch
from bnonly.models import FEATURES, create_model

ARCHS = ["resnet14", "wrn14-2", "vgg11", "resnet18", "resnet50"]


@pytest.mark.parametrize("depth", [18, 50])
def test_imagenet_resnets_are_torchvisions(depth):
    """torchvision's weights in our modules give torchvision's logits, up to rounding: strided 1x1 convolutions read
    every other pixel first."""
    tv = pytest.importorskip("torchvision.models")
    theirs = getattr(tv, f"resnet{depth}")(weights=None)
    ours = create_model(f"resnet{depth}", num_classes=1000)
    renamed = {
        (f"layers.{int(n[5]) - 1}{n[6:]}" if n.startswith("layer") else n): t for n, t in theirs.state_dict().items()
    }
    assert set(renamed) == set(ours.state_dict())
    ours.load_state_dict(renamed)
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for mode in (True, False):
        torch.testing.assert_close(ours.train(mode)(x), theirs.train(mode)(x), rtol=1e-4, atol=1e-4)


def digest(arch, init, seed=0):
    import hashlib
    model = create_model(arch, init=init, seed=seed)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()


def test_weights_do_not_depend_on_threads_or_instruction_set():
    "The same bits of every initialization from one thread as from two, and with and without AVX."
    code = (
        f"import sys, torch; sys.path.insert(0, {os.path.dirname(__file__)!r}); "
        "torch.set_num_threads(int(sys.argv[1])); "
        "from test_models import FEATURES, digest; print(*(digest('resnet14', i) for i in FEATURES))"
    )
    run = lambda n, **env: subprocess.run([sys.executable, "-c", code, str(n)], env=os.environ | env,
                                          capture_output=True, text=True, check=True).stdout.strip()
    here = " ".join(digest("resnet14", i) for i in FEATURES)
    assert {run(1), run(2), run(2, ATEN_CPU_CAPABILITY="default", OMP_NUM_THREADS="1")} == {here}


def test_features_are_golden():
    "The bits themselves: a record made today must be restorable by every later version."
    assert digest("resnet8", "he_normal")[:16] == "f70a2e6580c270e7"


@pytest.mark.parametrize("arch", ARCHS)
def test_scale_of_he_normal(arch):
    "Variance 2 / fan-in in every convolution (He et al. 2015), the shortcuts' included."
    for m in create_model(arch, num_classes=10).modules():
        if isinstance(m, torch.nn.Conv2d) and m.weight.numel() > 5000:
            assert m.weight.var().item() * m.weight[0].numel() == pytest.approx(2, rel=.1)


def test_orthogonal_is_orthogonal():
    w = create_model("resnet14", init="orthogonal").layers[1][0].conv2.weight.flatten(1).double()
    assert torch.allclose(w @ w.T, torch.eye(32, dtype=torch.double), atol=1e-6)


@pytest.mark.parametrize("arch", ["resnet8", "wrn8-2", "vgg11", "resnet18"])
def test_small_gray_images(arch):
    "Every family takes 8x8 images with one channel, as the digits are."
    assert create_model(arch, 10, 1)(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
