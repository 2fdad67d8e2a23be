"""Reads a tar stream on its way to GNU tar, and makes sure that tar neither drops nor takes anything unseen.

Runs in the jail between the decompressor and tar, as a forked child: stdin → stdout. It follows every header, so that

* an archive that is truncated, goes on behind its end, or holds what tar would pass over, is refused;
* headers that only describe other headers are small: tar keeps each in memory, whatever size it claims;
* attributes that tar cannot restore in the jail leave the stream and are reported, for `attributes` to set;
* what the archive needs of a file system is counted.

Its last act is the report, to a descriptor of its own. What refuses an archive is a line on stderr.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NoReturn

from onelxc import jsontext
from onelxc.errors import StorageError
from onelxc.root import contents, gunzip, paxheader, posixacl, tarheader
from onelxc.root.paxheader import Refused

REFUSED, BROKEN, BEYOND, LARGE_XATTRS = 1, 2, 3, 4
"""Exit codes. A line on stderr says why the archive is refused, or its compression broken; it holds more than allowed;
the file system has to be made for large attributes.
"""

_BLOCK = 512
_IN = 1 << 20
_LONGEST_NAME = 64 << 10
_LONGEST_PAX = 4 << 20
_LONGEST_DUMPDIR = 16 << 20
_MOST_DEFERRED = 32 << 20
_MOST_NAMES = 10_000
_INODE = 256
_IN_THE_INODE = 90
_IN_ONE_BLOCK = 3900
"""ext4 has some bytes in the inode and a block of 4 KiB for an inode's attributes, if none has an inode of its own."""
_REPORT_BYTES = 3 * _MOST_DEFERRED
_ZEROS = bytes(_BLOCK)

_CONTENT, _NO_CONTENT = frozenset(b"\x0007SDV"), frozenset(b"123456")
_ODD = {ord("M"): "a part of a multi-volume archive", ord("A"): "a Solaris ACL"}


@dataclass
class Report:
    """What an archive holds."""

    members: int = 0
    """Files of every kind that take an inode."""
    bytes: int = 0
    """What their content, directories and attributes take, in blocks of 4 KiB."""
    ends_at: int = 0
    """The bytes before the end-of-archive mark, as tar got them."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Keywords of extended headers that mean nothing on Linux, and how often each was there."""
    users: dict[str, int] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    """Names of owners, and the number that goes with each throughout the archive (-1: not one alone)."""
    deferred: dict[str, dict[str, str]] = field(default_factory=dict)
    """Path → name of an attribute → its value in base64, for `attributes` to set."""

    @property
    def needs(self) -> int:
        """What it takes in a file system, in bytes."""
        return self.bytes + self.members * _INODE


def read_report(fd: int) -> Report:
    """What the scanner wrote to `fd`; StorageError when that is none."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb", closefd=False) as file:
        text = file.read(_REPORT_BYTES)
    try:
        return Report(**jsontext.loads(text))
    except (ValueError, TypeError) as error:
        raise StorageError(f"what was read of the archive cannot be understood: {error}") from error


def scan(
    report_fd: int,
    source: Callable[[], Iterator[bytes]] | None,
    *,
    most_bytes: int,
    zeros_from: int | None,
    large_xattrs: bool,
    forward: bool,
) -> int:
    """`source`, or stdin, → stdout; the exit code.

    `most_bytes` is what the archive may need, `zeros_from` the byte behind which the input is known to be zeros, so
    that it need not be read to its end. `large_xattrs`: the file system has room for them. Without `forward` nothing
    is written, only counted.
    """
    chunks = source() if source is not None else iter(lambda: os.read(0, _IN), b"")
    scanner = _Scanner(chunks, most_bytes, zeros_from, large_xattrs, forward)
    try:
        scanner.run()
        code = 0
    except Refused as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
        code = REFUSED
    except gunzip.Broken as error:
        os.write(2, f"{error}\n".encode())
        code = BROKEN
    except _Stop as stop:
        code = stop.code
    with open(report_fd, "wb", closefd=False) as file:
        file.write(json.dumps(vars(scanner.report)).encode())
    return code


class _Stop(Exception):
    """The rest need not be read."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Scanner:
    def __init__(
        self,
        chunks: Iterator[bytes],
        most_bytes: int,
        zeros_from: int | None,
        large_xattrs: bool,
        forward: bool,
    ) -> None:
        self.report = Report()
        self.chunks = chunks
        self.most_bytes = most_bytes
        self.zeros_from = zeros_from
        self.large_xattrs = large_xattrs
        self.forward = forward
        self.buffer = b""
        self.read_before = 0  # bytes of input before the buffer
        self.position = 0  # in the buffer: all before it is understood
        self.sent = 0  # in the buffer: all before it has been passed on, or left out
        self.written = 0
        self.deferred_bytes = 0
        self.long_name: bytes | None = None
        self.described = False
        self.pax = paxheader.Sorted()
        self.seen_owners: set[bytes] = set()

    def run(self) -> None:
        while True:
            if not self._have(_BLOCK):
                self._truncated()
            header = self.buffer[self.position : self.position + _BLOCK]
            if header == _ZEROS:
                self._end()
                return
            if not tarheader.sums_up(header):
                raise Refused(
                    f"the archive is corrupt: there is no tar header at byte {self._offset()}"
                    if self.report.members
                    else "it does not look like a tar archive"
                )
            kind = header[156]
            if kind in b"xX":
                self._extended(header)
            elif kind in b"gLK":
                self._describing(header, kind)
            else:
                self._member(header, kind)

    # the stream

    def _offset(self) -> int:
        return self.read_before + self.position

    def _have(self, count: int) -> bool:
        """Whether so many bytes more are in the buffer, read if need be."""
        missing = count - (len(self.buffer) - self.position)
        if missing <= 0:
            return True
        self._pass_on()
        parts = [self.buffer[self.position :]] if self.position < len(self.buffer) else []
        while missing > 0:
            more = next(self.chunks, None)
            if more is None:
                break
            parts.append(more)
            missing -= len(parts[-1])
        self.read_before += self.position
        self.buffer = parts[0] if len(parts) == 1 else b"".join(parts)
        self.position = self.sent = 0
        return missing <= 0

    def _pass_on(self) -> None:
        """Write what is understood and not left out."""
        self._write(memoryview(self.buffer)[self.sent : self.position])
        self.sent = self.position

    def _write(self, data: bytes | memoryview) -> None:
        self.written += len(data)
        view = memoryview(data)
        while view and self.forward:
            view = view[os.write(1, view) :]

    def _skip(self, count: int) -> None:
        """Over so many bytes of content and the rest of their last block."""
        count = -(-count // _BLOCK) * _BLOCK
        while count:
            step = min(count, len(self.buffer) - self.position)
            self.position += step
            count -= step
            if count and not self._have(1):
                self._truncated()

    def _body(self, header: bytes, size: int, most: int, what: str) -> bytes:
        """The content behind the header at hand, which stays where it is."""
        if size > most:
            raise Refused(f"{what} claims to have {size} bytes, more than the {most} that are allowed")
        if not self._have(_BLOCK + -(-size // _BLOCK) * _BLOCK):
            self._truncated()
        return self.buffer[self.position + _BLOCK : self.position + _BLOCK + size]

    def _truncated(self) -> NoReturn:
        ends = self.read_before + len(self.buffer)
        raise Refused(f"the archive is truncated: it has no end-of-archive mark, and ends at byte {ends}")

    def _end(self) -> None:
        """At the mark of zeros: what comes behind is nothing but zeros, or would be lost."""
        self.report.ends_at = self.written + self.position - self.sent
        self._pass_on()
        while self.zeros_from is None or self._offset() < self.zeros_from:
            rest = self.buffer[self.position :]
            if rest.count(0) < len(rest):
                self._behind(rest)
            self.position = self.sent = len(self.buffer)
            if not self._have(1):
                break
        if not self.report.members:
            raise Refused("the archive is empty")
        self._write(_ZEROS * 2)

    def _behind(self, rest: bytes) -> None:
        at = (len(rest) - len(rest.lstrip(b"\0"))) // _BLOCK * _BLOCK
        what = "another archive begins" if contents.is_tar_header(rest[at : at + _BLOCK]) else "there are other data"
        raise Refused(f"{what} behind the end of the archive, at byte {self._offset() + at}; pack all as one archive")

    # what describes the next member

    def _extended(self, header: bytes) -> None:
        size = tarheader.number(header[124:136])
        body = self._body(header, size, _LONGEST_PAX, "an extended header")
        if self.described:
            raise Refused("the archive is corrupt: two extended headers for one file")
        self.described = True
        try:
            self.pax = paxheader.sort(paxheader.parse(body))
        except Refused as error:
            raise Refused(self._about(body, str(error))) from None
        self._replace(header, size, self.pax)

    def _about(self, body: bytes, text: str) -> str:
        """With the name of the file that an extended header belongs to."""
        if text.startswith("the archive"):
            return text
        name = re.search(rb"(?:\A|\n)[0-9]+ path=([^\n]*)\n", body)
        if name is None and self._have(_BLOCK + -(-len(body) // _BLOCK) * _BLOCK + _BLOCK):
            start = self.position + _BLOCK + -(-len(body) // _BLOCK) * _BLOCK
            return f"{_shown(tarheader.name(self.buffer[start : start + _BLOCK]))}: {text}"
        return f"{_shown(name[1])}: {text}" if name else text

    def _describing(self, header: bytes, kind: int) -> None:
        size = tarheader.number(header[124:136])
        if kind in b"g":
            body = self._body(header, size, _LONGEST_PAX, "a global header")
            self._replace(header, size, paxheader.sort_global(paxheader.parse(body)))
            return
        body = self._body(header, size, _LONGEST_NAME, "the header of a long name")
        if kind in b"L":
            self.long_name = body.split(b"\0", 1)[0]
        self.position += _BLOCK + -(-size // _BLOCK) * _BLOCK

    def _replace(self, header: bytes, size: int, records: paxheader.Sorted) -> None:
        """Pass an extended header on, with those records only that tar shall see."""
        for key in records.dropped:
            word = key.decode(errors="replace")
            if word in self.report.dropped or len(self.report.dropped) < _MOST_NAMES:
                self.report.dropped[word] = self.report.dropped.get(word, 0) + 1
        length = _BLOCK + -(-size // _BLOCK) * _BLOCK
        if records.changed:
            self._pass_on()
            self._write(paxheader.build(header, records.kept))
            self.sent += length
        self.position += length

    # members

    def _member(self, header: bytes, kind: int) -> None:
        if kind not in _CONTENT and kind not in _NO_CONTENT:
            name = self._path(header, {})
            raise Refused(f"{_shown(name)} is {_ODD.get(kind, f'a member of the unknown type {chr(kind)!a}')}")
        values = dict(self.pax.kept) if self.described else {}
        size = tarheader.value(values, b"size", header[124:136]) if kind in _CONTENT else 0
        if kind in b"D" or b"GNU.dumpdir" in values:
            self._whole_directory(header, size if kind in b"D" else 0, values)
        self._count(header, kind, size)
        self._owners(header, values)
        if self.pax.deferred or self.report.deferred:
            self._defer(self._path(header, values))
        self._agree(header, values)
        self.position += _BLOCK
        if kind in b"S":
            self._sparse_map(header)
        if self.described:
            self.pax, self.described = paxheader.Sorted(), False
        self.long_name = None
        self._skip(size)

    def _agree(self, header: bytes, values: dict[bytes, bytes]) -> None:
        """bsdtar's mode is not that of its ACL, whose mask tar would then set to the mode's."""
        bits = posixacl.mode(values.get(paxheader.ACCESS, b""))
        if bits is not None and tarheader.number(header[100:108]) & 0o777 != bits:
            self._pass_on()
            self._write(tarheader.with_permissions(header, bits))
            self.sent += _BLOCK

    def _path(self, header: bytes, values: dict[bytes, bytes]) -> bytes:
        named = values.get(b"GNU.sparse.name") or values.get(b"path")
        return named or (self.long_name if self.long_name is not None else tarheader.name(header))

    def _whole_directory(self, header: bytes, size: int, values: dict[bytes, bytes]) -> None:
        """A directory of an incremental archive lists all its files; those that were not dumped would be missing."""
        listed = values.get(b"GNU.dumpdir")
        listed = self._body(header, size, _LONGEST_DUMPDIR, "a directory's list") if listed is None else listed
        left_out = [name for name in listed.split(b"\0") if name[:1] in (b"N", b"R", b"T")]
        if left_out:
            where = self._path(header, values).rstrip(b"/") + b"/" + left_out[0][1:]
            raise Refused(f"{_shown(where)} is not in it, since it is an incremental archive; pack all of it")

    def _count(self, header: bytes, kind: int, size: int) -> None:
        report = self.report
        if kind in b"V":
            return
        report.members += kind not in b"1"
        xattrs = self.pax.xattr_bytes() if self.pax.kept or self.pax.deferred else 0
        if xattrs > _IN_ONE_BLOCK:
            if not self.large_xattrs:
                raise _Stop(LARGE_XATTRS)
            report.members += len(self.pax.kept)
        blocks = -(-size // 4096) + (kind in b"5D") + (kind in b"2") - (-xattrs // 4096) * (xattrs > _IN_THE_INODE)
        report.bytes += blocks * 4096 + len(self.long_name or b"") + 64
        if report.needs > self.most_bytes:
            raise _Stop(BEYOND)

    def _owners(self, header: bytes, values: dict[bytes, bytes]) -> None:
        """Which number goes with which name, for ACLs that know names only. To chown, the last number is no number."""
        raw = header[108:124] + header[265:329]
        if raw in self.seen_owners and not values:
            return
        for known, key, name, number in (
            (self.report.users, b"u", header[265:297], header[108:116]),
            (self.report.groups, b"g", header[297:329], header[116:124]),
        ):
            value = tarheader.value(values, key + b"id", number)
            if value == paxheader.NOBODY:
                raise Refused(f"{_shown(self._path(header, values))}: {paxheader.NOBODYS}")
            word = os.fsdecode(values.get(key + b"name") or name.split(b"\0", 1)[0])
            if word and header[257:262] == b"ustar" and len(self.seen_owners) < _MOST_NAMES:
                known[word] = value if known.get(word, value) == value else -1
        if not values:
            self.seen_owners.add(raw)

    def _defer(self, path: bytes) -> None:
        """Keep attributes for later; those of an earlier file of the same name are not this one's."""
        name = os.fsdecode(b"/".join(part for part in path.split(b"/") if part not in (b"", b".")))
        self.report.deferred.pop(name, None)
        if self.pax.deferred:
            values = {os.fsdecode(key): base64.b64encode(value).decode() for key, value in self.pax.deferred.items()}
            self.deferred_bytes += len(name) + sum(len(key) + len(value) for key, value in values.items())
            if self.deferred_bytes > _MOST_DEFERRED:
                raise Refused("its ACLs by names, SELinux labels and trusted attributes are too many; pack it without")
            self.report.deferred[name] = values

    def _sparse_map(self, header: bytes) -> None:
        """The further blocks of an old sparse file's map stand between header and content."""
        if header[257:265] != b"ustar  \0":
            raise Refused(f"{_shown(tarheader.name(header))} is a sparse file in a form other than GNU tar's")
        more = header[482]
        while more:
            if not self._have(_BLOCK):
                self._truncated()
            more = self.buffer[self.position + 504]
            self.position += _BLOCK


def _shown(name: bytes) -> str:
    """A name as part of a line."""
    return ascii(name.decode(errors="replace").rstrip("/"))[1:-1] or "/"
