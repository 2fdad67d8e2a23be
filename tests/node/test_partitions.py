"""A disk that has become larger: its last partition takes the room, whatever happens meanwhile, and whoever wrote the
table. On the real tables of sfdisk, and in real containers.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from onelxc.errors import StorageError
from onelxc.root import parttable

MIB = 1 << 20
LABELS = ("dos", "gpt")
GPT_BYTES = 34 * 512
"""The table at the beginning of the disk: MBR, header, 128 entries; the copy at the end has no MBR."""


def sh(*argv: str, input: str | None = None) -> str:
    return subprocess.run(argv, check=True, input=input, stdout=subprocess.PIPE, text=True).stdout


def disk(path: Path, label: str, *rows: str, size_mb: int = 100) -> int:
    """A descriptor of a disk with these partitions."""
    with open(path, "wb") as file:
        file.truncate(size_mb * MIB)
    sh("sfdisk", "-q", str(path), input="\n".join([f"label: {label}", *rows]) + "\n")
    return os.open(path, os.O_RDWR)


def by_sfdisk(path: Path) -> list[tuple[int, int]]:
    """(offset, size) of each partition, in bytes."""
    table = json.loads(sh("sfdisk", "--json", str(path)))["partitiontable"]
    return [(int(row["start"]) * 512, int(row["size"]) * 512) for row in table["partitions"]]


def by_us(fd: int) -> list[tuple[int, int]]:
    return [(entry.offset, entry.size) for entry in parttable.read(fd)]


@pytest.mark.parametrize("label", LABELS)
def test_the_last_one_grows_and_nothing_else_changes(tmp_path: Path, label: str) -> None:
    path = tmp_path / "disk"
    # the last on the disk is the first of the table, as in Debian's cloud images
    fd = disk(path, label, "start=21MiB, size=40MiB", "start=1MiB, size=20MiB", size_mb=62)
    before, identities = by_sfdisk(path), sh("sfdisk", "-d", str(path)).count("uuid")
    assert by_us(fd) == before
    wanted, other = parttable.read(fd)
    assert parttable.enlarge(fd, wanted) is None
    os.truncate(path, 400 * MIB)
    with pytest.raises(StorageError, match="partition 1 follows it"):
        parttable.enlarge(fd, other)
    assert by_sfdisk(path) == before
    grown = parttable.enlarge(fd, wanted)
    assert grown is not None
    assert grown.end == (400 if label == "dos" else 399) * MIB
    assert by_sfdisk(path) == by_us(fd) == [(21 * MIB, grown.size), (1 * MIB, 20 * MIB)]
    assert "No errors detected" in sh("sfdisk", "--verify", str(path))
    assert sh("sfdisk", "-d", str(path)).count("uuid") == identities
    assert parttable.enlarge(fd, grown) is None
    os.close(fd)


@pytest.mark.parametrize("label", LABELS)
def test_a_crash_in_the_middle_loses_nothing(tmp_path: Path, label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut after every sector written. GPT's 68 are written in an order in which one of two tables is whole."""
    path = tmp_path / "disk"
    fd = disk(path, label, "size=20MiB", size_mb=32)
    os.truncate(path, 64 * MIB)
    small = by_us(fd)[0]
    pristine = os.pread(fd, GPT_BYTES, 0)
    pwrite = os.pwrite
    room = 0

    def until_the_crash(where: int, data: bytes, at: int) -> int:
        nonlocal room
        done = min(room, len(data))
        room -= done
        if not done:
            raise OSError(5, "the host has crashed")
        return pwrite(where, data[:done], at)

    for sectors in range(100):
        pwrite(fd, pristine, 0)
        pwrite(fd, bytes(GPT_BYTES), 64 * MIB - GPT_BYTES)
        room = sectors * 512 or (2 if label == "dos" else 0)
        monkeypatch.setattr(os, "pwrite", until_the_crash)
        try:
            done = parttable.enlarge(fd, parttable.read(fd)[0])
        except StorageError:
            done = None
        monkeypatch.setattr(os, "pwrite", pwrite)
        (now,) = by_us(fd)
        assert by_sfdisk(path) == [now], sectors
        # a dos table's four bytes may be torn only where a disk tears sectors
        assert now in (small, (small[0], (63 if label == "gpt" else 64) * MIB - small[0])) or label == "dos"
        parttable.enlarge(fd, parttable.read(fd)[0])
        assert "No errors detected" in sh("sfdisk", "--verify", str(path))
        if done is not None:
            break
    else:
        pytest.fail("it never came to its end")
    os.close(fd)


def extended(path: Path) -> int:
    """A logical partition, whose chain of tables leads to itself."""
    fd = disk(path, "dos", "1: size=10MiB", "2: size=30MiB, type=5", "5: size=5MiB", "6: size=5MiB")
    second = struct.unpack("<I", os.pread(fd, 4, 11 * MIB + 446 + 16 + 8))[0]
    os.pwrite(fd, struct.pack("<I", second), 11 * MIB + second * 512 + 446 + 16 + 8)
    os.pwrite(fd, b"\x05", 11 * MIB + second * 512 + 446 + 16 + 4)
    os.pwrite(fd, struct.pack("<I", 1), 11 * MIB + second * 512 + 446 + 16 + 12)
    return fd


def overlapping(path: Path) -> int:
    fd = disk(path, "dos", "size=20MiB", "size=20MiB")
    os.pwrite(fd, struct.pack("<I", 15 * 2048), 446 + 16 + 8)
    return fd


def beyond(path: Path) -> int:
    fd = disk(path, "dos", "size=20MiB", "size=20MiB")
    os.pwrite(fd, struct.pack("<I", 0xFFFFFF00), 446 + 12)
    return fd


def from_the_first_sector(path: Path) -> int:
    fd = disk(path, "dos", "size=20MiB")
    os.pwrite(fd, struct.pack("<I", 0), 446 + 8)
    return fd


HOSTILE: dict[str, Callable[[Path], int]] = {
    "extended": extended,
    "overlapping": overlapping,
    "beyond": beyond,
    "from the first sector": from_the_first_sector,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_table_that_is_not_in_order_is_not_written_to(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "disk"
    fd = HOSTILE[kind](path)
    os.truncate(path, 120 * MIB)
    before = path.read_bytes()
    entries = parttable.read(fd)
    assert 0 < len(entries) < 70
    for entry in entries:
        try:
            assert parttable.enlarge(fd, entry) is None
        except StorageError as error:
            assert str(error)
    assert path.read_bytes() == before
    os.close(fd)


@pytest.mark.parametrize("label", LABELS)
def test_rubbish_harms_nothing_outside_of_the_table(tmp_path: Path, label: str) -> None:
    """Bytes of real tables changed at random: no error but ours, and what lies between the tables stays as it is."""
    path = tmp_path / "disk"
    end = 8 * MIB
    fd = disk(path, label, "size=1MiB", "size=1MiB", size_mb=4)
    os.truncate(path, end)
    tables = os.pread(fd, GPT_BYTES, 0)
    between = bytes(range(256)) * 64
    chance = random.Random(f"{label} 4")
    for _ in range(300):
        table = bytearray(tables)
        for _ in range(chance.choice((1, 1, 2, 8))):
            begin, stop = chance.choice(((440, 512), (512, 604), (1024, 1408)))
            table[chance.randrange(begin, stop)] = chance.choice((0, 1, 5, 0x83, 0xEE, 0xFF, chance.randrange(256)))
        if label == "gpt" and chance.random() < 0.9:  # so that its lies are believed
            seal(table)
        os.pwrite(fd, table, 0)
        os.pwrite(fd, between, 3 * MIB)
        os.pwrite(fd, bytes(GPT_BYTES), end - GPT_BYTES)
        try:
            for entry in parttable.read(fd):
                parttable.enlarge(fd, entry)
        except StorageError:
            pass
        assert os.pread(fd, len(between), 3 * MIB) == between
        behind = end - GPT_BYTES - 4 * MIB
        assert os.pread(fd, behind, 4 * MIB) == bytes(behind)
        assert os.fstat(fd).st_size == end
    os.close(fd)


def seal(table: bytearray) -> None:
    """Give a changed GPT its checksums."""
    length, count, each = struct.unpack_from("<I", table, 524)[0], *struct.unpack_from("<II", table, 592)
    if 92 <= length <= 512 and count * each <= GPT_BYTES - 1024:
        struct.pack_into("<I", table, 600, zlib.crc32(table[1024 : 1024 + count * each]))
        struct.pack_into("<I", table, 528, 0)
        struct.pack_into("<I", table, 528, zlib.crc32(table[512 : 512 + length]))
