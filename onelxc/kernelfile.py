"""How is one of the kernel's small files read? In one go, and "not there (any more)" is an answer, not an error.

Processes and cgroups end between a listing and a look; whoever counts has to live with that.
"""

from __future__ import annotations

import os

from onelxc.names import is_number


def text(path: str) -> str:
    """The file's text, stripped; "" if it is not there, or its owner has gone meanwhile."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        parts = []
        while True:
            part = os.read(fd, 65536)
            if not part:
                break
            parts.append(part)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return b"".join(parts).decode(errors="replace").strip()


def number(path: str) -> int | None:
    """The file's one whole number; None if there is none ("max" included)."""
    word = text(path)
    return int(word) if is_number(word) else None


def table(path: str) -> dict[str, int]:
    """Lines of `name number` or `name: number unit`: memory.stat, cpu.stat, /proc/meminfo."""
    found = {}
    for line in text(path).splitlines():
        words = line.split()
        if len(words) > 1 and is_number(words[1]):
            found[words[0].rstrip(":")] = int(words[1])
    return found
