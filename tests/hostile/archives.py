"""Archives as no honest tool writes them. Each case is a function that gives the bytes of one.

Headers are made by hand (`header`, `pax`), because tarfile refuses to write most of what is tried here. `root` is the
least that a container can start from.
"""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import os
import subprocess
import tarfile
from collections.abc import Callable

from tests.hostile.witness import CANARY, SECRET_FILE

BLOCK = 512
END = bytes(2 * BLOCK)


def number(value: int, width: int) -> bytes:
    """A field of a header: octal, or GNU's base 256 where that is too narrow."""
    text = b"%0*o\0" % (width - 1, value) if value >= 0 else b""
    if text and len(text) == width:
        return text
    return bytes([0x80 if value >= 0 else 0xFF]) + (value % (1 << 8 * (width - 1))).to_bytes(width - 1, "big")


def header(
    name: bytes,
    kind: bytes = b"0",
    *,
    size: int = 0,
    link: bytes = b"",
    mode: int = 0o755,
    uid: int = 0,
    magic: bytes = b"ustar\x0000",
    device: tuple[int, int] = (0, 0),
    checksum: int | None = None,
) -> bytes:
    """One block that says of a member what it likes."""
    block = bytearray(BLOCK)

    def put(offset: int, data: bytes, width: int) -> None:
        block[offset : offset + width] = data[:width].ljust(width, b"\0")

    put(0, name, 100)
    put(100, number(mode, 8), 8)
    put(108, number(uid, 8), 8)
    put(116, number(uid, 8), 8)
    put(124, number(size, 12), 12)
    put(136, number(0, 12), 12)
    put(148, b" " * 8, 8)
    put(156, kind, 1)
    put(157, link, 100)
    put(257, magic, 8)
    put(329, number(device[0], 8), 8)
    put(337, number(device[1], 8), 8)
    put(148, b"%06o\0 " % (sum(block) if checksum is None else checksum), 8)
    return bytes(block)


def member(name: str | bytes, data: bytes = b"", kind: bytes = b"0", **fields: object) -> bytes:
    raw = name.encode() if isinstance(name, str) else name
    return header(raw, kind, size=len(data), **fields) + padded(data)  # type: ignore[arg-type]


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


def symlink(name: str, target: str) -> bytes:
    return member(name, kind=b"2", link=target.encode())


def hardlink(name: str, target: str) -> bytes:
    return member(name, kind=b"1", link=target.encode())


def directory(name: str) -> bytes:
    return member(f"{name}/", kind=b"5")


def pax(records: dict[str, bytes], kind: bytes = b"x") -> bytes:
    body = b""
    for key, value in records.items():
        rest = b" %s=%s\n" % (key.encode(), value)
        length = len(rest) + len(str(len(rest) + 3))
        while len(b"%d" % length) + len(rest) != length:
            length += 1
        body += b"%d%s" % (length, rest)
    return member("pax", body, kind)


@functools.cache
def busybox() -> bytes:
    with open("/bin/busybox", "rb") as file:
        return file.read()


@functools.cache
def root() -> bytes:
    """The least that boots and has a shell, without an end."""
    links = b"".join(symlink(f"bin/{name}", "busybox") for name in ("sh", "sleep", "cat", "mount", "ln", "rm", "mkdir"))
    script = b"#!/bin/sh\n/bin/sleep 86400\n"
    return directory("bin") + member("bin/busybox", busybox()) + links + directory("sbin") + member("sbin/init", script)


def zeros(compress: str, head: bytes, count_mb: int, tail: bytes = b"") -> bytes:
    """`head`, so many MiB of zeros and `tail`, packed without ever holding them."""
    packing = subprocess.Popen([compress, "-1", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert packing.stdin and packing.stdout
    if not os.fork():
        packing.stdout.close()
        try:
            for part in (head, *[bytes(1 << 20)] * count_mb, tail):
                packing.stdin.write(part)
            packing.stdin.close()
        finally:
            os._exit(0)
    packing.stdin.close()
    data = packing.stdout.read()
    packing.wait()
    os.wait()
    return data


def claimed(kind: bytes, claims_mb: int, there_mb: int) -> Callable[[], bytes]:
    """A special header whose content is said to be so long, and is partly there."""
    return lambda: zeros("zstd", header(b"././@LongLink", kind, size=claims_mb << 20), there_mb)


def _deep(levels: int) -> bytes:
    """GNU long names, each a directory deeper."""
    path = "/".join(["d"] * levels)
    name = path.encode() + b"/\0"
    return header(b"././@LongLink", b"L", size=len(name)) + padded(name) + header(b"d", b"5")


def _sparse(size: int) -> bytes:
    """GNU's sparse file of PAX 1.0 whose map says it is huge."""
    table = b"1\n0\n%d\n" % size
    return pax(
        {
            "GNU.sparse.major": b"1",
            "GNU.sparse.minor": b"0",
            "GNU.sparse.name": b"huge",
            "GNU.sparse.realsize": b"%d" % size,
        }
    ) + member("GNUSparseFile.0/huge", padded(table))


def _zstd_claims() -> bytes:
    """A frame without content size whose window is 2^31."""
    raw = root()[:4096]
    block = (len(raw) << 3 | 1).to_bytes(3, "little") + raw
    return b"\x28\xb5\x2f\xfd" + bytes([0x00, (31 - 10) << 3]) + block


CASES: dict[str, Callable[[], bytes]] = {
    # out of the tree
    "dots": lambda: root() + member("../../../../../../etc/onelxc-evil", b"x") + END,
    "absolute": lambda: root() + member("/etc/onelxc-evil", b"x") + END,
    "through a link": lambda: root() + symlink("out", "/etc") + member("out/onelxc-evil", b"x") + END,
    "through a link to the canary": lambda: root() + symlink("out", CANARY) + member("out/evil", b"x") + END,
    "hard link to the secret": lambda: root() + hardlink("etc-secret", SECRET_FILE) + END,
    "hard link with dots": lambda: root() + hardlink("stolen", f"../../../..{SECRET_FILE}") + END,
    "hard link through a link": lambda: root() + symlink("a", CANARY) + hardlink("stolen", "a/secret") + END,
    "link and then a directory of its name": lambda: (
        root() + symlink("etc", CANARY) + directory("etc") + member("etc/hostname", b"x") + END
    ),
    "bin is a link out": lambda: symlink("bin", "/bin") + member("sbin/init", b"#!/bin/sh\n") + END,
    "init is a link out": lambda: member("sbin/x", b"x") + symlink("sbin/init", "../../../../bin/sleep") + END,
    "pax path": lambda: root() + pax({"path": b"../../etc/onelxc-evil"}) + member("x", b"x") + END,
    "pax linkpath": lambda: root() + pax({"linkpath": SECRET_FILE.encode()}) + hardlink("stolen", "x") + END,
    "gnu volume and multivolume": lambda: member("vol", kind=b"V") + member("x", kind=b"M") + root() + END,
    "gnu dumpdir": lambda: root() + member("bin", b"Yinit\0Nsh\0\0", b"D") + END,
    # what the driver itself makes in it
    "its own places are links": lambda: (
        root()
        + b"".join(
            symlink(name, CANARY)
            for name in ("proc", "sys", "dev", ".oldroot", "media", "context", "run", "etc", "mnt", "tmp")
        )
        + END
    ),
    "its own places are files": lambda: (
        root()
        + b"".join(member(name, b"x") for name in ("proc", "sys", "dev", ".oldroot", "media", "context", "run"))
        + END
    ),
    "its own places are devices and pipes": lambda: (
        root()
        + b"".join(
            member(name, kind=kind, device=(1, 5)) for name, kind in (("proc", b"3"), ("dev", b"4"), ("media", b"6"))
        )
        + END
    ),
    "oldroot leads to media": lambda: root() + directory("media") + symlink(".oldroot", "media") + END,
    "os-release is a pipe": lambda: root() + directory("etc") + member("etc/os-release", kind=b"6") + END,
    "os-release is a device": lambda: root() + member("etc/os-release", kind=b"3", device=(1, 5)) + END,
    "os-release has control characters": lambda: root() + member("etc/os-release", b'ID="\x1b[2J\x9b31m"\n' * 9) + END,
    # claims
    "pax header of 2 GiB": claimed(b"x", 2048, 700),
    "global pax header of 2 GiB": claimed(b"g", 2048, 64),
    "long name of 2 GiB": claimed(b"L", 2048, 700),
    "long link of 2 GiB": claimed(b"K", 2048, 64),
    "a file of 2^62 bytes": lambda: root() + header(b"huge", size=1 << 62) + END,
    "a file of negative size": lambda: root() + header(b"less", size=-512) + END,
    "a sparse file of 2^62 bytes": lambda: root() + _sparse(1 << 62) + END,
    "a bomb of zeros": lambda: zeros("zstd", root() + header(b"zeros", size=1 << 30), 1 << 10, END),
    "a bomb before the first member": lambda: zeros("gzip", b"", 600, b""),
    "a bomb after the end": lambda: zeros("zstd", root() + END, 1 << 10),
    "endless global headers": lambda: pax({"comment": b"x" * 900}, b"g") * 20000 + root() + END,
    "300 levels": lambda: root() + _deep(300) + END,
    "3000 levels": lambda: root() + _deep(3000) + END,
    "3000 levels in a root below": lambda: _deep(1500).replace(b"d/d", b"r/d") + root() + END,
    "a name of 60 KiB": lambda: root() + pax({"path": b"n" * 60000}) + member("x", b"x") + END,
    "a name with control characters": lambda: root() + member(b"\x1b[2J\n\x9b31m\xff\xfe\r", b"x") + END,
    "a name that cannot be": lambda: root() + header(b"\x1b]0;evil\x07/" * 9, b"1", link=b"\n\n\x9b") + END,
    "an xattr of 60 KiB": lambda: root() + pax({"SCHILY.xattr.user.big": b"v" * 60000}) + member("x", b"x") + END,
    "xattrs of the kernel's": lambda: (
        root()
        + pax(
            {
                "SCHILY.xattr.security.capability": b"\x01\0\0\x02" + b"\xff" * 16,
                "SCHILY.xattr.trusted.overlay.opaque": b"y",
                "SCHILY.xattr.trusted.overlay.redirect": CANARY.encode(),
                "SCHILY.xattr.security.ima": b"\0" * 40,
                "SCHILY.xattr.system.posix_acl_access": b"\x02\0\0\0" + b"\xff" * 40,
            }
        )
        + member("x", b"x")
        + END
    ),
    "owners beyond 16 and 32 bits": lambda: (
        root() + member("a", b"x", uid=70000) + member("b", b"x", uid=1 << 40) + END
    ),
    "a device of the host's disk": lambda: root() + member("disk", kind=b"4", device=(254, 0), mode=0o666) + END,
    "an unknown type": lambda: root() + member("odd", b"x", b"~") + END,
    # broken
    "a wrong checksum": lambda: root() + header(b"x", checksum=1) + END,
    "cut in a member": lambda: (root() + END)[: len(root()) // 2],
    "cut in the packing": lambda: gzip.compress(root() + END, 1)[:-200000],
    "packed five times": lambda: functools.reduce(lambda data, _: gzip.compress(data, 1), range(5), root() + END),
    "gzip with a name that clears the screen": lambda: _gzip_named(b"\x1b[2J\n../../etc/passwd\0"),
    "xz with a dictionary of 1.5 GiB": lambda: _xz_claims(40),
    "xz filters that are not": lambda: lzma.compress(root() + END, preset=0).replace(b"\x21\x01", b"\x3f\x01", 1),
    "zstd with a window of 2 GiB": _zstd_claims,
    "bzip2 cut": lambda: bz2.compress(root() + END)[:-1000],
    "lz4 that claims and ends": lambda: b"\x04\x22\x4d\x18\x40\x70\xdf" + b"\xff\xff\xff\x7f" + b"x" * 5000,
    "several streams": lambda: gzip.compress(root()[:5120], 1) + gzip.compress(root()[5120:] + END, 1),
    "rubbish behind the packing": lambda: gzip.compress(root() + END, 1) + b"\x1b[2J rubbish" * 999,
    "squashfs that lies": lambda: b"hsqs" + b"\xff" * 92 + bytes(8 << 20),
    "cpio": lambda: b"070701" + b"F" * 104 + b"TRAILER!!!",
    "zip": lambda: b"PK\x03\x04" + b"\xff" * 200,
    # members that do not fit together
    "a file twice, a link between": lambda: root() + symlink("x", SECRET_FILE) + member("x", b"overwritten") + END,
    "a directory that becomes a link": lambda: (
        root() + directory("d") + symlink("d", CANARY) + member("d/evil", b"x") + END
    ),
    "a link to itself": lambda: root() + symlink("sbin", "sbin") + hardlink("y", "y") + END,
    "mode of nobody": lambda: directory("bin").replace(b"0000755", b"0000000") + root() + END,
    "a rootfs below, and files beside": lambda: b"".join(
        [
            directory("rootfs"),
            symlink("rootfs/bin", CANARY),
            symlink("metadata.yaml", SECRET_FILE),
            symlink("config", SECRET_FILE),
            member("rootfs/sbin/init", b"#!/bin/sh\n"),
            END,
        ]
    ),
    "rootfs is a link": lambda: symlink("rootfs", CANARY) + member("metadata.yaml", b"x: [" * 5000) + root() + END,
    "two roots": lambda: directory("rootfs") + member("rootfs/sbin/init", b"x") + root() + END,
}


def _gzip_named(name: bytes) -> bytes:
    packed = gzip.compress(root() + END, 1)
    return packed[:3] + bytes([packed[3] | 8]) + packed[4:10] + name + packed[10:]


def _xz_claims(bits: int) -> bytes:
    """A block header whose LZMA2 dictionary is as large as they come."""
    packed = bytearray(lzma.compress(root()[:100000], preset=0))
    at = packed.index(b"\x21\x01", 12)
    packed[at + 2] = min(bits, 40)
    size = (packed[12] + 1) * 4
    import zlib

    packed[12 + size - 4 : 12 + size] = zlib.crc32(bytes(packed[12 : 12 + size - 4])).to_bytes(4, "little")
    return bytes(packed)


def honest() -> bytes:
    """One that tarfile wrote: what the random mutations begin with."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("etc", "home", "media"):
            found = tarfile.TarInfo(name)
            found.type, found.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(found)
    return root() + packed.getvalue()
