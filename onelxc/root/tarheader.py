"""Reads the fields of a tar header: 512 bytes, numbers in octal or binary, a sum over all of them.

Pure. In no more time than it needs: an archive has a header for each of its files.
"""

from __future__ import annotations

import re
import zlib

from onelxc.root import contents
from onelxc.root.paxheader import Refused, summed_up

_ENDS = (b"\0", b" ")


def sums_up(header: bytes) -> bool:
    """contents.is_tar_header, in a third of its time: adler32's lower half is a sum of bytes modulo 65521."""
    stored = header[148:156]
    try:
        total = int(stored.rstrip(b" \0") or b"x", 8) - 256 + sum(stored)
    except ValueError:
        return False
    return zlib.adler32(header) & 0xFFFF == (1 + total) % 65521 or contents.is_tar_header(header)


def value(values: dict[bytes, bytes], key: bytes, raw: bytes) -> int:
    """A number from the extended header, in decimal, or else from the header's own field."""
    if key not in values:
        return number(raw)
    if not values[key].isdigit():
        raise Refused("the archive is corrupt: a size or owner is no number")
    return int(values[key][:20])


def number(raw: bytes) -> int:
    """A size or id as tar writes it: octal, or binary behind a first byte of 0x80."""
    if raw[:1] == b"\x80":
        return int.from_bytes(raw[1:], "big")
    if raw[:11].isdigit() and raw[11:] in _ENDS and b"8" not in raw and b"9" not in raw:  # most are
        return int(raw[:11], 8)
    text = raw.split(b"\0", 1)[0].strip(b" ")
    if not re.fullmatch(b"[0-7]*", text):
        raise Refused("the archive is corrupt: a size or owner is no number")
    return int(text or b"0", 8)


def with_permissions(header: bytes, bits: int) -> bytes:
    """The header with these nine bits in its mode."""
    block = bytearray(header)
    block[100:108] = b"%07o\0" % (number(header[100:108]) & 0o7000 | bits)
    return summed_up(block)


def name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name
