"Verdicts on hand-made tables, where arithmetic says what they must be."
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from bnonly import claims as cl
from bnonly.accuracy import DEEP, sizes
from bnonly.experiment import Spec, preset

BY_ID = {c.id: c for c in cl.CLAIMS}


def runs(values, images="CIFAR-10", epochs=160, data="cifar10", **columns):
    "A table of runs from {(arch, policy): accuracies of its seeds}."
    rows = [dict(asdict(s := Spec(arch=a, policy=p, data=data, epochs=epochs, seed=n, **dict(zip(("bn_init",), rest)))), status="complete",
                 accuracy=v, top5=v, images=images, trainable=sizes(s.arch)["bn"], total=sizes(s.arch)["total"], folder=s.key, **columns)
            for (a, p, *rest), vs in values.items() for n, v in enumerate(vs)]
    return pd.DataFrame(rows)


def said(id, table):
    return cl.ledger(table, [BY_ID[id]]).verdict[0]


def test_there_are_enough_claims_and_all_can_be_told():
    table = cl.ledger(pd.DataFrame(columns=[*Spec.__dataclass_fields__, "status", "accuracy", "images", "trainable", "total"]))
    assert len(table) >= 60 and table.id.is_unique
    assert table[table.verdict == "not measured"].needs.str.contains(" on ").all()
    assert set(table.verdict) == {"not measured", "reproduced", "not reproduced"}
    for place in ("Abstract", "Section 1", "Section 4", "Section 5", *(f"Appendix {c}" for c in "CDEFGI")):
        assert table.place.str.startswith(place).any(), place


FEW = " on CIFAR-10, 160 epochs, 1 of 5 seeds"


@pytest.mark.parametrize("seeds,verdict", [((47, 48, 48, 48, 49), "reproduced"), ((50, 51, 51, 51, 52), "not reproduced"), ((48.5,), "holds" + FEW),
                                           ((50.1,), "undecided" + FEW), ((52.1,), "does not hold" + FEW), ((46.9,)*5, "not reproduced"), ((47.6,)*5, "reproduced")])
def test_a_level_by_the_rule(seeds, verdict):
    "Two standard errors, half a point of rounding, or two points with one seed, which says no only from four on; the paper says 48, for five."
    assert said("r14-bn-acc", runs({("resnet14", "bn"): seeds})) == verdict


@pytest.mark.parametrize("share,verdict", [((26, 40), "holds"), ((24, 40), "undecided"), ((22, 40), "does not hold")])
def test_a_bound_gets_no_help_from_the_margin(share, verdict):
    "More than 25 of 100; with one seed two points short of it say nothing."
    table = runs({("resnet14", "bn"): (48,), ("resnet32", "bn"): (57,)}).assign(silent=share)
    assert said("silent-quarter", table) == f"{verdict} on CIFAR-10, 160 epochs, 2 of 17 networks, 1 of 5 seeds"


def test_other_images_or_fewer_epochs_never_count_as_reproduced():
    values = {("resnet14", "bn"): (48, 48), ("resnet32", "bn"): (57, 57), ("resnet14", "random2"): (29, 29), ("resnet32", "random2"): (38, 38)}
    for scale in (dict(images="digits", data="digits"), dict(epochs=16), dict(images="CIFAR-10 (JPEG)")):
        found = cl.ledger(runs(values, **scale))
        measured = found[(found.verdict != "not measured") & ~found.id.isin([c.id for c in cl.CLAIMS if c.exact])]
        assert len(measured) and not measured.verdict.str.contains("reproduced").any()
    assert said("r14-bn-acc", runs(values, images="digits", data="digits")) == "not measured"
    assert said("random2-gap", runs(values)) == "holds on CIFAR-10, 160 epochs, 2 of 12 networks, 2 of 5 seeds"
    assert said("random2-gap", runs(values, epochs=16)) == "holds on CIFAR-10, 16 epochs, 2 of 12 networks"
    assert said("random2-gap", runs({k: (v[0] + 9*(k[1] == "bn"),)*2 for k, v in values.items()}, epochs=16)) == "does not hold on CIFAR-10, 16 epochs, 2 of 12 networks"
    assert said("random2-best", runs(values)) == "not measured"   # 38 of two networks says nothing about the best of twelve
    best = cl.ledger(runs({("resnet32", "random2"): (56, 56)}), [BY_ID["random2-best"]]).iloc[0]
    assert best.verdict == "holds on CIFAR-10, 160 epochs, 1 of 12 networks, 2 of 5 seeds"


@pytest.mark.parametrize("gap,verdict", [(1.3, "reproduced"), (.9, "undecided"), (-1.2, "undecided"), (-1.3, "not reproduced")])
def test_an_ordering_must_exceed_its_error(gap, verdict):
    "Each side has sd 1 and n 5, so two standard errors of the difference are the root of 1.6, 1.26."
    wobble = np.array([-1, 1, 0, -1, 1])
    table = runs({("resnet14", "bn+shortcut+output"): 60 + gap + wobble, ("resnet14", "bn"): 60 + wobble})
    assert said("shortcuts-add", table) == verdict


def test_every_network_must_agree():
    values = {(a, p): (v,)*5 for a in (*DEEP, *(f"wrn14-{w}" for w in (2, 4, 8, 16, 32))) for p, v in (("bn", 60), ("random2", 41))}
    assert said("random2-gap", runs(values)) == "reproduced"
    assert said("random2-gap", runs(values | {("wrn14-8", "random2"): (30,)*5})) == "not reproduced"


def test_every_image_set_wants_its_own_seeds(world):
    table, _ = world
    assert said("few-disabled", table).partition(" ")[0] in ("reproduced", "not", "undecided")
    fewer = table[(table.images != "ImageNet") | (table.seed < 2)]
    assert said("few-disabled", fewer).endswith("on CIFAR-10, 160 epochs and ImageNet, 90 epochs, 2 of 3 seeds")


def test_slopes_come_from_the_points():
    values = {(a, "bn"): (10 + 5.897*np.log2(sizes(a)["bn"]),)*5 for a in DEEP}
    values |= {(f"wrn14-{w}", "bn"): (values["resnet14", "bn"][0] + 4.994*np.log2(w),)*5 for w in (2, 4, 8, 16, 32)}
    table = runs(values)
    assert [said(i, table) for i in ("slope-depth", "slope-width", "steeper")] == ["reproduced"]*3
    assert said("slope-depth", table.assign(accuracy=table.accuracy*1.2)) == "not reproduced"
    assert said("slope-depth", table[table.arch != "resnet866"]) == "not measured"   # another line
    assert said("slope-depth", pd.concat([table, runs({("resnet20", "bn"): (70.,)*5})])) == "not measured"


def test_channels_become_shares():
    table = runs({("resnet14", "bn"): (48,)})
    channels = pd.DataFrame(dict(gamma=[.005, -.005, .03, .5], zero=[1, .995, .5, np.nan])).assign(**asdict(Spec(data="cifar10", epochs=160)))
    clamped = pd.DataFrame(dict(threshold=[0, .01, .05], change=[0, -.5, -7])).assign(**asdict(Spec(data="cifar10", epochs=160)))
    row = cl.per_run(table, channels, clamped).iloc[0]
    assert row[["small01", "small05", "negative", "positive", "clamp01", "clamp05"]].tolist() == [50, 75, 25, 75, -.5, -7]
    assert row[["silent", "fixed", "sometimes"]].tolist() == pytest.approx([200/3, 200/3, 100/3])


def test_always_on_is_as_fixed_as_always_off():
    channels = pd.DataFrame(dict(gamma=1., zero=[0, .05, .35, .85, 1])).assign(**asdict(Spec(data="cifar10", epochs=160)))
    row = cl.per_run(runs({("resnet14", "bn"): (48,)}), channels).iloc[0]
    assert row[["silent", "fixed", "sometimes"]].tolist() == pytest.approx([20, 40, 40])


def test_a_single_seed_of_a_mean_has_a_margin_of_its_own():
    table = runs({("resnet110", "bn"): (69,)})
    assert said("r110-bn-mean", table.assign(mean=.215)) == "holds" + FEW
    assert said("r110-bn-mean", table.assign(mean=.23)) == "undecided" + FEW
    assert said("r110-bn-mean", table.assign(mean=.25)) == "does not hold" + FEW


def test_failed_runs_are_counted_where_the_claim_is_about_them():
    table = runs({("resnet434", "all", "positive"): (93, 10)*3, ("resnet866", "all", "positive"): (90, 10)*3})
    assert said("positive-fails", cl.per_run(table, pd.DataFrame())) == "reproduced"
    table["status"], table["accuracy"] = ["complete", "diverged"]*6, [93, np.nan]*6
    assert said("positive-fails", cl.per_run(table, pd.DataFrame())) == "reproduced"
    assert said("positive-fails", cl.per_run(table.assign(status="complete", accuracy=93), pd.DataFrame())) == "not reproduced"


@pytest.mark.parametrize("id,verdict", [("r110-bn", "reproduced"), ("wrn32-added-ratio", "not reproduced"), ("r110-added-share", "not reproduced")])
def test_counts_need_no_run(id, verdict):
    assert said(id, pd.DataFrame()) == verdict


def test_the_small_networks_are_held_against_the_curve():
    "Halfway between two budgets, in doublings, the curve is halfway between their accuracies."
    b = {a: sizes(a)["bn"] for a in ("resnet56", "resnet110")}
    small = sizes("wrn32-0.125")["total"]
    at = 60 + 10*(np.log2(small) - np.log2(b["resnet56"]))/(np.log2(b["resnet110"]) - np.log2(b["resnet56"]))
    table = runs({("resnet56", "bn"): (60, 60), ("resnet110", "bn"): (70, 70), ("wrn32-0.125", "all"): (at + 7,)*2})
    item, = BY_ID["small-networks"].measure(table)
    assert item.value == pytest.approx(7)
    spread = runs({("resnet56", "bn"): (59, 61), ("resnet110", "bn"): (70, 70, 70), ("wrn32-0.125", "all"): (at + 6, at + 8)})
    share = 1 - (at - 60)/10   # of ResNet-56, whose mean has a standard error of 1, as the small network's has
    assert BY_ID["small-networks"].measure(spread)[0].se == pytest.approx((1 + share**2)**.5)


def test_the_tally_counts_every_claim():
    table = pd.DataFrame(dict(verdict=["reproduced", "holds on digits, 5 epochs", "holds on digits, 40 epochs", "not measured"]))
    assert cl.tally(table) == "1 reproduced, 2 hold on digits, 1 not measured"


def test_a_wide_spread_neither_agrees_nor_contradicts():
    "The mean is 3 points off, with a standard error of 3.2: beyond the two points that a spread can give, within two errors; and 7 off, beyond them."
    assert said("r14-bn-acc", runs({("resnet14", "bn"): (41, 51, 51, 51, 61)})) == "undecided"
    assert said("r14-bn-acc", runs({("resnet14", "bn"): (45, 55, 55, 55, 65)})) == "not reproduced"


WIDER = [f"wrn14-{2**i}" for i in range(1, 6)]
IMAGENETS = ["resnet18", "resnet34", "resnet50", "resnet101", "resnet200"]
VGGS = ["vgg11", "vgg13", "vgg16", "vgg19"]
COLUMNS = ["accuracy", "top5", "small01", "small05", "mean", "sd", "positive", "negative", "silent", "fixed", "sometimes", "clamp01", "clamp05", "failed"]


@pytest.fixture(scope="module")
def world():
    "Random numbers for every run that the paper made, as many seeds as there (five, on ImageNet three), as a table and as a function that averages it."
    rng, rows = np.random.RandomState(0), []
    policies = ["bn", "all", "all-affine", "random2", "random4", "random8", "random16", "scattered2", "output", "bn+output", "output+random2",
                "bn+shortcut+output", "shortcut+output"]
    points = [(a, p, "uniform", "he_normal") for a in [*DEEP, *WIDER, *IMAGENETS, *VGGS] for p in policies]
    points += [(a, p, "positive", "he_normal") for a in [*DEEP, *WIDER, *IMAGENETS] for p in ("bn", "all")]
    points += [("resnet110", "bn", b, "he_normal") for b in ("ones", "symmetric")] + [("resnet110", "bn", "uniform", i) for i in ("he_uniform", "binary", "orthogonal")]
    points += [(a, "all", "uniform", "he_normal") for a in cl.THIN]
    for a, p, b, i in points:
        recipe = dict(data="imagenet", epochs=90, batch_size=1024, lr=.4, schedule="imagenet") if a in IMAGENETS else dict(data="cifar10", epochs=160)
        rows += [asdict(Spec(arch=a, policy=p, bn_init=b, init=i, seed=n, **recipe)) | dict(zip(COLUMNS, rng.rand(len(COLUMNS))*50)) | dict(
            status="complete", images="ImageNet" if a in IMAGENETS else "CIFAR-10", trainable=sizes(a)["bn"], total=sizes(a)["total"]) for n in range(3 if a in IMAGENETS else 5)]
    table = pd.DataFrame(rows).assign(folder=lambda t: t.index.astype(str))

    def mean(arch, policy="bn", column="accuracy", bn_init="uniform", init="he_normal"):
        found = [r[column] for r in rows if (r["arch"], r["policy"], r["bn_init"], r["init"]) == (arch, policy, bn_init, init)]
        assert len(found) == (3 if arch in IMAGENETS else 5)
        return sum(found)/len(found)
    return table, mean


def _each(archs, f):
    return {f(a) for a in archs}


CIFARS, RESNETS, DEEPS = [*DEEP, *WIDER], [*DEEP, *WIDER, *IMAGENETS], ["resnet110", "resnet218", "resnet434", "resnet866"]
MEANT = {   # what each claim measures, said a second time
    "r866-bn-acc": lambda m: {m("resnet866")},
    "r200-bn-top5": lambda m: {m("resnet200", "bn", "top5")},
    "bn-over-random2": lambda m: _each(CIFARS, lambda a: m(a) - m(a, "random2")),
    "bn-over-random2-imagenet": lambda m: _each(IMAGENETS, lambda a: m(a, "bn", "top5") - m(a, "random2", "top5")),
    "affine-cifar": lambda m: _each(CIFARS, lambda a: m(a, "all") - m(a, "all-affine")),
    "affine-imagenet": lambda m: _each(IMAGENETS, lambda a: m(a, "all") - m(a, "all-affine")),
    "random2-best": lambda m: {max(m(a, "random2") for a in CIFARS)},
    "random2-best-imagenet": lambda m: {max(m(a, "random2", "top5") for a in IMAGENETS)},
    "r110-all": lambda m: {m("resnet110", "all")},
    "deeper": lambda m: {m(b) - m(a) for a, b in zip(DEEP, DEEP[1:])},
    "wider": lambda m: {m(b) - m(a) for a, b in zip(["resnet14", *WIDER], WIDER)},
    "deeper-imagenet": lambda m: {m(b, "bn", "top5") - m(a, "bn", "top5") for a, b in zip(IMAGENETS, IMAGENETS[1:])},
    "r50-bn-top5": lambda m: {m("resnet50", "bn", "top5")},
    "output-adds-top5": lambda m: _each(IMAGENETS, lambda a: m(a, "bn+output", "top5") - m(a, "bn", "top5")),
    "output-adds-top1": lambda m: _each(IMAGENETS, lambda a: m(a, "bn+output") - m(a)),
    "output-best-top1": lambda m: {max(m(a, "bn+output") for a in IMAGENETS)},
    "r200-output-top1": lambda m: {m("resnet200", "output")},
    "output-little": lambda m: _each(CIFARS, lambda a: m(a, "bn+output") - m(a)),
    "depth-over-width": lambda m: {m("resnet434") - m("wrn14-32")},
    "random2-gap": lambda m: _each(CIFARS, lambda a: m(a) - m(a, "random2")),
    "scattered": lambda m: {m("resnet110", "scattered2") - m("resnet110", "random2")},
    "positive-imagenet": lambda m: _each(IMAGENETS, lambda a: m(a, "bn", "top5", "positive") - m(a, "bn", "top5")),
    "random4-less": lambda m: _each(CIFARS, lambda a: m(a) - m(a, "random4")),
    "random16-enough": lambda m: _each(CIFARS, lambda a: m(a, "random16") - m(a)),
    "random8-shallow": lambda m: _each(DEEP[:3], lambda a: m(a, "random8") - m(a)),
    "random8-deep-less": lambda m: _each(DEEPS, lambda a: m(a) - m(a, "random8")),
    "random16-deep": lambda m: _each(DEEPS, lambda a: m(a, "random16") - m(a)),
    "random2-output-cifar": lambda m: _each(CIFARS, lambda a: m(a, "output+random2") - m(a)),
    "random2-output-below-imagenet": lambda m: _each(IMAGENETS, lambda a: m(a, "bn+output", "top5") - m(a, "output+random2", "top5")),
    "disabled-third": lambda m: _each(RESNETS, lambda a: m(a, "bn", "small01")),
    "few-disabled": lambda m: _each(RESNETS, lambda a: m(a, "bn", "small01") - m(a, "all", "small01")),
    "smaller-wide": lambda m: {m(b, "all", "small05") - m(a, "all", "small05") for a, b in zip(["resnet14", *WIDER], WIDER)},
    "r110-all-sd": lambda m: {m("resnet110", "all", "sd")},
    "r110-bn-negative": lambda m: {m("resnet110", "bn", "negative")},
    "r101-bn-mean": lambda m: {m("resnet101", "bn", "mean")},
    "wider-gammas": lambda m: _each(RESNETS, lambda a: m(a, "bn", "sd") - m(a, "all", "sd")),
    "small-all": lambda m: _each([*DEEP[:5], *WIDER[:4]], lambda a: m(a, "all", "small01")),
    "small-all-cases": lambda m: _each(RESNETS, lambda a: m(a, "all", "small01")),
    "r866-small05": lambda m: {m("resnet866", "all", "small05")},
    "clamp01-bn": lambda m: _each(RESNETS, lambda a: m(a, "bn", "clamp01")),
    "clamp05-all": lambda m: _each([*DEEP[:5], *WIDER[:4]], lambda a: m(a, "all", "clamp05")),
    "silent-all-imagenet": lambda m: _each(IMAGENETS, lambda a: m(a, "all", "silent")),
    "always-on-or-off": lambda m: _each(RESNETS, lambda a: m(a, "bn", "fixed") - m(a, "all", "fixed")),
    "on-sometimes": lambda m: _each(RESNETS, lambda a: m(a, "all", "sometimes") - m(a, "bn", "sometimes")),
    "vgg-affine": lambda m: _each(VGGS, lambda a: m(a, "all") - m(a, "all-affine")),
    "vgg16-output-adds": lambda m: _each(VGGS[2:], lambda a: m(a, "bn+output") - m(a)),
    "vgg-random2": lambda m: _each(VGGS, lambda a: m(a) - m(a, "random2")),
    "vgg19-small": lambda m: {m("vgg19", "bn", "small01")},
    "init-binary": lambda m: {m("resnet110", init="binary") - m("resnet110")},
    "bn-init-ones": lambda m: {m("resnet110", bn_init="ones") - m("resnet110")},
    "positive-all-sizes": lambda m: _each(CIFARS, lambda a: m(a, bn_init="positive") - m(a)),
    "wrn32-positive-all": lambda m: {m("wrn14-32", "all", bn_init="positive") - m("wrn14-32", "all")},
    "r200-positive-all": lambda m: {m("resnet200", "all", "top5", "positive") - m("resnet200", "all", "top5")},
    "positive-fails": lambda m: {m(a, "all", "failed", "positive") for a in DEEP[-2:]},
    "r866-shortcuts-add": lambda m: {m("resnet866", "bn+shortcut+output") - m("resnet866")},
    "r101-shortcuts": lambda m: {m("resnet101", "bn+shortcut+output", "top5")},
    "shortcuts-alone": lambda m: {m("resnet14", "shortcut+output") - m("resnet14")},
    "slope-depth": lambda m: {np.polyfit(np.log2([sizes(a)["bn"] for a in DEEP]), [m(a) for a in DEEP], 1)[0]},
    "steeper": lambda m: {100*(np.polyfit(np.log2([sizes(a)["bn"] for a in DEEP]), [m(a) for a in DEEP], 1)[0]
                               / np.polyfit(np.log2([sizes(a)["bn"] for a in ["resnet14", *WIDER]]), [m(a) for a in ["resnet14", *WIDER]], 1)[0] - 1)},
    "linear-width": lambda m: {abs(np.corrcoef(np.log2([sizes(a)["bn"] for a in ["resnet14", *WIDER]]), [m(a) for a in ["resnet14", *WIDER]])[0, 1])},
}


@pytest.mark.parametrize("id", MEANT)
def test_a_claim_measures_what_it_says(id, world):
    table, mean = world
    items = BY_ID[id].measure(table)
    assert sorted(i.value for i in items) == pytest.approx(sorted(MEANT[id](mean))) and len(items) == len(MEANT[id](mean))
    assert all(w in (("CIFAR-10", 160, ""), ("ImageNet", 90, "")) for i in items for p in i.used for w in p.where)
    assert cl.verdict(BY_ID[id], items) in ("reproduced", "not reproduced", "undecided")


def test_runs_of_another_recipe_do_not_count(world):
    "They change no measured number while the paper's are there, and without those the verdict names what differs."
    table, _ = world
    other = table.assign(lr=.2, accuracy=99., seed=table.seed + 5)
    for id in ("r14-bn-acc", "random2-gap", "slope-depth", "small-networks", "small-strata"):
        assert cl.ledger(pd.concat([table, other]), [BY_ID[id]]).equals(cl.ledger(table, [BY_ID[id]]))
    assert said("r14-bn-acc", other) == "does not hold on CIFAR-10, 160 epochs, lr=0.2"
    assert said("r14-bn-acc", table.assign(images=lambda t: t.images + " (JPEG)")).startswith("does not hold on CIFAR-10 (JPEG), 160 epochs")


def test_every_claim_is_measured_where_every_run_is_there(world):
    found = cl.ledger(world[0])
    assert set(found.verdict) == {"reproduced", "not reproduced", "undecided"} and (found.measured != "").all()


def test_all_planned_runs_give_every_claim_a_final_verdict(monkeypatch):
    "The presets `paper` and `imagenet`, each in its own folder; either's ledger reads both."
    rng = np.random.RandomState(0)
    def planned(study):
        specs = preset(study)
        return pd.DataFrame([asdict(s) for s in specs]).assign(**{c: rng.rand(len(specs))*50 for c in COLUMNS}, status="complete", images={"paper": "CIFAR-10", "imagenet": "ImageNet"}[study],
                                                               trainable=[sizes(s.arch)["bn"] for s in specs], total=[sizes(s.arch)["total"] for s in specs], folder="")
    for module, f in ((cl, "results"), (cl.features, "channels"), (cl.features, "clamped")):
        monkeypatch.setattr(module, f, planned if f == "results" else lambda study: pd.DataFrame())
    for study in ("paper", "imagenet"):
        found = cl.ledger(cl.gather(study))
        assert set(found.verdict) == {"reproduced", "not reproduced", "undecided"}, found[found.verdict.str.contains(" on |not measured")].id.tolist()
