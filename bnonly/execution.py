"""A run as an executed notebook: papermill executes 04_train in the process that is there, and the result is kept.

The engine knows only what 04_train needs: the text of a cell, its last value, its figures.
"""
import ast, hashlib, json, linecache, warnings
from base64 import b64encode
from contextlib import redirect_stdout
from dataclasses import asdict
from io import BytesIO, StringIO
from pathlib import Path

from .checked import read_json
from .experiment import Spec, load_record, root, write
from .logs import quiet

__all__ = ["run_cell", "png", "papermill", "execute", "keep_notebook", "kept"]


def run_cell(source:str, name:str, space:dict) -> list:   # outputs, as nbformat has them
    "Run the code of a cell in a namespace; what it raises is raised."
    import matplotlib.pyplot as plt
    from nbformat.v4 import new_output
    tree, open_before = ast.parse(source, name), set(plt.get_fignums())
    shows = tree.body and isinstance(tree.body[-1], ast.Expr) and not source.rstrip().endswith(";")
    last = tree.body.pop() if shows else None
    linecache.cache[name] = len(source), None, source.splitlines(True), name   # so that a traceback shows the lines
    with redirect_stdout(StringIO()) as said:
        exec(compile(tree, name, "exec"), space)
        value = eval(compile(ast.Expression(last.value), name, "eval"), space) if last else None
    # a line rewritten in place, as one reads it
    text = "\n".join(l.rpartition("\r")[2] for l in said.getvalue().split("\n"))
    outputs = [new_output("stream", name="stdout", text=text)] if text else []
    if value is not None: outputs.append(new_output("execute_result", {"text/plain": repr(value)}))
    drawn = sorted(set(plt.get_fignums()) - open_before)
    return outputs + [new_output("display_data", {"image/png": png(n)}) for n in drawn]


def png(number:int) -> str:
    "A figure of pyplot as base64, and closed."
    import matplotlib.pyplot as plt
    plt.figure(number).savefig(found := BytesIO(), format="png", dpi=72, bbox_inches="tight")
    plt.close(number)
    return b64encode(found.getvalue()).decode()


def papermill():
    "Papermill, with an engine named 'here' that runs a notebook in this process."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # of papermill's own imports
        import papermill
        from papermill.engines import Engine, papermill_engines
    class Here(Engine):
        @classmethod
        def execute_managed_notebook(cls, manager, kernel_name, **_):
            space = dict(__name__="__main__", In=[""])
            for i,cell in enumerate(manager.nb.cells):
                if cell.cell_type != "code" or "lesson" in cell.metadata.get("tags", []): continue
                space["In"].append(cell.source)
                manager.cell_start(cell, i)
                cell.outputs = run_cell(cell.source, f"04_train.ipynb, cell {i+1}", space)
                manager.cell_complete(cell, i)
    papermill_engines.register("here", Here)
    return papermill


def execute(spec:Spec, study:str, threads:int=1) -> dict:   # the executed notebook
    "Train a run by executing 04_train, with a number of threads."
    import torch
    torch.set_num_threads(threads)
    with quiet():   # the sweep says how far it is
        executed = papermill().execute_notebook(root()/"nbs/04_train.ipynb", None, dict(study=study, **asdict(spec)),
                                                engine_name="here", kernel_name="python3", progress_bar=False)
    executed.metadata.papermill.input_path = "nbs/04_train.ipynb"   # wherever the project lies
    return executed


def keep_notebook(executed:dict, folder:Path):
    "Write the executed notebook of a run beside its record."
    executed.metadata["bnonly"] = dict(record=load_record(folder)["seal"], digest=_digest(executed))
    write(folder/"train.ipynb", json.dumps(executed, indent=1)+"\n")


def kept(folder:Path) -> bool:
    "Whether a run's notebook is there, as it was written, and belongs to its record."
    try:
        executed = read_json(folder/"train.ipynb")
        stamp = executed["metadata"].pop("bnonly")
        return stamp == dict(record=load_record(folder)["seal"], digest=_digest(executed))
    except (OSError, ValueError, KeyError, TypeError, AttributeError): return False


def _digest(notebook): return hashlib.sha256(json.dumps(notebook, sort_keys=True).encode()).hexdigest()
