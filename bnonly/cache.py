"""Images that were decoded once, kept as one file of tensors which is mapped into memory at the next start.

Processes that read the same file share the memory it takes. The file lies beside the data, or in the folder of caches
where the data may not be written to; there its name holds a digest of the data's folder, because another folder may
hold other pixels under the same name."""
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .archives import walk
from .experiment import cache_dir


def cache_files(folder: Path, name: str) -> tuple[Path, Path]:
    "Where a cache may lie: beside the data, or in the folder of caches."
    other = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
    return folder/"cache"/f"{name}.safetensors", cache_dir()/"cache"/f"{name}-{other}.safetensors"


def stamp(source: Path) -> str:
    "Size and time of a file, or of all files below a folder with their names; another where one is replaced or moved."
    if not source.exists(): return ""
    if source.is_file(): return f"{source.stat().st_size} {int(source.stat().st_mtime)}"
    sha = hashlib.sha256()
    for path in walk(source):
        try: status = os.stat(path)
        except OSError: continue   # a link to nothing
        sha.update(os.fsencode(os.path.relpath(path, source)))
        sha.update(f" {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
    return sha.hexdigest()[:32]


def _seal(about: dict) -> str: return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def save_cache(tensors: dict, about: dict, source: Path, before: str, name: str) -> Path | None:
    """Store tensors and what `about` says of them (label, stats, digest) in the first place that can be written to.

    `before` is the source's stamp before it was read, so that a change meanwhile is noticed at the next start."""
    about = dict(about, source=source.name, stamp=before)
    for file in cache_files(source.parent, name):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=file.parent, prefix=".") as tmp:
                save_file(tensors, f"{tmp}/{file.name}", dict(about=json.dumps(about), seal=_seal(about)))
                # there are file systems without permissions
                with suppress(OSError): os.chmod(f"{tmp}/{file.name}", 0o644)
                os.replace(f"{tmp}/{file.name}", file)
            return file
        except (OSError, SafetensorError): pass
    warnings.warn(f"{file} could not be written, so {name} is decoded again at the next start; "
                  "free space or allow writing there.")


def read_cache(file: Path, folder: Path, digest: Callable, first: str | None = None) -> tuple[dict, dict] | None:
    """The tensors in a cache and what is said of them; None where there is no cache, or no longer a good one.

    `folder` holds its source, `digest` computes that of its tensors, which must be the one that was stored, and `first`
    names the source that counts, if one is there. A cache that was cut off or edited, or whose source has changed
    since, is named in a warning."""
    if not file.exists(): return None
    try:
        with safe_open(file, "pt") as f:
            about, sealed = json.loads(f.metadata()["about"]), f.metadata()["seal"]
            tensors = {k: f.get_tensor(k) for k in f.keys()}
        if (digest(tensors), _seal(about)) != (about["digest"], sealed): raise ValueError
        source = folder/about["source"]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return warnings.warn(f"{file} is cut off or was edited; it is built again from its source.")
    if first not in (None, source.name): return None   # made from a copy, when the original was not there yet
    if not source.exists() or stamp(source) == about["stamp"]: return tensors, about
    if about["stamp"]: warnings.warn(f"{source} changed since {file} was made from it; the cache is built again.")
    return None   # without a word where it has no stamp, as those of folders once had none
