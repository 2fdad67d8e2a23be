"""What does a disk's partition table say (dos or GPT), and how does its last partition come to reach the disk's end?

A table is a tenant's. So it is read here, within bounds, not by a program of the host's that runs as root, and the same
reading decides what may be written: nothing but the end of a partition that is the last one and overlaps no other.
Knows nothing of file systems. Works on descriptors of files and of block devices.

Sources: UEFI 2.10, chapter 5 (GPT); for dos the layout that Linux reads (block/partitions/msdos.c).
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import stat
import struct
import uuid
import zlib
from dataclasses import dataclass

from onelxc.errors import StorageError

GROW_FROM = 4 << 20
"""A partition is not enlarged for less: a file system would not take it."""
_ALIGN = 1 << 20
_PROTECTIVE = 0xEE
_EXTENDED = (0x05, 0x0F, 0x85)
_LOGICALS = 60
_ENTRIES_LIMIT = 1 << 20
MOST = 128
"""As many as a GPT has by default. Each is looked at."""
_GPT = struct.Struct("<8sIIIIQQQQ16sQIII")
_BLKSSZGET = 0x1268


@dataclass(frozen=True)
class Entry:
    """One partition, in bytes. `type` is hexadecimal ("83") or a GUID in capitals; `uuid` is its PARTUUID."""

    number: int
    offset: int
    size: int
    type: str
    uuid: str

    @property
    def end(self) -> int:
        return self.offset + self.size


@dataclass(frozen=True)
class _Gpt:
    """A header and its entries, both as their checksums say. `sector` is where the header lies, 1 for the original."""

    unit: int
    """Bytes of a sector."""
    sector: int
    first: int
    """The first sector that a partition may have."""
    guid: bytes
    entries_at: int
    each: int
    entries: bytes

    def end(self, disk: int) -> int:
        """Where a partition may end at most on a disk of so many bytes."""
        return disk - disk % self.unit - self.unit - self.padded

    @property
    def padded(self) -> int:
        """Bytes of the sectors that the entries take."""
        return -(-len(self.entries) // self.unit) * self.unit


def read(fd: int) -> tuple[Entry, ...]:
    """The partitions as the table has them, which may be wrong. StorageError where there is no table to read."""
    gpt = _gpt(fd)
    found = _dos(fd) if gpt is None else _entries(gpt)
    if len(found) > MOST:
        raise StorageError(f"more than {MOST} partitions")
    return found


def enlarge(fd: int, wanted: Entry) -> Entry | None:
    """Let a partition reach the end of its disk; None if there is no room worth it. StorageError says why it cannot.

    After a crash at any moment the table says the old or the new: see `_write_gpt`; what changes of a dos table lies in
    one sector.
    """
    gpt, disk = _gpt(fd), _size(fd)
    entries = _dos(fd) if gpt is None else _entries(gpt)
    if gpt is not None and gpt.sector != 1:
        _write_gpt(fd, gpt, disk)
    end = gpt.end(disk) if gpt else min(disk, (2**32 - 1) * _unit(fd))
    end -= end % _ALIGN
    if end - max(entry.end for entry in entries) < GROW_FROM:
        return None
    _refuse(entries, wanted, gpt)
    new = dataclasses.replace(wanted, size=end - wanted.offset)
    if gpt is None:
        sectors = struct.pack("<I", new.size // _unit(fd))
        _write(fd, sectors, 446 + 16 * (wanted.number - 1) + 12)
    else:
        changed = bytearray(gpt.entries)
        struct.pack_into("<Q", changed, (wanted.number - 1) * gpt.each + 40, end // gpt.unit - 1)
        _write_gpt(fd, dataclasses.replace(gpt, entries=bytes(changed)), disk)
    return new


def _refuse(entries: tuple[Entry, ...], wanted: Entry, gpt: _Gpt | None) -> None:
    """StorageError unless the partition is one of the table's, and nothing but free space lies behind its beginning."""
    if wanted not in entries or any(entry.size <= 0 or entry.offset <= 0 for entry in entries):
        raise StorageError("the partition table is not in order")
    if gpt is None and wanted.number > 4:
        raise StorageError("it lies in an extended partition")
    for entry in entries:
        if entry != wanted and entry.end > wanted.offset:
            how = "follows it" if entry.offset >= wanted.end else "overlaps it"
            raise StorageError(f"partition {entry.number} {how}")
    if gpt is not None:
        first = min(entry.offset for entry in entries)
        if gpt.entries_at != 2 or 2 * gpt.unit + gpt.padded > min(first, gpt.first * gpt.unit):
            raise StorageError("its GPT is of an unusual form")


def _gpt(fd: int) -> _Gpt | None:
    """The GPT, None where the disk has another table: the original if it is sound, else the copy at the disk's end."""
    mbr = os.pread(fd, 512, 0)
    if len(mbr) < 512 or mbr[510:] != b"\x55\xaa":
        raise StorageError("there is no partition table")
    if not any(mbr[446 + 16 * number + 4] == _PROTECTIVE for number in range(4)):
        return None
    disk = _size(fd)
    for unit in (512, 4096) if stat.S_ISREG(os.fstat(fd).st_mode) else (_unit(fd),):
        for sector in (1, disk // unit - 1):
            found = _header(fd, unit, sector, disk) if sector > 0 else None
            if found is not None:
                return found
    raise StorageError("the GPT is damaged")


def _header(fd: int, unit: int, sector: int, disk: int) -> _Gpt | None:
    raw = os.pread(fd, unit, sector * unit)
    if len(raw) < unit:
        return None
    signature, _, length, crc, _, own, _, first, _, guid, at, count, each, entries_crc = _GPT.unpack_from(raw)
    if signature != b"EFI PART" or own != sector or not _GPT.size <= length <= unit:
        return None
    if zlib.crc32(raw[:16] + bytes(4) + raw[20:length]) != crc:
        return None
    if each < 128 or each % 128 or not 0 < count * each <= _ENTRIES_LIMIT or at * unit >= disk:
        return None
    entries = os.pread(fd, count * each, at * unit)
    if len(entries) < count * each or zlib.crc32(entries) != entries_crc:
        return None
    return _Gpt(unit, sector, first, guid, at if sector == 1 else 2, each, entries)


def _entries(gpt: _Gpt) -> tuple[Entry, ...]:
    found = []
    for number in range(len(gpt.entries) // gpt.each):
        kind, own, first, last = struct.unpack_from("<16s16sQQ", gpt.entries, number * gpt.each)
        if any(kind):
            size = (last - first + 1) * gpt.unit
            guids = [str(uuid.UUID(bytes_le=each)) for each in (kind, own)]
            found.append(Entry(number + 1, first * gpt.unit, size, guids[0].upper(), guids[1]))
    return tuple(found)


def _write_gpt(fd: int, gpt: _Gpt, disk: int) -> None:
    """Write the table and its copy for a disk of this size.

    First the copy, at the disk's new end, where the original does not look yet; when it is on disk, the original, whose
    header and first 24 entries lie in one page. Whoever finds the original torn takes the copy, and so does `enlarge`.
    """
    last = disk // gpt.unit - 1
    table = gpt.entries.ljust(gpt.padded, b"\0")
    copy_at = last - gpt.padded // gpt.unit
    _write(fd, table + _render(gpt, disk, own=last, other=1, entries_at=copy_at), copy_at * gpt.unit)
    front = bytearray(os.pread(fd, gpt.unit, 0))
    for at in range(446, 510, 16):
        if front[at + 4] == _PROTECTIVE and front[at + 8 : at + 12] == struct.pack("<I", 1):
            struct.pack_into("<I", front, at + 12, min(last, 2**32 - 1))
    _write(fd, bytes(front) + _render(gpt, disk, own=1, other=last, entries_at=2) + table, 0)


def _render(gpt: _Gpt, disk: int, *, own: int, other: int, entries_at: int) -> bytes:
    """A header, a whole sector."""
    count, checksum = len(gpt.entries) // gpt.each, zlib.crc32(gpt.entries)
    place = (own, other, gpt.first, gpt.end(disk) // gpt.unit - 1, gpt.guid, entries_at, count, gpt.each, checksum)
    blank = _GPT.pack(b"EFI PART", 0x10000, _GPT.size, 0, 0, *place)
    return (blank[:16] + struct.pack("<I", zlib.crc32(blank)) + blank[20:]).ljust(gpt.unit, b"\0")


def _dos(fd: int) -> tuple[Entry, ...]:
    """Primary partitions (1 to 4), and the logical ones (from 5 on) of the first extended one: a chain of tables."""
    unit = _unit(fd)
    found, extended = [], 0
    identity = struct.unpack("<I", os.pread(fd, 4, 440))[0]

    def entry(number: int, start: int, count: int, kind: int) -> Entry:
        return Entry(number, start * unit, count * unit, f"{kind:02X}", f"{identity:08x}-{number:02x}")

    for number, (kind, start, count) in enumerate(_four(fd, 0), 1):
        if kind and count:
            found.append(entry(number, start, count, kind))
            extended = extended or (start if kind in _EXTENDED else 0)
    at, seen = extended, set[int]()
    while at and at not in seen and len(seen) < _LOGICALS:
        seen.add(at)
        rows = _four(fd, at * unit)
        found += [
            entry(4 + len(seen), at + start, count, kind)
            for kind, start, count in rows[:1]
            if kind and count and kind not in _EXTENDED
        ]
        at = next((extended + start for kind, start, count in rows[:2] if kind in _EXTENDED and count), 0)
    return tuple(found)


def _four(fd: int, at: int) -> list[tuple[int, int, int]]:
    """(type, first sector, sectors) of a table at this byte; none where there is no table."""
    raw = os.pread(fd, 512, at)
    if len(raw) < 512 or raw[510:] != b"\x55\xaa":
        return []
    return [(raw[at + 4], *struct.unpack_from("<II", raw, at + 8)) for at in range(446, 510, 16)]


def _unit(fd: int) -> int:
    """Bytes of a sector, as the device has it; a file has 512."""
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return 512
    return int(struct.unpack("i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def _size(fd: int) -> int:
    return os.lseek(fd, 0, os.SEEK_END)


def _write(fd: int, data: bytes, at: int) -> None:
    """Write, and return when it is on disk."""
    try:
        while data:
            done = os.pwrite(fd, data, at)
            data, at = data[done:], at + done
        os.fsync(fd)
    except OSError as error:
        raise StorageError(f"the partition table cannot be written: {error.strerror}") from error
