"""The kernel's calls that Python 3.9 has no word for: mounts by descriptor, namespaces, resolution below a root.

Thin: one function a call, errors as OSError with the path or object in it, no policy. Numbers of calls from 424 on are
the same on every architecture; older ones go through libc's own wrappers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator, Mapping

_libc = ctypes.CDLL(None, use_errno=True)

_NR_OPEN_TREE, _NR_MOVE_MOUNT, _NR_FSOPEN, _NR_FSCONFIG, _NR_FSMOUNT = 428, 429, 430, 431, 432
_NR_PIDFD_OPEN, _NR_OPENAT2, _NR_MOUNT_SETATTR = 434, 437, 442

AT_FDCWD = -100
AT_EMPTY_PATH = 0x1000
AT_RECURSIVE = 0x8000
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40

ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, ATTR_NOEXEC, ATTR_NOATIME = 0x1, 0x2, 0x4, 0x8, 0x10
ATTR_IDMAP = 0x00100000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_SLAVE = 0x4000, 1 << 18, 1 << 19
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
_MNT_EXPIRE = 4

RESOLVE_NO_XDEV, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, RESOLVE_BENEATH, RESOLVE_IN_ROOT = 1, 2, 4, 8, 16

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000

_SYNC_FILE_RANGE_WRITE = 2
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_CLOEXEC = 1
_OPENAT2_TRIES = 1000

_PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 2, 3, 4
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_CAPBSET_DROP, _PR_CAP_AMBIENT = 1, 38, 24, 47
_PR_GET_SECUREBITS, _PR_SET_SECUREBITS, _SECBIT_NO_SETUID_FIXUP = 27, 28, 4
_CAPABILITY_VERSION_3 = 0x20080522

CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER, CAP_FSETID, CAP_SETGID, CAP_SETUID = 0, 1, 2, 3, 4, 6, 7
CAP_MKNOD, CAP_SETFCAP = 27, 31


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


class _CapHeader(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


def _failed(about: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), about)


def _syscall(number: int, about: str, *arguments: object) -> int:
    while True:
        ctypes.set_errno(0)
        result = int(_libc.syscall(ctypes.c_long(number), *arguments))
        if result >= 0:
            return result
        if ctypes.get_errno() != errno.EINTR:
            raise _failed(about)


def _int(value: int) -> ctypes.c_int:
    return ctypes.c_int(value)


def _path(path: str) -> ctypes.c_char_p:
    return ctypes.c_char_p(os.fsencode(path))


def openat2(dir_fd: int, path: str, flags: int, mode: int = 0, resolve: int = RESOLVE_IN_ROOT) -> int:
    """Open `path` below `dir_fd`, by default as if `dir_fd` were the file system's root. Gives a descriptor."""
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    size = ctypes.c_size_t(ctypes.sizeof(how))
    for _ in range(_OPENAT2_TRIES):
        try:
            return _syscall(_NR_OPENAT2, path, _int(dir_fd), _path(path), ctypes.byref(how), size)
        except BlockingIOError:
            # a mount or rename anywhere on the host, just now: the kernel cannot tell whether a ".." stayed below
            continue
    return _syscall(_NR_OPENAT2, path, _int(dir_fd), _path(path), ctypes.byref(how), size)


def open_tree(path: str, *, dir_fd: int = AT_FDCWD, clone: bool = True, recursive: bool = False) -> int:
    """A descriptor of the mount at `path`; cloned, it is a detached bind mount that goes when it is closed.

    An empty path names `dir_fd` itself.
    """
    flags = os.O_CLOEXEC | (OPEN_TREE_CLONE if clone else 0) | (AT_RECURSIVE if recursive else 0)
    if not path:
        flags |= AT_EMPTY_PATH
    return _syscall(_NR_OPEN_TREE, path or f"fd {dir_fd}", _int(dir_fd), _path(path), ctypes.c_uint(flags))


def move_mount(mount_fd: int, target: str, *, dir_fd: int = AT_FDCWD) -> None:
    """Attach the detached mount `mount_fd` at `target`; an empty target is the directory `dir_fd` itself."""
    flags = MOVE_MOUNT_F_EMPTY_PATH | (0 if target else MOVE_MOUNT_T_EMPTY_PATH)
    about = target or f"fd {dir_fd}"
    _syscall(_NR_MOVE_MOUNT, about, _int(mount_fd), _path(""), _int(dir_fd), _path(target), ctypes.c_uint(flags))


def mount_setattr(
    mount_fd: int,
    *,
    set_: int = 0,
    clear: int = 0,
    propagation: int = 0,
    userns_fd: int | None = None,
    recursive: bool = False,
) -> None:
    """Change the attributes of the mount `mount_fd`; with `userns_fd` its ids are seen through that namespace."""
    if userns_fd is not None:
        set_ |= ATTR_IDMAP
    attr = _MountAttr(set_, clear, propagation, userns_fd or 0)
    flags = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    size = ctypes.c_size_t(ctypes.sizeof(attr))
    _syscall(_NR_MOUNT_SETATTR, "mount", _int(mount_fd), _path(""), ctypes.c_uint(flags), ctypes.byref(attr), size)


def mount_detached(kind: str, source: str, options: Mapping[str, str | None], attributes: int = 0) -> int:
    """Mount `source` (a device) as file system `kind` without attaching it anywhere; gives its descriptor.

    `options` are the file system's own, None for one without value. Nothing is left if the descriptor is closed. The
    error's text is the kernel's own reason where it gives one.
    """
    context = _syscall(_NR_FSOPEN, kind, _path(kind), ctypes.c_uint(_CLOEXEC))
    try:
        try:
            _fsconfig(context, _FSCONFIG_SET_STRING, "source", source)
            for name, value in options.items():
                _fsconfig(context, _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING, name, value)
            _fsconfig(context, _FSCONFIG_CMD_CREATE, None, None)
            return _syscall(_NR_FSMOUNT, kind, _int(context), ctypes.c_uint(_CLOEXEC), ctypes.c_uint(attributes))
        except OSError as error:
            said = _messages(context)
            if said:
                raise OSError(error.errno, f"{error.strerror} ({said})", source) from error
            raise OSError(error.errno, error.strerror, source) from error
    finally:
        os.close(context)


def _fsconfig(context: int, command: int, key: str | None, value: str | None) -> None:
    key_c = None if key is None else _path(key)
    value_c = None if value is None else _path(value)
    _syscall(_NR_FSCONFIG, key or "create", _int(context), ctypes.c_uint(command), key_c, value_c, _int(0))


def _messages(context: int) -> str:
    """What the kernel wrote about a failed mount: lines `e text`, `w text`, `i text`, one a read."""
    said: list[str] = []
    while len(said) < 8:
        try:
            line = os.read(context, 4096).decode(errors="replace").strip()
        except OSError:
            break
        if not line:
            break
        if line.startswith("e "):
            said.append(line[2:])
    return "; ".join(said)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    ctypes.set_errno(0)
    if _libc.mount(_path(source), _path(target), _path(kind), ctypes.c_ulong(flags), _path(data)) != 0:
        raise _failed(target)


def umount(target: str, flags: int = UMOUNT_NOFOLLOW) -> None:
    """umount2(2)."""
    ctypes.set_errno(0)
    if _libc.umount2(_path(target), _int(flags)) != 0:
        raise _failed(target)


def is_unused_mount(target: str) -> bool:
    """Whether an unmount would succeed now. Nothing is unmounted.

    The kernel only marks what it is asked to expire; the look at it afterwards takes the mark away again.
    """
    ctypes.set_errno(0)
    _libc.umount2(_path(target), _int(_MNT_EXPIRE | UMOUNT_NOFOLLOW))
    unused = ctypes.get_errno() == errno.EAGAIN
    os.stat(target)
    return unused


def pivot_root(new: str, old: str) -> None:
    """pivot_root(2)."""
    ctypes.set_errno(0)
    if _libc.pivot_root(_path(new), _path(old)) != 0:
        raise _failed(new)


def unshare(flags: int) -> None:
    """unshare(2)."""
    ctypes.set_errno(0)
    if _libc.unshare(_int(flags)) != 0:
        raise _failed("namespaces")


def setns(fd: int, kind: int = 0) -> None:
    """setns(2)."""
    ctypes.set_errno(0)
    if _libc.setns(_int(fd), _int(kind)) != 0:
        raise _failed(f"namespace of fd {fd}")


def syncfs(fd: int) -> None:
    """Write out the file system that `fd` lies on; raises what a write-back could not write (since Linux 5.8)."""
    ctypes.set_errno(0)
    if _libc.syncfs(_int(fd)) != 0:
        raise _failed("file system")


def start_write_back(fd: int) -> None:
    """Let the kernel begin to write a file's pages to the disk, waiting for none: sync_file_range(2)."""
    ctypes.set_errno(0)
    if _libc.sync_file_range(_int(fd), ctypes.c_int64(0), ctypes.c_int64(0), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE)):
        raise _failed("file")


def pidfd_open(pid: int) -> int:
    """pidfd_open(2)."""
    return _syscall(_NR_PIDFD_OPEN, f"process {pid}", _int(pid), ctypes.c_uint(0))


def die_with_parent(signal_number: int = 9) -> None:
    """Be killed when the thread that forked us ends. The caller has to look whether that happened already."""
    _libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0)


def keep_capabilities(keep: tuple[int, ...]) -> None:
    """Give up every capability but `keep`, for ourselves and for what we execute, and set no_new_privs.

    A process of uid 0 gets its bounding set at exec, so that set is what is cut down.
    """
    for capability in range(64):
        if capability not in keep:
            _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0)
    words = [0, 0]
    for capability in keep:
        words[capability // 32] |= 1 << (capability % 32)
    data = (_CapData * 2)(_CapData(words[0], words[0], 0), _CapData(words[1], words[1], 0))
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    ctypes.set_errno(0)
    if _libc.capset(ctypes.byref(header), ctypes.byref(data)) != 0:
        raise _failed("capabilities")
    if _libc.prctl(_PR_SET_NO_NEW_PRIVS, ctypes.c_ulong(1), 0, 0, 0) != 0:
        raise _failed("no_new_privs")


@contextlib.contextmanager
def file_ids(uid: int, gid: int) -> Iterator[None]:
    """With the rights of another user on files, in this thread: setfsuid(2). The kernel takes a change of ids as a
    reason to forget two things of the process, which are put back.
    """
    parent, dumpable = os.getppid(), _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)
    signal_number = ctypes.c_int(0)
    _libc.prctl(_PR_GET_PDEATHSIG, ctypes.byref(signal_number), 0, 0, 0)
    group = _libc.setfsgid(ctypes.c_uint(gid))
    user = _libc.setfsuid(ctypes.c_uint(uid))
    try:
        yield
    finally:
        _libc.setfsuid(ctypes.c_uint(user))
        _libc.setfsgid(ctypes.c_uint(group))
        _libc.prctl(_PR_SET_DUMPABLE, ctypes.c_ulong(dumpable == 1), 0, 0, 0)
        if signal_number.value:
            die_with_parent(signal_number.value)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal_number.value)


def keep_capabilities_over_ids() -> int:
    """Keep the effective capabilities when the effective user becomes another; gives the bits for `set_securebits`."""
    before = int(_libc.prctl(_PR_GET_SECUREBITS, 0, 0, 0, 0))
    set_securebits(before | _SECBIT_NO_SETUID_FIXUP)
    return before


def set_securebits(bits: int) -> None:
    """prctl(PR_SET_SECUREBITS)."""
    ctypes.set_errno(0)
    if _libc.prctl(_PR_SET_SECUREBITS, ctypes.c_ulong(bits), 0, 0, 0) != 0:
        raise _failed("securebits")
