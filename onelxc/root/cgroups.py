"""Where are the control groups of a VM's container, and which processes are in them?

The kernel's word on what runs, whatever libvirt knows. libvirt names the group of a container after its controller
(`libvirt_lxc`), so several can exist for one VM when a controller died and its container went on:

    v1  /sys/fs/cgroup/<controller>/machine/lxc-<controller's pid>-one-5.libvirt-lxc
    v2  /sys/fs/cgroup/machine.slice/machine-lxc\\x2d<controller's pid>\\x2done\\x2d5.scope

Reads, thaws and removes; who is killed when is `orphans`' part, what is frozen when `freezer`'s.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from onelxc import names
from onelxc.root import trees

_V1 = re.compile(r"lxc-(\d+)-(.+)\.libvirt-lxc\Z")
_V2 = re.compile(r"machine-lxc-(\d+)-(.+)\.scope\Z")
_PARENTS = ("machine", "machine.slice")
WALK_S = 30.0
"""Some 300,000 groups."""


@dataclass(frozen=True)
class Group:
    """One control group of a container. `kind` is the v1 controller ("freezer", "cpu,cpuacct" …) or "" for v2."""

    path: str
    kind: str
    controller: int
    """Pid of the libvirt_lxc that it was made for; that process may be gone."""
    vm_id: int


def version() -> int:
    """2 where the unified hierarchy is all there is, else 1: what libvirt then uses for containers."""
    return 2 if os.path.exists("/sys/fs/cgroup/cgroup.controllers") else 1


def hierarchies() -> tuple[tuple[str, str], ...]:
    """(mount point, kind) of every mounted hierarchy; `kind` as in Group."""
    found = []
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            _, point, kind, options = line.split(" ")[:4]
            if kind == "cgroup2":
                found.append((point, ""))
            elif kind == "cgroup":
                known = ("rw", "ro", "nosuid", "nodev", "noexec", "relatime", "xattr", "clone_children")
                found.append((point, ",".join(word for word in options.split(",") if word not in known)))
    return tuple(found)


def groups(vm_id: int | None = None) -> tuple[Group, ...]:
    """The groups of one VM, or of all the VMs of ours."""
    found = []
    for point, kind in hierarchies():
        for parent in _PARENTS:
            base = os.path.join(point, parent)
            try:
                entries = os.listdir(base)
            except OSError:
                continue
            for entry in entries:
                match = _V1.match(entry) or _V2.match(_unescape(entry))
                owner = names.vm_id_of(match.group(2)) if match else None
                if match and owner is not None and vm_id in (None, owner):
                    found.append(Group(os.path.join(base, entry), kind, int(match.group(1)), owner))
    return tuple(found)


def _unescape(unit: str) -> str:
    return re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match.group(1), 16)), unit)


def below(path: str) -> Iterator[tuple[int, str]]:
    """All the groups below one, children before their parents: (descriptor of the directory, name in it).

    A tenant decides how many there are and how deep they lie: see `trees`. The descriptor is good until the next turn.
    TimeoutError where it finds no end: whoever is in there may make groups as fast as we look.
    """
    deadline = time.monotonic() + WALK_S
    try:
        here = os.open(path, trees.DIRECTORY)
    except FileNotFoundError:
        return
    waiting, way = [_children(here)], list[str]()
    try:
        while waiting[-1] or way:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, f"more groups in it than can be looked at in {WALK_S:g} s", path)
            if waiting[-1]:
                name = waiting[-1].pop()
                with contextlib.suppress(FileNotFoundError):
                    here = trees.go(here, name)
                    way.append(name)
                    waiting.append(_children(here))
            else:
                waiting.pop()
                here = trees.go(here, "..")
                yield here, way.pop()
    finally:
        os.close(here)


def _children(group: int) -> list[str]:
    """The names of the groups in a group, which counts them in its links."""
    if os.fstat(group).st_nlink == 2:
        return []
    try:
        with os.scandir(group) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def processes(path: str) -> tuple[int, ...]:
    """The processes in a group and below it."""
    return tuple(each_process(path))


def each_process(path: str) -> Iterator[int]:
    """The processes in a group, then those below it. A group that is gone has none; TimeoutError as in `below`."""
    yield from _read_processes(path)
    for directory, name in below(path):
        yield from _read_processes(name, directory)


def _read_processes(group: str, directory: int | None = None) -> list[int]:
    try:
        fd = os.open(f"{group}/cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:
            # 0 is a process of another pid namespace, of which we could only be a guest
            return [int(pid) for pid in file.read().split() if pid != b"0"]
    except OSError:
        return []


def write_below(path: str, name: str, text: str) -> None:
    """One control file of all the groups below one, and of itself."""
    for directory, group in below(path):
        write(group, name, text, directory)
    write(path, name, text)


def remove(path: str, *, limit_s: float = 5.0) -> None:
    """Remove an empty group with all below it; the kernel takes a moment to let go of the dead. OSError in the end."""
    deadline = time.monotonic() + limit_s
    while True:
        problem: OSError | None = None
        for directory, name in below(path):
            problem = _remove(name, directory) or problem
        problem = _remove(path) or problem
        if problem is None:
            return
        if time.monotonic() > deadline:
            raise problem
        time.sleep(0.05)


def _remove(name: str, directory: int | None = None) -> OSError | None:
    """Why a group could not be removed; what is gone is removed."""
    try:
        os.rmdir(name, dir_fd=directory)
    except FileNotFoundError:
        pass
    except OSError as error:
        return error
    return None


def limited(group: Group) -> str:
    """Where libvirt sets a container's limits: on version 2 below systemd's unit, whose own limits are systemd's."""
    below_unit = os.path.join(group.path, "libvirt")
    return below_unit if os.path.isdir(below_unit) else group.path


def write(path: str, name: str, text: str, directory: int | None = None) -> None:
    """One control file of a group; a group that is gone meanwhile is no error."""
    try:
        with open(os.open(os.path.join(path, name), os.O_WRONLY | os.O_CLOEXEC, dir_fd=directory), "w") as file:
            file.write(text)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV):
            raise
