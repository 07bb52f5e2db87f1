"Every test keeps its runs in a folder of its own."
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path / "runs"))
