"""How does a disk leave a running container? By an unmount in each of its mount namespaces, unless somebody uses it.

Lets go of nothing on the host. Also what undoes an attach that was not finished: see `release.GIVE_BACK`.
"""

from __future__ import annotations

import itertools
import os
import time
from typing import Any

from onelxc.errors import NoSuchDomainError, StorageError
from onelxc.root import inside, mounts
from onelxc.root.work import Work

LEAVE_S = 60.0
MOST_POINTS = 1000
"""A tenant may mount his disk at as many places as he likes, in as many namespaces."""


def give_back(work: Work, what: dict[str, Any]) -> None:
    """The disk of a journal entry (disk, source, target, id_base) is no longer shown to the container."""
    source = str(what["source"])
    if mounts.is_mounted(source):
        id_base = what["id_base"]
        leave(work.vm_id, int(what["disk"]), source, str(what["target"]), None if id_base is None else int(id_base))


def leave(vm_id: int, disk_id: int, source: str, target: str, id_base: int | None) -> None:
    """Unmount the disk in every namespace of the container. If it is in use, it is where it was, and StorageError."""
    device, st_dev = number(source), os.stat(source).st_dev
    deadline = time.monotonic() + LEAVE_S
    try:
        init = inside.init_pid(vm_id)
    except NoSuchDomainError:
        return
    pids = inside.processes(init)
    gone: list[str] = []
    # the namespace of init last: it has the copy that is put back if somebody uses another
    for pid in (*(pid for pid in _namespaces(pids, init)), init):
        here = (mount.point for mount in inside.mounts_of(pid) if mount.device == device)
        points = list(itertools.islice(here, MOST_POINTS + 1))
        if len(points) > MOST_POINTS:
            raise StorageError(f"DISK {disk_id} is in use: it is mounted at more than {MOST_POINTS} places inside")
        for point in reversed(points):
            remove = pid == init and point == target == f"/media/one-disk.{disk_id}"
            if time.monotonic() < deadline and _detach(pid, point, remove=remove):
                gone += [point] if pid == init else []
                continue
            below = [mount.point for mount in inside.mounts_of(pid) if mount.point.startswith(f"{point}/")][:1]
            names = ", ".join(inside.users(inside.processes(init), st_dev))
            if target in gone:
                inside.attach(init, source, target, id_base)
            why = names or (f"what is mounted at {below[0]} inside" if below else "the kernel")
            raise StorageError(f"DISK {disk_id} is in use by {why}")


def _detach(pid: int, point: str, *, remove: bool) -> bool:
    """False, too, where a path inside does not let anybody through."""
    try:
        return inside.detach(pid, point, remove=remove)
    except StorageError:
        return False


def _namespaces(pids: tuple[int, ...], init: int) -> list[int]:
    """One process for each mount namespace of the container other than that of its init; never the host's own."""
    seen = {os.readlink("/proc/self/ns/mnt")}
    found = []
    for pid in (init, *pids):
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
        except OSError:
            continue
        if namespace not in seen:
            seen.add(namespace)
            found.append(pid)
    return [pid for pid in found if pid != init]


def number(point: str) -> str:
    """MAJOR:MINOR, as mountinfo writes it, of the file system mounted at `point`."""
    mount = inside.own_mount(point)
    if mount is None:
        raise StorageError(f"Cannot find what is mounted at {point}: nothing is")
    return mount.device
