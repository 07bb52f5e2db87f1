"""Every test keeps its runs in a folder of its own. Tests in a browser share a page that reaches nothing but this
machine."""
import os
import shutil
from urllib.parse import urlsplit

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # the tests may be run by make; what they start is not
    os.environ.pop(name, None)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path / "runs"))


@pytest.fixture
def page():
    """A page of headless Chromium; `page.left` and `page.errors` are the requests that left the machine and the errors
    of its console."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install 'bnonly[dev]'"
    )
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.skip("there is no Chromium on this machine: apt-get install chromium")
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=found, headless=True, args=FLAGS)
        page = browser.new_page()
        page.left, page.errors = [], []

        def stay(route):
            at = urlsplit(route.request.url)
            if at.scheme in ("file", "data", "blob") or at.hostname in ("127.0.0.1", "localhost"):
                return route.continue_()
            page.left.append(route.request.url)
            route.abort()
        page.route("**/*", stay)
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        yield page
        browser.close()
