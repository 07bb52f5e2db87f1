"Verdicts on hand-made tables, where arithmetic says what they must be."
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
from bnonly import claims as cl
from bnonly.accuracy import DEEP, sizes
from bnonly.experiment import Spec

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


@pytest.mark.parametrize("seeds,verdict", [((47, 48, 49), "reproduced"), ((50, 51, 52), "not reproduced"), ((48.5,), "reproduced"),
                                           ((50.1,), "not reproduced"), ((46.9, 46.9, 46.9), "not reproduced"), ((47.6, 47.6, 47.6), "reproduced")])
def test_a_level_by_the_rule(seeds, verdict):
    "Two standard errors, half a point of rounding, or two points with one seed; the paper says 48."
    assert said("r14-bn-acc", runs({("resnet14", "bn"): seeds})) == verdict


def test_other_images_or_fewer_epochs_never_count_as_reproduced():
    values = {("resnet14", "bn"): (48, 48), ("resnet32", "bn"): (57, 57), ("resnet14", "random2"): (29, 29), ("resnet32", "random2"): (38, 38)}
    for scale in (dict(images="digits", data="digits"), dict(epochs=16), dict(images="CIFAR-10 (JPEG)")):
        found = cl.ledger(runs(values, **scale))
        measured = found[(found.verdict != "not measured") & ~found.id.isin([c.id for c in cl.CLAIMS if c.exact])]
        assert len(measured) and not measured.verdict.str.contains("reproduced").any()
    assert said("r14-bn-acc", runs(values, images="digits", data="digits")) == "not measured"
    assert said("random2-gap", runs(values)) == "holds on CIFAR-10, 160 epochs, 2 of 12 networks"
    assert said("random2-gap", runs(values, epochs=16)) == "holds on CIFAR-10, 16 epochs"
    assert said("random2-gap", runs({k: (v[0] + 9*(k[1] == "bn"),)*2 for k, v in values.items()}, epochs=16)) == "does not hold on CIFAR-10, 16 epochs"


@pytest.mark.parametrize("gap,verdict", [(1.5, "reproduced"), (.9, "not reproduced"), (-3, "not reproduced")])
def test_an_ordering_must_exceed_its_error(gap, verdict):
    "Each side has sd 1 and n 4, so two standard errors of the difference are the root of 2."
    wobble = np.array([-1, 1, -1, 1]) * .75**.5
    table = runs({("resnet14", "bn+shortcut+output"): 60 + gap + wobble, ("resnet14", "bn"): 60 + wobble})
    assert said("shortcuts-add", table) == verdict


def test_every_network_must_agree():
    values = {(a, p): (v, v) for a in (*DEEP, *(f"wrn14-{w}" for w in (2, 4, 8, 16, 32))) for p, v in (("bn", 60), ("random2", 41))}
    assert said("random2-gap", runs(values)) == "reproduced"
    assert said("random2-gap", runs(values | {("wrn14-8", "random2"): (30, 30)})) == "not reproduced"


def test_slopes_come_from_the_points():
    values = {(a, "bn"): (10 + 5.897*np.log2(sizes(a)["bn"]),)*2 for a in DEEP}
    values |= {(f"wrn14-{w}", "bn"): (values["resnet14", "bn"][0] + 4.994*np.log2(w),)*2 for w in (2, 4, 8, 16, 32)}
    table = runs(values)
    assert [said(i, table) for i in ("slope-depth", "slope-width", "steeper")] == ["reproduced"]*3
    assert said("slope-depth", table.assign(accuracy=table.accuracy*1.2)) == "not reproduced"


def test_channels_become_shares():
    table = runs({("resnet14", "bn"): (48,)})
    channels = pd.DataFrame(dict(gamma=[.005, -.005, .03, .5], zero=[1, .995, .5, np.nan])).assign(**asdict(Spec(data="cifar10", epochs=160)))
    clamped = pd.DataFrame(dict(threshold=[0, .01, .05], change=[0, -.5, -7])).assign(**asdict(Spec(data="cifar10", epochs=160)))
    row = cl.per_run(table, channels, clamped).iloc[0]
    assert row[["small01", "small05", "negative", "positive", "clamp01", "clamp05"]].tolist() == [50, 75, 25, 75, -.5, -7]
    assert row[["silent", "fixed", "sometimes"]].tolist() == pytest.approx([200/3, 200/3, 100/3])


def test_a_single_seed_of_a_mean_has_a_margin_of_its_own():
    table = runs({("resnet110", "bn"): (69,)})
    assert said("r110-bn-mean", table.assign(mean=.215)) == "reproduced"
    assert said("r110-bn-mean", table.assign(mean=.23)) == "not reproduced"


def test_failed_runs_are_counted_where_the_claim_is_about_them():
    table = runs({("resnet434", "all", "positive"): (93, 10), ("resnet866", "all", "positive"): (90, 10)})
    assert said("positive-fails", cl.per_run(table, pd.DataFrame())) == "reproduced"


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


def test_the_tally_counts_every_claim():
    table = pd.DataFrame(dict(verdict=["reproduced", "holds on digits, 5 epochs", "holds on digits, 40 epochs", "not measured"]))
    assert cl.tally(table) == "1 reproduced, 2 hold on digits, 1 not measured"


def test_a_wide_spread_does_not_agree_with_anything():
    "Means 3 points off, with a standard error of 10: beyond the two points that a spread can give."
    assert said("r14-bn-acc", runs({("resnet14", "bn"): (41, 61)})) == "not reproduced"
