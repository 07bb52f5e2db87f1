"A delta gives its model back on the right base, bit for bit, and is refused in one sentence on any other."
import copy
import random
import re
import resource
import tracemalloc
import warnings

import pytest
import torch
from bnonly.delta import Shelf, load_delta, merge, read_delta, save_delta
from bnonly.experiment import write
from bnonly.models import create_model
from bnonly.policies import counts, freeze, frozen, frozen_as, trainable, trained_state, unfreeze
from bnonly.sealed import read_sealed, serialize
from hostile import KINDS, metadata_lied, unsealed
from test_freeze_anything import learner_of
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.nn import functional as F

CASES = 2_100
BASE = "timm/resnet18.a1_in1k"
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    "A network as one writes it every day; `seed` draws its base."
    def __init__(self, seed=0, classes=5):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem, self.bn, self.conv = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
            self.norm, self.fc = nn.GroupNorm(2, 8), nn.Linear(8, classes)
            self.register_buffer("scale", torch.rand(8, 1, 1), persistent=False)

    def forward(self, x):
        return self.fc(self.norm(self.conv(self.bn(self.stem(x)).relu()) * self.scale).relu().mean((2, 3)))


def trained(model, policy, steps=3, seed=0, **how):
    freeze(model.train(), policy, **how)
    g = torch.Generator().manual_seed(seed)
    opt = torch.optim.SGD([*trainable(model).values()], lr=.1, momentum=.9, weight_decay=.1)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(torch.randn(8, 3, 8, 8, generator=g)), torch.arange(8) % 5).backward()
        opt.step()
    return model.eval()


def whole_state(model):
    "All that may not change where a file is refused."
    flags = [(n, p.requires_grad) for n, p in model.named_parameters()]
    kinds = [(n, type(m).__name__, m.training, sorted(vars(m))) for n, m in model.named_modules()]
    return {n: t.clone() for n, t in model.state_dict().items()}, flags, kinds, frozen_as(model)


def same(one, other):
    return (
        one[1:] == other[1:]
        and one[0].keys() == other[0].keys()
        and all(torch.equal(t, other[0][n]) for n, t in one[0].items())
    )


POLICIES = [
    "norm+output",
    "norm",
    "bn",
    "output",
    "random2+output",
    "bn+scattered2+output",
    "all-affine",
    "gamma+output",
    "all-beta",
    "all",
    "none",
]


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_bits_on_a_fresh_base(policy, tmp_path):
    model = freeze(Net(), policy, seed=2**63 - 1).eval() if policy == "none" else trained(Net(), policy, seed=2**63 - 1)
    path = save_delta(model, tmp_path / "it.safetensors", base=BASE)
    again = load_delta(path, Net())
    assert not again.training and torch.equal(again(X), model(X))
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in model.state_dict().items())
    assert frozen_as(again) == frozen_as(model) and [*trainable(again)] == [*trainable(model)]
    metadata, tensors = read_delta(path, Net())
    assert (metadata["base"], metadata["policy"]) == (BASE, policy) and tensors.keys() == trained_state(model).keys()
    assert {n: t.dtype for n, t in tensors.items() if "num_batches" in n} == {"bn.num_batches_tracked": torch.int64}


def test_one_delta_after_another_on_the_same_model(tmp_path):
    "Also where the earlier one has random entries, whose places go back to what they were only where the file says so."
    paths = {
        p: save_delta(trained(Net(), p), tmp_path / f"{p}.safetensors", base=BASE)
        for p in ("norm+output", "random2+output", "output")
    }
    model = load_delta(paths["output"], Net())
    assert same(
        whole_state(load_delta(paths["norm+output"], Net())), whole_state(load_delta(paths["norm+output"], model))
    )
    both = load_delta(paths["random2+output"], Net())
    assert same(
        whole_state(load_delta(paths["random2+output"], Net())), whole_state(load_delta(paths["random2+output"], both))
    )
    with pytest.raises(ValueError, match="stands on another base"):
        load_delta(paths["norm+output"], both)  # random entries are in its weights


def test_wrapped_models_and_held_statistics(tmp_path):
    model = trained(Net(), "output", statistics="frozen", output="fc")
    path = save_delta(nn.DataParallel(model), tmp_path / "it.safetensors", base=BASE)
    again = load_delta(path, nn.DataParallel(Net()))
    assert torch.equal(again.module(X), model(X)) and frozen_as(again) == dict(
        policy="output", seed=0, output=["fc"], statistics="frozen"
    )
    before = model.bn.running_mean.clone()
    again.train()(X)
    assert torch.equal(again.module.bn.running_mean, before)
    other = Net()
    other.bn.running_mean += 1   # held statistics belong to the base
    with pytest.raises(ValueError, match="another base"): load_delta(path, other)


@pytest.mark.parametrize(
    "change",
    [lambda m: m.conv.weight.data[0, 0, 0, 0].add_(1e-6), lambda m: m.stem.bias.data.neg_(), lambda m: m.conv.half()],
)
def test_another_base_is_refused_and_nothing_changes(change, tmp_path):
    path = save_delta(trained(Net(), "norm+output"), tmp_path / "it.safetensors", base=BASE)
    other = Net()
    change(other)
    before = whole_state(other)
    with pytest.raises(ValueError, match=f"another base than this Net: what 'norm.output' freezes .* in '{BASE}'") as e:
        load_delta(path, other)
    assert "\n" not in str(e.value) and same(before, whole_state(other))
    other = Net(seed=1)
    with pytest.raises(ValueError, match="another base"): load_delta(path, other)


@pytest.mark.parametrize(
    "other,why",
    [
        (lambda: Net(classes=7), r"'fc.bias' is \[5\] F32 in it, and must be \[7\] F32"),
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2)), "no delta of this Sequential"),
        (lambda: nn.Linear(2, 2), "no delta of this Linear: "),
    ],
)
def test_another_architecture_is_refused(other, why, tmp_path):
    path = save_delta(trained(Net(), "norm+output"), tmp_path / "it.safetensors", base=BASE)
    with pytest.raises(ValueError, match=why): load_delta(path, other())


def test_a_learner_that_fine_tunes_gives_a_delta_where_it_is_frozen(tmp_path):
    "fastai's fine_tune would train all of the model, and what it gave would stand on no base."

    def learner():
        return learner_of(
            Net(),
            tmp_path,
            fit=False,
            groups=lambda m: [
                [*m.stem.parameters()],
                [*m.conv.parameters(), *m.bn.parameters()],
                [*m.norm.parameters(), *m.fc.parameters()],
            ],
        )
    learn = learner()
    with frozen(learn, "norm+output"), learn.no_bar(), learn.no_logging():
        learn.fine_tune(1)
        path = save_delta(learn.model, tmp_path / "it.safetensors", base=BASE)
    assert torch.equal(load_delta(path, Net())(X), learn.model.eval()(X))
    learn = learner()
    freeze(learn.model, "norm+output")
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    with pytest.raises(
        ValueError, match="'conv.bias' trains, against policy 'norm.output'; freeze .* train within `with frozen"
    ):
        save_delta(learn.model, path, base=BASE)


def test_what_cannot_be_saved(tmp_path):
    path = tmp_path / "it.safetensors"
    with pytest.raises(ValueError, match="this Net was not frozen"): save_delta(Net(), path, base=BASE)
    with pytest.raises(ValueError, match="was not frozen"): save_delta(unfreeze(freeze(Net(), "norm")), path, base=BASE)
    model = trained(Net(), "norm+output")
    for base in ("", "a" * 300, "<b>", "../x", "a\nb", "a`b"):
        with pytest.raises(ValueError, match="is not a name of up to 200"): save_delta(model, path, base=base)
    with pytest.raises(ValueError, match="'conv.bias' trains, against policy 'norm.output'"):
        save_delta(copy.deepcopy(model).requires_grad_(True), path, base=BASE)
    model.fc.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="fc.weight holds numbers that are not finite"):
        save_delta(model, path, base=BASE)
    assert not path.exists()
    with pytest.raises(FileNotFoundError): load_delta(path, Net())


def test_two_thousand_odd_files_get_a_sentence_each_and_change_nothing(tmp_path):
    "No crash, no large allocation, and never a half-changed model."
    rng, path, model = random.Random(0), tmp_path / "odd.safetensors", Net()
    good = save_delta(trained(Net(), "norm"), path, base=BASE).read_bytes()
    metadata, tensors = read_delta(path, model)
    before = whole_state(unfreeze(load_delta(path, model)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    for i in range(CASES):
        path.write_bytes(KINDS[i % len(KINDS)](rng, good, metadata, tensors))
        try: load_delta(path, model)
        except ValueError as e:
            assert (
                re.search("is no delta of this Net|another base than this Net", str(e))
                and len(str(e)) < 1000
                and "\n" not in str(e)
            ), str(e)
            if i % 50 < len(KINDS): assert same(before, whole_state(model)), i
        else:   # the lie was another truth: a base's name, or what this policy does not need
            assert KINDS[i % len(KINDS)] is metadata_lied
            changed = {k for k, v in read_delta(path, model)[0].items() if v != metadata[k]} - {"digest"}
            assert changed <= {"base", "entries", "output", "statistics"}, changed
            unfreeze(model)
    assert same(before, whole_state(model)) and tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 100_000   # kB, of the whole process


def test_what_was_read_stays_where_the_file_changes(tmp_path):
    """The numbers are in memory before they are held against the digest; a file that is written over changes none of
    them."""
    path = save_delta(trained(Net(), "norm+output"), tmp_path / "it.safetensors", base=BASE)
    shelf, tensors = Shelf(Net(), dict(birds=path)), read_delta(path, Net())[1]
    before = {n: t.clone() for n, t in tensors.items()}
    with open(path, "r+b") as f: f.write(bytes(path.stat().st_size))
    assert all(torch.equal(t, before[n]) for n, t in tensors.items())
    shelf["birds"]
    assert all(torch.equal(t, before[n]) for n, t in trained_state(shelf.model).items())


def test_a_true_looking_file_on_a_false_base_is_refused(tmp_path):
    "Sealed by its digest, and yet of frozen numbers that are not there."
    path = save_delta(trained(Net(), "norm+output"), tmp_path / "it.safetensors", base=BASE)
    metadata, tensors = read_delta(path, Net())
    with pytest.raises(ValueError, match="another base"):
        load_delta(write(path, serialize(unsealed(metadata) | dict(frozen="0" * 64), tensors)), Net())


# ---- many on one base

def test_a_shelf_swaps_numbers_and_statistics_exactly(tmp_path):
    """Two hundred deltas in turns: each is what its file gives alone, statistics included, and no tensor of the model
    is another one."""
    header, tensors = read_delta(save_delta(trained(Net(), "norm+output"), tmp_path / "first", base=BASE), Net())
    files, alone = {}, {}
    for i in range(200):
        g = torch.Generator().manual_seed(i)
        alone[f"task {i}"] = {
            n: torch.randn(t.shape, generator=g).abs() if t.is_floating_point() else t + i for n, t in tensors.items()
        }
        files[f"task {i}"] = write(tmp_path / f"{i}", serialize(unsealed(header), alone[f"task {i}"]))
    shelf = Shelf(nn.DataParallel(Net()), files)
    model, at = shelf.model.module, {n: t.data_ptr() for n, t in shelf.model.state_dict().items()}
    before = {n: t.clone() for n, t in model.state_dict().items() if n not in tensors}
    assert len(shelf) == 200 and [*shelf] == [*files]
    for name in random.Random(0).sample([*files], 200):
        assert shelf[name] is shelf.model and shelf.use(name) is shelf.model
        state = model.state_dict()
        assert all(torch.equal(state[n], t) for n, t in alone[name].items()) and all(
            torch.equal(state[n], t) for n, t in before.items()
        )
    assert at == {n: t.data_ptr() for n, t in shelf.model.state_dict().items()}
    assert torch.equal(shelf["task 7"].module(X), load_delta(files["task 7"], Net())(X))
    copied = sum(getattr(m, kind).numel() for m, kind in shelf.places)
    assert copied == sum(t.numel() for t in tensors.values()) < sum(t.numel() for t in model.state_dict().values())


def test_a_shelf_copies_what_a_delta_holds_and_nothing_else(tmp_path):
    model = trained(Net(), "random2+output")
    files = {s: save_delta(trained(Net(), "random2+output", steps=s), tmp_path / f"{s}", base=BASE) for s in (1, 2)}
    shelf, copies = Shelf(Net(), {str(s): p for s, p in files.items()}), []

    class Copies(TorchFunctionMode):
        def __torch_function__(self, call, types, args=(), kwargs=None):
            if call is torch.Tensor.copy_: copies.append(args[0].numel())
            return call(*args, **kwargs or {})

    with Copies(): shelf.use("2")
    assert sorted(copies) == sorted(t.numel() for t in trained_state(model).values())
    assert torch.equal(shelf["2"](X), load_delta(files[2], Net())(X)) and not torch.equal(shelf["1"](X), shelf["2"](X))
    shelf.model.double().float()   # buffers are other tensors now
    assert torch.equal(shelf["2"](X), load_delta(files[2], Net())(X))


def test_a_shelf_refuses_what_does_not_fit(tmp_path):
    fit, other = (save_delta(trained(Net(), p), tmp_path / p, base=BASE) for p in ("norm+output", "norm"))
    elsewhere = save_delta(trained(Net(seed=1), "norm+output"), tmp_path / "elsewhere", base=BASE)
    shelf = Shelf(Net(), dict(birds=fit))
    for path, why in (
        (other, "its policy 'norm' is not 'norm.output', which the first has"),
        (elsewhere, "its frozen '[0-9a-f]{64}' is not"),
    ):
        with pytest.raises(ValueError, match=why): shelf["odd"] = path
    with pytest.raises(ValueError, match="delta 'bird' is not one of birds; the nearest is 'birds'"): shelf["bird"]
    with pytest.raises(ValueError, match="no other does"): Shelf(Net())["x"]
    freeze(shelf.model, "norm")
    with pytest.raises(ValueError, match="frozen otherwise"): shelf["birds"]


# ---- back to a plain model

@pytest.mark.parametrize("policy", ["norm+output", "random2+output", "bn+scattered2", "output"])
def test_a_merged_model_is_plain_and_loads_into_its_class(policy, tmp_path):
    model = trained(Net(), policy, statistics="frozen")
    before = whole_state(model)
    plain = merge(nn.DataParallel(model))
    assert same(before, whole_state(model)) and type(plain) is Net and plain is not model
    assert [*plain.state_dict()] == [*Net().state_dict()] and {type(m) for m in plain.modules()} == {
        type(m) for m in Net().modules()
    }
    again = Net(seed=9)
    again.scale = model.scale   # is not part of a state dict
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again.eval()(X), model(X)) and torch.equal(plain(X), model(X))
    assert all(p.requires_grad for p in plain.parameters()) and sorted(vars(plain)) == sorted(vars(Net()))


def test_a_network_of_this_package_and_torchvisions(tmp_path):
    "ResNet-18 with random weights: the file is the numbers that moved and at most 200 bytes for each tensor's name."
    import torchvision
    for make in (lambda: create_model("resnet8"), lambda: torchvision.models.resnet18(num_classes=5)):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base = make()
        model = trained(copy.deepcopy(base), "norm+output", steps=1)
        path = save_delta(model, tmp_path / "it.safetensors", base=BASE)
        assert torch.equal(load_delta(path, base)(X), model(X))
        numbers = [t for t in trained_state(model).values()]
        room = path.stat().st_size - sum(t.numel()*t.element_size() for t in numbers)
        assert 0 < room < 200 * len(numbers) + 1000 and counts(model).trainable["all"] == sum(
            p.numel() for p in trainable(model).values()
        )


def test_the_file_is_plain_safetensors(tmp_path):
    "Any reader of safetensors has it, and any PyTorch takes it."
    import safetensors.torch
    model = trained(Net(), "norm+output")
    path = save_delta(model, tmp_path / "it.safetensors", base=BASE)
    again = Net()
    left = again.load_state_dict(safetensors.torch.load_file(path), strict=False)
    assert not left.unexpected_keys and torch.equal(again.eval()(X), model(X))
    with warnings.catch_warnings(action="error"):
        assert (
            read_sealed(path, "delta", lambda m: {n: (t.shape, t.dtype) for n, t in trained_state(model).items()})[
                1
            ].keys()
            == trained_state(model).keys()
        )
