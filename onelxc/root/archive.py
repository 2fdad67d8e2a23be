"""Is an image really an archive (tar, or squashfs), how is it compressed, and where do its bytes end?

By content. `qemu-img resize` pads an archive with zeros when DISK/SIZE is larger (OpenNebula's transfer manager does
that to everything); what of a file is archive and what is padding is decided here, by each format's own structure
where its last byte may be zero as well. Starts no process and unpacks nothing.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from onelxc.errors import StorageError

_BLOCK = 512
_SPARE_ZEROS = 64 << 10
_MAGICS = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"hsqs", "squashfs"),
)
_DECOMPRESSORS = {
    "xz": ("xz", "-dc", "-T0", "--memlimit-decompress=1GiB"),
    "zstd": ("zstd", "-dc", "-q", "--no-progress"),
    "bzip2": ("bzip2", "-dc"),
    "lz4": ("lz4", "-dc", "-q"),
}


@dataclass(frozen=True)
class Archive:
    """A tar archive in an image file. `end` is how many of its bytes to read; `unpacked` the tar's size if it tells."""

    compression: str
    end: int
    unpacked: int | None = None
    zeros: int = 0
    """So many of these bytes, at their end, are zero and may be padding."""

    @property
    def content(self) -> int:
        """How many bytes tell it from other archives, padded or not."""
        return self.end - self.zeros

    @property
    def decompressor(self) -> tuple[str, ...]:
        """The program that gives the plain archive on stdout; () if it is plain already, or gzip (`gunzip`)."""
        return _DECOMPRESSORS.get(self.compression, ())


def detect(fd: int) -> Archive | None:
    """What the open file is, None if it is no archive. StorageError when it ends in the middle of its structure."""
    head = os.pread(fd, _BLOCK, 0)
    for magic, compression in _MAGICS:
        if head.startswith(magic):
            return _measure(fd, compression)
    if _is_tar_header(head):
        return _measure(fd, "plain")
    return None


def _is_tar_header(block: bytes) -> bool:
    """By the header's checksum, which every tar since Version 7 has; the magic `ustar` is younger."""
    if len(block) < _BLOCK or not block[0]:
        return False
    stored = block[148:156].strip(b" \x00")
    try:
        checksum = int(stored, 8)
    except ValueError:
        return False
    return checksum == sum(block[:148]) + 8 * 32 + sum(block[156:])


def _measure(fd: int, compression: str) -> Archive:
    size = os.fstat(fd).st_size
    if compression == "squashfs":  # its superblock tells how many bytes it takes
        end = int(struct.unpack("<Q", os.pread(fd, 8, 40).ljust(8, b"\0"))[0])
        if end > size:
            raise StorageError("the squashfs image is truncated")
        return Archive(compression, end)
    last = _last_nonzero(fd, size)
    if compression == "xz":  # a stream ends in "YZ"
        return Archive(compression, last + 1, _xz_unpacked(fd, last + 1))
    if compression == "zstd":
        end, unpacked = _zstd_end(fd, size)
        return Archive(compression, end, unpacked)
    if compression == "lz4":
        return Archive(compression, _lz4_end(fd, size))
    # gzip and bzip2 pass over zeros behind their last byte, which may be zero itself; tar ends at its own zero blocks.
    end = min(size, last + 1 + _SPARE_ZEROS)
    unpacked = _gzip_unpacked(fd, last, size) if compression == "gzip" else last + 1 if compression == "plain" else None
    return Archive(compression, end, unpacked, zeros=end - last - 1)


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
    for end in range(last + 1, min(last + 5, size + 1)):
        value = int(struct.unpack("<I", os.pread(fd, 4, end - 4))[0])
        if value and value % _BLOCK == 0:
            while value < end // 2:
                value += 1 << 32
            return value
    return None


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


def _zstd_end(fd: int, size: int) -> tuple[int, int | None]:
    """Walk the frames and blocks (RFC 8878): where the last frame ends, and the sizes if all frames tell theirs."""
    position, end = 0, 0
    unpacked: int | None = 0
    while position + 4 <= size:
        magic = struct.unpack("<I", _exactly(fd, 4, position, "zstd"))[0]
        if magic & 0xFFFFFFF0 == 0x184D2A50:
            position += 8 + struct.unpack("<I", _exactly(fd, 4, position + 4, "zstd"))[0]
        elif magic == 0xFD2FB528:
            position, content = _zstd_frame(fd, position + 4)
            unpacked = None if unpacked is None or content is None else unpacked + content
        else:
            break
        if position > size:
            raise StorageError("the archive is truncated: it ends inside a zstd frame")
        end = position
    return end, unpacked


def _zstd_frame(fd: int, position: int) -> tuple[int, int | None]:
    descriptor = _exactly(fd, 1, position, "zstd")[0]
    single, checksum = descriptor & 0x20, 4 if descriptor & 4 else 0
    position += 1 + (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    content = int.from_bytes(_exactly(fd, width, position, "zstd"), "little") + (256 if width == 2 else 0)
    position += width
    while True:
        header = int.from_bytes(_exactly(fd, 3, position, "zstd"), "little")
        position += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)
        if header & 1:
            return position + checksum, content if width else None


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
        else:
            break
        if position > size:
            raise StorageError("the archive is truncated: it ends inside an lz4 frame")
        end = position
    return end


def _exactly(fd: int, count: int, position: int, kind: str) -> bytes:
    data = os.pread(fd, count, position)
    if len(data) < count:
        raise StorageError(f"the archive is truncated: it ends inside a {kind} frame")
    return data
