"""The mark that the guard leaves at each start of a container, by which the start is known to have been guarded.

A file for each VM in /run, which root alone reads: when the guard last ran, in seconds since boot, and which controller
(libvirt's process for the container) was found to have been started after that. A mark is good for one start. It lies
in /run because a full disk must not keep a container from rebooting. Imports no more than a start can afford.
"""

from __future__ import annotations

import os
import time

from onelxc import kernelfile, names
from onelxc.errors import line

HOOK = "/etc/libvirt/hooks/lxc.d/onelxc"
DIRECTORY = f"{names.RUN}/guard"
LOG = "/var/log/onelxc/hub.log"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def mark(vm_id: int) -> None:
    """The guard has seen to the root file system: the next controller may start. OSError if that cannot be noted."""
    os.makedirs(DIRECTORY, 0o700, exist_ok=True)
    _write(_path(vm_id), f"{now_s():.3f}")


def forget(vm_id: int) -> None:
    """The VM is gone."""
    for suffix in ("", ".seen"):
        try:
            os.unlink(_path(vm_id) + suffix)
        except FileNotFoundError:
            pass


def is_guarded(vm_id: int, controller: int) -> bool:
    """Whether the guard ran before this controller was started, and for no other one."""
    started = started_ticks(controller)
    this = f"{controller} {started}"
    seen = kernelfile.text(_path(vm_id) + ".seen")
    if seen == this:
        return True
    text = kernelfile.text(_path(vm_id))
    if not text or not started:
        return False
    at = float(text)
    # a controller is started at some moment of its tick, after its mark: the last one's mark lies before its end
    free_from = (int(seen.split()[1]) + 1) * TICK_S if seen else 0.0
    if free_from <= at < (started + 1) * TICK_S:
        _write(_path(vm_id) + ".seen", this)
        return True
    return False


def started_ticks(pid: int) -> int:
    """When a process was started, in clock ticks since boot; 0 if it is gone. proc(5): field 22 of stat."""
    stat = kernelfile.text(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return int(stat[19]) if len(stat) > 19 else 0


def age_s(pid: int) -> float:
    """For how long a process has been running."""
    return now_s() - started_ticks(pid) * TICK_S


def now_s() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def tell(text: str) -> None:
    """A line in the hub's log, for what no action is there to be told of."""
    try:
        fd = os.open(LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:
        return
    try:
        os.write(fd, f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line(text)}\n".encode())
    except OSError:
        pass
    finally:
        os.close(fd)


def _path(vm_id: int) -> str:
    return f"{DIRECTORY}/{vm_id}"


def _write(path: str, text: str) -> None:
    new = f"{path}.{os.getpid()}"  # the status probe notes the same as an action, at the same time
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        if os.write(fd, text.encode()) != len(text):
            raise OSError(28, os.strerror(28), path)
    finally:
        os.close(fd)
    os.rename(new, path)
