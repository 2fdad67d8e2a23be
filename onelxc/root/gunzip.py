"""Unpacks gzip and bzip2 from stdin: gzip by zlib, which needs half the time of gzip(1); both strictly.

Runs in the jail, in a forked child. Every member's checksum counts, the end has to be there, and nothing but zeros may
follow it (padding of `qemu-img resize`), which bzip2(1) takes lightly.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Generator, Iterator

_IN = 256 << 10
_OUT = 1 << 20
_MEMBER = 31
"""zlib's word for: with the header and the checksum of gzip."""

Member = Callable[[bytes], Generator[bytes, None, bytes]]


class Broken(Exception):
    """It could not be unpacked to its end; the text says why."""


def gunzip() -> Iterator[bytes]:
    """stdin, unpacked; Broken at what is no gzip."""
    return _members(b"\x1f\x8b", _gzip_member)


def bunzip2() -> Iterator[bytes]:
    """The same for bzip2."""
    return _members(b"BZh", _bzip2_member)


def write(source: Callable[[], Iterator[bytes]]) -> int:
    """One of these → stdout; the exit code, with a line on stderr where it is not 0."""
    try:
        for data in source():
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
    except Broken as error:
        os.write(2, f"{error}\n".encode())
        return 1
    return 0


def _members(magic: bytes, member: Member) -> Iterator[bytes]:
    data = os.read(0, _IN)
    while data:
        try:
            rest = yield from member(data)
        except (zlib.error, OSError) as error:
            raise Broken(str(error)) from None
        data = rest.lstrip(b"\0")
        while len(data) < len(magic):
            more = os.read(0, _IN)
            if not more:
                break
            data = (data + more).lstrip(b"\0")
        if data and not data.startswith(magic):
            raise Broken("there is something else behind its end")


def _gzip_member(data: bytes) -> Generator[bytes, None, bytes]:
    """Unpack one member that begins with `data`; returns what was read behind it."""
    member = zlib.decompressobj(_MEMBER)
    while not member.eof:
        yield member.decompress(data, _OUT)
        data = member.unconsumed_tail or (b"" if member.eof else os.read(0, _IN))
        if not data and not member.eof:
            # what zlib has still in hand, when its output was cut at a full buffer
            yield member.flush()
            if not member.eof:
                raise Broken("unexpected end of file")
    return member.unused_data


def _bzip2_member(data: bytes) -> Generator[bytes, None, bytes]:
    import bz2

    member = bz2.BZ2Decompressor()
    while True:
        yield member.decompress(data, _OUT)
        if member.eof:
            return member.unused_data
        data = os.read(0, _IN) if member.needs_input else b""
        if member.needs_input and not data:
            raise Broken("unexpected end of file")
