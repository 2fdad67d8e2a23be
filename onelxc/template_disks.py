"""Which disks does the template ask for, and where do they lie on this host?

A DISK lies at `<VM's directory>/disk.<DISK_ID>`, whatever it is: a file, a symbolic link to one in a shared datastore
or to a block device. Only a Ceph image is nowhere in the file system. The context ISO is the disk that CONTEXT/DISK_ID
names; 3.2.1 names none and puts it right after the last DISK. It opens nothing: whether something is there, and what,
is the root helper's to see.

A user may write any attribute into a DISK. oned writes over SOURCE, TYPE and CLONE where the disk is made from an image
(IMAGE_ID), and over none where it is volatile (Image.cc and Datastore.cc at release-7.4.0). So a volatile disk is where
its transfer manager makes it, which the system datastore's TM_MAD says, whatever stands in SOURCE, DISK_TYPE or CLONE;
and a Ceph image is opened only for a disk that is made from an image.
"""

from __future__ import annotations

import posixpath
import re

from onelxc.fields import Fields
from onelxc.model import Disk, IoLimits

_MOST = 256
_LIMITS = (
    "total_bytes_sec",
    "read_bytes_sec",
    "write_bytes_sec",
    "total_iops_sec",
    "read_iops_sec",
    "write_iops_sec",
)


def disks(template: Fields, vm_id: int, vm_dir: str, tm_mad: str = "") -> tuple[Disk, ...]:
    """All DISKs, the one with the root file system first: that of OS/BOOT if it names one, else the first DISK.

    `tm_mad` is the system datastore's transfer manager, "" where nothing tells it.
    """
    found = []
    for number, element in enumerate(template.all("DISK", most=_MOST)):
        fields = Fields(element, f"{template.where}: DISK {element.findtext('DISK_ID') or number}")
        found.append(disk(fields, number, vm_id, vm_dir, tm_mad))
    ids = [one.disk_id for one in found]
    for disk_id in ids:
        if ids.count(disk_id) > 1:
            raise template.error(f"DISK {disk_id} is there twice")
    for one in found:
        if one.target.startswith("/") and [other.target for other in found].count(one.target) > 1:
            raise template.error(f"DISK {one.disk_id}: another DISK has the same TARGET: {one.target!r}")
    boot = template.text("OS/BOOT").split(",")[0].strip().lower()
    found.sort(key=lambda one: (one.kind != "image", f"disk{one.disk_id}" != boot, one.disk_id))
    return tuple(found)


def disk(fields: Fields, number: int, vm_id: int, vm_dir: str, tm_mad: str = "") -> Disk:
    """One DISK; `number` stands for DISK_ID where 3.2.1 leaves it out."""
    disk_id = fields.whole("DISK_ID", least=0, most=1_000_000)
    if disk_id is None:
        disk_id = number
    kind = {"fs": "fs", "swap": "swap"}.get(fields.text("TYPE").lower(), "image")
    # one that oned could not read as the number of an image is its user's
    registered = kind == "image" and re.match(r"[0-9]{1,9}\Z", fields.text("IMAGE_ID")) is not None
    beside = posixpath.join(vm_dir, f"disk.{disk_id}")
    ceph = _ceph_image(fields, kind, registered, tm_mad, f"{vm_id}-{disk_id}")
    target = fields.text("TARGET")
    if target.startswith("/"):
        target = posixpath.normpath("/" + target.lstrip("/"))
        if target == "/" or ".." in fields.text("TARGET").split("/"):
            raise fields.error(f"TARGET is no place for a data disk: {fields.text('TARGET')!r}")
    cdrom = fields.text("TYPE").upper().endswith("CDROM") or fields.text("IMAGE_TYPE").upper() == "CDROM"
    formats = fields.text("FORMAT").lower()
    return Disk(
        disk_id=disk_id,
        path=f"rbd:{ceph}" if ceph else beside,
        kind=kind,
        target=target,
        size_mb=fields.whole("SIZE", "a number", least=1, most=1 << 34),
        format=formats,
        fs=(fields.text("FS") or (formats if formats not in ("raw", "qcow2", "swap") else "")).lower()
        if kind == "fs"
        else "",
        read_only=fields.yes("READONLY") or cdrom,
        persistent=fields.yes("PERSISTENT"),
        attach=fields.yes("ATTACH"),
        limits=IoLimits(**{name: fields.whole(name.upper(), "a number", least=0) or None for name in _LIMITS}),
        source=fields.text("SOURCE") if kind == "image" else "",
        ceph_user=fields.text("CEPH_USER") if ceph else "",
        ceph_conf=fields.text("CEPH_CONF") if ceph else "",
        beside=beside if ceph else "",
        registered=registered,
    )


def _ceph_image(fields: Fields, kind: str, registered: bool, tm_mad: str, own: str) -> str:
    """`pool/image` of a disk on Ceph as its transfer manager names it (src/tm_mad/ceph/clone, mkimage), "" for others.

    `own` is what makes a name the disk's: `<VM>-<disk>`.
    """
    if kind != "image":
        if tm_mad == "ceph" or (not tm_mad and fields.text("DISK_TYPE").upper() == "RBD"):
            return f"{fields.text('POOL_NAME') or 'one'}/one-sys-{own}"
        return ""
    if fields.text("TYPE").upper() not in ("RBD", "RBD_CDROM"):
        return ""
    if not registered:
        raise fields.error("TYPE=RBD is for images of a datastore: this disk is made from none (IMAGE, IMAGE_ID)")
    source = fields.text("SOURCE")
    return f"{source}-{own}" if fields.yes("CLONE") else source


def context_disk(template: Fields, found: tuple[Disk, ...], vm_dir: str) -> Disk | None:
    """The disk with the context, None if there is no CONTEXT."""
    context = template.sub("CONTEXT")
    if context is None:
        return None
    disk_id = context.whole("DISK_ID", least=0, most=1_000_000)
    if disk_id is None:
        disk_id = max([disk.disk_id for disk in found], default=-1) + 1
    return Disk(
        disk_id=disk_id,
        path=posixpath.join(vm_dir, f"disk.{disk_id}"),
        kind="context",
        target=context.text("TARGET"),
        read_only=True,
    )
