"""Deltas on the Hugging Face Hub, each with a card that says what it is and how to load it.

A repository holds two files, the delta and its card. What comes back from the Hub is the delta alone: nothing of a
stranger's card is read. `$HF_ENDPOINT` names another Hub."""
import os
import re
import tempfile
from numbers import Integral, Real
from pathlib import Path

from torch import nn

from .delta import check_base, metadata_of, save_delta, unwrapped
from .policies import counts, frozen_as

__all__ = ["FILE", "LARGEST", "model_card", "plain", "pull_delta", "push_delta"]

FILE = "delta.safetensors"
LARGEST = 2**30   # bytes of a delta, at most
_LONGEST = 300     # characters of what a card says of the data, at most


def _hub():
    try: import huggingface_hub
    except ImportError as e:
        raise ImportError(f"the Hub needs {e.name}, which is not installed; pip install 'bnonly[hub]'.") from None
    return huggingface_hub


def _endpoint(): return os.environ.get("HF_ENDPOINT") or None


def plain(text) -> str:
    "Text that neither Markdown nor HTML takes for more than text: all but letters, digits and a few signs as entities."
    words = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return "".join(c if c.isalnum() or c in " ,.-%()/" else f"&#{ord(c)};" for c in words)


CARD = """---
{front}
---

# {title}

What training changed of {base}, and nothing else: {trains} of {total} parameters, and the running statistics.

| | |
|---|---|
| base | {base} |
| policy | {policy} |
| trained | {by_role} |
| data | {data} |
| accuracy | {accuracy} |

It was made with bnonly. `model` is the base, made and loaded as before training, with as many classes:

```python
from bnonly.delta import load_delta
from bnonly.hub import pull_delta

model = load_delta(pull_delta({repo!r}), model)   # refused where `model` is another base
```

The delta is a safetensors file: no pickle, no code.
"""


def _check_repo(repo):
    from huggingface_hub.utils import validate_repo_id
    validate_repo_id(repo)   # a `ValueError`, in one sentence
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo, re.ASCII):
        raise ValueError(f"repo {repo[:80]!r} is not whose it is and its name, e.g. 'you/birds'.")


def _percent(value) -> str:
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 100:   # NaN neither
        raise ValueError(f"accuracy {value!r} is not a percentage from 0 to 100.")
    return f"{value:.4g}%"


def model_card(model: nn.Module,   # frozen, as it was trained
               repo: str,          # where the card will stand, e.g. 'you/birds'
               base: str,
               data: str,          # what it was trained and tested on, e.g. 'CUB-200, 224 pixels'
               accuracy: float,    # in percent
               n: int              # how many test images that is of
               ) -> str:
    "The card of a delta, in Markdown; `ValueError` for what nobody could have measured."
    hub, how, inside = _hub(), frozen_as(model), unwrapped(model)
    _check_repo(repo)
    if not str(data).strip() or len(str(data)) > _LONGEST:
        raise ValueError(f"data {str(data)[:40]!r} is not a description of 1 to {_LONGEST} characters.")
    if isinstance(n, bool) or not isinstance(n, Integral) or n < 1:
        raise ValueError(f"n {n!r} is not a number of test images.")
    table = _counts(inside, how["output"])
    by_role = ", ".join(f"{role} {k:,}" for role, k in table.trainable.drop("all").items() if k)
    check_base(base)
    known = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", base, re.ASCII)
    front = hub.ModelCardData(library_name="bnonly", tags=["bnonly"], **dict(base_model=base) if known else {})
    return CARD.format(
        front=front.to_yaml(), title=plain(repo.rpartition("/")[2]), repo=repo, policy=plain(how["policy"]),
        base=f"[{plain(base)}](https://huggingface.co/{base})" if known else plain(base), by_role=by_role or "nothing",
        trains=f"{table.trainable['all']:,}", total=f"{table.total['all']:,}", data=plain(data),
        accuracy=f"{_percent(accuracy)} (n = {n:,})")


def _counts(model, output):
    try: return counts(model, output)
    except ValueError: return counts(model, ())   # whose output layer cannot be told, and does not train


def push_delta(model: nn.Module,   # trained after `freeze`
               repo: str,          # 'you/birds'
               base: str,          # as `save_delta` takes it
               data: str, accuracy: float, n: int,   # as `model_card` takes them
               private: bool | None = None,
               token: str | None = None   # default: of `hf auth login`
               ) -> str:           # the address of the commit
    """Save a delta, with a card, to a repository on the Hub, which is made where there is none.

    Errors as of `save_delta` and `model_card`, and huggingface-hub's own.
    """
    hub = _hub()
    api = hub.HfApi(endpoint=_endpoint(), token=token)
    with tempfile.TemporaryDirectory() as folder:
        path = save_delta(model, Path(folder)/FILE, base)
        files = {FILE: path.read_bytes(), "README.md": model_card(model, repo, base, data, accuracy, n).encode()}
    api.create_repo(repo, private=private, exist_ok=True)
    adds = [hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in files.items()]
    return api.create_commit(repo, adds, commit_message=f"Add a delta of {base}").commit_url


def pull_delta(repo: str,
               revision: str | None = None,    # a branch, a tag or a commit; default: the newest
               token: str | None = None,
               cache_dir: Path | None = None   # default: huggingface-hub's
               ) -> Path:                      # of the file, for `load_delta`
    "Fetch a delta from the Hub; `ValueError` where there is none, or what is there is too large or no delta."
    hub, at = _hub(), dict(revision=revision, endpoint=_endpoint())
    _check_repo(repo)
    try:
        found = hub.get_hf_file_metadata(hub.hf_hub_url(repo, FILE, **at), token=token, endpoint=_endpoint())
        if not 0 < (found.size or 0) <= LARGEST:
            raise ValueError(f"the {FILE} of {repo} has {found.size or 0:,} bytes, "
                             f"and at most {LARGEST:,} are fetched.")
        at["revision"] = found.commit_hash or revision
        path = Path(hub.hf_hub_download(repo, FILE, token=token, cache_dir=cache_dir, **at))
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError, hub.errors.EntryNotFoundError):
        which = f"{repo} at {revision}" if revision else repo
        raise ValueError(f"{which} is not a repository with a {FILE}; push_delta makes one.") from None
    metadata_of(path)
    return path
