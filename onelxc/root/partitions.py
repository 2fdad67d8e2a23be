"""Which part of a partitioned image is meant? The root file system for the first disk, the largest one for others.

Reads partition tables with sfdisk and looks into candidates by mounting them read-only, detached. The choice is told to
the log, since an image's author may have meant another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from onelxc import command
from onelxc.errors import CommandError, StorageError
from onelxc.root import filesystems, loops, syscalls

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
    """One partition: bytes, and what is in it."""

    number: int
    offset: int
    size: int
    type: str
    found: filesystems.Found
    uuid: str = ""


def choose(device: str, fd: int, name: str, log: Log, *, root: bool) -> Partition:
    """The partition to mount of the partitioned device or file `device`, open as `fd`."""
    candidates = [one for one in _list(device, fd, name) if one.found.kind in filesystems.SUPPORTED]
    if not candidates:
        raise StorageError(f"Cannot mount {name}: none of its partitions has a file system for Linux")
    chosen, why = _pick(candidates, fd, name, root)
    what = f"{chosen.found.kind}, {chosen.size >> 20} MiB"
    log(f"{os.path.basename(name)}: partition {chosen.number} ({what}) is taken: {why}")
    return chosen


def _pick(candidates: list[Partition], fd: int, name: str, root: bool) -> tuple[Partition, str]:
    if len(candidates) == 1:
        return candidates[0], "the only one with a file system"
    largest = max(candidates, key=lambda one: one.size)
    if not root:
        return largest, "the largest"
    with_fstab = []
    for candidate in sorted(candidates, key=lambda one: -one.size):
        fstab = _fstab(candidate, fd, name)
        if fstab is None:
            continue
        with_fstab.append(candidate)
        for one in candidates:
            if _is_named(one, fstab):
                return one, f"the root of the fstab in partition {candidate.number}"
    if with_fstab:
        return with_fstab[0], "it holds an fstab"
    typed = [one for one in candidates if one.type in _ROOT_TYPES]
    if typed:
        return typed[0], "by its GPT type"
    return largest, "the largest"


def _list(device: str, fd: int, name: str) -> Iterable[Partition]:
    try:
        out = command.run(["sfdisk", "--json", device], pass_fds=(fd,), verb="read it")
        table = json.loads(out)["partitiontable"]
        unit = int(table.get("sectorsize", 512))
        entries = [
            (
                number,
                int(one["start"]) * unit,
                int(one["size"]) * unit,
                str(one.get("type", "")),
                str(one.get("uuid", "")),
            )
            for number, one in enumerate(table.get("partitions", []), 1)
        ]
    except (CommandError, ValueError, KeyError) as error:
        raise StorageError(f"Cannot read the partition table of {name}: {error}") from error
    limit = _bytes(device)
    for number, offset, size, kind, uuid in entries:
        if size > 0 and offset + size <= limit:
            found = filesystems.probe(device, offset=offset, size=size, pass_fds=(fd,))
            yield Partition(number, offset, size, str(kind).upper(), found, str(uuid))


def _bytes(device: str) -> int:
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)


def _fstab(partition: Partition, fd: int, name: str) -> dict[str, str] | None:
    """Mount point → source of the partition's /etc/fstab, None if it has none. Read-only, nothing is replayed."""
    with loops.attach(fd, read_only=True, offset=partition.offset, size=partition.size, name=name) as loop:
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
    known = {"UUID": partition.found.uuid, "LABEL": partition.found.label, "PARTUUID": partition.uuid}
    return bool(value) and known.get(key.upper(), "").lower() == value.lower()
