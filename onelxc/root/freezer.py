"""How does a container stand still and go on? Its tasks by the freezer of its control group, its disks by a flush.

While its disks are copied their file systems are frozen as well (see `flushing`), after the tasks; for a suspend they
are only flushed, since it has no end, and `sync` on the host would wait for it.

libvirt cannot pause on cgroup v2, and on v1 it forgets when it is restarted that it has. So the helper does it, on
both, and keeps the record: why a container stands still decides what OpenNebula is told of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

from onelxc import kernelfile, names
from onelxc.errors import HypervisorError, NoSuchDomainError
from onelxc.root import cgroups, flushing, orphans, record
from onelxc.root.work import Work

SUSPEND, SNAPSHOT = "suspend", "snapshot"
"""Why a container stands still: its user suspended it, or its disks are being copied."""
LIMIT_S = 20.0


def is_frozen(groups: Iterable[cgroups.Group]) -> bool:
    """Whether the freezer holds the container, whoever asked for it."""
    for group in groups:
        if group.kind == "freezer" and _read(group, "freezer.state") in ("FROZEN", "FREEZING"):
            return True
        if not group.kind and "frozen 1" in _read(group, "cgroup.events").splitlines():
            return True
    return False


def reason(vm_id: int) -> str:
    """Why the container stands still, "" if it does not. The freezer's word counts; what is noted only says why."""
    return (record.paused(vm_id) or SUSPEND) if is_frozen(cgroups.groups(vm_id)) else ""


def freeze(vm_id: int) -> None:
    """Stop every task of the container. HypervisorError, with it going on, if some task does not stop."""
    groups = _freezers(vm_id)
    deadline = time.monotonic() + LIMIT_S
    while True:
        for group in groups:
            cgroups.write(group.path, *(("freezer.state", "FROZEN") if group.kind else ("cgroup.freeze", "1")))
        if all(_is_still(group) for group in groups):
            return
        if time.monotonic() > deadline:
            orphans.thaw(groups)
            raise HypervisorError(
                f"Cannot suspend {names.deploy_id(vm_id)}: some process does not stop ({LIMIT_S:g} s)"
            )
        time.sleep(0.01)


def thaw(vm_id: int) -> None:
    """Let the container go on; one that runs already does."""
    groups = _freezers(vm_id)
    orphans.thaw(groups)
    deadline = time.monotonic() + LIMIT_S
    while is_frozen(groups):
        if time.monotonic() > deadline:
            raise HypervisorError(f"Cannot resume {names.deploy_id(vm_id)}: its freezer does not let go")
        time.sleep(0.01)


def verb_freeze(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb `freeze`: `{"why": "suspend" | "snapshot"}`. Tasks stand still, and everything written is on disk."""
    why = str(request.get("why", SUSPEND))
    if why not in (SUSPEND, SNAPSHOT):
        raise HypervisorError(f"Cannot suspend {names.deploy_id(work.vm_id)}: not a reason: {why!r}")
    before = reason(work.vm_id)
    kept = work.journal.take("suspended") if why == SUSPEND and not before else 0
    # a suspended container whose disks are copied is a suspended one still
    record.set_paused(work.vm_id, before or why)
    try:
        freeze(work.vm_id)
        if why == SNAPSHOT:
            flushing.freeze(work.paths)
        else:
            flushing.flush_all(work.paths)
        if kept:
            work.journal.commit()
    except BaseException:
        flushing.thaw(work.paths)
        if not before:
            thaw(work.vm_id)
            record.set_paused(work.vm_id, "")
        raise
    if kept:
        work.journal.gave_back(kept)
    return {}


def give_back(work: Work, what: dict[str, Any]) -> None:
    """Let a container go on whose suspension was not finished."""
    try:
        verb_thaw(work, {})
    except NoSuchDomainError:
        record.set_paused(work.vm_id, "")


def verb_thaw(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb `thaw`. With `{"why": "snapshot"}`, a container that its user suspended stays so.

    A restore that dies leaves it suspended; who ends a container needs nothing written for that.
    """
    flushing.thaw(work.paths)
    if request.get("why") == SNAPSHOT and record.paused(work.vm_id) == SUSPEND:
        return {}
    kept = work.journal.take("resumed") if work.verb == "restore" and reason(work.vm_id) else 0
    thaw(work.vm_id)
    if kept:
        work.journal.commit()
        work.journal.gave_back(kept)
    record.set_paused(work.vm_id, "")
    return {}


def suspend_again(work: Work, what: dict[str, Any]) -> None:
    """The journal's `resumed`: OpenNebula was told that the container did not go on."""
    try:
        freeze(work.vm_id)
        flushing.flush_all(work.paths)
    except NoSuchDomainError:
        pass  # its end is found by itself


def _freezers(vm_id: int) -> tuple[cgroups.Group, ...]:
    groups = tuple(group for group in cgroups.groups(vm_id) if group.kind in ("", "freezer"))
    # beside v1 controllers, a cgroup2 mount holds no containers of libvirt's
    if cgroups.version() == 1:
        groups = tuple(group for group in groups if group.kind)
    if not groups:
        raise NoSuchDomainError(f"Cannot find {names.deploy_id(vm_id)}: no such container on this host")
    return groups


def _is_still(group: cgroups.Group) -> bool:
    if group.kind:
        return _read(group, "freezer.state") == "FROZEN"
    return "frozen 1" in _read(group, "cgroup.events").splitlines()


def _read(group: cgroups.Group, name: str) -> str:
    return kernelfile.text(os.path.join(group.path, name))
