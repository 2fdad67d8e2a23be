"""How does a file system get to its place in the host's tree, seen with one VM's ids, and away again?

A disk goes through three steps, each undone by closing a descriptor until the last: `open_image` gives a detached
mount (nothing in the tree, the loop device held by it), `rootfs` may look into it, `place` puts it at its target. From
then on the mount is what holds everything, and `unmount` lets go of all of it.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass

from onelxc.errors import StorageError
from onelxc.root import contents, filesystems, idmap, loops, nbd, partitions, shift, syscalls
from onelxc.root.parttable import Entry

Log = Callable[[str], None]
_MIB = 1 << 20


@dataclass
class Detached:
    """A mounted file system that is nowhere in the tree. Closing it before `place` leaves nothing."""

    fd: int
    kind: str
    device: str
    """The block device below."""
    stored_first: int = 0
    """The id that root has on disk: other than 0 in images that another driver shifted."""
    log: Log = lambda _: None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Detached:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_image(
    fd: int,
    name: str,
    log: Log,
    *,
    read_only: bool = False,
    root: bool = False,
    size_mb: int | None = None,
    enlarge: Callable[[str, int], None] | None = None,
    fsck_limit_s: float = filesystems.FSCK_LIMIT_S,
) -> Detached:
    """Mount the image behind `fd` (a regular file, or a block device), checked and grown first.

    `fd` is opened for writing unless `read_only`; `name` is what messages and losetup call it. `size_mb` is DISK/SIZE:
    a smaller image is enlarged to it, by `enlarge` (device, bytes) if nbd shows it. `root` is the disk with the root
    file system, which may hold device nodes.
    """
    status = os.fstat(fd)
    path = f"/proc/self/fd/{fd}"
    if stat.S_ISBLK(status.st_mode):
        path = os.path.realpath(path)
    elif not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "not a file"
        raise StorageError(f"Cannot use {name}: it is {kind}")
    if size_mb and not read_only and size_mb * _MIB - os.lseek(fd, 0, os.SEEK_END) >= _MIB:
        # looked at before: what is no image is not ours to change
        found = filesystems.probe_parts(fd, [(0, 0)], name)[0]
        _refuse_unknown(path, found, name)
        _refuse_truncated(path, found, os.lseek(fd, 0, os.SEEK_END), name)
        if stat.S_ISREG(status.st_mode):
            os.ftruncate(fd, size_mb * _MIB)
        elif nbd.name_of(path) and enlarge is not None:
            enlarge(path, size_mb * _MIB)
    part = _partition(fd, name, log, root=root, read_only=read_only)
    # a device that could be written to is: mounting an unclean file system, read-only, plays its journal back
    if part is None and stat.S_ISBLK(status.st_mode) and not read_only:
        return _open_device(path, name, log, read_only=read_only, root=root, fsck_limit_s=fsck_limit_s)
    offset, size = (part.offset, part.size) if part else (0, 0)
    with loops.attach(fd, read_only=read_only, name=name, offset=offset, size=size) as loop:
        if _on_a_disk(status.st_dev):
            loop.prefer_direct_io()
        return _open_device(loop.path, name, log, read_only=read_only, root=root, fsck_limit_s=fsck_limit_s)


def _on_a_disk(device: int) -> bool:
    """Whether a file there may be read and written directly: what a FUSE export (qcow2) makes of it loses writes, and
    checksums of btrfs do not bear pages that change meanwhile.
    """
    number = f"{os.major(device)}:{os.minor(device)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mountinfo:
        for line in mountinfo:
            before, _, after = line.partition(" - ")
            if before.split(" ", 3)[2] == number:
                return after.split(" ", 1)[0] in ("ext4", "ext3", "xfs")
    return False


def _partition(fd: int, name: str, log: Log, *, root: bool, read_only: bool) -> Entry | None:
    """The partition to mount, enlarged with its disk; None where the whole image is one file system."""
    found = filesystems.probe_parts(fd, [(0, 0)], name)[0]
    if found.kind or not found.partitions:
        return None
    chosen = partitions.choose(fd, name, log, root=root)
    return chosen if read_only else partitions.grown(fd, chosen, name, log)


def _open_device(device: str, name: str, log: Log, *, read_only: bool, root: bool, fsck_limit_s: float) -> Detached:
    found = filesystems.probe(device, name)
    _refuse_unknown(device, found, name)
    _refuse_truncated(device, found, device_bytes(device), name)
    if not read_only:
        filesystems.check(device, found.kind, log, limit_s=fsck_limit_s)
        filesystems.grow_unmounted(device, found.kind, device_bytes(device), log, limit_s=fsck_limit_s)
    filesystems.tell_apart(device, found, log, read_only=read_only)
    fd = filesystems.mount(device, found.kind, read_only=read_only, nodev=not root)
    detached = Detached(fd, found.kind, device, log=log)
    try:
        detached.stored_first = shift.stored_first(fd, log) if root else 0
    except BaseException:
        detached.close()
        raise
    return detached


def _refuse_unknown(path: str, found: filesystems.Found, name: str) -> None:
    if found.kind not in filesystems.SUPPORTED and not (found.partitions and not found.kind):
        what = f"it holds {found.kind}" if found.kind else _other_disk(path) or "there is no file system in it"
        raise StorageError(f"Cannot mount {name}: {what}")


def _other_disk(path: str) -> str:
    """What libblkid has no word for: another hypervisor's disk."""
    with open(path, "rb") as file:
        content = contents.look(file.read(contents.HEAD))
    return f"it is {content.name}: {contents.USABLE}" if content and content.use == contents.DISK else ""


def _refuse_truncated(path: str, found: filesystems.Found, there: int, name: str) -> None:
    """An image that lost its end: the kernel says "Invalid argument", and zeros in its place would be damage unseen."""
    if found.kind not in filesystems.GROWING:
        return
    own = filesystems.own_bytes(path, found.kind)
    if own > there:
        raise StorageError(
            f"Cannot mount {name}: it is truncated: its {found.kind} has {own} bytes, of which {there} are there"
        )


def device_bytes(device: str) -> int:
    """The size of a block device."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def place(detached: Detached, target: str, *, id_base: int | None) -> None:
    """Attach at `target` (made if missing, root's own), its ids shifted to `id_base`…; None: privileged."""
    if id_base is not None:
        idmap.apply(detached.fd, detached.kind, detached.stored_first, id_base)
    elif detached.stored_first:
        idmap.apply(detached.fd, detached.kind, detached.stored_first, 0)
    os.makedirs(target, mode=0o700, exist_ok=True)
    try:
        syscalls.move_mount(detached.fd, target)
    except OSError as error:
        raise StorageError(f"Cannot mount {detached.kind} at {target}: {error.strerror}") from error
    _fill_device(detached, target)
    detached.close()


def _fill_device(detached: Detached, target: str) -> None:
    """xfs and btrfs grow only where they are mounted; not worth failing a start for."""
    if detached.kind not in ("xfs", "btrfs") or os.statvfs(target).f_flag & os.ST_RDONLY:
        return
    before, room = filesystems.own_bytes(detached.device, detached.kind), device_bytes(detached.device)
    if before + filesystems.GROW_FROM > room:
        return
    try:
        filesystems.grow_mounted(detached.device, detached.kind, target)
        detached.log(f"file system grown from {before >> 20} to {room >> 20} MiB")
    except StorageError as error:
        detached.log(str(error))


def unmount(target: str, *, limit_s: float = 10.0, leave: int = 0) -> None:
    """Unmount everything at `target`, top first, but the lowest `leave`; what is not there is success. Never lazily.

    Whoever holds it for a moment (a scanner, a probe) gets `limit_s` to let go.
    """
    deadline = time.monotonic() + limit_s
    while mounted_below(target).count(target) > leave:
        try:
            syscalls.umount(target)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise StorageError(f"Cannot unmount {target}: {error.strerror}") from error
            time.sleep(0.05)


def is_mounted(target: str) -> bool:
    """Whether the kernel's mount table has a mount at exactly this path."""
    return target in mounted_below(target)


def mounted_below(path: str) -> tuple[str, ...]:
    """Mount points at and below `path`, in the order in which they were mounted."""
    prefix = path.rstrip("/") + "/"
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        for line in table:
            point = _unescape(line.split(" ", 5)[4])
            if point == path or point.startswith(prefix):
                found.append(point)
    return tuple(found)


def _unescape(text: str) -> str:
    r"""mountinfo writes blanks, tabs, newlines and backslashes as \ooo."""
    if "\\" not in text:
        return text
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text
