"""Makes a file that takes another's place when it is whole, and leaves nothing when whoever makes it is killed.

It has no name until then, and for a moment one that the journal knows. Works in the directory of a descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import os


def temporary_name(path: str) -> str:
    """The name that a finished image has for a moment, beside `path`; the journal has to know it before."""
    return os.path.join(os.path.dirname(path), f".onelxc-{os.path.basename(path)}.{os.getpid()}")


def make(dir_fd: int, name: str) -> int:
    """A descriptor of a new file beside `name`; where the file system has none without a name (NFS), with that one."""
    try:
        return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dir_fd)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
            raise
    remove(dir_fd, name)
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC
    return os.open(temporary_name(name), flags, 0o600, dir_fd=dir_fd)


def remove(dir_fd: int, name: str) -> None:
    """Remove what has the moment's name."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary_name(name), dir_fd=dir_fd)


def replace(dir_fd: int, name: str, fd: int) -> None:
    """Put the file, which is on the disk already, in the place of `name`, durably."""
    if not os.fstat(fd).st_nlink:
        remove(dir_fd, name)
        os.link(f"/proc/self/fd/{fd}", temporary_name(name), dst_dir_fd=dir_fd, follow_symlinks=True)
    os.rename(temporary_name(name), name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    os.fsync(dir_fd)
