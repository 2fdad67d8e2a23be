"""How are the I/O limits of a disk that came to a running container set, and taken away?

By the container's control group, since what libvirt is told live is lost when the container reboots by itself. At
start the domain's XML says the same (`domainxml.blkiotune`).
"""

from __future__ import annotations

import os

from onelxc.model import IoLimits
from onelxc.root import cgroups


def set_limits(vm_id: int, device: str, limits: IoLimits) -> None:
    """Limit the container's I/O on a block device; `IoLimits()` lifts what was set. Totals count for each direction."""
    rdev = os.stat(device).st_rdev
    number = f"{os.major(rdev)}:{os.minor(rdev)}"
    wanted = {
        "read_bps": limits.read_bytes_sec or limits.total_bytes_sec,
        "write_bps": limits.write_bytes_sec or limits.total_bytes_sec,
        "read_iops": limits.read_iops_sec or limits.total_iops_sec,
        "write_iops": limits.write_iops_sec or limits.total_iops_sec,
    }
    for group in cgroups.groups(vm_id):
        if "blkio" in group.kind.split(","):
            for name, value in wanted.items():
                cgroups.write(group.path, f"blkio.throttle.{name}_device", f"{number} {value or 0}")
        elif not group.kind:
            words = {"rbps": "read_bps", "wbps": "write_bps", "riops": "read_iops", "wiops": "write_iops"}
            line = " ".join(f"{word}={wanted[name] or 'max'}" for word, name in words.items())
            cgroups.write(cgroups.limited(group), "io.max", f"{number} {line}")
