"""How much of a container may be swapped out? On cgroup v2, where libvirt cannot be told.

There `memory.swap.max` counts swap alone, but libvirt refuses to change the memory of a running container whose
swap_hard_limit is not the larger of the two, as on v1, where it counts both (`domainxml.memtune`).
"""

from __future__ import annotations

import os

from onelxc.root import cgroups, limits, record
from onelxc.root.work import Work


def refresh(work: Work, found: record.Record) -> None:
    """After a start, and after the container has restarted by itself. A kernel that counts no swap has no such file."""
    limits.settle(found.vm)  # first, so that nobody else writes to it
    for group in cgroups.groups(work.vm_id):
        path = cgroups.limited(group)
        if not group.kind and os.path.exists(os.path.join(path, "memory.swap.max")):
            cgroups.write(path, "memory.swap.max", str(found.vm.swap_kib << 10))
