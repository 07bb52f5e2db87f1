"""The run lock: one process at a time works in the folder of a run; one that lost its lock writes nothing more there.

The lock of a run is a folder `lock` with one file in it, named by the holder's token, a random number that never
comes again.

- Taking a free lock: a private folder that holds the file is renamed to `lock`. That fails where `lock` is not empty.
- Taking over a stale lock: `lock/OLD` is renamed to `lock/NEW`. That fails unless OLD is still the one that holds.
- Releasing: `lock/OWN` is removed by name, so nobody can remove the lock of somebody else.

Each of these is one atomic rename or removal, on local and on network file systems; neither hard links nor flock are
needed. The holder's file says which process it is, and counts up every `BEAT` seconds. A lock is stale when its
process is known to have ended (same boot of the same machine, same process ids, and the process is gone or another
one has its id), or when an observer has seen no change for `STALE` seconds of its own clock. Clocks and times of
files play no part.

A process may sleep for longer than that at any instant and lose its lock unawares. So a file is written in three
steps: a temporary file, then `check` whether the lock is still held, then a rename onto its name. Who takes a lock
removes all temporary files before anything else. A late rename therefore comes before that, and is seen by the new
holder, or fails.
"""
import _thread, errno, json, os, secrets, stat, threading, time, warnings
from contextlib import suppress
from pathlib import Path

from .processes import ended, this_process

__all__ = ["BEAT", "STALE", "LostLock", "RunLock", "again", "check", "clear", "holder", "locked", "tidy", "unwritable"]

# seconds: how often a holder counts up, and for how long an observer sees it rest before it counts as gone
BEAT, STALE = 20, 300
PASSING = {getattr(errno, n) for n in ("ESTALE", "EIO", "EAGAIN", "EINTR", "ETIMEDOUT", "EREMOTEIO", "ENETDOWN",
                                       "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH", "ECONNRESET") if hasattr(errno, n)}
PAUSES = .1, .3, 1, 3   # seconds between attempts
_held = {}              # (process, thread, folder) to the lock that it took
_seen = {}              # a file to what was last seen in it, when, and for how many seconds it has not changed


class LostLock(RuntimeError):
    "Another process has taken the run over."


def again(call, *args):
    "The result of a call that is tried again after an error that passes, as a network file system has them."
    for pause in (*PAUSES, None):
        try: return call(*args)
        except OSError as e:
            if e.errno not in PASSING or pause is None: raise
        time.sleep(pause)


def unwritable(path, why: OSError) -> OSError:
    "What to say where a file or a folder cannot be written."
    reason = why.strerror or why
    return OSError(f"{path} could not be written ({reason}); free space or set BNONLY_RUNS to a folder that can.")


def foreign_file(path) -> OSError: return OSError(f"{path} does not belong to a run lock; delete it.")


def look(path) -> bytes | None:
    "The first bytes of an ordinary file, None where there is none; `OSError` for anything else, which is not opened."
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode): raise foreign_file(path)
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except (FileNotFoundError, NotADirectoryError): return None
    try: return os.read(fd, 4096)
    finally: os.close(fd)


def parse(content: bytes | None) -> dict:
    "What a file says of its process; nothing where it does not."
    try: said = json.loads(content or b"")
    except (ValueError, RecursionError): return {}
    return said if isinstance(said, dict) else {}


def token_of(folder) -> str | None:
    "The token that holds the lock of a run; None where it is free."
    place = Path(folder)/"lock"
    if os.path.islink(place): raise foreign_file(place)
    # what a network file system keeps of a removed file
    try: names = [n for n in os.listdir(place) if not n.startswith(".nfs")]
    except FileNotFoundError: return None
    except NotADirectoryError: raise foreign_file(place) from None
    if len(names) > 1: raise foreign_file(place)
    return names[0] if names else None


def holder(folder) -> dict:
    """The process that holds the lock of a run: host, pid and more; nothing where it is free, or does not say whose it
    is."""
    token = token_of(folder)
    said = parse(look(Path(folder)/"lock"/token)) if token else {}
    return said if said.get("token") == token else {}


def unchanged(path, content) -> float:
    """For how many seconds this process has seen a file rest. A gap between two looks counts as one beat, for this
    machine may have slept."""
    now, (before, then, quiet) = time.monotonic(), _seen.get(str(path), (None, 0, 0))
    quiet = quiet + min(now - then, BEAT) if before == content else 0
    _seen[str(path)] = content, now, quiet
    return quiet


def stale(file) -> bool:
    "Whether the holder of a lock is gone, by its process or by what this process has seen."
    content = look(file)
    who = parse(content)
    return who.get("token") == file.name and ended(who) or unchanged(file, content) >= STALE


def locked(folder) -> bool:
    "Whether a process holds the lock of a run that lives, or may live."
    token = token_of(folder)
    return token is not None and not stale(Path(folder)/"lock"/token)


def old_claims(folder) -> list:
    """Files with which older versions held a run; they renewed their time. Others of that name are named in a warning
    and left out."""
    found = []
    for file in Path(folder).glob("claim-*.json"):
        try: content = look(file)
        except OSError as e: warnings.warn(str(e)); continue
        if content is not None and content and not parse(content): warnings.warn(str(foreign_file(file))); continue
        if content is not None: found.append((file, (content, os.lstat(file).st_mtime_ns)))
    return found


def remove(*paths):
    "Remove files and empty folders, as far as they are there and can be."
    for path in paths:
        with suppress(OSError): again(lambda: (os.rmdir if stat.S_ISDIR(os.lstat(path).st_mode) else os.unlink)(path))


def clear(folder):
    """Remove what processes have left that were killed; only for the holder. A late writer then finds its temporary
    file gone."""
    folder, names = Path(folder), again(os.listdir, folder)
    for n in names:
        if n.startswith(".lock-"): remove(*(folder/n/o for o in again(_listed, folder/n)), folder/n)
        elif n.startswith(".") and n.endswith(".tmp"): again(_unlink, folder/n)
    if again(_finished, folder): remove(*(folder/n for n in names if n.startswith("checkpoint") or n == "failed.json"))
    remove(*(file for file, _ in again(old_claims, folder)))


def _finished(folder) -> bool:
    "Whether a record stands that can be read; beside a broken one a checkpoint may still be of use."
    record = folder/"record.json"
    try: return stat.S_ISREG(os.lstat(record).st_mode) and isinstance(json.loads(record.read_bytes()), dict)
    except (FileNotFoundError, ValueError, RecursionError): return False


def _listed(folder):
    try: return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError): return []


def _unlink(path):
    with suppress(FileNotFoundError, IsADirectoryError): os.unlink(path)


def check(folder):
    "`LostLock` where this thread took the lock of a run and another process has it now; nothing otherwise."
    lock = _held.get((os.getpid(), threading.get_ident(), os.path.abspath(folder)))
    if lock and not again(lock.held):
        lock.lost = True
        raise LostLock(f"{folder} was taken over by another process while this one slept; its record will stand.")


def tidy(folder):
    "Clear the folder of a finished run, where a process that was killed has left something and nobody is at work."
    def left(name):
        temporary = name.startswith(".") and name.endswith(".tmp")
        return temporary or name == "lock" or name.startswith((".lock-", "claim-", "checkpoint"))
    if any(map(left, again(_listed, folder))):
        # a folder that cannot be written to is none of a reader's concern
        with suppress(OSError), RunLock(folder) as lock: lock.take()


class RunLock:
    "One run for this process and no other, from `take` or `wait` to `release`."
    def __init__(self, folder):
        self.folder, self.token, self.lost, self.over = Path(folder), None, False, threading.Event()
        self.who, self.count = this_process() | dict(thread=threading.get_ident()), 0
        self.key = self.who["pid"], self.who["thread"], os.path.abspath(folder)

    @property
    def file(self): return self.folder/"lock"/self.token

    def held(self) -> bool:
        "Whether the lock is still ours."
        return self.token is not None and look(self.file) is not None

    def take(self) -> bool:
        """Take the lock, unless somebody holds it. `OSError` where its folder cannot be written to, or holds what is no
        lock."""
        try:
            again(lambda: os.makedirs(self.folder, exist_ok=True))
            # a list, for each is to be looked at
            if any([unchanged(*o) < STALE for o in again(old_claims, self.folder)]): return False
            if not again(self._enter): return False
            _held[self.key] = self
            clear(self.folder)
        except BaseException as e:
            self.release()
            if isinstance(e, OSError) and e.errno: raise unwritable(self.folder, e) from e
            raise
        self.over.clear()
        threading.Thread(target=self.beat, daemon=True).start()
        return True

    def _enter(self) -> bool:
        "Put our file into the lock, if it is free or stale; what decides is whether the file is there in the end."
        if self.token and self.held(): return True   # an error of the network hid that it was done
        held = token_of(self.folder)
        if held and not stale(self.folder/"lock"/held): return False
        self.token = secrets.token_hex(8)
        if held:
            with suppress(FileNotFoundError): os.rename(self.folder/"lock"/held, self.file)
        else: self._place(self.folder/f".lock-{self.token}")
        with suppress(FileNotFoundError):
            self.tell(self.file)
            return True
        self.token = None
        return False

    def _place(self, private):
        """Rename a folder with our file in it to `lock`, unless that is taken, or who took it has cleared our folder
        away."""
        try:
            os.mkdir(private)
            os.close(os.open(private/self.token, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            self.tell(private/self.token)
            # an empty one; some file systems rename onto nothing else
            with suppress(OSError): os.rmdir(self.folder/"lock")
            os.rename(private, self.folder/"lock")
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT): raise
        finally: remove(private/self.token, private)

    def tell(self, file):
        "Write who we are, and count up; `FileNotFoundError` where the file is not there."
        self.count += 1
        content = json.dumps(dict(token=self.token, beat=self.count, **self.who)).encode()
        fd = os.open(file, os.O_WRONLY | os.O_NOFOLLOW)
        try: os.pwrite(fd, content, 0); os.ftruncate(fd, len(content))
        finally: os.close(fd)

    def beat(self):
        "Count up until the run is over; interrupt the run when the lock is no longer ours."
        while not self.over.wait(BEAT):
            try: self.lost = not again(self.held)
            except OSError: continue   # away for longer
            if self.over.is_set(): return
            if not self.lost:
                with suppress(OSError): self.tell(self.file)
                continue
            if self.who["thread"] == threading.main_thread().ident: _thread.interrupt_main()
            return

    @staticmethod
    def _held_by(who):
        if who: return f"being trained by process {who.get('pid')} on {who.get('host')}; waiting for its record"
        return ("held by a process that does not say which it is; "
                f"waiting until its lock has rested for {STALE//60} minutes")

    def wait(self, say=print, pause: float = 1):
        """Take the lock as soon as nobody else holds it; at once where this thread holds it already.

        `say` is called with one sentence where there is somebody to wait for; `pause`: seconds between two looks.
        """
        looks, announced = 0, False
        while not (self.key in _held or self.take()):
            looks, who = looks+1, again(holder, self.folder)
            if not announced and (who or looks > 2):   # an empty file may be just being written
                say(f"{self.folder.name} is {self._held_by(who)}.")
                announced = True
            time.sleep(pause)
        return self

    def release(self):
        "Give up what `take` took."
        self.over.set()
        if self.token is None or os.getpid() != self.who["pid"]: return   # a forked process holds nothing
        remove(self.file, self.folder/"lock")
        if _held.get(self.key) is self: del _held[self.key]
        self.token = None

    def __enter__(self): return self

    def __exit__(self, kind, *_):
        self.release()
        if kind is KeyboardInterrupt and self.lost:
            raise LostLock(f"{self.folder} was taken over by another process while this one slept; "
                           "it goes on from the last checkpoint.") from None
