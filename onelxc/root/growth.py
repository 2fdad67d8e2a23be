"""How does a disk become larger while it is mounted? The verb `resize_disk`.

For file images OpenNebula's transfer managers leave the image of a running VM to the driver, so the file is enlarged
here, then its loop device, then the file system. What only the next start can do is said in words.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import time
from typing import Any

from onelxc import kernelfile, model, wire
from onelxc.errors import NoSuchDomainError, NotSupportedError, StorageError
from onelxc.model import Disk
from onelxc.root import filesystems, inside, loops, mounts, rawview, rbd, record, snapshots, validate
from onelxc.root.work import Work

_MIB = 1 << 20
_HEARD_S = 30.0


def resize(work: Work, request: dict[str, Any]) -> dict[str, Any]:
    """The verb: `{"disk_id": 0, "size_mb": 4096}`. Never smaller. The caller commits."""
    disk_id, size_mb = wire.number(request, "disk_id"), wire.number(request, "size_mb", most=1 << 34)
    found = record.read(work.vm_id)
    if found is None:
        raise NoSuchDomainError(f"Cannot find {model.deploy_id(work.vm_id)}: no such container of ours on this host")
    disk = next((one for one in found.vm.disks if one.disk_id == disk_id and one.kind in ("image", "fs")), None)
    if disk is None:
        raise StorageError(f"Cannot resize disk {disk_id}: the container has no such disk")
    if disk.read_only:
        raise NotSupportedError(f"Cannot resize disk {disk_id}: it is read-only")
    point = work.paths.root if disk_id == found.vm.root_disk.disk_id else work.paths.disk(disk_id)
    mount = inside.own_mount(point)
    if mount is None:
        raise StorageError(f"Cannot resize disk {disk_id}: it is not mounted")
    before = _enlarge(work, disk, mount.source, size_mb)
    disks = tuple(dataclasses.replace(one, size_mb=size_mb) if one is disk else one for one in found.vm.disks)
    record.stage(work, dataclasses.replace(found.vm, disks=disks), found.prepared)
    _grow(disk_id, mount.source, point)
    after = mounts.device_bytes(mount.source)
    work.log(f"disk {disk_id} grown from {before >> 20} to {after >> 20} MiB")
    return {"bytes": after}


def _enlarge(work: Work, disk: Disk, device: str, size_mb: int) -> int:
    """Make image and device as large as asked; gives the bytes of before."""
    before = mounts.device_bytes(device)
    if size_mb * _MIB < before:
        raise StorageError(
            f"Cannot resize disk {disk.disk_id} to {size_mb} MB: it has {before >> 20} MB and does not shrink"
        )
    if disk.path.startswith(rbd.PREFIX):
        if before < size_mb * _MIB:
            rbd.resize(disk, size_mb)
            _hear_of_it(disk, device, size_mb)
        return before
    with validate.find(disk.path, work.config) as image:
        if not stat.S_ISREG(image.status.st_mode):  # a volume, which its transfer manager has enlarged
            if before < size_mb * _MIB and _is_a_part(device):
                raise _partitioned(disk)
            return before
        shown = rawview.device_of(work, image.status)
        if shown is not None:
            _enlarge_shown(work, disk, device, shown, size_mb * _MIB)
        else:
            place = rawview.place_of(work, image.status)
            fd = os.open(place, os.O_RDWR | os.O_CLOEXEC) if os.path.exists(place) else image.open(os.O_RDWR)
            try:
                _enlarge_file(disk, device, fd, size_mb * _MIB)
            finally:
                os.close(fd)
    if device != shown:
        loops.refresh(device)
    if mounts.device_bytes(device) < size_mb * _MIB:
        raise _partitioned(disk)
    return before


def _hear_of_it(disk: Disk, device: str, size_mb: int) -> None:
    """The cluster tells the kernel that an image has grown, after a while; but a loop is over one of its partitions."""
    if _is_a_part(device):
        raise _partitioned(disk)
    deadline = time.monotonic() + _HEARD_S
    while mounts.device_bytes(device) < size_mb * _MIB:
        if time.monotonic() > deadline:
            raise StorageError(f"Cannot resize disk {disk.disk_id}: {device} still has its old size")
        time.sleep(0.05)


def _is_a_part(device: str) -> bool:
    """Whether what is mounted is a loop over a partition."""
    return bool(kernelfile.number(f"/sys/block/{os.path.basename(device)}/loop/offset"))


def _partitioned(disk: Disk) -> NotSupportedError:
    return NotSupportedError(
        f"Cannot resize disk {disk.disk_id} while it is mounted: it is partitioned; the image has the new size, and its"
        " last partition takes it when the VM starts next"
    )


def _enlarge_file(disk: Disk, device: str, fd: int, size: int) -> None:
    try:
        status = os.fstat(fd)
        _must_be(disk, loops.backing_identity(device) == (status.st_dev, status.st_ino))
        if status.st_size < size:
            os.ftruncate(fd, size)
    except OSError as error:
        raise StorageError(f"Cannot enlarge {disk.path}: {error.strerror}") from error


def _enlarge_shown(work: Work, disk: Disk, device: str, shown: str, size: int) -> None:
    """An image that nbd device `shown` shows. `device`, which is mounted, is that, or a loop over a part of it."""
    status = os.stat(shown)
    _must_be(disk, device == shown or loops.backing_identity(device) == (status.st_dev, status.st_ino))
    if mounts.device_bytes(shown) < size:
        with snapshots.standing_still(work):
            rawview.enlarge(work, shown, size)


def _must_be(disk: Disk, mounted: bool) -> None:
    if not mounted:
        raise StorageError(f"Cannot resize disk {disk.disk_id}: {disk.path} is not what is mounted")


def _grow(disk_id: int, device: str, point: str) -> None:
    kind = filesystems.probe(device).kind
    try:
        filesystems.grow_mounted(device, kind, point)
    except StorageError as error:
        if kind in filesystems.EXT and "ermission" in str(error):
            raise NotSupportedError(
                f"Cannot grow the {kind} file system of disk {disk_id} while it is mounted: this host does not allow it"
                " (CAP_SYS_RESOURCE); the image has the new size, and the file system takes it when the VM starts next"
            ) from error
        raise
