"""Many runs: what a study still lacks, and training it in spite of everything.

A run is named by its spec and its record appears all at once, so a sweep lists what is missing, locks it, trains it,
and writes down what failed. It can be stopped and started at will, and several sweeps may work on one study.
"""
import json, os, platform, re, sys, time, traceback
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from .checked import read_json
from .execution import execute, keep_notebook, kept
from .experiment import BrokenRecord, Spec, choose, load_record, preset, run_dir, runs_dir, write
from .pace import Watch
from .runlock import LostLock, RunLock, locked, tidy
from .workers import WorkerDied, in_processes, never, own_cores

__all__ = ["state", "failure", "missing", "retry", "select", "unfinished", "train_one", "note", "died",
           "by_processes", "by_ray", "passed_on", "ENGINES", "after_hours", "held", "outcomes", "sweep"]


def state(spec:Spec, study:str) -> str:   # complete, diverged, failed, broken or missing
    "How far a run of a study is."
    try: record = load_record(run_dir(spec, study))
    except BrokenRecord: return "broken"
    return record["status"] if record else "failed" if failure(spec, study) else "missing"


def failure(spec:Spec, study:str, what:str="traceback") -> str|None:   # what: or its one line, 'error'
    "The traceback of a run that failed."
    try: report = read_json(run_dir(spec, study)/"failed.json")
    except FileNotFoundError: return None
    except (OSError, ValueError) as e: return f"failed.json cannot be read: {e}"
    text = report.get(what) if isinstance(report, dict) else None
    return text if isinstance(text, str) else f"failed.json does not say its {what}"


def missing(study:str,                     # a section of settings.ini, or a folder
            specs:list[Spec]|None=None     # default: the runs of that section
           ) -> list[Spec]:
    "The runs of a study that have neither a record nor a failure yet."
    return [s for s in (preset(study) if specs is None else specs) if state(s, study) == "missing"]


def retry(spec:Spec, study:str):
    "Make way for a run that failed or diverged; a diverged record is set aside, not thrown away."
    folder, how = run_dir(spec, study), state(spec, study)
    if how == "failed": (folder/"failed.json").unlink(missing_ok=True)
    if how == "diverged": os.replace(folder/"record.json", folder/"diverged.json")


def select(specs:list[Spec],   # of a study
           only:str            # e.g. 'policy=bn arch=resnet56,resnet110'; '' for all of them
          ) -> list[Spec]:
    "The runs that have these values; `ValueError` where there is none."
    pairs = [part.partition("=")[::2] for part in only.split()]
    for name,_ in pairs: choose("field", name, [f.name for f in fields(Spec)])
    has = {(n, v): [_has(s, n, v) for s in specs] for n,vs in pairs for v in vs.split(",")}
    for found in has.values():
        if found and all(isinstance(f, ValueError) for f in found): raise found[0]
    chosen = [s for i,s in enumerate(specs) if all(any(has[n, v][i] is True for v in vs.split(",")) for n,vs in pairs)]
    if specs and not chosen:
        raise ValueError(f"{only!r} selects none of {len(specs)} runs; take values that the study has, "
                         f"e.g. 'arch={specs[0].arch}'.")
    return chosen


def _has(spec, name, value):
    "Whether a spec has this value; the error where it cannot have it, as a ResNet cannot have norm=affine."
    # of all-affine it makes no difference
    try: return replace(spec, **{name: value}) == spec and (name != "bn_init" or value == spec.bn_init)
    except ValueError as e: return e


def unfinished(study:str, specs:list[Spec]) -> list[Spec]:
    "The runs that are missing, and those that were cut off between their record and their notebook."
    def left(s):
        how = state(s, study)
        return how == "missing" or how in ("complete", "diverged") and not kept(run_dir(s, study))
    return [s for s in specs if left(s)]


def train_one(spec:Spec, study:str, threads:int=1, after=None) -> tuple:
    """One run of a sweep, in a process of its own: its spec, what became of it, and a traceback or None.

    It is 'done', 'taken' by another process, or 'failed'.
    """
    lock = RunLock(folder := run_dir(spec, study))
    try:
        if not lock.take(): return spec, "taken", None
        if state(spec, study) in ("failed", "broken"):
            return spec, "failed", failure(spec, study) or _broken(spec, study)
        if kept(folder): return spec, "done", None
        executed = execute(spec, study, threads)
        if after and state(spec, study) == "complete": after(spec, study)
        keep_notebook(executed, folder)
        (folder/"failed.json").unlink(missing_ok=True)   # of an analysis that failed before
        return spec, "done", None
    except KeyboardInterrupt:
        if not lock.lost: raise
        return spec, "taken", None
    except LostLock: return spec, "taken", None
    except Exception as e: return spec, "failed", note(spec, study, e)
    finally: lock.release()


def note(spec:Spec, study:str, error:Exception) -> str:   # the traceback
    "Write down that a run failed, and why; a broken record says so itself."
    trace = "".join(traceback.format_exception(error))
    failed = dict(spec=spec.__dict__, error=f"{type(error).__name__}: {error}", traceback=trace, host=platform.node(),
                  time=time.strftime("%F %T"))
    try:
        if not isinstance(error, BrokenRecord):
            write(run_dir(spec, study)/"failed.json", json.dumps(failed, indent=1)+"\n")
    except (OSError, LostLock) as e: trace += f"{e}\n"
    return trace


def died(spec:Spec, study:str, error:WorkerDied) -> tuple:   # as `train_one`
    "What became of a run that has ended its process: 'failed', unless another process has taken it up."
    lock = RunLock(folder := run_dir(spec, study))
    try:
        if not lock.take(): return spec, "taken", None
        return (spec, "done", None) if kept(folder) else (spec, "failed", note(spec, study, error))
    except OSError as e: return spec, "failed", f"{error}\n{e}"
    finally: lock.release()


def by_processes(todo:list, workers:int,
                 task,                  # from a spec to what `train_one` returns
                 over:Callable=never    # asked about once a second whether to stop
                ) -> Iterator:
    "Results of a task over specs, as they come, from processes of this machine; where one died, 'died' and how."
    for spec,result in in_processes(task, todo, workers, spoilt=lambda result: result[1] == "failed", over=over):
        yield (spec, "died", result) if isinstance(result, WorkerDied) else result


def by_ray(todo:list, workers:int, task,
           gpus:float=0,          # for each run, a fraction where several share one
           over:Callable=never    # as for `by_processes`
          ) -> Iterator:
    "Results of a task over specs, as they come, from a Ray cluster."
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError
    except ImportError as e:
        need = f"the engine 'ray' needs {e.name}, which is not installed"
        raise ImportError(f"{need}; pip install 'bnonly[ray]'.") from None
    if not ray.is_initialized():
        try: ray.init(address="auto", log_to_driver=False)   # $RAY_ADDRESS, or a cluster that runs on this machine
        except ConnectionError:
            if os.environ.get("RAY_ADDRESS"): raise
            ray.init(address="local", include_dashboard=False, num_cpus=workers, log_to_driver=False)
    options = dict(num_cpus=1, num_gpus=gpus if ray.cluster_resources().get("GPU") else 0,
                   max_retries=0, scheduling_strategy="SPREAD",
                   runtime_env=dict(env_vars=passed_on()))
    def below(spec):   # in a process below Ray's, of which it can be told how it ended
        (result,) = by_processes([spec], 1, task)
        return result
    start = ray.remote(below).options(**options).remote
    waiting = {start(s): s for s in todo}
    while waiting and not over():
        for ready in ray.wait([*waiting], timeout=1)[0]:
            spec = waiting.pop(ready)
            try: result = ray.get(ready)
            except NodeDiedError: waiting[start(spec)] = spec; continue
            except (WorkerCrashedError, OutOfMemoryError) as e:
                result = spec, "died", WorkerDied(f"its process died, and Ray raised {type(e).__name__}", str(e))
            yield result
    for left in waiting: ray.cancel(left, force=True)


def passed_on() -> dict:
    "What a worker of another process tree or machine must know of the environment; folders as absolute paths."
    own = {k: v for k,v in os.environ.items() if k.startswith("BNONLY_") or k in ("OMP_NUM_THREADS", "PYTHONPATH")}
    places = {k: str(Path(own[k]).expanduser().absolute()) for k in ("BNONLY_DATA", "BNONLY_CACHE") if own.get(k)}
    return own | places | dict(BNONLY_RUNS=str(runs_dir().absolute()))


ENGINES = dict(processes=by_processes, ray=by_ray)   # name to what `sweep` takes as run


def after_hours(hours:float) -> Callable:   # gives False, and True from then on
    "A question whose answer changes when some hours have passed from now."
    end = time.monotonic() + 3600*hours
    return lambda: time.monotonic() >= end


def held(spec:Spec, study:str) -> bool:
    "Whether a process that lives, or may live, holds the lock of a run."
    try: return locked(run_dir(spec, study))
    except OSError: return False   # a full disk: `train_one` says so


def outcomes(study:str, todo:list,
             run,                      # an engine that has its workers and its task
             say, pause:float,         # of `sweep`
             over:Callable=never       # whether to stop
            ) -> Iterator:             # of what `train_one` returns
    """What became of each run in the end: 'done' or 'failed', with a traceback.

    A run that ended its process twice is not tried again, even where that process takes its time to end.
    """
    tried, ended = set(), {}   # ended: runs to how their second process ended
    while todo and not over():
        for spec in [s for s in todo if s in ended]:
            if (outcome := died(spec, study, ended[spec]))[1] == "taken": continue
            todo.remove(spec)
            yield outcome
        taken, again = {s for s in todo if s in ended or held(s, study)}, []
        with closing(run([s for s in todo if s not in taken])) as results:
            for spec,how,detail in results:
                if how == "died" and spec not in tried:
                    tried.add(spec); again.append(spec)
                    say(f"{spec.key}: {detail}; it is tried once more")
                    if detail.words: print(f"\n{detail.words}", file=sys.stderr)
                    continue
                if how == "died":
                    ended[spec] = detail
                    spec, how, detail = died(spec, study, detail)
                if how == "taken": taken.add(spec)
                else: yield spec, how, detail
        if taken and not again and not over(): time.sleep(pause)
        todo = again + [s for s in todo if s in taken]


def sweep(study:str,                      # a section of settings.ini, or a folder
          specs:list[Spec]|None=None,     # default: the runs of that section
          workers:int=0,                  # processes; 0 is one for each core, 1 trains one run after the other
          after=None,                     # called with the spec and the study after each run, in its process
          say=print,                      # called with each line of progress
          run=by_processes,               # the engine
          pause:float=5,                  # seconds between lines, and between looks at runs that others train
          hours:float=0                   # after which it stops; 0 is no limit
         ) -> dict:                       # key to traceback, for the runs that failed
    "Train the missing runs of a study, in its order."
    specs, cores = preset(study) if specs is None else specs, own_cores()
    for s in specs: tidy(run_dir(s, study))
    failed = {s.key: _broken(s, study) for s in specs if state(s, study) == "broken"}
    todo, workers = unfinished(study, specs), workers or cores
    # OpenMP knows '4,2' as well: the first counts
    setting = re.match(r"\s*([1-9]\d*)", os.environ.get("OMP_NUM_THREADS", ""))
    threads = int(setting[1]) if setting else max(1, cores//min(workers, max(1, len(todo))))
    task = partial(train_one, study=study, threads=threads, after=after)
    over = after_hours(hours) if hours else never
    if hours: run = partial(run, over=over)
    ended = outcomes(study, todo, lambda free: run(free, workers, task), say, pause, over)
    with Watch(study, todo, min(workers, len(todo)), say, pause) as watch, closing(ended):
        for spec,how,trace in ended:
            if how == "failed": failed[spec.key] = trace
            watch.finished(spec)
    return failed


def _broken(spec, study):
    try: load_record(run_dir(spec, study))
    except BrokenRecord as e: return str(e)
