"""The container's own group in the hierarchy that systemd names, on hosts of cgroup version 1 without systemd.

A systemd in a container makes its groups there. libvirt makes none for a container in this hierarchy: the controller
(`libvirt_lxc`) gives *its own* group, and all that lies directly below it, to the ids of the container's root. Started
as it comes, that is the top of the host's hierarchy with the groups of all other containers, and before Linux 5.17 the
host's release_agent, which runs as root.

So the controller has to begin life in a group made for this container. libvirt starts it from the thread that has
called the hook, and version 1 lets single threads into groups: the hook enters that thread at "start", and takes it out
again when the start is over (`at_hook`). The directories above are root's, and libvirt does not touch them:

    /sys/fs/cgroup/systemd/onelxc.slice/onelxc-5.slice      owned by the ids of one-5

Both are named as slices, since systemd finds the unit of a process by skipping the slices of its path. Who ends the
container removes its group.
"""

from __future__ import annotations

import contextlib
import os

from onelxc import names
from onelxc.errors import HypervisorError
from onelxc.root import cgroups

KIND = "name=systemd"
PARENT = "onelxc.slice"
_SYSTEMDS = ("init.scope", "system.slice", "user.slice")
_DAEMONS = ("libvirtd", "virtlxcd")
_HOPS = 8
"""So many processes may lie between libvirt and whoever is asked to enter its thread."""


def at_hook(vm_id: int, operation: str) -> None:
    """To be called by libvirt's hook at each operation; HypervisorError if the container must not be started."""
    point = _hierarchy()
    if point is None:
        return
    try:
        if operation == "start":
            _leave(point, *_caller())
            _make(point, vm_id)
            _enter(path(point, vm_id), _caller()[1])
        elif operation in ("started", "stopped"):
            _leave(point, *_caller())
    except OSError as error:
        raise HypervisorError(
            f"Cannot give {names.deploy_id(vm_id)} a control group of its own: {error.filename}: {error.strerror}"
        ) from error


def _hierarchy() -> str | None:
    """Where it is mounted; None where libvirt leaves all groups to the host's systemd, or there is none."""
    if os.path.isdir("/run/systemd/system"):
        return None
    return next((point for point, kind in cgroups.hierarchies() if kind == KIND), None)


def path(point: str, vm_id: int) -> str:
    """The container's own group below a hierarchy's mount point."""
    return os.path.join(point, PARENT, f"onelxc-{vm_id}.slice")


def procs(vm_id: int) -> str | None:
    """cgroup.procs of the container's own group, None if it has none."""
    point = _hierarchy()
    file = None if point is None else os.path.join(path(point, vm_id), "cgroup.procs")
    return file if file is not None and os.path.exists(file) else None


def _make(point: str, vm_id: int) -> None:
    """An empty group below directories that are root's, whoever had got them from an earlier driver."""
    parent = os.path.join(point, PARENT)
    own = path(point, vm_id)
    os.makedirs(parent, 0o755, exist_ok=True)
    for directory in (point, parent):
        _give_to_root(directory)
    with contextlib.suppress(OSError):  # what the boot before has left; somebody may still be dying in it
        cgroups.remove(own, limit_s=0.5)
    os.makedirs(own, 0o755, exist_ok=True)
    _give_to_root(own)


def _give_to_root(directory: str) -> None:
    if os.stat(directory).st_uid != 0:
        for each in (directory, *(entry.path for entry in _entries(directory) if entry.is_file(follow_symlinks=False))):
            os.chown(each, 0, 0)


def _caller() -> tuple[int, int]:
    """(process, thread) of libvirt's that waits for this hook: the one whose child is this process, or an ancestor."""
    child = os.getpid()
    for _ in range(_HOPS):
        parent = _parent(child)
        if parent == 0:
            break
        with open(f"/proc/{parent}/comm") as file:
            daemon = file.read().strip() in _DAEMONS
        if daemon:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    if str(child) in file.read().split():
                        return parent, int(thread)
        child = parent
    raise OSError(3, "it is not libvirt that has called the hook", "/proc")


def _parent(pid: int) -> int:
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[1])


def _enter(group: str, thread: int) -> None:
    with open(os.path.join(group, "tasks"), "w") as file:
        file.write(str(thread))


def _leave(point: str, process: int, thread: int) -> None:
    """Take a thread of libvirt's out of a container's group, if it is in one."""
    with open(f"/proc/{process}/task/{thread}/cgroup", errors="surrogateescape") as file:
        inside = any(line.split(":", 2)[1] == KIND and f"/{PARENT}/" in line for line in file)
    if inside:
        _enter(point, thread)


def remove(vm_id: int, ids: range) -> None:
    """Remove the group of a container that has ended, and whatever else a systemd in it has made. OSError if it stays.

    A privileged one makes groups of the same path in every hierarchy. Drivers before 0.3 let containers have the top of
    the hierarchy: what belongs to the ids of this one there goes as well.
    """
    if os.path.isdir("/run/systemd/system"):
        return
    for point, kind in cgroups.hierarchies():
        if not kind:
            continue
        own = path(point, vm_id)
        if os.path.isdir(own):
            cgroups.remove(own)
        for entry in _entries(point):
            if entry.name in _SYSTEMDS or (kind == KIND and entry.name != PARENT and _owned(entry.path, ids)):
                _remove_unused(entry)
        if kind == KIND and _owned(point, ids):
            _give_to_root(point)


def _remove_unused(entry: os.DirEntry[str]) -> None:
    """Remove a group that nobody is in. Somebody may come just then: not our group any more."""
    if not entry.is_dir(follow_symlinks=False) or cgroups.processes(entry.path):
        return
    with contextlib.suppress(OSError):
        cgroups.remove(entry.path, limit_s=0.5)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        return list(entries)


def _owned(directory: str, ids: range) -> bool:
    try:
        return os.stat(directory).st_uid in ids
    except FileNotFoundError:
        return False
