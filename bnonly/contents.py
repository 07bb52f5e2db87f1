"""The table of notebooks in the README and in the index: `python -m bnonly.contents` writes both from the notebooks.

A row is the name of a notebook and the line below its title, which stands there and is written by hand nowhere else.
"""
import json
import re
from pathlib import Path

from .experiment import root

BEGIN, END = "<!-- notebooks, written by python -m bnonly.contents -->", "<!-- end of notebooks -->"


def notebooks(folder: Path) -> dict[str, str]:
    "The numbered notebooks of a folder in reading order, name to the line below the title; `ValueError` without one."
    found = {}
    for file in sorted(Path(folder).glob("[0-9][0-9]_*.ipynb")):
        opening = "".join(json.loads(file.read_text("utf-8"))["cells"][0]["source"])
        line = re.match(r"# .+\n+> (.+)", opening)
        if not line: raise ValueError(f"{file.name} does not open with '# title' and a line '> what it is about'.")
        found[file.stem] = line[1].strip()
    return found


def table(folder: Path, at: str = "") -> str:   # at: where the links lead, e.g. 'nbs/'
    "The notebooks of a folder as a table of Markdown."
    rows = [f"| [{name}]({at}{name}.ipynb) | {line} |" for name, line in notebooks(folder).items()]
    return "\n".join(["| notebook | what it is about |", "|---|---|", *rows])


def filled(text: str, table: str, name: str) -> str:   # name: of the file, for the error
    "A text with the table between its two marks; `ValueError` where it has not exactly one pair of them."
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end or BEGIN in rest: raise ValueError(f"{name} needs the lines {BEGIN!r} and {END!r}, once each.")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def contents(project: Path) -> dict[Path, str]:
    "The README and the index of a project as they should be: file to text."
    nbs, readme, index = project / "nbs", project / "README.md", project / "nbs/index.ipynb"
    notebook = json.loads(index.read_text("utf-8"))
    for cell in notebook["cells"]:
        if BEGIN in (source := "".join(cell["source"])):
            cell["source"] = filled(source, table(nbs), index.name).splitlines(True)
    return {readme: filled(readme.read_text("utf-8"), table(nbs, "nbs/"), readme.name),
            index: json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"}


if __name__ == "__main__":
    for file, text in contents(root()).items(): file.write_text(text, "utf-8")
