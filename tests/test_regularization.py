"Networks without BatchNorm, penalties and their records: what one notebook cannot assert."
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from bnonly.claims import MEASURES, REGULARIZATION, ledger
from bnonly.data import BrokenData, load_data
from bnonly.experiment import ACTS, NORMS, Spec, history, parse_arch, results, run_dir
from bnonly.analysis import analyse, channels
from bnonly.features import restore
from bnonly.models import BatchNormAct, BiasAct, Shortcut, Swish, Swished, branches, create_model, roles
from bnonly.penalties import divergence, mask
from bnonly.policies import counts, freeze
from bnonly.regularization import at_start
from bnonly.robustness import evaluate_robustness, robustness, with_robustness
from bnonly.train import fit, groups, learner
from test_train import Stop

TINY = Spec(arch="wrn10-0.25", policy="all", bn_init="ones", act="swish", schedule="cosine", epochs=2)
CPU = dict(device=torch.device("cpu"), dtype=torch.float32)


# -------- networks

@pytest.mark.parametrize("arch", ["wrn10-1", "resnet14", "resnet50"])
@pytest.mark.parametrize("norm", [n for n in NORMS if n != "affine"])   # which only MLPs and LeNet have
@pytest.mark.parametrize("act", ACTS)
def test_norm_and_activation_are_what_the_name_says(arch, norm, act):
    model = create_model(arch, norm=norm, act=act)
    norms, found = [m for m in model.modules() if isinstance(m, BatchNormAct)], roles(model)
    with_bn = create_model(arch)
    assert len(norms) == (
        len([m for m in with_bn.modules() if isinstance(m, BatchNormAct)]) if norm == "batch" else "single" in norm
    )
    assert sum(r == "bn" for r in found.values()) == 2*len(norms)
    assert (
        all(torch.isfinite(p).all() for p in model.parameters())
        and torch.isfinite(model(torch.randn(2, 3, 32, 32))).all()
    )
    assert any("rho" in n for n in found) == (act == "swish") and not any(
        found[n] == "bn" for n in found if n.endswith(("rho", "shift", "scale"))
    )
    convs = lambda m: {n: p.shape for n, p in m.named_parameters() if p.dim() == 4}
    assert convs(model) == convs(with_bn)
    on_shortcut = {n for n, m in model.named_modules() if isinstance(m, Shortcut)}
    assert {n.rpartition(".")[0].rpartition(".")[0] for n, r in found.items() if r == "shortcut"} == on_shortcut


def test_fixup_starts_as_zhang_et_al_say():
    """Zero at the end of each branch and in the output; the others of m layers scaled by L^(-1/(2m-2)); scalars at 0
    and 1."""
    for arch, blocks, m in (("wrn16-1", 6, 2), ("resnet50", 16, 3)):
        plain, model = create_model(arch, norm="none"), create_model(arch, norm="fixup")
        assert len(branches(model)) == blocks
        for a, b in zip(branches(plain), branches(model)):
            assert len(a) == m and not b[-1].weight.any() and b[-1].scale == 1
            for c, d in zip(a[:-1], b[:-1]): assert torch.allclose(d.weight, c.weight*blocks**(-1/(2*m - 2)))
        fronts = [
            n for n, c in model.named_modules() if isinstance(c, nn.Conv2d) and getattr(c, "shift", None) is not None
        ]
        assert fronts == [n for n, c in model.named_modules() if isinstance(c, nn.Conv2d) and n != "conv1"]
        activations = [
            n for n, c in create_model(arch).named_modules() if isinstance(c, BatchNormAct) and "downsample" not in n
        ]
        assert activations == [n for n, c in model.named_modules() if isinstance(c, BiasAct) and c.bias.dim() == 0]
        assert not model.fc.weight.any() and not model.fc.bias.any()
        opened = create_model(arch, norm="fixup-open")
        for a, b in zip(branches(plain), branches(opened)): assert torch.allclose(b[-1].weight, a[-1].weight/blocks**.5)


def test_swish_is_what_it_is_called():
    swish, z = Swish().double(), torch.linspace(-3, 3, 13, dtype=torch.float64)
    with torch.no_grad():
        swish.reset()
        assert torch.equal(swish(z), z/2)   # rho starts at 0
        swish.rho.fill_(.7)
        assert torch.allclose(swish(z), z/(1 + torch.exp(-.7*z)))


def test_equation_1_holds_for_the_layers_that_train():
    "The mean square of Swish(BatchNorm(x)) at rho = 0 is (|gamma|^2 + |beta|^2)/4, and nearly so for a small one."
    layer, g = Swished(BatchNormAct(16)).double(), torch.Generator().manual_seed(0)
    bn, x = layer.layer, torch.randn(64, 16, 5, 5, dtype=torch.float64, generator=g)
    bn.eps = 1e-30
    with torch.no_grad():
        for p in (bn.weight, bn.bias): p.copy_(torch.randn(16, dtype=torch.float64, generator=g))
        decayed = (bn.weight.square() + bn.bias.square()).sum()
        far = []
        for rho in (0., 1e-4, 2e-4):
            layer.swish.rho.fill_(rho)
            far.append(abs(4*layer(x).square().mean((0, 2, 3)).sum() - decayed).item())
    assert far[0] < 1e-10 and far[2]/far[1] == pytest.approx(2, rel=.05)


def test_wide_networks_are_zagoruykos():
    "BatchNorm and ReLU in front of each convolution, checked against a plain rewriting."
    model = create_model("wrn10-2", bn_init="ones").eval()
    x = torch.randn(2, 3, 16, 16)
    y = model.conv1(x)
    for stage in model.layers[:3]:
        for b in stage:
            o = torch.relu(b.bn1(y))
            z = b.conv2(torch.relu(b.bn2(b.conv1(o))))
            y = z + (b.downsample[0](o) if isinstance(b.downsample, Shortcut) else y)
    assert torch.allclose(model(x), model.fc(torch.relu(model.layers[3](y)).mean((2, 3))), atol=1e-6)
    assert parse_arch("wrn28-10") == ("wide", 28, 10) and Spec(arch="wrn10-1").arch == "wrn10-1"


@pytest.mark.parametrize("policy", ["all", "output", "none", "random2", "bn+output"])
def test_policies_take_networks_without_batchnorm(policy):
    model = freeze(create_model("wrn10-0.25", norm="fixup", act="swish"), policy)
    n = counts(model)
    assert n.loc["bn", "total"] == 0 and n.loc["all", "total"] == sum(
        p.numel() for p in create_model("wrn10-0.25", norm="fixup", act="swish").parameters()
    )


@pytest.mark.parametrize(
    "norm,act", [("batch", "swish"), ("fixup", "swish"), ("none", "relu"), ("single", "swish"), ("batch", "relu")]
)
def test_the_fused_kernels_agree_or_stand_aside(norm, act, monkeypatch):
    "The same logits and gradients with and without them."
    from bnonly.native import kernels
    spec, found = replace(TINY, norm=norm, act=act), []
    for how in ("", "plain"):
        monkeypatch.setenv("BNONLY_KERNELS", how)
        kernels.cache_clear()
        learn = learner(spec, **CPU)
        x, y = next(iter(learn.dls.train))
        learn.loss_func(out := learn.model.train()(x), y).backward()
        found.append((out.detach(), {n: p.grad for n, p in learn.model.named_parameters()}))
    kernels.cache_clear()
    (a, ga), (b, gb) = found
    assert torch.allclose(a, b, atol=1e-4)
    for n in gb:
        if gb[n] is not None: assert torch.allclose(ga[n], gb[n], atol=1e-4 + 1e-3*gb[n].abs().max().item()), n


# -------- penalties

@pytest.mark.parametrize("field,value", [("embedding_l2", .3), ("functional_l2", .2), ("standardize", .01)])
def test_a_penalty_enters_the_gradient_and_not_the_loss_that_is_told(field, value):
    "One step's gradient in float32 is that of cross entropy plus the penalty, written out by hand."
    from fastai.callback.core import Callback, CancelFitException
    grads = {}
    class Peek(Callback):
        def after_backward(self):
            grads.update({n: p.grad.clone() for n, p in self.model.named_parameters()}, loss=self.loss.detach())
            raise CancelFitException
    spec = replace(TINY, norm="fixup-open", **{field: value})
    learn = learner(spec, cbs=[Peek()], **CPU)
    nn.init.normal_(learn.model.fc.weight, generator=torch.Generator().manual_seed(0))
    learn.model.zero_grad()
    inputs = []
    x, y = next(iter(learn.dls.train)); learn.dls.train.epoch = 0
    hooks = [
        m.register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
        for m in learn.model.modules()
        if isinstance(m, BiasAct) or m is learn.model.fc
    ]
    logits = learn.model.train()(x)
    for h in hooks: h.remove()
    *layers, e = inputs
    by_hand = dict(
        embedding_l2=lambda: (e**2).sum() / len(e) / e.shape[1],
        functional_l2=lambda: (logits**2).sum() / len(e) / 10,
        standardize=lambda: sum(divergence(o) for o in layers),
    )[field]
    loss = nn.functional.cross_entropy(logits, y)
    (loss + value*by_hand()).backward()
    expected = {n: p.grad.clone() for n, p in learn.model.named_parameters()}
    learn.model.zero_grad()
    learn.fit(1)
    assert torch.allclose(grads.pop("loss"), loss.detach(), atol=1e-6)
    for n, g in expected.items(): assert torch.allclose(grads[n], g, atol=1e-5 + 1e-4*g.abs().max().item()), n


@pytest.mark.parametrize("arch", ["mlp4-10", "lenet5"])   # four hidden layers each
@pytest.mark.parametrize("norm", ["batch", "affine", "none"])
def test_hidden_layers_are_standardized_with_and_without_normalization(arch, norm):
    assert len(learner(Spec(arch=arch, policy="all", norm=norm, standardize=.1), **CPU).standardize.layers()) == 4


def test_fixups_scalars_learn_at_a_tenth():
    model = create_model("wrn10-0.25", norm="fixup", act="swish")
    (most, rate), (scalars, tenth) = ((g["params"], g["rate"]) for g in groups(model))
    assert (rate, tenth) == (1., .1) and all(p.dim() == 0 for p in scalars)
    assert len(scalars) == sum(n.endswith(("layer.bias", "shift", "scale")) for n, _ in model.named_parameters())
    assert {id(p) for p in model.parameters()} == {id(p) for p in most + scalars}
    assert len(groups(create_model("wrn10-0.25"))) == 1   # one group where there are none
    learn = learner(replace(TINY, norm="fixup"), **CPU)
    learn.fit(1)
    assert [h["lr"] for h in learn.opt.hypers] == pytest.approx(
        [learn.opt.hypers[0]["lr"], 0.1 * learn.opt.hypers[0]["lr"]]
    )


def test_the_first_step_of_fixup_does_not_depend_on_the_depth():
    fixup, plain = ([at_start(norm, d, steps=1, lr=1e-9)["change"] for d in (10, 28, 46)] for norm in ("fixup", "none"))
    assert np.ptp(fixup) < 1e-9 and .1 < fixup[0] < 10 and plain[0] < .1*plain[1] < .01*plain[2]


# -------- runs

def test_a_run_is_measured_kept_stopped_and_restored(tmp_path, monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path))
    spec = replace(TINY, norm="fixup", dropout=.5, functional_l2=.01)
    record = fit(spec, "one", **CPU)
    assert (
        {"embedding_norm", "output_norm", "dropped"} <= set(record["final"])
        and "embedding_norm" in results("one")
        and len(history("one")) == 2
    )
    with pytest.raises(KeyboardInterrupt): fit(spec, "two", cbs=[Stop(1)], **CPU)
    assert fit(spec, "two", **CPU)["final"] == record["final"]   # Dropout's masks go on too
    model, data = restore(spec, "one"), load_data("digits")
    from bnonly.data import loaders
    seen = []
    hook = model.fc.register_forward_pre_hook(lambda m, i: seen.append(i[0]))
    with torch.no_grad(): logits = torch.cat([model(x) for x, _ in loaders(data, 128)[1]])
    hook.remove()
    assert torch.cat(seen).norm(dim=1).mean().item() == pytest.approx(record["final"]["embedding_norm"], rel=1e-4)
    assert logits.norm(dim=1).mean().item() == pytest.approx(record["final"]["output_norm"], rel=1e-4)
    half = torch.cat([e*mask(e.shape, .5, spec.seed, "test dropout", i) for i, e in enumerate(seen)])
    dropped = 100*((half @ model.fc.weight.T + model.fc.bias).argmax(1) == data.test.y).double().mean().item()
    assert dropped == pytest.approx(record["final"]["dropped"], abs=0.01) and dropped != pytest.approx(
        record["final"]["accuracy"], abs=0.01
    )
    analyse(spec, "one")
    assert len(channels("one")) == 0   # no BatchNorm, no channels


# -------- data

@pytest.fixture
def corrupted(tmp_path):
    from test_data import image, make_tree
    from bnonly.readers import CORRUPTIONS
    make_tree(tmp_path)
    (tmp_path/"CIFAR-10-C").mkdir()
    for i, name in enumerate(CORRUPTIONS):
        np.save(tmp_path / "CIFAR-10-C" / f"{name}.npy", np.stack([image((i, j)) for j in range(10)]))
    np.save(tmp_path/"CIFAR-10-C"/"labels.npy", np.tile([0, 1], 5))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*holds .* where CIFAR-10 has")
def test_robustness_by_corruption_and_severity(corrupted, tmp_path, monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path/"runs"))
    monkeypatch.setenv("BNONLY_DATA", str(corrupted))
    data = load_data("cifar10-c")
    assert data.test.x.shape == (150, 32, 32, 3) and data.test.y[:10].tolist() == [0, 1]*5
    spec = replace(TINY, data="cifar10", epochs=1)
    fit(spec, "r", **CPU)
    table = robustness(spec, "r")
    assert table.shape == (15, 5)
    with torch.no_grad():
        model, x = restore(spec, "r"), (data.test.x[20:30].float()/255 - torch.tensor(data.mean))/torch.tensor(data.std)
        hits = (
            model(x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)).argmax(1) == data.test.y[20:30]
        ).view(5, 2)
    assert table.loc["impulse_noise"].tolist() == (100*hits.double().mean(1)).tolist()
    assert with_robustness(results("r")).robustness[0] == pytest.approx(table.to_numpy().mean())
    file = run_dir(spec, "r")/"robustness.csv"
    before = file.read_bytes()
    file.unlink()
    evaluate_robustness("r", results("r"))
    assert file.read_bytes() == before
    file.write_text(file.read_text().replace(pd.read_csv(file).seal[0], "another"))
    assert "robustness" not in with_robustness(results("r"))


@pytest.mark.filterwarnings("ignore:.*holds .* where CIFAR-10 has")
def test_broken_corruptions(corrupted):
    np.save(corrupted/"CIFAR-10-C"/"fog.npy", np.zeros((9, 32, 32, 3), np.uint8))
    with pytest.raises(BrokenData, match="fog.npy holds"): load_data("cifar10-c", corrupted)
    (corrupted/"CIFAR-10-C"/"snow.npy").unlink()
    with pytest.raises(FileNotFoundError, match="snow.npy is missing"): load_data("cifar10-c", corrupted)


@pytest.mark.filterwarnings("ignore:.*holds .* where SVHN has")
def test_broken_svhn(tmp_path):
    from scipy.io import savemat
    with pytest.raises(FileNotFoundError, match="train_32x32.mat is missing"): load_data("svhn", tmp_path)
    (tmp_path/"svhn").mkdir()
    for part in ("train", "test"):
        savemat(
            tmp_path / "svhn" / f"{part}_32x32.mat",
            dict(X=np.zeros((32, 32, 3, 3), np.uint8), y=np.array([[1], [10], [3]])),
        )
    assert load_data("svhn", tmp_path).train.y.tolist() == [1, 0, 3]
    file = tmp_path/"svhn"/"train_32x32.mat"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(BrokenData, match="train_32x32.mat is cut off"): load_data("svhn", tmp_path)


def test_efficientnet_without_timm_says_so(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match="pip install"): create_model("efficientnet-b0")


def test_efficientnet():
    pytest.importorskip("timm")
    model = create_model("efficientnet-b0", num_classes=7)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7) and all(torch.isfinite(p).all() for p in model.parameters())
    assert set(roles(model).values()) == {"conv", "bn", "output"}
    with pytest.raises(ValueError, match="norm of efficientnet-b0 'fixup' is not one of batch"):
        create_model("efficientnet-b0", norm="fixup")


# -------- claims

def made(accuracy, images="CIFAR-10", epochs=200, data="cifar10", arch="wrn28-10", **columns):
    "A table of runs by the paper's recipe from {(norm, field, strength): accuracies of its seeds}."
    from dataclasses import asdict
    wide = dict(act="swish", schedule="cosine", weight_decay=5e-4)
    recipe = {
        "wrn28-10": wide,
        "wrn10-1": wide,
        "resnet50": dict(schedule="imagenet", batch_size=512, lr=0.2),
        "efficientnet-b8": dict(schedule="cosine"),
    }[arch]
    rows = [
        dict(
            asdict(
                Spec(
                    arch=arch,
                    policy="all",
                    bn_init="ones",
                    data=data,
                    epochs=epochs,
                    seed=n,
                    norm=norm,
                    **recipe,
                    **({field: s} if field else {}),
                )
            ),
            status="complete",
            accuracy=v,
            images=images,
            folder="",
        )
        for (norm, field, s), vs in accuracy.items()
        for n, v in enumerate(vs)
    ]
    return pd.DataFrame(rows).assign(**columns)


def said(id, table): return ledger(table, [c for c in REGULARIZATION if c.id == id]).verdict[0]


def spread(base, by=.02):
    "Each seed a little off, so that the mean stays."
    return {k: [v + by*(-1)**i for i, v in enumerate(vs)] for k, vs in base.items()}


def test_claims_of_dauphin_and_cubuk_follow_the_one_rule():
    base = {
        ("batch", "", 0): (95.1,) * 10,
        ("fixup", "", 0): (94.1,) * 10,
        ("fixup", "functional_l2", 0.1): (94.7,) * 10,
        ("fixup", "functional_l2", 1.0): (90.0,) * 10,
    }
    assert said("dc-fl2-cifar", made(spread(base))) == "reproduced"   # the better of two strengths
    assert said("dc-gap-cifar", made(spread(base))) == "reproduced"
    assert (
        said("dc-fl2-cifar", made({k: v[:2] for k, v in spread(base, 0.001).items()}))
        == "holds on CIFAR-10, 200 epochs, 2 of 10 seeds"
    )
    assert (
        said("dc-fl2-cifar", made({k: [v + 3 * (k[1] != "") for v in vs] for k, vs in spread(base).items()}))
        == "not reproduced"
    )
    assert (
        said("dc-gap-cifar", made(spread(base), images="digits", data="digits", arch="wrn10-1", epochs=25))
        == "holds on digits, 25 epochs, 1 stand-in"
    )
    assert said("dc-svhn-bn", made(base, images="digits", data="digits", arch="wrn10-1")) == "not measured"
    assert said("dc-svhn-bn", made(spread(base), images="SVHN", data="svhn")) == "not reproduced"
    assert (
        said("dc-fl2-cifar", made({("fixup", "", 0): (92.0, 96.0), ("fixup", "functional_l2", 0.1): (93.0, 95.0)}))
        == "undecided on CIFAR-10, 200 epochs, 2 of 10 seeds"
    )
    assert not any(
        c.kind in ("stronger", "weaker") and c.on != "imagenet" for c in REGULARIZATION
    )  # the text has these of ImageNet alone


IMAGENET = "ImageNet", 90, "imagenet", "resnet50"
HERE = " on ImageNet, 90 epochs, without Goyal et al.'s further improvements"


def measure(id, table):
    claim = next(c for c in REGULARIZATION if c.id == id)
    return MEASURES[claim.kind](table, claim)


def test_the_share_of_the_way_has_the_error_of_its_three_means():
    share = {("fixup", "", 0): (72., 72.), ("batch", "", 0): (76., 76.), ("fixup+single", "", 0): (74.8, 74.8)}
    assert said("dc-single-share", made(share, *IMAGENET)) == "holds" + HERE
    off = {
        k: (v[0] - s, v[1] + s) for s, (k, v) in zip((0.1, 0.2, 0.3), share.items())
    }  # of two: standard errors of .1, .2 and .3
    assert measure("dc-single-share", made(off, *IMAGENET))[0].se == pytest.approx(
        25 * (0.3**2 * 0.1**2 + 0.7**2 * 0.2**2 + 0.3**2) ** 0.5
    )
    match = lambda by: made(
        {("batch", "", 0): (76.0, 76.01), ("fixup", "embedding_l2", 0.1): (76.0 - by, 76.01 - by)}, *IMAGENET
    )
    assert said("dc-match-imagenet", match(.4)) == "holds" + HERE
    assert said("dc-match-imagenet", match(1.8)) == "does not hold" + HERE
    one = match(0).query("seed == 0")
    assert said("dc-match-imagenet", one) == f"undecided{HERE}"


def test_methods_are_compared_at_the_norm_of_batchnorm():
    "Half of the way, in logarithms, from a norm of 16 to one of 4, the accuracy is between theirs."
    steps = {
        ("batch", "", 0): (76.01, 75.99),
        ("fixup", "", 0): (72.01, 71.99),
        ("fixup", "functional_l2", 0.1): (74.01, 73.99),
    }
    table = made(steps, *IMAGENET)
    norm = table.norm.map({"batch": 8., "fixup": 16.}).where(table.functional_l2 == 0, 4.)
    table = table.assign(output_norm=norm, embedding_norm=norm)
    item, = measure("dc-equal-output", table)
    assert item.value == pytest.approx(76 - 73) and [p.value for p in item.used] == pytest.approx([76, 72, 74])
    assert (
        said("dc-equal-output", table) == "holds" + HERE
        and said("dc-equal-embedding-fl2", table) == "does not hold" + HERE
    )
    assert (
        said("dc-equal-output", table.assign(output_norm=norm.where(table.norm != "batch", 20.0))) == "not measured"
    )  # beyond all strengths


def test_the_best_rate_and_what_diverges():
    base = {("batch", "", 0): (95.,)*10, ("fixup", "functional_l2", .1): (94.,)*10}
    table = pd.concat(
        [made(spread(base)), made(spread({k: [v[0] + (0.5 if k[1] else -0.5)] * 10 for k, v in base.items()}), lr=0.2)]
    )
    assert said("dc-rate-bn", table) == said("dc-rate-fl2", table) == "reproduced"
    assert measure("dc-rate-fl2", table)[0].value == pytest.approx(.5)
    high = made(
        {("fixup-open", "standardize", 1e-4): (1.0, 1.0), ("fixup-open", "standardize", 1e-5): (70.0, 70.0)}, *IMAGENET
    )
    high.loc[high.standardize == 1e-4, "status"] = "diverged"
    item, = measure("dc-standard-diverges", high)
    assert item.value == 100 and item.ends[0] == pytest.approx(100*.025**.5)   # two of two: at least 16%
    assert said("dc-standard-diverges", high) == "undecided" + HERE
    assert measure("dc-standard-diverges", made({("fixup-open", "standardize", 1e-5): (70., 70.)}, *IMAGENET)) == []


def test_digits_say_nothing_about_imagenet():
    base = {("batch", "", 0): (95., 95.1), ("fixup", "", 0): (94., 94.1), ("none", "", 0): (80., 80.1)}
    for arch in ("resnet50", "wrn10-1"):
        table = made(base, images="digits", data="digits", arch=arch, epochs=5)
        found = ledger(table, [c for c in REGULARIZATION if c.on in ("imagenet", "b8")])
        assert set(found.verdict) == {"not measured"}


@pytest.mark.parametrize(
    "wrong",
    [
        dict(weight_decay=0.0),
        dict(act="relu"),
        dict(schedule="step"),
        dict(batch_size=1024),
        dict(policy="bn"),
        dict(lr=0.5),
    ],
)
def test_another_recipe_is_never_a_reproduction(wrong):
    base = {("batch", "", 0): (95.,)*10, ("fixup", "", 0): (94.,)*10}
    (name, value), = wrong.items()
    assert said("dc-gap-cifar", made(base, **wrong)) == f"holds on CIFAR-10, 200 epochs, {name}={value}"
    both = pd.concat([made(base), made({("batch", "", 0): (99.,)*10}, **wrong)])
    assert ledger(both, [c for c in REGULARIZATION if c.id == "dc-gap-cifar"]).equals(
        ledger(made(base), [c for c in REGULARIZATION if c.id == "dc-gap-cifar"])
    )


def test_one_lucky_seed_does_not_stand_for_ten():
    base = made({("batch", "", 0): (95.,)*10, ("fixup", "", 0): (94.,)*10})
    lucky = made({("fixup", "", 0): (99.,)}, lr=.2)
    assert said("dc-gap-cifar", pd.concat([base, lucky])) == "reproduced"


def test_what_efficientnet_lacks_here_is_said():
    base = {("batch", "", 0): (85., 85.), ("batch", "dropout", .5): (85.9, 85.9)}
    assert (
        said("dc-b8-dropout", made(base, "ImageNet", 350, "imagenet", "efficientnet-b8"))
        == "holds on ImageNet, 350 epochs, by SGD on crops of 224 pixels, "
        "without RandAugment, StochasticDepth and early stopping"
    )


@pytest.mark.parametrize(
    "fixup, apart, verdict", [(6.2, 0.01, "holds"), (3.9, 0.01, "does not hold"), (6.2, 2, "undecided")]
)
def test_norms_are_compared_in_percent(fixup, apart, verdict):
    "Two seeds a method, which lie apart."
    table = made({("batch", "", 0): (95., 95.), ("fixup", "", 0): (94., 94.)})
    norms = [5 - apart, 5 + apart, fixup - apart, fixup + apart]
    assert (
        said("dc-grows-embedding-cifar10", table.assign(embedding_norm=norms))
        == f"{verdict} on CIFAR-10, 200 epochs, 2 of 10 seeds"
    )
