"""How a file inside a container is read from outside: what it really is, never waiting, never much of it.

Resolved as if the container's root were the host's, on that one file system; opened only if it is a regular file, since
opening a device or a FIFO does something; without waiting for whoever holds a lease on it. Whatever may still wait (a
lock of the file system's) is the caller's to do apart (`apart`).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable

from onelxc.root import syscalls


def first(root: str, names: Iterable[str], most: int) -> str:
    """The first `most` bytes of the first of these files that can be read now, "" if none can."""
    try:
        top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        for name in names:
            try:
                return _read(top, name, most).decode(errors="replace")
            except OSError:
                continue
        return ""
    finally:
        os.close(top)


def _read(top: int, name: str, most: int) -> bytes:
    path = syscalls.openat2(top, name, os.O_PATH, resolve=syscalls.RESOLVE_IN_ROOT | syscalls.RESOLVE_NO_XDEV)
    try:
        if not stat.S_ISREG(os.fstat(path).st_mode):
            raise FileNotFoundError(name)
        # not openat2 again: where a lease is held it would take EWOULDBLOCK for a reason to try once more
        fd = os.open(f"/proc/self/fd/{path}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    finally:
        os.close(path)
    with open(fd, "rb", buffering=0) as file:
        return file.read(most) or b""
