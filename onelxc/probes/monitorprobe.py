"""What does each VM use? vm/monitor (every 30 s) and vm/snapshot (every minute), all VMs in one process."""

from __future__ import annotations

import os

from onelxc import containers, helperinfo, monitoring, names, samples
from onelxc.containers import Container
from onelxc.errors import HelperError
from onelxc.usage import Readings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

FACTS = "onelxc-vm-facts"
FACTS_S = 600
"""What the helper told of a running container (its system, where its disks lie) is asked again after this time."""


def monitor() -> str:
    """vm/monitor's text."""
    readings = Readings("onelxc-vm-monitor")
    ours = _ours()
    facts = _facts(ours)
    text = ""
    for container in ours:
        vm_id, usage = container.vm_id, readings.of(container)
        if vm_id is None or usage is None:
            continue
        known = facts.get(str(vm_id), {})
        values = monitoring.vm_usage(usage) + monitoring.guest_os(known.get("os", {}))
        values += monitoring.disk_sizes(_disk_sizes(known.get("disks", {})))
        text += monitoring.vm_monitor(vm_id, names.deploy_id(vm_id), values)
    readings.keep()
    return text


def snapshots() -> str:
    """vm/snapshot's text: what the snapshots of the disks take on the datastore."""
    ours = _ours()
    facts = _facts(ours)
    text = ""
    for container in ours:
        vm_id = container.vm_id
        if vm_id is None:
            continue
        sizes = _snapshot_sizes(facts.get(str(vm_id), {}).get("disks", {}))
        if sizes:
            text += monitoring.vm_monitor(vm_id, names.deploy_id(vm_id), monitoring.snapshot_sizes(sizes))
    return text


def _ours() -> list[Container]:
    return [container for container in containers.running() if container.vm_id is not None]


def _facts(ours: list[Container]) -> dict[str, Any]:
    """What the helper knows, by VM: {"5": {"os": {"OS_ID": …}, "disks": {"0": path}}}. Nothing, where it cannot be
    asked: numbers are worth having without it.
    """
    keys = [container.key for container in ours]
    kept = samples.load(FACTS)
    now = samples.now_s()
    if keys and (kept.get("of") != keys or now - kept.get("at", 0.0) >= FACTS_S):
        try:
            facts = dict(helperinfo.ask("sample")["vms"])
        except HelperError:
            return {}
        kept = {"of": keys, "at": now, "facts": facts}
        samples.save(FACTS, kept)
    facts = kept.get("facts", {})
    return facts if isinstance(facts, dict) else {}


def _disk_sizes(disks: dict[str, str]) -> list[tuple[int, int]]:
    sizes = [(int(disk), _megabytes(path)) for disk, path in disks.items()]
    return [(disk, size) for disk, size in sorted(sizes) if size]


def _snapshot_sizes(disks: dict[str, str]) -> list[tuple[int, int, int]]:
    """Snapshots of a disk are files in `disk.N.snap`, named by their number (src/tm_mad/*/snap_create)."""
    found = []
    for disk, path in disks.items():
        try:
            entries = os.listdir(f"{path}.snap")
        except OSError:
            continue
        found += [
            (int(disk), int(entry), _megabytes(f"{path}.snap/{entry}")) for entry in entries if names.is_number(entry)
        ]
    return sorted(found)


def _megabytes(path: str) -> int:
    """What a file really takes, rounded up; 0 for what is no file or not there."""
    try:
        blocks = os.stat(path).st_blocks
    except OSError:
        return 0
    return -(-blocks * 512 // (1 << 20))
