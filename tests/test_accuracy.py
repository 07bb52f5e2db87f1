"The figures of accuracy, on hand-made tables whose answer is known by arithmetic."
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from bnonly import accuracy as acc
from bnonly.experiment import Spec
from bnonly.models import build, role_sizes
from scipy.stats import linregress


def runs(*rows, **common):
    "A table as `results` gives it: (arch, policy, seed, accuracy) each."
    made = [dict(asdict(s := Spec(arch=a, policy=p, seed=n, **common)), status="complete", accuracy=v, top5=99., images=s.data,
                 trainable=acc.sizes(s.arch)["bn"], total=acc.sizes(s.arch)["total"], folder=f"runs/x/{s.key}") for a, p, n, v in rows]
    return pd.DataFrame(made)


@pytest.mark.parametrize("arch", ["resnet8", "resnet110", "wrn14-4", "wrn20-0.125", "vgg11", "vgg19", "resnet34", "resnet50", "resnet200"])
@pytest.mark.parametrize("classes,channels", [(10, 3), (1000, 1)])
def test_counts_are_those_of_the_networks(arch, classes, channels):
    counts = acc.sizes(arch, classes, channels)
    assert counts.pop("total") == sum(counts.values())
    assert counts == role_sizes(build(arch, classes, channels))


def test_every_small_network_is_near_its_budget():
    for arch in acc.DEEP:
        budget = acc.sizes(arch)["bn"]
        for name, total in acc.small_resnets(budget).items():
            assert sum(role_sizes(build(name)).values()) == total and abs(total - budget) <= .15 * budget


def test_the_slope_is_the_one_that_made_the_points():
    bn = {a: acc.sizes(a)["bn"] for a in acc.DEEP}
    table = runs(*((a, "bn", s, 20 + 6 * np.log2(n) + d) for a, n in bn.items() for s, d in ((0, -1), (1, 1))))
    fit = acc.growth(table)["ResNet"]
    assert fit.slope == pytest.approx(6) and fit.r2 == pytest.approx(1) and fit.n == 7
    noisy = table.assign(accuracy=table.accuracy + np.random.RandomState(0).randn(len(table)))
    own = acc.budgets(noisy)
    own = own[own.panel == "ResNet"]
    theirs, ours = linregress(np.log2(own.bn), own["mean"]), acc.growth(noisy)["ResNet"]
    assert (ours.slope, ours.r2, ours.p) == pytest.approx((theirs.slope, theirs.rvalue**2, theirs.pvalue))


def test_the_papers_plotted_r2_is_r():
    "Its p for depth, 6.14E-05, follows from seven networks only if 0.984 is the correlation itself."
    x = np.arange(7.)
    y = x - x.mean()
    e = np.array([1, -1, 1, -1, 1, -1, 1.])
    e -= e.mean() + y * (e @ y) / (y @ y)
    wave = e * np.sqrt((y @ y) * (1 / .984**2 - 1) / (e @ e))
    assert acc.doubling(2**x, y + wave).p == pytest.approx(6.14e-5, rel=.05)


def test_a_point_is_the_mean_over_complete_runs():
    table = runs(("resnet14", "bn", 0, 47), ("resnet14", "bn", 1, 49), ("resnet32", "bn", 0, 60), ("resnet14", "bn", 2, 10))
    table.loc[3, "status"] = "diverged"
    got = acc.points(table, acc.LAYOUTS["fig02"]).set_index("arch")
    assert got.loc["resnet14", ["mean", "n"]].tolist() == [48, 2] and got.loc["resnet14", "sd"] == pytest.approx(2**.5)


def test_other_recipes_are_not_among_the_points():
    table = pd.concat([runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60)), runs(("resnet14", "bn", 0, 5), weight_decay=0)])
    assert acc.points(table, acc.LAYOUTS["fig02"]).set_index("arch").loc["resnet14", "mean"] == 50


def test_a_figure_says_what_it_lacks():
    plan = [Spec(arch=a, policy=p) for a in ("resnet14", "resnet32") for p in ("bn", "all")]
    table = runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60), ("resnet14", "all", 0, 90))
    told = " / ".join(acc.gaps(plan, table, acc.LAYOUTS["fig12"]))
    assert "1 planned run not measured yet: all: resnet32" in told
    assert "shortcut+output: resnet14, resnet32" in told and "no network of the family: ImageNet ResNet" in told
    assert "1 planned run not measured yet: all: resnet32" in acc.accuracy_figure("fig12", table, plan).get_supxlabel().replace("\n", " ")


@pytest.mark.parametrize("name", [*acc.LAYOUTS, "fig03", "fig10"])
def test_without_any_run_a_figure_says_so(name):
    from bnonly.experiment import results
    draw = {"fig03": acc.fig03, "fig10": acc.fig10}.get(name, lambda t, p: acc.accuracy_figure(name, t, p))
    words = draw(results("none"), [Spec(arch="resnet14")]).axes[0].texts[0].get_text()
    assert "resnet14" in words.replace("\n", " ") or "no network of the family" in words.replace("\n", " ")


def test_the_papers_numbers_are_drawn_on_its_own_data_only():
    for data, stars in (("cifar10", 1), ("digits", 0)):
        table = runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60), data=data)
        fig = acc.accuracy_figure("fig02", table)
        assert sum(l.get_marker() == "*" for ax in fig.axes[:1] for l in ax.lines) == stars
