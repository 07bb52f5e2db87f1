"""How long runs take: what to expect of them, how far a sweep is, and how that is said in one line."""
import sys, threading, time

import numpy as np
import pandas as pd

from .checked import read_metrics
from .experiment import Spec, parse_arch, results, run_dir

__all__ = ["cost", "expected", "clock", "Watch", "trained", "epochs_done", "StatusLine"]


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
    """One line about a whole sweep, every few seconds.

    A run takes the seconds of its epochs, and some around them: its start (imports, data) and its analysis. Those of
    the epochs are expected until some are written down; those around them are known when the first run is finished."""
    def __init__(self, study, todo, workers, say, pause):
        guess = np.array(expected(todo, results())) if todo else np.array([])
        self.guessed, self.start, self.around = bool(np.isfinite(guess).all()), time.monotonic(), 0.
        self.weight = dict(zip(todo, guess if self.guessed else map(cost, todo)))
        self.study, self.workers, self.say, self.pause = study, workers, say, pause
        self.done, self.over = set(), threading.Event()
        self.before = self.epochs()

    def epochs(self) -> dict:   # run to (epochs, seconds)
        "What each run has written down of its epochs."
        return {s: trained(s, self.study) for s in self.weight}

    def finished(self, spec):
        "Count a run as done. What its worker's time was besides epochs was around them."
        self.done.add(spec)
        epochs = sum(now[1] - then[1] for now, then in zip(self.epochs().values(), self.before.values()))
        others = min(self.workers, len(self.weight) - len(self.done) + 1) - 1   # each in the midst of its run, roughly
        gone = self.workers*(time.monotonic() - self.start)
        self.around = max(0., gone - epochs)/(len(self.done) + others/2)
        self.say(self.line())

    def seconds(self) -> list:   # of one worker, for each run: (done, in all, done before this sweep)
        "How far each run is."
        epochs = self.epochs()
        shares = {s: ((epochs[s][0] - self.before[s][0])/s.epochs, epochs[s][1] - self.before[s][1]) for s in epochs}
        weight = sum(self.weight[s]*share for s, (share, _) in shares.items())
        rate = sum(seconds for _, seconds in shares.values())/weight if weight > 0 else 1.
        found = []
        for s, w in self.weight.items():
            whole, before = rate*w + self.around, rate*w*self.before[s][0]/s.epochs
            now = before + rate*w*shares[s][0] + self.around/2*(shares[s][0] > 0)
            found.append((whole if s in self.done else now, whole, before))
        return found

    def left(self) -> float:
        "Seconds until all runs are done; NaN where nothing tells."
        found, gone = self.seconds(), time.monotonic() - self.start
        work = sum(done - before for done, _, before in found)
        known = self.guessed or any(done > before for done, _, before in found)
        trust = 60 if known else 0   # seconds for which every worker counts as busy
        speed = (work + self.workers*trust)/(gone + trust) if known else 0
        rest = [whole - done for done, whole, _ in found]
        return max(sum(rest)/speed, *rest) if speed > 0 else np.nan   # one run is trained by one worker

    def line(self) -> str:
        "How many runs are done, and how long the rest will take."
        done, whole, _ = np.array(self.seconds()).sum(0)
        return (f"{self.study}: {len(self.done)} of {len(self.weight)} runs trained, {done/whole:.0%} of the work, "
                f"about {clock(self.left())} left")

    def __enter__(self):
        def tell():
            while not self.over.wait(self.pause): self.say(self.line())
        if self.weight: threading.Thread(target=tell, daemon=True).start()
        return self

    def __exit__(self, *_): self.over.set()


def trained(spec:Spec, study:str) -> tuple[int, float]:
    "How many epochs a run has written down, and their seconds."
    try: metrics = read_metrics(run_dir(spec, study))
    except ValueError: return 0, 0.   # none yet, or damaged, which training says
    return len(metrics), float(metrics.seconds.sum()) if "seconds" in metrics else 0.


def epochs_done(spec:Spec, study:str) -> int:
    "How many epochs a run has written down."
    return trained(spec, study)[0]


class StatusLine:
    "Say things on one line of the terminal, or now and then into a log."
    def __init__(self, every:float=60): self.every, self.last, self.tty = every, 0., sys.stderr.isatty()

    def __call__(self, text:str, end:bool=False):
        if self.tty: print(f"\r\x1b[K{text}", end="\n" if end else "", file=sys.stderr, flush=True)
        elif end or time.monotonic() > self.last + self.every:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)
