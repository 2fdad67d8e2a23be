"""Which part of a partitioned image is meant? The root file system for the first disk, the largest one for others.

Looks into candidates by mounting them read-only, detached. The choice is told to the log, since an image's author may
have meant another. What is chosen may become larger with its disk; the file system in it is not looked at for that.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from onelxc.errors import StorageError
from onelxc.root import filesystems, loops, parttable, syscalls
from onelxc.root.parttable import Entry

Log = Callable[[str], None]

_ROOT_TYPES = frozenset(
    (
        "4F68BCE3-E8CD-4DB1-96E7-FBCAF984B709",  # x86-64
        "B921B045-1DF0-41C3-AF44-4C6F280D3FAE",  # arm64
        "44479540-F297-41B2-9AF7-D131D5F0458A",  # x86
        "69DAD710-2CE4-4E3C-B16C-21A1D49ABED3",  # arm
        "72EC70A6-CF74-40E6-BD49-4BDA08E8F224",  # riscv64
        "C31C45E6-3F39-412E-80FB-4809C4980599",  # ppc64le
        "5EEAD9A9-FE09-4A1E-A1D7-520D00531306",  # s390x
    )
)
"""GPT types of root partitions: the Discoverable Partitions Specification."""
_FSTAB_LIMIT = 64 << 10


@dataclass(frozen=True)
class Partition:
    """One partition and what is in it."""

    entry: Entry
    found: filesystems.Found


def choose(fd: int, name: str, log: Log, *, root: bool) -> Entry:
    """The partition to mount of the partitioned device or file `fd`."""
    candidates = [one for one in _list(fd, name) if one.found.kind in filesystems.SUPPORTED]
    if not candidates:
        raise StorageError(f"Cannot mount {name}: none of its partitions has a file system for Linux")
    chosen, why = _pick(candidates, fd, name, root)
    what = f"{chosen.found.kind}, {chosen.entry.size >> 20} MiB"
    log(f"{os.path.basename(name)}: partition {chosen.entry.number} ({what}) is taken: {why}")
    return chosen.entry


def grown(fd: int, chosen: Entry, name: str, log: Log) -> Entry:
    """The partition, as large as its disk allows by now. Where it cannot grow, that is a line in the log."""
    name = os.path.basename(name)
    try:
        larger = parttable.enlarge(fd, chosen)
    except StorageError as error:
        log(f"{name}: partition {chosen.number} stays as it is though the disk is larger: {error}")
        return chosen
    if larger is None:
        return chosen
    log(f"{name}: partition {chosen.number} grown from {chosen.size >> 20} to {larger.size >> 20} MiB")
    return larger


def _pick(candidates: list[Partition], fd: int, name: str, root: bool) -> tuple[Partition, str]:
    if len(candidates) == 1:
        return candidates[0], "the only one with a file system"
    largest = max(candidates, key=lambda one: one.entry.size)
    if not root:
        return largest, "the largest"
    with_fstab = []
    for candidate in sorted(candidates, key=lambda one: -one.entry.size):
        fstab = _fstab(candidate, fd, name)
        if fstab is None:
            continue
        with_fstab.append(candidate)
        for one in candidates:
            if _is_named(one, fstab):
                return one, f"the root of the fstab in partition {candidate.entry.number}"
    if with_fstab:
        return with_fstab[0], "it holds an fstab"
    typed = [one for one in candidates if one.entry.type in _ROOT_TYPES]
    if typed:
        return typed[0], "by its GPT type"
    return largest, "the largest"


def _list(fd: int, name: str) -> list[Partition]:
    try:
        entries = parttable.read(fd)
    except StorageError as error:
        raise StorageError(f"Cannot read the partition table of {name}: {error}") from error
    limit = os.lseek(fd, 0, os.SEEK_END)
    inside = [entry for entry in entries if entry.size > 0 and entry.end <= limit]
    places = [(entry.offset, entry.size) for entry in inside]
    return [Partition(*pair) for pair in zip(inside, filesystems.probe_parts(fd, places, name))]


def _fstab(partition: Partition, fd: int, name: str) -> dict[str, str] | None:
    """Mount point → source of the partition's /etc/fstab, None if it has none. Read-only, nothing is replayed."""
    with loops.attach(fd, read_only=True, offset=partition.entry.offset, size=partition.entry.size, name=name) as loop:
        try:
            root = filesystems.mount(loop.path, partition.found.kind, read_only=True, nodev=True)
        except StorageError:
            return None
    try:
        file = syscalls.openat2(root, "etc/fstab", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return None
    finally:
        os.close(root)
    try:
        text = os.read(file, _FSTAB_LIMIT).decode(errors="replace")
    except OSError:
        return None
    finally:
        os.close(file)
    rows = [line.split() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    return {row[1]: row[0].replace('"', "") for row in rows if len(row) >= 2}


def _is_named(partition: Partition, fstab: dict[str, str]) -> bool:
    key, _, value = fstab.get("/", "").partition("=")
    known = {"UUID": partition.found.uuid, "LABEL": partition.found.label, "PARTUUID": partition.entry.uuid}
    return bool(value) and known.get(key.upper(), "").lower() == value.lower()
