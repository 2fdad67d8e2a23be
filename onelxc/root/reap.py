"""How is each VM of ours, after what the dead ones still held has been given back? The one-shot verb `reap`.

For the probes: OpenNebula may move or delete the disks of a VM the moment it reads that it is off, so nothing is
reported off before it has been released. Looks at the kernel first (control groups, mounts); libvirt is asked only
about a container that seems dead, since one that reboots is not there for half a second either, and libvirt answers
when the reboot is over. Dead are:

* containers that ended by themselves, crashed, or were running when the host went down;
* what libvirt has lost: zombies, and processes whose controller has died;
* containers whose root image was deleted under them: `onevm delete` of 3.2.1 sends no cancel after a poll that said
  paused or failed;
* containers that may not go on (see `standing`): they are ended here;
* what a killed helper had begun;
* a container whose disks another host has, and a suspended one whose disks another host wants, or whose VM was deleted.

VMs on which an action works just now are left to it. Containers that are not ours are not even looked at.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onelxc import errors, names
from onelxc.errors import HypervisorError, OneLxcError
from onelxc.model import STATE, VmPaths
from onelxc.root import (
    cgroups,
    fence,
    freezer,
    holders,
    hub,
    leases,
    lock,
    orphans,
    rawview,
    record,
    release,
    runs,
    standing,
    starts,
)
from onelxc.root.journal import Entry, Journal
from onelxc.root.leases import State
from onelxc.root.work import Work

if TYPE_CHECKING:
    from onelxc.config import HostConfig

REBOOT_S = 5.0
"""How long a container that reboots may be without a process, once libvirt has answered."""

DYING_S = 5.0
"""How long the worker of a helper that was killed may take to die: it holds the lock until then."""

RUNNING, PAUSED, OFF, BUSY = "running", "paused", "off", "busy"


def verb(config: HostConfig, request: dict[str, Any], log: Callable[[str], None]) -> dict[str, Any]:
    """The verb: `{"vms": [{"id": 5, "state": "running" | "paused" | "off" | "busy", "error": …}]}`, by id.

    "off" is said once: the VM is forgotten with it. `error` is why a dead VM, "busy" then, cannot be released, or what
    remains to be done for one that runs: whoever asked asks again soon.
    """
    lock.forget_old_marks()
    groups: dict[int, list[cgroups.Group]] = {}
    for group in cgroups.groups():
        groups.setdefault(group.vm_id, []).append(group)
    lost = holders.lost_roots()
    host = standing.HostTable()
    found = []
    for vm_id in _ours():
        try:
            state, problem = _look(vm_id, groups.get(vm_id, []), host, vm_id in lost, config, log)
            found.append({"id": vm_id, "state": state, **({"error": problem} if problem else {})})
            if problem:
                log(f"VM {vm_id}: {problem}")
        except Exception as error:  # whatever is wrong with one VM is no reason not to look at the others
            log(f"VM {vm_id}: {errors.told(error)}")
            found.append({"id": vm_id, "state": BUSY, "error": errors.told(error)})
    if any(vm["state"] in (RUNNING, PAUSED) for vm in found):
        _see_to_the_hub(log)
    return {"vms": found}


def _see_to_the_hub(log: Callable[[str], None]) -> None:
    """A hub that was killed comes back by the next look: without it chatty containers stand still after a while."""
    try:
        hub.ensure_running()
    except (OneLxcError, OSError) as error:
        log(str(error))


def _ours() -> list[int]:
    """Every VM with a state directory, or, if that was lost, with a place for mounts."""
    try:
        mounted = [int(name) for name in os.listdir(os.path.join(STATE, "mnt")) if names.is_number(name)]
    except FileNotFoundError:
        mounted = []
    return sorted({*record.vm_ids(), *mounted})


def _look(  # noqa: PLR0917
    vm_id: int,
    groups: list[cgroups.Group],
    host: standing.HostTable,
    lost: bool,
    config: HostConfig,
    log: Callable[[str], None],
) -> tuple[str, str]:
    """(state, what remains to be done or "")."""
    entries = Journal(VmPaths(vm_id).journal, "reap").held()
    rawview.fail_lost(entries)
    unfinished = _left_unfinished(vm_id, entries)
    leased = leases.state(vm_id, entries, config) not in (State.LOST, State.WANTED)
    settled = leased and not unfinished and not leases.is_suspended(vm_id)
    deployed = not lost and os.path.exists(VmPaths(vm_id).record)
    if settled and deployed and _controlled(groups) and not standing.fault(vm_id, groups, host):
        return _live_state(vm_id, groups)
    return _settle(vm_id, lost, config, log)


def _left_unfinished(vm_id: int, entries: list[Entry]) -> bool:
    """Whether a helper was killed amid something, which may keep the container frozen."""
    return any(map(release.is_unfinished, entries)) and lock.holder(vm_id) is None


def _controlled(groups: list[cgroups.Group]) -> bool:
    """Whether libvirt's process for the container lives, and has a child: the container's init."""
    controllers = {group.controller for group in groups}
    return any(orphans.is_controller(pid) and orphans.children(pid) for pid in controllers)


def _live_state(vm_id: int, groups: list[cgroups.Group], problem: str = "") -> tuple[str, str]:
    """A container that is held still only while its disks are copied runs, to OpenNebula."""
    controllers = {group.controller for group in groups if orphans.is_controller(group.controller)}
    if not problem and any(runs.due(vm_id, pid) for pid in controllers):
        problem = "not everything is back yet since its reboot; onelxc-hub sees to it"
    if freezer.is_frozen(groups) and record.paused(vm_id) != freezer.SNAPSHOT:
        return PAUSED, problem
    return RUNNING, problem


def _settle(vm_id: int, lost: bool, config: HostConfig, log: Callable[[str], None]) -> tuple[str, str]:
    """Under the lock, with nobody at work on the VM: release it if it is dead indeed."""
    held = lock.try_acquire(vm_id, "reap")
    deadline = time.monotonic() + DYING_S
    while held is None and lock.holder(vm_id) is None and time.monotonic() < deadline:
        time.sleep(0.02)
        held = lock.try_acquire(vm_id, "reap")
    if held is None:
        return BUSY, ""
    journal = Journal(VmPaths(vm_id).journal, "reap")
    work = Work(vm_id, "reap", journal, config, log)
    try:
        problem = _undo(work)  # what a killed helper left of an attach does not make the VM dead
        groups = list(cgroups.groups(vm_id))
        fault = standing.fault(vm_id, groups, standing.HostTable())
        if fault:
            starts.tell(f"ended {names.deploy_id(vm_id)}: {fault}")
        deployed = os.path.exists(work.paths.record) and not (lost and vm_id in holders.lost_roots())
        if deployed and not fault and (_controlled(groups) or _runs_again(vm_id)):
            if fence.attend(work):
                return OFF, ""
            return _live_state(vm_id, list(cgroups.groups(vm_id)), problem)
        log(f"releasing VM {vm_id}: " + (fault or ("its image was deleted" if lost else "it has ended")))
        release.everything(work)
        return OFF, ""
    finally:
        journal.close()
        held.release()


def _undo(work: Work) -> str:
    """Undo and finish; what keeps from that, which is no reason to keep a dead VM."""
    try:
        release.undo(work)
        work.journal.compact()
    except (OneLxcError, OSError) as error:
        return str(error)
    return ""


def _runs_again(vm_id: int) -> bool:
    """Whether a container that has no processes runs after all: it was rebooting.

    libvirt says "running" for ever of one whose end it did not notice (see `hypervisor`), and then it is none.
    """
    deadline = time.monotonic() + REBOOT_S
    while _libvirt_says_running(vm_id):
        if _controlled(list(cgroups.groups(vm_id))):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return False


def _libvirt_says_running(vm_id: int) -> bool:
    """Libvirt's word, which comes when a reboot under way is over. A libvirtd that is away reboots nobody."""
    from onelxc import hypervisor

    try:
        with hypervisor.Hypervisor() as libvirt:
            domain = libvirt.find(names.deploy_id(vm_id))
            return domain is not None and domain.state() is not hypervisor.State.ENDED
    except HypervisorError:
        return False
