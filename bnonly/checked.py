"Files that somebody else may have written: read with care, or refused in one sentence."
import json
import math
import os
import stat
from io import BytesIO
from pathlib import Path

import pandas as pd

_LARGEST = 64 * 2**20   # bytes of a file that is read whole


def read_bytes(path: Path) -> bytes:
    "The content of a regular file; `ValueError` for a folder, a pipe or a device, and for a file that is too large."
    file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))   # a pipe would wait
    with open(file, "rb") as f:
        about = os.fstat(file)
        if not stat.S_ISREG(about.st_mode):
            raise ValueError(f"{path} is not a file")
        if about.st_size > _LARGEST:
            raise ValueError(f"{path} has {about.st_size:,} bytes, and at most {_LARGEST:,} are read")
        return f.read()


def _integer(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**63:
        raise ValueError(f"the number {text[:12]}... does not fit into 64 bits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:12]} is not finite")
    return value


DEEPEST = 50   # of values within values


def _depth(value) -> int:
    "How deeply a value is nested."
    level, depth = [value], 0
    while level:
        level = [v for o in level if isinstance(o, (dict, list)) for v in (o.values() if isinstance(o, dict) else o)]
        depth += 1
    return depth


def read_json(path: Path):
    """The value of a JSON file whose numbers are finite.

    `FileNotFoundError` where there is none, `ValueError` in one sentence where it is anything else.
    """
    try:
        value = json.loads(read_bytes(path), parse_int=_integer, parse_float=_finite, parse_constant=_finite)
        if _depth(value) > DEEPEST:
            raise RecursionError
        return value
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply") from None
    except ValueError as e:
        raise ValueError(str(e) if str(path) in str(e) else f"{path} cannot be read as JSON: {e}") from None


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _each(kind):
    "Whether a value is a dictionary of values of a kind, under names."
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and kind(v) for k, v in value.items())


def _text(value) -> bool:
    return isinstance(value, str)


def _scalar(value) -> bool:
    return value is None or isinstance(value, (str, bool)) or _number(value)


def _texts(value) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _metric(value) -> bool:
    return value is None or _number(value)   # of a run that diverged


def _label(value) -> bool:
    "Whether a figure can show a text as it is: a short line, and no formula."
    return isinstance(value, str) and value.isprintable() and len(value) <= 200 and value.count("$") < 2


SHAPE = dict(spec=_each(_scalar), status=_text, final=_each(_metric), counts=_each(_number), images=_label,
             data_digest=_text, shape=_each(_scalar), dtype=_text, seconds=_number, callbacks=_texts,
             machine=_each(_scalar), files=_each(_text), seal=_text)   # field of a record to what its value must be
PERCENT = "accuracy", "top5", "dropped"   # metrics


def odd_record(record) -> str:
    "What of a record nobody could have measured or written, in a few words; '' where nothing is."
    if not isinstance(record, dict):
        return f"it is a {type(record).__name__} and no record"
    for name, fits in SHAPE.items():
        if name in record and not fits(record[name]):
            return f"its {name!r} has another shape than a record's"
    if not 0 <= record.get("seconds", 0) < 1e10:
        return f"it took {record['seconds']:g} seconds"
    for name in record.get("files", ()):
        if name != Path(name).name or name in (".", ".."):
            return f"it names the file {name!r}, which is not beside it"
    for name in PERCENT:
        if not 0 <= (value := record.get("final", {}).get(name) or 0) <= 100:
            return f"its {name} is {value:g}%"
    return ""


SAID = "spec", "status", "images", "dtype", "seconds", "counts", "machine", "files"   # by every record of a run


def lacking(record: dict) -> str:
    "What a record does not say although every run's does; '' where it says all."
    lacks = [name for name in SAID if name not in record]
    lacks += [name for name in ("arch", "policy", "data", "seed") if name not in record.get("spec", {})]
    done = record.get("status") == "complete"
    if done and not _number(record.get("final", {}).get("accuracy")):
        lacks.append("accuracy")
    return ", ".join(lacks)


def read_metrics(folder: Path) -> pd.DataFrame:
    "The metrics of every epoch of a run, all of them numbers; `ValueError` in one sentence where they are not."
    path = Path(folder) / "metrics.csv"
    try:
        table = pd.read_csv(BytesIO(read_bytes(path)))
        if not {"epoch", "accuracy"} <= set(table) or not all(map(pd.api.types.is_numeric_dtype, table.dtypes)):
            raise ValueError("it is not a table of numbers")
        return table
    except (OSError, ValueError, OverflowError) as e:
        raise ValueError(f"{path} cannot be read as metrics: {e}") from None
