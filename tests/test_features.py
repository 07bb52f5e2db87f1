"What is taken out of a trained network, held against networks whose answer is known by arithmetic."
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from bnonly import analysis
from bnonly.analysis import AFFINE_FIELDS, IMAGE_FIELDS, analyse, channels, clamped, saved_features, settling
from bnonly.data import load_data, loaders
from bnonly.experiment import Spec, load_record, run_dir, write
from bnonly.features import clamp, clamping, correct, restore
from bnonly.norms import ZeroCounter, affine_table, norms
from bnonly.models import BatchNormAct, create_model
from bnonly.train import fit, learner

IMAGES = torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return create_model("resnet8", in_channels=1).eval()


@pytest.fixture(scope="module")
def study():
    "A study of two short runs."
    here = tempfile.mkdtemp()
    for policy in ("bn", "all"):
        fit(Spec(arch="resnet8", policy=policy, epochs=1), here)
    return here


def rates(model, batches):
    zeros = ZeroCounter(model)
    correct(model, [(x, torch.zeros(len(x), dtype=torch.int64)) for x in batches])
    return zeros.rates()


def put(model, gammas):
    "Write gammas into a network, channel after channel."
    gammas = torch.as_tensor(gammas, dtype=torch.float32)
    with torch.no_grad():
        for m, own in zip(norms(model), gammas.split([m.num_features for m in norms(model)])):
            m.weight.copy_(own)


def test_roles_say_what_follows_a_normalization(model):
    "ResNet-8 has a stem, three blocks of two, and two shortcuts that change the shape."
    assert [m for m, role in norms(model).items() if role == 2] == [model.layers[i][0].downsample[1] for i in (1, 2)]
    assert [m for m, role in norms(model).items() if role == 1] == [model.layers[i][0].bn2 for i in range(3)]
    role = affine_table(model)["role"]
    assert np.bincount(role).tolist() == [16 + 16 + 32 + 64, 16 + 32 + 64, 32 + 64]


def test_channels_of_every_normalization_are_there():
    for arch, expected in dict(resnet14=560, vgg11=2752, resnet50=26_560).items():  # half of Table 1's and C.1's counts
        assert len(affine_table(create_model(arch, 10))["gamma"]) == expected


def test_a_relu_that_is_silent_and_one_that_is_always_on(model):
    "Gamma is 0, so the sign of beta alone decides, whatever the image."
    with torch.no_grad():
        model.bn1.weight.zero_()
        model.bn1.bias.copy_(torch.tensor([-9., 9.] * 8))
    assert rates(model, [IMAGES])[:16].tolist() == [1., 0.] * 8


def test_a_shortcut_keeps_a_clamped_channel_alive(model):
    "At the end of a block what is counted comes after the addition (footnote 8)."
    first = model.layers[0][0]
    with torch.no_grad():
        model.bn1.weight.zero_(), model.bn1.bias.fill_(1.)       # what the shortcut brings: 1 everywhere
        first.bn2.weight.zero_(), first.bn2.bias.fill_(-.5)      # silent, were it not for the shortcut
    own = affine_table(model)
    assert (rates(model, [IMAGES])[own["layer"] == 2] == 0).all()


def test_a_rate_is_a_share_of_all_images_and_positions():
    layer = BatchNormAct(2).eval()
    zeros = ZeroCounter(layer)
    x = torch.ones(3, 2, 2, 2)
    x[0, 0, 0, 0] = x[2, 0, 1, 1] = -1      # 2 of 12 values of the first channel
    x[:, 1, 0] = 0                          # 6 of 12 of the second: zero counts, not only what is below
    layer(x)
    np.testing.assert_allclose(zeros.rates(), [2/12, 6/12])


def test_without_a_relu_there_is_no_rate(model):
    found = rates(model, [IMAGES])
    assert (np.isnan(found) == (affine_table(model)["role"] == 2)).all()


def test_streaming_equals_one_big_batch(model):
    whole = rates(model, [IMAGES])
    for size in (1, 5):
        np.testing.assert_array_equal(rates(model, IMAGES.split(size)), whole)
    assert np.nanmin(whole) < .5 < np.nanmax(whole)


def test_counting_holds_no_more_for_more_images(model):
    "One integer a channel, however many images went by; and the hooks are gone afterwards."
    zeros = ZeroCounter(model)
    for _ in range(3):
        model(IMAGES)
    assert all(zeros.zeros[m].shape == (m.num_features,) for m in zeros.zeros if m.relu)
    zeros.rates()
    seen = dict(zeros.seen)
    model(IMAGES)
    assert zeros.seen == seen and not any(m._forward_hooks for m in norms(model))


def test_clamping_changes_no_logit_where_the_small_gammas_are_zero_already(model):
    n = len(affine_table(model)["gamma"])
    put(model, torch.where(torch.arange(n) % 4 == 0, 0., .5))
    with torch.no_grad():
        before = model(IMAGES)
        assert torch.equal(clamp(model, .1) and model(IMAGES), before)


def test_clamping_changes_logits_where_small_gammas_matter(model):
    n = len(affine_table(model)["gamma"])
    put(model, torch.where(torch.arange(n) % 4 == 0, .05, .5))
    with torch.no_grad():
        before = model(IMAGES)
        assert torch.equal(clamp(model, .04) and model(IMAGES), before)          # nothing is below 0.04
        assert not torch.equal(clamp(model, .06) and model(IMAGES), before)
    assert (affine_table(model)["gamma"] == 0).mean() == .25


def test_clamping_looks_at_the_size_and_not_at_the_sign(model):
    put(model, torch.where(torch.arange(len(affine_table(model)["gamma"])) % 2 == 0, -.5, .05))
    assert set(affine_table(clamp(model, .1))["gamma"].tolist()) == {-.5, 0.}


def test_clamping_counts_by_arithmetic(model):
    "A known share of gammas below each threshold, and passes over the images only where something is clamped."
    n = len(affine_table(model)["gamma"])                       # 336
    gammas = np.full(n, 1.)
    gammas[:84], gammas[84:126], gammas[126:168] = 0, -.02, .07
    put(model, gammas)
    passes = []

    class Counted(list):
        def __iter__(self): passes.append(1); return super().__iter__()

    batches = Counted([(IMAGES, model(IMAGES).argmax(1))])
    curve = clamping(model, batches, len(IMAGES))
    found = dict(zip(curve["threshold"].tolist(), curve["clamped"].tolist()))
    assert [found[float(np.float32(t))] for t in (0, .01, .05, .1)] == [0, 84, 126, 168]
    assert curve["correct"][0] == len(IMAGES) and (curve["correct"] <= len(IMAGES)).all()
    assert len(passes) == len({c for c in found.values() if c > 84})  # nothing changes where only zeros are set to zero


def test_what_is_kept_agrees_with_the_record(study):
    "The unclamped network is the one whose accuracy was recorded; a row of the table for each channel."
    for policy in ("bn", "all"):
        spec = Spec(arch="resnet8", policy=policy, epochs=1)
        found, record = saved_features(analyse(spec, study).parent), load_record(run_dir(spec, study))
        assert found.keys() == {*AFFINE_FIELDS, *IMAGE_FIELDS} and found["tested"].tolist() == [360]
        assert abs(100*found["correct"][0]/360 - record["final"]["accuracy"]) < .01
    table, curve = channels(study), clamped(study)
    assert len(table) == 2*336 and table.zero.notna().sum() == 2*(336 - 96)
    own = table[table.policy == "bn"]
    shares = curve[curve.policy == "bn"].set_index("threshold").share
    for t in (.01, .05, .1):
        assert shares[t] == pytest.approx(100*(own.gamma.abs() < t).mean())
    assert (curve[curve.threshold == 0].change == 0).all()


def test_a_restored_network_gives_the_same_bits(study):
    spec, data = Spec(arch="resnet8", epochs=1), load_data("digits")
    learn = learner(spec, data)
    learn.fit(1)
    x, _ = next(iter(loaders(data, 128)[1]))
    with torch.no_grad():
        assert torch.equal(restore(spec, study)(x), learn.model.eval()(x))


def test_old_features_are_taken_anew(study):
    spec = Spec(arch="resnet8", epochs=1)
    path = analyse(spec, study)
    whole, saved = path.read_bytes(), saved_features(path.parent)
    old = {n: a for n, a in saved.items() if n in ("layer", "gamma", "beta")}
    for seal in (load_record(path.parent)["seal"], "another record's"):
        write(path, safetensors.numpy.save(old, dict(seal=seal)))
        analyse(spec, study)
        assert safetensors.numpy.load_file(path).keys() == {*AFFINE_FIELDS, *IMAGE_FIELDS}
        np.testing.assert_array_equal(saved_features(path.parent)["zero"], safetensors.numpy.load(whole)["zero"])
    made = path.stat().st_mtime_ns
    assert analyse(spec, study).stat().st_mtime_ns == made


def test_without_images_gamma_and_beta_are_kept_at_least(study, monkeypatch):
    spec = Spec(arch="resnet8", epochs=1)
    path = analyse(spec, study)
    path.unlink()
    with monkeypatch.context() as m:
        m.setattr(analysis, "load_once", lambda name: (None, "the folder is empty"))
        with pytest.warns(UserWarning, match="no zero rates and no clamping, because the folder is empty") as said:
            analyse(spec, study)
        assert len(said) == 1 and saved_features(path.parent).keys() == {*AFFINE_FIELDS}
        made = path.stat().st_mtime_ns
        with pytest.warns(UserWarning):
            assert analyse(spec, study).stat().st_mtime_ns == made
        assert channels(study, policy=["bn"]).zero.isna().all() and len(clamped(study, policy=["bn"])) == 0
    assert saved_features(analyse(spec, study).parent).keys() == {*AFFINE_FIELDS, *IMAGE_FIELDS}


def test_when_a_channel_falls_silent_and_how_large_its_gamma_was_then(tmp_path):
    spec = Spec(arch="resnet8", epochs=1)
    fit(spec, here := f"{tmp_path}/looks")
    analyse(spec, here)
    file = run_dir(spec, here)/"trajectory.safetensors"
    kept = {n: np.repeat(a[:1], 5, 0) for n, a in safetensors.numpy.load_file(file).items()}
    kept["epoch"][:] = [0, 8, 16, 24, 32]
    kept["gamma"][:], kept["zero"][:, ~np.isnan(kept["zero"][0])] = -.5, .5
    kept["gamma"][:, :3] = np.array([[1, .5, .1, .005, .001], [.2, .1, .05, .02, .02], [1, .005, .5, .005, .5]]).T
    kept["zero"][:, :3] = np.array([[0, .995, .5, 1, 1], [1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]).T
    safetensors.numpy.save_file(kept, file)
    t = settling(here)
    assert t.silent.tolist()[:4] == pytest.approx([.75, 0, np.nan, np.nan], nan_ok=True)
    assert t.small.tolist()[:4] == pytest.approx([.75, np.nan, np.nan, np.nan], nan_ok=True)
    assert t.gamma_when_silent.tolist()[:4] == pytest.approx([.005, .2, np.nan, np.nan], nan_ok=True, rel=1e-3)
    assert t.gamma_at_start.tolist()[:4] == pytest.approx([1, .2, 1, .5], rel=1e-3)


def test_other_images_than_those_of_the_training_do_not_count(study, monkeypatch):
    from dataclasses import replace
    spec = Spec(arch="resnet8", epochs=1)
    analyse(spec, study).unlink()
    monkeypatch.setattr(analysis, "load_once", lambda name: (replace(load_data("digits"), digest="0"*16), ""))
    with pytest.warns(UserWarning, match="not those it was trained on"):
        assert saved_features(analyse(spec, study).parent).keys() == {*AFFINE_FIELDS}


def test_a_run_that_was_not_finished_is_refused_in_one_sentence(study):
    with pytest.raises(FileNotFoundError, match="holds no finished run"):
        analyse(Spec(arch="resnet8", seed=99), study)


def test_an_empty_study_gives_empty_tables():
    empty = str(Path(tempfile.mkdtemp()))
    assert len(channels(empty)) == len(clamped(empty)) == 0
    assert {"gamma", "zero", "policy", "folder"} <= {*channels(empty)} and {"change", "share"} <= {*clamped(empty)}


def table(**columns):
    "Channels as the figures read them: one run a combination of policy, seed and weight decay."
    from dataclasses import asdict

    rows = [
        asdict(Spec(arch="resnet20", policy=p, seed=s, weight_decay=w))
        | dict(images="toy", study="toy", folder=f"x/{p}{s}{w}")
        for p, w in (("bn", 1e-4), ("bn", 0.0), ("all", 1e-4))
        for s in (0, 1)
    ]
    import pandas as pd
    return pd.concat([pd.DataFrame(columns).assign(**r) for r in rows], ignore_index=True)


def test_shares_of_small_gammas_and_silent_relus():
    "Of five channels two are below 0.01; four have a ReLU, and one of those is silent."
    from bnonly.affine import activity, silent, small_gammas
    from bnonly.recipes import single_recipe
    toy = table(layer=0, role=0, gamma=[0., -.009, .02, .06, -.5], beta=0., zero=[1., .99, .5, 0., np.nan])
    shares = small_gammas(toy)
    assert len(shares) == 6*3 and set(shares[shares.threshold == "0.01"].share) == {40.}
    assert set(shares[shares.threshold == "0.05"].share) == {60.0} and set(shares[shares.threshold == "0.1"].share) == {
        80.0
    }
    assert set(silent(toy).share) == {25.}
    assert activity(toy).xs(("resnet20", "bn"), level=("arch", "policy")).iloc[0][
        ["silent", "on", "between", "n"]
    ].tolist() == [25.0, 25.0, 25.0, 2.0]
    assert set(single_recipe(toy).weight_decay) == {1e-4}


def test_always_on_is_not_often_on():
    from bnonly.affine import activity
    toy = table(layer=0, role=0, gamma=1., beta=0., zero=[0., .009, .02, .05, .1, .7, .71, .99, .991, 1.])
    assert activity(toy).xs(("resnet20", "bn"), level=("arch", "policy")).iloc[0][
        ["silent", "on", "between"]
    ].tolist() == [20.0, 20.0, 20.0]


def test_the_network_shown_alone_is_the_papers_or_the_deepest():
    from bnonly.affine import case
    import pandas as pd

    toy = pd.DataFrame(
        [dict(arch=a, policy=p) for a in ("resnet8", "resnet110", "resnet218") for p in ("all", "bn")]
        + [dict(arch="resnet866", policy="bn")]
    )
    assert [case(toy, "ResNet", a) for a in ("resnet110", "resnet434")] == ["resnet110", "resnet218"]


def test_decays_are_held_apart_and_against_decay_alone():
    from bnonly.affine import decay_table, decayed, several_decays, steps
    toy = table(layer=0, role=0, gamma=[0., -.009, .02, .5], beta=0., zero=[1., .5, .5, .5])
    found = decay_table(toy, clamped("no such study"))
    assert found.small.tolist() == [50.]*3 and found.silent.tolist() == [25.]*3 and found.n.tolist() == [2]*3
    assert found.loc[("bn", 0.)].alone == pytest.approx(1.)        # nothing shrinks: U[0, 1] has 1% below 0.01
    assert found.loc[("bn", 1e-4)].alone == pytest.approx(1/decayed(steps(Spec())))
    assert len(several_decays(toy[toy.weight_decay > 0])) == 0


def test_decay_alone_by_its_optimizer():
    "What is left of a number without gradient, by formula and by PyTorch's SGD at the demo's schedule."
    from bnonly.affine import decayed, steps
    from bnonly.train import step
    p = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
    p.grad = torch.zeros_like(p)
    opt, n = torch.optim.SGD([p], lr=.1, momentum=.9, weight_decay=.012), steps(Spec())
    for i in range(n):
        opt.param_groups[0]["lr"] = .1*step(i/n)
        opt.step()
    assert n == 480 and p.item() == pytest.approx(decayed(n, .012), rel=1e-9)


def test_figures_without_runs_say_so_in_words():
    import matplotlib.pyplot as plt
    from bnonly import affine
    none, cut = channels("no such study"), clamped("no such study")
    figures = [
        affine.fig04(none),
        affine.fig05(none),
        affine.fig06(cut),
        affine.fig_decay(none, cut),
        affine.fig07(none),
        *(affine.distributions(none, n) for n in affine.DISTRIBUTIONS),
        *(affine.frequencies(none, n) for n in affine.FREQUENCIES),
    ]
    assert len(figures) == 5 + 8 + 3
    for fig in figures:
        assert len(fig.axes) == 1 and len(fig.axes[0].texts[0].get_text()) > 20
        plt.close(fig)


def test_a_figure_names_the_runs_it_lacks():
    from bnonly.affine import fig05, fig_decay, lacks

    plan = [Spec(arch=a, policy=p) for a in ("resnet20", "wrn14-2") for p in ("bn", "all", "random2")] + [
        Spec(arch="resnet20", weight_decay=0.0)
    ]
    none = channels("no such study")
    assert lacks(plan, none, "ResNet") == ["planned and not measured yet: all of resnet20; bn of resnet20"]
    assert "wrn14-2" in lacks(plan, none, "WRN")[0] and lacks(plan, none, "VGG") == ["no network of the family: VGG"]
    assert "all of resnet20, wrn14-2" in fig05(none, plan).axes[0].texts[0].get_text()
    assert "weight_decay=0.0" in fig_decay(none, clamped("no such study"), plan).axes[0].texts[0].get_text().replace(
        "\n", ""
    )


@pytest.mark.parametrize(
    "changes,reach",
    [((-0.4, 0.2), (-0.48, 0.24)), ((0.0, 0.0), (-0.1, 0.1)), ((-1.1, 0.1), (-8, 0.5)), ((-30.0, 2.0), (-8, 2.4))],
)
def test_small_changes_of_accuracy_can_be_read(changes, reach):
    "Within a point the axis is that of the bars, else the paper's."
    import matplotlib.pyplot as plt
    import pandas as pd
    from bnonly.affine import fig06
    from bnonly.features import THRESHOLDS

    rows = [
        dict(Spec(policy=p, data="cifar10").__dict__, threshold=t, change=c, images="x", folder=p)
        for p, c in zip(("bn", "all"), changes)
        for t in THRESHOLDS
    ]
    fig = fig06(pd.DataFrame(rows))
    assert fig.axes[0].get_ylim() == pytest.approx(reach)
    plt.close(fig)
