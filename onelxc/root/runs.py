"""Knows for which run of a container everything is in place that libvirt does not bring back at a reboot.

The file `run` in the VM's state directory names the controller ("pid start") of the last run that was completed. A
container that runs under another one has rebooted since, and its refresh is due until it has succeeded: whoever looks
(the hub, the status probe) sees that, whatever was killed in between. Without a file nothing is known and nothing due.
"""

from __future__ import annotations

import os

from onelxc import executions
from onelxc.model import VmPaths
from onelxc.root import cgroups, durable, orphans

REBOOTED = "rebooted"


def controller(vm_id: int) -> int:
    """libvirt's process for the container, 0 if there is none."""
    pids = {group.controller for group in cgroups.groups(vm_id)}
    return next((pid for pid in sorted(pids) if orphans.is_controller(pid)), 0)


def note(vm_id: int, pid: int) -> None:
    """Everything is in place in the container of this controller."""
    _write(vm_id, _identity(pid))


def note_reboot(vm_id: int) -> None:
    """It was seen to reboot: also one of which nothing is known (started by an older driver)."""
    if not os.path.exists(_path(vm_id)):
        _write(vm_id, REBOOTED)


def due(vm_id: int, pid: int) -> bool:
    """Whether the container of this controller still lacks what its last reboot took."""
    try:
        with open(_path(vm_id)) as file:
            known = file.read()
    except OSError:
        return False
    return bool(pid) and known != _identity(pid)


def _path(vm_id: int) -> str:
    return os.path.join(VmPaths(vm_id).state, "run")


def _identity(pid: int) -> str:
    return f"{pid} {executions.start_time(pid)}"


def _write(vm_id: int, text: str) -> None:
    try:
        durable.replace(_path(vm_id), text.encode(), flush=False)
    except OSError:
        durable.remove(_path(vm_id))  # better to know nothing than what is no longer so
