"""Tells from the first bytes of a file, or of what a compressed file holds, what it is.

Pure: a table of marks, a row for each kind. Whether what bears the mark is sound is for those who use it to find out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

HEAD = 1 << 20
"""So many bytes are enough."""
_BLOCK = 512

TAR, IMAGE, COMPRESSED, DISK, OTHER = "tar", "image", "compressed", "disk", "other"


@dataclass(frozen=True)
class Content:
    """`use` is what can be done with it: TAR to unpack, IMAGE to use as a disk, COMPRESSED.

    DISK and OTHER, a disk or another file, are of no use to a container.
    """

    use: str
    name: str


# Those at the very beginning come first: the others' marks may stand in compressed bytes by chance.
_MARKS = (
    (COMPRESSED, "gzip", 0, b"\x1f\x8b\x08"),
    (COMPRESSED, "xz", 0, b"\xfd7zXZ\x00"),
    (COMPRESSED, "zstd", 0, b"\x28\xb5\x2f\xfd"),
    (COMPRESSED, "bzip2", 0, b"BZh"),
    (COMPRESSED, "lz4", 0, b"\x04\x22\x4d\x18"),
    (COMPRESSED, "lz4", 0, b"\x02\x21\x4c\x18"),
    (IMAGE, "qcow2 image", 0, b"QFI\xfb"),
    (IMAGE, "xfs", 0, b"XFSB"),
    (IMAGE, "squashfs", 0, b"hsqs"),
    (DISK, "an encrypted disk (LUKS)", 0, b"LUKS\xba\xbe"),
    (DISK, "a VMDK disk", 0, b"KDMV"),
    (DISK, "a VMDK disk's description", 0, b"# Disk DescriptorFile"),
    (DISK, "a VHD disk", 0, b"conectix"),
    (DISK, "a VHDX disk", 0, b"vhdxfile"),
    (DISK, "a squashfs of big-endian machines", 0, b"sqsh"),
    (OTHER, "an lzip file", 0, b"LZIP"),
    (OTHER, "an lzop file", 0, b"\x89LZO\x00\r\n\x1a\n"),
    (OTHER, "a ZIP archive", 0, b"PK\x03\x04"),
    (OTHER, "a ZIP archive", 0, b"PK\x05\x06"),
    (OTHER, "a 7z archive", 0, b"7z\xbc\xaf\x27\x1c"),
    (OTHER, "a RAR archive", 0, b"Rar!\x1a\x07"),
    (OTHER, "a cpio archive", 0, b"07070"),
    (OTHER, "an RPM package", 0, b"\xed\xab\xee\xdb"),
    (OTHER, "a Debian package", 0, b"!<arch>\ndebian"),
    (OTHER, "an ar archive", 0, b"!<arch>\n"),
    (OTHER, "a program (ELF)", 0, b"\x7fELF"),
    (DISK, "an ISO image", 32769, b"CD001"),  # before the partition table that many have as well
    (DISK, "a UDF image", 32769, b"BEA01"),
    (DISK, "an NTFS file system", 3, b"NTFS    "),
    (DISK, "an exFAT file system", 3, b"EXFAT   "),
    (DISK, "a FAT file system", 54, b"FAT1"),
    (DISK, "a FAT file system", 82, b"FAT32   "),
    (DISK, "a VDI disk", 64, b"\x7f\x10\xda\xbe"),
    (DISK, "an LVM physical volume", 512, b"LABELONE"),
    (IMAGE, "GPT partition table", 512, b"EFI PART"),
    (IMAGE, "GPT partition table", 4096, b"EFI PART"),
    (IMAGE, "erofs", 1024, b"\xe2\xe1\xf5\xe0"),
    (IMAGE, "f2fs", 1024, b"\x10\x20\xf5\xf2"),
    (IMAGE, "ext4", 1080, b"\x53\xef"),
    (IMAGE, "btrfs", 65600, b"_BHRfS_M"),
    (DISK, "swap space", 4086, b"SWAPSPACE2"),
    (DISK, "swap space", 65526, b"SWAPSPACE2"),
    (DISK, "part of a RAID", 4096, b"\xfc\x4e\x2b\xa9"),
    (DISK, "a bcachefs file system", 4120, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9"),
    (DISK, "a JFS file system", 32768, b"JFS1"),
    (DISK, "a ReiserFS file system", 65588, b"ReIsEr"),
)
_PATTERNS = (
    (OTHER, "a cpio archive", re.compile(rb"\xc7\x71|\x71\xc7")),
    (OTHER, "a file of compress (.Z)", re.compile(rb"\x1f\x9d[\x09-\x10\x89-\x90]")),
    (OTHER, "an .lzma file", re.compile(rb"\x5d\x00\x00[\x00-\xff]{2}")),
    (OTHER, "an HTML page", re.compile(rb"\s*<(?:!doctype html|html)", re.IGNORECASE)),
    (OTHER, "a text file", re.compile(rb"[\t\n\r\x20-\x7e]{16,}\Z")),
)
USABLE = (
    "a disk may be a tar archive (plain, gzip, xz, zstd, bzip2, lz4), a raw or qcow2 image, or one of those compressed"
)
SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")
"""Begins a frame that zstd and lz4 both pass over; what the file is stands behind it."""


def look(head: bytes) -> Content | None:
    """What begins with `head`; None if it is nothing that we know."""
    if is_tar_header(head[:_BLOCK]):
        return Content(TAR, "a tar archive")
    for use, name, offset, mark in _MARKS:
        if head.startswith(mark, offset):
            return Content(use, name)
    if _is_dos_table(head):
        return Content(IMAGE, "DOS partition table")
    for use, name, pattern in _PATTERNS:
        if pattern.match(head[: 4 * _BLOCK]):
            return Content(use, name)
    return None


def is_tar_header(block: bytes) -> bool:
    """By the header's checksum, which every tar since Version 7 has, some as a sum of signed bytes."""
    if len(block) < _BLOCK or not block[0]:
        return False
    stored = re.match(rb" *([0-7]+)[ \x00]", block[148:156] + b"\x00")
    if not stored:
        return False
    others = block[:148] + block[156:]
    total = sum(others) + 8 * 32
    return int(stored[1], 8) in (total, total - 256 * sum(byte > 127 for byte in others))


def _is_dos_table(head: bytes) -> bool:
    entries = [head[446 + 16 * number : 462 + 16 * number] for number in range(4)]
    return (
        head[510:512] == b"\x55\xaa"
        and all(entry[0] in (0, 0x80) for entry in entries)
        and any(entry[4] and any(entry[12:16]) for entry in entries)
    )
