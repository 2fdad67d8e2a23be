"""Which VMs run here, and which have ended? vm/status, every five seconds, and the state in 3.2.1's poll.

Looking costs nothing but the kernel's files. Only when something has changed (or every three minutes, or while
somebody works on a VM or something remains to be done) the root helper is asked, which first lets go of what a dead
container held and then says so: OpenNebula may move or delete the disks the moment it reads POWEROFF. It also knows
which frozen container is one that we suspended, and which is only held still while its disks are copied.
Where the hub shows no life the helper is asked more often: it refreshes the leases of the disks, and starts the hub.

oned ignores what it is told within 30 s after it changed a VM's state itself (InformationManager.cc), so each change
is repeated for a minute.
"""

from __future__ import annotations

import os
import sys

from onelxc import cgroup, containers, helperinfo, kernelfile, monitoring, mounttable, names, samples, usage
from onelxc.errors import HelperError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FILE = "onelxc-vm-status"
SYNC_S = 180
"""monitord.conf's default for PROBES_PERIOD/SYNC_STATE_VM."""
REPEAT_S = 60
_CONFIGURATION_LIMIT = 1 << 20
PAUSED_S = 30
"""A container that stays frozen is asked about again after this time."""

HUB_S = 5
"""A hub that lives gives a sign of it every two seconds (see `root.keeper`)."""

SETUP_S = 60.0
"""Longer than libvirt takes to set a container up."""

LEFT = "/left"

RUNNING, PAUSED, OFF, BUSY = "running", "paused", "off", "busy"
WORDS = {RUNNING: "RUNNING", PAUSED: "SUSPENDED", OFF: "POWEROFF", BUSY: "UNKNOWN"}
"""The helper's words in OpenNebula's. Of a VM on which an action works now nothing is known until that has ended."""


def run() -> str:
    """vm/status's text. HelperError when it would have to guess."""
    kept = samples.load(FILE)
    now = samples.now_s()
    before: dict[str, str] = kept.get("states", {})
    # a new client has to say all at once: monitord has forgotten what the one before it said
    sync = kept.get("parent") != os.getppid() or now - kept.get("synced", 0.0) >= _sync_period_s()
    seen = look()
    states, asked, unfinished = before, float(kept.get("asked", 0.0)), bool(kept.get("unfinished"))
    young = {vm: at for vm, at in kept.get("changed", {}).items() if now - at < REPEAT_S}
    frozen = any("/frozen" in one for one in seen)
    unsettled = kept.get("unfinished") or BUSY in before.values() or any(map(_is_left, seen))
    again = (frozen and now - asked >= PAUSED_S) or _unkept(seen, asked)
    if sync or seen != kept.get("seen") or unsettled or again:
        answers = helperinfo.ask("reap")["vms"]
        states, asked = {**_running(seen), **_states(answers)}, now
        unfinished = any(vm.get("error") for vm in answers)
        # of what the helper no longer knows nothing is held any more, whoever let go of it
        states.update({vm: OFF for vm, state in before.items() if vm not in states and (state != OFF or vm in young)})
    changed = {vm: at for vm, at in young.items() if vm in states}
    changed.update({vm: now for vm, state in states.items() if state != before.get(vm)})
    synced = now if sync else kept["synced"]
    new = {"parent": os.getppid(), "synced": synced, "asked": asked, "seen": seen, "states": states, "changed": changed}
    samples.save(FILE, {**new, "unfinished": unfinished})
    told = sorted(states if sync else changed, key=int)
    text = "".join(monitoring.vm_state(int(vm), names.deploy_id(int(vm)), WORDS[states[vm]]) for vm in told)
    return (monitoring.all_states() if sync else "") + text


def reap_if_needed() -> str:
    """For 3.2.1, which asks about VMs one by one, and no longer about those that it has deleted: let go of what is
    dead. Nothing to print, but for what keeps the helper from it.
    """
    kept = samples.load(FILE)
    now = samples.now_s()
    seen = look()
    asked = float(kept.get("asked", 0.0))
    if seen != kept.get("seen") or any(map(_is_left, seen)) or now - asked >= SYNC_S or _unkept(seen, asked):
        try:
            verdicts()
        except HelperError as error:
            return monitoring.lines({"ONELXC_WARNING": str(error)})
        samples.save(FILE, {"asked": now, "seen": seen})
    return ""


def verdicts() -> dict[str, str]:
    """How each VM of ours is, by its number as text, after what was dead has been let go."""
    return _states(helperinfo.ask("reap")["vms"])


def _states(answers: list[dict[str, Any]]) -> dict[str, str]:
    return {str(vm["id"]): str(vm["state"]) for vm in answers if vm["state"] in WORDS}


def look() -> list[str]:
    """What is to be seen of OpenNebula's containers without root: a text for each, that changes when it does."""
    mounted = cgroup.mounts()
    devices = usage.devices()
    host = mounttable.host_devices(kernelfile.text("/proc/self/mountinfo"))
    found = []
    for container in containers.running():
        if container.vm_id is not None:
            held = "/frozen" if cgroup.frozen(cgroup.of(container.controller, mounted)) else ""
            lost = "/lost" if any(map(_lost, devices.get(container.vm_id, ()))) else ""
            found.append(container.key + held + lost + _foreign(container, host))
            devices.pop(container.vm_id, None)
    # disks mounted for no container: a deploy is in flight, or was killed together with its root helper
    return found + [
        f"{names.deploy_id(vm_id)}{LEFT}" for vm_id in sorted(vm_id for vm_id in devices if vm_id is not None)
    ]


def _foreign(container: containers.Container, host: dict[str, set[int]]) -> str:
    """What the helper has to look at: a container that seems to hold file systems of the host. Until it is set up it
    sees all of them, and its process 1 has the name of libvirt's own. Not by cmdline, which is in a tenant's memory.
    """
    init = containers.init_of(container)
    if init is None or container.vm_id is None:
        return ""
    held = mounttable.suspicion(container.vm_id, init, host)
    if not held:
        return ""
    setup = kernelfile.text(f"/proc/{init}/comm") == kernelfile.text(f"/proc/{container.controller}/comm")
    if setup and samples.now_s() - containers.started_s(container) < SETUP_S:
        return ""
    return f"/foreign {held}"


def _unkept(seen: list[str], asked: float) -> bool:
    """Whether nobody refreshes the leases of those that run: another host may take their disks after a while."""
    beat = kernelfile.number(names.HUB_BEAT) or 0
    return bool(seen) and samples.now_s() - max(beat, asked) >= HUB_S


def _is_left(one: str) -> bool:
    return one.endswith(LEFT)


def _lost(device: str) -> bool:
    """Whether the file behind a loop device has been deleted: `onevm delete` of 3.2.1 does so to running containers."""
    base = os.path.realpath(f"/sys/dev/block/{device}")
    for directory in (base, os.path.dirname(base)):  # a partition's files lie below its device's
        file = kernelfile.text(f"{directory}/loop/backing_file")
        if file:
            return file.endswith(" (deleted)") or not os.path.exists(file)
    return False


def _running(seen: list[str]) -> dict[str, str]:
    """Containers with an OpenNebula name, by VM. The helper says more of them, if they are ours."""
    return {str(names.vm_id_of(one.partition("/")[0])): RUNNING for one in seen if not _is_left(one)}


def _sync_period_s() -> float:
    """How often monitord wants to hear of all VMs: its configuration comes on stdin, as XML in one known spelling."""
    if sys.stdin is None or sys.stdin.isatty():
        return SYNC_S
    text = sys.stdin.read(_CONFIGURATION_LIMIT)
    value = text.partition("<SYNC_STATE_VM>")[2].partition("</SYNC_STATE_VM>")[0]
    digits = value.replace("<![CDATA[", "").replace("]]>", "").strip()
    return float(digits) if names.is_number(digits) else SYNC_S
