"The whole step as one graph, walked on a CPU: it changes no number of a run."
from dataclasses import replace

import pandas as pd
import pytest
import torch
from bnonly.experiment import Spec, run_dir
from bnonly.graph import Graph
from bnonly.penalties import Embedding
from bnonly.train import Schedule, fit, fit_many
from fastai.callback.core import Callback

TINY = Spec(arch="resnet8", epochs=2)


def same(spec, *studies):
    "Whether the metrics and what moved are equal in two studies."
    one, other = (run_dir(spec, s) for s in studies)
    drop = lambda f: pd.read_csv(f / "metrics.csv").drop(columns="seconds")
    return drop(one).equals(drop(other)) and (one / "moved.safetensors").read_bytes() == (other / "moved.safetensors").read_bytes()


@pytest.mark.parametrize("how", [dict(policy="bn"), dict(policy="all"), dict(policy="random2"), dict(policy="all", norm="fixup")], ids=str)
def test_a_graph_changes_no_number(how):
    "1,437 images: eleven batches of 128 that are replayed, and a smaller one that is not. Fixup's scalars have a rate of their own."
    spec, graph, generator = replace(TINY, **how), Graph(Schedule, Embedding), torch.get_rng_state()
    fit(spec, "plain")
    fit(spec, "graph", cbs=[graph])
    assert graph.on and graph.replay is not None and same(spec, "plain", "graph")
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_run_goes_on_within_a_graph():
    class Stop(Callback):
        order = 95
        def after_epoch(self): raise KeyboardInterrupt
    fit(TINY, "plain")
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, "graph", cbs=[Graph(Schedule, Embedding), Stop()])
    fit(TINY, "graph", cbs=[Graph(Schedule, Embedding)])
    assert same(TINY, "plain", "graph")


def test_a_callback_that_looks_into_a_step_is_called():
    class Look(Callback):
        seen = 0
        def after_pred(self): Look.seen += self.training
    graph = Graph(Schedule, Embedding)
    fit(replace(TINY, epochs=1), cbs=[graph, Look()])
    assert not graph.on and Look.seen == 12


def test_many_at_once_are_each_as_alone():
    specs = [TINY, replace(TINY, policy="all"), replace(TINY, seed=1)]
    many = fit_many(specs, "many", at_once=3)
    for spec, record in zip(specs, many):
        alone = fit(spec, "alone")
        assert record["final"] == alone["final"] and same(spec, "many", "alone")
