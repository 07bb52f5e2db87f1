"A small study from its settings to its report, in a project of its own."
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MINI = """[mini]
epochs = 3
arch = resnet8, resnet14
policy = all, bn, random2, output
seed = 0, 1
"""


@pytest.fixture
def bnonly(tmp_path):
    (tmp_path / "settings.ini").write_text(MINI)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    return lambda *args: subprocess.run([Path(sys.executable).parent / "bnonly", *args], cwd=tmp_path, capture_output=True, text=True,
                                        env=os.environ | {"BNONLY_RUNS": str(tmp_path / "runs"), "CUDA_VISIBLE_DEVICES": ""})


def test_a_study_ends_in_a_page_that_opens_offline(bnonly, tmp_path):
    first = bnonly("study", "mini")
    assert first.returncode == 0, first.stderr
    assert "16 of 16 runs to train" in first.stderr and "16 runs trained, 0 failed" in first.stderr
    told = bnonly("report", "mini")
    assert told.returncode == 0, told.stderr
    index = tmp_path / "runs/mini/report/index.html"
    assert str(index) in told.stderr
    page = index.read_text()
    figures = tmp_path / "runs/mini/figures"
    drawn = {f"fig{n:02}" for n in (1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14)} | {"table1", "tableC1"}
    assert drawn <= {f.stem for f in figures.glob("*.png")} and drawn <= {f.stem for f in figures.glob("*.svg")}
    assert page.count("data:image/png;base64") == len(list(figures.glob("fig*.png"))) and "±" in page and "resnet14" in page
    assert not re.search(r"(?:src|href)=['\"](?:https?:)?//", page)
    for link in re.findall(r"href='([^']+)'", page):
        assert (index.parent / link).exists()
    told = bnonly("claims", "mini")
    assert told.returncode == 0 and "holds on digits, 3 epochs" in told.stdout and "not measured (needs" in told.stdout
    assert not re.search("digits[^:]*: (not )?reproduced", told.stdout)
    again = bnonly("study", "mini")
    assert "every run is complete" in again.stderr
    before = index.stat().st_mtime_ns
    assert bnonly("report", "mini").returncode == 0 and index.stat().st_mtime_ns == before


@pytest.mark.parametrize("args,answer", [(["study", "minni"], "the nearest is 'mini'"), (["train", "--policy", "bm"], "the nearest is 'bn'"),
                                         (["report", "mini"], "no finished run"), (["claims", "mini"], "no finished run"),
                                         (["figures", "minni"], "the nearest is 'mini'"), (["studdy", "mini"], "the nearest is 'study'"),
                                         (["study", "mini", "--onlly", "policy=bn"], "the nearest is '--only'")])
def test_a_mistake_is_answered_by_one_sentence(bnonly, args, answer):
    done = bnonly(*args)
    assert done.returncode == 1 and answer in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
