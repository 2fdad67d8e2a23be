"""Puts in an archive's place the disk that it stands for.

What is inside decides: a tar becomes a sparse ext4 image, a compressed image is unpacked. It is made beside the archive
as a file without a name, so that whatever is killed leaves nothing; it gets a name only when every byte has been
written, and takes the archive's place by rename: a crash leaves either the archive or the finished image. Owner and
mode of the archive go over to the image, as OpenNebula's user has to be able to move and delete it. One pass: the
image is made as large as the archive says it needs; where that was wrong it is measured, and the image made anew.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from onelxc.errors import CommandError, OneLxcError, StorageError
from onelxc.root import archive as archives
from onelxc.root import (
    attributes,
    contents,
    copies,
    ext4image,
    filesystems,
    layout,
    loops,
    newfile,
    rootfs,
    unpacking,
    writeout,
)
from onelxc.root import cache as caches
from onelxc.root.unpacking import Limits

Log = Callable[[str], None]

_MIB = 1 << 20
_CHUNK = 256 << 10
_SLACK = 64 * _MIB
_RESERVE = 32 * _MIB
"""What an import leaves free in the datastore at least."""
_BOMB_FACTOR = 32
_BOMB_FLOOR = 512 * _MIB


def import_archive(
    dir_fd: int,
    name: str,
    *,
    size_mb: int | None,
    init: str | None,
    log: Log,
    abort: Callable[[], None],
    limits: Limits = Limits(),  # noqa: B008
    cache: caches.Cache | None = None,
) -> bool:
    """Turn the archive `name` (a regular file in the directory `dir_fd`) into an image; False if it is no archive.

    A compressed image of squashfs for a root file system is turned twice.

    `size_mb` is DISK/SIZE, `init` the init that a root file system must hold (None for a data disk). `abort` is called
    several times a second and ends the import by raising. `cache` may know the archive, and learns it if not.
    """
    turned = False
    dir_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=dir_fd)  # an O_PATH one takes no fsync
    try:
        while True:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=dir_fd)
            try:
                archive = archives.detect(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else None
                if archive is None or (archive.compression == "squashfs" and init is None):
                    return turned  # a squashfs with data is mounted as it is, read-only
                _Import(dir_fd, name, fd, archive, size_mb, init, log, abort, limits, cache).run()
                turned = True
            finally:
                os.close(fd)
    except (StorageError, CommandError) as error:
        text = str(error)
        raise StorageError(text if text.startswith("Cannot ") else f"Cannot import {name}: {text}") from error
    except OSError as error:
        raise StorageError(f"Cannot import {name}: {error.strerror}") from error
    finally:
        os.close(dir_fd)


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
        inside = self._inside()
        image = newfile.make(self.dir_fd, self.name)
        try:
            (self._unpack_image if inside is not None else self._make)(image, inside or "")
            self._keep(image, 0 if inside is not None else self.size_mb or 0)
            self._replace(image)
        except unpacking.Beyond:
            raise StorageError(self._beyond()) from None
        finally:
            os.close(image)
            newfile.remove(self.dir_fd, self.name)

    @functools.cached_property
    def _unpacking(self) -> unpacking.Unpacking:
        return unpacking.Unpacking(self.archive, self._chunks, self.limits)

    def _inside(self) -> str | None:
        """The name of the image that is inside; None for a tree of files. StorageError for anything else."""
        kind = self.archive.compression
        if kind in ("plain", "squashfs"):
            return None
        head = self._unpacking.peek(lambda _: self._watch())
        found = contents.look(head)
        if found is not None and found.use == contents.TAR:
            return None
        if found is not None and found.use == contents.IMAGE:
            return found.name
        if not head.strip(b"\0"):
            short = len(head) < contents.HEAD
            raise StorageError("the archive is empty" if short else f"the {kind} file begins with {len(head)} zeros")
        what = "something unknown" if found is None else found.name
        if found is not None and found.use == contents.COMPRESSED:
            what = f"another compressed file ({found.name})"
        raise StorageError(f"in the {kind} file is {what}: {contents.USABLE}")

    @property
    def _wanted(self) -> int:
        return (self.size_mb or 0) * _MIB

    def _largest(self) -> int:
        """What the content may take: the disk's size, or what an archive of this size can honestly hold."""
        largest = self.limits.largest_mb
        honest = largest * _MIB if largest else _BOMB_FACTOR * self.archive.end + _BOMB_FLOOR
        return max(_round(honest), self._wanted)

    def _look_ahead(self) -> int:
        """The largest that is allowed; StorageError where it is known to be too small, or the datastore is."""
        largest, unpacked = self._largest(), self.archive.unpacked
        self._look_for_space(unpacked if unpacked is not None else self.archive.end)
        if self.archive.exact and unpacked is not None and unpacked > largest:
            raise StorageError(self._beyond(unpacked))
        return largest

    def _unpack_image(self, image: int, inside: str) -> None:
        """Write the image that is inside a compressed file."""
        began = time.monotonic()
        self._unpacking.image(image, self._look_ahead(), lambda _: self._watch())
        self.log(
            f"unpacked {self.name} ({self.archive.compression}, {self.archive.end >> 20} MiB): {inside},"
            f" {os.fstat(image).st_size >> 20} MiB, {time.monotonic() - began:.1f} s"
        )

    def _make(self, image: int, _: str) -> None:
        """Make a file system with the archive's files; a second time, for what it holds, where the first was small."""
        began = time.monotonic()
        largest = self._look_ahead()
        size, inodes = max(self._wanted, min(self._estimate(), largest)), 0
        large_xattrs = measured = False
        while True:
            try:
                content = self._fill(image, size, inodes, largest, large_xattrs)
                break
            except unpacking.LargeXattrs:
                large_xattrs = True
            except unpacking.TooSmall as error:
                if measured:
                    raise StorageError(f"an image of {size >> 20} MiB cannot hold the content: {error}") from None
                (size, inodes), measured = self._measure(largest), True
        final = ext4image.fit(image, size, max(self._wanted, content + content // 8 + _SLACK), self.limits.seconds)
        self.log(
            f"imported {self.name} ({self._kind()}, {self.archive.end >> 20} MiB) as ext4:"
            f" {content >> 20} MiB in {final >> 20} MiB, {time.monotonic() - began:.1f} s"
        )

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
            found = self.cache.find(self.archive.content, sha256, self.size_mb or 0, data=self.init is None)
        if found is None:
            self.log("import cache: miss")
            return False
        image = -1
        try:
            image = newfile.make(self.dir_fd, self.name)
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
                newfile.remove(self.dir_fd, self.name)
        how = "shared" if shared else "copied"
        self.log(f"import cache: hit, {self.name} {how} in {time.monotonic() - began:.1f} s")
        return True

    def _estimate(self) -> int:
        """An image's size that holds the content in most cases: tar's blocks are smaller than ext4's."""
        unpacked = self.archive.unpacked if self.archive.unpacked is not None else 4 * self.archive.end
        return _round(unpacked + unpacked // 4 + _SLACK)

    def _measure(self, largest: int) -> tuple[int, int]:
        """The size and the number of inodes of an image that holds the content in any case."""
        if self.archive.compression == "squashfs":
            return largest, int.from_bytes(os.pread(self.fd, 4, 4), "little") + ext4image.SPARE_INODES
        report = self._unpacking.measure(largest, lambda _: self._watch())
        size = ext4image.room_for(report.needs) + _SLACK
        return max(_round(size), self._wanted), report.members + report.members // 16 + ext4image.SPARE_INODES

    def _look_for_space(self, need: int) -> None:
        space = os.fstatvfs(self.dir_fd)
        free = space.f_bavail * space.f_frsize - _RESERVE
        if free < need:
            raise StorageError(
                f"no space left: it needs {(need >> 20) + 1} MiB in the datastore, {max(free, 0) >> 20} MiB are free"
            )

    def _beyond(self, unpacked: int | None = None) -> str:
        what = f"{unpacked >> 20} MiB" if unpacked else "the archive's content"
        return (
            f"{what} does not fit into {self._largest() >> 20} MiB, the most that an archive of"
            f" {self.archive.end >> 10} KiB may unpack to here; give the disk a larger SIZE if it is right"
        )

    def _keep(self, image: int, wanted_mb: int) -> None:
        """In the cache, where an image's size is a whole number of MiB."""
        if self.cache is not None and not os.fstat(image).st_size % _MIB:
            sha256 = self.sha256 or caches.digest(self.fd, self.archive.content, self.abort)
            self.cache.add(self.archive.content, sha256, image, wanted_mb, self.abort, data=self.init is None)

    def _fill(self, image: int, size: int, inodes: int, largest: int, large_xattrs: bool) -> int:
        """Make the file system and unpack into it; gives the bytes in use. TooSmall if the content does not fit."""
        os.ftruncate(image, 0)
        os.ftruncate(image, size)
        ext4image.make(image, inodes, large_xattrs=large_xattrs)
        options: dict[str, str | None] = {"data": "writeback", "nobarrier": None, "noinit_itable": None}
        with loops.attach(image, name=self.name) as loop:
            mount_fd = filesystems.mount(loop.path, "ext4", read_only=False, nodev=True, options=options)
        try:
            with writeout.WriteOut(mount_fd, image) as out:
                with contextlib.suppress(OSError):
                    os.rmdir("lost+found", dir_fd=mount_fd)
                try:
                    self._put(mount_fd, out, largest, large_xattrs)
                except unpacking.TooSmall as error:
                    space = os.fstatvfs(mount_fd)
                    if space.f_bavail * space.f_frsize > _MIB and space.f_favail:  # no room of another kind
                        raise StorageError(f"tar: {error}") from None
                    raise
                if self.init is not None:
                    left_out = layout.hoist(mount_fd)
                    if left_out:
                        self.log(f"left out beside rootfs/: {', '.join(left_out)}")
                    rootfs.find_init(mount_fd, self.init)
                try:
                    out.finish()
                except OSError as error:
                    self._no_space_or(f"writing the image failed: {error.strerror}")
            space = os.fstatvfs(mount_fd)
            return size - space.f_bfree * space.f_frsize
        finally:
            os.close(mount_fd)

    def _put(self, mount_fd: int, out: writeout.WriteOut, largest: int, large_xattrs: bool) -> None:
        """The content into the file system, with all its attributes."""
        watch = lambda _: self._watch(out)  # noqa: E731
        if self.archive.compression == "squashfs":
            with loops.attach(self.fd, read_only=True, name=self.name) as loop:
                source = filesystems.mount(loop.path, "squashfs", read_only=True, nodev=True)
            try:
                self._unpacking.copy(mount_fd, source, watch)
                if archives.has_xattrs(self.fd):
                    attributes.copy(source, mount_fd, self.abort)
            except OSError as error:
                if error.errno != errno.ENOSPC or large_xattrs:
                    raise
                raise unpacking.LargeXattrs from error
            finally:
                os.close(source)
            return
        report = self._unpacking.tar(mount_fd, largest, watch, large_xattrs=large_xattrs)
        attributes.restore(mount_fd, report)
        if report.dropped:
            words = ", ".join(f"{word} ({count})" for word, count in sorted(report.dropped.items())[:8])
            self.log(f"{self.name} has attributes that Linux does not know and that are left out: {words}")

    def _no_space_or(self, text: str) -> None:
        self._watch_space(4 * _RESERVE)
        raise StorageError(text)

    def _watch_space(self, reserve: int = _RESERVE // 2) -> None:
        space = os.fstatvfs(self.dir_fd)
        if space.f_bavail * space.f_frsize < reserve:
            raise StorageError("no space left in the datastore while unpacking")

    def _watch(self, out: writeout.WriteOut | None = None) -> bool:
        """Several times a second while the jail is at work."""
        self.abort()
        self._watch_space()
        if out is not None:
            out.begin()
        return False

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
                if position + len(chunk) >= known:
                    self.sha256 = sha.hexdigest()
            position += len(chunk)
            yield chunk

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
        newfile.replace(self.dir_fd, self.name, image)


def _round(size: int) -> int:
    return (size + _MIB - 1) // _MIB * _MIB


__all__ = ["Limits", "OneLxcError", "import_archive"]
