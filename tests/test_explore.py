"The explorer answers from the records, and does so in a browser."
import functools
import io
import shutil
import signal
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
from bnonly import explore, explorer_page
from bnonly.explore import Explorer, at_threshold

ROOT = Path(__file__).parents[1]
KEY = "resnet20,bn,digits,weight_decay=0.012,seed={}"


def expected(threshold, seed=0):
    """Share below a threshold, and the accuracies measured with as many gammas at 0 or with the next fewer and more,
    straight from the file."""
    found = safetensors.numpy.load_file(ROOT / "runs/decay" / KEY.format(seed) / "features.safetensors")
    share = 100 * (np.abs(found["gamma"]) < np.float32(threshold)).mean()
    tried = dict(zip(found["clamped"].tolist(), (100 * found["correct"] / found["tested"][0]).tolist()))
    count = int((np.abs(found["gamma"]) < np.float32(threshold)).sum())
    around = (
        [count] if count in tried else [max(n for n in tried if n < count), *sorted(n for n in tried if n > count)[:1]]
    )
    return f"{share:.1f}%", " and ".join(f"{tried[n]:.1f}%" for n in around)


@pytest.fixture
def explorer(monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(ROOT / "runs"))
    for f in (explore.choices, explore.features_of):
        f.cache_clear()
    yield Explorer()
    for f in (explore.choices, explore.features_of):
        f.cache_clear()


def words(found):
    "What is said of some numbers."
    return " ".join(" ".join(o) for o in explore.sentences(found, 50))


PICTURES = "affine_picture", "clamping_picture", "silence_picture", "learning_picture"


def test_a_change_draws_what_it_concerns_once_and_reads_no_features(explorer, monkeypatch):
    """Another threshold draws two pictures, other curves one, another run all four.

    No network is evaluated: `bnonly.explore` imports no torch (tests/test_repository.py)."""
    calls = []
    for name in (*PICTURES, "saved_features", "records"):
        f = getattr(explore, name)
        counted = functools.wraps(f)(lambda *args, f=f: (calls.append(f.__name__), f(*args))[1])
        monkeypatch.setattr(explore, name, counted)
    own, choices = explore.choices("decay"), explorer.choices
    changes = [
        (choices["study"], "short", PICTURES),
        (choices["arch"], "resnet32", PICTURES),
        (explorer.threshold, 0.2, PICTURES[:2]),
        (choices["study"], "decay", PICTURES),
        (choices["policy"], "all", PICTURES),
        (choices["rest"], own[own.policy == "all"].rest.iloc[1], PICTURES),
        (explorer.others, tuple(own.folder[:3]), PICTURES[3:]),
    ]
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
        assert f'"share">{share}<' in explorer.message.value and f'"accuracy">{accuracy}<' in explorer.message.value, t


def test_accuracies_are_those_of_the_clamped_network(explorer):
    "Restored from its record, clamped and tested again; beyond what was tried it says so."
    from bnonly.data import load_data, loaders
    from bnonly.experiment import Spec
    from bnonly.features import clamp, correct, restore
    spec = Spec(arch="resnet20", data="digits", weight_decay=.012)
    found, data = explore.features_of(str(ROOT / "runs/decay" / spec.key)), load_data("digits")
    for t in (0, .01, .1, float(found["threshold"][-1]), .9):
        model = restore(spec, "decay")
        clamp(model, t)
        right = 100 * correct(model, loaders(data, 128, device="cpu")[1]) / len(data.test)
        (n, accuracy), *more = at_threshold(found, t)["measured"]
        if n == at_threshold(found, t)["below"]:
            # one image: processors round differently
            assert accuracy == pytest.approx(right, abs=1.01*100/len(data.test))
        elif not more:
            assert "not measured beyond" in words(at_threshold(found, t))
    assert at_threshold(found, .01)["measured"][1:] == [] and t == .9 and not more


def test_a_run_without_images_says_so():
    found = at_threshold(dict(gamma=np.array([.1, -.3, .0])), .2)
    assert found == dict(below=2, channels=3) and "not measured" in words(found)


def test_runs_that_cannot_be_shown_are_not_offered(explorer, tmp_path, monkeypatch):
    shutil.copytree(ROOT / "runs/decay", tmp_path / "decay")
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path))
    broken = tmp_path / "decay" / KEY.format(0) / "features.safetensors"
    broken.write_bytes(broken.read_bytes()[:-9])
    for f in (explore.choices, explore.features_of):
        f.cache_clear()
    with pytest.warns(UserWarning, match="not as it was written"):
        mine = explore.choices("decay")
    assert len(mine) == 14 and str(broken.parent) not in set(mine.folder)
    with pytest.warns(UserWarning):
        explore.choices.cache_clear(), explore.features_of.cache_clear()
        assert Explorer().choices["study"].options == ("decay",)


def test_every_analysed_run_can_be_chosen(explorer, tmp_path, monkeypatch):
    "Those of a folder that is no study too: `scratch` is where single runs go."
    found = explorer.choices["study"].options
    analysed = {f.parent.parent.name for f in (ROOT / "runs").glob("*/*/features.safetensors")}
    assert set(found) == {s for s in analysed if len(explore.choices(s))} and {"short", "decay"} <= set(found)
    shutil.copytree(ROOT / "runs/decay", tmp_path / "scratch")
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path))
    for f in (explore.choices, explore.features_of):
        f.cache_clear()
    assert Explorer().choices["study"].options == ("scratch",)
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path / "none"))
    assert explore.explorable() == []


def test_pictures_have_one_size_and_dots_for_dense_screens(explorer):
    from PIL import Image
    sizes = {Image.open(io.BytesIO(w.value)).size for w in explorer.pictures.values()}
    assert len(sizes) == 1 and sizes.pop()[0] >= 2 * 500


def test_markup_in_a_record_stays_text(explorer, monkeypatch):
    "In the numbers, and in the lists, whose options are text of the browser."
    markup = "<img src=x onerror=window.ran=1>{{7*7}}"
    explorer.run = explorer.run.copy()
    explorer.run["images"] = markup
    explorer.clamp()
    message = explorer.message.value
    assert "<img" not in message and "&lt;img src=x onerror=window.ran=1&gt;{{7*7}}" in message


def test_odd_metrics_leave_a_curve_out(explorer, tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,accuracy\n1,<b>\n")
    with pytest.warns(UserWarning, match="cannot be read as metrics"):
        assert explore.learning_picture({"odd": str(tmp_path)}).startswith(b"\x89PNG")


def test_importing_changes_no_style():
    probe = ("import matplotlib, bnonly.claims, bnonly.explore, bnonly.report; d = matplotlib.rcParamsDefault; "
             "print([k for k in d if k != 'backend' and d[k] != matplotlib.rcParams[k]])")
    assert (
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@contextmanager
def serving(address, server):
    "Wait for a server, and end it at last."
    for _ in range(900):
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
        explorer_page.stop_server(server)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_a_port_that_cannot_be_used_is_refused():
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    for port in (-1, 0, 99999):
        with pytest.raises(ValueError, match=f"port {port} does not exist"):
            explorer_page.serve_explorer(port)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(ValueError, match=f"port {s.getsockname()[1]} is not free; the next that is free is [0-9]+"):
            explorer_page.serve_explorer(s.getsockname()[1])


def test_the_explorer_fails_as_its_server_does(monkeypatch):
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    monkeypatch.setattr(explorer_page.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="exit code 1"):
        explorer_page.serve_explorer(free_port())


def test_a_server_that_is_told_to_end_ends_with_its_kernels(tmp_path, monkeypatch):
    "`bnonly explore` and SIGTERM: after a page was opened, nothing of it lives on."
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path))
    port = free_port()
    command = subprocess.Popen(
        [sys.executable, "-m", "bnonly", "explore", "--port", str(port)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    with serving(f"http://127.0.0.1:{port}/voila/static/", command):
        urlopen(f"http://127.0.0.1:{port}", timeout=180).read()   # a kernel
        ours = family(command.pid)
        assert len(ours) >= 3
        command.send_signal(signal.SIGTERM)
        assert "bnonly: stopped" in command.communicate(timeout=300)[1]
    for _ in range(3000):
        if not any(map(running, ours)):
            break
        time.sleep(.1)
    assert not any(map(running, ours)) and explorer_page.is_free(port)


def running(pid):
    "Whether a process lives; one that nobody has waited for does not."
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def family(pid):
    "A process and all that it started."
    children = Path(f"/proc/{pid}/task/{pid}/children")
    return [pid, *(d for c in children.read_text().split() for d in family(int(c)))] if children.exists() else [pid]


def voila(page, folder):
    "The explorer served as a page."
    pytest.importorskip("voila", reason="voila is not installed: pip install 'bnonly[dev]'")
    at = f"http://127.0.0.1:{(port := free_port())}"
    with serving(f"{at}/voila/static/", explorer_page.serve_explorer(port, wait=False)):
        page.goto(at, timeout=120_000)
        yield


def lab(page, folder):
    "A copy of the notebook in JupyterLab, all cells run."
    shutil.copy(ROOT / "nbs/14_explore.ipynb", folder)
    at = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        f"--port={port}",
        "--ServerApp.ip=127.0.0.1",
        "--allow-root",
        f"--ServerApp.root_dir={folder}",
        "--IdentityProvider.token=",
        "--LabApp.news_url=None",
    ]
    with serving(f"{at}/api", subprocess.Popen(command, stderr=subprocess.DEVNULL)):
        page.set_viewport_size(dict(width=1400, height=4000))   # cells out of sight are not drawn
        page.goto(f"{at}/doc/tree/14_explore.ipynb", timeout=120_000)
        page.get_by_text("| Idle").wait_for(timeout=120_000)   # the kernel has started
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        page.wait_for_function(
            "/[0-9]/.test([...document.querySelectorAll('.jp-InputPrompt')].at(-1).textContent)", timeout=120_000
        )  # the last cell has run
        yield


@pytest.mark.parametrize("place, threshold", [(voila, .01), (lab, .1)])   # where each begins
def test_in_a_browser_the_slider_changes_the_picture_and_the_numbers(page, place, threshold, tmp_path, monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(ROOT / "runs"))
    monkeypatch.chdir(ROOT)
    with contextmanager(place)(page, tmp_path):
        page.wait_for_selector(".noUi-handle", timeout=120_000)
        page.wait_for_selector("img.widget-image", timeout=120_000)
        walk(page, threshold)
    assert not page.left and not page.errors


@pytest.mark.parametrize("width, columns", [(1280, 2), (375, 1)])
def test_the_page_opens_with_its_controls(page, width, columns, monkeypatch, tmp_path):
    "Lists, threshold and pictures of one size on the first screen, prose below; at 375 px nothing is wider than it."
    monkeypatch.setenv("BNONLY_RUNS", str(ROOT / "runs"))
    page.set_viewport_size(dict(width=width, height=900))
    with contextmanager(voila)(page, tmp_path):
        page.wait_for_selector("img.widget-image", timeout=120_000)
        page.wait_for_function("[...document.querySelectorAll('img.widget-image')].length == 4")
        page.wait_for_function(
            "[...document.querySelectorAll('img.widget-image')].every(i => i.complete && i.naturalWidth)"
        )
        boxes = page.locator("img.widget-image").evaluate_all(
            "all => all.map(i => { const b = i.getBoundingClientRect(); return [b.x, b.y, b.width, b.height] })"
        )
        top = page.locator(".noUi-handle").bounding_box()["y"]
        prose = page.locator("h2").first.bounding_box()["y"]
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert (
            len({round(w) for *_, w, _ in boxes}) == len({round(h) for *_, h in boxes}) == 1
            and boxes[0][2] > 0.4 * width
        )
        assert len({round(x) for x, *_ in boxes}) == columns and top < boxes[0][1] < 900 and prose > boxes[-1][1]
        assert "<b" not in page.locator("body").inner_text()


def walk(page, start):
    "Choose a run, move the slider with the keyboard, and compare what is shown with the record."
    lists, say = page.locator(".widget-dropdown select"), lambda what: page.locator(f"b.{what}").inner_text()
    assert lists.nth(0).input_value() == "decay"
    lists.nth(2).select_option("bn")
    lists.nth(3).get_by_text("weight_decay=0.0,seed=0", exact=True).wait_for(state="attached")   # only bn has this run
    lists.nth(3).select_option("weight_decay=0.012,seed=0")
    page.wait_for_function(f"document.querySelector('b.share').textContent === '{expected(start)[0]}'", timeout=120_000)
    for step in range(1, 4):
        t = round(start + .005 * step, 3)
        before = page.locator("img.widget-image").evaluate_all("all => all.map(i => i.src)")
        page.locator(".noUi-handle").focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function(
            "old => document.querySelector('img.widget-image').src !== old", arg=before[0], timeout=120_000
        )
        page.wait_for_function(f"document.querySelector('b.share').textContent === '{expected(t)[0]}'", timeout=120_000)
        assert say("accuracy") == expected(t)[1]
        after = page.locator("img.widget-image").evaluate_all("all => all.map(i => i.src)")
        assert [a != b for a, b in zip(before, after)] == [
            True,
            True,
            False,
            False,
        ]  # gamma and beta, clamping; not the map, not the curves
    assert page.locator("img.widget-image").evaluate_all("all => all.every(i => i.naturalWidth > 300)")
