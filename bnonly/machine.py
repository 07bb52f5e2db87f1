"On what a run is computed: the device, and what its record says of the machine."
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch
from fastai.torch_core import num_distrib

from . import __version__
from .distributed import distributed_state
from .native import kernels

__all__ = ["commit", "default_device", "machine"]


def default_device() -> torch.device:
    "The accelerator if there is one, else the CPU; $BNONLY_DEVICE overrides. One of several processes has its own."
    if state := distributed_state(): return state.device
    best = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    name = os.environ.get("BNONLY_DEVICE") or best
    try: return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as e:
        why = str(e).splitlines()[0]
        raise ValueError(f"BNONLY_DEVICE {name!r} cannot be used here ({why}); say 'cpu', or leave it out.") from None


def machine(device: torch.device) -> dict:
    "What a run was computed on: device, processor, versions, instruction sets and commit."
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [l.partition(":")[2].strip() for l in lines if l.startswith("model name")]
    own = kernels()
    return dict(device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                processor=(names or [platform.processor()])[0], cores=os.cpu_count(), processes=max(1, num_distrib()),
                threads=torch.get_num_threads(), system=platform.system(), python=platform.python_version(),
                bnonly=__version__, **{p: version(p) for p in ("torch", "fastai", "numpy")},
                instructions=torch.backends.cpu.get_cpu_capability(),
                kernels=own[torch.float32].instructions if own else "plain", commit=commit())


def commit(home: Path = Path(__file__).resolve().parents[1]) -> str | None:
    "The commit of a checkout, by default the one that is run; a + where tracked files differ; None where it is none."
    if not (home/"nbs").is_dir(): return None   # installed, perhaps below another project's repository
    def git(*args):
        command = ["git", "-C", str(home), *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    try: return git("rev-parse", "--short=12", "HEAD") + "+"*bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError): return None
