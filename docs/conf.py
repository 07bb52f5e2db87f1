"""How `make docs` writes the pages: the notebooks as they are stored, and the modules from their docstrings, without a
network. The checkout is the folder of sources, so that links between its files lead to pages."""
import io
import re
import sys
from base64 import b64encode
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bnonly import __version__ as release   # noqa: E402, F401

project, author, copyright = "bnonly", "The bnonly developers", "the bnonly developers"
extensions = ["sphinx.ext.autodoc", "sphinx.ext.autosummary", "myst_nb"]
root_doc = "docs/index"
include_patterns = ["docs/**", "nbs/*.ipynb", "CONTRIBUTING.md", "CHANGELOG.md"]
exclude_patterns = ["docs/templates", "docs/redirect", "**.ipynb_checkpoints"]
templates_path = [str(ROOT/"docs/templates")]

nb_execution_mode = "off"
nb_ipywidgets_js = {}   # they would come from a network
nb_merge_streams = True
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "literal"   # docstrings put code between single backticks
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints = "none"   # they stand in the signature
autodoc_default_options = {"members": True}
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"
html_title = f"bnonly {release}"
html_math_renderer = "picture"
html_extra_path = ["redirect"]
html_copy_source = html_show_sourcelink = False


def beside(obj) -> list[str]:
    "The comments beside the parameters of a function or class, as fields of its docstring."
    from fastcore.docments import docments
    try: found = docments(obj, returns=True)
    except (TypeError, ValueError, OSError, AttributeError, SyntaxError): return []   # not of Python's source
    comments_of = {n: c for n, c in found.items() if isinstance(c, str) and n != "self"}
    return ["", *(f":returns: {c}" if n == "return" else f":param {n}: {c}" for n, c in comments_of.items())]


def docstring(app, what, name, obj, options, lines):
    "Add the comments, and let docstrings be text: only what stands between backticks is code."
    if what in ("function", "method", "class"): lines += beside(obj)
    for i, line in enumerate(lines):
        parts = re.split("(`[^`]*`)", line)
        lines[i] = "".join(p if p.startswith("`") else re.sub(r"([*|]|_\b)", r"\\\1", p) for p in parts)


def picture(kind):
    "What draws a formula with Matplotlib, where others would load a script; its source where Matplotlib cannot."
    def visit(self, node):
        from docutils.nodes import SkipNode
        from matplotlib.mathtext import math_to_image
        tex = " ".join(node.astext().split())
        known = re.sub(r"\\sqrt (\w)", r"\\sqrt{\1}", re.sub(r"\\[bB]igg?[lr]?\b", "", tex))   # as Matplotlib knows it
        try: math_to_image(f"${known}$", svg := io.BytesIO(), format="svg")
        except ValueError: shown = f"<code>{self.encode(tex)}</code>"
        else:
            drawn = b64encode(svg.getvalue()).decode()
            where = f"data:image/svg+xml;base64,{drawn}"
            shown = f'<img style="vertical-align: middle" alt="{self.attval(tex)}" src="{where}">'
        self.body.append(shown if kind == "inline" else f"<p>{shown}</p>")
        raise SkipNode
    return visit, None


def setup(app):
    app.connect("autodoc-process-docstring", docstring)
    app.add_html_math_renderer("picture", picture("inline"), picture("block"))
