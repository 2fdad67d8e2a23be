"""Who works on a VM just now? One lock per VM on the host, taken by every action and by the reaper.

A file under /run, locked with flock, that names its holder so that a cancel can ask it to give up. The file is
removed while it is still locked; whoever waited for it finds that out and takes the new one. A cancel also leaves a
mark with the time: a deploy whose process had already begun by then, but which had not come this far, gives up too.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from onelxc import jsontext
from onelxc.errors import GiveUpError, HelperError
from onelxc.model import VmPaths

NEVER_INTERRUPTED = ("cancel", "release", "reap")
"""Verbs that only give things back: a cancel waits for them."""


@dataclass(frozen=True)
class Holder:
    """The helper that has the lock; `started` (clock ticks since boot) tells it from a later process of that number."""

    pid: int
    started: int
    verb: str


class VmLock:
    """The lock of one VM, once held."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            os.unlink(self.path)
            os.close(self._fd)
            self._fd = -1


def try_acquire(vm_id: int, verb: str) -> VmLock | None:
    """The lock if nobody holds it."""
    path = VmPaths(vm_id).lock
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        if _is_at(fd, path):
            break
        os.close(fd)
    os.truncate(fd, 0)
    holder = {"pid": os.getpid(), "started": started_of(os.getpid()), "verb": verb}
    os.pwrite(fd, json.dumps(holder).encode(), 0)
    return VmLock(path, fd)


def acquire(
    vm_id: int,
    verb: str,
    *,
    timeout_s: float,
    log: Callable[[str], None],
    check: Callable[[], None] = lambda: None,
) -> VmLock:
    """Wait for the lock. A `cancel` asks every holder to give up, except those that are giving back themselves.

    `check` is called while waiting, and ends that by raising.
    """
    deadline = time.monotonic() + timeout_s
    asked: Holder | None = None
    told = False
    while True:
        lock = try_acquire(vm_id, verb)
        if lock is not None:
            return lock
        other = holder(vm_id)
        if other and not told:
            log(f"waiting for {other.verb} of VM {vm_id} (process {other.pid})")
            told = True
        if verb == "cancel" and other and other != asked and other.verb not in NEVER_INTERRUPTED:
            _ask_to_give_up(other)
            asked = other
        if time.monotonic() > deadline:
            by = f"{other.verb} (process {other.pid}) is" if other else "another action is"
            raise HelperError(f"Cannot {verb} VM {vm_id}: {by} still at work on it after {timeout_s:g} s")
        check()
        time.sleep(0.02)


def holder(vm_id: int) -> Holder | None:
    """Who wrote last that it holds the lock, if that process still lives."""
    try:
        with open(VmPaths(vm_id).lock, "rb") as file:
            data = jsontext.loads(file.read())
        found = Holder(pid=int(data["pid"]), started=int(data["started"]), verb=str(data["verb"]))
        return found if started_of(found.pid) == found.started else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def started_of(pid: int) -> int:
    """Start of a process in clock ticks since boot (/proc/PID/stat, field 22). OSError if it has ended."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    if fields[0] in (b"Z", b"X"):
        raise ProcessLookupError(pid, "it has ended and only waits for its parent")
    return int(fields[19])


def _ask_to_give_up(other: Holder) -> None:
    try:
        pidfd = os.pidfd_open(other.pid)
    except OSError:
        return
    try:
        # after pidfd_open, so that the number cannot have gone to another process in between
        if started_of(other.pid) == other.started:
            signal.pidfd_send_signal(pidfd, signal.SIGTERM)
    except OSError:
        pass
    finally:
        os.close(pidfd)


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _mark_path(vm_id: int) -> str:
    return f"{VmPaths(vm_id).lock}.cancelled"


def mark_give_up(vm_id: int) -> None:
    """Written by a cancel before it waits for the lock. The time is seconds since boot, sleep included."""
    path = _mark_path(vm_id)
    os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "w") as file:
        file.write(f"{time.clock_gettime(time.CLOCK_BOOTTIME):.3f}")
    os.rename(temporary, path)


def check_give_up(vm_id: int, verb: str, started: float) -> None:
    """GiveUpError for a deploy that began (`started`, seconds since boot) before the last cancel did."""
    path = _mark_path(vm_id)
    try:
        with open(path) as file:
            marked = float(file.read())
    except (FileNotFoundError, ValueError):
        return
    if started < marked:
        raise GiveUpError(f"Cannot {verb} VM {vm_id}: it was cancelled meanwhile")
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def forget_old_marks(age_s: float = 3600) -> None:
    """Marks of cancels that no deploy can be older than any more."""
    directory = os.path.dirname(VmPaths(0).lock)
    try:
        names = [name for name in os.listdir(directory) if name.endswith(".cancelled")]
    except FileNotFoundError:
        return
    for name in names:
        path = os.path.join(directory, name)
        try:
            if time.time() - os.stat(path).st_mtime > age_s:
                os.unlink(path)
        except FileNotFoundError:
            continue
