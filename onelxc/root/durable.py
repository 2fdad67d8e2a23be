"""Writes files whole: after a crash or a full disk there is the old content or the new one, never a part.

`os.write` may take less than it was given, on a disk that is just full for one; whoever writes to a file goes through
`write_all`.
"""

from __future__ import annotations

import os


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`. OSError if not all of it could be written."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def replace(path: str, data: bytes, *, mode: int = 0o600, modified: float | None = None, flush: bool = True) -> None:
    """Put a file with this content in the place of `path`; OSError, with nothing left beside it, if that fails.

    With `flush` it outlives a power cut as well. `modified` is the time of modification that it gets.
    """
    temporary = path + ".tmp"
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            write_all(fd, data)
            os.fchmod(fd, mode)
            if modified is not None:
                os.utime(fd, (modified, modified))
            if flush:
                os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(temporary, path)
    except BaseException:
        remove(temporary)
        raise
    if flush:
        sync_directory(os.path.dirname(path))


def sync_directory(path: str) -> None:
    """Make renames in a directory survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Remove a file that nobody needs any more; one that cannot be removed stays."""
    try:
        os.unlink(path)
    except OSError:
        pass
