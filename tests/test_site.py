"What others wrote reaches no page unescaped, and what nobody could have written is named and left out."
import hashlib
import json
import os
import shutil
import warnings
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import nbformat.v4 as v4
import pytest
import safetensors
import safetensors.numpy
from bnonly import explore
from bnonly.checked import read_json, read_metrics
from bnonly.experiment import BrokenRecord, history, load_record, preset, results, run_dir
from bnonly.analysis import channels, saved_features, settling
from bnonly.pages import harmless, notebook_cells, verdict_kind
from bnonly.report import drawing, inputs, notebooks, page as write_page, site, unmeasured
from bnonly.sweep import state, unfinished

ROOT = Path(__file__).parents[1]
MARKUP = '"\'><img src=x onerror=window.ran=1><script>window.ran=1</script><svg onload=window.ran=1>{{7*7}}{% if 1 %}'
PLAIN = "plain"


def project(folder, monkeypatch, study="toy"):
    "A project with one small study, the committed runs on digits, as the working directory."
    os.makedirs(folder, exist_ok=True)
    grid = "data = digits\narch = resnet20, resnet32\npolicy = bn, all\nseed = 0, 1, 2\n"
    (folder / "settings.ini").write_text(f"[{study}]\n{grid}")
    (folder / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.setenv("BNONLY_RUNS", str(folder / "runs"))
    monkeypatch.chdir(folder)
    shutil.copytree(ROOT / "runs/decay", folder / "runs" / study)
    return folder / "runs" / study


def rewritten(value, words):
    "A value of JSON with other words in place of every text."
    if isinstance(value, dict):
        return {k: rewritten(v, words) for k, v in value.items()}
    if isinstance(value, list):
        return [rewritten(v, words) for v in value]
    return words if isinstance(value, str) else value


def resealed(folder, **changed):
    "Change a record as anybody can who has read how it is sealed, and its features with it."
    record = {**json.loads((folder / "record.json").read_text()), **changed}
    text = json.dumps({k: v for k, v in record.items() if k != "seal"}, sort_keys=True)
    record["seal"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "record.json").write_text(json.dumps(record))
    with safetensors.safe_open(features := folder / "features.safetensors", "np") as f:
        meta, tensors = f.metadata(), {n: f.get_tensor(n) for n in f.keys()}
    features.write_bytes(safetensors.numpy.save(tensors, meta | dict(seal=record["seal"])))


def planted(folder, study, words):
    "Words of somebody else's in every text of a study."
    for run in sorted(folder.iterdir()):
        record = load_record(run)
        free = {k: rewritten(v, words) for k, v in record.items() if k not in ("spec", "status", "files", "seal")}
        resealed(run, **free, **{words: words})
        (run / "metrics.csv").chmod(0o644)
    left = next(s for s in preset(study) if s.arch == "resnet32")
    os.makedirs(run_dir(left, study))
    (run_dir(left, study) / "failed.json").write_text(json.dumps(dict(error=words, traceback=words)))
    figures = folder / "figures"
    figures.mkdir()
    for name in ("fig02", words.replace("/", "")):
        for ending in ("png", "csv"):
            (figures / f"{name}.{ending}").write_bytes((ROOT / "runs/short/figures/fig02.png").read_bytes())
    (figures / "tableC1.csv").write_text(json.dumps(words) + f",b\n{json.dumps(words)},1\n")


class Elements(HTMLParser):
    "The elements of a page, each with the names of its attributes."
    def __init__(self, page):
        super().__init__()
        self.found, self.links = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, *(name for name, _ in attributes)))
        self.links += [value for name, value in attributes if name in ("href", "src") and value]


STUDIES = {words: words.replace("/", "") for words in (MARKUP, PLAIN)}


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    "Two reports that differ only in the words of others: markup in one, a plain word in the other."
    found = {}
    for i, (words, study) in enumerate(STUDIES.items()):
        with pytest.MonkeyPatch.context() as m:
            folder = project(tmp_path_factory.mktemp(f"site{i}") / "project", m, study)
            planted(folder, study, words)
            found[words] = site(study).parent
    return found


def test_markup_in_a_study_adds_no_element_and_no_attribute(sites):
    pages = {words: {f.name: f.read_text() for f in folder.glob("*.html")} for words, folder in sites.items()}
    assert len(pages[MARKUP]) > 10 and pages[MARKUP].keys() == pages[PLAIN].keys()
    seen = 0
    for name, text in pages[MARKUP].items():
        own, plain = Elements(text), Elements(pages[PLAIN][name])
        assert Counter(own.found) == Counter(plain.found), name
        assert not [o for o in own.found if any(a.startswith("on") for a in o[1:])] and text.count("<script") == 1
        assert "49" not in {a for a in text.split() if a == "49"}
        seen += text.count("&lt;script&gt;window.ran=1")
    assert seen > 50   # it is there, as text


def test_no_script_of_others_runs(sites, page):
    for file in sorted(sites[MARKUP].glob("*.html")):
        page.goto(file.as_uri())
        assert page.evaluate("window.ran") is None, file.name
        assert page.evaluate("document.querySelectorAll('svg, [onerror], [onload]').length") == 0
    assert not page.left and not page.errors   # an error of the console, had our policy stopped something of our own


def test_the_policy_stops_what_would_slip_through(sites, page, tmp_path):
    "A page with markup put into it by hand: nothing of it acts."
    text = (sites[PLAIN] / "settings.html").read_text()
    planted = f"<main><a id=a href='javascript:window.ran=1'>go</a>{MARKUP}"
    (tmp_path / "settings.html").write_text(text.replace("<main>", planted))
    page.goto((tmp_path / "settings.html").as_uri())
    page.click("#a")
    page.wait_for_timeout(200)
    assert page.evaluate("window.ran") is None and any("Content Security Policy" in e for e in page.errors)


OUTPUTS = [
    dict(data={"text/html": f"<p onclick=\"window.ran=1\">{MARKUP}</p><a href='java\nscript:window.ran=1'>a</a>"}),
    dict(data={"text/html": "<iframe srcdoc='<script>parent.ran=1</script>'></iframe><form action=x><input></form>"}),
    dict(data={"text/html": "<style>p{}</style><a href='data:text/html,<script>1</script>'>b</a><object data=x>"}),
    dict(data={"text/html": "<img src='https://elsewhere/x.png'><p style='position:fixed'>c</p>"}),
    dict(data={"text/markdown": f"**{MARKUP}** [link](javascript:window.ran=1)"}),
    dict(data={"image/png": 'x" onerror="window.ran=1', "text/plain": MARKUP}),
    dict(data={"application/javascript": "window.ran=1"}),
    dict(data={"image/svg+xml": "<svg onload=window.ran=1></svg>", "text/plain": MARKUP}),
]


def hostile_notebook(file):
    outputs = [v4.new_output("display_data", **o) for o in OUTPUTS]
    outputs += [v4.new_output("stream", text=MARKUP), v4.new_output("error", ename="E", evalue="e", traceback=[MARKUP])]
    text = "<b onmouseover=x>bold</b> <script>window.ran=1</script> [a](javascript:x) [b](07_accuracy.ipynb#x)"
    cells = [v4.new_markdown_cell(f"# {MARKUP}\n\n{text}"), v4.new_raw_cell(MARKUP),
             v4.new_code_cell(f"x = '''{MARKUP}'''", outputs=outputs)]
    file.write_text(json.dumps(v4.new_notebook(cells=cells)))
    return file


def test_a_notebook_of_others_is_made_harmless(page, tmp_path, monkeypatch):
    project(tmp_path / "project", monkeypatch)
    cells = notebook_cells(hostile_notebook(tmp_path / "x.ipynb"), code=True)
    file = write_page("notebook.html", "toy", "00_experiment", "x", cells=cells)
    found = Elements(file.read_text())
    assert Counter(tag for tag, *_ in found.found)["script"] == 1
    assert not {"iframe", "form", "input", "object", "svg"} & {tag for tag, *_ in found.found}
    assert not [o for o in found.found if any(a.startswith("on") or a == "style" for a in o[1:])]
    assert "07_accuracy.html#x" in found.links
    assert not [a for a in found.links if "script:" in a or a.startswith(("data:text", "https://elsewhere"))]
    page.goto(file.as_uri())
    assert page.evaluate("window.ran") is None and page.locator("main b").count() and not page.errors


LINKS = {True: ["https://example.org/a?b", "#part", "a.html#b", "mailto:a@b.c"],
         False: ["javascript:x", " java\tscript:x", "//elsewhere/x", "data:text/html,x", "vbscript:x",
                 "file:///etc/passwd", "&#106;avascript:x"]}


@pytest.mark.parametrize("link, kept", [(link, kept) for kept, links in LINKS.items() for link in links])
def test_links_of_others(link, kept):
    assert ("href" in harmless(f'<a href="{link}">a</a>')) == kept


# -------- what nobody could have written

NUMBERS = "NaN", "1e999", "1" + "0" * 400, "1" + "0" * 5000   # the last is longer than Python reads
TEXTS = ["[]", "1", "null", '"x"', "", "{", b"\xff\xfe", "[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500,
         *(f'{{"seconds": {n}}}' for n in NUMBERS)]
VALUES = [dict(spec=v) for v in ([], None, {}, dict(arch=[]), dict(arch="resnet57"))]
VALUES += [dict(final=v) for v in ([], {}, dict(accuracy="<b>"), dict(accuracy=1e9))]
VALUES += [dict(counts="many"), dict(counts=dict(total=[])), dict(status=None), dict(images=1), dict(dtype=None)]
VALUES += [dict(images=v) for v in ("$\\frac$", "a\nb", "x" * 300)]   # no figure can show them
VALUES += [dict(seconds=v) for v in ("long", -1, 1e300, True)]
VALUES += [dict(machine=v) for v in (None, [1], dict(device={}))]
VALUES += [dict(callbacks="x"), dict(callbacks=[[]])]
VALUES += [dict(files=v) for v in ({"../x": "y"}, [], {"metrics.csv": 1})]


def odd_ones(folder):
    "A folder for each odd record, with the first record of a study as the pattern."
    pattern = sorted(folder.iterdir())[0]
    for i, text in enumerate([*TEXTS, "a folder", "a pipe", *VALUES]):
        (run := folder / f"odd{i:02}").mkdir()
        if text == "a folder":
            (run / "record.json").mkdir()
        elif text == "a pipe":
            os.mkfifo(run / "record.json")
        elif isinstance(text, dict):
            shutil.copytree(pattern, run, dirs_exist_ok=True)
            resealed(run, **text)
        else:
            (run / "record.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        yield run


def test_odd_records_are_named_and_left_out(tmp_path, monkeypatch):
    folder = project(tmp_path / "project", monkeypatch)
    whole = results("toy")
    odd = list(odd_ones(folder))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert results("toy").equals(whole)
    words = [str(w.message) for w in said]
    assert len(words) == len(odd)
    for run in odd:
        assert sum(f"{run}/" in w for w in words) == 1, run.name
    assert not [w for w in words if "Error" in w or len(w.splitlines()) > 1 or len(w) > 600]


@pytest.mark.filterwarnings("ignore")
def test_a_report_is_written_in_spite_of_them(tmp_path, monkeypatch):
    folder = project(tmp_path / "project", monkeypatch)
    odd = list(odd_ones(folder))
    for i, spec in enumerate([s for s in preset("toy") if s.arch == "resnet32"]):
        if i < len(odd):
            odd[12 + i].rename(run_dir(spec, "toy"))   # where a run of the plan belongs
            assert state(spec, "toy") in ("broken", "complete")
    (folder / "figures").mkdir()
    (folder / "figures/fig01.png").write_text("no picture")
    (folder / "figures/fig02.png").mkdir()
    os.mkfifo(folder / "figures/fig03.png")
    index = site("toy").read_text()
    assert "15 runs" in index and "6 of 12 planned runs" in index
    assert not list((folder / "report").glob("*/fig0[23].png")) and (folder / "report/figures.html").exists()


FAILURES = "[]", "1", "null", '{"error": 1}', "{}", "[" * 100_000, '{"error": NaN}', "folder", "pipe", "\0"


def put(file, text):
    "Write a file, or put a folder or a pipe in its place."
    file.mkdir() if text == "folder" else os.mkfifo(file) if text == "pipe" else file.write_text(text)


@pytest.mark.parametrize("text", FAILURES, ids=range(len(FAILURES)))
def test_odd_failures_are_told(text, tmp_path, monkeypatch):
    project(tmp_path / "project", monkeypatch)
    spec = next(s for s in preset("toy") if s.arch == "resnet32")
    folder = run_dir(spec, "toy")
    folder.mkdir()
    put(folder / "failed.json", text)
    assert state(spec, "toy") == "failed"
    error = {r["run"]: r for r in unmeasured("toy")}[spec.key]["error"]
    assert error.startswith("failed.json ") and len(error.splitlines()) == 1 and len(error) < 400


METRICS = "", "a,b\n1,2\n", "epoch,accuracy\n1,<script>\n", "epoch,accuracy\n1\n2,3,4\n", "\0\0", "folder", "pipe"


@pytest.mark.parametrize("text", METRICS, ids=range(len(METRICS)))
def test_odd_metrics_are_named_and_left_out(text, tmp_path, monkeypatch):
    folder = project(tmp_path / "project", monkeypatch)
    run = sorted(folder.iterdir())[0]
    whole = len(history("toy"))
    lines = len(read_metrics(run))
    resealed(run, files={})   # a record may vouch for no file
    (run / "metrics.csv").unlink()
    put(run / "metrics.csv", text)
    with pytest.warns(UserWarning, match="metrics.csv cannot be read as metrics"):
        assert len(history("toy")) == whole - lines


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "\0", "folder", "pipe"], ids=range(5))
def test_odd_files_beside_records_stop_no_report_and_no_explorer(text, tmp_path, monkeypatch):
    folder = project(tmp_path / "project", monkeypatch)
    names = (
        "lock",
        "claim-1.json",
        "train.ipynb",
        "features.safetensors",
        "trajectory.safetensors",
        "checkpoint.safetensors",
        "failed.json",
        "robustness.csv",
        "record (conflicted copy).json",
    )
    for run, name in zip(sorted(folder.iterdir()), names):
        (run / name).unlink(missing_ok=True)
        put(run / name, text)
    for name in ("report/inputs.sha256", "figures/tableC1.csv"):
        (folder / name).parent.mkdir()
        put(folder / name, text)
    for f in (explore.choices, explore.features_of): f.cache_clear()
    assert len(results("toy")) == 15 and len(explore.choices("toy")) == 14   # without the run whose features are odd
    assert len(channels("toy").folder.unique()) == 14 and settling("toy") is not None
    assert (
        len(unfinished("toy", preset("toy"))) == 12
        and len(inputs("toy")) == 64
        and "15 runs" in site("toy").read_text()
    )


def test_arrays_that_do_not_go_together_are_made_again(tmp_path, monkeypatch):
    folder = project(tmp_path / "project", monkeypatch)
    run = sorted(folder.iterdir())[0]
    good = saved_features(run)
    odd = [
        {n: a for n, a in good.items() if n != "beta"},
        good | dict(gamma=good["gamma"][:-1]),
        good | dict(correct=good["correct"][:-1]),
        good | dict(zero=good["zero"][:, None]),
        {n: a for n, a in good.items() if n != "tested"},
    ]
    for arrays in odd:
        about = dict(seal=load_record(run)["seal"], digest=digest_of(arrays))
        (run / "features.safetensors").write_bytes(safetensors.numpy.save(arrays, about))
        with pytest.warns(UserWarning, match="features.safetensors is not as it was written"):
            assert saved_features(run) == {}


def digest_of(arrays):
    h = hashlib.sha256()
    for n in sorted(arrays): h.update(n.encode() + arrays[n].tobytes())
    return h.hexdigest()


def test_a_run_that_was_copied_counts_once(tmp_path, monkeypatch):
    "By a tool that keeps two versions of a folder, or by hand into the folder of another run."
    folder = project(tmp_path / "project", monkeypatch)
    first, whole = sorted(folder.iterdir())[0], results("toy")
    shutil.copytree(first, folder / f"{first.name} (conflicted copy 2026-01-01)")
    left = next(s for s in preset("toy") if s.arch == "resnet32")
    shutil.copytree(first, run_dir(left, "toy"))
    with pytest.warns(UserWarning, match=f"is the record of another run, {first.name}; move it") as said:
        assert results("toy").equals(whole)
    assert len(said) == 2 and state(left, "toy") == "broken"
    with pytest.raises(BrokenRecord, match="another run"): load_record(run_dir(left, "toy"))


def test_numbers_of_json(tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps([2**63 - 1, -2**63 + 1, 1e308, .5, True, None, "é"]))
    assert read_json(file) == [2**63 - 1, -2**63 + 1, 1e308, .5, True, None, "é"]
    for text in (str(2**63), "-1e400", "Infinity"):
        file.write_text(f"[{text}]")
        with pytest.raises(ValueError, match="x.json cannot be read as JSON: the number"):
            read_json(file)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")


NOTEBOOKS = {
    "Untitled": "",
    "08_affine copy": "{",
    "16_mine": '{"cells": [\n<<<<<<< HEAD\n{}\n]}',
    "17_list": "[]",
    "18_deep": "[" * 100_000,
    "19_odd": '{"cells": [{"metadata": 1}]}',
    "20_cell": '{"cells": [{"cell_type": "code", "metadata": {}, "source": 1}], "metadata": {}, "nbformat": 4}',
}


@pytest.mark.parametrize("name, text", NOTEBOOKS.items(), ids=NOTEBOOKS)
def test_broken_notebooks_beside_ours(name, text, tmp_path, monkeypatch):
    "Those that look like ours are named; none of them stops a report."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    monkeypatch.setattr("bnonly.report.root", lambda: tmp_path)
    own = notebooks()
    (tmp_path / "nbs" / f"{name}.ipynb").write_text(text)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert notebooks() == own and drawing("short")[0] == "07_accuracy"
    assert [name in str(w.message) for w in said] == [True] * name[0].isdigit() * (" " not in name)


def test_what_a_verdict_comes_to():
    kinds = {"reproduced": "yes", "not reproduced": "no", "holds on digits, 40 epochs": "yes",
            "does not hold (1 of 3 hold) on digits": "no", "undecided on digits": "open", "not measured": "none",
            "reversed": "no", "not told apart": "open"}
    assert {v: verdict_kind(v) for v in kinds} == kinds


def test_the_files_of_the_site_are_in_the_wheel():
    from importlib.resources import files
    names = {f.name for f in (files("bnonly") / "site").iterdir()}
    assert {"base.html", "style.css", "script.js"} <= names
    text = "".join((files("bnonly") / "site" / n).read_text() for n in names)
    assert "|safe" not in text.replace(" ", "")
