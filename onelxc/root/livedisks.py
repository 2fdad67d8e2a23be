"""How does a disk come to a running container, and leave it? The verbs `attach_disk` and `detach_disk`.

Attached, it is mounted on the host as at start (that mount lives as long as the container, so that it can be shown
again after a reboot from inside), and a detached copy of that mount is moved into the container. Detached, it is
refused while anybody uses it, with the names of who does, and when it returns nothing holds the image.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

from onelxc import model, wire
from onelxc.errors import NoSuchDomainError, NotSupportedError, StorageError
from onelxc.model import Disk, IoLimits, Mount, Vm
from onelxc.root import (
    holders,
    inside,
    iolimits,
    leases,
    leaving,
    mounts,
    orphans,
    placeholders,
    prepare,
    record,
    release,
    syscalls,
    validate,
)
from onelxc.root.record import Record
from onelxc.root.work import Work

EXECUTED_S = 20.0
MOST_PLACES = 100
"""Of disks that were detached; a tenant may call as many of his own mounts so as he likes."""


def attach(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"disk": …}`. The caller commits. A disk that is attached already is attached."""
    disk = wire.decode(Disk, request.get("disk"))
    found = _record(work)
    if disk.kind == "swap":
        raise NotSupportedError(f"Cannot attach disk {disk.disk_id}: a container cannot swap to a disk of its own")
    if disk.kind == "context":
        raise NotSupportedError(f"Cannot attach disk {disk.disk_id}: it is the context, which reconfigure brings")
    validate.check_disk(disk)
    target = validate.mount_point(disk)
    known = next((one for one in found.vm.disks if one.disk_id == disk.disk_id), None)
    if known is not None and known.attach and not _is_there(work, known):
        # an attach whose answer did not arrive: OpenNebula took the image away again, and may use the number anew
        work.log(f"disk {disk.disk_id} is another image now: detaching the one before")
        detach(work, {"disk_id": disk.disk_id})
        found, known = _record(work), None
    source = work.paths.disk(disk.disk_id)
    if (
        known is not None
        and known.attach
        and known.path == disk.path
        and Mount(source, target, disk.read_only) in (found.prepared.mounts)
    ):
        refresh(work, found)
        return {"target": target}
    if known is not None or disk.disk_id < 0:
        raise StorageError(f"Cannot attach disk {disk.disk_id}: a disk of that number is attached already")
    pid = inside.init_pid(work.vm_id)
    if any(mount.target == target for mount in found.prepared.mounts):
        raise StorageError(f"Cannot attach disk {disk.disk_id}: another disk is at {target} already")
    device = prepare.mount_data_disk(work, disk, found.prepared.id_base)
    disk = dataclasses.replace(disk, attach=True)  # from now on: libvirt's description of the domain has no word of it
    if disk.limits != IoLimits():
        iolimits.set_limits(work.vm_id, device, disk.limits)
    id_base = found.prepared.id_base
    work.journal.take("shown", disk=disk.disk_id, source=source, target=target, id_base=id_base)
    inside.attach(pid, source, target, id_base)
    mount = Mount(source, target, disk.read_only)
    limited = ((disk.disk_id, device),) if disk.limits != IoLimits() else ()
    prepared = dataclasses.replace(
        found.prepared, mounts=(*found.prepared.mounts, mount), devices=(*found.prepared.devices, *limited)
    )
    record.stage(work, dataclasses.replace(found.vm, disks=(*found.vm.disks, disk)), prepared)
    return {"target": target}


def detach(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"disk_id": 3}`. A disk that is not there is detached.

    What can fail comes first: it leaves the container (and comes back if something fails), is written out, is seen to
    be free, the record without it is written. With the commit it is decided, and it leaves the host.
    """
    disk_id = wire.number(request, "disk_id")
    found = _record(work)
    if disk_id == found.vm.root_disk.disk_id:
        raise NotSupportedError(f"Cannot detach disk {disk_id}: it holds the root file system of the container")
    disk = next((one for one in found.vm.disks if one.disk_id == disk_id), None)
    if disk is None:
        return {}
    source, id_base = work.paths.disk(disk_id), found.prepared.id_base
    target = next((mount.target for mount in found.prepared.mounts if mount.source == source), "")
    if mounts.is_mounted(source):
        work.journal.take("hidden", source=source)
        leaving.leave(work.vm_id, disk_id, source, target, id_base)
        release.write_out(work, source)
        _must_be_free(disk_id, source)
    limited = disk.limits != IoLimits()
    leaves = {"source": source, "limited": limited, "place": not disk.attach, "entries": _entries(work, disk)}
    work.journal.take("disk_leaves", **leaves)
    vm = dataclasses.replace(found.vm, disks=tuple(one for one in found.vm.disks if one.disk_id != disk_id))
    prepared = dataclasses.replace(
        found.prepared,
        mounts=tuple(mount for mount in found.prepared.mounts if mount.source != source),
        devices=tuple(pair for pair in found.prepared.devices if pair[0] != disk_id),
    )
    record.stage(work, vm, prepared)
    record.commit(work, {})
    release.finish(work)
    return {}


def show_again(work: Work, what: dict[str, Any]) -> None:
    """The journal's `hidden`: a disk that left the container, and then could not leave the host, is back."""
    found = record.read(work.vm_id)
    if found is not None:
        _show(work, found, str(what["source"]))


def leave_host(work: Work, what: dict[str, Any]) -> None:
    """The journal's `disk_leaves`, once committed: nothing of the disk is left on the host, nothing holds its image.

    The entries that it has there (mount, loop device, daemon) are given back with it.
    """
    source = str(what["source"])
    if what["limited"] and mounts.is_mounted(source):
        iolimits.set_limits(work.vm_id, _device_of(source), IoLimits())
    if what["place"]:
        _uncover_place(work, source)
    for entry in work.journal.held():
        if entry.number in what["entries"] and not (what["place"] and entry.kind == "mount"):
            release.give_back(work, entry)
        elif entry.kind == "hidden" and entry.what["source"] == source:
            work.journal.gave_back(entry.number)


def refresh(work: Work, found: Record) -> None:
    """After the container restarted by itself: show it again what libvirt knows nothing of, with its limits."""
    pid = _wait_executed(work.vm_id)
    places = (mount.point for mount in inside.mounts_of(pid) if mount.source == placeholders.NAME)
    for place in list(itertools.islice(places, MOST_PLACES)):
        inside.detach(pid, place, remove=False)
    for shown in found.prepared.mounts:
        _show(work, found, shown.source)


def _show(work: Work, found: Record, source: str) -> None:
    """Show the container the disk mounted at `source`, unless it sees it already."""
    disk = next((one for one in found.vm.disks if work.paths.disk(one.disk_id) == source), None)
    shown = next((mount for mount in found.prepared.mounts if mount.source == source), None)
    if disk is None or shown is None or not mounts.is_mounted(source):
        return
    pid = inside.init_pid(work.vm_id)
    if leaving.number(source) not in {mount.device for mount in inside.mounts_of(pid)}:
        inside.attach(pid, source, shown.target, found.prepared.id_base)
        if disk.limits != IoLimits():
            iolimits.set_limits(work.vm_id, _device_of(source), disk.limits)


def _record(work: Work) -> Record:
    found = record.read(work.vm_id)
    if found is None:
        raise NoSuchDomainError(f"Cannot find {model.deploy_id(work.vm_id)}: no such container of ours on this host")
    return found


def _wait_executed(vm_id: int) -> int:
    """The container's process 1, once it is what the image brought: before, its file systems are still being built."""
    deadline = time.monotonic() + EXECUTED_S
    while True:
        pid = inside.init_pid(vm_id)
        if orphans.comm(pid) not in (orphans.CONTROLLER, ""):
            return pid
        if time.monotonic() > deadline:
            raise StorageError(f"Cannot look into {model.deploy_id(vm_id)}: its init has not been executed")
        time.sleep(0.01)


def _entries(work: Work, disk: Disk) -> list[int]:
    """What the journal has for the disk on this host: its mount, its loop device, what shows its image."""
    image, real = _image(work, disk)
    source = work.paths.disk(disk.disk_id)
    found = []
    for entry in work.journal.held():
        what = entry.what
        if (
            (entry.kind in ("mount", "shown") and source in (what.get("path"), what.get("source")))
            or (entry.kind in ("loop", "qcow2") and image == (what.get("dev"), what.get("ino")))
            or (entry.kind == "rbd" and disk.path == f"rbd:{what.get('image')}")
            or (entry.kind == "volume" and real and what.get("path") == real)
            or (entry.kind == leases.KIND and what.get("disk") == disk.disk_id)
        ):
            found.append(entry.number)
    return found


def _image(work: Work, disk: Disk) -> tuple[tuple[int, int] | None, str]:
    """((st_dev, st_ino), real path) of the disk's image; (None, "") if the file has gone already."""
    try:
        with validate.find(disk.path, work.config) as found:
            return (found.status.st_dev, found.status.st_ino), found.real
    except StorageError:
        return None, ""


def _is_there(work: Work, disk: Disk) -> bool:
    """Whether the disk that is attached still is the one at its path; what is deleted or replaced is not."""
    return any(
        entry.number in _entries(work, disk) and entry.kind not in ("mount", "shown", leases.KIND)
        for entry in work.journal.held()
    )


def _must_be_free(disk_id: int, source: str) -> None:
    """StorageError, with nothing changed, if the mount on the host could not be given back now."""
    deadline = time.monotonic() + release.UNMOUNT_S
    while not syscalls.is_unused_mount(source):
        if time.monotonic() > deadline:
            users = ", ".join(holders.users_of(source)) or "the kernel"
            raise StorageError(f"DISK {disk_id} is in use on the host by {users}")
        time.sleep(0.05)


def _uncover_place(work: Work, source: str) -> None:
    """Unmount the disk from the placeholder that lies below it, or that is put there now: an older driver put none."""
    there = placeholders.sources(source)
    if there and there[-1] != placeholders.NAME:
        release.unmount(work, source, leave=there.count(placeholders.NAME))
    if placeholders.NAME not in there:
        placeholders.put(source)


def _device_of(point: str) -> str:
    """The block device mounted at `point`."""
    mount = inside.own_mount(point)
    if mount is None:
        raise StorageError(f"Cannot find what is mounted at {point}: nothing is")
    return mount.source


__all__ = ["Vm", "attach", "detach", "refresh"]
