"A small study from its settings to its report, in a project of its own."
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from bnonly.cli import COMMANDS, main, options, parse_arguments
from bnonly.experiment import preset, presets, results, run_dir, runs_dir, summary
from bnonly.findings import HEADLINES, MAIN_CLAIMS, accuracies, comparisons
from bnonly.report import inputs, overview, pages, report, runs_page, settings, unmeasured
from bnonly.processes import ended
from bnonly.runlock import holder
from bnonly.sweep import state

ROOT = Path(__file__).parents[1]
MINI = """[mini]   ; a small one
epochs = 3
arch = resnet8, resnet14
grid =
    policy=all,bn seed=0,1
    policy=random2,output
"""


def project(folder):
    "A project with one small study, and its command line."
    (folder / "settings.ini").write_text(MINI)
    shutil.copytree(ROOT / "nbs", folder / "nbs")
    return lambda *args: subprocess.run(
        [sys.executable, "-m", "bnonly", *args],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"BNONLY_RUNS": str(folder / "runs"), "CUDA_VISIBLE_DEVICES": ""},
    )


@pytest.fixture
def bnonly(tmp_path):
    return project(tmp_path)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("project")


def test_a_study_ends_in_a_site_that_opens_offline(here):
    bnonly, tmp_path = project(here), here
    first = bnonly("study", "mini")
    assert first.returncode == 0, first.stderr
    assert "12 of 12 runs to train" in first.stderr and "12 runs trained, 0 failed" in first.stderr
    done = bnonly("report", "mini")
    assert done.returncode == 0, done.stderr
    index = tmp_path / "runs/mini/report/index.html"
    assert str(index) in done.stderr
    page = index.read_text()
    figures = tmp_path / "runs/mini/figures"
    drawn = {f"fig{n:02}" for n in (1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14)} | {"table1", "tableC1"}
    assert drawn <= {f.stem for f in figures.glob("*.png")} and drawn <= {f.stem for f in figures.glob("*.svg")}
    assert "±" in page and "resnet14" in page and 'src="figures/fig02.png"' in page
    for figure in figures.glob("fig*.png"):
        assert f'src="figures/{figure.name}"' in (index.parent / "figures.html").read_text()
        assert len(pd.read_csv(figure.with_suffix(".csv")).columns) == 8
    assert (index.parent / "07_accuracy.html").read_text().count("data:image/png") >= 12   # all are shown there too
    means = summary(pd.read_csv(index.parent / "runs.csv"))
    drawn = pd.read_csv(figures / "fig02.csv", dtype=dict(tick=str)).query("label == 'BatchNorm' and tick == '14'")
    assert drawn.y.iloc[0] == pytest.approx(means.query("arch == 'resnet14' and policy == 'bn'")["mean"].iloc[0])
    done = bnonly("claims", "mini")
    assert done.returncode == 0 and " on digits, 3 epochs" in done.stdout and "not measured (needs" in done.stdout
    assert not re.search("digits[^:]*: (not )?reproduced", done.stdout)
    again = bnonly("study", "mini")
    assert "every run is complete" in again.stderr
    before = index.stat().st_mtime_ns
    assert bnonly("report", "mini").returncode == 0 and index.stat().st_mtime_ns == before


def test_the_first_page_opens_with_a_sentence_and_five_claims(here):
    from html.parser import HTMLParser
    index = here / "runs/mini/report/index.html"
    if not index.exists():
        pytest.skip("the report of this module's first test is not there")

    class Read(HTMLParser):
        seen, rows, folded = "", 0, 0
        def handle_starttag(self, tag, attributes):
            self.folded += tag == "details"
            self.rows += tag == "tr" and not self.folded
        def handle_data(self, words):
            self.seen += "" if self.folded else words
    page = Read()
    page.feed(index.read_text().partition("<main>")[2])
    assert "comparisons of test accuracy" in page.seen and "on digits after 3 epochs." in " ".join(page.seen.split())
    assert page.rows == 1 + 5 and page.folded == 3   # the head and five claims; all else is folded away


def test_its_pages_in_a_browser(here, page):
    """At 375 px nothing is wider than the screen, every link resolves, no request leaves, and the table of runs sorts
    and filters."""
    folder = here / "runs/mini/report"
    if not folder.exists():
        pytest.skip("the report of this module's first test is not there")
    files = sorted(folder.glob("*.html"))
    assert {
        "index",
        "figures",
        "claims",
        "runs",
        "settings",
        "article",
        "00_experiment",
        "07_accuracy",
        "14_explore",
    } <= {f.stem for f in files}
    page.set_viewport_size(dict(width=375, height=800))
    ids, links = {}, []
    for file in files:
        page.goto(file.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 375, file.name
        ids[file.name] = set(page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)"))
        links += [
            (file.name, o)
            for o in page.evaluate(
                """[...document.querySelectorAll('a[href], img[src]')].map(e => e.getAttribute('href') ||
                e.getAttribute('src'))"""
            )
        ]
        assert all(
            page.evaluate(
                """Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth
                > 0, () => false))))"""
            )
        ), file.name
    for name, link in set(links):
        target, _, anchor = unquote(link).partition("#")
        if re.match("https?://|data:|mailto:", link):
            continue
        assert not target or (folder / target).exists(), (name, link)
        assert not anchor or (target or name) not in ids or anchor in ids[target or name], (name, link)
    assert not page.left and not page.errors

    page.goto((folder / "runs.html").as_uri())
    cells = lambda what: page.evaluate(
        """what => { const t = document.querySelector('table.runs'), i = [...t.tHead.rows[0].cells].findIndex(c =>
        c.textContent === what);"""
        "return [...t.tBodies[0].rows].filter(r => !r.hidden).map(r => r.cells[i].textContent) }",
        what,
    )
    page.locator("th", has_text=re.compile("^accuracy$")).click()
    assert [float(a) for a in cells("accuracy")] == sorted(float(a) for a in cells("accuracy")) and len(
        cells("accuracy")
    ) == 12
    page.locator("th", has_text=re.compile("^accuracy$")).click()
    assert [float(a) for a in cells("accuracy")] == sorted((float(a) for a in cells("accuracy")), reverse=True)
    page.fill(".filter input", "resnet8 =bn")
    assert (
        set(cells("arch")) == {"resnet8"}
        and set(cells("policy")) == {"bn"}
        and page.inner_text(".filter output") == "2"
    )
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden() and page.locator(".filter").is_hidden()


@pytest.mark.parametrize(
    "args, answer",
    [(["study", "minni"], "the nearest is 'mini'"), (["train", "--device", "cpuu"], "the nearest is 'cpu'")],
)
def test_a_mistake_is_answered_by_one_line(bnonly, args, answer):
    done = bnonly(*args)
    assert done.returncode == 1 and answer in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "args,answer",
    [
        (["train", "--policy", "bm"], "the nearest is 'bn'"),
        (["report", "mini"], "no finished run"),
        (["claims", "mini"], "no finished run"),
        (["train", "--policy", "btachnorm"], "the nearest is 'bn'"),
        (["figures", "minni"], "the nearest is 'mini'"),
        (["train", "--dtype", "float61"], "the nearest is 'float"),
        (["train", "--device", "cpuu"], "the nearest is 'cpu'"),
    ],
)
def test_a_mistake_ends_in_one_sentence(args, answer, tmp_path, monkeypatch):
    (tmp_path / "settings.ini").write_text(MINI)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=answer) as end:
        main(args)
    assert len(end.value.code.splitlines()) == 1   # a sentence as exit code: Python prints it and ends with 1


@pytest.mark.parametrize(
    "args,answer",
    [
        (["train", "--study", "../outside"], "the nearest is 'outside'"),
        (["train", "--study", ""], "is not a name of letters"),
        (["claims", ""], "is not a name of letters"),
        (["figures", "demo"], "no finished run"),
        (["study", "demo", "--workers", "-3", "--dry-run"], "--workers -3 .* between 0 and 10000"),
        (["study", "demo", "--gpus-per-run", "-1"], "--gpus-per-run -1.0 "),
        (["study", "demo", "--hours", "nan"], "--hours nan "),
        (["bench", "--rounds", "0"], "--rounds 0 "),
        (["study", "demo", "--engine", "rya", "--dry-run"], "the nearest is 'ray'"),
        (["study", "demo", "--engine", "joblib"], "is not one of processes, ray"),
    ],
)
def test_what_nothing_can_be_done_with_is_refused(args, answer):
    with pytest.raises(SystemExit, match=answer):
        main(args)


def test_an_instruction_set_is_refused_before_any_run(monkeypatch):
    monkeypatch.setenv("BNONLY_MARCH", "x86-64-v5")
    with pytest.raises(SystemExit, match="BNONLY_MARCH 'x86-64-v5' is not one of .*the nearest is 'x86-64-v"):
        main(["study", "demo"])
    monkeypatch.setattr("bnonly.native.processor", lambda: "flags : sse2 avx2")
    monkeypatch.setenv("BNONLY_MARCH", "x86-64-v4")
    with pytest.raises(SystemExit, match="'x86-64-v4' needs avx512vl, which is not here"):
        main(["study", "demo"])


@pytest.mark.parametrize(
    "error,answer",
    [
        (ImportError("efficientnet needs timm."), "efficientnet needs timm."),
        (RuntimeError("it was taken over."), "it was taken over."),
        (MemoryError(), "MemoryError"),
        (KeyboardInterrupt(), "what was finished is kept"),
        (
            OSError("Exception occured in `Journal` when calling event `after_epoch`:\n\tthe disk is full."),
            "the disk is full.",
        ),
    ],
)
def test_an_error_on_the_way_is_one_sentence(monkeypatch, error, answer):
    def fail(**_): raise error
    monkeypatch.setitem(COMMANDS, "train", fail)
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == f"bnonly: {answer}" or isinstance(error, KeyboardInterrupt) and answer in end.value.code


@pytest.mark.parametrize(
    "args, answer",
    [
        (["studdy", "mini"], "the nearest is 'study'"),
        (["study", "mini", "--onlly", "policy=bn"], "the nearest is '--only'"),
        (["train", "--xtra", "x"], "the nearest is '--"),
        (["--verison"], "the nearest is '"),
        (["train", "--polic", "bn"], "the nearest is '--policy'"),
    ],
)
def test_a_command_or_an_option_that_does_not_exist_ends_with_status_2(args, answer, capsys):
    with pytest.raises(SystemExit) as end:
        main(args)
    said = capsys.readouterr()
    assert end.value.code == 2 and answer in said.err and len(said.err.splitlines()) == 1 and not said.out
    assert "pdb" not in said.err and "xtra'" not in said.err.partition("is not one of")[2]


def test_help_and_version(capsys):
    import bnonly
    main(["--version"])
    assert capsys.readouterr().out == f"bnonly {bnonly.__version__}\n"
    main([])
    overview = capsys.readouterr().out
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        usage = capsys.readouterr().out
        assert not end.value.code and f"  {name} " in overview and "--pdb" not in usage and "--xtra" not in usage
        assert all(option in usage for option in options(name)), name
    assert {"--arch", "--study", "--device", "--dtype"} <= set(options("train"))


def test_training_is_told_a_device_and_a_type(monkeypatch):
    import torch
    asked = {}
    monkeypatch.setattr(
        "bnonly.train.fit",
        lambda spec, study, **how: asked.update(how, spec=spec) or dict(status="diverged", final=dict(accuracy=9.0)),
    )
    main(["train", "--device", "cpu", "--dtype", "bfloat16", "--arch", "resnet8"])
    assert (asked["device"], asked["dtype"], asked["spec"].arch) == (torch.device("cpu"), torch.bfloat16, "resnet8")
    main(["train"])
    assert asked["device"] is asked["dtype"] is None
    assert parse_arguments(["study", "demo", "--dry-run", "--only", "arch=resnet8"])[1]["dry_run"] is True


def test_the_comparisons_are_the_plans_whatever_is_trained():
    shutil.copytree(ROOT / "runs/short", runs_dir() / "short")
    plan, table = preset("short"), results("short")
    whole = comparisons(plan, table)
    for some in (table[:0], table[:1], table[table.policy == "bn"], table[table.seed == 0]):
        assert comparisons(plan, some)["the paper finds"].tolist() == whole["the paper finds"].tolist()
    assert set(comparisons(plan, table[:0])["here"]) == {"not measured"} and "holds" in set(whole["here"])
    assert comparisons([], table).empty


def test_the_claims_of_the_first_page_exist():
    from bnonly.claims import PAPERS
    known = {c.id for claims in PAPERS.values() for c in claims}
    for ids in (MAIN_CLAIMS, *HEADLINES.values()):
        assert len(set(ids)) == 5 and set(ids) <= known


def test_runs_without_a_section_are_a_study_of_their_own():
    "Those that `bnonly train` made: its plan is what was trained, and its page of settings says so."
    shutil.copytree(ROOT / "runs/regularization-short", runs_dir() / "mine")
    assert {s.key for s in preset("mine")} == {f.name for f in (runs_dir() / "mine").iterdir() if f.is_dir()}
    assert unmeasured("mine") == [] and "trained one by one" in settings("mine")
    with pytest.raises(ValueError, match="study 'yours' is not one of demo, "): preset("yours")


def test_a_section_may_have_a_comment_behind_its_name(tmp_path, monkeypatch):
    project(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert settings("mini") == MINI.replace("   ; a small one", "").rstrip()


def test_lists_that_are_said_once_are_written_out_in_a_report(tmp_path, monkeypatch):
    "What several studies share stands in [DEFAULT]: a field there is every study's, a list of values none's."
    text = ("[DEFAULT]\nepochs = 3\nsmall = resnet8,resnet14\n[mini]\narch = ${small}\ngrid =\n    seed=0,1\n"
            "[odd]\narch = ${")
    (tmp_path / "settings.ini").write_text(text + "smal}\n")
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    monkeypatch.chdir(tmp_path)
    said = ["[mini]", "arch = resnet8,resnet14", "grid =", "    seed=0,1", "epochs = 3"]
    assert settings("mini").splitlines() == said
    assert presets() == ["mini", "odd"] and len(preset("mini")) == 4 and {s.epochs for s in preset("mini")} == {3}
    with pytest.raises(ValueError, match="list 'smal' is not one of .*; the nearest is 'small'"): preset("odd")
    (tmp_path / "settings.ini").write_text(text)
    with pytest.raises(ValueError, match="study 'odd' cannot be read: "): preset("odd")


def test_a_report_without_its_figures_is_drawn_again():
    folder = runs_dir() / "demo/report"
    (folder / "figures").mkdir(parents=True)
    for name in pages("demo"):
        (folder / f"{name}.html").touch()
    (folder / "inputs.sha256").write_text(inputs("demo"))
    assert report("demo") == folder / "index.html"
    (folder / "figures").rmdir()
    with pytest.raises(ValueError, match="no finished run"):
        report("demo")


def test_runs_that_differ_in_a_small_coefficient_stand_apart_in_the_table():
    run = dict(policy="all", status="complete", norm="fixup-open", seed=0)
    table = pd.DataFrame(
        [
            run | dict(arch=a, standardize=s, accuracy=v)
            for a, s, v in (("resnet20", 0, 90), ("resnet8", 0.0001, 80), ("resnet8", 0, 70))
        ]
    )
    assert accuracies(table).to_dict("split", index=False) == dict(
        columns=["arch", "standardize", "all"],
        data=[["resnet8", 0, "70.0 (1)"], ["resnet8", 0.0001, "80.0 (1)"], ["resnet20", 0, "90.0 (1)"]],
    )


@pytest.mark.parametrize("study, said", [("demo", True), ("mlp", False), ("regularization-demo", False)])
def test_only_the_main_papers_figures_leave_runs_out(study, said):
    "Other normalizations and coefficients are what the other papers' figures show."
    shutil.copytree(ROOT / "runs/regularization-short", runs_dir() / study)
    assert ("runs of another recipe" in overview(study).read_text()) == said


def test_a_study_tells_of_a_run_that_killed_its_process(tmp_path, monkeypatch, capsys):
    "By its exit status, and on two pages of the report. Asked for, the run is trained, and the report differs."
    project(tmp_path)
    (tmp_path / "settings.ini").write_text("[mini]\nepochs = 2\narch = resnet8\npolicy = bn, output\n")
    monkeypatch.chdir(tmp_path)
    victim, other = preset("mini")
    command, killed = [sys.executable, "-m", "bnonly", "study", "mini", "--workers", "1"], set()
    study = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while study.poll() is None:
        pid = holder(run_dir(victim, "mini")).get("pid", study.pid)
        if pid not in killed | {study.pid}:   # the study itself locks the run to write down that it failed
            os.kill(pid, signal.SIGSEGV)
            killed.add(pid)
        time.sleep(.01)
    said, error = study.stderr.read(), "WorkerDied: its process was ended by SIGSEGV"
    assert study.returncode == 1 and len(killed) == 2 and "mini: 1 runs trained, 1 failed" in said and error in said
    assert (state(victim, "mini"), state(other, "mini")) == ("failed", "complete")
    assert unmeasured("mini") == [dict(run=victim.key, state="failed", error=error)]
    words = lambda file: " ".join(re.sub("<[^>]*>", "", file.read_text()).split())
    assert "Not measured: 1 of 2 planned runs (1 failed)." in words(overview("mini"))
    assert "Planned, but not measured" in words(runs_page("mini")) and error in words(runs_page("mini"))
    before = inputs("mini")
    with pytest.raises(SystemExit) as end: main(["study", "mini"])
    assert end.value.code == 1 and "--retry-failed takes them up again" in capsys.readouterr().err
    main(["study", "mini", "--retry-failed"])
    assert unmeasured("mini") == [] and inputs("mini") != before
    assert "Not measured" not in words(overview("mini")) and "not measured" not in words(runs_page("mini"))


def test_make_study_goes_on_after_a_failure(tmp_path):
    "All are trained and reported on; the exit status tells. (Here `bnonly` only says what it is asked.)"
    shutil.copy(ROOT / "Makefile", tmp_path)
    bnonly = tmp_path / "bin/bnonly"
    bnonly.parent.mkdir()
    for fails in ("study a", "report a", "study b", "report b", "none"):
        bnonly.write_text(f'#!/bin/sh\necho "$*"\ntest "$*" != "{fails}"\n')
        bnonly.chmod(0o755)
        command, env = ["make", "--old-file", ".venv/installed", "study", "STUDY=a b"], os.environ.copy()
        env["PATH"] = f"{bnonly.parent}:{env['PATH']}"
        done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=env)
        assert done.stdout.splitlines() == ["study a", "report a", "study b", "report b"]
        assert (done.returncode != 0) == (fails != "none")


def test_kill_ends_the_workers_too(tmp_path):
    "Two runs of a study, stopped by SIGTERM once both are locked."
    project(tmp_path)
    (tmp_path / "settings.ini").write_text(MINI.replace("epochs = 3", "epochs = 10000"))
    study = subprocess.Popen(
        [sys.executable, "-m", "bnonly", "study", "mini", "--workers", "2"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    locked = lambda: [f for f in runs_dir().glob("mini/*") if holder(f)]
    for _ in range(3000):
        if len(locked()) == 2: break
        time.sleep(.2)
    workers = [holder(f) for f in locked()]
    study.send_signal(signal.SIGTERM)
    assert "bnonly: stopped" in study.communicate(timeout=300)[1] and len(workers) == 2
    for _ in range(1500):
        if all(map(ended, workers)): break
        time.sleep(.2)
    assert all(map(ended, workers))
