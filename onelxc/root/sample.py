"""What does root know of the running VMs that their probes cannot see? The guest's system, and where its disks lie.

The one-shot verb `sample`: `{"vms": {"5": {"os": {"OS_ID": "debian", …}, "disks": {"0": "/var/lib/one/…/disk.0"}}}}`.
/etc/os-release is the tenant's: see `tenantfile`. What cannot be read in time is not known.
Nothing is changed, no lock taken, no process entered.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable
from typing import Any

from onelxc import containers, jsontext
from onelxc.errors import OneLxcError
from onelxc.model import Vm, VmPaths
from onelxc.root import apart, record, tenantfile

RELEASE_FILES = ("etc/os-release", "usr/lib/os-release")
RELEASE_BYTES = 16 * 1024
VALUE_LENGTH = 64
TOGETHER_S, ALONE_S = 1.0, 2.0
"""How long the reading of all the files may take in one process; and, where it takes longer, each in one of its own."""


def verb(config: Any, request: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """Of every running container that is ours."""
    known = {vm_id: vm for vm_id in _running_ids() if (vm := _vm(vm_id)) is not None}
    texts = _release_texts(known)
    return {
        "vms": {
            str(vm_id): {"os": guest_system(texts.get(vm_id, ""), vm), "disks": _disks(vm)}
            for vm_id, vm in known.items()
        }
    }


def _running_ids() -> list[int]:
    return [container.vm_id for container in containers.running() if container.vm_id is not None]


def _vm(vm_id: int) -> Vm | None:
    try:
        known = record.read(vm_id)
    except OneLxcError:
        return None  # whoever needs the record will say so
    return known.vm if known else None


def _disks(vm: Vm) -> dict[str, str]:
    return {str(disk.disk_id): disk.path for disk in vm.disks if disk.path}


def guest_system(release: str, vm: Vm) -> dict[str, str]:
    """OS_ID, OS_VERSION and OS_NAME as the guest's os-release has them, OS_TYPE and OS_MACHINE as KVM's agent would
    call them; {} if the guest does not say what it is.
    """
    found = parse_release(release)
    if "OS_ID" not in found:
        return {}
    return {**found, "OS_TYPE": "posix", "OS_MACHINE": vm.arch or os.uname().machine}


def _release_texts(vm_ids: Iterable[int]) -> dict[int, str]:
    """By VM. Nobody can hold up more than his own: where one takes its time, each is read by itself, all at once."""
    ids = list(vm_ids)
    if not ids:
        return {}
    try:
        answer = apart.run(lambda: _read(ids), limit_s=TOGETHER_S, most=len(ids) * 8 * RELEASE_BYTES)
        return {int(vm_id): text for vm_id, text in jsontext.loads(answer).items()}
    except (OSError, OneLxcError):
        steps = [lambda vm_id=vm_id: _read([vm_id]) for vm_id in ids]
    found = {}
    for each in apart.run_all(steps, limit_s=ALONE_S, most=8 * RELEASE_BYTES):
        if isinstance(each, bytes):
            found.update({int(vm_id): text for vm_id, text in jsontext.loads(each).items()})
    return found


def _read(vm_ids: list[int]) -> bytes:
    texts = {vm_id: tenantfile.first(VmPaths(vm_id).root, RELEASE_FILES, RELEASE_BYTES) for vm_id in vm_ids}
    return json.dumps(texts).encode()


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
