"""What is taken out of trained networks once: kept beside their records, and read back as tables.

Figures read these tables without PyTorch; a function that needs it imports it when it is called.
"""
import hashlib
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import safetensors.numpy
from safetensors import safe_open

from .experiment import Spec, load_record, records, run_dir, write
from .features import SILENT, clamping, correct, finished_record, restore, settled

__all__ = ["AFFINE_FIELDS", "IMAGE_FIELDS", "load_once", "saved_features", "extract", "analyse", "analyse_study",
           "channels", "clamped", "settling"]

AFFINE_FIELDS = "layer", "role", "gamma", "beta"   # read from the parameters alone
IMAGE_FIELDS = "zero", "tested", "threshold", "clamped", "correct"   # measured on the test images


# Taken out of a network

@lru_cache(1)
def load_once(name: str) -> tuple:   # the data set or None, and why it is not there
    "A data set, loaded once for many runs."
    from .data import load_data
    try:
        return load_data(name), ""
    except OSError as e:
        return None, str(e)


def extract(spec: Spec, study: str = "scratch", data=None) -> dict:   # data: as `load_data` gives it; name to array
    "All features of a trained network, computed in float32; without data only gamma and beta."
    import torch
    from .data import loaders
    from .machine import default_device
    from .norms import ZeroCounter, affine_table
    device = default_device() if data else "cpu"
    model = restore(spec, study, device, torch.float32)   # rounding moves more images than small gammas do
    found = affine_table(model)
    if not data:
        return found
    if not len(found["gamma"]):   # no BatchNorm, nothing to measure
        return found | {name: found["gamma"] for name in IMAGE_FIELDS}
    batches, zeros = loaders(data, spec.batch_size, device=device)[1], ZeroCounter(model)
    hits = correct(model, batches)
    tested = np.array([len(data.test)], np.int32)
    return found | dict(zero=zeros.rates(), tested=tested, **clamping(model, batches, hits))


# Kept beside the record

def _digest(arrays: dict) -> str:
    "SHA-256 of the content of some arrays."
    h = hashlib.sha256()
    for name in sorted(arrays):
        h.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return h.hexdigest()


def saved_features(folder: Path) -> dict:   # name to array; nothing where there are none of this record
    "The features beside a record; a file that is not as it was written is named in a warning and not read."
    path = Path(folder) / "features.safetensors"
    if not path.is_file():
        return {}
    try:
        with safe_open(path, "np") as f:
            metadata, found = f.metadata() or {}, {name: f.get_tensor(name) for name in f.keys()}
        if metadata["digest"] != _digest(found) or not _fit(found):
            raise ValueError
    except Exception:
        warnings.warn(f"{path} is not as it was written; it is made again at the next analysis.")
        return {}
    return found if metadata.get("seal") == load_record(folder)["seal"] else {}


def _fit(found: dict) -> bool:
    "Whether arrays go together as those of an analysis do."
    def lengths(names): return {len(array) for name, array in found.items() if name in names}
    affine, images = {*AFFINE_FIELDS}, {*IMAGE_FIELDS}
    whole = found.keys() >= affine and (found.keys() >= images or not found.keys() & images)
    channels, thresholds = lengths((*AFFINE_FIELDS, "zero")), lengths(("threshold", "clamped", "correct"))
    plain = all(a.ndim == 1 and a.dtype.kind in "fiu" for a in found.values())
    return whole and len(channels) == 1 and len(thresholds) <= 1 and plain


def _images(spec: Spec, record: dict) -> tuple:   # the data set or None, and why it is not there
    "The images that a run was trained on; none for a run that did not end well."
    if record["status"] != "complete":
        return None, ""
    data, why = load_once(spec.data)
    if data and data.digest != record["data_digest"]:
        return None, f"the images of {spec.data} are not those it was trained on"
    return data, why


def analyse(spec: Spec, study: str = "scratch") -> Path:   # of features.safetensors
    """Take the features of a finished run out of its network, once. `FileNotFoundError` where there is no record.

    Without its images gamma and beta are kept, with a warning, and the rest is added by a later call.
    """
    record, path = finished_record(spec, study), run_dir(spec, study) / "features.safetensors"
    saved = saved_features(path.parent)
    if saved.keys() >= {*AFFINE_FIELDS, *IMAGE_FIELDS}:
        return path
    data, why = _images(spec, record)
    if why:
        warnings.warn(f"{spec.key}: no zero rates and no clamping, because {why}")
    if data or not saved.keys() >= {*AFFINE_FIELDS}:
        found = extract(spec, study, data)
        write(path, safetensors.numpy.save(found, dict(seal=record["seal"], digest=_digest(found))))
    return path


def analyse_study(study: str, say=print):   # say: called with each line of progress
    "Analyse every finished run of a study that was not analysed yet."
    complete = {*AFFINE_FIELDS, *IMAGE_FIELDS}
    todo = [r for r in records(study) if not saved_features(r["folder"]).keys() >= complete]
    for i, r in enumerate(todo, 1):
        say(f"{study}: analysing run {i} of {len(todo)}")
        analyse(Spec(**r["spec"]), study)


# Tables, each row with the spec of its run; `study` None reads all studies, and keywords such as policy=("all", "bn")
# name the runs to read

RUN_COLUMNS = [*Spec.__dataclass_fields__, "study", "images", "folder"]


def _analysed(study, only: dict):
    "Features and columns of the complete, analysed runs whose spec has one of the values named."
    for r in records(study):
        if r["status"] != "complete" or not all(r["spec"][field] in values for field, values in only.items()):
            continue
        if saved := saved_features(r["folder"]):
            yield saved, dict(r["spec"], study=r["study"], images=r["images"], folder=r["folder"])


def _stack(tables: list, columns: tuple) -> pd.DataFrame:
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    return table.reindex(columns=[*columns, *RUN_COLUMNS])


def channels(study: str|None = None, **only) -> pd.DataFrame:
    """One row for each channel of each analysed run.

    Columns: layer, role, gamma, beta, zero (NaN where unknown or without ReLU), and the spec of the run.
    """
    columns = *AFFINE_FIELDS, "zero"
    return _stack([pd.DataFrame({name: saved[name] for name in columns if name in saved}).assign(**run)
                   for saved, run in _analysed(study, only)], columns)


def clamped(study: str|None = None, **only) -> pd.DataFrame:
    """One row for each analysed run and threshold.

    Columns: threshold, share of gammas below it (%), accuracy (%), its change (points), and the spec of the run.
    """
    tables = []
    for saved, run in _analysed(study, only):
        if not len(saved.get("correct", ())):
            continue
        accuracy = 100*saved["correct"]/saved["tested"]
        row = dict(threshold=saved["threshold"].astype(float).round(6), accuracy=accuracy,
                   share=100*saved["clamped"]/len(saved["gamma"]), change=accuracy - accuracy[0])
        tables.append(pd.DataFrame(row).assign(**run))
    return _stack(tables, ("threshold", "share", "accuracy", "change"))


def _trajectory(path: Path, channels: int) -> dict:
    "What a run kept of its channels along the way; nothing, with a warning, where the file is another one."
    if not path.exists():
        return {}
    try:
        if not path.is_file():
            raise ValueError
        with safe_open(path, "np") as f:
            seen = {name: f.get_tensor(name) for name in f.keys()}
        if any(seen[name].shape != (len(seen["epoch"]), channels) for name in ("gamma", "zero")):
            raise ValueError
        return seen if seen["epoch"][-1] > 0 else {}
    except Exception:
        warnings.warn(f"{path} is not as it was written and is left out.")
        return {}


def settling(study: str|None = None, small: float = .01, **only) -> pd.DataFrame:
    """When each channel with a ReLU settled, for the runs that kept a trajectory.

    Columns: role; silent and small: since when the ReLU is silent and |gamma| below `small`, as a share of the run
    (NaN: not at its end); gamma_at_start; gamma_when_silent, at the first look at which the ReLU is silent for good
    (NaN: never), both |gamma|; and the spec of the run.
    """
    tables = []
    for saved, run in _analysed(study, only):
        seen = _trajectory(Path(run["folder"]) / "trajectory.safetensors", len(saved["role"]))
        if not seen:
            continue
        at, gamma = seen["epoch"]/seen["epoch"][-1], np.abs(seen["gamma"].astype(float))
        silent = settled(seen["zero"] > SILENT, at)
        look = np.searchsorted(at, np.nan_to_num(silent))
        when_silent = np.where(np.isnan(silent), np.nan, np.take_along_axis(gamma, look[None], 0)[0])
        table = pd.DataFrame(dict(role=saved["role"], silent=silent, small=settled(gamma < small, at),
                                  gamma_at_start=gamma[0], gamma_when_silent=when_silent))
        tables.append(table[~np.isnan(seen["zero"][-1])].assign(**run))
    return _stack(tables, ("role", "silent", "small", "gamma_at_start", "gamma_when_silent"))
