"""Which init is in a root file system, and how a directory is made inside it.

Everything here goes through a descriptor of the mounted root and openat2(RESOLVE_IN_ROOT): a tenant's symbolic links
lead where they lead inside the container, and nowhere on the host. What libvirt needs before a start is `targets`'.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat

from onelxc.errors import StorageError, TemplateError
from onelxc.model import Init
from onelxc.root import syscalls

_BY_NAME = {
    "systemd": Init.SYSTEMD,
    "busybox": Init.BUSYBOX,
    "openrc-init": Init.OPENRC,
    "init-openrc": Init.OPENRC,
}
_BY_CONTENT = (
    (b"systemd.unit=", Init.SYSTEMD),
    (b"BusyBox v", Init.BUSYBOX),
    (b"openrc-init", Init.OPENRC),
    (b"INIT_VERSION=sysvinit", Init.SYSVINIT),
    (b"/dev/initctl", Init.SYSVINIT),
)
_LINKS = 40


def make_directory(root_fd: int, path: str) -> None:
    """mkdir -p inside the root. What is there already, also behind a symbolic link, stays as it is."""
    below = posixpath.normpath("/" + path.lstrip("/"))
    if below == "/":
        return
    try:
        fd = syscalls.openat2(root_fd, below, os.O_PATH | os.O_DIRECTORY)
        os.close(fd)
        return
    except FileNotFoundError:
        pass
    except OSError as error:
        raise StorageError(f"Cannot make {below} in the root file system: {error.strerror}") from error
    parent, name = posixpath.split(below)
    make_directory(root_fd, parent)
    directory = syscalls.openat2(root_fd, parent, os.O_PATH | os.O_DIRECTORY)
    try:
        os.mkdir(name, 0o755, dir_fd=directory)
        owner = os.fstat(root_fd)  # other than 0 in an image that another driver shifted
        if (os.geteuid(), os.getegid()) != (owner.st_uid, owner.st_gid) and os.geteuid() == 0:
            os.chown(name, owner.st_uid, owner.st_gid, dir_fd=directory, follow_symlinks=False)
    except FileExistsError as error:
        # A symbolic link that leads nowhere: nothing may be made behind it, and libvirt could not mount there.
        raise StorageError(f"Cannot make {below} in the root file system: a dangling symbolic link is there") from error
    except OSError as error:
        raise StorageError(f"Cannot make {below} in the root file system: {error.strerror}") from error
    finally:
        os.close(directory)


def find_init(root_fd: int, init: str) -> Init:
    """Which init the path names inside the root; TemplateError where there is none that could be executed.

    An init may be a script, whose interpreter is then looked for as well, since libvirt reports neither.
    """
    if not init.startswith("/"):
        raise TemplateError(f"Cannot start {init}: the init has to be an absolute path inside the root file system")
    return _look(root_fd, init, init, 0)


def _look(root_fd: int, init: str, asked: str, depth: int) -> Init:
    try:
        path_fd = syscalls.openat2(root_fd, init, os.O_PATH)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise StorageError(f"Cannot start {asked}: {_missing(root_fd, init, asked)}") from error
        raise StorageError(f"Cannot start {asked}: {init} in the root file system: {error.strerror}") from error
    try:
        mode = os.fstat(path_fd).st_mode
    finally:
        os.close(path_fd)
    if not stat.S_ISREG(mode):
        raise StorageError(f"Cannot start {asked}: {init} in the root file system is not a file")
    if not mode & 0o111:
        raise StorageError(f"Cannot start {asked}: {init} in the root file system is not executable")
    fd = syscalls.openat2(root_fd, init, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    with open(fd, "rb", buffering=0) as file:
        head = file.read(256)
        if head.startswith(b"#!"):
            words = head[2:].split(b"\n", 1)[0].split()
            if depth >= 4 or not words:
                raise StorageError(f"Cannot start {asked}: {init} names no interpreter")
            interpreter = os.fsdecode(words[0])
            if interpreter.startswith("/"):
                _look(root_fd, interpreter, asked, depth + 1)
            return Init.OTHER
        if depth:
            return Init.OTHER
        return _kind(root_fd, init, fd)


def _missing(root_fd: int, init: str, asked: str) -> str:
    if init != asked:
        return f"its interpreter {init} is not in the root file system"
    for other in ("/sbin/init", "/lib/systemd/systemd", "/bin/init", "/init", "/bin/busybox"):
        try:
            os.close(syscalls.openat2(root_fd, other, os.O_PATH))
        except OSError:
            continue
        return f"there is no {init} in the root file system (but {other})"
    return f"there is no {init} in the root file system"


def _kind(root_fd: int, init: str, fd: int) -> Init:
    """By the name that the path's links end at, else by what its binary contains."""
    name = posixpath.basename(_final_name(root_fd, init))
    if name in _BY_NAME:
        if _BY_NAME[name] is Init.BUSYBOX and posixpath.basename(init) not in ("init", "linuxrc"):
            return Init.OTHER
        return _BY_NAME[name]
    if posixpath.basename(init) not in ("init", "linuxrc", "systemd") and name != "init":
        return Init.OTHER
    os.lseek(fd, 0, os.SEEK_SET)
    content = b""
    while len(content) < 8 << 20:
        chunk = os.read(fd, 1 << 20)
        if not chunk:
            break
        content += chunk
    for mark, kind in _BY_CONTENT:
        if mark in content:
            return kind
    return Init.OTHER


def _final_name(root_fd: int, path: str) -> str:
    """The path at the end of the last component's symbolic links, each resolved inside the root."""
    for _ in range(_LINKS):
        parent, name = posixpath.split(path)
        directory = syscalls.openat2(root_fd, parent or "/", os.O_PATH | os.O_DIRECTORY)
        try:
            target = os.readlink(name, dir_fd=directory)
        except OSError:
            return path
        finally:
            os.close(directory)
        path = target if target.startswith("/") else posixpath.join(parent, target)
    return path
