"""Downloads that are either whole or not there."""
import shutil
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

from .archives import BrokenData, archive_files
from .logs import logger
from .readers import read_binary

BINARY = "cifar-10-binary.tar.gz"


def downloads() -> list[tuple[str, str, Callable]]:
    "Where CIFAR-10 is to be had: address, file name, and whether a file is the published one."
    import fastai.data
    from fastai.data.external import URLs
    from fastdownload.core import check, checks_module
    from torchvision.datasets import CIFAR10 as original
    from torchvision.datasets.utils import check_integrity
    return [(f"{original.url.rpartition('/')[0]}/{BINARY}", BINARY, lambda f: bool(read_binary(archive_files(f), f))),
            (original.url, original.filename, lambda f: check_integrity(f, original.tgz_md5)),
            (URLs.CIFAR, "cifar10.tgz", lambda f: check(checks_module(fastai.data), URLs.CIFAR, f))]


def fetch(url: str, file: Path, timeout: float = 30) -> Path:
    "The content of an address as a file; `OSError` or `HTTPException` where it does not come, or ends early."
    with urlopen(Request(url, headers={"User-Agent": "bnonly"}), timeout=timeout) as answer, open(file, "wb") as f:
        shutil.copyfileobj(answer, f, 2**20)
        size, came = answer.headers.get("Content-Length"), f.tell()
    if size and size.isdecimal() and int(size) != came: raise OSError(f"ended after {came:,} of {int(size):,} bytes")
    return file


def download(folder: Path, places: list[tuple], what: str = "CIFAR-10", best: str = BINARY) -> Path:
    """The first file that comes whole, put into `folder`; `FileNotFoundError` that names what each address said.

    A download goes to a folder of its own and is moved to its name when it is whole and is what was published, so that
    an interrupted one leaves nothing behind that could be taken for data."""
    failures = []
    folder.mkdir(parents=True, exist_ok=True)
    for url, name, whole in places:
        try:
            with TemporaryDirectory(dir=folder, prefix=".download") as tmp:
                logger.info("downloading %s", url)
                file = fetch(url, Path(tmp)/name)
                if not whole(file): raise OSError("not the published file")
                return file.replace(folder/name)
        except (OSError, HTTPException, BrokenData) as e:
            failures.append(f"{url} ({getattr(e, 'reason', None) or str(e) or type(e).__name__})")
    raise FileNotFoundError(f"{folder} has no {what} and it could not be downloaded from {' or '.join(failures)}; put "
                            f"{best} from there into that folder, or set BNONLY_DATA to the folder that holds it.")
