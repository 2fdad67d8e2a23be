"""How does a block device that is there already come to a VM? Alone: a volume, or what host.conf allows besides.

Which devices a caller may name at all is `validate`'s to say. Here: a volume that OpenNebula made for a disk is that
disk's, and a device that anybody on this host uses (mounted, swap, part of a volume group or RAID, another VM's) is
nobody else's. Nothing is made or activated: that is the transfer manager's.
"""

from __future__ import annotations

import fcntl
import os
import re
import time
from typing import Any

from onelxc.errors import StorageError
from onelxc.model import Disk
from onelxc.root import holders, iocounters, validate
from onelxc.root.work import Work

_OWNED = re.compile(r"lv-one-(\d+)-(\d+)")
"""The names that OpenNebula's LVM drivers give: VM and disk."""
_LOCK_S = 10.0


def take(work: Work, found: validate.Found, disk: Disk) -> int:
    """A descriptor of the device. While it is open nobody else takes the device; then what is mounted holds it."""
    owner = _OWNED.fullmatch(found.name)
    if owner is not None and (int(owner.group(1)), int(owner.group(2))) != (work.vm_id, disk.disk_id):
        raise StorageError(
            f"Cannot use {found.path}: {found.real} was made for disk {owner.group(2)} of VM {owner.group(1)}"
        )
    work.journal.take("volume", path=found.real)
    fd = found.open(os.O_RDONLY if disk.read_only else os.O_RDWR)
    try:
        _lock(fd, found)
        if not holders.is_free(found.real):
            users = ", ".join(holders.mounters_of(found.real))
            raise StorageError(
                f"Cannot use {found.path}: {found.real} is in use on this host{users and f' by {users}'}"
            )
    except BaseException:
        os.close(fd)
        raise
    iocounters.note(found.real)
    return fd


def _lock(fd: int, found: validate.Found) -> None:
    """udev has it for a moment whenever something about a device changes."""
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise StorageError(f"Cannot use {found.path}: {found.real} is being taken by another VM") from None
            time.sleep(0.05)


def give_back(work: Work, what: dict[str, Any]) -> None:
    """Return when nothing of the VM's is mounted from it, so that the transfer manager can remove it."""
    holders.wait_until_free(work, set(), [str(what["path"])])
