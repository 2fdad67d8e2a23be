"""Whose are the files that limit a container? root's, on cgroup v2 too.

libvirt hands an unprivileged container its own group by giving *all* the files in it to the container's root,
memory.max and cpu.max among them: the tenant could raise his own limits (virCgroupV2SetOwner, virFileChownFiles). The
kernel says which files a group needs to be divided further; the others are taken back after each start, and what
libvirt had set is written again. A tenant who was quicker may still hold such a file open for writing, so the memory
limit stands a second time one level up, in systemd's group, of which he has nothing. systemd in the container lives
with that: it gets no more of a systemd on the host.
"""

from __future__ import annotations

import os

from onelxc import kernelfile
from onelxc.model import Vm
from onelxc.root import cgroups

DELEGATED = "/sys/kernel/cgroup/delegate"
_STANDARD = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")


def settle(vm: Vm) -> None:
    """After a start, and after the container has restarted by itself."""
    for group in cgroups.groups(vm.vm_id):
        if group.kind:
            continue  # version 1: libvirt gives away nothing of these
        path = cgroups.limited(group)
        if take_back(path):
            from onelxc import domainxml  # needed on version 2 alone

            cgroups.write(path, "memory.max", str(vm.memory_kib << 10))
            cgroups.write(path, "cpu.max", f"{domainxml.cpu_quota_us(vm.vcpu)} {domainxml.PERIOD_US}")
        if path != group.path:
            cgroups.write(group.path, "memory.max", str(vm.memory_kib << 10))


def make_room(vm_id: int, memory_kib: int) -> None:
    """Before the container's limit is raised: the one above it. It is not lowered before the next start."""
    for group in cgroups.groups(vm_id):
        if not group.kind and cgroups.limited(group) != group.path:
            present = kernelfile.number(os.path.join(group.path, "memory.max"))
            if present is not None and present < memory_kib << 10:
                cgroups.write(group.path, "memory.max", str(memory_kib << 10))


def take_back(path: str) -> tuple[str, ...]:
    """Give root the files of a group that are not there to divide it; the names of those that were somebody else's."""
    keep = _delegated()
    taken = []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.name in keep or not entry.is_file(follow_symlinks=False):
                continue
            if entry.stat(follow_symlinks=False).st_uid != 0:
                os.chown(entry.path, 0, 0)
                taken.append(entry.name)
    return tuple(sorted(taken))


def _delegated() -> set[str]:
    try:
        with open(DELEGATED) as file:
            return {*_STANDARD, *file.read().split()}
    except OSError:
        return set(_STANDARD)
