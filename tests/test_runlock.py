"""The run lock: every order of the steps of three processes, in a model and in the real code, and what a folder may
hold."""
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque, namedtuple
from pathlib import Path

import pytest
from bnonly import runlock
from bnonly.experiment import Spec, load_record, run_dir, seal, write
from bnonly.processes import ended, started, this_process
from bnonly.runlock import LostLock, RunLock, holder, tidy

# The model: a world that processes change in atomic steps. A process is where it stands in its program, and one value.
# The adversary may end it (crash) or let it sleep until it counts as gone (stall) before each of its steps.

World = namedtuple(
    "World", "lock stale temporary table record"
)  # record: who wrote it, and the version of the table it vouches for
NEW = World(None, frozenset(), frozenset(), None, None)
OLD = World(frozenset(), frozenset(), frozenset(), None, None)     # lock: pairs of a number and an owner


def lock_by_token(i, w, at, x):
    """The step of process i that stands at `at` in this package's protocol: a new world, and where it stands then;
    None where it waits."""
    own = {t for t in w.temporary if t[0] == i}
    match at:
        case "look":
            return (w, "place", None) if w.lock is None else (w, "take over", w.lock) if w.lock in w.stale else None
        case "place": return (w._replace(lock=i), "list", None) if w.lock is None else (w, "look", None)
        case "take over": return (w._replace(lock=i), "list", None) if w.lock == x else (w, "look", None)
        case "list": return w, "clear", w.temporary
        case "clear" if x: return w._replace(temporary=w.temporary - {max(x)}), "clear", x - {max(x)}
        case "clear": return (w, "release", None) if w.record else (w, "write table", None)
        case "write table": return w._replace(temporary=w.temporary | {(i, "table")}), "check table", None
        case "check table" | "check record":
            return (w, at.replace("check", "name"), x) if w.lock == i else (w, "lost", None)
        case "name table" | "name record" if not own: return w, "lost", None
        case "name table": return w._replace(table=i, temporary=w.temporary - own), "digest", None
        case "digest": return w, "write record", w.table
        case "write record": return w._replace(temporary=w.temporary | {(i, "record")}), "check record", x
        case "name record": return w._replace(record=(i, x), temporary=w.temporary - own), "release", None
        case "lost": return w._replace(temporary=w.temporary - own), "done", None
        case "release": return w._replace(lock=None if w.lock == i else w.lock), "done", None


def lock_by_number(i, w, at, x):
    """The same for numbered claims, of which the highest holds and numbers begin again, with files that are named
    unchecked."""
    alive = [(n, o) for n, o in w.lock if o not in w.stale]
    match at:
        case "look":
            return (
                None if w.lock and max(w.lock)[1] not in w.stale else (w, "place", max(w.lock)[0] + 1 if w.lock else 1)
            )
        case "place" if x in dict(w.lock): return w, "look", None
        case "place": return w._replace(lock=w.lock | {(x, i)}), "again", x
        case "again" if any(o != i for _, o in alive): return w._replace(lock=w.lock - {(x, i)}), "look", None
        case "again": return (w, "release", x) if w.record else (w, "name table", x)
        case "name table": return w._replace(table=i), "digest", x
        case "digest": return w, "name record", (x, w.table)
        case "name record": return w._replace(record=(i, x[1])), "release", x[0]
        case "release": return w, "remove", tuple(n for n, _ in w.lock if n <= x)
        case "remove" if x: return w._replace(lock=frozenset(c for c in w.lock if c[0] != x[0])), "remove", x[1:]
        case "remove": return w, "done", None


OUTSIDE = {"look", "place", "take over", "again", "lost", "done", "ended", "remove"}


def faults(step, start, processes=3, enough=()):   # enough: the faults after which to stop
    "What goes wrong in any order of all steps, crashes and stalls; and how many states were looked at."
    first = start, (("look", None),) * processes
    seen, todo, found = {first}, deque([first]), set()
    holds = (lambda w, i: w.lock == i) if start is NEW else (lambda w, i: i in dict(map(reversed, w.lock)))
    while todo and not (enough and found >= set(enough)):
        w, at = todo.popleft()
        inside = [i for i, (a, _) in enumerate(at) if a not in OUTSIDE and i not in w.stale]
        if len(inside) > 1: found.add("two hold one run")
        if any(not holds(w, i) for i in inside): found.add("a lock is lost that nobody took over")
        if w.record and w.record[1] != w.table: found.add("a record does not match its files")
        following = []
        for i, (a, x) in enumerate(at):
            if a in ("done", "ended"): continue
            put = lambda *new: at[:i] + (new,) + at[i+1:]
            gone = w._replace(stale=w.stale | {i}) if holds(w, i) else w   # nobody looks for one that holds nothing
            following += [(gone, put("ended", None)), (gone, at)]
            if next_ := step(i, w, a, x): following.append((next_[0], put(*next_[1:])))
        if any(w.record and n.record != w.record for n, _ in following): found.add("a record is replaced")
        if not following and not heals(step, w, processes): found.add("a later process does not finish the run")
        todo.extend(n for n in following if n not in seen and not seen.add(n))
    return found, len(seen)


def heals(step, w, i):
    """Whether one more process alone ends with a record that matches, no lock and no temporary file, after all others
    have ended."""
    w, at, x = w._replace(stale=frozenset(range(i))), "look", None
    for _ in range(50):
        if at == "done": break
        w, at, x = step(i, w, at, x) or (w, at, x)
    return w.record and w.record[1] == w.table and not w.lock and not w.temporary


def test_every_order_of_three_processes_in_the_model():
    found, states = faults(lock_by_token, NEW)
    assert not found and states > 10_000


def test_the_model_finds_the_faults_of_numbered_claims():
    known = {
        "a lock is lost that nobody took over",
        "a record does not match its files",
        "a record is replaced",
        "a later process does not finish the run",
    }
    assert faults(lock_by_number, OLD, enough=known)[0] >= known


@pytest.mark.parametrize("step", ["check record", "name record", "list", "take over"])
def test_the_model_needs_every_step(step):
    "Without the check, without the removal of temporary files, or taking over whoever holds it: each is found."
    def broken(i, w, at, x):
        if at == step == "check record": return w, "name record", x
        if at == step == "list": return w, "clear", frozenset()
        if at == step == "take over": return w._replace(lock=i), "list", None
        if at == step == "name record":
            return w._replace(record=(i, x)), "release", None  # whether its file is there or not
        return lock_by_token(i, w, at, x)

    assert (
        faults(broken, NEW, processes=2)[0] or faults(broken, NEW, enough={"a lock is lost that nobody took over"})[0]
    )


# The real code, stopped before each call of the system.

CALLS = (
    "listdir",
    "scandir",
    "mkdir",
    "rmdir",
    "rename",
    "replace",
    "unlink",
    "open",
    "close",
    "pwrite",
    "ftruncate",
    "lstat",
    "chmod",
    "fsync",
)


class Crash(BaseException): "The end of a process: nothing that it still calls reaches the system."


class Process(threading.Thread):
    """One who takes the lock, writes a file and its record, and releases; it goes as many calls of the system as it is
    let."""
    def __init__(self, folder, name):
        super().__init__(daemon=True)
        self.folder, self.label, self.turn, self.stopped, self.left, self.dead, self.calls = (
            folder,
            name,
            threading.Event(),
            threading.Event(),
            0,
            False,
            0,
        )
        self.error = None

    def run(self):
        try: work(self.folder, self.label)
        except (Crash, LostLock): pass
        except BaseException as e: self.error = e
        finally: self.left = None; self.stopped.set()

    def called(self):
        if self.dead: raise Crash
        self.calls += 1
        if self.left == 0: self.stopped.set(); self.turn.wait(); self.turn.clear()
        if self.dead: raise Crash
        self.left -= 1

    def go(self, calls=10**6):
        "Let it go on for so many calls, or to its end."
        if self.ident and self.left is None: return self
        self.stopped.clear()
        self.left = calls
        self.turn.set() if self.ident else self.start()
        assert self.stopped.wait(600)
        assert not self.error, repr(self.error)
        return self

    def crash(self):
        if self.left is None: return
        self.stopped.clear()
        self.dead = True
        self.turn.set()
        self.join()


def work(folder, label):
    lock = RunLock(folder)
    try:
        if not lock.take() or load_record(folder): return
        write(folder/"metrics.csv", label)
        seal(folder, dict(by=label), ["metrics.csv"])
    finally: lock.release()


@pytest.fixture
def calls(monkeypatch):
    """Calls of the system by a `Process` are counted and stopped; everyone counts as gone at once, and no lock is
    renewed."""
    def stop(call):
        def stopped(*args, **kwargs):
            if isinstance(t := threading.current_thread(), Process): t.called()
            return call(*args, **kwargs)
        return stopped
    for name in CALLS: monkeypatch.setattr(os, name, stop(getattr(os, name)))
    monkeypatch.setattr(runlock, "STALE", 0)
    monkeypatch.setattr(RunLock, "beat", lambda self: None)


def whole(folder):
    "The record of a folder that holds nothing else than that and its file."
    record = load_record(folder, deep=True)
    assert sorted(f.name for f in folder.iterdir()) == ["metrics.csv", "record.json"]
    assert (folder/"metrics.csv").read_text() == record["by"]
    return record


def test_one_is_stopped_or_killed_at_each_call_and_another_one_goes_on(tmp_path, calls):
    total = Process(tmp_path/"whole", "a").go().calls
    assert total > 30
    for at, crash in itertools.product(range(total), (False, True)):
        first, second = (Process(tmp_path/f"{at}{crash}", o) for o in "ab")
        first.go(at)
        if crash: first.crash()
        record = second.go() and load_record(second.folder)
        first.crash() if crash else first.go()
        assert load_record(second.folder) == record   # it stands, whatever wakes
        Process(second.folder, "c").go()
        whole(second.folder)


@pytest.mark.parametrize("order", ["bcab", "bcba", "bacb", "bca!b", "bcb!a"], ids=lambda o: o.replace("!", " killed "))
def test_three_who_are_stopped_at_any_two_calls(tmp_path, calls, order):
    "a goes so far, b goes so far, then the others in this order; '!': the one before is killed instead."
    total = Process(tmp_path/"whole", "a").go().calls
    for n, (i, j) in enumerate(itertools.product(range(0, total, 2), range(1, total, 5))):
        who = {o: Process(tmp_path/str(n), o) for o in "abc"}
        who["a"].go(i)
        who["b"].go(j)
        for o, after in zip(order[1:], order[2:] + " "):
            if o == "!": continue
            who[o].crash() if after == "!" else who[o].go()
            if (tmp_path/str(n)/"record.json").exists(): load_record(tmp_path/str(n), deep=True)
        for p in who.values(): p.go() if not p.ident else None
        Process(tmp_path/str(n), "d").go()
        whole(tmp_path/str(n))


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO])
def test_an_error_that_passes_at_any_call_is_waited_for(tmp_path, monkeypatch, error):
    monkeypatch.setattr(runlock, "PAUSES", (0, 0))
    monkeypatch.setattr(RunLock, "beat", lambda self: None)
    left = [10**6]
    def failing(call):
        def once(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0: raise OSError(error, os.strerror(error))
            return call(*args, **kwargs)
        return once
    for name in set(CALLS) - {"close"}: monkeypatch.setattr(os, name, failing(getattr(os, name)))
    work(tmp_path/"whole", "a")
    for at in range(1, 10**6 - left[0] + 1):
        left[0] = at
        work(tmp_path/str(at), "a")
        left[0] = 10**6
        whole(tmp_path/str(at))
    assert at > 30


# Who is gone, and who is not.

def elsewhere(folder, **fields):
    "The lock of a process that is not on this machine, or of which less is known."
    (folder/"lock").mkdir(parents=True)
    file = folder/"lock/0123456789abcdef"
    file.write_text(json.dumps(this_process() | dict(token=file.name, beat=1, thread=1) | fields))
    return file


def test_a_process_is_known_by_its_start_its_boot_and_its_space(tmp_path):
    me, gone = this_process(), subprocess.Popen(["true"])
    gone.wait()
    assert not ended(me) and ended(me | dict(start="1")) and ended(me | dict(pid=gone.pid))
    for fields in (
        dict(boot="another"),
        dict(space="pid:[1]"),
        dict(host="another"),
        dict(pid=True),
        dict(pid=-1),
        dict(pid=10**30),
        dict(start=None),
        dict(pid=[]),
    ):
        assert not ended(me | dict(pid=gone.pid) | fields)
    zombie = subprocess.Popen(["true"])
    while started(zombie.pid) != "ended": time.sleep(.01)
    assert ended(me | dict(pid=zombie.pid, start="2"))
    zombie.wait()
    elsewhere(tmp_path, pid=gone.pid)
    lock = RunLock(tmp_path)
    assert lock.take() and holder(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fields", [dict(host="elsewhere"), dict(boot="another"), dict(space="pid:[1]")])
def test_a_lock_from_elsewhere_lives_as_long_as_it_is_seen_to_change(tmp_path, monkeypatch, fields):
    "The same host name is not enough, and the file's time says nothing."
    now = [1000.]
    monkeypatch.setattr(runlock, "time", type("clock", (), dict(monotonic=lambda: now[0], sleep=time.sleep)))
    gone = subprocess.Popen(["true"])
    gone.wait()
    file, lock = elsewhere(tmp_path, pid=gone.pid, **fields), RunLock(tmp_path)
    for beat in range(40):
        os.utime(file, (beat, 0) if beat % 2 else (2**31, 2**31))
        if beat < 20:
            file.write_text(json.dumps(this_process() | dict(token=file.name, beat=beat, pid=gone.pid) | fields))
        taken = RunLock(tmp_path).take() if beat < 20 else lock.take()
        assert taken == (beat >= 19 + runlock.STALE/runlock.BEAT)
        if taken: break
        now[0] += runlock.BEAT
    lock.release()


def test_an_observer_that_slept_itself_does_not_take_the_gap_for_silence(tmp_path, monkeypatch):
    now = [1000.]
    monkeypatch.setattr(runlock, "time", type("clock", (), dict(monotonic=lambda: now[0], sleep=time.sleep)))
    elsewhere(tmp_path, host="elsewhere")
    assert not RunLock(tmp_path).take()
    now[0] += 10*runlock.STALE
    assert not RunLock(tmp_path).take()


def test_only_the_owner_releases_and_a_fork_holds_nothing(tmp_path):
    lock = RunLock(tmp_path)
    assert lock.take() and not RunLock(tmp_path).take()
    RunLock(tmp_path).release()
    code = (f"import os; from bnonly.runlock import RunLock; l = RunLock({str(tmp_path)!r}); "
            f"l.token = {lock.token!r}; l.who['pid'] = -1; l.release()")
    subprocess.run([sys.executable, "-c", code], check=True)
    assert lock.held()
    lock.file.rename(lock.file.with_name("another"))
    with pytest.raises(LostLock, match="was taken over by another process"): write(tmp_path/"late", "late")
    lock.release()
    assert [f.name for f in (tmp_path/"lock").iterdir()] == ["another"] and not (tmp_path/"late").exists()


def test_a_holder_that_lost_its_lock_is_interrupted(tmp_path, monkeypatch, request):
    monkeypatch.setattr(runlock, "BEAT", .05)
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # where the tests run in the background it is ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with pytest.raises(LostLock, match="goes on from the last checkpoint"), RunLock(tmp_path) as lock:
        assert lock.take()
        first = lock.file.read_bytes()
        while lock.file.read_bytes() == first: time.sleep(.01)
        lock.file.rename(lock.file.with_name("another"))
        for _ in range(20_000): time.sleep(.01)   # interrupted long before


# What a folder may hold.

@pytest.mark.parametrize("name", ["lock", "lock/x"])
@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("nowhere")], ids=["pipe", "folder", "link"]
)
def test_what_is_no_lock_is_named(tmp_path, name, make):
    if name == "lock" and make is Path.mkdir: pytest.skip("that is a free lock")
    if "/" in name: (tmp_path/"lock").mkdir()
    make(tmp_path/name)
    with pytest.raises(OSError, match=f"{tmp_path / name} does not belong to a run lock; delete it"):
        RunLock(tmp_path).take()


@pytest.mark.parametrize("content", ["", "[1]", "3", "[" * 5000, "\xff", '{"pid": 1}'])
def test_a_lock_that_says_nothing_is_observed(tmp_path, monkeypatch, content):
    elsewhere(tmp_path).write_text(content)
    lock = RunLock(tmp_path)
    assert not lock.take() and holder(tmp_path) == {}
    monkeypatch.setattr(runlock, "STALE", 0)
    assert lock.take()
    lock.release()


def test_claims_of_older_versions_are_observed_and_odd_ones_left_out(tmp_path, monkeypatch):
    for n, content in enumerate(["[1]", "3", "[" * 5000]): (tmp_path/f"claim-{n}.json").write_text(content)
    os.mkfifo(tmp_path/"claim-7.json")
    (tmp_path/"claim-x.json").mkdir()
    with pytest.warns(UserWarning, match="does not belong to a run lock; delete it") as warned:
        lock = RunLock(tmp_path)
        assert lock.take()
        lock.release()
    assert len({str(w.message) for w in warned}) == 5
    old = tmp_path/"claim-8.json"
    old.write_text('{"host": "elsewhere", "pid": 1, "thread": 2}')
    with pytest.warns(UserWarning):
        assert not lock.take()
        monkeypatch.setattr(runlock, "STALE", 0)
        assert lock.take() and not old.exists()
        lock.release()


def test_the_next_look_clears_what_a_killed_process_left(tmp_path):
    write(tmp_path/"metrics.csv", "epoch\n1\n")
    seal(tmp_path, dict(by="me"), ["metrics.csv"])
    before = {f.name for f in tmp_path.iterdir()}
    tidy(tmp_path)
    gone = subprocess.Popen(["true"])
    gone.wait()
    elsewhere(tmp_path, pid=gone.pid)
    (tmp_path/".lock-1").mkdir()
    for name in (".lock-1/1", ".abc.tmp", "checkpoint.safetensors", "failed.json"): (tmp_path/name).write_text("x")
    tidy(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == before
    (tmp_path/"record.json").write_text("{")
    (tmp_path/"checkpoint.safetensors").write_text("x")
    tidy(tmp_path)
    assert (tmp_path/"checkpoint.safetensors").exists()   # the record is broken, the checkpoint may be all there is


# Signals, to real processes.

@pytest.mark.parametrize(
    "signals", [("SIGTERM", "SIGINT"), ("SIGHUP", "SIGTERM", "SIGINT"), ("SIGINT", "SIGHUP"), ("SIGHUP",)], ids="+".join
)
def test_signals_in_any_order_leave_no_lock_and_a_checkpoint(signals):
    from bnonly.train import fit
    from test_train import Stop
    spec = Spec(arch="resnet8", epochs=1000)
    folder = run_dir(spec)
    heard = lambda: [signal.signal(getattr(signal, s), signal.SIG_DFL) for s in ("SIGINT", "SIGHUP", "SIGTERM")]
    run = subprocess.Popen(
        [Path(sys.executable).parent / "bnonly", "train", "--arch", "resnet8", "--epochs", "1000"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
    )
    while not (folder/"checkpoint.safetensors").exists():
        assert run.poll() is None, run.stderr.read()
        time.sleep(.1)
    for name in signals: run.send_signal(getattr(signal, name))   # at once: a process that is just ending hears none
    errors = run.communicate(timeout=120)[1]
    assert run.returncode == 1 and "bnonly: stopped" in errors and "Traceback" not in errors
    assert not [f.name for f in folder.iterdir() if f.name == "lock" or f.name.startswith(".")]
    before = (folder/"metrics.csv").read_text().splitlines()
    with pytest.raises(KeyboardInterrupt): fit(spec, cbs=[Stop(1)])
    after = (folder/"metrics.csv").read_text().splitlines()
    assert len(before) <= len(after) <= len(before) + 1 and after[:len(before)-1] == before[:-1]
