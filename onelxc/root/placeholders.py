"""Keeps the place of a disk that libvirt's description of a container names, for when the disk is detached.

libvirt restarts a container from the description of its deploy, and fails where a source of that is missing. So an
empty read-only file system lies below each such disk from the start: what remains when the disk is unmounted.
`livedisks.refresh` takes it out of the container again.
"""

from __future__ import annotations

import os

from onelxc.root import inside, mounts, syscalls

NAME = "onelxc-detached"


def put(point: str) -> None:
    """An empty file system at `point`."""
    attributes = syscalls.ATTR_RDONLY | syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID | syscalls.ATTR_NOEXEC
    fd = syscalls.mount_detached("tmpfs", NAME, {"size": "4k", "mode": "0755"}, attributes)
    with mounts.Detached(fd, "tmpfs", "") as empty:
        mounts.place(empty, point, id_base=None)


def sources(point: str) -> list[str]:
    """What is mounted at `point`, the lowest first."""
    return [mount.source for mount in inside.mounts_of(os.getpid()) if mount.point == point]
