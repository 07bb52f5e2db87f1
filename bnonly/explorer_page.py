"""The explorer as a page: Voila executes its notebook of two cells for each visitor.

Voila's templates load icons from a network, so the package has one that leaves them out.
"""
import os
import socket
import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec

from .experiment import runs_dir

__all__ = ["serve_explorer", "stop_server", "is_free"]


def is_free(port: int) -> bool:
    "Whether a server could listen on a port of this machine."
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name == "posix")   # as the server does
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _check(port: int):
    if not find_spec("voila"):
        raise ValueError("explore needs Voila; pip install 'bnonly[explore]', or open nbs/14_explore.ipynb in "
                         "JupyterLab.")
    if not 1 <= port <= 65535:
        raise ValueError(f"port {port} does not exist; it must be between 1 and 65535, as 8866 is.")
    if not is_free(port):
        others = filter(is_free, (*range(port, 65536), *range(8866, port)))
        raise ValueError(f"port {port} is not free; the next that is free is {next(others, 'none')}.")


def stop_server(server: subprocess.Popen, seconds: float = 1):
    "End a server, kindly at first. Its kernels end when it is gone."
    server.terminate()
    try:
        server.wait(seconds)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def serve_explorer(port: int = 8866, wait: bool = True) -> subprocess.Popen:   # wait: until Ctrl-C
    """Serve the explorer at http://127.0.0.1:<port>.

    `ValueError` for a port that is not free, or without Voila; `RuntimeError` where the server fails.
    """
    _check(port)
    package = files("bnonly")
    command = [sys.executable, "-m", "voila", package/"voila/explorer.ipynb", "--template=offline", "--no-browser",
               f"--port={port}", "--Voila.ip=127.0.0.1"]
    paths = os.pathsep.join(filter(None, [str(package), os.environ.get("JUPYTER_PATH")]))
    variables = dict(JUPYTER_PATH=paths, BNONLY_RUNS=str(runs_dir().absolute()))
    server = subprocess.Popen(command, env=os.environ | variables)   # its kernel works in the notebook's folder
    if not wait:
        return server
    print(f"the explorer is at http://127.0.0.1:{port}; Ctrl-C ends it")
    try:
        if code := server.wait():
            raise RuntimeError(f"Voila ended with exit code {code}; what it said is above.")
    finally:
        stop_server(server)
    return server
