"Freezing, proved entry by entry for every family and policy."
import pytest
import torch
from bnonly.models import create_model
from bnonly.policies import (
    POLICIES,
    counts,
    digests,
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
from torch.nn import functional as F

EVERY = [p for p in POLICIES if p not in ("none", "norm")] + ["scattered2", "random4", "bn+scattered3+output"]


def train(model, steps=4):
    "The hardest steps: momentum 0.9, learning rate 1, decay 0.5."
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1, momentum=.9, weight_decay=.5)
    for _ in range(steps):
        opt.zero_grad()
        F.cross_entropy(model(x), torch.arange(8)).backward()
        opt.step()


@pytest.mark.parametrize("policy", EVERY)
@pytest.mark.parametrize("arch", ["resnet14", "vgg11", "resnet18"])
def test_only_what_may_move_moves(arch, policy):
    model = freeze(create_model(arch), policy)
    before, may = effective_weights(model), trainable_mask(model)
    train(model)
    for name, after in effective_weights(model).items():
        assert torch.equal(after != before[name], may[name]), name


def test_none_leaves_nothing_to_train():
    assert counts(freeze(create_model("resnet14"), "none")).trainable["all"] == 0


@pytest.mark.parametrize(
    "model,policy",
    [
        (dict(arch="resnet8", norm="none"), "bn"),
        (dict(arch="mlp2-10", norm="none"), "gamma"),
        (dict(arch="vgg11"), "shortcut"),
    ],
)
def test_a_policy_that_trains_nothing_is_refused(model, policy):
    with pytest.raises(ValueError, match=f"policy '{policy}' trains nothing of .*the nearest is"):
        freeze(create_model(**model), policy)


def test_beta_rests_in_every_normalization():
    "LayerNorm's too; a normalization without gamma and beta has nothing that trains."
    net = lambda norm: nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(16, 2))
    nn.init.ones_((model := net(nn.LayerNorm(2)))[1].bias)
    assert (
        not freeze(model, "all-beta")[1].bias.requires_grad and not model[1].bias.any() and model[0].bias.requires_grad
    )
    assert list(trainable(freeze(net(nn.GroupNorm(2, 4)), "gamma"))) == ["1.weight"]
    with pytest.raises(ValueError, match="policy 'gamma' trains nothing of Sequential"):
        freeze(net(nn.BatchNorm2d(4, affine=False)), "gamma")


@pytest.mark.parametrize("policy", EVERY)
def test_what_moved_and_the_seed_are_the_whole_network(policy):
    model = freeze(create_model("resnet14", seed=5), policy, seed=5)
    train(model, 3)
    again = load_trained_state(freeze(create_model("resnet14", seed=5), policy, seed=5), trained_state(model))
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_another_policys_numbers_are_refused():
    with pytest.raises(ValueError, match="use the spec"):
        load_trained_state(
            freeze(create_model("resnet14"), "bn"), trained_state(freeze(create_model("resnet14"), "output"))
        )


def test_random_entries_follow_the_seed():
    masks = [trainable_mask(freeze(create_model("resnet14"), "random2", seed=s))["conv1.weight"] for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_at_most_every_entry_of_a_filter():
    "3x3 filters on one channel have nine entries, fewer than random16 asks for."
    assert trainable_mask(freeze(create_model("resnet14", in_channels=1), "random16"))["conv1.weight"].all()


@pytest.mark.parametrize("call", [
    lambda m: freeze(m, "bn"), lambda m: frozen(m, "bn"), frozen, unfreeze, frozen_as, trainable, counts, digests,
    effective_weights, trainable_mask, trained_state, lambda m: load_trained_state(m, {})])
def test_what_is_no_model_gets_a_sentence(call):
    with pytest.raises(ValueError, match="^the model is None, not a torch.nn.Module; create_model"): call(None)
    with pytest.raises(ValueError, match="^the model is the class Linear, .* the nearest is Linear"): call(nn.Linear)


@pytest.mark.parametrize("policy,near", [(None, "'bn'"), (5, "'bn'"), (["bn", "output"], r"'bn\+output'")])
def test_a_policy_that_is_no_string_gets_a_sentence(policy, near):
    model = create_model("resnet8")
    with pytest.raises(ValueError, match=rf"^policy .* is not a string of tokens .*, such as {near}\.$"):
        freeze(model, policy)
    assert all(p.requires_grad for p in model.parameters()) and frozen_as(model) is None


@pytest.mark.parametrize("state,what", [(None, "None"), ("moved.safetensors", "a str"), ([1], "a list")])
def test_what_is_no_trained_state_gets_a_sentence(state, what):
    model = freeze(create_model("resnet8"), "bn")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"^the trained state is {what}, not a dict of tensors; trained_state"):
        load_trained_state(model, state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
