"""Which files are on an ISO image, and how do they come into a directory? For the jail: an image may be a tenant's.

ISO 9660 with Rock Ridge names (what OpenNebula's mkisofs writes), every offset checked against the image. Joliet is not
needed then and not read. `main` runs as the user whose files they are to be, who sees that directory and the image.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from onelxc.errors import StorageError

_SECTOR = 2048
_DEPTH = 8
_ENTRIES = 10_000
LIMIT = 256 << 20
_PIECE = 1 << 20
_NEW = ".onelxc-new"


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

    def content(self, entry: Entry) -> Iterator[bytes]:
        """A file's bytes."""
        for position in range(0, entry.size, _PIECE):
            yield self._read(entry.offset + position, min(_PIECE, entry.size - position))

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
                if self.total > LIMIT:
                    raise StorageError(f"Cannot read the context: more than {LIMIT >> 20} MiB")
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


def main(iso_fd: int, directory: str) -> int:
    """Make the directory hold what the image does, and nothing else; each file changes as a whole. The exit code."""
    try:
        _fill(Iso(iso_fd), os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except (StorageError, OSError) as error:
        text = error.strerror or "" if isinstance(error, OSError) else str(error)
        os.write(2, text.encode(errors="replace"))
        return 1
    return 0


def _fill(iso: Iso, root_fd: int) -> None:
    entries = list(iso.entries())
    _remove_others(root_fd, {entry.path: entry.is_directory for entry in entries})
    for entry in entries:
        if not entry.is_directory:
            temporary = os.path.join(os.path.dirname(entry.path), _NEW)
            _write(root_fd, iso, entry, temporary)
            os.rename(temporary, entry.path, src_dir_fd=root_fd, dst_dir_fd=root_fd)
        elif not _is_directory(root_fd, entry.path):
            os.mkdir(entry.path, 0o700, dir_fd=root_fd)
            # its owner has no rights but an owner's here, and comes again
            os.chmod(entry.path, entry.mode | 0o700, dir_fd=root_fd)


def _remove_others(root_fd: int, kept: dict[str, bool]) -> None:
    """Remove all but `kept` (path: is it a directory), and what is a directory and should be a file or vice versa."""
    for directory, names, files, fd in os.fwalk(".", topdown=False, dir_fd=root_fd, follow_symlinks=False):
        for name in [*files, *names]:
            is_directory = name in names
            if kept.get(os.path.normpath(os.path.join(directory, name))) is not is_directory:
                (os.rmdir if is_directory else os.unlink)(name, dir_fd=fd)


def _is_directory(root_fd: int, path: str) -> bool:
    try:
        return stat.S_ISDIR(os.stat(path, dir_fd=root_fd, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _write(root_fd: int, iso: Iso, entry: Entry, path: str) -> None:
    """The directory holds nothing but what was written here, so that plain relative names cannot lead elsewhere."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(path, flags, 0o600, dir_fd=root_fd)
    with open(fd, "wb", buffering=0) as file:
        for piece in iso.content(entry):
            file.write(piece)
        os.fchmod(fd, entry.mode)
