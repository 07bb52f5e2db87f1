"What holds for the repository as a whole: layout, imports, export, parameters."
import ast
import inspect
import json
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from dataclasses import fields
from functools import lru_cache
from pathlib import Path

import pytest
from bnonly.readme import README_PARTS, readme
from bnonly.experiment import Spec, preset

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIGHT = ("checked", "experiment", "features", "analysis", "recipes", "accuracy", "accuracy_figures", "affine", "mlp",
         "mlp_figures", "regularization", "regularization_figures", "robustness", "claims", "explore", "explorer_page",
         "pages", "captions", "findings", "report", "cli")   # import no torch: tables, figures, report and command line


def cells(notebook, kind="code"):
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == kind]


def modules():
    "Module name to the number of the notebook it is exported from."
    found = {}
    for nb in NOTEBOOKS:
        for c in cells(nb):
            if m := re.match(r"#\| default_exp (\w+)", "".join(c["source"])):
                found[m[1]] = int(nb.name[:2])
    return found


MODULES = modules()


def names(source):
    "The modules of this package that some code imports, wherever in it."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("bnonly.") for a in node.names if a.name.startswith("bnonly.")}
        if not isinstance(node, ast.ImportFrom) or not (node.level or (node.module or "").split(".")[0] == "bnonly"):
            continue
        inside = (node.module or "").removeprefix("bnonly").removeprefix(".")
        found |= (
            {inside} if inside else {a.name for a in node.names if (ROOT / f"bnonly/{a.name}.py").exists()}
        )  # else the version
    return found


def imported(module):
    return names((ROOT / f"bnonly/{module}.py").read_text())


@lru_cache(None)
def level(module):
    "The number of a module's notebook; a plain module stands just above the highest one that it imports."
    return MODULES[module] if module in MODULES else max(map(level, imported(module)), default=-1) + .01


def test_notebooks_are_numbered_without_gaps_or_doubles():
    "And named as the modules that they export."
    numbered = [nb.stem for nb in NOTEBOOKS if nb.stem != "index"]
    assert [n[:3] for n in numbered] == [f"{i:02}_" for i in range(15)]
    lessons = {n[3:] for n in numbered} - set(MODULES)   # about plain modules: they export nothing
    assert lessons == {"sweep", "kernels", "explore"} and set(MODULES) < {n[3:] for n in numbered}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_only_to_lower_numbers(module):
    for other in imported(module):
        assert level(other) < level(module), f"{module} imports {other}"


def bound(path):
    "The public names that a file binds at its top level, in an `if`, `try`, `with` or loop too; imports bind none."
    found, todo = set(), list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif not isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            todo += ast.iter_child_nodes(node)
    return {n for n in found if not n.startswith("_")}


def test_no_public_name_means_two_things():
    "A function, class or constant of one module has a name that no other module binds."
    homes = {}
    for path in sorted((ROOT / "bnonly").rglob("*.py")):
        for name in bound(path):
            homes.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    assert not {n: where for n, where in homes.items() if len(where) > 1}


@pytest.mark.parametrize("notebook", [nb for nb in NOTEBOOKS if nb.stem != "index"], ids=lambda p: p.stem)
def test_lessons_import_only_from_above(notebook):
    "Its own number, what is lower, and plain modules that need nothing higher."
    for c in cells(notebook):
        source = re.sub(r"(?m)^ *[%!].*", "", "".join(c["source"]))
        assert not [n for n in names(source) if int(level(n)) > int(notebook.name[:2])], c["id"]


def test_the_readme_follows_the_notebooks_and_the_records(monkeypatch):
    "What `python -m bnonly.readme` writes: every notebook once and in order, every number as the records have it."
    monkeypatch.delenv("BNONLY_RUNS")
    for file, text in readme(ROOT).items():
        assert file.read_text() == text, f"python -m bnonly.readme writes {file.name} anew"
    for file, at in (("README.md", "nbs/"), ("nbs/index.ipynb", "")):
        listed = re.findall(rf"\| \[(\w+)\]\({at}(\w+).ipynb\) \|", (ROOT / file).read_text())
        assert listed == [(nb.stem, nb.stem) for nb in NOTEBOOKS if nb.stem != "index"], file


def test_a_notebook_that_is_not_listed_is_noticed(tmp_path):
    lessons = {"notebooks": README_PARTS["notebooks"]}
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    shutil.copy(ROOT / "README.md", tmp_path)
    shutil.copy(ROOT / "nbs/14_explore.ipynb", tmp_path / "nbs/15_more.ipynb")
    assert all("15_more" in text and file.read_text() != text for file, text in readme(tmp_path, lessons).items())
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(ValueError, match="README.md needs the lines"): readme(tmp_path, lessons)
    (tmp_path / "nbs/15_more.ipynb").write_text(json.dumps(dict(cells=[dict(source=["# more"])])))
    with pytest.raises(ValueError, match="15_more.ipynb does not open with"): readme(tmp_path, lessons)


def test_another_record_changes_the_readme(tmp_path, monkeypatch):
    "A number that follows a record is not written by hand."
    monkeypatch.setenv("BNONLY_RUNS", str(tmp_path))
    shutil.copytree(ROOT / "runs/bench", tmp_path / "bench")
    before = README_PARTS["speed"](ROOT)
    file = tmp_path / "bench/cpu,avx2.json"
    record = json.loads(file.read_text())
    record["rows"][0]["images_per_second"] = 123456
    file.write_text(json.dumps(record))
    assert "123,456" in README_PARTS["speed"](ROOT) and "123,456" not in before


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_headings_stand_in_cells_of_their_own(notebook):
    "But for the opening."
    found = ["".join(c["source"]).strip() for c in cells(notebook, "markdown")[1:]]
    assert not [t for t in found if re.search("(?m)^#+ ", t) and "\n" in t]


def test_no_definition_stands_in_two_notebooks():
    found = {}
    for nb in NOTEBOOKS:
        for c in cells(nb):
            source = "".join(c["source"]).strip()
            if re.search("(?m)^(def|class) ", source): found.setdefault(source, []).append(nb.stem)
    assert not [where for where in found.values() if len(where) > 1]


IMPORTS = """
import importlib, json, sys
for name in sys.argv[1:]:
    before = {*sys.modules}
    importlib.import_module(name)
    print(json.dumps(sorted({*sys.modules} - before)))
"""


def test_importing_bnonly_imports_nothing_else_and_tables_and_figures_do_without_torch():
    "In one fresh interpreter, one module after the other."
    names = ["bnonly", *(f"bnonly.{m}" for m in LIGHT)]
    done = subprocess.run([sys.executable, "-c", IMPORTS, *names], capture_output=True, text=True, check=True, cwd=ROOT)
    came = dict(zip(names, map(json.loads, done.stdout.splitlines()), strict=True))   # what each brought in
    assert came["bnonly"] == ["bnonly"]
    assert not [name for name in names if "torch" in came[name]]


def test_export_and_clean_change_nothing(tmp_path):
    "The modules are what the notebooks say, and the notebooks are clean."
    for name in ("nbs", "bnonly"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True, capture_output=True)
    for file in [*(tmp_path / "nbs").glob("*.ipynb"), *(tmp_path / "bnonly").glob("*.py")]:
        assert file.read_text() == (ROOT / file.relative_to(tmp_path)).read_text(), file.name
    assert len(list((tmp_path / "bnonly").iterdir())) == len(
        [f for f in (ROOT / "bnonly").iterdir() if f.name != "__pycache__"]
    )


EXECUTED = (
    "04_train",
    "07_accuracy",
    "08_affine",
    "10_mlp",
    "11_regularization",
    "12_claims",
)  # by papermill, for a study


@pytest.mark.parametrize("notebook", [ROOT / f"nbs/{name}.ipynb" for name in EXECUTED], ids=lambda p: p.stem)
def test_parameters_cells_are_tagged(notebook):
    "Without the tag papermill would inject its values above the defaults, which then win."
    tagged = [c for c in cells(notebook) if "parameters" in c["metadata"].get("tags", [])]
    assert len(tagged) == 1 and "study" in "".join(tagged[0]["source"])


def test_parameters_of_04_train_are_the_spec():
    cell = next(c for c in cells(ROOT / "nbs/04_train.ipynb") if "parameters" in c["metadata"].get("tags", []))
    given = {}
    exec("".join(cell["source"]), given)
    assert given.pop("study") == "scratch"
    assert {k: v for k, v in given.items() if not k.startswith("__")} == {f.name: f.default for f in fields(Spec)}


def test_the_readme_lists_every_variable_that_is_read():
    "In one table; a name in a docstring or a message counts as read."
    read = {name for f in (ROOT / "bnonly").glob("*.py") for name in re.findall(r"\bBNONLY_[A-Z]+\b", f.read_text())}
    listed = re.findall(r"(?m)^\| `(BNONLY_[A-Z]+)` \| [^|]+ \| [^|]+ \|$", (ROOT / "README.md").read_text())
    assert sorted(listed) == sorted(read) and len(read) > 5


def test_every_cache_lies_in_one_folder(tmp_path, monkeypatch):
    """Data sets, decoded images and kernels: where $BNONLY_CACHE says, else in the folder that the system has for
    caches."""
    from bnonly import native
    from bnonly.cache import cache_files
    from bnonly.data import data_dir
    monkeypatch.delenv("BNONLY_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    def compiles(command, **_): return Path(command[-1]).touch() or subprocess.CompletedProcess(command, 0)
    monkeypatch.delenv("BNONLY_CACHE", raising=False)
    monkeypatch.setattr(native.subprocess, "run", compiles)
    monkeypatch.setattr(native, "compiler_version", lambda compiler: "1.0")
    for name, value, where in (("XDG_CACHE_HOME", "", tmp_path / ".cache/bnonly"),
                               ("XDG_CACHE_HOME", str(tmp_path / "x"), tmp_path / "x/bnonly"),
                               ("BNONLY_CACHE", str(tmp_path / "own"), tmp_path / "own")):
        monkeypatch.setenv(name, value)
        places = [data_dir(), cache_files(Path("/elsewhere"), "cifar10")[1].parent.parent,
                  native.compile_library("g++").parent.parent]
        assert places == [where] * 3


def test_defaults_of_the_spec_never_change():
    "A run is named by what differs from these, so another default would rename finished runs."
    then = dict(
        arch="resnet14",
        policy="bn",
        data="digits",
        seed=0,
        epochs=40,
        batch_size=128,
        lr=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        decay="all",
        schedule="step",
        init="he_normal",
        bn_init="uniform",
        norm="batch",
        patience=0,
        act="relu",
        embedding_l2=0.0,
        functional_l2=0.0,
        standardize=0.0,
        dropout=0.0,
    )
    assert {f.name: f.default for f in fields(Spec)} == then


def test_committed_records_keep_their_names(monkeypatch):
    "The spec in each record still names its folder, so no finished run is trained again."
    from bnonly.experiment import records
    monkeypatch.delenv("BNONLY_RUNS")
    found = records()
    assert len(found) > 400 and not [r["folder"] for r in found if Path(r["folder"]).name != Spec(**r["spec"]).key]


def test_every_preset_can_be_read():
    "And its lists of networks are those of the figures and claims."
    from bnonly.accuracy import DEEP, VGGS, WIDE
    from bnonly.mlp import mlps
    from bnonly.selections import SMALL
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini")
    lists = {name: values.split(",") for name, values in ini.defaults().items()}
    assert (lists["deep"], lists["wide"], lists["vgg"], lists["small"]) == (DEEP, WIDE[1:], VGGS, SMALL)
    assert all(lists[f"mlps_{w}"] == mlps(w) for w in (10, 20, 40, 80, 100, 400, 784))
    sizes = {s: len(preset(s)) for s in ini.sections()}
    assert min(sizes.values()) > 0 and sizes["paper"] > 700


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_open_with_a_title_a_line_and_small_outputs(notebook):
    first, second = json.loads(notebook.read_text())["cells"][:2]
    assert re.match(r"# .+\n+> .+", "".join(first["source"])) and first["cell_type"] == "markdown"
    for c in cells(notebook):
        assert len(json.dumps(c.get("outputs", []))) < 150_000
        assert len("".join(c["source"]).splitlines()) <= 40


def shows(source):
    "Whether a cell ends in a value to see: not in a test, nor in a call that only acts."
    body = ast.parse(re.sub(r"(?m)^[%!].*", "", source)).body
    if not body or not isinstance(body[-1], ast.Expr) or source.rstrip().endswith(";"):
        return False
    call = body[-1].value.func if isinstance(body[-1].value, ast.Call) else None
    return not re.match("test_|assert_|release$", getattr(call, "id", getattr(call, "attr", "")))


@pytest.mark.parametrize("notebook", [nb for nb in NOTEBOOKS if nb.name[:2] >= "06"], ids=lambda p: p.stem)
def test_what_a_cell_shows_is_there(notebook):
    "The evidence that the prose announces is stored, so that it can be read without running anything."
    for c in cells(notebook):
        source = "".join(c["source"])
        assert c["outputs"] or re.search(r"(?m)^#\| *(export|notest)", source) or not shows(source), c["id"]


def test_public_names_have_docstrings():
    import importlib
    for module in MODULES:
        m = importlib.import_module(f"bnonly.{module}")
        for name in m.__all__:
            o = getattr(m, name)
            if inspect.isfunction(o) or inspect.isclass(o):
                assert o.__doc__ or len(inspect.getsource(o).splitlines()) <= 4, f"{module}.{name}"
