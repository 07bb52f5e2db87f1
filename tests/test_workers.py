"Worker processes, of which any may die."
import os
import re
import resource
import signal
import subprocess
import sys
import time
import warnings
from contextlib import closing
from pathlib import Path

import pytest
from bnonly.workers import WorkerDied, ending, in_processes, own_cores, quotas

ROOT = Path(__file__).parents[1]


def pid(_): return os.getpid()


def memory_runs_out():
    "As much as this process has, and no more."
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held, held))
    return len(bytearray(2**30))


def script(code, *flags):
    "A script of its own, which has no `if __name__ == '__main__'`; its process."
    command = [sys.executable, *flags, "-c", code]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def gone(pid):
    for _ in range(1000):
        try: os.kill(pid, 0)
        except ProcessLookupError: return True
        time.sleep(.1)


def test_each_item_is_called_once_in_as_many_processes_as_asked():
    found = dict(in_processes(lambda n: (n * n, os.getpid()), range(7), 3))
    assert {n: square for n, (square, _) in found.items()} == {n: n * n for n in range(7)}
    pids = {p for _, p in found.values()}
    assert len(pids) == 3 and os.getpid() not in pids and all(map(gone, pids))
    assert list(in_processes(pid, [], 3)) == []


def test_when_it_is_over_no_more_calls_are_made_and_those_in_progress_end(tmp_path):
    "The second call never ends by itself, and the third is not made."
    def call(n):
        (tmp_path / str(n)).write_text(str(os.getpid()))
        while n: time.sleep(1)
    over = lambda: (tmp_path / "1").exists() and (tmp_path / "1").stat().st_size > 0
    assert list(in_processes(call, range(3), 1, over=over)) == [(0, None)]
    assert gone(int((tmp_path / "1").read_text())) and not (tmp_path / "2").exists()
    assert list(in_processes(call, range(3), 1, over=lambda: True)) == []


@pytest.mark.parametrize("end,how,said", [
    (os.abort, "was ended by SIGABRT", "line .* in end_itself"),
    (lambda: os.kill(os.getpid(), 9), "was ended by SIGKILL, as the system does when memory runs out", "^$"),
    (lambda: os._exit(3), "ended with exit code 3", "^$"),
    (lambda: 1 / 0, "ended with exit code 1", "ZeroDivisionError: division by zero"),
    (memory_runs_out, "ended with exit code 1", "MemoryError")], ids=["abort", "kill", "exit", "raise", "memory"])
def test_a_process_that_dies_costs_its_own_call_alone(end, how, said, capfd):
    "What others wrote to their standard error is not among its last words, which are told in the error alone."
    def end_itself(n):
        print(f"these are the words of {n}", file=sys.stderr, flush=True)
        if n == 2: end()
        return n
    found = dict(in_processes(end_itself, range(6), 2))
    assert {n for n, r in found.items() if r == n} == {0, 1, 3, 4, 5}
    assert isinstance(found[2], WorkerDied) and str(found[2]) == f"its process {how}"
    words = found[2].words.splitlines()
    assert words[:2] == ["The last lines of its standard error:", "these are the words of 2"]
    assert found[2].__notes__ == [found[2].words]   # what a traceback shows below the error
    assert re.search(said, "\n".join(words[2:]))
    assert sorted(capfd.readouterr().err.splitlines()) == [f"these are the words of {n}" for n in (0, 1, 3, 4, 5)]


def test_exit_codes_in_words():
    assert ending(0) == "its process ended with exit code 0"
    assert ending(-signal.SIGSEGV) == "its process was ended by SIGSEGV"
    assert ending(-60) == "its process was ended by signal 60"   # one that has no name


def test_a_worker_is_replaced_when_it_is_old_or_spoilt():
    count = lambda **how: len({p for _, p in in_processes(pid, range(4), 1, **how)})
    assert (count(), count(life=0), count(spoilt=lambda result: True)) == (1, 4, 4)


def test_what_a_worker_says_is_passed_on(capfd):
    "Its standard error, like its standard output, reaches the terminal; both once."
    def speak(n):
        print(f"out {n}")
        warnings.warn(f"err {n}")
    list(in_processes(speak, range(2), 1))
    said = capfd.readouterr()
    assert said.out.split() == ["out", "0", "out", "1"]
    assert all(said.err.count(f"UserWarning: err {n}\n") == 1 for n in range(2))


def test_workers_live_in_the_same_world(monkeypatch, tmp_path):
    "Environment, folder, arguments, modules, filters of warnings; libraries start a thread for each core that is left."
    monkeypatch.setenv("SOMETHING", "new")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)

    def world(_):
        import own_module
        names = "SOMETHING", "OMP_NUM_THREADS", "MKL_NUM_THREADS"
        return own_module.answer, os.getcwd(), sys.argv, sys.warnoptions, *map(os.environ.get, names)
    (_, seen), = in_processes(world, [0], 1)
    assert seen == (42, str(tmp_path), sys.argv, sys.warnoptions, "new", "7", str(own_cores()))


def test_a_script_needs_no_guard_and_its_own_functions_travel():
    "`-W error` holds in the workers too: the warning ends the process."
    code = """
import warnings
from bnonly.workers import in_processes
def double(n):
    if n == 1: warnings.warn("a warning")
    return 2*n
print(sorted(in_processes(double, range(3), 2), key=str))
"""
    out, err = script(code, "-W", "error").communicate(timeout=300)
    assert (out, err) == ("[(0, 0), (1, WorkerDied('its process ended with exit code 1')), (2, 4)]\n", "")


def test_workers_end_with_who_stops_listening():
    with closing(in_processes(lambda n: (os.getpid(), time.sleep(1000 * n)), [0, 1], 2)) as results:
        (_, (first, _)) = next(results)
    assert gone(first)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_process_that_started_them(sign):
    "By Ctrl-C, which all processes of a terminal get and one tells of; by SIGKILL, which leaves no time to end them."
    code = """
import os, signal, time
from bnonly.workers import in_processes
os.setsid()
signal.signal(signal.SIGINT, signal.default_int_handler)   # where the tests run in the background it is ignored
try: list(in_processes(lambda n: (os.write(1, f"{os.getpid()}\\n".encode()), time.sleep(1000)), range(2), 2))
except KeyboardInterrupt: raise SystemExit("stopped")
"""
    process = script(code)
    pids = [int(process.stdout.readline()) for _ in range(2)]
    (os.killpg if sign == signal.SIGINT else os.kill)(process.pid, sign)
    assert all(map(gone, pids))
    assert process.communicate(timeout=300)[1] == ("stopped\n" if sign == signal.SIGINT else "")


def test_cores_are_those_that_the_process_may_use():
    code = "from bnonly.workers import own_cores; print(own_cores())"
    if not hasattr(os, "sched_setaffinity"): pytest.skip("this system binds no process to cores")
    one = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}]); "
    assert script(one + code).communicate(timeout=300)[0].strip() == "1"
    assert 1 <= own_cores() <= len(os.sched_getaffinity(0))


def v1(group, quota):
    return {f"cpu/{group}cpu.cfs_quota_us": quota, f"cpu/{group}cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize("groups,files,cores", [
    ("0::/\n", {}, []),
    ("0::/\n", {"cpu.max": "50000 100000\n"}, [.5]),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "150000 100000\n"}, [1.5]),
    ("3:cpu,cpuacct:/a\n2:cpuset:/a\n", v1("a/", "300000\n"), [3]),
    ("3:cpu:/of/the/host\n0::/\n", v1("", "-1\n"), []),
    ("3:cpu:/of/the/host\n", v1("", "200000\n"), [2])])
def test_control_groups_allow_a_share_of_the_cores(tmp_path, monkeypatch, groups, files, cores):
    "Version 2 and 1; of a container that cannot see its own group's name the one at the root."
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = quotas(tmp_path / "cgroup", tmp_path)
    assert found == cores and quotas(tmp_path / "none") == []
    monkeypatch.setattr("bnonly.workers.quotas", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    assert own_cores() == {.5: 1, 1.5: 2}.get(*cores, cores[0]) if cores else 16
