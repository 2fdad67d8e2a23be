"""Which archives have been imported on this host before, and where are their images? Import once, deploy many.

A directory of root's own with one sparse image for each archive and size, named after the archive's content. It may be
emptied at any moment and is never a reason to fail: whatever goes wrong here is a line in the log and an import.
Several deploys read, add and evict at the same time without a lock: an entry appears by one link(2), is read through a
descriptor that outlives its name, and is never written to.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from onelxc.errors import OneLxcError
from onelxc.root import copies, record

Log = Callable[[str], None]

_MIB = 1 << 20
_VERSION = "v2"
"""Of what an import makes. Images of another version have lost attributes that this one keeps: they go."""
_OTHER_VERSION = re.compile(r"v(?!2d?-)[0-9]+d?-.*\.ext4")
_NAME = re.compile(_VERSION + r"(d?)-([0-9]+)-([0-9a-f]{64})-([0-9]+)([ns])(?:\.([0-9a-f-]{36}))?\.ext4")
"""v2[d]-<bytes of the archive>-<sha256>-<MiB of the image><n or s>[.<boot>].ext4

`d`: of a data disk, where nothing is lifted out of `rootfs/`.

`n`: as large as its content wants (natural), `s`: as large as a DISK/SIZE asked for.

An image is not flushed when it is added (a deploy waits for it), so it counts only during the boot that is in its name,
until somebody found it flushed and renamed it.
"""
_KEEP_FREE = 20  # 1/20 of the file system


@dataclass(frozen=True)
class Entry:
    """One image in the cache. Times are seconds since the epoch; `bytes` what it takes, not how large it is."""

    name: str
    archive_bytes: int
    sha256: str
    size_mb: int
    natural: bool
    data: bool
    boot: str
    bytes: int
    used: float


class Cache:
    """The cache in `directory`, holding at most `max_mb`; 0 turns it off."""

    def __init__(self, directory: str, max_mb: int, log: Log) -> None:
        self.directory = directory
        self.max_mb = max_mb
        self.log = log

    def entries(self) -> list[Entry]:
        """What is in the cache, longest unused first. What does not belong there is passed over."""
        found = []
        try:
            names = os.listdir(self.directory)
        except OSError:
            return []
        for name in names:
            match = _NAME.fullmatch(name)
            try:
                status = os.lstat(os.path.join(self.directory, name))
            except OSError:
                continue
            if match:
                data, size, sha, mib, kind, boot = match.groups()
                taken, used = status.st_blocks * 512, status.st_mtime
                found.append(Entry(name, int(size), sha, int(mib), kind == "n", data == "d", boot or "", taken, used))
        return sorted(found, key=lambda entry: entry.used)

    def may_hold(self, archive_bytes: int) -> bool:
        """Whether it is worth reading an archive of this size once to know its content."""
        return self.max_mb > 0 and any(entry.archive_bytes == archive_bytes for entry in self.entries())

    def find(self, archive_bytes: int, sha256: str, wanted_mb: int, *, data: bool) -> int | None:
        """A descriptor of an image of this archive, one that can grow to `wanted_mb`; None if there is none."""
        boot = record.boot_id()
        fitting = [
            entry
            for entry in self.entries()
            if (entry.archive_bytes, entry.sha256, entry.data) == (archive_bytes, sha256, data)
            and entry.boot in ("", boot)
        ]
        fitting = [entry for entry in fitting if entry.natural or entry.size_mb <= wanted_mb]
        for entry in sorted(fitting, key=lambda entry: abs(entry.size_mb - wanted_mb)):
            try:
                return self._open(entry)
            except OSError as error:
                self.log(f"import cache: {entry.name}: {error.strerror}")
        return None

    def _open(self, entry: Entry) -> int:
        path = os.path.join(self.directory, entry.name)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            if os.fstat(fd).st_size != entry.size_mb * _MIB:
                raise OSError(errno.EIO, "its size is not what its name says")
            os.utime(path)
        except FileNotFoundError:
            pass  # evicted just now; what is open stays whole
        except BaseException:
            os.close(fd)
            raise
        return fd

    def add(
        self, archive_bytes: int, sha256: str, image: int, wanted_mb: int, abort: Callable[[], None], *, data: bool
    ) -> None:
        """Keep a copy of the finished image, if there is room. What the caller is told to give up passes through."""
        try:
            self._add(f"{_VERSION}{'d' if data else ''}-{archive_bytes}-{sha256}", image, wanted_mb, abort)
        except OSError as error:
            self.log(f"import cache: not kept: {error.strerror}")

    def _add(self, archive: str, image: int, wanted_mb: int, abort: Callable[[], None]) -> None:
        if self.max_mb <= 0:
            return
        status = os.fstat(image)
        need = status.st_blocks * 512
        os.makedirs(self.directory, 0o700, exist_ok=True)
        if need > self.max_mb * _MIB:
            self.log(f"import cache: not kept: {need >> 20} MiB are more than it may hold ({self.max_mb} MiB)")
            return
        self._make_room(need)
        space = os.statvfs(self.directory)
        if space.f_bavail * space.f_frsize < need + space.f_blocks * space.f_frsize // _KEEP_FREE:
            self.log(f"import cache: not kept: too little space is left in {self.directory}")
            return
        size_mb = status.st_size // _MIB
        kind = "n" if size_mb > wanted_mb else "s"
        name = f"{archive}-{size_mb}{kind}.{record.boot_id()}.ext4"
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        target = -1
        try:
            target = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
            shared = copies.copy(image, target, abort)
            # with a dir_fd, since without one Python calls link(2), which would link the symbolic link itself
            os.link(f"/proc/self/fd/{target}", name, dst_dir_fd=directory, follow_symlinks=True)
            self.log(f"import cache: kept for the next deploy ({'shared' if shared else f'{need >> 20} MiB'})")
        except FileExistsError:
            pass  # another deploy of the same archive was faster
        finally:
            os.close(directory)
            if target >= 0:
                os.close(target)

    def _make_room(self, need: int) -> None:
        """Evict what was unused longest until `need` bytes more are within the limit; entries of a crash go first."""
        boot = record.boot_id()
        self._remove_other_versions()
        entries = self.entries()
        for entry in entries:
            if entry.boot not in ("", boot):
                self._settle(entry, keep=False)
        entries = self.entries()
        for entry in entries:
            if entry.boot and time.time() - entry.used > 300:
                self._settle(entry, keep=True)
        entries = self.entries()
        total = sum(entry.bytes for entry in entries)
        while entries and total + need > self.max_mb * _MIB:
            oldest = entries.pop(0)
            total -= oldest.bytes
            self.log(f"import cache: {oldest.name} goes, unused for longest")
            self._remove(oldest)

    def _remove_other_versions(self) -> None:
        with contextlib.suppress(OSError):
            for name in filter(_OTHER_VERSION.fullmatch, os.listdir(self.directory)):
                os.unlink(os.path.join(self.directory, name))

    def _settle(self, entry: Entry, *, keep: bool) -> None:
        """An entry of an earlier boot may never have reached the disk; one of this boot has by now, nearly."""
        if not keep:
            self._remove(entry)
            return
        path = os.path.join(self.directory, entry.name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(path, path.replace(f".{entry.boot}.", "."))
        except FileNotFoundError:
            pass

    def _remove(self, entry: Entry) -> None:
        try:
            os.unlink(os.path.join(self.directory, entry.name))
        except FileNotFoundError:
            pass

    def empty(self) -> int:
        """Remove every entry; gives the bytes set free. Deploys that are copying one go on."""
        self._remove_other_versions()
        freed = 0
        for entry in self.entries():
            self._remove(entry)
            freed += entry.bytes
        return freed


def digest(fd: int, end: int, abort: Callable[[], None]) -> str:
    """The sha256 of the first `end` bytes of a file."""
    sha = hashlib.sha256()
    position = 0
    while position < end:
        abort()
        chunk = os.pread(fd, min(4 * _MIB, end - position), position)
        if not chunk:
            break
        sha.update(chunk)
        position += len(chunk)
    return sha.hexdigest()


def main(words: list[str], directory: str, max_mb: int) -> str:
    """`onelxc-root cache list` and `cache empty`, for people: the text to print."""
    cache = Cache(directory, max_mb, lambda text: None)
    if words == ["empty"]:
        return f"{cache.empty() >> 20} MiB set free in {directory}"
    if words != ["list"]:
        raise OneLxcError("Cannot run onelxc-root cache: it is `cache list` or `cache empty`")
    entries = cache.entries()
    lines = [f"{directory}: {sum(entry.bytes for entry in entries) >> 20} of {max_mb} MiB, {len(entries)} images"]
    for entry in reversed(entries):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        archive = f"archive of {entry.archive_bytes} bytes, sha256 {entry.sha256[:16]}…"
        lines.append(f"{used}  {entry.bytes >> 20:6} MiB  in an image of {entry.size_mb} MiB  {archive}")
    return "\n".join(lines)
