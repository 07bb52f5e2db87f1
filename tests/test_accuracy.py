"The figures of accuracy, on hand-made tables whose answer is known by arithmetic."
from dataclasses import asdict
from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from bnonly import accuracy as acc
from bnonly import accuracy_figures as figs
from bnonly import recipes
from bnonly.experiment import Spec, runs_dir
from bnonly.figures import draw_table, drawn, save_table
from bnonly.models import build
from bnonly.policies import counts
from bnonly.shapes import sizes
from scipy.stats import linregress


def runs(*rows, **common):
    "A table as `results` gives it: (arch, policy, seed, accuracy) each."
    made = [
        dict(
            asdict(s := Spec(arch=a, policy=p, seed=n, **common)),
            status="complete",
            accuracy=v,
            top5=99.0,
            images=s.data,
            trainable=sizes(s.arch)["bn"],
            total=sizes(s.arch)["total"],
            folder=f"runs/x/{s.key}",
        )
        for a, p, n, v in rows
    ]
    return pd.DataFrame(made)


@pytest.mark.parametrize(
    "arch", ["resnet8", "resnet110", "wrn14-4", "wrn20-0.125", "vgg11", "vgg19", "resnet34", "resnet50", "resnet200"]
)
@pytest.mark.parametrize("classes,channels", [(10, 3), (1000, 1)])
def test_counts_are_those_of_the_networks(arch, classes, channels):
    listed = sizes(arch, classes, channels)
    listed["all"] = listed.pop("total")
    assert listed | dict(norm=0) == counts(build(arch, classes, channels)).total.to_dict()


def test_every_small_network_is_near_its_budget():
    for arch in acc.DEEP:
        budget = sizes(arch)["bn"]
        for name, total in acc.small_resnets(budget).items():
            assert counts(build(name)).total["all"] == total and abs(total - budget) <= .15 * budget


def test_the_slope_is_the_one_that_made_the_points():
    bn = {a: sizes(a)["bn"] for a in acc.DEEP}
    table = runs(*((a, "bn", s, 20 + 6 * np.log2(n) + d) for a, n in bn.items() for s, d in ((0, -1), (1, 1))))
    fit = acc.growth(table)["ResNet"]
    assert (fit.slope, fit.rvalue) == pytest.approx((6, 1))
    noisy = table.assign(accuracy=table.accuracy + np.random.RandomState(0).randn(len(table)))
    own = acc.budgets(noisy)
    own = own[own.panel == "ResNet"]
    assert acc.growth(noisy)["ResNet"] == pytest.approx(linregress(np.log2(own.bn), own["mean"]))


def test_the_papers_plotted_r2_is_r():
    "Its p for depth, 6.14E-05, follows from seven networks only if 0.984 is the correlation itself."
    x = np.arange(7.)
    y = x - x.mean()
    e = np.array([1, -1, 1, -1, 1, -1, 1.])
    e -= e.mean() + y * (e @ y) / (y @ y)
    wave = e * np.sqrt((y @ y) * (1 / .984**2 - 1) / (e @ e))
    assert acc.doubling(2**x, y + wave).pvalue == pytest.approx(6.14e-5, rel=.05)


def test_a_point_is_the_mean_over_complete_runs():
    table = runs(
        ("resnet14", "bn", 0, 47), ("resnet14", "bn", 1, 49), ("resnet32", "bn", 0, 60), ("resnet14", "bn", 2, 10)
    )
    table.loc[3, "status"] = "diverged"
    got = figs.points(table, figs.LAYOUTS["fig02"]).set_index("arch")
    assert got.loc["resnet14", ["mean", "n"]].tolist() == [48, 2] and got.loc["resnet14", "sd"] == pytest.approx(2**.5)


def test_other_recipes_are_not_among_the_points():
    table = pd.concat(
        [runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60)), runs(("resnet14", "bn", 0, 5), weight_decay=0)]
    )
    assert figs.points(table, figs.LAYOUTS["fig02"]).set_index("arch").loc["resnet14", "mean"] == 50


def test_a_figure_says_what_it_lacks():
    "Whole networks by name, part of the seeds with their number, and a sentence for what the study does not plan."
    plan = [Spec(arch=a, policy=p, seed=n) for a in ("resnet14", "resnet32") for p in ("bn", "all") for n in (0, 1)]
    table = runs(
        ("resnet14", "bn", 0, 50),
        ("resnet14", "bn", 1, 50),
        ("resnet32", "bn", 0, 60),
        ("resnet14", "all", 0, 90),
        ("resnet14", "all", 1, 90),
    )
    layout = figs.LAYOUTS["fig12"]
    said = figs.missing_runs(plan, table, layout.lines, [f for f, _ in layout.panels])
    assert said == [
        "planned and not measured yet: all of resnet32; bn of resnet32 (1 of 2 seeds)",
        "not in this study: bn+shortcut+output of resnet14, resnet32; shortcut+output of resnet14, resnet32",
        "no network of the family: ImageNet ResNet",
    ]  # ResNet-14 is the first of the wide ones
    assert all(o in figs.accuracy_figure("fig12", table, plan).get_label() for o in said)
    done = runs(*((s.arch, s.policy, s.seed, 50) for s in plan))
    assert figs.missing_runs(plan, done, (figs.ALL, figs.BN), ["ResNet"]) == []
    assert figs.missing_runs(plan, done.assign(status="diverged"), (figs.BN,), ["ResNet"]) == [
        "planned and not measured yet: bn of resnet14, resnet32"
    ]


def test_no_panel_is_lost_and_none_is_drawn_twice():
    shown = lambda *archs: list(dict.fromkeys(recipes.panels(pd.DataFrame(dict(arch=archs))).panel))
    assert (
        shown("resnet14") == ["ResNet"]
        and shown("resnet14", "resnet32") == ["ResNet"]
        and shown("resnet14", "wrn14-2") == ["WRN"]
    )
    assert shown("resnet14", "resnet32", "wrn14-2", "resnet18") == ["ResNet", "WRN", "ImageNet ResNet"]
    assert shown("wrn20-0.125") == []      # the small networks belong to Figure 10 alone


@pytest.mark.parametrize(
    "field,other",
    [
        ("lr", 0.2),
        ("momentum", 0.5),
        ("batch_size", 64),
        ("epochs", 16),
        ("schedule", "imagenet"),
        ("weight_decay", 0.0),
        ("init", "binary"),
        ("data", "digits"),
    ],
)
def test_no_field_of_the_recipe_is_mixed(field, other):
    """Runs of the paper's recipe are drawn alone, however many there are of another; without them, those of the most
    common one."""
    usual = dict(data="cifar10", epochs=160)
    one = runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60), **usual)
    two = runs(*(("resnet14", "bn", s, 10) for s in range(3)), **usual | {field: other})
    table = pd.concat([two, one])
    means = lambda t: figs.points(t, figs.LAYOUTS["fig02"])["mean"].tolist()
    assert means(table) == [50, 60] == acc.budgets(table)["mean"].tolist()
    value = other if isinstance(other, str) else f"{other:g}"
    assert means(two) == [10] and f"{field} {value}" in recipes.other_recipes(table)
    assert recipes.other_recipes(one) == ""
    odd = pd.concat([two, runs(("resnet32", "bn", 0, 60), **usual | {field: other, "momentum": .7})])
    assert means(odd) == [10]


def test_each_family_has_its_own_recipe():
    table = pd.concat(
        [
            runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60)),
            runs(("resnet18", "bn", 0, 20), ("resnet34", "bn", 0, 30), epochs=5),
        ]
    )
    assert sorted(figs.points(table, figs.LAYOUTS["fig02"])["mean"]) == [20, 30, 50, 60]


def test_an_ordering_holds_by_the_rule_of_the_claims():
    """By Welch's t-test at 5%, as scipy has it, and never of one seed; a comparison of fewer than three seeds is left
    out where others have them."""
    from bnonly.claims import CLAIMS, judge
    from bnonly.measures import weighted
    from bnonly.selections import Point
    from scipy.stats import ttest_ind_from_stats
    words = {"holds": "holds", "undecided": "not told apart", "does not hold": "reversed"}
    claim = next(c for c in CLAIMS if c.id == "bn-over-random2")
    for one, two, sd, gap in product(
        (1, 2, 3, 5), (1, 2, 5), (0.1, 1.0, 4.0), (-9, -5, -2.5, -1.5, -0.3, 0, 0.3, 1.5, 2.5, 5, 9)
    ):
        above, below = [
            dict(mean=60.0 - g, sd=d if n > 1 else np.nan, n=n) for g, d, n in ((0, 1.0, one), (gap, sd, two))
        ]
        a, b = [Point("", r["mean"], r["sd"], r["n"], set()) for r in (above, below)]
        found = acc.compare_means(above, below)
        assert found == words[judge(weighted("", (1, a), (-1, b)), claim)]
        p = ttest_ind_from_stats(60., 1., one, 60. - gap, sd, two, equal_var=False).pvalue if min(one, two) > 1 else 1.
        assert found == ("not told apart" if p > .05 else "holds" if gap > 0 else "reversed")
    rows = [("resnet14", p, s, v + s) for p, v in (("bn", 60), ("random2", 40)) for s in range(3)] + [
        ("resnet32", p, 0, 50) for p in ("bn", "random2")
    ]
    found = acc.ordering(runs(*rows))
    assert found[["the paper finds", "first", "second", "here"]].values.tolist() == [
        ["resnet14 bn > resnet14 random2", "61.0 ± 1.0 (3)", "41.0 ± 1.0 (3)", "holds"]
    ]
    more = acc.ordering(
        runs(
            *[("resnet14", "bn", s, 60 + s) for s in range(4)], *[("resnet14", "random2", s, 40 + s) for s in range(2)]
        )
    )
    assert more["here"].tolist() == ["holds"]   # two seeds, and nothing has three of both


@pytest.mark.parametrize("data,top1,top5", [("digits", 10, 50), ("imagenet", .1, .5)])
def test_chance_is_a_guess_among_the_classes(data, top1, top5):
    fig = figs.accuracy_figure("fig02", runs(("resnet18", "bn", 0, 50), ("resnet34", "bn", 0, 60), data=data))
    assert [[l.get_ydata()[0] for l in ax.lines if l.get_label() == "Chance"] for ax in fig.axes] == [
        [top1],
        [pytest.approx(top5)],
    ]


def test_a_single_seed_has_no_bar():
    "Its spread is unknown, which is not a spread of zero."
    table = runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60), ("resnet32", "bn", 1, 62))
    ax = figs.accuracy_figure("fig02", table).axes[0]
    (one, two), = [c.get_segments() for c in ax.collections]
    assert np.isnan(one).any() or len(one) == 0
    assert two[:, 1].tolist() == pytest.approx([61 - 2**.5, 61 + 2**.5])


def test_tables_are_exact_in_csv_and_rounded_in_the_picture():
    save_table(acc.tableC1(), "tableC1", "x")
    folder = runs_dir() / "x/figures"
    assert pd.read_csv(folder / "tableC1.csv").Total.tolist() == [9_231_114, 9_416_010, 14_728_266, 20_040_522]
    assert (folder / "tableC1.png").exists() and (folder / "tableC1.svg").exists()
    printed = [t.get_text() for t in draw_table(acc.table1()).axes[0].texts]
    assert {"ResNet for ImageNet", "14.0M", "64.7K", "0.64%", "10.83%", "650"} <= set(printed)


@pytest.mark.parametrize("name", [*figs.LAYOUTS, "fig03", "fig10"])
def test_without_any_run_a_figure_says_so(name):
    from bnonly.experiment import results
    draw = {"fig03": figs.fig03, "fig10": figs.fig10}.get(name, lambda t, p: figs.accuracy_figure(name, t, p))
    words = draw(results("none"), [Spec(arch="resnet14")]).axes[0].texts[0].get_text()
    assert "resnet14" in words.replace("\n", " ") or "no network of the family" in words.replace("\n", " ")


def test_the_papers_numbers_are_drawn_on_its_own_data_only():
    "All that its text gives for the panel's lines, also where this study has no run."
    for data, stars, ticks in (
        ("cifar10", [48, 69.5, 82, 93.3], ["14", "32", "110", "866"]),
        ("digits", [], ["14", "32"]),
    ):
        table = runs(("resnet14", "bn", 0, 50), ("resnet32", "bn", 0, 60), data=data)
        ax = figs.accuracy_figure("fig02", table).axes[0]
        assert sorted(y for l in ax.lines if l.get_marker() == "*" for y in l.get_ydata()) == stars
        assert [t.get_text() for t in ax.get_xticklabels()] == ticks


def test_a_line_that_only_the_paper_has_is_in_the_legend_and_in_the_data():
    "Where another panel has measured it, the legend shows that; what is measured comes first."
    table = runs(
        ("resnet14", "bn", 0, 50),
        ("resnet32", "bn", 0, 60),
        ("wrn14-2", "bn", 0, 55),
        ("resnet32", "bn+shortcut+output", 0, 70),
        data="cifar10",
    )
    fig = figs.accuracy_figure("fig12", table)
    handles = dict(zip([t.get_text() for t in fig.legends[0].get_texts()], fig.legends[0].legend_handles))
    assert list(handles) == [
        "BatchNorm",
        "BatchNorm + Shortcuts + Output",
        "All Params Trainable",
        "Shortcuts + Output",
        "Chance",
    ]
    starred = [l for l, h in handles.items() if isinstance(h, plt.Line2D) and h.get_marker() == "*"]
    assert starred == ["All Params Trainable", "Shortcuts + Output"]
    rows = drawn(fig)
    assert [set(rows[rows.label == l].y) for l in starred] == [{93.3}, {49.}]
    plt.close("all")
