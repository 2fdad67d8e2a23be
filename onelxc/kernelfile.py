"""How is one of the kernel's small files read? In one go, and "not there (any more)" is an answer, not an error.

Processes and cgroups end between a listing and a look; whoever counts has to live with that.
"""

from __future__ import annotations

import os

from onelxc.names import is_number

MOST = 16 << 20


def text(path: str, most: int = MOST) -> str:
    """The file's text, stripped; "" if it is not there, or its owner has gone meanwhile. Of one that is longer than
    `most` bytes the beginning: a tenant may have made a million of what it lists.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        parts = []
        while most > 0:
            part = os.read(fd, min(most, 65536))
            if not part:
                break
            parts.append(part)
            most -= len(part)
    except OSError:
        return ""
    finally:
        os.close(fd)
    return b"".join(parts).decode(errors="replace").strip()


def number(path: str) -> int | None:
    """The file's one whole number; None if there is none ("max" included)."""
    word = text(path)
    return int(word) if is_number(word) else None


def status(pid: int, field: str, root: str = "") -> str:
    """A field of /proc/PID/status, "" where the process has gone. A process may choose a name that reads like another
    line of text, but not like one of bytes: only the newline is escaped there.
    """
    try:
        with open(f"{root}/proc/{pid}/status", "rb") as file:
            fields = dict(line.split(b":", 1) for line in file.read(65536).split(b"\n") if b":" in line)
    except OSError:
        return ""
    return fields.get(field.encode(), b"").decode(errors="replace").strip()


def is_the_hosts(pid: int, root: str = "") -> bool:
    """Whether a process is the host's and none of a container's, which may call itself whatever it likes. To be asked
    before its command line is read: that is in its memory, and a tenant decides how long reading it takes.
    """
    return len(status(pid, "NSpid", root).split()) == 1


def table(path: str) -> dict[str, int]:
    """Lines of `name number` or `name: number unit`: memory.stat, cpu.stat, /proc/meminfo."""
    found = {}
    for line in text(path).splitlines():
        words = line.split()
        if len(words) > 1 and is_number(words[1]):
            found[words[0].rstrip(":")] = int(words[1])
    return found
