"""Which files make up a qcow2 image? The image and those behind it, as far as the VM may have them.

The daemon that shows it raw (`rawview`) is told every file of the chain by descriptor, each found in a datastore by
`validate`, and the format of each: what an image's header says about other files opens nothing.
"""

from __future__ import annotations

import json
import os
import struct
from typing import Any

from onelxc.errors import StorageError
from onelxc.model import Disk
from onelxc.root import rawview, validate
from onelxc.root.work import Work

_MAGIC = b"QFI\xfb"
_LAYERS = 32
_EXTERNAL_DATA = 1 << 2
_BACKING_FORMAT = 0xE2792ACA
_CLUSTER_BITS = range(9, 22)


def is_qcow2(fd: int) -> bool:
    """By content."""
    return os.pread(fd, 4, 0) == _MAGIC


def export(work: Work, found: validate.Found, disk: Disk) -> int:
    """A descriptor of a raw view of the image `found` of a disk: see `rawview.show`."""
    read_only = disk.read_only
    layers = _chain(work, found, disk)
    try:
        nodes = []
        for number in reversed(range(len(layers))):
            fd, form = layers[number]
            file = {"driver": "file", "filename": f"/proc/self/fd/{fd}", "read-only": number > 0 or read_only}
            node: dict[str, Any] = {"driver": form, "node-name": _name(number), "file": file}
            node["read-only"] = number > 0 or read_only
            if form == "qcow2":
                node["backing"] = _name(number + 1) if number + 1 < len(layers) else None
            if number == 0:
                node["discard"] = "unmap"
            nodes.append(json.dumps(node))
        doing = f"open {found.path} as qcow2"
        return rawview.show(work, found.status, nodes, [fd for fd, _ in layers], read_only=read_only, doing=doing)
    except OSError as error:
        raise StorageError(f"Cannot open {found.path} as qcow2: {error.strerror}") from error
    finally:
        for fd, _ in layers:
            os.close(fd)


def _name(number: int) -> str:
    return f"layer{number}" if number else rawview.TOP


def _chain(work: Work, top: validate.Found, disk: Disk) -> list[tuple[int, str]]:
    """(descriptor, format) of the image and of each file behind it."""
    layers: list[tuple[int, str]] = []
    try:
        layers.append((top.open(os.O_RDONLY if disk.read_only else os.O_RDWR), "qcow2"))
        real = top.real
        while layers[-1][1] == "qcow2":
            backing, form = _header(layers[-1][0], top.path)
            if not backing:
                break
            if len(layers) >= _LAYERS:
                raise StorageError(f"Cannot open {top.path} as qcow2: more than {_LAYERS} images lie behind it")
            with validate.find(os.path.join(os.path.dirname(real), backing), work.config) as below:
                if not _belongs(below.real, disk):
                    raise StorageError(
                        f"Cannot open {top.path} as qcow2: the image behind it ({backing}) is neither the VM's own nor"
                        " the one that the disk was made from"
                    )
                real = below.real
                layers.append((below.open(os.O_RDONLY), form))
    except BaseException:
        for fd, _ in layers:
            os.close(fd)
        raise
    return layers


def _belongs(real: str, disk: Disk) -> bool:
    """Whether a file may lie behind a disk: in the VM's own directory, or DISK/SOURCE with its snapshots.

    Who uploads an image writes its header, and other people's images lie in the same datastores. SOURCE is a path on
    the front-end, whose last two components (datastore and image) are the same on every host. Where its user wrote
    SOURCE, all of it has to be the same: the transfer manager gave him that image already.
    """
    if real.startswith(os.path.realpath(os.path.dirname(disk.path)) + "/"):
        return True
    image, source = real.partition(".snap/")[0].split("/"), os.path.normpath(disk.source).split("/")
    if not disk.registered:
        return disk.kind == "image" and bool(disk.source) and image == os.path.realpath(disk.source).split("/")
    return len(image) >= 2 and image[-2:] == source[-2:]


def _header(fd: int, name: str) -> tuple[str, str]:
    """(backing file, its format) as the header has them (docs/interop/qcow2.txt of QEMU).

    All of it lies in the image's first cluster, of 2 MiB at most, so that no number in it leads further.
    """
    damaged = StorageError(f"Cannot open {name} as qcow2: its header is damaged")
    header = os.pread(fd, 104, 0)
    if len(header) < 72 or header[:4] != _MAGIC:
        raise damaged
    version, offset, length, cluster_bits = struct.unpack_from(">IQII", header, 4)
    crypt = struct.unpack_from(">I", header, 32)[0]
    features, header_length = 0, 72
    if version >= 3 and len(header) == 104:
        features = struct.unpack_from(">Q", header, 72)[0]
        header_length = struct.unpack_from(">I", header, 100)[0]
    if features & _EXTERNAL_DATA:
        raise StorageError(f"Cannot open {name} as qcow2: its data are in another file, which is not supported")
    if crypt:
        raise StorageError(f"Cannot open {name} as qcow2: it is encrypted")
    if not offset:
        return "", ""
    if length > 1023 or cluster_bits not in _CLUSTER_BITS or offset + length > 1 << cluster_bits:
        raise damaged
    first = os.pread(fd, offset + length, 0)
    backing = os.fsdecode(first[offset:])
    form = _backing_format(first[:offset], header_length)
    if form not in ("raw", "qcow2") or backing.startswith("json:") or "\0" in backing:
        raise StorageError(f"Cannot open {name} as qcow2: it does not say what the image behind it ({backing}) is")
    return backing, form


def _backing_format(area: bytes, position: int) -> str:
    """The header extension that names the backing file's format; "" if there is none."""
    while position + 8 <= len(area):
        kind, length = struct.unpack_from(">II", area, position)
        if kind == 0:
            break
        if kind == _BACKING_FORMAT and length < 64:
            return area[position + 8 : position + 8 + length].decode(errors="replace")
        position += 8 + (length + 7) // 8 * 8
    return ""
