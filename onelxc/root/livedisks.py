"""How does a disk come to a running container, and leave it? The verbs `attach_disk` and `detach_disk`.

Attached, it is mounted on the host as at start (that mount lives as long as the container, so that it can be shown
again after a reboot from inside), and a detached copy of that mount is moved into the container. Detached, it is
refused while anybody uses it, with the names of who does, and when it returns nothing holds the image.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from onelxc import model, wire
from onelxc.errors import NoSuchDomainError, NotSupportedError, StorageError
from onelxc.model import Disk, IoLimits, Mount, Vm
from onelxc.root import inside, iolimits, leases, leaving, mounts, orphans, prepare, record, release, syscalls, validate
from onelxc.root.record import Record
from onelxc.root.work import Work

EXECUTED_S = 20.0
MOST_PLACES = 100
"""Of disks that were detached; a tenant may call as many of his own mounts so as he likes."""
_PLACE = "onelxc-detached"


def attach(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"disk": …}`. The caller commits."""
    disk = wire.decode(Disk, request.get("disk"))
    found = _record(work)
    if disk.kind == "swap":
        raise NotSupportedError(f"Cannot attach disk {disk.disk_id}: a container cannot swap to a disk of its own")
    if disk.kind == "context":
        raise NotSupportedError(f"Cannot attach disk {disk.disk_id}: it is the context, which reconfigure brings")
    validate.check_disk(disk)
    known = [one for one in found.vm.disks if one.disk_id == disk.disk_id]
    if known or disk.disk_id < 0:
        raise StorageError(f"Cannot attach disk {disk.disk_id}: a disk of that number is attached already")
    target = validate.mount_point(disk)
    pid = inside.init_pid(work.vm_id)
    if any(mount.target == target for mount in found.prepared.mounts):
        raise StorageError(f"Cannot attach disk {disk.disk_id}: another disk is at {target} already")
    device = prepare.mount_data_disk(work, disk, found.prepared.id_base)
    disk = dataclasses.replace(disk, attach=True)  # from now on: libvirt's description of the domain has no word of it
    if disk.limits != IoLimits():
        iolimits.set_limits(work.vm_id, device, disk.limits)
    source, id_base = work.paths.disk(disk.disk_id), found.prepared.id_base
    work.journal.take("shown", disk=disk.disk_id, source=source, target=target, id_base=id_base)
    inside.attach(pid, source, target, id_base)
    mount = Mount(work.paths.disk(disk.disk_id), target, disk.read_only)
    limited = ((disk.disk_id, device),) if disk.limits != IoLimits() else ()
    prepared = dataclasses.replace(
        found.prepared, mounts=(*found.prepared.mounts, mount), devices=(*found.prepared.devices, *limited)
    )
    record.stage(work, dataclasses.replace(found.vm, disks=(*found.vm.disks, disk)), prepared)
    return {"target": target}


def detach(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"disk_id": 3}`. A disk that is not there is detached. The caller commits."""
    disk_id = wire.number(request, "disk_id")
    found = _record(work)
    if disk_id == found.vm.root_disk.disk_id:
        raise NotSupportedError(f"Cannot detach disk {disk_id}: it holds the root file system of the container")
    disk = next((one for one in found.vm.disks if one.disk_id == disk_id), None)
    source = work.paths.disk(disk_id)
    target = next((mount.target for mount in found.prepared.mounts if mount.source == source), "")
    if mounts.is_mounted(source):
        device = _device_of(source)
        leaving.leave(work.vm_id, disk_id, source, target, found.prepared.id_base)
        if disk is not None and disk.limits != IoLimits():
            iolimits.set_limits(work.vm_id, device, IoLimits())
    _give_back(work, disk, source)
    if disk is not None and not disk.attach:
        _keep_place(work, source)
    vm = dataclasses.replace(found.vm, disks=tuple(one for one in found.vm.disks if one.disk_id != disk_id))
    prepared = dataclasses.replace(
        found.prepared,
        mounts=tuple(mount for mount in found.prepared.mounts if mount.source != source),
        devices=tuple(pair for pair in found.prepared.devices if pair[0] != disk_id),
    )
    record.stage(work, vm, prepared)
    return {}


def refresh(work: Work, found: Record) -> None:
    """After the container restarted by itself: show it again what libvirt knows nothing of, with its limits."""
    pid = _wait_executed(work.vm_id)
    present: set[str] = set()
    places: list[str] = []
    for mount in inside.mounts_of(pid):
        present.add(mount.device)
        if mount.source == _PLACE and len(places) < MOST_PLACES:
            places.append(mount.point)
    for place in places:
        inside.detach(pid, place, remove=False)
    for shown in found.prepared.mounts:
        disk = next((one for one in found.vm.disks if work.paths.disk(one.disk_id) == shown.source), None)
        if disk is None or not mounts.is_mounted(shown.source):
            continue
        if leaving.number(shown.source) not in present:
            inside.attach(pid, shown.source, shown.target, found.prepared.id_base)
            if disk.limits != IoLimits():
                iolimits.set_limits(work.vm_id, _device_of(shown.source), disk.limits)


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


def _give_back(work: Work, disk: Disk | None, source: str) -> None:
    """The host's mount and the loop device, by the journal's entries for them."""
    image, real = None, ""
    if disk is not None:
        try:
            with validate.find(disk.path, work.config) as found:
                image, real = (found.status.st_dev, found.status.st_ino), found.real
        except StorageError:
            pass  # the file has gone already; the mount and its device have not
    for entry in work.journal.held():
        mine = entry.kind == "mount" and entry.what.get("path") == source
        file = entry.kind in ("loop", "qcow2") and image == (entry.what.get("dev"), entry.what.get("ino"))
        ceph = entry.kind == "rbd" and disk is not None and disk.path == f"rbd:{entry.what.get('image')}"
        shown = entry.kind == "shown" and entry.what.get("source") == source
        volume = entry.kind == "volume" and entry.what.get("path") == real
        lease = disk is not None and entry.kind == leases.KIND and entry.what.get("disk") == disk.disk_id
        if mine or file or volume or ceph or shown or lease:
            release.give_back(work, entry)


def _keep_place(work: Work, source: str) -> None:
    """libvirt restarts the container from the description of its deploy, and fails where a source of that is missing.

    So an empty read-only file system takes the place; `refresh` takes it out of the container again.
    """
    attributes = syscalls.ATTR_RDONLY | syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID | syscalls.ATTR_NOEXEC
    fd = syscalls.mount_detached("tmpfs", _PLACE, {"size": "4k", "mode": "0755"}, attributes)
    with mounts.Detached(fd, "tmpfs", "") as empty:
        work.journal.take("mount", path=source)
        mounts.place(empty, source, id_base=None)


def _device_of(point: str) -> str:
    """The block device mounted at `point`."""
    mount = inside.own_mount(point)
    if mount is None:
        raise StorageError(f"Cannot find what is mounted at {point}: nothing is")
    return mount.source


__all__ = ["Vm", "attach", "detach", "refresh"]
