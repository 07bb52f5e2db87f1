"Freezing models from elsewhere, by kind of fault: the right thing, or one sentence."
import copy
import inspect
import io
import pickle
import random
from collections import deque

import numpy as np
import pytest
import torch
from bnonly.models import create_model, roles
from bnonly.policies import (
    counts,
    effective_weights,
    trainable_mask,
    freeze,
    frozen,
    frozen_as,
    load_trained_state,
    trained_state,
    trainable,
    unfreeze,
)
from torch import nn
from torch.nn.utils import parametrizations


def net(norm=None, conv=None, head=None):
    return nn.Sequential(
        conv or nn.Conv2d(3, 8, 3),
        norm or nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        head or nn.Linear(8, 5),
    )


class RMSNorm(nn.Module):
    def __init__(self, shape, name):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.full(shape, 2.)))

    def forward(self, x): return nn.functional.normalize(x, dim=1) * [*self.parameters()][0]


class Sub(RMSNorm):
    pass


def test_gradients_of_an_earlier_step_are_cleared():
    model = net()
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    freeze(model, "norm")
    assert model[0].weight.grad is None and model[1].weight.grad is not None


def test_what_its_author_froze_stays_frozen_and_is_said():
    model = net()
    model[0].requires_grad_(False)
    for _ in range(2):
        with pytest.warns(UserWarning, match="2 parameters .* stay frozen under 'all', first '0.bias'"):
            freeze(model, "all")
        assert not model[0].weight.requires_grad and model[5].weight.requires_grad
    assert "5.weight" in trainable(unfreeze(freeze(copy.deepcopy(model), "norm"))) and not model[0].weight.requires_grad
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters were frozen before, first '0.bias'"): freeze(model, "norm")


def test_freezing_again_follows_the_new_policy_alone():
    x, model = torch.randn(4, 3, 32, 32), create_model("resnet8")
    for policy in ("bn", "random2", "output", "scattered2+output", "gamma", "all"):
        freeze(model, policy)
        assert counts(model).equals(counts(freeze(create_model("resnet8"), policy))), policy
    assert [*model.state_dict()] == [*create_model("resnet8").state_dict()]
    assert model(x).isfinite().all()


def test_a_models_own_attributes_stay():
    model = net()
    model.frozen, model.made = lambda: 3, {"by": "hand"}
    assert freeze(model, "norm").frozen() == 3 and model.made == {"by": "hand"}


@pytest.mark.parametrize("shape,name", [((8,), "g"), ((1, 8, 1, 1), "gamma"), ((8, 1, 1), "scale")])
@pytest.mark.parametrize("kind", [RMSNorm, Sub])
def test_gamma_of_any_shape_and_name(kind, shape, name):
    model = freeze(net(kind(shape, name)), "norm")
    assert [*trainable(model)] == [f"1.{name}"]
    assert (freeze(model, "all-affine")[1].get_parameter(name) == 1).all() and not model[1].get_parameter(
        name
    ).requires_grad
    with pytest.raises(ValueError, match="may be a gamma or a beta; the nearest policy that need not know is 'norm'"):
        freeze(net(kind(shape, "q")), "all-affine")


@pytest.mark.parametrize("name", ["RMS", "BN", "LN2d", "SyncBN", "frn"])
def test_a_class_that_is_called_a_normalization_in_short(name):
    kind = type(name, (RMSNorm,), {})
    alone = type(name, (nn.Module,), dict(vars(Plain)))
    assert (
        [*trainable(freeze(net(alone(8)), "norm"))]
        == ["1.scale"]
        == [*trainable(freeze(net(kind((8,), "scale")), "norm"))]
    )


class Plain(nn.Module):
    def __init__(self, channels):
        nn.Module.__init__(self)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, x): return nn.functional.normalize(x, dim=1) * self.scale


class ScaledNorm(nn.Module):
    "A normalization around another one, each with numbers of its own."
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x): return self.inner(x) * self.scale


def test_a_normalization_around_another_one_trains_whole():
    assert [*trainable(freeze(net(ScaledNorm(nn.BatchNorm2d(8))), "norm"))] == [
        "1.scale",
        "1.inner.weight",
        "1.inner.bias",
    ]
    assert "1.scale" not in trainable(
        freeze(net(ScaledNorm(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)))), "norm")
    )


def test_a_gamma_that_is_computed_trains_and_is_not_said_to_rest():
    model = net()
    nn.utils.parametrize.register_parametrization(model[1], "weight", nn.Softplus())
    assert [*trainable(freeze(model, "norm"))] == ["1.bias", "1.parametrizations.weight.original"]
    for policy in ("all-affine", "gamma", "all-beta"):
        with pytest.raises(
            ValueError, match="the BatchNorm2d '1' computes its gamma or beta .* the nearest policy is 'norm'"
        ):
            freeze(model, policy)
    own = net(RMSNorm((8,), "g"))
    nn.utils.parametrize.register_parametrization(own[1], "g", nn.Softplus())
    assert [*trainable(freeze(own, "norm"))] == ["1.parametrizations.g.original"]


@pytest.mark.parametrize("arch", ["resnet8", "vgg11", "wrn10-1", "mlp2-10"])
@pytest.mark.parametrize(
    "other",
    [lambda c: nn.GroupNorm(1, c), lambda c: nn.Sequential(nn.GroupNorm(1, c)), nn.Identity],
    ids=["one", "row", "none"],
)
def test_the_relu_stays_whatever_replaces_a_normalization(arch, other):
    model, seen = create_model(arch), []
    for m in [*model.modules()]:
        for n, c in [*m.named_children()]:
            if isinstance(c, nn.BatchNorm2d): setattr(m, n, other(c.num_features))
    model.fc.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
    model(torch.randn(2, 3, 28, 28))
    assert seen[0].min() >= 0 and seen[0].max() > 0


@pytest.mark.parametrize("arch", ["resnet8", "vgg11", "wrn10-1", "mlp2-10"])
def test_a_normalization_in_place_of_ours_keeps_the_function(arch):
    x = torch.randn(2, 3, 28, 28)
    model = create_model(arch).eval()
    y = model(x)
    torch.testing.assert_close(nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()(x), y)
    assert "bn" in roles(model).values()


def test_parametrized_weights_and_tied_ones():
    for f in (parametrizations.weight_norm, parametrizations.spectral_norm):
        model = freeze(net(conv=f(nn.Conv2d(3, 8, 3))), "norm+output")
        assert counts(model).trainable["all"] == 16 + 45 and counts(model).total["all"] == sum(
            p.numel() for p in model.parameters()
        )
        assert effective_weights(model).keys() == trainable_mask(model).keys()
        with pytest.raises(ValueError, match="need a plain weight, and '0' computes its own"): freeze(model, "random2")


def test_hidden_layers_get_a_sentence():
    for model, word in (
        (net(head=nn.LazyLinear(5)), "lazy"),
        (torch.jit.trace(net().eval(), torch.zeros(1, 3, 8, 8)), "ScriptModule"),
    ):
        for f in (lambda m: freeze(m, "norm"), counts):
            with pytest.raises(ValueError, match=word): f(model)


def test_random_entries_in_copies_and_pickles():
    model, x = freeze(net(), "random2+output"), torch.randn(2, 3, 8, 8)
    f = io.BytesIO()
    torch.save(model, f)
    f.seek(0)
    for again in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        pickle.loads(pickle.dumps(copy.deepcopy(model))),
        torch.load(f, weights_only=False),
    ):
        assert (
            torch.equal(again.eval()(x), model.eval()(x))
            and counts(again).equals(counts(model))
            and [*again.state_dict()] == [*model.state_dict()]
        )


def test_a_copy_is_unfrozen_without_the_model():
    "PyTorch lets a copy share the class that it makes for a parametrized layer, and takes the weight from both."
    model, x = freeze(net(), "random2+output"), torch.randn(2, 3, 8, 8)
    y, other = model.eval()(x), copy.deepcopy(model)
    assert torch.equal(unfreeze(copy.deepcopy(model))(x), y) and torch.equal(model(x), y) and len(trainable(model)) == 3
    assert torch.equal(unfreeze(model)(x), y) and torch.equal(other(x), y) and len(trainable(other)) == 3


@pytest.mark.parametrize("groups", [1, 2])
def test_random_entries_of_a_transposed_convolution(groups):
    model = nn.Sequential(nn.ConvTranspose2d(8, 4, 3, groups=groups), nn.Flatten(), nn.Linear(4*25, 2))
    mask = trainable_mask(freeze(model, "random2"))["0.weight"].unflatten(0, (groups, -1)).movedim(1, 2).flatten(0, 1)
    assert mask.flatten(1).sum(1).tolist() == [2]*4


def test_random_entries_do_not_depend_on_a_wrapper():
    bare, wrapped = create_model("resnet8"), nn.DataParallel(create_model("resnet8"))
    one, other = trainable_mask(freeze(bare, "random2")), trainable_mask(freeze(wrapped, "random2"))
    assert all(torch.equal(m, other[f"module.{n}"]) for n, m in one.items())


def test_tracing_leaves_nothing_behind():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.kept, self.n = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), [], 0
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.n += 1
            self.seen += 1
            self.last = x
            self.kept.append(x)
            return self.fc(self.conv(x).mean((2, 3)) * torch.rand(()))
    model, state = Odd(), torch.get_rng_state()
    freeze(model, "output")
    assert (model.n, model.kept, model.seen.item(), hasattr(model, "last")) == (0, [], 0, False)
    assert torch.equal(state, torch.get_rng_state()) and [*trainable(model)] == ["fc.weight", "fc.bias"]


def test_tracing_changes_no_weight_and_nothing_within_containers_and_draws_from_no_generator():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.kept = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), dict(a=[[0]], b=deque([1]), c=([],))
            self.torch, self.numpy, self.python = torch.Generator(), np.random.default_rng(0), random.Random(0)

        def count(self, x): self.kept["a"][0].append(x)

        def forward(self, x):
            for p in self.parameters(): p.data.clamp_(-.01, .01)
            self.count(x)
            self.kept["b"].append(x)
            self.kept["c"][0].append(x)
            return self.fc(
                self.conv(x).mean((2, 3)) * torch.rand((), generator=self.torch)
                + self.numpy.random()
                + self.python.random()
            )
    model = Odd()
    model.count = model.count  # bound to the model itself
    before, drawn = (
        copy.deepcopy(model.state_dict()),
        (model.torch.get_state(), model.numpy.bit_generator.state, model.python.getstate()),
    )
    freeze(model, "output")
    assert model.kept == dict(a=[[0]], b=deque([1]), c=([],)) and all(
        torch.equal(t, before[n]) for n, t in model.state_dict().items()
    )
    assert torch.equal(drawn[0], model.torch.get_state()) and drawn[1:] == (
        model.numpy.bit_generator.state,
        model.python.getstate(),
    )
    assert [*trainable(model)] == ["fc.weight", "fc.bias"]


def test_tracing_does_not_count_in_a_models_meter():
    class Meter:
        def __init__(self, model): self.model, self.seen = model, []
        def update(self, x): self.seen.append(x)

    class Sentinel: pass
    missing = Sentinel()

    class Metered(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc, self.mask = nn.Conv2d(3, 4, 3), nn.Linear(4, 2), missing
            self.meter, self.mode = [Meter(self)], inspect.Parameter.POSITIONAL_ONLY

        def forward(self, x):
            self.meter[0].update(x)
            assert self.mask is missing and self.mode is inspect.Parameter.POSITIONAL_ONLY
            return self.meter[0].model.fc(self.conv(x).mean((2, 3)))
    model = freeze(Metered(), "output")
    assert [*trainable(model)] == ["fc.weight", "fc.bias"]
    assert model.meter[0].seen == [] and model.meter[0].model is model


def test_no_hidden_layer_becomes_the_output():
    for model in (net()[:3], net()[:1].append(nn.ReLU()), nn.Sequential(net()[0], nn.GroupNorm(2, 8))):
        with pytest.raises(ValueError, match="output layer of Sequential cannot be told"): freeze(model, "output")


def test_statistics_hold_still_where_asked():
    model, x = freeze(net(), "output", statistics="frozen"), torch.randn(4, 3, 8, 8)
    before = model[1].running_mean.clone()
    model.train()(x)
    assert torch.equal(model[1].running_mean, before)
    freeze(model, "output").train()(x)
    assert not torch.equal(model[1].running_mean, before)
    with pytest.raises(ValueError, match="nearest is 'frozen'"): freeze(model, "output", statistics="frozn")


def test_frozen_proves_it_and_puts_back():
    model = net()
    with frozen(model, "random2") as same:
        assert same is model and [*trainable(model)] == ["0.parametrizations.weight.original"]
    assert len(trainable(model)) == 6
    with pytest.raises(RuntimeError, match="'0.weight' was frozen by 'norm' and changed"):
        with frozen(model, "norm"): model[0].weight.data += 1
    assert len(trainable(model)) == 6


def test_another_number_of_classes_or_dtype_changes_nothing():
    model, other = (freeze(net(head=nn.Linear(8, n)), "norm+output") for n in (5, 6))
    before = copy.deepcopy(model.state_dict())
    for tensors in (
        trained_state(other),
        {n: t.double() for n, t in trained_state(model).items()},
        {n: t.numpy() for n, t in trained_state(model).items()},
        dict.fromkeys(trained_state(model)),
    ):
        with pytest.raises(ValueError, match="use the spec they were trained with"): load_trained_state(model, tensors)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_what_it_was_frozen_as_is_noted_and_forgotten():
    model = net()
    assert frozen_as(model) is None
    freeze(nn.DataParallel(model), "output", seed=3, output="module.5", statistics="frozen")
    asked = dict(policy="output", seed=3, output=["5"], statistics="frozen")
    assert frozen_as(model) == frozen_as(nn.DataParallel(model)) == frozen_as(copy.deepcopy(model)) == asked
    with frozen(model, "norm"): assert frozen_as(model)["policy"] == "norm"
    assert frozen_as(model) == asked
    before = model[1].running_mean.clone()   # whose statistics are held again
    model.train()(torch.randn(4, 3, 8, 8))
    assert torch.equal(model[1].running_mean, before)
    assert frozen_as(unfreeze(model)) is None


def test_frozen_without_a_policy_keeps_what_freeze_froze():
    model = freeze(net(), "norm")
    with frozen(model): model[0].weight.requires_grad_(True)
    assert [*trainable(model)] == ["1.weight", "1.bias"]
    with pytest.raises(RuntimeError, match="'0.weight' was frozen by 'freeze' and changed"):
        with frozen(model): model[0].weight.data += 1
    with pytest.raises(ValueError, match="frozen needs a policy, e.g. 'norm'"): frozen(net())


def in_groups(m): return [[*m[:1].parameters()], [*m[1:3].parameters()], [*m[3:].parameters()]]


def learner_of(model, tmp_path, fit=True, groups=in_groups, **how):
    """A Learner with groups of layers, as fastai's vision_learner makes them; where it has fitted, its optimizer and
    gradients are there."""
    from fastai.basics import DataLoaders, Learner
    from fastai.callback import fp16, progress, schedule   # noqa: F401
    g = torch.Generator().manual_seed(0)
    images = torch.utils.data.TensorDataset(torch.randn(32, 3, 8, 8, generator=g), torch.arange(32) % 5)
    loaders = DataLoaders(*(torch.utils.data.DataLoader(images, 8) for _ in range(2)))
    learn = Learner(loaders, model, nn.functional.cross_entropy, splitter=groups, path=tmp_path, **how)
    if fit:
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return learn


WORKFLOWS = dict(
    fine_tune=lambda learn: learn.fine_tune(2),
    unfreeze=lambda learn: (learn.unfreeze(), learn.fit(1)),
    freeze_to=lambda learn: (learn.freeze_to(1), learn.fit(1)),
    lr_find=lambda learn: (learn.lr_find(num_it=8, show_plot=False), learn.fit(1)),
    one_cycle=lambda learn: learn.fit_one_cycle(1, slice(1e-3, 1e-2)),
    fp16=lambda learn: (learn.to_fp16(), learn.unfreeze(), learn.fit(1), learn.to_fp32()),
    within=lambda learn: learn.fit(1, cbs=Thaw()),
    checkpoint=lambda learn: (
        learn.save("it"),
        learn.unfreeze(),
        learn.fit(1),
        learn.load("it"),
        learn.unfreeze(),
        learn.fit(1),
    ),
)


def Thaw():
    "A callback that asks for every gradient in the middle of a fit."
    from fastai.callback.core import Callback

    class Thaw(Callback):
        def before_batch(self): self.learn.model.requires_grad_(True)
    return Thaw()


@pytest.mark.filterwarnings("ignore")   # of mixed precision without a GPU
@pytest.mark.parametrize("policy", ["norm+output", "random2"])
@pytest.mark.parametrize("optimizer", ["fastai", "torch"])
def test_a_learner_stays_frozen_through_every_workflow(policy, optimizer, tmp_path):
    from functools import partial

    from fastai.optimizer import OptimWrapper

    how = (
        {}
        if optimizer == "fastai"
        else dict(opt_func=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1)))
    )
    learn = learner_of(net(), tmp_path, wd=.1, **how)
    for name, work in WORKFLOWS.items():
        with frozen(learn, policy) as same, learn.no_bar(), learn.no_logging():
            may, before, free_before = (
                trainable_mask(learn.model),
                effective_weights(learn.model),
                [*trainable(learn.model)],
            )
            work(learn)
            after = effective_weights(learn.model)
        assert same is learn and all(torch.equal(after[n] != b, may[n]) for n, b in before.items()), name
        assert free_before and len(trainable(learn.model)) == 6 and not hasattr(learn, "keep_frozen")
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert not any(torch.equal(t, after[n]) for n, t in effective_weights(learn.model).items())   # free again


@pytest.mark.parametrize("policy", ["output", None])
def test_frozen_lasts_where_it_is_called_without_with(policy, tmp_path):
    learn = learner_of(net(), tmp_path)
    if not policy: freeze(learn.model, "output")
    frozen(learn, policy)
    before = effective_weights(learn.model)
    with learn.no_bar(), learn.no_logging(): learn.fine_tune(1)
    assert {n for n, t in effective_weights(learn.model).items() if not torch.equal(t, before[n])} == {
        "5.weight",
        "5.bias",
    }


def test_a_checkpoint_of_another_base_is_noticed(tmp_path):
    learn = learner_of(net(), tmp_path)
    learn.save("other")
    with torch.no_grad(): learn.model[0].weight += 1
    with pytest.raises(RuntimeError, match="'0.weight' was frozen by 'norm' and changed"):
        with frozen(learn, "norm"): learn.load("other")
