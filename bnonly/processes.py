"""Which process is which, so that it can be told whether one has ended, and how a signal stops one."""
import os
import platform
import signal
import time
from pathlib import Path

__all__ = ["GRACE", "started", "this_process", "ended", "stop_on_signals"]

GRACE = 10   # seconds after a signal in which another one changes nothing


def started(pid: int) -> str | None:
    """When a process began, in ticks since the machine's start; 'ended' for one that was not waited for, None where
    that cannot be told."""
    # from field 3 on: state, ..., field 22
    try: fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError: return None
    return "ended" if fields[0] in "ZX" else fields[19]


def this_process() -> dict:
    """What tells this process from all others: host, boot and space of process ids (None where there is no /proc), pid
    and start."""
    try: boot, space = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")
    except OSError: boot = space = None
    return dict(host=platform.node(), boot=boot, space=space, pid=os.getpid(), start=started(os.getpid()))


def ended(who: dict) -> bool:
    "Whether a process, as `this_process` tells of it, is known to have ended; False where that is not certain."
    here, pid, start = this_process(), who.get("pid"), who.get("start")
    if any(here[k] is None or who.get(k) != here[k] for k in ("host", "boot", "space")): return False
    if type(pid) is not int or pid <= 0 or not isinstance(start, str): return False
    try: os.kill(pid, 0)
    except ProcessLookupError: return True
    except (OSError, OverflowError): return False
    return started(pid) not in (None, start)


def stop_on_signals():
    """Let SIGTERM and SIGHUP stop this process as Ctrl-C does; further signals within `GRACE` seconds do not disturb
    what it still puts away."""
    last = [-GRACE]
    def stop(number, frame):
        if time.monotonic() < last[0] + GRACE: return
        last[0] = time.monotonic()
        raise KeyboardInterrupt
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN: signal.signal(number, stop)
