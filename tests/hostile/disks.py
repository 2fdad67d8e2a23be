"""Disk images whose superblocks, partition tables and qcow2 headers lie. Each case writes one image.

They are made from honest ones of `tests.support.diskimages` and mkfs by changing fields: a header that is all wrong is
refused by the first check that looks, one wrong field gets further.
"""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

from tests.hostile.witness import CANARY, SECRET_IMAGE
from tests.support.diskimages import empty, make, sh

MB = 1 << 20
EXT4 = 1024
"""Where the superblock lies."""


def edited(path: Path, *changes: tuple[int, bytes]) -> Path:
    with open(path, "r+b") as file:
        for offset, data in changes:
            file.seek(offset)
            file.write(data)
    return path


def ext4(path: Path, tree: Path | None = None, size_mb: int = 16) -> Path:
    """An honest one, 16 MB; `tree` in it."""
    filled = ["-d", str(tree)] if tree is not None else []
    sh("mkfs.ext4", "-q", "-F", "-O", "^metadata_csum", *filled, str(empty(path, size_mb)))
    return path


def field(offset: int, form: str, value: int) -> Callable[[Path], Path]:
    """An ext4 image with one field of its superblock changed."""
    return lambda path: edited(ext4(path), (EXT4 + offset, struct.pack("<" + form, value)))


def labelled(kind: str, label: bytes) -> Callable[[Path], Path]:
    """A file system whose label is what a terminal or an fstab would act on."""
    offsets = {"ext4": EXT4 + 120, "btrfs": 65536 + 0x12B, "xfs": 108}
    return lambda path: edited(_made(kind, path), (offsets[kind], label[:12].ljust(12, b"\0")))


def _made(kind: str, path: Path) -> Path:
    if kind == "ext4":
        return ext4(path)
    make(kind, str(empty(path, 320 if kind == "xfs" else 128)))
    return path


def qcow2(
    path: Path,
    *,
    backing: str = "",
    size: int = 16 * MB,
    changes: dict[int, bytes] | None = None,
    backing_at: int | None = None,
    backing_length: int | None = None,
) -> Path:
    """An image of qemu-img's, its header changed afterwards; `backing` is written where nobody has checked it."""
    sh("qemu-img", "create", "-q", "-f", "qcow2", str(path), str(16 * MB))
    name = backing.encode()
    at = 512 if backing and backing_at is None else (backing_at or 0)
    edited(path, (8, struct.pack(">QI", at % (1 << 64), len(name) if backing_length is None else backing_length)))
    if backing:
        edited(path, (512, name))
    if size != 16 * MB:
        edited(path, (24, struct.pack(">Q", size)))
    return edited(path, *(changes or {}).items())


def qcow2_extension(path: Path, kind: int, data: bytes, length: int | None = None) -> Path:
    """… with a header extension, e.g. the name of an external data file."""
    qcow2(path)
    body = struct.pack(">II", kind, len(data) if length is None else length) + data + bytes(-len(data) % 8)
    incompatible = struct.pack(">Q", 4) if kind == 0x44415441 else struct.pack(">Q", 0)
    return edited(path, (72, incompatible), (104, body + bytes(8)))


def json_backing(depth: int) -> str:
    return "json:" + '{"file":' * depth + '{"driver":"file","filename":"' + SECRET_IMAGE + '"}' + "}" * depth


def mbr(path: Path, *rows: tuple[int, int, int], size_mb: int = 32) -> Path:
    """(type, first sector, sectors) of up to four partitions."""
    table = b"".join(
        struct.pack("<B3sB3sII", 0, b"\0" * 3, kind, b"\0" * 3, first, count) for kind, first, count in rows
    )
    return edited(empty(path, size_mb), (446, table.ljust(64, b"\0") + b"\x55\xaa"))


def circle(path: Path) -> Path:
    """An extended partition whose logical one is itself."""
    mbr(path, (5, 2048, 20480))
    row = struct.pack("<B3sB3sII", 0, b"\0" * 3, 0x83, b"\0" * 3, 1, 100)
    again = struct.pack("<B3sB3sII", 0, b"\0" * 3, 5, b"\0" * 3, 0, 20480)
    return edited(path, (2048 * 512 + 446, row + again + bytes(32) + b"\x55\xaa"))


def gpt(
    path: Path,
    *,
    entries: int = 128,
    size: int = 128,
    first_lba: int = 2,
    name: bytes = b"",
    start: int = 2048,
    end: int = 20479,
    checksums: bool = True,
) -> Path:
    """One partition by hand, with right checksums: who checks only those believes the rest."""
    kind = b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4"
    entry = kind + b"\x11" * 16 + struct.pack("<QQQ", start, end, 0) + name[:72].ljust(72, b"\0")
    table = entry.ljust(128 * 128, b"\0")
    crc = zlib.crc32(table[: min(entries, 128) * 128]) if checksums else 0
    head = struct.pack(
        "<8sIIIIQQQQ16sQIII",
        b"EFI PART",
        0x10000,
        92,
        0,
        0,
        1,
        65535,
        34,
        65502,
        b"\x22" * 16,
        first_lba,
        entries,
        size,
        crc,
    )
    head = head[:16] + struct.pack("<I", zlib.crc32(head)) + head[20:]
    mbr(path, (0xEE, 1, 65535))
    return edited(path, (512, head), (1024, table))


def compressed(maker: Callable[[Path], Path], *tool: str) -> Callable[[Path], Path]:
    def packed(path: Path) -> Path:
        raw = maker(path.with_name("unpacked"))
        with open(path, "wb") as file:
            subprocess.run([*tool, str(raw)], check=True, stdout=file)
        raw.unlink()
        return path

    return packed


def text(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


def _mkswap(path: Path) -> Path:
    sh("mkswap", "-q", "-L", "x", str(empty(path, 4)))
    return edited(path, (1024 + 28, b"\x1b[2J\x9b31m"))


CASES: dict[str, Callable[[Path], Path]] = {
    # ext4
    "ext4 of 2^63 blocks": field(4, "I", 0xFFFFFFFF),
    "ext4 with blocks of 2^40 bytes": field(24, "I", 30),
    "ext4 without inodes": field(0, "I", 0),
    "ext4 with inodes of one byte": field(88, "H", 1),
    "ext4 of unknown features": field(96, "I", 0xFFFFFFFF),
    "ext4 with a journal on another device": field(96, "I", 0x46 | 0x8),
    "ext4 whose journal is inode 3": field(224, "I", 3),
    "ext4 whose groups lie beyond it": field(20, "I", 0x7FFFFFFF),
    "ext4 with descriptors of 2^16 bytes": field(254, "H", 0xFFFF),
    "ext4 that panics the kernel on an error": field(60, "H", 3),
    "ext4 of errors": lambda path: edited(
        ext4(path), (EXT4 + 58, b"\x02\0"), (EXT4 + 60, b"\x03\0"), (20480, b"\xff" * 8192)
    ),
    "ext4 with mount options": lambda path: edited(
        ext4(path), (EXT4 + 512, b"errors=panic,usrquota,journal_path=/srv/canary")
    ),
    "ext4 whose root is a file": lambda path: edited(ext4(path), (_inode(path, 2), b"\xa4\x81")),
    "ext4 whose root is a link": lambda path: edited(
        ext4(path), (_inode(path, 2), b"\xff\xa1"), (_inode(path, 2) + 40, b"/etc")
    ),
    "ext4 cut in half": lambda path: _cut(ext4(path), 8 * MB),
    "ext4 of 64 bytes": lambda path: _cut(ext4(path), 64),
    "ext4 with the label of a terminal": labelled("ext4", b"\x1b[2J\x9b31m\n\r"),
    "ext4 with a UUID of zeros": lambda path: edited(ext4(path), (EXT4 + 104, bytes(16))),
    "an ext4 in a link out of it": lambda path: _link(path, SECRET_IMAGE),
    # the others
    "xfs that lies": lambda path: edited(_made("xfs", path), (8, b"\xff" * 8), (100, b"\xff\xff")),
    "xfs with a log outside": lambda path: edited(_made("xfs", path), (48, b"\x7f" + b"\xff" * 7)),
    "btrfs that lies": lambda path: edited(_made("btrfs", path), (65536 + 0x70, b"\xff" * 8)),
    "btrfs of many devices": lambda path: edited(_made("btrfs", path), (65536 + 0x88, b"\xff\xff\0\0\0\0\0\0")),
    "swap": _mkswap,
    "luks": lambda path: edited(empty(path, 16), (0, b"LUKS\xba\xbe\x00\x01" + b"\x1b[2J" * 40)),
    "lvm": lambda path: edited(
        empty(path, 16), (512, b"LABELONE\x01\0\0\0\0\0\0\0" + b"\xff" * 16 + b"LVM2 001" + b"canary" * 10)
    ),
    "raid": lambda path: edited(empty(path, 16), (4096, b"\xfc\x4e\x2b\xa9\x01\0\0\0" + b"\xff" * 200)),
    "two file systems at once": lambda path: edited(
        _made("btrfs", path), (0, b"XFSB" + b"\0" * 60), (EXT4 + 56, b"\x53\xef")
    ),
    "minix, fat, romfs": lambda path: edited(empty(path, 4), (0, b"-rom1fs-"), (54, b"FAT12   "), (1040, b"\x7f\x13")),
    "zeros": lambda path: empty(path, 16),
    "a hole of 8 TiB": lambda path: _sparse(path, 8 << 40),
    # partition tables
    "partitions that overlap": lambda path: mbr(path, (0x83, 2048, 40960), (0x83, 4096, 40960), (0x83, 0, 65536)),
    "partitions beyond the end": lambda path: mbr(path, (0x83, 0xFFFFFF00, 0xFFFFFFFF), (0x83, 2048, 0xFFFFFFFF)),
    "a partition of nothing": lambda path: mbr(path, (0x83, 2048, 0), (0x83, 0, 1)),
    "logical partitions in a circle": circle,
    "gpt of 2^32 entries": lambda path: gpt(path, entries=0xFFFFFFFF),
    "gpt with entries of one byte": lambda path: gpt(path, size=1),
    "gpt with entries of 2^31 bytes": lambda path: gpt(path, size=1 << 31, entries=2),
    "gpt whose table is elsewhere": lambda path: gpt(path, first_lba=(1 << 64) - 1),
    "gpt of a partition that ends before it begins": lambda path: gpt(path, start=20000, end=100),
    "gpt of a partition of 2^64": lambda path: gpt(path, start=1, end=(1 << 64) - 1),
    "gpt with the name of a terminal": lambda path: gpt(path, name="\x1b[2J\x9b31m\n".encode("utf-16le")),
    "gpt without checksums": lambda path: gpt(path, checksums=False),
    # qcow2
    "qcow2 on the host's file": lambda path: qcow2(path, backing=SECRET_IMAGE),
    "qcow2 on the host's device": lambda path: qcow2(path, backing="/dev/vda"),
    "qcow2 on itself": lambda path: qcow2(path, backing=str(path)),
    "qcow2 on its neighbour's dots": lambda path: qcow2(path, backing="../../../../../../srv/canary/image.raw"),
    "qcow2 on a network": lambda path: qcow2(path, backing="nbd://127.0.0.1:10809/x"),
    "qcow2 on a program": lambda path: qcow2(path, backing="fat:rw:/srv/canary"),
    "qcow2 on nested json": lambda path: qcow2(path, backing=json_backing(1)),
    "qcow2 on json nested 80 times": lambda path: qcow2(path, backing=json_backing(80)),
    "qcow2 on deep brackets": lambda path: qcow2(path, backing="json:" + "[" * 1000),
    "qcow2 on deep lists": lambda path: qcow2(path, backing='json:{"file":' + "[" * 500 + "]" * 500 + "}"),
    "qcow2 on control characters": lambda path: qcow2(path, backing="\x1b[2J\x9b31m\n../x"),
    "qcow2 on nothing": lambda path: qcow2(path, backing="\0\0\0"),
    "qcow2 whose backing name is at 2^63": lambda path: qcow2(path, backing_at=1 << 63, backing_length=100),
    "qcow2 whose backing name is at 2^64-1": lambda path: qcow2(path, backing_at=(1 << 64) - 1, backing_length=1023),
    "qcow2 whose backing name is 4 GiB": lambda path: qcow2(path, backing="x", backing_length=0xFFFFFFFF),
    "qcow2 with a data file": lambda path: qcow2_extension(path, 0x44415441, SECRET_IMAGE.encode()),
    "qcow2 with an extension of 4 GiB": lambda path: qcow2_extension(path, 0x44415441, b"x", 0xFFFFFFFF),
    "qcow2 with extensions without end": lambda path: qcow2_extension(path, 0x12345678, b"", 0),
    "qcow2 of 2^63 bytes": lambda path: qcow2(path, size=(1 << 63) - 512),
    "qcow2 of 64 TiB": lambda path: qcow2(path, size=64 << 40),
    "qcow2 with clusters of 2^63": lambda path: qcow2(path, changes={20: struct.pack(">I", 63)}),
    "qcow2 with clusters of 1": lambda path: qcow2(path, changes={20: struct.pack(">I", 0)}),
    "qcow2 with a table at 2^63": lambda path: qcow2(path, changes={40: b"\x80" + bytes(7)}),
    "qcow2 with a table of 2^32 entries": lambda path: qcow2(path, changes={36: b"\xff" * 4}),
    "qcow2 with 2^32 snapshots": lambda path: qcow2(path, changes={60: b"\xff" * 4, 64: bytes(8)}),
    "qcow2 that is encrypted": lambda path: qcow2(path, changes={32: struct.pack(">I", 2)}),
    "qcow2 of version 9": lambda path: qcow2(path, changes={4: struct.pack(">I", 9)}),
    "qcow2 that is dirty and corrupt": lambda path: qcow2(path, changes={72: struct.pack(">Q", 3)}),
    "qcow2 cut in its header": lambda path: _cut(qcow2(path), 60),
    "qed, vmdk, vdi": lambda path: edited(empty(path, 4), (0, b"KDMV" + b"\xff" * 60), (64, b"\x7f\x10\xda\xbe")),
    # packed
    "a packed ext4 that lies": compressed(field(4, "I", 0xFFFFFFFF), "gzip", "-1", "-c"),
    "a packed gpt that lies": compressed(lambda path: gpt(path, entries=0xFFFFFFFF), "zstd", "-1", "-q", "-c"),
    "a packed qcow2 on the host's file": compressed(lambda path: qcow2(path, backing=SECRET_IMAGE), "xz", "-0", "-c"),
    "packed zeros of 1 GiB": compressed(lambda path: empty(path, 1024), "zstd", "-1", "-q", "-c"),
    "a packed image cut": lambda path: _cut(compressed(ext4, "gzip", "-1", "-c")(path), 9000),
    "a packed text": text(gzip.compress(b"this is not an image\n" * 5000)),
    "a text": text(b"\x1b[2J no image \x9b31m\n" * 500),
    "a shell script": text(b"#!/bin/sh\ntouch /srv/canary/evil\n"),
    "one byte": text(b"x"),
}


def _inode(path: Path, number: int) -> int:
    """Where an inode of the first group lies."""
    with open(path, "rb") as file:
        data = file.read(8192)
    block = 1024 << struct.unpack_from("<I", data, EXT4 + 24)[0]
    size = struct.unpack_from("<H", data, EXT4 + 88)[0]
    with open(path, "rb") as file:
        file.seek((EXT4 // block + 1) * block + 8)
        table = struct.unpack("<I", file.read(4))[0]
    return int(table) * block + (number - 1) * int(size)


def _cut(path: Path, size: int) -> Path:
    os.truncate(path, size)
    return path


def _sparse(path: Path, size: int) -> Path:
    path.touch()
    os.truncate(path, size)
    return path


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


def iso(path: Path, tree: Path) -> Path:
    """A context, as `tm context` makes it."""
    argv = ["xorriso", "-as", "mkisofs", "-quiet", "-o", str(path), "-V", "CONTEXT", "-J", "-R", str(tree)]
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    return path


VOLUME = 16 * 2048


def _root_record(path: Path) -> tuple[int, int]:
    """(offset, length) of the first volume descriptor's root directory."""
    with open(path, "rb") as file:
        file.seek(VOLUME + 156)
        record = file.read(34)
    return struct.unpack_from("<I", record, 2)[0] * 2048, struct.unpack_from("<I", record, 10)[0]


def _joliet(path: Path) -> tuple[int, int]:
    with open(path, "rb") as file:
        file.seek(VOLUME + 2048 + 156)
        record = file.read(34)
    return struct.unpack_from("<I", record, 2)[0] * 2048, struct.unpack_from("<I", record, 10)[0]


def both(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF) + struct.pack(">I", value & 0xFFFFFFFF)


def everywhere(*changes: tuple[int, bytes]) -> Callable[[Path], Path]:
    """The same changes in all volume descriptors' root records (ISO and Joliet)."""
    return lambda path: edited(
        path, *((VOLUME + descriptor * 2048 + 156 + at, data) for descriptor in (0, 1, 2) for at, data in changes)
    )


def _continues(path: Path) -> Path:
    """Every system use area begins with a CE that leads to itself."""
    data = bytearray(path.read_bytes())
    at = data.find(b"RR\x05\x01")
    at = at if at > 0 else data.find(b"PX")
    if at > 0:
        data[at : at + 28] = b"CE\x1c\x01" + both(at // 2048) + both(at % 2048) + both(28)
    path.write_bytes(bytes(data))
    return path


def _instead(path: Path) -> Path:
    path.unlink()
    path.symlink_to(f"{CANARY}/secret")
    return path


CONTEXTS: dict[str, Callable[[Path], Path]] = {
    "an honest context": lambda path: path,
    "a root directory of 4 GiB": everywhere((10, both(0xFFFFFFFF))),
    "a root directory beyond the end": everywhere((2, both(0x7FFFFFFF))),
    "a root directory that is the volume itself": everywhere((2, both(16)), (10, both(2048 * 8))),
    "a first file of 4 GiB": lambda path: edited(
        path, *((_root_record(path)[0] + at + 10, both(0xFFFFFFFF)) for at in (0, 34, 68))
    ),
    "records of length zero and one": lambda path: edited(
        path, (_root_record(path)[0], b"\x00"), (_joliet(path)[0], b"\x01")
    ),
    "records that overlap": lambda path: edited(
        path, (_root_record(path)[0], b"\x05" * 200), (_joliet(path)[0], b"\x05" * 200)
    ),
    "names of dots": lambda path: _renamed(path, b"context", b"../../x"),
    "names with slashes": lambda path: _renamed(path, b"start.sh", b"/etc/evl"),
    "names of control characters": lambda path: _renamed(path, b"start.sh", b"\x1b[2J\n\x9b1"),
    "no volume descriptor's end": lambda path: edited(
        path, *((VOLUME + 2048 * number, b"\x02CD001\x01") for number in range(1, 12))
    ),
    "an extent in itself": lambda path: edited(path, (_root_record(path)[0] + 2, both(_root_record(path)[0] // 2048))),
    "rock ridge that continues in itself": _continues,
    "cut after its head": lambda path: _cut(path, VOLUME + 2048),
    "cut in a file": lambda path: _cut(path, os.path.getsize(path) - 60000),
    "an ext4 instead": ext4,
    "an empty file instead": lambda path: _cut(path, 0),
    "a text instead": text(b"ETH0_IP='10.0.0.1'\n"),
    "a link to the secret instead": _instead,
}


def _renamed(path: Path, old: bytes, new: bytes) -> Path:
    """The same length in every form that names have."""
    data = path.read_bytes()
    for form in (lambda name: name, lambda name: name.upper(), lambda name: name.decode("latin-1").encode("utf-16be")):
        data = data.replace(form(old), form(new))
    path.write_bytes(data)
    return path
