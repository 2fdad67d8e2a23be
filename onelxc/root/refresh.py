"""What of a container does not outlive its reboot from inside, and is put back? `onelxc-root refresh one-N`.

libvirt starts the same domain anew: devices that it attached live come back, what others did to the running container
does not. Called by the hub, under the VM's lock, when it has seen a new domain id, and again until it has succeeded
(`runs`). Each part puts back its own from the VM's record; that all is in place already is no error. One part's failure
does not keep the others from trying.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from onelxc.errors import OneLxcError
from onelxc.root import network, record, runs, standing, swap
from onelxc.root.work import Work

PARTS: tuple[tuple[str, str], ...] = (
    ("onelxc.root.hold", "refresh"),
    ("onelxc.root.swap", "refresh"),
    ("onelxc.root.network", "refresh"),
    ("onelxc.root.livedisks", "refresh"),
)
"""(module, function): called as `function(work, record)`, in this order."""


def verb(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb, for actions that have restarted the container themselves, under the lock that the hub waits for.

    The container runs: what could not be put back is no failure of the action. It is tried again by the hub. One that
    may not run is ended, and that is a failure.
    """
    standing.enforce(work)
    try:
        refresh(work)
    except (OneLxcError, OSError):
        pass  # told already
    return {}


def settle(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb, for a container that has just been started from the staged or kept record: what libvirt cannot do."""
    found = record.newest(work.vm_id)
    standing.enforce(work)
    if found is not None:
        swap.refresh(work, found)
        network.settle(found, work.log)
    return {}


def refresh(work: Work) -> None:
    """Put back everything, if the VM is still here. The first error is raised, after all the rest has been tried."""
    controller = runs.controller(work.vm_id)
    found = record.read(work.vm_id) if os.path.exists(work.paths.record) else None
    if found is None:
        runs.note(work.vm_id, controller)
        return
    standing.enforce(work)
    first: Exception | None = None
    for module, function in PARTS:
        try:
            getattr(importlib.import_module(module), function)(work, found)
        except (OneLxcError, OSError) as error:
            work.log(f"{module}: {error}")
            first = first or error
    if first is not None:
        raise first
    runs.note(work.vm_id, controller)
