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
from pathlib import Path

import pytest
from bnonly.experiment import Spec, preset

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
LIGHT = ("checked", "experiment", "features", "analysis", "recipes", "accuracy", "accuracy_figures", "affine",
         "activations", "mlp", "mlp_figures", "regularization", "regularization_figures", "robustness", "claims",
         "explore", "explorer_page", "pages", "captions", "findings", "report", "cli")   # import no torch: tables, figures, the report and the command line


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


def imported(module):
    "The modules of this package that one imports, wherever in it."
    tree = ast.walk(ast.parse((ROOT / f"bnonly/{module}.py").read_text()))
    found = [node.module or "" for node in tree if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("bnonly"))]
    return {name.removeprefix("bnonly.") for name in found} - {"", "bnonly"}   # the version is the package's own


def level(module):
    "The number of a module's notebook; a plain module stands just above the highest one that it imports."
    numbers = modules()
    return numbers[module] if module in numbers else max(map(level, imported(module)), default=-1) + .01


@pytest.mark.parametrize("module", modules())
def test_imports_point_only_to_lower_numbers(module):
    for other in imported(module):
        assert level(other) < level(module), f"{module} imports {other}"


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
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for command in ("nbdev-export", "nbdev-clean"):
        subprocess.run([Path(sys.executable).parent / command], cwd=tmp_path, check=True, capture_output=True)
    for file in [*(tmp_path / "nbs").glob("*.ipynb"), *(tmp_path / "bnonly").glob("*.py")]:
        assert file.read_text() == (ROOT / file.relative_to(tmp_path)).read_text(), file.name
    assert len(list((tmp_path / "bnonly").iterdir())) == len([f for f in (ROOT / "bnonly").iterdir() if f.name != "__pycache__"])


@pytest.mark.parametrize("notebook", [nb for nb in NOTEBOOKS if nb.name[:2] in ("04", "08", "09", "10", "11", "12") or nb.stem == "07_accuracy"], ids=lambda p: p.stem)
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


def test_defaults_of_the_spec_never_change():
    "A run is named by what differs from these, so another default would rename finished runs."
    then = dict(arch="resnet14", policy="bn", data="digits", seed=0, epochs=40, batch_size=128, lr=.1, momentum=.9,
                weight_decay=1e-4, decay="all", schedule="step", init="he_normal", bn_init="uniform", norm="batch", patience=0,
                act="relu", embedding_l2=0., functional_l2=0., standardize=0., dropout=0.)
    assert {f.name: f.default for f in fields(Spec)} == then


def test_committed_records_keep_their_names(monkeypatch):
    "The spec in each record still names its folder, so no finished run is trained again."
    from bnonly.experiment import records
    monkeypatch.delenv("BNONLY_RUNS")
    found = records()
    assert len(found) > 400 and not [r["folder"] for r in found if Path(r["folder"]).name != Spec(**r["spec"]).key]


def test_every_preset_can_be_read():
    ini = ConfigParser()
    ini.read(ROOT / "settings.ini")
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
    for module in modules():
        m = importlib.import_module(f"bnonly.{module}")
        for name in m.__all__:
            o = getattr(m, name)
            if inspect.isfunction(o) or inspect.isclass(o):
                assert o.__doc__ or len(inspect.getsource(o).splitlines()) <= 4, f"{module}.{name}"


def test_numbers_in_the_readme_come_from_records(monkeypatch):
    "Each row of the README's table of results is what the committed records say."
    from bnonly.experiment import results, summary
    monkeypatch.delenv("BNONLY_RUNS")
    found = {(r["arch"].replace("-", ""), r["policy"]): r for r in summary(results("short")).to_dict("records")}
    rows = re.findall(r"^\| (\S+) \| (\S+) \| ([\d.]+)(?: ± ([\d.]+))? \| (\d+) \|", (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 4
    for arch, policy, mean, sd, n in rows:
        r = found[arch.lower().replace("-", ""), policy]
        assert (mean, n) == (f"{r['mean']:.1f}", str(r["n"])) and (not sd or sd == f"{r['sd']:.1f}"), (arch, policy)


def test_the_readme_tells_what_the_whole_schedule_gave(monkeypatch):
    "The sentence on runs/paper, and its cell of the table, hold the ledger's numbers."
    from bnonly.claims import gather, ledger
    from bnonly.experiment import results
    monkeypatch.delenv("BNONLY_RUNS")
    found, readme, reached = ledger(gather("paper")).set_index("id"), (ROOT / "README.md").read_text(), results("paper").accuracy
    told, = re.findall(r"reaches ([\d.]+) ± [\d.]+%.* Of its gammas ([\d.]+)% .* ([\d.]+)% of its ReLUs", readme)
    for number, claim in zip(told, ("r14-bn-acc", "disabled-third", "silent-bn")):
        assert float(number) == float(found.measured[claim].split()[0]) and found.n[claim] == "3", claim
    mean, error = re.findall(r"[\d.]+", found.measured["clamp01-bn"])[:2]
    assert re.findall(r"changes by ([\d.]+) ± ([\d.]+) points", readme) == [(f"{float(mean):.2f}", f"{float(error):.2f}")]
    assert re.findall(r"n = (\d) .*ResNet-14 \| bn \| [^|]+\| 4 \| ([^|]+) \|", readme, re.S) == [("3", f"{reached.mean():.1f} ± {reached.std():.1f}")]
    assert f"reaches {reached.mean():.1f} ± {reached.std():.1f}%" in readme


def test_the_readme_tells_what_mlps_reached(monkeypatch):
    "The sentence on runs/mlp holds the ledger's numbers."
    from bnonly.claims import HENRIKSBOE, gather, ledger
    from bnonly.experiment import results
    monkeypatch.delenv("BNONLY_RUNS")
    found, readme = ledger(gather("mlp"), HENRIKSBOE).set_index("id"), (ROOT / "README.md").read_text()
    told, = re.findall(r"reaches ([\d.]+ to [\d.]+)% at 4 to 14 .*?, ([\d.]+ to [\d.]+) points above .*? LeNet-5 ([\d.]+)%", readme)
    for number, claim in zip(told, ("mlp784-95", "mlp784-random", "lenet-bn")):
        assert re.match(re.escape(number) + r"\b(?!\.)", found.measured[claim]) and found.n[claim] == "5", claim
    left, whole = map(float, *re.findall(r"only ([\d.]+) of ([\d.]+) points are left", readme))
    mean = results("mlp").query("arch == 'mlp4-784'").groupby(["policy", "norm"]).accuracy.mean()
    bn, normalized, plain = mean["gamma", "batch"], mean["scattered1", "batch"], mean["scattered1", "none"]
    assert (left, whole) == (round(bn - plain, 1), round(bn - normalized, 1))


def test_the_kernels_learn_as_well_as_pytorch(monkeypatch):
    "ResNet-14, BatchNorm only, 16 epochs of CIFAR-10 (JPEG): the committed runs of both agree within one standard error, those with tiles of 4x4 in float32 within two."
    from statistics import mean, variance
    from bnonly.experiment import records
    monkeypatch.delenv("BNONLY_RUNS")
    spec = lambda r: Spec(arch="resnet14", policy="bn", data="cifar10", epochs=16, seed=r["spec"]["seed"]).__dict__
    reached = lambda *studies: [r["final"]["accuracy"] for s in studies for r in records(s) if r["spec"] == spec(r)]
    pytorch = reached("plain", "plain16")
    for ours, errors in ((reached("fused", "short"), 1), (reached("tiles"), 1), (reached("tiles4"), 2), (reached("halves"), 1)):
        assert min(len(pytorch), len(ours)) >= 4
        assert abs(mean(pytorch) - mean(ours)) <= errors * (variance(pytorch)/len(pytorch) + variance(ours)/len(ours))**.5
