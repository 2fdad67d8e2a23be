"""Tells how a file is compressed, and where its bytes end; a plain tar and a squashfs count as well.

By content (`contents`). `qemu-img resize` pads an archive with zeros when DISK/SIZE is larger (OpenNebula's transfer
manager does that to everything); what of a file is archive and what is padding is decided here, by each format's own
structure where its last byte may be zero as well. Starts no process and unpacks nothing: what is inside is for
`unpacking` to see.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Union

from onelxc.errors import StorageError
from onelxc.root import contents, gunzip

_BLOCK = 512
_SPARE_ZEROS = 64 << 10

Decompressor = Union[Sequence[str], Callable[[], Iterator[bytes]]]
"""A program from stdin to stdout, or a reader of stdin of our own."""


@dataclass(frozen=True)
class Archive:
    """An archive in a file. `end` is how many of its bytes to read; `unpacked` what it unpacks to, if it tells."""

    compression: str
    end: int
    unpacked: int | None = None
    exact: bool = False
    """Whether `unpacked` is the format's own word, and not a guess."""
    zeros: int = 0
    """So many of these bytes, at their end, are zero and may be padding."""
    window: int = 0
    """So many bytes of memory its frames ask for."""

    @property
    def content(self) -> int:
        """How many bytes tell it from other archives, padded or not."""
        return self.end - self.zeros

    def decompressor(self, memory_mb: int) -> Decompressor:
        """What gives the plain archive; () if it is plain already."""
        program = _KINDS[self.compression][1]
        return program if callable(program) else tuple(word.format(mb=memory_mb) for word in program)


def detect(fd: int) -> Archive | None:
    """What the open file is, None if it is no archive. StorageError when it ends in the middle of its structure."""
    head = os.pread(fd, contents.HEAD, 0)
    position = 0
    while contents.SKIPPABLE.match(head):  # a frame without content: what it is stands behind
        position += 8 + int.from_bytes(_exactly(fd, 4, position + 4, "zstd"), "little")
        head = os.pread(fd, 4, position)
    found = contents.look(head)
    if found is None:
        return None
    if found.use == contents.OTHER:
        raise StorageError(f"it is {found.name}: {contents.USABLE}")
    kind = "plain" if found.use == contents.TAR else found.name
    return _measure(fd, kind) if kind in _KINDS else None


def _measure(fd: int, kind: str) -> Archive:
    """By each format's own structure where its last byte may be zero as well."""
    return _KINDS[kind][0](fd, os.fstat(fd).st_size)


def _squashfs(fd: int, size: int) -> Archive:
    """Its superblock tells how many bytes it takes."""
    end = int(struct.unpack("<Q", os.pread(fd, 8, 40).ljust(8, b"\0"))[0])
    if end > size:
        raise StorageError("the squashfs image is truncated")
    return _ended("squashfs", fd, size, Archive("squashfs", end))


def has_xattrs(fd: int) -> bool:
    """Whether a squashfs has attributes: a table of them, and not an empty one, as mksquashfs may write."""
    table = int.from_bytes(os.pread(fd, 8, 56), "little")
    # struct squashfs_xattr_id_table: where the attributes are, then how many
    return table < 1 << 63 and any(os.pread(fd, 4, table + 8))


def _ended(kind: str, fd: int, size: int, archive: Archive) -> Archive:
    """The archive, if there is nothing but zeros behind it."""
    if _last_nonzero(fd, size) >= archive.end:
        raise StorageError(f"there are other data behind the end of the {kind} file, at byte {archive.end}")
    return archive


def _plain(fd: int, size: int) -> Archive:
    """tar ends at its own zero blocks, before which a file may end in zeros."""
    last = _last_nonzero(fd, size)
    return Archive("plain", size, last + 1, zeros=size - last - 1)


def _gzip(fd: int, size: int) -> Archive:
    """Passes over zeros behind its last byte, which may be zero itself; so does bzip2."""
    last = _last_nonzero(fd, size)
    end = min(size, last + 1 + _SPARE_ZEROS)
    return Archive("gzip", end, _gzip_unpacked(fd, last, size), zeros=end - last - 1)


def _bzip2(fd: int, size: int) -> Archive:
    last = _last_nonzero(fd, size)
    end = min(size, last + 1 + _SPARE_ZEROS)
    return Archive("bzip2", end, zeros=end - last - 1)


def _xz(fd: int, size: int) -> Archive:
    """A stream ends in "YZ"."""
    end = _last_nonzero(fd, size) + 1
    return Archive("xz", end, _xz_unpacked(fd, end), exact=True)


def _zstd(fd: int, size: int) -> Archive:
    end, unpacked, window = _zstd_end(fd, size)
    return _ended("zstd", fd, size, Archive("zstd", end, unpacked, exact=True, window=window))


def _lz4(fd: int, size: int) -> Archive:
    return _ended("lz4", fd, size, Archive("lz4", _lz4_end(fd, size)))


def _last_nonzero(fd: int, size: int) -> int:
    """The offset of the last byte that is not zero; holes are passed over, not read. -1 if there is none."""
    extents = []
    position = 0
    while position < size:
        try:
            begin = os.lseek(fd, position, os.SEEK_DATA)
            position = os.lseek(fd, begin, os.SEEK_HOLE)
        except OSError:
            break
        extents.append((begin, min(position, size)))
    for begin, end in reversed(extents):
        while end > begin:
            start = max(begin, end - (1 << 20))
            stripped = os.pread(fd, end - start, start).rstrip(b"\x00")
            if stripped:
                return start + len(stripped) - 1
            end = start
    return -1


def _gzip_unpacked(fd: int, last: int, size: int) -> int | None:
    """gzip's last four bytes are the size modulo 4 GiB; the padding behind hides which bytes those are."""
    found = []
    for end in range(last + 1, min(last + 5, size + 1)):
        value = int(struct.unpack("<I", os.pread(fd, 4, end - 4))[0])
        if value and value % _BLOCK == 0:
            while value < end // 2:
                value += 1 << 32
            found.append(value)
    return min(found, default=None)


def _xz_unpacked(fd: int, end: int) -> int | None:
    """The sum in the index of a single stream; None for several, or for anything odd."""
    footer = os.pread(fd, 12, max(0, end - 12))
    if len(footer) < 12 or footer[10:] != b"YZ":
        return None
    index_size = (struct.unpack("<I", footer[4:8])[0] + 1) * 4
    if index_size > 16 << 20 or index_size > end:
        return None
    index = os.pread(fd, index_size, end - 12 - index_size)
    try:
        count, position = _varint(index, 1)
        blocks = unpacked = 0
        for _ in range(count):
            packed, position = _varint(index, position)
            plain, position = _varint(index, position)
            blocks += (packed + 3) & ~3
            unpacked += plain
    except IndexError:
        return None
    return unpacked if 24 + blocks + index_size == end else None


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80 or shift > 63:
            return value, position


def _zstd_end(fd: int, size: int) -> tuple[int, int | None, int]:
    """Walk the frames and blocks (RFC 8878): where the last frame ends, the sizes if all frames tell theirs, and the
    largest window.
    """
    position, end, largest = 0, 0, 0
    unpacked: int | None = 0
    while position + 4 <= size:
        magic = struct.unpack("<I", _exactly(fd, 4, position, "zstd"))[0]
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            position += 8 + struct.unpack("<I", _exactly(fd, 4, position + 4, "zstd"))[0]
        elif magic == 0xFD2FB528:
            position, content, window = _zstd_frame(fd, position + 4)
            largest = max(largest, window)
            unpacked = None if unpacked is None or content is None else unpacked + content
        else:
            break
        if position > size:
            raise StorageError("the archive is truncated: it ends inside a zstd frame")
        end = position
    return end, unpacked, largest


def _zstd_frame(fd: int, position: int) -> tuple[int, int | None, int]:
    descriptor = _exactly(fd, 1, position, "zstd")[0]
    single, checksum = descriptor & 0x20, 4 if descriptor & 4 else 0
    position += 1
    window = 0
    if not single:
        byte = _exactly(fd, 1, position, "zstd")[0]
        window = (1 << (10 + (byte >> 3))) // 8 * (8 + (byte & 7))
        position += 1
    width = (0, 1, 2, 4)[descriptor & 3]
    dictionary = int.from_bytes(_exactly(fd, width, position, "zstd"), "little")
    if dictionary:
        raise StorageError(f"unsupported: it was compressed with a zstd dictionary (number {dictionary})")
    position += width
    width = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    content = int.from_bytes(_exactly(fd, width, position, "zstd"), "little") + (256 if width == 2 else 0)
    position += width
    while True:
        header = int.from_bytes(_exactly(fd, 3, position, "zstd"), "little")
        position += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        if header & 1:
            return position + checksum, content if width else None, window or content


def _lz4_end(fd: int, size: int) -> int:
    """Walk the frames and blocks of LZ4's frame format: where the last frame ends."""
    position, end = 0, 0
    while position + 4 <= size:
        magic = struct.unpack("<I", _exactly(fd, 4, position, "lz4"))[0]
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            position += 8 + struct.unpack("<I", _exactly(fd, 4, position + 4, "lz4"))[0]
        elif magic == 0x184D2204:
            flags = _exactly(fd, 1, position + 4, "lz4")[0]
            position += 7 + (8 if flags & 8 else 0) + (4 if flags & 1 else 0)
            block_checksum = 4 if flags & 0x10 else 0
            while True:
                length = struct.unpack("<I", _exactly(fd, 4, position, "lz4"))[0] & 0x7FFFFFFF
                position += 4
                if not length:
                    break
                position += length + block_checksum
            position += 4 if flags & 4 else 0
        elif magic == 0x184C2102:
            position = _lz4_legacy_end(fd, position + 4, size)
        else:
            break
        if position > size:
            raise StorageError("the archive is truncated: it ends inside an lz4 frame")
        end = position
    return end


def _lz4_legacy_end(fd: int, position: int, size: int) -> int:
    """The older format has blocks of up to 8 MiB and no end of its own: another frame, zeros or the file's end."""
    while position + 4 <= size:
        length = struct.unpack("<I", _exactly(fd, 4, position, "lz4"))[0]
        if not length or length > 9 << 20:
            break
        position += 4 + length
    return position


def _exactly(fd: int, count: int, position: int, kind: str) -> bytes:
    data = os.pread(fd, count, position)
    if len(data) < count:
        raise StorageError(f"the archive is truncated: it ends inside a {kind} frame")
    return data


_KINDS: dict[str, tuple[Callable[[int, int], Archive], Decompressor]] = {
    "plain": (_plain, ()),
    "gzip": (_gzip, gunzip.gunzip),
    "bzip2": (_bzip2, gunzip.bunzip2),
    "xz": (_xz, ("xz", "-dc", "-T4", "--memlimit-decompress={mb}MiB")),
    "zstd": (_zstd, ("zstd", "-dc", "-q", "--no-progress", "--memory={mb}MB")),
    "lz4": (_lz4, ("lz4", "-dc", "-q")),
    "squashfs": (_squashfs, ()),
}
"""How each is measured and unpacked. A compression needs a row here and its mark in `contents`."""
