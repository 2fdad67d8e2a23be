"""Whether a running container may go on: the guard has seen its start, and it holds nothing of the host.

The second line behind the guard (`guard`). Looked at after every start, by whoever started it or, after a reboot from
inside, by the hub; and by the reaper. What may not go on is ended: a container that has the host's file systems has
the host. A tenant can hide a mount from this look: the guard is what keeps the host, and this tells when it fails.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from onelxc import mounttable
from onelxc.errors import HypervisorError, StorageError
from onelxc.model import deploy_id
from onelxc.root import cgroups, guard, orphans, starts
from onelxc.root.work import Work

SETUP_S = 30.0
"""How long libvirt may take to set a container up. Until then process 1 is libvirt's own and sees all of the host."""

WAIT_S = 5.0
"""How long the set-up is waited for after a start; the reaper looks again."""

TABLE_BYTES = 32 << 20
"""Of a container's mount tables together. The kernel allows 100,000 mounts in each (fs.mount-max), usually of some
hundred bytes."""

VIEWS, PROCESSES = 64, 4096
"""So many mount namespaces, and processes, of a container are looked at."""

_PRIVILEGED_KINDS = frozenset((
    "sysfs", "debugfs", "tracefs", "securityfs", "configfs", "pstore", "fusectl", "bpf", "efivarfs", "binfmt_misc",
    "mqueue", "hugetlbfs", "devtmpfs", "selinuxfs", "rpc_pipefs", "autofs",
))  # fmt: skip
"""Of what the kernel has one for all; root of a privileged container may mount it."""


def enforce(work: Work) -> None:
    """End the container if it may not go on; HypervisorError says why. For whoever has just started it."""
    why = _wait_for_fault(work.vm_id)
    if why:
        orphans.end(work.vm_id)
        raise HypervisorError(f"Ended {deploy_id(work.vm_id)}: {why}")


def _wait_for_fault(vm_id: int) -> str:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        found = orphans.processes_of(cgroups.groups(vm_id))
        if found is None or not _in_setup(found[1]):
            break
        time.sleep(0.02)
    return fault(vm_id, cgroups.groups(vm_id), HostTable(), at_start=True)


class HostTable:
    """The host's own mounts, read once for all containers."""

    def __init__(self) -> None:
        table, _ = mounttable.read("/proc/self/mountinfo", TABLE_BYTES)
        self.rows = mounttable.rows(table)
        self.devices = mounttable.host_devices(table)


def fault(vm_id: int, groups: Sequence[cgroups.Group], host: HostTable, *, at_start: bool = False) -> str:
    """Why the container in these groups may not go on, "" if it may or is not there.

    One that was started before the hook was put there, or while there is none, is a fault only at its start: an upgrade
    of the driver ends no container.
    """
    found = orphans.processes_of(groups)
    if found is None:
        return ""
    controller, init = found
    why = _unguarded(vm_id, controller, at_start)
    if not why and not (_in_setup(init) and starts.age_s(controller) < SETUP_S):
        why = _holds(vm_id, init, groups, host)
    # one that has ended meanwhile, by a reboot, is not the one that runs
    return why if why and orphans.processes_of(cgroups.groups(vm_id)) == found else ""


def _in_setup(init: int) -> bool:
    """Whether process 1 is libvirt's own still, about to execute the container's. By its name, which is read without
    the process's memory or file systems, either of which a tenant can hold up; that it may lie is bounded by SETUP_S.
    """
    return orphans.is_controller(init)


def _unguarded(vm_id: int, controller: int, at_start: bool) -> str:
    if starts.is_guarded(vm_id, controller):
        return ""
    if not os.path.exists(starts.HOOK):
        problem = f"there is no {starts.HOOK}: run `install.sh node`"
    else:
        problem = f"{starts.HOOK} did not run: restart libvirtd, which looks for hooks when it starts"
    if not at_start:
        started = time.time() - starts.age_s(controller)
        if not os.path.exists(starts.HOOK) or os.stat(starts.HOOK).st_ctime > started:
            return ""
    return f"libvirt started it without OneLXC's guard, {problem}, and start the VM again"


def _holds(vm_id: int, init: int, groups: Sequence[cgroups.Group], host: HostTable) -> str:
    allowed: _Allowed | None = None
    left = TABLE_BYTES
    for process in _one_of_each_view(init, groups):
        text, cut = mounttable.read(f"/proc/{process}/mountinfo", left)
        left -= len(text)
        if cut:
            return "it has more mounts than can be looked at"
        for row in mounttable.foreign(text, vm_id, host.devices):
            if allowed is None:
                allowed = _allowed(vm_id, init, host)
            if not allowed(row):
                return f"it held a file system of the host: {row[3]} {row[0]} {row[1]} at {row[2]}"
    return ""


def _one_of_each_view(init: int, groups: Sequence[cgroups.Group]) -> list[int]:
    """Processes of the container that see different mounts; process 1 first."""
    found = {_view(init): init}
    controllers = {group.controller for group in groups}
    for group in groups[:1]:  # a process is in every hierarchy
        for process in cgroups.processes(group.path)[:PROCESSES]:
            if process not in controllers and len(found) < VIEWS:
                found.setdefault(_view(process), process)
    return list(found.values())


def _view(process: int) -> tuple[str, str]:
    """Mount namespace and root; by the links' text, since a stat of the root may wait for a file system inside."""
    try:
        return os.readlink(f"/proc/{process}/ns/mnt"), os.readlink(f"/proc/{process}/root")
    except OSError:
        return "", ""


class _Allowed:
    """What of the host's file systems the administrator has given to this container, by a profile or RAW."""

    def __init__(self, privileged: bool, places: set[tuple[str, str]]) -> None:
        self._privileged = privileged
        self._places = places

    def __call__(self, row: mounttable.Row) -> bool:
        device, path, _, kind = row
        path = mounttable.unescape(path)
        if self._privileged and kind in _PRIVILEGED_KINDS:
            return True
        return any(device == place and (path + "/").startswith(top.rstrip("/") + "/") for place, top in self._places)


def _allowed(vm_id: int, init: int, host: HostTable) -> _Allowed:
    try:
        with open(f"{orphans.LIBVIRT_STATE}/{deploy_id(vm_id)}.xml", "rb") as file:
            filesystems = guard.Domain(file.read()).filesystems
    except (OSError, StorageError):
        filesystems = []
    places = {
        place for each in filesystems if each.kind in ("mount", "block") for place in _place(each.source, host.rows)
    }
    return _Allowed(_is_privileged(init), places)


def _place(source: str, host: list[mounttable.Row]) -> list[tuple[str, str]]:
    """(device, path within it) of a path of the host, as mountinfo has it."""
    try:
        status = os.stat(source)
    except OSError:
        return []
    if status.st_rdev and os.path.isabs(source) and not os.path.isdir(source):
        return [(f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}", "/")]
    real = os.path.realpath(source)
    found = [("", "", "")]
    for device, path, point, _ in host:
        top = mounttable.unescape(point).rstrip("/")
        # of two at one place the later one is seen
        if (real + "/").startswith(top + "/") and len(top) >= len(found[-1][2]):
            found.append((device, mounttable.unescape(path).rstrip("/"), top))
    device, path, top = found[-1]
    return [(device, path + real[len(top) :] or "/")]


def _is_privileged(init: int) -> bool:
    try:
        with open(f"/proc/{init}/uid_map") as file:
            return file.read().split() == ["0", "0", "4294967295"]
    except OSError:
        return False


__all__ = ["enforce", "fault"]
