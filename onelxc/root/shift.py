"""Were an image's owners shifted by another driver, so that root is 100000 or 600100001 in it?

OpenNebula's own LXC driver and LXD chown whole trees. Such an image is mapped from where its root is, rather than seen
as a tree that belongs to nobody.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from onelxc.root import syscalls

_LOWEST = 65536
_SAMPLES = ("usr", "etc", "bin", "sbin", "var", "lib", "home", "root")


def stored_first(root_fd: int, log: Callable[[str], None]) -> int:
    """The id that root has on disk: that of `/` and of everything that every root file system has there, else 0."""
    status = os.fstat(root_fd)
    first = status.st_uid
    if first < _LOWEST or status.st_gid != first:
        return 0
    seen = 0
    for name in _SAMPLES:
        try:
            fd = syscalls.openat2(root_fd, name, os.O_PATH | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            below = os.fstat(fd)
        finally:
            os.close(fd)
        if (below.st_uid, below.st_gid) != (first, first):
            return 0
        seen += 1
    if seen < 2:
        return 0
    log(f"the image's owners begin at {first}: shifted by another driver, and mapped from there")
    return first
