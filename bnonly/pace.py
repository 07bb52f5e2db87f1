"""How long runs take: what to expect of them, how far a sweep is, and how that is said in one line."""
import sys, threading, time

import numpy as np
import pandas as pd

from .checked import read_bytes
from .experiment import Spec, parse_arch, results, run_dir

__all__ = ["cost", "expected", "clock", "Watch", "epochs_done", "StatusLine"]


def cost(spec:Spec) -> float:   # relative to one epoch of a network of one layer
    "Roughly how long a run takes beside others on the same data."
    arch = parse_arch(spec.arch)
    heavy = spec.policy.startswith(("all", "random", "scattered")) or "shortcut" in spec.policy
    # below 400 units a layer costs its overhead
    size = 1 + (arch.width/400)**2 if arch.family == "mlp" else arch.width**2
    return arch.depth * size * spec.epochs * (1.5 if heavy else .5 if spec.policy in ("output", "none") else 1)


def expected(specs:list[Spec],
             table:pd.DataFrame    # finished runs, as `results` gives them
            ) -> list[float]:      # seconds; NaN where nothing was measured on that data
    "How long each run should take, from what finished runs took."
    done = table[table.status == "complete"] if "seconds" in table else table[:0].assign(seconds=[])
    specs_done = [Spec(**r) for r in done[[*Spec.__dataclass_fields__]].to_dict("records")] if len(done) else []
    rate = done.seconds / np.array([cost(s) for s in specs_done])
    each, same = done.seconds / done.epochs, ["arch", "policy", "data"]
    known, rates = each.groupby([done[c] for c in same]).median().to_dict(), rate.groupby(done.data).median().to_dict()
    def seconds(s):
        alike = s.arch, s.policy, s.data
        return known[alike]*s.epochs if alike in known else rates.get(s.data, np.nan)*cost(s)
    return [seconds(s) for s in specs]


def clock(seconds:float) -> str:
    "Seconds, minutes, hours or days, as one would say them."
    if not np.isfinite(seconds): return "an unknown time"
    for unit,size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2*size: return f"{seconds/size:.1f} {unit}"
    return f"{seconds:.0f} s"


class Watch:
    "One line about a whole sweep, every few seconds."
    def __init__(self, study, todo, workers, say, pause):
        guess = np.array(expected(todo, results())) if todo else np.array([])
        self.speed, self.start = (workers if np.isfinite(guess).all() else 0), time.monotonic()
        self.weight = dict(zip(todo, guess if self.speed else map(cost, todo)))
        self.study, self.say, self.pause, self.done, self.over = study, say, pause, set(), threading.Event()
        self.before = self.work()

    def work(self):
        "What is done of the sweep, in expected seconds."
        return sum(w * (1 if s in self.done else epochs_done(s, self.study)/s.epochs) for s,w in self.weight.items())

    def finished(self, spec):
        self.done.add(spec)
        self.say(self.line())

    def line(self) -> str:
        "How many runs are done, and how long the rest will take."
        total, work, gone = sum(self.weight.values()), self.work(), time.monotonic() - self.start
        trust = 60 if self.speed else 0   # seconds for which what was expected counts
        speed = (work - self.before + self.speed*trust) / (gone + trust)
        left = (total - work)/speed if speed > 0 else np.nan
        return (f"{self.study}: {len(self.done)} of {len(self.weight)} runs trained, {work/total:.0%} of the work, "
                f"about {clock(left)} left")

    def __enter__(self):
        def tell():
            while not self.over.wait(self.pause): self.say(self.line())
        if self.weight: threading.Thread(target=tell, daemon=True).start()
        return self

    def __exit__(self, *_): self.over.set()


def epochs_done(spec:Spec, study:str) -> int:
    "How many epochs a run has written down."
    try: return max(0, read_bytes(run_dir(spec, study)/"metrics.csv").count(b"\n") - 1)
    except (OSError, ValueError): return 0


class StatusLine:
    "Say things on one line of the terminal, or now and then into a log."
    def __init__(self, every:float=60): self.every, self.last, self.tty = every, 0., sys.stderr.isatty()

    def __call__(self, text:str, end:bool=False):
        if self.tty: print(f"\r\x1b[K{text}", end="\n" if end else "", file=sys.stderr, flush=True)
        elif end or time.monotonic() > self.last + self.every:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)
