"""Sets the attributes that tar and cp cannot: ACLs that name their users, and what only the host's root may set.

GNU tar asks the host for the number of a name, and in the jail there is nobody to ask. A name means what it meant
where the archive was made: the number that goes with it at the archive's own files; else in its /etc/passwd and
/etc/group. Every path is resolved inside the new file system, whatever it holds.
"""

from __future__ import annotations

import base64
import errno
import os
import re
import stat
from collections.abc import Callable, Mapping

from onelxc.errors import StorageError
from onelxc.root import posixacl, syscalls
from onelxc.root.tarstream import Report

_ACL = "SCHILY.acl."
_ALLOWED = ("trusted.", "security.")
_MOST = 1 << 20
"""Bytes of a passwd or group file that are read."""
_ROOTS = ("", "rootfs/")
_DIGITS = re.compile("[0-9]{1,10}")


def restore(mount_fd: int, report: Report) -> None:
    """Set them all in the file system of the mount; StorageError names the first file where that cannot be."""
    if not report.deferred:
        return
    names = {
        "user": {**_named(mount_fd, "etc/passwd"), **_sure(report.users)},
        "group": {**_named(mount_fd, "etc/group"), **_sure(report.groups)},
    }
    for path, values in report.deferred.items():
        try:
            fd = syscalls.openat2(mount_fd, path or ".", os.O_PATH | os.O_NOFOLLOW)
        except OSError as error:
            raise StorageError(f"{_shown(path)}: its attributes cannot be set: {error.strerror}") from error
        try:
            for key, value in values.items():
                _set(fd, path, key, value, names)
        finally:
            os.close(fd)


def copy(source_fd: int, target_fd: int, watch: Callable[[], object]) -> None:
    """What a copy of one mount in another lacks of the attributes. StorageError names the file; OSError: no room."""
    pending = [""]
    while pending:
        watch()
        path = pending.pop()
        fd = syscalls.openat2(source_fd, path or ".", os.O_PATH | os.O_NOFOLLOW)
        copied = syscalls.openat2(target_fd, path or ".", os.O_PATH | os.O_NOFOLLOW)
        try:
            here, there = f"/proc/self/fd/{fd}", f"/proc/self/fd/{copied}"
            for key in os.listxattr(here):
                value = os.getxattr(here, key)
                if key not in os.listxattr(there) or os.getxattr(there, key) != value:
                    _write(there, path, key, value)
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                directory = syscalls.openat2(fd, ".", os.O_RDONLY | os.O_DIRECTORY)
                try:
                    pending += [f"{path}/{name}" for name in os.listdir(directory)]
                finally:
                    os.close(directory)
        finally:
            os.close(fd)
            os.close(copied)


def _write(place: str, path: str, key: str, value: bytes) -> None:
    try:
        os.setxattr(place, key, value)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise StorageError(f"{_shown(path)}: its attribute {_shown(key)} cannot be set: {error.strerror}") from error


def _set(fd: int, path: str, key: str, value: str, names: posixacl.Names) -> None:
    try:
        data = base64.b64decode(value)
        if key.startswith(_ACL):
            which = key[len(_ACL) :]
            key, data = f"system.posix_acl_{which}", posixacl.encode(data, names)
        elif not key.startswith(_ALLOWED):
            raise StorageError(f"an attribute {_shown(key)}")
        _write(f"/proc/self/fd/{fd}", path, key, data)
    except posixacl.UnknownName as error:
        where = "/etc/passwd" if error.kind == "user" else "/etc/group"
        raise StorageError(
            f"{_shown(path)}: its ACL names the {error.kind} {_shown(error.name)}, whose number neither {where} nor an"
            " owner in the archive tells; pack it with tar --numeric-owner"
        ) from error
    except (StorageError, ValueError) as error:
        raise StorageError(f"{_shown(path)}: {error}") from error


def _sure(owners: Mapping[str, int]) -> dict[str, int]:
    return {name: number for name, number in owners.items() if number >= 0}


def _named(mount_fd: int, path: str) -> dict[str, int]:
    """The numbers in the passwd or group file of a root file system; the first line with a name counts."""
    found: dict[str, int] = {}
    for root in _ROOTS:
        try:
            fd = syscalls.openat2(mount_fd, root + path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:
            continue
        with open(fd, "rb") as file:
            text = file.read(_MOST) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
        for line in os.fsdecode(text).split("\n"):
            parts = line.split(":")
            if len(parts) > 2 and _DIGITS.fullmatch(parts[2]):
                found.setdefault(parts[0], int(parts[2]))
    return found


def _shown(text: str) -> str:
    """A name as part of a line."""
    return ascii(text)[1:-1] or "/"
