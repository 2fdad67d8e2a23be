"""Runs decompressors, the reader of tar streams, and GNU tar in the jail, and says in words what went wrong.

Nothing that these programs say is passed over: a line on stderr that is not known to be harmless fails the import.
Where the content goes to, and how large that has to be, is the importer's to know.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onelxc.errors import StorageError
from onelxc.root import contents, gunzip, jail, tarstream
from onelxc.root.archive import Archive

_MIB = 1 << 20
_MEMORY_BESIDE = 192 * _MIB
"""What a decompressor takes beside its window: buffers, threads, and what a forked child of ours has already."""
_TAR_MEMORY = 512 * _MIB
_READER_MEMORY = 512 * _MIB
_PROCESSES = 16
_CPUS = 8
"""Processor time beside each second of the clock: threads of xz, zstd and lz4."""
_PIECE = 1 << 20
_PAGE = 4096
_SPACE_FOR_REPORT = 128 * _MIB

_TAR = (
    "tar",
    "--extract",
    "--file=-",
    f"--directory={jail.TARGET}",
    "--numeric-owner",
    "--same-owner",
    "--preserve-permissions",
    "--delay-directory-restore",
    "--xattrs",
    "--xattrs-include=*",  # ACLs among them, see `paxheader`
    "--sparse",
    "--block-number",
    "--blocking-factor=512",
    "--warning=no-timestamp",  # a time in the future is a time
)
_HARMLESS = re.compile(
    "Removing leading `[./]+' from (member names|hard link targets)$"  # there is nothing outside of the root
    "|Extracting contiguous files as regular files$"  # as every file system does today
)
_MARK = re.compile(r"block ([0-9]+): \*\* Block of NULs \*\*")
_NO_SPACE = re.compile("No space left on device|Wrote only [0-9]+ of")
_CAUSES = (
    (r"nexpected end|remature end|unexpected EOF|truncated", "the archive is truncated"),
    (r"emory|[Ww]indow size|Allocation|emlimit", "it needs more memory than IMPORT_MEMORY of host.conf allows"),
    (r"ictionary", "unsupported: it was compressed with a dictionary"),
    (r"nsupported|not supported", "unsupported"),
)


@dataclass(frozen=True)
class Limits:
    """The administrator's limits (host.conf)."""

    seconds: float = 1800.0
    largest_mb: int | None = None
    """What an archive may unpack to where DISK/SIZE is not larger; None leaves it to the archive's own size."""
    memory_mb: int = 2048
    """The largest window or dictionary of a compressed archive."""


class TooSmall(Exception):
    """The file system could not hold the content."""


class LargeXattrs(Exception):
    """The file system has to be made for attributes that are larger than a block."""


class Beyond(Exception):
    """The archive holds more than is allowed."""


Watch = Callable[[str], bool]


@dataclass(frozen=True)
class Unpacking:
    """One archive, its bytes (`chunks` gives them anew at each call) and the limits."""

    archive: Archive
    chunks: Callable[[], Iterator[bytes]]
    limits: Limits

    def peek(self, watch: Watch) -> bytes:
        """The first bytes of what is inside."""
        fd = os.memfd_create("peek")
        try:
            endings = self._read(jail.Filter(functools.partial(_take, fd, contents.HEAD), fds=(fd,)), watch)
            head = os.pread(fd, contents.HEAD, 0)
        finally:
            os.close(fd)
        if len(head) < contents.HEAD:
            self._judge(endings[0])
        return head

    def image(self, fd: int, most_bytes: int, watch: Watch) -> None:
        """Write what is inside to the empty file `fd`, zeros as holes. Beyond if it is larger than allowed."""
        writer = functools.partial(_write_sparse, fd, most_bytes)
        limits = jail.Limits(file_bytes=most_bytes + _PIECE)
        *before, last = self._read(jail.Filter(writer, limits, (fd,)), watch)
        if last.status == tarstream.BEYOND:
            raise Beyond
        for one in before:
            self._judge(one)
        if last.status != 0:
            raise StorageError(f"writing the image failed: {_first_line(last.stderr)}")

    def measure(self, most_bytes: int, watch: Watch) -> tarstream.Report:
        """What the tar archive holds, by reading it once. Beyond if it is more than allowed."""
        with _report_file() as report:
            scanner = self._scanner(report, most_bytes, large_xattrs=True, forward=False)
            filters = [*self._filters(ours=False), scanner]
            *before, last = jail.read(filters, self.chunks(), watch, limit_s=self.limits.seconds)
            self._judge_reader(last, before)
            return tarstream.read_report(report)

    def tar(self, mount_fd: int, most_bytes: int, watch: Watch, *, large_xattrs: bool) -> tarstream.Report:
        """Unpack the tar archive into the detached mount."""
        with _report_file() as report:
            filters = [
                *self._filters(ours=False),
                self._scanner(report, most_bytes, large_xattrs=large_xattrs, forward=True),
            ]
            done = jail.unpack(
                mount_fd,
                _TAR,
                filters,
                self.chunks(),
                lambda said: watch(said) or _NO_SPACE.search(said) is not None,
                limit_s=self.limits.seconds,
                limits=self._limits(_TAR_MEMORY),
            )
            if _NO_SPACE.search(done.stderr):
                raise TooSmall(_first_line(done.stderr))
            *before, last = done.filters
            self._judge_reader(last, before, done)
            return self._judge_tar(done, tarstream.read_report(report))

    def copy(self, mount_fd: int, source_fd: int, watch: Watch) -> None:
        """Copy one detached mount into another."""
        argv = ("cp", "--archive", "--sparse=auto", f"{jail.SOURCE}/.", f"{jail.TARGET}/")
        stop: Watch = lambda said: watch(said) or _NO_SPACE.search(said) is not None  # noqa: E731
        limits = self._limits(_TAR_MEMORY)
        seconds = self.limits.seconds
        done = jail.unpack(mount_fd, argv, (), (), stop, limit_s=seconds, limits=limits, source_fd=source_fd)
        if _NO_SPACE.search(done.stderr):
            raise TooSmall(_first_line(done.stderr))
        if done.status != 0 or done.stderr.strip():
            raise StorageError(_first_line(done.stderr) or f"cp: exit code {done.status}")

    def _limits(self, memory_bytes: int) -> jail.Limits:
        return jail.Limits(memory_bytes, int(self.limits.seconds * _CPUS) + 1, _PROCESSES)

    def _filters(self, *, ours: bool = True) -> list[jail.Filter]:
        """The decompressor, if it is a process of its own; `ours`: also where the reader of tar could do it."""
        if self.archive.window > self.limits.memory_mb * _MIB:
            window = f"its window of {self.archive.window / _MIB:g} MiB"
            raise StorageError(f"{window} is more than IMPORT_MEMORY of host.conf allows ({self.limits.memory_mb} MiB)")
        one = self.archive.decompressor(self.limits.memory_mb)
        if not one or (callable(one) and not ours):
            return []
        limits = self._limits(self.limits.memory_mb * _MIB + _MEMORY_BESIDE)
        return [jail.Filter(functools.partial(gunzip.write, one) if callable(one) else one, limits)]

    def _scanner(self, report: int, most_bytes: int, *, large_xattrs: bool, forward: bool) -> jail.Filter:
        source = self.archive.decompressor(self.limits.memory_mb)
        scan = functools.partial(
            tarstream.scan,
            report,
            source if callable(source) else None,
            most_bytes=most_bytes,
            zeros_from=self.archive.content if self.archive.compression == "plain" else None,
            large_xattrs=large_xattrs,
            forward=forward,
        )
        limits = self._limits(_READER_MEMORY)
        return jail.Filter(
            scan, jail.Limits(limits.memory_bytes, limits.cpu_s, _PROCESSES, _SPACE_FOR_REPORT), (report,)
        )

    def _read(self, last: jail.Filter, watch: Watch) -> tuple[jail.Ending, ...]:
        return jail.read([*self._filters(), last], self.chunks(), watch, limit_s=self.limits.seconds)

    def _judge(self, ending: jail.Ending) -> None:
        """StorageError if the decompressor failed, or said anything; SIGPIPE is the doing of those behind it."""
        if ending.status in (0, -13) and not ending.stderr.strip():
            return
        said = _first_line(ending.stderr) or _ended(ending.status)
        cause = next((words for pattern, words in _CAUSES if re.search(pattern, said)), "the archive is corrupt")
        raise StorageError(f"{cause}: {self.archive.compression}: {said}")

    def _judge_reader(self, reader: jail.Ending, before: list[jail.Ending], after: jail.Ending | None = None) -> None:
        if reader.status == tarstream.BEYOND:
            raise Beyond
        if reader.status == tarstream.LARGE_XATTRS:
            raise LargeXattrs
        for one in [*before, reader] if reader.status == tarstream.BROKEN else before:
            self._judge(one)
        if reader.status == tarstream.REFUSED:
            raise StorageError(_first_line(reader.stderr))
        if reader.status != 0 and not (reader.status == -13 and after is not None):
            raise StorageError(f"the archive could not be read: {_first_line(reader.stderr) or _ended(reader.status)}")

    def _judge_tar(self, done: jail.Outcome, report: tarstream.Report) -> tarstream.Report:
        lines = [line for line in map(_plain_line, done.stderr.splitlines()) if line and not _HARMLESS.match(line)]
        if lines or done.status != 0:
            raise StorageError(f"tar: {lines[0] if lines else _ended(done.status)}")
        mark = _MARK.search(done.stdout)
        if mark is None or int(mark[1]) * 512 != report.ends_at:
            raise StorageError("tar did not read the archive to its end")
        return report


class _report_file:
    """A file without a name for a report."""

    def __enter__(self) -> int:
        self.fd = os.memfd_create("report")
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)


def _ended(status: int) -> str:
    return f"it was killed by signal {-status}" if status < 0 else f"exit code {status}"


def _take(fd: int, count: int) -> int:
    """stdin → `fd`, no more than so many bytes."""
    while count:
        data = os.read(0, min(count, _PIECE))
        if not data:
            break
        os.write(fd, data)
        count -= len(data)
    return 0


def _write_sparse(fd: int, most_bytes: int) -> int:
    """stdin → `fd`; pages of zeros become holes."""
    zeros = bytes(_PIECE)
    position = 0
    while True:
        data = _full(_PIECE)
        if not data:
            break
        if position + len(data) > most_bytes:
            return tarstream.BEYOND
        if data != zeros[: len(data)]:
            _write_pages(fd, data, position, zeros[:_PAGE])
        position += len(data)
    os.ftruncate(fd, position)
    return 0


def _full(count: int) -> bytes:
    """So many bytes of stdin, less at its end only."""
    parts = []
    while count:
        data = os.read(0, count)
        if not data:
            break
        parts.append(data)
        count -= len(data)
    return b"".join(parts)


def _write_pages(fd: int, data: bytes, position: int, zeros: bytes) -> None:
    view = memoryview(data)
    begin = at = 0
    while at <= len(data):
        page = view[at : at + _PAGE]
        if not page or page == zeros[: len(page)]:
            while begin < at:
                begin += os.pwrite(fd, view[begin:at], position + begin)
            begin = at + _PAGE
        at += _PAGE
    while begin < len(data):
        begin += os.pwrite(fd, view[begin:], position + begin)


def _plain_line(line: str) -> str:
    """A program's complaint without its own name and tar's block numbers."""
    line = re.sub(r"^(?:\S*/)?(?:tar|gzip|xz|zstd|bzip2|lz4|cp)\s*:\s*", "", line.strip())
    return re.sub(r"^block \d+:\s*", "", line)


def _first_line(text: str) -> str:
    return next((line for line in map(_plain_line, text.splitlines()) if line and not _HARMLESS.match(line)), "")
