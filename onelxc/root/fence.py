"""Sees to a VM whose disks another host has taken, or wants. The verb `attend`, for the hub and the status probe.

What another host has taken is cut off here before the container is ended (`release` does so, whoever calls it). What it
wants is let go of only if the container is suspended.
"""

from __future__ import annotations

import os

from onelxc.root import leases, record, release
from onelxc.root.leases import State
from onelxc.root.work import Work


def attend(work: Work) -> bool:
    """See to the VM's leases, under its lock: end a container that must not have its disks any more, or that is
    suspended while another host wants them. Whether it was ended.
    """
    found = leases.state(work.vm_id, work.journal.held(), work.config)
    if found is State.LOST:
        work.log(f"VM {work.vm_id}: another host has taken its disks over: ending its container here without a word")
    elif found is State.WANTED and leases.is_suspended(work.vm_id):
        work.log(f"VM {work.vm_id} is suspended, and another host wants its disks: ending its container here")
        leases.answer(work, leases.ENDING)
    elif leases.is_suspended(work.vm_id) and _is_deleted(work):
        work.log(f"VM {work.vm_id} was suspended, and its disks are gone: ending its container")
    else:
        if found is State.WANTED:
            leases.answer(work, leases.RUNS)
        return False
    release.everything(work)
    return True


def _is_deleted(work: Work) -> bool:
    """Whether OpenNebula has removed the VM's directory: it ends a suspended VM without a word to its host. Images that
    are links out of it are still there."""
    found = record.legible(work.vm_id)
    if found is None:
        return False
    disk = found.vm.root_disk
    home = os.path.dirname(disk.path if disk.path.startswith("/") else disk.beside)
    return not os.path.isdir(home) and os.path.isdir(os.path.dirname(home))
