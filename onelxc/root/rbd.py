"""How does a Ceph image become a block device of this host? Through `rbd device map`, and away again by unmap.

What a caller may say of it is checked here: names that are names, and a configuration that lies in /etc/ceph, since rbd
runs as root and believes what it is configured with.
"""

from __future__ import annotations

import os
import re
import stat
from typing import Any

from onelxc import command, jsontext
from onelxc.errors import CommandError, StorageError
from onelxc.model import Disk
from onelxc.root.work import Work

PREFIX = "rbd:"
_IMAGE = re.compile(r"[A-Za-z0-9_.][\w.-]*/[A-Za-z0-9_.][\w.-]*(@[\w.-]+)?\Z", re.ASCII)
_MADE_FOR = re.compile(r"one-(?:sys|[0-9]+)-([0-9]+-[0-9]+)\Z", re.ASCII)
_USER = re.compile(r"[A-Za-z0-9_][\w.-]*\Z", re.ASCII)
_CONFIGURATION = re.compile(r"/etc/ceph/[A-Za-z0-9_][\w.-]*\Z", re.ASCII)
_MAP_S = 120.0
_KERNELS = "/sys/bus/rbd/devices"
"""What the kernel has mapped."""


def open_image(work: Work, disk: Disk) -> int:
    """Map the image of `disk` and open its device. The VM's release unmaps it."""
    image = disk.path[len(PREFIX) :]
    options = _options(disk)
    if not _IMAGE.match(image):
        raise StorageError(f"Cannot map {disk.path}: not `pool/image`")
    _refuse_others(disk, work.vm_id)
    work.journal.take("rbd", image=image, options=options)
    device = _mapped(image, options)
    if device is None:
        access = ["--read-only"] if disk.read_only else []
        device = _rbd(["map", *access, image, *options], f"map the Ceph image {image}").strip()
    try:
        fd = os.open(device, (os.O_RDONLY if disk.read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot open {device}, the Ceph image {image}: {error.strerror}") from error
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        os.close(fd)
        raise StorageError(f"Cannot open {device}, the Ceph image {image}: it is no block device")
    return fd


def _refuse_others(disk: Disk, vm_id: int) -> None:
    """A volatile disk has a name of its own; what was made for one disk is no other's (src/tm_mad/ceph)."""
    own = f"{vm_id}-{disk.disk_id}"
    name = disk.path.rpartition("/")[2].partition("@")[0]
    made_for = _MADE_FOR.match(name)
    if disk.kind != "image" and name != f"one-sys-{own}":
        raise StorageError(f"Cannot map {disk.path}: the volatile disk {disk.disk_id} of VM {vm_id} is one-sys-{own}")
    if made_for is not None and made_for.group(1) != own:
        raise StorageError(f"Cannot map {disk.path}: it was made for another disk than {disk.disk_id} of VM {vm_id}")


def resize(disk: Disk, size_mb: int) -> None:
    """Enlarge the image of a running VM, which its transfer manager leaves to us (src/tm_mad/ceph/resize)."""
    image = disk.path[len(PREFIX) :]
    _run(["rbd", "resize", "--size", str(size_mb), image, *_options(disk)], f"resize the Ceph image {image}")


def _options(disk: Disk) -> list[str]:
    options = []
    if disk.ceph_user:
        if not _USER.match(disk.ceph_user):
            raise StorageError(f"Cannot map {disk.path}: {disk.ceph_user!r} is no name of a Ceph user")
        options += ["--id", disk.ceph_user]
    if disk.ceph_conf:
        if not _CONFIGURATION.match(disk.ceph_conf):
            raise StorageError(f"Cannot map {disk.path}: CEPH_CONF has to lie in /etc/ceph: {disk.ceph_conf!r}")
        options += ["--conf", disk.ceph_conf]
    return options


def give_back(work: Work, what: dict[str, Any]) -> None:
    """Unmap; an image that is not mapped is unmapped, also where rbd itself cannot run."""
    image, options = str(what["image"]), [str(word) for word in what["options"]]
    try:
        device = _mapped(image, options)
    except StorageError:
        if os.path.isdir(_KERNELS) and os.listdir(_KERNELS):
            raise
        return
    if device is not None:
        _rbd(["unmap", device, *options], f"unmap the Ceph image {image}")


def _mapped(image: str, options: list[str]) -> str | None:
    """The device of an image that is mapped on this host."""
    text = _rbd(["list", "--format", "json", *options], "list the Ceph images of this host")
    name, _, snapshot = image.partition("@")
    try:
        listed = jsontext.loads(text or "[]")
        for one in listed.values() if isinstance(listed, dict) else listed:
            if f"{one['pool']}/{one['name']}" == name and one.get("snap", "-") == (snapshot or "-"):
                return str(one["device"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StorageError(f"Cannot list the Ceph images of this host: {error}") from error
    return None


def _rbd(words: list[str], doing: str) -> str:
    return _run(["rbd", "device", *words], doing)


def _run(argv: list[str], doing: str) -> str:
    try:
        return command.run(argv, timeout_s=_MAP_S, verb=doing).decode(errors="replace")
    except CommandError as error:
        raise StorageError(str(error)) from error
