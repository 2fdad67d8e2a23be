"""Tells an action what root knows of its VM. The verb `record`."""

from __future__ import annotations

import os
import stat
from typing import Any

from onelxc import model
from onelxc.errors import StorageError
from onelxc.root import holders, leases, record, validate
from onelxc.root.journal import Entry
from onelxc.root.record import Record
from onelxc.root.work import Work


def verb(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"ours": bool, "vm": …, "prepared": …, "paused": why or "", "lost": bool}`.

    "lost": the root image was deleted under the container, another host has had its disks, or they were exchanged while
    it was suspended (a disk snapshot puts a new file in a disk's place), so that what is here is not what OpenNebula
    means any more.
    """
    try:
        found = record.read(work.vm_id)
    except StorageError as error:
        work.log(str(error))  # it can still be ended
        found = None
    entries = work.journal.held()
    lost = work.vm_id in holders.lost_roots() or leases.is_lost(work.vm_id, entries, work.config)
    if found is not None and leases.is_suspended(work.vm_id):
        lost = lost or _are_exchanged(work, found, entries)
    return {
        "ours": found is not None or os.path.exists(work.paths.state),
        "vm": model.to_json(found.vm) if found else None,
        "prepared": model.to_json(found.prepared) if found else None,
        "paused": record.paused(work.vm_id),
        "lost": lost,
    }


def _are_exchanged(work: Work, found: Record, entries: list[Entry]) -> bool:
    """Whether some disk is another file than the one that the container has."""
    had = {(entry.what.get("dev"), entry.what.get("ino")) for entry in entries if entry.kind in ("loop", "qcow2")}
    for disk in (found.vm.root_disk, *found.vm.data_disks):
        try:
            with validate.find(disk.path, work.config) as image:
                status = image.status
        except StorageError:
            continue  # a Ceph image; or it is not there, and whoever starts the VM will say so
        if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in had:
            return True
    return False
