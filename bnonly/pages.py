"""Pages that hold what others may have written: templates that escape, tables, and notebooks made harmless.

A page carries a content security policy that lets only this package's own style and script act, so that markup which
slipped through would still do nothing. Only `harmless` and `highlighted` make HTML out of text; all other text is
escaped by the templates of `bnonly/site/`.
"""
import re
from base64 import b64encode
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

SITE = files("bnonly") / "site"

# -------- tables


class Column(NamedTuple):
    "The head of a column."
    name: str
    number: bool = False    # stands to the right
    verdict: bool = False   # gets a mark and a colour


class Table(NamedTuple):
    "A table as the templates take it."
    columns: list   # of Column
    rows: list      # of lists of str


def cell_in_words(value, digits: str) -> str:
    "A cell: nothing for what is missing, and a number as `digits` says."
    if value is None or isinstance(value, float) and value != value:
        return ""
    return digits.format(value) if isinstance(value, float) else str(value)


def as_table(frame: pd.DataFrame, numbers=(), verdicts=(), digits: str = "{:.2f}") -> Table:
    "A table of a DataFrame; columns of numbers, and those named in `numbers`, stand to the right."
    columns = [Column(str(c), c in numbers or pd.api.types.is_numeric_dtype(frame[c]), c in verdicts) for c in frame]
    rows = frame.astype(object).itertuples(index=False)
    return Table(columns, [[cell_in_words(v, digits) for v in row] for row in rows])


_VERDICT_KINDS = {"reproduced": "yes", "holds": "yes", "not reproduced": "no", "does not hold": "no", "reversed": "no",
                  "undecided": "open", "not told apart": "open"}   # how a verdict begins to what it comes to
MARKS = dict(yes="✓", no="✗", open="?", none="–")


def verdict_kind(verdict: str) -> str:
    "What a verdict comes to: yes, no, open, or none where nothing was measured."
    return next((kind for words, kind in _VERDICT_KINDS.items() if verdict.startswith(words)), "none")


# -------- pages


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


@lru_cache
def style() -> str:
    "The style of all pages, of code in two colour schemes too."
    from pygments.formatters import HtmlFormatter
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    own = (SITE / "style.css").read_text(encoding="utf-8")
    return f"{own}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


@lru_cache
def script() -> str:
    "The script of all pages."
    return (SITE / "script.js").read_text(encoding="utf-8")


def policy() -> str:
    "What a page may do: show pictures from beside it, in its own style, with its own script; nothing else."
    return (f"default-src 'none'; img-src 'self' data:; style-src {_hash(style())}; script-src {_hash(script())}; "
            "base-uri 'none'; form-action 'none'")


@lru_cache
def environment() -> Environment:
    "The templates of `bnonly/site/`; what is put into them is escaped."
    env = Environment(loader=FileSystemLoader(str(SITE)), autoescape=True, undefined=StrictUndefined,
                      trim_blocks=True, lstrip_blocks=True)
    env.filters.update(verdict_kind=verdict_kind, verdict_mark=lambda verdict: MARKS[verdict_kind(verdict)])
    return env


def render(template: str, **values) -> str:
    "A template of `bnonly/site/` with values; a whole page where it extends base.html."
    own = dict(style=Markup(style()), script=Markup(script()), policy=policy())   # files of this package
    return environment().get_template(template).render(**own, **values)


# -------- notebooks

TAGS = {"a", "abbr", "b", "blockquote", "br", "code", "dd", "del", "div", "dl", "dt", "em", "h1", "h2", "h3", "h4",
        "h5", "h6", "hr", "i", "img", "li", "ol", "p", "pre", "small", "span", "strong", "sub", "sup", "table",
        "tbody", "td", "th", "thead", "tr", "ul"}
ATTRIBUTES = {"class", "id", "href", "title", "src", "alt", "width", "height", "colspan", "rowspan"}
LINK = re.compile(r"https?://|mailto:|#|(?!//)[\w./%-]+(#|$)")   # how a link may begin
PICTURE = re.compile(r"data:image/(png|jpeg|gif);base64,[A-Za-z0-9+/=\s]*$")


def _allowed(tag: str, name: str, value: str) -> bool:
    if name == "href":
        return tag == "a" and bool(LINK.match(value))
    if name == "src":
        return tag == "img" and bool(PICTURE.match(value))
    return name in ATTRIBUTES


def harmless(markup: str) -> Markup:
    "HTML that somebody else wrote, without anything that acts: scripts, styles, forms, frames, handlers, odd links."
    from bleach import clean
    if re.search(r"<\s*(script|style)", markup, re.I):   # whose text is nothing to read either
        from bs4 import BeautifulSoup
        soup = BeautifulSoup(markup, "html.parser")
        for element in soup.find_all(["script", "style"]):
            element.decompose()
        markup = str(soup)
    return Markup(clean(markup, TAGS, _allowed, ["http", "https", "mailto", "data"], strip=True))


def highlighted(code: str) -> Markup:
    "Python as HTML, in colours."
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer
    return Markup(highlight(code, PythonLexer(), HtmlFormatter()))


def markdown(text: str) -> Markup:
    "The text of a notebook as HTML, whose links lead to the report's pages."
    from nbconvert.filters import markdown2html
    html = re.sub(r'href="(?:\./)?index\.ipynb', 'href="article.html', str(harmless(markdown2html(text))))
    return Markup(re.sub(r'href="([\w./-]+)\.ipynb', r'href="\1.html', html))


def output(out: dict) -> dict|None:
    "What an output of a cell shows: a picture, HTML or text; None of a widget."
    from nbconvert.filters import strip_ansi
    data = out.get("data", {})
    if "application/vnd.jupyter.widget-view+json" in data:
        return None
    for kind in ("png", "jpeg"):
        source = f"data:image/{kind};base64,{''.join(str(data.get(f'image/{kind}', '')).split())}"
        if f"image/{kind}" in data and PICTURE.match(source):
            return dict(kind="picture", shown=source, alt=str(data.get("text/plain", "")))
    if "text/html" in data:
        return dict(kind="html", shown=harmless(str(data["text/html"])))
    if "text/markdown" in data:
        return dict(kind="html", shown=markdown(str(data["text/markdown"])))
    text = "\n".join(out["traceback"]) if out.get("output_type") == "error" else out.get("text", data.get("text/plain"))
    return None if text is None else dict(kind="text", shown=strip_ansi(str(text)))


def notebook_cells(notebook: Path, code: bool = False) -> list[dict]:
    "The cells of a notebook, executed or as stored, for the template notebook.html; with its code or without."
    import nbformat
    from .checked import read_bytes
    found = []
    for cell in nbformat.reads(read_bytes(notebook).decode(), 4).cells:
        if cell.cell_type == "markdown" and cell.source.strip():
            found.append(dict(text=markdown(cell.source), code="", outputs=[]))
        if cell.cell_type != "code" or not (source := re.sub(r"(?m)^#\|.*\n?", "", cell.source)).strip():
            continue
        outputs = [o for o in map(output, cell.outputs) if o]
        if code or outputs:
            found.append(dict(text="", code=highlighted(source) if code else "", outputs=outputs))
    return found
