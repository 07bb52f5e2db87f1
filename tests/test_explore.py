"The explorer answers from the records, and does so in a browser."
import functools
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import safetensors.numpy
from bnonly import explore
from bnonly.explore import Explorer, numbers

ROOT = Path(__file__).parents[1]
KEY = "resnet20,bn,digits,weight_decay=0.012,seed={}"


def expected(threshold, seed=0):
    "Share below a threshold, and the accuracies measured with as many gammas at 0 or with the next fewer and more, straight from the file."
    found = safetensors.numpy.load_file(ROOT / "runs/decay" / KEY.format(seed) / "features.safetensors")
    share = 100 * (np.abs(found["gamma"]) < np.float32(threshold)).mean()
    tried = dict(zip(found["clamped"].tolist(), (100 * found["correct"] / found["tested"][0]).tolist()))
    count = int((np.abs(found["gamma"]) < np.float32(threshold)).sum())
    around = [count] if count in tried else [max(n for n in tried if n < count), *sorted(n for n in tried if n > count)[:1]]
    return f"{share:.1f}%", " and ".join(f"{tried[n]:.1f}%" for n in around)


@pytest.fixture
def explorer(monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(ROOT / "runs"))
    for f in (explore.choices, explore.load):
        f.cache_clear()
    yield Explorer()
    for f in (explore.choices, explore.load):
        f.cache_clear()


PICTURES = "distributions", "clamping", "silence", "learning"


def test_a_change_draws_what_it_concerns_once_and_reads_no_features(explorer, monkeypatch):
    """Another threshold draws two pictures, other curves one, another run all four.

    No network is evaluated: `bnonly.explore` imports no torch (tests/test_repository.py)."""
    calls = []
    for name in (*PICTURES, "kept", "records"):
        f = getattr(explore, name)
        counted = functools.wraps(f)(lambda *args, f=f: (calls.append(f.__name__), f(*args))[1])
        monkeypatch.setattr(explore, name, counted)
    own, choices = explore.choices("decay"), explorer.choices
    changes = [(choices["study"], "decay", PICTURES), (explorer.threshold, .2, PICTURES[:2]),
               (choices["policy"], "bn", PICTURES), (choices["rest"], own[own.policy == "bn"].rest.iloc[1], PICTURES),
               (explorer.others, tuple(own.folder[:3]), PICTURES[3:]), (choices["study"], "short", PICTURES), (choices["arch"], "resnet32", PICTURES)]
    for widget, value, drawn in changes:
        assert widget.value != value
        calls.clear()
        widget.value = value
        assert widget.value == value and sorted(calls) == sorted(drawn), (widget.description, calls)


def test_numbers_are_those_of_the_records(explorer):
    explorer.choices["study"].value, explorer.choices["policy"].value = "decay", "bn"
    explorer.choices["rest"].value = "weight_decay=0.012,seed=1"
    for t in (0, .005, .01, .05, .1, .3, 1.):
        explorer.threshold.value = t
        share, accuracy = expected(t, seed=1)
        assert f"'share'>{share}<" in explorer.told.value and f"'accuracy'>{accuracy}<" in explorer.told.value, t


def test_accuracies_are_those_of_the_clamped_network(explorer):
    "Restored from its record, clamped and tested again; beyond what was tried it says so."
    from bnonly.data import load_data, loaders
    from bnonly.experiment import Spec
    from bnonly.features import clamp, correct, restore
    spec = Spec(arch="resnet20", data="digits", weight_decay=.012)
    found, data = explore.load(str(ROOT / "runs/decay" / spec.key)), load_data("digits")
    for t in (0, .01, .1, float(found["threshold"][-1]), .9):
        model = restore(spec, "decay")
        clamp(model, t)
        right = 100 * correct(model, loaders(data, 128, device="cpu")[1]) / len(data.test)
        (n, told), *more = explore.numbers(found, t)["measured"]
        if n == explore.numbers(found, t)["below"]:
            assert told == pytest.approx(right, abs=1.01*100/len(data.test))   # one image: processors round differently
        elif not more:
            assert "and not beyond" in explore.sentences(explore.numbers(found, t), 50)
    assert explore.numbers(found, .01)["measured"][1:] == [] and t == .9 and not more


def test_a_run_without_images_says_so():
    told = numbers(dict(gamma=np.array([.1, -.3, .0])), .2)
    assert told == dict(below=2, channels=3) and "not measured" in explore.sentences(told, 50)


def test_runs_that_cannot_be_shown_are_not_offered(explorer, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "runs/decay", tmp_path / "decay")
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path))
    broken = tmp_path / "decay" / KEY.format(0) / "features.safetensors"
    broken.write_bytes(broken.read_bytes()[:-9])
    for f in (explore.choices, explore.load):
        f.cache_clear()
    with pytest.warns(UserWarning, match="not as it was written"):
        mine = explore.choices("decay")
    assert len(mine) == 14 and str(broken.parent) not in set(mine.folder)
    with pytest.warns(UserWarning):
        explore.choices.cache_clear(), explore.load.cache_clear()
        assert Explorer().choices["study"].options == ("decay",)


@contextmanager
def serving(address, server):
    "Wait for a server, and end it at last."
    for _ in range(300):
        try:
            urlopen(address, timeout=1)
        except OSError as e:
            if getattr(e, "code", None):   # it answers, if only that there is nothing here
                break
            time.sleep(.2)
        else:
            break
    try:
        yield
    finally:
        server.terminate()
        server.wait(10)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_port_that_cannot_be_used_is_refused():
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    for port in (-1, 0, 99999):
        with pytest.raises(ValueError, match=f"port {port} does not exist"):
            explore.serve(port)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(ValueError, match=f"port {s.getsockname()[1]} is not free; the next that is free is [0-9]+"):
            explore.serve(s.getsockname()[1])


def test_the_explorer_fails_as_its_server_does(monkeypatch):
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    monkeypatch.setattr(explore.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        explore.serve(free_port())


def voila(page, folder):
    "The explorer served as a page."
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    at = f"http://127.0.0.1:{(port := free_port())}"
    with serving(f"{at}/voila/static/", explore.serve(port, wait=False)):
        page.goto(at, timeout=120_000)
        yield


def lab(page, folder):
    "A copy of the notebook in JupyterLab, all cells run."
    shutil.copy(ROOT / "nbs/14_explore.ipynb", folder)
    at = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ServerApp.ip=127.0.0.1", "--allow-root",
               f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--LabApp.news_url=None"]
    with serving(f"{at}/api", subprocess.Popen(command, stderr=subprocess.DEVNULL)):
        page.set_viewport_size(dict(width=1400, height=4000))   # cells out of sight are not drawn
        page.goto(f"{at}/doc/tree/14_explore.ipynb", timeout=120_000)
        page.get_by_text("| Idle").wait_for(timeout=120_000)   # the kernel has started
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_function("/[0-9]/.test([...document.querySelectorAll('.jp-InputPrompt')].at(-1).textContent)", timeout=120_000)   # the last cell has run
        yield


@pytest.mark.parametrize("place", [voila, lab])
def test_in_a_browser_the_slider_changes_the_picture_and_the_numbers(page, place, tmp_path, monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(ROOT / "runs"))
    monkeypatch.chdir(ROOT)
    with contextmanager(place)(page, tmp_path):
        page.wait_for_selector(".noUi-handle", timeout=120_000)
        page.wait_for_selector("img.widget-image", timeout=60_000)
        walk(page)
    assert not page.left and not page.errors


def walk(page):
    "Choose a run, move the slider with the keyboard, and compare what is shown with the record."
    lists, say = page.locator(".widget-dropdown select"), lambda what: page.locator(f"b.{what}").inner_text()
    lists.nth(3).select_option("weight_decay=0.012,seed=0")
    page.wait_for_function(f"document.querySelector('b.share').textContent === '{expected(.1)[0]}'", timeout=30_000)
    for step in range(1, 4):
        t = round(.1 + .005 * step, 3)
        before = page.locator("img.widget-image").evaluate_all("all => all.map(i => i.src)")
        page.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("old => document.querySelector('img.widget-image').src !== old", arg=before[0], timeout=30_000)
        page.wait_for_function(f"document.querySelector('b.share').textContent === '{expected(t)[0]}'", timeout=30_000)
        assert say("accuracy") == expected(t)[1]
        after = page.locator("img.widget-image").evaluate_all("all => all.map(i => i.src)")
        assert [a != b for a, b in zip(before, after)] == [True, True, False, False]   # gamma and beta, clamping; not the map, not the curves
    assert page.locator("img.widget-image").evaluate_all("all => all.every(i => i.naturalWidth > 300)")
