"""Turns a POSIX ACL in the words of tar into the kernel's form, as the xattr system.posix_acl_access keeps it.

Pure. GNU tar writes `user:lisa:r-x`, bsdtar and star `user:lisa:r-x:1000`; a comment tells what the mask leaves of it.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping

Names = Mapping[str, Mapping[str, int]]
"""The numbers of names, of each "user" and "group"."""

_VERSION = 2
_NO_ID = 0xFFFFFFFF
_TAGS = {"user": (0x01, 0x02), "group": (0x04, 0x08), "mask": (0x10, 0x10), "other": (0x20, 0x20)}
"""Of entries without and with a name."""
_PERMISSIONS = re.compile("[rwx-]{3}")
_DIGITS = re.compile("[0-9]{1,10}")


def mode(acl: bytes) -> int | None:
    """The nine bits of a file's mode that an ACL in the kernel's form stands for; None where it is none."""
    if len(acl) % 8 != 4:
        return None
    bits: dict[int, int] = {tag: permissions & 7 for tag, permissions, _ in struct.iter_unpack("<HHI", acl[4:])}
    if not {0x01, 0x04, 0x20} <= bits.keys():
        return None
    return bits[0x01] << 6 | bits.get(0x10, bits[0x04]) << 3 | bits[0x20]


class UnknownName(Exception):
    """Nobody tells the number of a user or group."""

    def __init__(self, kind: str, name: str) -> None:
        super().__init__(name)
        self.kind = kind
        self.name = name


def encode(text: bytes, names: Names) -> bytes:
    """The ACL for the kernel. UnknownName where a number is missing, ValueError for what is no ACL."""
    entries = []
    for word in re.split(r"[,\n]+", os.fsdecode(text)):
        entry = re.split(r"[\s#]", word.strip(), maxsplit=1)[0]
        if entry:
            entries.append(_entry(entry.split(":"), names))
    entries.sort()
    return struct.pack("<I", _VERSION) + b"".join(struct.pack("<HHI", tag, bits, id_) for tag, id_, bits in entries)


def _entry(parts: list[str], names: Names) -> tuple[int, int, int]:
    kind = next((name for name in _TAGS if parts[0] and name.startswith(parts[0])), "")
    if kind in ("mask", "other") and len(parts) == 2:  # as Solaris writes it
        parts.insert(1, "")
    if not kind or len(parts) < 3 or not _PERMISSIONS.fullmatch(parts[2]):
        raise ValueError(f"its ACL has an entry that nobody understands: {':'.join(parts)!a}")
    bits = sum(bit for letter, bit in (("r", 4), ("w", 2), ("x", 1)) if letter in parts[2])
    unnamed, named = _TAGS[kind]
    if not parts[1]:
        return unnamed, _NO_ID, bits
    digits = next((word for word in (*parts[3:4], parts[1]) if _DIGITS.fullmatch(word)), "")
    number = int(digits) if digits else names.get(kind, {}).get(parts[1], -1)
    if not 0 <= number < _NO_ID:
        raise UnknownName(kind, parts[1])
    return named, number, bits
