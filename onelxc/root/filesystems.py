"""Which file system is on a device, is it sound, and how is it mounted, made or grown?

By content, never by name. Works on paths of block devices (or regular files where said); attaches nothing to a place
in the tree. Images are hostile input: every option that an image could decide for itself and that could hurt the host
(ext4's errors=panic) is given explicitly.
"""

from __future__ import annotations

import errno
import functools
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onelxc import command, jsontext
from onelxc.errors import CommandError, StorageError
from onelxc.root import blkid, jail, syscalls

Log = Callable[[str], None]

EXT = ("ext2", "ext3", "ext4")
SUPPORTED = (*EXT, "xfs", "btrfs", "squashfs", "erofs", "f2fs")
GROWING = (*EXT, "xfs", "btrfs")
FSCK_LIMIT_S = 600.0
GROW_FROM = 4 << 20
"""A file system is not grown for less than this: an ext4 group that could hold nothing but its own tables."""

_LOOK = jail.Limits(memory_bytes=256 << 20, cpu_s=30, processes=1, file_bytes=0)
_LOOK_S = 60.0
_WORK = jail.Limits(memory_bytes=2 << 30, processes=16, file_bytes=0)
"""Of checkers and makers of file systems. e2fsck needs some 1 GiB for 16 TiB with as many inodes as mke2fs makes."""
_TOOLS = {"xfs": "xfsprogs", "btrfs": "btrfs-progs", "ext4": "e2fsprogs"}


@dataclass(frozen=True)
class Found:
    """What blkid says of a device or file. `kind` is "" where it sees nothing; `partitions` is "dos", "gpt" or ""."""

    kind: str = ""
    partitions: str = ""
    uuid: str = ""
    label: str = ""


def probe(device: str, name: str = "") -> Found:
    """What lies on a device, which messages call `name`."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot look at {name or device}: {error.strerror}") from error
    try:
        return probe_parts(fd, [(0, 0)], name or device)[0]
    finally:
        os.close(fd)


def probe_parts(fd: int, places: Sequence[tuple[int, int]], name: str) -> list[Found]:
    """What lies at each (offset, size) of an open device or file; size 0 is to its end."""
    program = functools.partial(blkid.tell, blkid.load(), fd, places)
    try:
        outcome = jail.alone(jail.Filter(program, _LOOK, (fd,)), limit_s=_LOOK_S)
    except StorageError as error:
        raise StorageError(f"Cannot look at {name}: {error}") from error
    lines = outcome.stdout.splitlines()
    if outcome.status != 0 or len(lines) != len(places):
        said = outcome.stderr.strip() or f"libblkid ended with {outcome.status}"
        raise StorageError(f"Cannot look at {name}: {said}")
    return [_found(line, name) for line in lines]


def _found(line: str, name: str) -> Found:
    """Of what `blkid` tells. Nothing is taken for granted: the image may have got the better of it."""
    try:
        values = jsontext.loads(line)
        if blkid.AMBIVALENT in values:
            raise StorageError(f"Cannot tell the file system of {name}: it bears the marks of more than one")
        return Found(*(str(values.get(key, "")) for key in blkid.NAMES))
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(f"Cannot look at {name}: libblkid answers with nonsense") from error


def check(device: str, kind: str, log: Log, *, limit_s: float = FSCK_LIMIT_S) -> None:
    """Repair what was not unmounted cleanly, as far as that needs no decision; StorageError with fsck's words.

    ext4 only: xfs and btrfs replay their logs when mounted and have no such thing as a safe automatic repair.
    """
    if kind not in EXT or ext_is_clean(device):
        return
    doing = "check an image that was not unmounted cleanly"
    lines = run_on(device, ("e2fsck", "-p"), doing, limit_s=limit_s, ok=(0, 1, 2))
    log(f"file system was not clean: {lines[-1] if lines else 'e2fsck said nothing'}")


def run_on(
    device: str, argv: Sequence[str], doing: str, *, limit_s: float = FSCK_LIMIT_S, ok: Sequence[int] = (0,)
) -> list[str]:
    """What a program said of the device. It reads what a tenant may have forged, so it runs in the jail."""
    try:
        outcome = jail.on_device(device, (*argv, jail.DEVICE), limit_s=limit_s, limits=_WORK)
    except StorageError as error:
        said = str(error).replace(jail.DEVICE, device)
        raise StorageError(f"Cannot {doing}: {argv[0]}: {said}") from error
    text = f"{outcome.stdout}\n{outcome.stderr}".replace(jail.DEVICE, device)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if outcome.status not in ok:
        said = " / ".join(lines[:6]) or (
            f"exit code {outcome.status}" if outcome.status >= 0 else f"killed by signal {-outcome.status}"
        )
        raise StorageError(f"Cannot {doing}: {argv[0]}: {said}")
    return lines


def ext_is_clean(device: str) -> bool:
    """Whether an ext file system was unmounted: marked valid, without errors, its journal empty."""
    superblock = _ext_superblock(device)
    state = struct.unpack_from("<H", superblock, 0x3A)[0]
    incompat = struct.unpack_from("<I", superblock, 0x60)[0]
    return bool(state & 1) and not state & 2 and not incompat & 0x4


def ext_bytes(device: str) -> int:
    """The size that an ext file system believes it has."""
    superblock = _ext_superblock(device)
    low, log_size = struct.unpack_from("<I", superblock, 0x4)[0], struct.unpack_from("<I", superblock, 0x18)[0]
    high = struct.unpack_from("<I", superblock, 0x150)[0] if struct.unpack_from("<I", superblock, 0x60)[0] & 0x80 else 0
    blocks, shift = int(low | (high << 32)), 10 + min(int(log_size), 6)
    return blocks << shift


def own_bytes(device: str, kind: str) -> int:
    """The size that a file system believes it has, of those that can grow."""
    if kind in EXT:
        return ext_bytes(device)
    with open(device, "rb", buffering=0) as file:
        # of xfs the size and number of blocks; of btrfs total_bytes of the superblock's device item
        size, at = (12, 4) if kind == "xfs" else (8, (64 << 10) + 0xD1)
        data = os.pread(file.fileno(), size, at)
        if len(data) < size:
            raise StorageError(f"Cannot read {device}: no {kind} file system there")
        if kind == "xfs":
            block, blocks = struct.unpack(">IQ", data)
            return int(block * blocks)
        return int(struct.unpack("<Q", data)[0])


def _ext_superblock(device: str) -> bytes:
    with open(device, "rb", buffering=0) as file:
        superblock = os.pread(file.fileno(), 1024, 1024)
    if len(superblock) < 1024 or superblock[0x38:0x3A] != b"\x53\xef":
        raise StorageError(f"Cannot read {device}: no ext file system there")
    return superblock


def mount(
    device: str, kind: str, *, read_only: bool, nodev: bool, options: Mapping[str, str | None] | None = None
) -> int:
    """Mount the device as a detached mount and give its descriptor. suid stays in force: sudo has to work inside."""
    if kind not in SUPPORTED:
        raise StorageError(f"Cannot mount {device}: {_unknown(kind)}")
    attributes = (syscalls.ATTR_RDONLY if read_only else 0) | (syscalls.ATTR_NODEV if nodev else 0)
    words: dict[str, str | None] = {}
    if kind in EXT:
        words["errors"] = "remount-ro"
    elif kind == "xfs":
        words["nouuid"] = None
    words.update(options or {})
    if read_only:
        words["ro"] = None
    name = "ext4" if kind in EXT else kind
    try:
        return syscalls.mount_detached(name, device, words, attributes)
    except OSError as error:
        replay = {"ext4": "noload", "xfs": "norecovery"}.get(name)
        if read_only and replay and error.errno in (errno.EROFS, errno.EINVAL, errno.EACCES):
            try:  # an unclean journal on a device that must not be written
                return syscalls.mount_detached(name, device, {**words, replay: None}, attributes)
            except OSError:
                pass
        raise StorageError(f"Cannot mount {device} as {kind}: {error.strerror}") from error


def _unknown(kind: str) -> str:
    if not kind:
        return "there is no file system on it"
    known = {
        "swap": "it is swap space",
        "crypto_LUKS": "it is encrypted (LUKS)",
        "LVM2_member": "it is an LVM physical volume",
        "linux_raid_member": "it is part of a RAID",
        "iso9660": "it is an ISO image",
    }
    return known.get(kind, f"{kind} is none of {', '.join(SUPPORTED)}")


def tell_apart(device: str, found: Found, log: Log, *, read_only: bool) -> None:
    """A clone of a btrfs that is mounted has its UUID, which kernels before 6.7 take for the same file system."""
    if found.kind != "btrfs" or not os.path.isdir(f"/sys/fs/btrfs/{found.uuid}"):
        return
    if os.path.exists("/sys/fs/btrfs/features/temp_fsid"):
        return
    if read_only:
        raise StorageError(f"Cannot mount {device}: a btrfs of the same UUID is mounted, and this one is read-only")
    run_on(device, ("btrfstune", "-f", "-m"), f"give {device} a UUID of its own")
    log("the btrfs file system is a clone of one that is mounted: it has a UUID of its own now")


def make(device: str, kind: str) -> None:
    """Put a new file system on a device (a volatile disk)."""
    argv = {
        "ext2": ["mkfs.ext2", "-q", "-F"],
        "ext3": ["mkfs.ext3", "-q", "-F"],
        "ext4": ["mkfs.ext4", "-q", "-F", "-m", "0"],
        "xfs": ["mkfs.xfs", "-q", "-f"],
        "btrfs": ["mkfs.btrfs", "-q", "-f"],
    }.get(kind)
    if argv is None:
        raise StorageError(f"Cannot format a disk as {kind}: it must be ext2, ext3, ext4, xfs or btrfs")
    # not in the jail: of what lies there nothing is read, and mkfs.xfs needs rights over the device
    command.run([*argv, device], timeout_s=FSCK_LIMIT_S, verb=f"format a disk as {kind}")


def grow_unmounted(device: str, kind: str, device_bytes: int, log: Log, *, limit_s: float = FSCK_LIMIT_S) -> None:
    """Let an ext file system fill its device before it is mounted; the others grow mounted (`grow_mounted`)."""
    if kind not in EXT or ext_bytes(device) + GROW_FROM > device_bytes:
        return
    before = ext_bytes(device)
    run_on(device, ("e2fsck", "-f", "-p"), f"check {device} before growing", limit_s=limit_s, ok=(0, 1, 2))
    run_on(device, ("resize2fs",), f"grow the file system on {device}", limit_s=limit_s)
    log(f"file system grown from {before >> 20} to {ext_bytes(device) >> 20} MiB")


def grow_mounted(device: str, kind: str, mount_point: str, *, limit_s: float = FSCK_LIMIT_S) -> None:
    """Let a mounted file system fill its device, which has grown before."""
    argv = {
        "xfs": ["xfs_growfs", "-d", mount_point],
        "btrfs": ["btrfs", "filesystem", "resize", "max", mount_point],
    }.get(kind, ["resize2fs", device])
    if kind not in GROWING:
        raise StorageError(f"Cannot grow a {kind} file system")
    try:
        command.run(argv, timeout_s=limit_s, verb=f"grow the {kind} file system at {mount_point}")
    except CommandError as error:
        if error.status is None and kind in _TOOLS:
            raise StorageError(f"{error} (package {_TOOLS[kind]})") from error
        raise StorageError(str(error)) from error
