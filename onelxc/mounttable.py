"""Whether a container holds anything of the host: its mount table is compared with the host's own.

/proc/PID/mountinfo is open to everybody. A mount of a container that has a device number (MAJOR:MINOR) of the host's
own table is the host's, unless it is a disk of the VM or an interface of the kernel's of which there is one for all.
What the container's root mounts itself (tmpfs, proc, sysfs, overlay, FUSE) has numbers of its own, and its binds have
those of its disks. For the probes, so it imports as good as nothing; the verdict is root's (`root/standing.py`).
"""

from __future__ import annotations

import binascii
import os

from onelxc import names

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Set

PROBE_BYTES = 256 << 10
"""How much of one container's table a probe reads: what libvirt has mounted comes first."""

SHARED_KINDS = frozenset(("cgroup", "cgroup2", "nsfs"))
"""libvirt binds the host's control groups; the file of a namespace, as `ip netns` keeps it, is on the one nsfs."""

Row = tuple[str, str, str, str]
"""Device, path within it, mount point, kind; the paths as the kernel writes them, with \\ooo for blanks."""


def read(path: str, limit: int) -> tuple[str, bool]:
    """A mount table, and whether it is longer than `limit` bytes; the last line may be cut off then."""
    parts: list[bytes] = []
    left = limit
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return "", False
    try:
        while left > 0:
            part = os.read(fd, min(left, 1 << 20))
            if not part:
                break
            parts.append(part)
            left -= len(part)
    except OSError:
        pass  # its process has ended
    finally:
        os.close(fd)
    return b"".join(parts).decode(errors="replace"), left <= 0


def rows(table: str) -> list[Row]:
    """The table's lines; proc(5). Names may hold every character but blank, tab and newline."""
    return [row for row in map(_row, table.split("\n")) if row]


def _row(text: str) -> Row | None:
    before, dash, after = text.partition(" - ")
    fields = before.split(" ", 5)
    return (fields[2], fields[3], fields[4], after.partition(" ")[0]) if dash and len(fields) == 6 else None


def unescape(path: str) -> str:
    r"""The kernel writes blanks, tabs, newlines and backslashes as \ooo."""
    for code, character in (("040", " "), ("011", "\t"), ("012", "\n"), ("134", "\\")):
        path = path.replace(f"\\{code}", character)
    return path


def host_devices(table: str) -> dict[str, set[int]]:
    """The devices of the host's own table; each with the VMs as whose disk it is mounted, none for the host's own."""
    found: dict[str, set[int]] = {}
    for device, _, point, _ in rows(table):
        vms = found.setdefault(device, set())
        if point.startswith(names.MOUNTS + "/"):
            number = point[len(names.MOUNTS) + 1 :].partition("/")[0]
            if number.isdigit():
                vms.add(int(number))
    return found


def foreign(table: str, vm_id: int, host: Mapping[str, Set[int]]) -> list[Row]:
    """What of a container's table is the host's, or another VM's."""
    found = []
    for text in table.split("\n"):
        fields = text.split(" ", 3)
        vms = host.get(fields[2]) if len(fields) == 4 else None
        # most lines end here
        if vms is None or vm_id in vms:
            continue
        row = _row(text)
        if row and not _is_shared(row):
            found.append(row)
    return found


def _is_shared(row: Row) -> bool:
    _, path, _, kind = row
    # the sysctls of whatever network namespace reads them: libvirt binds them from the host's /proc
    return kind in SHARED_KINDS or (kind == "proc" and path in ("/sys/net/ipv4", "/sys/net/ipv6"))


def suspicion(vm_id: int, init: int, host: Mapping[str, Set[int]]) -> str:
    """A text that changes when what a container holds of the host does; empty for one that holds nothing."""
    table, cut = read(f"/proc/{init}/mountinfo", PROBE_BYTES)
    held = foreign(table, vm_id, host)
    if not held and not cut:
        return ""
    return f"{binascii.crc32(repr(sorted(held)).encode(errors='replace')):08x}{'+' if cut else ''}"
