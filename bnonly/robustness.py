"""Robustness: the accuracy of trained networks on the corrupted images of CIFAR-10-C, kept beside their records."""
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from .experiment import Spec, load_record, run_dir, write

__all__ = ["robustness", "with_robustness", "evaluate_robustness"]


def robustness(spec: Spec, study: str = "scratch", data=None) -> pd.DataFrame:
    """How well a trained network does under each corruption, kept as robustness.csv beside its record.

    One row a corruption, one column a severity: accuracy (%). data: as `load_data("cifar10-c")` gives it, to share it
    between runs. `FileNotFoundError` where there is no record or no CIFAR-10-C.
    """
    import torch
    from .data import load_data, loaders
    from .features import restore
    from .machine import default_device
    from .readers import CORRUPTIONS, SEVERITIES
    model = restore(spec, study, default_device())
    data = data or load_data("cifar10-c")
    batches = loaders(data, 1000, device=default_device())[1]
    with torch.no_grad():
        hits = torch.cat([model(x).argmax(1) == y for x, y in batches])
    share = 100*hits.view(len(CORRUPTIONS), SEVERITIES, -1).double().mean(2).cpu()
    severities = [str(s + 1) for s in range(SEVERITIES)]
    found = pd.DataFrame(share.numpy(), pd.Index(CORRUPTIONS, name="corruption"), severities)
    folder = run_dir(spec, study)
    write(folder / "robustness.csv", found.assign(seal=load_record(folder)["seal"]).to_csv())
    return found


def _mean(folder: Path) -> float:   # NaN where it was not evaluated
    file = Path(folder) / "robustness.csv"
    if not file.is_file():
        return np.nan
    try:
        saved = pd.read_csv(file).set_index("corruption")
        is_of_record = (saved.seal == load_record(folder)["seal"]).all()
        return saved.drop(columns="seal").to_numpy(float).mean() if is_of_record else np.nan
    except (ValueError, LookupError, AttributeError) as e:
        warnings.warn(f"{file} is left out: {e}")
        return np.nan


def with_robustness(table: pd.DataFrame) -> pd.DataFrame:   # table: as `results` gives it
    "Add a column robustness, the mean accuracy over CIFAR-10-C (%), NaN where it was not evaluated, if any run has it."
    found = [_mean(folder) for folder in table.folder]
    return table.assign(robustness=found) if np.isfinite(found).any() else table


def evaluate_robustness(study: str, table: pd.DataFrame):   # table: as `results` gives it
    "`robustness` of every CIFAR-10 run that lacks it, where CIFAR-10-C and what moved are at hand."
    from .data import load_data
    rows = with_robustness(table).reindex(columns=[*table.columns, "robustness"])
    rows = rows[(rows.status == "complete") & (rows.data == "cifar10") & rows.robustness.isna()]
    rows = rows[[(Path(folder) / "moved.safetensors").exists() for folder in rows.folder]]
    if not len(rows):
        return
    try:
        data = load_data("cifar10-c")
    except FileNotFoundError:
        return
    for fields in rows[list(Spec.__dataclass_fields__)].to_dict("records"):
        robustness(Spec(**fields), study, data)
