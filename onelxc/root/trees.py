"""How does one go through directories that a tenant made as deep as he likes? By single names down, by `..` up.

With one descriptor, since a path has an end (PATH_MAX), descriptors are counted, and so are Python's calls. Nothing is
followed. For trees in which nobody moves directories meanwhile: groups, which cannot be moved, and mounts that nobody
else sees.
"""

from __future__ import annotations

import errno
import os

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def go(here: int, name: str) -> int:
    """From one directory to another, a name in it or `..`; the descriptor of the first is closed."""
    there = os.open(name, DIRECTORY, dir_fd=here)
    os.close(here)
    return there


def remove(parent: int, name: str) -> None:
    """Remove a name and all below it."""
    if _unlink(parent, name):
        return
    here = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        waiting, way = [os.listdir(here)], list[str]()
        while waiting[-1] or way:
            if not waiting[-1]:
                waiting.pop()
                here = go(here, "..")
                os.rmdir(way.pop(), dir_fd=here)
            elif not _unlink(here, below := waiting[-1].pop()):
                here = go(here, below)
                way.append(below)
                waiting.append(os.listdir(here))
    finally:
        os.close(here)
    os.rmdir(name, dir_fd=parent)


def _unlink(directory: int, name: str) -> bool:
    """False for a directory."""
    try:
        os.unlink(name, dir_fd=directory)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.EPERM):
            raise
        return False
    return True
