"""One run per output folder: a second one would write over the first one's checkpoints."""

import contextlib
import fcntl
import json
import os
import shlex
import socket
import sys
import threading
import time

from mechanisms.errors import UserError

LOCK = "run.lock"
BEAT = 10  # seconds between two touches of the lock
WAIT = 4 * BEAT  # for a touch from another machine, whose processes are not seen from here


@contextlib.contextmanager
def only_run_in(folder):
    """While a run writes to `folder`, which is made if need be; no other run, on any machine, gets in.

    Raises UserError if another one is there, or the folder cannot be made or written to.
    """
    try:
        made = not os.path.isdir(folder)
        os.makedirs(folder, exist_ok=True)
        mine = _take(folder)
    except OSError as error:
        where = " (a link to nowhere)" if os.path.islink(folder) and not os.path.exists(folder) else ""
        raise UserError(f"--output_dir {folder}{where} cannot be written to: {error.strerror}. Choose another, or put "
                        "that right") from error
    ended = threading.Event()
    threading.Thread(target=_beat, args=(folder, mine, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):  # the folder may be gone, or its disk
            if _holder(os.path.join(folder, LOCK)) == mine:
                os.remove(os.path.join(folder, LOCK))
            if made:
                os.rmdir(folder)  # if nothing came of it


def check_still_mine(folder):
    """Raises UserError if another run took the folder over, as from a run that hung on another machine."""
    holder = _holder(os.path.join(folder, LOCK))
    if holder and not _is_me(holder):
        raise UserError(f"{_shown(holder)} has taken over --output_dir {folder}: this run stops before it writes there")


def _take(folder):
    """Make the lock; the lock's content. Raises UserError if another run holds it."""
    path = os.path.join(folder, LOCK)
    mine = {**_me(), "since": time.time(), "command": _command()}
    while True:
        with open(path, "a+", encoding="utf-8") as file:
            with contextlib.suppress(OSError):  # file systems without locks of this kind
                fcntl.flock(file, fcntl.LOCK_EX)  # while we look and write: two that start at once come one by one
            if not os.path.exists(path) or os.fstat(file.fileno()).st_ino != os.stat(path).st_ino:
                continue  # removed by its owner meanwhile
            holder = _holder(path)
            if holder and not _is_me(holder) and _is_alive(holder, path):
                raise UserError(
                    f"--output_dir {folder} is in use by {_shown(holder)}. Two runs in one folder destroy each other's "
                    f"checkpoints: stop that one, or choose another folder (if it is gone for sure, delete {path})")
            file.truncate(0)
            json.dump(mine, file)
            file.flush()
            os.fsync(file.fileno())
        return mine


def _holder(path):
    """What a lock says, or None if there is none or it says nothing."""
    try:
        with open(path, encoding="utf-8") as file:
            holder = json.load(file)
    except (ValueError, RecursionError, FileNotFoundError):
        return None
    return holder if isinstance(holder, dict) and {"host", "pid"} <= holder.keys() else None


def _me():
    return {"host": socket.gethostname(), "pids": _pid_namespace(), "pid": os.getpid(), "started": _started("self")}


def _is_me(holder):
    return {name: holder.get(name) for name in _me()} == _me()


def _is_alive(holder, path):
    """Whether the holder of a lock runs. On another machine, or in another container, its heartbeat says so."""
    if (holder["host"], holder.get("pids")) == (socket.gethostname(), _pid_namespace()):
        return holder.get("started") is not None and _started(holder["pid"]) == holder["started"]
    before, end = os.stat(path).st_mtime_ns, time.monotonic() + WAIT  # no two clocks are compared
    print(f"note: looking for {WAIT} s whether the run of {_shown(holder)} is still there", flush=True)
    while time.monotonic() < end:
        time.sleep(1)
        if os.stat(path).st_mtime_ns != before:
            return True
    return False


def _pid_namespace():
    """What process ids are counted in: that of a container, and since which start of the machine."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid):
    """When a process started, as /proc says; None if it does not run. Another process may have its id by now."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else fields[18]


def _command():
    """The command line, without what a flag that may be secret says."""
    words, hidden = [], False
    for word in sys.argv:
        flag, equals, _ = word.partition("=")
        secret = flag.startswith("--") and any(part in flag.lower() for part in ("token", "key", "secret", "password"))
        words.append("..." if hidden else f"{flag}=..." if secret and equals else word)
        hidden = secret and not equals
    return shlex.join(words)


def _shown(holder):
    return f"process {holder['pid']} on {holder['host']} ({holder.get('command')})"


def _beat(folder, mine, ended):
    path = os.path.join(folder, LOCK)
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):  # a file server that is away for a while
            if _holder(path) == mine:
                os.utime(path)
