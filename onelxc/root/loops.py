"""How does an image file become a block device? By a loop device that clears itself when its last user has gone.

Takes an open descriptor, never a path, so that nothing can be exchanged underneath. A device attached here is held by
the returned descriptor until a mount holds it; then it goes with the mount: there is no detach to forget.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import time
from dataclasses import dataclass

from onelxc.errors import StorageError
from onelxc.root import iocounters

_LOOP_CONFIGURE, _LOOP_SET_CAPACITY, _LOOP_CTL_GET_FREE, _LOOP_CLR_FD = 0x4C0A, 0x4C07, 0x4C82, 0x4C01
_LOOP_SET_DIRECT_IO, _LOOP_SET_STATUS64, _LOOP_GET_STATUS64 = 0x4C08, 0x4C04, 0x4C05
_READ_ONLY, _AUTOCLEAR = 1, 4
_TRIES = 200


class _LoopInfo(ctypes.Structure):
    """struct loop_info64 of linux/loop.h."""

    _fields_ = [
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * 64),
        ("lo_crypt_name", ctypes.c_char * 64),
        ("lo_encrypt_key", ctypes.c_char * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    ]


class _LoopConfig(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _LoopInfo),
        ("reserved", ctypes.c_uint64 * 8),
    ]


@dataclass
class Loop:
    """An attached loop device, held by `fd`."""

    path: str
    fd: int

    def close(self) -> None:
        """Let go; the device clears itself as soon as no mount uses it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def prefer_direct_io(self) -> None:
        """Past the host's page cache, which would keep and copy every page twice: with it, reading and writing take
        half as long again as on the host itself (bench/run). Asked for afterwards, because given at once the kernel
        makes the device's blocks as large as the datastore's alignment, and ext4 with smaller ones mounts no more.
        """
        try:
            fcntl.ioctl(self.fd, _LOOP_SET_DIRECT_IO, 1)
        except OSError:
            pass  # not with this datastore: through the cache then

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach(image_fd: int, *, read_only: bool = False, offset: int = 0, size: int = 0, name: str = "") -> Loop:
    """A loop device over `image_fd`; `offset` and `size` in bytes (0: to the end) select a partition of it.

    `name` is what losetup shows. Several processes may look for a free device at once: the loser looks again.
    """
    flags = _AUTOCLEAR | (_READ_ONLY if read_only else 0)
    config = _LoopConfig(fd=image_fd)
    config.info.lo_flags = flags
    config.info.lo_offset = offset
    config.info.lo_sizelimit = size
    config.info.lo_file_name = os.fsencode(name)[:63]
    cause = "all loop devices are taken"
    for _ in range(_TRIES):
        number = _free_number()
        path = f"/dev/loop{number}"
        try:
            device = _open(path, number, read_only)
        except OSError as error:
            raise StorageError(f"Cannot open {path}: {error.strerror}") from error
        try:
            fcntl.ioctl(device, _LOOP_CONFIGURE, bytes(config))
            iocounters.note(path)
            return Loop(path, device)
        except OSError as error:
            os.close(device)
            if error.errno not in (errno.EBUSY, errno.EAGAIN):
                raise StorageError(f"Cannot attach a loop device: {error.strerror}") from error
            time.sleep(0.01)
    raise StorageError(f"Cannot attach a loop device: {cause}")


def _free_number() -> int:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise StorageError(f"Cannot use loop devices: /dev/loop-control: {error.strerror}") from error
    try:
        return int(fcntl.ioctl(control, _LOOP_CTL_GET_FREE))
    except OSError as error:
        raise StorageError(f"Cannot find a free loop device: {error.strerror}") from error
    finally:
        os.close(control)


def _open(path: str, number: int, read_only: bool) -> int:
    """Open the device; where nobody makes device nodes (no devtmpfs, no udev), make it."""
    mode = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC
    for _ in range(50):
        try:
            return os.open(path, mode)
        except FileNotFoundError:
            if os.path.exists(f"/sys/block/loop{number}/dev"):
                try:
                    os.mknod(path, 0o600 | 0o060000, os.makedev(7, number))
                except FileExistsError:
                    pass
            time.sleep(0.02)
    return os.open(path, mode)


def refresh(device: str) -> None:
    """Tell the device that its file has grown."""
    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_SET_CAPACITY, 0)
    except OSError as error:
        raise StorageError(f"Cannot grow {device}: {error.strerror}") from error
    finally:
        os.close(fd)


def cut_off(device: str) -> None:
    """Make a device that is in use too short for what is mounted from it: whatever is read or written then fails."""
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        buffer = bytearray(bytes(_LoopInfo()))
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer, True)
        info = _LoopInfo.from_buffer(buffer)
        info.lo_sizelimit = 512
        fcntl.ioctl(fd, _LOOP_SET_STATUS64, bytes(info))
    except OSError:
        pass
    finally:
        os.close(fd)


def backing_identity(device: str) -> tuple[int, int] | None:
    """(st_dev, st_ino) of the file behind a loop device, None if it has none. The kernel's word, not a name."""
    info = _LoopInfo()
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        buffer = bytearray(bytes(info))
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, buffer, True)
        info = _LoopInfo.from_buffer(buffer)
        return _decode_device(info.lo_device), int(info.lo_inode)
    except OSError:
        return None
    finally:
        os.close(fd)


def backing_path(device: str) -> str:
    """The path of the file behind a loop device as the kernel knows it now: with " (deleted)" if so. "" if none."""
    try:
        with open(f"/sys/block/{os.path.basename(device)}/loop/backing_file", errors="surrogateescape") as file:
            return file.read().rstrip("\n")
    except OSError:
        return ""


def _decode_device(encoded: int) -> int:
    """The kernel's huge_encode_dev as os.stat gives it."""
    return os.makedev((encoded & 0xFFF00) >> 8, (encoded & 0xFF) | ((encoded >> 12) & 0xFFF00))


def loops_of(image: str | int) -> tuple[str, ...]:
    """The loop devices that hold this file (path or descriptor)."""
    status = os.stat(image) if isinstance(image, str) else os.fstat(image)
    found = []
    for name in sorted(os.listdir("/sys/block")):
        if not name.startswith("loop") or not os.path.exists(f"/sys/block/{name}/loop/backing_file"):
            continue
        if backing_identity(f"/dev/{name}") == (status.st_dev, status.st_ino):
            found.append(f"/dev/{name}")
    return tuple(found)
