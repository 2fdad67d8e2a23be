"""What is in a gzip file? The filter that gzip(1) is, by zlib, which needs half its time.

Runs in the jail, as nobody, as a forked child whose stdin, stdout and stderr are the pipes. As strict as gzip: every
member's checksum counts, the end has to be there, and nothing but zeros may follow it (padding of `qemu-img resize`).
"""

from __future__ import annotations

import os
import zlib

_IN = 256 << 10
_OUT = 1 << 20
_MEMBER = 31
"""zlib's word for: with the header and the checksum of gzip."""


def main() -> int:
    """stdin → stdout; the exit code, with a line on stderr where it is not 0."""
    try:
        cause = _members()
    except zlib.error as error:
        cause = str(error)
    if cause:
        os.write(2, f"gzip: {cause}\n".encode())
    return int(bool(cause))


def _members() -> str:
    """Why it could not go on to the end; "" if it did."""
    data = os.read(0, _IN)
    while data:
        member = zlib.decompressobj(_MEMBER)
        while not member.eof:
            _write(member.decompress(data, _OUT))
            data = member.unconsumed_tail or (b"" if member.eof else os.read(0, _IN))
            if not data and not member.eof:
                # what zlib has still in hand, when its output was cut at a full buffer
                _write(member.flush())
                if not member.eof:
                    return "unexpected end of file"
        data = member.unused_data.lstrip(b"\0")
        while not data:
            more = os.read(0, _IN)
            if not more:
                return ""
            data = more.lstrip(b"\0")
    return "unexpected end of file"


def _write(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]
