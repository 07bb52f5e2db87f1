"""peft's LN-tuning and a policy train the same numbers, bit for bit, and a delta keeps the statistics that peft's
files lose."""
import copy
import re
import sys

import pytest
import torch
from bnonly.adapters import from_peft, to_peft
from bnonly.delta import load_delta, save_delta
from bnonly.policies import counts, freeze, frozen_as
from torch import nn
from torch.nn import functional as F

peft = pytest.importorskip("peft", reason="peft is not installed (pip install 'bnonly[peft]')")
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    "Normalizations and linear layers deeper down, one of them with a name that the output's ends in."
    def __init__(self):
        super().__init__()
        self.stem, self.bn, self.blocks = nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8), nn.ModuleList(nn.ModuleDict(
            dict(norm=nn.LayerNorm(8), mlp=nn.Linear(8, 8))) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.ModuleDict(dict(fc=nn.Linear(8, 5)))

    def forward(self, x):
        x = self.bn(self.stem(x)).flatten(2).transpose(1, 2)
        for b in self.blocks: x = x + b["mlp"](b["norm"](x)).relu()
        return self.head["fc"](self.norm(x).mean(1))


def plain():
    "Numbered layers: '1' is a BatchNorm, and 'features.1' would be a convolution that ends alike."
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(features, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def resnet18():
    import torchvision
    return torchvision.models.resnet18(num_classes=5)


def made(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def step(model, n=2):
    "Steps of SGD with momentum and decay, in training mode."
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=.1, momentum=.9, weight_decay=.1)
    model.train()
    for i in range(n):
        opt.zero_grad()
        F.cross_entropy(model(X + i), torch.arange(8) % 5).backward()
        opt.step()
    return model.eval()


@pytest.mark.parametrize(
    "make,policy",
    [
        (Attention, "norm+output"),
        (Attention, "bn+output"),
        (Attention, "norm"),
        (plain, "norm+output"),
        (plain, "bn"),
        (resnet18, "norm+output"),
    ],
)
def test_a_step_in_both_gives_the_same_bits(make, policy, tmp_path):
    base = made(make)
    ours, theirs = freeze(copy.deepcopy(base), policy), peft.get_peft_model(copy.deepcopy(base), to_peft(base, policy))
    trains = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert trains == counts(ours).trainable["all"] > 0
    step(ours), step(theirs)
    back = from_peft(theirs)
    assert [*back.state_dict()] == [*ours.state_dict()] and not back.training
    assert all(torch.equal(t, back.state_dict()[n]) for n, t in ours.state_dict().items())
    assert not torch.equal(
        back.state_dict()[
            "1.running_mean" if make is plain else "bn1.running_mean" if make is resnet18 else "bn.running_mean"
        ],
        torch.zeros(8 if make is not resnet18 else 64),
    )
    assert torch.equal(back(X), ours(X)) and torch.equal(theirs(X), ours(X))
    assert counts(back).equals(counts(ours)) and {type(m) for m in back.modules()} == {type(m) for m in base.modules()}
    norm = (
        "norm" if "bn" not in policy or make is not Attention else "bn"
    )  # where all are BatchNorms, both are the same
    assert frozen_as(back)["policy"] == "+".join([norm, *policy.split("+")[1:]])
    assert torch.equal(load_delta(save_delta(back, tmp_path / "it.safetensors", base="made/here"), base)(X), ours(X))


def test_pefts_own_files_lose_statistics_and_a_delta_does_not(tmp_path):
    "Those of a BatchNorm that does not train: peft's files keep what is inside of the layers that it copied."
    base = made(plain)
    base[1] = nn.Sequential(nn.BatchNorm2d(8, affine=False), nn.GroupNorm(2, 8))
    theirs = step(peft.get_peft_model(copy.deepcopy(base), to_peft(base, "norm+output")))
    theirs.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    assert torch.equal(from_peft(again)[1][1].weight, from_peft(theirs)[1][1].weight)
    assert not torch.equal(again(X), theirs(X)) and not from_peft(again)[1][0].running_mean.any()
    path = save_delta(from_peft(theirs), tmp_path / "it.safetensors", base="made/here")
    assert torch.equal(load_delta(path, base)(X), theirs(X))


def test_names_are_a_list_where_their_endings_are_enough():
    config = to_peft(made(resnet18), "norm+output")
    names = {n for n, m in resnet18().named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert {*config.target_modules} == names and {*config.modules_to_save} == {"fc"}
    assert re.fullmatch(to_peft(plain(), "bn").target_modules, "1") and not re.fullmatch(
        to_peft(plain(), "bn").target_modules, "0.1"
    )
    assert to_peft(plain(), "bn").modules_to_save is None


@pytest.mark.parametrize(
    "make,policy,why",
    [
        (plain, "random2+output", "trains 'random', which peft's LNTuningConfig cannot; the nearest is 'norm'"),
        (plain, "output", "the nearest is 'norm.output'"),
        (plain, "nrom", "the nearest is"),
        (
            lambda: nn.Sequential(
                nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.ReLU(), nn.Linear(288, 8)),
                nn.BatchNorm1d(8),
                nn.ReLU(),
                nn.Dropout(),
                nn.Linear(8, 5),
            ),
            "norm+output",
            "peft finds modules by the endings of their names, and '0.4' ends as the output '4' does",
        ),
    ],
)
def test_what_peft_cannot_train_is_refused(make, policy, why):
    with pytest.raises(ValueError, match=why): to_peft(made(make), policy)


def test_adapters_that_no_policy_is():
    model = peft.get_peft_model(plain(), peft.LNTuningConfig(target_modules=["0.0", "1"]))
    with pytest.raises(ValueError, match="no policy trains what this adapter does.*'0.0'"): from_peft(model)
    with pytest.raises(ValueError, match="LoraConfig is not a model with one active adapter"):
        from_peft(peft.get_peft_model(plain(), peft.LoraConfig(target_modules=["4"])))
    with pytest.raises(ValueError, match="Sequential is not a model with one active adapter"): from_peft(plain())


def test_the_policy_goes_there_and_back_on_a_merged_adapter():
    base = made(plain)
    theirs = step(peft.get_peft_model(copy.deepcopy(base), to_peft(base, "norm+output")))
    y, back = theirs(X), from_peft(theirs)
    assert torch.equal(theirs(X), y)  # the adapter stays as it was
    assert torch.equal(
        step(peft.get_peft_model(copy.deepcopy(back), to_peft(back, "norm+output")), 1)(X), step(back, 1)(X)
    )


def test_without_peft_one_sentence_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for f in (lambda: to_peft(plain(), "norm"), lambda: from_peft(plain())):
        with pytest.raises(
            ImportError, match=r"adapters need peft, which is not installed; pip install 'bnonly\[peft\]'"
        ):
            f()
