"""Who works on a VM just now? One lock per VM on the host, taken by every action and by the reaper.

A file under /run, locked with flock, that names its holder so that a cancel can ask it to give up. The file is
removed while it is still locked; whoever waited for it finds that out and takes the new one. A cancel also leaves a
mark with the time: a deploy whose process had already begun by then, but which had not come this far, gives up too.
"""

from __future__ import annotations

import errno
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
from onelxc.root import durable

MARKS = os.path.dirname(VmPaths(0).lock)
NEVER_INTERRUPTED = ("cancel", "release", "reap")
"""Verbs that only give things back: a cancel waits for them."""


@dataclass(frozen=True)
class Holder:
    """The helper that has the lock; `started` (clock ticks since boot) tells it from a later process of that number."""

    pid: int
    started: int
    verb: str


class VmLock:
    """The lock of one VM, once held. `path` is "" for one that has no file."""

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self._fd = fd

    def release(self) -> None:
        if self._fd >= 0:
            if self.path:
                durable.remove(self.path)
            os.close(self._fd)
            self._fd = -1


def try_acquire(vm_id: int, verb: str) -> VmLock | None:
    """The lock if nobody holds it.

    Where no file can be made (/run is full or read-only) the directory of all VMs' state is locked instead: one action
    at a time then. Whoever has the one looks at the other, so that no two act on one VM.
    """
    path = VmPaths(vm_id).lock
    try:
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        return _by_file(path, verb)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        return _by_directory(path, error)


def _by_file(path: str, verb: str) -> VmLock | None:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        if not _flock(fd):
            return None
        if is_at(fd, path):
            break
        os.close(fd)
    lock = VmLock(path, fd)
    directory = _open_directory()
    if directory >= 0 and not _flock(directory, fcntl.LOCK_SH):
        lock.release()
        return None
    if directory >= 0:
        os.close(directory)
    holder = {"pid": os.getpid(), "started": started_of(os.getpid()), "verb": verb}
    try:
        os.truncate(fd, 0)
        durable.write_all(fd, json.dumps(holder).encode())
    except OSError:
        pass  # nobody can ask us to give up then
    return lock


def _by_directory(path: str, error: OSError) -> VmLock | None:
    directory = _open_directory()
    if directory < 0:
        raise error
    if not _flock(directory):
        return None
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return VmLock("", directory)
    os.close(fd)
    os.close(directory)
    return None  # a file is there after all: by that one, then


def _open_directory() -> int:
    try:
        return os.open(os.path.dirname(VmPaths(0).state), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return -1


def _flock(fd: int, how: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock is ours now. If not, the descriptor is closed."""
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
        return True
    except BaseException as error:
        os.close(fd)
        if isinstance(error, BlockingIOError):
            return False
        raise


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


def is_at(fd: int, path: str) -> bool:
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
    durable.replace(path, f"{time.clock_gettime(time.CLOCK_BOOTTIME):.3f}".encode(), flush=False)


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
    try:
        names = [name for name in os.listdir(MARKS) if name.endswith(".cancelled")]
    except OSError:
        return
    for name in names:
        path = os.path.join(MARKS, name)
        try:
            with open(path) as file:
                marked = float(file.read() or 0)
            if time.clock_gettime(time.CLOCK_BOOTTIME) - marked > age_s:
                os.unlink(path)
        except (OSError, ValueError):
            continue
