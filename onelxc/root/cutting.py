"""Cuts a container off from its images: from then on not another byte of it gets there.

The file systems are shut down as after a power cut (what is not in the image yet stays out of it), then the loop
devices below them are made too short for anything, and the daemons that show qcow2 images are killed. A block device or
a Ceph image has no such end: there unmounting may still write a superblock.
"""

from __future__ import annotations

import fcntl
import os
import struct

from onelxc.root import holders, loops, mounts, rawview
from onelxc.root.work import Work

_FS_SHUTDOWN = 0x8004587D
"""FS_IOC_SHUTDOWN of ext4, xfs and f2fs."""
_NO_FLUSH = 2


def cut_off(work: Work) -> None:
    """From here on nothing of the VM's reaches its images."""
    for point in reversed(mounts.mounted_below(work.paths.mounts)):
        if os.path.isdir(point):
            _shut_down(point)
    for device in holders.loops_below(work.paths.mounts):
        loops.cut_off(device)
    rawview.kill(work.journal.held())


def _shut_down(point: str) -> None:
    try:
        fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.ioctl(fd, _FS_SHUTDOWN, struct.pack("I", _NO_FLUSH))
    except OSError:
        pass  # read-only, not known to this file system, or shut down already
    finally:
        os.close(fd)
