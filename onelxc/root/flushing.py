"""Is everything that a VM has written in its images? File systems flushed, or held so that they can be copied.

For a copy a flush is not enough: the kernel goes on moving what a journal holds to its place, and a copy of both made
meanwhile may have the old of each. A frozen file system (FIFREEZE) has an empty journal and writes nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from onelxc.errors import StorageError
from onelxc.model import VmPaths
from onelxc.root import mounts, nbd, syscalls

_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878


def flush(point: str) -> None:
    """Write a file system out to its image. A mount somewhere else may outlive ours and do it too late.

    A file among the mount points is the raw view of an image in a format of its own (`qcow2`), below a file system.
    """
    try:
        fd = os.open(point, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if os.path.isdir(point):
            syscalls.syncfs(fd)
        else:
            os.fsync(fd)
    except OSError as error:
        raise StorageError(f"Cannot write out {point}: {error.strerror}") from error
    finally:
        os.close(fd)


def flush_all(paths: VmPaths) -> None:
    """Write all the VM's file systems out to their images, and these out to the disk."""
    for point in reversed(mounts.mounted_below(paths.mounts)):
        flush(point)
    _flush_devices(paths)


def freeze(paths: VmPaths) -> None:
    """Nothing is written any more to the VM's disks, and all that was is in its place. Tasks stand still already."""
    for point in reversed(mounts.mounted_below(paths.mounts)):
        if not os.path.isdir(point):
            flush(point)
            continue
        with _opened(point) as fd:
            try:
                fcntl.ioctl(fd, _FIFREEZE)
            except OSError as error:
                # busy: frozen already; the others: a file system that nobody can write, as the context
                if error.errno not in (errno.EBUSY, errno.EOPNOTSUPP, errno.EROFS, errno.EINVAL):
                    raise StorageError(f"Cannot hold the file system at {point} still: {error.strerror}") from error
    _flush_devices(paths)


def _flush_devices(paths: VmPaths) -> None:
    """A daemon keeps back what an image's format needs to be understood, until it is asked to flush."""
    for device in nbd.devices_below(paths.mounts):
        flush(device)


def thaw(paths: VmPaths) -> None:
    """Let the VM's disks be written again; those that are, are. Before any task is killed: one that waits to write
    does not die."""
    for point in filter(os.path.isdir, mounts.mounted_below(paths.mounts)):
        with _opened(point) as fd:
            try:
                # as often as it was frozen
                while True:
                    fcntl.ioctl(fd, _FITHAW)
            except OSError:
                continue


@contextlib.contextmanager
def _opened(point: str) -> Iterator[int]:
    fd = os.open(point, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
