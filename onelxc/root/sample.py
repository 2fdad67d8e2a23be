"""What does root know of the running VMs that their probes cannot see? The guest's system, and where its disks lie.

The one-shot verb `sample`: `{"vms": {"5": {"os": {"OS_ID": "debian", …}, "disks": {"0": "/var/lib/one/…/disk.0"}}}}`.
/etc/os-release is the tenant's: it is opened as if the container's root were the host's, only if it is a regular file,
and only its first kilobytes are looked at. Nothing is changed, no lock taken, no process entered.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Callable
from typing import Any

from onelxc import containers
from onelxc.errors import OneLxcError
from onelxc.model import Vm, VmPaths
from onelxc.root import record, syscalls

RELEASE_FILES = ("etc/os-release", "usr/lib/os-release")
RELEASE_BYTES = 16 * 1024
VALUE_LENGTH = 64


def verb(config: Any, request: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Of every running container that is ours."""
    return {"vms": {str(vm_id): facts for vm_id, facts in map(_facts, _running_ids()) if facts}}


def _running_ids() -> list[int]:
    return [container.vm_id for container in containers.running() if container.vm_id is not None]


def _facts(vm_id: int) -> tuple[int, dict[str, Any]]:
    try:
        known = record.read(vm_id)
    except OneLxcError:
        known = None  # whoever needs the record will say so
    if known is None:
        return vm_id, {}
    return vm_id, {"os": guest_system(VmPaths(vm_id).root, known.vm), "disks": _disks(known.vm)}


def _disks(vm: Vm) -> dict[str, str]:
    return {str(disk.disk_id): disk.path for disk in vm.disks if disk.path}


def guest_system(root: str, vm: Vm) -> dict[str, str]:
    """OS_ID, OS_VERSION and OS_NAME as the guest has them, OS_TYPE and OS_MACHINE as KVM's agent would call them; {}
    if the guest does not say what it is.
    """
    found = parse_release(_release_text(root))
    if "OS_ID" not in found:
        return {}
    return {**found, "OS_TYPE": "posix", "OS_MACHINE": vm.arch or os.uname().machine}


def _release_text(root: str) -> str:
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        for name in RELEASE_FILES:
            try:
                # O_PATH first: opening a device or a FIFO does something
                fd = syscalls.openat2(top, name, os.O_PATH)
            except OSError:
                continue
            try:
                if stat.S_ISREG(os.fstat(fd).st_mode):
                    with open(f"/proc/self/fd/{fd}", "rb") as file:
                        return file.read(RELEASE_BYTES).decode(errors="replace")
            finally:
                os.close(fd)
        return ""
    except OSError:
        return ""
    finally:
        os.close(top)


def parse_release(text: str) -> dict[str, str]:
    """os-release(5): shell-like assignments."""
    wanted = {"ID": "OS_ID", "VERSION_ID": "OS_VERSION", "PRETTY_NAME": "OS_NAME"}
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition("=")
        if name in wanted:
            try:
                words = shlex.split(value)
            except ValueError:
                continue
            if len(words) == 1:
                found[wanted[name]] = words[0][:VALUE_LENGTH]
    return found
