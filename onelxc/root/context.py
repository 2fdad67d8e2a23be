"""How do the files of a context ISO reach a container? Read here, in user space, into a small tmpfs of their own.

The ISO is never mounted: that would need a kernel with iso9660, and on hosts with contextualization packages their
udev rules would fire on the *host*. ISO 9660 with Rock Ridge names (what OpenNebula's mkisofs writes), every offset
checked against the image, since it may come from a tenant. Joliet is not needed then and not read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from onelxc.errors import StorageError
from onelxc.root import mounts, syscalls

_SECTOR = 2048
_DEPTH = 8
_ENTRIES = 10_000
_LIMIT = 256 << 20


@dataclass(frozen=True)
class Entry:
    """A file or directory of the ISO: its path below the top (`a/b`), where its bytes are, its permission bits."""

    path: str
    is_directory: bool
    offset: int
    size: int
    mode: int


class Iso:
    """An ISO image behind a descriptor. StorageError where it contradicts itself."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.count = 0
        self.total = 0
        descriptor = self._read(16 * _SECTOR, _SECTOR)
        if descriptor[:6] != b"\x01CD001":
            raise StorageError("Cannot read the context: it is not an ISO 9660 image")
        self.root = descriptor[156:190]
        self.block = int.from_bytes(descriptor[128:130], "little")
        if self.block not in (512, 1024, 2048):
            raise StorageError("Cannot read the context: the ISO image is damaged")
        self.skip = self._susp_skip()

    def entries(self) -> Iterator[Entry]:
        """Every directory before what is in it."""
        yield from self._directory(self.root, "", 0)

    def content(self, entry: Entry) -> bytes:
        """A file's bytes."""
        return self._read(entry.offset, entry.size)

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self.fd, size, offset)
        if len(data) != size:
            raise StorageError("Cannot read the context: the ISO image is truncated")
        return data

    def _susp_skip(self) -> int:
        """The SP entry of the root's own record says how many bytes precede the system use entries."""
        for name, data in self._system_use(self._records(self.root)[0], 0):
            if name == b"SP" and len(data) >= 3:
                return data[2]
        return 0

    def _records(self, record: bytes) -> list[bytes]:
        offset, size = _extent(record, self.block)
        if size > 4 << 20:
            raise StorageError("Cannot read the context: the ISO image is damaged")
        data = self._read(offset, size)
        found, position = [], 0
        while position < size:
            length = data[position]
            if length == 0:
                position = (position // _SECTOR + 1) * _SECTOR
                continue
            if length < 34 or position + length > size:
                raise StorageError("Cannot read the context: the ISO image is damaged")
            found.append(data[position : position + length])
            position += length
        if len(found) < 2:
            raise StorageError("Cannot read the context: the ISO image is damaged")
        return found

    def _system_use(self, record: bytes, skip: int) -> Iterator[tuple[bytes, bytes]]:
        """The SUSP entries of a record as (signature, data), with their continuation areas."""
        begin = 33 + record[32]
        area = record[begin + (begin & 1) + skip :]
        for _ in range(64):
            following = b""
            while len(area) >= 4 and 4 <= area[2] <= len(area):
                name, data = area[:2], area[4 : area[2]]
                area = area[area[2] :]
                if name == b"CE" and len(data) >= 24:
                    block, offset, length = (int.from_bytes(data[at : at + 4], "little") for at in (0, 8, 16))
                    following = self._read(block * self.block + offset, min(length, 1 << 16))
                elif name == b"ST":
                    break
                else:
                    yield name, data
            if not following:
                return
            area = following

    def _directory(self, record: bytes, path: str, depth: int) -> Iterator[Entry]:
        if depth > _DEPTH:
            raise StorageError("Cannot read the context: directories are nested too deeply")
        for child in self._records(record)[2:]:
            self.count += 1
            if self.count > _ENTRIES:
                raise StorageError(f"Cannot read the context: more than {_ENTRIES} files")
            name, mode = self._name_and_mode(child)
            below = f"{path}/{name}" if path else name
            offset, size = _extent(child, self.block)
            if child[25] & 2:
                yield Entry(below, True, offset, 0, mode & 0o777 if mode else 0o755)
                yield from self._directory(child, below, depth + 1)
            elif not mode or stat.S_ISREG(mode):
                self.total += size
                if self.total > _LIMIT:
                    raise StorageError(f"Cannot read the context: more than {_LIMIT >> 20} MiB")
                yield Entry(below, False, offset, size, mode & 0o777 if mode else 0o644)

    def _name_and_mode(self, record: bytes) -> tuple[str, int]:
        rock_ridge, mode = b"", 0
        for signature, data in self._system_use(record, self.skip):
            if signature == b"NM" and len(data) >= 1 and not data[0] & 6:
                rock_ridge += data[1:]
            elif signature == b"PX" and len(data) >= 4:
                mode = int.from_bytes(data[:4], "little")
        raw = rock_ridge or record[33 : 33 + record[32]].split(b";")[0].rstrip(b".").lower()
        name = os.fsdecode(raw)
        if not name or name in (".", "..") or "/" in name or "\x00" in name or len(raw) > 255:
            raise StorageError("Cannot read the context: the ISO image has an impossible file name")
        return name, mode


def _extent(record: bytes, block: int) -> tuple[int, int]:
    return int.from_bytes(record[2:6], "little") * block, int.from_bytes(record[10:14], "little")


def open_context(iso_fd: int, *, id_base: int | None) -> mounts.Detached:
    """A detached read-only tmpfs with the ISO's files, owned by the container's root.

    Owned, not idmapped: tmpfs has idmapped mounts only from Linux 6.3 on. Place it with id_base=None. Its size has room
    for the largest context twice (`refill`); what is not used costs nothing, and the container cannot write there.
    """
    iso = Iso(iso_fd)
    entries = list(iso.entries())
    owner = id_base or 0
    attributes = syscalls.ATTR_NODEV | syscalls.ATTR_NOSUID
    words: dict[str, str | None] = {"size": str(2 * _LIMIT), "mode": "0755", "uid": str(owner), "gid": str(owner)}
    try:
        detached = mounts.Detached(syscalls.mount_detached("tmpfs", "onelxc-context", words, attributes), "tmpfs", "")
    except OSError as error:
        raise StorageError(f"Cannot make a tmpfs for the context: {error.strerror}") from error
    try:
        for entry in entries:
            _write(detached.fd, iso, entry, entry.path, owner)
        syscalls.mount_setattr(detached.fd, set_=syscalls.ATTR_RDONLY)
    except OSError as error:
        detached.close()
        raise StorageError(f"Cannot extract the context: {error.strerror}") from error
    except BaseException:
        detached.close()
        raise
    return detached


def refill(iso_fd: int, target: str, *, id_base: int | None) -> None:
    """Put the files of another ISO into the context that is mounted at `target`, under the eyes of whoever sees it.

    Each file changes as a whole; what the new ISO has not got goes. The mounts stay read-only, the container's own
    ones too: written is through a mount that is attached nowhere.
    """
    iso = Iso(iso_fd)
    entries = list(iso.entries())
    owner = id_base or 0
    try:
        tree = syscalls.open_tree(target)
        try:
            syscalls.mount_setattr(tree, clear=syscalls.ATTR_RDONLY)
            kept = {entry.path for entry in entries}
            _remove_others(tree, kept, {entry.path for entry in entries if entry.is_directory})
            for entry in entries:
                if entry.is_directory and _is_directory(tree, entry.path):
                    continue
                temporary = entry.path if entry.is_directory else f"{entry.path}.onelxc-new"
                _write(tree, iso, entry, temporary, owner)
                if temporary != entry.path:
                    os.rename(temporary, entry.path, src_dir_fd=tree, dst_dir_fd=tree)
        finally:
            os.close(tree)
    except OSError as error:
        raise StorageError(f"Cannot renew the context: {error.strerror}") from error


def _remove_others(root_fd: int, kept: set[str], directories: set[str]) -> None:
    """Remove all but `kept`, and what is a directory and should be a file or the other way round."""
    for directory, names, files, fd in os.fwalk(".", topdown=False, dir_fd=root_fd, follow_symlinks=False):
        for name in [*files, *names]:
            path = os.path.normpath(os.path.join(directory, name))
            is_directory = name in names
            if path not in kept or is_directory != (path in directories):
                (os.rmdir if is_directory else os.unlink)(name, dir_fd=fd)


def _is_directory(root_fd: int, path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=root_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _write(root_fd: int, iso: Iso, entry: Entry, path: str, owner: int) -> None:
    """The tmpfs holds nothing but what was written here, so that plain relative names cannot lead elsewhere."""
    if entry.is_directory:
        os.mkdir(path, 0o700, dir_fd=root_fd)
        os.chmod(path, entry.mode, dir_fd=root_fd)
        os.chown(path, owner, owner, dir_fd=root_fd)
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600, dir_fd=root_fd)
    with open(fd, "wb", buffering=0) as file:
        file.write(iso.content(entry))
        os.fchown(fd, owner, owner)
        os.fchmod(fd, entry.mode)
