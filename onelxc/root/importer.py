"""How does a tar archive become the disk that it stands for? A sparse ext4 image, renamed over the archive.

The image is made beside the archive as a file without a name, so that whatever is killed leaves nothing; it gets a
name only when every byte has been written, and takes the archive's place by rename: a crash leaves either the archive
or the finished image. Owner and mode of the archive go over to the image, as OpenNebula's user has to be able to move
and delete it. One pass: the image is made as large as the archive says it needs, and is made smaller or anew where
that was wrong.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onelxc import command
from onelxc.errors import CommandError, OneLxcError, StorageError
from onelxc.root import archive as archives
from onelxc.root import cache as caches
from onelxc.root import copies, filesystems, gunzip, jail, layout, loops, rootfs, writeout

Log = Callable[[str], None]

_MIB = 1 << 20
_CHUNK = 256 << 10
_SLACK = 64 * _MIB
_RESERVE = 32 * _MIB
"""What an import leaves free in the datastore at least."""
_BOMB_FACTOR = 32
_BOMB_FLOOR = 512 * _MIB
_FEATURES = (
    "none,has_journal,ext_attr,resize_inode,dir_index,filetype,extent,flex_bg,sparse_super,large_file,huge_file,"
    "dir_nlink,extra_isize,64bit,metadata_csum"
)
"""Named one by one: what mke2fs 1.47 takes by default (orphan_file) is unknown to e2fsck 1.46 of the next host."""

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
    "--xattrs-include=*",
    "--acls",
    "--sparse",
    "--block-number",
    "--blocking-factor=512",
    "--warning=no-timestamp",
    "--warning=no-unknown-keyword",
    "--warning=no-xattr-write",
)
_COPY = ("cp", "--archive", "--sparse=auto", f"{jail.SOURCE}/.", f"{jail.TARGET}/")
_NO_SPACE = re.compile("No space left on device|Wrote only [0-9]+ of")


@dataclass(frozen=True)
class Limits:
    """The administrator's limits (host.conf)."""

    seconds: float = 1800.0
    largest_mb: int | None = None
    """What an archive may unpack to where DISK/SIZE is not larger; None leaves it to the archive's own size."""


def import_archive(
    dir_fd: int,
    name: str,
    *,
    size_mb: int | None,
    init: str | None,
    log: Log,
    abort: Callable[[], None],
    limits: Limits = Limits(),
    cache: caches.Cache | None = None,
) -> bool:
    """Turn the archive `name` (a regular file in the directory `dir_fd`) into an image; False if it is no archive.

    `size_mb` is DISK/SIZE, `init` the init that a root file system must hold (None for a data disk). `abort` is called
    several times a second and ends the import by raising. `cache` may know the archive, and learns it if not.
    """
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
    dir_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)  # an O_PATH one takes no fsync
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return False
        try:
            archive = archives.detect(fd)
            if archive is None or (archive.compression == "squashfs" and init is None):
                return False  # a squashfs with data is mounted as it is, read-only
            _Import(dir_fd, name, fd, archive, size_mb, init, log, abort, limits, cache).run()
        except (StorageError, CommandError) as error:
            text = str(error)
            raise StorageError(text if text.startswith("Cannot ") else f"Cannot import {name}: {text}") from error
        except OSError as error:
            raise StorageError(f"Cannot import {name}: {error.strerror}") from error
        return True
    finally:
        os.close(fd)
        os.close(dir_fd)


class _TooSmall(Exception):
    """The image that was made could not hold the content."""


@dataclass
class _Import:
    dir_fd: int
    name: str
    fd: int
    archive: archives.Archive
    size_mb: int | None
    init: str | None
    log: Log
    abort: Callable[[], None]
    limits: Limits
    cache: caches.Cache | None
    sha256: str = ""

    def run(self) -> None:
        if self._from_cache():
            return
        began = time.monotonic()
        wanted = (self.size_mb or 0) * _MIB
        largest = self._largest(wanted)
        estimate = max(wanted, self._estimate())
        sizes = [size for size in (min(estimate, largest), largest) if size]
        if self.archive.unpacked is not None and self.archive.unpacked > largest:
            raise StorageError(self._beyond(largest, self.archive.unpacked))
        for size in dict.fromkeys(sizes):
            image = self._temporary()
            try:
                content = self._fill(image, size)
                final = self._fit(image, size, max(wanted, content + content // 8 + _SLACK))
                if self.cache is not None:
                    sha256 = self.sha256 or caches.digest(self.fd, self.archive.content, self.abort)
                    self.cache.add(self.archive.content, sha256, image, self.size_mb or 0, self.abort)
                self._replace(image)
            except _TooSmall:
                continue
            finally:
                os.close(image)
                self._remove_temporary()
            self.log(
                f"imported {self.name} ({self._kind()}, {self.archive.end >> 20} MiB) as ext4:"
                f" {content >> 20} MiB in {final >> 20} MiB, {time.monotonic() - began:.1f} s"
            )
            return
        raise StorageError(self._beyond(largest, None))

    def _kind(self) -> str:
        return self.archive.compression + ("" if self.archive.compression == "squashfs" else " tar")

    def _from_cache(self) -> bool:
        """Start from the image of an earlier import, if there is one. Its trouble is not the deploy's."""
        if self.cache is None or self.cache.max_mb <= 0:
            return False
        began = time.monotonic()
        found = None
        if self.cache.may_hold(self.archive.content):
            sha256 = caches.digest(self.fd, self.archive.content, self.abort)
            found = self.cache.find(self.archive.content, sha256, self.size_mb or 0)
        if found is None:
            self.log("import cache: miss")
            return False
        image = -1
        try:
            image = self._temporary()
            shared = copies.clone(found, image)
            if not shared:
                self._look_for_space(os.fstat(found).st_blocks * 512)
                copies.copy(found, image, self.abort)
            self._replace(image)
        except (OSError, StorageError) as error:
            self.log(f"import cache: a hit that could not be used: {error}")
            return False
        finally:
            os.close(found)
            if image >= 0:
                os.close(image)
                self._remove_temporary()
        how = "shared" if shared else "copied"
        self.log(f"import cache: hit, {self.name} {how} in {time.monotonic() - began:.1f} s")
        return True

    def _estimate(self) -> int:
        """An image's size that holds the content in most cases: tar's blocks are smaller than ext4's."""
        unpacked = self.archive.unpacked if self.archive.unpacked is not None else 4 * self.archive.end
        return _round(unpacked + unpacked // 4 + _SLACK)

    def _largest(self, wanted: int) -> int:
        """What the content may take: the disk's size, or what an archive of this size can honestly hold; free space."""
        honest = (
            self.limits.largest_mb * _MIB if self.limits.largest_mb else _BOMB_FACTOR * self.archive.end + _BOMB_FLOOR
        )
        self._look_for_space(self.archive.unpacked if self.archive.unpacked is not None else self.archive.end)
        return max(_round(honest), wanted)

    def _look_for_space(self, need: int) -> None:
        space = os.fstatvfs(self.dir_fd)
        free = space.f_bavail * space.f_frsize - _RESERVE
        if free < need:
            raise StorageError(
                f"no space left: it needs {(need >> 20) + 1} MiB in the datastore, {max(free, 0) >> 20} MiB are free"
            )

    def _beyond(self, largest: int, unpacked: int | None) -> str:
        what = f"{unpacked >> 20} MiB" if unpacked else "the archive's content"
        return (
            f"{what} does not fit into {largest >> 20} MiB, the most that an archive of {self.archive.end >> 10} KiB"
            " may unpack to here; give the disk a larger SIZE if it is right"
        )

    def _temporary(self) -> int:
        """A file without a name beside the archive; where the file system has no such thing (NFS), one with the name
        that the journal knows.
        """
        try:
            return os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.dir_fd)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT):
                raise
        self._remove_temporary()
        return os.open(
            self._temporary_name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self.dir_fd
        )

    @property
    def _temporary_name(self) -> str:
        return os.path.basename(temporary_name(self.name))

    def _remove_temporary(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._temporary_name, dir_fd=self.dir_fd)

    def _fill(self, image: int, size: int) -> int:
        """Make the file system and unpack into it; gives the bytes in use. _TooSmall if the content does not fit."""
        os.ftruncate(image, 0)
        os.ftruncate(image, size)
        _make_ext4(image)
        options: dict[str, str | None] = {"data": "writeback", "nobarrier": None, "noinit_itable": None}
        with loops.attach(image, name=self.name) as loop:
            mount_fd = filesystems.mount(loop.path, "ext4", read_only=False, nodev=True, options=options)
        try:
            with writeout.WriteOut(mount_fd, image) as out:
                with contextlib.suppress(OSError):
                    os.rmdir("lost+found", dir_fd=mount_fd)
                if self.archive.compression == "squashfs":
                    self._copy(mount_fd, out)
                else:
                    self._unpack(mount_fd, out)
                layout.hoist(mount_fd)
                if self.init is not None:
                    rootfs.find_init(mount_fd, self.init)
                try:
                    out.finish()
                except OSError as error:
                    self._no_space_or(f"writing the image failed: {error.strerror}")
            space = os.fstatvfs(mount_fd)
            return size - space.f_bfree * space.f_frsize
        finally:
            os.close(mount_fd)

    def _no_space_or(self, text: str) -> None:
        self._watch_space(4 * _RESERVE)
        raise StorageError(text)

    def _watch_space(self, reserve: int = _RESERVE // 2) -> None:
        space = os.fstatvfs(self.dir_fd)
        if space.f_bavail * space.f_frsize < reserve:
            raise StorageError("no space left in the datastore while unpacking")

    def _watch(self, out: writeout.WriteOut, stderr: str) -> bool:
        """Several times a second while the jail is at work. True: no more of it."""
        self.abort()
        self._watch_space()
        out.begin()
        return _NO_SPACE.search(stderr) is not None

    def _unpack(self, mount_fd: int, out: writeout.WriteOut) -> None:
        watch = functools.partial(self._watch, out)
        unpacker = gunzip.main if self.archive.compression == "gzip" else self.archive.decompressor
        filters = [jail.Filter(unpacker)] if unpacker else []
        outcome = jail.unpack(mount_fd, _TAR, filters, self._chunks(), watch, limit_s=self.limits.seconds)
        if _NO_SPACE.search(outcome.stderr):
            raise _TooSmall
        for one in outcome.filters:
            if one.status not in (0, -13):
                said = _first_line(one.stderr) or f"{self.archive.compression} failed"
                raise StorageError(f"the archive is corrupt or truncated: {said}")
        if outcome.status != 0:
            said = _first_line(outcome.stderr) or f"exit code {outcome.status}"
            # what a decompressor without checksums, or with one at the end that tar never comes to, lets through
            broken = "Skipping to next header" in outcome.stderr or "not look like a tar archive" in outcome.stderr
            raise StorageError(f"{'the archive is corrupt: ' if broken else ''}tar: {said}")
        if "** Block of NULs **" not in outcome.stdout:
            raise StorageError("the archive is truncated: it has no end-of-archive mark")

    def _copy(self, mount_fd: int, out: writeout.WriteOut) -> None:
        """Out of a squashfs: the kernel reads it, cp writes what it finds."""
        watch = functools.partial(self._watch, out)
        with loops.attach(self.fd, read_only=True, name=self.name) as loop:
            source = filesystems.mount(loop.path, "squashfs", read_only=True, nodev=True)
        try:
            outcome = jail.unpack(mount_fd, _COPY, (), (), watch, limit_s=self.limits.seconds, source_fd=source)
        finally:
            os.close(source)
        if _NO_SPACE.search(outcome.stderr):
            raise _TooSmall
        if outcome.status != 0:
            raise StorageError(_first_line(outcome.stderr) or f"cp: exit code {outcome.status}")

    def _chunks(self) -> Iterator[bytes]:
        sha = hashlib.sha256()
        known = self.archive.content if self.cache is not None and self.cache.max_mb > 0 else 0
        position = 0
        while position < self.archive.end:
            chunk = os.pread(self.fd, min(_CHUNK, self.archive.end - position), position)
            if not chunk:
                return
            if position < known:
                sha.update(memoryview(chunk)[: known - position])
            position += len(chunk)
            yield chunk
        self.sha256 = sha.hexdigest()

    def _fit(self, image: int, size: int, wanted: int) -> int:
        """Cut an image that came out much larger than anyone asked for; OpenNebula 3.2.1 copies every byte of it."""
        path = f"/proc/self/fd/{image}"
        _wait_unmounted(path)
        wanted = _round(wanted)
        if size <= wanted + max(wanted // 2, 2 * _SLACK):
            return size
        with contextlib.suppress(CommandError):
            command.run(
                ["resize2fs", "-f", path, f"{wanted >> 10}K"],
                pass_fds=(image,),
                timeout_s=self.limits.seconds,
                verb="shrink the image",
            )
        size = filesystems.ext_bytes(path)
        os.ftruncate(image, size)
        return size

    def _replace(self, image: int) -> None:
        """Give the image the archive's owner, mode and name, durably, in this order."""
        status = os.fstat(self.fd)
        os.fchown(image, status.st_uid, status.st_gid)
        os.fchmod(image, stat.S_IMODE(status.st_mode) & 0o777)
        try:
            os.fsync(image)
        except OSError as error:
            self._no_space_or(f"writing the image failed: {error.strerror}")
        self.abort()
        if not os.fstat(image).st_nlink:
            self._remove_temporary()
            os.link(f"/proc/self/fd/{image}", self._temporary_name, dst_dir_fd=self.dir_fd, follow_symlinks=True)
        os.rename(self._temporary_name, self.name, src_dir_fd=self.dir_fd, dst_dir_fd=self.dir_fd)
        os.fsync(self.dir_fd)


def temporary_name(path: str) -> str:
    """The name that a finished image has for a moment, beside `path`; the journal has to know it before."""
    return os.path.join(os.path.dirname(path), f".onelxc-{os.path.basename(path)}.{os.getpid()}")


def _make_ext4(image: int) -> None:
    argv = ["mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-i", "8192", "-m", "0", "-O", _FEATURES]
    argv += ["-E", "lazy_itable_init=1,lazy_journal_init=1,discard", f"/proc/self/fd/{image}"]
    command.run(argv, pass_fds=(image,), verb="make the image's file system")


def _wait_unmounted(path: str, limit_s: float = 20.0) -> None:
    """The file system is let go when the last descriptor closes; wait until its superblock says so."""
    deadline = time.monotonic() + limit_s
    while not filesystems.ext_is_clean(path):
        if time.monotonic() > deadline:
            raise StorageError("the new image did not become clean after unmounting")
        time.sleep(0.01)


def _first_line(text: str) -> str:
    """A program's complaint without its own name and tar's block numbers."""
    for line in text.splitlines():
        line = re.sub(r"^(?:\S*/)?(?:tar|gzip|xz|zstd|bzip2|lz4|cp)\s*:\s*", "", line.strip())
        line = re.sub(r"^block \d+:\s*", "", line)
        if line and not line.startswith("Removing leading") and "Warning:" not in line:
            return line
    return ""


def _round(size: int) -> int:
    return (size + _MIB - 1) // _MIB * _MIB


__all__ = ["Limits", "OneLxcError", "import_archive"]
