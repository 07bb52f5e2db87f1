"The pages of `make docs`: each notebook and module has one, and no link of theirs leads nowhere."
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[1]
HELD = "bnonly", "docs", "nbs", "CHANGELOG.md", "CONTRIBUTING.md"
FOREIGN = re.compile("https?://|data:|mailto:|javascript:")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The pages, from a copy of what they are made of."
    for needed in ("sphinx", "myst_nb", "furo"):
        if not find_spec(needed): pytest.skip(f"{needed} is not installed: pip install 'bnonly[docs]'")
    project, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("pages")
    for name in HELD:
        if (ROOT / name).is_file(): shutil.copy(ROOT / name, project)
        else: shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__", "api"))
    how = "--quiet --builder html --conf-dir docs".split()
    command = [sys.executable, "-m", "sphinx", *how, ".", str(out / "html")]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return out / "html"


def targets(page):
    "What a page may be entered at, and what it leads to or shows."
    text = page.read_text("utf-8")
    links = re.findall(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"', text)
    return set(re.findall(r'\bid="([^"]+)"', text)), links


def test_every_notebook_and_module_has_a_page(site):
    modules = {f.stem for f in (ROOT / "bnonly").glob("*.py") if not f.stem.startswith("_")}
    assert {f"bnonly.{m}" for m in modules} <= {f.stem for f in (site / "docs/api").glob("*.html")}
    assert {f.stem for f in (ROOT / "nbs").glob("*.ipynb")} == {f.stem for f in (site / "nbs").glob("*.html")}
    words = re.sub("<[^>]+>", "", (site / "docs/api/bnonly.models.html").read_text())
    assert "create_model" in words and "resnet56" in words   # a parameter's comment


def test_no_link_leads_nowhere(site):
    "To a file of the pages, and where it names a place in a page, to that place."
    made = "genindex.html", "py-modindex.html", "search.html"   # by Sphinx, with links that a script fills in
    pages = {p: targets(p) for p in site.rglob("*.html") if p.name not in made}
    broken = []
    for page, (_, links) in pages.items():
        for link in links:
            if FOREIGN.match(link): continue
            path, _, anchor = unquote(link).partition("#")
            file = (page.parent / path.partition("?")[0]).resolve() if path else page
            if not file.is_file() or anchor and file in pages and anchor not in pages[file][0]:
                broken.append(f"{page.relative_to(site)}: {link}")
    assert len(pages) > 60 and not broken


def test_the_pages_ask_no_network(site, page):
    "A notebook with formulas and figures, the modules and the search, each with the navigation."
    figures = next(f for f in (site / "nbs").glob("*accuracy.html"))
    formulas = next((site / "nbs").glob("*kernels.html"))
    named = (site / "docs" / name for name in ("index.html", "api/bnonly.models.html"))
    for file in (*named, site / "search.html", figures, formulas):
        page.goto(file.as_uri())
        assert page.locator(".sidebar-tree a").count() > 20, file.name
        page.evaluate("[...document.images].forEach(i => i.loading = 'eager')")
        page.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert "\\frac" not in page.inner_text("article")   # a formula that could not be drawn
    page.goto((site / "index.html").as_uri())
    page.wait_for_url("**/docs/index.html")
    assert not page.left and not page.errors
