"Many runs, in spite of everything."
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from bnonly import experiment, pace
from bnonly.cli import main
from bnonly.experiment import Spec, load_record, preset, records, results, run_dir
from bnonly.execution import kept
from bnonly.pace import epochs_done
from bnonly.runlock import RunLock
from bnonly.sweep import (ENGINES, after_hours, by_processes, by_ray, failure, missing, passed_on, retry, state, sweep,
                          unfinished)
from bnonly.train import fit
from bnonly.workers import WorkerDied, in_processes
from test_train import Stop

ROOT = Path(__file__).parents[1]
TINY = Spec(arch="resnet8", epochs=2)
quiet = lambda _: None


def here(todo, workers, task):
    "An engine without processes, for what can be seen in this one only."
    yield from map(task, todo)


def striking(victims, log, times=9, engine=by_processes):
    """An engine in which runs strike their own process after their first epoch, so many times; each try is written
    down. victims: runs to what they do."""
    def strike(spec, how):
        while not (run_dir(spec, "struck") / "metrics.csv").exists(): time.sleep(.01)
        print(f"the last words of seed {spec.seed}", file=sys.stderr, flush=True)
        how()

    def run(todo, workers, task, **options):
        def call(spec):
            if spec in victims:
                with open(log, "a") as f: f.write(f"{spec.key}\n")
                tries = log.read_text().splitlines().count(spec.key)
                if tries <= times: threading.Thread(target=strike, args=(spec, victims[spec]), daemon=True).start()
            return task(spec)
        yield from engine(todo, workers, call, **options)
    return run


def strikes():
    "What ends a process: functions within a function, which travel to processes that cannot import this module."
    def kill(): os.kill(os.getpid(), signal.SIGKILL)

    def exhaust_memory():
        "Take whatever is left of a limit, and whatever anyone else gives back."
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + 2**26,) * 2)
        hoard = []
        while True:
            try: hoard.append(bytearray(2**16))
            except MemoryError: time.sleep(.001)
    return kill, exhaust_memory


kill, exhaust_memory = strikes()


def test_a_killed_run_ends_as_if_it_had_not_been_killed():
    "In a process of its own, which forks: three random instants here, fifty with tests/survival.py."
    code = """import torch; torch.set_num_threads(1)
from dataclasses import replace
from survival import SPEC, survive
assert all(r['equal'] for r in survive(3, replace(SPEC, epochs=3), seed=1))"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT / "tests",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_two_sweeps_at_once_train_each_run_once(tmp_path):
    "Both end when every run is there; what each has trained is written down by the run itself."
    code = """
import os, sys
from bnonly.experiment import Spec
from bnonly.sweep import sweep
def after(spec, study):
    with open(sys.argv[1], "a") as f: f.write(spec.key + "\\n")
specs = [Spec(arch="resnet8", epochs=1, seed=s) for s in range(4)]
assert not sweep("both", specs, workers=1, say=lambda _: None, after=after, pause=.2)
"""
    log = tmp_path / "log"
    both = [subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(log)]) for _ in range(2)]
    assert [p.wait(1200) for p in both] == [0, 0]
    assert sorted(log.read_text().split()) == sorted(Spec(arch="resnet8", epochs=1, seed=s).key for s in range(4))
    assert len(results("both")) == 4 and not list(run_dir(TINY, "both").parent.glob("*/lock"))


def test_a_run_cut_off_before_its_notebook_gets_its_analysis_and_is_not_trained_again():
    """The record is there, sealed; killed between it and the notebook, or the notebook edited, the next sweep makes up
    for it."""
    seen = []
    def after(spec, study): seen.append(spec)
    record = fit(TINY)
    assert missing("scratch", [TINY]) == [] and unfinished("scratch", [TINY]) == [TINY]
    assert sweep("scratch", [TINY], after=after, say=quiet, run=here) == {}
    notebook = run_dir(TINY) / "train.ipynb"
    assert kept(run_dir(TINY)) and seen == [TINY] and load_record(run_dir(TINY)) == record
    good = notebook.read_text()
    assert 'arch = \\"resnet8\\"' in good and "test accuracy" in good and "image/png" in good
    notebook.write_text(good.replace("resnet8", "resnet9"))
    assert not kept(run_dir(TINY)) and sweep("scratch", [TINY], say=quiet, run=here) == {} and kept(run_dir(TINY))


def test_a_full_disk_is_named_and_keeps_the_last_good_state(monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, cbs=[Stop(1)])
    file = run_dir(TINY) / "checkpoint.safetensors"
    before = file.read_bytes()

    def full(_): raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as m:
        m.setattr(os, "fsync", full)
        failed = sweep("scratch", [TINY], say=quiet, run=here)
    assert "No space left on device); free space or set BNONLY_RUNS" in failed[TINY.key]
    assert file.read_bytes() == before and not list(file.parent.glob(".*"))
    assert state(TINY, "scratch") == "missing"   # the disk had no room for failed.json either
    assert sweep("scratch", [TINY], say=quiet, run=here) == {}


def test_a_full_disk_leaves_no_lock_that_nobody_holds(tmp_path):
    code = "import sys; from bnonly.runlock import RunLock; RunLock(sys.argv[1]).take()"
    done = subprocess.run(
        ["bash", "-c", 'ulimit -f 0; exec "$@"', "-", sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert f"{tmp_path} could not be written" in done.stderr and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(monkeypatch):
    monkeypatch.setenv("BNONLY_RUNS", "/proc/runs")
    failed = sweep("scratch", [TINY], say=quiet, run=here)
    assert "/proc/runs" in failed[TINY.key]


def test_a_record_cut_short_is_named_and_left_alone():
    fit(TINY)
    file = run_dir(TINY) / "record.json"
    file.write_text(file.read_text()[:100])
    other = Spec(arch="resnet8", epochs=1)
    failed = sweep("scratch", [TINY, other], say=quiet, run=here)
    assert "cut off or edited" in failed[TINY.key] and list(failed) == [TINY.key]
    assert len(file.read_text()) == 100 and state(other, "scratch") == "complete"


def test_every_flipped_byte_of_a_checkpoint_is_noticed():
    "One byte in the header, the metrics, the random states and the numbers."
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, cbs=[Stop(1)])
    file = run_dir(TINY) / "checkpoint.safetensors"
    good = file.read_bytes()
    for at in (0, 9, good.index(b"accuracy") + 12, good.index(b"numpy") + 40, len(good) * 3 // 4, len(good) - 1):
        bad = bytearray(good)
        bad[at] ^= 1
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="checkpoint.safetensors is damaged; delete it"):
            fit(TINY)
    file.write_bytes(good)
    assert fit(TINY)["status"] == "complete"


def test_what_failed_or_diverged_is_taken_up_again():
    wild = Spec(arch="resnet8", epochs=2, lr=1000., policy="all")
    file = run_dir(TINY) / "checkpoint.safetensors"
    file.parent.mkdir(parents=True)
    file.write_text("nonsense")
    assert list(sweep("scratch", [TINY, wild], say=quiet, run=here)) == [TINY.key]
    assert (state(TINY, "scratch"), state(wild, "scratch")) == ("failed", "diverged")
    assert "Traceback" in failure(TINY, "scratch") and results().status.tolist() == ["diverged"]
    assert missing("scratch", [TINY, wild]) == []
    file.unlink()
    for spec in (TINY, wild): retry(spec, "scratch")
    assert missing("scratch", [TINY, wild]) == [TINY, wild]
    assert sweep("scratch", [TINY, wild], say=quiet, run=here) == {}
    assert (run_dir(wild) / "diverged.json").exists() and load_record(run_dir(TINY))["status"] == "complete"


def test_a_sweep_whose_time_is_over_keeps_what_was_trained_and_goes_on(monkeypatch):
    "The first run of the study is complete, the second has its checkpoint, the third was not begun."
    first, last = TINY, Spec(arch="resnet8", epochs=2, seed=1)
    long = Spec(arch="resnet8", epochs=10_000)
    monkeypatch.setattr("bnonly.sweep.after_hours", lambda hours: lambda: epochs_done(long, "timed") >= 2)
    assert sweep("timed", [first, long, last], 1, say=quiet, hours=.5) == {}
    assert missing("timed", [first, long, last]) == [long, last] and not run_dir(last, "timed").exists()
    assert (run_dir(long, "timed") / "checkpoint.safetensors").exists()
    monkeypatch.setattr("bnonly.sweep.after_hours", lambda hours: lambda: True)
    assert sweep("timed", [long, last], 1, say=quiet, hours=.5) == {} and missing("timed", [long, last]) == [long, last]
    metrics = run_dir(long, "timed") / "metrics.csv"
    before = metrics.read_text().splitlines()
    with pytest.raises(KeyboardInterrupt):
        fit(long, "timed", cbs=[Stop(len(before))])  # an epoch more than are written down
    after = metrics.read_text().splitlines()
    assert len(after) == len(before) + 1
    assert after[:2] == before[:2]   # the first epoch and its seconds: it was not trained again


def test_hours_are_those_of_the_clock(monkeypatch):
    now = [100.]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    over = after_hours(.5)
    assert not over()
    now[0] += 1799
    assert not over()
    now[0] += 1
    assert over()


VICTIM, OTHERS = Spec(arch="resnet8", epochs=300), [Spec(arch="resnet8", epochs=2, seed=s) for s in range(3)]


def test_a_run_that_ends_its_process_is_tried_twice_and_stops_no_other(tmp_path, capsys):
    "In the midst of its training, so that it leaves its lock. Its last words are printed the first time, then kept."
    lines, log = [], tmp_path / "log"
    failed = sweep("struck", [VICTIM, *OTHERS], 2, say=lines.append, run=striking({VICTIM: os.abort}, log))
    assert [state(s, "struck") for s in (VICTIM, *OTHERS)] == ["failed", *["complete"]*3]
    assert log.read_text() == f"{VICTIM.key}\n"*2 and sum("it is tried once more" in line for line in lines) == 1
    report = json.loads((run_dir(VICTIM, "struck") / "failed.json").read_text())
    assert report.keys() == {"spec", "error", "traceback", "host", "time"} and report["spec"] == VICTIM.__dict__
    assert report["error"] == "WorkerDied: its process was ended by SIGABRT"
    assert all(part in report["traceback"] for part in (report["error"], "Fatal Python error: Aborted", "in strike"))
    assert capsys.readouterr().err.count("Fatal Python error: Aborted") == 1
    assert failed == {VICTIM.key: report["traceback"]} and not list(run_dir(VICTIM, "struck").glob("lock"))


def test_a_run_that_ended_its_process_is_left_alone_until_it_is_asked_for(tmp_path):
    "Its lock is stale at once: nobody waits for the pause of an hour between two looks at runs that others train."
    log, victim = tmp_path / "log", Spec(arch="resnet8", epochs=20)
    run = striking({victim: kill}, log, times=3)
    tries = lambda: log.read_text().splitlines().count(victim.key)
    assert list(sweep("struck", [victim], say=quiet, run=run)) == [victim.key] and tries() == 2
    assert "ended by SIGKILL, as the system does when memory runs out" in failure(victim, "struck", "error")
    assert sweep("struck", [victim], say=quiet, run=run) == {} and tries() == 2
    retry(victim, "struck")
    assert sweep("struck", [victim], say=quiet, run=run, pause=3600) == {} and tries() == 4
    left = {f.name for f in run_dir(victim, "struck").iterdir()}
    assert kept(run_dir(victim, "struck"))
    assert not [n for n in left if n.startswith((".", "failed", "lock", "checkpoint"))]


def test_a_run_without_memory_stops_no_other(tmp_path):
    "However it ends, by an exception or a signal."
    failed = sweep("struck", [VICTIM, *OTHERS], 1, say=quiet, run=striking({VICTIM: exhaust_memory}, tmp_path / "log"))
    assert [state(s, "struck") for s in (VICTIM, *OTHERS)] == ["failed", *["complete"]*3]
    assert failed == {VICTIM.key: failure(VICTIM, "struck")}


def test_an_analysis_that_ends_its_process_is_made_up_for(tmp_path):
    "The record is there by then. The next sweep analyses, trains nothing, and leaves no word of the failure."
    def after(spec, study):
        if not (tmp_path / "mended").exists(): os.abort()
    assert "ended by SIGABRT" in sweep("scratch", [TINY], after=after, say=quiet)[TINY.key]
    record = load_record(run_dir(TINY))
    assert record["status"] == "complete" and failure(TINY, "scratch")
    (tmp_path / "mended").touch()
    assert sweep("scratch", [TINY], after=after, say=quiet) == {}
    assert load_record(run_dir(TINY)) == record and kept(run_dir(TINY)) and not failure(TINY, "scratch")


def test_a_run_that_another_process_has_taken_over_is_looked_at_again(monkeypatch):
    "The sleeper writes nothing more, its run does not count as failed, and the record is the other one's."
    record, look = fit(TINY), experiment.check

    def late(folder):
        monkeypatch.setattr(experiment, "check", look)
        file, = (folder / "lock").iterdir()
        file.rename(file.with_name("another"))
        try: look(folder)
        finally: shutil.rmtree(folder / "lock")
    shutil.copytree(run_dir(TINY), run_dir(TINY, "other"))
    monkeypatch.setattr(experiment, "check", late)
    assert sweep("other", [TINY], say=quiet, run=here, pause=.1) == {} and experiment.check is look
    assert kept(run_dir(TINY, "other")) and load_record(run_dir(TINY, "other")) == record
    assert not (run_dir(TINY, "other") / "failed.json").exists()


def test_a_killed_sweep_is_cleared_by_the_next_one():
    "The lock of a process that has ended, and a temporary file, beside a run that is done."
    assert sweep("scratch", [TINY], workers=1, say=quiet) == {}
    before = sorted(run_dir(TINY).iterdir())
    code = ("import sys; from bnonly.runlock import RunLock; assert RunLock(sys.argv[1]).take(); "
            "open(sys.argv[1] + '/.abc.tmp', 'w')")
    subprocess.run([sys.executable, "-c", code, run_dir(TINY)], cwd=ROOT, check=True)
    assert (run_dir(TINY) / "lock").exists()
    assert sweep("scratch", [TINY], workers=1, say=quiet) == {} and sorted(run_dir(TINY).iterdir()) == before


def test_a_lost_node_of_a_ray_cluster_costs_no_run_and_doubles_none(tmp_path, monkeypatch):
    """Two nodes; one is killed as soon as the first run is there. What is set here reaches both, though they began
    before."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    from ray.cluster_utils import Cluster
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    node, log = cluster.add_node(num_cpus=1), tmp_path / "log"
    ray.init(address=cluster.address, log_to_driver=False)
    monkeypatch.setenv("BNONLY_KERNELS", "plain")

    def after(spec, study):
        with open(log, "a") as f: f.write(f"{spec.key}\n")

    def run(todo, workers, task):
        for i, result in enumerate(by_ray(todo, workers, task)):
            if i == 0: cluster.remove_node(node, allow_graceful=False)
            yield result
    specs = [Spec(arch="resnet8", epochs=2, seed=s) for s in range(4)]
    try: assert sweep("cluster", specs, after=after, say=quiet, run=run, pause=1) == {}
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert sorted(log.read_text().split()) == sorted(s.key for s in specs)
    assert len(results("cluster")) == 4 and set(results("cluster").status) == {"complete"}
    assert {r["machine"]["kernels"] for r in records("cluster")} == {"plain"}


def test_a_process_that_takes_its_time_to_end_is_no_reason_for_a_third_try():
    "A core dump or a stack trace may take minutes, in which the lock of the run looks like that of a living process."
    lock, tries = RunLock(run_dir(TINY, "slow")), []

    def run(todo, workers, task):
        for spec in todo:
            tries.append(spec)
            if len(tries) == 2 and lock.take(): threading.Timer(1, lock.release).start()
            yield spec, "died", WorkerDied("its process was ended by SIGABRT", "")
    assert list(sweep("slow", [TINY], say=quiet, run=run, pause=.1)) == [TINY.key]
    assert tries == [TINY, TINY] and state(TINY, "slow") == "failed"


def test_a_run_that_ends_its_process_under_ray_is_named_and_taken_up_again(tmp_path, monkeypatch, capsys):
    """By SIGABRT, by SIGKILL and for lack of memory: each has a failed.json that names the signal, where there is
    one, and has its last words. The others are trained, the exit status tells, and --retry-failed trains them."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    (tmp_path / "settings.ini").write_text("[struck]\nepochs = 20\narch = resnet8\npolicy = bn\nseed = 0,1,2,3\n")
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    monkeypatch.chdir(tmp_path)
    log, specs = tmp_path / "log", preset("struck")
    victims = dict(zip(specs, (os.abort, kill, exhaust_memory)))
    monkeypatch.setitem(ENGINES, "ray", striking(victims, log, engine=by_ray))
    command = ["study", "struck", "--workers", "2", "--engine", "ray"]
    states = lambda: [state(s, "struck") for s in specs]
    try:
        with pytest.raises(SystemExit) as end: main(command)
        said = capsys.readouterr().err
        assert end.value.code == 1 and "struck: 1 runs trained, 3 failed" in said
        assert states() == ["failed", "failed", "failed", "complete"]
        reports = [json.loads((run_dir(s, "struck") / "failed.json").read_text()) for s in victims]
        assert reports[0]["error"] == "WorkerDied: its process was ended by SIGABRT"
        assert reports[1]["error"].startswith("WorkerDied: its process was ended by SIGKILL, as the system does when")
        assert re.search("(?i)memory|ended by SIG|exit code", reports[2]["error"]), reports[2]
        for s, report in zip(specs[:2], reports): assert f"the last words of seed {s.seed}" in report["traceback"]
        with pytest.raises(SystemExit) as end: main(command)   # they are left alone
        assert end.value.code == 1 and states() == ["failed", "failed", "failed", "complete"]
        assert [log.read_text().splitlines().count(s.key) for s in specs[:2]] == [2, 2]
        monkeypatch.setitem(ENGINES, "ray", by_ray)
        main([*command, "--retry-failed"])
    finally: ray.shutdown()
    assert states() == ["complete"]*4 and not list(run_dir(TINY, "struck").parent.glob("*/failed.json"))


# How long the rest takes.

def played(monkeypatch, jobs, workers):
    """Runs on a clock that is set by hand, by workers that each take the next: for every event, how many are finished,
    and how long the rest is said to take and does take. jobs: (spec, seconds before, of an epoch, after)."""
    now, free, events = [0.], [0.]*workers, []
    for spec, before, epoch, after in jobs:
        w = free.index(min(free))
        for e in range(spec.epochs): events.append((free[w] + before + (e + 1)*epoch, "epoch", spec, epoch))
        free[w] += before + spec.epochs*epoch + after
        events.append((free[w], "finished", spec, None))
    monkeypatch.setattr(pace, "time", type("clock", (), dict(monotonic=lambda: now[0])))
    watch = pace.Watch("paced", [spec for spec, *_ in jobs], workers, quiet, 5)
    for at, what, spec, seconds in sorted(events, key=lambda event: event[0]):
        now[0], file = at, run_dir(spec, "paced") / "metrics.csv"
        if what == "epoch":
            file.parent.mkdir(parents=True, exist_ok=True)
            before = file.read_text() if file.exists() else "epoch,accuracy,seconds\n"
            file.write_text(f"{before}1,2.0,{seconds}\n")
        else: watch.finished(spec)
        yield len(watch.done), watch.left(), max(free) - at


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("epochs,around,epoch", [(1, 40, 2), (1, 2, 40), (160, 40, 5), (10, 0, 60)], ids=str)
def test_the_time_that_is_left_is_told_when_the_first_runs_are_done(monkeypatch, workers, epochs, around, epoch):
    """Within a third: also where imports and analysis take longer than the only epoch, and where one network takes
    twice as long as another. Of the last runs, which may show no sign for long, it is never much less than that."""
    archs = "resnet8", "resnet14"
    specs = [Spec(arch=a, epochs=epochs, seed=s) for s in range(4) for a in archs]
    jobs = [(s, .6*around, epoch*(1 + (s.arch == archs[1])*.75), .4*around) for s in specs]
    told = [row for row in played(monkeypatch, jobs, workers) if row[0] >= workers]
    longest = around + 1.75*epochs*epoch
    middle = [row for row in told if row[0] < len(specs) - workers]
    assert middle and not [row for row in middle if abs(row[1] - row[2]) > row[2]/3]
    assert not [row for row in told if not row[2]*2/3 <= row[1] <= row[2]*4/3 + longest]


def test_before_the_first_epoch_of_a_new_network_nothing_tells_how_long_it_takes(monkeypatch):
    watch = pace.Watch("paced", [TINY], 1, quiet, 5)
    assert "about an unknown time left" in watch.line() and "0 of 1 runs trained, 0% of the work" in watch.line()


def test_every_variable_is_passed_on_with_folders_that_hold_elsewhere(tmp_path, monkeypatch):
    "Those that the README lists; a worker of this machine's processes sees them as they are."
    monkeypatch.chdir(tmp_path)
    listed = re.findall(r"(?m)^\| `(BNONLY_[A-Z]+)`", (ROOT / "README.md").read_text())
    for name in listed: monkeypatch.setenv(name, name.lower())
    environment, folders = passed_on(), {"BNONLY_RUNS", "BNONLY_DATA", "BNONLY_CACHE"}
    assert {n: environment.get(n) for n in listed} == {
        n: str(tmp_path / n.lower()) if n in folders else n.lower() for n in listed
    }
    (_, seen), = in_processes(lambda _: {n: os.environ.get(n) for n in listed}, ["?"], 1)
    assert seen == {n: n.lower() for n in listed} and folders < {*listed}


def test_openmp_may_name_threads_of_several_levels(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1,1")
    assert sweep("scratch", [], say=quiet) == {}


def test_ray_is_asked_for_by_name_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'bnonly\[ray\]'"):
        next(by_ray([TINY], 1, None))
