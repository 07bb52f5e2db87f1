"Calls in worker processes, any of which may die without harm to the others; and how many of them there is room for."
import faulthandler
import math
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path

import cloudpickle

LIFE = 300     # seconds after which a worker is replaced, between two calls: a process that ends gives its memory back
LINES = 100    # of a worker's standard error, which are told when it dies
POOLS = "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"   # of libraries that else start a thread a core


def own_cores() -> int:
    "The cores that this process may use: Slurm gives it some of a machine's, a container a share of their time."
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *map(math.ceil, quotas())])


def quotas(cgroups="/proc/self/cgroup", root="/sys/fs/cgroup") -> list[float]:
    "What each control group of this process allows it, in cores; a group has no more than those above it."
    try: groups = [line.split(":", 2) for line in Path(cgroups).read_text().splitlines()]
    except OSError: return []
    found = []
    for _, kinds, path in groups:
        if kinds and "cpu" not in kinds.split(","): continue
        own, base = Path(path.lstrip("/")), Path(root, "cpu" if kinds else "")   # version 1 has a folder for each kind
        found += [_quota(base / group) for group in (own, *own.parents)]
    return [cores for cores in found if cores]


def _quota(group):
    "The cores' worth of time of one control group; nothing where it has no limit."
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):   # of version 2, of version 1
        try: share, period = " ".join((group / f).read_text() for f in files).split()
        except (OSError, ValueError): continue
        if share.isdigit(): return int(share) / int(period)   # no limit is 'max' or -1


class WorkerDied(RuntimeError):
    "A worker process ended before its call did."
    def __init__(self, how, words=""):   # words: its last ones
        super().__init__(how)
        self.words = words
        if words: self.add_note(words)   # a traceback shows them below the error


class Worker:
    "A process that is sent one call after the other."
    def __init__(self, threads):
        self.connection, theirs = Pipe()
        self.errors, self.relayed, self.born = tempfile.TemporaryFile(), 0, time.monotonic()
        code = (f"import sys; sys.path[:], sys.argv[:] = {sys.path!r}, {sys.argv!r}; "
                f"from bnonly.workers import serve; serve({theirs.fileno()}, {os.getpid()})")
        self.process = subprocess.Popen(
            [sys.executable, *(f"-W{w}" for w in sys.warnoptions), "-c", code], pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL, stderr=self.errors, env=dict.fromkeys(POOLS, str(threads)) | os.environ)
        theirs.close()

    def send(self, call, item):
        "Let it call a function with an item. The function may be a closure, or one of a notebook."
        self.item, self.begun = item, self.relayed
        try: self.connection.send_bytes(cloudpickle.dumps(partial(call, item)))
        except OSError: pass   # the process is dead, which `over` will tell

    def over(self):
        "Whether the call has ended, or the process."
        return self.process.poll() is not None or self.connection.poll()

    def result(self):
        "What the call returned, or a `WorkerDied`."
        try: return self.connection.recv() if self.connection.poll() else self.died()
        except (EOFError, OSError): return self.died()

    def died(self):
        "How the process ended, and its last words."
        try: self.process.wait(10)
        except subprocess.TimeoutExpired: self.process.kill()   # it lives on but can no longer be heard
        code, lines = self.process.wait(), self.said(self.begun).decode(errors="replace").splitlines()
        last = ["The last lines of its standard error:", *(line[:200] for line in lines[-LINES:])]
        return WorkerDied(ending(code), "\n".join(last) if lines else "")

    def said(self, since):
        "Its standard error from a position on, as bytes. (`pread` does not move the place at which it writes.)"
        file = self.errors.fileno()
        return os.pread(file, os.fstat(file).st_size - since, since)

    def relay(self):
        "Pass on what it has written to its standard error during its last call."
        new = self.said(self.relayed)
        self.relayed += len(new)
        if new: print(new.decode(errors="replace"), end="", file=sys.stderr, flush=True)

    def close(self):
        "End the process."
        self.process.kill()
        self.process.wait()
        self.connection.close()
        self.errors.close()


def ending(code: int) -> str:
    "The exit code of a process in words; it is negative where a signal ended it."
    if code >= 0: return f"its process ended with exit code {code}"
    name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
    return f"its process was ended by {name}{', as the system does when memory runs out' if name == 'SIGKILL' else ''}"


def never() -> bool:
    "Nothing stops the calls but their end."
    return False


def in_processes(call, items, workers: int, spoilt=lambda result: False, life: float = LIFE, over=never):
    """Yield each item with what `call(item)` returned, as they come, from so many worker processes.

    A process that dies costs its own call alone: a `WorkerDied` stands for the result, and another process takes over.
    An exception that `call` lets through ends its process too. What a call has written to its standard error is passed
    on when it returns, or stands in the `WorkerDied`. A worker is replaced after a result that is `spoilt`, and between
    two calls after `life` seconds. When `over()` is true, which is asked about once a second, no more calls are made,
    and those in progress are given up: their processes are killed.
    """
    items, pool = deque(items), []
    workers = min(workers, len(items))

    def next_call(worker=None):
        pool.append(worker or Worker(threads=max(1, own_cores() // workers)))
        pool[-1].send(call, items.popleft())
    try:
        for _ in range(workers): next_call()
        while pool and not over():
            wait([w.connection for w in pool], timeout=1)   # in vain where a child of a dead worker keeps its end open
            for worker in [w for w in pool if w.over()]:
                item, result = worker.item, worker.result()
                if not isinstance(result, WorkerDied): worker.relay()
                young = time.monotonic() - worker.born < life
                stays = items and worker.process.poll() is None and young and not spoilt(result)
                pool.remove(worker)
                if not stays: worker.close()
                if items: next_call(worker if stays else None)
                yield item, result
    finally:
        for worker in pool: worker.process.kill()
        for worker in pool: worker.close()


def serve(handle: int, parent: int):
    "What a worker process does: make the calls that it is sent and send back the results, as long as its parent lives."
    def follow():
        while os.getppid() == parent: time.sleep(1)
        os._exit(1)
    threading.Thread(target=follow, daemon=True).start()
    faulthandler.enable()   # a process that aborts tells in which line of Python
    connection = Connection(handle)
    while True:
        try: call = connection.recv_bytes()
        except EOFError: return
        result = pickle.loads(call)()
        sys.stdout.flush()
        connection.send(result)
