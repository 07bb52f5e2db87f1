"A portable file gives its network back, and whatever else is in a file gets one sentence."
import random
import resource
import tracemalloc
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from bnonly import portable
from bnonly.experiment import Spec, write
from bnonly.models import build, create_model, roles
from bnonly.policies import counts, effective_weights, freeze, trainable
from bnonly.portable import LIMIT, Tasks, load_portable, read, save_portable
from bnonly.sealed import serialize
from hostile import KINDS, metadata_lied
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
CASES = 2_000


@pytest.fixture(scope="module")
def network():
    model, x = (
        freeze(create_model("resnet8", in_channels=1, seed=7), "bn"),
        torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    )
    opt = torch.optim.SGD(trainable(model).values(), lr=.1)
    for _ in range(2):
        F.cross_entropy(model(x), torch.arange(16) % 10).backward()
        opt.step()
    return model.eval(), x


@pytest.fixture(scope="module")
def good(network, tmp_path_factory):
    return save_portable(network[0], tmp_path_factory.mktemp("portable") / "good.safetensors").read_bytes()


@pytest.mark.parametrize(
    "policy", ["bn", "all", "all-affine", "output", "random2+output", "scattered2", "none", "bn+shortcut+output"]
)
def test_logits_are_the_same_bits(policy, tmp_path):
    model, x = (
        freeze(create_model("resnet8", seed=2**63 - 1, init="orthogonal"), policy, seed=4),
        torch.randn(8, 3, 8, 8),
    )
    opt = torch.optim.SGD([*trainable(model).values(), nn.Parameter(torch.zeros(1))], lr=.1, momentum=.9)
    for _ in range(3):
        loss = F.cross_entropy(model(x), torch.arange(8))
        if loss.requires_grad:
            loss.backward()
        opt.step()
    again = load_portable(save_portable(model, tmp_path / "it.safetensors"))
    assert torch.equal(again(x), model.eval()(x))
    assert all(torch.equal(t, effective_weights(again)[n]) for n, t in effective_weights(model).items())


def task(path, seed=7, policy="bn", steps=1):
    "What a network learned in some steps, as a file."
    model = freeze(create_model("resnet8", in_channels=1, seed=seed), policy)
    opt, x = torch.optim.SGD(trainable(model).values(), lr=.1), torch.randn(16, 1, 8, 8)
    for _ in range(steps):
        F.cross_entropy(model(x), torch.arange(16) % 10).backward()
        opt.step()
    return save_portable(model, path)


@pytest.mark.parametrize("policy", ["bn", "random2+output"])
def test_tasks_swap_what_moved_and_nothing_else(policy, tmp_path):
    files = {f"task {i}": task(tmp_path / f"{i}.safetensors", policy=policy, steps=i) for i in (1, 2, 3)}
    tasks, alone = Tasks(files), {n: load_portable(f) for n, f in files.items()}
    at = {n: t.data_ptr() for n, t in tasks.model.state_dict().items()}
    assert [*tasks] == [*files] and len(tasks) == 3
    for name in ("task 3", "task 1", "task 2", "task 3"):
        state, expected = tasks.use(name).state_dict(), alone[name].state_dict()
        assert state.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in state.items())
        assert tasks[name] is tasks.model and at == {n: t.data_ptr() for n, t in state.items()}
    tasks.model.double().float()   # buffers are other tensors now
    assert all(torch.equal(t, alone["task 1"].state_dict()[n]) for n, t in tasks.use("task 1").state_dict().items())


def test_tasks_refuse_what_does_not_fit(tmp_path):
    tasks = Tasks({"first": task(tmp_path / "first.safetensors")})
    for name, how in (("seed", dict(seed=8)), ("policy", dict(policy="bn+output"))):
        with pytest.raises(ValueError, match="stands on another random network than the first file"):
            tasks[name] = task(tmp_path / f"{name}.safetensors", **how)
    with pytest.raises(ValueError, match="task 'frist' is not one of first; the nearest is 'first'"): tasks["frist"]
    with pytest.raises(ValueError, match="at least one portable file"): Tasks({})
    freeze(tasks.model, "output")
    with pytest.raises(ValueError, match="frozen otherwise .* make another Tasks of it"): tasks["first"]


def test_other_features_are_refused_in_one_sentence(good, tmp_path, monkeypatch):
    path, drawn = write(tmp_path / "it.safetensors", good), portable.create_model
    monkeypatch.setattr(portable, "create_model", lambda **made: drawn(**dict(made, seed=made["seed"] + 1)))
    with pytest.raises(ValueError, match="draws other features on this machine") as e:
        load_portable(path)
    assert "\n" not in str(e.value)


def test_two_thousand_odd_files_get_a_sentence_each(good, tmp_path, monkeypatch):
    "No crash, no network built, no large allocation: each is refused by what it says, before any feature is drawn."
    rng, path = random.Random(0), tmp_path / "odd.safetensors"
    metadata, _, vectors = read(write(path, good))
    built = []
    monkeypatch.setattr(portable, "create_model", lambda **made: built.append(made))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for i in range(CASES):
        content = KINDS[i % len(KINDS)](rng, good, metadata, vectors)
        path.write_bytes(content)
        try:
            read(path)
        except ValueError as e:
            assert "is no portable network" in str(e) and len(str(e)) < 1000 and "\n" not in str(e), str(e)
        else:   # the lie was another truth: only a name, a seed or an initialization that exists may differ
            assert KINDS[i % len(KINDS)] in (metadata_lied,), KINDS[i % len(KINDS)].__name__
            changed = {k for k, v in read(path)[0].items() if v != metadata[k]} - {"digest"}
            assert (
                changed <= {"seed", "entries", "compute", "policy"}
                and metadata["policy"] == "bn"
                and read(path)[1]["policy"] in ("bn", "norm")
            ), changed
    assert tracemalloc.get_traced_memory()[1] < 50e6 and not built
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000   # kB, of the whole process


def test_a_giant_is_refused_before_it_is_built(network, tmp_path):
    "A file of a few kilobytes that names a network of terabytes."
    metadata, vectors = portable.portable_metadata(network[0]) | dict(features="0" * 64), {}
    for arch in ("wrn14-9999", "wrn1994-100", "wrn14-64"):
        content = serialize(metadata | dict(arch=arch, policy="none"), vectors)
        with pytest.raises(ValueError, match="parameters, and the limit is"):
            load_portable(write(tmp_path / "giant.safetensors", content))
    assert LIMIT > 177e6


# ---- any model

TV = (
    """resnet18 vgg11_bn densenet121 mobilenet_v3_small efficientnet_b0 convnext_tiny vit_b_32 swin_t
    shufflenet_v2_x0_5 mnasnet0_5 regnet_y_400mf"""
).split()
TIMM = (
    """vit_tiny_patch16_224 convnext_atto resnetv2_50 resnet26d mobilevit_xxs efficientnet_lite0
    vit_small_patch16_rope_224"""
).split()


def make(name):
    if name in TV:
        import torchvision
        return getattr(torchvision.models, name)(num_classes=7)
    return pytest.importorskip("timm", reason="timm is not installed (pip install 'bnonly[timm]')").create_model(
        name, num_classes=7
    )


@pytest.mark.parametrize("name", TV + TIMM)
def test_roles_of_other_peoples_models(name):
    """The norms are those that their classes say, the output is what has seven logits, and `norm+output` frees just
    these."""
    with (
        warnings.catch_warnings(action="ignore"),
        torch.device("cpu" if "regnet" in name else "meta"),
    ):  # torchvision's RegNet copies while it is built
        model = make(name)
    found, params = roles(model), dict(model.named_parameters())
    kinds = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
    norm = {
        f"{n}.{k}"
        for n, m in model.named_modules()
        if isinstance(m, kinds)
        for k, _ in m.named_parameters(recurse=False)
    }
    assert norm and {n for n, r in found.items() if r in ("bn", "norm")} == norm
    output = {n for n, r in found.items() if r == "output"}
    assert output and all(len(params[n]) == 7 for n in output) and any(params[n].ndim > 1 for n in output)
    table = counts(freeze(model, "norm+output"))
    assert {n for n, p in params.items() if p.requires_grad} == norm | output
    assert table.total["all"] == sum(p.numel() for p in params.values())
    assert table.trainable["all"] == sum(params[n].numel() for n in norm | output)


def test_shortcuts_are_told_by_what_they_feed():
    import torchvision
    for depth in (18, 50):
        with torch.device("meta"): theirs = getattr(torchvision.models, f"resnet{depth}")()
        assert counts(theirs).total.equals(counts(build(f"resnet{depth}", 1000)).total)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenet_v3_small"])
def test_a_step_moves_what_is_free_and_nothing_else(name):
    model = freeze(make(name), "norm+output")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x = torch.randn(2, 3, 224, 224)
    opt = torch.optim.SGD(model.parameters(), lr=.1, weight_decay=.1)
    F.cross_entropy(model(x), torch.arange(2)).backward()
    opt.step()
    assert all(p.requires_grad or torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert any(not torch.equal(p, before[n]) for n, p in trainable(model).items())


def test_a_model_that_cannot_be_told_asks():
    import torchvision
    with torch.device("meta"):
        model = torchvision.models.googlenet(init_weights=False)
    with pytest.raises(ValueError, match="3 feed its output: aux1.fc2, aux2.fc2, fc.*output='fc'"):
        freeze(model, "bn+output")
    freeze(model, "output", output="fc")
    assert sorted(trainable(model)) == ["fc.bias", "fc.weight"] and counts(model, "fc").trainable["all"] == 1_025_000
    with pytest.raises(ValueError, match="the nearest is 'fc'"):
        roles(model, "fcc")
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8))
    assert roles(backbone, ())["1.weight"] == "norm"
    with pytest.raises(ValueError, match="policy 'bn' trains nothing of Sequential.*the nearest is 'norm'"):
        freeze(backbone, "bn", output=())


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m, "fc", torch.nn.Linear(64, 5)),
        lambda m: m.double(),
        lambda m: setattr(m, "fc", torch.nn.Sequential(m.fc, torch.nn.Softmax(1))),
        lambda m: [setattr(b, "eps", 0.1) for b in m.modules() if isinstance(b, torch.nn.BatchNorm2d)],
    ],
)
def test_a_network_that_was_changed_is_not_saved(change, tmp_path):
    "It would be refused when it is loaded, or compute something else."
    model = freeze(create_model("resnet8"), "bn+output")
    save_portable(model, tmp_path / "whole.safetensors")
    change(model)
    with pytest.raises(ValueError, match="needs a full checkpoint"):
        save_portable(model, tmp_path / "changed.safetensors")
    assert not (tmp_path / "changed.safetensors").exists()


def test_an_output_that_shares_its_weight_is_not_forgotten():
    "As language models have it: what would train is the embedding, so the policy is refused."
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e, self.n, self.o = nn.Embedding(10, 4), nn.LayerNorm(4), nn.Linear(4, 10, bias=False)
            self.o.weight = self.e.weight

        def forward(self, x):
            return self.o(self.n(self.e(x)))
    assert counts(freeze(Tied(), "norm")).loc["all", "trainable"] == 8
    with pytest.raises(
        ValueError, match="'output' trains nothing of Tied, whose roles are conv, norm; the nearest is 'norm'"
    ):
        freeze(Tied(), "norm+output")


def test_the_shelfs_cifar10_is_the_record_it_names():
    "runs/portable/cifar10 holds seed 0 of runs/short, bit for bit."
    _, made, vectors = read(ROOT / "runs/portable/cifar10.safetensors")
    spec = Spec(arch="resnet14", data="cifar10", epochs=16)
    kept = safetensors.torch.load_file(ROOT / "runs/short" / spec.key / "moved.safetensors")
    record = portable.pack(kept, portable.layout(*(made[k] for k in ("arch", "num_classes", "in_channels", "policy"))))
    assert (made["arch"], made["policy"], made["seed"]) == (spec.arch, spec.policy, spec.seed)
    assert record.keys() == vectors.keys() and all(torch.equal(vectors[v], t) for v, t in record.items())
