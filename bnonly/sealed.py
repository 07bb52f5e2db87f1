"""Files of tensors that a stranger may have written: sealed by a digest, and read so that a lie costs nothing.

Such a file is safetensors, with strings beside its tensors. One of the strings, `digest`, vouches for all the rest."""
import hashlib
import json
import re
from contextlib import contextmanager
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

__all__ = ["check_fields", "digest_tensors", "read_metadata", "read_sealed", "serialize", "whole_number"]

_HEADER = 2**16   # bytes of the header of a file, at most
_LONGEST = 400    # characters of one of its strings, at most
_DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
                torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
                torch.bool: "BOOL"}   # as safetensors calls them


def digest_tensors(tensors: dict, metadata: dict = {}) -> str:   # by name; metadata: of strings
    "SHA-256 of tensors and of the metadata beside them."
    h = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for n in sorted(tensors):
        t = tensors[n].detach().cpu().contiguous()
        h.update(f"{n} {t.dtype} {tuple(t.shape)}".encode())
        h.update(t.flatten().view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def serialize(metadata: dict, tensors: dict) -> bytes:
    "The file, sealed by a digest over all that is in it."
    return safetensors.torch.save(tensors, metadata | dict(digest=digest_tensors(tensors, metadata)))


def check_fields(metadata: dict, allowed):
    "`ValueError` where the fields are not those that are allowed, or one is too long."
    if odd := sorted(set(metadata) ^ set(allowed)):
        raise ValueError(f"its metadata {'lack' if odd[0] in allowed else 'have an unknown field,'} {odd[0][:40]!r}")
    if long := [k for k, v in metadata.items() if len(v) > _LONGEST]:
        raise ValueError(f"its {long[0]} is {len(metadata[long[0]]):,} characters long")


def whole_number(metadata: dict, name: str, high: int, low: int = 0) -> int:
    "The whole number of a field; `ValueError` where it is none from `low` to `high`."
    text = metadata[name]
    if not re.fullmatch(r"\d{1,19}", text, re.ASCII) or not low <= int(text) <= high:
        raise ValueError(f"{name} {text!r} is not a whole number from {low} to {high:,}")
    return int(text)


@contextmanager
def _opened(path, what, header):   # the file and its metadata; whatever goes wrong within is one `ValueError`
    path = Path(path)
    if not path.is_file(): raise FileNotFoundError(f"{path} is not a file.")
    try:
        _check_header(path, header)
        with safe_open(path, "pt") as f: yield f, f.metadata() or {}
    except OSError: raise
    except Exception as e:
        why = (str(e).strip().splitlines() or [type(e).__name__])[0][:600]
        raise ValueError(f"{path} is no {what}: {why.rstrip('.')}.") from None


def read_metadata(path: Path, what: str, check, header: int = _HEADER) -> dict:
    "What a file says, if `check` raises no `ValueError`; its seal is not looked at. Errors as of `read_sealed`."
    with _opened(path, what, header) as (_, metadata): check(metadata)
    return metadata


def read_sealed(path: Path,
                what: str,          # it should be, e.g. 'portable network'
                plan,               # function of the metadata: {name: (shape, dtype)}; `ValueError` where they lie
                header: int = _HEADER) -> tuple:   # metadata and tensors, both by name
    """What a file holds: its size and its header's are looked at first, then what it says, then shapes and types.

    Only when all of that fits are numbers read, held against the digest, and asked to be finite. `FileNotFoundError`
    where there is no file, `ValueError` in one sentence for one that is damaged or lies."""
    with _opened(path, what, header) as (f, metadata):
        expected = {n: ([*shape], _DTYPE_NAMES.get(dtype, str(dtype))) for n, (shape, dtype) in plan(metadata).items()}
        found = {n: (f.get_slice(n).get_shape(), f.get_slice(n).get_dtype()) for n in f.keys()}
        _compare(expected, found)
        tensors = {n: f.get_tensor(n).clone() for n in expected}   # what it gives is the file itself, which may change
        if metadata["digest"] != digest_tensors(tensors, {k: v for k, v in metadata.items() if k != "digest"}):
            raise ValueError("its content is not what was sealed")
        if odd := [n for n, t in tensors.items() if not t.isfinite().all()]:
            raise ValueError(f"{odd[0]} holds numbers that are not finite")
    return metadata, tensors


def _check_header(path, most):
    with open(path, "rb") as f: claim, size = int.from_bytes(f.read(8), "little"), path.stat().st_size
    if not 0 < claim <= min(size - 8, most):
        raise ValueError(f"its header claims {claim:,} bytes of {size:,}, and {most:,} is the most")


def _compare(expected, found):   # both name to (shape, dtype)
    for n in sorted({*expected, *found}):
        if expected.get(n) == found.get(n): continue
        ours, theirs = (" ".join(map(str, o[n])) if n in o else "nothing" for o in (expected, found))
        raise ValueError(f"{n[:80]!r} is {theirs} in it, and must be {ours}")
