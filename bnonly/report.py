"""A study as a small site: its verdict, figures, claims, runs and settings, and the notebooks that made it.

It opens from no network, on a screen, a phone or paper, and can be copied as it is.
"""
import hashlib
import json
import re
import warnings
from contextlib import suppress
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from .captions import TABLES, described, pictures, stand_ins
from .checked import read_bytes
from .experiment import (Spec, choose, parse_arch, preset, presets, records, results, root, runs_dir, section,
                         write)
from .findings import RULE, RULE_OF_COMPARISONS, accuracies, claims_table, comparisons, headline, one_sentence
from .pages import as_table, notebook_cells, render

MAIN = "short"   # the study that notebooks of the main paper show where nobody names another

# -------- which pages there are


@lru_cache(256)
def _default_study(file: Path, changed: int) -> str|None:
    "The study that a notebook names in its parameters, '' where it names none; None with a warning for no notebook."
    found = ""
    import nbformat
    try:
        nbformat.validate(notebook := json.loads(read_bytes(file)))
        for cell in notebook["cells"]:
            if "parameters" in (cell["metadata"].get("tags") or []):
                named = re.search(r'^study.*?= *"([\w-]+)"', "".join(cell["source"]), re.M)
                found = named[1] if named else found
        return found
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError, nbformat.ValidationError) as e:
        why = (str(e).splitlines() or [""])[0]
        warnings.warn(f"{file} is not a notebook and is left out ({type(e).__name__}: {why})")


def notebooks() -> dict[str, str]:
    "The project's notebooks in reading order, name to the study that each draws by itself, '' if it draws none."
    files = [f for f in sorted((root() / "nbs").glob("*.ipynb")) if re.fullmatch(r"\d\d_\w+|index", f.stem)]
    studies = {f.stem: _default_study(f, f.stat().st_mtime_ns) for f in files}
    return {name: study for name, study in studies.items() if study is not None}


def drawing(study: str) -> list[str]:
    "The notebooks that draw a study: those whose own study has the same first word in its name, else the main ones."
    own = {name: s for name, s in notebooks().items() if s not in ("", "scratch")}
    first = study.partition("-")[0]
    same = [n for n, s in own.items() if s != MAIN and s.partition("-")[0] == first]
    return same or [n for n, s in own.items() if s == MAIN]


def pages(study: str) -> dict[str, str]:
    "Name of each page of a report to its title, in reading order."
    drawn, lessons = drawing(study), [n for n in notebooks() if n != "index"]
    return (dict(index="Overview", figures="Figures", claims="Claims", runs="Every run", settings="Settings")
            | {n: n for n in drawn} | dict(article="How to read it") | {n: n for n in lessons if n not in drawn})


def page(template: str, study: str, here: str, title: str, **values) -> Path:
    "Write a page of a study's report."
    headings = {"index": "The study", "article": "How it is made", **{n: "With their text" for n in drawing(study)[:1]}}
    text = render(template, study=study, here=here, title=title, pages=pages(study), headings=headings, **values)
    return write(runs_dir() / study / "report" / f"{here}.html", text)


# -------- what a study has


def finished_records(study: str) -> list[dict]:
    "Its records; `ValueError` where no run has finished."
    if not (found := records(study) or records(choose("study", study, presets()))):
        raise ValueError(f"study {study!r} has no finished run; train it first: bnonly study {study}.")
    return found


def claims(study: str):
    "Measure the paper's claims on a study, as `bnonly.claims.ledger` gives them, and write claims.csv and claims.html."
    from .claims import claims_of, gather, keep_ledger, ledger, tally
    finished_records(study)
    found = ledger(gather(study), claims_of(study))
    keep_ledger(found, study)
    page("claims.html", study, "claims", f"The paper's claims: {study}", rule_of_claims=RULE, tally=tally(found),
         claims=claims_table(found))
    return found


def unmeasured(study: str) -> list[dict]:
    "The planned runs that have no record, each with its state and the error of one that failed."
    from .sweep import failure, state
    measured = {Path(r["folder"]).name for r in records(study)}
    left = [s for s in preset(study) if s.key not in measured]
    return [dict(run=s.key, state=state(s, study), error=failure(s, study, "error") or "") for s in left]


def settings(study: str) -> str:
    "The section of settings.ini that made the study, its lists written out; a comment where there is none."
    if study not in presets():
        return f"# {study} has no section in settings.ini: its runs were trained one by one"
    lines = [f"{field} = {values}".replace("\n", "\n    ") for field, values in section(study).items()]
    return "\n".join([f"[{study}]", *lines]).replace(" = \n", " =\n")


def recipe(study: str):
    "Every setting of the runs, those that settings.ini leaves at their defaults too, and what they were trained with."
    import pandas as pd
    sealed = records(study)
    few = lambda values: ", ".join(map(str, sorted(values, key=str))) if len(values) < 7 else f"{len(values)} of them"
    rows = {n: few({r["spec"][n] for r in sealed}) for n in Spec.__dataclass_fields__}
    machine = "processor", "device", "cores", "threads", "python", "torch", "fastai", "numpy", "bnonly"
    rows |= {n: few({r["machine"].get(n, "") for r in sealed} - {""}) for n in machine}
    return pd.DataFrame(rows.items(), columns=["setting", "in these runs"])


# -------- the pages

FIRST = "fig02", "fig01", "fig_mlp3"   # the first of them that a study has opens its report; else its first figure


def overview(study: str, found=None) -> Path:
    "Write the first page; `found` as `claims` gives it."
    from .claims import tally
    from .recipes import other_recipes
    found = claims(study) if found is None else found
    table, sealed, plan, left = results(study), records(study), preset(study), unmeasured(study)
    drawn = pictures(runs_dir() / study / "figures")
    first = sorted(drawn, key=lambda f: FIRST.index(f.stem) if f.stem in FIRST else len(FIRST))
    compared, numbers = comparisons(plan, table), accuracies(table)
    hosts = {f"{r['machine'].get('device')} ({r['machine'].get('processor')}, {r['dtype']})" for r in sealed}
    counts = dict(runs=len(left), planned=len(plan), failed=sum(bool(r["error"]) for r in left))
    return page(
        "overview.html", study, "index", f"bnonly: {study}", verdict=one_sentence(table, compared, found),
        headline=headline(found, study), figures=len(drawn), missing=counts if left else None,
        made_of=f"{len(table)} runs, {table.seconds.sum()/60:.0f} minutes of training on {'; '.join(sorted(hosts))}.",
        besides=other_recipes(table) if drawing(study) == drawing(MAIN) else "",   # other papers show other recipes
        figure=described(first[0], stand_ins(table)) if first else None,
        accuracy=as_table(numbers, numbers=[c for c in numbers if c != "arch"], digits="{:g}"),
        comparisons=as_table(compared, ("first", "second"), ("here",)) if len(compared) else None,
        rule_of_comparisons=RULE_OF_COMPARISONS, tally=tally(found), rule_of_claims=RULE,
        claims=claims_table(found, every=False))


FRONT = "arch", "policy", "seed", "accuracy"   # columns of the table of runs that come first and stay


def runs_page(study: str) -> Path:
    "Write the page of every run, to sort and filter, without the columns that are the same for all."
    import pandas as pd
    table, left = results(study), unmeasured(study)
    write(runs_dir() / study / "report" / "runs.csv", table.drop(columns="folder").to_csv(index=False))
    rows = table.drop(columns=["study", "folder", "epoch"], errors="ignore")
    rows = rows.sort_values(["arch", "policy", "seed"], key=lambda c: c.map(parse_arch) if c.name == "arch" else c)
    differ = [c for c in rows if c not in FRONT and rows[c].nunique(dropna=False) > 1]
    alike = [c for c in ("images", "epochs", "status") if c in rows and c not in differ]
    return page("runs.html", study, "runs", f"Every run: {study}",
                same=", ".join(f"{c} {rows[c].iloc[0]}" for c in alike) if len(rows) else "",
                runs=as_table(rows[[c for c in FRONT if c in rows] + differ], digits="{:.4g}"),
                unmeasured=as_table(pd.DataFrame(left)) if left else None)


def figures_page(study: str) -> Path:
    "Write the page of all figures and tables, and copy them beside it."
    import pandas as pd
    source, copies = runs_dir() / study / "figures", runs_dir() / study / "report" / "figures"
    copies.mkdir(parents=True, exist_ok=True)
    for file in source.glob("*.*"):
        if file.suffix in (".png", ".svg", ".csv") and file.is_file():
            write(copies / file.name, file.read_bytes())
    instead, tables = stand_ins(results(study)), []
    for name, title in TABLES.items():
        if not (file := source / f"{name}.csv").is_file():
            continue
        try:
            tables.append(dict(name=name, title=title, table=as_table(pd.read_csv(file))))
        except ValueError as e:
            warnings.warn(f"{file} cannot be read as a table: {e}")
    return page("figures.html", study, "figures", f"Figures: {study}", tables=tables,
                figures=[f for f in (described(p, instead) for p in pictures(source)) if f])


def site(study: str) -> Path:
    "Write every page of a report but those of the executed notebooks; the page to open."
    figures_page(study)
    runs_page(study)
    page("settings.html", study, "settings", f"Settings: {study}", settings=settings(study),
         recipe=as_table(recipe(study)))
    for name in notebooks().keys() - set(drawing(study)):
        here = "article" if name == "index" else name
        page("notebook.html", study, here, here, cells=notebook_cells(root() / "nbs" / f"{name}.ipynb", code=True))
    return overview(study)


# -------- making them


def execute_notebook(notebook: str, study: str) -> Path:
    "Execute a notebook for a study, and keep the copy. A cell that fails raises, and what ran until then is kept."
    out = runs_dir() / study / "notebooks" / f"{notebook}.ipynb"
    out.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(action="ignore"):   # of papermill's own imports
        import papermill
        papermill.execute_notebook(root() / "nbs" / f"{notebook}.ipynb", out, dict(study=study), kernel_name="python3",
                                   progress_bar=False, extra_arguments=["--log-level=40"])
    return out


def inputs(study: str) -> str:
    "A digest of everything a report is made from."
    h = hashlib.sha256(settings(study).encode())
    for r in records(study):
        h.update(r["seal"].encode())
    h.update(json.dumps(unmeasured(study)).encode())
    code = [f for f in (*files("bnonly").iterdir(), *(files("bnonly") / "site").iterdir()) if f.is_file()]
    for file in sorted([*(root() / "nbs").glob("*.ipynb"), *code], key=str):
        with suppress(OSError, ValueError):   # no file of ours
            h.update(read_bytes(file))
    return h.hexdigest()


def figures(study: str, say=print) -> Path:
    "Draw every figure of a study by executing the notebooks that draw; their folder. `say` is called with progress."
    from .analysis import analyse_study
    finished_records(study)
    todo = drawing(study)
    if "08_affine" in todo:
        analyse_study(study, say)
    for i, name in enumerate(todo, 1):
        say(f"{study}: executing {name} ({i} of {len(todo)} notebooks)")
        page("notebook.html", study, name, name, cells=notebook_cells(execute_notebook(name, study)))
    return runs_dir() / study / "figures"


def report(study: str, say=print) -> Path:
    "Draw the figures of a study and write its report; the page to open. What has not changed is not made again."
    folder, digest = runs_dir() / study / "report", inputs(study)
    made = folder / "inputs.sha256"
    whole = all((folder / f).exists() for f in ("figures", made.name, *(f"{n}.html" for n in pages(study))))
    if not whole or not made.is_file() or made.read_bytes() != digest.encode():
        figures(study, say)
        site(study)
        write(made, digest)
    return folder / "index.html"
