"""How is an image copied? By reflink where the file system can, else its data only, holes staying holes.

Works on open descriptors. Durability is the caller's.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator

_FICLONE = 0x40049409
_PIECE = 32 << 20
_NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOTTY, errno.EBADF, errno.ETXTBSY)


def copy(source: int, target: int, abort: Callable[[], None]) -> bool:
    """Make the empty file `target` equal to `source`; True if by reflink. `abort` ends it by raising."""
    if clone(source, target):
        return True
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    for begin, end in extents(source, size):
        position = begin
        while position < end:
            abort()
            position += _piece(source, target, position, min(_PIECE, end - position))
    return False


def clone(source: int, target: int) -> bool:
    """Make `target` share the blocks of `source`; False, with nothing done, where their file system cannot."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return False
    return True


def _piece(source: int, target: int, position: int, count: int) -> int:
    """Copy up to `count` bytes, in the kernel where it can."""
    try:
        done = os.copy_file_range(source, target, count, position, position)
        if done:
            return done
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    data = os.pread(source, min(count, 1 << 20), position)
    if not data:
        raise OSError(errno.EIO, "the image became shorter while it was copied")
    written = 0
    while written < len(data):
        written += os.pwrite(target, data[written:], position + written)
    return written


def extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """The parts of a file that hold data, as (begin, end). One by one: a tenant punches as many holes as he likes."""
    position = 0
    while position < size:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole to the end
                break
            raise
        position = min(os.lseek(fd, begin, os.SEEK_HOLE), size)
        yield begin, position
