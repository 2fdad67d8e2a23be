"""The file beside a disk that says which host has it open: made, read, refreshed, asked for and removed.

1024 bytes. The first half is the holder's: JSON, written once. The second half is for the word of whoever wants the
disk, and for the holder's answer. The time of last modification is the holder's last sign of life, by the file server's
clock; who writes a request puts that time back.

Everything is done with the owner's rights of the directory (as a file server that squashes root demands), and so that
it holds on NFS: a lease appears by link(2), whose outcome is read back, and goes by rename, which is looked at before
the file is removed. What a lease means, and when it is void, is for `leases` to say.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from onelxc import jsontext
from onelxc.root import syscalls

_HALF = 512
_LONGEST = 200
"""Of an image's name, in bytes: a lease's own name adds to it, and no name has more than 255."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_NO_LEASE = (errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.EACCES)
"""A link, a FIFO or socket that nobody serves, a directory, a file of somebody else's."""


@dataclass(frozen=True)
class Lease:
    """Who has a disk. `inode` is the lease file's own: a copy of it, made with a copy of the disk, has another."""

    host: str
    hostname: str
    boot: str
    vm_id: int
    disk_id: int
    token: str
    limit_s: float
    inode: int = 0


@dataclass(frozen=True)
class Seen:
    """A lease file as it was read. `lease` is None where it cannot be understood."""

    lease: Lease | None
    note: dict[str, Any]
    inode: int
    refreshed: float
    arrived: float
    """When the file came to be in this file system, or was last changed (ctime)."""

    @property
    def is_copy(self) -> bool:
        return self.lease is not None and self.lease.inode != self.inode


def name_for(image: str) -> str:
    """The lease of the file `image` in the same directory."""
    if len(os.fsencode(image)) > _LONGEST:
        import hashlib

        image = hashlib.sha256(os.fsencode(image)).hexdigest()
    return f".{image}.onelxc-lease"


def read(directory: int, name: str) -> Seen | None:
    """The lease of that name, None if there is none. OSError if that cannot be told."""
    with _as_owner(directory):
        return _read_at(directory, name)


def _read_at(directory: int, name: str) -> Seen | None:
    try:
        return _look(directory, name)
    except FileNotFoundError:
        return None


def _read(fd: int) -> Seen:
    status = os.fstat(fd)
    data = os.pread(fd, 2 * _HALF, 0) if stat.S_ISREG(status.st_mode) else b""
    content, note = _object(data[:_HALF]), _object(data[_HALF:])
    try:
        lease = Lease(
            host=str(content["host"]),
            hostname=str(content["hostname"]),
            boot=str(content["boot"]),
            vm_id=int(content["vm_id"]),
            disk_id=int(content["disk_id"]),
            token=str(content["token"]),
            limit_s=min(max(float(content["limit_s"]), 1.0), 3600.0),
            inode=int(content["inode"]),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        lease = None
    return Seen(lease, note, status.st_ino, status.st_mtime, status.st_ctime)


def _object(data: bytes) -> dict[str, Any]:
    try:
        found = jsontext.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def refresh(directory: int, name: str, token: str) -> Seen | None:
    """Give a sign of life if the lease is ours still, and tell what is there."""
    with _opened(directory, name, _READ) as fd:
        if fd is None:
            return _read_at(directory, name)
        seen = _read(fd)
        if _is_ours(seen, token):
            os.utime(fd)
        return seen


def write_note(directory: int, name: str, note: dict[str, str], *, sign_of_life: bool) -> None:
    """Ask the holder, answer, or (with {}) take a request back."""
    with _opened(directory, name, _WRITE) as fd:
        if fd is None:
            return
        before = os.fstat(fd)
        os.pwrite(fd, _padded(note), _HALF)
        os.fsync(fd)
        if not sign_of_life:
            os.utime(fd, ns=(before.st_atime_ns, before.st_mtime_ns))


def remove(directory: int, name: str, token: str) -> None:
    """Give up the lease with this token, if it is there, and whatever was left of making it."""
    aside = f"{name}.{token}.old"
    displace(directory, name, token, aside)
    with _as_owner(directory):
        for left in (f"{name}.{token}", aside):
            _unlink(directory, left)


def displace(directory: int, name: str, token: str, aside: str) -> bool:
    """Remove the lease with this token, by way of the name `aside`. One that has come in between is put back."""
    with _as_owner(directory):
        try:
            if not _is_ours(_look(directory, name), token):
                return False
            os.rename(name, aside, src_dir_fd=directory, dst_dir_fd=directory)
        except FileNotFoundError:
            return False
        found = _is_ours(_look(directory, aside), token)
        if not found:
            with contextlib.suppress(OSError):
                os.link(aside, name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        _unlink(directory, aside)
        return found


def _look(directory: int, name: str) -> Seen:
    """What is there, whatever it is: a link, a socket or what only others may read says nothing."""
    with _opened(directory, name, _READ) as fd:
        if fd is not None:
            return _read(fd)
        status = os.stat(name, dir_fd=directory, follow_symlinks=False)
        return Seen(None, {}, status.st_ino, status.st_mtime, status.st_ctime)


def _is_ours(seen: Seen | None, token: str) -> bool:
    """By the token; one that cannot be understood goes by the number of its file, as `token_of` gives it."""
    return seen is not None and token_of(seen) == token


def token_of(seen: Seen) -> str:
    return seen.lease.token if seen.lease is not None else f"inode-{seen.inode}"


class Draft:
    """A lease that is written but not yet in its place. Leaving the `with` block removes the draft."""

    def __init__(self, directory: int, name: str, lease: Lease) -> None:
        self._directory = directory
        self._name = name
        self._own = f"{name}.{lease.token}"
        self._lease = lease
        self._fd = -1

    def __enter__(self) -> Draft:
        with _as_owner(self._directory):
            _unlink(self._directory, self._own)  # of one who was killed while he renewed it
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._own, flags, 0o644, dir_fd=self._directory)
        try:
            os.fchmod(self._fd, 0o644)
            os.pwrite(self._fd, _content(self._lease, os.fstat(self._fd).st_ino) + _padded({}), 0)
            os.fsync(self._fd)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with _as_owner(self._directory):
            os.close(self._fd)
            _unlink(self._directory, self._own)

    def now(self) -> float:
        """The file server's time."""
        os.utime(self._fd)
        return os.fstat(self._fd).st_mtime

    def publish(self) -> bool:
        """Put it in its place; False if another one is there."""
        with _as_owner(self._directory):
            os.utime(self._fd)
            try:
                os.link(self._own, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileExistsError:
                pass  # it may be ours all the same: the server's first answer was lost, and the question repeated
            try:
                return _is_ours(_look(self._directory, self._name), self._lease.token)
            except FileNotFoundError:
                return False


def _content(lease: Lease, inode: int) -> bytes:
    return _padded({**asdict(lease), "inode": inode})


def _padded(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode() if content else b""
    if len(text) > _HALF - 1:
        raise ValueError("a lease does not fit into its file")
    return text.ljust(_HALF - 1) + b"\n"


def _unlink(directory: int, name: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        try:
            os.unlink(name, dir_fd=directory)
        except IsADirectoryError:
            with contextlib.suppress(OSError):  # what somebody has put into it is not ours to remove
                os.rmdir(name, dir_fd=directory)


@contextlib.contextmanager
def _opened(directory: int, name: str, flags: int) -> Iterator[int | None]:
    """A descriptor of the lease; None where there is none, or something that is no lease and cannot be opened."""
    with _as_owner(directory):
        try:
            fd = os.open(name, flags, dir_fd=directory)
        except OSError as error:
            if error.errno not in _NO_LEASE:
                raise
            yield None
            return
        try:
            yield fd
        finally:
            os.close(fd)


@contextlib.contextmanager
def _as_owner(directory: int) -> Iterator[None]:
    """With the rights of the directory's owner, in this thread, on files."""
    status = os.fstat(directory)
    with syscalls.file_ids(status.st_uid, status.st_gid):
        yield
