"""How do the files of a snapshot come to be, and go? Below `snapshots`, which says when.

A snapshot is a flat directory `snap-N` with one `disk.N` for each disk, in a directory that oneadmin can write: nothing
here follows a link, and what is read is looked at before.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from dataclasses import dataclass

from onelxc.errors import StorageError
from onelxc.root import copies, validate

_DISK = re.compile(r"disk\.(0|[1-9][0-9]{0,5})")
_RESERVE = 64 << 20
"""What a snapshot leaves free in the datastore at least."""
NOFOLLOW = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


@dataclass
class Home:
    """The VM's directory, held open."""

    path: str
    fd: int
    uid: int
    gid: int


def images_in(directory: int, what: str, root_disk: int) -> dict[int, int]:
    """Descriptors of the snapshot's images by DISK_ID. Files that are not as we make them are refused."""
    owners = {0, os.fstat(directory).st_uid}
    images = {}
    for entry in os.listdir(directory):
        match = _DISK.fullmatch(entry)
        if match is None:
            continue
        fd = os.open(entry, os.O_RDONLY | NOFOLLOW, dir_fd=directory)
        status = os.fstat(fd)
        images[int(match.group(1))] = fd
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid not in owners:
            raise StorageError(f"Cannot use {what}: {entry} is not as it was made")
    if root_disk not in images:
        raise StorageError(f"Cannot use {what}: the root disk is not in it")
    return images


def close(images: dict[int, int]) -> None:
    for fd in images.values():
        os.close(fd)


def copy_out(image: validate.Found, directory: int, name: str) -> None:
    """A copy of a disk into the snapshot's directory, owned like the disk."""
    source = image.open(os.O_RDONLY)
    try:
        target = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW, 0o600, dir_fd=directory)
        try:
            fill(source, target, image)
        finally:
            os.close(target)
    except OSError as error:
        raise StorageError(f"Cannot copy {image.path}: {error.strerror}") from error
    finally:
        os.close(source)


def fill(source: int, target: int, like: validate.Found) -> None:
    copies.copy(source, target, carry_on)
    status = like.status
    if stat.S_ISREG(status.st_mode):
        os.fchown(target, status.st_uid, status.st_gid)
        os.fchmod(target, stat.S_IMODE(status.st_mode) & 0o777)


def write_over(source: int, found: validate.Found) -> None:
    """A volume has no name to rename over: its bytes are written, zeros too."""
    device = found.open(os.O_WRONLY)
    try:
        position = 0
        while True:
            data = os.pread(source, 4 << 20, position)
            if not data:
                break
            position += os.pwrite(device, data, position)
        os.fsync(device)
    except OSError as error:
        raise StorageError(f"Cannot write to {found.path}: {error.strerror}") from error
    finally:
        os.close(device)


def look_for_space(home: Home, images: list[validate.Found], doing: str) -> None:
    descriptors = [image.open(os.O_RDONLY) for image in images]
    try:
        if not clones(descriptors[0], home.fd):
            need_space(home, sum(map(allocated, descriptors)), doing)
    finally:
        for fd in descriptors:
            os.close(fd)


def allocated(fd: int) -> int:
    """Bytes that a copy will take: a volume may be full."""
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode):
        return status.st_blocks * 512
    return os.lseek(fd, 0, os.SEEK_END)


def clones(source: int, directory: int) -> bool:
    """Whether a reflink of this file can be made in that directory. Tried with a file that has no name."""
    try:
        target = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600, dir_fd=directory)
    except OSError:
        return False
    try:
        return copies.clone(source, target)
    finally:
        os.close(target)


def need_space(home: Home, needed: int, doing: str) -> None:
    space = os.fstatvfs(home.fd)
    free = space.f_bavail * space.f_frsize
    if needed + _RESERVE > free:
        raise StorageError(
            f"Cannot {doing}: {needed >> 20} MiB needed in {home.path}, {max(0, free - _RESERVE) >> 20} MiB free"
        )


def sync(name: str, directory: int) -> None:
    fd = os.open(name, os.O_RDONLY | NOFOLLOW, dir_fd=directory)
    try:
        os.fsync(fd)
    except OSError as error:
        raise StorageError(f"Cannot write {name} of the snapshot: {error.strerror}") from error
    finally:
        os.close(fd)


def remove(home: int, name: str) -> None:
    """Remove a flat directory and what is in it, without following anything. What is not there is removed."""
    try:
        directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | NOFOLLOW, dir_fd=home)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (errno.ENOTDIR, errno.ELOOP):
            raise
        os.unlink(name, dir_fd=home)
        return
    try:
        for entry in os.listdir(directory):
            os.unlink(entry, dir_fd=directory)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=home)


def carry_on() -> None:
    """The session breaks off its worker from outside."""
